// The instruction sets that the CPU kernels of all operators are compiled for, and the one in use.
#pragma once

#include "dtype.h"

namespace shike {

enum class CpuLevel { kGeneric, kAvx2, kAvx512 };

CpuLevel cpu_level();

// Only the generic kernels take float64.
inline CpuLevel cpu_level_for(DType dtype) { return dtype == DType::kFloat64 ? CpuLevel::kGeneric : cpu_level(); }

template <class Kernels>
const Kernels* at_level(CpuLevel level, const Kernels* generic, const Kernels* avx2, const Kernels* avx512) {
    return level == CpuLevel::kAvx512 ? avx512 : level == CpuLevel::kAvx2 ? avx2 : generic;
}

}  // namespace shike
