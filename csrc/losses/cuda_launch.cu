// The launches of dkt_loss.
#include "losses/cuda_dkt.h"
#include "losses/cuda_launch.h"
#include "losses/launch.h"
#include "losses/options.h"

namespace shike {
namespace {

SharedMemory shared_memory_of(int device) {
    return {attribute_of<cudaDevAttrMaxSharedMemoryPerMultiprocessor>(device),
            attribute_of<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device)};
}

BlockPlan dkt_plan(const Experts& logits, int device, bool reducing) {
    const int chunk = chunk_of(logits.count, four_bytes(logits.dtype));
    return plan_blocks(chunk, logits.batch, logits.classes, processors_of(device), reducing);
}

Workspace dkt_workspace(const Experts& logits, const BlockPlan& plan) {
    return Workspace(logits.batch * plan.splits * bytes_of_row(logits.count), 3, logits.batch);
}

ResidentPlan resident_plan(const Experts& logits, int device) {
    const int chunk = chunk_of(logits.count, four_bytes(logits.dtype));
    if (logits.count > kMostResident) return {dkt_plan(logits, device, true), 0};
    return plan_resident(chunk, logits.count * bytes_of(logits.dtype), logits.batch, logits.classes,
                         processors_of(device), fixed_shared_bytes(logits.count), shared_memory_of(device));
}

Workspace both_workspace(std::int64_t batch) { return Workspace(3 * batch * 4, 3, batch); }

DktArguments arguments_of(const DktCall& call, const BlockPlan& plan) { return {call, options_of<float>(call), plan}; }

template <int K>
void end_dkt(const DktCall& call, const BlockPlan& plan, const Workspace& workspace, float* memory, float* kept,
             float* loss, float* terms, cudaStream_t stream) {
    const std::int64_t blocks = Workspace::blocks_of_end(call.logits.batch);
    const auto* rows = kept == nullptr ? reinterpret_cast<const DktRow<K>*>(memory) : nullptr;
    dkt_end_kernel<K><<<unsigned(blocks), kWarp, 0, stream>>>(arguments_of(call, plan), rows, memory, kept,
                                                              workspace.sums_in(memory), workspace.ticket_in(memory),
                                                              loss, terms);
    check_launch("dkt_loss, ends of rows", call.logits, blocks, kWarp);
}

}  // namespace

std::size_t cuda_dkt_workspace(const Experts& logits, int device) {
    return dkt_workspace(logits, dkt_plan(logits, device, true)).floats();
}

std::size_t cuda_dkt_both_workspace(const Experts& logits, int device) {
    return resident_plan(logits, device).bytes > 0 ? both_workspace(logits.batch).floats() : 0;
}

void cuda_dkt_forward(const DktCall& call, float* memory, float* loss, float* terms, const CudaQueue& queue) {
    const Experts& logits = call.logits;
    check_call("dkt_loss", logits);
    const CurrentDevice current(queue.device);
    const auto stream = static_cast<cudaStream_t>(queue.stream);
    const BlockPlan plan = dkt_plan(logits, queue.device, true);
    const Workspace workspace = dkt_workspace(logits, plan);
    const std::int64_t blocks = plan.blocks(logits.batch);
    with_count(logits.count, [&](auto experts) {
        with_flag(four_bytes(logits.dtype), [&](auto wide) {
            constexpr int K = decltype(experts)::value;
            dkt_forward_kernel<K, decltype(wide)::value><<<unsigned(blocks), plan.threads(), 0, stream>>>(
                arguments_of(call, plan), reinterpret_cast<DktRow<K>*>(memory), workspace.ticket_in(memory));
        });
        check_launch("dkt_loss forward", logits, blocks, plan.threads());
        end_dkt<decltype(experts)::value>(call, plan, workspace, memory, nullptr, loss, terms, stream);
    });
}

void cuda_dkt_backward(const DktCall& call, const Experts& gradient, const float* grad_output, const float* kept,
                       float* expected, const CudaQueue& queue) {
    const Experts& logits = call.logits;
    check_call("dkt_loss", logits);
    const CurrentDevice current(queue.device);
    const BlockPlan plan = dkt_plan(logits, queue.device, kept != nullptr);  // nearly no work is left of a kept one
    const std::int64_t blocks = plan.blocks(logits.batch);
    const auto stream = static_cast<cudaStream_t>(queue.stream);
    with_count(logits.count, [&](auto experts) {
        with_flag(four_bytes(logits.dtype), [&](auto wide) {
            dkt_backward_kernel<decltype(experts)::value, decltype(wide)::value>
                <<<unsigned(blocks), plan.threads(), 0, stream>>>(arguments_of(call, plan), gradient, grad_output, kept,
                                                                  expected);
        });
    });
    check_launch("dkt_loss backward", logits, blocks, plan.threads());
}

void cuda_dkt_both(const DktCall& call, const Experts& gradient, const float* expected, float* kept, float* memory,
                   float* loss, float* terms, const CudaQueue& queue) {
    const Experts& logits = call.logits;
    check_call("dkt_loss", logits);
    const CurrentDevice current(queue.device);
    const auto stream = static_cast<cudaStream_t>(queue.stream);
    const ResidentPlan plan = resident_plan(logits, queue.device);
    if (plan.bytes == 0) throw std::runtime_error("dkt_loss: the rows cannot be kept in shared memory");
    const Workspace workspace = both_workspace(logits.batch);
    const std::int64_t blocks = plan.blocks.blocks(logits.batch);
    with_count<kMostResident>(logits.count, [&](auto experts) {
        constexpr int K = decltype(experts)::value;
        with_flag(four_bytes(logits.dtype), [&](auto wide) {
            constexpr bool kFloat = decltype(wide)::value;
            using R = Rows<K, kFloat>;
            const auto kernel = &dkt_both_kernel<K, kFloat>;
            check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, plan.bytes),
                  "cudaFuncSetAttribute(" + std::to_string(plan.bytes) + " bytes of shared memory)");
            kernel<<<unsigned(blocks), plan.blocks.threads(), std::size_t(plan.bytes), stream>>>(
                arguments_of(call, plan.blocks), gradient, expected, kept, memory, workspace.ticket_in(memory),
                plan.blocks.threads() * int(R::kPacket), K * plan.blocks.rows * R::kBytes);
        });
        check_launch("dkt_loss forward and backward", logits, blocks, plan.blocks.threads());
        end_dkt<K>(call, plan.blocks, workspace, memory, kept, loss, terms, stream);
    });
}

}  // namespace shike
