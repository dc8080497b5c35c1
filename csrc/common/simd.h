// SIMD vectors as GCC and Clang provide them, as wide as the instruction set that the including file is compiled for.
// Operators, comparisons and `mask ? a : b` work as for numbers.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"

#if !defined(__GNUC__)
#error "the CPU kernels use the vector extensions of GCC and Clang"
#endif

namespace shike {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(kVectorBytes)));
    typedef std::int32_t mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(kVectorBytes)));
    typedef std::int64_t mask __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
using Mask = typename VectorOf<T>::mask;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

// Sum and maximum of the lanes, by halves.
template <class T, int kCount>
SHIKE_SIMD T folded(const T* lanes, bool maximum) {
    if constexpr (kCount == 1) {
        return lanes[0];
    } else {
        typedef T Half __attribute__((vector_size(kCount / 2 * sizeof(T))));
        Half low, high;
        std::memcpy(&low, lanes, sizeof(low));
        std::memcpy(&high, lanes + kCount / 2, sizeof(high));
        const Half both = maximum ? (low > high ? low : high) : low + high;
        T rest[kCount / 2];
        std::memcpy(rest, &both, sizeof(both));
        return folded<T, kCount / 2>(rest, maximum);
    }
}
template <class T>
SHIKE_SIMD T lane_sum(const Vector<T>& value) {
    T lanes[kLanes<T>];
    std::memcpy(lanes, &value, sizeof(value));
    return folded<T, kLanes<T>>(lanes, false);
}
template <class T>
SHIKE_SIMD T lane_maximum(const Vector<T>& value) {
    T lanes[kLanes<T>];
    std::memcpy(lanes, &value, sizeof(value));
    return folded<T, kLanes<T>>(lanes, true);
}

SHIKE_SIMD Vector<float> in_step(Vector<float> pivot) { return Vector<float>{} + lane_maximum<float>(pivot); }
SHIKE_SIMD Vector<double> in_step(Vector<double> pivot) { return Vector<double>{} + lane_maximum<double>(pivot); }

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, by a polynomial; below the smallest normal number 0, and
// NaN stays NaN. The arguments here do not exceed 0 by more than a rounding.
template <class T, class Bits, int kMantissa, int kDegree>
SHIKE_SIMD Vector<T> exponential_of(Vector<T> x, T high, T low, T smallest, const T (&coefficient)[kDegree + 1]) {
    const Vector<T> magic = Vector<T>{} + T(Bits(3) << (kMantissa - 1));  // adding it rounds to an integer
    const Vector<T> shifted = x * T(1.44269504088896340736) + magic;
    const Vector<T> n = shifted - magic;
    const Vector<T> r = (x - n * high) - n * low;  // ln 2 in two parts: n * high is exact
    Vector<T> value = Vector<T>{} + coefficient[kDegree];
    for (int i = kDegree - 1; i >= 0; --i) value = value * r + coefficient[i];
    Mask<T> bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    const Mask<T> exponent = (bits + ((Bits(1) << (sizeof(T) == 4 ? 7 : 10)) - 1)) << kMantissa;  // the magic number's bits shift out
    Vector<T> scale;
    std::memcpy(&scale, &exponent, sizeof(scale));
    return x < Vector<T>{} + smallest ? Vector<T>{} : value * scale;
}

SHIKE_SIMD Vector<float> exponential(Vector<float> x) {
    // The smallest relative error with 1 + r at the beginning: 3e-9.
    constexpr float kCoefficients[] = {1, 1, 0.499999934f, 0.166665206f, 0.0416683881f, 0.00836871690f, 0.00138145983f};
    return exponential_of<float, std::int32_t, 23, 6>(x, 0.693359375f, -2.12194440e-4f, -87.33f, kCoefficients);
}
SHIKE_SIMD Vector<double> exponential(Vector<double> x) {
    double taylor[14] = {1};
    for (int i = 1; i < 14; ++i) taylor[i] = taylor[i - 1] / i;
    return exponential_of<double, std::int64_t, 52, 13>(x, 0.693147180369123816490, 1.90821492927058770002e-10, -708.3,
                                                        taylor);
}

// log(x) of a positive normal number; infinity and NaN stay what they are. With x = 2^n (1 + f), 1 + f between
// sqrt(1/2) and sqrt(2): the polynomial of the Cephes library (S. Moshier, logf), error below one unit in the last
// place.
SHIKE_SIMD Vector<float> logarithm(Vector<float> x) {
    Mask<float> bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const Mask<float> from_root = bits - 0x3f3504f3;  // relative to sqrt(1/2)
    const Mask<float> exponent = from_root >> 23;
    const Mask<float> reduced = (from_root & 0x7fffff) + 0x3f3504f3;
    Vector<float> f;
    std::memcpy(&f, &reduced, sizeof(f));
    f -= 1;
    const Vector<float> n = __builtin_convertvector(exponent, Vector<float>);
    constexpr float kCoefficients[] = {7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f,
                                       -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                                       2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
    Vector<float> polynomial{};
    for (const float coefficient : kCoefficients) polynomial = polynomial * f + coefficient;
    const Vector<float> square = f * f;
    const Vector<float> small = polynomial * f * square + n * -2.12194440e-4f - square * 0.5f;
    const Vector<float> result = f + small + n * 0.693359375f;
    return x < Vector<float>{} + __builtin_inff() ? result : x;
}
SHIKE_SIMD Vector<float> logarithm_1p(Vector<float> x) {
    const Vector<float> sum = 1 + x;  // the logarithm of the rounded sum, and the rounding's share
    return logarithm(sum) - ((sum - 1) - x) / sum;
}

SHIKE_SIMD Vector<double> logarithm(Vector<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log(x[i]);
    return x;
}
SHIKE_SIMD Vector<double> logarithm_1p(Vector<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log1p(x[i]);
    return x;
}

}  // namespace
}  // namespace shike
