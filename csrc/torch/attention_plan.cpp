#include "torch/ops.h"

#include "mem1/mem1.h"

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>

namespace mem1 {
namespace {

mem1_tile_plan_params params_of(mem1_device device, int32_t batch, int32_t length, int32_t block_q, int32_t block_k) {
  mem1_tile_plan_params params{};
  params.struct_size = sizeof(params);
  params.device = device;
  params.batch = batch;
  params.length = length;
  params.block_q = block_q;
  params.block_k = block_k;
  params.evict_stride_batch = length;
  return params;
}

}  // namespace

TilePlanTensors tile_plan(const at::Tensor& evict, int64_t block_q, int64_t block_k) {
  TORCH_CHECK_TYPE(evict.scalar_type() == at::kInt, "evict: expected int32, got ", evict.scalar_type());
  TORCH_CHECK_VALUE(evict.dim() == 2, "evict: expected [batch, length], got ", evict.dim(), " dimensions");
  constexpr int64_t kLargest = 1 << 20;  // before anything is made of them: the C API's are 32 bits wide
  TORCH_CHECK_VALUE(block_q > 0 && block_k > 0 && block_q <= kLargest && block_k <= kLargest,
                    "block_q, block_k: expected 1 to 2^20, got ", block_q, ", ", block_k);
  TORCH_CHECK_VALUE(evict.size(1) <= (1 << 30) && evict.size(0) <= (1 << 30), "evict: expected at most 2^30 in each ",
                    "dimension, got ", evict.sizes());
  const at::Tensor table = evict.contiguous();
  const int64_t batch = table.size(0), length = table.size(1);
  const int32_t* lifetimes = table.const_data_ptr<int32_t>();
  bool valid = true;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t j = 0; j < length; ++j) valid &= lifetimes[b * length + j] > j && lifetimes[b * length + j] <= length;
  }
  TORCH_CHECK_VALUE(valid, "evict: expected j < evict[b, j] <= ", length, " everywhere");
  const int64_t rows = batch * ((length + block_q - 1) / block_q);
  at::Tensor key_ranges = at::empty({batch, (length + block_k - 1) / block_k, 4}, table.options());
  at::Tensor full_offsets = at::empty({rows + 1}, table.options()), partial_offsets = at::empty_like(full_offsets);

  mem1_error error{};
  mem1_tile_plan_params params = params_of(MEM1_CPU, static_cast<int32_t>(batch), static_cast<int32_t>(length),
                                           static_cast<int32_t>(block_q), static_cast<int32_t>(block_k));
  params.evict = lifetimes;
  params.key_ranges = key_ranges.data_ptr<int32_t>();
  params.full_offsets = full_offsets.data_ptr<int32_t>();
  params.partial_offsets = partial_offsets.data_ptr<int32_t>();
  check(mem1_tile_plan_ranges(&params, nullptr, &error), error);

  at::Tensor full_tiles = at::empty({params.full_offsets[rows]}, table.options());
  at::Tensor partial_tiles = at::empty({params.partial_offsets[rows]}, table.options());
  params.full_tiles = full_tiles.data_ptr<int32_t>();
  params.partial_tiles = partial_tiles.data_ptr<int32_t>();
  check(mem1_tile_plan_lists(&params, nullptr, &error), error);
  return {key_ranges, full_offsets, full_tiles, partial_offsets, partial_tiles};
}

void tile_plan_cuda(uintptr_t stream, int32_t batch, int32_t length, int32_t block_q, int32_t block_k, uintptr_t evict,
                    uintptr_t key_ranges, uintptr_t full_offsets, uintptr_t full_tiles, uintptr_t partial_offsets,
                    uintptr_t partial_tiles) {
  mem1_error error{};
  mem1_tile_plan_params params = params_of(MEM1_CUDA, batch, length, block_q, block_k);
  params.evict = reinterpret_cast<const int32_t*>(evict);
  params.key_ranges = reinterpret_cast<int32_t*>(key_ranges);
  params.full_offsets = reinterpret_cast<int32_t*>(full_offsets);
  params.full_tiles = reinterpret_cast<int32_t*>(full_tiles);
  params.partial_offsets = reinterpret_cast<int32_t*>(partial_offsets);
  params.partial_tiles = reinterpret_cast<int32_t*>(partial_tiles);
  void* cuda_stream = reinterpret_cast<void*>(stream);
  check(mem1_tile_plan_ranges(&params, cuda_stream, &error), error);
  check(mem1_tile_plan_lists(&params, cuda_stream, &error), error);
}

}  // namespace mem1
