// lora_adamw as a torch op: checks, views, registration. The schema and every check of the public arguments are in
// Python, in registration/, ops/ and optim/.
#include "trifuse/lora_adamw.h"

#include "common.h"

namespace trifuse {
namespace {

constexpr const char* kOp = "lora_adamw";

bool is_like(const Tensor& t, const Tensor& param, ScalarType dtype) {
  return t.numel() == param.numel() && t.is_contiguous() && t.scalar_type() == dtype;
}

LoraAdamwTensor tensor_of(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                          const Tensor& steps, int64_t rank_dim) {
  STD_TORCH_CHECK(rank_dim >= 0 && rank_dim < param.dim(), kOp, ": a rank_dim is not an axis of its parameter");
  LoraAdamwTensor t;
  t.dtype = dtype_of(param);
  const ScalarType acc = t.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(is_like(param, param, param.scalar_type()) && is_like(grad, param, param.scalar_type()) &&
                      is_like(exp_avg, param, acc) && is_like(exp_avg_sq, param, acc),
                  kOp, ": a gradient or a moment does not fit its parameter");
  t.outer = t.inner = 1;
  for (int64_t dim = 0; dim < rank_dim; ++dim) t.outer *= param.size(dim);
  t.ranks = param.size(rank_dim);
  for (int64_t dim = rank_dim + 1; dim < param.dim(); ++dim) t.inner *= param.size(dim);
  STD_TORCH_CHECK(steps.numel() == t.ranks && steps.is_contiguous() && steps.scalar_type() == ScalarType::Float, kOp,
                  ": steps must be (r,), of float32");
  t.param = param.data_ptr();
  t.grad = grad.data_ptr();
  t.exp_avg = exp_avg.data_ptr();
  t.exp_avg_sq = exp_avg_sq.data_ptr();
  t.steps = static_cast<float*>(steps.data_ptr());
  return t;
}

void lora_adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, std::vector<int64_t> rank_dims,
                std::vector<int64_t> first, std::vector<int64_t> last, std::vector<double> lrs, double beta1,
                double beta2, double eps, double weight_decay, bool maximize) {
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
                      steps.size() == count && rank_dims.size() == count && first.size() == count &&
                      last.size() == count && lrs.size() == count,
                  kOp, ": lists must be of one length");
  std::vector<LoraAdamwTensor> tensors;
  for (size_t i = 0; i < count; ++i) {
    tensors.push_back(tensor_of(params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], steps[i], rank_dims[i]));
    STD_TORCH_CHECK(0 <= first[i] && first[i] <= last[i] && last[i] <= tensors[i].ranks, kOp,
                    ": active ranks must lie in those of their parameter");
    tensors[i].first = first[i];
    tensors[i].last = last[i];
    tensors[i].lr = lrs[i];
  }
  if (count == 0) return;
  LoraAdamwParams p;
  p.tensors = tensors.data();
  p.count = int64_t(count);
  p.beta1 = beta1;
  p.beta2 = beta2;
  p.eps = eps;
  p.weight_decay = weight_decay;
  p.maximize = maximize;
#if defined(TRIFUSE_CUDA) || defined(TRIFUSE_EMULATED)
  const Tensor scratch = empty({cuda::lora_adamw_scratch_bytes(p)}, ScalarType::Byte, params[0]);
  check_launch(cuda::lora_adamw(p, scratch.data_ptr(), current_stream(params[0])), kOp);
#else
  cpu::lora_adamw(p, torch_threads());
#endif
}

TRIFUSE_IMPL(m) { m.impl("lora_adamw", TORCH_BOX(&lora_adamw)); }

}  // namespace
}  // namespace trifuse
