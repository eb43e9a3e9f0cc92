"""How each library does each piece of work, in the best way that its own interface offers.

Contestants read the same tensors: those of this format read NAME.pth, the others its safetensors twin. What they give
lies in memory of its own, unless a method says otherwise.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from make_files import CACHE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Tensors = dict[str, torch.Tensor]
Wanted = "Callable[[str], bool]"  # which keys

STREAM_BUDGET = 256 << 20  # bytes that zipslicer's stream may read ahead


def every(_key: str) -> bool:
    return True


class Contestant:
    """What a library must be able to do; the methods below `select` have other ways where a library has better ones."""

    suffix = ".pth"
    lazy = True  # False where opening reads everything: then no read of one tensor is left to measure

    def open(self, path: str) -> Any:
        raise NotImplementedError

    def getter(self, path: str) -> Callable[[str], torch.Tensor]:
        """Opens a file. Returns what reads one tensor of it."""
        raise NotImplementedError

    def select(self, path: str, wanted: Wanted = every) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of those keys, one after the other, in the order in which the file is best read."""
        raise NotImplementedError

    def keys(self, path: str) -> list[str]:
        return list(self.open(path).keys())

    def some(self, path: str, wanted: Wanted) -> Tensors:
        return dict(self.select(path, wanted))

    def whole(self, path: str) -> Tensors:
        return dict(self.select(path))

    def small(self, path: str) -> Tensors:
        """All of many small tensors; here alone they may be views of the file, of who gives such."""
        return self.whole(path)

    def stream(self, path: str) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors, of which the caller keeps none."""
        return self.select(path)

    def rows(self, path: str, key: str, rows: slice) -> torch.Tensor:
        return self.getter(path)(key)[rows].clone()

    def columns(self, path: str, key: str, columns: slice) -> torch.Tensor:
        return self.getter(path)(key)[:, columns].clone()

    def load_into(self, path: str, model: torch.nn.Module) -> None:
        """Into parameters that are there already, one after the other."""
        into = model.state_dict()
        for key, tensor in self.select(path):
            into[key].copy_(tensor)


class Zipslicer(Contestant):
    def __init__(self) -> None:
        import zipslicer

        self.library = zipslicer
        self.options: dict[str, Any] = {}
        if zipslicer.backend() != os.environ["ZIPSLICER_BACKEND"]:
            raise RuntimeError(f"asked for {os.environ['ZIPSLICER_BACKEND']}, got {zipslicer.backend()}")

    def open(self, path: str) -> Any:
        return self.library.load(path, **self.options)

    def getter(self, path: str) -> Callable[[str], torch.Tensor]:
        state_dict = self.open(path)
        return lambda key: state_dict[key]

    def stream(self, path: str) -> Iterator[tuple[str, torch.Tensor]]:
        return self.open(path).stream(budget_bytes=STREAM_BUDGET)

    def some(self, path: str, wanted: Wanted) -> Tensors:
        state_dict = self.open(path)
        return state_dict.get_tensors([key for key in state_dict if wanted(key)])

    def whole(self, path: str) -> Tensors:
        return self.open(path).materialize()

    def rows(self, path: str, key: str, rows: slice) -> torch.Tensor:
        return self.open(path).get_slice(key)[rows]

    def columns(self, path: str, key: str, columns: slice) -> torch.Tensor:
        return self.open(path).get_slice(key)[:, columns]

    def load_into(self, path: str, model: torch.nn.Module) -> None:
        self.open(path).load_into(model)


class ZipslicerDirect(Zipslicer):
    def __init__(self) -> None:
        super().__init__()
        self.options = {"direct": True}


class TorchLoad(Contestant):
    lazy = False

    def open(self, path: str) -> Any:
        return torch.load(path, weights_only=True)

    def getter(self, path: str) -> Callable[[str], torch.Tensor]:
        return self.open(path).__getitem__

    def select(self, path: str, wanted: Wanted = every) -> Iterator[tuple[str, torch.Tensor]]:
        # A tensor keeps its own storage, so the rest of the file is freed again: the peak is what it costs.
        return ((key, tensor) for key, tensor in self.open(path).items() if wanted(key))

    def load_into(self, path: str, model: torch.nn.Module) -> None:
        model.load_state_dict(self.open(path))


class TorchLoadMmap(TorchLoad):
    lazy = True

    def open(self, path: str) -> Any:
        return torch.load(path, weights_only=True, mmap=True)

    def getter(self, path: str) -> Callable[[str], torch.Tensor]:
        state_dict = self.open(path)
        return lambda key: state_dict[key].clone()

    def select(self, path: str, wanted: Wanted = every) -> Iterator[tuple[str, torch.Tensor]]:
        return ((key, tensor.clone()) for key, tensor in super().select(path, wanted))

    def rows(self, path: str, key: str, rows: slice) -> torch.Tensor:
        return self.open(path)[key][rows].clone()

    def small(self, path: str) -> Tensors:
        return self.open(path)

    def columns(self, path: str, key: str, columns: slice) -> torch.Tensor:
        return self.open(path)[key][:, columns].clone()


class SafetensorsMmap(Contestant):
    suffix = ".safetensors"
    backend = "mmap"

    def __init__(self) -> None:
        import safetensors.torch

        self.library = safetensors

    def open(self, path: str) -> Any:
        return self.library.safe_open(path, "pt", backend=self.backend)

    def getter(self, path: str) -> Callable[[str], torch.Tensor]:
        handle = self.open(path)
        return lambda key: handle.get_tensor(key).clone()

    def select(self, path: str, wanted: Wanted = every) -> Iterator[tuple[str, torch.Tensor]]:
        handle = self.open(path)
        return ((key, handle.get_tensor(key).clone()) for key in handle.offset_keys() if wanted(key))

    def rows(self, path: str, key: str, rows: slice) -> torch.Tensor:
        return self.open(path).get_slice(key)[rows].clone()

    def small(self, path: str) -> Tensors:
        handle = self.open(path)
        return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 it is no mapping

    def columns(self, path: str, key: str, columns: slice) -> torch.Tensor:
        return self.open(path).get_tensor(key)[:, columns].clone()

    def load_into(self, path: str, model: torch.nn.Module) -> None:
        self.library.torch.load_model(model, path, backend=self.backend)


class SafetensorsWhole(SafetensorsMmap):
    """The matrix into memory of its own, and then the columns out of it."""

    def columns(self, path: str, key: str, columns: slice) -> torch.Tensor:
        return self.open(path).get_tensor(key).clone()[:, columns].clone()


class SafetensorsPread(SafetensorsMmap):
    backend = "pread"

    def getter(self, path: str) -> Callable[[str], torch.Tensor]:
        handle = self.open(path)
        return lambda key: handle.get_tensor(key)  # noqa: PLW0108 one call around the call, as for all others

    def select(self, path: str, wanted: Wanted = every) -> Iterator[tuple[str, torch.Tensor]]:
        handle = self.open(path)
        return ((key, handle.get_tensor(key)) for key in handle.offset_keys() if wanted(key))

    def whole(self, path: str) -> Tensors:
        return self.open(path).get_tensors()

    def small(self, path: str) -> Tensors:
        return self.whole(path)

    def rows(self, path: str, key: str, rows: slice) -> torch.Tensor:
        return self.open(path).get_slice(key)[rows]


class FabricLazyLoad(Contestant):
    def __init__(self) -> None:
        from lightning_fabric.utilities import load

        self.library = load

    def open(self, path: str) -> Any:
        return self.library._lazy_load(path)

    def getter(self, path: str) -> Callable[[str], torch.Tensor]:
        state_dict = self.open(path)
        return lambda key: state_dict[key]._load_tensor()

    def select(self, path: str, wanted: Wanted = every) -> Iterator[tuple[str, torch.Tensor]]:
        return ((key, lazy._load_tensor()) for key, lazy in self.open(path).items() if wanted(key))


class Zipslicer081(Contestant):
    def __init__(self) -> None:
        folder = os.environ.get("ZIPSLICER_081", str(Path(sys.prefix) / "zipslicer-0.8.1"))
        sys.path.insert(0, folder)  # it shares its name with us
        import zipslicer

        if not str(zipslicer.__file__).startswith(folder):
            raise RuntimeError(f"zipslicer 0.8.1 should be in {folder}, and {zipslicer.__file__} was imported")
        self.library = zipslicer

    def open(self, path: str) -> Any:
        return self.library.load(path)

    def getter(self, path: str) -> Callable[[str], torch.Tensor]:
        state_dict = self.open(path)
        return lambda key: state_dict[key]

    def select(self, path: str, wanted: Wanted = every) -> Iterator[tuple[str, torch.Tensor]]:
        state_dict = self.open(path)
        return ((key, state_dict[key]) for key in state_dict.keys() if wanted(key))  # noqa: SIM118 iteration yields nothing there


class Extent(ctypes.Structure):
    """raw_read.cc has its twin."""

    _fields_ = (("offset", ctypes.c_uint64), ("to", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


class RawRead(Contestant):
    """No library: raw_read.cc fills memory, of which tensors are made that show it. The safetensors file says where
    each tensor is; reading that header is within the time."""

    suffix = ".safetensors"

    def __init__(self) -> None:
        library = CACHE / "libraw_read.so"
        source = Path(__file__).parent / "raw_read.cc"
        if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
            flags = ["-O2", "-shared", "-fPIC", "-pthread"]
            subprocess.run(["c++", *flags, "-o", str(library), str(source)], check=True)
        self.library = ctypes.CDLL(str(library))
        self.library.raw_allocate.restype = ctypes.c_void_p
        self.threads = int(os.environ.get("RAW_THREADS", len(os.sched_getaffinity(0))))

    def open(self, path: str) -> tuple[dict[str, Any], int]:
        """The header, and the offset of the first tensor."""
        with Path(path).open("rb") as file:
            nbytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(nbytes))
        header.pop("__metadata__", None)
        return header, 8 + nbytes

    def allocate(self, nbytes: int) -> int:
        address = self.library.raw_allocate(ctypes.c_size_t(nbytes))
        if not address:
            raise MemoryError
        return address

    def show(self, address: int, facts: dict[str, Any], shape: Iterable[int]) -> torch.Tensor:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[facts["dtype"]]
        shape = torch.Size(shape)
        memory = (ctypes.c_char * (shape.numel() * dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def read(self, path: str, extents: list[Extent]) -> None:
        array = (Extent * len(extents))(*extents)
        if self.library.raw_read(os.fsencode(path), array, ctypes.c_size_t(len(extents)), self.threads):
            raise OSError(f"raw_read.cc could not read {path}")

    def some(self, path: str, wanted: Wanted) -> Tensors:
        header, start = self.open(path)
        chosen = {key: facts for key, facts in header.items() if wanted(key)}
        sizes = [end - begin for begin, end in (facts["data_offsets"] for facts in chosen.values())]
        memory = self.allocate(sum(sizes))
        places = [memory + before for before in itertools.accumulate(sizes[:-1], initial=0)]
        begins = [start + facts["data_offsets"][0] for facts in chosen.values()]
        self.read(path, [Extent(*extent) for extent in zip(begins, places, sizes, strict=True)])
        return {
            key: self.show(place, facts, facts["shape"])
            for (key, facts), place in zip(chosen.items(), places, strict=True)
        }

    def whole(self, path: str) -> Tensors:
        return self.some(path, every)

    def columns(self, path: str, key: str, columns: slice) -> torch.Tensor:
        header, start = self.open(path)
        facts = header[key]
        rows, all_columns = facts["shape"]
        begin, end = facts["data_offsets"]
        stride = (end - begin) // rows
        nbytes = stride // all_columns * (columns.stop - columns.start)
        memory = self.allocate(rows * nbytes)
        offset = start + begin + stride // all_columns * columns.start
        sizes = map(ctypes.c_size_t, (nbytes, stride, rows))
        to = ctypes.c_void_p(memory)
        if self.library.raw_read_columns(os.fsencode(path), ctypes.c_uint64(offset), *sizes, to, self.threads):
            raise OSError(f"raw_read.cc could not read {path}")
        return self.show(memory, facts, (rows, columns.stop - columns.start))

    def load_into(self, path: str, model: torch.nn.Module) -> None:
        header, start = self.open(path)
        into = model.state_dict()
        self.read(
            path,
            [
                Extent(start + facts["data_offsets"][0], into[key].data_ptr(), into[key].nbytes)
                for key, facts in header.items()
            ],
        )


class Entrant(NamedTuple):
    """A row of the tables: a contestant, and what its process finds in the environment."""

    kind: type[Contestant]
    title: str
    environment: dict[str, str] = {}  # noqa: RUF012 nobody writes to it


NATIVE, PURE = {"ZIPSLICER_BACKEND": "native"}, {"ZIPSLICER_BACKEND": "pure"}

# The libraries, which take part in all cases,
ENTRANTS = {
    "native": Entrant(Zipslicer, "**zipslicer, native**", NATIVE),
    "pure": Entrant(Zipslicer, "**zipslicer, pure Python**", PURE),
    "torch.load": Entrant(TorchLoad, "torch.load"),
    "torch.load(mmap)": Entrant(TorchLoadMmap, "torch.load(mmap=True), clone"),
    "safetensors mmap": Entrant(SafetensorsMmap, "safetensors, mmap, clone ¹"),
    "safetensors pread": Entrant(SafetensorsPread, "safetensors, pread ¹"),
    "fabric _lazy_load": Entrant(FabricLazyLoad, "lightning-fabric _lazy_load"),
    "zipslicer 0.8.1": Entrant(Zipslicer081, "zipslicer 0.8.1"),
}
LIBRARIES = tuple(ENTRANTS)
OURS = ("native", "pure")
READS_PTH = ("torch.load", "torch.load(mmap)", "fabric _lazy_load", "zipslicer 0.8.1")
PEERS = (*READS_PTH, "safetensors mmap", "safetensors pread")

# and who takes part in some.
RAW = "raw C++ read"
RAW_ONE_THREAD = "raw C++ read, 1 thread"
ONE_THREAD = "native, 1 thread"
DIRECT = "native, direct=True"
WHOLE_THEN_SLICE = "safetensors, whole, then the slice"
ENTRANTS |= {
    ONE_THREAD: Entrant(Zipslicer, "zipslicer, native, `ZIPSLICER_THREADS=1`", {**NATIVE, "ZIPSLICER_THREADS": "1"}),
    DIRECT: Entrant(ZipslicerDirect, "zipslicer, native, `direct=True`", NATIVE),
    WHOLE_THEN_SLICE: Entrant(SafetensorsWhole, "safetensors, clone of the whole, then the slice ¹"),
    RAW: Entrant(RawRead, "raw C++ read of these bytes ²"),
    RAW_ONE_THREAD: Entrant(RawRead, "the same, 1 thread ²", {"RAW_THREADS": "1"}),
}
