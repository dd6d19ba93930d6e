// Rows of logits on the CPU: a pass for the maximum, one for the sums, one for the gradient. A row of 150,000 floats
// stays in the second-level cache between them, so only the first waits for memory.
#include "ppo_loss/rows.h"

#include "common/clones.h"
#include "common/exp2_cpu.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace mem1::ppo_loss {
namespace {

using cpu::exp2_of;

constexpr int64_t kBlock = 1024;  // sums of a block are kept in Real, sums of blocks in double

// z = logits + bias; `bias` may be null. Exponents x = (z - shift) * scale are in base 2.
template <typename Real>
MEM1_INLINE Real highest_of(const Real* logits, const Real* bias, int64_t count) {
  constexpr int kLanes = 64;
  Real best[kLanes];
  std::fill(best, best + kLanes, -std::numeric_limits<Real>::infinity());
  const auto z_of = [&](int64_t v) { return logits[v] + (bias == nullptr ? Real(0) : bias[v]); };
  int64_t v = 0;
  for (; v + kLanes <= count; v += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const Real z = z_of(v + lane);
      best[lane] = z > best[lane] ? z : best[lane];
    }
  }
  for (; v < count; ++v) best[0] = z_of(v) > best[0] ? z_of(v) : best[0];
  return *std::max_element(best, best + kLanes);
}

struct Sums {
  double mass, moment;  // of 2^x, of x 2^x
};

template <typename Real>
MEM1_INLINE Sums sums_of(const Real* logits, const Real* bias, int64_t count, Real shift, Real scale) {
  Sums total{0, 0};
  for (int64_t v = 0; v < count; v += kBlock) {
    const int64_t end = std::min(v + kBlock, count);
    Real mass = 0, moment = 0;
#pragma omp simd reduction(+ : mass, moment)
    for (int64_t u = v; u < end; ++u) {
      Real x = (logits[u] + (bias == nullptr ? Real(0) : bias[u]) - shift) * scale;
      x = x < Real(kSmall) ? Real(kSmall) : x;
      const Real power = exp2_of(x);
      mass += power;
      moment += power * x;
    }
    total.mass += mass;
    total.moment += moment;
  }
  return total;
}

// logits[v] becomes 2^x (offset + slope x).
template <typename Real>
MEM1_INLINE void gradient_of(Real* logits, const Real* bias, int64_t count, Real shift, Real scale, Real offset,
                             Real slope) {
#pragma omp simd
  for (int64_t v = 0; v < count; ++v) {
    Real x = (logits[v] + (bias == nullptr ? Real(0) : bias[v]) - shift) * scale;
    x = x < Real(kSmall) ? Real(kSmall) : x;
    logits[v] = exp2_of(x) * (offset + slope * x);
  }
}

// What a soft cap makes of a gradient: 1 - tanh^2 of it.
template <typename Real>
MEM1_INLINE Real slope_of(Real logit, Real per_cap) {
  return 1 - (logit * per_cap) * (logit * per_cap);
}

template <typename Real>
MEM1_INLINE void capped_gradient_of(Real* logits, int64_t count, Real shift, Real scale, Real offset, Real slope,
                                    Real per_cap) {
#pragma omp simd
  for (int64_t v = 0; v < count; ++v) {
    Real x = (logits[v] - shift) * scale;
    x = x < Real(kSmall) ? Real(kSmall) : x;
    logits[v] = exp2_of(x) * (offset + slope * x) * slope_of(logits[v], per_cap);
  }
}

// The same numbers as bfloat16, at the same address. What is written lies before what is still to be read.
MEM1_CLONES void narrow(float* row, int64_t count) {
  constexpr int64_t kPiece = 256;
  uint16_t piece[kPiece];
  for (int64_t v = 0; v < count; v += kPiece) {
    const int64_t size = std::min(kPiece, count - v);
#pragma omp simd
    for (int64_t n = 0; n < size; ++n) {
      const uint32_t bits = std::bit_cast<uint32_t>(row[v + n]);
      const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
      piece[n] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
    std::memcpy(reinterpret_cast<char*>(row) + v * sizeof(uint16_t), piece, size * sizeof(uint16_t));
  }
}
void narrow(double*, int64_t) {}  // never asked for

#define MEM1_PASSES(Real)                                                                                        \
  MEM1_CLONES Real highest(const Real* logits, const Real* bias, int64_t count) {                                \
    return bias == nullptr ? highest_of<Real>(logits, nullptr, count) : highest_of(logits, bias, count);         \
  }                                                                                                              \
  MEM1_CLONES Sums sums(const Real* logits, const Real* bias, int64_t count, Real shift, Real scale) {           \
    return bias == nullptr ? sums_of<Real>(logits, nullptr, count, shift, scale)                                 \
                           : sums_of(logits, bias, count, shift, scale);                                         \
  }                                                                                                              \
  MEM1_CLONES void gradient(Real* logits, const Real* bias, int64_t count, Real shift, Real scale, Real offset,  \
                            Real slope) {                                                                        \
    return bias == nullptr ? gradient_of<Real>(logits, nullptr, count, shift, scale, offset, slope)              \
                           : gradient_of(logits, bias, count, shift, scale, offset, slope);                      \
  }                                                                                                              \
  MEM1_CLONES void capped_gradient(Real* logits, int64_t count, Real shift, Real scale, Real offset, Real slope, \
                                   Real per_cap) {                                                               \
    capped_gradient_of(logits, count, shift, scale, offset, slope, per_cap);                                     \
  }
MEM1_PASSES(float)
MEM1_PASSES(double)
#undef MEM1_PASSES

template <typename Real>
bool has_nan(const Real* logits, const Real* bias, int64_t count) {
  for (int64_t v = 0; v < count; ++v) {
    if (std::isnan(logits[v] + (bias == nullptr ? Real(0) : bias[v]))) return true;
  }
  return false;
}

template <typename Real>
void row(const mem1_logit_rows_params& p, int64_t i) {
  const auto in = [i](const void* array) { return static_cast<double>(static_cast<const Real*>(array)[i]); };
  const auto out = [i](void* array, double value) { static_cast<Real*>(array)[i] = static_cast<Real>(value); };
  Real* logits = static_cast<Real*>(p.logits) + i * p.stride_row;
  const Real* bias = static_cast<const Real*>(p.bias);
  const int64_t target = p.target[i];
  const double temperature = in(p.temperature);
  const Real scale = static_cast<Real>(kLog2E / temperature);
  constexpr Real kNone = -std::numeric_limits<Real>::infinity();
  Real max_logit;
  double log_sum_exp = 0, entropy = 0;
  Grads<Real> grads;
  if (p.task == MEM1_ROWS_BACKWARD) {
    max_logit = static_cast<const Real*>(p.max_logit)[i];
    log_sum_exp = in(p.log_sum_exp);
    entropy = in(p.entropy);
    grads = {static_cast<const Real*>(p.d_logprob)[i], static_cast<const Real*>(p.d_entropy)[i]};
  } else {
    max_logit = highest(logits, bias, p.vocabulary);
    double logprob = kNone;
    if (max_logit != kNone) {
      const Sums total = sums(logits, bias, p.vocabulary, max_logit, scale);
      const Real chosen = logits[target] + (bias == nullptr ? Real(0) : bias[target]);
      log_sum_exp = std::log(total.mass);
      logprob = (static_cast<double>(chosen) - static_cast<double>(max_logit)) / temperature - log_sum_exp;
      entropy = log_sum_exp - kLn2 * total.moment / total.mass;
    } else if (has_nan(logits, bias, p.vocabulary)) {
      logprob = log_sum_exp = entropy = std::numeric_limits<double>::quiet_NaN();  // NaN is above nothing
    }
    out(p.logprob, logprob);
    out(p.entropy, entropy);
    if (p.task == MEM1_ROWS_LOGPROB) {
      out(p.max_logit, max_logit);
      out(p.log_sum_exp, log_sum_exp);
      return;
    }
    grads = ppo_row<Real>(p, i, static_cast<Real>(logprob), static_cast<Real>(entropy));
    if (p.with_gradient == 0) return;
  }
  const auto done = [&] {
    if (p.gradient_dtype != p.dtype) narrow(logits, p.vocabulary);
  };
  if (max_logit == kNone) {
    std::fill(logits, logits + p.vocabulary, static_cast<Real>(0 * entropy));
    return done();
  }
  const double inv_sum_exp = std::exp(-log_sum_exp), d_logprob = grads.logprob / temperature;
  const double d_entropy = grads.entropy / temperature;
  const Real offset = static_cast<Real>(inv_sum_exp * (-d_logprob - d_entropy * (entropy - log_sum_exp)));
  const Real slope = static_cast<Real>(-inv_sum_exp * d_entropy * kLn2);
  Real at_target = static_cast<Real>(d_logprob);
  if (p.softcap == 0) {
    gradient(logits, bias, p.vocabulary, max_logit, scale, offset, slope);
  } else {
    const Real per_cap = static_cast<Real>(1 / p.softcap);
    at_target *= slope_of(logits[target], per_cap);
    capped_gradient(logits, p.vocabulary, max_logit, scale, offset, slope, per_cap);
  }
  logits[target] += at_target;
  done();
}

}  // namespace

void logit_rows_cpu(const mem1_logit_rows_params& p) {
  for (int64_t i = 0; i < p.rows; ++i) p.dtype == MEM1_FLOAT64 ? row<double>(p, i) : row<float>(p, i);
}

}  // namespace mem1::ppo_loss
