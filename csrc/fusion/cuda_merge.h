// The statistics of a batch from those of its parts (cuda_statistics.h), and what a training forward makes of them.
#pragma once

#include <cstdint>

#include "fusion/compensated_sum.h"
#include "fusion/cuda_block.h"

namespace shike {
namespace {

// What becomes of a map's statistics.
struct MergedNorm {
    float* running_mean;  // null: not kept
    float* running_var;
    float momentum, kept;  // kept: 1 - momentum
    float eps;
};

struct MergeArguments {
    MapShape shape;
    std::int64_t samples;  // of a split
    int splits;
    const float* partials;
    float* moments;     // [count, 3, C]: the mean's leading part, its rest, and 1 / sqrt(var + eps) or,
    float* statistics;  // where this is null, the sum of squared distances; [count, 2, C]: mean and unbiased variance
    MergedNorm norm[2 * kMaxExperts];
};

constexpr int kMergeRows = 8;    // threads of a channel
constexpr int kMergeValues = 3;  // of each thread in shared memory

struct MergeState {
    CompensatedSum mean;
};

// Merges a channel with Chan's formula for many parts: their means, relative to the first, then their squares about the
// common mean, and what its roundings left.
SHIKE_DEVICE void merge_block(BlockTeam<MergeState>& team, const MergeArguments& call, unsigned block, int index) {
    constexpr int kThreads = kWarp * kMergeRows;
    const std::int64_t channels = call.shape.channels;
    const float* partials = call.partials + std::int64_t(index) * call.splits * 3 * channels;
    const std::int64_t values_of_channel = call.shape.batch * positions_of(call.shape);
    const float values = float(values_of_channel);
    const auto channel_of = [&](int thread) { return std::int64_t(block) * kWarp + thread % kWarp; };
    const auto each_split = [&](int thread, std::int64_t c, auto add) {  // add(values, the three numbers)
        for (int split = thread / kWarp; split < call.splits; split += kMergeRows) {
            const std::int64_t left = call.shape.batch - split * call.samples;
            const float* partial = partials + split * 3 * channels + c;
            add(float((left < call.samples ? left : call.samples) * positions_of(call.shape)), partial[0],
                partial[channels], partial[2 * channels]);
        }
    };
    const auto sum_of = [&](int value, int thread) {
        CompensatedSum sum;
        SHIKE_UNROLL
        for (int row = 0; row < kMergeRows; ++row) {
            sum.add(team.memory[value * kThreads + row * kWarp + thread % kWarp]);
        }
        return sum.value();
    };

    team.each([&](MergeState&, int thread) {
        const std::int64_t c = channel_of(thread);
        CompensatedSum moved;
        if (c < channels) {
            each_split(thread, c, [&](float count, float leading, float rest, float) {
                moved.add(count * (leading - partials[c]));
                moved.add(count * rest);
            });
        }
        team.memory[thread] = moved.value();
    });
    team.each([&](MergeState& own, int thread) {
        const std::int64_t c = channel_of(thread);
        CompensatedSum left, squares;
        if (c < channels) {
            own.mean = {partials[c], 0};
            own.mean.add(sum_of(0, thread) / values);
            each_split(thread, c, [&](float count, float leading, float rest, float square) {
                const float distance = leading - own.mean.leading - own.mean.rest + rest;
                left.add(count * distance);
                squares.add(square);
                squares.add(count * (distance * distance));
            });
        }
        team.memory[kThreads + thread] = left.value();
        team.memory[2 * kThreads + thread] = squares.value();
    });
    team.each([&](MergeState& own, int thread) {
        const std::int64_t c = channel_of(thread);
        if (thread >= kWarp || c >= channels) return;
        const float squares = sum_of(2, thread);
        CompensatedSum exact{own.mean.leading, 0};
        exact.add(own.mean.rest + sum_of(1, thread) / values);
        const float mean = exact.leading;
        float* moments = call.moments + index * 3 * channels + c;
        moments[0] = mean;
        moments[channels] = exact.rest;
        if (call.statistics == nullptr) {
            moments[2 * channels] = squares;
            return;
        }
        const MergedNorm& norm = call.norm[index];
        moments[2 * channels] = 1.f / ::sqrtf(squares / values + norm.eps);
        const float unbiased = squares / float(values_of_channel - 1);
        float* statistics = call.statistics + index * 2 * channels + c;
        statistics[0] = mean;
        statistics[channels] = unbiased;
        if (norm.running_mean != nullptr) {
            norm.running_mean[c] = norm.momentum * mean + norm.kept * norm.running_mean[c];
        }
        if (norm.running_var != nullptr) {
            norm.running_var[c] = norm.momentum * unbiased + norm.kept * norm.running_var[c];
        }
    });
}

}  // namespace
}  // namespace shike
