// The gradients of depth-wise knowledge fusion on the CPU.
#pragma once

#include "fusion/cpu_forward.h"

namespace shike {
namespace {

template <class T>
void vector_gradients_of(const Fusion& call, const FusionSaved& saved, const void* grad_output, void* vectors,
                         std::int64_t width, std::int64_t first, std::int64_t last) {
    const std::int64_t all = call.shape.channels, per_norm = (all + width - 1) / width;
    const double inverse = 1 / double(call.shape.positions());
    Line<T> g;
    for (std::int64_t unit = first; unit < last; ++unit) {
        const int norm = int(unit / per_norm), expert = norm % call.count, pair = norm < call.count ? 0 : 2;
        const std::int64_t channel = unit % per_norm * width;
        const int channels = smaller(all - channel, width);
        Line<double> weight{}, bias{};
        for (std::int64_t b = 0; b < call.shape.batch; ++b) {
            load_row<T>(call.shape.dtype, grad_output, (expert * call.shape.batch + b) * all + channel, channels, g.value);
            const T* to_weight = sums_at<T>(call, saved, expert, pair, b) + channel;
            const T* to_bias = sums_at<T>(call, saved, expert, pair + 1, b) + channel;
            for (int c = 0; c < channels; ++c) {
                weight.value[c] += double(g.value[c]) * double(to_weight[c]);
                bias.value[c] += double(g.value[c]) * double(to_bias[c]);
            }
        }
        T* out = static_cast<T*>(vectors) + std::int64_t(2 * norm) * all + channel;
        for (int c = 0; c < channels; ++c) {
            out[c] = T(weight.value[c] * inverse);
            out[all + c] = T(bias.value[c] * inverse);
        }
    }
}

// d(x) = weight upstream - constant - distance slope, where d(x_hat) has the mean and the correlation of `upstream`
// taken out: weight = gamma rstd, slope = weight rstd d(gamma) / N, constant = weight d(beta) / N - rest slope.
template <class T>
struct Backward {
    Line<T> constant{}, slope{};

    void load(const Fusion& call, int index, const void* vectors, double inverse_count, std::int64_t channel,
              int channels, const Channels<T>& norm) {
        const T* d_gamma = static_cast<const T*>(vectors) + std::int64_t(2 * index) * call.shape.channels + channel;
        const T* d_beta = d_gamma + call.shape.channels;
        for (int c = 0; c < channels; ++c) {
            const T share = norm.scale.value[c] * T(inverse_count);
            slope.value[c] = share * norm.rstd.value[c] * d_gamma[c];
            constant.value[c] = T(double(share * d_beta[c]) - norm.rest.value[c] * double(slope.value[c]));
        }
    }

    SHIKE_SIMD Vector<T> gradient(const Vector<T>& upstream, const Vector<T>& d, int c, const Channels<T>& norm) const {
        return upstream * at(norm.scale.value + c) - at(constant.value + c) - d * at(slope.value + c);
    }
};

// What a block of channels needs: constant over samples, but for the gradient of f.
template <class T>
struct BackwardBlock {
    Channels<T> norm, deep_norm;
    Backward<T> shallow, deep;
    Line<T> upstream{};  // g / HW
};

template <class T, bool kFolded, Shallow kShallow, bool kPastCaches>
void write_gradients(const Tiles<const T>& tiles, const Tiles<T>& out, int rows, int vectors, std::int64_t ahead,
                     const BackwardBlock<T>& block) {
    using V = Vector<T>;
    const auto write = kPastCaches ? put_past_caches<T> : put<T>;
    by_rows<2>(rows, [&](auto group, int r) {
        for (int v = 0; v < vectors; ++v) {
            const int c = v * kLanes<T>;
            const V upstream = at(block.upstream.value + c);
            for (int i = 0; i < group.kCount; ++i) {
                fetch(tiles.shallow.row[r + i] + c + ahead);
                fetch(tiles.deep.row[r + i] + c + ahead);
                if constexpr (kFolded) fetch(tiles.shortcut.row[r + i] + c + ahead);
                const V x = at(tiles.shallow.row[r + i] + c), y = at_once(tiles.deep.row[r + i] + c);
                if constexpr (kShallow == Shallow::kPlain) {
                    write(upstream * x, out.deep.row[r + i] + c);
                    write(upstream * y, out.shallow.row[r + i] + c);
                    continue;
                }
                const auto f = factors<T, kFolded, kShallow>(tiles, r + i, c, x, y, block.norm, block.deep_norm);
                const V to_shallow = block.shallow.gradient(upstream * f.weight, f.distance, c, block.norm);
                write(to_shallow, out.shallow.row[r + i] + c);
                V to_deep = upstream * f.shallow;
                if constexpr (kFolded) {
                    to_deep = f.deep_off ? V{} : to_deep;
                    write(to_deep, out.shortcut.row[r + i] + c);
                    to_deep = block.deep.gradient(to_deep, f.deep_distance, c, block.deep_norm);
                }
                write(to_deep, out.deep.row[r + i] + c);
            }
        }
    });
}

constexpr std::int64_t kCacheBytes = 20 << 20;  // of gradients: with the maps they fill a usual last-level cache

template <class T, bool kFolded, Shallow kShallow>
void map_gradients_of(const Fusion& call, int expert, const MapBlocks& blocks, const FusionSaved& saved,
                      const FusionGradient& gradient, std::int64_t first, std::int64_t last) {
    constexpr int kMaps = kFolded ? 3 : 2;
    alignas(64) T scratch[kMaps][kTileElements], out_scratch[kMaps][kTileElements];
    const ExpertFusion& maps = call.expert[expert];
    const ExpertGradient& outs = gradient.expert[expert];
    const MapShape& shape = call.shape;
    const std::int64_t positions = shape.positions(), ahead = distance_ahead<T>(maps.deep);
    const std::int64_t bytes = kMaps * call.count * shape.values() * shape.channels * std::int64_t(sizeof(T));
    const bool past_caches = is_stored_as<T>(shape.dtype) && bytes > kCacheBytes;
    const T inverse = T(1 / double(positions));
    BackwardBlock<T> block;
    for (std::int64_t unit = first; unit < last; ++unit) {
        const std::int64_t b = unit / blocks.per_map, channel = unit % blocks.per_map * blocks.width;
        const int channels = smaller(shape.channels - channel, blocks.width);
        if (call.normalised && (unit == first || blocks.per_map > 1)) {
            const double share = gradient.inverse_count;
            block.norm.load(call, maps.norm, expert, saved.mean_rstd, channel, channels);
            block.shallow.load(call, expert, gradient.vectors, share, channel, channels, block.norm);
            if constexpr (kFolded) {
                const int index = call.count + expert;
                block.deep_norm.load(call, maps.deep_norm, index, saved.mean_rstd, channel, channels);
                block.deep.load(call, index, gradient.vectors, share, channel, channels, block.deep_norm);
            }
        }
        const std::int64_t row = std::int64_t(expert) * shape.batch + b;
        load_row<T>(shape.dtype, gradient.grad_output, row * shape.channels + channel, channels, block.upstream.value);
        for (int c = 0; c < channels; ++c) block.upstream.value[c] *= inverse;
        for (std::int64_t done = 0; done < positions;) {
            const int rows = smaller(positions - done, blocks.rows);
            const Extent extent{b * positions + done, rows, channel, channels};
            Tiles<const T> tiles;
            Tiles<T> out;
            load<T>(maps.deep, shape, extent, scratch[0], tiles.deep);
            load<T>(maps.shallow, shape, extent, scratch[1], tiles.shallow);
            prepare<T>(outs.deep, shape, extent, out_scratch[0], out.deep);
            prepare<T>(outs.shallow, shape, extent, out_scratch[1], out.shallow);
            if constexpr (kFolded) {
                load<T>(maps.shortcut, shape, extent, scratch[2], tiles.shortcut);
                prepare<T>(outs.shortcut, shape, extent, out_scratch[2], out.shortcut);
            }
            const bool aligned = is_aligned(out.deep, rows) && is_aligned(out.shallow, rows) &&
                                 (!kFolded || is_aligned(out.shortcut, rows));
            const auto write = past_caches && aligned ? write_gradients<T, kFolded, kShallow, true>
                                                      : write_gradients<T, kFolded, kShallow, false>;
            write(tiles, out, rows, extent.vectors<T>(), ahead, block);
            finish<T>(outs.deep, shape, extent, out_scratch[0]);
            finish<T>(outs.shallow, shape, extent, out_scratch[1]);
            if constexpr (kFolded) finish<T>(outs.shortcut, shape, extent, out_scratch[2]);
            done += rows;
        }
    }
#if defined(__AVX2__)
    if (past_caches) _mm_sfence();  // other threads must see what went past the caches
#endif
}

}  // namespace
}  // namespace shike
