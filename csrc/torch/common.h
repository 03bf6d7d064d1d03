// What every op's torch glue needs: LibTorch's stable ABI and the device this file is compiled for.
// Compiled as it is the kernels are the CPU's; with TRIFUSE_CUDA they are CUDA's; with TRIFUSE_EMULATED
// they are CUDA's as the host compiler built them, on CPU tensors and in a torch library of their own.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <vector>

#if defined(TRIFUSE_CUDA)
#include <torch/csrc/stable/accelerator.h>
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#define TRIFUSE_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(trifuse, CUDA, m)
#elif defined(TRIFUSE_EMULATED)
#define TRIFUSE_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(trifuse_emulated, CPU, m)
#else
#define TRIFUSE_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(trifuse, CPU, m)
#endif

#include "trifuse/types.h"

namespace trifuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default: break;
  }
  STD_TORCH_CHECK(false, "trifuse: a sequence has a dtype that no kernel takes");
  return DType::kFloat32;
}

inline bool is_complex(const Tensor& t) {
  return t.scalar_type() == ScalarType::ComplexFloat || t.scalar_type() == ScalarType::ComplexDouble;
}

// By torch's C shim: looking an op up by its name costs more than a small layer's kernel.
inline Tensor empty(const std::vector<int64_t>& size, ScalarType dtype, const Tensor& device_of) {
  int32_t number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(device_of.get(), size.data(), int64_t(size.size()), &number, nullptr,
                                                   nullptr, 0, nullptr, &made));
  return Tensor(made);
}
inline Tensor empty_as(const Tensor& like) {
  std::vector<int64_t> size;
  for (int64_t i = 0; i < like.dim(); ++i) size.push_back(like.size(i));
  return empty(size, like.scalar_type(), like);
}

inline void* pointer(const OptionalTensor& t) { return t ? t->data_ptr() : nullptr; }

// A (batch, dim, seqlen) tensor.
inline SeqView sequence_view(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// Uninitialised (batch, dim, seqlen), in memory (batch, seqlen, dim) if bld. Strides are asked for, not made
// by a transposition: autograd forbids changing an output in place that is a view.
inline Tensor empty_sequence(const Tensor& like, bool bld) {
  const int64_t batch = like.size(0), dim = like.size(1), seqlen = like.size(2);
  if (!bld) return empty({batch, dim, seqlen}, like.scalar_type(), like);
  using torch::stable::detail::from;
  const std::vector<int64_t> size{batch, dim, seqlen}, stride{dim * seqlen, 1, dim};
  std::array<StableIValue, 7> stack{from(like),         from(size),         from(stride),      from(std::nullopt),
                                    from(std::nullopt), from(std::nullopt), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::new_empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor with_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

#if defined(TRIFUSE_CUDA) || defined(TRIFUSE_EMULATED)
inline void check_launch(cuda::Error error, const char* what) {
  STD_TORCH_CHECK(error == 0, "trifuse: ", what, " failed with CUDA error ", error);
}
#endif

#if defined(TRIFUSE_CUDA)
inline cuda::Stream current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}
#elif defined(TRIFUSE_EMULATED)
inline cuda::Stream current_stream(const Tensor&) { return nullptr; }
#else
// torch's own threads: torch.set_num_threads is obeyed.
inline cpu::Threads torch_threads() {
  return {nullptr,
          [](void*, int64_t n, void* context, void (*body)(void*, int64_t, int64_t)) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          int64_t(torch::stable::get_num_threads())};
}
#endif

}  // namespace trifuse
