"""Checkpoints behind URLs: what is asked of a server, what comes of it, and what when it fails."""

from __future__ import annotations

import functools
import gzip
import io
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

from range_server import Server, serving  # noqa: E402

import zipslicer  # noqa: E402
from zipslicer import remote  # noqa: E402
from zipslicer.errors import ArchiveError, ChangedError, UnsupportedError  # noqa: E402
from zipslicer.remote import BLOCK, PART, REQUESTS, RemoteFile  # noqa: E402

LAYERS, ROWS = 24, 160


def tensors() -> dict[str, Any]:
    """25 MB, in which a wrong byte would show."""
    torch.manual_seed(1)
    made = {}
    for layer in range(LAYERS):
        made[f"layer{layer}.weight"] = torch.randn(ROWS, 1600)
        made[f"layer{layer}.bias"] = torch.randn(1600).half()
    made["tied"] = made["layer0.weight"]
    return made


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def wanted() -> dict[str, Any]:
    return tensors()


@pytest.fixture(scope="module")
def content(wanted: dict[str, Any]) -> bytes:
    return saved(wanted)


@pytest.fixture
def server(content: bytes) -> Iterator[Server]:
    with serving() as made:
        made.objects["/dir/model.pth"] = content
        yield made


STORES = ["obstore", "http"]


@pytest.fixture(params=STORES)
def url(server: Server, request: pytest.FixtureRequest) -> str:
    """That of the model; with a query, which a signature might be, obstore is not asked."""
    if request.param == "obstore":
        pytest.importorskip("obstore")
    return f"{server.url}/dir/model.pth{'' if request.param == 'obstore' else '?signature=s3cr3t'}"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)


def answer(kind: Any, _number: int) -> Any:
    """A fault that is always the same."""
    return kind


def same(found: Any, wanted: dict[str, Any]) -> bool:
    return list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


# ---------------------------------------------------------------- what is asked of a server


def test_a_listing_is_two_requests(server: Server, url: str, wanted: dict[str, Any]) -> None:
    with zipslicer.load(url) as sd:
        assert {name: tuple(sd.get_meta(name).shape) for name in sd} == {n: tuple(t.shape) for n, t in wanted.items()}
        assert len(server.log) == 2
        assert server.nbytes == 2 * BLOCK
        assert type(sd._view.table.archive.source._store).__name__.lower() == ("http" if "?" in url else "obstore")


@pytest.mark.parametrize("framework", ["pt", "np"])
def test_all_of_it(server: Server, url: str, wanted: dict[str, Any], content: bytes, framework: str) -> None:
    if framework == "np":
        pytest.importorskip("ml_dtypes")
    with zipslicer.load(url, framework=framework) as sd:
        server.log.clear()
        made = sd.materialize()
        assert same({name: torch.as_tensor(each) for name, each in made.items()}, wanted)
        assert server.nbytes <= len(content)
        assert len(server.log) <= len(content) // PART + 2


def test_a_layer_costs_its_bytes(server: Server, url: str, wanted: dict[str, Any]) -> None:
    with zipslicer.load(url) as sd:
        server.log.clear()
        layer = sd.select("layer7.*").materialize()
        assert torch.equal(layer["layer7.weight"], wanted["layer7.weight"])
        assert len(server.log) == 1
        assert server.nbytes <= 1.05 * sum(tensor.nbytes for tensor in layer.values())


def test_a_tensor_is_one_request(server: Server, url: str, wanted: dict[str, Any]) -> None:
    with zipslicer.load(url) as sd:
        for name in ("layer9.weight", "layer9.bias"):
            server.log.clear()
            assert torch.equal(sd[name], wanted[name])
            assert len(server.log) == 1
            assert server.nbytes <= wanted[name].nbytes + 512


def test_a_slice_costs_its_rows(server: Server, url: str, wanted: dict[str, Any]) -> None:
    with zipslicer.load(url) as sd:
        part = sd.get_slice("layer5.weight")
        server.log.clear()
        assert torch.equal(part[100:110], wanted["layer5.weight"][100:110])
        assert len(server.log) == 2  # the record's own header, and the rows
        assert server.nbytes <= 10 * 1600 * 4 + 512
        server.log.clear()
        assert torch.equal(part[10:150:70, 8:16], wanted["layer5.weight"][10:150:70, 8:16])
        assert len(server.log) == 2
        assert server.nbytes == 2 * 8 * 4


def test_requests_run_side_by_side_and_are_bounded(
    server: Server, url: str, wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PART", 256 << 10)
    monkeypatch.setattr(remote, "REQUESTS", 6)
    server.fault = lambda number: "slow" if number > 1 else None
    fetch, lock, counts = RemoteFile._fetch, threading.Lock(), [0, 0]

    def counted(self: RemoteFile, start: int, end: int) -> Any:
        with lock:
            counts[0] += 1
            counts[1] = max(counts)
        try:
            return fetch(self, start, end)
        finally:
            with lock:
                counts[0] -= 1

    monkeypatch.setattr(RemoteFile, "_fetch", counted)
    with zipslicer.load(url) as sd:
        assert same(sd.materialize(), wanted)
    assert 2 <= counts[1] <= 6
    assert server.most_open >= 2


def test_streams_and_iteration(url: str, wanted: dict[str, Any]) -> None:
    with zipslicer.load(url) as sd:
        streamed = {name: tensor.clone() for name, tensor in sd.stream()}  # in the order of the file
        assert same({name: streamed[name] for name in wanted}, wanted)
        assert same(dict(sd.items()), wanted)


def test_a_small_file_is_read_with_its_listing(server: Server) -> None:
    server.objects["/small"] = saved({"w": torch.arange(5)})
    with zipslicer.load(f"{server.url}/small") as sd:
        assert torch.equal(sd["w"], torch.arange(5))
    assert len(server.log) == 2


def test_ranges_are_merged_and_cut() -> None:
    size = 1 << 40
    assert remote._parts([], size) == []
    assert remote._parts([(5, 0), (7, 3)], size) == [(7, 10)]
    assert remote._parts([(5000, 10), (0, 1000)], size) == [(0, 5010)]  # a gap of 4,000
    assert remote._parts([(5100, 10), (0, 1000)], size) == [(0, 1000), (5100, 5110)]
    assert remote._parts([(0, 1 << 20), ((1 << 20) + 20_000, 10)], size) == [
        (0, (1 << 20) + 20_010)
    ]  # little beside it
    assert remote._parts([(0, 100), (50, 10), (20, 500)], size) == [(0, 520)]
    assert remote._parts([(0, 2 * PART + 2)], size) == [(0, PART + 1), (PART + 1, 2 * PART + 2)]  # not three
    assert len(remote._parts([(0, 2 * PART + PART // 8 + 1)], size)) == 3
    assert remote._parts([(10, 50)], 30) == [(10, 30)]
    for start, end in remote._parts([(i * 3_000_000, 2_990_000) for i in range(40)], size):
        assert 0 < end - start <= PART + PART // 8


# ---------------------------------------------------------------- what can be opened


def test_other_formats(server: Server, tmp_path: Path, wanted: dict[str, Any]) -> None:
    some = {name: tensor for name, tensor in wanted.items() if name.startswith(("layer1.", "layer2."))}
    server.objects["/packed.pth.gz"] = gzip.compress(saved(some), 1)
    server.objects["/legacy.pth"] = saved(some, _use_new_zipfile_serialization=False)
    names = ["/packed.pth.gz", "/legacy.pth"]
    if pytest.importorskip("safetensors"):
        from safetensors.torch import save

        server.objects["/model.safetensors"] = save(some)
        names.append("/model.safetensors")
    for name in names:
        with zipslicer.load(server.url + name) as sd:
            assert set(sd) == set(some)
            assert all(torch.equal(sd[key], some[key]) for key in some)


def test_shards(server: Server, tmp_path: Path, wanted: dict[str, Any]) -> None:
    torch.save(wanted, tmp_path / "model.pth")
    files = zipslicer.convert(tmp_path / "model.pth", tmp_path / "s.pth", max_shard_size="8MB").files
    for file in files:
        server.objects[f"/s/{Path(file).name}"] = Path(file).read_bytes()
    index = f"{server.url}/s/{Path(files[-1]).name}"
    with zipslicer.load(index) as sd:
        assert same(sd.materialize(), {name: wanted[name] for name in sd})
        assert set(sd) == set(wanted)
        again = pickle.loads(pickle.dumps(sd))
        assert torch.equal(again["layer3.bias"], wanted["layer3.bias"])
    server.objects["/s/odd.index.json"] = b'{"weight_map": {"w": "%2e%2e/secret.pth?x"}}'
    server.log.clear()
    with pytest.raises(ArchiveError, match="missing"):
        zipslicer.load(f"{server.url}/s/odd.index.json")
    assert server.log[-1].path == "/s/%252e%252e/secret.pth%3Fx"
    del server.objects[f"/s/{Path(files[1]).name}"]
    with pytest.raises(ArchiveError, match="a file is missing that the index"):
        zipslicer.load(index)


def test_any_file_system_of_fsspec(content: bytes, wanted: dict[str, Any]) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/zipslicer/model.pth", content)
    with zipslicer.load("memory://zipslicer/model.pth") as sd:
        assert same(sd.materialize(), wanted)
        memory.pipe_file("/zipslicer/model.pth", content[:-9])
        with pytest.raises(ChangedError, match=r"memory://zipslicer/model\.pth"):
            sd["layer3.weight"]
    memory.rm("/zipslicer", recursive=True)
    with pytest.raises(FileNotFoundError):
        zipslicer.load("memory://zipslicer/model.pth")


def test_a_cache(
    server: Server, url: str, tmp_path: Path, wanted: dict[str, Any], content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PART", 1 << 20)
    folder = tmp_path / "cache"
    with zipslicer.load(url, cache_dir=folder) as sd:
        assert torch.equal(sd["layer7.weight"], wanted["layer7.weight"])
        server.log.clear()
        assert torch.equal(sd.get_slice("layer7.weight")[3:150], wanted["layer7.weight"][3:150])
        assert server.log == []
        assert same(sd.materialize(), wanted)
    server.log.clear()
    with zipslicer.load(url, cache_dir=folder) as sd:
        assert len(server.log) == 2
        assert same(sd.materialize(), wanted)
        assert torch.equal(pickle.loads(pickle.dumps(sd))["layer5.bias"], wanted["layer5.bias"])
        assert len(server.log) == 4
    (one,) = folder.iterdir()
    parts = sorted(one.iterdir(), key=lambda part: int(part.name))
    assert b"".join(part.read_bytes() for part in parts)[: 1 << 20] == content[: 1 << 20]
    parts[7].write_bytes(b"cut short")
    parts[8].unlink()
    server.log.clear()
    with zipslicer.load(url, cache_dir=folder) as sd:
        assert same(sd.materialize(), wanted)
        assert len(server.log) == 4
    other = dict(wanted, more=torch.ones(3))
    server.objects["/dir/model.pth"] = saved(other)
    with zipslicer.load(url, cache_dir=folder) as sd:
        assert same(sd.materialize(), other)
    assert len(list(folder.iterdir())) == 2
    with pytest.raises(ValueError, match="cache_dir"):
        zipslicer.load("here.pth", cache_dir=folder)


def test_scan_and_convert_and_the_command_line(
    server: Server, url: str, tmp_path: Path, wanted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from zipslicer.cli import main

    assert zipslicer.scan(url).verdict == "safe"
    assert main(["ls", url, "layer3.*"]) == 0
    assert "layer3.weight  float32  [160, 1600]" in capsys.readouterr().out
    assert main(["convert", url, str(tmp_path / "here.pth")]) == 0
    assert same(torch.load(tmp_path / "here.pth"), wanted)
    assert main(["ls", f"{server.url}/none.pth?signature=s3cr3t"]) == 4
    assert "s3cr3t" not in "".join(capsys.readouterr())


def test_options_go_to_the_library(server: Server, tmp_path: Path, wanted: dict[str, Any]) -> None:
    server.headers = {"Authorization": "Bearer t0ken"}
    url = f"{server.url}/dir/model.pth"
    with pytest.raises(PermissionError, match="storage_options"):
        zipslicer.load(url)
    with zipslicer.load(url, storage_options={"headers": {"Authorization": "Bearer t0ken"}}) as sd:
        assert torch.equal(sd["layer1.bias"], wanted["layer1.bias"])
        again = pickle.loads(pickle.dumps(sd))
        assert torch.equal(again["layer1.bias"], wanted["layer1.bias"])
    options = {"headers": {"Authorization": "Bearer t0ken"}}
    assert zipslicer.scan(url, storage_options=options).verdict == "safe"
    pytest.importorskip("ml_dtypes")
    from zipslicer.report import write_report

    page = tmp_path / "page.html"
    write_report(f"{url}?signature=s3cr3t", page, framework="np", storage_options=options)
    assert "model.pth" in page.read_text()
    for secret in ("s3cr3t", "t0ken"):
        assert secret not in page.read_text()
    assert zipslicer.scan(f"{url}?signature=s3cr3t", storage_options=options).path == url


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("kind", ["503", "reset", "cut", "slow", 500, 429, "all"])
def test_one_failure_in_ten_loses_nothing(
    kind: Any, server: Server, url: str, wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PART", 128 << 10)
    chance = random.Random(zlib.crc32(repr(kind).encode()))
    kinds = ["503", "reset", "cut", "slow", 500, 429] if kind == "all" else [kind]
    seen = []

    def fault(number: int) -> Any:
        made = chance.choice(kinds) if chance.random() < 0.1 else None
        seen.append(made)
        return made

    server.fault = fault
    for _ in range(2):
        with zipslicer.load(url) as sd:
            assert same(sd.materialize(), wanted)
            assert torch.equal(sd.get_slice("layer5.weight")[3:9], wanted["layer5.weight"][3:9])
    assert sum(each is not None for each in seen) >= 20


def test_a_server_that_never_answers_rightly_is_an_os_error(server: Server, url: str) -> None:
    with zipslicer.load(url) as sd:
        server.fault = lambda number: "503"
        server.log.clear()
        with pytest.raises(OSError, match="does not answer rightly"):
            sd["layer2.weight"]
        assert len(server.log) == remote.TRIES
        server.fault = lambda number: None
        assert sd["layer2.weight"].shape == (ROWS, 1600)  # and then it does


@pytest.mark.parametrize("etags", [True, False])
def test_a_changed_object_is_noticed(etags: bool, server: Server, url: str, content: bytes) -> None:
    server.etags = etags
    with zipslicer.load(url) as sd:
        longer = bytearray(content)
        longer[len(content) // 2] ^= 1
        server.objects["/dir/model.pth"] = bytes(longer if etags else longer + b"x")  # without, its size must say so
        with pytest.raises(ChangedError, match="was changed after it was opened"):
            sd.materialize()
        with pytest.raises(ChangedError):
            sd["layer11.bias"]
        server.objects["/dir/model.pth"] = content[:100]
        with pytest.raises(ChangedError):
            sd["layer11.bias"]


def test_what_is_not_there_or_not_allowed(server: Server) -> None:
    for tail in ("/none.pth", "/none.pth?x=1"):
        with pytest.raises(FileNotFoundError, match=r"none\.pth"):
            zipslicer.load(server.url + tail)
    for status in (401, 403):
        server.fault = functools.partial(answer, status)
        for tail in ("/dir/model.pth", "/dir/model.pth?x=1"):
            with pytest.raises(PermissionError):
                zipslicer.load(server.url + tail)
    with pytest.raises(ValueError, match="not right"):
        zipslicer.load("nosuchprotocol://x/y.pth")
    with pytest.raises(ValueError, match="storage_options"):
        zipslicer.load("here.pth", storage_options={"key": "x"})
    server.fault = lambda number: None
    with pytest.raises(ValueError, match="mmap=True"):
        zipslicer.load(f"{server.url}/dir/model.pth", mmap=True)
    server.objects["/empty"] = b""
    for tail in ("/empty", "/empty?x=1"):
        with pytest.raises((ArchiveError, ChangedError)):
            zipslicer.load(server.url + tail)


def test_a_server_without_ranges_is_refused_before_it_sends_all(server: Server) -> None:
    server.ranges = False
    with pytest.raises(UnsupportedError, match="no ranges"):
        zipslicer.load(f"{server.url}/dir/model.pth?x=1")


def test_no_secret_is_shown(server: Server, content: bytes) -> None:
    url = f"{server.url}/dir/model.pth?X-Signature=s3cr3t".replace("://", "://user:passw0rd@")
    options = {"headers": {"X-Token": "t0ken"}}
    shown = []
    with zipslicer.load(url, storage_options=options) as sd:
        shown += [repr(sd), str(sd), repr(zipslicer.open(url, storage_options=options)), repr(sd._view.options)]
        for kind in ("503", "reset", 403, 404):
            server.fault = functools.partial(answer, kind)
            works: list[Callable[[], Any]] = [
                lambda: sd["layer1.weight"],
                lambda: zipslicer.load(url, storage_options=options),
            ]
            for work in works:
                with pytest.raises(OSError) as caught:  # noqa: PT011
                    work()
                shown.append("".join(traceback.format_exception_only(caught.value)))
                assert caught.value.__suppress_context__
        server.fault = lambda number: None
        server.objects["/dir/model.pth"] = content + b"x"
        with pytest.raises(ChangedError) as changed:
            sd["layer1.weight"]
        shown.append(str(changed.value))
    text = "\n".join(shown)
    assert "/dir/model.pth" in text
    for secret in ("passw0rd", "s3cr3t", "t0ken"):
        assert secret not in text


def test_after_close(url: str) -> None:
    sd = zipslicer.load(url)
    part = sd.get_slice("layer1.weight")
    sd.close()
    works: list[Callable[[], Any]] = [lambda: sd["layer1.weight"], lambda: part[0]]
    for work in works:
        with pytest.raises(ValueError, match="closed"):
            work()


def test_without_the_libraries(server: Server, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, Any]) -> None:
    url = f"{server.url}/dir/model.pth"
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with zipslicer.load(url) as sd:
        assert type(sd._view.table.archive.source._store).__name__ == "Http"
    for name in ("fsspec", "fsspec.asyn"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"zipslicer\[remote\]"):
        zipslicer.load(url)


# ---------------------------------------------------------------- processes and threads


def test_workers_open_it_again(url: str, wanted: dict[str, Any]) -> None:
    with zipslicer.load(url) as sd:
        again = pickle.loads(pickle.dumps(sd))
        assert again.path == sd.path
        assert torch.equal(again["layer4.weight"], wanted["layer4.weight"])


def test_threads_share_it(url: str, wanted: dict[str, Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with zipslicer.load(url) as sd, ThreadPoolExecutor(12) as pool:
        names = list(wanted) * 2
        assert all(map(torch.equal, pool.map(sd.__getitem__, names), (wanted[name] for name in names)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_reads(url: str) -> None:
    """In a process of its own, which has no other threads than those that were there."""
    script = textwrap.dedent("""
        import os, sys, torch, zipslicer
        sd = zipslicer.load(sys.argv[1])
        want = sd["layer4.weight"].numpy().tobytes()
        pid = os.fork()
        if not pid:
            same = sd["layer4.weight"].numpy().tobytes() == want
            os._exit(0 if same and len(sd.select("layer1*").materialize()) == 22 else 1)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """)
    done = subprocess.run([sys.executable, "-c", script, url], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_opening_files_imports_no_library_of_urls(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    script = (
        "import sys, zipslicer; zipslicer.load(sys.argv[1])['w'];"
        "assert not {'fsspec', 'obstore', 'aiohttp', 'zipslicer.remote'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.pt")], check=True)


def test_names_of_urls() -> None:
    from zipslicer.source import is_url, without_secrets

    for url in ("s3://b/k", "https://h/p?q", "hf://org/repo/f", "filecache::s3://b/k", "memory://x"):
        assert is_url(url)
    for path in ("a/b", "C:\\x", "C://x", "/a://b", "./s3://x", b"s3://x", Path("s3://x"), "a:b"):
        assert not is_url(path)
    assert without_secrets("https://u:p@h/x?q=1#f") == "https://h/x"
    assert without_secrets("s3://bucket/a@b") == "s3://bucket/a@b"
    assert without_secrets("a?b") == "a?b"


def test_blocks_are_dropped_when_there_are_many(server: Server, url: str, content: bytes) -> None:
    source = RemoteFile(url)
    source.handle.preadv([bytearray(10)], 3 * BLOCK)
    for start in range(0, source.size, BLOCK):
        buffer = bytearray(100)
        source.handle.preadv([buffer], start)
        assert bytes(buffer) == content[start : start + 100]
    assert len(source._kept) <= remote.KEPT
    assert REQUESTS >= 1
    source.close()


# ---------------------------------------------------------------- servers that others use


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(port: int) -> None:
    for _ in range(300):
        with socket.socket() as found:
            if found.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the server does not listen")


@pytest.fixture
def nginx(tmp_path: Path, content: bytes) -> Iterator[tuple[str, Path]]:
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if found is None:
        assert os.environ.get("ZIPSLICER_REQUIRE_SERVERS") != "1", "nginx was promised"
        pytest.skip("needs nginx (Debian: nginx-light)")
    port = free_port()
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "model.pth").write_bytes(content)
    places = " ".join(
        f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    (tmp_path / "nginx.conf").write_text(f"""
        daemon off; {user} pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{ }}
        http {{ log_format sent '$status $body_bytes_sent'; access_log {tmp_path}/sent.log sent; {places}
               server {{ listen 127.0.0.1:{port}; root {tmp_path}/www; }} }}
    """)
    process = subprocess.Popen([found, "-c", str(tmp_path / "nginx.conf")], stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        (tmp_path / "sent.log").write_text("")
        yield f"http://127.0.0.1:{port}/model.pth", tmp_path
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("query", ["", "?x=1"])
def test_nginx(nginx: tuple[str, Path], query: str, wanted: dict[str, Any], content: bytes) -> None:
    url, folder = nginx

    def sent() -> list[tuple[int, int]]:
        time.sleep(0.1)
        text = (folder / "sent.log").read_text()
        (folder / "sent.log").write_text("")
        return [(int(status), int(nbytes)) for status, nbytes in (line.split() for line in text.splitlines())]

    with zipslicer.load(url + query) as sd:
        assert list(sd) == list(wanted)
        assert [status for status, _ in sent()] == [206, 206]
        layer = sd.select("layer7.*").materialize()
        assert sum(nbytes for _, nbytes in sent()) <= 1.05 * sum(tensor.nbytes for tensor in layer.values())
        assert same(sd.materialize(), wanted)
        (folder / "www" / "model.pth").write_bytes(content[::-1])
        os.utime(folder / "www" / "model.pth", (1, 1))
        with pytest.raises(ChangedError):
            sd["layer3.weight"]


@pytest.fixture(scope="module")
def s3(content: bytes) -> Iterator[dict[str, Any]]:
    """moto's server, with the model in a bucket; -> storage_options."""
    if os.environ.get("ZIPSLICER_REQUIRE_SERVERS") != "1":
        for name in ("moto", "flask", "boto3"):
            pytest.importorskip(name)
    import boto3

    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(port)
        options = {"key": "AKIATEST", "secret": "verys3cret", "endpoint_url": f"http://127.0.0.1:{port}"}
        client = boto3.client(
            "s3",
            endpoint_url=options["endpoint_url"],
            aws_access_key_id=options["key"],
            aws_secret_access_key=options["secret"],
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key="dir/model.pth", Body=content)
        yield {**options, "client": client}
        client.close()
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("library", ["obstore", "s3fs"])
def test_s3(s3: dict[str, Any], library: str, wanted: dict[str, Any], content: bytes) -> None:
    pytest.importorskip(library)
    options = {name: value for name, value in s3.items() if name != "client"}
    options["client_kwargs"] = {"region_name": "us-east-1"}
    if library == "s3fs":
        options["use_ssl"] = False  # which obstore has no name for
    with zipslicer.load("s3://bucket/dir/model.pth", storage_options=options) as sd:
        assert type(sd._view.table.archive.source._store).__name__ == ("Obstore" if library == "obstore" else "Fsspec")
        assert same(sd.materialize(), wanted)
        assert torch.equal(sd.get_slice("layer5.weight")[3:9], wanted["layer5.weight"][3:9])
        s3["client"].put_object(Bucket="bucket", Key="dir/model.pth", Body=content[::-1])
        with pytest.raises(ChangedError):
            sd["layer3.weight"]
        s3["client"].put_object(Bucket="bucket", Key="dir/model.pth", Body=content)
    with pytest.raises(FileNotFoundError):
        zipslicer.load("s3://bucket/none.pth", storage_options=options)
