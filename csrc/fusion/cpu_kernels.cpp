// The CPU kernels of depth-wise knowledge fusion, compiled once for each instruction set.
#include "fusion/cpu_kernels.h"

#include "common/cpu_level.h"
#include "fusion/cpu_backward.h"
#include "fusion/cpu_forward.h"
#include "fusion/cpu_statistics.h"

namespace shike {
namespace {

template <class T>
void statistics_at(const FeatureMap& map, const FeatureMap* deep, const MapShape& shape, const MapBlocks& blocks,
                   const Partials& partials, const Moments& moments, std::int64_t first, std::int64_t last) {
    const auto run = deep == nullptr ? statistics_of<T, false> : statistics_of<T, true>;
    run(map, deep, shape, blocks, partials, moments, first, last);
}

template <class T>
void forward_at(const Fusion& call, int expert, const MapBlocks& blocks, const FusionSaved& saved, void* f,
                std::int64_t first, std::int64_t last) {
    const bool relu = call.expert[expert].relu;
    const auto run = !call.normalised ? forward_of<T, false, Shallow::kPlain>
                     : call.folded ? (relu ? forward_of<T, true, Shallow::kRelu> : forward_of<T, true, Shallow::kAffine>)
                                   : (relu ? forward_of<T, false, Shallow::kRelu> : forward_of<T, false, Shallow::kAffine>);
    run(call, expert, blocks, saved, f, first, last);
}

template <class T>
void map_gradients_at(const Fusion& call, int expert, const MapBlocks& blocks, const FusionSaved& saved,
                      const FusionGradient& gradient, std::int64_t first, std::int64_t last) {
    const bool relu = call.expert[expert].relu;
    const auto run = !call.normalised ? map_gradients_of<T, false, Shallow::kPlain>
                     : call.folded
                         ? (relu ? map_gradients_of<T, true, Shallow::kRelu> : map_gradients_of<T, true, Shallow::kAffine>)
                         : (relu ? map_gradients_of<T, false, Shallow::kRelu>
                                 : map_gradients_of<T, false, Shallow::kAffine>);
    run(call, expert, blocks, saved, gradient, first, last);
}

template <class T>
constexpr FusionKernels kKernels{statistics_at<T>, finish_moments_of<T>, forward_at<T>, vector_gradients_of<T>,
                                 map_gradients_at<T>};

}  // namespace

template <>
const FusionKernels& kernels_at<FusionKernels, CpuLevel::SHIKE_CPU_LEVEL>() {
    return kKernels<float>;
}

#if SHIKE_FLOAT64
template <>
const FusionKernels& float64_kernels<FusionKernels>() {
    return kKernels<double>;
}
#endif

}  // namespace shike
