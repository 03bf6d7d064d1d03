// How the passes of lora_linear are cut into tasks, and the memory of a task. What a task computes depends on the sizes
// alone, so results do not depend on threads.
#pragma once

#include <vector>

#include "isa.h"
#include "rows.h"
#include "trifuse/lora_linear.h"

namespace trifuse::cpu {
namespace {
namespace lora {

// One piece of a pass: rows [begin, end) of the order, columns [from, to) (of ranks: in `down`).
struct Task {
  const LoraAdapter* adapter;
  int64_t begin, end;
  int64_t from, to;
};

constexpr int kBlockRows = 32;  // rows that a pass takes through a chunk of columns at a time
constexpr int64_t kStep = 512;  // columns that a block of rows is taken through at a time

inline int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Columns of a task: enough to sum along, few enough for their factors to stay in the first cache. A multiple of 64,
// as dropout's words are.
inline int64_t chunk_of(int64_t columns) { return std::max<int64_t>(256, rounded_up((columns + 15) / 16, 64)); }

// Columns of a packed factor, one vector more than they need: rows a power of two apart would share a set of the cache.
template <class T>
constexpr int64_t spaced(int64_t columns) {
  return padded<T>(columns) + kLanes<T>;
}

inline int64_t row_of(const LoraParams& p, int64_t i) { return p.order ? p.order[i] : i; }

template <class T>
T factor_of(const LoraAdapter& a, int64_t rank) {
  return T(a.scale) * (a.p ? static_cast<const T*>(a.p)[rank] : T(1));
}

// How a pass that sums over rows is cut. Many rows of one adapter are cut into groups, which read whole rows and have
// sums of their own, added in order afterwards; else chunks of columns go through all rows.
struct Cut {
  int64_t groups = 1;
  int64_t rows = 0;   // of a group
  int64_t chunk = 0;  // columns of a task
};
inline Cut cut_of(const LoraParams& p, int64_t columns) {
  Cut cut;
  cut.chunk = chunk_of(columns);
  cut.rows = p.rows;
  const bool fits = p.max_rank * columns <= 65536;  // the packed factor and the sums stay in the second cache
  if (p.n_adapters != 1 || p.rows < 8 * kBlockRows || columns == 0 || !fits) return cut;
  cut.rows = std::max<int64_t>(4 * kBlockRows, rounded_up((p.rows + 7) / 8, kBlockRows));
  cut.groups = (p.rows + cut.rows - 1) / cut.rows;
  cut.chunk = columns;
  return cut;
}

// Chunks of columns of every adapter's rows.
inline std::vector<Task> column_tasks(const LoraParams& p, int64_t columns, int64_t chunk, bool without_rank) {
  std::vector<Task> tasks;
  for (int64_t a = 0; a < p.n_adapters; ++a) {
    const LoraAdapter& one = p.adapters[a];
    if (one.rank == 0 && (!without_rank || one.begin == one.end)) continue;
    for (int64_t c = 0; c < columns; c += chunk) {
      tasks.push_back({&one, one.begin, one.end, c, std::min(c + chunk, columns)});
    }
  }
  return tasks;
}

// Memory of one thread that grows with its tasks. (Not a vector of a plain type: its functions would be compiled once
// per instruction set under one name.)
class Memory {
 public:
  ~Memory() { std::free(begin_); }
  char* at_least(int64_t bytes) {
    if (size_ < bytes) {
      std::free(begin_);
      begin_ = static_cast<char*>(std::malloc(size_t(bytes)));
      if (!begin_) throw std::bad_alloc();
      size_ = bytes;
    }
    return begin_;
  }

 private:
  char* begin_ = nullptr;
  int64_t size_ = 0;
};

// The matrices of one task, each on a vector boundary.
class Arena {
 public:
  Arena(Memory& memory, int64_t bytes) : next_(memory.at_least(bytes + 64)) {
    next_ += (64 - reinterpret_cast<uintptr_t>(next_) % 64) % 64;
  }
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += Scratch::bytes_of<T>(count);
    return taken;
  }

 private:
  char* next_;
};

// The tasks of a pass that is cut so.
inline std::vector<Task> cut_tasks(const LoraParams& p, int64_t columns, const Cut& cut, bool without_rank) {
  if (cut.groups == 1) return column_tasks(p, columns, cut.chunk, without_rank);
  std::vector<Task> tasks;
  for (int64_t m = 0; m < p.rows; m += cut.rows) {
    tasks.push_back({p.adapters, m, std::min(m + cut.rows, p.rows), 0, columns});
  }
  return tasks;
}

// A small pass is done before a second thread has woken up.
inline Threads enough(const LoraParams& p, int64_t columns, const Threads& threads) {
  Threads some = threads;
  if (p.rows * columns * std::max<int64_t>(p.max_rank, 1) < 32768) some.count = 1;
  return some;
}

template <class Body>
void run(const Threads& threads, const std::vector<Task>& tasks, const Body& body) {
  parallel(threads, int64_t(tasks.size()), [&](int64_t begin, int64_t end) {
    Memory memory;
    for (int64_t i = begin; i < end; ++i) body(tasks[i], memory);
  });
}

}  // namespace lora
}  // namespace
}  // namespace trifuse::cpu
