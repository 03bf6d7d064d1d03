#include "selective_scan_launch.cuh"

namespace trifuse::cuda {

template Error launch_fwd<bf16>(const FwdArgs&, Stream);
template Error launch_bwd<bf16>(const BwdArgs&, Stream);

}  // namespace trifuse::cuda
