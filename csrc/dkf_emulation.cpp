// The CUDA kernels of depth-wise knowledge fusion on the CPU, for tests: the same launches, blocks, threads and steps
// (dkf_stages.h), one after another, so that they can be checked where there is no device.

#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "dkf_stages.h"
#include "module.h"

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

// As DeviceRun of dkf.cu.
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

using Integers = std::vector<std::int64_t>;

template <class T>
T* address(std::int64_t value) {
    return reinterpret_cast<T*>(value);
}

// [address, strides of b, c, h, w].
FeatureMap map_of(const Integers& five) {
    return {address<void>(five.at(0)), five.at(1), five.at(2), five.at(3), five.at(4)};
}

MapShape shape_of(const Integers& shape, int dtype) {
    return {shape.at(0), shape.at(1), shape.at(2), shape.at(3), DType(dtype)};
}

// `maps`: K deep, K shallow and, if folded, K shortcut ones. `norms`: the addresses of weight, bias, running mean and
// running variance of each.
Fusion fusion_of(const std::vector<Integers>& maps, const std::vector<Integers>& norms, const std::vector<bool>& relu,
                 const std::vector<double>& eps, const std::vector<double>& momentum, const Integers& shape,
                 int dtype) {
    Fusion call{};
    const std::size_t experts = relu.size();
    if (experts > std::size_t(kMaxExperts)) throw std::runtime_error("1 to 8 experts are supported");
    call.count = int(experts);
    call.shape = shape_of(shape, dtype);
    call.normalised = !norms.empty();
    call.folded = maps.size() > 2 * experts;
    const auto norm_of = [&](std::size_t j) {
        const Integers& four = norms.at(j);
        return Normalisation{address<void>(four.at(0)), address<void>(four.at(1)), address<void>(four.at(2)),
                             address<void>(four.at(3)), momentum.at(j), eps.at(j)};
    };
    for (std::size_t k = 0; k < experts; ++k) {
        ExpertFusion& expert = call.expert[k];
        expert.deep = map_of(maps.at(k));
        expert.shallow = map_of(maps.at(experts + k));
        expert.relu = relu[k];
        if (call.normalised) expert.norm = norm_of(k);
        if (!call.folded) continue;
        expert.shortcut = map_of(maps.at(2 * experts + k));
        expert.deep_norm = norm_of(experts + k);
    }
    return call;
}

// Not numbers: what a stage leaves out shows up.
std::vector<float> workspace_of(std::size_t floats) {
    return std::vector<float>(floats, std::numeric_limits<float>::quiet_NaN());
}

void emulate_dkf_forward(const std::vector<Integers>& maps, const std::vector<Integers>& norms,
                         const std::vector<bool>& relu, const std::vector<double>& eps,
                         const std::vector<double>& momentum, const Integers& shape, int dtype, bool training,
                         std::int64_t f, std::int64_t sums, std::int64_t normalisers, std::int64_t statistics,
                         int processors, bool descending) {
    const Fusion call = fusion_of(maps, norms, relu, eps, momentum, shape, dtype);
    std::vector<float> workspace = workspace_of(forward_workspace(call, training, processors));
    HostRun run(descending);
    run_forward(run, call, FusionState{address<void>(sums), address<void>(normalisers)}, training, address<void>(f),
                address<float>(statistics), workspace.data(), processors);
}

void emulate_dkf_statistics(const std::vector<Integers>& maps, const Integers& shape, int dtype,
                            std::int64_t statistics, int processors, bool descending) {
    if (maps.size() > 2 * std::size_t(kMaxExperts)) throw std::runtime_error("at most 16 maps are supported");
    MapList list{};
    list.count = int(maps.size());
    list.shape = shape_of(shape, dtype);
    for (std::size_t i = 0; i < maps.size(); ++i) list.map[i] = map_of(maps[i]);
    std::vector<float> workspace = workspace_of(statistics_workspace(list, processors));
    HostRun run(descending);
    run_statistics(run, list, address<float>(statistics), workspace.data(), processors);
}

void emulate_dkf_vector_gradients(const std::vector<Integers>& maps, const std::vector<Integers>& norms,
                                  const std::vector<bool>& relu, const Integers& shape, int dtype,
                                  std::int64_t incoming, std::int64_t sums, std::int64_t vectors, bool descending) {
    const std::vector<double> unused(norms.size());
    const Fusion call = fusion_of(maps, norms, relu, unused, unused, shape, dtype);
    HostRun run(descending);
    run_vector_gradients(run, call, FusionState{address<void>(sums), nullptr}, address<void>(incoming),
                         address<float>(vectors));
}

// `results`: the gradients, in the order of `maps`.
void emulate_dkf_map_gradients(const std::vector<Integers>& maps, const std::vector<Integers>& norms,
                               const std::vector<bool>& relu, const Integers& shape, int dtype, std::int64_t incoming,
                               std::int64_t normalisers, std::int64_t vectors, double inverse_count,
                               const std::vector<Integers>& results, int processors, bool descending) {
    const std::vector<double> unused(norms.size());
    const Fusion call = fusion_of(maps, norms, relu, unused, unused, shape, dtype);
    FusionGradient gradient{};
    gradient.incoming = address<void>(incoming);
    gradient.vectors = address<void>(vectors);
    gradient.inverse_count = inverse_count;
    const std::size_t experts = relu.size();
    for (std::size_t k = 0; k < experts; ++k) {
        gradient.expert[k].deep = map_of(results.at(k));
        gradient.expert[k].shallow = map_of(results.at(experts + k));
        if (call.folded) gradient.expert[k].shortcut = map_of(results.at(2 * experts + k));
    }
    HostRun run(descending);
    run_map_gradients(run, call, FusionState{nullptr, address<void>(normalisers)}, gradient, processors);
}

// vector, by_channel, lanes, group, rows, groups, splits and samples for the maps of a launch.
std::array<std::int64_t, 8> dkf_plan(const std::vector<Integers>& maps, const Integers& shape, int dtype, int count,
                                     int processors, bool statistics) {
    FusionLayout layout(shape_of(shape, dtype));
    for (const Integers& map : maps) layout.add(map_of(map));
    const FusionPlan plan = plan_fusion(shape_of(shape, dtype), layout, count, processors,
                                        statistics ? kStatisticsSplits : kFusionSplits);
    return {plan.vector, plan.by_channel, plan.lanes, plan.group, plan.rows, plan.groups, plan.splits, plan.samples};
}

}  // namespace
}  // namespace shike

SHIKE_BINDINGS(module) {
    namespace py = pybind11;
    module.def("emulate_dkf_forward", &shike::emulate_dkf_forward, py::arg("maps"), py::arg("norms"), py::arg("relu"),
               py::arg("eps"), py::arg("momentum"), py::arg("shape"), py::arg("dtype"), py::arg("training"),
               py::arg("f"), py::arg("sums"), py::arg("normalisers"), py::arg("statistics"), py::arg("processors"),
               py::arg("descending"),
               "Run the CUDA kernels of the forward on the CPU. Arrays are addresses; a map is [address, strides of b, "
               "c, h, w], a norm [weight, bias, running mean, running variance].");
    module.def("emulate_dkf_statistics", &shike::emulate_dkf_statistics, py::arg("maps"), py::arg("shape"),
               py::arg("dtype"), py::arg("statistics"), py::arg("processors"), py::arg("descending"),
               "Run the CUDA kernels of the statistics on the CPU.");
    module.def("emulate_dkf_vector_gradients", &shike::emulate_dkf_vector_gradients, py::arg("maps"), py::arg("norms"),
               py::arg("relu"), py::arg("shape"), py::arg("dtype"), py::arg("incoming"), py::arg("sums"),
               py::arg("vectors"), py::arg("descending"), "Run the CUDA kernel of the vectors' gradients on the CPU.");
    module.def("emulate_dkf_map_gradients", &shike::emulate_dkf_map_gradients, py::arg("maps"), py::arg("norms"),
               py::arg("relu"), py::arg("shape"), py::arg("dtype"), py::arg("incoming"), py::arg("normalisers"),
               py::arg("vectors"), py::arg("inverse_count"), py::arg("results"), py::arg("processors"),
               py::arg("descending"), "Run the CUDA kernel of the maps' gradients on the CPU.");
    module.def("dkf_plan", &shike::dkf_plan, py::arg("maps"), py::arg("shape"), py::arg("dtype"), py::arg("count"),
               py::arg("processors"), py::arg("statistics"),
               "How the CUDA kernels share out maps: vector, by_channel, lanes, group, rows, groups, splits, samples.");
}
