#include "kv_cache/prune.h"

#include "common/clones.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace mem1::kv_cache {
namespace {

// Calls visit(begin, end) for each run of survivors in the slots [first, stop).
template <typename Visit>
void for_each_run(const Keep& keep, int32_t first, int32_t stop, Visit visit) {
  if (keep.mask == nullptr) {
    for (int32_t i = 0; i < keep.range_count; ++i) {
      const int32_t begin = std::max(keep.ranges[2 * i], first), end = std::min(keep.ranges[2 * i + 1], stop);
      if (begin < end) visit(begin, end);
    }
    return;
  }
  for (int32_t at = first; at < stop;) {
    while (at < stop && keep.mask[at] == 0) ++at;
    if (at == stop) return;
    const void* dead = std::memchr(keep.mask + at, 0, static_cast<size_t>(stop - at));
    const int32_t end = dead == nullptr ? stop : static_cast<int32_t>(static_cast<const uint8_t*>(dead) - keep.mask);
    visit(at, end);
    at = end;
  }
}

int32_t count(const Keep& keep, int32_t first, int32_t stop) {
  int32_t survivors = 0;
  for_each_run(keep, first, stop, [&](int32_t begin, int32_t end) { survivors += end - begin; });
  return survivors;
}

// --- moving -------------------------------------------------------------------------------------------------------

struct Strides {
  int64_t row, slot, head;
};

struct Place {
  int64_t row;
  int32_t slot;
};

// `slots` entries of all heads from one place to another of the same array; they may overlap when `to` comes first.
void move(char* array, const Strides& stride, int64_t element, int32_t heads, int32_t head_dim, Place from, Place to,
          int32_t slots) {
  const bool merged = stride.head == head_dim;  // all heads of a slot are one stretch of memory
  const int64_t columns = merged ? 1 : heads, width = merged ? int64_t{heads} * head_dim : head_dim;
  const bool dense = stride.slot == width;
  for (int64_t column = 0; column < columns; ++column) {
    const char* source = array + (from.row * stride.row + from.slot * stride.slot + column * stride.head) * element;
    char* target = array + (to.row * stride.row + to.slot * stride.slot + column * stride.head) * element;
    if (dense) {
      std::memmove(target, source, static_cast<size_t>(slots * width * element));
      continue;
    }
    for (int32_t i = 0; i < slots; ++i) {
      std::memmove(target + i * stride.slot * element, source + i * stride.slot * element,
                   static_cast<size_t>(width * element));
    }
  }
}

// --- turning ------------------------------------------------------------------------------------------------------

struct Bfloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
  Bfloat16& operator=(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof(wide));
    // To nearest, ties to even; NaN apart, as the carry could make an infinity of it.
    bits = value != value ? 0x7fc0 : static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
    return *this;
  }
};

template <typename Wide>
struct Rotation {
  Wide cosine[kMaxRotatedDim / 2], sine[kMaxRotatedDim / 2];
  int32_t delta = 0;
  bool known = false;

  void set(int32_t by, const float* inv_freq, int32_t half) {
    if (known && by == delta) return;
    known = true;
    delta = by;
    for (int32_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(by) * static_cast<double>(inv_freq[i]);
      cosine[i] = static_cast<Wide>(std::cos(angle));
      sine[i] = static_cast<Wide>(std::sin(angle));
    }
  }
};

// One key of one head. `from` and `to` are the same key or do not overlap.
template <typename T, typename Wide>
MEM1_CLONES void rotate_key(const T* from, T* to, const Wide* cosine, const Wide* sine, int32_t half) {
#pragma omp simd
  for (int32_t i = 0; i < half; ++i) {
    const Wide first = from[i], second = from[i + half];
    to[i] = first * cosine[i] - second * sine[i];
    to[i + half] = second * cosine[i] + first * sine[i];
  }
}

// --- one sequence -------------------------------------------------------------------------------------------------

// Survivors that lie in one row before and after, and their first slots in the order of the sequence.
struct Piece {
  Place from, to;
  int32_t source, target, slots;
};

// Calls visit(Piece) for the runs of survivors of sequence b in order, cut where a row begins.
template <typename Visit>
void for_each_piece(const mem1_prune_kv_cache_params& p, int64_t b, Visit visit) {
  const int32_t* source_rows = p.source_rows == nullptr ? nullptr : p.source_rows + b * p.sequence_rows;
  const int32_t* target_rows = p.target_rows == nullptr ? source_rows : p.target_rows + b * p.sequence_rows;
  const auto place = [&](const int32_t* rows, int32_t slot) {
    return Place{rows == nullptr ? b : rows[slot / p.row_slots], slot % p.row_slots};
  };
  const Keep keep = keep_of(p, b);
  const int32_t length = p.lengths[b], window = p.within_rows ? p.row_slots : length;
  for (int32_t first = 0; first < length; first += window) {
    int32_t target = first;
    for_each_run(keep, first, std::min(first + window, length), [&](int32_t begin, int32_t end) {
      while (begin < end) {
        const Place from = place(source_rows, begin), to = place(target_rows, target);
        const int32_t slots = std::min({end - begin, p.row_slots - from.slot, p.row_slots - to.slot});
        visit(Piece{from, to, begin, target, slots});
        begin += slots;
        target += slots;
      }
    });
  }
}

void move_values(const mem1_prune_kv_cache_params& p, void* const* arrays, const Piece& piece) {
  if (piece.from.row == piece.to.row && piece.from.slot == piece.to.slot) return;
  const Strides stride{p.stride_row, p.stride_slot, p.stride_head};
  for (int32_t layer = 0; layer < p.layers; ++layer) {
    move(static_cast<char*>(arrays[layer]), stride, element_size(p.dtype), p.heads, p.head_dim, piece.from, piece.to,
         piece.slots);
  }
}

template <typename T, typename Wide>
void rotate_keys(const mem1_prune_kv_cache_params& p, int64_t b, const Piece& piece, Rotation<Wide>& rotation) {
  const Strides key{p.stride_row, p.stride_slot, p.stride_head};
  const Strides base{p.base_stride_row, p.base_stride_slot, p.base_stride_head};
  const Strides& read = p.base_keys == nullptr ? key : base;
  void* const* sources = p.base_keys == nullptr ? p.keys : p.base_keys;
  const int32_t* encoded =
      p.base_keys == nullptr ? nullptr : p.base_positions + b * p.sequence_rows * p.row_slots + piece.source;
  const auto delta = [&](int32_t i) {
    return encoded == nullptr ? piece.target - piece.source : piece.target + i - encoded[i];
  };
  const int32_t half = p.head_dim / 2;
  for (int32_t begin = 0, end = 1; begin < piece.slots; begin = end, ++end) {
    while (end < piece.slots && delta(end) == delta(begin)) ++end;
    rotation.set(delta(begin), p.inv_freq, half);
    for (int32_t layer = 0; layer < p.layers; ++layer) {
      const T* from = static_cast<const T*>(sources[layer]) + piece.from.row * read.row + piece.from.slot * read.slot;
      T* to = static_cast<T*>(p.keys[layer]) + piece.to.row * key.row + piece.to.slot * key.slot;
      for (int32_t i = begin; i < end; ++i) {
        for (int32_t h = 0; h < p.heads; ++h) {
          rotate_key(from + i * read.slot + h * read.head, to + i * key.slot + h * key.head, rotation.cosine,
                     rotation.sine, half);
        }
      }
    }
  }
  if (p.base_keys == nullptr) return;
  for (int32_t layer = 0; layer < p.layers; ++layer) {
    move(static_cast<char*>(p.base_keys[layer]), base, sizeof(T), p.heads, p.head_dim, piece.from, piece.to,
         piece.slots);
  }
}

template <typename T, typename Wide>
void prune_turning(const mem1_prune_kv_cache_params& p) {
  Rotation<Wide> rotation;
  for (int64_t b = 0; b < p.batch; ++b) {
    for_each_piece(p, b, [&](const Piece& piece) {
      move_values(p, p.values, piece);
      if (p.base_keys == nullptr && piece.source == piece.target) return;
      rotate_keys<T>(p, b, piece, rotation);
    });
  }
}

void write_counts(const mem1_prune_kv_cache_params& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t slots = int64_t{p.sequence_rows} * p.row_slots;
    const Keep keep = keep_of(p, b);
    if (p.new_lengths != nullptr && p.within_rows == 0) p.new_lengths[b] = count(keep, 0, p.lengths[b]);
    for (int32_t row = 0; p.new_lengths != nullptr && p.within_rows != 0 && row < p.sequence_rows; ++row) {
      const int32_t first = std::min(row * p.row_slots, p.lengths[b]);
      p.new_lengths[b * p.sequence_rows + row] = count(keep, first, std::min(first + p.row_slots, p.lengths[b]));
    }
    if (p.base_positions == nullptr || p.new_base_positions == nullptr) continue;
    int32_t* out = p.new_base_positions + b * slots;
    for_each_run(keep, 0, p.lengths[b], [&](int32_t begin, int32_t end) {
      const int32_t* encoded = p.base_positions + b * slots;
      out = std::copy(encoded + begin, encoded + end, out);
    });
  }
}

}  // namespace

void prune_kv_cache_cpu(const mem1_prune_kv_cache_params& p) {
  write_counts(p);
  if (p.layers == 0 || p.heads == 0 || p.head_dim == 0) return;
  if (p.inv_freq == nullptr) {
    for (int64_t b = 0; b < p.batch; ++b) {
      for_each_piece(p, b, [&](const Piece& piece) {
        move_values(p, p.keys, piece);
        move_values(p, p.values, piece);
      });
    }
    return;
  }
  switch (p.dtype) {
    case MEM1_FLOAT64:
      return prune_turning<double, double>(p);
    case MEM1_FLOAT32:
      return prune_turning<float, float>(p);
    case MEM1_FLOAT16:
      return prune_turning<_Float16, float>(p);
    case MEM1_BFLOAT16:
      return prune_turning<Bfloat16, float>(p);
    case MEM1_BITS8:
      return;  // refused by the validation
  }
}

}  // namespace mem1::kv_cache
