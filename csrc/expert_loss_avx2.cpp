// The CPU kernels for AVX2; CMakeLists.txt sets the compiler's flags where the processor is an x86-64.
#if defined(__AVX2__)

#include "expert_loss_rows.h"

const shike::CpuKernels* shike::avx2_kernels() { return kernels_of_this_file(); }

#else

#include "expert_loss_cpu.h"

const shike::CpuKernels* shike::avx2_kernels() { return nullptr; }

#endif
