// Chooses the instruction set at run time and forwards the CPU entry points to its kernels.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace trifuse::cpu {

#define TRIFUSE_DECLARE(name)   \
  namespace name {              \
  extern const Kernels kernels; \
  }
#if defined(__x86_64__)
TRIFUSE_DECLARE(avx512)
TRIFUSE_DECLARE(avx2)
#endif
TRIFUSE_DECLARE(portable)
#undef TRIFUSE_DECLARE

namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512", &avx512::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx2", &avx2::kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {"portable", &portable::kernels, [] { return true; }},
};

const Isa* find(const char* name) {
  for (const Isa& isa : kIsas) {
    if (isa.supported() && (!name || !std::strcmp(isa.name, name))) return &isa;
  }
  return nullptr;
}

std::atomic<const Isa*> g_active{nullptr};

const Isa& active() {
  const Isa* isa = g_active.load(std::memory_order_relaxed);
  if (!isa) {
    isa = find(std::getenv("TRIFUSE_CPU_ISA"));
    if (!isa) isa = find(nullptr);
    g_active.store(isa, std::memory_order_relaxed);
  }
  return *isa;
}

}  // namespace

void selective_scan_fwd(const SelectiveScanParams& p, const Threads& threads) {
  active().kernels->selective_scan_fwd(p, threads);
}
int64_t selective_scan_bwd_workspace_bytes(const SelectiveScanBwdParams& p, int64_t threads) {
  return active().kernels->selective_scan_bwd_workspace_bytes(p, threads);
}
void selective_scan_bwd(const SelectiveScanBwdParams& p, const Threads& threads) {
  active().kernels->selective_scan_bwd(p, threads);
}
void selective_state_update(const StateUpdateParams& p, const Threads& threads) {
  active().kernels->selective_state_update(p, threads);
}

}  // namespace trifuse::cpu

// For trifuse._native, which is linked against this library.
extern "C" {
__attribute__((visibility("default"))) const char* trifuse_cpu_isa() { return trifuse::cpu::active().name; }
__attribute__((visibility("default"))) const char* trifuse_cpu_supported_isa(int i) {
  for (const auto& isa : trifuse::cpu::kIsas) {
    if (isa.supported() && i-- == 0) return isa.name;
  }
  return nullptr;
}
__attribute__((visibility("default"))) bool trifuse_cpu_set_isa(const char* name) {
  const auto* isa = trifuse::cpu::find(name);
  if (isa) trifuse::cpu::g_active.store(isa);
  return isa != nullptr;
}
__attribute__((visibility("default"))) float trifuse_cpu_exp_floor(int64_t n) {
  return trifuse::cpu::active().kernels->exp_floor(n);
}
}
