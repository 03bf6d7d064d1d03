// Matrix products of the torch that is loaded, into memory that is there already: BLAS on a CPU, cuBLAS on a GPU. They
// are called below autograd and autocast.
#pragma once

#include "common.h"

extern "C" {
AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                                        AtenTensorHandle mat2, double beta, double alpha);
AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat2);
AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                                         AtenTensorHandle mat2, double beta, double alpha);
AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat2);
}

namespace trifuse {

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

inline ScalarType accumulation_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// out = start + factor * a b; `start` may be out, or a row.
inline void sum_into(const Tensor& out, const Tensor& start, const Tensor& a, const Tensor& b, double factor = 1) {
#if defined(TRIFUSE_CUDA)
  TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), start.get(), a.get(), b.get(), 1, factor));
#else
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), start.get(), a.get(), b.get(), 1, factor));
#endif
}

// out = a b
inline void product_into(const Tensor& out, const Tensor& a, const Tensor& b) {
#if defined(TRIFUSE_CUDA)
  TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
#else
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
#endif
}

inline void add_product(const Tensor& out, const Tensor& a, const Tensor& b) { sum_into(out, out, a, b); }

// y = x weight^T + bias
inline void linear_into(const Tensor& y, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  if (bias) {
    sum_into(y, *bias, x, transposed(weight));
  } else {
    product_into(y, x, transposed(weight));
  }
}

inline Tensor multiplied(const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(a), from(b)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The sums of the columns of `t`, into `out`.
inline void column_sums_into(Tensor out, const Tensor& t) {
  const std::array<int64_t, 1> rows{0};
  torch::stable::sum_out(out, t, torch::headeronly::IntHeaderOnlyArrayRef(rows.data(), 1), false, out.scalar_type());
}

}  // namespace trifuse
