// Graph: the columns of machine.h in, builtins of Python out. A string is decoded once, however often it is met.
#include "module_graph.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "extent.h"
#include "machine.h"
#include "module_bytes.h"

namespace zipslicer {
namespace {

namespace py = pybind11;

// Takes a new reference from the C API; null means that a Python error is set.
py::object owned(PyObject* made) {
  if (made == nullptr) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(made);
}

template <typename T>
py::object column(const Column<T>& rows) {
  return owned(PyBytes_FromStringAndSize(reinterpret_cast<const char*>(rows.data()),
                                         static_cast<Py_ssize_t>(rows.size() * sizeof(T))));
}

// A list of n, whose items make(i) returns as new references.
template <typename Make>
py::object list_of(std::size_t n, Make make) {
  py::object list = owned(PyList_New(static_cast<Py_ssize_t>(n)));
  for (std::size_t i = 0; i < n; ++i) {
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), make(i).release().ptr());
  }
  return list;
}

// The texts of a graph as Python strings, each made at its first use.
class Strings {
 public:
  explicit Strings(const Column<Text>& texts) : texts_(texts), made_(texts.size()) {}

  py::object operator[](std::size_t index) {
    py::object& made = made_[index];
    if (!made) {
      made = decode(texts_[index]);
    }
    return made;
  }

  // Not tracked by the garbage collector: in a list of strings is no cycle, and to walk over ten thousand that nobody
  // has looked at yet took it a millisecond.
  py::object list(const Column<std::size_t>& indices) {
    py::object made = list_of(indices.size(), [&](std::size_t i) { return (*this)[indices[i]]; });
    PyObject_GC_UnTrack(made.ptr());
    return made;
  }

 private:
  static py::object decode(const Text& text) {
    const auto nbytes = static_cast<Py_ssize_t>(text.utf8().size);
    const char* const utf8 = text.utf8().text().data();
    if (!text.ascii() || nbytes <= 1) {  // Python keeps one of each string of a single character
      return owned(PyUnicode_DecodeUTF8(utf8, nbytes, "surrogatepass"));
    }
    py::object made = owned(PyUnicode_New(nbytes, 127));
    std::memcpy(PyUnicode_1BYTE_DATA(made.ptr()), utf8, text.utf8().size);
    return made;
  }

  const Column<Text>& texts_;
  std::vector<py::object> made_;
};

// A list of make(value) for each value; one that is met again, by the memo, is the same object again and takes no
// memory.
template <typename T, typename Place, typename Make>
py::object shared_list(const Column<T>& values, Place place, Make make) {
  std::vector<std::size_t> order(values.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    const Span left = place(values[a]);
    const Span right = place(values[b]);
    return std::tie(left.data, left.size) < std::tie(right.data, right.size);
  });
  std::vector<py::object> made(values.size());
  for (std::size_t i = 0; i < order.size(); ++i) {
    const std::size_t at = order[i];
    const Span span = place(values[at]);
    const bool again =
        i != 0 && place(values[order[i - 1]]).data == span.data && place(values[order[i - 1]]).size == span.size;
    made[at] = again ? made[order[i - 1]] : make(values[at]);
  }
  return list_of(values.size(), [&](std::size_t i) { return made[i]; });
}

py::object bytes_of(Span span) {
  return owned(PyBytes_FromStringAndSize(span.text().data(), static_cast<Py_ssize_t>(span.size)));
}

// All storage keys, one after the other: strings that nobody may ask for are not made.
py::object joined_keys(const Graph& graph) {
  py::object made = owned(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(graph.keys_nbytes)));
  char* to = PyBytes_AS_STRING(made.ptr());
  for (std::size_t i = 0; i < graph.storage_keys.size(); ++i) {
    const std::string_view key = graph.texts[graph.storage_keys[i]].utf8().text();
    to = std::copy(key.begin(), key.end(), to);
  }
  return made;
}

py::object integer_of(const Long& number) {
  if (number.decimal) {
    return owned(PyLong_FromString(std::string(number.digits.text()).c_str(), nullptr, 10));
  }
  const auto int_type = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(&PyLong_Type));
  return int_type.attr("from_bytes")(bytes_of(number.digits), "little", py::arg("signed") = true);
}

constexpr std::size_t kHugeFrom = std::size_t{1} << 20;  // bytes of columns; below, a huge page would be mostly empty

// Columns as read-only buffers. Many bytes of them stand in one piece of memory on huge pages, where making them costs
// one page fault instead of hundreds; each is a view of it, and keeps it alive.
class Columns {
 public:
  explicit Columns(std::size_t nbytes) {
    if (nbytes >= kHugeFrom) {
      auto memory = std::make_unique<Memory>(rounded_up(nbytes, kHugePage));
      data_ = memory->data();
      whole_ = py::memoryview(py::cast(std::move(memory)));
    }
  }

  template <typename T>
  py::object operator()(const Column<T>& rows) {
    const std::size_t nbytes = rows.size() * sizeof(T);
    if (data_ == nullptr) {
      return column(rows);
    }
    if (nbytes != 0) {
      std::memcpy(data_ + used_, rows.data(), nbytes);
    }
    const py::slice part(static_cast<py::ssize_t>(used_), static_cast<py::ssize_t>(used_ + nbytes), 1);
    used_ += nbytes;
    return whole_[part].attr("toreadonly")();
  }

 private:
  py::object whole_;
  unsigned char* data_ = nullptr;
  std::size_t used_ = 0;
};

template <typename... T>
std::size_t nbytes_of(const Column<T>&... columns) {
  return (... + (columns.size() * sizeof(T)));
}

py::tuple graph_to_python(const Graph& graph) {
  Strings strings(graph.texts);
  Columns columns(nbytes_of(graph.payloads, graph.nodes, graph.storages, graph.tensors, graph.dims));
  return py::make_tuple(
      column(graph.kinds), columns(graph.payloads), columns(graph.nodes), strings.list(graph.strings),
      shared_list(
          graph.blobs, [](const Span& blob) { return blob; }, bytes_of),
      shared_list(
          graph.longs, [](const Long& number) { return number.digits; }, integer_of),
      list_of(graph.globals.size() / 2,
              [&](std::size_t i) -> py::object {
                return py::make_tuple(strings[graph.globals[2 * i]], strings[graph.globals[2 * i + 1]]);
              }),
      columns(graph.storages), joined_keys(graph), strings.list(graph.locations), columns(graph.tensors),
      columns(graph.dims), graph.nbytes);
}

// The UTF-8 of a Python string, which `keep` holds if the string does not.
std::string_view letters(PyObject* text, std::string* keep) {
  Py_ssize_t nbytes = 0;
  const char* const utf8 = PyUnicode_AsUTF8AndSize(text, &nbytes);
  if (utf8 != nullptr) {
    return {utf8, static_cast<std::size_t>(nbytes)};
  }
  if (PyErr_ExceptionMatches(PyExc_UnicodeEncodeError) == 0) {
    throw py::error_already_set();
  }
  PyErr_Clear();  // a lone surrogate
  const py::object bytes = owned(PyUnicode_AsEncodedString(text, "utf-8", "surrogatepass"));
  keep->assign(PyBytes_AS_STRING(bytes.ptr()), static_cast<std::size_t>(PyBytes_GET_SIZE(bytes.ptr())));
  return *keep;
}

// Copies the table: with the GIL released, or without one, other threads may change it.
Actions actions_of(const py::object& mapping) {
  const auto table = py::reinterpret_borrow<py::dict>(owned(PyDict_Copy(py::dict(mapping).ptr())));
  Actions actions(table.size());
  std::string keep[2];
  for (const auto& [key, value] : table) {
    if (PyTuple_CheckExact(key.ptr()) == 0 || PyTuple_GET_SIZE(key.ptr()) != 2) {
      throw py::type_error("the keys of actions must be pairs of strings");
    }
    const unsigned long long action = PyLong_AsUnsignedLongLong(value.ptr());
    if (PyErr_Occurred() != nullptr) {
      throw py::error_already_set();
    }
    if (action > 0xFFFFFFFF) {
      throw py::value_error("an action has 32 bits");
    }
    actions.add(letters(PyTuple_GET_ITEM(key.ptr(), 0), &keep[0]), letters(PyTuple_GET_ITEM(key.ptr(), 1), &keep[1]),
                static_cast<std::uint32_t>(action));
  }
  return actions;
}

Limits limits_of(const py::sequence& limits) {
  if (limits.size() != 7) {
    throw py::value_error("limits must be the seven of backend.Limits");
  }
  const auto limit = [&](std::size_t i) { return limits[i].cast<std::int64_t>(); };
  return {limit(0), limit(1), limit(2), limit(3), limit(4), limit(5) != 0, limit(6)};
}

}  // namespace

py::tuple scan_pickle_to_python(const py::object& program, const py::object& actions, const py::sequence& limits) {
  // What others can write to may change under us while the GIL is released: it is copied first.
  py::object copy;
  Span bytes = fixed_span(program);
  if (bytes.data == nullptr) {
    copy = PyBytes_CheckExact(program.ptr()) != 0 ? program : owned(PyBytes_FromObject(program.ptr()));
    bytes = Span(PyBytes_AS_STRING(copy.ptr()), static_cast<std::size_t>(PyBytes_GET_SIZE(copy.ptr())));
  }
  const Actions known = actions_of(actions);
  const Limits checked = limits_of(limits);
  const Graph graph = [&] {
    const py::gil_scoped_release released;
    return scan_pickle(bytes, known, checked);
  }();
  return graph_to_python(graph);
}

}  // namespace zipslicer
