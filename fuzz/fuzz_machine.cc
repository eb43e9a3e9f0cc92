// libFuzzer target: any bytes as a pickle. The first one chooses the dialect of persistent ids, and tight or wide
// limits.
#include <cstdlib>
#include <string_view>

#include "../csrc/machine.h"

using zipslicer::Error;
using zipslicer::Kind;
using zipslicer::Span;

namespace {

void require(bool holds) {
  if (!holds) {
    std::abort();
  }
}

// Verb | dtype index << 8 | itemsize << 16 | traits << 24, as backend.py has it: one global of each kind.
zipslicer::Actions policy() {
  zipslicer::Actions actions(16);
  actions.add("collections", "OrderedDict", 1);
  actions.add("torch", "FloatStorage", 2 | 6U << 8 | 4U << 16 | 1U << 24);
  actions.add("torch", "LongStorage", 2 | 4U << 8 | 8U << 16);
  actions.add("torch", "ComplexFloatStorage", 2 | 10U << 8 | 8U << 16 | 3U << 24);
  actions.add("torch.storage", "UntypedStorage", 2 | 255U << 8 | 1U << 16);
  actions.add("torch", "float32", 3 | 6U << 8 | 4U << 16 | 1U << 24);
  actions.add("torch", "uint16", 3 | 17U << 8 | 2U << 16);
  actions.add("torch._utils", "_rebuild_tensor", 4);
  actions.add("torch._utils", "_rebuild_tensor_v2", 5);
  actions.add("torch._utils", "_rebuild_tensor_v3", 6);
  actions.add("torch._tensor", "_rebuild_from_type_v2", 7);
  actions.add("torch", "Size", 8);
  actions.add("builtins", "set", 0);
  return actions;
}

// Every index leads to what is there.
void check(const zipslicer::Graph& graph, std::size_t program_nbytes) {
  const std::size_t values = graph.kinds.size();
  require(values != 0 && graph.payloads.size() == values && graph.nbytes <= program_nbytes);
  require(graph.nodes.size() % 5 == 0 && graph.tensors.size() % 9 == 0 && graph.storages.size() % 4 == 0);
  const auto below = [](std::int64_t index, std::size_t count) {
    require(index >= 0 && static_cast<std::size_t>(index) < count);
  };
  for (std::size_t i = 0; i < values; ++i) {
    const std::int64_t payload = graph.payloads[i];
    switch (graph.kinds[i]) {
      case Kind::long_: below(payload, graph.longs.size()); break;
      case Kind::str: below(payload, graph.strings.size()); break;
      case Kind::bytes:
      case Kind::bytearray: below(payload, graph.blobs.size()); break;
      case Kind::global: below(payload, graph.globals.size() / 2); break;
      case Kind::storage: below(payload, graph.storages.size() / 4); break;
      case Kind::tensor: below(payload, graph.tensors.size() / 9); break;
      case Kind::wide: std::abort();
      default:
        if (graph.kinds[i] >= Kind::tuple) {
          below(payload, graph.nodes.size() / 5);
        }
    }
  }
  for (std::size_t i = 0; i < graph.nodes.size(); i += 5) {
    const std::int64_t start = graph.nodes[i + 1];
    const std::int64_t count = graph.nodes[i + 2];
    require(start >= 0 && count >= 0 && start + count <= static_cast<std::int64_t>(values));
    require(graph.nodes[i + 3] >= 0 && graph.nodes[i + 3] <= count);
  }
  for (std::size_t i = 0; i < graph.tensors.size(); i += 9) {
    below(graph.tensors[i], graph.storages.size() / 4);
    const std::int64_t nbytes = graph.storages[4 * static_cast<std::size_t>(graph.tensors[i]) + 1];
    const std::int64_t itemsize = graph.tensors[i + 2];
    const std::int64_t first = graph.tensors[i + 3];
    const std::int64_t extent = graph.tensors[i + 8];
    require(graph.tensors[i + 4] + 2 * graph.tensors[i + 5] <= static_cast<std::int64_t>(graph.dims.size()));
    require(itemsize > 0 && first >= 0 && extent >= 0);
    // What a tensor reaches lies in its storage. A row of a tar file has its geometry elsewhere.
    require(extent == 0 || (first + extent) <= nbytes / itemsize);
  }
  for (const std::size_t text : {graph.strings.size(), graph.globals.size(), graph.storage_keys.size()}) {
    require(text <= 2 * values + 2 * program_nbytes);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  static const zipslicer::Actions actions = policy();
  if (size == 0) {
    return 0;
  }
  const int dialect = data[0] % 3;
  const bool tight = (data[0] & 0x80) != 0;
  const zipslicer::Limits limits{
      tight ? 8 : 1000,      tight ? 3 : 64, tight ? 40 : 1 << 16, tight ? 12 : 1 << 16, tight ? 2 : 4096,
      (data[0] & 0x40) != 0, dialect};
  // A copy of the very size: a byte read beside it is told.
  const std::string program(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    check(zipslicer::scan_pickle(Span(program.data(), program.size()), actions, limits), program.size());
  } catch (const Error& error) {
    require(error.blame != zipslicer::Blame::archive && error.blame != zipslicer::Blame::changed);
    require(error.offset <= program.size());
  }
  return 0;
}
