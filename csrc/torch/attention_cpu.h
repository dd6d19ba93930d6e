// Trajectory attention on the CPU: what attention_cpu.cpp (the forward), attention_backward_cpu.cpp and the pieces they
// share have in common. Work is cut into tasks of one query tile for the heads of one KV group; a task walks its live
// keys in runs of up to kChunk and never sees a dead tile.
#pragma once

#include "torch/gemm_cpu.h"
#include "torch/pack_cpu.h"
#include "torch/softmax_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <limits>
#include <vector>

namespace mem1::cpu {

constexpr int64_t kChunk = 256;       // longest run of keys
constexpr int64_t kGranularity = 16;  // runs start and end at multiples of this, so few product shapes exist
constexpr int64_t kMaxHeads = 8;      // heads of a KV group in one task: keeps its tiles in the second-level cache
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

struct Plan {
  at::Tensor evict, full_offsets, full_tiles, partial_offsets, partial_tiles;
  int64_t block_q, block_k;
  at::Tensor positions, limits;  // of a window over positions: query i sees key j only if positions[i] < limits[j]
};

// What is done to the scores q k of visible pairs: s = scale q k, or cap tanh(scale q k / cap) for a cap > 0. The tiles
// hold q k, or the tanh; both times base2() they are s in units of log2.
struct Scores {
  double scale, cap;
  double base2() const { return (cap > 0 ? cap : scale) * kLog2E; }
};

// Sizes. A "pair" is one (batch, KV head); "columns" are the queries of a task: heads of the group times block_q.
struct Shape {
  int64_t batch, length, query_heads, kv_heads, dim, value_dim;
  int64_t first_query;  // queries are the last of the stream: those before this one are not asked for
  int64_t group, task_heads, columns, padded_dim, padded_value_dim, query_tiles, first_tile, pairs, tasks;
  int64_t chunk,
      padded_length;  // transposed keys are stored in chunks of this many; a short stream has one short chunk

  Shape(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Plan& plan)
      : batch(q.size(0)),
        length(k.size(1)),
        query_heads(q.size(2)),
        kv_heads(k.size(2)),
        dim(q.size(3)),
        value_dim(v.size(3)),
        first_query(length - q.size(1)) {
    group = query_heads / kv_heads;
    task_heads = std::min(group, kMaxHeads);
    while (group % task_heads != 0) --task_heads;
    columns = task_heads * plan.block_q;
    chunk = std::min(kChunk, round_up(length, plan.block_k));
    padded_length = round_up(length, chunk);
    padded_dim = round_up(dim, 16);
    padded_value_dim = round_up(value_dim, 16);
    query_tiles = (length + plan.block_q - 1) / plan.block_q;
    first_tile = first_query / plan.block_q;
    pairs = batch * kv_heads;
    tasks = pairs * (group / task_heads) * (query_tiles - first_tile);
  }
};

// Task number -> what it works on. Tasks of one pair are neighbours.
struct Task {
  int64_t pair, batch, kv_head, first_head, query_tile, first_query;
  Task(const Shape& shape, const Plan& plan, int64_t number) {
    const int64_t tiles = shape.query_tiles - shape.first_tile;
    query_tile = shape.first_tile + number % tiles;
    const int64_t rest = number / tiles, splits = shape.group / shape.task_heads;
    pair = rest / splits;
    batch = pair / shape.kv_heads;
    kv_head = pair % shape.kv_heads;
    first_head = kv_head * shape.group + rest % splits * shape.task_heads;
    first_query = query_tile * plan.block_q;
  }
};

// Keys [begin, end), all in one chunk; bit t of `masked` says that the t-th tile of the chunk needs the mask.
struct Run {
  int64_t begin, end;
  uint64_t masked;
};

// Live keys of a query tile, ascending; trimmed at both ends to what a query of the tile can see.
std::vector<Run> live_runs(const Shape& shape, const Plan& plan, int64_t batch, int64_t query_tile);

// Cuts the tasks into contiguous ranges of about equal work, one per thread: [threads + 1] boundaries.
std::vector<int64_t> balanced_ranges(const Shape& shape, const Plan& plan);

// Keys and values of all pairs as left operands: rows [pairs, padded_length, padded_dim] (values: padded_value_dim),
// and transposed in chunks [pairs, padded_length / chunk, padded_dim, chunk]. A row with a NaN or an infinity is zero
// here and marked in `poison` [pairs, padded_length]: products then stay finite for the queries that do not see it, and
// mask_scores turns it into a NaN for those that do.
struct PackedKeys {
  at::Tensor k_rows, k_chunks, v_rows, v_chunks, poison;
  const uint8_t* poison_of(int64_t pair) const { return poison.const_data_ptr<uint8_t>() + pair * poison.size(1); }
};
template <typename In, typename T>
PackedKeys pack_keys(const Shape& shape, const at::Tensor& k, const at::Tensor& v, bool backward);

// The forward for the last queries of a stream, into `out`; returns the log-sum-exps. q [batch, some, heads, dim], out
// likewise of value_dim, k and v [batch, all, ..]. sinks: undefined, or of the type of the log-sum-exps, [heads].
at::Tensor last_queries(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Plan& plan,
                        const Scores& scores, const at::Tensor& sinks, at::Tensor& out);

// Makes of the products q k [run, columns] what `Scores` says, and of those of invisible pairs -inf.
template <typename S>
void finish_scores(const Shape& shape, const Plan& plan, const Task& task, const Run& run, const uint8_t* poison,
                   const Scores& scores, S* tile);

// The sum of a softmax over keys and a sink whose score is `sink`, and what its weights are multiplied with: of a
// running maximum and a sum relative to it, both for scores in units of log2.
template <typename S>
struct Total {
  S log2_sum, factor;
  Total(S maximum, S sum, S sink) {
    constexpr S kNone = -std::numeric_limits<S>::infinity();
    const bool empty = sum == S(0);
    const S top = std::max(empty ? kNone : maximum, sink);
    const S weight = empty ? S(0) : std::exp2(maximum - top), none = top == kNone ? S(0) : std::exp2(sink - top);
    const S total = sum * weight + none;
    log2_sum = empty && sink == kNone ? kNone : top + std::log2(total);
    factor = empty ? S(0) : weight / total;
  }
};

template <typename T>
View<T> view_of(const at::Tensor& t) {
  return {t.data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2)};
}
template <typename T>
View<const T> const_view_of(const at::Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2)};
}

// Rows of the queries of a task, of `dim` elements, as dense rows [columns, padded]; zero for those there are not.
template <typename In, typename T>
void pack_queries(const Shape& shape, const Plan& plan, const Task& task, View<const In> in, int64_t dim,
                  int64_t padded, T* rows) {
  for (int64_t c = 0; c < shape.columns; ++c) {
    const int64_t i = task.first_query + c % plan.block_q;
    T* out = rows + c * padded;
    if (i >= shape.first_query && i < shape.length) {
      pack_row(in.row(task.batch, i - shape.first_query, task.first_head + c / plan.block_q), dim, padded, out);
    } else {
      std::fill(out, out + padded, T(0));
    }
  }
}

// Runs `body(thread, first task, one past the last)` on every thread with its share of the tasks.
template <typename Body>
void for_each_share(const std::vector<int64_t>& ranges, const Body& body) {
  const auto threads = static_cast<int64_t>(ranges.size()) - 1;
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(t, ranges[t], ranges[t + 1]);
  });
}

// Calls function(In{}, T{}) with the input's element type and the type its products run in.
template <typename Function>
auto dispatch(at::ScalarType dtype, const Function& function) {
  switch (dtype) {
    case at::kFloat:
      return function(float{}, float{});
    case at::kDouble:
      return function(double{}, double{});
    default:
      return has_bfloat16_products() ? function(at::BFloat16{}, at::BFloat16{}) : function(at::BFloat16{}, float{});
  }
}

}  // namespace mem1::cpu
