// The CPU entry points of gaussian_attention for one instruction set: from dtypes to templates.
#include "gaussian_attention_bwd.h"
#include "gaussian_attention_fwd.h"

#ifndef TRIFUSE_ISA
#error "compile with -DTRIFUSE_ISA=<namespace of this instruction set>"
#endif

namespace trifuse::cpu::TRIFUSE_ISA {

void gaussian_attention_fwd(const GaussianAttentionParams& p, const Threads& threads) {
  with_sequence_dtype(p.dtype, [&](auto* acc, auto* sequence) {
    attention::forward<std::remove_pointer_t<decltype(acc)>, std::remove_pointer_t<decltype(sequence)>>(p, threads);
  });
}

void gaussian_attention_bwd(const GaussianAttentionBwdParams& p, const Threads& threads) {
  with_sequence_dtype(p.dtype, [&](auto* acc, auto* sequence) {
    attention::backward<std::remove_pointer_t<decltype(acc)>, std::remove_pointer_t<decltype(sequence)>>(p, threads);
  });
}

}  // namespace trifuse::cpu::TRIFUSE_ISA
