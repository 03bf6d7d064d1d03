#include "causal_conv1d_launch.cuh"

namespace trifuse::cuda::conv {

template Error launch_fwd<float>(const FwdArgs&, bool, Stream);
template Error launch_bwd<float>(const BwdArgs&, bool, Stream);

}  // namespace trifuse::cuda::conv
