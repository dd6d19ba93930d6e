// The tile plan on the device, without host synchronisation: a warp per key tile finds the ranges, a warp per query
// tile counts and then lists its live key tiles by ballot (which keeps them ascending), one block sums the counts in
// between.
#include "attention/tile_plan.h"

#include "common/check_launch.h"

#include <cuda_runtime.h>

namespace mem1::tile_plan {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarpsPerBlock = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ int64_t warp_id() { return (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; }

__global__ void __launch_bounds__(kThreads) ranges_kernel(const mem1_tile_plan_params p) {
  const int64_t key_tiles = tiles(p.length, p.block_k);
  const int64_t tile = warp_id();
  if (tile >= p.batch * key_tiles) return;
  const int lane = threadIdx.x % kWarp;
  const int32_t first = static_cast<int32_t>(tile % key_tiles) * p.block_k;
  const int32_t stop = min(first + p.block_k, p.length);
  const int32_t* evict = p.evict + tile / key_tiles * p.evict_stride_batch;
  int32_t low = p.length, high = first + 1;
  for (int32_t j = first + lane; j < stop; j += kWarp) {
    low = min(low, evict[j]);
    high = max(high, evict[j]);
  }
  low = __reduce_min_sync(kAllLanes, low);
  // Nothing can be reported from here: a value out of range counts as the nearest one in range, so that whoever follows
  // the ranges and lists stays inside the stream.
  high = min(__reduce_max_sync(kAllLanes, high), p.length);
  if (lane == 0) {
    const Range range = key_range(p, first, low, high);
    reinterpret_cast<int4*>(p.key_ranges)[tile] = make_int4(range.begin, range.full_begin, range.full_end, range.end);
  }
}

__device__ void classify(const int4 range, int32_t query_tile, bool* full, bool* partial) {
  const bool live = range.x <= query_tile && query_tile < range.w;
  *full = live && range.y <= query_tile && query_tile < range.z;
  *partial = live && !*full;
}

// kWrite false: counts go to offsets[row]. kWrite true: tiles go to the lists at offsets[row].
template <bool kWrite>
__global__ void __launch_bounds__(kThreads) rows_kernel(const mem1_tile_plan_params p) {
  const int64_t query_tiles = tiles(p.length, p.block_q), key_tiles = tiles(p.length, p.block_k);
  const int64_t row = warp_id();
  if (row >= p.batch * query_tiles) return;
  const int lane = threadIdx.x % kWarp;
  const int32_t query_tile = static_cast<int32_t>(row % query_tiles);
  const int32_t stop = tiles(min((query_tile + 1) * p.block_q, p.length), p.block_k);  // no key after the last query
  const int4* ranges = reinterpret_cast<const int4*>(p.key_ranges) + row / query_tiles * key_tiles;
  int32_t full_at = kWrite ? p.full_offsets[row] : 0, partial_at = kWrite ? p.partial_offsets[row] : 0;
  const unsigned below = (1u << lane) - 1;
  for (int32_t base = 0; base < stop; base += kWarp) {
    const int32_t k = base + lane;
    bool full = false, partial = false;
    if (k < stop) classify(ranges[k], query_tile, &full, &partial);
    const unsigned full_lanes = __ballot_sync(kAllLanes, full), partial_lanes = __ballot_sync(kAllLanes, partial);
    if (kWrite && full) p.full_tiles[full_at + __popc(full_lanes & below)] = k;
    if (kWrite && partial) p.partial_tiles[partial_at + __popc(partial_lanes & below)] = k;
    full_at += __popc(full_lanes);
    partial_at += __popc(partial_lanes);
  }
  if (!kWrite && lane == 0) {
    p.full_offsets[row] = full_at;
    p.partial_offsets[row] = partial_at;
  }
}

// One block: counts to exclusive offsets in place, the total after the last.
__global__ void __launch_bounds__(kThreads) scan_kernel(int32_t* full, int32_t* partial, int64_t rows) {
  __shared__ int32_t warp_sums[kWarpsPerBlock];
  int32_t* data = blockIdx.x == 0 ? full : partial;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t carry = 0;
  for (int64_t base = 0; base < rows; base += kThreads) {
    const int64_t row = base + threadIdx.x;
    const int32_t count = row < rows ? data[row] : 0;
    int32_t inclusive = count;
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, inclusive, offset);
      if (lane >= offset) inclusive += other;
    }
    if (lane == kWarp - 1) warp_sums[warp] = inclusive;
    __syncthreads();
    int32_t before = carry, chunk = 0;
    for (int w = 0; w < kWarpsPerBlock; ++w) {
      if (w < warp) before += warp_sums[w];
      chunk += warp_sums[w];
    }
    if (row < rows) data[row] = before + inclusive - count;
    carry += chunk;
    __syncthreads();
  }
  if (threadIdx.x == 0) data[rows] = carry;
}

unsigned blocks_for(int64_t warps) { return static_cast<unsigned>((warps + kWarpsPerBlock - 1) / kWarpsPerBlock); }

}  // namespace

mem1_status ranges_cuda(const mem1_tile_plan_params& p, void* stream, mem1_error* error) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int64_t rows = static_cast<int64_t>(p.batch) * tiles(p.length, p.block_q);
  if (rows > 0) {
    const int64_t key_tiles = static_cast<int64_t>(p.batch) * tiles(p.length, p.block_k);
    ranges_kernel<<<blocks_for(key_tiles), kThreads, 0, cuda_stream>>>(p);
    rows_kernel<false><<<blocks_for(rows), kThreads, 0, cuda_stream>>>(p);
  }
  scan_kernel<<<2, kThreads, 0, cuda_stream>>>(p.full_offsets, p.partial_offsets, rows);
  return check_launch("tile plan", error);
}

mem1_status lists_cuda(const mem1_tile_plan_params& p, void* stream, mem1_error* error) {
  const int64_t rows = static_cast<int64_t>(p.batch) * tiles(p.length, p.block_q);
  if (rows > 0) rows_kernel<true><<<blocks_for(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return check_launch("tile plan", error);
}

}  // namespace mem1::tile_plan
