// Forwards gaussian_adaptive_attention's CPU entry points to the kernels of the instruction set in use.
#include "isa.h"
#include "trifuse/gaussian_adaptive_attention.h"

namespace trifuse::cpu {

TRIFUSE_DECLARE_FOR_ISAS(void gaussian_adaptive_attention_fwd(const GaussianAdaptiveAttentionParams&, const Threads&))
TRIFUSE_DECLARE_FOR_ISAS(void gaussian_adaptive_attention_bwd(const GaussianAdaptiveAttentionBwdParams&,
                                                              const Threads&))

void gaussian_adaptive_attention_fwd(const GaussianAdaptiveAttentionParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(gaussian_adaptive_attention_fwd)(p, threads);
}
void gaussian_adaptive_attention_bwd(const GaussianAdaptiveAttentionBwdParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(gaussian_adaptive_attention_bwd)(p, threads);
}

}  // namespace trifuse::cpu
