// Tiles of logits for the CPU kernels: whatever the storage type and the strides, the arithmetic sees SIMD vectors of
// float or double, padded to whole vectors. Only here is memory of the caller read or written.
#pragma once

#include <type_traits>

#include "expert_loss.h"
#include "simd.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace shike {
namespace {

constexpr int kTile = 16;  // vectors of an expert in a tile: 8 experts of them fill a quarter of a 32 KiB cache at most

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

// Whole vectors of `count` <= kTile * kLanes classes, from `first` on, into tile[0], tile[step], ...; padding is `absent`.
template <class T, class S>
void load_as(const Matrix& from, std::int64_t row, std::int64_t first, int count, Vector<T>* tile, int step, T absent) {
    const S* source = static_cast<const S*>(from.data) + row * from.row_stride + first * from.class_stride;
    const int whole = from.class_stride == 1 ? count / kLanes<T> : 0;
    for (int i = 0; i < whole; ++i) tile[i * step] = load_vector<T, S>(source + i * kLanes<T>);
    for (int i = whole; i * kLanes<T> < count; ++i) {
        const int rest = count - i * kLanes<T>;
        tile[i * step] = load_some<T, S>(source + i * kLanes<T> * from.class_stride, from.class_stride,
                                         rest < kLanes<T> ? rest : kLanes<T>, absent);
    }
}

template <class T, class S>
void store_as(const Matrix& to, std::int64_t row, std::int64_t first, int count, const Vector<T>* tile, int step) {
    S* destination = static_cast<S*>(to.data) + row * to.row_stride + first * to.class_stride;
    const int whole = to.class_stride == 1 ? count / kLanes<T> : 0;
    for (int i = 0; i < whole; ++i) store_vector<T, S>(tile[i * step], destination + i * kLanes<T>);
    for (int i = whole; i * kLanes<T> < count; ++i) {
        const int rest = count - i * kLanes<T>;
        store_some<T, S>(tile[i * step], destination + i * kLanes<T> * to.class_stride, to.class_stride,
                         rest < kLanes<T> ? rest : kLanes<T>);
    }
}

template <class T>
void load_tile(DType dtype, const Matrix& from, std::int64_t row, std::int64_t first, int count, Vector<T>* tile,
               int step, T absent) {
    if constexpr (sizeof(T) == 8) {
        load_as<T, double>(from, row, first, count, tile, step, absent);
    } else if (dtype == DType::kFloat32) {
        load_as<T, float>(from, row, first, count, tile, step, absent);
    } else if (dtype == DType::kBFloat16) {
        load_as<T, BFloat16>(from, row, first, count, tile, step, absent);
    } else {
        load_as<T, Float16>(from, row, first, count, tile, step, absent);
    }
}

template <class T>
void store_tile(DType dtype, const Matrix& to, std::int64_t row, std::int64_t first, int count, const Vector<T>* tile,
                int step) {
    if constexpr (sizeof(T) == 8) {
        store_as<T, double>(to, row, first, count, tile, step);
    } else if (dtype == DType::kFloat32) {
        store_as<T, float>(to, row, first, count, tile, step);
    } else if (dtype == DType::kBFloat16) {
        store_as<T, BFloat16>(to, row, first, count, tile, step);
    } else {
        store_as<T, Float16>(to, row, first, count, tile, step);
    }
}

template <class T>
T load_one(DType dtype, const Matrix& from, std::int64_t row, std::int64_t c) {
    const std::int64_t offset = row * from.row_stride + c * from.class_stride;
    if constexpr (sizeof(T) == 8) {
        return static_cast<const double*>(from.data)[offset];
    } else {
        if (dtype == DType::kFloat32) return static_cast<const float*>(from.data)[offset];
        if (dtype == DType::kBFloat16) return widened(static_cast<const BFloat16*>(from.data)[offset]);
        return widened(static_cast<const Float16*>(from.data)[offset]);
    }
}

// The number of each lane.
template <class T>
SHIKE_SIMD Vector<T> lane_numbers() {
    Vector<T> result{};
    for (int i = 0; i < kLanes<T>; ++i) result[i] = T(i);
    return result;
}

}  // namespace
}  // namespace shike
