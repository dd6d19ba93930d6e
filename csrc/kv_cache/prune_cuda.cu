// Pruning on the device: one launch for all layers, keys and values, and sequences. A block owns a strip of columns of
// one array of one sequence and streams over its slots in order, so that blocks need not wait for one another. It lists
// the survivors of a chunk of slots in shared memory, then moves them (prune_move.cuh).
#include "kv_cache/prune_device.cuh"
#include "kv_cache/prune_move.cuh"

#include <algorithm>
#include <type_traits>

namespace mem1::kv_cache {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kEnoughBlocks = 256;  // two for each multiprocessor of a large GPU; fewer: narrower strips

using Slots = Scan<kThreads>;

// Divides 0 <= n < 2^31.
struct Divisor {
  uint32_t factor;
  int32_t shift;

  explicit Divisor(uint32_t by) : shift(31) {
    while ((uint64_t{1} << (shift - 31)) < by) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + by - 1) / by);
  }
  __device__ int32_t operator()(int32_t n) const {
    return static_cast<int32_t>(static_cast<uint64_t>(n) * factor >> shift);
  }
};

struct Strides {  // in bytes
  int64_t row, slot, head;
};

struct Launch {
  mem1_prune_kv_cache_params p;
  Divisor row_slots;
  char* arrays[3 * kMaxLayersCuda];  // keys of all layers, values of all layers, base keys of all layers
  Strides stride, base_stride;
  int32_t segments, segment_rows;  // parts of a sequence that are pruned by themselves; rows of one
  int32_t columns, strips;         // columns: heads, or 1 where strips run across heads; strips of a column
  int32_t head_units, column_units, strip_units;  // a unit is what a thread moves at once
};
static_assert(sizeof(Launch) <= 4096, "kernel parameters");

// The survivors of a chunk of slots. One that is left as it is and where it is has no place: its rows are -1.
template <bool kRotates>
struct Survivors {
  int2 sources[Slots::kMax];
  int2 targets[Slots::kMax];
  int32_t deltas[kRotates ? Slots::kMax : 1];  // positions by which the key is rotated
  int32_t first_touched[kWarps];               // the first one with a place, found by each warp
};

// What a block prunes.
struct Segment {
  int64_t b;
  int32_t index, first, stop;  // slots of the sequence
  bool reports;                // writes what is reported once per segment, not per array
  bool rotates;                // the array's entries are rotated
};

// Lists what the scan of the slots [first, first + count) has found. ranked: survivors of the segment before `first`.
template <bool kRotates>
__device__ void list_survivors(const Launch& a, const Segment& segment, const Slots& slots, int32_t first,
                               int32_t count, int32_t ranked, Survivors<kRotates>* list) {
  constexpr int kTogether = 4;
  const mem1_prune_kv_cache_params& p = a.p;
  const int64_t b = segment.b, sequence = b * p.sequence_rows * p.row_slots;
  const int32_t* source_rows = p.source_rows == nullptr ? nullptr : p.source_rows + b * p.sequence_rows;
  const int32_t* target_rows = p.target_rows == nullptr ? source_rows : p.target_rows + b * p.sequence_rows;
  const auto place = [&](const int32_t* rows, int32_t row, int32_t slot) {
    return make_int2(rows == nullptr ? static_cast<int32_t>(b) : rows[row], slot - row * p.row_slots);
  };
  int32_t first_touched = Slots::kMax;
#pragma unroll 1
  for (int32_t at = threadIdx.x; at < count; at += kTogether * kThreads) {
    // Tables first, without a branch, so that these reads are on their way at once; a slot that does not stay acts as
    // the first one meanwhile.
    int2 from[kTogether], to[kTogether];
    int32_t index[kTogether], delta[kTogether];
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      const bool stays = at + n * kThreads < count && slots.flagged(at + n * kThreads);
      const int32_t item = stays ? at + n * kThreads : 0, rank = slots.rank(item), slot = first + item;
      const int32_t row = a.row_slots(slot), row_item = row * p.row_slots - first;
      // A row begins in this chunk or, when it is larger than a chunk, is all of its segment.
      const int32_t before_row = slots.rank(max(row_item, 0)) - (row_item < 0 ? ranked : 0);
      const int32_t target = p.within_rows ? first + row_item + rank - before_row : ranked + rank;
      index[n] = stays ? rank : -1;
      from[n] = place(source_rows, row, slot);
      to[n] = place(target_rows, a.row_slots(target), target);
      delta[n] = kRotates ? target - (p.base_keys == nullptr ? slot : p.base_positions[sequence + slot]) : 0;
    }
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      if (index[n] < 0) continue;
      // A key in its place may still have to be rotated: pages before its own have left, or it is made from its base.
      const bool rotates = segment.rotates && (p.base_keys != nullptr || delta[n] != 0);
      if (from[n].x == to[n].x && from[n].y == to[n].y && !rotates) {
        from[n].x = to[n].x = -1;
      } else {
        first_touched = min(first_touched, index[n]);
      }
      list->sources[index[n]] = from[n];
      list->targets[index[n]] = to[n];
      if (kRotates) list->deltas[index[n]] = delta[n];
    }
  }
  first_touched = __reduce_min_sync(kAllLanes, first_touched);
  if (threadIdx.x % kWarp == 0) list->first_touched[threadIdx.x / kWarp] = first_touched;
}

__device__ void write_positions(const mem1_prune_kv_cache_params& p, const Segment& segment, const Slots& slots,
                                int32_t first, int32_t count, int32_t ranked) {
  if (!segment.reports || p.within_rows || p.base_positions == nullptr || p.new_base_positions == nullptr) return;
  const int64_t sequence = segment.b * p.sequence_rows * p.row_slots;
#pragma unroll 1
  for (int32_t item = threadIdx.x; item < count; item += kThreads) {
    if (!slots.flagged(item)) continue;
    p.new_base_positions[sequence + ranked + slots.rank(item)] = p.base_positions[sequence + first + item];
  }
}

// new_lengths of the segment: of its rows when within_rows, else of the sequence. length_of(row) tells them.
template <typename Length>
__device__ void report(const Launch& a, const Segment& segment, Length length_of) {
  const mem1_prune_kv_cache_params& p = a.p;
  if (!segment.reports || p.new_lengths == nullptr) return;
  const int32_t first = segment.index * a.segment_rows;
  const int32_t rows = p.within_rows ? min(a.segment_rows, p.sequence_rows - first) : 1;
  int32_t* out = p.new_lengths + (p.within_rows ? segment.b * p.sequence_rows + first : segment.b);
#pragma unroll 1
  for (int32_t row = threadIdx.x; row < rows; row += kThreads) out[row] = length_of(row);
}

template <bool kRotates, typename Worker>
__device__ void prune(const Launch& a, const Segment& segment, Worker worker, Lane lane, Slots* slots,
                      Survivors<kRotates>* list) {
  const Keep keep = keep_of(a.p, segment.b);
  const bool small_rows = a.p.within_rows && a.segment_rows > 1;  // the segment is one chunk then
  int32_t survivors = 0;
  for (int32_t first = segment.first; first < segment.stop; first += Slots::kMax) {
    const int32_t count = min(segment.stop - first, Slots::kMax);
    const int32_t found = slots->run(kept<kThreads>(keep, first, count));
    list_survivors(a, segment, *slots, first, count, survivors, list);
    write_positions(a.p, segment, *slots, first, count, survivors);
    if (small_rows) {
      const int32_t row_slots = a.p.row_slots;
      report(a, segment, [&](int32_t row) {
        return slots->rank(min((row + 1) * row_slots, count)) - slots->rank(min(row * row_slots, count));
      });
    }
    __syncthreads();
    survivors += found;
    if (lane.rows == 0) continue;
    int32_t begin = found;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) begin = min(begin, list->first_touched[w]);
    stream(worker, *list, begin, found, lane);
  }
  if (!small_rows || segment.first >= segment.stop) report(a, segment, [&](int32_t) { return survivors; });
}

// T: what keys are rotated as, or void.
template <typename Unit, typename T>
__global__ void __launch_bounds__(kThreads, std::is_void<T>::value ? 3 : 2)
    prune_kernel(const __grid_constant__ Launch a) {
  constexpr bool kRotates = !std::is_void<T>::value;
  __shared__ Slots slots;
  __shared__ Survivors<kRotates> list;
  const mem1_prune_kv_cache_params& p = a.p;
  const int32_t strip = blockIdx.x % a.strips, at = blockIdx.x / a.strips;
  const int32_t column = at % a.columns, index = at / a.columns % a.segments;
  const int32_t sequence = at / a.columns / a.segments, b = sequence % p.batch, plane = sequence / p.batch;

  const int32_t length = p.lengths[b], segment_slots = a.segment_rows * p.row_slots;
  const bool rotates = kRotates && plane < p.layers;
  Segment segment{b, index, index * segment_slots, 0, plane == 0 && column == 0 && strip == 0, rotates};
  if (!sequence_is_valid<kThreads>(keep_of(p, b), length, static_cast<int64_t>(p.sequence_rows) * p.row_slots)) {
    return report(a, segment, [](int32_t) { return -1; });
  }
  segment.stop = segment.first + min(length - segment.first, segment_slots);

  const int32_t halves = rotates ? 2 : 1;  // a thread that rotates has a unit of each
  const int32_t units = min(a.strip_units, a.column_units - strip * a.strip_units) / halves;
  const int32_t threads_per_row = max(units, 1), head_units = a.head_units / halves;
  Lane lane{static_cast<int32_t>(threadIdx.x) / threads_per_row, units == 0 ? 0 : kThreads / threads_per_row};
  if (lane.row >= lane.rows) lane.row = Slots::kMax;  // would have an incomplete row: idle
  const int32_t unit = strip * a.strip_units / halves + static_cast<int32_t>(threadIdx.x) % threads_per_row;
  const int64_t head = column + unit / head_units, offset = unit % head_units * static_cast<int64_t>(sizeof(Unit));
  const auto column_of = [&](int32_t array, const Strides& stride) {
    return Column{a.arrays[array] + head * stride.head + offset, stride.row, stride.slot};
  };
  const Column own = column_of(plane, a.stride);
  if constexpr (kRotates) {
    if (rotates) {
      const bool has_base = p.base_keys != nullptr;
      const Column base = column_of(has_base ? 2 * p.layers + plane : plane, has_base ? a.base_stride : a.stride);
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
  if (p.inv_freq == nullptr) {
    if (wide) return {prune_kernel<uint4, void>, sizeof(uint4)};
    return alignment >= 2 ? Access{prune_kernel<uint16_t, void>, 2} : Access{prune_kernel<uint8_t, void>, 1};
  }
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

// The arrays, and how their columns are cut: into `blocks` blocks a strip.
Access lay_out(const mem1_prune_kv_cache_params& p, int64_t blocks, Launch* a) {
  const bool rotates = p.inv_freq != nullptr, has_base = p.base_keys != nullptr;
  const int64_t element = element_size(p.dtype);
  a->stride = {p.stride_row * element, p.stride_slot * element, p.stride_head * element};
  uint64_t bits = a->stride.row | a->stride.slot;
  if (has_base) {
    a->base_stride = {p.base_stride_row * element, p.base_stride_slot * element, p.base_stride_head * element};
    bits |= a->base_stride.row | a->base_stride.slot;
  }
  for (int32_t layer = 0; layer < p.layers; ++layer) {
    void* const of_layer[] = {p.keys[layer], p.values[layer], has_base ? p.base_keys[layer] : nullptr};
    for (int i = 0; i < (has_base ? 3 : 2); ++i) {
      a->arrays[i * p.layers + layer] = static_cast<char*>(of_layer[i]);
      bits |= reinterpret_cast<uintptr_t>(of_layer[i]);
    }
  }
  const bool across_heads = p.heads == 1 || p.stride_head == p.head_dim;
  const int64_t column = p.head_dim * element * (across_heads ? p.heads : 1);
  // What is only moved is one stretch, whatever the head dim; the halves of heads are rotated each in its place.
  const int64_t head = rotates ? p.head_dim * element : column;
  bits |= rotates ? head / 2 : head;
  if (p.heads > 1 && (rotates || !across_heads)) bits |= a->stride.head | a->base_stride.head;
  const Access access = access_for(p, bits & (~bits + 1));
  a->columns = across_heads ? 1 : p.heads;
  a->head_units = static_cast<int32_t>(head / access.unit);
  a->column_units = static_cast<int32_t>(column / access.unit);
  // Wide strips read long stretches of memory; narrow ones, 128 bytes, keep more of a small problem in flight.
  const bool wide = access.unit == sizeof(uint4);
  int64_t units = wide ? kThreads / 4 : kThreads;
  while (wide && units > 8 && blocks * a->columns * ceil_div(a->column_units, units) < kEnoughBlocks) units /= 2;
  const int64_t even = ceil_div(a->column_units, ceil_div(a->column_units, units)), grain = wide ? 8 : 2;
  a->strip_units = static_cast<int32_t>(ceil_div(even, grain) * grain);
  a->strips = static_cast<int32_t>(ceil_div(a->column_units, a->strip_units));
  return access;
}

}  // namespace

mem1_status prune_kv_cache_cuda(const mem1_prune_kv_cache_params& p, void* stream, mem1_error* error) {
  const bool empty = p.layers == 0 || p.heads == 0 || p.head_dim == 0;
  if (p.batch == 0) return MEM1_OK;
  Launch a{p, Divisor(std::max(1, p.row_slots))};
  a.segment_rows = p.within_rows ? std::max(1, Slots::kMax / std::max(1, p.row_slots)) : p.sequence_rows;
  a.segments = p.within_rows ? static_cast<int32_t>(ceil_div(p.sequence_rows, a.segment_rows)) : 1;
  a.columns = a.strips = 1;
  a.head_units = 2;  // without data nothing is done with it, but divide by it
  const int64_t planes = empty ? 1 : 2 * p.layers;
  const int64_t blocks_per_strip = planes * p.batch * a.segments;
  const Access access = empty ? access_for(p, 1) : lay_out(p, blocks_per_strip, &a);
  const int64_t blocks = blocks_per_strip * a.columns * a.strips;
  MEM1_CHECK(blocks <= INT32_MAX, error,
             "layers, batch, heads: expected at most 2^31 - 1 blocks of CUDA threads, got %lld: prune in several calls",
             static_cast<long long>(blocks));
  if (blocks == 0) return MEM1_OK;
  access.kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return check_launch("prune_kv_cache", error);
}

}  // namespace mem1::kv_cache
