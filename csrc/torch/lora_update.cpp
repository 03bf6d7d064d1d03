// lora_update as a torch op: checks, views, registration. The schema and every check of the public arguments are in
// Python, in registration/ and ops/.
#include "trifuse/lora_update.h"

#include "common.h"

namespace trifuse {
namespace {

constexpr const char* kOp = "lora_update";

// Rows apart by at least their length: no two elements of a matrix share memory.
bool has_contiguous_columns(const Tensor& t) {
  return (t.size(1) <= 1 || t.stride(1) == 1) && (t.size(0) <= 1 || t.stride(0) >= t.size(1));
}

bool is_matrix(const Tensor& t, int64_t rows, int64_t columns) {
  return t.dim() == 2 && t.size(0) == rows && t.size(1) == columns;
}

// out is the weight where none is given. Sums (2,), or nothing unless asked for.
Tensor lora_update(Tensor out, OptionalTensor given, Tensor lora_A, Tensor lora_B, double scale, OptionalTensor factors,
                   int64_t active_rank, OptionalTensor seed, bool measure) {
  STD_TORCH_CHECK(out.dim() == 2 && lora_A.dim() == 2, kOp, ": out must be (N, K) and lora_A (r, K)");
  const int64_t rank = lora_A.size(0);
  STD_TORCH_CHECK(is_matrix(lora_A, rank, out.size(1)) && is_matrix(lora_B, out.size(0), rank), kOp,
                  ": lora_A must be (r, K) and lora_B (N, r)");
  STD_TORCH_CHECK(active_rank >= 0 && active_rank <= rank, kOp, ": active_rank must be 0 to r");
  LoraUpdateParams p;
  p.dtype = dtype_of(out);
  p.adapter_dtype = dtype_of(lora_A);
  const DType acc = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  STD_TORCH_CHECK((p.adapter_dtype == p.dtype || p.adapter_dtype == acc) && dtype_of(lora_B) == p.adapter_dtype, kOp,
                  ": lora_A and lora_B must be in the accumulation dtype or in that of the weight");
  STD_TORCH_CHECK(!factors || (factors->dim() == 1 && factors->size(0) >= active_rank && factors->is_contiguous() &&
                               dtype_of(*factors) == acc),
                  kOp, ": p must be (r,), contiguous, in the accumulation dtype");
  STD_TORCH_CHECK(!seed || (seed->numel() == 1 && seed->scalar_type() == ScalarType::Long), kOp,
                  ": seed must be an int64 tensor of one element");
  Tensor weight = given ? *given : out;
  STD_TORCH_CHECK(is_matrix(weight, out.size(0), out.size(1)) && dtype_of(weight) == p.dtype, kOp,
                  ": weight and out must have one shape and one dtype");
  p.transposed = !(has_contiguous_columns(out) && has_contiguous_columns(weight));
  if (p.transposed) {
    out = torch::stable::transpose(out, 0, 1);
    weight = torch::stable::transpose(weight, 0, 1);
    STD_TORCH_CHECK(has_contiguous_columns(out) && has_contiguous_columns(weight), kOp,
                    ": rows or columns of weight and out must be contiguous");
  }
  p.rows = out.size(0);
  p.columns = out.size(1);
  p.rank = active_rank;
  p.weight = weight.data_ptr();
  p.weight_row = weight.stride(0);
  p.out = out.data_ptr();
  p.out_row = out.stride(0);
  const Tensor &A = p.transposed ? lora_B : lora_A, &B = p.transposed ? lora_A : lora_B;
  const int across = p.transposed ? 1 : 0;  // the axis of ranks of A; that of B is the other
  p.A = A.data_ptr();
  p.A_row = A.stride(across);
  p.A_column = A.stride(1 - across);
  p.B = B.data_ptr();
  p.B_row = B.stride(across);
  p.B_column = B.stride(1 - across);
  p.p = pointer(factors);
  p.scale = scale;
  p.seed = static_cast<const int64_t*>(pointer(seed));
  const Tensor sums = empty({measure ? 2 : 0}, ScalarType::Double, out);
  if (measure) p.sums = static_cast<double*>(sums.data_ptr());
#if defined(TRIFUSE_CUDA) || defined(TRIFUSE_EMULATED)
  const Tensor scratch = empty({cuda::lora_update_scratch_bytes(p)}, ScalarType::Byte, out);
  check_launch(cuda::lora_update(p, scratch.data_ptr(), current_stream(out)), kOp);
#else
  cpu::lora_update(p, torch_threads());
#endif
  return sums;
}

TRIFUSE_IMPL(m) { m.impl("lora_update", TORCH_BOX(&lora_update)); }

}  // namespace
}  // namespace trifuse
