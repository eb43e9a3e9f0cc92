"""Every hostile file, on the backend of this run: no crash, hang, side effect or memory, and the error that it should be.

    python tests/hostile/test_hostile.py > tests/hostile/outcomes.json

writes down what comes of each file; its makers say what may.
"""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

pytest.importorskip("torch")

from makers import unmeasured

from hostile import CORPUS, PWNED, TRAP, Attack

MODULES = ("archives", "programs", "tables", "streams", "files")
for module in MODULES:
    importlib.import_module(f"hostile.{module}")

VICTIM = Path(__file__).with_name("victim.py")
OUTCOMES = Path(__file__).with_name("outcomes.json")
MEMORY = 256 << 20  # bytes beyond what the process has before the file is opened


class Victim:
    """The process that opens the files, started again where it died."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "trap").mkdir()
        (folder / "trap" / f"{TRAP}.py").write_text(f"import os\nos.mkdir({PWNED!r})\n")
        self.process: subprocess.Popen[str] | None = None

    def asked(self, path: Path, one: Attack) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None:
            paths = f"{VICTIM.parent.parent}:{self.folder / 'trap'}"
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", str(VICTIM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=self.folder,
                env={**unmeasured(), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            )
        stdin, stdout = _open(self.process.stdin), _open(self.process.stdout)
        stdin.write(json.dumps({"path": str(path), "holds": dict(one.holds), "unpacks": one.unpacks}) + "\n")
        stdin.flush()
        said = stdout.readline()
        assert said, f"the victim died outside of any file: {self.process.wait()}"
        answer: dict[str, Any] = json.loads(said)
        return answer

    def close(self) -> None:
        if self.process is not None:
            _open(self.process.stdin).close()
            _open(self.process.stdout).close()
            self.process.wait()


def _open(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    started = Victim(tmp_path_factory.mktemp("victim"))
    yield started
    started.close()


NUMBERS = itertools.count()


def result_of(victim: Victim, one: Attack) -> dict[str, Any]:
    folder = victim.folder / f"attack {next(NUMBERS)}"
    folder.mkdir()
    if callable(one.content):
        path = one.content(folder)
    else:
        path = folder / "x.pth"
        path.write_bytes(one.content)
    answer = victim.asked(path, one)
    assert not (victim.folder / PWNED).exists()
    return answer


def complaint(one: Attack, answer: dict[str, Any]) -> str:
    """Why an answer is not what it should be, or nothing."""
    if "died" in answer or "hung" in answer:
        return str(answer)
    if "trace" in answer:
        return str(answer["trace"])
    found = set(answer["outcomes"])
    if not found <= set(one.wanted):
        return f"came to {sorted(found)}, not to {sorted(one.wanted)}"
    if answer["events"]:
        return f"did {answer['events']}"
    if answer["growth"] > MEMORY:
        return f"took {answer['growth'] >> 20} MiB"
    return ""


@pytest.fixture(scope="module")
def known() -> dict[str, dict[str, list[str]]]:
    outcomes: dict[str, dict[str, list[str]]] = json.loads(OUTCOMES.read_text())
    assert outcomes.keys() == CORPUS.keys()
    return outcomes


@pytest.mark.parametrize("name", CORPUS)
def test_trick(name: str, victim: Victim, known: dict[str, dict[str, list[str]]]) -> None:
    complaints, outcomes = {}, {}
    for one in CORPUS[name]():
        answer = result_of(victim, one)
        outcomes[one.tag] = sorted(set(answer.get("outcomes", [])))
        why = complaint(one, answer)
        if why:
            complaints[one.tag] = why
    assert not complaints, "\n".join(f"{tag}: {why}" for tag, why in complaints.items())
    assert outcomes == known[name]


def test_the_corpus_is_large() -> None:
    assert len(CORPUS) > 80
    attacks = [one for make in CORPUS.values() for one in make()]
    assert len(attacks) > 300
    assert all(len({one.tag for one in make()}) == len(list(make())) for make in CORPUS.values())
    assert all(one.wanted for one in attacks)


def test_the_victim_is_watched(victim: Victim, tmp_path: Path) -> None:
    """The wires trip: a file that is opened beside, a wrong tensor, a tensor that is not there."""
    from hostile import RIGHT, attack, checkpoint, program

    assert complaint(attack("", b"", RIGHT), result_of(victim, attack("", checkpoint(program()), RIGHT))) == ""
    wrong = result_of(victim, attack("", checkpoint(program()), RIGHT, holds={"w": [1.0, 2.0, 3.0, 5.0]}))
    assert wrong["outcomes"] == ["wrong"]
    assert "no ['v']" in result_of(victim, attack("", checkpoint(program()), RIGHT, holds={"v": []}))["trace"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        victim = Victim(Path(folder))
        found = {
            name: {one.tag: sorted(set(result_of(victim, one)["outcomes"])) for one in make()}
            for name, make in CORPUS.items()
        }
        victim.close()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
