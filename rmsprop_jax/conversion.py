"""The state of a run in one dialect, in the units of another.

A setting is a dict of neutral terms, as in ``translation.Translation``. Averages mean the same in every dialect, except
that a bias-corrected average is a plain one without its start, divided by 1 − alphaᵗ. A momentum buffer holds steps or
updates, with the learning rate or without it, added up or averaged.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rmsprop_jax.arguments import SMALLEST_NORMAL, is_zero, known, shown
from rmsprop_jax.lift import one_minus, one_minus_power
from rmsprop_jax.state import RMSPropState, componentwise, step_of, widened
from rmsprop_jax.trees import checked_step


def has_buffer(setting: dict[str, Any]) -> bool:
    """Whether there is a momentum buffer. Dialects that add the steps up have none if momentum is the number 0."""
    return setting["averages_steps"] or not is_zero(setting["momentum"])


def check_state(place: str, state: RMSPropState, setting: dict[str, Any]) -> None:
    """Raises unless ``state`` can be that of a run with ``setting``."""
    kept = {"grad_avg": ("centered", setting["centered"]), "momentum_buffer": ("momentum", has_buffer(setting))}
    for name, (argument, is_kept) in kept.items():
        if state.square_avg is not None and (getattr(state, name) is not None) != is_kept:
            there = "None" if is_kept else "not None"
            raise ValueError(
                f"{place}.{name} is {there}, which does not fit {argument}={shown(setting[argument])} in the setting "
                "that was translated; translate the one that the state belongs to"
            )
    for name in ("square_avg", *kept):
        for path, slot in jax.tree_util.tree_leaves_with_path(getattr(state, name)):
            if not jnp.issubdtype(getattr(slot, "dtype", bool), jnp.inexact):
                what = f"{place}.{name}{jax.tree_util.keystr(path)}"
                raise TypeError(f"{what} must be a floating or complex array, got {shown(slot)}")


def converted(state: RMSPropState, before: dict[str, Any], after: dict[str, Any]) -> RMSPropState:
    """The state of a run with the setting ``after``, from that of a run with ``before``.

    Only what depends on the step needs one state at a time. A change of the buffer's unit serves a stack of them, too.
    """
    if before["bias_correction"] != after["bias_correction"]:
        state = _with_other_averages(state, checked_step(step_of(state)), before, after)
    if not has_buffer(after):
        return state._replace(momentum_buffer=None)
    if not has_buffer(before):  # momentum is 0: the first update overwrites what is in the new buffer
        return state._replace(momentum_buffer=jax.tree.map(jnp.zeros_like, state.square_avg))
    factor: Any = after["buffer_sign"] * before["buffer_sign"] * 1.0
    if before["lr_in_buffer"] and not after["lr_in_buffer"]:
        factor = factor / _unit_of_buffer(before["lr"])
    if before["averages_steps"] != after["averages_steps"]:
        step = checked_step(step_of(state))
        weight = _weight("momentum", before["momentum"], step)
        added = jnp.where(step == 0, 1.0, weight) / one_minus(before["momentum"])
        factor = factor / added if after["averages_steps"] else factor * added
    if after["lr_in_buffer"] and not before["lr_in_buffer"]:
        factor = factor * _unit_of_buffer(after["lr"])
    return state._replace(momentum_buffer=jax.tree.map(lambda x: _scaled(x, factor), state.momentum_buffer))


def _with_other_averages(
    state: RMSPropState, step: jax.Array, before: dict[str, Any], after: dict[str, Any]
) -> RMSPropState:
    """The averages with bias correction, if ``after`` has it, or else without.

    With w = 1 − alphaᵗ, V and m̂ for the corrected averages, and the start of the plain ``square_avg``::

        plain grad_avg   = w · m̂
        plain square_avg = w · V + (1 − w) · start      + w · (1 − w) · m̂² if centered

    V is a difference, which float32 knows only as well as the start that is taken out.
    """
    w = _weight("alpha", before["alpha"], step)
    divisor = jnp.where(step == 0, 1.0, w)  # all averages are at their start then
    corrected = after["bias_correction"]
    start = jnp.asarray((before if corrected else after)["initial_scale"], w.dtype)

    def mean(x: Any) -> jax.Array:
        return _scaled(x, 1 / divisor if corrected else w)

    def square(v: Any, m: Any = None) -> jax.Array:
        def component(v: jax.Array, m: jax.Array) -> jax.Array:
            share, remembered, s = (x.astype(v.dtype) for x in (w, 1 - w, start))
            added = remembered * s + share * remembered * m**2
            return jnp.maximum(v - added, 0) / divisor.astype(v.dtype) if corrected else share * v + added

        return _in_dtype_of(v, componentwise(component, widened(v), widened(jnp.zeros_like(v) if m is None else m)))

    if state.grad_avg is None:
        return state._replace(square_avg=jax.tree.map(square, state.square_avg))
    grad_avg = jax.tree.map(mean, state.grad_avg)
    means = grad_avg if corrected else state.grad_avg  # m̂ in both cases
    return state._replace(square_avg=jax.tree.map(square, state.square_avg, means), grad_avg=grad_avg)


def _weight(name: str, constant: Any, step: jax.Array) -> jax.Array:
    """1 − constantᵗ."""
    if callable(constant):
        raise ValueError(f"{name} must be constant for a bias correction to come or go, got a schedule")
    return one_minus_power(jnp.asarray(constant, float), jnp.asarray(one_minus(constant), float), step)


def _unit_of_buffer(lr: Any) -> Any:
    """The learning rate that is in a buffer, or will be in it, if all of the buffer has the same one."""
    number = known(lr)
    if callable(lr) or (number is not None and not SMALLEST_NORMAL <= number <= 1 / SMALLEST_NORMAL):
        got = "a schedule" if callable(lr) else f"{number:g}"
        raise ValueError(
            f"lr must be constant and not 0 (in float32) or infinite for a buffer to change its unit, got {got}; "
            "translate with the learning rate of the present update"
        )
    return jnp.asarray(lr, float) if number is None else number


def _scaled(slot: Any, factor: Any) -> jax.Array:
    """``factor · slot`` in the dtype of ``slot``, computed in float32 at least."""
    return _in_dtype_of(slot, componentwise(lambda x: jnp.asarray(factor, x.dtype) * x, widened(slot)))


def _in_dtype_of(slot: Any, x: jax.Array) -> jax.Array:
    return x.astype(slot.dtype)
