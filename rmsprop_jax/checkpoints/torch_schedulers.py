"""Which learning rates come next? From the state dict of a torch scheduler to schedules. Torch is not imported.

A state dict does not name its class: its keys tell. It has a learning rate for each group of the optimizer, and some
schedulers leave numbers in the groups. :mod:`rmsprop_jax.checkpoints.curves` has the closed forms.

Source: ``torch/optim/lr_scheduler.py`` (PyTorch 2.13). What other versions add or lack is not read.
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax.arguments import check_count, shown
from rmsprop_jax.checkpoints.curves import (
    LARGEST_EPOCH,
    SHAPES,
    Curve,
    Link,
    Restarts,
    Turn,
    between,
    by_cycle,
    constant,
    cosine,
    held,
    in_turn,
    line,
    milestones,
    polynomial,
    power,
    product,
    scaled,
    side,
    sides,
    stairs,
    table,
    triangles,
    warm_restarts,
)
from rmsprop_jax.checkpoints.scheduler_file import File, item_of, number_of, whole_of

__all__ = ["schedules_of"]

_INSTEAD = "or leave the scheduler's file out and give lr=, a schedule of the number of updates"

# What all schedulers note for themselves. Some versions of torch lack some of it.
_NOTES = frozenset(
    {"base_lrs", "last_epoch", "verbose", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial"}
)


# --- From a file to schedules --------------------------------------------------------------------------------


def schedules_of(
    scheduler_state_dict: Mapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]],
    *,
    step: int,
    functions: Any = None,
    updates_per_step: int = 1,
    updates_since_step: int | None = None,
    total_steps: int | None = None,
) -> list[dict[str, optax.Schedule]]:
    """The schedules with the numbers that a torch scheduler sets from here on.

    With n for the number of updates so far::

        epoch = last_epoch + max(0, (n − step + updates_since_step) // updates_per_step)
        lr(n) = the learning rate that the scheduler sets at that epoch
        momentum(n) = the momentum, if it sets one

    The scheduler is a LambdaLR, MultiplicativeLR, StepLR, MultiStepLR, ConstantLR, LinearLR, ExponentialLR,
    PolynomialLR, CosineAnnealingLR, CosineAnnealingWarmRestarts, OneCycleLR, CyclicLR, SequentialLR, or a
    ChainedScheduler of StepLR, MultiStepLR, ConstantLR, LinearLR, ExponentialLR, PolynomialLR and at most one
    CosineAnnealingLR, with ``eta_min=0``.

    Torch multiplies the rate that it finds in a group, whoever put it there. A schedule has the rate that follows from
    the scheduler's own numbers, so the two must agree in the files. Where torch raises (a OneCycleLR after its last
    step), and where the numbers of ``functions`` end, a schedule is NaN.

    Args:
      scheduler_state_dict: what ``scheduler.state_dict()`` returned.
      param_groups: ``optimizer.state_dict()["param_groups"]``, of the same moment.
      step: the number of the optimizer's updates at that moment.
      functions: what a file cannot hold, under the name of the class: ``{"LambdaLR": lr_lambda}``,
        ``{"MultiplicativeLR": lr_lambda}`` or ``{"CyclicLR": scale_fn}``. ``lr_lambda`` may be a list, with a function
        for each group. They are called with Python numbers, as in torch. For a SequentialLR it is a list, with such a
        dict or ``None`` for each of its schedulers. The file of a CyclicLR does not tell whether there was a
        ``scale_fn``.
      updates_per_step: updates from one ``scheduler.step()`` to the next: those of an epoch if it is called once per
        epoch.
      updates_since_step: updates since the last ``scheduler.step()``, at most ``updates_per_step``: so many if the file
        was written after ``optimizer.step()`` and before ``scheduler.step()``. ``None`` means
        ``step − last_epoch · updates_per_step``, which must be less than ``updates_per_step`` then.
      total_steps: ``last_epoch`` at the end of the run, for ``functions``, whose numbers are read into a table.

    Returns:
      For each group ``{"lr": schedule}``, or ``{"lr": schedule, "momentum": schedule}``. A schedule maps a step, an
      int32 scalar, to a scalar of JAX's own float. It works under ``jit``, ``vmap`` and ``scan``.

    Raises:
      TypeError: if an argument or a part of the file has the wrong type.
      ValueError: if the file is not of one of these classes (ReduceLROnPlateau is none of them), a number is out of
        its range, or the file does not agree with ``param_groups`` or ``step``. The message names it.

    Example:
      >>> from rmsprop_jax.checkpoints.torch_schedulers import schedules_of
      >>> step_lr = {"step_size": 30, "gamma": 0.1, "base_lrs": [0.01], "last_epoch": 59}
      >>> [group] = schedules_of(step_lr, [{"lr": 0.001}], step=5940, updates_per_step=100)
      >>> print(f"{group['lr'](5999):.6f} {group['lr'](6000):.6f}")
      0.001000 0.000100

    Source:
      ``torch/optim/lr_scheduler.py`` (PyTorch 2.13).
    """
    updates = whole_of("step", step, 0, 2**31 - 1)
    size = check_count("updates_per_step", updates_per_step)
    last = None if total_steps is None else whole_of("total_steps", total_steps, 0, LARGEST_EPOCH)
    groups = _checked_groups(param_groups)
    scheduler = _read(File("scheduler_state_dict", scheduler_state_dict, groups, functions, last))
    since = _updates_since_step(updates, scheduler.epoch, size, updates_since_step)
    _check_agreement(scheduler, groups)

    def in_updates(curve: Curve) -> optax.Schedule:
        def schedule(count: Any) -> jax.Array:
            made = (jnp.asarray(count, jnp.int32) + (since - updates)) // size
            return curve(scheduler.epoch + jnp.clip(made, 0, LARGEST_EPOCH - 1))

        return schedule

    curves = {"lr": scheduler.lr} | ({} if scheduler.momentum is None else {"momentum": scheduler.momentum})
    return [{key: in_updates(curves[key][index]) for key in curves} for index in range(len(groups))]


def _checked_groups(param_groups: Any) -> list[Mapping[str, Any]]:
    if not isinstance(param_groups, list | tuple) or not all(isinstance(group, Mapping) for group in param_groups):
        raise TypeError(
            "param_groups must be the list of dicts optimizer.state_dict()['param_groups'], got " + shown(param_groups)
        )
    if not param_groups:
        raise ValueError("param_groups is empty; give optimizer.state_dict()['param_groups']")
    return list(param_groups)


def _updates_since_step(updates: int, epoch: int, size: int, given: int | None) -> int:
    if given is not None:
        return whole_of("updates_since_step", given, 0, size)
    since = updates - epoch * size
    if not 0 <= since < size:
        raise ValueError(
            f"the optimizer has made {updates} updates and the scheduler {epoch} steps, which does not fit "
            f"updates_per_step={size}: then step would be from {epoch * size} to {(epoch + 1) * size - 1}; give "
            "updates_per_step, the updates from one scheduler.step() to the next, or updates_since_step, those since "
            "the last one"
        )
    return since


def _check_agreement(scheduler: "_Scheduler", groups: list[Mapping[str, Any]]) -> None:
    """Raises unless each group has the learning rate and the momentum that the scheduler has at its epoch."""
    for key, curves in (("lr", scheduler.lr), ("momentum", scheduler.momentum or ())):
        for index, curve in enumerate(curves):
            found = number_of(
                f"{key!r} of group {index}", item_of(f"group {index} of param_groups", groups[index], key)
            )
            with jax.ensure_compile_time_eval():
                expected = float(curve(jnp.asarray(scheduler.epoch, jnp.int32)))
            if not math.isclose(found, expected, rel_tol=1e-5, abs_tol=1e-12):  # float32 here, torch's recursion there
                raise ValueError(
                    f"{key!r} of group {index} is {found:.7g}, but {scheduler.name} has {expected:.7g} at last_epoch "
                    f"{scheduler.epoch}; it was set by hand, or the files are not of one moment: put the right number "
                    f"into the group, {_INSTEAD}"
                )


# --- Which class? ---------------------------------------------------------------------------------------------


class _Scheduler(NamedTuple):
    """What a file says.

    Attributes:
      name: of torch's class.
      epoch: its ``last_epoch``.
      lr: for each group the learning rate, a curve.
      momentum: likewise; ``None`` if the scheduler leaves it alone.
      factor: what the first learning rates are multiplied by, if that is all that the scheduler does.
      length: of the cosine, if the factor is one.
    """

    name: str
    epoch: int
    lr: list[Curve]
    momentum: list[Curve] | None = None
    factor: Curve | None = None
    length: int | None = None


def _read(file: File) -> _Scheduler:
    """Recognizes a state dict by its keys, and reads it."""
    if not isinstance(file.items, Mapping) or not all(isinstance(key, str) for key in file.items):
        raise TypeError(f"{file.where} must be what scheduler.state_dict() returns, got {shown(file.items)}")
    if {"patience", "num_bad_epochs"} <= set(file.items):
        raise ValueError(
            f"{file.where} is of ReduceLROnPlateau, which follows what the run measures, so no schedule can; continue "
            "it with optax.contrib.reduce_on_plateau as docs/pytorch.md says under 'A learning-rate scheduler'"
        )
    keys = set(file.items) - _NOTES
    found = [kind for kind in _KINDS if kind.keys <= keys <= kind.keys | kind.more]
    if len(found) != 1:
        raise ValueError(
            f"{file.where} must have the keys of {', '.join(kind.name for kind in _KINDS)}, got "
            f"{shown(sorted(keys), 200)}; give what scheduler.state_dict() returns, {_INSTEAD}"
        )
    if file.functions is not None and found[0].read not in _TAKE_FUNCTIONS:
        raise ValueError(
            f"functions must be None for {file.where}, a {found[0].name}, which has none, got {shown(file.functions)}"
        )
    if "base_lrs" in file.items:
        file.per_group("base_lrs")  # OneCycleLR has them too, and does not use them
    return found[0].read(file)


# --- One scheduler --------------------------------------------------------------------------------------------


def _multiplied(name: str, file: File, factor: Curve) -> _Scheduler:
    return _Scheduler(name, file.epoch(), [scaled(base, factor) for base in file.per_group("base_lrs")], factor=factor)


def _step_lr(file: File) -> _Scheduler:
    return _multiplied("StepLR", file, stairs(file.number("gamma", above=0.0), file.count("step_size")))


def _multi_step_lr(file: File) -> _Scheduler:
    what, given = file.named("milestones"), item_of(file.where, file.items, "milestones")
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} must be a dict from epochs to how often each was given, got {shown(given)}")
    epochs = {key: whole_of(what, key, 0, LARGEST_EPOCH) for key in given}
    counts = {epochs[key]: whole_of(f"{what} at {epochs[key]}", count, 0, 1000) for key, count in given.items()}
    return _multiplied("MultiStepLR", file, milestones(file.number("gamma", above=0.0), counts))


def _constant_lr(file: File) -> _Scheduler:
    factor = held(file.number("factor", above=0.0, most=1.0), file.count("total_iters"))
    return _multiplied("ConstantLR", file, factor)


def _linear_lr(file: File) -> _Scheduler:
    start, end = file.number("start_factor", above=0.0, most=1.0), file.number("end_factor", least=0.0, most=1.0)
    return _multiplied("LinearLR", file, line(start, end, file.count("total_iters")))


def _exponential_lr(file: File) -> _Scheduler:
    return _multiplied("ExponentialLR", file, power(file.number("gamma", above=0.0)))


def _polynomial_lr(file: File) -> _Scheduler:
    return _multiplied("PolynomialLR", file, polynomial(file.number("power", least=0.0), file.count("total_iters")))


def _cosine_annealing_lr(file: File) -> _Scheduler:
    lowest, length = file.number("eta_min", least=0.0), file.count("T_max")
    curves = [between(lowest, base, cosine(length)) for base in file.per_group("base_lrs")]
    read = _Scheduler("CosineAnnealingLR", file.epoch(), curves)
    return read if lowest else read._replace(factor=cosine(length), length=length)


def _cosine_annealing_warm_restarts(file: File) -> _Scheduler:
    lowest, cycles = file.number("eta_min", least=0.0), Restarts(file.count("T_0"), file.count("T_mult"))
    for key, expected in zip(("T_cur", "T_i"), cycles.at(file.epoch()), strict=True):
        found = item_of(file.where, file.items, key)
        if type(found) is not int or found != expected:  # step(epoch) makes them floats
            raise ValueError(
                f"{file.named(key)} must be {expected}, since last_epoch is {file.epoch()}, got {shown(found)}; if the "
                f"scheduler was driven by step(epoch), give lr=, a schedule of the number of updates"
            )
    curves = [between(lowest, base, warm_restarts(cycles)) for base in file.per_group("base_lrs")]
    return _Scheduler("CosineAnnealingWarmRestarts", file.epoch(), curves)


def _one_cycle_lr(file: File) -> _Scheduler:
    total, shape, phases = (
        file.count("total_steps"),
        file.choice("_anneal_func_type", tuple(SHAPES)),
        file.parts("_schedule_phases"),
    )
    stops = [phase.number("end_step") for phase in phases]
    begins = [0.0, *stops[:-1]]
    if stops[-1] != total - 1 or any(begin == stop for begin, stop in zip(begins, stops, strict=True)):
        raise ValueError(
            f"'end_step' of {file.where}['_schedule_phases'] must be total_steps − 1 = {total - 1} in the last phase, "
            f"and in none where it begins (torch divides by 0 there), got {shown(stops)}"
        )

    def along(of: str, names: tuple[str, ...]) -> list[Curve]:
        ends = [phase.from_groups(phase.choice(f"end_{of}", names)) for phase in phases]
        starts = [phase.from_groups(phase.choice(f"start_{of}", names)) for phase in phases]
        left = [side(begin, stop, shape) for begin, stop in zip(begins, stops, strict=True)]
        return [
            sides(stops, total, [between(*corner) for corner in zip(*numbers, left, strict=True)])
            for numbers in zip(zip(*ends, strict=True), zip(*starts, strict=True), strict=True)
        ]

    rates = along("lr", ("initial_lr", "max_lr", "min_lr"))
    momenta = along("momentum", ("max_momentum", "base_momentum")) if _moves_momentum(file) else None
    return _Scheduler("OneCycleLR", file.epoch(), rates, momenta)


def _cyclic_lr(file: File) -> _Scheduler:
    size, ratio = (
        file.number("total_size", above=0.0, most=LARGEST_EPOCH),
        file.number("step_ratio", above=0.0, most=1.0),
    )
    whole = int(size) if size == int(size) else size  # int32s have an exact remainder
    height = triangles(whole, ratio * size, _scale_of_triangles(file, whole))
    pairs = zip(file.per_group("base_lrs"), file.per_group("max_lrs"), strict=True)
    read = _Scheduler("CyclicLR", file.epoch(), [between(*pair, height) for pair in pairs])
    if not _moves_momentum(file):
        return read
    pairs = zip(file.per_group("max_momentums"), file.per_group("base_momentums"), strict=True)
    return read._replace(momentum=[between(*pair, height) for pair in pairs])


def _scale_of_triangles(file: File, size: float) -> Curve:
    """``scale_fn`` of the cycle, counted from 1, or of the epoch."""
    mode, gamma = file.choice("mode", ("triangular", "triangular2", "exp_range")), file.number("gamma", above=0.0)
    cycles, saved = file.choice("scale_mode", ("cycle", "iterations")) == "cycle", file.items.get("_scale_fn_custom")
    if file.functions is None and saved is None:
        scale = power({"triangular": 1.0, "triangular2": 0.5, "exp_range": gamma}[mode])
        return by_cycle(size, scale) if cycles else scale
    _, (function,) = _functions(file, ("CyclicLR",), [saved])
    if not cycles:
        return table(_values(file, function))
    last = None if file.last is None else int(file.last // size)
    return by_cycle(size, table(_values(file._replace(last=last), lambda cycle: function(cycle + 1))))


def _moves_momentum(file: File) -> bool:
    moves = bool(file.choice("cycle_momentum", (True, False)))
    if moves and file.choice("use_beta1", (True, False)):
        raise ValueError(f"{file.where} moves 'betas', which RMSprop does not have; give the file of its own scheduler")
    return moves


def _lambda_lr(file: File) -> _Scheduler:
    bases, saved = file.per_group("base_lrs"), file.sequence("lr_lambdas")
    name, functions = _functions(file, ("LambdaLR", "MultiplicativeLR"), saved)
    if len(functions) != len(bases):
        raise ValueError(f"{file.named('lr_lambdas')} has {len(saved)} entries for {len(bases)} groups; give one file")
    if name == "LambdaLR":
        factors = [table(_values(file, function)) for function in functions]
    else:
        factors = [table(np.cumprod([1.0, *_values(file, function, first=1)])) for function in functions]
    return _Scheduler(name, file.epoch(), [scaled(*pair) for pair in zip(bases, factors, strict=True)])


# --- Functions that a file cannot hold ----------------------------------------------------------------------


def _functions(file: File, names: tuple[str, ...], saved: Sequence[Any]) -> tuple[str, list[Callable[[Any], Any]]]:
    """The name under which functions were given, and a function for each entry of the file."""
    given = file.functions
    if not isinstance(given, Mapping) or len(given) != 1 or not set(given) <= set(names):
        raise TypeError(
            f"functions must be {' or '.join(f'{{{name!r}: function}}' for name in names)} for {file.where}, with what "
            f"the scheduler was made with, since torch saves no function, got {shown(given)}"
        )
    ((name, value),) = given.items()
    functions = list(value) if isinstance(value, list | tuple) else [value] * len(saved)
    if len(functions) != len(saved) or not all(map(callable, functions)):
        raise TypeError(f"functions[{name!r}] must be a function or a list of {len(saved)}, got {shown(value)}")
    return name, [_restored(name, *pair) for pair in zip(functions, saved, strict=True)]


def _restored(name: str, function: Callable[[Any], Any], attributes: Any) -> Callable[[Any], Any]:
    """A function as it is; a copy of a callable object, with the attributes that torch saved of it."""
    if attributes is None or attributes == {}:
        return function
    if not isinstance(attributes, Mapping) or inspect.isfunction(function) or not hasattr(function, "__dict__"):
        raise TypeError(
            f"functions[{name!r}] must be an object with a __call__, since the file has attributes of one, "
            f"{shown(attributes)}, got {shown(function)}"
        )
    restored = copy.copy(function)
    restored.__dict__.update(attributes)
    return restored


def _values(file: File, function: Callable[[Any], Any], first: int = 0) -> list[float]:
    if file.last is None:
        raise ValueError(
            "total_steps must be given with functions, whose numbers are read into a table, got None; give last_epoch "
            "at the end of the run"
        )
    return [_value(f"functions of {file.where} at {n}", function, n) for n in range(first, file.last + 1)]


def _value(what: str, function: Callable[[Any], Any], n: int) -> float:
    try:
        value = function(n)
    except Exception as error:  # it may be one of attributes that the file has
        raise ValueError(f"{what} must be a finite number, got the error {shown(error)}") from error
    return number_of(what, value)


# --- Several schedulers in one --------------------------------------------------------------------------------


def _members(file: File) -> list[File]:
    parts = file.parts("_schedulers")
    functions = [None] * len(parts) if file.functions is None else file.functions
    if not isinstance(functions, list | tuple) or len(functions) != len(parts):
        raise TypeError(
            f"functions must be a list of {len(parts)} for {file.where}, a dict or None for each of its schedulers, "
            f"got {shown(functions)}"
        )
    return [part._replace(functions=own) for part, own in zip(parts, functions, strict=True)]


def _sequential_lr(file: File) -> _Scheduler:
    """Schedulers that are over are not read. Each later one starts anew at its milestone."""
    members, now, what = _members(file), file.epoch(), file.named("_milestones")
    ends = [whole_of(what, end, 0, LARGEST_EPOCH) for end in file.sequence("_milestones")]
    if ends != sorted(ends) or len(ends) != len(members) - 1:
        raise ValueError(f"{what} must rise, one less than the {len(members)} schedulers, got {shown(ends)}")
    active = sum(end <= now for end in ends)
    turns: list[tuple[Turn, _Scheduler]] = []
    for member, start, stop in zip(members[active:], [now, *ends[active:]], [*ends[active:], None], strict=True):
        begun = start == now and not turns
        turns.append(_turn(member._replace(begun=begun), start, stop, file.last))
    rates = [
        in_turn([turn._replace(curve=read.lr[group]) for turn, read in turns]) for group in range(len(file.groups))
    ]
    moving = [(turn, read.momentum) for turn, read in turns if read.momentum is not None]
    momenta = [
        in_turn([Turn(now, now, 0, constant(first)), *(turn._replace(curve=own[group]) for turn, own in moving)])
        for group, first in enumerate(file.from_groups("momentum") if moving else [])
    ]
    return _Scheduler("SequentialLR", now, rates, momenta or None)


def _turn(member: File, start: int, end: int | None, last: int | None) -> tuple[Turn, _Scheduler]:
    """When a scheduler is stepped, up to but not including ``end``, and what it says."""
    own, stop = member.epoch(), last if end is None else end - 1
    read = _read(member._replace(last=None if stop is None else own + stop - start))
    if not member.begun and read.name in ("SequentialLR", "ChainedScheduler", "MultiplicativeLR"):
        raise ValueError(
            f"{member.where} must not be a {read.name}, which follows from the learning rates before it; {_INSTEAD}"
        )
    return Turn(start, LARGEST_EPOCH if end is None else end - 1, own - start, read.lr[0]), read


def _chained_scheduler(file: File) -> _Scheduler:
    files = file.parts("_schedulers")
    members = [_read(part) for part in files]
    links = [Link(read.factor, read.epoch - file.epoch(), read.length) for read in members if read.factor is not None]
    if len(links) < len(members) or sum(link.length is not None for link in links) > 1:
        raise ValueError(
            f"{file.where} must chain schedulers that multiply the learning rate by numbers in their files, at most "
            "one CosineAnnealingLR among them, with eta_min=0, got "
            f"{', '.join(read.name for read in members)}; {_INSTEAD}"
        )
    bases = [part.per_group("base_lrs") for part in files]
    if any(base != bases[0] for base in bases):
        raise ValueError(f"{file.where} must chain schedulers of the same 'base_lrs', got {shown(bases)}; {_INSTEAD}")
    return _multiplied("ChainedScheduler", files[0], product(links))


# --- The keys of each class -----------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """A class of torch, or two that write the same keys.

    Attributes:
      name: of the class.
      read: what reads its state dict.
      keys: those that each of its state dicts has, apart from the notes of all schedulers.
      more: those that some have.
    """

    name: str
    read: Callable[[File], _Scheduler]
    keys: frozenset[str]
    more: frozenset[str]


def _kind(name: str, read: Callable[[File], _Scheduler], keys: str, more: str = "") -> _Kind:
    return _Kind(name, read, frozenset(keys.split()), frozenset(more.split()))


_TAKE_FUNCTIONS = (_lambda_lr, _cyclic_lr, _sequential_lr)
_CYCLIC = "total_size step_ratio max_lrs mode gamma scale_mode cycle_momentum"
_SOME_CYCLIC = "base_momentums max_momentums use_beta1 _scale_fn_custom _scale_fn_ref"
_ONE_CYCLE = "total_steps _schedule_phases _anneal_func_type cycle_momentum"
_KINDS = (
    _kind("LambdaLR or MultiplicativeLR", _lambda_lr, "lr_lambdas"),
    _kind("StepLR", _step_lr, "step_size gamma"),
    _kind("MultiStepLR", _multi_step_lr, "milestones gamma"),
    _kind("ConstantLR", _constant_lr, "factor total_iters"),
    _kind("LinearLR", _linear_lr, "start_factor end_factor total_iters"),
    _kind("ExponentialLR", _exponential_lr, "gamma"),
    _kind("PolynomialLR", _polynomial_lr, "total_iters power"),
    _kind("CosineAnnealingLR", _cosine_annealing_lr, "T_max eta_min"),
    _kind("CosineAnnealingWarmRestarts", _cosine_annealing_warm_restarts, "T_0 T_i T_mult T_cur eta_min"),
    _kind("OneCycleLR", _one_cycle_lr, _ONE_CYCLE, "use_beta1"),
    _kind("CyclicLR", _cyclic_lr, _CYCLIC, _SOME_CYCLIC),
    _kind("SequentialLR", _sequential_lr, "_schedulers _milestones"),
    _kind("ChainedScheduler", _chained_scheduler, "_schedulers"),
)
