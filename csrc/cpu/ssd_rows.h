// Rows of sequences as padded acc matrices in scratch memory, and the steps and decays of a block.
#pragma once

#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

#include "dtypes.h"
#include "ssd_blocks.h"

namespace trifuse::cpu {
namespace {
namespace ssd {

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

// Calls f with a null pointer of the type that dt's dtype stands for.
template <class F>
void with_dt_dtype(DType dtype, F&& f) {
  with_sequence_dtype(dtype, [&](auto*, auto* type) { f(type); });
}

// The steps of one head in one block of q positions, and their decays. The logarithm of the decay from the
// block's first position to position i is cum[i] = sum of step * A up to i, kept as a float and its rounding
// error: differences of two are then as exact as the steps, however long the block.
template <class T>
struct Steps {
  T* step;   // after bias, softplus and limits
  T* slope;  // of step in dt
  T* high;   // cum
  T* low;
  T* from_start;  // exp(cum[i])
  T* to_end;      // exp(cum[q - 1] - cum[i])
  T total = 1;    // exp(cum[q - 1])

  static int64_t bytes(int64_t q) { return 6 * Scratch::bytes_of<T>(padded<T>(q)); }
  Steps(Scratch& scratch, int64_t q) {
    for (T** array : {&step, &slope, &high, &low, &from_start, &to_end}) *array = scratch.take<T>(padded<T>(q));
  }

  template <bool kSlope>
  void compute(const SsdParams& p, int64_t b, int64_t h, int64_t begin, int64_t q) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t end = padded<T>(q);
    with_dt_dtype(p.dt_dtype, [&](auto* type) {
      const auto* dt = static_cast<decltype(type)>(p.dt.ptr) + b * p.dt.batch + begin * p.dt.time + h * p.dt.head;
      for (int64_t i = 0; i < q; ++i) step[i] = T(scalar_as<T>(dt[i * p.dt.time]));
    });
    for (int64_t i = q; i < end; ++i) step[i] = 0;
    const T bias = p.dt_bias ? static_cast<const T*>(p.dt_bias)[h] : T(0);
    const Vec<T> smallest = splat(T(p.dt_min)), largest = splat(T(p.dt_max)), zero = splat(T(0));
    for (int64_t i = 0; i < end; i += lanes) {
      Vec<T> x = load<T>(step + i) + splat(bias), s = splat(T(1));
      if (p.dt_softplus) {
        const Softplus<T> y = softplus<T, kSlope>(x);
        x = y.value;
        if constexpr (kSlope) s = y.slope;
      }
      if constexpr (kSlope) store<T>(slope + i, (x < smallest) | (x > largest) ? zero : s);
      x = x < smallest ? smallest : x;
      store<T>(step + i, x > largest ? largest : x);
    }
    decays(double(static_cast<const T*>(p.A)[h]), q);
  }

 private:
  void decays(double rate, int64_t q) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t end = padded<T>(q);
    double sum = 0;
    for (int64_t i = 0; i < q; ++i) {
      double decay = double(step[i]) * rate;
      decay = decay < -1e4 ? -1e4 : decay > 1e4 ? 1e4 : decay;  // exp is 0 or infinite there; NaN stays
      sum += decay;
      high[i] = T(sum);
      low[i] = T(sum - double(high[i]));
    }
    for (int64_t i = q; i < end; ++i) high[i] = low[i] = 0;
    const Vec<T> last = splat(high[q - 1]), last_low = splat(low[q - 1]);
    for (int64_t i = 0; i < end; i += lanes) {
      const Vec<T> hi = load<T>(high + i), lo = load<T>(low + i);
      store<T>(from_start + i, exp_anywhere<T>(hi + lo));
      store<T>(to_end + i, exp_anywhere<T>((last - hi) + (last_low - lo)));
    }
    total = from_start[q - 1];
  }
};

// Calls f(i, v, decay, v is the last) for every vector v of columns at or left of the diagonal of row i, in
// order: decay[lane] is exp(cum[i] - cum[j]) of column j = v * lanes + lane, times column_scale[j] if given.
// Columns right of the diagonal hold anything. Blocks of `lanes` rows share the exponentials left of them.
template <class T, class F>
TRIFUSE_INLINE void for_decays(const Steps<T>& steps, int64_t q, const T* column_scale, T* shared, F&& f) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t first = 0; first < q; first += lanes) {
    const int64_t left = first / lanes;
    const auto difference = [&](int64_t i, int64_t v) {
      return (splat(steps.high[i]) - load<T>(steps.high + v * lanes)) +
             (splat(steps.low[i]) - load<T>(steps.low + v * lanes));
    };
    const auto scale = [&](int64_t v) { return column_scale ? load<T>(column_scale + v * lanes) : splat(T(1)); };
    for (int64_t v = 0; v < left; ++v) store<T>(shared + v * lanes, exp_anywhere<T>(difference(first, v)) * scale(v));
    for (int64_t i = first; i < std::min(first + lanes, q); ++i) {
      const T here = T(steps.high[i] - steps.high[first]) + T(steps.low[i] - steps.low[first]);
      const Vec<T> row = exp_anywhere<T>(splat(here));
      for (int64_t v = 0; v < left; ++v) f(i, v, row * load<T>(shared + v * lanes), false);
      f(i, left, exp_anywhere<T>(difference(i, left)) * scale(left), true);
    }
  }
}

}  // namespace ssd
}  // namespace
}  // namespace trifuse::cpu
