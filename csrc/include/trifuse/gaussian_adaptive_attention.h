// Parameters and launches of gaussian_adaptive_attention: each slice along the axis times the normalised product
// of K Gaussians of itself. No torch, no CUDA header.
#pragma once

#include "trifuse/slices.h"

namespace trifuse {

// Per head, in double: a = sum 1/c_k^2, b = sum delta_k/c_k^2, beta = b/a. With m the mean of a slice, v its unbiased
// variance plus eps (eps alone where fewer than two entries take part) and e = x - m - beta the log of the product of
// the Gaussians is
//   l + c0 with l = -e^2 a / (2 v),
//               c0 = -(sum delta_k^2/c_k^2 - b^2/a) / (2 v) - (K/2) log 2 pi - sum log|c_k|
// and with r the least e^2 of the slice
//   w = exp((r - e^2) a / (2 v)) / sum exp(..)
// A logsumexp is not kept: in a slice of little variance it is far too large for its rounding. r is, and both passes
// sum up the same exponentials. Clamped, where logsumexp(l) + c0 < log eps: w = exp(l + c0 - log eps), and no gradient
// flows through the sum, but through c0.
struct GaussianAdaptiveAttentionShape : SliceShape {
  int64_t heads = 1;      // consecutive pieces of the axis, length / heads each; the last takes the rest
  int64_t gaussians = 1;  // K
  bool clamped = false;
  bool padded = false;       // entries equal to padding_value, rounded to dtype, are a sentinel:
  double padding_value = 0;  // zeros to mean and variance (over all entries), out = x and not x w there
  double eps = 0;
  SliceView x;                        // any strides
  SliceView mask;                     // one byte each, 0: takes no part; ptr null: all do. Any strides, also 0
  const void* mean_offset = nullptr;  // delta, (heads, gaussians), float (double for double), contiguous
  const void* width = nullptr;        // c, likewise

  int64_t head_begin(int64_t head) const { return head * (length / heads); }
  int64_t head_length(int64_t head) const {
    return head + 1 < heads ? length / heads : length - (heads - 1) * (length / heads);
  }
  int64_t slices() const { return outer * inner; }
};

// stats: (3, heads, outer, inner), float (double for double), contiguous: the mean m; 1/v, negative where the clamp
// acts; r. Where nothing takes part they may be anything. The GPU kernels keep the entry of the least e^2, its
// deviation from the mean, and 1/v; see csrc/cuda/gaussian_adaptive_attention_entries.cuh.
struct GaussianAdaptiveAttentionParams : GaussianAdaptiveAttentionShape {
  void* out = nullptr;      // (outer, length, inner), dense
  void* weights = nullptr;  // likewise, or null: not asked for
  void* stats = nullptr;
};

// The exponents' gradient is s = w (G - sum w G), G = x dout + dweights (at a sentinel dweights alone); where the
// clamp acts s = w G, and sum s is the gradient of c0. The parameters' gradients are best made of sums of s e^2 / v,
// s e / v and s / v: the narrowest Gaussian has the largest, and lies close to beta.
struct GaussianAdaptiveAttentionBwdParams : GaussianAdaptiveAttentionShape {
  SliceView dout;      // any strides; ptr null: zero
  SliceView dweights;  // likewise
  const void* stats = nullptr;
  void* dx = nullptr;            // (outer, length, inner), dense
  void* dmean_offset = nullptr;  // (heads, gaussians), float (double for double)
  void* dwidth = nullptr;
};

namespace cpu {

void gaussian_adaptive_attention_fwd(const GaussianAdaptiveAttentionParams& p, const Threads& threads);
void gaussian_adaptive_attention_bwd(const GaussianAdaptiveAttentionBwdParams& p, const Threads& threads);

}  // namespace cpu

namespace cuda {

// The bytes of global memory that each pass needs beside its arguments.
int64_t gaussian_adaptive_attention_workspace_bytes(const GaussianAdaptiveAttentionParams& p);
int64_t gaussian_adaptive_attention_workspace_bytes(const GaussianAdaptiveAttentionBwdParams& p);
Error gaussian_adaptive_attention_fwd(const GaussianAdaptiveAttentionParams& p, void* workspace, Stream stream);
Error gaussian_adaptive_attention_bwd(const GaussianAdaptiveAttentionBwdParams& p, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace trifuse
