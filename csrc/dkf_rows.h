// The CPU kernels of depth-wise knowledge fusion. Each of dkf_{generic,avx2,avx512}.cpp includes this once and is
// compiled for its instruction set.
#pragma once

#include "dkf_rows_backward.h"
#include "dkf_rows_forward.h"
#include "dkf_rows_statistics.h"

namespace shike {
namespace {

template <class T>
void statistics_at(const FeatureMap& map, const FeatureMap* deep, const MapShape& shape, const DkfBlocks& blocks,
                   const DkfPartials& partials, const DkfMoments& moments, std::int64_t first, std::int64_t last) {
    const auto run = deep == nullptr ? statistics_of<T, false> : statistics_of<T, true>;
    run(map, deep, shape, blocks, partials, moments, first, last);
}

template <class T>
void forward_at(const Fusion& call, int expert, const DkfBlocks& blocks, const FusionState& state, void* f,
                std::int64_t first, std::int64_t last) {
    const bool relu = call.expert[expert].relu;
    const auto run = !call.normalised ? forward_of<T, false, Shallow::kPlain>
                     : call.folded ? (relu ? forward_of<T, true, Shallow::kRelu> : forward_of<T, true, Shallow::kAffine>)
                                   : (relu ? forward_of<T, false, Shallow::kRelu> : forward_of<T, false, Shallow::kAffine>);
    run(call, expert, blocks, state, f, first, last);
}

template <class T>
void map_gradients_at(const Fusion& call, int expert, const DkfBlocks& blocks, const FusionState& state,
                      const FusionGradient& gradient, std::int64_t first, std::int64_t last) {
    const bool relu = call.expert[expert].relu;
    const auto run = !call.normalised ? map_gradients_of<T, false, Shallow::kPlain>
                     : call.folded
                         ? (relu ? map_gradients_of<T, true, Shallow::kRelu> : map_gradients_of<T, true, Shallow::kAffine>)
                         : (relu ? map_gradients_of<T, false, Shallow::kRelu>
                                 : map_gradients_of<T, false, Shallow::kAffine>);
    run(call, expert, blocks, state, gradient, first, last);
}

// A kernel for the dtype of its arguments. float64 is for checking gradients, not for speed: only dkf_generic.cpp
// compiles it.
#if SHIKE_FLOAT64
template <class... Rest>
bool is_float64(const Fusion& call, const Rest&...) {
    return call.shape.dtype == DType::kFloat64;
}
template <class... Rest>
bool is_float64(const FeatureMap&, const FeatureMap*, const MapShape& shape, const Rest&...) {
    return shape.dtype == DType::kFloat64;
}
template <class Kernel>
struct OfDType;
template <class... Arguments>
struct OfDType<void (*)(Arguments...)> {
    template <void (*kDouble)(Arguments...), void (*kFloat)(Arguments...)>
    static void run(Arguments... arguments) {
        (is_float64(arguments...) ? kDouble : kFloat)(arguments...);
    }
};
#define SHIKE_DKF_OF(kernel) OfDType<decltype(&kernel<float>)>::run<kernel<double>, kernel<float>>
#else
#define SHIKE_DKF_OF(kernel) kernel<float>
#endif

const DkfKernels* dkf_kernels_of_this_file() {
    static const DkfKernels kernels{SHIKE_DKF_OF(statistics_at), SHIKE_DKF_OF(finish_moments_of),
                                    SHIKE_DKF_OF(forward_at), SHIKE_DKF_OF(vector_gradients_of),
                                    SHIKE_DKF_OF(map_gradients_at)};
    return &kernels;
}

}  // namespace
}  // namespace shike
