// Between the plan of the passes (lora_linear.cu) and their kernels, one file per dtype of x.
#pragma once

#include "lora_linear_dots.cuh"
#include "lora_linear_expand.cuh"
#include "lora_linear_gather.cuh"

namespace trifuse::cuda::lora {

// Defined for float, f16 and bf16 in the file of each; `group`: ranks of a group, 4 or 8.
template <typename S>
Error launch_dots(const Args& p, Stream stream);
template <typename S>
Error launch_gather(const Args& p, int group, bool with_dots, Stream stream);
template <typename S>
Error launch_expand(const Args& p, Stream stream);

extern template Error launch_dots<float>(const Args&, Stream);
extern template Error launch_dots<f16>(const Args&, Stream);
extern template Error launch_dots<bf16>(const Args&, Stream);
extern template Error launch_gather<float>(const Args&, int, bool, Stream);
extern template Error launch_gather<f16>(const Args&, int, bool, Stream);
extern template Error launch_gather<bf16>(const Args&, int, bool, Stream);
extern template Error launch_expand<float>(const Args&, Stream);
extern template Error launch_expand<f16>(const Args&, Stream);
extern template Error launch_expand<bf16>(const Args&, Stream);

template <typename S>
Error launch_dots(const Args& p, Stream stream) {
  const int64_t blocks = (p.rows + kTile - 1) / kTile * p.pieces * p.groups;
  return launch(lora_dots_kernel<S>, blocks, 1, kThreads, kDotsBytes, stream, p);
}

template <typename S>
Error launch_gather(const Args& p, int group, bool with_dots, Stream stream) {
  const auto go = [&](auto kernel) {
    return launch(kernel, int64_t(p.pieces) * p.splits * p.groups, 1, kGatherThreads, kGatherBytes<S>, stream, p);
  };
  if (group == 4) return go(with_dots ? lora_gather_kernel<S, 4, true> : lora_gather_kernel<S, 4, false>);
  return go(with_dots ? lora_gather_kernel<S, 8, true> : lora_gather_kernel<S, 8, false>);
}

template <typename S>
Error launch_expand(const Args& p, Stream stream) {
  return launch(lora_expand_kernel<S>, int64_t(p.pieces) * p.splits, 1, kThreads, expand_bytes<S>(p.ranks), stream, p);
}

}  // namespace trifuse::cuda::lora
