// Sums over the batch in a fixed order, in double precision: the terms of many rows differ by orders of magnitude.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace shike {
namespace {

SHIKE_DEVICE double sum_of_lanes(double value) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
    return value;
}

// Blocks of one warp: the lanes' numbers are added, and the warp that comes last adds the blocks' sums. loss: the sum of
// the weighted sums; weighted: these, or null. factors: [columns - 1], of the weights but the first, or null.
template <int kColumns>
SHIKE_DEVICE void sum_over_blocks(const double (&of_lane)[kColumns], double* sums,  // [columns, blocks]
                                  unsigned* ticket, const double (&weights)[kColumns], const double* factors,
                                  float* loss, float* weighted) {
    const unsigned blocks = gridDim.x;
    double total[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) total[column] = sum_of_lanes(of_lane[column]);
    if (blocks > 1) {
        unsigned before = 0;
        if (threadIdx.x == 0) {
#pragma unroll
            for (int column = 0; column < kColumns; ++column) sums[column * blocks + blockIdx.x] = total[column];
            __threadfence();
            before = atomicAdd(ticket, 1u);
        }
        if (__shfl_sync(0xffffffffu, before, 0) != blocks - 1) return;
        __syncwarp();  // a shuffle does not order memory: what lane 0 knows of is now known to all
        __threadfence();
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
            double sum = 0;
#pragma unroll 4
            for (unsigned block = threadIdx.x; block < blocks; block += kWarp) {
                sum += *const_cast<const volatile double*>(sums + column * blocks + block);
            }
            total[column] = sum_of_lanes(sum);
        }
    }
    if (threadIdx.x != 0) return;
    double sum = 0;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
        total[column] *= weights[column];
        if (column > 0 && factors != nullptr) total[column] *= factors[column - 1];
        sum += total[column];
        if (weighted != nullptr) weighted[column] = float(total[column]);
    }
    *loss = float(sum);
}

}  // namespace
}  // namespace shike
