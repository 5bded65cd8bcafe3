// Kernels for processors with avx512f, avx512bw, avx512dq, avx512vl, avx512bf16, avx2, fma.
#if defined(__x86_64__)
#include <immintrin.h>
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

#define TANDEM_NAMESPACE avx512_bf16
#define TANDEM_KERNELS kAvx512Bf16Kernels
#define TANDEM_NAME "C++ (AVX-512 bf16)"
#define VW 16
#define TANDEM_MAX_ROWS 13
#define TANDEM_DPBF16

#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
