// What a kernel file needs of its compiler: launching, shared memory, warp and copy instructions. With
// nvcc these are CUDA; with any other compiler they are the emulator's, so that one kernel source
// serves both. Kernels take one params struct by value and use dynamic shared memory only.
#pragma once

#include "trifuse/math.h"
#include "trifuse/types.h"

#if defined(__CUDACC__)

#define TRIFUSE_DEVICE __device__ __forceinline__
#define TRIFUSE_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

namespace trifuse::cuda {

constexpr int kSuccess = cudaSuccess, kInvalidValue = cudaErrorInvalidValue;

// Copies kBytes (4, 8 or 16) to shared memory; the calling thread sees them after async_copy_wait.
template <int kBytes>
TRIFUSE_DEVICE void async_copy(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes) : "memory");
}
TRIFUSE_DEVICE void async_copy_wait() { asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory"); }

// x, as if the compiler could not know it: what is computed from it is not hoisted out of loops, where
// it would hold registers.
TRIFUSE_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

inline int64_t multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  return count;
}

template <typename Params>
Error launch(void (*kernel)(Params), int64_t grid_x, int grid_y, int threads, int64_t shared_bytes, Stream stream,
             const Params& params) {
  if (grid_x <= 0) return kSuccess;
  if (grid_x > 0x7fffffff) return kInvalidValue;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<dim3(unsigned(grid_x), unsigned(grid_y)), threads, size_t(shared_bytes),
           static_cast<cudaStream_t>(stream)>>>(params);
  return cudaGetLastError();
}

}  // namespace trifuse::cuda

#else
#include "../../emulate/cuda_emulator.h"
#endif
