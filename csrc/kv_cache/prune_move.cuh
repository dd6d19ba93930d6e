// How a block moves the survivors that it has listed: as they are, or rotated (RoPE).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace mem1::kv_cache {

constexpr int kDepth = 4;  // units that a thread loads per tile; it has two tiles in registers

// The column of an array that a thread works on. Places are (row, slot in the row).
struct Column {
  char* data;
  int64_t stride_row, stride_slot;  // in bytes
  __device__ char* at(int2 place) const { return data + place.x * stride_row + place.y * stride_slot; }
};

template <typename Unit>
struct Mover {
  static constexpr int kPieces = kDepth;
  using Piece = Unit;
  Column column;

  __device__ void load(int2 source, Piece* piece) const { *piece = *reinterpret_cast<const Unit*>(column.at(source)); }
  template <typename List>
  __device__ void store(const List&, int32_t, int2 target, const Piece& piece) {
    *reinterpret_cast<Unit*>(column.at(target)) = piece;
  }
};

__device__ inline float wide(float x) { return x; }
__device__ inline float wide(__half x) { return __half2float(x); }
__device__ inline float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline double wide(double x) { return x; }

__device__ inline void narrow(float x, float* y) { *y = x; }
__device__ inline void narrow(float x, __half* y) { *y = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16* y) { *y = __float2bfloat16_rn(x); }
__device__ inline void narrow(double x, double* y) { *y = x; }

// In fp32 the angle would be off by 1e-4 a few thousand positions away: its turns are counted, and dropped, in fp64.
// sincospif needs no reduction then and, unlike sincosf, no local memory.
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
  int32_t delta;
  Wide cosine[kElements], sine[kElements];

  __device__ Turner(Column keys, Column base, bool has_base, int64_t half, const float* frequencies)
      : keys(keys), base(base), has_base(has_base), half(half), frequencies(frequencies), delta(0) {
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      cosine[e] = 1;
      sine[e] = 0;
    }
  }

  __device__ void load(int2 source, Piece* piece) const {
    const char* from = base.at(source);
    piece->first = *reinterpret_cast<const Unit*>(from);
    piece->second = *reinterpret_cast<const Unit*>(from + half);
  }

  template <typename List>
  __device__ void store(const List& list, int32_t i, int2 target, const Piece& piece) {
    if (list.deltas[i] != delta) {  // it is the same for all survivors between two gaps
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
    Piece rotated;
    memcpy(&rotated.first, first, sizeof(Unit));
    memcpy(&rotated.second, second, sizeof(Unit));
    put(keys, target, rotated);
    if (has_base && (list.sources[i].x != target.x || list.sources[i].y != target.y)) put(base, target, piece);
  }

  __device__ void put(const Column& column, int2 target, const Piece& piece) const {
    char* to = column.at(target);
    *reinterpret_cast<Unit*>(to) = piece.first;
    *reinterpret_cast<Unit*>(to + half) = piece.second;
  }
};

// A thread keeps its column for all survivors; of the `rows` that the block moves at a time, its one is `row`.
struct Lane {
  int32_t row, rows;
};

// Moves the survivors [begin, count) of the list. In place this needs no scratch: targets ascend with their sources and
// never lie after them, so that what a tile stores lies before the sources of all later tiles, which may be loaded
// already. Only within a tile must the loads come before the stores: one barrier when two tiles have been loaded.
template <typename Worker, typename List>
__device__ void stream(Worker& worker, const List& list, int32_t begin, int32_t count, Lane lane) {
  constexpr int kPieces = Worker::kPieces;
  using Piece = typename Worker::Piece;
  const int32_t tile = kPieces * lane.rows;
  // This thread's rows of the tile that begins `at`. Places first: the loads then follow one another.
  const auto for_each = [&](const int2* places, int32_t at, auto visit) {
    int2 of_row[kPieces];
#pragma unroll
    for (int k = 0; k < kPieces; ++k) of_row[k] = places[min(at + k * lane.rows + lane.row, count - 1)];
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const int32_t i = at + k * lane.rows + lane.row;
      if (i < count && of_row[k].x >= 0) visit(k, i, of_row[k]);
    }
  };
  const auto load = [&](Piece(&pieces)[kPieces], int32_t at) {
#pragma unroll
    for (int k = 0; k < kPieces; ++k) pieces[k] = Piece{};  // or the old values would stay in registers between lists
    for_each(list.sources, at, [&](int k, int32_t, int2 place) { worker.load(place, &pieces[k]); });
  };
  const auto store = [&](const Piece(&pieces)[kPieces], int32_t at) {
    for_each(list.targets, at, [&](int k, int32_t i, int2 place) { worker.store(list, i, place, pieces[k]); });
  };
  if (begin >= count) return;
  Piece even[kPieces], odd[kPieces];
  load(even, begin);
  for (int32_t at = begin; at < count; at += 2 * tile) {
    load(odd, at + tile);
    __syncthreads();
    store(even, at);
    load(even, at + 2 * tile);
    store(odd, at + tile);
  }
}

}  // namespace mem1::kv_cache
