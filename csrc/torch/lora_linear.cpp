// lora_linear as torch ops: allocation, views, the base products, registration. The schemas and every check of the
// public arguments are in Python, in registration/ and ops/.
#include "trifuse/lora_linear.h"

#include <algorithm>
#include <tuple>

#include "common.h"
#include "products.h"

namespace trifuse {
namespace {

void set_dropout(LoraParams& p, double rate, const OptionalTensor& seed) {
  if (!seed) return;
  p.seed = static_cast<const int64_t*>(seed->data_ptr());
  p.threshold = uint32_t(std::min(rate * 4294967296.0 + 0.5, 4294967295.0));
  p.keep_scale = 1 / (1 - rate);
}

// The call's sizes and its one adapter; the returned struct points to `adapter`.
LoraParams params(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scale,
                  const OptionalTensor& factors, int64_t active_rank, LoraAdapter& adapter) {
  LoraParams p;
  p.rows = x.size(0);
  p.in = x.size(1);
  p.out = weight.size(0);
  p.dtype = dtype_of(x);
  p.adapter_dtype = dtype_of(lora_A);
  STD_TORCH_CHECK(lora_A.size(1) == p.in && lora_B.size(0) == p.out && lora_A.size(0) >= active_rank &&
                      lora_B.size(1) >= active_rank && active_rank > 0 && x.scalar_type() == weight.scalar_type() &&
                      lora_B.scalar_type() == lora_A.scalar_type(),
                  "lora_linear: sizes or dtypes do not fit");
  p.x = x.data_ptr();
  p.x_row = x.stride(0);
  adapter.A = lora_A.data_ptr();
  adapter.A_row = lora_A.stride(0);
  adapter.B = lora_B.data_ptr();
  adapter.B_row = lora_B.stride(0);
  adapter.p = pointer(factors);
  adapter.scale = scale;
  adapter.rank = active_rank;
  adapter.end = p.rows;
  p.adapters = &adapter;
  p.n_adapters = 1;
  p.max_rank = active_rank;
  return p;
}

void set_matrix(void*& ptr, int64_t& row, const Tensor& t) {
  ptr = t.data_ptr();
  row = t.stride(0);
}

// W + B diag(scale * factors) A, for weights in the accumulation dtype.
Tensor merged_weight(const Tensor& weight, Tensor lora_A, Tensor lora_B, double scale, const OptionalTensor& factors,
                     int64_t active_rank) {
  const Tensor merged = empty({weight.size(0), weight.size(1)}, weight.scalar_type(), weight);
  Tensor B = torch::stable::narrow(lora_B, 1, 0, active_rank);
  if (factors) {
    Tensor some = *factors;
    B = multiplied(B, torch::stable::narrow(some, 0, 0, active_rank));
  }
  sum_into(merged, weight, B, torch::stable::narrow(lora_A, 0, 0, active_rank), scale);
  return merged;
}

// The launches of this device; scratch memory of CUDA's split sums is torch's.
struct Kernels {
#if defined(TRIFUSE_CUDA) || defined(TRIFUSE_EMULATED)
  explicit Kernels(const Tensor& like) : stream(current_stream(like)), like(like) {}
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
  explicit Kernels(const Tensor&) {}
  void down(const LoraParams& p) { cpu::lora_down(p, torch_threads()); }
  void up(const LoraParams& p) { cpu::lora_up(p, torch_threads()); }
  void backward_out(const LoraParams& p) { cpu::lora_backward_out(p, torch_threads()); }
  void backward_in(const LoraParams& p) { cpu::lora_backward_in(p, torch_threads()); }
#endif
};

// The layer's output into y (M, N); returns S.
Tensor forward_into(const Tensor& y, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                    const Tensor& lora_A, const Tensor& lora_B, double scale, const OptionalTensor& factors,
                    int64_t active_rank, double dropout, const OptionalTensor& seed, bool merged, bool save) {
  LoraAdapter adapter;
  LoraParams p = params(x, weight, lora_A, lora_B, scale, factors, active_rank, adapter);
  set_dropout(p, dropout, seed);
  const ScalarType acc = accumulation_type(x);
  const Tensor S = empty({!merged || save ? p.rows : 0, active_rank}, acc, x);
  set_matrix(p.S, p.S_row, S);
  set_matrix(p.y, p.y_row, y);
  if (bias) p.bias = bias->data_ptr();
  Kernels kernels(x);
  if (!merged || save) kernels.down(p);
  if (merged) {
    linear_into(y, x, merged_weight(weight, lora_A, lora_B, scale, factors, active_rank), bias);
  } else {
    kernels.up(p);
    add_product(y, x, transposed(weight));
  }
  return save ? S : empty({0, active_rank}, acc, x);
}

std::tuple<Tensor, Tensor> lora_linear_fwd(Tensor x, Tensor weight, OptionalTensor bias, Tensor lora_A, Tensor lora_B,
                                           double scale, OptionalTensor factors, int64_t active_rank, bool frozen,
                                           double dropout, OptionalTensor seed, bool merged, bool save) {
  (void)frozen;
  const Tensor y = empty({x.size(0), weight.size(0)}, x.scalar_type(), x);
  return {y,
          forward_into(y, x, weight, bias, lora_A, lora_B, scale, factors, active_rank, dropout, seed, merged, save)};
}

// The gradient of a factor in full size, of which the kernel writes ranks [first, last).
Tensor factor_gradient(const Tensor& like, bool whole) {
  const std::vector<int64_t> size{like.size(0), like.size(1)};
  return whole ? empty(size, like.scalar_type(), like) : torch::stable::new_zeros(like, size);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_bwd(
    Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor S, double scale, OptionalTensor factors,
    int64_t active_rank, bool frozen, double dropout, OptionalTensor seed, bool merged, std::vector<bool> needs) {
  LoraAdapter adapter;
  LoraParams p = params(x, weight, lora_A, lora_B, scale, factors, active_rank, adapter);
  set_dropout(p, dropout, seed);
  dy = torch::stable::contiguous(dy);
  const bool x_grad = needs[0], weight_grad = needs[1], bias_grad = needs[2], A_grad = needs[3], B_grad = needs[4],
             p_grad = needs[5];
  const ScalarType acc = accumulation_type(x);
  const auto nothing = [&](const Tensor& like) { return empty({0}, like.scalar_type(), x); };
  const bool whole = !frozen && active_rank == lora_A.size(0);
  p.dy = dy.data_ptr();
  p.dy_row = dy.stride(0);
  adapter.first = frozen ? active_rank - 1 : 0;
  Tensor dx = x_grad ? empty({p.rows, p.in}, x.scalar_type(), x) : nothing(x);
  Tensor dweight = nothing(weight), dbias = nothing(weight);
  Tensor dA = A_grad ? factor_gradient(lora_A, whole) : nothing(lora_A);
  Tensor dB = B_grad ? factor_gradient(lora_B, whole) : nothing(lora_B);
  Tensor dp = empty({0}, acc, x);

  Kernels kernels(x);
  // Of no columns nothing is summed.
  const std::vector<int64_t> Z_size{p.rows, active_rank};
  const Tensor Z = p.out > 0 ? empty(Z_size, acc, x) : torch::stable::new_zeros(x, Z_size, acc);
  set_matrix(p.Z, p.Z_row, Z);
  if (A_grad || B_grad || p_grad || (x_grad && !merged)) {
    const bool kept = S.size(0) == p.rows;
    if (!kept) S = empty({p.rows, active_rank}, acc, x);
    set_matrix(p.S, p.S_row, S);
    if (!kept && (B_grad || p_grad)) kernels.down(p);
    if (B_grad) set_matrix(adapter.dB, adapter.dB_row, dB);
    kernels.backward_out(p);
  }
  if (p_grad) {
    dp = torch::stable::new_zeros(Z, std::vector<int64_t>{lora_A.size(0)});
    const int64_t first = adapter.first, count = active_rank - first;
    Tensor some = S, other = Z, to = dp;
    column_sums_into(
        torch::stable::narrow(to, 0, first, count),
        multiplied(torch::stable::narrow(some, 1, first, count), torch::stable::narrow(other, 1, first, count)));
  }
  if (A_grad) set_matrix(adapter.dA, adapter.dA_row, dA);
  if (x_grad && !merged) set_matrix(p.dx, p.dx_row, dx);
  if (A_grad || p.dx) kernels.backward_in(p);
  if (x_grad && merged) {
    product_into(dx, dy, merged_weight(weight, lora_A, lora_B, scale, factors, active_rank));
  } else if (x_grad) {
    add_product(dx, dy, weight);
  }
  if (weight_grad) {
    dweight = empty({p.out, p.in}, weight.scalar_type(), x);
    product_into(dweight, transposed(dy), x);
  }
  if (bias_grad) {
    dbias = empty({p.out}, weight.scalar_type(), x);
    column_sums_into(dbias, dy);
  }
  return {dx, dweight, dbias, dA, dB, dp};
}

// x A^T alone, and its gradient: what the norms of dora_linear are made of, with the weight as x.
LoraParams down_params(const Tensor& x, const Tensor& lora_A, LoraAdapter& adapter) {
  LoraParams p;
  p.rows = x.size(0);
  p.in = x.size(1);
  p.dtype = dtype_of(x);
  p.adapter_dtype = dtype_of(lora_A);
  STD_TORCH_CHECK(lora_A.size(1) == p.in && lora_A.size(0) > 0, "lora_down: sizes do not fit");
  p.x = x.data_ptr();
  p.x_row = x.stride(0);
  adapter.A = lora_A.data_ptr();
  adapter.A_row = lora_A.stride(0);
  adapter.rank = lora_A.size(0);
  adapter.end = p.rows;
  p.adapters = &adapter;
  p.n_adapters = 1;
  p.max_rank = adapter.rank;
  return p;
}

Tensor lora_down(Tensor x, Tensor lora_A) {
  LoraAdapter adapter;
  LoraParams p = down_params(x, lora_A, adapter);
  const Tensor S = empty({p.rows, adapter.rank}, accumulation_type(x), x);
  set_matrix(p.S, p.S_row, S);
  Kernels(x).down(p);
  return S;
}

std::tuple<Tensor, Tensor> lora_down_bwd(Tensor dS, Tensor x, Tensor lora_A, bool x_grad, bool A_grad) {
  LoraAdapter adapter;
  LoraParams p = down_params(x, lora_A, adapter);
  dS = torch::stable::contiguous(dS);
  set_matrix(p.Z, p.Z_row, dS);
  const Tensor dx = empty(x_grad ? std::vector<int64_t>{p.rows, p.in} : std::vector<int64_t>{0}, x.scalar_type(), x);
  const Tensor dA =
      empty(A_grad ? std::vector<int64_t>{adapter.rank, p.in} : std::vector<int64_t>{0}, lora_A.scalar_type(), x);
  if (x_grad) set_matrix(p.dx, p.dx_row, dx);
  if (A_grad) set_matrix(adapter.dA, adapter.dA_row, dA);
  if (x_grad || A_grad) Kernels(x).backward_in(p);
  return {dx, dA};
}

#if !defined(TRIFUSE_CUDA) && !defined(TRIFUSE_EMULATED)
bool is_plain_matrix(const Tensor& t, int64_t rows, int64_t columns) {
  return t.is_cpu() && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous();
}

// The forward pass of arguments that nothing has looked at yet, x of any shape: beside the product of a small layer
// every line of Python counts. Where they are not what this takes y is empty.
std::tuple<Tensor, Tensor> lora_linear_plain(Tensor x, Tensor weight, OptionalTensor bias, Tensor lora_A, Tensor lora_B,
                                             double scale, int64_t active_rank, double dropout, OptionalTensor seed,
                                             bool merged, bool save) {
  const auto refuse = [&] { return std::tuple<Tensor, Tensor>(empty({0}, ScalarType::Float, x), x); };
  const int64_t dims = x.dim();
  if (!x.is_cpu() || dims < 1 || !x.is_contiguous() || weight.dim() != 2 || lora_A.dim() != 2) return refuse();
  const int64_t out = weight.size(0), in = weight.size(1), rank = lora_A.size(0);
  const ScalarType dtype = x.scalar_type(), adapter_dtype = lora_A.scalar_type();
  const bool known = dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                     dtype == ScalarType::Double;
  const int64_t rows = in > 0 ? x.numel() / in : 0;
  if (!known || x.size(dims - 1) != in || rows < 1 || out < 1 || active_rank < 1 || active_rank > rank ||
      weight.scalar_type() != dtype || lora_B.scalar_type() != adapter_dtype ||
      (adapter_dtype != dtype && adapter_dtype != accumulation_type(x)) || !is_plain_matrix(weight, out, in) ||
      !is_plain_matrix(lora_A, rank, in) || !is_plain_matrix(lora_B, out, rank) ||
      (merged && dtype != accumulation_type(x))) {
    return refuse();
  }
  if (bias && (!bias->is_cpu() || bias->dim() != 1 || bias->size(0) != out || bias->scalar_type() != dtype ||
               !bias->is_contiguous())) {
    return refuse();
  }
  std::vector<int64_t> size;
  for (int64_t i = 0; i + 1 < dims; ++i) size.push_back(x.size(i));
  size.push_back(out);
  const Tensor y = empty(size, dtype, x);  // of its final shape: autograd lets nobody change a view in place
  const auto matrix = [&](const Tensor& t, int64_t columns) {
    return dims == 2 ? t : torch::stable::view(t, std::vector<int64_t>{rows, columns});
  };
  const Tensor S = forward_into(matrix(y, out), matrix(x, in), weight, bias, lora_A, lora_B, scale, std::nullopt,
                                active_rank, dropout, seed, merged, save);
  return {y, S};
}
#endif

TRIFUSE_IMPL(m) {
#if !defined(TRIFUSE_CUDA) && !defined(TRIFUSE_EMULATED)
  m.impl("lora_linear_plain", TORCH_BOX(&lora_linear_plain));
#endif
  m.impl("lora_linear_fwd", TORCH_BOX(&lora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&lora_linear_bwd));
  m.impl("lora_down", TORCH_BOX(&lora_down));
  m.impl("lora_down_bwd", TORCH_BOX(&lora_down_bwd));
}

}  // namespace
}  // namespace trifuse
