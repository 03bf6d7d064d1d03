// The layer y = x W^T + bias + ((x~ A^T) o p) B^T of torch tensors, forward and backward: what lora_linear is, and what
// dora_linear scales.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "common.h"
#include "products.h"
#include "trifuse/lora_linear.h"

namespace trifuse {
namespace {

// What it refers to has to live as long as it is used.
struct LoraLayer {
  const Tensor& x;  // (M, K), rows contiguous
  const Tensor& weight;
  const Tensor& lora_A;
  const Tensor& lora_B;
  double scale = 1;
  const OptionalTensor& factors;  // one per rank, times scale; or none
  int64_t active_rank = 0;
  bool frozen = false;
  double dropout = 0;
  const OptionalTensor& seed;
  bool merged = false;
};

// The call's sizes and its one adapter; the returned struct points to `adapter`.
inline LoraParams params_of(const LoraLayer& layer, LoraAdapter& adapter) {
  const Tensor &x = layer.x, &A = layer.lora_A, &B = layer.lora_B;
  LoraParams p;
  p.rows = x.size(0);
  p.in = x.size(1);
  p.out = layer.weight.size(0);
  p.dtype = dtype_of(x);
  p.adapter_dtype = dtype_of(A);
  STD_TORCH_CHECK(A.size(1) == p.in && B.size(0) == p.out && A.size(0) >= layer.active_rank &&
                      B.size(1) >= layer.active_rank && layer.active_rank > 0 &&
                      x.scalar_type() == layer.weight.scalar_type() && B.scalar_type() == A.scalar_type(),
                  "lora_linear: sizes or dtypes do not fit");
  p.x = x.data_ptr();
  p.x_row = x.stride(0);
  adapter.A = A.data_ptr();
  adapter.A_row = A.stride(0);
  adapter.B = B.data_ptr();
  adapter.B_row = B.stride(0);
  adapter.p = pointer(layer.factors);
  adapter.scale = layer.scale;
  adapter.rank = layer.active_rank;
  adapter.first = layer.frozen ? layer.active_rank - 1 : 0;
  adapter.end = p.rows;
  p.adapters = &adapter;
  p.n_adapters = 1;
  p.max_rank = layer.active_rank;
  if (layer.seed) {
    p.seed = static_cast<const int64_t*>(layer.seed->data_ptr());
    p.threshold = uint32_t(std::min(layer.dropout * 4294967296.0 + 0.5, 4294967295.0));
    p.keep_scale = 1 / (1 - layer.dropout);
  }
  return p;
}

// t, or a copy of it whose rows are contiguous: a trace may have been made with other strides.
inline Tensor with_whole_rows(const Tensor& t) {
  return t.dim() == 2 && (t.stride(1) == 1 || t.size(1) <= 1) ? t : torch::stable::contiguous(t);
}

inline void set_matrix(void*& ptr, int64_t& row, const Tensor& t) {
  ptr = t.data_ptr();
  row = t.stride(0);
}

// W + B diag(scale * factors) A, for weights in the accumulation dtype.
inline Tensor merged_weight(const LoraLayer& layer) {
  const Tensor merged = empty_as(layer.weight);
  Tensor A = layer.lora_A, B = layer.lora_B;
  B = torch::stable::narrow(B, 1, 0, layer.active_rank);
  if (layer.factors) {
    Tensor some = *layer.factors;
    B = multiplied(B, torch::stable::narrow(some, 0, 0, layer.active_rank));
  }
  sum_into(merged, layer.weight, B, torch::stable::narrow(A, 0, 0, layer.active_rank), layer.scale);
  return merged;
}

// The launches of this device; scratch memory of CUDA's split sums is torch's.
struct LoraKernels {
#if defined(TRIFUSE_CUDA) || defined(TRIFUSE_EMULATED)
  explicit LoraKernels(const Tensor& like) : stream(current_stream(like)), like(like) {}
  void down(const LoraParams& p) { check_launch(cuda::lora_down(p, scratch(p), stream), "lora_linear"); }
  void up(const LoraParams& p) { check_launch(cuda::lora_up(p, stream), "lora_linear"); }
  void backward_out(const LoraParams& p) {
    check_launch(cuda::lora_backward_out(p, scratch(p), stream), "lora_linear's gradient");
  }
  void backward_in(const LoraParams& p) {
    check_launch(cuda::lora_backward_in(p, scratch(p), stream), "lora_linear's gradient");
  }
  void* scratch(const LoraParams& p) {
    if (!memory) memory = empty({cuda::lora_scratch_bytes(p)}, ScalarType::Byte, like);
    return memory->data_ptr();
  }
  cuda::Stream stream;
  Tensor like;
  OptionalTensor memory;
#else
  explicit LoraKernels(const Tensor&) {}
  void down(const LoraParams& p) { cpu::lora_down(p, torch_threads()); }
  void up(const LoraParams& p) { cpu::lora_up(p, torch_threads()); }
  void backward_out(const LoraParams& p) { cpu::lora_backward_out(p, torch_threads()); }
  void backward_in(const LoraParams& p) { cpu::lora_backward_in(p, torch_threads()); }
#endif
};

// The output into y (M, N); returns S, of no rows if it is not to be saved.
inline Tensor lora_forward(const Tensor& y, const LoraLayer& layer, const OptionalTensor& bias, bool save) {
  LoraAdapter adapter;
  LoraParams p = params_of(layer, adapter);
  const bool rides = !layer.merged;
  const ScalarType acc = accumulation_type(layer.x);
  const Tensor S = empty({rides || save ? p.rows : 0, layer.active_rank}, acc, layer.x);
  set_matrix(p.S, p.S_row, S);
  set_matrix(p.y, p.y_row, y);
  if (bias) p.bias = bias->data_ptr();
  LoraKernels kernels(layer.x);
  if (rides || save) kernels.down(p);
  if (rides) {
    kernels.up(p);
    add_product(y, layer.x, transposed(layer.weight));
  } else {
    linear_into(y, layer.x, merged_weight(layer), bias);
  }
  return save || !rides ? S : empty({0, layer.active_rank}, acc, layer.x);
}

// What is asked of the backward pass, and what it gives: none of what is not asked.
struct LoraNeeds {
  bool x = false, weight = false, bias = false, A = false, B = false, p = false;
};
struct LoraGradients {
  OptionalTensor x, weight, bias, A, B, p;
};

inline Tensor given_or_empty(const OptionalTensor& grad, ScalarType dtype, const Tensor& device_of) {
  return grad ? *grad : empty({0}, dtype, device_of);
}

// A factor's gradient in full size, of which the kernel writes the ranks that have one.
inline Tensor factor_gradient(const Tensor& like, bool whole) {
  return whole ? empty_as(like) : torch::stable::new_zeros(like, {like.size(0), like.size(1)});
}

// `dy` (M, N) is contiguous. `dora` is what scales dy first, on a CPU, or null: its dplain then takes dy's place, but
// for the bias.
inline LoraGradients lora_backward(const LoraLayer& layer, const Tensor& dy, Tensor S, const LoraNeeds& needs,
                                   const DoraParams* dora = nullptr, const OptionalTensor& dplain = std::nullopt) {
  LoraAdapter adapter;
  LoraParams p = params_of(layer, adapter);
  const Tensor& x = layer.x;
  const ScalarType acc = accumulation_type(x);
  const bool whole = !layer.frozen && layer.active_rank == layer.lora_A.size(0);
  p.dy = dy.data_ptr();
  p.dy_row = dy.stride(0);
  STD_TORCH_CHECK(dy.dim() == 2 && dy.size(0) == p.rows && dy.size(1) == p.out, "lora_linear: dy does not fit");
  LoraGradients grads;
  if (needs.x) grads.x = empty({p.rows, p.in}, x.scalar_type(), x);
  if (needs.A) grads.A = factor_gradient(layer.lora_A, whole);
  if (needs.B) grads.B = factor_gradient(layer.lora_B, whole);

  LoraKernels kernels(x);
  OptionalTensor Z;
  const bool through_x = needs.x && !layer.merged;
  if (needs.A || needs.B || needs.p || through_x) {
    const std::vector<int64_t> size{p.rows, layer.active_rank};
    // Of no columns nothing is summed.
    Z = p.out > 0 ? empty(size, acc, x) : torch::stable::new_zeros(x, size, acc);
    set_matrix(p.Z, p.Z_row, *Z);
    const bool kept = S.size(0) == p.rows;
    if (!kept) S = empty(size, acc, x);
    set_matrix(p.S, p.S_row, S);
    if (!kept && (needs.B || needs.p)) kernels.down(p);
    if (needs.B) set_matrix(adapter.dB, adapter.dB_row, *grads.B);
    p.dora = dora;
    kernels.backward_out(p);
  }
#if !defined(TRIFUSE_CUDA) && !defined(TRIFUSE_EMULATED)
  if (dora && !Z) cpu::dora_scale_backward(*dora, torch_threads());
#endif
  const Tensor& product_of = dora ? *dplain : dy;
  if (needs.p) {
    grads.p = torch::stable::new_zeros(*Z, {layer.lora_A.size(0)});
    const int64_t first = adapter.first, count = layer.active_rank - first;
    Tensor to = *grads.p;
    column_sums_into(torch::stable::narrow(to, 0, first, count),
                     multiplied(torch::stable::narrow(S, 1, first, count), torch::stable::narrow(*Z, 1, first, count)));
  }
  if (needs.A) set_matrix(adapter.dA, adapter.dA_row, *grads.A);
  if (through_x) set_matrix(p.dx, p.dx_row, *grads.x);
  if (needs.A || through_x) kernels.backward_in(p);
  if (through_x) {
    add_product(*grads.x, product_of, layer.weight);
  } else if (needs.x) {
    product_into(*grads.x, product_of, merged_weight(layer));
  }
  if (needs.weight) {
    grads.weight = empty({p.out, p.in}, layer.weight.scalar_type(), x);
    product_into(*grads.weight, transposed(product_of), x);
  }
  if (needs.bias) {
    grads.bias = empty({p.out}, layer.weight.scalar_type(), x);
    column_sums_into(*grads.bias, dy);
  }
  return grads;
}

#if !defined(TRIFUSE_CUDA) && !defined(TRIFUSE_EMULATED)
// The plain ways: calls on a CPU whose arguments nothing has looked at yet, x of any shape. Beside the product of a
// small layer every line of Python counts.

inline bool is_plain_matrix(const Tensor& t, int64_t rows, int64_t columns) {
  return t.is_cpu() && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous();
}
inline bool is_plain_vector(const Tensor& t, int64_t size, ScalarType dtype) {
  return t.is_cpu() && t.dim() == 1 && t.size(0) == size && t.scalar_type() == dtype && t.is_contiguous();
}

inline bool takes_plain(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                        const Tensor& lora_B, int64_t active_rank) {
  const char* forced = std::getenv("TRIFUSE_BACKEND");
  if (forced && *forced && std::strcmp(forced, "cpp") != 0) return false;
  const int64_t dims = x.dim();
  if (!x.is_cpu() || dims < 1 || !x.is_contiguous() || weight.dim() != 2 || lora_A.dim() != 2) return false;
  const int64_t out = weight.size(0), in = weight.size(1), rank = lora_A.size(0);
  const ScalarType dtype = x.scalar_type(), adapter_dtype = lora_A.scalar_type();
  const bool known = dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                     dtype == ScalarType::Double;
  return known && x.size(dims - 1) == in && in > 0 && x.numel() > 0 && out > 0 && active_rank > 0 &&
         active_rank <= rank && weight.scalar_type() == dtype && lora_B.scalar_type() == adapter_dtype &&
         (adapter_dtype == dtype || adapter_dtype == accumulation_type(x)) && is_plain_matrix(weight, out, in) &&
         is_plain_matrix(lora_A, rank, in) && is_plain_matrix(lora_B, out, rank) &&
         (!bias || is_plain_vector(*bias, out, dtype));
}

// A tensor like x with another last dimension: of its final shape, as autograd lets nobody change a view in place.
inline Tensor empty_beside(const Tensor& x, int64_t columns) {
  std::vector<int64_t> size;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) size.push_back(x.size(i));
  size.push_back(columns);
  return empty(size, x.scalar_type(), x);
}

// Contiguous, as a matrix.
inline Tensor as_matrix(const Tensor& t) {
  const Tensor whole = t.is_contiguous() ? t : torch::stable::contiguous(t);
  const int64_t columns = t.size(t.dim() - 1);
  return t.dim() == 2 ? whole : torch::stable::view(whole, {t.numel() / columns, columns});
}
inline OptionalTensor shaped_as(const OptionalTensor& t, const Tensor& like) {
  if (!t || like.dim() == 2) return t;
  std::vector<int64_t> size;
  for (int64_t i = 0; i < like.dim(); ++i) size.push_back(like.size(i));
  return torch::stable::view(*t, size);
}
#endif

}  // namespace
}  // namespace trifuse
