// Kernels for processors with avx2, fma.
#if defined(__x86_64__)
#include <immintrin.h>
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define TANDEM_NAMESPACE avx2
#define TANDEM_KERNELS kAvx2Kernels
#define TANDEM_NAME "C++ (AVX2)"
#define VW 8
#define TANDEM_MAX_ROWS 3

#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
