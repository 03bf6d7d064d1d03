#include "selective_scan_launch.cuh"

namespace trifuse::cuda {

template Error launch_fwd<f16>(const FwdArgs&, Stream);
template Error launch_bwd<f16>(const BwdArgs&, Stream);

}  // namespace trifuse::cuda
