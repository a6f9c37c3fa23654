"""The state of a run in one dialect, in the units of another.

A setting is a dict of neutral terms, as in ``translation.Translation``. Averages mean the same in every dialect, except
that a bias-corrected average is 1 / (1 − alphaᵗ) times a plain one. A momentum buffer holds steps or updates, with the
learning rate or without it, added up or averaged.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax.arguments import known, shown
from rmsprop_jax.lift import one_minus_power
from rmsprop_jax.state import RMSPropState, widened

_SMALLEST = float(np.finfo(np.float32).tiny)


def _has_buffer(setting: dict[str, Any]) -> bool:
    """Whether there is a momentum buffer: not where momentum is the Python number 0."""
    momentum = setting["momentum"]
    return setting["averages_steps"] or not (isinstance(momentum, float) and momentum == 0)


def check_state(place: str, state: RMSPropState, setting: dict[str, Any]) -> None:
    """Raises unless ``state`` can be that of a run with ``setting``."""
    kept = {"grad_avg": ("centered", setting["centered"]), "momentum_buffer": ("momentum", _has_buffer(setting))}
    for name, (argument, is_kept) in kept.items():
        if state.square_avg is not None and (getattr(state, name) is not None) != is_kept:
            raise ValueError(
                f"{place}.{name} is {'None' if is_kept else 'not None'}, but {argument} is {shown(setting[argument])} "
                "in the setting that was translated; translate the one that the state belongs to"
            )
    for name in ("square_avg", *kept):
        for path, slot in jax.tree_util.tree_leaves_with_path(getattr(state, name)):
            if not jnp.issubdtype(getattr(slot, "dtype", bool), jnp.inexact):
                what = f"{place}.{name}{jax.tree_util.keystr(path)}"
                raise TypeError(f"{what} must be a floating or complex array, got {shown(slot)}")


def converted(state: RMSPropState, before: dict[str, Any], after: dict[str, Any]) -> RMSPropState:
    """The state of a run with the setting ``after``, from that of a run with ``before``."""
    if before["bias_correction"] != after["bias_correction"]:
        state = _with_other_averages(state, _weight("alpha", before["alpha"], state.step), after["bias_correction"])
    if not _has_buffer(after):
        return state._replace(momentum_buffer=None)
    if not _has_buffer(before):  # momentum is 0: the first update overwrites what is in the new buffer
        return state._replace(momentum_buffer=jax.tree.map(jnp.zeros_like, state.square_avg))
    factor: Any = after["buffer_sign"] * before["buffer_sign"] * 1.0
    if before["lr_in_buffer"] and not after["lr_in_buffer"]:
        factor = factor / _unit_of_buffer(before["lr"])
    if before["averages_steps"] != after["averages_steps"]:
        added = _weight("momentum", before["momentum"], state.step) / (1 - _float(before["momentum"]))
        factor = factor / added if after["averages_steps"] else factor * added
    if after["lr_in_buffer"] and not before["lr_in_buffer"]:
        factor = factor * _unit_of_buffer(after["lr"])
    return state._replace(momentum_buffer=jax.tree.map(lambda x: _scaled(x, factor), state.momentum_buffer))


def _with_other_averages(state: RMSPropState, weight: jax.Array, corrected: bool) -> RMSPropState:
    """The averages bias-corrected, if they are to be ``corrected``, or else plain.

    With w for ``weight`` and m̂ for the corrected ``grad_avg``::

        plain grad_avg   = w · m̂
        plain square_avg = w · corrected square_avg             + w · (1 − w) · m̂²  if centered
    """
    factor = 1 / weight if corrected else weight
    averages = jax.tree.map(lambda x: _scaled(x, factor), state[1:3])
    if state.grad_avg is not None:
        means = averages[1] if corrected else state.grad_avg
        share = weight - 1 if corrected else weight * (1 - weight)
        averages = (jax.tree.map(lambda v, m: _with_square(v, m, share), averages[0], means), averages[1])
    return state._replace(square_avg=averages[0], grad_avg=averages[1])


def _weight(name: str, constant: Any, step: jax.Array) -> jax.Array:
    """1 − constantᵗ, by which bias correction divides; 1 before the first update."""
    if callable(constant):
        raise ValueError(f"{name} must be constant for a bias correction to come or go, got a schedule")
    one_minus = 1 - float(constant) if isinstance(constant, float) else 1 - _float(constant)
    return jnp.where(step == 0, 1.0, one_minus_power(_float(constant), _float(one_minus), step))


def _float(number: Any) -> jax.Array:
    return jnp.asarray(number, jnp.float64 if getattr(number, "dtype", None) == jnp.float64 else jnp.float32)


def _unit_of_buffer(lr: Any) -> Any:
    """The learning rate that is in a buffer, or will be in it, if it is the same in all of the buffer."""
    number = known(lr)
    if callable(lr) or (number is not None and not _SMALLEST <= number <= 1 / _SMALLEST):
        got = "a schedule" if callable(lr) else f"{number:g}"
        raise ValueError(
            f"lr must be constant and not 0 (in float32) or infinite for a buffer to change its unit, got {got}"
        )
    return lr if number is None else number


def _scaled(slot: Any, factor: Any) -> jax.Array:
    """``factor · slot`` in the dtype of ``slot``, computed in float32 at least."""
    return _componentwise(lambda x: jnp.asarray(factor, x.dtype) * x, slot)


def _with_square(slot: Any, mean: Any, share: jax.Array) -> jax.Array:
    """``max(slot + share · mean², 0)``; only rounding makes it negative."""
    return _componentwise(lambda v, m: jnp.maximum(v + share.astype(v.dtype) * m.astype(v.dtype) ** 2, 0), slot, mean)


def _componentwise(function: Callable[..., jax.Array], *slots: Any) -> jax.Array:
    wide = [widened(x) for x in slots]
    if jnp.iscomplexobj(wide[0]):
        return jax.lax.complex(function(*(x.real for x in wide)), function(*(x.imag for x in wide)))
    return function(*wide).astype(slots[0].dtype)
