// Numbers in device memory: their bits and floats, and the fewest accesses for several of them. Compiled for the host
// too, where tests run what the device runs.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"
#include "row_state.h"

namespace shike {
namespace {

SHIKE_HD constexpr int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

SHIKE_HD float float_of(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}
SHIKE_HD std::uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(value);
#else
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

#ifndef __CUDA_ARCH__
// One number of IEEE half precision, for the host.
inline float widen_half(std::uint32_t half) {
    const std::uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinite or not a number
    return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}
inline std::uint32_t narrow_to_half(float value) {
    const std::uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return 0x7fffu;
    if (rest >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 2^16: infinite
    if (rest < 0x38800000u) {                        // a multiple of 2^-24
        const float aligned = float_of(rest) + 0.5f;  // whose last place is 2^-24
        return sign | (bits_of(aligned) - bits_of(0.5f));
    }
    return sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13);
}
inline std::uint32_t narrow_to_brain(float value) {
    const std::uint32_t bits = bits_of(value);
    return value != value ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
#endif

// Two 16-bit numbers to float.
SHIKE_HD void widen_bfloat16(std::uint32_t pair, float& low, float& high) {
    low = float_of(pair << 16);
    high = float_of(pair & 0xffff0000u);
}
SHIKE_HD void widen_float16(std::uint32_t pair, float& low, float& high) {
#ifdef __CUDA_ARCH__
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high)
        : "r"(pair));
#else
    low = widen_half(pair & 0xffffu);
    high = widen_half(pair >> 16);
#endif
}

// Two numbers to 16 bits each; round to nearest, ties to even.
SHIKE_HD std::uint32_t narrow_to_bfloat16(float low, float high) {
#ifdef __CUDA_ARCH__
    std::uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return narrow_to_brain(low) | narrow_to_brain(high) << 16;
#endif
}
SHIKE_HD std::uint32_t narrow_to_float16(float low, float high) {
#ifdef __CUDA_ARCH__
    std::uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return narrow_to_half(low) | narrow_to_half(high) << 16;
#endif
}

// N neighbouring 32-bit words, N even: the fewest accesses.
template <int N>
SHIKE_HD void load_words(const char* from, std::uint32_t (&words)[N]) {
#ifdef __CUDA_ARCH__
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
#else
    std::memcpy(words, from, sizeof words);
#endif
}

template <int N>
SHIKE_HD void store_words(char* to, const std::uint32_t (&words)[N]) {
#ifdef __CUDA_ARCH__
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
#else
    std::memcpy(to, words, sizeof words);
#endif
}

// V neighbouring numbers: as many as 16 bytes hold, or one.
template <DType kType, int V>
struct Packet {
    static constexpr int kBytes = bytes_of(kType) * V;
    static_assert(V == 1 || kBytes == 16, "one access");

    std::uint32_t words[V == 1 ? 1 : 4];

    SHIKE_HD void load(const char* from) {
        if constexpr (V > 1) {
            load_words(from, words);
        } else {
#ifdef __CUDA_ARCH__
            words[0] = kBytes == 4 ? __ldg(reinterpret_cast<const unsigned*>(from))
                                   : __ldg(reinterpret_cast<const unsigned short*>(from));
#else
            words[0] = 0;  // the rest of the word; the library runs on little-endian machines
            std::memcpy(words, from, kBytes);
#endif
        }
    }

    SHIKE_HD void store(char* to) const {
        if constexpr (V > 1) {
            store_words(to, words);
        } else if constexpr (kBytes == 4) {
            *reinterpret_cast<std::uint32_t*>(to) = words[0];
        } else {
            *reinterpret_cast<std::uint16_t*>(to) = std::uint16_t(words[0]);
        }
    }

    SHIKE_HD void clear() {
        SHIKE_UNROLL
        for (std::uint32_t& word : words) word = 0;
    }

    SHIKE_HD void get(float (&values)[V]) const {
        float rest;
        SHIKE_UNROLL
        for (int i = 0; i < V; i += kType == DType::kFloat32 ? 1 : 2) {
            float& second = V > 1 && kType != DType::kFloat32 ? values[(i + 1) % V] : rest;
            if constexpr (kType == DType::kFloat32) values[i] = float_of(words[i]);
            if constexpr (kType == DType::kBFloat16) widen_bfloat16(words[i / 2], values[i], second);
            if constexpr (kType == DType::kFloat16) widen_float16(words[i / 2], values[i], second);
        }
    }

    SHIKE_HD void set(const float (&values)[V]) {
        SHIKE_UNROLL
        for (int i = 0; i < V; i += kType == DType::kFloat32 ? 1 : 2) {
            const float second = V > 1 ? values[(i + 1) % V] : 0;
            if constexpr (kType == DType::kFloat32) words[i] = bits_of(values[i]);
            if constexpr (kType == DType::kBFloat16) words[i / 2] = narrow_to_bfloat16(values[i], second);
            if constexpr (kType == DType::kFloat16) words[i / 2] = narrow_to_float16(values[i], second);
        }
    }
};

}  // namespace
}  // namespace shike
