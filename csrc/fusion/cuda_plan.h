// How the CUDA kernels of depth-wise knowledge fusion share out maps [B, C, H, W]. Compiled for the host too, which
// makes the plans.
//
// A thread owns `vector` neighbouring channels (16 bytes, or one channel) of a sample and some of its positions; a
// block covers `lanes` such vectors and `rows` samples at a time, with `group` threads of one warp for the positions of
// each; it goes through `samples` samples.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/grid.h"
#include "common/macros.h"
#include "fusion/call.h"

namespace shike {
namespace {

constexpr int kFusionBlock = 128;       // threads at most
constexpr int kStatisticsSplits = 128;  // most parts of the batch with statistics of their own
constexpr int kFusionSplits = 1 << 16;  // most parts of the batch elsewhere
constexpr int kFewPositions = 4;        // of a thread: loaded at a time
constexpr int kProductSamples = 4;      // of a thread that ends samples whose sums are there, loaded at a time
constexpr int kPlaneShare = 8;          // positions of a thread where neighbouring threads have neighbouring positions
constexpr int kMemoryLine = 64;         // bytes that memory delivers at once
constexpr int kBlockStart = 12;         // positions of a thread that take as long as what a block does once
constexpr int kMostRounds = 16;         // of a block, unless there would be too many splits

// Blocks of kFusionBlock threads that a multiprocessor holds: the launch bounds of the kernels, whose registers and
// loads under way they weigh up.
SHIKE_HD constexpr int statistics_blocks() { return 4; }
SHIKE_HD constexpr int pooling_blocks(int vector, bool folded) { return folded && vector > 1 ? 3 : 4; }
SHIKE_HD constexpr int gradient_blocks(int vector, bool folded) { return folded && vector > 1 ? 2 : 4; }

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

// Whether 16 bytes of channels can be accessed at once everywhere, with positions a step of 31 bits apart.
inline bool is_wide(const FeatureMap& map, const MapShape& shape) {
    const int bytes = shape.dtype == DType::kFloat32 ? 4 : 2, vector = 16 / bytes;
    const PositionStep position(map, shape);
    const bool aligned = reinterpret_cast<std::uintptr_t>(map.data) % 16 == 0 &&
                         (shape.batch == 1 || map.b % vector == 0) &&
                         (shape.positions() == 1 || position.step % vector == 0);
    const std::int64_t furthest = std::int64_t(1) << 28;  // elements
    const bool near = shape.positions() == 1 || (-furthest < position.step && position.step < furthest);
    return shape.channels % vector == 0 && map.c == 1 && position.width == 0 && aligned && near;
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

// How many rounds of its rows a block serves. The blocks that run at once all take as long, so what counts is how often
// the device fills up with them, and that each begins anew; of equals, the fewest blocks. A round is `length` positions
// of a thread; `columns`: blocks for each split; `resident`: blocks that the device holds.
inline std::int64_t rounds_of_blocks(std::int64_t rounds, std::int64_t length, std::int64_t columns,
                                     std::int64_t resident, int most_splits) {
    const std::int64_t fewest = quotient_up(rounds, most_splits);
    std::int64_t best = fewest, least = 0;
    for (std::int64_t some = fewest; some < fewest + kMostRounds && some <= rounds; ++some) {
        const std::int64_t waves = quotient_up(quotient_up(rounds, some) * columns, resident);
        const std::int64_t time = waves * (some * length + kBlockStart);
        if (some > fewest && time > least) continue;
        best = some;
        least = time;
    }
    return best;
}

// `count`: experts or maps of the launch; `resident`: see statistics_blocks().
inline FusionPlan plan_fusion(const MapShape& shape, const FusionLayout& layout, int count, int processors,
                              int resident, int most_splits) {
    const int vector = layout.vector(), bytes = shape.dtype == DType::kFloat32 ? 4 : 2;
    const std::int64_t vectors = quotient_up(shape.channels, vector), positions = shape.positions();
    FusionPlan plan{vector, layout.by_channel(), 1, 1, 1, 1, 1, 1};
    if (plan.by_channel) {
        // A warp reads as many channels as it can, and a thread the whole plane of a sample: then it adds up nothing
        // with others. Where this leaves the device a quarter empty, threads share planes, and a warp's channels are
        // fewer.
        plan.lanes = smaller(power_of_two(vectors), kWarp);
        const double threads = double(count) * double(shape.batch) * double(vectors);
        const double room = double(processors) * resident * kFusionBlock;
        const int least = kMemoryLine / (vector * bytes);
        while (plan.group * 2 * kFewPositions <= positions && 4 * threads * plan.group < 3 * room) {
            if (plan.lanes * plan.group == kWarp) {
                if (plan.lanes <= least) break;
                plan.lanes /= 2;
            }
            plan.group *= 2;
        }
    } else {
        const int usual = power_of_two(quotient_up(positions, kPlaneShare));
        const int least = smaller(power_of_two(positions), kWarp / 2);
        plan.group = smaller(usual < least ? least : usual, kWarp);
        plan.lanes = smaller(power_of_two(vectors), kFusionBlock / plan.group);
    }
    plan.rows = smaller(power_of_two(shape.batch), kFusionBlock / (plan.lanes * plan.group));
    plan.groups = int(quotient_up(vectors, plan.lanes));
    // Small blocks rather than idle multiprocessors, of which a tenth may be; but of whole warps, which exchange sums.
    const auto blocks = [&] { return plan.groups * quotient_up(shape.batch, plan.rows) * count; };
    while (plan.rows > 1 && plan.threads() > kWarp && 10 * blocks() < 9 * processors) plan.rows /= 2;
    while (plan.threads() < kWarp) plan.rows *= 2;
    plan.samples = plan.rows * rounds_of_blocks(quotient_up(shape.batch, plan.rows),
                                                quotient_up(positions, plan.group), std::int64_t(plan.groups) * count,
                                                std::int64_t(processors) * resident * (kFusionBlock / plan.threads()),
                                                most_splits);
    plan.splits = int(quotient_up(shape.batch, plan.samples));
    return plan;
}

inline FusionPlan statistics_plan(const MapShape& shape, const FusionLayout& layout, int count, int processors) {
    return plan_fusion(shape, layout, count, processors, statistics_blocks(), kStatisticsSplits);
}

// Where the sums of all experts are there: threads take single channels of some samples, and a norm's numbers for them.
inline FusionPlan products_plan(const MapShape& shape) {
    const int rows = smaller(power_of_two(quotient_up(shape.batch, kProductSamples)), kFusionBlock / kWarp);
    const std::int64_t samples = rows * kProductSamples;
    return {1, true, kWarp, 1, rows, int(quotient_up(shape.channels, kWarp)), int(quotient_up(shape.batch, samples)),
            samples};
}

// `products`: as in PoolingArguments.
inline FusionPlan pooling_plan(const Fusion& call, unsigned products, int processors) {
    if (products + 1 == 1u << call.count) return products_plan(call.shape);
    FusionLayout layout(call.shape);
    for (int k = 0; k < call.count; ++k) {
        if ((products >> k & 1u) != 0) continue;
        layout.add(call.expert[k].deep);
        layout.add(call.expert[k].shallow);
        if (call.folded) layout.add(call.expert[k].shortcut);
    }
    const int resident = pooling_blocks(layout.vector(), call.folded);
    return plan_fusion(call.shape, layout, call.count, processors, resident, kFusionSplits);
}

inline FusionPlan gradient_plan(const Fusion& call, const FusionGradient& gradient, int processors) {
    FusionLayout layout(call.shape);
    layout.add_vector(gradient.grad_output);
    for (int k = 0; k < call.count; ++k) {
        const ExpertFusion& expert = call.expert[k];
        const ExpertGradient& results = gradient.expert[k];
        for (const FeatureMap& map : {expert.deep, expert.shallow, results.deep, results.shallow}) layout.add(map);
        if (!call.folded) continue;
        layout.add(expert.shortcut);
        layout.add(results.shortcut);
    }
    const int resident = gradient_blocks(layout.vector(), call.folded);
    return plan_fusion(call.shape, layout, call.count, processors, resident, kFusionSplits);
}

}  // namespace
}  // namespace shike
