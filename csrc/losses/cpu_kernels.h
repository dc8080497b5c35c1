// The CPU kernels of the expert losses: a table, of which there is one for each instruction set (common/cpu_level.h).
#pragma once

#include "losses/call.h"

namespace shike {

// Where a forward of the generalised loss leaves its results.
struct ExpertOutputs {
    double* terms;  // [B, 2]: cross-entropy and divergence, weighted
    void* loss;     // [K, B] in the accumulation dtype, or null
    void* rows;     // [4, K, B], or null
};

// Row ranges of a call: threads take one each. `terms` is [B, 3] for dkt (cross-entropy, hardest, mutual, without
// weights), in double. `grad_output` is the gradient of the loss; `both` takes it to be 1 and saves nothing.
struct LossKernels {
    void (*dkt_forward)(const DktCall&, double* terms, std::int64_t first, std::int64_t last);
    void (*dkt_backward)(const DktCall&, const Experts& gradient, double grad_output, std::int64_t first,
                         std::int64_t last);
    void (*dkt_both)(const DktCall&, const Experts& gradient, double* terms, std::int64_t first, std::int64_t last);
    void (*expert_forward)(const ExpertCall&, const ExpertOutputs&, std::int64_t first, std::int64_t last);
    void (*expert_backward)(const ExpertCall&, const Experts& gradient, const void* grad_output, std::int64_t first,
                            std::int64_t last);
    void (*expert_both)(const ExpertCall&, const Experts& gradient, const ExpertOutputs&, std::int64_t first,
                        std::int64_t last);
};

}  // namespace shike
