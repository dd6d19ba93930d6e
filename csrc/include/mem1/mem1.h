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
  MEM1_INVALID_ARGUMENT = 1, /* the message names the argument, what was wanted and what came */
  MEM1_NOT_COMPILED = 2,     /* this build of the library has no code for the device */
  MEM1_DEVICE_ERROR = 3,     /* the CUDA runtime refused; the message carries its words */
} mem1_status;

typedef enum mem1_device {
  MEM1_CPU = 0,
  MEM1_CUDA = 1,
} mem1_device;

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

#ifdef __cplusplus
}
#endif
#endif /* MEM1_MEM1_H_ */
