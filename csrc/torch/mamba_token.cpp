// One token through a whole Mamba block: what python/trifuse/nn/mamba.py does in a dozen calls, in one. A token of a
// small model takes a few hundred microseconds, and between products that stream the weights through the caches every
// call from Python is a cold one. The CPU's only; float32.
#if !defined(TRIFUSE_CUDA) && !defined(TRIFUSE_EMULATED)

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

Tensor negative_exp(const Tensor& t) {
  std::array<StableIValue, 1> stack{from(t)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::exp", "", stack.data(), TORCH_ABI_VERSION));
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::neg_", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

void check_float32(const char* name, const Tensor& t, int64_t dims) {
  STD_TORCH_CHECK(dtype_of(t) == DType::kFloat32 && t.dim() == dims, "mamba_token: ", name, " must be float32 with ",
                  dims, " dimensions");
}

// x (batch, dim) through the convolution with silu; the state (batch, dim, length) moves on.
Tensor convolve(const Tensor& x, int64_t dim, const Tensor& state, const Tensor& weight, const OptionalTensor& bias) {
  CausalConv1dUpdateParams p;
  p.batch = x.size(0);
  p.dim = dim;
  p.seqlen = 1;
  p.width = weight.size(2);
  p.state_len = state.size(2);
  p.silu = true;
  p.x = {x.data_ptr(), x.stride(0), x.stride(1), 1};
  p.conv_state = state.data_ptr();
  p.state_row = state.stride(0);
  p.state_dim = state.stride(1);
  p.state_time = state.stride(2);
  p.weight = weight.data_ptr();
  p.bias = pointer(bias);
  const Tensor y = empty({p.batch, dim}, x.scalar_type(), x);
  p.y = y.data_ptr();
  cpu::causal_conv1d_update(p, torch_threads());
  return y;
}

// token (batch, d_model); conv_state (batch, dim, length), ssm_state (batch, dim, dstate); the weights as in nn.Mamba.
Tensor mamba_token(Tensor token, Tensor conv_state, Tensor ssm_state, Tensor in_weight, OptionalTensor in_bias,
                   Tensor conv_weight, OptionalTensor conv_bias, Tensor x_weight, Tensor dt_weight,
                   OptionalTensor dt_bias, Tensor A_log, Tensor D, Tensor out_weight, OptionalTensor out_bias) {
  const int64_t batch = token.size(0), dim = D.size(0), dstate = A_log.size(1), rank = dt_weight.size(1);
  const int64_t width = conv_weight.size(2);
  check_float32("token", token, 2);
  check_float32("conv_state", conv_state, 3);
  check_float32("ssm_state", ssm_state, 3);
  check_float32("conv1d.weight", conv_weight, 3);
  check_float32("A_log", A_log, 2);
  check_float32("D", D, 1);
  STD_TORCH_CHECK(in_weight.size(0) == 2 * dim && conv_weight.size(0) == dim && conv_weight.size(1) == 1 &&
                      A_log.size(0) == dim && x_weight.size(0) == rank + 2 * dstate && x_weight.size(1) == dim &&
                      dt_weight.size(0) == dim && out_weight.size(1) == dim,
                  "mamba_token: the weights are not those of one block");
  STD_TORCH_CHECK(width >= 2 && width <= 8 && conv_weight.is_contiguous(),
                  "mamba_token: conv1d.weight must be contiguous and from 2 to 8 wide");
  STD_TORCH_CHECK(conv_state.size(0) == batch && conv_state.size(1) == dim && conv_state.size(2) >= width - 1 &&
                      ssm_state.size(0) == batch && ssm_state.size(1) == dim && ssm_state.size(2) == dstate,
                  "mamba_token: the states are not those of this block and batch");
  for (const OptionalTensor* bias : {&conv_bias, &dt_bias}) {
    if (!*bias) continue;
    check_float32("bias", **bias, 1);
    STD_TORCH_CHECK((*bias)->size(0) == dim && (*bias)->is_contiguous(),
                    "mamba_token: a bias must be contiguous (dim)");
  }

  const Tensor xz = linear(token, in_weight, in_bias);
  const Tensor x = convolve(xz, dim, conv_state, conv_weight, conv_bias);
  Tensor projected = linear(x, x_weight, std::nullopt);
  const Tensor dt = linear(torch::stable::narrow(projected, 1, 0, rank), dt_weight, std::nullopt);
  const Tensor A = negative_exp(A_log);
  check_float32("in_proj", xz, 2);
  check_float32("x_proj", projected, 2);
  check_float32("dt_proj", dt, 2);

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
  p.x_dim = x.stride(1);
  p.dt = dt.data_ptr();
  p.dt_batch = dt.stride(0);
  p.dt_dim = dt.stride(1);
  p.z = static_cast<const float*>(xz.data_ptr()) + dim * xz.stride(1);
  p.z_batch = xz.stride(0);
  p.z_dim = xz.stride(1);
  p.A = A.data_ptr();
  p.A_dim = A.stride(0);
  p.A_state = A.stride(1);
  p.B = static_cast<const float*>(projected.data_ptr()) + rank * projected.stride(1);
  p.C = static_cast<const float*>(p.B) + dstate * projected.stride(1);
  p.B_batch = p.C_batch = projected.stride(0);
  p.B_state = p.C_state = projected.stride(1);
  p.D = D.data_ptr();
  p.D_dim = D.stride(0);
  p.dt_bias = pointer(dt_bias);
  p.dt_bias_dim = 1;
  const Tensor y = empty({batch, dim}, x.scalar_type(), x);
  p.out = y.data_ptr();
  cpu::selective_state_update(p, torch_threads());
  return linear(y, out_weight, out_bias);
}

TRIFUSE_IMPL(m) { m.impl("mamba_token", TORCH_BOX(&mamba_token)); }

}  // namespace
}  // namespace trifuse

#endif
