// The backward causal convolution with channels in vector lanes. A task takes a block of channels backwards through
// a piece of time: the gradient of an input needs those of the width - 1 positions after it, which the task has
// just computed, except at the end of its piece, where it computes them itself.
#pragma once

#include "causal_conv1d_channels.h"

namespace trifuse::cpu {
namespace {

template <class T, class S>
struct ChannelStrip {
  static constexpr int64_t lanes = kLanes<T>;
  // Rows of the arrays are not a power of two apart, or their elements would share sets of the first cache. A last
  // block may be almost twice as long as the others.
  static constexpr int64_t kRow = 2 * ChannelBlocks<T>::size + 2 * lanes;

  const CausalConv1dBwdParams& p;
  const Plan<T>& plan;
  int64_t b, begin, end, from, to;  // channels and positions of the task
  const uint8_t* own;
  alignas(64) T ring[kRing][kRow];          // d loss / d pre-activation of position t, at t % kRing
  alignas(64) T sums[kMaxWidth + 1][kRow];  // of the weights' gradients by tap, then the bias

  ChannelStrip(const CausalConv1dBwdParams& p_, const Plan<T>& plan_, int64_t b_, int64_t begin_, int64_t end_,
               int64_t from_, int64_t to_)
      : p(p_), plan(plan_), b(b_), begin(begin_), end(end_), from(from_), to(to_), own(plan_.own_row(b_)) {
    for (int k = 0; k <= p.width; ++k) std::memset(sums[k], 0, sizeof sums[k]);
  }

  int64_t vectors() const { return divide_up(end - begin, lanes); }

  // The gradient before the activation at position t, into the ring; its share of the weights' gradients if the
  // position is the task's own.
  void gradient_row(int64_t t) {
    const RowTaps<T, S> taps(p, plan, b, t);
    const S* dy = at<S>(p.dy, b, 0, t);
    T* g_row = ring[t % kRing];
    for (int64_t j = 0; j < vectors(); ++j) {
      const Lane lane = lane_at<T>(begin, end, j);
      Vec<T> g = splat(T(0));
      if (taps.count) {
        g = load_some<T, S>(dy + lane.channel * p.dy.dim, p.dy.dim, lane.count);
        if (p.silu) g *= silu_slope<T>(weighted_sum<T, S>(p, plan, taps, lane));
      }
      store<T>(g_row + lane.slot, g);
      if (t >= to || !taps.count) continue;
      for (int i = 0; i < taps.count; ++i) add(sums[taps.k[i]] + lane.slot, g * taps.load(i, lane));
      add(sums[p.width] + lane.slot, g);
    }
  }

  // dx at position t, once the gradients of t .. t + width - 1 are in the ring.
  void input_row(int64_t t) {
    const int64_t row = row_of(p, b, t);
    const Span& span = plan.spans[row];
    const bool is_final = p.dfinal_states && t >= span.first && t < span.end;
    S* dx = at<S>(p.dx, b, 0, t);
    for (int64_t j = 0; j < vectors(); ++j) {
      const Lane lane = lane_at<T>(begin, end, j);
      Vec<T> v = splat(T(0));
      for (int64_t k = 0; k < p.width && t + k < p.seqlen; ++k) {
        if (own[t + k] >> k & 1) v += tap(k, lane) * load<T>(ring[(t + k) % kRing] + lane.slot);
      }
      if (is_final) v += load_state(p.dfinal_states, row, t - span.end + p.width - 1, lane);
      store_some<S, T>(dx + lane.channel * p.dx.dim, v, p.dx.dim, lane.count);
    }
    if (p.dinitial_states && t == span.start) initial_rows(row, span);
  }

  // The gradients of the initial states of the sequence that starts at the ring's newest row.
  void initial_rows(int64_t row, const Span& span) {
    const uint8_t* left = plan.left_row(b);
    for (int64_t j = 0; j < p.width - 1; ++j) {
      for (int64_t n = 0; n < vectors(); ++n) {
        const Lane lane = lane_at<T>(begin, end, n);
        Vec<T> v = splat(T(0));
        for (int64_t t = span.start; t < least(span.stop, span.start + j + 1); ++t) {
          const int64_t k = t - span.start + p.width - 1 - j;
          if (left[t] >> k & 1) v += tap(k, lane) * load<T>(ring[t % kRing] + lane.slot);
        }
        const int64_t last = j - (span.end - span.start);  // which of the final states it is
        if (p.dfinal_states && span.from_left && last >= 0) v += load_state(p.dfinal_states, row, last, lane);
        store_some<S, T>(state_at<S>(p, p.dinitial_states, row, lane.channel, j), v, p.width - 1, lane.count);
      }
    }
  }

  // Positions t .. t + kRows - 1 where nothing is special up to t + kRows + kWidth - 2, all strides dense.
  template <int kWidth, bool kSilu>
  static void rows(ChannelStrip& s, int64_t t) {
    constexpr int before = kWidth - 1;
    const auto& p = s.p;
    const S *x = at<S>(p.x, s.b, 0, t - before), *dy = at<S>(p.dy, s.b, 0, t);
    S* dx = at<S>(p.dx, s.b, 0, t);
    const int64_t x_time = p.x.time, dy_time = p.dy.time, dx_time = p.dx.time, count = s.vectors();
    T* g_rows[kRows + before];
    for (int i = 0; i < kRows + before; ++i) g_rows[i] = s.ring[(t + i) % kRing];
    for (int64_t j = 0; j < count; ++j) {
      const int64_t slot = j * lanes, c = lane_at<T>(s.begin, s.end, j).channel;
      Vec<T> in[kRows + before], tap[kWidth], g[kRows + before];
#pragma GCC unroll 16
      for (int i = 0; i < kRows + before; ++i) in[i] = load_sequence<T, S>(x + i * x_time + c);
#pragma GCC unroll 8
      for (int k = 0; k < kWidth; ++k) tap[k] = load<T>(s.plan.taps + k * p.dim + c);
      const Vec<T> bias = load<T>(s.plan.bias + c);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        g[r] = load_sequence<T, S>(dy + r * dy_time + c);
        if constexpr (kSilu) {
          Vec<T> z = bias;
#pragma GCC unroll 8
          for (int k = 0; k < kWidth; ++k) z += tap[k] * in[r + before - k];
          g[r] *= silu_slope<T>(z);
        }
        if (r < before) store<T>(g_rows[r] + slot, g[r]);
      }
#pragma GCC unroll 8
      for (int i = kRows; i < kRows + before; ++i) g[i] = load<T>(g_rows[i] + slot);
      Vec<T> total = g[0];
#pragma GCC unroll 8
      for (int r = 1; r < kRows; ++r) total += g[r];
      s.add(s.sums[kWidth] + slot, total);
#pragma GCC unroll 8
      for (int k = 0; k < kWidth; ++k) {
        Vec<T> sum = g[0] * in[before - k];
#pragma GCC unroll 8
        for (int r = 1; r < kRows; ++r) sum += g[r] * in[r + before - k];
        s.add(s.sums[k] + slot, sum);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        Vec<T> v = tap[0] * g[r];
#pragma GCC unroll 8
        for (int k = 1; k < kWidth; ++k) v += tap[k] * g[r + k];
        store_sequence<S, T>(dx + r * dx_time + c, v);
      }
    }
  }

  using Rows = void (*)(ChannelStrip&, int64_t);
  // null: none for this width or these strides.
  static Rows rows_of(const CausalConv1dBwdParams& p) {
    if (p.x.dim != 1 || p.dy.dim != 1 || p.dx.dim != 1 || p.dim < lanes) return nullptr;
    switch (p.width) {
      case 2: return p.silu ? rows<2, true> : rows<2, false>;
      case 3: return p.silu ? rows<3, true> : rows<3, false>;
      case 4: return p.silu ? rows<4, true> : rows<4, false>;
      default: return nullptr;
    }
  }

  void run(Rows rows) {
    for (int64_t t = least(p.seqlen, to + p.width - 1) - 1; t >= to; --t) gradient_row(t);
    for (int64_t t = to; t > from;) {
      const int64_t reach = t + p.width - 1;  // the positions that the pass would touch end here
      if (rows && t - kRows >= from && reach <= p.seqlen && all_full(plan, own, t - kRows, kRows + p.width - 1)) {
        t -= kRows;
        rows(*this, t);
      } else {
        --t;
        gradient_row(t);
        input_row(t);
      }
    }
  }

  // The sums over the task's positions, to (width + 1, dim).
  void leave(T* partial) const {
    for (int64_t k = 0; k <= p.width; ++k) {
      for (int64_t j = 0; j < vectors(); ++j) {
        const Lane lane = lane_at<T>(begin, end, j);
        store_some<T, T>(partial + k * p.dim + lane.channel, load<T>(sums[k] + lane.slot), 1, lane.count);
      }
    }
  }

 private:
  TRIFUSE_INLINE void add(T* to_, Vec<T> v) const { store<T>(to_, load<T>(to_) + v); }
  TRIFUSE_INLINE Vec<T> tap(int64_t k, const Lane& lane) const {
    return load_some<T, T>(plan.taps + k * p.dim + lane.channel, 1, lane.count);
  }
  TRIFUSE_INLINE Vec<T> load_state(const void* states, int64_t row, int64_t j, const Lane& lane) const {
    return load_some<T, S>(state_at<S>(p, states, row, lane.channel, j), p.width - 1, lane.count);
  }
};

template <class T, class S>
void backward_channels(const CausalConv1dBwdParams& p, const Plan<T>& plan, const Threads& threads) {
  const auto rows = ChannelStrip<T, S>::rows_of(p);
  const ChannelBlocks<T> blocks(p.dim);
  const int64_t pieces = divide_up(p.seqlen, kChannelPiece);
  share(p, threads, p.batch * pieces * blocks.count, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t block = i % blocks.count, piece = i / blocks.count % pieces, b = i / blocks.count / pieces;
      ChannelStrip<T, S> strip(p, plan, b, blocks.begin(block), blocks.end(block), piece * kChannelPiece,
                               least(p.seqlen, (piece + 1) * kChannelPiece));
      strip.run(rows);
      strip.leave(plan.partial(p, b, pieces, piece));
    }
  });
}

}  // namespace
}  // namespace trifuse::cpu
