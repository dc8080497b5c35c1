// Python bindings of depth-wise knowledge fusion, and the threads of its CPU kernels.
#include "dkf.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "build_config.h"
#include "cpu_level.h"
#include "dkf_cpu.h"
#include "dkf_cuda.h"
#include "module.h"
#include "threads.h"

namespace py = pybind11;

namespace shike {

DkfBlocks dkf_blocks(const MapShape& shape, bool channels_inside) {
    constexpr std::int64_t kGroupPositions = 128;  // partial statistics are then small beside the maps
    const bool in_place = shape.dtype == DType::kFloat32 || shape.dtype == DType::kFloat64;
    DkfBlocks blocks{};
    blocks.group = std::max<std::int64_t>(1, std::min(shape.batch, kGroupPositions / shape.positions()));
    blocks.groups = (shape.batch + blocks.group - 1) / blocks.group;
    // Wide blocks read whole pages of maps whose channels are neighbours; others are transposed in squares.
    blocks.width = channels_inside ? (in_place ? 512 : 256) : 64;
    blocks.rows = channels_inside ? 16 : 64;
    blocks.per_map = (shape.channels + blocks.width - 1) / blocks.width;
    return blocks;
}

namespace {

const DkfKernels* kernels_for(DType dtype) {
    return at_level(cpu_level_for(dtype), dkf_generic_kernels(), dkf_avx2_kernels(), dkf_avx512_kernels());
}

// dtype, B, C, H, W
using Shape = std::tuple<int, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
// Address and strides (b, c, h, w) of each map: deep, shallow and perhaps shortcut maps, K each.
using MapNumbers = std::vector<std::int64_t>;
// What every call begins with: the shape, the maps, for each normalisation the addresses of weight, bias, running mean
// and variance (or 0), for each its momentum and eps, for each expert whether ReLU follows.
using Common =
    std::tuple<Shape, MapNumbers, std::vector<std::intptr_t>, std::vector<double>, std::vector<bool>>;
// The addresses of sums and normalisers.
using State = std::pair<std::intptr_t, std::intptr_t>;

constexpr std::size_t kNumbers = 5;  // of a map

MapShape shape_of(const Shape& shape) {
    const auto& [dtype, batch, channels, height, width] = shape;
    return {batch, channels, height, width, DType(dtype)};
}

FeatureMap map_at(const MapNumbers& numbers, std::size_t index) {
    const std::int64_t* of = numbers.data() + kNumbers * index;
    return {reinterpret_cast<void*>(of[0]), of[1], of[2], of[3], of[4]};
}

Normalisation norm_at(const std::vector<std::intptr_t>& vectors, const std::vector<double>& numbers, std::size_t index) {
    const std::intptr_t* of = vectors.data() + 4 * index;
    return {reinterpret_cast<const void*>(of[0]), reinterpret_cast<const void*>(of[1]),
            reinterpret_cast<void*>(of[2]), reinterpret_cast<void*>(of[3]), numbers[2 * index], numbers[2 * index + 1]};
}

Fusion fusion_of(const Common& common) {
    const auto& [shape, maps, vectors, numbers, relu] = common;
    const std::size_t experts = relu.size(), norms = vectors.size() / 4, per_expert = experts > 0 ? maps.size() / kNumbers / experts : 0;
    Fusion call{};
    call.count = int(experts);
    call.shape = shape_of(shape);
    call.folded = per_expert == 3;
    call.normalised = norms > 0;
    if (experts < 1 || experts > kMaxExperts || maps.size() != kNumbers * experts * per_expert || per_expert < 2 ||
        per_expert > 3 || norms != std::size_t(call.norms()) || numbers.size() != 2 * norms ||
        (call.folded && !call.normalised)) {
        throw std::invalid_argument("dkf: " + std::to_string(experts) + " experts, " + std::to_string(maps.size()) +
                                    " numbers of maps and " + std::to_string(vectors.size()) +
                                    " vectors do not belong together");
    }
    for (std::size_t k = 0; k < experts; ++k) {
        ExpertFusion& expert = call.expert[k];
        expert.deep = map_at(maps, k);
        expert.shallow = map_at(maps, experts + k);
        if (call.folded) expert.shortcut = map_at(maps, 2 * experts + k);
        if (call.normalised) expert.norm = norm_at(vectors, numbers, k);
        if (call.folded) expert.deep_norm = norm_at(vectors, numbers, experts + k);
        expert.relu = relu[k];
    }
    return call;
}

MapList map_list(const Shape& shape, const MapNumbers& numbers) {
    MapList maps{};
    maps.shape = shape_of(shape);
    maps.count = int(numbers.size() / kNumbers);
    if (maps.count > 2 * kMaxExperts) throw std::invalid_argument("dkf_statistics: too many maps");
    for (int i = 0; i < maps.count; ++i) maps.map[i] = map_at(numbers, std::size_t(i));
    return maps;
}

FusionState state_of(const State& state) {
    return {reinterpret_cast<void*>(state.first), reinterpret_cast<void*>(state.second)};
}

FusionGradient gradient_of(const Fusion& call, std::intptr_t incoming, const MapNumbers& maps, std::intptr_t vectors,
                           double inverse_count) {
    const std::size_t experts = std::size_t(call.count);
    FusionGradient gradient{};
    gradient.incoming = reinterpret_cast<const void*>(incoming);
    gradient.vectors = reinterpret_cast<const void*>(vectors);
    gradient.inverse_count = inverse_count;
    for (std::size_t k = 0; k < experts; ++k) {
        gradient.expert[k] = {map_at(maps, k), map_at(maps, experts + k),
                              call.folded ? map_at(maps, 2 * experts + k) : FeatureMap{}};
    }
    return gradient;
}

// ---- the CPU kernels

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

    MapStatistics(std::int64_t maps, const DkfBlocks& blocks, std::int64_t channel_count)
        : partial(doubles(2 * maps * blocks.groups * channel_count)),
          mean(doubles(maps * channel_count)),
          squares(doubles(maps * channel_count)),
          groups(blocks.groups),
          channels(channel_count) {}

    DkfPartials of_map(std::int64_t index) const {
        double* first = partial.get() + 2 * index * groups * channels;
        return {first, first + groups * channels};
    }

    // Chan's formula for the channels first ... last - 1 of a map.
    void merge(std::int64_t index, const MapShape& shape, const DkfBlocks& blocks, std::int64_t first,
               std::int64_t last) const {
        const DkfPartials partials = of_map(index);
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

// From mean and squares: normalisers [3, C], statistics [2, C] and running statistics.
template <class T>
void normalise(const Normalisation& norm, double count, std::int64_t channels, std::int64_t first, std::int64_t last,
               const double* mean, const double* squares, T* normalisers, T* statistics) {
    T *running_mean = static_cast<T*>(norm.running_mean), *running_var = static_cast<T*>(norm.running_var);
    for (std::int64_t c = first; c < last; ++c) {
        const double unbiased = squares[c] / (count - 1);
        if (running_mean != nullptr) {
            running_mean[c] = T(norm.momentum * mean[c] + (1 - norm.momentum) * double(running_mean[c]));
            running_var[c] = T(norm.momentum * unbiased + (1 - norm.momentum) * double(running_var[c]));
        }
        split(mean[c], normalisers + c, normalisers + channels + c);
        statistics[c] = T(mean[c]);
        statistics[channels + c] = T(unbiased);
        normalisers[2 * channels + c] = T(1 / std::sqrt(squares[c] / count + norm.eps));
    }
}

constexpr std::int64_t kVectorBlock = 256;  // channels of a unit where only vectors are computed

void cpu_dkf_forward(const Common& common, bool training, std::intptr_t f_address, const State& addresses,
                     std::intptr_t statistics_address, int threads) {
    const py::gil_scoped_release release;
    const Fusion call = fusion_of(common);
    const FusionState state = state_of(addresses);
    const MapShape& shape = call.shape;
    const DkfBlocks blocks = dkf_blocks(shape, channels_inside(call));
    const DkfKernels& kernels = *kernels_for(shape.dtype);
    void* f = reinterpret_cast<void*>(f_address);
    const std::int64_t channels = shape.channels, norms = training ? call.norms() : 0;
    const auto one_pass = [&](std::int64_t k) { return norms > 0 && !call.folded && !call.expert[k].relu; };
    std::int64_t one_passes = 0;
    for (int k = 0; k < call.count; ++k) one_passes += one_pass(k);

    const std::int64_t sample_row = shape.batch * channels;
    const std::unique_ptr<double[]> moment_memory = doubles(2 * one_passes * sample_row);
    std::vector<DkfMoments> moments(std::size_t(call.count), DkfMoments{});
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
                   const Normalisation& normalisation = norm < call.count ? expert.norm : expert.deep_norm;
                   statistics.merge(norm, shape, blocks, begin, end);
                   const auto fill = [&](auto* normalisers, auto* out) {
                       normalise(normalisation, double(shape.values()), channels, begin, end,
                                 statistics.mean.get() + norm * channels, statistics.squares.get() + norm * channels,
                                 normalisers + 3 * norm * channels, out + 2 * norm * channels);
                   };
                   if (shape.dtype == DType::kFloat64) {
                       fill(static_cast<double*>(state.normalisers), reinterpret_cast<double*>(statistics_address));
                   } else {
                       fill(static_cast<float*>(state.normalisers), reinterpret_cast<float*>(statistics_address));
                   }
               });
    // Experts of one pass have only [B, C] left to do.
    over_parts(call.count, shape.batch * blocks.per_map, all_elements, threads,
               [&](std::int64_t k, std::int64_t first, std::int64_t last) {
                   if (!one_pass(k)) return kernels.forward(call, int(k), blocks, state, f, first, last);
                   kernels.finish_moments(call, int(k), moments[std::size_t(k)], state, f, first / blocks.per_map,
                                          last / blocks.per_map);
               });
}

void cpu_dkf_statistics(const Shape& shape, const MapNumbers& numbers, std::intptr_t out, int threads) {
    const py::gil_scoped_release release;
    const MapList maps = map_list(shape, numbers);
    bool inside = true;
    for (int i = 0; i < maps.count; ++i) inside &= channels_inside(maps.map[i]);
    const DkfBlocks blocks = dkf_blocks(maps.shape, inside);
    const DkfKernels& kernels = *kernels_for(maps.shape.dtype);
    const std::int64_t channels = maps.shape.channels;
    const MapStatistics statistics(maps.count, blocks, channels);
    over_parts(maps.count, blocks.groups * blocks.per_map, double(maps.count) * elements(maps.shape), threads,
               [&](std::int64_t i, std::int64_t first, std::int64_t last) {
                   kernels.statistics(maps.map[i], nullptr, maps.shape, blocks, statistics.of_map(i), DkfMoments{},
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
            fill(reinterpret_cast<double*>(out));
        } else {
            fill(reinterpret_cast<float*>(out));
        }
    }
}

void cpu_dkf_vector_gradients(const Common& common, std::intptr_t incoming, std::intptr_t sums, std::intptr_t vectors,
                              int threads) {
    const py::gil_scoped_release release;
    const Fusion call = fusion_of(common);
    const FusionState state{reinterpret_cast<void*>(sums), nullptr};
    const std::int64_t channels = call.shape.channels, blocks = (channels + kVectorBlock - 1) / kVectorBlock;
    const double all_elements = double(call.norms()) * double(call.shape.batch) * double(channels);
    over_ranges(call.norms() * blocks, all_elements, threads, [&](std::int64_t first, std::int64_t last) {
        kernels_for(call.shape.dtype)
            ->vector_gradients(call, state, reinterpret_cast<const void*>(incoming), reinterpret_cast<void*>(vectors),
                               kVectorBlock, first, last);
    });
}

void cpu_dkf_map_gradients(const Common& common, const State& addresses, std::intptr_t incoming,
                           const MapNumbers& gradients, std::intptr_t vectors, double inverse_count, int threads) {
    const py::gil_scoped_release release;
    const Fusion call = fusion_of(common);
    const FusionGradient gradient = gradient_of(call, incoming, gradients, vectors, inverse_count);
    const FusionState state = state_of(addresses);
    const DkfBlocks blocks = dkf_blocks(call.shape, channels_inside(call));
    over_parts(call.count, call.shape.batch * blocks.per_map, double(call.count) * elements(call.shape), threads,
               [&](std::int64_t k, std::int64_t first, std::int64_t last) {
                   kernels_for(call.shape.dtype)->map_gradients(call, int(k), blocks, state, gradient, first, last);
               });
}

#if SHIKE_WITH_CUDA

float* floats(std::intptr_t address) { return reinterpret_cast<float*>(address); }

std::size_t gpu_dkf_workspace(const Common& common, bool training, int device) {
    return cuda_dkf_workspace(fusion_of(common), training, device);
}

std::size_t gpu_dkf_statistics_workspace(const Shape& shape, const MapNumbers& numbers, int device) {
    return cuda_dkf_statistics_workspace(map_list(shape, numbers), device);
}

void gpu_dkf_forward(const Common& common, bool training, std::intptr_t f, const State& state, std::intptr_t statistics,
                     std::intptr_t workspace, int device, std::intptr_t stream) {
    const py::gil_scoped_release release;
    cuda_dkf_forward(fusion_of(common), state_of(state), training, reinterpret_cast<void*>(f), floats(statistics),
                     floats(workspace), {device, reinterpret_cast<void*>(stream)});
}

void gpu_dkf_statistics(const Shape& shape, const MapNumbers& numbers, std::intptr_t statistics,
                        std::intptr_t workspace, int device, std::intptr_t stream) {
    const py::gil_scoped_release release;
    cuda_dkf_statistics(map_list(shape, numbers), floats(statistics), floats(workspace),
                        {device, reinterpret_cast<void*>(stream)});
}

void gpu_dkf_vector_gradients(const Common& common, std::intptr_t incoming, std::intptr_t sums, std::intptr_t vectors,
                              int device, std::intptr_t stream) {
    const py::gil_scoped_release release;
    cuda_dkf_vector_gradients(fusion_of(common), {reinterpret_cast<void*>(sums), nullptr},
                              reinterpret_cast<const void*>(incoming), floats(vectors),
                              {device, reinterpret_cast<void*>(stream)});
}

void gpu_dkf_map_gradients(const Common& common, const State& state, std::intptr_t incoming,
                           const MapNumbers& gradients, std::intptr_t vectors, double inverse_count, int device,
                           std::intptr_t stream) {
    const py::gil_scoped_release release;
    const Fusion call = fusion_of(common);
    cuda_dkf_map_gradients(call, state_of(state), gradient_of(call, incoming, gradients, vectors, inverse_count),
                           {device, reinterpret_cast<void*>(stream)});
}

#endif

}  // namespace
}  // namespace shike

SHIKE_BINDINGS(module) {
    module.def("cpu_dkf_forward", &shike::cpu_dkf_forward);
    module.def("cpu_dkf_statistics", &shike::cpu_dkf_statistics);
    module.def("cpu_dkf_vector_gradients", &shike::cpu_dkf_vector_gradients);
    module.def("cpu_dkf_map_gradients", &shike::cpu_dkf_map_gradients);
#if SHIKE_WITH_CUDA
    module.def("cuda_dkf_workspace", &shike::gpu_dkf_workspace);
    module.def("cuda_dkf_statistics_workspace", &shike::gpu_dkf_statistics_workspace);
    module.def("cuda_dkf_forward", &shike::gpu_dkf_forward);
    module.def("cuda_dkf_statistics", &shike::gpu_dkf_statistics);
    module.def("cuda_dkf_vector_gradients", &shike::gpu_dkf_vector_gradients);
    module.def("cuda_dkf_map_gradients", &shike::gpu_dkf_map_gradients);
#endif
}
