// The CPU kernels of the expert losses, compiled once for each instruction set.
#include "losses/cpu_kernels.h"

#include <array>
#include <utility>

#include "common/cpu_level.h"
#include "losses/cpu_dkt.h"
#include "losses/cpu_expert_rows.h"

namespace shike {
namespace {

using ExpertCounts = std::make_index_sequence<kMaxExperts>;

// The instances for 1, 2, ..., kMaxExperts experts.
template <class T, std::size_t... I>
constexpr auto forward_table(std::index_sequence<I...>) {
    return std::array{&dkt_forward_rows<T, int(I) + 1>...};
}
template <class T, std::size_t... I>
constexpr auto backward_table(std::index_sequence<I...>) {
    return std::array{&dkt_backward_rows<T, int(I) + 1>...};
}
template <class T, std::size_t... I>
constexpr auto both_table(std::index_sequence<I...>) {
    return std::array{&dkt_both_rows<T, int(I) + 1>...};
}

template <class T>
void dkt_forward(const DktCall& call, double* terms, std::int64_t first, std::int64_t last) {
    static constexpr auto table = forward_table<T>(ExpertCounts{});
    table[std::size_t(call.logits.count - 1)](call, terms, first, last);
}

template <class T>
void dkt_backward(const DktCall& call, const Experts& gradient, double grad_output, std::int64_t first,
                  std::int64_t last) {
    static constexpr auto table = backward_table<T>(ExpertCounts{});
    table[std::size_t(call.logits.count - 1)](call, gradient, grad_output, first, last);
}

template <class T>
void dkt_both(const DktCall& call, const Experts& gradient, double* terms, std::int64_t first, std::int64_t last) {
    static constexpr auto table = both_table<T>(ExpertCounts{});
    table[std::size_t(call.logits.count - 1)](call, gradient, terms, first, last);
}

template <class T>
constexpr LossKernels kKernels{dkt_forward<T>,    dkt_backward<T>,    dkt_both<T>,
                               expert_forward<T>, expert_backward<T>, expert_both<T>};

}  // namespace

template <>
const LossKernels& kernels_at<LossKernels, CpuLevel::SHIKE_CPU_LEVEL>() {
    return kKernels<float>;
}

#if SHIKE_FLOAT64
template <>
const LossKernels& float64_kernels<LossKernels>() {
    return kKernels<double>;
}
#endif

}  // namespace shike
