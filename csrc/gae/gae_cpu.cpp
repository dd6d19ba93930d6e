// Generalised advantage estimation on the CPU: each row from its end to its beginning.
#include "gae/gae.h"

namespace mem1::gae {
namespace {

template <typename Real>
void row(const mem1_gae_params& p, int64_t b) {
  const int64_t first = b * p.length;
  const Real *reward = static_cast<const Real*>(p.reward) + first, *value = static_cast<const Real*>(p.value) + first;
  Real *advantage = static_cast<Real*>(p.advantage) + first, *returns = static_cast<Real*>(p.returns) + first;
  const uint8_t* mask = p.mask + first;
  const Real gamma = static_cast<Real>(p.gamma), decay = static_cast<Real>(p.gamma * p.lambda);
  Real next_value = 0, carried = 0;
  for (int64_t t = p.length - 1; t >= 0; --t) {
    if (mask[t] == 0) {
      advantage[t] = returns[t] = 0;
      continue;
    }
    carried = reward[t] + gamma * next_value - value[t] + decay * carried;
    next_value = value[t];
    advantage[t] = carried;
    returns[t] = carried + next_value;
  }
}

}  // namespace

void gae_cpu(const mem1_gae_params& p) {
  for (int64_t b = 0; b < p.batch; ++b) p.dtype == MEM1_FLOAT64 ? row<double>(p, b) : row<float>(p, b);
}

}  // namespace mem1::gae
