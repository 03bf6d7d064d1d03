// Forwards the CPU entry points of gaussian_attention to the kernels of the instruction set in use.
#include "isa.h"
#include "trifuse/gaussian_attention.h"

namespace trifuse::cpu {

TRIFUSE_DECLARE_FOR_ISAS(void gaussian_attention_fwd(const GaussianAttentionParams&, const Threads&))
TRIFUSE_DECLARE_FOR_ISAS(void gaussian_attention_bwd(const GaussianAttentionBwdParams&, const Threads&))

void gaussian_attention_fwd(const GaussianAttentionParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(gaussian_attention_fwd)(p, threads);
}
void gaussian_attention_bwd(const GaussianAttentionBwdParams& p, const Threads& threads) {
  TRIFUSE_OF_ACTIVE_ISA(gaussian_attention_bwd)(p, threads);
}

}  // namespace trifuse::cpu
