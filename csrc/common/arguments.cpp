// Reading the keyword arguments of calls from Python.
#include "common/arguments.h"

#include "common/cuda_queue.h"

namespace py = pybind11;

namespace shike {
namespace {

const char* kind_of(PyObject* object) { return Py_TYPE(object)->tp_name; }

PyObject* interned(const char* name) {
    PyObject* text = PyUnicode_InternFromString(name);
    if (text == nullptr) throw py::error_already_set();
    return text;
}

// What object.method() returns; null, without an error, if that fails.
py::object result_of(PyObject* object, PyObject* method) {
    PyObject* result = PyObject_CallMethodNoArgs(object, method);
    if (result == nullptr) PyErr_Clear();
    return py::reinterpret_steal<py::object>(result);
}

}  // namespace

void Value::refuse(const std::string& message) const {
    const std::string element = index_ < 0 ? "" : "[" + std::to_string(index_) + "]";
    throw py::type_error(call_->function() + ": argument '" + name_ + element + "': " + message);
}

void Value::expected(const char* kind) const {
    PyErr_Clear();
    refuse(std::string("expected ") + kind + ", got " + kind_of(object_));
}

void* Value::address() const {
    static PyObject* const data_ptr = interned("data_ptr");
    const py::object number = result_of(object_, data_ptr);
    if (!number || !PyLong_Check(number.ptr())) expected("a tensor with memory of its own");
    return PyLong_AsVoidPtr(number.ptr());
}

std::int64_t Value::integer() const {
    const std::int64_t value = PyLong_AsLongLong(object_);
    if (value == -1 && PyErr_Occurred() != nullptr) expected("an integer");
    return value;
}

double Value::number() const {
    const double value = PyFloat_AsDouble(object_);
    if (value == -1 && PyErr_Occurred() != nullptr) expected("a number");
    return value;
}

bool Value::flag() const {
    if (!PyBool_Check(object_)) expected("a bool");
    return object_ == Py_True;
}

DType Value::dtype() const {
    const std::int64_t number = integer();
    if (number < 0 || number >= kDTypes) refuse("expected the number of a dtype, got " + std::to_string(number));
    return DType(number);
}

Array Value::array() const {
    static PyObject* const stride = interned("stride");
    const py::object strides = result_of(object_, stride);
    if (!strides || !PyTuple_Check(strides.ptr())) expected("a tensor");
    Array result{address(), int(PyTuple_GET_SIZE(strides.ptr())), {}};
    if (result.dims > kMaxDims) {
        refuse("expected at most " + std::to_string(kMaxDims) + " dimensions, got " + std::to_string(result.dims));
    }
    for (int i = 0; i < result.dims; ++i) {
        result.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), i));
    }
    if (PyErr_Occurred() != nullptr) expected("a tensor");
    return result;
}

Array Value::array(int dims) const {
    const Array result = array();
    if (result.dims != dims) {
        refuse("expected " + std::to_string(dims) + " dimensions, got " + std::to_string(result.dims));
    }
    return result;
}

void* Value::memory(int dims) const {
    static PyObject* const dim = interned("dim");
    const py::object number = result_of(object_, dim);
    if (!number || !PyLong_Check(number.ptr())) expected("a tensor");
    const long given = PyLong_AsLong(number.ptr());
    if (given != dims) refuse("expected " + std::to_string(dims) + " dimensions, got " + std::to_string(given));
    return address();
}

void* Value::memory_or_null(int dims) const { return is_none() ? nullptr : memory(dims); }

int Value::size() const {
    if (!PyList_Check(object_) && !PyTuple_Check(object_)) expected("a list");
    return int(PySequence_Fast_GET_SIZE(object_));
}

void Value::check_size(int count) const {
    const int given = size();
    if (given != count) refuse("expected " + std::to_string(count) + " elements, got " + std::to_string(given));
}

Arguments::Arguments(PyObject* function, PyObject* const* values, Py_ssize_t positional, PyObject* names)
    : function_(function), values_(values), names_(names), count_(names == nullptr ? 0 : PyTuple_GET_SIZE(names)) {
    if (positional != 0) {
        throw py::type_error(this->function() + ": expected keyword arguments, got " + std::to_string(positional) +
                             " without a name");
    }
    if (count_ > 64) throw py::type_error(this->function() + ": more than 64 arguments");
}

std::string Arguments::function() const { return py::str(py::handle(function_)); }

Value Arguments::operator[](const char* name) {
    for (Py_ssize_t i = 0; i < count_; ++i) {
        const Py_ssize_t index = next_ + i < count_ ? next_ + i : next_ + i - count_;
        if (PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names_, index), name) != 0) continue;
        next_ = index + 1;
        read_ |= std::uint64_t(1) << index;
        return Value(this, name, values_[index]);
    }
    throw py::type_error(function() + ": argument '" + name + "' is missing");
}

void Arguments::finish() const {
    for (Py_ssize_t i = 0; i < count_; ++i) {
        if ((read_ >> i & 1) != 0) continue;
        const std::string name = py::str(py::handle(PyTuple_GET_ITEM(names_, i)));
        throw py::type_error(function() + ": there is no argument '" + name + "'");
    }
}

CudaQueue queue_of(Arguments& in) {
    const auto device = int(in["device"].integer());
    return {device, reinterpret_cast<void*>(in["stream"].integer())};
}

void add_function(py::module_& module, const char* name, const char* doc, _PyCFunctionFastWithKeywords function) {
    // Python keeps the pointer as long as the function, which is as long as the process.
    auto* method = new PyMethodDef{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
                                   METH_FASTCALL | METH_KEYWORDS, doc};
    PyObject* object = PyCFunction_NewEx(method, py::str(name).release().ptr(), nullptr);
    if (object == nullptr) throw py::error_already_set();
    module.add_object(name, py::reinterpret_steal<py::object>(object));
}

void set_python_error() noexcept {
    try {
        throw;
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const py::builtin_exception& error) {
        error.set_error();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    } catch (...) {
        PyErr_SetString(PyExc_RuntimeError, "an unknown C++ exception");
    }
}

}  // namespace shike
