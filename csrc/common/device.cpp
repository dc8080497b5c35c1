// Python bindings of device.h; without CUDA the same names raise RuntimeError saying why there is none.
#include "common/device.h"

#include <stdexcept>
#include <string>

#include "build_config.h"
#include "common/module.h"

namespace py = pybind11;

namespace shike {

#if !SHIKE_WITH_CUDA

namespace {

[[noreturn]] void built_without_cuda() {
    throw std::runtime_error(std::string("shike_fast was built without CUDA: ") + build::kCudaReason);
}

}  // namespace

CudaVersions cuda_versions() { built_without_cuda(); }
std::vector<CudaDevice> cuda_devices() { built_without_cuda(); }
void cuda_self_test(int) { built_without_cuda(); }

#endif

namespace {

py::list describe_devices() {
    std::vector<CudaDevice> devices;
    CudaVersions versions{};
    {
        const py::gil_scoped_release release;  // the first CUDA call of a process takes seconds
        devices = cuda_devices();
        versions = cuda_versions();
    }
    py::list result;
    for (const CudaDevice& device : devices) {
        py::dict entry;
        entry["name"] = device.name;
        entry["compute_capability"] = py::make_tuple(device.major, device.minor);
        entry["memory_bytes"] = device.memory;
        entry["driver_version"] = py::make_tuple(versions.driver / 1000, versions.driver % 1000 / 10);
        entry["runtime_version"] = py::make_tuple(versions.runtime / 1000, versions.runtime % 1000 / 10);
        result.append(entry);
    }
    return result;
}

}  // namespace
}  // namespace shike

SHIKE_BINDINGS(module) {
    module.def("cuda_devices", &shike::describe_devices,
               "CUDA devices: name, compute_capability, memory_bytes, driver_version (newest CUDA the driver "
               "supports), runtime_version. Raises RuntimeError saying why if there is no CUDA, driver or device.");
    module.def("cuda_self_test", &shike::cuda_self_test, py::arg("device"), py::call_guard<py::gil_scoped_release>(),
               "Run a small kernel on this device and compare its output. Raises RuntimeError saying what failed.");
}
