// Module: the map. Binds the functions of backend.Backend, releases the GIL, and turns Error into zipslicer.errors.
//
// Safe without a GIL: nothing here is global but names, bytes do not change, and of `entries` only
// payload_offset is written, atomically.
#include <pybind11/pybind11.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "bytes.h"
#include "directory.h"
#include "extent.h"
#include "machine.h"
#include "module_bytes.h"
#include "module_graph.h"

namespace zipslicer {
namespace {

namespace py = pybind11;

// Bytes; from here on what read_bytes reads stands on huge pages. One of them is cleared in the time of a hundred page
// faults.
constexpr std::size_t kFixedFrom = std::size_t{1} << 20;
constexpr std::size_t kEntriesFrom = std::size_t{512} << 10;  // the same of entries
// Bytes; from here on a buffer is Memory, below a bytearray. The least that Memory puts on a huge page.
constexpr std::size_t kLargeFrom = kHugePage - kHugePage / 21;
constexpr std::int64_t kSmallTo = 16 << 10;  // bytes; up to here a cached read is shorter than handing the GIL over

// ---- errors ----

// Written once, by the import.
std::string package;              // of zipslicer.errors
PyObject* handle_name = nullptr;  // of the attributes of a source
PyObject* stamp_name = nullptr;

const char* class_of(Blame blame) {
  switch (blame) {
    case Blame::archive: return "ArchiveError";
    case Blame::program: return "ProgramError";
    case Blame::table: return "TableError";
    case Blame::changed: return "ChangedError";
    case Blame::unsupported: return "UnsupportedError";
    case Blame::unsafe: return "UnsafeError";
  }
  return "ZipSlicerError";
}

// Names out of the file are any bytes in a message; a global's name is UTF-8 in which surrogates may be encoded.
py::object decoded(const std::string& text, const char* errors = "backslashreplace") {
  PyObject* made = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), errors);
  if (made == nullptr) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(made);
}

void set_error(const Error& error) {
  const py::object type = py::module_::import((package + ".errors").c_str()).attr(class_of(error.blame));
  py::dict where;
  if (error.offset != kNoOffset) {
    where["offset"] = error.offset;
  }
  if (error.blame == Blame::unsafe) {
    where["global_name"] = decoded(error.global_name, "surrogatepass");
  }
  PyErr_SetObject(type.ptr(), type(decoded(error.what()), **where).ptr());
}

void set_system_error(const std::system_error& error) {
  errno = error.code().value();
  PyErr_SetFromErrno(PyExc_OSError);
}

// For pybind11, which translates the rest.
void translate(std::exception_ptr thrown) {
  try {
    std::rethrow_exception(thrown);
  } catch (const Error& error) {
    set_error(error);
  } catch (const std::system_error& error) {
    set_system_error(error);
  }
}

// For a function that pybind11 does not wrap. Always returns null, with a Python error set.
PyObject* translate_all() noexcept {
  try {
    try {
      throw;
    } catch (const Error& error) {
      set_error(error);
    } catch (const std::system_error& error) {
      set_system_error(error);
    }
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::out_of_range& error) {
    PyErr_SetString(PyExc_IndexError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// ---- arguments ----

Span span_of(const py::handle& bytes) {
  if (PyBytes_Check(bytes.ptr()) != 0) {
    return {PyBytes_AS_STRING(bytes.ptr()), static_cast<std::size_t>(PyBytes_GET_SIZE(bytes.ptr()))};
  }
  const Span fixed = fixed_span(bytes);
  if (fixed.data == nullptr) {
    throw py::type_error("bytes are wanted here");
  }
  return fixed;
}

std::int64_t integer_of(const py::handle& number) {
  const long long value = PyLong_AsLongLong(number.ptr());
  if (value == -1 && PyErr_Occurred() != nullptr) {
    throw py::error_already_set();
  }
  return value;
}

// A writable buffer, held for the time of a call: neither freed nor moved meanwhile.
class View {
 public:
  explicit View(const py::handle& buffer) {
    if (PyObject_GetBuffer(buffer.ptr(), &view_, PyBUF_SIMPLE) != 0) {
      throw py::error_already_set();
    }
    if (view_.readonly != 0 && view_.len != 0) {  // b"" may stand for "none"
      PyBuffer_Release(&view_);
      throw py::buffer_error("the buffer is read-only");
    }
  }
  View(View&& other) noexcept : view_(other.view_) { other.view_.obj = nullptr; }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  View& operator=(View&&) = delete;
  ~View() { PyBuffer_Release(&view_); }

  [[nodiscard]] Destination destination() const {
    return {static_cast<unsigned char*>(view_.buf), static_cast<std::size_t>(view_.len)};
  }

 private:
  Py_buffer view_{};
};

class Views {
 public:
  // The tuple is a copy: another thread may change a list.
  explicit Views(const py::tuple& buffers) {
    views_.reserve(buffers.size());
    destinations.reserve(buffers.size());
    for (const py::handle& buffer : buffers) {
      views_.emplace_back(buffer);
      destinations.push_back(views_.back().destination());
    }
  }

  std::vector<Destination> destinations;

 private:
  std::vector<View> views_;
};

// A buffer of rows of int64, held for the time of a call.
template <typename T>
class Rows {
 public:
  explicit Rows(const py::handle& buffer) {
    if (PyObject_GetBuffer(buffer.ptr(), &view_, PyBUF_SIMPLE) != 0) {
      throw py::error_already_set();
    }
    if (static_cast<std::size_t>(view_.len) % sizeof(T) != 0 ||
        (view_.len != 0 && reinterpret_cast<std::uintptr_t>(view_.buf) % alignof(T) != 0)) {
      PyBuffer_Release(&view_);
      throw std::invalid_argument("this is not made of whole rows of int64");
    }
    count_ = static_cast<std::size_t>(view_.len) / sizeof(T);
  }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;
  ~Rows() { PyBuffer_Release(&view_); }

  [[nodiscard]] std::size_t count() const { return count_; }
  [[nodiscard]] const T& at(std::int64_t number) const { return *run(number, 1); }

  [[nodiscard]] const T* run(std::int64_t start, std::size_t count) const {
    if (start < 0 || static_cast<std::uint64_t>(start) > count_ || count > count_ - static_cast<std::size_t>(start)) {
      throw std::out_of_range("no such row");
    }
    return static_cast<const T*>(view_.buf) + start;
  }

 private:
  Py_buffer view_{};
  std::size_t count_ = 0;
};

// `entries` as parse_directory made it, of the directory `block`.
class ArchiveView {
 public:
  ArchiveView(const py::handle& block, const py::handle& entries) : view_(entries) {
    const Destination rows = view_.destination();
    // Memory of no bytes may lie anywhere: that of an empty bytearray of Python 3.13 does.
    if (rows.nbytes % sizeof(Entry) != 0 ||
        (rows.nbytes != 0 && reinterpret_cast<std::uintptr_t>(rows.data) % alignof(Entry) != 0)) {
      throw std::invalid_argument("entries were not made by parse_directory");
    }
    archive = {span_of(block), reinterpret_cast<Entry*>(rows.data), rows.nbytes / sizeof(Entry)};
  }

  Archive archive;

 private:
  View view_;
};

// False for the empty stamp of a source without one.
bool stamp_of(const py::handle& bytes, Stamp& stamp) {
  const Span span = span_of(bytes);
  if (span.size == 0) {
    return false;
  }
  if (span.size != sizeof stamp) {
    throw std::invalid_argument("a stamp is three int64");
  }
  std::memcpy(&stamp, span.data, sizeof stamp);
  return true;
}

std::vector<Job> jobs_of(const py::handle& bytes) {
  const Span span = span_of(bytes);
  if (span.size % sizeof(Job) != 0) {
    throw std::invalid_argument("a job is five int64");
  }
  std::vector<Job> jobs(span.size / sizeof(Job));
  if (!jobs.empty()) {
    std::memcpy(jobs.data(), span.data, span.size);
  }
  return jobs;
}

// ---- readers ----

// A Python object with preadv(buffers, offset). Lives and works with the GIL held.
class PyReader final : public Reader {
 public:
  explicit PyReader(const py::handle& handle) : preadv_(handle.attr("preadv")) {}

  std::size_t preadv(const iovec* parts, int count, std::uint64_t offset) override {
    Loan loan;
    for (int i = 0; i < count; ++i) {
      loan.add(parts[i]);
    }
    const std::int64_t got = integer_of(preadv_(loan.views, offset));
    if (got < 0 || static_cast<std::uint64_t>(got) > loan.nbytes) {
      throw std::runtime_error("preadv returned " + std::to_string(got) + " for buffers of " +
                               std::to_string(loan.nbytes) + " bytes");
    }
    return static_cast<std::size_t>(got);
  }

 private:
  // Memory lent to Python for one call: whoever keeps a view longer finds it released.
  struct Loan {
    Loan() = default;
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;
    ~Loan() {
      py::error_scope kept;  // an error may be on its way
      for (const py::handle& view : views) {
        if (PyObject* none = PyObject_CallMethod(view.ptr(), "release", nullptr)) {
          Py_DECREF(none);
        } else {
          PyErr_WriteUnraisable(view.ptr());
        }
      }
    }

    void add(const iovec& part) {
      if (part.iov_len == 0) {
        return;
      }
      PyObject* view = PyMemoryView_FromMemory(static_cast<char*>(part.iov_base), static_cast<Py_ssize_t>(part.iov_len),
                                               PyBUF_WRITE);
      if (view == nullptr) {
        throw py::error_already_set();
      }
      views.append(py::reinterpret_steal<py::object>(view));
      nbytes += part.iov_len;
    }

    py::list views;
    std::size_t nbytes = 0;
  };

  py::object preadv_;
};

int descriptor_of(const py::handle& handle) {
#ifdef _WIN32
  static_cast<void>(handle);
  throw py::type_error("file descriptors cannot be read at a position here: pass an object with preadv");
#else
  const std::int64_t fd = integer_of(handle);
  if (fd < 0 || fd > std::numeric_limits<int>::max()) {
    throw std::system_error(EBADF, std::generic_category());
  }
  return static_cast<int>(fd);
#endif
}

bool is_descriptor(const py::handle& handle) {
  return PyLong_Check(handle.ptr()) != 0 || PyTuple_Check(handle.ptr()) != 0;
}

#ifndef _WIN32
void poll_signals() {
  const py::gil_scoped_acquire held;
  if (PyErr_CheckSignals() != 0) {
    throw py::error_already_set();
  }
}

// Of a handle that is a descriptor, or two.
struct Descriptors {
  explicit Descriptors(const py::handle& handle) : direct_fd(-1) {
    if (PyTuple_Check(handle.ptr()) == 0) {
      fd = descriptor_of(handle);
      return;
    }
    const auto both = py::reinterpret_borrow<py::tuple>(handle);
    if (both.size() != 2) {
      throw py::type_error("a handle is a descriptor, two of them, or an object with preadv");
    }
    fd = descriptor_of(both[0]), direct_fd = descriptor_of(both[1]);
  }

  int fd;
  int direct_fd;
};
#endif

// Calls read(reader, poll) with the GIL released if the handle is a descriptor, and held if it is an object.
template <typename Read>
void with_reader(const py::handle& handle, const Stamp* stamp, Read read) {
  if (!is_descriptor(handle)) {
    PyReader reader(handle);
    read(reader, Poll());
    return;
  }
#ifdef _WIN32
  static_cast<void>(descriptor_of(handle)), static_cast<void>(stamp), static_cast<void>(read);
#else
  const Descriptors fds(handle);
  PosixReader reader(fds.fd, fds.direct_fd, stamp);
  const py::gil_scoped_release released;
  read(reader, Poll(poll_signals));
#endif
}

// ---- memory ----

py::object new_bytearray(std::size_t nbytes) {
  PyObject* made = PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(nbytes));
  if (made == nullptr) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(made);
}

// A new buffer and where its bytes are. A large one is a memoryview, so that no class of ours crosses the seam.
struct NewBuffer {
  explicit NewBuffer(std::int64_t nbytes) {
    if (nbytes < 0) {
      throw std::invalid_argument("a buffer of " + std::to_string(nbytes) + " bytes");
    }
    if (static_cast<std::uint64_t>(nbytes) > static_cast<std::uint64_t>(PY_SSIZE_T_MAX)) {
      throw std::bad_alloc();
    }
    to.nbytes = static_cast<std::size_t>(nbytes);
    if (to.nbytes < kLargeFrom) {
      object = new_bytearray(to.nbytes);
      to.data = reinterpret_cast<unsigned char*>(PyByteArray_AS_STRING(object.ptr()));
      return;
    }
    auto memory = std::make_unique<Memory>(to.nbytes);
    to.data = memory->data();
    object = py::memoryview(py::cast(std::move(memory)));
  }

  py::object object;
  Destination to;
};

py::object allocate(std::int64_t nbytes) { return NewBuffer(nbytes).object; }

// ---- reads ----

py::object read_bytes_of(const py::object& handle, std::int64_t offset, std::int64_t nbytes) {
  if (offset < 0 || nbytes < 0) {
    throw std::invalid_argument("an offset or a length is negative");
  }
  const auto size = static_cast<std::size_t>(nbytes);
  const auto fill = [&](unsigned char* to) {
    const std::vector<Extent> extents{{static_cast<std::uint64_t>(offset), {to, size}}};
    with_reader(handle, nullptr, [&](Reader& reader, const Poll& poll) { read_extents(reader, extents, 1, poll); });
  };
  if (size >= kFixedFrom) {
    auto fixed = std::make_unique<Fixed>(size);
    fill(fixed->data());
    return py::memoryview(py::cast(std::move(fixed)));
  }
  PyObject* const made = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(nbytes));
  if (made == nullptr) {
    throw py::error_already_set();
  }
  auto bytes = py::reinterpret_steal<py::object>(made);
  fill(reinterpret_cast<unsigned char*>(PyBytes_AS_STRING(made)));
  return bytes;
}

void read_records_of(const py::object& handle, const py::object& stamp, const py::object& block,
                     const py::object& entries, const py::object& jobs, const py::iterable& buffers, int threads) {
  Stamp opened;
  const bool stamped = stamp_of(stamp, opened);
  const ArchiveView view(block, entries);
  const std::vector<Job> wanted = jobs_of(jobs);
  const Views views{py::tuple(buffers)};
  with_reader(handle, stamped ? &opened : nullptr, [&](Reader& reader, const Poll& poll) {
    read_records(reader, view.archive, wanted, views.destinations, threads, poll);
  });
}

// A small read, from the page cache without giving up the GIL where all of it is there.
void read_small(const py::handle& handle, const Stamp* stamp, const Archive& archive, std::size_t record,
                std::int64_t start, Destination to) {
#ifndef _WIN32
  if (to.nbytes <= static_cast<std::size_t>(kSmallTo) && is_descriptor(handle) &&
      read_record_cached(PosixReader(Descriptors(handle).fd, -1, stamp), archive, record, start, to)) {
    return;
  }
#endif
  with_reader(handle, stamp,
              [&](Reader& reader, const Poll& poll) { read_record(reader, archive, record, start, to, poll); });
}

py::object read_record_of(PyObject* const* arguments) {
  Stamp opened;
  const Stamp* const stamp = stamp_of(arguments[1], opened) ? &opened : nullptr;
  const ArchiveView view(arguments[2], arguments[3]);
  const auto record = static_cast<std::size_t>(integer_of(arguments[4]));
  const std::int64_t start = integer_of(arguments[5]);
  const std::int64_t nbytes = integer_of(arguments[6]);
  check_range(view.archive, record, start, nbytes);  // before memory is taken
  NewBuffer buffer(nbytes);
  read_small(arguments[0], stamp, view.archive, record, start, buffer.to);
  return std::move(buffer.object);
}

py::tuple tuple_of(const std::int64_t* numbers, std::size_t count) {
  py::tuple made(count);
  for (std::size_t i = 0; i < count; ++i) {
    made[i] = numbers[i];
  }
  return made;
}

py::object owned(PyObject* made) {
  if (made == nullptr) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(made);
}

// A tensor whose memory is to be filled, and that memory.
struct NewTensor {
  py::object object;
  Destination to{nullptr, 0};
};

// What backend.Maker makes; null for none, where a row is to be read in another way.
NewTensor make(const py::handle& maker, std::int64_t dtype, const py::tuple& sizes, const py::tuple& strides,
               std::size_t size) {
  if (PyTuple_Check(maker.ptr()) == 0 || PyTuple_GET_SIZE(maker.ptr()) != 6) {
    throw py::type_error("a maker is the six of backend.Maker");
  }
  PyObject* const* const parts = &PyTuple_GET_ITEM(maker.ptr(), 0);
  PyObject* const wanted = PyList_GetItem(parts[3], static_cast<Py_ssize_t>(dtype));
  if (wanted == nullptr) {
    throw py::error_already_set();
  }
  if (wanted == Py_None) {
    return {};
  }
  PyObject* const arguments[] = {sizes.ptr(), strides.ptr(), wanted, parts[2]};
  py::object made = owned(PyObject_Vectorcall(parts[0], arguments, 2, parts[1]));
  if (reinterpret_cast<PyObject*>(Py_TYPE(made.ptr())) != parts[4]) {
    return {};  // a mode of torch is on, under which it makes other things
  }
  const py::object address = owned(PyObject_CallOneArg(parts[5], made.ptr()));
  void* const memory = PyLong_AsVoidPtr(address.ptr());
  if (memory == nullptr) {
    if (PyErr_Occurred() != nullptr) {
      throw py::error_already_set();
    }
    return {};
  }
  return {std::move(made), {static_cast<unsigned char*>(memory), size}};
}

// A backend.Hot, held for the time of a call.
class HotView {
 public:
  explicit HotView(const py::handle& hot)
      : parts_(parts_of(hot)),
        handle(owned(PyObject_GetAttr(parts_[0], handle_name))),
        view_(parts_[1], parts_[2]),
        rows_(parts_[5]),
        dims_(parts_[6]),
        direct_(parts_[7]),
        limit_(integer_of(parts_[8])) {
    const py::object bytes = owned(PyObject_GetAttr(parts_[0], stamp_name));
    stamped_ = stamp_of(bytes, stamp_);
  }

  // The row that `value` means, by backend.Backend.read_tensor; -1 for a value that is no tensor.
  [[nodiscard]] std::int64_t row_of(std::int64_t value) const {
    if (value < 0) {
      return ~value;
    }
    const Rows<unsigned char> kinds(parts_[3]);
    if (kinds.at(value) != static_cast<unsigned char>(Kind::tensor)) {
      return -1;
    }
    return Rows<std::int64_t>(parts_[4]).at(value);
  }

  [[nodiscard]] const TensorRow& row(std::int64_t number) const { return rows_.at(number); }

  // Where the bytes of a row are, for one that read_tensor is for; else with a record below 0.
  [[nodiscard]] Job job(const TensorRow& row) const {
    const std::int64_t record = direct_.at(row.storage);
    if (record < 0 || row.flags != 0 || row.extent <= 0 || row.itemsize <= 0 || row.extent >= limit_ / row.itemsize) {
      return {-1, 0, 0, 0, 0};
    }
    const Job found{record, row.storage_offset * row.itemsize, row.extent * row.itemsize, 0, 0};
    check_range(view_.archive, static_cast<std::size_t>(record), found.start, found.nbytes);
    return found;
  }

  // Whether makers are not to be asked.
  [[nodiscard]] bool is_off() const {
    return parts_[9] != Py_None && owned(PyObject_CallNoArgs(parts_[10])).ptr() == Py_True;
  }

  // Memory for a row, and what read_tensor returns for it; null for none.
  [[nodiscard]] NewTensor made(const TensorRow& row, std::int64_t nbytes) const {
    const auto ndim = static_cast<std::size_t>(row.ndim);
    const std::int64_t* const shape = dims_.run(row.dims, 2 * ndim);
    const py::tuple sizes = tuple_of(shape, ndim);
    const py::tuple strides = tuple_of(shape + ndim, ndim);
    if (parts_[9] == Py_None) {
      NewBuffer buffer(nbytes);
      return {py::make_tuple(std::move(buffer.object), row.dtype, sizes, strides), buffer.to};
    }
    std::uint64_t extent = 1;  // unsigned, which may wrap: no row that scan_pickle made does
    for (std::size_t dim = 0; dim < ndim; ++dim) {
      extent += (static_cast<std::uint64_t>(shape[dim]) - 1) * static_cast<std::uint64_t>(shape[ndim + dim]);
    }
    if (extent != static_cast<std::uint64_t>(row.extent)) {  // of so many elements the memory will be
      throw std::invalid_argument("the extent of a row is not that of its sizes and strides");
    }
    return make(parts_[9], row.dtype, sizes, strides, static_cast<std::size_t>(nbytes));
  }

  [[nodiscard]] const Archive& archive() const { return view_.archive; }
  [[nodiscard]] const Stamp* stamp() const { return stamped_ ? &stamp_ : nullptr; }
  [[nodiscard]] std::size_t storage_count() const { return direct_.count(); }

 private:
  static PyObject* const* parts_of(const py::handle& hot) {
    if (PyTuple_Check(hot.ptr()) == 0 || PyTuple_GET_SIZE(hot.ptr()) != 11) {
      throw py::type_error("a hot is the eleven of backend.Hot");
    }
    return &PyTuple_GET_ITEM(hot.ptr(), 0);
  }

  PyObject* const* parts_;

 public:
  const py::object handle;

 private:
  ArchiveView view_;
  Rows<TensorRow> rows_;
  Rows<std::int64_t> dims_;
  Rows<std::int64_t> direct_;
  std::int64_t limit_;
  Stamp stamp_{};
  bool stamped_;
};

// A backend.Hot and a value. The hot path, called once a small tensor.
py::object read_tensor_of(PyObject* const* arguments) {
  const HotView hot(arguments[0]);
  const std::int64_t number = hot.row_of(integer_of(arguments[1]));
  if (number < 0) {
    return py::none();
  }
  const TensorRow& row = hot.row(number);
  const Job job = hot.job(row);
  if (job.record < 0 || hot.is_off()) {
    return py::none();
  }
  NewTensor made = hot.made(row, job.nbytes);
  if (!made.object) {
    return py::none();
  }
  read_small(hot.handle, hot.stamp(), hot.archive(), static_cast<std::size_t>(job.record), job.start, made.to);
  return std::move(made.object);
}

// How many of the rows lie in each storage; two stands for more.
std::vector<unsigned char> uses_of(const HotView& hot, const py::list& numbers) {
  std::vector<unsigned char> uses(hot.storage_count());
  for (const py::handle& number : numbers) {
    unsigned char& count = uses.at(static_cast<std::size_t>(hot.row(integer_of(number)).storage));
    count = static_cast<unsigned char>(count < 2 ? count + 1 : 2);
  }
  return uses;
}

py::list read_tensors_of(const py::object& columns, const py::list& numbers, bool whole, int threads) {
  const HotView hot(columns);
  const std::size_t count = numbers.size();
  py::list found(count);
  std::vector<unsigned char> uses;
  if (whole) {
    uses = uses_of(hot, numbers);
  }
  std::vector<Job> jobs;
  std::vector<Destination> places;
  jobs.reserve(count), places.reserve(count);
  const bool is_off = hot.is_off();
  for (std::size_t i = 0; i < count; ++i) {
    const TensorRow& row = hot.row(integer_of(numbers[i]));
    Job job = hot.job(row);
    const bool shares = whole && job.record >= 0 &&
                        (uses[static_cast<std::size_t>(row.storage)] != 1 || job.start != 0 ||
                         job.nbytes != hot.archive().entries[job.record].nbytes);
    NewTensor made;
    if (job.record >= 0 && !shares && !is_off) {
      made = hot.made(row, job.nbytes);
    }
    if (!made.object) {
      found[i] = py::none();
      continue;
    }
    job.buffer = static_cast<std::int64_t>(places.size());
    jobs.push_back(job);
    places.push_back(made.to);
    found[i] = std::move(made.object);
  }
  with_reader(hot.handle, hot.stamp(), [&](Reader& reader, const Poll& poll) {
    read_records(reader, hot.archive(), jobs, places, threads, poll);
  });
  return found;
}

void read_runs_of(const py::object& handle, const py::object& stamp, const py::object& block, const py::object& entries,
                  std::size_t record, std::int64_t start, std::int64_t nbytes, const py::list& dims,
                  const py::object& buffer, int threads) {
  Stamp opened;
  const bool stamped = stamp_of(stamp, opened);
  const ArchiveView archive(block, entries);
  const View view(buffer);
  std::vector<Steps> steps;
  for (std::size_t i = 0; i + 1 < dims.size(); i += 2) {
    steps.push_back({integer_of(dims[i]), integer_of(dims[i + 1])});
  }
  with_reader(handle, stamped ? &opened : nullptr, [&](Reader& reader, const Poll& poll) {
    read_runs(reader, archive.archive, record, start, nbytes, steps, view.destination(), threads, poll);
  });
}

// Functions that take their arguments as an array. pybind11's wrapping would add 0.16 us to 1.1 us.
template <py::object (*read)(PyObject* const*), Py_ssize_t expected>
PyObject* raw(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t count) noexcept {
  try {
    if (count != expected) {
      throw py::type_error("this function takes " + std::to_string(expected) + " arguments");
    }
    return read(arguments).release().ptr();
  } catch (...) {
    return translate_all();
  }
}

// ---- the directory ----

py::tuple find_directory_of(const py::object& tail, std::uint64_t tail_offset, std::uint64_t base) {
  const Directory directory = [&] {
    const Span span = span_of(tail);
    const py::gil_scoped_release released;
    return find_directory(span, tail_offset, base);
  }();
  return py::make_tuple(directory.offset, directory.nbytes, directory.count);
}

py::tuple parse_directory_of(const py::object& block, std::uint64_t count, std::uint64_t offset, std::uint64_t base) {
  const Span span = span_of(block);
  // A larger count is refused by the parser before it needs more rows.
  const auto rows = static_cast<std::size_t>(std::min<std::uint64_t>(count, span.size / kCentralNbytes));
  const std::size_t nbytes = rows * sizeof(Entry);
  const bool is_large = nbytes >= kEntriesFrom;
  NewBuffer entries(static_cast<std::int64_t>(is_large ? rounded_up(nbytes, kHugePage) : nbytes));
  if (is_large) {
    entries.object = entries.object[py::slice(0, static_cast<py::ssize_t>(nbytes), 1)];
  }
  auto* const first = reinterpret_cast<Entry*>(entries.to.data);
  const std::size_t prefix_nbytes = [&] {
    const py::gil_scoped_release released;
    return parse_directory(span, count, offset, base, first);
  }();
  return py::make_tuple(std::move(entries.object), prefix_nbytes);
}

std::uint64_t parse_local_header_of(const py::bytes& head, const py::object& block, const py::object& entries,
                                    std::size_t record) {
  const ArchiveView view(block, entries);
  check_range(view.archive, record, 0, 0);
  return parse_local_header(span_of(head), view.archive.block, view.archive.entries[record]);
}

py::list find_records_of(const py::object& block, const py::object& entries, const py::bytes& prefix,
                         const py::bytes& names, const py::list& ends) {
  const ArchiveView view(block, entries);
  const Span letters = span_of(names);
  std::vector<Span> wanted;
  wanted.reserve(ends.size());
  std::size_t start = 0;
  for (const py::handle& end : ends) {
    const auto stop = static_cast<std::size_t>(integer_of(end));
    if (stop < start || stop > letters.size) {
      throw std::invalid_argument("a name ends outside the names");
    }
    wanted.push_back(letters.part(start, stop - start));
    start = stop;
  }
  const std::vector<std::int64_t> records =
      find_records(view.archive.block, view.archive.entries, view.archive.count, span_of(prefix), wanted);
  py::list found(records.size());
  for (std::size_t i = 0; i < records.size(); ++i) {
    found[i] = records[i];
  }
  PyObject_GC_UnTrack(found.ptr());  // in a list of integers is no cycle, and it may be long
  return found;
}

// ---- the module ----

template <py::object (*read)(PyObject* const*), Py_ssize_t expected>
PyMethodDef raw_method(const char* name, const char* signature) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(raw<read, expected>)), METH_FASTCALL,
          signature};
}

PyMethodDef raw_functions[] = {
    raw_method<read_record_of, 7>("read_record",
                                  "read_record($module, handle, stamp, block, entries, record, start, nbytes, /)"
                                  "\n--\n\n"),
    raw_method<read_tensor_of, 2>("read_tensor", "read_tensor($module, hot, value, /)\n--\n\n"),
    {nullptr, nullptr, 0, nullptr},
};

void bind_memory(py::module_& module) {
  py::class_<Memory>(module, "_Memory", py::buffer_protocol(), py::module_local()).def_buffer([](const Memory& memory) {
    return py::buffer_info(memory.data(), 1, "B", 1, {memory.nbytes()}, {std::size_t{1}});
  });
}

}  // namespace
}  // namespace zipslicer

PYBIND11_MODULE(_native, module, pybind11::mod_gil_not_used()) {
  namespace py = pybind11;
  using namespace zipslicer;

  const auto full_name = module.attr("__name__").cast<std::string>();
  package = full_name.substr(0, full_name.rfind('.'));
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    if (thrown) {
      translate(thrown);
    }
  });
  module.doc() = "The backend in C++. zipslicer/backend.py says what each function does.";
  module.attr("name") = "native";
  handle_name = PyUnicode_InternFromString("handle");
  stamp_name = PyUnicode_InternFromString("stamp");
  if (handle_name == nullptr || stamp_name == nullptr) {
    throw py::error_already_set();
  }

  bind_memory(module);
  bind_fixed(module);
  module.def("allocate", &allocate, py::arg("nbytes"), py::pos_only());
  module.def("read_bytes", &read_bytes_of, py::arg("handle"), py::arg("offset"), py::arg("nbytes"), py::pos_only());
  if (PyModule_AddFunctions(module.ptr(), raw_functions) != 0) {
    throw py::error_already_set();
  }
  module.def("read_records", &read_records_of, py::arg("handle"), py::arg("stamp"), py::arg("block"),
             py::arg("entries"), py::arg("jobs"), py::arg("buffers"), py::arg("threads"), py::pos_only());
  module.def("read_tensors", &read_tensors_of, py::arg("hot"), py::arg("numbers"), py::arg("whole"), py::arg("threads"),
             py::pos_only());
  module.def("read_runs", &read_runs_of, py::arg("handle"), py::arg("stamp"), py::arg("block"), py::arg("entries"),
             py::arg("record"), py::arg("start"), py::arg("nbytes"), py::arg("dims"), py::arg("buffer"),
             py::arg("threads"), py::pos_only());
  module.def("find_directory", &find_directory_of, py::arg("tail"), py::arg("tail_offset"), py::arg("base"),
             py::pos_only());
  module.def("parse_directory", &parse_directory_of, py::arg("block"), py::arg("count"), py::arg("offset"),
             py::arg("base"), py::pos_only());
  module.def("find_records", &find_records_of, py::arg("block"), py::arg("entries"), py::arg("prefix"),
             py::arg("names"), py::arg("ends"), py::pos_only());
  module.def("parse_local_header", &parse_local_header_of, py::arg("head"), py::arg("block"), py::arg("entries"),
             py::arg("record"), py::pos_only());
  module.def("scan_pickle", &scan_pickle_to_python, py::arg("program"), py::arg("actions"), py::arg("limits"),
             py::pos_only());
}
