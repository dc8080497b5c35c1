// The generalised expert loss on the CPU, a few rows at a time: what the classes add up to, the ends of the rows, and
// the gradient, all from arrays of exponentials that stay in the caches. The labels are left out of the arrays and of
// the sums; they join in at the ends of rows (expert_row.h).
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>

#include "common/grid.h"
#include "common/simd.h"  // before expert_row.h
//
#include "losses/cpu_tile.h"
#include "losses/expert_row.h"

namespace shike {
namespace {

// The numbers of a class in [C] or [K, C], one tile.
template <class T>
void load_of_classes(const OfExperts& of, int k, std::int64_t c, int count, Vector<T>* tile, T absent) {
    const Matrix from{const_cast<void*>(of.data), of.expert_stride, 1};
    load_as<T, T>(from, k, c, count, tile, 1, absent);
}
template <class T>
T number_of(const OfExperts& of, int k, std::int64_t i, T otherwise) {
    return of.data == nullptr ? otherwise : static_cast<const T*>(of.data)[k * of.expert_stride + i];
}

// What is the same for all rows of a call.
template <class T>
struct ExpertPlan {
    static constexpr int kStep = kTile * kLanes<T>;

    const ExpertCall& call;
    std::int64_t classes, tiles;
    bool divergence;  // between experts, so that all of them are worked on together
    bool apart;       // its logits are not those of the cross-entropy
    bool teacher;     // there is one beside the experts
    bool teacher_of_each;
    bool row_logits;      // those of the cross-entropy are wanted
    bool floored;         // a divergence of cpu_expert_floored.h
    bool wants_correct;
    T inverse_temperature, temperature_scale;

    explicit ExpertPlan(const ExpertCall& of)
        : call(of), classes(of.logits.classes), tiles(quotient_up(of.logits.classes, kStep)) {
        const bool adjusts = call.bias.data != nullptr || call.scale.data != nullptr || call.scale_number != 1;
        divergence = call.teacher != Teacher::kNone;
        apart = divergence && ((!call.adjusted && adjusts) || call.temperature.data != nullptr ||
                               call.temperature_number != 1);
        teacher = divergence && call.teacher != Teacher::kOthers;
        teacher_of_each = call.teacher == Teacher::kView ||
                          (call.teacher == Teacher::kGiven && differs_by_expert(call));
        floored = divergence && (call.eps > 0 || call.masked == Masked::kPartial);
        wants_correct = (call.rows || call.gated) && call.target.data != nullptr;
        row_logits = call.cross_entropy || !apart || wants_correct;
        inverse_temperature = T(1 / call.temperature_number);
    }

    int experts() const { return call.logits.count; }
    // -1 without one, and out of range, where nothing may be read: a compiled graph does not check its values.
    std::int64_t target(int k, std::int64_t b) const { return label(call.target, k, b); }
    // The second label, -1 where it is the first.
    std::int64_t second(int k, std::int64_t b) const {
        const std::int64_t y = label(call.target_b, k, b);
        return y == target(k, b) ? -1 : y;
    }
    // Arrays of a row: of each expert x and its exponentials, apart from these the divergence's, and the teacher's.
    int arrays_of_expert() const { return divergence ? (apart ? 4 : 2) : 1; }
    int teachers() const { return teacher ? (teacher_of_each ? experts() : 1) : 0; }
    // The row whose logits teach a row; -1: none.
    std::int64_t teacher_row(std::int64_t b) const {
        if (call.teacher != Teacher::kView) return b;
        const std::int64_t images = call.logits.batch / 2;
        return b < images ? -1 : b - images;
    }
    // Where the weight of a row's divergence is.
    std::int64_t weight_row(std::int64_t b) const {
        return call.teacher == Teacher::kView ? std::max<std::int64_t>(teacher_row(b), 0) : b;
    }

private:
    static bool differs_by_expert(const ExpertCall& call) {
        const Experts& given = call.teacher_logits;
        const bool adjusts = call.adjusted && (call.bias.expert_stride != 0 || call.scale.expert_stride != 0);
        return adjusts || given.expert[0].data != given.expert[given.count - 1].data;
    }
    std::int64_t label(const LabelsOfExperts& labels, int k, std::int64_t b) const {
        const std::int64_t y = labels.data == nullptr ? -1 : labels.data[k * labels.expert_stride + b * labels.stride];
        return y < classes ? std::max<std::int64_t>(y, -1) : -1;
    }
};

// One softmax of a row while it is made: logits in an array, then their exponentials.
template <class T>
struct Softmax {
    T pivot = T(kFloor), sum = 0;
    T at[2] = {T(kAbsent), T(kAbsent)};  // the logits at the labels
};

// A row of one sample: arrays of `tiles` tiles each, and what they add up to.
template <class T>
struct ExpertArrays {
    using V = Vector<T>;
    const ExpertPlan<T>& plan;
    V* memory;
    std::int64_t length;  // vectors of an array

    ExpertArrays(const ExpertPlan<T>& of, V* from) : plan(of), memory(from), length(of.tiles * kTile) {}

    static std::int64_t vectors(const ExpertPlan<T>& plan, int experts) {
        return (std::int64_t(plan.arrays_of_expert()) * experts + 2 * plan.teachers()) * plan.tiles * kTile;
    }

    // Experts count from the first that is worked on.
    V* x(int k) const { return memory + plan.arrays_of_expert() * k * length; }
    V* e(int k) const { return plan.divergence ? x(k) + length : x(k); }  // in the place of x where nothing needs it
    V* d(int k) const { return plan.apart ? x(k) + 2 * length : x(k); }
    V* f(int k) const { return plan.apart ? x(k) + 3 * length : e(k); }
    V* u(int t) const { return memory + (plan.arrays_of_expert() * plan.experts() + 2 * t) * length; }
    V* g(int t) const { return u(t) + length; }  // the teacher's exponentials
};

// Which of a vector's first `count` classes a mask keeps.
template <class T>
SHIKE_SIMD Mask<T> kept(const std::uint8_t* mask, int count) {
    using Bits = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>;
    std::uint8_t bytes[kLanes<T>] = {};
    if (count >= kLanes<T>) {
        std::memcpy(bytes, mask, sizeof(bytes));
    } else {
        for (int lane = 0; lane < count; ++lane) bytes[lane] = mask[lane];
    }
    Bits lanes[kLanes<T>];
    for (int lane = 0; lane < kLanes<T>; ++lane) lanes[lane] = bytes[lane] != 0 ? Bits(-1) : Bits(0);
    Mask<T> result;
    std::memcpy(&result, lanes, sizeof(result));
    return result;
}
// The classes of a tile that a mask does not keep become `otherwise`.
template <class T>
SHIKE_SIMD void mask_tile(const std::uint8_t* mask, int count, Vector<T>* tile, T otherwise) {
    for (int i = 0; i * kLanes<T> < count; ++i) {
        tile[i] = kept<T>(mask + i * kLanes<T>, count - i * kLanes<T>) ? tile[i] : Vector<T>{} + otherwise;
    }
}

template <class T>
SHIKE_SIMD void take_out(Vector<T>* tile, std::int64_t label, std::int64_t c, int count, T& value) {
    if (label < c || label >= c + count) return;
    const int at = int(label - c);
    value = tile[at / kLanes<T>][at % kLanes<T>];
    set_class<T>(tile, at, T(kAbsent));
}

// Whether the class with logit `own` is the answer: no other is larger, nor as large and lower. `others`: an array
// without it.
template <class T>
bool is_answer(const Vector<T>* others, std::int64_t classes, std::int64_t label, T own, std::int64_t second, T at_second) {
    if (second >= 0 && (second < label ? at_second >= own : at_second > own)) return false;
    Vector<T> before = all<Vector<T>>(kWorst), behind = before;
    const std::int64_t vectors = quotient_up(classes, kLanes<T>), its = label / kLanes<T>;
    for (std::int64_t i = 0; i < its; ++i) before = larger(before, others[i]);
    for (std::int64_t i = its + 1; i < vectors; ++i) behind = larger(behind, others[i]);
    for (std::int64_t c = its * kLanes<T>; c < std::min(classes, (its + 1) * kLanes<T>); ++c) {
        Vector<T>& side = c < label ? before : behind;
        const T value = others[its][c - its * kLanes<T>];
        if (c != label && value > side[0]) side[0] = value;
    }
    return !(lane_maximum<T>(before) >= own) && !(lane_maximum<T>(behind) > own) && own == own;
}

// x = scale z + bias of one tile, from logits or a teacher's.
template <class T>
void load_row_logits(const ExpertPlan<T>& plan, const Experts& from, int k, std::int64_t b, std::int64_t sample,
                     std::int64_t c, int count, bool adjusted, Vector<T>* tile) {
    const ExpertCall& call = plan.call;
    const int vectors = (count + kLanes<T> - 1) / kLanes<T>;
    load_tile<T>(from.dtype, from.expert[k], b, c, count, tile, 1, T(kAbsent));
    Vector<T> other[kTile];
    if (adjusted && call.scale.data != nullptr) {
        load_of_classes<T>(call.scale, k, c, count, other, T(1));
        for (int i = 0; i < vectors; ++i) tile[i] *= other[i];
    } else if (adjusted && call.scale_number != 1) {
        for (int i = 0; i < vectors; ++i) tile[i] *= T(call.scale_number);
    }
    if (adjusted && call.bias.data != nullptr) {
        load_of_classes<T>(call.bias, k, c, count, other, T(0));
        for (int i = 0; i < vectors; ++i) tile[i] += other[i];
    }
    if (call.mask == nullptr || call.masked == Masked::kPartial) return;
    const T masked = call.masked == Masked::kZero ? T(0) : T(kAbsent);
    mask_tile<T>(call.mask + sample * plan.classes + c, count, tile, masked);
}

// An array of logits, the labels taken out; and its largest.
template <class T, class Load>
SHIKE_SIMD Softmax<T> make_logits(const ExpertPlan<T>& plan, Vector<T>* array, std::int64_t y, std::int64_t y_b,
                                  const Load& load) {
    Softmax<T> softmax;
    Vector<T> largest = all<Vector<T>>(kFloor);
    for (std::int64_t c = 0; c < plan.classes; c += plan.kStep) {
        const int count = smaller(plan.classes - c, plan.kStep), n = (count + kLanes<T> - 1) / kLanes<T>;
        Vector<T>* tile = array + c / kLanes<T>;
        load(c, count, tile);
        if (count % kLanes<T> != 0) {
            Vector<T>& last = tile[n - 1];
            last = lane_numbers<T>() < T(count % kLanes<T>) ? last : all<Vector<T>>(kAbsent);
        }
        take_out<T>(tile, y, c, count, softmax.at[0]);
        take_out<T>(tile, y_b, c, count, softmax.at[1]);
        for (int i = 0; i < n; ++i) largest = larger(largest, tile[i]);
    }
    softmax.pivot = lane_maximum<T>(largest);
    return softmax;
}

// Their exponentials, which may take their place; the sum.
template <class T>
T make_exponentials(const ExpertPlan<T>& plan, const Vector<T>* logits, Vector<T>* to, T pivot_of_row) {
    using V = Vector<T>;
    const V pivot = V{} + pivot_of_row;
    V sum{};
    const std::int64_t vectors = quotient_up(plan.classes, kLanes<T>);
    for (std::int64_t first = 0; first < vectors; first += kTile) {
        const int n = smaller(vectors - first, kTile);
        V part{};
        for (int i = 0; i < n; ++i) {
            const V e = exponential(logits[first + i] - pivot);
            to[first + i] = e;
            part += e;
        }
        sum += part;
    }
    return lane_sum<T>(sum);
}

// sum of x - pivot, without what is absent.
template <class T>
T linear_sum(const ExpertPlan<T>& plan, const Vector<T>* logits, T pivot) {
    using V = Vector<T>;
    const std::int64_t vectors = quotient_up(plan.classes, kLanes<T>);
    V sum{};
    for (std::int64_t first = 0; first < vectors; first += kTile) {
        const int n = smaller(vectors - first, kTile);
        V part{};
        for (int i = 0; i < n; ++i) {
            const V x = logits[first + i];
            part += x == all<V>(kAbsent) ? V{} : x - pivot;
        }
        sum += part;
    }
    return lane_sum<T>(sum);
}

// What is known of the rows of a block, a lane a row.
template <class T>
struct ExpertBlock {
    using V = Vector<T>;
    ExpertSums<V> sums[kMaxExperts];
    V x_at[kMaxExperts][2];
    V correct[kMaxExperts];
    // Of the divergence:
    V d_pivot[kMaxExperts], d_sum[kMaxExperts], d_at[kMaxExperts][2], cross[kMaxExperts];
    V u_pivot[kMaxExperts], u_sum[kMaxExperts], u_at[kMaxExperts][2];
};

template <class T>
SHIKE_SIMD T capped(T value) {
    return value > T(kAbsent) ? value : T(kAbsent);
}

// Divergence logits from row logits.
template <class T>
void cool(const ExpertPlan<T>& plan, std::int64_t c, int count, Vector<T>* tile) {
    const int n = (count + kLanes<T> - 1) / kLanes<T>;
    if (plan.call.temperature.data == nullptr) {
        if (plan.call.temperature_number == 1) return;
        for (int i = 0; i < n; ++i) tile[i] *= plan.inverse_temperature;
        return;
    }
    Vector<T> temperature[kTile];
    load_of_classes<T>(plan.call.temperature, 0, c, count, temperature, T(1));
    for (int i = 0; i < n; ++i) tile[i] /= temperature[i];
}

// The weight of expert k's row as a teacher or a student, of a row of the divergence.
template <class T>
T kl_weight(const ExpertPlan<T>& plan, int k, std::int64_t b) {
    return number_of<T>(plan.call.kl_weight, k, plan.weight_row(b), T(plan.call.kl_number));
}

// X = sum_k out_k (d_k - M_k) of a tile, -inf counted as kAbsent.
template <class T>
SHIKE_SIMD void weighted_logits(const ExpertPlan<T>& plan, const ExpertArrays<T>& arrays, std::int64_t first, int n,
                                const T* pivot, const T* out, Vector<T>* total) {
    using V = Vector<T>;
    for (int i = 0; i < n; ++i) total[i] = V{};
    for (int k = 0; k < plan.experts(); ++k) {
        const V* d = arrays.d(k) + first;
        const V floor = all<V>(kAbsent), at = V{} + pivot[k], weight = V{} + out[k];
        for (int i = 0; i < n; ++i) total[i] += weight * (larger(d[i], floor) - at);
    }
}

template <class T>
void cross_of_others(const ExpertPlan<T>& plan, const ExpertArrays<T>& arrays, std::int64_t b, int lane, const T* pivot,
                     ExpertBlock<T>& block) {
    using V = Vector<T>;
    const int experts = plan.experts();
    T out[kMaxExperts], students = 0;
    for (int k = 0; k < experts; ++k) {
        out[k] = plan.call.by_student ? kl_weight<T>(plan, k, b) : T(1);
        students += out[k];
    }
    V cross[kMaxExperts] = {};
    const std::int64_t vectors = quotient_up(plan.classes, kLanes<T>);
    for (std::int64_t first = 0; first < vectors; first += kTile) {
        const int n = smaller(vectors - first, kTile);
        V total[kTile];
        weighted_logits<T>(plan, arrays, first, n, pivot, out, total);
        for (int k = 0; k < experts; ++k) {
            const V *d = arrays.d(k) + first, *f = arrays.f(k) + first;
            const V floor = all<V>(kAbsent), at = V{} + pivot[k];
            V part{};
            for (int i = 0; i < n; ++i) part += f[i] * (students * (larger(d[i], floor) - at) - total[i]);
            cross[k] += part;
        }
    }
    for (int k = 0; k < experts; ++k) block.cross[k][lane] = lane_sum<T>(cross[k]);
}

// The mean of the experts' divergence logits, as the teacher's.
template <class T>
void mean_of_experts(const ExpertPlan<T>& plan, const ExpertArrays<T>& arrays, int lane, const ExpertBlock<T>& block,
                     Softmax<T>& softmax) {
    using V = Vector<T>;
    const int experts = plan.experts();
    const T share = T(1) / T(experts);
    V largest = all<V>(kFloor);
    for (std::int64_t i = 0; i < quotient_up(plan.classes, kLanes<T>); ++i) {
        V total = arrays.d(0)[i];
        for (int k = 1; k < experts; ++k) total += arrays.d(k)[i];
        arrays.u(0)[i] = total * share;
        largest = larger(largest, total * share);
    }
    softmax.pivot = lane_maximum<T>(largest);
    for (int s = 0; s < 2; ++s) {
        softmax.at[s] = 0;
        for (int k = 0; k < experts; ++k) softmax.at[s] += block.d_at[k][s][lane] * share;
    }
}

template <class T>
void make_teachers(const ExpertPlan<T>& plan, const ExpertArrays<T>& arrays, std::int64_t b, int lane, const T* pivot,
                   ExpertBlock<T>& block) {
    using V = Vector<T>;
    const ExpertCall& call = plan.call;
    const int experts = plan.experts();
    const std::int64_t row = plan.teacher_row(b), vectors = quotient_up(plan.classes, kLanes<T>);
    for (int t = 0; t < plan.teachers(); ++t) {
        Softmax<T> softmax;
        softmax.pivot = 0;
        softmax.sum = 1;  // of a row that has no teacher
        if (row >= 0) {
            if (call.teacher == Teacher::kMean) {
                mean_of_experts<T>(plan, arrays, lane, block, softmax);
            } else {
                const Experts& from = call.teacher == Teacher::kView ? call.logits : call.teacher_logits;
                softmax = make_logits<T>(plan, arrays.u(t), plan.target(t, b), plan.second(t, b), [&](std::int64_t c, int count, V* tile) {
                                   const std::int64_t sample = call.teacher == Teacher::kView ? row : b;
                                   load_row_logits<T>(plan, from, t, row, sample, c, count, call.adjusted, tile);
                                   cool<T>(plan, c, count, tile);
                               });
            }
            softmax.sum = make_exponentials<T>(plan, arrays.u(t), arrays.g(t), softmax.pivot);
        }
        block.u_pivot[t][lane] = softmax.pivot;
        block.u_sum[t][lane] = softmax.sum;
        for (int s = 0; s < 2; ++s) block.u_at[t][s][lane] = capped(softmax.at[s]);
    }
    for (int k = 0; k < experts; ++k) {
        block.cross[k][lane] = 0;
        if (row < 0) continue;
        const int t = plan.teacher_of_each ? k : 0;
        const V *u = arrays.u(t), *g = arrays.g(t), *d = arrays.d(k), floor = all<V>(kAbsent);
        const V at = V{} + block.u_pivot[t][lane], at_k = V{} + pivot[k];
        V sum{};
        for (std::int64_t first = 0; first < vectors; first += kTile) {
            const int n = smaller(vectors - first, kTile);
            V part{};
            for (int i = 0; i < n; ++i) {
                part += g[first + i] * ((larger(u[first + i], floor) - at) - (larger(d[first + i], floor) - at_k));
            }
            sum += part;
        }
        block.cross[k][lane] = lane_sum<T>(sum);
    }
}

}  // namespace
}  // namespace shike
