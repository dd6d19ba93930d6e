#include "attention/tile_plan.h"

#include "common/check.h"

#include <algorithm>
#include <limits>

namespace mem1::tile_plan {
namespace {

// Calls visit(first query tile, one past the last) for the full range, or for the two partial ranges around it.
template <typename Visit>
void for_each_range(const int32_t* range, bool full, Visit visit) {
  if (full) {
    visit(range[1], range[2]);
  } else {
    visit(range[0], range[1]);
    visit(range[2], range[3]);
  }
}

// CSR offsets out of ranges. Each range first leaves +1 where it begins and -1 where it ends; summing once gives the
// count of every query tile, summing again its offset. Returns the number of tiles; above 2^31 - 1 the offsets are
// wrong.
int64_t offsets(const mem1_tile_plan_params& p, bool full, int32_t* out) {
  const int64_t query_tiles = tiles(p.length, p.block_q), key_tiles = tiles(p.length, p.block_k);
  const int64_t rows = p.batch * query_tiles;
  std::fill(out, out + rows + 1, 0);
  for (int64_t b = 0; b < p.batch; ++b) {
    int32_t* difference = out + b * query_tiles;
    for (int64_t k = 0; k < key_tiles; ++k) {
      for_each_range(p.key_ranges + (b * key_tiles + k) * 4, full, [&](int32_t begin, int32_t end) {
        ++difference[begin];
        --difference[end];
      });
    }
  }
  int64_t count = 0, total = 0;
  for (int64_t row = 0; row <= rows; ++row) {
    count += out[row];
    out[row] = static_cast<int32_t>(total);
    total += count;
  }
  return total;
}

void list(const mem1_tile_plan_params& p, bool full, int32_t* offsets, int32_t* out) {
  const int64_t query_tiles = tiles(p.length, p.block_q), key_tiles = tiles(p.length, p.block_k);
  const int64_t rows = p.batch * query_tiles;
  // offsets[row] serves as the row's cursor and ends up as offsets[row + 1]: shifting the array back restores it.
  for (int64_t b = 0; b < p.batch; ++b) {
    int32_t* cursor = offsets + b * query_tiles;
    for (int64_t k = 0; k < key_tiles; ++k) {
      for_each_range(p.key_ranges + (b * key_tiles + k) * 4, full, [&](int32_t begin, int32_t end) {
        for (int32_t q = begin; q < end; ++q) out[cursor[q]++] = static_cast<int32_t>(k);
      });
    }
  }
  std::copy_backward(offsets, offsets + rows, offsets + rows + 1);
  offsets[0] = 0;
}

}  // namespace

mem1_status ranges_cpu(const mem1_tile_plan_params& p, mem1_error* error) {
  const int64_t key_tiles = tiles(p.length, p.block_k);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int32_t* evict = p.evict + b * p.evict_stride_batch;
    for (int64_t k = 0; k < key_tiles; ++k) {
      const int32_t first = static_cast<int32_t>(k * p.block_k);
      const int32_t stop = std::min(first + p.block_k, p.length);
      int32_t low = evict[first], high = evict[first];
#pragma omp simd reduction(min : low) reduction(max : high)
      for (int32_t j = first; j < stop; ++j) {
        low = std::min(low, evict[j]);
        high = std::max(high, evict[j]);
      }
      const Range range = key_range(p, first, low, high);
      int32_t* out = p.key_ranges + (b * key_tiles + k) * 4;
      out[0] = range.begin;
      out[1] = range.full_begin;
      out[2] = range.full_end;
      out[3] = range.end;
    }
  }
  const int64_t full = offsets(p, true, p.full_offsets), partial = offsets(p, false, p.partial_offsets);
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  MEM1_CHECK(full <= kMax && partial <= kMax, error,
             "block_q, block_k: expected at most 2^31 - 1 live tiles, got %lld: take larger blocks",
             static_cast<long long>(std::max(full, partial)));
  return MEM1_OK;
}

void lists_cpu(const mem1_tile_plan_params& p) {
  list(p, true, p.full_offsets, p.full_tiles);
  list(p, false, p.partial_offsets, p.partial_tiles);
}

}  // namespace mem1::tile_plan
