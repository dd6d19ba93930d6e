// From tensors to mem1_logit_rows and mem1_gae; on the CPU torch's threads share the rows.
#include "torch/ops.h"

#include "mem1/mem1.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

namespace mem1 {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

mem1_dtype dtype_of(const char* name, at::ScalarType type) {
  const auto dtype = float_dtype(type);
  TORCH_CHECK_TYPE(dtype.has_value(), name, ": expected a floating point dtype, got ", type);
  return *dtype;
}

const void* array(const char* name, const Tensor& t, const Tensor& like, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, ": expected ", dtype, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.sizes() == shape && t.is_contiguous() && t.device() == like.device(), name,
                    ": expected contiguous ", shape, " on ", like.device(), ", got ", t.sizes(), " on ", t.device());
  return t.const_data_ptr();
}

// What all tasks have in common.
struct Rows {
  const Tensor& logits;
  mem1_logit_rows_params p{};

  Rows(const Tensor& logits, const OptionalTensor& bias, const Tensor& target, const Tensor& temperature,
       mem1_rows_task task)
      : logits(logits) {
    TORCH_CHECK_VALUE(logits.dim() == 2 && (logits.stride(1) == 1 || logits.size(1) <= 1),
                      "logits: expected [rows, vocabulary] with a contiguous last dimension, got ", logits.sizes());
    p.struct_size = sizeof(p);
    p.device = logits.is_cpu() ? MEM1_CPU : MEM1_CUDA;
    p.task = task;
    p.dtype = p.gradient_dtype = dtype_of("logits", logits.scalar_type());
    p.rows = logits.size(0);
    p.vocabulary = logits.size(1);
    p.logits = logits.data_ptr();
    p.stride_row = logits.stride(0);
    if (bias.has_value()) p.bias = array("bias", *bias, logits, {p.vocabulary}, logits.scalar_type());
    p.target = static_cast<const int64_t*>(array("target", target, logits, {p.rows}, at::kLong));
    p.temperature = of_rows("temperature", temperature);
  }
  const void* of_rows(const char* name, const Tensor& t) const {
    return array(name, t, logits, {p.rows}, logits.scalar_type());
  }
  void run(int64_t stream) const {
    if (p.device == MEM1_CUDA) {
      mem1_error error{};
      check(mem1_logit_rows(&p, reinterpret_cast<void*>(stream), &error), error);
      return;
    }
    constexpr int64_t kWorthAThread = 1 << 14;  // logits
    const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(p.vocabulary, 1));
    // One thread too few for a call of no rows: its arguments are checked all the same.
    at::parallel_for(0, std::max<int64_t>(p.rows, 1), grain, [&](int64_t begin, int64_t end) {
      mem1_error error{};
      const auto part = slice(begin, std::min(end, p.rows));
      check(mem1_logit_rows(&part, nullptr, &error), error);
    });
  }

 private:
  mem1_logit_rows_params slice(int64_t begin, int64_t end) const {
    mem1_logit_rows_params part = p;
    const int64_t size = logits.element_size();
    const auto forward = [&](auto& pointer, int64_t elements) {
      if (pointer != nullptr) pointer = reinterpret_cast<char*>(const_cast<void*>(pointer)) + elements * size;
    };
    part.rows = end - begin;
    part.target += begin;
    forward(part.logits, begin * p.stride_row);
    for (const void** in : {&part.temperature, &part.d_logprob, &part.d_entropy, &part.old_logprob, &part.advantage,
                            &part.ref_logprob, &part.rollout_logprob, &part.scale}) {
      forward(*in, begin);
    }
    for (void** out : {&part.logprob, &part.entropy, &part.max_logit, &part.log_sum_exp, &part.loss, &part.kl,
                       &part.ratio, &part.clipped}) {
      forward(*out, begin);
    }
    return part;
  }
};

mem1_kl_estimator estimator_of(c10::string_view name) {
  if (name == "k1") return MEM1_KL_K1;
  if (name == "k2") return MEM1_KL_K2;
  TORCH_CHECK_VALUE(name == "k3", "kl_estimator: expected 'k1', 'k2' or 'k3', got '", name, "'");
  return MEM1_KL_K3;
}

}  // namespace

Tensor rows_logprob(const Tensor& logits, const OptionalTensor& bias, const Tensor& target, const Tensor& temperature,
                    int64_t stream) {
  Rows rows(logits, bias, target, temperature, MEM1_ROWS_LOGPROB);
  const Tensor out = at::empty({4, rows.p.rows}, logits.options());
  rows.p.logprob = out[0].data_ptr();
  rows.p.entropy = out[1].data_ptr();
  rows.p.max_logit = out[2].data_ptr();
  rows.p.log_sum_exp = out[3].data_ptr();
  rows.run(stream);
  return out;
}

void rows_backward_(const Tensor& logits, const OptionalTensor& bias, const Tensor& target, const Tensor& temperature,
                    const Tensor& max_logit, const Tensor& log_sum_exp, const Tensor& entropy, const Tensor& d_logprob,
                    const Tensor& d_entropy, at::ScalarType gradient_dtype, double softcap, int64_t stream) {
  Rows rows(logits, bias, target, temperature, MEM1_ROWS_BACKWARD);
  rows.p.softcap = softcap;
  rows.p.gradient_dtype = dtype_of("gradient_dtype", gradient_dtype);
  rows.p.max_logit = const_cast<void*>(rows.of_rows("max_logit", max_logit));
  rows.p.log_sum_exp = const_cast<void*>(rows.of_rows("log_sum_exp", log_sum_exp));
  rows.p.entropy = const_cast<void*>(rows.of_rows("entropy", entropy));
  rows.p.d_logprob = rows.of_rows("d_logprob", d_logprob);
  rows.p.d_entropy = rows.of_rows("d_entropy", d_entropy);
  rows.run(stream);
}

Tensor rows_ppo_(const Tensor& logits, const OptionalTensor& bias, const Tensor& target, const Tensor& temperature,
                 const Tensor& old_logprob, const Tensor& advantage, const Tensor& scale,
                 const OptionalTensor& ref_logprob, const OptionalTensor& rollout_logprob, double clip_low,
                 double clip_high, std::optional<double> dual_clip, double rollout_is_cap, double kl_coef,
                 c10::string_view kl_estimator, double entropy_coef, bool with_gradient, at::ScalarType gradient_dtype,
                 double softcap, int64_t stream) {
  Rows rows(logits, bias, target, temperature, MEM1_ROWS_PPO_LOSS);
  mem1_logit_rows_params& p = rows.p;
  p.gradient_dtype = dtype_of("gradient_dtype", gradient_dtype);
  p.with_gradient = with_gradient;
  p.softcap = softcap;
  p.old_logprob = rows.of_rows("old_logprob", old_logprob);
  p.advantage = rows.of_rows("advantage", advantage);
  p.scale = rows.of_rows("scale", scale);
  if (ref_logprob.has_value()) p.ref_logprob = rows.of_rows("ref_logprob", *ref_logprob);
  if (rollout_logprob.has_value()) p.rollout_logprob = rows.of_rows("rollout_logprob", *rollout_logprob);
  p.clip_low = clip_low;
  p.clip_high = clip_high;
  p.dual_clip = dual_clip.value_or(0);
  p.rollout_is_cap = rollout_is_cap;
  p.kl_coef = kl_coef;
  p.kl_estimator = estimator_of(kl_estimator);
  p.entropy_coef = entropy_coef;
  const Tensor out = at::zeros({6, p.rows}, logits.options());
  p.loss = out[0].data_ptr();
  p.logprob = out[1].data_ptr();
  p.entropy = out[2].data_ptr();
  p.ratio = out[3].data_ptr();
  p.clipped = out[4].data_ptr();
  if (ref_logprob.has_value()) p.kl = out[5].data_ptr();
  rows.run(stream);
  return out;
}

std::tuple<Tensor, Tensor> gae(const Tensor& reward, const Tensor& value, const Tensor& mask, double gamma, double lam,
                               int64_t stream) {
  TORCH_CHECK_VALUE(reward.dim() == 2 && reward.size(0) <= INT32_MAX && reward.size(1) <= INT32_MAX,
                    "reward: expected [batch, length], got ", reward.sizes());
  mem1_gae_params p{};
  p.struct_size = sizeof(p);
  p.device = reward.is_cpu() ? MEM1_CPU : MEM1_CUDA;
  p.dtype = dtype_of("reward", reward.scalar_type());
  p.batch = static_cast<int32_t>(reward.size(0));
  p.length = static_cast<int32_t>(reward.size(1));
  p.reward = array("reward", reward, reward, reward.sizes(), reward.scalar_type());
  p.value = array("value", value, reward, reward.sizes(), reward.scalar_type());
  p.mask = static_cast<const uint8_t*>(array("mask", mask, reward, reward.sizes(), at::kBool));
  p.gamma = gamma;
  p.lambda = lam;
  const Tensor advantage = at::empty_like(reward), returns = at::empty_like(reward);
  p.advantage = advantage.data_ptr();
  p.returns = returns.data_ptr();
  if (p.device == MEM1_CUDA) {
    mem1_error error{};
    check(mem1_gae(&p, reinterpret_cast<void*>(stream), &error), error);
    return {advantage, returns};
  }
  constexpr int64_t kWorthAThread = 1 << 14;  // tokens
  const int64_t length = std::max<int64_t>(p.length, 1), size = reward.element_size();
  at::parallel_for(0, std::max<int64_t>(p.batch, 1), std::max<int64_t>(1, kWorthAThread / length),
                   [&](int64_t begin, int64_t end) {
                     mem1_gae_params part = p;
                     const int64_t first = begin * p.length;
                     part.batch = static_cast<int32_t>(std::min<int64_t>(end, p.batch) - begin);
                     for (const void** in : {&part.reward, &part.value}) {
                       *in = static_cast<const char*>(*in) + first * size;
                     }
                     part.mask += first;
                     for (void** out : {&part.advantage, &part.returns}) *out = static_cast<char*>(*out) + first * size;
                     mem1_error error{};
                     check(mem1_gae(&part, nullptr, &error), error);
                   });
  return {advantage, returns};
}

}  // namespace mem1
