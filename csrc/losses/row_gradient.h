// What becomes of a row's state (row_state.h): its terms of the loss, what is saved for the backward, and the gradient.
// Compiled for host and device.
#pragma once

#include "losses/options.h"
#include "losses/row_state.h"

namespace shike {
namespace {

// What the forward leaves for the backward, 5 K + 4 numbers a row; PyTorch holds them as one tensor [B, 5 K + 4].
template <class T, int K>
struct DktSaved {
    T pivot[K];            // M_k
    T p_scale[K];          // p_k[c] = p_scale_k exp(z_k - M_k), c != y
    T s_scale[K];          // s_k[c] = s_scale_k exp(z_k - M_k), c != y: the student
    T cross_mean[K];       // K x_k - X - cross_mean_k = sum_i (log p_k - log p_i) - sum_i KL(p_k || p_i)
    T target_gradient[K];  // d(loss) / d z_k[y]
    T teacher_pivot;       // q[c] = q_scale exp(r - teacher_pivot)
    T q_scale;
    T gap_mean;            // E_q[gap]
    T hardest;             // the class h
};

template <class T>
struct DktTerms {  // of one row, without the weights
    T cross_entropy;  // sum_k -log p_k[y]
    T hardest;        // sum_k KL(q || s_k)
    T mutual;         // sum_{i != j} KL(p_j || p_i)
};

// What the logits of a row, relative to a pivot, add up to: 1 / sum and log(sum), of the sum over the other classes and
// the target, whichever of them is 1 (`leads`: the target's logit is the pivot, and `ratio` has to be multiplied by).
template <class V>
struct Normalizer {
    V scale, log_sum;
};

#ifdef __CUDA_ARCH__
// The pivot may lie above all logits of an expert, so that the sum is small.
SHIKE_HD Normalizer<float> normalizer(bool leads, float sum, float ratio) {
    const float total = leads ? 1 + sum * ratio : sum + ratio;
    return {1 / total, total > 0.5f ? logarithm_1p(leads ? sum * ratio : sum - 1 + ratio) : logarithm(total)};
}
#else
template <class Mask, class V>
SHIKE_HD Normalizer<V> normalizer(Mask leads, V sum, V ratio) {
    // The sum less 1: without the target it is 1 or more.
    const V rest = leads ? sum * ratio : sum - 1 + ratio;
    return {1 / (1 + rest), logarithm_1p(rest)};
}
#endif

// Ends a row: the logits at the target, z_y, and at the hardest negative, z_h (any finite numbers if the term is off).
// V is one row, or a vector of as many rows as it has lanes.
template <class V, class T, int K>
SHIKE_HD DktTerms<V> finish(const DktState<V, K>& state, const V (&z_y)[K], const V (&z_h)[K],
                            const DktOptions<T>& options, DktSaved<V, K>& saved) {
    DktTerms<V> terms{};

    V cross_entropy[K];  // -log p_k[y]
    V log_sum[K];        // log sum exp(z_k - M_k) over all classes
    V p_target[K];       // p_k[y]
    V p_others[K];       // 1 - p_k[y], without cancellation
    V log_sums{}, others{};
    SHIKE_UNROLL
    for (int k = 0; k < K; ++k) {
        const V one = all<V>(1), margin = z_y[k] - state.pivot[k];
        const auto leads = margin >= V{};  // the target's logit is the largest
        const V ratio = exponential(leads ? -margin : margin);
        const auto [scale, log_rest] = normalizer(leads, state.sum[k], ratio);
        saved.pivot[k] = state.pivot[k];
        saved.p_scale[k] = scale * (leads ? ratio : one);
        p_target[k] = scale * (leads ? one : ratio);
        p_others[k] = state.sum[k] * saved.p_scale[k];
        log_sum[k] = log_rest + (leads ? margin : V{});
        cross_entropy[k] = log_rest - (leads ? V{} : margin);
        terms.cross_entropy += cross_entropy[k];
        log_sums += log_sum[k];
        others += p_others[k];
    }

    SHIKE_UNROLL
    for (int k = 0; k < K; ++k) {
        saved.target_gradient[k] = -p_others[k] * options.inverse_batch;
        saved.cross_mean[k] = V{};
        if (!options.mutual_term) continue;
        const V offset = log_sum[k] * float(K) - log_sums;
        const V at_target = terms.cross_entropy - cross_entropy[k] * float(K);  // sum_i (log p_k[y] - log p_i[y])
        const V divergence = saved.p_scale[k] * state.cross[k] - p_others[k] * offset + p_target[k] * at_target;
        terms.mutual += divergence;
        saved.cross_mean[k] = divergence + offset;
        // d/dz_k[y] = v (sum_j (p_k - p_j) + p_k (sum_i (log p_k - log p_i) - divergence))
        saved.target_gradient[k] +=
            options.mutual_weight * (others - p_others[k] * float(K) +
                                     options.teacher_gradient * p_target[k] * (at_target - divergence));
    }

    SHIKE_UNROLL
    for (int k = 0; k < K; ++k) saved.s_scale[k] = V{};
    saved.teacher_pivot = saved.q_scale = saved.gap_mean = V{};
    saved.hardest = all<V>(kNoClass);
    if (options.hardest_term) {
        const V mean = state.hardest.total / float(K);
        V gap{};  // the rounding of the mean: it has to cancel below
        SHIKE_UNROLL
        for (int k = 0; k < K; ++k) gap += mean - z_h[k];
        const V target = V{} + options.teacher_target_logit, student_target = V{} + options.student_target_logit;
        const V pivot = larger(larger(state.teacher_pivot, mean), target);
        const V of_others = exponential(state.teacher_pivot - pivot);
        const V of_hardest = exponential(mean - pivot);
        const V of_target = exponential(target - pivot);
        const V sum = state.teacher_sum * of_others + of_hardest + of_target;
        saved.teacher_pivot = pivot;
        saved.q_scale = 1 / sum;
        saved.gap_mean = (state.teacher_gap * of_others + of_hardest * gap +
                          of_target * ((target - student_target) * float(K))) * saved.q_scale;
        saved.hardest = state.hardest.number;
        terms.hardest = saved.gap_mean;
        const V log_teacher_sum = logarithm(sum);
        SHIKE_UNROLL
        for (int k = 0; k < K; ++k) {
            const V top = larger(state.pivot[k], student_target);
            const V own = exponential(state.pivot[k] - top);
            const V student_sum = state.sum[k] * own + exponential(student_target - top);
            const V log_student = top - state.pivot[k] + logarithm(student_sum);
            saved.s_scale[k] = own / student_sum;
            terms.hardest -= pivot - state.pivot[k] + log_teacher_sum - log_student;
        }
    }
    return terms;
}

// The gradient of one row, times grad_output.
template <class V, int K>
struct DktGradient {
    V pivot[K];
    V slope[K];      // d z_k = e_k (slope_k + bend_k (K x_k - X)) - sum_j share_j e_j - ...
    V bend[K];
    V share[K];
    V teacher_pivot;
    V q_scale;       // w q_scale
    V teacher_slope;  // 1 or 0, the teacher's gradient
    V gap_mean;       // times teacher_slope

    template <class T>
    SHIKE_HD static DktGradient of(const DktSaved<T, K>& saved, const DktOptions<T>& options, T grad_output) {
        DktGradient row;
        const T mutual = grad_output * (options.mutual_term ? options.mutual_weight : T(0));
        const T hardest = grad_output * (options.hardest_term ? options.hardest_weight : T(0));
        SHIKE_UNROLL
        for (int k = 0; k < K; ++k) {
            const T p = saved.p_scale[k];
            row.pivot[k] = V{} + saved.pivot[k];
            row.share[k] = V{} + mutual * p;
            row.bend[k] = V{} + options.teacher_gradient * mutual * p;
            row.slope[k] = V{} + (p * (grad_output * options.inverse_batch +
                                       mutual * (K - options.teacher_gradient * saved.cross_mean[k])) +
                                  hardest * saved.s_scale[k]);
        }
        row.teacher_pivot = V{} + saved.teacher_pivot;
        row.q_scale = V{} + hardest * saved.q_scale;
        row.teacher_slope = V{} + options.teacher_gradient;
        row.gap_mean = V{} + options.teacher_gradient * saved.gap_mean;
        return row;
    }

    // z -> gradient at a class that is neither the target nor the hardest negative.
    SHIKE_HD void apply(V (&z)[K], bool hardest_term, bool mutual_term) const {
        V share_of_all = V{}, to_strongest = V{}, strongest = V{};
        if (hardest_term) {
            const Candidate<V> entry = candidate(z);
            strongest = entry.strongest;
            const V q = q_scale * exponential(strongest - teacher_pivot);
            share_of_all = q;
            to_strongest = q * (entry.gap * teacher_slope - gap_mean);
        }
        V gradient[K];
        students(z, gradient, share_of_all, mutual_term);
        if (hardest_term) {  // all of it to the first expert that attains the maximum
            SHIKE_UNROLL
            for (int k = 0; k < K - 1; ++k) {
                const auto wins = z[k] == strongest;
                gradient[k] += wins ? to_strongest : V{};
                to_strongest = wins ? V{} : to_strongest;
            }
            gradient[K - 1] += to_strongest;
        }
        SHIKE_UNROLL
        for (int k = 0; k < K; ++k) z[k] = gradient[k];
    }

    // z -> gradient at the hardest negative: the teacher's logit is the mean of the experts.
    SHIKE_HD void apply_at_hardest(V (&z)[K], bool mutual_term) const {
        V mean = candidate(z).total / float(K), gap = V{};
        SHIKE_UNROLL
        for (int k = 0; k < K; ++k) gap += mean - z[k];
        const V q = q_scale * exponential(mean - teacher_pivot);
        const V to_each = q * (gap * teacher_slope - gap_mean) / float(K);
        V gradient[K];
        students(z, gradient, q, mutual_term);
        SHIKE_UNROLL
        for (int k = 0; k < K; ++k) z[k] = gradient[k] + to_each;
    }

private:
    SHIKE_HD void students(const V (&z)[K], V (&gradient)[K], V share_of_all, bool mutual_term) const {
        V x[K];
        const V total = relative(z, pivot, x);
        SHIKE_UNROLL
        for (int k = 0; k < K; ++k) {
            const V e = exponential(x[k]);
            gradient[k] = e * (mutual_term ? slope[k] + bend[k] * (x[k] * float(K) - total) : slope[k]);
            if (mutual_term) share_of_all += share[k] * e;
        }
        SHIKE_UNROLL
        for (int k = 0; k < K; ++k) gradient[k] -= share_of_all;
    }
};

}  // namespace
}  // namespace shike
