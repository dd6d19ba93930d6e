/* mem1_core: the public C99 interface.
 *
 * The library never allocates, never synchronises and keeps no state: every buffer is the caller's, CUDA work goes to
 * the caller's stream, and a failed call has touched none of its outputs. Parameters are plain structs whose first
 * member is their own size, so that a program built against an older header is refused instead of misread.
 */
#ifndef MEM1_MEM1_H_
#define MEM1_MEM1_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define MEM1_API
#else
#define MEM1_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum mem1_status {
  MEM1_OK = 0,
  MEM1_INVALID_ARGUMENT = 1, /* the message names the argument, what was expected and what was got */
  MEM1_NOT_COMPILED = 2,     /* this build of the library has no code for the device */
  MEM1_DEVICE_ERROR = 3,     /* the CUDA runtime refused; the message carries its words */
} mem1_status;

typedef enum mem1_device {
  MEM1_CPU = 0,
  MEM1_CUDA = 1,
} mem1_device;

typedef enum mem1_dtype {
  MEM1_FLOAT32 = 0,
  MEM1_FLOAT16 = 1,
  MEM1_BFLOAT16 = 2,
  MEM1_FLOAT64 = 3,
  MEM1_BITS8 = 4, /* any type of one byte; it can be moved, not computed with */
} mem1_dtype;

/* Filled by a call that fails, left alone by one that succeeds. May be NULL. */
typedef struct mem1_error {
  char message[256];
} mem1_error;

/* "0.1.0" */
MEM1_API const char* mem1_version(void);

/* The architectures the CUDA code was compiled for, "80,90a", or "" in a CPU-only build. */
MEM1_API const char* mem1_cuda_architectures(void);

/* The tile plan of trajectory attention.
 *
 * Key j is visible to the queries j <= i < evict[j]. The attention matrix is cut into tiles of block_q queries by
 * block_k keys; query_tiles = ceil(length / block_q), key_tiles = ceil(length / block_k). A tile is
 *   dead     when no pair in it can be visible: it is in no list;
 *   full     when it has all block_k keys and every pair in it is visible: it needs no mask;
 *   partial  otherwise.
 * Seen from a key tile, live and full query tiles are contiguous ranges (what a backward pass over keys wants); seen
 * from a query tile they are lists (what a forward pass wants).
 *
 * Two calls, because the length of the lists is known only after the first. Who will not wait for it, on CUDA, gives
 * the lists room for every tile up to the diagonal: sum over query tiles of ceil(min(end of the tile, length) /
 * block_k), times batch. CUDA does not check that the offsets stay below 2^31; that bound does.
 *   mem1_tile_plan_ranges  reads evict, fills key_ranges, full_offsets and partial_offsets: O(length)
 *   mem1_tile_plan_lists   reads those three, fills full_tiles and partial_tiles: O(live tiles). On the CPU the offsets
 *                          serve as cursors meanwhile and are restored: no other thread may read them during the call.
 */
typedef struct mem1_tile_plan_params {
  size_t struct_size; /* sizeof(mem1_tile_plan_params) */
  mem1_device device; /* where all pointers below live */
  int32_t batch;
  int32_t length;
  int32_t block_q;
  int32_t block_k;
  const int32_t* evict;       /* [batch, length], j < evict[b][j] <= length (not checked here) */
  int64_t evict_stride_batch; /* in elements; the last dimension is contiguous */
  int32_t* key_ranges;      /* [batch, key_tiles, 4] query tiles (begin, full_begin, full_end, end); 16-byte aligned */
  int32_t* full_offsets;    /* [batch * query_tiles + 1] */
  int32_t* partial_offsets; /* [batch * query_tiles + 1] */
  int32_t* full_tiles;      /* [full_offsets[last]] key tiles, ascending within a query tile; lists only */
  int32_t* partial_tiles;   /* [partial_offsets[last]] likewise */
} mem1_tile_plan_params;

MEM1_API mem1_status mem1_tile_plan_ranges(const mem1_tile_plan_params* params, void* cuda_stream, mem1_error* error);
MEM1_API mem1_status mem1_tile_plan_lists(const mem1_tile_plan_params* params, void* cuda_stream, mem1_error* error);

/* Pruning of a KV cache, in place.
 *
 * The cache of a layer is two arrays (keys and values) [rows, row_slots, heads, head_dim]. Sequence b has
 * sequence_rows * row_slots slots; slot s lies in row source_rows[b][s / row_slots] at s % row_slots. Without
 * source_rows sequence b is row b (the plain cache: sequence_rows = 1, row_slots = capacity); a block-table cache has
 * a page in each row. The first lengths[b] slots are in use. Which of them stay is given by ONE of
 *   mask    a byte a slot, not zero: it stays; or
 *   ranges  [begin, end) pairs of slots, in order, not overlapping, end <= lengths[b]; empty ones are fine
 * (neither, with range_count 0: none stays).
 *
 * mem1_prune_kv_cache moves the survivors to the front in their order: the one of rank r goes to slot r of the rows
 * target_rows[b][..] (NULL: source_rows). A target never lies after its source in the order of the sequence, so one
 * pass needs no scratch. With within_rows the survivors of a row move to the front of that row and not beyond it.
 * What lies past the survivors is undefined afterwards. No two sequences may move entries of the same row.
 *
 * With inv_freq the keys are rotated as well (RoPE, rotate-half, in fp32; fp64 for fp64), by as many positions as lead
 * from where they were encoded to their new slot. Without base_keys that is where they lay; turning rounded keys again
 * and again adds up. With base_keys (the keys as they were once encoded, at base_positions, arrays of the same shape),
 * each key is made from its base in one rounding, and the base moves along.
 *
 * A sequence that is refused (a length below 0 or beyond its slots, wrong ranges) is not touched. On the CPU then none
 * is, and the call fails. On CUDA, where no value is known to the host, the others go on, and its new length is -1.
 */
typedef struct mem1_prune_kv_cache_params {
  size_t struct_size; /* sizeof(mem1_prune_kv_cache_params) */
  mem1_device device; /* where the arrays live; keys, values and base_keys themselves are lists on the host */
  mem1_dtype dtype;
  int32_t layers; /* at most 128 on CUDA, where all are one launch */
  int32_t batch;
  int32_t sequence_rows; /* rows of one sequence */
  int32_t row_slots;
  int32_t heads;
  int32_t head_dim;
  int32_t within_rows; /* 0 or 1 */
  void* const* keys;   /* [layers] -> [rows, row_slots, heads, head_dim], the last dimension contiguous */
  void* const* values; /* [layers] likewise */
  int64_t stride_row;  /* in elements, as all strides; the same for keys and values of all layers */
  int64_t stride_slot;
  int64_t stride_head;
  const int32_t* source_rows; /* [batch, sequence_rows] contiguous, or NULL; entries beyond the length are not read */
  const int32_t* target_rows; /* [batch, sequence_rows] contiguous, or NULL */
  const int32_t* lengths;     /* [batch] */
  const uint8_t* mask;        /* [batch, sequence_rows * row_slots], or NULL */
  int64_t mask_stride_batch;
  const int32_t* ranges; /* [batch, range_count, 2] contiguous, or NULL */
  int32_t range_count;
  const float* inv_freq;  /* [head_dim / 2] angular frequencies, or NULL: positions are kept */
  void* const* base_keys; /* [layers] as keys, or NULL */
  int64_t base_stride_row;
  int64_t base_stride_slot;
  int64_t base_stride_head;
  const int32_t* base_positions; /* [batch, sequence_rows * row_slots] contiguous; with base_keys */
  int32_t* new_base_positions;   /* the same, another array: those of the survivors; the rest is not written; or NULL */
  int32_t* new_lengths;          /* [batch], within_rows: [batch, sequence_rows]; or NULL */
} mem1_prune_kv_cache_params;

MEM1_API mem1_status mem1_prune_kv_cache(const mem1_prune_kv_cache_params* params, void* cuda_stream,
                                         mem1_error* error);

/* The block tables of a paged cache after pruning; no key or value is read.
 *
 * Pages in which nothing survives leave the table; so do, unless within_pages, those left over when the survivors fill
 * the pages before them. The rest close up in their order, -1 after them. To prune a paged cache, call this and
 * then mem1_prune_kv_cache with row_slots = page_size, source_rows = block_table, and target_rows = new_block_table
 * (closing gaps across pages) or within_rows (each page by itself).
 */
typedef struct mem1_prune_pages_params {
  size_t struct_size; /* sizeof(mem1_prune_pages_params) */
  mem1_device device;
  int32_t batch;
  int32_t sequence_pages; /* the width of a table */
  int32_t page_size;
  int32_t pages; /* of the cache */
  int32_t within_pages;
  int32_t compact; /* 0 or 1: keys get the positions of their new slots, which changes pages that do not move */
  const int32_t* block_table; /* [batch, sequence_pages] contiguous, pages in use 0 <= page < pages */
  const int32_t* lengths;     /* [batch] */
  const uint8_t* mask;        /* as above: [batch, sequence_pages * page_size], or NULL */
  int64_t mask_stride_batch;
  const int32_t* ranges; /* [batch, range_count, 2], or NULL */
  int32_t range_count;
  int32_t* new_block_table; /* [batch, sequence_pages], another array */
  int32_t* page_lengths;    /* [batch, sequence_pages]: survivors in each page of the new table, 0 after */
  int32_t* new_lengths;     /* [batch]; -1 for a sequence that CUDA refused: its table is copied as it is */
  int32_t* page_uses; /* [pages], zeroed by the caller: bit 0 a sequence has dropped the page, bit 1 one uses it */
} mem1_prune_pages_params;

MEM1_API mem1_status mem1_prune_pages(const mem1_prune_pages_params* params, void* cuda_stream, mem1_error* error);

/* Rows of logits: log-probs, PPO's policy loss, and gradients in their place.
 *
 * With z = logits[i] + bias, T = temperature[i], p = softmax(z / T), t = target[i]:
 *   max_logit = max_v z_v,  log_sum_exp = log sum_v exp((z_v - max_logit) / T),
 *   logprob = (z_t - max_logit) / T - log_sum_exp,  entropy = -sum_v p_v log p_v.
 * The gradient of f(logprob, entropy) with a = df/dlogprob, b = df/dentropy is local to the row:
 *   df/dz_v = (a ([v = t] - p_v) - b p_v (log p_v + entropy)) / T,
 * and replaces the logits where it is asked for, in gradient_dtype, from the same address of the row on.
 *   MEM1_ROWS_LOGPROB   writes logprob, entropy, max_logit, log_sum_exp
 *   MEM1_ROWS_BACKWARD  reads max_logit, log_sum_exp, entropy, and a, b from d_logprob, d_entropy; writes the gradient
 *   MEM1_ROWS_PPO_LOSS  writes logprob, entropy, loss, kl, ratio, clipped; with_gradient: the gradient of loss
 * PPO's loss, with every log-ratio clamped to +-20, r = exp(logprob - old_logprob), A = advantage, d = logprob -
 * ref_logprob:
 *   policy = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), for A < 0 at most -A dual_clip,
 *            times min(exp(old_logprob - rollout_logprob), rollout_is_cap)
 *   kl     = d (K1), d^2 / 2 (K2) or exp(-d) - 1 + d (K3)
 *   loss   = scale (policy + kl_coef kl - entropy_coef entropy)
 * With softcap, logits are z = softcap tanh(y / softcap) already and bias is NULL: the gradient is that with respect to
 * y, (1 - (z / softcap)^2) df/dz.
 * A row of nothing but -inf has logprob and max_logit -inf, log_sum_exp, entropy and gradient 0. A target outside of
 * the vocabulary is refused on the CPU; on CUDA, where no value is known to the host, its row becomes NaN.
 */
typedef enum mem1_rows_task {
  MEM1_ROWS_LOGPROB = 0,
  MEM1_ROWS_BACKWARD = 1,
  MEM1_ROWS_PPO_LOSS = 2,
} mem1_rows_task;

typedef enum mem1_kl_estimator {
  MEM1_KL_K1 = 1,
  MEM1_KL_K2 = 2,
  MEM1_KL_K3 = 3,
} mem1_kl_estimator;

typedef struct mem1_logit_rows_params {
  size_t struct_size; /* sizeof(mem1_logit_rows_params) */
  mem1_device device;
  mem1_rows_task task;
  mem1_dtype dtype;          /* of logits and of every array [rows] but target: MEM1_FLOAT32 or MEM1_FLOAT64 */
  mem1_dtype gradient_dtype; /* dtype; for MEM1_FLOAT32 also MEM1_BFLOAT16, on CUDA MEM1_FLOAT16 */
  int32_t with_gradient;     /* 0 or 1 */
  int64_t rows;
  int64_t vocabulary;
  void* logits;                /* [rows, vocabulary], the last dimension contiguous */
  int64_t stride_row;          /* in elements of dtype */
  const void* bias;            /* [vocabulary], or NULL */
  const int64_t* target;       /* [rows] */
  const void* temperature;     /* [rows], > 0 (not checked) */
  const void* d_logprob;       /* [rows] */
  const void* d_entropy;       /* [rows] */
  const void* old_logprob;     /* [rows] */
  const void* advantage;       /* [rows] */
  const void* ref_logprob;     /* [rows], or NULL: kl is not written */
  const void* rollout_logprob; /* [rows], or NULL: weight 1 */
  const void* scale;           /* [rows] */
  double clip_low;
  double clip_high;
  double dual_clip; /* 0: none */
  double rollout_is_cap;
  double kl_coef; /* 0 without ref_logprob */
  mem1_kl_estimator kl_estimator;
  double entropy_coef;
  void* logprob; /* [rows], as all that follow */
  void* entropy;
  void* max_logit;
  void* log_sum_exp;
  void* loss;
  void* kl;       /* with ref_logprob */
  void* ratio;    /* r */
  void* clipped;  /* 1 where the clipped term was the larger, else 0 */
  double softcap; /* 0: none */
} mem1_logit_rows_params;

MEM1_API mem1_status mem1_logit_rows(const mem1_logit_rows_params* params, void* cuda_stream, mem1_error* error);

/* Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438) over the tokens of a mask.
 *
 * Over the masked-in tokens t = 0, 1, ... of a row, with value 0 and advantage 0 after the last one:
 *   advantage_t = reward_t + gamma value_{t+1} - value_t + gamma lambda advantage_{t+1},  returns_t = advantage_t +
 *   value_t. At the others both are 0; their reward and value are not used.
 */
typedef struct mem1_gae_params {
  size_t struct_size; /* sizeof(mem1_gae_params) */
  mem1_device device;
  mem1_dtype dtype; /* of reward, value, advantage, returns: MEM1_FLOAT32 or MEM1_FLOAT64 */
  int32_t batch;
  int32_t length;
  const void* reward;  /* [batch, length] contiguous, as all */
  const void* value;   /* [batch, length] */
  const uint8_t* mask; /* [batch, length], not zero: a step */
  double gamma;
  double lambda;
  void* advantage; /* [batch, length] */
  void* returns;   /* [batch, length] */
} mem1_gae_params;

MEM1_API mem1_status mem1_gae(const mem1_gae_params* params, void* cuda_stream, mem1_error* error);

#ifdef __cplusplus
}
#endif
#endif /* MEM1_MEM1_H_ */
