// The kernels for sequences that are contiguous in time. A lane holds 16 bytes of a row, a warp a tile
// of 32 such vectors; the inputs before a vector come from the lanes before it, and for the first lanes
// of a tile from the last ones of the tile before.
#pragma once

#include "causal_conv1d_common.cuh"

namespace trifuse::cuda::conv {

template <typename T, int kWidth>
struct TimeRow {
  static constexpr int kLength = 16 / int(sizeof(T)), kTile = 32 * kLength;
  static constexpr int kHalo = kWidth - 1, kHaloLanes = (kHalo + kLength - 1) / kLength;
  static constexpr Edges kPlain = (Edges(1) << kWidth) - 1;
  using Raw = Vector<T, kLength>;

  const int lane = int(threadIdx.x) % 32;
  const Task task;
  float weight[kWidth], bias;

  TRIFUSE_DEVICE explicit TimeRow(const ConvArgs& p) : task(p) {}
  TRIFUSE_DEVICE int64_t channel() const { return task.column; }

  // One lane's vector at `time`, zero outside of [0, end).
  TRIFUSE_DEVICE Raw load(const Sequence& s, int64_t time, int64_t end) const {
    Raw raw;
    const T* from = static_cast<const T*>(s.ptr) + offset(s, task.batch, channel(), time);
    if (s.vectors && time >= 0 && time + kLength <= end) {
      raw = *reinterpret_cast<const Raw*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < kLength; ++i) {
        raw.v[i] = time + i >= 0 && time + i < end ? from[i * s.time] : from_float<T>(0.0f);
      }
    }
    return raw;
  }
  // The last lanes' vectors of the tile before this one; nobody asks the others. Left of a sequence without
  // edges stand its initial states.
  TRIFUSE_DEVICE Raw load_before(const ConvArgs& p, int64_t tile) const {
    const int64_t time = tile - kTile + lane * kLength;
    const bool asked = lane >= 32 - kHaloLanes;
    if (tile > 0 || p.edges != nullptr || p.initial_states == nullptr) return load(p.x, time, asked ? tile : time);
    Raw raw;
    const T* const from = static_cast<const T*>(p.initial_states) + state_offset(p, task.batch, channel(), 0);
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      raw.v[i] = time + i + kHalo >= 0 ? from[time + i + kHalo] : from_float<T>(0.0f);
    }
    return raw;
  }
  TRIFUSE_DEVICE void store(const Sequence& s, int64_t time, int64_t end, const float (&x)[kLength]) const {
    T* to = static_cast<T*>(s.ptr) + offset(s, task.batch, channel(), time);
    if (s.vectors && time + kLength <= end) {
      Raw raw;
#pragma unroll
      for (int i = 0; i < kLength; ++i) raw.v[i] = from_float<T>(x[i]);
      *reinterpret_cast<Raw*>(to) = raw;
    } else {
#pragma unroll
      for (int i = 0; i < kLength; ++i) {
        if (time + i < end) to[i * s.time] = from_float<T>(x[i]);
      }
    }
  }

  // x from kHalo positions before this lane's vector on. The last lanes give what they hold of the tile
  // before, which nobody but the first lanes asks of them.
  TRIFUSE_DEVICE void with_halo(const Raw& before, const Raw& own, float (&x)[kHalo + kLength]) const {
#pragma unroll
    for (int j = 1; j <= kHalo; ++j) {
      const int lanes = (j + kLength - 1) / kLength, i = lanes * kLength - j;
      const float give = to_float(lane >= 32 - lanes ? before.v[i] : own.v[i]);
      x[kHalo - j] = __shfl_sync(kFullWarp, give, (lane - lanes) & 31);
    }
#pragma unroll
    for (int i = 0; i < kLength; ++i) x[kHalo + i] = to_float(own.v[i]);
  }
  // The same to the right: own values, then kHalo of the lanes after.
  TRIFUSE_DEVICE void with_right_halo(const float (&own)[kLength], const float (&after)[kLength],
                                      float (&x)[kLength + kHalo]) const {
#pragma unroll
    for (int i = 0; i < kLength; ++i) x[i] = own[i];
#pragma unroll
    for (int j = 0; j < kHalo; ++j) {
      const int lanes = j / kLength + 1, i = j % kLength;
      const float give = lane < lanes ? after[i] : own[i];
      x[kLength + j] = __shfl_sync(kFullWarp, give, (lane + lanes) & 31);
    }
  }

  TRIFUSE_DEVICE Edges edges_at(const ConvArgs& p, int64_t position) const {
    return position < p.seqlen ? p.edges[task.batch * p.seqlen + position] : kPlain;
  }
  // Whether no sequence begins or ends at a position of the tile or within kHalo after it.
  TRIFUSE_DEVICE bool plain(const ConvArgs& p, int64_t tile, int halo) const {
    if (p.edges == nullptr) return true;
    bool all = true;
#pragma unroll
    for (int i = 0; i < kLength; ++i) all = all && edges_at(p, tile + i * 32 + lane) == kPlain;
    if (lane < halo) all = all && edges_at(p, tile + kTile + lane) == kPlain;
    return __ballot_sync(kFullWarp, !all) == 0;
  }
  TRIFUSE_DEVICE void convolve(const float (&x)[kHalo + kLength], float (&sums)[kLength]) const {
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      sums[i] = bias;
#pragma unroll
      for (int w = 0; w < kWidth; ++w) sums[i] = fma(weight[w], x[i + w], sums[i]);
    }
  }
  // The same where some taps do not count, or read the initial states.
  TRIFUSE_DEVICE void convolve(const ConvArgs& p, int64_t time, const Edges* edges, const float (&x)[kHalo + kLength],
                               float (&sums)[kLength]) const {
    Edges any = 0;
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      sums[i] = bias;
      any |= edges[i];
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        if (edges[i] >> (kWidth - 1 - w) & 1) sums[i] = fma(weight[w], x[i + w], sums[i]);
      }
    }
    if ((any & kInitialBits) == 0) return;
#pragma unroll 1
    for (int64_t at = time; at < time + kLength; ++at) {
      if ((edges_at(p, at) & kInitialBits) == 0) continue;
      const float part = initial_part<T>(p, task.batch, channel(), at);
#pragma unroll
      for (int i = 0; i < kLength; ++i) sums[i] += at == time + i ? part : 0.0f;
    }
  }
};

template <typename T, int kWidth>
struct TimeForward : TimeRow<T, kWidth> {
  using Row = TimeRow<T, kWidth>;
  using Row::kHalo, Row::kLength, Row::kTile;
  using typename Row::Raw;
  static constexpr int kTiles = 4;  // of a segment: 64 bytes of a row are on their way to a lane

  const FwdArgs& p;

  TRIFUSE_DEVICE explicit TimeForward(const FwdArgs& args) : Row(args), p(args) {}

  TRIFUSE_DEVICE void run() {
    if (!this->task.any) return;
    const int64_t first = this->task.begin + this->lane * kLength;
    Raw raw[kTiles + 1];
    raw[0] = this->load_before(p, this->task.begin);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) raw[j + 1] = this->load(p.x, first + j * kTile, p.seqlen);
    load_weight(p, this->channel(), this->weight, this->bias);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (this->task.begin + j * kTile < p.seqlen) tile(this->task.begin + j * kTile, raw[j], raw[j + 1]);
    }
  }
  TRIFUSE_DEVICE void tile(int64_t begin, const Raw& before, const Raw& own) const {
    float x[kHalo + kLength], y[kLength];
    this->with_halo(before, own, x);
    const int64_t time = begin + this->lane * kLength;
    const bool plain = this->plain(p, begin, 0);
    Edges edges[kLength];
    if (plain) {
      this->convolve(x, y);
    } else {
#pragma unroll
      for (int i = 0; i < kLength; ++i) edges[i] = this->edges_at(p, time + i);
      this->convolve(p, time, edges, x, y);
    }
    if (p.silu) {
#pragma unroll
      for (int i = 0; i < kLength; ++i) y[i] = silu(y[i]);
    }
    if (!plain) {
#pragma unroll
      for (int i = 0; i < kLength; ++i) y[i] = edges[i] & 1 ? y[i] : 0.0f;
    }
    this->store(p.y, time, p.seqlen, y);
  }
};

// From the last tile to the first, so that the gradients after a tile are at hand when it needs them.
template <typename T, int kWidth>
struct TimeBackward : TimeRow<T, kWidth> {
  using Row = TimeRow<T, kWidth>;
  using Row::kHalo, Row::kLength, Row::kTile, Row::kPlain;
  using typename Row::Raw;

  const BwdArgs& p;
  float dweight[kWidth], dbias = 0.0f;
  float after[kLength];  // gradients of the convolution's sums in the tile after

  TRIFUSE_DEVICE explicit TimeBackward(const BwdArgs& args) : Row(args), p(args) {}

  TRIFUSE_DEVICE void run() {
    if (!this->task.any) return;
    load_weight(p, this->channel(), this->weight, this->bias);
#pragma unroll
    for (int w = 0; w < kWidth; ++w) dweight[w] = 0.0f;
#pragma unroll
    for (int i = 0; i < kLength; ++i) after[i] = 0.0f;
    const int64_t begin = this->task.begin, end = this->task.end;
    // Of the segment after this one, its first kHalo positions, for their gradients alone.
    int64_t tile = end < p.seqlen ? end : begin + ((end - begin - 1) & ~int64_t(kTile - 1));
    Raw own = this->load(p.x, tile + this->lane * kLength, limit(tile));
    Raw dy = this->load(p.dy, tile + this->lane * kLength, limit(tile));
#pragma unroll 1
    for (; tile >= begin; tile -= kTile) {
      Raw before, dy_before;
      if (tile == begin) {
        before = this->load_before(p, tile);
      } else {
        before = this->load(p.x, tile - kTile + this->lane * kLength, p.seqlen);
        dy_before = this->load(p.dy, tile - kTile + this->lane * kLength, p.seqlen);
      }
      one_tile(tile, before, own, dy);
      own = before;
      dy = dy_before;
    }
    reduce();
  }
  TRIFUSE_DEVICE int64_t limit(int64_t tile) const {
    const int64_t halo = this->task.end + kHalo;
    return tile < this->task.end || halo > p.seqlen ? p.seqlen : halo;
  }
  TRIFUSE_DEVICE void one_tile(int64_t tile, const Raw& before, const Raw& own, const Raw& dy) {
    float x[kHalo + kLength], g[kLength], all[kLength + kHalo], dx[kLength];
    this->with_halo(before, own, x);
    const bool plain = this->plain(p, tile, kHalo), mine = tile < this->task.end;
    const int64_t time = tile + this->lane * kLength;
    Edges edges[kLength + kHalo];
    if (plain) {
      this->convolve(x, g);
    } else {
#pragma unroll
      for (int i = 0; i < kLength + kHalo; ++i) edges[i] = this->edges_at(p, time + i);
      this->convolve(p, time, edges, x, g);
    }
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      const float slope = p.silu ? silu_slope(g[i]) : 1.0f;
      // Past the end there is no position, although its window reaches inputs that may be NaN.
      const bool live = time + i < p.seqlen && (plain || (edges[i] & 1) != 0);
      g[i] = live ? to_float(dy.v[i]) * slope : 0.0f;
    }
    if (mine) plain ? add_weights(time, x, g) : add_weights(time, edges, x, g);
    this->with_right_halo(g, after, all);
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      after[i] = g[i];
      dx[i] = 0.0f;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        if (plain || (edges[i + k] >> k & 1) != 0) dx[i] = fma(this->weight[kWidth - 1 - k], all[i + k], dx[i]);
      }
    }
    if (!plain && p.dfinal_states != nullptr) add_final(time, dx);
    if (mine) this->store(p.dx, time, p.seqlen, dx);
  }
  TRIFUSE_DEVICE void add_weights(int64_t time, const float (&x)[kHalo + kLength], const float (&g)[kLength]) {
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      if (time + i >= p.seqlen) continue;
#pragma unroll
      for (int w = 0; w < kWidth; ++w) dweight[w] = fma(g[i], x[i + w], dweight[w]);
      dbias += g[i];
    }
  }
  TRIFUSE_DEVICE void add_weights(int64_t time, const Edges* edges, const float (&x)[kHalo + kLength],
                                  const float (&g)[kLength]) {
    Edges any = 0;
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      if (time + i >= p.seqlen) continue;
      any |= edges[i];
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        if (edges[i] >> (kWidth - 1 - w) & 1) dweight[w] = fma(g[i], x[i + w], dweight[w]);
      }
      dbias += g[i];
    }
    if ((any & kInitialBits) == 0) return;
#pragma unroll 1
    for (int64_t at = time; at < time + kLength; ++at) {
      if ((this->edges_at(p, at) & kInitialBits) == 0) continue;
      float one = 0.0f;
#pragma unroll
      for (int i = 0; i < kLength; ++i) one = at == time + i ? g[i] : one;
      add_initial_part<T>(p, this->task.batch, this->channel(), at, one, dweight);
    }
  }
  TRIFUSE_DEVICE void add_final(int64_t time, float (&dx)[kLength]) const {
#pragma unroll 1
    for (int64_t at = time; at < time + kLength; ++at) {
      if (this->edges_at(p, at) >> kFinalBit == 0) continue;
      const float add = final_gradient<T>(p, this->task.batch, this->channel(), at, this->edges_at(p, at));
#pragma unroll
      for (int i = 0; i < kLength; ++i) dx[i] += at == time + i ? add : 0.0f;
    }
  }
  TRIFUSE_DEVICE void reduce() {
    float* to = p.partials + (this->task.batch * p.segments + this->task.segment) * (kWidth + 1) * p.dim;
#pragma unroll
    for (int w = 0; w <= kWidth; ++w) {
      float sum = w < kWidth ? dweight[w < kWidth ? w : 0] : dbias;
#pragma unroll
      for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(kFullWarp, sum, by);
      if (this->lane == 0) to[w * p.dim + this->channel()] = sum;
    }
  }
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<kWidth>)
    conv_time_fwd_kernel(const __grid_constant__ FwdArgs p) {
  TimeForward<T, kWidth>(p).run();
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<kWidth>)
    conv_time_bwd_kernel(const __grid_constant__ BwdArgs p) {
  TimeBackward<T, kWidth>(p).run();
}

}  // namespace trifuse::cuda::conv
