// The CPU kernels for AVX512; CMakeLists.txt sets the compiler's flags where the processor is an x86-64.
#if defined(__AVX512F__)

#include "expert_loss_rows.h"

const shike::CpuKernels* shike::avx512_kernels() { return kernels_of_this_file(); }

#else

#include "expert_loss_cpu.h"

const shike::CpuKernels* shike::avx512_kernels() { return nullptr; }

#endif
