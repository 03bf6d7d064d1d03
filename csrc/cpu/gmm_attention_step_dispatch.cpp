// Forwards gmm_attention_step's CPU entry points to the kernels of the instruction set in use.
#include "isa.h"
#include "trifuse/gmm_attention_step.h"

namespace trifuse::cpu {

TRIFUSE_DECLARE_FOR_ISAS(void gmm_attention_step_fwd(const GmmAttentionParams&, const Threads&))
TRIFUSE_DECLARE_FOR_ISAS(void gmm_attention_step_bwd(const GmmAttentionBwdParams&, const Threads&))

void gmm_attention_step_fwd(const GmmAttentionParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(gmm_attention_step_fwd)(p, threads);
}
void gmm_attention_step_bwd(const GmmAttentionBwdParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(gmm_attention_step_bwd)(p, threads);
}

}  // namespace trifuse::cpu
