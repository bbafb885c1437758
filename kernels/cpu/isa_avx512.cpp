// The kernel for AVX-512. The target is set after all shared headers, so that their inline
// functions stay fit for any processor whichever copy of them the linker keeps.
#include "includes.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own avx512fintrin.h
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#endif
#define IFR_AVX512

namespace ifr::avx512 {
#include "vec.h"
#include "gemm.h"
#include "lines.h"
#include "blocks.h"
#include "row.h"
#include "score_impl.h"
}  // namespace ifr::avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
