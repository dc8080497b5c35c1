// Structs in the memory of a device, one for each lane of a warp: they go through shared memory, so that lanes next to
// each other access words next to each other.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace shike {
namespace {

template <int kWords>
struct Staged {
    // Where a word of a lane's struct is. Rows that begin in the same bank are turned against each other.
    __device__ static int place(int row, int word) {
        constexpr int kUneven = (kWords & -kWords) < kWarp ? kWarp / (kWords & -kWords) : 1;
        const int turned = word + row / kUneven;
        return row * kWords + (turned < kWords ? turned : turned - kWords);
    }

    // The structs of the first `rows` lanes, without the words from kUsed on.
    template <int kUsed>
    __device__ static void load(float* stage, const void* from, int rows) {
        for (int i = int(threadIdx.x); i < rows * kWords; i += kWarp) {
            if (i % kWords < kUsed) stage[place(i / kWords, i % kWords)] = static_cast<const float*>(from)[i];
        }
        __syncwarp();
    }
    __device__ static void store(const float* stage, void* to, int rows) {
        __syncwarp();
        for (int i = int(threadIdx.x); i < rows * kWords; i += kWarp) {
            static_cast<float*>(to)[i] = stage[place(i / kWords, i % kWords)];
        }
    }
    __device__ static float& word(float* stage, int word) { return stage[place(int(threadIdx.x), word)]; }
};

}  // namespace
}  // namespace shike
