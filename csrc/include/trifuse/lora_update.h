// Parameters and launches of lora_update: a low-rank update of a weight with one rounding,
// out = round(weight + scale * B diag(p) A). No torch, no CUDA header.
#pragma once

#include "trifuse/types.h"

namespace trifuse {

// "acc" is float, double for double. Columns of weight and out are contiguous; where those of the weight are not and
// its rows are, it is updated as its transpose, whose A is B^T and whose B is A^T: strides of A and B are free.
struct LoraUpdateParams {
  int64_t rows = 0;                       // N
  int64_t columns = 0;                    // K
  int64_t rank = 0;                       // ranks in use: the first of A and B
  DType dtype = DType::kFloat32;          // of weight and out
  DType adapter_dtype = DType::kFloat32;  // of A and B: dtype, or acc
  const void* weight = nullptr;           // (rows, columns)
  int64_t weight_row = 0;
  void* out = nullptr;  // (rows, columns): apart from weight, or weight itself with the same stride
  int64_t out_row = 0;
  const void* A = nullptr;  // (rank, columns)
  int64_t A_row = 0;
  int64_t A_column = 1;
  const void* B = nullptr;  // (rows, rank)
  int64_t B_row = 0;
  int64_t B_column = 1;
  const void* p = nullptr;  // (rank,) contiguous, acc, or null: all ones
  double scale = 1;         // times p

  // Stochastic rounding where there is a seed (on the device): the element of row n and column k has word k % 4 of the
  // Philox stream with the seed as key and the counter (k / 4, 0, n low, n high).
  const int64_t* seed = nullptr;
  bool transposed = false;  // rows and columns here are columns and rows there

  // Or null: two sums of squares over the elements, of the update, and of what rounding lost of it.
  double* sums = nullptr;
};

namespace cpu {

void lora_update(const LoraUpdateParams& p, const Threads& threads);

}  // namespace cpu

namespace cuda {

int64_t lora_update_scratch_bytes(const LoraUpdateParams& p);
Error lora_update(const LoraUpdateParams& p, void* scratch, Stream stream);

}  // namespace cuda
}  // namespace trifuse
