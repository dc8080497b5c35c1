// Tiles of feature maps for the CPU kernels: some positions and some channels of a map, seen as rows of float or double
// whose channels are neighbours. A tile lies where the map lies if it can, else in scratch memory, converted,
// transposed and padded to whole vectors.
#pragma once

#include "fusion/call.h"
#include "common/elements.h"

namespace shike {
namespace {

constexpr int kMaxRows = 64;
constexpr int kMaxWidth = 512;       // channels
constexpr int kTileElements = 8192;  // 32 KiB of float: the tiles of a kernel fit the second cache

// Some channels at some positions, counted through all samples: b H W + h W + w.
struct Extent {
    std::int64_t position;  // first
    int rows;
    std::int64_t channel;  // first
    int channels;

    template <class T>
    int vectors() const {
        return (channels + kLanes<T> - 1) / kLanes<T>;
    }
};

template <class T>
struct Tile {
    T* row[kMaxRows];
};

// From the map's first element to the positions of a tile, in elements.
inline void offsets_of(const FeatureMap& map, const MapShape& shape, const Extent& extent, std::int64_t* offsets) {
    const std::int64_t sample = extent.position / shape.positions(), rest = extent.position % shape.positions();
    std::int64_t b = sample, h = rest / shape.width, w = rest % shape.width;
    const bool one_step = map.h == shape.width * map.w && rest + extent.rows <= shape.positions();
    if (one_step) {  // from position to position
        const std::int64_t first = b * map.b + rest * map.w + extent.channel * map.c;
        for (int r = 0; r < extent.rows; ++r) offsets[r] = first + r * map.w;
        return;
    }
    for (int r = 0; r < extent.rows; ++r) {
        offsets[r] = b * map.b + h * map.h + w * map.w + extent.channel * map.c;
        if (++w < shape.width) continue;
        w = 0;
        if (++h < shape.height) continue;
        h = 0;
        ++b;
    }
}

template <class T>
SHIKE_SIMD bool is_stored_as(DType dtype) {
    return dtype == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32);
}

// Whether the rows of the map are what the arithmetic wants.
template <class T>
SHIKE_SIMD bool lies_well(const FeatureMap& map, const MapShape& shape, const Extent& extent) {
    return is_stored_as<T>(shape.dtype) && map.c == 1 && extent.channels % kLanes<T> == 0;
}

template <class T, class S>
void copy_in(const FeatureMap& map, const Extent& extent, const std::int64_t* offsets, T* scratch) {
    const S* source = static_cast<const S*>(map.data);
    const int vectors = extent.vectors<T>(), padded = vectors * kLanes<T>, whole = extent.channels / kLanes<T>;
    if (map.c == 1) {
        for (int r = 0; r < extent.rows; ++r) {
            const S* from = source + offsets[r];
            T* to = scratch + r * padded;
            for (int v = 0; v < whole; ++v) store_vector<T, T>(load_vector<T, S>(from + v * kLanes<T>), to + v * kLanes<T>);
            if (whole < vectors) {
                const Vector<T> last = load_some<T, S>(from + whole * kLanes<T>, 1, extent.channels - whole * kLanes<T>, T(0));
                store_vector<T, T>(last, to + whole * kLanes<T>);
            }
        }
        return;
    }
    for (int c = 0; c < padded; ++c) {
        const S* from = source + c * map.c;
        if (c < extent.channels) {
            for (int r = 0; r < extent.rows; ++r) scratch[r * padded + c] = T(widened(from[offsets[r]]));
        } else {
            for (int r = 0; r < extent.rows; ++r) scratch[r * padded + c] = 0;
        }
    }
}

template <class T, class S>
void copy_out(const FeatureMap& map, const Extent& extent, const std::int64_t* offsets, const T* scratch) {
    S* destination = static_cast<S*>(map.data);
    const int padded = extent.vectors<T>() * kLanes<T>, whole = extent.channels / kLanes<T>;
    if (map.c == 1) {
        for (int r = 0; r < extent.rows; ++r) {
            const T* from = scratch + r * padded;
            S* to = destination + offsets[r];
            for (int v = 0; v < whole; ++v) store_vector<T, S>(load_vector<T, T>(from + v * kLanes<T>), to + v * kLanes<T>);
            for (int c = whole * kLanes<T>; c < extent.channels; ++c) narrow(from[c], to[c]);
        }
        return;
    }
    for (int c = 0; c < extent.channels; ++c) {
        S* to = destination + c * map.c;
        for (int r = 0; r < extent.rows; ++r) narrow(scratch[r * padded + c], to[offsets[r]]);
    }
}

// The rows of a map to read; what is padded is 0.
template <class T>
void load(const FeatureMap& map, const MapShape& shape, const Extent& extent, T* scratch, Tile<const T>& tile) {
    std::int64_t offsets[kMaxRows];
    offsets_of(map, shape, extent, offsets);
    if (lies_well<T>(map, shape, extent)) {
        for (int r = 0; r < extent.rows; ++r) tile.row[r] = static_cast<const T*>(map.data) + offsets[r];
        return;
    }
    with_stored_type<T>(shape.dtype, [&](auto stored) {
        copy_in<T, decltype(stored)>(map, extent, offsets, scratch);
    });
    const int padded = extent.vectors<T>() * kLanes<T>;
    for (int r = 0; r < extent.rows; ++r) tile.row[r] = scratch + r * padded;
}

// The rows of a map to write, and what has to be done when they are written.
template <class T>
void prepare(const FeatureMap& map, const MapShape& shape, const Extent& extent, T* scratch, Tile<T>& tile) {
    const int padded = extent.vectors<T>() * kLanes<T>;
    if (!lies_well<T>(map, shape, extent)) {
        for (int r = 0; r < extent.rows; ++r) tile.row[r] = scratch + r * padded;
        return;
    }
    std::int64_t offsets[kMaxRows];
    offsets_of(map, shape, extent, offsets);
    for (int r = 0; r < extent.rows; ++r) tile.row[r] = static_cast<T*>(map.data) + offsets[r];
}

template <class T>
void finish(const FeatureMap& map, const MapShape& shape, const Extent& extent, const T* scratch) {
    if (lies_well<T>(map, shape, extent)) return;
    std::int64_t offsets[kMaxRows];
    offsets_of(map, shape, extent, offsets);
    with_stored_type<T>(shape.dtype, [&](auto stored) {
        copy_out<T, decltype(stored)>(map, extent, offsets, scratch);
    });
}

// One row of numbers next to each other, such as a vector [C] or a row of [B, C].
template <class T>
void load_row(DType dtype, const void* data, std::int64_t offset, int count, T* to) {
    with_stored_type<T>(dtype, [&](auto stored) {
        const auto* from = static_cast<const decltype(stored)*>(data) + offset;
        for (int i = 0; i < count; ++i) to[i] = widened(from[i]);
    });
}

template <class T>
void store_row(DType dtype, void* data, std::int64_t offset, int count, const T* from) {
    with_stored_type<T>(dtype, [&](auto stored) {
        auto* to = static_cast<decltype(stored)*>(data) + offset;
        for (int i = 0; i < count; ++i) narrow(from[i], to[i]);
    });
}

}  // namespace
}  // namespace shike
