"""Exports: the other archives that torch writes in, the parts that they are opened as out.

    TorchScript        data.pkl and constants.pkl                        load: the module, as a placeholder
    torch.export       data/weights/M_weights_config.json, the same of   load: the weights of model M
                       constants; once, whole checkpoints in records
    torch.package      a pickle at any path                              load: the one, or a mapping of them

A part is a record that is a pickle, a JSON text that names raw records, or a checkpoint of its own. Code, graphs and
sample inputs are never read. What is none of these is named, as far as it is known.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Mapping
from typing import Any, NamedTuple

from .archive import LOCAL_SIGNATURE, STORED, Archive
from .backend import DIFFERENTIABLE, Backend, Entry, Graph, Kind
from .errors import ArchiveError, TableError, UnsupportedError, ZipSlicerError
from .legacy import MAGIC_BYTES, open_archive
from .plan import Geometry, hull, numel
from .policy import DTYPES, Limits, dtype_named
from .program import Program
from .shards import INDEX_NBYTES, parse_json
from .source import ByteSource
from .table import TensorTable

__all__ = [
    "FlatArchive",
    "Layout",
    "Part",
    "any_archive",
    "is_checkpoint",
    "is_config",
    "is_package",
    "read_config",
    "read_layout",
]

MAIN = "data.pkl"
CONSTANTS = "constants."  # before the names of constants in ckpt.tensors
CONFIG = re.compile(r"(data/weights/|data/constants/)(.*)_(?:weights|constants)_config\.json", re.DOTALL)
WHOLE = re.compile(r"data/weights/(.*)\.pt", re.DOTALL)
OLD_EXPORT = ("serialized_state_dict.pt", "serialized_state_dict.json")  # both checkpoints; the latter name is older
PACKAGE = ".data/extern_modules"
OBJECTS = ("custom_obj_", "opaque_obj_")  # what torch.export keeps of constants that are no tensors
STRIDED = 7  # as torch._export.serde.schema.Layout has it
# As torch._export.serde.schema.ScalarType has them; files of raw bytes know no others.
SCALARS = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64", 9: "complex32",
    10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16", 29: "float8_e4m3fn", 30: "float8_e5m2",
    31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu", 34: "uint32", 35: "uint64",
}  # fmt: skip
INT64_MAX = (1 << 63) - 1
# Archives that are none of torch's, by a record that each has.
FOREIGN = {
    "[Content_Types].xml": "an Office document",
    "META-INF/MANIFEST.MF": "a Java archive",
    "MAR-INF/MANIFEST.json": "an archive of TorchServe (.mar)",
    "model.weights.h5": "a Keras model",
}
CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt", ".pt2")
SHOWN = 5  # names in a message
FOLDER = b"0/"  # of the names that stand in for those of a flat archive
CENTRAL_NBYTES, NAME_SIZES_AT, NAME_SIZES = 46, 28, struct.Struct("<3H")  # APPNOTE 4.3.12: of name, extra, comment


class Part(NamedTuple):
    """One program of several.

    prefix: before the names of its tensors.
    record: that holds it.
    table: of a config, which was read to know the parts.
    """

    prefix: str
    record: str
    table: TensorTable | None = None


class Layout(NamedTuple):
    """The parts of an archive, and what its root is; see joined.JoinedView."""

    parts: list[Part]
    keys: dict[str, int | None] | None = None


def read_layout(archive: Archive, record: str, swapped: bool) -> Layout | None:
    """What an archive is opened as; None for one program, which is the record itself.

    Raises: UnsupportedError for what is known and not read; ArchiveError, TableError.
    """
    if is_config(record):
        return _exported(archive, {"": [Part("", record)]}, swapped)
    if record != MAIN:
        return None
    is_flat = isinstance(archive, FlatArchive)
    main, constants = (-1, -1) if is_flat else archive.find([MAIN, "constants.pkl"])
    if main >= 0:
        return None if constants < 0 else Layout([Part("", MAIN), Part(CONSTANTS, "constants.pkl")])
    names = _below(archive)
    has = set(names)
    if has & set(OLD_EXPORT):
        return _exported(archive, {"": _old_export(archive, has)}, swapped)
    if not is_flat and PACKAGE in has:
        return _package(archive, names)
    models = {} if is_flat else _models(names)
    if models:
        return _exported(archive, models, swapped)
    raise _foreign(archive, names)


def _below(archive: Archive) -> list[str]:
    """The names of all records below the root."""
    root = archive.root.decode("utf-8", "backslashreplace")
    return [name[len(root) :] for name in archive.names()]


def _number(archive: Archive, record: str) -> int:
    found = archive.find([record])[0]
    if found < 0:
        raise ArchiveError(f"the archive has no record {record!r}", path=archive.source.path)
    return found


# ---------------------------------------------------------------- torch.package


def _package(archive: Archive, names: list[str]) -> Layout:
    """Every pickle of a package, by its path. Nothing says which resource is one, but the name or the bytes."""
    pickles = [
        name
        for i, name in enumerate(names)
        if not name.startswith(".data/") and (name.endswith(".pkl") or _is_pickle(archive, i, name))
    ]
    if not pickles:
        raise UnsupportedError("this is an archive of torch.package, and no pickle is in it", path=archive.source.path)
    parts = [Part(f"{name}:", name) for name in pickles]
    return Layout(parts, None if len(parts) == 1 else {name: i for i, name in enumerate(pickles)})


def _is_pickle(archive: Archive, number: int, name: str) -> bool:
    nbytes = archive.field(number, Entry.NBYTES)
    if name.endswith(".py") or nbytes < 3 or archive.field(number, Entry.METHOD) != STORED:
        return False
    head = archive.part(number, 0, 2)
    return head[:1] == b"\x80" and 2 <= head[1] <= 5 and archive.part(number, nbytes - 1, 1) == b"."


def is_package(archive: Archive) -> bool:
    main, package = archive.find([MAIN, PACKAGE])
    return main < 0 <= package


# ---------------------------------------------------------------- torch.export


def is_config(record: str) -> bool:
    return CONFIG.fullmatch(record) is not None


def _old_export(archive: Archive, has: set[str]) -> list[Part]:
    """What torch.export wrote up to 2.7. Without constants their record is empty."""
    made = [Part("", next(name for name in OLD_EXPORT if name in has))]
    for name in OLD_EXPORT:
        record = name.replace("state_dict", "constants")
        if record in has and archive.field(_number(archive, record), Entry.NBYTES):
            made.append(Part(CONSTANTS, record))
            break
    return made


def _models(names: list[str]) -> dict[str, list[Part]]:
    """The records of each model: of its weights, then of its constants."""
    weights: dict[str, str] = {}
    for name in names:
        config, old = CONFIG.fullmatch(name), WHOLE.fullmatch(name)
        if config is not None and config[1] == "data/weights/":
            weights.setdefault(config[2], name)
        elif old is not None:
            weights[old[1]] = name  # as torch has it: this before a config
    has = set(names)
    made = {}
    for model, record in weights.items():
        prefix = f"{model}." if len(weights) > 1 else ""
        made[model] = [Part(prefix, record)]
        for name in (f"data/constants/{model}.pt", f"data/constants/{model}_constants_config.json"):
            if name in has:
                made[model].append(Part(prefix + CONSTANTS, name))
                break
    return made


def _exported(archive: Archive, models: Mapping[str, list[Part]], swapped: bool) -> Layout:
    """The parts of each model, with what their configs say. A tensor that was pickled is a part of its own."""
    parts: list[Part] = []
    roots: dict[str, int | None] = {}
    keys: dict[str, int | None] | None = None
    for model, records in models.items():
        roots[model] = len(parts)
        for i, part in enumerate(records):
            if not is_config(part.record):
                parts.append(part)
                continue
            table, pickled = read_config(archive, part.record, swapped)
            if not i or table.program.tensor_count:
                parts.append(part._replace(table=table))
            found = {name: record for name, record in pickled.items() if record is not None}
            if not i and found:
                if len(models) > 1:
                    raise UnsupportedError(
                        f"several models, and weights that were pickled; record={part.record!r} opens one model",
                        path=archive.source.path,
                    )
                numbers = dict(zip(found, range(len(parts), len(parts) + len(found))))
                keys = {name: numbers.get(name) for name in pickled}
            parts += [Part(f"{part.prefix}{name}.", record) for name, record in found.items()]
    return Layout(parts, roots if len(models) > 1 else keys)


def read_config(archive: Archive, record: str, swapped: bool) -> tuple[TensorTable, dict[str, str | None]]:
    """A config -> a table as that of a pickled dict of its tensors; and all its names, with the record of those pickled.

    Raises: ArchiveError, ProgramError; TableError and UnsupportedError with the key.
    """
    number = _number(archive, record)
    match = CONFIG.fullmatch(record)
    assert match is not None
    folder = match[1]

    def located(error: ZipSlicerError, key: str | None = None) -> ZipSlicerError:
        return error.located(path=archive.source.path, record=archive.name(number), key=key)

    try:
        parsed = parse_json(archive.read(number, min(INDEX_NBYTES, archive.limits.program_nbytes)))
    except ArchiveError as error:
        raise located(error) from None
    config = parsed.get("config") if isinstance(parsed, dict) else None
    if not isinstance(config, dict):
        raise located(ArchiveError('this is no config of torch.export: it has no "config" from names to records'))
    columns = _Columns()
    pickled: dict[str, str | None] = {}
    opened: set[str | None] = set()
    records = _records(archive, folder, config)
    for name, payload in config.items():
        try:
            is_raw = _add(columns, name, payload, records, archive)
        except ZipSlicerError as error:
            raise located(error, name) from None
        if is_raw:
            pickled[name] = None
        elif not payload["path_name"].startswith(OBJECTS):
            pickled[name] = folder + payload["path_name"]
            if pickled[name] in opened:  # each is opened by itself, which a few bytes here could ask for over and over
                raise located(TableError("a pickled tensor has its record with another one"), name)
            opened.add(pickled[name])
    return TensorTable(Program(columns.graph(), {}), archive, swapped, folder[:-1]), pickled


def _records(archive: Archive, folder: str, config: Mapping[str, Any]) -> dict[str, int]:
    """The record of each path_name; -1 where there is none."""
    names = {p["path_name"]: None for p in config.values() if isinstance(p, dict) and type(p.get("path_name")) is str}
    return dict(zip(names, archive.find([folder + name for name in names])))


def _add(columns: _Columns, name: str, payload: Any, records: Mapping[str, int], archive: Archive) -> bool:
    """One entry of a config into the columns; False for what was pickled."""
    if not isinstance(payload, dict):
        raise TableError("an entry of a config must be an object")
    path_name, meta = payload.get("path_name"), payload.get("tensor_meta")
    if type(path_name) is not str or not all(type(payload.get(each)) is bool for each in ("is_param", "use_pickle")):
        raise TableError("an entry of a config must have a path_name, and say whether it is_param and use_pickle")
    record = records[path_name]
    if record < 0:
        raise ArchiveError(f"the archive has no record {path_name!r} of this tensor")
    if payload["use_pickle"]:
        return False
    if not isinstance(meta, dict):
        raise TableError("an entry of a config must have a tensor_meta")
    dtype = SCALARS.get(meta["dtype"]) if type(meta.get("dtype")) is int else None
    if dtype is None:
        raise UnsupportedError(f"{str(meta.get('dtype'))[:40]} is no number of a dtype that is known")
    if meta.get("layout") != STRIDED:
        raise UnsupportedError("a tensor of raw bytes, and its layout is not strided")
    if type(meta.get("requires_grad")) is not bool:
        raise TableError("requires_grad must be true or false")
    about = DTYPES[dtype_named(dtype)]
    if meta["requires_grad"] and not about.traits & DIFFERENTIABLE:
        raise TableError(f"a tensor of {dtype} cannot require grad")
    sizes, strides = (_numbers(meta.get(each), archive.limits) for each in ("sizes", "strides"))
    (storage_offset,) = _numbers([meta.get("storage_offset")], archive.limits)
    if len(sizes) != len(strides):
        raise TableError(f"{len(sizes)} sizes and {len(strides)} strides")
    geometry = Geometry(storage_offset, sizes, strides)
    nbytes, extent = archive.field(record, Entry.NBYTES), hull(geometry)
    if numel([n or 1 for n in sizes]) * about.itemsize > INT64_MAX or storage_offset + extent > INT64_MAX:
        raise TableError("a tensor's extent passes 2**63 - 1 elements")
    if extent and not nbytes:
        raise UnsupportedError("its record is empty: a fake tensor was exported, which has no bytes")
    if extent and (storage_offset + extent) * about.itemsize > nbytes:
        raise TableError(
            f"a tensor reaches to element {storage_offset + extent - 1} of a record of {nbytes} bytes ({dtype})"
        )
    storage = columns.storage(path_name, dtype_named(dtype), nbytes, _location(meta.get("device")))
    columns.tensor(name, storage, dtype_named(dtype), geometry, payload["is_param"], meta["requires_grad"])
    return True


def _numbers(values: Any, limits: Limits) -> tuple[int, ...]:
    """[{"as_int": 2}, ...] -> (2, ...)."""
    if not isinstance(values, list) or len(values) > limits.dimensions:
        raise TableError(f"sizes and strides must be lists of at most {limits.dimensions} numbers")
    made = []
    for value in values:
        number = value.get("as_int") if isinstance(value, dict) and len(value) == 1 else None
        if type(number) is not int or not 0 <= number <= INT64_MAX:
            raise TableError('a size, stride or storage_offset must be {"as_int": n}, with n from 0 to 2**63 - 1')
        made.append(number)
    return tuple(made)


def _location(device: Any) -> str:
    kind, index = (device.get("type"), device.get("index")) if isinstance(device, dict) else (None, None)
    if type(kind) is not str or not (index is None or (type(index) is int and 0 <= index <= INT64_MAX)):
        raise TableError("a device must have a type, and a number or null as its index")
    return kind if index is None else f"{kind}:{index}"


class _Columns:
    """The graph of a dict of tensors and Parameters, as it grows."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._grads: list[bool | None] = []  # None: no Parameter
        self._numbers: dict[str, tuple[int, int]] = {}  # path_name -> (storage, dtype)
        self._storages, self._tensors, self._dims = array("q"), array("q"), array("q")
        self._keys = bytearray()
        self._locations: list[str] = []

    def storage(self, key: str, dtype: int, nbytes: int, location: str) -> int:
        found = self._numbers.get(key)
        if found is None:
            found = self._numbers[key] = len(self._locations), dtype
            self._keys += key.encode("utf-8", "surrogatepass")
            self._storages.extend((dtype, nbytes, -1, len(self._keys)))
            self._locations.append(location)
        if found[1] != dtype:
            raise TableError(f"record {key!r} has two element types")
        return found[0]

    def tensor(self, name: str, storage: int, dtype: int, geometry: Geometry, is_param: bool, grad: bool) -> None:
        offset, sizes, strides = geometry
        row = (storage, dtype, DTYPES[dtype].itemsize, offset, len(self._dims), len(sizes))
        self._tensors.extend((*row, int(grad and not is_param), -1, hull(geometry)))
        self._dims.extend((*sizes, *strides))
        self._names.append(name)
        self._grads.append(grad if is_param else None)

    def graph(self) -> Graph:
        count = len(self._names)
        values: list[tuple[int, int]] = [(Kind.DICT, 0)]
        parameters = [row for row, grad in enumerate(self._grads) if grad is not None]
        calls = dict(zip(parameters, range(1, 1 + 2 * len(parameters), 2)))  # row -> the node of its call
        for row in range(count):
            values += ((Kind.STR, row), (Kind.CALL, calls[row]) if row in calls else (Kind.TENSOR, row))
        nodes = [(Kind.DICT, 1, 2 * count, 0, 0)]
        for row, call in calls.items():
            nodes += ((Kind.CALL, len(values), 4, 0, 1), (Kind.TUPLE, len(values) + 4, 3, 0, 2))
            values += ((Kind.GLOBAL, 0), (Kind.TUPLE, call + 1), (Kind.ABSENT, 0), (Kind.ABSENT, 0))
            values += ((Kind.TENSOR, row), (Kind.TRUE if self._grads[row] else Kind.FALSE, 0), (Kind.NONE, 0))
        return Graph(
            kinds=bytes(kind for kind, _ in values),
            payloads=array("q", [payload for _, payload in values]).tobytes(),
            nodes=array("q", [field for node in nodes for field in node]).tobytes(),
            strings=self._names,
            blobs=[],
            longs=[],
            globals=[("torch._utils", "_rebuild_parameter")] if calls else [],
            storages=self._storages.tobytes(),
            storage_keys=bytes(self._keys),
            locations=self._locations,
            tensors=self._tensors.tobytes(),
            dims=self._dims.tobytes(),
            nbytes=0,
        )


# ---------------------------------------------------------------- archives in archives, and foreign ones


def is_checkpoint(archive: Archive, record: str) -> bool:
    """Whether a record is a checkpoint of its own, by its first bytes. Raises: UnsupportedError where it is compressed."""
    if record.endswith(".pkl"):
        return False
    number = _number(archive, record)
    if archive.field(number, Entry.METHOD) != STORED:
        if record.endswith(CHECKPOINTS):
            archive.extent(number)  # says why not
        return False
    head = archive.part(number, 0, 32)
    return head[:4] == LOCAL_SIGNATURE or MAGIC_BYTES in head


class FlatArchive(Archive):
    """The records of an archive that is no single folder, as other programs than torch make them; the root is empty.

    Its records are not those of a checkpoint: one may be a checkpoint.
    """

    def _parse_directory(self, offset: int) -> None:
        # The parser wants all names in one folder. It gets others of the same lengths, and the entries mean these.
        block, stand_ins, seen, at = bytes(self.block), bytearray(self.block), set[bytes](), 0
        while at + CENTRAL_NBYTES <= len(block):
            n_name, n_extra, n_comment = NAME_SIZES.unpack_from(block, at + NAME_SIZES_AT)
            start, end = at + CENTRAL_NBYTES, at + CENTRAL_NBYTES + n_name
            name, number = block[start:end], len(seen)
            if b"\0" in name or name.lower() in seen:
                raise ArchiveError("a record has a NUL in its name, or two are called alike", offset=offset + at)
            seen.add(name.lower())
            digits = bytes(0x80 | (number >> 7 * i & 0x7F) for i in range(min(n_name - len(FOLDER), 9)))
            stand_ins[start:end] = (FOLDER + digits).ljust(n_name, b"-")[:n_name]
            at = end + n_extra + n_comment
        self.block = bytes(stand_ins)
        super()._parse_directory(offset)
        self.block, self.root = block, b""


def any_archive(
    source: ByteSource, backend: Backend, limits: Limits, window: tuple[int, int] | None = None, record: str = MAIN
) -> Archive:
    """One of torch's, or else a flat one that is known. Raises: what open_archive raises."""
    try:
        return open_archive(source, backend, limits, window)
    except ArchiveError as error:
        return _flat_archive(source, backend, limits, window, record, error)


def _flat_archive(
    source: ByteSource, backend: Backend, limits: Limits, window: tuple[int, int] | None, record: str, why: ArchiveError
) -> FlatArchive:
    """The archive that was refused as one of torch's, where it is another that is known. Raises: `why`, as it was."""
    try:
        archive = FlatArchive(source, backend, limits, window)
    except ZipSlicerError:
        raise why from None
    names = archive.names()
    # torch.load goes by the folder of the first record: what it may find a program in is not read as anything else.
    if any(name.rpartition("/")[2] == MAIN for name in names) or not (
        _is_known(names) if record == MAIN else record in names
    ):
        raise why
    return archive


def _is_known(names: list[str]) -> bool:
    return any(
        name in FOREIGN or name in OLD_EXPORT or name.lower().endswith((".npy", ".safetensors", *CHECKPOINTS))
        for name in names
    )


def _foreign(archive: Archive, names: list[str]) -> ZipSlicerError:
    """The error for an archive without a program: what it is, and which of its records may be a checkpoint."""
    path, has = archive.source.path, set(names)
    if "model.json" in has:
        return UnsupportedError("this is a TorchScript archive of a torch before 1.4", path=path)
    if any(name.startswith("data/aotinductor/") for name in names):
        return UnsupportedError(
            "this is a package of AOTInductor, which is compiled; record='data/weights/weight_0' opens one weight",
            path=path,
        )
    if "archive_format" in has or "models/model.json" in has:
        return UnsupportedError("this is an archive of torch.export (.pt2) without weights", path=path)
    what = next((what for name, what in FOREIGN.items() if name in has), None)
    if names and all(name.endswith(".npy") for name in names):
        return UnsupportedError("this is a NumPy archive (.npz): numpy.load reads it", path=path)
    inside = [name for name in names if name.lower().endswith((".safetensors", *CHECKPOINTS))]
    if inside:
        shown = ", ".join(repr(name[:200]) for name in inside[:SHOWN])
        more = f" and {len(inside) - SHOWN} more" if len(inside) > SHOWN else ""
        return UnsupportedError(
            f"this is {what or 'a ZIP archive'} with files in it that look like checkpoints: {shown}{more}. Unpack it, or "
            "open one that is stored with record=",
            path=path,
        )
    if what is not None:
        return UnsupportedError(f"this is {what}, and no checkpoint", path=path)
    return ArchiveError(f"the archive has no record {MAIN!r}: torch.save did not finish it", path=path)
