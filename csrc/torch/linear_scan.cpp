// linear_scan as torch ops: allocation, views, registration. The schemas and every check of the public
// arguments are in Python, in registration/ and ops/.
#include "trifuse/linear_scan.h"

#include "common.h"

namespace trifuse {
namespace {

DType real_dtype_of(const Tensor& t) {
  if (t.scalar_type() == ScalarType::ComplexFloat) return DType::kFloat32;
  if (t.scalar_type() == ScalarType::ComplexDouble) return DType::kFloat64;
  return dtype_of(t);
}

ScalarType state_dtype_of(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ? ScalarType::Float : dtype;
}

void fill(LinearScanShape& p, const Tensor& a, const Tensor& b, const OptionalTensor& cu_seqlens, bool reverse) {
  p.batch = b.size(0);
  p.dim = b.size(1);
  p.seqlen = b.size(2);
  p.dtype = real_dtype_of(b);
  p.a_complex = is_complex(a);
  p.b_complex = is_complex(b);
  p.reverse = reverse;
  STD_TORCH_CHECK(real_dtype_of(a) == p.dtype && p.a_complex <= p.b_complex,
                  "linear_scan: a must have the dtype of b or of its real part");
  if (!cu_seqlens) return;
  p.cu_seqlens = static_cast<const int64_t*>(cu_seqlens->data_ptr());
  p.num_seqs = cu_seqlens->size(0) - 1;
#if !defined(TRIFUSE_CUDA)
  // Traced code reaches this without the checks in Python, and a wrong offset would be read past the end.
  bool good = p.cu_seqlens[0] == 0 && p.cu_seqlens[p.num_seqs] == p.seqlen;
  for (int64_t i = 0; i < p.num_seqs; ++i) good = good && p.cu_seqlens[i] <= p.cu_seqlens[i + 1];
  STD_TORCH_CHECK(good, "linear_scan: cu_seqlens must start at 0, never decrease and end at T = ", p.seqlen);
#endif
}

#if defined(TRIFUSE_CUDA) || defined(TRIFUSE_EMULATED)

template <class Params>
Tensor workspace_for(const Params& p, const Tensor& on) {
  return empty({cuda::linear_scan_workspace_bytes(p)}, ScalarType::Byte, on);
}
void launch(const LinearScanParams& p, const Tensor& on) {
  const Tensor workspace = workspace_for(p, on);
  check_launch(cuda::linear_scan_fwd(p, workspace.data_ptr(), current_stream(on)), "linear_scan forward");
}
void launch(const LinearScanBwdParams& p, const Tensor& on) {
  const Tensor workspace = workspace_for(p, on);
  check_launch(cuda::linear_scan_bwd(p, workspace.data_ptr(), current_stream(on)), "linear_scan backward");
}

#else

void launch(const LinearScanParams& p, const Tensor&) { cpu::linear_scan_fwd(p, torch_threads()); }
void launch(const LinearScanBwdParams& p, const Tensor&) { cpu::linear_scan_bwd(p, torch_threads()); }

#endif

std::tuple<Tensor, Tensor> linear_scan_fwd(Tensor a, Tensor b, OptionalTensor initial_state, OptionalTensor cu_seqlens,
                                           bool reverse, bool bld) {
  LinearScanParams p;
  fill(p, a, b, cu_seqlens, reverse);
  const Tensor h = empty_sequence(b, bld);
  const Tensor last_state = empty({p.state_rows(), p.dim}, state_dtype_of(b), b);
  p.a = sequence_view(a);
  p.b = sequence_view(b);
  p.h = sequence_view(h);
  p.initial_state = pointer(initial_state);
  p.last_state = last_state.data_ptr();
  launch(p, b);
  return {h, last_state};
}

std::tuple<Tensor, Tensor, Tensor> linear_scan_bwd(Tensor dh, OptionalTensor dlast_state, Tensor a, Tensor h,
                                                   OptionalTensor initial_state, OptionalTensor cu_seqlens,
                                                   bool reverse, bool bld) {
  LinearScanBwdParams p;
  fill(p, a, h, cu_seqlens, reverse);
  const Tensor da = empty_sequence(a, bld), db = empty_sequence(h, bld);
  const Tensor dinitial_state = empty(
      initial_state ? std::vector<int64_t>{p.state_rows(), p.dim} : std::vector<int64_t>{0}, state_dtype_of(h), h);
  if (dlast_state) dlast_state = torch::stable::contiguous(*dlast_state);
  p.a = sequence_view(a);
  p.h = sequence_view(h);
  p.dh = sequence_view(dh);
  p.da = sequence_view(da);
  p.db = sequence_view(db);
  p.initial_state = pointer(initial_state);
  p.dlast_state = pointer(dlast_state);
  if (initial_state) p.dinitial_state = dinitial_state.data_ptr();
  launch(p, h);
  return {da, db, dinitial_state};
}

TRIFUSE_IMPL(m) {
  m.impl("linear_scan_fwd", TORCH_BOX(&linear_scan_fwd));
  m.impl("linear_scan_bwd", TORCH_BOX(&linear_scan_bwd));
}

}  // namespace
}  // namespace trifuse
