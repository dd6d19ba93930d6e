// For what the host and CUDA kernels both compute.
#pragma once

#if defined(__CUDACC__)
#define MEM1_HOST_DEVICE __host__ __device__
#else
#define MEM1_HOST_DEVICE
#endif
