// Machine: read this beside zipslicer/_pure/machine.py, function by function.
//
// The stack holds values of 16 bytes: what is small sits in the value, the rest is an index into the tables of Machine,
// so that two values with one index are one object. Nothing is freed before the end, and nothing recurses, neither
// the loop nor a destructor: a pickle is as deep as it likes until the limit.
#include "machine.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <map>

#include "siphash.h"

namespace zipslicer {
namespace {

constexpr std::size_t kNone = ~std::size_t{0};
constexpr std::int64_t kMax63 = std::numeric_limits<std::int64_t>::max();
constexpr std::size_t kMaxKeyTuple = 64;        // as in Python: what a look-up of a tuple as a key may cost
constexpr std::size_t kLongName = 64;           // bytes from which on a hash is kept
constexpr std::size_t kMaxDigits = 4300;        // Python's own guard against quadratic conversion
constexpr std::uint64_t kMaxSlot = 0xFFFFFFFF;  // of the memo: what LONG_BINPUT can name
constexpr std::size_t kMaxGuess = 1 << 26;      // bytes of program for which memory is set aside at once
constexpr std::uint32_t kUntyped = 255;
constexpr std::uint32_t kDifferentiable = 1;
constexpr std::uint32_t kComplex = 2;
constexpr std::int64_t kStream = 1;  // dialects
constexpr std::int64_t kTar = 2;

enum Verb : std::uint8_t {
  kVerbOrderedDict = 1,
  kVerbStorage = 2,
  kVerbDtype = 3,
  kVerbTensor = 4,
  kVerbTensorV2 = 5,
  kVerbTensorV3 = 6,
  kVerbTyped = 7,
  kVerbSize = 8
};

std::uint32_t verb_of(std::uint32_t action) { return action & 0xFF; }
std::uint32_t dtype_of(std::uint32_t action) { return action >> 8 & 0xFF; }
std::uint32_t itemsize_of(std::uint32_t action) { return action >> 16 & 0xFF; }
std::uint32_t traits_of(std::uint32_t action) { return action >> 24; }

bool rebuilds(std::uint32_t action) { return verb_of(action) >= kVerbTensor && verb_of(action) <= kVerbTensorV3; }

// clang-format off
enum Op : std::uint8_t {
  MARK = '(', STOP = '.', POP = '0', POP_MARK = '1', DUP = '2',
  PUT = 'p', BINPUT = 'q', LONG_BINPUT = 'r', MEMOIZE = 0x94, GET = 'g', BINGET = 'h', LONG_BINGET = 'j',
  NONE = 'N', NEWTRUE = 0x88, NEWFALSE = 0x89, BINFLOAT = 'G',
  INT = 'I', BININT = 'J', BININT1 = 'K', BININT2 = 'M', LONG = 'L', LONG1 = 0x8A, LONG4 = 0x8B,
  BINSTRING = 'T', SHORT_BINSTRING = 'U', BINUNICODE = 'X', SHORT_BINUNICODE = 0x8C, BINUNICODE8 = 0x8D,
  BINBYTES = 'B', SHORT_BINBYTES = 'C', BINBYTES8 = 0x8E, BYTEARRAY8 = 0x96,
  EMPTY_TUPLE = ')', TUPLE = 't', TUPLE1 = 0x85, TUPLE2 = 0x86, TUPLE3 = 0x87,
  EMPTY_LIST = ']', LIST = 'l', APPEND = 'a', APPENDS = 'e',
  EMPTY_DICT = '}', DICT = 'd', SETITEM = 's', SETITEMS = 'u',
  EMPTY_SET = 0x8F, ADDITEMS = 0x90, FROZENSET = 0x91,
  GLOBAL = 'c', STACK_GLOBAL = 0x93, BINPERSID = 'Q',
  REDUCE = 'R', BUILD = 'b', NEWOBJ = 0x81, NEWOBJ_EX = 0x92,
  PROTO = 0x80, FRAME = 0x95
};

// Only protocol 0, the extension registry and out-of-band buffers need these.
constexpr std::pair<std::uint8_t, const char*> kRefused[] = {
  {'F', "FLOAT"}, {'S', "STRING"}, {'V', "UNICODE"}, {'P', "PERSID"}, {'i', "INST"}, {'o', "OBJ"}, {0x82, "EXT1"},
  {0x83, "EXT2"}, {0x84, "EXT4"}, {0x97, "NEXT_BUFFER"}, {0x98, "READONLY_BUFFER"},
};
// clang-format on

// The kind in the low 5 bits; in the 59 above it a small integer, or an index into a table of Machine.
class Value {
 public:
  Value() : Value(Kind::absent) {}
  explicit Value(Kind kind, std::size_t index = 0)
      : bits_(std::uint64_t{index} << 5 | static_cast<std::uint64_t>(kind)) {}
  // REQUIRES: fits(n).
  explicit Value(std::int64_t n) : bits_(static_cast<std::uint64_t>(n) << 5 | static_cast<std::uint64_t>(Kind::int_)) {}

  static bool fits(std::int64_t n) { return n >= -kSmall && n < kSmall; }

  [[nodiscard]] Kind kind() const { return static_cast<Kind>(bits_ & 31); }
  [[nodiscard]] std::size_t index() const { return static_cast<std::size_t>(bits_ >> 5); }
  [[nodiscard]] std::int64_t small() const { return static_cast<std::int64_t>(bits_) >> 5; }

  [[nodiscard]] bool is(Kind other) const { return kind() == other; }
  [[nodiscard]] bool is_bool() const { return is(Kind::true_) || is(Kind::false_); }
  [[nodiscard]] bool is_call() const { return is(Kind::call) || is(Kind::object); }
  [[nodiscard]] bool is_dict() const { return is(Kind::dict) || is(Kind::ordered_dict); }
  [[nodiscard]] bool is_sequence() const { return is(Kind::tuple) || is(Kind::list); }

 private:
  static constexpr std::int64_t kSmall = std::int64_t{1} << 58;

  std::uint64_t bits_;
};

// Values in a row that somebody else keeps.
struct Values {
  const Value* data = nullptr;
  std::size_t size = 0;

  [[nodiscard]] const Value* begin() const { return data; }
  [[nodiscard]] const Value* end() const { return data + size; }
  [[nodiscard]] const Value& operator[](std::size_t i) const { return data[i]; }
};

// A container that may grow. Tuples, which cannot, lie in Machine::fixed_ instead.
struct Node {
  std::size_t place = kNone;  // call, object: in calls_. others: in lists_, or kNone while it is empty
  std::size_t state = kNone;  // ordered_dict: in states_, once there was a BUILD
  std::int64_t id = -1;       // in the graph
};

// What a callable would have made of its arguments, and what was then put into it.
struct Call {
  Call(Arena& arena, Value its_callable, Value its_args, Value its_kwargs)
      : callable(its_callable), args(its_args), kwargs(its_kwargs), appends(arena), items(arena) {}

  Value callable;
  Value args;
  Value kwargs;
  Value state;
  Column<Value> appends;
  Column<Value> items;
  bool built = false;
};

// A name the pickle gave. `action` is what policy says of it, 0 for a stranger.
struct Global {
  std::size_t module;
  std::size_t name;
  std::uint32_t action;
  std::int64_t id = -1;
};

// A persistent id: one record's worth of bytes, and what its elements are.
struct Storage {
  std::size_t key;
  std::size_t location;
  std::int64_t nbytes;
  std::uint64_t offset;
  std::uint32_t action;
  std::size_t root = kNone;  // of a view (streams before torch 0.4): the storage that it is a part of
  std::int64_t start = 0;    // of a view: in elements of its root
  std::int64_t id = -1;
};

// One dense row, already proved to lie inside its storage.
struct Tensor {
  std::size_t storage;
  std::int64_t storage_offset;
  std::size_t dims;  // where its sizes begin; its strides follow them
  std::uint64_t offset;
  std::int64_t extent;  // elements from the first to the last one; 0 if it is empty
  std::uint32_t ndim;
  std::uint8_t dtype;
  std::uint8_t itemsize;
  std::uint8_t flags;
  std::int64_t id = -1;
};

// Thrown where Python has an IndexError; the loop knows the offset.
struct Underflow {};

// The stack, cut by MARK: nothing can reach below the last one.
class Stack {
 public:
  explicit Stack(Arena& arena) : values_(arena, 64) {}

  void push(Value value) { values_.push(value); }

  Value pop() {
    const Value value = top();
    values_.shrink(values_.size() - 1);
    return value;
  }

  Value& top() {
    if (at_mark()) {
      throw Underflow();
    }
    return values_.back();
  }

  // The last n values, which go; good until the next push.
  Values pop(std::size_t n) {
    if (values_.size() - base_ < n) {
      throw Underflow();
    }
    values_.shrink(values_.size() - n);
    return {values_.end(), n};
  }

  // A mark is a value of its own: where the one before it is.
  void mark() {
    values_.push(Value(Kind::absent, base_));
    base_ = values_.size();
  }

  // What lies above the last mark, which goes too; good until the next push.
  Values unmark() {
    if (base_ == 0) {
      throw Underflow();
    }
    const Values above{values_.data() + base_, values_.size() - base_};
    values_.shrink(base_ - 1);
    base_ = values_.end()->index();
    return above;
  }

  [[nodiscard]] bool at_mark() const { return values_.size() == base_; }
  [[nodiscard]] bool empty() const { return values_.empty(); }

 private:
  Column<Value> values_;
  std::size_t base_ = 0;  // of what is above the last mark
};

// Slots by number. Picklers count up from 0: such slots lie in a row. LONG_BINPUT can name slot 4,294,967,295 at will,
// so that a number far beyond the count of slots goes into a map, and never sizes anything.
class Memo {
 public:
  Memo(Arena& arena, std::size_t expected) : row_(arena, expected) {}

  [[nodiscard]] std::size_t count() const { return in_row_ + far_.size(); }

  // Null for a slot that was never written.
  [[nodiscard]] const Value* get(std::uint64_t slot) const {
    if (slot < row_.size() && !row_[static_cast<std::size_t>(slot)].is(Kind::absent)) {
      return &row_[static_cast<std::size_t>(slot)];
    }
    const auto found = far_.find(slot);
    return found == far_.end() ? nullptr : &found->second;
  }

  void put(std::uint64_t slot, Value value) {
    if (slot == row_.size() && far_.empty()) {  // nearly always
      row_.push(value);
      ++in_row_;
    } else if (slot < row_.size() && !row_[static_cast<std::size_t>(slot)].is(Kind::absent)) {
      row_[static_cast<std::size_t>(slot)] = value;
    } else {
      add(slot, value);
    }
  }

 private:
  void add(std::uint64_t slot, Value value) {
    const auto found = far_.find(slot);
    if (found != far_.end()) {
      found->second = value;
    } else if (slot < 2 * count() + 1024) {
      while (row_.size() <= slot) {
        row_.push(Value());
      }
      row_[static_cast<std::size_t>(slot)] = value;
      ++in_row_;
    } else {
      far_.emplace(slot, value);
    }
  }

  Column<Value> row_;       // absent: never written
  std::size_t in_row_ = 0;  // of the row, those written
  std::map<std::uint64_t, Value> far_;
};

enum class Encoding : std::uint8_t { ascii, utf8, utf8_with_surrogates, other };

// As CPython's decoder decides: no overlong form, nothing over U+10FFFF.
Encoding encoding_of(Span bytes) {
  const unsigned char* p = bytes.data;
  const unsigned char* const end = p + bytes.size;
  const auto skip_ascii = [&] {
    std::uint64_t eight = 0;
    while (end - p >= 8 && (std::memcpy(&eight, p, 8), (eight & 0x8080808080808080U) == 0)) {
      p += 8;
    }
    while (p != end && *p < 0x80) {
      ++p;
    }
  };
  // The n bytes after the first continue it, and the second is at least `low` and at most `high`.
  const auto continued = [&](std::ptrdiff_t n, unsigned low, unsigned high) {
    if (end - p <= n || p[1] < low || p[1] > high) {
      return false;
    }
    for (std::ptrdiff_t i = 2; i <= n; ++i) {
      if ((p[i] & 0xC0) != 0x80) {
        return false;
      }
    }
    p += n + 1;
    return true;
  };

  skip_ascii();
  if (p == end) {
    return Encoding::ascii;
  }
  bool surrogates = false;
  while (p != end) {
    const unsigned first = *p;
    bool good = false;
    if (first >= 0xC2 && first <= 0xDF) {
      good = continued(1, 0x80, 0xBF);
    } else if (first == 0xED && end - p > 1 && p[1] >= 0xA0) {
      good = surrogates = continued(2, 0xA0, 0xBF);
    } else if (first >= 0xE0 && first <= 0xEF) {
      good = continued(2, first == 0xE0 ? 0xA0 : 0x80, 0xBF);
    } else if (first >= 0xF0 && first <= 0xF4) {
      good = continued(3, first == 0xF0 ? 0x90 : 0x80, first == 0xF4 ? 0x8F : 0xBF);
    }
    if (!good) {
      return Encoding::other;
    }
    skip_ascii();
  }
  return surrogates ? Encoding::utf8_with_surrogates : Encoding::utf8;
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// A string of the file within a message: printable ASCII, and short.
std::string quoted(std::string_view text) {
  std::string out = "'";
  for (const char c : text.substr(0, 64)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7F) {
      out += c;
    } else {
      constexpr char digits[] = "0123456789abcdef";
      out += "\\x";
      out += digits[byte >> 4];
      out += digits[byte & 15];
    }
  }
  return out + (text.size() > 64 ? "...'" : "'");
}

// Products and sums of integers >= 0. False if the result passes 2**63 - 1.
bool multiply(std::int64_t a, std::int64_t b, std::int64_t* product) {
#if defined(__GNUC__) || defined(__clang__)
  return !__builtin_mul_overflow(a, b, product);
#else
  if (a != 0 && b > kMax63 / a) {
    return false;
  }
  *product = a * b;
  return true;
#endif
}

bool add(std::int64_t a, std::int64_t b, std::int64_t* sum) {
  if (b > kMax63 - a) {
    return false;
  }
  *sum = a + b;
  return true;
}

// The parts of the machine that do not sit in the opcode loop: strings, calls, persistent ids, keys.
class Machine {
 public:
  Machine(Span program, const Actions& actions, const Limits& limits)
      : program_(program), actions_(actions), limits_(limits), graph_(program.size), pairs_left_(program.size) {
    const std::uint32_t* byte_storage = actions.find("torch", "ByteStorage");
    uint8_ = byte_storage == nullptr ? 0 : dtype_of(*byte_storage);
    graph_.texts.expect(one_in(56));
  }

  // The opcode loop -> the root.
  Value run();
  // Numbers what the root reaches, breadth first. Nothing else may be asked of the machine then.
  Graph flatten(Value root);

 private:
  [[noreturn]] void fail(const std::string& what) const { throw Error(Blame::program, at_, what); }
  [[noreturn]] void fail_table(const std::string& what) const { throw Error(Blame::table, at_, what); }

  // Strings and integers.
  Value text(Span utf8);
  Value native_text(Span bytes);
  Value bytes(Kind kind, Span raw);
  Value integer(std::int64_t n);
  Value float_of_bits(std::uint64_t bits);
  Value long_bytes(Span little_endian);
  Value decimal(Span text);
  Value numeral(std::int64_t n);
  std::uint64_t slot(Span text) const;
  void need_digits(Span text) const;
  Span line(Cursor& cursor) const;
  std::size_t name_of(std::size_t text);
  std::size_t& storage_of(std::size_t key);

  // Containers.
  Value tuple(Values children);
  std::size_t fix(Values children);
  Value container(Kind kind, Values children);
  Values children(Value node) const;
  Column<Value>& list_of(Value node);
  void check_key(Value key);
  void set_items(Value target, Values pairs);
  void append(Value target, Values values);
  void add_items(Value target, Values values);
  Value frozenset(Values values);
  void build(Value target, Value state);

  // Calls.
  Value global(Value module, Value name);
  Value persistent(Value pid);
  Value tar_key(Value pid);
  Value view(std::size_t root, std::int64_t numel, Value metadata);
  std::size_t note(const Storage& given);
  Value call(Kind kind, Value callable, Value args, Value kwargs);
  Value reduce(Value callable, Value args);
  Value ordered_dict(Values args);
  Value typed(Value callable, Value args);
  Value new_object(Value cls, Value args, Value kwargs);
  Value tensor(std::uint32_t verb, Values args);
  std::size_t integers(Value value);
  std::uint8_t metadata(Value value, std::uint32_t traits) const;
  std::int64_t extent(const Storage& storage, std::uint32_t itemsize, std::int64_t storage_offset,
                      const std::int64_t* sizes, const std::int64_t* strides, std::size_t ndim) const;

  // The columns.
  std::int64_t storage_id(Storage& storage);
  std::int64_t tensor_id(Tensor& tensor);
  std::int64_t global_id(Global& global);
  std::int64_t node_id(Value value, std::int64_t depth, Column<Value>& pool);

  [[nodiscard]] std::string_view letters(std::size_t text) const { return graph_.texts[text].utf8().text(); }
  [[nodiscard]] bool says(Value value, std::string_view word) const {
    return value.is(Kind::str) && letters(value.index()) == word;
  }
  // A class as a persistent id may give it: a name, or what a call has made.
  [[nodiscard]] static bool is_class(Value value) { return value.is(Kind::global) || value.is_call(); }
  [[nodiscard]] static bool is_integer(Value value) { return value.is(Kind::int_) || value.is(Kind::wide); }
  // REQUIRES: is_integer(value).
  [[nodiscard]] std::int64_t integer_of(Value value) const {
    return value.is(Kind::wide) ? wide_[value.index()] : value.small();
  }
  // The action of a global, 0 of anything else.
  [[nodiscard]] std::uint32_t action_of(Value value) const {
    return value.is(Kind::global) ? globals_[value.index()].action : 0;
  }

  Arena& arena() { return *graph_.arena; }
  // Rows that a pickle of tensors fills and does not pass, one for so many bytes of it; memory never touched is free.
  [[nodiscard]] std::size_t one_in(std::size_t nbytes) const { return std::min(program_.size, kMaxGuess) / nbytes; }

  const Span program_;
  const Actions& actions_;
  const Limits& limits_;
  std::uint64_t at_ = 0;  // the opcode
  Graph graph_;

  Memo memo_{arena(), one_in(14)};
  Column<Value> fixed_{arena(), one_in(6)};  // a tuple or typed: how many children, and these
  Column<Node> nodes_{arena(), one_in(110)};
  std::vector<Column<Value>> lists_;
  Column<Value> states_{arena()};
  std::vector<Call> calls_;
  Column<std::int64_t> wide_{arena()};  // integers that no Value holds, and the bits of floats
  Column<Span> blobs_{arena()};
  Column<Long> longs_{arena()};
  Column<Global> globals_{arena()};
  Column<Storage> storages_{arena(), one_in(110)};
  Column<Tensor> tensors_{arena(), one_in(110)};
  Column<std::int64_t> dims_{arena(), one_in(28)};

  // Texts that are compared get a number, the same for the same bytes.
  HashIndex names_;
  Column<std::size_t> name_texts_{arena()};                                     // name -> a text
  std::map<std::size_t, std::size_t> long_names_;                               // long text -> name
  std::map<std::pair<std::size_t, std::size_t>, std::size_t> globals_by_name_;  // (module, name) -> global
  Column<std::size_t> storages_by_name_{arena()};                               // name -> storage, or kNone
  Column<std::size_t> storages_by_number_{arena()};                             // the number its key is -> the same

  std::size_t empty_tuple_ = kNone;  // Python has only one
  std::uint32_t uint8_ = 0;          // the dtype
  std::int64_t nodes_met_ = 0;
  std::size_t tensors_met_ = 0;
  std::int64_t tuple_keys_seen_ = 0;
  std::uint64_t pairs_left_;
};

// ---------------------------------------------------------------------------------------------- strings and integers

Value Machine::text(Span utf8) {
  const Encoding encoding = encoding_of(utf8);
  if (encoding == Encoding::other) {
    fail("a string is not UTF-8");
  }
  graph_.texts.push(Text(utf8, encoding == Encoding::ascii));
  return Value(Kind::str, graph_.texts.size() - 1);
}

// A byte string of Python 2: UTF-8 if it is, Latin-1 otherwise, which takes anything.
Value Machine::native_text(Span bytes) {
  const Encoding encoding = encoding_of(bytes);
  if (encoding == Encoding::ascii || encoding == Encoding::utf8) {
    graph_.texts.push(Text(bytes, encoding == Encoding::ascii));
  } else {
    std::string& out = graph_.recoded.emplace_back();
    for (const char c : bytes.text()) {
      const auto byte = static_cast<unsigned char>(c);
      if (byte < 0x80) {
        out += c;
      } else {
        out += static_cast<char>(0xC0 | byte >> 6);
        out += static_cast<char>(0x80 | (byte & 0x3F));
      }
    }
    graph_.texts.push(Text(Span(out.data(), out.size()), false));
  }
  return Value(Kind::str, graph_.texts.size() - 1);
}

Value Machine::bytes(Kind kind, Span raw) {
  blobs_.push(raw);
  return Value(kind, blobs_.size() - 1);
}

Value Machine::integer(std::int64_t n) {
  if (Value::fits(n)) {
    return Value(n);
  }
  wide_.push(n);
  return Value(Kind::wide, wide_.size() - 1);
}

Value Machine::float_of_bits(std::uint64_t bits) {
  wide_.push(static_cast<std::int64_t>(bits));
  return Value(Kind::float_, wide_.size() - 1);
}

// Two's complement of any length. Padding is allowed: what counts is whether the value fits 64 bits.
Value Machine::long_bytes(Span little_endian) {
  const std::string_view digits = little_endian.text();
  const bool negative = !digits.empty() && (digits.back() & 0x80) != 0;
  std::uint64_t low = negative ? ~std::uint64_t{0} : 0;
  for (std::size_t i = std::min<std::size_t>(digits.size(), 8); i-- > 0;) {
    low = low << 8 | static_cast<unsigned char>(digits[i]);
  }
  const char fill = negative ? '\xff' : '\0';
  const bool padded = digits.size() <= 8 || digits.find_first_not_of(fill, 8) == std::string_view::npos;
  if (padded && (digits.size() <= 8 || (low >> 63 != 0) == negative)) {
    return integer(static_cast<std::int64_t>(low));
  }
  longs_.push({little_endian, false});
  return Value(Kind::long_, longs_.size() - 1);
}

void Machine::need_digits(Span text) const {
  std::string_view digits = text.text();
  if (!digits.empty() && digits.front() == '-') {
    digits.remove_prefix(1);
  }
  const bool only_digits = std::all_of(digits.begin(), digits.end(), is_digit);
  if (digits.empty() || !only_digits || text.size > kMaxDigits) {
    fail("a text integer is malformed or over 4300 digits");
  }
}

Value Machine::decimal(Span text) {
  need_digits(text);
  std::string_view digits = text.text();
  const bool negative = digits.front() == '-';
  if (negative) {
    digits.remove_prefix(1);
  }
  // As a negative number, because there is one more of them.
  std::int64_t value = 0;
  bool fits = true;
  for (const char c : digits) {
    const std::int64_t digit = c - '0';
    if (value < (std::numeric_limits<std::int64_t>::min() + digit) / 10) {
      fits = false;
      break;
    }
    value = 10 * value - digit;
  }
  if (fits && (negative || value != std::numeric_limits<std::int64_t>::min())) {
    return integer(negative ? value : -value);
  }
  longs_.push({text, true});
  return Value(Kind::long_, longs_.size() - 1);
}

// The decimal text of an integer >= 0; any other stays what it is.
Value Machine::numeral(std::int64_t n) {
  if (n < 0) {
    return integer(n);
  }
  const std::string& digits = graph_.recoded.emplace_back(std::to_string(n));
  graph_.texts.push(Text(Span(digits.data(), digits.size()), true));
  return Value(Kind::str, graph_.texts.size() - 1);
}

// The memo slot that a text integer names. What no slot can have, negative or too large, is kMaxSlot + 1.
std::uint64_t Machine::slot(Span text) const {
  need_digits(text);
  std::uint64_t value = 0;
  bool negative = false;
  for (const char c : text.text()) {
    if (c == '-') {
      negative = true;
    } else {
      value = std::min(10 * value + static_cast<std::uint64_t>(c - '0'), kMaxSlot + 1);
    }
  }
  return negative && value != 0 ? kMaxSlot + 1 : value;
}

Span Machine::line(Cursor& cursor) const {
  Span found;
  if (limits_.text_nbytes < 0 || !cursor.line(static_cast<std::uint64_t>(limits_.text_nbytes), &found)) {
    fail("no line end within " + std::to_string(limits_.text_nbytes) + " bytes");
  }
  return found;
}

std::size_t Machine::name_of(std::size_t text) {
  const Span bytes = graph_.texts[text].utf8();
  const bool is_long = bytes.size > kLongName;
  if (is_long) {  // hashed once: three bytes of program may name it again and again
    const auto known = long_names_.find(text);
    if (known != long_names_.end()) {
      return known->second;
    }
  }
  const std::uint64_t hash = siphash(bytes, process_sip_key());
  std::size_t name = names_.find(hash, [&](std::size_t n) { return letters(name_texts_[n]) == bytes.text(); });
  if (name == HashIndex::kNotFound) {
    name = name_texts_.size();
    names_.add(hash, name);
    name_texts_.push(text);
    storages_by_name_.push(kNone);
  }
  if (is_long) {
    long_names_.emplace(text, name);
  }
  return name;
}

// Where the storage with this key is noted, or kNone is. torch.save counts its storages from 0, and such keys need no
// hash. Which numbers these are depends on nothing but the program's length, so that a key is always in the same place.
std::size_t& Machine::storage_of(std::size_t key) {
  const std::string_view digits = letters(key);
  const bool canonical = !digits.empty() && digits.size() < 10 && (digits.front() != '0' || digits.size() == 1);
  if (canonical && std::all_of(digits.begin(), digits.end(), is_digit)) {
    std::size_t number = 0;
    for (const char c : digits) {
      number = 10 * number + static_cast<std::size_t>(c - '0');
    }
    if (number < program_.size / 16) {
      while (storages_by_number_.size() <= number) {
        storages_by_number_.push(kNone);
      }
      return storages_by_number_[number];
    }
  }
  return storages_by_name_[name_of(key)];
}

// -------------------------------------------------------------------------------------------------------- containers

Value Machine::tuple(Values children) {
  if (children.size == 0 && empty_tuple_ != kNone) {
    return Value(Kind::tuple, empty_tuple_);
  }
  const std::size_t place = fix(children);
  if (children.size == 0) {
    empty_tuple_ = place;
  }
  return Value(Kind::tuple, place);
}

// Puts children into fixed_, with their count before them.
std::size_t Machine::fix(Values children) {
  const std::size_t place = fixed_.size();
  Value* const row = fixed_.extend(1 + children.size);
  row[0] = Value(Kind::absent, children.size);
  std::copy(children.begin(), children.end(), row + 1);
  return place;
}

// A list, set, frozenset or dict.
Value Machine::container(Kind kind, Values children) {
  nodes_.push(Node());
  const Value made(kind, nodes_.size() - 1);
  if (children.size != 0) {
    list_of(made).append(children.data, children.size);
  }
  return made;
}

// Of a tuple, list, set, frozenset, dict (without its state) or typed.
Values Machine::children(Value value) const {
  if (value.is(Kind::tuple) || value.is(Kind::typed)) {
    const Value* const row = &fixed_[value.index()];
    return {row + 1, row->index()};
  }
  const Node& node = nodes_[value.index()];
  return node.place == kNone ? Values{} : Values{lists_[node.place].data(), lists_[node.place].size()};
}

// Where the children of a list, set, frozenset or dict grow; most in a checkpoint never have any.
Column<Value>& Machine::list_of(Value value) {
  Node& node = nodes_[value.index()];
  if (node.place == kNone) {
    node.place = lists_.size();
    lists_.emplace_back(arena());
  }
  return lists_[node.place];
}

// What may be a dict key: whatever hashes in bounded time and cannot be made to collide at will.
void Machine::check_key(Value key) {
  const auto is_plain = [](Value value) {
    switch (value.kind()) {
      case Kind::str:
      case Kind::none:
      case Kind::true_:
      case Kind::false_:
      case Kind::int_:
      case Kind::wide:
      case Kind::float_:
      case Kind::bytes:
      case Kind::global:
      case Kind::call:
      case Kind::object: return true;
      default: return false;
    }
  };
  if (is_plain(key)) {
    return;
  }
  if (key.is(Kind::long_)) {
    fail("an integer beyond 64 bits is a dict key");
  }
  if (!key.is(Kind::tuple)) {
    fail("a value that cannot be hashed is a dict key");
  }
  ++tuple_keys_seen_;
  const Values parts = children(key);
  if (parts.size > kMaxKeyTuple || tuple_keys_seen_ > limits_.tuple_keys) {
    fail("too many or too long tuples are dict keys");
  }
  if (!std::all_of(parts.begin(), parts.end(), is_plain)) {
    fail("a tuple that is a dict key may hold plain values only");
  }
}

void Machine::set_items(Value target, Values pairs) {
  if (pairs.size % 2 != 0) {
    fail("a key without a value");
  }
  if (!target.is_dict() && !target.is_call()) {
    fail("SETITEMS on something that is no dict");
  }
  for (std::size_t i = 0; i < pairs.size; i += 2) {
    check_key(pairs[i]);
  }
  if (pairs.size != 0) {
    Column<Value>& items = target.is_call() ? calls_[nodes_[target.index()].place].items : list_of(target);
    items.append(pairs.data, pairs.size);
  }
}

void Machine::append(Value target, Values values) {
  if (!target.is(Kind::list) && !target.is_call()) {
    fail("APPENDS on something that is no list");
  }
  if (values.size != 0) {
    Column<Value>& list = target.is_call() ? calls_[nodes_[target.index()].place].appends : list_of(target);
    list.append(values.data, values.size);
  }
}

void Machine::add_items(Value target, Values values) {
  if (!target.is(Kind::set)) {
    fail("ADDITEMS on something that is no set");
  }
  for (const Value& value : values) {
    check_key(value);
  }
  if (values.size != 0) {
    Column<Value>& list = list_of(target);
    list.append(values.data, values.size);
  }
}

Value Machine::frozenset(Values values) {
  for (const Value& value : values) {
    check_key(value);
  }
  return container(Kind::frozenset, values);
}

void Machine::build(Value target, Value state) {
  if (!target.is_call() && !target.is(Kind::ordered_dict)) {
    fail("BUILD on something that takes no state");
  }
  Node& node = nodes_[target.index()];
  if (target.is_call() ? calls_[node.place].built : node.state != kNone) {
    fail("BUILD a second time on one object");
  }
  if (target.is_call()) {
    calls_[node.place].state = state;
    calls_[node.place].built = true;
  } else {
    node.state = states_.size();
    states_.push(state);
  }
}

// ------------------------------------------------------------------------------------------------------------- calls

Value Machine::global(Value module, Value name) {
  if (!module.is(Kind::str) || !name.is(Kind::str)) {
    fail("a global's module and name must be strings");
  }
  const auto place = globals_by_name_.try_emplace({name_of(module.index()), name_of(name.index())}, globals_.size());
  if (place.second) {
    const std::uint32_t* action = actions_.find(letters(module.index()), letters(name.index()));
    if (action == nullptr && limits_.refuse_unknown) {
      const std::string dotted = std::string(letters(module.index())).append(".").append(letters(name.index()));
      std::string shown = dotted;
      std::replace(shown.begin(), shown.end(), '\0', '?');  // what() ends at the first
      Error error(Blame::unsafe, at_,
                  "the file names " + shown +
                      ", which policy does not know; nothing of it was run. Leave out "
                      "unknown='error' to read the file with an inert placeholder in its place");
      error.global_name = dotted;
      throw error;
    }
    globals_.push({module.index(), name.index(), action == nullptr ? 0 : *action});
  }
  return Value(Kind::global, place.first->second);
}

// ('storage', class, key, location, numel), and nothing else. torch.package counts its keys in integers. A stream has a
// sixth part, for views, and ('module', class, source file, source), of which the class is all that counts.
Value Machine::persistent(Value pid) {
  if (limits_.dialect == kTar) {
    return tar_key(pid);
  }
  const bool is_stream = limits_.dialect == kStream;
  const Values parts = pid.is(Kind::tuple) ? children(pid) : Values{};
  if (is_stream && parts.size == 4 && says(parts[0], "module") && is_class(parts[1])) {
    return parts[1];
  }
  if (parts.size != (is_stream ? 6 : 5) || !says(parts[0], "storage")) {
    fail(is_stream ? "a persistent id must be ('storage', class, key, location, numel, view)"
                   : "a persistent id must be ('storage', class, key, location, numel)");
  }
  const Value key = is_integer(parts[2]) ? numeral(integer_of(parts[2])) : parts[2];
  const Value& location = parts[3];
  const Value& numel = parts[4];
  const std::uint32_t action = action_of(parts[1]);
  if (verb_of(action) != kVerbStorage) {
    fail("a persistent id names a class that is no storage class");
  }
  if (!key.is(Kind::str) || !location.is(Kind::str)) {
    fail("a persistent id's key must be a string or an integer from 0 to 2**63 - 1, its location a string");
  }
  if (!is_integer(numel) || integer_of(numel) < 0) {
    fail("a persistent id's element count must be an integer from 0 to 2**63 - 1");
  }
  std::int64_t nbytes = 0;
  if (!multiply(integer_of(numel), itemsize_of(action), &nbytes)) {
    fail("a storage's size in bytes passes 2**63 - 1");
  }

  const std::size_t place = note({key.index(), location.index(), nbytes, at_, action});
  return is_stream && !parts[5].is(Kind::none) ? view(place, integer_of(numel), parts[5]) : Value(Kind::storage, place);
}

// What a tar file has for tensors and storages: their keys in two other members, or (class, source file, source).
Value Machine::tar_key(Value pid) {
  const Values parts = pid.is(Kind::tuple) ? children(pid) : Values{};
  if (parts.size == 3 && is_class(parts[0])) {
    return parts[0];
  }
  const Value key = is_integer(pid) ? numeral(integer_of(pid)) : pid;
  if (!key.is(Kind::str)) {
    fail("a persistent id must be the key of a tensor or storage");
  }
  const Value nowhere = text(Span("", 0));
  return Value(Kind::storage, note({key.index(), nowhere.index(), 0, at_, 0}));
}

// (key, offset, size) in elements: a part of a storage, without bytes of its own.
Value Machine::view(std::size_t root, std::int64_t numel, Value metadata) {
  const Values parts = metadata.is(Kind::tuple) ? children(metadata) : Values{};
  if (parts.size != 3) {
    fail("a view of a storage must be (key, offset, size)");
  }
  const Value key = is_integer(parts[0]) ? numeral(integer_of(parts[0])) : parts[0];
  if (!key.is(Kind::str) || !is_integer(parts[1]) || !is_integer(parts[2])) {
    fail("a view of a storage must be (key, offset, size)");
  }
  const std::int64_t start = integer_of(parts[1]);
  const std::int64_t size = integer_of(parts[2]);
  if (start < 0 || size < 0 || start > numel || size > numel - start) {
    fail_table("a view reaches outside its storage");
  }
  const Storage whole = storages_[root];
  return Value(Kind::storage, note({key.index(), whole.location, size * std::int64_t{itemsize_of(whole.action)}, at_,
                                    whole.action, root, start}));
}

// The storage with this key: noted now, or checked against what was noted before.
std::size_t Machine::note(const Storage& given) {
  std::size_t& place = storage_of(given.key);
  if (place == kNone) {
    place = storages_.size();
    storages_.push(given);
    return place;
  }
  const Storage& found = storages_[place];
  if (found.root != given.root || found.start != given.start) {
    fail("storage " + quoted(letters(given.key)) + " is a view in one persistent id, and something else in another");
  }
  if (found.nbytes != given.nbytes) {
    fail("storage " + quoted(letters(given.key)) + " has " + std::to_string(found.nbytes) +
         " bytes in one persistent id, " + std::to_string(given.nbytes) + " in another");
  }
  const std::uint32_t one = dtype_of(found.action);
  const std::uint32_t two = dtype_of(given.action);
  // Bytes without a type and bytes as uint8 are the one pair of classes that torch.save mixes under one key.
  const bool byte_like = (one == kUntyped && two == uint8_) || (one == uint8_ && two == kUntyped);
  if (one != two && !(itemsize_of(found.action) == 1 && byte_like)) {
    fail("storage " + quoted(letters(given.key)) + " has two element types");
  }
  return place;
}

Value Machine::call(Kind kind, Value callable, Value args, Value kwargs) {
  nodes_.push({calls_.size()});
  calls_.emplace_back(arena(), callable, args, kwargs);
  return Value(kind, nodes_.size() - 1);
}

Value Machine::reduce(Value callable, Value args) {
  if (!args.is(Kind::tuple)) {
    fail("REDUCE takes a tuple of arguments");
  }
  if (callable.is(Kind::global)) {
    const std::uint32_t action = action_of(callable);
    if (rebuilds(action)) {
      return tensor(verb_of(action), children(args));
    }
    if (verb_of(action) == kVerbOrderedDict) {
      return ordered_dict(children(args));
    }
    if (verb_of(action) == kVerbTyped) {
      return typed(callable, args);
    }
  } else if (!callable.is_call()) {
    fail("REDUCE calls something that is no global");
  }
  return call(Kind::call, callable, args, Value(Kind::absent));
}

// () as Python 3 writes it, or ([[key, value], ...],) as Python 2 did.
Value Machine::ordered_dict(Values args) {
  const Value made = container(Kind::ordered_dict, {});
  if (args.size == 0) {
    return made;
  }
  if (args.size != 1 || !args[0].is_sequence()) {
    fail("OrderedDict takes nothing, or one list of pairs");
  }
  Column<Value> items(arena());
  for (const Value& each : children(args[0])) {
    const Values pair = each.is_sequence() ? children(each) : Values{};
    if (pair.size != 2) {
      fail("OrderedDict takes nothing, or one list of pairs");
    }
    if (pairs_left_ == 0) {
      fail("OrderedDict takes the same pairs over and over");
    }
    --pairs_left_;
    check_key(pair[0]);
    items.append(pair.data, pair.size);
  }
  if (!items.empty()) {
    list_of(made) = std::move(items);
  }
  return made;
}

// A tensor with a Python type and attributes of its own.
Value Machine::typed(Value callable, Value args) {
  const Values parts = children(args);
  const std::string_view name = letters(globals_[callable.index()].name);
  if (parts.size != 4) {
    fail(std::string(name) + " takes 4 arguments, not " + std::to_string(parts.size));
  }
  const std::uint32_t function = action_of(parts[0]);
  if (!rebuilds(function)) {
    return call(Kind::call, callable, args, Value(Kind::absent));
  }
  if (!parts[2].is(Kind::tuple)) {
    fail(std::string(name) + " takes a tuple of arguments");
  }
  const Value made[] = {tensor(verb_of(function), children(parts[2])), parts[1], parts[3]};
  return Value(Kind::typed, fix({made, 3}));
}

Value Machine::new_object(Value cls, Value args, Value kwargs) {
  if (!cls.is(Kind::global) && !cls.is_call()) {
    fail("NEWOBJ of something that is no global");
  }
  if (!args.is(Kind::tuple)) {
    fail("NEWOBJ takes a tuple of arguments");
  }
  if (!kwargs.is(Kind::none) && !kwargs.is_dict()) {
    fail("NEWOBJ_EX takes a dict of keyword arguments");
  }
  return call(Kind::object, cls, args, kwargs.is(Kind::none) ? Value(Kind::absent) : kwargs);
}

// First that every argument of a rebuild call is of its type, then that the tensor lies in its storage.
Value Machine::tensor(std::uint32_t verb, Values args) {
  const std::size_t fewest = verb == kVerbTensor ? 4 : verb == kVerbTensorV2 ? 6 : 7;
  if (args.size < fewest || args.size > fewest + (verb == kVerbTensor ? 0 : 1)) {
    fail("a tensor is rebuilt with " + std::to_string(args.size) + " arguments");
  }
  if (!args[0].is(Kind::storage) || limits_.dialect == kTar) {
    fail("a tensor is rebuilt on something that is no storage");
  }
  if (!is_integer(args[1])) {
    fail("a tensor's storage_offset must be a 64-bit integer");
  }
  const std::int64_t storage_offset = integer_of(args[1]);
  const std::size_t dims = dims_.size();
  const std::size_t ndim = integers(args[2]);
  const std::size_t steps = integers(args[3]);
  if (ndim != steps) {
    fail("a tensor has " + std::to_string(ndim) + " sizes and " + std::to_string(steps) + " strides");
  }
  const Storage& storage = storages_[args[0].index()];
  std::uint32_t type = storage.action;
  if (verb == kVerbTensorV3) {
    if (verb_of(action_of(args[6])) != kVerbDtype) {
      fail("a tensor's dtype is no dtype of torch");
    }
    if (itemsize_of(type) != 1 || storage.root != kNone) {
      fail("a tensor with a dtype of its own needs an untyped storage, a whole one");
    }
    type = action_of(args[6]);
  }
  std::uint8_t flags = 0;
  if (verb != kVerbTensor) {
    if (!args[4].is_bool()) {
      fail("a tensor's requires_grad must be a boolean");
    }
    flags = args[4].is(Kind::true_) ? 1 : 0;
    if (flags != 0 && (traits_of(type) & kDifferentiable) == 0) {
      fail("a tensor of this dtype cannot require grad");
    }
    if (args.size > fewest) {
      flags = static_cast<std::uint8_t>(flags | metadata(args[args.size - 1], traits_of(type)));
    }
  }
  const std::int64_t reach =
      extent(storage, itemsize_of(type), storage_offset, &dims_[dims], &dims_[dims] + ndim, ndim);
  std::int64_t start = 0;  // in the storage that has the bytes
  if (!add(storage_offset, storage.start, &start)) {
    fail_table("a tensor's extent passes 2**63 - 1 elements");
  }
  tensors_.push({storage.root == kNone ? args[0].index() : storage.root, start, dims, at_, reach,
                 static_cast<std::uint32_t>(ndim), static_cast<std::uint8_t>(dtype_of(type)),
                 static_cast<std::uint8_t>(itemsize_of(type)), flags});
  return Value(Kind::tensor, tensors_.size() - 1);
}

// A size or stride, which is a tuple, a list, or torch.Size(tuple): appends it to dims_ and returns how many there are.
std::size_t Machine::integers(Value value) {
  if (value.is_call()) {
    const Call& call = calls_[nodes_[value.index()].place];
    if (verb_of(action_of(call.callable)) == kVerbSize && children(call.args).size == 1) {
      value = children(call.args)[0];
    }
  }
  if (!value.is_sequence()) {
    fail("a tensor's size and stride must be tuples");
  }
  const Values found = children(value);
  if (limits_.dimensions < 0 || found.size > static_cast<std::uint64_t>(limits_.dimensions)) {
    fail("a tensor has " + std::to_string(found.size) + " dimensions; the limit is " +
         std::to_string(limits_.dimensions));
  }
  for (const Value each : found) {
    if (!is_integer(each)) {
      fail("a tensor's sizes and strides must be 64-bit integers");
    }
    dims_.push(integer_of(each));
  }
  return found.size;
}

// {'conj': True, 'neg': True}: the math bits; the bytes are stored as if neither were set.
std::uint8_t Machine::metadata(Value value, std::uint32_t traits) const {
  if (value.is(Kind::none)) {
    return 0;
  }
  if (!value.is_dict()) {
    fail("a tensor's metadata must be a dict");
  }
  const Values items = children(value);
  bool conj = false;
  bool neg = false;
  for (std::size_t i = 0; i < items.size; i += 2) {
    const bool is_conj = says(items[i], "conj");
    if ((!is_conj && !says(items[i], "neg")) || !items[i + 1].is_bool()) {
      fail("a tensor's metadata may say conj and neg, and no more");
    }
    (is_conj ? conj : neg) = items[i + 1].is(Kind::true_);
  }
  if (conj && (traits & kComplex) == 0) {
    fail("only a complex tensor can be conjugated");
  }
  return static_cast<std::uint8_t>((conj ? 2 : 0) | (neg ? 4 : 0));
}

// Refuses a tensor that leaves its storage. Returns how many elements there are from its first to its last one.
std::int64_t Machine::extent(const Storage& storage, std::uint32_t itemsize, std::int64_t storage_offset,
                             const std::int64_t* sizes, const std::int64_t* strides, std::size_t ndim) const {
  bool negative = storage_offset < 0;
  for (std::size_t i = 0; i < ndim; ++i) {
    negative = negative || sizes[i] < 0 || strides[i] < 0;
  }
  if (negative) {
    fail_table("a tensor has a negative storage_offset, size or stride");
  }
  std::int64_t numel = 1;
  std::int64_t last = storage_offset;
  bool empty = false;
  for (std::size_t i = 0; i < ndim; ++i) {
    if (sizes[i] == 0) {
      empty = true;
      continue;
    }
    std::int64_t reach = 0;
    if (!multiply(numel, sizes[i], &numel) || !multiply(sizes[i] - 1, strides[i], &reach) || !add(last, reach, &last)) {
      fail_table("a tensor's extent passes 2**63 - 1 elements");
    }
  }
  if (empty) {
    return 0;
  }
  if (itemsize != 0 &&
      last >= storage.nbytes / itemsize) {  // as (last + 1) * itemsize > nbytes, without a product that may wrap
    fail_table("a tensor reaches past element " + std::to_string(last) + " of storage " + quoted(letters(storage.key)) +
               ", which has " + std::to_string(storage.nbytes) + " bytes of " + std::to_string(itemsize) +
               " an element");
  }
  return last - storage_offset + 1;
}

// ---------------------------------------------------------------------------------------------------------- the loop

Value Machine::run() {
  Cursor cursor(program_, Blame::program);
  Stack stack(arena());
  const auto remember = [&](std::uint64_t slot) { memo_.put(slot, stack.top()); };
  const auto recall = [&](std::uint64_t slot) {
    const Value* found = memo_.get(slot);
    if (found == nullptr) {
      fail("a memo slot is read that was never written");
    }
    stack.push(*found);
  };
  try {
    while (true) {
      cursor.mark();
      at_ = cursor.marked();
      const std::uint8_t op = cursor.u8();
      switch (op) {
        // The stack and the memo.
        case MARK: stack.mark(); break;
        case POP:  // a value, or a MARK with nothing above it
          if (stack.at_mark()) {
            stack.unmark();
          } else {
            stack.pop();
          }
          break;
        case POP_MARK: stack.unmark(); break;
        case DUP: stack.push(stack.top()); break;
        case BINPUT: remember(cursor.u8()); break;
        case LONG_BINPUT: remember(cursor.u32()); break;
        case MEMOIZE: remember(memo_.count()); break;
        case PUT: {
          const std::uint64_t place = slot(line(cursor));
          if (place > kMaxSlot) {
            fail("a memo slot outside 32 bits");
          }
          remember(place);
          break;
        }
        case BINGET: recall(cursor.u8()); break;
        case LONG_BINGET: recall(cursor.u32()); break;
        case GET: recall(slot(line(cursor))); break;

        // Plain values.
        case NONE: stack.push(Value(Kind::none)); break;
        case NEWTRUE: stack.push(Value(Kind::true_)); break;
        case NEWFALSE: stack.push(Value(Kind::false_)); break;
        case BININT1: stack.push(integer(cursor.u8())); break;
        case BININT2: stack.push(integer(cursor.u16())); break;
        case BININT: stack.push(integer(static_cast<std::int32_t>(cursor.u32()))); break;
        case LONG1: stack.push(long_bytes(cursor.take(cursor.u8()))); break;
        case LONG4: {
          const auto nbytes = static_cast<std::int32_t>(cursor.u32());
          if (nbytes < 0 || nbytes > limits_.long_nbytes) {
            fail("an integer of " + std::to_string(nbytes) + " bytes; the limit is " +
                 std::to_string(limits_.long_nbytes));
          }
          stack.push(long_bytes(cursor.take(static_cast<std::uint32_t>(nbytes))));
          break;
        }
        case INT: {  // or protocol 1's booleans
          const Span digits = line(cursor);
          if (digits.text() == "00" || digits.text() == "01") {
            stack.push(Value(digits.text() == "01" ? Kind::true_ : Kind::false_));
          } else {
            stack.push(decimal(digits));
          }
          break;
        }
        case LONG: {
          Span digits = line(cursor);
          if (!digits.text().empty() && digits.text().back() == 'L') {
            digits = digits.part(0, digits.size - 1);
          }
          stack.push(decimal(digits));
          break;
        }
        case BINFLOAT: {
          const std::uint64_t little = cursor.u64();
          std::uint64_t bits = 0;
          for (int i = 0; i < 64; i += 8) {  // the one big-endian number of the format
            bits = bits << 8 | (little >> i & 0xFF);
          }
          stack.push(float_of_bits(bits));
          break;
        }
        case SHORT_BINUNICODE: stack.push(text(cursor.take(cursor.u8()))); break;
        case BINUNICODE: stack.push(text(cursor.take(cursor.u32()))); break;
        case BINUNICODE8: stack.push(text(cursor.take(cursor.u64()))); break;
        case SHORT_BINSTRING: stack.push(native_text(cursor.take(cursor.u8()))); break;
        case BINSTRING: {
          const auto nbytes = static_cast<std::int32_t>(cursor.u32());
          if (nbytes < 0) {
            fail("a string of negative length");
          }
          stack.push(native_text(cursor.take(static_cast<std::uint32_t>(nbytes))));
          break;
        }
        case SHORT_BINBYTES: stack.push(bytes(Kind::bytes, cursor.take(cursor.u8()))); break;
        case BINBYTES: stack.push(bytes(Kind::bytes, cursor.take(cursor.u32()))); break;
        case BINBYTES8: stack.push(bytes(Kind::bytes, cursor.take(cursor.u64()))); break;
        case BYTEARRAY8: stack.push(bytes(Kind::bytearray, cursor.take(cursor.u64()))); break;

        // Containers.
        case EMPTY_TUPLE: stack.push(tuple({})); break;
        case TUPLE1: stack.push(tuple(stack.pop(1))); break;
        case TUPLE2: stack.push(tuple(stack.pop(2))); break;
        case TUPLE3: stack.push(tuple(stack.pop(3))); break;
        case TUPLE: stack.push(tuple(stack.unmark())); break;
        case EMPTY_LIST: stack.push(container(Kind::list, {})); break;
        case LIST: stack.push(container(Kind::list, stack.unmark())); break;
        case EMPTY_DICT: stack.push(container(Kind::dict, {})); break;
        case DICT: {
          const Values pairs = stack.unmark();
          const Value made = container(Kind::dict, {});
          set_items(made, pairs);
          stack.push(made);
          break;
        }
        case EMPTY_SET: stack.push(container(Kind::set, {})); break;
        case FROZENSET: stack.push(frozenset(stack.unmark())); break;
        case APPEND: {
          const Value value = stack.pop();
          append(stack.top(), {&value, 1});
          break;
        }
        case APPENDS: {
          const Values values = stack.unmark();
          append(stack.top(), values);
          break;
        }
        case SETITEM: {
          Value pair[2];
          pair[1] = stack.pop();
          pair[0] = stack.pop();
          set_items(stack.top(), {pair, 2});
          break;
        }
        case SETITEMS: {
          const Values pairs = stack.unmark();
          set_items(stack.top(), pairs);
          break;
        }
        case ADDITEMS: {
          const Values values = stack.unmark();
          add_items(stack.top(), values);
          break;
        }

        // Names and calls.
        case GLOBAL: {
          const Span module = line(cursor);
          const Span name = line(cursor);
          const Value module_text = text(module);
          stack.push(global(module_text, text(name)));
          break;
        }
        case STACK_GLOBAL: {
          const Value name = stack.pop();
          stack.top() = global(stack.top(), name);
          break;
        }
        case BINPERSID: stack.top() = persistent(stack.top()); break;
        case REDUCE: {
          const Value args = stack.pop();
          stack.top() = reduce(stack.top(), args);
          break;
        }
        case BUILD: {
          const Value state = stack.pop();
          build(stack.top(), state);
          break;
        }
        case NEWOBJ: {
          const Value args = stack.pop();
          stack.top() = new_object(stack.top(), args, Value(Kind::none));
          break;
        }
        case NEWOBJ_EX: {
          const Value kwargs = stack.pop();
          const Value args = stack.pop();
          stack.top() = new_object(stack.top(), args, kwargs);
          break;
        }

        // The program as a whole.
        case PROTO: {
          const unsigned protocol = cursor.u8();
          if (protocol > 5) {
            throw Error(Blame::unsupported, at_,
                        "pickle protocol " + std::to_string(protocol) + "; the newest known is 5");
          }
          break;
        }
        case FRAME: {  // pickle's own read-ahead hint, of no meaning here
          const std::uint64_t nbytes = cursor.u64();
          if (nbytes > cursor.left()) {
            cursor.take(nbytes);
          }
          break;
        }
        case STOP: {
          const Value root = stack.pop();
          graph_.nbytes = cursor.position();
          if (!stack.empty()) {
            fail("STOP with values or marks left on the stack");
          }
          return root;
        }
        default:
          for (const auto& [code, name] : kRefused) {
            if (op == code) {
              throw Error(
                  Blame::unsupported, at_,
                  std::string("opcode ") + name +
                      " is not written by torch.save in protocols 2 to 5; save the file again with one of these");
            }
          }
          fail("byte " + std::to_string(op) + " is no pickle opcode");
      }
    }
  } catch (const Underflow&) {
    fail("stack underflow");
  }
}

// ------------------------------------------------------------------------------------------------------- the columns

void add_row(Column<std::int64_t>& column, std::initializer_list<std::int64_t> row) {
  column.append(row.begin(), row.size());
}

std::int64_t count_of(std::size_t size) { return static_cast<std::int64_t>(size); }

std::int64_t Machine::storage_id(Storage& storage) {
  if (storage.id < 0) {
    storage.id = count_of(graph_.storage_keys.size());
    graph_.keys_nbytes += graph_.texts[storage.key].utf8().size;
    add_row(graph_.storages, {dtype_of(storage.action), storage.nbytes, static_cast<std::int64_t>(storage.offset),
                              count_of(graph_.keys_nbytes)});
    graph_.storage_keys.push(storage.key);
    graph_.locations.push(storage.location);
  }
  return storage.id;
}

std::int64_t Machine::tensor_id(Tensor& tensor) {
  if (tensor.id < 0) {
    tensor.id = count_of(tensors_met_++);
    add_row(graph_.tensors, {storage_id(storages_[tensor.storage]), tensor.dtype, tensor.itemsize,
                             tensor.storage_offset, count_of(graph_.dims.size()), tensor.ndim, tensor.flags,
                             static_cast<std::int64_t>(tensor.offset), tensor.extent});
    graph_.dims.append(&dims_[tensor.dims], 2 * std::size_t{tensor.ndim});
  }
  return tensor.id;
}

std::int64_t Machine::global_id(Global& global) {
  if (global.id < 0) {
    global.id = count_of(graph_.globals.size() / 2);
    graph_.globals.push(global.module);
    graph_.globals.push(global.name);
  }
  return global.id;
}

// The children of a node that is met for the first time are appended to the pool.
std::int64_t Machine::node_id(Value value, std::int64_t depth, Column<Value>& pool) {
  // A tuple keeps its id where its count was: once its children are in the pool, nobody asks for that.
  const bool is_fixed = value.is(Kind::tuple) || value.is(Kind::typed);
  Node* const node = is_fixed ? nullptr : &nodes_[value.index()];
  if (is_fixed && !fixed_[value.index()].is(Kind::absent)) {
    return fixed_[value.index()].small();
  }
  if (!is_fixed && node->id >= 0) {
    return node->id;
  }
  if (depth > limits_.depth) {
    fail("values are nested deeper than " + std::to_string(limits_.depth));
  }
  const std::size_t start = pool.size();
  const auto put = [&](Values values) { pool.append(values.data, values.size); };
  std::size_t appends = 0;
  if (value.is_call()) {
    const Call& call = calls_[node->place];
    const Value parts[] = {call.callable, call.args, call.kwargs, call.state};
    put({parts, 4});
    put({call.appends.data(), call.appends.size()});
    put({call.items.data(), call.items.size()});
    appends = call.appends.size();
  } else {
    put(children(value));
    if (!is_fixed && node->state != kNone) {
      put({&states_[node->state], 1});
    }
  }
  const std::int64_t id = nodes_met_++;
  add_row(graph_.nodes, {static_cast<std::int64_t>(value.kind()), count_of(start), count_of(pool.size() - start),
                         count_of(appends), depth});
  if (is_fixed) {
    fixed_[value.index()] = Value(id);
  } else {
    node->id = id;
  }
  return id;
}

Graph Machine::flatten(Value root) {
  graph_.tensors.expect(9 * tensors_.size());
  graph_.dims.expect(dims_.size());
  graph_.storages.expect(4 * storages_.size());
  graph_.storage_keys.expect(storages_.size());
  graph_.locations.expect(storages_.size());
  Column<Value> pool(arena(), one_in(55));  // the values; grows while it is scanned
  graph_.kinds.expect(one_in(55));
  graph_.payloads.expect(one_in(55));
  graph_.strings.expect(one_in(110));
  pool.push(root);
  // The pool is runs of children: of node 0, of node 1, and so on, after the root, which has a run to itself.
  std::size_t run_end = 1;
  std::int64_t depth = 0;
  std::size_t run = 0;
  for (std::size_t position = 0; position < pool.size(); ++position) {
    for (; position >= run_end; ++run) {
      const std::int64_t* const row = &graph_.nodes[5 * run];
      run_end = static_cast<std::size_t>(row[1] + row[2]);
      depth = row[4] + 1;
    }
    const Value value = pool[position];
    Kind kind = value.kind();
    std::int64_t payload = 0;
    switch (kind) {
      case Kind::none:
      case Kind::false_:
      case Kind::true_:
      case Kind::absent: break;
      case Kind::int_: payload = value.small(); break;
      case Kind::wide:
        kind = Kind::int_;
        payload = wide_[value.index()];
        break;
      case Kind::float_: payload = wide_[value.index()]; break;
      case Kind::long_:
        payload = count_of(graph_.longs.size());
        graph_.longs.push(longs_[value.index()]);
        break;
      case Kind::str:
        payload = count_of(graph_.strings.size());
        graph_.strings.push(value.index());
        break;
      case Kind::bytes:
      case Kind::bytearray:
        payload = count_of(graph_.blobs.size());
        graph_.blobs.push(blobs_[value.index()]);
        break;
      case Kind::global: payload = global_id(globals_[value.index()]); break;
      case Kind::storage: {
        Storage& storage = storages_[value.index()];
        if (storage.root != kNone) {
          throw Error(Blame::unsupported, storage.offset, "a view of a storage stands as a value");
        }
        payload = storage_id(storage);
        break;
      }
      case Kind::tensor: payload = tensor_id(tensors_[value.index()]); break;
      default: payload = node_id(value, depth, pool); break;
    }
    graph_.kinds.push(kind);
    graph_.payloads.push(payload);
  }
  if (limits_.dialect == kStream) {  // whose bytes lie one after the other: where one is depends on all before it
    for (std::size_t i = 0; i < storages_.size(); ++i) {
      if (storages_[i].root == kNone) {
        storage_id(storages_[i]);
      }
    }
  }
  for (std::size_t i = 0; i < globals_.size(); ++i) {
    global_id(globals_[i]);
  }
  return std::move(graph_);
}

}  // namespace

// ----------------------------------------------------------------------------------------------------------- actions

namespace {

std::uint64_t hash_of_name(std::string_view module, std::string_view name) {
  const auto hash = [](std::string_view text) { return siphash(Span(text.data(), text.size()), process_sip_key()); };
  return 31 * hash(module) + hash(name);
}

}  // namespace

Actions::Actions(std::size_t count) : index_(count) {}

std::size_t Actions::number(std::uint64_t hash, std::string_view module, std::string_view name) const {
  return index_.find(hash, [&](std::size_t n) {
    const Entry& entry = entries_[n];
    const std::string_view both =
        std::string_view(letters_).substr(entry.start, entry.module_nbytes + entry.name_nbytes);
    return both.substr(0, entry.module_nbytes) == module && both.substr(entry.module_nbytes) == name;
  });
}

void Actions::add(std::string_view module, std::string_view name, std::uint32_t action) {
  const std::uint64_t hash = hash_of_name(module, name);
  if (number(hash, module, name) == HashIndex::kNotFound) {
    index_.add(hash, entries_.size());
    entries_.push_back({letters_.size(), module.size(), name.size(), action});
    letters_.append(module).append(name);
  }
}

const std::uint32_t* Actions::find(std::string_view module, std::string_view name) const {
  const std::size_t found = number(hash_of_name(module, name), module, name);
  return found == HashIndex::kNotFound ? nullptr : &entries_[found].action;
}

// ------------------------------------------------------------------------------------------------------------------

Graph scan_pickle(Span program, const Actions& actions, const Limits& limits) {
  Machine machine(program, actions, limits);
  const Value root = machine.run();
  return machine.flatten(root);
}

}  // namespace zipslicer
