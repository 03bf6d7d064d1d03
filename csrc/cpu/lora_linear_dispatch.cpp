// Forwards lora_linear's CPU entry points to the kernels of the instruction set in use.
#include "isa.h"
#include "trifuse/lora_linear.h"

namespace trifuse::cpu {

TRIFUSE_DECLARE_FOR_ISAS(void lora_down(const LoraParams&, const Threads&))
TRIFUSE_DECLARE_FOR_ISAS(void lora_up(const LoraParams&, const Threads&))
TRIFUSE_DECLARE_FOR_ISAS(void lora_backward_out(const LoraParams&, const Threads&))
TRIFUSE_DECLARE_FOR_ISAS(void lora_backward_in(const LoraParams&, const Threads&))

void lora_down(const LoraParams& p, const Threads& threads) { TRIFUSE_OF_ACTIVE_ISA(lora_down)(p, threads); }
void lora_up(const LoraParams& p, const Threads& threads) { TRIFUSE_OF_ACTIVE_ISA(lora_up)(p, threads); }
void lora_backward_out(const LoraParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(lora_backward_out)(p, threads);
}
void lora_backward_in(const LoraParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(lora_backward_in)(p, threads);
}

}  // namespace trifuse::cpu
