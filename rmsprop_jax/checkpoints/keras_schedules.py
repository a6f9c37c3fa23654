"""The learning-rate schedules of Keras, as functions of the number of calls of the optimizer, n = 0, 1, 2, ...

They are built from what ``get_config`` of an optimizer wrote for a schedule: its class and its arguments. They compute
in JAX's own float, float32 or float64 with ``jax_enable_x64``. They count in whole numbers, so that every stair and
every restart comes at the very n that the arguments say. (Keras computes in float32 when to restart. With ``t_mul=2``,
its 15th restart is one step late.)

Source: Keras 3.15, ``keras/src/optimizers/schedules/learning_rate_schedule.py``.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rmsprop_jax.arguments import check_flag, check_number, known, shown

__all__ = ["schedule_of"]

Schedule = Callable[[chex.Numeric], jax.Array]
Arguments = Mapping[str, Any]

_LARGEST_STEP = 2**31 - 1
_INSTEAD = "give the schedule, or the number that holds from here on, as learning_rate="


def schedule_of(serialized: Mapping[str, Any]) -> Schedule:
    """The schedule that a Keras config describes.

    Args:
      serialized: what the config has under ``"learning_rate"``: ``{"class_name": ..., "config": {...}}``.

    Returns:
      A function of the number of calls of the optimizer so far. It gives Keras' learning rate.

    Raises:
      TypeError: if an argument of the schedule has the wrong type.
      ValueError: if Keras has no such schedule, or an argument is missing, unknown or out of range.

    Example:
      >>> from rmsprop_jax.checkpoints.keras_schedules import schedule_of
      >>> arguments = {"initial_learning_rate": 0.1, "decay_steps": 10, "decay_rate": 0.5, "staircase": True}
      >>> schedule = schedule_of({"class_name": "ExponentialDecay", "config": arguments})
      >>> print(schedule(9), schedule(10))
      0.1 0.05
    """
    kind, arguments = serialized.get("class_name"), serialized.get("config")
    if not isinstance(kind, str) or kind not in _SCHEDULES or not isinstance(arguments, Mapping):
        raise ValueError(f"learning_rate of config is {shown(dict(serialized), 120)}, which is not here; {_INSTEAD}")
    build, required, optional = _SCHEDULES[kind]
    for name in required:
        if name not in arguments:
            raise ValueError(f"{kind} in config has no {name!r}; {_INSTEAD}")
    for name in arguments:
        if name not in (*required, *optional, "name"):
            raise ValueError(f"{kind} in config has {shown(name)}, which Keras 3 does not have; {_INSTEAD}")
    return build(kind, optional | {name: value for name, value in arguments.items() if name != "name"})


# --- The schedules -------------------------------------------------------------------------------------------


def _exponential(kind: str, a: Arguments) -> Schedule:
    """``initial · decay_rate ^ (n / decay_steps)``, with a whole exponent if ``staircase``."""
    initial, rate = _number(kind, "initial_learning_rate", a), _number(kind, "decay_rate", a)
    decays = _decays_of(kind, a)
    return lambda n: _float(initial) * _float(rate) ** decays(n)


def _inverse_time(kind: str, a: Arguments) -> Schedule:
    """``initial / (1 + decay_rate · n / decay_steps)``, with a whole quotient if ``staircase``."""
    initial, rate = _number(kind, "initial_learning_rate", a), _number(kind, "decay_rate", a)
    decays = _decays_of(kind, a)
    return lambda n: _float(initial) / (1 + _float(rate) * decays(n))


def _polynomial(kind: str, a: Arguments) -> Schedule:
    """``(initial − end) · (1 − n / decay_steps) ^ power + end``; with ``cycle``, ``decay_steps`` grows."""
    initial, end = _number(kind, "initial_learning_rate", a), _number(kind, "end_learning_rate", a)
    steps, power = _whole(kind, "decay_steps", a), _number(kind, "power", a)
    cycle = check_flag(f"cycle of {kind}", a["cycle"])

    def schedule(n: chex.Numeric) -> jax.Array:
        n = _count(n)
        cycles = jnp.maximum(1, (n - 1) // steps + 1) if cycle else 1
        done = _float(n if cycle else jnp.minimum(n, steps)) / (_float(steps) * _float(cycles))
        return (_float(initial) - _float(end)) * (1 - done) ** _float(power) + _float(end)

    return schedule


def _cosine(kind: str, a: Arguments) -> Schedule:
    """``initial · ((1 − alpha) · (1 + cos(π · n / decay_steps)) / 2 + alpha)``, after a linear warm-up if there is one.

    The warm-up goes from ``initial`` to ``warmup_target``, from where the cosine starts then.
    """
    initial, alpha = _number(kind, "initial_learning_rate", a), _number(kind, "alpha", a)
    steps = _whole(kind, "decay_steps", a)
    warms_up = a["warmup_target"] is not None
    target = _number(kind, "warmup_target", a) if warms_up else initial
    # Keras reads warmup_steps only where there is a target.
    warmup = _whole(kind, "warmup_steps", a, at_least=0) if warms_up else 0

    def schedule(n: chex.Numeric) -> jax.Array:
        n = _count(n)
        done = _float(jnp.clip(n - warmup, 0, steps)) / _float(steps)
        decayed = _float(target) * _between(alpha, 0.5 * (1 + jnp.cos(math.pi * done)))
        warming = (_float(target) - _float(initial)) * (_float(n) / _float(max(warmup, 1))) + _float(initial)
        return jnp.where(n < warmup, warming, decayed)

    return schedule


def _cosine_restarts(kind: str, a: Arguments) -> Schedule:
    """A cosine again and again, each ``t_mul`` times as long and ``m_mul`` times as high as the one before."""
    initial, alpha = _number(kind, "initial_learning_rate", a), _number(kind, "alpha", a)
    first, height = _whole(kind, "first_decay_steps", a), _number(kind, "m_mul", a)
    growth = _number(kind, "t_mul", a)
    if growth < 1 or growth != int(growth):
        raise ValueError(
            f"t_mul of {kind} in config must be a whole number ≥ 1, got {growth:g}; otherwise Keras' own rounding says "
            f"at which steps it restarts. Take another way: {_INSTEAD}"
        )
    starts, lengths = [0], [first]
    while growth > 1 and starts[-1] + lengths[-1] <= _LARGEST_STEP:
        starts, lengths = [*starts, starts[-1] + lengths[-1]], [*lengths, lengths[-1] * int(growth)]

    def schedule(n: chex.Numeric) -> jax.Array:
        n = _count(n)
        if growth == 1:
            restarts, done = n // first, _float(n % first) / _float(first)
        else:
            restarts = jnp.searchsorted(jnp.asarray(starts, jnp.int32), n, side="right") - 1
            done = _float(n - jnp.asarray(starts, jnp.int32)[restarts]) / _float(jnp.asarray(lengths, float)[restarts])
        wave = 0.5 * _float(height) ** _float(restarts) * (1 + jnp.cos(math.pi * done))
        return _float(initial) * _between(alpha, wave)

    return schedule


def _piecewise_constant(kind: str, a: Arguments) -> Schedule:
    """``values[i]`` for the first i with ``n ≤ boundaries[i]``, and the last value behind all of them."""
    lists = {name: a[name] for name in ("boundaries", "values")}
    for name, value in lists.items():
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name} of {kind} in config must be a list, got {shown(value)}")
    boundaries = [_whole(kind, "boundaries", {"boundaries": x}, at_least=0) for x in lists["boundaries"]]
    values = [_number(kind, "values", {"values": x}) for x in lists["values"]]
    if not boundaries or len(values) != len(boundaries) + 1 or sorted(set(boundaries)) != boundaries:
        raise ValueError(
            f"boundaries of {kind} in config must be at least one and rise, with one more of values, got "
            f"{shown(boundaries)} and {shown(values)}; {_INSTEAD}"
        )

    def schedule(n: chex.Numeric) -> jax.Array:
        place = jnp.searchsorted(jnp.asarray(boundaries, jnp.int32), _count(n), side="left")
        return jnp.asarray(values, float)[place]

    return schedule


# For each class: the schedule, the arguments that it needs, and the defaults of the others.
_SCHEDULES: dict[str, tuple[Callable[[str, Arguments], Schedule], tuple[str, ...], dict[str, Any]]] = {
    "ExponentialDecay": (
        _exponential,
        ("initial_learning_rate", "decay_steps", "decay_rate"),
        {"staircase": False},
    ),
    "InverseTimeDecay": (
        _inverse_time,
        ("initial_learning_rate", "decay_steps", "decay_rate"),
        {"staircase": False},
    ),
    "PolynomialDecay": (
        _polynomial,
        ("initial_learning_rate", "decay_steps"),
        {"end_learning_rate": 1e-4, "power": 1.0, "cycle": False},
    ),
    "CosineDecay": (
        _cosine,
        ("initial_learning_rate", "decay_steps"),
        {"alpha": 0.0, "warmup_target": None, "warmup_steps": 0},
    ),
    "CosineDecayRestarts": (
        _cosine_restarts,
        ("initial_learning_rate", "first_decay_steps"),
        {"t_mul": 2.0, "m_mul": 1.0, "alpha": 0.0},
    ),
    "PiecewiseConstantDecay": (_piecewise_constant, ("boundaries", "values"), {}),
}


# --- Numbers -------------------------------------------------------------------------------------------------


def _decays_of(kind: str, a: Arguments) -> Schedule:
    """``n / decay_steps``, rounded down if ``staircase``."""
    steps = _whole(kind, "decay_steps", a)
    if check_flag(f"staircase of {kind}", a["staircase"]):
        return lambda n: _float(_count(n) // steps)
    return lambda n: _float(n) / _float(steps)


def _between(alpha: float, share: jax.Array) -> jax.Array:
    """``alpha`` for a share of 0, and 1 for a share of 1."""
    return (1 - _float(alpha)) * share + _float(alpha)


def _number(kind: str, name: str, arguments: Arguments) -> float:
    """A finite number ≥ 0 among the arguments of a schedule."""
    number = known(check_number(f"{name} of {kind} in config", arguments[name]))
    if number is None or number == math.inf:
        raise ValueError(
            f"{name} of {kind} in config must be a finite number, got {shown(arguments[name])}; {_INSTEAD}"
        )
    return number


def _whole(kind: str, name: str, arguments: Arguments, at_least: int = 1) -> int:
    """A number of steps among the arguments of a schedule. Keras takes a float as well."""
    number = _number(kind, name, arguments)
    if number != int(number) or not at_least <= number <= _LARGEST_STEP:
        raise ValueError(
            f"{name} of {kind} in config must be a whole number from {at_least} to 2³¹ − 1, got {number:g}; {_INSTEAD}"
        )
    return int(number)


def _count(n: chex.Numeric) -> jax.Array:
    return jnp.asarray(n, jnp.int32)


def _float(number: chex.Numeric) -> jax.Array:
    """In JAX's own float."""
    return jnp.asarray(number, float)
