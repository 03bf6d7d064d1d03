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

// v moved up by `by` lanes, 1 to 7; the lanes below come from the end of `before`.
template <class T, int kBy, size_t... I>
TRIFUSE_INLINE Vec<T> moved_up(Vec<T> before, Vec<T> v, std::index_sequence<I...>) {
  return __builtin_shufflevector(before, v, (kLanes<T> - kBy + int(I))...);
}
template <class T, int kBy = 1>
TRIFUSE_INLINE Vec<T> moved_up(Vec<T> before, Vec<T> v, int64_t by) {
  if constexpr (kBy + 1 < kMaxWidth && kBy < kLanes<T>) {
    if (by > kBy) return moved_up<T, kBy + 1>(before, v, by);
  }
  return moved_up<T, kBy>(before, v, std::make_index_sequence<kLanes<T>>());
}

// Pieces of time; the last takes what is left, so that none is shorter than a vector.
struct TimePieces {
  int64_t seqlen, count;
  explicit TimePieces(int64_t seqlen_) : seqlen(seqlen_), count(most(1, seqlen_ / kTimePiece)) {}
  int64_t begin(int64_t i) const { return i * kTimePiece; }
  int64_t end(int64_t i) const { return i + 1 == count ? seqlen : (i + 1) * kTimePiece; }
};

// One channel of one batch item, of at least a vector of positions. kWidth 0: the width is known at run time only.
template <class T, class S, int kWidth>
struct Channel {
  static constexpr int64_t lanes = kLanes<T>;
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

  // The inputs of tap 0, 1, .. at the positions from t on; zero where a tap does not count.
  TRIFUSE_INLINE void inputs(int64_t t, Vec<T>* in) const {
    if (all_bytes(own + t, plan.full, lanes)) {
      for (int k = 0; k < width(); ++k) in[k] = load_sequence<T, S>(x + t - k);
      return;
    }
    const bool plain = all_bytes(left + t, 0, lanes);
    if (plain && t >= width() - 1) {
      for (int k = 0; k < width(); ++k) in[k] = choose<T>(has_tap<T>(own + t, k), load_sequence<T, S>(x + t - k));
    } else if ((plain || !p.cu_seqlens) && lanes >= width() - 1) {
      head(t, in);
    } else {
      gather(t, in);
    }
  }

  // The first positions of a batch item: what is left of them stands elsewhere, or nowhere.
  TRIFUSE_INLINE void head(int64_t t, Vec<T>* in) const {
    Vec<T> before = splat(T(0));
    if (p.initial_states && !p.cu_seqlens) {
      const S* states = state_at<S>(p, p.initial_states, b, d, 0);
      for (int64_t j = 0; j < width() - 1; ++j) before[lanes - (width() - 1) + j] = scalar_as<T, S>(states[j]);
    }
    const Vec<T> first = load_sequence<T, S>(x);
    for (int64_t k = 0; k < width(); ++k) {
      in[k] = k > t ? moved_up<T>(before, first, k - t) : load_sequence<T, S>(x + t - k);
      if (p.seq_idx || p.cu_seqlens) in[k] = choose<T>(has_tap<T>(own + t, k) | has_tap<T>(left + t, k), in[k]);
    }
  }

  // Number by number, where packed sequences have initial states of their own.
  __attribute__((noinline)) void gather(int64_t t, Vec<T>* in) const {
    for (int k = 0; k < width(); ++k) in[k] = splat(T(0));
    for (int64_t i = 0; i < lanes; ++i) {
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
  TRIFUSE_INLINE Vec<T> without_padding(int64_t t, Vec<T> v) const {
    return p.seq_idx ? choose<T>(has_tap<T>(own + t, 0), v) : v;
  }

  template <bool kSilu>
  TRIFUSE_INLINE void forward_at(int64_t t, S* y) const {
    Vec<T> in[kWidth ? kWidth : kMaxWidth];
    inputs(t, in);
    Vec<T> z = weighted_sum(in);
    if constexpr (kSilu) z = silu<T>(z);
    store_sequence<S, T>(y + t, without_padding(t, z));
  }

  template <bool kSilu>
  void forward(int64_t from, int64_t to) const {
    S* y = at<S>(p.y, b, d, 0);
    int64_t t = from;
    for (; t + lanes <= to; t += lanes) forward_at<kSilu>(t, y);
    if (t < to) forward_at<kSilu>(to - lanes, y);  // some again, to the same result
  }
};

template <class T, class S, int kWidth>
void forward_times_of(const CausalConv1dParams& p, const Plan<T>& plan, const Threads& threads) {
  const TimePieces pieces(p.seqlen);
  share(p, threads, p.batch * p.dim * pieces.count, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t piece = i % pieces.count, row = i / pieces.count;
      const Channel<T, S, kWidth> channel(p, plan, row / p.dim, row % p.dim);
      if (p.silu) {
        channel.template forward<true>(pieces.begin(piece), pieces.end(piece));
      } else {
        channel.template forward<false>(pieces.begin(piece), pieces.end(piece));
      }
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
