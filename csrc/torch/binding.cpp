// The ops of torch.ops.mem1_core and the module mem1_core._C. Whatever a caller passes is checked here before it is
// read.
#include "torch/attention_cpu.h"
#include "torch/lanes_cpu.h"
#include "torch/ops.h"

#include "mem1/mem1.h"

#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <string>

namespace mem1 {
namespace {

using at::Tensor;

// A list per query tile, in CSR form: nothing read through it may lie outside of it, or outside of the stream.
void check_lists(const char* name, const Tensor& offsets, const Tensor& tiles, int64_t rows, int64_t key_tiles) {
  TORCH_CHECK_VALUE(offsets.numel() == rows + 1, "mask: expected ", rows + 1, " ", name, " offsets, got ",
                    offsets.numel());
  const int32_t *at = offsets.const_data_ptr<int32_t>(), *tile = tiles.const_data_ptr<int32_t>();
  bool valid = at[0] == 0 && at[rows] == tiles.numel();
  for (int64_t row = 0; row < rows; ++row) valid &= at[row] <= at[row + 1];
  for (int64_t n = 0; n < tiles.numel(); ++n) valid &= tile[n] >= 0 && tile[n] < key_tiles;
  TORCH_CHECK_VALUE(valid, "mask: expected ascending ", name, " offsets that end at ", tiles.numel(),
                    " and tiles below ", key_tiles, "; this plan is not of this mask");
}

cpu::Plan checked_plan(const Tensor& q, const Tensor& evict, const Tensor& full_offsets, const Tensor& full_tiles,
                       const Tensor& partial_offsets, const Tensor& partial_tiles, int64_t block_q, int64_t block_k,
                       const std::optional<Tensor>& positions, const std::optional<Tensor>& limits) {
  TORCH_CHECK_VALUE(block_q > 0 && block_q % cpu::kColumns == 0, "block_q: expected a multiple of ", cpu::kColumns,
                    ", got ", block_q);
  TORCH_CHECK_VALUE(block_k >= cpu::kGranularity && cpu::kChunk % block_k == 0, "block_k: expected 16, 32, 64, 128 or ",
                    "256, got ", block_k);
  TORCH_CHECK_VALUE(
      evict.dim() == 2 && evict.size(1) == q.size(1) && (evict.size(0) == 1 || evict.size(0) == q.size(0)),
      "mask: expected evict of shape [", q.size(0), " or 1, ", q.size(1), "], got ", evict.sizes());
  const int64_t rows = evict.size(0) * ((evict.size(1) + block_q - 1) / block_q);
  for (const Tensor* t : {&evict, &full_offsets, &full_tiles, &partial_offsets, &partial_tiles}) {
    TORCH_CHECK_TYPE(t->scalar_type() == at::kInt && t->is_contiguous() && t->device() == q.device(),
                     "mask: expected contiguous int32 tensors on ", q.device(), ", got ", t->scalar_type(), " on ",
                     t->device());
  }
  const int64_t key_tiles = (evict.size(1) + block_k - 1) / block_k;
  check_lists("full", full_offsets, full_tiles, rows, key_tiles);
  check_lists("partial", partial_offsets, partial_tiles, rows, key_tiles);
  TORCH_CHECK_VALUE(positions.has_value() == limits.has_value(), "positions, limits: expected both or none");
  for (const auto* t : {&positions, &limits}) {
    if (!t->has_value()) continue;
    TORCH_CHECK_TYPE((*t)->scalar_type() == at::kInt && (*t)->is_contiguous() && (*t)->device() == q.device(),
                     "positions, limits: expected contiguous int32 tensors on ", q.device(), ", got ",
                     (*t)->scalar_type(), " on ", (*t)->device());
    TORCH_CHECK_VALUE(
        (*t)->dim() == 2 && (*t)->size(1) == q.size(1) && ((*t)->size(0) == 1 || (*t)->size(0) == q.size(0)),
        "positions, limits: expected shape [", q.size(0), " or 1, ", q.size(1), "], got ", (*t)->sizes());
  }
  return {evict,
          full_offsets,
          full_tiles,
          partial_offsets,
          partial_tiles,
          block_q,
          block_k,
          positions.value_or(Tensor()),
          limits.value_or(Tensor())};
}

void check_input(const char* name, const Tensor& t, const Tensor& q) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble || t.scalar_type() == at::kBFloat16,
                   name, ": expected float32, bfloat16 or float64 on the CPU, got ", t.scalar_type());
  TORCH_CHECK_TYPE(t.scalar_type() == q.scalar_type(), name, ": expected the dtype of q, ", q.scalar_type(), ", got ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == 4, name, ": expected [batch, length, heads, dim], got ", t.dim(), " dimensions");
  TORCH_CHECK_VALUE(t.size(3) > 0, name, ": expected dim >= 1, got 0");
  TORCH_CHECK_VALUE(t.size(0) == q.size(0) && t.size(1) == q.size(1), name, ": expected batch and length of q, ",
                    q.sizes(), ", got ", t.sizes());
  TORCH_CHECK_VALUE(t.stride(3) == 1 || t.size(3) <= 1, name, ": expected a contiguous last dimension, got stride ",
                    t.stride(3));
}

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_input("q", q, q);
  check_input("k", k, q);
  check_input("v", v, q);
  TORCH_CHECK_VALUE(k.size(3) == q.size(3), "k: expected the dim of q, ", q.size(3), ", got ", k.size(3));
  TORCH_CHECK_VALUE(k.size(2) == v.size(2), "v: expected the heads of k, ", k.size(2), ", got ", v.size(2));
  TORCH_CHECK_VALUE(k.size(2) > 0 && q.size(2) % k.size(2) == 0, "q: expected a multiple of the ", k.size(2),
                    " heads of k, got ", q.size(2));
}

void check_lse(const char* name, const Tensor& t, const Tensor& q) {
  const auto dtype = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, ": expected ", dtype, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == 3 && t.size(0) == q.size(0) && t.size(1) == q.size(2) && t.size(2) == q.size(1), name,
                    ": expected shape [", q.size(0), ", ", q.size(2), ", ", q.size(1), "], got ", t.sizes());
}

Tensor checked_sinks(const std::optional<Tensor>& sinks, const Tensor& q) {
  if (!sinks.has_value()) return {};
  const auto dtype = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_TYPE(sinks->scalar_type() == dtype, "sinks: expected ", dtype, ", got ", sinks->scalar_type());
  TORCH_CHECK_VALUE(sinks->dim() == 1 && sinks->size(0) == q.size(2), "sinks: expected shape [", q.size(2), "], got ",
                    sinks->sizes());
  return sinks->contiguous();
}

cpu::Scores checked_scores(double scale, double softcap) {
  TORCH_CHECK_VALUE(scale > 0, "scale: expected > 0 here (mem1_core.ops takes any), got ", scale);
  TORCH_CHECK_VALUE(softcap >= 0, "softcap: expected > 0, or 0 for none, got ", softcap);
  return {scale, softcap};
}

using OptionalTensor = std::optional<Tensor>;

// The CPU kernels read of a plan what checked_plan takes; key_ranges, the two orders and the lists of key tiles are for
// other backends.
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& evict,
                                     const Tensor&, const Tensor& full_offsets, const Tensor& full_tiles,
                                     const Tensor& partial_offsets, const Tensor& partial_tiles, const Tensor&,
                                     const Tensor&, int64_t block_q, int64_t block_k, double scale,
                                     const OptionalTensor& positions, const OptionalTensor& limits,
                                     const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                     const OptionalTensor&, const OptionalTensor& sinks, double softcap) {
  check_inputs(q, k, v);
  const auto plan = checked_plan(q, evict, full_offsets, full_tiles, partial_offsets, partial_tiles, block_q, block_k,
                                 positions, limits);
  return cpu::trajectory_attention(q, k, v, plan, checked_scores(scale, softcap), checked_sinks(sinks, q));
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& d_out, const std::optional<Tensor>& d_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& evict, const Tensor&, const Tensor& full_offsets,
    const Tensor& full_tiles, const Tensor& partial_offsets, const Tensor& partial_tiles, const Tensor&, const Tensor&,
    int64_t block_q, int64_t block_k, double scale, const OptionalTensor& positions, const OptionalTensor& limits,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double softcap) {
  check_inputs(q, k, v);
  check_input("d_out", d_out, q);
  check_input("out", out, q);
  TORCH_CHECK_VALUE(out.size(2) == q.size(2) && out.size(3) == v.size(3) && d_out.sizes() == out.sizes(),
                    "d_out, out: expected the heads of q, ", q.size(2), ", and the dim of v, ", v.size(3), ", got ",
                    d_out.sizes(), " and ", out.sizes());
  check_lse("lse", lse, q);
  if (d_lse.has_value()) check_lse("d_lse", *d_lse, q);
  const auto plan = checked_plan(q, evict, full_offsets, full_tiles, partial_offsets, partial_tiles, block_q, block_k,
                                 positions, limits);
  // An expanded gradient (of a sum, say) has stride 0 everywhere; the kernel reads rows.
  const Tensor d_lse_dense = d_lse.has_value() ? d_lse->contiguous() : Tensor();
  return cpu::trajectory_attention_backward(d_out, d_lse_dense, q, k, v, out, lse.contiguous(), plan,
                                            checked_scores(scale, softcap));
}

Tensor cached_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& cache_batch_idx,
                        const Tensor& cache_seqlens, const Tensor& query_lens, double scale,
                        std::optional<int64_t> lanes, const OptionalTensor& evict, const OptionalTensor& sinks,
                        double softcap) {
  check_input("q", q, q);
  for (const auto& [name, t] : {std::pair{"k_cache", &k_cache}, std::pair{"v_cache", &v_cache}}) {
    TORCH_CHECK_TYPE(t->scalar_type() == q.scalar_type(), name, ": expected the dtype of q, ", q.scalar_type(),
                     ", got ", t->scalar_type());
    const int64_t dim = t == &k_cache ? q.size(3) : t->dim() == 4 ? t->size(3) : 0;
    TORCH_CHECK_VALUE(t->dim() == 4 && t->sizes().slice(0, 3) == k_cache.sizes().slice(0, 3) && t->size(3) == dim, name,
                      ": expected [slots, capacity, heads, ", dim, "], got ", t->sizes());
    TORCH_CHECK_VALUE(t->stride(3) == 1 || t->size(3) <= 1, name, ": expected a contiguous last dimension, got stride ",
                      t->stride(3));
  }
  TORCH_CHECK_VALUE(k_cache.size(2) > 0 && q.size(2) % k_cache.size(2) == 0, "q: expected a multiple of the ",
                    k_cache.size(2), " heads of the cache, got ", q.size(2));
  for (const auto& [name, t] : {std::pair{"cache_batch_idx", &cache_batch_idx},
                                std::pair{"cache_seqlens", &cache_seqlens}, std::pair{"query_lens", &query_lens}}) {
    TORCH_CHECK_TYPE(t->scalar_type() == at::kInt, name, ": expected int32, got ", t->scalar_type());
    TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == q.size(0) && t->is_contiguous(), name, ": expected contiguous [",
                      q.size(0), "], got ", t->sizes());
  }
  const int32_t *row = cache_batch_idx.const_data_ptr<int32_t>(), *length = cache_seqlens.const_data_ptr<int32_t>(),
                *count = query_lens.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < q.size(0); ++b) {
    TORCH_CHECK_VALUE(row[b] >= 0 && row[b] < k_cache.size(0), "cache_batch_idx[", b, "]: expected a slot below ",
                      k_cache.size(0), ", got ", row[b]);
    TORCH_CHECK_VALUE(length[b] >= 0 && length[b] <= k_cache.size(1), "cache_seqlens[", b, "]: expected 0 to ",
                      k_cache.size(1), ", got ", length[b]);
    TORCH_CHECK_VALUE(count[b] >= 0 && count[b] <= q.size(1) && count[b] <= length[b], "query_lens[", b,
                      "]: expected at most ", q.size(1), " queries and the length ", length[b], ", got ", count[b]);
  }
  TORCH_CHECK_VALUE(!lanes.has_value() || *lanes == 4 || *lanes == 8 || *lanes == 16,
                    "lanes: expected 4, 8 or 16, got ", *lanes);
  TORCH_CHECK_VALUE(lanes.value_or(0) <= cpu::lanes_here(), "lanes: expected at most ", cpu::lanes_here(),
                    ", floats in a register of this machine, got ", *lanes);
  if (evict.has_value()) {
    TORCH_CHECK_TYPE(evict->scalar_type() == at::kInt, "evict: expected int32, got ", evict->scalar_type());
    TORCH_CHECK_VALUE(evict->dim() == 2 && evict->size(0) == q.size(0) && evict->is_contiguous(),
                      "evict: expected contiguous [", q.size(0), ", entries], got ", evict->sizes());
    const int32_t* lifetime = evict->const_data_ptr<int32_t>();
    for (int64_t b = 0; b < q.size(0); ++b, lifetime += evict->size(1)) {
      TORCH_CHECK_VALUE(length[b] <= evict->size(1), "evict: expected lifetimes of ", length[b], " entries, got ",
                        evict->size(1));
      bool valid = true;
      for (int64_t j = 0; j < length[b]; ++j) valid &= lifetime[j] > j && (j == 0 || lifetime[j - 1] <= lifetime[j]);
      TORCH_CHECK_VALUE(valid, "evict[", b, "]: expected ascending values past their own index");
    }
  }
  return cpu::cached_attention(q, k_cache, v_cache, cache_batch_idx, cache_seqlens, query_lens,
                               checked_scores(scale, softcap), lanes, evict.value_or(Tensor()),
                               checked_sinks(sinks, q));
}

Tensor prune_kv_cache_on_cpu(at::TensorList keys, at::TensorList values, const std::optional<Tensor>& mask,
                             const std::optional<Tensor>& ranges, const Tensor& lengths,
                             const std::optional<Tensor>& inv_freq, at::TensorList base_keys,
                             const std::optional<Tensor>& base_positions, const std::optional<Tensor>& source_rows,
                             const std::optional<Tensor>& target_rows, bool within_rows) {
  return prune_kv_cache_(keys, values, mask, ranges, lengths, inv_freq, base_keys, base_positions, source_rows,
                         target_rows, within_rows, 0);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prune_pages_on_cpu(const Tensor& block_table, const Tensor& lengths,
                                                              const std::optional<Tensor>& mask,
                                                              const std::optional<Tensor>& ranges, int64_t page_size,
                                                              int64_t pages, bool within_pages, bool compact) {
  return prune_pages(block_table, lengths, mask, ranges, page_size, pages, within_pages, compact, 0);
}

}  // namespace
}  // namespace mem1

TORCH_LIBRARY(mem1_core, m) {
  m.def(
      "tile_plan(Tensor evict, int block_q, int block_k) -> "
      "(Tensor key_ranges, Tensor full_offsets, Tensor full_tiles, Tensor partial_offsets, Tensor partial_tiles)");
  // The CPU's and, in time, CUDA's own kernels go by the tensors' device; Triton's, written in Python, have a name.
  const std::string plan =
      "Tensor evict, Tensor key_ranges, Tensor full_offsets, Tensor full_tiles, Tensor partial_offsets, "
      "Tensor partial_tiles, Tensor query_order, Tensor key_order, int block_q, int block_k, float scale, "
      "Tensor? positions=None, Tensor? limits=None, Tensor? key_full_offsets=None, Tensor? key_full_tiles=None, "
      "Tensor? key_partial_offsets=None, Tensor? key_partial_tiles=None, ";
  for (const std::string backend : {"", "_triton"}) {
    const std::string name = "trajectory_attention" + backend;
    const std::string forward = name + "(Tensor q, Tensor k, Tensor v, " + plan +
                                "Tensor? sinks=None, float softcap=0) -> (Tensor out, Tensor lse)";
    const std::string backward = name +
                                 "_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, " +
                                 "Tensor lse, " + plan + "float softcap=0) -> (Tensor dq, Tensor dk, Tensor dv)";
    m.def(torch::schema(forward.c_str()));
    m.def(torch::schema(backward.c_str()));
  }
  m.def(
      "cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_batch_idx, Tensor cache_seqlens, "
      "Tensor query_lens, float scale, int? lanes=None, Tensor? evict=None, Tensor? sinks=None, float softcap=0) -> "
      "Tensor");
  // The op itself, and what launches it on a CUDA stream: which one is current, only Python can tell here.
  const std::string kv_cache =
      "(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor? mask, Tensor? ranges, Tensor lengths, Tensor? inv_freq, "
      "Tensor(c!)[] base_keys, Tensor(d!)? base_positions, Tensor? source_rows, Tensor? target_rows, bool within_rows";
  m.def(torch::schema(("prune_kv_cache_" + kv_cache + ") -> Tensor").c_str()));
  m.def(torch::schema(("_launch_prune_kv_cache_" + kv_cache + ", int stream) -> Tensor").c_str()));
  const std::string pages =
      "(Tensor block_table, Tensor lengths, Tensor? mask, Tensor? ranges, int page_size, int pages, bool within_pages, "
      "bool compact";
  const std::string result = ") -> (Tensor new_block_table, Tensor page_lengths, Tensor new_lengths, Tensor page_uses)";
  m.def(torch::schema(("prune_pages" + pages + result).c_str()));
  m.def(torch::schema(("_launch_prune_pages" + pages + ", int stream" + result).c_str()));
}

TORCH_LIBRARY_FRAGMENT(mem1_core, m) {
  // For mem1_core.ops, which allocates what they read. `stream` is CUDA's; the CPU does not look at it.
  const std::string rows = "Tensor? bias, Tensor target, Tensor temperature, ";
  m.def(torch::schema(("_rows_logprob(Tensor logits, " + rows + "int stream) -> Tensor").c_str()));
  m.def(torch::schema(("_rows_backward_(Tensor(a!) logits, " + rows +
                       "Tensor max_logit, Tensor log_sum_exp, Tensor entropy, Tensor d_logprob, Tensor d_entropy, "
                       "ScalarType gradient_dtype, float softcap, int stream) -> ()")
                          .c_str()));
  m.def(torch::schema(
      ("_rows_ppo_(Tensor(a!) logits, " + rows +
       "Tensor old_logprob, Tensor advantage, Tensor scale, Tensor? ref_logprob, "
       "Tensor? rollout_logprob, float clip_low, float clip_high, float? dual_clip, float rollout_is_cap, "
       "float kl_coef, str kl_estimator, float entropy_coef, bool with_gradient, "
       "ScalarType gradient_dtype, float softcap, int stream) -> Tensor")
          .c_str()));
  m.def("_linear_in_bfloat16() -> bool", &mem1::cpu::linear_in_bfloat16);
  m.def("_linear_logits_(Tensor hidden, Tensor weight, Tensor(a!) logits) -> ()");
  m.def("_linear_hidden_gradient_(Tensor d_logits, Tensor weight, Tensor(a!) d_hidden) -> ()");
  m.def("_linear_weight_gradient_(Tensor d_logits, Tensor hidden, Tensor(a!) d_weight, bool accumulate) -> ()");
  m.def("_gae(Tensor reward, Tensor value, Tensor mask, float gamma, float lam, int stream) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(mem1_core, CPU, m) {
  m.impl("_linear_logits_", &mem1::cpu::linear_logits_);
  m.impl("_linear_hidden_gradient_", &mem1::cpu::linear_hidden_gradient_);
  m.impl("_linear_weight_gradient_", &mem1::cpu::linear_weight_gradient_);
  m.impl("_rows_logprob", &mem1::rows_logprob);
  m.impl("_rows_backward_", &mem1::rows_backward_);
  m.impl("_rows_ppo_", &mem1::rows_ppo_);
  m.impl("_gae", &mem1::gae);
  m.impl("tile_plan", &mem1::tile_plan);
  m.impl("trajectory_attention", &mem1::attention);
  m.impl("trajectory_attention_backward", &mem1::attention_backward);
  m.impl("cached_attention", &mem1::cached_attention);
  m.impl("prune_kv_cache_", &mem1::prune_kv_cache_on_cpu);
  m.impl("prune_pages", &mem1::prune_pages_on_cpu);
}

TORCH_LIBRARY_IMPL(mem1_core, CUDA, m) {
  m.impl("_rows_logprob", &mem1::rows_logprob);
  m.impl("_rows_backward_", &mem1::rows_backward_);
  m.impl("_rows_ppo_", &mem1::rows_ppo_);
  m.impl("_gae", &mem1::gae);
  m.impl("_launch_prune_kv_cache_", &mem1::prune_kv_cache_);
  m.impl("_launch_prune_pages", &mem1::prune_pages);
}

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  m.doc() = "The compiled part of mem1_core. Importing it registers torch.ops.mem1_core.";
  m.def("version", &mem1_version, "Version of the C library.");
  m.def("cuda_architectures", &mem1_cuda_architectures, "Architectures with compiled CUDA code, '' if none.");
  m.def("tile_plan_cuda", &mem1::tile_plan_cuda, py::call_guard<py::gil_scoped_release>(),
        "Enqueues a plan on a stream. The addresses are on its device; nothing is checked but the sizes.",
        py::arg("stream"), py::arg("batch"), py::arg("length"), py::arg("block_q"), py::arg("block_k"),
        py::arg("evict"), py::arg("key_ranges"), py::arg("full_offsets"), py::arg("full_tiles"),
        py::arg("partial_offsets"), py::arg("partial_tiles"));
}
