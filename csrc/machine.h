// Machine: the bytes of a pickle in, a node graph in columns out. No object of the file's making is ever built.
//
// The twin of zipslicer/_pure/machine.py, which is the specification: for any input both give the same graph, or the
// same class of error at the same offset. No Python.h here, so that it can be fuzzed alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "arena.h"
#include "bytes.h"
#include "hash_index.h"

namespace zipslicer {

// Kinds of value; backend.py says what the payload of each is in a Graph.
enum class Kind : std::uint8_t {
  none = 0,
  false_ = 1,
  true_ = 2,
  int_ = 3,
  long_ = 4,
  float_ = 5,
  str = 6,
  bytes = 7,
  bytearray = 8,
  global = 9,
  storage = 10,
  tensor = 11,
  absent = 12,
  wide = 13,  // in the machine only: an int_ too large for its way of keeping values
  tuple = 16,
  list = 17,
  set = 18,
  frozenset = 19,
  dict = 20,
  ordered_dict = 21,
  call = 22,
  object = 23,
  typed = 24,
};

// What policy says of the globals it knows: Verb | dtype index << 8 | itemsize << 16 | traits << 24.
class Actions {
 public:
  explicit Actions(std::size_t count = 0);

  // A name that is there already keeps its first action.
  void add(std::string_view module, std::string_view name, std::uint32_t action);
  // Null for a stranger.
  [[nodiscard]] const std::uint32_t* find(std::string_view module, std::string_view name) const;

 private:
  struct Entry {
    std::size_t start;  // of the module in letters_; the name follows it
    std::size_t module_nbytes;
    std::size_t name_nbytes;
    std::uint32_t action;
  };

  [[nodiscard]] std::size_t number(std::uint64_t hash, std::string_view module, std::string_view name) const;

  std::string letters_;
  std::vector<Entry> entries_;
  HashIndex index_;
};

// What the machine refuses to exceed, as backend.Limits.
struct Limits {
  std::int64_t depth;
  std::int64_t dimensions;
  std::int64_t text_nbytes;
  std::int64_t long_nbytes;
  std::int64_t tuple_keys;
  bool refuse_unknown;
  std::int64_t dialect;  // of persistent ids: 0 ZIP archive, 1 stream, 2 tar
};

// A string of the program, always UTF-8 in which surrogates may be encoded (Python's "surrogatepass").
class Text {
 public:
  Text(Span utf8, bool ascii) : data_(utf8.data), size_(utf8.size << 1 | (ascii ? 1 : 0)) {}

  [[nodiscard]] Span utf8() const { return {data_, size_ >> 1}; }
  [[nodiscard]] bool ascii() const { return (size_ & 1) != 0; }

 private:
  const unsigned char* data_;
  std::size_t size_;  // in its upper bits: there are many of these
};

// An integer beyond 64 bits: little-endian two's complement, or decimal digits with an optional minus.
struct Long {
  Span digits;
  bool decimal;
};

// One row of Graph.tensors, as backend.TensorField.
struct TensorRow {
  std::int64_t storage;
  std::int64_t dtype;
  std::int64_t itemsize;
  std::int64_t storage_offset;  // elements
  std::int64_t dims;            // where its sizes begin; its strides follow them
  std::int64_t ndim;
  std::int64_t flags;
  std::int64_t offset;  // of the REDUCE opcode
  std::int64_t extent;  // elements from the first to the last one; 0 if it is empty
};
static_assert(sizeof(TensorRow) == 9 * sizeof(std::int64_t));

// The columns of backend.Graph. Where that has a string, this has an index into `texts`, so that a string which is met
// often is decoded once. Spans point into the program, which must outlive the graph.
struct Graph {
  explicit Graph(std::size_t program_nbytes) : arena(std::make_unique<Arena>(program_nbytes)) {}

  std::unique_ptr<Arena> arena;
  Column<Kind> kinds{*arena};
  Column<std::int64_t> payloads{*arena};
  Column<std::int64_t> nodes{*arena};
  Column<std::size_t> strings{*arena};
  Column<Span> blobs{*arena};
  Column<Long> longs{*arena};
  Column<std::size_t> globals{*arena};  // module and name in turn
  Column<std::int64_t> storages{*arena};
  Column<std::size_t> storage_keys{*arena};
  std::size_t keys_nbytes = 0;  // of all of these
  Column<std::size_t> locations{*arena};
  Column<std::int64_t> tensors{*arena};
  Column<std::int64_t> dims{*arena};
  std::size_t nbytes = 0;  // of the program, STOP included

  Column<Text> texts{*arena};
  std::deque<std::string> recoded;  // what texts point to that is not in the program: Latin-1, as UTF-8
};

// Safe for concurrent use on different programs. Throws Error: program, table, unsupported, unsafe; the offset is that
// of the opcode at fault. REQUIRES: the program's bytes do not change, and outlive the graph.
Graph scan_pickle(Span program, const Actions& actions, const Limits& limits);

}  // namespace zipslicer
