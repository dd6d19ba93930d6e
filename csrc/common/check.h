// Argument checks of the C API: a failed one fills the caller's message and returns a status.
#pragma once

#include <cstdio>

#include "mem1/mem1.h"

namespace mem1 {

template <typename... Args>
mem1_status fail(mem1_error* error, mem1_status status, const char* format, Args... args) {
  if (error != nullptr) std::snprintf(error->message, sizeof(error->message), format, args...);
  return status;
}

inline mem1_status not_compiled(mem1_error* error) {
  return fail(error, MEM1_NOT_COMPILED, "device: MEM1_CUDA, but this build of mem1_core has no CUDA code%s",
              " (nvcc was not found, or MEM1_CUDA=OFF)");
}

}  // namespace mem1

#define MEM1_CHECK(condition, error, ...) \
  if (!(condition)) return ::mem1::fail(error, MEM1_INVALID_ARGUMENT, __VA_ARGS__)
