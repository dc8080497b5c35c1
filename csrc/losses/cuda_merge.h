// How the threads of a row put together what they know: butterflies over lanes, and warps through shared memory. The
// order is fixed.
#pragma once

#include "losses/cuda_plan.h"
#include "losses/cuda_stream.h"

namespace shike {
namespace {

SHIKE_DEVICE float exchanged(float value, int lane_mask) { return __shfl_xor_sync(0xffffffffu, value, lane_mask); }
SHIKE_DEVICE int exchanged(int value, int lane_mask) { return __shfl_xor_sync(0xffffffffu, value, lane_mask); }

template <int N>
SHIKE_DEVICE void add_lanes(float (&values)[N], int lanes) {
#pragma unroll 1
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] += exchanged(values[i], mask);
    }
}

// Leaves the merged stream of `lanes` neighbouring lanes in each of them; a power of two.
template <int K, bool kFloat>
SHIKE_DEVICE void merge_lanes(DktStream<K, kFloat>& stream, int lanes) {
    float pivot = stream.pivot, hardest = stream.hardest;
    int chunk = stream.chunk;
#pragma unroll 1
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
        pivot = larger(pivot, exchanged(pivot, mask));
        const float others_hardest = exchanged(hardest, mask);
        const int others_chunk = exchanged(chunk, mask);
        const bool harder = others_hardest > hardest || (others_hardest == hardest && others_chunk < chunk);
        hardest = harder ? others_hardest : hardest;
        chunk = harder ? others_chunk : chunk;
    }
    stream.move_pivot(pivot);
    const bool holds_it = stream.chunk == chunk;  // all other held-out chunks join the sums
    float sums[2 * K + 4];
#pragma unroll
    for (int k = 0; k < K; ++k) {
        sums[k] = stream.sum[k];
        sums[K + k] = stream.cross[k];
    }
    sums[2 * K] = stream.teacher_sum + (holds_it ? 0 : stream.held_sum);
    sums[2 * K + 1] = stream.teacher_gap + (holds_it ? 0 : stream.held_gap);
    sums[2 * K + 2] = holds_it ? stream.held_sum : 0;
    sums[2 * K + 3] = holds_it ? stream.held_gap : 0;
    add_lanes(sums, lanes);
#pragma unroll
    for (int k = 0; k < K; ++k) {
        stream.sum[k] = sums[k];
        stream.cross[k] = sums[K + k];
    }
    stream.teacher_sum = sums[2 * K];
    stream.teacher_gap = sums[2 * K + 1];
    stream.held_sum = sums[2 * K + 2];
    stream.held_gap = sums[2 * K + 3];
    stream.hardest = hardest;
    stream.chunk = chunk;
}

// The streams of a block's threads that serve one row become one, which its first warp then holds in every lane (every
// lane of the group, where that is smaller). False in the other warps.
template <class Stream>
SHIKE_DEVICE bool merge_block(Stream& stream, const BlockPlan& plan, int thread) {
    constexpr int kWords = sizeof(Stream) / 4;
    __shared__ float of_warps[kMaxBlock / kWarp][kWords];
    merge_lanes(stream, plan.lanes());
    const int warps = plan.warps();
    if (warps <= 1) return true;
    float* words = reinterpret_cast<float*>(&stream);
    const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp);
    if (lane == 0) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) of_warps[warp][i] = words[i];
    }
    __syncthreads();
    if (thread >= kWarp) return false;
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = of_warps[warp + lane % warps][i];
    merge_lanes(stream, warps);
    return true;
}

}  // namespace
}  // namespace shike
