// The keyword arguments of a call from Python, read by name:
//
//     define(module, "negate", "what it does", [](Arguments& in) {
//         const Array values = in["values"].array(1);
//         const std::int64_t count = in["count"].integer();
//         return [=] { negate(values, count); };  // runs without Python's lock
//     });
//
// All arguments are keywords and all are required; one that is missing, not known or of another kind is a TypeError
// that names it. A tensor is whatever has data_ptr(), stride() and dim(), so that no PyTorch header is needed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/dtype.h"

namespace shike {

constexpr int kMaxDims = 4;

// The memory of a tensor; strides in elements.
struct Array {
    void* data;
    int dims;
    std::int64_t stride[kMaxDims];
};

class Arguments;

// A queue of a CUDA device, from the arguments device and stream.
struct CudaQueue;
CudaQueue queue_of(Arguments& in);

// One argument, or an element of a list.
class Value {
public:
    bool is_none() const { return object_ == Py_None; }
    std::int64_t integer() const;
    double number() const;
    bool flag() const;
    DType dtype() const;
    Array array() const;                   // of a tensor
    Array array(int dims) const;           // of a tensor of this many dimensions
    void* memory(int dims) const;          // the address of a contiguous one
    void* memory_or_null(int dims) const;  // null for None

    int size() const;  // of a list or tuple
    Value of_size(int count) const {
        check_size(count);
        return *this;
    }
    Value element(int i) const { return Value(call_, name_, PySequence_Fast_GET_ITEM(object_, i), i); }  // unchecked

    // Calls read(index, element) for the elements of a list or tuple that must have `count` of them.
    template <class Read>
    void each(int count, const Read& read) const {
        check_size(count);
        for (int i = 0; i < count; ++i) read(i, element(i));
    }

    // Throws a TypeError: "<function>: argument '<name>': <message>".
    [[noreturn]] void refuse(const std::string& message) const;

private:
    friend class Arguments;
    Value(const Arguments* call, const char* name, PyObject* object, int index = -1)
        : call_(call), name_(name), object_(object), index_(index) {}

    [[noreturn]] void expected(const char* kind) const;
    void* address() const;
    void check_size(int count) const;

    const Arguments* call_;
    const char* name_;
    PyObject* object_;
    int index_;  // in a list; -1: none
};

class Arguments {
public:
    Arguments(PyObject* function, PyObject* const* values, Py_ssize_t positional, PyObject* names);

    Value operator[](const char* name);
    // Throws a TypeError if an argument has not been read.
    void finish() const;
    std::string function() const;

private:
    PyObject* function_;  // its name
    PyObject* const* values_;
    PyObject* names_;
    Py_ssize_t count_;
    Py_ssize_t next_ = 0;     // where the next argument is, if they come in the order of reading
    std::uint64_t read_ = 0;  // bit i: argument i has been read
};

// Adds a function that takes its arguments as CPython's METH_FASTCALL hands them over.
void add_function(pybind11::module_& module, const char* name, const char* doc, _PyCFunctionFastWithKeywords function);

// Sets Python's error from the exception that is being handled.
void set_python_error() noexcept;

template <class Read>
void define(pybind11::module_& module, const char* name, const char* doc, Read read) {
    static const Read reader = read;  // every lambda has a type, and so a variable, of its own
    add_function(module, name, doc,
                 [](PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* names) -> PyObject* {
                     try {
                         Arguments arguments(self, values, positional, names);
                         const auto run = reader(arguments);
                         arguments.finish();
                         const auto unlocked = [&] {
                             const pybind11::gil_scoped_release release;
                             return run();
                         };
                         if constexpr (std::is_void_v<decltype(run())>) {
                             unlocked();
                             return pybind11::none().release().ptr();
                         } else {
                             return pybind11::cast(unlocked()).release().ptr();
                         }
                     } catch (...) {
                         set_python_error();
                         return nullptr;
                     }
                 });
}

}  // namespace shike
