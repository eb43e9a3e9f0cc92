#include "module_bytes.h"

namespace zipslicer {

namespace py = pybind11;

namespace {

PyTypeObject* fixed_type = nullptr;  // written once, by the import

}  // namespace

void bind_fixed(py::module_& module) {
  py::class_<Fixed> made(module, "_Fixed", py::buffer_protocol(), py::module_local());
  made.def_buffer([](const Fixed& fixed) {
    return py::buffer_info(fixed.data(), 1, "B", 1, {fixed.nbytes()}, {std::size_t{1}}, true);
  });
  fixed_type = reinterpret_cast<PyTypeObject*>(made.ptr());
}

Span fixed_span(const py::handle& view) {
  if (PyMemoryView_Check(view.ptr()) == 0) {
    return {};
  }
  const Py_buffer* const buffer = PyMemoryView_GET_BUFFER(view.ptr());
  if (buffer->obj == nullptr || Py_TYPE(buffer->obj) != fixed_type || PyBuffer_IsContiguous(buffer, 'C') == 0) {
    return {};
  }
  return {buffer->buf, static_cast<std::size_t>(buffer->len)};
}

}  // namespace zipslicer
