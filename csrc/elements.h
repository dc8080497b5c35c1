// Elements in memory for the CPU kernels: whatever the storage type, the arithmetic sees float or double, or SIMD vectors
// of them. Only here is memory of the caller read or written.
#pragma once

#include <type_traits>

#include "dtype.h"
#include "simd.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace shike {
namespace {

struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

SHIKE_SIMD float widened(float value) { return value; }
SHIKE_SIMD double widened(double value) { return value; }
SHIKE_SIMD float widened(BFloat16 value) {
    const std::uint32_t bits = std::uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}
SHIKE_SIMD float widened(Float16 value) {
#if defined(__F16C__)
    return _cvtsh_ss(value.bits);
#else
    const std::uint32_t magnitude = value.bits & 0x7fffu;
    std::uint32_t bits;
    float result;
    if (magnitude >= 0x7c00u) {
        bits = (magnitude << 13) + 0x70000000u;  // infinity or NaN
    } else if (magnitude >= 0x0400u) {
        bits = (magnitude << 13) + 0x38000000u;  // normal: another exponent bias
    } else {
        const float subnormal = float(magnitude) * 5.9604644775390625e-8f;  // 2^-24
        std::memcpy(&bits, &subnormal, sizeof(bits));
    }
    bits |= std::uint32_t(value.bits & 0x8000u) << 16;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
#endif
}

// Round to nearest, ties to even.
SHIKE_SIMD void narrow(float value, float& result) { result = value; }
SHIKE_SIMD void narrow(double value, double& result) { result = value; }
SHIKE_SIMD void narrow(float value, BFloat16& result) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    result.bits = std::uint16_t(value != value ? 0x7fc0u : rounded >> 16);
}
SHIKE_SIMD void narrow(float value, Float16& result) {
#if defined(__F16C__)
    result.bits = std::uint16_t(_cvtss_sh(value, 0));
#else
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const std::uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    std::uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;  // NaN
    } else if (magnitude >= 0x477ff000u) {
        half = 0x7c00u;  // 65520 and more round to infinity
    } else if (magnitude >= 0x38800000u) {
        half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    } else {  // subnormal: adding 0.5 leaves the value's multiple of 2^-24 in the last bits, rounded
        float shifted;
        std::memcpy(&shifted, &magnitude, sizeof(shifted));
        shifted += 0.5f;
        std::memcpy(&half, &shifted, sizeof(half));
        half -= 0x3f000000u;
    }
    result.bits = std::uint16_t(sign | half);
#endif
}

// kLanes contiguous elements.
template <class T, class S>
SHIKE_SIMD Vector<T> load_vector(const S* from) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, Float16>) {
        return Vector<T>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
    }
#elif defined(__F16C__)
    if constexpr (std::is_same_v<S, Float16>) {
        return Vector<T>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
    }
#endif
    alignas(kVectorBytes) T lanes[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) lanes[i] = widened(from[i]);
    Vector<T> result;
    std::memcpy(&result, lanes, sizeof(result));
    return result;
}

template <class T, class S>
SHIKE_SIMD void store_vector(const Vector<T>& value, S* to) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, Float16>) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, __m512(value), 0));
        return;
    }
#elif defined(__F16C__)
    if constexpr (std::is_same_v<S, Float16>) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(__m256(value), 0));
        return;
    }
#endif
    alignas(kVectorBytes) T lanes[kLanes<T>];
    std::memcpy(lanes, &value, sizeof(value));
    for (int i = 0; i < kLanes<T>; ++i) narrow(lanes[i], to[i]);
}

// The first `count` <= kLanes elements of a vector; the others are `absent`, or not stored.
template <class T, class S>
SHIKE_SIMD Vector<T> load_some(const S* from, std::int64_t stride, int count, T absent) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, float>) {
        if (stride == 1) {
            return Vector<T>(_mm512_mask_loadu_ps(_mm512_set1_ps(absent), __mmask16((1u << count) - 1u), from));
        }
    }
#endif
    alignas(kVectorBytes) T lanes[kLanes<T>];
    for (int lane = 0; lane < kLanes<T>; ++lane) lanes[lane] = lane < count ? T(widened(from[lane * stride])) : absent;
    Vector<T> result;
    std::memcpy(&result, lanes, sizeof(result));
    return result;
}

template <class T, class S>
SHIKE_SIMD void store_some(const Vector<T>& value, S* to, std::int64_t stride, int count) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, float>) {
        if (stride == 1) {
            _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1u), __m512(value));
            return;
        }
    }
#endif
    alignas(kVectorBytes) T lanes[kLanes<T>];
    std::memcpy(lanes, &value, sizeof(value));
    for (int lane = 0; lane < count; ++lane) narrow(lanes[lane], to[lane * stride]);
}

}  // namespace
}  // namespace shike
