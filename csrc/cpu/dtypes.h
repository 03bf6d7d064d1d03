// From a dtype to the types a kernel is a template of.
#pragma once

#include <type_traits>

#include "trifuse/simd.h"
#include "trifuse/types.h"

namespace trifuse::cpu {
namespace {

// Calls f with a null pointer of each of the types that a dtype stands for.
template <class F>
auto with_sequence_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64: return f(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    case DType::kFloat16: return f(static_cast<float*>(nullptr), static_cast<f16*>(nullptr));
    case DType::kBFloat16: return f(static_cast<float*>(nullptr), static_cast<bf16*>(nullptr));
    default: return f(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
  }
}

}  // namespace
}  // namespace trifuse::cpu
