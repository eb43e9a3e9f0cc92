"""Victim: opens hostile files and does with them what users do; each in a process that may die of it.

    python victim.py < LINES

A line of JSON is {"path": ..., "holds": {name: nested lists}, "unpacks": ...}, and one comes back for each:
{"outcomes": [...], "events": [...], "growth": bytes, "trace": ...}, or {"died": signal}, or {"hung": seconds}. The file is
opened in a fork of this process, whose imports are done and which has opened good files already: whatever else it
imports, opens, starts or writes is an event that the file caused. The fork may take MEMORY more than this process has,
and SECONDS.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import hashlib
import io
import json
import os
import pickle
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import zipslicer
from hostile import TRAP, checkpoint, program

MEMORY = 256 << 20  # bytes
SECONDS = 20  # a machine that is busy with other tests is three times as slow as one that is not
IS_SANITIZED = "ZIPSLICER_SANITIZED" in os.environ  # then memory is not counted: the sanitizer has its own
LARGEST = 1 << 20  # elements that are looked at; a view of terabytes is only described

# What opening a file, reading it and looking at the result may do: read that file, and map memory to read into.
HARMLESS = {
    "array.__new__",
    "builtins.id",
    "mmap.__new__",
    "ctypes.addressof",
    "ctypes.cdata",
    "ctypes.cdata/buffer",
    "object.__getattr__",
    "pickle.find_class",  # of the errors that look_at pickles
}
READING = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_LARGEFILE", 0)


class Watch:
    """An audit hook that writes down what happens while it is on."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.folder = ""
        self.path = ""
        self.unpacks = False
        self.on = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and event not in HARMLESS and not self._is_reading(event, args):
            self.on = False  # what follows writes it down
            self.events.append(f"{event} {args!r:.200}")
            self.on = True

    def _is_reading(self, event: str, args: tuple[Any, ...]) -> bool:
        if event in ("_thread.start_new_thread", "_thread.start_joinable_thread"):  # heard from Python 3.12 on
            return "ThreadPoolExecutor" in repr(args[0])  # files of an index are opened by several threads
        if event == "os.listdir" or event == "os.scandir":
            return bool(args[0] == self.path)
        if event != "open":
            return False
        path, _, flags = args
        is_its_own = isinstance(path, int) or str(path).startswith(self.folder) or path == self.path
        is_temporary = self.unpacks and path == tempfile.gettempdir()  # a file without a name, or the look for one
        return bool(is_temporary or (is_its_own and not flags & ~READING))


def state_of_the_process() -> dict[str, Any]:
    """What no file may change."""
    return {
        "folder": str(Path.cwd()),
        "environment": dict(os.environ),
        "modules": sorted(sys.modules),
        "path": list(sys.path),
        "recursion": sys.getrecursionlimit(),
        "digits": sys.get_int_max_str_digits(),
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "descriptors": sorted(os.listdir("/proc/self/fd")),
        "signals": [str(signal.getsignal(one)) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
        "hook": (str(sys.excepthook), str(sys.displayhook)),
    }


def is_printable(shown: str) -> bool:
    return len(shown) <= 4096 and all(c.isprintable() for c in shown)


def look_at(error: BaseException) -> str:
    """The class of an error that may reach users, who log it, and send it between processes."""
    shown = str(error)
    assert is_printable(shown) or not isinstance(error, zipslicer.ZipSlicerError), f"the message {shown[:200]!r}"
    if isinstance(error, zipslicer.ZipSlicerError):
        assert str(pickle.loads(pickle.dumps(error))) == shown
        assert "weights_only=False" not in shown
    return type(error).__name__


def look_into(root: Any) -> None:
    """Show, compare, hash and copy what opening gave: whoever has a placeholder may do all that, and nothing else happens."""
    seen: set[int] = set()
    waiting = [root]
    kept = []  # so that no address is used twice
    while waiting and len(seen) < 3000:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        kept.append(value)
        if isinstance(value, zipslicer.Placeholder):
            look_at_placeholder(value)
            about = zipslicer.describe(value)
            waiting += [about.args, about.kwargs, about.state, about.attributes, about.list_items, about.items]
        elif type(value) in (list, tuple, set, frozenset):
            waiting += list(value)[:500]
        elif isinstance(value, dict):
            waiting += [*list(value)[:500], *list(value.values())[:500]]
        else:
            assert not callable(value) or value in FACTORIES, f"a live callable: {value!r:.200}"


FACTORIES = (list, dict, int, float, str, bool, set)  # of a defaultdict


def look_at_placeholder(value: Any) -> None:
    other = object()
    checks = {
        "repr": is_printable(repr(value)),
        "str": is_printable(f"{value}"),
        "equality": (value == other, value == 1, value != value.__class__) == (False, False, True),
        "hash": hash(value) == hash(value),
        "truth": bool(value),
        "copy": copy.copy(value) is value and copy.deepcopy(value) is value,
        "class": type(value) is zipslicer.Placeholder,
        "call": not callable(value),
        "pickle": is_refused(lambda: pickle.dumps(value)),
        "iter": is_refused(lambda: iter(value)),
        "len": is_refused(lambda: len(value)),
        "attribute": not hasattr(value, "nobody_has_this"),
        "dir": all(type(name) is str for name in dir(value)),
        "description": is_printable(repr(zipslicer.describe(value))),
    }
    assert all(checks.values()), [name for name, holds in checks.items() if not holds]


def is_refused(act: Callable[[], object]) -> bool:
    try:
        act()
    except TypeError:
        return True
    return False


def touch(mapping: Any, name: str, holds: dict[str, Any]) -> str:
    try:
        about = mapping.get_meta(name)
        repr(about)
        if about.numel > LARGEST:
            part = mapping.get_slice(name)
            part[tuple(slice(0, 1) for _ in about.shape)]
            return "described"
        got = mapping[name]
    except (zipslicer.ZipSlicerError, OSError) as error:
        return look_at(error) if isinstance(error, OSError) or error.key is not None else f"no key: {error}"
    if not isinstance(got, torch.Tensor):
        return "right" if name not in holds else "wrong"
    dense = got.to_dense() if got.layout != torch.strided or got.is_sparse else got
    if got.is_quantized:
        dense = got.dequantize()
    if got.is_nested:
        dense = torch.cat([one.reshape(-1) for one in got.unbind()])
    if got.is_meta:
        return "right"
    repr(dense.flatten()[:10])
    return "right" if name not in holds or dense.tolist() == holds[name] else "wrong"


def exercise(path: str, holds: dict[str, Any]) -> list[str]:
    """All that users do with a file; a list of what came of it."""
    try:
        strict = zipslicer.open(path, unknown="error")
    except (zipslicer.ZipSlicerError, OSError) as error:
        look_at(error)
    else:
        strict.close()
    try:
        opened = zipslicer.open(path)
    except (zipslicer.ZipSlicerError, OSError) as error:
        return [look_at(error)]
    with opened:
        assert is_printable(repr(opened)[:4000])
        try:
            names, root = list(opened.tensors), opened.root
        except zipslicer.ZipSlicerError as error:  # what is no tensor, where one is named or is all there is
            return [look_at(error)]
        assert holds.keys() <= set(names), f"no {sorted(holds.keys() - set(names))!r:.200}"
        assert len(opened.tensors) == len(names) == len(set(names))
        repr(opened.tensors)
        look_into(root)
        repr(opened.placeholders)
        outcomes = [touch(opened.tensors, name, holds) for name in names]
        again = [touch(opened.tensors, name, holds) for name in names]
        assert outcomes == again, f"first {outcomes}, then {again}"
        together = materialized(opened) if "described" not in outcomes else outcomes[0]
        assert together in outcomes or together == "nothing raised", f"first {outcomes}, together {together}"
        assert (together == "nothing raised") <= (set(outcomes) <= {"right", "wrong"}), (
            f"materialize() passes {outcomes}"
        )
        write_again(opened, names, outcomes, holds)
    del root, opened
    return outcomes or ["inert"]


def write_again(opened: Any, names: list[str], outcomes: list[str], holds: dict[str, Any]) -> None:
    """Save what was opened: as it is, and as a selection. What could be read is in the new file, and nothing else."""
    sink = io.BytesIO()
    try:
        zipslicer.save(opened, sink)
    except (zipslicer.ZipSlicerError, OSError) as error:
        look_at(error)
    else:
        with zipslicer.open(sink.getvalue()) as again:
            look_into(again.root)
            held = dict(zip(again.tensors, [touch(again.tensors, name, holds) for name in again.tensors]))
            assert list(held) == names, f"the names {list(held)!r:.200}, not {names!r:.200}"
            assert list(held.values()) == outcomes, f"first {outcomes}, written again {list(held.values())}"
    right = [name for name, outcome in zip(names, outcomes) if outcome == "right"]
    with contextlib.suppress(zipslicer.UnsupportedError):
        sink = io.BytesIO()
        zipslicer.save(opened.tensors.select(*right), sink)
        with zipslicer.open(sink.getvalue()) as again:
            assert [touch(again.tensors, name, holds) for name in right] == ["right"] * len(right)


def materialized(opened: Any) -> str:
    try:
        opened.tensors.materialize()
    except (zipslicer.ZipSlicerError, OSError) as error:
        return look_at(error)
    return "nothing raised"


def memory() -> tuple[int, int]:
    """(resident, its peak) in bytes."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmRSS"].split()[0]) << 10, int(rows["VmHWM"].split()[0]) << 10


def attacked(path: str, holds: dict[str, Any], unpacks: bool, watch: Watch) -> dict[str, Any]:
    """In the fork."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    if not IS_SANITIZED:
        resource.setrlimit(resource.RLIMIT_DATA, ((int(rows["VmData"].split()[0]) << 10) + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before, start = state_of_the_process(), memory()[0]
    watch.unpacks, watch.path, watch.folder = unpacks, path, os.path.dirname(path) + "/"
    answer: dict[str, Any] = {}
    watch.on = True
    try:
        answer["outcomes"] = exercise(path, holds)
    except BaseException:
        watch.on = False
        answer["trace"] = traceback.format_exc()[-4000:]
    watch.on = False
    answer["growth"] = 0 if IS_SANITIZED else memory()[1] - start
    after = state_of_the_process()
    watch.events += [
        f"{name} was {before[name]!r:.300} and is {after[name]!r:.300}"
        for name in before
        if before[name] != after[name]
    ]
    return {**answer, "events": watch.events}


def forked(asked: dict[str, Any], watch: Watch) -> dict[str, Any]:
    reader, writer = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            os.dup2(2, 1)  # nothing of the file reaches who reads our lines
            content = json.dumps(attacked(asked["path"], asked["holds"], asked["unpacks"], watch)).encode(
                "utf-8", "surrogatepass"
            )
            while content:
                content = content[os.write(writer, content) :]
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    said = b""
    patience = 10 * SECONDS if IS_SANITIZED else SECONDS
    while time.monotonic() - started < patience:
        if select.select([reader], [], [], 1)[0]:
            piece = os.read(reader, 1 << 16)
            if not piece:
                break
            said += piece
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if time.monotonic() - started >= patience:
        return {"hung": patience}
    if status or not said:
        return {
            "died": os.WTERMSIG(status) if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}",
            "said": said.decode()[:500],
        }
    return dict(json.loads(said))


def meta(pickle: Any) -> object:
    pickle.name("torch._utils", "_rebuild_meta_tensor_no_storage").mark().name("torch", "float32")
    return pickle.integers([4]).integers([1]).boolean(False).raw(b"tR")


def warm_up(folder: Path) -> None:
    """All that a good file makes us import is imported."""
    good, broken, safe = folder / "good.pth", folder / "broken.pth", folder / "good.safetensors"
    good.write_bytes(checkpoint(program()))
    broken.write_bytes(b"PK\3\4")
    text = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    safe.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with contextlib.suppress(zipslicer.ZipSlicerError):
        exercise(str(broken), {})
    assert exercise(str(good), {"w": [1.0, 2.0, 3.0, 4.0]}) == ["right"]
    assert exercise(str(safe), {"w": [0.0] * 4}) == ["right"]
    packed = folder / "packed.pth"
    packed.write_bytes(gzip.compress(good.read_bytes()))
    assert exercise(str(packed), {"w": [1.0, 2.0, 3.0, 4.0]}) == ["right"]
    zipslicer.save({"large": torch.zeros(1 << 20)}, io.BytesIO())  # on a second thread
    with zipslicer.open(checkpoint(program(x=meta))) as opened:
        repr(opened.tensors["x"]), repr(opened.tensors.get_slice("x")[0:1]), repr(opened.tensors.get_meta("x"))
    repr(torch.arange(3.0)), repr(torch.zeros(0)), hashlib.sha256(), io.BytesIO()


def main() -> None:
    assert TRAP not in sys.modules
    folder = Path.cwd()
    warm_up(folder)
    watch = Watch()
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(forked(asked, watch)), flush=True)


if __name__ == "__main__":
    main()
