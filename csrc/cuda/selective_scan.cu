// The selective scan's plan: how channels and time are cut into blocks, the workspace, and the order
// of launches. The kernels are in selective_scan_fwd.cuh and selective_scan_bwd.cuh.
#include <cstdint>
#include <numeric>

#include "selective_scan_launch.cuh"
#include "selective_scan_sums.cuh"

namespace trifuse::cuda {
namespace {

// Hands out pieces of the workspace; without one it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  float* take(int64_t floats) {
    char* const piece = base == nullptr ? nullptr : base + used;
    used += (floats * int64_t(sizeof(float)) + 255) / 256 * 256;
    return reinterpret_cast<float*>(piece);
  }
};

int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

bool served(const SelectiveScanParams& p) {
  return !p.complex && (p.dtype == DType::kFloat32 || p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16);
}

// A view in processing order; `vectors` if whole vectors of it are aligned, whatever the block.
Sequence in_order(const SeqView& view, const SelectiveScanParams& p, const ScanArgs& args) {
  Sequence s;
  if (view.ptr == nullptr) return s;
  const int64_t bytes = element_bytes(p.dtype), length = args.channel_fast ? 2 : 16 / bytes;
  s.ptr = static_cast<char*>(view.ptr) + (p.reverse ? (p.seqlen - 1) * view.time * bytes : 0);
  s.batch = view.batch;
  s.dim = view.dim;
  s.step = p.reverse ? -view.time : view.time;
  const bool aligned =
      reinterpret_cast<uintptr_t>(view.ptr) % uintptr_t(length * bytes) == 0 && (p.batch == 1 || s.batch % length == 0);
  if (args.channel_fast) {
    const bool even_blocks = args.segment % 2 == 0 || args.segment == p.dim;
    s.vectors = aligned && s.dim == 1 && s.step % 2 == 0 && even_blocks;
  } else {
    const bool in_step = s.step == 1 || (s.step == -1 && p.seqlen % length == 0);
    s.vectors = aligned && in_step && s.dim % length == 0;
  }
  return s;
}

Coefficient in_order(const CoefView& view, const SelectiveScanParams& p, int64_t bytes) {
  Coefficient c;
  c.ptr = view.ptr;
  c.variable = view.variable;
  if (!view.variable) return c;
  if (p.reverse) c.ptr = static_cast<char*>(view.ptr) + (p.seqlen - 1) * view.time * bytes;
  c.batch = view.batch;
  c.group = view.group;
  c.state = view.state;
  c.step = p.reverse ? -view.time : view.time;
  return c;
}

// Cuts time where the channels alone would leave multiprocessors idle. The two passes of a forward
// scan cost almost twice one pass; those of a backward scan little more than one.
void split_time(ScanArgs& args, bool backward) {
  const int64_t blocks = args.batch * int64_t(args.blocks), wanted = 2 * multiprocessors();
  const int64_t most = args.seqlen / (4 * kSteps), least = backward ? 2 : 4;
  int64_t splits = wanted / blocks;
  if (splits > most) splits = most;
  if (splits > 64) splits = 64;
  if (splits < least) splits = 1;
  args.split_steps = (args.seqlen + splits * kSteps - 1) / (splits * kSteps) * kSteps;
  args.splits = unsigned((args.seqlen + args.split_steps - 1) / args.split_steps);
}

void plan(const SelectiveScanParams& p, ScanArgs& args, Arena& arena, bool backward, int64_t sums) {
  args.batch = p.batch;
  args.dim = p.dim;
  args.seqlen = p.seqlen;
  args.dstate = p.dstate;
  args.softplus = p.delta_softplus;
  args.reverse = p.reverse;
  args.A = static_cast<const float*>(p.A);
  args.D = static_cast<const float*>(p.D);
  args.delta_bias = static_cast<const float*>(p.delta_bias);
  args.initial_state = static_cast<const float*>(p.initial_state);
  args.cu_seqlens = p.cu_seqlens;
  args.num_seqs = p.num_seqs;
  args.B = in_order(p.B, p, element_bytes(p.dtype));
  args.C = in_order(p.C, p, element_bytes(p.dtype));
  const Coefficient& leading = args.B.variable ? args.B : args.C;
  args.coefficients_along_time = std::abs(leading.step) <= std::abs(leading.state);

  args.segment = p.dim;
  if (p.B.variable) args.segment = std::gcd(args.segment, p.dim / p.B.groups);
  if (p.C.variable) args.segment = std::gcd(args.segment, p.dim / p.C.groups);
  args.blocks_per_segment = unsigned((args.segment + kChannels - 1) / kChannels);
  args.blocks = unsigned(p.dim / args.segment * args.blocks_per_segment);
  if (p.B.variable) args.B.blocks_per_group = unsigned(args.blocks / p.B.groups);
  if (p.C.variable) args.C.blocks_per_group = unsigned(args.blocks / p.C.groups);
  args.channel_fast = std::abs(p.u.dim) < std::abs(p.u.time);
  args.u = in_order(p.u, p, args);
  args.delta = in_order(p.delta, p, args);
  args.z = in_order(p.z, p, args);

  split_time(args, backward);
  args.local = false;
  if (args.splits > 1) {
    args.split_state = arena.take(p.batch * int64_t(args.splits) * p.dstate * p.dim);
    args.split_decay = arena.take(p.batch * int64_t(args.splits) * p.dim * 2);
  }
  args.partial_sums = nullptr;
  if (p.dstate > tile_states(args) && sums > 0) args.partial_sums = arena.take(sums * p.batch * p.seqlen * p.dim);
}

FwdArgs plan_fwd(const SelectiveScanParams& p, Arena& arena) {
  FwdArgs args{};
  plan(p, args, arena, false, p.out.ptr != nullptr ? 1 : 0);
  args.out = in_order(p.out, p, args);
  args.last_state = static_cast<float*>(p.last_state);
  args.chunk_states = p.chunk_size > 0 ? static_cast<float*>(p.chunk_states) : nullptr;
  args.chunk_size = p.chunk_size;
  args.n_chunks = p.n_chunks;
  return args;
}

// The backward kernel starts every tile from a saved state: the forward pass that saves one per tile,
// if the caller's did not.
struct TileStates {
  bool needed;
  SelectiveScanParams pass;
};

TileStates plan_tile_states(const SelectiveScanBwdParams& p, Arena& arena) {
  TileStates states{p.chunk_size != kSteps, p};
  if (!states.needed) return states;
  SelectiveScanParams& pass = states.pass;
  pass.z = pass.out = SeqView{};
  pass.last_state = nullptr;
  pass.chunk_size = kSteps;
  pass.n_chunks = (p.seqlen + kSteps - 1) / kSteps;
  pass.chunk_states = arena.take(p.batch * pass.n_chunks * p.dstate * p.dim);
  return states;
}

// Where a variable coefficient's gradient goes: to its place, if one block owns a group, else to rows
// of the workspace, one per block.
Coefficient plan_gradient(const CoefView& view, const SelectiveScanParams& p, const ScanArgs& args, Arena& arena,
                          SumTasks& tasks) {
  Coefficient c = in_order(view, p, sizeof(float));
  if (!view.variable) return Coefficient{};
  const int64_t rows = args.blocks / view.groups, plane = p.seqlen * p.dstate;
  if (rows == 1) return c;
  float* const partial = arena.take(p.batch * int64_t(args.blocks) * plane);
  tasks.add({partial,
             static_cast<float*>(c.ptr),
             rows,
             plane,
             {p.batch, view.groups, p.seqlen, p.dstate},
             {args.blocks * plane, rows * plane, p.dstate, 1},
             {c.batch, c.group, c.step, c.state}});
  c.ptr = partial;
  c.batch = args.blocks * plane;
  c.group = plane;
  c.state = 1;
  c.step = p.dstate;
  return c;
}

// Rows of `count` floats, one per batch item and split, that add up to `to`.
float* plan_rows(void* to, int64_t count, int64_t rows, Arena& arena, SumTasks& tasks) {
  if (to == nullptr) return nullptr;
  float* const partial = arena.take(rows * count);
  tasks.add({partial, static_cast<float*>(to), rows, count, {1, 1, 1, count}, {0, 0, 0, 1}, {0, 0, 0, 1}});
  return partial;
}

BwdArgs plan_bwd(const SelectiveScanBwdParams& p, const TileStates& states, Arena& arena, SumTasks& tasks) {
  BwdArgs args{};
  plan(p, args, arena, true, 3);
  args.dout = in_order(p.dout, p, args);
  args.du = in_order(p.du, p, args);
  args.ddelta = in_order(p.ddelta, p, args);
  args.dz = in_order(p.dz, p, args);
  args.dlast_state = static_cast<const float*>(p.dlast_state);
  args.dinitial_state = static_cast<float*>(p.dinitial_state);
  args.chunk_states = static_cast<const float*>(states.pass.chunk_states);
  args.n_chunks = states.pass.n_chunks;
  args.dB = plan_gradient(p.dB, p, args, arena, tasks);
  args.dC = plan_gradient(p.dC, p, args, arena, tasks);
  const int64_t rows = p.batch * int64_t(args.splits), states_count = p.dim * p.dstate;
  args.dA = plan_rows(p.dA, states_count, rows, arena, tasks);
  args.dB_constant = plan_rows(p.dB.variable ? nullptr : p.dB.ptr, states_count, rows, arena, tasks);
  args.dC_constant = plan_rows(p.dC.variable ? nullptr : p.dC.ptr, states_count, rows, arena, tasks);
  args.dD = plan_rows(p.dD, p.dim, rows, arena, tasks);
  args.ddelta_bias = plan_rows(p.ddelta_bias, p.dim, rows, arena, tasks);
  return args;
}

// Nothing to scan: states pass through, and sums over nothing are zero.
bool nothing(const SelectiveScanParams& p) { return p.batch == 0 || p.dim == 0 || p.seqlen == 0; }

Error zero_gradients(const SelectiveScanBwdParams& p, Stream stream) {
  SumTasks tasks;
  Arena none{nullptr};
  const int64_t states_count = p.dim * p.dstate;
  plan_rows(p.dA, states_count, 0, none, tasks);
  if (!p.dB.variable) plan_rows(p.dB.ptr, states_count, 0, none, tasks);
  if (!p.dC.variable) plan_rows(p.dC.ptr, states_count, 0, none, tasks);
  plan_rows(p.dD, p.dim, 0, none, tasks);
  plan_rows(p.ddelta_bias, p.dim, 0, none, tasks);
  return launch_sums(tasks, stream);
}

// Sequences without a step: what leaves them is what entered.
Error pass_through(const SelectiveScanParams& p, const void* from, void* to, Stream stream) {
  if (to == nullptr || (p.cu_seqlens == nullptr && p.seqlen > 0)) return kSuccess;
  const int64_t rows = p.cu_seqlens == nullptr ? p.batch : p.num_seqs;
  return launch_pass_through(
      {static_cast<const float*>(from), static_cast<float*>(to), p.cu_seqlens, rows, p.dim * p.dstate}, stream);
}

template <typename Args>
Error by_dtype(DType dtype, const Args& args, Stream stream, Error (*float32)(const Args&, Stream),
               Error (*float16)(const Args&, Stream), Error (*bfloat16)(const Args&, Stream)) {
  return (dtype == DType::kFloat32 ? float32 : dtype == DType::kFloat16 ? float16 : bfloat16)(args, stream);
}

Error forward(const SelectiveScanParams& p, Arena& arena, Stream stream) {
  if (p.chunk_size % kGroup != 0) return kInvalidValue;
  return by_dtype(p.dtype, plan_fwd(p, arena), stream, launch_fwd<float>, launch_fwd<f16>, launch_fwd<bf16>);
}

}  // namespace

int64_t selective_scan_fwd_workspace_bytes(const SelectiveScanParams& p) {
  if (nothing(p) || !served(p)) return 0;
  Arena arena{nullptr};
  plan_fwd(p, arena);
  return arena.used;
}

Error selective_scan_fwd(const SelectiveScanParams& p, void* workspace, Stream stream) {
  if (!served(p)) return kInvalidValue;
  if (const Error error = pass_through(p, p.initial_state, p.last_state, stream)) return error;
  if (nothing(p)) return kSuccess;
  Arena arena{static_cast<char*>(workspace)};
  return forward(p, arena, stream);
}

int64_t selective_scan_bwd_workspace_bytes(const SelectiveScanBwdParams& p) {
  if (nothing(p) || !served(p)) return 0;
  Arena arena{nullptr};
  const TileStates states = plan_tile_states(p, arena);
  if (states.needed) plan_fwd(states.pass, arena);
  SumTasks tasks;
  plan_bwd(p, states, arena, tasks);
  return arena.used;
}

Error selective_scan_bwd(const SelectiveScanBwdParams& p, Stream stream) {
  if (!served(p)) return kInvalidValue;
  if (const Error error = pass_through(p, p.dlast_state, p.dinitial_state, stream)) return error;
  if (nothing(p)) return zero_gradients(p, stream);
  Arena arena{static_cast<char*>(p.workspace)};
  const TileStates states = plan_tile_states(p, arena);
  if (states.needed) {
    if (const Error error = forward(states.pass, arena, stream)) return error;
  }
  SumTasks tasks;
  const BwdArgs args = plan_bwd(p, states, arena, tasks);
  if (const Error error = by_dtype(p.dtype, args, stream, launch_bwd<float>, launch_bwd<f16>, launch_bwd<bf16>)) {
    return error;
  }
  return launch_sums(tasks, stream);
}

}  // namespace trifuse::cuda
