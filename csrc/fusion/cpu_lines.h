// Blocks of channels for the CPU kernels of depth-wise knowledge fusion: the SIMD lanes are channels.
//
// Sums run over up to kSegment positions in the accumulation dtype and are then added up in double.
#pragma once

#include <algorithm>

#include "common/grid.h"
#include "fusion/cpu_kernels.h"
#include "fusion/cpu_tile.h"

namespace shike {
namespace {

constexpr int kSegment = 16;  // positions

template <class T>
SHIKE_SIMD Vector<T> at(const T* from) {
    Vector<T> result;
    std::memcpy(&result, from, sizeof(result));
    return result;
}
// A value that a mask may discard. The compiler would load it with that mask, and the load would wait for what the mask
// is computed from, one miss of the cache after the other.
template <class T>
SHIKE_SIMD Vector<T> at_once(const T* from) {
    Vector<T> result = at(from);
#if defined(__AVX512F__)
    asm("" : "+v"(result));
#endif
    return result;
}
// How far ahead of the row being read to ask for memory, in elements: the processor's own prefetching stops where rows,
// or pages, end.
template <class T>
SHIKE_SIMD std::int64_t distance_ahead(const FeatureMap& map) {
    const std::int64_t bytes = map.w * std::int64_t(sizeof(T));
    return (bytes <= 512 ? 16 : 8) * map.w;
}
template <class T>
SHIKE_SIMD void fetch(const T* of) {
    __builtin_prefetch(of);
}
template <class T>
SHIKE_SIMD void put(const Vector<T>& value, T* to) {
    std::memcpy(to, &value, sizeof(value));
}

// Writes past the caches, which would first read what is overwritten. `to` is aligned to a vector.
template <class T>
SHIKE_SIMD void put_past_caches(const Vector<T>& value, T* to) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return _mm512_stream_ps(to, __m512(value));
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) return _mm256_stream_ps(to, __m256(value));
#endif
    put<T>(value, to);
}
template <class T>
bool is_aligned(const Tile<T>& tile, int rows) {
    std::uintptr_t addresses = 0;
    for (int r = 0; r < rows; ++r) addresses |= reinterpret_cast<std::uintptr_t>(tile.row[r]);
    return addresses % kVectorBytes == 0;
}

// Numbers of a block of channels.
template <class T>
struct alignas(64) Line {
    T value[kMaxWidth];
};

template <class T, class From>
void add_and_clear(From* from, int count, T* to) {
    for (int c = 0; c < count; ++c) {
        to[c] += T(from[c]);
        from[c] = 0;
    }
}

// Sets the first `count` numbers to 0: blocks are rarely as wide as a Line.
template <class T>
void clear(Line<T>& line, int count) {
    std::memset(line.value, 0, std::size_t(count) * sizeof(T));
}

// Calls step(Rows<N>, first row) for all rows, several at a time: sums and constants are then loaded once for all of
// them.
template <int N>
struct Rows {
    static constexpr int kCount = N;
};
template <int N, class Step>
SHIKE_SIMD void by_rows(int rows, const Step& step) {
    int r = 0;
    for (; r + N <= rows; r += N) step(Rows<N>{}, r);
    for (; r < rows; ++r) step(Rows<1>{}, r);
}

}  // namespace
}  // namespace shike
