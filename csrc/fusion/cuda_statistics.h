// The mean and the variance of each channel: threads sum over their shares of the batch, about a centre that follows
// the mean, and a block merges its threads' shares as Chan's formula does, all in a fixed order; cuda_merge.h merges
// the blocks.
#pragma once

#include <cstdint>

#include "fusion/compensated_sum.h"
#include "fusion/cuda_block.h"
#include "fusion/cuda_moments.h"
#include "fusion/cuda_products.h"

namespace shike {
namespace {

// One of the compensated sums in a thread's shared memory, where numbers lie `stride` apart.
template <int V>
SHIKE_DEVICE void add_compensated(float* sums, int stride, int sum, int i, float number) {
    float &leading = sums[(2 * sum * V + i) * stride], &rest = sums[((2 * sum + 1) * V + i) * stride];
    CompensatedSum total{leading, rest};
    total.add(number);
    leading = total.leading;
    rest = total.rest;
}

SHIKE_DEVICE float median(float a, float b, float c) {
    const float low = a < b ? a : b, high = a < b ? b : a, middle = high < c ? high : c;
    return low < middle ? middle : low;
}

constexpr int kRun = 16;  // values of a thread that are added up in plain float32

// What a thread knows of its channels in the present stretch: of a sample where there are products, which then depend
// on no other sample, else of all samples. What lies in shared memory is needed once a run: CompensatedSums of the
// squares and of the products, later three numbers to hand over, and the four of earlier stretches.
template <DType kType, int V>
struct StatisticsState {
    // Products about a pivot of their own, which no single value moves. The results of 16-bit maps do not show it.
    static constexpr bool kPivot = kType == DType::kFloat32;
    static constexpr int kStretch = kPivot ? 6 : 3, kValues = kStretch + 4;  // of each channel, in shared memory

    int count;                  // of the stretch's values
    float centre[V], sum[V];    // sum x - centre
    float square[V];            // sum (x - centre)^2, of the present run
    float pivot[V];             // kPivot: of the products, else they are about the centre
    float product[V], deep[V];  // sum deep (x - pivot), sum deep; kPivot: of the present run

    SHIKE_DEVICE void start(float* sums, int stride) {
        count = 0;
        SHIKE_UNROLL
        for (int i = 0; i < V; ++i) centre[i] = sum[i] = square[i] = pivot[i] = product[i] = deep[i] = 0;
        SHIKE_UNROLL
        for (int i = 0; i < kStretch * V; ++i) sums[i * stride] = 0;
    }

    // Moves the centre to the mean, and ends the run.
    template <bool kProducts>
    SHIKE_DEVICE void recentre(float* sums, int stride) {
        const float inverse = 1 / float(count);
        SHIKE_UNROLL
        for (int i = 0; i < V; ++i) {
            const float moved_to = centre[i] + sum[i] * inverse, moved = moved_to - centre[i];
            const float left = sum[i] - float(count) * moved;  // by the centre's rounding
            add_compensated<V>(sums, stride, 0, i, square[i] - moved * (sum[i] + left));
            if constexpr (kProducts && kPivot) {
                add_compensated<V>(sums, stride, 1, i, product[i]);
                add_compensated<V>(sums, stride, 2, i, deep[i]);
                product[i] = deep[i] = 0;
            } else if (kProducts) {
                product[i] -= moved * deep[i];
            }
            centre[i] = moved_to;
            sum[i] = left;
            square[i] = 0;
        }
    }

    // To the median of the pivot, the mean and a value.
    SHIKE_DEVICE void move_pivot(const float (&value)[V], float* sums, int stride) {
        SHIKE_UNROLL
        for (int i = 0; i < V; ++i) {
            const float moved_to = median(pivot[i], centre[i], value[i]);
            add_compensated<V>(sums, stride, 1, i, (pivot[i] - moved_to) * sums[(4 * V + i) * stride]);
            pivot[i] = moved_to;
        }
    }

    // Ends the stretch: the products are complete, up to the rests in shared memory, and the statistics join those of
    // the thread's earlier ones.
    // `totals`: their centre, sum x - centre and the squares about it in a CompensatedSum. `joined`: of how many
    // values.
    template <bool kProducts>
    SHIKE_DEVICE void finish(float* sums, float* totals, int stride, int joined) {
        if (count == 0) return;
        recentre<kProducts>(sums, opaque(stride));
        join(sums, totals, opaque(stride), joined);
        SHIKE_UNROLL
        for (int i = 0; kProducts && kPivot && i < V; ++i) {
            const auto at = [&](int value) { return sums[(value * V + i) * stride]; };
            product[i] = at(2);
            deep[i] = at(4);
        }
    }

    SHIKE_DEVICE void join(const float* sums, float* totals, int stride, int joined) {
        const float all = float(joined + count), inverse = 1 / all;
        SHIKE_UNROLL
        for (int i = 0; i < V; ++i) {
            const auto at = [&](int value) -> float& { return totals[(value * V + i) * stride]; };
            ChannelMoments moments{centre[i], sum[i], {sums[i * stride], sums[(V + i) * stride]}};
            if (joined > 0) {
                ChannelMoments earlier{at(0), at(1), {at(2), at(3)}};
                earlier.join(moments, float(count), all, inverse);
                moments = earlier;
            }
            at(0) = moments.centre;
            at(1) = moments.sum;
            at(2) = moments.square.leading;
            at(3) = moments.square.rest;
        }
    }
};

// The mean of the first values of a thread; one of them where they are but two, which is as good.
template <DType kType, int V, int kUnroll>
SHIKE_DEVICE void first_centre(const Packet<kType, V> (&x)[kUnroll], int count, float (&mean)[V]) {
    if constexpr (kUnroll <= 2) return x[0].get(mean);
    const float inverse = 1 / float(count);
    float first[V], value[V];
    x[0].get(first);
    SHIKE_UNROLL
    for (float& sum : mean) sum = 0;
    SHIKE_UNROLL
    for (int u = 1; u < kUnroll; ++u) {
        if (u >= count) continue;
        x[u].get(value);
        SHIKE_UNROLL
        for (int i = 0; i < V; ++i) mean[i] += value[i] - first[i];
    }
    SHIKE_UNROLL
    for (int i = 0; i < V; ++i) mean[i] = first[i] + mean[i] * inverse;
}

// Adds a thread's share of a sample. The centre, at first the mean of the first few values, moves when the number of
// values has doubled, and after every run: the squares about it then add up to little more than those about the mean,
// whatever the values.
template <bool kProducts, DType kType, int V>
SHIKE_DEVICE void add_sample(StatisticsState<kType, V>& own, const MapView<kType, V>& view,
                             const MapView<kType, V>& partner, std::int64_t b, int member, int group, int positions,
                             float* sums, int stride) {
    using State = StatisticsState<kType, V>;
    // Seven positions at a time leave nothing over of the usual planes: 7 x 7 and its multiples.
    constexpr int kUnroll = V == 1 ? unroll_of(V) : kProducts ? kFewPositions : 7;
    static_assert(kUnroll <= kRun, "a run may be longer than kRun by less than the values of one step");
    const char* sample = view.sample(b);
    const char* deep_sample = partner.sample(b);
    for (int p = member; p < positions; p += kUnroll * group) {
        Packet<kType, V> x[kUnroll], deep[kUnroll];
        const int before = own.count;
        SHIKE_UNROLL
        for (int u = kUnroll - 1; u >= 0; --u) {
            const int position = p + u * group;
            if (position >= positions) continue;
            ++own.count;
            x[u].load(sample + view.offset(position));
            if (kProducts) deep[u].load(deep_sample + partner.offset(position));
        }
        if (before == 0) {
            first_centre(x, own.count, own.centre);
            if constexpr (kProducts && State::kPivot) x[0].get(own.pivot);
            if constexpr (kProducts && State::kPivot) {  // the first, a middle and the last value
                const int others = (positions - 1 - p) / group;
                Packet<kType, V> middle, last;
                middle.load(sample + view.offset(p + others / 2 * group));
                last.load(sample + view.offset(p + others * group));
                float second[V], third[V];
                middle.get(second);
                last.get(third);
                SHIKE_UNROLL
                for (int i = 0; i < V; ++i) own.pivot[i] = median(own.pivot[i], second[i], third[i]);
            }
        }
        SHIKE_UNROLL
        for (int u = kUnroll - 1; u >= 0; --u) {  // the first, which may lie far out, last
            if (p + u * group >= positions) continue;
            float value[V], factor[V];
            x[u].get(value);
            if (kProducts) deep[u].get(factor);
            SHIKE_UNROLL
            for (int i = 0; i < V; ++i) {
                const float distance = value[i] - own.centre[i];
                own.sum[i] += distance;
                own.square[i] += distance * distance;
                if (!kProducts) continue;
                own.product[i] += factor[i] * (State::kPivot ? value[i] - own.pivot[i] : distance);
                own.deep[i] += factor[i];
            }
        }
        const int changed = before ^ own.count;  // more than before: a power of two is reached
        if (changed > before || changed >= kRun) {
            own.template recentre<kProducts>(sums, opaque(stride));  // else addresses would stay in registers
            if (kProducts && State::kPivot && own.count >= kRun) {
                float value[V];
                x[0].get(value);
                own.move_pivot(value, sums, opaque(stride));
            }
        }
    }
}

// How many of `total` things fall to one of `sharers`, a power of two, that take turns.
SHIKE_DEVICE int share_of(std::int64_t total, int sharers, int index) {
    return int((total - index + sharers - 1) >> FusionPlan::digit_bits(sharers));
}

// The block's share of a map's samples, backwards. `totals`: of the thread, in shared memory, like `sums`.
template <DType kType, int V>
SHIKE_DEVICE void add_samples(StatisticsState<kType, V>& own, const StatisticsArguments& call, const BlockRange& range,
                              int index, int thread, float* sums, float* totals, int stride) {
    const FusionPlan& plan = call.plan;
    const FusionThread place = plan.digits(thread);
    const MapShape& shape = call.maps.shape;
    const std::int64_t c = range.channel + place.lane * V;
    if (c >= shape.channels) return;
    own.start(sums, opaque(stride));
    const MapView<kType, V> view(call.maps.map[index], shape, c);
    for (int round = range.rounds - 1; round >= 0; --round) {
        const std::int64_t b = range.sample + round * plan.rows + place.row;
        if (b >= range.end) continue;
        add_sample<false>(own, view, view, b, place.member, plan.group, int(positions_of(shape)), sums, stride);
    }
    own.template finish<false>(sums, totals, stride, 0);
}

// The same with the products of each sample.
template <DType kType, int V>
SHIKE_DEVICE void add_sample_products(StatisticsState<kType, V>& own, const StatisticsArguments& call,
                                      const BlockRange& range, int index, int thread, float* sums, float* totals,
                                      int stride) {
    using State = StatisticsState<kType, V>;
    const FusionPlan& plan = call.plan;
    const FusionThread place = plan.digits(thread);
    const MapShape& shape = call.maps.shape;
    const std::int64_t c = range.channel + place.lane * V;
    const MapView<kType, V> view(call.maps.map[index], shape, c), partner(call.partner[index], shape, c);
    int joined = 0;
    for (int round = 0; round < range.rounds; ++round) {
        const std::int64_t b = range.sample + round * plan.rows + place.row;
        const bool active = c < shape.channels && b < range.end;
        own.start(sums, opaque(stride));
        if (active) {
            add_sample<true>(own, view, partner, b, place.member, plan.group, int(positions_of(shape)), sums, stride);
            own.template finish<true>(sums, totals, stride, joined);
            joined += own.count;
        }
        SampleProducts<V, State::kPivot> products;
        products.count = own.count;
        SHIKE_UNROLL
        for (int i = 0; i < V; ++i) {
            products.reference[i] = State::kPivot ? own.pivot[i] : own.centre[i];
            products.product[i] = {own.product[i], 0};
            products.deep[i] = {own.deep[i], 0};
            if constexpr (State::kPivot) {
                products.product[i].rest = sums[(3 * V + i) * stride];
                products.deep[i].rest = sums[(5 * V + i) * stride];
            }
        }
        products.template store<kType>(call, index, b * shape.channels + c, Members(plan), active);
    }
}

// One block of a grid whose order may be backwards; `index`: the map.
template <DType kType, int V>
SHIKE_DEVICE void statistics_block(BlockTeam<StatisticsState<kType, V>>& team, const StatisticsArguments& call,
                                   unsigned block, int index) {
    using State = StatisticsState<kType, V>;
    const FusionPlan& plan = call.plan;
    const MapShape& shape = call.maps.shape;
    const BlockRange range(plan, shape, block);
    const int threads = plan.threads(), width = plan.width(), positions = int(positions_of(shape));
    const std::int64_t samples = range.end - range.sample;
    const int stride = slot_stride<V>(threads);
    const auto totals_of = [&](int thread) { return team.memory + State::kStretch * V * stride + thread; };

    team.each([&](State& own, int thread) {
        float *sums = team.memory + thread, *totals = totals_of(thread);
        if ((call.products >> index & 1u) == 0) {
            add_samples(own, call, range, index, thread, sums, totals, stride);
        } else {
            add_sample_products(own, call, range, index, thread, sums, totals, stride);
        }
        const FusionThread place = plan.digits(thread);
        SharedMoments<V> moments;
        moments.count = share_of(samples, plan.rows, place.row) * share_of(positions, plan.group, place.member);
        if (moments.count == 0 || range.channel + place.lane * V >= shape.channels) {
            moments.clear();
        } else {
            moments.load(totals_of(thread), stride);
        }
        moments.publish(team.memory + thread, stride, Members(plan));
    });
    team.each([&](State&, int thread) {
        const std::int64_t channels = shape.channels;
        float* partial = call.partials + (std::int64_t(index) * plan.splits + range.split) * 3 * channels;
        for (int channel = thread; channel < width && range.channel + channel < channels; channel += threads) {
            const PublishedMoments<V> published(team.memory, plan, stride, channel);
            const auto each_share = [&](auto add) {  // add(values, centre, sum, square)
                for (int row = 0; row < plan.rows; ++row) {
                    const int count = share_of(samples, plan.rows, row) * positions;
                    if (count == 0) continue;
                    add(float(count), published(0, row), published(1, row), published(2, row));
                }
            };
            // The mean, relative to the first share's, then relative to the result, which leaves roundings.
            CompensatedSum mean{published(0, 0), 0}, moved, left, squares;
            each_share([&](float count, float centre, float sum, float) {
                moved.add(count * (centre - mean.leading));
                moved.add(sum);
            });
            mean.add(moved.value() / float(samples * positions));
            each_share([&](float count, float centre, float sum, float square) {
                const float distance = centre - mean.leading - mean.rest;
                left.add(count * distance);
                left.add(sum);
                squares.add(square);
                squares.add(distance * (2 * sum + count * distance));
            });
            const std::int64_t c = range.channel + channel;
            const float square = squares.value();
            partial[c] = mean.leading;
            partial[channels + c] = mean.rest + left.value() / float(samples * positions);
            partial[2 * channels + c] = square < 0 ? 0 : square;
        }
    });
}

}  // namespace
}  // namespace shike
