// The CUDA kernels of depth-wise knowledge fusion on the CPU, for tests: the same launches, blocks, threads and steps
// (cuda_stages.h), one after another, so that they can be checked where there is no device.

#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "common/arguments.h"
#include "common/module.h"
#include "fusion/arguments.h"
#include "fusion/cuda_stages.h"

namespace shike {
namespace {

// The threads of a block. They take a step in descending order where `descending`: a step in which one thread reads
// what another writes gives other results then.
template <class State>
class HostTeam {
public:
    HostTeam(int threads, int floats, bool descending)
        : shared_(std::size_t(floats), std::numeric_limits<float>::quiet_NaN()), states_(std::size_t(threads)),
          descending_(descending) {
        memory = shared_.data();
    }

    float* memory;

    template <class Step>
    void each(Step step) {
        const int threads = int(states_.size());
        for (int i = 0; i < threads; ++i) {
            const int thread = descending_ ? threads - 1 - i : i;
            step(states_[std::size_t(thread)], thread);
        }
    }

private:
    std::vector<float> shared_;
    std::vector<State> states_;
    bool descending_;
};

// As DeviceRun of cuda_launch.cu.
class HostRun {
public:
    explicit HostRun(bool descending) : descending_(descending) {}

    void statistics(const StatisticsArguments& call) const {
        with_elements(call.maps.shape.dtype, call.plan.vector, [&](auto type, auto vector) {
            using State = StatisticsState<type(), vector()>;
            launch<State>(call.plan, call.maps.count, block_memory(vector, State::kValues, 0),
                          [&](auto& team, unsigned block, int map) {
                              statistics_block<type(), vector()>(team, call, block, map);
                          });
        });
    }

    void merge(const MergeArguments& call, int count) const {
        launch<MergeState>(quotient_up(call.shape.channels, kWarp), count, kWarp * kMergeRows,
                           kMergeValues * kWarp * kMergeRows,
                           [&](auto& team, unsigned block, int map) { merge_block(team, call, block, map); });
    }

    void pooling(const PoolingArguments& call) const {
        if (call.call.folded) {
            pooling<true>(call);
        } else {
            pooling<false>(call);
        }
    }

    void vectors(const VectorArguments& call) const {
        with_elements(call.shape.dtype, 1, [&](auto type, auto) {
            launch<VectorState>(quotient_up(call.shape.channels, kWarp), call.experts, kWarp * kVectorRows,
                                4 * kWarp * kVectorRows,
                                [&](auto& team, unsigned block, int k) { vector_block<type()>(team, call, block, k); });
        });
    }

    void gradients(const GradientArguments& call) const {
        if (call.call.folded) {
            gradients<true>(call);
        } else {
            gradients<false>(call);
        }
    }

private:
    template <bool kFolded>
    void pooling(const PoolingArguments& call) const {
        with_elements(call.call.shape.dtype, call.plan.vector, [&](auto type, auto vector) {
            using State = PoolingState<vector(), kFolded>;
            launch<State>(call.plan, call.call.count, block_memory(vector, State::kSums, kFolded ? 6 : 3),
                          [&](auto& team, unsigned block, int k) {
                              pooling_block<type(), vector(), kFolded>(team, call, block, k);
                          });
        });
    }

    template <bool kFolded>
    void gradients(const GradientArguments& call) const {
        with_elements(call.call.shape.dtype, call.plan.vector, [&](auto type, auto vector) {
            launch<GradientState<vector(), kFolded>>(
                call.plan, call.call.count, block_memory(vector, 0, kFolded ? 10 : 5),
                [&](auto& team, unsigned block, int k) {
                    gradient_block<type(), vector(), kFolded>(team, call, block, k);
                });
        });
    }

    template <class State, class Block>
    void launch(const FusionPlan& plan, int count, int floats, Block block) const {
        if (plan.threads() > kFusionBlock) throw std::runtime_error("a block is larger than its kernel allows");
        launch<State>(plan.blocks(), count, plan.threads(), floats, block);
    }

    template <class State, class Block>
    void launch(std::int64_t blocks, int count, int threads, int floats, Block block) const {
        for (int second = 0; second < count; ++second) {
            for (std::int64_t first = 0; first < blocks; ++first) {
                HostTeam<State> team(threads, floats, descending_);
                block(team, unsigned(first), second);
            }
        }
    }

    bool descending_;
};

// Not numbers: what a stage leaves out shows up.
std::vector<float> workspace_of(std::size_t floats) {
    return std::vector<float>(floats, std::numeric_limits<float>::quiet_NaN());
}

// vector, by_channel, lanes, group, rows, groups, splits and samples for the maps of a launch.
std::array<std::int64_t, 8> plan_of(const MapList& maps, int count, int processors, bool statistics) {
    FusionLayout layout(maps.shape);
    for (int i = 0; i < maps.count; ++i) layout.add(maps.map[i]);
    const FusionPlan plan =
        plan_fusion(maps.shape, layout, count, processors, statistics ? kStatisticsSplits : kFusionSplits);
    return {plan.vector, plan.by_channel, plan.lanes, plan.group, plan.rows, plan.groups, plan.splits, plan.samples};
}

// What stands for the device.
struct Emulated {
    int processors;
    bool descending;

    explicit Emulated(Arguments& in)
        : processors(int(in["processors"].integer())), descending(in["descending"].flag()) {}
};

}  // namespace
}  // namespace shike

SHIKE_BINDINGS(module) {
    using namespace shike;
    define(module, "emulate_dkf_forward", "Run the CUDA kernels of the forward on the CPU.", [](Arguments& in) {
        const Fusion call = forward_of(in);
        const ForwardResults results = results_of(in);
        const Emulated device(in);
        return [=] {
            std::vector<float> workspace = workspace_of(forward_workspace(call, results.training, device.processors));
            HostRun run(device.descending);
            run_forward(run, call, results.saved, results.training, results.f, static_cast<float*>(results.statistics),
                        workspace.data(), device.processors);
        };
    });
    define(module, "emulate_dkf_statistics", "Run the CUDA kernels of the statistics on the CPU.", [](Arguments& in) {
        const MapList maps = map_list(in);
        auto* statistics = static_cast<float*>(in["statistics"].memory(3));
        const Emulated device(in);
        return [=] {
            std::vector<float> workspace = workspace_of(statistics_workspace(maps, device.processors));
            HostRun run(device.descending);
            run_statistics(run, maps, statistics, workspace.data(), device.processors);
        };
    });
    define(module, "emulate_dkf_vector_gradients", "Run the CUDA kernel of the vectors' gradients on the CPU.",
           [](Arguments& in) {
               const Fusion call = fusion_of(in);
               const void* grad_output = in["grad_output"].memory(3);
               const FusionSaved saved{in["sums"].memory(4), nullptr};
               auto* vectors = static_cast<float*>(in["vectors"].memory(3));
               const bool descending = in["descending"].flag();
               return [=] {
                   HostRun run(descending);
                   run_vector_gradients(run, call, saved, grad_output, vectors);
               };
           });
    define(module, "emulate_dkf_map_gradients", "Run the CUDA kernel of the maps' gradients on the CPU.",
           [](Arguments& in) {
               const Fusion call = fusion_of(in);
               const FusionSaved saved{nullptr, in["mean_rstd"].memory(3)};
               const FusionGradient gradient = gradient_of(in, call);
               const Emulated device(in);
               return [=] {
                   HostRun run(device.descending);
                   run_map_gradients(run, call, saved, gradient, device.processors);
               };
           });
    const auto* what = "How the CUDA kernels share out maps: vector, by_channel, lanes, group, rows, groups, splits, samples.";
    define(module, "dkf_plan", what, [](Arguments& in) {
        const MapList maps = map_list(in);
        const int count = int(in["count"].integer()), processors = int(in["processors"].integer());
        const bool statistics = in["statistics"].flag();
        return [=] { return plan_of(maps, count, processors, statistics); };
    });
}
