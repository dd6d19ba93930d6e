// What a CUDA launch came to.
#pragma once

#include "common/check.h"

#include <cuda_runtime.h>

namespace mem1 {

inline mem1_status check_launch(const char* op, mem1_error* error) {
  const cudaError_t status = cudaGetLastError();
  if (status == cudaSuccess) return MEM1_OK;
  return fail(error, MEM1_DEVICE_ERROR, "%s: CUDA error: %s", op, cudaGetErrorString(status));
}

}  // namespace mem1
