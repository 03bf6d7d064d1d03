// gmm_attention_step as torch ops: allocation, views, registration. The schemas and every check of the public
// arguments are in Python, in registration/ and ops/. GPUs are served by Triton: there is nothing to compile for them.
#if !defined(TRIFUSE_CUDA) && !defined(TRIFUSE_EMULATED)

#include "trifuse/gmm_attention_step.h"

#include "common.h"

namespace trifuse {
namespace {

MixtureView mixture_view(const Tensor& t, const GmmAttentionShape& p) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == p.batch && t.size(1) == p.components &&
                      t.scalar_type() == (p.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float),
                  "gmm_attention_step: the mixture's parameters must be (B, K) in the accumulation dtype");
  return {t.data_ptr(), t.stride(0), t.stride(1)};
}

void fill(GmmAttentionShape& p, const Tensor& values, const Tensor& weight, const Tensor& delta, const Tensor& sigma,
          const OptionalTensor& padding) {
  p.batch = values.size(0);
  p.length = values.size(1);
  p.width = values.size(2);
  p.components = weight.size(1);
  p.dtype = dtype_of(values);
  p.values.ptr = values.data_ptr();
  p.values.batch = values.stride(0);
  p.values.time = values.stride(1);
  p.values.dim = values.stride(2);
  p.weight = mixture_view(weight, p);
  p.delta = mixture_view(delta, p);
  p.sigma = mixture_view(sigma, p);
  if (!padding) return;
  STD_TORCH_CHECK(padding->dim() == 2 && padding->size(0) == p.batch && padding->size(1) == p.length &&
                      padding->scalar_type() == ScalarType::Bool,
                  "gmm_attention_step: key_padding_mask must be (B, T), of bools");
  p.padding = static_cast<const bool*>(padding->data_ptr());
  p.padding_batch = padding->stride(0);
  p.padding_time = padding->stride(1);
}

std::tuple<Tensor, Tensor, Tensor> gmm_attention_step_fwd(Tensor values, Tensor weight, Tensor delta, Tensor sigma,
                                                          Tensor mean, OptionalTensor key_padding_mask) {
  GmmAttentionParams p;
  fill(p, values, weight, delta, sigma, key_padding_mask);
  p.mean = mixture_view(mean, p);
  const Tensor context = empty({p.batch, p.width}, values.scalar_type(), values);
  const Tensor mean_new = empty({p.batch, p.components}, weight.scalar_type(), values);
  const Tensor alignment = empty({p.batch, p.length}, weight.scalar_type(), values);
  p.context = context.data_ptr();
  p.mean_new = mean_new.data_ptr();
  p.alignment = alignment.data_ptr();
  cpu::gmm_attention_step_fwd(p, torch_threads());
  return {context, mean_new, alignment};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gmm_attention_step_bwd(
    OptionalTensor dcontext, OptionalTensor dmean_new, OptionalTensor dalignment, Tensor values, Tensor weight,
    Tensor delta, Tensor sigma, Tensor mean_new, Tensor alignment, OptionalTensor key_padding_mask, bool values_grad) {
  GmmAttentionBwdParams p;
  fill(p, values, weight, delta, sigma, key_padding_mask);
  for (OptionalTensor* grad : {&dcontext, &dmean_new, &dalignment}) {
    if (*grad) *grad = torch::stable::contiguous(**grad);
  }
  p.dcontext = pointer(dcontext);
  p.dmean_new = pointer(dmean_new);
  p.dalignment = pointer(dalignment);
  p.mean_new = mean_new.data_ptr();
  p.alignment = alignment.data_ptr();
  const std::vector<int64_t> whole{p.batch, p.length, p.width}, none{0}, mixture{p.batch, p.components};
  const Tensor dvalues = empty(values_grad ? whole : none, values.scalar_type(), values);
  if (values_grad) p.dvalues = dvalues.data_ptr();
  std::array<Tensor, 4> grads;
  for (Tensor& grad : grads) grad = empty(mixture, weight.scalar_type(), values);
  p.dweight = grads[0].data_ptr();
  p.ddelta = grads[1].data_ptr();
  p.dsigma = grads[2].data_ptr();
  p.dmean = grads[3].data_ptr();
  cpu::gmm_attention_step_bwd(p, torch_threads());
  return {dvalues, grads[0], grads[1], grads[2], grads[3]};
}

TRIFUSE_IMPL(m) {
  m.impl("gmm_attention_step_fwd", TORCH_BOX(&gmm_attention_step_fwd));
  m.impl("gmm_attention_step_bwd", TORCH_BOX(&gmm_attention_step_bwd));
}

}  // namespace
}  // namespace trifuse

#endif
