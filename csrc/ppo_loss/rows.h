// Backends of mem1_logit_rows, and the loss of a row, which both compute. Arguments were validated by rows.cpp.
#pragma once

#include <cmath>

#include "common/host_device.h"
#include "mem1/mem1.h"

namespace mem1::ppo_loss {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
// The lowest exponent, base 2: 2^kSmall is 0 in every type, and kSmall 2^kSmall as well; -inf would make NaN of it.
constexpr double kSmall = -2000;
// Past that a ratio carries no information, only overflow.
constexpr double kLogRatioLimit = 20.0;

// A log-ratio within bounds. Where it was cut off it has no gradient; NaN stays NaN.
template <typename Real>
struct LogRatio {
  Real value;
  bool inside;

  MEM1_HOST_DEVICE explicit LogRatio(Real x) : value(x), inside(true) {
    const Real limit = static_cast<Real>(kLogRatioLimit);
    if (x > limit || x < -limit) {
      value = x > limit ? limit : -limit;
      inside = false;
    }
  }
};

// Factors of a row's gradient: of its log-prob and of its entropy.
template <typename Real>
struct Grads {
  Real logprob, entropy;
};

// Writes what PPO says of row i, given its log-prob and entropy.
template <typename Real>
MEM1_HOST_DEVICE Grads<Real> ppo_row(const mem1_logit_rows_params& p, int64_t i, Real logprob, Real entropy) {
  const auto in = [i](const void* array) { return static_cast<const Real*>(array)[i]; };
  const auto out = [i](void* array, Real value) { static_cast<Real*>(array)[i] = value; };
  const LogRatio<Real> step(logprob - in(p.old_logprob));
  const Real ratio = exp(step.value), advantage = in(p.advantage), scale = in(p.scale);
  const Real low = static_cast<Real>(1 - p.clip_low), high = static_cast<Real>(1 + p.clip_high);
  const Real bounded = ratio < low ? low : ratio > high ? high : ratio;
  const Real plain = -advantage * ratio, clipped = -advantage * bounded;
  const bool is_clipped = clipped > plain;
  Real policy = is_clipped ? clipped : plain, slope = is_clipped || !step.inside ? Real(0) : plain;
  if (p.dual_clip != 0 && advantage < 0) {
    const Real most = -advantage * static_cast<Real>(p.dual_clip);
    if (policy > most) {
      policy = most;
      slope = 0;
    }
  }
  if (p.rollout_logprob != nullptr) {
    const Real importance_weight = exp(LogRatio<Real>(in(p.old_logprob) - in(p.rollout_logprob)).value);
    const Real cap = static_cast<Real>(p.rollout_is_cap), weight = importance_weight > cap ? cap : importance_weight;
    policy *= weight;
    slope *= weight;
  }
  const Real kl_coef = static_cast<Real>(p.kl_coef), entropy_coef = static_cast<Real>(p.entropy_coef);
  Real loss = policy - entropy_coef * entropy;
  if (p.ref_logprob != nullptr) {
    const LogRatio<Real> kl_log_ratio(logprob - in(p.ref_logprob));
    const Real d = kl_log_ratio.value;
    Real kl = d, kl_slope = 1;
    if (p.kl_estimator == MEM1_KL_K2) {
      kl = d * d / 2;
      kl_slope = d;
    } else if (p.kl_estimator == MEM1_KL_K3) {
      kl = expm1(-d) + d;
      kl_slope = -expm1(-d);
    }
    out(p.kl, kl);
    loss += kl_coef * kl;
    if (kl_log_ratio.inside) slope += kl_coef * kl_slope;
  }
  if (loss != loss) slope = loss;  // NaN in any argument: where a ratio was cut off, only the loss shows it
  out(p.ratio, ratio);
  out(p.clipped, is_clipped ? Real(1) : Real(0));
  out(p.loss, scale * loss);
  return {scale * slope, -scale * entropy_coef};
}

void logit_rows_cpu(const mem1_logit_rows_params& p);
mem1_status logit_rows_cuda(const mem1_logit_rows_params& p, void* stream, mem1_error* error);

}  // namespace mem1::ppo_loss
