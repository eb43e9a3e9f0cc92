"""values_of: what NumPy says of the whole, out of chunks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
pytest.importorskip("ml_dtypes")

import zipslicer  # noqa: E402
import zipslicer.values  # noqa: E402
from zipslicer.values import BINS, Values, values_of  # noqa: E402

TENSORS = {
    "normal": torch.randn(300, 70),
    "turned": torch.randn(30, 70).t(),
    "bf16": torch.randn(500).bfloat16(),
    "f8": torch.randn(500).to(torch.float8_e5m2),
    "ints": torch.arange(-50, 1000),
    "u16": torch.arange(100).to(torch.uint16),
    "bools": torch.arange(9) > 3,
    "complex": torch.randn(50, dtype=torch.complex64),
    "odd": torch.tensor([math.nan, math.inf, -math.inf, 1.0, 2.0, 0.0, math.nan]),
    "only": torch.tensor([math.nan, math.inf]),
    "same": torch.full((100,), 3.5),
    "repeated": torch.randn(3, 1, 5).expand(3, 70, 5),
    "one": torch.tensor(2.5).expand(40, 50),
    "windows": torch.randn(100).unfold(0, 10, 1),
    "half complex": torch.randn(50, dtype=torch.complex64).to(torch.complex32),
    "scalar": torch.tensor(-2.0),
    "none": torch.empty(0, 3),
    "huge": torch.tensor([1e300, -1e300], dtype=torch.float64),
}


def wanted(tensor: Any) -> Values:
    made = tensor.to(torch.complex128).abs() if tensor.is_complex() else tensor
    flat = made.to(torch.float64).numpy().ravel()
    finite = flat[np.isfinite(flat)]
    with np.errstate(over="ignore", invalid="ignore"):
        least, most, mean, deviation = (
            map(float, (finite.min(), finite.max(), finite.mean(), finite.std())) if finite.size else (math.nan,) * 4
        )
        norm = float(np.sqrt((finite**2).sum()))
    bins = np.histogram(finite, BINS)[0].tolist() if finite.size and least < most else []
    nans, infinities, zeros = int(np.isnan(flat).sum()), int(np.isinf(flat).sum()), int((flat == 0).sum())
    return Values(flat.size, nans, infinities, zeros, least, most, mean, deviation, norm, tuple(bins))


@pytest.mark.parametrize("framework", ["pt", "np"])
@pytest.mark.parametrize("name", TENSORS)
def test_values(name: str, framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({name: TENSORS[name]}, tmp_path / "a.pt")
    monkeypatch.setattr(zipslicer.values, "CHUNK_NBYTES", 256)
    with zipslicer.load(tmp_path / "a.pt", framework=framework) as sd:
        got, right = values_of(sd.get_slice(name)), wanted(TENSORS[name])
    assert got[:4] == right[:4]
    assert got.bins == right.bins
    if name != "huge":  # whose squares are no float64
        assert got[4:9] == pytest.approx(right[4:9], rel=1e-12, nan_ok=True)
    assert got[4:6] == pytest.approx(right[4:6], nan_ok=True)


@pytest.mark.parametrize("framework", ["pt", "np"])
def test_terabytes_that_are_four_bytes(framework: str, tmp_path: Path) -> None:
    torch.save({"w": torch.tensor([3.0]).expand(1 << 40)}, tmp_path / "a.pt")
    with zipslicer.load(tmp_path / "a.pt", framework=framework) as sd:
        got = values_of(sd.get_slice("w"))
    assert got == Values(1 << 40, 0, 0, 0, 3.0, 3.0, 3.0, 0.0, 3.0 * (1 << 20), ())


def test_what_overlaps_otherwise_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1 << 17).as_strided((1 << 16, 1 << 16), (1, 1))}, tmp_path / "a.pt")
    said = "17179869184 bytes .* repeats 524288 bytes"
    with zipslicer.load(tmp_path / "a.pt") as sd, pytest.raises(zipslicer.UnsupportedError, match=said):
        values_of(sd.get_slice("w"))


@pytest.mark.parametrize("framework", ["pt", "np"])
def test_elements_that_are_no_numbers(framework: str, tmp_path: Path) -> None:
    torch.save({"w": torch.arange(8, dtype=torch.uint8).view(torch.bits8)}, tmp_path / "a.pt")
    with zipslicer.load(tmp_path / "a.pt", framework=framework) as sd, pytest.raises(TypeError, match="bits8"):
        values_of(sd.get_slice("w"))
