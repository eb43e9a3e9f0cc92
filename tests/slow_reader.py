"""Slow reader: a checkpoint's path in; its root, inert, and every tensor with its bytes out. Holds zipslicer to account.

Written from the format alone (docs/format.md), with zipfile and pickle of the standard library, and nothing of zipslicer.
Speed is no aim: what can be done one element at a time is.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001

ELEMENTS = {  # storage class -> dtype, bytes of one
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}


class Storage(NamedTuple):
    """What a persistent id says."""

    cls: str
    key: str
    location: str
    numel: int

    @property
    def dtype_name(self) -> str:
        return ELEMENTS[self.cls][0]

    @property
    def itemsize(self) -> int:
        return ELEMENTS[self.cls][1]

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class SlowTensor:
    """One rebuild call."""

    storage: Storage
    storage_offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    parameter: bool = False

    def logical_bytes(self, payload: bytes) -> bytes:
        """Its elements in order, one at a time, out of its storage's bytes."""
        itemsize = self.storage.itemsize
        starts = [self.storage_offset]
        for size, step in zip(self.shape, self.stride, strict=True):
            starts = [start + i * step for start in starts for i in range(size)]
        assert len(starts) == math.prod(self.shape)
        assert not starts or (min(starts) >= 0 and max(starts) < self.storage.numel)
        return b"".join(payload[start * itemsize : (start + 1) * itemsize] for start in starts)


class Recorded:
    """Each global of a file is a subclass of this one, so that nothing of its choosing is ever called.

    The class stands for the global as a value; an instance for what calling it would have made. It takes whatever the
    pickle gives it, and does nothing.
    """

    module: ClassVar[str]
    name: ClassVar[str]

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any
    list_items: list[Any]
    items: dict[Any, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Recorded:
        made = object.__new__(cls)
        made.args, made.kwargs, made.state, made.list_items, made.items = args, kwargs, None, [], {}
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.list_items.append(value)

    def extend(self, values: list[Any]) -> None:
        self.list_items.extend(values)


class SlowUnpickler(pickle.Unpickler):
    """Python's own unpickler, with a recorder for every name that the file has."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="latin-1")  # Python 2 wrote keys as byte strings
        self.globals: dict[tuple[str, str], type[Recorded]] = {}
        self.storages: dict[str, Storage] = {}
        self.tensors: list[SlowTensor] = []
        self._known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("builtins", "set"): set,
            ("__builtin__", "set"): set,
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            ("torch.jit._pickle", "build_intlist"): list,
        }

    def find_class(self, module: str, name: str) -> Any:
        known = self._known.get((module, name))
        if known is not None:
            return known
        if (module, name) not in self.globals:
            self.globals[module, name] = type("Global", (Recorded,), {"module": module, "name": name})
        return self.globals[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        tag, cls, key, location, numel = pid[:5]
        assert tag == "storage"
        assert pid[5:] in ((), (None,))  # streams have a sixth item, and these files no views in it
        made = Storage(cls.name, key, location, numel)
        assert self.storages.setdefault(key, made) == made
        return made

    def _tensor(
        self, storage: Storage, offset: int, size: Any, stride: Any, requires_grad: bool = False, hooks: Any = None
    ) -> SlowTensor:
        assert not hooks
        made = SlowTensor(storage, offset, tuple(size), tuple(stride), requires_grad)
        self.tensors.append(made)
        return made

    def _parameter(self, tensor: SlowTensor, requires_grad: bool, hooks: Any) -> SlowTensor:
        assert not hooks
        self.tensors.remove(tensor)
        made = dataclasses.replace(tensor, requires_grad=requires_grad, parameter=True)
        self.tensors.append(made)
        return made


class Reading(NamedTuple):
    """What the slow reader makes of a file.

    Attributes:
        root: what its first program builds, with Recorded and SlowTensor in it.
        tensors: by the names that `ckpt.tensors` must have, in its order.
        payloads: the bytes of each storage, by (folder, key).
        folders: where the payload of a tensor lies, by its name: "data", or "constants" in TorchScript.
        globals: all that the file names.
    """

    root: Any
    tensors: dict[str, SlowTensor]
    payloads: dict[tuple[str, str], bytes]
    folders: dict[str, str]
    globals: set[tuple[str, str]]

    def payload(self, name: str) -> bytes:
        """The bytes of the whole storage of a tensor."""
        return self.payloads[self.folders[name], self.tensors[name].storage.key]

    def logical_bytes(self, name: str) -> bytes:
        return self.tensors[name].logical_bytes(self.payload(name))


def read_slowly(path: Path) -> Reading:
    content = path.read_bytes()
    return _read_zip(content) if content.startswith(b"PK\3\4") else _read_stream(content)


def _read_zip(content: bytes) -> Reading:
    reading: Reading | None = None
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        names = opened.namelist()
        top = names[0].partition("/")[0]
        for program, folder, prefix in (("data.pkl", "data", ""), ("constants.pkl", "constants", "constants.")):
            if f"{top}/{program}" not in names:
                continue
            unpickler = SlowUnpickler(io.BytesIO(opened.read(f"{top}/{program}")))
            root = unpickler.load()
            payloads = {(folder, key): opened.read(f"{top}/{folder}/{key}") for key in unpickler.storages}
            found = _reading(root, unpickler, payloads, folder, prefix)
            if reading is None:
                reading = found
            else:
                reading = reading._replace(
                    tensors=reading.tensors | found.tensors,
                    payloads=reading.payloads | found.payloads,
                    folders=reading.folders | found.folders,
                    globals=reading.globals | found.globals,
                )
    assert reading is not None
    return reading


def _read_stream(content: bytes) -> Reading:
    """The format before ZIP: five pickles, then each storage behind its element count."""
    file = io.BytesIO(content)
    assert pickle.load(file) == MAGIC
    assert pickle.load(file) == PROTOCOL
    assert pickle.load(file)["little_endian"] is True
    unpickler = SlowUnpickler(file)
    root = unpickler.load()
    payloads = {}
    for key in pickle.load(file):
        storage = unpickler.storages[key]
        assert struct.unpack("<q", file.read(8)) == (storage.numel,)
        payloads["data", key] = file.read(storage.nbytes)
    assert len(payloads) == len(unpickler.storages)
    assert not file.read()
    return _reading(root, unpickler, payloads, "data", "")


def _reading(
    root: Any, unpickler: SlowUnpickler, payloads: dict[tuple[str, str], bytes], folder: str, prefix: str
) -> Reading:
    for (_, key), payload in payloads.items():
        assert len(payload) == unpickler.storages[key].nbytes
    tensors = {prefix + ".".join(path): tensor for path, tensor in _walk(root, (), set())}
    assert set(map(id, tensors.values())) == set(map(id, unpickler.tensors))  # each that was built was found
    return Reading(root, tensors, payloads, dict.fromkeys(tensors, folder), set(unpickler.globals))


MODULE_LEVELS = ("_modules", "_parameters", "_buffers")  # nn.Module.state_dict() leaves them out of its names


def _walk(value: Any, path: tuple[str, ...], entered: set[int]) -> Iterator[tuple[tuple[str, ...], SlowTensor]]:
    """Tensors by dict keys, indexes and attribute names; a container is entered once."""
    if isinstance(value, SlowTensor):
        yield path, value
    if id(value) in entered:
        return
    entered.add(id(value))
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _walk(child, (*path, str(key)), entered)
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield from _walk(child, (*path, str(index)), entered)
    elif isinstance(value, Recorded):
        if isinstance(value.state, dict):
            for name, child in value.state.items():
                yield from _walk(child, path if name in MODULE_LEVELS else (*path, name), entered)
        for index, child in enumerate(value.list_items):
            yield from _walk(child, (*path, str(index)), entered)
        yield from _walk(value.items, path, entered)
