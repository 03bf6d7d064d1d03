// dora_linear as torch ops on CPUs: lora_linear's, and the factors of the columns. On GPUs both are put together in
// Python, in registration/.
#if !defined(TRIFUSE_CUDA) && !defined(TRIFUSE_EMULATED)

#include "trifuse/dora_linear.h"

#include "lora_layer.h"

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
  STD_TORCH_CHECK(dy.dim() == 2 && dy.size(0) == p.rows && dy.size(1) == p.columns,
                  "dora_scale: dy must have the size of plain");
  const Tensor dplain = empty({p.rows, p.columns}, plain.scalar_type(), plain);
  const Tensor dfactors = empty({factors_grad ? p.columns : 0}, factors.scalar_type(), plain);
  p.dy = dy.data_ptr();
  p.dplain = dplain.data_ptr();
  if (factors_grad) p.dfactors = dfactors.data_ptr();
  cpu::dora_scale_backward(p, torch_threads());
  return {dplain, dfactors};
}

Tensor norm_of(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scale,
               const OptionalTensor& factors) {
  DoraNormParams p;
  p.rows = weight.size(0);
  p.columns = weight.size(1);
  p.rank = lora_A.size(0);
  p.dtype = dtype_of(weight);
  p.adapter_dtype = dtype_of(lora_B);
  p.weight = weight.data_ptr();
  p.weight_row = weight.stride(0);
  p.A = lora_A.data_ptr();
  p.A_row = lora_A.stride(0);
  p.B = lora_B.data_ptr();
  p.B_row = lora_B.stride(0);
  p.scale = scale;
  p.p = pointer(factors);
  const Tensor norm = empty({p.rows}, accumulation_type(weight), weight);
  p.norm = norm.data_ptr();
  cpu::dora_norm(p, torch_threads());
  return norm;
}

// The norms where no gradient is asked of them.
Tensor dora_norm_fwd(Tensor weight, Tensor lora_A, Tensor lora_B, double scale, OptionalTensor factors) {
  STD_TORCH_CHECK(weight.dim() == 2 && lora_A.dim() == 2 && lora_B.dim() == 2 && lora_A.size(1) == weight.size(1) &&
                      lora_B.size(0) == weight.size(0) && lora_A.size(0) == lora_B.size(1) && lora_A.size(0) > 0 &&
                      lora_A.scalar_type() == lora_B.scalar_type(),
                  "dora_norm: sizes or dtypes do not fit");
  return norm_of(weight, lora_A, lora_B, scale, factors);
}

// a / norm, of a norm of zero zero.
template <class T>
void divide_by_norm(T* quotient, const T* a, const T* norm, int64_t n) {
  for (int64_t i = 0; i < n; ++i) quotient[i] = norm[i] > 0 ? a[i] / norm[i] : T(0);
}
Tensor over_norm(const Tensor& a, const Tensor& norm) {
  const Tensor quotient = empty({norm.size(0)}, norm.scalar_type(), norm);
  if (norm.scalar_type() == ScalarType::Double) {
    divide_by_norm(static_cast<double*>(quotient.data_ptr()), static_cast<const double*>(a.data_ptr()),
                   static_cast<const double*>(norm.data_ptr()), norm.size(0));
  } else {
    divide_by_norm(static_cast<float*>(quotient.data_ptr()), static_cast<const float*>(a.data_ptr()),
                   static_cast<const float*>(norm.data_ptr()), norm.size(0));
  }
  return quotient;
}

// The forward pass of plain arguments in float32 or float64, the norms constants; y is empty where they are not what
// this takes. The product that the magnitude scales is kept for its gradient only.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dora_linear_plain(Tensor x, Tensor weight, OptionalTensor bias,
                                                                     Tensor lora_A, Tensor lora_B, Tensor magnitude,
                                                                     double scale, double dropout, OptionalTensor seed,
                                                                     bool save, bool save_plain) {
  const ScalarType dtype = x.scalar_type();
  if (lora_A.dim() != 2 || weight.dim() != 2 || dtype != accumulation_type(x) || lora_A.scalar_type() != dtype ||
      !takes_plain(x, weight, bias, lora_A, lora_B, lora_A.size(0)) ||
      !is_plain_vector(magnitude, weight.size(0), dtype)) {
    return {empty({0}, ScalarType::Float, x), x, x, x, x};
  }
  const OptionalTensor factors;
  const Tensor norm = norm_of(weight, lora_A, lora_B, scale, factors), columns = over_norm(magnitude, norm);
  const Tensor y = empty_beside(x, weight.size(0)), rows = as_matrix(x), out = as_matrix(y);
  const LoraLayer layer{rows, weight, lora_A, lora_B, scale, factors, lora_A.size(0), false, dropout, seed, false};
  const Tensor plain = save_plain ? empty_as(out) : out;
  const Tensor S = lora_forward(plain, layer, std::nullopt, save);
  DoraParams p = params(plain, columns);
  p.bias = pointer(bias);
  p.y = out.data_ptr();
  cpu::dora_scale(p, torch_threads());
  return {y, save_plain ? plain : empty({0, plain.size(1)}, dtype, x), S, norm, columns};
}

// Memory like t's. Every thread keeps what it last took of it, up to 16 MB: fresh pages in every call would cost as
// much as the pass that writes them.
Tensor scratch_like(const Tensor& t) {
  constexpr int64_t most = int64_t(16) << 20;
  thread_local OptionalTensor kept;
  if (kept && kept->scalar_type() == t.scalar_type() && is_plain_matrix(*kept, t.size(0), t.size(1))) return *kept;
  const Tensor made = empty_as(t);
  if (t.numel() * t.element_size() <= most) kept = made;
  return made;
}

// Its backward pass; `columns` are magnitude / norm.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dora_linear_plain_bwd(
    Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor S, Tensor plain, Tensor norm,
    Tensor columns, double scale, double dropout, OptionalTensor seed, std::vector<bool> needs) {
  const Tensor rows = as_matrix(x), dout = as_matrix(dy);
  const OptionalTensor factors;
  const LoraLayer layer{rows, weight, lora_A, lora_B, scale, factors, lora_A.size(0), false, dropout, seed, false};
  const OptionalTensor dplain = scratch_like(dout);
  DoraParams p = params(*dplain, columns);
  p.plain = plain.data_ptr();
  p.dy = dout.data_ptr();
  p.dplain = dplain->data_ptr();
  OptionalTensor dmagnitude;
  if (needs[5]) {
    dmagnitude = empty_as(norm);
    p.dfactors = dmagnitude->data_ptr();
  }
  const LoraGradients grads =
      lora_backward(layer, dout, S, {needs[0], needs[1], needs[2], needs[3], needs[4], false}, &p, dplain);
  if (dmagnitude) dmagnitude = over_norm(*dmagnitude, norm);
  const auto given = [&](const OptionalTensor& grad) { return given_or_empty(grad, x.scalar_type(), x); };
  return {given(shaped_as(grads.x, x)),
          given(grads.weight),
          given(grads.bias),
          given(grads.A),
          given(grads.B),
          given(dmagnitude)};
}

TRIFUSE_IMPL(m) {
  m.impl("dora_linear_plain", TORCH_BOX(&dora_linear_plain));
  m.impl("dora_linear_plain_bwd", TORCH_BOX(&dora_linear_plain_bwd));
  m.impl("dora_norm_fwd", TORCH_BOX(&dora_norm_fwd));
  m.impl("dora_scale", TORCH_BOX(&dora_scale));
  m.impl("dora_scale_bwd", TORCH_BOX(&dora_scale_bwd));
}

}  // namespace
}  // namespace trifuse

#endif
