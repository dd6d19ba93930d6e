// What both pruning kernels are made of: ranks of survivors within a block, the check of a sequence.
#pragma once

#include "kv_cache/prune.h"

#include "common/check.h"

#include <cuda_runtime.h>

namespace mem1::kv_cache {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Ranks among the flagged of up to kMost consecutive items. Lives in shared memory; every thread of the block calls
// run.
template <int kThreads>
struct Scan {
  static constexpr int kWordsPerWarp = 8;
  static constexpr int kWords = kThreads / kWarp * kWordsPerWarp;
  static constexpr int kMost = kWords * 32;

  uint32_t words[kWords + 1];  // a bit an item
  int32_t before[kWords + 1];  // flagged items before the word

  __device__ bool flagged(int32_t item) const { return (words[item / 32] >> item % 32 & 1) != 0; }

  // Flagged items before this one, 0 <= item <= kMost.
  __device__ int32_t rank(int32_t item) const {
    return before[item / 32] + __popc(words[item / 32] & ((1u << item % 32) - 1));
  }

  // Between the last use of one run's results and the next run there must be a barrier.
  template <typename Flag>
  __device__ int32_t run(int32_t items, Flag flag) {
    static_assert(kWords % kWarp == 0, "warp 0 sums whole words per lane");
    constexpr int kWordsPerLane = kWords / kWarp;
    const int lane = threadIdx.x % kWarp, word = threadIdx.x / kWarp * kWordsPerWarp;
    bool flags[kWordsPerWarp];  // all first: as many loads in flight
#pragma unroll
    for (int w = 0; w < kWordsPerWarp; ++w) {
      const int32_t item = (word + w) * 32 + lane;
      flags[w] = item < items && flag(item);
    }
#pragma unroll
    for (int w = 0; w < kWordsPerWarp; ++w) {
      const unsigned lanes = __ballot_sync(kAllLanes, flags[w]);
      if (lane == 0) words[word + w] = lanes;
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
      int32_t count = 0;
      for (int w = 0; w < kWordsPerLane; ++w) count += __popc(words[lane * kWordsPerLane + w]);
      int32_t inclusive = count;
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const int32_t other = __shfl_up_sync(kAllLanes, inclusive, offset);
        if (lane >= offset) inclusive += other;
      }
      int32_t sum = inclusive - count;
      for (int w = 0; w < kWordsPerLane; ++w) {
        before[lane * kWordsPerLane + w] = sum;
        sum += __popc(words[lane * kWordsPerLane + w]);
      }
      if (lane == kWarp - 1) {
        before[kWords] = sum;
        words[kWords] = 0;
      }
    }
    __syncthreads();
    return before[kWords];
  }
};

// The same answer for every thread of the block.
template <int kThreads>
__device__ bool sequence_is_valid(const Keep& keep, int32_t length, int64_t slots) {
  bool wrong = length < 0 || length > slots;
  for (int32_t i = threadIdx.x; keep.mask == nullptr && i < keep.range_count; i += kThreads) {
    wrong |= !range_is_valid(keep.ranges, i, length);
  }
  return __syncthreads_or(wrong) == 0;
}

inline mem1_status launched(const char* op, mem1_error* error) {
  const cudaError_t status = cudaGetLastError();
  if (status == cudaSuccess) return MEM1_OK;
  return fail(error, MEM1_DEVICE_ERROR, "%s: CUDA says %s", op, cudaGetErrorString(status));
}

}  // namespace mem1::kv_cache
