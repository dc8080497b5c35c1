#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/cuda_check.h"
#include "losses/options.h"
#include "losses/launch.h"
#include "losses/cuda_kernels.h"

namespace shike {
namespace {

std::string shape_text(const Experts& logits) {
    return "K=" + std::to_string(logits.count) + ", B=" + std::to_string(logits.batch) +
           ", C=" + std::to_string(logits.classes);
}

// After each launch.
void check_launch(const char* kernel, const Experts& logits, std::int64_t blocks, int threads) {
    const cudaError_t status = cudaGetLastError();
    if (status == cudaSuccess) return;
    check(status, std::string(kernel) + ": launching " + std::to_string(blocks) + " blocks of " +
                      std::to_string(threads) + " threads for logits [" + shape_text(logits) + "]");
}

void check_call(const char* op, const Experts& logits) {
    const char* reason = nullptr;
    if (logits.count < 1 || logits.count > kMaxExperts) reason = "1 to 8 experts are supported";
    if (logits.batch < 1) reason = "the batch is empty";
    if (logits.classes < 2 || logits.classes >= std::int64_t(kNoClass)) reason = "2 to 2^24 - 1 classes are supported";
    if (logits.dtype == DType::kFloat64) reason = "float64 is not supported on CUDA devices";
    if (reason == nullptr) return;
    throw std::runtime_error(std::string(op) + ": " + reason + ", got logits [" + shape_text(logits) + "]");
}

// The workspace in floats: the rows' terms, then, for rows that several blocks share, a ticket for each row and the
// blocks' partial states.
struct Workspace {
    std::int64_t terms, tickets, partial;

    Workspace(const BlockPlan& plan, std::int64_t rows, int columns, std::size_t state_bytes) {
        terms = rows * columns;
        tickets = plan.splits > 1 ? rows : 0;
        partial = tickets * plan.splits * std::int64_t(state_bytes / sizeof(float));
    }
    std::size_t floats() const { return std::size_t(terms + tickets + partial); }
};

// Zeroes the tickets.
unsigned* tickets_of(const Workspace& workspace, float* memory, cudaStream_t stream) {
    if (workspace.tickets == 0) return nullptr;
    unsigned* tickets = reinterpret_cast<unsigned*>(memory + workspace.terms);
    check(cudaMemsetAsync(tickets, 0, std::size_t(workspace.tickets) * sizeof(unsigned), stream), "cudaMemsetAsync");
    return tickets;
}

template <int K>
struct StreamBytes {
    static constexpr std::size_t value = sizeof(ChunkStream<K>);
};

template <std::size_t... I>
std::size_t stream_bytes(std::index_sequence<I...>, int experts) {
    static constexpr std::size_t table[] = {StreamBytes<int(I) + 1>::value...};
    return table[experts - 1];
}

using ForwardKernel = void (*)(DktArguments, float*, float*, unsigned*);
using BackwardKernel = void (*)(DktArguments, Experts, const float*);

template <std::size_t... I>
ForwardKernel forward_kernel(std::index_sequence<I...>, int experts) {
    static constexpr ForwardKernel table[] = {&dkt_forward_kernel<int(I) + 1>...};
    return table[experts - 1];
}

template <std::size_t... I>
BackwardKernel backward_kernel(std::index_sequence<I...>, int experts) {
    static constexpr BackwardKernel table[] = {&dkt_backward_kernel<int(I) + 1>...};
    return table[experts - 1];
}

using ExpertCounts = std::make_index_sequence<kMaxExperts>;

BlockPlan dkt_plan(int experts, std::int64_t batch, std::int64_t classes, int device, bool reducing) {
    return plan_blocks(chunk_of(experts), batch, classes, processors_of(device), reducing);
}

// Each expert has rows of its own here.
BlockPlan cross_entropy_plan(int experts, std::int64_t batch, std::int64_t classes, int device, bool reducing) {
    return plan_blocks(chunk_of(1), experts * batch, classes, processors_of(device), reducing);
}

Workspace dkt_workspace(int experts, std::int64_t batch, const BlockPlan& plan) {
    return Workspace(plan, batch, 3, stream_bytes(ExpertCounts{}, experts));
}

Workspace cross_entropy_workspace(int experts, std::int64_t batch, const BlockPlan& plan) {
    return Workspace(plan, experts * batch, 1, sizeof(SoftmaxState<float>));
}

DktArguments arguments_of(const DktCall& call, const BlockPlan& plan) {
    return {call, options_of<float>(call), plan};
}

CrossEntropyArguments arguments_of(const CrossEntropyCall& call, const BlockPlan& plan) {
    return {call.logits, call.target, static_cast<const float*>(call.bias), call.bias_stride,
            float(call.label_smoothing), static_cast<float*>(call.saved), plan};
}

}  // namespace

std::size_t cuda_dkt_workspace(int experts, std::int64_t batch, std::int64_t classes, int device) {
    return dkt_workspace(experts, batch, dkt_plan(experts, batch, classes, device, true)).floats();
}

std::size_t cuda_cross_entropy_workspace(int experts, std::int64_t batch, std::int64_t classes, int device) {
    return cross_entropy_workspace(experts, batch, cross_entropy_plan(experts, batch, classes, device, true)).floats();
}

void cuda_dkt_forward(const DktCall& call, float* memory, float* loss, float* terms, const CudaQueue& queue) {
    const Experts& logits = call.logits;
    check_call("dkt_loss", logits);
    const CurrentDevice current(queue.device);
    const auto stream = static_cast<cudaStream_t>(queue.stream);
    const BlockPlan plan = dkt_plan(logits.count, logits.batch, logits.classes, queue.device, true);
    const Workspace workspace = dkt_workspace(logits.count, logits.batch, plan);
    unsigned* tickets = tickets_of(workspace, memory, stream);
    const std::int64_t blocks = plan.blocks(logits.batch);
    forward_kernel(ExpertCounts{}, logits.count)<<<unsigned(blocks), plan.threads(), 0, stream>>>(
        arguments_of(call, plan), memory, memory + workspace.terms + workspace.tickets, tickets);
    check_launch("dkt_loss forward", logits, blocks, plan.threads());
    sum_kernel<<<1, kSumBlock, 0, stream>>>(memory, logits.batch, 3, 1.0 / double(logits.batch), call.hardest_weight,
                                            call.mutual_weight, call.factors, loss, terms);
    check_launch("dkt_loss sum over the batch", logits, 1, kSumBlock);
}

void cuda_dkt_backward(const DktCall& call, const Experts& gradient, const float* grad_output, const CudaQueue& queue) {
    const Experts& logits = call.logits;
    check_call("dkt_loss", logits);
    const CurrentDevice current(queue.device);
    const BlockPlan plan = dkt_plan(logits.count, logits.batch, logits.classes, queue.device, false);
    const std::int64_t blocks = plan.blocks(logits.batch);
    backward_kernel(ExpertCounts{}, logits.count)<<<unsigned(blocks), plan.threads(), 0,
                                                    static_cast<cudaStream_t>(queue.stream)>>>(
        arguments_of(call, plan), gradient, grad_output);
    check_launch("dkt_loss backward", logits, blocks, plan.threads());
}

void cuda_cross_entropy_forward(const CrossEntropyCall& call, float* memory, float* loss, const CudaQueue& queue) {
    const Experts& logits = call.logits;
    check_call("expert_cross_entropy", logits);
    const CurrentDevice current(queue.device);
    const auto stream = static_cast<cudaStream_t>(queue.stream);
    const std::int64_t rows = logits.count * logits.batch;
    const BlockPlan plan = cross_entropy_plan(logits.count, logits.batch, logits.classes, queue.device, true);
    const Workspace workspace = cross_entropy_workspace(logits.count, logits.batch, plan);
    unsigned* tickets = tickets_of(workspace, memory, stream);
    const std::int64_t blocks = plan.blocks(rows);
    cross_entropy_forward_kernel<<<unsigned(blocks), plan.threads(), 0, stream>>>(
        arguments_of(call, plan), memory, memory + workspace.terms + workspace.tickets, tickets);
    check_launch("expert_cross_entropy forward", logits, blocks, plan.threads());
    sum_kernel<<<1, kSumBlock, 0, stream>>>(memory, rows, 1, 1.0 / double(logits.batch), 0, 0, nullptr, loss, nullptr);
    check_launch("expert_cross_entropy sum over the batch", logits, 1, kSumBlock);
}

void cuda_cross_entropy_backward(const CrossEntropyCall& call, const Experts& gradient, const float* grad_output,
                                 const CudaQueue& queue) {
    const Experts& logits = call.logits;
    check_call("expert_cross_entropy", logits);
    const CurrentDevice current(queue.device);
    const std::int64_t rows = logits.count * logits.batch;
    const BlockPlan plan = cross_entropy_plan(logits.count, logits.batch, logits.classes, queue.device, false);
    const std::int64_t blocks = plan.blocks(rows);
    cross_entropy_backward_kernel<<<unsigned(blocks), plan.threads(), 0, static_cast<cudaStream_t>(queue.stream)>>>(
        arguments_of(call, plan), gradient, grad_output);
    check_launch("expert_cross_entropy backward", logits, blocks, plan.threads());
}

}  // namespace shike
