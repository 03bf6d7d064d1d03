// One token through a whole Mamba block: what python/trifuse/nn/mamba.py does in a dozen calls, in one. A token of a
// small model takes a few hundred microseconds, and between products that stream the weights through the caches every
// call from Python is a cold one. The CPU's only; float32.
#if !defined(TRIFUSE_CUDA) && !defined(TRIFUSE_EMULATED)

#include <cstdlib>
#include <string_view>

#include "common.h"
#include "trifuse/causal_conv1d.h"
#include "trifuse/selective_scan.h"

namespace trifuse {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

bool is_float32(const Tensor& t, int64_t dims) {
  return t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == dims;
}

bool is_row(const OptionalTensor& t, int64_t size) {
  return !t || (is_float32(*t, 1) && t->size(0) == size && t->is_contiguous());
}

// No two elements of a state may share memory.
bool is_own(const Tensor& t) {
  for (int64_t dim = 0; dim < t.dim(); ++dim) {
    if (t.stride(dim) == 0) return false;
  }
  return true;
}

bool is_state(const Tensor& t, int64_t batch, int64_t dim) {
  return is_float32(t, 3) && t.size(0) == batch && t.size(1) == dim && is_own(t);
}

bool is_matrix(const Tensor& t, int64_t rows, int64_t columns) {
  return is_float32(t, 2) && t.size(0) == rows && t.size(1) == columns;
}

bool backend_allows() {
  const char* forced = std::getenv("TRIFUSE_BACKEND");
  return forced == nullptr || *forced == 0 || std::string_view(forced) == "cpp";
}

// x (batch, 1, >= dim) through the convolution with silu; the state (batch, dim, length) moves on.
Tensor convolve(const Tensor& x, int64_t dim, const Tensor& state, const Tensor& weight, const OptionalTensor& bias) {
  CausalConv1dUpdateParams p;
  p.batch = x.size(0);
  p.dim = dim;
  p.seqlen = 1;
  p.width = weight.size(2);
  p.state_len = state.size(2);
  p.silu = true;
  p.x = {x.data_ptr(), x.stride(0), x.stride(2), 1};
  p.conv_state = state.data_ptr();
  p.state_row = state.stride(0);
  p.state_dim = state.stride(1);
  p.state_time = state.stride(2);
  p.weight = weight.data_ptr();
  p.bias = pointer(bias);
  const Tensor y = empty({p.batch, 1, dim}, x.scalar_type(), x);
  p.y = y.data_ptr();
  cpu::causal_conv1d_update(p, torch_threads());
  return y;
}

// token (batch, 1, d_model); conv_state (batch, dim, length), ssm_state (batch, dim, dstate); the weights as in
// nn.Mamba. Where any of them is not what this takes, an empty vector, and nothing has moved: to find that out here
// costs nothing beside finding it out in Python.
Tensor mamba_token(Tensor token, Tensor conv_state, Tensor ssm_state, Tensor in_weight, OptionalTensor in_bias,
                   Tensor conv_weight, OptionalTensor conv_bias, Tensor x_weight, Tensor dt_weight,
                   OptionalTensor dt_bias, Tensor A_log, Tensor D, Tensor out_weight, OptionalTensor out_bias) {
  const auto refuse = [&] { return empty({0}, token.scalar_type(), token); };
  if (!backend_allows() || !is_float32(token, 3) || token.size(1) != 1 || !is_float32(A_log, 2)) return refuse();
  if (!is_float32(conv_weight, 3) || !is_float32(dt_weight, 2) || !is_float32(out_weight, 2)) return refuse();
  const int64_t batch = token.size(0), dim = A_log.size(0), dstate = A_log.size(1), rank = dt_weight.size(1);
  const int64_t width = conv_weight.size(2);
  const bool plain = is_matrix(in_weight, 2 * dim, token.size(2)) && is_row(in_bias, 2 * dim) &&
                     conv_weight.size(0) == dim && conv_weight.size(1) == 1 && width >= 2 && width <= 8 &&
                     conv_weight.is_contiguous() && is_row(conv_bias, dim) &&
                     is_matrix(x_weight, rank + 2 * dstate, dim) && dt_weight.size(0) == dim && is_row(dt_bias, dim) &&
                     is_row(D, dim) && out_weight.size(1) == dim && is_row(out_bias, out_weight.size(0)) &&
                     is_state(conv_state, batch, dim) && conv_state.size(2) == width &&
                     is_state(ssm_state, batch, dim) && ssm_state.size(2) == dstate;
  if (!plain) return refuse();

  const Tensor xz = linear(token, in_weight, in_bias);
  const Tensor x = convolve(xz, dim, conv_state, conv_weight, conv_bias);
  Tensor projected = linear(x, x_weight, std::nullopt);
  const Tensor dt = linear(torch::stable::narrow(projected, 2, 0, rank), dt_weight, std::nullopt);

  StateUpdateParams p;
  p.batch = batch;
  p.heads = 1;
  p.headdim = dim;
  p.dstate = dstate;
  p.dt_softplus = true;
  p.state = ssm_state.data_ptr();
  p.state_row = ssm_state.stride(0);
  p.state_dim = ssm_state.stride(1);
  p.state_state = ssm_state.stride(2);
  p.x = x.data_ptr();
  p.x_batch = x.stride(0);
  p.x_dim = x.stride(2);
  p.dt = dt.data_ptr();
  p.dt_batch = dt.stride(0);
  p.dt_dim = dt.stride(2);
  p.z = static_cast<const float*>(xz.data_ptr()) + dim * xz.stride(2);
  p.z_batch = xz.stride(0);
  p.z_dim = xz.stride(2);
  p.A = A_log.data_ptr();
  p.A_dim = A_log.stride(0);
  p.A_state = A_log.stride(1);
  p.A_is_log = true;
  p.B = static_cast<const float*>(projected.data_ptr()) + rank * projected.stride(2);
  p.C = static_cast<const float*>(p.B) + dstate * projected.stride(2);
  p.B_batch = p.C_batch = projected.stride(0);
  p.B_state = p.C_state = projected.stride(2);
  p.D = D.data_ptr();
  p.D_dim = D.stride(0);
  p.dt_bias = pointer(dt_bias);
  p.dt_bias_dim = 1;
  const Tensor y = empty({batch, 1, dim}, x.scalar_type(), x);
  p.out = y.data_ptr();
  cpu::selective_state_update(p, torch_threads());
  return linear(y, out_weight, out_bias);
}

TRIFUSE_IMPL(m) { m.impl("mamba_token", TORCH_BOX(&mamba_token)); }

}  // namespace
}  // namespace trifuse

#endif
