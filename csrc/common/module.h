// How a source file puts its functions into shike_fast._native without a central list:
//
//     SHIKE_BINDINGS(module) { module.def("name", &function, "what it does"); }
//
// Functions take raw pointers, sizes and a stream; Python owns allocation, checks and registration. No PyTorch header
// is included anywhere, so that one build serves every PyTorch.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace shike {

using Binder = void (*)(pybind11::module_&);

// The binders of all source files. A function's static, because the order in which files initialise is unspecified.
inline std::vector<Binder>& binders() {
    static std::vector<Binder> all;
    return all;
}

struct RegisterBinder {
    explicit RegisterBinder(Binder binder) { binders().push_back(binder); }
};

}  // namespace shike

#define SHIKE_BINDINGS(module)                                            \
    static void shike_bindings(pybind11::module_& module);                \
    static const shike::RegisterBinder shike_registration{shike_bindings}; \
    static void shike_bindings(pybind11::module_& module)
