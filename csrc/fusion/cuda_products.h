// The products of a sample from the reading of the statistics, before mean and variance are known.
#pragma once

#include <cstdint>

#include "fusion/compensated_sum.h"
#include "fusion/cuda_warp.h"

namespace shike {
namespace {

struct StatisticsArguments {
    MapList maps;
    FeatureMap partner[kMaxExperts];  // deep: of map k where bit k of `products` is set
    unsigned products;
    float* sums;        // [K, 2, B, C]: sum deep (x - reference) and sum deep, of those maps
    void* references;   // [K, B, C]: the sample's mean, roughly, of those maps, in their dtype
    float* partials;    // [count, splits, 3, C]: the mean's leading part, its rest, sum (x - mean)^2
    FusionPlan plan;
};

// The products of W channels of a sample as a member of its group knows them, each about its own reference.
// kRests: with what their roundings left.
template <int W, bool kRests>
struct SampleProducts {
    int count;  // of the member's values
    float reference[W];
    CompensatedSum product[W], deep[W];

    // With those of another member, about the mean of all values.
    SHIKE_DEVICE void join(const SampleProducts& other) {
        const float share = other.count > 0 ? float(other.count) / float(count + other.count) : 0;
        SHIKE_UNROLL
        for (int i = 0; i < W; ++i) {
            const float common = reference[i] + share * (other.reference[i] - reference[i]);
            add(product[i], (reference[i] - common) * deep[i].leading);
            add(product[i], (other.reference[i] - common) * other.deep[i].leading);
            add(product[i], other.product[i].leading);
            add(deep[i], other.deep[i].leading);
            product[i].rest += other.product[i].rest;
            deep[i].rest += other.deep[i].rest;
            reference[i] = common;
        }
        count += other.count;
    }

    // Once all members' are joined; `at`: the first channel's place in [B, C].
    template <DType kType>
    SHIKE_DEVICE void store(const StatisticsArguments& call, int index, std::int64_t at, Members members,
                            bool active) const {
        if constexpr (W > 1) {
            if (members.count > 1) {
                SampleProducts<W / 2, kRests> half, other;
                half.count = count;
                other.count = __shfl_xor_sync(kWholeWarp, count, members.distance);
                SHIKE_UNROLL
                for (int i = 0; i < W / 2; ++i) {
                    const auto halve = [&](float lower, float upper, float& own, float& others) {
                        own = members.upper() ? upper : lower;
                        others = from_lane(members.upper() ? lower : upper, members.distance);
                    };
                    halve(reference[i], reference[W / 2 + i], half.reference[i], other.reference[i]);
                    halve(product[i].leading, product[W / 2 + i].leading, half.product[i].leading,
                          other.product[i].leading);
                    halve(deep[i].leading, deep[W / 2 + i].leading, half.deep[i].leading, other.deep[i].leading);
                    if (!kRests) continue;
                    halve(product[i].rest, product[W / 2 + i].rest, half.product[i].rest, other.product[i].rest);
                    halve(deep[i].rest, deep[W / 2 + i].rest, half.deep[i].rest, other.deep[i].rest);
                }
                half.join(other);
                const int first = members.upper() ? W / 2 : 0;
                members.next();
                return half.template store<kType>(call, index, at + first, members, active);
            }
            finish<kType>(call, index, at, active);
        } else {
            SampleProducts all = *this, other;
            const bool first = members.first();
            for (; members.count > 1; members.next()) {
                const auto theirs = [&](float number) { return from_lane(number, members.distance); };
                other.count = __shfl_xor_sync(kWholeWarp, all.count, members.distance);
                other.reference[0] = theirs(all.reference[0]);
                other.product[0] = {theirs(all.product[0].leading), kRests ? theirs(all.product[0].rest) : 0};
                other.deep[0] = {theirs(all.deep[0].leading), kRests ? theirs(all.deep[0].rest) : 0};
                all.join(other);
            }
            all.template finish<kType>(call, index, at, active && first);
        }
    }

    template <DType kType>
    SHIKE_DEVICE void finish(const StatisticsArguments& call, int index, std::int64_t at, bool active) const {
        const std::int64_t plane = call.maps.shape.batch * call.maps.shape.channels;
        Packet<kType, W> narrow;
        narrow.set(reference);
        float rounded[W], about[W], total[W];
        narrow.get(rounded);
        SHIKE_UNROLL
        for (int i = 0; i < W; ++i) {
            about[i] = product[i].value() + (reference[i] - rounded[i]) * deep[i].leading;
            total[i] = deep[i].value();
        }
        store_floats(call.sums + 2 * index * plane + at, about, active);
        store_floats(call.sums + (2 * index + 1) * plane + at, total, active);
        if (active) narrow.store(static_cast<char*>(call.references) + (index * plane + at) * bytes_of(kType));
    }

private:
    SHIKE_DEVICE static void add(CompensatedSum& sum, float number) {
        if (kRests) sum.add(number);
        if (!kRests) sum.leading += number;
    }
};

}  // namespace
}  // namespace shike
