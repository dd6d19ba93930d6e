// The backward, in the forward's transposed form: five products per run, none of them of a transposed operand.
//   P^T = exp(K Q^T - lse)      dP^T = V dO^T             dS^T = P^T * (dP^T - delta)
//   dV += P^T dO                dK += dS^T Q              dQ^T += K^T dS^T
#include "torch/attention_cpu.h"

#include "torch/ops.h"

namespace mem1::cpu {
namespace {

template <typename T>
struct Workspace {
  using S = typename Sum<T>::type;
  std::vector<T> q_rows, q_pairs, q_transposed, do_rows, do_pairs, do_transposed, p, ds, ds_pairs;
  std::vector<S> scores, dp, dq, dq_rows, lse, delta;
  explicit Workspace(const Shape& shape) {
    const size_t queries = shape.columns * shape.padded_dim, outputs = shape.columns * shape.padded_value_dim,
                 tile = shape.chunk * shape.columns;
    for (auto* buffer : {&q_rows, &q_transposed}) buffer->resize(queries);
    for (auto* buffer : {&do_rows, &do_transposed}) buffer->resize(outputs);
    for (auto* buffer : {&dq, &dq_rows}) buffer->resize(queries);
    for (auto* buffer : {&scores, &dp}) buffer->resize(tile);
    for (auto* buffer : {&lse, &delta}) buffer->resize(shape.columns);
    if (std::is_same_v<T, S>) return;  // the other buffers exist only where products run in another type than sums
    q_pairs.resize(queries);
    do_pairs.resize(outputs);
    for (auto* buffer : {&p, &ds, &ds_pairs}) buffer->resize(tile);
  }
};

struct Saved {
  const at::Tensor &q, &d_out, &out, &lse, &d_lse;
};

// Per column: lse in base 2, and delta = sum(dO * O) - dlse, the part of dS that is the same for every key.
template <typename In, typename T>
void load_statistics(const Shape& shape, const Plan& plan, const Task& task, const Saved& saved, Workspace<T>& w) {
  using S = typename Sum<T>::type;
  const auto d_out = const_view_of<In>(saved.d_out), out = const_view_of<In>(saved.out);
  for (int64_t c = 0; c < shape.columns; ++c) {
    const int64_t i = task.first_query + c % plan.block_q, head = task.first_head + c / plan.block_q;
    w.lse[c] = std::numeric_limits<S>::infinity();  // past the stream's end: P = 0
    w.delta[c] = 0;
    if (i >= shape.length) continue;
    const int64_t at = (task.batch * shape.query_heads + head) * shape.length + i;
    const In *d_row = d_out.row(task.batch, i, head), *row = out.row(task.batch, i, head);
    S delta = 0;
    for (int64_t d = 0; d < shape.value_dim; ++d) delta += static_cast<S>(d_row[d]) * static_cast<S>(row[d]);
    if (saved.d_lse.defined()) delta -= saved.d_lse.const_data_ptr<S>()[at];
    w.delta[c] = delta;
    const S lse = saved.lse.const_data_ptr<S>()[at];
    if (lse != -std::numeric_limits<S>::infinity()) w.lse[c] = lse * S(kLog2E);
  }
}

// One task: adds to dk [padded_length, padded_dim] and dv [padded_length, padded_value_dim] of its pair and leaves dQ^T
// in w.dq (dk and dq without the scale).
template <typename In, typename T>
void differentiate(const Shape& shape, const Plan& plan, const Task& task, const PackedKeys& keys, const Saved& saved,
                   const Scores& scores, typename Sum<T>::type* dk, typename Sum<T>::type* dv, Workspace<T>& w) {
  using S = typename Sum<T>::type;
  const int64_t columns = shape.columns, dim = shape.padded_dim, v_dim = shape.padded_value_dim;
  const int64_t offset = task.pair * shape.padded_length * dim;
  const T *k_rows = keys.k_rows.const_data_ptr<T>() + offset, *k_chunks = keys.k_chunks.const_data_ptr<T>() + offset,
          *v_rows = keys.v_rows.const_data_ptr<T>() + task.pair * shape.padded_length * v_dim;
  pack_queries<In, T>(shape, plan, task, const_view_of<In>(saved.q), shape.dim, dim, w.q_rows.data());
  pack_queries<In, T>(shape, plan, task, const_view_of<In>(saved.d_out), shape.value_dim, v_dim, w.do_rows.data());
  transposed_operand(w.q_rows.data(), columns, dim, w.q_transposed.data(), columns);
  transposed_operand(w.do_rows.data(), columns, v_dim, w.do_transposed.data(), columns);
  const T *q_operand = operand(w.q_rows.data(), columns, dim, w.q_pairs.data()),
          *do_operand = operand(w.do_rows.data(), columns, v_dim, w.do_pairs.data());
  load_statistics<In, T>(shape, plan, task, saved, w);
  T *p = w.p.data(), *ds = w.ds.data(), *ds_operand = w.ds_pairs.data();
  if constexpr (std::is_same_v<T, S>) p = w.scores.data(), ds = ds_operand = w.dp.data();

  std::fill(w.dq.begin(), w.dq.end(), S(0));
  for (const Run& run : live_runs(shape, plan, task.batch, task.query_tile)) {
    const int64_t rows = run.end - run.begin, at = run.begin * dim, v_at = run.begin * v_dim;
    gemm<T>(rows, columns, dim, k_rows + at, dim, w.q_transposed.data(), columns, w.scores.data(), columns, false);
    gemm<T>(rows, columns, v_dim, v_rows + v_at, v_dim, w.do_transposed.data(), columns, w.dp.data(), columns, false);
    finish_scores(shape, plan, task, run, keys.poison_of(task.pair), scores, w.scores.data());
    gradients(w.scores.data(), w.dp.data(), rows, columns, static_cast<S>(scores.base2()), scores.cap > 0, w.lse.data(),
              w.delta.data(), p, ds, ds_operand);
    gemm<T>(rows, v_dim, columns, p, columns, do_operand, v_dim, dv + v_at, v_dim, true);
    gemm<T>(rows, dim, columns, ds, columns, q_operand, dim, dk + at, dim, true);
    const T* k_run = k_chunks + run.begin / shape.chunk * shape.chunk * dim + run.begin % shape.chunk;
    gemm<T>(dim, columns, rows, k_run, shape.chunk, ds_operand, columns, w.dq.data(), columns, true);
  }
}

// Writes rows of one pair, `padded` apart, times the factor, to their places in a gradient.
template <typename In, typename S>
void store_rows(const Shape& shape, const S* rows, int64_t dim, int64_t padded, S factor, int64_t begin, int64_t end,
                int64_t pair, View<In> out) {
  for (int64_t j = begin; j < end; ++j) {
    In* row = out.row(pair / shape.kv_heads, j, pair % shape.kv_heads);
    for (int64_t d = 0; d < dim; ++d) row[d] = static_cast<In>(rows[j * padded + d] * factor);
  }
}

template <typename In, typename T>
void backward(const Plan& plan, const at::Tensor& k, const at::Tensor& v, const Saved& saved, const Scores& scores,
              at::Tensor& dq, at::Tensor& dk, at::Tensor& dv) {
  using S = typename Sum<T>::type;
  const Shape shape(saved.q, k, v, plan);
  const PackedKeys keys = pack_keys<In, T>(shape, k, v, true);
  const auto dq_view = view_of<In>(dq);
  const auto ranges = balanced_ranges(shape, plan);
  const auto threads = static_cast<int64_t>(ranges.size()) - 1;
  const int64_t tasks_per_pair = shape.tasks / shape.pairs, k_size = shape.padded_length * shape.padded_dim,
                v_size = shape.padded_length * shape.padded_value_dim;

  // dK and dV of all pairs. A thread whose share begins inside a pair would add to what an earlier thread adds to: it
  // gets sums of its own for that pair, added in thread order afterwards, so that a run repeats bit for bit.
  const auto options = k.options().dtype(c10::CppTypeToScalarType<S>::value);
  at::Tensor sums = at::zeros({shape.pairs, k_size + v_size}, options);
  std::vector<at::Tensor> own(threads);
  for (int64_t t = 0; t < threads; ++t) {
    if (ranges[t] % tasks_per_pair != 0 && ranges[t] < ranges[t + 1]) own[t] = at::zeros({k_size + v_size}, options);
  }
  const auto sums_of = [&](int64_t pair) { return sums.data_ptr<S>() + pair * (k_size + v_size); };

  for_each_share(ranges, [&](int64_t t, int64_t begin, int64_t end) {
    Workspace<T> w(shape);
    for (int64_t n = begin; n < end; ++n) {
      const Task task(shape, plan, n);
      const bool shared = own[t].defined() && task.pair == begin / tasks_per_pair;
      S* dk_out = shared ? own[t].template data_ptr<S>() : sums_of(task.pair);
      differentiate<In, T>(shape, plan, task, keys, saved, scores, dk_out, dk_out + k_size, w);

      transpose(w.dq.data(), shape.padded_dim, shape.columns, shape.columns, w.dq_rows.data(), shape.padded_dim);
      for (int64_t c = 0; c < shape.columns; ++c) {
        const int64_t i = task.first_query + c % plan.block_q;
        if (i >= shape.length) continue;
        In* row = dq_view.row(task.batch, i, task.first_head + c / plan.block_q);
        for (int64_t d = 0; d < shape.dim; ++d) {
          row[d] = static_cast<In>(w.dq_rows[c * shape.padded_dim + d] * static_cast<S>(scores.scale));
        }
      }
    }
    gemm_done<T>();
  });
  for (int64_t t = 0; t < threads; ++t) {
    if (own[t].defined()) sums.select(0, ranges[t] / tasks_per_pair).add_(own[t]);
  }

  const auto dk_view = view_of<In>(dk), dv_view = view_of<In>(dv);
  at::parallel_for(0, shape.pairs * shape.length, kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end;) {
      const int64_t pair = n / shape.length, first = n % shape.length;
      const int64_t stop = std::min(shape.length, first + end - n);
      const S* of_pair = sums_of(pair);
      store_rows<In, S>(shape, of_pair, shape.dim, shape.padded_dim, static_cast<S>(scores.scale), first, stop, pair,
                        dk_view);
      store_rows<In, S>(shape, of_pair + k_size, shape.value_dim, shape.padded_value_dim, S(1), first, stop, pair,
                        dv_view);
      n += stop - first;
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> trajectory_attention_backward(
    const at::Tensor& d_out, const at::Tensor& d_lse, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out, const at::Tensor& lse, const Plan& plan, const Scores& scores) {
  at::Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options()),
             dv = at::empty(v.sizes(), v.options());
  if (q.numel() == 0) return {dq, dk.zero_(), dv.zero_()};
  const Saved saved{q, d_out, out, lse, d_lse};
  dispatch(q.scalar_type(),
           [&](auto in, auto t) { backward<decltype(in), decltype(t)>(plan, k, v, saved, scores, dq, dk, dv); });
  return {dq, dk, dv};
}

}  // namespace mem1::cpu
