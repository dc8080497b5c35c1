// The constants of a row from those of a call.
#pragma once

#include "common/macros.h"
#include "losses/call.h"

namespace shike {
namespace {

template <class T>
struct DktOptions {
    T inverse_batch;         // 1 / B
    T hardest_weight;        // w
    T mutual_weight;         // v
    T teacher_gradient;      // 1, or 0 where the teachers are detached
    T teacher_target_logit;  // r[y]
    T student_target_logit;  // replaces z_k[y] in the student
    bool hardest_term;       // w != 0
    bool mutual_term;        // v != 0
};

// Without the factors of the weights, which may be in the memory of a device.
template <class T>
DktOptions<T> options_of(const DktCall& call) {
    DktOptions<T> options;
    options.inverse_batch = T(1.0 / double(call.logits.batch));
    options.hardest_weight = T(call.hardest_weight);
    options.mutual_weight = T(call.mutual_weight);
    options.teacher_gradient = T(call.detach_teacher ? 0 : 1);
    options.teacher_target_logit = T(call.teacher_target_logit);
    options.student_target_logit = T(call.student_target_logit);
    options.hardest_term = call.hardest_weight != 0;
    options.mutual_term = call.mutual_weight != 0;
    return options;
}

template <class T>
SHIKE_HD DktOptions<T> with_factors(DktOptions<T> options, const DktCall& call) {
    if (call.factors != nullptr) {
        options.hardest_weight = T(call.hardest_weight * call.factors[0]);
        options.mutual_weight = T(call.mutual_weight * call.factors[1]);
    }
    return options;
}

}  // namespace
}  // namespace shike
