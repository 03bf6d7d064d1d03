// selective_scan and selective_state_update as torch ops: allocation, views, registration. The schemas
// and every check of the public arguments are in Python, in registration/ and ops/.
#include "trifuse/selective_scan.h"

#include "common.h"

namespace trifuse {
namespace {

// B or C: constant (dim, dstate), or variable (batch, groups, dstate, seqlen).
CoefView coefficient_view(const Tensor& t) {
  CoefView view;
  view.ptr = t.data_ptr();
  view.variable = t.dim() == 4;
  if (view.variable) {
    view.groups = t.size(1);
    view.batch = t.stride(0);
    view.group = t.stride(1);
    view.state = t.stride(2);
    view.time = t.stride(3);
  }
  return view;
}

// Uninitialised, for the gradient of B or C: in memory (batch, seqlen, groups, dstate) if bld.
Tensor empty_coefficient(const Tensor& like, ScalarType dtype, bool bld) {
  if (like.dim() == 2) return empty({like.size(0), like.size(1)}, dtype, like);
  const int64_t batch = like.size(0), groups = like.size(1), dstate = like.size(2), seqlen = like.size(3);
  if (!bld) return empty({batch, groups, dstate, seqlen}, dtype, like);
  const Tensor memory = empty({batch, seqlen, groups, dstate}, dtype, like);
  return torch::stable::transpose(torch::stable::transpose(memory, 1, 2), 2, 3);
}

#if defined(TRIFUSE_CUDA) || defined(TRIFUSE_EMULATED)

void launch(const SelectiveScanParams& p, const Tensor& on) {
  const int64_t bytes = cuda::selective_scan_fwd_workspace_bytes(p);
  const Tensor workspace = empty({bytes}, ScalarType::Byte, on);
  check_launch(cuda::selective_scan_fwd(p, workspace.data_ptr(), current_stream(on)), "selective_scan forward");
}
void launch(SelectiveScanBwdParams& p, const Tensor& on) {
  const Tensor workspace = empty({cuda::selective_scan_bwd_workspace_bytes(p)}, ScalarType::Byte, on);
  p.workspace = workspace.data_ptr();
  check_launch(cuda::selective_scan_bwd(p, current_stream(on)), "selective_scan backward");
}
void launch(const StateUpdateParams& p, const Tensor& on) {
  check_launch(cuda::selective_state_update(p, current_stream(on)), "selective_state_update");
}

#else

void launch(const SelectiveScanParams& p, const Tensor&) { cpu::selective_scan_fwd(p, torch_threads()); }
void launch(SelectiveScanBwdParams& p, const Tensor& on) {
  const cpu::Threads threads = torch_threads();
  const int64_t bytes = cpu::selective_scan_bwd_workspace_bytes(p, threads.count);
  const Tensor workspace = empty({bytes}, ScalarType::Byte, on);
  p.workspace = workspace.data_ptr();
  cpu::selective_scan_bwd(p, threads);
}
void launch(const StateUpdateParams& p, const Tensor&) { cpu::selective_state_update(p, torch_threads()); }

#endif

struct ScanInputs {
  Tensor u, delta, A, B, C;
  OptionalTensor D, z, delta_bias, initial_state, cu_seqlens;
  bool delta_softplus, reverse, bld;
  int64_t chunk_size;

  int64_t state_rows() const { return cu_seqlens ? cu_seqlens->size(0) - 1 : u.size(0); }
  int64_t n_chunks() const { return chunk_size ? (u.size(2) + chunk_size - 1) / chunk_size : 0; }

  void fill(SelectiveScanParams& p) const {
    p.batch = u.size(0);
    p.dim = u.size(1);
    p.seqlen = u.size(2);
    p.dstate = A.size(1);
    p.dtype = dtype_of(u);
    p.complex = is_complex(A);
    p.delta_softplus = delta_softplus;
    p.reverse = reverse;
    p.u = sequence_view(u);
    p.delta = sequence_view(delta);
    if (z) p.z = sequence_view(*z);
    p.A = A.data_ptr();
    p.B = coefficient_view(B);
    p.C = coefficient_view(C);
    p.D = pointer(D);
    p.delta_bias = pointer(delta_bias);
    p.initial_state = pointer(initial_state);
    p.cu_seqlens = static_cast<const int64_t*>(pointer(cu_seqlens));
    p.num_seqs = cu_seqlens ? state_rows() : 0;
    p.chunk_size = chunk_size;
    p.n_chunks = n_chunks();
    STD_TORCH_CHECK(chunk_size >= 0 && chunk_size % 16 == 0 && chunk_size <= 1024, "selective_scan: chunk_size is ",
                    chunk_size, "; it must be a multiple of 16, at most 1024");
#if !defined(TRIFUSE_CUDA) && !defined(TRIFUSE_EMULATED)
    STD_TORCH_CHECK(chunk_size <= 64, "selective_scan: chunk_size is ", chunk_size, "; on the CPU it is at most 64");
#endif
#if !defined(TRIFUSE_CUDA)
    if (cu_seqlens) check_offsets(p);
#endif
  }

 private:
  // The offsets are looked at where that costs nothing: traced code reaches this without the checks
  // in Python, and a wrong offset would be read past the end of every sequence.
  static void check_offsets(const SelectiveScanParams& p) {
    bool good = p.cu_seqlens[0] == 0 && p.cu_seqlens[p.num_seqs] == p.seqlen;
    for (int64_t i = 0; i < p.num_seqs; ++i) good = good && p.cu_seqlens[i] <= p.cu_seqlens[i + 1];
    STD_TORCH_CHECK(good, "selective_scan: cu_seqlens must start at 0, never decrease and end at L = ", p.seqlen);
  }
};

std::tuple<Tensor, Tensor, Tensor> selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                                                      OptionalTensor D, OptionalTensor z, OptionalTensor delta_bias,
                                                      OptionalTensor initial_state, OptionalTensor cu_seqlens,
                                                      bool delta_softplus, bool reverse, bool bld, bool deterministic,
                                                      int64_t chunk_size) {
  (void)deterministic;  // the forward pass always is; the flag travels to the backward pass
  const ScanInputs in{u,          delta,          A,       B,   C,         D, z, delta_bias, initial_state,
                      cu_seqlens, delta_softplus, reverse, bld, chunk_size};
  SelectiveScanParams p;
  in.fill(p);
  const Tensor out = empty_sequence(u, bld);
  const Tensor last_state = empty({in.state_rows(), p.dim, p.dstate}, A.scalar_type(), A);
  const Tensor chunk_states = empty({p.batch, p.n_chunks, p.dstate, p.dim}, A.scalar_type(), A);
  p.out = sequence_view(out);
  p.last_state = last_state.data_ptr();
  p.chunk_states = chunk_states.data_ptr();
  launch(p, u);
  return {out, last_state, chunk_states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_bwd(
    Tensor dout, OptionalTensor dlast_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
    OptionalTensor z, OptionalTensor delta_bias, OptionalTensor initial_state, OptionalTensor cu_seqlens,
    Tensor chunk_states, bool delta_softplus, bool reverse, bool bld, bool deterministic, int64_t chunk_size) {
  const ScanInputs in{u,          delta,          A,       B,   C,         D, z, delta_bias, initial_state,
                      cu_seqlens, delta_softplus, reverse, bld, chunk_size};
  STD_TORCH_CHECK(chunk_size > 0, "selective_scan: the forward pass saved no states for a backward pass");
  SelectiveScanBwdParams p;
  in.fill(p);
  p.chunk_states = chunk_states.data_ptr();
  p.deterministic = deterministic;
  p.dout = sequence_view(dout);
  if (dlast_state) dlast_state = torch::stable::contiguous(*dlast_state);
  p.dlast_state = pointer(dlast_state);

  const ScalarType acc = A.scalar_type();
  const auto like = [&](const OptionalTensor& t) {
    std::vector<int64_t> size{0};
    if (t) size.assign(t->sizes().begin(), t->sizes().end());
    return empty(size, t ? t->scalar_type() : acc, A);
  };
  const Tensor du = empty_sequence(u, bld), ddelta = empty_sequence(u, bld);
  const Tensor dz = z ? empty_sequence(u, bld) : empty({0}, u.scalar_type(), u);
  const Tensor dA = like(A), dD = like(D), ddelta_bias = like(delta_bias), dinitial_state = like(initial_state);
  const Tensor dB = empty_coefficient(B, acc, bld), dC = empty_coefficient(C, acc, bld);
  p.du = sequence_view(du);
  p.ddelta = sequence_view(ddelta);
  if (z) p.dz = sequence_view(dz);
  p.dA = dA.data_ptr();
  p.dB = coefficient_view(dB);
  p.dC = coefficient_view(dC);
  if (D) p.dD = dD.data_ptr();
  if (delta_bias) p.ddelta_bias = ddelta_bias.data_ptr();
  if (initial_state) p.dinitial_state = dinitial_state.data_ptr();
  launch(p, u);
  return {du,          ddelta,        dA, with_dtype(dB, B.scalar_type()), with_dtype(dC, C.scalar_type()), dD, dz,
          ddelta_bias, dinitial_state};
}

Tensor selective_state_update(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                              OptionalTensor z, OptionalTensor dt_bias, bool dt_softplus,
                              OptionalTensor state_batch_indices) {
  // x is (batch, heads, headdim); without heads (batch, headdim), and A, B, C, state and the weights have none either.
  const bool heads = x.dim() == 3;
  const auto outer = [heads](const Tensor& t, int64_t dim) { return heads ? t.stride(dim) : int64_t(0); };
  StateUpdateParams p;
  p.batch = x.size(0);
  p.heads = heads ? x.size(1) : 1;
  p.headdim = x.size(heads ? 2 : 1);
  p.dstate = A.size(heads ? 2 : 1);
  p.groups = heads ? B.size(1) : 1;
  p.dtype = dtype_of(x);
  p.state_dtype = dtype_of(state);
  p.dt_softplus = dt_softplus;
  STD_TORCH_CHECK((p.state_dtype == DType::kFloat64) == (p.dtype == DType::kFloat64),
                  "selective_state_update: state and x must both be float64, or neither");
  p.state = state.data_ptr();
  p.state_row = state.stride(0);
  p.state_head = outer(state, 1);
  p.state_dim = state.stride(heads ? 2 : 1);
  p.state_state = state.stride(heads ? 3 : 2);
  const auto head_view = [&](const OptionalTensor& t, const void*& ptr, int64_t& batch, int64_t& head, int64_t& dim) {
    if (!t) return;
    ptr = t->data_ptr();
    batch = t->stride(0);
    head = outer(*t, 1);
    dim = t->stride(heads ? 2 : 1);
  };
  head_view(x, p.x, p.x_batch, p.x_head, p.x_dim);
  head_view(dt, p.dt, p.dt_batch, p.dt_head, p.dt_dim);
  head_view(z, p.z, p.z_batch, p.z_head, p.z_dim);
  p.A = A.data_ptr();
  p.A_head = outer(A, 0);
  p.A_dim = A.stride(heads ? 1 : 0);
  p.A_state = A.stride(heads ? 2 : 1);
  head_view(B, p.B, p.B_batch, p.B_group, p.B_state);
  head_view(C, p.C, p.C_batch, p.C_group, p.C_state);
  const auto weight_view = [&](const OptionalTensor& t, const void*& ptr, int64_t& head, int64_t& dim) {
    if (!t) return;
    ptr = t->data_ptr();
    head = outer(*t, 0);
    dim = t->stride(heads ? 1 : 0);
  };
  weight_view(D, p.D, p.D_head, p.D_dim);
  weight_view(dt_bias, p.dt_bias, p.dt_bias_head, p.dt_bias_dim);
  STD_TORCH_CHECK(!heads || C.size(1) == p.groups, "selective_state_update: B has ", p.groups, " groups and C has ",
                  C.size(1));
  p.state_batch_indices = static_cast<const int64_t*>(pointer(state_batch_indices));
#if !defined(TRIFUSE_CUDA)
  for (int64_t b = 0; p.state_batch_indices && b < p.batch; ++b) {
    STD_TORCH_CHECK(p.state_batch_indices[b] < state.size(0), "selective_state_update: state_batch_indices holds ",
                    p.state_batch_indices[b], "; state has only ", state.size(0), " rows");
  }
#endif
  const Tensor out = heads ? empty({p.batch, p.heads, p.headdim}, x.scalar_type(), x)
                           : empty({p.batch, p.headdim}, x.scalar_type(), x);
  p.out = out.data_ptr();
  launch(p, x);
  return out;
}

TRIFUSE_IMPL(m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&selective_scan_fwd));
  m.impl("selective_scan_bwd", TORCH_BOX(&selective_scan_bwd));
  m.impl("selective_state_update", TORCH_BOX(&selective_state_update));
}

}  // namespace
}  // namespace trifuse
