// The Philox4x32-10 stream that dropout masks come from: a function of a seed and a counter alone, so that every
// backend draws the same bits. Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
#pragma once

#include "trifuse/simd.h"

namespace trifuse::cpu {
namespace {

using Words = VecOf<float>::U;  // one 32-bit word per lane
constexpr int kWordLanes = kLanes<float>;

// The upper and lower halves of a * m, lane by lane.
TRIFUSE_INLINE void multiply_wide(Words a, uint32_t m, Words& high, Words& low) {
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi64(m);
  const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
  high = (Words)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
  low = (Words)_mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi64x(m);
  const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
  high = (Words)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = (Words)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
#else
  for (int i = 0; i < kWordLanes; ++i) {
    const uint64_t product = uint64_t(a[i]) * m;
    high[i] = uint32_t(product >> 32);
    low[i] = uint32_t(product);
  }
#endif
}

// Ten rounds on the counters w[0..3], which become the words.
TRIFUSE_INLINE void philox(Words (&w)[4], uint64_t seed) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    Words high0, low0, high2, low2;
    multiply_wide(w[0], 0xD2511F53u, high0, low0);
    multiply_wide(w[2], 0xCD9E8D57u, high2, low2);
    w[0] = high2 ^ w[1] ^ (Words{} + key0);
    w[1] = low2;
    w[2] = high0 ^ w[3] ^ (Words{} + key1);
    w[3] = low0;
  }
}

// The words of the next 4 * kWordLanes columns of a row, column = 4 * lane + word; `column` is a multiple of that.
TRIFUSE_INLINE void philox_columns(Words (&w)[4], uint64_t seed, uint64_t row, int64_t column) {
  Words lane;
  for (int i = 0; i < kWordLanes; ++i) lane[i] = uint32_t(i);
  w[0] = lane + uint32_t(column / 4);
  w[1] = Words{};
  w[2] = Words{} + uint32_t(row);
  w[3] = Words{} + uint32_t(row >> 32);
  philox(w, seed);
}

// Bit i of the lower bits goes to bit 4 i.
TRIFUSE_INLINE uint64_t spread_by_4(uint64_t x) {
  x = (x | x << 24) & 0x000000ff000000ffull;
  x = (x | x << 12) & 0x000f000f000f000full;
  x = (x | x << 6) & 0x0303030303030303ull;
  return (x | x << 3) & 0x1111111111111111ull;
}

TRIFUSE_INLINE uint64_t at_least_bits(Words w, uint32_t threshold) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epu32_mask((__m512i)w, _mm512_set1_epi32(int(threshold)));
#elif defined(__AVX2__)
  const __m256i kept = _mm256_cmpeq_epi32(_mm256_max_epu32((__m256i)w, _mm256_set1_epi32(int(threshold))), (__m256i)w);
  return uint32_t(_mm256_movemask_ps((__m256)kept));
#else
  uint64_t bits = 0;
  for (int i = 0; i < kWordLanes; ++i) bits |= uint64_t(w[i] >= threshold) << i;
  return bits;
#endif
}

// bits[c / 64] bit c % 64: whether dropout keeps column `first` + c of a row; `first` is a multiple of 64.
inline void kept_columns(uint64_t* bits, uint64_t seed, uint64_t row, int64_t first, int64_t columns,
                         uint32_t threshold) {
  constexpr int step = 4 * kWordLanes;
  for (int64_t c = 0; c < columns; c += 64, ++bits) {
    uint64_t kept = 0;
    for (int part = 0; part < 64 && c + part < columns; part += step) {
      Words w[4];
      philox_columns(w, seed, row, first + c + part);
      uint64_t some = 0;
      for (int i = 0; i < 4; ++i) some |= spread_by_4(at_least_bits(w[i], threshold)) << i;
      kept |= some << part;
    }
    *bits = kept;
  }
}

// v where the lowest bits say so, else 0.
template <class T>
TRIFUSE_INLINE Vec<T> where_kept(Vec<T> v, uint64_t bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_mov_ps(__mmask16(bits), (__m512)v);
#endif
  IVec<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = typename std::conditional_t<sizeof(T) == 4, int32_t, int64_t>(1) << i;
  const IVec<T> chosen = ((lane & int32_t(bits & 0xffff)) != 0);
  return (Vec<T>)(chosen & (IVec<T>)v);
}

}  // namespace
}  // namespace trifuse::cpu
