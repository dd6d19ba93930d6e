// exp2 for loops that the compiler makes vectors of.
#pragma once

#include "common/clones.h"

#include <bit>
#include <cmath>
#include <cstdint>

namespace mem1::cpu {

// 2^x for x <= 0; 0 below -126, NaN for NaN. x = n + f with |f| <= 1/2: a polynomial for 2^f (least squares on
// Chebyshev nodes, relative error 1e-7 in float), times 2^n put together from its bits.
MEM1_INLINE float exp2_of(float x) {
  x = x < -127.0f ? -127.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const float shifted = x + kRound;
  const float f = x - (shifted - kRound);
  float y = 1.5370633e-4f;
  y = y * f + 1.3399809e-3f;
  y = y * f + 9.6183734e-3f;
  y = y * f + 5.5503292e-2f;
  y = y * f + 2.4022648e-1f;
  y = y * f + 6.9314721e-1f;
  y = y * f + 1.0f;
  const uint32_t exponent = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kRound) + 127u;
  return y * std::bit_cast<float>(exponent << 23);
}

MEM1_INLINE double exp2_of(double x) { return std::exp2(x); }

}  // namespace mem1::cpu
