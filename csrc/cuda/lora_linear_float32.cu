#include "lora_linear_launch.cuh"

namespace trifuse::cuda::lora {

template Error launch_dots<float>(const Args&, Stream);
template Error launch_gather<float>(const Args&, int, bool, Stream);
template Error launch_expand<float>(const Args&, Stream);

}  // namespace trifuse::cuda::lora
