"""Archives of TorchScript, torch.export and torch.package: what torch writes, old layouts by hand, and bent ones."""

from __future__ import annotations

import importlib
import io
import json
import pickle
import struct
import zipfile
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")

import makers  # noqa: E402
from makers import Pickle, Zip  # noqa: E402

import zipslicer  # noqa: E402
from zipslicer.errors import (  # noqa: E402
    ArchiveError,
    ProgramError,
    TableError,
    UnsafeError,
    UnsupportedError,
    ZipSlicerError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FOUR_FLOATS = struct.pack("<4f", 0, 1, 2, 3)
WEIGHTS = "data/weights/model_weights_config.json"


def check_equal(lazy: Any, wanted: dict[str, Any]) -> None:
    assert list(lazy) == list(wanted)
    for name, tensor in wanted.items():
        for got in (lazy[name], lazy.get_slice(name)[...]):
            assert torch.equal(got, tensor), name
            assert got.dtype == tensor.dtype, name
    for name, got in lazy.materialize().items():
        assert torch.equal(got, wanted[name]), name


# ---------------------------------------------------------------- torch.export


def entry(path_name: Any = "weight_0", **changes: Any) -> dict[str, Any]:
    """An entry of a config: four floats, as a tensor of 2 x 2. Changes are to its tensor_meta, or to itself."""
    meta = {
        "dtype": 7,
        "sizes": [{"as_int": 2}, {"as_int": 2}],
        "strides": [{"as_int": 2}, {"as_int": 1}],
        "storage_offset": {"as_int": 0},
        "requires_grad": False,
        "device": {"type": "cpu", "index": None},
        "layout": 7,
    }
    made = {"path_name": path_name, "is_param": False, "use_pickle": False, "tensor_meta": meta}
    for name, value in changes.items():
        (meta if name in meta else made)[name] = value
    return made


def exported(config: Any, records: dict[str, bytes] | None = None, byteorder: bytes = b"little") -> bytes:
    """The smallest .pt2 that has weights."""
    text = config if isinstance(config, bytes) else json.dumps({"config": config}).encode()
    given = {"weight_0": FOUR_FLOATS} if records is None else records
    archive = Zip().add_all([(f"m/data/weights/{name}", data) for name, data in given.items()])
    archive.add_all([(f"m/{WEIGHTS}", text), ("m/archive_format", b"pt2"), ("m/byteorder", byteorder)])
    return archive.finish().data


class Tied(torch.nn.Module):  # type: ignore[misc,name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.l = torch.nn.Linear(3, 2)
        self.tied = self.l.weight
        self.register_buffer("whole", torch.arange(6.0).reshape(2, 3))
        self.register_buffer("row", self.whole[1])

    def forward(self, x: Any) -> Any:
        return self.l(x) + (self.whole @ self.row) + torch.tensor([1.0, 2.0])


@pytest.fixture(scope="module")
def program() -> Any:
    return torch.export.export(Tied(), (torch.ones(1, 3),))


def test_weights_and_constants_are_those_of_the_exported_program(program: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    torch.export.save(program, path)
    constants = {f"constants.{name}": value for name, value in program.constants.items()}
    assert constants
    wanted = dict(program.state_dict)
    with zipslicer.open(path) as checkpoint:
        order = list(checkpoint.root)
        assert sorted(order) == sorted(wanted)
        check_equal(checkpoint.root, {name: wanted[name] for name in order})
        check_equal(checkpoint.tensors, {name: wanted[name] for name in order} | constants)
        for name, tensor in wanted.items():
            assert type(checkpoint.root[name]) is type(tensor), name
            assert checkpoint.root[name].requires_grad == tensor.requires_grad, name
        made = checkpoint.root.materialize()
        assert type(made) is dict
        assert made["tied"].data_ptr() == made["l.weight"].data_ptr()
        assert made["row"].data_ptr() == made["whole"][1].data_ptr()
        assert checkpoint.root.get_meta("row").storage_offset == 3
    model = Tied()
    model.load_state_dict(zipslicer.load(path).materialize())
    assert torch.equal(model.l.weight, wanted["l.weight"])


def test_several_models_are_a_mapping_of_their_weights(program: Any, tmp_path: Path) -> None:
    path = tmp_path / "two.pt2"
    package: Any = pytest.importorskip("torch.export.pt2_archive._package")
    package.package_pt2(str(path), exported_programs={"a": program, "b": program})
    both = zipslicer.load(path)
    assert list(both) == ["a", "b"]
    wanted = dict(program.state_dict)
    for model in both.values():
        assert {name: t.tolist() for name, t in model.items()} == {name: t.tolist() for name, t in wanted.items()}
    tensors = zipslicer.open(path).tensors
    assert {"a.l.weight", "b.l.weight"} < set(tensors)
    assert any(name.startswith("a.constants.") for name in tensors)
    alone = zipslicer.load(path, record="data/weights/b_weights_config.json")
    assert torch.equal(alone["l.weight"], wanted["l.weight"])


def test_a_pickled_weight_is_read_out_of_its_own_archive(tmp_path: Path) -> None:
    inner = io.BytesIO()
    torch.save(torch.nn.Parameter(torch.arange(3.0)), inner)
    config = {"first": entry(), "odd": entry("weight_1", use_pickle=True), "last": entry()}
    path = tmp_path / "m.pt2"
    path.write_bytes(exported(config, {"weight_0": FOUR_FLOATS, "weight_1": inner.getvalue()}))
    four, three = torch.arange(4.0).reshape(2, 2), torch.arange(3.0)
    loaded = zipslicer.load(path)
    check_equal(loaded, {"first": four, "odd": three, "last": four})
    assert type(loaded["odd"]) is torch.nn.Parameter
    assert set(zipslicer.open(path).tensors) == {"first", "odd", "last"}
    again = pickle.loads(pickle.dumps(loaded))
    check_equal(again, {"first": four, "odd": three, "last": four})
    assert torch.equal(zipslicer.load(path, record="data/weights/weight_1"), three)


def test_byte_order_of_raw_records_is_that_of_the_archive() -> None:
    content = struct.pack(">4f", 0, 1, 2, 3)
    loaded = zipslicer.load(exported({"w": entry()}, {"weight_0": content}, byteorder=b"big"))
    check_equal(loaded, {"w": torch.arange(4.0).reshape(2, 2)})


def test_strides_and_offset_of_a_raw_record() -> None:
    sizes, strides = [{"as_int": 2}], [{"as_int": 2}]
    loaded = zipslicer.load(
        exported({"w": entry(sizes=sizes, strides=strides, storage_offset={"as_int": 1}), "all": entry()})
    )
    assert loaded["w"].tolist() == [1.0, 3.0]
    assert loaded.get_slice("w")[1:].tolist() == [3.0]
    made = loaded.materialize()
    assert made["w"].untyped_storage().data_ptr() == made["all"].untyped_storage().data_ptr()


def test_every_number_of_a_dtype_is_that_of_torch() -> None:
    schema = pytest.importorskip("torch._export.serde.schema")
    from zipslicer.exports import SCALARS

    serialize = pytest.importorskip("torch._export.serde.serialize")
    known = {int(number): str(dtype) for dtype, number in serialize._TORCH_TO_SERIALIZE_DTYPE.items()}
    assert {number: f"torch.{name}" for number, name in SCALARS.items() if number in known} == known
    assert int(schema.Layout.Strided) == 7


BIG = {"as_int": 1 << 62}
BENT: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    "no object": (lambda: {"w": 7}, TableError),
    "no path_name": (lambda: {"w": {}}, TableError),
    "a number as path_name": (lambda: {"w": entry(7)}, TableError),
    "a path that climbs": (lambda: {"w": entry("../weights/weight_0")}, ArchiveError),
    "no such record": (lambda: {"w": entry("weight_9")}, ArchiveError),
    "use_pickle as a number": (lambda: {"w": entry(use_pickle=0)}, TableError),
    "no tensor_meta": (lambda: {"w": entry(tensor_meta=None)}, TableError),
    "a dtype as text": (lambda: {"w": entry(dtype="7")}, UnsupportedError),
    "a dtype of no meaning": (lambda: {"w": entry(dtype=99)}, UnsupportedError),
    "a dtype that is true": (lambda: {"w": entry(dtype=True)}, UnsupportedError),
    "a sparse layout": (lambda: {"w": entry(layout=1)}, UnsupportedError),
    "requires_grad as text": (lambda: {"w": entry(requires_grad="yes")}, TableError),
    "integers that require grad": (lambda: {"w": entry(requires_grad=True, dtype=4)}, TableError),
    "a size below zero": (lambda: {"w": entry(sizes=[{"as_int": -2}, {"as_int": 2}])}, TableError),
    "a size that is no whole number": (lambda: {"w": entry(sizes=[{"as_int": 2.0}, {"as_int": 2}])}, TableError),
    "a size that is true": (lambda: {"w": entry(sizes=[{"as_int": True}, {"as_int": 2}])}, TableError),
    "a size of 64 bits": (lambda: {"w": entry(sizes=[{"as_int": 1 << 63}, {"as_int": 2}])}, TableError),
    "a symbolic size": (lambda: {"w": entry(sizes=[{"as_expr": {}}, {"as_int": 2}])}, TableError),
    "sizes that are no list": (lambda: {"w": entry(sizes=4)}, TableError),
    "sizes and strides of two lengths": (lambda: {"w": entry(strides=[{"as_int": 1}])}, TableError),
    "more dimensions than torch has": (
        lambda: {"w": entry(sizes=[{"as_int": 1}] * 65, strides=[{"as_int": 1}] * 65)},
        TableError,
    ),
    "a size beyond the record": (lambda: {"w": entry(sizes=[{"as_int": 3}, {"as_int": 2}])}, TableError),
    "a stride beyond the record": (lambda: {"w": entry(strides=[{"as_int": 3}, {"as_int": 1}])}, TableError),
    "an offset beyond the record": (lambda: {"w": entry(storage_offset={"as_int": 1})}, TableError),
    "sizes whose product passes 64 bits": (
        lambda: {"w": entry(sizes=[BIG, BIG], strides=[{"as_int": 0}] * 2)},
        TableError,
    ),
    "strides whose product passes 64 bits": (lambda: {"w": entry(strides=[BIG, BIG])}, TableError),
    "an offset that passes 64 bits with no element": (
        lambda: {"w": entry(storage_offset={"as_int": (1 << 63) - 1}, sizes=[{"as_int": 1}] * 2)},
        TableError,
    ),
    "two dtypes on one record": (lambda: {"v": entry(), "w": entry(dtype=4)}, TableError),
    "a device of no type": (lambda: {"w": entry(device="cpu")}, TableError),
    "a device index as text": (lambda: {"w": entry(device={"type": "cuda", "index": "0"})}, TableError),
}


@pytest.mark.parametrize("what", BENT)
def test_a_bent_entry_is_refused_with_its_key(what: str) -> None:
    make, error = BENT[what]
    with pytest.raises(ZipSlicerError) as caught:
        zipslicer.open(exported(make()))
    assert type(caught.value) is error
    assert caught.value.key == "w"
    assert str(caught.value.record) == f"m/{WEIGHTS}"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"config": []}',
        b'{"config": {}, "config": {}}',
        b'{"config": {"w": {}, "w": {}}}',
        b"[" * 100_000,
        b'{"config": {"w": ' + b"9" * 10_000 + b"}}",
        b"\xff{}",
    ],
    ids=lambda text: repr(text[:32]),
)
def test_a_config_that_is_none_is_refused(text: bytes) -> None:
    with pytest.raises(ArchiveError) as caught:
        zipslicer.open(exported(text))
    assert str(caught.value.record) == f"m/{WEIGHTS}"


def test_a_config_is_bounded() -> None:
    with pytest.raises(ProgramError, match="limit"):
        zipslicer.open(exported({"w": entry()}), limits=zipslicer.Limits(program_nbytes=100))


def test_a_weight_of_a_fake_tensor_is_said_to_have_no_bytes() -> None:
    with pytest.raises(UnsupportedError, match="fake"):
        zipslicer.open(exported({"w": entry()}, {"weight_0": b""}))


def test_empty_tensors_need_no_bytes() -> None:
    loaded = zipslicer.load(exported({"w": entry(sizes=[{"as_int": 0}, {"as_int": 2}])}, {"weight_0": b""}))
    assert loaded["w"].shape == (0, 2)


def test_an_expanded_tensor_is_larger_than_its_record() -> None:
    loaded = zipslicer.load(
        exported({"w": entry(sizes=[{"as_int": 1000}, {"as_int": 2}], strides=[{"as_int": 0}] * 2)})
    )
    assert loaded["w"].shape == (1000, 2)


def saved(tree: Any) -> bytes:
    target = io.BytesIO()
    torch.save(tree, target)
    return target.getvalue()


@pytest.mark.parametrize("suffix", ["pt", "json"])
def test_the_layout_before_2_8(tmp_path: Path, suffix: str) -> None:
    """A flat archive of the zipfile module, whose records are whole checkpoints."""
    tree, constants = {"w": torch.arange(4.0), "b": torch.ones(2)}, {"c": torch.zeros(3)}
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("serialized_exported_program.json", "{")
        archive.writestr(f"serialized_state_dict.{suffix}", saved(tree))
        archive.writestr(f"serialized_constants.{suffix}", saved(constants))
        archive.writestr("serialized_example_inputs.pt", b"never read")
        archive.writestr("version", "8.8")
    check_equal(zipslicer.load(path), tree)
    checkpoint = zipslicer.open(path)
    check_equal(checkpoint.tensors, tree | {"constants.c": constants["c"]})
    check_equal(pickle.loads(pickle.dumps(checkpoint.tensors)), tree | {"constants.c": constants["c"]})
    check_equal(zipslicer.load(path, record=f"serialized_constants.{suffix}"), constants)


def test_the_layout_before_2_8_without_constants_and_compressed(tmp_path: Path) -> None:
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("serialized_state_dict.pt", saved({"w": torch.ones(1)}))
        archive.writestr("serialized_constants.pt", b"")
    assert list(zipslicer.open(path).tensors) == ["w"]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("serialized_state_dict.pt", saved({"w": torch.ones(1)}))
    with pytest.raises(UnsupportedError, match="compressed"):
        zipslicer.open(path)


def test_whole_checkpoints_in_the_folders_of_later_exports() -> None:
    records = [("m/archive_format", b"pt2"), ("m/data/weights/model.pt", saved({"w": torch.ones(2)}))]
    records.append(("m/data/constants/model.pt", saved({"c": torch.zeros(1)})))
    checkpoint = zipslicer.open(Zip().add_all(records).finish().data)
    check_equal(checkpoint.tensors, {"w": torch.ones(2), "constants.c": torch.zeros(1)})


def test_a_damaged_checkpoint_in_a_record_is_refused() -> None:
    records = [("m/archive_format", b"pt2"), ("m/data/weights/model.pt", saved({"w": torch.ones(2)})[:-30])]
    with pytest.raises(ArchiveError):
        zipslicer.open(Zip().add_all(records).finish().data)


# ---------------------------------------------------------------- torch.package


def test_pickles_of_a_package(tmp_path: Path) -> None:
    PackageExporter = importlib.import_module("torch.package").PackageExporter

    path = tmp_path / "p.pt"
    shared = torch.arange(4.0)
    with PackageExporter(str(path)) as exporter:
        exporter.save_pickle("model", "m.pkl", {"a": shared, "part": shared[1:3]})
        exporter.save_pickle("model", "bare", torch.ones(2))
        exporter.save_text("model", "readme.txt", "text")
        exporter.save_binary("model", "binary", b"\x80\x03 and no more")
    wanted = {"model/m.pkl:a": shared, "model/m.pkl:part": shared[1:3], "model/bare": torch.ones(2)}
    checkpoint = zipslicer.open(path)
    check_equal(checkpoint.tensors, wanted)
    assert sorted(checkpoint.root) == ["model/bare", "model/m.pkl"]
    assert torch.equal(checkpoint.root["model/bare"], torch.ones(2))
    made = checkpoint.root.materialize()["model/m.pkl"]
    assert made["part"].untyped_storage().data_ptr() == made["a"].untyped_storage().data_ptr()
    check_equal(zipslicer.load(path, record="model/m.pkl"), {"a": shared, "part": shared[1:3]})
    check_equal(pickle.loads(pickle.dumps(checkpoint.tensors)), wanted)
    assert checkpoint.tensors._require_meta("model/m.pkl:a").storage_key == "0"


def package(pickles: dict[str, bytes], storages: dict[str, bytes]) -> bytes:
    records = [(f"p/.data/{key}.storage", data) for key, data in storages.items()]
    records += [(f"p/{name}", program) for name, program in pickles.items()]
    return Zip().add_all([*records, ("p/.data/extern_modules", b"")]).finish().data


def test_one_pickle_of_a_package_is_its_root() -> None:
    program = Pickle(3).dict({"a": lambda p: p.tensor("FloatStorage", 0, 4, size=[4], stride=[1])}).stop()
    content = package({"m/w.pkl": program}, {"0": FOUR_FLOATS})
    check_equal(zipslicer.load(content), {"a": torch.arange(4.0)})
    assert list(zipslicer.open(content).tensors) == ["m/w.pkl:a"]


def test_a_missing_storage_of_a_package_is_named() -> None:
    program = Pickle(3).dict({"a": lambda p: p.tensor("FloatStorage", 7, 4, size=[4], stride=[1])}).stop()
    loaded = zipslicer.load(package({"m/w.pkl": program}, {"0": FOUR_FLOATS}))
    with pytest.raises(ArchiveError) as caught:
        loaded["a"]
    assert (caught.value.record, caught.value.key) == ("p/.data/7.storage", "a")


def test_a_package_without_a_pickle() -> None:
    with pytest.raises(UnsupportedError, match="package"):
        zipslicer.open(package({"m/code.py": b"raise SystemExit"}, {}))


# ---------------------------------------------------------------- TorchScript


class Scripted(torch.nn.Module):  # type: ignore[misc,name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.l = torch.nn.Linear(3, 2)
        self.numbers = [1, 2]
        self.parts = [torch.ones(2), torch.zeros(1)]
        self.table = {"x": torch.full((2,), 5.0)}

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.l(x) + self.parts[0] + self.table["x"] + float(self.numbers[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_attributes_of_a_script_module(tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    model = Scripted()
    torch.jit.save(torch.jit.script(model), path)
    wanted = {
        "parts.0": torch.ones(2),
        "parts.1": torch.zeros(1),
        "table.x": torch.full((2,), 5.0),
        "l.weight": model.l.weight,
        "l.bias": model.l.bias,
    }
    with zipslicer.open(path) as checkpoint:
        assert set(checkpoint.tensors) == set(wanted)
        check_equal(checkpoint.tensors, {name: wanted[name] for name in checkpoint.tensors})
        root = checkpoint.root
        assert isinstance(root, zipslicer.Placeholder)
        assert root.numbers == [1, 2]
        assert torch.equal(root.parts[0], torch.ones(2))
        assert [t.tolist() for t in root.parts.materialize()] == [[1.0, 1.0], [0.0]]
        assert list(root.table) == ["x"]
        assert set(checkpoint.placeholders) == {"", "l"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_constants_of_a_traced_function(tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    held = torch.tensor([5.0, 6.0])
    model = torch.nn.Linear(2, 2)
    torch.jit.save(torch.jit.trace_module(_Holding(model, held), {"forward": torch.ones(2)}), path)
    checkpoint = zipslicer.open(path)
    wanted = {"model.weight": model.weight, "model.bias": model.bias, "constants.0": held}
    check_equal(checkpoint.tensors, {name: wanted[name] for name in checkpoint.tensors})
    assert set(checkpoint.tensors) == set(wanted)
    check_equal(pickle.loads(pickle.dumps(checkpoint.tensors)), {name: wanted[name] for name in checkpoint.tensors})
    assert torch.equal(zipslicer.load(path, record="constants.pkl")[0], held)


class _Holding(torch.nn.Module):  # type: ignore[misc,name-defined]
    def __init__(self, model: Any, held: Any) -> None:
        super().__init__()
        self.model = model
        self._held = [held]  # in a list, and so no buffer: tracing makes it a constant

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.model(x) + self._held[0]


def script(main: Pickle, constants: Pickle, storages: dict[str, bytes]) -> bytes:
    archive = Zip().add_all([(f"s/{name}", data) for name, data in storages.items()])
    return archive.add_all([("s/data.pkl", main.stop()), ("s/constants.pkl", constants.stop())]).finish().data


def floats(key: str) -> Any:
    return lambda p: p.tensor("FloatStorage", key, 4, size=[4], stride=[1])


def test_a_constant_whose_name_is_taken_keeps_its_structural_path() -> None:
    main = Pickle().dict({"constants": lambda p: p.dict({"0": floats("0")})})
    constants = Pickle().raw(b"(")
    floats("0")(constants)
    content = script(main, constants.raw(b"t"), {"data/0": FOUR_FLOATS, "constants/0": FOUR_FLOATS[::-1]})
    checkpoint = zipslicer.open(content)
    assert list(checkpoint.tensors) == ["constants.0", "constants/0"]
    assert checkpoint.tensors["constants.0"].tolist() == [0, 1, 2, 3]
    assert checkpoint.tensors["constants/0"].tolist() != [0, 1, 2, 3]


def test_only_what_is_touched_is_read() -> None:
    """The storages of the constants are not there: everything but they can be had."""
    constants = Pickle().raw(b"(")
    floats("0")(constants)
    content = script(Pickle().dict({"w": floats("0")}), constants.raw(b"t"), {"data/0": FOUR_FLOATS})
    checkpoint = zipslicer.open(content)
    assert checkpoint.tensors["w"].tolist() == [0, 1, 2, 3]
    assert checkpoint.root.materialize()["w"].tolist() == [0, 1, 2, 3]
    assert checkpoint.tensors.get_shape("constants.0") == [4]
    with pytest.raises(ArchiveError) as caught:
        checkpoint.tensors["constants.0"]
    assert (caught.value.record, caught.value.key) == ("s/constants/0", "constants.0")


TAG = "torch.jit._pickle", "restore_type_tag"


def test_what_type_tags_wrap_stands_in_their_place() -> None:
    def tagged(write: Any) -> Any:
        return lambda p: p.call(*TAG, write, lambda p: p.text("List[Any]"))

    def items(p: Pickle) -> None:
        p.raw(b"](").text("a")
        floats("0")(p)
        p.raw(b"e")

    program = Pickle().dict({"twice": tagged(tagged(items)), "number": tagged(lambda p: p.integer(7))})
    loaded = zipslicer.load(makers.checkpoint(program.stop(), {"0": FOUR_FLOATS}).data)
    assert loaded["number"] == 7
    assert loaded["twice"][0] == "a"
    assert loaded["twice"][1].tolist() == [0, 1, 2, 3]
    assert list(loaded.flatten()) == ["twice.1"]


def test_a_type_tag_that_is_called_or_has_no_argument_is_a_placeholder() -> None:
    program = Pickle().dict(
        {
            "bare": lambda p: p.call(*TAG),
            "called": lambda p: p.call(*TAG, lambda p: p.text("x")).raw(b")R"),
            "built": lambda p: p.call(*TAG, lambda p: p.text("x")).raw(b"}b"),
        }
    )
    loaded = zipslicer.load(makers.checkpoint(program.stop()).data)
    assert [type(value) for value in loaded.values()] == [zipslicer.Placeholder] * 3
    assert zipslicer.describe(loaded["called"]).qualified == ".".join(TAG)
    assert repr(loaded)


def test_a_tagged_list_that_holds_itself() -> None:
    program = Pickle().raw(b"]q\0h\0").name(*TAG).raw(b"h\0").text("List").raw(b"\x86Rab")
    with pytest.raises(ZipSlicerError):
        zipslicer.load(makers.checkpoint(program.stop()).data)
    program = Pickle().raw(b"]q\0").name(*TAG).raw(b"h\0").text("List").raw(b"\x86Ra")
    loaded = zipslicer.load(makers.checkpoint(program.stop()).data)
    assert loaded[0] is loaded


def test_classes_of_a_script_are_refused_where_unknown_ones_are() -> None:
    main = Pickle().name("__torch__", "M").raw(b")\x81}b")
    with pytest.raises(UnsafeError):
        zipslicer.open(script(main, Pickle().raw(b")"), {}), unknown="error")


# ---------------------------------------------------------------- other archives


def flat(*names: str, content: bytes = b"x") -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return target.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (flat("arr_0.npy", "arr_1.npy"), "numpy.load"),
        (flat("[Content_Types].xml", "word/document.xml"), "Office"),
        (flat("metadata.json", "config.json", "model.weights.h5"), "Keras"),
        (flat("MAR-INF/MANIFEST.json", "model.pth"), r"TorchServe.*'model.pth'.*record="),
        (flat("model.safetensors", "config.json"), r"'model.safetensors'"),
        (flat("folder/model.ckpt", "folder/other.txt"), r"'model.ckpt'"),
        (flat("m/model.json", "m/tensors/0"), "before 1.4"),
        (flat("m/data/aotinductor/model/x.so", "m/archive_format"), "AOTInductor"),
        (flat("m/archive_format", "m/models/model.json"), "without weights"),
    ],
)
def test_archives_of_others_are_named(content: bytes, says: str) -> None:
    for act in (zipslicer.open, zipslicer.load):
        with pytest.raises(UnsupportedError, match=says):
            act(content)


def test_a_checkpoint_in_an_archive_is_opened_by_its_record(tmp_path: Path) -> None:
    tree = {"w": torch.arange(3.0)}
    path = tmp_path / "both.zip"
    old = io.BytesIO()
    torch.save(tree, old, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/new.pth", saved(tree))
        archive.writestr("b/old.pth", old.getvalue())
        archive.writestr("packed.pth", saved(tree), zipfile.ZIP_DEFLATED)
    for record in ("a/new.pth", "b/old.pth"):
        loaded = zipslicer.load(path, record=record)
        check_equal(loaded, tree)
        check_equal(pickle.loads(pickle.dumps(loaded)), tree)
    with pytest.raises(UnsupportedError, match="compressed"):
        zipslicer.load(path, record="packed.pth")


def test_what_is_no_archive_of_torch_stays_refused_as_it_was() -> None:
    with pytest.raises(ArchiveError, match="in no folder"):
        zipslicer.open(flat("data.pkl", "data/0"))
    with pytest.raises(ArchiveError, match="in no folder"):
        zipslicer.open(flat("data.pkl", "data/0"), record="other")
    with pytest.raises(ArchiveError, match="outside"):
        zipslicer.open(flat("a/data.pkl", "b/data.pkl"))


def test_an_archive_with_a_program_is_read_as_nothing_else() -> None:
    """torch.load goes by the folder of the first record, and would find a program there."""
    for record in ("data.pkl", "serialized_state_dict.pt"):
        with pytest.raises(ArchiveError, match="outside"):
            zipslicer.open(
                flat("a/data.pkl", "serialized_state_dict.pt", content=saved({"w": torch.ones(1)})), record=record
            )


def test_one_pickled_record_is_not_opened_for_many_names() -> None:
    config = {name: entry("weight_1", use_pickle=True) for name in ("v", "w")}
    with pytest.raises(TableError) as caught:
        zipslicer.open(exported(config, {"weight_1": saved(torch.ones(1))}))
    assert caught.value.key == "w"


def test_what_torch_load_refuses_its_stand_in_refuses() -> None:
    inner = saved({"w": torch.ones(1)})
    for content in (exported({"w": entry()}), flat("serialized_state_dict.pt", content=inner), inner[:-1]):
        with pytest.raises((RuntimeError, pickle.UnpicklingError, ValueError)):
            zipslicer.torch_load(io.BytesIO(content))
    assert zipslicer.torch_load(io.BytesIO(inner))["w"].tolist() == [1]
