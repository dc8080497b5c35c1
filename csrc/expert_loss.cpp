// Python bindings of the expert losses, the choice of the CPU's instruction set, and the threads of the CPU kernels.
#include "expert_loss.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_config.h"
#include "expert_loss_cpu.h"
#include "expert_loss_cuda.h"
#include "module.h"

namespace py = pybind11;

namespace shike {
namespace {

// The instruction sets that were compiled and that this processor has, best first.
std::vector<const CpuKernels*> usable_kernels() {
    std::vector<const CpuKernels*> usable;
#if defined(__x86_64__)
    if (avx512_kernels() != nullptr && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        usable.push_back(avx512_kernels());
    }
    if (avx2_kernels() != nullptr && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
        usable.push_back(avx2_kernels());
    }
#endif
    usable.push_back(generic_kernels());
    return usable;
}

const CpuKernels*& chosen_kernels() {
    static const CpuKernels* chosen = usable_kernels().front();
    return chosen;
}

std::vector<std::string> cpu_levels() {
    std::vector<std::string> names;
    for (const CpuKernels* kernels : usable_kernels()) names.emplace_back(kernels->name);
    return names;
}

void set_cpu_level(const std::string& name) {
    for (const CpuKernels* kernels : usable_kernels()) {
        if (kernels->name == name) {
            chosen_kernels() = kernels;
            return;
        }
    }
    std::string known;
    for (const std::string& level : cpu_levels()) known += (known.empty() ? "" : ", ") + level;
    throw std::invalid_argument("set_cpu_level: expected one of " + known + ", got " + name);
}

// matrices: for every expert the address of its first element, the row stride and the class stride.
Experts experts_of(int dtype, const std::vector<std::int64_t>& matrices, std::int64_t batch, std::int64_t classes) {
    Experts experts{};
    experts.count = int(matrices.size() / 3);
    if (matrices.size() % 3 != 0 || experts.count < 1 || experts.count > kMaxExperts) {
        throw std::invalid_argument("expert loss: expected (address, row stride, class stride) for 1 to " +
                                    std::to_string(kMaxExperts) + " experts, got " + std::to_string(matrices.size()) +
                                    " numbers");
    }
    for (int k = 0; k < experts.count; ++k) {
        experts.expert[k] = {reinterpret_cast<void*>(matrices[3 * k]), matrices[3 * k + 1], matrices[3 * k + 2]};
    }
    experts.batch = batch;
    experts.classes = classes;
    experts.dtype = DType(dtype);
    return experts;
}

// The arguments that a forward and its backward share, as Python passes them: (dtype, matrices, batch, classes,
// address and stride of the target, address of the state), then the options of the loss.
using Common = std::tuple<int, std::vector<std::int64_t>, std::int64_t, std::int64_t, std::intptr_t, std::int64_t,
                          std::intptr_t>;
using DktWeights = std::tuple<double, double, double, double, bool>;

DktCall dkt_call(const Common& common, const DktWeights& weights) {
    const auto& [dtype, matrices, batch, classes, target, target_stride, state] = common;
    const auto& [hardest, mutual, teacher_target_logit, student_target_logit, detach_teacher] = weights;
    DktCall call{};
    call.logits = experts_of(dtype, matrices, batch, classes);
    call.target = {reinterpret_cast<const std::int64_t*>(target), target_stride};
    call.hardest_weight = hardest;
    call.mutual_weight = mutual;
    call.teacher_target_logit = teacher_target_logit;
    call.student_target_logit = student_target_logit;
    call.detach_teacher = detach_teacher;
    call.state = reinterpret_cast<void*>(state);
    return call;
}

CrossEntropyCall cross_entropy_call(const Common& common, std::intptr_t bias, std::int64_t bias_stride,
                                    double label_smoothing) {
    const auto& [dtype, matrices, batch, classes, target, target_stride, state] = common;
    CrossEntropyCall call{};
    call.logits = experts_of(dtype, matrices, batch, classes);
    call.target = {reinterpret_cast<const std::int64_t*>(target), target_stride};
    call.bias = reinterpret_cast<const void*>(bias);
    call.bias_stride = bias_stride;
    call.label_smoothing = label_smoothing;
    call.state = reinterpret_cast<void*>(state);
    return call;
}

Experts gradient_of(const Experts& logits, const std::vector<std::int64_t>& matrices) {
    return experts_of(int(logits.dtype), matrices, logits.batch, logits.classes);
}

// Calls work(first, last) for all rows, in contiguous ranges, one a thread. A row does not depend on the split.
template <class Work>
void over_rows(const Experts& logits, int threads, const Work& work) {
    constexpr double kWorthAThread = 16384;  // logits: some 10 us of work, several times what waking a thread costs
    const double logit_count = double(logits.count) * double(logits.batch) * double(logits.classes);
    const std::int64_t useful = std::min(std::int64_t(logit_count / kWorthAThread) + 1, logits.batch);
    const int ranges = int(std::min<std::int64_t>(threads, useful));
    if (ranges <= 1) return work(0, logits.batch);
#pragma omp parallel for schedule(static, 1) num_threads(ranges)
    for (int range = 0; range < ranges; ++range) {
        work(logits.batch * range / ranges, logits.batch * (range + 1) / ranges);
    }
}

void store(DType dtype, std::intptr_t address, double value) {
    if (dtype == DType::kFloat64) {
        *reinterpret_cast<double*>(address) = value;
    } else {
        *reinterpret_cast<float*>(address) = float(value);
    }
}

double value_at(DType dtype, std::intptr_t address) {
    return dtype == DType::kFloat64 ? *reinterpret_cast<const double*>(address)
                                    : double(*reinterpret_cast<const float*>(address));
}

void cpu_dkt_forward(const Common& common, const DktWeights& weights, std::intptr_t loss, std::intptr_t terms,
                     int threads) {
    const py::gil_scoped_release release;
    const DktCall call = dkt_call(common, weights);
    std::vector<double> row_terms(std::size_t(3 * call.logits.batch));
    over_rows(call.logits, threads, [&](std::int64_t first, std::int64_t last) {
        chosen_kernels()->dkt_forward(call, row_terms.data(), first, last);
    });
    double sums[3] = {};  // in the order of the rows, whatever the threads
    for (std::int64_t b = 0; b < call.logits.batch; ++b) {
        for (int i = 0; i < 3; ++i) sums[i] += row_terms[std::size_t(3 * b + i)];
    }
    const double weight[3] = {1.0 / double(std::max<std::int64_t>(call.logits.batch, 1)), call.hardest_weight,
                              call.mutual_weight};
    double total = 0;
    for (int i = 0; i < 3; ++i) {
        const double term = weight[i] == 0 ? 0 : weight[i] * sums[i];
        store(DType::kFloat32, terms + std::intptr_t(i * sizeof(float)), term);
        total += term;
    }
    store(call.logits.dtype, loss, total);
}

void cpu_dkt_backward(const Common& common, const DktWeights& weights, const std::vector<std::int64_t>& gradients,
                      std::intptr_t incoming, int threads) {
    const py::gil_scoped_release release;
    const DktCall call = dkt_call(common, weights);
    const Experts gradient = gradient_of(call.logits, gradients);
    const double factor = value_at(call.logits.dtype, incoming);
    over_rows(call.logits, threads, [&](std::int64_t first, std::int64_t last) {
        chosen_kernels()->dkt_backward(call, gradient, factor, first, last);
    });
}

void cpu_cross_entropy_forward(const Common& common, std::intptr_t bias, std::int64_t bias_stride,
                               double label_smoothing, std::intptr_t loss, int threads) {
    const py::gil_scoped_release release;
    const CrossEntropyCall call = cross_entropy_call(common, bias, bias_stride, label_smoothing);
    std::vector<double> row_terms(std::size_t(call.logits.batch));
    over_rows(call.logits, threads, [&](std::int64_t first, std::int64_t last) {
        chosen_kernels()->cross_entropy_forward(call, row_terms.data(), first, last);
    });
    double sum = 0;
    for (const double term : row_terms) sum += term;
    store(call.logits.dtype, loss, sum / double(std::max<std::int64_t>(call.logits.batch, 1)));
}

void cpu_cross_entropy_backward(const Common& common, std::intptr_t bias, std::int64_t bias_stride,
                                double label_smoothing, const std::vector<std::int64_t>& gradients,
                                std::intptr_t incoming, int threads) {
    const py::gil_scoped_release release;
    const CrossEntropyCall call = cross_entropy_call(common, bias, bias_stride, label_smoothing);
    const Experts gradient = gradient_of(call.logits, gradients);
    const double factor = value_at(call.logits.dtype, incoming);
    over_rows(call.logits, threads, [&](std::int64_t first, std::int64_t last) {
        chosen_kernels()->cross_entropy_backward(call, gradient, factor, first, last);
    });
}

#if SHIKE_WITH_CUDA

float* floats(std::intptr_t address) { return reinterpret_cast<float*>(address); }

void gpu_dkt_forward(const Common& common, const DktWeights& weights, std::intptr_t loss, std::intptr_t terms,
                     std::intptr_t workspace, int device, std::intptr_t stream) {
    const py::gil_scoped_release release;
    cuda_dkt_forward(dkt_call(common, weights), floats(workspace), floats(loss), floats(terms),
                     {device, reinterpret_cast<void*>(stream)});
}

void gpu_dkt_backward(const Common& common, const DktWeights& weights, const std::vector<std::int64_t>& gradients,
                      std::intptr_t incoming, int device, std::intptr_t stream) {
    const py::gil_scoped_release release;
    const DktCall call = dkt_call(common, weights);
    cuda_dkt_backward(call, gradient_of(call.logits, gradients), floats(incoming),
                      {device, reinterpret_cast<void*>(stream)});
}

void gpu_cross_entropy_forward(const Common& common, std::intptr_t bias, std::int64_t bias_stride,
                               double label_smoothing, std::intptr_t loss, std::intptr_t workspace, int device,
                               std::intptr_t stream) {
    const py::gil_scoped_release release;
    cuda_cross_entropy_forward(cross_entropy_call(common, bias, bias_stride, label_smoothing), floats(workspace),
                               floats(loss), {device, reinterpret_cast<void*>(stream)});
}

void gpu_cross_entropy_backward(const Common& common, std::intptr_t bias, std::int64_t bias_stride,
                                double label_smoothing, const std::vector<std::int64_t>& gradients,
                                std::intptr_t incoming, int device, std::intptr_t stream) {
    const py::gil_scoped_release release;
    const CrossEntropyCall call = cross_entropy_call(common, bias, bias_stride, label_smoothing);
    cuda_cross_entropy_backward(call, gradient_of(call.logits, gradients), floats(incoming),
                                {device, reinterpret_cast<void*>(stream)});
}

#endif

}  // namespace
}  // namespace shike

SHIKE_BINDINGS(module) {
    module.attr("MAX_EXPERTS") = shike::kMaxExperts;
    module.def("cpu_levels", &shike::cpu_levels,
               "The instruction sets with kernels in this library that this processor has, best first.");
    module.def("cpu_level", [] { return std::string(shike::chosen_kernels()->name); },
               "The instruction set that the CPU kernels use.");
    module.def("set_cpu_level", &shike::set_cpu_level, py::arg("name"),
               "Make the CPU kernels use another of cpu_levels(); for tests and comparisons.");
    module.def("cpu_dkt_forward", &shike::cpu_dkt_forward);
    module.def("cpu_dkt_backward", &shike::cpu_dkt_backward);
    module.def("cpu_cross_entropy_forward", &shike::cpu_cross_entropy_forward);
    module.def("cpu_cross_entropy_backward", &shike::cpu_cross_entropy_backward);
#if SHIKE_WITH_CUDA
    module.def("cuda_dkt_workspace", &shike::cuda_dkt_workspace);
    module.def("cuda_cross_entropy_workspace", &shike::cuda_cross_entropy_workspace);
    module.def("cuda_dkt_forward", &shike::gpu_dkt_forward);
    module.def("cuda_dkt_backward", &shike::gpu_dkt_backward);
    module.def("cuda_cross_entropy_forward", &shike::gpu_cross_entropy_forward);
    module.def("cuda_cross_entropy_backward", &shike::gpu_cross_entropy_backward);
#endif
}
