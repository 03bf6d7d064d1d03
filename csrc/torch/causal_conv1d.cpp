// causal_conv1d and causal_conv1d_update as torch ops: allocation, views, registration. The schemas and every
// check of the public arguments are in Python, in registration/ and ops/.
#include "trifuse/causal_conv1d.h"

#include "common.h"

namespace trifuse {
namespace {

#if defined(TRIFUSE_CUDA) || defined(TRIFUSE_EMULATED)

void launch(CausalConv1dParams& p, const Tensor& on) {
  const Tensor workspace = empty({cuda::causal_conv1d_fwd_workspace_bytes(p)}, ScalarType::Byte, on);
  p.workspace = workspace.data_ptr();
  check_launch(cuda::causal_conv1d_fwd(p, current_stream(on)), "causal_conv1d forward");
}
void launch(CausalConv1dBwdParams& p, const Tensor& on) {
  const Tensor workspace = empty({cuda::causal_conv1d_bwd_workspace_bytes(p)}, ScalarType::Byte, on);
  p.workspace = workspace.data_ptr();
  check_launch(cuda::causal_conv1d_bwd(p, current_stream(on)), "causal_conv1d backward");
}
void launch(const CausalConv1dUpdateParams& p, const Tensor& on) {
  check_launch(cuda::causal_conv1d_update(p, current_stream(on)), "causal_conv1d_update");
}

#else

void launch(CausalConv1dParams& p, const Tensor& on) {
  const Tensor workspace = empty({cpu::causal_conv1d_fwd_workspace_bytes(p)}, ScalarType::Byte, on);
  p.workspace = workspace.data_ptr();
  cpu::causal_conv1d_fwd(p, torch_threads());
}
void launch(CausalConv1dBwdParams& p, const Tensor& on) {
  const Tensor workspace = empty({cpu::causal_conv1d_bwd_workspace_bytes(p)}, ScalarType::Byte, on);
  p.workspace = workspace.data_ptr();
  cpu::causal_conv1d_bwd(p, torch_threads());
}
void launch(const CausalConv1dUpdateParams& p, const Tensor&) { cpu::causal_conv1d_update(p, torch_threads()); }

#endif

void fill(CausalConv1dParams& p, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
          const OptionalTensor& initial_states, const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens,
          bool silu) {
  p.batch = x.size(0);
  p.dim = x.size(1);
  p.seqlen = x.size(2);
  p.width = weight.size(1);
  p.dtype = dtype_of(x);
  p.silu = silu;
  p.x = sequence_view(x);
  p.weight = weight.data_ptr();
  p.bias = pointer(bias);
  p.initial_states = pointer(initial_states);
  p.seq_idx = static_cast<const int32_t*>(pointer(seq_idx));
  p.cu_seqlens = static_cast<const int64_t*>(pointer(cu_seqlens));
  p.num_seqs = cu_seqlens ? cu_seqlens->size(0) - 1 : 0;
  STD_TORCH_CHECK(p.width >= 2 && p.width <= 8, "causal_conv1d: weight has width ", p.width,
                  "; it must be from 2 to 8");
#if !defined(TRIFUSE_CUDA)
  // Looked at where that costs nothing: traced code reaches this without the checks in Python.
  if (p.cu_seqlens) {
    bool good = p.cu_seqlens[0] == 0 && p.cu_seqlens[p.num_seqs] == p.seqlen;
    for (int64_t i = 0; i < p.num_seqs; ++i) good = good && p.cu_seqlens[i] <= p.cu_seqlens[i + 1];
    STD_TORCH_CHECK(good, "causal_conv1d: cu_seqlens must start at 0, never decrease and end at L = ", p.seqlen);
  }
#endif
}

std::tuple<Tensor, Tensor> causal_conv1d_fwd(Tensor x, Tensor weight, OptionalTensor bias,
                                             OptionalTensor initial_states, OptionalTensor seq_idx,
                                             OptionalTensor cu_seqlens, bool silu, bool bld, bool deterministic,
                                             bool return_final) {
  (void)deterministic;  // the forward pass always is; the flag travels to the backward pass
  CausalConv1dParams p;
  fill(p, x, weight, bias, initial_states, seq_idx, cu_seqlens, silu);
  const Tensor y = empty_sequence(x, bld);
  std::vector<int64_t> final_size{0};
  if (return_final) final_size = {p.rows(), p.dim, p.width - 1};
  const Tensor final_states = empty(final_size, x.scalar_type(), x);
  p.y = sequence_view(y);
  if (return_final) p.final_states = final_states.data_ptr();
  launch(p, x);
  return {y, final_states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_bwd(Tensor dy, OptionalTensor dfinal_states, Tensor x,
                                                             Tensor weight, OptionalTensor bias,
                                                             OptionalTensor initial_states, OptionalTensor seq_idx,
                                                             OptionalTensor cu_seqlens, bool silu, bool bld,
                                                             bool deterministic) {
  CausalConv1dBwdParams p;
  fill(p, x, weight, bias, initial_states, seq_idx, cu_seqlens, silu);
  p.deterministic = deterministic;
  p.dy = sequence_view(dy);
  if (dfinal_states) dfinal_states = torch::stable::contiguous(*dfinal_states);
  p.dfinal_states = pointer(dfinal_states);

  const ScalarType acc = weight.scalar_type(), sequence = x.scalar_type();
  const Tensor dx = empty_sequence(x, bld);
  const Tensor dweight = empty({p.dim, p.width}, acc, x);
  std::vector<int64_t> bias_size{bias ? p.dim : 0}, states_size{0};
  if (initial_states) states_size = {p.rows(), p.dim, p.width - 1};
  const Tensor dbias = empty(bias_size, acc, x), dinitial_states = empty(states_size, sequence, x);
  p.dx = sequence_view(dx);
  p.dweight = dweight.data_ptr();
  if (bias) p.dbias = dbias.data_ptr();
  if (initial_states) p.dinitial_states = dinitial_states.data_ptr();
  launch(p, x);
  return {dx, dweight, dbias, dinitial_states};
}

Tensor causal_conv1d_update(Tensor x, Tensor conv_state, Tensor weight, OptionalTensor bias, bool silu,
                            OptionalTensor cache_seqlens, OptionalTensor conv_state_indices) {
  CausalConv1dUpdateParams p;
  p.batch = x.size(0);
  p.dim = x.size(1);
  p.seqlen = x.size(2);
  p.width = weight.size(1);
  p.state_len = conv_state.size(2);
  p.dtype = dtype_of(x);
  p.state_dtype = dtype_of(conv_state);
  p.silu = silu;
  STD_TORCH_CHECK((p.state_dtype == DType::kFloat64) == (p.dtype == DType::kFloat64),
                  "causal_conv1d_update: conv_state and x must both be float64, or neither");
  STD_TORCH_CHECK(p.width >= 2 && p.width <= 8 && p.state_len >= p.width - 1, "causal_conv1d_update: weight has width ",
                  p.width, " and conv_state length ", p.state_len,
                  "; the width must be from 2 to 8 and the length at least the width - 1");
  p.x = sequence_view(x);
  p.conv_state = conv_state.data_ptr();
  p.state_row = conv_state.stride(0);
  p.state_dim = conv_state.stride(1);
  p.state_time = conv_state.stride(2);
  p.weight = weight.data_ptr();
  p.bias = pointer(bias);
  p.cache_seqlens = static_cast<const int64_t*>(pointer(cache_seqlens));
  p.conv_state_indices = static_cast<const int64_t*>(pointer(conv_state_indices));
#if !defined(TRIFUSE_CUDA)
  for (int64_t b = 0; p.conv_state_indices && b < p.batch; ++b) {
    STD_TORCH_CHECK(p.conv_state_indices[b] < conv_state.size(0), "causal_conv1d_update: conv_state_indices holds ",
                    p.conv_state_indices[b], "; conv_state has only ", conv_state.size(0), " rows");
  }
#endif
  const Tensor y = empty({p.batch, p.dim, p.seqlen}, x.scalar_type(), x);
  p.y = y.data_ptr();
  launch(p, x);
  return y;
}

TRIFUSE_IMPL(m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&causal_conv1d_fwd));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&causal_conv1d_bwd));
  m.impl("causal_conv1d_update", TORCH_BOX(&causal_conv1d_update));
}

}  // namespace
}  // namespace trifuse
