// The weights of the rows of a generalised loss, from what the caller gave: row_weights and kl_row_weights of
// shike_fast/ops/_expert_call.py, in double.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "losses/launch.h"

namespace shike {
namespace {

template <class T>
double of_or(const OfExperts& values, int k, std::int64_t i, double otherwise) {
    return values.data == nullptr ? otherwise : double(static_cast<const T*>(values.data)[k * values.expert_stride + i]);
}

// Divides each expert's weights, or all of them together, by their sum; 0 where it is 0.
inline void normalise(std::vector<double>& weights, int experts, std::int64_t columns, bool together) {
    for (int k = 0; k < (together ? 1 : experts); ++k) {
        const auto first = weights.begin() + k * columns, last = together ? weights.end() : first + columns;
        double sum = 0;
        for (auto weight = first; weight != last; ++weight) sum += *weight;
        const double share = sum == 0 ? 0 : 1 / sum;
        for (auto weight = first; weight != last; ++weight) *weight *= share;
    }
}

// Adds the weights of one of the labels to `memory`.
template <class T>
void add_label_weights(const ExpertCall& call, const ExpertWeights& given, const LabelsOfExperts& labels, bool second,
                       std::vector<T>& memory) {
    const int experts = call.logits.count;
    const std::int64_t batch = call.logits.batch;
    const Reduction reduction = Reduction(given.reduction);
    std::vector<double> weights(std::size_t(experts * batch), 1.0);
    for (int k = 0; k < experts; ++k) {
        const double of_expert = of_or<T>({given.expert_weight.data, 1}, k, 0, 1);
        for (std::int64_t b = 0; b < batch; ++b) {
            double& weight = weights[std::size_t(k * batch + b)];
            const std::int64_t label = labels.data[k * labels.expert_stride + b * labels.stride];
            weight = of_or<T>(given.sample_weight, k, b, 1);
            if (label >= 0 && label < call.logits.classes) weight *= of_or<T>(given.class_weight, k, label, 1);
            if (reduction == Reduction::kGlobalWeightedMean) weight *= of_expert;
        }
    }
    double factor = 1;
    if (reduction == Reduction::kWeightedMean || reduction == Reduction::kGlobalWeightedMean) {
        normalise(weights, experts, batch, reduction == Reduction::kGlobalWeightedMean);
    } else if (reduction != Reduction::kNone) {
        factor = 1.0 / double(std::max<std::int64_t>(batch, 1) *
                              (reduction == Reduction::kMeanOverExperts ? experts : 1));
    }
    for (int k = 0; k < experts; ++k) {
        const bool counted = reduction == Reduction::kGlobalWeightedMean;
        const double of_expert = factor * (counted ? 1.0 : of_or<T>({given.expert_weight.data, 1}, k, 0, 1));
        for (std::int64_t b = 0; b < batch; ++b) {
            double share = 1;
            if (call.target_b.data != nullptr) {
                const double lam = of_or<T>({given.lam.data, 0}, 0, b, given.lam_number);
                share = second ? 1 - lam : lam;
            }
            memory.push_back(T(weights[std::size_t(k * batch + b)] * of_expert * share));
        }
    }
}

template <class T>
void add_kl_weights(const ExpertCall& call, const ExpertWeights& given, std::vector<T>& memory) {
    const int experts = call.logits.count;
    const std::int64_t rows = call.teacher == Teacher::kView ? call.logits.batch / 2 : call.logits.batch;
    const KlReduction reduction = KlReduction(given.kl_reduction);
    std::vector<double> gates(std::size_t(experts * rows), 1.0);
    for (int k = 0; k < experts; ++k) {
        for (std::int64_t b = 0; b < rows; ++b) gates[std::size_t(k * rows + b)] = of_or<T>(given.gate, k, b, 1);
    }
    double factor = given.kl_weight_number;
    if (reduction == KlReduction::kGatedMean && given.gate.data != nullptr) {
        normalise(gates, experts, rows, false);
    } else {
        factor /= double(std::max<std::int64_t>(rows, 1) *
                         (reduction == KlReduction::kMean ? call.logits.classes : 1));
    }
    double temperature = call.temperature_number;
    if (call.temperature.data != nullptr) {
        temperature = 0;
        for (std::int64_t c = 0; c < call.logits.classes; ++c) temperature += of_or<T>(call.temperature, 0, c, 1);
        temperature /= double(call.logits.classes);
    }
    factor *= temperature * temperature;
    for (int k = 0; k < experts; ++k) {
        for (std::int64_t b = 0; b < rows; ++b) {
            memory.push_back(T(factor * gates[std::size_t(k * rows + b)] * of_or<T>(given.kl_weight, k, b, 1)));
        }
    }
}

// Gives the call its weights, which lie in `memory` from then on.
template <class T>
void weigh_rows(ExpertCall& call, const ExpertWeights& given, std::vector<T>& memory) {
    const std::int64_t batch = call.logits.batch, columns = call.logits.count * batch;
    memory.reserve(std::size_t(3 * columns));
    if (call.cross_entropy) {
        add_label_weights<T>(call, given, call.target, false, memory);
        call.weight_a = {memory.data(), batch};
        if (call.target_b.data != nullptr) {
            add_label_weights<T>(call, given, call.target_b, true, memory);
            call.weight_b = {memory.data() + columns, batch};
        }
    }
    if (call.teacher == Teacher::kNone) return;
    const std::size_t first = memory.size();
    add_kl_weights<T>(call, given, memory);
    call.kl_weight = {memory.data() + first, call.teacher == Teacher::kView ? batch / 2 : batch};
}

}  // namespace
}  // namespace shike
