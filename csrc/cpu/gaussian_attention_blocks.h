// Blocks of keys and of queries of gaussian_attention as packed acc matrices, and the logits of a pair of them.
#pragma once

#include "gaussian_attention_plan.h"
#include "product.h"

namespace trifuse::cpu {
namespace {
namespace attention {

// Up to kKeys keys of one unit, zero beyond the last and where they are padding.
template <class T>
struct KeyBlock {
  static constexpr int64_t width = kKeys<T>;
  int64_t first = 0, count = 0;  // positions in the sequence
  bool has_padding = false;
  T* rows;               // (width, head_ld), less the mean key
  T* transposed;         // (head_ld, width)
  T* values;             // (width, value_ld)
  T* values_transposed;  // (value_ld, width), for the backward pass
  T* half_norm;          // (width): |k|^2 / 2
  T* position;           // (width)
  T* padding;            // (width): 0, or -inf where the key is padding

  static int64_t bytes(int64_t head_ld, int64_t value_ld) {
    return 2 * Scratch::bytes_of<T>(width * head_ld) + 2 * Scratch::bytes_of<T>(width * value_ld) +
           3 * Scratch::bytes_of<T>(width);
  }
  KeyBlock(Scratch& scratch, int64_t head_ld, int64_t value_ld)
      : rows(scratch.take<T>(width * head_ld)),
        transposed(scratch.take<T>(width * head_ld)),
        values(scratch.take<T>(width * value_ld)),
        values_transposed(scratch.take<T>(width * value_ld)),
        half_norm(scratch.take<T>(width)),
        position(scratch.take<T>(width)),
        padding(scratch.take<T>(width)) {}

  template <class S>
  void pack(const Problem<T, S>& problem, int64_t unit, int64_t block, bool backward) {
    const GaussianAttentionParams& p = problem.p;
    const Sequence& s = problem.sequence_of(unit);
    const int64_t h = problem.kv_head_of(unit), head_ld = problem.head_ld, value_ld = problem.value_ld;
    first = block * width;
    count = std::min(width, s.keys - first);
    load_centred<T, S>(rows, head_ld, p.k, at<S>(p.k, s.batch, h, s.k_begin + first), count, p.head_dim,
                       problem.mean(unit));
    load_centred<T, S>(values, value_ld, p.v, at<S>(p.v, s.batch, h, s.k_begin + first), count, p.value_dim, nullptr);
    std::fill(rows + count * head_ld, rows + width * head_ld, T(0));
    std::fill(values + count * value_ld, values + width * value_ld, T(0));
    has_padding = false;
    for (int64_t j = 0; j < width; ++j) {
      position[j] = T(first + j);
      padding[j] = T(0);
      if (j >= count || !problem.is_padding(s, first + j)) continue;
      has_padding = true;
      padding[j] = kNever<T>;
      std::fill(rows + j * head_ld, rows + (j + 1) * head_ld, T(0));
      std::fill(values + j * value_ld, values + (j + 1) * value_ld, T(0));
    }
    transpose_rows(transposed, width, rows, head_ld, width, head_ld);
    if (problem.rbf) find_half_norms(p.head_dim);
    if (backward) transpose_rows(values_transposed, width, values, value_ld, width, value_ld);
  }

 private:
  void find_half_norms(int64_t head_dim) {
    for (int64_t j = 0; j < width; j += kLanes<T>) {
      Vec<T> sum = splat(T(0));
      for (int64_t c = 0; c < head_dim; ++c) {
        const Vec<T> x = load<T>(transposed + c * width + j);
        sum += x * x;
      }
      store<T>(half_norm + j, sum * splat(T(0.5)));
    }
  }
};

// Neighbouring queries of one head.
template <class T>
struct QueryRows {
  int64_t first = 0, count = 0;  // positions in the sequence
  T* rows;                       // (capacity, head_ld), less the mean key
  T* half_norm;                  // (capacity): |q|^2 / 2
  T* center;                     // (capacity)
  T* weight;                     // (capacity): 1 / (2 sigma^2)

  static int64_t bytes(int64_t capacity, int64_t head_ld) {
    return Scratch::bytes_of<T>(capacity * head_ld) + 3 * Scratch::bytes_of<T>(capacity);
  }
  QueryRows(Scratch& scratch, int64_t capacity, int64_t head_ld)
      : rows(scratch.take<T>(capacity * head_ld)),
        half_norm(scratch.take<T>(capacity)),
        center(scratch.take<T>(capacity)),
        weight(scratch.take<T>(capacity)) {}

  template <class S>
  void pack(const Problem<T, S>& problem, int64_t unit, int64_t h, int64_t begin, int64_t n) {
    const Sequence& s = problem.sequence_of(unit);
    const int64_t head_ld = problem.head_ld;
    first = begin;
    count = n;
    load_centred<T, S>(rows, head_ld, problem.p.q, at<S>(problem.p.q, s.batch, h, s.q_begin + begin), n,
                       problem.p.head_dim, problem.mean(unit));
    for (int64_t r = 0; r < n; ++r) {
      if (problem.rbf || problem.window) half_norm[r] = dot(rows + r * head_ld, rows + r * head_ld, head_ld) / 2;
      if (!problem.window) continue;
      center[r] = problem.center(s, h, begin + r);
      weight[r] = problem.weight(s, h, begin + r);
    }
  }
};

template <class T, class M>
void add_mask_row(T* to, const M* mask, int64_t stride, int64_t n) {
  if (stride == 1) {
    for (int64_t j = 0; j < n; ++j) to[j] += scalar_as<T>(mask[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) to[j] += scalar_as<T>(mask[j * stride]);
  }
}
template <class T>
void add_mask_row(T* to, const bool* mask, int64_t stride, int64_t n) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t j = 0;
  if (stride == 1) {
    for (; j + lanes <= n; j += lanes) {
      typedef uint8_t Bytes __attribute__((vector_size(kLanes<T>)));
      Bytes bytes;
      __builtin_memcpy(&bytes, mask + j, sizeof bytes);
      const IVec<T> kept = __builtin_convertvector(bytes, IVec<T>) != 0;
      store<T>(to + j, (Vec<T>)((kept & (IVec<T>)load<T>(to + j)) | (~kept & (IVec<T>)splat(kNever<T>))));
    }
  }
  for (; j < n; ++j) to[j] = mask[j * stride] ? to[j] : kNever<T>;
}

// Whether logits of queries [first_row, ...) and these keys need a bias: a mask, padding, or the end of the keys.
template <class T, class S>
bool needs_bias(const Problem<T, S>& problem, int64_t first_row, const KeyBlock<T>& keys) {
  return problem.p.mask_kind != AttentionMask::kNone || keys.has_padding || keys.count < KeyBlock<T>::width ||
         (problem.p.is_causal && first_row < keys.first + keys.count - 1);
}

// What is added to the logits of queries [first_row, first_row + n), -inf where a pair takes no part; (n, width).
// False if none of the pairs does.
template <class T, class S>
bool fill_bias(T* bias, const Problem<T, S>& problem, int64_t unit, int64_t h, int64_t first_row, int64_t n,
               const KeyBlock<T>& keys) {
  const GaussianAttentionParams& p = problem.p;
  const Sequence& s = problem.sequence_of(unit);
  constexpr int64_t width = KeyBlock<T>::width;
  bool any = false;
  for (int64_t r = 0; r < n; ++r, bias += width) {
    const int64_t i = first_row + r;
    const int64_t end = p.is_causal ? std::clamp<int64_t>(i - keys.first + 1, 0, keys.count) : keys.count;
    std::copy(keys.padding, keys.padding + end, bias);
    std::fill(bias + end, bias + width, kNever<T>);
    if (p.mask_kind != AttentionMask::kNone && end > 0) {
      const int64_t offset = s.batch * p.mask.batch + h * p.mask.head + (s.q_begin + i) * p.mask.row +
                             (s.k_begin + keys.first) * p.mask.column;
      if (p.mask_kind == AttentionMask::kBool) {
        add_mask_row(bias, static_cast<const bool*>(p.mask.ptr) + offset, p.mask.column, end);
      } else {
        with_sequence_dtype(p.mask_dtype, [&](auto*, auto* type) {
          add_mask_row(bias, static_cast<decltype(type)>(p.mask.ptr) + offset, p.mask.column, end);
        });
      }
    }
    for (int64_t j = 0; j < end && !any; ++j) any = bias[j] != kNever<T>;
  }
  return any;
}

// exp(x) for x at most 80, zero where it would be subnormal.
template <class T>
TRIFUSE_INLINE Vec<T> exp_or_zero(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512 y = exp_avx512((__m512)x);
    return (Vec<T>)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ), y);
  }
#endif
  const IVec<T> under = x < splat(sizeof(T) == 4 ? T(-87.3) : T(-708));
  return (Vec<T>)(~under & (IVec<T>)exp_bounded<T>(x));
}

// x rounded to its type: both passes must see the same logits, and a product may not melt into a later sum in one of
// them.
template <class T>
TRIFUSE_INLINE Vec<T> rounded(Vec<T> x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// What makes logits of one query's products with a block of keys.
template <class T>
struct LogitTerms {
  T factor, half_norm, center, weight;
  const T* key_half_norm;
  const T* key_position;
  const T* bias;
};
template <class T>
struct Logit {
  Vec<T> value;
  Vec<T> content;  // -|q - k|^2 / 2
  Vec<T> offset;   // j - center
};
template <class T, bool kRbf, bool kWindow, bool kBias>
TRIFUSE_INLINE Logit<T> logit(const LogitTerms<T>& terms, Vec<T> product, int64_t column) {
  Logit<T> y;
  // The product alone is small, and summed exactly enough: the norms are added last.
  if constexpr (kRbf) product = (product - load<T>(terms.key_half_norm + column)) - splat(terms.half_norm);
  y.content = product;
  y.value = splat(terms.factor) * product;
  if constexpr (kWindow) {
    y.offset = load<T>(terms.key_position + column) - splat(terms.center);
    y.value = y.value - splat(terms.weight) * (y.offset * y.offset);
  }
  if constexpr (kBias) y.value = y.value + load<T>(terms.bias + column);
  y.value = rounded<T>(y.value);
  return y;
}

// Calls f with three constants of type bool.
template <class F>
void with_flags(bool a, bool b, bool c, F&& f) {
  using Yes = std::true_type;
  using No = std::false_type;
  const auto third = [&](auto x, auto y) { c ? f(x, y, Yes()) : f(x, y, No()); };
  const auto second = [&](auto x) { b ? third(x, Yes()) : third(x, No()); };
  a ? second(Yes()) : second(No());
}

}  // namespace attention
}  // namespace
}  // namespace trifuse::cpu
