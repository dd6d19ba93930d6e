// Attention over a KV cache on the CPU. A decode step (one query per row) reads every key and value once and is bound
// by that: a kernel of its own keeps the query heads of a KV head together and never looks behind a row's length.
// Longer pieces are the last queries of a causal stream, which the tiles of trajectory attention do.
#include "torch/attention_cpu.h"
#include "common/exp2_cpu.h"
#include "torch/ops.h"

#include <c10/util/BFloat16.h>

#include <cmath>
#include <cstring>

namespace mem1::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kKeys = 64;      // of a block: scores stay in the first-level cache
constexpr int kMostHeads = 8;  // query heads that share a pass over the keys

// GCC's and Clang's vectors: what the instruction set lacks in width, the compiler splits.
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

MEM1_INLINE Floats load(const float* from) {
  Floats lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

MEM1_INLINE Floats load(const at::BFloat16* from) {
  Halves bits;
  std::memcpy(&bits, from, sizeof(bits));
  const Words words = __builtin_convertvector(bits, Words) << 16;
  Floats lanes;
  std::memcpy(&lanes, &words, sizeof(lanes));
  return lanes;
}

// The last, incomplete chunk of a row, zero-padded.
template <typename In>
MEM1_INLINE Floats load(const In* from, int64_t count) {
  In lanes[kLanes] = {};
  std::memcpy(lanes, from, static_cast<size_t>(count) * sizeof(In));
  return load(lanes);
}

MEM1_INLINE void store(Floats lanes, float* to) { std::memcpy(to, &lanes, sizeof(lanes)); }

// Each adds, or compares, lanes with those `width` further on.
MEM1_INLINE float sum_of(Floats x) {
  x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return x[0] + x[1];
}

MEM1_INLINE float max_of(Floats x) {
  float best = x[0];
  for (int lane = 1; lane < kLanes; ++lane) best = x[lane] > best ? x[lane] : best;
  return best;
}

// What is known of a query head so far.
struct Running {
  float max = -std::numeric_limits<float>::infinity(), sum = 0;
};

// A block of up to kKeys keys of one KV head, for `kHeads` query heads. queries: [kHeads, padded], times the softmax
// scale and log2(e), zero-padded to whole chunks of lanes; out likewise, not yet divided by the sums.
template <int kHeads, typename In>
MEM1_INLINE void attend_block(const In* keys, const In* values, int64_t stride, int count, int64_t dim,
                              const float* queries, Running* running, float* out) {
  const int64_t whole = dim / kLanes * kLanes, rest = dim - whole, padded = whole + (rest > 0 ? kLanes : 0);
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  alignas(64) float scores[kHeads][kKeys];
  for (int j = 0; j < count; ++j) {
    const In* key = keys + j * stride;
    Floats dots[kHeads] = {};
    for (int64_t d = 0; d < whole; d += kLanes) {
      const Floats part = load(key + d);
      for (int h = 0; h < kHeads; ++h) dots[h] += part * load(queries + h * padded + d);
    }
    if (rest > 0) {
      const Floats part = load(key + whole, rest);
      for (int h = 0; h < kHeads; ++h) dots[h] += part * load(queries + h * padded + whole);
    }
    for (int h = 0; h < kHeads; ++h) scores[h][j] = sum_of(dots[h]);
  }
  for (int h = 0; h < kHeads; ++h) {
    std::fill(scores[h] + count, scores[h] + kKeys, kNone);
    Floats highest = load(scores[h]);
    for (int j = kLanes; j < kKeys; j += kLanes) {
      const Floats part = load(scores[h] + j);
      highest = part > highest ? part : highest;
    }
    const float best = std::max(running[h].max, max_of(highest));
    const float safe = best == kNone ? 0.0f : best;  // nothing finite so far: exp2(-inf - 0)
    const float factor = running[h].max == kNone ? 0.0f : std::exp2(running[h].max - safe);
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int j = 0; j < kKeys; ++j) {
      const float p = exp2_of(scores[h][j] - safe);
      scores[h][j] = p;
      total += p;
    }
    running[h] = {best, running[h].sum * factor + total};
    if (factor != 1.0f) {
      for (int64_t d = 0; d < padded; d += kLanes) store(load(out + h * padded + d) * factor, out + h * padded + d);
    }
  }
  for (int64_t d = 0; d < padded; d += kLanes) {
    Floats sums[kHeads];
    for (int h = 0; h < kHeads; ++h) sums[h] = load(out + h * padded + d);
    const In* value = values + d;
    for (int j = 0; j < count; ++j, value += stride) {
      const Floats part = d < whole ? load(value) : load(value, rest);
      for (int h = 0; h < kHeads; ++h) sums[h] += part * scores[h][j];
    }
    for (int h = 0; h < kHeads; ++h) store(sums[h], out + h * padded + d);
  }
}

template <typename In>
using Attend = void (*)(const In*, const In*, int64_t, int, int64_t, const float*, Running*, float*);

#define MEM1_ATTEND(heads, In)                                                                              \
  MEM1_CLONES void attend_##heads(const In* keys, const In* values, int64_t stride, int count, int64_t dim, \
                                  const float* queries, Running* running, float* out) {                     \
    attend_block<heads>(keys, values, stride, count, dim, queries, running, out);                           \
  }
#define MEM1_ATTEND_ALL(In) \
  MEM1_ATTEND(1, In)        \
  MEM1_ATTEND(2, In)        \
  MEM1_ATTEND(3, In)        \
  MEM1_ATTEND(4, In)        \
  MEM1_ATTEND(5, In)        \
  MEM1_ATTEND(6, In)        \
  MEM1_ATTEND(7, In)        \
  MEM1_ATTEND(8, In)
MEM1_ATTEND_ALL(float)
MEM1_ATTEND_ALL(at::BFloat16)
#undef MEM1_ATTEND_ALL
#undef MEM1_ATTEND

// By the number of query heads.
template <typename In>
Attend<In> attend_of(int64_t heads) {
  static constexpr Attend<In> kAll[] = {attend_1, attend_2, attend_3, attend_4, attend_5, attend_6, attend_7, attend_8};
  return kAll[heads - 1];
}

template <typename In>
void prefetch(const In* row, int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(In);
  for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(row + d);
}

// A step of one token: q, out [batch, 1, heads, dim]. Block after block of a row's keys is read for all of its heads,
// as these lie side by side in memory; with few rows a task takes fewer heads.
template <typename In>
void decode(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const int32_t* rows,
            const int32_t* lengths, const int32_t* counts, double scale, at::Tensor& out) {
  const auto q_in = const_view_of<In>(q), k_in = const_view_of<In>(keys), v_in = const_view_of<In>(values);
  const auto out_view = view_of<In>(out);
  const int64_t batch = q.size(0), kv_heads = keys.size(2), group = q.size(2) / kv_heads, dim = q.size(3);
  const int64_t padded = round_up(dim, kLanes), threads = at::get_num_threads();
  const int64_t task_heads = batch >= 2 * threads || threads == 1 ? kv_heads : 1, splits = kv_heads / task_heads;
  int64_t work = 1;
  for (int64_t b = 0; b < batch; ++b) work += lengths[b] * dim * kv_heads;
  constexpr int64_t kWorthAThread = 1 << 15;  // elements of keys
  const int64_t grain = std::max<int64_t>(1, kWorthAThread * batch * splits / work);
  at::parallel_for(0, batch * splits, grain, [&](int64_t begin, int64_t end) {
    const int64_t heads = task_heads * group;
    std::vector<float> queries(heads * padded), sums(heads * padded);
    std::vector<Running> running(heads);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / splits, first_kv = n % splits * task_heads, first_head = first_kv * group;
      if (counts[b] == 0) continue;
      for (int64_t h = 0; h < heads; ++h) {
        const In* query = q_in.row(b, 0, first_head + h);
        for (int64_t d = 0; d < dim; ++d) {
          queries[h * padded + d] = static_cast<float>(query[d]) * static_cast<float>(scale * kLog2E);
        }
      }
      std::fill(sums.begin(), sums.end(), 0.0f);
      std::fill(running.begin(), running.end(), Running{});
      for (int64_t first = 0; first < lengths[b]; first += kKeys) {
        const int count = static_cast<int>(std::min<int64_t>(kKeys, lengths[b] - first));
        for (int64_t j = first + count; j < std::min<int64_t>(first + count + kKeys, lengths[b]); ++j) {
          for (int64_t kv = 0; kv < task_heads; ++kv) {
            prefetch(k_in.row(rows[b], j, first_kv + kv), dim);
            prefetch(v_in.row(rows[b], j, first_kv + kv), dim);
          }
        }
        for (int64_t h = 0; h < heads;) {
          const int64_t kv = h / group, together = std::min<int64_t>(kMostHeads, (kv + 1) * group - h);
          attend_of<In>(together)(k_in.row(rows[b], first, first_kv + kv), v_in.row(rows[b], first, first_kv + kv),
                                  k_in.stride_row, count, dim, queries.data() + h * padded, running.data() + h,
                                  sums.data() + h * padded);
          h += together;
        }
      }
      for (int64_t h = 0; h < heads; ++h) {
        const float inverse = running[h].sum == 0 ? 0.0f : 1 / running[h].sum;
        In* to = out_view.row(b, 0, first_head + h);
        for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<In>(sums[h * padded + d] * inverse);
      }
    }
  });
}

// The last `count` tokens of a causal stream of `length`.
void prefill(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, double scale, at::Tensor& out) {
  constexpr int64_t kBlock = 64;
  const int64_t length = keys.size(1);
  const at::Tensor evict = at::full({1, length}, length, q.options().dtype(at::kInt));
  const auto [ranges, full_offsets, full_tiles, partial_offsets, partial_tiles] = tile_plan(evict, kBlock, kBlock);
  const Plan plan{evict, full_offsets, full_tiles, partial_offsets, partial_tiles, kBlock, kBlock};
  last_queries(q, keys, values, plan, scale, out);
}

}  // namespace

at::Tensor cached_attention(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values,
                            const at::Tensor& rows, const at::Tensor& lengths, const at::Tensor& counts, double scale) {
  const int64_t batch = q.size(0), pieces = q.size(1);
  at::Tensor out = at::zeros(q.sizes(), q.options());
  if (q.numel() == 0) return out;
  const int32_t *row = rows.const_data_ptr<int32_t>(), *length = lengths.const_data_ptr<int32_t>(),
                *count = counts.const_data_ptr<int32_t>();
  if (pieces == 1 && keys.stride(1) == values.stride(1)) {
    if (q.scalar_type() == at::kFloat) {
      decode<float>(q, keys, values, row, length, count, scale, out);
      return out;
    }
    if (q.scalar_type() == at::kBFloat16) {
      decode<at::BFloat16>(q, keys, values, row, length, count, scale, out);
      return out;
    }
  }
  for (int64_t b = 0; b < batch; ++b) {
    if (count[b] == 0) continue;
    const auto of_slot = [&](const at::Tensor& cache) { return cache.narrow(0, row[b], 1).narrow(1, 0, length[b]); };
    at::Tensor own = out.narrow(0, b, 1).narrow(1, pieces - count[b], count[b]);
    prefill(q.narrow(0, b, 1).narrow(1, pieces - count[b], count[b]), of_slot(keys), of_slot(values), scale, own);
  }
  return out;
}

}  // namespace mem1::cpu
