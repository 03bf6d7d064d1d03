// Gaussian adaptive attention on CUDA: which threads hold a slice, where slices are cut, and the workspace.
//
// A row goes to eight lanes, a warp or a block, whichever can hold it in registers; columns that are neighbours in
// memory go to neighbouring lanes, and the entries of a column to the warps of a block. What is held is read and
// written once. Longer slices are cut in pieces. Every cut depends on the shape and the number of multiprocessors
// alone and nothing is added atomically, so a device's results are the same bits every time.
//
// Not measured yet. What is expected of an H200 that copies 4.2 TB/s, with all 132 multiprocessors at 1.75 GHz, by
// counting the instructions per entry that nvcc 13 makes for sm_90, and the share of all issue slots that they take at
// the speed aimed for, 80 % of the copy forward (an entry read, one written) and 70 % backward (two read, one written):
//   rows, float32     33 and 41 per entry: 47 % and 34 %, so bound by memory
//   rows, bfloat16    31 and 44 per entry: 87 % and 72 %, so near 75 % of the copy forward, 70 % backward
//   columns, float32  52 and 65 per entry: 73 % and 54 %, so near 80 % and 70 %
//   columns, bfloat16 54 and 67 per entry: more than there are, so near 50 % and 60 %: one more column per lane is
//                     what to try first
// Pieces read every entry three times forward and twice backward.
#include "gaussian_adaptive_attention_launch.cuh"

namespace trifuse::cuda {
namespace {

using gaam::BwdArgs;
using gaam::FwdArgs;
using gaam::Plan;
using gaam::Way;

constexpr int64_t kBlocks = 32;         // of a multiprocessor in a pass; more tiles than that share blocks
constexpr int64_t kWantedBlocks = 512;  // slices that are fewer and long are cut in pieces
constexpr int64_t kLeastRounds = 2;     // of a block in a piece
constexpr int kLeastColumns = 8, kMostColumns = 32;

constexpr int kFinishThreads = 256;

// The gradients of one head's parameters from what its blocks left.
template <typename A>
__global__ void __launch_bounds__(kFinishThreads, 1) finish_kernel(const __grid_constant__ BwdArgs p) {
  TRIFUSE_SHARED_MEMORY(memory);
  double* const sums = reinterpret_cast<double*>(memory);  // (4, kFinishThreads)
  const int64_t head = blockIdx.x;
  const int thread = int(threadIdx.x);
  for (int i = 0; i < 4; ++i) {
    double sum = 0.0;
    for (int64_t k = thread; k < p.blocks; k += kFinishThreads) sum += p.partials[(i * p.heads + head) * p.blocks + k];
    sums[i * kFinishThreads + thread] = sum;
  }
  for (int half = kFinishThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
      for (int i = 0; i < 4; ++i) sums[i * kFinishThreads + thread] += sums[i * kFinishThreads + thread + half];
    }
  }
  __syncthreads();
  const double da = sums[0], db = sums[kFinishThreads], de = sums[2 * kFinishThreads], dlogs = sums[3 * kFinishThreads];
  for (int64_t k = thread; k < p.gaussians; k += kFinishThreads) {
    const int64_t i = head * p.gaussians + k;
    const double c = static_cast<const A*>(p.width)[i], delta = static_cast<const A*>(p.mean_offset)[i];
    const double r = 1.0 / (c * c);
    static_cast<A*>(p.dmean_offset)[i] = A(r * (db + 2.0 * delta * de));
    static_cast<A*>(p.dwidth)[i] = A(-2.0 * r / c * (da + delta * (db + delta * de)) - dlogs / c);
  }
}

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

int bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
int held_of(DType dtype) { return dtype == DType::kFloat64 ? gaam::kHeld<double> : gaam::kHeld<float>; }

// Whether rows of this view, of one inner index, are whole aligned vectors.
bool vectors(const SliceView& view, int64_t per_vector, DType dtype) {
  return view.axis == 1 && reinterpret_cast<uintptr_t>(view.ptr) % 16 == 0 && view.outer % per_vector == 0 &&
         dtype != DType::kFloat64;
}

void fill(gaam::Args& a, const GaussianAdaptiveAttentionShape& p) {
  a.outer = p.outer;
  a.length = p.length;
  a.inner = p.inner;
  a.heads = p.heads;
  a.gaussians = p.gaussians;
  a.part = p.length / p.heads;
  a.last_part = p.head_length(p.heads - 1);
  a.x = p.x;
  a.mask = p.mask;
  a.mean_offset = p.mean_offset;
  a.width = p.width;
  a.clamped = p.clamped;
  a.padded = p.padded;
  a.padding = p.padding_value;
  a.eps = p.eps;
  a.log_eps = log(p.eps);
}

// `simple`: nothing but x, and dout, goes in. `whole`: every row that is read or written is made of vectors.
Plan plan_of(gaam::Args& a, DType dtype, bool forward, bool simple, bool whole) {
  Plan plan;
  const int64_t length = a.last_part, per_vector = 16 / bytes_of(dtype);
  const bool columns = a.inner >= kLeastColumns && a.x.inner == 1;
  simple = simple && dtype != DType::kFloat64;
  whole = simple && whole && a.part % per_vector == 0 && a.last_part % per_vector == 0;
  plan.general = columns ? !simple : !whole;
  const bool twice = forward && !plan.general && (columns || bytes_of(dtype) == 2);
  const int64_t held = twice ? gaam::kFwdHeld<float, Way::kColumns, false> : held_of(dtype);
  const bool many = !plan.general && !(forward && columns);
  const int64_t most_threads = many ? gaam::kMaxThreads : gaam::kMaxGeneralThreads;
  a.columns = 1;
  if (columns) {
    a.columns = a.inner >= kMostColumns ? kMostColumns : a.inner >= 16 ? 16 : kLeastColumns;
    while (a.columns > kLeastColumns && length * a.columns > held * most_threads) a.columns /= 2;
  }
  int64_t threads = 64;
  while (threads < most_threads && threads * held < length * a.columns) threads *= 2;
  plan.held = threads * held >= length * a.columns;
  plan.threads = int(threads);
  plan.way = columns ? Way::kColumns : Way::kBlock;
  int64_t slices = a.columns;  // of a tile
  if (!plan.held) {
    plan.way = Way::kColumns;
    plan.threads = gaam::kPieceThreads;
    if (columns) a.columns = a.inner >= kMostColumns ? kMostColumns : a.inner >= 16 ? 16 : kLeastColumns;
    slices = a.columns;
  } else if (!columns && length <= 32 * held) {
    plan.way = !whole || length > 8 * held ? Way::kWarp : twice && length <= 4 * held ? Way::kFour : Way::kEight;
    plan.threads = gaam::kRowThreads;
    slices = plan.threads / gaam::lanes_of(plan.way);
  } else if (!columns && plan.general) {
    plan.way = Way::kColumns;  // of one column
  }
  a.column_tiles = divide_up(a.inner, slices);
  a.tiles = a.columns > 1 ? a.outer * a.column_tiles : divide_up(a.outer * a.inner, slices);
  const int64_t all = kBlocks * multiprocessors(), per_head = all > a.heads ? all / a.heads : 1;
  a.blocks = !plan.held || a.tiles < per_head ? a.tiles : per_head;
  a.pieces = 1;
  if (!plan.held) {
    const int64_t round = plan.threads / a.columns * held;
    int64_t pieces = divide_up(kWantedBlocks, a.heads * a.tiles);
    if (pieces > length / (kLeastRounds * round)) pieces = length / (kLeastRounds * round);
    if (pieces < 1) pieces = 1;
    a.piece_length = divide_up(divide_up(length, pieces), round) * round;
    a.pieces = divide_up(length, a.piece_length);
  }
  return plan;
}

bool nothing(const GaussianAdaptiveAttentionShape& p) { return p.outer * p.length * p.inner == 0; }

struct FwdPlan {
  FwdArgs args{};
  Plan plan;
  int64_t moments = 0, bytes = 0;  // bytes of the moments, and of all
};
FwdPlan plan_fwd(const GaussianAdaptiveAttentionParams& p) {
  FwdPlan made;
  FwdArgs& a = made.args;
  fill(a, p);
  a.out = p.out;
  a.weights = p.weights;
  a.stats = p.stats;
  const int64_t per_vector = 16 / bytes_of(p.dtype);
  const SliceView out{p.out, p.length * p.inner, p.inner, 1}, weights{p.weights, p.length * p.inner, p.inner, 1};
  const bool whole = vectors(p.x, per_vector, p.dtype) && p.inner == 1 && out.outer % per_vector == 0 &&
                     reinterpret_cast<uintptr_t>(out.ptr) % 16 == 0 &&
                     reinterpret_cast<uintptr_t>(weights.ptr) % 16 == 0;
  made.plan = plan_of(a, p.dtype, true, p.mask.ptr == nullptr && !p.padded, whole);
  if (!made.plan.held) {
    const int64_t slots = a.heads * a.outer * a.inner * a.pieces;
    made.moments = 3 * slots * int64_t(sizeof(double));
    made.bytes = made.moments + 2 * slots * (p.dtype == DType::kFloat64 ? 8 : 4);
  }
  return made;
}

struct BwdPlan {
  BwdArgs args{};
  Plan plan;
  int64_t partials = 0, bytes = 0;
};
BwdPlan plan_bwd(const GaussianAdaptiveAttentionBwdParams& p) {
  BwdPlan made;
  BwdArgs& a = made.args;
  fill(a, p);
  a.dout = p.dout;
  a.dweights = p.dweights;
  a.dx = p.dx;
  a.stats = const_cast<void*>(p.stats);
  a.dmean_offset = p.dmean_offset;
  a.dwidth = p.dwidth;
  const int64_t per_vector = 16 / bytes_of(p.dtype);
  const bool simple = p.mask.ptr == nullptr && !p.padded && p.dout.ptr != nullptr && p.dweights.ptr == nullptr;
  const bool whole = vectors(p.x, per_vector, p.dtype) && vectors(p.dout, per_vector, p.dtype) && p.inner == 1 &&
                     p.length % per_vector == 0 && reinterpret_cast<uintptr_t>(p.dx) % 16 == 0;
  made.plan = plan_of(a, p.dtype, false, simple, whole);
  if (nothing(p)) a.tiles = a.blocks = 0;
  made.partials = 4 * a.heads * a.blocks * int64_t(sizeof(double));
  const int64_t slots = made.plan.held ? 0 : a.heads * a.outer * a.inner * a.pieces;
  made.bytes = made.partials + gaam::kSums * slots * int64_t(sizeof(double));
  return made;
}

}  // namespace

int64_t gaussian_adaptive_attention_workspace_bytes(const GaussianAdaptiveAttentionParams& p) {
  return nothing(p) ? 0 : plan_fwd(p).bytes;
}

int64_t gaussian_adaptive_attention_workspace_bytes(const GaussianAdaptiveAttentionBwdParams& p) {
  return plan_bwd(p).bytes;
}

Error gaussian_adaptive_attention_fwd(const GaussianAdaptiveAttentionParams& p, void* workspace, Stream stream) {
  if (nothing(p)) return kSuccess;
  FwdPlan made = plan_fwd(p);
  made.args.moments = static_cast<double*>(workspace);
  made.args.measures = static_cast<char*>(workspace) + made.moments;
  switch (p.dtype) {
    case DType::kFloat32: return gaam::launch_fwd<float>(made.args, made.plan, stream);
    case DType::kFloat16: return gaam::launch_fwd<f16>(made.args, made.plan, stream);
    case DType::kBFloat16: return gaam::launch_fwd<bf16>(made.args, made.plan, stream);
    case DType::kFloat64: return gaam::launch_fwd<double>(made.args, made.plan, stream);
  }
  return kInvalidValue;
}

// Without entries only the last kernel runs: the parameters have gradients of zero.
Error gaussian_adaptive_attention_bwd(const GaussianAdaptiveAttentionBwdParams& p, void* workspace, Stream stream) {
  BwdPlan made = plan_bwd(p);
  made.args.partials = static_cast<double*>(workspace);
  made.args.sums = reinterpret_cast<double*>(static_cast<char*>(workspace) + made.partials);
  Error error = kInvalidValue;
  switch (p.dtype) {
    case DType::kFloat32: error = gaam::launch_bwd<float>(made.args, made.plan, stream); break;
    case DType::kFloat16: error = gaam::launch_bwd<f16>(made.args, made.plan, stream); break;
    case DType::kBFloat16: error = gaam::launch_bwd<bf16>(made.args, made.plan, stream); break;
    case DType::kFloat64: error = gaam::launch_bwd<double>(made.args, made.plan, stream); break;
  }
  if (error != kSuccess) return error;
  const auto finish = p.dtype == DType::kFloat64 ? finish_kernel<double> : finish_kernel<float>;
  const int64_t shared = 4 * kFinishThreads * int64_t(sizeof(double));
  return launch(finish, p.heads, 1, kFinishThreads, shared, stream, made.args);
}

}  // namespace trifuse::cuda
