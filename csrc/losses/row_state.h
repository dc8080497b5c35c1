// What is learnt of one row (one sample) while its classes stream by; row_gradient.h makes the loss and the gradient of
// it, docs/kernels.md derives both. Compiled for host and device.
//
// V is a stream of classes: one float or double (a CUDA thread, the end of a row), or a SIMD vector whose lanes are as
// many streams (the CPU). What streams learnt from different classes of a row is put together in cpu_dkt.h
// (lanes) and cuda_chunks.h (threads). Nothing here knows how the logits are stored.
//
// For SIMD vectors include common/simd.h first: it brings their overloads of the functions used here.
//
// Every function lives in an unnamed namespace, because the files that include this are compiled for different
// instruction sets: a function with external linkage could be taken from the wrong one.
#pragma once

#include <math.h>

#include "common/macros.h"

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
    // The teacher's sums leave out the hardest negative found so far: its logit is the experts' mean, not their
    // maximum, and taking a term out of a finished sum would cancel all digits where that term dominates.
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

}  // namespace
}  // namespace shike
