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

// What is asked of every params struct, `type`, before anything else of it is read.
template <typename Params>
mem1_status check_params(const Params* p, const char* type, mem1_error* error) {
  if (p == nullptr) return fail(error, MEM1_INVALID_ARGUMENT, "params: expected a %s, got NULL", type);
  if (p->struct_size != sizeof(Params)) {
    return fail(error, MEM1_INVALID_ARGUMENT,
                "struct_size: expected %zu (mem1 %s), got %zu: rebuild against this version's mem1.h", sizeof(Params),
                mem1_version(), p->struct_size);
  }
  if (p->device != MEM1_CPU && p->device != MEM1_CUDA) {
    return fail(error, MEM1_INVALID_ARGUMENT, "device: expected MEM1_CPU or MEM1_CUDA, got %d",
                static_cast<int>(p->device));
  }
  return MEM1_OK;
}

}  // namespace mem1

#define MEM1_CHECK(condition, error, ...) \
  if (!(condition)) return ::mem1::fail(error, MEM1_INVALID_ARGUMENT, __VA_ARGS__)
#define MEM1_CHECK_PARAMS(params, type, error) \
  if (const mem1_status status = ::mem1::check_params<type>(params, #type, error); status) return status
