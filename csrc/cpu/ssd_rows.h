// The steps and decays of a block.
#pragma once

#include <cmath>

#include "dtypes.h"
#include "rows.h"
#include "ssd_blocks.h"

namespace trifuse::cpu {
namespace {
namespace ssd {

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
