// The kernels for sequences whose channels are contiguous. A lane holds two neighbouring channels, of which
// it keeps the last inputs (and, going backward, the last gradients) while it walks through time, a few
// steps at once: while some are computed, the next are on their way.
#pragma once

#include "causal_conv1d_common.cuh"

namespace trifuse::cuda::conv {

template <typename T, int kWidth, int kStepsAtOnce>
struct ChannelColumn {
  static constexpr int kSteps = kStepsAtOnce, kHalo = kWidth - 1, kCount = kHalo + kSteps;
  static constexpr Edges kPlain = (Edges(1) << kWidth) - 1, kAllTaps = kTapBits | kInitialBits;
  using Raw = Vector<T, kChannels>;

  const Task task;
  const int64_t channel;
  float weight[kChannels][kWidth], bias[kChannels];
  float x[kChannels][kCount];  // from kHalo positions before the first of kSteps on

  TRIFUSE_DEVICE explicit ChannelColumn(const ConvArgs& p)
      : task(p), channel((task.column * 32 + int(threadIdx.x) % 32) * kChannels) {}

  TRIFUSE_DEVICE void load_weights(const ConvArgs& p) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) load_weight(p, channel + c, weight[c], bias[c]);
  }
  TRIFUSE_DEVICE bool whole(const ConvArgs& p, const Sequence& s) const {
    return s.vectors && channel + kChannels <= p.dim;
  }
  // kMost positions from `time` on; zero where there is no such position or channel.
  template <int kMost>
  TRIFUSE_DEVICE void load(const ConvArgs& p, const Sequence& s, int64_t time, Raw (&raw)[kMost]) const {
    const T* from = static_cast<const T*>(s.ptr) + offset(s, task.batch, channel, time);
    if (whole(p, s) && time >= 0 && time + kMost <= p.seqlen) {
#pragma unroll
      for (int i = 0; i < kMost; ++i, from += s.time) raw[i] = *reinterpret_cast<const Raw*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < kMost; ++i, from += s.time) {
        const bool there = time + i >= 0 && time + i < p.seqlen;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          raw[i].v[c] = there && channel + c < p.dim ? from[c * s.dim] : from_float<T>(0.0f);
        }
      }
    }
  }
  TRIFUSE_DEVICE void store(const ConvArgs& p, const Sequence& s, T* to, const float (&x)[kChannels]) const {
    if (whole(p, s)) {
      Raw raw;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) raw.v[c] = from_float<T>(x[c]);
      *reinterpret_cast<Raw*>(to) = raw;
    } else {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (channel + c < p.dim) to[c * s.dim] = from_float<T>(x[c]);
      }
    }
  }
  // The inputs just before the segment. Left of a sequence without edges stand its initial states.
  TRIFUSE_DEVICE void enter(const ConvArgs& p) {
    Raw raw[kHalo];
    load(p, p.x, task.begin - kHalo, raw);
#pragma unroll
    for (int j = 0; j < kHalo; ++j) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) x[c][j] = to_float(raw[j].v[c]);
    }
    if (task.begin > 0 || p.edges != nullptr || p.initial_states == nullptr) return;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (channel + c >= p.dim) break;
      const T* const from = static_cast<const T*>(p.initial_states) + state_offset(p, task.batch, channel + c, 0);
#pragma unroll
      for (int j = 0; j < kHalo; ++j) x[c][j] = to_float(from[j]);
    }
  }
  TRIFUSE_DEVICE void take(const Raw (&raw)[kSteps]) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) x[c][kHalo + i] = to_float(raw[i].v[c]);
    }
  }
  template <typename X>
  TRIFUSE_DEVICE static void shift(X (&x)[kCount]) {
#pragma unroll
    for (int j = 0; j < kHalo; ++j) x[j] = x[j + kSteps];
  }

  TRIFUSE_DEVICE Edges edges_at(const ConvArgs& p, int64_t position) const {
    return p.edges != nullptr && position < p.seqlen ? p.edges[task.batch * p.seqlen + position] : kPlain;
  }
  // The sums of step i, which is at `time`.
  TRIFUSE_DEVICE void convolve(const ConvArgs& p, int64_t time, Edges edges, int i, float (&sums)[kChannels]) const {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) sums[c] = bias[c];
    if ((edges & kAllTaps) == kPlain) {
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) sums[c] = fma(weight[c][w], x[c][i + w], sums[c]);
      }
      return;
    }
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      if ((edges >> (kWidth - 1 - w) & 1) == 0) continue;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sums[c] = fma(weight[c][w], x[c][i + w], sums[c]);
    }
    if ((edges & kInitialBits) == 0) return;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (channel + c < p.dim) sums[c] += initial_part<T>(p, task.batch, channel + c, time);
    }
  }
};

template <typename T, int kWidth>
struct ChannelForward : ChannelColumn<T, kWidth, kForwardSteps> {
  using Column = ChannelColumn<T, kWidth, kForwardSteps>;
  using Column::kSteps;
  using typename Column::Raw;

  const FwdArgs& p;

  TRIFUSE_DEVICE explicit ChannelForward(const FwdArgs& args) : Column(args), p(args) {}

  TRIFUSE_DEVICE void run() {
    if (!this->task.any) return;
    this->load_weights(p);
    this->enter(p);
    Raw next[kSteps];
    this->load(p, p.x, this->task.begin, next);
    T* to = static_cast<T*>(p.y.ptr) + offset(p.y, this->task.batch, this->channel, this->task.begin);
#pragma unroll 1
    for (int64_t time = this->task.begin; time < this->task.end; time += kSteps) {
      this->take(next);
      Edges edges[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) edges[i] = this->edges_at(p, time + i);
      if (time + kSteps < this->task.end) this->load(p, p.x, time + kSteps, next);
#pragma unroll
      for (int i = 0; i < kSteps; ++i, to += p.y.time) {
        if (time + i < this->task.end) step(time + i, edges[i], i, to);
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) this->shift(this->x[c]);
    }
  }
  TRIFUSE_DEVICE void step(int64_t time, Edges edges, int i, T* to) const {
    float y[kChannels];
    this->convolve(p, time, edges, i, y);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (p.silu) y[c] = silu(y[c]);
      if ((edges & 1) == 0) y[c] = 0.0f;
    }
    this->store(p, p.y, to, y);
  }
};

// dx of a position is written once the gradients of the kHalo positions after it are known; those of
// the segment after this one are computed for that alone.
template <typename T, int kWidth>
struct ChannelBackward : ChannelColumn<T, kWidth, kBackwardSteps> {
  using Column = ChannelColumn<T, kWidth, kBackwardSteps>;
  using Column::kSteps, Column::kHalo, Column::kCount;
  using typename Column::Raw;

  const BwdArgs& p;
  float dweight[kChannels][kWidth], dbias[kChannels];
  float g[kChannels][kCount];  // like x: gradients of the convolution's sums
  Edges edges[kCount];
  Raw next_x[kSteps], next_dy[kSteps];

  TRIFUSE_DEVICE explicit ChannelBackward(const BwdArgs& args) : Column(args), p(args) {}

  TRIFUSE_DEVICE void run() {
    if (!this->task.any) return;
    this->load_weights(p);
    this->enter(p);
#pragma unroll
    for (int j = 0; j < kHalo; ++j) edges[j] = 0;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      dbias[c] = 0.0f;
#pragma unroll
      for (int w = 0; w < kWidth; ++w) dweight[c][w] = 0.0f;
#pragma unroll
      for (int j = 0; j < kHalo; ++j) g[c][j] = 0.0f;
    }
    const int64_t begin = this->task.begin;
    this->load(p, p.x, begin, next_x);
    this->load(p, p.dy, begin, next_dy);
    T* to = static_cast<T*>(p.dx.ptr) + offset(p.dx, this->task.batch, this->channel, begin - kHalo);
#pragma unroll 1
    for (int64_t time = begin; time < this->task.end + kHalo; time += kSteps, to += kSteps * p.dx.time) {
      some_steps(time, to);
    }
    float* sums = p.partials + (this->task.batch * p.segments + this->task.segment) * (kWidth + 1) * p.dim;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (this->channel + c >= p.dim) break;
#pragma unroll
      for (int w = 0; w < kWidth; ++w) sums[w * p.dim + this->channel + c] = dweight[c][w];
      sums[kWidth * p.dim + this->channel + c] = dbias[c];
    }
  }
  TRIFUSE_DEVICE void some_steps(int64_t time, T* to) {
    this->take(next_x);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      edges[kHalo + i] = this->edges_at(p, time + i);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) g[c][kHalo + i] = to_float(next_dy[i].v[c]);
    }
    if (time + kSteps < this->task.end + kHalo) {
      this->load(p, p.x, time + kSteps, next_x);
      this->load(p, p.dy, time + kSteps, next_dy);
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i, to += p.dx.time) {
      gradient(time + i, i);
      const int64_t behind = time + i - kHalo;
      if (behind >= this->task.begin && behind < this->task.end) store_dx(behind, i, to);
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      this->shift(this->x[c]);
      this->shift(g[c]);
    }
    this->shift(edges);
  }
  // dy of step i, at `time`, becomes the gradient of the convolution's sum there.
  TRIFUSE_DEVICE void gradient(int64_t time, int i) {
    const Edges own = edges[kHalo + i];
    const bool live = (own & 1) != 0 && time < p.seqlen, mine = live && time < this->task.end;
    if (p.silu) {
      float sums[kChannels];
      this->convolve(p, time, own, i, sums);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) g[c][kHalo + i] *= silu_slope(sums[c]);
    }
    if (!live) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) g[c][kHalo + i] = 0.0f;
    }
    if (!mine) return;
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      if ((own >> (kWidth - 1 - w) & 1) == 0) continue;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) dweight[c][w] = fma(g[c][kHalo + i], this->x[c][i + w], dweight[c][w]);
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) dbias[c] += g[c][kHalo + i];
    if ((own & kInitialBits) == 0) return;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int64_t channel = this->channel + c;
      if (channel < p.dim) add_initial_part<T>(p, this->task.batch, channel, time, g[c][kHalo + i], dweight[c]);
    }
  }
  // Of the position kHalo before step i.
  TRIFUSE_DEVICE void store_dx(int64_t time, int i, T* to) const {
    float dx[kChannels];
    const Edges own = edges[i];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      dx[c] = 0.0f;
      if (own >> kFinalBit != 0 && this->channel + c < p.dim) {
        dx[c] = final_gradient<T>(p, this->task.batch, this->channel + c, time, own);
      }
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      if ((edges[i + k] >> k & 1) == 0) continue;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) dx[c] = fma(this->weight[c][kWidth - 1 - k], g[c][i + k], dx[c]);
    }
    this->store(p, p.dx, to, dx);
  }
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<kWidth>)
    conv_channel_fwd_kernel(const __grid_constant__ FwdArgs p) {
  ChannelForward<T, kWidth>(p).run();
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<kWidth>)
    conv_channel_bwd_kernel(const __grid_constant__ BwdArgs p) {
  ChannelBackward<T, kWidth>(p).run();
}

}  // namespace trifuse::cuda::conv
