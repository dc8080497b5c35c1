// The CUDA kernels of depth-wise knowledge fusion: those of cuda_statistics.h, cuda_forward.h and cuda_backward.h. The
// second grid dimension counts experts or maps. The launch bounds leave each kernel the registers that it needs; the
// loads that the threads have under way, not their number, keep the memory busy.
#pragma once

#include "fusion/cuda_stages.h"

namespace shike {
namespace {

template <DType kType, int V>
__global__ void __launch_bounds__(kFusionBlock, statistics_blocks())
    dkf_statistics_kernel(const __grid_constant__ StatisticsArguments call) {
    __shared__ __align__(16) float memory[StatisticsState<kType, V>::kValues * V * slot_stride<V>(kFusionBlock)];
    BlockTeam<StatisticsState<kType, V>> team{memory, {}};
    const BlockNumber number(call.products == 0);
    statistics_block<kType, V>(team, call, number.block, number.index);
}

__global__ void __launch_bounds__(kWarp* kMergeRows) dkf_merge_kernel(const __grid_constant__ MergeArguments call) {
    __shared__ float memory[kMergeValues * kWarp * kMergeRows];
    BlockTeam<MergeState> team{memory, {}};
    merge_block(team, call, blockIdx.x, int(blockIdx.y));
}

template <DType kType, int V, bool kFolded>
__global__ void __launch_bounds__(kFusionBlock, pooling_blocks(V, kFolded))
    dkf_pooling_kernel(const __grid_constant__ PoolingArguments call) {
    using Norm = PoolingNorm<V>;
    __shared__ __align__(16) float memory[(kFolded ? 2 : 1) * Norm::kNumbers * Norm::kStride];
    pooling_block<kType, V, kFolded>(memory, call, blockIdx.x, int(blockIdx.y));
}

template <DType kType>
__global__ void __launch_bounds__(kWarp* kVectorRows) dkf_vector_kernel(const __grid_constant__ VectorArguments call) {
    __shared__ float memory[4 * kWarp * kVectorRows];
    BlockTeam<VectorState> team{memory, {}};
    vector_block<kType>(team, call, blockIdx.x, int(blockIdx.y));
}

template <DType kType, int V, bool kFolded>
__global__ void __launch_bounds__(kFusionBlock, gradient_blocks(V, kFolded))
    dkf_gradient_kernel(const __grid_constant__ GradientArguments call) {
    using Norm = NormGradient<V>;
    __shared__ __align__(16) float memory[(kFolded ? 2 : 1) * Norm::kNumbers * Norm::kStride];
    const BlockNumber number(true);
    gradient_block<kType, V, kFolded>(memory, call, number.block, number.index);
}

}  // namespace
}  // namespace shike
