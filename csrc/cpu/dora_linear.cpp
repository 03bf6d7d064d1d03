// The CPU entry points of dora_linear for one instruction set.
#include "dora_linear.h"

#include "dtypes.h"

#ifndef TRIFUSE_ISA
#error "compile with -DTRIFUSE_ISA=<namespace of this instruction set>"
#endif

namespace trifuse::cpu::TRIFUSE_ISA {

void dora_norm(const DoraNormParams& p, const Threads& threads) {
  with_sequence_dtype(p.dtype, [&](auto* acc, auto* type) {
    using T = std::remove_pointer_t<decltype(acc)>;
    using S = std::remove_pointer_t<decltype(type)>;
    if (p.adapter_dtype == p.dtype) {
      dora::norm<T, S, S>(p, threads);
    } else {
      dora::norm<T, S, T>(p, threads);
    }
  });
}
void dora_scale(const DoraParams& p, const Threads& threads) {
  with_sequence_dtype(p.dtype, [&](auto* acc, auto* type) {
    dora::scale<std::remove_pointer_t<decltype(acc)>, std::remove_pointer_t<decltype(type)>>(p, threads);
  });
}
void dora_scale_backward(const DoraParams& p, const Threads& threads) {
  with_sequence_dtype(p.dtype, [&](auto* acc, auto* type) {
    dora::scale_backward<std::remove_pointer_t<decltype(acc)>, std::remove_pointer_t<decltype(type)>>(p, threads);
  });
}

}  // namespace trifuse::cpu::TRIFUSE_ISA
