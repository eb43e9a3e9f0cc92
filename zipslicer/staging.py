"""Staging: bytes of a file on their way to another dtype or device, a chunk at a time, through buffers that are used again.

A cast reads and converts chunk after chunk, so that there are never two copies of a tensor. What goes to a CUDA device is
read into pinned memory, of which a process has one ring, and copied from there by a stream of its own, while the next
chunk is read. Knows no file: what reads is handed in. Nor does it import torch, which is handed in as well.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

__all__ = ["CHUNK_NBYTES", "LANE_FROM", "Lane", "Ring", "Slot", "cast", "lane_of", "memory_of", "ring_of", "send"]

CHUNK_NBYTES = 16 << 20  # bytes of the file that are held to be cast; a multiple of every itemsize
LANE_FROM = 256 << 10  # bytes; what is smaller is sooner copied from where it was read than told a stream to wait for
SLOT_NBYTES = 32 << 20  # of pinned memory that is copied in one go
SLOTS = 8  # of a ring: 256 MiB, enough for several readers to be ahead of several devices

# Fills memory with bytes [start, start + its length) of what is to be had.
Read = Callable[[int, memoryview], None]


def memory_of(tensor: Any, nbytes: int) -> memoryview:
    """The first bytes of a CPU tensor's memory. REQUIRES: it has so many, and outlives the view."""
    return memoryview((ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())).cast("B")


def cast(torch: Any, read: Read, nbytes: int, given: Any, target: Any) -> None:
    """Elements of the dtype `given`, `nbytes` in all, into a flat CPU tensor of another one."""
    buffer = torch.empty(min(nbytes, CHUNK_NBYTES), dtype=torch.uint8, device="cpu")
    for start in range(0, nbytes, CHUNK_NBYTES):
        size = min(CHUNK_NBYTES, nbytes - start)
        read(start, memory_of(buffer, size))
        first, count = start // given.itemsize, size // given.itemsize
        target[first : first + count].copy_(buffer[:size].view(given))


class Lane(Protocol):
    """The way to a device: copies that run while others are read."""

    def buffer(self, nbytes: int) -> Any:
        """Memory on this side, as a uint8 tensor, that copies may leave from."""
        ...

    def begin(self) -> None:
        """From here on copies come after what the device was told to do before."""
        ...

    def copy(self, target: Any, source: Any) -> None:
        """Begin to copy, and to cast where the dtypes differ. `source` must not change before the next mark is reached."""
        ...

    def mark(self) -> Any:
        """What becomes true of its `synchronize()` when all copies that have begun are done."""
        ...

    def end(self, target: Any) -> None:
        """What the device is told to do from here on by this thread comes after the copies."""
        ...

    def handover(self) -> Callable[[Any], None]:
        """For another thread to call with what this one has made up to now, before it uses that."""
        ...


class CudaLane:
    """Of torch.cuda, which ROCm has as well."""

    def __init__(self, torch: Any, device: Any) -> None:
        self._torch, self._device = torch, device
        self._stream = torch.cuda.Stream(device)

    def buffer(self, nbytes: int) -> Any:
        return self._torch.empty(nbytes, dtype=self._torch.uint8, device="cpu", pin_memory=True)

    def begin(self) -> None:
        self._stream.wait_stream(self._torch.cuda.current_stream(self._device))

    def copy(self, target: Any, source: Any) -> None:
        with self._torch.cuda.stream(self._stream):
            if source.dtype != target.dtype:
                source = source.to(self._device, non_blocking=True)  # cast over there
            target.copy_(source, non_blocking=True)

    def mark(self) -> Any:
        event = self._torch.cuda.Event()
        event.record(self._stream)
        return event

    def end(self, target: Any) -> None:
        self._torch.cuda.current_stream(self._device).wait_stream(self._stream)
        target.record_stream(self._stream)

    def handover(self) -> Callable[[Any], None]:
        cuda = self._torch.cuda
        made_by, event = cuda.current_stream(self._device), cuda.Event()
        event.record(made_by)

        def wait(target: Any) -> None:
            stream = cuda.current_stream(self._device)
            if stream != made_by:
                stream.wait_event(event)
                if target.layout is self._torch.strided:
                    target.record_stream(stream)

        return wait


class Slot:
    """A buffer of a ring, and the mark of the last copy that left from it."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.mark: Any = None


class Ring:
    """Buffers that are used in turn, made when they are first needed and kept. Safe for concurrent use."""

    def __init__(self, nbytes: int = SLOT_NBYTES, count: int = SLOTS) -> None:
        self.nbytes = nbytes
        self._left = count  # to be made
        self._free: collections.deque[Slot] = collections.deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def slot(self, lane: Lane) -> Iterator[Slot]:
        """One that nobody uses, once the copies from it are done."""
        with self._changed:
            while not self._free and not self._left:
                self._changed.wait()
            is_new = not self._free or (self._left > 0 and not _is_done(self._free[0]))
            if is_new:
                self._left -= 1
            slot = None if is_new else self._free.popleft()
        try:
            if slot is None:
                slot = Slot(lane.buffer(self.nbytes))
            elif slot.mark is not None:
                slot.mark.synchronize()
                slot.mark = None
            yield slot
        finally:
            with self._changed:
                if slot is None:
                    self._left += 1
                else:
                    self._free.append(slot)
                self._changed.notify()


def _is_done(slot: Slot) -> bool:
    return slot.mark is None or slot.mark.query()


def send(lane: Lane, ring: Ring, read: Read, nbytes: int, given: Any, target: Any) -> None:
    """Elements of the dtype `given`, `nbytes` in all, into a flat tensor on the lane's device."""
    lane.begin()
    try:
        for start in range(0, nbytes, ring.nbytes):
            size = min(ring.nbytes, nbytes - start)
            with ring.slot(lane) as slot:
                read(start, memory_of(slot.tensor, size))
                first, count = start // given.itemsize, size // given.itemsize
                lane.copy(target[first : first + count], slot.tensor[:size].view(given))
                slot.mark = lane.mark()
    finally:
        lane.end(target)


class _Held:
    """What a process has of these."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lanes: dict[Any, Lane] = {}
        self.ring: Ring | None = None


_held = [_Held()]


def lane_of(torch: Any, device: Any) -> Lane | None:
    """The lane to a device, of which a process has one; None for a device without."""
    if device.type != "cuda":
        return None
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    held = _held[0]
    with held.lock:
        if device not in held.lanes:
            held.lanes[device] = CudaLane(torch, device)
        return held.lanes[device]


def ring_of() -> Ring:
    """The ring of this process."""
    held = _held[0]
    with held.lock:
        if held.ring is None:
            held.ring = Ring()
        return held.ring


def _forget() -> None:
    """In a forked child: the devices, and what is pinned for them, are the parent's."""
    _held[0] = _Held()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
