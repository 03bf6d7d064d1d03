// One binary, several instruction sets: every kernel file is compiled once per set with TRIFUSE_ISA naming
// the namespace of its entry points, and <op>_dispatch.cpp calls those of the set in use.
#pragma once

#include "trifuse/types.h"

namespace trifuse::cpu {

enum class Isa { kAvx512, kAvx2, kPortable };

// The instruction set in use: the best of the machine, or the one asked for.
Isa active_isa();

#if defined(__x86_64__)
// Declares a function of every instruction set: TRIFUSE_DECLARE_FOR_ISAS(void f(const Params&, const Threads&))
#define TRIFUSE_DECLARE_FOR_ISAS(declaration) \
  namespace avx512 {                          \
  declaration;                                \
  }                                           \
  namespace avx2 {                            \
  declaration;                                \
  }                                           \
  namespace portable {                        \
  declaration;                                \
  }
// That function of the instruction set in use.
#define TRIFUSE_OF_ACTIVE_ISA(function)                            \
  (::trifuse::cpu::active_isa() == Isa::kAvx512 ? avx512::function \
   : ::trifuse::cpu::active_isa() == Isa::kAvx2 ? avx2::function   \
                                                : portable::function)
#else
#define TRIFUSE_DECLARE_FOR_ISAS(declaration) \
  namespace portable {                        \
  declaration;                                \
  }
#define TRIFUSE_OF_ACTIVE_ISA(function) portable::function
#endif

// Runs body(begin, end) over [0, n) on the caller's threads.
template <class Body>
void parallel(const Threads& threads, int64_t n, const Body& body) {
  if (n == 1 || threads.count == 1) {
    body(int64_t(0), n);
  } else if (n > 1) {
    threads.run(threads.context, n, const_cast<Body*>(&body),
                [](void* self, int64_t begin, int64_t end) { (*static_cast<const Body*>(self))(begin, end); });
  }
}

}  // namespace trifuse::cpu
