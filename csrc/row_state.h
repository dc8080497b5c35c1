// The mathematics of one row (one sample) of the expert losses, compiled for host and device; docs/kernels.md derives it.
//
// V is a stream of classes: one float or double (a CUDA thread, the end of a row), or a SIMD vector whose lanes are as
// many streams (the CPU). What streams learnt from different classes of a row is put together in expert_loss_rows.h
// (lanes) and chunk_stream.h (threads). Nothing here knows how the logits are stored.
//
// For SIMD vectors include simd.h first: it brings their overloads of the functions used here.
//
// Every function lives in an unnamed namespace, because the files that include this are compiled for different
// instruction sets: a function with external linkage could be taken from the wrong one.
#pragma once

#include <math.h>

#ifdef __CUDACC__
#define SHIKE_HD __host__ __device__ __forceinline__
#else
#define SHIKE_HD inline __attribute__((always_inline))
#endif
#ifdef __CUDA_ARCH__
#define SHIKE_UNROLL _Pragma("unroll")
#else
#define SHIKE_UNROLL
#endif

namespace shike {
namespace {

// Finite stand-ins for minus infinity, so that no difference of two infinities arises. A class that is left out (the
// target, padding behind the last class) has the logit kAbsent; a maximum over nothing is kFloor; exp(kAbsent - kFloor)
// is exactly 0.
constexpr float kAbsent = -1e30f;
constexpr float kFloor = -1e29f;
constexpr float kWorst = -3e38f;       // the sum of logits of a hardest negative not found yet: below 8 * kAbsent
constexpr float kNoClass = 16777216.f;  // 2^24: class numbers are kept as floating-point numbers, exact below this

SHIKE_HD float exponential(float x) {
#ifdef __CUDA_ARCH__
    float result;  // 2 ulp; a result below 2^-126 is flushed to 0
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504088896341f));
    return result;
#else
    return __builtin_expf(x);
#endif
}
SHIKE_HD double exponential(double x) { return ::exp(x); }
SHIKE_HD float logarithm(float x) { return ::logf(x); }
SHIKE_HD double logarithm(double x) { return ::log(x); }
SHIKE_HD float logarithm_1p(float x) {
#ifdef __CUDA_ARCH__
    return ::log1pf(x);
#else
    const float sum = 1 + x;  // the logarithm of the rounded sum, and the rounding's share: faster than log1pf
    return ::logf(sum) - ((sum - 1) - x) / sum;
#endif
}
SHIKE_HD double logarithm_1p(double x) { return ::log1p(x); }

template <class V>
SHIKE_HD V larger(V a, V b) {
    return a > b ? a : b;
}
#ifdef __CUDA_ARCH__
SHIKE_HD float larger(float a, float b) { return fmaxf(a, b); }  // one instruction
#endif

// The same number in every stream.
template <class V>
SHIKE_HD V all(float value) {
    return V{} + value;
}

// Whether a rare update may be skipped. Overloaded for vectors, where the test would cost more than the update.
SHIKE_HD bool may_hold(bool condition) { return condition; }

// The pivot of streams that are kept in step: overloaded for vectors, whose lanes share their pivots, so that ending a
// row only has to add them up.
SHIKE_HD float in_step(float pivot) { return pivot; }
SHIKE_HD double in_step(double pivot) { return pivot; }

template <class Mask, class V>
SHIKE_HD void exchange_if(Mask condition, V& a, V& b) {
    const V former = a;
    a = condition ? b : a;
    b = condition ? former : b;
}

// One class in the teacher's eyes.
template <class V>
struct Candidate {
    V total;     // sum_k z_k, expert 0 first: the larger, the harder a negative
    V strongest; // max_k z_k: the teacher's logit, unless the class is the hardest negative
    V gap;       // sum_k (max - z_k): what the divergences need; a sum of differences, so that nothing cancels
    V number;    // the class

    SHIKE_HD static Candidate none() { return {all<V>(kWorst), all<V>(kAbsent), V{}, all<V>(kNoClass)}; }

    template <class Mask>
    SHIKE_HD void exchange_if(Mask condition, Candidate& other) {
        shike::exchange_if(condition, total, other.total);
        shike::exchange_if(condition, strongest, other.strongest);
        shike::exchange_if(condition, gap, other.gap);
        shike::exchange_if(condition, number, other.number);
    }
};

// The class whose logits are z, without its number.
template <class V, int K>
SHIKE_HD Candidate<V> candidate(const V (&z)[K]) {
    Candidate<V> result{z[0], z[0], V{}, V{}};
    SHIKE_UNROLL
    for (int k = 1; k < K; ++k) {
        result.total += z[k];
        result.strongest = larger(result.strongest, z[k]);
    }
    result.gap = result.strongest - z[0];
    SHIKE_UNROLL
    for (int k = 1; k < K; ++k) result.gap += result.strongest - z[k];
    return result;
}

// x = z - pivot of one class; returns X = sum_i x_i.
template <class V, int K>
SHIKE_HD V relative(const V (&z)[K], const V (&pivot)[K], V (&x)[K]) {
    x[0] = z[0] - pivot[0];
    V total = x[0];  // not 0 + x[0]: the compiler may not drop that addition
    SHIKE_UNROLL
    for (int k = 1; k < K; ++k) {
        x[k] = z[k] - pivot[k];
        total += x[k];
    }
    return total;
}

// What a stream knows of the experts as students of each other.
template <class V, int K>
struct StudentState {
    V pivot[K];  // M_k = max z_k
    V sum[K];    // sum of e_k = exp(x_k), x_k = z_k - M_k
    V cross[K];  // sum of e_k (K x_k - X), X = sum_i x_i

    SHIKE_HD void clear() {
        SHIKE_UNROLL
        for (int k = 0; k < K; ++k) {
            pivot[k] = all<V>(kFloor);
            sum[k] = cross[k] = V{};
        }
    }

    // Adds the first n of N classes with the logits z; `top` becomes their largest logits.
    template <int N>
    SHIKE_HD void add(const V (&z)[N][K], V (&top)[K], bool mutual_term, int n = N) {
        V next[K];
        SHIKE_UNROLL
        for (int k = 0; k < K; ++k) top[k] = z[0][k];
        SHIKE_UNROLL
        for (int i = 1; i < n; ++i) {
            SHIKE_UNROLL
            for (int k = 0; k < K; ++k) top[k] = larger(top[k], z[i][k]);
        }
        SHIKE_UNROLL
        for (int k = 0; k < K; ++k) next[k] = in_step(larger(pivot[k], top[k]));
        move_pivots(next, mutual_term);
        V new_sum[K] = {}, new_cross[K] = {};  // apart first: adding one class at a time to a long sum rounds more
        SHIKE_UNROLL
        for (int i = 0; i < n; ++i) {
            V x[K];
            const V total = relative(z[i], pivot, x);
            SHIKE_UNROLL
            for (int k = 0; k < K; ++k) {
                const V e = exponential(x[k]);
                new_sum[k] += e;
                if (mutual_term) new_cross[k] += e * (x[k] * float(K) - total);
            }
        }
        SHIKE_UNROLL
        for (int k = 0; k < K; ++k) {
            sum[k] += new_sum[k];
            if (mutual_term) cross[k] += new_cross[k];
        }
    }

    // Adds the sums of another stream with the same pivots.
    SHIKE_HD void add_sums(const StudentState& other, bool mutual_term) {
        SHIKE_UNROLL
        for (int k = 0; k < K; ++k) {
            sum[k] += other.sum[k];
            if (mutual_term) cross[k] += other.cross[k];
        }
    }

    // Expresses the sums relative to new pivots, none of them smaller than the present one.
    SHIKE_HD void move_pivots(const V (&next)[K], bool mutual_term) {
        V move[K];
        const V moves = relative(pivot, next, move);
        SHIKE_UNROLL
        for (int k = 0; k < K; ++k) {
            const V factor = exponential(move[k]);
            if (mutual_term) cross[k] = factor * (cross[k] + sum[k] * (move[k] * float(K) - moves));
            sum[k] *= factor;
            pivot[k] = next[k];
        }
    }
};

// What a stream knows of the classes it saw, the target left out.
template <class V, int K>
struct DktState : StudentState<V, K> {
    // The teacher's sums leave out the hardest negative found so far: its logit is the experts' mean, not their maximum,
    // and taking a term out of a finished sum would cancel all digits where that term dominates.
    Candidate<V> hardest;
    V teacher_pivot;  // max of r
    V teacher_sum;    // sum of exp(r - pivot)
    V teacher_gap;    // sum of exp(r - pivot) gap

    SHIKE_HD void clear() {
        StudentState<V, K>::clear();
        hardest = Candidate<V>::none();
        teacher_pivot = all<V>(kFloor);
        teacher_sum = teacher_gap = V{};
    }

    // Adds the first n of N classes with the logits z; entry i is the class first + i * step. Terms that are switched
    // off cost nothing and leave their sums undefined.
    template <int N>
    SHIKE_HD void add(const V (&z)[N][K], V first, float step, bool hardest_term, bool mutual_term, int n = N) {
        V top[K];
        StudentState<V, K>::add(z, top, mutual_term, n);
        if (hardest_term) add_to_teacher(z, first, step, n);
    }

    // The teacher's part of add().
    template <int N>
    SHIKE_HD void add_to_teacher(const V (&z)[N][K], V first, float step, int n) {
        V strongest[N], gap[N];
        V next = teacher_pivot;
        SHIKE_UNROLL
        for (int i = 0; i < n; ++i) {
            Candidate<V> entry = candidate(z[i]);
            // A harder negative takes the candidate's place, and the former candidate its place among the others. A tie
            // changes nothing: classes come in ascending order, and the lowest one stays.
            const auto harder = entry.total > hardest.total;
            if (may_hold(harder)) {
                entry.number = first + step * float(i);
                hardest.exchange_if(harder, entry);
            }
            strongest[i] = entry.strongest;
            gap[i] = entry.gap;
            next = larger(next, entry.strongest);
        }
        move_teacher_pivot(in_step(next));
        V new_sum = V{}, new_gap = V{};
        SHIKE_UNROLL
        for (int i = 0; i < n; ++i) {
            const V weight = exponential(strongest[i] - teacher_pivot);
            new_sum += weight;
            new_gap += weight * gap[i];
        }
        teacher_sum += new_sum;
        teacher_gap += new_gap;
    }

private:
    SHIKE_HD void move_teacher_pivot(V next) {
        const V factor = exponential(teacher_pivot - next);
        teacher_sum *= factor;
        teacher_gap *= factor;
        teacher_pivot = next;
    }
};

// The constants of a loss. A divergence's weight is 1 / (B C) or 1 / B times the user's.
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

// Ends a row: the logits at the target, z_y, and at the hardest negative, z_h (any finite numbers if the term is off). V
// is one row, or a vector of as many rows as it has lanes.
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
        // The sum over all classes relative to the largest logit, less 1: the sum over the others is 1 or more.
        const V rest = leads ? state.sum[k] * ratio : state.sum[k] - 1 + ratio;
        const V scale = 1 / (1 + rest), log_rest = logarithm_1p(rest);
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

// The gradient of one row, times the incoming gradient of the loss.
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
    SHIKE_HD static DktGradient of(const DktSaved<T, K>& saved, const DktOptions<T>& options, T incoming) {
        DktGradient row;
        const T mutual = incoming * (options.mutual_term ? options.mutual_weight : T(0));
        const T hardest = incoming * (options.hardest_term ? options.hardest_weight : T(0));
        SHIKE_UNROLL
        for (int k = 0; k < K; ++k) {
            const T p = saved.p_scale[k];
            row.pivot[k] = V{} + saved.pivot[k];
            row.share[k] = V{} + mutual * p;
            row.bend[k] = V{} + options.teacher_gradient * mutual * p;
            row.slope[k] = V{} + (p * (incoming * options.inverse_batch +
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

// Cross-entropy of one expert's row. Here logits and biases of minus infinity are legal: such a class has p = 0.
template <class V>
struct SoftmaxState {
    V pivot;   // M = max z
    V sum;     // sum of exp(z - M)
    V linear;  // sum of z - M, for label smoothing
    V count;   // classes seen, for label smoothing

    SHIKE_HD void clear() {
        pivot = all<V>(kFloor);
        sum = linear = count = V{};
    }

    SHIKE_HD void move_pivot(V next) {
        sum *= exponential(pivot - next);
        linear += count * (pivot - next);
        pivot = next;
    }

    // Adds the first n of N classes. `linear` takes the classes below `end` only: there is padding behind them.
    template <int N>
    SHIKE_HD void add(const V (&z)[N], V first, float step, float end, bool smoothing, int n = N) {
        V next = pivot;
        SHIKE_UNROLL
        for (int i = 0; i < n; ++i) next = larger(next, z[i]);
        move_pivot(in_step(next));
        V new_sum = V{};
        SHIKE_UNROLL
        for (int i = 0; i < n; ++i) {
            const V x = z[i] - pivot;
            new_sum += exponential(x);
            if (!smoothing) continue;
            const auto present = first + step * float(i) < end;
            linear += present ? x : V{};
            count += present ? all<V>(1) : V{};
        }
        sum += new_sum;
    }

    SHIKE_HD void merge(SoftmaxState other) {
        const V next = larger(pivot, other.pivot);
        move_pivot(next);
        other.move_pivot(next);
        sum += other.sum;
        linear += other.linear;
        count += other.count;
    }
};

// Ends a row: -(1 - smoothing) log p[y] - smoothing / C sum_c log p[c].
template <class T>
SHIKE_HD T finish(const SoftmaxState<T>& state, T z_y, T smoothing, T classes) {
    const T log_sum = logarithm(state.sum);
    const T at_target = log_sum - (z_y - state.pivot);
    if (smoothing == 0) return at_target;
    return (1 - smoothing) * at_target + smoothing * (log_sum - state.linear / classes);
}

}  // namespace
}  // namespace shike
