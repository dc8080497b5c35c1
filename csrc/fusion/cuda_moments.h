// The mean and the variance of channels as threads know them, and how the members of a group merge theirs.
#pragma once

#include <cstdint>

#include "fusion/compensated_sum.h"
#include "fusion/cuda_block.h"
#include "fusion/cuda_warp.h"

namespace shike {
namespace {

// The statistics of a channel's values: about a centre, which is near their mean.
struct ChannelMoments {
    float centre, sum;      // sum x - centre
    CompensatedSum square;  // sum (x - centre)^2

    // `others`, `all`: how many values `other` and both have; both have some.
    SHIKE_DEVICE void join(const ChannelMoments& other, float others, float all, float inverse) {
        const float distance = other.centre - centre, about = others * distance;
        const float total = sum + (other.sum + about);
        const float moved_to = centre + total * inverse, moved = moved_to - centre;
        const float left = total - all * moved;  // by the centre's rounding
        square.rest += other.square.rest;
        square.add(other.square.leading);
        square.add(distance * (2 * other.sum + about) - moved * (total + left));
        centre = moved_to;
        sum = left;
    }
};

// The statistics of W channels that a member of a group knows.
template <int W>
struct SharedMoments {
    int count;  // of the member's values
    ChannelMoments channel[W];

    SHIKE_DEVICE void clear() {
        SHIKE_UNROLL
        for (ChannelMoments& moments : channel) moments = {0, 0, {0, 0}};
    }
    SHIKE_DEVICE void load(const float* totals, int stride) {
        SHIKE_UNROLL
        for (int i = 0; i < W; ++i) {
            const auto at = [&](int value) { return totals[(value * W + i) * stride]; };
            channel[i] = {at(0), at(1), {at(2), at(3)}};
        }
    }

    // With those of the partner, from which each number comes through `theirs`.
    template <class Theirs>
    SHIKE_DEVICE void join(int others, Theirs theirs) {
        const float all = float(count + others), inverse = all > 0 ? 1 / all : 0;
        SHIKE_UNROLL
        for (int i = 0; i < W; ++i) {
            const ChannelMoments other = theirs(i);
            ChannelMoments both = channel[i];
            both.join(other, float(others), all, inverse);
            channel[i] = chosen(count == 0, other, both);
        }
        count += others;
    }

    // Those of the whole group: centre, sum and square, one after the other in the shared memory of a member.
    SHIKE_DEVICE void publish(float* memory, int stride, Members members) const {
        const auto from = [&](const ChannelMoments& sent) {
            const auto number = [&](float value) { return from_lane(value, members.distance); };
            return ChannelMoments{number(sent.centre), number(sent.sum),
                                  {number(sent.square.leading), number(sent.square.rest)}};
        };
        const auto others = [&](int own) { return __shfl_xor_sync(kWholeWarp, own, members.distance); };
        if constexpr (W > 1) {
            if (members.count > 1) {
                const bool upper = members.upper();
                SharedMoments<W / 2> half, sent;
                half.count = count;
                SHIKE_UNROLL
                for (int i = 0; i < W / 2; ++i) {
                    half.channel[i] = chosen(upper, channel[W / 2 + i], channel[i]);
                    sent.channel[i] = from(chosen(upper, channel[i], channel[W / 2 + i]));
                }
                half.join(others(count), [&](int i) { return sent.channel[i]; });
                members.next();
                return half.publish(memory, stride, members);
            }
            store(memory, stride);
        } else {
            SharedMoments all = *this;
            for (; members.count > 1; members.next()) {
                const ChannelMoments sent = from(all.channel[0]);
                all.join(others(all.count), [&](int) { return sent; });
            }
            all.store(memory, stride);
        }
    }

private:
    template <int>
    friend struct SharedMoments;

    // By value: a reference to one or the other would keep both out of registers.
    SHIKE_DEVICE static ChannelMoments chosen(bool first, const ChannelMoments& a, const ChannelMoments& b) {
        return {first ? a.centre : b.centre, first ? a.sum : b.sum,
                {first ? a.square.leading : b.square.leading, first ? a.square.rest : b.square.rest}};
    }
    SHIKE_DEVICE void store(float* memory, int stride) const {
        SHIKE_UNROLL
        for (int i = 0; i < W; ++i) {
            memory[i * stride] = channel[i].centre;
            memory[(W + i) * stride] = channel[i].sum;
            memory[(2 * W + i) * stride] = channel[i].square.value();
        }
    }
};

// What SharedMoments<V>::publish has left of a channel, which counts from the block's first.
template <int V>
struct PublishedMoments {
    const float* memory;
    int value_step, row_step;

    SHIKE_DEVICE PublishedMoments(const float* memory_of_block, const FusionPlan& plan, int stride, int channel) {
        int held = V, member = 0, bit = 1;  // the halves in which Members share out a vector's channels
        for (; held > 1 && bit < plan.group; bit *= 2) {
            held /= 2;
            if ((channel & held) != 0) member += bit;
        }
        memory = memory_of_block + (channel & (held - 1)) * stride + plan.thread_of(channel / V, member, 0);
        value_step = held * stride;
        row_step = plan.lanes * plan.group;
    }
    SHIKE_DEVICE float operator()(int value, int row) const { return memory[value * value_step + row * row_step]; }
};

}  // namespace
}  // namespace shike
