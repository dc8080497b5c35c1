// What the CUDA kernels of depth-wise knowledge fusion share. Their bodies are sequences of steps that all threads of a
// block take, with a barrier after each. A step keeps what it needs later in its thread's state or in the shared memory
// of its team.
#pragma once

#include <cstdint>

#include "fusion/cuda_packet.h"
#include "fusion/cuda_plan.h"

namespace shike {
namespace {

template <class State>
struct BlockTeam {
    float* memory;  // shared
    State state;

    template <class Step>
    SHIKE_DEVICE void each(Step step) {
        step(state, int(threadIdx.x));
        __syncthreads();
    }
};

template <DType kType>
struct WideVector {
    static constexpr int value = 16 / bytes_of(kType);  // channels in 16 bytes
};

// Positions that a thread loads at a time: 64 bytes a map, or 8 single elements.
SHIKE_HD constexpr int unroll_of(int vector) { return vector > 1 ? kFewPositions : kPlaneShare; }

// The same number, unknown to the compiler.
SHIKE_DEVICE int opaque(int number) {
    asm volatile("" : "+r"(number));
    return number;
}

// Which channels and samples a block serves.
struct BlockRange {
    int channel;               // first
    std::int64_t sample, end;  // of the samples
    int split;

    SHIKE_DEVICE BlockRange(const FusionPlan& plan, const MapShape& shape, unsigned block) {
        split = int(block / unsigned(plan.groups));
        channel = int(block - unsigned(split) * unsigned(plan.groups)) * plan.width();
        sample = split * plan.samples;
        end = sample + plan.samples < shape.batch ? sample + plan.samples : shape.batch;
    }
};

// A thread's view of a map: its channels in any sample.
template <DType kType, int V>
struct MapView {
    char* channel;         // position 0 of sample 0
    std::int64_t sample_step;  // bytes
    PositionStep position;

    SHIKE_DEVICE MapView(const FeatureMap& map, const MapShape& shape, std::int64_t c)
        : channel(static_cast<char*>(map.data) + c * map.c * bytes_of(kType)), sample_step(map.b * bytes_of(kType)),
          position(map, shape) {}

    SHIKE_DEVICE char* sample(std::int64_t b) const { return channel + b * sample_step; }
    SHIKE_DEVICE std::int64_t offset(int p) const {
        return (V > 1 ? p * position.step : position.at(p)) * bytes_of(kType);  // is_wide: no rows to step over
    }
};

// Shared memory for `values` numbers of each channel of each thread. The padding keeps the threads that add up
// neighbouring channels in different banks.
SHIKE_HD constexpr int slot_stride(int threads) { return threads + 4; }

template <int V>
SHIKE_DEVICE void publish(float* memory, int threads, int value, int thread, const float (&numbers)[V]) {
    SHIKE_UNROLL
    for (int i = 0; i < V; ++i) memory[(value * V + i) * slot_stride(threads) + thread] = numbers[i];
}

// What the thread of one member and row published of a channel, which counts from the block's first.
template <int V>
SHIKE_DEVICE float published(const float* memory, const FusionPlan& plan, int value, int channel, int member, int row) {
    return memory[(value * V + channel % V) * slot_stride(plan.threads()) + plan.thread_of(channel / V, member, row)];
}

// The sum over the threads of one sample, in their order.
template <int V>
SHIKE_DEVICE float gathered(const float* memory, const FusionPlan& plan, int value, int channel, int row) {
    float sum = published<V>(memory, plan, value, channel, 0, row);
    for (int member = 1; member < plan.group; ++member) {
        sum += published<V>(memory, plan, value, channel, member, row);
    }
    return sum;
}

// V numbers of neighbouring channels from shared memory.
template <int V>
SHIKE_DEVICE void load_channels(const float* from, float (&numbers)[V]) {
    constexpr int kStep = V > 1 ? 4 : 1;
    SHIKE_UNROLL
    for (int i = 0; i < V; i += kStep) {
        if constexpr (kStep == 1) {
            numbers[i] = from[i];
        } else {
            const float4 four = *reinterpret_cast<const float4*>(from + i);
            numbers[i] = four.x;
            numbers[i + 1] = four.y;
            numbers[i + 2] = four.z;
            numbers[i + 3] = four.w;
        }
    }
}

// A BatchNorm's numbers of one channel; a map that is not normalised has those of the identity.
struct ChannelNorm {
    float high = 0, low = 0, rstd = 1, weight = 1, bias = 0;

    ChannelNorm() = default;
    SHIKE_DEVICE ChannelNorm(const BatchNorm& norm, const float* mean_rstd, std::int64_t channels, std::int64_t c)
        : high(mean_rstd[c]), low(mean_rstd[channels + c]), rstd(mean_rstd[2 * channels + c]),
          weight(norm.weight == nullptr ? 1 : static_cast<const float*>(norm.weight)[c]),
          bias(norm.bias == nullptr ? 0 : static_cast<const float*>(norm.bias)[c]) {}

    // gamma x_hat + beta = scale (x - high) + offset, where x - high loses nothing.
    SHIKE_DEVICE float scale() const { return weight * rstd; }
    SHIKE_DEVICE float offset() const { return bias - scale() * low; }
};

// The norm of expert k's shallow or deep map in channel c.
SHIKE_DEVICE ChannelNorm channel_norm(const Fusion& call, const void* mean_rstd, int k, bool deep, std::int64_t c) {
    if (!call.normalised) return {};
    const ExpertFusion& expert = call.expert[k];
    const std::int64_t channels = call.shape.channels, index = deep ? call.count + k : k;
    return {deep ? expert.deep_norm : expert.norm, static_cast<const float*>(mean_rstd) + index * 3 * channels,
            channels, c};
}

SHIKE_DEVICE std::int64_t positions_of(const MapShape& shape) { return shape.height * shape.width; }

// Channel c of sample b in [., B, C].
SHIKE_DEVICE std::int64_t entry(const MapShape& shape, std::int64_t index, std::int64_t b, std::int64_t c) {
    return (index * shape.batch + b) * shape.channels + c;
}

}  // namespace
}  // namespace shike
