// The calls of the expert losses from the keyword arguments of Python.
#pragma once

#include "common/arguments.h"
#include "losses/call.h"
#include "losses/launch.h"

namespace shike {

inline int element_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// `tensors`: one [K, B, C], or K of [B, C].
inline Experts experts_of(const Value& tensors, const Experts& shape) {
    const int bytes = element_bytes(shape.dtype);
    Experts experts = shape;
    tensors.each(tensors.size() == 1 ? 1 : shape.count, [&](int k, const Value& tensor) {
        const Array given = tensor.array();
        if (given.dims == 2 && tensors.size() == shape.count) {
            experts.expert[k] = {given.data, given.stride[0], given.stride[1]};
            return;
        }
        if (given.dims != 3 || tensors.size() > 1) {
            tensor.refuse("expected one tensor [K, B, C] or K tensors [B, C], K = " + std::to_string(shape.count) +
                          ", got " + std::to_string(given.dims) + " dimensions");
        }
        for (int i = 0; i < shape.count; ++i) {
            char* data = static_cast<char*>(given.data) + i * given.stride[0] * bytes;
            experts.expert[i] = {data, given.stride[1], given.stride[2]};
        }
    });
    return experts;
}

// dtype, shape (K, B, C) and logits.
inline Experts logits_of(Arguments& in) {
    Experts shape{};
    shape.dtype = in["dtype"].dtype();
    const Value sizes = in["shape"];
    std::int64_t size[3];
    sizes.each(3, [&](int i, const Value& value) { size[i] = value.integer(); });
    if (size[0] < 1 || size[0] > kMaxExperts) {
        sizes.refuse("expected 1 to " + std::to_string(kMaxExperts) + " experts, got " + std::to_string(size[0]));
    }
    shape.count = int(size[0]);
    shape.batch = size[1];
    shape.classes = size[2];
    return experts_of(in["logits"], shape);
}

inline Targets target_of(const Value& values) {
    const Array target = values.array(1);
    return {static_cast<const std::int64_t*>(target.data), target.stride[0]};
}

// `saves`: there is an argument for what the forward leaves for the backward.
inline DktCall dkt_call(Arguments& in, bool saves) {
    DktCall call{};
    call.logits = logits_of(in);
    call.target = target_of(in["target"]);
    if (saves) call.saved = in["saved"].memory(2);
    call.factors = static_cast<const double*>(in["factors"].memory_or_null(1));
    call.hardest_weight = in["hardest_weight"].number();
    call.mutual_weight = in["mutual_weight"].number();
    call.teacher_target_logit = in["teacher_target_logit"].number();
    call.student_target_logit = in["student_target_logit"].number();
    call.detach_teacher = in["detach_teacher"].flag();
    return call;
}

// ---- the generalised expert loss

inline LabelsOfExperts labels_of(const Value& values) {
    if (values.is_none()) return {};
    const Array labels = values.array();
    if (labels.dims != 1 && labels.dims != 2) values.refuse("expected 1 or 2 dimensions");
    const bool each = labels.dims == 2;
    return {static_cast<const std::int64_t*>(labels.data), each ? labels.stride[0] : 0, labels.stride[each ? 1 : 0]};
}

// A tensor [B, C], the same for every expert, or [K, B, C].
inline Experts teacher_of(const Value& values, Experts shape, DType dtype) {
    shape.dtype = dtype;
    const Array given = values.array();
    if (given.dims != 2 && given.dims != 3) values.refuse("expected 2 or 3 dimensions, got " + std::to_string(given.dims));
    const int bytes = element_bytes(dtype), row = given.dims - 2;
    const std::int64_t of_expert = given.dims == 3 ? given.stride[0] : 0;
    for (int k = 0; k < shape.count; ++k) {
        shape.expert[k] = {static_cast<char*>(given.data) + k * of_expert * bytes, given.stride[row], given.stride[row + 1]};
    }
    return shape;
}

// Contiguous numbers [N] or [K, N].
inline OfExperts of_experts(const Value& values) {
    if (values.is_none()) return {};
    const Array given = values.array();
    if (given.dims > 2) values.refuse("expected at most 2 dimensions, got " + std::to_string(given.dims));
    return {given.data, given.dims == 2 ? given.stride[0] : 0};
}

// The elements of `tensors` and `options`: ExpertTensors and ExpertOptions of shike_fast/ops/_expert_call.py, names as
// the numbers of the enumerations. Tuples, because each argument costs a call time.
enum class ExpertTensor : int {
    kTarget, kTargetB, kLam, kBias, kScale, kMargin, kClassWeight, kSampleWeight, kExpertWeight, kClassMask, kTeacher,
    kTemperature, kKlWeight, kGate, kCount
};
enum class ExpertOption : int {
    kCrossEntropy, kLam, kScale, kLabelSmoothing, kReduction, kMasked, kTeacher, kTemperature, kKlWeight, kKlReduction,
    kByStudent, kGated, kDetach, kAdjusted, kEps, kRows, kCount
};

struct ExpertTuples {
    Value tensors, options;

    explicit ExpertTuples(Arguments& in)
        : tensors(in["tensors"].of_size(int(ExpertTensor::kCount))),
          options(in["options"].of_size(int(ExpertOption::kCount))) {}
    Value operator[](ExpertTensor which) const { return tensors.element(int(which)); }
    Value operator[](ExpertOption which) const { return options.element(int(which)); }
};

// Without the weights of rows. `saves`: as above.
inline ExpertCall expert_call(Arguments& in, const ExpertTuples& of, bool saves) {
    using Of = ExpertTensor;
    using Option = ExpertOption;
    ExpertCall call{};
    call.logits = logits_of(in);
    call.target = labels_of(of[Of::kTarget]);
    call.target_b = labels_of(of[Of::kTargetB]);
    call.lam = of_experts(of[Of::kLam]);
    call.bias = of_experts(of[Of::kBias]);
    call.scale = of_experts(of[Of::kScale]);
    call.margin = of_experts(of[Of::kMargin]);
    call.mask = static_cast<const std::uint8_t*>(of[Of::kClassMask].memory_or_null(2));
    call.temperature = of_experts(of[Of::kTemperature]);
    call.cross_entropy = of[Option::kCrossEntropy].flag();
    call.lam_number = of[Option::kLam].number();
    call.scale_number = of[Option::kScale].number();
    call.label_smoothing = of[Option::kLabelSmoothing].number();
    call.of_rows = Reduction(of[Option::kReduction].integer()) == Reduction::kNone;
    call.masked = Masked(of[Option::kMasked].integer());
    call.teacher = Teacher(of[Option::kTeacher].integer());
    call.temperature_number = of[Option::kTemperature].number();
    call.by_student = of[Option::kByStudent].flag();
    call.gated = of[Option::kGated].flag();
    call.detach = of[Option::kDetach].flag();
    call.adjusted = of[Option::kAdjusted].flag();
    call.eps = of[Option::kEps].number();
    const DType dtype = in["teacher_dtype"].dtype();
    const Value teacher = of[Of::kTeacher];
    if (!teacher.is_none()) call.teacher_logits = teacher_of(teacher, call.logits, dtype);
    if (saves) call.saved = in["saved"].memory(3);
    call.weight_number = call.kl_number = 1;
    return call;
}

inline ExpertWeights expert_weights(const ExpertTuples& of, const ExpertCall& call) {
    ExpertWeights weights{};
    weights.lam = call.lam;
    weights.lam_number = call.lam_number;
    weights.class_weight = of_experts(of[ExpertTensor::kClassWeight]);
    weights.sample_weight = of_experts(of[ExpertTensor::kSampleWeight]);
    weights.expert_weight = of_experts(of[ExpertTensor::kExpertWeight]);
    weights.reduction = int(of[ExpertOption::kReduction].integer());
    weights.kl_weight = of_experts(of[ExpertTensor::kKlWeight]);
    weights.gate = of_experts(of[ExpertTensor::kGate]);
    weights.kl_weight_number = of[ExpertOption::kKlWeight].number();
    weights.kl_reduction = int(of[ExpertOption::kKlReduction].integer());
    return weights;
}

// With the weights of rows, as the CUDA kernels take them.
inline ExpertCall weighted_expert_call(Arguments& in) {
    const ExpertTuples of(in);
    ExpertCall call = expert_call(in, of, true);
    call.rows = of[ExpertOption::kRows].flag();
    call.weight_a = of_experts(in["weight_a"]);
    call.weight_b = of_experts(in["weight_b"]);
    call.kl_weight = of_experts(in["kl_weight"]);
    call.weight_number = in["weight_number"].number();
    call.weight_b_number = in["weight_b_number"].number();
    call.kl_number = in["kl_number"].number();
    return call;
}

}  // namespace shike
