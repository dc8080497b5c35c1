// What one CUDA thread learns of the rows of K experts from its chunks of classes, for the generalised expert loss, and
// what the rows' threads make of it together. The labels' classes are left out: their logits are kAbsent.
//
// Every expert has its own pivot: no more than a few powers of e below the largest logit, raised only where a chunk
// lies above it. So nothing is lost, however far apart experts are, and a pivot moves a few times a row.
#pragma once

#include "losses/cuda_merge.h"
#include "losses/cuda_stream.h"

namespace shike {
namespace {

constexpr float kMostAbovePivot = 2.7725887f;  // log(kMostOfChunk): a logit further above it makes a pivot rise

// Of the cross-entropy. Logits of minus infinity are legal.
template <int K>
struct ExpertStream {
    float pivot[K];
    float sum[K];     // of exp(x - pivot)
    float linear[K];  // of x - pivot, for label smoothing
    float count;      // of classes, for label smoothing

    SHIKE_DEVICE void clear() {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            pivot[k] = kFloor;
            sum[k] = linear[k] = 0;
        }
        count = 0;
    }

    template <int N>
    SHIKE_DEVICE void add(const float (&x)[N][K], bool smoothing) {
        float sums[K];
#pragma unroll 1
        while (true) {  // twice where a pivot rises: then no exponential is above 1
            float most = 0;
#pragma unroll
            for (int k = 0; k < K; ++k) {
                sums[k] = 0;
#pragma unroll
                for (int i = 0; i < N; ++i) sums[k] += Exponential<true>::of(x[i][k], pivot[k]);
                most = larger(most, sums[k]);
            }
            if (!(most > kMostOfChunk)) break;
            float next[K];
#pragma unroll
            for (int k = 0; k < K; ++k) {
                next[k] = pivot[k];
#pragma unroll
                for (int i = 0; i < N; ++i) next[k] = larger(next[k], x[i][k]);
            }
            move_pivots(next);
        }
#pragma unroll
        for (int k = 0; k < K; ++k) sum[k] += sums[k];
        if (!smoothing) return;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const bool absent = x[i][0] == kAbsent;
            count += absent ? 0 : 1;
#pragma unroll
            for (int k = 0; k < K; ++k) linear[k] += absent ? 0 : x[i][k] - pivot[k];
        }
    }

    // None of the new pivots is below the present one.
    SHIKE_DEVICE void move_pivots(const float (&next)[K]) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            sum[k] *= Exponential<true>::moved(pivot[k], next[k]);
            linear[k] += count * (pivot[k] - next[k]);
            pivot[k] = next[k];
        }
    }
};

// Of the divergence. With x_k = d_k - pivot_k and f_k = exp(x_k), a class adds to `cross` of experts as each other's
// teachers f_k (V x_k - sum_i v_i x_i); of a teacher beside them f (x - x_k), of its x and f = exp(x). Both are a
// weight times (V x_k - X), with V = -1 and X = -x for the latter. A single expert has a teacher beside it.
template <int K>
struct DivergenceStream {
    float pivot[K];
    float sum[K];  // of f_k
    float cross[K];
    float teacher_pivot, teacher_sum;  // of the teacher beside the experts
    float student[K];                  // v_k
    float students;                    // V
    float beside;                      // 1 where the teacher is beside the experts, else 0

    // Without the students' weights.
    SHIKE_DEVICE void clear(bool teacher_is_beside) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            pivot[k] = kFloor;
            sum[k] = cross[k] = student[k] = 0;
        }
        teacher_pivot = kFloor;
        teacher_sum = 0;
        students = teacher_is_beside ? -1 : 0;
        beside = teacher_is_beside ? 1 : 0;
    }

    SHIKE_DEVICE void set_student(int k, float weight) {
        student[k] = weight;
        students += weight;
    }

    // d becomes d - pivot; `teacher`: the logits of the one beside the experts, or kAbsent.
    template <int N>
    SHIKE_DEVICE void add(float (&d)[N][K], const float (&teacher)[N]) {
        float next[K], next_teacher = teacher[0], rise = kWorst;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            next[k] = d[0][k];
#pragma unroll
            for (int i = 1; i < N; ++i) next[k] = larger(next[k], d[i][k]);
            rise = larger(rise, next[k] - pivot[k]);
        }
#pragma unroll
        for (int i = 1; i < N; ++i) next_teacher = larger(next_teacher, teacher[i]);
        rise = larger(rise, next_teacher - teacher_pivot);
        if (rise > kMostAbovePivot) {
#pragma unroll
            for (int k = 0; k < K; ++k) next[k] = larger(pivot[k], next[k]);
            move_pivots(next, larger(teacher_pivot, next_teacher), weighted_moves(next));
        }
        const bool of_teacher = K == 1 || beside != 0;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float weight = 0, mean = 0;
#pragma unroll
            for (int k = 0; k < K; ++k) {
                d[i][k] -= pivot[k];
                if (K > 1) mean = fmaf(student[k], d[i][k], mean);
            }
            if (of_teacher) {
                mean = teacher_pivot - teacher[i];
                weight = exponential(-mean);
                teacher_sum += weight;
            }
#pragma unroll
            for (int k = 0; k < K; ++k) {
                const float f = exponential(d[i][k]);
                sum[k] += f;
                cross[k] = fmaf(of_teacher ? weight : f, fmaf(students, d[i][k], -mean), cross[k]);
            }
        }
    }

    // sum_k v_k times what the pivots move by.
    SHIKE_DEVICE float weighted_moves(const float (&next)[K]) const {
        float moves = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) moves = fmaf(student[k], pivot[k] - next[k], moves);
        return moves;
    }

    // None of the new pivots is below the present one. `moves`: of all experts.
    SHIKE_DEVICE void move_pivots(const float (&next)[K], float next_teacher, float moves) {
        const float of_teacher = teacher_pivot - next_teacher, teacher_factor = exponential(of_teacher);
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const float move = pivot[k] - next[k], factor = exponential(move);
            const float mean = beside != 0 ? -of_teacher : moves, weights = beside != 0 ? teacher_sum : sum[k];
            cross[k] = (beside != 0 ? teacher_factor : factor) * fmaf(weights, fmaf(students, move, -mean), cross[k]);
            sum[k] *= factor;
            pivot[k] = next[k];
        }
        teacher_sum *= teacher_factor;
        teacher_pivot = next_teacher;
    }
};

template <int K>
struct ExpertStreams {
    ExpertStream<K> cross_entropy;
    DivergenceStream<K> divergence;
};

template <int N>
SHIKE_DEVICE void largest_of_lanes(float (&values)[N], int lanes) {
#pragma unroll 1
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = larger(values[i], exchanged(values[i], mask));
    }
}

template <int K>
SHIKE_DEVICE void merge_lanes(ExpertStream<K>& stream, int lanes) {
    float pivot[K], sums[2 * K + 1];
#pragma unroll
    for (int k = 0; k < K; ++k) pivot[k] = stream.pivot[k];
    largest_of_lanes(pivot, lanes);
    stream.move_pivots(pivot);
    sums[2 * K] = stream.count;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        sums[k] = stream.sum[k];
        sums[K + k] = stream.linear[k];
    }
    add_lanes(sums, lanes);
    stream.count = sums[2 * K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
        stream.sum[k] = sums[k];
        stream.linear[k] = sums[K + k];
    }
}

template <int K>
SHIKE_DEVICE void merge_lanes(ExpertStreams<K>& streams, int lanes) {
    merge_lanes(streams.cross_entropy, lanes);
    DivergenceStream<K>& stream = streams.divergence;
    float pivot[K + 1], next[K], sums[2 * K + 1];
#pragma unroll
    for (int k = 0; k < K; ++k) pivot[k] = stream.pivot[k];
    pivot[K] = stream.teacher_pivot;
    largest_of_lanes(pivot, lanes);
#pragma unroll
    for (int k = 0; k < K; ++k) next[k] = pivot[k];
    stream.move_pivots(next, pivot[K], stream.weighted_moves(next));
    sums[2 * K] = stream.teacher_sum;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        sums[k] = stream.sum[k];
        sums[K + k] = stream.cross[k];
    }
    add_lanes(sums, lanes);
    stream.teacher_sum = sums[2 * K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
        stream.sum[k] = sums[k];
        stream.cross[k] = sums[K + k];
    }
}

}  // namespace
}  // namespace shike
