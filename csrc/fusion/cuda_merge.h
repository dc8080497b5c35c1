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

constexpr int kMergeRows = 8;                               // threads of a channel
constexpr int kMergeSplits = kStatisticsSplits / kMergeRows;  // of a thread, at most
constexpr int kMergeValues = 3;                             // of each thread in shared memory

// The means of a thread's splits, and that of all.
struct MergeState {
    float leading[kMergeSplits], rest[kMergeSplits];
    CompensatedSum mean;
};

// Merges a channel with Chan's formula for many parts: their means, relative to the first, then their squares about the
// common mean, and what its roundings left.
SHIKE_DEVICE void merge_block(BlockTeam<MergeState>& team, const MergeArguments& call, unsigned block, int index) {
    constexpr int kThreads = kWarp * kMergeRows;
    const std::int64_t channels = call.shape.channels;
    const std::int64_t values_of_channel = call.shape.batch * positions_of(call.shape);
    const float values = float(values_of_channel);
    const auto channel_of = [&](int thread) { return std::int64_t(block) * kWarp + thread % kWarp; };
    const auto each_split = [&](int thread, auto f) {  // f(which of the thread's, split), if the channel exists
        if (channel_of(thread) >= channels) return;
        SHIKE_UNROLL
        for (int i = 0; i < kMergeSplits; ++i) {
            const int split = thread / kWarp + i * kMergeRows;
            if (split >= call.splits) return;
            f(i, split);
        }
    };
    const auto partial_of = [&](int thread, int split, int number) {
        const std::int64_t at = (std::int64_t(index) * call.splits + split) * 3 + number;
        return call.partials[at * channels + channel_of(thread)];
    };
    const auto count_of = [&](int split) {  // of values
        const std::int64_t left = call.shape.batch - split * call.samples;
        return float((left < call.samples ? left : call.samples) * positions_of(call.shape));
    };
    const auto sum_of = [&](int value, int thread) {
        CompensatedSum sum;
        SHIKE_UNROLL
        for (int row = 0; row < kMergeRows; ++row) {
            sum.add(team.memory[value * kThreads + row * kWarp + thread % kWarp]);
        }
        return sum.value();
    };

    team.each([&](MergeState& own, int thread) {
        each_split(thread, [&](int i, int split) {
            own.leading[i] = partial_of(thread, split, 0);
            own.rest[i] = partial_of(thread, split, 1);
            if (split == 0) team.memory[thread] = own.leading[i];
        });
    });
    team.each([&](MergeState& own, int thread) {
        CompensatedSum moved;
        if (channel_of(thread) < channels) own.mean = {team.memory[thread % kWarp], 0};
        each_split(thread, [&](int i, int split) {
            moved.add(count_of(split) * (own.leading[i] - own.mean.leading));
            moved.add(count_of(split) * own.rest[i]);
        });
        team.memory[kThreads + thread] = moved.value();
    });
    team.each([&](MergeState& own, int thread) {
        CompensatedSum left, squares;
        own.mean.add(sum_of(1, thread) / values);
        each_split(thread, [&](int i, int split) {
            const float count = count_of(split);
            const float distance = own.leading[i] - own.mean.leading - own.mean.rest + own.rest[i];
            left.add(count * distance);
            squares.add(partial_of(thread, split, 2));
            squares.add(count * (distance * distance));
        });
        team.memory[thread] = left.value();
        team.memory[2 * kThreads + thread] = squares.value();
    });
    team.each([&](MergeState& own, int thread) {
        const std::int64_t c = channel_of(thread);
        if (thread >= kWarp || c >= channels) return;
        const float squares = sum_of(2, thread);
        CompensatedSum exact{own.mean.leading, 0};
        exact.add(own.mean.rest + sum_of(0, thread) / values);
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
