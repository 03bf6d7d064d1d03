// Forwards dora_linear's CPU entry points to the kernels of the instruction set in use.
#include "isa.h"
#include "trifuse/dora_linear.h"

namespace trifuse::cpu {

TRIFUSE_DECLARE_FOR_ISAS(void dora_norm(const DoraNormParams&, const Threads&))
TRIFUSE_DECLARE_FOR_ISAS(void dora_scale(const DoraParams&, const Threads&))
TRIFUSE_DECLARE_FOR_ISAS(void dora_scale_backward(const DoraParams&, const Threads&))

void dora_norm(const DoraNormParams& p, const Threads& threads) { TRIFUSE_OF_ACTIVE_ISA(dora_norm)(p, threads); }
void dora_scale(const DoraParams& p, const Threads& threads) { TRIFUSE_OF_ACTIVE_ISA(dora_scale)(p, threads); }
void dora_scale_backward(const DoraParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(dora_scale_backward)(p, threads);
}

}  // namespace trifuse::cpu
