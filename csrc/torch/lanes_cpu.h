// Vectors of 4, 8 or 16 floats: what one register of SSE2 and NEON, AVX2 or AVX-512 holds. GCC keeps a wider vector
// than that in memory, at a fifth of the speed: a loop written with these is compiled once per width, see MEM1_FOR_*.
#pragma once

#include "common/clones.h"

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

namespace mem1::cpu {

#if defined(__x86_64__)
#define MEM1_FOR_AVX512 __attribute__((target("avx512f")))
#define MEM1_FOR_AVX2 __attribute__((target("avx2,fma")))
// Floats in a register of this machine.
inline int lanes_here() {
  static const int lanes = __builtin_cpu_supports("avx512f")                                 ? 16
                           : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 8
                                                                                             : 4;
  return lanes;
}
#else
#define MEM1_FOR_AVX512
#define MEM1_FOR_AVX2
inline int lanes_here() { return 4; }
#endif

template <typename T, int kLanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
using Quad = VectorOf<float, 4>::type;

template <int kLanes>
struct Lanes {
  using Floats = typename VectorOf<float, kLanes>::type;
  using Words = typename VectorOf<uint32_t, kLanes>::type;
  using Halves = typename VectorOf<uint16_t, kLanes>::type;

  static MEM1_INLINE Floats load(const float* from) {
    Floats lanes;
    std::memcpy(&lanes, from, sizeof(lanes));
    return lanes;
  }

  static MEM1_INLINE Floats load(const at::BFloat16* from) {
    Halves bits;
    std::memcpy(&bits, from, sizeof(bits));
    const Words words = __builtin_convertvector(bits, Words) << 16;
    Floats lanes;
    std::memcpy(&lanes, &words, sizeof(lanes));
    return lanes;
  }

  // The first `count` only, then zeros.
  template <typename In>
  static MEM1_INLINE Floats load(const In* from, int64_t count) {
    In lanes[kLanes] = {};
    std::memcpy(lanes, from, static_cast<size_t>(count) * sizeof(In));
    return load(lanes);
  }

  static MEM1_INLINE void store(Floats lanes, float* to) { std::memcpy(to, &lanes, sizeof(lanes)); }

  // Its quarters, or halves, added up.
  static MEM1_INLINE Quad fold(Floats x) {
    if constexpr (kLanes == 16) {
      return Lanes<8>::fold(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                            __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
    } else if constexpr (kLanes == 8) {
      return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
    } else {
      return x;
    }
  }

  // The sum of each of four.
  static MEM1_INLINE Quad sums(Floats a, Floats b, Floats c, Floats d) {
    const Quad p = fold(a), q = fold(b), r = fold(c), s = fold(d);
    const Quad pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
    const Quad rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
    return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
  }
};

}  // namespace mem1::cpu
