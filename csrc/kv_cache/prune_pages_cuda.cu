// Block tables after pruning, on the device: a block per sequence counts the survivors of its pages and lists the pages
// that have some; how many of those the survivors fill is known when all are counted.
#include "kv_cache/prune_device.cuh"

#include <algorithm>

namespace mem1::kv_cache {
namespace {

constexpr int kThreads = 1024;
constexpr int32_t kDropped = 1, kUsed = 2;  // bits of page_uses

// Nothing can be reported from here: a page that the cache does not have is passed on, not marked.
__device__ void mark(const mem1_prune_pages_params& p, int32_t page, int32_t use) {
  if (page >= 0 && page < p.pages) atomicOr(p.page_uses + page, use);
}

__device__ void leave(const mem1_prune_pages_params& p, int64_t b, int32_t length, int64_t slots) {
  const bool length_is_valid = length >= 0 && length <= slots;
  for (int32_t at = threadIdx.x; at < p.sequence_pages; at += kThreads) {
    const int64_t entry = b * p.sequence_pages + at;
    const int64_t left = length_is_valid ? length - static_cast<int64_t>(at) * p.page_size : 0;
    p.new_block_table[entry] = p.block_table[entry];
    p.page_lengths[entry] = static_cast<int32_t>(left < 0 ? 0 : left < p.page_size ? left : p.page_size);
    if (left > 0 || !length_is_valid) mark(p, p.block_table[entry], kUsed);
  }
  if (threadIdx.x == 0) p.new_lengths[b] = -1;
}

// group: pages that are counted together, several small ones or one large one.
__global__ void __launch_bounds__(kThreads) pages_kernel(const mem1_prune_pages_params p, const int32_t group) {
  using Items = Scan<kThreads>;
  __shared__ Items slots, pages;
  const int64_t b = blockIdx.x, all_slots = static_cast<int64_t>(p.sequence_pages) * p.page_size;
  const Keep keep = keep_of(p, b);
  const int32_t length = p.lengths[b];
  if (!sequence_is_valid<kThreads>(keep, length, all_slots)) return leave(p, b, length, all_slots);
  const int32_t* table = p.block_table + b * p.sequence_pages;
  int32_t *new_table = p.new_block_table + b * p.sequence_pages, *page_lengths = p.page_lengths + b * p.sequence_pages;
  const int32_t used = (length + p.page_size - 1) / p.page_size;
  int32_t survivors = 0, listed = 0;
  for (int32_t base = 0; base < used; base += group) {
    const int32_t first = base * p.page_size, stop = min(length - first, group * p.page_size) + first;
    int32_t of_group = 0;
    for (int32_t chunk = first; chunk < stop; chunk += Items::kMax) {
      of_group += slots.run(kept<kThreads>(keep, chunk, min(stop - chunk, Items::kMax)));
    }
    const auto count = [&](int32_t i) {
      if (group == 1) return of_group;
      return slots.rank(min((i + 1) * p.page_size, stop - first)) - slots.rank(i * p.page_size);
    };
    const int32_t group_pages = min(used - base, group);
    uint32_t live = 0;
#pragma unroll
    for (int n = 0; n < Items::kItems; ++n) {
      if (Items::item(n) < group_pages && count(Items::item(n)) > 0) live |= 1u << n;
    }
    const int32_t found = pages.run(live);
    for (int32_t i = threadIdx.x; i < group_pages; i += kThreads) {
      if (!pages.flagged(i)) {
        mark(p, table[base + i], kDropped);
        continue;
      }
      new_table[listed + pages.rank(i)] = table[base + i];
      page_lengths[listed + pages.rank(i)] = count(i);
    }
    survivors += of_group;
    listed += found;
    __syncthreads();
  }
  const int32_t stay = p.within_pages ? listed : (survivors + p.page_size - 1) / p.page_size;
  for (int32_t at = threadIdx.x; at < p.sequence_pages; at += kThreads) {
    if (at < listed) mark(p, new_table[at], at < stay ? kUsed : kDropped);
    if (at >= stay) {
      new_table[at] = -1;
      page_lengths[at] = 0;
    } else if (!p.within_pages) {
      page_lengths[at] = min(p.page_size, survivors - at * p.page_size);
    }
  }
  if (threadIdx.x == 0) p.new_lengths[b] = survivors;
}

}  // namespace

mem1_status prune_pages_cuda(const mem1_prune_pages_params& p, void* stream, mem1_error* error) {
  if (p.batch == 0) return MEM1_OK;
  const int32_t group = std::max(1, std::min(Scan<kThreads>::kMax / p.page_size, p.sequence_pages));
  pages_kernel<<<static_cast<unsigned>(p.batch), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, group);
  return check_launch("prune_pages", error);
}

}  // namespace mem1::kv_cache
