// The CPU kernels for the instruction set that the compiler targets by default.
#define SHIKE_FLOAT64 1
#include "expert_loss_rows.h"

const shike::CpuKernels* shike::generic_kernels() { return kernels_of_this_file(); }
