// Tiles of logits for the CPU kernels: whatever the storage type and the strides, the arithmetic sees SIMD vectors of
// float or double, padded to whole vectors.
#pragma once

#include <memory>

#include "common/elements.h"
#include "common/grid.h"
#include "losses/call.h"

namespace shike {
namespace {

constexpr int kTile = 16;  // vectors of an expert in a tile: 8 experts of them fill a quarter of a 32 KiB cache at most

// Asks for the memory that a tile `kAhead` bytes further on lies in: a core alone looks too little ahead where it
// computes this much between its accesses. Rows follow each other, and addresses behind the last one do no harm.
template <class S>
SHIKE_SIMD void prefetch_ahead(const Matrix& of, std::int64_t row, std::int64_t first, int count) {
    constexpr int kAhead = 8192, kLine = 64;
    if (of.class_stride != 1) return;
    const char* tile = reinterpret_cast<const char*>(static_cast<const S*>(of.data) + row * of.row_stride + first);
    for (int i = 0; i < count * int(sizeof(S)); i += kLine) __builtin_prefetch(tile + kAhead + i);
}

// Whole vectors of `count` <= kTile * kLanes classes, from `first` on, into tile[0], tile[step], ...; padding is
// `absent`.
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
    with_stored_type<T>(dtype, [&](auto stored) {
        prefetch_ahead<decltype(stored)>(from, row, first, count);
        load_as<T, decltype(stored)>(from, row, first, count, tile, step, absent);
    });
}

template <class T>
void store_tile(DType dtype, const Matrix& to, std::int64_t row, std::int64_t first, int count, const Vector<T>* tile,
                int step) {
    with_stored_type<T>(dtype, [&](auto stored) {
        prefetch_ahead<decltype(stored)>(to, row, first, count);
        store_as<T, decltype(stored)>(to, row, first, count, tile, step);
    });
}

template <class T>
T load_one(DType dtype, const Matrix& from, std::int64_t row, std::int64_t c) {
    const std::int64_t offset = row * from.row_stride + c * from.class_stride;
    return with_stored_type<T>(dtype, [&](auto stored) {
        return T(widened(static_cast<const decltype(stored)*>(from.data)[offset]));
    });
}

// Room for the tiles of some rows: `of_row` tiles each. A row that is too long for it keeps none, so that its backward
// computes the exponentials again.
template <class T, class Tile>
struct KeptTiles {
    std::int64_t of_row;
    int rows;  // at most kLanes, which the forward ends together
    std::unique_ptr<Tile[]> tiles;

    explicit KeptTiles(std::int64_t classes) : of_row(quotient_up(classes, kTile * kLanes<T>)), rows(kLanes<T>) {
        constexpr std::int64_t kRoom = 112 * 1024 / sizeof(Tile);  // a part of the smallest second-level cache
        // float64 is for checking gradients, which asks every backward for the same bits: there a row of several tiles,
        // whose pivots move, keeps none either.
        if (of_row > kRoom || (sizeof(T) == 8 && of_row > 1)) {
            of_row = 0;
        } else {
            rows = smaller(kRoom / of_row, rows);
        }
        tiles.reset(new Tile[std::size_t(of_row > 0 ? rows * of_row : 1)]);  // not initialised
    }

    const Tile* of(int row) const { return of_row > 0 ? tiles.get() + row * of_row : nullptr; }
};

// Several rows' numbers, one row a lane.
template <class T, class OfLanes, class OfRow>
void set_lane(OfLanes& lanes, int lane, const OfRow& row) {
    constexpr std::size_t kCount = sizeof(OfRow) / sizeof(T);
    static_assert(sizeof(OfLanes) == kCount * sizeof(Vector<T>), "the same members");
    for (std::size_t i = 0; i < kCount; ++i) {
        std::memcpy(reinterpret_cast<char*>(&lanes) + (i * kLanes<T> + std::size_t(lane)) * sizeof(T),
                    reinterpret_cast<const char*>(&row) + i * sizeof(T), sizeof(T));
    }
}

template <class T, class OfLanes, class OfRow>
void get_lane(const OfLanes& lanes, int lane, OfRow& row) {
    constexpr std::size_t kCount = sizeof(OfRow) / sizeof(T);
    static_assert(sizeof(OfLanes) == kCount * sizeof(Vector<T>), "the same members");
    for (std::size_t i = 0; i < kCount; ++i) {
        std::memcpy(reinterpret_cast<char*>(&row) + i * sizeof(T),
                    reinterpret_cast<const char*>(&lanes) + (i * kLanes<T> + std::size_t(lane)) * sizeof(T), sizeof(T));
    }
}

// The number of each lane.
template <class T>
SHIKE_SIMD Vector<T> lane_numbers() {
    Vector<T> result{};
    for (int i = 0; i < kLanes<T>; ++i) result[i] = T(i);
    return result;
}

// A class of a tile gets another number; by the vector, because one lane alone written stalls the next reading.
template <class T>
SHIKE_SIMD void set_class(Vector<T>* tile, int at, T value) {
    Vector<T>& of = tile[at / kLanes<T>];
    of = lane_numbers<T>() == T(at % kLanes<T>) ? Vector<T>{} + value : of;
}

}  // namespace
}  // namespace shike
