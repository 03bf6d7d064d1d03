// Parameters and launches of gmm_attention_step: values summed with the density of a mixture of Gaussians at their
// positions. No torch, no CUDA header.
#pragma once

#include "trifuse/types.h"

namespace trifuse {

// A (batch, components) tensor of the accumulation dtype; strides are in elements.
struct MixtureView {
  const void* ptr = nullptr;
  int64_t batch = 0;
  int64_t component = 0;
};

// What the forward and the backward pass share. "acc" is float, double for double.
struct GmmAttentionShape {
  int64_t batch = 0;
  int64_t length = 0;
  int64_t width = 0;
  int64_t components = 0;
  DType dtype = DType::kFloat32;  // of values, context and their gradients
  SeqView values;                 // (batch, length, width): dim is the stride of the width
  MixtureView weight, delta, sigma;
  const bool* padding = nullptr;  // (batch, length), true = padding; or null
  int64_t padding_batch = 0;
  int64_t padding_time = 0;
};

struct GmmAttentionParams : GmmAttentionShape {
  MixtureView mean;
  void* context = nullptr;    // (batch, width)
  void* mean_new = nullptr;   // (batch, components), acc
  void* alignment = nullptr;  // (batch, length), acc
};

// Gradients that come in are contiguous, or null where there is none.
struct GmmAttentionBwdParams : GmmAttentionShape {
  const void* mean_new = nullptr;
  const void* alignment = nullptr;
  const void* dcontext = nullptr;
  const void* dmean_new = nullptr;
  const void* dalignment = nullptr;
  void* dvalues = nullptr;  // (batch, length, width), or null: not asked for
  void* dweight = nullptr;  // (batch, components), acc, as the three below
  void* ddelta = nullptr;
  void* dsigma = nullptr;
  void* dmean = nullptr;
};

namespace cpu {

void gmm_attention_step_fwd(const GmmAttentionParams& p, const Threads& threads);
void gmm_attention_step_bwd(const GmmAttentionBwdParams& p, const Threads& threads);

}  // namespace cpu
}  // namespace trifuse
