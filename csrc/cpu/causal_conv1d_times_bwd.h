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
  alignas(64) T g[kTimePiece + kMaxWidth + 2 * lanes];  // of positions from `from` on, zero behind the last

  ChannelBackward(const CausalConv1dBwdParams& p_, const Plan<T>& plan_, int64_t b_, int64_t d_, int64_t from_,
                  int64_t to_)
      : p(p_), plan(plan_), channel(p_, plan_, b_, d_), b(b_), d(d_), from(from_), to(to_) {}
  TRIFUSE_INLINE int width() const { return channel.width(); }

  TRIFUSE_INLINE Vec<T> gradient(int64_t t, int64_t count, const Vec<T>* in) const {
    Vec<T> v = load_some<T, S>(at<S>(p.dy, b, d, t), 1, count);
    if (p.silu) v *= silu_slope<T>(channel.weighted_sum(in));
    return p.seq_idx || count < lanes ? channel.without_padding(t, count, v) : v;
  }

  // Fills g, and leaves the gradients of the weights and the bias at partial[k * dim].
  void gradients(T* partial) {
    Vec<T> sums[(kWidth ? kWidth : kMaxWidth) + 1];
    for (int k = 0; k <= width(); ++k) sums[k] = splat(T(0));
    for (int64_t t = from; t < to; t += lanes) {
      const int64_t count = least(lanes, to - t);
      Vec<T> in[kWidth ? kWidth : kMaxWidth];
      channel.inputs(t, count, in);
      const Vec<T> v = gradient(t, count, in);
      store<T>(g + (t - from), v);
      for (int k = 0; k < width(); ++k) sums[k] += v * in[k];
      sums[width()] += v;
    }
    for (int k = 0; k <= width(); ++k) partial[k * p.dim] = sum_lanes<T>(sums[k]);
    // The positions after the piece that see its inputs.
    Vec<T> v = splat(T(0));
    const int64_t after = least(width() - 1, p.seqlen - to);
    for (int64_t done = 0; done < width() - 1; done += lanes) {
      const int64_t count = least(lanes, after - done);
      if (count > 0) {
        Vec<T> in[kWidth ? kWidth : kMaxWidth];
        channel.gather(to + done, count, in);
        v = gradient(to + done, count, in);
      } else {
        v = splat(T(0));
      }
      store<T>(g + (to - from) + done, v);
    }
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
  const int64_t pieces = divide_up(p.seqlen, kTimePiece);
  share(p, threads, p.batch * p.dim * pieces, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t piece = i % pieces, d = i / pieces % p.dim, b = i / pieces / p.dim;
      ChannelBackward<T, S, kWidth> task(p, plan, b, d, piece * kTimePiece, least(p.seqlen, (piece + 1) * kTimePiece));
      task.gradients(plan.partial(p, b, pieces, piece) + d);
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
