// The CUDA kernels of the generalised expert loss that stream rows. A group of threads serves K experts of a sample: all
// of them, or a part of them where nothing connects them. The labels' classes are left out, and join in at the end
// (expert_row.h).
//
//   forward    streams every row once; leaves an ExpertPart of it, and a DivergencePart, for each of the row's blocks
//   end        a thread an expert and sample (cuda_expert_end.h)
//   backward   streams every row again and writes the gradient
#pragma once

#include <type_traits>

#include "losses/cuda_expert_row.h"
#include "losses/cuda_expert_stream.h"
#include "losses/expert_row.h"

namespace shike {
namespace {

// What is known of an expert's row, or of a block's part of it.
struct alignas(16) ExpertPart {
    static constexpr int kWords = 8;

    float pivot, sum, linear, count;
    float at_label, at_label_b;  // row logits; kAbsent: there is no such label
    float wrong;                 // 1 where a logit of this part, or that of the second label, beats the first label's
    float unused;
};

struct alignas(16) DivergencePart {
    static constexpr int kWords = 12;

    float pivot, sum, cross;
    float at_label, at_label_b;  // logits of the divergence
    float teacher_pivot, teacher_sum, teacher_at_label, teacher_at_label_b;
    float unused[3];
};

// Threads that a multiprocessor shall hold, as in cuda_dkt.h.
constexpr int expert_forward_threads(int experts, bool divergence) {
    if (divergence) return experts == 1 ? 768 : experts <= 3 ? 512 : experts == 4 ? 384 : kMaxBlock;
    return experts == 1 ? 1024 : experts == 2 ? 768 : experts == 3 ? 640 : 512;
}
constexpr int expert_backward_threads(int experts, bool divergence) {
    if (divergence) return experts == 1 ? 768 : experts == 2 ? 512 : experts <= 4 ? 384 : kMaxBlock;
    return experts == 1 ? 1024 : experts == 2 ? 640 : experts == 3 ? 512 : 384;
}
// Chunks under way.
SHIKE_HD constexpr int expert_chunks_ahead(int experts, bool four_bytes, bool divergence) {
    return experts == 1 && !four_bytes && !divergence ? 2 : 1;
}

// ---- whether an answer is right

// The logits at the labels that others may beat, of each of a block's rows.
template <int K>
struct Asked {
    static constexpr int kMostRows = kUsualBlock / kSmallestGroup;
    float own[kMostRows][K];
};

// Bit k: whether a class of the chunk beats the label of expert k.
template <int K, bool kFloat>
__device__ __forceinline__ unsigned beaten(const ExpertRows<K, kFloat>& row, int c, const float (&x)[kExpertChunk][K],
                                           const float (&own)[K]) {
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int i = 0; i < kExpertChunk; ++i) {
            const bool beats = x[i][k] > own[k] || (x[i][k] == own[k] && c + i < row.first_label);
            if (beats && c + i != row.first_label && in_row(c + i, row.classes)) bits |= 1u << k;
        }
    }
    return bits;
}

// The bits that any thread of a row's group has, in each thread of the block.
__device__ __forceinline__ unsigned of_group(unsigned bits, const BlockPlan& plan) {
    __shared__ unsigned of_warps[kMaxBlock / kWarp];
#pragma unroll 1
    for (int mask = plan.lanes() / 2; mask > 0; mask /= 2) bits |= __shfl_xor_sync(0xffffffffu, bits, mask);
    const int warps = plan.warps(), warp = int(threadIdx.x / kWarp);
    if (warps <= 1) return bits;
    if (threadIdx.x % kWarp == 0) of_warps[warp] = bits;
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < warps; ++i) bits |= of_warps[warp / warps * warps + i];
    return bits;
}

// Logits z become those of the divergence without its temperature, and x those of the cross-entropy.
template <int K, bool kFloat>
__device__ __forceinline__ void both_logits(const ExpertRows<K, kFloat>& row, int c, float (&z)[kExpertChunk][K],
                                            float (&x)[kExpertChunk][K]) {
    copy(z, x);
    row.adjust(c, x);
    if (row.call.adjusted) copy(x, z);
    if (row.call.mask == nullptr) return;
    const std::uint32_t kept = row.kept(c);
    row.hide(kept, row.call.masked_logit, x);
    row.hide(kept, row.call.masked_logit, z);
}

// ---- the forward

// Element k, which the compiler does not know.
template <int K>
SHIKE_DEVICE float of_expert(int k, const float (&values)[K]) {
    float value = values[0];
#pragma unroll
    for (int i = 1; i < K; ++i) value = i == k ? values[i] : value;
    return value;
}

template <int K>
SHIKE_DEVICE const ExpertStream<K>& cross_entropy_of(const ExpertStream<K>& streams) { return streams; }
template <int K>
SHIKE_DEVICE const ExpertStream<K>& cross_entropy_of(const ExpertStreams<K>& streams) { return streams.cross_entropy; }

template <int K, bool kFloat, bool kDivergence>
__global__ void __launch_bounds__(expert_forward_threads(K, kDivergence))
    expert_forward_kernel(const __grid_constant__ ExpertArguments call,
                          ExpertPart* parts,            // [splits, B, K]
                          DivergencePart* divergences,  // [splits, B, K]
                          unsigned* ticket)             // of the end; zeroed here
{
    using Row = ExpertRows<K, kFloat>;
    constexpr int N = Row::N;
    __shared__ Asked<K> asked;
    const Place place(call.plan);
    if (blockIdx.x == 0 && threadIdx.x == 0) *ticket = 0;
    const std::int64_t rows = call.logits.count / call.together * call.logits.batch;
    const bool present = place.row < rows;
    const Row row(call, present ? place.row : 0);
    if (call.asks) {
        if (place.thread < K) {
            const int k = row.source(place.thread), label = row.first_label;
            asked.own[place.of_block][place.thread] = label < 0 ? 0 : row.row_logit(k, label, row.one(k, label), true);
        }
        __syncthreads();
    }
    unsigned wrong = 0;

    const char* const teacher_row = kDivergence ? row.teacher_row() : nullptr;
    std::conditional_t<kDivergence, ExpertStreams<K>, ExpertStream<K>> streams;
    if constexpr (kDivergence) {
        streams.cross_entropy.clear();
        streams.divergence.clear(call.teacher != Teacher::kOthers);
        if (K > 1 && call.teacher == Teacher::kOthers) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
                const float weight = call.by_student ? call.kl_weight_of(row.source(k), row.b) : 1;
                streams.divergence.set_student(k, row.counts(k) ? weight : 0);
            }
        }
    } else {
        streams.clear();
    }
    const int first = present ? call.plan.first_class(place.thread, place.split, row.logits.shift) : row.classes;
    for_chunks<expert_chunks_ahead(K, kFloat, kDivergence)>(
        row.logits, first, call.plan.stride, KeepNothing{}, [&](int c, float(&z)[N][K]) {
            const bool special = row.is_special(c);
            if constexpr (!kDivergence) {
                row.adjust(c, z);
                if (call.mask != nullptr) Row::hide(row.kept(c), call.masked_logit, z);
                if (call.asks) wrong |= beaten(row, c, z, asked.own[place.of_block]);
                if (special) row.leave_out(c, z);
                streams.add(z, call.smoothing != 0);
            } else {
                float x[N][K];
                both_logits(row, c, z, x);
                if (call.asks) wrong |= beaten(row, c, x, asked.own[place.of_block]);
                if (call.separate) {
                    if (special) row.leave_out(c, x);
                    streams.cross_entropy.add(x, call.smoothing != 0);
                }
                row.cool(c, z);
                if (special) row.leave_out(c, z);
                float teacher[N];
                row.teacher_of(teacher_row, c, z, special, teacher);
                streams.divergence.add(z, teacher);
            }
        });

    if (call.asks) wrong = of_group(wrong, call.plan);
    const Place end = Place::anew(call.plan);
    if (!merge_block(streams, call.plan, end.thread) || end.thread >= call.together || end.row >= rows) return;

    // A thread an expert.
    const ExpertSample sample(call, end.row);
    const int k = end.thread, a = sample.label(), b = sample.label_b();
    if (call.target.data != nullptr) check_target(a, "expert_loss");
    if (call.target_b.data != nullptr) check_target(b, "expert_loss");
    const bool second = b >= 0 && b != a;
    const float z_a = a < 0 ? 0 : sample.one(k, a), z_b = second ? sample.one(k, b) : 0;
    const ExpertStream<K>& stream = cross_entropy_of(streams);
    ExpertPart part{of_expert(k, stream.pivot), of_expert(k, stream.sum), of_expert(k, stream.linear),
                    stream.count, kAbsent, kAbsent, 0, 0};
    if (a >= 0) part.at_label = sample.row_logit(k, a, z_a, true);
    if (second) part.at_label_b = sample.row_logit(k, b, z_b, true);
    if (call.asks) {
        const float own = part.at_label, other = part.at_label_b;
        const bool loses = own != own || (second && (other > own || (other == own && b < a)));
        part.wrong = loses || (wrong >> k & 1u) != 0 ? 1 : 0;
    }
    const std::int64_t at = end.split * call.logits.count * call.logits.batch + sample.first_place() + k;
    if constexpr (kDivergence) {
        const DivergenceStream<K>& divergence = streams.divergence;
        DivergencePart other{of_expert(k, divergence.pivot), of_expert(k, divergence.sum),
                             of_expert(k, divergence.cross), kAbsent, kAbsent, divergence.teacher_pivot,
                             divergence.teacher_sum, kAbsent, kAbsent, {}};
        if (!call.separate) {
            part.pivot = other.pivot;
            part.sum = other.sum;
        }
        if (a >= 0) other.at_label = sample.divergence_logit(k, a, z_a);
        if (second) other.at_label_b = sample.divergence_logit(k, b, z_b);
        const char* teacher_row = sample.teacher_row();
        if (teacher_row != nullptr && a >= 0) other.teacher_at_label = sample.teacher_one(teacher_row, a);
        if (teacher_row != nullptr && second) other.teacher_at_label_b = sample.teacher_one(teacher_row, b);
        divergences[at] = other;
    }
    parts[at] = part;
}

// ---- the backward

__device__ __forceinline__ const ExpertSaved<float>* saved_of(const ExpertArguments& call, const ExpertSample& sample) {
    return static_cast<const ExpertSaved<float>*>(call.saved) + sample.first_place();
}
// [] or [K, B]
__device__ __forceinline__ float grad_of(const ExpertArguments& call, const ExpertSample& sample,
                                         const float* grad_output, int k) {
    return grad_output[call.of_rows ? (sample.first_expert + k) * call.logits.batch + sample.b : 0];
}

template <int K, bool kFloat, bool kDivergence>
__global__ void __launch_bounds__(expert_backward_threads(K, kDivergence))
    expert_backward_kernel(const __grid_constant__ ExpertArguments call, const __grid_constant__ Experts gradient,
                           const float* grad_output)  // [] or [K, B]
{
    using Row = ExpertRows<K, kFloat>;
    constexpr int N = Row::N;
    const Place place(call.plan);
    const std::int64_t batch = call.logits.batch, rows = call.logits.count / call.together * batch;
    if (place.row >= rows) return;
    const Row row(call, rows - 1 - place.row);  // what was read last is still in the cache
    typename Row::Logits gradients(gradient.expert + row.first_expert, gradient.dtype, row.b, batch, row.classes);
    gradients.in_chunks_of(row.logits);
    const ExpertSaved<float>* saved = saved_of(call, row);

    const int first = call.plan.first_class(place.thread, place.split, row.logits.shift);
    float pivot[K], p_scale[K], everywhere[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const ExpertSaved<float>& of_row = saved[row.source(k)];
        const float scale = grad_of(call, row, grad_output, row.source(k));
        pivot[k] = of_row.pivot;
        p_scale[k] = scale * of_row.p_scale;
        everywhere[k] = scale * of_row.everywhere;
    }
    const auto of_cross_entropy = [&](int c, float(&x)[N][K]) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
                x[i][k] = fmaf(p_scale[k], Exponential<true>::of(x[i][k], pivot[k]), -everywhere[k]);
            }
        }
        row.scale(c, x);
    };
    const auto store = [&](int c, float(&x)[N][K]) {
        if (call.mask != nullptr) Row::hide(row.kept(c), 0, x);
        gradients.store(c, x);
    };
    if constexpr (!kDivergence) {
        for_chunks<expert_chunks_ahead(K, kFloat, kDivergence)>(
            row.logits, first, call.plan.stride, KeepNothing{}, [&](int c, float(&z)[N][K]) {
                row.adjust(c, z);
                of_cross_entropy(c, z);
                store(c, z);
            });
    } else {
        const bool others = K > 1 && call.teacher == Teacher::kOthers;
        const char* teacher_row = row.teacher_row();
        const float teacher_pivot = saved[0].teacher_pivot;
        float kl_pivot[K], slope[K], bend[K], share[K], out[K], student[K], students = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const ExpertSaved<float>& of_row = saved[row.source(k)];
            const float scale = grad_of(call, row, grad_output, row.source(k));
            kl_pivot[k] = of_row.kl_pivot;
            slope[k] = fmaf(scale, of_row.slope, call.separate ? 0 : p_scale[k]);
            bend[k] = scale * of_row.bend;
            out[k] = others ? of_row.out : scale * of_row.share;
            share[k] = row.counts(k) ? scale * of_row.share : 0;
            student[k] = row.counts(k) ? of_row.out : 0;
            students += student[k];
        }
        for_chunks<expert_chunks_ahead(K, kFloat, kDivergence)>(
            row.logits, first, call.plan.stride, KeepNothing{}, [&](int c, float(&z)[N][K]) {
                float x[N][K];
                both_logits(row, c, z, x);
                if (call.separate) of_cross_entropy(c, x);
                row.cool(c, z);
                float teacher[N];
                row.teacher_of(teacher_row, c, z, false, teacher);
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    float mean = 0, common = 0, f[K];
#pragma unroll
                    for (int k = 0; k < K; ++k) {
                        z[i][k] -= kl_pivot[k];
                        f[k] = exponential(z[i][k]);
                        mean = fmaf(student[k], z[i][k], mean);
                        common = fmaf(share[k], f[k], common);
                    }
                    if (!others) common = exponential(teacher[i] - teacher_pivot);
#pragma unroll
                    for (int k = 0; k < K; ++k) {
                        const float own = fmaf(bend[k], fmaf(students, z[i][k], -mean), slope[k]);
                        z[i][k] = fmaf(f[k], own, -out[k] * common);
                    }
                }
                row.cool_gradient(c, z);
                if (call.adjusted) row.scale(c, z);
                if (call.separate) {
#pragma unroll
                    for (int i = 0; i < N; ++i) {
#pragma unroll
                        for (int k = 0; k < K; ++k) z[i][k] += x[i][k];
                    }
                }
                store(c, z);
            });
    }
    // The thread that wrote a label's chunk corrects it: its writes keep their order.
    const Place end = Place::anew(call.plan);
    const ExpertSample sample(call, rows - 1 - end.row);
    const int label[2] = {sample.label(), sample.label_b()};
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        if (label[s] < 0 || (s == 1 && label[1] == label[0])) continue;
        if (!call.plan.serves(label[s], end.thread, end.split, row.logits.shift)) continue;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (K > kMostTemplates && k >= call.together) break;
            gradients.store_one(k, label[s], grad_of(call, sample, grad_output, k) * saved_of(call, sample)[k].at[s]);
        }
    }
}

}  // namespace
}  // namespace shike
