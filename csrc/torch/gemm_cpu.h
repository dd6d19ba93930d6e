// Row-major matrix products on the CPU through the vendor library that torch brings (oneDNN, MKL):
//   C[M, N] (+)= A[M, K] B[K, N]
// Operands are float, double or bfloat16, sums float (double for double). A bfloat16 B is in pairs of rows (VNNI):
// element (k, n) at (k / 2) * 2 * ldb + 2 * n + k % 2.
#pragma once

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/native/CPUBlas.h>

#include <vector>

#if !defined(CPUBLAS_BRGEMM_F32F32F32) || !defined(CPUBLAS_BRGEMM_BF16BF16F32)
#error "mem1_core needs torch >= 2.11: ATen/native/CPUBlas.h has no brgemm"
#endif

namespace mem1::cpu {

template <typename T>
struct Sum {
  using type = float;
};
template <>
struct Sum<double> {
  using type = double;
};

// Whether bfloat16 products run on bfloat16 operands; where they do not, operands are widened to float. The processor
// has to have the instructions, and the vendor library to use them (its own settings may say no): one product tells.
inline bool has_bfloat16_products() {
#if defined(__x86_64__)
  static const bool works = [] {
    if (!__builtin_cpu_supports("avx512bf16")) return false;
    const std::vector<at::BFloat16> operand(16 * 16, at::BFloat16(1.0f));
    std::vector<float> product(16 * 16);
    try {
      at::native::cpublas::brgemm(16, 16, 16, 16, 16, 16, false, operand.data(), operand.data(), product.data(), true);
    } catch (const std::exception&) {
      return false;
    }
    at::native::cpublas::brgemm_release(true);
    return true;
  }();
  return at::globalContext().userEnabledMkldnn() && works;
#else
  return false;
#endif
}

template <typename T>
void gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, typename Sum<T>::type* c,
          int64_t ldc, bool accumulate) {
  constexpr bool kPairs = std::is_same_v<T, at::BFloat16>;
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, kPairs);
}

template <>
inline void gemm<double>(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb,
                         double* c, int64_t ldc, bool accumulate) {
  const auto view = [](const double* data, int64_t rows, int64_t columns, int64_t ld) {
    return at::from_blob(const_cast<double*>(data), {rows, columns}, {ld, 1}, at::kDouble);
  };
  at::Tensor out = view(c, m, n, ldc);
  if (accumulate) {
    out.addmm_(view(a, m, k, lda), view(b, k, n, ldb));
  } else {
    at::mm_out(out, view(a, m, k, lda), view(b, k, n, ldb));
  }
}

// To be called by a thread when its products are done: gives back what the hardware holds for it (AMX tiles).
template <typename T>
void gemm_done() {
  if constexpr (!std::is_same_v<T, double>) at::native::cpublas::brgemm_release(std::is_same_v<T, at::BFloat16>);
}

}  // namespace mem1::cpu
