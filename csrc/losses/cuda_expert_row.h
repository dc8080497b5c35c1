// The rows of K experts of a sample, as a thread of the generalised expert loss reads them.
#pragma once

#include "losses/cuda_call.h"
#include "losses/cuda_rows.h"
#include "losses/cuda_stream.h"
#include "losses/cuda_vectors.h"

namespace shike {
namespace {

constexpr int kExpertChunk = 4;   // classes: lanes next to each other read biases next to each other
constexpr int kMostTemplates = 4;  // experts: a divergence of more takes the kernels for kMaxExperts

// Which rows a thread serves, and their logits and numbers one by one.
struct ExpertSample {
    const ExpertArguments& call;
    int first_expert;
    int b;

    // Row `number` of the batch times the groups of experts.
    __device__ ExpertSample(const ExpertArguments& arguments, std::int64_t number)
        : call(arguments), first_expert(0), b(int(number)) {
        if (call.together == call.logits.count) return;
        const unsigned groups = unsigned(call.logits.count / call.together), sample = unsigned(number) / groups;
        first_expert = int(unsigned(number) - sample * groups) * call.together;
        b = int(sample);
    }

    __device__ int label() const { return call.label(call.target, first_expert, b); }
    __device__ int label_b() const { return call.label(call.target_b, first_expert, b); }
    __device__ std::int64_t first_place() const { return std::int64_t(b) * call.logits.count + first_expert; }

    __device__ float one(int k, int c) const {
        const std::int64_t stride = call.logits.expert[first_expert + k].class_stride;
        return load_one(row_of(call.logits, k, b), call.logits.dtype, stride, c);
    }
    // scale z + bias, or z if not `adjusted`, or what a masked class has.
    __device__ float row_logit(int k, int c, float z, bool adjusted) const {
        if (adjusted) {
            z = __fmul_rn(z, call.number_of(call.scale, first_expert + k, c, call.scale_of_all));  // as for chunks
            if (call.bias.data != nullptr) z += __ldg(of_expert(call.bias, k) + c);
        }
        return call.mask == nullptr || __ldg(mask() + c) != 0 ? z : call.masked_logit;
    }
    // The divergence's logit.
    __device__ float divergence_logit(int k, int c, float z) const {
        return at_least(row_logit(k, c, z, call.adjusted) * call.inverse_temperature_of(c), kAbsent);
    }

    // Of a given teacher or another view: where its row begins; null where there is none.
    __device__ const char* teacher_row() const {
        const std::int64_t taught = call.taught_row(b);
        if (taught < 0 || (call.teacher != Teacher::kGiven && call.teacher != Teacher::kView)) return nullptr;
        return row_of(teachers(), 0, taught);
    }
    __device__ float teacher_one(const char* row, int c) const {
        const float u = load_one(row, teachers().dtype, teachers().expert[first_expert].class_stride, c);
        return divergence_logit(0, c, u);
    }
    __device__ const Experts& teachers() const {
        return call.teacher == Teacher::kView ? call.logits : call.teacher_logits;
    }

    // Computed anew for each chunk: the compiler would keep all of these in registers, and most calls need none.
    __device__ const float* of_expert(const OfExperts& of, int k) const {
        return call.floats_of(of, first_expert + k + zero());
    }
    __device__ const unsigned char* mask() const { return call.mask + (b + zero()) * call.logits.classes; }

private:
    __device__ const char* row_of(const Experts& of, int k, std::int64_t row) const {
        const Matrix& matrix = of.expert[first_expert + k];
        return static_cast<const char*>(matrix.data) + row * matrix.row_stride * bytes_of(of.dtype);
    }
    __device__ static int zero() {
        int none;
        asm volatile("mov.u32 %0, 0;" : "=r"(none));
        return none;
    }
};

// K is the number of experts, or kMaxExperts, whose last ones are then the last one again and count for nothing.
template <int K, bool kFloat>
struct ExpertRows : ExpertSample {
    static constexpr int N = kExpertChunk;
    using Logits = Rows<K, kFloat, N>;

    Logits logits;
    int first_label, second_label;  // -1: there is none
    int classes;

    __device__ ExpertRows(const ExpertArguments& arguments, std::int64_t number)
        : ExpertSample(arguments, number),
          logits(call.logits.expert + first_expert, call.logits.dtype, b, call.logits.batch, int(call.logits.classes)),
          first_label(label()),
          second_label(label_b()),
          classes(logits.classes) {}

    __device__ bool counts(int k) const { return K <= kMostTemplates || k < call.together; }
    // The expert whose logits the k-th ones are.
    __device__ int source(int k) const { return counts(k) ? k : call.together - 1; }

    // Whether a chunk has classes that are left out.
    __device__ bool is_special(int c) const {
        return !logits.inside(c) || holds<N>(c, first_label) || holds<N>(c, second_label);
    }

    // Replaces what is left out by kAbsent: the labels, and the classes outside the row.
    template <int M>
    __device__ __forceinline__ void leave_out(int c, float (&x)[N][M]) const {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const bool absent = c + i == first_label || c + i == second_label || !in_row(c + i, classes);
#pragma unroll
            for (int k = 0; k < M; ++k) x[i][k] = absent ? kAbsent : x[i][k];
        }
    }

    // z -> scale z + bias; outside the row undefined.
    __device__ __forceinline__ void adjust(int c, float (&x)[N][K]) const {
        scale(c, x);
        if (call.bias.data == nullptr) return;
        float bias[N];
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (k == 0 || call.bias.expert_stride != 0) load_four(of_expert(call.bias, source(k)), c, classes, bias);
#pragma unroll
            for (int i = 0; i < N; ++i) x[i][k] += bias[i];
        }
    }
    __device__ __forceinline__ void scale(int c, float (&x)[N][K]) const {
        if (call.scale.data != nullptr) {
            float scale[N];
            load_four(of_expert(call.scale, 0), c, classes, scale);
#pragma unroll
            for (int k = 0; k < K; ++k) {
                if (k > 0 && call.scale.expert_stride != 0) {  // rare, and slow
#pragma unroll
                    for (int i = 0; i < N; ++i) {
                        scale[i] = load_one_if(in_row(c + i, classes), of_expert(call.scale, source(k)) + c + i);
                    }
                }
#pragma unroll
                for (int i = 0; i < N; ++i) x[i][k] = __fmul_rn(x[i][k], scale[i]);
            }
        } else if (call.scale_of_all != 1) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
#pragma unroll
                for (int i = 0; i < N; ++i) x[i][k] = __fmul_rn(x[i][k], call.scale_of_all);
            }
        }
    }

    // Which classes of a chunk the mask keeps, a byte each.
    __device__ std::uint32_t kept(int c) const { return load_four(mask(), c, classes); }
    __device__ __forceinline__ static void hide(std::uint32_t kept, float masked, float (&x)[N][K]) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
#pragma unroll
            for (int k = 0; k < K; ++k) x[i][k] = (kept >> (8 * i) & 255u) != 0 ? x[i][k] : masked;
        }
    }

    // The divergence's logits from those of the network, or adjusted ones.
    __device__ __forceinline__ void cool(int c, float (&x)[N][K]) const {
        cool_gradient(c, x);
#pragma unroll
        for (int i = 0; i < N; ++i) {
#pragma unroll
            for (int k = 0; k < K; ++k) x[i][k] = at_least(x[i][k], kAbsent);
        }
    }
    // Without a floor: that has no part in gradients.
    __device__ __forceinline__ void cool_gradient(int c, float (&x)[N][K]) const {
        if (call.temperature.data == nullptr && call.inverse_temperature == 1) return;
        float inverse[N] = {call.inverse_temperature, call.inverse_temperature, call.inverse_temperature,
                            call.inverse_temperature};
        if (call.temperature.data != nullptr) {
            load_four(call.floats_of(call.temperature, 0), c, classes, inverse);
#pragma unroll
            for (int i = 0; i < N; ++i) inverse[i] = 1 / inverse[i];
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
#pragma unroll
            for (int k = 0; k < K; ++k) x[i][k] *= inverse[i];
        }
    }

    // The divergence's logits of the teacher beside the experts, or kAbsent where there is none; d: theirs. `row`: of a
    // given teacher, or null. A group that serves more experts has no such one.
    __device__ __forceinline__ void teacher_of(const char* row, int c, const float (&d)[N][K], bool special,
                                               float (&teacher)[N]) const {
#pragma unroll
        for (int i = 0; i < N; ++i) teacher[i] = kAbsent;
        if (call.teacher == Teacher::kMean) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float total = d[i][0];
#pragma unroll
                for (int k = 1; k < K; ++k) total += counts(k) ? d[i][k] : 0;
                teacher[i] = total * call.share;
            }
        }
        if constexpr (K == 1) {
            if (row == nullptr) return;
            float u[N][1];
            load_four(row, teachers().dtype, teachers().expert[first_expert].class_stride, c, classes, teacher);
#pragma unroll
            for (int i = 0; i < N; ++i) u[i][0] = teacher[i];
            if (call.adjusted) adjust(c, u);
            if (call.mask != nullptr) hide(kept(c), call.masked_logit, u);
            cool(c, u);
            if (special) leave_out(c, u);
#pragma unroll
            for (int i = 0; i < N; ++i) teacher[i] = u[i][0];
        }
    }
};

}  // namespace
}  // namespace shike
