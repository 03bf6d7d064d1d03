// Forwards gaussian_gate's CPU entry points to the kernels of the instruction set in use.
#include "isa.h"
#include "trifuse/gaussian_gate.h"

namespace trifuse::cpu {

TRIFUSE_DECLARE_FOR_ISAS(void gaussian_gate_fwd(const GaussianGateParams&, const Threads&))
TRIFUSE_DECLARE_FOR_ISAS(void gaussian_gate_bwd(const GaussianGateBwdParams&, const Threads&))

void gaussian_gate_fwd(const GaussianGateParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(gaussian_gate_fwd)(p, threads);
}
void gaussian_gate_bwd(const GaussianGateBwdParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(gaussian_gate_bwd)(p, threads);
}

}  // namespace trifuse::cpu
