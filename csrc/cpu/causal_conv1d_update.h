// The next inputs of a causal convolution on a CPU: channels in vector lanes. Between the numbers of one channel
// and the next lie those of its window, so that vectors are taken apart and put together by shuffles.
#pragma once

#include "causal_conv1d_plan.h"

namespace trifuse::cpu {
namespace {

// Part `kPart` of kLanes groups of kParts numbers, from the kParts vectors that hold them.
template <class T, int kParts, int kPart, int kFrom, size_t... I>
TRIFUSE_INLINE Vec<T> part_of(const Vec<T>* in, Vec<T> found, std::index_sequence<I...>) {
  constexpr int lanes = kLanes<T>;
  if constexpr (kFrom == kParts) {
    return found;
  } else {
    const Vec<T> next = __builtin_shufflevector(
        found, in[kFrom],
        (int(I) * kParts + kPart) / lanes == kFrom ? lanes + (int(I) * kParts + kPart) % lanes : int(I)...);
    return part_of<T, kParts, kPart, kFrom + 1>(in, next, std::index_sequence<I...>());
  }
}
template <class T, int kParts, size_t... kPart>
TRIFUSE_INLINE void take_apart(const Vec<T>* in, Vec<T>* out, std::index_sequence<kPart...>) {
  constexpr auto all = std::make_index_sequence<kLanes<T>>();
  ((out[kPart] = part_of<T, kParts, int(kPart), 0>(in, in[0], all)), ...);
}

// Vector kVector of kLanes groups of kParts numbers, from their kParts parts.
template <class T, int kParts, int kVector, int kFrom, size_t... I>
TRIFUSE_INLINE Vec<T> vector_of(const Vec<T>* in, Vec<T> found, std::index_sequence<I...>) {
  constexpr int lanes = kLanes<T>;
  if constexpr (kFrom == kParts) {
    return found;
  } else {
    const Vec<T> next = __builtin_shufflevector(
        found, in[kFrom],
        (kVector * lanes + int(I)) % kParts == kFrom ? lanes + (kVector * lanes + int(I)) / kParts : int(I)...);
    return vector_of<T, kParts, kVector, kFrom + 1>(in, next, std::index_sequence<I...>());
  }
}
template <class T, int kParts, size_t... kVector>
TRIFUSE_INLINE void put_together(const Vec<T>* in, Vec<T>* out, std::index_sequence<kVector...>) {
  constexpr auto all = std::make_index_sequence<kLanes<T>>();
  ((out[kVector] = vector_of<T, kParts, int(kVector), 0>(in, in[0], all)), ...);
}
template <class T, int kParts, class S>
TRIFUSE_INLINE void load_groups(const S* p, Vec<T>* out) {
  Vec<T> in[kParts];
#pragma GCC unroll 8
  for (int i = 0; i < kParts; ++i) in[i] = load_sequence<T, S>(p + i * kLanes<T>);
  take_apart<T, kParts>(in, out, std::make_index_sequence<kParts>());
}
template <class T, int kParts, class S>
TRIFUSE_INLINE void store_groups(S* p, const Vec<T>* in) {
  Vec<T> out[kParts];
  put_together<T, kParts>(in, out, std::make_index_sequence<kParts>());
#pragma GCC unroll 8
  for (int i = 0; i < kParts; ++i) store_sequence<S, T>(p + i * kLanes<T>, out[i]);
}

template <class T, class S, class StateS>
struct Update {
  static constexpr int64_t lanes = kLanes<T>;
  const CausalConv1dUpdateParams& p;
  const T *weight, *bias;

  explicit Update(const CausalConv1dUpdateParams& p_)
      : p(p_), weight(static_cast<const T*>(p_.weight)), bias(static_cast<const T*>(p_.bias)) {}

  TRIFUSE_INLINE Vec<T> finish(Vec<T> z) const { return p.silu ? silu<T>(z) : z; }
  TRIFUSE_INLINE Vec<T> bias_of(int64_t first, int64_t count) const {
    return bias ? load_some<T, T>(bias + first, 1, count) : splat(T(0));
  }
  S* y(int64_t b, int64_t first, int64_t t) const { return static_cast<S*>(p.y) + (b * p.dim + first) * p.seqlen + t; }
  StateS* state(int64_t row, int64_t first) const {
    return static_cast<StateS*>(p.conv_state) + row * p.state_row + first * p.state_dim;
  }

  // One token of width 4, the state's kState numbers of a channel side by side: what decoding mostly is.
  template <int kState>
  void token(int64_t b, int64_t row, int64_t first) const {
    Vec<T> tap[4], kept[kState + 1];
    load_groups<T, 4, T>(weight + first * 4, tap);
    StateS* from = state(row, first);
    load_groups<T, kState, StateS>(from, kept);
    kept[kState] = load_sequence<T, S>(at<S>(p.x, b, first, 0));
    store_groups<T, kState, StateS>(from, kept + 1);
    Vec<T> z = bias_of(first, lanes);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) z += tap[k] * kept[kState - 3 + k];
    store_sequence<S, T>(y(b, first, 0), finish(z));
  }
  bool serves_token(int64_t size) const {
    return p.width == 4 && p.seqlen == 1 && p.state_len == size && p.state_time == 1 && p.state_dim == size &&
           p.x.dim == 1 && !p.cache_seqlens;
  }

  // Anything: `count` channels from `first` on.
  void window(int64_t b, int64_t row, int64_t first, int64_t count) const {
    const int64_t size = p.state_len, step = p.state_time, before = p.width - 1;
    const int64_t next = p.cache_seqlens ? (p.cache_seqlens[b] % size + size) % size : 0;
    StateS* kept = state(row, first);
    const auto place = [&](int64_t i) { return p.cache_seqlens ? (next + i) % size : i; };  // i-th oldest
    Vec<T> in[kMaxWidth], tap[kMaxWidth];
    if (p.width == 4 && count == lanes) {
      load_groups<T, 4, T>(weight + first * 4, tap);
    } else {
      for (int64_t k = 0; k < p.width; ++k) tap[k] = load_some<T, T>(weight + first * p.width + k, p.width, count);
    }
    for (int64_t k = 0; k < before; ++k) {
      in[k] = load_some<T, StateS>(kept + place(size - before + k) * step, p.state_dim, count);
    }
    const Vec<T> start = bias_of(first, count);
    for (int64_t i = 0; !p.cache_seqlens && i + p.seqlen < size; ++i) {
      const Vec<T> moved = load_some<T, StateS>(kept + (i + p.seqlen) * step, p.state_dim, count);
      store_some<StateS, T>(kept + i * step, moved, p.state_dim, count);
    }
    for (int64_t t = 0; t < p.seqlen; ++t) {
      in[before] = load_some<T, S>(at<S>(p.x, b, first, t), p.x.dim, count);
      Vec<T> z = start;
      for (int64_t k = 0; k < p.width; ++k) z += tap[k] * in[k];
      store_some<S, T>(y(b, first, t), finish(z), p.seqlen, count);
      for (int64_t k = 0; k < before; ++k) in[k] = in[k + 1];
      if (t < p.seqlen - size) continue;
      const int64_t to = p.cache_seqlens ? (next + t) % size : size - p.seqlen + t;
      store_some<StateS, T>(kept + to * step, in[before], p.state_dim, count);
    }
  }

  void run(const Threads& threads) const {
    const int64_t blocks = divide_up(p.dim, lanes);
    const bool three = serves_token(3), four = serves_token(4);
    const auto work = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / blocks, first = i % blocks * lanes, count = least(lanes, p.dim - first);
        const int64_t row = p.conv_state_indices ? p.conv_state_indices[b] : b;
        if (row < 0) {
          for (int64_t j = 0; j < count * p.seqlen; ++j) y(b, first, 0)[j] = scalar_from<S, T>(T(0));
        } else if (three && count == lanes) {
          token<3>(b, row, first);
        } else if (four && count == lanes) {
          token<4>(b, row, first);
        } else {
          window(b, row, first, count);
        }
      }
    };
    if (p.batch * p.dim * p.seqlen < kWorthThreads) {
      work(0, p.batch * blocks);
    } else {
      parallel(threads, p.batch * blocks, work);
    }
  }
};

}  // namespace
}  // namespace trifuse::cpu
