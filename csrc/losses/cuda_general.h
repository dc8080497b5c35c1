// Rows in the general way, with a pivot for each expert and one for the teacher, class by class: for experts so far apart
// that one pivot is not enough (cuda_stream.h). It is rare, and slow.
#pragma once

#include "common/half.h"
#include "losses/call.h"
#include "losses/cuda_merge.h"
#include "losses/row_state.h"

namespace shike {
namespace {

SHIKE_DEVICE void exchange_if(bool condition, Candidate<float>& a, Candidate<float>& b) {
    exchange_if(condition, a.total, b.total);
    exchange_if(condition, a.strongest, b.strongest);
    exchange_if(condition, a.gap, b.gap);
    exchange_if(condition, a.number, b.number);
}

// Expresses the experts' sums relative to new pivots, none of them smaller than the present one.
template <int K>
SHIKE_DEVICE void move_pivots(DktState<float, K>& state, const float (&next)[K]) {
    float move[K];
    const float moves = relative(state.pivot, next, move);
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const float factor = exponential(move[k]);
        state.cross[k] = factor * (state.cross[k] + state.sum[k] * (move[k] * float(K) - moves));
        state.sum[k] *= factor;
        state.pivot[k] = next[k];
    }
}

// Adds the class `number` with the logits z.
template <int K>
SHIKE_DEVICE void add_class(DktState<float, K>& state, const float (&z)[K], float number) {
    float next[K];
#pragma unroll
    for (int k = 0; k < K; ++k) next[k] = larger(state.pivot[k], z[k]);
    move_pivots(state, next);
    float x[K];
    const float total = relative(z, state.pivot, x);
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const float e = exponential(x[k]);
        state.sum[k] += e;
        state.cross[k] += e * (x[k] * float(K) - total);
    }
    // A harder negative takes the candidate's place, and the former candidate its place among the others. A tie changes
    // nothing: classes come in ascending order, and the lowest one stays.
    Candidate<float> entry = candidate(z);
    entry.number = number;
    exchange_if(entry.total > state.hardest.total, state.hardest, entry);
    const float pivot = larger(state.teacher_pivot, entry.strongest);
    const float factor = exponential(state.teacher_pivot - pivot), weight = exponential(entry.strongest - pivot);
    state.teacher_sum = state.teacher_sum * factor + weight;
    state.teacher_gap = state.teacher_gap * factor + weight * entry.gap;
    state.teacher_pivot = pivot;
}

// A logit of any dtype.
SHIKE_DEVICE float logit(const Experts& logits, int k, std::int64_t b, std::int64_t c) {
    const Matrix& matrix = logits.expert[k];
    const std::int64_t at = b * matrix.row_stride + c * matrix.class_stride;
    if (logits.dtype == DType::kFloat32) return __ldg(static_cast<const float*>(matrix.data) + at);
    const std::uint32_t bits = __ldg(static_cast<const unsigned short*>(matrix.data) + at);
    float low, high;
    if (logits.dtype == DType::kBFloat16) {
        widen_bfloat16(bits, low, high);
    } else {
        widen_float16(bits, low, high);
    }
    return low;
}

// The state of a row, in every lane of a warp.
template <int K>
__device__ DktState<float, K> general_state(const Experts& logits, std::int64_t b, int target) {
    DktState<float, K> state;
    state.clear();
#pragma unroll 1
    for (int c = int(threadIdx.x % kWarp); c < int(logits.classes); c += kWarp) {
        float z[K];
#pragma unroll
        for (int k = 0; k < K; ++k) z[k] = c == target ? kAbsent : logit(logits, k, b, c);
        add_class(state, z, float(c));
    }

    float pivot[K], total = state.hardest.total, number = state.hardest.number;
#pragma unroll
    for (int k = 0; k < K; ++k) pivot[k] = state.pivot[k];
#pragma unroll 1
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
#pragma unroll
        for (int k = 0; k < K; ++k) pivot[k] = larger(pivot[k], exchanged(pivot[k], mask));
        const float others_total = exchanged(total, mask), others_number = exchanged(number, mask);
        const bool harder = others_total > total || (others_total == total && others_number < number);
        total = harder ? others_total : total;
        number = harder ? others_number : number;
    }
    move_pivots(state, pivot);
    // The other lanes' candidates join the teacher's sums.
    const float strongest = state.hardest.number == number ? kAbsent : state.hardest.strongest;
    float teacher = larger(state.teacher_pivot, strongest);
#pragma unroll 1
    for (int mask = kWarp / 2; mask > 0; mask /= 2) teacher = larger(teacher, exchanged(teacher, mask));
    const float factor = exponential(state.teacher_pivot - teacher), weight = exponential(strongest - teacher);
    float sums[2 * K + 2];
#pragma unroll
    for (int k = 0; k < K; ++k) {
        sums[k] = state.sum[k];
        sums[K + k] = state.cross[k];
    }
    sums[2 * K] = state.teacher_sum * factor + weight;
    sums[2 * K + 1] = state.teacher_gap * factor + weight * state.hardest.gap;
    add_lanes(sums, kWarp);
#pragma unroll
    for (int k = 0; k < K; ++k) {
        state.sum[k] = sums[k];
        state.cross[k] = sums[K + k];
    }
    state.teacher_pivot = teacher;
    state.teacher_sum = sums[2 * K];
    state.teacher_gap = sums[2 * K + 1];
    state.hardest.total = total;
    state.hardest.number = number;
    return state;
}

}  // namespace
}  // namespace shike
