// The expert losses on the CPU and on CUDA devices: what the bindings call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cuda_queue.h"
#include "losses/call.h"

namespace shike {

// loss: in the accumulation dtype; terms: float [3] (cross-entropy, hardest, mutual), weights applied. No result
// depends on the number of threads. `grad_output`: the gradient of the loss, one number in the accumulation dtype.
// `both` is forward and backward, for a grad_output of 1, with one exponential a logit; it saves nothing.
void cpu_dkt_forward(const DktCall& call, void* loss, float* terms, int threads);
void cpu_dkt_backward(const DktCall& call, const Experts& gradient, const void* grad_output, int threads);
void cpu_dkt_both(const DktCall& call, void* loss, float* terms, const Experts& gradient, int threads);

// What the weights of the rows of a generalised loss are made of, on the CPU; see shike_fast/ops/_expert_call.py.
struct ExpertWeights {
    OfExperts lam;  // [] (its number) or [B]
    double lam_number;
    OfExperts class_weight, sample_weight, expert_weight;
    int reduction;  // of Reduction
    OfExperts kl_weight, gate;
    double kl_weight_number;
    int kl_reduction;  // of KlReduction
};
enum class Reduction : int { kMean, kMeanOverExperts, kWeightedMean, kGlobalWeightedMean, kNone };
enum class KlReduction : int { kBatchMean, kMean, kGatedMean };

// The call comes without its weights. loss: [] or [K, B]; terms: float [2] (cross-entropy, divergence); rows: [4, K, B]
// or null. `grad_output` has the shape of the loss.
void cpu_expert_forward(ExpertCall call, const ExpertWeights& weights, void* loss, float* terms, void* rows, int threads);
void cpu_expert_backward(const ExpertCall& call, const Experts& gradient, const void* grad_output, int threads);
void cpu_expert_both(ExpertCall call, const ExpertWeights& weights, void* loss, float* terms, void* rows,
                     const Experts& gradient, int threads);

// CUDA: float32, bfloat16 and float16 logits, float32 arithmetic. All memory belongs to the caller. Nothing waits for
// the device, so the calls can be captured in a CUDA graph. Every function throws std::runtime_error if CUDA reports an
// error.

// Floats of workspace that the forwards need; only shape and dtype of the logits matter. cuda_dkt_both has 0 where it
// cannot run, because rows do not fit into shared memory.
std::size_t cuda_dkt_workspace(const Experts& logits, int device);
std::size_t cuda_dkt_both_workspace(const Experts& logits, int device);
std::size_t cuda_expert_workspace(const Experts& logits, bool divergence, int device);

// Call them with batch >= 1 only.
void cuda_dkt_forward(const DktCall& call, float* workspace, float* loss, float* terms, const CudaQueue& queue);
// Forward and backward from one reading of the logits, for a grad_output of `expected`; kept: float [B], for the
// backward. `expected` lies on the device, and the backward writes there what it was given.
void cuda_dkt_both(const DktCall& call, const Experts& gradient, const float* expected, float* kept, float* workspace,
                   float* loss, float* terms, const CudaQueue& queue);

// `kept` and `expected`: null, or those of cuda_dkt_both, whose gradient is then left as it is where it was written for
// this grad_output.
void cuda_dkt_backward(const DktCall& call, const Experts& gradient, const float* grad_output, const float* kept,
                       float* expected, const CudaQueue& queue);

// loss: [] or [K, B]; terms: [2]; rows: [4, K, B] or null. `grad_output` has the shape of the loss.
void cuda_expert_forward(const ExpertCall& call, float* workspace, float* loss, float* terms, float* rows,
                         const CudaQueue& queue);
void cuda_expert_backward(const ExpertCall& call, const Experts& gradient, const float* grad_output,
                          const CudaQueue& queue);

}  // namespace shike
