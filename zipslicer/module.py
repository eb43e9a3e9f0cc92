"""Module: load_into. A mapping of a file in, a module or an optimizer filled; a report before anything is read.

Bytes go straight into the memory of what is filled where it has the file's dtype and strides; else through a buffer of
bounded size, a few rows at a time. A module whose class, or hook, loads in a way of its own is asked to do it so.
Imports torch on first use.
"""

from __future__ import annotations

import collections
import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Union

from .errors import ZipSlicerError
from .lazy import Lazy, materialize
from .plan import hull
from .stream import BUDGET_NBYTES, Wanted, bar_of, nbytes_of, stream
from .table import Leaf, TensorInfo
from .tensors import bump, has_memory, torch_dtype

__all__ = ["KeyMap", "LoadReport", "load_into"]

Source = Any  # a LazyStateDict, which lies above this floor
KeyMap = Union[Callable[[Any], Any], Mapping[Any, Any]]

CHUNK_NBYTES = 16 << 20  # of what is read through a buffer
EXTRA_STATE = "_extra_state"
SHOWN = 8  # names in a message


class LoadReport(NamedTuple):
    """What load_into found, before it read anything. Lists of names, of the target and after key_map.

    missing_keys: that the target has and the file has not.
    unexpected_keys: that the file has and the target has not.
    mismatches: (name, why) of those that cannot be loaded: another shape, no tensor.
    casts: (name, dtype in the file, dtype it becomes) of those that are converted.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]
    mismatches: list[tuple[str, str]]
    casts: list[tuple[str, str, str]]


class Task(NamedTuple):
    """One tensor of the target, and where it comes from.

    target: the tensor that is filled, or that a new one stands in for.
    put: takes the new one; None where `target` is filled.
    view, position, leaf: of the file; None, OVERLAID and None for a `value` that is no part of one.
    """

    key: Any
    info: TensorInfo
    target: Any
    put: Callable[[Any], None] | None
    view: Any
    position: int
    leaf: Leaf | None
    value: Any = None


def load_into(
    source: Source,
    target: Any,
    *,
    strict: bool = True,
    assign: bool = False,
    dtype: Any = None,
    key_map: KeyMap | None = None,
    progress: bool = False,
) -> LoadReport:
    """See LazyStateDict.load_into."""
    import torch

    if source._view.framework != "pt":
        raise ValueError('load_into fills tensors of torch; open the file with framework="pt"')
    wanted = torch_dtype(torch, dtype)
    loading = _Loading(torch, _renamed(source, key_map), strict, assign, wanted, progress)
    if isinstance(target, torch.nn.Module):
        return loading.module(target)
    if isinstance(target, torch.optim.Optimizer):
        return loading.optimizer(target)
    if isinstance(target, Mapping):
        return loading.mapping(target)
    raise TypeError(f"load_into fills a module, an optimizer or a mapping of tensors, not {type(target).__name__}")


def _renamed(source: Source, key_map: KeyMap | None) -> Source:
    """A copy with other names; a name that becomes None is left out."""
    made = source.copy()
    if key_map is None:
        return made
    names = {key: key_map.get(key, key) if isinstance(key_map, Mapping) else key_map(key) for key in made}
    for key in [key for key, name in names.items() if name is None]:
        del made[key]
    return made.rename({key: name for key, name in names.items() if name is not None})


class _Loading:
    """One call of load_into."""

    def __init__(self, torch: Any, source: Source, strict: bool, assign: bool, dtype: Any, progress: bool) -> None:
        self.torch = torch
        self.source = source
        self.strict, self.assign, self.dtype, self.progress = strict, assign, dtype, progress
        self.report = LoadReport([], [], [], [])
        self.errors: list[str] = []  # as torch words them
        self.seen: dict[int, Any] = {}  # tensors of the target that have a task, by id
        self.made: dict[int, Any] = {}  # the new one that stands in for one of these

    # ---------------------------------------------------------------- what is filled
    def mapping(self, target: Mapping[Any, Any]) -> LoadReport:
        tasks: list[Task] = []
        wanted = {key: value for key, value in target.items() if isinstance(value, self.torch.Tensor)}
        for key, value in wanted.items():
            put = None
            if self.assign or value.is_meta:
                if not hasattr(target, "__setitem__"):
                    raise TypeError(f"{key!r} cannot be put into a {type(target).__name__}")
                put = _setter(target, key)
            tasks += self._tasks(self.source, key, value, put)
        self.report.unexpected_keys.extend(key for key in self.source if key not in wanted)
        self._refuse(type(target).__name__)
        self._run(tasks)
        return self.report

    def module(self, target: Any) -> LoadReport:
        """As Module.load_state_dict goes through it, in two rounds: what can be told is told before the first read."""
        rest: list[tuple[Any, str, Source]] = []
        after: list[Any] = []
        tasks: list[Task] = []
        extra: list[tuple[Any, str]] = []
        self._visit(target, "", self.source, tasks, extra, rest, after)
        self._refuse(type(target).__name__)
        self._run(tasks)
        for each, key in extra:
            each.set_extra_state(materialize(self.source[key]))
        for each, prefix, own in rest:
            self._by_itself(each, prefix, own)
        incompatible = self.torch.nn.modules.module._IncompatibleKeys(
            self.report.missing_keys, self.report.unexpected_keys
        )
        for each in after:
            for hook in each._load_state_dict_post_hooks.values():
                hook(each, incompatible)
        self._refuse(type(target).__name__)
        return self.report

    def optimizer(self, target: Any) -> LoadReport:
        """As Optimizer.load_state_dict goes about it; what has its size and dtype is filled where it is."""
        if target._optimizer_load_state_dict_pre_hooks or self._is_own_way(target):
            target.load_state_dict(self.source.materialize())
            return self.report
        groups, saved = target.param_groups, copy.deepcopy(materialize(self.source["param_groups"]))
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved]:
            raise ValueError(
                "the optimizer has other parameter groups than the file, or other numbers of parameters in them"
            )
        of_id = {
            number: (param, new)
            for group, new in zip(groups, saved)
            for param, number in zip(group["params"], new["params"])
        }
        tasks: list[Task] = []
        state: dict[Any, Any] = collections.defaultdict(dict)
        for number, values in self.source["state"].items():
            if number not in of_id:
                state[number] = materialize(values)
                continue
            param, group = of_id[number]
            state[param] = {}
            for key in values:
                tasks += self._state(target, param, group, values, key, state[param], f"state.{number}.{key}")
        self._refuse(type(target).__name__)
        self._run(tasks)
        for (param, _), made in ((pair, state[pair[0]]) for pair in of_id.values() if pair[0] in state):
            for key, value in made.items():
                if key != "step" and isinstance(value, self.torch.Tensor) and value.device != param.device:
                    made[key] = value.to(param.device)
        for group, new in zip(groups, saved):
            new["params"] = group["params"]
            if "param_names" in group:
                new.setdefault("param_names", group["param_names"])
        target.__setstate__({"state": state, "param_groups": saved})
        for hook in target._optimizer_load_state_dict_post_hooks.values():
            hook(target)
        return self.report

    def _is_own_way(self, optimizer: Any) -> bool:
        return type(optimizer).load_state_dict is not self.torch.optim.Optimizer.load_state_dict

    def _state(
        self,
        optimizer: Any,
        param: Any,
        group: Mapping[str, Any],
        values: Any,
        key: Any,
        made: dict[Any, Any],
        name: str,
    ) -> list[Task]:
        """One value of a parameter's state: filled where it is, or put into `made`."""
        torch = self.torch
        info = values.get_meta(key) if isinstance(values, Lazy) else None
        if info is None:
            made[key] = _moved(torch, param, materialize(values[key]))
            return []
        # Of torch: Optimizer._process_value_according_to_param_policy.
        is_step, is_ahead = key == "step", group.get("capturable", False) or group.get("fused", False)
        wanted = param.dtype if param.is_floating_point() else info.dtype
        if is_step:
            wanted = torch.float32 if is_ahead else info.dtype
        before = optimizer.state[param].get(key) if param in optimizer.state else None
        if isinstance(before, torch.Tensor) and tuple(before.shape) == info.shape and before.dtype == wanted:
            made[key] = before
            return self._tasks(values, key, before, None, name)
        made[key] = None  # in the order of the file
        like = torch.empty(info.shape, dtype=wanted, device="meta")
        return self._tasks(values, key, like, _setter(made, key), name)

    # ---------------------------------------------------------------- modules
    def _visit(
        self,
        module: Any,
        prefix: str,
        own: Source,
        tasks: list[Task],
        extra: list[tuple[Any, str]],
        rest: list[tuple[Any, str, Source]],
        after: list[Any],
    ) -> None:
        """Tasks for a module and those in it. `own`: the part of the source below the prefix."""
        if self._loads_by_itself(module):
            rest.append((module, prefix, own))
            after += _bottom_up(module)
            return
        buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        has = {k: v for k, v in itertools.chain(module._parameters.items(), buffers.items()) if v is not None}
        for name, value in has.items():
            put = _attribute(module, name) if self.assign or value.is_meta else None
            tasks += self._tasks(own, prefix + name, value, put)
        key = prefix + EXTRA_STATE
        has_extra = type(module).set_extra_state is not self.torch.nn.Module.set_extra_state
        if has_extra and key in own:
            extra.append((module, key))
        elif has_extra:
            self.report.missing_keys.append(key)
        below: dict[str, list[Any]] = {}
        for key in own:
            first, dot, _ = _below(key, prefix).partition(".")
            if dot and first in module._modules:
                below.setdefault(first, []).append(key)
            elif dot or not (first in has or (first == EXTRA_STATE and has_extra)):
                self.report.unexpected_keys.append(key)
        for name, child in module._modules.items():
            if child is not None:
                self._visit(child, f"{prefix}{name}.", own._part(below.get(name, ())), tasks, extra, rest, after)
        after.append(module)

    def _loads_by_itself(self, module: Any) -> bool:
        torch = self.torch
        return (
            type(module)._load_from_state_dict is not torch.nn.Module._load_from_state_dict
            or "_load_from_state_dict" in module.__dict__
            or bool(module._load_state_dict_pre_hooks)
            or torch.__future__.get_swap_module_params_on_conversion()
            or any(
                map(torch.nn.parameter.is_lazy, itertools.chain(module._parameters.values(), module._buffers.values()))
            )
        )

    def _by_itself(self, module: Any, prefix: str, own: Source) -> None:
        """Let a module load in its own way, out of a mapping that reads what it asks for. Then those in it."""
        metadata = self.source._metadata or {}
        local = dict(metadata.get(prefix[:-1], {}))
        values = itertools.chain(module._parameters.items(), module._buffers.items())
        meta = {name: each.dtype for name, each in values if each is not None and each.is_meta}
        if self.assign or meta:
            local["assign_to_params_buffers"] = True
        own = own.copy()
        report, errors = self.report, self.errors
        module._load_from_state_dict(own, prefix, local, True, report.missing_keys, report.unexpected_keys, errors)
        if not self.assign:
            for name, dtype in meta.items():  # as every other that was on the meta device: of the dtype it had
                made = getattr(module, name)
                if made.dtype != dtype and not made.is_meta:
                    is_parameter = isinstance(made, self.torch.nn.Parameter)
                    cast = made.detach().to(dtype)
                    setattr(module, name, self.torch.nn.Parameter(cast, made.requires_grad) if is_parameter else cast)
        for name, child in module._modules.items():
            if child is None:
                continue
            below = f"{prefix}{name}."
            part = own._part([key for key in own if isinstance(key, str) and key.startswith(below)])
            if self._loads_by_itself(child):
                self._by_itself(child, below, part)
                continue
            tasks: list[Task] = []
            extra: list[tuple[Any, str]] = []
            rest: list[tuple[Any, str, Source]] = []
            self._visit(child, below, part, tasks, extra, rest, [])
            self._run(tasks)
            for each, key in extra:
                each.set_extra_state(materialize(part[key]))
            for each, its_prefix, its_own in rest:
                self._by_itself(each, its_prefix, its_own)

    # ---------------------------------------------------------------- one tensor
    def _tasks(
        self, own: Source, key: Any, target: Any, put: Callable[[Any], None] | None, name: Any = None
    ) -> list[Task]:
        """What is to be done for a tensor of the target; nothing for what cannot be, or is done already. `name`: in the
        report, where that is not the key.
        """
        name, report = key if name is None else name, self.report
        if key not in own:
            report.missing_keys.append(name)
            return []
        info = own.get_meta(key)
        if info is None:
            report.mismatches.append((name, "the file has no tensor there"))
            return []
        shape = tuple(target.shape)
        if info.shape != shape and not (shape == () and info.shape == (1,)):  # torch 0.3 had no tensors of shape ()
            report.mismatches.append((name, f"the file has the shape {info.shape}, the target {shape}"))
            return []
        if put is None and not has_memory(self.torch, target):
            report.mismatches.append((name, "the storage of the target was resized, and is too small for it"))
            return []
        if id(target) in self.seen and put is None:
            return []
        self.seen[id(target)] = target
        self._note_cast(name, info, self._dtype_of(info, target, put))
        position = own._slots[key]
        if position < 0:
            return [Task(name, info, target, put, None, position, None, own._overlay[key])]
        view, position = own._view.at(position)
        return [Task(name, info, target, put, view, position, view.table.leaf(position))]

    def _dtype_of(self, info: TensorInfo, target: Any, put: Any) -> Any:
        """What a tensor of the file becomes."""
        if put is None:
            return target.dtype
        if self.dtype is not None and info.dtype.is_floating_point:
            return self.dtype
        return info.dtype if self.assign else target.dtype

    def _note_cast(self, key: Any, info: TensorInfo, wanted: Any) -> None:
        given = info.dtype
        if given == wanted:
            return
        self.report.casts.append((key, info.dtype_name, str(wanted).removeprefix("torch.")))
        is_whole = not (given.is_floating_point or given.is_complex or wanted.is_floating_point or wanted.is_complex)
        if is_whole and wanted.itemsize < given.itemsize:
            warnings.warn(f"{key!r} is narrowed from {given} to {wanted}: large values will wrap", stacklevel=5)

    # ---------------------------------------------------------------- reading
    def _run(self, tasks: Sequence[Task]) -> None:
        """Fill every target."""
        with bar_of(self.progress, sum(task.info.nbytes for task in tasks)) as bar:
            new = [task for task in tasks if task.put is not None]
            old = [task for task in tasks if task.put is None]
            straight = {id(task): memory for task in old if (memory := self._memory(task)) is not None}
            for view, some in _by_view(task for task in old if id(task) in straight):
                self._read_straight(view, some, straight, bar)
            self._read_new(new, bar)
            for task in old:
                if id(task) not in straight:
                    self._copy(task)
                    _advance(bar, task.info.nbytes)

    def _memory(self, task: Task) -> tuple[list[int], memoryview] | None:
        """For a target that the file's bytes can be read into as they are: record, start and nbytes; and its memory."""
        if task.leaf is None or tuple(task.target.shape) != task.info.shape:
            return None
        try:
            found = task.view.reader.room(task.leaf, task.target)
            if found is None:
                return None
            row, geometry, memory = found
            if hull(geometry) != task.target.numel():
                return None  # with gaps
            return [task.view.table.record(row.storage), row.storage_offset * row.itemsize, len(memory)], memory
        except ZipSlicerError as error:
            raise error.located(path=task.view.path, key=task.key) from None

    def _read_straight(
        self, view: Any, tasks: Sequence[Task], straight: Mapping[int, tuple[list[int], memoryview]], bar: Any
    ) -> None:
        """Into the memory of the targets, on threads."""
        jobs: list[int] = []
        buffers = []
        for number, task in enumerate(tasks):
            job, memory = straight[id(task)]
            jobs += (*job, number, 0)
            buffers.append(memory)
        try:
            view.reader.read_jobs(jobs, buffers, bar=bar)
        except ZipSlicerError as error:
            found = (task.key for task in tasks if error.record and task.view.is_in(task.position, error.record))
            raise error.located(path=view.path, key=next(found, None)) from None
        finally:
            for task in tasks:
                bump(self.torch, task.target)

    def _read_new(self, tasks: Sequence[Task], bar: Any) -> None:
        """New tensors in place of those of the target: read ahead, and kept."""
        by_key = {task.key: task for task in tasks}
        first = {id(task.target): task for task in reversed(tasks) if id(task.target) not in self.made}
        wanted = []
        for view, some in _by_view(first.values()):
            if view is None:
                wanted += [Wanted(task.key, 0, None, task.position, None, value=task.value) for task in some]
                continue
            for task in sorted(some, key=lambda task: task.view.place(task.position)):
                wanted.append(Wanted(task.key, nbytes_of(view, task.leaf), view, task.position, task.leaf))
        for key, value in stream(wanted, budget_nbytes=BUDGET_NBYTES):
            task = by_key[key]
            self._put(task, value)
            _advance(bar, task.info.nbytes)
        for task in tasks:  # those that share one tensor with another
            assert task.put is not None
            task.put(self.made[id(task.target)])

    def _put(self, task: Task, value: Any) -> None:
        torch, target = self.torch, task.target
        wanted = self._dtype_of(task.info, target, task.put)
        value = value.detach().to(wanted).reshape(target.shape)
        if isinstance(target, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=target.requires_grad)
        self.made[id(target)] = value

    def _copy(self, task: Task) -> None:
        """Through a buffer of CHUNK_NBYTES: to another dtype, device or layout."""
        target = task.target
        with self.torch.no_grad():
            if task.view is None:
                target.copy_(task.value.reshape(target.shape))
                return
            try:
                leaf = task.leaf
                if leaf is not None and task.view.reader.stage_into(leaf, target):
                    bump(self.torch, target)
                    return
                if leaf is None or leaf.composite is not None or task.info.nbytes <= CHUNK_NBYTES:
                    target.copy_(task.view.touch(task.position, task.key).reshape(target.shape))
                    return
                for cut in _cuts(tuple(target.shape), task.info.itemsize):
                    target[cut].copy_(task.view.reader.slice(leaf, cut))
            except ZipSlicerError as error:
                raise error.located(path=task.view.path, key=task.key) from None

    def _refuse(self, name: str) -> None:
        """Raise as Module.load_state_dict does, for what is wrong with the target, or with the file."""
        told = list(self.errors)
        missing, unexpected, mismatches, _ = self.report
        if self.strict and missing:
            told.append(f"Missing key(s) in state_dict: {_some(missing)}.")
        if self.strict and unexpected:
            told.append(f"Unexpected key(s) in state_dict: {_some(unexpected)}.")
        told += [f"{key}: {why}" for key, why in mismatches[:SHOWN]]
        if len(mismatches) > SHOWN:
            told.append(f"and {len(mismatches) - SHOWN} more that do not fit")
        if self.strict and (prefix := _prefix(missing, unexpected)):
            told.append(
                f"The names in the file begin with {prefix!r}: key_map=lambda key: key.removeprefix({prefix!r}) takes it off."
            )
        if told:
            lines = "\n\t".join(told)
            raise RuntimeError(f"Error(s) in loading state_dict for {name}:\n\t{lines}")


def _prefix(missing: Sequence[Any], unexpected: Sequence[Any]) -> str:
    """What stands before all missing names in the file, as DataParallel and compile() leave it; "" where there is none."""
    names = [key for key in unexpected if isinstance(key, str)]
    for key in names if missing and isinstance(missing[0], str) else ():
        if key.endswith(missing[0]):
            prefix = key.removesuffix(missing[0])
            return prefix if {f"{prefix}{name}" for name in missing} <= set(names) else ""
    return ""


def _cuts(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[Any, ...]]:
    """Indices that cut a tensor into parts of at most CHUNK_NBYTES."""
    below = itemsize
    for n in shape[1:]:
        below *= n
    if below > CHUNK_NBYTES and len(shape) > 1:
        for i in range(shape[0]):
            for rest in _cuts(shape[1:], itemsize):
                yield (i, *rest)
        return
    step = max(1, CHUNK_NBYTES // below)
    for i in range(0, shape[0], step):
        yield (slice(i, i + step),)


def _by_view(tasks: Iterable[Task]) -> Iterator[tuple[Any, list[Task]]]:
    """The tasks of each file, one file after the other."""
    found: dict[int, list[Task]] = {}
    for task in tasks:
        found.setdefault(id(task.view), []).append(task)
    for some in found.values():
        yield some[0].view, some


def _advance(bar: Any, nbytes: int) -> None:
    if bar is not None:
        bar.update(nbytes)


def _below(key: Any, prefix: str) -> str:
    return key[len(prefix) :] if isinstance(key, str) else str(key)


def _bottom_up(module: Any) -> list[Any]:
    """A module and those in it, in the order in which torch runs their hooks afterwards."""
    made: list[Any] = []
    for child in module._modules.values():
        if child is not None:
            made += _bottom_up(child)
    return [*made, module]


def _moved(torch: Any, param: Any, value: Any) -> Any:
    """What optimizers keep in lists and dicts of their own, to the device and dtype of the parameter."""
    if isinstance(value, torch.Tensor):
        return value.to(device=param.device, dtype=param.dtype if param.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: _moved(torch, param, each) for key, each in value.items()}
    return type(value)(_moved(torch, param, each) for each in value) if isinstance(value, (list, tuple)) else value


def _setter(target: Any, key: Any) -> Callable[[Any], None]:
    return lambda value: target.__setitem__(key, value)


def _attribute(module: Any, name: str) -> Callable[[Any], None]:
    return lambda value: setattr(module, name, value)


def _some(names: Sequence[Any]) -> str:
    shown = ", ".join(f'"{name}"' for name in names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
