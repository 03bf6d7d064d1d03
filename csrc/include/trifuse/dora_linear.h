// Parameters and launches of what dora_linear adds to lora_linear: every column of the output has a factor. No torch,
// no CUDA header.
#pragma once

#include "trifuse/types.h"

namespace trifuse {

// Matrices are (rows, columns), contiguous; "acc" is float, double for double.
struct DoraParams {
  int64_t rows = 0;
  int64_t columns = 0;
  DType dtype = DType::kFloat32;  // of every matrix and of bias
  const void* plain = nullptr;    // what is scaled
  const void* factors = nullptr;  // (columns,), acc
  const void* bias = nullptr;     // (columns,), or null
  void* y = nullptr;              // factors * plain + bias
  const void* dy = nullptr;       // its gradient
  void* dplain = nullptr;         // factors * dy
  void* dfactors = nullptr;       // (columns,), acc: the sums of dy * plain; or null: not asked for
};

// The norm of every row of W + (B o scale p) A.
struct DoraNormParams {
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t rank = 0;
  DType dtype = DType::kFloat32;          // of weight
  DType adapter_dtype = DType::kFloat32;  // of A and B: dtype, or acc
  const void* weight = nullptr;           // (rows, columns)
  int64_t weight_row = 0;
  const void* B = nullptr;  // (rows, rank)
  int64_t B_row = 0;
  const void* p = nullptr;  // (rank,), acc, or null: all ones
  double scale = 1;
  const void* A = nullptr;  // (rank, columns) in the dtype of B
  int64_t A_row = 0;
  void* norm = nullptr;  // (rows,), acc
};

namespace cpu {

void dora_norm(const DoraNormParams& p, const Threads& threads);
void dora_scale(const DoraParams& p, const Threads& threads);           // plain, factors, bias -> y
void dora_scale_backward(const DoraParams& p, const Threads& threads);  // dy, plain, factors -> dplain, dfactors

}  // namespace cpu
}  // namespace trifuse
