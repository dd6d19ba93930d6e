// Block tables after pruning, on the CPU.
#include "kv_cache/prune.h"

#include "common/check.h"

#include <algorithm>

namespace mem1::kv_cache {
namespace {

struct Page {
  int32_t page;       // in the cache
  int32_t survivors;  // of this sequence
  bool unmoved;       // nothing before the last survivor is dead
  bool last;          // nothing survives after this page
};

// Calls visit(Page) for the pages in use of sequence b, in order.
template <typename Visit>
void for_each_page(const mem1_prune_pages_params& p, int64_t b, Visit visit) {
  const Keep keep = keep_of(p, b);
  const int32_t length = p.lengths[b];
  int32_t last_survivor = -1;
  for (int32_t slot = length - 1; slot >= 0 && last_survivor < 0; --slot) {
    if (keep(slot)) last_survivor = slot;
  }
  for (int32_t first = 0, at = 0; first < length; first += p.page_size, ++at) {
    const int32_t stop = std::min(first + p.page_size, length);
    Page page{p.block_table[b * p.sequence_pages + at], 0, true, last_survivor < stop};
    for (int32_t slot = first; slot < stop; ++slot) {
      if (!keep(slot)) continue;
      page.unmoved &= page.survivors == slot - first;
      ++page.survivors;
    }
    visit(page);
  }
}

mem1_status check_pages(const mem1_prune_pages_params& p, mem1_error* error) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int32_t used = (p.lengths[b] + p.page_size - 1) / p.page_size;
    for (int32_t at = 0; at < used; ++at) {
      const int32_t page = p.block_table[b * p.sequence_pages + at];
      MEM1_CHECK(page >= 0 && page < p.pages, error, "block_table[%lld, %d]: expected a page below %d, got %d",
                 static_cast<long long>(b), at, p.pages, page);
    }
  }
  return MEM1_OK;
}

// The first page that several sequences use and one of them would change; -1 for none. `uses` is zero before and after.
int32_t changed_shared_page(const mem1_prune_pages_params& p) {
  int32_t found = -1;
  for (int64_t b = 0; b < p.batch; ++b) {
    for_each_page(p, b, [&](const Page& page) { ++p.page_uses[page.page]; });
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    bool aligned = true;  // so far the survivors fill whole pages, and, if positions count, nothing has left
    for_each_page(p, b, [&](const Page& page) {
      if (page.survivors == 0) {
        aligned &= p.compact == 0;
        return;
      }
      const bool full = page.survivors == p.page_size;
      const bool kept = page.unmoved && (p.within_pages || (aligned && (full || page.last)));
      aligned &= full;
      if (p.page_uses[page.page] > 1 && !kept && found < 0) found = page.page;
    });
  }
  std::fill(p.page_uses, p.page_uses + p.pages, 0);
  return found;
}

}  // namespace

mem1_status prune_pages_cpu(const mem1_prune_pages_params& p, mem1_error* error) {
  const mem1_status status = check_pages(p, error);
  if (status != MEM1_OK) return status;
  const int32_t shared = changed_shared_page(p);
  MEM1_CHECK(
      shared < 0, error,
      "keep: expected page %d, which several sequences use, dropped or kept whole and in its place, got one that "
      "would change it",
      shared);
  constexpr int32_t kDropped = 1, kUsed = 2;
  for (int64_t b = 0; b < p.batch; ++b) {
    int32_t *table = p.new_block_table + b * p.sequence_pages, *lengths = p.page_lengths + b * p.sequence_pages;
    std::fill(table, table + p.sequence_pages, -1);
    std::fill(lengths, lengths + p.sequence_pages, 0);
    int32_t survivors = 0, left = 0;
    for_each_page(p, b, [&](const Page& page) { survivors += page.survivors; });
    const int32_t needed = p.within_pages ? p.sequence_pages : (survivors + p.page_size - 1) / p.page_size;
    for_each_page(p, b, [&](const Page& page) {
      const bool stays = page.survivors > 0 && left < needed;
      p.page_uses[page.page] |= stays ? kUsed : kDropped;
      if (!stays) return;
      lengths[left] = p.within_pages ? page.survivors : std::min(p.page_size, survivors - left * p.page_size);
      table[left++] = page.page;
    });
    p.new_lengths[b] = survivors;
  }
  return MEM1_OK;
}

}  // namespace mem1::kv_cache
