// The CUDA forward of the expert loss on the CPU, for tests: the same split of a row over threads and blocks and the
// same order of reduction (cuda_plan.h, cuda_chunks.h), so that both can be checked where there is no device.

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/arguments.h"
#include "common/module.h"
#include "losses/arguments.h"
#include "losses/cuda_chunks.h"
#include "losses/options.h"
#include "losses/row_gradient.h"

namespace shike {
namespace {

struct RowCall {
    const float* logits;  // [K, B, C]
    std::int64_t batch, classes;
    int shift;
    DktOptions<float> options;
    BlockPlan plan;
};

// The chunk that starts at class c; what is left out is absent.
template <int K>
void load_chunk(const RowCall& call, std::int64_t b, std::int64_t target, int c, float (&z)[chunk_of(K)][K]) {
    for (int i = 0; i < chunk_of(K); ++i) {
        const bool present = c + i >= 0 && c + i < call.classes && c + i != target;
        for (int k = 0; k < K; ++k) {
            z[i][k] = present ? call.logits[(k * call.batch + b) * call.classes + c + i] : kAbsent;
        }
    }
}

// A butterfly, as between the lanes of a warp.
template <int K>
ChunkStream<K> merged(std::vector<ChunkStream<K>> lanes, int participants) {
    ChunkStream<K> empty;
    empty.clear();
    lanes.resize(std::size_t(participants), empty);
    float next[K];
    for (int k = 0; k < K; ++k) {
        next[k] = kFloor;
        for (const auto& lane : lanes) next[k] = larger(next[k], lane.students.pivot[k]);
    }
    for (auto& lane : lanes) lane.students.move_pivots(next, true);
    for (int mask = participants / 2; mask > 0; mask /= 2) {
        const std::vector<ChunkStream<K>> before = lanes;
        for (int lane = 0; lane < participants; ++lane) {
            lanes[std::size_t(lane)].merge(before[std::size_t(lane ^ mask)]);
        }
    }
    return lanes.front();
}

template <int K>
ChunkStream<K> stream_of_block(const RowCall& call, std::int64_t b, std::int64_t target, int split) {
    std::vector<ChunkStream<K>> warps;
    const int lanes = call.plan.participants(0);
    for (int warp = 0; warp < call.plan.group / lanes; ++warp) {
        std::vector<ChunkStream<K>> threads(static_cast<std::size_t>(lanes));
        for (int lane = 0; lane < lanes; ++lane) {
            auto& thread = threads[std::size_t(lane)];
            thread.clear();
            int c = call.plan.first_class(warp * lanes + lane, split, call.shift);
            for (; c < call.classes; c += call.plan.stride()) {
                float z[chunk_of(K)][K];
                load_chunk(call, b, target, c, z);
                thread.add(z, float(c));
            }
        }
        warps.push_back(merged(std::move(threads), lanes));
    }
    return merged(std::move(warps), call.plan.participants(1));
}

template <int K>
DktTerms<float> emulated_dkt_row_terms(const RowCall& call, std::int64_t b, std::int64_t target,
                                       DktSaved<float, K>& saved) {
    std::vector<ChunkStream<K>> blocks;
    for (int split = 0; split < call.plan.splits; ++split) {
        blocks.push_back(stream_of_block<K>(call, b, target, split));
    }
    const ChunkStream<K> row = merged(std::move(blocks), call.plan.participants(2));
    float held[chunk_of(K)][K], at_target[K], at_hardest[K] = {};
    load_chunk(call, b, target, int(row.chunk), held);
    const DktState<float, K> state = row.state(held);
    const auto hardest = std::int64_t(state.hardest.number);
    for (int k = 0; k < K; ++k) {
        const float* logits = call.logits + (k * call.batch + b) * call.classes;
        at_target[k] = logits[target];
        if (hardest >= 0 && hardest < call.classes) at_hardest[k] = logits[hardest];
    }
    return finish(state, at_target, at_hardest, call.options, saved);
}

template <int K>
void emulate_rows(const RowCall& call, const std::int64_t* target, float* saved_rows, float* terms) {
    for (std::int64_t b = 0; b < call.batch; ++b) {
        auto& saved = reinterpret_cast<DktSaved<float, K>*>(saved_rows)[b];
        const DktTerms<float> row = emulated_dkt_row_terms<K>(call, b, target[b], saved);
        terms[3 * b] = row.cross_entropy;
        terms[3 * b + 1] = row.hardest;
        terms[3 * b + 2] = row.mutual;
    }
}

template <std::size_t... I>
auto emulation_for(std::index_sequence<I...>, int experts) {
    static constexpr decltype(&emulate_rows<1>) table[] = {&emulate_rows<int(I) + 1>...};
    return table[experts - 1];
}

void check_experts(int experts) {
    if (experts < 1 || experts > kMaxExperts) throw std::invalid_argument("1 to 8 experts are supported");
}

void emulate_dkt_forward(const DktCall& call, int group, int splits, int shift, float* terms) {
    const Experts& logits = call.logits;
    const RowCall rows{static_cast<const float*>(logits.expert[0].data),  logits.batch, logits.classes, shift,
                       options_of<float>(call), {chunk_of(logits.count), group, 1, splits}};
    emulation_for(std::make_index_sequence<kMaxExperts>{}, logits.count)(rows, call.target.data,
                                                                         static_cast<float*>(call.saved), terms);
}

// For each class the threads of the row that visit it, and those that BlockPlan::serves names.
auto classes_of_threads(int experts, int classes, int shift, int group, int splits) {
    check_experts(experts);
    const BlockPlan plan{chunk_of(experts), group, 1, splits};
    std::vector<std::vector<int>> visited(static_cast<std::size_t>(classes)), served = visited;
    for (int split = 0; split < splits; ++split) {
        for (int thread = 0; thread < group; ++thread) {
            for (int c = plan.first_class(thread, split, shift); c < classes; c += plan.stride()) {
                for (int i = c < 0 ? -c : 0; i < plan.chunk && c + i < classes; ++i) {
                    visited[std::size_t(c + i)].push_back(split * group + thread);
                }
            }
            for (int c = 0; c < classes; ++c) {
                if (plan.serves(c, thread, split, shift)) served[std::size_t(c)].push_back(split * group + thread);
            }
        }
    }
    return std::make_pair(visited, served);
}

std::array<int, 3> block_plan(int experts, std::int64_t rows, std::int64_t classes, int processors, bool reducing) {
    check_experts(experts);
    const BlockPlan plan = plan_blocks(chunk_of(experts), rows, classes, processors, reducing);
    return {plan.group, plan.rows, plan.splits};
}

}  // namespace
}  // namespace shike

SHIKE_BINDINGS(module) {
    namespace py = pybind11;
    const auto* what = "Run the CUDA kernel's split and reduction of each row on the CPU: contiguous float32 logits to "
                       "saved [B, 5 K + 4] and the unweighted terms [B, 3].";
    shike::define(module, "emulate_dkt_forward", what, [](shike::Arguments& in) {
        const shike::DktCall call = shike::dkt_call(in);
        const int group = int(in["group"].integer()), splits = int(in["splits"].integer());
        const int shift = int(in["shift"].integer());
        auto* terms = static_cast<float*>(in["terms"].memory(2));
        return [=] { shike::emulate_dkt_forward(call, group, splits, shift, terms); };
    });
    module.def("classes_of_threads", &shike::classes_of_threads, py::arg("experts"), py::arg("classes"),
               py::arg("shift"), py::arg("group"), py::arg("splits"),
               "The threads that visit each class of a row in the CUDA kernels, and those that serve it.");
    module.def("block_plan", &shike::block_plan, py::arg("experts"), py::arg("rows"), py::arg("classes"),
               py::arg("processors"), py::arg("reducing"),
               "Threads of a group, rows of a block and blocks of a row that the CUDA kernels use.");
}
