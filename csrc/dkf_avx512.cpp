// The CPU kernels of depth-wise knowledge fusion for AVX-512; CMakeLists.txt sets the compiler's flags where the processor
// is an x86-64.
#if defined(__AVX512F__)

#include "dkf_rows.h"

const shike::DkfKernels* shike::dkf_avx512_kernels() { return dkf_kernels_of_this_file(); }

#else

#include "dkf_cpu.h"

const shike::DkfKernels* shike::dkf_avx512_kernels() { return nullptr; }

#endif
