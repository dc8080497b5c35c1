// The launches of the generalised expert loss.
#include "losses/cuda_expert_end.h"
#include "losses/cuda_launch.h"
#include "losses/launch.h"

namespace shike {
namespace {

// How many experts a group of threads serves: all of them, where a divergence or a bias connects them.
int experts_together(const ExpertCall& call) {
    const int experts = call.logits.count;
    if (call.teacher == Teacher::kOthers || call.teacher == Teacher::kMean) return experts;
    const bool each_its_own = call.teacher != Teacher::kNone || call.target.expert_stride != 0 ||
                              call.target_b.expert_stride != 0;
    for (int together = each_its_own ? 1 : kMostTemplates; together > 1; --together) {
        if (experts % together == 0) return together;
    }
    return 1;
}

BlockPlan expert_plan(const Experts& logits, int together, int device, bool reducing) {
    const std::int64_t rows = logits.count / together * logits.batch;
    return plan_blocks(kExpertChunk, rows, logits.classes, processors_of(device), reducing);
}

// With the last expert in the places of those that a kernel has beyond them.
Experts padded(Experts experts) {
    for (int k = experts.count; k < kMaxExperts; ++k) experts.expert[k] = experts.expert[experts.count - 1];
    return experts;
}

ExpertArguments arguments_of(const ExpertCall& call, int together, const BlockPlan& plan) {
    ExpertArguments arguments(call, plan);
    arguments.logits = padded(call.logits);
    if (together == 1 && call.teacher == Teacher::kOthers) arguments.teacher = Teacher::kMean;  // none, either way
    arguments.together = together;
    arguments.share = float(1.0 / call.logits.count);
    arguments.scale_of_all = float(call.scale_number);
    arguments.inverse_temperature = float(1 / call.temperature_number);
    arguments.smoothing = float(call.label_smoothing);
    arguments.masked_logit = call.masked == Masked::kZero ? 0.f : kAbsent;
    const bool adjusts = call.bias.data != nullptr || call.scale.data != nullptr || call.scale_number != 1;
    arguments.separate = call.teacher != Teacher::kNone && call.cross_entropy &&
                         ((!call.adjusted && adjusts) || call.temperature.data != nullptr ||
                          call.temperature_number != 1 || call.label_smoothing != 0);
    arguments.asks = (call.rows || call.gated) && call.target.data != nullptr;
    return arguments;
}

// Calls run(count, wide, divergence), constants: experts that the kernel serves, whether logits are float32, and
// whether there is a divergence.
template <class Run>
void with_kernel(const ExpertCall& call, int together, const Run& run) {
    const auto with_dtype = [&](auto count, auto divergence) {
        with_flag(four_bytes(call.logits.dtype), [&](auto wide) { run(count, wide, divergence); });
    };
    if (call.teacher == Teacher::kNone) {
        with_count<kMostTemplates>(together, [&](auto count) { with_dtype(count, std::false_type{}); });
    } else if (together > kMostTemplates) {
        with_dtype(std::integral_constant<int, kMaxExperts>{}, std::true_type{});
    } else {
        with_count<kMostTemplates>(together, [&](auto count) { with_dtype(count, std::true_type{}); });
    }
}

void check_expert_call(const ExpertCall& call) {
    check_call("expert_loss", call.logits);
    const char* reason = nullptr;
    if (call.logits.count * call.logits.batch >= std::int64_t(1) << 31) reason = "2^31 - 1 rows are supported";
    if (call.eps != 0) reason = "eps is not supported on CUDA devices";
    if (call.masked == Masked::kPartial) reason = "a mask of the divergence alone is not supported on CUDA devices";
    if (call.masked != Masked::kNot && call.label_smoothing != 0) reason = "smoothing with a mask is not supported";
    if (call.gated && (call.by_student || !call.adjusted)) {
        reason = "a gate by the teacher's answer needs weights by teacher and its row logits";
    }
    if (reason != nullptr) throw std::runtime_error(std::string("expert_loss: ") + reason);
}

// The parts come first, then the divergence's, the sums and the ticket, and a number that nobody reads.
struct ExpertMemory {
    std::int64_t parts;
    Workspace workspace;

    ExpertMemory(const Experts& logits, int splits, bool divergence)
        : parts(logits.count * logits.batch * splits),
          workspace(parts * std::int64_t(sizeof(ExpertPart) + (divergence ? sizeof(DivergencePart) : 0)), 2,
                    logits.batch, kSamplesOfEnd) {}
    std::size_t floats() const { return workspace.floats() + 1; }
    ExpertPart* parts_in(float* memory) const { return reinterpret_cast<ExpertPart*>(memory); }
    DivergencePart* divergences_in(float* memory) const {
        return reinterpret_cast<DivergencePart*>(parts_in(memory) + parts);
    }
    float* spare_in(float* memory) const { return memory + workspace.floats(); }
};

}  // namespace

std::size_t cuda_expert_workspace(const Experts& logits, bool divergence, int device) {
    // A row has the most blocks where a group serves all experts.
    const BlockPlan plan = expert_plan(logits, logits.count, device, true);
    return ExpertMemory(logits, plan.splits, divergence).floats();
}

void cuda_expert_forward(const ExpertCall& call, float* memory, float* loss, float* terms, float* rows,
                         const CudaQueue& queue) {
    const Experts& logits = call.logits;
    check_expert_call(call);
    const CurrentDevice current(queue.device);
    const auto stream = static_cast<cudaStream_t>(queue.stream);
    const int together = experts_together(call);
    const BlockPlan plan = expert_plan(logits, together, queue.device, true);
    const ExpertMemory memory_of(logits, plan.splits, call.teacher != Teacher::kNone);
    const ExpertArguments arguments = arguments_of(call, together, plan);
    ExpertPart* parts = memory_of.parts_in(memory);
    DivergencePart* divergences = memory_of.divergences_in(memory);
    unsigned* ticket = memory_of.workspace.ticket_in(memory);
    const std::int64_t blocks = plan.blocks(logits.count / together * logits.batch);
    with_kernel(call, together, [&](auto count, auto wide, auto divergence) {
        expert_forward_kernel<decltype(count)::value, decltype(wide)::value, decltype(divergence)::value>
            <<<unsigned(blocks), plan.threads(), 0, stream>>>(arguments, parts, divergences, ticket);
    });
    check_launch("expert_loss forward", logits, blocks, plan.threads());
    const ExpertResults results{call.of_rows ? memory_of.spare_in(memory) : loss, call.of_rows ? loss : nullptr, terms,
                                rows};
    const std::int64_t blocks_of_end = Workspace::blocks_of_end(logits.batch, kSamplesOfEnd);
    expert_end_kernel<<<unsigned(blocks_of_end), kWarp, 0, stream>>>(
        arguments, parts, divergences, memory_of.workspace.sums_in(memory), ticket, results);
    check_launch("expert_loss, ends of rows", logits, blocks_of_end, kWarp);
}

void cuda_expert_backward(const ExpertCall& call, const Experts& gradient, const float* grad_output,
                          const CudaQueue& queue) {
    const Experts& logits = call.logits;
    check_expert_call(call);
    const CurrentDevice current(queue.device);
    const auto stream = static_cast<cudaStream_t>(queue.stream);
    const int together = experts_together(call);
    const BlockPlan plan = expert_plan(logits, together, queue.device, false);
    const ExpertArguments arguments = arguments_of(call, together, plan);
    const std::int64_t blocks = plan.blocks(logits.count / together * logits.batch);
    with_kernel(call, together, [&](auto count, auto wide, auto divergence) {
        expert_backward_kernel<decltype(count)::value, decltype(wide)::value, decltype(divergence)::value>
            <<<unsigned(blocks), plan.threads(), 0, stream>>>(arguments, padded(gradient), grad_output);
    });
    check_launch("expert_loss backward", logits, blocks, plan.threads());
}

}  // namespace shike
