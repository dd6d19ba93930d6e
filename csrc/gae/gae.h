// Backends of mem1_gae. Arguments were validated by gae.cpp.
#pragma once

#include "mem1/mem1.h"

namespace mem1::gae {

void gae_cpu(const mem1_gae_params& p);
mem1_status gae_cuda(const mem1_gae_params& p, void* stream, mem1_error* error);

}  // namespace mem1::gae
