// Validation and dispatch of mem1_prune_*.
#include "kv_cache/prune.h"

#include "common/check.h"

namespace mem1::kv_cache {
namespace {

// What the two parameter structs have in common, under the names that a caller knows.
template <typename Params>
mem1_status validate_keep(const Params& p, int32_t rows, int32_t row_slots, mem1_error* error) {
  MEM1_CHECK(p.batch >= 0 && rows >= 0 && row_slots >= 0, error, "batch, rows, slots: expected >= 0, got %d, %d, %d",
             p.batch, rows, row_slots);
  MEM1_CHECK(int64_t{rows} * row_slots <= (1 << 30), error, "slots: expected at most 2^30 in a sequence, got %d x %d",
             rows, row_slots);
  MEM1_CHECK(int64_t{p.batch} * rows <= INT32_MAX, error, "batch: expected at most 2^31 - 1 rows in all, got %d x %d",
             p.batch, rows);
  MEM1_CHECK(p.range_count >= 0, error, "range_count: expected >= 0, got %d", p.range_count);
  if (p.batch == 0) return MEM1_OK;
  MEM1_CHECK(p.lengths != nullptr, error, "lengths: expected a pointer, got NULL");
  // Nothing to keep is said by ranges without a single one.
  MEM1_CHECK(p.mask == nullptr || p.ranges == nullptr, error, "mask, ranges: expected one of them, got both");
  MEM1_CHECK(p.mask != nullptr || p.ranges != nullptr || p.range_count == 0, error,
             "ranges: expected a pointer for %d ranges, got NULL", p.range_count);
  if (p.device == MEM1_CUDA) return MEM1_OK;  // the values are checked there
  for (int64_t b = 0; b < p.batch; ++b) {
    const int32_t length = p.lengths[b];
    MEM1_CHECK(length >= 0 && length <= rows * row_slots, error, "lengths[%lld]: expected 0 to %d, got %d",
               static_cast<long long>(b), rows * row_slots, length);
    const Keep keep = keep_of(p, b);
    for (int32_t i = 0; keep.mask == nullptr && i < keep.range_count; ++i) {
      MEM1_CHECK(
          range_is_valid(keep.ranges, i, length), error,
          "keep[%lld]: expected ranges [begin, end) in order, not overlapping, up to the length %d, got [%d, %d) "
          "as range %d%s",
          static_cast<long long>(b), length, keep.ranges[2 * i], keep.ranges[2 * i + 1], i,
          i == 0 || keep.ranges[2 * i] >= keep.ranges[2 * i - 1] ? "" : ", which begins before the one before it ends");
    }
  }
  return MEM1_OK;
}

mem1_status validate(const mem1_prune_kv_cache_params* p, mem1_error* error) {
  MEM1_CHECK_PARAMS(p, mem1_prune_kv_cache_params, error);
  const mem1_status status = validate_keep(*p, p->sequence_rows, p->row_slots, error);
  if (status != MEM1_OK) return status;
  MEM1_CHECK(element_size(p->dtype) != 0, error, "dtype: expected a mem1_dtype, got %d", static_cast<int>(p->dtype));
  MEM1_CHECK(p->layers >= 0 && p->heads >= 0 && p->head_dim >= 0, error,
             "layers, heads, head_dim: expected >= 0, got %d, %d, %d", p->layers, p->heads, p->head_dim);
  MEM1_CHECK(p->device == MEM1_CPU || p->layers <= kMaxLayersCuda, error,
             "layers: expected at most %d on CUDA, got %d: prune the rest in another call", kMaxLayersCuda, p->layers);
  MEM1_CHECK(p->within_rows == 0 || p->within_rows == 1, error, "within_rows: expected 0 or 1, got %d", p->within_rows);
  MEM1_CHECK(p->within_rows == 0 || p->inv_freq == nullptr, error,
             "inv_freq: expected NULL with within_rows, where no key gets a new position");
  MEM1_CHECK(p->inv_freq == nullptr || (p->head_dim % 2 == 0 && p->head_dim <= kMaxRotatedDim), error,
             "head_dim: expected an even one of at most %d to rotate keys, got %d", kMaxRotatedDim, p->head_dim);
  MEM1_CHECK(p->inv_freq == nullptr || p->dtype != MEM1_BITS8, error,
             "dtype: expected a floating point type to rotate keys, got MEM1_BITS8");
  MEM1_CHECK(p->base_keys == nullptr || p->inv_freq != nullptr, error, "inv_freq: expected a pointer with base_keys");
  MEM1_CHECK(p->base_keys == nullptr || p->base_positions != nullptr || p->batch == 0, error,
             "base_positions: expected a pointer with base_keys, got NULL");
  MEM1_CHECK(p->base_positions == nullptr || p->base_positions != p->new_base_positions, error,
             "new_base_positions: expected another array than base_positions");
  if (p->batch == 0 || p->layers == 0) return MEM1_OK;
  MEM1_CHECK(p->keys != nullptr && p->values != nullptr, error, "keys, values: expected lists of pointers, got NULL");
  for (int32_t layer = 0; layer < p->layers; ++layer) {
    MEM1_CHECK(p->keys[layer] != nullptr && p->values[layer] != nullptr &&
                   (p->base_keys == nullptr || p->base_keys[layer] != nullptr),
               error, "keys, values, base_keys: expected a pointer for layer %d, got NULL", layer);
  }
  return MEM1_OK;
}

mem1_status validate(const mem1_prune_pages_params* p, mem1_error* error) {
  MEM1_CHECK_PARAMS(p, mem1_prune_pages_params, error);
  const mem1_status status = validate_keep(*p, p->sequence_pages, p->page_size, error);
  if (status != MEM1_OK) return status;
  MEM1_CHECK(p->page_size >= 1, error, "page_size: expected >= 1, got %d", p->page_size);
  MEM1_CHECK(p->pages >= 0, error, "pages: expected >= 0, got %d", p->pages);
  MEM1_CHECK(p->within_pages == 0 || p->within_pages == 1, error, "within_pages: expected 0 or 1, got %d",
             p->within_pages);
  MEM1_CHECK(p->compact == 0 || (p->compact == 1 && p->within_pages == 0), error,
             "compact: expected 0, or 1 without within_pages, got %d", p->compact);
  if (p->batch == 0) return MEM1_OK;
  MEM1_CHECK(p->new_lengths != nullptr, error, "new_lengths: expected a pointer, got NULL");
  MEM1_CHECK(p->page_uses != nullptr || p->pages == 0, error, "page_uses: expected a pointer, got NULL");
  if (p->sequence_pages == 0) return MEM1_OK;
  MEM1_CHECK(p->block_table != nullptr, error, "block_table: expected a pointer, got NULL");
  MEM1_CHECK(p->page_lengths != nullptr, error, "page_lengths: expected a pointer, got NULL");
  MEM1_CHECK(p->new_block_table != nullptr && p->new_block_table != p->block_table, error,
             "new_block_table: expected another array than block_table");
  return MEM1_OK;
}

}  // namespace

#if !defined(MEM1_WITH_CUDA)
mem1_status prune_kv_cache_cuda(const mem1_prune_kv_cache_params&, void*, mem1_error* error) {
  return not_compiled(error);
}
mem1_status prune_pages_cuda(const mem1_prune_pages_params&, void*, mem1_error* error) { return not_compiled(error); }
#endif

}  // namespace mem1::kv_cache

mem1_status mem1_prune_kv_cache(const mem1_prune_kv_cache_params* params, void* cuda_stream, mem1_error* error) {
  const mem1_status status = mem1::kv_cache::validate(params, error);
  if (status != MEM1_OK) return status;
  if (params->device == MEM1_CUDA) return mem1::kv_cache::prune_kv_cache_cuda(*params, cuda_stream, error);
  mem1::kv_cache::prune_kv_cache_cpu(*params);
  return MEM1_OK;
}

mem1_status mem1_prune_pages(const mem1_prune_pages_params* params, void* cuda_stream, mem1_error* error) {
  const mem1_status status = mem1::kv_cache::validate(params, error);
  if (status != MEM1_OK) return status;
  if (params->device == MEM1_CUDA) return mem1::kv_cache::prune_pages_cuda(*params, cuda_stream, error);
  return mem1::kv_cache::prune_pages_cpu(*params, error);
}
