// Chooses the instruction set at run time.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace trifuse::cpu {
namespace {

struct Known {
  const char* name;
  Isa isa;
  bool (*supported)();
};

const Known kKnown[] = {
#if defined(__x86_64__)
    {"avx512", Isa::kAvx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx2", Isa::kAvx2,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {"portable", Isa::kPortable, [] { return true; }},
};

const Known* find(const char* name) {
  for (const Known& known : kKnown) {
    if (known.supported() && (!name || !std::strcmp(known.name, name))) return &known;
  }
  return nullptr;
}

std::atomic<const Known*> g_active{nullptr};

const Known& active() {
  const Known* known = g_active.load(std::memory_order_relaxed);
  if (!known) {
    known = find(std::getenv("TRIFUSE_CPU_ISA"));
    if (!known) known = find(nullptr);
    g_active.store(known, std::memory_order_relaxed);
  }
  return *known;
}

}  // namespace

Isa active_isa() { return active().isa; }

}  // namespace trifuse::cpu

// For trifuse._native, which is linked against this library.
extern "C" {
__attribute__((visibility("default"))) const char* trifuse_cpu_isa() { return trifuse::cpu::active().name; }
__attribute__((visibility("default"))) const char* trifuse_cpu_supported_isa(int i) {
  for (const auto& known : trifuse::cpu::kKnown) {
    if (known.supported() && i-- == 0) return known.name;
  }
  return nullptr;
}
__attribute__((visibility("default"))) bool trifuse_cpu_set_isa(const char* name) {
  const auto* known = trifuse::cpu::find(name);
  if (known) trifuse::cpu::g_active.store(known);
  return known != nullptr;
}
}
