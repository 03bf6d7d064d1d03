// Parameters and launch declarations of ssd, the state-space dual of Mamba-2. No torch header.
#pragma once

#include <cstdint>

#include "trifuse/types.h"

namespace trifuse {

// (batch, seqlen, heads or groups, headdim or dstate) wherever its elements lie; strides are in elements.
// dt is (batch, seqlen, heads): its `last` is unused.
struct SsdView {
  void* ptr = nullptr;
  int64_t batch = 0;
  int64_t time = 0;
  int64_t head = 0;
  int64_t last = 0;
};

// The accumulation dtype ("acc") is float64 for float64 sequences and float32 otherwise. Head h reads group
// h / (heads / groups). Chunks are windows of chunk_size positions, whatever sequences begin or end in them.
struct SsdParams {
  int64_t batch = 0, seqlen = 0, heads = 0, headdim = 0, groups = 1, dstate = 0;
  DType dtype = DType::kFloat32;     // x, B, C, z, out
  DType dt_dtype = DType::kFloat32;  // dt
  bool dt_softplus = false;
  double dt_min = 0, dt_max = 0;  // of the step, after the softplus

  SsdView x, dt, B, C, z;         // z.ptr may be null
  const void* A = nullptr;        // (heads) acc
  const void* D = nullptr;        // (heads) or (heads, headdim) acc, or null
  bool D_has_dim = false;         // whether D is (heads, headdim)
  const void* dt_bias = nullptr;  // (heads) acc or null

  const void* initial_states = nullptr;  // (batch or num_seqs, heads, headdim, dstate) acc, contiguous, or null
  const int32_t* seq_idx = nullptr;      // (batch, seqlen), contiguous, or null
  const int64_t* cu_seqlens = nullptr;   // (num_seqs + 1), or null; batch is then 1
  int64_t num_seqs = 0;

  int64_t chunk_size = 0, n_chunks = 0;  // n_chunks = ceil(seqlen / chunk_size)
  void* chunk_states = nullptr;          // (batch, n_chunks, heads, headdim, dstate) acc: before each chunk; or null

  SsdView out;                   // forward only, contiguous
  void* final_states = nullptr;  // forward only: like initial_states, or null
};

struct SsdBwdParams : SsdParams {
  SsdView dout;
  const void* dfinal_states = nullptr;  // like final_states, or null for zero

  SsdView dx, ddt, dB, dC, dz;      // contiguous, dtypes of x, dt, B, C, z; dz.ptr null without z
  void* dA = nullptr;               // (heads) acc
  void* dD = nullptr;               // like D, or null
  void* ddt_bias = nullptr;         // (heads) acc or null
  void* dinitial_states = nullptr;  // like initial_states, or null

  void* workspace = nullptr;  // workspace_bytes() of it, uninitialised
};

namespace cpu {

void ssd_fwd(const SsdParams& p, const Threads& threads);
int64_t ssd_bwd_workspace_bytes(const SsdBwdParams& p);
void ssd_bwd(const SsdBwdParams& p, const Threads& threads);

}  // namespace cpu
}  // namespace trifuse
