// The random words of lora_update's stochastic rounding, and the rounding: up with the probability of what is cut off.
#pragma once

#include "bfloat16.h"
#include "philox.h"
#include "trifuse/simd.h"

namespace trifuse::cpu {
namespace {
namespace update {

// v rounded down in size to a number of S after the low bits of a random word were added, as the bits of S. Half
// precision counts in steps of 2^-24 below 2^-14: there the word is added in 8192nds of a step.
template <class S>
TRIFUSE_INLINE Words random_bits(Vec<float> v, Words word) {
  const Words zero = {}, bits = (Words)v, magnitude = bits & 0x7fffffffu;
  const Words nan = (Words)(magnitude > 0x7f800000u);
  if constexpr (std::is_same_v<S, bf16>) {
    const Words rounded = (bits + (word & 0xffffu)) >> 16;
    return magnitude >= 0x7f800000u ? (bits >> 16) | (nan & 0x40u) : rounded;
  } else {
    const Vec<float> small = (Vec<float>)(magnitude < 0x38800000u ? magnitude : zero);
    const Words steps = (Words) __builtin_convertvector(small * splat(0x1p37f), IVec<float>);
    const Words whole = magnitude < 0x38800000u ? steps : magnitude - 0x38000000u;
    const Words rounded = (whole + (word & 0x1fffu)) >> 13;
    // Of 65536 and above: infinity.
    return ((bits >> 16) & 0x8000u) | (magnitude >= 0x47800000u ? zero + 0x7c00u : rounded) | (nan & 0x200u);
  }
}

template <class S>
TRIFUSE_INLINE void store_random(S* p, Vec<float> v, Words word) {
  const VecOf<float>::Half h = __builtin_convertvector(random_bits<S>(v, word), VecOf<float>::Half);
  __builtin_memcpy(p, &h, sizeof h);
}

TRIFUSE_INLINE Words lane_numbers() {
  Words lane;
  for (int i = 0; i < kWordLanes; ++i) lane[i] = uint32_t(i);
  return lane;
}

// The words of rows [row, row + 4) and of a vector of columns from `column` on, both multiples of four. Neighbouring
// columns have the words of one counter: lane i draws for row i % 4 and the columns from 4 (i / 4) on.
TRIFUSE_INLINE void draw(Words (&words)[4], uint64_t seed, int64_t row, int64_t column) {
  const Words lane = lane_numbers();
  words[0] = (lane >> 2) + uint32_t(column / 4);
  words[1] = Words{};
  words[2] = (lane & 3u) + uint32_t(row);  // no carry: row is a multiple of four
  words[3] = Words{} + uint32_t(uint64_t(row) >> 32);
  philox(words, seed);
  constexpr auto all = std::make_index_sequence<kWordLanes>();
  Vec<float> w[4], t[4];
  for (int i = 0; i < 4; ++i) w[i] = (Vec<float>)words[i];
  t[0] = exchange<float, 1, false>(w[0], w[1], all), t[1] = exchange<float, 1, true>(w[0], w[1], all);
  t[2] = exchange<float, 1, false>(w[2], w[3], all), t[3] = exchange<float, 1, true>(w[2], w[3], all);
  words[0] = (Words)exchange<float, 2, false>(t[0], t[2], all);
  words[1] = (Words)exchange<float, 2, false>(t[1], t[3], all);
  words[2] = (Words)exchange<float, 2, true>(t[0], t[2], all);
  words[3] = (Words)exchange<float, 2, true>(t[1], t[3], all);
}

// The same of a transposed weight, whose column and row these are: four rows have the words of one counter.
TRIFUSE_INLINE void draw_transposed(Words (&words)[4], uint64_t seed, int64_t row, int64_t column) {
  words[0] = Words{} + uint32_t(row / 4);
  words[1] = Words{};
  words[2] = lane_numbers() + uint32_t(column);  // no carry: column is a multiple of the lanes
  words[3] = Words{} + uint32_t(uint64_t(column) >> 32);
  philox(words, seed);
}

}  // namespace update
}  // namespace
}  // namespace trifuse::cpu
