// The forward. Scores are kept transposed, keys down and queries across, so that the softmax reduces down vector lanes,
// no operand is transposed inside the loop, and a key's visible queries are one contiguous range of columns per head:
//   S^T [run, columns] = K [run, dim] Q^T [dim, columns]        O^T [dim, columns] += V^T [dim, run] P^T [run, columns]
#include "torch/attention_cpu.h"

#include "torch/ops.h"

namespace mem1::cpu {

std::vector<Run> live_runs(const Shape& shape, const Plan& plan, int64_t batch, int64_t query_tile) {
  const int64_t mask_batch = plan.evict.size(0) == 1 ? 0 : batch, row = mask_batch * shape.query_tiles + query_tile;
  const int32_t* evict = plan.evict.const_data_ptr<int32_t>() + mask_batch * plan.evict.stride(0);
  const int32_t *full_at = plan.full_offsets.const_data_ptr<int32_t>() + row,
                *partial_at = plan.partial_offsets.const_data_ptr<int32_t>() + row;
  const int32_t *full = plan.full_tiles.const_data_ptr<int32_t>() + full_at[0],
                *full_end = plan.full_tiles.const_data_ptr<int32_t>() + full_at[1],
                *partial = plan.partial_tiles.const_data_ptr<int32_t>() + partial_at[0],
                *partial_end = plan.partial_tiles.const_data_ptr<int32_t>() + partial_at[1];
  const int64_t first_query = query_tile * plan.block_q,
                last_query = std::min(first_query + plan.block_q, shape.length) - 1;
  const int64_t tiles_per_chunk = shape.chunk / plan.block_k;

  std::vector<Run> runs;
  while (full != full_end || partial != partial_end) {
    const bool is_partial = full == full_end || (partial != partial_end && *partial < *full);
    const int64_t tile = is_partial ? *partial++ : *full++;
    const int64_t begin = tile * plan.block_k, end = begin + plan.block_k;
    // The stream's last tile may hold padding, which only the mask removes.
    const uint64_t masked = is_partial || end > shape.length;
    const int64_t bit = tile % tiles_per_chunk;
    if (!runs.empty() && runs.back().end == begin && bit != 0) {
      runs.back().end = end;
      runs.back().masked |= masked << bit;
    } else {
      runs.push_back({begin, end, masked << bit});
    }
  }

  const auto dead = [&](int64_t from) {
    const int64_t to = std::min(from + kGranularity, shape.length);
    for (int64_t j = from; j < to; ++j) {
      if (j <= last_query && evict[j] > first_query) return false;
    }
    return true;
  };
  size_t kept = 0;
  for (Run run : runs) {
    while (run.begin < run.end && dead(run.begin)) run.begin += kGranularity;
    while (run.begin < run.end && dead(run.end - kGranularity)) run.end -= kGranularity;
    if (run.begin < run.end) runs[kept++] = run;
  }
  runs.resize(kept);
  return runs;
}

std::vector<int64_t> balanced_ranges(const Shape& shape, const Plan& plan) {
  const int32_t *full = plan.full_offsets.const_data_ptr<int32_t>(),
                *partial = plan.partial_offsets.const_data_ptr<int32_t>();
  std::vector<int64_t> work(shape.tasks + 1, 0);
  for (int64_t n = 0; n < shape.tasks; ++n) {
    const Task task(shape, plan, n);
    const int64_t row = (plan.evict.size(0) == 1 ? 0 : task.batch) * shape.query_tiles + task.query_tile;
    work[n + 1] = work[n] + full[row + 1] - full[row] + partial[row + 1] - partial[row];
  }
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), shape.tasks));
  std::vector<int64_t> ranges(threads + 1);
  for (int64_t t = 0; t <= threads; ++t) {
    ranges[t] = std::lower_bound(work.begin(), work.end(), work.back() * t / threads) - work.begin();
  }
  ranges[threads] = shape.tasks;
  return ranges;
}

template <typename In, typename T>
PackedKeys pack_keys(const Shape& shape, const at::Tensor& k, const at::Tensor& v, bool backward) {
  const auto options = k.options().dtype(c10::CppTypeToScalarType<T>::value);
  const int64_t k_dim = shape.padded_dim, v_dim = shape.padded_value_dim;
  PackedKeys packed;
  packed.k_rows = at::empty({shape.pairs, shape.padded_length, k_dim}, options);
  packed.v_rows = at::empty({shape.pairs, shape.padded_length, v_dim}, options);
  // The forward multiplies by K and V^T, the backward by K, V and K^T.
  at::Tensor chunks = at::empty_like(backward ? packed.k_rows : packed.v_rows);
  (backward ? packed.k_chunks : packed.v_chunks) = chunks;
  packed.poison = at::zeros({shape.pairs, shape.padded_length}, k.options().dtype(at::kByte));

  T *k_rows = packed.k_rows.template data_ptr<T>(), *v_rows = packed.v_rows.template data_ptr<T>(),
    *chunk_data = chunks.template data_ptr<T>();
  uint8_t* poison = packed.poison.template data_ptr<uint8_t>();
  const auto k_in = const_view_of<In>(k), v_in = const_view_of<In>(v);
  const int64_t chunks_per_pair = shape.padded_length / shape.chunk;
  at::parallel_for(0, shape.pairs * chunks_per_pair, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t pair = n / chunks_per_pair, first = n % chunks_per_pair * shape.chunk;
      T *k_out = k_rows + n * shape.chunk * k_dim, *v_out = v_rows + n * shape.chunk * v_dim;
      const auto pack = [&](View<const In> in, int64_t r, int64_t dim, int64_t padded, T* out) {
        if (first + r < shape.length) {
          const In* row = in.row(pair / shape.kv_heads, first + r, pair % shape.kv_heads);
          if (pack_row(row, dim, padded, out)) return;
          poison[n * shape.chunk + r] = 1;
        }
        std::fill(out, out + padded, T(0));
      };
      for (int64_t r = 0; r < shape.chunk; ++r) {
        pack(k_in, r, shape.dim, k_dim, k_out + r * k_dim);
        pack(v_in, r, shape.value_dim, v_dim, v_out + r * v_dim);
      }
      const int64_t dim = backward ? k_dim : v_dim;
      transpose(backward ? k_out : v_out, shape.chunk, dim, dim, chunk_data + n * shape.chunk * dim, shape.chunk);
    }
  });
  return packed;
}

template <typename S>
void finish_scores(const Shape& shape, const Plan& plan, const Task& task, const Run& run, const uint8_t* poison,
                   const Scores& scores, S* tile) {
  if (scores.cap > 0) {
    cap(tile, (run.end - run.begin) * shape.columns, static_cast<S>(scores.scale / scores.cap));
  }
  const auto of_batch = [&](const at::Tensor& table) {
    return table.const_data_ptr<int32_t>() + (table.size(0) == 1 ? 0 : task.batch) * table.size(1);
  };
  const bool windowed = plan.limits.defined();
  const int32_t *evict = of_batch(plan.evict), *positions = windowed ? of_batch(plan.positions) : nullptr,
                *limits = windowed ? of_batch(plan.limits) : nullptr;
  constexpr S kInvisible = -std::numeric_limits<S>::infinity(), kPoison = std::numeric_limits<S>::quiet_NaN();
  for (int64_t j = run.begin; j < run.end; ++j) {
    const bool masked = run.masked >> (j % shape.chunk / plan.block_k) & 1;
    S* row = tile + (j - run.begin) * shape.columns;
    if (!masked && !poison[j]) continue;
    // Query columns [low, high) of each head see key j.
    const int64_t last = j < shape.length ? evict[j] : 0;
    const int64_t high = std::clamp<int64_t>(last - task.first_query, 0, plan.block_q);
    const int64_t low = std::clamp<int64_t>(j - task.first_query, 0, high);
    if (low == 0 && high == plan.block_q && !poison[j] && !windowed) continue;
    for (int64_t h = 0; h < shape.task_heads; ++h, row += plan.block_q) {
      std::fill(row, row + low, kInvisible);
      if (poison[j]) std::fill(row + low, row + high, kPoison);
      std::fill(row + high, row + plan.block_q, kInvisible);
      if (!windowed || !masked) continue;
      for (int64_t c = low; c < high; ++c) {
        if (positions[task.first_query + c] >= limits[j]) row[c] = kInvisible;
      }
    }
  }
}

template PackedKeys pack_keys<float, float>(const Shape&, const at::Tensor&, const at::Tensor&, bool);
template PackedKeys pack_keys<double, double>(const Shape&, const at::Tensor&, const at::Tensor&, bool);
template PackedKeys pack_keys<at::BFloat16, float>(const Shape&, const at::Tensor&, const at::Tensor&, bool);
template PackedKeys pack_keys<at::BFloat16, at::BFloat16>(const Shape&, const at::Tensor&, const at::Tensor&, bool);
template void finish_scores(const Shape&, const Plan&, const Task&, const Run&, const uint8_t*, const Scores&, float*);
template void finish_scores(const Shape&, const Plan&, const Task&, const Run&, const uint8_t*, const Scores&, double*);

namespace {

// What one thread needs for a task, allocated once.
template <typename T>
struct Workspace {
  using S = typename Sum<T>::type;
  std::vector<T> rows, queries, probabilities;
  std::vector<S> scores, out, out_rows, running_max, safe_max, new_max, factor, sum;
  explicit Workspace(const Shape& shape)
      : rows(shape.columns * shape.padded_dim),
        queries(shape.columns * shape.padded_dim),
        probabilities(std::is_same_v<T, S> ? 0 : shape.chunk * shape.columns),
        scores(shape.chunk * shape.columns),
        out(shape.columns * shape.padded_value_dim),
        out_rows(shape.columns * shape.padded_value_dim),
        running_max(shape.columns),
        safe_max(shape.columns),
        new_max(shape.columns),
        factor(shape.columns),
        sum(shape.columns) {}
};

// The online softmax over the live runs of one task: leaves O^T (not yet divided) in w.out, its sums and maxima beside
// it.
template <typename T>
void attend(const Shape& shape, const Plan& plan, const Task& task, const PackedKeys& keys, const Scores& scores,
            Workspace<T>& w) {
  using S = typename Sum<T>::type;
  constexpr S kNone = -std::numeric_limits<S>::infinity();
  const int64_t columns = shape.columns, k_dim = shape.padded_dim, v_dim = shape.padded_value_dim;
  const T *k_rows = keys.k_rows.const_data_ptr<T>() + task.pair * shape.padded_length * k_dim,
          *v_chunks = keys.v_chunks.const_data_ptr<T>() + task.pair * shape.padded_length * v_dim;
  const S scale2 = static_cast<S>(scores.base2());
  T* p = reinterpret_cast<T*>(w.scores.data());
  if constexpr (!std::is_same_v<T, S>) p = w.probabilities.data();

  std::fill(w.running_max.begin(), w.running_max.end(), kNone);
  std::fill(w.sum.begin(), w.sum.end(), S(0));
  std::fill(w.out.begin(), w.out.end(), S(0));
  for (const Run& run : live_runs(shape, plan, task.batch, task.query_tile)) {
    const int64_t rows = run.end - run.begin;
    gemm<T>(rows, columns, k_dim, k_rows + run.begin * k_dim, k_dim, w.queries.data(), columns, w.scores.data(),
            columns, false);
    finish_scores(shape, plan, task, run, keys.poison_of(task.pair), scores, w.scores.data());

    w.new_max = w.running_max;
    column_max(w.scores.data(), rows, columns, scale2, w.new_max.data());
    bool rescale = false;
    for (int64_t c = 0; c < columns; ++c) {
      w.safe_max[c] =
          w.new_max[c] == kNone ? S(0) : w.new_max[c];  // a column that has seen nothing yet: exp2(-inf - 0)
      w.factor[c] = w.running_max[c] == kNone ? S(0) : std::exp2(w.running_max[c] - w.safe_max[c]);
      rescale |= w.factor[c] != S(1);
      w.sum[c] *= w.factor[c];
    }
    if (rescale) scale_columns(w.out.data(), v_dim, columns, w.factor.data());
    w.running_max.swap(w.new_max);
    exponentials(w.scores.data(), rows, columns, scale2, w.safe_max.data(), w.sum.data(), p);
    const T* v_run = v_chunks + run.begin / shape.chunk * shape.chunk * v_dim + run.begin % shape.chunk;
    gemm<T>(v_dim, columns, rows, v_run, shape.chunk, p, columns, w.out.data(), columns, true);
  }
}

template <typename In, typename T>
void forward(const Plan& plan, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Scores& scores,
             const at::Tensor& sinks, at::Tensor& out, at::Tensor& lse) {
  using S = typename Sum<T>::type;
  const Shape shape(q, k, v, plan);
  const S* sink = sinks.defined() ? sinks.const_data_ptr<S>() : nullptr;
  const PackedKeys keys = pack_keys<In, T>(shape, k, v, false);
  const auto q_in = const_view_of<In>(q);
  const auto out_view = view_of<In>(out);
  S* lse_data = lse.data_ptr<S>();

  for_each_share(balanced_ranges(shape, plan), [&](int64_t, int64_t begin, int64_t end) {
    Workspace<T> w(shape);
    for (int64_t n = begin; n < end; ++n) {
      const Task task(shape, plan, n);
      pack_queries<In, T>(shape, plan, task, q_in, shape.dim, shape.padded_dim, w.rows.data());
      transposed_operand(w.rows.data(), shape.columns, shape.padded_dim, w.queries.data(), shape.columns);
      attend<T>(shape, plan, task, keys, scores, w);

      const int64_t v_dim = shape.padded_value_dim;
      transpose(w.out.data(), v_dim, shape.columns, shape.columns, w.out_rows.data(), v_dim);
      for (int64_t c = 0; c < shape.columns; ++c) {
        const int64_t i = task.first_query + c % plan.block_q, head = task.first_head + c / plan.block_q;
        if (i < shape.first_query || i >= shape.length) continue;
        const Total<S> total(w.running_max[c], w.sum[c],
                             sink ? sink[head] * S(kLog2E) : -std::numeric_limits<S>::infinity());
        const int64_t asked = i - shape.first_query;
        In* row = out_view.row(task.batch, asked, head);
        for (int64_t d = 0; d < shape.value_dim; ++d) {
          row[d] = static_cast<In>(w.out_rows[c * v_dim + d] * total.factor);
        }
        lse_data[(task.batch * shape.query_heads + head) * q.size(1) + asked] = total.log2_sum * S(kLn2);
      }
    }
    gemm_done<T>();
  });
}

}  // namespace

at::Tensor last_queries(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Plan& plan,
                        const Scores& scores, const at::Tensor& sinks, at::Tensor& out) {
  at::Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)},
                             q.options().dtype(q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
  if (q.numel() == 0) return lse.fill_(-std::numeric_limits<double>::infinity());
  dispatch(q.scalar_type(),
           [&](auto in, auto t) { forward<decltype(in), decltype(t)>(plan, q, k, v, scores, sinks, out, lse); });
  return lse;
}

std::tuple<at::Tensor, at::Tensor> trajectory_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                        const Plan& plan, const Scores& scores,
                                                        const at::Tensor& sinks) {
  at::Tensor out = at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
  at::Tensor lse = last_queries(q, k, v, plan, scores, sinks, out);
  return {out, lse};
}

}  // namespace mem1::cpu
