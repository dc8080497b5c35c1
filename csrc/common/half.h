// bfloat16 and float16 (IEEE half precision) to float and back, for host and device. Rounding is to nearest, ties to
// even; NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace shike {
namespace {

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

SHIKE_HD float widen_bfloat16(std::uint32_t bits) { return float_of(bits << 16); }

#ifndef __CUDA_ARCH__
SHIKE_SIMD float widen_float16(std::uint32_t bits) {
#if defined(__F16C__)
    return _cvtsh_ss(std::uint16_t(bits));
#else
    const std::uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | ((magnitude << 13) + 0x70000000u));  // infinity or NaN
    if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));  // another exponent bias
    return float_of(sign | bits_of(float(magnitude) * 0x1p-24f));
#endif
}

SHIKE_SIMD std::uint32_t narrow_to_bfloat16(float value) {
    const std::uint32_t bits = bits_of(value);
    return value != value ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

SHIKE_SIMD std::uint32_t narrow_to_float16(float value) {
#if defined(__F16C__)
    return std::uint16_t(_cvtss_sh(value, 0));
#else
    const std::uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fffu;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 2^16: infinity
    // Subnormal: the sum's last place is 2^-24.
    if (magnitude < 0x38800000u) return sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
    return sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
#endif
}
#endif

#ifdef __CUDACC__
// Two numbers of 16 bits in one word.
SHIKE_DEVICE void widen_bfloat16(std::uint32_t pair, float& low, float& high) {
    low = float_of(pair << 16);
    high = float_of(pair & 0xffff0000u);
}
SHIKE_DEVICE void widen_float16(std::uint32_t pair, float& low, float& high) {
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high)
        : "r"(pair));
}
SHIKE_DEVICE std::uint32_t narrow_to_bfloat16(float low, float high) {
    std::uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
SHIKE_DEVICE std::uint32_t narrow_to_float16(float low, float high) {
    std::uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
#endif

}  // namespace
}  // namespace shike
