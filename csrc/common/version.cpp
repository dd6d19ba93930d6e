#include "mem1/mem1.h"

const char* mem1_version(void) { return MEM1_VERSION; }

const char* mem1_cuda_architectures(void) { return MEM1_CUDA_ARCHITECTURES; }
