#include "torch/softmax_cpu.h"

#include "common/exp2_cpu.h"
#include "common/tanh_cpu.h"

#include <bit>
#include <limits>

namespace mem1::cpu {
namespace {

// `value` where the pair of this score is visible, 0 elsewhere: also where the query's own statistics are NaN.
template <typename T>
MEM1_INLINE T visible(T score, T value) {
  return score == -std::numeric_limits<T>::infinity() ? T(0) : value;
}

MEM1_INLINE uint32_t bfloat16_bits(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

template <typename T>
MEM1_INLINE void column_max_body(const T* s, int64_t rows, int64_t columns, T scale, T* running_max) {
  for (int64_t c0 = 0; c0 < columns; c0 += kColumns) {
    T best[kColumns];
    for (int64_t c = 0; c < kColumns; ++c) best[c] = running_max[c0 + c];
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = s + r * columns + c0;
#pragma omp simd
      for (int64_t c = 0; c < kColumns; ++c) {
        const T x = scale * row[c];
        best[c] = x > best[c] ? x : best[c];
      }
    }
    for (int64_t c = 0; c < kColumns; ++c) running_max[c0 + c] = best[c];
  }
}

template <typename T>
MEM1_INLINE void exponentials_body(const T* s, int64_t rows, int64_t columns, T scale, const T* max, T* sum, T* p) {
  for (int64_t c0 = 0; c0 < columns; c0 += kColumns) {
    T total[kColumns] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const T* in = s + r * columns + c0;
      T* out = p + r * columns + c0;
#pragma omp simd
      for (int64_t c = 0; c < kColumns; ++c) {
        const T e = exp2_of(scale * in[c] - max[c0 + c]);
        total[c] += e;
        out[c] = e;
      }
    }
    for (int64_t c = 0; c < kColumns; ++c) sum[c0 + c] += total[c];
  }
}

template <typename T>
MEM1_INLINE void cap_body(T* s, int64_t count, T factor) {
#pragma omp simd
  for (int64_t n = 0; n < count; ++n) s[n] = tanh_of(factor * s[n]);
}

// What a score's gradient is multiplied with to be that of q k.
template <bool kCapped, typename T>
MEM1_INLINE T slope(T score) {
  return kCapped ? 1 - score * score : T(1);
}

template <bool kCapped, typename T>
MEM1_INLINE void gradients_body(const T* s, const T* dp, int64_t rows, int64_t columns, T scale, const T* lse,
                                const T* delta, T* p, T* ds) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = r * columns;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      const T score = s[at + c];
      const T e = visible(score, exp2_of(scale * score - lse[c]));
      const T d = visible(score, e * (dp[at + c] - delta[c]) * slope<kCapped>(score));
      p[at + c] = e;
      ds[at + c] = d;
    }
  }
}

}  // namespace

MEM1_CLONES void column_max(const float* s, int64_t rows, int64_t columns, float scale, float* running_max) {
  column_max_body(s, rows, columns, scale, running_max);
}

void column_max(const double* s, int64_t rows, int64_t columns, double scale, double* running_max) {
  column_max_body(s, rows, columns, scale, running_max);
}

MEM1_CLONES void exponentials(const float* s, int64_t rows, int64_t columns, float scale, const float* max, float* sum,
                              float* p) {
  exponentials_body(s, rows, columns, scale, max, sum, p);
}

void exponentials(const double* s, int64_t rows, int64_t columns, double scale, const double* max, double* sum,
                  double* p) {
  exponentials_body(s, rows, columns, scale, max, sum, p);
}

MEM1_CLONES void exponentials(const float* s, int64_t rows, int64_t columns, float scale, const float* max, float* sum,
                              at::BFloat16* p) {
  auto* pairs = reinterpret_cast<uint32_t*>(p);
  for (int64_t c0 = 0; c0 < columns; c0 += kColumns) {
    float total[kColumns] = {};
    for (int64_t r = 0; r < rows; r += 2) {
      const float* first = s + r * columns + c0;
      const float* second = first + columns;
      uint32_t* out = pairs + r / 2 * columns + c0;
#pragma omp simd
      for (int64_t c = 0; c < kColumns; ++c) {
        const float a = exp2_of(scale * first[c] - max[c0 + c]);
        const float b = exp2_of(scale * second[c] - max[c0 + c]);
        total[c] += a + b;
        out[c] = bfloat16_bits(a) | bfloat16_bits(b) << 16;
      }
    }
    for (int64_t c = 0; c < kColumns; ++c) sum[c0 + c] += total[c];
  }
}

MEM1_CLONES void cap(float* s, int64_t count, float factor) { cap_body(s, count, factor); }

void cap(double* s, int64_t count, double factor) { cap_body(s, count, factor); }

MEM1_CLONES void gradients(const float* s, const float* dp, int64_t rows, int64_t columns, float scale, bool capped,
                           const float* lse, const float* delta, float* p, float* ds, float*) {
  if (capped) {
    gradients_body<true>(s, dp, rows, columns, scale, lse, delta, p, ds);
  } else {
    gradients_body<false>(s, dp, rows, columns, scale, lse, delta, p, ds);
  }
}

void gradients(const double* s, const double* dp, int64_t rows, int64_t columns, double scale, bool capped,
               const double* lse, const double* delta, double* p, double* ds, double*) {
  if (capped) {
    gradients_body<true>(s, dp, rows, columns, scale, lse, delta, p, ds);
  } else {
    gradients_body<false>(s, dp, rows, columns, scale, lse, delta, p, ds);
  }
}

namespace {

template <bool kCapped>
MEM1_INLINE void gradients_in_pairs(const float* s, const float* dp, int64_t rows, int64_t columns, float scale,
                                    const float* lse, const float* delta, at::BFloat16* p, at::BFloat16* ds,
                                    at::BFloat16* ds_pairs) {
  auto* pairs = reinterpret_cast<uint32_t*>(ds_pairs);
  // Rows leave through a block of 32-bit values: a loop that also stores 16-bit ones is not vectorised.
  uint32_t p_bits[2][kColumns], ds_bits[2][kColumns];
  const auto store = [columns](const uint32_t (&bits)[2][kColumns], uint16_t* out) {
    for (int64_t k = 0; k < 2; ++k) {
      for (int64_t c = 0; c < kColumns; ++c) out[k * columns + c] = static_cast<uint16_t>(bits[k][c]);
    }
  };
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t c0 = 0; c0 < columns; c0 += kColumns) {
      const int64_t at = r * columns + c0, next = at + columns, pair = r / 2 * columns + c0;
#pragma omp simd
      for (int64_t c = 0; c < kColumns; ++c) {
        const float s0 = s[at + c], s1 = s[next + c];
        const float e0 = visible(s0, exp2_of(scale * s0 - lse[c0 + c]));
        const float e1 = visible(s1, exp2_of(scale * s1 - lse[c0 + c]));
        p_bits[0][c] = bfloat16_bits(e0);
        p_bits[1][c] = bfloat16_bits(e1);
        ds_bits[0][c] = bfloat16_bits(visible(s0, e0 * (dp[at + c] - delta[c0 + c]) * slope<kCapped>(s0)));
        ds_bits[1][c] = bfloat16_bits(visible(s1, e1 * (dp[next + c] - delta[c0 + c]) * slope<kCapped>(s1)));
        pairs[pair + c] = ds_bits[0][c] | ds_bits[1][c] << 16;
      }
      store(p_bits, reinterpret_cast<uint16_t*>(p) + at);
      store(ds_bits, reinterpret_cast<uint16_t*>(ds) + at);
    }
  }
}

}  // namespace

MEM1_CLONES void gradients(const float* s, const float* dp, int64_t rows, int64_t columns, float scale, bool capped,
                           const float* lse, const float* delta, at::BFloat16* p, at::BFloat16* ds,
                           at::BFloat16* ds_pairs) {
  if (capped) {
    gradients_in_pairs<true>(s, dp, rows, columns, scale, lse, delta, p, ds, ds_pairs);
  } else {
    gradients_in_pairs<false>(s, dp, rows, columns, scale, lse, delta, p, ds, ds_pairs);
  }
}

MEM1_CLONES void scale_columns(float* data, int64_t rows, int64_t columns, const float* factor) {
  for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) data[r * columns + c] *= factor[c];
  }
}

void scale_columns(double* data, int64_t rows, int64_t columns, const double* factor) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) data[r * columns + c] *= factor[c];
  }
}

}  // namespace mem1::cpu
