/* Plans the tiles of a small trajectory, prunes small caches and runs losses.c, all through the C API; exit status 0
 * when all is right. */
#include <stdio.h>
#include <string.h>

#include "expect.h"
#include "mem1/mem1.h"

#define LENGTH 6

static int plan_tiles(void) {
  /* Tokens 0 and 1 live to the end, 2 and 3 are evicted at 4. Tiles of 2 x 2:
   *          keys 0,1   2,3       4,5
   *   q 0,1  partial    .         .
   *   q 2,3  full       partial   .
   *   q 4,5  full       dead      partial   */
  const int32_t evict[LENGTH] = {6, 6, 4, 4, 6, 6};
  int32_t ranges[3 * 4], full_offsets[4], partial_offsets[4], full[2] = {-1, -1}, partial[3] = {-1, -1, -1};
  mem1_error error;
  mem1_tile_plan_params params;
  memset(&params, 0, sizeof(params));
  params.struct_size = sizeof(params);
  params.device = MEM1_CPU;
  params.batch = 1;
  params.length = LENGTH;
  params.block_q = 2;
  params.block_k = 2;
  params.evict = evict;
  params.evict_stride_batch = LENGTH;
  params.key_ranges = ranges;
  params.full_offsets = full_offsets;
  params.partial_offsets = partial_offsets;
  params.full_tiles = full;
  params.partial_tiles = partial;

  EXPECT(mem1_tile_plan_ranges(&params, NULL, &error) == MEM1_OK);
  EXPECT(full_offsets[3] == 2 && partial_offsets[3] == 3);
  EXPECT(mem1_tile_plan_lists(&params, NULL, &error) == MEM1_OK);
  EXPECT(full[0] == 0 && full[1] == 0);
  EXPECT(partial[0] == 0 && partial[1] == 1 && partial[2] == 2);
  EXPECT(ranges[4] == 1 && ranges[7] == 2); /* keys 2,3 are live for query tile 1 alone */

  /* A refused call says why and touches nothing. */
  params.block_q = 0;
  full_offsets[0] = 77;
  EXPECT(mem1_tile_plan_ranges(&params, NULL, &error) == MEM1_INVALID_ARGUMENT);
  EXPECT(strstr(error.message, "block_q") != NULL && full_offsets[0] == 77);
  params.block_q = 2;
  params.struct_size = 8;
  EXPECT(mem1_tile_plan_ranges(&params, NULL, &error) == MEM1_INVALID_ARGUMENT);
  EXPECT(strstr(error.message, "struct_size") != NULL);

  /* An empty problem is done at once. */
  params.struct_size = sizeof(params);
  params.length = 0;
  EXPECT(mem1_tile_plan_ranges(&params, NULL, &error) == MEM1_OK);
  EXPECT(full_offsets[0] == 0 && partial_offsets[0] == 0);
  return 0;
}

/* A cache of 2 layers, 2 rows of 4 slots, one head of 2: an entry holds 100 * layer + 10 * row + slot and that + 0.5,
 * less for a value. The second array is 2 elements longer in a row: no stride is a product of sizes. */
#define ROWS 2
#define SLOTS 4
#define ROW_STRIDE (2 * SLOTS + 2)

typedef struct cache {
  float keys[2][ROWS * ROW_STRIDE], values[2][ROWS * ROW_STRIDE];
  void* key_list[2];
  void* value_list[2];
} cache;

static float entry(int layer, int row, int slot) { return (float)(100 * layer + 10 * row + slot); }

static void fill(cache* c) {
  memset(c, 0, sizeof(*c));
  for (int layer = 0; layer < 2; ++layer) {
    for (int row = 0; row < ROWS; ++row) {
      for (int slot = 0; slot < SLOTS; ++slot) {
        for (int d = 0; d < 2; ++d) {
          const float value = entry(layer, row, slot) + 0.5f * (float)d;
          c->keys[layer][row * ROW_STRIDE + 2 * slot + d] = value;
          c->values[layer][row * ROW_STRIDE + 2 * slot + d] = -value;
        }
      }
    }
    c->key_list[layer] = c->keys[layer];
    c->value_list[layer] = c->values[layer];
  }
}

/* Slot `to` of row `to_row` holds what was in slot `from` of row `from_row`, in both layers. */
static int holds(const cache* c, int to_row, int to, int from_row, int from) {
  for (int layer = 0; layer < 2; ++layer) {
    for (int d = 0; d < 2; ++d) {
      const float value = entry(layer, from_row, from) + 0.5f * (float)d;
      const int at = to_row * ROW_STRIDE + 2 * to + d;
      if (c->keys[layer][at] != value || c->values[layer][at] != -value) return 0;
    }
  }
  return 1;
}

static mem1_prune_kv_cache_params describe(cache* c) {
  mem1_prune_kv_cache_params params;
  memset(&params, 0, sizeof(params));
  params.struct_size = sizeof(params);
  params.device = MEM1_CPU;
  params.dtype = MEM1_FLOAT32;
  params.layers = 2;
  params.batch = ROWS;
  params.sequence_rows = 1;
  params.row_slots = SLOTS;
  params.heads = 1;
  params.head_dim = 2;
  params.keys = c->key_list;
  params.values = c->value_list;
  params.stride_row = ROW_STRIDE;
  params.stride_slot = 2;
  params.stride_head = 2;
  return params;
}

static int prune_cache(void) {
  const uint8_t mask[ROWS * SLOTS] = {0, 1, 0, 1, /* the second has 3 entries */ 1, 0, 255, 1};
  const int32_t ranges[ROWS * 2 * 2] = {1, 2, 3, 4, 0, 1, 2, 3};
  const int32_t lengths[ROWS] = {4, 3}, wrong_lengths[ROWS] = {4, 5};
  const int32_t wrong_ranges[ROWS * 2 * 2] = {1, 2, 3, 4, 0, 2, 1, 3};
  int32_t new_lengths[ROWS] = {-7, -7};
  mem1_error error;
  cache c, before;
  fill(&c);
  before = c;
  mem1_prune_kv_cache_params params = describe(&c);
  params.lengths = lengths;
  params.mask = mask;
  params.mask_stride_batch = SLOTS;
  params.new_lengths = new_lengths;

  EXPECT(mem1_prune_kv_cache(&params, NULL, &error) == MEM1_OK);
  EXPECT(new_lengths[0] == 2 && new_lengths[1] == 2);
  EXPECT(holds(&c, 0, 0, 0, 1) && holds(&c, 0, 1, 0, 3));
  EXPECT(holds(&c, 1, 0, 1, 0) && holds(&c, 1, 1, 1, 2));
  EXPECT(c.keys[0][ROW_STRIDE - 1] == 0 && c.values[1][2 * ROW_STRIDE - 2] == 0); /* between the rows */

  /* Ranges say the same. Their reader may not want the new lengths. */
  fill(&c);
  params.mask = NULL;
  params.ranges = ranges;
  params.range_count = 2;
  params.new_lengths = NULL;
  EXPECT(mem1_prune_kv_cache(&params, NULL, &error) == MEM1_OK);
  EXPECT(holds(&c, 0, 0, 0, 1) && holds(&c, 0, 1, 0, 3) && holds(&c, 1, 0, 1, 0) && holds(&c, 1, 1, 1, 2));

  /* A refused call says why and touches nothing, not even the first sequence. */
  fill(&c);
  params.new_lengths = new_lengths;
  params.ranges = wrong_ranges;
  EXPECT(mem1_prune_kv_cache(&params, NULL, &error) == MEM1_INVALID_ARGUMENT);
  EXPECT(strstr(error.message, "keep") != NULL);
  params.ranges = ranges;
  params.lengths = wrong_lengths;
  EXPECT(mem1_prune_kv_cache(&params, NULL, &error) == MEM1_INVALID_ARGUMENT);
  EXPECT(strstr(error.message, "lengths") != NULL);
  params.lengths = lengths;
  params.mask = mask;
  EXPECT(mem1_prune_kv_cache(&params, NULL, NULL) == MEM1_INVALID_ARGUMENT); /* both, and nobody wants to know why */
  params.mask = NULL;
  params.struct_size -= 8;
  EXPECT(mem1_prune_kv_cache(&params, NULL, &error) == MEM1_INVALID_ARGUMENT);
  EXPECT(strstr(error.message, "struct_size") != NULL);
  EXPECT(memcmp(c.keys, before.keys, sizeof(c.keys)) == 0 && memcmp(c.values, before.values, sizeof(c.values)) == 0);
  EXPECT(new_lengths[0] == 2 && new_lengths[1] == 2);
  return 0;
}

static int turn_keys(void) {
  /* Slots 0 and 3 of the first row stay; key 3 turns by -2, or with a base encoded at 5, by 1 - 5 = -4. */
  const uint8_t mask[SLOTS] = {1, 0, 0, 1};
  const int32_t length = 4, base_positions[SLOTS] = {0, 9, 9, 5};
  const float inv_freq = 1.0f;
  int32_t new_base_positions[SLOTS] = {-7, -7, -7, -7};
  float base[SLOTS * 2] = {3.0f, 4.0f, 0, 0, 0, 0, 1.0f, 0.0f};
  void* base_list[1] = {base};
  mem1_error error;
  cache c;
  fill(&c);
  mem1_prune_kv_cache_params params = describe(&c);
  params.layers = 1;
  params.batch = 1;
  params.lengths = &length;
  params.mask = mask;
  params.mask_stride_batch = SLOTS;
  params.inv_freq = &inv_freq;
  EXPECT(mem1_prune_kv_cache(&params, NULL, &error) == MEM1_OK);
  EXPECT(c.keys[0][0] == 0.0f && c.keys[0][1] == 0.5f);                 /* did not move */
  EXPECT(near(c.keys[0][2], 3.0 * -0.4161468365 + 3.5 * 0.9092974268)); /* cos 2 and sin 2 */
  EXPECT(near(c.keys[0][3], 3.5 * -0.4161468365 - 3.0 * 0.9092974268));
  EXPECT(c.values[0][2] == -3.0f && c.values[0][3] == -3.5f);

  fill(&c);
  params.base_keys = base_list;
  params.base_stride_row = SLOTS * 2;
  params.base_stride_slot = 2;
  params.base_stride_head = 2;
  params.base_positions = base_positions;
  params.new_base_positions = new_base_positions;
  EXPECT(mem1_prune_kv_cache(&params, NULL, &error) == MEM1_OK);
  EXPECT(c.keys[0][0] == 3.0f && c.keys[0][1] == 4.0f);
  EXPECT(near(c.keys[0][2], -0.6536436209) && near(c.keys[0][3], 0.7568024953)); /* cos 4 and -sin 4 */
  EXPECT(base[0] == 3.0f && base[2] == 1.0f && base[3] == 0.0f);
  EXPECT(new_base_positions[0] == 0 && new_base_positions[1] == 5 && new_base_positions[2] == -7);
  return 0;
}

static int prune_pages(void) {
  /* One sequence of 6 tokens in pages 3, 0, 2 of 2 slots; tokens 1, 4 and 5 stay: page 0 dies. */
  enum { PAGES = 5, PAGE = 2, WIDTH = 4 };
  const int32_t table[WIDTH] = {3, 0, 2, 99}, wrong_table[WIDTH] = {3, 0, PAGES, 99}; /* the last is not in use */
  const int32_t ranges[2 * 2] = {1, 2, 4, 6}, length = 6;
  int32_t new_table[WIDTH], page_lengths[WIDTH], row_lengths[WIDTH], new_length = -7, uses[PAGES] = {0};
  float keys[PAGES * PAGE], values[PAGES * PAGE];
  void *key_list[1] = {keys}, *value_list[1] = {values};
  mem1_error error;
  mem1_prune_pages_params pages;
  mem1_prune_kv_cache_params params;
  for (int i = 0; i < PAGES * PAGE; ++i) values[i] = -(keys[i] = (float)i);
  memset(&pages, 0, sizeof(pages));
  pages.struct_size = sizeof(pages);
  pages.device = MEM1_CPU;
  pages.batch = 1;
  pages.sequence_pages = WIDTH;
  pages.page_size = PAGE;
  pages.pages = PAGES;
  pages.block_table = wrong_table;
  pages.lengths = &length;
  pages.ranges = ranges;
  pages.range_count = 2;
  pages.new_block_table = new_table;
  pages.page_lengths = page_lengths;
  pages.new_lengths = &new_length;
  pages.page_uses = uses;
  EXPECT(mem1_prune_pages(&pages, NULL, &error) == MEM1_INVALID_ARGUMENT);
  EXPECT(strstr(error.message, "block_table") != NULL && new_length == -7 && uses[3] == 0);

  memset(&params, 0, sizeof(params));
  params.struct_size = sizeof(params);
  params.device = MEM1_CPU;
  params.dtype = MEM1_FLOAT32;
  params.layers = params.batch = params.heads = params.head_dim = 1;
  params.sequence_rows = WIDTH;
  params.row_slots = PAGE;
  params.keys = key_list;
  params.values = value_list;
  params.stride_row = PAGE;
  params.stride_slot = params.stride_head = 1;
  params.source_rows = table;
  params.lengths = &length;
  params.ranges = ranges;
  params.range_count = 2;

  /* Gaps are left: pages 3 and 2 stay, with one token and with two. */
  pages.block_table = table;
  pages.within_pages = 1;
  EXPECT(mem1_prune_pages(&pages, NULL, &error) == MEM1_OK);
  EXPECT(new_length == 3 && new_table[0] == 3 && new_table[1] == 2 && new_table[2] == -1 && new_table[3] == -1);
  EXPECT(page_lengths[0] == 1 && page_lengths[1] == 2 && page_lengths[2] == 0 && page_lengths[3] == 0);
  EXPECT(uses[0] == 1 && uses[1] == 0 && uses[2] == 2 && uses[3] == 2 && uses[4] == 0);
  params.within_rows = 1;
  params.new_lengths = row_lengths;
  EXPECT(mem1_prune_kv_cache(&params, NULL, &error) == MEM1_OK);
  EXPECT(row_lengths[0] == 1 && row_lengths[1] == 0 && row_lengths[2] == 2 && row_lengths[3] == 0);
  EXPECT(keys[6] == 7 && keys[4] == 4 && keys[5] == 5); /* tokens 1, 4, 5 */
  EXPECT(values[6] == -7 && values[4] == -4 && values[5] == -5);

  /* Gaps are closed: token 4 moves up into page 3. */
  pages.within_pages = 0;
  memset(uses, 0, sizeof(uses));
  EXPECT(mem1_prune_pages(&pages, NULL, &error) == MEM1_OK);
  EXPECT(new_length == 3 && new_table[0] == 3 && new_table[1] == 2 && new_table[2] == -1);
  EXPECT(page_lengths[0] == 2 && page_lengths[1] == 1 && page_lengths[2] == 0);
  for (int i = 0; i < PAGES * PAGE; ++i) values[i] = -(keys[i] = (float)i);
  params.within_rows = 0;
  params.target_rows = new_table;
  params.new_lengths = NULL;
  EXPECT(mem1_prune_kv_cache(&params, NULL, &error) == MEM1_OK);
  EXPECT(keys[6] == 7 && keys[7] == 4 && keys[4] == 5);
  EXPECT(values[6] == -7 && values[7] == -4 && values[4] == -5);
  EXPECT(keys[0] == 0 && keys[1] == 1 && keys[8] == 8); /* other pages */
  return 0;
}

int main(void) {
  if (plan_tiles() != 0 || prune_cache() != 0 || turn_keys() != 0 || prune_pages() != 0 || losses() != 0) {
    return 1;
  }
  printf("mem1_core %s, CUDA code for [%s]\n", mem1_version(), mem1_cuda_architectures());
  return 0;
}
