// Words of device memory in the fewest accesses.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"

namespace shike {
namespace {

SHIKE_HD constexpr int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// N neighbouring 32-bit words, N even: the fewest accesses.
template <int N>
SHIKE_DEVICE void load_words(const char* from, std::uint32_t (&words)[N]) {
    if constexpr (N == 2) {
        const uint2 two = __ldg(reinterpret_cast<const uint2*>(from));
        words[0] = two.x;
        words[1] = two.y;
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const uint4 four = __ldg(reinterpret_cast<const uint4*>(from) + i / 4);
            words[i] = four.x;
            words[i + 1] = four.y;
            words[i + 2] = four.z;
            words[i + 3] = four.w;
        }
    }
}

template <int N>
SHIKE_DEVICE void store_words(char* to, const std::uint32_t (&words)[N]) {
    if constexpr (N == 2) {
        asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(words[0]), "r"(words[1]) : "memory");
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to + 4 * i), "r"(words[i]),
                         "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3])
                         : "memory");
        }
    }
}

// The same in shared memory.
template <int N>
SHIKE_DEVICE void load_shared_words(const char* from, std::uint32_t (&words)[N]) {
    static_assert(N == 2 || N == 4, "one access");
    if constexpr (N == 2) {
        const uint2 two = *reinterpret_cast<const uint2*>(from);
        words[0] = two.x;
        words[1] = two.y;
    } else {
        const uint4 four = *reinterpret_cast<const uint4*>(from);
        words[0] = four.x;
        words[1] = four.y;
        words[2] = four.z;
        words[3] = four.w;
    }
}

template <int N>
SHIKE_DEVICE void store_shared_words(char* to, const std::uint32_t (&words)[N]) {
    static_assert(N == 2 || N == 4, "one access");
    if constexpr (N == 2) {
        *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// The N words that start `bytes` bytes behind those of a packet, from that packet and the next; bytes < 4 N, and a
// multiple of the elements' size, which is 2 if `halves`, else 4.
template <int N, bool halves>
SHIKE_DEVICE void shift_words(std::uint32_t (&packets)[2 * N], unsigned bytes, std::uint32_t (&words)[N]) {
#pragma unroll
    for (int step = N / 2; step > 0; step /= 2) {
        const bool moves = (bytes & unsigned(4 * step)) != 0;
#pragma unroll
        for (int i = 0; i < N + step; ++i) packets[i] = moves ? packets[i + step] : packets[i];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        words[i] = halves ? __funnelshift_r(packets[i], packets[i + 1], (bytes & 2u) * 8) : packets[i];
    }
}

}  // namespace
}  // namespace shike
