// The functions behind the registered ops, one declaration per implementation.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>

namespace mem1 {

using TilePlanTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
TilePlanTensors tile_plan(const at::Tensor& evict, int64_t block_q, int64_t block_k);

// The same on the device, for `evict` as there and contiguous. Numbers only, as CUDA's headers are not here: torch may
// be a CPU build. The caller, in Python, has allocated the outputs, both lists at their upper bound, and has made their
// device current. Throws std::invalid_argument or std::runtime_error.
void tile_plan_cuda(uintptr_t stream, int32_t batch, int32_t length, int32_t block_q, int32_t block_k, uintptr_t evict,
                    uintptr_t key_ranges, uintptr_t full_offsets, uintptr_t full_tiles, uintptr_t partial_offsets,
                    uintptr_t partial_tiles);

namespace cpu {
struct Plan;
std::tuple<at::Tensor, at::Tensor> trajectory_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                        const Plan& plan, double scale);
std::tuple<at::Tensor, at::Tensor, at::Tensor> trajectory_attention_backward(
    const at::Tensor& d_out, const at::Tensor& d_lse, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out, const at::Tensor& lse, const Plan& plan, double scale);
}  // namespace cpu
}  // namespace mem1
