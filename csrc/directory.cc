// Directory. Names are bytes and are compared as bytes. Where two readers could see two archives in one file, it is
// refused: that is how a scanner is shown one model and a loader another. Clauses are those of APPNOTE.TXT 6.3.10.
#include "directory.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "hash_index.h"
#include "siphash.h"

namespace zipslicer {
namespace {

using namespace std::string_view_literals;

constexpr std::uint64_t kEndNbytes = 22;      // 4.3.16, before its comment
constexpr std::uint64_t kEnd64Nbytes = 56;    // 4.3.14
constexpr std::uint64_t kLocatorNbytes = 20;  // 4.3.15
constexpr std::string_view kEndSignature = "PK\5\6"sv;
constexpr std::uint32_t kEnd64Signature = 0x06064b50;
constexpr std::uint32_t kLocatorSignature = 0x07064b50;
constexpr std::uint32_t kCentralSignature = 0x02014b50;
constexpr std::uint32_t kLocalSignature = 0x04034b50;
constexpr std::uint64_t kMax16 = 0xFFFF, kMax32 = 0xFFFFFFFF;  // "see the ZIP64 field", 4.4.1.4
constexpr std::uint64_t kMax63 = 0x7FFFFFFFFFFFFFFF;
constexpr std::uint32_t kFlagDescriptor = 1 << 3;  // sizes and CRC follow the payload; local ones are 0
constexpr std::uint32_t kFlagsRefused = 1 << 0 | 1 << 6 | 1 << 13;  // encrypted, strongly encrypted, masked headers
constexpr std::uint32_t kStored = 0;
constexpr std::uint16_t kZip64 = 1;   // 4.5.3
constexpr std::size_t kFewNames = 4;  // up to here, names that are looked for are compared and not hashed

[[noreturn]] void refuse(std::uint64_t offset, const std::string& what) { throw Error(Blame::archive, offset, what); }

std::string quoted(Span name) { return "'" + std::string(name.text()) + "'"; }

// ---- find_directory ----

struct EndRecord {
  Directory directory;
  std::uint64_t gap;  // bytes between the directory and its end records; 0 in an archive that stands where it says
};

// The ZIP64 end record and locator right before `at`, position of an end record that says `end` -> the same, in full.
// Returns where in the archive the locator sends us.
std::uint64_t widen(Span tail, std::size_t at, std::uint64_t tail_offset, Directory& end, std::uint64_t& here) {
  const std::uint64_t locator_offset = tail_offset + at - kLocatorNbytes;
  if (at < kLocatorNbytes + kEnd64Nbytes) {
    refuse(locator_offset, "a ZIP64 locator without its end record");
  }
  const std::uint64_t start = locator_offset - kEnd64Nbytes;
  Cursor in(tail.part(at - kLocatorNbytes - kEnd64Nbytes, kEnd64Nbytes + kLocatorNbytes), Blame::archive, start);
  const std::uint32_t signature = in.u32();
  const std::uint64_t size = in.u64();
  in.take(4);  // versions
  const std::uint32_t disk = in.u32(), directory_disk = in.u32();
  const std::uint64_t here64 = in.u64(), count64 = in.u64(), nbytes64 = in.u64(), offset64 = in.u64();
  in.take(4);  // the locator's signature
  const std::uint32_t locator_disk = in.u32();
  const std::uint64_t leads_to = in.u64();
  const std::uint32_t disks = in.u32();
  if (signature != kEnd64Signature || size != kEnd64Nbytes - 12) {
    refuse(locator_offset, "a ZIP64 locator without its end record");
  }
  if (locator_disk != 0 || disk != 0 || directory_disk != 0 || disks > 1) {
    refuse(start, "the archive is one part of several");
  }
  const auto agree = [](std::uint64_t small, std::uint64_t large, std::uint64_t saturated) {
    return small == saturated || small == large;
  };
  if (!agree(here, here64, kMax16) || !agree(end.count, count64, kMax16) || !agree(end.nbytes, nbytes64, kMax32) ||
      !agree(end.offset, offset64, kMax32)) {
    refuse(start, "the two end records disagree");
  }
  here = here64;
  end = {offset64, nbytes64, count64};
  return leads_to;
}

bool locator_before(Span tail, std::size_t at) {
  return at >= kLocatorNbytes &&
         Cursor(tail.part(at - kLocatorNbytes, kLocatorNbytes), Blame::archive).u32() == kLocatorSignature;
}

// REQUIRES: at + kEndNbytes <= tail.size.
EndRecord parse_end(Span tail, std::size_t at, std::uint64_t tail_offset, std::uint64_t base) {
  const std::uint64_t where = tail_offset + at;
  Cursor in(tail.part(at, kEndNbytes), Blame::archive, where);
  in.take(4);
  std::uint64_t disk = in.u16(), directory_disk = in.u16(), here = in.u16();
  Directory end{};
  end.count = in.u16();
  end.nbytes = in.u32();
  end.offset = in.u32();
  std::uint64_t start = where, leads_to = 0;
  if (locator_before(tail, at)) {
    leads_to = widen(tail, at, tail_offset, end, here);
    start -= kLocatorNbytes + kEnd64Nbytes;
    disk = disk == kMax16 ? 0 : disk;
    directory_disk = directory_disk == kMax16 ? 0 : directory_disk;
  } else if (end.nbytes == kMax32 || end.offset == kMax32) {
    refuse(where, "the end record sends to a ZIP64 one that is not there");
  }
  if (disk != 0 || directory_disk != 0 || here != end.count) {
    refuse(where, "the archive is one part of several");
  }
  const std::uint64_t room = start < base ? 0 : start - base;
  if (start < base || end.count > kMax63 || end.offset > room || end.nbytes > room - end.offset) {
    refuse(where, "the central directory does not lie before its end record");
  }
  const std::uint64_t gap = room - end.offset - end.nbytes;
  if (gap == 0 && start != where && leads_to != room) {
    // The locator must lead to the record that stands before it, and nowhere else: CVE-2025-8291. (With a gap it
    // cannot, and the gap is what there is to say.)
    refuse(where - kLocatorNbytes, "the ZIP64 locator does not lead to the ZIP64 end record before it");
  }
  end.offset += base;
  return {end, gap};
}

// Positions of all end records that are whole, comment included.
std::vector<std::size_t> end_records(Span tail) {
  std::vector<std::size_t> found;
  const std::string_view text = tail.text();
  for (std::size_t at = text.find(kEndSignature); at != text.npos; at = text.find(kEndSignature, at + 1)) {
    if (tail.size - at < kEndNbytes) {
      break;
    }
    const std::uint16_t comment = Cursor(tail.part(at + kEndNbytes - 2, 2), Blame::archive).u16();
    if (comment <= tail.size - at - kEndNbytes) {
      found.push_back(at);
    }
  }
  return found;
}

bool same(const Directory& a, const Directory& b) {
  return a.offset == b.offset && a.nbytes == b.nbytes && a.count == b.count;
}

}  // namespace

Directory find_directory(Span tail, std::uint64_t tail_offset, std::uint64_t base) {
  const std::vector<std::size_t> found = end_records(tail);
  if (found.empty()) {
    refuse(tail_offset + tail.size, "no end of central directory: the file is truncated, or it is no ZIP archive");
  }
  const EndRecord last = parse_end(tail, found.back(), tail_offset, base);
  if (last.gap != 0) {
    refuse(tail_offset + found.back(),
           std::to_string(last.gap) +
               " bytes too many before the end of the central directory: something was put before the archive, or "
               "several archives were joined; window=(offset, nbytes) names the one to read");
  }
  for (std::size_t i = 0; i + 1 < found.size(); ++i) {
    std::optional<EndRecord> other;
    try {
      other = parse_end(tail, found[i], tail_offset, base);
    } catch (const Error&) {
      continue;  // payload or comment that looks like an end record, and is none
    }
    if (other->gap == 0 && !same(other->directory, last.directory)) {
      refuse(tail_offset + found[i], "two end records name two different directories");
    }
  }
  const Directory& directory = last.directory;
  if (directory.count == 0) {
    refuse(directory.offset, "the archive is empty");
  }
  if (directory.count > directory.nbytes / kCentralNbytes) {
    refuse(directory.offset, std::to_string(directory.count) + " records cannot be named in a directory of " +
                                 std::to_string(directory.nbytes) + " bytes");
  }
  return directory;
}

// ---- parse_directory ----

namespace {

// The sizes and the offset of a header, and how many bytes of ZIP64 field came with them.
struct Sizes {
  std::uint64_t nbytes;
  std::uint64_t stored;
  std::uint64_t header;
  bool wide;  // there is a ZIP64 field, so the descriptor, if any, has 24 bytes
};

// 4.5.3: the ZIP64 field holds what is saturated, in this order, and nothing else. `where` is the central header.
void widen(Span extra, Sizes& sizes, std::uint64_t where) {
  std::optional<Span> field;
  Cursor in(extra, Blame::archive, where);  // never marked again: all its errors name the central header
  while (!in.at_end()) {
    const std::uint16_t id = in.u16();
    const Span bytes = in.take(in.u16());
    if (id == kZip64) {
      if (field) {
        refuse(where, "two ZIP64 extra fields in one header");
      }
      field = bytes;
    }
  }
  std::size_t wanted = 0;
  for (const std::uint64_t value : {sizes.nbytes, sizes.stored, sizes.header}) {
    wanted += value == kMax32 ? 8 : 0;
  }
  if ((field ? field->size : 0) != wanted) {
    refuse(where, "a ZIP64 extra field does not fit the sizes and offset that send to it");
  }
  sizes.wide = field.has_value();
  if (wanted == 0) {
    return;
  }
  Cursor values(*field, Blame::archive, where);
  for (std::uint64_t* value : {&sizes.nbytes, &sizes.stored, &sizes.header}) {
    if (*value == kMax32) {
      *value = values.u64();
      if (*value > kMax63) {
        refuse(where, "a size or offset passes 2**63 - 1");
      }
    }
  }
}

// ASCII lower case of eight bytes at once: the top bit of each byte says "between A and Z", and 0x80 >> 2 is the 0x20
// between the cases.
std::uint64_t lower(std::uint64_t word) {
  constexpr std::uint64_t ones = 0x0101010101010101;
  const std::uint64_t low = word & 0x7f * ones;
  const std::uint64_t upper = (low + (0x80 - 'A') * ones) ^ (low + (0x7f - 'Z') * ones);
  return word | (upper & ~word & 0x80 * ones) >> 2;
}

bool equal_without_case(Span a, Span b) {
  if (a.size != b.size) {
    return false;
  }
  for (std::size_t at = 0; at < a.size; at += 8) {
    if (lower(a.word(at)) != lower(b.word(at))) {
      return false;
    }
  }
  return true;
}

// The names met so far, compared without case: torch looks names up so, and takes any of two. Open addressing with four
// bytes a slot: the pages of a larger table cost more, at the first touch, than the hashing does.
class Names {
 public:
  // `entries` may be filled as names are inserted, up to `count` of them.
  Names(Span block, const Entry* entries, std::size_t count) : block_(block), entries_(entries) {
    std::size_t slots = 16;
    while (slots / 2 < count) {
      slots *= 2;
    }
    slots_.resize(slots);
  }

  // False if the name of entry `number` is there already.
  bool insert(std::uint32_t number) {
    const Span name = name_of(number);
    const std::size_t mask = slots_.size() - 1;
    auto at = static_cast<std::size_t>(siphash(name, process_sip_key(), lower)) & mask;
    for (; slots_[at] != 0; at = (at + 1) & mask) {
      if (equal_without_case(name, name_of(slots_[at] - 1))) {
        return false;
      }
    }
    slots_[at] = number + 1;
    return true;
  }

 private:
  [[nodiscard]] Span name_of(std::size_t number) const {
    const Entry& entry = entries_[number];
    return block_.part(static_cast<std::size_t>(entry.name_start), static_cast<std::size_t>(entry.name_nbytes));
  }

  Span block_;
  const Entry* entries_;
  std::vector<std::uint32_t> slots_;  // number + 1; 0: free
};

// Reads one central header (4.3.12); the cursor is marked at it. Returns its name. Until set_limits, header_offset is
// unsigned and unchecked, and payload_offset holds the bytes of descriptor after the payload.
Span parse_central(Cursor& in, std::uint64_t base, Entry& entry) {
  const std::uint64_t where = in.marked();
  const std::size_t start = in.position();
  Cursor fixed(in.take(kCentralNbytes), Blame::archive, where);
  const std::uint32_t signature = fixed.u32();
  fixed.take(4);  // versions
  const std::uint32_t flags = fixed.u16(), method = fixed.u16();
  fixed.take(4);  // time and date
  const std::uint32_t crc = fixed.u32();
  Sizes sizes{};
  sizes.stored = fixed.u32();
  sizes.nbytes = fixed.u32();
  const std::uint16_t name_nbytes = fixed.u16(), extra_nbytes = fixed.u16(), comment_nbytes = fixed.u16();
  const std::uint16_t disk = fixed.u16();
  fixed.take(6);  // attributes
  sizes.header = fixed.u32();
  if (signature != kCentralSignature) {
    refuse(where, "a central header has a wrong signature");
  }
  const Span name = in.take(name_nbytes);
  const Span extra = in.take(extra_nbytes);
  in.take(comment_nbytes);
  widen(extra, sizes, where);
  if (disk != 0) {
    refuse(where, "record " + quoted(name) + " lies on another disk");
  }
  if ((flags & kFlagsRefused) != 0) {
    refuse(where, "record " + quoted(name) + " is encrypted");
  }
  if (method == kStored && sizes.stored != sizes.nbytes) {
    refuse(where, "record " + quoted(name) + " is stored, and has two sizes");
  }
  if (name.text().find('\0') != name.text().npos) {
    refuse(where, "record " + quoted(name) + " has a NUL in its name");
  }
  const std::uint64_t descriptor = (flags & kFlagDescriptor) == 0 ? 0 : sizes.wide ? 24 : 16;
  entry = {static_cast<std::int64_t>(base + sizes.header),
           static_cast<std::int64_t>(descriptor),
           static_cast<std::int64_t>(sizes.stored),
           static_cast<std::int64_t>(sizes.nbytes),
           0,
           crc,
           method,
           flags,
           static_cast<std::int64_t>(start + kCentralNbytes),
           name_nbytes};
  return name;
}

// The archive root and its slash: the first folder of the first name, as torch has it.
Span root_of(Span name, std::uint64_t where) {
  const std::size_t slash = name.text().find('/');
  const Span root = name.part(0, slash == std::string_view::npos ? 0 : slash + 1);
  if (root.size <= 1 || root.text() == "./" || root.text() == "../") {
    refuse(where, "the first record, " + quoted(name) + ", is in no folder: torch.save makes one");
  }
  return root;
}

// Each record ends before the next one's header, the last one before the directory; then predict the payloads.
void set_limit(Entry& entry, std::uint64_t limit) {
  const auto header = static_cast<std::uint64_t>(entry.header_offset);
  const auto stored = static_cast<std::uint64_t>(entry.stored_nbytes);
  const auto descriptor = static_cast<std::uint64_t>(entry.payload_offset);
  const std::uint64_t least = header + kLocalNbytes + static_cast<std::uint64_t>(entry.name_nbytes);
  if (header > kMax63 || least > limit || stored > limit - least) {
    refuse(header, "a record overlaps the next one or the central directory");
  }
  // Seen from the end: what stands after a payload is known from the directory, what stands before is not (writers pad
  // there). Right for every writer but one; parse_local_header has the last word.
  const std::uint64_t room = limit - stored;
  const std::uint64_t predicted = descriptor > room - least ? least : room - descriptor;
  entry.limit = static_cast<std::int64_t>(limit);
  entry.payload_offset = ~static_cast<std::int64_t>(predicted);
}

void set_limits(Entry* entries, std::size_t count, std::uint64_t directory) {
  const auto earlier = [](const Entry& a, const Entry& b) {
    return static_cast<std::uint64_t>(a.header_offset) < static_cast<std::uint64_t>(b.header_offset);
  };
  std::uint64_t limit = directory;
  if (std::is_sorted(entries, entries + count, earlier)) {  // as every writer leaves it
    for (std::size_t i = count; i-- > 0;) {
      set_limit(entries[i], limit);
      limit = static_cast<std::uint64_t>(entries[i].header_offset);
    }
    return;
  }
  std::vector<Entry*> order(count);
  for (std::size_t i = 0; i < count; ++i) {
    order[i] = entries + i;
  }
  std::sort(order.begin(), order.end(), [&](const Entry* a, const Entry* b) { return earlier(*b, *a); });
  for (Entry* entry : order) {
    set_limit(*entry, limit);
    limit = static_cast<std::uint64_t>(entry->header_offset);
  }
}

}  // namespace

std::size_t parse_directory(Span block, std::uint64_t count, std::uint64_t offset, std::uint64_t base, Entry* entries) {
  Cursor in(block, Blame::archive, offset);
  // An entry takes at least kCentralNbytes: a larger count ends in "truncated" below, before the room for entries does.
  const std::uint64_t most = std::min<std::uint64_t>(count, block.size / kCentralNbytes);
  if (most >= std::numeric_limits<std::uint32_t>::max()) {
    throw Error(Blame::unsupported, offset, "more than four billion records");
  }
  Names names(block, entries, static_cast<std::size_t>(most));
  Span root;
  for (std::uint32_t i = 0; i < count; ++i) {
    in.mark();
    const Span name = parse_central(in, base, entries[i]);
    if (i == 0) {
      root = root_of(name, in.marked());
    }
    if (name.text().substr(0, root.size) != root.text()) {
      in.fail("record " + quoted(name) + " lies outside the archive's folder " + quoted(root));
    }
    if (!names.insert(i)) {
      in.fail("two records are called " + quoted(name) + ", or differ in case only");
    }
  }
  in.mark();
  if (!in.at_end()) {
    in.fail(std::to_string(in.left()) + " bytes are left over in the central directory");
  }
  set_limits(entries, static_cast<std::size_t>(count), offset);
  return root.size;
}

// ---- parse_local_header ----

namespace {

// Sizes out of the first ZIP64 field of a local header; what is not there stays saturated, and so disagrees.
void widen_local(Span extra, std::uint64_t& nbytes, std::uint64_t& stored) {
  Cursor in(extra, Blame::archive);
  while (in.left() >= 4) {
    const std::uint16_t id = in.u16();
    const std::uint16_t size = in.u16();
    if (size > in.left()) {
      return;
    }
    Cursor field(in.take(size), Blame::archive);
    if (id == kZip64) {
      for (std::uint64_t* value : {&nbytes, &stored}) {
        if (*value == kMax32 && field.left() >= 8) {
          *value = field.u64();
        }
      }
      return;
    }
  }
}

std::uint64_t parse_count(Span head, const Entry& entry) {
  const auto header = static_cast<std::uint64_t>(entry.header_offset);
  if (head.size < kCountNbytes) {
    refuse(header, "the element count of a storage is cut short");
  }
  const std::uint64_t count = Cursor(head, Blame::archive).u64();
  if (count != static_cast<std::uint64_t>(entry.crc)) {
    refuse(header, "a storage of " + std::to_string(static_cast<std::int64_t>(count)) +
                       " elements stands where the pickle has one of " + std::to_string(entry.crc));
  }
  return header + kCountNbytes;
}

}  // namespace

std::vector<std::int64_t> find_records(Span block, const Entry* entries, std::size_t count, Span prefix,
                                       const std::vector<Span>& names) {
  HashIndex index(names.size());
  std::vector<std::int64_t> found(names.size(), -1);
  std::vector<std::size_t> first(names.size());  // a name asked for twice is answered at its first place
  const auto same_as = [&](Span name) {
    return [&names, name](std::size_t n) { return names[n].text() == name.text(); };
  };
  std::size_t longest = 0;
  for (std::size_t i = 0; i < names.size(); ++i) {
    const std::uint64_t hash = siphash(names[i], process_sip_key());
    first[i] = index.find(hash, same_as(names[i]));
    if (first[i] == HashIndex::kNotFound) {
      first[i] = i;
      index.add(hash, i);
    }
    longest = std::max(longest, names[i].size);
  }
  // Of a few names each is compared: cheaper than to hash all those of the directory.
  const bool is_few = names.size() <= kFewNames;
  const auto number_of = [&](Span name) {
    if (!is_few) {
      return index.find(siphash(name, process_sip_key()), same_as(name));
    }
    for (std::size_t i = 0; i < names.size(); ++i) {
      if (names[i].text() == name.text()) {
        return i;
      }
    }
    return HashIndex::kNotFound;
  };
  for (std::size_t record = 0; record < count; ++record) {
    const auto start = static_cast<std::uint64_t>(entries[record].name_start);
    const auto nbytes = static_cast<std::uint64_t>(entries[record].name_nbytes);
    if (start > block.size || nbytes > block.size - start) {
      throw std::out_of_range("an entry that is not of this directory");
    }
    const Span whole = block.part(static_cast<std::size_t>(start), static_cast<std::size_t>(nbytes));
    if (whole.size < prefix.size || whole.size - prefix.size > longest ||
        whole.text().substr(0, prefix.size) != prefix.text()) {
      continue;
    }
    const Span name = whole.part(prefix.size, whole.size - prefix.size);
    const std::size_t number = number_of(name);
    if (number != HashIndex::kNotFound) {
      found[number] = static_cast<std::int64_t>(record);
    }
  }
  for (std::size_t i = 0; i < names.size(); ++i) {
    found[i] = found[first[i]];
  }
  return found;
}

std::uint64_t local_header_nbytes(Span head, const Entry& entry) {
  if ((entry.flags & kCounted) != 0) {
    return kCountNbytes;
  }
  if (head.size < kLocalNbytes) {
    return kLocalNbytes;
  }
  Cursor in(head, Blame::archive);
  if (in.u32() != kLocalSignature) {
    return kLocalNbytes;
  }
  in.take(kLocalNbytes - 8);
  const std::uint64_t name_nbytes = in.u16();
  return kLocalNbytes + name_nbytes + in.u16();
}

std::uint64_t parse_local_header(Span head, Span block, const Entry& entry) {
  const auto header = static_cast<std::uint64_t>(entry.header_offset);
  if ((entry.flags & kCounted) != 0) {
    return parse_count(head, entry);
  }
  const auto name_start = static_cast<std::uint64_t>(entry.name_start);
  const auto name_nbytes = static_cast<std::uint64_t>(entry.name_nbytes);
  if (name_start > block.size || name_nbytes > block.size - name_start) {
    throw std::out_of_range("the entry is not of this directory");
  }
  const Span name = block.part(static_cast<std::size_t>(name_start), static_cast<std::size_t>(name_nbytes));
  Cursor in(head, Blame::archive, header);  // never marked again: all its errors name the header
  const std::uint32_t signature = in.u32();
  in.take(2);  // version
  const std::uint32_t flags = in.u16(), method = in.u16();
  in.take(4);  // time and date
  const std::uint64_t crc = in.u32();
  std::uint64_t stored = in.u32();
  std::uint64_t nbytes = in.u32();
  const std::uint16_t local_name_nbytes = in.u16(), extra_nbytes = in.u16();
  if (signature != kLocalSignature) {
    in.fail("the local header of " + quoted(name) + " has a wrong signature");
  }
  const Span local_name = in.take(local_name_nbytes);
  const Span extra = in.take(extra_nbytes);
  if (local_name.text() != name.text()) {
    in.fail("the local header names " + quoted(local_name) + ", the directory names " + quoted(name));
  }
  if (method != static_cast<std::uint64_t>(entry.method)) {
    in.fail("the local header of " + quoted(name) + " and the directory name two compression methods");
  }
  if ((flags & kFlagsRefused) != 0) {
    in.fail("the local header of " + quoted(name) + " says it is encrypted");
  }
  if ((flags & kFlagDescriptor) == 0) {
    if (stored == kMax32 || nbytes == kMax32) {
      widen_local(extra, nbytes, stored);
    }
    if (crc != static_cast<std::uint64_t>(entry.crc) || stored != static_cast<std::uint64_t>(entry.stored_nbytes) ||
        nbytes != static_cast<std::uint64_t>(entry.nbytes)) {
      in.fail("the local header of " + quoted(name) + " and the directory disagree in size or CRC");
    }
  }
  const std::uint64_t payload = header + in.position();
  const auto limit = static_cast<std::uint64_t>(entry.limit);
  if (payload > limit || static_cast<std::uint64_t>(entry.stored_nbytes) > limit - payload) {
    in.fail("record " + quoted(name) + " overlaps the next one or the central directory");
  }
  return payload;
}

}  // namespace zipslicer
