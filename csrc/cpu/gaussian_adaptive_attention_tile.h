// A tile of slices of gaussian_adaptive_attention: which entries it is made of, how they come into vectors and go
// back, and numbers that stand beside its slices. One code serves both ways in which slices lie in memory: as rows,
// whose entries fill the lanes of a vector, and as columns, of which every lane holds another one.
#pragma once

#include <algorithm>
#include <limits>

#include "bfloat16.h"
#include "dtypes.h"
#include "trifuse/gaussian_adaptive_attention.h"

namespace trifuse::cpu {
namespace {

constexpr int kWide = 4;        // vectors side by side
constexpr int64_t kChunk = 16;  // steps that are added up in the accumulation type before a sum goes further up

#define TRIFUSE_EACH_VECTOR _Pragma("GCC unroll 4") for (int u = 0; u < kWide; ++u)

template <class E, bool kRows>
constexpr int kSlices = kRows ? kWide : kWide * kLanes<E>;

// One number for every slice of a tile; rows leave the end of the vector unused.
template <class T, class E, bool kRows>
struct alignas(64) PerSlice {
  static constexpr int kCount = kSlices<E, kRows> < kLanes<E> ? kLanes<E> : kSlices<E, kRows>;
  T at[kCount];
  T& operator[](int i) { return at[i]; }
  const T& operator[](int i) const { return at[i]; }
};

// A slice's number in every lane of vector u that belongs to it.
template <class E, bool kRows>
TRIFUSE_INLINE Vec<E> spread(const PerSlice<E, E, kRows>& numbers, int u) {
  if constexpr (kRows) return splat(numbers.at[u]);
  return load(numbers.at + u * kLanes<E>);
}

// kWide vectors side by side, `steps` times one after another. Rows: vector u is a slice of its own, or where
// `one` is set a quarter of one slice. Columns: kWide * kLanes neighbours.
template <class E, bool kRows>
struct Tile {
  static constexpr int64_t kWidth = kLanes<E>;
  int64_t steps = 0;
  bool one = false;
  int64_t outer[kWide], first[kWide], inner[kWide];  // where vector u begins; `first` is along the axis
  int64_t rest[kWide];                               // how many entries (rows) or columns are there from it on

  int count(int64_t t, int u) const { return int(std::clamp<int64_t>(rest[u] - (kRows ? t * kWidth : 0), 0, kWidth)); }
  bool whole() const {
    for (int u = 0; u < kWide; ++u) {
      if (rest[u] < (kRows ? steps * kWidth : kWidth)) return false;
    }
    return true;
  }
  int64_t offset(const SliceView& view, int u) const {
    return outer[u] * view.outer + first[u] * view.axis + inner[u] * view.inner;
  }
  static int64_t lane(const SliceView& view) { return kRows ? view.axis : view.inner; }
  static int64_t step(const SliceView& view) { return kRows ? kWidth * view.axis : view.axis; }
};

// The lanes of a vector that are there, zeros in the others.
template <class E, class S>
TRIFUSE_INLINE Vec<E> load_lanes(const S* p, int64_t stride, int count) {
  if (stride == 1 && count == kLanes<E>) return load_sequence<E, S>(p);
  alignas(64) E lanes[kLanes<E>] = {};
  for (int i = 0; i < count; ++i) lanes[i] = scalar_as<E, S>(p[i * stride]);
  return load(lanes);
}

template <class E, class S>
TRIFUSE_INLINE void store_lanes(S* p, Vec<E> v, int64_t stride, int count) {
  if (stride == 1 && count == kLanes<E>) return store_sequence<S, E>(p, v);
  for (int i = 0; i < count; ++i) p[i * stride] = scalar_from<S, E>(v[i]);
}

// As many bytes as there are lanes.
template <int kCount>
struct Bytes;
template <>
struct Bytes<2> {
  typedef uint8_t V __attribute__((vector_size(2)));
};
template <>
struct Bytes<4> {
  typedef uint8_t V __attribute__((vector_size(4)));
};
template <>
struct Bytes<8> {
  typedef uint8_t V __attribute__((vector_size(8)));
};
template <>
struct Bytes<16> {
  typedef uint8_t V __attribute__((vector_size(16)));
};

// All bits of the lanes that are set.
template <class E>
TRIFUSE_INLINE IVec<E> mask_lanes(const uint8_t* p, int64_t stride, int count) {
  typename Bytes<kLanes<E>>::V bytes;
  if (stride == 1 && count == kLanes<E>) {
    __builtin_memcpy(&bytes, p, sizeof bytes);
  } else {
    uint8_t lanes[kLanes<E>] = {};
    for (int i = 0; i < count; ++i) lanes[i] = p[i * stride];
    __builtin_memcpy(&bytes, lanes, sizeof bytes);
  }
  return __builtin_convertvector(bytes, IVec<E>) != 0;
}

template <class E>
TRIFUSE_INLINE Vec<E> where(IVec<E> mask, Vec<E> v) {
  return (Vec<E>)(mask & (IVec<E>)v);
}
template <class E>
TRIFUSE_INLINE Vec<E> where(IVec<E> mask, Vec<E> yes, Vec<E> no) {
  return (Vec<E>)((mask & (IVec<E>)yes) | (~mask & (IVec<E>)no));
}

// x^2 as a number of its own, never a part of a fused multiply-add: the least square is subtracted from it, and has to
// give zero where it comes from.
template <class T>
TRIFUSE_INLINE Vec<T> rounded_square(Vec<T> x) {
  Vec<T> square = x * x;
#if defined(__AVX512F__)
  asm("" : "+v"(square));
#elif defined(__x86_64__)
  asm("" : "+x"(square));
#elif defined(__aarch64__)
  asm("" : "+w"(square));
#else
  asm("" : "+m"(square));
#endif
  return square;
}

template <class T>
TRIFUSE_INLINE Vec<T> smaller(Vec<T> x, Vec<T> y) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_min_ps((__m512)x, (__m512)y);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_min_pd((__m512d)x, (__m512d)y);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_min_ps((__m256)x, (__m256)y);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_min_pd((__m256d)x, (__m256d)y);
#endif
  return x < y ? x : y;
}

// Folds the lanes onto each other, half by half.
template <class T, int kDistance, size_t... I>
TRIFUSE_INLINE Vec<T> rotate(Vec<T> v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, int((I + kDistance) % kLanes<T>)...);
}
template <class T, bool kSum, int kDistance = kLanes<T> / 2>
TRIFUSE_INLINE T fold_lanes(Vec<T> v) {
  if constexpr (kDistance == 0) {
    return v[0];
  } else {
    const Vec<T> other = rotate<T, kDistance>(v, std::make_index_sequence<kLanes<T>>());
    return fold_lanes<T, kSum, kDistance / 2>(kSum ? v + other : smaller<T>(v, other));
  }
}

// Sums over the steps of a tile, one for each slice. Columns go up to double, so that an error does not grow with
// the length; in rows the lanes share the length.
template <class E, bool kRows>
class Sums {
 public:
  TRIFUSE_INLINE void add(const Vec<E>* chunk) {
    TRIFUSE_EACH_VECTOR {
      if constexpr (kRows) {
        rows_[u] = rows_[u] + chunk[u];
      } else {
        const E* lanes = reinterpret_cast<const E*>(chunk + u);
        for (int i = 0; i < kLanes<E>; ++i) columns_[u * kLanes<E> + i] += double(lanes[i]);
      }
    }
  }
  TRIFUSE_INLINE void get(PerSlice<double, E, kRows>& to, bool one) const {
    if constexpr (kRows) {
      TRIFUSE_EACH_VECTOR to[u] = double(fold_lanes<E, true>(rows_[u]));
      if (one) to[0] = to[1] = to[2] = to[3] = (to[0] + to[1]) + (to[2] + to[3]);
    } else {
      for (int i = 0; i < kSlices<E, kRows>; ++i) to[i] = columns_[i];
    }
  }

 private:
  Vec<E> rows_[kRows ? kWide : 1] = {};
  alignas(64) double columns_[kRows ? 1 : kSlices<E, kRows>] = {};
};

// log(y) of normal numbers; anything finite elsewhere.
template <class E>
TRIFUSE_INLINE Vec<E> log_normal(Vec<E> y) {
  if constexpr (sizeof(E) == 8) {
    for (int i = 0; i < kLanes<E>; ++i) y[i] = std::log(y[i] > 0 ? y[i] : std::numeric_limits<E>::min());
    return y;
  } else {
    const IVec<E> bits = (IVec<E>)y;
    const Vec<E> exponent = __builtin_convertvector((bits >> 23) - 127, Vec<E>);
    const Vec<E> mantissa = (Vec<E>)((bits & 0x7fffff) | 0x3f800000);
    return exponent * splat(E(kLn2)) + log1p_unit<E>(mantissa - splat(E(1)));
  }
}

// The entries of a tile as vectors, and which of them are there: [step][kWide].
template <class E>
struct Entries {
  const E* x[kWide];
  int64_t step;                         // elements from one step of x to the next
  const IVec<E>* counted = nullptr;     // takes part in the mean, the variance and the sum
  const IVec<E>* multiplied = nullptr;  // times its weight; what is counted and not multiplied is a sentinel

  TRIFUSE_INLINE Vec<E> at(int64_t t, int u) const { return load(x[u] + t * step); }
};

// Whether vectors of a view can be read where they lie, at any step. Columns are copied: their steps are often a power
// of two apart in memory, where a cache has room for few of them.
template <class E, class S, bool kRows>
bool reads_in_place(const Tile<E, kRows>& tile, const SliceView& view) {
  return std::is_same_v<E, S> && kRows && tile.lane(view) == 1 && tile.whole();
}

// The columns of the next tile lie beside those of this one, in pages that no prefetcher of a processor looks ahead in.
// (Without inlining the compiler drops calls that only prefetch.)
template <class E, class S>
TRIFUSE_INLINE void expect_next_tile(const S* p) {
  __builtin_prefetch(p + kWide * kLanes<E>, 0, 2);
}

// Copies the entries of a view into [step][kWide] vectors.
template <class E, class S, bool kRows>
void copy_entries(const Tile<E, kRows>& tile, const SliceView& view, E* to) {
  const S* from[kWide];
  for (int u = 0; u < kWide; ++u) from[u] = static_cast<const S*>(view.ptr) + tile.offset(view, u);
  const int64_t step = tile.step(view), lane = tile.lane(view);
  const bool whole = lane == 1 && tile.whole();
  for (int64_t t = 0; t < tile.steps; ++t, to += kWide * kLanes<E>) {
    if (whole) {
      TRIFUSE_EACH_VECTOR {
        if (!kRows) expect_next_tile<E>(from[u] + t * step);
        store(to + u * kLanes<E>, load_sequence<E, S>(from[u] + t * step));
      }
    } else {
      for (int u = 0; u < kWide; ++u) {
        store(to + u * kLanes<E>, load_lanes<E, S>(from[u] + t * step, lane, tile.count(t, u)));
      }
    }
  }
}

// The same from a view that may not be there: zeros.
template <class E, class S, bool kRows>
void copy_gradient(const Tile<E, kRows>& tile, const SliceView& view, E* to) {
  if (view.ptr) return copy_entries<E, S, kRows>(tile, view, to);
  std::fill(to, to + tile.steps * kWide * kLanes<E>, E(0));
}

// Which entries are there, as masks; entries that take no part become zeros in x.
template <class E, class S, bool kRows>
void find_masks(const Tile<E, kRows>& tile, const GaussianAdaptiveAttentionShape& p, E* x, IVec<E>* counted,
                IVec<E>* multiplied) {
  const Vec<E> sentinel = splat(scalar_as<E, S>(scalar_from<S, E>(E(p.padding_value))));
  Vec<E> index;
  for (int i = 0; i < kLanes<E>; ++i) index[i] = E(i);
  const uint8_t* from[kWide];
  for (int u = 0; u < kWide && p.mask.ptr; ++u) {
    from[u] = static_cast<const uint8_t*>(p.mask.ptr) + tile.offset(p.mask, u);
  }
  for (int64_t t = 0; t < tile.steps; ++t) {
    for (int u = 0; u < kWide; ++u) {
      const int64_t i = t * kWide + u;
      const int count = tile.count(t, u);
      const Vec<E> v = load(x + i * kLanes<E>);
      counted[i] = p.mask.ptr ? mask_lanes<E>(from[u] + t * tile.step(p.mask), tile.lane(p.mask), count)
                              : index < splat(E(count));
      if (p.padded) multiplied[i] = counted[i] & (v != sentinel);
      store(x + i * kLanes<E>, where<E>(counted[i], v));
    }
  }
}

// Writes [step][kWide] results where they belong.
template <class E, class S, bool kRows>
class Writer {
 public:
  Writer(const Tile<E, kRows>& tile, const GaussianAdaptiveAttentionShape& p, void* to) : tile_(tile) {
    const SliceView view{to, p.length * p.inner, p.inner, 1};
    for (int u = 0; u < kWide; ++u) to_[u] = static_cast<S*>(to) + tile.offset(view, u);
    step_ = tile.step(view);
    lane_ = tile.lane(view);
    whole_ = lane_ == 1 && tile.whole();
  }
  bool whole() const { return whole_; }
  TRIFUSE_INLINE void put_whole(int64_t t, int u, Vec<E> v) const {
    if (!kRows) expect_next_tile<E>(to_[u] + t * step_);
    store_sequence<S, E>(to_[u] + t * step_, v);
  }
  TRIFUSE_INLINE void put(int64_t t, int u, Vec<E> v) const {
    store_lanes<E, S>(to_[u] + t * step_, v, lane_, tile_.count(t, u));
  }

 private:
  const Tile<E, kRows>& tile_;
  S* to_[kWide];
  int64_t step_, lane_;
  bool whole_;
};

}  // namespace
}  // namespace trifuse::cpu
