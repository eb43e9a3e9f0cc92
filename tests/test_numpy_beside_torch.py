"""NumPy beside torch: the same file opened twice, as tensors and as arrays, which must be the same bits."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
pytest.importorskip("ml_dtypes")

import conformance  # noqa: E402
import test_product as product  # noqa: E402
from conformance import CASES, Case, Loads  # noqa: E402

import zipslicer  # noqa: E402
from zipslicer.errors import UnsupportedError, ZipSlicerError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*other quantized tensor creation functions:UserWarning")

LARGE = 1 << 28  # bytes; the case of files beyond 4 GiB is compared by others


def is_array(tensor: Any) -> bool:
    """Whether a tensor of torch can be had as an array."""
    dense = tensor.layout == torch.strided and not tensor.is_nested
    return dense and not tensor.is_quantized and not tensor.is_meta


def bits(value: Any) -> bytes:
    """The elements of a tensor in order; the bytes of a storage."""
    return conformance.logical_bytes(value) if isinstance(value, torch.Tensor) else conformance.storage_bytes(value)


def compared(sd: Any, arrays: Any, key: Any, tensor: Any, made: Any = None) -> None:
    """One key of both; `made`: the array, where it was read already."""
    if isinstance(tensor, torch.Tensor) and not is_array(tensor):
        with pytest.raises(UnsupportedError):
            arrays[key]
        for part in sd.get_meta(key).parts:
            one, other = sd.get_slice(key).part(part)[...], arrays.get_slice(key).part(part)[...]
            assert (other.shape, other.tobytes()) == (tuple(one.shape), bits(one)), (key, part)
        return
    made = arrays[key] if made is None else made
    assert isinstance(made, np.ndarray), key
    assert made.tobytes() == bits(tensor), key
    info = arrays.get_meta(key)
    assert (made.shape, made.dtype) == (info.shape, info.dtype), key
    if isinstance(tensor, torch.Tensor):
        assert made.shape == tuple(tensor.shape), key
        if made.size > 1 and made.flags.writeable and not (tensor.is_conj() or tensor.is_neg()):
            assert tuple(n // made.itemsize for n in made.strides) == tensor.stride(), key
    for name in (
        "shape",
        "strides",
        "storage_offset",
        "nbytes",
        "storage_key",
        "requires_grad",
        "is_parameter",
        "location",
    ):
        assert getattr(info, name) == getattr(sd.get_meta(key), name), (key, name)


def compared_whole(source: Any, **keywords: Any) -> int:
    """All tensors of a file; how many were arrays."""
    sd = zipslicer.open(source, **keywords).tensors
    arrays = zipslicer.open(source, framework="np", **keywords).tensors
    assert list(sd) == list(arrays)
    count = 0
    for key in sd:
        info = sd.get_meta(key)
        if info is None or max(info.nbytes, info.numel) > LARGE:
            continue
        try:
            tensor = sd[key]
        except ZipSlicerError as error:
            with pytest.raises(type(error)):
                arrays[key]
            continue
        compared(sd, arrays, key, tensor)
        count += 1
    return count


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case: Case, tmp_path: Path) -> None:
    """What loads gives equal bits; what is refused is refused in the same way."""
    outcome = case.make(tmp_path)
    if isinstance(outcome, Loads):
        compared_whole(outcome.file, **outcome.keywords)
    else:
        assert refusal(outcome.file, framework="np") == refusal(outcome.file)


def refusal(source: Any, **keywords: Any) -> tuple[type[Exception], str] | None:
    """How opening fails."""
    try:
        zipslicer.open(source, **keywords)
    except ZipSlicerError as error:
        return type(error), str(error)
    return None


PROTOCOL_2 = [each for each in product._combinations() if each.values[-1] == 2]


@pytest.mark.parametrize(("container", "family", "kind", "protocol"), PROTOCOL_2)
def test_every_dtype_geometry_and_kind(container: str, family: str, kind: str, protocol: int, tmp_path: Path) -> None:
    saved: dict[str, Any] = {}
    for name in product.FAMILIES[family]:
        saved |= product.MAKERS[kind](name)
    path = tmp_path / "product.pt"
    torch.save(saved, path, pickle_protocol=protocol, _use_new_zipfile_serialization=container == "zip")
    with zipslicer.load(path) as sd, zipslicer.load(path, framework="np") as arrays:
        for key, tensor in saved.items():
            compared(sd, arrays, key, tensor)
        dense = [key for key, value in saved.items() if not isinstance(value, torch.Tensor) or is_array(value)]
        wanted, whole = sd.get_tensors(dense), arrays.select(dense).materialize()
        for key in dense:
            compared(sd, arrays, key, wanted[key], whole[key])
        slices_compared(sd, arrays, [key for key in dense if isinstance(saved[key], torch.Tensor)])
        groups_compared(wanted, whole)


def slices_compared(sd: Any, arrays: Any, keys: list[str]) -> None:
    for key in keys:
        for index in product.INDEXES:
            try:
                part = sd.get_slice(key)[index]
            except IndexError:
                with pytest.raises(IndexError):
                    arrays.get_slice(key)[index]
                continue
            made = arrays.get_slice(key)[index]
            assert (made.shape, made.tobytes()) == (tuple(part.shape), bits(part)), (key, index)


def groups_compared(tensors: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Who shares memory with whom."""
    groups = product.sharing(tensors)
    for key, (first, _) in groups.items():
        if arrays[key].size:
            assert np.may_share_memory(arrays[key], arrays[first]) or arrays[first].size == 0, (key, first)
    firsts = [key for key, (first, _) in groups.items() if key == first and arrays[key].size]
    for i, key in enumerate(firsts):
        assert not any(np.may_share_memory(arrays[key], arrays[other]) for other in firsts[:i]), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casts_are_torchs(dtype: Any, tmp_path: Path) -> None:
    """To the last bit, too large and not a number among them."""
    import ml_dtypes

    torch.manual_seed(3)
    values = torch.randn(4096) * torch.logspace(-42, 38, 4096)
    values[:4] = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0])
    tree = {"w": values, "t": values[:24].view(4, 6).t(), "e": values[:6].expand(3, 6)}
    tree |= {"b": values.bfloat16(), "d": values.double()}
    path = tmp_path / "a.pt"
    torch.save(tree, path)
    sd = zipslicer.load(path, dtype=dtype)
    kind = ml_dtypes.bfloat16 if dtype is torch.bfloat16 else str(dtype).removeprefix("torch.")
    arrays = zipslicer.load(path, framework="np", dtype=kind)
    for key in tree:
        for one, other in ((sd[key], arrays[key]), (sd.get_slice(key)[1:], arrays.get_slice(key)[1:])):
            number = ~torch.isnan(one)
            assert (np.isnan(other.astype("f8")) == ~number.numpy()).all(), key
            found = torch.from_numpy(np.array(other).view(f"i{other.itemsize}"))
            assert torch.equal(found[number], one.contiguous().view(found.dtype)[number]), key


def elsewhere() -> list[Path]:
    folder = os.environ.get("ZIPSLICER_CONFORMANCE")
    return sorted(Path(folder).glob("*.*t*")) if folder else []


@pytest.mark.skipif(not elsewhere(), reason="ZIPSLICER_CONFORMANCE names no folder of cases")
def test_files_made_elsewhere() -> None:
    count = 0
    for path in elsewhere():
        try:
            zipslicer.open(path)
        except (ZipSlicerError, ImportError):
            continue
        with contextlib.suppress(NotImplementedError):  # a dtype that this torch lacks, and NumPy has
            count += compared_whole(path)
    assert count > 100
