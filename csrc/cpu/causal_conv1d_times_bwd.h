// The backward causal convolution with positions in vector lanes. A task takes one channel through a piece of time,
// twice: first the gradients before the activation, into a buffer, then from them those of the inputs.
#pragma once

#include "causal_conv1d_times.h"

namespace trifuse::cpu {
namespace {

template <class T, class S, int kWidth>
struct ChannelBackward {
  static constexpr int64_t lanes = kLanes<T>;
  const CausalConv1dBwdParams& p;
  const Plan<T>& plan;
  const Channel<T, S, kWidth> channel;
  int64_t b, d, from, to;
  alignas(64) T g[2 * kTimePiece + kMaxWidth + 2 * lanes];  // of positions from `from` on

  ChannelBackward(const CausalConv1dBwdParams& p_, const Plan<T>& plan_, int64_t b_, int64_t d_, int64_t from_,
                  int64_t to_)
      : p(p_), plan(plan_), channel(p_, plan_, b_, d_), b(b_), d(d_), from(from_), to(to_) {}
  TRIFUSE_INLINE int width() const { return channel.width(); }

  // The gradients before the activation at the positions from t on, into g; `in`: what their taps read.
  TRIFUSE_INLINE Vec<T> gradient(int64_t t, Vec<T>* in) {
    channel.inputs(t, in);
    Vec<T> v = load_sequence<T, S>(at<S>(p.dy, b, d, t));
    if (p.silu) v *= silu_slope<T>(channel.weighted_sum(in));
    v = channel.without_padding(t, v);
    store<T>(g + (t - from), v);
    return v;
  }

  // Fills g, and leaves the gradients of the weights and the bias at partial[k * dim].
  void gradients(T* partial) {
    Vec<T> sums[(kWidth ? kWidth : kMaxWidth) + 1], in[kWidth ? kWidth : kMaxWidth];
    for (int k = 0; k <= width(); ++k) sums[k] = splat(T(0));
    int64_t t = from;
    for (; t + lanes <= to; t += lanes) add(gradient(t, in), in, sums);
    if (t < to) {  // a last vector that starts earlier; what it has seen before counts once
      Vec<T> v = gradient(to - lanes, in);
      for (int64_t i = 0; i < lanes - (to - t); ++i) v[i] = 0;
      for (int k = 0; k < width(); ++k) {
        for (int64_t i = 0; i < lanes - (to - t); ++i) in[k][i] = 0;
      }
      add(v, in, sums);
    }
    for (int k = 0; k <= width(); ++k) partial[k * p.dim] = sum_lanes<T>(sums[k]);
    // The positions after the piece that see its inputs. Behind the last position no tap counts, whatever g holds.
    for (t = to; t < least(p.seqlen, to + width() - 1); t += lanes) gradient(least(t, p.seqlen - lanes), in);
  }
  TRIFUSE_INLINE void add(Vec<T> v, const Vec<T>* in, Vec<T>* sums) const {
    for (int k = 0; k < width(); ++k) sums[k] += v * in[k];
    sums[width()] += v;
  }

  TRIFUSE_INLINE Vec<T> input_at(int64_t t) const {
    constexpr int64_t reach = lanes + kMaxWidth;
    Vec<T> v = splat(T(0));
    if (all_bytes(channel.own + t, plan.full, reach)) {
      for (int k = 0; k < width(); ++k) v += splat(channel.tap[k]) * load<T>(g + (t - from) + k);
      return v;
    }
    for (int k = 0; k < width(); ++k) {
      v += splat(channel.tap[k]) * choose<T>(has_tap<T>(channel.own + t + k, k), load<T>(g + (t - from) + k));
    }
    if (p.dfinal_states) add_final(t, v);
    return v;
  }

  __attribute__((noinline)) void add_final(int64_t t, Vec<T>& v) const {
    for (int64_t i = 0; i < lanes && t + i < to; ++i) {
      const int64_t row = row_of(p, b, t + i);
      const Span& span = plan.spans[row];
      if (t + i < span.first || t + i >= span.end) continue;
      v[i] += scalar_as<T, S>(*state_at<S>(p, p.dfinal_states, row, d, t + i - span.end + width() - 1));
    }
  }

  void inputs() const {
    for (int64_t t = from; t < to; t += lanes) {
      store_some<S, T>(at<S>(p.dx, b, d, t), input_at(t), 1, least(lanes, to - t));
    }
    if (!p.dinitial_states) return;
    for (int64_t row = row_of(p, b, from); row < (p.cu_seqlens ? p.num_seqs : b + 1); ++row) {
      const Span& span = plan.spans[row];
      if (span.start >= to) break;
      if (span.start >= from && span.stop > span.start) initial_states(row, span);
    }
  }

  void initial_states(int64_t row, const Span& span) const {
    for (int64_t j = 0; j < width() - 1; ++j) {
      T v = 0;
      for (int64_t t = span.start; t < least(span.stop, span.start + j + 1); ++t) {
        const int64_t k = t - span.start + width() - 1 - j;
        if (channel.left[t] >> k & 1) v += channel.tap[k] * g[t - from];
      }
      const int64_t last = j - (span.end - span.start);  // which of the final states it is
      if (p.dfinal_states && span.from_left && last >= 0) {
        v += scalar_as<T, S>(*state_at<S>(p, p.dfinal_states, row, d, last));
      }
      *state_at<S>(p, p.dinitial_states, row, d, j) = scalar_from<S, T>(v);
    }
  }
};

template <class T, class S, int kWidth>
void backward_times_of(const CausalConv1dBwdParams& p, const Plan<T>& plan, const Threads& threads) {
  const TimePieces pieces(p.seqlen);
  share(p, threads, p.batch * p.dim * pieces.count, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t piece = i % pieces.count, d = i / pieces.count % p.dim, b = i / pieces.count / p.dim;
      ChannelBackward<T, S, kWidth> task(p, plan, b, d, pieces.begin(piece), pieces.end(piece));
      task.gradients(plan.partial(p, b, pieces.count, piece) + d);
      task.inputs();
    }
  });
}

template <class T, class S>
void backward_times(const CausalConv1dBwdParams& p, const Plan<T>& plan, const Threads& threads) {
  if (p.width == 4) return backward_times_of<T, S, 4>(p, plan, threads);
  backward_times_of<T, S, 0>(p, plan, threads);
}

}  // namespace
}  // namespace trifuse::cpu
