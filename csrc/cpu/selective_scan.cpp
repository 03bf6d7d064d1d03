// The CPU entry points of the selective scan for one instruction set: from dtypes to templates.
#include "dtypes.h"
#include "selective_scan_bwd.h"
#include "selective_scan_fwd.h"
#include "selective_state_update.h"

#ifndef TRIFUSE_ISA
#error "compile with -DTRIFUSE_ISA=<namespace of this instruction set>"
#endif

namespace trifuse::cpu::TRIFUSE_ISA {

void selective_scan_fwd(const SelectiveScanParams& p, const Threads& threads) {
  with_sequence_dtype(p.dtype, [&](auto* acc, auto* sequence) {
    forward<std::remove_pointer_t<decltype(acc)>, std::remove_pointer_t<decltype(sequence)>>(p, threads);
  });
}

int64_t selective_scan_bwd_workspace_bytes(const SelectiveScanBwdParams& p, int64_t threads) {
  return p.dtype == DType::kFloat64 ? backward_workspace_bytes<double>(p, threads)
                                    : backward_workspace_bytes<float>(p, threads);
}

void selective_scan_bwd(const SelectiveScanBwdParams& p, const Threads& threads) {
  with_sequence_dtype(p.dtype, [&](auto* acc, auto* sequence) {
    backward<std::remove_pointer_t<decltype(acc)>, std::remove_pointer_t<decltype(sequence)>>(p, threads);
  });
}

void selective_state_update(const StateUpdateParams& p, const Threads& threads) {
  with_sequence_dtype(p.dtype, [&](auto* acc, auto* sequence) {
    with_sequence_dtype(p.state_dtype, [&](auto* state_acc, auto* state) {
      using T = std::remove_pointer_t<decltype(acc)>;
      if constexpr (std::is_same_v<decltype(acc), decltype(state_acc)>) {
        update<T, std::remove_pointer_t<decltype(sequence)>, std::remove_pointer_t<decltype(state)>>(p, threads);
      }
    });
  });
}

// The time floor of a scan: its exponentials and nothing else, on data that stays in registers.
float exp_floor(int64_t n) {
  constexpr int streams = 8;
  constexpr int64_t lanes = kLanes<float>;
  Vec<float> rate[streams], total[streams];
  for (int i = 0; i < streams; ++i) {
    rate[i] = splat(-0.1f * float(i + 1));
    total[i] = splat(0.0f);
  }
  Vec<float> dt = splat(0.001f);
  for (int64_t done = 0; done < n; done += streams * lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < streams; ++i) total[i] += exp2_product<float>(dt, rate[i]);
    dt += splat(1e-6f);
  }
  for (int i = 1; i < streams; ++i) total[0] += total[i];
  return sum_lanes<float>(total[0]);
}

}  // namespace trifuse::cpu::TRIFUSE_ISA
