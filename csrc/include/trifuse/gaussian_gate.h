// Parameters and launches of gaussian_gate: a gate along an axis, a sum of Gaussians of the distance from the mean.
// No torch, no CUDA header.
#pragma once

#include "trifuse/slices.h"

namespace trifuse {

// What the forward and the backward pass share:
//   without alpha  gate = exp(-z^2 / 2), the variance biased,
//   with alpha     gate = 1 + alpha[row] mean_k exp(-z_k^2 / 2) / sqrt(2 pi), the variance unbiased,
//   z_k = (x - mean - offset[row, k]) / (width[row, k] sqrt(variance + eps)),
// with the mean and the variance of a slice, or of each of `heads` consecutive pieces of it, of which the last takes
// the remainder. Parameters are contiguous, float (double for double).
struct GaussianGateShape : SliceShape {
  int64_t heads = 1;
  int64_t rows = 1, gaussians = 1;
  int64_t share = 1;        // neighbouring slices with the same row of parameters, where heads is 1
  bool outer_rows = false;  // rows are told by the outer index of a slice, otherwise by the inner one
  bool squared = false;     // the square root of width takes its place
  bool multiply = true;     // the output is x * gate
  double eps = 0;
  const void* offset = nullptr;  // (rows, gaussians)
  const void* width = nullptr;   // (rows, gaussians)
  const void* alpha = nullptr;   // (rows,), or null
  SliceView mask;                // of bool, or null: entries that are false take no part

  TRIFUSE_EVERYWHERE int64_t row_of(int64_t head, int64_t outer_index, int64_t inner_index) const {
    if (rows == 1) return 0;
    return heads > 1 ? head : (outer_rows ? outer_index : inner_index) / share % rows;
  }
  TRIFUSE_EVERYWHERE double alpha_scale() const {
    return 0.398942280401432677939946 / double(gaussians);  // 1 / sqrt(2 pi)
  }
};

// stats: (3, heads, outer, inner): of every slice the mean, what its rounding left of it, and 1 / sqrt(v).
struct GaussianGateParams : GaussianGateShape {
  SliceView x, out;
  void* stats = nullptr;
};

struct GaussianGateBwdParams : GaussianGateShape {
  SliceView x, dout, dx;
  const void* stats = nullptr;
  void* doffset = nullptr;
  void* dwidth = nullptr;
  void* dalpha = nullptr;  // or null
};

namespace cpu {

void gaussian_gate_fwd(const GaussianGateParams& p, const Threads& threads);
void gaussian_gate_bwd(const GaussianGateBwdParams& p, const Threads& threads);

}  // namespace cpu

namespace cuda {

Error gaussian_gate_fwd(const GaussianGateParams& p, Stream stream);
int64_t gaussian_gate_bwd_workspace_bytes(const GaussianGateBwdParams& p);
Error gaussian_gate_bwd(const GaussianGateBwdParams& p, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace trifuse
