// Validation and dispatch of mem1_logit_rows.
#include "ppo_loss/rows.h"

#include "common/check.h"

#include <cfloat>

namespace mem1::ppo_loss {
namespace {

mem1_status validate_ppo(const mem1_logit_rows_params& p, mem1_error* error) {
  MEM1_CHECK(p.old_logprob != nullptr && p.advantage != nullptr && p.scale != nullptr, error,
             "old_logprob, advantage, scale: expected pointers, got NULL");
  MEM1_CHECK(p.loss != nullptr && p.ratio != nullptr && p.clipped != nullptr, error,
             "loss, ratio, clipped: expected pointers, got NULL");
  MEM1_CHECK((p.ref_logprob == nullptr) == (p.kl == nullptr), error,
             "ref_logprob, kl: expected both or neither, got one of them");
  MEM1_CHECK(p.kl_estimator >= MEM1_KL_K1 && p.kl_estimator <= MEM1_KL_K3, error,
             "kl_estimator: expected a mem1_kl_estimator, got %d", static_cast<int>(p.kl_estimator));
  MEM1_CHECK(p.kl_coef == 0 || p.ref_logprob != nullptr, error, "ref_logprob: expected a pointer for kl_coef = %g",
             p.kl_coef);
  MEM1_CHECK(p.clip_low >= 0 && p.clip_low <= 1 && p.clip_high >= 0, error,
             "clip_low, clip_high: expected 0 to 1 and >= 0, got %g, %g", p.clip_low, p.clip_high);
  MEM1_CHECK(p.dual_clip == 0 || p.dual_clip > 1, error, "dual_clip: expected 0 for none, or > 1, got %g", p.dual_clip);
  MEM1_CHECK(p.rollout_logprob == nullptr || p.rollout_is_cap > 0, error, "rollout_is_cap: expected > 0, got %g",
             p.rollout_is_cap);
  return MEM1_OK;
}

mem1_status validate(const mem1_logit_rows_params* params, mem1_error* error) {
  MEM1_CHECK_PARAMS(params, mem1_logit_rows_params, error);
  const mem1_logit_rows_params& p = *params;
  MEM1_CHECK(p.task >= MEM1_ROWS_LOGPROB && p.task <= MEM1_ROWS_PPO_LOSS, error,
             "task: expected a mem1_rows_task, got %d", static_cast<int>(p.task));
  MEM1_CHECK(p.dtype == MEM1_FLOAT32 || p.dtype == MEM1_FLOAT64, error,
             "dtype: expected MEM1_FLOAT32 or MEM1_FLOAT64, got %d", static_cast<int>(p.dtype));
  const bool narrow = p.dtype == MEM1_FLOAT32 && (p.gradient_dtype == MEM1_BFLOAT16 ||
                                                  (p.gradient_dtype == MEM1_FLOAT16 && p.device == MEM1_CUDA));
  MEM1_CHECK(p.gradient_dtype == p.dtype || narrow, error,
             "gradient_dtype: expected dtype (for MEM1_FLOAT32 also MEM1_BFLOAT16, on CUDA MEM1_FLOAT16), got %d",
             static_cast<int>(p.gradient_dtype));
  MEM1_CHECK(p.with_gradient == 0 || p.with_gradient == 1, error, "with_gradient: expected 0 or 1, got %d",
             p.with_gradient);
  MEM1_CHECK(p.rows >= 0 && p.rows <= INT32_MAX, error, "rows: expected 0 to 2^31 - 1, got %lld",
             static_cast<long long>(p.rows));
  MEM1_CHECK(p.vocabulary >= 1, error, "vocabulary: expected >= 1, got %lld", static_cast<long long>(p.vocabulary));
  if (p.rows == 0) return MEM1_OK;
  MEM1_CHECK(p.logits != nullptr && p.target != nullptr && p.temperature != nullptr, error,
             "logits, target, temperature: expected pointers, got NULL");
  MEM1_CHECK(p.stride_row >= p.vocabulary || p.rows == 1, error,
             "stride_row: expected at least the vocabulary, %lld, "
             "got %lld",
             static_cast<long long>(p.vocabulary), static_cast<long long>(p.stride_row));
  MEM1_CHECK(p.entropy != nullptr, error, "entropy: expected a pointer, got NULL");
  MEM1_CHECK(p.softcap >= 0 && p.softcap <= DBL_MAX, error, "softcap: expected 0 for none, or > 0, got %g", p.softcap);
  MEM1_CHECK(p.softcap == 0 || p.bias == nullptr, error, "bias: expected NULL beside softcap");
  if (p.task == MEM1_ROWS_BACKWARD) {
    MEM1_CHECK(p.d_logprob != nullptr && p.d_entropy != nullptr, error,
               "d_logprob, d_entropy: expected pointers, got NULL");
  } else {
    MEM1_CHECK(p.logprob != nullptr, error, "logprob: expected a pointer, got NULL");
  }
  MEM1_CHECK(p.task == MEM1_ROWS_PPO_LOSS || (p.max_logit != nullptr && p.log_sum_exp != nullptr), error,
             "max_logit, log_sum_exp: expected pointers, got NULL");
  if (p.task == MEM1_ROWS_PPO_LOSS) {
    const mem1_status status = validate_ppo(p, error);
    if (status != MEM1_OK) return status;
  }
  if (p.device == MEM1_CUDA) return MEM1_OK;  // the values are checked there
  for (int64_t i = 0; i < p.rows; ++i) {
    MEM1_CHECK(p.target[i] >= 0 && p.target[i] < p.vocabulary, error, "target[%lld]: expected 0 to %lld, got %lld",
               static_cast<long long>(i), static_cast<long long>(p.vocabulary - 1),
               static_cast<long long>(p.target[i]));
  }
  return MEM1_OK;
}

}  // namespace

#if !defined(MEM1_WITH_CUDA)
mem1_status logit_rows_cuda(const mem1_logit_rows_params&, void*, mem1_error* error) { return not_compiled(error); }
#endif

}  // namespace mem1::ppo_loss

mem1_status mem1_logit_rows(const mem1_logit_rows_params* params, void* cuda_stream, mem1_error* error) {
  const mem1_status status = mem1::ppo_loss::validate(params, error);
  if (status != MEM1_OK || params->rows == 0) return status;
  if (params->device == MEM1_CUDA) return mem1::ppo_loss::logit_rows_cuda(*params, cuda_stream, error);
  mem1::ppo_loss::logit_rows_cpu(*params);
  return MEM1_OK;
}
