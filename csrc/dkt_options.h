// The constants of a row from those of a call.
#pragma once

#include "expert_loss.h"
#include "row_results.h"

namespace shike {
namespace {

// Without the factors of the weights, which lie beside the logits.
template <class T>
inline DktOptions<T> options_of(const DktCall& call) {
    DktOptions<T> options;
    options.inverse_batch = T(1.0 / double(call.logits.batch));
    options.hardest_weight = T(call.hardest_weight);
    options.mutual_weight = T(call.mutual_weight);
    options.teacher_gradient = T(call.detach_teacher ? 0 : 1);
    options.teacher_target_logit = T(call.teacher_target_logit);
    options.student_target_logit = T(call.student_target_logit);
    options.hardest_term = call.hardest_term;
    options.mutual_term = call.mutual_term;
    return options;
}

}  // namespace
}  // namespace shike
