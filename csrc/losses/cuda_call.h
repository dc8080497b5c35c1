// What all CUDA kernels of the expert losses begin with.
#pragma once

#include <cstdint>

#include "losses/cuda_plan.h"
#include "losses/call.h"
#include "losses/options.h"

// What assert() calls; declared here because <cassert> declares it in debug builds only.
extern "C" __host__ __device__ void __assert_fail(const char* assertion, const char* file, unsigned line,
                                                  const char* function) noexcept __attribute__((__noreturn__));

namespace shike {
namespace {

// Which row a thread serves.
struct Place {
    std::int64_t row;
    int of_block;  // which of the block's rows
    int thread;    // of the row's group
    int split;     // which of the row's blocks

    __device__ explicit Place(const BlockPlan& plan) : Place(plan, blockIdx.x, threadIdx.x) {}

    // The same, computed anew: for the end of a kernel that has no registers to keep it in.
    __device__ static Place anew(const BlockPlan& plan) {
        unsigned block, thread;
        asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
        return Place(plan, block, thread);
    }

private:
    __device__ Place(const BlockPlan& plan, unsigned block, unsigned thread_of_block) {
        const unsigned rows = plan.splits == 1 ? block : block / unsigned(plan.splits);
        split = int(block - rows * unsigned(plan.splits));
        thread = int(thread_of_block & unsigned(plan.group - 1));
        of_block = int(thread_of_block >> __popc(plan.group - 1));
        row = std::int64_t(rows) * plan.rows + of_block;
    }
};

// The target of a row, or -1.
__device__ __forceinline__ int target_of(const Targets& targets, std::int64_t b, std::int64_t classes) {
    const std::int64_t target = targets.data[b * targets.stride];
    return target < 0 || target >= classes ? -1 : int(target);
}

// A target out of range stops the kernel and breaks the context, as torch.nn.functional.cross_entropy does; in release
// builds too, hence not assert().
__device__ __forceinline__ void check_target(int target, const char* op) {
    if (target < 0) __assert_fail("0 <= target && target < C", "losses/cuda_call.h", __LINE__, op);
}

struct DktArguments : DktCall {
    DktOptions<float> options;  // without the factors
    BlockPlan plan;
};

// An ExpertCall as the kernels take it.
struct ExpertArguments : ExpertCall {
    BlockPlan plan;
    int together;  // experts that a group of threads serves
    float share;   // 1 / K
    float scale_of_all, inverse_temperature, smoothing, masked_logit;
    bool separate;  // the divergence's logits are not those of the cross-entropy
    bool asks;      // whether answers are right

    ExpertArguments(const ExpertCall& call, const BlockPlan& of_blocks) : ExpertCall(call), plan(of_blocks) {}

    __device__ int label(const LabelsOfExperts& labels, int k, std::int64_t b) const {
        if (labels.data == nullptr) return -1;
        const std::int64_t found = labels.data[b * labels.stride + k * labels.expert_stride];
        return found < 0 || found >= logits.classes ? -1 : int(found);
    }
    // Where the weight of a row's divergence is, and what teaches it; -1: nothing.
    __device__ std::int64_t taught_row(std::int64_t b) const {
        if (teacher != Teacher::kView) return b;
        const std::int64_t images = logits.batch / 2;
        return b < images ? -1 : b - images;
    }
    __device__ float kl_weight_of(int k, std::int64_t b) const {
        const std::int64_t row = taught_row(b);
        return row < 0 ? 0 : number_of(kl_weight, k, row, float(kl_number));
    }

    __device__ float inverse_temperature_of(int c) const {
        return temperature.data == nullptr ? inverse_temperature : 1 / __ldg(floats_of(temperature, 0) + c);
    }

    __device__ static const float* floats_of(const OfExperts& of, int k) {
        return static_cast<const float*>(of.data) + k * of.expert_stride;
    }
    __device__ static float number_of(const OfExperts& of, int k, std::int64_t i, float otherwise) {
        return of.data == nullptr ? otherwise : __ldg(floats_of(of, k) + i);
    }
};

template <int N>
__device__ __forceinline__ bool holds(int c, int number) {
    return unsigned(number - c) < unsigned(N);
}

}  // namespace
}  // namespace shike
