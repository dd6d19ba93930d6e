// From tensors to mem1_prune_*: the checks that need a tensor, the parameters, and on the CPU the threads.
#include "torch/ops.h"

#include "mem1/mem1.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <vector>

namespace mem1 {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

mem1_dtype dtype_of(const Tensor& t) {
  if (const auto dtype = float_dtype(t.scalar_type())) return *dtype;
  TORCH_CHECK_TYPE(t.element_size() == 1,
                   "kv: expected float32, bfloat16, float16, float64 or a type of one byte, got ", t.scalar_type());
  return MEM1_BITS8;
}

// The cache of some layers as a list of tensors [layers, rows, slots, heads, dim], all of one shape but for `layers`.
struct Arrays {
  std::vector<void*> pointers;  // one per layer
  int64_t stride_row, stride_slot, stride_head;
};

using Dims = std::array<std::pair<int64_t, int64_t>, 5>;  // stride, size; the largest stride first

Dims dims_of(const Tensor& t) {
  Dims dims;
  for (int64_t d = 0; d < 5; ++d) dims[d] = {t.size(d) == 1 ? 0 : t.stride(d), t.size(d)};
  std::sort(dims.rbegin(), dims.rend());
  return dims;
}

// Whether two entries of an array lie `distance` elements apart. Strides are nested: each is at least the extent of all
// smaller ones, so only two steps along a dimension can lead there.
bool reaches(const Dims& dims, size_t d, int64_t distance) {
  if (d == dims.size()) return distance == 0;
  const auto [stride, size] = dims[d];
  if (size == 1) return reaches(dims, d + 1, distance);
  const int64_t steps = distance / stride;
  for (const int64_t step : {steps - 1, steps, steps + 1}) {
    if (std::abs(step) < size && reaches(dims, d + 1, distance - step * stride)) return true;
  }
  return false;
}

int64_t extent(const Dims& dims) {
  int64_t last = 0;
  for (const auto& [stride, size] : dims) last += stride * (size - 1);
  return last + 1;
}

// No two entries of the cache at one address: within a tensor, nor in two of them.
void check_apart(const std::vector<std::pair<const char*, Tensor>>& tensors) {
  struct Array {
    const char* name;
    const char* begin;
    const char* end;
    Dims dims;
    int64_t element;
  };
  std::vector<Array> arrays;
  for (const auto& [name, t] : tensors) {
    if (t.numel() == 0) continue;
    const Dims dims = dims_of(t);
    int64_t reach = 1;
    for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
      if (dim->second == 1) continue;
      TORCH_CHECK_VALUE(dim->first >= reach, name, ": expected no two entries at one address, got strides ",
                        t.strides(), " for shape ", t.sizes());
      reach = dim->first * dim->second;
    }
    const auto* begin = static_cast<const char*>(t.const_data_ptr());
    arrays.push_back({name, begin, begin + extent(dims) * t.element_size(), dims, t.element_size()});
  }
  std::sort(arrays.begin(), arrays.end(), [](const Array& a, const Array& b) { return a.begin < b.begin; });
  for (size_t n = 0; n < arrays.size(); ++n) {
    for (size_t m = n + 1; m < arrays.size() && arrays[m].begin < arrays[n].end; ++m) {
      // They interleave, as views of one tensor do. With the same strides it is clear whether they meet; else they may.
      const int64_t bytes = arrays[m].begin - arrays[n].begin;
      const bool alike = arrays[n].dims == arrays[m].dims && bytes % arrays[n].element == 0;
      TORCH_CHECK_VALUE(alike && !reaches(arrays[n].dims, 0, bytes / arrays[n].element), arrays[m].name,
                        ": expected keys, values and layers apart in memory, got tensors that share some of it");
    }
  }
}

bool same_strides(const Tensor& t, const Tensor& first) {
  for (int64_t d = 1; d < 4; ++d) {
    if (t.size(d) != 1 && t.stride(d) != first.stride(d)) return false;
  }
  return true;
}

Arrays arrays_of(const char* name, at::TensorList tensors, const Tensor& first) {
  Arrays arrays{{}, first.stride(1), first.stride(2), first.stride(3)};
  for (const Tensor& t : tensors) {
    TORCH_CHECK_VALUE(t.dim() == 5 && t.sizes().slice(1) == first.sizes().slice(1), name,
                      ": expected one shape in all layers, [", first.sizes().slice(1), "], got ", t.sizes().slice(1));
    TORCH_CHECK_TYPE(t.scalar_type() == first.scalar_type(), name, ": expected one dtype in all layers, ",
                     first.scalar_type(), ", got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.device() == first.device(), name, ": expected all layers on ", first.device(), ", got one on ",
                      t.device());
    TORCH_CHECK_VALUE(same_strides(t, first), name, ": expected one set of strides in all layers, ",
                      first.strides().slice(1), ", got ", t.strides().slice(1));
    TORCH_CHECK_VALUE(t.stride(4) == 1 || t.size(4) <= 1, name, ": expected a contiguous last dimension, got stride ",
                      t.stride(4));
    auto* data = static_cast<char*>(t.data_ptr());
    for (int64_t layer = 0; layer < t.size(0); ++layer) {
      arrays.pointers.push_back(data + layer * t.stride(0) * t.element_size());
    }
  }
  return arrays;
}

// Autograd then knows that what it saved is gone.
void changed(at::TensorList tensors) {
  for (const Tensor& t : tensors) t.unsafeGetTensorImpl()->bump_version();
}

const Tensor& checked(const char* name, const Tensor& t, const Tensor& like, at::ScalarType dtype,
                      at::IntArrayRef shape) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, ": expected ", dtype, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == like.device(), name, ": expected a tensor on ", like.device(), ", got one on ",
                    t.device());
  TORCH_CHECK_VALUE(t.sizes() == shape, name, ": expected shape ", shape, ", got ", t.sizes());
  return t;
}

const int32_t* table(const char* name, const OptionalTensor& t, const Tensor& like, at::IntArrayRef shape) {
  if (!t.has_value()) return nullptr;
  checked(name, *t, like, at::kInt, shape);
  TORCH_CHECK_VALUE(t->is_contiguous(), name, ": expected a contiguous tensor, got strides ", t->strides());
  return t->const_data_ptr<int32_t>();
}

// Fills lengths, mask and ranges. `slots`: of one sequence.
template <typename Params>
void set_keep(Params& p, const OptionalTensor& mask, const OptionalTensor& ranges, const Tensor& lengths,
              int64_t slots) {
  p.lengths = table("lengths", lengths, lengths, {p.batch});
  TORCH_CHECK_VALUE(mask.has_value() != ranges.has_value(), "keep: expected a mask or ranges, got both or neither");
  if (mask.has_value()) {
    checked("keep", *mask, lengths, at::kBool, {p.batch, slots});
    TORCH_CHECK_VALUE(mask->stride(1) == 1 || slots <= 1, "keep: expected a contiguous last dimension, got stride ",
                      mask->stride(1));
    p.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    p.mask_stride_batch = mask->stride(0);
    static const uint8_t kNothing = 0;  // an empty tensor has no address
    if (p.mask == nullptr) p.mask = &kNothing;
  } else {
    TORCH_CHECK_VALUE(ranges->dim() == 3 && ranges->size(0) == p.batch && ranges->size(2) == 2,
                      "keep: expected ranges [", p.batch, ", count, 2], got shape ", ranges->sizes());
    p.ranges = table("keep", ranges, lengths, ranges->sizes());
    p.range_count = static_cast<int32_t>(ranges->size(1));
  }
}

int32_t narrow(const char* name, int64_t value) {
  TORCH_CHECK_VALUE(value <= INT32_MAX, name, ": expected fewer than 2^31, got ", value);
  return static_cast<int32_t>(value);
}

// One thread's share, the layers [first, first + count) of sequence b.
mem1_prune_kv_cache_params slice(mem1_prune_kv_cache_params p, int64_t b, int64_t first, int64_t count) {
  const int64_t slots = int64_t{p.sequence_rows} * p.row_slots;
  p.batch = 1;
  p.layers = static_cast<int32_t>(count);
  p.keys += first;
  p.values += first;
  if (p.base_keys != nullptr) p.base_keys += first;
  p.source_rows += b * p.sequence_rows;
  if (p.target_rows != nullptr) p.target_rows += b * p.sequence_rows;
  p.lengths += b;
  if (p.mask != nullptr) p.mask += b * p.mask_stride_batch;
  if (p.ranges != nullptr) p.ranges += b * p.range_count * 2;
  if (p.base_positions != nullptr) p.base_positions += b * slots;
  p.new_lengths = p.new_base_positions = nullptr;
  return p;
}

// Row numbers that the slots below `length` of sequence b are looked up in.
void check_rows(const mem1_prune_kv_cache_params& p, const int32_t* table, int64_t b, int64_t length, int64_t rows) {
  for (int64_t at = 0; table != nullptr && at * p.row_slots < length; ++at) {
    const int32_t row = table[b * p.sequence_rows + at];
    TORCH_CHECK_VALUE(row >= 0 && row < rows, "block_table[", b, ", ", at, "]: expected a page below ", rows, ", got ",
                      row);
  }
}

void prune_on_threads(mem1_prune_kv_cache_params p, int64_t cache_rows) {
  mem1_error error{};
  const int64_t layers = p.layers;
  p.layers = 0;  // first no more than the checks and the counts: a refused call touches nothing
  check(mem1_prune_kv_cache(&p, nullptr, &error), error);
  for (int64_t b = 0; b < p.batch; ++b) {
    check_rows(p, p.source_rows, b, p.lengths[b], cache_rows);
    if (p.within_rows == 0) check_rows(p, p.target_rows, b, p.new_lengths[b], cache_rows);
  }
  std::vector<int32_t> rows;
  if (p.source_rows == nullptr) {
    for (int32_t b = 0; b < p.batch; ++b) rows.push_back(b);
    p.source_rows = rows.data();
  }
  int64_t used = 1;
  for (int32_t b = 0; b < p.batch; ++b) used += p.lengths[b];
  constexpr int64_t kBytesWorthAThread = 1 << 18;
  const int64_t bytes = 2 * used * p.heads * p.head_dim * 2 / std::max(p.batch, 1);  // of a task, at most; about
  const int64_t grain = std::max<int64_t>(1, kBytesWorthAThread / std::max<int64_t>(bytes, 1));
  at::parallel_for(0, p.batch * layers, grain, [&](int64_t begin, int64_t end) {
    mem1_error failure{};
    while (begin < end) {
      const int64_t b = begin / layers, first = begin % layers, count = std::min(layers - first, end - begin);
      const auto part = slice(p, b, first, count);
      check(mem1_prune_kv_cache(&part, nullptr, &failure), failure);
      begin += count;
    }
  });
}

}  // namespace

Tensor prune_kv_cache_(at::TensorList keys, at::TensorList values, const OptionalTensor& mask,
                       const OptionalTensor& ranges, const Tensor& lengths, const OptionalTensor& inv_freq,
                       at::TensorList base_keys, const OptionalTensor& base_positions,
                       const OptionalTensor& source_rows, const OptionalTensor& target_rows, bool within_rows,
                       int64_t cuda_stream) {
  TORCH_CHECK_VALUE(!keys.empty() && keys[0].dim() == 5, "kv: expected at least one layer, got none");
  const Tensor& first = keys[0];
  const Arrays key = arrays_of("kv", keys, first), value = arrays_of("kv", values, first);
  TORCH_CHECK_VALUE(key.pointers.size() == value.pointers.size(), "kv: expected as many values as keys, got ",
                    value.pointers.size(), " and ", key.pointers.size(), " layers");
  TORCH_CHECK_VALUE(lengths.dim() == 1 && lengths.device() == first.device(), "lengths: expected [batch] on ",
                    first.device(), ", got ", lengths.sizes(), " on ", lengths.device());
  mem1_prune_kv_cache_params p{};
  p.struct_size = sizeof(p);
  p.device = first.is_cpu() ? MEM1_CPU : MEM1_CUDA;
  p.dtype = dtype_of(first);
  p.layers = narrow("kv: layers", static_cast<int64_t>(key.pointers.size()));
  p.batch = narrow("lengths: sequences", lengths.size(0));
  p.sequence_rows = source_rows.has_value() ? narrow("block_table: pages", source_rows->size(-1)) : 1;
  p.row_slots = narrow("kv: slots", first.size(2));
  p.heads = narrow("kv: heads", first.size(3));
  p.head_dim = narrow("kv: dim", first.size(4));
  p.within_rows = within_rows;
  p.keys = key.pointers.data();
  p.values = value.pointers.data();
  p.stride_row = key.stride_row;
  p.stride_slot = key.stride_slot;
  p.stride_head = key.stride_head;
  const int64_t slots = int64_t{p.sequence_rows} * p.row_slots;
  TORCH_CHECK_VALUE(source_rows.has_value() || first.size(1) == p.batch, "lengths: expected one per sequence, ",
                    first.size(1), ", got ", p.batch);
  p.source_rows = table("block_table", source_rows, first, {p.batch, p.sequence_rows});
  p.target_rows = table("new block_table", target_rows, first, {p.batch, p.sequence_rows});
  set_keep(p, mask, ranges, lengths, slots);
  if (inv_freq.has_value()) {
    checked("inv_freq", *inv_freq, first, at::kFloat, {p.head_dim / 2});
    TORCH_CHECK_VALUE(inv_freq->is_contiguous(), "inv_freq: expected a contiguous tensor");
    p.inv_freq = inv_freq->const_data_ptr<float>();
  }
  Arrays base{};
  Tensor new_base_positions;
  if (!base_keys.empty()) {
    TORCH_CHECK_VALUE(base_keys[0].dim() == 5 && base_keys[0].sizes().slice(1) == first.sizes().slice(1),
                      "base_keys: expected the shape of the keys, got ", base_keys[0].sizes().slice(1));
    TORCH_CHECK_TYPE(base_keys[0].scalar_type() == first.scalar_type(), "base_keys: expected the dtype of kv, ",
                     first.scalar_type(), ", got ", base_keys[0].scalar_type());
    TORCH_CHECK_VALUE(base_keys[0].device() == first.device(), "base_keys: expected the device of kv, ", first.device(),
                      ", got ", base_keys[0].device());
    base = arrays_of("base_keys", base_keys, base_keys[0]);
    TORCH_CHECK_VALUE(base.pointers.size() == key.pointers.size(), "base_keys: expected ", key.pointers.size(),
                      " layers, got ", base.pointers.size());
    TORCH_CHECK_VALUE(base_positions.has_value(), "base_positions: expected a tensor with base_keys, got None");
    p.base_keys = base.pointers.data();
    p.base_stride_row = base.stride_row;
    p.base_stride_slot = base.stride_slot;
    p.base_stride_head = base.stride_head;
    p.base_positions = table("base_positions", base_positions, first, {p.batch, slots});
    new_base_positions = base_positions->clone();
    p.new_base_positions = new_base_positions.data_ptr<int32_t>();
  }
  std::vector<std::pair<const char*, Tensor>> all;
  for (const Tensor& t : keys) all.emplace_back("kv", t);
  for (const Tensor& t : values) all.emplace_back("kv", t);
  for (const Tensor& t : base_keys) all.emplace_back("base_keys", t);
  check_apart(all);
  const Tensor new_lengths = at::empty({p.batch * (within_rows ? p.sequence_rows : 1)}, lengths.options());
  p.new_lengths = new_lengths.data_ptr<int32_t>();
  if (first.numel() == 0) p.layers = 0;  // there are no addresses, only counts
  if (p.device == MEM1_CPU) {
    prune_on_threads(p, first.size(1));
  } else {
    mem1_error error{};
    check(mem1_prune_kv_cache(&p, reinterpret_cast<void*>(cuda_stream), &error), error);
  }
  changed(keys);
  changed(values);
  changed(base_keys);
  if (base_positions.has_value() && !base_keys.empty()) base_positions->copy_(new_base_positions);
  return new_lengths;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prune_pages(const Tensor& block_table, const Tensor& lengths,
                                                       const OptionalTensor& mask, const OptionalTensor& ranges,
                                                       int64_t page_size, int64_t pages, bool within_pages,
                                                       bool compact, int64_t cuda_stream) {
  TORCH_CHECK_VALUE(block_table.dim() == 2, "block_table: expected [sequences, pages], got ", block_table.sizes());
  mem1_prune_pages_params p{};
  p.struct_size = sizeof(p);
  p.device = block_table.is_cpu() ? MEM1_CPU : MEM1_CUDA;
  p.batch = narrow("block_table: sequences", block_table.size(0));
  p.sequence_pages = narrow("block_table: pages", block_table.size(1));
  p.page_size = narrow("page_size", page_size);
  p.pages = narrow("pages", pages);
  p.within_pages = within_pages;
  p.compact = compact;
  p.block_table = table("block_table", block_table, lengths, block_table.sizes());
  set_keep(p, mask, ranges, lengths, int64_t{p.sequence_pages} * p.page_size);
  const Tensor new_table = at::empty_like(block_table), page_lengths = at::empty_like(block_table);
  const Tensor new_lengths = at::empty_like(lengths), uses = at::zeros({pages}, block_table.options());
  p.new_block_table = new_table.data_ptr<int32_t>();
  p.page_lengths = page_lengths.data_ptr<int32_t>();
  p.new_lengths = new_lengths.data_ptr<int32_t>();
  p.page_uses = uses.data_ptr<int32_t>();
  mem1_error error{};
  check(mem1_prune_pages(&p, reinterpret_cast<void*>(cuda_stream), &error), error);
  return {new_table, page_lengths, new_lengths, uses};
}

}  // namespace mem1
