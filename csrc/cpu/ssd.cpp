// The CPU entry points of ssd for one instruction set: from dtypes to templates.
#include "dtypes.h"
#include "ssd_bwd.h"
#include "ssd_fwd.h"

#ifndef TRIFUSE_ISA
#error "compile with -DTRIFUSE_ISA=<namespace of this instruction set>"
#endif

namespace trifuse::cpu::TRIFUSE_ISA {

void ssd_fwd(const SsdParams& p, const Threads& threads) {
  with_sequence_dtype(p.dtype, [&](auto* acc, auto* sequence) {
    ssd::forward<std::remove_pointer_t<decltype(acc)>, std::remove_pointer_t<decltype(sequence)>>(p, threads);
  });
}

int64_t ssd_bwd_workspace_bytes(const SsdBwdParams& p) {
  return p.dtype == DType::kFloat64 ? ssd::Workspace<double>(p).bytes() : ssd::Workspace<float>(p).bytes();
}

void ssd_bwd(const SsdBwdParams& p, const Threads& threads) {
  with_sequence_dtype(p.dtype, [&](auto* acc, auto* sequence) {
    ssd::backward<std::remove_pointer_t<decltype(acc)>, std::remove_pointer_t<decltype(sequence)>>(p, threads);
  });
}

}  // namespace trifuse::cpu::TRIFUSE_ISA
