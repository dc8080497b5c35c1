// Arithmetic of launches: how many threads and blocks.
#pragma once

#include <cstdint>

namespace shike {
namespace {

// The least power of two that is not below n >= 1.
constexpr int power_of_two(std::int64_t n) {
    int result = 1;
    while (result < n && result < (1 << 30)) result *= 2;
    return result;
}

constexpr int smaller(std::int64_t a, std::int64_t b) { return int(a < b ? a : b); }
constexpr std::int64_t quotient_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

constexpr int kThreadsToFill = 768;  // of a multiprocessor: enough, with the loads that each has under way

}  // namespace
}  // namespace shike
