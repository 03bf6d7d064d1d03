// Forwards the causal convolution's CPU entry points to the kernels of the instruction set in use.
#include "isa.h"
#include "trifuse/causal_conv1d.h"

namespace trifuse::cpu {

TRIFUSE_DECLARE_FOR_ISAS(int64_t causal_conv1d_fwd_workspace_bytes(const CausalConv1dParams&))
TRIFUSE_DECLARE_FOR_ISAS(void causal_conv1d_fwd(const CausalConv1dParams&, const Threads&))
TRIFUSE_DECLARE_FOR_ISAS(int64_t causal_conv1d_bwd_workspace_bytes(const CausalConv1dBwdParams&))
TRIFUSE_DECLARE_FOR_ISAS(void causal_conv1d_bwd(const CausalConv1dBwdParams&, const Threads&))
TRIFUSE_DECLARE_FOR_ISAS(void causal_conv1d_update(const CausalConv1dUpdateParams&, const Threads&))

int64_t causal_conv1d_fwd_workspace_bytes(const CausalConv1dParams& p) {
  return TRIFUSE_OF_ACTIVE_ISA(causal_conv1d_fwd_workspace_bytes)(p);
}
void causal_conv1d_fwd(const CausalConv1dParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(causal_conv1d_fwd)(p, threads);
}
int64_t causal_conv1d_bwd_workspace_bytes(const CausalConv1dBwdParams& p) {
  return TRIFUSE_OF_ACTIVE_ISA(causal_conv1d_bwd_workspace_bytes)(p);
}
void causal_conv1d_bwd(const CausalConv1dBwdParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(causal_conv1d_bwd)(p, threads);
}
void causal_conv1d_update(const CausalConv1dUpdateParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(causal_conv1d_update)(p, threads);
}

}  // namespace trifuse::cpu
