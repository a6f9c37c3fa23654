"""The cost contract, counted and not timed: loops, bytes and copies of the compiled step, calls in what is lowered.

How long it takes is measured by ``benchmarks``; traces and programs are counted in ``test_promises``. The bytes are
those that XLA counts as read and written by its CPU compiler, which writes every output in a loop of its own.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conftest import USERS
from rmsprop_jax import rmsprop
from rmsprop_jax.recorder import record_statistics

SIZE = 1 << 20


@functools.cache
def compiled_step(name: str) -> jax.stages.Compiled:
    """``update`` and ``apply_updates`` on one array, which overwrite parameter and state."""
    arguments, dtype, *_ = COSTS[name]
    tx = rmsprop(**arguments)
    params = jnp.zeros(SIZE, dtype)
    state = tx.init(params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile(USERS)


def cost(compiled: jax.stages.Compiled) -> tuple[int, int]:
    """Loops over arrays, and bytes read and written per parameter."""
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis  # JAX before 0.7
    loops = re.findall(rf"= \w+\[{SIZE}\]\S* (?:fusion|copy)\(", compiled.as_text())
    return len(loops), round(analysis["bytes accessed"] / SIZE)


# Loops, and four bytes for each array that one of them reads or writes: benchmarks/NOTES.md tells what they are.
COSTS: dict[str, tuple[dict[str, Any], Any, int, int]] = {
    "plain": ({}, jnp.float32, 2, 28),
    "momentum": (dict(momentum=0.9), jnp.float32, 3, 40),
    "centered": (dict(centered=True), jnp.float32, 3, 48),
    "centered, momentum": (dict(centered=True, momentum=0.9), jnp.float32, 4, 60),
    "decay": (dict(weight_decay=0.1), jnp.float32, 2, 32),
    "decay, momentum": (dict(weight_decay=0.1, momentum=0.9), jnp.float32, 3, 48),
    "decay, centered": (dict(weight_decay=0.1, centered=True), jnp.float32, 3, 60),
    "decay, centered, momentum": (dict(weight_decay=0.1, centered=True, momentum=0.9), jnp.float32, 4, 76),
    "maximize, decay": (dict(weight_decay=0.1, maximize=True), jnp.float32, 2, 32),
    "plain, bfloat16": ({}, jnp.bfloat16, 2, 20),
    "centered, momentum, bfloat16": (dict(centered=True, momentum=0.9), jnp.bfloat16, 4, 50),
}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="loops and bytes of the CPU compiler")
@pytest.mark.parametrize("name", COSTS)
def test_step_reads_and_writes_no_more_than(name: str) -> None:
    *_, loops, size = COSTS[name]
    counted = cost(compiled_step(name))
    assert 0 < counted[0] <= loops
    assert size / 2 < counted[1] <= size  # half of it could not even visit every array once


@pytest.mark.device("donation")
@pytest.mark.parametrize("name", COSTS)
def test_step_allocates_nothing(name: str) -> None:
    assert compiled_step(name).memory_analysis().temp_size_in_bytes < 1024


def lowered_update(count: int) -> str:
    """StableHLO of the update of ``count`` arrays of one shape."""
    tx = rmsprop(momentum=0.9, centered=True, weight_decay=0.1)
    params = [jnp.zeros((2, 3))] * count
    lowered: str = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
    return lowered


@pytest.mark.device("program")
def test_mathematics_of_one_shape_is_lowered_once() -> None:
    assert lowered_update(20).count("stablehlo.sqrt") == 1


def test_eight_more_arrays_of_one_shape_are_one_more_call() -> None:
    assert lowered_update(32).count(" call @") == lowered_update(24).count(" call @") + 1


def test_irregular_mask_makes_no_more_batches_than_two() -> None:
    params = {f"{i:02}": jnp.zeros((2, 3)) for i in range(64)}
    mask = {name: bool(chosen) for name, chosen in zip(params, np.random.default_rng(0).random(64) < 0.5, strict=True)}
    tx = rmsprop(weight_decay=0.1, weight_decay_mask=mask)
    lowered = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
    assert lowered.count("func.func private @_update_leaves") == 2


def test_numbers_that_no_equation_names_stay_out_of_the_program() -> None:
    tx = rmsprop(lr=jnp.float32(0.1), alpha=jnp.float32(0.9), eps=jnp.float32(1e-8))  # momentum and decay are 0
    state = tx.init(jnp.zeros(3))
    (call,) = jax.make_jaxpr(lambda grads, state: tx.update(grads, state))(jnp.zeros(3), state).eqns
    scalars = [variable for variable in call.invars if variable.aval.shape == ()]
    assert len(scalars) == 4  # lr, alpha, eps, and the step


@pytest.mark.device("program")
def test_rebuilt_transformation_compiles_nothing_outside_jit(caplog: pytest.LogCaptureFixture) -> None:
    params = jnp.ones(1013)  # a shape of its own, so that no other test has compiled the program
    state = rmsprop(momentum=0.9).init(params)
    with jax.log_compiles():
        rmsprop(lr=0.1, momentum=0.9).update(params, state, params)
        assert caplog.records
        caplog.clear()
        rmsprop(lr=0.2, momentum=0.9).update(params, state, params)
        assert not caplog.records


def loops_of_recording(shapes: list[tuple[int, ...]]) -> tuple[int, int]:
    """How many programs over arrays, and how many ``while`` loops, recording adds to a step."""
    params = {f"p{i}": jnp.ones(shape) for i, shape in enumerate(shapes)}
    programs = [
        jax.jit(tx.update).lower(params, tx.init(params), params) for tx in (rmsprop(), record_statistics(rmsprop()))
    ]
    texts = [program.compile(USERS).as_text() for program in programs]
    fusions, whiles = ([len(re.findall(rf" {kind}\(", text)) for text in texts] for kind in ("fusion", "while"))
    return fusions[1] - fusions[0], whiles[1] - whiles[0]


@pytest.mark.skipif(jax.default_backend() != "cpu" or jax.device_count() > 1, reason="loops of the CPU compiler")
def test_recording_adds_few_loops_for_another_array() -> None:
    """A recorder would otherwise take many times as long to compile as the step."""
    few, many = (loops_of_recording([(3 + i, 4) for i in range(n)]) for n in (4, 16))
    assert many[0] - few[0] <= 12  # one for each array at most; unless they were joined, a dozen
    large = loops_of_recording([(257, 256 + i) for i in range(4)])
    assert large[0] <= few[0] + 4 * 8
    assert few[1] == many[1] == large[1] == 1  # one for all quantiles of all arrays
