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

constexpr int64_t kBlock = 64;   // rows of the weight
constexpr int64_t kShares = 16;  // of the vocabulary, whose sums are made apart

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

template <typename Body>
void over_blocks(int64_t vocabulary, const Body& body) {
  at::parallel_for(0, (vocabulary + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      body(block * kBlock, std::min(kBlock, vocabulary - block * kBlock));
    }
    gemm_done<float>();
  });
}

template <typename In>
void logits_of(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& logits) {
  const int64_t rows = hidden.size(0), width = hidden.size(1), ld = logits.stride(0);
  const In* weights = weight.const_data_ptr<In>();
  float* out = logits.data_ptr<float>();
  std::vector<float> wide, columns(rows * width);
  transpose(as_floats(hidden.const_data_ptr<In>(), rows * width, wide), rows, width, width, columns.data(), rows);
  over_blocks(weight.size(0), [&](int64_t first, int64_t count) {
    thread_local std::vector<float> scratch, tile;
    tile.resize(kBlock * rows);
    const float* block = as_floats(weights + first * width, count * width, scratch);
    gemm(count, rows, width, block, width, columns.data(), rows, tile.data(), rows, false);
    transpose(tile.data(), count, rows, rows, out + first, ld);
  });
}

template <typename In>
void hidden_gradient(const at::Tensor& d_logits, const at::Tensor& weight, const at::Tensor& d_hidden) {
  const int64_t rows = d_hidden.size(0), width = d_hidden.size(1), vocabulary = weight.size(0), ld = d_logits.stride(0);
  const float* slopes = d_logits.const_data_ptr<float>();
  const In* weights = weight.const_data_ptr<In>();
  In* out = d_hidden.data_ptr<In>();
  const int64_t blocks = (vocabulary + kBlock - 1) / kBlock, shares = std::min(kShares, blocks);
  std::vector<float> sums(shares * rows * width);
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch;
    for (int64_t share = begin; share < end; ++share) {
      const int64_t first = share * blocks / shares * kBlock;
      const int64_t stop = std::min((share + 1) * blocks / shares * kBlock, vocabulary);
      for (int64_t v = first; v < stop; v += kBlock) {
        const int64_t count = std::min(kBlock, stop - v);
        gemm(rows, width, count, slopes + v, ld, as_floats(weights + v * width, count * width, scratch), width,
             sums.data() + share * rows * width, width, v > first);
      }
    }
    gemm_done<float>();
  });
  at::parallel_for(0, rows * width, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      float sum = 0;
      for (int64_t share = 0; share < shares; ++share) sum += sums[share * rows * width + n];
      out[n] = static_cast<In>(sum);
    }
  });
}

template <typename In>
void weight_gradient(const at::Tensor& d_logits, const at::Tensor& hidden, const at::Tensor& d_weight,
                     bool accumulate) {
  const int64_t rows = hidden.size(0), width = hidden.size(1), ld = d_logits.stride(0);
  const float* slopes = d_logits.const_data_ptr<float>();
  float* out = d_weight.data_ptr<float>();
  std::vector<float> wide;
  const float* states = as_floats(hidden.const_data_ptr<In>(), rows * width, wide);
  over_blocks(d_weight.size(0), [&](int64_t first, int64_t count) {
    thread_local std::vector<float> tile;
    tile.resize(kBlock * rows);
    transpose(slopes + first, rows, count, ld, tile.data(), rows);
    gemm(count, width, rows, tile.data(), rows, states, width, out + first * width, width, accumulate);
  });
}

void check(const char* name, const at::Tensor& t, at::IntArrayRef shape, at::ScalarType dtype, bool strided = false) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, ": wanted ", dtype, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.sizes() == shape && (t.is_contiguous() || (strided && t.stride(1) == 1)), name,
                    ": wanted contiguous ", shape, ", got ", t.sizes(), " with strides ", t.strides());
}

template <typename Run>
void dispatch(at::ScalarType dtype, const Run& run) {
  switch (dtype) {
    case at::kFloat:
      return run(float{});
    case at::kBFloat16:
      return run(at::BFloat16{});
    case at::kHalf:
      return run(at::Half{});
    default:
      TORCH_CHECK_TYPE(false, "weight: wanted float32, bfloat16 or float16, got ", dtype);
  }
}

}  // namespace

void linear_logits_(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& logits) {
  check("hidden", hidden, {hidden.size(0), weight.size(1)}, weight.scalar_type());
  check("weight", weight, weight.sizes(), weight.scalar_type());
  check("logits", logits, {hidden.size(0), weight.size(0)}, at::kFloat, true);
  if (logits.numel() == 0) return;
  dispatch(weight.scalar_type(), [&](auto zero) { logits_of<decltype(zero)>(hidden, weight, logits); });
}

void linear_hidden_gradient_(const at::Tensor& d_logits, const at::Tensor& weight, const at::Tensor& d_hidden) {
  check("d_logits", d_logits, {d_hidden.size(0), weight.size(0)}, at::kFloat, true);
  check("weight", weight, weight.sizes(), weight.scalar_type());
  check("d_hidden", d_hidden, {d_hidden.size(0), weight.size(1)}, weight.scalar_type());
  if (d_hidden.numel() == 0) return;
  dispatch(weight.scalar_type(), [&](auto zero) { hidden_gradient<decltype(zero)>(d_logits, weight, d_hidden); });
}

void linear_weight_gradient_(const at::Tensor& d_logits, const at::Tensor& hidden, const at::Tensor& d_weight,
                             bool accumulate) {
  check("d_logits", d_logits, {hidden.size(0), d_weight.size(0)}, at::kFloat, true);
  check("hidden", hidden, {hidden.size(0), d_weight.size(1)}, hidden.scalar_type());
  check("d_weight", d_weight, d_weight.sizes(), at::kFloat);
  if (hidden.size(0) == 0) return;
  dispatch(hidden.scalar_type(),
           [&](auto zero) { weight_gradient<decltype(zero)>(d_logits, hidden, d_weight, accumulate); });
}

}  // namespace mem1::cpu
