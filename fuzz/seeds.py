"""Seeds: small files that are right, or wrong in one way each, for every fuzzer to begin with.

    python fuzz/seeds.py FOLDER

writes FOLDER/directory and FOLDER/open (whole files) and FOLDER/machine (a byte of options, and a pickle).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import makers
from hostile import CORPUS, checkpoint, program

LARGEST = 16 << 10  # bytes: mutants of large seeds are slow and seldom new


def files() -> Iterator[bytes]:
    """Of the hostile corpus what is plain bytes, and good ones of every layout."""
    for module in ("archives", "programs", "tables", "streams"):
        importlib.import_module(f"hostile.{module}")
    records = makers.records_of(checkpoint(program()))
    yield checkpoint(program())
    yield makers.rezipped(records, method=makers.DEFLATED).data
    yield makers.rezipped(records, zip64=True).data
    yield makers.rezipped(records, descriptor=16).data
    for make in CORPUS.values():
        for attack in make():
            if isinstance(attack.content, bytes) and len(attack.content) <= LARGEST:
                yield attack.content


def pickle_of(file: bytes) -> bytes | None:
    try:
        with zipfile.ZipFile(io.BytesIO(file)) as opened:
            return opened.read("archive/data.pkl")
    except Exception:  # all that zipfile raises for hostile files
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Write what the fuzzers begin with.")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    for name in ("directory", "open", "machine"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for file in files():
        name = hashlib.sha256(file).hexdigest()[:16]
        (folder / "open" / name).write_bytes(file)
        (folder / "directory" / name).write_bytes(file)
        pickle = pickle_of(file)
        if pickle is not None and len(pickle) <= LARGEST:
            (folder / "machine" / name).write_bytes(b"\0" + pickle)


if __name__ == "__main__":
    main()
