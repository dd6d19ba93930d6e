// Attention over a KV cache on the CPU. A decode step (one query per row) reads every key and value once and is bound
// by that: a kernel of its own keeps the query heads of a KV head together and never looks past a row's length.
// Longer pieces are the last queries of a causal stream, which the tiles of trajectory attention do.
#include "common/exp2_cpu.h"
#include "common/tanh_cpu.h"
#include "torch/attention_cpu.h"
#include "torch/lanes_cpu.h"
#include "torch/ops.h"

#include <algorithm>

namespace mem1::cpu {
namespace {

constexpr int kKeys = 64;  // of a block: the scores stay in the first-level cache
// Keys, or vectors of a value, that are multiplied side by side with up to two heads: eight independent sums hide the
// latency of an addition, and 16 registers hold them.
constexpr int kTile = 4;

// What is known of a query head so far.
struct Running {
  float max = -std::numeric_limits<float>::infinity(), sum = 0;
};

// `count` keys of one KV head and the values to them, for `heads` query heads. queries: [heads, padded], times the
// softmax scale and log2(e), zero-padded to whole vectors; sums likewise [heads, padded_value], not yet divided by
// those of `running`.
template <typename In>
struct Block {
  const In *keys, *values;
  int64_t key_stride, value_stride, dim, value_dim, padded, padded_value, heads;
  int64_t ahead;  // blocks to the next one, 1 or 0, which is fetched meanwhile
  int count;
  float cap;  // of scores, in units of log2 as they are; 0: none
  const float* queries;
  Running* running;
  float* sums;
};

// Into the second-level cache: of those that wait for the first level, a core of Zen 4 has too few for the bandwidth of
// the memory.
template <typename In>
MEM1_INLINE void prefetch(const In* from, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(In);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i, 0, 2);
}

// Of kTile keys, for kHeads heads from `head` on. Past the last key it is taken again.
template <int kLanes, int kHeads, typename In>
MEM1_INLINE void score(const Block<In>& block, int64_t head, int first, float (*scores)[kKeys]) {
  using Vector = Lanes<kLanes>;
  const int64_t whole = block.dim / kLanes * kLanes, rest = block.dim - whole;
  const float* queries = block.queries + head * block.padded;
  const In* keys[kTile];
  for (int t = 0; t < kTile; ++t) keys[t] = block.keys + std::min(first + t, block.count - 1) * block.key_stride;
  const int64_t ahead = block.ahead * kKeys * block.key_stride;
  for (int t = 0; head == 0 && t < kTile; ++t) prefetch(keys[t] + ahead, block.dim);
  typename Vector::Floats dots[kHeads][kTile] = {};
  for (int64_t d = 0; d < whole; d += kLanes) {
    for (int t = 0; t < kTile; ++t) {
      const auto key = Vector::load(keys[t] + d);
      for (int h = 0; h < kHeads; ++h) dots[h][t] += key * Vector::load(queries + h * block.padded + d);
    }
  }
  if (rest > 0) {
    for (int t = 0; t < kTile; ++t) {
      const auto key = Vector::load(keys[t] + whole, rest);
      for (int h = 0; h < kHeads; ++h) dots[h][t] += key * Vector::load(queries + h * block.padded + whole);
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    const Quad sums = Vector::sums(dots[h][0], dots[h][1], dots[h][2], dots[h][3]);
    std::memcpy(scores[h] + first, &sums, sizeof(sums));
  }
}

// Scores of a head become probabilities, up to the sum over all blocks; returns what earlier sums are to be multiplied
// with.
MEM1_INLINE float soften(float* scores, int count, Running& running) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  std::fill(scores + count, scores + kKeys, kNone);
  float best = running.max;
#pragma omp simd reduction(max : best)
  for (int j = 0; j < kKeys; ++j) best = scores[j] > best ? scores[j] : best;
  const float safe = best == kNone ? 0.0f : best;  // nothing finite so far: exp2(-inf - 0)
  const float factor = running.max == kNone ? 0.0f : exp2_of(running.max - safe);
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int j = 0; j < kKeys; ++j) {
    const float p = exp2_of(scores[j] - safe);
    scores[j] = p;
    total += p;
  }
  running = {best, running.sum * factor + total};
  return factor;
}

// Adds kVectors vectors of each value from element d on, or the `rest` last elements.
template <int kLanes, int kHeads, int kVectors, typename In>
MEM1_INLINE void add_values(const Block<In>& block, int64_t head, int64_t d, const float (*scores)[kKeys],
                            const float* factors, int64_t rest = 0) {
  using Vector = Lanes<kLanes>;
  float* out = block.sums + head * block.padded_value + d;
  typename Vector::Floats sums[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVectors; ++v) {
      sums[h][v] = Vector::load(out + h * block.padded_value + v * kLanes) * factors[h];
    }
  }
  const In* value = block.values + d;
  const int64_t ahead = block.ahead * kKeys * block.value_stride;
  for (int j = 0; j < block.count; ++j, value += block.value_stride) {
    if (head == 0) prefetch(value + ahead, kVectors * kLanes);
    for (int v = 0; v < kVectors; ++v) {
      const auto part = rest > 0 ? Vector::load(value, rest) : Vector::load(value + v * kLanes);
      for (int h = 0; h < kHeads; ++h) sums[h][v] += part * scores[h][j];
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVectors; ++v) Vector::store(sums[h][v], out + h * block.padded_value + v * kLanes);
  }
}

template <int kLanes, int kHeads, typename In>
MEM1_INLINE void attend_heads(const Block<In>& block, int64_t head) {
  alignas(64) float scores[kHeads][kKeys];
  float factors[kHeads];
  for (int j = 0; j < block.count; j += kTile) score<kLanes, kHeads>(block, head, j, scores);
  if (block.cap > 0) {
    for (int h = 0; h < kHeads; ++h) {
#pragma omp simd
      for (int j = 0; j < block.count; ++j) scores[h][j] = block.cap * tanh_of(scores[h][j] / block.cap);
    }
  }
  for (int h = 0; h < kHeads; ++h) factors[h] = soften(scores[h], block.count, block.running[head + h]);
  const int64_t whole = block.value_dim / kLanes * kLanes;
  int64_t d = 0;
  for (; d + kTile * kLanes <= whole; d += kTile * kLanes) {
    add_values<kLanes, kHeads, kTile>(block, head, d, scores, factors);
  }
  for (; d < whole; d += kLanes) add_values<kLanes, kHeads, 1>(block, head, d, scores, factors);
  if (d < block.value_dim) add_values<kLanes, kHeads, 1>(block, head, d, scores, factors, block.value_dim - d);
}

template <int kLanes, typename In>
MEM1_INLINE void attend(const Block<In>& block) {
  int64_t head = 0;
  for (; head + 2 <= block.heads; head += 2) attend_heads<kLanes, 2>(block, head);
  if (head < block.heads) attend_heads<kLanes, 1>(block, head);
}

template <typename In>
MEM1_FOR_AVX512 void attend_avx512(const Block<In>& block) {
  attend<16>(block);
}
template <typename In>
MEM1_FOR_AVX2 void attend_avx2(const Block<In>& block) {
  attend<8>(block);
}
template <typename In>
void attend_anywhere(const Block<In>& block) {
  attend<4>(block);
}

// A step of one token: q [batch, 1, heads, dim], out likewise. Block after block of a row's keys is read for all of its
// heads, as these lie side by side in memory; with few rows a task takes fewer heads. starts: [batch], the first entry
// that each row sees. sink: [heads], or none.
template <typename In>
void decode(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const int32_t* rows,
            const int32_t* lengths, const int32_t* counts, const std::vector<int64_t>& starts, const Scores& scores,
            const float* sink, int64_t lanes, at::Tensor& out) {
  const auto q_in = const_view_of<In>(q), k_in = const_view_of<In>(keys), v_in = const_view_of<In>(values);
  const auto out_view = view_of<In>(out);
  const int64_t batch = q.size(0), kv_heads = keys.size(2), group = q.size(2) / kv_heads, dim = q.size(3);
  const int64_t value_dim = values.size(3), padded = round_up(dim, 16), padded_value = round_up(value_dim, 16);
  const auto cap = static_cast<float>(scores.cap * kLog2E);
  const int64_t threads = at::get_num_threads();
  const int64_t task_heads = batch >= 2 * threads || threads == 1 ? kv_heads : 1, splits = kv_heads / task_heads;
  const auto attend_here = lanes == 16 ? attend_avx512<In> : lanes == 8 ? attend_avx2<In> : attend_anywhere<In>;
  int64_t work = 1;
  for (int64_t b = 0; b < batch; ++b) work += (lengths[b] - starts[b]) * dim * kv_heads;
  constexpr int64_t kWorthAThread = 1 << 15;  // elements of keys
  const int64_t grain = std::max<int64_t>(1, kWorthAThread * batch * splits / work);
  at::parallel_for(0, batch * splits, grain, [&](int64_t begin, int64_t end) {
    const int64_t heads = task_heads * group;
    std::vector<float> queries(heads * padded), sums(heads * padded_value);
    std::vector<Running> running(heads);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / splits, first_kv = n % splits * task_heads, first_head = first_kv * group;
      if (counts[b] == 0) continue;
      for (int64_t h = 0; h < heads; ++h) {
        const In* query = q_in.row(b, 0, first_head + h);
        for (int64_t d = 0; d < dim; ++d) {
          queries[h * padded + d] = static_cast<float>(query[d]) * static_cast<float>(scores.scale * kLog2E);
        }
      }
      std::fill(sums.begin(), sums.end(), 0.0f);
      std::fill(running.begin(), running.end(), Running{});
      for (int64_t first = starts[b]; first < lengths[b]; first += kKeys) {
        const int count = static_cast<int>(std::min<int64_t>(kKeys, lengths[b] - first));
        const int64_t ahead = first + kKeys < lengths[b] ? 1 : 0;
        for (int64_t kv = 0; kv < task_heads; ++kv) {
          attend_here({k_in.row(rows[b], first, first_kv + kv), v_in.row(rows[b], first, first_kv + kv),
                       k_in.stride_row, v_in.stride_row, dim, value_dim, padded, padded_value, group, ahead, count, cap,
                       queries.data() + kv * group * padded, running.data() + kv * group,
                       sums.data() + kv * group * padded_value});
        }
      }
      for (int64_t h = 0; h < heads; ++h) {
        constexpr float kNone = -std::numeric_limits<float>::infinity();
        const Total<float> total(running[h].max, running[h].sum,
                                 sink ? sink[first_head + h] * static_cast<float>(kLog2E) : kNone);
        In* to = out_view.row(b, 0, first_head + h);
        for (int64_t d = 0; d < value_dim; ++d) to[d] = static_cast<In>(sums[h * padded_value + d] * total.factor);
      }
    }
  });
}

// The last tokens of a stream, of which `evict` [1, length] are the lifetimes.
void prefill(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& evict,
             const Scores& scores, const at::Tensor& sinks, at::Tensor& out) {
  constexpr int64_t kBlock = 64;
  const auto [ranges, full_offsets, full_tiles, partial_offsets, partial_tiles] = tile_plan(evict, kBlock, kBlock);
  const Plan plan{evict, full_offsets, full_tiles, partial_offsets, partial_tiles, kBlock, kBlock, {}, {}};
  last_queries(q, keys, values, plan, scores, sinks, out);
}

}  // namespace

at::Tensor cached_attention(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values,
                            const at::Tensor& rows, const at::Tensor& lengths, const at::Tensor& counts,
                            const Scores& scores, std::optional<int64_t> lanes, const at::Tensor& evict,
                            const at::Tensor& sinks) {
  const int64_t batch = q.size(0), pieces = q.size(1);
  at::Tensor out = at::zeros({batch, pieces, q.size(2), values.size(3)}, q.options());
  if (q.numel() == 0) return out;
  const int32_t *row = rows.const_data_ptr<int32_t>(), *length = lengths.const_data_ptr<int32_t>(),
                *count = counts.const_data_ptr<int32_t>();
  if (pieces == 1 && q.scalar_type() != at::kDouble) {
    std::vector<int64_t> starts(batch);
    for (int64_t b = 0; evict.defined() && b < batch; ++b) {
      const int32_t* lifetimes = evict.const_data_ptr<int32_t>() + b * evict.stride(0);  // ascending
      starts[b] = std::upper_bound(lifetimes, lifetimes + length[b], length[b] - 1) - lifetimes;
    }
    const float* sink = sinks.defined() ? sinks.const_data_ptr<float>() : nullptr;
    const auto decode_here = q.scalar_type() == at::kFloat ? decode<float> : decode<at::BFloat16>;
    decode_here(q, keys, values, row, length, count, starts, scores, sink, lanes.value_or(lanes_here()), out);
    return out;
  }
  for (int64_t b = 0; b < batch; ++b) {
    if (count[b] == 0) continue;
    const auto of_slot = [&](const at::Tensor& cache) { return cache.narrow(0, row[b], 1).narrow(1, 0, length[b]); };
    at::Tensor own = out.narrow(0, b, 1).narrow(1, pieces - count[b], count[b]);
    const at::Tensor lifetimes = evict.defined() ? evict.narrow(0, b, 1).narrow(1, 0, length[b]).clamp_max(length[b])
                                                 : at::full({1, length[b]}, length[b], lengths.options());
    prefill(q.narrow(0, b, 1).narrow(1, pieces - count[b], count[b]), of_slot(keys), of_slot(values), lifetimes, scores,
            sinks, own);
  }
  return out;
}

}  // namespace mem1::cpu
