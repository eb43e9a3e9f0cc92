"""Programs: tricks with the pickle, which are all about running something, or about memory, time and depth."""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Iterator

from makers import Pickle

from hostile import (
    INERT,
    NUMBERS,
    PROGRAM,
    PWNED,
    RIGHT,
    TRAP,
    UNSUPPORTED,
    Attack,
    attack,
    beside,
    checkpoint,
    program,
    raw,
    trick,
    w,
)

OPERANDS = {  # an operand of each kind that pickletools knows
    "uint1": b"\1",
    "uint2": b"\1\0",
    "int4": b"\1\0\0\0",
    "uint4": b"\1\0\0\0",
    "uint8": b"\1\0\0\0\0\0\0\0",
    "stringnl": b"'ab'\n",
    "stringnl_noescape": b"ab\n",
    "stringnl_noescape_pair": b"os\nmkdir\n",
    "unicodestringnl": b"ab\n",
    "decimalnl_short": b"12\n",
    "decimalnl_long": b"12L\n",
    "floatnl": b"1.5\n",
    "float8": bytes(8),
    "string1": b"\2ab",
    "string4": b"\2\0\0\0ab",
    "bytes1": b"\2ab",
    "bytes4": b"\2\0\0\0ab",
    "bytes8": b"\2\0\0\0\0\0\0\0ab",
    "bytearray8": b"\2\0\0\0\0\0\0\0ab",
    "unicodestring1": b"\2ab",
    "unicodestring4": b"\2\0\0\0ab",
    "unicodestring8": b"\2\0\0\0\0\0\0\0ab",
    "long1": b"\2ab",
    "long4": b"\2\0\0\0ab",
}


def text(value: str) -> Callable[[Pickle], object]:
    return lambda pickle: pickle.text(value)


def number(value: int) -> Callable[[Pickle], object]:
    return lambda pickle: pickle.integer(value)


def call(module: str, name: str, *arguments: Callable[[Pickle], object]) -> Callable[[Pickle], object]:
    return lambda pickle: pickle.call(module, name, *arguments)


# --- opcodes ---


@trick
def opcode_cut() -> Iterator[Attack]:
    """The pickle ends within the operand of each opcode."""
    for opcode in pickletools.opcodes:
        if opcode.arg is not None:
            operand = OPERANDS[opcode.arg.name]
            for kept in {0, len(operand) - 1}:
                cut = b"\x80\5" + opcode.code.encode("latin-1") + operand[:kept]
                yield attack(f"{opcode.name} {kept}", checkpoint(cut), PROGRAM, UNSUPPORTED)


@trick
def opcode_on_an_empty_stack() -> Iterator[Attack]:
    for opcode in pickletools.opcodes:
        if opcode.stack_before and opcode.name not in ("STOP", "MARK"):
            operand = OPERANDS[opcode.arg.name] if opcode.arg is not None else b""
            bare = b"\x80\5" + opcode.code.encode("latin-1") + operand + b"."
            yield attack(opcode.name, checkpoint(bare), PROGRAM, UNSUPPORTED)


@trick
def opcode_below_a_mark() -> Iterator[Attack]:
    """What an opcode takes lies on the other side of a mark."""
    for opcode in "aesbuR\x81\x85\x86\x87\x90\x92\x93Q02":
        bare = b"\x80\5]]](" + opcode.encode("latin-1") + b"."
        if opcode in "eu\x90":
            bare = b"\x80\5(" + opcode.encode("latin-1") + b"."
        yield attack(repr(opcode), checkpoint(bare), PROGRAM)


@trick
def opcode_unknown() -> Iterator[Attack]:
    known = {ord(opcode.code) for opcode in pickletools.opcodes}
    for code in sorted(set(range(256)) - known)[::9]:
        yield attack(code, checkpoint(b"\x80\2" + bytes([code]) + b"."), PROGRAM)


@trick
def mark_left_open() -> Iterator[Attack]:
    yield attack("one", checkpoint(b"\x80\2(}."), PROGRAM)
    yield attack("ten thousand", checkpoint(b"\x80\2" + b"(" * 10_000 + b"N."), PROGRAM)
    yield attack("nothing but a mark", checkpoint(b"\x80\2(."), PROGRAM)


@trick
def stack_left_full() -> Iterator[Attack]:
    """Pickle takes the topmost; the rest is what a scanner would not see as the result."""
    yield attack("two", checkpoint(b"\x80\2N" + program()[2:]), PROGRAM, RIGHT)


@trick
def no_end() -> Iterator[Attack]:
    yield attack("empty", checkpoint(b""), PROGRAM)
    yield attack("no STOP", checkpoint(program()[:-1]), PROGRAM)
    yield attack("protocol only", checkpoint(b"\x80\2"), PROGRAM)
    yield attack("stop only", checkpoint(b"."), PROGRAM)


@trick
def more_after_the_end() -> Iterator[Attack]:
    """A second pickle, which torch does not run and a scanner may."""
    payload = Pickle().call("os", "mkdir", text(PWNED)).stop()
    yield attack("a pickle", checkpoint(program() + payload), PROGRAM, RIGHT)
    yield attack("zeros", checkpoint(program() + bytes(100)), PROGRAM, RIGHT)


@trick
def payload_and_then_damage() -> Iterator[Attack]:
    """nullifAI: what runs has run before the stream breaks."""
    payload = Pickle().call("os", "mkdir", text(PWNED)).body()
    for tail in (b"", b"X", b"\xff", b"R."):
        yield attack(tail, checkpoint(b"\x80\2" + payload + tail), PROGRAM)


@trick
def protocol_is_hostile() -> Iterator[Attack]:
    for protocol in (6, 255):
        yield attack(protocol, checkpoint(b"\x80" + bytes([protocol]) + program()[2:]), PROGRAM, UNSUPPORTED)
    yield attack("again in the middle", checkpoint(b"\x80\2\x80\2" + program()[2:]), PROGRAM, RIGHT)
    yield attack("none", checkpoint(program()[2:]), RIGHT)


# --- lengths ---


@trick
def length_beyond_the_pickle() -> Iterator[Attack]:
    """Memory for what is not there."""
    for name, head in (
        ("BINUNICODE", b"X\xff\xff\xff\x7f"),
        ("BINUNICODE8", b"\x8d" + b"\xff" * 7 + b"\x7f"),
        ("BINUNICODE8 max", b"\x8d" + b"\xff" * 8),
        ("SHORT_BINUNICODE", b"\x8c\xff"),
        ("BINBYTES", b"B\xff\xff\xff\xff"),
        ("BINBYTES8", b"\x8e\0\0\0\0\1\0\0\0"),
        ("SHORT_BINBYTES", b"C\xff"),
        ("BYTEARRAY8", b"\x96" + b"\xff" * 8),
        ("BYTEARRAY8 4 GiB", b"\x96\0\0\0\0\1\0\0\0"),
        ("BINSTRING", b"T\xff\xff\xff\x7f"),
        ("BINSTRING negative", b"T\xff\xff\xff\xff"),
        ("LONG4", b"\x8b\xff\xff\xff\x7f"),
        ("LONG4 negative", b"\x8b\xff\xff\xff\xff"),
        ("LONG1", b"\x8a\xff"),
    ):
        yield attack(name, checkpoint(b"\x80\5" + head + b"abc."), PROGRAM)


@trick
def frame_lies() -> Iterator[Attack]:
    """A frame is a hint to the reader's buffer, and must not become its size."""
    for nbytes in (1 << 40, (1 << 64) - 1):
        yield attack(nbytes, checkpoint(b"\x80\4\x95" + struct.pack("<Q", nbytes) + program()[2:]), PROGRAM, RIGHT)
    yield attack("too short", checkpoint(b"\x80\4\x95" + bytes(8) + program()[2:]), PROGRAM, RIGHT)
    yield attack("many", checkpoint(b"\x80\4" + (b"\x95" + bytes(8)) * 1000 + program()[2:]), PROGRAM, RIGHT)


@trick
def text_number_is_hostile() -> Iterator[Attack]:
    """Digits are converted in quadratic time."""
    for name, line in (
        ("INT of 100,000 digits", b"I" + b"9" * 100_000 + b"\n"),
        ("LONG of 100,000 digits", b"L" + b"9" * 100_000 + b"L\n"),
        ("FLOAT of 100,000 digits", b"F" + b"9" * 100_000 + b"\n"),
        ("INT of nothing", b"I\n"),
        ("INT of words", b"Ieval\n"),
        ("INT in Python's own spelling", b"I1_000\n"),
        ("FLOAT of words", b"Fos.system\n"),
        ("INT with a NUL", b"I1\0\n"),
        ("line without end", b"I" + b"1" * 10),
        ("line of 1 MiB", b"V" + b"a" * (1 << 20) + b"\n"),
    ):
        yield attack(name, checkpoint(b"\x80\2" + line + b"."), PROGRAM, UNSUPPORTED)


@trick
def large_number() -> Iterator[Attack]:
    """Python refuses to print integers of more than 4,300 digits: a repr must not raise."""
    digits = b"\x7f" * 60_000
    for tag, write in (
        ("value", raw(b"\x8b" + struct.pack("<i", len(digits)) + digits)),
        ("argument", call("os", "mkdir", raw(b"\x8b" + struct.pack("<i", len(digits)) + digits))),
    ):
        yield attack(tag, beside(write), RIGHT)
    huge = b"\x7f" * (1 << 20)
    yield attack("of a MiB", beside(raw(b"\x8b" + struct.pack("<i", len(huge)) + huge)), PROGRAM)
    yield attack("as a key", checkpoint(Pickle().raw(b"}(\x8a\x64" + b"\x7f" * 100 + b"Nu").stop()), PROGRAM, INERT)


@trick
def string_escapes() -> Iterator[Attack]:
    for name, line in (
        ("unterminated", b"S'abc\n"),
        ("bad escape", b"S'\\x4'\n"),
        ("unicode escape cut", b"V\\u12\n"),
        ("surrogate", b"V\\ud800\n"),
        ("beyond unicode", b"V\\U00110000\n"),
        ("not UTF-8", b"X\2\0\0\0\xff\xfe"),
        ("code in quotes", b"S'a' + __import__('os').mkdir('" + PWNED.encode() + b"')\n"),
    ):
        yield attack(name, checkpoint(b"\x80\2" + line + b"."), PROGRAM, UNSUPPORTED, INERT)


# --- memo ---


@trick
def memo_slot_missing() -> Iterator[Attack]:
    for name, get in (
        ("BINGET", b"h\7"),
        ("LONG_BINGET", b"j\xff\xff\xff\xff"),
        ("GET", b"g7\n"),
        ("negative", b"g-1\n"),
    ):
        yield attack(name, checkpoint(b"\x80\2" + get + b"."), PROGRAM, UNSUPPORTED)


@trick
def memo_slot_huge() -> Iterator[Attack]:
    """CVE-2018-20406: an array as long as the index."""
    for name, put in (
        ("LONG_BINPUT", b"r\xff\xff\xff\xff"),
        ("LONG_BINPUT 2**31", b"r\0\0\0\x80"),
        ("PUT", b"p99999999999\n"),
        ("PUT of 10,000 digits", b"p" + b"9" * 10_000 + b"\n"),
    ):
        yield attack(name, checkpoint(b"\x80\2}" + put + b"."), PROGRAM, UNSUPPORTED, INERT)
    sparse = b"".join(b"r" + struct.pack("<I", (i * 40_000_003) & 0xFFFFFFFF) for i in range(10_000))
    yield attack("sparse", checkpoint(b"\x80\2}" + sparse + b"."), INERT)


@trick
def memo_mixed_to_fool_a_scanner() -> Iterator[Attack]:
    """picklescan#14: PUT and MEMOIZE number in different ways; what STACK_GLOBAL takes must be what was put."""
    body = b"\x80\4\x8c\2os\x94\x8c\5mkdirq\0\x8c\4mathh\0\x93\x8c\x08" + PWNED.encode() + b"\x85R."
    yield attack("", checkpoint(body), PROGRAM)  # two values are left under the result


@trick
def memo_on_nothing() -> Iterator[Attack]:
    for name, put in (("MEMOIZE", b"\x94"), ("BINPUT", b"q\0"), ("after a mark", b"(q\0")):
        yield attack(name, checkpoint(b"\x80\4" + put + b"N."), PROGRAM)


# --- depth and size ---


DEEP = {
    "lists": (b"]", b"a"),
    "dicts": (b"}N", b"s"),
    "tuples": (b"", b"\x85"),
    "sets in lists": (b"](", b"e"),
    "calls": (b"cos\nmkdir\n", b"\x85R"),
    "states": (b"cos\nmkdir\n)R", b"b"),
    "frozen sets": (b"(", b"\x91"),
}


@trick
def nested_too_deep() -> Iterator[Attack]:
    """Nothing may recurse as deep as the file says: no reader, destructor, repr or comparison."""
    for name, (opened, closed) in DEEP.items():
        for depth in (2_000, 200_000):
            deep = b"\x80\4" + opened * depth + b"N" + closed * depth + b"."
            yield attack(f"{name} {depth}", checkpoint(deep), PROGRAM)


@trick
def nested_as_deep_as_is_allowed() -> Iterator[Attack]:
    for name, (opened, closed) in DEEP.items():
        deep = b"\x80\4" + opened * 990 + b"N" + closed * 990 + b"."
        yield attack(name, checkpoint(deep), INERT, PROGRAM)


@trick
def deep_by_the_memo() -> Iterator[Attack]:
    """Each list holds the one before, which came from the memo: no opcode nests."""
    chain = b"]q\0" + b"".join(b"]h\0aq\0" for _ in range(50_000))
    yield attack("lists", checkpoint(b"\x80\2" + chain + b"."), PROGRAM)
    chain = b")q\0" + b"".join(b"h\0\x85q\0" for _ in range(50_000))
    yield attack("tuples", checkpoint(b"\x80\2" + chain + b"."), PROGRAM)
    chain = b"]q\0]q\1" + b"".join(b"h\1]q\1a" for _ in range(50_000)) + b"h\0"
    yield attack("from the inside", checkpoint(b"\x80\2" + chain + b"."), PROGRAM, INERT)


@trick
def billion_laughs() -> Iterator[Attack]:
    """2 ** 60 leaves on 60 containers, which must be shared and never walked one by one."""
    for name, opened, closed in (
        ("lists", b"](", b"e"),
        ("tuples", b"(", b"t"),
        ("dicts", b"}(K\0", b"u"),
        ("calls", b"cos\nmkdir\n(", b"tR"),
    ):
        body = b"]q\0"
        for _ in range(60):
            inner = b"h\0K\1h\0" if name == "dicts" else b"h\0h\0"
            body += opened + inner + closed + b"q\0"
        yield attack(name, checkpoint(b"\x80\2" + body + b"."), INERT, PROGRAM)
        yield attack(f"{name} beside", beside(raw(body)), RIGHT, PROGRAM)


@trick
def laughs_with_a_tensor() -> Iterator[Attack]:
    """One tensor under 2 ** 40 names."""
    body = Pickle()
    w()(body)
    body.put(0)
    for _ in range(40):
        body.raw(b"](h\0h\0eq\0")
    yield attack("", checkpoint(body.stop()), PROGRAM, RIGHT, INERT, holds=None)


@trick
def hash_of_a_nested_tuple() -> Iterator[Attack]:
    """A key of 2 ** 60 hash steps."""
    body = b")q\0" + b"h\0h\0\x86q\0" * 60
    yield attack("key", checkpoint(b"\x80\2}" + body + b"Ns."), PROGRAM, INERT)
    yield attack("set", checkpoint(b"\x80\4\x8f(" + body + b"\x90."), PROGRAM, INERT)
    yield attack("frozenset", checkpoint(b"\x80\4(" + body + b"\x91."), PROGRAM, INERT)


@trick
def keys_of_one_hash() -> Iterator[Attack]:
    """Python hashes integers modulo 2**61 - 1, without a secret."""
    prime = (1 << 61) - 1
    few = b"".join(b"\x8a\x0b" + (prime * i + 7).to_bytes(11, "little") + b"N" for i in range(1, 20_001))
    yield attack("integers beyond 64 bits", checkpoint(b"\x80\2}(" + few + b"u."), PROGRAM, INERT)
    small = b"".join(
        b"\x8a\x08" + (prime * i).to_bytes(8, "little", signed=True) + b"N" for i in (-4, -3, -2, -1, 1, 2, 3, 4)
    )
    yield attack("integers of 64 bits", checkpoint(b"\x80\2}(" + small * 5000 + b"u."), INERT)
    pairs = b"".join(b"J" + struct.pack("<i", i) + b"J" + struct.pack("<i", -i) + b"\x86N" for i in range(20_000))
    yield attack("tuples", checkpoint(b"\x80\2}(" + pairs + b"u."), PROGRAM)
    ones = b"".join(b"G" + struct.pack(">d", 2.0**e) + b"N" for e in range(-1022, 1023))
    yield attack("floats", checkpoint(b"\x80\2}(" + ones * 5 + b"u."), INERT)


@trick
def keys_that_are_not_themselves() -> Iterator[Attack]:
    """NaN is another key each time, True is 1 and 1.0."""
    nan = b"G" + struct.pack(">d", float("nan"))
    yield attack("NaN", checkpoint(b"\x80\2}(" + (nan + b"N") * 1000 + b"u."), INERT)
    yield attack("equal", checkpoint(b"\x80\2}(K\1N\x88NG" + struct.pack(">d", 1.0) + b"Nu."), INERT)


@trick
def keys_that_cannot_be_hashed() -> Iterator[Attack]:
    for name, key in (
        ("list", b"]"),
        ("dict", b"}"),
        ("set", b"\x8f"),
        ("bytearray", b"\x96" + bytes(8)),
        ("tuple of a list", b"]\x85"),
    ):
        yield attack(name, checkpoint(b"\x80\5}" + key + b"Ns."), PROGRAM)
        yield attack(f"{name} in a set", checkpoint(b"\x80\5\x8f(" + key + b"\x90."), PROGRAM)
    yield attack(
        "tensor",
        checkpoint(Pickle().raw(b"}(").tensor("FloatStorage", "0", 4, size=[4], stride=[1]).raw(b"Nu").stop()),
        PROGRAM,
        INERT,
        RIGHT,
    )


@trick
def cycles() -> Iterator[Attack]:
    """What holds itself can be shown, walked and dropped all the same."""
    for name, body in (
        ("list", b"]q\0h\0a"),
        ("dict", b"}q\0Nh\0s"),
        ("tuple", b"]q\0h\0\x85q\1a0h\1"),
        ("call's items", b"cos\nmkdir\n)Rq\0h\0a"),
        ("call's state", b"cos\nmkdir\n)Rq\0h\0b"),
        ("call's attributes", b"cos\nmkdir\n)Rq\0}U\1ah\0sb"),
        ("call's arguments", b"]q\0cos\nmkdir\nh\0\x85Rq\1a"),
        ("set", b"\x8fq\0(cos\nmkdir\n)Rq\1h\0b\x90"),
        ("ordered dict", b"ccollections\nOrderedDict\n)Rq\0U\1ah\0s"),
        ("default dict", b"ccollections\ndefaultdict\ncbuiltins\nlist\n\x85Rq\0U\1ah\0s"),
        ("a class of itself", b"cos\nmkdir\nq\0h\0\x85R"),
    ):
        yield attack(name, checkpoint(b"\x80\4" + body + b"."), INERT, PROGRAM)


@trick
def many_small_things() -> Iterator[Attack]:
    """Megabytes of one-byte opcodes: memory in proportion to the file, and not 100 times of it."""
    for name, body in (
        ("None", b"(" + b"N" * 1_000_000 + b"l"),
        ("lists", b"(" + b"]" * 100_000 + b"l"),
        ("dicts", b"(" + b"}" * 100_000 + b"l"),
        ("tuples", b"(" + b"N\x85" * 100_000 + b"l"),
        ("copies", b"N" + b"2" * 1_000_000 + b"0" * 1_000_000),
        ("pops", b"N0" * 500_000 + b"N"),
        ("marks", b"(1" * 500_000 + b"N"),
        ("calls", b"cos\nmkdir\nq\x000(" + b"h\0)R" * 30_000 + b"l"),
    ):
        yield attack(name, checkpoint(b"\x80\2" + body + b"."), INERT)


# --- globals ---

GADGETS = """
os system | posix system | nt system | os popen | os mkdir | posix mkdir | os execl | os spawnlp | os.path join
shutil rmtree | subprocess Popen | subprocess run | subprocess check_output | subprocess getoutput
_posixsubprocess fork_exec | builtins eval | builtins exec | builtins compile | builtins __import__
builtins getattr | builtins open | builtins input | __builtin__ eval | __builtin__ apply | __builtin__ execfile
__builtin__ file | builtins print | builtins exit | sys exit | operator attrgetter | operator methodcaller
operator itemgetter | functools reduce | functools partial | itertools starmap | pkgutil resolve_name
runpy run_path | runpy run_module | runpy _run_code | importlib import_module | importlib reload | imp load_source
zipimport zipimporter | site main | code interact | code InteractiveInterpreter | codeop compile_command | pty spawn
pip main | pip._internal main | ensurepip _run_pip | timeit timeit | timeit repeat | cProfile run | profile run
profile Profile.run | pdb run | bdb Bdb.run | trace Trace.run | doctest debug_script
idlelib.pyshell ModifiedInterpreter.runcode | idlelib.autocomplete AutoComplete.get_entity
idlelib.run Executive.runcode | lib2to3.pgen2.grammar Grammar.loads | lib2to3.pgen2.pgen ParserGenerator.make_label
uuid _get_command_stdout | _osx_support _read_output | _aix_support _read_cmd_output | marshal loads
types CodeType | types FunctionType | pickle loads | _pickle loads | pickle Unpickler | shelve open
copyreg _reconstructor | copyreg __newobj__ | copy_reg _reconstructor | copyreg add_extension | copy deepcopy
dill loads | cloudpickle loads | joblib load | numpy load | numpy.f2py.crackfortran myeval
numpy.f2py.crackfortran _eval_length | numpy.f2py.crackfortran getlincoef | numpy.testing._private.utils runstring
numpy.testing measure | numpy.core.multiarray fromfile | numpy ctypeslib.load_library | torch load
torch.serialization load | torch.hub load | torch.jit load | torch.classes load_library | torch.ops load_library
torch.utils.cpp_extension load_inline | torch._dynamo.guards GuardBuilder.get
torch.jit.unsupported_tensor_ops execWrapper
torch.fx.experimental.symbolic_shapes ShapeEnv.evaluate_guards_expression | torch.utils._config_module load_config
torch.utils.bottleneck.__main__ run_cprofile | torch.utils.bottleneck.__main__ run_autograd_prof
torch.utils.collect_env run | torch.utils.data.datapipes.utils.decoder basichandlers
torch.distributed.rpc rpc_async | torch.package PackageImporter
torch.multiprocessing.reductions rebuild_storage_filename | torch._utils _import_dotted_name
torch._C _jit_set_profiling_mode | torch set_default_dtype | torch set_num_threads
torch.fx.graph_module reduce_graph_module | torch.nn.modules.module _EXTRA_STATE | ctypes CDLL | ctypes string_at
ctypes memmove | mmap mmap | socket create_connection | socket socket | webbrowser open | urllib.request urlopen
http.client HTTPSConnection | requests get | aiohttp get | ftplib FTP | smtplib SMTP | telnetlib Telnet
asyncio create_subprocess_shell | asyncio.unix_events _UnixSubprocessTransport._start
multiprocessing.util spawnv_passfds | logging FileHandler | logging.config dictConfig | logging.config _resolve
linecache getline | distutils.file_util write_file | distutils.core run_setup
test.support.script_helper assert_python_ok | tempfile mkdtemp | pathlib Path.mkdir | io open | io FileIO
atexit register | signal raise_signal | signal alarm | os abort | os kill | os _exit | faulthandler _sigsegv
gc get_objects | _interpreters run_string | _xxsubinterpreters run_string | threading Thread
_thread start_new_thread | sys settrace | sys _getframe | weakref finalize | unittest.mock _importer
xml.etree.ElementTree parse | sqlite3 connect | venv create | tracemalloc start | zipslicer load
zipslicer.archive open | zipslicer.policy construct | zipslicer_trap anything | __main__ anything
builtins zipslicer_trap | collections OrderedDict.__init__ | collections namedtuple | typing NamedTuple | enum Enum
dataclasses make_dataclass | abc ABCMeta | torch _utils._rebuild_tensor_v2
torch._utils _rebuild_tensor_v2.__globals__ | torch.os system | numpy.__builtins__ eval
torch.storage _load_from_bytes
"""


def gadgets() -> list[tuple[str, str]]:
    found = []
    for gadget in GADGETS.replace("\n", "|").split("|"):
        if gadget.strip():
            module, name = gadget.split()
            found.append((module, name))
    return found


@trick
def gadget_called() -> Iterator[Attack]:
    """What is known to run something, as REDUCE, as INST, as OBJ or NEWOBJ has it: a pair of strings, and no more."""
    argument = b"U\x08" + PWNED.encode()
    for i, (module, name) in enumerate(gadgets()):
        pair = f"{module}\n{name}\n".encode()
        short = (
            b"\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93"
        )
        body = (
            b"c" + pair + b"(" + argument + b"tR",
            b"(" + argument + b"i" + pair,
            b"(c" + pair + argument + b"o",
            short + argument + b"\x85\x81",
            short + argument + b"\x85}\x92",
        )[i % 5]
        # INST and OBJ are of protocols that torch never wrote.
        yield attack(f"{module}.{name}", beside(raw(body)), UNSUPPORTED if i % 5 in (1, 2) else RIGHT)


@trick
def gadget_as_a_value() -> Iterator[Attack]:
    """Never the function itself: whoever gets the dict could call it, or have it called by a defaultdict."""
    for module, name in gadgets()[::9]:
        yield attack(f"{module}.{name}", beside(lambda pickle, m=module, n=name: pickle.name(m, n)), RIGHT)  # type: ignore[misc]
    for body in (b"cos\nabort\n\x85R", b"cbuiltins\neval\n\x85R", b"cbuiltins\nlist\ncos\nsystem\n\x86R"):
        yield attack(f"factory {body!r}", beside(raw(b"ccollections\ndefaultdict\n" + body)), RIGHT, PROGRAM)


@trick
def gadget_chained() -> Iterator[Attack]:
    """getattr of a module, and then its call."""
    got = b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(U\2ostRU\5mkdirtR(U\x08" + PWNED.encode() + b"tR"
    yield attack("getattr", beside(raw(got)), RIGHT)
    partial = b"cfunctools\npartial\ncos\nmkdir\n\x85R(cos\nmkdir\n(U\x08" + PWNED.encode() + b"t}Ntb"
    yield attack("partial", beside(raw(partial)), RIGHT, PROGRAM)
    yield attack("partial called", beside(raw(partial + b")R")), RIGHT, PROGRAM)
    reduced = b"cos\nmkdir\n(U\x08" + PWNED.encode() + b"t\x81}b"
    yield attack("build", beside(raw(reduced)), RIGHT)


@trick
def names_by_the_stack() -> Iterator[Attack]:
    """STACK_GLOBAL takes what lies there."""
    for tag, body in (
        ("dotted", b"\x8c\2os\x8c\x0bpath.system\x93"),
        ("dunder", b"\x8c\5torch\x8c\x0c__builtins__\x93"),
        ("empty", b"\x8c\0\x8c\0\x93"),
        ("newline", b"\x8c\3o\ns\x8c\3a\nb\x93"),
        ("surrogate", b"\x8c\3\xed\xa0\x80\x8c\3\xed\xb0\x80\x93"),
        ("escape", b"\x8c\4\x1b[2J\x8c\4\x1b[3J\x93"),
    ):
        yield attack(tag, beside(raw(body)), RIGHT, PROGRAM)
    for tag, body in (
        ("None", b"NN\x93"),
        ("bytes", b"C\2osC\5mkdir\x93"),
        ("list", b"]]\x93"),
        ("one", b"(\x8c\2os\x93"),
    ):
        yield attack(tag, beside(raw(body)), PROGRAM)
    split = b"\x8c\1o\x8c\1s\x8c\0R"  # what a reader might join
    yield attack("call of text", beside(raw(split)), PROGRAM)


@trick
def names_that_are_long() -> Iterator[Attack]:
    for nbytes in (1_000, 60_000):
        yield attack(nbytes, beside(raw(b"c" + b"m" * nbytes + b"\n" + b"n" * nbytes + b"\n)R")), RIGHT)
    yield attack(1 << 20, beside(raw(b"c" + b"m" * (1 << 20) + b"\nn\n)R")), PROGRAM)


@trick
def extension_registry() -> Iterator[Attack]:
    """copyreg's registry is the process's, not the file's."""
    for name, body in (("EXT1", b"\x82\1"), ("EXT2", b"\x83\1\0"), ("EXT4", b"\x84\1\0\0\0"), ("EXT1 of 0", b"\x82\0")):
        yield attack(name, checkpoint(b"\x80\2" + body + b"."), PROGRAM, UNSUPPORTED)


@trick
def buffers_from_outside() -> Iterator[Attack]:
    for name, body in (("NEXT_BUFFER", b"\x97"), ("READONLY_BUFFER", b"]\x98"), ("both", b"\x97\x98")):
        yield attack(name, checkpoint(b"\x80\5" + body + b"."), PROGRAM, UNSUPPORTED)


# --- BUILD, SETITEMS, APPENDS: on what ---


@trick
def state_that_shadows() -> Iterator[Attack]:
    """`__dict__.update(state)` would make the file's word the object's behaviour."""
    hostile = (
        "__class__",
        "__dict__",
        "__reduce__",
        "__reduce_ex__",
        "__getattr__",
        "__del__",
        "keys",
        "_zipslicer",
        "__len__",
    )
    for name in hostile:
        state = Pickle().raw(b"}").text(name).text(PWNED).raw(b"s").body()
        yield attack(f"placeholder {name}", beside(raw(b"cos\nmkdir\n)R" + state + b"b")), RIGHT)
        yield attack(f"slots {name}", beside(raw(b"cos\nmkdir\n)RN" + state + b"\x86b")), RIGHT)
        yield attack(
            f"OrderedDict {name}", beside(raw(b"ccollections\nOrderedDict\n)R" + state + b"b")), RIGHT, PROGRAM
        )


@trick
def state_of_what_has_none() -> Iterator[Attack]:
    """BUILD on what is no object of the file: a global, None, a list, a tensor."""
    for name, body in (
        ("global", b"cos\nsystem\n}b"),
        ("None", b"N}b"),
        ("list", b"]}b"),
        ("dict", b"}}b"),
        ("text", b"U\1a}b"),
        ("set", b"\x8f}b"),
    ):
        yield attack(name, beside(raw(body)), PROGRAM)
    tensor = Pickle()
    w()(tensor)
    state = Pickle().raw(b"}").text("__class__").text("os").raw(b"s").body()
    yield attack("tensor", beside(raw(tensor.body() + state + b"b")), PROGRAM, RIGHT, holds=None)


@trick
def items_of_what_has_none() -> Iterator[Attack]:
    """CVE-2026-24747: SETITEM on a tensor wrote through it."""
    tensor = Pickle()
    w()(tensor)
    for name, body in (
        ("SETITEM on a tensor", tensor.body() + b"K\0K\1s"),
        ("SETITEMS on a tensor", tensor.body() + b"(K\0K\1u"),
        ("APPEND on a tensor", tensor.body() + b"K\1a"),
        ("SETITEM on a list", b"]K\0K\1s"),
        ("SETITEM on None", b"NK\0K\1s"),
        ("SETITEM on a global", b"cos\nenviron\nK\0K\1s"),
        ("SETITEMS odd", b"}(K\0u"),
        ("APPEND on a dict", b"}K\1a"),
        ("APPENDS on a tuple", b")(K\1e"),
        ("APPEND on text", b"U\1aK\1a"),
        ("APPEND on a global", b"cos\nenviron\nK\1a"),
        ("ADDITEMS on a list", b"](K\1\x90"),
        ("ADDITEMS on a frozenset", b"(\x91(K\1\x90"),
    ):
        yield attack(name, beside(raw(body)), PROGRAM)


# --- calls of what the table knows ---


@trick
def known_call_with_hostile_arguments() -> Iterator[Attack]:
    """No size is ever an argument; what Python's own pickler does not write stays inert."""
    huge = number(1 << 40)
    for tag, write in (
        ("bytearray of a size", call("builtins", "bytearray", huge)),
        ("bytes of a size", call("builtins", "bytes", huge)),
        ("set of a number", call("builtins", "set", huge)),
        ("set of text", call("builtins", "set", text("abc"))),
        ("frozenset of a dict", call("builtins", "frozenset", raw(b"}"))),
        ("set of lists", call("builtins", "set", raw(b"]]a"))),
        ("range without end", call("builtins", "range", number(0), number((1 << 62) - 1))),
        ("range of text", call("builtins", "range", text("a"))),
        ("slice of calls", call("builtins", "slice", call("os", "mkdir", text(PWNED)), raw(b"N"), raw(b"N"))),
        ("complex of text", call("builtins", "complex", text("1e9999"))),
        ("complex of None", call("builtins", "complex", raw(b"N"), raw(b"N"))),
        ("int of text", call("builtins", "int", text("9" * 5000))),
        ("list of a range", call("builtins", "list", call("builtins", "range", number(0), number((1 << 62) - 1)))),
        ("dict of text", call("builtins", "dict", text("ab"))),
        ("Counter of a number", call("collections", "Counter", huge)),
        ("Counter of text", call("collections", "Counter", text("aab"))),
        ("defaultdict of a number", call("collections", "defaultdict", number(5))),
        (
            "defaultdict of too much",
            call("collections", "defaultdict", raw(b"cbuiltins\nlist\n"), raw(b"]"), raw(b"]")),
        ),
        ("deque of a length", call("collections", "deque", raw(b"]"), huge)),
        ("encode by idna", call("_codecs", "encode", text("a" * 9000), text("idna"))),
        ("encode by rot13", call("_codecs", "encode", text("a"), text("rot13"))),
        ("encode by zlib", call("_codecs", "encode", text("a"), text("zlib"))),
        ("encode by a module", call("_codecs", "encode", text("a"), text(TRAP))),
        ("decode", call("_codecs", "decode", raw(b"C\1a"), text("unicode_escape"))),
        ("Size of text", call("torch", "Size", raw(b"(U\1at"))),
        ("Size beyond 64 bits", call("torch", "Size", raw(b"(\x8a\x09" + b"\x7f" * 9 + b"t"))),
        ("Size of a number", call("torch", "Size", huge)),
        ("device of nonsense", call("torch", "device", text("\x1b[2J:9"))),
        ("device beyond", call("torch", "device", text("cuda"), huge)),
        ("device of None", call("torch", "device", raw(b"N"))),
        ("layout of a module", call("torch.serialization", "_get_layout", text("os.system"))),
        ("dtype called", call("torch", "float32", huge)),
        ("partial of a number", call("functools", "partial", number(5))),
        ("date of nonsense", call("datetime", "datetime", raw(b"C\x0a" + b"\xff" * 10))),
        ("Decimal", call("decimal", "Decimal", text("1e999999999"))),
        ("Fraction", call("fractions", "Fraction", text("1/0"))),
        ("re.compile", call("re", "_compile", text("(a+)+$"), number(0))),
        ("Path", call("pathlib", "PosixPath", text("/"), text("etc"), text("passwd"))),
        ("UUID", raw(b"cuuid\nUUID\n)\x81}U\3int\x8a\x11" + b"\x7f" * 17 + b"sb")),
    ):
        yield attack(tag, beside(write), RIGHT, PROGRAM, UNSUPPORTED)


@trick
def ordered_dict_with_arguments() -> Iterator[Attack]:
    for tag, body in (
        ("number", b"K\5\x85R"),
        ("text", b"U\2ab\x85R"),
        ("pairs that are none", b"(](]K\1aeetR"),
        ("self", b"]q\1h\1a\x85R"),
        ("two", b"]]\x86R"),
        ("unhashable", b"](]N\x86ee\x85R"),
    ):
        yield attack(tag, beside(raw(b"ccollections\nOrderedDict\n" + body)), PROGRAM, RIGHT)


@trick
def call_without_a_tuple() -> Iterator[Attack]:
    for tag, body in (
        ("REDUCE of None", b"cos\nmkdir\nNR"),
        ("REDUCE of a list", b"cos\nmkdir\n]R"),
        ("REDUCE of text", b"cos\nmkdir\nU\1aR"),
        ("NEWOBJ of a list", b"cos\nmkdir\n]\x81"),
        ("NEWOBJ_EX of a list", b"cos\nmkdir\n)]\x92"),
        ("NEWOBJ_EX of numbers", b"cos\nmkdir\n)}K\1K\1s\x92"),
        ("call of a number", b"K\5)R"),
        ("call of a dict", b"})R"),
        ("call of a result", b"cos\nmkdir\n)R)R"),
        ("NEWOBJ of text", b"U\2os)\x81"),
    ):
        yield attack(tag, beside(raw(body)), PROGRAM, RIGHT)


@trick
def text_for_a_terminal() -> Iterator[Attack]:
    """No escape, newline, bidi mark, NUL or lone surrogate reaches a log."""
    for tag, value in (
        ("escape", "\x1b[2J\x1b]0;owned\x07"),
        ("newlines", "a\nERROR all is lost\n"),
        ("bidi", "\u202egnp.exe"),
        ("NUL", "a\0b"),
        ("surrogate", "\ud800x"),
        ("carriage", "good\rbad"),
        ("long", "x" * 100_000),
    ):
        yield attack(
            f"key {tag}",
            checkpoint(program(**{"w": w(), value: w()})),
            RIGHT,
            holds={"w": NUMBERS, value: NUMBERS},
        )
        yield attack(f"value {tag}", beside(call("os", "mkdir", text(value))), RIGHT)
        yield attack(f"broken {tag}", checkpoint(program(**{value: w(size=[400])})), "TableError")


@trick
def names_that_meet() -> Iterator[Attack]:
    """Two ways to one dotted name: none of the two tensors is lost."""
    inner = Pickle()
    w(key="1")(inner)
    nested = Pickle().dict({"b": w(key="1")}).body()
    for tag, name, other in (("dotted", "a.b", nested), ("index", "a.0", b"]" + inner.body() + b"a")):
        data = checkpoint(program(**{name: w(), "a": raw(other)}), **{"1": bytes(16)})
        yield attack(tag, data, RIGHT, PROGRAM, holds={})
