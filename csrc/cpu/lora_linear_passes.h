// The four passes of an adapter beside a matrix product, for one adapter or for many whose rows are sorted. What a task
// computes depends on the sizes alone, and every number is summed in one order, so results do not depend on threads.
#pragma once

#include "dora_linear_rows.h"
#include "lora_linear_tasks.h"
#include "lora_linear_tiles.h"

namespace trifuse::cpu {
namespace {
namespace lora {

// Rows of A from `first` on, columns [from, to), as padded T; where they are T already, the rows themselves.
template <class T, class A>
void pack_rows(T* packed, int64_t ld, const LoraAdapter& a, int64_t from, int64_t to) {
  for (int64_t r = 0; r < a.rank; ++r) {
    load_row<T>(packed + r * ld, ld, static_cast<const A*>(a.A) + r * a.A_row + from, to - from);
  }
}

template <class T>
void zero_rows(T* packed, int64_t ld, int64_t from, int64_t to) {
  if (from < to) std::memset(packed + from * ld, 0, size_t((to - from) * ld) * sizeof(T));
}

// S or Z of a block of rows times the adapter's factor, ranks padded with zeros.
template <class T>
void load_factors(T* to, int64_t ld, const LoraParams& p, const void* from, int64_t from_row, const LoraAdapter& a,
                  int64_t begin, int64_t rows) {
  for (int64_t m = 0; m < rows; ++m, to += ld) {
    const T* source = static_cast<const T*>(from) + row_of(p, begin + m) * from_row;
    for (int64_t r = 0; r < a.rank; ++r) to[r] = source[r] * factor_of<T>(a, r);
    for (int64_t r = a.rank; r < ld; ++r) to[r] = 0;
  }
}

// x, A -> S. Few rows are split by ranks, many by rows: a number of S is one sum in either case.
template <class T, class S, class A>
void down(const LoraParams& p, const Threads& threads) {
  std::vector<Task> tasks;
  for (int64_t a = 0; a < p.n_adapters; ++a) {
    const LoraAdapter& one = p.adapters[a];
    const bool few = one.end - one.begin <= 2 * kBlockRows && p.n_adapters < 4;
    const int64_t step = few ? kRankStep<T> : std::max<int64_t>(one.rank, 1);
    for (int64_t m = one.begin; m < one.end; m += kBlockRows) {
      for (int64_t r = 0; r < one.rank; r += step) {
        tasks.push_back({&one, m, std::min(m + kBlockRows, one.end), r, std::min(r + step, one.rank)});
      }
    }
  }
  const bool convert = !std::is_same_v<T, A>;
  run(enough(p, p.in, threads), tasks, [&](const Task& task, Memory& memory) {
    const LoraAdapter& a = *task.adapter;
    const int64_t ranks = task.to - task.from, ld = spaced<T>(p.in), words = (p.in + 63) / 64;
    constexpr int group = kDotRows<T>;
    Arena arena(memory, Scratch::bytes_of<T>(convert ? ranks * ld : 0) + Scratch::bytes_of<const T*>(ranks) +
                            Scratch::bytes_of<T>(p.seed ? group * ld : 0) + Scratch::bytes_of<uint64_t>(words));
    T* packed = arena.take<T>(convert ? ranks * ld : 0);
    const T** rows_of_A = arena.take<const T*>(ranks);
    T* kept_rows = arena.take<T>(p.seed ? group * ld : 0);
    uint64_t* kept = arena.take<uint64_t>(words);
    for (int64_t r = 0; r < ranks; ++r) {
      const A* from = static_cast<const A*>(a.A) + (task.from + r) * a.A_row;
      if constexpr (std::is_same_v<T, A>) {
        rows_of_A[r] = from;
      } else {
        load_row<T>(packed + r * ld, ld, from, p.in);
        rows_of_A[r] = packed + r * ld;
      }
    }
    for (int64_t m = task.begin; m < task.end; m += group) {
      const int64_t rows = std::min<int64_t>(group, task.end - m);
      const S* x[group];
      const T* dropped[group];
      T* out[group];
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = row_of(p, m + i);
        x[i] = static_cast<const S*>(p.x) + row * p.x_row;
        out[i] = static_cast<T*>(p.S) + row * p.S_row + task.from;
        if (!p.seed) continue;
        kept_columns(kept, uint64_t(*p.seed), uint64_t(row), 0, p.in, p.threshold);
        load_kept<T>(kept_rows + i * ld, x[i], p.in, kept, T(p.keep_scale));
        dropped[i] = kept_rows + i * ld;
      }
      if (p.seed) {
        all_dots<T, T>(dropped, rows, rows_of_A, ranks, p.in, out);
      } else {
        const S* next[group];
        for (int64_t i = 0; i < group; ++i) {
          next[i] = static_cast<const S*>(p.x) + row_of(p, std::min(m + group + i, task.end - 1)) * p.x_row;
        }
        all_dots<T, S>(x, rows, rows_of_A, ranks, p.in, out, false, next);
      }
    }
  });
}

// S, B, bias -> y.
template <class T, class S, class B>
void up(const LoraParams& p, const Threads& threads) {
  const std::vector<Task> tasks = cut_tasks(p, p.out, cut_of(p, p.out), true);
  run(enough(p, p.out, threads), tasks, [&](const Task& task, Memory& memory) {
    const LoraAdapter& a = *task.adapter;
    const int64_t columns = task.to - task.from, ld = spaced<T>(columns);
    Arena arena(memory, Scratch::bytes_of<T>(a.rank * ld) + Scratch::bytes_of<T>(kBlockRows * a.rank) +
                            Scratch::bytes_of<T>(ld));
    T* packed = arena.take<T>(a.rank * ld);
    T* factors = arena.take<T>(kBlockRows * a.rank);
    T* base = arena.take<T>(ld);
    if (a.rank) {
      pack_columns<T>(packed, ld, static_cast<const B*>(a.B) + task.from * a.B_row, a.B_row, a.rank, columns);
    }
    if (p.bias) load_row<T>(base, ld, static_cast<const S*>(p.bias) + task.from, columns);
    Block<T> b;
    b.factors = factors;
    b.factors_ld = a.rank;
    b.packed = packed;
    b.ld = ld;
    b.ranks = a.rank;
    b.columns = columns;
    b.base = p.bias ? base : nullptr;
    for (int64_t m = task.begin; m < task.end; m += kBlockRows) {
      b.rows = std::min<int64_t>(kBlockRows, task.end - m);
      S* out[kBlockRows];
      for (int64_t i = 0; i < b.rows; ++i) out[i] = static_cast<S*>(p.y) + row_of(p, m + i) * p.y_row + task.from;
      load_factors(factors, b.factors_ld, p, p.S, p.S_row, a, m, b.rows);
      expand_by_rows<T, S>(b, out);
    }
  });
}

// Ranks [first, rank) of sums (ranks, ld) as rows of dA or columns of dB.
template <class T, class A>
void store_rows(const T* sums, int64_t ld, const LoraAdapter& a, int64_t from, int64_t columns) {
  for (int64_t r = a.first; r < a.rank; ++r) {
    A* to = static_cast<A*>(a.dA) + r * a.dA_row + from;
    int64_t c = 0;
    for (; c + kLanes<T> <= columns; c += kLanes<T>) store_as<T>(to + c, load<T>(sums + r * ld + c));
    for (; c < columns; ++c) to[c] = scalar_from<A>(sums[r * ld + c]);
  }
}
template <class T, class B>
void store_columns(const T* sums, int64_t ld, const LoraAdapter& a, int64_t from, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) {
    B* to = static_cast<B*>(a.dB) + (from + c) * a.dB_row;
    for (int64_t r = a.first; r < a.rank; ++r) to[r] = scalar_from<B>(sums[r * ld + c]);
  }
}

// The first of `groups` matrices of ranks x ld becomes the sum of all, by chunks of columns.
template <class T>
void add_groups(T* sums, int64_t groups, int64_t ranks, int64_t ld, const Threads& threads) {
  const int64_t numbers = ranks * ld, step = 64 * kLanes<T>;
  parallel(threads, (numbers + step - 1) / step, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * step; i < std::min(end * step, numbers); i += kLanes<T>) {
      Vec<T> total = load<T>(sums + i);
      for (int64_t g = 1; g < groups; ++g) total += load<T>(sums + g * numbers + i);
      store<T>(sums + i, total);
    }
  });
}

// Where a task's sums (ranks, ld) are: in its own memory, or those of its group of rows.
template <class T>
struct GroupSums {
  GroupSums(const Cut& cut, bool asked, int64_t ranks, int64_t columns)
      : size(cut.groups > 1 && asked ? ranks * spaced<T>(columns) : 0),
        memory(Scratch::bytes_of<T>(size * cut.groups)),
        all(memory.take<T>(size * cut.groups)) {}
  T* of(const Task& task, const Cut& cut) const { return all + task.begin / cut.rows * size; }

  int64_t size;
  Scratch memory;
  T* all;
};

// What dora_linear asks of a block of rows: dy is scaled, and the sums of its products with what was scaled are added
// to `sums`. From then on the block's rows are the scaled ones.
template <class T, class S>
void scale_block(const LoraParams& p, const S** dy, int64_t begin, int64_t rows, int64_t from, int64_t columns,
                 T* sums) {
  T some[kStep] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = row_of(p, begin + i);
    dora::scale_row<T, S>(*p.dora, dy[i], row, from, columns, sums ? some : nullptr);
    dy[i] = static_cast<const S*>(p.dora->dplain) + row * p.out + from;
  }
  for (int64_t c = 0; sums && c < columns; ++c) sums[c] += some[c];
}

// dy, S, B -> Z, dB. Every chunk of columns has its own part of Z; the parts are added in order afterwards.
template <class T, class S, class B>
void backward_out(const LoraParams& p, const Threads& threads) {
  const Cut cut = cut_of(p, p.out);
  const std::vector<Task> tasks = cut_tasks(p, p.out, cut, false);
  const int64_t chunk = cut.chunk, chunks = (p.out + chunk - 1) / chunk, width = p.max_rank;
  const int64_t all_ranks = rounded_up(width, 4);
  GroupSums<T> groups(cut, p.adapters->dB, all_ranks, p.out);
  const bool factors_grad = p.dora && p.dora->dfactors;
  GroupSums<T> factor_groups(cut, factors_grad, 1, p.out);
  const int64_t part = chunks > 1 ? p.rows * width : 0;
  Scratch scratch(Scratch::bytes_of<T>(chunks * part));
  T* const parts = scratch.take<T>(chunks * part);
  run(enough(p, p.out, threads), tasks, [&](const Task& task, Memory& memory) {
    const LoraAdapter& a = *task.adapter;
    const int64_t columns = task.to - task.from, ld = spaced<T>(columns), ranks = rounded_up(a.rank, 4);
    Arena arena(memory, 2 * Scratch::bytes_of<T>(ranks * ld) + Scratch::bytes_of<T>(kBlockRows * ranks) +
                            Scratch::bytes_of<const T*>(a.rank) + Scratch::bytes_of<T>(ld));
    T* packed = arena.take<T>(ranks * ld);
    T* sums = groups.size ? groups.of(task, cut) : arena.take<T>(ranks * ld);
    T* factor_sums = factor_groups.size ? factor_groups.of(task, cut) : arena.take<T>(ld);
    T* factors = arena.take<T>(kBlockRows * ranks);
    const T** rows_of_B = arena.take<const T*>(a.rank);
    pack_columns<T>(packed, ld, static_cast<const B*>(a.B) + task.from * a.B_row, a.B_row, a.rank, columns);
    zero_rows(sums, ld, 0, ranks);
    if (factors_grad) zero_rows(factor_sums, ld, 0, 1);
    Block<T> b;
    b.factors = factors;
    b.factors_ld = ranks;
    b.ld = ld;
    b.ranks = ranks;
    b.columns = columns;
    for (int64_t m = task.begin; m < task.end; m += kBlockRows) {
      b.rows = std::min<int64_t>(kBlockRows, task.end - m);
      const S* dy[kBlockRows];
      T* out[kBlockRows];
      for (int64_t i = 0; i < b.rows; ++i) {
        const int64_t row = row_of(p, m + i);
        dy[i] = static_cast<const S*>(p.dy) + row * p.dy_row + task.from;
        out[i] = chunks > 1 ? parts + task.from / chunk * part + row * width : static_cast<T*>(p.Z) + row * p.Z_row;
      }
      if (a.dB) load_factors(factors, ranks, p, p.S, p.S_row, a, m, b.rows);
      for (int64_t c = 0; c < columns; c += kStep) {
        b.columns = std::min(kStep, columns - c);
        for (int64_t r = 0; r < a.rank; ++r) rows_of_B[r] = packed + r * ld + c;
        const S* block[kBlockRows];
        for (int64_t i = 0; i < b.rows; ++i) block[i] = dy[i] + c;
        if (p.dora) {
          scale_block<T, S>(p, block, m, b.rows, task.from + c, b.columns, factors_grad ? factor_sums + c : nullptr);
        }
        all_dots<T, S>(block, b.rows, rows_of_B, a.rank, b.columns, out, c > 0);
        if (a.dB) gather<T, S>(b, block, sums + c, a.first);
      }
    }
    if (a.dB && !groups.size) store_columns<T, B>(sums, ld, a, task.from, columns);
    if (factors_grad && !factor_groups.size) {
      std::copy_n(factor_sums, columns, static_cast<T*>(p.dora->dfactors) + task.from);
    }
  });
  if (groups.size) {
    add_groups(groups.all, cut.groups, all_ranks, spaced<T>(p.out), threads);
    store_columns<T, B>(groups.all, spaced<T>(p.out), *p.adapters, 0, p.out);
  }
  if (factor_groups.size) {
    add_groups(factor_groups.all, cut.groups, 1, spaced<T>(p.out), threads);
    std::copy_n(factor_groups.all, p.out, static_cast<T*>(p.dora->dfactors));
  }
  if (chunks <= 1) return;
  for (int64_t i = 0; i < p.n_adapters; ++i) {
    const LoraAdapter& a = p.adapters[i];
    for (int64_t m = a.begin; m < a.end && a.rank; ++m) {
      const int64_t row = row_of(p, m);
      T* z = static_cast<T*>(p.Z) + row * p.Z_row;
      for (int64_t r = 0; r < a.rank; ++r) z[r] = parts[row * width + r];
      for (int64_t c = 1; c < chunks; ++c) {
        const T* more = parts + c * part + row * width;
        for (int64_t r = 0; r < a.rank; ++r) z[r] += more[r];
      }
    }
  }
}

// x, Z, A -> dA, dx.
template <class T, class S, class A>
void backward_in(const LoraParams& p, const Threads& threads) {
  const Cut cut = cut_of(p, p.in);
  const std::vector<Task> tasks = cut_tasks(p, p.in, cut, true);
  const int64_t all_ranks = rounded_up(p.max_rank, 4);
  GroupSums<T> groups(cut, p.adapters->dA, all_ranks, p.in);
  run(enough(p, p.in, threads), tasks, [&](const Task& task, Memory& memory) {
    const LoraAdapter& a = *task.adapter;
    const int64_t columns = task.to - task.from, ld = spaced<T>(columns), ranks = rounded_up(a.rank, 4);
    const int64_t words = (columns + 63) / 64;
    Arena arena(memory, 2 * Scratch::bytes_of<T>(ranks * ld) + Scratch::bytes_of<T>(kBlockRows * ranks) +
                            Scratch::bytes_of<T>(p.seed ? kBlockRows * ld : 0) +
                            Scratch::bytes_of<uint64_t>(kBlockRows * words));
    T* packed = arena.take<T>(ranks * ld);
    T* sums = groups.size ? groups.of(task, cut) : arena.take<T>(ranks * ld);
    T* factors = arena.take<T>(kBlockRows * ranks);
    T* kept_rows = arena.take<T>(p.seed ? kBlockRows * ld : 0);
    uint64_t* kept = arena.take<uint64_t>(kBlockRows * words);
    pack_rows<T, A>(packed, ld, a, task.from, task.to);
    zero_rows(packed, ld, a.rank, ranks);
    zero_rows(sums, ld, 0, ranks);
    Block<T> b;
    b.factors = factors;
    b.factors_ld = ranks;
    b.packed = packed;
    b.ld = ld;
    b.ranks = ranks;
    b.columns = columns;
    b.kept = p.seed ? kept : nullptr;
    b.words = words;
    b.keep_scale = T(p.keep_scale);
    for (int64_t m = task.begin; m < task.end; m += kBlockRows) {
      b.rows = std::min<int64_t>(kBlockRows, task.end - m);
      const S* x[kBlockRows];
      const T* dropped[kBlockRows] = {};
      S* dx[kBlockRows] = {};
      for (int64_t i = 0; i < b.rows; ++i) {
        const int64_t row = row_of(p, m + i);
        x[i] = static_cast<const S*>(p.x) + row * p.x_row + task.from;
        if (p.dx) dx[i] = static_cast<S*>(p.dx) + row * p.dx_row + task.from;
        if (!p.seed) continue;
        uint64_t* bits = kept + i * words;
        kept_columns(bits, uint64_t(*p.seed), uint64_t(row), task.from, columns, p.threshold);
        dropped[i] = kept_rows + i * ld;
        if (a.dA) load_kept<T>(kept_rows + i * ld, x[i], columns, bits, b.keep_scale);
      }
      load_factors(factors, ranks, p, p.Z, p.Z_row, a, m, b.rows);
      for (int64_t c = 0; c < columns; c += kStep) {
        b.columns = std::min(kStep, columns - c);
        b.packed = packed + c;
        b.kept = p.seed ? kept + c / 64 : nullptr;
        if (a.dA && p.seed) gather<T, T>(b, dropped, sums + c, a.first);
        if (a.dA && !p.seed) gather<T, S>(b, x, sums + c, a.first);
        if (p.dx) expand<T, S>(b, dx);
        for (int64_t i = 0; i < b.rows; ++i) {
          x[i] += b.columns;
          if (p.dx) dx[i] += b.columns;
          if (p.seed) dropped[i] += b.columns;
        }
      }
    }
    if (a.dA && !groups.size) store_rows<T, A>(sums, ld, a, task.from, columns);
  });
  if (groups.size) {
    add_groups(groups.all, cut.groups, all_ranks, spaced<T>(p.in), threads);
    store_rows<T, A>(groups.all, spaced<T>(p.in), *p.adapters, 0, p.in);
  }
}

}  // namespace lora
}  // namespace
}  // namespace trifuse::cpu
