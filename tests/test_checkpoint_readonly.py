"""Your own checkpoint, read twice: zipslicer must give what torch.load gives, key by key and bit by bit.

    python tests/test_checkpoint_readonly.py FILE
    ZIPSLICER_TEST_SUBSET=0.1 ZIPSLICER_TEST_SEED=7 python tests/test_checkpoint_readonly.py FILE

The file is only read. torch.load takes it into memory whole, zipslicer one tensor at a time. Keys, shapes, dtypes and
plain values are always compared, all of them; ZIPSLICER_TEST_SUBSET (0 to 1) says for which share of the tensors the
bytes are, chosen at random by ZIPSLICER_TEST_SEED. `--unsafe` lets torch.load run code from the file, where it would
otherwise refuse it. Without a file name, under pytest, it checks itself on files that it makes.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

import zipslicer

if TYPE_CHECKING:
    from pathlib import Path

    import torch
else:
    torch = pytest.importorskip("torch")

SUBSET = "ZIPSLICER_TEST_SUBSET"
SEED = "ZIPSLICER_TEST_SEED"


class Comparison:
    """Walks what torch.load gave and the lazy object in step; counts what is equal, raises at the first difference."""

    def __init__(self, subset: float = 1.0, seed: int = 1337) -> None:
        self.subset = subset
        self.random = random.Random(seed)
        self.keys = self.tensors = self.bytes_compared = self.values = 0

    def walk(self, where: str, eager: Any, lazy: Any) -> None:
        if isinstance(eager, torch.Tensor):
            self.tensor(where, eager, lazy)
        elif isinstance(eager, torch.nn.Module):
            raise TypeError("a module is compared by its state_dict()")
        elif isinstance(eager, Mapping):
            self.mapping(where, eager, lazy)
        elif isinstance(eager, (list, tuple)) and not isinstance(eager, torch.Size):
            same(where, "length", len(eager), len(lazy))
            for place, value in enumerate(eager):
                self.walk(f"{where}[{place}]", value, lazy[place])
        else:
            self.value(where, eager, lazy)

    def mapping(self, where: str, eager: Mapping[Any, Any], lazy: Any) -> None:
        missing = [key for key in eager if key not in lazy]
        extra = [key for key in lazy.keys() if key not in eager]  # noqa: SIM118 its keys(), as users call it
        if missing or extra:
            raise AssertionError(
                f"{where}: zipslicer lacks the keys {missing[:9]} and has the keys {extra[:9]} too many"
            )
        same(where, "order of the keys", list(eager), list(lazy))
        same(where, "number of keys", len(eager), len(lazy))
        self.keys += len(eager)
        for key, value in eager.items():
            here = f"{where}[{key!r}]"
            if isinstance(value, torch.Tensor) and isinstance(lazy, zipslicer.LazyStateDict):
                meta = lazy.get_meta(key)
                if meta is None:
                    raise AssertionError(f"{here}: get_meta knows no tensor there")
                same(here, "shape by get_meta", tuple(value.shape), tuple(meta.shape))
                same(here, "size by get_meta", tuple(value.size()), tuple(meta.size()))
                same(here, "dtype by get_meta", value.dtype, meta.dtype)
            if isinstance(value, torch.Tensor) and self.random.random() >= self.subset:
                self.tensors += 1
            else:
                self.walk(here, value, lazy[key])

    def tensor(self, where: str, eager: torch.Tensor, lazy: Any) -> None:
        same(where, "type", type(eager), type(lazy))
        self.tensors += 1
        for fact in ("dtype", "shape", "layout", "requires_grad"):
            same(where, fact, getattr(eager, fact), getattr(lazy, fact))
        for part, (left, right) in enumerate(zip(dense_parts(eager), dense_parts(lazy), strict=True)):
            same(where, f"strides (part {part})", left.stride(), right.stride())
            left_bytes, right_bytes = hull(left), hull(right)
            if not torch.equal(left_bytes, right_bytes):
                byte = int((left_bytes != right_bytes).nonzero()[0])
                raise AssertionError(f"{where}: values differ, first in byte {byte} of {len(left_bytes)}")
            self.bytes_compared += len(left_bytes)

    def value(self, where: str, eager: Any, lazy: Any) -> None:
        same(where, "type", type(eager), type(lazy))
        if not (isinstance(eager, float) and math.isnan(eager) and math.isnan(lazy)):
            same(where, "value", eager, lazy)
        self.values += 1


def same(where: str, fact: str, eager: Any, lazy: Any) -> None:
    if not bool(eager == lazy):
        raise AssertionError(f"{where}: {fact} differs: torch.load gives {eager!r:.200}, zipslicer {lazy!r:.200}")


def dense_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The dense tensors that a tensor is made of: for most, itself."""
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in {torch.sparse_csr, torch.sparse_bsr}:
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in {torch.sparse_csc, torch.sparse_bsc}:
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif tensor.is_nested:
        yield tensor.values()
    elif tensor.is_quantized:
        yield tensor.int_repr()
    elif tensor.device.type != "meta":
        yield tensor.resolve_conj().resolve_neg()


def hull(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes from the first element of a dense tensor to its last: works for dtypes that have no kernels."""
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.uint8)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    width = tensor.element_size()
    start, nbytes = tensor.storage_offset() * width, (last + 1) * width
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), start, (nbytes,), (1,))


def compare(path: str | Path, *, unsafe: bool = False) -> Comparison:
    """Compare everything in a checkpoint; raises AssertionError at the first difference, which it names."""
    comparison = Comparison(float(os.environ.get(SUBSET) or 1.0), int(os.environ.get(SEED) or 1337))
    eager = torch.load(path, map_location="cpu", weights_only=not unsafe)
    if isinstance(eager, torch.nn.Module):
        with zipslicer.open(path) as checkpoint:
            tensors = checkpoint.tensors
            named = eager.state_dict(keep_vars=True)
            comparison.mapping("state_dict()", named, tensors.select(*named) if named else tensors)
    else:
        comparison.walk("checkpoint", eager, zipslicer.load(path, map_location="cpu"))
    return comparison


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare zipslicer with torch.load on a checkpoint, key by key.")
    parser.add_argument("file")
    parser.add_argument("--unsafe", action="store_true", help="let torch.load run code from the file")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        found = compare(options.file, unsafe=options.unsafe)
    except AssertionError as difference:
        print(f"DIFFERENT  {options.file}\n{difference}")
        return 1
    except Exception as error:  # whoever refuses the file says why, and that is the answer
        print(f"NOT COMPARED  {options.file}\n{type(error).__name__}: {error}")
        return 2
    print(
        f"EQUAL  {options.file} (zipslicer {zipslicer.__version__}, {zipslicer.backend()}): {found.keys} keys, "
        f"{found.tensors} tensors, {found.bytes_compared / 1e6:,.1f} MB compared bit by bit, "
        f"{found.values} other values, {time.perf_counter() - start:.1f} s"
    )
    return 0


# ---------------------------------------------------------------- under pytest


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A flat state dict beside what trainers add to it."""
    torch.manual_seed(5)
    weights = {f"layers.{layer}.weight": torch.randn(16, 8) for layer in range(20)}
    weights["transposed"] = torch.randn(6, 9).t()
    weights["every other row"] = torch.arange(40.0).reshape(10, 4)[::2]
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": weights, "step": 7, "loss": math.nan, "history": [0.5, {"eval": torch.ones(3)}]}, path)
    return path


def test_a_checkpoint_is_equal(checkpoint: Path) -> None:
    found = compare(checkpoint)
    assert (found.keys, found.tensors, found.values) == (4 + 22 + 1, 23, 3)
    assert found.bytes_compared > 20 * 16 * 8 * 4


def test_subset_compares_fewer_bytes(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SUBSET, "0.3")
    monkeypatch.setenv(SEED, "1")
    first, again = compare(checkpoint), compare(checkpoint)
    assert first.bytes_compared == again.bytes_compared
    monkeypatch.setenv(SUBSET, "1")
    whole = compare(checkpoint)
    assert 0 < first.bytes_compared < whole.bytes_compared
    assert (first.keys, first.tensors) == (whole.keys, whole.tensors)


@pytest.mark.parametrize(
    ("bend", "words"),
    [
        (
            lambda root: root["model"]["layers.3.weight"].view(torch.int32)[2, 1].bitwise_xor_(1),
            "'layers.3.weight'.*byte",
        ),
        (lambda root: root["model"].pop("transposed"), "keys .'transposed'. too many"),
        (lambda root: root["model"].update(more=torch.ones(1)), "lacks the keys .'more'"),
        (lambda root: root["model"].update(transposed=torch.ones(9, 6).half()), "dtype by get_meta"),
        (lambda root: root.update(step=8), "'step'.*value differs"),
        (lambda root: root["history"].append(1), "length differs"),
    ],
)
def test_a_difference_is_found(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, bend: Callable[[Any], Any], words: str
) -> None:
    root = torch.load(checkpoint, weights_only=True)
    bend(root)
    monkeypatch.setattr(torch, "load", lambda *_, **__: root)
    with pytest.raises(AssertionError, match=words):
        compare(checkpoint)


def test_the_command_says_what_it_found(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint)]) == 0
    assert capsys.readouterr().out.startswith(f"EQUAL  {checkpoint}")
    module = tmp_path / "module.pth"
    torch.save(torch.nn.Linear(3, 2), module)
    assert main([str(module)]) == 2  # torch.load refuses it
    assert main([str(module), "--unsafe"]) == 0
    assert "2 keys, 2 tensors" in capsys.readouterr().out


if __name__ == "__main__":
    sys.exit(main())
