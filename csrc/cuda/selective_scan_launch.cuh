// Between the plan of a selective scan (selective_scan.cu) and its kernels, one file per sequence dtype.
#pragma once

#include "selective_scan_bwd.cuh"
#include "selective_scan_fwd.cuh"

namespace trifuse::cuda {

// Defined for float, f16 and bf16 in the file of each.
template <typename T>
Error launch_fwd(const FwdArgs& p, Stream stream);
template <typename T>
Error launch_bwd(const BwdArgs& p, Stream stream);

extern template Error launch_fwd<float>(const FwdArgs&, Stream);
extern template Error launch_fwd<f16>(const FwdArgs&, Stream);
extern template Error launch_fwd<bf16>(const FwdArgs&, Stream);
extern template Error launch_bwd<float>(const BwdArgs&, Stream);
extern template Error launch_bwd<f16>(const BwdArgs&, Stream);
extern template Error launch_bwd<bf16>(const BwdArgs&, Stream);

// Up to 4 states one per lane, more of them four per lane and 16 at a go. Constant coefficients are
// multiplied in from registers, which the common case, both variable, does not pay for.
inline bool constant_coefficients(const ScanArgs& p) { return !p.B.variable || !p.C.variable; }
inline int states_per_lane(const ScanArgs& p) { return p.dstate <= 4 && !constant_coefficients(p) ? 1 : 4; }
inline int64_t tile_states(const ScanArgs& p) { return states_per_lane(p) * kSlices; }

template <typename T, int kStates, bool kConstant>
Error launch_fwd_kernel(const FwdArgs& p, Stream stream) {
  return launch(scan_fwd_kernel<T, kStates, kConstant>, p.batch * int64_t(p.splits) * int64_t(p.blocks), 1, kThreads,
                sizeof(FwdShared<T, kStates>), stream, p);
}

// Two blocks to a multiprocessor of 228 KB, a KB of each being the system's.
static_assert(2 * (sizeof(BwdShared<float, 4>) + 1024) <= 228 * 1024 &&
                  2 * (sizeof(BwdShared<bf16, 4>) + 1024) <= 228 * 1024,
              "the backward kernel's shared memory leaves room for one block only");

template <typename T, int kStates, bool kConstant>
Error launch_bwd_kernel(const BwdArgs& p, Stream stream) {
  const auto kernel =
      p.local ? scan_bwd_kernel<T, kStates, kConstant, true> : scan_bwd_kernel<T, kStates, kConstant, false>;
  return launch(kernel, p.batch * int64_t(p.splits) * int64_t(p.blocks), 1, kThreads, sizeof(BwdShared<T, kStates>),
                stream, p);
}

// Both passes over time where it is split, else the one.
template <typename Args>
Error launch_passes(const Args& p, Stream stream, Error (*pass)(const Args&, Stream)) {
  Args args = p;
  if (p.splits > 1) {
    args.local = true;
    if (const Error error = pass(args, stream)) return error;
  }
  args.local = false;
  return pass(args, stream);
}

template <typename T>
Error launch_fwd(const FwdArgs& p, Stream stream) {
  if (constant_coefficients(p)) return launch_passes(p, stream, launch_fwd_kernel<T, 4, true>);
  return launch_passes(p, stream,
                       states_per_lane(p) == 1 ? launch_fwd_kernel<T, 1, false> : launch_fwd_kernel<T, 4, false>);
}

template <typename T>
Error launch_bwd(const BwdArgs& p, Stream stream) {
  if (constant_coefficients(p)) return launch_passes(p, stream, launch_bwd_kernel<T, 4, true>);
  return launch_passes(p, stream,
                       states_per_lane(p) == 1 ? launch_bwd_kernel<T, 1, false> : launch_bwd_kernel<T, 4, false>);
}

}  // namespace trifuse::cuda
