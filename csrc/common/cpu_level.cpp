// The choice of the instruction set that the CPU kernels use.
#include "common/cpu_level.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/module.h"

namespace py = pybind11;

namespace shike {
namespace {

using Named = std::pair<CpuLevel, const char*>;

// Those that were compiled and that this processor has, best first.
std::vector<Named> usable_levels() {
    std::vector<Named> usable;
#if SHIKE_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        usable.emplace_back(CpuLevel::kAvx512, "avx512");
    }
    // A processor with AVX2 has F16C; not every compiler can ask for it.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        usable.emplace_back(CpuLevel::kAvx2, "avx2");
    }
#endif
    usable.emplace_back(CpuLevel::kGeneric, "generic");
    return usable;
}

Named& chosen_level() {
    static Named chosen = usable_levels().front();
    return chosen;
}

std::vector<std::string> cpu_levels() {
    std::vector<std::string> names;
    for (const Named& level : usable_levels()) names.emplace_back(level.second);
    return names;
}

void set_cpu_level(const std::string& name) {
    for (const Named& level : usable_levels()) {
        if (level.second == name) {
            chosen_level() = level;
            return;
        }
    }
    std::string known;
    for (const std::string& level : cpu_levels()) known += (known.empty() ? "" : ", ") + level;
    throw std::invalid_argument("set_cpu_level: expected one of " + known + ", got " + name);
}

}  // namespace

CpuLevel cpu_level() { return chosen_level().first; }

}  // namespace shike

SHIKE_BINDINGS(module) {
    module.def("cpu_levels", &shike::cpu_levels,
               "The instruction sets with kernels in this library that this processor has, best first.");
    module.def("cpu_level", [] { return std::string(shike::chosen_level().second); },
               "The instruction set that the CPU kernels use.");
    module.def("set_cpu_level", &shike::set_cpu_level, py::arg("name"),
               "Make the CPU kernels use another of cpu_levels(), in this process.");
}
