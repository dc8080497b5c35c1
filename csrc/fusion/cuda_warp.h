// How threads of a warp add up what they know of a sample's channels, and store it in whole sectors of memory.
#pragma once

#include <cstdint>

#include "fusion/cuda_packet.h"
#include "fusion/cuda_plan.h"

namespace shike {
namespace {

constexpr unsigned kWholeWarp = ~0u;

SHIKE_DEVICE float from_lane(float number, int distance) { return __shfl_xor_sync(kWholeWarp, number, distance); }

// The members of a group that still hold the same channels. At each step two threads, `distance` apart, share out the
// channels that both hold: one keeps the lower half, the other with the upper one.
struct Members {
    int count, distance;

    SHIKE_DEVICE explicit Members(const FusionPlan& plan)
        : count(plan.group), distance(plan.by_channel ? plan.lanes : 1) {}
    SHIKE_DEVICE bool upper() const { return (threadIdx.x & unsigned(distance)) != 0; }
    SHIKE_DEVICE bool first() const { return (threadIdx.x & unsigned(distance * (count - 1))) == 0; }
    SHIKE_DEVICE void next() {
        count /= 2;
        distance *= 2;
    }
};

// A thread's half of its numbers, and what its partner knows of the same half.
template <int W>
SHIKE_DEVICE void exchange(const float (&numbers)[W], const Members& members, float (&own)[W / 2],
                           float (&other)[W / 2]) {
    const bool upper = members.upper();
    SHIKE_UNROLL
    for (int i = 0; i < W / 2; ++i) {
        own[i] = upper ? numbers[W / 2 + i] : numbers[i];
        other[i] = from_lane(upper ? numbers[i] : numbers[W / 2 + i], members.distance);
    }
}

template <int W>
SHIKE_DEVICE void choose(const float (&numbers)[W], const Members& members, float (&own)[W / 2]) {
    SHIKE_UNROLL
    for (int i = 0; i < W / 2; ++i) own[i] = members.upper() ? numbers[W / 2 + i] : numbers[i];
}

template <int W>
SHIKE_DEVICE void add_halves(const float (&numbers)[W], const Members& members, float (&sum)[W / 2]) {
    float other[W / 2];
    exchange(numbers, members, sum, other);
    SHIKE_UNROLL
    for (int i = 0; i < W / 2; ++i) sum[i] += other[i];
}

// W numbers of each thread that is active: of neighbouring channels, and of the next ones in the next thread. Of eight,
// pairs of threads store first those of one, then those of the other, and so fill sectors.
template <int W>
SHIKE_DEVICE void store_floats(float* to, const float (&numbers)[W], bool active) {
    if constexpr (W <= 4) {
        Packet<DType::kFloat32, W> packet;
        packet.set(numbers);
        if (active) packet.store(reinterpret_cast<char*>(to));
    } else {
        static_assert(W == 8, "two accesses");
        const int odd = int(threadIdx.x & 1u);
        const bool other = __shfl_xor_sync(kWholeWarp, int(active), 1) != 0;
        const float lower[4] = {numbers[0], numbers[1], numbers[2], numbers[3]};
        const float upper[4] = {numbers[4], numbers[5], numbers[6], numbers[7]};
        Packet<DType::kFloat32, 4> first, second;  // of the even thread's numbers, of the odd one's
        float received[4];
        SHIKE_UNROLL
        for (int i = 0; i < 4; ++i) received[i] = from_lane(odd ? lower[i] : upper[i], 1);
        SHIKE_UNROLL
        for (int i = 0; i < 4; ++i) {
            first.words[i] = bits_of(odd ? received[i] : lower[i]);
            second.words[i] = bits_of(odd ? upper[i] : received[i]);
        }
        char* even = reinterpret_cast<char*>(to - 4 * odd);
        if (odd ? other : active) first.store(even);
        if (odd ? active : other) second.store(even + 8 * sizeof(float));
    }
}

}  // namespace
}  // namespace shike
