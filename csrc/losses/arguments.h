// The calls of the expert losses from the keyword arguments of Python.
#pragma once

#include "common/arguments.h"
#include "losses/call.h"

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

}  // namespace shike
