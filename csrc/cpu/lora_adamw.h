// One step of AdamW of some ranks of many parameters on the CPU: a parameter, its gradient and its moments are read
// once and written once, in vectors of neighbours. Those are of one rank in A, (ranks, inner); in B, (outer, ranks),
// every number has the next rank, and vectors are written with what they held where a rank is not active.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "bfloat16.h"
#include "dtypes.h"
#include "isa.h"
#include "trifuse/lora_adamw.h"
#include "trifuse/simd.h"

namespace trifuse::cpu {
namespace {
namespace adamw {

constexpr int64_t kTask = 1 << 13;   // numbers that a thread takes at a time
constexpr int64_t kSmall = 1 << 15;  // numbers that one thread is done with before others have begun

template <class T>
TRIFUSE_INLINE Vec<T> square_root(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_sqrt_ps((__m512)x);
  } else {
    return (Vec<T>)_mm512_sqrt_pd((__m512d)x);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm256_sqrt_ps((__m256)x);
  } else {
    return (Vec<T>)_mm256_sqrt_pd((__m256d)x);
  }
#else
  for (int i = 0; i < kLanes<T>; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// A tensor as `runs` of `length` neighbours, cut into tasks, and what the counts of steps make of each rank.
struct Job {
  const LoraAdamwTensor* tensor = nullptr;
  bool by_number = false;  // neighbours are ranks: one run; otherwise runs are active ranks
  int64_t runs = 0, length = 0, runs_per_task = 1, pieces = 1, first_task = 0;
  std::vector<double> rates;  // (ranks,): lr / (1 - beta1^t)
  std::vector<double> roots;  // (ranks,): sqrt(1 - beta2^t)
  int64_t tasks() const { return (runs + runs_per_task - 1) / runs_per_task * pieces; }
};

// What all numbers of a call share, as T.
template <class T>
struct Constants {
  T decay, weight1, beta2, weight2, eps, sign;
  bool from_grad;  // the new moment is the gradient and a part of the way to the old one, which is the shorter way

  Constants(const LoraAdamwParams& p, double lr)
      : decay(T(1 - lr * p.weight_decay)),
        weight1(T(std::min(p.beta1, 1 - p.beta1))),
        beta2(T(p.beta2)),
        weight2(T(1 - p.beta2)),
        eps(T(p.eps)),
        sign(p.maximize ? T(-1) : T(1)),
        from_grad(p.beta1 <= 0.5) {}
};

template <class T>
TRIFUSE_INLINE Vec<T> step(const Constants<T>& c, Vec<T> param, Vec<T> grad, Vec<T>& m, Vec<T>& v, Vec<T> rate,
                           Vec<T> root) {
  const Vec<T> g = grad * splat(c.sign);
  m = c.from_grad ? g + splat(c.weight1) * (m - g) : m + splat(c.weight1) * (g - m);
  v = splat(c.beta2) * v + splat(c.weight2) * (g * g);
  return param * splat(c.decay) - rate * m / (square_root<T>(v) / root + splat(c.eps));
}

template <class T, class E>
TRIFUSE_INLINE Vec<T> read(const E* from, int64_t count) {
  if (count == kLanes<T>) return load_sequence<T>(from);
  E padded[kLanes<T>] = {};
  std::memcpy(padded, from, size_t(count) * sizeof(E));
  return load_sequence<T>(padded);
}
template <class T, class E>
TRIFUSE_INLINE void write(E* to, Vec<T> v, int64_t count) {
  if (count == kLanes<T>) return store_sequence<E, T>(to, v);
  E padded[kLanes<T>];
  store_sequence<E, T>(padded, v);
  std::memcpy(to, padded, size_t(count) * sizeof(E));
}

// By number modulo `period`: its rank's rate and root, and whether it is active. A vector may begin at any of them.
template <class T>
struct Ranks {
  int64_t period;
  std::vector<T> rates, roots, active;

  explicit Ranks(int64_t period)
      : period(period), rates(period + kLanes<T>), roots(period + kLanes<T>), active(period + kLanes<T>) {}
  void set(int64_t number, double rate, double root, bool is_active) {
    for (int64_t i = number; i < int64_t(rates.size()); i += period) {
      rates[i] = T(rate), roots[i] = T(root), active[i] = T(is_active);
    }
  }
};

// `count` neighbours from number `at` on, the first with the rank `phase`.
template <class T, class S, bool kMasked>
void step_run(const Constants<T>& c, const LoraAdamwTensor& t, int64_t at, int64_t count, const Ranks<T>& ranks,
              int64_t phase) {
  constexpr int lanes = kLanes<T>;
  const int64_t advance = lanes % ranks.period;
  S* param = static_cast<S*>(t.param) + at;
  const S* grad = static_cast<const S*>(t.grad) + at;
  T* exp_avg = static_cast<T*>(t.exp_avg) + at;
  T* exp_avg_sq = static_cast<T*>(t.exp_avg_sq) + at;
  for (int64_t i = 0; i < count; i += lanes) {
    const int64_t here = std::min<int64_t>(lanes, count - i);
    const Vec<T> before = read<T>(param + i, here), old_m = read<T>(exp_avg + i, here);
    const Vec<T> old_v = read<T>(exp_avg_sq + i, here);
    Vec<T> m = old_m, v = old_v;
    Vec<T> x =
        step<T>(c, before, read<T>(grad + i, here), m, v, load<T>(&ranks.rates[phase]), load<T>(&ranks.roots[phase]));
    if constexpr (kMasked) {
      const IVec<T> active = load<T>(&ranks.active[phase]) != splat(T(0));
      x = active ? x : before, m = active ? m : old_m, v = active ? v : old_v;
    }
    write<T>(param + i, x, here);
    write<T>(exp_avg + i, m, here);
    write<T>(exp_avg_sq + i, v, here);
    phase += advance;
    if (phase >= ranks.period) phase -= ranks.period;
  }
}

template <class T, class S>
void task(const LoraAdamwParams& p, const Job& job, int64_t index) {
  const LoraAdamwTensor& t = *job.tensor;
  const Constants<T> c(p, t.lr);
  const int64_t begin = index % job.pieces * kTask, end = std::min(begin + kTask, job.length);
  const int64_t first = index / job.pieces * job.runs_per_task, last = std::min(first + job.runs_per_task, job.runs);
  const int64_t active = t.last - t.first;
  Ranks<T> ranks(job.by_number ? t.ranks : 1);
  if (!job.by_number) {
    for (int64_t run = first; run < last; ++run) {
      const int64_t rank = t.first + run % active;
      ranks.set(0, job.rates[rank], job.roots[rank], true);
      step_run<T, S, false>(c, t, (run / active * t.ranks + rank) * t.inner + begin, end - begin, ranks, 0);
    }
    return;
  }
  for (int64_t rank = 0; rank < t.ranks; ++rank) {
    ranks.set(rank, job.rates[rank], job.roots[rank], rank >= t.first && rank < t.last);
  }
  if (active == t.ranks) {
    step_run<T, S, false>(c, t, begin, end - begin, ranks, begin % t.ranks);
  } else {
    step_run<T, S, true>(c, t, begin, end - begin, ranks, begin % t.ranks);
  }
}

inline Job job_of(const LoraAdamwParams& p, const LoraAdamwTensor& t) {
  Job job;
  job.tensor = &t;
  job.by_number = t.inner == 1;
  job.runs = job.by_number ? 1 : t.outer * (t.last - t.first);
  job.length = job.by_number ? t.outer * t.ranks : t.inner;
  job.pieces = std::max<int64_t>((job.length + kTask - 1) / kTask, 1);
  job.runs_per_task = std::max<int64_t>(kTask / std::max<int64_t>(job.length, 1), 1);
  job.rates.resize(t.ranks, 0.0);
  job.roots.resize(t.ranks, 1.0);
  for (int64_t rank = t.first; rank < t.last; ++rank) {
    const double steps = t.steps[rank] += 1;
    job.rates[rank] = t.lr / (1 - std::pow(p.beta1, steps));
    job.roots[rank] = std::sqrt(1 - std::pow(p.beta2, steps));
  }
  return job;
}

inline void run(const LoraAdamwParams& p, const Threads& threads) {
  std::vector<Job> jobs;
  int64_t tasks = 0, numbers = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    const LoraAdamwTensor& t = p.tensors[i];
    if (t.first == t.last) continue;
    jobs.push_back(job_of(p, t));
    jobs.back().first_task = tasks;
    tasks += jobs.back().tasks();
    numbers += jobs.back().runs * jobs.back().length;
  }
  const auto body = [&](int64_t begin, int64_t end) {
    const auto after = [](int64_t index, const Job& job) { return index < job.first_task; };
    auto job = std::upper_bound(jobs.begin(), jobs.end(), begin, after) - 1;
    for (int64_t index = begin; index < end; ++index) {
      while (job + 1 != jobs.end() && (job + 1)->first_task <= index) ++job;
      with_sequence_dtype(job->tensor->dtype, [&](auto* acc, auto* type) {
        task<std::remove_pointer_t<decltype(acc)>, std::remove_pointer_t<decltype(type)>>(p, *job,
                                                                                          index - job->first_task);
      });
    }
  };
  if (numbers <= kSmall) {
    if (tasks) body(0, tasks);
  } else {
    parallel(threads, tasks, body);
  }
}

}  // namespace adamw
}  // namespace
}  // namespace trifuse::cpu
