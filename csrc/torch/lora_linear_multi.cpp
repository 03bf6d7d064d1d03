// lora_linear_multi as torch ops: the rows sorted by adapter, views, the base products, registration. GPUs are served
// by Triton: there is nothing to compile for them.
#if !defined(TRIFUSE_CUDA) && !defined(TRIFUSE_EMULATED)

#include <tuple>

#include "lora_layer.h"

namespace trifuse {
namespace {

// A call's adapters and its rows sorted by them; rows without one come first, as those of an adapter of rank 0.
struct Segments {
  std::vector<int64_t> order;
  std::vector<LoraAdapter> adapters;

  Segments(const Tensor& index, size_t count) {
    const int64_t rows = index.size(0), stride = index.stride(0);
    const int64_t* of_row = static_cast<const int64_t*>(index.data_ptr());
    std::vector<int64_t> starts(count + 2, 0);
    const auto place = [&](int64_t row) { return size_t(of_row[row * stride] < 0 ? 0 : of_row[row * stride] + 1); };
    for (int64_t row = 0; row < rows; ++row) {
      STD_TORCH_CHECK(place(row) <= count, "lora_linear_multi: index holds ", of_row[row * stride], "; there are only ",
                      count, " adapters");
      ++starts[place(row) + 1];
    }
    for (size_t i = 1; i < starts.size(); ++i) starts[i] += starts[i - 1];
    adapters.resize(count + 1);
    for (size_t i = 0; i <= count; ++i) {
      adapters[i].begin = starts[i];
      adapters[i].end = starts[i + 1];
    }
    order.resize(size_t(rows));
    for (int64_t row = 0; row < rows; ++row) order[size_t(starts[place(row)]++)] = row;
  }
};

LoraParams params(const Tensor& x, const Tensor& weight, const std::vector<Tensor>& A, const std::vector<Tensor>& B,
                  const Tensor& scales, Segments& segments) {
  LoraParams p;
  p.rows = x.size(0);
  p.in = x.size(1);
  p.out = weight.size(0);
  p.dtype = dtype_of(x);
  p.adapter_dtype = A.empty() ? p.dtype : dtype_of(A[0]);
  p.x = x.data_ptr();
  p.x_row = x.stride(0);
  p.order = segments.order.data();
  p.max_rank = scales.size(1);
  STD_TORCH_CHECK(scales.is_contiguous() && scales.scalar_type() == accumulation_type(x) && A.size() == B.size() &&
                      scales.size(0) == int64_t(A.size()),
                  "lora_linear_multi: scales must be (adapters, largest rank), in the accumulation dtype");
  const size_t size = p.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  for (size_t i = 0; i < A.size(); ++i) {
    LoraAdapter& a = segments.adapters[i + 1];
    STD_TORCH_CHECK(
        A[i].size(1) == p.in && B[i].size(0) == p.out && A[i].size(0) == B[i].size(1) && A[i].size(0) <= p.max_rank,
        "lora_linear_multi: the sizes of adapter ", i, " do not fit");
    a.A = A[i].data_ptr();
    a.A_row = A[i].stride(0);
    a.B = B[i].data_ptr();
    a.B_row = B[i].stride(0);
    a.p = static_cast<const char*>(scales.data_ptr()) + i * size_t(scales.stride(0)) * size;
    a.rank = A[i].size(0);
  }
  p.adapters = segments.adapters.data();
  p.n_adapters = int64_t(segments.adapters.size());
  return p;
}

// The output into y (M, N); returns S.
Tensor forward_into(const Tensor& y, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                    const std::vector<Tensor>& A, const std::vector<Tensor>& B, const Tensor& scales,
                    const Tensor& index) {
  Segments segments(index, A.size());
  LoraParams p = params(x, weight, A, B, scales, segments);
  const Tensor S = torch::stable::new_zeros(x, std::vector<int64_t>{p.rows, p.max_rank}, accumulation_type(x));
  p.S = S.data_ptr();
  p.S_row = S.stride(0);
  p.y = y.data_ptr();
  p.y_row = y.stride(0);
  if (bias) p.bias = bias->data_ptr();
  cpu::lora_down(p, torch_threads());
  cpu::lora_up(p, torch_threads());
  add_product(y, x, transposed(weight));
  return S;
}

std::tuple<Tensor, Tensor> lora_linear_multi_fwd(Tensor x, Tensor weight, OptionalTensor bias, std::vector<Tensor> A,
                                                 std::vector<Tensor> B, Tensor scales, Tensor index, bool save) {
  const Tensor y = empty({x.size(0), weight.size(0)}, x.scalar_type(), x);
  const Tensor S = forward_into(y, x, weight, bias, A, B, scales, index);
  return {y, save ? S : empty({0, S.size(1)}, S.scalar_type(), x)};
}

template <class T>
void fill_rows(T* to, const std::vector<double>& values, int64_t columns) {
  for (const double value : values) to = std::fill_n(to, columns, T(value));
}

// The forward pass of plain arguments whose gradients nobody asks for, with one factor for each adapter; empty where
// they are not what this takes.
Tensor lora_linear_multi_plain(Tensor x, Tensor weight, OptionalTensor bias, std::vector<Tensor> A,
                               std::vector<Tensor> B, std::vector<double> scales, Tensor index) {
  const size_t count = A.size();
  bool fits = count > 0 && B.size() == count && scales.size() == count && index.is_cpu() &&
              index.scalar_type() == ScalarType::Long && index.is_contiguous() && index.dim() == x.dim() - 1;
  for (int64_t i = 0; fits && i < index.dim(); ++i) fits = index.size(i) == x.size(i);
  int64_t width = 0;
  for (size_t i = 0; fits && i < count; ++i) {
    fits = A[i].dim() == 2 && A[i].scalar_type() == A[0].scalar_type() && B[i].scalar_type() == A[0].scalar_type() &&
           weight.dim() == 2 && A[i].size(0) > 0 && is_plain_matrix(A[i], A[i].size(0), weight.size(1)) &&
           is_plain_matrix(B[i], weight.size(0), A[i].size(0));
    if (fits) width = std::max(width, A[i].size(0));
  }
  fits = fits && takes_plain(x, weight, bias, A[0], B[0], 1);
  const int64_t* of_row = fits ? static_cast<const int64_t*>(index.data_ptr()) : nullptr;
  for (int64_t i = 0; fits && i < index.numel(); ++i) fits = of_row[i] < int64_t(count);
  if (!fits) return empty({0}, ScalarType::Float, x);
  const ScalarType acc = accumulation_type(x);
  const Tensor factors = empty({int64_t(count), width}, acc, x);
  if (acc == ScalarType::Double) {
    fill_rows(static_cast<double*>(factors.data_ptr()), scales, width);
  } else {
    fill_rows(static_cast<float*>(factors.data_ptr()), scales, width);
  }
  const Tensor y = empty_beside(x, weight.size(0));
  forward_into(as_matrix(y), as_matrix(x), weight, bias, A, B, factors, torch::stable::view(index, {index.numel()}));
  return y;
}

// dscales (adapters, max_rank), zero: of every adapter the sum of S * Z over its rows.
template <class T>
void add_scale_gradients(const LoraParams& p, T* dscales) {
  for (int64_t i = 1; i < p.n_adapters; ++i, dscales += p.max_rank) {
    const LoraAdapter& a = p.adapters[i];
    for (int64_t m = a.begin; m < a.end; ++m) {
      const T* s = static_cast<const T*>(p.S) + p.order[m] * p.S_row;
      const T* z = static_cast<const T*>(p.Z) + p.order[m] * p.Z_row;
      for (int64_t r = 0; r < a.rank; ++r) dscales[r] += s[r] * z[r];
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor> lora_linear_multi_bwd(
    Tensor dy, Tensor x, Tensor weight, std::vector<Tensor> A, std::vector<Tensor> B, Tensor S, Tensor scales,
    Tensor index, std::vector<bool> needs) {
  const bool x_grad = needs[0], weight_grad = needs[1], bias_grad = needs[2], A_grad = needs[3], B_grad = needs[4],
             scales_grad = needs[5];
  Segments segments(index, A.size());
  LoraParams p = params(x, weight, A, B, scales, segments);
  dy = torch::stable::contiguous(dy);
  const ScalarType acc = accumulation_type(x);
  const auto nothing = [&](const Tensor& like) { return empty({0}, like.scalar_type(), x); };
  const auto gradient = [&](const Tensor& of, bool asked, bool written) {
    const std::vector<int64_t> size{of.size(0), of.size(1)};
    if (!asked) return nothing(of);
    return written ? empty(size, of.scalar_type(), x) : torch::stable::new_zeros(of, size);
  };
  const Tensor Z = torch::stable::new_zeros(x, std::vector<int64_t>{p.rows, p.max_rank}, acc);
  Tensor dx = x_grad ? empty({p.rows, p.in}, x.scalar_type(), x) : nothing(x);
  Tensor dweight = nothing(weight), dbias = nothing(weight), dscales = nothing(scales);
  std::vector<Tensor> dA, dB;
  for (size_t i = 0; i < A.size(); ++i) {
    LoraAdapter& a = segments.adapters[i + 1];
    const bool used = a.begin < a.end;
    dA.push_back(gradient(A[i], A_grad, used));
    dB.push_back(gradient(B[i], B_grad, used));
    if (A_grad) a.dA = dA[i].data_ptr(), a.dA_row = dA[i].stride(0);
    if (B_grad) a.dB = dB[i].data_ptr(), a.dB_row = dB[i].stride(0);
  }
  p.dy = dy.data_ptr();
  p.dy_row = dy.stride(0);
  p.S = S.data_ptr();
  p.S_row = S.stride(0);
  p.Z = Z.data_ptr();
  p.Z_row = Z.stride(0);
  if (x_grad) p.dx = dx.data_ptr(), p.dx_row = dx.stride(0);
  if (x_grad || A_grad || B_grad || scales_grad) cpu::lora_backward_out(p, torch_threads());
  if (x_grad || A_grad) cpu::lora_backward_in(p, torch_threads());
  if (x_grad) add_product(dx, dy, weight);
  if (weight_grad) {
    dweight = empty({p.out, p.in}, weight.scalar_type(), x);
    product_into(dweight, transposed(dy), x);
  }
  if (bias_grad) {
    dbias = empty({p.out}, weight.scalar_type(), x);
    column_sums_into(dbias, dy);
  }
  if (scales_grad) {
    dscales = torch::stable::new_zeros(scales, std::vector<int64_t>{scales.size(0), scales.size(1)});
    if (acc == ScalarType::Double) {
      add_scale_gradients<double>(p, static_cast<double*>(dscales.data_ptr()));
    } else {
      add_scale_gradients<float>(p, static_cast<float*>(dscales.data_ptr()));
    }
  }
  return {dx, dweight, dbias, dA, dB, dscales};
}

TRIFUSE_IMPL(m) {
  m.impl("lora_linear_multi_plain", TORCH_BOX(&lora_linear_multi_plain));
  m.impl("lora_linear_multi_fwd", TORCH_BOX(&lora_linear_multi_fwd));
  m.impl("lora_linear_multi_bwd", TORCH_BOX(&lora_linear_multi_bwd));
}

}  // namespace
}  // namespace trifuse

#endif
