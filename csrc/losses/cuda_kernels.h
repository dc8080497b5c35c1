// The CUDA kernels of the expert losses: a group of threads streams a row (cuda_plan.h, cuda_chunks.h), and what the
// threads know is merged in a fixed order.
#pragma once

#include <cstdint>

#include "losses/cuda_plan.h"
#include "losses/cuda_chunks.h"
#include "losses/cuda_rows.h"
#include "losses/call.h"
#include "losses/row_gradient.h"

// What assert() calls; declared here because <cassert> declares it in debug builds only.
extern "C" __host__ __device__ void __assert_fail(const char* assertion, const char* file, unsigned line,
                                                  const char* function) noexcept __attribute__((__noreturn__));

namespace shike {
namespace {

// Which row a thread serves.
struct Place {
    std::int64_t row;
    int thread;  // of the row's group
    int split;   // which of the row's blocks

    __device__ explicit Place(const BlockPlan& plan) {
        const unsigned block = plan.splits == 1 ? blockIdx.x : blockIdx.x / unsigned(plan.splits);
        split = int(blockIdx.x - block * unsigned(plan.splits));
        thread = int(threadIdx.x & unsigned(plan.group - 1));
        row = std::int64_t(block) * plan.rows + (threadIdx.x >> __popc(plan.group - 1));
    }
};

// A target out of range stops the kernel and breaks the context, as torch.nn.functional.cross_entropy does; in release
// builds too, hence not assert().
__device__ __forceinline__ int checked(std::int64_t target, int classes, const char* op) {
    if (target < 0 || target >= classes) __assert_fail("0 <= target && target < C", "losses/cuda_kernels.h", __LINE__, op);
    return int(target);
}

__device__ __forceinline__ float exchanged(float value, int lane_mask) {
    return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

__device__ __forceinline__ TeacherSums exchanged(const TeacherSums& sums, int lane_mask) {
    return {exchanged(sums.pivot, lane_mask), exchanged(sums.sum, lane_mask), exchanged(sums.gap, lane_mask)};
}

// Leaves the merged state of n neighbouring lanes in each of them; n is a power of two.
template <int K>
__device__ __forceinline__ void merge_lanes(ChunkStream<K>& stream, int n) {
    float next[K];
#pragma unroll
    for (int k = 0; k < K; ++k) next[k] = stream.students.pivot[k];
#pragma unroll 1
    for (int mask = n / 2; mask > 0; mask /= 2) {
#pragma unroll
        for (int k = 0; k < K; ++k) next[k] = larger(next[k], exchanged(next[k], mask));
    }
    stream.students.move_pivots(next, true);
#pragma unroll 1
    for (int mask = n / 2; mask > 0; mask /= 2) {
        ChunkStream<K> other = stream;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            other.students.sum[k] = exchanged(stream.students.sum[k], mask);
            other.students.cross[k] = exchanged(stream.students.cross[k], mask);
        }
        other.others = exchanged(stream.others, mask);
        other.held = exchanged(stream.held, mask);
        other.hardest = exchanged(stream.hardest, mask);
        other.chunk = exchanged(stream.chunk, mask);
        stream.merge(other);
    }
}

__device__ __forceinline__ void merge_lanes(SoftmaxState<float>& state, int n) {
#pragma unroll 1
    for (int mask = n / 2; mask > 0; mask /= 2) {
        state.merge({exchanged(state.pivot, mask), exchanged(state.sum, mask), exchanged(state.linear, mask),
                     exchanged(state.count, mask)});
    }
}

// The states of all threads of a row become one, in the order of BlockPlan::participants. True for the one thread that
// then holds it: where several blocks share the row, a thread of the block that finishes last.
template <class State>
__device__ __forceinline__ bool merge_row(State& state, const BlockPlan& plan, const Place& place,
                                          float* partial,     // [B, splits, kWords]
                                          unsigned* tickets)  // [B], zeros
{
    constexpr int kWords = sizeof(State) / sizeof(float);
    __shared__ float of_warps[kMaxBlock / kWarp][kWords];
    float* words = reinterpret_cast<float*>(&state);
    const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp);
#pragma unroll 1
    for (int level = 0; level < 3; ++level) {
        if (level > 0) {
            const int participants = level == 1 ? plan.group / kWarp : plan.splits;
            if (participants <= 1) continue;
            const float* from;
            if (level == 1) {
                if (lane == 0) {
#pragma unroll
                    for (int i = 0; i < kWords; ++i) of_warps[warp][i] = words[i];
                }
                __syncthreads();
                if (place.thread >= kWarp) return false;
                from = of_warps[warp + (lane < participants ? lane : 0)];
            } else {
                float* of_row = partial + place.row * plan.splits * kWords;
                unsigned ticket = 0;
                if (lane == 0) {
#pragma unroll
                    for (int i = 0; i < kWords; ++i) of_row[place.split * kWords + i] = words[i];
                    __threadfence();
                    ticket = atomicAdd(tickets + place.row, 1u);
                }
                if (__shfl_sync(0xffffffffu, ticket, 0) != unsigned(plan.splits - 1)) return false;
                __syncwarp();  // a shuffle does not order memory: what lane 0 knows of is now known to all
                __threadfence();
                from = of_row + (lane < participants ? lane : 0) * kWords;
            }
            state.clear();
            if (lane < participants) {
#pragma unroll
                for (int i = 0; i < kWords; ++i) words[i] = *const_cast<const volatile float*>(from + i);
            }
        }
        merge_lanes(state, plan.participants(level));
    }
    return place.thread == 0;
}

struct DktArguments : DktCall {
    DktOptions<float> options;  // without the factors
    BlockPlan plan;
};

// Replaces what is left out by kAbsent: the target, and the classes outside the row.
template <int N, int K>
__device__ __forceinline__ void leave_out(float (&z)[N][K], int c, int target, int classes) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const bool absent = c + i == target || c + i < 0 || c + i >= classes;
#pragma unroll
        for (int k = 0; k < K; ++k) z[i][k] = absent ? kAbsent : z[i][k];
    }
}

template <int N>
__device__ __forceinline__ bool holds(int c, int number) {
    return unsigned(number - c) < unsigned(N);
}

// Threads that a multiprocessor with 65,536 registers shall hold, in blocks of kMaxBlock or less: enough to cover the
// memory's latency, few enough that nothing is spilled.
constexpr int forward_threads(int experts) {
    return experts == 1 ? 1024 : experts == 2 ? 768 : experts == 3 ? 640 : experts == 4 ? 512 : kMaxBlock;
}
constexpr int backward_threads(int experts) {
    return experts == 1 ? 1024 : experts == 2 ? 768 : experts == 3 ? 512 : experts == 4 ? 384 : kMaxBlock;
}

template <int K>
__global__ void __launch_bounds__(forward_threads(K)) dkt_forward_kernel(const __grid_constant__ DktArguments call,
                                                                float* terms,       // [3, B]
                                                                float* partial,     // [B, splits, words of a stream]
                                                                unsigned* tickets)  // [B], zeros
{
    constexpr int N = chunk_of(K);
    const Place place(call.plan);
    const bool present = place.row < call.logits.batch;
    const std::int64_t b = present ? place.row : 0;
    const int classes = int(call.logits.classes);
    const Rows<K> logits(call.logits.expert, call.logits.dtype, b, classes);
    const int target = checked(call.target.data[b * call.target.stride], classes, "dkt_loss");
    const int end = present ? classes : -N;
    const int stride = call.plan.stride();

    ChunkStream<K> stream;
    stream.clear();
    float z[N][K];
    for (int c = call.plan.first_class(place.thread, place.split, logits.shift); c < end; c += stride) {
        logits.load(c, z);
        if (holds<N>(c, target) || !logits.inside(c)) leave_out(z, c, target, classes);
        stream.add(z, float(c));
    }
    if (!merge_row(stream, call.plan, place, partial, tickets) || !present) return;

    const int held = int(stream.chunk);
    logits.load(held, z);
    leave_out(z, held, target, classes);
    const DktState<float, K> state = stream.state(z);
    float at_target[K], at_hardest[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
        at_target[k] = logits.load_one(k, target);
        at_hardest[k] = 0;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (float(held + i) == state.hardest.number) at_hardest[k] = z[i][k];
        }
    }
    DktSaved<float, K> saved;
    const DktTerms<float> row = finish(state, at_target, at_hardest, with_factors(call.options, call), saved);
    static_cast<DktSaved<float, K>*>(call.saved)[b] = saved;
    terms[b] = row.cross_entropy;
    terms[call.logits.batch + b] = row.hardest;
    terms[2 * call.logits.batch + b] = row.mutual;
}

template <int K>
__global__ void __launch_bounds__(backward_threads(K)) dkt_backward_kernel(const __grid_constant__ DktArguments call,
                                                                 const __grid_constant__ Experts gradient,
                                                                 const float* grad_output) {
    constexpr int N = chunk_of(K);
    const Place place(call.plan);
    if (place.row >= call.logits.batch) return;
    const int classes = int(call.logits.classes);
    const Rows<K> logits(call.logits.expert, call.logits.dtype, place.row, classes);
    Rows<K> gradients(gradient.expert, gradient.dtype, place.row, classes);
    gradients.in_chunks_of(logits);
    const int target = checked(call.target.data[place.row * call.target.stride], classes, "dkt_loss");
    const DktSaved<float, K>& saved = static_cast<const DktSaved<float, K>*>(call.saved)[place.row];
    const int hardest = int(saved.hardest);
    auto row = DktGradient<float, K>::of(saved, with_factors(call.options, call), *grad_output);
    // Both terms are always computed, for they fit into the time that the memory needs. One that is off has a weight of
    // 0; then its factor has to be finite, for logits of minus infinity too.
    const bool both = call.options.hardest_term && call.options.mutual_term;
    if (!call.options.hardest_term) row.teacher_pivot = -kWorst;
    const int stride = call.plan.stride();

    for (int c = call.plan.first_class(place.thread, place.split, logits.shift); c < classes; c += stride) {
        float z[N][K];
        logits.load(c, z);
        if (!both) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
#pragma unroll
                for (int k = 0; k < K; ++k) z[i][k] = larger(z[i][k], kAbsent);
            }
        }
#pragma unroll
        for (int i = 0; i < N; ++i) row.apply(z[i], true, true);
        gradients.store(c, z);
    }
    // Two classes have another gradient. The thread that wrote the wrong one corrects it: its writes keep their order.
    if (call.options.hardest_term && hardest >= 0 && hardest < classes &&
        call.plan.serves(hardest, place.thread, place.split, logits.shift)) {
        float z[K];
#pragma unroll
        for (int k = 0; k < K; ++k) z[k] = logits.load_one(k, hardest);
        row.apply_at_hardest(z, call.options.mutual_term);
#pragma unroll
        for (int k = 0; k < K; ++k) gradients.store_one(k, hardest, z[k]);
    }
    if (call.plan.serves(target, place.thread, place.split, logits.shift)) {
#pragma unroll
        for (int k = 0; k < K; ++k) gradients.store_one(k, target, *grad_output * saved.target_gradient[k]);
    }
}

struct CrossEntropyArguments {
    Experts logits;
    Targets target;
    const float* bias;
    std::int64_t bias_stride;
    float smoothing;
    float* saved;  // [B, 2 K]
    BlockPlan plan;
};

// Row k * B + b.
struct CrossEntropyRow {
    int k;
    std::int64_t b;
    const float* bias;  // [C] or null
    Rows<1> logits;
    int target;

    __device__ CrossEntropyRow(const CrossEntropyArguments& call, std::int64_t row)
        : k(int(row / call.logits.batch)),
          b(row - k * call.logits.batch),
          bias(call.bias == nullptr ? nullptr : call.bias + k * call.bias_stride),
          logits(call.logits.expert + k, call.logits.dtype, b, call.logits.classes),
          target(checked(call.target.data[b * call.target.stride], logits.classes, "expert_cross_entropy")) {}

    // Logits plus bias; what lies outside the row is undefined.
    __device__ __forceinline__ void load(int c, float (&z)[chunk_of(1)][1]) const {
        logits.load(c, z);
        if (bias == nullptr) return;
        const float* from = bias + c;
        if (!logits.inside(c)) {
#pragma unroll
            for (int i = 0; i < chunk_of(1); ++i) {
                if (c + i >= 0 && c + i < logits.classes) z[i][0] += __ldg(from + i);
            }
        } else if (reinterpret_cast<std::uintptr_t>(from) % 16 == 0) {
            const float4 low = __ldg(reinterpret_cast<const float4*>(from));
            const float4 high = __ldg(reinterpret_cast<const float4*>(from) + 1);
            const float both[chunk_of(1)] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int i = 0; i < chunk_of(1); ++i) z[i][0] += both[i];
        } else if (reinterpret_cast<std::uintptr_t>(from) % 8 == 0) {
#pragma unroll
            for (int i = 0; i < chunk_of(1); i += 2) {
                const float2 pair = __ldg(reinterpret_cast<const float2*>(from + i));
                z[i][0] += pair.x;
                z[i + 1][0] += pair.y;
            }
        } else {
#pragma unroll
            for (int i = 0; i < chunk_of(1); ++i) z[i][0] += __ldg(from + i);
        }
    }

    __device__ float at_target() const {
        return logits.load_one(0, target) + (bias == nullptr ? 0.f : __ldg(bias + target));
    }
};

__global__ void __launch_bounds__(kMaxBlock)
    cross_entropy_forward_kernel(const __grid_constant__ CrossEntropyArguments call,
                                 float* terms,       // [K B]
                                 float* partial,     // [K B, splits, words of a state]
                                 unsigned* tickets)  // [K B], zeros
{
    const Place place(call.plan);
    const int experts = call.logits.count;
    const bool present = place.row < experts * call.logits.batch;
    const CrossEntropyRow row(call, present ? place.row : 0);
    const int classes = row.logits.classes;
    const bool smoothing = call.smoothing != 0;
    const int end = present ? classes : -chunk_of(1);
    const int stride = call.plan.stride();

    SoftmaxState<float> state;
    state.clear();
    for (int c = call.plan.first_class(place.thread, place.split, row.logits.shift); c < end; c += stride) {
        float z[chunk_of(1)][1], chunk[chunk_of(1)];
        row.load(c, z);
#pragma unroll
        for (int i = 0; i < chunk_of(1); ++i) chunk[i] = z[i][0];
        if (row.logits.inside(c)) {
            state.add(chunk, 0.f, 0.f, 1.f, smoothing);
        } else {
#pragma unroll
            for (int i = 0; i < chunk_of(1); ++i) {
                const float one[1] = {chunk[i]};
                if (c + i >= 0 && c + i < classes) state.add(one, 0.f, 0.f, 1.f, smoothing);
            }
        }
    }
    if (!merge_row(state, call.plan, place, partial, tickets) || !present) return;

    float* saved = call.saved + row.b * 2 * experts + row.k;
    saved[0] = state.pivot;
    saved[experts] = 1 / state.sum;
    terms[place.row] = finish(state, row.at_target(), call.smoothing, float(classes));
}

__global__ void __launch_bounds__(kMaxBlock)
    cross_entropy_backward_kernel(const __grid_constant__ CrossEntropyArguments call,
                                  const __grid_constant__ Experts gradient, const float* grad_output) {
    const Place place(call.plan);
    const int experts = call.logits.count;
    if (place.row >= experts * call.logits.batch) return;
    const CrossEntropyRow row(call, place.row);
    const int classes = row.logits.classes;
    Rows<1> gradients(gradient.expert + row.k, gradient.dtype, row.b, classes);
    gradients.in_chunks_of(row.logits);
    const float scale = *grad_output / float(call.logits.batch);
    const float everywhere = scale * (call.smoothing / float(classes));
    const float at_target = scale * (1 - call.smoothing);
    const float* saved = call.saved + row.b * 2 * experts + row.k;
    const float pivot = saved[0], p_scale = scale * saved[experts];
    const int stride = call.plan.stride();

    for (int c = call.plan.first_class(place.thread, place.split, row.logits.shift); c < classes; c += stride) {
        float z[chunk_of(1)][1];
        row.load(c, z);
#pragma unroll
        for (int i = 0; i < chunk_of(1); ++i) {
            z[i][0] = p_scale * exponential(z[i][0] - pivot) - everywhere;
        }
        gradients.store(c, z);
    }
    // The thread that wrote the target's chunk corrects it: its writes keep their order.
    if (call.plan.serves(row.target, place.thread, place.split, row.logits.shift)) {
        gradients.store_one(0, row.target, p_scale * exponential(row.at_target() - pivot) - everywhere - at_target);
    }
}

constexpr int kSumBlock = 1024;

// Sums each column in a fixed order, in double precision: the terms of many rows differ by orders of magnitude.
__global__ void __launch_bounds__(kSumBlock) sum_kernel(const float* values,  // [columns, rows]
                                                        std::int64_t rows, int columns,
                                                        double weight0, double weight1, double weight2,
                                                        const double* factors,  // [2], of weights 1 and 2, or null
                                                        float* loss,   // the sum of the weighted sums
                                                        float* terms)  // [columns], the weighted sums, or null
{
    __shared__ double of_warps[kSumBlock / kWarp];
    double total = 0;
    for (int column = 0; column < columns; ++column) {
        double sum = 0;
#pragma unroll 4
        for (std::int64_t row = threadIdx.x; row < rows; row += kSumBlock) sum += values[column * rows + row];
        for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
        __syncthreads();  // of_warps may still be in use for the column before
        if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = sum;
        __syncthreads();
        if (threadIdx.x >= kWarp) continue;
        sum = of_warps[threadIdx.x];
        for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
        sum *= column == 0 ? weight0 : column == 1 ? weight1 : weight2;
        if (column > 0 && factors != nullptr) sum *= factors[column - 1];
        total += sum;
        if (threadIdx.x == 0 && terms != nullptr) terms[column] = float(sum);
    }
    if (threadIdx.x == 0) *loss = float(total);
}

}  // namespace
}  // namespace shike
