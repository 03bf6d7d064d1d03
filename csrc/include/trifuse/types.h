// What every op's parameters are made of. No torch, no CUDA header.
#pragma once

#include <cstdint>

namespace trifuse {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

// A (batch, dim, seqlen) tensor wherever its elements lie; strides are in elements.
struct SeqView {
  void* ptr = nullptr;
  int64_t batch = 0;
  int64_t dim = 0;
  int64_t time = 0;
};

namespace cpu {

// Calls body(begin, end) over [0, n) on the caller's thread pool.
struct Threads {
  void* context;
  void (*run)(void* context, int64_t n, void* body_context,
              void (*body)(void* body_context, int64_t begin, int64_t end));
  int64_t count;
};

}  // namespace cpu

// cudaStream_t and cudaError_t, named without their header.
namespace cuda {

using Stream = void*;
using Error = int;

}  // namespace cuda
}  // namespace trifuse
