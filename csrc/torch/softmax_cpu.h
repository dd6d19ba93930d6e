// The element-wise work of trajectory attention on the CPU, on transposed tiles: rows are keys, columns are queries, so
// that every reduction runs down the columns and every loop is a vector loop. Exponents are base 2: `scale` is the
// softmax scale (> 0) times log2(e). `columns` is a multiple of kColumns, `rows` a multiple of 2, tiles are dense.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace mem1::cpu {

constexpr int64_t kColumns = 64;

// running_max[c] = max(running_max[c], scale * s[r][c] over all r)
void column_max(const float* s, int64_t rows, int64_t columns, float scale, float* running_max);
void column_max(const double* s, int64_t rows, int64_t columns, double scale, double* running_max);

// p = exp2(scale * s - max[c]), sum[c] += p. p may be s. As bfloat16, p is in pairs of rows.
void exponentials(const float* s, int64_t rows, int64_t columns, float scale, const float* max, float* sum, float* p);
void exponentials(const float* s, int64_t rows, int64_t columns, float scale, const float* max, float* sum,
                  at::BFloat16* p);
void exponentials(const double* s, int64_t rows, int64_t columns, double scale, const double* max, double* sum,
                  double* p);

// s = tanh(factor * s)
void cap(float* s, int64_t count, float factor);
void cap(double* s, int64_t count, double factor);

// p = exp2(scale * s - lse[c]), ds = p * (dp - delta[c]), both 0 where s is -inf. p may be s and ds may be dp. As
// bfloat16, p and ds are in rows and ds is written once more in pairs of rows, to ds_pairs. `capped`: s is a tanh, and
// ds that of its argument.
void gradients(const float* s, const float* dp, int64_t rows, int64_t columns, float scale, bool capped,
               const float* lse, const float* delta, float* p, float* ds, float* ds_pairs);
void gradients(const float* s, const float* dp, int64_t rows, int64_t columns, float scale, bool capped,
               const float* lse, const float* delta, at::BFloat16* p, at::BFloat16* ds, at::BFloat16* ds_pairs);
void gradients(const double* s, const double* dp, int64_t rows, int64_t columns, double scale, bool capped,
               const double* lse, const double* delta, double* p, double* ds, double* ds_pairs);

// data[r][c] *= factor[c]
void scale_columns(float* data, int64_t rows, int64_t columns, const float* factor);
void scale_columns(double* data, int64_t rows, int64_t columns, const double* factor);

}  // namespace mem1::cpu
