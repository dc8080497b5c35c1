// Elements in memory for the CPU kernels: whatever the storage type, the arithmetic sees float or double, or SIMD
// vectors of them. Only here is memory of the caller read or written.
#pragma once

#include <type_traits>

#include "common/dtype.h"
#include "common/half.h"
#include "common/simd.h"

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
SHIKE_SIMD float widened(BFloat16 value) { return widen_bfloat16(value.bits); }
SHIKE_SIMD float widened(Float16 value) { return widen_float16(value.bits); }

SHIKE_SIMD void narrow(float value, float& result) { result = value; }
SHIKE_SIMD void narrow(double value, double& result) { result = value; }
SHIKE_SIMD void narrow(float value, BFloat16& result) { result.bits = std::uint16_t(narrow_to_bfloat16(value)); }
SHIKE_SIMD void narrow(float value, Float16& result) { result.bits = std::uint16_t(narrow_to_float16(value)); }

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

// Calls run(S{}) with the type S that elements of this dtype are stored as, where the arithmetic is in T.
template <class T, class Run>
SHIKE_SIMD auto with_stored_type(DType dtype, const Run& run) {
    if constexpr (sizeof(T) == 8) {
        return run(double{});
    } else {
        switch (dtype) {
            case DType::kBFloat16: return run(BFloat16{});
            case DType::kFloat16: return run(Float16{});
            default: return run(float{});
        }
    }
}

}  // namespace
}  // namespace shike
