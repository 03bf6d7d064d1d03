// The Philox4x32-10 stream that dropout masks come from: a function of a seed and a counter alone, so that every
// backend draws the same bits. Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
#pragma once

#include "trifuse/simd.h"

namespace trifuse::cpu {
namespace {

using Words = VecOf<float>::U;  // one 32-bit word per lane
constexpr int kWordLanes = kLanes<float>;

// Words in the lower halves of 64-bit lanes, whose upper halves mean nothing: a product of two words then needs no
// shuffle, and its upper word one shift.
typedef uint64_t WideWords __attribute__((vector_size(kVectorBytes)));
constexpr int kWideLanes = kWordLanes / 2;

TRIFUSE_INLINE WideWords product_of(WideWords a, uint32_t m) {
#if defined(__AVX512F__)
  return (WideWords)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (WideWords)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
  return (a & uint64_t(0xffffffff)) * uint64_t(m);
#endif
}

TRIFUSE_INLINE WideWords upper_words(WideWords a) {
#if defined(__AVX512F__)
  return (WideWords)_mm512_shuffle_epi32((__m512i)a, _MM_PERM_DDBB);  // a shift competes with the products for one port
#else
  return a >> 32;
#endif
}

// The keys of the ten rounds, in every lane.
struct PhiloxKeys {
  explicit PhiloxKeys(uint64_t seed) {
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
      first[round] = WideWords{} + uint64_t(key0);
      second[round] = WideWords{} + uint64_t(key1);
    }
  }
  WideWords first[10], second[10];
};

// Ten rounds on the counters w[0..3], which become the words.
TRIFUSE_INLINE void philox(WideWords (&w)[4], const PhiloxKeys& keys) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const WideWords even = product_of(w[0], 0xD2511F53u), odd = product_of(w[2], 0xCD9E8D57u);
    w[0] = upper_words(odd) ^ w[1] ^ keys.first[round];
    w[1] = odd;
    w[2] = upper_words(even) ^ w[3] ^ keys.second[round];
    w[3] = even;
  }
}
TRIFUSE_INLINE void philox(Words (&w)[4], uint64_t seed) {
  const PhiloxKeys keys(seed);
  WideWords even[4], odd[4];
  for (int i = 0; i < 4; ++i) even[i] = (WideWords)w[i], odd[i] = (WideWords)w[i] >> 32;
  philox(even, keys);
  philox(odd, keys);
  for (int i = 0; i < 4; ++i) w[i] = (Words)((even[i] & uint64_t(0xffffffff)) | odd[i] << 32);
}

// The words of the next 4 * kWideLanes columns of a row, column = 4 * lane + word; `column` is a multiple of that.
TRIFUSE_INLINE void philox_columns(WideWords (&w)[4], const PhiloxKeys& keys, uint64_t row, int64_t column) {
  WideWords lane;
  for (int i = 0; i < kWideLanes; ++i) lane[i] = uint64_t(i);
  w[0] = lane + uint64_t(column / 4);
  w[1] = WideWords{};
  w[2] = WideWords{} + row;
  w[3] = WideWords{} + (row >> 32);
  philox(w, keys);
}

// Bit 2 i of the result: whether word i is at least the threshold.
TRIFUSE_INLINE uint32_t at_least_bits(WideWords w, uint32_t threshold) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epu32_mask((__m512i)w, _mm512_set1_epi32(int(threshold))) & 0x5555u;
#elif defined(__AVX2__)
  const __m256i kept = _mm256_cmpeq_epi32(_mm256_max_epu32((__m256i)w, _mm256_set1_epi32(int(threshold))), (__m256i)w);
  return uint32_t(_mm256_movemask_ps((__m256)kept)) & 0x55u;
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWideLanes; ++i) bits |= uint32_t(uint32_t(w[i]) >= threshold) << 2 * i;
  return bits;
#endif
}

// Pair i of the lower 16 bits goes to bits 4 i and 4 i + 1.
TRIFUSE_INLINE uint64_t spread_pairs(uint32_t x) {
  x = (x | x << 8) & 0x00ff00ffu;
  x = (x | x << 4) & 0x0f0f0f0fu;
  return (x | x << 2) & 0x33333333u;
}

// bits[c / 64] bit c % 64: whether dropout keeps column `first` + c of a row; `first` is a multiple of 64.
inline void kept_columns(uint64_t* bits, uint64_t seed, uint64_t row, int64_t first, int64_t columns,
                         uint32_t threshold) {
  constexpr int step = 4 * kWideLanes;
  const PhiloxKeys keys(seed);
  for (int64_t c = 0; c < columns; c += 64, ++bits) {
    uint64_t kept = 0;
    for (int part = 0; part < 64 && c + part < columns; part += step) {
      WideWords w[4];
      philox_columns(w, keys, row, first + c + part);
      const uint32_t low = at_least_bits(w[0], threshold) | at_least_bits(w[1], threshold) << 1;
      const uint32_t high = at_least_bits(w[2], threshold) | at_least_bits(w[3], threshold) << 1;
      kept |= (spread_pairs(low) | spread_pairs(high) << 2) << part;
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
