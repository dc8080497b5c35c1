// The calls of the expert losses from the keyword arguments of Python.
#pragma once

#include "common/arguments.h"
#include "losses/call.h"
#include "losses/launch.h"

namespace shike {

// `tensors`: one [K, B, C], or K of [B, C].
inline Experts experts_of(const Value& tensors, const Experts& shape) {
    const int bytes = shape.dtype == DType::kFloat64 ? 8 : shape.dtype == DType::kFloat32 ? 4 : 2;
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

inline CrossEntropyCall cross_entropy_call(Arguments& in, bool saves) {
    CrossEntropyCall call{};
    call.logits = logits_of(in);
    call.target = target_of(in["target"]);
    if (saves) call.saved = in["saved"].memory(2);
    const Value bias = in["bias"];
    if (!bias.is_none()) {
        const Array given = bias.array();
        if (given.dims != 1 && given.dims != 2) {
            bias.refuse("expected 1 or 2 dimensions, got " + std::to_string(given.dims));
        }
        call.bias = given.data;
        call.bias_stride = given.dims == 2 ? given.stride[0] : 0;
    }
    call.label_smoothing = in["label_smoothing"].number();
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

// Contiguous numbers [N] or [K, N].
inline OfExperts of_experts(const Value& values) {
    if (values.is_none()) return {};
    const Array given = values.array();
    if (given.dims > 2) values.refuse("expected at most 2 dimensions, got " + std::to_string(given.dims));
    return {given.data, given.dims == 2 ? given.stride[0] : 0};
}

// Without the weights of rows. `saves`: as above.
inline ExpertCall expert_call(Arguments& in, bool saves) {
    ExpertCall call{};
    call.logits = logits_of(in);
    call.target = labels_of(in["target"]);
    call.target_b = labels_of(in["target_b"]);
    call.lam = of_experts(in["lam"]);
    call.bias = of_experts(in["bias"]);
    call.scale = of_experts(in["scale"]);
    call.margin = of_experts(in["margin"]);
    const Value mask = in["class_mask"];
    call.mask = static_cast<const std::uint8_t*>(mask.memory_or_null(2));
    call.temperature = of_experts(in["temperature"]);
    const Value teacher = in["teacher"];
    call.cross_entropy = in["cross_entropy"].flag();
    call.lam_number = in["lam_number"].number();
    call.scale_number = in["scale_number"].number();
    call.label_smoothing = in["label_smoothing"].number();
    call.of_rows = in["of_rows"].flag();
    call.masked = Masked(in["masked"].integer());
    call.teacher = Teacher(in["teacher_kind"].integer());
    if (!teacher.is_none()) {
        Experts shape = call.logits;
        shape.dtype = in["teacher_dtype"].dtype();
        call.teacher_logits = experts_of(teacher, shape);
    }
    call.temperature_number = in["temperature_number"].number();
    call.by_student = in["by_student"].flag();
    call.gated = in["gated"].flag();
    call.detach = in["detach"].flag();
    call.adjusted = in["adjusted"].flag();
    call.eps = in["eps"].number();
    if (saves) call.saved = in["saved"].memory(3);
    call.weight_number = call.kl_number = 1;
    return call;
}

inline ExpertWeights expert_weights(Arguments& in, const ExpertCall& call) {
    ExpertWeights weights{};
    weights.lam = call.lam;
    weights.lam_number = call.lam_number;
    weights.class_weight = of_experts(in["class_weight"]);
    weights.sample_weight = of_experts(in["sample_weight"]);
    weights.expert_weight = of_experts(in["expert_weight"]);
    weights.reduction = int(in["reduction"].integer());
    weights.kl_weight = of_experts(in["kl_weight"]);
    weights.gate = of_experts(in["gate"]);
    weights.kl_weight_number = in["kl_factor"].number();
    weights.kl_reduction = int(in["kl_reduction"].integer());
    return weights;
}

// With the weights of rows, as the CUDA kernels take them.
inline ExpertCall weighted_expert_call(Arguments& in) {
    ExpertCall call = expert_call(in, true);
    call.rows = in["wants_rows"].flag();
    call.weight_a = of_experts(in["weight_a"]);
    call.weight_b = of_experts(in["weight_b"]);
    call.kl_weight = of_experts(in["kl_weight"]);
    call.weight_number = in["weight_number"].number();
    call.weight_b_number = in["weight_b_number"].number();
    call.kl_number = in["kl_number"].number();
    return call;
}

}  // namespace shike
