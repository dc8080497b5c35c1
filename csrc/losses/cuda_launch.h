// What launches of the expert losses share: checks, the choice of a kernel, the workspace.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "common/cuda_check.h"
#include "common/grid.h"
#include "common/macros.h"
#include "losses/call.h"
#include "losses/row_state.h"

namespace shike {
namespace {

inline std::string shape_text(const Experts& logits) {
    return "K=" + std::to_string(logits.count) + ", B=" + std::to_string(logits.batch) +
           ", C=" + std::to_string(logits.classes);
}

// After each launch.
inline void check_launch(const char* kernel, const Experts& logits, std::int64_t blocks, int threads) {
    const cudaError_t status = cudaGetLastError();
    if (status == cudaSuccess) return;
    check(status, std::string(kernel) + ": launching " + std::to_string(blocks) + " blocks of " +
                      std::to_string(threads) + " threads for logits [" + shape_text(logits) + "]");
}

inline void check_call(const char* op, const Experts& logits) {
    const char* reason = nullptr;
    if (logits.count < 1 || logits.count > kMaxExperts) reason = "1 to 8 experts are supported";
    if (logits.batch < 1) reason = "the batch is empty";
    if (logits.classes < 2 || logits.classes >= std::int64_t(kNoClass)) reason = "2 to 2^24 - 1 classes are supported";
    if (logits.dtype == DType::kFloat64) reason = "float64 is not supported on CUDA devices";
    if (reason == nullptr) return;
    throw std::runtime_error(std::string(op) + ": " + reason + ", got logits [" + shape_text(logits) + "]");
}

// Calls run(std::integral_constant<int, K>{}) for this number of experts.
template <class Run, std::size_t... I>
void with_count(int experts, const Run& run, std::index_sequence<I...>) {
    ((experts == int(I) + 1 ? run(std::integral_constant<int, int(I) + 1>{}) : void()), ...);
}
template <int kMost = kMaxExperts, class Run>
void with_count(int experts, const Run& run) {
    with_count(experts, run, std::make_index_sequence<kMost>{});
}

// Calls run(std::bool_constant<value>{}).
template <class Run>
void with_flag(bool value, const Run& run) {
    if (value) {
        run(std::true_type{});
    } else {
        run(std::false_type{});
    }
}

inline bool four_bytes(DType dtype) { return dtype == DType::kFloat32; }

// The workspace in floats: what a forward kernel leaves for the end kernel, whose blocks' sums follow, and its ticket.
struct Workspace {
    std::int64_t rows, sums;

    // The end has as many blocks as it takes to end `batch` rows with `rows_of_block` each.
    Workspace(std::int64_t row_bytes, int columns, std::int64_t batch, int rows_of_block = kWarp)
        : rows((row_bytes + 7) / 8 * 2), sums(2 * columns * blocks_of_end(batch, rows_of_block)) {}
    std::size_t floats() const { return std::size_t(rows + sums + 1); }
    double* sums_in(float* memory) const { return reinterpret_cast<double*>(memory + rows); }
    unsigned* ticket_in(float* memory) const { return reinterpret_cast<unsigned*>(memory + rows + sums); }

    static std::int64_t blocks_of_end(std::int64_t batch, int rows_of_block = kWarp) {
        return quotient_up(batch, rows_of_block);
    }
};

}  // namespace
}  // namespace shike
