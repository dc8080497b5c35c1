// What every file that calls the CUDA runtime needs.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace shike {

// Whether a kernel failed while it ran. Every later call reports that, whatever it does itself.
inline bool is_of_an_earlier_kernel(cudaError_t status) {
    switch (status) {
        case cudaErrorAssert:
        case cudaErrorECCUncorrectable:
        case cudaErrorHardwareStackError:
        case cudaErrorIllegalAddress:
        case cudaErrorIllegalInstruction:
        case cudaErrorInvalidAddressSpace:
        case cudaErrorInvalidPc:
        case cudaErrorLaunchFailure:
        case cudaErrorLaunchTimeout:
        case cudaErrorMisalignedAddress:
            return true;
        default:
            return false;
    }
}

// Throws if a CUDA call failed, and clears the runtime's copy so that the next call does not report this error again.
inline void check(cudaError_t status, const std::string& what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();
    const std::string reason = std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
    if (!is_of_an_earlier_kernel(status)) throw std::runtime_error(what + ": " + reason);
    throw std::runtime_error("an earlier kernel on this device failed: " + reason + "; noticed at: " + what);
}

// Makes `device` current, and the former one again at the end: the caller's PyTorch shares the thread's current device.
class CurrentDevice {
public:
    explicit CurrentDevice(int device) : device_(device) {
        check(cudaGetDevice(&former_), "cudaGetDevice");
        if (former_ != device_) check(cudaSetDevice(device_), "cudaSetDevice(" + std::to_string(device_) + ")");
    }
    ~CurrentDevice() {
        if (former_ != device_) cudaSetDevice(former_);
    }
    CurrentDevice(const CurrentDevice&) = delete;
    CurrentDevice& operator=(const CurrentDevice&) = delete;

private:
    int former_ = 0;
    int device_;
};

// A number that CUDA knows of a device; asked for once.
template <cudaDeviceAttr attribute>
int attribute_of(int device) {
    constexpr int kDevices = 64;
    static std::atomic<int> known[kDevices];  // zeros: not asked yet
    int value = device >= 0 && device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
    if (value != 0) return value;
    check(cudaDeviceGetAttribute(&value, attribute, device),
          "cudaDeviceGetAttribute(device " + std::to_string(device) + ")");
    if (device >= 0 && device < kDevices) known[device].store(value, std::memory_order_relaxed);
    return value;
}

// Multiprocessors of a device.
inline int processors_of(int device) { return attribute_of<cudaDevAttrMultiProcessorCount>(device); }

}  // namespace shike
