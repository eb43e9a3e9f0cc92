"""Lazy: what the containers of state_dict.py are to the modules that they use, and how values look in a line of text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from .policy import Placeholder
from .table import TensorInfo

__all__ = ["WIDTH", "Lazy", "materialize", "size_text", "summary"]

WIDTH = 100  # characters of a value in one line


class Lazy(ABC):
    """A container that reads what is touched: LazyStateDict and LazySequence, known by this to what lies below them."""

    __slots__ = ()

    @abstractmethod
    def get_meta(self, key: Any, /) -> TensorInfo | None:
        """Facts of a tensor, without reading it; None for what is none."""

    @abstractmethod
    def materialize(self, *, progress: bool = False) -> Any:
        """The plain container, all of it read."""

    @abstractmethod
    def __len__(self) -> int: ...


def materialize(value: Any) -> Any:
    """A value as it is without laziness."""
    return value.materialize() if isinstance(value, Lazy) else value


def size_text(nbytes: int) -> str:
    """In three digits: "1.25 GB"."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def summary(value: Any, *, quoted: bool = True) -> str:
    """A value in one short line, whatever its size."""
    if isinstance(value, (Lazy, Mapping, list, set, frozenset)):
        return f"{type(value).__name__} of {len(value)}"
    if type(value) is tuple:
        text = f"({', '.join(map(repr, value))})" if _is_small(value) else f"tuple of {len(value)}"
    elif isinstance(value, (str, bytes, bytearray)):
        text = value[: WIDTH + 1] if isinstance(value, str) and not quoted else repr(value[:WIDTH])
    else:
        try:
            text = repr(value)
        except ValueError:  # Python prints no integer of more than 4300 digits
            text = f"<large {type(value).__name__}>"
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def _is_small(values: tuple[Any, ...]) -> bool:
    """Whether the text of a tuple is short enough to be made and cut."""
    plain = all(v is None or isinstance(v, (bool, float, Placeholder)) or type(v) in (str, int) for v in values)
    return (
        plain
        and len(values) <= 8
        and all(not isinstance(v, str) or len(v) <= WIDTH for v in values)
        and all(type(v) is not int or abs(v) < 1 << 64 for v in values)
    )
