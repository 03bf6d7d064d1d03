// Parameters and launch declarations of the selective scan. No torch, no CUDA header: every kernel
// and every launcher, whatever the device, is written against this file alone.
#pragma once

#include <cstdint>

#include "trifuse/types.h"

namespace trifuse {

// B or C. Variable: (batch, groups, dstate, seqlen) of the sequence dtype, strides in elements.
// Constant: (dim, dstate), contiguous, of the accumulation dtype; the strides are then unused.
// Channel d reads group d / (dim / groups).
struct CoefView {
  void* ptr = nullptr;
  bool variable = false;
  int64_t groups = 1;
  int64_t batch = 0;
  int64_t group = 0;
  int64_t state = 0;
  int64_t time = 0;
};

// The sequence dtype is `dtype`; the accumulation dtype ("acc") is float64 for float64 and float32
// otherwise. With `complex` set, A, B, C, the states and their gradients are interleaved complex
// numbers of the acc dtype (for B and C: of the acc dtype also when variable).
//
// Time runs in processing order: step s reads position s, or seqlen - 1 - s when `reverse`. A chunk
// is `chunk_size` consecutive steps; chunk_states[b][c] is the state before step c * chunk_size.
// With cu_seqlens (batch == 1) the state is replaced at the first step of every sequence by
// initial_state[s] (or zero), whether or not a chunk starts there.
struct SelectiveScanParams {
  int64_t batch = 0, dim = 0, seqlen = 0, dstate = 0;
  DType dtype = DType::kFloat32;
  bool complex = false;
  bool delta_softplus = false;
  bool reverse = false;

  SeqView u, delta, z;      // z.ptr may be null
  const void* A = nullptr;  // (dim, dstate) acc, contiguous
  CoefView B, C;
  const void* D = nullptr;           // (dim) acc or null
  const void* delta_bias = nullptr;  // (dim) acc or null

  const void* initial_state = nullptr;  // (batch or num_seqs, dim, dstate) acc, contiguous, or null
  const int64_t* cu_seqlens = nullptr;  // (num_seqs + 1) on the device of the data, or null
  int64_t num_seqs = 0;

  int64_t chunk_size = 0;        // 0: chunk_states is not written
  int64_t n_chunks = 0;          // ceil(seqlen / chunk_size)
  void* chunk_states = nullptr;  // (batch, n_chunks, dstate, dim) acc, contiguous

  SeqView out;                 // forward only
  void* last_state = nullptr;  // forward only: (batch or num_seqs, dim, dstate) acc, contiguous
};

struct SelectiveScanBwdParams : SelectiveScanParams {
  SeqView dout;
  const void* dlast_state = nullptr;  // like last_state, or null for zero
  bool deterministic = false;

  SeqView du, ddelta, dz;          // sequence dtype; dz.ptr null without z
  void* dA = nullptr;              // (dim, dstate) acc, contiguous
  CoefView dB, dC;                 // acc dtype, strides as given; constant: (dim, dstate)
  void* dD = nullptr;              // (dim) acc or null
  void* ddelta_bias = nullptr;     // (dim) acc or null
  void* dinitial_state = nullptr;  // like initial_state, or null

  void* workspace = nullptr;  // workspace_bytes() of it, uninitialised
};

// One token. state is changed in place; row b of the batch uses state row state_batch_indices[b]
// (b itself when null); a negative index is padding: out is zero and no state is touched.
struct StateUpdateParams {
  int64_t batch = 0, heads = 0, headdim = 0, dstate = 0, groups = 1;
  DType dtype = DType::kFloat32;  // x, dt, z, B, C, out
  DType state_dtype = DType::kFloat32;
  bool dt_softplus = false;

  void* state = nullptr;  // (rows, heads, headdim, dstate), strides below
  int64_t state_row = 0, state_head = 0, state_dim = 0, state_state = 0;
  const void* x = nullptr;  // (batch, heads, headdim)
  int64_t x_batch = 0, x_head = 0, x_dim = 0;
  const void* dt = nullptr;  // (batch, heads, headdim)
  int64_t dt_batch = 0, dt_head = 0, dt_dim = 0;
  const void* z = nullptr;  // (batch, heads, headdim) or null
  int64_t z_batch = 0, z_head = 0, z_dim = 0;
  const void* A = nullptr;  // (heads, headdim, dstate) acc
  int64_t A_head = 0, A_dim = 0, A_state = 0;
  bool A_is_log = false;    // A is given as log(-A); on the CPU only
  const void* B = nullptr;  // (batch, groups, dstate)
  int64_t B_batch = 0, B_group = 0, B_state = 0;
  const void* C = nullptr;  // (batch, groups, dstate)
  int64_t C_batch = 0, C_group = 0, C_state = 0;
  const void* D = nullptr;  // (heads, headdim) acc or null
  int64_t D_head = 0, D_dim = 0;
  const void* dt_bias = nullptr;  // (heads, headdim) acc or null
  int64_t dt_bias_head = 0, dt_bias_dim = 0;
  const int64_t* state_batch_indices = nullptr;  // (batch) or null
  void* out = nullptr;                           // (batch, heads, headdim), contiguous
};

namespace cpu {

void selective_scan_fwd(const SelectiveScanParams& p, const Threads& threads);
int64_t selective_scan_bwd_workspace_bytes(const SelectiveScanBwdParams& p, int64_t threads);
void selective_scan_bwd(const SelectiveScanBwdParams& p, const Threads& threads);
void selective_state_update(const StateUpdateParams& p, const Threads& threads);

}  // namespace cpu

namespace cuda {

// Bytes of scratch, uninitialised, that the forward launch needs (0: none).
int64_t selective_scan_fwd_workspace_bytes(const SelectiveScanParams& p);
Error selective_scan_fwd(const SelectiveScanParams& p, void* workspace, Stream stream);
int64_t selective_scan_bwd_workspace_bytes(const SelectiveScanBwdParams& p);
Error selective_scan_bwd(const SelectiveScanBwdParams& p, Stream stream);
Error selective_state_update(const StateUpdateParams& p, Stream stream);

}  // namespace cuda
}  // namespace trifuse
