// How the selective scan walks its data on a CPU: channels in vector lanes, time in tiles small enough
// for the cache, and tasks that own a range of channels of one batch item.
#pragma once

#include <cstdlib>
#include <new>

#include "isa.h"
#include "trifuse/selective_scan.h"
#include "trifuse/simd.h"

namespace trifuse::cpu {
namespace {

constexpr int64_t kMaxTile = 64;      // steps a tile buffer can hold, and the largest chunk_size
constexpr int64_t kForwardTile = 32;  // steps per tile when no chunk states are asked for
constexpr int64_t kMaxSpan = 512;     // steps that a forward task takes one block through before the next

// Aligned scratch that a task carves up. Arrays do not lie a multiple of 4096 bytes apart: their rows would
// share a set of the first cache, and a load from one would wait for a store to another.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : base_(static_cast<char*>(std::aligned_alloc(64, (bytes + kMaxArrays * (kGap + 64) + 63) & ~63))) {
    if (!base_) throw std::bad_alloc();
    next_ = base_;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(base_); }
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += ((count * int64_t(sizeof(T)) + 63) & ~int64_t(63)) + kGap;
    return p;
  }

 private:
  static constexpr int64_t kGap = 5 * 64, kMaxArrays = 64;
  char *base_, *next_;
};

inline int64_t gcd(int64_t a, int64_t b) { return b ? gcd(b, a % b) : a; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Splits the channels of one batch item into ranges. `shares` ranges share one group of B or C, and
// range i is share i % shares of it: that many partial sums of dB and dC are needed.
struct Partition {
  int64_t groups = 1, group_size = 0, shares = 1, bundles = 0, lanes = 1;

  Partition(const SelectiveScanParams& p, int64_t lanes_, int64_t wanted) : lanes(lanes_) {
    if (p.B.variable && p.C.variable) {
      groups = gcd(p.B.groups, p.C.groups);
    } else if (p.B.variable || p.C.variable) {
      groups = p.B.variable ? p.B.groups : p.C.groups;
    }
    group_size = p.dim / groups;
    wanted = most(wanted, 1);
    if (groups >= wanted) {
      bundles = wanted;
    } else {
      shares = least(divide_up(wanted, groups), most(divide_up(group_size, lanes), 1));
    }
  }
  int64_t count() const { return bundles ? bundles : groups * shares; }
  int64_t share(int64_t i) const { return bundles ? 0 : i % shares; }
  int64_t begin(int64_t i) const {
    if (bundles) return i * groups / bundles * group_size;
    return i / shares * group_size + cut(i % shares);
  }
  int64_t end(int64_t i) const {
    if (bundles) return (i + 1) * groups / bundles * group_size;
    return i / shares * group_size + cut(i % shares + 1);
  }

 private:
  int64_t cut(int64_t k) const {
    return k == shares ? group_size : least(divide_up(k * group_size / shares, lanes) * lanes, group_size);
  }
};

// The sequences in processing order: sequence k covers steps [first_step, last_step).
struct Sequence {
  int64_t index, first_step, last_step;
};
inline int64_t sequence_count(const SelectiveScanParams& p) { return p.cu_seqlens ? p.num_seqs : 1; }
inline Sequence sequence(const SelectiveScanParams& p, int64_t b, int64_t k) {
  if (!p.cu_seqlens) return {b, 0, p.seqlen};
  if (!p.reverse) return {k, p.cu_seqlens[k], p.cu_seqlens[k + 1]};
  const int64_t index = p.num_seqs - 1 - k;
  return {index, p.seqlen - p.cu_seqlens[index + 1], p.seqlen - p.cu_seqlens[index]};
}

// Consecutive steps of one sequence inside one chunk, at consecutive positions from `position` up.
struct Tile {
  int64_t step, count, position;
  bool reverse;
  // The row of the tile's buffers that its s-th step uses: rows lie in the order of positions.
  int64_t row(int64_t s) const { return reverse ? count - 1 - s : s; }
};
inline int64_t tile_steps(const SelectiveScanParams& p) { return p.chunk_size ? p.chunk_size : kForwardTile; }
inline Tile tile_at(const SelectiveScanParams& p, int64_t step, int64_t limit) {
  const int64_t size = tile_steps(p);
  const int64_t end = least(limit, step - step % size + size);
  return {step, end - step, p.reverse ? p.seqlen - end : step, p.reverse};
}

// Consecutive steps of one sequence and the consecutive positions they read.
inline Tile span_at(const SelectiveScanParams& p, int64_t step, int64_t end) {
  return {step, end - step, p.reverse ? p.seqlen - end : step, p.reverse};
}

// Channels [first, first + width) in one vector; all of them read the same groups of B and C.
struct Block {
  int64_t first, width;
};
inline int64_t group_of(const CoefView& c, int64_t dim, int64_t channel) {
  return c.variable ? channel / (dim / c.groups) : 0;
}
inline Block block_at(const SelectiveScanParams& p, int64_t channel, int64_t end, int64_t lanes) {
  int64_t stop = least(channel + lanes, end);
  for (const CoefView* c : {&p.B, &p.C}) {
    if (c->variable) stop = least(stop, (group_of(*c, p.dim, channel) + 1) * (p.dim / c->groups));
  }
  return {channel, stop - channel};
}
inline int64_t block_count(const SelectiveScanParams& p, int64_t begin, int64_t end, int64_t lanes) {
  int64_t n = 0;
  for (int64_t c = begin; c < end; ++n) c += block_at(p, c, end, lanes).width;
  return n;
}

// rows[t][lane] = sequence[b, first + lane, position + t]; lanes past the width are zero.
template <class T, class S>
void load_tile(const SeqView& view, int64_t b, Block block, const Tile& tile, T* rows) {
  constexpr int64_t lanes = kLanes<T>;
  const S* base = static_cast<const S*>(view.ptr) + b * view.batch + block.first * view.dim + tile.position * view.time;
  if (block.width == lanes && view.dim == 1) {
    for (int64_t t = 0; t < tile.count; ++t) store<T>(rows + t * lanes, load_as<T, S>(base + t * view.time));
    return;
  }
  int64_t t = 0;
  if (block.width == lanes && view.time == 1) {
    for (; t + lanes <= tile.count; t += lanes) {
      Vec<T> v[lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) v[i] = load_as<T, S>(base + i * view.dim + t);
      transpose<T>(v);
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) store<T>(rows + (t + i) * lanes, v[i]);
    }
  }
  for (; t < tile.count; ++t) {
    for (int64_t i = 0; i < block.width; ++i) rows[t * lanes + i] = scalar_as<T, S>(base[i * view.dim + t * view.time]);
    for (int64_t i = block.width; i < lanes; ++i) rows[t * lanes + i] = 0;
  }
}

// Asks the cache, line by line beside a long computation, for what comes after it: rows of a tile lie
// too far apart for the hardware to guess, and asking for all of them at once would stall. Every stream
// walks the same grid of lines, `inner` of them `near` bytes apart and then a jump to the next row.
template <int kStreams>
class Ahead {
 public:
  Ahead() { clear(); }
  void clear() {
    inner_ = 1;
    at_ = left_ = 0;
    for (int i = 0; i < kStreams; ++i) {
      next_[i] = reinterpret_cast<const char*>(this);
      near_[i] = jump_[i] = 0;
    }
  }

  // Time contiguous: the block's rows of a tile.
  template <class S>
  void aim_at_tile(int stream, const SeqView& view, int64_t b, Block block, const Tile& tile) {
    if (!view.ptr || view.time != 1 || tile.count <= 0) return;
    const S* first = static_cast<const S*>(view.ptr) + b * view.batch + block.first * view.dim + tile.position;
    const int64_t lines = tile.count * int64_t(sizeof(S)) / 64 + 1;
    aim(stream, first, block.width, view.dim * int64_t(sizeof(S)), 64, 0, lines * block.width);
  }

  // Channels contiguous: shares i .. i + count of `shares` of channels [begin, end) of a tile. Line after
  // line along a row: every page is asked for once.
  template <class S>
  void aim_at_rows(int stream, const SeqView& view, int64_t b, int64_t begin, int64_t end, const Tile& tile, int64_t i,
                   int64_t count, int64_t shares) {
    if (!view.ptr || view.dim != 1 || tile.count <= 0) return;
    const S* first = static_cast<const S*>(view.ptr) + b * view.batch + tile.position * view.time + begin;
    const int64_t lines = divide_up((end - begin) * int64_t(sizeof(S)), 64);
    const int64_t from = i * tile.count * lines / shares, to = (i + count) * tile.count * lines / shares;
    aim(stream, first, lines, 64, view.time * int64_t(sizeof(S)), from, to - from);
  }

  TRIFUSE_INLINE void step() {
    if (left_ <= 0) return;
    --left_;
    const bool wrap = ++at_ >= inner_;
#pragma GCC unroll 8
    for (int i = 0; i < kStreams; ++i) {
      const char* line = next_[i];
      __builtin_prefetch(line, 0, 2);
      line += near_[i];
      asm("" : "+r"(line));  // pointers kept in vectors would take the ports that the scan needs
      next_[i] = line;
    }
    if (wrap) {
      at_ = 0;
#pragma GCC unroll 8
      for (int i = 0; i < kStreams; ++i) next_[i] += jump_[i];
    }
  }

 private:
  void aim(int stream, const void* first, int64_t inner, int64_t near, int64_t far, int64_t from, int64_t lines) {
    left_ = lines;
    inner_ = inner;
    at_ = from % inner;
    next_[stream] = static_cast<const char*>(first) + from / inner * far + at_ * near;
    near_[stream] = near;
    jump_[stream] = far - inner * near;
  }
  const char* next_[kStreams];
  int64_t near_[kStreams], jump_[kStreams], inner_, at_, left_;
};

template <class T, class S>
void store_tile(const SeqView& view, int64_t b, Block block, const Tile& tile, const T* rows) {
  constexpr int64_t lanes = kLanes<T>;
  S* base = static_cast<S*>(view.ptr) + b * view.batch + block.first * view.dim + tile.position * view.time;
  if (block.width == lanes && view.dim == 1) {
    for (int64_t t = 0; t < tile.count; ++t) store_as<T, S>(base + t * view.time, load<T>(rows + t * lanes));
    return;
  }
  int64_t t = 0;
  if (block.width == lanes && view.time == 1) {
    for (; t + lanes <= tile.count; t += lanes) {
      Vec<T> v[lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) v[i] = load<T>(rows + (t + i) * lanes);
      transpose<T>(v);
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) store_as<T, S>(base + i * view.dim + t, v[i]);
    }
  }
  for (; t < tile.count; ++t) {
    for (int64_t i = 0; i < block.width; ++i) {
      base[i * view.dim + t * view.time] = scalar_from<S, T>(rows[t * lanes + i]);
    }
  }
}

// values[t][n] = B or C[b, group, n, position + t], for a variable coefficient. Complex ones are
// stored in the accumulation dtype, so they come as twice as many numbers with a unit inner stride.
template <class T, class S>
void load_coefficient(const SelectiveScanParams& p, const CoefView& view, int64_t b, int64_t group, const Tile& tile,
                      T* values) {
  const int64_t n = p.dstate;
  if (p.complex) {
    const T* base =
        static_cast<const T*>(view.ptr) + 2 * (b * view.batch + group * view.group + tile.position * view.time);
    for (int64_t t = 0; t < tile.count; ++t) {
      for (int64_t i = 0; i < n; ++i) {
        const T* z = base + 2 * (t * view.time + i * view.state);
        values[2 * (t * n + i)] = z[0];
        values[2 * (t * n + i) + 1] = z[1];
      }
    }
    return;
  }
  const S* base = static_cast<const S*>(view.ptr) + b * view.batch + group * view.group + tile.position * view.time;
  if (view.state == 1) {
    for (int64_t t = 0; t < tile.count; ++t) {
      for (int64_t i = 0; i < n; ++i) values[t * n + i] = scalar_as<T, S>(base[t * view.time + i]);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t t = 0; t < tile.count; ++t) {
        values[t * n + i] = scalar_as<T, S>(base[i * view.state + t * view.time]);
      }
    }
  }
}

// Per-channel rows (dim, count) into lanes[i][lane] and back, for `count` numbers a channel.
template <class T>
void load_lanes(const T* source, int64_t count, Block block, T* lanes_out) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < lanes; ++j) {
      lanes_out[i * lanes + j] = j < block.width ? source[(block.first + j) * count + i] : T(0);
    }
  }
}
template <class T>
void store_lanes(T* target, int64_t count, Block block, const T* lanes_in) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t j = 0; j < block.width; ++j) {
    for (int64_t i = 0; i < count; ++i) target[(block.first + j) * count + i] = lanes_in[i * lanes + j];
  }
}

template <class T>
TRIFUSE_INLINE Vec<T> load_channels(const void* source, Block block, T missing) {
  Vec<T> v = splat(missing);
  if (!source) return v;
  const T* values = static_cast<const T*>(source) + block.first;
  if (block.width == kLanes<T>) return load<T>(values);
  for (int64_t j = 0; j < block.width; ++j) v[j] = values[j];
  return v;
}

// States live in lanes as planes[n][lane], or re and im planes [n][2][lane]; in memory as (dim, n) of
// numbers or interleaved pairs, which is the same order of planes per channel.
template <class T>
void load_state(const SelectiveScanParams& p, const void* states, int64_t row, Block block, T* planes) {
  const int64_t count = p.dstate * (p.complex ? 2 : 1);
  if (!states) {
    for (int64_t i = 0; i < count * kLanes<T>; ++i) planes[i] = 0;
  } else {
    load_lanes<T>(static_cast<const T*>(states) + row * p.dim * count, count, block, planes);
  }
}
template <class T>
void store_state(const SelectiveScanParams& p, void* states, int64_t row, Block block, const T* planes) {
  const int64_t count = p.dstate * (p.complex ? 2 : 1);
  store_lanes<T>(static_cast<T*>(states) + row * p.dim * count, count, block, planes);
}

// chunk_states[b][chunk] is (dstate, dim): channels are neighbours, as they are in lanes.
template <class T>
T* chunk_state(const SelectiveScanParams& p, int64_t b, int64_t chunk) {
  const int64_t planes = p.complex ? 2 : 1;
  return static_cast<T*>(p.chunk_states) + (b * p.n_chunks + chunk) * p.dstate * p.dim * planes;
}
template <class T>
void save_chunk_state(const SelectiveScanParams& p, T* chunk, Block block, const T* planes) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t k = p.complex ? 2 : 1;
  for (int64_t n = 0; n < p.dstate; ++n) {
    T* out = chunk + (n * p.dim + block.first) * k;
    if (k == 1 && block.width == lanes) {
      store<T>(out, load<T>(planes + n * lanes));
    } else {
      for (int64_t j = 0; j < block.width; ++j) {
        for (int64_t i = 0; i < k; ++i) out[j * k + i] = planes[(n * k + i) * lanes + j];
      }
    }
  }
}
template <class T>
void load_chunk_state(const SelectiveScanParams& p, const T* chunk, Block block, T* planes) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t k = p.complex ? 2 : 1;
  for (int64_t n = 0; n < p.dstate; ++n) {
    const T* in = chunk + (n * p.dim + block.first) * k;
    for (int64_t i = 0; i < k; ++i) {
      T* plane = planes + (n * k + i) * lanes;
      if (k == 1 && block.width == lanes) {
        store<T>(plane, load<T>(in));
      } else {
        for (int64_t j = 0; j < lanes; ++j) plane[j] = j < block.width ? in[j * k + i] : T(0);
      }
    }
  }
}

// A in lanes, its real part clamped for exp2_product.
template <class T>
void load_rates(const SelectiveScanParams& p, Block block, T* rates) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t k = p.complex ? 2 : 1;
  load_lanes<T>(static_cast<const T*>(p.A), p.dstate * k, block, rates);
  for (int64_t n = 0; n < p.dstate; ++n) {
    T* plane = rates + n * k * lanes;
    store<T>(plane, at_most<T>(at_least<T>(load<T>(plane), -kFactorLimit<T>), kFactorLimit<T>));
  }
}

// exp(elapsed * A) for the lanes of a block, per state: what a stretch of time leaves of the state
// before it. In double: an angle of many turns must not lose its fraction.
template <class T>
void stretch_decay(const SelectiveScanParams& p, const double* elapsed, const T* rates, bool conjugate, T* planes) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t k = p.complex ? 2 : 1;
  for (int64_t n = 0; n < p.dstate; ++n) {
    for (int64_t j = 0; j < lanes; ++j) {
      const double size = std::exp(elapsed[j] * double(rates[n * k * lanes + j]));
      const double angle = p.complex ? elapsed[j] * double(rates[(n * k + 1) * lanes + j]) : 0;
      planes[n * k * lanes + j] = T(p.complex ? size * std::cos(angle) : size);
      if (p.complex) planes[(n * k + 1) * lanes + j] = T(size * std::sin(conjugate ? -angle : angle));
    }
  }
}

}  // namespace
}  // namespace trifuse::cpu
