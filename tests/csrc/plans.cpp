// The plans of the CUDA kernels, for ctypes: which blocks and threads serve what. They are host code without CUDA.

#include <cstdint>

#include "fusion/cuda_plan.h"
#include "losses/cuda_plan.h"

using std::int64_t;

// group, rows and splits.
extern "C" void loss_plan(int experts, bool four_bytes, int64_t rows, int64_t classes, int processors, bool reducing,
                          int* numbers) {
    const shike::BlockPlan plan =
        shike::plan_blocks(shike::chunk_of(experts, four_bytes), rows, classes, processors, reducing);
    numbers[0] = plan.group;
    numbers[1] = plan.rows;
    numbers[2] = plan.splits;
}

// group and rows of blocks that keep their rows in shared memory, its bytes (0: they cannot), and the chunks of a thread.
extern "C" void resident_plan(int experts, bool four_bytes, int64_t rows, int64_t classes, int processors,
                              int of_processor, int of_block, int* numbers) {
    const int chunk = shike::chunk_of(experts, four_bytes);
    const shike::ResidentPlan plan = shike::plan_resident(chunk, experts * (four_bytes ? 4 : 2), rows, classes, processors,
                                                          1024, {of_processor, of_block});
    numbers[0] = plan.blocks.group;
    numbers[1] = plan.blocks.rows;
    numbers[2] = plan.bytes;
    numbers[3] = plan.blocks.chunks_of_thread(int(classes));
}

// For each class of a row how many of its threads visit it, the last of them, how many BlockPlan::serves names, and the
// last of those.
extern "C" void threads_of_classes(int chunk, int classes, int shift, int group, int splits, int (*numbers)[4]) {
    const shike::BlockPlan plan(chunk, group, 1, splits);
    for (int split = 0; split < splits; ++split) {
        for (int thread = 0; thread < group; ++thread) {
            for (int first = plan.first_class(thread, split, shift); first < classes; first += plan.stride) {
                for (int c = first < 0 ? 0 : first; c < first + plan.chunk && c < classes; ++c) {
                    ++numbers[c][0];
                    numbers[c][1] = split * group + thread;
                }
            }
            for (int c = 0; c < classes; ++c) {
                if (!plan.serves(c, thread, split, shift)) continue;
                ++numbers[c][2];
                numbers[c][3] = split * group + thread;
            }
        }
    }
}

// vector, by_channel, lanes, group, rows, groups, splits, samples, and blocks of 128 threads that a multiprocessor holds.
// `kernel`: 0 statistics, 1 pooling, 2 gradient; maps of this shape and these strides, at an aligned address that is
// never read; `count`: experts or maps of the launch.
extern "C" void fusion_plan(const int64_t* shape, const int64_t* strides, int dtype, int count, int processors,
                            int kernel, bool folded, int64_t* numbers) {
    shike::Fusion call{};
    call.shape = {shape[0], shape[1], shape[2], shape[3], shike::DType(dtype)};
    call.count = count;
    call.folded = folded;
    const shike::FeatureMap map{reinterpret_cast<void*>(4096), strides[0], strides[1], strides[2], strides[3]};
    shike::FusionGradient gradient{};
    for (int k = 0; k < count; ++k) {
        call.expert[k].deep = call.expert[k].shallow = call.expert[k].shortcut = map;
        gradient.expert[k] = {map, map, map};
    }
    shike::FusionLayout layout(call.shape);
    layout.add(map);
    const shike::FusionPlan plan = kernel == 0   ? shike::statistics_plan(call.shape, layout, count, processors)
                                   : kernel == 1 ? shike::pooling_plan(call, 0, processors)
                                                 : shike::gradient_plan(call, gradient, processors);
    const int resident = kernel == 0   ? shike::statistics_blocks()
                         : kernel == 1 ? shike::pooling_blocks(plan.vector, folded)
                                       : shike::gradient_blocks(plan.vector, folded);
    const int64_t all[] = {plan.vector, plan.by_channel, plan.lanes,   plan.group, plan.rows,
                           plan.groups, plan.splits,     plan.samples, resident};
    for (int i = 0; i < 9; ++i) numbers[i] = all[i];
}
