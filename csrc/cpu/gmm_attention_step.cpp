// The CPU entry points of gmm_attention_step for one instruction set.
#include "gmm_attention_step_bwd.h"

#ifndef TRIFUSE_ISA
#error "compile with -DTRIFUSE_ISA=<namespace of this instruction set>"
#endif

namespace trifuse::cpu::TRIFUSE_ISA {

void gmm_attention_step_fwd(const GmmAttentionParams& p, const Threads& threads) {
  with_sequence_dtype(p.dtype, [&](auto* acc, auto* type) {
    gmm::forward<std::remove_pointer_t<decltype(acc)>, std::remove_pointer_t<decltype(type)>>(p, threads);
  });
}
void gmm_attention_step_bwd(const GmmAttentionBwdParams& p, const Threads& threads) {
  with_sequence_dtype(p.dtype, [&](auto* acc, auto* type) {
    gmm::backward<std::remove_pointer_t<decltype(acc)>, std::remove_pointer_t<decltype(type)>>(p, threads);
  });
}

}  // namespace trifuse::cpu::TRIFUSE_ISA
