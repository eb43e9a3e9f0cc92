"""Policy: what is built, what stays a placeholder, and that a placeholder is inert."""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import io
import pathlib
import pickle
import subprocess
import uuid
from typing import Any, NamedTuple

import makers
import pytest
from makers import Pickle

import zipslicer
from zipslicer.errors import ProgramError, UnsafeError
from zipslicer.policy import (
    DTYPES,
    NOT_PLAIN,
    Limits,
    Meaning,
    actions,
    construct,
    dtype_named,
    dtype_of,
    floating_index,
    is_floating,
    meaning_of,
)
from zipslicer.program import MAX_MADE_KEYS

ZERO = {"0": bytes(4)}


def opened(program: Pickle, **keywords: Any) -> Any:
    return zipslicer.load(makers.checkpoint(program.stop(), ZERO).data, framework=makers.FRAMEWORK, **keywords)


def one_float(program: Pickle) -> Pickle:
    return program.tensor("FloatStorage", "0", 1, size=(1,), stride=(1,))


def config(program: Pickle, *, tensor: bool) -> Pickle:
    """pkg.Config(1, "x") with state {"lr": 0.1, "name": "adam", "w": tensor, "__class__": "evil", ...}."""
    program.call("pkg", "Config", lambda p: p.integer(1), lambda p: p.text("x"))
    program.raw(b"}(").text("lr").real(0.1).text("name").text("adam").text("args").text("mine")
    for evil in ("__class__", "__dict__", "__reduce__", "__call__", "__len__", "__iter__", "__eq__", "__hash__"):
        program.text(evil).text("evil")
    if tensor:
        one_float(program.text("w"))
    return program.raw(b"ub")


@pytest.fixture(params=[False, True], ids=["plain", "with a tensor"])
def placeholder(request: pytest.FixtureRequest) -> Any:
    return opened(config(Pickle(), tensor=request.param))


def test_attributes_and_facts(placeholder: Any) -> None:
    assert (placeholder.lr, placeholder.name, placeholder.args) == (0.1, "adam", "mine")
    about = zipslicer.describe(placeholder)
    assert (about.module, about.name, about.qualified, about.called) == ("pkg", "Config", "pkg.Config", True)
    assert tuple(about.args) == (1, "x")
    assert about.kwargs == {}
    assert about.attributes["lr"] == 0.1
    assert {"lr", "name", "args"} <= set(dir(placeholder))


def test_dunders_of_the_file_do_nothing(placeholder: Any) -> None:
    assert type(placeholder) is zipslicer.Placeholder
    assert placeholder.__class__ is zipslicer.Placeholder
    assert not callable(placeholder)
    with pytest.raises(TypeError):
        len(placeholder)
    with pytest.raises(TypeError):
        iter(placeholder)
    with pytest.raises(AttributeError):
        placeholder.__dict__  # noqa: B018
    assert zipslicer.describe(placeholder).attributes["__class__"] == "evil"


def test_it_is_not_called_compared_changed_or_pickled(placeholder: Any) -> None:
    with pytest.raises(TypeError):
        placeholder()
    assert placeholder == placeholder  # noqa: PLR0124
    assert placeholder != opened(config(Pickle(), tensor=False))
    assert hash(placeholder) == object.__hash__(placeholder)
    with pytest.raises(AttributeError):
        placeholder.lr = 2
    with pytest.raises(AttributeError):
        del placeholder.lr
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match=r"pkg\.Config"):
            pickle.dumps(placeholder, protocol)
    assert copy.copy(placeholder) is copy.deepcopy(placeholder) is placeholder


def test_a_missing_attribute_says_whose(placeholder: Any) -> None:
    with pytest.raises(AttributeError, match=r"pkg\.Config.*'momentum'"):
        placeholder.momentum  # noqa: B018
    assert getattr(placeholder, "momentum", 5) == 5
    assert not hasattr(placeholder, "__array__")


def test_a_tensor_in_a_placeholder_is_read_on_touch() -> None:
    made = opened(config(Pickle(), tensor=True))
    assert made.w.tolist() == [0.0]
    assert made.w is not made.w
    assert "float32" in repr(made) or "more" in repr(made)


def test_items_of_a_placeholder() -> None:
    program = Pickle().call("pkg", "Dict").raw(b"(").text("lr").real(0.5)
    one_float(program.text("w")).raw(b"u")
    made = opened(program)
    assert made["lr"] == 0.5
    assert made["w"].tolist() == [0.0]
    with pytest.raises(KeyError):
        made["none"]
    listed = opened(Pickle().call("pkg", "List").raw(b"(").integer(7).integer(8).raw(b"e"))
    assert (listed[0], listed[-1]) == (7, 8)
    assert list(zipslicer.describe(listed).list_items) == [7, 8]
    with pytest.raises(IndexError):
        listed[2]


def test_slots_are_attributes() -> None:
    program = Pickle().call("pkg", "Slotted").none().raw(b"}").text("a").integer(1).raw(b"s\x86b")
    assert opened(program).a == 1


def test_keyword_arguments_are_kept() -> None:
    program = Pickle(4).name("pkg", "New").raw(b")}").text("k").integer(3).raw(b"s\x92")
    assert zipslicer.describe(opened(program)).kwargs == {"k": 3}


def test_a_class_as_a_value() -> None:
    made = opened(Pickle().name("os", "system"))
    assert repr(made) == "<placeholder os.system>"
    assert not zipslicer.describe(made).called


def test_dtypes_that_can_be_cast() -> None:
    castable = {dtype.name for i, dtype in enumerate(DTYPES) if is_floating(i)}
    assert castable == {
        "float64", "float32", "float16", "bfloat16",
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    }  # fmt: skip
    for name in castable:
        assert dtype_of(name) == dtype_of(f"torch.{name}") == floating_index(name) == dtype_named(name)
    assert dtype_of("complex64") == dtype_named("complex64")
    for bad in ("complex64", "int8", "float4_e2m1fn_x2", "float17"):
        with pytest.raises(ValueError, match=bad):
            floating_index(bad)


def test_describe_takes_placeholders_only() -> None:
    with pytest.raises(TypeError, match="takes a Placeholder, not int"):
        zipslicer.describe(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("tensor", [False, True])
def test_a_repr_is_bounded_and_printable(tensor: bool) -> None:
    program = Pickle().call("evil\x1b[31m" * 1000, "C" * 60_000, *[lambda p: p.text("\x1b]0;" + "a" * 10_000)] * 50)
    program.raw(b"}(")
    for i in range(100):
        program.text(f"\r{i}" + "k" * 10_000).raw(b"\x8b\x40\x9c\x00\x00" + b"\1" * 40_000)
    if tensor:
        one_float(program.text("w"))
    made = opened(program.raw(b"ub"))
    for text in (repr(made), str(made), repr(zipslicer.describe(made)), f"{made}"):
        assert len(text) < 2000
        assert text.isprintable()


def test_a_repr_does_not_descend() -> None:
    """A placeholder that holds itself, and one in one in one."""
    program = Pickle().call("pkg", "A").put(0).raw(b"}").text("me").get(0).raw(b"sb")
    made = opened(program)
    assert made.me is made
    assert repr(made) == "<placeholder pkg.A(me=<pkg.A>)>"


# --- unknown= and allow= ----------------------------------------------------------------------------------------------


def test_unknown_error_refuses_and_names_the_global() -> None:
    with pytest.raises(UnsafeError, match=r"os\.system") as caught:
        opened(Pickle().call("os", "system", lambda p: p.text("true")), unknown="error")
    assert caught.value.global_name == "os.system"
    assert caught.value.offset == 2


def test_unknown_error_takes_what_policy_knows() -> None:
    torch = pytest.importorskip("torch")

    file = io.BytesIO()
    tree = {"w": torch.nn.Parameter(torch.zeros(2)), "s": {1, 2}, "d": torch.float16, "o": collections.OrderedDict(a=1)}
    torch.save(tree, file)
    assert zipslicer.load(file.getvalue(), unknown="error")["s"] == {1, 2}


def test_unknown_takes_two_words() -> None:
    with pytest.raises(ValueError, match="placeholder"):
        opened(Pickle().none(), unknown="ignore")


class Config:
    """What `allow` builds for pkg.Config."""

    lr: float
    name: str
    w: Any

    def __init__(self, *args: Any) -> None:
        self.called_with = args


def test_allow_builds_real_objects() -> None:
    made = opened(config(Pickle(), tensor=True), allow={"pkg.Config": Config})
    assert type(made) is Config
    assert made.called_with == (1, "x")
    assert (made.lr, made.name) == (0.1, "adam")
    assert made.w.tolist() == [0.0]


def test_allow_goes_with_unknown_error() -> None:
    made = opened(config(Pickle(), tensor=False), allow={"pkg.Config": Config}, unknown="error")
    assert type(made) is Config


def test_allow_names_the_exact_global() -> None:
    made = opened(config(Pickle(), tensor=False), allow={"pkg.Config2": Config, "Config": Config})
    assert type(made) is zipslicer.Placeholder


def test_allowed_objects_may_point_at_each_other() -> None:
    """A parent and a child, by attribute and inside a tuple: as pickle builds them."""
    program = Pickle().name("pkg", "Config").raw(b")\x81").put(0).raw(b"}")
    program.text("child").name("pkg", "Config").raw(b")\x81").put(1)
    program.raw(b"}(").text("parent").get(0).text("all").get(0).get(1).raw(b"\x86ub").raw(b"sb")
    made = opened(program, allow={"pkg.Config": Config})
    assert made.child.parent is made
    assert made.child.all == (made, made.child)


def test_allowed_objects_are_no_placeholders() -> None:
    data = makers.checkpoint(config(Pickle(), tensor=True).stop(), ZERO).data
    assert list(zipslicer.open(data).placeholders) == [""]
    assert zipslicer.open(data, allow={"pkg.Config": Config}).placeholders == {}


def test_allow_gives_state_as_pickle_does() -> None:
    class Stateful:
        def __setstate__(self, state: Any) -> None:
            self.state = state

    program = Pickle().name("pkg", "S").raw(b")\x81").integer(5).raw(b"b")
    assert opened(program, allow={"pkg.S": Stateful}).state == 5


# --- plain values -----------------------------------------------------------------------------------------------------

PLAIN = [
    {1, 2},
    frozenset({"a"}),
    b"bytes",
    bytearray(b"array"),
    1 + 2j,
    range(1, 9, 2),
    slice(1, None, 2),
    collections.Counter("aab"),
    collections.OrderedDict(a=[1]),
    collections.defaultdict(list, a=[1]),
    collections.defaultdict(None, a=1),
    1 << 100,
    -(1 << 63),
    float("inf"),
    -0.0,
    "\ud800",
    "",
    (),
    ((1,), [2], {"a": None}),
    True,
    None,
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values_are_built(value: Any, protocol: int) -> None:
    made = zipslicer.load(makers.checkpoint(pickle.dumps([value], protocol)).data)[0]
    assert type(made) is type(value)
    assert made == value
    assert repr(made) == repr(value)


def test_a_defaultdict_keeps_its_factory() -> None:
    made = zipslicer.load(makers.checkpoint(pickle.dumps(collections.defaultdict(list), 2)).data)
    assert made["new"] == []


class Ambiguous:
    """Compares as an array does: neither equal nor not."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> Any:
        raise ValueError("ambiguous")


@pytest.mark.parametrize(
    ("meaning", "args"),
    [
        (Meaning.BYTEARRAY, (1 << 40,)),
        (Meaning.BYTES, (1 << 40,)),
        (Meaning.ENCODE, ("a", "zip")),
        (Meaning.ENCODE, ("\u20ac", "latin1")),
        (Meaning.ENCODE, (b"a", "latin1")),
        (Meaning.ENCODE, ("a", Ambiguous())),
        (Meaning.COMPLEX_NUMBER, ("1" * 1000,)),
        (Meaning.RANGE, (0, 5, 0)),
        (Meaning.RANGE, (5,)),
        (Meaning.SLICE, ([], None, None)),
        (Meaning.SET, (5,)),
        (Meaning.SET, ([[]],)),
        (Meaning.FROZENSET, ([{}],)),
        (Meaning.SET, ([1 << 70],)),
        (Meaning.COUNTER, (5,)),
        (Meaning.COUNTER, ({"a": "b"},)),
        (Meaning.DEFAULTDICT, (print,)),
        (Meaning.PARTIAL, (print,)),
        (Meaning.STRANGER, ()),
    ],
)
def test_calls_that_python_does_not_write_are_not_made(meaning: int, args: tuple[Any, ...]) -> None:
    assert construct(meaning, args) is NOT_PLAIN


@pytest.mark.parametrize(
    "called", [subprocess.run, eval, exec, open, __import__, getattr, functools.reduce, print, input, compile]
)
def test_strangers_mean_nothing(called: Any) -> None:
    assert meaning_of(called.__module__, called.__name__) == Meaning.STRANGER
    assert (called.__module__, called.__name__) not in actions()


def test_names_are_matched_exactly() -> None:
    for module, name in (
        ("builtins", "Set"),
        ("builtins.", "set"),
        ("torch", "nn.Module"),
        ("torch", "load"),
        ("", "set"),
    ):
        assert (module, name) not in actions()


def test_dtypes_are_torchs() -> None:
    torch = pytest.importorskip("torch")
    for dtype in DTYPES:
        made = getattr(torch, dtype.name, None)
        if made is not None:
            assert made.itemsize == dtype.itemsize, dtype
            assert bool(dtype.traits) == (made.is_floating_point or made.is_complex), dtype
        if dtype.storage:
            assert getattr(torch, dtype.storage).dtype is made


def test_every_dtype_of_torch_is_known() -> None:
    torch = pytest.importorskip("torch")
    known = {dtype.name for dtype in DTYPES}
    for value in vars(torch).values():
        if isinstance(value, torch.dtype):
            name = str(value).removeprefix("torch.")
            # Shells without storage or operations: nothing can be saved in them.
            assert name in known or name.startswith(("int", "uint")), name


def test_codes_are_those_of_safetensors() -> None:
    module = pytest.importorskip("safetensors.torch")
    codes = {dtype.name: dtype.code for dtype in DTYPES}
    for code, dtype in module._TYPES.items():
        assert codes[str(dtype).removeprefix("torch.")] == code


# --- what could be made to cost -----------------------------------------------------------------------------------------


def nested(depth: int) -> Pickle:
    return Pickle().raw(b"]" * depth + b"a" * (depth - 1))


LIMITED = {
    "depth": (nested(20), Limits(depth=10), Limits(depth=20)),
    "dimensions": (
        Pickle().tensor("FloatStorage", "0", 1, size=[1] * 5, stride=[1] * 5),
        Limits(dimensions=4),
        Limits(dimensions=5),
    ),
    "text_nbytes": (Pickle().name("a" * 50, "b"), Limits(text_nbytes=49), Limits(text_nbytes=50)),
    "long_nbytes": (
        Pickle().raw(b"\x8b\x20\0\0\0" + b"\1" * 32),
        Limits(long_nbytes=31),
        Limits(long_nbytes=32),
    ),
    "tuple_keys": (
        Pickle().raw(b"}(").integers([1]).none().integers([2]).none().raw(b"u"),
        Limits(tuple_keys=1),
        Limits(tuple_keys=2),
    ),
    "program_nbytes": (Pickle().text("a" * 100), Limits(program_nbytes=100), Limits(program_nbytes=200)),
}


@pytest.mark.parametrize("name", LIMITED)
def test_limits_are_lowered_and_raised(name: str) -> None:
    program, low, high = LIMITED[name]
    opened(program, limits=high)
    with pytest.raises(ProgramError):
        opened(program, limits=low)


def test_default_limits_can_be_raised() -> None:
    program = nested(2000)
    with pytest.raises(ProgramError, match="nested deeper"):
        opened(program)
    made, depth = opened(program, limits=Limits(depth=5000)), 0
    while made:
        made, depth = made[0], depth + 1
    assert depth == 1999


def set_of(program: Pickle) -> Pickle:
    return program.call("builtins", "set", lambda p: p.raw(b"]"))


UNHASHABLE = {
    "key": set_of(Pickle().raw(b"}")).integer(1).raw(b"s"),
    "key beside a tensor": one_float(set_of(Pickle().raw(b"}"))).raw(b"s"),
    "key in a tuple": set_of(Pickle().raw(b"}")).raw(b"\x85").integer(1).raw(b"s"),
    "set": set_of(Pickle(4).raw(b"\x8f(")).raw(b"\x90"),
    "frozenset": set_of(Pickle(4).raw(b"(")).raw(b"\x91"),
    "placeholder's item": set_of(Pickle().call("pkg", "A")).integer(1).raw(b"s"),
}


@pytest.mark.parametrize("name", UNHASHABLE)
def test_what_cannot_be_hashed_is_the_files_fault(name: str) -> None:
    with pytest.raises(ProgramError, match="cannot be hashed"):
        opened(UNHASHABLE[name])


def test_keys_that_could_collide_are_few() -> None:
    """hash(complex(a, b)) is hash(a) + 1000003 * hash(b): all of these are 0."""

    def program(count: int) -> Pickle:
        made = Pickle().raw(b"}(")
        for i in range(count):
            made.call("builtins", "complex", lambda p, i=i: p.real(-1000003.0 * i), lambda p, i=i: p.real(float(i)))  # type: ignore[misc]
            made.none()
        return made.raw(b"u")

    assert len(opened(program(100))) == 100
    with pytest.raises(ProgramError, match="too many dict keys"):
        opened(program(MAX_MADE_KEYS + 1))


LARGE = {
    "encode": (Pickle().text("x" * 100_000), ("_codecs", "encode"), [lambda p: p.text("latin1")]),
    "set": (Pickle().integers(range(100_000)), ("builtins", "set"), []),
    "bytearray": (Pickle(4).raw(b"B\xa0\x86\x01\0" + b"x" * 100_000), ("builtins", "bytearray"), []),
}


@pytest.mark.parametrize("name", LARGE)
def test_one_large_value_is_not_copied_by_call_after_call(name: str) -> None:
    start, called, rest = LARGE[name]
    program = start.put(0).raw(b"0](").call(*called, lambda p: p.get(0), *rest)
    once = program.stop()[:-1]
    assert len(opened(Pickle().raw(once[2:] + b"e"))) == 1
    program.call(*called, lambda p: p.get(0), *rest)
    with pytest.raises(ProgramError, match="call after call"):
        opened(program.raw(b"e"))


@pytest.mark.parametrize("opcode", [b"X", b"B", b"\x96"], ids=["text", "bytes", "bytearray"])
def test_what_is_met_again_is_one_object(opcode: bytes) -> None:
    size = (100_000).to_bytes(8 if opcode == b"\x96" else 4, "little")
    made = opened(Pickle(5).raw(opcode + size + b"x" * 100_000).put(0).raw(b"0](" + b"h\0" * 3 + b"e"))
    assert made[0] is made[1] is made[2]


# --- what placeholders stand for --------------------------------------------------------------------------------------


class Hyper(dict):  # type: ignore[type-arg]
    """As Lightning's AttributeDict: items are attributes."""


class Point(NamedTuple):
    x: Any
    y: Any


class Shade(enum.Enum):
    DARK = "dark"


@dataclasses.dataclass
class Settings:
    lr: float = 0.1
    _inner: Any = None
    w: Any = None


def again(value: Any, protocol: int = 2) -> Any:
    """What comes out of a file that torch.save has written."""
    torch = pytest.importorskip("torch")
    file = io.BytesIO()
    torch.save({"value": value}, file, pickle_protocol=protocol)
    return zipslicer.load(file.getvalue())["value"]


HERE = __name__
SHOWN = {
    "namespace": (argparse.Namespace(lr=0.1, betas=(0.9, 0.99)), "argparse.Namespace(lr=0.1, betas=(0.9, 0.99))"),
    "dataclass": (Settings(), f"{HERE}.Settings(lr=0.1, w=None, _inner=None)"),
    "attribute dict": (Hyper(lr=0.1), f"{HERE}.Hyper({{'lr': 0.1}})"),
    "namedtuple": (Point(1, "a"), f"{HERE}.Point(1, 'a')"),
    "enum": (Shade.DARK, f"{HERE}.Shade('dark')"),
    "path": (pathlib.PurePosixPath("a"), f"{pathlib.PurePosixPath.__module__}.PurePosixPath('a')"),
    "datetime": (dt.datetime(2024, 1, 2, 3, 4), "datetime.datetime(2024-01-02T03:04:00)"),
    "date": (dt.date(2024, 1, 2), "datetime.date(2024-01-02)"),
    "time": (dt.time(1, 2), "datetime.time(01:02:00)"),
    "timedelta": (dt.timedelta(1, 2, 3), "datetime.timedelta(1, 2, 3)"),
    "decimal": (decimal.Decimal("1.50"), "decimal.Decimal('1.50')"),
    "uuid": (uuid.UUID(int=1 << 127), f"uuid.UUID(int={1 << 127})"),
    "deque": (collections.deque([1, 2], 3), "collections.deque((), 3, [1, 2])"),
    "class": (Settings, f"{HERE}.Settings"),
    "partial": (
        functools.partial(again, 1),
        f"functools.partial(<{HERE}.again>, func=<{HERE}.again>, args=(1,), keywords=<dict>)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", SHOWN)
def test_a_placeholder_shows_its_value(name: str, protocol: int) -> None:
    value, shown = SHOWN[name]
    assert repr(again(value, protocol)) == f"<placeholder {shown}>"


@pytest.mark.parametrize("tensor", [False, True])
def test_attributes_and_items_are_had_either_way(tensor: bool) -> None:
    w = pytest.importorskip("torch").ones(2) if tensor else None
    for value in (Hyper(lr=0.1, w=w), argparse.Namespace(lr=0.1, w=w), Settings(w=w)):
        made = again(value)
        assert made.lr == made["lr"] == 0.1
        assert "lr" in dir(made)
        with pytest.raises(AttributeError):
            made.momentum  # noqa: B018
        with pytest.raises(KeyError):
            made["momentum"]
        assert "float32 [2]" in repr(made) or not tensor
    point = again(Point(1, w))
    assert point[0] == point[-2] == 1
    with pytest.raises(KeyError):
        point[2]


@pytest.mark.parametrize("tensor", [False, True])
def test_a_partial_has_the_attributes_of_one(tensor: bool) -> None:
    w = pytest.importorskip("torch").ones(2) if tensor else 5
    made = again(functools.partial(again, w, protocol=4))
    assert zipslicer.describe(made.func).qualified == f"{HERE}.again"
    assert (len(made.args), dict(made.keywords)) == (1, {"protocol": 4})


def test_a_module_is_walked_as_one() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    made = again(model)
    assert torch.equal(made[0].weight, model[0].weight)
    assert made[1].num_batches_tracked.item() == 0
    assert (made[0].in_features, made[1].eps, made[0].training) == (2, 1e-05, True)
    assert {"weight", "bias", "in_features"} <= set(dir(made[0]))
    assert "in_features=2, out_features=3" in repr(made[0])
    with pytest.raises(AttributeError):
        made[0].momentum  # noqa: B018
    with pytest.raises(KeyError):
        made[7]


def test_an_omegaconf_config_gives_what_is_in_it() -> None:
    """By hand, as omegaconf writes it: each value in a node, and each node knows its parent."""

    def node(p: Pickle, module: str, name: str, slot: int, **state: Any) -> Pickle:
        p.name(module, name).raw(b")\x81").put(slot).raw(b"}(")
        p.text("_parent")
        p.none() if slot == 1 else p.get(1)
        for key, write in state.items():
            write(p.text(key))
        return p.raw(b"ub")

    def values(p: Pickle) -> Pickle:
        p.raw(b"}(")
        node(p.text("lr"), "omegaconf.nodes", "AnyNode", 2, _val=lambda p: p.real(0.5))
        node(p.text("sizes"), "omegaconf.listconfig", "ListConfig", 3, _content=listed)
        return p.raw(b"u")

    def listed(p: Pickle) -> Pickle:
        p.raw(b"](")
        node(p, "omegaconf.nodes", "IntegerNode", 4, _val=lambda p: p.integer(7))
        return p.raw(b"e")

    config = opened(node(Pickle(), "omegaconf.dictconfig", "DictConfig", 1, _content=values))
    assert config.lr == config["lr"] == 0.5
    assert config.sizes[0] == config["sizes"][-1] == 7
    assert (
        repr(config) == "<placeholder omegaconf.dictconfig.DictConfig(lr=0.5, sizes=<omegaconf.listconfig.ListConfig>)>"
    )
    assert dir(config) == ["_content", "_parent", "lr", "sizes"]
    with pytest.raises(KeyError):
        config["momentum"]
    with pytest.raises(AttributeError):
        config.momentum  # noqa: B018


def test_a_moment_that_is_none_is_shown_as_it_is() -> None:
    for packed in (b"", b"\xff" * 10, b"\0" * 4):
        program = Pickle(3).name("datetime", "datetime").raw(b"C" + bytes([len(packed)]) + packed + b"\x85R")
        made = opened(program)
        assert repr(made).startswith("<placeholder datetime.datetime(")


def test_a_tensor_of_a_foreign_class_reads_as_an_object_of_it() -> None:
    """As torchao's: the class's name, its inner tensors as attributes, and listed under them."""
    program = Pickle().call(
        "torch._tensor", "_rebuild_from_type_v2", lambda p: p.name("torch._utils", "_rebuild_wrapper_subclass"),
        lambda p: p.name("pkg", "Quantized"), lambda p: p.mark().name("pkg", "Quantized").integer(3).raw(b"t"),
        lambda p: p.dict({"inner": one_float, "bits": lambda p: p.integer(4)}),
    )  # fmt: skip
    checkpoint = zipslicer.open(makers.checkpoint(program.stop(), ZERO).data, framework=makers.FRAMEWORK)
    made = checkpoint.root
    assert zipslicer.describe(made).qualified == "pkg.Quantized"
    assert repr(made) == "<placeholder pkg.Quantized(<pkg.Quantized>, 3, inner=<float32 [1]>, bits=4)>"
    assert (made.inner.tolist(), made.bits) == ([0.0], 4)
    assert list(checkpoint.tensors) == ["inner"]
    assert list(checkpoint.placeholders) == [""]
