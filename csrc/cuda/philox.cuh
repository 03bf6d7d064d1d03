// The Philox4x32-10 stream on CUDA: a function of a seed and a counter alone, the same bits as on every other backend.
// Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
#pragma once

#include "trifuse/cuda_platform.h"

namespace trifuse::cuda {
namespace {

// The words of the four columns from `column` on, a multiple of four, of a row.
TRIFUSE_DEVICE void philox_columns(uint32_t (&w)[4], uint64_t seed, uint64_t row, uint64_t column) {
  w[0] = uint32_t(column / 4);
  w[1] = 0;
  w[2] = uint32_t(row);
  w[3] = uint32_t(row >> 32);
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    const uint64_t first = uint64_t(w[0]) * 0xD2511F53u, second = uint64_t(w[2]) * 0xCD9E8D57u;
    w[0] = uint32_t(second >> 32) ^ w[1] ^ key0;
    w[1] = uint32_t(second);
    w[2] = uint32_t(first >> 32) ^ w[3] ^ key1;
    w[3] = uint32_t(first);
  }
}

}  // namespace
}  // namespace trifuse::cuda
