// What is known of one row (one sample) when its classes have streamed by; row_gradient.h makes the loss and the gradient
// of it, docs/kernels.md derives both. Compiled for host and device.
//
// V is one row, a float or double, or a SIMD vector of as many rows as it has lanes. How classes are streamed is in
// cpu_dkt.h, cuda_stream.h and cuda_general.h. Nothing here knows how the logits are stored.
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

// The same number in every row.
template <class V>
SHIKE_HD V all(float value) {
    return V{} + value;
}

// One class in the teacher's eyes.
template <class V>
struct Candidate {
    V total;     // sum_k z_k, expert 0 first: the larger, the harder a negative
    V strongest; // max_k z_k: the teacher's logit, unless the class is the hardest negative
    V gap;       // sum_k (max - z_k): what the divergences need; a sum of differences, so that nothing cancels
    V number;    // the class
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

// What is known of a row's classes, the target left out: what the end of a row needs.
template <class V, int K>
struct DktState {
    // The experts as students of each other.
    V pivot[K];  // M_k, no logit is much larger
    V sum[K];    // sum of e_k = exp(x_k), x_k = z_k - M_k
    V cross[K];  // sum of e_k (K x_k - X), X = sum_i x_i
    // The teacher's sums leave out the hardest negative: its logit is the experts' mean, not their maximum, and taking a
    // term out of a finished sum would cancel all digits where that term dominates.
    Candidate<V> hardest;
    V teacher_pivot;
    V teacher_sum;  // sum of exp(r - pivot)
    V teacher_gap;  // sum of exp(r - pivot) gap

    SHIKE_HD void clear() {
        SHIKE_UNROLL
        for (int k = 0; k < K; ++k) {
            pivot[k] = all<V>(kFloor);
            sum[k] = cross[k] = V{};
        }
        hardest = {all<V>(kWorst), all<V>(kAbsent), V{}, all<V>(kNoClass)};
        teacher_pivot = all<V>(kFloor);
        teacher_sum = teacher_gap = V{};
    }
};

}  // namespace
}  // namespace shike
