// The Python face of machine.h.
#pragma once

#include <pybind11/pybind11.h>

namespace zipslicer {

// backend.Backend.scan_pickle: a program, actions and limits in, the fields of backend.Graph out.
pybind11::tuple scan_pickle_to_python(const pybind11::object& program, const pybind11::object& actions,
                                      const pybind11::sequence& limits);

}  // namespace zipslicer
