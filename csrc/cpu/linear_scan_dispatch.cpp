// Forwards linear_scan's CPU entry points to the kernels of the instruction set in use.
#include "isa.h"
#include "trifuse/linear_scan.h"

namespace trifuse::cpu {

TRIFUSE_DECLARE_FOR_ISAS(void linear_scan_fwd(const LinearScanParams&, const Threads&))
TRIFUSE_DECLARE_FOR_ISAS(void linear_scan_bwd(const LinearScanBwdParams&, const Threads&))

void linear_scan_fwd(const LinearScanParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(linear_scan_fwd)(p, threads);
}
void linear_scan_bwd(const LinearScanBwdParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(linear_scan_bwd)(p, threads);
}

}  // namespace trifuse::cpu
