// One token of the selective scan: bound by reading and writing the state, of which each thread takes
// four neighbouring elements at a time; four lanes share a channel.
#include "trifuse/cuda_platform.h"
#include "trifuse/selective_scan.h"

namespace trifuse::cuda {
namespace {

constexpr int kThreads = 128, kLanes = 4, kStates = 4;
constexpr int kChannels = kThreads / kLanes;  // of a block
constexpr unsigned kFullWarp = 0xffffffffu;

struct UpdateArgs : StateUpdateParams {
  int64_t blocks_per_item;
  bool vectors;  // states lie side by side, four at a time aligned
};

template <typename S>
struct alignas(sizeof(S) * kStates) Four {
  S v[kStates];
};

template <typename S>
TRIFUSE_DEVICE void read_state(const UpdateArgs& p, const S* from, int64_t n, float (&h)[kStates]) {
  if (p.vectors && n + kStates <= p.dstate) {
    const Four<S> raw = *reinterpret_cast<const Four<S>*>(from + n);
#pragma unroll
    for (int i = 0; i < kStates; ++i) h[i] = to_float(raw.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kStates; ++i) h[i] = n + i < p.dstate ? to_float(from[(n + i) * p.state_state]) : 0.0f;
  }
}

template <typename S>
TRIFUSE_DEVICE void write_state(const UpdateArgs& p, S* to, int64_t n, const float (&h)[kStates]) {
  if (p.vectors && n + kStates <= p.dstate) {
    Four<S> raw;
#pragma unroll
    for (int i = 0; i < kStates; ++i) raw.v[i] = from_float<S>(h[i]);
    *reinterpret_cast<Four<S>*>(to + n) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      if (n + i < p.dstate) to[(n + i) * p.state_state] = from_float<S>(h[i]);
    }
  }
}

template <typename T>
TRIFUSE_DEVICE const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

// The channel's state moved on by one step; returns this lane's share of sum_n C h.
template <typename T, typename S>
TRIFUSE_DEVICE float update(const UpdateArgs& p, int64_t b, int64_t row, int64_t head, int64_t d, float dt, float x) {
  const int64_t group = head / (p.heads / p.groups);
  S* const state = static_cast<S*>(p.state) + row * p.state_row + head * p.state_head + d * p.state_dim;
  const float* const A = at<float>(p.A, head * p.A_head + d * p.A_dim);
  const T* const B = at<T>(p.B, b * p.B_batch + group * p.B_group);
  const T* const C = at<T>(p.C, b * p.C_batch + group * p.C_group);
  float y = 0.0f;
  for (int64_t n = int(threadIdx.x) % kLanes * kStates; n < p.dstate; n += kLanes * kStates) {
    float h[kStates];
    read_state(p, state, n, h);
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      if (n + i >= p.dstate) break;
      const float decay = exp2_fast(dt * kLog2e * A[(n + i) * p.A_state]);
      h[i] = fma(decay, h[i], dt * x * to_float(B[(n + i) * p.B_state]));
      y = fma(to_float(C[(n + i) * p.C_state]), h[i], y);
    }
    write_state(p, state, n, h);
  }
  return y;
}

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads) state_update_kernel(const __grid_constant__ UpdateArgs p) {
  const int64_t channels = p.heads * p.headdim, b = blockIdx.x / p.blocks_per_item;
  const int64_t channel = blockIdx.x % p.blocks_per_item * kChannels + int(threadIdx.x) / kLanes;
  const bool here = channel < channels;
  const int64_t head = here ? channel / p.headdim : 0, d = here ? channel - head * p.headdim : 0;
  const int64_t row = p.state_batch_indices != nullptr ? p.state_batch_indices[b] : b;
  const bool live = here && row >= 0;

  float x = 0.0f, y = 0.0f;
  if (live) {
    float dt = to_float(*at<T>(p.dt, b * p.dt_batch + head * p.dt_head + d * p.dt_dim));
    if (p.dt_bias != nullptr) dt += *at<float>(p.dt_bias, head * p.dt_bias_head + d * p.dt_bias_dim);
    if (p.dt_softplus) dt = softplus(dt);
    x = to_float(*at<T>(p.x, b * p.x_batch + head * p.x_head + d * p.x_dim));
    y = update<T, S>(p, b, row, head, d, dt, x);
  }
  y += __shfl_xor_sync(kFullWarp, y, 1);
  y += __shfl_xor_sync(kFullWarp, y, 2);
  if (!here || threadIdx.x % kLanes != 0) return;
  if (live && p.D != nullptr) y = fma(*at<float>(p.D, head * p.D_head + d * p.D_dim), x, y);
  if (live && p.z != nullptr) {
    const float z = to_float(*at<T>(p.z, b * p.z_batch + head * p.z_head + d * p.z_dim));
    y *= z * sigmoid(z);
  }
  static_cast<T*>(p.out)[b * channels + channel] = from_float<T>(y);
}

template <typename T, typename S>
Error launch_update(const UpdateArgs& p, Stream stream) {
  return launch(state_update_kernel<T, S>, p.batch * p.blocks_per_item, 1, kThreads, 0, stream, p);
}

template <typename T>
Error by_state_dtype(const UpdateArgs& p, Stream stream) {
  switch (p.state_dtype) {
    case DType::kFloat32: return launch_update<T, float>(p, stream);
    case DType::kFloat16: return launch_update<T, f16>(p, stream);
    case DType::kBFloat16: return launch_update<T, bf16>(p, stream);
    default: return kInvalidValue;
  }
}

}  // namespace

Error selective_state_update(const StateUpdateParams& params, Stream stream) {
  UpdateArgs p{};
  static_cast<StateUpdateParams&>(p) = params;
  if (p.batch == 0 || p.heads == 0 || p.headdim == 0) return kSuccess;
  p.blocks_per_item = (p.heads * p.headdim + kChannels - 1) / kChannels;
  const uintptr_t bytes = p.state_dtype == DType::kFloat32 ? 4 * kStates : 2 * kStates;
  p.vectors = p.state_state == 1 && p.state_dim % kStates == 0 && p.state_head % kStates == 0 &&
              p.state_row % kStates == 0 && reinterpret_cast<uintptr_t>(p.state) % bytes == 0;
  switch (p.dtype) {
    case DType::kFloat32: return by_state_dtype<float>(p, stream);
    case DType::kFloat16: return by_state_dtype<f16>(p, stream);
    case DType::kBFloat16: return by_state_dtype<bf16>(p, stream);
    default: return kInvalidValue;
  }
}

}  // namespace trifuse::cuda
