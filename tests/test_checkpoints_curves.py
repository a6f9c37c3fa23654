"""The closed forms of torch's schedulers in float32, against the same formulas in float64 and NumPy."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compare import assert_close
from rmsprop_jax.checkpoints.curves import (
    Curve,
    Restarts,
    cosine,
    held,
    line,
    milestones,
    polynomial,
    power,
    stairs,
    triangles,
    warm_restarts,
)

LONG = 1_000_000
# Epochs of long runs: the last ones, where terms cancel, stairs, and some that float32 does not hold.
EPOCHS = np.unique(
    np.concatenate([np.arange(3), LONG + np.arange(-3, 4), 2 * LONG + np.arange(-3, 4), [99_999, 100_000, 20_000_001]])
)


class Row(NamedTuple):
    """A curve, its formula, and how far it may be off in ulps of float32, with the reason.

    A curve is a few operations, each rounded to half an ulp, or to two in ``sin`` and ``exp``.
    """

    curve: Curve
    formula: Callable[[np.ndarray], np.ndarray]
    ulps: float


def restarted(n: np.ndarray) -> np.ndarray:
    """Cycles of 1000, 2000, 4000, ... epochs."""
    cycle = np.floor(np.log2(n / 1000 + 1))
    length = 1000 * 2**cycle
    return np.sin(np.pi / 2 * (length - (n - (length - 1000))) / length) ** 2


ROWS = {
    # exp makes a relative error of the rounding of its argument, −20 at most: 20 half ulps. 13 were measured.
    "power": Row(power(1 - 1e-6), lambda n: (1 - 1e-6) ** n, 32),
    "stairs": Row(stairs(0.97, 100_000), lambda n: 0.97 ** (n // 100_000), 16),
    "milestones": Row(milestones(0.1, {100_000: 1, LONG: 2}), lambda n: 0.1 ** ((n >= 100_000) + 2 * (n >= LONG)), 16),
    "held": Row(held(0.3, LONG), lambda n: np.where(n < LONG, 0.3, 1.0), 1),
    "line": Row(line(1.0, 0.0, LONG), lambda n: np.maximum(0, LONG - n) / LONG, 4),
    "line up": Row(line(0.1, 0.7, LONG), lambda n: 0.1 + 0.6 * np.minimum(n, LONG) / LONG, 4),
    "polynomial": Row(polynomial(2.0, LONG), lambda n: (np.maximum(0, LONG - n) / LONG) ** 2, 8),
    "cosine": Row(cosine(LONG), lambda n: np.sin(np.pi / 2 * np.abs(LONG - n % (2 * LONG)) / LONG) ** 2, 16),
    "warm restarts": Row(warm_restarts(Restarts(1000, 2)), restarted, 16),
    "one length": Row(
        warm_restarts(Restarts(1000, 1)), lambda n: np.sin(np.pi / 2 * (1000 - n % 1000) / 1000) ** 2, 16
    ),
    "triangles": Row(
        triangles(LONG, 999_000.0, power(1.0)),
        lambda n: np.where(n % LONG <= 999_000, n % LONG / 999_000, (LONG - n % LONG) / 1000),
        8,
    ),
}


def test_float32_keeps_its_digits_in_long_runs_and_near_zero() -> None:
    got = jax.jit(lambda epoch: {name: row.curve(epoch) for name, row in ROWS.items()})(jnp.asarray(EPOCHS, jnp.int32))
    for name, row in ROWS.items():
        want = row.formula(EPOCHS.astype(np.float64))
        assert_close({name: got[name]}, {name: want}, ulps=row.ulps, dtype=np.float32)


def test_restart_of_a_cycle_is_where_torch_has_it() -> None:
    assert [Restarts(2, 3).at(epoch) for epoch in (0, 1, 2, 7, 8, 25, 26)] == [
        (0, 2), (1, 2), (0, 6), (5, 6), (0, 18), (17, 18), (0, 54)
    ]  # fmt: skip
    assert [Restarts(3, 1).at(epoch) for epoch in (0, 2, 3, 301)] == [(0, 3), (2, 3), (0, 3), (1, 3)]
