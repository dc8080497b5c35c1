// What one CUDA thread learns of a row from its chunks of classes, and what the row's threads make of it together.
// docs/kernels.md derives it.
//
// One pivot serves all experts and classes: then the teacher's exponential is the largest of the experts' exponentials,
// and moving the pivot multiplies every sum by one factor. What lies more than 126 powers of two below the pivot is
// lost, so a row whose experts are far apart is computed again in the general way (row_state.h); `trusted` decides.
//
// DktState::add holds the hardest negative out of the teacher's sums class by class. A thread holds out the chunk with
// the hardest negative, which costs one exchange a chunk; the row's winning chunk is looked at once more at the end.
#pragma once

#include "losses/cuda_rows.h"
#include "losses/row_state.h"

namespace shike {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kMostOfChunk = 16;       // sum of a chunk's exponentials above which the pivot rises
constexpr float kMostAtAll = 0x1p60f;    // and above which sums may have overflowed
constexpr float kLeastSum = 0x1p-80f;    // of a row's exponentials that is trusted: all but 2^-46 C of it is there

SHIKE_DEVICE float exp2_of(float x) {  // 2 ulp; a result below 2^-126 is flushed to 0
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

SHIKE_DEVICE float log2_of(float x) {
    float result;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// Exponentials of logits relative to a pivot. Two-byte logits save the subtraction: their exponentials are short of one
// factor, which comes from rounding the pivot's logarithm and depends on the pivot alone.
template <bool kFloat>
struct Exponential {
    SHIKE_DEVICE static float of(float z, float pivot) {
        return exp2_of(kFloat ? (z - pivot) * kLog2E : fmaf(z, kLog2E, -in_log2(pivot)));
    }
    // What sums relative to one pivot are multiplied by to be relative to another.
    SHIKE_DEVICE static float moved(float pivot, float to) {
        return exp2_of(kFloat ? (pivot - to) * kLog2E : in_log2(pivot) - in_log2(to));
    }
    // The factor that is missing.
    SHIKE_DEVICE static float missing(float pivot) {
        return kFloat ? 1.f : exp2_of(-fmaf(pivot, kLog2E, -in_log2(pivot)));
    }

private:
    SHIKE_DEVICE static float in_log2(float pivot) { return __fmul_rn(pivot, kLog2E); }  // rounded, whatever it is for
};

// One class, by the logits z: e_k = exp(z_k - pivot), d_k = K z_k - Z with Z = sum_k z_k.
template <int K, bool kFloat>
struct OneClass {
    float e[K], d[K];
    float total;      // Z, expert 0 first
    float strongest;  // max_k e_k
    float gap;        // max_k d_k = sum_k (max z - z_k)

    SHIKE_DEVICE OneClass(const float (&z)[K], float pivot) {
        total = z[0];
#pragma unroll
        for (int k = 1; k < K; ++k) total += z[k];
#pragma unroll
        for (int k = 0; k < K; ++k) e[k] = Exponential<kFloat>::of(z[k], pivot);
        if constexpr (K == 1) {
            d[0] = 0;
        } else if constexpr (!kFloat) {  // sums of two-byte logits are exact, unless they are so unlike that none cancel
#pragma unroll
            for (int k = 0; k < K; ++k) d[k] = fmaf(z[k], float(K), -total);
        } else if constexpr (K > 3) {  // relative to the pivot, so that large logits do not cancel
            float x[K], sum = 0;
#pragma unroll
            for (int k = 0; k < K; ++k) {
                x[k] = z[k] - pivot;
                sum = k == 0 ? x[k] : sum + x[k];
            }
#pragma unroll
            for (int k = 0; k < K; ++k) d[k] = fmaf(x[k], float(K), -sum);
        } else {  // differences of nearly equal logits are exact
#pragma unroll
            for (int k = 0; k < K; ++k) {
                d[k] = k == 0 ? z[k] - z[1] : z[k] - z[0];
#pragma unroll
                for (int i = 1; i < K; ++i) {
                    if (i != k && !(k == 0 && i == 1)) d[k] += z[k] - z[i];
                }
            }
        }
        strongest = e[0];
        gap = d[0];
#pragma unroll
        for (int k = 1; k < K; ++k) {
            strongest = larger(strongest, e[k]);
            gap = larger(gap, d[k]);
        }
    }
};

template <int K>
SHIKE_DEVICE float total_of(const float (&z)[K]) {
    float total = z[0];
#pragma unroll
    for (int k = 1; k < K; ++k) total += z[k];
    return total;
}

SHIKE_DEVICE void exchange_if(bool condition, float& a, float& b) {
    const float former = a;
    a = condition ? b : a;
    b = condition ? former : b;
}

template <int N, int K>
SHIKE_DEVICE void copy(const float (&from)[N][K], float (&to)[N][K]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int k = 0; k < K; ++k) to[i][k] = from[i][k];
    }
}

template <int N, int K>
SHIKE_DEVICE float largest(const float (&z)[N][K]) {
    float result = z[0][0];
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int k = 0; k < K; ++k) result = larger(result, z[i][k]);
    }
    return result;
}

// What all sums of a row have in common when its pivot moves.
template <int K>
SHIKE_DEVICE void multiply(float (&sum)[K], float (&cross)[K], float& teacher_sum, float& teacher_gap, float factor) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
        sum[k] *= factor;
        cross[k] *= factor;
    }
    teacher_sum *= factor;
    teacher_gap *= factor;
}

// Sums over the classes that a thread saw, the target left out.
template <int K, bool kFloat>
struct DktStream {
    float pivot;          // the largest logit of a chunk, raised where others were much larger; kFloor before the first
    float sum[K];         // of e_k
    float cross[K];       // of e_k d_k
    float teacher_sum;    // of max_k e_k, without the held-out chunk
    float teacher_gap;    // of max_k e_k times the gap, without the held-out chunk
    float held_sum;       // the same of the held-out chunk
    float held_gap;
    float hardest;        // the largest Z, attained in the held-out chunk
    int chunk;            // its first class

    SHIKE_DEVICE void clear() {
        pivot = kFloor;
#pragma unroll
        for (int k = 0; k < K; ++k) sum[k] = cross[k] = 0;
        teacher_sum = teacher_gap = held_sum = held_gap = 0;
        hardest = kWorst;
        chunk = int(kNoClass);
    }

    // Adds the classes first ... first + N - 1; those that are left out have the logits kAbsent.
    template <int N>
    SHIKE_DEVICE void add(const float (&z)[N][K], int first) {
        if (pivot == kFloor) pivot = larger(pivot, largest(z));
        float entry_sum = 0, entry_gap = 0, best = kWorst;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const OneClass<K, kFloat> one(z[i], pivot);
#pragma unroll
            for (int k = 0; k < K; ++k) {
                sum[k] += one.e[k];
                if (K > 1) cross[k] = fmaf(one.e[k], one.d[k], cross[k]);
            }
            entry_sum += one.strongest;
            if (K > 1) entry_gap = fmaf(one.strongest, one.gap, entry_gap);
            best = larger(best, one.total);
        }
        const bool harder = best > hardest;  // a tie stays with the lower classes
        teacher_sum += harder ? held_sum : entry_sum;
        teacher_gap += harder ? held_gap : entry_gap;
        held_sum = harder ? entry_sum : held_sum;
        held_gap = harder ? entry_gap : held_gap;
        hardest = harder ? best : hardest;
        chunk = harder ? first : chunk;
        // The pivot rises with the logits. Where they rise so much that sums overflow, the row must not be trusted.
        if (entry_sum > kMostOfChunk) {
            if (entry_sum > kMostAtAll) sum[0] = __int_as_float(0x7fffffff);
            move_pivot(pivot + 0.6931472f * log2_of(entry_sum));
        }
    }

    SHIKE_DEVICE void move_pivot(float next) {
        const float factor = Exponential<kFloat>::moved(pivot, next);
        multiply(sum, cross, teacher_sum, teacher_gap, factor);
        held_sum *= factor;
        held_gap *= factor;
        pivot = next;
    }
};

// What is known of a row, or of a block's part of it, when all classes have been seen: what the end of a row needs.
constexpr int bytes_of_row(int experts) {  // a power of two
    const int words = 4 * experts + 4;
    return 4 * (words <= 8 ? 8 : words <= 16 ? 16 : words <= 32 ? 32 : 64);
}

template <int K>
struct alignas(bytes_of_row(K)) DktRow {
    static constexpr int kWords = 4 * K + 4;  // without what fills it up

    float pivot;
    float sum[K];
    float cross[K];
    float teacher_sum;  // without the hardest negative
    float teacher_gap;
    float hardest;        // the class; kNoClass: there is none
    float at_hardest[K];  // its logits
    float at_target[K];   // the target's logits

    // Adds another part of the row, in a later block.
    SHIKE_DEVICE void merge(DktRow other) {
        const float next = larger(pivot, other.pivot);
        move_pivot(next);
        other.move_pivot(next);
#pragma unroll
        for (int k = 0; k < K; ++k) {
            sum[k] += other.sum[k];
            cross[k] += other.cross[k];
        }
        const float total = total_of(at_hardest), others_total = total_of(other.at_hardest);
        const bool harder = others_total > total || (others_total == total && other.hardest < hardest);
        exchange_if(harder, hardest, other.hardest);
#pragma unroll
        for (int k = 0; k < K; ++k) exchange_if(harder, at_hardest[k], other.at_hardest[k]);
        const OneClass<K, true> loser(other.at_hardest, pivot);  // joins the teacher's sums
        teacher_sum += other.teacher_sum + loser.strongest;
        teacher_gap += other.teacher_gap + loser.strongest * loser.gap;
    }

    // Whether the sums are complete; not so where they are NaN. Two classes leave the teacher none but the hardest
    // negative.
    SHIKE_DEVICE bool trusted(bool hardest_term, int classes) const {
        bool enough = !hardest_term || classes == 2 || teacher_sum >= kLeastSum;
#pragma unroll
        for (int k = 0; k < K; ++k) enough &= sum[k] >= kLeastSum;
        return enough;
    }

    SHIKE_DEVICE DktState<float, K> state() const {
        DktState<float, K> result;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            result.pivot[k] = pivot;
            result.sum[k] = sum[k];
            result.cross[k] = cross[k];
        }
        result.hardest = {total_of(at_hardest), 0, 0, hardest};
        result.teacher_pivot = pivot;
        result.teacher_sum = teacher_sum;
        result.teacher_gap = teacher_gap;
        return result;
    }

private:
    SHIKE_DEVICE void move_pivot(float next) {
        multiply(sum, cross, teacher_sum, teacher_gap, Exponential<true>::moved(pivot, next));
        pivot = next;
    }
};

}  // namespace
}  // namespace shike
