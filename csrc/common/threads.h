// Sharing out independent work to the threads of OpenMP.
#pragma once

#include <algorithm>
#include <cstdint>

namespace shike {

// Calls work(first, last) for units 0 ... units - 1, in contiguous ranges, one a thread. `elements` is what they take
// in all; small work stays on the calling thread. No result may depend on the split.
template <class Work>
void over_ranges(std::int64_t units, double elements, int threads, const Work& work) {
    constexpr double kWorthAThread = 16384;  // elements: some 10 us of work, several times what waking a thread costs
    const std::int64_t useful = std::min(std::int64_t(elements / kWorthAThread) + 1, units);
    const int ranges = int(std::min<std::int64_t>(threads, useful));
    if (ranges <= 1) return work(std::int64_t(0), units);
#pragma omp parallel for schedule(static, 1) num_threads(ranges)
    for (int range = 0; range < ranges; ++range) work(units * range / ranges, units * (range + 1) / ranges);
}

}  // namespace shike
