// The gradient of a row whose experts share their pivot; DktGradient (row_gradient.h) is that of any row.
#pragma once

#include "losses/cuda_call.h"
#include "losses/cuda_rows.h"
#include "losses/cuda_stream.h"
#include "losses/row_gradient.h"

namespace shike {
namespace {

// Two kernels compute it, and their results must agree in every bit: so products that feed a sum are rounded explicitly.
template <int K, bool kFloat>
struct GradientOfRow {
    static constexpr int N = Rows<K, kFloat>::N;

    // As in DktGradient, but relative to the one pivot. The slopes and q_scale contain the factor that the exponentials
    // are short of.
    float pivot;
    float slope[K];
    float bend[K];
    float share[K];
    float q_scale;
    float teacher_slope;
    float gap_mean;
    bool clamp;  // logits of minus infinity are legal where a term is off

    __device__ GradientOfRow(const DktSaved<float, K>& saved, const DktOptions<float>& options, float grad_output)
        : pivot(saved.pivot[0]), q_scale(0), teacher_slope(options.teacher_gradient),
          gap_mean(__fmul_rn(options.teacher_gradient, saved.gap_mean)),
          clamp(!options.hardest_term || !options.mutual_term) {
        const float missing = Exponential<kFloat>::missing(pivot);
        const float mutual = options.mutual_term ? __fmul_rn(grad_output, options.mutual_weight) : 0;
        const float hardest = options.hardest_term ? __fmul_rn(grad_output, options.hardest_weight) : 0;
        const float of_target = __fmul_rn(grad_output, options.inverse_batch);
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const float p = __fmul_rn(saved.p_scale[k], missing), s = __fmul_rn(saved.s_scale[k], missing);
            share[k] = __fmul_rn(mutual, p);
            bend[k] = __fmul_rn(options.teacher_gradient, share[k]);
            const float factor = fmaf(mutual, fmaf(-options.teacher_gradient, saved.cross_mean[k], float(K)), of_target);
            slope[k] = fmaf(p, factor, __fmul_rn(hardest, s));
        }
        if (options.hardest_term) {  // the teacher's pivot is nowhere below the experts'
            q_scale = __fmul_rn(__fmul_rn(hardest, saved.q_scale),
                                __fmul_rn(exponential(pivot - saved.teacher_pivot), missing));
        }
    }

    // z -> gradient of classes that are neither the target nor the hardest negative. Both terms are always computed,
    // for they fit into the time that the memory needs; one that is off has a weight of 0.
    __device__ __forceinline__ void apply(float (&z)[N][K]) const {
        if (clamp) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
#pragma unroll
                for (int k = 0; k < K; ++k) z[i][k] = larger(z[i][k], kAbsent);
            }
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const OneClass<K, kFloat> one(z[i], pivot);
            const float q = __fmul_rn(q_scale, one.strongest);
            float to_all = q, to_strongest = __fmul_rn(q, fmaf(one.gap, teacher_slope, -gap_mean));
#pragma unroll
            for (int k = 0; k < K; ++k) to_all = fmaf(share[k], one.e[k], to_all);
            bool taken = false;  // by the first expert that attains the maximum
#pragma unroll
            for (int k = 0; k < K; ++k) {
                bool wins = k == K - 1;
                if (!wins && kFloat) {  // differences round: two experts may seem equal that are not
                    wins = true;
#pragma unroll
                    for (int j = k + 1; j < K; ++j) wins &= z[i][k] >= z[i][j];
                } else if (!wins) {
                    wins = one.d[k] == one.gap;
                }
                const float own = K == 1 ? slope[k] : fmaf(bend[k], one.d[k], slope[k]);
                float result = fmaf(one.e[k], own, -to_all);
                if (wins && !taken) result += to_strongest;
                taken |= wins;
                z[i][k] = result;
            }
        }
    }

    // The same of one class, the hardest negative.
    __device__ __forceinline__ void apply_at_hardest(float (&z)[K]) const {
        const OneClass<K, kFloat> one(z, pivot);
        const float mean = one.total / float(K), q = __fmul_rn(q_scale, Exponential<kFloat>::of(mean, pivot));
        float gap = 0, to_all = q;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            gap += mean - z[k];
            to_all = fmaf(share[k], one.e[k], to_all);
        }
        const float to_each = __fmul_rn(q, fmaf(gap, teacher_slope, -gap_mean)) / float(K) - to_all;
#pragma unroll
        for (int k = 0; k < K; ++k) z[k] = fmaf(one.e[k], fmaf(bend[k], one.d[k], slope[k]), to_each);
    }

    // Two classes have another gradient. The thread that wrote the wrong one corrects it: its writes keep their order.
    // hardest: the class, or none where the term is off; at_hardest(k): its logits.
    template <class AtHardest>
    __device__ __forceinline__ void correct(const BlockPlan& plan, const Place& place, const Rows<K, kFloat>& gradients,
                                            const DktSaved<float, K>& saved, float grad_output, int target,
                                            AtHardest at_hardest) const {
        const int hardest = int(saved.hardest);
        if (unsigned(hardest) < unsigned(gradients.classes) &&
            plan.serves(hardest, place.thread, place.split, gradients.shift)) {
            float z[K];
#pragma unroll
            for (int k = 0; k < K; ++k) z[k] = clamp ? larger(at_hardest(k), kAbsent) : at_hardest(k);
            apply_at_hardest(z);
#pragma unroll
            for (int k = 0; k < K; ++k) gradients.store_one(k, hardest, z[k]);
        }
        if (plan.serves(target, place.thread, place.split, gradients.shift)) {
#pragma unroll
            for (int k = 0; k < K; ++k) gradients.store_one(k, target, grad_output * saved.target_gradient[k]);
        }
    }
};

}  // namespace
}  // namespace shike
