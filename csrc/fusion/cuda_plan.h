// How the CUDA kernels of depth-wise knowledge fusion share out maps [B, C, H, W]. Compiled for the host too, which
// makes the plans.
//
// A thread owns `vector` neighbouring channels (16 bytes, or one channel) of a sample and some of its positions; a
// block covers `lanes` such vectors and `rows` samples at a time, with `group` threads for the positions of each; it
// goes through `samples` samples.
#pragma once

#include <cstdint>

#include "common/grid.h"
#include "common/macros.h"
#include "fusion/call.h"

namespace shike {
namespace {

constexpr int kFusionBlock = 128;      // threads at most
constexpr int kFusionBlocks = 16;      // blocks of a multiprocessor beyond which samples are served one after another
constexpr int kStatisticsSplits = 128;  // most parts of the batch with statistics of their own
constexpr int kFusionSplits = 1 << 16;  // most parts of the batch elsewhere
constexpr int kFewPositions = 4;       // of a thread: loaded at a time
constexpr int kPlaneShare = 8;         // positions of a thread where neighbouring threads have neighbouring positions

// Digits of a thread's number; all counts are powers of two.
struct FusionThread {
    int lane;    // of the vectors of channels
    int member;  // of the threads that share a sample's positions
    int row;     // of the samples at a time
};

struct FusionPlan {
    int vector;
    bool by_channel;         // neighbouring threads have neighbouring channels, else neighbouring positions
    int lanes, group, rows;  // of a block
    int groups;              // of vectors of channels: blocks that cover all channels
    int splits;              // of the batch
    std::int64_t samples;    // of a split; a multiple of rows

    SHIKE_HD int threads() const { return lanes * group * rows; }
    SHIKE_HD int width() const { return lanes * vector; }  // channels of a block
    SHIKE_HD std::int64_t blocks() const { return std::int64_t(groups) * splits; }

    SHIKE_HD static int digit_bits(int power) {
#ifdef __CUDA_ARCH__
        return __popc(unsigned(power - 1));
#else
        return __builtin_popcount(unsigned(power - 1));
#endif
    }

    SHIKE_HD FusionThread digits(int thread) const {
        const int fast = by_channel ? lanes : group, slow = by_channel ? group : lanes;
        const int first = thread & (fast - 1), rest = thread >> digit_bits(fast);
        const int second = rest & (slow - 1), row = rest >> digit_bits(slow);
        return {by_channel ? first : second, by_channel ? second : first, row};
    }
    SHIKE_HD int thread_of(int lane, int member, int row) const {
        return (by_channel ? lane + lanes * member : member + group * lane) + lanes * group * row;
    }
};

// Position p of a plane: the element at p * step or, where width is not 0, at p / width rows and p % width columns.
struct PositionStep {
    std::int64_t step, row_step;
    int width;

    SHIKE_HD PositionStep(const FeatureMap& map, const MapShape& shape) {
        const bool one_column = shape.width == 1;
        step = one_column ? map.h : map.w;
        row_step = map.h;
        width = one_column || shape.height == 1 || map.h == shape.width * map.w ? 0 : int(shape.width);
    }
    SHIKE_HD std::int64_t at(int p) const {
        if (width == 0) return p * step;
        const int row = p / width;
        return row * row_step + (p - row * width) * step;
    }
};

// Whether 16 bytes of channels can be accessed at once everywhere.
inline bool is_wide(const FeatureMap& map, const MapShape& shape) {
    const int bytes = shape.dtype == DType::kFloat32 ? 4 : 2, vector = 16 / bytes;
    const PositionStep position(map, shape);
    const bool aligned = reinterpret_cast<std::uintptr_t>(map.data) % 16 == 0 &&
                         (shape.batch == 1 || map.b % vector == 0) &&
                         (shape.positions() == 1 || position.step % vector == 0);
    return shape.channels % vector == 0 && map.c == 1 && position.width == 0 && aligned;
}

// What the layouts of all maps of a launch allow.
class FusionLayout {
public:
    explicit FusionLayout(const MapShape& shape) : shape_(shape) {}

    void add(const FeatureMap& map) {
        wide_ = wide_ && is_wide(map, shape_);
        const std::int64_t position = shape_.positions() == 1 ? 0 : PositionStep(map, shape_).step;
        by_channel_ += position == 0 || magnitude(map.c) < magnitude(position) ? 1 : -1;
    }
    void add_vector(const void* data) { wide_ = wide_ && reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }

    int vector() const { return !wide_ ? 1 : shape_.dtype == DType::kFloat32 ? 4 : 8; }
    bool by_channel() const { return wide_ || by_channel_ >= 0; }

private:
    static std::int64_t magnitude(std::int64_t step) { return step < 0 ? -step : step; }

    MapShape shape_;
    bool wide_ = true;
    int by_channel_ = 0;
};

// `count`: experts or maps of the launch.
inline FusionPlan plan_fusion(const MapShape& shape, const FusionLayout& layout, int count, int processors,
                              int most_splits) {
    const int vector = layout.vector();
    const std::int64_t vectors = quotient_up(shape.channels, vector), positions = shape.positions();
    const int samples = power_of_two(shape.batch);
    FusionPlan plan{vector, layout.by_channel(), 1, 1, 1, 1, 1, 1};
    if (plan.by_channel) {
        plan.lanes = smaller(power_of_two(vectors), kWarp);
        const double threads = double(count) * double(shape.batch) * double(vectors);
        while (plan.lanes * plan.group < kFusionBlock && plan.group * 2 * kFewPositions <= positions &&
               threads * plan.group < double(processors) * kThreadsToFill) {
            plan.group *= 2;
        }
    } else {
        const int usual = power_of_two(quotient_up(positions, kPlaneShare));
        const int least = smaller(power_of_two(positions), kWarp / 2);
        plan.group = smaller(usual < least ? least : usual, kFusionBlock);
        plan.lanes = smaller(power_of_two(vectors), kFusionBlock / plan.group);
    }
    plan.rows = smaller(samples, kFusionBlock / (plan.lanes * plan.group));
    const auto blocks = [&] { return quotient_up(vectors, plan.lanes) * quotient_up(shape.batch, plan.rows) * count; };
    while (plan.rows > 1 && plan.threads() > kWarp && blocks() < 2 * processors) plan.rows /= 2;
    // Of channels at least 64 bytes.
    while (plan.lanes > (plan.by_channel ? 4 : 1) && plan.threads() > 2 * kWarp && blocks() < 2 * processors) {
        plan.lanes /= 2;
    }
    plan.groups = int(quotient_up(vectors, plan.lanes));
    const std::int64_t rounds = quotient_up(shape.batch, plan.rows);
    const std::int64_t wanted = quotient_up(std::int64_t(processors) * kFusionBlocks * kFusionBlock,
                                            std::int64_t(plan.threads()) * plan.groups * count);
    const std::int64_t most = wanted < most_splits ? wanted : most_splits;
    plan.samples = quotient_up(rounds, rounds < most ? rounds : most) * plan.rows;
    plan.splits = int(quotient_up(shape.batch, plan.samples));
    return plan;
}

}  // namespace
}  // namespace shike
