// Python bindings of depth-wise knowledge fusion.
#include "build_config.h"
#include "common/arguments.h"
#include "common/module.h"
#include "fusion/arguments.h"
#include "fusion/launch.h"

namespace shike {
namespace {

int threads_of(Arguments& in) { return int(in["threads"].integer()); }

void define_for_the_cpu(pybind11::module_& module) {
    define(module, "cpu_dkf_forward", "Fills f, sums and, in training, mean_rstd and statistics.", [](Arguments& in) {
        const Fusion call = forward_of(in);
        const ForwardResults results = results_of(in);
        const int threads = threads_of(in);
        return [=] {
            cpu_dkf_forward(call, results.saved, results.training, results.f, results.statistics, threads);
        };
    });
    define(module, "cpu_dkf_statistics", "Fills statistics.", [](Arguments& in) {
        const MapList maps = map_list(in);
        void* statistics = in["statistics"].memory(3);
        const int threads = threads_of(in);
        return [=] { cpu_dkf_statistics(maps, statistics, threads); };
    });
    define(module, "cpu_dkf_vector_gradients", "Fills vectors.", [](Arguments& in) {
        const Fusion call = fusion_of(in);
        const void* grad_output = in["grad_output"].memory(3);
        const FusionSaved saved{in["sums"].memory(4), nullptr};
        void* vectors = in["vectors"].memory(3);
        const int threads = threads_of(in);
        return [=] { cpu_dkf_vector_gradients(call, saved, grad_output, vectors, threads); };
    });
    define(module, "cpu_dkf_map_gradients", "Fills the gradients of the maps.", [](Arguments& in) {
        const Fusion call = fusion_of(in);
        const FusionSaved saved{nullptr, in["mean_rstd"].memory(3)};
        const FusionGradient gradient = gradient_of(in, call);
        const int threads = threads_of(in);
        return [=] { cpu_dkf_map_gradients(call, saved, gradient, threads); };
    });
}

#if SHIKE_WITH_CUDA

float* floats(const Value& value, int dims) { return static_cast<float*>(value.memory(dims)); }

void define_for_cuda(pybind11::module_& module) {
    define(module, "cuda_dkf_workspace", "Floats of workspace that a forward needs.", [](Arguments& in) {
        const Fusion call = fusion_of(in);
        const bool training = in["training"].flag();
        const int device = int(in["device"].integer());
        return [=] { return cuda_dkf_workspace(call, training, device); };
    });
    define(module, "cuda_dkf_statistics_workspace", "Floats of workspace that statistics need.", [](Arguments& in) {
        const MapList maps = map_list(in);
        const int device = int(in["device"].integer());
        return [=] { return cuda_dkf_statistics_workspace(maps, device); };
    });
    define(module, "cuda_dkf_forward", "Fills f, sums and, in training, mean_rstd and statistics.", [](Arguments& in) {
        const Fusion call = forward_of(in);
        const ForwardResults results = results_of(in);
        float* workspace = floats(in["workspace"], 1);
        const CudaQueue queue = queue_of(in);
        return [=] {
            cuda_dkf_forward(call, results.saved, results.training, results.f, static_cast<float*>(results.statistics),
                             workspace, queue);
        };
    });
    define(module, "cuda_dkf_statistics", "Fills statistics.", [](Arguments& in) {
        const MapList maps = map_list(in);
        float* statistics = floats(in["statistics"], 3);
        float* workspace = floats(in["workspace"], 1);
        const CudaQueue queue = queue_of(in);
        return [=] { cuda_dkf_statistics(maps, statistics, workspace, queue); };
    });
    define(module, "cuda_dkf_vector_gradients", "Fills vectors.", [](Arguments& in) {
        const Fusion call = fusion_of(in);
        const void* grad_output = in["grad_output"].memory(3);
        const FusionSaved saved{in["sums"].memory(4), nullptr};
        float* vectors = floats(in["vectors"], 3);
        const CudaQueue queue = queue_of(in);
        return [=] { cuda_dkf_vector_gradients(call, saved, grad_output, vectors, queue); };
    });
    define(module, "cuda_dkf_map_gradients", "Fills the gradients of the maps.", [](Arguments& in) {
        const Fusion call = fusion_of(in);
        const FusionSaved saved{nullptr, in["mean_rstd"].memory(3)};
        const FusionGradient gradient = gradient_of(in, call);
        const CudaQueue queue = queue_of(in);
        return [=] { cuda_dkf_map_gradients(call, saved, gradient, queue); };
    });
}

#else

void define_for_cuda(pybind11::module_&) {}

#endif

}  // namespace
}  // namespace shike

SHIKE_BINDINGS(module) {
    shike::define_for_the_cpu(module);
    shike::define_for_cuda(module);
}
