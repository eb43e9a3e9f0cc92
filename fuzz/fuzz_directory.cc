// libFuzzer target: any bytes as the end of an archive, as its directory, and as the local header of each record.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "../csrc/directory.h"

using zipslicer::Entry;
using zipslicer::Error;
using zipslicer::Span;

namespace {

constexpr std::size_t kTail = 65535 + 22 + 20 + 56;

void require(bool holds) {
  if (!holds) {
    std::abort();
  }
}

// What archive.py does, up to the touch of every record.
void read(Span file) {
  const std::size_t start = file.size > kTail ? file.size - kTail : 0;
  const zipslicer::Directory directory = zipslicer::find_directory(file.part(start, file.size - start), start, 0);
  require(directory.offset <= file.size && directory.nbytes <= file.size - directory.offset);
  require(directory.count <= directory.nbytes / zipslicer::kCentralNbytes);
  // A copy of the very size: a byte read beside it is told.
  const std::vector<unsigned char> copy(file.data + directory.offset, file.data + directory.offset + directory.nbytes);
  const Span block(copy.data(), copy.size());
  std::vector<Entry> entries(static_cast<std::size_t>(directory.count));
  const std::size_t prefix = zipslicer::parse_directory(block, directory.count, directory.offset, 0, entries.data());
  std::vector<Span> names;
  for (const Entry& entry : entries) {
    require(0 <= entry.header_offset && entry.header_offset <= entry.limit);
    require(static_cast<std::uint64_t>(entry.limit) <= directory.offset);
    require(entry.stored_nbytes >= 0 && entry.nbytes >= 0);
    require(static_cast<std::size_t>(entry.name_start + entry.name_nbytes) <= block.size);
    require(prefix <= static_cast<std::size_t>(entry.name_nbytes));
    names.push_back(
        block.part(static_cast<std::size_t>(entry.name_start), static_cast<std::size_t>(entry.name_nbytes)));
  }
  const std::vector<std::int64_t> found = zipslicer::find_records(block, entries.data(), entries.size(), Span(), names);
  for (std::size_t i = 0; i < found.size(); ++i) {
    require(found[i] == static_cast<std::int64_t>(i));  // no name is there twice
  }
  for (const Entry& entry : entries) {
    const auto from = static_cast<std::size_t>(entry.header_offset);
    const std::size_t room = std::min<std::size_t>(file.size - from, 1 << 17);
    const std::vector<unsigned char> head(file.data + from, file.data + from + room);
    try {
      const std::uint64_t payload = zipslicer::parse_local_header(Span(head.data(), head.size()), block, entry);
      require(payload >= static_cast<std::uint64_t>(entry.header_offset) + zipslicer::kLocalNbytes);
      require(payload + static_cast<std::uint64_t>(entry.stored_nbytes) <= static_cast<std::uint64_t>(entry.limit));
    } catch (const Error& error) {
      require(error.blame == zipslicer::Blame::archive);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  try {
    read(Span(data, size));
  } catch (const Error& error) {
    require(error.blame == zipslicer::Blame::archive || error.blame == zipslicer::Blame::unsupported);
  }
  return 0;
}
