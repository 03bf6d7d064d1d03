// Forwards lora_adamw's CPU entry point to the kernel of the instruction set in use.
#include "isa.h"
#include "trifuse/lora_adamw.h"

namespace trifuse::cpu {

TRIFUSE_DECLARE_FOR_ISAS(void lora_adamw(const LoraAdamwParams&, const Threads&))

void lora_adamw(const LoraAdamwParams& p, const Threads& threads) { TRIFUSE_OF_ACTIVE_ISA(lora_adamw)(p, threads); }

}  // namespace trifuse::cpu
