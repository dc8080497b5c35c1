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

// ---- the generalised expert loss

enum class Teacher : int { kNone, kOthers, kMean, kGiven, kView };
enum class Masked : int { kNot, kZero, kExclude, kPartial };

struct LabelsOfExperts {  // int64 [B] (expert_stride 0) or [K, B]; data is null where there are none
    const std::int64_t* data;
    std::int64_t expert_stride;
    std::int64_t stride;
};

struct OfExperts {  // [N] (expert_stride 0) or [K, N], contiguous, in the accumulation dtype; data is null where there is none
    const void* data;
    std::int64_t expert_stride;
};

struct ExpertCall {
    Experts logits;
    LabelsOfExperts target, target_b;
    OfExperts bias, scale, margin;  // of classes
    double scale_number;            // where there is no scale
    const std::uint8_t* mask;       // [B, C] of 0 and 1, contiguous, or null
    Masked masked;
    Teacher teacher;
    Experts teacher_logits;   // kGiven: K matrices, which may be the same; kView: those of the logits
    OfExperts temperature;    // [C]
    double temperature_number;  // where there is none
    double label_smoothing;
    // What multiplies the rows, reductions included; [K, B], of images for kView. Without an array the number does.
    OfExperts weight_a, weight_b, kl_weight;
    double weight_number, weight_b_number, kl_number;
    OfExperts lam;  // [B], the first label's share in the rows' results
    double lam_number;
    bool cross_entropy;  // false: the divergence alone
    bool by_student;     // kl_weight belongs to students
    bool gated;          // kOthers: a teacher counts where its answer is right
    bool detach;
    bool adjusted;
    bool rows;      // their results are wanted
    bool of_rows;   // the loss is [K, B]: not reduced
    double eps;
    void* saved;  // [B, K, kExpertSaved]
};

constexpr int kExpertSaved = 12;

}  // namespace shike
