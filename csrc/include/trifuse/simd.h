// Vectors as wide as the instruction set this file is compiled for, and the per-element math of the
// CPU kernels on them. Everything is in an anonymous namespace: the same names are compiled once per
// instruction set into one binary and must never be merged by the linker.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace trifuse {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct VecOf<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::V;
template <class T>
using IVec = typename VecOf<T>::I;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

#define TRIFUSE_INLINE inline __attribute__((always_inline))

template <class T>
TRIFUSE_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
TRIFUSE_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class T, size_t... I>
TRIFUSE_INLINE Vec<T> splat_lanes(T x, std::index_sequence<I...>) {
  return Vec<T>{((void)I, x)...};
}
template <class T>
TRIFUSE_INLINE Vec<T> splat(T x) {
  return splat_lanes(x, std::make_index_sequence<kLanes<T>>());
}
template <class T>
TRIFUSE_INLINE T sum_lanes(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps((__m512)v);
#endif
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

// max and min keep a NaN in x.
template <class T>
TRIFUSE_INLINE Vec<T> at_least(Vec<T> x, T bound) {
  const Vec<T> b = splat(bound);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_max_ps((__m512)b, (__m512)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_max_ps((__m256)b, (__m256)x);
#endif
  return x < b ? b : x;
}
template <class T>
TRIFUSE_INLINE Vec<T> at_most(Vec<T> x, T bound) {
  const Vec<T> b = splat(bound);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_min_ps((__m512)b, (__m512)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_min_ps((__m256)b, (__m256)x);
#endif
  return x > b ? b : x;
}

// -|x|
template <class T>
TRIFUSE_INLINE Vec<T> minus_size(Vec<T> x) {
  return (Vec<T>)((IVec<T>)x | (IVec<T>)splat(T(-0.0)));
}

constexpr double kLn2 = 0.693147180559945309417;
constexpr double kLog2e = 1.44269504088896340736;

// The factors of exp2(scale * rate) stay below this in size: their product and its rounding error are
// then finite and far inside the range in which exp2_product works, and any product of two clamped
// factors has already under- or overflowed.
template <class T>
constexpr T kFactorLimit = sizeof(T) == 4 ? T(8.589934592e9) : T(1e60);

// exp2(r) for |r| <= 1/2 by its Taylor series: the first omitted term is 5e-9 of the result in float
// and 4e-18 in double. The value and the slope at 0 are exact, so a decay near one stays unbiased.
template <class T>
TRIFUSE_INLINE Vec<T> exp2_fraction(Vec<T> r) {
  constexpr int degree = sizeof(T) == 4 ? 7 : 13;
  double coefficient[degree + 1];
  coefficient[0] = 1;
  for (int k = 1; k <= degree; ++k) coefficient[k] = coefficient[k - 1] * kLn2 / k;
  Vec<T> p = splat(T(coefficient[degree]));
#pragma GCC unroll 16
  for (int k = degree - 1; k >= 0; --k) p = p * r + splat(T(coefficient[k]));
  return p;
}

template <class T>
constexpr int kMantissaBits = sizeof(T) == 4 ? 23 : 52;
// 1.5 * 2^mantissa: adding it rounds to an integer, which then stands in the low bits.
template <class T>
constexpr T kMagic = sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);

// exp2(x), flushed to 0 where the result would be subnormal.
template <class T>
TRIFUSE_INLINE Vec<T> exp2_by_shift(Vec<T> x) {
  constexpr T top = sizeof(T) == 4 ? T(128) : T(1024);
  const Vec<T> magic = splat(kMagic<T>);
  const Vec<T> tiny = splat(2 - top);
  const Vec<T> c = at_most<T>(at_least<T>(x, 2 - top), top);
  const Vec<T> t = c + magic;
  const Vec<T> r = c - (t - magic);
  const IVec<T> n = (IVec<T>)t << kMantissaBits<T>;
  const Vec<T> y = (Vec<T>)((IVec<T>)exp2_fraction<T>(r) + n);
  const IVec<T> under = x < tiny;
  return (Vec<T>)(~under & (IVec<T>)y);
}

#if defined(__AVX512F__)
// 2^(i/16) for i = 0 .. 15: one register.
TRIFUSE_INLINE __m512 sixteenths() {
  return _mm512_setr_ps(1.0f, 1.0442737824274138f, 1.0905077326652577f, 1.1387886347566916f, 1.189207115002721f,
                        1.241857812073484f, 1.2968395546510096f, 1.3542555469368927f, 1.4142135623730951f,
                        1.476826145939499f, 1.5422108254079407f, 1.6104903319492543f, 1.681792830507429f,
                        1.7562521603732995f, 1.8340080864093424f, 1.9152065613971474f);
}
// Adding it rounds to sixteenths and leaves the table's index in the low bits.
constexpr float kSixteenths = 786432.0f;  // 1.5 * 2^19

// 2^(i/16 + n) times the cubic 1 + r (c1 + r (c2 + r c3)), for the t that kSixteenths was added to.
TRIFUSE_INLINE __m512 assemble_avx512(__m512 t, __m512 s, __m512 r, float c1, float c2, float c3) {
  __m512 q = _mm512_fmadd_ps(r, _mm512_set1_ps(c3), _mm512_set1_ps(c2));
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(c1));
  const __m512 step = _mm512_permutexvar_ps(_mm512_castps_si512(t), sixteenths());
  return _mm512_scalef_ps(_mm512_fmadd_ps(_mm512_mul_ps(q, r), step, step), s);
}

// exp2(scale * rate): the product is exact up to the rounding of r.
TRIFUSE_INLINE __m512 exp2_product_avx512(__m512 scale, __m512 rate) {
  const __m512 t = _mm512_fmadd_ps(scale, rate, _mm512_set1_ps(kSixteenths));
  const __m512 s = _mm512_sub_ps(t, _mm512_set1_ps(kSixteenths));
  const __m512 r = _mm512_fmsub_ps(scale, rate, s);
  return assemble_avx512(t, s, r, float(kLn2), float(kLn2 * kLn2 / 2), float(kLn2 * kLn2 * kLn2 / 6));
}

// exp(x), x in the range of normal results. ln 2 is 3e-9 away from its float: one part is enough.
TRIFUSE_INLINE __m512 exp_avx512(__m512 x) {
  const __m512 t = _mm512_fmadd_ps(x, _mm512_set1_ps(float(kLog2e)), _mm512_set1_ps(kSixteenths));
  const __m512 s = _mm512_sub_ps(t, _mm512_set1_ps(kSixteenths));
  const __m512 r = _mm512_fnmadd_ps(s, _mm512_set1_ps(float(kLn2)), x);
  return assemble_avx512(t, s, r, 1.0f, 0.5f, float(1.0 / 6));
}
#endif

// exp2(scale * rate), |scale| and |rate| at most kFactorLimit.
template <class T>
TRIFUSE_INLINE Vec<T> exp2_product(Vec<T> scale, Vec<T> rate) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)exp2_product_avx512((__m512)scale, (__m512)rate);
#endif
  return exp2_by_shift<T>(scale * rate);
}

// The time of a decay, exp(dt * A) = exp2(decay_time(dt) * A). Converting dt and not A leaves a rounding
// error that changes from step to step, as in dt * A itself, instead of a bias of every decay.
template <class T>
TRIFUSE_INLINE Vec<T> decay_time(Vec<T> dt) {
  constexpr T log2e = T(kLog2e), rest = T(kLog2e - double(log2e));
  return at_most<T>(dt * splat(log2e) + dt * splat(rest), kFactorLimit<T>);
}

// 1 / x for 1 <= x <= 2^125.
template <class T>
TRIFUSE_INLINE Vec<T> reciprocal(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const Vec<T> y = (Vec<T>)_mm512_rcp14_ps((__m512)x);
    return y * (splat(T(1)) - x * y) + y;
  }
#endif
  return splat(T(1)) / x;
}

// exp(x) for x cut from below at -87.3 (-708 in double), where it is a normal number; x at most 85.9.
template <class T>
TRIFUSE_INLINE Vec<T> exp_bounded(Vec<T> x) {
  constexpr T log2e = T(kLog2e), rest = T(kLog2e - double(log2e));
  const Vec<T> c = at_least<T>(x, sizeof(T) == 4 ? T(-87.3) : T(-708));
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)exp_avx512((__m512)c);
#endif
  const Vec<T> magic = splat(kMagic<T>);
  const Vec<T> t = c * splat(log2e) + magic;
  const Vec<T> r = (c * splat(log2e) - (t - magic)) + c * splat(rest);
  return (Vec<T>)((IVec<T>)exp2_fraction<T>(r) + ((IVec<T>)t << kMantissaBits<T>));
}

template <class T>
TRIFUSE_INLINE Vec<T> sigmoid(Vec<T> x) {
  return reciprocal<T>(splat(T(1)) + exp_bounded<T>(at_most<T>(-x, T(85.9))));
}

// log1p(t) for 0 <= t <= 1.
template <class T>
TRIFUSE_INLINE Vec<T> log1p_unit(Vec<T> t) {
  if constexpr (sizeof(T) == 8) {
    Vec<T> y;
    for (int i = 0; i < kLanes<T>; ++i) y[i] = std::log1p(t[i]);
    return y;
  } else {
    // t + t^2 q(t), with q the Chebyshev fit of (log1p(t) - t) / t^2 on [0, 1]; relative error 2.3e-8.
    constexpr float c[] = {-0.49999997f, 0.333328426f,   -0.249865264f, 0.19854106f,    -0.158475652f,
                           0.115618452f, -0.0667577237f, 0.0252240542f, -0.00446621142f};
    constexpr int degree = sizeof(c) / sizeof(c[0]) - 1;
    Vec<T> q = splat(T(c[degree]));
#pragma GCC unroll 16
    for (int k = degree - 1; k >= 0; --k) q = q * t + splat(T(c[k]));
    return q * (t * t) + t;
  }
}

// softplus(x), the identity above 20, and its slope.
template <class T>
struct Softplus {
  Vec<T> value, slope;
};
template <class T, bool kSlope>
TRIFUSE_INLINE Softplus<T> softplus(Vec<T> x) {
  const Vec<T> one = splat(T(1)), threshold = splat(T(20));
  const Vec<T> e = exp_bounded<T>(minus_size<T>(x));
  Softplus<T> y;
  y.value = at_least<T>(x, T(0)) + log1p_unit<T>(e);
  // In float the sum is x already: log1p(e) is below half a unit in the last place of 20.
  if constexpr (sizeof(T) == 8) y.value = x > threshold ? x : y.value;
  if constexpr (kSlope) {
    const Vec<T> inverse = reciprocal<T>(one + e);
    y.slope = x > threshold ? one : (x > splat(T(0)) ? inverse : e * inverse);
  }
  return y;
}

// sine and cosine: the angle is reduced to a quarter turn by three exactly subtracted parts of pi/2,
// then Taylor series (first omitted term below 2e-9). Large angles and doubles go to the C library.
template <class T>
TRIFUSE_INLINE void sincos(Vec<T> x, Vec<T>& sine, Vec<T>& cosine) {
  bool plain = sizeof(T) == 4;
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < kLanes<T>; ++i) plain &= std::fabs(x[i]) <= T(8192);
  }
  if (!plain) {
    for (int i = 0; i < kLanes<T>; ++i) {
      sine[i] = std::sin(x[i]);
      cosine[i] = std::cos(x[i]);
    }
    return;
  }
  const Vec<T> magic = splat(kMagic<T>);
  const Vec<T> shifted = x * splat(T(0.636619772367581343)) + magic;
  const Vec<T> turns = shifted - magic;
  Vec<T> r = x - turns * splat(T(1.5703125));
  r = r - turns * splat(T(4.837512969970703125e-4));
  r = r - turns * splat(T(7.549789948768648e-8));
  const Vec<T> z = r * r;
  Vec<T> s = z * splat(T(1.0 / 362880)) - splat(T(1.0 / 5040));
  s = s * z + splat(T(1.0 / 120));
  s = s * z - splat(T(1.0 / 6));
  s = s * z * r + r;
  Vec<T> c = splat(T(1.0 / 40320)) - z * splat(T(1.0 / 3628800));
  c = c * z - splat(T(1.0 / 720));
  c = c * z + splat(T(1.0 / 24));
  c = c * z * z + (splat(T(1)) - z * splat(T(0.5)));
  const IVec<T> quarter = (IVec<T>)shifted;  // its low bits count the quarter turns
  const IVec<T> swap = (quarter & 1) != 0;
  sine = swap ? c : s;
  cosine = swap ? s : c;
  sine = (quarter & 2) != 0 ? -sine : sine;
  cosine = ((quarter + 1) & 2) != 0 ? -cosine : cosine;
}

TRIFUSE_INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  float f;
  if (magnitude >= 0x7c00) {  // infinity or NaN
    const uint32_t bits = sign | 0x7f800000 | ((magnitude & 0x3ff) << 13);
    std::memcpy(&f, &bits, sizeof f);
    return f;
  }
  const uint32_t bits = magnitude << 13;  // the exponent is 112 too small; scaling also mends subnormals
  std::memcpy(&f, &bits, sizeof f);
  f *= 0x1p112f;
  return sign ? -f : f;
#endif
}
TRIFUSE_INLINE uint16_t float_to_half(float f) {
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (bits < 0x38800000) {                       // subnormal half: let the float adder do the rounding
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return sign | uint16_t(bits - 0x3f000000);
  }
  return sign | uint16_t((bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13);
#endif
}
template <class T, class S>
TRIFUSE_INLINE T scalar_as(S x) {
  if constexpr (std::is_same_v<S, bf16>) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
  } else if constexpr (std::is_same_v<S, f16>) {
    return half_to_float(x.bits);
  } else {
    return T(x);
  }
}

// Loads and stores of kLanes<T> neighbours of any sequence dtype, as accumulation vectors.
template <class T, class S>
TRIFUSE_INLINE Vec<T> load_as(const S* p) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return load<T>(reinterpret_cast<const T*>(p));
  } else {
    typename VecOf<float>::Half h;
    __builtin_memcpy(&h, p, sizeof h);
    if constexpr (std::is_same_v<S, bf16>) {
      return (Vec<T>)(__builtin_convertvector(h, VecOf<float>::U) << 16);
    } else {
#if defined(__AVX512F__)
      return (Vec<T>)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
      return (Vec<T>)_mm256_cvtph_ps((__m128i)h);
#else
      Vec<T> v;
      for (int i = 0; i < kLanes<T>; ++i) v[i] = half_to_float(h[i]);
      return v;
#endif
    }
  }
}
template <class S, class T>
TRIFUSE_INLINE S scalar_from(T x) {
  if constexpr (std::is_same_v<S, bf16>) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return bf16{uint16_t(x == x ? rounded : (bits >> 16) | 0x40)};
  } else if constexpr (std::is_same_v<S, f16>) {
    return f16{float_to_half(x)};
  } else {
    return S(x);
  }
}
template <class T, class S>
TRIFUSE_INLINE void store_as(S* p, Vec<T> v) {
  if constexpr (sizeof(S) == sizeof(T)) {
    store<T>(reinterpret_cast<T*>(p), v);
  } else if constexpr (std::is_same_v<S, bf16>) {
    typedef VecOf<float>::U U;
    const U bits = (U)v;
    const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const VecOf<float>::Half h = __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40, VecOf<float>::Half);
    __builtin_memcpy(p, &h, sizeof h);
  } else {
#if defined(__AVX512F__)
    const __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(p, &h, sizeof h);
#elif defined(__AVX2__)
    const __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(p, &h, sizeof h);
#else
    for (int i = 0; i < kLanes<T>; ++i) p[i].bits = float_to_half(v[i]);
#endif
  }
}

// Transposes a kLanes x kLanes block: exchange halves at distance 1, 2, 4, ... between rows and lanes.
template <class T, int kDistance, bool kHigh, size_t... J>
TRIFUSE_INLINE Vec<T> exchange(Vec<T> a, Vec<T> b, std::index_sequence<J...>) {
  constexpr int lanes = kLanes<T>;
  if constexpr (kHigh) {
    return __builtin_shufflevector(a, b, ((J & kDistance) ? int(J) + lanes : int(J) + kDistance)...);
  } else {
    return __builtin_shufflevector(a, b, ((J & kDistance) ? int(J) + lanes - kDistance : int(J))...);
  }
}
template <class T, int kDistance = 1>
TRIFUSE_INLINE void transpose(Vec<T>* rows) {
  constexpr int lanes = kLanes<T>;
  constexpr auto all = std::make_index_sequence<lanes>();
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if (i & kDistance) continue;
    const Vec<T> a = rows[i], b = rows[i + kDistance];
    rows[i] = exchange<T, kDistance, false>(a, b, all);
    rows[i + kDistance] = exchange<T, kDistance, true>(a, b, all);
  }
  if constexpr (2 * kDistance < lanes) transpose<T, 2 * kDistance>(rows);
}

}  // namespace
}  // namespace trifuse
