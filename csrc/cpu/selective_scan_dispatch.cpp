// Forwards the selective scan's CPU entry points to the kernels of the instruction set in use.
#include "isa.h"
#include "trifuse/selective_scan.h"

namespace trifuse::cpu {

TRIFUSE_DECLARE_FOR_ISAS(void selective_scan_fwd(const SelectiveScanParams&, const Threads&))
TRIFUSE_DECLARE_FOR_ISAS(int64_t selective_scan_bwd_workspace_bytes(const SelectiveScanBwdParams&, int64_t threads))
TRIFUSE_DECLARE_FOR_ISAS(void selective_scan_bwd(const SelectiveScanBwdParams&, const Threads&))
TRIFUSE_DECLARE_FOR_ISAS(void selective_state_update(const StateUpdateParams&, const Threads&))
TRIFUSE_DECLARE_FOR_ISAS(float exp_floor(int64_t n))

void selective_scan_fwd(const SelectiveScanParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(selective_scan_fwd)(p, threads);
}
int64_t selective_scan_bwd_workspace_bytes(const SelectiveScanBwdParams& p, int64_t threads) {
  return TRIFUSE_OF_ACTIVE_ISA(selective_scan_bwd_workspace_bytes)(p, threads);
}
void selective_scan_bwd(const SelectiveScanBwdParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(selective_scan_bwd)(p, threads);
}
void selective_state_update(const StateUpdateParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(selective_state_update)(p, threads);
}

}  // namespace trifuse::cpu

// For trifuse._native: the time of n exponentials computed as the kernels compute them.
extern "C" __attribute__((visibility("default"))) float trifuse_cpu_exp_floor(int64_t n) {
  using namespace trifuse::cpu;
  return TRIFUSE_OF_ACTIVE_ISA(exp_floor)(n);
}
