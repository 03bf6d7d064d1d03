// Between the plan of a causal convolution (causal_conv1d.cu) and its kernels, one file per sequence dtype.
#pragma once

#include <utility>

#include "causal_conv1d_channel.cuh"
#include "causal_conv1d_time.cuh"

namespace trifuse::cuda::conv {

constexpr int kMinWidth = 2, kMaxWidth = 8;
using Widths = std::make_integer_sequence<int, kMaxWidth - kMinWidth + 1>;

// Defined for float, f16 and bf16 in the file of each; `channel`: by the kernels for contiguous channels.
template <typename T>
Error launch_fwd(const FwdArgs& p, bool channel, Stream stream);
template <typename T>
Error launch_bwd(const BwdArgs& p, bool channel, Stream stream);

extern template Error launch_fwd<float>(const FwdArgs&, bool, Stream);
extern template Error launch_fwd<f16>(const FwdArgs&, bool, Stream);
extern template Error launch_fwd<bf16>(const FwdArgs&, bool, Stream);
extern template Error launch_bwd<float>(const BwdArgs&, bool, Stream);
extern template Error launch_bwd<f16>(const BwdArgs&, bool, Stream);
extern template Error launch_bwd<bf16>(const BwdArgs&, bool, Stream);

template <typename Args>
Error launch_tasks(void (*kernel)(Args), const Args& p, Stream stream) {
  const int64_t blocks = p.batch * p.segment_blocks * p.column_blocks;
  return launch(kernel, blocks, 1, kThreads, 0, stream, p);
}

template <typename T, int... kOffsets>
Error launch_width(const FwdArgs& p, bool channel, Stream stream, std::integer_sequence<int, kOffsets...>) {
  using Kernel = void (*)(FwdArgs);
  const Kernel by_time[] = {conv_time_fwd_kernel<T, kMinWidth + kOffsets>...};
  const Kernel by_channel[] = {conv_channel_fwd_kernel<T, kMinWidth + kOffsets>...};
  return launch_tasks((channel ? by_channel : by_time)[p.width - kMinWidth], p, stream);
}

template <typename T, int... kOffsets>
Error launch_width(const BwdArgs& p, bool channel, Stream stream, std::integer_sequence<int, kOffsets...>) {
  using Kernel = void (*)(BwdArgs);
  const Kernel by_time[] = {conv_time_bwd_kernel<T, kMinWidth + kOffsets>...};
  const Kernel by_channel[] = {conv_channel_bwd_kernel<T, kMinWidth + kOffsets>...};
  return launch_tasks((channel ? by_channel : by_time)[p.width - kMinWidth], p, stream);
}

template <typename T>
Error launch_fwd(const FwdArgs& p, bool channel, Stream stream) {
  return launch_width<T>(p, channel, stream, Widths{});
}

template <typename T>
Error launch_bwd(const BwdArgs& p, bool channel, Stream stream) {
  return launch_width<T>(p, channel, stream, Widths{});
}

}  // namespace trifuse::cuda::conv
