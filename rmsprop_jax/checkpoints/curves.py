"""How does a learning rate move from epoch to epoch? The closed forms of torch's schedulers, one plain function each.

A curve is a function of the epoch: how often the scheduler was stepped, an int32 ≥ 0. It returns a number in JAX's own
float, and works under ``jit``, ``vmap`` and ``scan``. A factor is a curve that a first learning rate is multiplied by.

Torch's numbers are Python floats. So that float32 loses none of their digits, whole numbers are subtracted as such, and
terms do not cancel. Optax's schedules are not used, because they count otherwise or lose these digits:
``cosine_decay_schedule`` stays down where torch's cosine rises again, ``sgdr_schedule`` has a fixed number of cycles,
``cosine_onecycle_schedule`` ends its phases at other steps, ``exponential_decay`` finds a stair by dividing floats, and
``polynomial_schedule`` and ``linear_schedule`` take ``1 − n / total``, which cancels near the end.

Source: ``_get_closed_form_lr`` or ``get_lr`` of the classes in ``torch/optim/lr_scheduler.py`` (PyTorch 2.13).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

LARGEST_EPOCH = 2**30  # two of them fit into an int32
_SMALL = float(np.finfo(np.float32).tiny)  # instead of a 0 below a line


class Curve(Protocol):
    """A number for each epoch."""

    def __call__(self, epoch: jax.Array, /) -> jax.Array:
        """The number at ``epoch``."""


def _float(number: Any) -> jax.Array:
    return jnp.asarray(number, float)


# --- Pieces -------------------------------------------------------------------------------------------------------


def constant(number: float) -> Curve:
    """``number``."""
    return lambda epoch: _float(number)


def scaled(base: float, factor: Curve) -> Curve:
    """``base · factor(epoch)``."""
    return lambda epoch: _float(base) * factor(epoch)


def between(low: float, high: float, share: Curve) -> Curve:
    """``low + (high − low) · share(epoch)``."""
    return lambda epoch: _float(low) + _float(high - low) * share(epoch)


def table(values: Sequence[float] | np.ndarray) -> Curve:
    """``values[epoch]``, and NaN where they end."""
    numbers = np.asarray(values, np.float64)  # once, since there may be many
    return lambda epoch: jnp.asarray(numbers, float).at[epoch].get(mode="fill", fill_value=jnp.nan)


def _cosine(left: jax.Array) -> jax.Array:
    """``(1 − cos(π · left)) / 2``, as a square that does not cancel near 0."""
    return jnp.square(jnp.sin(0.5 * math.pi * left))


def _unchanged(left: jax.Array) -> jax.Array:
    return left


SHAPES = {"cos": _cosine, "linear": _unchanged}  # of a side: from 1 where it begins to 0 where it ends


# --- Factors ------------------------------------------------------------------------------------------------------


class Power(NamedTuple):
    """``gamma^exponent(epoch)``, for a ``gamma`` above 0 and whole exponents."""

    gamma: float
    exponent: Curve

    def __call__(self, epoch: jax.Array, /) -> jax.Array:
        """The factor at ``epoch``."""
        return _raised(self.gamma, self.exponent(epoch))


def _raised(gamma: float, exponent: jax.Array) -> jax.Array:
    return jnp.exp(math.log(gamma) * _float(exponent))


def power(gamma: float) -> Power:
    """``gamma^epoch``."""
    return Power(gamma, _unchanged)


def stairs(gamma: float, size: int) -> Power:
    """``gamma^⌊epoch / size⌋``."""
    return Power(gamma, lambda epoch: epoch // size)


def milestones(gamma: float, counts: Mapping[int, int]) -> Power:
    """``gamma`` to the sum of the counts of all milestones that are ≤ epoch."""
    passed = sorted(counts)
    exponents = list(itertools.accumulate((counts[milestone] for milestone in passed), initial=0))
    return Power(gamma, lambda epoch: jnp.asarray(exponents, jnp.int32)[_how_many(passed, epoch)])


def _how_many(starts: Sequence[int], epoch: jax.Array) -> jax.Array:
    """How many of the numbers, which rise, are ≤ epoch."""
    return jnp.searchsorted(jnp.asarray(starts, jnp.int32), epoch, side="right")


def held(factor: float, total: int) -> Curve:
    """``factor`` before epoch ``total``, then 1."""
    return lambda epoch: jnp.where(epoch < total, _float(factor), _float(1.0))


def line(start: float, end: float, total: int) -> Curve:
    """``start + (end − start) · min(epoch, total) / total``."""

    def factor(epoch: jax.Array) -> jax.Array:
        n = jnp.minimum(epoch, total)
        return (_float(total - n) * start + _float(n) * end) / total

    return factor


def polynomial(exponent: float, total: int) -> Curve:
    """``(1 − min(epoch, total) / total)^exponent``."""
    return lambda epoch: (_float(total - jnp.minimum(epoch, total)) / total) ** exponent


def cosine(length: int) -> Curve:
    """``(1 + cos(π · epoch / length)) / 2``, which rises again after ``length``."""
    return lambda epoch: _cosine(_float(jnp.abs(length - epoch % (2 * length))) / length)


class Restarts(NamedTuple):
    """Cycles of ``first`` epochs, then ``first · multiple``, ``first · multiple²``, ..."""

    first: int
    multiple: int

    def starts(self) -> list[int]:
        """The epochs at which cycles start; only the first one if all have one length."""
        starts = [0]
        while self.multiple > 1 and starts[-1] <= LARGEST_EPOCH:
            starts.append(starts[-1] + self.length(len(starts) - 1))
        return starts[:-1] if self.multiple > 1 else starts

    def length(self, cycle: int) -> int:
        """The epochs of a cycle, which are counted from 0."""
        return int(self.first * self.multiple**cycle)

    def at(self, epoch: int) -> tuple[int, int]:
        """The epochs since the last restart, and the length of the cycle."""
        starts = [start for start in self.starts() if start <= epoch]
        length = self.length(len(starts) - 1)
        return (epoch - starts[-1]) % length, length


def warm_restarts(cycles: Restarts) -> Curve:
    """The falling half of the cosine, ``(1 + cos(π · done / length)) / 2``, in every cycle."""
    starts = cycles.starts()
    lengths = [cycles.length(cycle) for cycle in range(len(starts))]

    def factor(epoch: jax.Array) -> jax.Array:
        if len(starts) == 1:
            return _cosine(_float(cycles.first - epoch % cycles.first) / cycles.first)
        cycle = _how_many(starts, epoch) - 1
        length = table(lengths)(cycle)
        return _cosine((length - _float(epoch - jnp.asarray(starts, jnp.int32)[cycle])) / length)

    return factor


# --- Sides, triangles, turns --------------------------------------------------------------------------------


def side(begin: float, stop: float, shape: str) -> Curve:
    """The share that is left at the epoch of a side from ``begin`` to ``stop``: a line or half a cosine."""
    return lambda epoch: SHAPES[shape]((stop - _float(epoch)) / (stop - begin))


def sides(stops: Sequence[float], total: int, curves: Sequence[Curve]) -> Curve:
    """The first curve whose stop is ≥ epoch, the last one after all stops, and NaN after ``total``."""

    def at(epoch: jax.Array) -> jax.Array:
        number = curves[-1](epoch)
        for stop, curve in zip(stops[-2::-1], curves[-2::-1], strict=True):
            number = jnp.where(_float(epoch) <= stop, curve(epoch), number)
        return jnp.where(epoch > total, jnp.nan, number)

    return at


def triangles(size: float, up: float, scale: Curve) -> Curve:
    """From 0 in ``up`` epochs to ``scale(epoch)`` and back to 0 at ``size``, again and again."""

    def height(epoch: jax.Array) -> jax.Array:
        done = _float(epoch % size)
        share = jnp.where(done <= up, done / up, (size - done) / max(size - up, _SMALL))
        return share * scale(epoch)

    return height


def by_cycle(size: float, scale: Curve) -> Curve:
    """``scale(⌊epoch / size⌋)``."""
    return lambda epoch: scale((epoch // size).astype(jnp.int32))


class Turn(NamedTuple):
    """The epochs in which one of several curves is followed.

    Attributes:
      start: the first of them.
      stop: the last.
      shift: what to add to them to have the epochs of the curve itself.
      curve: which one.
    """

    start: int
    stop: int
    shift: int
    curve: Curve


def in_turn(turns: Sequence[Turn]) -> Curve:
    """The curves of the turns one after the other. Each keeps its last number until the next one starts."""

    def at(epoch: jax.Array) -> jax.Array:
        numbers = [turn.curve(jnp.clip(epoch, turn.start, turn.stop) + turn.shift) for turn in turns]
        number = numbers[0]
        for turn, later in zip(turns[1:], numbers[1:], strict=True):
            number = jnp.where(epoch < turn.start, number, later)
        return number

    return at


class Link(NamedTuple):
    """One factor of a product.

    Attributes:
      factor: a curve.
      shift: what to add to the epoch of the product to have that of the factor.
      length: that of the cosine if the factor is one, which rises again from 0; else ``None``.
    """

    factor: Curve
    shift: int
    length: int | None


def product(links: Sequence[Link]) -> Curve:
    """The product of factors, at most one of them a cosine.

    Torch multiplies the rate that it finds by ``factor(epoch) / factor(epoch − 1)``, one factor after the other. A
    cosine that was 0 adds to the rate instead, so what the other factors did before is lost.
    """
    cosines = [(index, link.shift, link.length) for index, link in enumerate(links) if link.length is not None]

    def at(epoch: jax.Array) -> jax.Array:
        whole = _float(1.0)
        for index, link in enumerate(links):
            factor = link.factor(epoch + link.shift)
            for position, shift, length in cosines:
                if position != index:
                    since, rises = _since_zero(epoch + shift, length)
                    kept = since - (index < position)  # what comes before the cosine is lost in the same step too
                    factor = jnp.where(rises, _ratio(link.factor, epoch + link.shift, kept), factor)
            whole = whole * factor
        return whole

    return at


def _since_zero(epoch: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """The epochs since a cosine was 0, from 1 on, and whether it was."""
    rises = epoch > length
    return jnp.where(rises, (epoch - length - 1) % (2 * length) + 1, 1), rises


def _ratio(factor: Curve, epoch: jax.Array, since: jax.Array) -> jax.Array:
    """``factor(epoch) / factor(epoch − since)``; 1 for 0 / 0, which torch does not multiply by."""
    if isinstance(factor, Power):  # either may be too small for float32
        return _raised(factor.gamma, factor.exponent(epoch) - factor.exponent(epoch - since))
    before = factor(epoch - since)
    return jnp.where(before > 0, factor(epoch) / jnp.maximum(before, _SMALL), 1.0)
