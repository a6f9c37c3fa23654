"""How long does an update take outside ``jit``, as in a cell of a notebook?

``update`` alone; ``update`` and ``apply_updates``; the transformation rebuilt for every call; and under
``optax.inject_hyperparams``, which rebuilds it, with another learning rate in every call. Arrays have 256 elements.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import peers
from benchmarks.measure import Step, compared, in_turns
from rmsprop_jax import rmsprop

COUNTS = (1, 10, 100, 300)


def measure(full: bool) -> list[dict[str, Any]]:
    """A row for every way to call it, variant and number of arrays."""
    rows = []
    for way, run in WAYS.items():
        for variant in peers.BOTH_ENDS:
            for count in COUNTS:
                params = peers.arrays([(256,)] * count, "float32", seed=0)
                steps = {
                    name: run(make, peers.VARIANTS[variant], params) for name, make in peers.TRANSFORMATIONS.items()
                }
                times = in_turns(steps, rounds=15 if full else 7)
                rows.append({"way": way, "variant": variant, "arrays": count, **compared(times)})
    return rows


Make = Callable[..., optax.GradientTransformation]


def update(make: Make, arguments: dict[str, Any], params: Any) -> Step:
    transformation = make(**arguments)
    state = transformation.init(params)
    return lambda: jax.block_until_ready(transformation.update(params, state, params))


def update_and_apply(make: Make, arguments: dict[str, Any], params: Any) -> Step:
    step = peers.whole_step(make(**arguments))
    state = make(**arguments).init(params)
    return lambda: jax.block_until_ready(step(params, state, params))


def rebuild_and_update(make: Make, arguments: dict[str, Any], params: Any) -> Step:
    state = make(**arguments).init(params)
    return lambda: jax.block_until_ready(make(**arguments).update(params, state, params))


def inject_hyperparams(make: Make, arguments: dict[str, Any], params: Any) -> Step:
    """Another learning rate in every call; what the variant leaves out stays out of the program of both."""
    if make is peers.ours:
        factory = functools.partial(rmsprop, alpha=peers.ALPHA, **arguments)
        lr, static = "lr", ("weight_decay", "momentum", "centered", "weight_decay_mask", "accumulator_dtype")
    else:
        factory = functools.partial(optax.rmsprop, decay=peers.ALPHA, eps_in_sqrt=False, **arguments)
        lr, static = "learning_rate", ("momentum",)
    transformation = optax.inject_hyperparams(factory, static_args=static)(**{lr: peers.LR})
    state = transformation.init(params)
    rates = itertools.cycle([jnp.float32(0.01), jnp.float32(0.02)])

    def step() -> None:
        state.hyperparams[lr] = next(rates)
        jax.block_until_ready(transformation.update(params, state, params))

    return step


WAYS: dict[str, Callable[[Make, dict[str, Any], Any], Step]] = {
    "update": update,
    "update and apply_updates": update_and_apply,
    "rebuilt for every call": rebuild_and_update,
    "inject_hyperparams": inject_hyperparams,
}
