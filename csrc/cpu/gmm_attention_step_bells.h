// The Gaussians of a mixture over the positions of one sequence: their heights, their windows, their densities.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "dtypes.h"
#include "trifuse/gmm_attention_step.h"

namespace trifuse::cpu {
namespace {
namespace gmm {

// exp(-z^2 / 2) = exp2(-y^2). Beyond this y^2 it is below half of the smallest number and becomes 0.
template <class T>
constexpr double kReach = sizeof(T) == 4 ? 151 : 1076;
// Densities are computed times 2^kLift, which makes numbers of normal size of those that would be subnormal: a
// processor takes a hundred times as long for those, and they have few digits.
template <class T>
constexpr int kLift = sizeof(T) == 4 ? 32 : 64;
template <class T>
constexpr T kUnlift = sizeof(T) == 4 ? T(0x1p-32) : T(0x1p-64);

template <class T>
constexpr int64_t padded(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <class T>
T at(const MixtureView& view, int64_t b, int64_t k) {
  return static_cast<const T*>(view.ptr)[b * view.batch + k * view.component];
}

// One Gaussian, without its weight: y = (j - mean) (scale + rest), and its height, 1 / (sqrt(2 pi) sigma).
template <class T>
struct Bell {
  T mean, scale, rest;
  double inverse, height;  // of sigma
  int64_t first, last;     // the positions [first, last) that it reaches

  Bell(T mean_, T sigma, int64_t length) : mean(mean_) {
    constexpr double from_sigma = 0.84932180028801904272;  // sqrt(log2(e) / 2)
    constexpr double one_bell = 0.39894228040143267794;    // 1 / sqrt(2 pi)
    inverse = 1 / double(sigma);
    scale = T(inverse * from_sigma);
    rest = T(inverse * from_sigma - double(scale));
    height = inverse * one_bell;
    const double half = std::sqrt(kReach<T>) / from_sigma * std::fabs(double(sigma));
    const double low = std::ceil(double(mean) - half), high = std::floor(double(mean) + half) + 1;
    if (!(half > 0) || !(high >= low)) {  // NaN, or sigma is 0: whatever it gives, it gives everywhere
      first = 0, last = length;
    } else {
      first = int64_t(std::min(std::max(low, 0.0), double(length)));
      last = int64_t(std::min(std::max(high, double(first)), double(length)));
    }
  }
};

// exp2(-y^2) 2^kLift, 0 beyond kReach. A NaN stays one.
template <class T>
TRIFUSE_INLINE Vec<T> lifted_bell(Vec<T> y) {
  const Vec<T> squared = y * y;
  const IVec<T> beyond = squared > splat(T(kReach<T>));
  Vec<T> e;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512 s = (__m512)at_least<T>(at_most<T>(y, T(13)), T(-13));
    const __m512 t = _mm512_fnmadd_ps(s, s, _mm512_set1_ps(kSixteenths));
    const __m512 n = _mm512_sub_ps(t, _mm512_set1_ps(kSixteenths));
    const __m512 r = _mm512_fnmsub_ps(s, s, n);  // exact up to its own rounding
    e = (Vec<T>)assemble_avx512(t, _mm512_add_ps(n, _mm512_set1_ps(kLift<T>)), r, float(kLn2), float(kLn2 * kLn2 / 2),
                                float(kLn2 * kLn2 * kLn2 / 6));
    return (Vec<T>)(~beyond & (IVec<T>)e);
  }
#endif
  const Vec<T> x = -at_most<T>(squared, T(kReach<T> + 1));
  const Vec<T> magic = splat(kMagic<T>);
  const Vec<T> t = x + magic;
  const Vec<T> r = x - (t - magic);
  const IVec<T> exponent = ((IVec<T>)t + kLift<T>) << kMantissaBits<T>;
  e = (Vec<T>)((IVec<T>)exp2_fraction<T>(r) + exponent);
  return (Vec<T>)(~beyond & (IVec<T>)e);
}

// x 2^-kDown, where subnormal results are made without arithmetic on subnormal numbers: added to the smallest normal
// number times 2^kDown, |x| is rounded as it has to be, and the bits below that number's are the result's.
template <class T, int kDown>
TRIFUSE_INLINE Vec<T> lowered(Vec<T> x) {
  constexpr T up = T(uint64_t(1) << kDown % 64) * (kDown == 64 ? T(0x1p64) : T(1));
  constexpr T least = std::numeric_limits<T>::min() * up;
  const IVec<T> sign = (IVec<T>)x & (IVec<T>)splat(T(-0.0));
  const Vec<T> size = (Vec<T>)((IVec<T>)x ^ sign);
  const IVec<T> tiny = size < splat(least);
  const IVec<T> bits = (IVec<T>)(size + splat(least)) - (IVec<T>)splat(least);
  const Vec<T> normal = (Vec<T>)(~tiny & (IVec<T>)size) * splat(T(1) / up);
  return (Vec<T>)((tiny & bits) | (~tiny & (IVec<T>)normal) | sign);
}

template <class T>
TRIFUSE_INLINE Vec<T> count_up() {
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = T(i);
  return v;
}

// y at the positions from j on.
template <class T>
TRIFUSE_INLINE Vec<T> distances(const Bell<T>& bell, int64_t j, Vec<T> counting) {
  const Vec<T> d = (counting + splat(T(j))) - splat(bell.mean);
  if constexpr (sizeof(T) == 8) return d * splat(bell.scale);
  return d * splat(bell.scale) + d * splat(bell.rest);
}

// softplus in double, the identity above 20, and its slope. Of floats to far more than their digits, so that a new mean
// is rounded once.
template <class T>
void softplus_of(const MixtureView& x, int64_t b, int64_t count, double* value, double* slope) {
  constexpr int lanes = kLanes<double>;
  for (int64_t k = 0; k < count; k += lanes) {
    Vec<double> v = splat(0.0);
    const int filled = int(std::min<int64_t>(lanes, count - k));
    for (int i = 0; i < filled; ++i) v[i] = double(at<T>(x, b, k + i));
    Softplus<double> y;
    if constexpr (sizeof(T) == 8) {
      y = softplus<double, true>(v);
    } else {
      const Vec<double> one = splat(1.0), zero = splat(0.0), limit = splat(20.0);
      const Vec<double> e = exp_bounded<double>(minus_size<double>(v));
      const Vec<double> s = e / (splat(2.0) + e), q = s * s;  // log1p(e) = 2 atanh(s), s at most 1/3
      Vec<double> sum = splat(1.0 / 19);
#pragma GCC unroll 9
      for (int n = 17; n >= 1; n -= 2) sum = sum * q + splat(1.0 / n);
      const Vec<double> plain = (v > zero ? v : zero) + splat(2.0) * s * sum;
      y.value = v > limit ? v : (v == v ? plain : v);
      y.slope = v > limit ? one : (v > zero ? one : e) / (one + e);
    }
    for (int i = 0; i < filled; ++i) {
      value[k + i] = y.value[i];
      slope[k + i] = y.slope[i];
    }
  }
}

// Which positions of a sequence take part: those that a Gaussian reaches and that are no padding.
class Reached {
 public:
  explicit Reached(int64_t length) : flags_(length) {}
  void clear() { std::fill(flags_.begin(), flags_.end(), 0); }
  template <class T>
  void add(const Bell<T>& bell) {
    std::fill(flags_.begin() + bell.first, flags_.begin() + bell.last, 1);
  }
  void remove_padding(const GmmAttentionShape& p, int64_t b) {
    if (!p.padding) return;
    const bool* padding = p.padding + b * p.padding_batch;
    for (int64_t j = 0; j < p.length; ++j) flags_[j] &= !padding[j * p.padding_time];
  }
  bool operator[](int64_t j) const { return flags_[j]; }

 private:
  std::vector<uint8_t> flags_;
};

// How many pieces each of `batch` rows is cut into, so that the pieces divide evenly among the threads.
inline int64_t pieces_of(int64_t batch, int64_t threads, int64_t most) {
  int64_t pieces = 1;
  while (pieces < most && (batch * pieces) % threads != 0 && batch * pieces < 4 * threads) ++pieces;
  return pieces;
}

}  // namespace gmm
}  // namespace
}  // namespace trifuse::cpu
