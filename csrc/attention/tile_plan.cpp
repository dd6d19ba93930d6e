// Validation and dispatch of mem1_tile_plan_*.
#include "attention/tile_plan.h"

#include "common/check.h"

namespace mem1::tile_plan {
namespace {

mem1_status validate(const mem1_tile_plan_params* p, bool lists, mem1_error* error) {
  MEM1_CHECK_PARAMS(p, mem1_tile_plan_params, error);
  MEM1_CHECK(p->batch >= 0, error, "batch: expected >= 0, got %d", p->batch);
  MEM1_CHECK(p->length >= 0 && p->length <= (1 << 30), error, "length: expected 0 to 2^30, got %d", p->length);
  MEM1_CHECK(p->block_q >= 1 && p->block_q <= (1 << 20), error, "block_q: expected 1 to 2^20, got %d", p->block_q);
  MEM1_CHECK(p->block_k >= 1 && p->block_k <= (1 << 20), error, "block_k: expected 1 to 2^20, got %d", p->block_k);
  // Rows of the lists and warps of the CUDA kernels are counted in 32 bits.
  const int64_t max_tiles = int64_t{p->batch} * tiles(p->length, p->block_q < p->block_k ? p->block_q : p->block_k);
  MEM1_CHECK(max_tiles <= INT32_MAX, error,
             "block_q, block_k: expected at most 2^31 - 1 query tiles and key tiles, got %lld: take larger blocks",
             static_cast<long long>(max_tiles));
  MEM1_CHECK(p->full_offsets != nullptr, error, "full_offsets: expected a pointer, got NULL");
  MEM1_CHECK(p->partial_offsets != nullptr, error, "partial_offsets: expected a pointer, got NULL");
  if (p->batch > 0 && p->length > 0) {
    MEM1_CHECK(lists || p->evict != nullptr, error, "evict: expected a pointer, got NULL");
    MEM1_CHECK(p->key_ranges != nullptr, error, "key_ranges: expected a pointer, got NULL");
  }
  return MEM1_OK;
}

}  // namespace

#if !defined(MEM1_WITH_CUDA)
mem1_status ranges_cuda(const mem1_tile_plan_params&, void*, mem1_error* error) { return not_compiled(error); }
mem1_status lists_cuda(const mem1_tile_plan_params&, void*, mem1_error* error) { return not_compiled(error); }
#endif

}  // namespace mem1::tile_plan

mem1_status mem1_tile_plan_ranges(const mem1_tile_plan_params* params, void* cuda_stream, mem1_error* error) {
  const mem1_status status = mem1::tile_plan::validate(params, false, error);
  if (status != MEM1_OK) return status;
  if (params->device == MEM1_CUDA) return mem1::tile_plan::ranges_cuda(*params, cuda_stream, error);
  return mem1::tile_plan::ranges_cpu(*params, error);
}

mem1_status mem1_tile_plan_lists(const mem1_tile_plan_params* params, void* cuda_stream, mem1_error* error) {
  const mem1_status status = mem1::tile_plan::validate(params, true, error);
  if (status != MEM1_OK) return status;
  if (params->device == MEM1_CUDA) return mem1::tile_plan::lists_cuda(*params, cuda_stream, error);
  mem1::tile_plan::lists_cpu(*params);
  return MEM1_OK;
}
