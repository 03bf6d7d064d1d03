// The CPU entry points of lora_linear for one instruction set.
#include "dtypes.h"
#include "lora_linear_passes.h"

#ifndef TRIFUSE_ISA
#error "compile with -DTRIFUSE_ISA=<namespace of this instruction set>"
#endif

namespace trifuse::cpu::TRIFUSE_ISA {
namespace {

// Calls f with a null pointer of the accumulation type, of the type of x and of that of the adapter.
template <class F>
void with_types(const LoraParams& p, F&& f) {
  with_sequence_dtype(p.dtype, [&](auto* acc, auto* type) {
    if (p.adapter_dtype == p.dtype) {
      f(acc, type, type);
    } else {
      f(acc, type, acc);
    }
  });
}
template <class T>
using Of = std::remove_pointer_t<T>;

}  // namespace

void lora_down(const LoraParams& p, const Threads& threads) {
  with_types(
      p, [&](auto* t, auto* s, auto* a) { lora::down<Of<decltype(t)>, Of<decltype(s)>, Of<decltype(a)>>(p, threads); });
}
void lora_up(const LoraParams& p, const Threads& threads) {
  with_types(
      p, [&](auto* t, auto* s, auto* a) { lora::up<Of<decltype(t)>, Of<decltype(s)>, Of<decltype(a)>>(p, threads); });
}
void lora_backward_out(const LoraParams& p, const Threads& threads) {
  with_types(p, [&](auto* t, auto* s, auto* a) {
    lora::backward_out<Of<decltype(t)>, Of<decltype(s)>, Of<decltype(a)>>(p, threads);
  });
}
void lora_backward_in(const LoraParams& p, const Threads& threads) {
  with_types(p, [&](auto* t, auto* s, auto* a) {
    lora::backward_in<Of<decltype(t)>, Of<decltype(s)>, Of<decltype(a)>>(p, threads);
  });
}

}  // namespace trifuse::cpu::TRIFUSE_ISA
