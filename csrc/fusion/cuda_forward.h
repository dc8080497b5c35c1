// The features: sums over the positions of each sample and channel, from one reading of the maps.
#pragma once

#include <cstdint>

#include "fusion/cuda_block.h"
#include "fusion/cuda_warp.h"

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
    const void* references;  // [K, B, C], the maps' dtype
};

// gamma x_hat + beta of the channels of a thread, as scale (x - high) + offset. Without a norm it is x.
template <int V>
struct ChannelAffine {
    static constexpr int kNumbers = 3;  // of a channel, in shared memory
    static constexpr int kStride = ChannelNumbers<V>::kStride;

    float high[V], scale[V], offset[V];

    SHIKE_DEVICE void start() {
        SHIKE_UNROLL
        for (int i = 0; i < V; ++i) {
            high[i] = offset[i] = 0;
            scale[i] = 1;
        }
    }
    SHIKE_DEVICE static void put(float* at, const ChannelNorm& norm) {
        at[0] = norm.high;
        at[kStride] = norm.scale();
        at[2 * kStride] = norm.offset();
    }
    SHIKE_DEVICE void load(const float* numbers, int lane) {
        ChannelNumbers<V>::load(numbers, lane, high);
        ChannelNumbers<V>::load(numbers + kStride, lane, scale);
        ChannelNumbers<V>::load(numbers + 2 * kStride, lane, offset);
    }
};

// And what turns sums of x - high into sums of x_hat.
template <int V>
struct PoolingNorm {
    static constexpr int kNumbers = ChannelAffine<V>::kNumbers + 2;
    static constexpr int kStride = ChannelNumbers<V>::kStride;

    ChannelAffine<V> affine;
    float low[V], rstd[V];

    SHIKE_DEVICE void start() {
        affine.start();
        SHIKE_UNROLL
        for (int i = 0; i < V; ++i) {
            low[i] = 0;
            rstd[i] = 1;
        }
    }
    SHIKE_DEVICE static void put(float* at, const ChannelNorm& norm) {
        ChannelAffine<V>::put(at, norm);
        at[3 * kStride] = norm.low;
        at[4 * kStride] = norm.rstd;
    }
    SHIKE_DEVICE void load(const float* numbers, int lane) {
        affine.load(numbers, lane);
        ChannelNumbers<V>::load(numbers + 3 * kStride, lane, low);
        ChannelNumbers<V>::load(numbers + 4 * kStride, lane, rstd);
    }
};

// m D (x - high), m D and, folded, m' A (y - high'), m' A, added up.
SHIKE_HD constexpr int pooling_sums(bool folded) { return folded ? 4 : 2; }

template <int V, bool kFolded>
struct PoolingState {
    PoolingNorm<V> shallow;
    PoolingNorm<kFolded ? V : 1> deep;
    float sum[pooling_sums(kFolded)][V];
};

// What a thread has loaded: positions of a sample that are `step` apart, fewer than kUnroll where the plane ends.
template <DType kType, int V, bool kFolded>
struct PoolingLoads {
    static constexpr int kUnroll = kFolded && V > 1 ? 2 : unroll_of(V);

    Packet<kType, V> deep[kUnroll], shallow[kUnroll], shortcut[kFolded ? kUnroll : 1];
    int left;  // of the plane, from the first of these on
};

// A thread's channels of the maps, in the present sample.
template <DType kType, int V, bool kFolded>
struct PoolingViews {
    MapView<kType, V> deep, shallow, shortcut;

    SHIKE_DEVICE PoolingViews(const ExpertFusion& expert, const MapShape& shape, std::int64_t b, std::int64_t c)
        : deep(expert.deep, shape, c), shallow(expert.shallow, shape, c),
          shortcut(kFolded ? expert.shortcut : expert.deep, shape, c) {
        move(expert, b);
    }

    SHIKE_DEVICE void move(const ExpertFusion& expert, std::int64_t samples) {
        deep.move(expert.deep, samples);
        shallow.move(expert.shallow, samples);
        if (kFolded) shortcut.move(expert.shortcut, samples);
    }

    // `end`: of the positions; 0 where there is no sample.
    SHIKE_DEVICE void load(PoolingLoads<kType, V, kFolded>& loads, int first, int step, int end) const {
        loads.left = end - first;
        SHIKE_UNROLL
        for (int u = 0; u < loads.kUnroll; ++u) {
            loads.deep[u].clear();  // which adds nothing
            loads.shallow[u].clear();
            if (kFolded) loads.shortcut[u].clear();
            if (u * step >= loads.left) continue;
            loads.deep[u].load(deep.channel + deep.offset(first + u * step));
            loads.shallow[u].load(shallow.channel + shallow.offset(first + u * step));
            if (kFolded) loads.shortcut[u].load(shortcut.channel + shortcut.offset(first + u * step));
        }
    }
};

// relu: of the shallow map; a mask keeps what is not a number, as torch.relu does.
template <DType kType, int V, bool kFolded>
SHIKE_DEVICE void add_products(PoolingState<V, kFolded>& own, const PoolingLoads<kType, V, kFolded>& loads, int step,
                               bool relu) {
    const ChannelAffine<V>& shallow = own.shallow.affine;
    const auto& deep = own.deep.affine;
    SHIKE_UNROLL
    for (int u = 0; u < loads.kUnroll; ++u) {
        float d[V], x[V], s[V];
        loads.deep[u].get(d);
        loads.shallow[u].get(x);
        if constexpr (kFolded) loads.shortcut[u].get(s);
        SHIKE_UNROLL
        for (int i = 0; i < V; ++i) {
            const float distance = x[i] - shallow.high[i];
            const float a = shallow.scale[i] * distance + shallow.offset[i];
            const bool kept = !relu || !(a <= 0);
            if constexpr (!kFolded) {
                const float masked = kept ? d[i] : 0;
                own.sum[0][i] += masked * distance;
                own.sum[1][i] += masked;
            } else {
                const float deep_distance = d[i] - deep.high[i];
                const float added = deep.scale[i] * deep_distance + (deep.offset[i] + s[i]);
                const bool present = u * step < loads.left && !(added <= 0);
                const float masked = kept && present ? added : 0, masked_a = kept && present ? a : 0;
                own.sum[0][i] += masked * distance;
                own.sum[1][i] += masked;
                own.sum[2][i] += masked_a * deep_distance;
                own.sum[3][i] += masked_a;
            }
        }
    }
}

// Where the results of W channels of a sample go.
struct PoolingResults {
    char* f;
    float* sums;         // null: none is kept
    std::int64_t plane;  // B C: how far these are apart
    float inverse;       // 1 / (H W)
};

// The sums of W channels as a thread knows them, and what f and M1 to P2 are made of.
template <int W, bool kFolded>
struct PoolingEnd {
    static constexpr int kDeep = kFolded ? W : 1;

    float sum[pooling_sums(kFolded)][W], scale[W], offset[W], low[W], rstd[W], deep_low[kDeep], deep_rstd[kDeep];

    template <DType kType>
    SHIKE_DEVICE void store(PoolingResults to, std::int64_t at, Members members, bool active) const {
        if constexpr (W > 1) {
            if (members.count > 1) {
                PoolingEnd<W / 2, kFolded> half;
                SHIKE_UNROLL
                for (int value = 0; value < pooling_sums(kFolded); ++value) {
                    add_halves(sum[value], members, half.sum[value]);
                }
                choose(scale, members, half.scale);
                choose(offset, members, half.offset);
                choose(low, members, half.low);
                choose(rstd, members, half.rstd);
                if constexpr (kFolded) choose(deep_low, members, half.deep_low);
                if constexpr (kFolded) choose(deep_rstd, members, half.deep_rstd);
                const int first = members.upper() ? W / 2 : 0;
                members.next();
                return half.template store<kType>(to, at + first, members, active);
            }
            finish<kType>(to, at, active);
        } else {
            PoolingEnd all = *this;
            const bool first = members.first();
            for (; members.count > 1; members.next()) {
                SHIKE_UNROLL
                for (auto& value : all.sum) value[0] += from_lane(value[0], members.distance);
            }
            all.template finish<kType>(to, at, active && first);
        }
    }

    template <DType kType>
    SHIKE_DEVICE void finish(const PoolingResults& to, std::int64_t at, bool active) const {
        float f[W], m1[W];
        SHIKE_UNROLL
        for (int i = 0; i < W; ++i) {
            f[i] = (scale[i] * sum[0][i] + offset[i] * sum[1][i]) * to.inverse;
            m1[i] = rstd[i] * (sum[0][i] - low[i] * sum[1][i]);
        }
        Packet<kType, W> packet;
        packet.set(f);
        if (active) packet.store(to.f + at * bytes_of(kType));
        if (to.sums == nullptr) return;
        store_floats(to.sums + at, m1, active);
        store_floats(to.sums + to.plane + at, sum[1], active);
        if constexpr (kFolded) {
            float p1[W];
            SHIKE_UNROLL
            for (int i = 0; i < W; ++i) p1[i] = deep_rstd[i] * (sum[2][i] - deep_low[i] * sum[3][i]);
            store_floats(to.sums + 2 * to.plane + at, p1, active);
            store_floats(to.sums + 3 * to.plane + at, sum[3], active);
        }
    }
};

// The share of a block of an expert whose sums are there, about references.
template <DType kType>
SHIKE_DEVICE void finish_products(const PoolingArguments& call, const BlockRange& range, int k, int thread) {
    constexpr int kRows = kProductSamples;
    const FusionPlan& plan = call.plan;
    const MapShape& shape = call.call.shape;
    const float inverse = 1.f / float(positions_of(shape));
    const int row_step = plan.threads() > plan.width() ? plan.threads() / plan.width() : 1;  // powers of two
    for (int channel = thread % plan.width(); channel < plan.width(); channel += plan.threads()) {
        const std::int64_t c = range.channel + channel;
        if (c >= shape.channels) continue;
        const ChannelNorm norm = channel_norm(call.call, call.saved.mean_rstd, k, false, c);
        const float scale = norm.scale(), offset = norm.offset();
        float* products = static_cast<float*>(call.saved.sums) + entry(shape, 2 * k, 0, c);
        const float* deep_sums = products + shape.batch * shape.channels;
        const std::int64_t first = entry(shape, k, 0, c) * bytes_of(kType);
        const char* references = static_cast<const char*>(call.references) + first;
        char* f = static_cast<char*>(call.f) + first;
        for (std::int64_t b = range.sample + thread / plan.width(); b < range.end; b += kRows * row_step) {
            Packet<kType, 1> reference[kRows];
            float product[kRows], deep[kRows];
            SHIKE_UNROLL
            for (int row = 0; row < kRows; ++row) {
                const std::int64_t at = (b + row * row_step) * shape.channels;
                if (b + row * row_step >= range.end) continue;
                reference[row].load(references + at * bytes_of(kType));
                product[row] = products[at];
                deep[row] = deep_sums[at];
            }
            SHIKE_UNROLL
            for (int row = 0; row < kRows; ++row) {
                const std::int64_t at = (b + row * row_step) * shape.channels;
                if (b + row * row_step >= range.end) continue;
                float about[1];
                reference[row].get(about);
                const float about_high = product[row] - (norm.high - about[0]) * deep[row];
                const float mean[1] = {(scale * about_high + offset * deep[row]) * inverse};
                products[at] = norm.rstd * (about_high - norm.low * deep[row]);
                Packet<kType, 1> narrow;
                narrow.set(mean);
                narrow.store(f + at * bytes_of(kType));
            }
        }
    }
}

// One block; `k`: the expert.
template <DType kType, int V, bool kFolded>
SHIKE_DEVICE void pooling_block(float* memory, const PoolingArguments& call, unsigned block, int k) {
    using Norm = PoolingNorm<V>;
    const FusionPlan& plan = call.plan;
    const MapShape& shape = call.call.shape;
    const ExpertFusion& expert = call.call.expert[k];
    const BlockRange range(plan, shape, block);
    const int thread = int(threadIdx.x), positions = int(positions_of(shape));
    if constexpr (!kFolded) {
        if ((call.products >> k & 1u) != 0) return finish_products<kType>(call, range, k, thread);
    }

    const FusionThread place = plan.digits(thread);
    const std::int64_t c = range.channel + place.lane * V;
    const bool inside = c < shape.channels;
    PoolingViews<kType, V, kFolded> views(expert, shape, range.sample + place.row, c);
    PoolingLoads<kType, V, kFolded> loads;
    const int step = plan.group, stride = loads.kUnroll * step;
    const int samples = inside ? range.samples_of(plan, place.row) : 0;
    const auto load = [&](int round, int first) {
        views.load(loads, first + place.member, step, round < samples ? positions : 0);
    };
    constexpr bool kAhead = V > 1;  // single channels would not repay the code
    if (kAhead) load(0, 0);

    PoolingState<V, kFolded> own;
    own.shallow.start();
    own.deep.start();
    if (call.call.normalised) {
#pragma unroll 1
        for (int channel = thread; channel < plan.width(); channel += plan.threads()) {
            if (range.channel + channel >= shape.channels) continue;
            const auto norm = [&](bool deep) {
                return channel_norm(call.call, call.saved.mean_rstd, k, deep, range.channel + channel);
            };
            float* numbers = memory + ChannelNumbers<V>::place(channel);
            Norm::put(numbers, norm(false));
            if (kFolded) Norm::put(numbers + Norm::kNumbers * Norm::kStride, norm(true));
        }
        __syncthreads();
        if (inside) own.shallow.load(memory, place.lane);
        if constexpr (kFolded) {
            if (inside) own.deep.load(memory + Norm::kNumbers * Norm::kStride, place.lane);
        }
    }
    const bool relu = call.call.normalised && expert.relu;
    const std::int64_t plane = shape.batch * shape.channels;
    const PoolingResults results{
        static_cast<char*>(call.f) + k * plane * bytes_of(kType),
        call.call.normalised ? static_cast<float*>(call.saved.sums) + k * pooling_sums(kFolded) * plane : nullptr,
        plane, 1.f / float(positions)};
    std::int64_t at = (range.sample + place.row) * shape.channels + c;
    // The next loads, of the next sample where one ends, are under way before the results of this one are stored.
    for (int round = 0; round < range.rounds; ++round) {
        SHIKE_UNROLL
        for (auto& sum : own.sum) {
            SHIKE_UNROLL
            for (float& value : sum) value = 0;
        }
        for (int first = 0; first < positions; first += stride) {
            if (!kAhead) load(round, first);
            add_products(own, loads, step, relu);
            const bool last = first + stride >= positions;
            if (last) views.move(call.call.expert[opaque(k)], plan.rows);  // else strides would stay in registers
            if (kAhead) load(round + int(last), last ? 0 : first + stride);
        }
        PoolingEnd<V, kFolded> end;
        SHIKE_UNROLL
        for (int i = 0; i < V; ++i) {
            SHIKE_UNROLL
            for (int value = 0; value < pooling_sums(kFolded); ++value) end.sum[value][i] = own.sum[value][i];
            end.scale[i] = own.shallow.affine.scale[i];
            end.offset[i] = own.shallow.affine.offset[i];
            end.low[i] = own.shallow.low[i];
            end.rstd[i] = own.shallow.rstd[i];
            if constexpr (kFolded) end.deep_low[i] = own.deep.low[i];
            if constexpr (kFolded) end.deep_rstd[i] = own.deep.rstd[i];
        }
        end.template store<kType>(results, at, Members(plan), round < samples);
        at += plan.rows * shape.channels;
    }
}

}  // namespace
}  // namespace shike
