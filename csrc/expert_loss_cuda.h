// The CUDA kernels of the expert losses: float32, bfloat16 and float16 logits, float32 arithmetic.
//
// All memory belongs to the caller. Nothing waits for the device, so the calls can be captured in a CUDA graph. Every
// function throws std::runtime_error if CUDA reports an error.
#pragma once

#include <cstddef>
#include <cstdint>

#include "expert_loss.h"

namespace shike {

struct CudaQueue {
    int device;
    void* stream;  // a cudaStream_t of that device
};

// Floats of workspace that the forward needs: row terms, and partial states of rows that several blocks share.
std::size_t cuda_dkt_workspace(int experts, std::int64_t batch, std::int64_t classes, int device);
std::size_t cuda_cross_entropy_workspace(int experts, std::int64_t batch, std::int64_t classes, int device);

// loss: float; terms: float [3] (cross-entropy, hardest, mutual), weights applied. Call them with batch >= 1 only.
void cuda_dkt_forward(const DktCall& call, float* workspace, float* loss, float* terms, const CudaQueue& queue);
void cuda_cross_entropy_forward(const CrossEntropyCall& call, float* workspace, float* loss, const CudaQueue& queue);

// `incoming`: the gradient of the loss, a float on the device.
void cuda_dkt_backward(const DktCall& call, const Experts& gradient, const float* incoming, const CudaQueue& queue);
void cuda_cross_entropy_backward(const CrossEntropyCall& call, const Experts& gradient, const float* incoming,
                                 const CudaQueue& queue);

}  // namespace shike
