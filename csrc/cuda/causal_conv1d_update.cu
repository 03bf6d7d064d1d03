// The next tokens of the causal convolution: bound by reading and writing the state of a channel, one to
// a thread, which keeps the last inputs in registers.
#include "trifuse/causal_conv1d.h"
#include "trifuse/cuda_platform.h"

namespace trifuse::cuda {
namespace {

constexpr int kThreads = 128, kMaxWidth = 8;

struct UpdateArgs : CausalConv1dUpdateParams {
  unsigned blocks_per_item;
  double inverse_len;  // 1 / state_len
  int64_t written;     // of the inputs, the last ones that a circular state keeps
  int64_t skipped;     // places between the oldest input and the first of them
};

// n % state_len without a division of 64-bit integers, for which a kernel would have to call.
TRIFUSE_DEVICE int64_t circular(const UpdateArgs& p, int64_t n) {
  int64_t rest = n - int64_t(double(n) * p.inverse_len) * p.state_len;
  if (rest < 0) rest += p.state_len;
  return rest < p.state_len ? rest : rest - p.state_len;
}

template <typename T, typename S>
struct Update {
  const UpdateArgs& p;
  const int64_t item, channel, row, first;  // first: place of the oldest input in the row
  S* const state;
  const T* const x;
  T* const y;

  TRIFUSE_DEVICE Update(const UpdateArgs& args, int64_t b, int64_t d)
      : p(args),
        item(b),
        channel(d),
        row(p.conv_state_indices != nullptr ? p.conv_state_indices[b] : b),
        first(p.cache_seqlens != nullptr ? circular(p, p.cache_seqlens[b]) : 0),
        state(static_cast<S*>(p.conv_state) + row * p.state_row + d * p.state_dim),
        x(static_cast<const T*>(p.x.ptr) + b * p.x.batch + d * p.x.dim),
        y(static_cast<T*>(p.y) + (b * p.dim + d) * p.seqlen) {}

  // The state's i-th input, the oldest first.
  TRIFUSE_DEVICE S* place(int64_t i) const {
    const int64_t at = first + i;
    return state + (at < p.state_len ? at : at - p.state_len) * p.state_time;
  }

  TRIFUSE_DEVICE void run() const {
    if (row < 0) {
      for (int64_t t = 0; t < p.seqlen; ++t) y[t] = from_float<T>(0.0f);
      return;
    }
    convolve();
    // Circular: the new inputs take the places of the oldest. Else all move up, the oldest first.
    if (p.cache_seqlens != nullptr) {
#pragma unroll 1
      for (int64_t i = 0, at = p.skipped; i < p.written; ++i, at = at + 1 < p.state_len ? at + 1 : 0) {
        *place(at) = from_float<S>(to_float(x[(p.seqlen - p.written + i) * p.x.time]));
      }
      return;
    }
#pragma unroll 1
    for (int64_t i = 0; i < p.state_len; ++i) {
      const int64_t from = i + p.seqlen;
      *place(i) = from < p.state_len ? *place(from) : from_float<S>(to_float(x[(from - p.state_len) * p.x.time]));
    }
  }

  TRIFUSE_DEVICE void convolve() const {
    const int width = int(p.width);
    const float* const from = static_cast<const float*>(p.weight) + channel * width;
    const float bias = p.bias != nullptr ? static_cast<const float*>(p.bias)[channel] : 0.0f;
    float weight[kMaxWidth], taps[kMaxWidth];  // of tap k; tap 0 is the input itself
#pragma unroll
    for (int k = 0; k < kMaxWidth; ++k) {
      weight[k] = k < width ? from[width - 1 - k] : 0.0f;
      taps[k] = k > 0 && k < width ? to_float(*place(p.state_len - k)) : 0.0f;
    }
#pragma unroll 1
    for (int64_t t = 0; t < p.seqlen; ++t) {
      taps[0] = to_float(x[t * p.x.time]);
      float sum = bias;
#pragma unroll
      for (int k = kMaxWidth - 1; k >= 0; --k) {
        if (k < width) sum = fma(weight[k], taps[k], sum);
      }
      if (p.silu) sum *= sigmoid(sum);
      y[t] = from_float<T>(sum);
#pragma unroll
      for (int k = kMaxWidth - 1; k > 0; --k) taps[k] = taps[k - 1];
    }
  }
};

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads) conv_update_kernel(const __grid_constant__ UpdateArgs p) {
  const int64_t item = blockIdx.x / p.blocks_per_item;
  const int64_t channel = int64_t(blockIdx.x % p.blocks_per_item) * kThreads + threadIdx.x;
  if (channel < p.dim) Update<T, S>(p, item, channel).run();
}

template <typename T, typename S>
Error launch_update(const UpdateArgs& p, Stream stream) {
  return launch(conv_update_kernel<T, S>, p.batch * int64_t(p.blocks_per_item), 1, kThreads, 0, stream, p);
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

Error causal_conv1d_update(const CausalConv1dUpdateParams& params, Stream stream) {
  UpdateArgs p{};
  static_cast<CausalConv1dUpdateParams&>(p) = params;
  if (p.width < 2 || p.width > kMaxWidth || p.state_len < p.width - 1) return kInvalidValue;
  if (p.batch == 0 || p.dim == 0 || p.seqlen == 0) return kSuccess;
  p.blocks_per_item = unsigned((p.dim + kThreads - 1) / kThreads);
  p.inverse_len = 1.0 / double(p.state_len);
  p.written = p.seqlen < p.state_len ? p.seqlen : p.state_len;
  p.skipped = (p.seqlen - p.written) % p.state_len;
  switch (p.dtype) {
    case DType::kFloat32: return by_state_dtype<float>(p, stream);
    case DType::kFloat16: return by_state_dtype<f16>(p, stream);
    case DType::kBFloat16: return by_state_dtype<bf16>(p, stream);
    default: return kInvalidValue;
  }
}

}  // namespace trifuse::cuda
