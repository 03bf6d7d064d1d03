// What every task of the causal convolution reads: the weights with one row per tap, and, because sequences
// may be packed, which taps count at which position and which inputs are a sequence's last.
#pragma once

#include <cstdint>
#include <cstring>

#include "bfloat16.h"
#include "isa.h"
#include "trifuse/causal_conv1d.h"
#include "trifuse/simd.h"

namespace trifuse::cpu {
namespace {

constexpr int kMaxWidth = 8;
constexpr int64_t kPadding = 64;  // bytes after a row of tap sets, all zero: a vector may read past the last position

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One packed sequence, or one batch item: its positions [start, stop), and its final inputs: those at
// [first, end), and left of `start` the initial states if `from_left`.
struct Span {
  int64_t start, stop, first, end;
  bool from_left;
};

template <class T>
struct Plan {
  T* taps;            // (width, dim): what the input k positions earlier is multiplied by, for k = 0 ..
  T* bias;            // (dim), zero without one
  uint8_t* own;       // bit k: tap k reads x; padding has no bit at all. One row for all items without seq_idx.
  uint8_t* left;      // bit k: tap k reads an initial state
  Span* spans;        // rows()
  T* partials;        // backward: (batch, pieces, width + 1, dim)
  int64_t row_bytes;  // from one row of tap sets to the next
  uint8_t full;
  int64_t bytes;

  // `pieces`: of time, whose sums for the gradient of the weights are kept apart; 0 in the forward pass.
  Plan(const CausalConv1dParams& p, int64_t pieces) {
    char* next = static_cast<char*>(p.workspace);
    const auto take = [&](int64_t size) {
      char* at = next;
      next += (size + 63) & ~int64_t(63);
      return at;
    };
    taps = reinterpret_cast<T*>(take(p.width * p.dim * int64_t(sizeof(T))));
    bias = reinterpret_cast<T*>(take(p.dim * int64_t(sizeof(T))));
    const int64_t row = p.seqlen + kPadding, rows = p.seq_idx ? p.batch : 1;
    own = reinterpret_cast<uint8_t*>(take(rows * row));
    left = reinterpret_cast<uint8_t*>(take(rows * row));
    spans = reinterpret_cast<Span*>(take(p.rows() * int64_t(sizeof(Span))));
    partials = reinterpret_cast<T*>(take(p.batch * pieces * (p.width + 1) * p.dim * int64_t(sizeof(T))));
    row_bytes = p.seq_idx ? row : 0;
    full = uint8_t((1 << p.width) - 1);
    bytes = next - static_cast<char*>(p.workspace);
  }

  const uint8_t* own_row(int64_t b) const { return own + b * row_bytes; }
  const uint8_t* left_row(int64_t b) const { return left + b * row_bytes; }
  T* partial(const CausalConv1dParams& p, int64_t b, int64_t pieces, int64_t piece) const {
    return partials + (b * pieces + piece) * (p.width + 1) * p.dim;
  }

  void fill(const CausalConv1dParams& p, const Threads& threads) const {
    const T *weight = static_cast<const T*>(p.weight), *bias_in = static_cast<const T*>(p.bias);
    for (int64_t d = 0; d < p.dim; ++d) {
      for (int64_t k = 0; k < p.width; ++k) taps[k * p.dim + d] = weight[d * p.width + p.width - 1 - k];
      bias[d] = bias_in ? bias_in[d] : T(0);
    }
    for (int64_t row = 0; row < p.rows(); ++row) spans[row] = span(p, row);
    if (p.batch == 0) return;
    const int64_t rows = p.seq_idx ? p.batch : 1;
    const auto run = [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) fill_row(p, b);
    };
    if (p.seqlen * rows < (1 << 16)) {
      run(0, rows);
    } else {
      parallel(threads, rows, run);
    }
  }

 private:
  static Span span(const CausalConv1dParams& p, int64_t row) {
    Span s{0, p.seqlen, 0, 0, true};
    if (p.cu_seqlens) {
      s.start = p.cu_seqlens[row];
      s.stop = p.cu_seqlens[row + 1];
    }
    s.end = s.stop;
    const int32_t* ids = p.seq_idx ? p.seq_idx + (p.cu_seqlens ? 0 : row * p.seqlen) : nullptr;
    while (ids && s.end > s.start && ids[s.end - 1] < 0) --s.end;
    const int64_t reach = most(s.start, s.end - (p.width - 1));
    s.first = ids ? s.end : reach;
    while (s.first > reach && ids[s.first - 1] == ids[s.end - 1]) --s.first;
    s.from_left = s.first == s.start;
    return s;
  }

  void fill_row(const CausalConv1dParams& p, int64_t b) const {
    uint8_t *own_bits = own + b * row_bytes, *left_bits = left + b * row_bytes;
    std::memset(own_bits, full, p.seqlen);
    std::memset(own_bits + p.seqlen, 0, kPadding);
    std::memset(left_bits, 0, p.seqlen + kPadding);
    const int32_t* ids = p.seq_idx ? p.seq_idx + b * p.seqlen : nullptr;
    const int64_t first = p.cu_seqlens ? 0 : b, last = p.cu_seqlens ? p.num_seqs : b + 1;
    for (int64_t row = first; row < last; ++row) {
      const Span& s = spans[row];
      for (int64_t t = s.start; t < least(s.stop, s.start + p.width - 1); ++t) {
        own_bits[t] = uint8_t((2 << (t - s.start)) - 1);
        if (p.initial_states) left_bits[t] = uint8_t(full & ~own_bits[t]);
      }
      if (ids) mask_ids(p, s, ids, own_bits, left_bits);
    }
  }

  void mask_ids(const CausalConv1dParams& p, const Span& s, const int32_t* ids, uint8_t* own_bits,
                uint8_t* left_bits) const {
    bool unbroken = true;
    for (int64_t t = s.start; t < s.stop; ++t) {
      unbroken = unbroken && ids[t] == ids[s.start];
      if (ids[t] < 0) {
        own_bits[t] = left_bits[t] = 0;
        continue;
      }
      if (!unbroken) left_bits[t] = 0;
      for (int64_t k = 1; k < p.width && t - k >= s.start; ++k) {
        if (ids[t - k] != ids[t]) own_bits[t] &= uint8_t(~(1 << k));
      }
    }
  }
};

// The row of states that position t of batch item b belongs to.
inline int64_t row_of(const CausalConv1dParams& p, int64_t b, int64_t t) {
  if (!p.cu_seqlens) return b;
  int64_t low = 0, high = p.num_seqs;  // cu_seqlens[low] <= t < cu_seqlens[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.cu_seqlens[middle] <= t ? low : high) = middle;
  }
  return low;
}

// The element of (rows, dim, width - 1) states.
template <class S>
TRIFUSE_INLINE S* state_at(const CausalConv1dParams& p, const void* states, int64_t row, int64_t channel, int64_t j) {
  return static_cast<S*>(const_cast<void*>(states)) + (row * p.dim + channel) * (p.width - 1) + j;
}
template <class S>
TRIFUSE_INLINE S* at(const SeqView& v, int64_t b, int64_t channel, int64_t t) {
  return static_cast<S*>(v.ptr) + b * v.batch + channel * v.dim + t * v.time;
}

// `count` numbers a stride apart; the lanes behind them are zero.
template <class T, class S>
TRIFUSE_INLINE Vec<T> load_some(const S* p, int64_t stride, int64_t count) {
  if (stride == 1 && count == kLanes<T>) return load_sequence<T, S>(p);
  Vec<T> v = splat(T(0));
  for (int64_t i = 0; i < count; ++i) v[i] = scalar_as<T, S>(p[i * stride]);
  return v;
}
template <class S, class T>
TRIFUSE_INLINE void store_some(S* p, Vec<T> v, int64_t stride, int64_t count) {
  if (stride == 1 && count == kLanes<T>) return store_sequence<S, T>(p, v);
  for (int64_t i = 0; i < count; ++i) p[i * stride] = scalar_from<S, T>(v[i]);
}

// sigmoid(z); where z is NaN it may be anything, as long as z is a factor of the result.
template <class T>
TRIFUSE_INLINE Vec<T> sigmoid_beside(Vec<T> z) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    // Both bounds by one instruction: the smaller of |z| and 85.9, with the sign of z.
    const __m512 c = _mm512_range_ps((__m512)z, _mm512_set1_ps(85.9f), 2);
    const __m512 t = _mm512_fmadd_ps(c, _mm512_set1_ps(float(-kLog2e)), _mm512_set1_ps(kSixteenths));
    const __m512 s = _mm512_sub_ps(t, _mm512_set1_ps(kSixteenths));
    const __m512 r = _mm512_fmadd_ps(s, _mm512_set1_ps(float(kLn2)), c);  // minus the rest of the exponent
    return reciprocal<T>(splat(T(1)) + (Vec<T>)assemble_avx512(t, s, r, -1.0f, 0.5f, float(-1.0 / 6)));
  }
#endif
  return sigmoid<T>(z);
}
// The bound: sigmoid does not fall below 5e-38, which a very negative z would make visible.
template <class T>
TRIFUSE_INLINE Vec<T> silu(Vec<T> z) {
  return at_least<T>(z, T(-1000)) * sigmoid_beside<T>(z);
}
template <class T>
TRIFUSE_INLINE Vec<T> silu_slope(Vec<T> z) {
  const Vec<T> s = sigmoid_beside<T>(z), one = splat(T(1));
  return s * (one + at_least<T>(z, T(-1000)) * (one - s));
}

// Numbers below which waking threads costs more than it saves.
constexpr int64_t kWorthThreads = 1 << 15;

template <class Body>
void share(const CausalConv1dParams& p, const Threads& threads, int64_t tasks, const Body& body) {
  if (p.batch * p.dim * p.seqlen < kWorthThreads) {
    if (tasks > 0) body(int64_t(0), tasks);
  } else {
    parallel(threads, tasks, body);
  }
}

}  // namespace
}  // namespace trifuse::cpu
