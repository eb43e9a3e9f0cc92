// Bytes: what the parsers read out of, seen from Python. Python's own bytes, or a view of Fixed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>

#include "bytes.h"
#include "extent.h"

namespace zipslicer {

// Many bytes of a file, on huge pages. Python sees them in read-only memoryviews alone, so that they stay as they were
// read, as bytes do; and they live as long as any of these.
class Fixed {
 public:
  explicit Fixed(std::size_t nbytes) : memory_(rounded_up(nbytes, kHugePage)), nbytes_(nbytes) {}

  [[nodiscard]] unsigned char* data() const { return memory_.data(); }
  [[nodiscard]] std::size_t nbytes() const { return nbytes_; }

 private:
  Memory memory_;
  std::size_t nbytes_;
};

void bind_fixed(pybind11::module_& module);

// What a memoryview shows, if it shows Fixed; null data otherwise.
Span fixed_span(const pybind11::handle& view);

}  // namespace zipslicer
