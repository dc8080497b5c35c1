// Python bindings of the expert losses, and the threads of their CPU kernels.
#include "expert_loss.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "build_config.h"
#include "cpu_level.h"
#include "expert_loss_cpu.h"
#include "expert_loss_cuda.h"
#include "module.h"
#include "threads.h"

namespace py = pybind11;

namespace shike {
namespace {

const CpuKernels* kernels_for(DType dtype) {
    return at_level(cpu_level_for(dtype), generic_kernels(), avx2_kernels(), avx512_kernels());
}

// One tensor [K, B, C] as its address, the bytes of an element and its strides, or K tensors [B, C] as the
// address and the strides of each; strides in elements.
using Layout = std::vector<std::int64_t>;

Experts experts_of(int dtype, int count, const Layout& layout, std::int64_t batch, std::int64_t classes) {
    if (count < 1 || count > kMaxExperts || (layout.size() != 5 && layout.size() != std::size_t(3 * count))) {
        throw std::invalid_argument("expert loss: expected 1 to " + std::to_string(kMaxExperts) +
                                    " experts and their layout, got " + std::to_string(count) + " experts and " +
                                    std::to_string(layout.size()) + " numbers");
    }
    Experts experts{};
    experts.count = count;
    for (int k = 0; k < count; ++k) {
        if (layout.size() == 5) {
            const std::int64_t address = layout[0] + k * layout[1] * layout[2];
            experts.expert[k] = {reinterpret_cast<void*>(address), layout[3], layout[4]};
        } else {
            experts.expert[k] = {reinterpret_cast<void*>(layout[3 * k]), layout[3 * k + 1], layout[3 * k + 2]};
        }
    }
    experts.batch = batch;
    experts.classes = classes;
    experts.dtype = DType(dtype);
    return experts;
}

// What every call begins with: (dtype, K, layout of the logits, B, C, address and stride of the target, address of the
// state).
using Common = std::tuple<int, int, Layout, std::int64_t, std::int64_t, std::intptr_t, std::int64_t, std::intptr_t>;
// The options of the op: address of the weights' factors or 0, hardest_weight, mutual_weight, kl_reduction, teacher and
// student target logit, detach_teacher.
using DktOptionsOfOp = std::tuple<std::intptr_t, double, double, std::string, double, double, bool>;

DktCall dkt_call(const Common& common, const DktOptionsOfOp& options) {
    const auto& [dtype, count, layout, batch, classes, target, target_stride, state] = common;
    const auto& [factors, hardest, mutual, kl_reduction, teacher_target_logit, student_target_logit, detach_teacher] =
        options;
    const double rows = double(std::max<std::int64_t>(batch, 1));
    const double scale = 1.0 / (kl_reduction == "mean" ? rows * double(classes) : rows);
    DktCall call{};
    call.logits = experts_of(dtype, count, layout, batch, classes);
    call.target = {reinterpret_cast<const std::int64_t*>(target), target_stride};
    call.hardest_weight = hardest * scale;
    call.mutual_weight = mutual * scale;
    call.factors = reinterpret_cast<const double*>(factors);
    call.teacher_target_logit = teacher_target_logit;
    call.student_target_logit = student_target_logit;
    call.detach_teacher = detach_teacher;
    call.hardest_term = hardest != 0;
    call.mutual_term = mutual != 0;
    call.state = reinterpret_cast<void*>(state);
    return call;
}

CrossEntropyCall cross_entropy_call(const Common& common, std::intptr_t bias, std::int64_t bias_stride,
                                    double label_smoothing) {
    const auto& [dtype, count, layout, batch, classes, target, target_stride, state] = common;
    CrossEntropyCall call{};
    call.logits = experts_of(dtype, count, layout, batch, classes);
    call.target = {reinterpret_cast<const std::int64_t*>(target), target_stride};
    call.bias = reinterpret_cast<const void*>(bias);
    call.bias_stride = bias_stride;
    call.label_smoothing = label_smoothing;
    call.state = reinterpret_cast<void*>(state);
    return call;
}

Experts gradient_of(const Experts& logits, const Layout& layout) {
    return experts_of(int(logits.dtype), logits.count, layout, logits.batch, logits.classes);
}

// Calls work(first, last) for all rows. A row does not depend on the split.
template <class Work>
void over_rows(const Experts& logits, int threads, const Work& work) {
    const double logit_count = double(logits.count) * double(logits.batch) * double(logits.classes);
    over_ranges(logits.batch, logit_count, threads, work);
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

// The loss from the terms of its rows, [B, 3], added in the order of the rows, whatever the threads.
void store_dkt_loss(const DktCall& call, const std::vector<double>& row_terms, std::intptr_t loss,
                    std::intptr_t terms) {
    double sums[3] = {};
    for (std::int64_t b = 0; b < call.logits.batch; ++b) {
        for (int i = 0; i < 3; ++i) sums[i] += row_terms[std::size_t(3 * b + i)];
    }
    const double one[2] = {1, 1}, *factors = call.factors == nullptr ? one : call.factors;
    const double weight[3] = {1.0 / double(std::max<std::int64_t>(call.logits.batch, 1)),
                              call.hardest_weight * factors[0], call.mutual_weight * factors[1]};
    double total = 0;
    for (int i = 0; i < 3; ++i) {
        const double term = weight[i] == 0 ? 0 : weight[i] * sums[i];
        store(DType::kFloat32, terms + std::intptr_t(i * sizeof(float)), term);
        total += term;
    }
    store(call.logits.dtype, loss, total);
}

void cpu_dkt_forward(const Common& common, const DktOptionsOfOp& options, std::intptr_t loss, std::intptr_t terms,
                     int threads) {
    const py::gil_scoped_release release;
    const DktCall call = dkt_call(common, options);
    std::vector<double> row_terms(std::size_t(3 * call.logits.batch));
    over_rows(call.logits, threads, [&](std::int64_t first, std::int64_t last) {
        kernels_for(call.logits.dtype)->dkt_forward(call, row_terms.data(), first, last);
    });
    store_dkt_loss(call, row_terms, loss, terms);
}

void cpu_dkt_backward(const Common& common, const DktOptionsOfOp& options, const Layout& gradients,
                      std::intptr_t incoming, int threads) {
    const py::gil_scoped_release release;
    const DktCall call = dkt_call(common, options);
    const Experts gradient = gradient_of(call.logits, gradients);
    const double factor = value_at(call.logits.dtype, incoming);
    over_rows(call.logits, threads, [&](std::int64_t first, std::int64_t last) {
        kernels_for(call.logits.dtype)->dkt_backward(call, gradient, factor, first, last);
    });
}

// Forward and backward of some rows after the other: their logits are still in the cache.
void cpu_dkt_both(const Common& common, const DktOptionsOfOp& options, std::intptr_t loss, std::intptr_t terms,
                  const Layout& gradients, int threads) {
    constexpr std::int64_t kRows = 16;  // a SIMD vector of them, which the forward ends together
    const py::gil_scoped_release release;
    const DktCall call = dkt_call(common, options);
    const Experts gradient = gradient_of(call.logits, gradients);
    std::vector<double> row_terms(std::size_t(3 * call.logits.batch));
    over_rows(call.logits, threads, [&](std::int64_t first, std::int64_t last) {
        const CpuKernels* kernels = kernels_for(call.logits.dtype);
        for (std::int64_t b = first; b < last; b += kRows) {
            const std::int64_t end = std::min(b + kRows, last);
            kernels->dkt_forward(call, row_terms.data(), b, end);
            kernels->dkt_backward(call, gradient, 1, b, end);
        }
    });
    store_dkt_loss(call, row_terms, loss, terms);
}

void cpu_cross_entropy_forward(const Common& common, std::intptr_t bias, std::int64_t bias_stride,
                               double label_smoothing, std::intptr_t loss, int threads) {
    const py::gil_scoped_release release;
    const CrossEntropyCall call = cross_entropy_call(common, bias, bias_stride, label_smoothing);
    std::vector<double> row_terms(std::size_t(call.logits.batch));
    over_rows(call.logits, threads, [&](std::int64_t first, std::int64_t last) {
        kernels_for(call.logits.dtype)->cross_entropy_forward(call, row_terms.data(), first, last);
    });
    double sum = 0;
    for (const double term : row_terms) sum += term;
    store(call.logits.dtype, loss, sum / double(std::max<std::int64_t>(call.logits.batch, 1)));
}

void cpu_cross_entropy_backward(const Common& common, std::intptr_t bias, std::int64_t bias_stride,
                                double label_smoothing, const Layout& gradients,
                                std::intptr_t incoming, int threads) {
    const py::gil_scoped_release release;
    const CrossEntropyCall call = cross_entropy_call(common, bias, bias_stride, label_smoothing);
    const Experts gradient = gradient_of(call.logits, gradients);
    const double factor = value_at(call.logits.dtype, incoming);
    over_rows(call.logits, threads, [&](std::int64_t first, std::int64_t last) {
        kernels_for(call.logits.dtype)->cross_entropy_backward(call, gradient, factor, first, last);
    });
}

// Smallest and largest of int64 [count], count >= 1: PyTorch needs several operators and transfers for them.
std::pair<std::int64_t, std::int64_t> extremes(std::intptr_t address, std::int64_t stride, std::int64_t count) {
    const auto* values = reinterpret_cast<const std::int64_t*>(address);
    std::pair<std::int64_t, std::int64_t> result{values[0], values[0]};
    for (std::int64_t i = 1; i < count; ++i) {
        result.first = std::min(result.first, values[i * stride]);
        result.second = std::max(result.second, values[i * stride]);
    }
    return result;
}

#if SHIKE_WITH_CUDA

float* floats(std::intptr_t address) { return reinterpret_cast<float*>(address); }

void gpu_dkt_forward(const Common& common, const DktOptionsOfOp& options, std::intptr_t loss, std::intptr_t terms,
                     std::intptr_t workspace, int device, std::intptr_t stream) {
    const py::gil_scoped_release release;
    cuda_dkt_forward(dkt_call(common, options), floats(workspace), floats(loss), floats(terms),
                     {device, reinterpret_cast<void*>(stream)});
}

void gpu_dkt_backward(const Common& common, const DktOptionsOfOp& options, const Layout& gradients,
                      std::intptr_t incoming, int device, std::intptr_t stream) {
    const py::gil_scoped_release release;
    const DktCall call = dkt_call(common, options);
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
                                double label_smoothing, const Layout& gradients,
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
    module.def("extremes", &shike::extremes, "Smallest and largest of int64 numbers: address, stride, count >= 1.");
    module.def("cpu_dkt_forward", &shike::cpu_dkt_forward);
    module.def("cpu_dkt_backward", &shike::cpu_dkt_backward);
    module.def("cpu_dkt_both", &shike::cpu_dkt_both);
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
