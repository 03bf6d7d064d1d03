// Runs CUDA kernels on the CPU, so that they can be tested where there is no GPU and no nvcc. The
// threads of a block are fibers that switch only where CUDA synchronizes them (barriers, shuffles,
// votes), one block after another, in ascending or descending thread order; a result that depends on
// the order, or on memory that nothing wrote, is a missing barrier. Shared memory is NaN before every
// block, asynchronous copies arrive only when they are waited for, and a barrier that some threads
// never reach is reported instead of hanging. Tensor-core and bulk-copy instructions are outside it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static __attribute__((section("trifuse_shared")))
#define __syncthreads() ::trifuse::emulator::sync_threads(__LINE__)
#define __syncwarp() ::trifuse::emulator::sync_warp(__LINE__)

#define TRIFUSE_DEVICE inline
#define TRIFUSE_SHARED_MEMORY(name) unsigned char* const name = ::trifuse::emulator::shared_memory()

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace trifuse::emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
extern Index thread_index, block_index, block_dim, grid_dim;

constexpr int kWarp = 32;

void sync_threads(int line);
void sync_warp(int line);
unsigned char* shared_memory();
// Gives `bytes` of value to the warp and returns the warp's 32 values, 16 bytes apart.
const unsigned char* exchange(const void* value, size_t bytes, int kind);
void async_copy(void* to, const void* from, size_t bytes);
void async_copy_wait();

// What a launch returned other than success, in words.
const char* message();
void set_descending(bool descending);
bool descending();
void set_multiprocessors(int64_t count);
int64_t multiprocessors();

constexpr int kLaunchFailure = 719;  // cudaErrorLaunchFailure
int run(Index grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel);

template <typename T>
T value_of_lane(const unsigned char* values, int lane) {
  T value;
  __builtin_memcpy(&value, values + 16 * lane, sizeof(T));
  return value;
}

inline int lane() { return int(thread_index.x) % kWarp; }

}  // namespace trifuse::emulator

#define threadIdx ::trifuse::emulator::thread_index
#define blockIdx ::trifuse::emulator::block_index
#define blockDim ::trifuse::emulator::block_dim
#define gridDim ::trifuse::emulator::grid_dim

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const unsigned char* values = trifuse::emulator::exchange(&value, sizeof(T), 1);
  return trifuse::emulator::value_of_lane<T>(values, trifuse::emulator::lane() ^ mask);
}
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  const unsigned char* values = trifuse::emulator::exchange(&value, sizeof(T), 2);
  return trifuse::emulator::value_of_lane<T>(values, from & 31);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned by) {
  const unsigned char* values = trifuse::emulator::exchange(&value, sizeof(T), 3);
  const int from = trifuse::emulator::lane() - int(by);
  return from < 0 ? value : trifuse::emulator::value_of_lane<T>(values, from);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned by) {
  const unsigned char* values = trifuse::emulator::exchange(&value, sizeof(T), 4);
  const int from = trifuse::emulator::lane() + int(by);
  return from > 31 ? value : trifuse::emulator::value_of_lane<T>(values, from);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const int mine = predicate != 0;
  const unsigned char* values = trifuse::emulator::exchange(&mine, sizeof(int), 5);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= unsigned(trifuse::emulator::value_of_lane<int>(values, i)) << i;
  return votes;
}

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}

namespace trifuse::cuda {

constexpr int kSuccess = 0, kInvalidValue = 1;

template <int kBytes>
void async_copy(void* shared, const void* global) {
  emulator::async_copy(shared, global, kBytes);
}
inline void async_copy_wait() { emulator::async_copy_wait(); }
inline int opaque(int x) { return x; }
inline int64_t multiprocessors() { return emulator::multiprocessors(); }

template <typename Params>
Error launch(void (*kernel)(Params), int64_t grid_x, int grid_y, int threads, int64_t shared_bytes, Stream,
             const Params& params) {
  if (grid_x <= 0) return kSuccess;
  if (grid_x > 0x7fffffff) return kInvalidValue;
  return emulator::run({unsigned(grid_x), unsigned(grid_y), 1}, unsigned(threads), size_t(shared_bytes),
                       [&] { kernel(params); });
}

}  // namespace trifuse::cuda
