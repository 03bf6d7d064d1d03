#include "causal_conv1d_launch.cuh"

namespace trifuse::cuda::conv {

template Error launch_fwd<f16>(const FwdArgs&, bool, Stream);
template Error launch_bwd<f16>(const BwdArgs&, bool, Stream);

}  // namespace trifuse::cuda::conv
