// How the CUDA kernels share out rows: a group of threads serves a row, in chunks of classes. Compiled for the host
// too, which makes the plans.
#pragma once

#include <cstdint>

#include "common/grid.h"
#include "common/macros.h"

namespace shike {
namespace {

// Classes in a chunk: 8 are one 16-byte load of 2-byte logits, two of 4-byte logits. More than 4 experts have enough
// loads at a time with 4, and half the registers.
SHIKE_HD constexpr int chunk_of(int experts) { return experts <= 4 ? 8 : 4; }

constexpr int kMaxBlock = 256;      // threads: 8 experts need up to 255 registers each
constexpr int kUsualBlock = 128;     // threads, of several rows: small blocks fill a multiprocessor better
constexpr int kSmallestGroup = 8;   // threads
constexpr int kMaxSplits = kWarp;   // blocks of a row: one warp merges them
constexpr int kLongStream = 16;     // chunks of a thread that make the merging at its end negligible
constexpr int kShortStream = 4;     // chunks of a thread below which another block of the row costs more than it saves

struct BlockPlan {
    int chunk;   // classes
    int group;   // threads of a block that serve the same row: a power of two
    int rows;    // of a block; 1 if a row has several blocks
    int splits;  // blocks of a row

    SHIKE_HD int threads() const { return group * rows; }
    SHIKE_HD std::int64_t blocks(std::int64_t all_rows) const { return (all_rows + rows - 1) / rows * splits; }

    // A thread takes the chunks starting at first_class, first_class + stride, ... below the number of classes. `shift`
    // is the distance of the row's first logit from the boundary below it where aligned chunks start.
    SHIKE_HD int first_class(int thread, int split, int shift) const {
        return chunk * (split * group + thread) - shift;
    }
    SHIKE_HD int stride() const { return chunk * group * splits; }
    // Whether class c is in one of these chunks.
    SHIKE_HD bool serves(int c, int thread, int split, int shift) const {
        return unsigned(c + shift) / unsigned(chunk) % unsigned(group * splits) == unsigned(split * group + thread);
    }

    // The order of reduction, a butterfly at each level: the lanes of a warp, the warps of a block, the blocks of a
    // row. Number of participants; 1: the level is skipped.
    SHIKE_HD int participants(int level) const {
        if (level == 0) return group < kWarp ? group : kWarp;
        if (level == 1) return group < kWarp ? 1 : group / kWarp;
        int blocks_of_row = 1;
        while (blocks_of_row < splits) blocks_of_row *= 2;
        return blocks_of_row;
    }
};

// `reducing`: the threads' results have to be merged.
inline BlockPlan plan_blocks(int chunk, std::int64_t rows, std::int64_t classes, int processors, bool reducing) {
    if (rows < 1) rows = 1;
    const std::int64_t chunks = (classes + 2 * (chunk - 1)) / chunk;
    const std::int64_t to_fill = std::int64_t(processors) * kThreadsToFill;
    const int useful = power_of_two(chunks);
    BlockPlan plan{chunk, power_of_two((chunks + kLongStream - 1) / kLongStream), 1, 1};
    if (plan.group < kSmallestGroup) plan.group = kSmallestGroup;
    while (plan.group < kMaxBlock && plan.group < useful && rows * plan.group < to_fill) plan.group *= 2;
    if (plan.group > kMaxBlock) plan.group = kMaxBlock;
    if (plan.group == kMaxBlock) {
        const std::int64_t fill = to_fill / (rows * kMaxBlock);
        const std::int64_t most = chunks / (kMaxBlock * (reducing ? kShortStream : 1));
        std::int64_t splits = fill < most ? fill : most;
        if (splits > kMaxSplits) splits = kMaxSplits;
        if (splits > 1) plan.splits = int(splits);
        return plan;
    }
    plan.rows = plan.group < kUsualBlock ? kUsualBlock / plan.group : 1;
    while (plan.rows > 1 && plan.threads() > kWarp && plan.blocks(rows) < processors) plan.rows /= 2;
    return plan;
}

}  // namespace
}  // namespace shike
