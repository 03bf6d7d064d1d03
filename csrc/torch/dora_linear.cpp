// dora_linear as torch ops on CPUs: lora_linear's, and the factors of the columns. On GPUs both are put together in
// Python, in registration/.
#if !defined(TRIFUSE_CUDA) && !defined(TRIFUSE_EMULATED)

#include "trifuse/dora_linear.h"

#include "common.h"
#include "products.h"
#include "trifuse/lora_linear.h"

namespace trifuse {
namespace {

DoraParams params(const Tensor& plain, const Tensor& factors) {
  STD_TORCH_CHECK(
      plain.dim() == 2 && plain.is_contiguous() && factors.is_contiguous() && factors.numel() == plain.size(1),
      "dora_scale: plain must be (M, N), contiguous, and factors (N,)");
  DoraParams p;
  p.rows = plain.size(0);
  p.columns = plain.size(1);
  p.dtype = dtype_of(plain);
  p.plain = plain.data_ptr();
  p.factors = factors.data_ptr();
  return p;
}

Tensor dora_scale(Tensor plain, Tensor factors, OptionalTensor bias) {
  DoraParams p = params(plain, factors);
  if (bias) *bias = torch::stable::contiguous(*bias);
  p.bias = pointer(bias);
  const Tensor y = empty({p.rows, p.columns}, plain.scalar_type(), plain);
  p.y = y.data_ptr();
  cpu::dora_scale(p, torch_threads());
  return y;
}

std::tuple<Tensor, Tensor> dora_scale_bwd(Tensor dy, Tensor plain, Tensor factors, bool factors_grad) {
  DoraParams p = params(plain, factors);
  dy = torch::stable::contiguous(dy);
  const Tensor dplain = empty({p.rows, p.columns}, plain.scalar_type(), plain);
  const Tensor dfactors = empty({factors_grad ? p.columns : 0}, factors.scalar_type(), plain);
  p.dy = dy.data_ptr();
  p.dplain = dplain.data_ptr();
  if (factors_grad) p.dfactors = dfactors.data_ptr();
  cpu::dora_scale_backward(p, torch_threads());
  return {dplain, dfactors};
}

// x A^T, acc.
Tensor mixed_with(const Tensor& x, const Tensor& lora_A) {
  const int64_t rank = lora_A.size(0);
  LoraAdapter adapter;
  LoraParams p;
  p.rows = adapter.end = x.size(0);
  p.in = x.size(1);
  p.dtype = dtype_of(x);
  p.adapter_dtype = dtype_of(lora_A);
  p.x = x.data_ptr();
  p.x_row = x.stride(0);
  adapter.A = lora_A.data_ptr();
  adapter.A_row = lora_A.stride(0);
  adapter.rank = p.max_rank = rank;
  p.adapters = &adapter;
  p.n_adapters = 1;
  const Tensor S = empty({p.rows, rank}, accumulation_type(x), x);
  p.S = S.data_ptr();
  p.S_row = rank;
  cpu::lora_down(p, torch_threads());
  return S;
}

// The norms where no gradient is asked of them.
Tensor dora_norm_fwd(Tensor weight, Tensor lora_A, Tensor lora_B, double scale, OptionalTensor factors) {
  STD_TORCH_CHECK(weight.dim() == 2 && lora_A.dim() == 2 && lora_B.dim() == 2 && lora_A.size(1) == weight.size(1) &&
                      lora_B.size(0) == weight.size(0) && lora_A.size(0) == lora_B.size(1) && lora_A.size(0) > 0 &&
                      lora_A.scalar_type() == lora_B.scalar_type(),
                  "dora_norm: sizes or dtypes do not fit");
  DoraNormParams p;
  p.rows = weight.size(0);
  p.columns = weight.size(1);
  p.rank = lora_A.size(0);
  p.dtype = dtype_of(weight);
  p.adapter_dtype = dtype_of(lora_B);
  p.weight = weight.data_ptr();
  p.weight_row = weight.stride(0);
  p.B = lora_B.data_ptr();
  p.B_row = lora_B.stride(0);
  p.scale = scale;
  p.p = pointer(factors);
  const Tensor mixed = mixed_with(weight, lora_A), gram = mixed_with(lora_A, lora_A);
  const Tensor norm = empty({p.rows}, accumulation_type(weight), weight);
  p.mixed = mixed.data_ptr();
  p.gram = gram.data_ptr();
  p.norm = norm.data_ptr();
  cpu::dora_norm(p, torch_threads());
  return norm;
}

TRIFUSE_IMPL(m) {
  m.impl("dora_norm_fwd", TORCH_BOX(&dora_norm_fwd));
  m.impl("dora_scale", TORCH_BOX(&dora_scale));
  m.impl("dora_scale_bwd", TORCH_BOX(&dora_scale_bwd));
}

}  // namespace
}  // namespace trifuse

#endif
