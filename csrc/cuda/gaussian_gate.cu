// The Gaussian gates on a GPU: statistics and gates of a slice in one launch going forward; going backward one launch
// for the gradients of the entries and every slice's share of the parameters', and two that add the shares in a fixed
// order. Nothing is added atomically.
#include "gaussian_gate_team.cuh"

namespace trifuse::cuda {
namespace {

TRIFUSE_DEVICE float bell(float z) { return exp2_fast(-0.5f * kLog2e * z * z); }

// What a slice's entries are compared with: its statistics, and the heights of its Gaussians.
struct Slice {
  float mean, rest, inverse;  // the mean in two parts: far from zero its rounding would be that of every distance
  float base, height;
  const float *offsets, *widths;
  bool squared;

  TRIFUSE_DEVICE Slice(const GateArgs& p, int64_t row, float mean_, float rest_, float inverse_)
      : mean(mean_), rest(rest_), inverse(inverse_), squared(p.squared) {
    const float* const alpha = static_cast<const float*>(p.alpha);
    base = alpha != nullptr ? 1.0f : 0.0f;
    height = alpha != nullptr ? float(double(alpha[row]) * p.alpha_scale()) : 1.0f;
    offsets = static_cast<const float*>(p.offset) + row * p.gaussians;
    widths = static_cast<const float*>(p.width) + row * p.gaussians;
  }
  TRIFUSE_DEVICE float distance(float x) const { return (x - mean) - rest; }
  // 1 / (width sqrt(v))
  TRIFUSE_DEVICE float scale(int64_t k) const { return inverse / (squared ? sqrtf(widths[k]) : widths[k]); }
};

// The sum of the Gaussians' bells at a batch's entries.
template <int kBatch>
TRIFUSE_DEVICE void add_bells(const GateArgs& p, const Slice& slice, const float (&x)[kBatch], float (&bells)[kBatch]) {
#pragma unroll
  for (int j = 0; j < kBatch; ++j) bells[j] = 0.0f;
#pragma unroll 1
  for (int64_t k = 0; k < p.gaussians; ++k) {
    const float offset = slice.offsets[k], scale = slice.scale(k);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) bells[j] += bell((slice.distance(x[j]) - offset) * scale);
  }
}

template <typename S, int kWay, bool kHeld>
__global__ void __launch_bounds__(kThreads) gaussian_gate_fwd_kernel(const __grid_constant__ GateArgs p) {
  constexpr int kBatch = kFwdBatch;
  TRIFUSE_SHARED_MEMORY(memory);
  const Place<S, kWay> at(p);
  if (kWay == kWarpEach && !at.exists) return;  // the whole warp
  float x[kBatch];
  unsigned bits = 0;
  const auto take = [&](int64_t begin) {
    bits = taking_part<kBatch>(p, at, begin);
    read(p.x, at, begin, bits, x);
  };
  const int64_t end = kHeld ? 1 : at.count;
  if (kHeld) take(0);

  Sum<kHeld> total, kept, apart, squared;
  for (int64_t b = 0; b < end; b += kBatch) {
    if (!kHeld) take(b);
    float t = 0.0f, n = 0.0f;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      t += x[j];
      n += bits >> j & 1 ? 1.0f : 0.0f;
    }
    total.add(t);
    kept.add(n);
  }
  float first[2] = {total.total(), kept.total()};
  sum<S, kWay>(first, memory);
  const float count = first[1], some = count > 1.0f ? count : 1.0f, mean = first[0] / some;
  for (int64_t b = 0; b < end; b += kBatch) {
    if (!kHeld) take(b);
    float t = 0.0f, q = 0.0f;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const float d = bits >> j & 1 ? x[j] - mean : 0.0f;
      t += d;
      q = fma(d, d, q);
    }
    apart.add(t);
    squared.add(q);
  }
  float second[2] = {apart.total(), squared.total()};
  sum<S, kWay>(second, memory);
  const float rest = second[0] / some, squares = second[1] - second[0] * rest;
  const float divisor = p.alpha == nullptr ? some : count > 2.0f ? count - 1.0f : 1.0f;
  const float variance = squares < 0.0f ? 0.0f : squares / divisor;  // a NaN stays one
  const Slice slice(p, at.row, mean, rest, float(1.0 / sqrt(double(variance) + p.eps)));
  if (at.exists && at.rank == 0) {
    p.stats[at.slot] = mean;
    p.stats[p.slots + at.slot] = rest;
    p.stats[2 * p.slots + at.slot] = slice.inverse;
  }

  for (int64_t b = 0; b < end; b += kBatch) {
    if (!kHeld) take(b);
    float y[kBatch];
    add_bells(p, slice, x, y);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const float gate = bits >> j & 1 ? fma(slice.height, y[j], slice.base) : 0.0f;
      y[j] = p.multiply ? x[j] * gate : gate;
    }
    write(p.out, at, b, y);
  }
}

// With G the gradient of the gate, u = d - offset_k, z = u q_k and w = -G height bell(z) z that of z,
//   dx = dout gate + s - mean(s) - d Q / (v M),  s = sum_k w q_k,  Q = sum_k q_k sum w u,  M the variance's divisor.
template <typename S, int kWay, bool kHeld>
__global__ void __launch_bounds__(kThreads) gaussian_gate_bwd_kernel(const __grid_constant__ GateArgs p) {
  constexpr int kBatch = kBwdBatch;
  TRIFUSE_SHARED_MEMORY(memory);
  const Place<S, kWay> at(p);
  if (kWay == kWarpEach && !at.exists) return;  // the whole warp
  const Slice slice(p, at.row, p.stats[at.slot], p.stats[p.slots + at.slot], p.stats[2 * p.slots + at.slot]);
  float x[kBatch], g[kBatch];
  unsigned bits = 0;
  const auto take = [&](int64_t begin) {
    bits = taking_part<kBatch>(p, at, begin);
    read(p.x, at, begin, bits, x);
    read(p.dout, at, begin, bits, g);
  };
  const int64_t end = kHeld ? 1 : at.count;
  if (kHeld) take(0);

  Sum<kHeld> bells, kept;
  float push = 0.0f, pull = 0.0f;
#pragma unroll 1
  for (int64_t k = 0; k < p.gaussians; ++k) {
    const float offset = slice.offsets[k], scale = slice.scale(k);
    Sum<kHeld> sum_w, sum_wu;
    for (int64_t b = 0; b < end; b += kBatch) {
      if (!kHeld) take(b);
      float ws = 0.0f, wus = 0.0f, parts = 0.0f, n = 0.0f;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const float u = slice.distance(x[j]) - offset, z = u * scale;
        const float ours = (p.multiply ? g[j] * x[j] : g[j]) * bell(z), w = -(ours * slice.height) * z;
        ws += w;
        wus = fma(w, u, wus);
        parts += ours;
        n += bits >> j & 1 ? 1.0f : 0.0f;
      }
      sum_w.add(ws);
      sum_wu.add(wus);
      bells.add(parts);
      if (k == 0) kept.add(n);
    }
    float sums[2] = {sum_w.total(), sum_wu.total()};
    sum<S, kWay>(sums, memory);
    push = fma(scale, sums[0], push);
    pull = fma(scale, sums[1], pull);
    if (at.exists && at.rank == 0) {
      p.partials[2 * k * p.slots + at.slot] = -scale * sums[0];
      p.partials[(2 * k + 1) * p.slots + at.slot] = -scale * sums[1] * (p.squared ? 0.5f : 1.0f) / slice.widths[k];
    }
  }
  float last[2] = {bells.total(), kept.total()};
  sum<S, kWay>(last, memory);
  if (p.alpha != nullptr && at.exists && at.rank == 0) {
    p.partials[2 * p.gaussians * p.slots + at.slot] = float(double(last[0]) * p.alpha_scale());
  }
  const float count = last[1] > 1.0f ? last[1] : 1.0f;
  const float divisor = p.alpha == nullptr ? count : count > 2.0f ? count - 1.0f : 1.0f;
  const float shift = push / count, slope = pull * slice.inverse * slice.inverse / divisor;

  for (int64_t b = 0; b < end; b += kBatch) {
    if (!kHeld) take(b);
    float own[kBatch], gates[kBatch];  // s, and the sums of the bells
#pragma unroll
    for (int j = 0; j < kBatch; ++j) own[j] = gates[j] = 0.0f;
#pragma unroll 1
    for (int64_t k = 0; k < p.gaussians; ++k) {
      const float offset = slice.offsets[k], scale = slice.scale(k);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const float z = (slice.distance(x[j]) - offset) * scale, part = bell(z);
        const float ours = (p.multiply ? g[j] * x[j] : g[j]) * part;
        own[j] = fma(-(ours * slice.height) * z, scale, own[j]);  // as above: of a single entry it is the mean
        gates[j] += part;
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      float y = (own[j] - shift) - slice.distance(x[j]) * slope;
      if (p.multiply) y = fma(g[j], fma(slice.height, gates[j], slice.base), y);
      own[j] = bits >> j & 1 ? y : 0.0f;
    }
    write(p.out, at, b, own);
  }
}

// Adding up the slices' shares: those of one row are runs of `run` slots, `rows` runs apart. A first launch leaves
// `chunks` sums of every row and item, a second adds these.
struct SumArgs {
  const float* partials;  // (items, slots)
  double* sums;           // (items, rows, chunks)
  float *doffset, *dwidth, *dalpha;
  int64_t slots, rows, run, per_row, items, gaussians, chunks, per_chunk;
};

constexpr int kSideBySide = 32;  // rows that a block takes, an eighth of a warp's threads each

__global__ void __launch_bounds__(kThreads) gaussian_gate_sum_kernel(const __grid_constant__ SumArgs p) {
  TRIFUSE_SHARED_MEMORY(memory);
  double* const shared = reinterpret_cast<double*>(memory);
  const int rows_here = p.run < kSideBySide ? kSideBySide : 1, share = kThreads / rows_here;
  const int thread = int(threadIdx.x), local = thread % rows_here, rank = thread / rows_here;
  const int64_t blocks = (p.rows + rows_here - 1) / rows_here;
  const int64_t chunk = blockIdx.x % p.chunks, item = blockIdx.x / p.chunks / blocks;
  const int64_t row = blockIdx.x / p.chunks % blocks * rows_here + local;
  double total = 0.0;
  if (row < p.rows) {
    const int64_t begin = chunk * p.per_chunk, end = begin + p.per_chunk < p.per_row ? begin + p.per_chunk : p.per_row;
    const float* const from = p.partials + item * p.slots;
    for (int64_t m = begin + rank; m < end; m += share) total += from[(m / p.run * p.rows + row) * p.run + m % p.run];
  }
  shared[thread] = total;
  __syncthreads();
  for (int by = share / 2; by > 0; by /= 2) {
    if (rank < by) shared[thread] += shared[thread + by * rows_here];
    __syncthreads();
  }
  if (rank == 0 && row < p.rows) p.sums[(item * p.rows + row) * p.chunks + chunk] = shared[thread];
}

__global__ void __launch_bounds__(kThreads) gaussian_gate_finish_kernel(const __grid_constant__ SumArgs p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + int(threadIdx.x);
  if (i >= p.items * p.rows) return;
  double total = 0.0;
  for (int64_t c = 0; c < p.chunks; ++c) total += p.sums[i * p.chunks + c];
  const int64_t item = i / p.rows, row = i % p.rows, k = item / 2;
  float* const to = k == p.gaussians ? p.dalpha + row : (item % 2 == 0 ? p.doffset : p.dwidth) + row * p.gaussians + k;
  *to = float(total);
}

SumArgs sums_of(const GaussianGateBwdParams& p) {
  SumArgs s{};
  s.slots = p.heads * p.outer * p.inner;
  s.rows = p.rows;
  s.run = p.heads > 1 ? p.outer * p.inner : p.rows == 1 ? s.slots : p.outer_rows ? p.share * p.inner : p.share;
  s.per_row = p.rows > 0 ? s.slots / p.rows : 0;
  s.gaussians = p.gaussians;
  s.items = 2 * p.gaussians + (p.alpha != nullptr ? 1 : 0);
  s.chunks = s.per_row / 4096;  // by the shape alone
  if (s.chunks > 64) s.chunks = 64;
  if (s.chunks < 1) s.chunks = 1;
  s.per_chunk = (s.per_row + s.chunks - 1) / s.chunks;
  return s;
}

template <typename S, bool kForward, int kWay>
Error run(GateArgs& p, Stream stream) {
  constexpr int64_t kHere = kSlices<S, kWay>;
  p.tiles = kWay == kColumns ? p.outer * ((p.inner + kHere - 1) / kHere) : (p.outer * p.inner + kHere - 1) / kHere;
  const auto go = [&](auto kernel) { return launch(kernel, p.heads * p.tiles, 1, kThreads, kSharedBytes, stream, p); };
  const bool held = p.last_part <= int64_t(kTeam<S, kWay>) * (kForward ? kFwdBatch : kBwdBatch);
  if constexpr (kWay != kWarpEach) {
    if (!held) {
      if constexpr (kForward) return go(gaussian_gate_fwd_kernel<S, kWay, false>);
      return go(gaussian_gate_bwd_kernel<S, kWay, false>);
    }
  }
  if constexpr (kForward) return go(gaussian_gate_fwd_kernel<S, kWay, true>);
  return go(gaussian_gate_bwd_kernel<S, kWay, true>);
}

template <typename S, bool kForward>
Error pass(GateArgs& p, Stream stream) {
  p.part = p.length / p.heads;
  p.last_part = p.length - (p.heads - 1) * p.part;
  p.slots = p.heads * p.outer * p.inner;
  if (p.slots == 0) return kSuccess;
  if (p.inner >= 8 && p.x.inner == 1) return run<S, kForward, kColumns>(p, stream);
  if (p.last_part > kTeam<S, kWarpEach> * (kForward ? kFwdBatch : kBwdBatch))
    return run<S, kForward, kBlockEach>(p, stream);
  return run<S, kForward, kWarpEach>(p, stream);
}

template <bool kForward>
Error by_dtype(GateArgs& p, Stream stream) {
  if (p.dtype == DType::kFloat32) return pass<float, kForward>(p, stream);
  if (p.dtype == DType::kFloat16) return pass<f16, kForward>(p, stream);
  if (p.dtype == DType::kBFloat16) return pass<bf16, kForward>(p, stream);
  return kInvalidValue;
}

}  // namespace

Error gaussian_gate_fwd(const GaussianGateParams& params, Stream stream) {
  GateArgs p{};
  static_cast<GaussianGateShape&>(p) = params;
  p.x = params.x;
  p.out = params.out;
  p.stats = static_cast<float*>(params.stats);
  return by_dtype<true>(p, stream);
}

int64_t gaussian_gate_bwd_workspace_bytes(const GaussianGateBwdParams& p) {
  const SumArgs s = sums_of(p);
  return s.items * (s.rows * s.chunks * int64_t(sizeof(double)) + s.slots * int64_t(sizeof(float)));
}

Error gaussian_gate_bwd(const GaussianGateBwdParams& params, void* workspace, Stream stream) {
  SumArgs s = sums_of(params);
  s.sums = static_cast<double*>(workspace);
  float* const partials = reinterpret_cast<float*>(s.sums + s.items * s.rows * s.chunks);
  s.partials = partials;
  s.doffset = static_cast<float*>(params.doffset);
  s.dwidth = static_cast<float*>(params.dwidth);
  s.dalpha = static_cast<float*>(params.dalpha);

  GateArgs p{};
  static_cast<GaussianGateShape&>(p) = params;
  p.x = params.x;
  p.dout = params.dout;
  p.out = params.dx;
  p.stats = const_cast<float*>(static_cast<const float*>(params.stats));
  p.partials = partials;
  Error error = by_dtype<false>(p, stream);
  if (error != kSuccess || s.rows == 0) return error;
  const int64_t blocks = (s.run < kSideBySide ? (s.rows + kSideBySide - 1) / kSideBySide : s.rows) * s.items * s.chunks;
  error = launch(gaussian_gate_sum_kernel, blocks, 1, kThreads, kThreads * int64_t(sizeof(double)), stream, s);
  if (error != kSuccess) return error;
  return launch(gaussian_gate_finish_kernel, (s.items * s.rows + kThreads - 1) / kThreads, 1, kThreads, 0, stream, s);
}

}  // namespace trifuse::cuda
