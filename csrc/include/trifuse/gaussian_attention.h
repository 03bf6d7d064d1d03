// Parameters and launch declarations of gaussian_attention: attention by distance, in a Gaussian window, or both.
#pragma once

#include "trifuse/types.h"

namespace trifuse {

// (batch, heads, rows, columns) wherever its elements lie; strides are in elements.
struct AttentionView {
  void* ptr = nullptr;
  int64_t batch = 0;
  int64_t head = 0;
  int64_t row = 0;
  int64_t column = 0;
};

enum class AttentionMask : int32_t { kNone, kBool, kAdded };

// The accumulation dtype ("acc") is float64 for float64 sequences and float32 otherwise. The logits are
//   -gamma |q - k|^2, or without gamma q.k * scale,   plus with sigma -(j - center)^2 / (2 sigma^2),   plus the mask.
// Query head h reads key head h / (heads / kv_heads). Packed sequences lie one after another in a batch of one, and
// positions count from the start of each.
struct GaussianAttentionParams {
  int64_t batch = 0, heads = 0, kv_heads = 0;
  int64_t queries = 0, keys = 0;  // of a batch item: L and S
  int64_t head_dim = 0, value_dim = 0;
  DType dtype = DType::kFloat32;  // q, k, v, out and their gradients
  double scale = 1;
  bool is_causal = false;
  bool normalized = true;

  AttentionView q, k, v;
  const void* gamma = nullptr;  // (heads) acc, or null
  AttentionView center, sigma;  // (batch, heads, queries) acc, `column` unused; sigma.ptr null: no window,
                                // center.ptr null: the query's own position
  AttentionView mask;           // (batch, heads, queries, keys)
  AttentionMask mask_kind = AttentionMask::kNone;
  DType mask_dtype = DType::kFloat32;  // of an added mask
  const bool* padding = nullptr;       // (batch, keys), true: the key takes no part; or null
  int64_t padding_batch = 0, padding_key = 0;

  const int64_t* cu_seqlens_q = nullptr;  // (num_seqs + 1), or null; batch is then 1
  const int64_t* cu_seqlens_k = nullptr;
  int64_t num_seqs = 0;

  AttentionView out;    // (batch, heads, queries, value_dim), contiguous
  void* lse = nullptr;  // (batch, heads, queries) acc, contiguous: log of the sum of the exponentials; -inf: no key
  void* lse_rest = nullptr;  // likewise: what lse was rounded by. exp(logit - lse) alone would be off by that factor
};

struct GaussianAttentionBwdParams : GaussianAttentionParams {  // out and lse are the forward pass's
  AttentionView dout;
  AttentionView dlse;  // (batch, heads, queries) acc, or null

  // Contiguous, shaped and typed as what they are gradients of.
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;
  void* dgamma = nullptr;   // (heads) acc, or null
  void* dcenter = nullptr;  // (batch, heads, queries) acc, or null
  void* dsigma = nullptr;   // likewise
};

namespace cpu {

void gaussian_attention_fwd(const GaussianAttentionParams& p, const Threads& threads);
void gaussian_attention_bwd(const GaussianAttentionBwdParams& p, const Threads& threads);

}  // namespace cpu
}  // namespace trifuse
