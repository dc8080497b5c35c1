#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/cuda_check.h"
#include "fusion/launch.h"
#include "fusion/cuda_kernels.h"

namespace shike {
namespace {

// Launches the kernels on a stream.
class DeviceRun {
public:
    DeviceRun(const char* op, const CudaQueue& queue)
        : op_(op), current_(queue.device), stream_(static_cast<cudaStream_t>(queue.stream)) {}

    void statistics(const StatisticsArguments& call) {
        with_elements(call.maps.shape.dtype, call.plan.vector, [&](auto type, auto vector) {
            launch("statistics", dkf_statistics_kernel<type(), vector()>, call, call.maps.shape, call.plan,
                   call.maps.count);
        });
    }

    void merge(const MergeArguments& call, int count) {
        launch("merging of statistics", dkf_merge_kernel, call, call.shape, quotient_up(call.shape.channels, kWarp),
               count, kWarp * kMergeRows);
    }

    void pooling(const PoolingArguments& call) {
        const Fusion& fusion = call.call;
        with_elements(fusion.shape.dtype, call.plan.vector, [&](auto type, auto vector) {
            launch("forward",
                   fusion.folded ? dkf_pooling_kernel<type(), vector(), true>
                                 : dkf_pooling_kernel<type(), vector(), false>,
                   call, fusion.shape, call.plan, fusion.count);
        });
    }

    void vectors(const VectorArguments& call) {
        with_elements(call.shape.dtype, 1, [&](auto type, auto) {
            launch("vector gradients", dkf_vector_kernel<type()>, call, call.shape,
                   quotient_up(call.shape.channels, kWarp), call.experts, kWarp * kVectorRows);
        });
    }

    void gradients(const GradientArguments& call) {
        const Fusion& fusion = call.call;
        with_elements(fusion.shape.dtype, call.plan.vector, [&](auto type, auto vector) {
            launch("map gradients",
                   fusion.folded ? dkf_gradient_kernel<type(), vector(), true>
                                 : dkf_gradient_kernel<type(), vector(), false>,
                   call, fusion.shape, call.plan, fusion.count);
        });
    }

private:
    template <class Arguments>
    void launch(const char* stage, void (*kernel)(Arguments), const Arguments& call, const MapShape& shape,
                const FusionPlan& plan, int count) {
        launch(stage, kernel, call, shape, plan.blocks(), count, plan.threads());
    }

    template <class Arguments>
    void launch(const char* stage, void (*kernel)(Arguments), const Arguments& call, const MapShape& shape,
                std::int64_t blocks, int count, int threads) {
        static_assert(sizeof(Arguments) <= 4096, "more parameters need a newer device than we ask for");
        const auto what = [&] {
            return std::string(op_) + " " + stage + ": launching " + std::to_string(blocks) + " x " +
                   std::to_string(count) + " blocks of " + std::to_string(threads) + " threads for maps " +
                   shape_text(shape);
        };
        if (blocks >= std::int64_t(1) << 31) throw std::runtime_error(what() + ": too many blocks");
        kernel<<<dim3(unsigned(blocks), unsigned(count)), threads, 0, stream_>>>(call);
        const cudaError_t status = cudaGetLastError();
        if (status != cudaSuccess) check(status, what());
    }

    const char* op_;
    CurrentDevice current_;
    cudaStream_t stream_;
};

const char* name_of(const Fusion& call) { return call.normalised ? "dkf_bn_pool" : "dkf_pool"; }

}  // namespace

std::size_t cuda_dkf_workspace(const Fusion& call, bool training, int device) {
    return forward_workspace(call, training, processors_of(device));
}

std::size_t cuda_dkf_statistics_workspace(const MapList& maps, int device) {
    return statistics_workspace(maps, processors_of(device));
}

void cuda_dkf_forward(const Fusion& call, const FusionSaved& saved, bool training, void* f, float* statistics,
                      float* workspace, const CudaQueue& queue) {
    DeviceRun run(name_of(call), queue);
    check_maps("dkf_pool", call.shape, call.count, kMaxExperts);
    const int processors = processors_of(queue.device);
    PoolingArguments pooling{};
    if (needs_statistics(call, training)) {
        const StatisticsArguments parts =
            statistics_arguments(call, static_cast<float*>(saved.sums), workspace, processors);
        run.statistics(parts);
        MergeArguments merge = merge_arguments(parts, static_cast<float*>(saved.mean_rstd));
        merge.statistics = statistics;
        for (int k = 0; k < call.count; ++k) {
            merge.norm[k] = merged_norm(call.expert[k].norm);
            if (call.folded) merge.norm[call.count + k] = merged_norm(call.expert[k].deep_norm);
        }
        run.merge(merge, parts.maps.count);
        pooling.products = parts.products;
        pooling.references = parts.references;
    }
    pooling.call = call;
    pooling.saved = saved;
    pooling.f = f;
    pooling.plan = pooling_plan(call, pooling.products, processors);
    run.pooling(pooling);
}

void cuda_dkf_statistics(const MapList& maps, float* statistics, float* workspace, const CudaQueue& queue) {
    DeviceRun run("dkf_statistics", queue);
    check_maps("dkf_statistics", maps.shape, maps.count, 2 * kMaxExperts);
    const StatisticsArguments parts = statistics_arguments(maps, workspace, processors_of(queue.device));
    run.statistics(parts);
    run.merge(merge_arguments(parts, statistics), maps.count);
}

void cuda_dkf_vector_gradients(const Fusion& call, const FusionSaved& saved, const void* grad_output, float* vectors,
                               const CudaQueue& queue) {
    DeviceRun run(name_of(call), queue);
    check_maps("dkf_pool", call.shape, call.count, kMaxExperts);
    if (!call.normalised) return;
    run.vectors(VectorArguments{call.shape, call.count, call.sums(), static_cast<const float*>(saved.sums), grad_output,
                                vectors});
}

void cuda_dkf_map_gradients(const Fusion& call, const FusionSaved& saved, const FusionGradient& gradient,
                            const CudaQueue& queue) {
    DeviceRun run(name_of(call), queue);
    check_maps("dkf_pool", call.shape, call.count, kMaxExperts);
    run.gradients(GradientArguments{call, static_cast<const float*>(saved.mean_rstd), gradient,
                                    gradient_plan(call, gradient, processors_of(queue.device))});
}

}  // namespace shike
