// The per-element math of the device kernels: storage types, exponentials, and the functions of one
// number that the scans are made of. Compiled by nvcc for the device and by the host compiler for the
// emulator, so it includes no CUDA header; what only a GPU can do is one line of PTX each.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define TRIFUSE_HD __host__ __device__ __forceinline__
#else
#define TRIFUSE_HD inline
#endif

namespace trifuse {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

namespace detail {

template <typename To, typename From>
TRIFUSE_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of one size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

#if !defined(__CUDA_ARCH__)
inline float host_from_f16(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  const float value =
      magnitude < 0x400 ? float(magnitude) * 0x1p-24f : bit_cast<float>((magnitude << 13) + (uint32_t(112) << 23));
  return sign ? -value : value;
}

inline uint16_t host_to_f16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {  // below 2^-14: the sum's rounding is that of the subnormals
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000));
  }
  return uint16_t(sign | ((magnitude - (uint32_t(112) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

inline uint16_t host_to_bf16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#endif

}  // namespace detail

TRIFUSE_HD float to_float(float x) { return x; }
TRIFUSE_HD float to_float(bf16 x) { return detail::bit_cast<float>(uint32_t(x.bits) << 16); }
TRIFUSE_HD float to_float(f16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return detail::host_from_f16(x.bits);
#endif
}

template <typename T>
TRIFUSE_HD T from_float(float x);
template <>
TRIFUSE_HD float from_float<float>(float x) {
  return x;
}
template <>
TRIFUSE_HD bf16 from_float<bf16>(float x) {
  bf16 y;
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  y.bits = detail::host_to_bf16(x);
#endif
  return y;
}
template <>
TRIFUSE_HD f16 from_float<f16>(float x) {
  f16 y;
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  y.bits = detail::host_to_f16(x);
#endif
  return y;
}

// a * b + c in one instruction where there is one.
TRIFUSE_HD float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}

// 2^x: one special-function instruction, relative error at most 2^-22, results below 2^-126 are zero.
TRIFUSE_HD float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// 1 / x: one special-function instruction, at most one ulp off.
TRIFUSE_HD float reciprocal_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

TRIFUSE_HD float sigmoid(float x) { return reciprocal_fast(1.0f + exp2_fast(-kLog2e * x)); }

// log(1 + e) for 0 <= e <= 1 with a relative error of about one ulp, without a logarithm: the special
// functions are what the scans run out of first. Minimax polynomial for (log1p(e) - e) / e^2.
TRIFUSE_HD float log1p_unit(float e) {
  float q = -0.003243980696424842f;
  q = fma(q, e, 0.019851261749863625f);
  q = fma(q, e, -0.056959159672260284f);
  q = fma(q, e, 0.10603617131710052f);
  q = fma(q, e, -0.15305569767951965f);
  q = fma(q, e, 0.19675931334495544f);
  q = fma(q, e, -0.24954132735729218f);
  q = fma(q, e, 0.3332996368408203f);
  q = fma(q, e, -0.4999990165233612f);
  return fma(e * e, q, e);
}

// log(1 + exp x), the identity above 20. A NaN stays one.
TRIFUSE_HD float softplus(float x) {
  const float e = exp2_fast(-kLog2e * fabsf(x));
  const float y = (x > 0.0f ? x : 0.0f) + log1p_unit(e);
  return x > 20.0f ? x : y;
}

// softplus and its derivative, which is 1 above 20.
TRIFUSE_HD float softplus_and_slope(float x, float& slope) {
  const float e = exp2_fast(-kLog2e * fabsf(x));
  const float y = (x > 0.0f ? x : 0.0f) + log1p_unit(e);
  const float s = (x > 0.0f ? 1.0f : e) * reciprocal_fast(1.0f + e);
  slope = x > 20.0f ? 1.0f : s;
  return x > 20.0f ? x : y;
}

}  // namespace trifuse
