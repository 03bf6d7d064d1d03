// Forwards lora_update's CPU entry point to the kernel of the instruction set in use.
#include "isa.h"
#include "trifuse/lora_update.h"

namespace trifuse::cpu {

TRIFUSE_DECLARE_FOR_ISAS(void lora_update(const LoraUpdateParams&, const Threads&))

void lora_update(const LoraUpdateParams& p, const Threads& threads) { TRIFUSE_OF_ACTIVE_ISA(lora_update)(p, threads); }

}  // namespace trifuse::cpu
