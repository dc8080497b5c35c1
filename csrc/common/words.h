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

}  // namespace
}  // namespace shike
