// The causal convolution's plan: which kernels, how channels and time are cut into warps, the workspace, and
// the order of launches. The kernels are in causal_conv1d_time.cuh and causal_conv1d_channel.cuh.
#include <cstdint>
#include <cstdlib>

#include "causal_conv1d_launch.cuh"
#include "causal_conv1d_states.cuh"

namespace trifuse::cuda {
namespace conv {
namespace {

// Hands out pieces of the workspace; without one it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <typename X>
  X* take(int64_t count) {
    char* const piece = base == nullptr ? nullptr : base + used;
    used += (count * int64_t(sizeof(X)) + 255) / 256 * 256;
    return reinterpret_cast<X*>(piece);
  }
};

int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

bool served(const CausalConv1dParams& p) {
  return p.dtype != DType::kFloat64 && p.width >= kMinWidth && p.width <= kMaxWidth;
}

// Whether neighbouring channels are nearer to one another in memory than neighbouring positions.
bool by_channel(const SeqView& x) { return std::abs(x.dim) < std::abs(x.time); }

// A view, with `vectors` set if whole vectors of `length` elements along time or channels are aligned in it.
Sequence sequence(const SeqView& view, const CausalConv1dParams& p, bool channel, int64_t length) {
  const int64_t fast = channel ? view.dim : view.time, slow = channel ? view.time : view.dim;
  const bool aligned = reinterpret_cast<uintptr_t>(view.ptr) % uintptr_t(length * element_bytes(p.dtype)) == 0;
  const bool vectors = aligned && fast == 1 && slow % length == 0 && (p.batch == 1 || view.batch % length == 0);
  return {view.ptr, view.batch, view.dim, view.time, vectors};
}

int64_t cut(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Who takes what: with few columns, a block's warps share a column's segments.
void share(ConvArgs& args, int64_t columns, int64_t segment_steps) {
  args.columns = columns;
  args.segment_steps = segment_steps;
  args.segments = cut(args.seqlen, segment_steps);
  args.column_warps = columns >= kWarps ? kWarps : columns >= 2 ? 2 : 1;
  args.column_blocks = unsigned(cut(columns, args.column_warps));
  args.segment_blocks = unsigned(cut(args.segments, kWarps / args.column_warps));
}

// Time is cut until there are `wanted` warps per multiprocessor, into segments of at least `least` whole units.
void share(ConvArgs& args, int64_t columns, int64_t wanted, int64_t unit, int64_t least) {
  const int64_t units = cut(args.seqlen, unit);
  int64_t segments = cut(wanted * multiprocessors(), args.batch * columns);
  if (segments > units / least) segments = units / least;
  share(args, columns, cut(units, segments < 1 ? 1 : segments) * unit);
}

void plan(const CausalConv1dParams& p, ConvArgs& args, int64_t vector) {
  args.batch = p.batch;
  args.dim = p.dim;
  args.seqlen = p.seqlen;
  args.width = p.width;
  args.silu = p.silu;
  args.x = sequence(p.x, p, by_channel(p.x), vector);
  args.weight = static_cast<const float*>(p.weight);
  args.bias = static_cast<const float*>(p.bias);
  args.initial_states = p.initial_states;
  args.seq_idx = p.seq_idx;
  args.cu_seqlens = p.cu_seqlens;
  args.num_seqs = p.num_seqs;
}

bool nothing(const CausalConv1dParams& p) { return p.batch == 0 || p.dim == 0 || p.seqlen == 0; }
bool has_edges(const CausalConv1dParams& p) { return p.seq_idx != nullptr || p.cu_seqlens != nullptr; }

FwdArgs plan_fwd(const CausalConv1dParams& p, Arena& arena) {
  FwdArgs args{};
  const bool channel = by_channel(p.x);
  const int64_t vector = channel ? kChannels : 16 / element_bytes(p.dtype);
  plan(p, args, vector);
  args.y = sequence(p.y, p, channel, vector);
  args.final_states = p.final_states;
  if (nothing(p)) return args;
  if (has_edges(p)) args.edges = arena.take<Edges>(p.batch * p.seqlen);
  if (channel) {
    share(args, cut(p.dim, 32 * vector), 24, kForwardSteps, 4);
  } else {
    share(args, p.dim, 4 * 32 * vector);  // TimeForward::kTiles tiles
  }
  return args;
}

BwdArgs plan_bwd(const CausalConv1dBwdParams& p, Arena& arena) {
  BwdArgs args{};
  const bool channel = by_channel(p.x);
  const int64_t vector = channel ? kChannels : 16 / element_bytes(p.dtype);
  plan(p, args, vector);
  args.dy = sequence(p.dy, p, channel, vector);
  args.dx = sequence(p.dx, p, channel, vector);
  args.dfinal_states = p.dfinal_states;
  args.dinitial_states = p.dinitial_states;
  args.dweight = static_cast<float*>(p.dweight);
  args.dbias = static_cast<float*>(p.dbias);
  if (nothing(p)) return args;  // no segments: sums over nothing
  if (has_edges(p) || p.dfinal_states != nullptr) args.edges = arena.take<Edges>(p.batch * p.seqlen);
  if (channel) {
    share(args, cut(p.dim, 32 * vector), 20, kBackwardSteps, 16);
  } else {
    share(args, p.dim, 16, 32 * vector, 2);
  }
  args.partials = arena.take<float>(p.batch * args.segments * (p.width + 1) * p.dim);
  return args;
}

template <typename Args>
Error by_dtype(DType dtype, const Args& args, bool channel, Stream stream, Error (*float32)(const Args&, bool, Stream),
               Error (*float16)(const Args&, bool, Stream), Error (*bfloat16)(const Args&, bool, Stream)) {
  return (dtype == DType::kFloat32 ? float32 : dtype == DType::kFloat16 ? float16 : bfloat16)(args, channel, stream);
}

Error find_edges(const ConvArgs& args, Stream stream) {
  if (args.edges == nullptr) return kSuccess;
  const int64_t blocks = args.batch * cut(args.seqlen, kStateThreads);
  return launch(conv_edges_kernel, blocks, 1, kStateThreads, 0, stream, args);
}

template <typename T>
Error launch_final(const FwdArgs& args, int64_t rows, Stream stream) {
  return launch(conv_final_kernel<T>, state_blocks(args, rows), 1, kStateThreads, 0, stream, args);
}

template <typename T>
Error launch_dinitial(const BwdArgs& args, int64_t rows, Stream stream) {
  return launch(conv_dinitial_kernel<T>, state_blocks(args, rows), 1, kStateThreads, 0, stream, args);
}

Error final_states(const CausalConv1dParams& p, const FwdArgs& args, Stream stream) {
  if (p.final_states == nullptr) return kSuccess;
  switch (p.dtype) {
    case DType::kFloat32: return launch_final<float>(args, p.rows(), stream);
    case DType::kFloat16: return launch_final<f16>(args, p.rows(), stream);
    default: return launch_final<bf16>(args, p.rows(), stream);
  }
}

Error dinitial_states(const CausalConv1dParams& p, const BwdArgs& args, Stream stream) {
  if (args.dinitial_states == nullptr) return kSuccess;
  switch (p.dtype) {
    case DType::kFloat32: return launch_dinitial<float>(args, p.rows(), stream);
    case DType::kFloat16: return launch_dinitial<f16>(args, p.rows(), stream);
    default: return launch_dinitial<bf16>(args, p.rows(), stream);
  }
}

Error sum_partials(const BwdArgs& args, Stream stream) {
  const int64_t blocks = cut(args.dim, kSumColumns);
  const int threads = kSumColumns * kSumSlices;
  return launch(conv_sum_kernel, blocks, int(args.width) + 1, threads, threads * int64_t(sizeof(float)), stream, args);
}

}  // namespace
}  // namespace conv

int64_t causal_conv1d_fwd_workspace_bytes(const CausalConv1dParams& p) {
  conv::Arena arena{nullptr};
  if (conv::served(p)) conv::plan_fwd(p, arena);
  return arena.used;
}

Error causal_conv1d_fwd(const CausalConv1dParams& p, Stream stream) {
  using namespace conv;
  if (!served(p)) return kInvalidValue;
  Arena arena{static_cast<char*>(p.workspace)};
  const FwdArgs args = plan_fwd(p, arena);
  if (const Error error = final_states(p, args, stream)) return error;
  if (nothing(p)) return kSuccess;
  if (const Error error = find_edges(args, stream)) return error;
  return by_dtype(p.dtype, args, by_channel(p.x), stream, launch_fwd<float>, launch_fwd<f16>, launch_fwd<bf16>);
}

int64_t causal_conv1d_bwd_workspace_bytes(const CausalConv1dBwdParams& p) {
  conv::Arena arena{nullptr};
  if (conv::served(p)) conv::plan_bwd(p, arena);
  return arena.used;
}

Error causal_conv1d_bwd(const CausalConv1dBwdParams& p, Stream stream) {
  using namespace conv;
  if (!served(p)) return kInvalidValue;
  Arena arena{static_cast<char*>(p.workspace)};
  const BwdArgs args = plan_bwd(p, arena);
  if (const Error error = dinitial_states(p, args, stream)) return error;
  if (nothing(p)) return sum_partials(args, stream);
  if (const Error error = find_edges(args, stream)) return error;
  if (const Error error =
          by_dtype(p.dtype, args, by_channel(p.x), stream, launch_bwd<float>, launch_bwd<f16>, launch_bwd<bf16>)) {
    return error;
  }
  return sum_partials(args, stream);
}

}  // namespace trifuse::cuda
