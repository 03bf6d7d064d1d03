// The small kernels around the selective scan: partial gradients added in a fixed order, and states
// that pass through sequences without a step.
#pragma once

#include "trifuse/cuda_platform.h"
#include "trifuse/selective_scan.h"

namespace trifuse::cuda {

// to[i] = sum over rows of from[i], for every index i of four sizes.
struct SumTask {
  const float* from;
  float* to;
  int64_t rows, row_stride;
  int64_t size[4], from_stride[4], to_stride[4];
};

struct SumTasks {
  static constexpr int kMost = 5;  // dA, dB, dC, dD, ddelta_bias
  int count = 0;
  SumTask task[kMost];

  void add(const SumTask& one) { task[count++] = one; }
};

__global__ void __launch_bounds__(256) sum_rows_kernel(const __grid_constant__ SumTasks p) {
  const SumTask& task = p.task[blockIdx.y];
  const int64_t count = task.size[0] * task.size[1] * task.size[2] * task.size[3];
  for (int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < count; e += int64_t(gridDim.x) * blockDim.x) {
    int64_t rest = e, from = 0, to = 0;
#pragma unroll 1
    for (int i = 3; i >= 0; --i) {
      const int64_t at = rest % task.size[i];
      rest /= task.size[i];
      from += at * task.from_stride[i];
      to += at * task.to_stride[i];
    }
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t row = 0; row < task.rows; ++row) sum += task.from[from + row * task.row_stride];
    task.to[to] = sum;
  }
}

inline Error launch_sums(const SumTasks& tasks, Stream stream) {
  int64_t most = 0;
  for (int i = 0; i < tasks.count; ++i) {
    const int64_t* size = tasks.task[i].size;
    const int64_t count = size[0] * size[1] * size[2] * size[3];
    if (count > most) most = count;
  }
  int64_t blocks = (most + 255) / 256;
  if (blocks > 4096) blocks = 4096;
  return tasks.count == 0 ? kSuccess : launch(sum_rows_kernel, blocks, tasks.count, 256, 0, stream, tasks);
}

struct PassThrough {
  const float* from;  // (rows, row_size), or null for zeros
  float* to;
  const int64_t* cu_seqlens;  // null: every row
  int64_t rows, row_size;
};

__global__ void __launch_bounds__(256) pass_through_kernel(const __grid_constant__ PassThrough p) {
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    if (p.cu_seqlens != nullptr && p.cu_seqlens[row] != p.cu_seqlens[row + 1]) continue;
    for (int64_t i = threadIdx.x; i < p.row_size; i += blockDim.x) {
      p.to[row * p.row_size + i] = p.from == nullptr ? 0.0f : p.from[row * p.row_size + i];
    }
  }
}

inline Error launch_pass_through(const PassThrough& p, Stream stream) {
  return launch(pass_through_kernel, p.rows < 4096 ? p.rows : 4096, 1, 256, 0, stream, p);
}

}  // namespace trifuse::cuda
