// CUDA devices as this library's own CUDA runtime sees them, and a check that the library has code for one.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace shike {

struct CudaDevice {
    std::string name;
    int major;           // compute capability
    int minor;
    std::size_t memory;  // bytes
};

struct CudaVersions {
    int driver;   // 1000 · major + 10 · minor: the newest CUDA that the driver supports; 0 if there is no driver
    int runtime;  // the same for the CUDA runtime linked into this library
};

// Both throw std::runtime_error with CUDA's own words if there is no driver or no device.
CudaVersions cuda_versions();
std::vector<CudaDevice> cuda_devices();

// Launches a kernel on device number `device` and compares what it wrote. Throws std::runtime_error if any step fails.
void cuda_self_test(int device);

}  // namespace shike
