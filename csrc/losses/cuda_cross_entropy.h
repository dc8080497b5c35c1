// The CUDA kernels of expert_cross_entropy. Each expert has its own rows: row k B + b.
//
//   forward    streams every row once and leaves a CrossEntropyPart of it, one for each of the row's blocks
//   end        a thread a sample: the losses of its rows, what the backward needs, and the sum over the batch
//   backward   streams every row again and writes the gradient
#pragma once

#include "losses/cuda_call.h"
#include "losses/cuda_merge.h"
#include "losses/cuda_rows.h"
#include "losses/cuda_staged.h"
#include "losses/cuda_stream.h"
#include "losses/cuda_sum.h"
#include "losses/row_gradient.h"

namespace shike {
namespace {

// With a bias a chunk has 4 classes, so that lanes next to each other read biases next to each other.
SHIKE_HD constexpr int cross_entropy_chunk(bool four_bytes, bool biased) { return four_bytes || biased ? 4 : 8; }
constexpr int kChunksAhead = 2;

template <bool kFloat, bool kBias>
struct CrossEntropyRow {
    static constexpr int N = cross_entropy_chunk(kFloat, kBias);
    using Logits = Rows<1, kFloat, N>;

    int k;
    std::int64_t b;
    const float* bias;  // [C]
    Logits logits;
    int target;

    __device__ CrossEntropyRow(const CrossEntropyArguments& call, std::int64_t row)
        : k(int(row / call.logits.batch)),
          b(row - k * call.logits.batch),
          bias(call.bias + k * call.bias_stride),
          logits(call.logits.expert + k, call.logits.dtype, b, call.logits.batch, int(call.logits.classes)),
          target(target_of(call.target, b, call.logits.classes)) {}

    // Adds the bias; what lies outside the row is undefined.
    __device__ __forceinline__ void add_bias(int c, float (&z)[N][1]) const {
        if constexpr (kBias) {
            if (!logits.inside(c, bytes_above(-logits.shift) == 0 ? 0 : N)) {
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    if (unsigned(c + i) < unsigned(logits.classes)) z[i][0] += __ldg(bias + c + i);
                }
                return;
            }
            const unsigned bytes = bytes_above(c);
            const uint4* from = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(bias + c) - bytes);
            const uint4 low = __ldg(from);
            if (bytes == 0) {
                add<0>(low, low, z);
                return;
            }
            const uint4 high = __ldg(from + 1);  // the distance is the same for all chunks of a row
            if (bytes == 4) add<1>(low, high, z);
            if (bytes == 8) add<2>(low, high, z);
            if (bytes == 12) add<3>(low, high, z);
        }
    }

    __device__ float at_target() const {
        check_target(target, "expert_cross_entropy");
        return logits.load_one(0, target) + (kBias ? __ldg(bias + target) : 0.f);
    }

private:
    // Adds 4 of 8 words, from this one on.
    template <int kFirst>
    __device__ static void add(uint4 low, uint4 high, float (&z)[N][1]) {
        const std::uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) z[i][0] += __uint_as_float(words[kFirst + i]);
    }

    // How far the bias of a class lies above a boundary of 16 bytes.
    __device__ unsigned bytes_above(int c) const { return unsigned(reinterpret_cast<std::uintptr_t>(bias + c)) & 15u; }
};

// Cross-entropy of one row, as a thread knows it. Logits and biases of minus infinity are legal.
struct SoftmaxStream {
    float pivot;   // no more than kMostOfChunk below the largest logit; kFloor before there is one
    float sum;     // of exp(z - pivot)
    float linear;  // of z - pivot, for label smoothing
    int count;     // of classes, for label smoothing

    // Classes that are left out have the logit kAbsent.
    template <int N>
    SHIKE_DEVICE void add(const float (&z)[N][1]) {
        if (pivot == kFloor) raise_to(largest(z));
        float exponentials[N];
        exponentials_of(z, exponentials);
        if (exponentials[0] > kMostOfChunk) {
            raise_to(largest(z));
            exponentials_of(z, exponentials);
        }
        sum += exponentials[0];
    }

    template <int N>
    SHIKE_DEVICE void add_linear(const float (&z)[N][1]) {
        float parts[N];
#pragma unroll
        for (int i = 0; i < N; ++i) parts[i] = z[i][0] - pivot;
        tree_sum(parts);
        linear += parts[0];
        count += N;
    }

    SHIKE_DEVICE SoftmaxState<float> state() const { return {pivot, sum, linear, float(count)}; }

private:
    SHIKE_DEVICE void raise_to(float largest) {
        const float next = larger(pivot, largest);
        sum *= Exponential<true>::moved(pivot, next);
        linear += float(count) * (pivot - next);
        pivot = next;
    }

    // The first becomes the sum of all.
    template <int N>
    SHIKE_DEVICE void exponentials_of(const float (&z)[N][1], float (&exponentials)[N]) const {
#pragma unroll
        for (int i = 0; i < N; ++i) exponentials[i] = Exponential<true>::of(z[i][0], pivot);
        tree_sum(exponentials);
    }

    template <int N>
    SHIKE_DEVICE static void tree_sum(float (&values)[N]) {
#pragma unroll
        for (int half = N / 2; half > 0; half /= 2) {
#pragma unroll
            for (int i = 0; i < half; ++i) values[i] += values[i + half];
        }
    }
};

struct CrossEntropyPart {
    SoftmaxState<float> state;
    float at_target;
};

template <bool kFloat, bool kBias, bool kSmoothing>
__global__ void __launch_bounds__(kMaxBlock, 4)
    cross_entropy_forward_kernel(const __grid_constant__ CrossEntropyArguments call,
                                 CrossEntropyPart* parts,  // [splits, K B]
                                 unsigned* ticket)         // of the end; zeroed here
{
    constexpr int N = cross_entropy_chunk(kFloat, kBias);
    const Place place(call.plan);
    if (blockIdx.x == 0 && threadIdx.x == 0) *ticket = 0;
    const std::int64_t rows = call.logits.count * call.logits.batch;
    const bool present = place.row < rows;
    const CrossEntropyRow<kFloat, kBias> row(call, present ? place.row : 0);
    const int classes = row.logits.classes;

    SoftmaxStream stream{kFloor, 0, 0, 0};
    const int first = present ? call.plan.first_class(place.thread, place.split, row.logits.shift) : classes;
    for_chunks<kChunksAhead>(
        row.logits, first, call.plan.stride, KeepNothing{},
        [&](int c, float(&z)[N][1]) {
            row.add_bias(c, z);
            const bool whole = row.logits.inside(c);
            if (!whole) {
#pragma unroll
                for (int i = 0; i < N; ++i) z[i][0] = unsigned(c + i) < unsigned(classes) ? z[i][0] : kAbsent;
            }
            stream.add(z);
            if (kSmoothing && whole) stream.add_linear(z);
            if (kSmoothing && !whole) {
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const float one[1][1] = {{z[i][0]}};
                    if (unsigned(c + i) < unsigned(classes)) stream.add_linear(one);
                }
            }
        });
    SoftmaxState<float> state = stream.state();
    if (!merge_block(state, call.plan, place.thread) || place.thread != 0 || !present) return;
    parts[place.split * rows + place.row] = {state, row.at_target()};
}

// One warp; thread i ends the rows of sample 32 * blockIdx.x + i.
__global__ void __launch_bounds__(kWarp) cross_entropy_end_kernel(const __grid_constant__ CrossEntropyArguments call,
                                                                  const CrossEntropyPart* parts,  // [splits, K B]
                                                                  double* sums,                   // [blocks]
                                                                  unsigned* ticket,               // 0
                                                                  float* loss)
{
    constexpr int kWords = int(sizeof(CrossEntropyPart) / 4);
    using Parts = Staged<kWords>;
    __shared__ float stage[kWarp * kWords], saved[kWarp * (2 * kMaxExperts + 1)];
    const std::int64_t batch = call.logits.batch, first = std::int64_t(blockIdx.x) * kWarp;
    const int present_rows = batch - first < kWarp ? int(batch - first) : kWarp, experts = call.logits.count;
    const int lane = int(threadIdx.x), of_sample = 2 * experts;
    double total[1] = {0};
#pragma unroll 1
    for (int k = 0; k < experts; ++k) {
        SoftmaxState<float> state{};
        float at_target = 0;
#pragma unroll 1
        for (int split = 0; split < call.plan.splits; ++split) {
            Parts::load<kWords>(stage, parts + (std::int64_t(split) * experts + k) * batch + first, present_rows);
            if (lane < present_rows) {
                const SoftmaxState<float> part{Parts::word(stage, 0), Parts::word(stage, 1), Parts::word(stage, 2),
                                               Parts::word(stage, 3)};
                at_target = Parts::word(stage, 4);
                if (split == 0) {
                    state = part;
                } else {
                    merge(state, part);
                }
            }
            __syncwarp();
        }
        if (lane < present_rows) {
            total[0] += finish(state, at_target, call.smoothing, float(call.logits.classes));
            saved[lane * (of_sample + 1) + k] = state.pivot;
            saved[lane * (of_sample + 1) + experts + k] = 1 / state.sum;
        }
    }
    __syncwarp();
    for (int i = lane; i < present_rows * of_sample; i += kWarp) {
        call.saved[first * of_sample + i] = saved[i / of_sample * (of_sample + 1) + i % of_sample];
    }
    const double weight[1] = {1.0 / double(batch)};
    sum_over_blocks<1>(total, sums, ticket, weight, nullptr, loss, nullptr);
}

template <bool kFloat, bool kBias>
__global__ void __launch_bounds__(kMaxBlock, 4)
    cross_entropy_backward_kernel(const __grid_constant__ CrossEntropyArguments call,
                                  const __grid_constant__ Experts gradient, const float* grad_output) {
    constexpr int N = cross_entropy_chunk(kFloat, kBias);
    const Place place(call.plan);
    const int experts = call.logits.count;
    const std::int64_t rows = experts * call.logits.batch;
    if (place.row >= rows) return;
    const CrossEntropyRow<kFloat, kBias> row(call, rows - 1 - place.row);  // what was read last is still in the cache
    const int classes = row.logits.classes;
    Rows<1, kFloat, N> gradients(gradient.expert + row.k, gradient.dtype, row.b, call.logits.batch, classes);
    gradients.in_chunks_of(row.logits);
    const float scale = *grad_output / float(call.logits.batch);
    const float everywhere = scale * (call.smoothing / float(classes));
    const float at_target = scale * (1 - call.smoothing);
    const float* saved = call.saved + row.b * 2 * experts + row.k;
    const float pivot = saved[0], p_scale = scale * saved[experts];
    const auto gradient_of = [&](float z) {
        return fmaf(p_scale, Exponential<true>::of(z, pivot), -everywhere);
    };

    const int first = call.plan.first_class(place.thread, place.split, row.logits.shift);
    for_chunks<kChunksAhead>(row.logits, first, call.plan.stride, KeepNothing{},
                             [&](int c, float(&z)[N][1]) {
                                 row.add_bias(c, z);
#pragma unroll
                                 for (int i = 0; i < N; ++i) z[i][0] = gradient_of(z[i][0]);
                                 gradients.store(c, z);
                             });
    // The thread that wrote the target's chunk corrects it: its writes keep their order.
    if (call.plan.serves(row.target, place.thread, place.split, row.logits.shift)) {
        gradients.store_one(0, row.target, gradient_of(row.at_target()) - at_target);
    }
}

}  // namespace
}  // namespace shike
