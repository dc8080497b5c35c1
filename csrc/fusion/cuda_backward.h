// The gradients of depth-wise knowledge fusion, with u = d(loss)/d(f) / HW; docs/kernels.md derives them.
#pragma once

#include <cstdint>

#include "fusion/cuda_forward.h"

namespace shike {
namespace {

struct VectorArguments {
    MapShape shape;
    int experts, sums;       // K, S
    const float* saved;      // [K, S, B, C]
    const void* grad_output;    // [K, B, C]
    float* vectors;          // [n, 2, C]
};

constexpr int kVectorRows = 16;  // threads of a channel

struct VectorState {};

// d(weight) = sum_b u M1, d(bias) = sum_b u M2, and with P1 and P2 those of the deep norm. One block; `k`: the expert.
template <DType kType>
SHIKE_DEVICE void vector_block(BlockTeam<VectorState>& team, const VectorArguments& call, unsigned block, int k) {
    const MapShape& shape = call.shape;
    const auto channel_of = [&](int thread) { return std::int64_t(block) * kWarp + thread % kWarp; };
    team.each([&](VectorState&, int thread) {
        const std::int64_t c = channel_of(thread);
        float total[4] = {};
        if (c < shape.channels) {
            for (std::int64_t b = thread / kWarp; b < shape.batch; b += kVectorRows) {
                Packet<kType, 1> packet;
                float g[1];
                packet.load(static_cast<const char*>(call.grad_output) + entry(shape, k, b, c) * bytes_of(kType));
                packet.get(g);
                SHIKE_UNROLL
                for (int value = 0; value < 4; ++value) {
                    if (value < call.sums) total[value] += g[0] * call.saved[entry(shape, k * call.sums + value, b, c)];
                }
            }
        }
        SHIKE_UNROLL
        for (int value = 0; value < 4; ++value) team.memory[value * kWarp * kVectorRows + thread] = total[value];
    });
    team.each([&](VectorState&, int thread) {
        const int value = thread / kWarp;
        const std::int64_t c = channel_of(thread);
        if (value >= call.sums || c >= shape.channels) return;
        const float* from = team.memory + value * kWarp * kVectorRows + thread % kWarp;
        float total = 0;
        SHIKE_UNROLL
        for (int row = 0; row < kVectorRows; ++row) total += from[row * kWarp];
        const std::int64_t norm = value < 2 ? k : call.experts + k;
        call.vectors[(2 * norm + value % 2) * shape.channels + c] = total / float(positions_of(shape));
    });
}

struct GradientArguments {
    Fusion call;
    const float* mean_rstd;
    FusionGradient gradient;
    FusionPlan plan;
};

// The gradient through a BatchNorm, where gamma x_hat + beta = scale (x - high) + offset:
// d(x) = gamma rstd (d(a) - ic d(beta) - x_hat ic d(gamma)) = scale d(a) - constant - slope (x - high).
// The last two terms, which are 0 where the statistics are constants:
template <int V>
struct ChannelCorrection {
    float constant[V], slope[V];

    SHIKE_DEVICE void start() {
        SHIKE_UNROLL
        for (int i = 0; i < V; ++i) constant[i] = slope[i] = 0;
    }
    SHIKE_DEVICE static void put(float* at, const ChannelNorm& norm, float d_weight, float d_bias) {
        const float slope = norm.scale() * norm.rstd * d_weight;
        at[0] = norm.scale() * d_bias - norm.low * slope;
        at[ChannelNumbers<V>::kStride] = slope;
    }
    SHIKE_DEVICE void load(const float* numbers, int lane) {
        ChannelNumbers<V>::load(numbers, lane, constant);
        ChannelNumbers<V>::load(numbers + ChannelNumbers<V>::kStride, lane, slope);
    }
    SHIKE_DEVICE float of(int i, float distance) const { return constant[i] + slope[i] * distance; }
};

template <int V>
struct NormGradient {
    static constexpr int kAffine = ChannelAffine<V>::kNumbers * ChannelNumbers<V>::kStride;
    static constexpr int kNumbers = ChannelAffine<V>::kNumbers + 2;
    static constexpr int kStride = ChannelNumbers<V>::kStride;

    ChannelAffine<V> affine;
    ChannelCorrection<V> correction;

    SHIKE_DEVICE void start() {
        affine.start();
        correction.start();
    }
    SHIKE_DEVICE static void put(float* at, const ChannelNorm& norm, float d_weight, float d_bias) {
        ChannelAffine<V>::put(at, norm);
        ChannelCorrection<V>::put(at + kAffine, norm, d_weight, d_bias);
    }
    SHIKE_DEVICE void load(const float* numbers, int lane) {
        affine.load(numbers, lane);
        correction.load(numbers + kAffine, lane);
    }
};

template <int V, bool kFolded>
struct GradientState {
    NormGradient<V> shallow;
    NormGradient<kFolded ? V : 1> deep;
};

// The maps of an expert and their gradients.
template <DType kType, int V, bool kFolded>
struct GradientViews {
    MapView<kType, V> deep, shallow, shortcut, d_deep, d_shallow, d_shortcut;

    SHIKE_DEVICE GradientViews(const ExpertFusion& expert, const ExpertGradient& gradient, const MapShape& shape,
                               std::int64_t c)
        : deep(expert.deep, shape, c), shallow(expert.shallow, shape, c),
          shortcut(kFolded ? expert.shortcut : expert.deep, shape, c), d_deep(gradient.deep, shape, c),
          d_shallow(gradient.shallow, shape, c), d_shortcut(kFolded ? gradient.shortcut : gradient.deep, shape, c) {}
};

struct GradientOptions {
    bool relu, statistics;
};

// A thread's share of a sample; u: of its channels.
template <DType kType, int V, bool kFolded>
SHIKE_DEVICE void sample_gradient(const GradientState<V, kFolded>& own, const GradientViews<kType, V, kFolded>& views,
                                  std::int64_t b, int member, int group, int positions, const float (&u)[V],
                                  GradientOptions options) {
    constexpr int kUnroll = V > 1 ? 2 : unroll_of(V) / 2;
    const char* deep_sample = views.deep.sample(b);
    const char* shallow_sample = views.shallow.sample(b);
    const char* shortcut_sample = views.shortcut.sample(b);
    char* d_deep_sample = views.d_deep.sample(b);
    char* d_shallow_sample = views.d_shallow.sample(b);
    char* d_shortcut_sample = views.d_shortcut.sample(b);
    for (int p = member; p < positions; p += kUnroll * group) {
        Packet<kType, V> deep[kUnroll], shallow[kUnroll], shortcut[kUnroll];
        SHIKE_UNROLL
        for (int j = 0; j < kUnroll; ++j) {
            const int position = p + j * group;
            if (position >= positions) continue;
            deep[j].load(deep_sample + views.deep.offset(position));
            shallow[j].load(shallow_sample + views.shallow.offset(position));
            if (kFolded) shortcut[j].load(shortcut_sample + views.shortcut.offset(position));
        }
        SHIKE_UNROLL
        for (int j = 0; j < kUnroll; ++j) {
            const int position = p + j * group;
            if (position >= positions) continue;
            float d[V], x[V], s[V];
            deep[j].get(d);
            shallow[j].get(x);
            if (kFolded) shortcut[j].get(s);
            SHIKE_UNROLL
            for (int i = 0; i < V; ++i) {
                const float distance = x[i] - own.shallow.affine.high[i];
                const float a = own.shallow.affine.scale[i] * distance + own.shallow.affine.offset[i];
                const bool kept = !options.relu || !(a <= 0);
                const float d_deep = kept ? u[i] * a : 0;  // d(loss)/d(D) = u A
                float d_a = u[i] * d[i];                   // d(loss)/d(A) = u D
                if constexpr (!kFolded) {
                    d[i] = d_deep;
                } else {
                    const float deep_distance = d[i] - own.deep.affine.high[i];
                    const float added = own.deep.affine.scale[i] * deep_distance + (own.deep.affine.offset[i] + s[i]);
                    const bool present = !(added <= 0);
                    d_a = present ? u[i] * added : 0;
                    s[i] = present ? d_deep : 0;
                    d[i] = own.deep.affine.scale[i] * s[i];
                    if (options.statistics) d[i] -= own.deep.correction.of(i, deep_distance);
                }
                x[i] = own.shallow.affine.scale[i] * (kept ? d_a : 0);
                if (options.statistics) x[i] -= own.shallow.correction.of(i, distance);
            }
            deep[j].set(d);
            shallow[j].set(x);
            if (kFolded) shortcut[j].set(s);
            deep[j].store(d_deep_sample + views.d_deep.offset(position));
            shallow[j].store(d_shallow_sample + views.d_shallow.offset(position));
            if (kFolded) shortcut[j].store(d_shortcut_sample + views.d_shortcut.offset(position));
        }
    }
}

// One block, which goes through its samples backwards; `k`: the expert.
template <DType kType, int V, bool kFolded>
SHIKE_DEVICE void gradient_block(float* memory, const GradientArguments& call, unsigned block, int k) {
    using Norm = NormGradient<V>;
    const FusionPlan& plan = call.plan;
    const MapShape& shape = call.call.shape;
    const BlockRange range(plan, shape, block);
    const int thread = int(threadIdx.x), positions = int(positions_of(shape));
    const FusionThread place = plan.digits(thread);
    const std::int64_t c = range.channel + place.lane * V;

    GradientState<V, kFolded> own;
    own.shallow.start();
    own.deep.start();
    if (call.call.normalised) {
#pragma unroll 1
        for (int channel = thread; channel < plan.width(); channel += plan.threads()) {
            const std::int64_t at = range.channel + channel;
            if (at >= shape.channels) continue;
            SHIKE_UNROLL
            for (int deep = 0; deep < (kFolded ? 2 : 1); ++deep) {
                float d_weight = 0, d_bias = 0;
                if (call.gradient.inverse_count != 0) {
                    const std::int64_t norm = deep != 0 ? call.call.count + k : k;
                    const float* vectors = static_cast<const float*>(call.gradient.vectors) + 2 * norm * shape.channels;
                    d_weight = vectors[at] * float(call.gradient.inverse_count);
                    d_bias = vectors[shape.channels + at] * float(call.gradient.inverse_count);
                }
                const ChannelNorm norm = channel_norm(call.call, call.mean_rstd, k, deep != 0, at);
                Norm::put(memory + deep * Norm::kNumbers * Norm::kStride + ChannelNumbers<V>::place(channel), norm,
                          d_weight, d_bias);
            }
        }
        __syncthreads();
    }
    if (c >= shape.channels) return;
    if (call.call.normalised) {
        own.shallow.load(memory, place.lane);
        if constexpr (kFolded) own.deep.load(memory + Norm::kNumbers * Norm::kStride, place.lane);
    }
    const GradientOptions options{call.call.normalised && call.call.expert[k].relu,
                                  call.call.normalised && call.gradient.inverse_count != 0};
    const float inverse = 1.f / float(positions);
    for (int round = range.rounds - 1; round >= 0; --round) {
        const std::int64_t b = range.sample + round * plan.rows + place.row;
        if (b >= range.end) continue;
        const int same = opaque(k);  // else addresses for all samples would stay in registers
        const std::int64_t channel = range.channel + plan.digits(opaque(thread)).lane * V;
        const GradientViews<kType, V, kFolded> views(call.call.expert[same], call.gradient.expert[same], shape,
                                                     channel);
        Packet<kType, V> grad_output;
        float u[V];
        grad_output.load(static_cast<const char*>(call.gradient.grad_output) +
                         entry(shape, same, b, channel) * bytes_of(kType));
        grad_output.get(u);
        SHIKE_UNROLL
        for (int i = 0; i < V; ++i) u[i] *= inverse;
        sample_gradient(own, views, b, place.member, plan.group, positions, u, options);
    }
}

}  // namespace
}  // namespace shike
