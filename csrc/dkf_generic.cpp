// The CPU kernels of depth-wise knowledge fusion for the instruction set that the compiler targets by default.
#define SHIKE_FLOAT64 1
#include "dkf_rows.h"

const shike::DkfKernels* shike::dkf_generic_kernels() { return dkf_kernels_of_this_file(); }
