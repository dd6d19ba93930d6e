// Rows of logits on the device: a block owns a row, so its result depends on nothing else. It reads the row once for
// the sums (online softmax), and once more to put the gradient in its place: 16-bit gradients overwrite what all
// threads have read before.
#include "ppo_loss/rows.h"

#include "common/check_launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace mem1::ppo_loss {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

template <typename Real>
constexpr int kVector = 16 / sizeof(Real);  // elements of one load
constexpr int kVectors = 4;                 // loads of a thread that are under way at once
template <typename Real>
constexpr int kTile = kThreads * kVectors * kVector<Real>;

template <typename Real>
__device__ Real none() {
  return static_cast<Real>(-INFINITY);
}

__device__ float power_of_two(float x) { return exp2f(x); }
__device__ double power_of_two(double x) { return exp2(x); }

// Sums over some elements z, the largest of which is max_logit: of 2^x and of x 2^x with x = (z - max_logit) scale.
template <typename Real>
struct Sums {
  Real max_logit, mass, moment;

  // The same sums for a maximum that is no lower.
  __device__ void raise(Real higher, Real scale) {
    if (max_logit == none<Real>() || higher == max_logit) {
      max_logit = higher;
      return;
    }
    Real x = (max_logit - higher) * scale;
    x = x < static_cast<Real>(kSmall) ? static_cast<Real>(kSmall) : x;
    const Real factor = power_of_two(x);
    moment = factor * (moment + x * mass);
    mass *= factor;
    max_logit = higher;
  }
  __device__ void add(Sums other, Real scale) {
    const Real higher = other.max_logit > max_logit ? other.max_logit : max_logit;
    if (higher != none<Real>()) {
      raise(higher, scale);
      other.raise(higher, scale);
    }
    mass += other.mass;
    moment += other.moment;
  }
};

template <typename Real>
__device__ Sums<Real> sum_over_block(Sums<Real> own, Real scale) {
  __shared__ Sums<Real> of_warp[kWarps];
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    Sums<Real> other;
    other.max_logit = __shfl_xor_sync(~0u, own.max_logit, lanes);
    other.mass = __shfl_xor_sync(~0u, own.mass, lanes);
    other.moment = __shfl_xor_sync(~0u, own.moment, lanes);
    own.add(other, scale);
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = own;
  __syncthreads();
  own = of_warp[0];
  for (int warp = 1; warp < kWarps; ++warp) own.add(of_warp[warp], scale);  // all threads alike, in one order
  return own;
}

enum class Logits { kPlain, kBiased, kCapped };

// z = logit + bias of a tile of the row; -inf past its end.
template <typename Real, bool kBias>
struct Tile {
  alignas(16) Real z[kVectors * kVector<Real>];  // written 16 bytes at a time

  // The element that place n of this thread holds. A row that is not aligned is read one by one, in the same order.
  __device__ static int64_t index(int64_t first, int n) {
    return first + (int64_t{n / kVector<Real>} * kThreads + threadIdx.x) * kVector<Real> + n % kVector<Real>;
  }
  __device__ Tile(const Real* row, const Real* bias, int64_t first, int64_t count, bool aligned) {
#pragma unroll
    for (int n = 0; n < kVectors * kVector<Real>; n += kVector<Real>) {
      const int64_t at = index(first, n);
      if (aligned && at + kVector<Real> <= count) {
        *reinterpret_cast<uint4*>(z + n) = *reinterpret_cast<const uint4*>(row + at);
      } else {
#pragma unroll
        for (int m = 0; m < kVector<Real>; ++m) z[n + m] = at + m < count ? row[at + m] : none<Real>();
      }
    }
#pragma unroll
    for (int n = 0; n < kVectors * kVector<Real>; ++n) {
      if (kBias && index(first, n) < count) z[n] += bias[index(first, n)];
    }
  }
};

__device__ void store(float* to, float value) { *to = value; }
__device__ void store(double* to, double value) { *to = value; }
__device__ void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16(value); }
__device__ void store(__half* to, float value) { *to = __float2half(value); }

template <typename Real, typename Gradient, Logits kLogits>
__global__ void __launch_bounds__(kThreads, 2) rows_kernel(const mem1_logit_rows_params p) {
  constexpr bool kBias = kLogits == Logits::kBiased;
  const int64_t i = blockIdx.x, count = p.vocabulary;
  const auto in = [i](const void* array) { return static_cast<const Real*>(array)[i]; };
  const auto out = [i](void* array, Real value) { static_cast<Real*>(array)[i] = value; };
  Real* row = static_cast<Real*>(p.logits) + i * p.stride_row;
  const Real* bias = static_cast<const Real*>(p.bias);
  const bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
  const Real temperature = in(p.temperature), scale = static_cast<Real>(kLog2E) / temperature;
  const Real ln2 = static_cast<Real>(kLn2), small = static_cast<Real>(kSmall);
  const int64_t target = p.target[i];
  const bool valid = target >= 0 && target < count;

  Real max_logit, log_sum_exp, entropy;
  Grads<Real> grads;
  bool nothing;  // not a single finite logit: the gradient is 0
  if (p.task == MEM1_ROWS_BACKWARD) {
    max_logit = in(p.max_logit);
    log_sum_exp = in(p.log_sum_exp);
    entropy = in(p.entropy);
    grads = {in(p.d_logprob), in(p.d_entropy)};
    nothing = max_logit == none<Real>() && log_sum_exp == 0;
  } else {
    Sums<Real> own{none<Real>(), 0, 0};
    for (int64_t first = 0; first < count; first += kTile<Real>) {
      const Tile<Real, kBias> tile(row, bias, first, count, aligned);
      Real highest = own.max_logit;
#pragma unroll
      for (int n = 0; n < kVectors * kVector<Real>; ++n) highest = tile.z[n] > highest ? tile.z[n] : highest;
      const Real base = highest == none<Real>() ? Real(0) : highest;
      if (highest != none<Real>()) own.raise(highest, scale);
#pragma unroll
      for (int n = 0; n < kVectors * kVector<Real>; ++n) {
        Real x = (tile.z[n] - base) * scale;
        x = x < small ? small : x;
        const Real power = power_of_two(x);
        own.mass += power;
        own.moment += power * x;
      }
    }
    const Sums<Real> all = sum_over_block(own, scale);
    max_logit = all.max_logit;
    nothing = max_logit == none<Real>() && all.mass == 0;
    // NaN without a single finite logit leaves max_logit where it was, but shows in the mass.
    log_sum_exp = nothing ? Real(0) : log(all.mass);
    entropy = nothing ? Real(0) : log_sum_exp - ln2 * all.moment / all.mass;
    Real logprob = static_cast<Real>(NAN);
    if (valid) {
      const Real z = row[target] + (kBias ? bias[target] : Real(0));
      logprob = nothing ? none<Real>() : (z - max_logit) / temperature - log_sum_exp;
    }
    __shared__ Grads<Real> shared;
    if (threadIdx.x == 0) {
      out(p.logprob, logprob);
      out(p.entropy, entropy);
      if (p.task == MEM1_ROWS_LOGPROB) {
        out(p.max_logit, max_logit);
        out(p.log_sum_exp, log_sum_exp);
      } else {
        shared = ppo_row<Real>(p, i, logprob, entropy);
      }
    }
    if (p.with_gradient == 0 || p.task == MEM1_ROWS_LOGPROB) return;
    __syncthreads();
    grads = shared;
  }
  // With x = (z - max_logit) scale, df/dz is 2^x (offset + slope x), and at the target d_logprob more.
  const Real inv_sum_exp = exp(-log_sum_exp), d_logprob = grads.logprob / temperature;
  const Real d_entropy = grads.entropy / temperature;
  const Real offset = inv_sum_exp * (-d_logprob - d_entropy * (entropy - log_sum_exp)),
             slope = -inv_sum_exp * d_entropy * ln2;

  Gradient* gradient = reinterpret_cast<Gradient*>(row);
  for (int64_t first = 0; first < count; first += kTile<Real>) {
    const Tile<Real, kBias> tile(row, bias, first, count, aligned);
    if (!std::is_same_v<Gradient, Real>) __syncthreads();  // a narrow gradient lies where others are still reading
#pragma unroll
    for (int n = 0; n < kVectors * kVector<Real>; n += kVector<Real>) {
      alignas(16) Gradient made[kVector<Real>];
      const int64_t at = tile.index(first, n);
#pragma unroll
      for (int m = 0; m < kVector<Real>; ++m) {
        Real x = (tile.z[n + m] - max_logit) * scale;
        x = x < small ? small : x;
        Real value = nothing ? Real(0) : power_of_two(x) * (offset + slope * x);
        if (at + m == target && !nothing) value += d_logprob;
        if (kLogits == Logits::kCapped && at + m < count) {
          const Real tanh = tile.z[n + m] / static_cast<Real>(p.softcap);
          value *= 1 - tanh * tanh;
        }
        store(made + m, valid ? value : static_cast<Real>(NAN));
      }
      if (aligned && at + kVector<Real> <= count) {
        using Word = std::conditional_t<sizeof(made) == 16, uint4, uint2>;
        *reinterpret_cast<Word*>(gradient + at) = *reinterpret_cast<const Word*>(made);
      } else {
#pragma unroll
        for (int m = 0; m < kVector<Real>; ++m) {
          if (at + m < count) gradient[at + m] = made[m];
        }
      }
    }
  }
}

template <typename Real, typename Gradient>
void launch(const mem1_logit_rows_params& p, cudaStream_t stream) {
  const auto kernel = p.softcap != 0      ? rows_kernel<Real, Gradient, Logits::kCapped>
                      : p.bias != nullptr ? rows_kernel<Real, Gradient, Logits::kBiased>
                                          : rows_kernel<Real, Gradient, Logits::kPlain>;
  kernel<<<static_cast<unsigned>(p.rows), kThreads, 0, stream>>>(p);
}

}  // namespace

mem1_status logit_rows_cuda(const mem1_logit_rows_params& p, void* stream, mem1_error* error) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (p.gradient_dtype) {
    case MEM1_BFLOAT16:
      launch<float, __nv_bfloat16>(p, on);
      break;
    case MEM1_FLOAT16:
      launch<float, __half>(p, on);
      break;
    case MEM1_FLOAT64:
      launch<double, double>(p, on);
      break;
    default:
      launch<float, float>(p, on);
  }
  return check_launch("logit rows", error);
}

}  // namespace mem1::ppo_loss
