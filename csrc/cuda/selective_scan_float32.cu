#include "selective_scan_launch.cuh"

namespace trifuse::cuda {

template Error launch_fwd<float>(const FwdArgs&, Stream);
template Error launch_bwd<float>(const BwdArgs&, Stream);

}  // namespace trifuse::cuda
