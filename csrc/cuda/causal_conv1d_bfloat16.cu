#include "causal_conv1d_launch.cuh"

namespace trifuse::cuda::conv {

template Error launch_fwd<bf16>(const FwdArgs&, bool, Stream);
template Error launch_bwd<bf16>(const BwdArgs&, bool, Stream);

}  // namespace trifuse::cuda::conv
