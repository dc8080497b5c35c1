// What the launches of each call of depth-wise knowledge fusion take: plans, arguments, workspace.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "fusion/cuda_backward.h"
#include "fusion/cuda_forward.h"
#include "fusion/cuda_merge.h"
#include "fusion/cuda_statistics.h"

namespace shike {
namespace {

inline std::string shape_text(const MapShape& shape) {
    return "[B=" + std::to_string(shape.batch) + ", C=" + std::to_string(shape.channels) +
           ", H=" + std::to_string(shape.height) + ", W=" + std::to_string(shape.width) + "]";
}

// `limit`: of the count.
inline void check_maps(const char* op, const MapShape& shape, int count, int limit) {
    constexpr std::int64_t kMost = 1 << 30;
    const char* reason = nullptr;
    if (count < 1 || count > limit) {
        reason = limit == kMaxExperts ? "1 to 8 experts are supported" : "1 to 16 maps are supported";
    }
    if (shape.batch < 1) reason = "the batch is empty";
    if (shape.channels < 1 || shape.height < 1 || shape.width < 1) reason = "the maps are empty";
    if (shape.channels > kMost || shape.height > kMost || shape.width > kMost || shape.positions() > kMost) {
        reason = "at most 2^30 channels and 2^30 positions are supported";
    }
    if (shape.dtype == DType::kFloat64) reason = "float64 is not supported on CUDA devices";
    if (reason == nullptr) return;
    throw std::runtime_error(std::string(op) + ": " + reason + ", got " + std::to_string(count) + " maps " +
                             shape_text(shape));
}

// Calls f(dtype, vector) with compile-time constants.
template <class F>
void with_elements(DType dtype, int vector, F f) {
    const auto with_vector = [&](auto type) {
        if (vector > 1) {
            f(type, std::integral_constant<int, WideVector<decltype(type)::value>::value>{});
        } else {
            f(type, std::integral_constant<int, 1>{});
        }
    };
    if (dtype == DType::kFloat32) with_vector(std::integral_constant<DType, DType::kFloat32>{});
    if (dtype == DType::kBFloat16) with_vector(std::integral_constant<DType, DType::kBFloat16>{});
    if (dtype == DType::kFloat16) with_vector(std::integral_constant<DType, DType::kFloat16>{});
}

inline std::size_t partials_size(const StatisticsArguments& call) {
    return std::size_t(call.maps.count) * std::size_t(call.plan.splits) * 3 * std::size_t(call.maps.shape.channels);
}

// Of experts whose sums come with the statistics, if there are any: a [K, B, C] of the maps' dtype.
inline std::size_t references_size(const StatisticsArguments& call) {
    if (call.products == 0) return 0;
    const MapShape& shape = call.maps.shape;
    const std::size_t numbers = std::size_t(call.maps.count) * std::size_t(shape.batch) * std::size_t(shape.channels);
    return (numbers * std::size_t(bytes_of(shape.dtype)) + sizeof(float) - 1) / sizeof(float);
}

inline StatisticsArguments statistics_arguments(const MapList& maps, float* workspace, int processors) {
    StatisticsArguments result{};
    result.maps = maps;
    result.partials = workspace;
    FusionLayout layout(maps.shape);
    for (int i = 0; i < maps.count; ++i) layout.add(maps.map[i]);
    result.plan = statistics_plan(maps.shape, layout, maps.count, processors);
    return result;
}

// The statistics of a training forward. Experts whose sums need no mask get them on the way.
inline StatisticsArguments statistics_arguments(const Fusion& call, float* sums, float* workspace, int processors) {
    StatisticsArguments result{};
    result.maps.count = call.norms();
    result.maps.shape = call.shape;
    result.partials = workspace;
    result.sums = sums;
    FusionLayout layout(call.shape);
    for (int k = 0; k < call.count; ++k) {
        const ExpertFusion& expert = call.expert[k];
        result.maps.map[k] = expert.shallow;
        layout.add(expert.shallow);
        if (call.folded) {
            result.maps.map[call.count + k] = expert.deep;
        } else if (!expert.relu) {
            result.products |= 1u << k;
            result.partner[k] = expert.deep;
        }
        if (call.folded || !expert.relu) layout.add(expert.deep);
    }
    result.plan = statistics_plan(call.shape, layout, result.maps.count, processors);
    if (workspace != nullptr) result.references = workspace + partials_size(result);
    return result;
}

inline MergeArguments merge_arguments(const StatisticsArguments& call, float* moments) {
    MergeArguments result{};
    result.shape = call.maps.shape;
    result.samples = call.plan.samples;
    result.splits = call.plan.splits;
    result.partials = call.partials;
    result.moments = moments;
    return result;
}

inline MergedNorm merged_norm(const BatchNorm& norm) {
    return {static_cast<float*>(norm.running_mean), static_cast<float*>(norm.running_var), float(norm.momentum),
            float(1 - norm.momentum), float(norm.eps)};
}

inline bool needs_statistics(const Fusion& call, bool training) { return training && call.normalised; }

inline std::size_t forward_workspace(const Fusion& call, bool training, int processors) {
    if (!needs_statistics(call, training)) return 0;
    const StatisticsArguments parts = statistics_arguments(call, nullptr, nullptr, processors);
    return partials_size(parts) + references_size(parts);
}

inline std::size_t statistics_workspace(const MapList& maps, int processors) {
    return partials_size(statistics_arguments(maps, nullptr, processors));
}

}  // namespace
}  // namespace shike
