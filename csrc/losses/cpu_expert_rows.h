// The generalised expert loss on the CPU: the ends of a block's rows, their gradients, and the three passes over a
// range of rows.
#pragma once

#include "losses/cpu_expert.h"
#include "losses/cpu_expert_floored.h"

namespace shike {
namespace {

// Fills the arrays of the experts [first_expert, first_expert + experts) of one sample, and its lane of the block.
template <class T>
void make_arrays(const ExpertPlan<T>& plan, const ExpertArrays<T>& arrays, int first_expert, int experts,
                 std::int64_t b, int lane, ExpertBlock<T>& block, FlooredRow<T>* floored) {
    using V = Vector<T>;
    const ExpertCall& call = plan.call;
    T pivot_of[kMaxExperts];
    for (int i = 0; i < experts; ++i) {
        const int k = first_expert + i;
        const std::int64_t y = plan.target(k, b), y_b = plan.second(k, b);
        Softmax<T> softmax;
        T linear = 0;
        V* x = arrays.x(i);
        if (call.cross_entropy || !plan.apart || plan.wants_correct) {
            const bool adjusted = call.cross_entropy || call.adjusted;
            make_logits<T>(plan, x, y, y_b, softmax, [&](std::int64_t c, int count, V* tile) {
                load_row_logits<T>(plan, call.logits, k, b, b, c, count, adjusted, tile);
            });
            if (plan.wants_correct) {
                block.correct[i][lane] =
                    is_answer<T>(x, plan.classes, y, softmax.at[0], y_b, softmax.at[1]) ? T(1) : T(0);
            }
            if (call.label_smoothing != 0) linear = linear_sum<T>(plan, x, softmax.pivot);
            make_exponentials<T>(plan, x, arrays.e(i), softmax);
        }
        block.sums[i].pivot[lane] = softmax.pivot;
        block.sums[i].sum[lane] = softmax.sum;
        block.sums[i].linear[lane] = linear;
        for (int s = 0; s < 2; ++s) block.x_at[i][s][lane] = softmax.at[s];
        if (!plan.divergence) continue;
        if (plan.apart) {
            softmax = Softmax<T>{};
            make_logits<T>(plan, arrays.d(i), y, y_b, softmax, [&](std::int64_t c, int count, V* tile) {
                load_row_logits<T>(plan, call.logits, k, b, b, c, count, call.adjusted, tile);
                cool<T>(plan, c, count, tile);
            });
            make_exponentials<T>(plan, arrays.d(i), arrays.f(i), softmax);
        }
        pivot_of[i] = softmax.pivot;
        block.d_pivot[i][lane] = softmax.pivot;
        block.d_sum[i][lane] = softmax.sum;
        for (int s = 0; s < 2; ++s) block.d_at[i][s][lane] = capped(softmax.at[s]);
    }
    if (!plan.divergence) return;
    if (plan.floored) {
        floored_sums<T>(plan, arrays, b, lane, block, floored);
    } else if (call.teacher == Teacher::kOthers) {
        cross_of_others<T>(plan, arrays, b, lane, pivot_of, block);
    } else {
        make_teachers<T>(plan, arrays, b, lane, pivot_of, block);
    }
}

// Where the results of rows go.
template <class T>
struct ExpertResults {
    double* terms;  // [B, 2]: cross-entropy and divergence, weighted
    T* loss;        // [K, B], or null
    T* rows;        // [4, K, B], or null
};

template <class T>
void end_divergence(const ExpertPlan<T>& plan, const ExpertBlock<T>& block, std::int64_t first_row, int rows,
                    const bool* present, DivergenceEnd<Vector<T>>* ends) {
    using V = Vector<T>;
    const ExpertCall& call = plan.call;
    const int experts = plan.experts();
    SoftmaxEnd<V> softmax[kMaxExperts];
    V weight[kMaxExperts] = {}, one[kMaxExperts];
    for (int k = 0; k < experts; ++k) {
        softmax[k] = end_softmax(block.d_pivot[k], block.d_sum[k], block.d_at[k][0], block.d_at[k][1]);
        one[k] = V{} + T(1);
        for (int lane = 0; lane < rows; ++lane) {
            const std::int64_t b = first_row + lane;
            if (plan.teacher_row(b) < 0) continue;
            weight[k][lane] = kl_weight<T>(plan, k, b) * (call.gated ? block.correct[k][lane] : T(1));
        }
    }
    if (call.teacher == Teacher::kOthers) {
        const V *teacher = call.by_student ? one : weight, *student = call.by_student ? weight : one;
        OthersSums<V> sums{};
        for (int k = 0; k < experts; ++k) add(sums, of_others(softmax[k], teacher[k], student[k]));
        for (int k = 0; k < experts; ++k) {
            ends[k] = end_others(sums, softmax[k], block.cross[k], teacher[k], student[k], !call.detach, present);
        }
        return;
    }
    for (int k = 0; k < experts; ++k) {
        const int t = plan.teacher_of_each ? k : 0;
        const SoftmaxEnd<V> teacher = end_softmax(block.u_pivot[t], block.u_sum[t], block.u_at[t][0], block.u_at[t][1]);
        ends[k] = end_teacher(teacher, softmax[k], block.cross[k], weight[k], present);
    }
}

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

// `floored`: [lane][kMaxExperts]
template <class T>
void end_floored(const ExpertPlan<T>& plan, std::int64_t first_row, int rows, const FlooredRow<T>* floored,
                 DivergenceEnd<Vector<T>>* ends) {
    const int experts = plan.experts();
    for (int lane = 0; lane < rows; ++lane) {
        const FlooredRow<T>* of_row = floored + lane * kMaxExperts;
        const std::int64_t b = first_row + lane, labels[2] = {plan.target(0, b), plan.second(0, b)};
        T weight[kMaxExperts];
        for (int k = 0; k < experts; ++k) {
            weight[k] = of_row[k].weight;
            ends[k].of_row[lane] = of_row[k].weight * of_row[k].mean;
        }
        for (int s = 0; s < 2; ++s) {
            if (labels[s] < 0) continue;
            const FlooredClass<T> label = floored_label<T>(plan, of_row, s, weight);
            for (int k = 0; k < experts; ++k) {
                ends[k].at[s][lane] =
                    floored_gradient<T, T>(plan, of_row[k], label, k, counts<T>(plan, b, labels[s]), weight);
            }
        }
    }
}

// Ends the rows of a block, a lane each, of the experts [first_expert, first_expert + experts); saved: [lane][expert].
template <class T>
void end_block(const ExpertPlan<T>& plan, const ExpertBlock<T>& block, int first_expert, int experts,
               std::int64_t first_row, int rows, const FlooredRow<T>* floored, const ExpertResults<T>& results,
               ExpertSaved<T>* saved) {
    using V = Vector<T>;
    const ExpertCall& call = plan.call;
    const std::int64_t batch = call.logits.batch;
    ExpertSaved<V> ends[kMaxExperts];
    CrossEntropyEnd<V> cross_entropy[kMaxExperts];
    Labels<V> labels[kMaxExperts];
    V of_scale[kMaxExperts][2], of_divergence[kMaxExperts][2];  // d(row logit) / dz and d(divergence logit) / dz
    const bool present[2] = {call.target.data != nullptr, call.target_b.data != nullptr};
    for (int i = 0; i < experts; ++i) {
        const int k = first_expert + i;
        Labels<V>& row = labels[i];
        row = {block.x_at[i][0], block.x_at[i][1], V{}, V{}, V{}, V{}};
        for (int s = 0; s < 2; ++s) of_scale[i][s] = of_divergence[i][s] = V{} + T(1);
        for (int lane = 0; lane < rows; ++lane) {
            const std::int64_t b = first_row + lane;
            const std::int64_t label[2] = {plan.target(k, b), plan.second(k, b)};
            if (call.cross_entropy) {
                row.weight_a[lane] = number_of<T>(call.weight_a, k, b, T(call.weight_number));
                const T second = present[1] ? number_of<T>(call.weight_b, k, b, T(0)) : T(0);
                (label[1] < 0 ? row.weight_a : row.weight_b)[lane] += second;
                if (label[0] >= 0) row.margin_a[lane] = number_of<T>(call.margin, k, label[0], T(0));
                if (label[1] >= 0) row.margin_b[lane] = number_of<T>(call.margin, k, label[1], T(0));
            }
            for (int s = 0; s < 2; ++s) {
                if (label[s] < 0) continue;
                const T scale = number_of<T>(call.scale, k, label[s], T(call.scale_number));
                of_scale[i][s][lane] = scale;
                if (!plan.divergence) continue;
                of_divergence[i][s][lane] =
                    (call.adjusted ? scale : T(1)) /
                    number_of<T>(call.temperature, 0, label[s], T(call.temperature_number));
            }
        }
        ExpertSaved<V>& end = ends[i];
        end = ExpertSaved<V>{};
        end.pivot = block.sums[i].pivot;
        if (!call.cross_entropy) continue;
        cross_entropy[i] = end_cross_entropy(block.sums[i], row, present[1], call.margin.data != nullptr,
                                             T(call.label_smoothing), T(plan.classes));
        end.p_scale = cross_entropy[i].p_scale;
        end.everywhere = cross_entropy[i].everywhere;
        end.at[0] = cross_entropy[i].at_a * of_scale[i][0];
        end.at[1] = cross_entropy[i].at_b * of_scale[i][1];
    }
    DivergenceEnd<V> divergence[kMaxExperts] = {};
    if (plan.floored) {
        end_floored<T>(plan, first_row, rows, floored, divergence);
        for (int k = 0; k < experts; ++k) {
            for (int s = 0; s < 2; ++s) ends[k].at[s] += divergence[k].at[s] * of_divergence[k][s];
        }
    } else if (plan.divergence) {
        end_divergence<T>(plan, block, first_row, rows, present, divergence);
        for (int k = 0; k < experts; ++k) {
            ends[k].kl_pivot = block.d_pivot[k];
            ends[k].slope = divergence[k].slope;
            ends[k].bend = divergence[k].bend;
            ends[k].share = divergence[k].share;
            ends[k].out = divergence[k].out;
            if (plan.teacher) ends[k].teacher_pivot = block.u_pivot[plan.teacher_of_each ? k : 0];
            for (int s = 0; s < 2; ++s) ends[k].at[s] += divergence[k].at[s] * of_divergence[k][s];
        }
    }
    for (int i = 0; i < experts; ++i) {
        const int k = first_expert + i;
        for (int lane = 0; lane < rows; ++lane) {
            const std::int64_t b = first_row + lane;
            ExpertSaved<T>& of_row = saved[lane * experts + i];
            get_lane<T>(ends[i], lane, of_row);
            if (plan.floored) of_row = with_floored(of_row, floored[lane * kMaxExperts + i]);
            results.terms[2 * b + 1] += plan.divergence ? double(divergence[i].of_row[lane]) : 0.0;
            if (!call.cross_entropy) continue;
            const T loss_a = cross_entropy[i].loss_a[lane], loss_b = cross_entropy[i].loss_b[lane];
            const T weight_b = labels[i].weight_b[lane];
            // 0 times infinity would be NaN: a row without weight adds nothing
            const T weighted = labels[i].weight_a[lane] * loss_a + (weight_b == 0 ? T(0) : weight_b * loss_b);
            results.terms[2 * b] += double(weighted);
            if (results.loss != nullptr) results.loss[k * batch + b] = weighted;
            if (results.rows == nullptr) continue;
            const T lam = call.target_b.data == nullptr ? T(1) : number_of<T>(call.lam, 0, b, T(call.lam_number));
            T* to = results.rows + k * batch + b;
            to[0] = lam == 1 ? loss_a : lam * loss_a + (1 - lam) * loss_b;
            to[call.logits.count * batch] = cross_entropy[i].log_sum[lane];
            to[2 * call.logits.count * batch] = block.correct[i][lane];
            to[3 * call.logits.count * batch] = cross_entropy[i].p_target[lane];
        }
    }
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

// The gradient of one sample's row, from its arrays. `grad_output`: [experts].
template <class T>
void gradient_of_row(const ExpertPlan<T>& plan, const ExpertArrays<T>& arrays, int first_expert, int experts,
                     std::int64_t b, const ExpertSaved<T>* saved, const T* grad_output, const Experts& gradient) {
    using V = Vector<T>;
    const ExpertCall& call = plan.call;
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
        for (int at = 0; at < experts; ++at) {
            const int k = first_expert + at;
            const ExpertSaved<T>& row = saved[at];
            const T g = grad_output[at];
            V result[kTile], of_divergence[kTile];
            if (call.cross_entropy) {
                const V* e = arrays.e(at) + first;
                const V p_scale = V{} + g * row.p_scale, everywhere = V{} + g * row.everywhere;
                for (int i = 0; i < n; ++i) result[i] = p_scale * e[i] - everywhere;
            } else {
                for (int i = 0; i < n; ++i) result[i] = V{};
            }
            if (plan.divergence) {
                const V *f = arrays.f(at) + first, *d = arrays.d(at) + first;
                const V slope = V{} + g * row.slope, floor = all<V>(kAbsent), pivot_of = V{} + row.kl_pivot;
                const V bend = V{} + g * row.bend, out_of = V{} + row.out;
                if (plan.floored) {
                    for (int i = 0; i < n; ++i) of_divergence[i] = g * of_floored[i][at];
                } else if (others) {
                    for (int i = 0; i < n; ++i) {
                        V factor = slope;
                        if (bends) factor += bend * (students * (larger(d[i], floor) - pivot_of) - total[i]);
                        of_divergence[i] = f[i] * factor - out_of * shares[i];
                    }
                } else {
                    const V* t = arrays.g(plan.teacher_of_each ? at : 0) + first;
                    const bool taught = plan.teacher_row(b) >= 0;
                    const V share = V{} + g * row.share;
                    for (int i = 0; i < n; ++i) of_divergence[i] = taught ? slope * f[i] - share * t[i] : V{};
                }
                if (!plan.apart) {
                    for (int i = 0; i < n; ++i) result[i] += of_divergence[i];
                }
            }
            scale_gradient<T>(plan, k, c, count, result);
            if (plan.divergence && plan.apart) {
                cool<T>(plan, c, count, of_divergence);
                if (call.adjusted) scale_gradient<T>(plan, k, c, count, of_divergence);
                for (int i = 0; i < n; ++i) result[i] += of_divergence[i];
            }
            if (call.mask != nullptr && call.masked != Masked::kPartial) {
                mask_tile<T>(call.mask + b * plan.classes + c, count, result, T(0));
            }
            const std::int64_t label[2] = {plan.target(k, b), plan.second(k, b)};
            for (int s = 0; s < 2; ++s) {
                const std::int64_t place = label[s] - c;
                if (label[s] < c || place >= count) continue;
                result[place / kLanes<T>][place % kLanes<T>] = g * row.at[s];
            }
            store_tile<T>(gradient.dtype, gradient.expert[k], b, c, count, result, 1);
        }
    }
}

// Room for the arrays of some rows, of one expert or all.
template <class T>
struct ExpertRoom {
    std::int64_t of_row;  // vectors
    int rows;
    std::unique_ptr<Vector<T>[]> memory;

    ExpertRoom(const ExpertPlan<T>& plan, int experts, bool keep)
        : of_row(ExpertArrays<T>::vectors(plan, experts)), rows(kLanes<T>) {
        constexpr std::int64_t kRoom = 192 * 1024 / sizeof(Vector<T>);  // a part of a second-level cache
        if (keep) rows = std::max(1, smaller(kRoom / of_row, rows));
        memory.reset(new Vector<T>[std::size_t(of_row * (keep ? rows : 1))]);  // not initialised
    }
};

// Calls end(first row, rows, first expert, experts, arrays of a row, saved) for blocks of rows that are ended.
template <class T, class Done>
void over_blocks(const ExpertPlan<T>& plan, std::int64_t first_row, std::int64_t last_row, bool keep,
                 const ExpertResults<T>& results, const Done& done) {
    const int together = plan.divergence ? plan.experts() : 1;
    const ExpertRoom<T> room(plan, together, keep);
    ExpertBlock<T> block;
    std::memset(static_cast<void*>(&block), 0, sizeof(block));
    ExpertSaved<T> saved[kLanes<T> * kMaxExperts];
    FlooredRow<T> floored[kLanes<T> * kMaxExperts];
    const auto arrays_of = [&](int lane) {
        return ExpertArrays<T>(plan, room.memory.get() + (keep ? lane * room.of_row : 0));
    };
    for (std::int64_t first = first_row; first < last_row; first += room.rows) {
        const int rows = smaller(last_row - first, room.rows);
        std::fill(results.terms + 2 * first, results.terms + 2 * (first + rows), 0.0);
        for (int k = 0; k < plan.experts(); k += together) {
            for (int lane = 0; lane < rows; ++lane) {
                make_arrays<T>(plan, arrays_of(lane), k, together, first + lane, lane, block, floored + lane * kMaxExperts);
            }
            end_block<T>(plan, block, k, together, first, rows, floored, results, saved);
            for (int lane = 0; lane < rows; ++lane) {
                done(first + lane, k, together, arrays_of(lane), saved + lane * together);
            }
        }
    }
}

template <class T>
void expert_forward(const ExpertCall& call, const ExpertOutputs& outputs, std::int64_t first, std::int64_t last) {
    const ExpertPlan<T> plan(call);
    const int experts = plan.experts();
    const ExpertResults<T> results{outputs.terms, static_cast<T*>(outputs.loss), static_cast<T*>(outputs.rows)};
    over_blocks<T>(plan, first, last, false, results,
                   [&](std::int64_t b, int k, int count, const ExpertArrays<T>&, const ExpertSaved<T>* saved) {
                       std::memcpy(static_cast<T*>(call.saved) + (b * experts + k) * kExpertSaved, saved,
                                   std::size_t(count) * sizeof(ExpertSaved<T>));
                   });
}

// `grad_output`: one number, or [K, B].
template <class T>
void expert_backward(const ExpertCall& call, const Experts& gradient, const void* grad_output, std::int64_t first,
                     std::int64_t last) {
    const ExpertPlan<T> plan(call);
    const int experts = plan.experts(), together = plan.divergence ? experts : 1;
    const ExpertRoom<T> room(plan, together, false);
    const ExpertArrays<T> arrays(plan, room.memory.get());
    ExpertBlock<T> block;
    FlooredRow<T> floored[kMaxExperts];
    const T* grad = static_cast<const T*>(grad_output);
    for (std::int64_t b = first; b < last; ++b) {
        for (int k = 0; k < experts; k += together) {
            T of_experts[kMaxExperts];
            for (int i = 0; i < together; ++i) of_experts[i] = grad[call.of_rows ? (k + i) * call.logits.batch + b : 0];
            make_arrays<T>(plan, arrays, k, together, b, 0, block, floored);
            const auto* saved = reinterpret_cast<const ExpertSaved<T>*>(static_cast<const T*>(call.saved) +
                                                                        (b * experts + k) * kExpertSaved);
            gradient_of_row<T>(plan, arrays, k, together, b, saved, of_experts, gradient);
        }
    }
}

// Forward and backward for a grad_output of 1; nothing is saved.
template <class T>
void expert_both(const ExpertCall& call, const Experts& gradient, const ExpertOutputs& outputs, std::int64_t first,
                 std::int64_t last) {
    const ExpertPlan<T> plan(call);
    const ExpertResults<T> results{outputs.terms, static_cast<T*>(outputs.loss), static_cast<T*>(outputs.rows)};
    T ones[kMaxExperts];
    std::fill(ones, ones + kMaxExperts, T(1));
    over_blocks<T>(plan, first, last, true, results,
                   [&](std::int64_t b, int k, int count, const ExpertArrays<T>& arrays, const ExpertSaved<T>* saved) {
                       gradient_of_row<T>(plan, arrays, k, count, b, saved, ones, gradient);
                   });
}

}  // namespace
}  // namespace shike
