// Divergences of experts with a constant within the logarithm of a student, log(p + eps), or over some of the classes
// only. With teachers j, students k, the classes S that count, and n = K - 1:
//
//   L = sum_j w_j A_j,   A_j = sum_S p_j (n log p_j - sum_{k != j} log(p_k + eps))
//   dL / dd_k = w_k p_k ([S] (n log p_k - sum_{i != k} log(p_i + eps) + n) - A_k - n sum_S p_k)   through the teacher
//             + p_k sum_S s_k r_k - [S] s_k r_k,    s_k = sum_{j != k} w_j p_j,   r_k = p_k / (p_k + eps)
#pragma once

#include "losses/cpu_expert.h"

namespace shike {
namespace {

// The classes of a tile, or one class, in the eyes of every expert.
template <class V>
struct FlooredClass {
    V p[kMaxExperts], log_p[kMaxExperts], floored[kMaxExperts];
    V of_all, taught;  // sum_k log(p_k + eps) and sum_j w_j p_j

    template <class T>
    SHIKE_SIMD void finish(int experts, T eps, const T* weight) {
        of_all = taught = V{};
        for (int k = 0; k < experts; ++k) {
            floored[k] = eps > 0 ? logarithm(V(p[k] + eps)) : log_p[k];
            of_all += floored[k];
            taught += weight[k] * p[k];
        }
    }
    SHIKE_SIMD V apart(int k, int others) const { return log_p[k] * float(others) - (of_all - floored[k]); }
    template <class T>
    SHIKE_SIMD V pull(int k, T eps, const T* weight) const {
        const V of_others = taught - weight[k] * p[k];
        return eps > 0 ? of_others * (p[k] / (p[k] + eps)) : of_others;
    }
};

// What is kept of a row's expert for the gradient.
template <class T>
struct FlooredRow {
    T pivot, scale, log_sum;  // p = scale exp(d - pivot), log p = d - pivot - log_sum
    T p[2], log_p[2];         // at the labels
    T mean, mass, pull;       // A, sum_S p and sum_S s r
    T weight;
};

template <class T>
SHIKE_SIMD void floored_tile(const ExpertPlan<T>& plan, const ExpertArrays<T>& arrays, const FlooredRow<T>* rows,
                             std::int64_t i, const T* weight, FlooredClass<Vector<T>>& classes) {
    using V = Vector<T>;
    for (int k = 0; k < plan.experts(); ++k) {
        classes.p[k] = rows[k].scale * arrays.f(k)[i];
        classes.log_p[k] = larger(arrays.d(k)[i], all<V>(kAbsent)) - (rows[k].pivot + rows[k].log_sum);
    }
    classes.finish(plan.experts(), T(plan.call.eps), weight);
}

// The one class that is a label.
template <class T>
FlooredClass<T> floored_label(const ExpertPlan<T>& plan, const FlooredRow<T>* rows, int s, const T* weight) {
    FlooredClass<T> label{};
    for (int k = 0; k < plan.experts(); ++k) {
        label.p[k] = rows[k].p[s];
        label.log_p[k] = rows[k].log_p[s];
    }
    label.finish(plan.experts(), T(plan.call.eps), weight);
    return label;
}

// 1 where a class counts, else 0.
template <class T>
SHIKE_SIMD Vector<T> counted(const ExpertPlan<T>& plan, std::int64_t b, std::int64_t i) {
    const Vector<T> one = Vector<T>{} + T(1);
    if (plan.call.masked != Masked::kPartial) return one;  // beyond the row p is 0
    const std::int64_t first = i * kLanes<T>;
    const Mask<T> in = kept<T>(plan.call.mask + b * plan.classes + first, smaller(plan.classes - first, kLanes<T>));
    return in ? one : Vector<T>{};
}
template <class T>
T counts(const ExpertPlan<T>& plan, std::int64_t b, std::int64_t c) {
    return plan.call.masked != Masked::kPartial || plan.call.mask[b * plan.classes + c] != 0 ? T(1) : T(0);
}

// Ends the softmaxes of a row, and adds up what the gradient needs.
template <class T>
void floored_sums(const ExpertPlan<T>& plan, const ExpertArrays<T>& arrays, std::int64_t b, int lane,
                  const ExpertBlock<T>& block, FlooredRow<T>* rows) {
    using V = Vector<T>;
    const int experts = plan.experts();
    T weight[kMaxExperts];
    V mean[kMaxExperts] = {}, mass[kMaxExperts] = {}, pull[kMaxExperts] = {};
    for (int k = 0; k < experts; ++k) {
        const SoftmaxEnd<T> end = end_softmax(T(block.d_pivot[k][lane]), T(block.d_sum[k][lane]),
                                              T(block.d_at[k][0][lane]), T(block.d_at[k][1][lane]));
        weight[k] = kl_weight<T>(plan, k, b);
        rows[k] = {T(block.d_pivot[k][lane]), end.scale, end.log_sum, {end.p[0], end.p[1]}, {end.log_p[0], end.log_p[1]},
                   0, 0, 0, weight[k]};
    }
    for (std::int64_t i = 0; i < quotient_up(plan.classes, kLanes<T>); ++i) {
        FlooredClass<V> classes;
        floored_tile<T>(plan, arrays, rows, i, weight, classes);
        const V in = counted<T>(plan, b, i);
        for (int k = 0; k < experts; ++k) {
            const V p = classes.p[k] * in;
            mass[k] += p;
            mean[k] += p * classes.apart(k, experts - 1);
            pull[k] += in * classes.pull(k, T(plan.call.eps), weight);
        }
    }
    for (int k = 0; k < experts; ++k) {
        rows[k].mean = lane_sum<T>(mean[k]);
        rows[k].mass = lane_sum<T>(mass[k]);
        rows[k].pull = lane_sum<T>(pull[k]);
    }
    const std::int64_t labels[2] = {plan.target(0, b), plan.second(0, b)};
    for (int s = 0; s < 2; ++s) {
        if (labels[s] < 0) continue;
        const FlooredClass<T> label = floored_label<T>(plan, rows, s, weight);
        const T in = counts<T>(plan, b, labels[s]);
        for (int k = 0; k < experts; ++k) {
            rows[k].mass += in * label.p[k];
            rows[k].mean += label.p[k] > 0 ? in * label.p[k] * label.apart(k, experts - 1) : T(0);
            rows[k].pull += in * label.pull(k, T(plan.call.eps), weight);
        }
    }
}

// d(divergence) / dd_k of some classes.
template <class T, class V>
SHIKE_SIMD V floored_gradient(const ExpertPlan<T>& plan, const FlooredRow<T>& row, const FlooredClass<V>& classes, int k,
                              V in, const T* weight) {
    const int others = plan.experts() - 1;
    V gradient = classes.p[k] * row.pull - in * classes.pull(k, T(plan.call.eps), weight);
    if (!plan.call.detach) {
        const T mean = row.mean + T(others) * row.mass;
        gradient += row.weight * classes.p[k] * (in * (classes.apart(k, others) + float(others)) - mean);
    }
    return gradient;
}

}  // namespace
}  // namespace shike
