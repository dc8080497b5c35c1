// The instruction sets that the CPU kernels are compiled for, and the one in use.
#pragma once

#include "build_config.h"
#include "common/dtype.h"

namespace shike {

enum class CpuLevel { kGeneric, kAvx2, kAvx512 };

CpuLevel cpu_level();

// Tables of kernels. CMakeLists.txt compiles each cpu_kernels.cpp once for every instruction set, with SHIKE_CPU_LEVEL
// set to its name; the file defines the table of that level. float64 is for checking gradients, not for speed: its
// table is compiled for the generic level only, where SHIKE_FLOAT64 is set.
template <class Kernels, CpuLevel kLevel>
const Kernels& kernels_at();
template <class Kernels>
const Kernels& float64_kernels();

template <class Kernels>
const Kernels& kernels_for(DType dtype) {
    if (dtype == DType::kFloat64) return float64_kernels<Kernels>();
#if SHIKE_X86
    const CpuLevel level = cpu_level();
    if (level == CpuLevel::kAvx512) return kernels_at<Kernels, CpuLevel::kAvx512>();
    if (level == CpuLevel::kAvx2) return kernels_at<Kernels, CpuLevel::kAvx2>();
#endif
    return kernels_at<Kernels, CpuLevel::kGeneric>();
}

}  // namespace shike
