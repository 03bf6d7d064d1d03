// One binary, several instruction sets: every kernel file is compiled once per set with TRIFUSE_ISA
// naming the namespace of its entry points, and isa.cpp calls those of the active set.
#pragma once

#include "trifuse/selective_scan.h"

namespace trifuse::cpu {

struct Kernels {
  void (*selective_scan_fwd)(const SelectiveScanParams&, const Threads&);
  int64_t (*selective_scan_bwd_workspace_bytes)(const SelectiveScanBwdParams&, int64_t threads);
  void (*selective_scan_bwd)(const SelectiveScanBwdParams&, const Threads&);
  void (*selective_state_update)(const StateUpdateParams&, const Threads&);
  // Sum of n exponentials exp2(scale * rate), computed as the kernels compute them.
  float (*exp_floor)(int64_t n);
};

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
