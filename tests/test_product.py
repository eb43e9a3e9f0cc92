"""The product: every dtype x geometry x kind x pickle protocol x container, written by torch.save, read as torch.load reads it.

One file holds all dtypes of a family in all geometries, under names such as "float32.stepped"; a failure lists those names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")

import conformance  # noqa: E402

import zipslicer  # noqa: E402
from zipslicer.backend import DIFFERENTIABLE  # noqa: E402
from zipslicer.policy import DTYPES  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*other quantized tensor creation functions:UserWarning")

PROTOCOLS = (2, 3, 4, 5)
CONTAINERS = ("zip", "legacy")
KINDS = ("plain", "grad", "parameter", "shared", "storage")

PACKED = ("quint4x2", "quint2x4")  # several elements in a byte
PACKED_DTYPES = [getattr(torch, name) for name in PACKED]
FAMILIES: dict[str, list[str]] = {
    # by how torch writes them: storages of a class of their own; untyped ones, and the dtype in the call (v3); qparams
    "typed": [dtype.name for dtype in DTYPES if dtype.storage and not dtype.name.startswith("q")],
    "untyped": [dtype.name for dtype in DTYPES if not dtype.storage and hasattr(torch, dtype.name)],
    "quantized": [dtype.name for dtype in DTYPES if dtype.name.startswith("q") and dtype.name not in PACKED],
    # A torch that lacks the newest dtypes makes no views of these.
    "packed": [dtype.name for dtype in DTYPES if dtype.name in PACKED and hasattr(torch, conformance.NEWEST[0])],
}
FAMILIES = {family: names for family, names in FAMILIES.items() if names}
DIFFERENTIABLE_NAMES = {dtype.name for dtype in DTYPES if dtype.traits & DIFFERENTIABLE}


class Geometry(NamedTuple):
    """A tensor on a storage of `numel` elements."""

    numel: int
    storage_offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


GEOMETRIES: dict[str, Geometry] = {
    "contiguous": Geometry(12, 0, (3, 4), (4, 1)),
    "transposed": Geometry(12, 0, (4, 3), (1, 4)),
    "stepped": Geometry(12, 1, (2, 2), (8, 2)),
    "expanded": Geometry(12, 0, (5, 3, 4), (0, 4, 1)),
    "scalar": Geometry(1, 0, (), ()),
    "element": Geometry(12, 5, (), ()),
    "empty": Geometry(0, 0, (0, 3), (3, 1)),
    "empty_view": Geometry(12, 4, (0, 4), (4, 1)),
}

# What torch.load itself cannot read back (docs/format.md), and how it fails. Here the objects in memory are what must
# come out. Each row is (container, family, kind).
AttributeOfStorage = AttributeError  # UntypedStorage has no dtype, which the stream's reader asks every storage for
InPlaceOnALeaf = RuntimeError  # the call sets requires_grad first, and the storage after it
TORCH_CANNOT: Mapping[tuple[str, str, str], type[Exception]] = {
    ("zip", "untyped", "grad"): InPlaceOnALeaf,
    ("legacy", "untyped", "plain"): AttributeOfStorage,
    ("legacy", "untyped", "grad"): AttributeOfStorage,
    ("legacy", "untyped", "parameter"): AttributeOfStorage,
    ("legacy", "untyped", "shared"): AttributeOfStorage,
    ("legacy", "untyped", "storage"): AttributeOfStorage,
}

# Where torch.load makes a TypedStorage of bytes out of an UntypedStorage that was saved; we give what was saved.
TORCH_RETYPES = ("zip", "untyped", "storage")


def _combinations() -> list[Any]:
    found = []
    for container, family, kind, protocol in itertools.product(CONTAINERS, FAMILIES, KINDS, PROTOCOLS):
        if kind == "grad" and not any(name in DIFFERENTIABLE_NAMES for name in FAMILIES[family]):
            continue
        found.append(pytest.param(container, family, kind, protocol, id=f"{container}-{family}-{kind}-{protocol}"))
    return found


# --- what is saved ----------------------------------------------------------------------------------------------------


def patterned(dtype: Any, numel: int, first: int) -> Any:
    """A storage whose bytes count up, so that no two places look alike."""
    nbytes = numel * torch.empty(0, dtype=dtype).element_size()
    counted = torch.arange(first, first + nbytes)
    return (counted % 2 if dtype is torch.bool else counted).to(torch.uint8).untyped_storage()


def placed(storage: Any, dtype: Any, geometry: Geometry) -> Any:
    empty = torch.empty(0, dtype=dtype)
    return empty.set_(storage, geometry.storage_offset, geometry.size, geometry.stride)


def quantized(dtype: Any, numel: int, first: int) -> Any:
    """One dimension of torch's own making."""
    values = torch.arange(first, first + numel, dtype=torch.float32) % 16 / 2
    return torch.quantize_per_tensor(values, 0.5, 1, dtype)


def made(name: str, geometry: Geometry, first: int, flat: Any = None) -> Any:
    """A tensor of that geometry, on memory of its own or on that of `flat`."""
    dtype = getattr(torch, name)
    if not name.startswith("q"):
        return placed(patterned(dtype, geometry.numel, first) if flat is None else flat, dtype, geometry)
    flat = quantized(dtype, geometry.numel, first) if flat is None else flat
    return flat.as_strided(geometry.size, geometry.stride, geometry.storage_offset)


def per_channel(name: str) -> dict[str, Any]:
    """Quantized tensors whose scales are tensors themselves."""
    values, scales, points = torch.arange(12.0).view(3, 4), torch.tensor([0.5, 1, 2]), torch.tensor([1, 2, 3])
    dtype = getattr(torch, name)
    found = {}
    if name != "qint32":  # for which torch 2.13 has no such kernel, and dies
        found[f"{name}.channels_float"] = torch.quantize_per_channel(values, scales, points.float(), 0, dtype)
    if name not in PACKED:
        whole = torch.quantize_per_channel(values, scales.double(), points, 0, dtype)
        found |= {f"{name}.channels": whole, f"{name}.channels_stepped": whole[::2, 1::2]}
    return found


def plain(name: str) -> dict[str, Any]:
    tensors = {
        f"{name}.{label}": made(name, geometry, 7 * place)
        for place, (label, geometry) in enumerate(GEOMETRIES.items(), start=1)
    }
    return tensors | (per_channel(name) if name.startswith("q") else {})


def grad(name: str) -> dict[str, Any]:
    if name not in DIFFERENTIABLE_NAMES:
        return {}
    return {label: tensor.requires_grad_() for label, tensor in plain(name).items()}


def parameter(name: str) -> dict[str, Any]:
    return {
        label: torch.nn.Parameter(tensor, requires_grad=name in DIFFERENTIABLE_NAMES and not label.endswith("element"))
        for label, tensor in plain(name).items()
    }


def shared(name: str) -> dict[str, Any]:
    """Every geometry on one storage, a Parameter too, and one tensor under two names."""
    dtype = getattr(torch, name)
    flat = quantized(dtype, 12, 3) if name.startswith("q") else patterned(dtype, 12, 3)
    tensors = {f"{name}.{label}": made(name, geometry, 3, flat) for label, geometry in GEOMETRIES.items()}
    again = tensors[f"{name}.stepped"]
    tied = torch.nn.Parameter(made(name, GEOMETRIES["contiguous"], 3, flat), requires_grad=False)
    return tensors | {f"{name}.again": again, f"{name}.parameter": tied}


def storage(name: str) -> dict[str, Any]:
    """Storages that stand as values: of a class where the dtype has one, else of bytes; beside a tensor on one of them."""
    dtype = getattr(torch, name)
    memory, empty = patterned(dtype, 12, 5), patterned(dtype, 0, 5)
    if name in FAMILIES["untyped"]:
        beside = made(name, GEOMETRIES["stepped"], 5, memory)
        return {f"{name}.storage": memory, f"{name}.empty": empty, f"{name}.tensor": beside}
    typed = torch.storage.TypedStorage(wrap_storage=memory, dtype=dtype, _internal=True)
    none = torch.storage.TypedStorage(wrap_storage=empty, dtype=dtype, _internal=True)
    found = {f"{name}.storage": typed, f"{name}.empty": none}
    if name in FAMILIES["typed"]:
        found[f"{name}.tensor"] = made(name, GEOMETRIES["stepped"], 5, memory)
    return found


MAKERS: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "plain": plain,
    "grad": grad,
    "parameter": parameter,
    "shared": shared,
    "storage": storage,
}


# --- what must come out -----------------------------------------------------------------------------------------------


def memory_of(value: Any) -> Any:
    """The UntypedStorage under a tensor or a typed storage."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage()
    return value if isinstance(value, torch.UntypedStorage) else value._untyped_storage


def quantization(tensor: Any) -> Any:
    if not tensor.is_quantized:
        return None
    if tensor.qscheme() == torch.per_tensor_affine:
        return (tensor.qscheme(), tensor.q_scale(), tensor.q_zero_point())
    scales, points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    return (tensor.qscheme(), scales.dtype, scales.tolist(), points.dtype, points.tolist(), tensor.q_per_channel_axis())


def facts(value: Any) -> dict[str, Any]:
    """All that a tensor or a storage says of itself, but for whom it shares its memory with."""
    found = {
        "type": type(value),
        "dtype": getattr(value, "dtype", None),
        "bytes": conformance.storage_bytes(memory_of(value)),
    }
    if isinstance(value, torch.Tensor):
        found |= {
            "shape": tuple(value.shape),
            "stride": value.stride(),
            "storage offset": value.storage_offset(),
            "requires_grad": value.requires_grad,
            "leaf": value.is_leaf,
            "device": value.device.type,
            "quantization": quantization(value),
        }
    return found


def sharing(values: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """For each name the first one on the same memory, and the first one that is the same object."""
    memories: dict[Any, str] = {}
    objects: dict[int, str] = {}
    found = {}
    for name, value in values.items():
        memory = memory_of(value)
        key = memory._cdata if memory.nbytes() else name  # no bytes, none to share
        found[name] = (memories.setdefault(key, name), objects.setdefault(id(value), name))
    return found


def differences(wanted: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    if list(got) != list(wanted):
        return [f"names {list(got)[:5]}, not {list(wanted)[:5]}"]
    wrong = []
    for name in wanted:
        a, b = facts(wanted[name]), facts(got[name])
        wrong += [f"{name}: {fact} is {b.get(fact)}, not {a[fact]}" for fact in a if b.get(fact) != a[fact]]
    a, b = sharing(wanted), sharing(got)
    return wrong + [f"{name}: memory and object of {b[name]}, not of {a[name]}" for name in a if a[name] != b[name]]


def elements(value: Any) -> bytes:
    return conformance.logical_bytes(value) if isinstance(value, torch.Tensor) else conformance.storage_bytes(value)


def differences_on_touch(wanted: Mapping[str, Any], loaded: Any) -> list[str]:
    """One by one: the same elements in memory that holds no others."""
    wrong = []
    for name, value in wanted.items():
        got = loaded[name]
        a, b = facts(value), facts(got)
        del a["bytes"], b["bytes"]
        if isinstance(value, torch.Tensor) and value.dtype not in PACKED_DTYPES:
            a |= {"storage offset": 0, "elements": elements(value), "memory": conformance.hull_nbytes(value)}
            b |= {"elements": elements(got), "memory": memory_of(got).nbytes()}
        elif not isinstance(value, torch.Tensor) or value.is_contiguous():
            a["bytes"], b["bytes"] = (conformance.storage_bytes(memory_of(each)) for each in (value, got))
        wrong += [f"{name}: {fact} is {b.get(fact)}, not {a[fact]}" for fact in a if b.get(fact) != a[fact]]
    return wrong


INDEXES: tuple[Any, ...] = (
    (),
    ...,
    -1,
    slice(None, None, 2),
    (slice(None), slice(1, 3)),
    (None, slice(-1, None)),
)


def indexed(value: Any, index: Any) -> Any:
    try:
        part = value[index]
    except IndexError:
        return IndexError
    return (part.dtype, tuple(part.shape), quantization(part), elements(part))


def differences_in_slices(wanted: Mapping[str, Any], loaded: Any) -> list[str]:
    wrong = []
    for name, value in wanted.items():
        if not isinstance(value, torch.Tensor) or value.dtype in PACKED_DTYPES:
            continue  # a part of a byte is no part of a file
        if value.is_quantized and value.qscheme() == torch.per_channel_affine_float_qparams:
            continue  # torch has no slices of these to compare with
        part = loaded.get_slice(name)
        for index in INDEXES:
            a, b = indexed(value.detach(), index), indexed(part, index)
            if a != b:
                wrong.append(f"{name}: [{index}] is {b}, not {a}")
    return wrong


def differences_in_meta(wanted: Mapping[str, Any], loaded: Any) -> list[str]:
    """What is known without reading, and that equal storage keys mean shared memory."""
    wrong = []
    for name, value in wanted.items():
        info = loaded.get_meta(name)
        memory = memory_of(value)
        a: dict[str, Any] = {"storage_nbytes": memory.nbytes(), "location": "cpu"}
        if isinstance(value, torch.Tensor):
            a |= {
                "dtype": value.dtype,
                "shape": tuple(value.shape),
                "strides": value.stride(),
                "storage_offset": value.storage_offset(),
                "numel": value.numel(),
                "requires_grad": value.requires_grad,
                "is_parameter": isinstance(value, torch.nn.Parameter),
                "is_contiguous": value.is_contiguous(),
            }
        wrong += [f"{name}: {fact} is {getattr(info, fact)}" for fact in a if getattr(info, fact) != a[fact]]
    keys = {name: loaded.get_meta(name).storage_key for name in wanted if memory_of(wanted[name]).nbytes()}
    shared_by = sharing(wanted)
    groups = {(key, shared_by[name][0]) for name, key in keys.items()}
    if not len(groups) == len({key for key, _ in groups}) == len({memory for _, memory in groups}):
        wrong.append(f"storage keys {keys}")
    return wrong


def as_torch_loads(path: Path, saved: dict[str, Any], combination: tuple[str, str, str]) -> dict[str, Any]:
    """The objects of torch.load; where that is known to fail, and does, those that were saved."""
    if combination in TORCH_CANNOT:
        with pytest.raises(TORCH_CANNOT[combination]):
            torch.load(path, weights_only=False)
        return saved
    loaded = dict(torch.load(path, weights_only=False))
    if combination == TORCH_RETYPES:
        for name, value in saved.items():
            if isinstance(value, torch.UntypedStorage):
                assert (type(loaded[name]), loaded[name].dtype) == (torch.storage.TypedStorage, torch.uint8)
                loaded[name] = memory_of(loaded[name])
    return loaded


@pytest.mark.parametrize(("container", "family", "kind", "protocol"), _combinations())
def test_product(container: str, family: str, kind: str, protocol: int, tmp_path: Path) -> None:
    saved: dict[str, Any] = {}
    for name in FAMILIES[family]:
        saved |= MAKERS[kind](name)
    path = tmp_path / "product.pt"
    torch.save(saved, path, pickle_protocol=protocol, _use_new_zipfile_serialization=container == "zip")
    wanted = as_torch_loads(path, saved, (container, family, kind))
    assert differences(saved, wanted) == [], "torch.load gives something else than was saved"
    with zipslicer.load(path) as loaded:
        assert differences(wanted, loaded.materialize()) == []
        assert differences_on_touch(wanted, loaded) == []
        assert differences_in_slices(wanted, loaded) == []
        assert differences_in_meta(wanted, loaded) == []


def test_no_dtype_is_left_out() -> None:
    here = {dtype.name for dtype in DTYPES if hasattr(torch, dtype.name)}
    assert {dtype.name for dtype in DTYPES} - here <= set(conformance.NEWEST)
    assert here - set(itertools.chain(*FAMILIES.values())) <= set(PACKED)  # which an old torch makes no views of
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in here)
