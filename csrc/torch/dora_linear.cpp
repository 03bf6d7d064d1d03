// dora_linear as torch ops on CPUs: lora_linear's, and the factors of the columns. On GPUs both are put together in
// Python, in registration/.
#if !defined(TRIFUSE_CUDA) && !defined(TRIFUSE_EMULATED)

#include "trifuse/dora_linear.h"

#include "common.h"

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

TRIFUSE_IMPL(m) {
  m.impl("dora_scale", TORCH_BOX(&dora_scale));
  m.impl("dora_scale_bwd", TORCH_BOX(&dora_scale_bwd));
}

}  // namespace
}  // namespace trifuse

#endif
