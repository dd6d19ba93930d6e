// The functions behind the registered ops, one declaration per implementation.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace mem1 {

using TilePlanTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
TilePlanTensors tile_plan(const at::Tensor& evict, int64_t block_q, int64_t block_k);

namespace cpu {
struct Plan;
std::tuple<at::Tensor, at::Tensor> trajectory_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                        const Plan& plan, double scale);
std::tuple<at::Tensor, at::Tensor, at::Tensor> trajectory_attention_backward(
    const at::Tensor& d_out, const at::Tensor& d_lse, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out, const at::Tensor& lse, const Plan& plan, double scale);
}  // namespace cpu
}  // namespace mem1
