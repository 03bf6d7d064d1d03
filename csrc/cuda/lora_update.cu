// out = round(weight + scale * B diag(p) A) on CUDA: a block takes a tile of the weight, a thread four rows and four
// columns of it, and ranks pass through shared memory some at a time. The weight is read once and written once, and
// ranks are summed in order. Sums of squares are left by block and added in order by one block more.
#include "philox.cuh"
#include "trifuse/lora_update.h"

namespace trifuse::cuda {
namespace {

constexpr int kThreads = 256, kPiece = 4;
constexpr int kTileRows = 32, kTileColumns = 128;
constexpr int kAcross = kTileColumns / kPiece;  // threads along the columns: a warp
constexpr int kRanks = 16;                      // that shared memory holds
constexpr unsigned kFullWarp = 0xffffffffu;
static_assert(kAcross * kTileRows / kPiece == kThreads, "every thread has a piece of the tile");

struct UpdateArgs : LoraUpdateParams {
  int64_t across;    // tiles along the columns
  double* partials;  // (tiles, 2), or null
  bool vectors;      // four neighbours are read and written at once
};

struct Factors {
  float A[kRanks][kTileColumns];
  float B[kRanks][kTileRows];  // times scale and p
};

template <typename S>
struct alignas(sizeof(S) * kPiece) Four {
  S v[kPiece];
};

// v rounded down in size to a number of S after the low bits of a random word were added. Half precision counts in
// steps of 2^-24 below 2^-14: there the word is added in 8192nds of a step.
template <typename S>
TRIFUSE_DEVICE S round_stochastically(float v, uint32_t word);
template <>
TRIFUSE_DEVICE float round_stochastically<float>(float v, uint32_t) {
  return v;
}
template <>
TRIFUSE_DEVICE bf16 round_stochastically<bf16>(float v, uint32_t word) {
  const uint32_t bits = trifuse::detail::bit_cast<uint32_t>(v), size = bits & 0x7fffffffu;
  if (size >= 0x7f800000u) return from_float<bf16>(v);
  return {uint16_t((bits + (word & 0xffffu)) >> 16)};
}
template <>
TRIFUSE_DEVICE f16 round_stochastically<f16>(float v, uint32_t word) {
  const uint32_t bits = trifuse::detail::bit_cast<uint32_t>(v), size = bits & 0x7fffffffu;
  if (size >= 0x47800000u) return from_float<f16>(v);
  const uint32_t whole = size < 0x38800000u ? uint32_t(fabsf(v) * 0x1p37f) : size - 0x38000000u;
  return {uint16_t((bits >> 16 & 0x8000u) | (whole + (word & 0x1fffu)) >> 13)};
}

template <typename AdapterS>
TRIFUSE_DEVICE void load_factors(const UpdateArgs& p, Factors& to, int64_t row, int64_t column, int64_t first) {
  const AdapterS* const A = static_cast<const AdapterS*>(p.A);
  const AdapterS* const B = static_cast<const AdapterS*>(p.B);
  for (int i = int(threadIdx.x); i < kRanks * kTileColumns; i += kThreads) {
    const int64_t r = first + i / kTileColumns, c = column + i % kTileColumns;
    const bool here = r < p.rank && c < p.columns;
    to.A[i / kTileColumns][i % kTileColumns] = here ? to_float(A[r * p.A_row + c * p.A_column]) : 0.0f;
  }
  for (int i = int(threadIdx.x); i < kRanks * kTileRows; i += kThreads) {
    const int64_t r = first + i % kRanks, n = row + i / kRanks;
    float b = 0.0f;
    if (r < p.rank && n < p.rows) {
      const float scale = p.p != nullptr ? float(p.scale) * static_cast<const float*>(p.p)[r] : float(p.scale);
      b = scale * to_float(B[n * p.B_row + r * p.B_column]);
    }
    to.B[i % kRanks][i / kRanks] = b;
  }
}

// Four neighbours of a row, of which `count` exist.
template <typename S>
TRIFUSE_DEVICE Four<S> read(const UpdateArgs& p, const S* from, int64_t count) {
  if (p.vectors && count >= kPiece) return *reinterpret_cast<const Four<S>*>(from);
  Four<S> four{};
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    if (i < count) four.v[i] = from[i];
  }
  return four;
}
template <typename S>
TRIFUSE_DEVICE void write(const UpdateArgs& p, S* to, const Four<S>& four, int64_t count) {
  if (p.vectors && count >= kPiece) {
    *reinterpret_cast<Four<S>*>(to) = four;
    return;
  }
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    if (i < count) to[i] = four.v[i];
  }
}

// Where rounding is stochastic, a word for each of the thread's numbers, by row and column of what lies here.
TRIFUSE_DEVICE void draw(const UpdateArgs& p, uint32_t (&words)[kPiece][kPiece], int64_t row, int64_t column) {
  const uint64_t seed = uint64_t(*p.seed);
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    uint32_t w[4];
    if (p.transposed) {
      philox_columns(w, seed, uint64_t(column + i), uint64_t(row));
    } else {
      philox_columns(w, seed, uint64_t(row + i), uint64_t(column));
    }
#pragma unroll
    for (int j = 0; j < kPiece; ++j) (p.transposed ? words[j][i] : words[i][j]) = w[j];
  }
}

TRIFUSE_DEVICE double sum_of_warp(double x) {
#pragma unroll
  for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(kFullWarp, x, by);
  return x;
}

// The sum over the block, for its first thread.
TRIFUSE_DEVICE double sum_of_block(double x, double* shared) {
  x = sum_of_warp(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kThreads / 32; ++w) sum += shared[w];
  }
  return sum;
}

template <typename S, typename AdapterS, bool kRandom>
__global__ void __launch_bounds__(kThreads) lora_update_kernel(const __grid_constant__ UpdateArgs p) {
  TRIFUSE_SHARED_MEMORY(memory);
  Factors& factors = *reinterpret_cast<Factors*>(memory);
  const int64_t tile_row = blockIdx.x / p.across * kTileRows, tile_column = blockIdx.x % p.across * kTileColumns;
  const int up = int(threadIdx.x) / kAcross * kPiece, along = int(threadIdx.x) % kAcross * kPiece;
  float sum[kPiece][kPiece] = {};
  for (int64_t first = 0; first < p.rank; first += kRanks) {
    load_factors<AdapterS>(p, factors, tile_row, tile_column, first);
    __syncthreads();
    const int ranks = p.rank - first < kRanks ? int(p.rank - first) : kRanks;
    for (int r = 0; r < ranks; ++r) {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
#pragma unroll
        for (int j = 0; j < kPiece; ++j) sum[i][j] = fma(factors.B[r][up + i], factors.A[r][along + j], sum[i][j]);
      }
    }
    __syncthreads();
  }

  const int64_t row = tile_row + up, column = tile_column + along, count = p.columns - column;
  uint32_t words[kPiece][kPiece] = {};
  if constexpr (kRandom) draw(p, words, row, column);
  float squares = 0.0f, lost = 0.0f;
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    if (row + i >= p.rows || count <= 0) break;
    const S* const from = static_cast<const S*>(p.weight) + (row + i) * p.weight_row + column;
    Four<S> four = read(p, from, count);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      const float before = to_float(four.v[j]), after = before + sum[i][j];
      four.v[j] = kRandom ? round_stochastically<S>(after, words[i][j]) : from_float<S>(after);
      if (j >= count) continue;
      const float rest = (to_float(four.v[j]) - before) - sum[i][j];
      squares = fma(sum[i][j], sum[i][j], squares);
      lost = fma(rest, rest, lost);
    }
    write(p, static_cast<S*>(p.out) + (row + i) * p.out_row + column, four, count);
  }
  if (p.partials == nullptr) return;
  double* const shared = reinterpret_cast<double*>(memory);
  const double of_update = sum_of_block(squares, shared), of_loss = sum_of_block(lost, shared);
  if (threadIdx.x == 0) {
    p.partials[2 * int64_t(blockIdx.x)] = of_update;
    p.partials[2 * int64_t(blockIdx.x) + 1] = of_loss;
  }
}

struct SumArgs {
  const double* partials;
  double* sums;
  int64_t tiles;
};

__global__ void __launch_bounds__(kThreads) lora_update_sum_kernel(const __grid_constant__ SumArgs p) {
  TRIFUSE_SHARED_MEMORY(memory);
  double update = 0, lost = 0;
  for (int64_t i = int(threadIdx.x); i < p.tiles; i += kThreads) {
    update += p.partials[2 * i];
    lost += p.partials[2 * i + 1];
  }
  double* const shared = reinterpret_cast<double*>(memory);
  update = sum_of_block(update, shared);
  lost = sum_of_block(lost, shared);
  if (threadIdx.x == 0) p.sums[0] = update, p.sums[1] = lost;
}

int64_t tiles_across(const LoraUpdateParams& p) { return (p.columns + kTileColumns - 1) / kTileColumns; }
int64_t tiles_of(const LoraUpdateParams& p) { return (p.rows + kTileRows - 1) / kTileRows * tiles_across(p); }

template <typename S, typename AdapterS>
Error launch_update(const UpdateArgs& p, Stream stream) {
  if constexpr (sizeof(S) == 2) {
    if (p.seed != nullptr) {
      return launch(lora_update_kernel<S, AdapterS, true>, tiles_of(p), 1, kThreads, sizeof(Factors), stream, p);
    }
  }
  return launch(lora_update_kernel<S, AdapterS, false>, tiles_of(p), 1, kThreads, sizeof(Factors), stream, p);
}

Error by_dtypes(const UpdateArgs& p, Stream stream) {
  const bool wide = p.adapter_dtype == DType::kFloat32;
  if (!wide && p.adapter_dtype != p.dtype) return kInvalidValue;
  switch (p.dtype) {
    case DType::kFloat32: return launch_update<float, float>(p, stream);
    case DType::kFloat16: return wide ? launch_update<f16, float>(p, stream) : launch_update<f16, f16>(p, stream);
    case DType::kBFloat16: return wide ? launch_update<bf16, float>(p, stream) : launch_update<bf16, bf16>(p, stream);
    default: return kInvalidValue;
  }
}

}  // namespace

int64_t lora_update_scratch_bytes(const LoraUpdateParams& p) {
  return p.sums != nullptr ? tiles_of(p) * 2 * int64_t(sizeof(double)) : 0;
}

Error lora_update(const LoraUpdateParams& params, void* scratch, Stream stream) {
  UpdateArgs p{};
  static_cast<LoraUpdateParams&>(p) = params;
  p.across = tiles_across(p);
  p.partials = p.sums != nullptr ? static_cast<double*>(scratch) : nullptr;
  const uintptr_t bytes = p.dtype == DType::kFloat32 ? 4 * kPiece : 2 * kPiece;
  p.vectors = p.weight_row % kPiece == 0 && p.out_row % kPiece == 0 &&
              reinterpret_cast<uintptr_t>(p.weight) % bytes == 0 && reinterpret_cast<uintptr_t>(p.out) % bytes == 0;
  const Error error = by_dtypes(p, stream);
  if (error != kSuccess || p.sums == nullptr) return error;
  return launch(lora_update_sum_kernel, 1, 1, kThreads, 64, stream, SumArgs{p.partials, p.sums, tiles_of(p)});
}

}  // namespace trifuse::cuda
