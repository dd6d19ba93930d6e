// tanh for loops that the compiler makes vectors of.
#pragma once

#include "common/exp2_cpu.h"

namespace mem1::cpu {

// tanh, to a few 1e-7 of its value. Near 0, where 1 - 2 / (..) cancels, by its series.
MEM1_INLINE float tanh_of(float x) {
  const float size = x < 0 ? -x : x, square = x * x;
  const float near = size * (1 + square * (-1 / 3.0f + square * (2 / 15.0f + square * (-17 / 315.0f))));
  const float e = exp2_of(-2.8853901f * size);
  const float far = (1 - e) / (1 + e);
  const float y = size < 0.125f ? near : far;
  return x < 0 ? -y : y;
}

MEM1_INLINE double tanh_of(double x) { return std::tanh(x); }

}  // namespace mem1::cpu
