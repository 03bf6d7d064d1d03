// The causal convolution with positions in vector lanes, for inputs whose positions are neighbours in memory: a tap
// is an unaligned load. A task takes one channel through a piece of time.
#pragma once

#include "causal_conv1d_plan.h"

namespace trifuse::cpu {
namespace {

constexpr int64_t kTimePiece = 1024;  // positions of a task: a constant, so that sums do not depend on threads

template <class T>
struct BytesOf {
  typedef uint8_t V __attribute__((vector_size(kLanes<T>)));
};

// Which of a vector's positions have tap k, from their tap sets.
template <class T>
TRIFUSE_INLINE IVec<T> has_tap(const uint8_t* sets, int k) {
  typename BytesOf<T>::V bytes;
  __builtin_memcpy(&bytes, sets, sizeof bytes);
  return ((__builtin_convertvector(bytes, IVec<T>) >> k) & 1) != 0;
}
template <class T>
TRIFUSE_INLINE Vec<T> choose(IVec<T> where, Vec<T> v) {
  return (Vec<T>)(where & (IVec<T>)v);
}
TRIFUSE_INLINE bool all_bytes(const uint8_t* sets, uint8_t value, int64_t count) {
  uint64_t wanted, found, wrong = 0;
  std::memset(&wanted, value, 8);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __builtin_memcpy(&found, sets + i, 8);
    wrong |= found ^ wanted;
  }
  for (; i < count; ++i) wrong |= uint64_t(sets[i] ^ value);
  return wrong == 0;
}

// One channel of one batch item. kWidth 0: the width is known at run time only.
template <class T, class S, int kWidth>
struct Channel {
  const CausalConv1dParams& p;
  const Plan<T>& plan;
  int64_t b, d;
  const S* x;
  const uint8_t *own, *left;
  T tap[kMaxWidth], bias;

  Channel(const CausalConv1dParams& p_, const Plan<T>& plan_, int64_t b_, int64_t d_)
      : p(p_), plan(plan_), b(b_), d(d_), x(at<S>(p_.x, b_, d_, 0)), own(plan_.own_row(b_)), left(plan_.left_row(b_)) {
    for (int k = 0; k < p.width; ++k) tap[k] = plan.taps[k * p.dim + d];
    bias = plan.bias[d];
  }
  TRIFUSE_INLINE int width() const { return kWidth ? kWidth : int(p.width); }

  // The inputs of tap 0, 1, .. at positions t .. t + count - 1; zero where a tap does not count.
  TRIFUSE_INLINE void inputs(int64_t t, int64_t count, Vec<T>* in) const {
    constexpr int64_t lanes = kLanes<T>;
    if (count == lanes && all_bytes(own + t, plan.full, lanes)) {
      for (int k = 0; k < width(); ++k) in[k] = load_as<T, S>(x + t - k);
    } else if (count == lanes && t >= width() - 1 && all_bytes(left + t, 0, lanes)) {
      for (int k = 0; k < width(); ++k) in[k] = choose<T>(has_tap<T>(own + t, k), load_as<T, S>(x + t - k));
    } else {
      gather(t, count, in);
    }
  }

  __attribute__((noinline)) void gather(int64_t t, int64_t count, Vec<T>* in) const {
    for (int k = 0; k < width(); ++k) in[k] = splat(T(0));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = left[t + i] ? row_of(p, b, t + i) : 0, start = plan.spans[row].start;
      for (int k = 0; k < width(); ++k) {
        if (own[t + i] >> k & 1) {
          in[k][i] = scalar_as<T, S>(x[t + i - k]);
        } else if (left[t + i] >> k & 1) {
          in[k][i] = scalar_as<T, S>(*state_at<S>(p, p.initial_states, row, d, t + i - k - start + width() - 1));
        }
      }
    }
  }

  TRIFUSE_INLINE Vec<T> weighted_sum(const Vec<T>* in) const {
    Vec<T> z = splat(bias);
    for (int k = 0; k < width(); ++k) z += splat(tap[k]) * in[k];
    return z;
  }

  // v, but zero at positions of padding.
  TRIFUSE_INLINE Vec<T> without_padding(int64_t t, int64_t count, Vec<T> v) const {
    if (count == kLanes<T>) return choose<T>(has_tap<T>(own + t, 0), v);
    for (int64_t i = 0; i < kLanes<T>; ++i) v[i] = i < count && (own[t + i] & 1) ? v[i] : T(0);
    return v;
  }

  TRIFUSE_INLINE void forward_at(int64_t t, int64_t count, S* y) const {
    Vec<T> in[kWidth ? kWidth : kMaxWidth];
    inputs(t, count, in);
    Vec<T> z = weighted_sum(in);
    if (p.silu) z = silu<T>(z);
    if (p.seq_idx) z = without_padding(t, count, z);
    store_some<S, T>(y + t, z, 1, count);
  }

  void forward(int64_t from, int64_t to) const {
    constexpr int64_t lanes = kLanes<T>;
    S* y = at<S>(p.y, b, d, 0);
    int64_t t = from;
    for (; t + lanes <= to; t += lanes) forward_at(t, lanes, y);
    if (t == to) return;
    if (to - from >= lanes) {
      forward_at(to - lanes, lanes, y);  // some again, to the same result
    } else {
      forward_at(t, to - t, y);
    }
  }
};

template <class T, class S, int kWidth>
void forward_times_of(const CausalConv1dParams& p, const Plan<T>& plan, const Threads& threads) {
  const int64_t pieces = divide_up(p.seqlen, kTimePiece);
  share(p, threads, p.batch * p.dim * pieces, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t piece = i % pieces, d = i / pieces % p.dim, b = i / pieces / p.dim;
      const Channel<T, S, kWidth> channel(p, plan, b, d);
      channel.forward(piece * kTimePiece, least(p.seqlen, (piece + 1) * kTimePiece));
    }
  });
}

template <class T, class S>
void forward_times(const CausalConv1dParams& p, const Plan<T>& plan, const Threads& threads) {
  if (p.width == 4) return forward_times_of<T, S, 4>(p, plan, threads);
  forward_times_of<T, S, 0>(p, plan, threads);
}

}  // namespace
}  // namespace trifuse::cpu
