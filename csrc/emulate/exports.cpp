// What the tests ask of the emulator besides running the ops.
#include "../cuda/selective_scan_launch.cuh"
#include "trifuse/gaussian_adaptive_attention.h"

using trifuse::cuda::Coefficient;
using trifuse::cuda::Sequence;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void trifuse_emulator_set_descending(int descending) { trifuse::emulator::set_descending(descending != 0); }
EXPORT void trifuse_emulator_set_multiprocessors(int64_t count) { trifuse::emulator::set_multiprocessors(count); }
EXPORT const char* trifuse_emulator_message() { return trifuse::emulator::message(); }

// The kernels' own offsets, evaluated without memory behind them.
EXPORT int64_t trifuse_sequence_offset(int64_t batch_stride, int64_t dim_stride, int64_t step_stride, int64_t batch,
                                       int64_t channel, int64_t step) {
  Sequence s;
  s.batch = batch_stride;
  s.dim = dim_stride;
  s.step = step_stride;
  return trifuse::cuda::sequence_offset(s, batch, channel, step);
}
EXPORT int64_t trifuse_coefficient_offset(int64_t batch_stride, int64_t group_stride, int64_t state_stride,
                                          int64_t step_stride, int64_t batch, int64_t group, int64_t state,
                                          int64_t step) {
  Coefficient c;
  c.batch = batch_stride;
  c.group = group_stride;
  c.state = state_stride;
  c.step = step_stride;
  return trifuse::cuda::coefficient_offset(c, batch, group, state, step);
}

// The workspace of a dense row's forward pass, which is none where a block holds it: more entries without a mask, where
// rows are read in vectors.
EXPORT int64_t trifuse_gaussian_adaptive_attention_workspace(int64_t length, int masked) {
  alignas(16) static unsigned char somewhere[16];
  trifuse::GaussianAdaptiveAttentionParams p;
  p.outer = p.inner = 1;
  p.length = length;
  p.eps = 1e-8;
  p.x = {somewhere, length, 1, 1};
  if (masked) p.mask = p.x;
  p.out = somewhere;
  return trifuse::cuda::gaussian_adaptive_attention_workspace_bytes(p);
}

// Bytes of shared memory of a block, by kernel, sequence dtype and states per lane; -1 if there is none such.
EXPORT int64_t trifuse_shared_bytes(int backward, const char* dtype, int states) {
  using namespace trifuse::cuda;
  using trifuse::bf16;
  const bool narrow = __builtin_strcmp(dtype, "float32") != 0;
  if (states != 1 && states != 4) return -1;
  if (backward) {
    if (narrow) return states == 1 ? sizeof(BwdShared<bf16, 1>) : sizeof(BwdShared<bf16, 4>);
    return states == 1 ? sizeof(BwdShared<float, 1>) : sizeof(BwdShared<float, 4>);
  }
  if (narrow) return states == 1 ? sizeof(FwdShared<bf16, 1>) : sizeof(FwdShared<bf16, 4>);
  return states == 1 ? sizeof(FwdShared<float, 1>) : sizeof(FwdShared<float, 4>);
}

namespace {

struct Flawed {
  float* out;   // one per thread
  int barrier;  // 0: the barrier is missing, 1: half of the threads skip it, 2: as it should be
};

// Every thread passes its number to the thread on the other side of the block.
void mirror_kernel(const Flawed p) {
  TRIFUSE_SHARED_MEMORY(memory);
  float* values = reinterpret_cast<float*>(memory);
  values[threadIdx.x] = float(threadIdx.x);
  if (p.barrier == 2 || (p.barrier == 1 && threadIdx.x % 2 == 0)) __syncthreads();
  p.out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

// A warp's sum of its lanes' numbers, through shared memory poisoned and static.
void warp_sum_kernel(const Flawed p) {
  __shared__ float sums[2];
  float sum = float(threadIdx.x);
  for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  if (p.barrier == 2) __syncthreads();
  p.out[threadIdx.x] = sums[1 - threadIdx.x / 32];
}

// Reads what an asynchronous copy brings, with or without waiting for it.
void copy_kernel(const Flawed p) {
  TRIFUSE_SHARED_MEMORY(memory);
  float* values = reinterpret_cast<float*>(memory) + threadIdx.x;
  trifuse::cuda::async_copy<4>(values, p.out + threadIdx.x);
  if (p.barrier == 2) trifuse::cuda::async_copy_wait();
  p.out[threadIdx.x] = 2.0f * *values;
}

// Writes one float past the shared memory it asked for.
void overrun_kernel(const Flawed p) {
  TRIFUSE_SHARED_MEMORY(memory);
  reinterpret_cast<float*>(memory)[threadIdx.x + (p.barrier == 2 ? 0 : 1)] = 0.0f;
  p.out[threadIdx.x] = 0.0f;
}

}  // namespace

// Runs a small kernel of the emulator's own tests on one block of 64 threads; returns the CUDA error.
EXPORT int trifuse_emulator_run_small(const char* name, float* out, int barrier) {
  const struct {
    const char* name;
    void (*kernel)(Flawed);
  } kernels[] = {
      {"mirror", mirror_kernel}, {"warp_sum", warp_sum_kernel}, {"copy", copy_kernel}, {"overrun", overrun_kernel}};
  for (const auto& one : kernels) {
    if (__builtin_strcmp(one.name, name) == 0) {
      return trifuse::cuda::launch(one.kernel, 1, 1, 64, 64 * sizeof(float), nullptr, Flawed{out, barrier});
    }
  }
  return -1;
}
