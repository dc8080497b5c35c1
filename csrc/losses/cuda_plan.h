// How the CUDA kernels share out rows: a group of threads serves a row, in chunks of classes. Compiled for the host
// too, which makes the plans.
#pragma once

#include <cstdint>

#include "common/grid.h"
#include "common/macros.h"

namespace shike {
namespace {

// Classes in a chunk: one load of 16 bytes for each expert. More than 4 experts have enough loads at a time with 8 bytes
// of 2-byte logits, and half the registers.
SHIKE_HD constexpr int chunk_of(int experts, bool four_bytes) { return experts <= 4 && !four_bytes ? 8 : 4; }

constexpr int kSector = 32;         // bytes that memory is accessed by: where a row's chunks begin
constexpr int kMostShift = kSector / 2 - 1;  // elements from there to a row

constexpr int kMaxBlock = 256;      // threads: 8 experts need up to 255 registers each
constexpr int kUsualBlock = 128;    // threads, of several rows: small blocks fill a multiprocessor better
constexpr int kSmallestGroup = 8;   // threads; a chunk has no more classes
constexpr int kMaxSplits = kWarp;   // blocks of a row
constexpr int kLongStream = 128;    // classes of a thread that make the merging at its end negligible
constexpr int kShortStream = 32;    // classes of a thread below which another block of the row costs more than it saves
constexpr int kLeast = 8;           // classes of a thread, where nothing is merged

struct BlockPlan {
    int chunk;   // classes
    int group;   // threads of a block that serve the same row: a power of two
    int rows;    // of a block; 1 if a row has several blocks
    int splits;  // blocks of a row
    int stride;  // from chunk to chunk of a thread, in classes

    SHIKE_HD BlockPlan(int classes_of_chunk, int threads_of_row, int rows_of_block, int blocks_of_row)
        : chunk(classes_of_chunk), group(threads_of_row), rows(rows_of_block), splits(blocks_of_row),
          stride(classes_of_chunk * threads_of_row * blocks_of_row) {}

    SHIKE_HD int threads() const { return group * rows; }
    SHIKE_HD std::int64_t blocks(std::int64_t all_rows) const { return (all_rows + rows - 1) / rows * splits; }

    // A thread takes the chunks that begin at first_class, first_class + stride, ... below the number of classes. `shift`
    // is the distance of the row's first logit from the boundary below it where chunks begin.
    SHIKE_HD int first_class(int thread, int split, int shift) const {
        return chunk * (split * group + thread) - shift;
    }
    // Whether class c is in one of these chunks.
    SHIKE_HD bool serves(int c, int thread, int split, int shift) const {
        return unsigned(c + shift) / unsigned(chunk) % unsigned(group * splits) == unsigned(split * group + thread);
    }
    // The most chunks that a thread takes, whatever the shift.
    SHIKE_HD int chunks_of_thread(int classes) const {
        return ((classes + kMostShift + chunk - 1) / chunk + group * splits - 1) / (group * splits);
    }

    // The order of reduction, a butterfly at each level: the lanes of a warp that serve a row, and its warps.
    SHIKE_HD int lanes() const { return group < kWarp ? group : kWarp; }
    SHIKE_HD int warps() const { return group < kWarp ? 1 : group / kWarp; }
};

// `reducing`: the threads' results have to be merged.
inline BlockPlan plan_blocks(int chunk, std::int64_t rows, std::int64_t classes, int processors, bool reducing) {
    if (rows < 1) rows = 1;
    const std::int64_t to_fill = std::int64_t(processors) * kThreadsToFill;
    const int useful = power_of_two(quotient_up(classes + kMostShift, chunk));
    int group = power_of_two(quotient_up(classes, kLongStream));
    if (group < kSmallestGroup) group = kSmallestGroup;
    while (group < kMaxBlock && group < useful && rows * group < to_fill) group *= 2;
    if (group >= kMaxBlock) {
        const std::int64_t fill = to_fill / (rows * kMaxBlock);
        const std::int64_t most = classes / (kMaxBlock * (reducing ? kShortStream : kLeast));
        std::int64_t splits = fill < most ? fill : most;
        if (splits > kMaxSplits) splits = kMaxSplits;
        return BlockPlan(chunk, kMaxBlock, 1, splits > 1 ? int(splits) : 1);
    }
    int rows_of_block = group < kUsualBlock ? kUsualBlock / group : 1;
    while (rows_of_block > 1 && group * rows_of_block > kWarp && quotient_up(rows, rows_of_block) < processors) {
        rows_of_block /= 2;
    }
    return BlockPlan(chunk, group, rows_of_block, 1);
}

// Bytes of shared memory that a device has.
struct SharedMemory {
    int of_processor;
    int of_block;  // at most
};

constexpr int kSharedOfSystem = 1024;   // bytes that every block takes beside its own
constexpr int kResidentThreads = 512;   // of a multiprocessor: enough to cover the memory's latency
constexpr int kMostResident = 4;        // experts: a thread of more has too many registers for two blocks
constexpr int kResidentBlocks = 2;      // of a multiprocessor: one reads its rows while the other works

// Blocks that keep their rows in shared memory, and how many bytes each needs; `bytes_of_class`: of all experts. Rows
// that do not fit, or that would be shared by several blocks, give 0 bytes.
struct ResidentPlan {
    BlockPlan blocks;
    int bytes;
};

inline ResidentPlan plan_resident(int chunk, int bytes_of_class, std::int64_t rows, std::int64_t classes, int processors,
                                  int fixed_bytes, const SharedMemory& shared) {
    ResidentPlan plan{plan_blocks(chunk, rows, classes, processors, true), 0};
    const int for_each = shared.of_processor / kResidentBlocks - kSharedOfSystem;
    const int most = (shared.of_block < for_each ? shared.of_block : for_each) - fixed_bytes;
    if (plan.blocks.splits > 1 || classes * bytes_of_class > most) return plan;
    for (int group = plan.blocks.group; group <= kMaxBlock; group *= 2) {
        const int rows_of_block = smaller(plan.blocks.rows, group < kUsualBlock ? kUsualBlock / group : 1);
        plan.blocks = BlockPlan(chunk, group, rows_of_block, 1);
        const int threads = plan.blocks.threads();
        const std::int64_t bytes =
            std::int64_t(threads) * plan.blocks.chunks_of_thread(int(classes)) * chunk * bytes_of_class;
        if (bytes > most) continue;
        const bool enough = shared.of_processor / (bytes + fixed_bytes + kSharedOfSystem) * threads >= kResidentThreads;
        if (!enough && group < kMaxBlock) continue;
        plan.bytes = int(bytes);
        break;
    }
    return plan;
}

}  // namespace
}  // namespace shike
