// The implementations of the registered ops, one declaration per implementation.
#pragma once

#include "mem1/mem1.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <tuple>

namespace mem1 {

// Standard exceptions, which become a ValueError and a RuntimeError whether an op or a function of _C was called.
inline void check(mem1_status status, const mem1_error& error) {
  if (status == MEM1_INVALID_ARGUMENT) throw std::invalid_argument(error.message);
  if (status != MEM1_OK) throw std::runtime_error(error.message);
}

// None for what is no floating point type of the C API.
inline std::optional<mem1_dtype> float_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return MEM1_FLOAT32;
    case at::kHalf:
      return MEM1_FLOAT16;
    case at::kBFloat16:
      return MEM1_BFLOAT16;
    case at::kDouble:
      return MEM1_FLOAT64;
    default:
      return std::nullopt;
  }
}

using TilePlanTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
TilePlanTensors tile_plan(const at::Tensor& evict, int64_t block_q, int64_t block_k);

// The same on the device, for `evict` as there and contiguous. Numbers only, as CUDA's headers are not here: torch may
// be a CPU build. The caller, in Python, has allocated the outputs, both lists at their upper bound, and has made their
// device current. Throws std::invalid_argument or std::runtime_error.
void tile_plan_cuda(uintptr_t stream, int32_t batch, int32_t length, int32_t block_q, int32_t block_k, uintptr_t evict,
                    uintptr_t key_ranges, uintptr_t full_offsets, uintptr_t full_tiles, uintptr_t partial_offsets,
                    uintptr_t partial_tiles);

// Both devices: on CUDA the caller has made it current and names the stream. `keys`, `values`, `base_keys`: lists of
// [layers, rows, slots, heads, dim]. Returns the new lengths, int32 [batch], within_rows: [batch * rows of a sequence].
at::Tensor prune_kv_cache_(at::TensorList keys, at::TensorList values, const std::optional<at::Tensor>& mask,
                           const std::optional<at::Tensor>& ranges, const at::Tensor& lengths,
                           const std::optional<at::Tensor>& inv_freq, at::TensorList base_keys,
                           const std::optional<at::Tensor>& base_positions,
                           const std::optional<at::Tensor>& source_rows, const std::optional<at::Tensor>& target_rows,
                           bool within_rows, int64_t cuda_stream);
// Returns the new table, the survivors of each of its pages, the new lengths and the uses of each page of the cache.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> prune_pages(
    const at::Tensor& block_table, const at::Tensor& lengths, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& ranges, int64_t page_size, int64_t pages, bool within_pages, bool compact,
    int64_t cuda_stream);

// Rows of logits [rows, vocabulary], fp32 or fp64, the other tensors of their dtype; see mem1.h. On CUDA as above.
// Returns logprob, entropy, max_logit and log_sum_exp, that of (z - max_logit) / T, [4, rows].
at::Tensor rows_logprob(const at::Tensor& logits, const std::optional<at::Tensor>& bias, const at::Tensor& target,
                        const at::Tensor& temperature, int64_t cuda_stream);
// The gradient replaces the logits, in `gradient_dtype`.
void rows_backward_(const at::Tensor& logits, const std::optional<at::Tensor>& bias, const at::Tensor& target,
                    const at::Tensor& temperature, const at::Tensor& max_logit, const at::Tensor& log_sum_exp,
                    const at::Tensor& entropy, const at::Tensor& d_logprob, const at::Tensor& d_entropy,
                    at::ScalarType gradient_dtype, double softcap, int64_t cuda_stream);
// Likewise; returns loss, logprob, entropy, ratio, clipped and kl, [6, rows].
at::Tensor rows_ppo_(const at::Tensor& logits, const std::optional<at::Tensor>& bias, const at::Tensor& target,
                     const at::Tensor& temperature, const at::Tensor& old_logprob, const at::Tensor& advantage,
                     const at::Tensor& scale, const std::optional<at::Tensor>& ref_logprob,
                     const std::optional<at::Tensor>& rollout_logprob, double clip_low, double clip_high,
                     std::optional<double> dual_clip, double rollout_is_cap, double kl_coef,
                     c10::string_view kl_estimator, double entropy_coef, bool with_gradient,
                     at::ScalarType gradient_dtype, double softcap, int64_t cuda_stream);
// Advantage and returns.
std::tuple<at::Tensor, at::Tensor> gae(const at::Tensor& reward, const at::Tensor& value, const at::Tensor& mask,
                                       double gamma, double lam, int64_t cuda_stream);

namespace cpu {
struct Plan;
struct Scores;
std::tuple<at::Tensor, at::Tensor> trajectory_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                        const Plan& plan, const Scores& scores,
                                                        const at::Tensor& sinks);
std::tuple<at::Tensor, at::Tensor, at::Tensor> trajectory_attention_backward(
    const at::Tensor& d_out, const at::Tensor& d_lse, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out, const at::Tensor& lse, const Plan& plan, const Scores& scores);
// The checked arguments of the op of this name; rows, lengths, counts int32 [batch]. evict: undefined, or int32
// [batch, entries], by entry of the row's slot, ascending; sinks as in last_queries.
// The products of an output layer, for hidden [n, H] and weight [V, H] of one dtype and fp32 logits [n, V] with any
// stride between rows: logits = hidden weight^T, d_hidden = d_logits weight, d_weight (+)= d_logits^T hidden in fp32,
// without the sum also in the dtype of hidden.
// d_logits may be bfloat16 beside operands of bfloat16 where linear_in_bfloat16() says so.
bool linear_in_bfloat16();
void linear_logits_(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& logits);
void linear_hidden_gradient_(const at::Tensor& d_logits, const at::Tensor& weight, const at::Tensor& d_hidden);
void linear_weight_gradient_(const at::Tensor& d_logits, const at::Tensor& hidden, const at::Tensor& d_weight,
                             bool accumulate);
at::Tensor cached_attention(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                            const at::Tensor& cache_batch_idx, const at::Tensor& cache_seqlens,
                            const at::Tensor& query_lens, const Scores& scores, std::optional<int64_t> lanes,
                            const at::Tensor& evict, const at::Tensor& sinks);
}  // namespace cpu
}  // namespace mem1
