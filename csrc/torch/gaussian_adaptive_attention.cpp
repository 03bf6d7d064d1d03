// gaussian_adaptive_attention as torch ops: allocation, views, registration. The schemas and every check of the
// public arguments are in Python, in registration/ and ops/.
#include "trifuse/gaussian_adaptive_attention.h"

#include "common.h"

namespace trifuse {
namespace {

using Shape = GaussianAdaptiveAttentionShape;
using Forward = GaussianAdaptiveAttentionParams;
using Backward = GaussianAdaptiveAttentionBwdParams;

SliceView view(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }
SliceView view(const OptionalTensor& t) { return t ? view(*t) : SliceView(); }
Tensor like(const Tensor& t) { return empty({t.sizes().begin(), t.sizes().end()}, t.scalar_type(), t); }

void check_shape(const OptionalTensor& t, const Tensor& x, ScalarType dtype, const char* name) {
  if (!t) return;
  bool same = t->dim() == 3 && t->scalar_type() == dtype;
  for (int i = 0; same && i < 3; ++i) same = t->size(i) == x.size(i);
  STD_TORCH_CHECK(same, "gaussian_adaptive_attention: ", name, " must have the shape of x and its dtype");
}

// Traced code reaches this without the checks in Python.
void fill(Shape& p, const Tensor& x, const Tensor& mean_offset, const Tensor& width, const OptionalTensor& mask,
          const std::optional<double>& padding_value, double eps, bool clamped) {
  STD_TORCH_CHECK(x.dim() == 3, "gaussian_adaptive_attention: x must be (outer, axis, inner)");
  p.outer = x.size(0);
  p.length = x.size(1);
  p.inner = x.size(2);
  p.dtype = dtype_of(x);
  const ScalarType acc = p.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  for (const Tensor* t : {&mean_offset, &width}) {
    STD_TORCH_CHECK(t->dim() == 2 && t->scalar_type() == acc && t->is_contiguous() && t->size(0) > 0 &&
                        t->size(0) == width.size(0) && t->size(1) == width.size(1),
                    "gaussian_adaptive_attention: mean_offset and width must be (heads, K), contiguous, float32 "
                    "(float64 beside float64)");
  }
  p.heads = width.size(0);
  p.gaussians = width.size(1);
  STD_TORCH_CHECK(p.heads <= p.length || x.numel() == 0, "gaussian_adaptive_attention: more heads than entries");
  p.clamped = clamped;
  p.padded = padding_value.has_value();
  p.padding_value = padding_value.value_or(0);
  p.eps = eps;
  check_shape(mask, x, ScalarType::Bool, "mask (bool)");
  p.x = view(x);
  p.mask = view(mask);
  p.mean_offset = mean_offset.data_ptr();
  p.width = width.data_ptr();
}

#if defined(TRIFUSE_CUDA) || defined(TRIFUSE_EMULATED)

void launch(const Forward& p, const Tensor& on) {
  const Tensor workspace = empty({cuda::gaussian_adaptive_attention_workspace_bytes(p)}, ScalarType::Byte, on);
  check_launch(cuda::gaussian_adaptive_attention_fwd(p, workspace.data_ptr(), current_stream(on)),
               "gaussian_adaptive_attention forward");
}
void launch(const Backward& p, const Tensor& on) {
  const Tensor workspace = empty({cuda::gaussian_adaptive_attention_workspace_bytes(p)}, ScalarType::Byte, on);
  check_launch(cuda::gaussian_adaptive_attention_bwd(p, workspace.data_ptr(), current_stream(on)),
               "gaussian_adaptive_attention backward");
}

#else

void launch(const Forward& p, const Tensor&) { cpu::gaussian_adaptive_attention_fwd(p, torch_threads()); }
void launch(const Backward& p, const Tensor&) { cpu::gaussian_adaptive_attention_bwd(p, torch_threads()); }

#endif

std::tuple<Tensor, Tensor, Tensor> gaussian_adaptive_attention_fwd(Tensor x, Tensor mean_offset, Tensor width,
                                                                   OptionalTensor mask,
                                                                   std::optional<double> padding_value, double eps,
                                                                   bool clamped, bool return_weights) {
  Forward p;
  fill(p, x, mean_offset, width, mask, padding_value, eps, clamped);
  const Tensor out = like(x), weights = return_weights ? like(x) : empty({0}, x.scalar_type(), x);
  const Tensor stats = empty({3, p.heads, p.outer, p.inner}, width.scalar_type(), x);
  p.out = out.data_ptr();
  if (return_weights) p.weights = weights.data_ptr();
  p.stats = stats.data_ptr();
  launch(p, x);
  return {out, weights, stats};
}

std::tuple<Tensor, Tensor, Tensor> gaussian_adaptive_attention_bwd(OptionalTensor dout, OptionalTensor dweights,
                                                                   Tensor x, Tensor mean_offset, Tensor width,
                                                                   OptionalTensor mask, Tensor stats,
                                                                   std::optional<double> padding_value, double eps,
                                                                   bool clamped) {
  Backward p;
  fill(p, x, mean_offset, width, mask, padding_value, eps, clamped);
  check_shape(dout, x, x.scalar_type(), "dout");
  check_shape(dweights, x, x.scalar_type(), "dweights");
  const bool right_stats = stats.is_contiguous() && stats.scalar_type() == width.scalar_type() &&
                           stats.numel() == 3 * p.heads * p.outer * p.inner;
  STD_TORCH_CHECK(right_stats, "gaussian_adaptive_attention: stats must be those of the forward pass");
  const Tensor dx = like(x), dmean_offset = like(width), dwidth = like(width);
  p.dout = view(dout);
  p.dweights = view(dweights);
  p.stats = stats.data_ptr();
  p.dx = dx.data_ptr();
  p.dmean_offset = dmean_offset.data_ptr();
  p.dwidth = dwidth.data_ptr();
  launch(p, x);
  return {dx, dmean_offset, dwidth};
}

TRIFUSE_IMPL(m) {
  m.impl("gaussian_adaptive_attention_fwd", TORCH_BOX(&gaussian_adaptive_attention_fwd));
  m.impl("gaussian_adaptive_attention_bwd", TORCH_BOX(&gaussian_adaptive_attention_bwd));
}

}  // namespace
}  // namespace trifuse
