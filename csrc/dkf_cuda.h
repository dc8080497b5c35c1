// The CUDA kernels of depth-wise knowledge fusion: float32, bfloat16 and float16 maps, float32 arithmetic.
//
// All memory belongs to the caller. Nothing waits for the device, so the calls can be captured in a CUDA graph. Every
// function throws std::runtime_error if CUDA reports an error. Call them with B >= 1.
#pragma once

#include <cstddef>

#include "dkf.h"
#include "expert_loss_cuda.h"

namespace shike {

// Floats of workspace that a forward or the statistics of this many maps need.
std::size_t cuda_dkf_workspace(const Fusion& call, bool training, int device);
std::size_t cuda_dkf_statistics_workspace(const MapList& maps, int device);

// f: [K, B, C], the maps' dtype. training: fills the normalisers and `statistics`, [n, 2, C] (mean and unbiased
// variance), and updates the running ones. Otherwise the normalisers are given and `statistics` is not touched.
void cuda_dkf_forward(const Fusion& call, const FusionState& state, bool training, void* f, float* statistics,
                      float* workspace, const CudaQueue& queue);

// statistics: [count, 3, C]: the mean's leading part, the rest of the mean, the sum of squared distances from the mean.
void cuda_dkf_statistics(const MapList& maps, float* statistics, float* workspace, const CudaQueue& queue);

// vectors: [n, 2, C]: d(weight) = sum_b g M1 / HW, d(bias) = sum_b g M2 / HW, likewise with P1 and P2.
void cuda_dkf_vector_gradients(const Fusion& call, const FusionState& state, const void* incoming, float* vectors,
                               const CudaQueue& queue);

void cuda_dkf_map_gradients(const Fusion& call, const FusionState& state, const FusionGradient& gradient,
                            const CudaQueue& queue);

}  // namespace shike
