// Kernels for processors with matrix tiles beside avx512f, avx512bw, avx512dq, avx512vl, avx512bf16,
// avx2, fma. Left out where the compiler does not know tiles.
#include "kernels.h"
#if defined(TANDEM_HAS_AMX)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16")
#endif

#define TANDEM_NAMESPACE amx
#define TANDEM_KERNELS kAmxKernels
#define TANDEM_NAME "C++ (AMX bf16)"
#define VW 16
#define TANDEM_MAX_ROWS 13
#define TANDEM_DPBF16
#define TANDEM_TILES 1

#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // TANDEM_HAS_AMX
