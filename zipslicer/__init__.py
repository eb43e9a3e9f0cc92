"""zipslicer: open any PyTorch checkpoint without loading it, and read only the tensors that are asked for.

sd = zipslicer.load("model.pth")        # reads the directory and data.pkl, no tensor
sd["layer3.0.weight"]                   # a torch.Tensor that owns its memory
sd.get_slice("lm_head.weight")[:100]    # these rows, and nothing else
"""

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .checkpoint import Checkpoint, backend, load, open
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
from .policy import Description, Limits, Placeholder, describe
from .scan import Finding, Scan, scan
from .state_dict import LazySequence, LazySlice, LazyStateDict
from .table import TensorInfo
from .verify import Verified

if TYPE_CHECKING:
    from .conversion import Converted, convert
    from .dropin import patch_torch_load, torch_load
    from .module import LoadReport
    from .writer import Group, Writer, save

__all__ = [
    "ArchiveError",
    "ChangedError",
    "Checkpoint",
    "CheckpointError",
    "Converted",
    "Description",
    "Finding",
    "Group",
    "LazySequence",
    "LazySlice",
    "LazyStateDict",
    "Limits",
    "LoadReport",
    "Placeholder",
    "ProgramError",
    "Scan",
    "TableError",
    "TensorInfo",
    "UnsafeError",
    "UnsupportedError",
    "Verified",
    "Writer",
    "ZipSlicerError",
    "__version__",
    "backend",
    "convert",
    "describe",
    "load",
    "open",
    "patch_torch_load",
    "save",
    "scan",
    "torch_load",
]

# Imported when they are first asked for: who lists a file should not wait for what writes one.
_LATE = {
    "Converted": "conversion",
    "Group": "writer",
    "LoadReport": "module",
    "Writer": "writer",
    "convert": "conversion",
    "patch_torch_load": "dropin",
    "save": "writer",
    "torch_load": "dropin",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    found = globals()[name] = getattr(importlib.import_module(f".{_LATE[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
