// Between the plan of a Gaussian adaptive attention (gaussian_adaptive_attention.cu) and its kernels, one file per
// dtype.
#pragma once

#include "gaussian_adaptive_attention_pieces.cuh"

namespace trifuse::cuda::gaam {

// How a pass runs: by which threads, and whether by the kernels for rows that are read in vectors and columns without
// masks, or by the general ones; `held`: or in pieces.
struct Plan {
  Way way = Way::kWarp;
  bool held = true, general = true;
  int threads = 128;
};

// Defined for float, f16, bf16 and double in the file of each.
template <typename T>
Error launch_fwd(const FwdArgs& p, const Plan& plan, Stream stream);
template <typename T>
Error launch_bwd(const BwdArgs& p, const Plan& plan, Stream stream);

extern template Error launch_fwd<float>(const FwdArgs&, const Plan&, Stream);
extern template Error launch_fwd<f16>(const FwdArgs&, const Plan&, Stream);
extern template Error launch_fwd<bf16>(const FwdArgs&, const Plan&, Stream);
extern template Error launch_fwd<double>(const FwdArgs&, const Plan&, Stream);
extern template Error launch_bwd<float>(const BwdArgs&, const Plan&, Stream);
extern template Error launch_bwd<f16>(const BwdArgs&, const Plan&, Stream);
extern template Error launch_bwd<bf16>(const BwdArgs&, const Plan&, Stream);
extern template Error launch_bwd<double>(const BwdArgs&, const Plan&, Stream);

// Rows that a warp or eight lanes read in vectors exist for the dtypes that models are trained in.
template <typename T>
constexpr bool kHasVectors = sizeof(T) <= 4;

template <typename T>
void (*fwd_kernel(const Plan& plan))(FwdArgs) {
  if constexpr (kHasVectors<T>) {
    if (!plan.general) {
      switch (plan.way) {
        case Way::kFour:
          if constexpr (sizeof(T) == 2) return gaam_fwd_kernel<T, Way::kFour, false>;
          break;
        case Way::kEight: return gaam_fwd_kernel<T, Way::kEight, false>;
        case Way::kWarp: return gaam_fwd_kernel<T, Way::kWarp, false>;
        case Way::kBlock: return gaam_fwd_kernel<T, Way::kBlock, false>;
        case Way::kColumns: return gaam_fwd_kernel<T, Way::kColumns, false>;
      }
    }
  }
  return plan.way == Way::kColumns ? gaam_fwd_kernel<T, Way::kColumns, true> : gaam_fwd_kernel<T, Way::kWarp, true>;
}

template <typename T>
void (*bwd_kernel(const Plan& plan))(BwdArgs) {
  if constexpr (kHasVectors<T>) {
    if (!plan.general) {
      switch (plan.way) {
        case Way::kFour: break;
        case Way::kEight: return gaam_bwd_kernel<T, Way::kEight, false>;
        case Way::kWarp: return gaam_bwd_kernel<T, Way::kWarp, false>;
        case Way::kBlock: return gaam_bwd_kernel<T, Way::kBlock, false>;
        case Way::kColumns: return gaam_bwd_kernel<T, Way::kColumns, false>;
      }
    }
  }
  return plan.way == Way::kColumns ? gaam_bwd_kernel<T, Way::kColumns, true> : gaam_bwd_kernel<T, Way::kWarp, true>;
}

template <typename T>
Error launch_fwd(const FwdArgs& p, const Plan& plan, Stream stream) {
  const int64_t shared = shared_bytes(plan.way, plan.threads, p.columns);
  if (plan.held) return launch(fwd_kernel<T>(plan), p.heads * p.blocks, 1, plan.threads, shared, stream, p);
  for (const auto kernel : {gaam_moments_kernel<T>, gaam_measure_kernel<T>, gaam_write_kernel<T>}) {
    const Error error = launch(kernel, p.heads * p.tiles, int(p.pieces), plan.threads, shared, stream, p);
    if (error != kSuccess) return error;
  }
  return kSuccess;
}

template <typename T>
Error launch_bwd(const BwdArgs& p, const Plan& plan, Stream stream) {
  int64_t shared = shared_bytes(plan.way, plan.threads, p.columns);
  if (shared < bytes_of_shares(plan.threads)) shared = bytes_of_shares(plan.threads);
  if (plan.held) return launch(bwd_kernel<T>(plan), p.heads * p.blocks, 1, plan.threads, shared, stream, p);
  for (const auto kernel : {gaam_sums_kernel<T>, gaam_gradients_kernel<T>}) {
    const Error error = launch(kernel, p.heads * p.tiles, int(p.pieces), plan.threads, shared, stream, p);
    if (error != kSuccess) return error;
  }
  return kSuccess;
}

}  // namespace trifuse::cuda::gaam
