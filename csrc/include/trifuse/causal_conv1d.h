// Parameters and launch declarations of the causal depthwise convolution. No torch, no CUDA header: every
// kernel and every launcher, whatever the device, is written against this file alone.
#pragma once

#include <cstdint>

#include "trifuse/types.h"

namespace trifuse {

// y[b][d][t] = act(bias[d] + sum_k weight[d][width - 1 - k] * input(t - k)), k = 0 .. width - 1.
//
// Position t belongs to the packed sequence s with cu_seqlens[s] <= t < cu_seqlens[s + 1], or to the batch item
// as a whole; `start` is its first position and `row` the sequence s or the batch item b. Tap k counts
//   at t - k >= start: if seq_idx is null or seq_idx[b][t - k] == seq_idx[b][t]; the input is x[b][d][t - k];
//   at t - k <  start: if seq_idx is null or all of seq_idx[b][start .. t] are equal; the input is
//     initial_states[row][d][t - k - start + width - 1], or zero without initial states.
// A tap that does not count is left out, not multiplied by zero. Where seq_idx[b][t] < 0 y is zero, whatever the
// bias, and the position passes on no gradient; x[b][d][t] then receives the gradient zero.
//
// final_states[row][d][j] is the input at position end - (width - 1) + j. `end` is that of the sequence; with
// seq_idx, positions of a negative id at the end are passed over first, and inputs left of the last run of one
// id count as zero, unless that run begins at `start`: left of `start` stand the initial states (or zero). Of a
// sequence without positions, or of padding alone, it is the initial states (or zero).
struct CausalConv1dParams {
  int64_t batch = 0, dim = 0, seqlen = 0, width = 0;
  DType dtype = DType::kFloat32;
  bool silu = false;

  SeqView x;
  const void* weight = nullptr;  // (dim, width) acc, contiguous
  const void* bias = nullptr;    // (dim) acc or null
  const void* initial_states =
      nullptr;                       // (batch or num_seqs, dim, width - 1) of the sequence dtype, contiguous, or null
  const int32_t* seq_idx = nullptr;  // (batch, seqlen), contiguous, or null
  const int64_t* cu_seqlens = nullptr;  // (num_seqs + 1) on the device of the data, or null; batch is then 1
  int64_t num_seqs = 0;

  SeqView y;                     // forward only
  void* final_states = nullptr;  // forward only: shaped like initial_states, contiguous, or null

  void* workspace = nullptr;  // workspace_bytes() of it, uninitialised

  int64_t rows() const { return cu_seqlens ? num_seqs : batch; }
};

struct CausalConv1dBwdParams : CausalConv1dParams {
  SeqView dy;
  const void* dfinal_states = nullptr;  // like final_states, or null for zero
  bool deterministic = false;

  SeqView dx;                       // sequence dtype
  void* dweight = nullptr;          // (dim, width) acc, contiguous
  void* dbias = nullptr;            // (dim) acc or null
  void* dinitial_states = nullptr;  // like initial_states, or null
};

// The next seqlen inputs. conv_state is changed in place; item b uses its row conv_state_indices[b] (b itself when
// null); a negative index is padding: y is zero and no row is touched. Inputs from before stand in the row's
// state_len numbers: the newest last, or, with cache_seqlens, input number i at i % state_len, the next being
// number cache_seqlens[b]. Afterwards the row holds the last state_len inputs in the same order.
struct CausalConv1dUpdateParams {
  int64_t batch = 0, dim = 0, seqlen = 0, width = 0, state_len = 0;
  DType dtype = DType::kFloat32;        // x, y
  DType state_dtype = DType::kFloat32;  // float64 where dtype is, and only there
  bool silu = false;

  SeqView x;
  void* conv_state = nullptr;  // (rows, dim, state_len), strides below
  int64_t state_row = 0, state_dim = 0, state_time = 0;
  const void* weight = nullptr;                 // (dim, width) acc, contiguous
  const void* bias = nullptr;                   // (dim) acc or null
  const int64_t* cache_seqlens = nullptr;       // (batch) or null
  const int64_t* conv_state_indices = nullptr;  // (batch) or null
  void* y = nullptr;                            // (batch, dim, seqlen), contiguous
};

namespace cpu {

int64_t causal_conv1d_fwd_workspace_bytes(const CausalConv1dParams& p);
void causal_conv1d_fwd(const CausalConv1dParams& p, const Threads& threads);
int64_t causal_conv1d_bwd_workspace_bytes(const CausalConv1dBwdParams& p);
void causal_conv1d_bwd(const CausalConv1dBwdParams& p, const Threads& threads);
void causal_conv1d_update(const CausalConv1dUpdateParams& p, const Threads& threads);

}  // namespace cpu

namespace cuda {

// Bytes of scratch, uninitialised, that a launch needs (0: none).
int64_t causal_conv1d_fwd_workspace_bytes(const CausalConv1dParams& p);
Error causal_conv1d_fwd(const CausalConv1dParams& p, Stream stream);
int64_t causal_conv1d_bwd_workspace_bytes(const CausalConv1dBwdParams& p);
Error causal_conv1d_bwd(const CausalConv1dBwdParams& p, Stream stream);
Error causal_conv1d_update(const CausalConv1dUpdateParams& p, Stream stream);

}  // namespace cuda
}  // namespace trifuse
