// One step of AdamW of some ranks of many parameters on CUDA. A first launch counts the steps of every active rank and
// finds its two factors in double precision, from which the second steps the numbers, several tensors in one launch.
#include "trifuse/cuda_platform.h"
#include "trifuse/lora_adamw.h"

namespace trifuse::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kNumbers = 4 * kThreads;  // of a block
constexpr int kMostTensors = 24;        // of a launch, whose parameters are passed by value: 4 KB at most

struct TensorArgs {
  void* param;
  const void* grad;
  float *exp_avg, *exp_avg_sq, *steps;
  float* factors;               // (active, 2): lr / (1 - beta1^t) and sqrt(1 - beta2^t)
  int64_t numbers, inner, end;  // numbers that are stepped; end: the first block that is not this tensor's
  int64_t ranks, first, active;
  double lr;
};

struct AdamwArgs {
  TensorArgs tensors[kMostTensors];
  int count;
  bool from_grad;  // the new moment is the gradient and a part of the way to the old one, which is the shorter way
  double beta1, beta2;
  float weight1, beta2_as_float, weight2, eps, sign, weight_decay;
};

// The tensor of a block; `block`: its place among those of the tensor.
TRIFUSE_DEVICE const TensorArgs& tensor_of_block(const AdamwArgs& p, int64_t& block) {
  int at = 0;
  int64_t begin = 0;
  while (at < p.count - 1 && int64_t(blockIdx.x) >= p.tensors[at].end) begin = p.tensors[at++].end;
  block = int64_t(blockIdx.x) - begin;
  return p.tensors[at];
}

__global__ void __launch_bounds__(kThreads) lora_adamw_count_kernel(const __grid_constant__ AdamwArgs p) {
  const TensorArgs& t = p.tensors[blockIdx.x];
  for (int64_t i = int(threadIdx.x); i < t.active; i += kThreads) {
    const float steps = t.steps[t.first + i] + 1.0f;
    t.steps[t.first + i] = steps;
    t.factors[2 * i] = float(t.lr / (1.0 - pow(p.beta1, double(steps))));
    t.factors[2 * i + 1] = float(sqrt(1.0 - pow(p.beta2, double(steps))));
  }
}

// Where the number lies that is stepped as the one of this index; `rank`: its rank among the active ones.
template <typename Index>
TRIFUSE_DEVICE int64_t place(const TensorArgs& t, Index number, int64_t& rank) {
  const Index run = number / Index(t.inner), outer = run / Index(t.active);
  rank = int64_t(run - outer * Index(t.active));
  return (int64_t(outer) * t.ranks + t.first + rank) * t.inner + int64_t(number - run * Index(t.inner));
}

template <typename S>
__global__ void __launch_bounds__(kThreads) lora_adamw_kernel(const __grid_constant__ AdamwArgs p) {
  int64_t block = 0;
  const TensorArgs& t = tensor_of_block(p, block);
  const float decay = float(1.0 - t.lr * double(p.weight_decay));
#pragma unroll
  for (int j = 0; j < kNumbers / kThreads; ++j) {
    const int64_t number = block * kNumbers + j * kThreads + int(threadIdx.x);
    if (number >= t.numbers) return;
    int64_t rank = 0;
    const int64_t at = t.numbers <= 0xffffffff ? place(t, uint32_t(number), rank) : place(t, number, rank);
    S* const param = static_cast<S*>(t.param) + at;
    const float g = p.sign * to_float(static_cast<const S*>(t.grad)[at]);
    const float old = t.exp_avg[at], from = p.from_grad ? g : old;
    const float m = fma(p.weight1, (p.from_grad ? old : g) - from, from);
    const float v = fma(p.weight2, g * g, p.beta2_as_float * t.exp_avg_sq[at]);
    const float size = sqrtf(v) / t.factors[2 * rank + 1] + p.eps;
    *param = from_float<S>(to_float(*param) * decay - t.factors[2 * rank] * m / size);
    t.exp_avg[at] = m;
    t.exp_avg_sq[at] = v;
  }
}

Error launch_batch(const AdamwArgs& p, DType dtype, int64_t blocks, Stream stream) {
  const Error error = launch(lora_adamw_count_kernel, p.count, 1, kThreads, 0, stream, p);
  if (error != kSuccess) return error;
  switch (dtype) {
    case DType::kFloat32: return launch(lora_adamw_kernel<float>, blocks, 1, kThreads, 0, stream, p);
    case DType::kFloat16: return launch(lora_adamw_kernel<f16>, blocks, 1, kThreads, 0, stream, p);
    case DType::kBFloat16: return launch(lora_adamw_kernel<bf16>, blocks, 1, kThreads, 0, stream, p);
    default: return kInvalidValue;
  }
}

// All tensors of one dtype; `factors` moves on.
Error step(const LoraAdamwParams& params, DType dtype, float*& factors, Stream stream) {
  AdamwArgs p{};
  p.beta1 = params.beta1;
  p.beta2 = params.beta2;
  p.from_grad = params.beta1 <= 0.5;
  p.weight1 = float(p.from_grad ? params.beta1 : 1.0 - params.beta1);
  p.beta2_as_float = float(params.beta2);
  p.weight2 = float(1.0 - params.beta2);
  p.eps = float(params.eps);
  p.sign = params.maximize ? -1.0f : 1.0f;
  p.weight_decay = float(params.weight_decay);
  int64_t blocks = 0;
  for (int64_t i = 0; i < params.count; ++i) {
    const LoraAdamwTensor& from = params.tensors[i];
    const int64_t active = from.last - from.first;
    if (from.dtype != dtype || active == 0) continue;
    TensorArgs& t = p.tensors[p.count++];
    t = {from.param,
         from.grad,
         static_cast<float*>(from.exp_avg),
         static_cast<float*>(from.exp_avg_sq),
         from.steps,
         factors,
         from.outer * active * from.inner,
         from.inner,
         0,
         from.ranks,
         from.first,
         active,
         from.lr};
    blocks += (t.numbers + kNumbers - 1) / kNumbers;
    t.end = blocks;
    factors += 2 * active;
    if (p.count == kMostTensors) {
      const Error error = launch_batch(p, dtype, blocks, stream);
      if (error != kSuccess) return error;
      p.count = 0, blocks = 0;
    }
  }
  return p.count > 0 ? launch_batch(p, dtype, blocks, stream) : kSuccess;
}

}  // namespace

int64_t lora_adamw_scratch_bytes(const LoraAdamwParams& p) {
  int64_t ranks = 0;
  for (int64_t i = 0; i < p.count; ++i) ranks += p.tensors[i].last - p.tensors[i].first;
  return ranks * 2 * int64_t(sizeof(float));
}

Error lora_adamw(const LoraAdamwParams& p, void* scratch, Stream stream) {
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.tensors[i].dtype == DType::kFloat64) return kInvalidValue;
  }
  float* factors = static_cast<float*>(scratch);
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const Error error = step(p, dtype, factors, stream);
    if (error != kSuccess) return error;
  }
  return kSuccess;
}

}  // namespace trifuse::cuda
