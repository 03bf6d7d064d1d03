#include "gaussian_adaptive_attention_launch.cuh"

namespace trifuse::cuda::gaam {

template Error launch_fwd<bf16>(const FwdArgs&, const Plan&, Stream);
template Error launch_bwd<bf16>(const BwdArgs&, const Plan&, Stream);

}  // namespace trifuse::cuda::gaam
