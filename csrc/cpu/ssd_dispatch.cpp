// Forwards the CPU entry points of ssd to the kernels of the instruction set in use.
#include "isa.h"
#include "trifuse/ssd.h"

namespace trifuse::cpu {

TRIFUSE_DECLARE_FOR_ISAS(void ssd_fwd(const SsdParams&, const Threads&))
TRIFUSE_DECLARE_FOR_ISAS(int64_t ssd_bwd_workspace_bytes(const SsdBwdParams&))
TRIFUSE_DECLARE_FOR_ISAS(void ssd_bwd(const SsdBwdParams&, const Threads&))

void ssd_fwd(const SsdParams& p, const Threads& threads) { TRIFUSE_OF_ACTIVE_ISA(ssd_fwd)(p, threads); }
int64_t ssd_bwd_workspace_bytes(const SsdBwdParams& p) { return TRIFUSE_OF_ACTIVE_ISA(ssd_bwd_workspace_bytes)(p); }
void ssd_bwd(const SsdBwdParams& p, const Threads& threads) { TRIFUSE_OF_ACTIVE_ISA(ssd_bwd)(p, threads); }

}  // namespace trifuse::cpu
