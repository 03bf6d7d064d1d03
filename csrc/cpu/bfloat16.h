// Loads and stores of a vector of bfloat16 where conversions are the bottleneck: on AVX-512 one shuffle each way, where
// widening or narrowing and shifting are two or three operations on the same few ports. Elsewhere as in simd.h.
#pragma once

#include "trifuse/simd.h"

namespace trifuse::cpu {
namespace {

#if defined(__AVX512F__)
// Sixteen words as the upper halves of numbers.
TRIFUSE_INLINE __m512 words_up(__m256i words) {
  typedef int16_t W __attribute__((vector_size(64)));
  const W from = {0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  return (__m512)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, (__m512i)from, _mm512_castsi256_si512(words));
}
// The upper halves of sixteen numbers, rounded to nearest even.
TRIFUSE_INLINE __m256i rounded_words(__m512 v) {
  typedef int16_t W __attribute__((vector_size(64)));
  const W from = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                  0, 0, 0, 0, 0, 0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0};
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));  // what a NaN becomes
  const __m512i rounded = _mm512_mask_add_epi32(quiet, _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), bits, half);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16((__m512i)from, rounded));
}
#endif

template <class T, class S>
TRIFUSE_INLINE Vec<T> load_sequence(const S* p) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, bf16>) {
    __m256i words;
    __builtin_memcpy(&words, p, sizeof words);
    return (Vec<T>)words_up(words);
  }
#endif
  return load_as<T, S>(p);
}
template <class S, class T>
TRIFUSE_INLINE void store_sequence(S* p, Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, bf16>) {
    const __m256i words = rounded_words((__m512)v);
    __builtin_memcpy(p, &words, sizeof words);
    return;
  }
#endif
  store_as<T, S>(p, v);
}

}  // namespace
}  // namespace trifuse::cpu
