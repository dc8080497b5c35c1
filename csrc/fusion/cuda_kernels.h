// The CUDA kernels of depth-wise knowledge fusion: those of cuda_statistics.h, cuda_forward.h and cuda_backward.h. The
// second grid dimension counts experts or maps. The launch bounds leave each kernel the registers that it needs; the
// loads that the threads have under way, not their number, keep the memory busy.
#pragma once

#include "fusion/cuda_stages.h"

namespace shike {
namespace {

template <DType kType, int V>
__global__ void __launch_bounds__(kFusionBlock, 4)
    dkf_statistics_kernel(const __grid_constant__ StatisticsArguments call) {
    __shared__ __align__(16) float memory[block_memory(V, StatisticsState<kType, V>::kValues, 0)];
    BlockTeam<StatisticsState<kType, V>> team{memory, {}};
    statistics_block<kType, V>(team, call, blockIdx.x, int(blockIdx.y));
}

__global__ void __launch_bounds__(kWarp* kMergeRows) dkf_merge_kernel(const __grid_constant__ MergeArguments call) {
    __shared__ float memory[kMergeValues * kWarp * kMergeRows];
    BlockTeam<MergeState> team{memory, {}};
    merge_block(team, call, blockIdx.x, int(blockIdx.y));
}

template <DType kType, int V, bool kFolded>
__global__ void __launch_bounds__(kFusionBlock, kFolded && V > 1 ? 3 : 4)
    dkf_pooling_kernel(const __grid_constant__ PoolingArguments call) {
    using State = PoolingState<V, kFolded>;
    __shared__ __align__(16) float memory[block_memory(V, State::kSums, kFolded ? 6 : 3)];
    BlockTeam<State> team{memory, {}};
    pooling_block<kType, V, kFolded>(team, call, blockIdx.x, int(blockIdx.y));
}

template <DType kType>
__global__ void __launch_bounds__(kWarp* kVectorRows) dkf_vector_kernel(const __grid_constant__ VectorArguments call) {
    __shared__ float memory[4 * kWarp * kVectorRows];
    BlockTeam<VectorState> team{memory, {}};
    vector_block<kType>(team, call, blockIdx.x, int(blockIdx.y));
}

template <DType kType, int V, bool kFolded>
__global__ void __launch_bounds__(kFusionBlock, V == 1 ? 4 : kFolded ? 2 : 3)
    dkf_gradient_kernel(const __grid_constant__ GradientArguments call) {
    __shared__ __align__(16) float memory[block_memory(V, 0, kFolded ? 10 : 5)];
    BlockTeam<GradientState<V, kFolded>> team{memory, {}};
    gradient_block<kType, V, kFolded>(team, call, blockIdx.x, int(blockIdx.y));
}

}  // namespace
}  // namespace shike
