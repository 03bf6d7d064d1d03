// The CPU entry point of lora_update for one instruction set.
#include "lora_update.h"

#ifndef TRIFUSE_ISA
#error "compile with -DTRIFUSE_ISA=<namespace of this instruction set>"
#endif

namespace trifuse::cpu::TRIFUSE_ISA {

void lora_update(const LoraUpdateParams& p, const Threads& threads) {
  with_sequence_dtype(p.dtype, [&](auto* acc, auto* type) {
    using T = std::remove_pointer_t<decltype(acc)>;
    using S = std::remove_pointer_t<decltype(type)>;
    if (p.adapter_dtype == p.dtype) {
      update::run<T, S, S>(p, threads);
    } else {
      update::run<T, S, T>(p, threads);
    }
  });
}

}  // namespace trifuse::cpu::TRIFUSE_ISA
