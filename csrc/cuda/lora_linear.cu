// The passes of a low-rank adapter on a GPU: how each is cut into blocks, and the sums of what they leave behind.
//
// The kernels are templates over the dtype of x, compiled in a file of each; a cut depends on the sizes alone.
#include "lora_linear_launch.cuh"

namespace trifuse::cuda {
namespace lora {

constexpr int64_t kWantedBlocks = 512;
constexpr int64_t kLeastRows = 64, kManyRows = 256;  // of a split
constexpr int64_t kFewPieces = 4;

// Adds `count` matrices (rows, columns) in their order; without one the sum is zero.
struct SumArgs {
  const float* parts;
  int64_t count, part;  // how many, and how far apart
  int64_t rows, columns;
  void* out;
  int64_t out_row, out_column;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) lora_sum_kernel(const __grid_constant__ SumArgs p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + int(threadIdx.x);
  if (i >= p.rows * p.columns) return;
  float total = 0.0f;
#pragma unroll 4
  for (int64_t k = 0; k < p.count; ++k) total += p.parts[k * p.part + i];
  const int64_t row = i / p.columns;
  static_cast<T*>(p.out)[row * p.out_row + (i - row * p.columns) * p.out_column] = from_float<T>(total);
}

Error add(const SumArgs& p, DType dtype, Stream stream) {
  const auto go = [&](auto kernel) {
    return launch(kernel, (p.rows * p.columns + kThreads - 1) / kThreads, 1, kThreads, 0, stream, p);
  };
  if (dtype == DType::kFloat16) return go(lora_sum_kernel<f16>);
  if (dtype == DType::kBFloat16) return go(lora_sum_kernel<bf16>);
  return go(lora_sum_kernel<float>);
}

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t between(int64_t n, int64_t least, int64_t most) { return n < least ? least : n > most ? most : n; }

// Cuts `n` into about `wanted` runs of whole steps: their number and length.
struct Cut {
  int64_t count, length;
  Cut(int64_t n, int64_t step, int64_t wanted) {
    length = parts(parts(n, step), wanted < 1 ? 1 : wanted) * step;
    count = length > 0 ? parts(n, length) : 0;
  }
};

bool narrow(DType dtype) { return dtype != DType::kFloat32; }
int64_t width(DType dtype) { return narrow(dtype) ? 2 * kStrip : kStrip; }  // columns that a warp takes at once
int group_of(int64_t ranks) { return ranks <= 4 ? 4 : kRanks; }

// Columns of `dots`: many rows are blocks enough without cutting these.
Cut dots_pieces(int64_t rows, int64_t columns, int64_t ranks) {
  return {columns, kStrip, parts(kWantedBlocks, between(parts(rows, kTile) * parts(ranks, kRanks), 1, kWantedBlocks))};
}
// Columns and rows of `gather`. A column's sums cost (pieces of the columns) numbers for a row of Z and (splits of the
// rows) numbers for a column of dB; both are few where rows are many.
Cut gather_pieces(const LoraParams& p, int64_t columns) {
  const int64_t wanted = parts(kWantedBlocks, between(parts(p.rows, kManyRows), 1, kWantedBlocks));
  return {columns, width(p.dtype), wanted < kFewPieces ? kFewPieces : wanted};
}
Cut gather_splits(const LoraParams& p, int64_t columns, int64_t ranks) {
  const int64_t blocks = gather_pieces(p, columns).count * parts(ranks, group_of(ranks));
  return {p.rows, kLeastRows, parts(kWantedBlocks, between(blocks, 1, kWantedBlocks))};
}
Cut expand_splits(const LoraParams& p, int64_t columns) {
  return {p.rows, kTile, parts(kWantedBlocks, between(parts(columns, width(p.dtype)), 1, kWantedBlocks))};
}

// Ranks and columns are counted in 32 bits.
constexpr int64_t kMost = int64_t(1) << 30;

bool fits(const LoraParams& p) {
  const bool half = p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16;
  return (half || p.dtype == DType::kFloat32) && (p.adapter_dtype == p.dtype || p.adapter_dtype == DType::kFloat32) &&
         p.n_adapters == 1 && p.order == nullptr && p.adapters->rank < kMost && p.in < kMost && p.out < kMost;
}

// Whether four elements of each row may be accessed at once.
bool aligned(const LoraParams& p, const void* ptr, int64_t row) {
  const int64_t bytes = narrow(p.dtype) ? 2 : 4;
  return reinterpret_cast<uintptr_t>(ptr) % uintptr_t(kQuad * bytes) == 0 && (row % kQuad == 0 || p.rows <= 1);
}

Args arguments(const LoraParams& p, int64_t columns, bool dropout) {
  const LoraAdapter& a = *p.adapters;
  Args args{};
  args.rows = p.rows;
  args.columns = int(columns);
  args.ranks = int(a.rank);
  args.p = static_cast<const float*>(a.p);
  args.scale = float(a.scale);
  args.seed = dropout ? p.seed : nullptr;
  args.threshold = p.threshold;
  args.keep_scale = args.seed != nullptr ? float(p.keep_scale) : 1.0f;
  return args;
}
void set_source(Args& args, const LoraParams& p, const void* ptr, int64_t row) {
  args.source = ptr;
  args.source_row = row;
  args.vectors = aligned(p, ptr, row);
}
void set_out(Args& args, const LoraParams& p, void* ptr, int64_t row) {
  args.out = ptr;
  args.out_row = row;
  args.vectors = aligned(p, ptr, row);
}
void set_coefficients(Args& args, const void* ptr, int64_t row) {
  args.coefficients = static_cast<const float*>(ptr);
  args.coefficients_row = row;
}
Factor factor_A(const LoraParams& p) {
  return {p.adapters->A, p.adapters->A_row, 1, p.adapter_dtype == p.dtype && narrow(p.dtype)};
}
Factor factor_B(const LoraParams& p) {
  return {p.adapters->B, 1, p.adapters->B_row, p.adapter_dtype == p.dtype && narrow(p.dtype)};
}

template <typename Pass>
Error by_dtype(DType dtype, const Pass& pass) {
  if (dtype == DType::kFloat16) return pass(f16{});
  if (dtype == DType::kBFloat16) return pass(bf16{});
  return pass(0.0f);
}

// (rows, ranks) S or Z from the pieces' sums.
Error add_dots(const Args& args, const LoraParams& p, int64_t pieces, float* to, int64_t to_row, Stream stream) {
  const int64_t ranks = p.adapters->rank;
  return add({args.dots, pieces, p.rows * ranks, p.rows, ranks, to, to_row, 1}, DType::kFloat32, stream);
}

// Where the sums of `pieces` pieces go: a single one's are the result.
void set_dots(Args& args, int64_t pieces, float* scratch, float* to, int64_t to_row) {
  args.dots = pieces == 1 ? to : scratch;
  args.dots_row = pieces == 1 ? to_row : args.ranks;
}

// `to` (rows, ranks) = dropout(source) factor^T, source (rows, columns).
Error dots(Args& args, const LoraParams& p, void* scratch, void* to, int64_t to_row, Stream stream) {
  const Cut cut = dots_pieces(p.rows, args.columns, args.ranks);
  args.groups = int(parts(args.ranks, kRanks));
  args.pieces = int(cut.count);
  args.piece_columns = int(cut.length);
  set_dots(args, cut.count, static_cast<float*>(scratch), static_cast<float*>(to), to_row);
  const Error error = by_dtype(p.dtype, [&](auto x) { return launch_dots<decltype(x)>(args, stream); });
  if (error != kSuccess || cut.count == 1) return error;
  return add_dots(args, p, cut.count, static_cast<float*>(to), to_row, stream);
}

// Ranks [first, rank) of the sums of the splits, as a gradient with these strides.
Error add_gathered(const Args& args, const LoraParams& p, void* to, int64_t rank, int64_t column, Stream stream) {
  const int64_t first = p.adapters->first, columns = args.columns, size = narrow(p.adapter_dtype) ? 2 : 4;
  SumArgs s{args.gathered + first * columns,
            args.splits,
            args.ranks * columns,
            args.ranks - first,
            columns,
            static_cast<char*>(to) + first * rank * size,
            rank,
            column};
  return add(s, p.adapter_dtype, stream);
}

void set_gather(Args& args, const LoraParams& p, int64_t base) {
  const Cut pieces = gather_pieces(p, args.columns), splits = gather_splits(p, args.columns, args.ranks - base);
  args.base = int(base);
  args.groups = int(parts(args.ranks - base, group_of(args.ranks - base)));
  args.pieces = int(pieces.count);
  args.piece_columns = int(pieces.length);
  args.splits = int(splits.count);
  args.split_rows = int(splits.length);
}

Error gather(const Args& args, const LoraParams& p, bool with_dots, Stream stream) {
  const int group = group_of(args.ranks - args.base);
  return by_dtype(p.dtype, [&](auto x) { return launch_gather<decltype(x)>(args, group, with_dots, stream); });
}

Error expand(Args& args, const LoraParams& p, Stream stream) {
  const Cut splits = expand_splits(p, args.columns);
  args.piece_columns = int(width(p.dtype));
  args.pieces = int(parts(args.columns, args.piece_columns));
  args.splits = int(splits.count);
  args.split_rows = int(splits.length);
  return by_dtype(p.dtype, [&](auto x) { return launch_expand<decltype(x)>(args, stream); });
}

}  // namespace lora

using namespace lora;

int64_t lora_scratch_bytes(const LoraParams& p) {
  const int64_t ranks = p.adapters->rank;
  int64_t most = 0;
  for (const int64_t columns : {p.in, p.out}) {
    const int64_t pieces = dots_pieces(p.rows, columns, ranks).count, dots = pieces > 1 ? pieces * p.rows * ranks : 0;
    // Of fewer ranks there are more splits.
    const int64_t some = gather_splits(p, columns, ranks).count, all = gather_splits(p, columns, 1).count;
    const int64_t gathered = (some > all ? some : all) * ranks * columns;
    const int64_t with_dots = gathered + gather_pieces(p, columns).count * p.rows * ranks;
    for (const int64_t one : {dots, with_dots}) most = most < one ? one : most;
  }
  return most * int64_t(sizeof(float));
}

Error lora_down(const LoraParams& p, void* scratch, Stream stream) {
  if (!fits(p)) return kInvalidValue;
  Args args = arguments(p, p.in, true);
  set_source(args, p, p.x, p.x_row);
  args.factor = factor_A(p);
  return dots(args, p, scratch, p.S, p.S_row, stream);
}

Error lora_up(const LoraParams& p, Stream stream) {
  if (!fits(p)) return kInvalidValue;
  Args args = arguments(p, p.out, false);
  set_out(args, p, p.y, p.y_row);
  set_coefficients(args, p.S, p.S_row);
  args.factor = factor_B(p);
  args.bias = p.bias;
  return expand(args, p, stream);
}

Error lora_backward_out(const LoraParams& p, void* scratch, Stream stream) {
  if (!fits(p)) return kInvalidValue;
  Args args = arguments(p, p.out, false);
  set_source(args, p, p.dy, p.dy_row);
  args.factor = factor_B(p);
  if (p.adapters->dB == nullptr) return dots(args, p, scratch, p.Z, p.Z_row, stream);
  set_coefficients(args, p.S, p.S_row);
  set_gather(args, p, 0);  // Z has all ranks
  args.gathered = static_cast<float*>(scratch);
  float* const sums = args.gathered + int64_t(args.splits) * args.ranks * p.out;
  set_dots(args, args.pieces, sums, static_cast<float*>(p.Z), p.Z_row);
  Error error = gather(args, p, true, stream);
  if (error == kSuccess) error = add_gathered(args, p, p.adapters->dB, 1, p.adapters->dB_row, stream);
  if (error != kSuccess || args.pieces == 1) return error;
  return add_dots(args, p, args.pieces, static_cast<float*>(p.Z), p.Z_row, stream);
}

Error lora_backward_in(const LoraParams& p, void* scratch, Stream stream) {
  if (!fits(p)) return kInvalidValue;
  Args args = arguments(p, p.in, true);
  set_coefficients(args, p.Z, p.Z_row);
  if (p.adapters->dA != nullptr) {
    set_source(args, p, p.x, p.x_row);
    set_gather(args, p, p.adapters->first);
    args.gathered = static_cast<float*>(scratch);
    Error error = gather(args, p, false, stream);
    if (error == kSuccess) error = add_gathered(args, p, p.adapters->dA, p.adapters->dA_row, 1, stream);
    if (error != kSuccess) return error;
  }
  if (p.dx == nullptr) return kSuccess;
  set_out(args, p, p.dx, p.dx_row);
  args.factor = factor_A(p);
  return expand(args, p, stream);
}

}  // namespace trifuse::cuda
