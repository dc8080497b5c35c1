// The threads of the CPU kernels of depth-wise knowledge fusion, and the merging of statistics.
#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "common/cpu_level.h"
#include "common/grid.h"
#include "common/threads.h"
#include "fusion/cpu_kernels.h"
#include "fusion/launch.h"

namespace shike {
namespace {

// The blocks for maps of this shape; `channels_inside`: channels are neighbours in the memory of every map.
MapBlocks map_blocks(const MapShape& shape, bool channels_inside) {
    constexpr std::int64_t kGroupPositions = 128;  // partial statistics are then small beside the maps
    const bool in_place = shape.dtype == DType::kFloat32 || shape.dtype == DType::kFloat64;
    MapBlocks blocks{};
    blocks.group = std::max<std::int64_t>(1, std::min(shape.batch, kGroupPositions / shape.positions()));
    blocks.groups = (shape.batch + blocks.group - 1) / blocks.group;
    // Wide blocks read whole pages of maps whose channels are neighbours; others are transposed in squares.
    blocks.width = channels_inside ? (in_place ? 512 : 256) : 64;
    blocks.rows = channels_inside ? 16 : 64;
    blocks.per_map = (shape.channels + blocks.width - 1) / blocks.width;
    return blocks;
}

const FusionKernels& kernels_of(const MapShape& shape) { return kernels_for<FusionKernels>(shape.dtype); }

bool channels_inside(const FeatureMap& map) { return map.c == 1; }
bool channels_inside(const Fusion& call) {
    bool inside = true;
    for (int k = 0; k < call.count; ++k) {
        const ExpertFusion& expert = call.expert[k];
        inside &= channels_inside(expert.deep) && channels_inside(expert.shallow);
        inside &= !call.folded || channels_inside(expert.shortcut);
    }
    return inside;
}

double elements(const MapShape& shape) { return double(shape.values()) * double(shape.channels); }

// Calls run(index, first, last) for the units of `count` equal parts, among threads.
template <class Run>
void over_parts(std::int64_t count, std::int64_t units, double all_elements, int threads, const Run& run) {
    over_ranges(count * units, all_elements, threads, [&](std::int64_t first, std::int64_t last) {
        while (first < last) {
            const std::int64_t part = first / units, end = std::min(last, (part + 1) * units);
            run(part, first - part * units, end - part * units);
            first = end;
        }
    });
}

std::unique_ptr<double[]> doubles(std::int64_t count) {
    return std::unique_ptr<double[]>(new double[std::size_t(count)]);
}

// Statistics of several maps: partial ones of groups of samples, then merged, in fixed order.
struct MapStatistics {
    std::unique_ptr<double[]> partial, mean, squares;
    std::int64_t groups, channels;

    MapStatistics(std::int64_t maps, const MapBlocks& blocks, std::int64_t channel_count)
        : partial(doubles(2 * maps * blocks.groups * channel_count)),
          mean(doubles(maps * channel_count)),
          squares(doubles(maps * channel_count)),
          groups(blocks.groups),
          channels(channel_count) {}

    Partials of_map(std::int64_t index) const {
        double* first = partial.get() + 2 * index * groups * channels;
        return {first, first + groups * channels};
    }

    // Chan's formula for the channels first ... last - 1 of a map.
    void merge(std::int64_t index, const MapShape& shape, const MapBlocks& blocks, std::int64_t first,
               std::int64_t last) const {
        const Partials partials = of_map(index);
        double *to_mean = mean.get() + index * channels, *to_squares = squares.get() + index * channels;
        std::copy(partials.mean + first, partials.mean + last, to_mean + first);
        std::copy(partials.squares + first, partials.squares + last, to_squares + first);
        for (std::int64_t g = 1; g < groups; ++g) {
            const double before = double(g * blocks.group * shape.positions());
            const double count = double((std::min((g + 1) * blocks.group, shape.batch) - g * blocks.group) * shape.positions());
            const double share = count / (before + count), between = before * share;
            const double *group_mean = partials.mean + g * channels, *group_squares = partials.squares + g * channels;
            for (std::int64_t c = first; c < last; ++c) {
                const double delta = group_mean[c] - to_mean[c];
                to_mean[c] += delta * share;
                to_squares[c] += group_squares[c] + delta * delta * between;
            }
        }
    }
};

template <class T>
void split(double value, T* leading, T* rest) {
    *leading = T(value);
    *rest = T(value - double(*leading));
}

// From mean and squares: mean_rstd [3, C], statistics [2, C] and running statistics.
template <class T>
void normalise(const BatchNorm& norm, double count, std::int64_t channels, std::int64_t first, std::int64_t last,
               const double* mean, const double* squares, T* mean_rstd, T* statistics) {
    T *running_mean = static_cast<T*>(norm.running_mean), *running_var = static_cast<T*>(norm.running_var);
    for (std::int64_t c = first; c < last; ++c) {
        const double unbiased = squares[c] / (count - 1);
        if (running_mean != nullptr) {
            running_mean[c] = T(norm.momentum * mean[c] + (1 - norm.momentum) * double(running_mean[c]));
            running_var[c] = T(norm.momentum * unbiased + (1 - norm.momentum) * double(running_var[c]));
        }
        split(mean[c], mean_rstd + c, mean_rstd + channels + c);
        statistics[c] = T(mean[c]);
        statistics[channels + c] = T(unbiased);
        mean_rstd[2 * channels + c] = T(1 / std::sqrt(squares[c] / count + norm.eps));
    }
}

constexpr std::int64_t kVectorBlock = 256;  // channels of a unit where only vectors are computed

}  // namespace

void cpu_dkf_forward(const Fusion& call, const FusionSaved& saved, bool training, void* f, void* statistics_out,
                     int threads) {
    const MapShape& shape = call.shape;
    const MapBlocks blocks = map_blocks(shape, channels_inside(call));
    const FusionKernels& kernels = kernels_of(shape);
    const std::int64_t channels = shape.channels, norms = training ? call.norms() : 0;
    const auto one_pass = [&](std::int64_t k) { return norms > 0 && !call.folded && !call.expert[k].relu; };
    std::int64_t one_passes = 0;
    for (int k = 0; k < call.count; ++k) one_passes += one_pass(k);

    const std::int64_t sample_row = shape.batch * channels;
    const std::unique_ptr<double[]> moment_memory = doubles(2 * one_passes * sample_row);
    std::vector<Moments> moments(std::size_t(call.count), Moments{});
    for (std::int64_t k = 0, next = 0; k < call.count; ++k) {
        if (!one_pass(k)) continue;
        double* memory = moment_memory.get() + 2 * sample_row * next++;
        moments[std::size_t(k)] = {memory, memory + sample_row};
    }
    const MapStatistics statistics(norms, blocks, channels);
    const double all_elements = double(call.count) * elements(shape);
    over_parts(norms, blocks.groups * blocks.per_map, double(norms) * elements(shape), threads,
               [&](std::int64_t norm, std::int64_t first, std::int64_t last) {
                   const std::int64_t k = norm % call.count;
                   const ExpertFusion& expert = call.expert[k];
                   kernels.statistics(norm < call.count ? expert.shallow : expert.deep,
                                      one_pass(k) ? &expert.deep : nullptr, shape, blocks, statistics.of_map(norm),
                                      moments[std::size_t(k)], first, last);
               });
    const std::int64_t vector_blocks = (channels + kVectorBlock - 1) / kVectorBlock;
    over_parts(norms, vector_blocks, double(norms * blocks.groups * channels), threads,
               [&](std::int64_t norm, std::int64_t first, std::int64_t last) {
                   const std::int64_t k = norm % call.count, begin = first * kVectorBlock;
                   const std::int64_t end = std::min(last * kVectorBlock, channels);
                   const ExpertFusion& expert = call.expert[k];
                   const BatchNorm& normalisation = norm < call.count ? expert.norm : expert.deep_norm;
                   statistics.merge(norm, shape, blocks, begin, end);
                   const auto fill = [&](auto* mean_rstd, auto* out) {
                       normalise(normalisation, double(shape.values()), channels, begin, end,
                                 statistics.mean.get() + norm * channels, statistics.squares.get() + norm * channels,
                                 mean_rstd + 3 * norm * channels, out + 2 * norm * channels);
                   };
                   if (shape.dtype == DType::kFloat64) {
                       fill(static_cast<double*>(saved.mean_rstd), static_cast<double*>(statistics_out));
                   } else {
                       fill(static_cast<float*>(saved.mean_rstd), static_cast<float*>(statistics_out));
                   }
               });
    // Experts of one pass have only [B, C] left to do.
    over_parts(call.count, shape.batch * blocks.per_map, all_elements, threads,
               [&](std::int64_t k, std::int64_t first, std::int64_t last) {
                   if (!one_pass(k)) return kernels.forward(call, int(k), blocks, saved, f, first, last);
                   kernels.finish_moments(call, int(k), moments[std::size_t(k)], saved, f, first / blocks.per_map,
                                          last / blocks.per_map);
               });
}

void cpu_dkf_statistics(const MapList& maps, void* out, int threads) {
    bool inside = true;
    for (int i = 0; i < maps.count; ++i) inside &= channels_inside(maps.map[i]);
    const MapBlocks blocks = map_blocks(maps.shape, inside);
    const FusionKernels& kernels = kernels_of(maps.shape);
    const std::int64_t channels = maps.shape.channels;
    const MapStatistics statistics(maps.count, blocks, channels);
    over_parts(maps.count, blocks.groups * blocks.per_map, double(maps.count) * elements(maps.shape), threads,
               [&](std::int64_t i, std::int64_t first, std::int64_t last) {
                   kernels.statistics(maps.map[i], nullptr, maps.shape, blocks, statistics.of_map(i), Moments{},
                                      first, last);
               });
    for (std::int64_t i = 0; i < maps.count; ++i) {
        statistics.merge(i, maps.shape, blocks, 0, channels);
        const double *mean = statistics.mean.get() + i * channels, *squares = statistics.squares.get() + i * channels;
        const auto fill = [&](auto* to) {
            to += 3 * i * channels;
            for (std::int64_t c = 0; c < channels; ++c) {
                split(mean[c], to + c, to + channels + c);
                to[2 * channels + c] = std::remove_pointer_t<decltype(to)>(squares[c]);
            }
        };
        if (maps.shape.dtype == DType::kFloat64) {
            fill(static_cast<double*>(out));
        } else {
            fill(static_cast<float*>(out));
        }
    }
}

void cpu_dkf_vector_gradients(const Fusion& call, const FusionSaved& saved, const void* grad_output, void* vectors,
                              int threads) {
    const std::int64_t channels = call.shape.channels, blocks = (channels + kVectorBlock - 1) / kVectorBlock;
    const double all_elements = double(call.norms()) * double(call.shape.batch) * double(channels);
    over_ranges(call.norms() * blocks, all_elements, threads, [&](std::int64_t first, std::int64_t last) {
        kernels_of(call.shape).vector_gradients(call, saved, grad_output, vectors, kVectorBlock, first, last);
    });
}

void cpu_dkf_map_gradients(const Fusion& call, const FusionSaved& saved, const FusionGradient& gradient, int threads) {
    const MapBlocks blocks = map_blocks(call.shape, channels_inside(call));
    over_parts(call.count, call.shape.batch * blocks.per_map, double(call.count) * elements(call.shape), threads,
               [&](std::int64_t k, std::int64_t first, std::int64_t last) {
                   kernels_of(call.shape).map_gradients(call, int(k), blocks, saved, gradient, first, last);
               });
}

}  // namespace shike
