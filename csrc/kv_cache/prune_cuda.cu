// Pruning on the device: one launch for all layers, keys and values, and sequences. A block owns a strip of columns of
// one array of one sequence and streams over its slots in order, so that nothing but its own barriers orders anything.
//
// Why in place needs no scratch: targets ascend with their sources and never lie behind them. What a tile of survivors
// stores lies before the sources of all later tiles: those may be loaded already. Only within a tile must the loads
// come before the stores, which takes one barrier.
#include "kv_cache/prune_device.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace mem1::kv_cache {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kDepth = 8;                // units that a thread loads per tile; it has two tiles in registers
constexpr int64_t kEnoughBlocks = 1024;  // fewer: narrower strips

using Slots = Scan<kThreads>;

struct Strides {  // in bytes
  int64_t row, slot, head;
};

struct Launch {
  mem1_prune_kv_cache_params p;
  char* arrays[3 * kMostLayersCuda];  // keys of all layers, values of all layers, base keys of all layers
  Strides stride, base_stride;
  int32_t segments, segment_rows;  // parts of a sequence that are pruned by themselves, rows of one
  int32_t columns, strips;         // columns: heads, or 1 where strips run across heads; strips of a column
  int32_t head_units, column_units, strip_units;  // a unit is what a thread moves at once
};
static_assert(sizeof(Launch) <= 4096, "kernel parameters");

// The survivors of a chunk of slots. Places are (row, slot in the row).
template <bool kTurns>
struct Survivors {
  int2 sources[Slots::kMost];
  int2 targets[Slots::kMost];
  int32_t deltas[kTurns ? Slots::kMost : 1];  // positions by which the key is turned
  int32_t unmoved[kWarps];                    // how many of the first ones lie in their place, found by each warp
};

// The column of an array that a thread works on.
struct Column {
  char* data;
  int64_t stride_row, stride_slot;
  __device__ char* at(int2 place) const { return data + place.x * stride_row + place.y * stride_slot; }
};

template <typename Unit>
struct Mover {
  static constexpr int kPieces = kDepth;
  using Piece = Unit;
  Column column;

  // Told how many survivors of a list stay where they are (the first ones), answers with which one it begins.
  __device__ int32_t begin(int32_t unmoved) { return unmoved; }

  template <typename List>
  __device__ void load(const List& list, int32_t i, Piece* piece) const {
    *piece = *reinterpret_cast<const Unit*>(column.at(list.sources[i]));
  }
  template <typename List>
  __device__ void store(const List& list, int32_t i, const Piece& piece) {
    *reinterpret_cast<Unit*>(column.at(list.targets[i])) = piece;
  }
};

// --- turning ---------------------------------------------------------------------------------------------------------

__device__ inline float wide(float x) { return x; }
__device__ inline float wide(__half x) { return __half2float(x); }
__device__ inline float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline double wide(double x) { return x; }

__device__ inline void narrow(float x, float* y) { *y = x; }
__device__ inline void narrow(float x, __half* y) { *y = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16* y) { *y = __float2bfloat16_rn(x); }
__device__ inline void narrow(double x, double* y) { *y = x; }

// The angle is taken modulo a turn in fp64: in fp32 it would be off by 1e-4 at a few thousand positions.
__device__ inline void rotation(int32_t by, float frequency, float* cosine, float* sine) {
  const double turns = by * (frequency * 0.15915494309189533577);
  sincospif(static_cast<float>(2 * (turns - rint(turns))), sine, cosine);
}
__device__ inline void rotation(int32_t by, float frequency, double* cosine, double* sine) {
  sincos(by * static_cast<double>(frequency), sine, cosine);
}

// Owns the same elements of the first and the second half of a head.
template <typename Unit, typename T>
struct Turner {
  static constexpr int kPieces = kDepth / 2;
  static constexpr int kElements = sizeof(Unit) / sizeof(T);
  using Wide = decltype(wide(T()));
  struct Piece {
    Unit first, second;
  };

  Column keys, base;  // base: the keys themselves where there is no other
  bool has_base;
  int64_t half;              // bytes from the first half to the second
  const float* frequencies;  // of the first element
  int32_t unmoved;
  int32_t delta;
  Wide cosine[kElements], sine[kElements];

  __device__ Turner(Column keys, Column base, bool has_base, int64_t half, const float* frequencies)
      : keys(keys), base(base), has_base(has_base), half(half), frequencies(frequencies), unmoved(0), delta(0) {
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      cosine[e] = 1;
      sine[e] = 0;
    }
  }

  __device__ int32_t begin(int32_t unmoved_survivors) {
    unmoved = unmoved_survivors;
    return has_base ? 0 : unmoved;
  }

  template <typename List>
  __device__ void load(const List& list, int32_t i, Piece* piece) const {
    const char* from = base.at(list.sources[i]);
    piece->first = *reinterpret_cast<const Unit*>(from);
    piece->second = *reinterpret_cast<const Unit*>(from + half);
  }

  template <typename List>
  __device__ void store(const List& list, int32_t i, const Piece& piece) {
    if (list.deltas[i] != delta) {  // rarely: it is the same for all survivors between two gaps
      delta = list.deltas[i];
#pragma unroll
      for (int e = 0; e < kElements; ++e) rotation(delta, frequencies[e], &cosine[e], &sine[e]);
    }
    T first[kElements], second[kElements];
    memcpy(first, &piece.first, sizeof(Unit));
    memcpy(second, &piece.second, sizeof(Unit));
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const Wide x = wide(first[e]), y = wide(second[e]);
      narrow(x * cosine[e] - y * sine[e], &first[e]);
      narrow(y * cosine[e] + x * sine[e], &second[e]);
    }
    Piece turned;
    memcpy(&turned.first, first, sizeof(Unit));
    memcpy(&turned.second, second, sizeof(Unit));
    put(keys.at(list.targets[i]), turned);
    if (has_base && i >= unmoved) put(base.at(list.targets[i]), piece);
  }

  __device__ void put(char* to, const Piece& piece) const {
    *reinterpret_cast<Unit*>(to) = piece.first;
    *reinterpret_cast<Unit*>(to + half) = piece.second;
  }
};

// --- one block -------------------------------------------------------------------------------------------------------

// What a block prunes.
struct Segment {
  int64_t b;
  int32_t index, first, stop;  // slots of the sequence
  bool reports;                // this block writes what there is once per segment, not per array
};

// A thread keeps its column for all survivors; of each `rows` that the block moves at a time it moves one.
struct Lane {
  int32_t row, rows;
};

// Moves the survivors [begin, count) of the list.
template <typename Worker, typename List>
__device__ void stream(Worker& worker, const List& list, int32_t begin, int32_t count, Lane lane) {
  constexpr int kPieces = Worker::kPieces;
  using Piece = typename Worker::Piece;
  const int32_t tile = kPieces * lane.rows;
  const auto load = [&](Piece(&pieces)[kPieces], int32_t at) {
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const int32_t i = at + k * lane.rows + lane.row;
      if (i < count) worker.load(list, i, &pieces[k]);
    }
  };
  const auto store = [&](const Piece(&pieces)[kPieces], int32_t at) {
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const int32_t i = at + k * lane.rows + lane.row;
      if (i < count) worker.store(list, i, pieces[k]);
    }
  };
  Piece even[kPieces], odd[kPieces];
  if (begin < count) load(even, begin);
  for (int32_t at = begin; at < count; at += 2 * tile) {
    load(odd, at + tile);
    __syncthreads();
    store(even, at);
    load(even, at + 2 * tile);
    __syncthreads();
    store(odd, at + tile);
  }
}

// Lists what the scan of the slots from `first` on has found. ranked: survivors of the segment before `first`.
template <bool kTurns>
__device__ void list_survivors(const mem1_prune_kv_cache_params& p, const Segment& segment, const Slots& slots,
                               int32_t first, int32_t ranked, Survivors<kTurns>* list) {
  const int64_t b = segment.b, sequence = b * p.sequence_rows * p.row_slots;
  const int32_t* source_rows = p.source_rows == nullptr ? nullptr : p.source_rows + b * p.sequence_rows;
  const int32_t* target_rows = p.target_rows == nullptr ? source_rows : p.target_rows + b * p.sequence_rows;
  const auto place = [&](const int32_t* rows, int32_t slot) {
    const int32_t row = slot / p.row_slots;
    return make_int2(rows == nullptr ? static_cast<int32_t>(b) : rows[row], slot - row * p.row_slots);
  };
  const bool writes_positions =
      segment.reports && !p.within_rows && p.base_positions != nullptr && p.new_base_positions != nullptr;
  int32_t unmoved = Slots::kMost;
#pragma unroll
  for (int w = 0; w < Slots::kWordsPerWarp; ++w) {
    const int32_t item = w * kThreads + threadIdx.x;
    if (!slots.flagged(item)) continue;
    const int32_t index = slots.rank(item), slot = first + item;
    int32_t target = ranked + index;
    if (p.within_rows) {
      // The row begins in this chunk or, when it is larger than a chunk, is all of its segment.
      const int32_t row_first = slot - slot % p.row_slots;
      target += row_first - (row_first < first ? 0 : ranked + slots.rank(row_first - first));
    }
    const int2 from = place(source_rows, slot), to = place(target_rows, target);
    list->sources[index] = from;
    list->targets[index] = to;
    if (from.x != to.x || from.y != to.y) unmoved = min(unmoved, index);
    if (kTurns) list->deltas[index] = target - (p.base_keys == nullptr ? slot : p.base_positions[sequence + slot]);
    if (writes_positions) p.new_base_positions[sequence + target] = p.base_positions[sequence + slot];
  }
  unmoved = __reduce_min_sync(kAllLanes, unmoved);
  if (threadIdx.x % kWarp == 0) list->unmoved[threadIdx.x / kWarp] = unmoved;
}

// new_lengths of the segment: of its rows when within_rows, else of the sequence. length(row) tells them.
template <typename Length>
__device__ void report(const Launch& a, const Segment& segment, Length length) {
  const mem1_prune_kv_cache_params& p = a.p;
  if (!segment.reports || p.new_lengths == nullptr) return;
  const int32_t row = segment.index * a.segment_rows,
                rows = p.within_rows ? min(a.segment_rows, p.sequence_rows - row) : 1;
  int32_t* out = p.new_lengths + (p.within_rows ? segment.b * p.sequence_rows + row : segment.b);
  for (int32_t i = threadIdx.x; i < rows; i += kThreads) out[i] = length(i);
}

template <bool kTurns, typename Worker>
__device__ void prune(const Launch& a, const Segment& segment, Worker worker, Lane lane, Slots* slots,
                      Survivors<kTurns>* list) {
  const Keep keep = keep_of(a.p, segment.b);
  int32_t survivors = 0;
  for (int32_t first = segment.first; first < segment.stop; first += Slots::kMost) {
    const int32_t count = min(segment.stop - first, Slots::kMost);
    const int32_t found = slots->run(count, [&](int32_t i) { return keep(first + i); });
    list_survivors(a.p, segment, *slots, first, survivors, list);
    if (a.segment_rows > 1 && a.p.within_rows) {
      const int32_t row_slots = a.p.row_slots;
      report(a, segment, [&](int32_t row) {
        return slots->rank(min((row + 1) * row_slots, count)) - slots->rank(min(row * row_slots, count));
      });
    }
    __syncthreads();
    survivors += found;
    if (lane.rows == 0) continue;
    int32_t unmoved = found;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) unmoved = min(unmoved, list->unmoved[w]);
    stream(worker, *list, worker.begin(unmoved), found, lane);
  }
  if (segment.first >= segment.stop || a.segment_rows == 1 || !a.p.within_rows) {
    report(a, segment, [&](int32_t) { return survivors; });
  }
}

// T: what keys are turned as, or void.
template <typename Unit, typename T>
__global__ void __launch_bounds__(kThreads, 4) prune_kernel(const __grid_constant__ Launch a) {
  constexpr bool kTurns = !std::is_void<T>::value;
  __shared__ Slots slots;
  __shared__ Survivors<kTurns> list;
  const mem1_prune_kv_cache_params& p = a.p;
  const int32_t strip = blockIdx.x % a.strips, at = blockIdx.x / a.strips;
  const int32_t column = at % a.columns, index = at / a.columns % a.segments;
  const int32_t sequence = at / a.columns / a.segments, b = sequence % p.batch, plane = sequence / p.batch;

  const int32_t length = p.lengths[b], slots_per_segment = a.segment_rows * p.row_slots;
  Segment segment{b, index, index * slots_per_segment, 0, plane == 0 && column == 0 && strip == 0};
  if (!sequence_is_valid<kThreads>(keep_of(p, b), length, static_cast<int64_t>(p.sequence_rows) * p.row_slots)) {
    return report(a, segment, [](int32_t) { return -1; });
  }
  segment.stop = segment.first + min(length - segment.first, slots_per_segment);

  const int32_t halves = kTurns && plane < p.layers ? 2 : 1;  // a thread that turns owns units of both
  const int32_t units = min(a.strip_units, a.column_units - strip * a.strip_units) / halves;
  const int32_t threads_per_row = max(units, 1), head_units = a.head_units / halves;
  Lane lane{static_cast<int32_t>(threadIdx.x) / threads_per_row, units == 0 ? 0 : kThreads / threads_per_row};
  if (lane.row >= lane.rows) lane.row = Slots::kMost;  // would make an incomplete row: idle
  const int32_t unit = strip * a.strip_units / halves + threadIdx.x % threads_per_row;
  const int32_t head = column + unit / head_units;
  const int64_t offset = unit % head_units * static_cast<int64_t>(sizeof(Unit));
  const auto column_of = [&](char* array, const Strides& stride) {
    return Column{array + head * stride.head + offset, stride.row, stride.slot};
  };
  const Column own = column_of(a.arrays[plane], a.stride);
  if constexpr (kTurns) {
    if (halves == 2) {
      const bool has_base = p.base_keys != nullptr;
      const Column base = has_base ? column_of(a.arrays[2 * p.layers + plane], a.base_stride) : own;
      const Turner<Unit, T> turner(own, base, has_base, head_units * static_cast<int64_t>(sizeof(Unit)),
                                   p.inv_freq + offset / sizeof(T));
      return prune(a, segment, turner, lane, &slots, &list);
    }
  }
  prune(a, segment, Mover<Unit>{own}, lane, &slots, &list);
}

// --- launch ----------------------------------------------------------------------------------------------------------

int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

struct Access {
  void (*kernel)(const Launch);
  int32_t unit;  // bytes
};

template <typename T>
Access turning(bool wide) {
  using Element = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  return wide ? Access{prune_kernel<uint4, T>, sizeof(uint4)} : Access{prune_kernel<Element, T>, sizeof(T)};
}

// All addresses and steps are multiples of `alignment` bytes.
Access access_for(const mem1_prune_kv_cache_params& p, uint64_t alignment) {
  const bool wide = alignment >= sizeof(uint4);
  if (p.inv_freq != nullptr) {
    switch (p.dtype) {
      case MEM1_FLOAT16:
        return turning<__half>(wide);
      case MEM1_BFLOAT16:
        return turning<__nv_bfloat16>(wide);
      case MEM1_FLOAT32:
        return turning<float>(wide);
      default:
        return turning<double>(wide);
    }
  }
  if (wide) return {prune_kernel<uint4, void>, 16};
  return alignment >= 2 ? Access{prune_kernel<uint16_t, void>, 2} : Access{prune_kernel<uint8_t, void>, 1};
}

// The arrays, and how their rows are cut into strips. `blocks` a strip. Returns how to reach them.
Access lay_out(const mem1_prune_kv_cache_params& p, int64_t blocks, Launch* a) {
  const bool has_base = p.base_keys != nullptr;
  const int64_t element = element_size(p.dtype);
  a->stride = {p.stride_row * element, p.stride_slot * element, p.stride_head * element};
  a->base_stride = {p.base_stride_row * element, p.base_stride_slot * element, p.base_stride_head * element};
  uint64_t bits = a->stride.row | a->stride.slot;
  if (has_base) bits |= a->base_stride.row | a->base_stride.slot;
  for (int32_t layer = 0; layer < p.layers; ++layer) {
    void* const of_layer[] = {p.keys[layer], p.values[layer], has_base ? p.base_keys[layer] : nullptr};
    for (int i = 0; i < 3; ++i) {
      a->arrays[i * p.layers + layer] = static_cast<char*>(of_layer[i]);
      bits |= reinterpret_cast<uintptr_t>(of_layer[i]);
    }
  }
  const bool across_heads =
      p.heads == 1 || (p.stride_head == p.head_dim && (!has_base || p.base_stride_head == p.head_dim));
  const int64_t column = p.head_dim * element * (across_heads ? p.heads : 1);
  // What is only moved may cross from head to head; halves of heads are turned each at its place.
  const int64_t head = p.inv_freq == nullptr ? column : p.head_dim * element;
  bits |= p.inv_freq == nullptr ? head : head / 2;
  if (p.heads > 1 && (!across_heads || p.inv_freq != nullptr)) bits |= a->stride.head | a->base_stride.head;
  const Access access = access_for(p, bits & (~bits + 1));
  a->columns = across_heads ? 1 : p.heads;
  a->head_units = static_cast<int32_t>(head / access.unit);
  a->column_units = static_cast<int32_t>(column / access.unit);
  // Wide strips read whole pages of memory, narrow ones (128 bytes) keep more of a small problem in flight.
  const bool wide = access.unit == sizeof(uint4);
  int64_t units = wide ? kThreads / 4 : kThreads;
  while (wide && units > 8 && blocks * a->columns * ceil_div(a->column_units, units) < kEnoughBlocks) units /= 2;
  const int64_t grain = wide ? 8 : 2, even = ceil_div(a->column_units, ceil_div(a->column_units, units));
  a->strip_units = static_cast<int32_t>(ceil_div(even, grain) * grain);
  a->strips = static_cast<int32_t>(ceil_div(a->column_units, a->strip_units));
  return access;
}

}  // namespace

mem1_status prune_kv_cache_cuda(const mem1_prune_kv_cache_params& p, void* stream, mem1_error* error) {
  const bool empty = p.layers == 0 || p.heads == 0 || p.head_dim == 0;
  Launch a{};
  a.p = p;
  a.segment_rows = p.within_rows ? std::max(1, Slots::kMost / std::max(1, p.row_slots)) : p.sequence_rows;
  a.segments = p.within_rows ? static_cast<int32_t>(ceil_div(p.sequence_rows, a.segment_rows)) : 1;
  a.columns = a.strips = 1;
  a.head_units = 2;                                 // not divided by
  const int64_t planes = empty ? 1 : 2 * p.layers;  // without data there are still lengths to write
  const int64_t blocks_per_strip = planes * p.batch * a.segments;
  const Access access = empty ? access_for(p, 1) : lay_out(p, blocks_per_strip, &a);
  const int64_t blocks = blocks_per_strip * a.columns * a.strips;
  MEM1_CHECK(blocks <= INT32_MAX, error,
             "layers, batch, heads: wanted at most 2^31 - 1 blocks of CUDA threads, got %lld: prune in several calls",
             static_cast<long long>(blocks));
  if (blocks == 0) return MEM1_OK;
  access.kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return launched("prune_kv_cache", error);
}

}  // namespace mem1::kv_cache
