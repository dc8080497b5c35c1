// The threads of the CPU kernels of the expert losses, and the sum over the batch.
#include <algorithm>
#include <vector>

#include "common/cpu_level.h"
#include "common/threads.h"
#include "losses/cpu_expert_weights.h"
#include "losses/cpu_kernels.h"
#include "losses/launch.h"

namespace shike {
namespace {

const LossKernels& kernels_of(const Experts& logits) { return kernels_for<LossKernels>(logits.dtype); }

// Calls work(first, last) for all rows. A row does not depend on the split.
template <class Work>
void over_rows(const Experts& logits, int threads, const Work& work) {
    const double logit_count = double(logits.count) * double(logits.batch) * double(logits.classes);
    over_ranges(logits.batch, logit_count, threads, work);
}

void store(DType dtype, void* to, double value) {
    if (dtype == DType::kFloat64) {
        *static_cast<double*>(to) = value;
    } else {
        *static_cast<float*>(to) = float(value);
    }
}

double value_at(DType dtype, const void* from) {
    return dtype == DType::kFloat64 ? *static_cast<const double*>(from) : double(*static_cast<const float*>(from));
}

// The loss from the terms of its rows, [B, 3], added in the order of the rows, whatever the threads.
void store_dkt_loss(const DktCall& call, const std::vector<double>& row_terms, void* loss, float* terms) {
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
        terms[i] = float(term);
        total += term;
    }
    store(call.logits.dtype, loss, total);
}

// Calls run(outputs) for a call that has its weights, and adds the terms of its rows up, in their order.
template <class Run>
void with_weights(ExpertCall call, const ExpertWeights& weights, void* loss, float* terms, void* rows, const Run& run) {
    std::vector<double> row_terms(std::size_t(2 * call.logits.batch));
    std::vector<float> narrow;
    std::vector<double> wide;
    if (call.logits.dtype == DType::kFloat64) {
        weigh_rows<double>(call, weights, wide);
    } else {
        weigh_rows<float>(call, weights, narrow);
    }
    call.rows = rows != nullptr;
    run(call, ExpertOutputs{row_terms.data(), call.of_rows ? loss : nullptr, rows});
    double sums[2] = {};
    for (std::int64_t b = 0; b < call.logits.batch; ++b) {
        for (int i = 0; i < 2; ++i) sums[i] += row_terms[std::size_t(2 * b + i)];
    }
    for (int i = 0; i < 2; ++i) terms[i] = float(sums[i]);
    if (!call.of_rows) store(call.logits.dtype, loss, sums[0] + sums[1]);
}

}  // namespace

void cpu_dkt_forward(const DktCall& call, void* loss, float* terms, int threads) {
    std::vector<double> row_terms(std::size_t(3 * call.logits.batch));
    over_rows(call.logits, threads, [&](std::int64_t first, std::int64_t last) {
        kernels_of(call.logits).dkt_forward(call, row_terms.data(), first, last);
    });
    store_dkt_loss(call, row_terms, loss, terms);
}

void cpu_dkt_backward(const DktCall& call, const Experts& gradient, const void* grad_output, int threads) {
    const double factor = value_at(call.logits.dtype, grad_output);
    over_rows(call.logits, threads, [&](std::int64_t first, std::int64_t last) {
        kernels_of(call.logits).dkt_backward(call, gradient, factor, first, last);
    });
}

void cpu_dkt_both(const DktCall& call, void* loss, float* terms, const Experts& gradient, int threads) {
    std::vector<double> row_terms(std::size_t(3 * call.logits.batch));
    over_rows(call.logits, threads, [&](std::int64_t first, std::int64_t last) {
        kernels_of(call.logits).dkt_both(call, gradient, row_terms.data(), first, last);
    });
    store_dkt_loss(call, row_terms, loss, terms);
}

void cpu_expert_forward(ExpertCall call, const ExpertWeights& weights, void* loss, float* terms, void* rows, int threads) {
    with_weights(call, weights, loss, terms, rows, [&](const ExpertCall& weighed, const ExpertOutputs& outputs) {
        over_rows(call.logits, threads, [&](std::int64_t first, std::int64_t last) {
            kernels_of(call.logits).expert_forward(weighed, outputs, first, last);
        });
    });
}

void cpu_expert_backward(const ExpertCall& call, const Experts& gradient, const void* grad_output, int threads) {
    over_rows(call.logits, threads, [&](std::int64_t first, std::int64_t last) {
        kernels_of(call.logits).expert_backward(call, gradient, grad_output, first, last);
    });
}

void cpu_expert_both(ExpertCall call, const ExpertWeights& weights, void* loss, float* terms, void* rows,
                     const Experts& gradient, int threads) {
    with_weights(call, weights, loss, terms, rows, [&](const ExpertCall& weighed, const ExpertOutputs& outputs) {
        over_rows(call.logits, threads, [&](std::int64_t first, std::int64_t last) {
            kernels_of(call.logits).expert_both(weighed, gradient, outputs, first, last);
        });
    });
}

}  // namespace shike
