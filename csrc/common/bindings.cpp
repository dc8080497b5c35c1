// The Python module shike_fast._native: how it was built, and the functions that the other files register.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "build_config.h"
#include "common/module.h"

namespace py = pybind11;

namespace {

// `text`, or None if it is empty.
py::object text_or_none(const char* text) {
    return *text != '\0' ? py::object(py::str(text)) : py::object(py::none());
}

py::dict build_info() {
    py::list architectures;
    std::istringstream list(shike::build::kCudaArchitectures);
    for (std::string architecture; std::getline(list, architecture, ';');) architectures.append(architecture);

    py::dict info;
    info["version"] = shike::build::kVersion;
    info["compiler"] = shike::build::kCompiler;
    info["cxx_standard"] = (__cplusplus / 100) % 100;  // 201703 -> 17
    info["flags"] = shike::build::kFlags;
    info["openmp"] = text_or_none(shike::build::kOpenMp);
    info["build_type"] = shike::build::kBuildType;
    info["cuda"] = text_or_none(shike::build::kCudaVersion);
    info["cuda_reason"] = text_or_none(shike::build::kCudaReason);
    info["cuda_architectures"] = architectures;
    info["cuda_flags"] = text_or_none(SHIKE_WITH_CUDA ? shike::build::kCudaFlags : "");
    return info;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Compiled kernels of shike_fast; raw pointers in, no checks: call them through shike_fast.ops.";
    module.def("build_info", &build_info,
               "How this library was built: version, compiler, cxx_standard, flags, openmp (version or "
               "None), build_type, cuda (version or "
               "None), cuda_reason (why there is no CUDA, or None), cuda_architectures, cuda_flags.");
    for (const shike::Binder binder : shike::binders()) binder(module);
}
