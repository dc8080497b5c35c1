// What the CUDA kernels of depth-wise knowledge fusion share. Warps work alone but for a block's first and last steps;
// threads of one warp share the positions of a sample, and exchange what they know of it (cuda_warp.h).
#pragma once

#include <cstdint>

#include "fusion/cuda_packet.h"
#include "fusion/cuda_plan.h"

namespace shike {
namespace {

// Where warps depend on one another, a body is a sequence of steps that all threads of a block take, with a barrier
// after each. A step keeps what it needs later in its thread's state or in the shared memory of its team.
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

// Which channels and samples a block serves, in rounds of its rows.
struct BlockRange {
    int channel;               // first
    std::int64_t sample, end;  // of the samples
    int split, rounds;

    SHIKE_DEVICE BlockRange(const FusionPlan& plan, const MapShape& shape, unsigned block) {
        split = int(block / unsigned(plan.groups));
        channel = int(block - unsigned(split) * unsigned(plan.groups)) * plan.width();
        sample = split * plan.samples;
        end = sample + plan.samples < shape.batch ? sample + plan.samples : shape.batch;
        rounds = samples_of(plan, 0);
    }
    SHIKE_DEVICE int samples_of(const FusionPlan& plan, int row) const {
        return int((end - sample - row + plan.rows - 1) >> FusionPlan::digit_bits(plan.rows));
    }
};

// Kernels that read the maps one after another do so to and fro: what was read last is still in the cache.
struct BlockNumber {
    unsigned block;
    int index;  // of the expert or map

    SHIKE_DEVICE explicit BlockNumber(bool backwards)
        : block(backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x),
          index(int(backwards ? gridDim.y - 1 - blockIdx.y : blockIdx.y)) {}
};

// A thread's view of a map: its channels in any sample.
template <DType kType, int V>
struct MapView {
    char* channel;             // position 0 of sample 0
    std::int64_t sample_step;  // bytes
    PositionStep position;

    SHIKE_DEVICE MapView(const FeatureMap& map, const MapShape& shape, std::int64_t c)
        : channel(static_cast<char*>(map.data) + c * map.c * bytes_of(kType)), sample_step(map.b * bytes_of(kType)),
          position(map, shape) {}

    SHIKE_DEVICE char* sample(std::int64_t b) const { return channel + b * sample_step; }
    SHIKE_DEVICE void move(const FeatureMap& map, std::int64_t samples) {
        channel += samples * map.b * bytes_of(kType);
    }
    SHIKE_DEVICE std::int64_t offset(int p) const {
        if constexpr (V > 1) return std::int64_t(p) * (int(position.step) * bytes_of(kType));  // see is_wide
        return position.at(p) * bytes_of(kType);
    }
};

// How far apart the numbers of one thread lie in shared memory where each has its own. The padding keeps the threads
// that add up neighbouring channels in different banks.
template <int V>
SHIKE_HD constexpr int slot_stride(int threads) {
    return threads + (V > 1 ? kWarp / V : 0);
}

// Shared memory for numbers of a block's channels. A vector of eight channels lies in two places, each next to that of
// the neighbouring lanes, so that all banks serve the threads that read it, and those that write single channels.
template <int V>
struct ChannelNumbers {
    static constexpr int kUpper = 128 + 16;                        // where the second halves begin
    static constexpr int kStride = V == 8 ? kUpper + 128 : 128;  // of a number

    SHIKE_DEVICE static int place(int channel) {
        return V == 8 ? channel / 8 * 4 + channel % 4 + (channel & 4) / 4 * kUpper : channel;
    }
    SHIKE_DEVICE static void load(const float* number, int lane, float (&values)[V]) {
        if constexpr (V == 1) {
            values[0] = number[lane];
        } else {
            SHIKE_UNROLL
            for (int i = 0; i < V; i += 4) {
                const float4 four = reinterpret_cast<const float4*>(number + i / 4 * kUpper)[lane];
                values[i] = four.x;
                values[i + 1] = four.y;
                values[i + 2] = four.z;
                values[i + 3] = four.w;
            }
        }
    }
};

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
