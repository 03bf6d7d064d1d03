// dots = dropout(source) factor^T: S = x~ A^T, and Z = dy B where dB is not asked for.
#pragma once

#include "lora_linear_common.cuh"

namespace trifuse::cuda::lora {

constexpr int64_t kDotsBytes = int64_t(kRanks) * kLine<1> * int64_t(sizeof(float));

// A block has kTile rows, a piece of the columns and a group of ranks; a warp kRows of the rows.
template <typename S>
__global__ void __launch_bounds__(kThreads, 2) lora_dots_kernel(const __grid_constant__ Args p) {
  TRIFUSE_SHARED_MEMORY(memory);
  float* const lines = reinterpret_cast<float*>(memory);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int rank = p.base + int(blockIdx.x) % p.groups * kRanks, block = int(blockIdx.x) / p.groups;
  const int piece = block % p.pieces;
  const int64_t row = int64_t(block / p.pieces) * kTile + warp * kRows;
  const int begin = piece * p.piece_columns;
  const int end = begin + p.piece_columns < p.columns ? begin + p.piece_columns : p.columns;
  const int rows = left(row, p.rows, kRows);  // none or fewer: the warp has nothing to do
  const S* from = static_cast<const S*>(p.source) + row * p.source_row + begin + lane * kQuad;
  const uint64_t seed = p.seed != nullptr ? uint64_t(*p.seed) : 0;

  float sums[kRows * kRanks];
#pragma unroll
  for (int i = 0; i < kRows * kRanks; ++i) sums[i] = 0.0f;
#pragma unroll 1
  for (int strip = begin; strip < end; strip += kStrip, from += kStrip) {
    const int columns = left(strip, end, kStrip) - lane * kQuad;
    Word<S> x[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) x[i] = read(p, from + i * p.source_row, i < rows ? columns : 0);
    __syncthreads();
    stage<S, 1>(p, rank, kRanks, strip, lines);
    Kept<kRows, 1> kept;
    if (p.seed != nullptr && rows > 0) kept.draw(p, seed, row, strip + lane * kQuad);
    __syncthreads();
    if (rows <= 0) continue;
    float v[kRows][kQuad];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Quad<S> quad = detail::bit_cast<Quad<S>>(x[i]);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) v[i][j] = kept(i, 0, j, to_float(quad.v[j]));
    }
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      float f[kQuad];
      fetch(lines + r * kLine<1> + lane * kQuad, f);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) sums[i * kRanks + r] = fma(v[i][j], f[j], sums[i * kRanks + r]);
      }
    }
  }
  if (rows <= 0) return;  // the whole warp
  share_sums(sums, lane);
  const int own_rank = rank + lane % 4 * 2;
  if (lane / 4 >= rows) return;
  float* const to = p.dots + (piece * p.rows + row + lane / 4) * p.dots_row + own_rank;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (own_rank + k < p.ranks) to[k] = sums[k] * p.keep_scale;
  }
}

}  // namespace trifuse::cuda::lora
