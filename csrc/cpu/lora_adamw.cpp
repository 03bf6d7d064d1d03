// The CPU entry point of lora_adamw for one instruction set.
#include "lora_adamw.h"

#ifndef TRIFUSE_ISA
#error "compile with -DTRIFUSE_ISA=<namespace of this instruction set>"
#endif

namespace trifuse::cpu::TRIFUSE_ISA {

void lora_adamw(const LoraAdamwParams& p, const Threads& threads) { adamw::run(p, threads); }

}  // namespace trifuse::cpu::TRIFUSE_ISA
