"""Scan: what the pickles of a file name, and what plain pickle would make of that. Runs nothing, and reads no tensor.

A scanner that understands a file differently than whoever loads it is worth nothing. So this one has no parser of its
own: it opens the container as `open` does, asks the same machine for the globals, and refuses what `open` refuses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping
from typing import Any

from .archive import Archive
from .backend import Backend, Dialect, Graph, Text, choose
from .checkpoint import open as open_checkpoint
from .dcp_metadata import KNOWN, METADATA, is_metadata, read_folder
from .errors import ArchiveError, UnsupportedError, ZipSlicerError
from .exports import CHECKPOINTS, any_archive
from .legacy import Legacy
from .opening import open_source
from .policy import Limits, actions, machine_limits
from .safetensors_file import is_safetensors
from .shards import locate, read_index
from .source import ByteSource, beside, read_at, without_secrets

__all__ = ["Finding", "Scan", "scan"]

PICKLES = (".pkl", ".pickle")  # the records that are run, by their names
KINDS = ("dangerous", "unknown", "known")  # the worst first
DEPTH = 3  # checkpoints within checkpoints that are looked into
CHAIN = 10_000  # plain pickles, one after the other
FEW = 1 << 16  # bytes of the next one that are tried first

# Modules and names whose call runs what it is given, starts a program, writes a file or reaches the network. The list
# only sets the tone: what is on it is "dangerous", any other stranger is "unknown", and both fail a scan.
DANGEROUS = frozenset((
    "os", "posix", "nt", "subprocess", "_posixsubprocess", "pty", "popen2", "commands", "shutil", "sys", "socket",
    "_socket", "ssl", "asyncio", "multiprocessing", "threading", "_thread", "ctypes", "_ctypes", "cffi", "mmap",
    "importlib", "imp", "zipimport", "pkgutil", "runpy", "code", "codeop", "pdb", "bdb", "profile", "cProfile",
    "trace", "timeit", "doctest", "idlelib", "lib2to3", "distutils", "setuptools", "pip", "ensurepip", "venv", "site",
    "webbrowser", "urllib", "urllib2", "http", "httplib", "requests", "aiohttp", "ftplib", "smtplib", "telnetlib",
    "xmlrpc", "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal",
    "inspect", "gc", "operator", "_operator", "signal", "atexit", "faulthandler", "logging", "tempfile",
    "io", "_io", "codecs", "linecache", "sqlite3", "uuid", "_osx_support", "_aix_support", "weakref", "unittest",
    "test",
))  # fmt: skip
BUILTINS = frozenset((
    "eval", "exec", "execfile", "compile", "__import__", "getattr", "setattr", "delattr", "globals", "locals", "vars",
    "open", "file", "input", "raw_input", "apply", "breakpoint", "exit", "quit", "memoryview", "map", "filter",
    "reduce", "type",
))  # fmt: skip
CALLERS = frozenset(  # of modules that are not dangerous as a whole
    {
        "functools.reduce",
        "types.CodeType",
        "types.FunctionType",
        "itertools.starmap",
        "numpy.load",
        "numpy.fromfile",
        "numpy.f2py.crackfortran.myeval",
        "numpy.testing._private.utils.runstring",
        "torch.load",
        "torch.serialization.load",
        "torch.storage._load_from_bytes",
        "torch.hub.load",
        "torch.jit.load",
        "torch.ops.load_library",
        "torch.classes.load_library",
        "torch.utils.cpp_extension.load",
        "torch.utils.cpp_extension.load_inline",
    }
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One global that a file names.

    Attributes:
        name: "module.name", as the file spells it.
        kind: "known" is what torch itself writes, and its policy knows: a tensor, a container, a dtype. "dangerous" is
            known to run code. "unknown" is all else: plain pickle would import that module, and call what it finds there.
        where: the records, or "" for a file that has none.
    """

    name: str
    kind: str
    where: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Scan:
    """What scan() has found in a file.

    Attributes:
        path: of the file; a URL without user, password and query.
        verdict: "safe": no stranger is named, so plain pickle would run nothing but torch's own constructors.
            "unknown" or "dangerous": see Finding, the worst one counts. "refused": zipslicer does not open the file.
        findings: all globals, the dangerous ones first.
        programs: the records that hold TorchScript code, which torch.jit.load runs.
        error: why the file was refused, or None.
    """

    path: str
    verdict: str
    findings: tuple[Finding, ...] = ()
    programs: tuple[str, ...] = ()
    error: ZipSlicerError | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": self.path,
            "verdict": self.verdict,
            "error": None if self.error is None else f"{type(self.error).__name__}: {self.error}",
            "globals": [dataclasses.asdict(finding) for finding in self.findings],
            "programs": list(self.programs),
        }


def scan(
    path: str | os.PathLike[str], *, limits: Limits | None = None, storage_options: Mapping[str, Any] | None = None
) -> Scan:
    """What a checkpoint's pickles name. All of them are run by the machine that `open` runs, and none by Python.

    Takes what `open` takes by path or URL (with `storage_options`), and plain pickles: a file that is not torch's is read as a
    chain of pickles.

    Raises:
        OSError: the system cannot open or read it. What is wrong with the file itself is `Scan.error`.
    """
    name = os.fspath(path)
    shown = without_secrets(name)
    scanning = _Scanning(choose(), limits or Limits(), storage_options)
    error: ZipSlicerError | None = None
    try:
        if scanning.file(name):
            open_checkpoint(name, limits=limits, storage_options=storage_options).close()
    except ZipSlicerError as refused:
        error = refused.located(path=shown)
    findings = scanning.findings()
    worst = findings[0].kind if findings else "known"
    verdict = "refused" if error is not None else {"known": "safe"}.get(worst, worst)
    return Scan(shown, verdict, findings, tuple(scanning.programs), error)


def kind_of(module: str, name: str) -> str:
    """Of a Finding."""
    if (module, name) in actions():
        return "known"
    top = module.partition(".")[0]
    if top in ("builtins", "__builtin__"):
        return "dangerous" if name.partition(".")[0] in BUILTINS else "unknown"
    return "dangerous" if top in DANGEROUS or f"{module}.{name}" in CALLERS else "unknown"


class _Scanning:
    """Walks the pickles of a file."""

    def __init__(self, backend: Backend, limits: Limits, storage_options: Mapping[str, Any] | None) -> None:
        self._backend = backend
        self._limits = limits
        self._storage_options = storage_options
        self._named: dict[tuple[str, str], dict[str, None]] = {}  # -> the records that name it
        self.programs: list[str] = []

    def findings(self) -> tuple[Finding, ...]:
        made = [
            Finding(
                f"{module}.{name}",
                "known" if (module, name) in KNOWN and [*where] == [METADATA] else kind_of(module, name),
                tuple(where),
            )
            for (module, name), where in self._named.items()
        ]
        return tuple(sorted(made, key=lambda finding: (KINDS.index(finding.kind), finding.name)))

    def file(self, path: str) -> bool:
        """Note all that a file names. False where it is a plain pickle, which `open` does not take."""
        found, is_index = locate(path)
        if not is_index and os.path.isdir(path):
            found, is_index = locate(path, is_folder=True)
        if is_metadata(str(os.fspath(found))):
            self._folder(os.fspath(found))
            return True
        if is_index:
            index = read_index(os.fspath(found), self._backend, self._limits, self._storage_options)
            for file in index.files:
                self._source(index.path_of(file), f"{file}/")
            return True
        return self._source(os.fspath(found), "")

    def _folder(self, path: str) -> None:
        """What torch.distributed.checkpoint wrote: its metadata, and every archive that this names."""
        with contextlib.closing(open_source(path, self._limits, self._storage_options)) as source:
            self._pickle(read_at(self._backend, source, 0, min(source.size, self._limits.program_nbytes)), METADATA)
        folder = read_folder(path, self._backend, self._limits, self._storage_options)
        for file, windows in itertools.groupby(folder.windows, lambda window: window.file):
            opened = open_source(beside(path, file), self._limits, self._storage_options)
            with contextlib.closing(opened) as source:
                for window in windows:
                    if window.offset + window.nbytes > source.size:
                        raise ArchiveError("the file ends before what the metadata says is in it", path=source.path)
                    archive = any_archive(source, self._backend, self._limits, window[1:])
                    self._archive(archive, f"{file}/{window.offset}/", DEPTH)

    def _source(self, path: str, before: str) -> bool:
        with contextlib.closing(open_source(path, self._limits, self._storage_options)) as source:
            if is_safetensors(source, self._backend):
                return True
            try:
                archive = any_archive(source, self._backend, self._limits)
            except ArchiveError:
                if not self._chain(source, before):
                    raise
                return False
            self._archive(archive, before, DEPTH)
            return True

    def _archive(self, archive: Archive, before: str, depth: int) -> None:
        if isinstance(archive, Legacy):
            try:
                archive.run("placeholder", {})
            finally:  # an error late in the file leaves what was named early
                self._note(archive.named, before.removesuffix("/"))
            return
        root = archive.root.decode("utf-8", "backslashreplace")
        for record, name in enumerate(archive.names()):
            below = name.removeprefix(root)
            if below.endswith(PICKLES):
                self._pickle(archive.text(record, self._limits.program_nbytes), before + name)
            elif below.endswith(".py") and below.startswith("code/"):
                self.programs.append(before + name)
            elif below.endswith(CHECKPOINTS) and depth:
                inner = any_archive(archive.source, self._backend, self._limits, archive.extent(record))
                self._archive(inner, f"{before}{name}/", depth - 1)

    def _chain(self, source: ByteSource, before: str) -> bool:
        """A file of plain pickles, one after the other. False where the first bytes are none."""
        nbytes = min(source.size - source.start, self._limits.program_nbytes)
        text = memoryview(read_at(self._backend, source, source.start, nbytes))
        at = count = 0
        with contextlib.suppress(ZipSlicerError):
            while at < len(text) and count < CHAIN:
                at += self._next(text[at:], before.removesuffix("/"))
                count += 1
        if count == CHAIN:
            raise UnsupportedError(f"more than {CHAIN} pickles follow each other", offset=source.start + at)
        return at > 0

    def _next(self, text: memoryview, where: str) -> int:
        """The first of many pickles: more bytes are tried for as long as it does not end in those that were."""
        nbytes = FEW
        while nbytes < len(text):
            with contextlib.suppress(ZipSlicerError):
                return self._pickle(bytes(text[:nbytes]), where)
            nbytes *= 16
        return self._pickle(bytes(text), where)

    def _pickle(self, text: Text, where: str) -> int:
        """Note what a pickle names -> how long it is."""
        graph = Graph(*self._backend.scan_pickle(text, actions(), machine_limits(self._limits, False, Dialect.ZIP)))
        self._note(graph.globals, where)
        return graph.nbytes

    def _note(self, names: Iterable[tuple[str, str]], where: str) -> None:
        for name in names:
            self._named.setdefault(name, {})[where] = None
