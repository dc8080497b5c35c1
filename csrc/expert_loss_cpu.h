// The CPU kernels of the expert losses, one table for each instruction set that was compiled and that may be chosen at
// run time.
#pragma once

#include "expert_loss.h"

namespace shike {

// Row ranges of a call: threads take one each. `terms` is [B, 3] for dkt (cross-entropy, hardest, mutual, without
// weights) and [B] for cross-entropy, in double. `incoming` is the gradient of the loss.
struct CpuKernels {
    void (*dkt_forward)(const DktCall&, double* terms, std::int64_t first, std::int64_t last);
    void (*dkt_backward)(const DktCall&, const Experts& gradient, double incoming, std::int64_t first,
                         std::int64_t last);
    void (*cross_entropy_forward)(const CrossEntropyCall&, double* terms, std::int64_t first, std::int64_t last);
    void (*cross_entropy_backward)(const CrossEntropyCall&, const Experts& gradient, double incoming,
                                   std::int64_t first, std::int64_t last);
};

// Null where the compiler does not target that instruction set. Only the generic kernels take float64.
const CpuKernels* generic_kernels();
const CpuKernels* avx2_kernels();
const CpuKernels* avx512_kernels();

}  // namespace shike
