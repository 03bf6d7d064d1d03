// out = bias + (coefficients * scale * p) factor, or dropout of that: y = bias + (S o p) B^T, and
// dx = ((Z o p) A) o mask / (1 - rate).
#pragma once

#include "lora_linear_common.cuh"

namespace trifuse::cuda::lora {

// Lines of up to kMostRanks ranks of the factor, then every warp's coefficients (ranks, kRows).
template <typename S>
int64_t expand_bytes(int ranks) {
  const int64_t some = ranks < kMostRanks ? ranks : kMostRanks;
  return some * (kLine<kWide<S>> + kTile) * int64_t(sizeof(float));
}

// A block has as many strips as a warp takes at once and a split of the rows, kTile of them at a time; a warp kRows of
// these.
template <typename S>
__global__ void __launch_bounds__(kThreads, 2) lora_expand_kernel(const __grid_constant__ Args p) {
  constexpr int kStrips = kWide<S>;
  TRIFUSE_SHARED_MEMORY(memory);
  float* const lines = reinterpret_cast<float*>(memory);
  const int most = p.ranks < kMostRanks ? p.ranks : kMostRanks;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  float* const coefficients = lines + most * kLine<kStrips> + warp * most * kRows;
  const int strip = int(blockIdx.x) % p.pieces * p.piece_columns;
  const int columns = left(strip, p.columns, kStrips * kStrip) - lane * kQuad;
  const int64_t first_row = int64_t(int(blockIdx.x) / p.pieces) * p.split_rows;
  const int64_t last_row = first_row + p.split_rows < p.rows ? first_row + p.split_rows : p.rows;
  const uint64_t seed = p.seed != nullptr ? uint64_t(*p.seed) : 0;

#pragma unroll 1
  for (int64_t tile = first_row; tile < last_row; tile += kTile) {
    const int64_t row = tile + warp * kRows;
    const int rows = left(row, last_row, kRows);
    float y[kRows][kStrips][kQuad];
#pragma unroll
    for (int h = 0; h < kStrips; ++h) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const bool some = p.bias != nullptr && h * kStrip + j < columns;
        const S* const from = static_cast<const S*>(p.bias) + strip + lane * kQuad + h * kStrip + j;
        const float bias = some ? to_float(*from) : 0.0f;
#pragma unroll
        for (int i = 0; i < kRows; ++i) y[i][h][j] = bias;
      }
    }
#pragma unroll 1
    for (int rank = 0; rank < p.ranks; rank += most) {
      const int count = p.ranks - rank < most ? p.ranks - rank : most;
      if (tile == first_row || p.ranks > most) {  // else they are there
        __syncthreads();
        stage<S, kStrips>(p, rank, count, strip, lines);
        __syncthreads();
      }
      __syncwarp();
#pragma unroll 1
      for (int k = lane; k < kRows * count; k += 32) {
        const int i = k / count, r = k % count;
        coefficients[r * kRows + i] =
            i < rows ? p.coefficients[(row + i) * p.coefficients_row + rank + r] * scale_of(p, rank + r) : 0.0f;
      }
      __syncwarp();
#pragma unroll 1
      for (int r = 0; r < count; ++r) {
        float c[kRows];
        fetch(coefficients + r * kRows, c);
#pragma unroll
        for (int h = 0; h < kStrips; ++h) {
          float f[kQuad];
          fetch(lines + r * kLine<kStrips> + h * kStrip + lane * kQuad, f);
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int j = 0; j < kQuad; ++j) y[i][h][j] = fma(c[i], f[j], y[i][h][j]);
          }
        }
      }
    }
    Kept<kRows, kStrips> kept;
    if (p.seed != nullptr && rows > 0) kept.draw(p, seed, row, strip + lane * kQuad);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) break;
      S* const to = static_cast<S*>(p.out) + (row + i) * p.out_row + strip + lane * kQuad;
#pragma unroll
      for (int h = 0; h < kStrips; ++h) {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) y[i][h][j] = kept(i, h, j, y[i][h][j] * p.keep_scale);
        write(p, to + h * kStrip, columns - h * kStrip, y[i][h]);
      }
    }
  }
}

}  // namespace trifuse::cuda::lora
