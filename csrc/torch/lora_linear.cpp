// lora_linear as torch ops: registration. The schemas and every check of the public arguments are in Python, in
// registration/ and ops/.
#include "trifuse/lora_linear.h"

#include <tuple>

#include "lora_layer.h"

namespace trifuse {
namespace {

std::tuple<Tensor, Tensor> lora_linear_fwd(Tensor x, Tensor weight, OptionalTensor bias, Tensor lora_A, Tensor lora_B,
                                           double scale, OptionalTensor factors, int64_t active_rank, bool frozen,
                                           double dropout, OptionalTensor seed, bool merged, bool save) {
  x = with_whole_rows(x);
  const Tensor y = empty({x.size(0), weight.size(0)}, x.scalar_type(), x);
  const LoraLayer layer{x, weight, lora_A, lora_B, scale, factors, active_rank, frozen, dropout, seed, merged};
  return {y, lora_forward(y, layer, bias, save)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_bwd(
    Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor S, double scale, OptionalTensor factors,
    int64_t active_rank, bool frozen, double dropout, OptionalTensor seed, bool merged, std::vector<bool> needs) {
  x = with_whole_rows(x);
  const LoraLayer layer{x, weight, lora_A, lora_B, scale, factors, active_rank, frozen, dropout, seed, merged};
  const LoraGradients grads = lora_backward(layer, torch::stable::contiguous(dy), S,
                                            {needs[0], needs[1], needs[2], needs[3], needs[4], needs[5]});
  const auto given = [&](const OptionalTensor& grad, ScalarType of) { return given_or_empty(grad, of, x); };
  const ScalarType dtype = x.scalar_type(), adapter_dtype = lora_A.scalar_type();
  return {given(grads.x, dtype),         given(grads.weight, dtype),    given(grads.bias, dtype),
          given(grads.A, adapter_dtype), given(grads.B, adapter_dtype), given(grads.p, accumulation_type(x))};
}

// x A^T alone, and its gradient: what the norms of dora_linear are made of, with the weight as x.
LoraParams down_params(const Tensor& x, const Tensor& lora_A, LoraAdapter& adapter) {
  LoraParams p;
  p.rows = x.size(0);
  p.in = x.size(1);
  p.dtype = dtype_of(x);
  p.adapter_dtype = dtype_of(lora_A);
  STD_TORCH_CHECK(lora_A.size(1) == p.in && lora_A.size(0) > 0, "lora_down: sizes do not fit");
  p.x = x.data_ptr();
  p.x_row = x.stride(0);
  adapter.A = lora_A.data_ptr();
  adapter.A_row = lora_A.stride(0);
  adapter.rank = lora_A.size(0);
  adapter.end = p.rows;
  p.adapters = &adapter;
  p.n_adapters = 1;
  p.max_rank = adapter.rank;
  return p;
}

Tensor lora_down(Tensor x, Tensor lora_A) {
  LoraAdapter adapter;
  LoraParams p = down_params(x, lora_A, adapter);
  const Tensor S = empty({p.rows, adapter.rank}, accumulation_type(x), x);
  set_matrix(p.S, p.S_row, S);
  LoraKernels(x).down(p);
  return S;
}

std::tuple<Tensor, Tensor> lora_down_bwd(Tensor dS, Tensor x, Tensor lora_A, bool x_grad, bool A_grad) {
  LoraAdapter adapter;
  LoraParams p = down_params(x, lora_A, adapter);
  dS = torch::stable::contiguous(dS);
  set_matrix(p.Z, p.Z_row, dS);
  const Tensor dx = empty(x_grad ? std::vector<int64_t>{p.rows, p.in} : std::vector<int64_t>{0}, x.scalar_type(), x);
  const Tensor dA =
      empty(A_grad ? std::vector<int64_t>{adapter.rank, p.in} : std::vector<int64_t>{0}, lora_A.scalar_type(), x);
  if (x_grad) set_matrix(p.dx, p.dx_row, dx);
  if (A_grad) set_matrix(adapter.dA, adapter.dA_row, dA);
  if (x_grad || A_grad) LoraKernels(x).backward_in(p);
  return {dx, dA};
}

#if !defined(TRIFUSE_CUDA) && !defined(TRIFUSE_EMULATED)
// The forward pass of plain arguments; y is empty where they are not what this takes.
std::tuple<Tensor, Tensor> lora_linear_plain(Tensor x, Tensor weight, OptionalTensor bias, Tensor lora_A, Tensor lora_B,
                                             double scale, int64_t active_rank, double dropout, OptionalTensor seed,
                                             bool merged, bool save) {
  if (!takes_plain(x, weight, bias, lora_A, lora_B, active_rank) ||
      (merged && x.scalar_type() != accumulation_type(x))) {
    return {empty({0}, ScalarType::Float, x), x};
  }
  const Tensor y = empty_beside(x, weight.size(0)), rows = as_matrix(x);
  const OptionalTensor factors;
  const LoraLayer layer{rows, weight, lora_A, lora_B, scale, factors, active_rank, false, dropout, seed, merged};
  return {y, lora_forward(as_matrix(y), layer, bias, save)};
}

// Its backward pass.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_plain_bwd(Tensor dy, Tensor x, Tensor weight,
                                                                         Tensor lora_A, Tensor lora_B, Tensor S,
                                                                         double scale, int64_t active_rank, bool frozen,
                                                                         double dropout, OptionalTensor seed,
                                                                         bool merged, std::vector<bool> needs) {
  const Tensor rows = as_matrix(x);
  const OptionalTensor factors;
  const LoraLayer layer{rows, weight, lora_A, lora_B, scale, factors, active_rank, frozen, dropout, seed, merged};
  const LoraGradients grads =
      lora_backward(layer, as_matrix(dy), S, {needs[0], needs[1], needs[2], needs[3], needs[4], false});
  const auto given = [&](const OptionalTensor& grad, ScalarType of) { return given_or_empty(grad, of, x); };
  const ScalarType dtype = x.scalar_type(), adapter_dtype = lora_A.scalar_type();
  return {given(shaped_as(grads.x, x), dtype), given(grads.weight, dtype), given(grads.bias, dtype),
          given(grads.A, adapter_dtype), given(grads.B, adapter_dtype)};
}
#endif

TRIFUSE_IMPL(m) {
#if !defined(TRIFUSE_CUDA) && !defined(TRIFUSE_EMULATED)
  m.impl("lora_linear_plain", TORCH_BOX(&lora_linear_plain));
  m.impl("lora_linear_plain_bwd", TORCH_BOX(&lora_linear_plain_bwd));
#endif
  m.impl("lora_linear_fwd", TORCH_BOX(&lora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&lora_linear_bwd));
  m.impl("lora_down", TORCH_BOX(&lora_down));
  m.impl("lora_down_bwd", TORCH_BOX(&lora_down_bwd));
}

}  // namespace
}  // namespace trifuse
