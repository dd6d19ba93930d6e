// One body, compiled for several instruction sets and chosen when the library loads. The body's callees must be inlined
// into it to be compiled for the same set. By feature, not by arch=...: clones by arch= are chosen by CPU model, and on
// AMD the baseline would run.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MEM1_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MEM1_CLONES
#endif
#define MEM1_INLINE inline __attribute__((always_inline))
