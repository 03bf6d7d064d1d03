// gathered = (coefficients * scale * p)^T dropout(source): dA = (Z o p)^T x~, and dB^T = (S o p)^T dy; of the latter
// the same read of dy also gives Z = dy B.
#pragma once

#include "lora_linear_common.cuh"

namespace trifuse::cuda::lora {

constexpr int kGatherThreads = 128, kGatherWarps = kGatherThreads / 32;
constexpr int kAtOnce = 2;  // ranks whose sums meet in shared memory
constexpr int kLines = kGatherWarps * kAtOnce;

// Lines of the factor, and of the warps' sums when there are all; then every warp's coefficients.
template <typename S>
constexpr int64_t kGatherBytes = int64_t(kLines * kLine<kWide<S>> + kGatherWarps * 32) * int64_t(sizeof(float));

// A block has a piece of the columns, a split of the rows and a group of ranks; a warp takes every fourth set of rows,
// a row and a rank of the set for each lane. With dots (without dropout) Z is added up over the strips of the piece, by
// the thread that stores it.
template <typename S, int kGroup, bool kDots>
__global__ void __launch_bounds__(kGatherThreads, 3) lora_gather_kernel(const __grid_constant__ Args p) {
  constexpr int kSet = 4, kParts = kGroup / 4, kStrips = kWide<S>;
  static_assert(kGroup <= kLines, "the factor has room where the warps' sums have");
  TRIFUSE_SHARED_MEMORY(memory);
  float* const lines = reinterpret_cast<float*>(memory);
  // The warp's number from one lane: what is computed from it is seen to be the same in all of them.
  const int lane = int(threadIdx.x) % 32, warp = __shfl_sync(kFullWarp, int(threadIdx.x) / 32, 0);
  float* const coefficients = lines + kLines * kLine<kStrips> + warp * 32;  // (ranks, rows of the set)
  const int rank = p.base + int(blockIdx.x) % p.groups * kGroup, block = int(blockIdx.x) / p.groups;
  const int piece = block % p.pieces, split = block / p.pieces, own_row = lane / 8;
  const int own_part = lane % kParts, own_rank = own_part * 4 + lane / 2 % 4;
  const int64_t first_row = int64_t(split) * p.split_rows;
  const int begin = piece * p.piece_columns;
  const int rows = left(first_row, p.rows, p.split_rows);
  const bool ranked = rank + own_rank < p.ranks;
  const uint64_t seed = p.seed != nullptr ? uint64_t(*p.seed) : 0;

#pragma unroll 1
  for (int strip = begin; strip < begin + p.piece_columns && strip < p.columns; strip += kStrips * kStrip) {
    const int columns = left(strip, p.columns, kStrips * kStrip) - lane * kQuad;
    if constexpr (kDots) {
      stage<S, kStrips>(p, rank, kGroup, strip, lines);
      __syncthreads();
    }
    float sums[kGroup][kStrips * kQuad];
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
#pragma unroll
      for (int j = 0; j < kStrips * kQuad; ++j) sums[r][j] = 0.0f;
    }
    const S* from = static_cast<const S*>(p.source) + first_row * p.source_row + strip + lane * kQuad;
#pragma unroll 1
    for (int row = warp * kSet; row < rows; row += kGatherWarps * kSet) {
      Word<S> x[kSet][kStrips];
#pragma unroll
      for (int i = 0; i < kSet; ++i) {
        const S* const at = from + (row + i) * p.source_row;
#pragma unroll
        for (int h = 0; h < kStrips; ++h) {
          x[i][h] = read(p, at + h * kStrip, row + i < rows ? columns - h * kStrip : 0);
        }
      }
      const bool mine = ranked && row + own_row < rows;
      coefficients[own_rank * kSet + own_row] =
          mine ? p.coefficients[(first_row + row + own_row) * p.coefficients_row + rank + own_rank] *
                     scale_of(p, rank + own_rank)
               : 0.0f;
      Kept<kSet, kStrips> kept;
      if (!kDots && p.seed != nullptr) kept.draw(p, seed, first_row + row, strip + lane * kQuad);
      float own_dot = 0.0f;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        float dots[4 * kSet];
#pragma unroll
        for (int i = 0; i < 4 * kSet; ++i) dots[i] = 0.0f;
#pragma unroll
        for (int h = 0; h < kStrips; ++h) {
          // Once, to see the coefficients; again, lest what is fetched be fetched too early, and spill.
          __syncwarp();
          float v[kSet][kQuad];
#pragma unroll
          for (int i = 0; i < kSet; ++i) {
            const Quad<S> quad = detail::bit_cast<Quad<S>>(x[i][h]);
#pragma unroll
            for (int j = 0; j < kQuad; ++j) {
              v[i][j] = to_float(quad.v[j]);
              if constexpr (!kDots) v[i][j] = kept(i, h, j, v[i][j]);
            }
          }
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int r = part * 4 + k;
            float c[kSet];
            fetch(coefficients + r * kSet, c);
#pragma unroll
            for (int i = 0; i < kSet; ++i) {
#pragma unroll
              for (int j = 0; j < kQuad; ++j) {
                sums[r][h * kQuad + j] = fma(c[i], v[i][j], sums[r][h * kQuad + j]);
              }
            }
            if constexpr (kDots) {
              float f[kQuad];
              fetch(lines + r * kLine<kStrips> + h * kStrip + lane * kQuad, f);
#pragma unroll
              for (int i = 0; i < kSet; ++i) {
#pragma unroll
                for (int j = 0; j < kQuad; ++j) dots[i * 4 + k] = fma(v[i][j], f[j], dots[i * 4 + k]);
              }
            }
          }
        }
        if constexpr (kDots) {
          share_sums(dots, lane);
          if (part == own_part) own_dot = dots[0];
        }
      }
      if constexpr (kDots) {
        if (mine && (kParts == 2 || lane % 2 == 0)) {
          float* const to = p.dots + (piece * p.rows + first_row + row + own_row) * p.dots_row + rank + own_rank;
          *to = strip == begin ? own_dot : *to + own_dot;
        }
      }
      __syncwarp();
    }

    // The warps' sums, added in their order. What follows from the thread is found out again, not kept all along.
    float* const mine = lines + opaque(warp) * kAtOnce * kLine<kStrips> + opaque(lane) * kQuad;
#pragma unroll
    for (int r = 0; r < kGroup; r += kAtOnce) {
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        float* const line = mine + k * kLine<kStrips>;
#pragma unroll
        for (int h = 0; h < kStrips; ++h) {
          const float* const four = sums[r + k] + h * kQuad;
          *reinterpret_cast<float4*>(line + h * kStrip) = make_float4(four[0], four[1], four[2], four[3]);
        }
      }
      __syncthreads();
#pragma unroll 1
      for (int i = opaque(int(threadIdx.x)); i < kAtOnce * kStrips * kStrip; i += kGatherThreads) {
        const int k = i / (kStrips * kStrip), c = i % (kStrips * kStrip);
        if (rank + r + k >= p.ranks || strip + c >= p.columns) continue;
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < kGatherWarps; ++w) total += lines[(w * kAtOnce + k) * kLine<kStrips> + c];
        p.gathered[(int64_t(split) * p.ranks + rank + r + k) * p.columns + strip + c] = total * p.keep_scale;
      }
    }
    __syncthreads();
  }
}

}  // namespace trifuse::cuda::lora
