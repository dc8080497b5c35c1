#include "common/device.h"

#include <cstdint>
#include <stdexcept>

#include "build_config.h"
#include "common/cuda_check.h"

namespace shike {
namespace {

std::string version_text(int version) {
    return version == 0 ? "none" : std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

int device_count() {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) {
        const CudaVersions versions = cuda_versions();
        check(status, "cudaGetDeviceCount (driver supports CUDA " + version_text(versions.driver) +
                          ", this library uses CUDA " + version_text(versions.runtime) + ")");
    }
    return count;
}

class Buffer {
public:
    explicit Buffer(std::size_t bytes) {
        check(cudaMalloc(&data_, bytes), "cudaMalloc(" + std::to_string(bytes) + " bytes)");
    }
    ~Buffer() { cudaFree(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    std::uint32_t* data() const { return static_cast<std::uint32_t*>(data_); }

private:
    void* data_ = nullptr;
};

// A value that differs at every index and that freshly allocated memory does not hold by chance.
__host__ __device__ std::uint32_t pattern(std::uint32_t index) { return index * 2654435761u ^ 0x5ca1ab1eu; }

__global__ void write_pattern(std::uint32_t* out,  // [count]
                              std::uint32_t count) {
    const std::uint32_t index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index < count) out[index] = pattern(index);
}

}  // namespace

CudaVersions cuda_versions() {
    CudaVersions versions{};
    check(cudaDriverGetVersion(&versions.driver), "cudaDriverGetVersion");
    check(cudaRuntimeGetVersion(&versions.runtime), "cudaRuntimeGetVersion");
    return versions;
}

std::vector<CudaDevice> cuda_devices() {
    std::vector<CudaDevice> devices;
    const int count = device_count();
    for (int device = 0; device < count; ++device) {
        cudaDeviceProp properties{};
        check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties(" + std::to_string(device) + ")");
        devices.push_back({properties.name, properties.major, properties.minor, properties.totalGlobalMem});
    }
    return devices;
}

void cuda_self_test(int device) {
    const int count = device_count();
    if (device < 0 || device >= count) {
        throw std::runtime_error("cuda_self_test: expected a device number in [0, " + std::to_string(count) +
                                 "), got " + std::to_string(device));
    }
    constexpr std::uint32_t kCount = 1000;  // not a multiple of the block, so that the bound is exercised
    constexpr std::uint32_t kBlock = 128;
    const CurrentDevice current(device);
    const Buffer buffer(kCount * sizeof(std::uint32_t));
    write_pattern<<<(kCount + kBlock - 1) / kBlock, kBlock>>>(buffer.data(), kCount);
    check(cudaGetLastError(), "launching a kernel on device " + std::to_string(device) + " (this library has code for " +
                                  build::kCudaArchitectures + "; SHIKE_CUDA_ARCHS chooses)");
    std::vector<std::uint32_t> host(kCount);
    check(cudaMemcpy(host.data(), buffer.data(), kCount * sizeof(std::uint32_t), cudaMemcpyDeviceToHost),
          "cudaMemcpy to the host");
    for (std::uint32_t index = 0; index < kCount; ++index) {
        if (host[index] != pattern(index)) {
            throw std::runtime_error("cuda_self_test: device " + std::to_string(device) + " wrote " +
                                     std::to_string(host[index]) + " at index " + std::to_string(index) +
                                     ", expected " + std::to_string(pattern(index)));
        }
    }
}

}  // namespace shike
