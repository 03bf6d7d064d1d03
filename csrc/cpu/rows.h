// Rows of sequences as padded acc matrices in scratch memory.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "trifuse/simd.h"

namespace trifuse::cpu {
namespace {

template <class T>
constexpr int64_t padded(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Scratch memory of one thread: matrices one after another, each on a vector boundary.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(static_cast<char*>(std::malloc(bytes + 64))) {
    if (!memory_) throw std::bad_alloc();
    next_ = memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64) % 64;
  }
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += bytes_of<T>(count);
    return taken;
  }
  template <class T>
  static int64_t bytes_of(int64_t count) {
    return (count * int64_t(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  char* next_;
};

// to[r][0 .. ld) = from[r * row + c * column], zero from c = columns on.
template <class T, class S>
void load_rows(T* to, int64_t ld, const S* from, int64_t row, int64_t column, int64_t rows, int64_t columns) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t r = 0; r < rows; ++r, to += ld, from += row) {
    int64_t c = 0;
    if (column == 1) {
      for (; c + lanes <= columns; c += lanes) store<T>(to + c, load_as<T>(from + c));
    }
    for (; c < columns; ++c) to[c] = scalar_as<T>(from[c * column]);
    for (; c < ld; ++c) to[c] = 0;
  }
}

// Rows of one head lie far apart: the next head's are asked for while this one's are computed.
template <class S>
TRIFUSE_INLINE void prefetch_row(const S* row, int64_t columns) {
  for (const char* line = reinterpret_cast<const char*>(row); line < reinterpret_cast<const char*>(row + columns);
       line += 64) {
    __builtin_prefetch(line);
  }
}

template <class T, class S>
TRIFUSE_INLINE void store_row(S* to, const T* from, int64_t columns) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t c = 0;
  for (; c + lanes <= columns; c += lanes) store_as<T>(to + c, load<T>(from + c));
  for (; c < columns; ++c) to[c] = scalar_from<S>(from[c]);
}

// to[c][r] = from[r][c]. Of `to`, columns from `rows` to to_ld are zero; rows of `from` are readable to from_ld.
template <class T>
void transpose_rows(T* to, int64_t to_ld, const T* from, int64_t from_ld, int64_t rows, int64_t columns) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t r = 0; r < rows; r += lanes) {
    for (int64_t c = 0; c < columns; c += lanes) {
      if (r + lanes <= rows && c + lanes <= columns) {
        Vec<T> tile[kLanes<T>];
        for (int i = 0; i < lanes; ++i) tile[i] = load<T>(from + (r + i) * from_ld + c);
        transpose<T>(tile);
        for (int i = 0; i < lanes; ++i) store<T>(to + (c + i) * to_ld + r, tile[i]);
      } else {
        for (int64_t i = r; i < std::min(r + lanes, rows); ++i) {
          for (int64_t j = c; j < std::min(c + lanes, columns); ++j) to[j * to_ld + i] = from[i * from_ld + j];
        }
      }
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = rows; r < to_ld; ++r) to[c * to_ld + r] = 0;
  }
}

template <class T>
TRIFUSE_INLINE T dot(const T* a, const T* b, int64_t n) {  // n: whole vectors
  Vec<T> sum = splat(T(0));
  for (int64_t i = 0; i < n; i += kLanes<T>) sum += load<T>(a + i) * load<T>(b + i);
  return sum_lanes<T>(sum);
}

// exp(x) of any x: infinite where it overflows, zero where it would be subnormal.
template <class T>
TRIFUSE_INLINE Vec<T> exp_anywhere(Vec<T> x) {
  constexpr T lowest = sizeof(T) == 4 ? T(-87.3) : T(-708);
  const IVec<T> under = x < splat(lowest);
  Vec<T> y;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    y = (Vec<T>)exp_avx512((__m512)at_most<T>(at_least<T>(x, lowest), T(100)));
    return (Vec<T>)(~under & (IVec<T>)y);
  }
#endif
  y = exp_bounded<T>(at_most<T>(x * splat(T(0.5)), sizeof(T) == 4 ? T(85.9) : T(700)));
  return (Vec<T>)(~under & (IVec<T>)(y * y));
}

}  // namespace
}  // namespace trifuse::cpu
