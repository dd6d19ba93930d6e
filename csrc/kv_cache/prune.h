// Pruning's backends, and what both make of the parameters. Arguments were validated by prune.cpp.
#pragma once

#include "common/host_device.h"
#include "mem1/mem1.h"

namespace mem1::kv_cache {

constexpr int32_t kMaxLayersCuda = 128;  // their addresses are arguments of one launch
constexpr int32_t kMaxRotatedDim = 1024;

// Bytes, 0 for what is no mem1_dtype.
inline int32_t element_size(mem1_dtype dtype) {
  switch (dtype) {
    case MEM1_FLOAT64:
      return 8;
    case MEM1_FLOAT32:
      return 4;
    case MEM1_FLOAT16:
    case MEM1_BFLOAT16:
      return 2;
    case MEM1_BITS8:
      return 1;
  }
  return 0;
}

// Which slots of a sequence stay; one way to ask for both forms.
struct Keep {
  const uint8_t* mask;    // [slots], or null
  const int32_t* ranges;  // [range_count, 2]
  int32_t range_count;

  MEM1_HOST_DEVICE bool operator()(int32_t slot) const {
    if (mask != nullptr) return mask[slot] != 0;
    int32_t low = 0, high = range_count;  // the first range that ends after the slot
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (ranges[2 * middle + 1] > slot) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low < range_count && ranges[2 * low] <= slot;
  }
};

// For either parameter struct: they name these members alike.
template <typename Params>
MEM1_HOST_DEVICE Keep keep_of(const Params& p, int64_t b) {
  return {p.mask == nullptr ? nullptr : p.mask + b * p.mask_stride_batch,
          p.ranges == nullptr ? nullptr : p.ranges + b * p.range_count * 2, p.range_count};
}

inline MEM1_HOST_DEVICE bool range_is_valid(const int32_t* ranges, int32_t index, int32_t length) {
  const int32_t begin = ranges[2 * index], end = ranges[2 * index + 1];
  const int32_t before = index == 0 ? 0 : ranges[2 * index - 1];
  return before <= begin && begin <= end && end <= length;
}

void prune_kv_cache_cpu(const mem1_prune_kv_cache_params& p);
mem1_status prune_pages_cpu(const mem1_prune_pages_params& p, mem1_error* error);
mem1_status prune_kv_cache_cuda(const mem1_prune_kv_cache_params& p, void* stream, mem1_error* error);
mem1_status prune_pages_cuda(const mem1_prune_pages_params& p, void* stream, mem1_error* error);

}  // namespace mem1::kv_cache
