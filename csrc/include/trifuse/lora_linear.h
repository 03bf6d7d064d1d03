// Parameters and launches of the passes that let a low-rank adapter ride along a matrix product:
// y = x W^T + bias + ((x~ A^T) o p) B^T, x~ = dropout(x). The product with W belongs to BLAS; y and dx are written here
// first and the product is added to them there. No torch, no CUDA header.
#pragma once

#include "trifuse/dora_linear.h"
#include "trifuse/types.h"

namespace trifuse {

// "acc" is float, double for double. Columns of every matrix are contiguous; `*_row` are strides in elements.
struct LoraAdapter {
  const void* A = nullptr;  // (rank, in)
  int64_t A_row = 0;
  const void* B = nullptr;  // (out, rank)
  int64_t B_row = 0;
  const void* p = nullptr;  // (rank,), acc, or null: all ones
  double scale = 1;         // times p
  int64_t rank = 0;         // ranks in use: the first of A and B
  int64_t first = 0;        // ranks from here on get a gradient
  void* dA = nullptr;       // (rank, in), rows [first, rank) are written; or null: not asked for
  int64_t dA_row = 0;
  void* dB = nullptr;  // (out, rank), columns [first, rank) are written; or null
  int64_t dB_row = 0;
  int64_t begin = 0;  // its rows: [begin, end) of `order`
  int64_t end = 0;
};

struct LoraParams {
  int64_t rows = 0;                       // M
  int64_t in = 0;                         // K
  int64_t out = 0;                        // N
  DType dtype = DType::kFloat32;          // of x, bias, y, dy and dx
  DType adapter_dtype = DType::kFloat32;  // of A, B, dA and dB: dtype, or acc
  const void* x = nullptr;                // (rows, in)
  int64_t x_row = 0;
  const void* bias = nullptr;  // (out,) or null
  void* y = nullptr;           // (rows, out): written as bias + (S o p) B^T
  int64_t y_row = 0;
  const void* dy = nullptr;  // (rows, out)
  int64_t dy_row = 0;
  void* dx = nullptr;  // (rows, in): written as ((Z o p) A) o mask / (1 - rate); or null: not asked for
  int64_t dx_row = 0;
  void* S = nullptr;  // (rows, rank), acc: x~ A^T
  int64_t S_row = 0;
  void* Z = nullptr;  // (rows, rank), acc: dy B
  int64_t Z_row = 0;

  // Dropout: an element is kept if its word of the Philox stream is at least the threshold.
  const int64_t* seed = nullptr;  // on the device; or null: no dropout
  uint32_t threshold = 0;
  double keep_scale = 1;  // 1 / (1 - rate)

  const int64_t* order = nullptr;         // (rows,) rows sorted by adapter, or null: as they are
  const LoraAdapter* adapters = nullptr;  // on the host
  int64_t n_adapters = 0;                 // CUDA takes one, with all rows
  int64_t max_rank = 0;                   // the largest rank of an adapter

  // CPU, one adapter: backward_out first scales dy as this says, and takes the result, its dplain, for dy.
  const DoraParams* dora = nullptr;
};

namespace cpu {

void lora_down(const LoraParams& p, const Threads& threads);          // x, A -> S
void lora_up(const LoraParams& p, const Threads& threads);            // S, B, bias -> y
void lora_backward_out(const LoraParams& p, const Threads& threads);  // dy, S, B -> Z, dB
void lora_backward_in(const LoraParams& p, const Threads& threads);   // x, Z, A -> dA, dx

}  // namespace cpu

namespace cuda {

// `scratch` is what lora_scratch_bytes asks for: partial sums of the split reductions.
int64_t lora_scratch_bytes(const LoraParams& p);
Error lora_down(const LoraParams& p, void* scratch, Stream stream);
Error lora_up(const LoraParams& p, Stream stream);
Error lora_backward_out(const LoraParams& p, void* scratch, Stream stream);
Error lora_backward_in(const LoraParams& p, void* scratch, Stream stream);

}  // namespace cuda
}  // namespace trifuse
