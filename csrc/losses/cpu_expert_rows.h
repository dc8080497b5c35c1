// The generalised expert loss on the CPU: the ends of a block's rows, and the three passes over a range of rows.
#pragma once

#include "losses/cpu_expert_gradient.h"

namespace shike {
namespace {

// Makes the logits of the experts [first_expert, first_expert + experts) of one sample, and its lane of the block.
template <class T>
void make_logits_of_row(const ExpertPlan<T>& plan, const ExpertArrays<T>& arrays, int first_expert, int experts,
                        std::int64_t b, int lane, ExpertBlock<T>& block) {
    const ExpertCall& call = plan.call;
    for (int i = 0; i < experts; ++i) {
        const int k = first_expert + i;
        const std::int64_t y = plan.target(k, b), y_b = plan.second(k, b);
        Softmax<T> softmax;
        T linear = 0;
        if (plan.row_logits) {
            const bool adjusted = call.cross_entropy || call.adjusted;
            softmax = make_logits<T>(plan, arrays.x(i), y, y_b, [&](std::int64_t c, int count, Vector<T>* tile) {
                load_row_logits<T>(plan, call.logits, k, b, b, c, count, adjusted, tile);
            });
            if (plan.wants_correct) {
                const bool right = is_answer<T>(arrays.x(i), plan.classes, y, softmax.at[0], y_b, softmax.at[1]);
                block.correct[i][lane] = right ? T(1) : T(0);
            }
            if (call.label_smoothing != 0) linear = linear_sum<T>(plan, arrays.x(i), softmax.pivot);
        }
        block.sums[i].pivot[lane] = softmax.pivot;
        block.sums[i].linear[lane] = linear;
        for (int s = 0; s < 2; ++s) block.x_at[i][s][lane] = softmax.at[s];
        if (!plan.divergence) continue;
        if (plan.apart) {
            softmax = make_logits<T>(plan, arrays.d(i), y, y_b, [&](std::int64_t c, int count, Vector<T>* tile) {
                load_row_logits<T>(plan, call.logits, k, b, b, c, count, call.adjusted, tile);
                cool<T>(plan, c, count, tile);
            });
        }
        block.d_pivot[i][lane] = softmax.pivot;
        for (int s = 0; s < 2; ++s) block.d_at[i][s][lane] = capped(softmax.at[s]);
    }
}

// Makes their exponentials. Apart from the logits, so that a processor works on the short rows of a block side by side.
template <class T>
void make_exponentials_of_row(const ExpertPlan<T>& plan, const ExpertArrays<T>& arrays, int experts, int lane,
                              ExpertBlock<T>& block) {
    for (int i = 0; i < experts; ++i) {
        T sum = 0;
        if (plan.row_logits) sum = make_exponentials<T>(plan, arrays.x(i), arrays.e(i), block.sums[i].pivot[lane]);
        block.sums[i].sum[lane] = sum;
        if (plan.apart) sum = make_exponentials<T>(plan, arrays.d(i), arrays.f(i), block.d_pivot[i][lane]);
        block.d_sum[i][lane] = sum;
    }
}

// What the classes of a divergence add up to, from the exponentials of all experts.
template <class T>
void add_up_divergence(const ExpertPlan<T>& plan, const ExpertArrays<T>& arrays, std::int64_t b, int lane,
                       ExpertBlock<T>& block, FlooredRow<T>* floored) {
    T pivot[kMaxExperts];
    for (int k = 0; k < plan.experts(); ++k) pivot[k] = block.d_pivot[k][lane];
    if (plan.floored) {
        floored_sums<T>(plan, arrays, b, lane, block, floored);
    } else if (plan.call.teacher == Teacher::kOthers) {
        cross_of_others<T>(plan, arrays, b, lane, pivot, block);
    } else {
        make_teachers<T>(plan, arrays, b, lane, pivot, block);
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

// Room for the arrays of a block's rows, of one expert or all.
template <class T>
struct ExpertRoom {
    std::int64_t of_row;  // vectors
    int rows;
    std::unique_ptr<Vector<T>[]> memory;

    ExpertRoom(const ExpertPlan<T>& plan, int experts, int most) : of_row(ExpertArrays<T>::vectors(plan, experts)) {
        constexpr std::int64_t kRoom = 192 * 1024 / sizeof(Vector<T>);  // a part of a second-level cache
        rows = std::max(1, smaller(kRoom / of_row, most));
        memory.reset(new Vector<T>[std::size_t(of_row * rows)]);  // not initialised
    }

    ExpertArrays<T> arrays(const ExpertPlan<T>& plan, int row) const { return {plan, memory.get() + row * of_row}; }
};

// Calls done(row, first expert, experts, arrays of the row, saved) for the rows of blocks that are ended.
template <class T, class Done>
void over_blocks(const ExpertPlan<T>& plan, std::int64_t first_row, std::int64_t last_row,
                 const ExpertResults<T>& results, const Done& done) {
    const int together = plan.divergence ? plan.experts() : 1;
    const ExpertRoom<T> room(plan, together, kLanes<T>);
    ExpertBlock<T> block;
    std::memset(static_cast<void*>(&block), 0, sizeof(block));
    ExpertSaved<T> saved[kLanes<T> * kMaxExperts];
    FlooredRow<T> floored[kLanes<T> * kMaxExperts];
    for (std::int64_t first = first_row; first < last_row; first += room.rows) {
        const int rows = smaller(last_row - first, room.rows);
        std::fill(results.terms + 2 * first, results.terms + 2 * (first + rows), 0.0);
        for (int k = 0; k < plan.experts(); k += together) {
            for (int lane = 0; lane < rows; ++lane) {
                make_logits_of_row<T>(plan, room.arrays(plan, lane), k, together, first + lane, lane, block);
            }
            for (int lane = 0; lane < rows; ++lane) {
                make_exponentials_of_row<T>(plan, room.arrays(plan, lane), together, lane, block);
            }
            for (int lane = 0; lane < rows && plan.divergence; ++lane) {
                FlooredRow<T>* of_row = floored + lane * kMaxExperts;
                add_up_divergence<T>(plan, room.arrays(plan, lane), first + lane, lane, block, of_row);
            }
            end_block<T>(plan, block, k, together, first, rows, floored, results, saved);
            for (int lane = 0; lane < rows; ++lane) {
                done(first + lane, k, together, room.arrays(plan, lane), saved + lane * together);
            }
        }
    }
}

template <class T>
void expert_forward(const ExpertCall& call, const ExpertOutputs& outputs, std::int64_t first, std::int64_t last) {
    const ExpertPlan<T> plan(call);
    const int experts = plan.experts();
    const ExpertResults<T> results{outputs.terms, static_cast<T*>(outputs.loss), static_cast<T*>(outputs.rows)};
    over_blocks<T>(plan, first, last, results,
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
    const ExpertRoom<T> room(plan, together, 1);
    const ExpertArrays<T> arrays = room.arrays(plan, 0);
    ExpertBlock<T> block;
    FlooredRow<T> floored[kMaxExperts];
    const T* grad = static_cast<const T*>(grad_output);
    for (std::int64_t b = first; b < last; ++b) {
        for (int k = 0; k < experts; k += together) {
            T of_experts[kMaxExperts];
            for (int i = 0; i < together; ++i) of_experts[i] = grad[call.of_rows ? (k + i) * call.logits.batch + b : 0];
            const auto* saved = reinterpret_cast<const ExpertSaved<T>*>(static_cast<const T*>(call.saved) +
                                                                        (b * experts + k) * kExpertSaved);
            if (!plan.divergence) {
                gradient_of_plain_row<T>(plan, k, b, saved[0], of_experts[0], nullptr, gradient);
                continue;
            }
            make_logits_of_row<T>(plan, arrays, 0, experts, b, 0, block);
            make_exponentials_of_row<T>(plan, arrays, experts, 0, block);
            add_up_divergence<T>(plan, arrays, b, 0, block, floored);
            gradient_of_row<T>(plan, arrays, b, saved, of_experts, gradient);
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
    over_blocks<T>(plan, first, last, results,
                   [&](std::int64_t b, int k, int, const ExpertArrays<T>& arrays, const ExpertSaved<T>* saved) {
                       if (plan.divergence) {
                           gradient_of_row<T>(plan, arrays, b, saved, ones, gradient);
                       } else {
                           gradient_of_plain_row<T>(plan, k, b, saved[0], T(1), arrays.e(0), gradient);
                       }
                   });
}

}  // namespace
}  // namespace shike
