// The CUDA kernels of dkt_loss.
//
//   forward    streams every row once and leaves a DktRow of it, one for each of the row's blocks
//   end        a thread a row: the row's terms, what the backward needs, and the sums over the batch
//   backward   streams every row again and writes the gradient
//   both       keeps the rows in shared memory: terms, what the backward needs, and the gradient, from one reading
#pragma once

#include "losses/cuda_call.h"
#include "losses/cuda_general.h"
#include "losses/cuda_gradient.h"
#include "losses/cuda_merge.h"
#include "losses/cuda_rows.h"
#include "losses/cuda_staged.h"
#include "losses/cuda_stream.h"
#include "losses/cuda_sum.h"
#include "losses/row_gradient.h"

namespace shike {
namespace {

// Threads that a multiprocessor with 65,536 registers shall hold, in blocks of kMaxBlock or less: enough to cover the
// memory's latency, few enough that nothing is spilled.
constexpr int forward_threads(int experts) {
    return experts == 1 ? 1024 : experts <= 3 ? 768 : experts == 4 ? 512 : kMaxBlock;
}
constexpr int backward_threads(int experts) {
    return experts == 1 ? 1024 : experts == 2 ? 768 : experts == 3 ? 640 : experts == 4 ? 512 : kMaxBlock;
}

// Replaces what is left out by kAbsent: the target, and the classes outside the row.
template <int N, int K>
__device__ __forceinline__ void leave_out(float (&z)[N][K], int c, int target, int classes) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const bool absent = c + i == target || unsigned(c + i) >= unsigned(classes);
#pragma unroll
        for (int k = 0; k < K; ++k) z[i][k] = absent ? kAbsent : z[i][k];
    }
}

// All classes of a thread.
template <int K, bool kFloat, class Keep>
__device__ __forceinline__ DktStream<K, kFloat> streamed(const Rows<K, kFloat>& logits, const BlockPlan& plan,
                                                 const Place& place, bool present, int target, Keep keep) {
    constexpr int N = Rows<K, kFloat>::N;
    DktStream<K, kFloat> stream;
    stream.clear();
    const int first = present ? plan.first_class(place.thread, place.split, logits.shift) : logits.classes;
    for_chunks<1>(logits, first, plan.stride, keep,
               [&](int c, float(&z)[N][K]) {
                   if (!logits.inside(c) || holds<N>(c, target)) leave_out(z, c, target, logits.classes);
                   stream.add(z, c);
               });
    return stream;
}

// What the first thread of a row's group knows at the end, from the merged stream; the held-out chunk's classes are
// taken one by one, each by a lane.
template <int K, bool kFloat>
__device__ __forceinline__ DktRow<K> ended(const DktStream<K, kFloat>& stream, const Rows<K, kFloat>& logits, int thread,
                                           int target) {
    constexpr int N = Rows<K, kFloat>::N;
    const int c = stream.chunk + thread;
    const bool present = thread < N && unsigned(c) < unsigned(logits.classes) && c != target;
    float z[K];
#pragma unroll
    for (int k = 0; k < K; ++k) z[k] = present ? logits.load_one(k, c) : kAbsent;
    float hardest = total_of(z);
    int number = present ? c : int(kNoClass);
#pragma unroll
    for (int mask = N / 2; mask > 0; mask /= 2) {
        const float others_hardest = exchanged(hardest, mask);
        const int others_number = exchanged(number, mask);
        const bool harder = others_hardest > hardest || (others_hardest == hardest && others_number < number);
        hardest = harder ? others_hardest : hardest;
        number = harder ? others_number : number;
    }
    const OneClass<K, kFloat> one(z, stream.pivot);
    const bool joins = present && c != number;
    float sums[2] = {joins ? one.strongest : 0, joins ? one.strongest * one.gap : 0};
    add_lanes(sums, N);

    const float factor = Exponential<kFloat>::missing(stream.pivot);
    DktRow<K> row;
    row.pivot = stream.pivot;
    row.teacher_sum = (stream.teacher_sum + sums[0]) * factor;
    row.teacher_gap = (stream.teacher_gap + sums[1]) * factor;
    row.hardest = float(number);
    const int source = int(threadIdx.x % kWarp) - thread % kWarp + (number - stream.chunk) % N;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        row.sum[k] = stream.sum[k] * factor;
        row.cross[k] = stream.cross[k] * factor;
        row.at_hardest[k] = __shfl_sync(0xffffffffu, z[k], source);
        row.at_target[k] = logits.load_one(k, target);
    }
    return row;
}

template <int K, bool kFloat>
__global__ void __launch_bounds__(forward_threads(K)) dkt_forward_kernel(const __grid_constant__ DktArguments call,
                                                                         DktRow<K>* rows,   // [splits, B]
                                                                         unsigned* ticket)  // of the end; zeroed here
{
    const Place place(call.plan);
    if (blockIdx.x == 0 && threadIdx.x == 0) *ticket = 0;
    const bool present = place.row < call.logits.batch;
    const std::int64_t b = present ? place.row : 0;
    const int target = target_of(call.target, b, call.logits.classes);
    const Rows<K, kFloat> logits(call.logits.expert, call.logits.dtype, b, call.logits.batch, int(call.logits.classes));
    DktStream<K, kFloat> stream = streamed(logits, call.plan, place, present, target, KeepNothing{});
    const Place end = Place::anew(call.plan);
    if (!merge_block(stream, call.plan, end.thread)) return;
    check_target(target, "dkt_loss");
    const DktRow<K> row = ended(stream, logits, end.thread, target);
    if (end.thread == 0 && end.row < call.logits.batch) rows[end.split * call.logits.batch + end.row] = row;
}

// ---- the end

// One warp; thread i ends row 32 * blockIdx.x + i.
template <int K>
__global__ void __launch_bounds__(kWarp) dkt_end_kernel(const __grid_constant__ DktArguments call,
                                                        const DktRow<K>* rows,  // [splits, B]; null: ended already
                                                        float* terms,           // [3, B] of those
                                                        float* kept,            // [B] of those; NaN: to be ended here
                                                        double* sums,           // [3, blocks]
                                                        unsigned* ticket,       // 0
                                                        float* loss, float* weighted)
{
    using Rows = Staged<int(sizeof(DktRow<K>) / 4)>;
    using Saved = Staged<int(sizeof(DktSaved<float, K>) / 4)>;
    constexpr int kStaged = int(sizeof(DktRow<K>) > sizeof(DktSaved<float, K>) ? sizeof(DktRow<K>)
                                                                             : sizeof(DktSaved<float, K>));
    __shared__ float stage[kWarp * kStaged / 4];
    const std::int64_t first = std::int64_t(blockIdx.x) * kWarp, b = first + threadIdx.x, batch = call.logits.batch;
    const int present_rows = batch - first < kWarp ? int(batch - first) : kWarp;
    const bool present = b < batch;
    const int classes = int(call.logits.classes);
    const DktOptions<float> options = with_factors(call.options, call);

    DktState<float, K> state;
    float at_target[K], at_hardest[K];
    bool again;
    if (rows != nullptr) {
        DktRow<K> row;
#pragma unroll 1
        for (int split = 0; split < call.plan.splits; ++split) {
            Rows::template load<DktRow<K>::kWords>(stage, rows + split * batch + first, present_rows);
            DktRow<K> part;
            float* words = reinterpret_cast<float*>(&part);
#pragma unroll
            for (int i = 0; i < DktRow<K>::kWords; ++i) words[i] = present ? Rows::word(stage, i) : 0;
            __syncwarp();
            if (split == 0) {
                row = part;
            } else {
                row.merge(part);
            }
        }
        again = present && !row.trusted(options.hardest_term, classes);
        state = row.state();
#pragma unroll
        for (int k = 0; k < K; ++k) {
            at_target[k] = row.at_target[k];
            at_hardest[k] = row.at_hardest[k];
        }
    } else {
        again = present && kept[b] != kept[b];
    }
#pragma unroll 1
    for (unsigned left = __ballot_sync(0xffffffffu, again); left != 0;) {
        const int lane = kWarp - 1 - __clz(int(left));
        left ^= 1u << lane;
        const int target = int(call.target.data[(first + lane) * call.target.stride]);
        const DktState<float, K> general = general_state<K>(call.logits, first + lane, target);
        if (int(threadIdx.x) == lane) {
            state = general;
            const bool found = general.hardest.number < float(classes);  // not so where logits are NaN
#pragma unroll
            for (int k = 0; k < K; ++k) {
                at_target[k] = logit(call.logits, k, b, target);
                at_hardest[k] = found ? logit(call.logits, k, b, std::int64_t(general.hardest.number)) : 0;
            }
        }
        __syncwarp();
    }

    DktTerms<float> of_row{};
    if (present && (rows != nullptr || again)) {
        DktSaved<float, K> saved;
        of_row = finish(state, at_target, at_hardest, options, saved);
        if (rows != nullptr) {
            const float* words = reinterpret_cast<const float*>(&saved);
#pragma unroll
            for (int i = 0; i < int(sizeof(saved) / 4); ++i) Saved::word(stage, i) = words[i];
        } else {
            static_cast<DktSaved<float, K>*>(call.saved)[b] = saved;
        }
    } else if (present) {
        of_row = {terms[b], terms[batch + b], terms[2 * batch + b]};
    }
    if (rows != nullptr) {
        Saved::store(stage, static_cast<DktSaved<float, K>*>(call.saved) + first, present_rows);
    }
    const double of_lane[3] = {of_row.cross_entropy, of_row.hardest, of_row.mutual};
    const double weights[3] = {1.0 / double(batch), call.hardest_weight, call.mutual_weight};
    sum_over_blocks<3>(of_lane, sums, ticket, weights, call.factors, loss, weighted);
}

// ---- the backward

template <int K, bool kFloat>
__global__ void __launch_bounds__(backward_threads(K)) dkt_backward_kernel(const __grid_constant__ DktArguments call,
                                                                           const __grid_constant__ Experts gradient,
                                                                           const float* grad_output,
                                                                           const float* kept,  // [B] or null
                                                                           float* expected)    // [] or null
{
    constexpr int N = Rows<K, kFloat>::N;
    const Place place(call.plan);
    const float scale = *grad_output;
    if (expected != nullptr && isfinite(scale) && blockIdx.x == 0 && threadIdx.x == 0) *expected = scale;
    if (place.row >= call.logits.batch) return;
    const std::int64_t b = call.logits.batch - 1 - place.row;  // what was read last is still in the cache
    if (kept != nullptr && kept[b] == scale) return;
    const int classes = int(call.logits.classes);
    const Rows<K, kFloat> logits(call.logits.expert, call.logits.dtype, b, call.logits.batch, classes);
    Rows<K, kFloat> gradients(gradient.expert, gradient.dtype, b, call.logits.batch, classes);
    gradients.in_chunks_of(logits);
    const int target = target_of(call.target, b, classes);
    check_target(target, "dkt_loss");
    const DktSaved<float, K>& saved = static_cast<const DktSaved<float, K>*>(call.saved)[b];
    const DktOptions<float> options = with_factors(call.options, call);

    bool one_pivot = true;
#pragma unroll
    for (int k = 1; k < K; ++k) one_pivot &= saved.pivot[k] == saved.pivot[0];
    if (!one_pivot) {
        auto row = DktGradient<float, K>::of(saved, options, scale);
        if (!options.hardest_term) row.teacher_pivot = -kWorst;  // the factor has to be finite
        const int hardest = int(saved.hardest), threads = call.plan.group * call.plan.splits;
#pragma unroll 1
        for (int c = place.split * call.plan.group + place.thread; c < classes; c += threads) {
            float z[K];
#pragma unroll
            for (int k = 0; k < K; ++k) z[k] = larger(logits.load_one(k, c), kAbsent);
            if (options.hardest_term && c == hardest) {
                row.apply_at_hardest(z, options.mutual_term);
            } else {
                row.apply(z, true, true);
            }
#pragma unroll
            for (int k = 0; k < K; ++k) {
                gradients.store_one(k, c, c == target ? scale * saved.target_gradient[k] : z[k]);
            }
        }
        return;
    }

    const GradientOfRow<K, kFloat> row(saved, options, scale);
    const int first = call.plan.first_class(place.thread, place.split, logits.shift);
    for_chunks<1>(logits, first, call.plan.stride, KeepNothing{}, [&](int c, float(&z)[N][K]) {
        row.apply(z);
        gradients.store(c, z);
    });
    row.correct(call.plan, place, gradients, saved, scale, target,
                [&](int k) { return logits.load_one(k, int(saved.hardest)); });
}

// ---- both

constexpr int kMostRows = kUsualBlock / kSmallestGroup;  // of a block

// Shared memory of dkt_both_kernel beside the packets, or a little more.
constexpr int fixed_shared_bytes(int experts) {
    return (kMaxBlock / kWarp) * (2 * experts + 7) * 4 + kMostRows * ((6 * experts + 4) * 4 + 1) + 64;
}

template <int K, bool kFloat>
__global__ void __launch_bounds__(kMaxBlock, forward_threads(K) / kMaxBlock)
    dkt_both_kernel(const __grid_constant__ DktArguments call, const __grid_constant__ Experts gradient,
                    const float* expected,  // [], what grad_output may be
                    float* kept,            // [B], the grad_output of the gradient that is written; NaN: none is
                    float* terms,           // [3, B]
                    unsigned* ticket,       // of the end; zeroed here
                    // Bytes of shared memory from expert to expert, and for each class between two chunks of a thread.
                    int of_expert, int of_class)
{
    using R = Rows<K, kFloat>;
    constexpr int N = R::N;
    extern __shared__ uint4 packets[];  // by chunk, expert and thread; no thread looks at another's
    __shared__ DktSaved<float, K> of_rows[kMostRows];
    __shared__ float hardest_of_rows[kMostRows][K];  // their logits
    __shared__ float scale_of_rows[kMostRows];       // grad_output; NaN: the row is not trusted
    const Place place(call.plan);
    if (blockIdx.x == 0 && threadIdx.x == 0) *ticket = 0;
    const std::int64_t batch = call.logits.batch;
    const std::int64_t b = place.row < batch ? place.row : 0;
    const int classes = int(call.logits.classes);
    const int target = target_of(call.target, b, classes);
    const R logits(call.logits.expert, call.logits.dtype, b, call.logits.batch, classes);
    const int first = call.plan.first_class(place.thread, 0, logits.shift), stride = call.plan.stride;
    char* const of_thread = reinterpret_cast<char*>(packets) + int(threadIdx.x * R::kPacket) - first * of_class;
    const auto packet = [&](int c, int k) { return of_thread + c * of_class + k * of_expert; };
    DktStream<K, kFloat> stream = streamed(logits, call.plan, place, place.row < batch, target, [&](const typename R::Words& words, int c) {
#pragma unroll
        for (int k = 0; k < K; ++k) store_shared_words(packet(c, k), words[k]);
    });
    check_target(target, "dkt_loss");
    const DktOptions<float> options = with_factors(call.options, call);
    const Place end = Place::anew(call.plan);
    const bool present = end.row < batch;
    if (merge_block(stream, call.plan, end.thread)) {
        const DktRow<K> row = ended(stream, logits, end.thread, target);
        if (end.thread == 0 && present) {
            const float scale = row.trusted(options.hardest_term, classes) ? *expected : __int_as_float(0x7fffffff);
            scale_of_rows[end.of_block] = kept[end.row] = scale;
            DktSaved<float, K> saved;
            const DktTerms<float> of_row = finish(row.state(), row.at_target, row.at_hardest, options, saved);
            of_rows[end.of_block] = saved;
#pragma unroll
            for (int k = 0; k < K; ++k) hardest_of_rows[end.of_block][k] = row.at_hardest[k];
            static_cast<DktSaved<float, K>*>(call.saved)[end.row] = saved;
            terms[end.row] = of_row.cross_entropy;
            terms[batch + end.row] = of_row.hardest;
            terms[2 * batch + end.row] = of_row.mutual;
        }
    }
    __syncthreads();
    if (!present) return;
    const float scale = scale_of_rows[end.of_block];
    if (scale != scale) return;

    R gradients(gradient.expert, gradient.dtype, end.row, batch, classes);
    gradients.in_chunks_of(logits);
    const DktSaved<float, K>& saved = of_rows[end.of_block];
    const GradientOfRow<K, kFloat> row(saved, options, scale);
#pragma unroll 1
    for (int c = first; c < classes; c += stride) {
        typename R::Words words;
#pragma unroll
        for (int k = 0; k < K; ++k) load_shared_words(packet(c, k), words[k]);
        float z[N][K];
        logits.widen(words, z);
        row.apply(z);
        gradients.store(c, z);
    }
    row.correct(call.plan, end, gradients, saved, scale, target, [&](int k) { return hardest_of_rows[end.of_block][k]; });
}

}  // namespace
}  // namespace shike
