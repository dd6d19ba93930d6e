// Copies into the dense, padded operands that the CPU attention multiplies (see gemm_cpu.h for the formats).
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace mem1::cpu {

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// A [batch, length, heads, dim] tensor: contiguous last dimension, any other strides (in elements).
template <typename T>
struct View {
  T* data;
  int64_t stride_batch, stride_row, stride_head;
  T* row(int64_t b, int64_t i, int64_t h) const { return data + b * stride_batch + i * stride_row + h * stride_head; }
};

// out[c][r] = in[r][c], in blocks that stay in the first-level cache.
template <typename T>
void transpose(const T* in, int64_t rows, int64_t columns, int64_t ld_in, T* out, int64_t ld_out) {
  constexpr int64_t kBlock = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += kBlock) {
    for (int64_t c0 = 0; c0 < columns; c0 += kBlock) {
      const int64_t r1 = std::min(r0 + kBlock, rows), c1 = std::min(c0 + kBlock, columns);
      for (int64_t c = c0; c < c1; ++c) {
        for (int64_t r = r0; r < r1; ++r) out[c * ld_out + r] = in[r * ld_in + c];
      }
    }
  }
}

// One row, widened or copied, zero-padded to `padded`. Says whether all of it is finite.
template <typename In, typename T>
bool pack_row(const In* in, int64_t dim, int64_t padded, T* out) {
  using Check = std::conditional_t<std::is_same_v<In, double>, double, float>;
  Check zero = 0;  // 0 * x is 0 for a finite x and NaN for any other
  for (int64_t d = 0; d < dim; ++d) {
    out[d] = static_cast<T>(in[d]);
    zero += static_cast<Check>(in[d]) * 0;
  }
  std::fill(out + dim, out + padded, T(0));
  return zero == 0;
}

// Rows as the right operand of a product: B[k, n] = rows[n, k], with `ld` columns.
template <typename T>
void transposed_operand(const T* rows, int64_t count, int64_t dim, T* out, int64_t ld) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    // A pair of elements of a row is a pair of rows of the operand: transpose in units of pairs.
    transpose(reinterpret_cast<const uint32_t*>(rows), count, dim / 2, dim / 2, reinterpret_cast<uint32_t*>(out), ld);
  } else {
    transpose(rows, count, dim, dim, out, ld);
  }
}

// Rows as the right operand of a product: B[k, n] = rows[k, n]. Only bfloat16 needs a copy, in pairs of rows.
template <typename T>
const T* operand(const T* rows, int64_t count, int64_t dim, T* out) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    for (int64_t r = 0; r < count; r += 2) {
      for (int64_t d = 0; d < dim; ++d) {
        out[r * dim + 2 * d] = rows[r * dim + d];
        out[r * dim + 2 * d + 1] = rows[(r + 1) * dim + d];
      }
    }
    return out;
  } else {
    return rows;
  }
}

}  // namespace mem1::cpu
