// The generalised expert loss on the CPU: the gradients of rows, from what their forward has left.
#pragma once

#include "losses/cpu_expert.h"
#include "losses/cpu_expert_floored.h"

namespace shike {
namespace {

// What the gradient needs of a floored row, in the places of what it does not.
template <class T>
ExpertSaved<T> with_floored(ExpertSaved<T> saved, const FlooredRow<T>& row) {
    saved.kl_pivot = row.pivot;
    saved.slope = row.scale;
    saved.bend = row.log_sum;
    saved.share = row.mean;
    saved.out = row.pull;
    saved.teacher_pivot = row.mass;
    saved.spare = row.weight;
    return saved;
}
template <class T>
FlooredRow<T> floored_of(const ExpertSaved<T>& saved) {
    return {saved.kl_pivot, saved.slope, saved.bend, {0, 0}, {0, 0}, saved.share, saved.teacher_pivot, saved.out, saved.spare};
}

template <class T>
void scale_gradient(const ExpertPlan<T>& plan, int k, std::int64_t c, int count, Vector<T>* tile) {
    const int n = (count + kLanes<T> - 1) / kLanes<T>;
    if (plan.call.scale.data != nullptr) {
        Vector<T> scale[kTile];
        load_of_classes<T>(plan.call.scale, k, c, count, scale, T(1));
        for (int i = 0; i < n; ++i) tile[i] *= scale[i];
    } else if (plan.call.scale_number != 1) {
        for (int i = 0; i < n; ++i) tile[i] *= T(plan.call.scale_number);
    }
}

// Stores a tile of the gradient, of which the mask and the labels are still missing.
template <class T>
SHIKE_SIMD void store_gradient(const ExpertPlan<T>& plan, int k, std::int64_t b, std::int64_t c, int count,
                               const ExpertSaved<T>& row, T grad_output, Vector<T>* tile, const Experts& gradient) {
    const ExpertCall& call = plan.call;
    if (call.mask != nullptr && call.masked != Masked::kPartial) {
        mask_tile<T>(call.mask + b * plan.classes + c, count, tile, T(0));
    }
    const std::int64_t label[2] = {plan.target(k, b), plan.second(k, b)};
    for (int s = 0; s < 2; ++s) {
        const std::int64_t place = label[s] - c;
        if (label[s] < c || place >= count) continue;
        set_class<T>(tile, int(place), grad_output * row.at[s]);
    }
    store_tile<T>(gradient.dtype, gradient.expert[k], b, c, count, tile, 1);
}

// The gradient of one expert's row where there is no divergence. `kept`: its exponentials; null: they are made again.
template <class T>
void gradient_of_plain_row(const ExpertPlan<T>& plan, int k, std::int64_t b, const ExpertSaved<T>& row, T grad_output,
                           const Vector<T>* kept, const Experts& gradient) {
    using V = Vector<T>;
    const V p_scale = V{} + grad_output * row.p_scale, everywhere = V{} + grad_output * row.everywhere;
    const V pivot = V{} + row.pivot;
    for (std::int64_t c = 0; c < plan.classes; c += plan.kStep) {
        const int count = smaller(plan.classes - c, plan.kStep), n = (count + kLanes<T> - 1) / kLanes<T>;
        V tile[kTile];
        if (kept == nullptr) {
            load_row_logits<T>(plan, plan.call.logits, k, b, b, c, count, true, tile);
            for (int i = 0; i < n; ++i) tile[i] = p_scale * exponential(tile[i] - pivot) - everywhere;
        } else {
            const V* e = kept + c / kLanes<T>;
            for (int i = 0; i < n; ++i) tile[i] = p_scale * e[i] - everywhere;
        }
        scale_gradient<T>(plan, k, c, count, tile);
        store_gradient<T>(plan, k, b, c, count, row, grad_output, tile, gradient);
    }
}

// The gradient of one sample's row with a divergence, from its arrays. `grad_output`: [experts].
template <class T>
void gradient_of_row(const ExpertPlan<T>& plan, const ExpertArrays<T>& arrays, std::int64_t b,
                     const ExpertSaved<T>* saved, const T* grad_output, const Experts& gradient) {
    using V = Vector<T>;
    const ExpertCall& call = plan.call;
    const int experts = plan.experts();
    const bool others = call.teacher == Teacher::kOthers && !plan.floored, bends = others && !call.detach;
    FlooredRow<T> floored[kMaxExperts];
    T weight[kMaxExperts] = {};
    T pivot[kMaxExperts] = {}, out[kMaxExperts] = {}, students = 0;
    for (int i = 0; i < experts; ++i) {
        if (plan.floored) {
            floored[i] = floored_of(saved[i]);
            weight[i] = floored[i].weight;
        }
        pivot[i] = saved[i].kl_pivot;
        out[i] = saved[i].out;
        students += out[i];
    }
    for (std::int64_t c = 0; c < plan.classes; c += plan.kStep) {
        const int count = smaller(plan.classes - c, plan.kStep), n = (count + kLanes<T> - 1) / kLanes<T>;
        const std::int64_t first = c / kLanes<T>;
        V total[kTile], shares[kTile];
        if (bends) weighted_logits<T>(plan, arrays, first, n, pivot, out, total);
        if (others) {
            for (int i = 0; i < n; ++i) shares[i] = V{};
            for (int k = 0; k < experts; ++k) {
                const V* f = arrays.f(k) + first;
                const V share = V{} + saved[k].share * grad_output[k];
                for (int i = 0; i < n; ++i) shares[i] += share * f[i];
            }
        }
        V of_floored[kTile][kMaxExperts];
        if (plan.floored) {
            for (int i = 0; i < n; ++i) {
                FlooredClass<V> classes;
                floored_tile<T>(plan, arrays, floored, first + i, weight, classes);
                const V in = counted<T>(plan, b, first + i);
                for (int k = 0; k < experts; ++k) {
                    of_floored[i][k] = floored_gradient<T, V>(plan, floored[k], classes, k, in, weight);
                }
            }
        }
        for (int k = 0; k < experts; ++k) {
            const ExpertSaved<T>& row = saved[k];
            const T g = grad_output[k];
            V result[kTile] = {}, of_divergence[kTile];
            if (call.cross_entropy) {
                const V* e = arrays.e(k) + first;
                const V p_scale = V{} + g * row.p_scale, everywhere = V{} + g * row.everywhere;
                for (int i = 0; i < n; ++i) result[i] = p_scale * e[i] - everywhere;
            }
            const V *f = arrays.f(k) + first, *d = arrays.d(k) + first;
            const V slope = V{} + g * row.slope, floor = all<V>(kAbsent), pivot_of = V{} + row.kl_pivot;
            const V bend = V{} + g * row.bend, out_of = V{} + row.out;
            if (plan.floored) {
                for (int i = 0; i < n; ++i) of_divergence[i] = g * of_floored[i][k];
            } else if (others) {
                for (int i = 0; i < n; ++i) {
                    V factor = slope;
                    if (bends) factor += bend * (students * (larger(d[i], floor) - pivot_of) - total[i]);
                    of_divergence[i] = f[i] * factor - out_of * shares[i];
                }
            } else {
                const V* t = arrays.g(plan.teacher_of_each ? k : 0) + first;
                const bool taught = plan.teacher_row(b) >= 0;
                const V share = V{} + g * row.share;
                for (int i = 0; i < n; ++i) of_divergence[i] = taught ? slope * f[i] - share * t[i] : V{};
            }
            if (plan.apart) {
                scale_gradient<T>(plan, k, c, count, result);
                cool<T>(plan, c, count, of_divergence);
                if (call.adjusted) scale_gradient<T>(plan, k, c, count, of_divergence);
                for (int i = 0; i < n; ++i) result[i] += of_divergence[i];
            } else {
                for (int i = 0; i < n; ++i) result[i] += of_divergence[i];
                scale_gradient<T>(plan, k, c, count, result);
            }
            store_gradient<T>(plan, k, b, c, count, row, g, result, gradient);
        }
    }
}

}  // namespace
}  // namespace shike
