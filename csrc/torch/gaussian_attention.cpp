// gaussian_attention as torch ops: allocation, views, registration, for the CPU alone: on CUDA tensors it is Triton's.
#if !defined(TRIFUSE_CUDA) && !defined(TRIFUSE_EMULATED)

#include "trifuse/gaussian_attention.h"

#include "common.h"

namespace trifuse {
namespace {

AttentionView view(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.dim() > 3 ? t.stride(3) : 0};
}
AttentionView view(const OptionalTensor& t) { return t ? view(*t) : AttentionView(); }

Tensor like(const Tensor& t) { return empty({t.sizes().begin(), t.sizes().end()}, t.scalar_type(), t); }

struct Inputs {
  Tensor q, k, v;
  OptionalTensor gamma, center, sigma, attn_mask, key_padding_mask, cu_seqlens_q, cu_seqlens_k;
  double scale;
  bool is_causal, normalized;

  ScalarType acc() const { return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

  void fill(GaussianAttentionParams& p) const {
    p.batch = q.size(0);
    p.heads = q.size(1);
    p.kv_heads = k.size(1);
    p.queries = q.size(2);
    p.keys = k.size(2);
    p.head_dim = q.size(3);
    p.value_dim = v.size(3);
    p.dtype = dtype_of(q);
    p.scale = scale;
    p.is_causal = is_causal;
    p.normalized = normalized;
    p.q = view(q);
    p.k = view(k);
    p.v = view(v);
    p.gamma = pointer(gamma);
    p.center = view(center);
    p.sigma = view(sigma);
    if (attn_mask) {
      p.mask = view(*attn_mask);
      const bool kept = attn_mask->scalar_type() == ScalarType::Bool;
      p.mask_kind = kept ? AttentionMask::kBool : AttentionMask::kAdded;
      if (!kept) p.mask_dtype = dtype_of(*attn_mask);
    }
    if (key_padding_mask) {
      p.padding = static_cast<const bool*>(key_padding_mask->data_ptr());
      p.padding_batch = key_padding_mask->stride(0);
      p.padding_key = key_padding_mask->stride(1);
    }
    p.cu_seqlens_q = static_cast<const int64_t*>(pointer(cu_seqlens_q));
    p.cu_seqlens_k = cu_seqlens_k ? static_cast<const int64_t*>(pointer(cu_seqlens_k)) : p.cu_seqlens_q;
    p.num_seqs = cu_seqlens_q ? cu_seqlens_q->size(0) - 1 : 0;
    check(p);
  }

 private:
  // Traced code reaches this without the checks in Python, and these would read past an end.
  void check(const GaussianAttentionParams& p) const {
    STD_TORCH_CHECK(p.kv_heads > 0 ? p.heads % p.kv_heads == 0 : p.heads == 0, "gaussian_attention: k has ", p.kv_heads,
                    " heads; they must divide the ", p.heads, " of q");
    STD_TORCH_CHECK(v.size(1) == p.kv_heads && v.size(2) == p.keys && k.size(3) == p.head_dim && k.size(0) == p.batch &&
                        v.size(0) == p.batch,
                    "gaussian_attention: k and v must have the batch, the heads and the keys of each other, and k the "
                    "head size of q");
    STD_TORCH_CHECK(!center || sigma, "gaussian_attention: center needs sigma");
    check_offsets(p, p.cu_seqlens_q, p.queries, "cu_seqlens_q", "L");
    check_offsets(p, p.cu_seqlens_k, p.keys, cu_seqlens_k ? "cu_seqlens_k" : "cu_seqlens_q", "S");
    STD_TORCH_CHECK(!cu_seqlens_k || (cu_seqlens_q && cu_seqlens_k->size(0) == p.num_seqs + 1),
                    "gaussian_attention: cu_seqlens_k must have as many numbers as cu_seqlens_q");
  }
  static void check_offsets(const GaussianAttentionParams& p, const int64_t* offsets, int64_t length, const char* name,
                            const char* size) {
    if (!offsets) return;
    bool good = p.batch == 1 && p.num_seqs >= 0 && offsets[0] == 0 && offsets[p.num_seqs] == length;
    for (int64_t i = 0; good && i < p.num_seqs; ++i) good = offsets[i] <= offsets[i + 1];
    STD_TORCH_CHECK(good, "gaussian_attention: ", name, " must start at 0, never decrease and end at ", size, " = ",
                    length, ", of a batch of one");
  }
};

std::tuple<Tensor, Tensor, Tensor> gaussian_attention_fwd(Tensor q, Tensor k, Tensor v, OptionalTensor gamma,
                                                          OptionalTensor center, OptionalTensor sigma,
                                                          OptionalTensor attn_mask, OptionalTensor key_padding_mask,
                                                          OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                                          double scale, bool is_causal, bool normalized) {
  const Inputs in{
      q,     k,         v,         gamma, center, sigma, attn_mask, key_padding_mask, cu_seqlens_q, cu_seqlens_k,
      scale, is_causal, normalized};
  GaussianAttentionParams p;
  in.fill(p);
  const Tensor out = empty({p.batch, p.heads, p.queries, p.value_dim}, q.scalar_type(), q);
  const Tensor lse = empty({p.batch, p.heads, p.queries}, in.acc(), q);
  p.out = view(out);
  const Tensor lse_rest = like(lse);
  p.lse = lse.data_ptr();
  p.lse_rest = lse_rest.data_ptr();
  cpu::gaussian_attention_fwd(p, torch_threads());
  return {out, lse, lse_rest};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gaussian_attention_bwd(
    Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, OptionalTensor gamma, OptionalTensor center,
    OptionalTensor sigma, OptionalTensor attn_mask, OptionalTensor key_padding_mask, OptionalTensor cu_seqlens_q,
    OptionalTensor cu_seqlens_k, Tensor out, Tensor lse, Tensor lse_rest, double scale, bool is_causal,
    bool normalized) {
  const Inputs in{
      q,     k,         v,         gamma, center, sigma, attn_mask, key_padding_mask, cu_seqlens_q, cu_seqlens_k,
      scale, is_causal, normalized};
  GaussianAttentionBwdParams p;
  in.fill(p);
  out = torch::stable::contiguous(out);
  lse = torch::stable::contiguous(lse);
  lse_rest = torch::stable::contiguous(lse_rest);
  p.out = view(out);
  p.lse = lse.data_ptr();
  p.lse_rest = lse_rest.data_ptr();
  p.dout = view(dout);
  p.dlse = view(dlse);

  const std::vector<int64_t> rows{p.batch, p.heads, p.queries}, none{0};
  const Tensor dq = like(q), dk = like(k), dv = like(v);
  const Tensor dgamma = empty(gamma ? std::vector<int64_t>{p.heads} : none, in.acc(), q);
  const Tensor dcenter = empty(center ? rows : none, in.acc(), q), dsigma = empty(sigma ? rows : none, in.acc(), q);
  p.dq = dq.data_ptr();
  p.dk = dk.data_ptr();
  p.dv = dv.data_ptr();
  if (gamma) p.dgamma = dgamma.data_ptr();
  if (center) p.dcenter = dcenter.data_ptr();
  if (sigma) p.dsigma = dsigma.data_ptr();
  cpu::gaussian_attention_bwd(p, torch_threads());
  return {dq, dk, dv, dgamma, dcenter, dsigma};
}

TRIFUSE_IMPL(m) {
  m.impl("gaussian_attention_fwd", TORCH_BOX(&gaussian_attention_fwd));
  m.impl("gaussian_attention_bwd", TORCH_BOX(&gaussian_attention_bwd));
}

}  // namespace
}  // namespace trifuse

#endif
