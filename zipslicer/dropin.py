"""Drop-ins: torch_load in the place of torch.load, and patch_torch_load to put it there for code that is not yours.

Side door: torch is imported when one of the two is called.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import io
import os
import pickle  # for the name of its error only
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .checkpoint import open as open_checkpoint
from .errors import (
    ArchiveError,
    ChangedError,
    CheckpointError,
    ProgramError,
    TableError,
    UnsafeError,
    UnsupportedError,
    ZipSlicerError,
)
from .legacy import Legacy
from .policy import Meaning, Placeholder, actions, describe, meaning_of
from .state_dict import View

__all__ = ["patch_torch_load", "torch_load"]

ZIP_MAGIC = b"PK\x03\x04"
EXPORT = "this is no file of torch.save; zipslicer.load reads its tensors"
SCRIPT = "this is a TorchScript archive, which is a program: torch.jit.load runs it, zipslicer.open lists its tensors"


def torch_load(
    f: Any,
    map_location: Any = None,
    pickle_module: Any = None,
    *,
    weights_only: bool | None = None,
    mmap: bool | None = None,
    **pickle_load_args: Any,
) -> Any:
    """What torch.load returns, with its arguments: plain containers and real tensors, read on threads.

    No code of the file is run, whatever `weights_only` says. Classes that were declared to torch.serialization
    (add_safe_globals, safe_globals) are built; a file with any other that zipslicer does not know is an UnsafeError.

    Args:
        f: a path, or a seekable binary file object, which is read from where it stands.
        map_location: as torch.load has it; None puts tensors where they were saved, or on the CPU, with a warning, where
            that device is missing (torch.load fails there).
        pickle_module: only None.
        weights_only: makes no difference.
        mmap: makes no difference: tensors own their memory.
        pickle_load_args: only encoding="utf-8" or "ascii".

    Raises:
        OSError, ValueError, TypeError: as zipslicer.load.
        ZipSlicerError: whatever zipslicer raises is pickle.UnpicklingError and RuntimeError as well here, so that code
            that catches what torch.load raises catches it.
    """
    return _load(f, map_location, pickle_module, weights_only=weights_only, mmap=mmap, lazy=False, **pickle_load_args)


class _Patch(NamedTuple):
    lazy: bool
    fallback: bool
    token: object


_LOCK = threading.Lock()
_PATCHES: list[_Patch] = []  # the last one counts
_BEFORE: list[tuple[Any, Any, Any]] = []  # (torch.load, torch.serialization.load, ours), while ours is in their place


@contextlib.contextmanager
def patch_torch_load(*, lazy: bool = False, fallback: bool = True) -> Iterator[None]:
    """Let torch.load be zipslicer.torch_load, within a `with` block or a decorated function, for libraries that call it.

    It holds for all threads of the process, until the last of several overlapping blocks ends; of these, the one that
    began last decides. A name that was bound before (``from torch import load``) stays what it was.

    Args:
        lazy: tensors of 64 KiB and more are read when they are used, each time they are used, so that code that walks,
            merges or copies a state dict never holds all of it. The file must stay as it is until then.
        fallback: hand to torch's own load what zipslicer leaves to it (legacy stream files in a file object,
            TorchScript, pickle_module, classes it does not know, ...), with the arguments as they are, and a warning.
            With weights_only=False that runs what is in the file, as the caller of torch.load has asked for. False makes
            these errors. A damaged file is an error in either case.
    """
    import torch

    patch = _Patch(lazy, fallback, object())
    with _LOCK:
        if not _BEFORE:
            ours = _in_place_of(torch.load)
            _BEFORE.append((torch.load, torch.serialization.load, ours))
            torch.load = torch.serialization.load = ours
        _PATCHES.append(patch)
    try:
        yield
    finally:
        with _LOCK:
            _PATCHES.remove(patch)
            if not _PATCHES:
                at_top, inside, ours = _BEFORE.pop()
                # Whoever has put something over ours since keeps it: without a patch, ours is the original.
                if torch.load is ours:
                    torch.load = at_top
                if torch.serialization.load is ours:
                    torch.serialization.load = inside


def _in_place_of(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        patches = _PATCHES[-1:]
        if not patches:
            return original(*args, **kwargs)
        try:
            return _load(*args, **kwargs, lazy=patches[0].lazy)
        except (UnsupportedError, UnsafeError) as error:
            if not patches[0].fallback:
                raise
            why = error
        warnings.warn(f"zipslicer leaves this file to torch.load: {why}", stacklevel=2)
        return original(*args, **kwargs)

    return load


def _load(
    f: Any,
    map_location: Any = None,
    pickle_module: Any = None,
    *,
    weights_only: bool | None = None,
    mmap: bool | None = None,
    lazy: bool,
    **pickle_load_args: Any,
) -> Any:
    del mmap, weights_only  # neither makes a difference
    lazy = lazy and isinstance(f, (str, os.PathLike))  # a file object may be closed by the time a tensor is used
    start = f.tell() if hasattr(f, "tell") else None
    try:
        _refuse_arguments(f, pickle_module, pickle_load_args)
        declared = _declared_safe()
        window = _window(f)
        checkpoint = open_checkpoint(f, unknown="error", allow=declared, window=window)
        view = checkpoint._view
        try:
            _refuse_exports(view, window[0] if window else 0)
            view.options = dataclasses.replace(view.options, map_location=_where(map_location, view))
            if lazy:
                from .deferred import build_deferred

                made = build_deferred(view)
            else:
                made = view.materialized([0])(0)
            _refuse_placeholders(made, view, declared)
        except BaseException:
            checkpoint.close()
            raise
        if not lazy:
            checkpoint.close()
        return made
    except UnsafeError as error:
        if error.global_name.startswith("__torch__."):
            raise _as_torch_has_it(UnsupportedError(SCRIPT, path=error.path)) from None
        name = error.global_name
        error.message = (
            f"the file names {name}, which zipslicer does not build; nothing of it was run. If you trust what it does with "
            "any arguments, declare it with torch.serialization.safe_globals; zipslicer.load has the rest of the file"
        )
        raise _as_torch_has_it(error) from None
    except ZipSlicerError as error:
        raise _as_torch_has_it(error) from None
    finally:
        if start is not None:
            f.seek(start)


# ---------------------------------------------------------------- what is left to torch.load


def _refuse_arguments(f: Any, pickle_module: Any, pickle_load_args: dict[str, Any]) -> None:
    import torch

    if pickle_module is not None:
        raise UnsupportedError("a pickle_module was given, and zipslicer does not unpickle")
    encoding = pickle_load_args.get("encoding", "utf-8")
    if set(pickle_load_args) - {"encoding"} or str(encoding).lower() not in ("utf-8", "utf8", "ascii"):
        given = ", ".join(f"{name}={value!r}" for name, value in pickle_load_args.items())
        raise UnsupportedError(f"arguments for pickle were given: {given}")
    local = getattr(torch.serialization, "_serialization_tls", None)
    if getattr(local, "skip_data", False) or torch._guards.detect_fake_mode() is not None:
        raise UnsupportedError("tensors without data are wanted (FakeTensorMode or torch.serialization.skip_data)")
    if isinstance(f, (str, os.PathLike)):
        if os.path.isdir(f):
            raise IsADirectoryError(21, "is a directory; torch.load reads one file", os.fspath(f))
        if str(os.fspath(f)).endswith((".safetensors", ".json")):
            raise UnsupportedError("torch.load reads files of torch.save; zipslicer.load takes others as well")


def _window(f: Any) -> tuple[int, int] | None:
    """torch.load reads a file object from where it stands. Leaves it at its first byte."""
    if not hasattr(f, "seek") or not hasattr(f, "read"):
        return None
    start = f.tell()
    magic = f.read(len(ZIP_MAGIC))
    nbytes = f.seek(0, io.SEEK_END) - start
    f.seek(0)
    if magic != ZIP_MAGIC:
        # Several objects may follow one another there, and torch.load stops behind the one that it has read.
        raise UnsupportedError("this file object holds no ZIP archive; a legacy file is read by its path")
    return (start, nbytes) if start else None


def _refuse_exports(view: View, start: int) -> None:
    """Archives of TorchScript, torch.export and torch.package, also where they hold one of torch.save in a record."""
    archive = view.table.archive
    main, constants = archive.find(["data.pkl", "constants.pkl"])
    if constants >= 0:
        raise UnsupportedError(SCRIPT, path=archive.source.path)
    if (main < 0 and not isinstance(archive, Legacy)) or archive.base != start:
        raise UnsupportedError(EXPORT, path=archive.source.path)


def _refuse_placeholders(root: Any, view: View, declared: dict[str, Any]) -> None:
    """What has no class of its own in the result: a caller of torch.load does not expect a Placeholder."""
    import torch

    with_attributes = (
        torch.Tensor,
        collections.OrderedDict,
        *(made for made in declared.values() if isinstance(made, type)),
    )
    todo, seen = [root], set()
    while todo:
        value = todo.pop()
        if type(value) is Placeholder:
            name = describe(value).qualified
            raise UnsafeError("", global_name=name, path=view.table.archive.source.path)
        if id(value) in seen:
            continue
        if isinstance(value, (dict, list, tuple, set, frozenset)):
            seen.add(id(value))
            todo += value
            todo += value.values() if isinstance(value, dict) else ()
        if isinstance(value, with_attributes) and not hasattr(value, "_zipslicer"):
            seen.add(id(value))
            todo += getattr(value, "__dict__", {}).values()


# ---------------------------------------------------------------- what torch.load was told


def _declared_safe() -> dict[str, Any]:
    """The classes that the user has declared to torch, by dotted name, but for those whose meaning policy knows."""
    import torch

    found: dict[str, Any] = {}
    for declared in getattr(torch.serialization, "get_safe_globals", list)():
        made, name = declared if isinstance(declared, tuple) else (declared, "")
        name = name or f"{made.__module__}.{made.__qualname__}"
        module, _, last = name.rpartition(".")
        if meaning_of(module, last) == Meaning.STRANGER and (module, last) not in actions():
            found[name] = made
    return found


def _where(map_location: Any, view: View) -> Any:
    """map_location as torch.load has it -> as zipslicer has it, which has ways of its own to the CPU and to CUDA devices."""
    import torch

    locations = set(view.program.locations)
    if isinstance(map_location, (str, torch.device)):
        if torch.device(map_location).type in ("cpu", "meta") or _is_cuda_here(map_location):
            return map_location
    elif map_location is None or isinstance(map_location, dict):
        chosen = {location: (map_location or {}).get(location, location) for location in locations}
        if all(where == "cpu" for where in chosen.values()):
            return "cpu"
        if all(where == "cpu" or _is_cuda_here(where) for where in chosen.values()):
            return chosen
    restore = torch.serialization._get_restore_location(map_location)  # type: ignore[no-untyped-call]
    if map_location is not None:
        return restore
    missing: set[str] = set()

    def saved(storage: Any, location: str) -> Any:
        try:
            return restore(storage, location)
        except RuntimeError:
            if location not in missing:
                missing.add(location)
                warnings.warn(f"the file names {location!r}, which is not here: on the CPU instead", stacklevel=2)
            return storage

    return saved


def _is_cuda_here(where: Any) -> bool:
    """Whether it names a CUDA device that this machine has."""
    import torch

    name = str(where)
    if not name.startswith("cuda") or not torch.cuda.is_available():
        return False
    try:
        return (torch.device(name).index or 0) < torch.cuda.device_count()
    except RuntimeError:
        return False


# ---------------------------------------------------------------- errors


def _as_torch_has_it(error: ZipSlicerError) -> ZipSlicerError:
    """The same error, of a class that code around torch.load catches too."""
    made = _TWINS[type(error)](error.message)
    made.__dict__.update(error.__dict__)
    return made


def _twin(cls: type[ZipSlicerError]) -> type[ZipSlicerError]:
    def reduce(self: Any) -> tuple[Any, ...]:
        plain = cls(self.message)
        plain.__dict__.update(self.__dict__)
        return _as_torch_has_it, (plain,)

    body = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__reduce__": reduce}
    return type(cls.__name__, (cls, pickle.UnpicklingError, RuntimeError), body)


_TWINS = {
    cls: _twin(cls)
    for cls in (
        ZipSlicerError, CheckpointError, ArchiveError, ProgramError, TableError, ChangedError, UnsafeError, UnsupportedError
    )
}  # fmt: skip
