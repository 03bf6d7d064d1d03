// The CPU entry points of linear_scan for one instruction set: which lanes form groups, which groups a task.
#include <algorithm>
#include <vector>

#include "dtypes.h"
#include "linear_scan_walk.h"
#include "pages.h"

#ifndef TRIFUSE_ISA
#error "compile with -DTRIFUSE_ISA=<namespace of this instruction set>"
#endif

namespace trifuse::cpu {
namespace {

// Where the rows are few, time is cut into pieces that are walked side by side and joined in a second pass.
// The cuts depend on the shape alone, so a result does not depend on the number of threads.
constexpr int64_t kFewRows = 32, kWantedLanes = 64, kLeastPiece = 512;
constexpr int64_t kMaxBlock = 32;    // groups that a task takes through time together
constexpr int kStepsSideBySide = 8;  // rows of memory that are read at a time where channels are neighbours
constexpr int64_t kPrefetchAhead = 64;

// Lanes of one length: all channels of one sequence, or the pieces of all rows.
struct LaneSet {
  int64_t count, length;
  int64_t batch, start, state_row;  // of one sequence
  int64_t rows, piece;              // of pieces: rows of the batch, index of the first piece
  bool pieces;
};

struct Plan {
  std::vector<LaneSet> sets;
  int64_t n_pieces = 1, piece_length = 0;
  bool split() const { return n_pieces > 1; }
};

Plan plan_of(const LinearScanShape& p, int64_t lanes) {
  Plan plan;
  const int64_t rows = p.batch * p.dim;
  if (p.cu_seqlens) {
    for (int64_t s = 0; s < p.num_seqs; ++s) {
      plan.sets.push_back({p.dim, p.cu_seqlens[s + 1] - p.cu_seqlens[s], 0, p.cu_seqlens[s], s, 0, 0, false});
    }
  } else if (rows > 0 && rows < kFewRows && p.seqlen >= 2 * kLeastPiece) {
    const int64_t wanted = std::min((kWantedLanes + rows - 1) / rows, p.seqlen / kLeastPiece);
    plan.piece_length = (p.seqlen / wanted + kTileSteps - 1) / kTileSteps * kTileSteps;
    const int64_t full = p.seqlen / plan.piece_length, rest = p.seqlen % plan.piece_length;
    plan.n_pieces = full + (rest > 0);
    plan.sets.push_back({rows * full, plan.piece_length, 0, 0, 0, rows, 0, true});
    if (rest) plan.sets.push_back({rows, rest, 0, 0, 0, rows, full, true});
  } else if (p.dim < lanes) {
    plan.piece_length = p.seqlen;
    plan.sets.push_back({rows, p.seqlen, 0, 0, 0, rows, 0, true});
  } else {
    for (int64_t b = 0; b < p.batch; ++b) plan.sets.push_back({p.dim, p.seqlen, b, 0, b, 0, 0, false});
  }
  return plan;
}

template <class E>
Lanes<E> lanes_at(const LinearScanShape& p, const Plan& plan, const LaneSet& set, int64_t group) {
  constexpr int64_t width = kLanes<E>;
  Lanes<E> lanes;
  int64_t begin = group * width;
  lanes.count = int(std::min(width, set.count - begin));
  if (lanes.count < width && set.count >= width) {  // the last lanes are computed together with some before them
    lanes.first = int(width - lanes.count);
    lanes.count = int(width);
    begin = set.count - width;
  }
  for (int64_t i = 0; i < width; ++i) {
    const int64_t lane = begin + (i < lanes.count ? i : 0);
    if (set.pieces) {
      const int64_t row = lane % set.rows, piece = set.piece + lane / set.rows;
      lanes.batch[i] = row / p.dim;
      lanes.channel[i] = row % p.dim;
      lanes.start[i] = piece * plan.piece_length;
      lanes.state[i] = row;
      lanes.piece[i] = piece * set.rows + row;
      lanes.inner[i] = p.reverse ? piece + 1 < plan.n_pieces : piece > 0;
    } else {
      lanes.batch[i] = set.batch;
      lanes.channel[i] = lane;
      lanes.start[i] = set.start;
      lanes.state[i] = set.state_row * p.dim + lane;
      lanes.piece[i] = 0;
      lanes.inner[i] = false;
    }
  }
  return lanes;
}

// How the end of every piece depends on its begin, and the states at the begins.
struct Pieces {
  std::vector<double> product, end, begin;
};

template <class Group, class E, bool kA, bool kB>
class Driver {
 public:
  using Params = typename Group::Params;
  static constexpr int kSizeA = kA ? 2 : 1, kSize = kB ? 2 : 1;

  // Walks start at `from` and leave their last states in `to`; `first` is the scan's own first state.
  Driver(const Params& p, const Threads& threads, const void* from, void* to, const void* first)
      : p_(p),
        threads_(threads),
        from_(static_cast<const E*>(from)),
        to_(static_cast<E*>(to)),
        first_(static_cast<const E*>(first)),
        plan_(plan_of(p, kLanes<E>)),
        down_(p.reverse != Group::kAgainstScan) {
    side_by_side_ = Group::outputs_side_by_side(p);
  }

  void run() {
    if (!plan_.split()) return walk_all<Pass::kAll>();
    const int64_t rows = p_.batch * p_.dim;
    pieces_.product.resize(plan_.n_pieces * rows * kSizeA);
    pieces_.end.resize(plan_.n_pieces * rows * kSize);
    pieces_.begin.resize(plan_.n_pieces * rows * kSize);
    walk_all<Pass::kCompose>();
    for (int64_t row = 0; row < rows; ++row) join(row, rows);
    walk_all<Pass::kAll>();
  }

 private:
  struct Slot {
    Lanes<E> lanes;
    Group group;
    Number<E, kB> first;
  };

  template <Pass kPass>
  void walk_all() {
    int64_t groups = 0;
    for (const LaneSet& set : plan_.sets) groups += groups_of(set);
    const int64_t fair = (groups + threads_.count - 1) / std::max<int64_t>(threads_.count, 1);
    const int64_t block = side_by_side_ ? std::clamp<int64_t>(fair, 1, kMaxBlock) : 1;
    std::vector<std::pair<int64_t, int64_t>> tasks;
    for (size_t s = 0; s < plan_.sets.size(); ++s) {
      for (int64_t g = 0; g < groups_of(plan_.sets[s]); g += block) tasks.emplace_back(s, g);
    }
    parallel(threads_, int64_t(tasks.size()), [&](int64_t begin, int64_t end) {
      std::vector<Slot> slots;
      for (int64_t i = begin; i < end; ++i) {
        const LaneSet& set = plan_.sets[tasks[i].first];
        const int64_t last = std::min(tasks[i].second + block, groups_of(set));
        slots.clear();
        for (int64_t g = tasks[i].second; g < last; ++g) slots.push_back(slot<kPass>(set, g));
        if (down_) {
          walk<true, kPass>(slots, set.length);
        } else {
          walk<false, kPass>(slots, set.length);
        }
        for (Slot& one : slots) finish<kPass>(one);
      }
    });
  }
  static int64_t groups_of(const LaneSet& set) { return (set.count + kLanes<E> - 1) / kLanes<E>; }

  template <bool kDown, Pass kPass>
  void walk(std::vector<Slot>& slots, int64_t length) const {
    const int64_t steps = side_by_side_ ? kStepsSideBySide : kTileSteps,
                  ahead = kDown ? -kPrefetchAhead : kPrefetchAhead;
    const int64_t n_tiles = (length + steps - 1) / steps;
    for (int64_t k = 0; k < n_tiles; ++k) {
      const int64_t t = (kDown ? n_tiles - 1 - k : k) * steps;
      const int n = int(std::min(steps, length - t));
      for (Slot& one : slots) one.group.template tile<kDown, kPass>(t, n, length, one.first, ahead);
    }
  }

  template <Pass kPass>
  Slot slot(const LaneSet& set, int64_t index) const {
    const Lanes<E> lanes = lanes_at<E>(p_, plan_, set, index);
    Slot one{lanes, Group(p_, lanes), all_lanes<E, kB>(0)};
    one.group.state = all_lanes<E, kB>(0);
    one.group.product = all_lanes<E, kA>(1);
    for (int i = 0; i < kLanes<E>; ++i) {
      for (int k = 0; k < kSize; ++k) {
        if (first_) lane_of(one.first, k, i) = double(first_[kSize * lanes.state[i] + k]);
        double& state = lane_of(one.group.state, k, i);
        if (kPass == Pass::kCompose) continue;
        if (plan_.split()) {
          state = pieces_.begin[kSize * lanes.piece[i] + k];
        } else if (from_) {
          state = double(from_[kSize * lanes.state[i] + k]);
        }
      }
    }
    return one;
  }

  template <Pass kPass>
  void finish(Slot& one) {
    const Lanes<E>& lanes = one.lanes;
    const int64_t rows = p_.batch * p_.dim, final_piece = down_ ? 0 : plan_.n_pieces - 1;
    for (int i = lanes.first; i < lanes.count; ++i) {
      if (kPass == Pass::kCompose) {
        for (int k = 0; k < kSize; ++k) pieces_.end[kSize * lanes.piece[i] + k] = lane_of(one.group.state, k, i);
        for (int k = 0; k < kSizeA; ++k)
          pieces_.product[kSizeA * lanes.piece[i] + k] = lane_of(one.group.product, k, i);
      } else if (to_ && (!plan_.split() || lanes.piece[i] / rows == final_piece)) {
        for (int k = 0; k < kSize; ++k) to_[kSize * lanes.state[i] + k] = E(lane_of(one.group.state, k, i));
      }
    }
  }

  void join(int64_t row, int64_t rows) {
    double re = from_ ? double(from_[kSize * row]) : 0, im = from_ && kB ? double(from_[kSize * row + kSize - 1]) : 0;
    for (int64_t k = 0; k < plan_.n_pieces; ++k) {
      const int64_t i = (down_ ? plan_.n_pieces - 1 - k : k) * rows + row;
      pieces_.begin[kSize * i] = re;
      if (kB) pieces_.begin[kSize * i + kSize - 1] = im;
      // A product that overflowed stands for no state at all where there is none.
      const bool nothing = re == 0 && im == 0;
      const double ar = nothing ? 0 : pieces_.product[kSizeA * i];
      const double ai = nothing || !kA ? 0 : pieces_.product[kSizeA * i + kSizeA - 1];
      const double next = ar * re - ai * im + pieces_.end[kSize * i];
      im = kB ? ar * im + ai * re + pieces_.end[kSize * i + kSize - 1] : 0;
      re = next;
    }
  }

  const Params& p_;
  const Threads& threads_;
  const E* from_;
  E* to_;
  const E* first_;
  const Plan plan_;
  const bool down_;
  bool side_by_side_;
  Pieces pieces_;
};

template <class F>
void with_types(const LinearScanShape& p, F&& f) {
  using No = std::false_type;
  using Yes = std::true_type;
  with_sequence_dtype(p.dtype, [&](auto* element, auto* sequence) {
    using S = std::remove_pointer_t<decltype(sequence)>;
    if constexpr (sizeof(S) >= 4) {
      if (p.a_complex) return f(element, sequence, Yes(), Yes());
      if (p.b_complex) return f(element, sequence, No(), Yes());
    }
    f(element, sequence, No(), No());
  });
}

void expect_large_pages(const LinearScanShape& p, const SeqView& view, bool complex) {
  const int64_t bytes = p.dtype == DType::kFloat64 ? 8 : p.dtype == DType::kFloat32 ? 4 : 2;
  prefer_large_pages(view.ptr, p.batch * p.dim * p.seqlen * bytes * (complex ? 2 : 1));
}

}  // namespace

namespace TRIFUSE_ISA {

void linear_scan_fwd(const LinearScanParams& p, const Threads& threads) {
  expect_large_pages(p, p.h, p.b_complex);
  with_types(p, [&](auto* element, auto* sequence, auto a, auto b) {
    using E = std::remove_pointer_t<decltype(element)>;
    using S = std::remove_pointer_t<decltype(sequence)>;
    constexpr bool kA = decltype(a)::value, kB = decltype(b)::value;
    Driver<ForwardGroup<E, S, kA, kB>, E, kA, kB>(p, threads, p.initial_state, p.last_state, nullptr).run();
  });
}

void linear_scan_bwd(const LinearScanBwdParams& p, const Threads& threads) {
  expect_large_pages(p, p.da, p.a_complex);
  expect_large_pages(p, p.db, p.b_complex);
  with_types(p, [&](auto* element, auto* sequence, auto a, auto b) {
    using E = std::remove_pointer_t<decltype(element)>;
    using S = std::remove_pointer_t<decltype(sequence)>;
    constexpr bool kA = decltype(a)::value, kB = decltype(b)::value;
    using Group = AdjointGroup<E, S, kA, kB>;
    Driver<Group, E, kA, kB>(p, threads, p.dlast_state, p.dinitial_state, p.initial_state).run();
  });
}

}  // namespace TRIFUSE_ISA
}  // namespace trifuse::cpu
