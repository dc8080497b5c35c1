// The mean and the variance of each channel: blocks sum over their share of the batch, shifted by its first value, and
// the shares are merged as Chan's formula does, all in a fixed order.
#pragma once

#include <cstdint>

#include "dkf_block.h"

namespace shike {
namespace {

struct StatisticsArguments {
    MapList maps;
    FeatureMap partner[kMaxExperts];  // deep: of map k where bit k of `products` is set
    unsigned products;
    float* sums;      // [K, 2, B, C]: sum deep (x - shift) and sum deep, of those maps
    float* partials;  // [count, splits, 3, C]: the shift, sum x - shift, sum (x - mean of the split)^2
    FusionPlan plan;
};

template <DType kType, int V>
struct StatisticsState {
    float shift[V], sum[V], square[V];
    float product[V], deep[V];  // of the present sample
};

// Adds a thread's share of a sample.
template <bool kProducts, DType kType, int V>
SHIKE_HD void add_sample(StatisticsState<kType, V>& own, const MapView<kType, V>& view, const char* first,
                         const MapView<kType, V>& partner, std::int64_t b, int member, int group, int positions) {
    constexpr int kUnroll = unroll_of(V);
    const char* sample = view.sample(b);
    const char* deep_sample = partner.sample(b);
    for (int p = member; p < positions; p += kUnroll * group) {
        Packet<kType, V> x[kUnroll], deep[kUnroll];
        SHIKE_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
            const int position = p + u * group;
            const bool present = position < positions;
            x[u].load(present ? sample + view.offset(position) : first);  // the first value adds nothing
            if (!kProducts) continue;
            deep[u].clear();
            if (present) deep[u].load(deep_sample + partner.offset(position));
        }
        SHIKE_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
            float value[V], factor[V];
            x[u].get(value);
            if (kProducts) deep[u].get(factor);
            SHIKE_UNROLL
            for (int i = 0; i < V; ++i) {
                const float distance = value[i] - own.shift[i];
                own.sum[i] += distance;
                own.square[i] += distance * distance;
                if (!kProducts) continue;
                own.product[i] += factor[i] * distance;
                own.deep[i] += factor[i];
            }
        }
    }
}

// One block; `index`: the map.
template <DType kType, int V, class Team>
SHIKE_HD void statistics_block(Team& team, const StatisticsArguments& call, unsigned block, int index) {
    using State = StatisticsState<kType, V>;
    const FusionPlan& plan = call.plan;
    const MapShape& shape = call.maps.shape;
    const BlockRange range(plan, shape, block);
    const int threads = plan.threads(), width = plan.width(), positions = int(positions_of(shape));
    const bool products = (call.products >> index & 1u) != 0;

    team.each([&](State& own, int thread) {
        const std::int64_t c = range.channel + plan.digits(thread).lane * V;
        SHIKE_UNROLL
        for (int i = 0; i < V; ++i) own.shift[i] = own.sum[i] = own.square[i] = 0;
        if (c >= shape.channels) return;
        Packet<kType, V> first;
        first.load(MapView<kType, V>(call.maps.map[index], shape, c).sample(range.sample));
        first.get(own.shift);
        if (products) return;
        const FusionThread place = plan.digits(thread);
        const MapView<kType, V> view(call.maps.map[index], shape, c);
        for (std::int64_t b = range.sample + place.row; b < range.end; b += plan.rows) {
            add_sample<false>(own, view, view.sample(range.sample), view, b, place.member, plan.group, positions);
        }
    });

    for (std::int64_t b = range.sample; products && b < range.end; b += plan.rows) {
        team.each([&](State& own, int thread) {
            const FusionThread place = plan.digits(thread);
            const std::int64_t c = range.channel + place.lane * V;
            SHIKE_UNROLL
            for (int i = 0; i < V; ++i) own.product[i] = own.deep[i] = 0;
            if (c < shape.channels && b + place.row < range.end) {
                const MapView<kType, V> view(call.maps.map[index], shape, c);
                add_sample<true>(own, view, view.sample(range.sample),
                                 MapView<kType, V>(call.partner[index], shape, c), b + place.row, place.member,
                                 plan.group, positions);
            }
            publish(team.memory, threads, 0, thread, own.product);
            publish(team.memory, threads, 1, thread, own.deep);
        });
        team.each([&](State&, int thread) {
            for (int output = thread; output < width * plan.rows; output += threads) {
                const int row = output >> FusionPlan::digit_bits(width), channel = output & (width - 1);
                const std::int64_t c = range.channel + channel;
                if (c >= shape.channels || b + row >= range.end) continue;
                SHIKE_UNROLL
                for (int value = 0; value < 2; ++value) {
                    call.sums[entry(shape, 2 * index + value, b + row, c)] =
                        gathered<V>(team.memory, plan, value, channel, row);
                }
            }
        });
    }

    team.each([&](State& own, int thread) {
        publish(team.memory, threads, 0, thread, own.shift);
        publish(team.memory, threads, 1, thread, own.sum);
        publish(team.memory, threads, 2, thread, own.square);
    });
    team.each([&](State&, int thread) {
        const std::int64_t channels = shape.channels;
        float* partial = call.partials + (std::int64_t(index) * plan.splits + range.split) * 3 * channels;
        for (int channel = thread; channel < width && range.channel + channel < channels; channel += threads) {
            const std::int64_t c = range.channel + channel;
            float sum = 0, square = 0;
            for (int row = 0; row < plan.rows; ++row) {
                sum += gathered<V>(team.memory, plan, 1, channel, row);
                square += gathered<V>(team.memory, plan, 2, channel, row);
            }
            const float rest = square - sum * (sum / float((range.end - range.sample) * positions));
            partial[c] = team.memory[channel % V * slot_stride(threads) + plan.thread_of(channel / V, 0, 0)];
            partial[channels + c] = sum;
            partial[2 * channels + c] = rest < 0 ? 0 : rest;
        }
    });
}

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

constexpr int kMergeRows = 8;  // threads of a channel

struct MergeState {
    float total;  // of the distances from the first split's shift
};

// Merges a channel with Chan's formula for many parts: their means, then their squares about the common mean. The means
// are distances from the first shift, which is itself a leading part of the mean.
template <class Team>
SHIKE_HD void merge_block(Team& team, const MergeArguments& call, unsigned block, int index) {
    const std::int64_t channels = call.shape.channels;
    const float* partials = call.partials + std::int64_t(index) * call.splits * 3 * channels;
    const std::int64_t values_of_channel = call.shape.batch * positions_of(call.shape);
    const float values = float(values_of_channel);
    const auto channel_of = [&](int thread) { return std::int64_t(block) * kWarp + thread % kWarp; };
    const auto count_of = [&](int split) {
        const std::int64_t left = call.shape.batch - split * call.samples;
        return float((left < call.samples ? left : call.samples) * positions_of(call.shape));
    };
    const auto sum_of = [&](const float* memory, int thread) {
        float sum = 0;
        SHIKE_UNROLL
        for (int row = 0; row < kMergeRows; ++row) sum += memory[row * kWarp + thread % kWarp];
        return sum;
    };

    team.each([&](MergeState&, int thread) {
        const std::int64_t c = channel_of(thread);
        float total = 0;
        if (c < channels) {
            const float origin = partials[c];
            for (int split = thread / kWarp; split < call.splits; split += kMergeRows) {
                const float* partial = partials + split * 3 * channels + c;
                total += partial[channels] + count_of(split) * (partial[0] - origin);
            }
        }
        team.memory[thread] = total;
    });
    team.each([&](MergeState& own, int thread) {
        const std::int64_t c = channel_of(thread);
        own.total = sum_of(team.memory, thread);
        float squares = 0;
        if (c < channels) {
            const float origin = partials[c], mean = own.total / values;
            for (int split = thread / kWarp; split < call.splits; split += kMergeRows) {
                const float* partial = partials + split * 3 * channels + c;
                const float count = count_of(split);
                const float distance = (partial[0] - origin) + partial[channels] / count - mean;
                squares += partial[2 * channels] + count * (distance * distance);
            }
        }
        team.memory[kWarp * kMergeRows + thread] = squares;
    });
    team.each([&](MergeState& own, int thread) {
        const std::int64_t c = channel_of(thread);
        if (thread >= kWarp || c >= channels) return;
        const float squares = sum_of(team.memory + kWarp * kMergeRows, thread);
        const float origin = partials[c], distance = own.total / values;
        const float mean = origin + distance, moved = mean - origin;  // and what the sum rounds off:
        const float rest = (origin - (mean - moved)) + (distance - moved);
        float* moments = call.moments + index * 3 * channels + c;
        moments[0] = mean;
        moments[channels] = rest;
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
