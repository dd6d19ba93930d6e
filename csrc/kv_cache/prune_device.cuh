// What both pruning kernels are made of: ranks of survivors within a block, the check of a sequence.
#pragma once

#include "kv_cache/prune.h"

#include "common/check_launch.h"

#include <cuda_runtime.h>

namespace mem1::kv_cache {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Ranks among the flagged of up to kMax consecutive items. Lives in shared memory.
template <int kThreads>
struct Scan {
  static constexpr int kItems = 8;  // of a thread
  static constexpr int kMax = kThreads * kItems;
  static constexpr int kWords = kMax / 32;

  uint32_t words[kWords + 1];  // a bit an item
  int32_t before[kWords + 1];  // flagged items before the word

  // The nth item of this thread, and the word it is in.
  __device__ static int32_t word(int n) { return threadIdx.x / kWarp + n * (kThreads / kWarp); }
  __device__ static int32_t item(int n) { return threadIdx.x + n * kThreads; }

  __device__ bool flagged(int32_t item) const { return (words[item / 32] >> item % 32 & 1) != 0; }

  // Flagged items before this one, 0 <= item <= kMax.
  __device__ int32_t rank(int32_t item) const {
    return before[item / 32] + __popc(words[item / 32] & ((1u << item % 32) - 1));
  }

  // Called by all threads of the block; bit n of `flags` is for item(n). Returns how many there are in all. Between the
  // last use of one run's results and the next run there must be a barrier.
  __device__ int32_t run(uint32_t flags) {
#pragma unroll
    for (int n = 0; n < kItems; ++n) {
      const unsigned lanes = __ballot_sync(kAllLanes, (flags >> n & 1) != 0);
      if (threadIdx.x % kWarp == 0) words[word(n)] = lanes;
    }
    __syncthreads();
    if (threadIdx.x < kWarp) sum();
    __syncthreads();
    return before[kWords];
  }

 private:
  __device__ void sum() {
    constexpr int kWordsPerLane = kWords / kWarp;
    static_assert(kWords % kWarp == 0, "whole words per lane");
    const int lane = threadIdx.x;
    int32_t count = 0;
#pragma unroll
    for (int w = 0; w < kWordsPerLane; ++w) count += __popc(words[lane * kWordsPerLane + w]);
    int32_t inclusive = count;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, inclusive, offset);
      if (lane >= offset) inclusive += other;
    }
    int32_t sum = inclusive - count;
#pragma unroll
    for (int w = 0; w < kWordsPerLane; ++w) {
      before[lane * kWordsPerLane + w] = sum;
      sum += __popc(words[lane * kWordsPerLane + w]);
    }
    if (lane == kWarp - 1) {
      before[kWords] = sum;
      words[kWords] = 0;
    }
  }
};

// Which of this thread's items of a scan over the slots [first, first + slots) stay.
template <int kThreads>
__device__ uint32_t kept(const Keep& keep, int32_t first, int32_t slots) {
  using Items = Scan<kThreads>;
  uint32_t flags = 0;
  if (keep.mask != nullptr) {
    uint8_t bytes[Items::kItems];  // loaded all at once: no branch in between
#pragma unroll
    for (int n = 0; n < Items::kItems; ++n) bytes[n] = Items::item(n) < slots ? keep.mask[first + Items::item(n)] : 0;
#pragma unroll
    for (int n = 0; n < Items::kItems; ++n) flags |= (bytes[n] != 0 ? 1u : 0u) << n;
    return flags;
  }
#pragma unroll 1
  for (int n = 0; n < Items::kItems && Items::item(n) < slots; ++n) {
    flags |= (keep(first + Items::item(n)) ? 1u : 0u) << n;
  }
  return flags;
}

// The same answer for every thread of the block.
template <int kThreads>
__device__ bool sequence_is_valid(const Keep& keep, int32_t length, int64_t slots) {
  bool wrong = length < 0 || length > slots;
#pragma unroll 1
  for (int32_t i = threadIdx.x; keep.mask == nullptr && i < keep.range_count; i += kThreads) {
    wrong |= !range_is_valid(keep.ranges, i, length);
  }
  return __syncthreads_or(wrong) == 0;
}

}  // namespace mem1::kv_cache
