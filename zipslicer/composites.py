"""Composites: tensors that are not one dense row. Calls of the graph in, their facts out; then their members in, a tensor out.

Sparse, quantized, nested and meta tensors, and those of devices whose storages torch does not save. `read` needs no torch,
and `compose` is given it. torch takes sizes, offsets and indices of such tensors at their word: what it does not prove
itself is proved here, before it gets them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, Union

from .backend import DIFFERENTIABLE, Kind
from .errors import TableError, UnsupportedError
from .plan import Geometry, hull, is_contiguous, numel
from .policy import DTYPES, Dtype, Meaning, dtype_index, dtype_named
from .program import ARGS, STATE, Program

__all__ = ["NESTED", "RAGGED", "Composite", "Dense", "Member", "compose", "find", "is_sliceable", "read"]

RAGGED: Final = -1  # the size of a nested tensor's dimension, which is another for each component
NESTED: Final = "nested"  # its layout; torch says strided, and keeps what makes it nested elsewhere
MAX_DIMENSIONS = 64  # torch stops there
MAX_EXPANDED = 1 << 24  # elements of a member that stand for fewer bytes in the file; torch goes through all of them
INTEGERS = ("int64", "int32")
PACKED = {"quint4x2": 2, "quint2x4": 4}  # elements in a byte
INT_REPRS = {"qint8": "int8", "quint8": "uint8", "qint32": "int32", "quint4x2": "uint8", "quint2x4": "uint8"}
MEMBERS = {  # of each layout, in the order of the call
    "sparse_coo": ("indices", "values"),
    "sparse_csr": ("compressed", "plain", "values"),
    "sparse_csc": ("compressed", "plain", "values"),
    "sparse_bsr": ("compressed", "plain", "values"),
    "sparse_bsc": ("compressed", "plain", "values"),
    NESTED: ("values", "sizes", "strides", "offsets"),
}


class Table(Protocol):
    """What is asked of table.TensorTable."""

    @property
    def program(self) -> Program: ...
    def row(self, number: int, /) -> Any: ...
    def geometry(self, row: Any, /) -> Geometry: ...
    def dtype(self, index: int, /) -> Dtype: ...
    def storage_dtype(self, storage: int, /) -> int: ...
    def storage_nbytes(self, storage: int, /) -> int: ...


class Dense(NamedTuple):
    """Bytes of a storage as a tensor: what a row of the file is, for those that the machine has not seen as one."""

    storage: int
    dtype: int
    geometry: Geometry


Member = Union[int, Dense]  # the position of a dense tensor in the graph


class Composite(NamedTuple):
    """What one call says, checked as far as it can be without reading a tensor."""

    meaning: int
    layout: str  # as torch has it, but for NESTED
    dtype: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # () where there are none
    requires_grad: bool
    members: Mapping[str, Member]
    arguments: Mapping[str, int]  # positions of everything else
    location: str | None = None  # where it is not that of its members
    storage_offset: int = 0  # of a quantized tensor
    axis: int | None = None  # of the channels that have scales of their own
    channels: Sequence[int] | None = None  # of them, those that a slice has left; None for all


def find(program: Program, node: int) -> dict[str, int] | None:
    """The positions of a call's arguments by name; None for a call that torch does not write. Looks at kinds only."""
    meaning = program.meaning(node)
    start, _ = program.span(node)
    given = range(*program.span(program.payloads[start + ARGS]))
    if meaning == Meaning.TYPED:  # (function, class, arguments, state)
        meaning = program.global_meaning(given[0])
        given = _items(program, given[2], Kind.TUPLE)
    names, wanted = _FORMS.get(meaning, ((), 0))
    if not names or not wanted <= len(given) <= len(names):
        return None
    found = dict(zip(names, given))
    if meaning == Meaning.SPARSE:
        layout, data = _layout(program, found["layout"]), _items(program, found["data"], Kind.TUPLE)
        if layout not in MEMBERS or layout == NESTED:
            return None
        names = (*MEMBERS[layout], "size")
        if layout == "sparse_coo" and len(data) == 4:  # old files have no such flag
            found["coalesced"] = data[3]
        elif len(data) != len(names):
            return None
        found.update(zip(names, data))
    if meaning == Meaning.QUANTIZED:
        params = _items(program, found["qparams"], Kind.TUPLE)
        if len(params) == 3:
            found.update(zip(("qscheme", "scale", "zero_point"), params))
        elif len(params) == 4:
            found.update(zip(("qscheme", "scales", "zero_points", "axis"), params))
        else:
            return None
        if program.kinds[found["storage"]] != Kind.STORAGE:
            return None
    dense = {Meaning.SPARSE: names[:-1], Meaning.NESTED: names, Meaning.FROM_CPU: names[:1]}.get(meaning, ())
    if any(program.kinds[found[name]] != Kind.TENSOR for name in dense):
        return None
    return found


_GEOMETRY = ("storage_offset", "size", "stride")
_FORMS: Mapping[int, tuple[tuple[str, ...], int]] = {  # arguments by name, and how many there must be
    Meaning.SPARSE: (("layout", "data"), 2),
    Meaning.QUANTIZED: (("storage", *_GEOMETRY, "qparams", "requires_grad", "hooks"), 6),
    Meaning.NESTED: (MEMBERS[NESTED], 4),
    Meaning.META: (("dtype", "size", "stride", "requires_grad"), 4),
    Meaning.FROM_CPU: (("tensor", "dtype", "device", "requires_grad"), 4),
    Meaning.FROM_NUMPY: (("array", "dtype", "device", "requires_grad"), 4),
}


# ---------------------------------------------------------------- the graph
def read(table: Table, node: int) -> Composite:
    """The facts of a call that `find` has found. Raises: TableError."""
    found = find(table.program, node)
    assert found is not None
    meaning = table.program.meaning(node)
    if meaning == Meaning.TYPED:
        start, _ = table.program.span(node)
        meaning = table.program.global_meaning(table.program.span(table.program.payloads[start + ARGS])[0])
    return _READERS[meaning](table, found)


def _sparse(table: Table, found: dict[str, int]) -> Composite:
    program = table.program
    layout, sizes = _layout(program, found["layout"]), _integers(program, found["size"])
    assert layout is not None
    members: dict[str, Member] = {name: found[name] for name in MEMBERS[layout]}
    for name in MEMBERS[layout][:-1]:
        _index(table, found[name], name)
    values = table.row(program.payloads[found["values"]])
    shape = table.geometry(values).sizes
    if values.conj or values.neg:  # resolved, and so written out
        _bounded(table.geometry(values))
    if layout in ("sparse_bsr", "sparse_bsc"):
        batch = table.row(program.payloads[found["compressed"]]).ndim - 1
        if 0 in shape[batch + 1 : batch + 3]:
            raise TableError(f"a {layout} tensor has blocks of no elements")
    _total(sizes)
    if "coalesced" in found and program.kinds[found["coalesced"]] not in (Kind.TRUE, Kind.FALSE, Kind.NONE):
        raise TableError("a sparse tensor's is_coalesced must be a boolean or None")
    return Composite(Meaning.SPARSE, layout, values.dtype, sizes, (), values.requires_grad, members, found)


def _quantized(table: Table, found: dict[str, int]) -> Composite:
    program = table.program
    storage = program.payloads[found["storage"]]
    dtype = table.storage_dtype(storage)
    if dtype >= len(DTYPES) or DTYPES[dtype].name not in INT_REPRS:
        raise TableError("a quantized tensor is rebuilt on a storage of another type")
    name = DTYPES[dtype].name
    (offset,) = _numbers(program, [found["storage_offset"]], "storage_offset")
    sizes, strides = _integers(program, found["size"]), _integers(program, found["stride"])
    geometry = Geometry(offset, sizes, strides)
    if len(sizes) != len(strides):
        raise TableError(f"a tensor has {len(sizes)} sizes and {len(strides)} strides")
    _total(sizes)
    end = offset + hull(geometry)
    nbytes = table.storage_nbytes(storage)
    holds = nbytes // DTYPES[dtype].itemsize * PACKED.get(name, 1)
    if end > holds and hull(geometry):
        raise TableError(f"a quantized tensor reaches to element {end} of a storage that has {holds}")
    if name in PACKED:  # a part of a byte is no part of a file: all of them, and the view is torch's
        geometry = Geometry(0, (nbytes,), (1,))
    if program.kinds[found["requires_grad"]] != Kind.FALSE:
        raise TableError("a tensor of this dtype cannot require grad")
    axis = None
    members: dict[str, Member] = {"int_repr": Dense(storage, dtype_named(INT_REPRS[name]), geometry)}
    scheme = _name(program, found["qscheme"])
    if "scale" in found:
        if scheme != "torch.per_tensor_affine" or program.kinds[found["scale"]] != Kind.FLOAT:
            raise TableError("a quantized tensor has wrong parameters")
        if program.kinds[found["zero_point"]] != Kind.INT:
            raise TableError("a quantized tensor's zero_point must be a 64-bit integer")
    else:
        if scheme not in ("torch.per_channel_affine", "torch.per_channel_affine_float_qparams"):
            raise TableError("a quantized tensor has wrong parameters")
        (axis,) = _numbers(program, [found["axis"]], "axis")
        if axis >= len(sizes):
            raise TableError(f"a quantized tensor of {len(sizes)} dimensions has its scales along dimension {axis}")
        for each in ("scales", "zero_points"):
            members.update(_per_channel(table, found[each], each, sizes[axis]))
    return Composite(Meaning.QUANTIZED, "strided", dtype, sizes, strides, False, members, found, None, offset, axis)


def _per_channel(table: Table, position: int, name: str, count: int) -> dict[str, Member]:
    """Scales or zero points: a tensor, or in old files a list; one for each channel."""
    program = table.program
    kind = program.kinds[position]
    if kind == Kind.TENSOR:
        row = table.row(program.payloads[position])
        geometry = table.geometry(row)
        _bounded(geometry)
        wanted = ("float64", "float32") if name == "scales" else ("int64", "int32", "float32")
        if len(geometry.sizes) == 1 and geometry.sizes[0] == count and table.dtype(row.dtype).name in wanted:
            return {name: position}
    if kind == Kind.LIST:
        start, end = program.span(program.payloads[position])
        if end - start == count and all(kind in (Kind.FLOAT, Kind.INT) for kind in program.kinds[start:end]):
            return {}
    raise TableError(f"a quantized tensor needs {count} {name} of a number type, one for each channel")


def _nested(table: Table, found: dict[str, int]) -> Composite:
    program = table.program
    members: dict[str, Member] = {name: found[name] for name in MEMBERS[NESTED]}
    values = table.row(program.payloads[found["values"]])
    shapes = {}
    for name in ("sizes", "strides", "offsets"):
        _index(table, found[name], name)
        if table.dtype(table.row(program.payloads[found[name]]).dtype).name != "int64":
            raise TableError(f"a nested tensor's {name} must be int64")
        shapes[name] = table.geometry(table.row(program.payloads[found[name]])).sizes
    flat = table.geometry(values)
    if len(flat.sizes) != 1 or not is_contiguous(flat.sizes, flat.strides):
        raise TableError("a nested tensor's values must be one run of elements")
    count = shapes["offsets"][0] if len(shapes["offsets"]) == 1 else -1
    is_empty = count == 0 and shapes["sizes"] == shapes["strides"] == ()  # of no components, so of no dimensions
    if not is_empty and (
        len(shapes["sizes"]) != 2 or shapes["sizes"] != shapes["strides"] or count != shapes["sizes"][0]
    ):
        raise TableError("a nested tensor's sizes, strides and offsets must have one row for each component")
    ndim = 0 if is_empty else shapes["sizes"][1]
    if ndim >= MAX_DIMENSIONS:
        raise TableError(f"a tensor has {ndim + 1} dimensions; the limit is {MAX_DIMENSIONS}")
    sizes = (count, *(RAGGED,) * ndim)
    return Composite(Meaning.NESTED, NESTED, values.dtype, sizes, (), values.requires_grad, members, found)


def _meta(table: Table, found: dict[str, int]) -> Composite:
    program = table.program
    sizes, strides = _integers(program, found["size"]), _integers(program, found["stride"])
    if len(sizes) != len(strides):
        raise TableError(f"a tensor has {len(sizes)} sizes and {len(strides)} strides")
    _total(sizes)
    dtype, grad = _dtype_and_grad(program, found)
    _total((hull(Geometry(0, sizes, strides)), DTYPES[dtype].itemsize))  # torch counts its bytes in 64 bits
    return Composite(Meaning.META, "strided", dtype, sizes, strides, grad, {}, found, "meta")


def _from_cpu(table: Table, found: dict[str, int]) -> Composite:
    program = table.program
    geometry = table.geometry(table.row(program.payloads[found["tensor"]]))
    dtype, grad = _dtype_and_grad(program, found)
    members: dict[str, Member] = {"tensor": found["tensor"]}
    where = _text(program, found["device"])
    return Composite(Meaning.FROM_CPU, "strided", dtype, geometry.sizes, geometry.strides, grad, members, found, where)


def _from_numpy(table: Table, found: dict[str, int]) -> Composite:
    """The array is in the program itself: its shape is known without making it."""
    program = table.program
    sizes, is_fortran = _array_shape(program, found["array"])
    _total(sizes)
    steps = [1]
    for n in (sizes if is_fortran else sizes[::-1])[:-1]:
        steps.append(steps[-1] * max(n, 1))
    strides = tuple(steps if is_fortran else reversed(steps))[: len(sizes)]
    dtype, grad = _dtype_and_grad(program, found)
    where = _text(program, found["device"])
    return Composite(Meaning.FROM_NUMPY, "strided", dtype, sizes, strides, grad, {}, found, where)


_READERS: Mapping[int, Callable[[Table, dict[str, int]], Composite]] = {
    Meaning.SPARSE: _sparse,
    Meaning.QUANTIZED: _quantized,
    Meaning.NESTED: _nested,
    Meaning.META: _meta,
    Meaning.FROM_CPU: _from_cpu,
    Meaning.FROM_NUMPY: _from_numpy,
}


def _items(program: Program, position: int, *kinds: int) -> range:
    """The positions of a sequence's items; none where the value is of another kind."""
    if program.kinds[position] not in kinds:
        return range(0)
    return range(*program.span(program.payloads[position]))


def _layout(program: Program, position: int) -> str | None:
    """torch.serialization._get_layout("torch.sparse_coo") -> "sparse_coo"."""
    if program.kinds[position] != Kind.CALL or program.meaning(program.payloads[position]) != Meaning.LAYOUT:
        return None
    start, _ = program.span(program.payloads[position])
    given = _items(program, start + ARGS, Kind.TUPLE)
    if len(given) != 1 or program.kinds[given[0]] != Kind.STR:
        return None
    return str(program.scalar(given[0])).removeprefix("torch.")


def _array_shape(program: Program, position: int) -> tuple[tuple[int, ...], bool]:
    """The shape in a call of NumPy's, and whether the order is Fortran's; see arrays.array_value."""
    node = program.payloads[position]
    meaning = program.meaning(node) if program.kinds[position] == Kind.CALL else Meaning.STRANGER
    start, _ = program.span(node)
    if meaning == Meaning.NUMPY_ARRAY:
        state = _items(program, start + STATE, Kind.TUPLE)
        if len(state) == 5:
            return _integers(program, state[1]), program.kinds[state[3]] == Kind.TRUE
    if meaning == Meaning.NUMPY_BUFFER:
        given = _items(program, start + ARGS, Kind.TUPLE)
        if len(given) == 4 and program.kinds[given[3]] == Kind.STR:
            return _integers(program, given[2]), program.scalar(given[3]) == "F"
    raise TableError("a tensor is rebuilt of something that is no NumPy array")


def _integers(program: Program, position: int) -> tuple[int, ...]:
    """Sizes or strides: a tuple, a list, or torch.Size(tuple)."""
    if program.kinds[position] == Kind.CALL and program.meaning(program.payloads[position]) == Meaning.SIZE:
        start, _ = program.span(program.payloads[position])
        given = _items(program, start + ARGS, Kind.TUPLE)
        position = given[0] if len(given) == 1 else position
    if program.kinds[position] not in (Kind.TUPLE, Kind.LIST):
        raise TableError("a tensor's size and stride must be tuples")
    items = range(*program.span(program.payloads[position]))
    if len(items) > MAX_DIMENSIONS:
        raise TableError(f"a tensor has {len(items)} dimensions; the limit is {MAX_DIMENSIONS}")
    return _numbers(program, items, "size or stride")


def _numbers(program: Program, positions: Sequence[int], what: str) -> tuple[int, ...]:
    if any(program.kinds[p] != Kind.INT or program.payloads[p] < 0 for p in positions):
        raise TableError(f"a tensor's {what} must be a 64-bit integer, and not negative")
    return tuple(program.payloads[p] for p in positions)


def _text(program: Program, position: int) -> str:
    if program.kinds[position] != Kind.STR:
        raise TableError("a tensor's device must be a string")
    return str(program.scalar(position))


def _name(program: Program, position: int) -> str:
    return ".".join(program.globals[program.payloads[position]]) if program.kinds[position] == Kind.GLOBAL else ""


def _dtype_and_grad(program: Program, found: Mapping[str, int]) -> tuple[int, bool]:
    dtype = dtype_index(_name(program, found["dtype"]))
    if dtype is None:
        raise TableError("a tensor's dtype is no dtype of torch")
    grad = program.kinds[found["requires_grad"]]
    if grad not in (Kind.TRUE, Kind.FALSE):
        raise TableError("a tensor's requires_grad must be a boolean")
    if grad == Kind.TRUE and not DTYPES[dtype].traits & DIFFERENTIABLE:
        raise TableError("a tensor of this dtype cannot require grad")
    return dtype, grad == Kind.TRUE


def _index(table: Table, position: int, name: str) -> None:
    """A member that torch goes through element by element."""
    row = table.row(table.program.payloads[position])
    if table.dtype(row.dtype).name not in INTEGERS:
        raise TableError(f"a tensor's {name} must be integers")
    _bounded(table.geometry(row))


def _bounded(geometry: Geometry) -> None:
    """A few bytes can stand for terabytes, by a stride of 0. torch keeps its hands off the elements of most tensors."""
    count = numel(geometry.sizes)
    if count > MAX_EXPANDED and count > hull(geometry):
        raise TableError(f"a member of a tensor is {count} elements on {hull(geometry)} in the file")


def _total(sizes: Sequence[int]) -> None:
    """Torch counts elements in 64 bits."""
    if math.prod(n for n in sizes if n) >= 1 << 63:
        raise TableError("a tensor's extent passes 2**63 - 1 elements")


def is_sliceable(composite: Composite) -> bool:
    """Whether its elements are those of one dense tensor, each by itself."""
    if composite.meaning == Meaning.QUANTIZED:
        return DTYPES[composite.dtype].name not in PACKED
    return composite.layout == "strided"


# ---------------------------------------------------------------- torch
def compose(torch: Any, composite: Composite, member: Callable[[Member], Any], argument: Callable[[int], Any]) -> Any:
    """The tensor, without its requires_grad.

    Args:
        torch: the module.
        composite: what `read` has made of the call.
        member: gives the tensor of a member; it may share memory with others.
        argument: gives the object of another argument.

    Raises: TableError; UnsupportedError for what torch has not.
    """
    parts = {name: member(each).detach().resolve_conj().resolve_neg() for name, each in composite.members.items()}
    places = {name: p for name, p in composite.arguments.items() if name in _WANTED and name not in parts}
    wanted = {name: argument(p) for name, p in places.items()}
    dtype = getattr(torch, DTYPES[composite.dtype].name)
    if composite.meaning == Meaning.SPARSE:
        return _make_sparse(torch, composite, parts, wanted)
    if composite.meaning == Meaning.QUANTIZED:
        return _make_quantized(torch, composite, parts, wanted, dtype)
    if composite.meaning == Meaning.NESTED:
        return _make_nested(torch, parts)
    if composite.meaning == Meaning.META:
        return torch.empty_strided(composite.sizes, composite.strides, dtype=dtype, device="meta")
    if composite.meaning == Meaning.FROM_CPU:
        return parts["tensor"] if parts["tensor"].dtype == dtype else parts["tensor"].to(dtype)
    return _of_array(torch, wanted["array"], composite.sizes).to(dtype)


_WANTED = ("coalesced", "scale", "zero_point", "scales", "zero_points", "array")


def _make_sparse(torch: Any, composite: Composite, parts: dict[str, Any], wanted: dict[str, Any]) -> Any:
    values = parts["values"]
    terms = {"device": values.device, "check_invariants": values.device.type != "meta"}
    try:
        if composite.layout == "sparse_coo":
            return torch.sparse_coo_tensor(
                parts["indices"], values, composite.sizes, is_coalesced=wanted.get("coalesced"), **terms
            )
        layout = getattr(torch, composite.layout)
        return torch.sparse_compressed_tensor(
            parts["compressed"], parts["plain"], values, composite.sizes, layout=layout, **terms
        )
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise TableError(f"torch refuses this {composite.layout} tensor: {str(error).partition(chr(10))[0]}") from None


def _make_quantized(torch: Any, composite: Composite, parts: dict[str, Any], wanted: dict[str, Any], dtype: Any) -> Any:
    ints = parts["int_repr"]
    if ints.device.type == "meta":
        raise UnsupportedError("torch has no quantized tensors on the meta device")
    terms = {"dtype": dtype, "device": ints.device}
    # Of no elements at first: the bytes are there already, and set_ does not look whether sizes and strides fit them.
    if "scale" in wanted:
        made = torch._empty_affine_quantized((0,), scale=wanted["scale"], zero_point=wanted["zero_point"], **terms)
    else:
        given = {name: parts[name] if name in parts else wanted[name] for name in ("scales", "zero_points")}
        is_float, count = _is_float(given["zero_points"]), len(given["scales"])
        for name, kind in (("scales", torch.float64), ("zero_points", torch.int64)):
            if isinstance(given[name], list):
                given[name] = torch.tensor(given[name], dtype=torch.float32 if is_float else kind, device=ints.device)
            if composite.channels is not None:
                left = torch.tensor(list(composite.channels), dtype=torch.int64, device=ints.device)
                given[name] = given[name][left]
        if composite.axis is None and is_float:
            raise UnsupportedError(
                "one channel, whose zero_point is no integer, by an index; take it by a slice, [i : i + 1]"
            )
        if composite.axis is None or (len(given["scales"]) == 1 < count and not is_float):
            # One channel is left, which has one scale for all; so torch has it too.
            scale, zero_point = given["scales"].item(), int(given["zero_points"].item())
            made = torch._empty_affine_quantized((0,), scale=scale, zero_point=zero_point, **terms)
        else:
            made = torch._empty_per_channel_affine_quantized(
                (0,) * len(composite.sizes), axis=composite.axis, **given, **terms
            )
    is_packed = DTYPES[composite.dtype].name in PACKED
    offset = composite.storage_offset if is_packed else ints.storage_offset()
    return made.set_(ints.untyped_storage(), offset, composite.sizes, composite.strides)


def _is_float(zero_points: Any) -> bool:
    if isinstance(zero_points, list):
        return any(type(n) is float for n in zero_points)
    return bool(zero_points.is_floating_point())


def _make_nested(torch: Any, parts: dict[str, Any]) -> Any:
    values = parts["values"]
    if values.device.type == "meta":
        raise UnsupportedError("torch has no nested tensors on the meta device")
    # torch reads these three as if they were contiguous, and the elements wherever they say.
    where = [parts[name].cpu().contiguous() for name in ("sizes", "strides", "offsets")]
    has = values.numel()
    for sizes, strides, offset in zip(*(each.tolist() for each in where)) if where[2].numel() else ():
        if offset < 0 or any(n < 0 for n in sizes) or any(n < 0 for n in strides):
            raise TableError("a component of a nested tensor has a negative offset, size or stride")
        _total(sizes)
        if 0 not in sizes and offset + hull(Geometry(0, tuple(sizes), tuple(strides))) > has:
            raise TableError(f"a component of a nested tensor reaches beyond its {has} elements")
    return torch._nested_view_from_buffer(values, *where)


def _of_array(torch: Any, array: Any, sizes: tuple[int, ...]) -> Any:
    if type(array).__module__ != "numpy" or not hasattr(array, "dtype") or tuple(array.shape) != sizes:
        raise UnsupportedError("a tensor that was saved as a NumPy array needs NumPy, and an array of numbers")
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="K"))
    except TypeError as error:
        raise TableError(f"torch has no tensors like this NumPy array: {error}") from None
