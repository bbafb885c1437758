// The kernel for AVX2 with FMA. The target is set after all shared headers, so that their inline
// functions stay fit for any processor whichever copy of them the linker keeps.
#include "includes.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define IFR_AVX2

namespace ifr::avx2 {
#include "vec.h"
#include "gemm.h"
#include "lines.h"
#include "blocks.h"
#include "row.h"
#include "score_impl.h"
}  // namespace ifr::avx2

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
