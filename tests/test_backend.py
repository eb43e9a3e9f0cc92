"""Backend: one is chosen, whole, and by name. What the two do is in test_conformance.py and test_differential.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

import zipslicer
from zipslicer.backend import choose

BUILT = importlib.util.find_spec("zipslicer._native") is not None


def test_pure_is_always_there() -> None:
    assert choose("pure").name == "pure"


def test_auto_takes_native_where_it_was_built() -> None:
    assert choose("auto").name == ("native" if BUILT else "pure")


def test_native_is_never_replaced_in_silence() -> None:
    if BUILT:
        assert choose("native").name == "native"
    else:
        with pytest.raises(ImportError, match="ZIPSLICER_REQUIRE_NATIVE"):
            choose("native")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="native, pure or auto"):
        choose("numpy")


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIPSLICER_BACKEND", "pure")
    assert choose().name == "pure"


def test_backend_names_the_one_in_use() -> None:
    wanted = os.environ.get("ZIPSLICER_BACKEND") or "auto"
    assert zipslicer.backend() == choose(wanted).name


def test_a_native_module_that_does_not_load_raises() -> None:
    """A broken build must not look like a missing one."""
    code = (
        "import importlib.util, sys\n"
        "from zipslicer.backend import choose\n"
        "importlib.util.find_spec = lambda *_: 'one that is there'\n"
        "sys.modules['zipslicer._native'] = None  # what import takes for a module that cannot be had\n"
        "choose('auto')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "ModuleNotFoundError" in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_large_buffer_is_not_shared_with_a_child() -> None:
    """A mapping is private, or a forked worker would write into its parent's tensors."""
    for backend in [choose("pure"), *([choose("native")] if BUILT else [])]:
        view = memoryview(backend.allocate(3 << 20))
        view[0] = 1
        read, write = os.pipe()
        if os.fork() == 0:  # pragma: no cover
            view[0] = 2
            os.write(write, b"done")
            os._exit(0)
        assert os.read(read, 4) == b"done"
        os.wait()
        os.close(read)
        os.close(write)
        assert view[0] == 1
