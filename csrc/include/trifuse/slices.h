// Tensors seen as slices along one axis: what attention and gates along an axis share. No torch, no CUDA header.
#pragma once

#include "trifuse/types.h"

// Members of parameters that kernels of a device call too.
#if defined(__CUDACC__)
#define TRIFUSE_EVERYWHERE __host__ __device__
#else
#define TRIFUSE_EVERYWHERE
#endif

namespace trifuse {

// An (outer, axis, inner) tensor wherever its elements lie; strides are in elements. A slice is what one pair
// (outer, inner) holds along the axis: with inner == 1 it is a row, otherwise columns lie side by side.
struct SliceView {
  void* ptr = nullptr;
  int64_t outer = 0;
  int64_t axis = 0;
  int64_t inner = 0;
};

struct SliceShape {
  int64_t outer = 0;
  int64_t length = 0;  // of the axis
  int64_t inner = 0;
  DType dtype = DType::kFloat32;
};

}  // namespace trifuse
