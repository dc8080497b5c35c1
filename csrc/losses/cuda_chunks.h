// What one CUDA thread learns of a row from its chunks of classes, and how the threads' knowledge becomes a DktState.
//
// DktState::add holds the hardest negative out of the teacher's sums class by class. That is a data-dependent exchange
// of four numbers a class, too much for a kernel that otherwise needs less than fifty instructions a class. So a thread
// holds out the chunk with the hardest negative, which costs one exchange a chunk; the row's winning chunk is read once
// more at the end, and its classes are added one by one.
#pragma once

#include "losses/cuda_plan.h"
#include "losses/row_state.h"

namespace shike {
namespace {

// Sums of the teacher over some classes. Each set of classes has a pivot of its own: the hardest negative's chunk may
// lie so far above the others that relative to it they would vanish, although its logit will be the smaller mean.
struct TeacherSums {
    float pivot;  // max of r
    float sum;    // sum of exp(r - pivot)
    float gap;    // sum of exp(r - pivot) gap

    SHIKE_DEVICE void clear() {
        pivot = kFloor;
        sum = gap = 0;
    }

    SHIKE_DEVICE void add(const TeacherSums& other) {
        const float next = larger(pivot, other.pivot);
        const float factor = exponential(pivot - next), others_factor = exponential(other.pivot - next);
        sum = sum * factor + other.sum * others_factor;
        gap = gap * factor + other.gap * others_factor;
        pivot = next;
    }

    SHIKE_DEVICE void exchange_if(bool condition, TeacherSums& other) {
        shike::exchange_if(condition, pivot, other.pivot);
        shike::exchange_if(condition, sum, other.sum);
        shike::exchange_if(condition, gap, other.gap);
    }
};

template <int K>
struct ChunkStream {
    static constexpr int N = chunk_of(K);

    StudentState<float, K> students;
    TeacherSums others;  // without the held-out chunk
    TeacherSums held;    // of the held-out chunk
    float hardest;       // the largest sum of logits, attained in the held-out chunk
    float chunk;         // its first class

    SHIKE_DEVICE void clear() {
        students.clear();
        others.clear();
        held.clear();
        hardest = kWorst;
        chunk = kNoClass;
    }

    // Adds the classes first ... first + N - 1. Those that are left out have the logits kAbsent.
    SHIKE_DEVICE void add(const float (&z)[N][K], float first) {
        float top[K];
        students.add(z, top, true);
        TeacherSums entry{top[0], 0, 0};
        SHIKE_UNROLL
        for (int k = 1; k < K; ++k) entry.pivot = larger(entry.pivot, top[k]);
        float best = kWorst;
        SHIKE_UNROLL
        for (int i = 0; i < N; ++i) {
            const Candidate<float> one = candidate(z[i]);
            const float weight = exponential(one.strongest - entry.pivot);
            entry.sum += weight;
            entry.gap += weight * one.gap;
            best = larger(best, one.total);
        }
        add_to_teacher(best > hardest, entry, best, first);  // a tie stays with the lower classes
    }

    // Adds another stream of the row. The students' pivots are the same.
    SHIKE_DEVICE void merge(ChunkStream other) {
        students.add_sums(other.students, true);
        others.add(other.others);
        add_to_teacher((other.hardest > hardest) | ((other.hardest == hardest) & (other.chunk < chunk)), other.held,
                       other.hardest, other.chunk);
    }

    // The state of the whole row; z: the logits of the held-out chunk.
    SHIKE_DEVICE DktState<float, K> state(const float (&z)[N][K]) const {
        DktState<float, K> result;
        result.clear();
        static_cast<StudentState<float, K>&>(result) = students;
        result.teacher_pivot = others.pivot;
        result.teacher_sum = others.sum;
        result.teacher_gap = others.gap;
        result.add_to_teacher(z, chunk, 1, N);
        return result;
    }

private:
    SHIKE_DEVICE void add_to_teacher(bool harder, TeacherSums& entry, float entry_hardest, float entry_chunk) {
        held.exchange_if(harder, entry);
        hardest = harder ? entry_hardest : hardest;
        chunk = harder ? entry_chunk : chunk;
        others.add(entry);
    }
};

}  // namespace
}  // namespace shike
