// Parameters and launches of lora_adamw: one step of AdamW of some ranks of many parameters. No torch, no CUDA header.
#pragma once

#include "trifuse/types.h"

namespace trifuse {

// A contiguous parameter (outer, ranks, inner), of which the ranks [first, last) are stepped. "acc" is float, double
// for double.
struct LoraAdamwTensor {
  void* param = nullptr;
  const void* grad = nullptr;  // in the dtype of param
  void* exp_avg = nullptr;     // acc, as exp_avg_sq
  void* exp_avg_sq = nullptr;
  float* steps = nullptr;  // (ranks,)
  int64_t outer = 0;
  int64_t ranks = 0;
  int64_t inner = 0;
  int64_t first = 0;
  int64_t last = 0;
  DType dtype = DType::kFloat32;
  double lr = 0;
};

struct LoraAdamwParams {
  const LoraAdamwTensor* tensors = nullptr;  // on the host
  int64_t count = 0;
  double beta1 = 0;
  double beta2 = 0;
  double eps = 0;
  double weight_decay = 0;
  bool maximize = false;
};

namespace cpu {

void lora_adamw(const LoraAdamwParams& p, const Threads& threads);

}  // namespace cpu

namespace cuda {

// `scratch`: two numbers for every active rank.
int64_t lora_adamw_scratch_bytes(const LoraAdamwParams& p);
Error lora_adamw(const LoraAdamwParams& p, void* scratch, Stream stream);

}  // namespace cuda
}  // namespace trifuse
