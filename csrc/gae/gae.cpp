// Validation and dispatch of mem1_gae.
#include "gae/gae.h"

#include "common/check.h"

#include <cmath>

namespace mem1::gae {
namespace {

mem1_status validate(const mem1_gae_params* params, mem1_error* error) {
  MEM1_CHECK_PARAMS(params, mem1_gae_params, error);
  const mem1_gae_params& p = *params;
  MEM1_CHECK(p.dtype == MEM1_FLOAT32 || p.dtype == MEM1_FLOAT64, error,
             "dtype: expected MEM1_FLOAT32 or MEM1_FLOAT64, got %d", static_cast<int>(p.dtype));
  MEM1_CHECK(p.batch >= 0 && p.length >= 0, error, "batch, length: expected >= 0, got %d, %d", p.batch, p.length);
  MEM1_CHECK(std::isfinite(p.gamma) && std::isfinite(p.lambda), error,
             "gamma, lambda: expected finite numbers, got %g, %g", p.gamma, p.lambda);
  if (p.batch == 0 || p.length == 0) return MEM1_OK;
  MEM1_CHECK(p.reward != nullptr && p.value != nullptr && p.mask != nullptr, error,
             "reward, value, mask: expected pointers, got NULL");
  MEM1_CHECK(p.advantage != nullptr && p.returns != nullptr, error, "advantage, returns: expected pointers, got NULL");
  return MEM1_OK;
}

}  // namespace

#if !defined(MEM1_WITH_CUDA)
mem1_status gae_cuda(const mem1_gae_params&, void*, mem1_error* error) { return not_compiled(error); }
#endif

}  // namespace mem1::gae

mem1_status mem1_gae(const mem1_gae_params* params, void* cuda_stream, mem1_error* error) {
  const mem1_status status = mem1::gae::validate(params, error);
  if (status != MEM1_OK || params->batch == 0 || params->length == 0) return status;
  if (params->device == MEM1_CUDA) return mem1::gae::gae_cuda(*params, cuda_stream, error);
  mem1::gae::gae_cpu(*params);
  return MEM1_OK;
}
