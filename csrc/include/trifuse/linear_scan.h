// Parameters and launches of linear_scan: h[t] = a[t] h[t-1] + b[t]. No torch, no CUDA header.
#pragma once

#include "trifuse/types.h"

namespace trifuse {

// What the forward and the backward pass share. Complex numbers are pairs of `dtype`; the strides of a
// complex view count pairs.
struct LinearScanShape {
  int64_t batch = 0;
  int64_t dim = 0;
  int64_t seqlen = 0;
  DType dtype = DType::kFloat32;  // of the sequences, or of their real parts
  bool a_complex = false;         // implies b_complex
  bool b_complex = false;         // b, h, their gradients and the states
  bool reverse = false;
  const int64_t* cu_seqlens = nullptr;  // (num_seqs + 1,), or null; then batch is 1
  int64_t num_seqs = 0;

  int64_t state_rows() const { return cu_seqlens ? num_seqs : batch; }
};

// States are (state_rows, dim), contiguous, float (double for double), complex where b is.
struct LinearScanParams : LinearScanShape {
  SeqView a, b, h;
  const void* initial_state = nullptr;  // or null: zero
  void* last_state = nullptr;
};

struct LinearScanBwdParams : LinearScanShape {
  SeqView a, h, dh, da, db;  // da has the type of a
  const void* initial_state = nullptr;
  const void* dlast_state = nullptr;  // or null: zero
  void* dinitial_state = nullptr;     // or null: not asked for
};

namespace cpu {

void linear_scan_fwd(const LinearScanParams& p, const Threads& threads);
void linear_scan_bwd(const LinearScanBwdParams& p, const Threads& threads);

}  // namespace cpu

namespace cuda {

int64_t linear_scan_workspace_bytes(const LinearScanShape& p);
Error linear_scan_fwd(const LinearScanParams& p, void* workspace, Stream stream);
Error linear_scan_bwd(const LinearScanBwdParams& p, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace trifuse
