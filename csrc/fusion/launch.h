// Depth-wise knowledge fusion on the CPU and on CUDA devices: what the bindings call.
#pragma once

#include <cstddef>

#include "common/cuda_queue.h"
#include "fusion/call.h"

namespace shike {

// On the CPU no result depends on the number of threads.
//
// CUDA: float32, bfloat16 and float16 maps, float32 arithmetic. All memory belongs to the caller. Nothing waits for the
// device, so the calls can be captured in a CUDA graph. Every function throws std::runtime_error if CUDA reports an
// error. Call them with B >= 1.

// Floats of workspace that a forward or the statistics of this many maps need.
std::size_t cuda_dkf_workspace(const Fusion& call, bool training, int device);
std::size_t cuda_dkf_statistics_workspace(const MapList& maps, int device);

// f: [K, B, C], the maps' dtype. training: fills saved.mean_rstd and `statistics`, [n, 2, C] (mean and unbiased
// variance), and updates the running ones. Otherwise mean_rstd is given and `statistics` is not touched. On CUDA
// devices f, sums and workspace begin at multiples of 16 bytes, as all that PyTorch allocates does.
void cpu_dkf_forward(const Fusion& call, const FusionSaved& saved, bool training, void* f, void* statistics,
                     int threads);
void cuda_dkf_forward(const Fusion& call, const FusionSaved& saved, bool training, void* f, float* statistics,
                      float* workspace, const CudaQueue& queue);

// statistics: [count, 3, C]: the mean's leading part, the rest of the mean, the sum of squared distances from the mean.
void cpu_dkf_statistics(const MapList& maps, void* statistics, int threads);
void cuda_dkf_statistics(const MapList& maps, float* statistics, float* workspace, const CudaQueue& queue);

// vectors: [n, 2, C]: d(weight) = sum_b g M1 / HW, d(bias) = sum_b g M2 / HW, likewise with P1 and P2.
void cpu_dkf_vector_gradients(const Fusion& call, const FusionSaved& saved, const void* grad_output, void* vectors,
                              int threads);
void cuda_dkf_vector_gradients(const Fusion& call, const FusionSaved& saved, const void* grad_output, float* vectors,
                               const CudaQueue& queue);

void cpu_dkf_map_gradients(const Fusion& call, const FusionSaved& saved, const FusionGradient& gradient, int threads);
void cuda_dkf_map_gradients(const Fusion& call, const FusionSaved& saved, const FusionGradient& gradient,
                            const CudaQueue& queue);

}  // namespace shike
