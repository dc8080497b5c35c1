// Statistics of feature maps on the CPU, and the sums of a forward that reads the maps once.
#pragma once

#include "fusion/cpu_lines.h"

namespace shike {
namespace {

// Sums of channels whose roundings are kept beside them: one value may outweigh the others, which would then each leave
// a rounding of it.
template <class T>
struct SumWithRest {
    Line<T> sum{}, rest{};

    SHIKE_SIMD void add(const Vector<T>& number, int c) {
        const Vector<T> before = at(sum.value + c), after = before + number, added = after - before;
        put<T>(at(rest.value + c) + ((before - (after - added)) + (number - added)), rest.value + c);
        put<T>(after, sum.value + c);
    }
    double taken(int c) {
        const double total = double(sum.value[c]) + double(rest.value[c]);
        sum.value[c] = rest.value[c] = 0;
        return total;
    }
};

// Statistics of the positions seen so far.
struct Statistics {
    double count;
    Line<double> mean, squares;

    void start(int channels) {
        count = 0;
        clear(mean, channels);
        clear(squares, channels);
    }

    // Merges `rows` positions with the sums of (x - shift) and of its square: Chan's formula. Clears the sums.
    template <class T>
    void merge(int rows, const T* shift, SumWithRest<T>& sum, SumWithRest<T>& sum_of_squares, int channels) {
        const double n = rows, inverse = 1 / n, share = n / (count + n), between = count * share;
        for (int c = 0; c < channels; ++c) {
            const double s = sum.taken(c), tile_mean = double(shift[c]) + s * inverse;
            const double tile_squares = sum_of_squares.taken(c) - s * s * inverse;
            const double delta = tile_mean - mean.value[c];
            mean.value[c] += delta * share;
            // Rounding may make it negative. NaN becomes 0 here, but delta is NaN then too.
            squares.value[c] += (tile_squares > 0 ? tile_squares : 0) + delta * delta * between;
        }
        count += n;
    }
};

template <class T>
struct StatisticsSums {
    Line<T> shift, product{}, deep{};
    SumWithRest<T> sum, squares;
};

template <class T, bool kWithDeep>
void add_statistics(const Tile<const T>& x, const Tile<const T>& deep, int rows, int vectors, std::int64_t ahead,
                    StatisticsSums<T>& sums) {
    by_rows<4>(rows, [&](auto group, int r) {
        for (int v = 0; v < vectors; ++v) {
            const int c = v * kLanes<T>;
            const Vector<T> shift = at(sums.shift.value + c);
            Vector<T> sum{}, squares{}, product{}, total{};
            if constexpr (kWithDeep) product = at(sums.product.value + c), total = at(sums.deep.value + c);
            for (int i = 0; i < group.kCount; ++i) {
                fetch(x.row[r + i] + c + ahead);
                if constexpr (kWithDeep) fetch(deep.row[r + i] + c + ahead);
                const Vector<T> d = at(x.row[r + i] + c) - shift;
                sum += d;
                squares += d * d;
                if constexpr (kWithDeep) {
                    const Vector<T> weight = at(deep.row[r + i] + c);
                    product += weight * d;
                    total += weight;
                }
            }
            sums.sum.add(sum, c);
            sums.squares.add(squares, c);
            if constexpr (kWithDeep) put<T>(product, sums.product.value + c), put<T>(total, sums.deep.value + c);
        }
    });
}

// What the distances of a segment are relative to: near the mean, so that little cancels. The mean of what came before,
// at first that of the first rows.
template <class T>
void choose_shift(const Tile<const T>& x, int rows, int vectors, int channels, const Statistics& statistics,
                  Line<T>& shift) {
    if (statistics.count > 0) {
        for (int c = 0; c < channels; ++c) shift.value[c] = T(statistics.mean.value[c]);
        return;
    }
    for (int v = 0; v < vectors; ++v) {
        const Vector<T> first = at(x.row[0] + v * kLanes<T>);
        Vector<T> sum{};
        for (int r = 1; r < rows; ++r) sum += at(x.row[r] + v * kLanes<T>) - first;
        put<T>(first + sum / T(rows), shift.value + v * kLanes<T>);
    }
}

// The values of the first position of the first sample: what the products are relative to.
template <class T>
void load_origin(const FeatureMap& map, const MapShape& shape, std::int64_t channel, int channels, T* scratch,
                 T* origin) {
    Tile<const T> tile;
    load<T>(map, shape, {0, 1, channel, channels}, scratch, tile);
    for (int c = 0; c < channels; ++c) origin[c] = tile.row[0][c];
}

template <class T, bool kWithDeep>
void statistics_of(const FeatureMap& map, const FeatureMap* deep, const MapShape& shape, const MapBlocks& blocks,
                   const Partials& partials, const Moments& moments, std::int64_t first, std::int64_t last) {
    alignas(64) T scratch[kTileElements], deep_scratch[kWithDeep ? kTileElements : 1];
    StatisticsSums<T> sums;
    Line<T> origin;
    Line<double> product, total;
    Statistics statistics;
    const std::int64_t positions = shape.positions(), ahead = distance_ahead<T>(map);
    for (std::int64_t unit = first; unit < last; ++unit) {
        const std::int64_t group = unit / blocks.per_map, channel = unit % blocks.per_map * blocks.width;
        const int channels = smaller(shape.channels - channel, blocks.width);
        const std::int64_t begin = blocks.group_begin(group), end = std::min(begin + blocks.group, shape.batch);
        if (kWithDeep) load_origin(map, shape, channel, channels, scratch, origin.value);
        statistics.start(channels);
        // With the products of each sample, segments end where samples do.
        const std::int64_t stretch = kWithDeep ? positions : (end - begin) * positions;
        for (std::int64_t start = begin * positions; start < end * positions; start += stretch) {
            if constexpr (kWithDeep) clear(product, channels), clear(total, channels);
            for (std::int64_t done = 0; done < stretch;) {
                const int segment = smaller(stretch - done, kSegment);
                for (int row = 0; row < segment;) {
                    const int rows = smaller(segment - row, blocks.rows);
                    const Extent extent{start + done + row, rows, channel, channels};
                    Tile<const T> x, weights;
                    load<T>(map, shape, extent, scratch, x);
                    if constexpr (kWithDeep) load<T>(*deep, shape, extent, deep_scratch, weights);
                    const int vectors = extent.vectors<T>();
                    if (row == 0) choose_shift(x, rows, vectors, channels, statistics, sums.shift);
                    add_statistics<T, kWithDeep>(x, weights, rows, vectors, ahead, sums);
                    row += rows;
                }
                if constexpr (kWithDeep) {
                    for (int c = 0; c < channels; ++c) {
                        const double shift = double(sums.shift.value[c]) - double(origin.value[c]);
                        product.value[c] += double(sums.product.value[c]) + shift * double(sums.deep.value[c]);
                        sums.product.value[c] = 0;
                    }
                    add_and_clear(sums.deep.value, channels, total.value);
                }
                statistics.merge(segment, sums.shift.value, sums.sum, sums.squares, channels);
                done += segment;
            }
            if constexpr (kWithDeep) {
                const std::int64_t offset = start / positions * shape.channels + channel;
                std::memcpy(moments.product + offset, product.value, std::size_t(channels) * sizeof(double));
                std::memcpy(moments.deep + offset, total.value, std::size_t(channels) * sizeof(double));
            }
        }
        const std::int64_t offset = group * shape.channels + channel;
        std::memcpy(partials.mean + offset, statistics.mean.value, std::size_t(channels) * sizeof(double));
        std::memcpy(partials.squares + offset, statistics.squares.value, std::size_t(channels) * sizeof(double));
    }
}

}  // namespace
}  // namespace shike
