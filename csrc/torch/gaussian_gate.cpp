// gaussian_gate as torch ops: allocation, views, registration. The schemas and every check of the public arguments
// are in Python, in registration/ and ops/.
#include "trifuse/gaussian_gate.h"

#include "common.h"

namespace trifuse {
namespace {

SliceView slice_view(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

void fill(GaussianGateShape& p, const Tensor& x, const Tensor& offset, const Tensor& width, const OptionalTensor& alpha,
          const OptionalTensor& mask, int64_t heads, int64_t share, bool outer, double eps, bool squared,
          bool multiply) {
  p.outer = x.size(0);
  p.length = x.size(1);
  p.inner = x.size(2);
  p.dtype = dtype_of(x);
  p.heads = heads;
  p.rows = offset.size(0);
  p.gaussians = offset.size(1);
  p.share = share;
  p.outer_rows = outer;
  p.squared = squared;
  p.multiply = multiply;
  p.eps = eps;
  p.offset = offset.data_ptr();
  p.width = width.data_ptr();
  p.alpha = pointer(alpha);
  if (mask) p.mask = slice_view(*mask);
  STD_TORCH_CHECK(heads >= 1 && share >= 1 && (heads == 1 || p.rows == heads),
                  "gaussian_gate: parameters must have a row for each of the ", heads, " heads");
}

#if defined(TRIFUSE_CUDA) || defined(TRIFUSE_EMULATED)

void launch(const GaussianGateParams& p, const Tensor& on) {
  check_launch(cuda::gaussian_gate_fwd(p, current_stream(on)), "gaussian_gate forward");
}
void launch(const GaussianGateBwdParams& p, const Tensor& on) {
  const Tensor workspace = empty({cuda::gaussian_gate_bwd_workspace_bytes(p)}, ScalarType::Byte, on);
  check_launch(cuda::gaussian_gate_bwd(p, workspace.data_ptr(), current_stream(on)), "gaussian_gate backward");
}

#else

void launch(const GaussianGateParams& p, const Tensor&) { cpu::gaussian_gate_fwd(p, torch_threads()); }
void launch(const GaussianGateBwdParams& p, const Tensor&) { cpu::gaussian_gate_bwd(p, torch_threads()); }

#endif

std::tuple<Tensor, Tensor> gaussian_gate_fwd(Tensor x, Tensor offset, Tensor width, OptionalTensor alpha,
                                             OptionalTensor mask, int64_t heads, int64_t share, bool outer, double eps,
                                             bool squared, bool multiply) {
  GaussianGateParams p;
  fill(p, x, offset, width, alpha, mask, heads, share, outer, eps, squared, multiply);
  const Tensor out = empty({p.outer, p.length, p.inner}, x.scalar_type(), x);
  const Tensor stats = empty({3, heads, p.outer, p.inner}, offset.scalar_type(), x);
  p.x = slice_view(x);
  p.out = slice_view(out);
  p.stats = stats.data_ptr();
  launch(p, x);
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_gate_bwd(Tensor dout, Tensor x, Tensor offset, Tensor width,
                                                             OptionalTensor alpha, OptionalTensor mask, Tensor stats,
                                                             int64_t heads, int64_t share, bool outer, double eps,
                                                             bool squared, bool multiply) {
  GaussianGateBwdParams p;
  fill(p, x, offset, width, alpha, mask, heads, share, outer, eps, squared, multiply);
  const Tensor dx = empty({p.outer, p.length, p.inner}, x.scalar_type(), x);
  const Tensor doffset = empty({p.rows, p.gaussians}, offset.scalar_type(), x);
  const Tensor dwidth = empty({p.rows, p.gaussians}, offset.scalar_type(), x);
  const Tensor dalpha = empty({alpha ? p.rows : 0}, offset.scalar_type(), x);
  p.x = slice_view(x);
  p.dout = slice_view(dout);
  p.dx = slice_view(dx);
  p.stats = stats.data_ptr();
  p.doffset = doffset.data_ptr();
  p.dwidth = dwidth.data_ptr();
  if (alpha) p.dalpha = dalpha.data_ptr();
  launch(p, x);
  return {dx, doffset, dwidth, dalpha};
}

TRIFUSE_IMPL(m) {
  m.impl("gaussian_gate_fwd", TORCH_BOX(&gaussian_gate_fwd));
  m.impl("gaussian_gate_bwd", TORCH_BOX(&gaussian_gate_bwd));
}

}  // namespace
}  // namespace trifuse
