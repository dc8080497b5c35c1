// The forward of depth-wise knowledge fusion on the CPU, for given statistics.
#pragma once

#include "fusion/cpu_lines.h"
#include "fusion/cpu_statistics.h"

namespace shike {
namespace {

// A normalisation's numbers for a block of channels: with the distance d = x - mean from the mean's leading part,
// x_hat = (d - rest) rstd and gamma x_hat + beta = d scale + shift. The rest of the mean is below a rounding of its
// leading part, so it may be multiplied out: nothing cancels. Padding is 0.
template <class T>
struct Channels {
    Line<T> mean{}, rstd{}, scale{}, shift{};
    Line<double> rest{}, bias{};

    void load(const Fusion& call, const BatchNorm& norm, int index, const void* mean_rstd, std::int64_t channel,
              int channels) {
        const T* from = static_cast<const T*>(mean_rstd) + 3 * index * call.shape.channels + channel;
        const T* gamma = norm.weight == nullptr ? nullptr : static_cast<const T*>(norm.weight) + channel;
        const T* beta = norm.bias == nullptr ? nullptr : static_cast<const T*>(norm.bias) + channel;
        for (int c = 0; c < channels; ++c) {
            mean.value[c] = from[c];
            rest.value[c] = double(from[call.shape.channels + c]);
            rstd.value[c] = from[2 * call.shape.channels + c];
            scale.value[c] = gamma == nullptr ? rstd.value[c] : gamma[c] * rstd.value[c];
            bias.value[c] = beta == nullptr ? 0 : double(beta[c]);
            shift.value[c] = T(bias.value[c] - rest.value[c] * double(scale.value[c]));
        }
        for (int c = channels; c < kMaxWidth && c % kLanes<T> != 0; ++c) {
            mean.value[c] = rstd.value[c] = scale.value[c] = shift.value[c] = 0;
        }
    }

    SHIKE_SIMD Vector<T> distance(const Vector<T>& x, int c) const { return x - at(mean.value + c); }
    SHIKE_SIMD Vector<T> affine(const Vector<T>& d, int c) const {
        return d * at(scale.value + c) + at(shift.value + c);
    }
};

enum class Shallow { kPlain, kAffine, kRelu };

// The three maps of an expert.
template <class T>
struct Tiles {
    Tile<T> deep, shallow, shortcut;
};

// Where a ReLU yields 0 and passes no gradient on. As in PyTorch, NaN passes.
template <class T>
SHIKE_SIMD auto inactive(const Vector<T>& value) {
    return value <= Vector<T>{};
}

// What is multiplied at a position, and what its derivatives are made of.
template <class T>
struct Factors {
    Vector<T> distance, shallow;  // of x from its mean; A
    Vector<T> weight;             // m D: D where the shallow ReLU is active
    Vector<T> deep_distance;      // of y from its mean
    decltype(Vector<T>{} <= Vector<T>{}) deep_off;
};

template <class T, bool kFolded, Shallow kShallow>
SHIKE_SIMD Factors<T> factors(const Tiles<const T>& tiles, int row, int c, const Vector<T>& x, const Vector<T>& y,
                              const Channels<T>& norm, const Channels<T>& deep_norm) {
    using V = Vector<T>;
    Factors<T> f{};
    f.weight = y;
    if constexpr (kFolded) {
        f.deep_distance = deep_norm.distance(y, c);
        const V sum = deep_norm.affine(f.deep_distance, c) + at(tiles.shortcut.row[row] + c);
        f.deep_off = inactive<T>(sum);
        f.weight = f.deep_off ? V{} : sum;
    }
    f.distance = norm.distance(x, c);
    f.shallow = norm.affine(f.distance, c);
    if constexpr (kShallow == Shallow::kRelu) {
        const auto off = inactive<T>(f.shallow);
        f.weight = off ? V{} : f.weight;
        f.shallow = off ? V{} : f.shallow;
    }
    return f;
}

// Adds up per channel, for rows of one sample: sum D d and sum D, with D only where the ReLU is active (kPlain: sum D
// x); folded also sum A d' and sum A where the deep ReLU is.
template <class T, bool kFolded, Shallow kShallow>
void add_forward(const Tiles<const T>& tiles, int rows, int vectors, std::int64_t ahead, const Channels<T>& norm,
                 const Channels<T>& deep_norm, Line<T>* sums) {
    using V = Vector<T>;
    by_rows<4>(rows, [&](auto group, int r) {
        for (int v = 0; v < vectors; ++v) {
            const int c = v * kLanes<T>;
            V m1 = at(sums[0].value + c), m2{}, p1{}, p2{};
            if constexpr (kShallow != Shallow::kPlain) m2 = at(sums[1].value + c);
            if constexpr (kFolded) p1 = at(sums[2].value + c), p2 = at(sums[3].value + c);
            for (int i = 0; i < group.kCount; ++i) {
                fetch(tiles.shallow.row[r + i] + c + ahead);
                fetch(tiles.deep.row[r + i] + c + ahead);
                if constexpr (kFolded) fetch(tiles.shortcut.row[r + i] + c + ahead);
                const V x = at(tiles.shallow.row[r + i] + c), y = at_once(tiles.deep.row[r + i] + c);
                if constexpr (kShallow == Shallow::kPlain) {
                    m1 += y * x;
                    continue;
                }
                const auto f = factors<T, kFolded, kShallow>(tiles, r + i, c, x, y, norm, deep_norm);
                m1 += f.weight * f.distance;
                m2 += f.weight;
                if constexpr (kFolded) {
                    const V deep_weight = f.deep_off ? V{} : f.shallow;
                    p1 += deep_weight * f.deep_distance;
                    p2 += deep_weight;
                }
            }
            put<T>(m1, sums[0].value + c);
            if constexpr (kShallow != Shallow::kPlain) put<T>(m2, sums[1].value + c);
            if constexpr (kFolded) put<T>(p1, sums[2].value + c), put<T>(p2, sums[3].value + c);
        }
    });
}

// Sums [S, B, C] of an expert: sum s, row b.
template <class T>
T* sums_at(const Fusion& call, const FusionSaved& saved, int expert, int s, std::int64_t b) {
    return static_cast<T*>(saved.sums) +
           ((std::int64_t(expert) * call.sums() + s) * call.shape.batch + b) * call.shape.channels;
}

// f and, for the backward, the sums of one sample from its totals in double; these are of distances from the mean, in
// which its rest is missing.
template <class T>
void store_forward(const Fusion& call, int expert, const FusionSaved& saved, void* f, std::int64_t b,
                   std::int64_t channel, int channels, const Channels<T>& norm, const Channels<T>& deep_norm,
                   const Line<double>* totals) {
    Line<T> pooled;
    const double inverse = 1 / double(call.shape.positions());
    if (!call.normalised) {
        for (int c = 0; c < channels; ++c) pooled.value[c] = T(totals[0].value[c] * inverse);
    } else {
        T* m1 = sums_at<T>(call, saved, expert, 0, b) + channel;
        T* m2 = sums_at<T>(call, saved, expert, 1, b) + channel;
        for (int c = 0; c < channels; ++c) {
            const double distances = totals[0].value[c] - norm.rest.value[c] * totals[1].value[c];
            const double scaled = double(norm.scale.value[c]) * distances;
            pooled.value[c] = T((scaled + norm.bias.value[c] * totals[1].value[c]) * inverse);
            m1[c] = T(double(norm.rstd.value[c]) * distances);
            m2[c] = T(totals[1].value[c]);
        }
    }
    if (call.folded) {
        T* p1 = sums_at<T>(call, saved, expert, 2, b) + channel;
        T* p2 = sums_at<T>(call, saved, expert, 3, b) + channel;
        for (int c = 0; c < channels; ++c) {
            const double distances = totals[2].value[c] - deep_norm.rest.value[c] * totals[3].value[c];
            p1[c] = T(double(deep_norm.rstd.value[c]) * distances);
            p2[c] = T(totals[3].value[c]);
        }
    }
    const std::int64_t row = std::int64_t(expert) * call.shape.batch + b;
    store_row<T>(call.shape.dtype, f, row * call.shape.channels + channel, channels, pooled.value);
}

template <class T, bool kFolded, Shallow kShallow>
void forward_of(const Fusion& call, int expert, const MapBlocks& blocks, const FusionSaved& saved, void* f,
                std::int64_t first, std::int64_t last) {
    alignas(64) T scratch[kFolded ? 3 : 2][kTileElements];
    constexpr int kSums = kFolded ? 4 : kShallow == Shallow::kPlain ? 1 : 2;
    const ExpertFusion& maps = call.expert[expert];
    const std::int64_t positions = call.shape.positions(), ahead = distance_ahead<T>(maps.deep);
    Line<T> sums[kSums]{};
    Line<double> totals[kSums];
    Channels<T> norm, deep_norm;
    for (std::int64_t unit = first; unit < last; ++unit) {
        const std::int64_t b = unit / blocks.per_map, channel = unit % blocks.per_map * blocks.width;
        const int channels = smaller(call.shape.channels - channel, blocks.width);
        if (unit == first || blocks.per_map > 1) {
            if (call.normalised) norm.load(call, maps.norm, expert, saved.mean_rstd, channel, channels);
            if (kFolded) deep_norm.load(call, maps.deep_norm, call.count + expert, saved.mean_rstd, channel, channels);
        }
        for (Line<double>& total : totals) clear(total, channels);
        for (std::int64_t done = 0; done < positions;) {
            const int segment = smaller(positions - done, kSegment);
            for (int row = 0; row < segment;) {
                const int rows = smaller(segment - row, blocks.rows);
                const Extent extent{b * positions + done + row, rows, channel, channels};
                Tiles<const T> tiles;
                load<T>(maps.deep, call.shape, extent, scratch[0], tiles.deep);
                load<T>(maps.shallow, call.shape, extent, scratch[1], tiles.shallow);
                if constexpr (kFolded) load<T>(maps.shortcut, call.shape, extent, scratch[2], tiles.shortcut);
                add_forward<T, kFolded, kShallow>(tiles, rows, extent.vectors<T>(), ahead, norm, deep_norm, sums);
                row += rows;
            }
            for (int s = 0; s < kSums; ++s) add_and_clear(sums[s].value, channels, totals[s].value);
            done += segment;
        }
        store_forward(call, expert, saved, f, b, channel, channels, norm, deep_norm, totals);
    }
}

// sum D (x - mean) = sum D (x - origin) - (mean - origin) sum D, with the leading part of the mean
template <class T>
void finish_moments_of(const Fusion& call, int expert, const Moments& moments, const FusionSaved& saved, void* f,
                       std::int64_t first, std::int64_t last) {
    alignas(64) T scratch[kTileElements];
    Line<T> origin;
    Line<double> totals[2];
    Channels<T> norm;
    for (std::int64_t channel = 0; channel < call.shape.channels; channel += kMaxWidth) {
        const int channels = smaller(call.shape.channels - channel, kMaxWidth);
        load_origin(call.expert[expert].shallow, call.shape, channel, channels, scratch, origin.value);
        norm.load(call, call.expert[expert].norm, expert, saved.mean_rstd, channel, channels);
        for (std::int64_t b = first; b < last; ++b) {
            const std::int64_t offset = b * call.shape.channels + channel;
            for (int c = 0; c < channels; ++c) {
                const double deep = moments.deep[offset + c];
                const double distance = double(norm.mean.value[c]) - double(origin.value[c]);
                totals[0].value[c] = moments.product[offset + c] - distance * deep;
                totals[1].value[c] = deep;
            }
            store_forward(call, expert, saved, f, b, channel, channels, norm, norm, totals);
        }
    }
}

}  // namespace
}  // namespace shike
