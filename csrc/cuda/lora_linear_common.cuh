// What the passes of a low-rank adapter share on a GPU: arguments, who has which elements, how they are read, and the
// bits of dropout.
//
// Every pass walks over a matrix of many columns, x, y or their gradients, in strips: a lane of a warp has four columns
// of a row, and in some passes four more, 128 further on. Each multiplies it with a factor of the adapter (A, or B
// transposed), which a block keeps in shared memory. A thread has rows, columns and ranks enough for what it fetches
// from there to be used several times. Half precision is widened in registers. Sums over what several blocks have go to
// scratch memory, to be added in the order of the blocks; how many there are depends on the sizes alone.
#pragma once

#include <type_traits>

#include "trifuse/cuda_platform.h"
#include "trifuse/lora_linear.h"

namespace trifuse::cuda::lora {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kQuad = 4, kStrip = 32 * kQuad;
constexpr int kThreads = 256, kWarps = kThreads / 32;  // `gather` has half as many
constexpr int kRows = 8;                               // that a warp has at once in `dots` and `expand`
constexpr int kTile = kWarps * kRows;
constexpr int kRanks = 8;       // of a group; `gather` has groups of four too
constexpr int kMostRanks = 64;  // that `expand` keeps in shared memory
// Strips that a warp has at once where there are registers for them, so that a row's 512 bytes are together.
template <typename S>
constexpr int kWide = sizeof(S) == 2 ? 2 : 1;
// A rank's row in shared memory: four more columns, so that the ranks of one lie in different banks.
template <int kStrips>
constexpr int kLine = kStrips * kStrip + 4;

// A factor as (ranks, columns), in the dtype of x if `narrow`, else float32.
struct Factor {
  const void* ptr;
  int64_t rank, column;  // strides
  bool narrow;
};

struct Args {
  int64_t rows;
  int columns, ranks;
  int base, groups;           // the first rank, and groups of ranks from there on
  int pieces, piece_columns;  // of the columns, a block has one
  int splits, split_rows;     // of the rows, a block has one
  const void* source;         // (rows, columns), what is read
  int64_t source_row;
  bool vectors;  // four elements of source, or of out, may be accessed at once
  Factor factor;
  const float* coefficients;  // (rows, ranks): S or Z; times scale * p
  int64_t coefficients_row;
  const float* p;  // or null
  float scale;
  const int64_t* seed;  // or null: no dropout
  uint32_t threshold;
  float keep_scale;  // 1 without dropout
  float* dots;       // (pieces, rows, ranks)
  int64_t dots_row;
  float* gathered;   // (splits, ranks, columns)
  const void* bias;  // (columns,) or null
  void* out;         // (rows, columns)
  int64_t out_row;
};

template <typename S>
struct alignas(kQuad * sizeof(S)) Quad {
  S v[kQuad];
};
// The same as registers have it, two elements of half precision in one.
template <typename S>
using Word = std::conditional_t<sizeof(S) == 4, float4, float2>;

// Four columns of a row, of which `count` are there; zeros elsewhere.
template <typename S>
TRIFUSE_DEVICE Word<S> read(const Args& p, const S* from, int count) {
  if (p.vectors && count >= kQuad) return *reinterpret_cast<const Word<S>*>(from);
  if constexpr (sizeof(S) == 2) {
    uint64_t bits = 0;
#pragma unroll 1  // or registers are set aside for what is rare
    for (int j = kQuad - 1; j >= 0; --j) bits = bits << 16 | (j < count ? from[j].bits : 0);
    return detail::bit_cast<Word<S>>(bits);
  } else {
    Quad<S> quad;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) quad.v[j] = j < count ? from[j] : 0.0f;
    return detail::bit_cast<Word<S>>(quad);
  }
}

template <typename S>
TRIFUSE_DEVICE void write(const Args& p, S* to, int count, const float (&v)[kQuad]) {
  Quad<S> quad;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) quad.v[j] = from_float<S>(v[j]);
  if (p.vectors && count >= kQuad) {
    *reinterpret_cast<Word<S>*>(to) = detail::bit_cast<Word<S>>(quad);
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if (j < count) to[j] = quad.v[j];
    }
  }
}

// How many of `most` there are from `begin` to `end`.
template <typename T>
TRIFUSE_DEVICE int left(T begin, T end, int most) {
  return end - begin < most ? int(end - begin) : most;
}

// Ranks [rank, rank + count) of the factor at some strips of columns, as `count` lines; zeros outside. By the whole
// block.
template <typename S, int kStrips>
TRIFUSE_DEVICE void stage(const Args& p, int rank, int count, int column, float* lines) {
  constexpr int kColumns = kStrips * kStrip;
  const int ranks = left(rank, p.ranks, count), columns = left(column, p.columns, kColumns);
  const int64_t begin = rank * p.factor.rank + column * p.factor.column;
  const bool along = p.factor.column == 1;
#pragma unroll 4
  for (int i = opaque(int(threadIdx.x)); i < count * kColumns; i += int(blockDim.x)) {
    const int r = along ? i / kColumns : i % count, c = along ? i % kColumns : i / count;
    float value = 0.0f;
    if (r < ranks && c < columns) {
      const int64_t at = begin + r * p.factor.rank + c * p.factor.column;
      value = p.factor.narrow ? to_float(static_cast<const S*>(p.factor.ptr)[at])
                              : static_cast<const float*>(p.factor.ptr)[at];
    }
    lines[r * kLine<kStrips> + c] = value;
  }
}

// What S and Z of a rank are multiplied with.
TRIFUSE_DEVICE float scale_of(const Args& p, int rank) {
  return rank < p.ranks ? p.scale * (p.p != nullptr ? p.p[rank] : 1.0f) : 0.0f;
}
template <int kCount>
TRIFUSE_DEVICE void fetch(const float* from, float (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 some = *reinterpret_cast<const float4*>(from + i);
    to[i] = some.x, to[i + 1] = some.y, to[i + 2] = some.z, to[i + 3] = some.w;
  }
}

// Bit j: whether dropout keeps column + j of a row, four columns from a multiple of four. Philox4x32-10, Salmon et al.,
// "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
TRIFUSE_DEVICE unsigned kept_columns(uint64_t seed, uint64_t row, int column, uint32_t threshold) {
  uint32_t w0 = uint32_t(column / 4), w1 = 0, w2 = uint32_t(row), w3 = uint32_t(row >> 32);
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    const uint64_t first = uint64_t(w0) * 0xD2511F53u, second = uint64_t(w2) * 0xCD9E8D57u;
    w0 = uint32_t(second >> 32) ^ w1 ^ key0;
    w1 = uint32_t(second);
    w2 = uint32_t(first >> 32) ^ w3 ^ key1;
    w3 = uint32_t(first);
  }
  return unsigned(w0 >= threshold) | unsigned(w1 >= threshold) << 1 | unsigned(w2 >= threshold) << 2 |
         unsigned(w3 >= threshold) << 3;
}

// Which of a lane's elements dropout keeps, a bit each; all without a seed. Drawn in a loop, which needs few registers,
// while the elements themselves are on their way.
template <int kCount, int kStrips>
struct Kept {
  static_assert(kCount * kStrips * kQuad <= 64, "a bit each");
  using Bits = std::conditional_t<kCount * kStrips * kQuad <= 32, uint32_t, uint64_t>;
  Bits bits = ~Bits(0);

  TRIFUSE_DEVICE void draw(const Args& p, uint64_t seed, int64_t row, int column) {
#pragma unroll 1
    for (int i = kCount - 1; i >= 0; --i) {
#pragma unroll
      for (int h = kStrips - 1; h >= 0; --h) {
        bits = bits << kQuad | kept_columns(seed, uint64_t(row + i), column + h * kStrip, p.threshold);
      }
    }
  }
  TRIFUSE_DEVICE float operator()(int i, int h, int j, float value) const {
    return bits >> ((i * kStrips + h) * kQuad + j) & 1 ? value : 0.0f;
  }
};

// Adds v over the lanes of a warp, each value in one order: lane l gets the sums of the kCount / 32 values from
// l * kCount / 32 on, at the begin of v; of fewer than 32 each goes to as many neighbours.
template <int kBy = 16, int kHalf = -1, int kCount>
TRIFUSE_DEVICE void share_sums(float (&v)[kCount], int lane) {
  constexpr int kKept = kHalf < 0 ? kCount / 2 : kHalf;
  if constexpr (kKept == 0) {
    v[0] += __shfl_xor_sync(kFullWarp, v[0], kBy);
  } else {
    const bool upper = (lane & kBy) != 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const float given = upper ? v[i] : v[i + kKept], own = upper ? v[i + kKept] : v[i];
      v[i] = own + __shfl_xor_sync(kFullWarp, given, kBy);
    }
  }
  if constexpr (kBy > 1) share_sums<kBy / 2, kKept / 2>(v, lane);
}

}  // namespace trifuse::cuda::lora
