// The CPU entry points of the causal convolution for one instruction set: from dtypes to templates.
#include "causal_conv1d_channels_bwd.h"
#include "causal_conv1d_times_bwd.h"
#include "causal_conv1d_update.h"
#include "dtypes.h"
#include "pages.h"

#ifndef TRIFUSE_ISA
#error "compile with -DTRIFUSE_ISA=<namespace of this instruction set>"
#endif

namespace trifuse::cpu {
namespace {

// Whether positions go into the lanes of vectors, and not channels.
template <class T>
bool along_time(const CausalConv1dParams& p, std::initializer_list<const SeqView*> views) {
  bool dense = p.seqlen >= kLanes<T>;
  for (const SeqView* view : views) dense = dense && view->time == 1;
  return dense;
}

template <class T, class S>
void final_states(const CausalConv1dParams& p, const Plan<T>& plan) {
  if (!p.final_states) return;
  for (int64_t row = 0; row < p.rows(); ++row) {
    const Span& span = plan.spans[row];
    for (int64_t j = 0; j < p.width - 1; ++j) {
      const int64_t t = span.end - (p.width - 1) + j;
      const bool left = t < span.start && span.from_left && p.initial_states;
      for (int64_t d = 0; d < p.dim; ++d) {
        S* to = state_at<S>(p, p.final_states, row, d, j);
        if (t >= span.first && t >= span.start) {
          *to = *at<S>(p.x, p.cu_seqlens ? 0 : row, d, t);
        } else {
          *to = left ? *state_at<S>(p, p.initial_states, row, d, t - span.start + p.width - 1) : S{};
        }
      }
    }
  }
}

template <class T, class S>
void forward(const CausalConv1dParams& p, const Threads& threads) {
  const Plan<T> plan(p, 0);
  plan.fill(p, threads);
  final_states<T, S>(p, plan);
  if (p.batch == 0 || p.dim == 0 || p.seqlen == 0) return;
  prefer_large_pages(p, p.y);
  if (along_time<T>(p, {&p.x, &p.y})) {
    forward_times<T, S>(p, plan, threads);
  } else {
    forward_channels<T, S>(p, plan, threads);
  }
}

template <class T>
int64_t backward_pieces(const CausalConv1dBwdParams& p) {
  if (along_time<T>(p, {&p.x, &p.dy, &p.dx})) return TimePieces(p.seqlen).count;
  return divide_up(p.seqlen, kChannelPiece);
}

// The sums of the tasks, in double and always in the same order.
template <class T>
void sum_partials(const CausalConv1dBwdParams& p, const Plan<T>& plan, int64_t pieces, const Threads& threads) {
  const int64_t rows = p.batch * pieces, row = (p.width + 1) * p.dim;
  share(p, threads, p.dim, [&](int64_t first, int64_t last) {
    constexpr int64_t at_once = 64;
    for (int64_t k = 0; k <= p.width; ++k) {
      for (int64_t begin = first; begin < last; begin += at_once) {
        const int64_t count = least(at_once, last - begin);
        double total[at_once] = {};
        for (int64_t i = 0; i < rows; ++i) {
          const T* from = plan.partials + i * row + k * p.dim + begin;
          for (int64_t d = 0; d < count; ++d) total[d] += from[d];
        }
        for (int64_t d = 0; d < count; ++d) {
          if (k < p.width) {
            static_cast<T*>(p.dweight)[(begin + d) * p.width + p.width - 1 - k] = T(total[d]);
          } else if (p.dbias) {
            static_cast<T*>(p.dbias)[begin + d] = T(total[d]);
          }
        }
      }
    }
  });
}

// Through a sequence without positions the final states are the initial ones.
template <class T, class S>
void pass_empty_sequences(const CausalConv1dBwdParams& p, const Plan<T>& plan) {
  if (!p.dinitial_states) return;
  const int64_t numbers = p.dim * (p.width - 1);
  for (int64_t row = 0; row < p.rows(); ++row) {
    if (plan.spans[row].stop > plan.spans[row].start) continue;
    S* to = static_cast<S*>(p.dinitial_states) + row * numbers;
    for (int64_t i = 0; i < numbers; ++i) {
      to[i] = p.dfinal_states ? static_cast<const S*>(p.dfinal_states)[row * numbers + i] : S{};
    }
  }
}

template <class T, class S>
void backward(const CausalConv1dBwdParams& p, const Threads& threads) {
  const int64_t pieces = backward_pieces<T>(p);
  const Plan<T> plan(p, pieces);
  plan.fill(p, threads);
  pass_empty_sequences<T, S>(p, plan);
  if (p.batch > 0 && p.dim > 0 && p.seqlen > 0) {
    prefer_large_pages(p, p.dx);
    if (along_time<T>(p, {&p.x, &p.dy, &p.dx})) {
      backward_times<T, S>(p, plan, threads);
    } else {
      backward_channels<T, S>(p, plan, threads);
    }
  }
  sum_partials<T>(p, plan, p.batch > 0 ? pieces : 0, threads);
}

}  // namespace

namespace TRIFUSE_ISA {

int64_t causal_conv1d_fwd_workspace_bytes(const CausalConv1dParams& p) {
  return p.dtype == DType::kFloat64 ? Plan<double>(p, 0).bytes : Plan<float>(p, 0).bytes;
}
void causal_conv1d_fwd(const CausalConv1dParams& p, const Threads& threads) {
  with_sequence_dtype(p.dtype, [&](auto* acc, auto* sequence) {
    forward<std::remove_pointer_t<decltype(acc)>, std::remove_pointer_t<decltype(sequence)>>(p, threads);
  });
}

int64_t causal_conv1d_bwd_workspace_bytes(const CausalConv1dBwdParams& p) {
  return p.dtype == DType::kFloat64 ? Plan<double>(p, backward_pieces<double>(p)).bytes
                                    : Plan<float>(p, backward_pieces<float>(p)).bytes;
}
void causal_conv1d_bwd(const CausalConv1dBwdParams& p, const Threads& threads) {
  with_sequence_dtype(p.dtype, [&](auto* acc, auto* sequence) {
    backward<std::remove_pointer_t<decltype(acc)>, std::remove_pointer_t<decltype(sequence)>>(p, threads);
  });
}

void causal_conv1d_update(const CausalConv1dUpdateParams& p, const Threads& threads) {
  with_sequence_dtype(p.dtype, [&](auto* acc, auto* sequence) {
    with_sequence_dtype(p.state_dtype, [&](auto* state_acc, auto* state) {
      using T = std::remove_pointer_t<decltype(acc)>;
      if constexpr (std::is_same_v<decltype(acc), decltype(state_acc)>) {
        Update<T, std::remove_pointer_t<decltype(sequence)>, std::remove_pointer_t<decltype(state)>>(p).run(threads);
      }
    });
  });
}

}  // namespace TRIFUSE_ISA
}  // namespace trifuse::cpu
