"""atheris target: any bytes as a file, opened and read whole; on the backend of ZIPSLICER_BACKEND.

    python fuzz/fuzz_open.py FOLDER -max_total_time=60

Only the errors that the documentation names may come out of it. torch is not imported: tensors are arrays of NumPy.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["zipslicer"]):
    import zipslicer

LARGEST = 1 << 16  # elements that are read; of more a first one


def one_input(data: bytes) -> None:
    try:
        with zipslicer.open(data, framework="np") as checkpoint:
            repr(checkpoint), repr(checkpoint.root), repr(checkpoint.placeholders)
            for name in checkpoint.tensors:
                touch(checkpoint.tensors, name)
            checkpoint.verify(strict=False, threads=1)
    except zipslicer.ZipSlicerError as error:
        str(error)


def touch(tensors: zipslicer.LazyStateDict, name: str) -> None:
    try:
        info = tensors.get_meta(name)
        repr(info)
        if info.numel > LARGEST and not is_bare(tensors, name):
            tensors.get_slice(name)[tuple(slice(0, 1) for _ in info.shape)]
        else:
            tensors[name]
    except zipslicer.ZipSlicerError as error:
        str(error)


def is_bare(tensors: zipslicer.LazyStateDict, name: str) -> bool:
    """Whether it is a storage without a tensor, which has no slices: it is read whole, if its record is as large as it says."""
    try:
        tensors.get_slice(name)
    except TypeError as error:
        if "read it whole" not in str(error):
            raise
        return True
    return False


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
