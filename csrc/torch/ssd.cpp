// ssd as torch ops: allocation, views, registration, for the CPU alone: on CUDA tensors ssd is Triton's.
#if !defined(TRIFUSE_CUDA) && !defined(TRIFUSE_EMULATED)

#include "trifuse/ssd.h"

#include "common.h"

namespace trifuse {
namespace {

SsdView view(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.dim() > 3 ? t.stride(3) : 1};
}
SsdView view(const OptionalTensor& t) { return t ? view(*t) : SsdView(); }

std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }
Tensor like(const Tensor& t) { return empty(sizes_of(t), t.scalar_type(), t); }
Tensor like(const OptionalTensor& t, const Tensor& A) { return t ? like(*t) : empty({0}, A.scalar_type(), A); }

struct Inputs {
  Tensor x, dt, A, B, C;
  OptionalTensor D, z, dt_bias, initial_states, seq_idx, cu_seqlens;
  bool dt_softplus;
  double dt_min, dt_max;
  int64_t chunk_size;

  int64_t state_rows() const { return cu_seqlens ? cu_seqlens->size(0) - 1 : x.size(0); }

  void fill(SsdParams& p) const {
    p.batch = x.size(0);
    p.seqlen = x.size(1);
    p.heads = x.size(2);
    p.headdim = x.size(3);
    p.groups = B.size(2);
    p.dstate = B.size(3);
    p.dtype = dtype_of(x);
    p.dt_dtype = dtype_of(dt);
    p.dt_softplus = dt_softplus;
    p.dt_min = dt_min;
    p.dt_max = dt_max;
    p.x = view(x);
    p.dt = view(dt);
    p.B = view(B);
    p.C = view(C);
    p.z = view(z);
    p.A = A.data_ptr();
    p.D = pointer(D);
    p.D_has_dim = D && D->dim() == 2;
    p.dt_bias = pointer(dt_bias);
    p.initial_states = pointer(initial_states);
    p.seq_idx = static_cast<const int32_t*>(pointer(seq_idx));
    p.cu_seqlens = static_cast<const int64_t*>(pointer(cu_seqlens));
    p.num_seqs = cu_seqlens ? state_rows() : 0;
    STD_TORCH_CHECK(chunk_size >= 1 && chunk_size <= 1024, "ssd: chunk_size is ", chunk_size,
                    "; on the CPU it must be from 1 to 1024");
    p.chunk_size = chunk_size;
    p.n_chunks = (p.seqlen + chunk_size - 1) / chunk_size;
    check(p);
  }

 private:
  // Traced code reaches this without the checks in Python, and these would read past an end.
  void check(const SsdParams& p) const {
    STD_TORCH_CHECK(p.groups > 0 && p.heads % p.groups == 0 && C.size(2) == p.groups && C.size(3) == p.dstate,
                    "ssd: B has ", p.groups, " groups of ", p.dstate, " states and C has ", C.size(2), " of ",
                    C.size(3), "; they must be equal, and divide H = ", p.heads);
    if (!cu_seqlens) return;
    bool good = p.batch == 1 && p.cu_seqlens[0] == 0 && p.cu_seqlens[p.num_seqs] == p.seqlen;
    for (int64_t i = 0; i < p.num_seqs; ++i) good = good && p.cu_seqlens[i] <= p.cu_seqlens[i + 1];
    STD_TORCH_CHECK(good, "ssd: cu_seqlens must start at 0, never decrease and end at L = ", p.seqlen,
                    ", of a batch of one");
  }
};

std::tuple<Tensor, Tensor, Tensor> ssd_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                                           OptionalTensor z, OptionalTensor dt_bias, OptionalTensor initial_states,
                                           OptionalTensor seq_idx, OptionalTensor cu_seqlens, bool dt_softplus,
                                           double dt_min, double dt_max, bool deterministic, bool return_final,
                                           int64_t chunk_size, bool save) {
  (void)deterministic;  // both passes always are
  const Inputs in{x,       dt,         A,           B,      C,      D,         z, dt_bias, initial_states,
                  seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max, chunk_size};
  SsdParams p;
  in.fill(p);
  const Tensor out = like(x);
  const Tensor final_states =
      empty({return_final ? in.state_rows() : 0, p.heads, p.headdim, p.dstate}, A.scalar_type(), A);
  // The one chunk of a short sequence starts from initial_states: there is nothing to save.
  const int64_t saved = save && p.n_chunks > 1 ? p.n_chunks : 0;
  const Tensor chunk_states = empty({p.batch, saved, p.heads, p.headdim, p.dstate}, A.scalar_type(), A);
  p.out = view(out);
  if (return_final) p.final_states = final_states.data_ptr();
  if (saved) p.chunk_states = chunk_states.data_ptr();
  cpu::ssd_fwd(p, torch_threads());
  return {out, final_states, chunk_states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ssd_bwd(
    Tensor dout, OptionalTensor dfinal_states, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptionalTensor D,
    OptionalTensor z, OptionalTensor dt_bias, OptionalTensor initial_states, OptionalTensor seq_idx,
    OptionalTensor cu_seqlens, Tensor chunk_states, bool dt_softplus, double dt_min, double dt_max, bool deterministic,
    int64_t chunk_size) {
  (void)deterministic;
  const Inputs in{x,       dt,         A,           B,      C,      D,         z, dt_bias, initial_states,
                  seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max, chunk_size};
  SsdBwdParams p;
  in.fill(p);
  STD_TORCH_CHECK(p.n_chunks <= 1 || chunk_states.size(1) == p.n_chunks, "ssd: the forward pass saved ",
                  chunk_states.size(1), " states for a backward pass of ", p.n_chunks, " chunks");
  if (p.n_chunks > 1) p.chunk_states = chunk_states.data_ptr();
  p.dout = view(dout);
  if (dfinal_states) dfinal_states = torch::stable::contiguous(*dfinal_states);
  p.dfinal_states = pointer(dfinal_states);

  const Tensor dx = like(x), ddt = like(dt), dA = like(A), dB = like(B), dC = like(C);
  const Tensor dD = like(D, A), dz = like(z, A), ddt_bias = like(dt_bias, A);
  const Tensor dinitial_states = like(initial_states, A);
  p.dx = view(dx);
  p.ddt = view(ddt);
  p.dB = view(dB);
  p.dC = view(dC);
  if (z) p.dz = view(dz);
  p.dA = dA.data_ptr();
  if (D) p.dD = dD.data_ptr();
  if (dt_bias) p.ddt_bias = ddt_bias.data_ptr();
  if (initial_states) p.dinitial_states = dinitial_states.data_ptr();
  const Tensor workspace = empty({cpu::ssd_bwd_workspace_bytes(p)}, ScalarType::Byte, x);
  p.workspace = workspace.data_ptr();
  cpu::ssd_bwd(p, torch_threads());
  return {dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states};
}

TRIFUSE_IMPL(m) {
  m.impl("ssd_fwd", TORCH_BOX(&ssd_fwd));
  m.impl("ssd_bwd", TORCH_BOX(&ssd_bwd));
}

}  // namespace
}  // namespace trifuse

#endif
