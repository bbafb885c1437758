// The kernel for any processor that the compiler targets.
#include "includes.h"

namespace ifr::baseline {
#include "vec.h"
#include "gemm.h"
#include "score_impl.h"
}  // namespace ifr::baseline
