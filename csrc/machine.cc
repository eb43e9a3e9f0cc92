// Machine: read this beside zipslicer/_pure/machine.py, function by function.
//
// The stack holds values of 16 bytes: what is small sits in the value, the rest is an index into the tables of Machine,
// so that two values with one index are one object. Nothing is freed before the end, and nothing recurses, neither
// the loop nor a destructor: a pickle is as deep as it likes until the limit.
#include "machine.h"

#include <algorithm>
#include <limits>
#include <map>

#include "siphash.h"

namespace zipslicer {
namespace {

constexpr std::size_t kNone = ~std::size_t{0};
constexpr std::int64_t kMax63 = std::numeric_limits<std::int64_t>::max();
constexpr std::size_t kMaxKeyTuple = 64;        // as in Python: what a look-up of a tuple as a key may cost
constexpr std::size_t kMaxDigits = 4300;        // Python's own guard against quadratic conversion
constexpr std::uint64_t kMaxSlot = 0xFFFFFFFF;  // of the memo: what LONG_BINPUT can name
constexpr std::size_t kMaxGuess = 1 << 26;      // bytes of program for which memory is set aside at once
constexpr std::uint32_t kUntyped = 255;
constexpr std::uint32_t kDifferentiable = 1;
constexpr std::uint32_t kComplex = 2;

enum Verb : std::uint8_t {
  kVerbOrderedDict = 1,
  kVerbStorage = 2,
  kVerbDtype = 3,
  kVerbTensor = 4,
  kVerbTensorV2 = 5,
  kVerbTensorV3 = 6,
  kVerbTyped = 7,
  kVerbSize = 8,
};

std::uint32_t verb_of(std::uint32_t action) { return action & 0xFF; }
std::uint32_t dtype_of(std::uint32_t action) { return action >> 8 & 0xFF; }
std::uint32_t itemsize_of(std::uint32_t action) { return action >> 16 & 0xFF; }
std::uint32_t traits_of(std::uint32_t action) { return action >> 24; }

bool rebuilds(std::uint32_t action) { return verb_of(action) >= kVerbTensor && verb_of(action) <= kVerbTensorV3; }

enum Op : std::uint8_t {
  MARK = '(',
  STOP = '.',
  POP = '0',
  POP_MARK = '1',
  DUP = '2',
  FLOAT = 'F',
  INT = 'I',
  BININT = 'J',
  BININT1 = 'K',
  LONG = 'L',
  BININT2 = 'M',
  NONE_ = 'N',
  PERSID = 'P',
  BINPERSID = 'Q',
  REDUCE = 'R',
  STRING = 'S',
  BINSTRING = 'T',
  SHORT_BINSTRING = 'U',
  UNICODE_ = 'V',
  BINUNICODE = 'X',
  APPEND = 'a',
  BUILD = 'b',
  GLOBAL = 'c',
  DICT = 'd',
  EMPTY_DICT = '}',
  APPENDS = 'e',
  GET = 'g',
  BINGET = 'h',
  INST = 'i',
  LONG_BINGET = 'j',
  LIST = 'l',
  EMPTY_LIST = ']',
  OBJ = 'o',
  PUT = 'p',
  BINPUT = 'q',
  LONG_BINPUT = 'r',
  SETITEM = 's',
  TUPLE = 't',
  EMPTY_TUPLE = ')',
  SETITEMS = 'u',
  BINFLOAT = 'G',
  BINBYTES = 'B',
  SHORT_BINBYTES = 'C',
  PROTO = 0x80,
  NEWOBJ = 0x81,
  EXT1 = 0x82,
  EXT2 = 0x83,
  EXT4 = 0x84,
  TUPLE1 = 0x85,
  TUPLE2 = 0x86,
  TUPLE3 = 0x87,
  NEWTRUE = 0x88,
  NEWFALSE = 0x89,
  LONG1 = 0x8A,
  LONG4 = 0x8B,
  SHORT_BINUNICODE = 0x8C,
  BINUNICODE8 = 0x8D,
  BINBYTES8 = 0x8E,
  EMPTY_SET = 0x8F,
  ADDITEMS = 0x90,
  FROZENSET = 0x91,
  NEWOBJ_EX = 0x92,
  STACK_GLOBAL = 0x93,
  MEMOIZE = 0x94,
  FRAME = 0x95,
  BYTEARRAY8 = 0x96,
  NEXT_BUFFER = 0x97,
  READONLY_BUFFER = 0x98,
};

// The name of an opcode that only protocol 0, the extension registry or out-of-band buffers need, or null.
const char* refused(std::uint8_t op) {
  switch (op) {
    case FLOAT:
      return "FLOAT";
    case STRING:
      return "STRING";
    case UNICODE_:
      return "UNICODE";
    case PERSID:
      return "PERSID";
    case INST:
      return "INST";
    case OBJ:
      return "OBJ";
    case EXT1:
      return "EXT1";
    case EXT2:
      return "EXT2";
    case EXT4:
      return "EXT4";
    case NEXT_BUFFER:
      return "NEXT_BUFFER";
    case READONLY_BUFFER:
      return "READONLY_BUFFER";
    default:
      return nullptr;
  }
}

struct Value {
  std::int64_t payload = 0;  // int_: the integer; float_: its bits; otherwise an index into a table of Machine
  Kind kind = Kind::absent;

  [[nodiscard]] std::size_t index() const { return static_cast<std::size_t>(payload); }
  [[nodiscard]] bool is(Kind other) const { return kind == other; }
  [[nodiscard]] bool is_bool() const { return kind == Kind::true_ || kind == Kind::false_; }
  [[nodiscard]] bool is_call() const { return kind == Kind::call || kind == Kind::object; }
  [[nodiscard]] bool is_dict() const { return kind == Kind::dict || kind == Kind::ordered_dict; }
  [[nodiscard]] bool is_sequence() const { return kind == Kind::tuple || kind == Kind::list; }
};

Value plain(Kind kind) { return {0, kind}; }
Value integer(std::int64_t n) { return {n, Kind::int_}; }
Value indexed(Kind kind, std::size_t index) { return {static_cast<std::int64_t>(index), kind}; }

// Values in a row that somebody else keeps.
struct Values {
  const Value* data = nullptr;
  std::size_t size = 0;

  [[nodiscard]] const Value* begin() const { return data; }
  [[nodiscard]] const Value* end() const { return data + size; }
  [[nodiscard]] const Value& operator[](std::size_t i) const { return data[i]; }
};

// A container. Children that were all there from the start lie in Machine::fixed; what may grow has a list of its own.
struct Node {
  std::size_t place =
      kNone;  // tuple, typed: first child in fixed. call, object: in calls. others: in lists, or kNone if empty
  std::size_t count = 0;  // tuple, typed: children. ordered_dict: 1 + its state's place in fixed, or 0
};

// What a callable would have made of its arguments, and what was then put into it.
struct Call {
  Value callable;
  Value args;
  Value kwargs;
  Value state;
  bool built = false;
  std::vector<Value> appends;
  std::vector<Value> items;
};

// A name the pickle gave. `action` is what policy says of it, 0 for a stranger.
struct Global {
  std::size_t module;
  std::size_t name;
  std::uint32_t action;
};

// A persistent id: one record's worth of bytes, and what its elements are.
struct Storage {
  std::size_t key;
  std::size_t location;
  std::int64_t nbytes;
  std::uint64_t offset;
  std::uint32_t action;
};

// One dense row, already proved to lie inside its storage.
struct Tensor {
  std::size_t storage;
  std::int64_t storage_offset;
  std::size_t dims;  // where its sizes begin; its strides follow them
  std::uint64_t offset;
  std::uint32_t ndim;
  std::uint8_t dtype;
  std::uint8_t itemsize;
  std::uint8_t flags;
};

// Thrown where Python has an IndexError; the loop knows the offset.
struct Underflow {};

// The stack, cut by MARK: nothing can reach below the last one.
class Stack {
 public:
  Stack() : values_(64) {}

  void push(Value value) {
    if (top_ == values_.size()) {
      values_.resize(2 * top_);
    }
    values_[top_++] = value;
  }

  Value pop() {
    need_one();
    return values_[--top_];
  }

  Value& top() {
    need_one();
    return values_[top_ - 1];
  }

  void mark() {
    marks_.push_back(base_);
    base_ = top_;
  }

  // What lies above the last mark, which goes; good until the next push.
  Values unmark() {
    if (marks_.empty()) {
      throw Underflow();
    }
    const Values above{values_.data() + base_, top_ - base_};
    top_ = base_;
    base_ = marks_.back();
    marks_.pop_back();
    return above;
  }

  [[nodiscard]] bool at_mark() const { return top_ == base_; }
  [[nodiscard]] bool empty() const { return top_ == 0 && marks_.empty(); }

 private:
  void need_one() const {
    if (top_ == base_) {
      throw Underflow();
    }
  }

  std::vector<Value> values_;
  std::size_t top_ = 0;
  std::size_t base_ = 0;            // of what is above the last mark
  std::vector<std::size_t> marks_;  // the bases below
};

// Slots by number. Picklers count up from 0: such slots lie in a row. LONG_BINPUT can name slot 4,294,967,295 at will,
// so that a number far beyond the count of slots goes into a map, and never sizes anything.
class Memo {
 public:
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
    if (slot >= row_.size() || row_[static_cast<std::size_t>(slot)].is(Kind::absent)) {
      add(slot, value);
    } else {
      row_[static_cast<std::size_t>(slot)] = value;
    }
  }

 private:
  void add(std::uint64_t slot, Value value) {
    const auto found = far_.find(slot);
    if (found != far_.end()) {
      found->second = value;
    } else if (slot < 2 * count() + 1024) {
      if (slot >= row_.size()) {
        row_.resize(static_cast<std::size_t>(slot) + 1);
      }
      row_[static_cast<std::size_t>(slot)] = value;
      ++in_row_;
    } else {
      far_.emplace(slot, value);
    }
  }

  std::vector<Value> row_;  // absent: never written
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
      : cursor_(program, Blame::program), actions_(actions), limits_(limits), pairs_left_(program.size) {
    const std::uint32_t* byte_storage = actions.find("torch", "ByteStorage");
    uint8_ = byte_storage == nullptr ? 0 : dtype_of(*byte_storage);
    // Guesses that a pickle of tensors never grows past: memory that is not touched costs nothing.
    const std::size_t guess = std::min(program.size, kMaxGuess);
    fixed_.reserve(guess / 8);
    nodes_.reserve(guess / 24);
    texts_.reserve(guess / 64);
  }

  // The opcode loop -> the root.
  Value run();
  // Numbers what the root reaches, breadth first.
  Graph flatten(Value root);

 private:
  [[noreturn]] void fail(const std::string& what) const { cursor_.fail(what); }
  [[noreturn]] void fail_table(const std::string& what) const { throw Error(Blame::table, cursor_.marked(), what); }

  // Strings and integers.
  Value text(Span utf8);
  Value native_text(Span bytes);
  Value bytes(Kind kind, Span raw);
  Value long_bytes(Span little_endian);
  Value decimal(Span digits);
  std::uint64_t slot(Span digits) const;
  void need_digits(Span text) const;
  Span line();
  std::size_t name_of(std::size_t text);

  // Containers.
  Value tuple(Values children);
  Value container(Kind kind, Values children);
  Values children(const Value& node) const;
  std::vector<Value>& list_of(const Value& node);
  void check_key(const Value& key);
  void set_items(const Value& target, Values pairs);
  void append(const Value& target, Values values);
  void add_items(const Value& target, Values values);
  Value frozenset(Values values);
  void build(const Value& target, const Value& state);

  // Calls.
  Value global(const Value& module, const Value& name);
  Value persistent(const Value& pid);
  Value call(Kind kind, const Value& callable, const Value& args, const Value& kwargs);
  Value reduce(const Value& callable, const Value& args);
  Value ordered_dict(Values args);
  Value typed(const Value& callable, const Value& args);
  Value new_object(const Value& cls, const Value& args, const Value& kwargs);
  Value tensor(std::uint32_t verb, Values args);
  Values integers(const Value& value) const;
  std::uint8_t metadata(const Value& value, std::uint32_t traits) const;
  void check_geometry(const Storage& storage, std::uint32_t itemsize, std::int64_t storage_offset, Values sizes,
                      Values strides) const;

  [[nodiscard]] std::string_view letters(std::size_t text) const { return texts_[text].utf8.text(); }
  [[nodiscard]] bool says(const Value& value, std::string_view word) const {
    return value.is(Kind::str) && letters(value.index()) == word;
  }
  // The action of a global, 0 of anything else.
  [[nodiscard]] std::uint32_t action_of(const Value& value) const {
    return value.is(Kind::global) ? globals_[value.index()].action : 0;
  }

  Cursor cursor_;
  const Actions& actions_;
  const Limits& limits_;
  Memo memo_;

  std::vector<Text> texts_;
  std::deque<std::string> recoded_;
  std::vector<Span> blobs_;
  std::vector<Long> longs_;
  std::vector<Node> nodes_;
  std::vector<Value> fixed_;
  std::vector<std::vector<Value>> lists_;
  std::vector<Call> calls_;
  std::vector<Global> globals_;
  std::vector<Storage> storages_;
  std::vector<Tensor> tensors_;
  std::vector<std::int64_t> dims_;

  // Texts that are compared get a number, the same for the same bytes: a long key is hashed once, however often it
  // comes.
  HashIndex names_;
  std::vector<std::size_t> name_texts_;     // name -> a text
  std::vector<std::size_t> name_storages_;  // name -> the storage with this key, or kNone
  std::map<std::pair<std::size_t, std::size_t>, std::size_t> globals_by_name_;  // (module, name) -> global

  std::size_t empty_tuple_ = kNone;  // Python has only one
  std::uint32_t uint8_ = 0;
  std::int64_t tuple_keys_seen_ = 0;
  std::uint64_t pairs_left_;
};

// ---------------------------------------------------------------------------------------------- strings and integers

Value Machine::text(Span utf8) {
  const Encoding encoding = encoding_of(utf8);
  if (encoding == Encoding::other) {
    fail("a string is not UTF-8");
  }
  texts_.push_back({utf8, kNone, encoding == Encoding::ascii});
  return indexed(Kind::str, texts_.size() - 1);
}

// A byte string of Python 2: UTF-8 if it is, Latin-1 otherwise, which takes anything.
Value Machine::native_text(Span bytes) {
  const Encoding encoding = encoding_of(bytes);
  if (encoding == Encoding::ascii || encoding == Encoding::utf8) {
    texts_.push_back({bytes, kNone, encoding == Encoding::ascii});
  } else {
    std::string& out = recoded_.emplace_back();
    for (const char c : bytes.text()) {
      const auto byte = static_cast<unsigned char>(c);
      if (byte < 0x80) {
        out += c;
      } else {
        out += static_cast<char>(0xC0 | byte >> 6);
        out += static_cast<char>(0x80 | (byte & 0x3F));
      }
    }
    texts_.push_back({Span(out.data(), out.size()), kNone, false});
  }
  return indexed(Kind::str, texts_.size() - 1);
}

Value Machine::bytes(Kind kind, Span raw) {
  blobs_.push_back(raw);
  return indexed(kind, blobs_.size() - 1);
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
  longs_.push_back({little_endian, false});
  return indexed(Kind::long_, longs_.size() - 1);
}

void Machine::need_digits(Span text) const {
  std::string_view digits = text.text();
  if (!digits.empty() && digits.front() == '-') {
    digits.remove_prefix(1);
  }
  const bool only_digits = std::all_of(digits.begin(), digits.end(), [](char c) { return c >= '0' && c <= '9'; });
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
  longs_.push_back({text, true});
  return indexed(Kind::long_, longs_.size() - 1);
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

Span Machine::line() {
  Span found;
  if (limits_.text_nbytes < 0 || !cursor_.line(static_cast<std::uint64_t>(limits_.text_nbytes), &found)) {
    fail("no line end within " + std::to_string(limits_.text_nbytes) + " bytes");
  }
  return found;
}

std::size_t Machine::name_of(std::size_t text) {
  if (texts_[text].name == kNone) {
    const std::uint64_t hash = siphash(texts_[text].utf8, process_sip_key());
    std::size_t name = names_.find(hash, [&](std::size_t n) { return letters(name_texts_[n]) == letters(text); });
    if (name == HashIndex::kNotFound) {
      name = name_texts_.size();
      names_.add(hash, name);
      name_texts_.push_back(text);
      name_storages_.push_back(kNone);
    }
    texts_[text].name = name;
  }
  return texts_[text].name;
}

// -------------------------------------------------------------------------------------------------------- containers

Value Machine::tuple(Values children) {
  if (children.size == 0 && empty_tuple_ != kNone) {
    return indexed(Kind::tuple, empty_tuple_);
  }
  const std::size_t node = nodes_.size();
  nodes_.push_back({fixed_.size(), children.size});
  fixed_.insert(fixed_.end(), children.begin(), children.end());
  if (children.size == 0) {
    empty_tuple_ = node;
  }
  return indexed(Kind::tuple, node);
}

// A list, set, frozenset or dict.
Value Machine::container(Kind kind, Values children) {
  nodes_.emplace_back();
  const Value made = indexed(kind, nodes_.size() - 1);
  if (children.size != 0) {
    list_of(made).assign(children.begin(), children.end());
  }
  return made;
}

// Of a tuple, list, set, frozenset, dict (without its state) or typed.
Values Machine::children(const Value& value) const {
  const Node& node = nodes_[value.index()];
  if (value.is(Kind::tuple) || value.is(Kind::typed)) {
    return {fixed_.data() + node.place, node.count};
  }
  if (node.place == kNone) {
    return {};
  }
  const std::vector<Value>& list = lists_[node.place];
  return {list.data(), list.size()};
}

// Where the children of a list, set, frozenset or dict grow; most in a checkpoint never have any.
std::vector<Value>& Machine::list_of(const Value& value) {
  Node& node = nodes_[value.index()];
  if (node.place == kNone) {
    node.place = lists_.size();
    lists_.emplace_back();
  }
  return lists_[node.place];
}

// What may be a dict key: whatever hashes in bounded time and cannot be made to collide at will.
void Machine::check_key(const Value& key) {
  const auto is_plain = [](const Value& value) {
    switch (value.kind) {
      case Kind::str:
      case Kind::none:
      case Kind::true_:
      case Kind::false_:
      case Kind::int_:
      case Kind::float_:
      case Kind::bytes:
      case Kind::global:
      case Kind::call:
      case Kind::object:
        return true;
      default:
        return false;
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

void Machine::set_items(const Value& target, Values pairs) {
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
    std::vector<Value>& items = target.is_call() ? calls_[nodes_[target.index()].place].items : list_of(target);
    items.insert(items.end(), pairs.begin(), pairs.end());
  }
}

void Machine::append(const Value& target, Values values) {
  if (!target.is(Kind::list) && !target.is_call()) {
    fail("APPENDS on something that is no list");
  }
  if (values.size != 0) {
    std::vector<Value>& list = target.is_call() ? calls_[nodes_[target.index()].place].appends : list_of(target);
    list.insert(list.end(), values.begin(), values.end());
  }
}

void Machine::add_items(const Value& target, Values values) {
  if (!target.is(Kind::set)) {
    fail("ADDITEMS on something that is no set");
  }
  for (const Value& value : values) {
    check_key(value);
  }
  if (values.size != 0) {
    std::vector<Value>& list = list_of(target);
    list.insert(list.end(), values.begin(), values.end());
  }
}

Value Machine::frozenset(Values values) {
  for (const Value& value : values) {
    check_key(value);
  }
  return container(Kind::frozenset, values);
}

void Machine::build(const Value& target, const Value& state) {
  Node* const node = target.is_call() || target.is(Kind::ordered_dict) ? &nodes_[target.index()] : nullptr;
  if (node == nullptr) {
    fail("BUILD on something that takes no state");
  }
  if (target.is_call() ? calls_[node->place].built : node->count != 0) {
    fail("BUILD a second time on one object");
  }
  if (target.is_call()) {
    calls_[node->place].state = state;
    calls_[node->place].built = true;
  } else {
    fixed_.push_back(state);
    node->count = fixed_.size();
  }
}

// ------------------------------------------------------------------------------------------------------------- calls

Value Machine::global(const Value& module, const Value& name) {
  if (!module.is(Kind::str) || !name.is(Kind::str)) {
    fail("a global's module and name must be strings");
  }
  const auto place = globals_by_name_.try_emplace({name_of(module.index()), name_of(name.index())}, globals_.size());
  if (place.second) {
    const std::uint32_t* action = actions_.find(letters(module.index()), letters(name.index()));
    if (action == nullptr && limits_.refuse_unknown) {
      const std::string dotted = std::string(letters(module.index())).append(".").append(letters(name.index()));
      Error error(
          Blame::unsafe, cursor_.marked(),
          "the file names " + dotted +
              ", which policy does not know; nothing of it was run. Leave out unknown='error' to read the file with "
              "an inert placeholder in its place");
      error.global_name = dotted;
      throw error;
    }
    globals_.push_back({module.index(), name.index(), action == nullptr ? 0 : *action});
  }
  return indexed(Kind::global, place.first->second);
}

// ('storage', class, key, location, numel), and nothing else.
Value Machine::persistent(const Value& pid) {
  const Values parts = pid.is(Kind::tuple) ? children(pid) : Values{};
  if (parts.size != 5 || !says(parts[0], "storage")) {
    fail("a persistent id must be ('storage', class, key, location, numel)");
  }
  const Value& key = parts[2];
  const Value& location = parts[3];
  const Value& numel = parts[4];
  const std::uint32_t action = action_of(parts[1]);
  if (verb_of(action) != kVerbStorage) {
    fail("a persistent id names a class that is no storage class");
  }
  if (!key.is(Kind::str) || !location.is(Kind::str)) {
    fail("a persistent id's key and location must be strings");
  }
  if (!numel.is(Kind::int_) || numel.payload < 0) {
    fail("a persistent id's element count must be an integer from 0 to 2**63 - 1");
  }
  std::int64_t nbytes = 0;
  if (!multiply(numel.payload, itemsize_of(action), &nbytes)) {
    fail("a storage's size in bytes passes 2**63 - 1");
  }

  std::size_t& place = name_storages_[name_of(key.index())];
  if (place == kNone) {
    place = storages_.size();
    storages_.push_back({key.index(), location.index(), nbytes, cursor_.marked(), action});
    return indexed(Kind::storage, place);
  }
  const Storage& found = storages_[place];
  if (found.nbytes != nbytes) {
    fail("storage " + quoted(letters(key.index())) + " has " + std::to_string(found.nbytes) +
         " bytes in one persistent id, " + std::to_string(nbytes) + " in another");
  }
  const std::uint32_t one = dtype_of(found.action);
  const std::uint32_t two = dtype_of(action);
  // Bytes without a type and bytes as uint8 are the one pair of classes that torch.save mixes under one key.
  const bool byte_like = (one == kUntyped && two == uint8_) || (one == uint8_ && two == kUntyped);
  if (one != two && !(itemsize_of(found.action) == 1 && byte_like)) {
    fail("storage " + quoted(letters(key.index())) + " has two element types");
  }
  return indexed(Kind::storage, place);
}

Value Machine::call(Kind kind, const Value& callable, const Value& args, const Value& kwargs) {
  nodes_.push_back({calls_.size(), 0});
  Call& made = calls_.emplace_back();
  made.callable = callable;
  made.args = args;
  made.kwargs = kwargs;
  return indexed(kind, nodes_.size() - 1);
}

Value Machine::reduce(const Value& callable, const Value& args) {
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
  return call(Kind::call, callable, args, plain(Kind::absent));
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
  std::vector<Value> items;
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
    items.insert(items.end(), pair.begin(), pair.end());
  }
  if (!items.empty()) {
    list_of(made) = std::move(items);
  }
  return made;
}

// A tensor with a Python type and attributes of its own.
Value Machine::typed(const Value& callable, const Value& args) {
  const Values parts = children(args);
  const std::string_view name = letters(globals_[callable.index()].name);
  if (parts.size != 4) {
    fail(std::string(name) + " takes 4 arguments, not " + std::to_string(parts.size));
  }
  const std::uint32_t function = action_of(parts[0]);
  if (!rebuilds(function)) {
    return call(Kind::call, callable, args, plain(Kind::absent));
  }
  if (!parts[2].is(Kind::tuple)) {
    fail(std::string(name) + " takes a tuple of arguments");
  }
  const Value made[] = {tensor(verb_of(function), children(parts[2])), parts[1], parts[3]};
  nodes_.push_back({fixed_.size(), 3});
  fixed_.insert(fixed_.end(), std::begin(made), std::end(made));
  return indexed(Kind::typed, nodes_.size() - 1);
}

Value Machine::new_object(const Value& cls, const Value& args, const Value& kwargs) {
  if (!cls.is(Kind::global) && !cls.is_call()) {
    fail("NEWOBJ of something that is no global");
  }
  if (!args.is(Kind::tuple)) {
    fail("NEWOBJ takes a tuple of arguments");
  }
  if (!kwargs.is(Kind::none) && !kwargs.is_dict()) {
    fail("NEWOBJ_EX takes a dict of keyword arguments");
  }
  return call(Kind::object, cls, args, kwargs.is(Kind::none) ? plain(Kind::absent) : kwargs);
}

// First that every argument of a rebuild call is of its type, then that the tensor lies in its storage.
Value Machine::tensor(std::uint32_t verb, Values args) {
  const std::size_t fewest = verb == kVerbTensor ? 4 : verb == kVerbTensorV2 ? 6 : 7;
  if (args.size < fewest || args.size > fewest + (verb == kVerbTensor ? 0 : 1)) {
    fail("a tensor is rebuilt with " + std::to_string(args.size) + " arguments");
  }
  if (!args[0].is(Kind::storage)) {
    fail("a tensor is rebuilt on something that is no storage");
  }
  if (!args[1].is(Kind::int_)) {
    fail("a tensor's storage_offset must be a 64-bit integer");
  }
  const std::int64_t storage_offset = args[1].payload;
  const Values sizes = integers(args[2]);
  const Values strides = integers(args[3]);
  if (sizes.size != strides.size) {
    fail("a tensor has " + std::to_string(sizes.size) + " sizes and " + std::to_string(strides.size) + " strides");
  }
  const Storage& storage = storages_[args[0].index()];
  std::uint32_t type = storage.action;
  if (verb == kVerbTensorV3) {
    if (verb_of(action_of(args[6])) != kVerbDtype) {
      fail("a tensor's dtype is no dtype of torch");
    }
    if (itemsize_of(type) != 1) {
      fail("a tensor with a dtype of its own needs an untyped storage");
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
  check_geometry(storage, itemsize_of(type), storage_offset, sizes, strides);

  tensors_.push_back({args[0].index(), storage_offset, dims_.size(), cursor_.marked(),
                      static_cast<std::uint32_t>(sizes.size), static_cast<std::uint8_t>(dtype_of(type)),
                      static_cast<std::uint8_t>(itemsize_of(type)), flags});
  for (const Value& size : sizes) {
    dims_.push_back(size.payload);
  }
  for (const Value& stride : strides) {
    dims_.push_back(stride.payload);
  }
  return indexed(Kind::tensor, tensors_.size() - 1);
}

// A size or stride: a tuple, a list, or torch.Size(tuple).
Values Machine::integers(const Value& value) const {
  const Value* sequence = &value;
  if (value.is_call()) {
    const Call& call = calls_[nodes_[value.index()].place];
    if (verb_of(action_of(call.callable)) == kVerbSize && children(call.args).size == 1) {
      sequence = children(call.args).begin();
    }
  }
  if (!sequence->is_sequence()) {
    fail("a tensor's size and stride must be tuples");
  }
  const Values found = children(*sequence);
  if (limits_.dimensions < 0 || found.size > static_cast<std::uint64_t>(limits_.dimensions)) {
    fail("a tensor has " + std::to_string(found.size) + " dimensions; the limit is " +
         std::to_string(limits_.dimensions));
  }
  for (const Value& each : found) {
    if (!each.is(Kind::int_)) {
      fail("a tensor's sizes and strides must be 64-bit integers");
    }
  }
  return found;
}

// {'conj': True, 'neg': True}: the math bits; the bytes are stored as if neither were set.
std::uint8_t Machine::metadata(const Value& value, std::uint32_t traits) const {
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

void Machine::check_geometry(const Storage& storage, std::uint32_t itemsize, std::int64_t storage_offset, Values sizes,
                             Values strides) const {
  bool negative = storage_offset < 0;
  for (std::size_t i = 0; i < sizes.size; ++i) {
    negative = negative || sizes[i].payload < 0 || strides[i].payload < 0;
  }
  if (negative) {
    fail_table("a tensor has a negative storage_offset, size or stride");
  }
  std::int64_t numel = 1;
  std::int64_t last = storage_offset;
  bool empty = false;
  for (std::size_t i = 0; i < sizes.size; ++i) {
    const std::int64_t n = sizes[i].payload;
    if (n == 0) {
      empty = true;
      continue;
    }
    std::int64_t reach = 0;
    if (!multiply(numel, n, &numel) || !multiply(n - 1, strides[i].payload, &reach) || !add(last, reach, &last)) {
      fail_table("a tensor's extent passes 2**63 - 1 elements");
    }
  }
  // (last + 1) * itemsize > nbytes, without the product, which may pass 64 bits.
  const std::int64_t room = itemsize == 0 ? kMax63 : storage.nbytes / itemsize;
  if (!empty && last >= room && itemsize != 0) {
    fail_table("a tensor reaches past element " + std::to_string(last) + " of storage " + quoted(letters(storage.key)) +
               ", which has " + std::to_string(storage.nbytes) + " bytes of " + std::to_string(itemsize) +
               " an element");
  }
}

// ---------------------------------------------------------------------------------------------------------- the loop

Value Machine::run() {
  Cursor& cursor = cursor_;
  Stack stack;
  const auto remember = [&](std::uint64_t slot) { memo_.put(slot, stack.top()); };
  const auto recall = [&](std::uint64_t slot) {
    const Value* found = memo_.get(slot);
    if (found == nullptr) {
      fail("a memo slot is read that was never written");
    }
    stack.push(*found);
  };
  const auto make_tuple = [&](std::size_t count) {
    Value parts[3];
    for (std::size_t i = count; i-- > 0;) {
      parts[i] = stack.pop();
    }
    stack.push(tuple({parts, count}));
  };

  try {
    while (true) {
      cursor.mark();
      const std::uint8_t op = cursor.u8();
      switch (op) {
        // The stack and the memo.
        case MARK:
          stack.mark();
          break;
        case POP:  // a value, or a MARK with nothing above it
          if (stack.at_mark()) {
            stack.unmark();
          } else {
            stack.pop();
          }
          break;
        case POP_MARK:
          stack.unmark();
          break;
        case DUP:
          stack.push(stack.top());
          break;
        case BINPUT:
          remember(cursor.u8());
          break;
        case LONG_BINPUT:
          remember(cursor.u32());
          break;
        case MEMOIZE:
          remember(memo_.count());
          break;
        case PUT: {
          const std::uint64_t place = slot(line());
          if (place > kMaxSlot) {
            fail("a memo slot outside 32 bits");
          }
          remember(place);
          break;
        }
        case BINGET:
          recall(cursor.u8());
          break;
        case LONG_BINGET:
          recall(cursor.u32());
          break;
        case GET:
          recall(slot(line()));
          break;

        // Plain values.
        case NONE_:
          stack.push(plain(Kind::none));
          break;
        case NEWTRUE:
          stack.push(plain(Kind::true_));
          break;
        case NEWFALSE:
          stack.push(plain(Kind::false_));
          break;
        case BININT1:
          stack.push(integer(cursor.u8()));
          break;
        case BININT2:
          stack.push(integer(cursor.u16()));
          break;
        case BININT:
          stack.push(integer(static_cast<std::int32_t>(cursor.u32())));
          break;
        case LONG1:
          stack.push(long_bytes(cursor.take(cursor.u8())));
          break;
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
          const Span digits = line();
          if (digits.text() == "00" || digits.text() == "01") {
            stack.push(plain(digits.text() == "01" ? Kind::true_ : Kind::false_));
          } else {
            stack.push(decimal(digits));
          }
          break;
        }
        case LONG: {
          Span digits = line();
          if (!digits.text().empty() && digits.text().back() == 'L') {
            digits = digits.part(0, digits.size - 1);
          }
          stack.push(decimal(digits));
          break;
        }
        case BINFLOAT: {
          std::uint64_t bits = 0;
          for (int i = 0; i < 8; ++i) {  // the one big-endian number of the format
            bits = bits << 8 | cursor.u8();
          }
          stack.push({static_cast<std::int64_t>(bits), Kind::float_});
          break;
        }
        case SHORT_BINUNICODE:
          stack.push(text(cursor.take(cursor.u8())));
          break;
        case BINUNICODE:
          stack.push(text(cursor.take(cursor.u32())));
          break;
        case BINUNICODE8:
          stack.push(text(cursor.take(cursor.u64())));
          break;
        case SHORT_BINSTRING:
          stack.push(native_text(cursor.take(cursor.u8())));
          break;
        case BINSTRING: {
          const auto nbytes = static_cast<std::int32_t>(cursor.u32());
          if (nbytes < 0) {
            fail("a string of negative length");
          }
          stack.push(native_text(cursor.take(static_cast<std::uint32_t>(nbytes))));
          break;
        }
        case SHORT_BINBYTES:
          stack.push(bytes(Kind::bytes, cursor.take(cursor.u8())));
          break;
        case BINBYTES:
          stack.push(bytes(Kind::bytes, cursor.take(cursor.u32())));
          break;
        case BINBYTES8:
          stack.push(bytes(Kind::bytes, cursor.take(cursor.u64())));
          break;
        case BYTEARRAY8:
          stack.push(bytes(Kind::bytearray, cursor.take(cursor.u64())));
          break;

        // Containers.
        case EMPTY_TUPLE:
          make_tuple(0);
          break;
        case TUPLE1:
          make_tuple(1);
          break;
        case TUPLE2:
          make_tuple(2);
          break;
        case TUPLE3:
          make_tuple(3);
          break;
        case TUPLE:
          stack.push(tuple(stack.unmark()));
          break;
        case EMPTY_LIST:
          stack.push(container(Kind::list, {}));
          break;
        case LIST:
          stack.push(container(Kind::list, stack.unmark()));
          break;
        case EMPTY_DICT:
          stack.push(container(Kind::dict, {}));
          break;
        case DICT: {
          const Values pairs = stack.unmark();
          const Value made = container(Kind::dict, {});
          set_items(made, pairs);
          stack.push(made);
          break;
        }
        case EMPTY_SET:
          stack.push(container(Kind::set, {}));
          break;
        case FROZENSET:
          stack.push(frozenset(stack.unmark()));
          break;
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
          const Span module = line();
          const Span name = line();
          const Value module_text = text(module);
          stack.push(global(module_text, text(name)));
          break;
        }
        case STACK_GLOBAL: {
          const Value name = stack.pop();
          stack.top() = global(stack.top(), name);
          break;
        }
        case BINPERSID:
          stack.top() = persistent(stack.top());
          break;
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
          stack.top() = new_object(stack.top(), args, plain(Kind::none));
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
            throw Error(Blame::unsupported, cursor.marked(),
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
          if (!stack.empty()) {
            fail("STOP with values or marks left on the stack");
          }
          return root;
        }
        default: {
          const char* const name = refused(op);
          if (name != nullptr) {
            throw Error(Blame::unsupported, cursor.marked(),
                        std::string("opcode ") + name +
                            " is not written by torch.save in protocols 2 to 5; save the file again with one of these");
          }
          fail("byte " + std::to_string(op) + " is no pickle opcode");
        }
      }
    }
  } catch (const Underflow&) {
    fail("stack underflow");
  }
}

// ------------------------------------------------------------------------------------------------------- the columns

// Ids in the order of first meeting.
class Numbering {
 public:
  explicit Numbering(std::size_t count) : ids_(count, -1) {}

  // The id of the object at this index, and whether it is new.
  std::pair<std::int64_t, bool> meet(std::size_t index) {
    const bool is_new = ids_[index] < 0;
    if (is_new) {
      ids_[index] = next_++;
    }
    return {ids_[index], is_new};
  }

 private:
  std::vector<std::int64_t> ids_;
  std::int64_t next_ = 0;
};

Graph Machine::flatten(Value root) {
  Graph graph;
  std::vector<Value> pool{root};  // the values; grows while it is scanned
  Numbering node_ids(nodes_.size());
  Numbering tensor_ids(tensors_.size());
  Numbering storage_ids(storages_.size());
  Numbering global_ids(globals_.size());
  const auto put = [&](Values values) { pool.insert(pool.end(), values.begin(), values.end()); };

  const auto storage_id = [&](std::size_t index) {
    const auto [id, is_new] = storage_ids.meet(index);
    if (is_new) {
      const Storage& storage = storages_[index];
      graph.storages.insert(graph.storages.end(),
                            {dtype_of(storage.action), storage.nbytes, static_cast<std::int64_t>(storage.offset)});
      graph.storage_keys.push_back(storage.key);
      graph.locations.push_back(storage.location);
    }
    return id;
  };
  const auto tensor_id = [&](std::size_t index) {
    const auto [id, is_new] = tensor_ids.meet(index);
    if (is_new) {
      const Tensor& tensor = tensors_[index];
      const std::int64_t storage = storage_id(tensor.storage);
      graph.tensors.insert(graph.tensors.end(), {storage, tensor.dtype, tensor.itemsize, tensor.storage_offset,
                                                 static_cast<std::int64_t>(graph.dims.size()), tensor.ndim,
                                                 tensor.flags, static_cast<std::int64_t>(tensor.offset)});
      const std::int64_t* const dims = dims_.data() + tensor.dims;
      graph.dims.insert(graph.dims.end(), dims, dims + 2 * tensor.ndim);
    }
    return id;
  };
  const auto global_id = [&](std::size_t index) {
    const auto [id, is_new] = global_ids.meet(index);
    if (is_new) {
      graph.globals.push_back(globals_[index].module);
      graph.globals.push_back(globals_[index].name);
    }
    return id;
  };
  // The children of node n are those of run n + 1; run 0 is the root alone.
  std::vector<std::size_t> run_ends{1};
  std::vector<std::int64_t> run_depths{0};
  std::size_t run = 0;
  const auto node_id = [&](const Value& value) {
    const auto [id, is_new] = node_ids.meet(value.index());
    if (!is_new) {
      return id;
    }
    const std::int64_t depth = run_depths[run];
    if (depth > limits_.depth) {
      fail("values are nested deeper than " + std::to_string(limits_.depth));
    }
    const std::size_t start = pool.size();
    std::size_t appends = 0;
    const Node& node = nodes_[value.index()];
    const Kind kind = value.kind;
    if (value.is_call()) {
      const Call& call = calls_[node.place];
      appends = call.appends.size();
      const Value parts[] = {call.callable, call.args, call.kwargs, call.state};
      put({parts, 4});
      put({call.appends.data(), call.appends.size()});
      put({call.items.data(), call.items.size()});
    } else {
      put(children(value));
      if (kind == Kind::ordered_dict && node.count != 0) {
        put({&fixed_[node.count - 1], 1});
      }
    }
    graph.nodes.insert(graph.nodes.end(),
                       {static_cast<std::int64_t>(kind), static_cast<std::int64_t>(start),
                        static_cast<std::int64_t>(pool.size() - start), static_cast<std::int64_t>(appends), depth});
    run_ends.push_back(pool.size());
    run_depths.push_back(depth + 1);
    return id;
  };

  for (std::size_t position = 0; position < pool.size(); ++position) {
    while (position >= run_ends[run]) {
      ++run;
    }
    const Value value = pool[position];
    std::int64_t payload = 0;
    switch (value.kind) {
      case Kind::none:
      case Kind::false_:
      case Kind::true_:
      case Kind::absent:
        break;
      case Kind::int_:
      case Kind::float_:
        payload = value.payload;
        break;
      case Kind::long_:
        payload = static_cast<std::int64_t>(graph.longs.size());
        graph.longs.push_back(longs_[value.index()]);
        break;
      case Kind::str:
        payload = static_cast<std::int64_t>(graph.strings.size());
        graph.strings.push_back(value.index());
        break;
      case Kind::bytes:
      case Kind::bytearray:
        payload = static_cast<std::int64_t>(graph.blobs.size());
        graph.blobs.push_back(blobs_[value.index()]);
        break;
      case Kind::global:
        payload = global_id(value.index());
        break;
      case Kind::storage:
        payload = storage_id(value.index());
        break;
      case Kind::tensor:
        payload = tensor_id(value.index());
        break;
      default:
        payload = node_id(value);
        break;
    }
    graph.kinds.push_back(value.kind);
    graph.payloads.push_back(payload);
  }
  graph.texts = std::move(texts_);
  graph.recoded = std::move(recoded_);
  return graph;
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
