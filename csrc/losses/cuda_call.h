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

struct CrossEntropyArguments {
    Experts logits;
    Targets target;
    const float* bias;
    std::int64_t bias_stride;
    float smoothing;
    float* saved;  // [B, 2 K]
    BlockPlan plan;
};

template <int N>
__device__ __forceinline__ bool holds(int c, int number) {
    return unsigned(number - c) < unsigned(N);
}

}  // namespace
}  // namespace shike
