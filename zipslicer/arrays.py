"""Arrays: NumPy values out of what NumPy's own pickling wrote, and the NumPy dtype of each dtype of torch.

Imports numpy on first use, and runs nothing of the file.

Only types whose bytes are their value are built (booleans, numbers, dates, fixed-width text, flat structures of these);
object arrays and everything else stay placeholders. Byte counts must be exact.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .policy import NOT_PLAIN, Meaning, Placeholder, describe, meaning_of

__all__ = ["CARRIERS", "array_dtype", "array_value", "floating_dtype"]

PLAIN_CODE = re.compile(r"(b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[SUV][0-9]{1,9}|[Mm]8)")
# dtypes of torch whose bytes NumPy has no numbers for, and what carries them: as many bytes, so that geometries hold.
CARRIERS = {
    "complex32": [("real", "float16"), ("imag", "float16")],
    "bcomplex32": [("real", "bfloat16"), ("imag", "bfloat16")],
    "float4_e2m1fn_x2": "u1",  # two elements in a byte, the first one in its low half; ml_dtypes has one in each
    "bits8": "u1",
    "bits16": "u2",
    "bits1x8": "u1",
    "bits2x4": "u1",
    "bits4x2": "u1",
    "qint8": "i1",
    "quint8": "u1",
    "qint32": "i4",
    "quint4x2": "u1",
    "quint2x4": "u1",
}
MAX_ITEMSIZE = 1 << 20  # bytes of one element; a fixed-width string is the largest there is


def array_dtype(name: str) -> Any:
    """The NumPy dtype of a dtype of torch, by its name there: numpy's own, that of ml_dtypes, or a carrier.

    Raises: ImportError where NumPy or ml_dtypes is missing, or too old.
    """
    np = _numpy()
    if name in CARRIERS:
        carrier = CARRIERS[name]
        return np.dtype(carrier if isinstance(carrier, str) else [(part, array_dtype(half)) for part, half in carrier])
    if name != "bfloat16" and not name.startswith("float8"):
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(f"NumPy has no {name}, the ml_dtypes package has: pip install ml_dtypes") from error
    made = getattr(ml_dtypes, name, None)
    if made is None:
        raise ImportError(f"ml_dtypes {ml_dtypes.__version__} has no {name}: pip install --upgrade ml_dtypes")
    return np.dtype(made)


def floating_dtype(given: Any) -> Any:
    """What the caller asks for as a dtype -> the floating-point NumPy dtype. Raises: ValueError, TypeError."""
    if type(given).__module__ == "torch":
        raise ValueError(f'with framework="np" dtype is a NumPy dtype, not {given!r}')
    # By its name, NumPy knows a dtype of ml_dtypes only once that is imported.
    is_named = isinstance(given, str) and given.startswith(("bfloat", "float8"))
    made = array_dtype(given) if is_named else _numpy().dtype(given)
    is_own = made.type.__module__ == "ml_dtypes" and made.name.startswith(("bfloat", "float"))
    if made.kind != "f" and not is_own:
        raise TypeError(f"dtype must be a floating-point NumPy dtype, not {made!r}")
    return made


def _numpy() -> Any:
    try:
        import numpy as np
    except ImportError as error:
        raise ImportError('framework="np" needs NumPy: pip install numpy') from error
    return np


def array_value(meaning: int, args: Sequence[Any], state: Any) -> Any:
    """A numpy.ndarray, numpy.dtype or NumPy scalar, or NOT_PLAIN."""
    try:
        import numpy as np
    except ImportError:
        return NOT_PLAIN
    if meaning == Meaning.NUMPY_DTYPE:
        return _dtype(np, args, state)
    if meaning == Meaning.NUMPY_SCALAR:
        return _scalar(np, args)
    if meaning == Meaning.NUMPY_ARRAY:
        return _array(np, args, state)
    if meaning == Meaning.NUMPY_BUFFER:
        return _from_buffer(np, args)
    return NOT_PLAIN


def _dtype(np: Any, args: Sequence[Any], state: Any) -> Any:
    """numpy.dtype(code, ...), then the state (version, order, subdtype, names, fields, itemsize, alignment, flags[, unit])."""
    if not args or type(args[0]) is not str or not PLAIN_CODE.fullmatch(args[0]):
        return NOT_PLAIN
    code = args[0]
    if code[0] in "SUV" and int(code[1:]) * (4 if code[0] == "U" else 1) > MAX_ITEMSIZE:
        return NOT_PLAIN
    if state is None:
        return np.dtype(code)
    if (
        type(state) is not tuple
        or len(state) < 8
        or type(state[1]) is not str
        or state[1] not in ("<", ">", "|", "=")
        or state[2] is not None
    ):
        return NOT_PLAIN
    names, fields = state[3], state[4]
    if names is not None:
        return _structure(np, code, names, fields)
    if code in ("M8", "m8"):
        unit = state[8][1] if len(state) > 8 and type(state[8]) is tuple and len(state[8]) == 2 else None
        if (
            type(unit) is not tuple
            or len(unit) != 4
            or type(unit[0]) is not bytes
            or any(type(n) is not int for n in unit[1:])
        ):
            return NOT_PLAIN
        if unit[0].decode("latin-1") not in (
            "Y",
            "M",
            "W",
            "D",
            "h",
            "m",
            "s",
            "ms",
            "us",
            "ns",
            "ps",
            "fs",
            "as",
            "generic",
        ):
            return NOT_PLAIN
        if unit[0] != b"generic":
            if unit[2:3] != (1,) or not 0 < unit[1] < 1 << 31:
                return NOT_PLAIN
            code = f"{code}[{unit[1]}{unit[0].decode('latin-1')}]"
    made = np.dtype(code)
    return made.newbyteorder(state[1]) if state[1] in "<>" else made


def _structure(np: Any, code: str, names: Any, fields: Any) -> Any:
    if code[0] != "V" or type(names) is not tuple or type(fields) is not dict or len(names) > 4096:
        return NOT_PLAIN
    formats, offsets, itemsize = [], [], int(code[1:])
    for name in names:
        field = fields.get(name) if type(name) is str else None
        if (
            type(field) is not tuple
            or len(field) < 2
            or not isinstance(field[0], np.dtype)
            or type(field[1]) is not int
        ):
            return NOT_PLAIN
        if field[0].names is not None or field[0].hasobject or not 0 <= field[1] <= itemsize - field[0].itemsize:
            return NOT_PLAIN
        formats.append(field[0])
        offsets.append(field[1])
    try:
        return np.dtype({"names": list(names), "formats": formats, "offsets": offsets, "itemsize": itemsize})
    except (TypeError, ValueError):
        return NOT_PLAIN


def _scalar(np: Any, args: Sequence[Any]) -> Any:
    """numpy._core.multiarray.scalar(dtype, bytes)."""
    if len(args) != 2 or not isinstance(args[0], np.dtype) or type(args[1]) is not bytes:
        return NOT_PLAIN
    made = _of_bytes(np, args[0], args[1], ())
    return NOT_PLAIN if made is NOT_PLAIN else made[()]


def _array(np: Any, args: Sequence[Any], state: Any) -> Any:
    """_reconstruct(numpy.ndarray, (0,), b"b"), then the state (1, shape, dtype, is_fortran, bytes)."""
    if len(args) != 3 or not _is_ndarray(args[0]) or type(state) is not tuple or len(state) != 5:
        return NOT_PLAIN
    _, shape, dtype, fortran, content = state
    if not isinstance(dtype, np.dtype) or type(content) is not bytes or type(fortran) is not bool:
        return NOT_PLAIN
    return _of_bytes(np, dtype, content, shape, "F" if fortran else "C")


def _from_buffer(np: Any, args: Sequence[Any]) -> Any:
    """_frombuffer(buffer, dtype, shape, order), as protocol 5 has it."""
    if (
        len(args) != 4
        or type(args[0]) not in (bytes, bytearray)
        or not isinstance(args[1], np.dtype)
        or type(args[3]) is not str
        or args[3] not in ("C", "F")
    ):
        return NOT_PLAIN
    return _of_bytes(np, args[1], bytes(args[0]), args[2], args[3])


def _is_ndarray(value: Any) -> bool:
    if type(value) is not Placeholder:
        return False
    about = describe(value)
    return meaning_of(about.module, about.name) == Meaning.NUMPY_NDARRAY and not about.called


def _of_bytes(np: Any, dtype: Any, content: bytes, shape: Any, order: str = "C") -> Any:
    if (
        dtype.hasobject
        or type(shape) is not tuple
        or any(type(n) is not int or n < 0 for n in shape)
        or len(shape) > 32
    ):
        return NOT_PLAIN
    count = 1
    for n in shape:
        count *= n
    if dtype.itemsize == 0 or count * dtype.itemsize != len(content):
        return NOT_PLAIN
    try:
        return np.frombuffer(bytearray(content), dtype=dtype).reshape(shape, order=order)
    except ValueError:  # nothing times more than NumPy can count
        return NOT_PLAIN
