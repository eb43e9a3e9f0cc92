"""The command line, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import zipslicer
from zipslicer.cli import main
from zipslicer.cli.terminal import clipped, size, table


def test_version_names_the_backend(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"{zipslicer.__version__} ({zipslicer.backend()})\n"


def test_help_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "usage: zipslicer" in capsys.readouterr().out


def test_an_unknown_option_is_an_error_of_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--none"])
    assert caught.value.code == 2
    assert "--none" in capsys.readouterr().err


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "zipslicer", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{zipslicer.__version__} ({zipslicer.backend()})\n")


def test_a_folder_of_several_checkpoints_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_bytes(b"")
    for command in ("check", "scan"):
        assert main([command, str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("zipslicer: the folder ")
        assert "a.pth, b.pth" in said


def test_ctrl_c_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["zipslicer.scan"], "scan", interrupted)  # the function has the name of its module
    assert main(["scan", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "zipslicer: interrupted\n"


# ---------------------------------------------------------------- files


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Written without torch: it need not be there."""
    path = tmp_path / "model.pth"
    with zipslicer.Writer(path) as w:
        for layer in range(3):
            group = w.group(f"layer{layer}")
            group.write_chunks("weight", [bytes(range(24)) * 2], dtype="float32", shape=(4, 3))
            group.write_chunks("bias", [bytes(8)], dtype="float16", shape=(4,))
        w["epoch"] = 3
    return path


def ran(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str, str]:
    status = main([str(each) for each in argv])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_ls(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = ran(capsys, "ls", model)
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split() == ["layer0.weight", "float32", "[4,", "3]", "48", "B"]
    assert lines[-1] == "6 tensors, 168 B: 3 float32 (144 B), 3 float16 (24 B)"
    assert len(lines) == 7
    _, out, _ = ran(capsys, "ls", model, "*.bias", "--sort", "name")
    assert [line.split()[0] for line in out.splitlines()[:-1]] == ["layer0.bias", "layer1.bias", "layer2.bias"]
    assert out.splitlines()[-1].startswith("3 of 6 tensors")
    _, out, _ = ran(capsys, "ls", model, "--sort", "size")
    assert out.splitlines()[3].split()[0] == "layer0.bias"
    _, out, _ = ran(capsys, "ls", model, "--sort", "dtype")
    assert out.splitlines()[0].split()[1] == "float16"
    _, out, _ = ran(capsys, "ls", model, "none*")
    assert out == "no tensors\n0 of 6 tensors, 0 B\n"


def test_ls_as_a_tree(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = ran(capsys, "ls", model, "--tree")
    assert [line.split() for line in out.splitlines()[:3]] == [
        ["layer0", "2", "tensors", "56", "B"],
        ["weight", "float32", "[4,", "3]", "48", "B"],
        ["bias", "float16", "[4]", "8", "B"],
    ]
    assert out.splitlines()[1].startswith("  weight")
    _, out, _ = ran(capsys, "ls", model, "--depth", "1")
    assert [line.split()[0] for line in out.splitlines()[:-1]] == ["layer0", "layer1", "layer2"]


def test_ls_as_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = ran(capsys, "ls", model, "--json", "--sort", "size")
    ((one),) = json.loads(out)
    assert one["path"] == str(model)
    assert one["tensors"][0] == {
        "name": "layer0.weight",
        "dtype_name": "float32",
        "shape": [4, 3],
        "strides": [3, 1],
        "storage_offset": 0,
        "nbytes": 48,
        "storage_key": "0",
        "storage_nbytes": 48,
        "layout": "strided",
        "location": "cpu",
        "requires_grad": False,
        "is_parameter": False,
        "class_name": None,
    }
    status, out, _ = ran(capsys, "ls", __file__, "--json")
    assert status == 3
    assert json.loads(out)[0]["verdict"] == "refused"


def test_what_shares_memory_and_what_was_not_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    base = torch.ones(4)
    torch.save({"a": base, "b": base[1:], "sparse": torch.eye(2).to_sparse(), "x": Path("x")}, tmp_path / "a.pt")
    _, out, _ = ran(capsys, "ls", tmp_path / "a.pt")
    lines = out.splitlines()
    assert lines[0].split()[-2:] == ["16", "B"]
    assert lines[1].endswith("12 B  shares a")
    assert lines[-1] == "1 objects of classes that were not built: zipslicer scan names them"


def test_a_narrow_terminal_cuts_names(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "34")
    _, out, _ = ran(capsys, "ls", model)
    assert max(map(len, out.splitlines()[:-1])) <= 34
    assert out.splitlines()[0].startswith("laye...ight ")
    assert clipped("abcdefghij", 7) == "ab...ij"
    assert clipped("abcdefghij", 10) == "abcdefghij"
    assert table([("a\x1b", "b")], "<<") == "a\\x1b  b"


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 1000, 12_345, 999_499, 999_500, 1_250_000_000, 10**13)] == [
        "0 B", "999 B", "1 kB", "12.3 kB", "999 kB", "1 MB", "1.25 GB", "10 TB",
    ]  # fmt: skip


def test_show(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("numpy")
    status, out, _ = ran(capsys, "show", model, "layer0.*")
    assert status == 0
    lines = out.splitlines()
    assert lines[:2] == ["layer0.weight", "  float32 [4, 3], 12 elements, 48 B, storage '0' of 48 B from element 0"]
    assert lines[2].startswith("  begins 3.82047e-37, ")
    assert lines[3].startswith("  min 3.82047e-37, max ")
    assert len([line for line in lines if "#" in line]) == 2  # the fullest bin, and that of the largest
    assert lines[-2:] == ["  min 0, max 0, mean 0, deviation 0, norm 0", "  of 4 elements 4 zeros"]
    assert max(map(len, lines)) <= 80
    _, out, _ = ran(capsys, "show", model, "layer0.bias", "--json")
    (one,) = json.loads(out)[0]["tensors"]
    assert one["values"]["layer0.bias"]["zeros"] == 4
    status, _, err = ran(capsys, "show", model, "layer0.bais")
    assert status == 2
    assert "near it: 'layer0.bias'" in err


def test_show_a_tensor_of_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    tree = {
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(3, device="meta"),
        "none": torch.empty(0),
        "one": torch.tensor(2.5),
        "grad": torch.ones(2, 3).t().requires_grad_(),
        "storage": torch.ones(2).untyped_storage(),
    }
    torch.save(tree, tmp_path / "a.pt")
    status, out, _ = ran(capsys, "show", tmp_path / "a.pt", "*")
    assert status == 0
    assert "sparse (indices): int64 [2, 3]" in out
    assert "sparse (values): float32 [3]" in out
    assert "  no elements" in out
    assert "  begins 2.5\n" in out
    assert "storage\n  uint8 [8]" in out
    assert "strides [1, 3]" in out
    assert "requires_grad" in out


def test_diff(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("numpy")
    other = tmp_path / "other.pth"
    with zipslicer.Writer(other) as w:
        group = w.group("layer0")
        group.write_chunks("weight", [bytes(range(24)) + bytes(24)], dtype="float32", shape=(4, 3))
        group.write_chunks("bias", [bytes(16)], dtype="float32", shape=(4,))
        w.group("layer1").write_chunks("weight", [bytes(48)], dtype="float32", shape=(3, 4))
    status, out, _ = ran(capsys, "diff", model, other)
    assert status == 1
    lines = out.splitlines()
    assert lines[0].startswith("~ layer0.weight  6 of 12 values differ, by ")
    assert lines[1:4] == [
        "~ layer0.bias  float16 [4] -> float32 [4], all 4 values equal",
        "~ layer1.weight  float32 [4, 3] -> float32 [3, 4]",
        "- layer1.bias  float16 [4]",
    ]
    assert lines[-1] == "6 differences, of 6 tensors and 3"
    assert max(map(len, lines)) <= 80
    status, out, _ = ran(capsys, "diff", model, model)
    assert (status, out) == (0, "no difference: all of 6 tensors\n")
    status, out, _ = ran(capsys, "diff", model, other, "layer0.weight", "--no-values")
    assert (status, out) == (0, "no difference: names, shapes and dtypes of 1 tensors\n")
    _, out, _ = ran(capsys, "diff", other, model, "*.bias", "--json")
    kinds = {each["name"]: each["kind"] for each in json.loads(out)[0]["differences"]}
    assert kinds == {"layer0.bias": "dtype", "layer1.bias": "added", "layer2.bias": "added"}


def test_convert_and_extract(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "out.safetensors"
    status, out, _ = ran(capsys, "convert", model, made, "--verify")
    assert status == 0
    assert out.splitlines() == [
        "wrote 6 tensors, 168 B, read again and equal", f"  {made}", "  left out, being no tensors: epoch",
    ]  # fmt: skip
    status, out, _ = ran(capsys, "extract", model, tmp_path / "one.pth", "layer1.*", "--strip", "layer1.", "--json")
    assert json.loads(out)[0]["tensors"] == 2
    assert list(zipslicer.load(tmp_path / "one.pth")) == ["weight", "bias"]
    status, out, _ = ran(capsys, "convert", model, tmp_path / "s.pth", "--max-shard-size", "60", "--keys", "*.weight")
    assert out.splitlines()[-1] == f"  {tmp_path / 's.pth.index.json'}"
    assert len(zipslicer.load(tmp_path / "s.pth.index.json")) == 3
    for argv, words in (
        (["convert", model, made, "--max-shard-size", "x"], "max_shard_size"),
        (["convert", model, made, "--dtype", "int8"], "floating-point"),
        (["extract", model, made, "nothing"], "not in this checkpoint"),
    ):
        status, _, err = ran(capsys, *argv)
        assert status == 2
        assert words in err
        assert err.count("\n") == 1
    status, _, err = ran(capsys, "convert", model, tmp_path / "none" / "a.pth")
    assert status == 4
    assert err.startswith("zipslicer: ")


def test_merge(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.pth"
    with zipslicer.Writer(other) as w:
        w.write_chunks("head", [bytes(4)], dtype="uint8", shape=(4,))
    status, out, _ = ran(capsys, "merge", model, other, tmp_path / "both.pth", "--verify", "--json")
    assert (status, json.loads(out)[0]["tensors"]) == (0, 7)
    status, _, err = ran(capsys, "merge", model, model, tmp_path / "twice.pth")
    assert (status, err.count("\n")) == (2, 1)
    status, out, _ = ran(capsys, "merge", model, __file__, tmp_path / "twice.pth")
    assert status == 3
    assert not (tmp_path / "twice.pth").exists()


def test_dtypes(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ml_dtypes")
    status, _, _ = ran(capsys, "convert", model, tmp_path / "half.pth", "--dtype", "bfloat16", "--verify")
    assert status == 0
    with zipslicer.open(tmp_path / "half.pth") as checkpoint:
        dtypes = {info.dtype_name for name in checkpoint.tensors if (info := checkpoint.tensors.get_meta(name))}
    assert dtypes == {"bfloat16"}


def test_a_list_needs_no_torch_and_a_closed_pipe_is_no_error(model: Path) -> None:
    code = "import sys; from zipslicer.cli import main; main(['ls', sys.argv[1]]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, model], check=True, capture_output=True, cwd="/")
    command = f"{sys.executable} -m zipslicer ls {model} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_shell_completes_words(tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    out = tmp_path / "words"
    line = "zipslicer convert a b --max"
    asked = {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_STDOUT_FILENAME": str(out),
    }
    command = [sys.executable, "-m", "zipslicer"]
    subprocess.run(command, env={**os.environ, **asked}, check=True, capture_output=True, cwd="/")
    assert out.read_text().split() == ["--max-shard-size"]


def test_a_bar_where_it_can_be_seen(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    asked: list[bool] = []

    def converts(*_: Any, progress: bool, **__: Any) -> Any:
        asked.append(progress)
        return zipslicer.Converted()

    monkeypatch.setattr("zipslicer.conversion.convert", converts)
    command = ["convert", str(model), str(tmp_path / "a.pth")]
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        main(command)
        main([*command, "--progress"])
        main([*command, "--no-progress"])
    assert asked == [False, True, False, True, True, False]


def test_show_of_what_has_no_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipslicer.Writer(tmp_path / "a.pth") as w:
        w.write_chunks("w", [bytes(4)], dtype="bits8", shape=(4,))
    assert ran(capsys, "show", tmp_path / "a.pth", "w")[:2] == (
        0, "w\n  bits8 [4], 4 elements, 4 B, storage '0' of 4 B from element 0\n",
    )  # fmt: skip


def test_diff_fits_a_terminal(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.pth"
    with zipslicer.Writer(other) as w:
        w.write_chunks("layer0.weight", [bytes(48)], dtype="float32", shape=(4, 3))
    monkeypatch.setenv("COLUMNS", "60")
    status, out, _ = ran(capsys, "diff", model, other, "layer0.weight")
    assert status == 1
    first, second, _ = out.splitlines()
    assert first == "~ layer0.weight"
    assert second.startswith("    12 of 12 values differ, by ")
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = ran(capsys, "diff", model, other, "layer0.weight")
    assert out.startswith("~ layer0.weight  ")
