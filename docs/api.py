"""Write docs/api.md: every public name of zipslicer, with its signature and what its docstring says, to be read in one sitting.

    python docs/api.py

The site shows the same names at greater length (hooks.py).
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
CONSTRUCTED = ("Limits", "Writer", "StorageReader")  # by users; what else there is comes out of a function
TOLD = (
    "__getitem__",
    "__setitem__",
    "__delitem__",
    "__len__",
    "__iter__",
    "__contains__",
    "__enter__",
    "__exit__",
    "__call__",
)
WIDTH = 100


def page() -> str:
    """The Markdown."""
    zipslicer = importlib.import_module("zipslicer")
    distributed = importlib.import_module("zipslicer.distributed")
    parts = [
        "# API",
        "Every public name, by `python docs/api.py`. [usage.md](usage.md) shows them at work.",
    ]
    groups = {
        "Functions": [name for name in zipslicer.__all__ if inspect.isfunction(getattr(zipslicer, name))],
        "Classes": [name for name in zipslicer.__all__ if _is_class(getattr(zipslicer, name), error=False)],
        "Errors": [name for name in zipslicer.__all__ if _is_class(getattr(zipslicer, name), error=True)],
    }
    for title, names in groups.items():
        parts.append(f"## {title}")
        for name in names:
            parts += _told(f"zipslicer.{name}", getattr(zipslicer, name))
    parts += ["## zipslicer.distributed", _doc(distributed)]
    for name in distributed.__all__:
        parts += _told(f"zipslicer.distributed.{name}", getattr(distributed, name))
    return "\n\n".join(part for part in parts if part) + "\n"


def _is_class(value: Any, error: bool) -> bool:
    return inspect.isclass(value) and issubclass(value, Exception) == error


def _told(name: str, value: Any) -> Iterator[str]:
    yield f"### {name}"
    short = name.rpartition(".")[2]
    if not inspect.isclass(value):
        yield f"```python\n{_signature(short, value)}\n```"
        yield _doc(value)
        return
    bases = [base.__name__ for base in value.__bases__ if base is not object and base.__name__ != "Lazy"]
    yield f"`class {short}({', '.join(bases)})`" if bases else f"`class {short}`"
    if short in CONSTRUCTED:
        yield f"```python\n{_signature(short, value)}\n```"
    yield _doc(value)
    lines = []
    for key, member in _members(value):
        if isinstance(member, property):
            lines.append(f"- `.{key}`: {_summary(member.fget)}")
        else:
            made = f"{short}.{key}" if isinstance(inspect.getattr_static(value, key), classmethod) else f".{key}"
            lines.append(
                f"- `{' '.join(_signature(made, getattr(value, key), is_method=True).split())}`: {_summary(member)}"
            )
    yield "\n".join(line.removesuffix(": ") for line in lines)


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    """What the class, or a base of ours that is not told of by itself, has for users, in the order of the source."""
    found: dict[str, Any] = {}
    public = importlib.import_module("zipslicer").__all__
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("zipslicer") and (base is cls or base.__name__ not in public):
            for key, member in vars(base).items():
                is_told = not key.startswith("_") or key in TOLD
                if is_told and (inspect.isroutine(member) or isinstance(member, property)):
                    found[key] = member
    yield from found.items()


def _signature(name: str, value: Any, is_method: bool = False) -> str:
    signature = inspect.signature(value)
    parameters = list(signature.parameters.values())
    if is_method and parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    text = f"{name}{signature.replace(parameters=parameters)}".replace("'", "").replace('"', "")
    for parameter in parameters:  # with the quotes of its default, but not those of its type
        if isinstance(parameter.default, str):
            text = text.replace(f"= {parameter.default}", f'= "{parameter.default}"')
    if is_method or len(text) <= WIDTH:
        return text
    inside, _, after = text.partition("(")[2].rpartition(")")
    arguments = [part for part in re.split(r", (?![^\[(]*[\])])", inside) if part]
    return f"{name}(\n" + "".join(f"    {argument},\n" for argument in arguments) + f"){after}"


def _doc(value: Any) -> str:
    text = inspect.cleandoc(value.__doc__ or "")
    return f"```text\n{text}\n```" if "\n" in text else text


def _summary(value: Any) -> str:
    return " ".join(inspect.cleandoc(value.__doc__ or "").partition("\n\n")[0].split())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(), encoding="utf-8")
