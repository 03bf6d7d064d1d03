// The linear scan and its adjoint on CUDA, real and complex, in float32.
//
// Where channels are neighbours in memory a thread walks one channel; elsewhere a warp does, a run of steps per
// lane, composed by shuffles. Where that is too little work for a GPU, time is cut into pieces: a first launch
// finds how each piece's end depends on its begin, and every thread of the second joins the pieces before its own.
// The cuts depend on the shape alone and nothing is added atomically, so results are the same bits every time.
//
// Everything runs in processing order, which is the scan's own going forward and against it going backward. Going
// backward the terms are the gradients of h, a step's factor is the conjugate of the one before's (the first is
// 1), and the state after the last step is that of one step more.
#include "linear_scan_numbers.cuh"

namespace trifuse::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kAhead = 8;  // steps that a thread reads before it computes them
constexpr int64_t kWantedBlocks = 512;
constexpr int64_t kLeastSteps = 128;  // in a piece, for a thread; a warp takes eight times as many
constexpr int64_t kLeastRuns = 8;

struct WalkArgs : LinearScanShape {
  SeqView a, b, h, out, da;  // b: the terms; h and da going backward only
  const void* from;          // states before the first step, or null
  const void* initial;       // going backward: the states that the scan started from, or null
  void* to;                  // states after the last step, or null
  float *products, *ends;    // per piece, (pieces, rows, dim)
  int64_t rows, pieces, piece_length, blocks_per_row;
  bool down, compose;
};

// The channel of a thread, and the steps of its piece.
struct Place {
  int64_t row, channel, batch, start, length, begin, end;
  bool here;

  TRIFUSE_DEVICE Place(const WalkArgs& p, int64_t channel_) : channel(channel_) {
    row = blockIdx.x / p.blocks_per_row;
    here = channel < p.dim;
    if (!here) channel = 0;
    batch = p.cu_seqlens != nullptr ? 0 : row;
    start = p.cu_seqlens != nullptr ? p.cu_seqlens[row] : 0;
    length = p.cu_seqlens != nullptr ? p.cu_seqlens[row + 1] - start : p.seqlen;
    begin = int64_t(blockIdx.y) * p.piece_length;
    end = begin + p.piece_length < length ? begin + p.piece_length : length;
  }
  // Of the number that step s reads; its neighbour in processing order is stride(view) away.
  TRIFUSE_DEVICE int64_t offset(const WalkArgs& p, const SeqView& view, int64_t s) const {
    const int64_t t = start + (p.down ? length - 1 - s : s);
    return batch * view.batch + channel * view.dim + t * view.time;
  }
  TRIFUSE_DEVICE static int64_t stride(const WalkArgs& p, const SeqView& view) {
    return p.down ? -view.time : view.time;
  }
  TRIFUSE_DEVICE int64_t state(const WalkArgs& p) const { return row * p.dim + channel; }
  TRIFUSE_DEVICE int64_t piece(const WalkArgs& p, int64_t k) const { return (k * p.rows + row) * p.dim + channel; }
};

template <typename S>
TRIFUSE_DEVICE S* data(const SeqView& view) {
  return static_cast<S*>(view.ptr);
}

template <bool B>
TRIFUSE_DEVICE Number<B> state_or_zero(const void* states, int64_t i) {
  return states != nullptr ? read<B>(static_cast<const float*>(states), i) : number<B>(0.0f);
}

// The state at the begin of this thread's piece.
template <bool A, bool B>
TRIFUSE_DEVICE Number<B> state_at_begin(const WalkArgs& p, const Place& at) {
  if (p.compose) return number<B>(0.0f);
  Number<B> x = state_or_zero<B>(p.from, at.state(p));
  for (int64_t k = 0; k < int64_t(blockIdx.y); ++k) {
    const int64_t i = at.piece(p, k);
    x = step(read<A>(p.products, i), x, read<B>(p.ends, i));
  }
  return x;
}

template <typename S, bool A, bool B, bool kAdjoint>
TRIFUSE_DEVICE void finish(const WalkArgs& p, const Place& at, Number<B> x, const Number<A>& product) {
  if (p.compose) {
    const int64_t i = at.piece(p, blockIdx.y);
    write<A>(p.products, i, product);
    write<B>(p.ends, i, x);
  } else if (p.to != nullptr && blockIdx.y == gridDim.y - 1) {
    if (kAdjoint && at.length > 0) {
      x = times(conjugate(read<A>(data<S>(p.a), at.offset(p, p.a, at.length - 1))), x);
    }
    write<B>(static_cast<float*>(p.to), at.state(p), x);
  }
}

// Channels are neighbours: a thread walks one, reading some steps ahead.
template <typename S, bool A, bool B, bool kAdjoint>
__global__ void __launch_bounds__(kThreads) linear_scan_thread_kernel(const __grid_constant__ WalkArgs p) {
  const Place at(p, blockIdx.x % p.blocks_per_row * kThreads + int(threadIdx.x));
  if (!at.here) return;
  Number<B> x = state_at_begin<A, B>(p, at);
  Number<A> product = number<A>(1.0f), before = number<A>(1.0f);  // `before`: the factor of the step before
  if (kAdjoint && at.begin > 0 && at.begin < at.end) {
    before = conjugate(read<A>(data<S>(p.a), at.offset(p, p.a, at.begin - 1)));
  }
  for (int64_t s = at.begin; s < at.end; s += kAhead) {
    Number<A> factors[kAhead];
    Number<B> terms[kAhead], states[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const bool exists = s + j < at.end;
      factors[j] = exists ? read<A>(data<S>(p.a), at.offset(p, p.a, s + j)) : number<A>(1.0f);
      terms[j] = exists ? read<B>(data<S>(p.b), at.offset(p, p.b, s + j)) : number<B>(0.0f);
      if (kAdjoint && exists && !p.compose) {
        states[j] = s + j + 1 < at.length ? read<B>(data<S>(p.h), at.offset(p, p.h, s + j + 1))
                                          : state_or_zero<B>(p.initial, at.state(p));
      }
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (s + j >= at.end) break;
      const Number<A> factor = kAdjoint ? before : factors[j];
      x = step(factor, x, terms[j]);
      if (kAdjoint) before = conjugate(factors[j]);
      if (p.compose) {
        product = times(factor, product);
        continue;
      }
      write<B>(data<S>(p.out), at.offset(p, p.out, s + j), x);
      if (kAdjoint) write<A>(data<S>(p.da), at.offset(p, p.da, s + j), factor_gradient<A, B>(x, states[j]));
    }
  }
  finish<S, A, B, kAdjoint>(p, at, x, product);
}

// The factors of a lane's run going backward: those of the steps before, conjugated. `carried` is the factor of
// the step before the tile, and becomes that of the tile's last step.
template <bool A>
TRIFUSE_DEVICE void shift_factors(Number<A> (&factors)[kRun], Number<A>& carried, int lane) {
  Number<A> first = shuffle_up(factors[kRun - 1], 1);
  if (lane == 0) first = carried;
  carried = from_lane(factors[kRun - 1], 31);
#pragma unroll
  for (int j = kRun - 1; j > 0; --j) factors[j] = conjugate(factors[j - 1]);
  factors[0] = conjugate(first);
}

// Steps lie side by side, or nothing does: a warp walks one channel, a tile of 32 runs at a time.
template <typename S, bool A, bool B, bool kAdjoint>
__global__ void __launch_bounds__(kThreads) linear_scan_warp_kernel(const __grid_constant__ WalkArgs p) {
  const int lane = int(threadIdx.x) % 32;
  const Place at(p, blockIdx.x % p.blocks_per_row * kWarps + int(threadIdx.x) / 32);
  if (!at.here) return;  // the whole warp
  Number<B> carry = state_at_begin<A, B>(p, at);
  Number<A> product = number<A>(1.0f), before = number<A>(1.0f);
  if (kAdjoint && at.begin > 0 && at.begin < at.end) {
    before = read<A>(data<S>(p.a), at.offset(p, p.a, at.begin - 1));
  }
  for (int64_t tile = at.begin; tile < at.end; tile += 32 * kRun) {
    const int64_t s = tile + lane * kRun, left = at.end - s;
    const int count = left <= 0 ? 0 : left < kRun ? int(left) : kRun;
    const int64_t safe = count > 0 ? s : at.begin;
    Number<A> factors[kRun];
    Number<B> terms[kRun];
    read_run<A>(data<const S>(p.a), at.offset(p, p.a, safe), Place::stride(p, p.a), count, 1.0f, factors);
    read_run<B>(data<const S>(p.b), at.offset(p, p.b, safe), Place::stride(p, p.b), count, 0.0f, terms);
    if (kAdjoint) {
      shift_factors(factors, before, lane);
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if (j >= count) factors[j] = number<A>(1.0f);
      }
    }

    Number<A> run = number<A>(1.0f);
    Number<B> x = number<B>(0.0f);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      run = times(factors[j], run);
      x = step(factors[j], x, terms[j]);
    }
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const Number<A> other = shuffle_up(run, by);
      const Number<B> state = shuffle_up(x, by);
      if (lane >= by) {
        x = step(run, state, x);
        run = times(run, other);
      }
    }
    if (p.compose) {
      product = times(from_lane(run, 31), product);
      carry = step(from_lane(run, 31), carry, from_lane(x, 31));
      continue;
    }
    run = shuffle_up(run, 1);
    x = shuffle_up(x, 1);
    x = lane == 0 ? carry : step(run, carry, x);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      x = step(factors[j], x, terms[j]);
      terms[j] = x;
    }
    carry = from_lane(x, 31);
    if (count > 0) write_run<B>(data<S>(p.out), at.offset(p, p.out, s), Place::stride(p, p.out), count, terms);
    if (kAdjoint) {
      Number<B> states[kRun];
      read_run<B>(data<const S>(p.h), at.offset(p, p.h, safe), Place::stride(p, p.h), count, 0.0f, states);
      Number<B> next = shuffle_down(states[0], 1);
      const int64_t after = s + count;  // where this lane's run ends, another's or nobody's begins
      if (count > 0 && (lane == 31 || count < kRun || after == at.end)) {
        next = after < at.length ? read<B>(data<S>(p.h), at.offset(p, p.h, after))
                                 : state_or_zero<B>(p.initial, at.state(p));
      }
      Number<A> gradients[kRun];
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        gradients[j] = factor_gradient<A, B>(terms[j], j + 1 < count ? states[j + 1 < kRun ? j + 1 : j] : next);
      }
      if (count > 0) write_run<A>(data<S>(p.da), at.offset(p, p.da, s), Place::stride(p, p.da), count, gradients);
    }
  }
  if (lane == 0) finish<S, A, B, kAdjoint>(p, at, carry, product);
}

struct Cut {
  int64_t pieces, length;
};
Cut cut_of(const LinearScanShape& p, bool neighbours) {
  const int64_t length = p.seqlen > 0 ? p.seqlen : 1, tile = neighbours ? kAhead : 32 * kRun;
  if (p.cu_seqlens != nullptr) return {1, length};  // many sequences are many rows
  const int64_t per_block = neighbours ? kThreads : kWarps;
  const int64_t blocks = p.batch * ((p.dim + per_block - 1) / per_block);
  int64_t pieces = blocks > 0 ? (kWantedBlocks + blocks - 1) / blocks : 1;
  const int64_t most = length / (neighbours ? kLeastSteps : kLeastRuns * tile);
  if (pieces > most) pieces = most;
  if (pieces < 1) pieces = 1;
  const int64_t each = ((length + pieces - 1) / pieces + tile - 1) / tile * tile;
  return {(length + each - 1) / each, each};
}

template <typename S, bool A, bool B, bool kAdjoint>
Error walk(WalkArgs p, void* workspace, Stream stream) {
  const int64_t rows = p.rows = p.state_rows();
  if (rows == 0 || p.dim == 0) return kSuccess;
  const bool neighbours = p.out.dim == 1 && p.out.time != 1;
  const Cut cut = cut_of(p, neighbours);
  const int64_t per_block = neighbours ? kThreads : kWarps;
  p.pieces = cut.pieces;
  // Packed sequences are one piece each, however long.
  p.piece_length = p.cu_seqlens != nullptr ? (p.seqlen > 0 ? p.seqlen : 1) : cut.length;
  p.blocks_per_row = (p.dim + per_block - 1) / per_block;
  p.products = static_cast<float*>(workspace);
  p.ends = p.products + p.pieces * rows * p.dim * (A ? 2 : 1);
  for (int pass = p.pieces > 1 ? 0 : 1; pass < 2; ++pass) {
    p.compose = pass == 0;
    const auto kernel =
        neighbours ? linear_scan_thread_kernel<S, A, B, kAdjoint> : linear_scan_warp_kernel<S, A, B, kAdjoint>;
    const Error error = launch(kernel, rows * p.blocks_per_row, int(p.pieces), kThreads, 0, stream, p);
    if (error != kSuccess) return error;
  }
  return kSuccess;
}

template <bool kAdjoint>
Error by_dtype(const WalkArgs& p, void* workspace, Stream stream) {
  if (p.dtype == DType::kFloat32) {
    if (p.a_complex) return walk<float, true, true, kAdjoint>(p, workspace, stream);
    if (p.b_complex) return walk<float, false, true, kAdjoint>(p, workspace, stream);
    return walk<float, false, false, kAdjoint>(p, workspace, stream);
  }
  if (p.b_complex) return kInvalidValue;
  if (p.dtype == DType::kFloat16) return walk<f16, false, false, kAdjoint>(p, workspace, stream);
  if (p.dtype == DType::kBFloat16) return walk<bf16, false, false, kAdjoint>(p, workspace, stream);
  return kInvalidValue;
}

}  // namespace

int64_t linear_scan_workspace_bytes(const LinearScanShape& p) {
  const int64_t a = cut_of(p, true).pieces, b = cut_of(p, false).pieces;
  return (a > b ? a : b) * p.state_rows() * p.dim * int64_t(sizeof(float)) * 4;
}

Error linear_scan_fwd(const LinearScanParams& p, void* workspace, Stream stream) {
  WalkArgs w{};
  static_cast<LinearScanShape&>(w) = p;
  w.a = p.a;
  w.b = p.b;
  w.out = p.h;
  w.from = p.initial_state;
  w.to = p.last_state;
  w.down = p.reverse;
  return by_dtype<false>(w, workspace, stream);
}

Error linear_scan_bwd(const LinearScanBwdParams& p, void* workspace, Stream stream) {
  WalkArgs w{};
  static_cast<LinearScanShape&>(w) = p;
  w.a = p.a;
  w.b = p.dh;
  w.h = p.h;
  w.out = p.db;
  w.da = p.da;
  w.from = p.dlast_state;
  w.initial = p.initial_state;
  w.to = p.dinitial_state;
  w.down = !p.reverse;
  return by_dtype<true>(w, workspace, stream);
}

}  // namespace trifuse::cuda
