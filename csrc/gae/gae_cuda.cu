// Generalised advantage estimation on the device: a block owns a row and goes through it from its end. A token is an
// affine map of (value of the next step, its advantage); the maps of a tile are put together by a scan over the
// threads, in fp64, whose cost does not show beside the memory.
#include "gae/gae.h"

#include "common/check_launch.h"

#include <cuda_runtime.h>

namespace mem1::gae {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTokens = 4;  // of a thread
constexpr int kTile = kThreads * kTokens;

struct State {
  double value = 0, advantage = 0;  // of the step that follows
};

// value = steps ? own value : the old one; advantage = a advantage + b value + c of the old ones.
struct Map {
  double a, b, c, value;
  bool steps;

  __device__ static Map identity() { return {1, 0, 0, 0, false}; }
  __device__ State operator()(State s) const { return {steps ? value : s.value, a * s.advantage + b * s.value + c}; }
  // This one, then `earlier`, of tokens further to the front.
  __device__ Map then(const Map& earlier) const {
    Map both;
    both.a = earlier.a * a;
    both.b = earlier.a * b + (steps ? 0 : earlier.b);
    both.c = earlier.a * c + (steps ? earlier.b * value : 0) + earlier.c;
    both.steps = steps || earlier.steps;
    both.value = earlier.steps ? earlier.value : value;
    return both;
  }
  __device__ Map from_lane(int lanes_below) const {
    Map other;
    other.a = __shfl_up_sync(~0u, a, lanes_below);
    other.b = __shfl_up_sync(~0u, b, lanes_below);
    other.c = __shfl_up_sync(~0u, c, lanes_below);
    other.value = __shfl_up_sync(~0u, value, lanes_below);
    other.steps = __shfl_up_sync(~0u, static_cast<int>(steps), lanes_below) != 0;
    return other;
  }
};

template <typename Real>
__global__ void __launch_bounds__(kThreads) gae_kernel(const mem1_gae_params p) {
  __shared__ Map of_warp[kWarps];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.length;
  const Real *reward = static_cast<const Real*>(p.reward) + first, *value = static_cast<const Real*>(p.value) + first;
  Real *advantage = static_cast<Real*>(p.advantage) + first, *returns = static_cast<Real*>(p.returns) + first;
  const uint8_t* mask = p.mask + first;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  State after;  // of the tile
  for (int64_t end = p.length; end > 0; end -= kTile) {
    Map tokens[kTokens], own = Map::identity();
#pragma unroll
    for (int n = 0; n < kTokens; ++n) {
      const int64_t t = end - 1 - (static_cast<int64_t>(threadIdx.x) * kTokens + n);
      tokens[n] = Map::identity();
      if (t >= 0 && mask[t] != 0) {
        const double v = value[t];
        tokens[n] = {p.gamma * p.lambda, p.gamma, static_cast<double>(reward[t]) - v, v, true};
      }
      own = own.then(tokens[n]);
    }
    Map upto = own;  // the tokens of this thread and of those before it in the warp
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const Map other = upto.from_lane(lanes);
      if (lane >= lanes) upto = other.then(upto);
    }
    if (lane == 31) of_warp[warp] = upto;
    __syncthreads();
    Map before = Map::identity();  // the tokens of the threads before this one
    for (int other = 0; other < warp; ++other) before = before.then(of_warp[other]);
    const Map in_warp = upto.from_lane(1);
    if (lane > 0) before = before.then(in_warp);
    State state = before(after);
#pragma unroll
    for (int n = 0; n < kTokens; ++n) {
      const int64_t t = end - 1 - (static_cast<int64_t>(threadIdx.x) * kTokens + n);
      state = tokens[n](state);
      if (t >= 0) {
        advantage[t] = static_cast<Real>(tokens[n].steps ? state.advantage : 0);
        returns[t] = static_cast<Real>(tokens[n].steps ? state.advantage + state.value : 0);
      }
    }
    for (int other = 0; other < kWarps; ++other) after = of_warp[other](after);
    __syncthreads();  // before the next tile's maps
  }
}

}  // namespace

mem1_status gae_cuda(const mem1_gae_params& p, void* stream, mem1_error* error) {
  const auto kernel = p.dtype == MEM1_FLOAT64 ? gae_kernel<double> : gae_kernel<float>;
  kernel<<<static_cast<unsigned>(p.batch), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return check_launch("gae", error);
}

}  // namespace mem1::gae
