// The features: sums over the positions of each sample and channel, from one reading of the maps.
#pragma once

#include <cstdint>

#include "fusion/cuda_block.h"

namespace shike {
namespace {

struct PoolingArguments {
    Fusion call;
    FusionSaved saved;
    void* f;  // [K, B, C]
    FusionPlan plan;
    // Where bit k of `products` is set, expert k's sums are those of the statistics' reading (StatisticsArguments),
    // about its references.
    unsigned products;
    const float* references;  // [K, B, C]
};

// gamma x_hat + beta of the channels of a thread, as scale (x - high) + offset.
template <int V>
struct ChannelAffine {
    float high[V], scale[V], offset[V];

    // Shared memory holds the numbers of a block's channels, `width` apart.
    SHIKE_DEVICE static void put(float* at, int width, const ChannelNorm& norm) {
        at[0] = norm.high;
        at[width] = norm.scale();
        at[2 * width] = norm.offset();
    }
    SHIKE_DEVICE void load(const float* at, int width) {
        load_channels(at, high);
        load_channels(at + width, scale);
        load_channels(at + 2 * width, offset);
    }
};

template <int V, bool kFolded>
struct PoolingState {
    static constexpr int kSums = kFolded ? 4 : 2;

    ChannelAffine<V> shallow;
    ChannelAffine<kFolded ? V : 1> deep;
    float sum[kSums][V];  // m D (x - high), m D, m' A (y - high'), m' A
};

template <DType kType, int V, bool kFolded>
struct PoolingViews {
    MapView<kType, V> deep, shallow, shortcut;

    SHIKE_DEVICE PoolingViews(const ExpertFusion& expert, const MapShape& shape, std::int64_t c)
        : deep(expert.deep, shape, c), shallow(expert.shallow, shape, c),
          shortcut(kFolded ? expert.shortcut : expert.deep, shape, c) {}
};

// Adds a thread's share of a sample. relu: of the shallow map; a mask keeps what is not a number, as torch.relu does.
template <DType kType, int V, bool kFolded>
SHIKE_DEVICE void add_sample(PoolingState<V, kFolded>& own, const PoolingViews<kType, V, kFolded>& views,
                             std::int64_t b, int member, int group, int positions, bool relu) {
    constexpr int kUnroll = kFolded && V > 1 ? 2 : unroll_of(V);
    const char* deep_sample = views.deep.sample(b);
    const char* shallow_sample = views.shallow.sample(b);
    const char* shortcut_sample = views.shortcut.sample(b);
    for (int p = member; p < positions; p += kUnroll * group) {
        Packet<kType, V> deep[kUnroll], shallow[kUnroll], shortcut[kUnroll];
        SHIKE_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
            const int position = p + u * group;
            deep[u].clear();  // which adds nothing
            shallow[u].clear();
            if (kFolded) shortcut[u].clear();
            if (position >= positions) continue;
            deep[u].load(deep_sample + views.deep.offset(position));
            shallow[u].load(shallow_sample + views.shallow.offset(position));
            if (kFolded) shortcut[u].load(shortcut_sample + views.shortcut.offset(position));
        }
        SHIKE_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
            float d[V], x[V], s[V];
            deep[u].get(d);
            shallow[u].get(x);
            if (kFolded) shortcut[u].get(s);
            SHIKE_UNROLL
            for (int i = 0; i < V; ++i) {
                const float distance = x[i] - own.shallow.high[i];
                const float a = own.shallow.scale[i] * distance + own.shallow.offset[i];
                const bool kept = !relu || !(a <= 0);
                if constexpr (!kFolded) {
                    const float masked = kept ? d[i] : 0;
                    own.sum[0][i] += masked * distance;
                    own.sum[1][i] += masked;
                } else {
                    const float deep_distance = d[i] - own.deep.high[i];
                    const float added = own.deep.scale[i] * deep_distance + (own.deep.offset[i] + s[i]);
                    const bool present = p + u * group < positions && !(added <= 0);
                    const float masked = kept && present ? added : 0, masked_a = kept && present ? a : 0;
                    own.sum[0][i] += masked * distance;
                    own.sum[1][i] += masked;
                    own.sum[2][i] += masked_a * deep_distance;
                    own.sum[3][i] += masked_a;
                }
            }
        }
    }
}

// f and the sums of channel c of sample b from sums about the means' leading parts.
template <DType kType, bool kFolded>
SHIKE_DEVICE void finish_sample(const PoolingArguments& call, int k, std::int64_t b, std::int64_t c,
                                const float (&sum)[4]) {
    const MapShape& shape = call.call.shape;
    const ChannelNorm norm = channel_norm(call.call, call.saved.mean_rstd, k, false, c);
    float* sums = static_cast<float*>(call.saved.sums);
    const float first = norm.rstd * (sum[0] - norm.low * sum[1]);
    float f = first;
    if (call.call.normalised) {
        const int count = kFolded ? 4 : 2;
        sums[entry(shape, k * count, b, c)] = first;
        sums[entry(shape, k * count + 1, b, c)] = sum[1];
        f = norm.weight * first + norm.bias * sum[1];
    }
    if (kFolded) {
        const ChannelNorm deep = channel_norm(call.call, call.saved.mean_rstd, k, true, c);
        sums[entry(shape, k * 4 + 2, b, c)] = deep.rstd * (sum[2] - deep.low * sum[3]);
        sums[entry(shape, k * 4 + 3, b, c)] = sum[3];
    }
    const float mean[1] = {f / float(positions_of(shape))};
    Packet<kType, 1> narrow;
    narrow.set(mean);
    narrow.store(static_cast<char*>(call.f) + entry(shape, k, b, c) * bytes_of(kType));
}

// The share of a block of an expert whose sums are there.
template <DType kType>
SHIKE_DEVICE void finish_products(const PoolingArguments& call, const BlockRange& range, int k, int thread) {
    const FusionPlan& plan = call.plan;
    const MapShape& shape = call.call.shape;
    const int row_step = plan.threads() / plan.width();  // a width is a power of two; 0: wider than the block
    for (int channel = thread % plan.width(); channel < plan.width(); channel += plan.threads()) {
        const std::int64_t c = range.channel + channel;
        if (c >= shape.channels) continue;
        const ChannelNorm norm = channel_norm(call.call, call.saved.mean_rstd, k, false, c);
        const float* sums = static_cast<const float*>(call.saved.sums);
        for (std::int64_t b = range.sample + thread / plan.width(); b < range.end; b += row_step > 0 ? row_step : 1) {
            const float reference = call.references[entry(shape, k, b, c)];
            const float product = sums[entry(shape, 2 * k, b, c)], deep = sums[entry(shape, 2 * k + 1, b, c)];
            const float about_high[4] = {product - (norm.high - reference) * deep, deep};
            finish_sample<kType, false>(call, k, b, c, about_high);
        }
    }
}

// One block; `k`: the expert.
template <DType kType, int V, bool kFolded>
SHIKE_DEVICE void pooling_block(BlockTeam<PoolingState<V, kFolded>>& team, const PoolingArguments& call, unsigned block,
                                int k) {
    using State = PoolingState<V, kFolded>;
    const FusionPlan& plan = call.plan;
    const MapShape& shape = call.call.shape;
    const ExpertFusion& expert = call.call.expert[k];
    const BlockRange range(plan, shape, block);
    const int threads = plan.threads(), width = plan.width(), positions = int(positions_of(shape));

    if ((call.products >> k & 1u) != 0) {
        team.each([&](State&, int thread) { finish_products<kType>(call, range, k, thread); });
        return;
    }
    team.each([&](State&, int thread) {
        for (int channel = thread; channel < width && range.channel + channel < shape.channels; channel += threads) {
            const std::int64_t c = range.channel + channel;
            const auto norm = [&](bool deep) { return channel_norm(call.call, call.saved.mean_rstd, k, deep, c); };
            float* numbers = team.memory + channel;
            ChannelAffine<V>::put(numbers, width, norm(false));
            if (kFolded) ChannelAffine<V>::put(numbers + 3 * width, width, norm(true));
        }
    });
    team.each([&](State& own, int thread) {
        const int lane = plan.digits(thread).lane;
        if (range.channel + lane * V >= shape.channels) return;
        const float* numbers = team.memory + lane * V;
        own.shallow.load(numbers, width);
        if constexpr (kFolded) own.deep.load(numbers + 3 * width, width);
    });
    for (std::int64_t b = range.sample; b < range.end; b += plan.rows) {
        team.each([&](State& own, int thread) {
            const FusionThread place = plan.digits(thread);
            const std::int64_t c = range.channel + place.lane * V;
            SHIKE_UNROLL
            for (auto& sum : own.sum) {
                SHIKE_UNROLL
                for (int i = 0; i < V; ++i) sum[i] = 0;
            }
            if (c < shape.channels && b + place.row < range.end) {
                add_sample(own, PoolingViews<kType, V, kFolded>(expert, shape, c), b + place.row, place.member,
                           plan.group, positions, call.call.normalised && expert.relu);
            }
            SHIKE_UNROLL
            for (int value = 0; value < State::kSums; ++value) {
                publish(team.memory, threads, value, thread, own.sum[value]);
            }
        });
        team.each([&](State&, int thread) {
            for (int output = thread; output < width * plan.rows; output += threads) {
                const int row = output >> FusionPlan::digit_bits(width), channel = output & (width - 1);
                if (range.channel + channel >= shape.channels || b + row >= range.end) continue;
                float sum[4] = {};
                SHIKE_UNROLL
                for (int value = 0; value < State::kSums; ++value) {
                    sum[value] = gathered<V>(team.memory, plan, value, channel, row);
                }
                finish_sample<kType, kFolded>(call, k, b + row, range.channel + channel, sum);
            }
        });
    }
}

}  // namespace
}  // namespace shike
