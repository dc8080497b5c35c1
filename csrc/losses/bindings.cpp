// Python bindings of the expert losses.
#include <algorithm>
#include <utility>

#include "build_config.h"
#include "common/arguments.h"
#include "common/module.h"
#include "losses/arguments.h"
#include "losses/launch.h"

namespace shike {
namespace {

int threads_of(Arguments& in) { return int(in["threads"].integer()); }
Experts gradient_of(Arguments& in, const Experts& logits) { return experts_of(in["gradient"], logits); }
float* floats(const Value& value, int dims) { return static_cast<float*>(value.memory(dims)); }

// Smallest and largest of int64 [count], count >= 1: PyTorch needs several operators and transfers for them.
std::pair<std::int64_t, std::int64_t> extremes(const Targets& values, std::int64_t count) {
    std::pair<std::int64_t, std::int64_t> result{values.data[0], values.data[0]};
    for (std::int64_t i = 1; i < count; ++i) {
        result.first = std::min(result.first, values.data[i * values.stride]);
        result.second = std::max(result.second, values.data[i * values.stride]);
    }
    return result;
}

void define_for_the_cpu(pybind11::module_& module) {
    define(module, "extremes", "Smallest and largest of int64 values, count >= 1.", [](Arguments& in) {
        const Targets values = target_of(in["values"]);
        const std::int64_t count = in["count"].integer();
        return [=] { return extremes(values, count); };
    });
    define(module, "cpu_dkt_forward", "Fills loss, terms and saved.", [](Arguments& in) {
        const DktCall call = dkt_call(in, true);
        void* loss = in["loss"].memory(0);
        float* terms = floats(in["terms"], 1);
        const int threads = threads_of(in);
        return [=] { cpu_dkt_forward(call, loss, terms, threads); };
    });
    define(module, "cpu_dkt_backward", "Fills gradient.", [](Arguments& in) {
        const DktCall call = dkt_call(in, true);
        const Experts gradient = gradient_of(in, call.logits);
        const void* grad_output = in["grad_output"].memory(0);
        const int threads = threads_of(in);
        return [=] { cpu_dkt_backward(call, gradient, grad_output, threads); };
    });
    define(module, "cpu_dkt_both", "Fills loss, terms and, for a grad_output of 1, gradient.", [](Arguments& in) {
        const DktCall call = dkt_call(in, false);
        void* loss = in["loss"].memory(0);
        float* terms = floats(in["terms"], 1);
        const Experts gradient = gradient_of(in, call.logits);
        const int threads = threads_of(in);
        return [=] { cpu_dkt_both(call, loss, terms, gradient, threads); };
    });
}

void* rows_of(Arguments& in) { return in["rows"].memory_or_null(3); }

void define_experts_for_the_cpu(pybind11::module_& module) {
    define(module, "cpu_expert_forward", "Fills loss, terms, rows and saved.", [](Arguments& in) {
        const ExpertTuples of(in);
        const ExpertCall call = expert_call(in, of, true);
        const ExpertWeights weights = expert_weights(of, call);
        void* loss = in["loss"].memory(call.of_rows ? 2 : 0);
        float* terms = floats(in["terms"], 1);
        void* rows = rows_of(in);
        const int threads = threads_of(in);
        return [=] { cpu_expert_forward(call, weights, loss, terms, rows, threads); };
    });
    define(module, "cpu_expert_backward", "Fills gradient.", [](Arguments& in) {
        const ExpertCall call = expert_call(in, ExpertTuples(in), true);
        const Experts gradient = gradient_of(in, call.logits);
        const void* grad_output = in["grad_output"].memory(call.of_rows ? 2 : 0);
        const int threads = threads_of(in);
        return [=] { cpu_expert_backward(call, gradient, grad_output, threads); };
    });
    define(module, "cpu_expert_both", "Fills loss, terms, rows and, for a grad_output of 1, gradient.", [](Arguments& in) {
        const ExpertTuples of(in);
        const ExpertCall call = expert_call(in, of, false);
        const ExpertWeights weights = expert_weights(of, call);
        void* loss = in["loss"].memory(0);
        float* terms = floats(in["terms"], 1);
        void* rows = rows_of(in);
        const Experts gradient = gradient_of(in, call.logits);
        const int threads = threads_of(in);
        return [=] { cpu_expert_both(call, weights, loss, terms, rows, gradient, threads); };
    });
}

#if SHIKE_WITH_CUDA

Experts logits_like(int dtype, int experts, std::int64_t batch, std::int64_t classes) {
    Experts logits{};
    logits.count = experts;
    logits.batch = batch;
    logits.classes = classes;
    logits.dtype = DType(dtype);
    return logits;
}

void define_for_cuda(pybind11::module_& module) {
    module.def("cuda_dkt_workspace", [](int dtype, int experts, std::int64_t batch, std::int64_t classes, int device) {
        return cuda_dkt_workspace(logits_like(dtype, experts, batch, classes), device);
    });
    module.def("cuda_dkt_both_workspace", [](int dtype, int experts, std::int64_t batch, std::int64_t classes, int device) {
        return cuda_dkt_both_workspace(logits_like(dtype, experts, batch, classes), device);
    });
    module.def("cuda_expert_workspace", [](int dtype, int experts, std::int64_t batch, std::int64_t classes,
                                           bool divergence, int device) {
        return cuda_expert_workspace(logits_like(dtype, experts, batch, classes), divergence, device);
    });
    define(module, "cuda_expert_forward", "Fills loss, terms, rows and saved.", [](Arguments& in) {
        const ExpertCall call = weighted_expert_call(in);
        float* loss = floats(in["loss"], call.of_rows ? 2 : 0);
        float* terms = floats(in["terms"], 1);
        auto* rows = static_cast<float*>(rows_of(in));
        float* workspace = floats(in["workspace"], 1);
        const CudaQueue queue = queue_of(in);
        return [=] { cuda_expert_forward(call, workspace, loss, terms, rows, queue); };
    });
    define(module, "cuda_expert_backward", "Fills gradient.", [](Arguments& in) {
        const ExpertCall call = expert_call(in, ExpertTuples(in), true);
        const Experts gradient = gradient_of(in, call.logits);
        const float* grad_output = floats(in["grad_output"], call.of_rows ? 2 : 0);
        const CudaQueue queue = queue_of(in);
        return [=] { cuda_expert_backward(call, gradient, grad_output, queue); };
    });
    define(module, "cuda_dkt_forward", "Fills loss, terms and saved.", [](Arguments& in) {
        const DktCall call = dkt_call(in, true);
        float* loss = floats(in["loss"], 0);
        float* terms = floats(in["terms"], 1);
        float* workspace = floats(in["workspace"], 1);
        const CudaQueue queue = queue_of(in);
        return [=] { cuda_dkt_forward(call, workspace, loss, terms, queue); };
    });
    define(module, "cuda_dkt_backward", "Fills gradient.", [](Arguments& in) {
        const DktCall call = dkt_call(in, true);
        const Experts gradient = gradient_of(in, call.logits);
        const float* grad_output = floats(in["grad_output"], 0);
        const auto* kept = static_cast<const float*>(in["kept"].memory_or_null(1));
        auto* expected = static_cast<float*>(in["expected"].memory_or_null(0));
        const CudaQueue queue = queue_of(in);
        return [=] { cuda_dkt_backward(call, gradient, grad_output, kept, expected, queue); };
    });
    define(module, "cuda_dkt_both", "Fills loss, terms, saved, gradient and kept.", [](Arguments& in) {
        const DktCall call = dkt_call(in, true);
        const Experts gradient = gradient_of(in, call.logits);
        const float* expected = floats(in["expected"], 0);
        float* kept = floats(in["kept"], 1);
        float* loss = floats(in["loss"], 0);
        float* terms = floats(in["terms"], 1);
        float* workspace = floats(in["workspace"], 1);
        const CudaQueue queue = queue_of(in);
        return [=] { cuda_dkt_both(call, gradient, expected, kept, workspace, loss, terms, queue); };
    });
}

#else

void define_for_cuda(pybind11::module_&) {}

#endif

}  // namespace
}  // namespace shike

SHIKE_BINDINGS(module) {
    shike::define_for_the_cpu(module);
    shike::define_experts_for_the_cpu(module);
    shike::define_for_cuda(module);
}
