// What a call of the expert losses consists of, for the CPU and the CUDA kernels. No pointer is owned here.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace shike {

// The logits or the gradient [B, C] of one expert; strides in elements.
struct Matrix {
    void* data;
    std::int64_t row_stride;
    std::int64_t class_stride;
};

// [K, B, C], one matrix an expert.
struct Experts {
    Matrix expert[kMaxExperts];
    int count;  // K
    std::int64_t batch;
    std::int64_t classes;
    DType dtype;
};

struct Targets {  // int64 [B]
    const std::int64_t* data;
    std::int64_t stride;
};

// The accumulation dtype, of what is saved and of the losses, is float64 for float64 logits, else float32.

struct DktCall {
    Experts logits;
    Targets target;
    double hardest_weight;  // with the reduction's 1 / (B C) or 1 / B; 0: without this term
    double mutual_weight;
    const double* factors;  // null, or two numbers beside the logits (on their device) that multiply the two weights
    double teacher_target_logit;
    double student_target_logit;
    bool detach_teacher;
    void* saved;  // [B, 5 K + 4]: DktSaved (row_gradient.h) of each row
};

struct CrossEntropyCall {
    Experts logits;
    Targets target;
    const void* bias;          // [C] or [K, C], contiguous, in the accumulation dtype; null: none
    std::int64_t bias_stride;  // from expert to expert: 0 or C
    double label_smoothing;
    void* saved;  // [B, 2 K]: the K maxima, then the K inverse sums of exponentials
};

}  // namespace shike
