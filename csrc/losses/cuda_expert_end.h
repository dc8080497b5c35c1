// The CUDA kernel that ends the rows of the generalised expert loss: losses, what the backward needs, and the sums over
// the batch.
#pragma once

#include "losses/cuda_expert.h"
#include "losses/cuda_staged.h"
#include "losses/cuda_sum.h"

namespace shike {
namespace {

// Where the results go; null: they are not wanted.
struct ExpertResults {
    float* loss;          // []
    float* loss_of_rows;  // [K, B]
    float* terms;         // [2]
    float* rows;          // [4, K, B]
};

constexpr int kSamplesOfEnd = kWarp / kMaxExperts;  // of a warp: eight lanes a sample, a lane an expert

// Of the experts of a sample, in each of its lanes.
SHIKE_DEVICE float sum_of_experts(float value) {
#pragma unroll
    for (int mask = kMaxExperts / 2; mask > 0; mask /= 2) value += exchanged(value, mask);
    return value;
}

// All that the forward has left of an expert's row.
struct ExpertTotals {
    ExpertStream<1> stream;
    DivergenceStream<1> divergence;
    float at[2];  // row logits at the labels
    float wrong;
    float d_at[2], teacher_at[2];

    // From `parts` [splits, B, K] on: the structs of `count` rows from `first` on, this lane's being the number `own`,
    // or none where that is negative.
    __device__ __forceinline__ void load(const ExpertArguments& call, float* stage, const ExpertPart* parts,
                                         const DivergencePart* divergences, std::int64_t first, int count, int own,
                                         float student) {
        using Parts = Staged<ExpertPart::kWords>;
        using Divergences = Staged<DivergencePart::kWords>;
        stream.clear();
        divergence.clear(call.teacher != Teacher::kOthers);
        if (call.teacher == Teacher::kOthers) {
            divergence.student[0] = student;
            divergence.students = sum_of_experts(student);
        }
        at[0] = at[1] = d_at[0] = d_at[1] = teacher_at[0] = teacher_at[1] = kAbsent;
        wrong = 0;
#pragma unroll 1
        for (int split = 0; split < call.plan.splits; ++split) {
            const std::int64_t from = split * call.logits.count * call.logits.batch + first;
            ExpertStream<1> part;
            part.clear();
            Parts::load<ExpertPart::kWords>(stage, parts + from, count);
            if (own >= 0) {
                const auto word = [&](int i) { return stage[Parts::place(own, i)]; };
                part = {{word(0)}, {word(1)}, {word(2)}, word(3)};
                at[0] = word(4);
                at[1] = word(5);
                wrong = larger(wrong, word(6));
            }
            __syncwarp();
            add(part);
            if (call.teacher == Teacher::kNone) continue;
            DivergenceStream<1> other = divergence;
            other.pivot[0] = other.teacher_pivot = kFloor;
            other.sum[0] = other.cross[0] = other.teacher_sum = 0;
            Divergences::load<DivergencePart::kWords>(stage, divergences + from, count);
            if (own >= 0) {
                const auto word = [&](int i) { return stage[Divergences::place(own, i)]; };
                other.pivot[0] = word(0);
                other.sum[0] = word(1);
                other.cross[0] = word(2);
                d_at[0] = word(3);
                d_at[1] = word(4);
                other.teacher_pivot = word(5);
                other.teacher_sum = word(6);
                teacher_at[0] = word(7);
                teacher_at[1] = word(8);
            }
            __syncwarp();
            add(other);
        }
        if (call.teacher != Teacher::kMean) return;
#pragma unroll
        for (int s = 0; s < 2; ++s) teacher_at[s] = sum_of_experts(own >= 0 ? d_at[s] * call.share : 0);
    }

private:
    __device__ __forceinline__ void add(ExpertStream<1> other) {
        const float next[1] = {larger(stream.pivot[0], other.pivot[0])};
        stream.move_pivots(next);
        other.move_pivots(next);
        stream.sum[0] += other.sum[0];
        stream.linear[0] += other.linear[0];
        stream.count += other.count;
    }

    __device__ __forceinline__ void add(DivergenceStream<1> other) {
        const float next[1] = {larger(divergence.pivot[0], other.pivot[0])};
        const float teacher = larger(divergence.teacher_pivot, other.teacher_pivot);
        move(divergence, next, teacher);
        move(other, next, teacher);
        divergence.sum[0] += other.sum[0];
        divergence.cross[0] += other.cross[0];
        divergence.teacher_sum += other.teacher_sum;
    }

    __device__ __forceinline__ static void move(DivergenceStream<1>& of, const float (&next)[1], float teacher) {
        of.move_pivots(next, teacher, sum_of_experts(of.weighted_moves(next)));
    }
};

// The divergence of an expert and its row, weighted by `weight`. `one`: 1, and 0 for a lane without an expert.
__device__ __forceinline__ DivergenceEnd<float> end_divergence(const ExpertArguments& call, const ExpertTotals& totals,
                                                               bool taught, float weight, float one) {
    const bool present[2] = {call.target.data != nullptr, call.target_b.data != nullptr};
    const DivergenceStream<1>& of = totals.divergence;
    const SoftmaxEnd<float> softmax = end_softmax(one == 0 ? 0.f : of.pivot[0], one == 0 ? 1.f : of.sum[0],
                                                  totals.d_at[0], totals.d_at[1]);
    if (call.teacher != Teacher::kOthers) {
        const SoftmaxEnd<float> teacher = end_softmax(taught ? of.teacher_pivot : 0.f, taught ? of.teacher_sum : 1.f,
                                                      totals.teacher_at[0], totals.teacher_at[1]);
        return end_teacher(teacher, softmax, of.cross[0], weight, present);
    }
    const float of_teacher = call.by_student ? one : weight;
    const float of_student = call.by_student ? weight : one;
    OthersSums<float> sums = of_others(softmax, of_teacher, of_student);
    sums.students = sum_of_experts(sums.students);
    sums.teachers = sum_of_experts(sums.teachers);
    sums.log_sums = sum_of_experts(sums.log_sums);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        sums.log_p[s] = sum_of_experts(sums.log_p[s]);
        sums.left[s] = sum_of_experts(sums.left[s]);
    }
    return end_others(sums, softmax, of.cross[0], of_teacher, of_student, !call.detach, present);
}

// The cross-entropy of an expert and its row: fills saved, and the results of the row; returns it with its weights.
__device__ __forceinline__ float end_row(const ExpertArguments& call, const ExpertTotals& totals, int k, std::int64_t b,
                                         const int (&label)[2], const float (&scale)[2], const ExpertResults& results,
                                         ExpertSaved<float>& saved) {
    const bool second = call.target_b.data != nullptr, two = label[1] >= 0 && label[1] != label[0];
    Labels<float> row{totals.at[0], totals.at[1], 0, 0, 0, 0};
    row.weight_a = call.number_of(call.weight_a, k, b, float(call.weight_number));
    const float weight_b = second ? call.number_of(call.weight_b, k, b, float(call.weight_b_number)) : 0;
    (two ? row.weight_b : row.weight_a) += weight_b;
    row.margin_a = call.number_of(call.margin, k, label[0], 0);
    if (two) row.margin_b = call.number_of(call.margin, k, label[1], 0);
    const ExpertSums<float> sums{totals.stream.pivot[0], totals.stream.sum[0], totals.stream.linear[0]};
    const CrossEntropyEnd<float> end = end_cross_entropy(sums, row, second, call.margin.data != nullptr, call.smoothing,
                                                         float(call.logits.classes));
    saved.p_scale = end.p_scale;
    saved.everywhere = end.everywhere;
    saved.at[0] = end.at_a * scale[0];
    saved.at[1] = end.at_b * scale[1];
    // 0 times infinity would be NaN: a row without weight adds nothing.
    const float weighted = row.weight_a * end.loss_a + (row.weight_b == 0 ? 0 : row.weight_b * end.loss_b);
    const std::int64_t at = k * call.logits.batch + b, of_each = call.logits.count * call.logits.batch;
    if (results.loss_of_rows != nullptr) results.loss_of_rows[at] = weighted;
    if (results.rows != nullptr) {
        const float lam = second ? call.number_of(call.lam, 0, b, float(call.lam_number)) : 1.f;
        results.rows[at] = lam == 1 ? end.loss_a : lam * end.loss_a + (1 - lam) * end.loss_b;
        results.rows[at + of_each] = end.log_sum;
        results.rows[at + 2 * of_each] = totals.wrong != 0 ? 0.f : 1.f;
        results.rows[at + 3 * of_each] = end.p_target;
    }
    return weighted;
}

// One warp; eight lanes end the rows of a sample, one an expert.
__global__ void __launch_bounds__(kWarp) expert_end_kernel(const __grid_constant__ ExpertArguments call,
                                                           const ExpertPart* parts,            // [splits, B, K]
                                                           const DivergencePart* divergences,  // [splits, B, K]
                                                           double* sums,                       // [2, blocks]
                                                           unsigned* ticket,                   // 0
                                                           const __grid_constant__ ExpertResults results)
{
    using Saved = Staged<kExpertSaved>;
    static_assert(kExpertSaved >= DivergencePart::kWords && kExpertSaved >= ExpertPart::kWords, "one stage for all");
    __shared__ float stage[kWarp * kExpertSaved];
    const int experts = call.logits.count, k = int(threadIdx.x) % kMaxExperts;
    const std::int64_t batch = call.logits.batch, first = std::int64_t(blockIdx.x) * kSamplesOfEnd;
    const std::int64_t b = first + threadIdx.x / kMaxExperts;
    const int samples = batch - first < kSamplesOfEnd ? int(batch - first) : kSamplesOfEnd;
    const bool present = k < experts && b < batch;
    const int own = present ? int(b - first) * experts + k : -1;
    const bool divergence = call.teacher != Teacher::kNone;
    const float kl_weight = present && divergence ? call.kl_weight_of(k, b) : 0, one = present ? 1 : 0;

    ExpertTotals totals;
    totals.load(call, stage, parts, divergences, first * experts, samples * experts, own,
                call.by_student ? kl_weight : one);
    const float counted = call.gated && totals.wrong != 0 ? 0 : kl_weight;
    DivergenceEnd<float> of_divergence{};
    const bool taught = present && divergence && call.taught_row(b) >= 0;
    if (divergence) of_divergence = end_divergence(call, totals, taught, counted, one);
    double of_lane[2] = {0, 0};
    if (present) {
        const int label[2] = {call.label(call.target, k, b), call.label(call.target_b, k, b)};
        // What a logit's change does to a row logit, and to one of the divergence.
        float scale[2] = {1, 1}, of_logits[2] = {1, 1};
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            if (label[s] < 0) continue;
            scale[s] = call.number_of(call.scale, k, label[s], call.scale_of_all);
            of_logits[s] = (call.adjusted ? scale[s] : 1.f) * call.inverse_temperature_of(label[s]);
        }
        ExpertSaved<float> saved{};
        saved.pivot = totals.stream.pivot[0];
        if (call.cross_entropy) of_lane[0] = end_row(call, totals, k, b, label, scale, results, saved);
        if (divergence) {
            of_lane[1] = of_divergence.of_row;
            saved.kl_pivot = totals.divergence.pivot[0];
            saved.slope = of_divergence.slope;
            saved.bend = of_divergence.bend;
            saved.share = of_divergence.share;
            saved.out = of_divergence.out;
            saved.teacher_pivot = taught ? totals.divergence.teacher_pivot : 0;
#pragma unroll
            for (int s = 0; s < 2; ++s) saved.at[s] += of_divergence.at[s] * of_logits[s];
        }
        const float* words = reinterpret_cast<const float*>(&saved);
#pragma unroll
        for (int i = 0; i < kExpertSaved; ++i) stage[Saved::place(own, i)] = words[i];
    }
    Saved::store(stage, static_cast<float*>(call.saved) + first * experts * kExpertSaved, samples * experts);
    const double weights[2] = {1, 1};
    sum_over_blocks<2>(of_lane, sums, ticket, weights, nullptr, results.loss, results.terms);
}

}  // namespace
}  // namespace shike
