// The tile plan's backends: the same two passes for either device. Arguments were validated by tile_plan.cpp.
#pragma once

#include "common/host_device.h"
#include "mem1/mem1.h"

namespace mem1::tile_plan {

inline MEM1_HOST_DEVICE int32_t tiles(int32_t length, int32_t block) { return (length + block - 1) / block; }

struct Range {
  int32_t begin, full_begin, full_end, end;
};

// The live and full query tiles of a key tile that starts at key `first` and whose evict values span [min_evict,
// max_evict].
inline MEM1_HOST_DEVICE Range key_range(const mem1_tile_plan_params& p, int32_t first, int32_t min_evict,
                                        int32_t max_evict) {
  const int32_t last = (first + p.block_k < p.length ? first + p.block_k : p.length) - 1;
  const int32_t begin = first / p.block_q;
  const int32_t end = (max_evict - 1) / p.block_q + 1;
  // Full: the tile's first query comes after (or is) the last key, its last query before the first eviction. The last
  // query tile may be cut short by the stream's end, so a key that is never evicted fills it as well.
  int32_t full_begin = tiles(last, p.block_q);
  int32_t full_end = min_evict == p.length ? tiles(p.length, p.block_q) : min_evict / p.block_q;
  if (full_begin > end) full_begin = end;
  if (full_end > end) full_end = end;
  // A key tile that the stream's end cuts short is never full: whoever reads all block_k keys of it must mask.
  if (full_end < full_begin || first + p.block_k > p.length) full_begin = full_end = end;
  return {begin, full_begin, full_end, end};
}

mem1_status ranges_cpu(const mem1_tile_plan_params& p, mem1_error* error);
void lists_cpu(const mem1_tile_plan_params& p);
mem1_status ranges_cuda(const mem1_tile_plan_params& p, void* stream, mem1_error* error);
mem1_status lists_cuda(const mem1_tile_plan_params& p, void* stream, mem1_error* error);

}  // namespace mem1::tile_plan
