"""The pieces of work that are timed: what each is called, on which file, and who takes part."""

from __future__ import annotations

import random
import time
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from contestants import (
    DIRECT,
    LIBRARIES,
    ONE_THREAD,
    RAW,
    RAW_ONE_THREAD,
    WHOLE_THEN_SLICE,
    Contestant,
    RawRead,
)
from make_files import EMBEDDING, HIDDEN, LAYERS, MANY, OTHER_COUNTS, OTHER_LAYERS, model_shapes

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL_READS = 2000  # timed, of distinct random keys
SMALL_READS_BEFORE = 50  # of other keys, not timed
ROWS = slice(1000, 1500)
COLUMNS = slice(0, HIDDEN // 2)
SOME_LAYERS = ("model.layers.11.", "model.layers.29.")
ONE_MATRIX = "model.layers.0.self_attn.o_proj.weight"  # 8.4 MB

Timed = tuple[float, Any]  # seconds, and what the work gave: tensors by name, keys, or a number that stands for them
Prepared = Any  # what `before` gave


class Case(NamedTuple):
    """One column of the tables, or one point of a plot."""

    title: str
    file: str
    work: Callable[[Contestant, str, int, Prepared], Timed]
    takes_part: tuple[str, ...] = LIBRARIES
    before: Callable[[], Prepared] | None = None  # before the clock, and before memory is touched
    fills: bool = False  # takes about as much memory as the file has bytes
    cold: bool = False  # the file is thrown out of the page cache first
    processes: int = 1  # that do the same at the same time; the slowest counts
    most_samples: int | None = None  # points of a plot need fewer
    pairs: tuple[str, ...] = ()  # those whose ratio is a promise: at least PAIRS samples of them


PAIRS = 9


def timed(work: Callable[[], Any]) -> Timed:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def keys(contestant: Contestant, path: str, _seed: int, _prepared: Prepared) -> Timed:
    return timed(lambda: contestant.keys(path))


def one(contestant: Contestant, path: str, seed: int, _prepared: Prepared) -> Timed:
    chosen = random.Random(seed).sample(sorted(contestant.keys(path)), SMALL_READS_BEFORE + SMALL_READS)
    get = contestant.getter(path)
    kept = [get(key) for key in chosen[:SMALL_READS_BEFORE]]
    chosen = chosen[SMALL_READS_BEFORE:]
    kept.clear()
    start = time.perf_counter()
    for key in chosen:
        kept.append(get(key))  # noqa: PERF401 a loop, as users write it
    return (time.perf_counter() - start) / SMALL_READS, dict(zip(chosen, kept, strict=True))


def whole(contestant: Contestant, path: str, _seed: int, _prepared: Prepared) -> Timed:
    return timed(lambda: contestant.whole(path))


def small(contestant: Contestant, path: str, _seed: int, _prepared: Prepared) -> Timed:
    return timed(lambda: contestant.small(path))


def some(contestant: Contestant, path: str, _seed: int, _prepared: Prepared) -> Timed:
    return timed(lambda: contestant.some(path, lambda key: key.startswith(SOME_LAYERS)))


def first_layers(count: int) -> Callable[..., Timed]:
    prefixes = tuple(f"model.layers.{layer}." for layer in range(count))
    return lambda contestant, path, *_: timed(lambda: contestant.some(path, lambda key: key.startswith(prefixes)))


def matrix(contestant: Contestant, path: str, _seed: int, _prepared: Prepared) -> Timed:
    return timed(lambda: {ONE_MATRIX: contestant.getter(path)(ONE_MATRIX)})


def rows(contestant: Contestant, path: str, _seed: int, _prepared: Prepared) -> Timed:
    return timed(lambda: {EMBEDDING: contestant.rows(path, EMBEDDING, ROWS)})


def columns(contestant: Contestant, path: str, _seed: int, _prepared: Prepared) -> Timed:
    return timed(lambda: {EMBEDDING: contestant.columns(path, EMBEDDING, COLUMNS)})


def stream(contestant: Contestant, path: str, _seed: int, _prepared: Prepared) -> Timed:
    def work() -> dict[str, tuple[Any, ...]]:
        seen = {}
        for key, tensor in contestant.stream(path):
            seen[key] = (tensor.nbytes, str(tensor.dtype), *tensor.shape, tensor.view(-1)[-1].item())
            del tensor
        return seen

    seconds, seen = timed(work)
    return seconds, (zlib.crc32(repr(sorted(seen.items())).encode()), sum(facts[0] for facts in seen.values()))


def touched_model() -> torch.nn.Module:
    """A module that has the parameters of model.pth, all written to."""
    root = torch.nn.Module()
    for key, (shape, dtype) in model_shapes().items():
        *path, name = key.split(".")
        module = root
        for step in path:
            if step not in module._modules:
                module.add_module(step, torch.nn.Module())
            module = module.get_submodule(step)
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        parameter.fill_(1.0)
        module.register_parameter(name, parameter)
    return root


def load_into(contestant: Contestant, path: str, _seed: int, model: torch.nn.Module) -> Timed:
    seconds, _ = timed(lambda: contestant.load_into(path, model))
    return seconds, model.state_dict()


def without(*names: str) -> tuple[str, ...]:
    return tuple(name for name in LIBRARIES if name not in names)


IN_PLOTS = ("native", "pure", "torch.load(mmap)", "safetensors mmap", "fabric _lazy_load", "zipslicer 0.8.1")

CASES = {
    "keys": Case("open, list 10,000 keys", "many", keys),
    "one": Case("one small tensor, random", "many", one, without("torch.load")),
    "small": Case("10,000 small tensors ³", "many", small),
    # 0.8.1 seeks through the whole directory for each tensor: minutes.
    "small_100000": Case("100,000 small tensors ³", "many_100000", small, without("zipslicer 0.8.1"), fills=True),
    "whole": Case(
        "2.3 GB, whole",
        "model",
        whole,
        (*LIBRARIES, ONE_THREAD, RAW, RAW_ONE_THREAD),
        fills=True,
        pairs=("native", RAW),
    ),
    "some": Case("103 MB of it", "model", some, (*LIBRARIES, RAW), pairs=("native", RAW)),
    "rows": Case("2 MB: rows of a 131 MB matrix", "model", rows),
    "columns": Case("half of its columns", "model", columns, (*LIBRARIES, WHOLE_THEN_SLICE, RAW)),
    "stream": Case("2.3 GB, each tensor dropped", "model", stream),
    "load_into": Case(
        "2.3 GB into a model", "model", load_into, (*LIBRARIES, RAW), before=touched_model, pairs=("native", RAW)
    ),
    "two": Case("2.3 GB, two processes at once", "model", whole, without("zipslicer 0.8.1"), fills=True, processes=2),
    "cold": Case(
        "2.3 GB, whole, cold", "model", whole, (*LIBRARIES, DIRECT, RAW), fills=True, cold=True, pairs=("native", RAW)
    ),
    "cold_some": Case("103 MB of it, cold", "model", some, cold=True),
    **{
        f"keys_{count}": Case(f"open, list {count:,} keys", f"many_{count}", keys, IN_PLOTS, most_samples=3)
        for count in OTHER_COUNTS
    },
    **{
        f"matrix_{count}": Case(
            f"one matrix of 8.4 MB out of a file of {52 * count} MB",
            f"layers_{count}" if count != LAYERS else "model",
            matrix,
            (*IN_PLOTS, "torch.load"),
            fills=True,
            most_samples=3,
        )
        for count in (*OTHER_LAYERS, LAYERS)
    },
    **{
        f"layers_{count}": Case(
            f"{52 * count} MB out of 2.3 GB", "model", first_layers(count), IN_PLOTS, fills=True, most_samples=3
        )
        for count in (*OTHER_LAYERS, LAYERS)
    },
}
assert MANY not in OTHER_COUNTS  # the case "keys" is that point


def rehearse(contestant: Contestant, path: str) -> None:
    """Every kind of work on a tiny file: what a library imports or sets up once belongs to no sample."""
    if isinstance(contestant, RawRead):
        contestant.whole(path)
        return
    contestant.keys(path)
    if contestant.lazy:
        contestant.getter(path)("a")
    contestant.whole(path)
    contestant.some(path, lambda key: key == "b")
    contestant.rows(path, "a", slice(1, 2))
    contestant.small(path)
    contestant.columns(path, "a", slice(0, 2))
    list(contestant.stream(path))
    module = torch.nn.Module()
    for key, tensor in contestant.whole(path).items():
        module.register_parameter(key, torch.nn.Parameter(tensor, requires_grad=False))
    contestant.load_into(path, module)
