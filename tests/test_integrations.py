"""Inside the libraries that people train with: Flax NNX, Flax Linen, Equinox, Orbax."""

import pathlib
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState

from compare import assert_alike, assert_close, assert_same
from rmsprop_jax import RMSPropState, rmsprop, storage

INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(16, 10)), jnp.float32)
TARGETS = jnp.asarray(np.random.default_rng(1).normal(size=(16, 1)), jnp.float32)


def optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), rmsprop(0.01, weight_decay=1e-4, momentum=0.9, centered=True))


def by_hand(loss: Any, params: Any, steps: int = 5) -> tuple[Any, list[float]]:
    """The plain Optax loop that every library's own loop has to agree with."""
    tx, losses = optimizer(), []
    state = tx.init(params)
    for _ in range(steps):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    return params, losses


def assert_is_by_hand(got: Any, want: Any) -> None:
    """Two programs of five steps, each of which takes roots of sums of products. Measured maximum: MEASURED."""
    assert_close(got, want, rtol=2e-5, scale="array")


def test_flax_nnx_optimizer_trains_as_by_hand() -> None:
    model = nnx.Sequential(nnx.Linear(10, 5, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(5, 1, rngs=nnx.Rngs(1)))
    graph, start = nnx.split(model, nnx.Param)
    start = jax.tree.map(jnp.array, start)
    traces = 0

    def loss(model: nnx.Module) -> jax.Array:
        return jnp.mean((model(INPUTS) - TARGETS) ** 2)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer) -> jax.Array:
        nonlocal traces
        traces += 1
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    trainer = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
    losses = [float(step(model, trainer)) for _ in range(5)]
    params, expected = by_hand(lambda params: loss(nnx.merge(graph, params)), start)
    assert_close(np.array(losses), np.array(expected), rtol=1e-5)
    assert losses[-1] < losses[0]
    assert_is_by_hand(nnx.state(model, nnx.Param), params)
    assert traces == 1


def test_flax_linen_train_state_trains_as_by_hand() -> None:
    model = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(1)])
    params = model.init(jax.random.key(0), INPUTS)

    def loss(params: Any) -> jax.Array:
        return jnp.mean((model.apply(params, INPUTS) - TARGETS) ** 2)

    @jax.jit
    def step(state: TrainState) -> TrainState:
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer())
    for _ in range(5):
        state = step(state)
    assert_is_by_hand(state.params, by_hand(loss, params)[0])
    assert isinstance(state.opt_state[1], RMSPropState)


def test_equinox_filtered_trees_train_as_by_hand() -> None:
    """``eqx.filter`` leaves ``None`` where there is no array, and a frozen layer has ``None`` gradients."""
    model = eqx.nn.MLP(10, 1, 5, 1, key=jax.random.key(0))
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    trainable = eqx.tree_at(lambda m: m.layers[0].bias, jax.tree.map(lambda _: True, arrays), replace=False)

    def loss(arrays: Any) -> jax.Array:
        return jnp.mean((jax.vmap(eqx.combine(arrays, rest))(INPUTS) - TARGETS) ** 2)

    tx = optimizer()
    state, params = tx.init(arrays), arrays

    @eqx.filter_jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        grads = eqx.filter(jax.grad(loss)(params), trainable)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(params, updates), state

    for _ in range(5):
        params, state = step(params, state)
    assert_same(params.layers[0].bias, arrays.layers[0].bias)

    frozen = eqx.partition(arrays, trainable)[1]
    free, _ = by_hand(lambda free: loss(eqx.combine(free, frozen)), eqx.filter(arrays, trainable))
    assert_is_by_hand(params, eqx.combine(free, frozen))


def test_equinox_module_that_was_not_filtered_can_be_params() -> None:
    """Its activation function is a leaf that jit does not take, and has no gradient."""
    model = eqx.nn.MLP(10, 1, 5, 1, key=jax.random.key(0))
    grads = eqx.filter(jax.tree.map(lambda x: x, model), eqx.is_inexact_array)
    for tx in (rmsprop(0.1), rmsprop(0.1, weight_decay=0.1), rmsprop(0.1, weight_decay=0.1, weight_decay_mask=True)):
        state = tx.init(grads)
        updates, _ = tx.update(grads, state, model)
        expected, _ = tx.update(grads, state, grads)
        assert_is_by_hand(updates, expected)
        assert_alike(updates, grads)


def test_orbax_restores_the_state_bit_for_bit_and_training_goes_on(tmp_path: pathlib.Path) -> None:
    params = {"w": jnp.linspace(-1, 1, 10), "b": jnp.ones((), jnp.bfloat16), "frozen": None}
    tx = rmsprop(optax.linear_schedule(0.1, 0.0, 8), momentum=0.9, centered=True)

    def train(params: Any, state: Any, steps: int) -> tuple[Any, Any]:
        for _ in range(steps):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    stopped = train(params, tx.init(params), 3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", {"params": stopped[0], "state": stopped[1]})
        checkpointer.wait_until_finished()
        target = jax.eval_shape(lambda: {"params": params, "state": tx.init(params)})
        restored = checkpointer.restore(tmp_path / "checkpoint", target)
    assert_same(restored["state"], stopped[1])
    resumed = train(restored["params"], restored["state"], 3)
    assert_same(resumed, train(params, tx.init(params), 6))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_run_with_compressed_state_resumes_bit_for_bit(tmp_path: pathlib.Path, bits: int) -> None:
    """From Orbax's files, and from the msgpack of Flax."""
    params = {"w": jnp.linspace(-1, 1, 64 * 64).reshape(64, 64), "b": jnp.ones(64)}
    tx = optax.chain(optax.clip(1.0), storage.compress(rmsprop(0.01, momentum=0.9, centered=True), bits))
    update = jax.jit(tx.update)

    def train(params: Any, state: Any, steps: int) -> tuple[Any, Any]:
        for _ in range(steps):
            updates, state = update(params, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    stopped = train(params, tx.init(params), 3)
    wanted = train(*stopped, 3)
    target = jax.eval_shape(lambda: (params, tx.init(params)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", stopped)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", target)
    assert_same(restored, stopped)
    assert_same(train(*restored, 3), wanted)
    restored = serialization.from_bytes((params, tx.init(params)), serialization.to_bytes(stopped))
    assert_same(jax.tree.map(jnp.asarray, restored), stopped)
    assert_same(train(*restored, 3), wanted)


@pytest.mark.parametrize("bits", [8, 16])
def test_nnx_trains_with_compressed_state_as_by_hand(bits: int) -> None:
    model = nnx.Linear(10, 64, rngs=nnx.Rngs(0))
    graph, start = nnx.split(model, nnx.Param)
    start = jax.tree.map(jnp.array, start)
    tx = storage.compress(rmsprop(0.01, momentum=0.9), bits, min_size=1)

    def loss(model: nnx.Module) -> jax.Array:
        return jnp.mean((model(INPUTS) - TARGETS) ** 2)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, nnx.grad(loss)(model))

    trainer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(5):
        step(model, trainer)
    params, state = start, tx.init(start)
    for _ in range(5):
        updates, state = jax.jit(tx.update)(jax.grad(lambda p: loss(nnx.merge(graph, p)))(params), state, params)
        params = optax.apply_updates(params, updates)
    # One code in a thousand may be rounded the other way, since the two programs differ in rounding.
    assert_close(nnx.state(model, nnx.Param), params, rtol=2e-3, scale="array")


def test_linen_boxes_keep_their_names_around_compressed_state() -> None:
    layer = nn.Dense(64, kernel_init=nn.with_partitioning(nn.initializers.ones, ("in", "out")))
    params = layer.init(jax.random.key(0), jnp.ones((1, 64)))
    tx = storage.compress(rmsprop(0.01, momentum=0.9))
    state = tx.init(params)
    box = state.inner_state.square_avg["params"]["kernel"]
    assert box.names == ("in", "out")
    assert box.value.codes.dtype == jnp.uint8
    updates, after = jax.jit(tx.update)(params, state, params)
    assert_alike(after, state)
    assert_alike(updates, params)
