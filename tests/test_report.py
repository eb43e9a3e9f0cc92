"""write_report: what the page knows, and what a browser makes of it."""

from __future__ import annotations

import hashlib
import html.parser
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
pytest.importorskip("ml_dtypes")

import zipslicer  # noqa: E402
from zipslicer.errors import ArchiveError, ZipSlicerError  # noqa: E402
from zipslicer.report import PAGE, Flag, Reported, write_report  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*other quantized tensor creation functions:UserWarning")

HOSTILE = (
    "x</script><script>document.title='owned'</script>",
    "<img src=x onerror=document.title='owned'>.weight",
    "<!-- <script> {{facts}} {{script}}",
    "lone \udc80 \u2028 \u202e",
    "__proto__.constructor",
    "__proto__",
    "",
    ".",
    "\n",
    "a" * 3000,
)


def checkpoint() -> dict[str, Any]:
    torch.manual_seed(0)
    made: dict[str, Any] = {}
    for layer in range(8):
        made[f"net.{layer}.weight"] = torch.randn(40, 30) * (50 if layer == 6 else 1)
        made[f"net.{layer}.bias"] = torch.randn(200).half()
    made["net.2.weight"][3, 4] = 1e6
    made["net.3.weight"][0, :2] = float("nan")
    made["net.3.weight"][1, 1] = float("inf")
    made["zeros"] = torch.zeros(30)
    made["ones"] = torch.ones(30)
    made["tied"] = made["net.0.weight"]
    made["sparse"] = torch.eye(4).to_sparse()
    made["quantized"] = torch.quantize_per_tensor(torch.randn(8), 0.1, 0, torch.qint8)
    made["complex"] = torch.randn(5, dtype=torch.complex64)
    made["none"] = torch.empty(0, 3)
    made["scalar"] = torch.tensor(3)
    made["storage"] = torch.arange(4).untyped_storage()
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    torch.save(checkpoint(), folder / "one.pth")
    other = checkpoint()
    other["net.1.weight"] = other["net.1.weight"] + 0.5
    other["net.4.bias"] = other["net.4.bias"].float()
    other["net.5.bias"] = torch.zeros(3)
    other["new"] = torch.zeros(2)
    del other["scalar"]
    torch.save(other, folder / "other.pth")
    torch.save({name: torch.randn(4) for name in HOSTILE}, folder / "hostile.pth")
    return folder


class Page(html.parser.HTMLParser):
    """A page, as a browser parses it, and no other way."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.inside = ""
        self.tags: Counter[str] = Counter()
        self.texts: Counter[str] = Counter()
        self.facts = ""
        self.links: list[str | None] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags[tag] += 1
        self.inside = dict(attrs).get("id") or tag
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self.inside == "facts":
            self.facts += data
        self.texts[self.inside] += len(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def facts_of(path: Path) -> Any:
    def none(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(Page(path).facts, parse_constant=none)


@pytest.mark.parametrize("framework", ["pt", "np"])
def test_what_the_page_knows(framework: str, folder: Path, tmp_path: Path) -> None:
    found = write_report(folder / "one.pth", tmp_path / "r.html", framework=framework)
    facts = facts_of(tmp_path / "r.html")
    tensors = {row[0]: row for row in facts["tensors"]}
    wanted = checkpoint()
    assert list(tensors) == list(wanted)
    assert facts["about"]["tensors"] == found.tensors == len(wanted)
    assert facts["about"]["file_nbytes"] == (folder / "one.pth").stat().st_size
    with zipslicer.load(folder / "one.pth") as sd:
        infos = {name: sd.get_meta(name) for name in sd}
    assert found.nbytes == sum(info.nbytes for info in infos.values() if info) - 40 * 30 * 4  # the tied one
    for name, row in tensors.items():
        info = infos[name]
        assert info is not None
        assert row[1:5] == [info.dtype_name, list(info.shape), info.numel, info.nbytes]
    assert tensors["tied"][5] == tensors["net.0.weight"][5]
    assert len({row[5] for row in tensors.values() if row[5] >= 0}) == sum(r[5] >= 0 for r in tensors.values()) - 1
    whole = wanted["net.1.weight"].double()
    numel, nans, infinities, zeros, least, most, mean, deviation, norm, bins = tensors["net.1.weight"][6]
    assert (numel, nans, infinities, zeros, sum(bins)) == (1200, 0, 0, 0, 1200)
    moments = [whole.min(), whole.max(), whole.mean(), whole.std(correction=0), whole.norm()]
    assert [least, most, mean, deviation, norm] == pytest.approx([moment.item() for moment in moments], rel=1e-5)
    assert tensors["net.3.weight"][6][:3] == [1200, 2, 1]
    assert tensors["none"][6][4:] == [None] * 4 + [0, []]  # no NaN in JSON
    assert tensors["storage"][6] is None
    assert tensors["sparse"][6][0] == 4
    assert tensors["sparse"][7]["layout"] == "sparse_coo"
    assert facts["scan"]["verdict"] == found.verdict == "safe"


def test_what_is_odd(folder: Path, tmp_path: Path) -> None:
    found = write_report(folder / "one.pth", tmp_path / "r.html", framework="np", threads=3)
    kinds = [(flag.name, flag.kind) for flag in found.flags]
    assert Counter(kinds) == Counter(
        [
            ("net.2.weight", "far"),
            ("net.2.weight", "unlike peers"),
            ("net.3.weight", "NaN"),
            ("net.3.weight", "infinite"),
            ("net.6.weight", "unlike peers"),
            ("sparse", "constant"),
            ("zeros", "zero"),
            ("ones", "constant"),
        ]
    )
    said = dict(zip(kinds, found.flags))
    assert said["net.3.weight", "NaN"].text == "2 of 1,200 elements"
    assert said["net.2.weight", "far"].text.startswith("1e+06 is 34.6 standard deviations from the mean")
    assert "of 8 net.*.weight is" in said["net.6.weight", "unlike peers"].text
    assert said["ones", "constant"] == Flag("ones", "constant", "all 30 elements are 1")


def test_without_values_nothing_is_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipslicer.report.values_of", None)
    found = write_report(folder / "one.pth", tmp_path / "r.html", values=False, other=folder / "other.pth")
    facts = facts_of(tmp_path / "r.html")
    assert found.flags == ()
    assert [row[6] for row in facts["tensors"]] == [None] * found.tensors
    assert {each[1] for each in facts["difference"]["found"]} == {"removed", "added", "shape", "dtype"}


def test_two_files(folder: Path, tmp_path: Path) -> None:
    found = write_report(folder / "one.pth", tmp_path / "r.html", other=folder / "other.pth", framework="np")
    difference = facts_of(tmp_path / "r.html")["difference"]
    kinds = {each[0]: each[1] for each in difference["found"]}
    assert kinds == {
        "net.1.weight": "values", "net.4.bias": "dtype", "net.5.bias": "shape", "scalar": "removed", "new": "added",
    }  # fmt: skip
    assert found.differences == 5
    assert difference["other"]["name"] == "other.pth"
    change = next(each[4] for each in difference["found"] if each[0] == "net.1.weight")
    assert change[:2] == [1200, 1200]
    assert change[2] == pytest.approx(0.5, rel=1e-5)


def test_a_damaged_file_has_a_page_too(folder: Path, tmp_path: Path) -> None:
    from zipslicer.cli import main

    path = tmp_path / "damaged.pth"
    made = {"a": torch.ones(50), "b": torch.arange(9.0)}
    torch.save(made, path)
    text = bytearray(path.read_bytes())
    text[text.index(b"damaged/data/1")] ^= 1  # in its local header, which is looked at when it is read
    path.write_bytes(text)
    found = write_report(path, tmp_path / "r.html", framework="np")
    assert [(flag.name, flag.kind) for flag in found.flags] == [("a", "constant"), ("b", "unreadable")]
    assert found.flags[1].text.startswith("ArchiveError: ")
    assert facts_of(tmp_path / "r.html")["flags"][1][0] == "b"
    assert main(["report", str(path), "-o", str(tmp_path / "s.html")]) == 1


def test_what_is_refused_leaves_the_old_page(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    page.write_text("old")
    (tmp_path / "no.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ArchiveError):
        write_report(tmp_path / "no.pth", page)
    with pytest.raises(ZipSlicerError):
        write_report(folder / "one.pth", page, other=tmp_path / "no.pth")
    assert page.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["no.pth", "r.html"]


def test_text_of_a_file_is_text(folder: Path, tmp_path: Path) -> None:
    write_report(folder / "hostile.pth", tmp_path / "r.html", framework="np")
    write_report(folder / "one.pth", tmp_path / "plain.html", framework="np")
    page, plain = Page(tmp_path / "r.html"), Page(tmp_path / "plain.html")
    assert page.tags == plain.tags  # no element more
    assert page.links == []
    with zipslicer.open(folder / "hostile.pth") as opened:
        assert [row[0] for row in json.loads(page.facts)["tensors"]] == list(opened.tensors)
    assert (tmp_path / "r.html").read_bytes().decode().count("</script") == page.tags["script"]


def test_the_library_is_the_published_one() -> None:
    """dist/echarts.min.js of echarts 6.1.0 in the npm registry."""
    text = (PAGE / "echarts.min.js").read_bytes()
    assert hashlib.sha256(text).hexdigest() == "b66b25aeb4df84e33199dc21694014d336d222cbd9deb0e5a7c14bd6aa0d0fd0"


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from zipslicer.cli import main

    page = tmp_path / "page.html"
    assert main(["report", str(folder / "one.pth"), "-o", str(page), "--diff", str(folder / "other.pth")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"wrote {page}: 25 tensors, ")
    assert out[0].endswith(", pickle safe")
    assert out[1] == "  odd: 1 far, 1 NaN, 1 infinite, 1 zero, 2 constant, 2 unlike peers"
    assert out[2] == f"  5 differences to {folder / 'other.pth'}"
    assert main(["report", str(folder / "one.pth"), "-o", str(page), "--json", "--no-values"]) == 0
    ((said),) = json.loads(capsys.readouterr().out)
    assert said["tensors"] == 25
    assert said["flags"] == []


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    required = os.environ.get("ZIPSLICER_REQUIRE_BROWSER") == "1"
    if not required:
        pytest.importorskip("selenium")
        if chromium is None or driver is None:
            pytest.skip("needs Chromium and its chromedriver (Debian: chromium, chromium-driver)")
    assert chromium, "chromium was promised"
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "window-size=1360,1000", f"user-data-dir={tmp_path_factory.mktemp('b')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(driver))
    made.set_script_timeout(30)
    yield made
    made.quit()


class Shown:
    """A page in the browser."""

    def __init__(self, browser: Any, path: Path, name: str = "") -> None:
        self.browser = browser
        browser.get("about:blank")
        browser.get(f"{path.as_uri()}{name and '#'}{name}")

    def ask(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements("css selector", selector))

    def texts(self, selector: str) -> list[str]:
        found = self.ask(
            "return [...document.querySelectorAll(arguments[0])].map((each) => each.innerText.trim())", selector
        )
        assert isinstance(found, list)
        return found

    def names(self, table: str = "#table") -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.title.toWellFormed())"
        found = self.ask(script, f"{table} td.name span")
        assert isinstance(found, list)
        return found

    def colours(self, selector: str) -> int:
        """Of a canvas: how many there are."""
        script = """
            const canvas = document.querySelector(arguments[0] + ' canvas');
            const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
            return new Set(new Uint32Array(data.buffer)).size;
        """
        found = self.ask(script, selector)
        assert isinstance(found, int)
        return found

    def complaints(self) -> list[Any]:
        """What the browser has to say of the page; reading a canvas twice is our doing."""
        return [each for each in self.browser.get_log("browser") if "getImageData" not in each["message"]]


@pytest.fixture(scope="module")
def pages(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pages = tmp_path_factory.mktemp("pages")
    write_report(folder / "one.pth", pages / "one.html", framework="np", other=folder / "other.pth")
    write_report(folder / "one.pth", pages / "no_values.html", framework="np", values=False)
    write_report(folder / "hostile.pth", pages / "hostile.html", framework="np")
    torch.save({}, pages / "empty.pth")
    write_report(pages / "empty.pth", pages / "empty.html", framework="np")
    return pages


@pytest.mark.parametrize("name", ["one", "no_values", "hostile", "empty"])
def test_it_is_drawn(name: str, browser: Any, pages: Path) -> None:
    shown = Shown(browser, pages / f"{name}.html")
    assert shown.complaints() == []
    assert shown.ask("return document.documentElement.dataset.drawn") == "yes"
    assert shown.ask("return performance.getEntriesByType('resource').length") == 0
    if name != "empty":
        assert shown.colours("#map") > 8
        assert shown.colours("#sizes") > 3
    assert shown.ask("return document.documentElement.scrollWidth <= innerWidth")


def test_names_are_not_markup(browser: Any, pages: Path) -> None:
    shown = Shown(browser, pages / "hostile.html")
    assert shown.ask("return document.title") == "hostile.pth - zipslicer"
    assert shown.ask("return document.querySelectorAll('img').length") == 0
    assert shown.ask("return document.scripts.length") == 3
    assert HOSTILE[0] in shown.names()
    for row in range(len(HOSTILE)):
        shown.ask("document.querySelector(`#table tr[data-row='${arguments[0]}']`).click()", row)
        assert shown.ask("return document.title") == "hostile.pth - zipslicer"
        assert shown.ask("return document.querySelectorAll('img').length") == 0
    assert shown.complaints() == []


def test_no_other_script_runs(browser: Any, pages: Path) -> None:
    shown = Shown(browser, pages / "one.html")
    shown.ask("""
        const script = document.createElement('script');
        script.textContent = 'document.title = "owned"';
        document.body.append(script);
    """)
    assert shown.ask("return document.title") == "one.pth - zipslicer"
    (complaint,) = shown.complaints()
    assert "Content Security Policy" in complaint["message"]


def test_head_and_lists(browser: Any, pages: Path) -> None:
    shown = Shown(browser, pages / "one.html")
    totals = shown.texts("#totals li")
    assert totals[0] == "25\ntensors"
    assert totals[-2:] == ["1\nshared", "safe\npickle"]
    assert shown.texts("#ties li") == ["4.8 kB net.0.weight = tied"]
    assert shown.texts("#odd button") == [
        "1 NaN", "1 infinite", "1 far", "2 unlike peers", "1 zero", "2 constant",
    ]  # fmt: skip
    assert "known torch._utils._rebuild_tensor_v2" in shown.texts("#findings li")


def test_search_and_sort(browser: Any, pages: Path) -> None:
    shown = Shown(browser, pages / "one.html")
    assert shown.names() == list(checkpoint())
    search = shown.all("#search")[0]
    search.send_keys("BIAS net.1")
    assert shown.names() == ["net.1.bias"]
    assert shown.texts("#count") == ["1 of 25 tensors"]
    for text, names in (("*.bias", 8), ("complex64", 1), ("unlike", 2), ("[40, 30]", 9), ("nothing here", 0), ("", 25)):
        search.clear()
        search.send_keys(text or " ")
        assert len(shown.names()) == names, text
    size = next(each for each in shown.all("#table th button") if each.text == "bytes")
    size.click()
    assert shown.names()[0] == "net.0.weight"
    assert shown.names()[-1] == "none"
    size.click()
    assert shown.names()[0] == "none"
    least = next(each for each in shown.all("#table th button") if each.text == "min")
    least.click()
    least.click()
    assert shown.names()[0] == "net.6.weight"
    assert shown.names()[-2:] == ["none", "storage"]  # what has none comes last, either way
    shown.all("#only")[0].click()
    assert len(shown.names()) == 6
    shown.all("#odd button")[0].click()
    assert shown.names() == ["net.3.weight"]


def test_one_tensor(browser: Any, pages: Path) -> None:
    shown = Shown(browser, pages / "one.html")
    assert shown.texts("#detail h3") == ["net.3.weight"]  # the worst there is
    assert shown.texts("#detail .flags li") == ["NaN 2 of 1,200 elements", "infinite 1 of 1,200 elements"]
    shown.all("#table tr[data-row='0']")[0].click()
    assert shown.texts("#detail h3") == ["net.0.weight"]
    said = dict(zip(shown.texts("#detail dt"), shown.texts("#detail dd")))
    assert said["shares"] == "tied"
    assert said["bytes"] == "4,800"
    assert shown.colours("#detail") > 3
    deep = Shown(browser, pages / "one.html", "net.7.bias")
    assert deep.texts("#detail h3") == ["net.7.bias"]


def test_a_click_on_the_map(browser: Any, pages: Path) -> None:
    from selenium.webdriver import ActionChains

    shown = Shown(browser, pages / "one.html")
    map_ = shown.all("#map")[0]
    ActionChains(browser).move_to_element_with_offset(map_, -300, 0).click().perform()
    assert shown.texts("#detail h3")[0].endswith(".weight")
    for colour in ("dtype", "flag"):
        shown.ask(
            "const s = document.querySelector('#colour'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))",
            colour,
        )
        assert shown.colours("#map") > 3
    assert shown.complaints() == []


def test_the_other_file(browser: Any, pages: Path) -> None:
    shown = Shown(browser, pages / "one.html")
    assert shown.texts("#other") == ["other.pth: 25 tensors, 42 kB"]
    assert shown.texts("#difference .chips button") == [
        "1 only here", "1 only there", "1 another shape", "1 another dtype", "1 other values",
    ]  # fmt: skip
    assert shown.texts("#difference .chips span") == ["21 the same"]
    chips = shown.all("#difference .chips button")
    chips[-1].click()
    assert shown.names("#changed") == ["net.1.weight"]
    chips[-1].click()
    assert len(shown.names("#changed")) == 5


def test_ten_thousand_tensors_are_a_few_rows(browser: Any, tmp_path: Path) -> None:
    with zipslicer.Writer(tmp_path / "many.pth") as w:
        for number in range(10_000):
            w.write_chunks(f"layer{number // 10}.{number % 10}", [bytes(8)], dtype="float32", shape=(2,))
    found = write_report(tmp_path / "many.pth", tmp_path / "many.html", framework="np")
    assert isinstance(found, Reported)
    shown = Shown(browser, tmp_path / "many.html")
    assert shown.complaints() == []
    assert len(shown.names()) < 100
    shown.ask("document.querySelector('#table').scrollTop = 1e9; return new Promise((done) => setTimeout(done, 200))")
    assert shown.names()[-1] == "layer999.9"
