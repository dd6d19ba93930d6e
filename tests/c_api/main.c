/* Plans the tiles of a small trajectory through the C API and checks the answer; exit status 0 when all is right. */
#include <stdio.h>
#include <string.h>

#include "mem1/mem1.h"

#define LENGTH 6
#define EXPECT(condition)                                                       \
  do {                                                                          \
    if (!(condition)) {                                                         \
      fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      return 1;                                                                 \
    }                                                                           \
  } while (0)

int main(void) {
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

  printf("mem1_core %s, CUDA code for [%s]\n", mem1_version(), mem1_cuda_architectures());
  return 0;
}
