// The three matrix products of an output layer on the CPU, on oneDNN's block products: logits, and what their gradient
// gives to the hidden states and to the weight. The weight is far larger than the caches: each product reads it, or
// writes its gradient, once a call, in blocks of rows. Sums are float in an order that does not depend on the threads.
#include "torch/gemm_cpu.h"
#include "torch/ops.h"
#include "torch/pack_cpu.h"

#include <ATen/Parallel.h>
#include <c10/util/Half.h>

namespace mem1::cpu {
namespace {

constexpr int64_t kShares = 16;  // of the vocabulary, whose sums are made apart

// Products run in T on operands that are In: float on anything, widened, or bfloat16 as it is, whose sums are float too
// and which wants an even inner dimension.
template <typename T>
constexpr bool kPairs = std::is_same_v<T, at::BFloat16>;
template <typename T>
constexpr int64_t kBlock = kPairs<T> ? 256 : 64;  // rows of the weight
// Sizes of products, which are compiled and kept for each: few kinds, and an even number of terms.
constexpr int64_t whole(int64_t n) { return round_up(n, 16); }

// A product reads all of its right operand again for every few rows of the left one: pieces of this size stay in the
// second-level cache.
constexpr int64_t kDepth = 512, kColumns = 128;

// At least n elements, in an odd number of cache lines: rows that lie a power of two apart share few places of a cache.
template <typename T>
constexpr int64_t odd_lines(int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return (round_up(n, kLine) / kLine | 1) * kLine;
}

// C[M, N] (+)= A[M, K] B[K, N]. Strides of B are those of gemm_cpu.h.
template <typename T>
void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc,
             bool accumulate) {
  for (int64_t column = 0; column < n; column += kColumns) {
    for (int64_t row = 0; row < k; row += kDepth) {
      gemm(m, std::min(kColumns, n - column), std::min(kDepth, k - row), a + row, lda,
           b + row * ldb + column * (kPairs<T> ? 2 : 1), ldb, c + column, ldc, accumulate || row > 0);
    }
  }
}

// Rows of a matrix as floats: where they lie, or widened into `scratch`.
template <typename In>
const float* as_floats(const In* from, int64_t count, std::vector<float>& scratch) {
  if constexpr (std::is_same_v<In, float>) {
    return from;
  } else {
    scratch.resize(count);
    for (int64_t n = 0; n < count; ++n) scratch[n] = static_cast<float>(from[n]);
    return scratch.data();
  }
}

// Rows [count, width] as the left operand of a product in T, which is In or float.
template <typename T, typename In>
const T* left(const In* from, int64_t count, std::vector<float>& scratch) {
  if constexpr (std::is_same_v<T, In>) {
    return from;
  } else {
    return as_floats(from, count, scratch);
  }
}

// Rows [count, width] of a matrix as the right operand with `ld` columns; bfloat16 in pairs of rows, the last one
// beside zeros if it is alone.
template <typename T, typename In>
void pack_right(const In* from, int64_t count, int64_t width, int64_t ld_from, std::vector<T>& to, int64_t ld) {
  to.resize(whole(count) * ld);
  std::fill(to.begin() + (kPairs<T> ? round_up(count, 2) : count) * ld, to.end(), T(0));
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t d = 0; d < width; ++d) to[r * ld + d] = static_cast<float>(from[r * ld_from + d]);
    }
  } else {
    const auto* in = reinterpret_cast<const uint16_t*>(from);
    auto* out = reinterpret_cast<uint32_t*>(to.data());
    for (int64_t r = 0; r < count; r += 2) {
      const uint16_t *low = in + r * ld_from, *high = r + 1 < count ? low + ld_from : nullptr;
      uint32_t* pair = out + r / 2 * ld;
      for (int64_t d = 0; d < width; ++d) {
        pair[d] = low[d] | (high == nullptr ? 0u : static_cast<uint32_t>(high[d]) << 16);
      }
    }
  }
}

template <typename T, typename Body>
void over_blocks(int64_t vocabulary, const Body& body) {
  at::parallel_for(0, (vocabulary + kBlock<T> - 1) / kBlock<T>, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      body(block * kBlock<T>, std::min(kBlock<T>, vocabulary - block * kBlock<T>));
    }
    gemm_done<T>();
  });
}

template <typename T, typename In>
void logits_of(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& logits) {
  const int64_t rows = hidden.size(0), width = hidden.size(1), ld = logits.stride(0);
  const In* weights = weight.const_data_ptr<In>();
  float* out = logits.data_ptr<float>();
  std::vector<float> wide;
  const int64_t padded = odd_lines<float>(rows);
  std::vector<T> columns(padded * width);
  transposed_operand(left<T>(hidden.const_data_ptr<In>(), rows * width, wide), rows, width, columns.data(), padded);
  over_blocks<T>(weight.size(0), [&](int64_t first, int64_t count) {
    thread_local std::vector<float> scratch, tile;
    tile.resize(kBlock<T> * padded);
    const T* block = left<T>(weights + first * width, count * width, scratch);
    product(count, whole(rows), width, block, width, columns.data(), padded, tile.data(), padded, false);
    transpose(tile.data(), count, rows, padded, out + first, ld);
  });
}

template <typename T, typename In>
void hidden_gradient(const at::Tensor& d_logits, const at::Tensor& weight, const at::Tensor& d_hidden) {
  const int64_t rows = d_hidden.size(0), width = d_hidden.size(1), vocabulary = weight.size(0), ld = d_logits.stride(0);
  const T* grads = d_logits.const_data_ptr<T>();
  const In* weights = weight.const_data_ptr<In>();
  In* out = d_hidden.data_ptr<In>();
  const int64_t blocks = (vocabulary + kBlock<T> - 1) / kBlock<T>, parts = std::min(kShares, blocks);
  const int64_t ld_own = odd_lines<T>(kBlock<T>), ld_block = odd_lines<float>(kColumns);
  const int64_t size = whole(rows) * width;
  std::vector<float> sums(parts * size);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> block, own(whole(rows) * ld_own);
    for (int64_t part = begin; part < end; ++part) {
      float* sum = sums.data() + part * size;
      for (int64_t b = part * blocks / parts; b < (part + 1) * blocks / parts; ++b) {
        const int64_t first = b * kBlock<T>, count = std::min(kBlock<T>, vocabulary - first);
        for (int64_t r = 0; r < rows; ++r) {
          std::fill(std::copy_n(grads + r * ld + first, count, own.data() + r * ld_own), own.data() + (r + 1) * ld_own,
                    T(0));
        }
        for (int64_t column = 0; column < width; column += kColumns) {
          const int64_t columns = std::min(kColumns, width - column);
          pack_right(weights + first * width + column, count, columns, width, block, ld_block);
          gemm(whole(rows), columns, whole(count), own.data(), ld_own, block.data(), ld_block, sum + column, width,
               b > part * blocks / parts);
        }
      }
    }
    gemm_done<T>();
  });
  at::parallel_for(0, rows * width, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      float sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += sums[part * size + n];
      out[n] = static_cast<In>(sum);
    }
  });
}

template <typename T, typename In>
void weight_gradient(const at::Tensor& d_logits, const at::Tensor& hidden, const at::Tensor& d_weight,
                     bool accumulate) {
  const int64_t rows = hidden.size(0), width = hidden.size(1), ld = d_logits.stride(0);
  const int64_t padded = whole(rows), ld_tile = odd_lines<T>(padded), ld_states = odd_lines<float>(width);
  const T* grads = d_logits.const_data_ptr<T>();
  const bool narrow = !std::is_same_v<In, float> && d_weight.scalar_type() != at::kFloat;
  void* out = d_weight.data_ptr();
  std::vector<T> states;
  pack_right(hidden.const_data_ptr<In>(), rows, width, width, states, ld_states);
  over_blocks<T>(d_weight.size(0), [&](int64_t first, int64_t count) {
    thread_local std::vector<T> tile;
    thread_local std::vector<float> sums;
    tile.resize(kBlock<T> * ld_tile);
    transpose(grads + first, rows, count, ld, tile.data(), ld_tile);
    for (int64_t v = 0; v < count; ++v) std::fill_n(tile.data() + v * ld_tile + rows, padded - rows, T(0));
    float* own = static_cast<float*>(out) + first * width;
    if (narrow) {
      sums.resize(kBlock<T> * width);
      own = sums.data();
    }
    product(count, width, padded, tile.data(), ld_tile, states.data(), ld_states, own, width, accumulate);
    if (narrow) std::copy_n(own, count * width, static_cast<In*>(out) + first * width);
  });
}

void check(const char* name, const at::Tensor& t, at::IntArrayRef shape, at::ScalarType dtype, bool strided = false) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, ": expected ", dtype, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.sizes() == shape && (t.is_contiguous() || (strided && t.stride(1) == 1)), name,
                    ": expected contiguous ", shape, ", got ", t.sizes(), " with strides ", t.strides());
}

template <typename T>
struct Type {
  using type = T;
};

// run(T, In): the types of the products and of the operands.
template <typename Run>
void dispatch(at::ScalarType dtype, bool in_bfloat16, const Run& run) {
  switch (dtype) {
    case at::kFloat:
      return run(Type<float>{}, Type<float>{});
    case at::kBFloat16:
      return in_bfloat16 ? run(Type<at::BFloat16>{}, Type<at::BFloat16>{}) : run(Type<float>{}, Type<at::BFloat16>{});
    case at::kHalf:
      return run(Type<float>{}, Type<at::Half>{});
    default:
      TORCH_CHECK_TYPE(false, "weight: expected float32, bfloat16 or float16, got ", dtype);
  }
}

// Gradients of logits are float, or bfloat16 where the operands are and the processor multiplies it.
bool check_gradient(const at::Tensor& d_logits, at::IntArrayRef shape, at::ScalarType operands) {
  const bool narrow = d_logits.scalar_type() == at::kBFloat16;
  check("d_logits", d_logits, shape, narrow ? operands : at::kFloat, true);
  TORCH_CHECK_TYPE(!narrow || has_bfloat16_products(), "d_logits: expected float32 on this processor, got bfloat16");
  return narrow;
}

}  // namespace

bool linear_in_bfloat16() { return has_bfloat16_products(); }

void linear_logits_(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& logits) {
  check("hidden", hidden, {hidden.size(0), weight.size(1)}, weight.scalar_type());
  check("weight", weight, weight.sizes(), weight.scalar_type());
  check("logits", logits, {hidden.size(0), weight.size(0)}, at::kFloat, true);
  if (logits.numel() == 0) return;
  // Products of bfloat16 are exact in float: which way they are made, only the order of the sums tells.
  dispatch(weight.scalar_type(), weight.size(1) % 2 == 0 && has_bfloat16_products(), [&](auto product, auto in) {
    logits_of<typename decltype(product)::type, typename decltype(in)::type>(hidden, weight, logits);
  });
}

void linear_hidden_gradient_(const at::Tensor& d_logits, const at::Tensor& weight, const at::Tensor& d_hidden) {
  const bool narrow = check_gradient(d_logits, {d_hidden.size(0), weight.size(0)}, weight.scalar_type());
  check("weight", weight, weight.sizes(), weight.scalar_type());
  check("d_hidden", d_hidden, {d_hidden.size(0), weight.size(1)}, weight.scalar_type());
  if (d_hidden.numel() == 0) return;
  dispatch(weight.scalar_type(), narrow, [&](auto product, auto in) {
    hidden_gradient<typename decltype(product)::type, typename decltype(in)::type>(d_logits, weight, d_hidden);
  });
}

void linear_weight_gradient_(const at::Tensor& d_logits, const at::Tensor& hidden, const at::Tensor& d_weight,
                             bool accumulate) {
  const bool narrow = check_gradient(d_logits, {hidden.size(0), d_weight.size(0)}, hidden.scalar_type());
  check("hidden", hidden, {hidden.size(0), d_weight.size(1)}, hidden.scalar_type());
  const bool summed = accumulate || d_weight.scalar_type() != hidden.scalar_type();
  check("d_weight", d_weight, d_weight.sizes(), summed ? at::kFloat : hidden.scalar_type());
  if (hidden.size(0) == 0) return;
  dispatch(hidden.scalar_type(), narrow, [&](auto product, auto in) {
    weight_gradient<typename decltype(product)::type, typename decltype(in)::type>(d_logits, hidden, d_weight,
                                                                                   accumulate);
  });
}

}  // namespace mem1::cpu
