// The kernel for any processor that the compiler targets.
#include "includes.h"

namespace ifr::baseline {
#include "vec.h"
#include "gemm.h"
#include "lines.h"
#include "blocks.h"
#include "row.h"
#include "score_impl.h"
}  // namespace ifr::baseline
