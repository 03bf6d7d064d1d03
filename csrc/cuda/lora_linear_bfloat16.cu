#include "lora_linear_launch.cuh"

namespace trifuse::cuda::lora {

template Error launch_dots<bf16>(const Args&, Stream);
template Error launch_gather<bf16>(const Args&, int, bool, Stream);
template Error launch_expand<bf16>(const Args&, Stream);

}  // namespace trifuse::cuda::lora
