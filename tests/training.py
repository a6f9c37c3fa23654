"""Small trees and short runs, for the tests of what watches an optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import diagnostics
from rmsprop_jax.diagnostics import effective_learning_rate
from rmsprop_jax.state import find_states, merge_trees

TOLERANCE = 2e-6  # of sums of some dozen float32 numbers; 4e-7 was the largest deviation seen


class Update(NamedTuple):
    """What the functions under test take, in their order."""

    tx: Any
    grads: Any
    updates: Any
    state: Any
    params: Any


def tree(seed: int, scale: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    return {"conv1": {"kernel": draw(3, 3, 2, 5), "bias": draw(5)}, "out": [draw(7, 4), draw()]}


def spread(g: jax.Array) -> jax.Array:
    """Gradients from 1e-9 to 10, and some that are 0."""
    return jnp.where(abs(g) < 0.4, 0, 10.0 ** (4 * jnp.clip(g, -1.5, 1) - 3)).astype(g.dtype)


def after(tx: optax.GradientTransformation, steps: int = 3, make: Callable[[int], Any] = tree) -> Update:
    """The last of some updates."""
    params, state = make(99), tx.init(make(99))
    for step in range(steps):
        grads = jax.tree.map(spread, make(step // 8))
        updates, new = tx.update(grads, state, params)
        last, state = Update(tx, grads, updates, new, params), new
        params = optax.apply_updates(params, updates)
    return last


SMALL = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5, 3.0]])}


def small(seed: int) -> Any:
    return jax.tree.map(lambda x: x + 0.1 * seed, SMALL)


def assert_rates(last: Update, rates: dict[str, float], eps: dict[str, float], inside: set[str]) -> None:
    """The rates and denominators are those of the formulas with these numbers."""
    found = effective_learning_rate(last.tx, last.state, last.params)
    averages = merge_trees("state", [state.square_avg for state in find_states("state", last.state).values()])
    for name, lr in rates.items():
        v = np.asarray(averages[name], np.float64)
        expected = lr / (np.sqrt(v + eps[name]) if name in inside else np.sqrt(v) + eps[name])
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)
        assert diagnostics.settings(last.tx, last.state, last.params)[name].eps_in_sqrt == (name in inside)
