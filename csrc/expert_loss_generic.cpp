// The CPU kernels for the instruction set that the compiler targets by default.
#include "expert_loss_rows.h"

const shike::CpuKernels* shike::generic_kernels() { return kernels_named("generic"); }
