"""What ``test_promises`` promises of four devices, for every transformation; run in a process that has them."""

import contextlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from compare import assert_close
from rmsprop_jax import dialects, recipes, rmsprop, storage
from test_promises import TRANSFORMATIONS, ULPS, built, for_all, updates_of_all

# Sharded along its first axis, and along its last one.
PARAMS = {"first": jnp.linspace(1, 2, 32).reshape(8, 4), "last": jnp.linspace(-2, -1, 8)[None]}
AXIS = "x"
SPECS = {"first": P(AXIS), "last": P(None, AXIS)}
GRADIENTS = {name: jnp.stack([jnp.cos(p) * p, 3 * p]) for name, p in PARAMS.items()}  # of two updates


def train_all(params: Any, gradients: Any) -> Any:
    """Updates and states of all transformations after all gradients. The states are the carry of a loop."""

    def body(states: Any, grads: Any) -> Any:
        return updates_of_all(states, grads, params)[::-1]

    states, updates = jax.lax.scan(body, for_all(lambda tx: tx.init(params)), gradients)
    return jax.tree.map(lambda x: x[-1], updates), states


def shard_map(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """With varying axes checked, as is the default."""
    if hasattr(jax, "shard_map"):
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    from jax.experimental.shard_map import shard_map  # its home before JAX 0.6.1

    return shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def make_mesh(kind: str) -> Mesh:
    return jax.make_mesh((4,), (AXIS,), axis_types=(getattr(jax.sharding.AxisType, kind),))


def within(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    return jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh)  # before JAX 0.7


def assert_is_one_device(got: Any, want: Any) -> None:
    """Statistics are sums, which many devices add up in another order: within 32 units."""
    assert_close(got, want, ulps={**ULPS, "float32": 32}, nonfinite="equal")


# --- All transformations at once ---------------------------------------------------------------------------


def check_shard_map(expected: Any) -> None:
    """Each device trains its own part, and the updates are those of one device."""
    of_gradients = {name: P(None, *spec) for name, spec in SPECS.items()}
    many = shard_map(
        lambda params, gradients: train_all(params, gradients)[0],
        make_mesh("Auto"),
        (SPECS, of_gradients),
        dict.fromkeys(TRANSFORMATIONS, SPECS),
    )
    assert_is_one_device(jax.jit(many)(PARAMS, GRADIENTS), expected[0])


def check_mesh(kind: str, expected: Any) -> None:
    """Arrays sharded along their first and along their last axis, on a mesh whose axes are Auto or Explicit."""
    mesh = make_mesh(kind)
    with within(mesh):
        params, gradients = (
            {name: jax.device_put(x, NamedSharding(mesh, P(*leading, *SPECS[name]))) for name, x in tree.items()}
            for tree, leading in ((PARAMS, ()), (GRADIENTS, (None,)))
        )
        states = for_all(lambda tx: tx.init(params))
        for name, state in states.items():
            assert_placed_like_params(name, state, params)
        updates, states = jax.jit(train_all)(params, gradients)
        assert_is_one_device((updates, states), expected)
        for name in TRANSFORMATIONS:
            assert_placed_like_params(name, (updates[name], states[name]), params)


def assert_placed_like_params(name: str, state: Any, params: Any) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        p = params.get(getattr(path[-1], "key", None))
        if p is None:
            assert x.sharding.is_fully_replicated, (name, path, x.sharding)
        else:
            assert x.sharding.is_equivalent_to(p.sharding, p.ndim), (name, path, x.sharding)


def check_compilations() -> None:
    """One program for each placement, without communication; also where only shapes say where they lie."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
    whole = {
        "w": PARAMS["first"],
        "h": jnp.ones((8, 4), jnp.bfloat16),
        "z": jnp.ones((8, 4), jnp.complex64),
        "b": jnp.ones(4),
    }
    specs = {"w": P("x", "y"), "h": P("y", "x"), "z": P("x"), "b": P()}
    params = {name: jax.device_put(p, NamedSharding(mesh, specs[name])) for name, p in whole.items()}
    tx = rmsprop(0.1, weight_decay=0.1, momentum=0.9, centered=True)
    state = tx.init(params)
    assert state.step.sharding == NamedSharding(mesh, P())
    assert_placed_like_params("sharded", state, params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    here = jax.device_put(whole, jax.devices()[3])  # committed to one device that is not the default
    assert tx.init(here).step.devices() == {jax.devices()[3]}
    for programs, start in enumerate((params, whole, here), start=1):
        moment = start, tx.init(start)
        for _ in range(3):
            moment = step(*moment)
        assert step._cache_size() == programs, (programs, step._cache_size())
        for leaf, old in zip(jax.tree.leaves(moment), jax.tree.leaves((start, tx.init(start))), strict=True):
            assert leaf.sharding.is_equivalent_to(old.sharding, leaf.ndim)
    assert "all-" not in step.lower(params, state).compile().as_text(), "an elementwise update needs no communication"

    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
    assert tx.init(shapes).step.sharding == NamedSharding(mesh, P())
    assert tx.init(shapes).square_avg["w"].sharding == params["w"].sharding


def check_state_that_enters_shard_map() -> None:
    """A state that was made outside: its slots are sharded like the parameters, its step is not."""
    tx, grads = built("everything"), {name: g[0] for name, g in GRADIENTS.items()}
    of_state = tx.init(PARAMS)._replace(step=P(), square_avg=SPECS, grad_avg=SPECS, momentum_buffer=SPECS)
    many = shard_map(tx.update, make_mesh("Auto"), (SPECS, of_state, SPECS), (SPECS, of_state))
    state = tx.init(PARAMS)
    assert_is_one_device(jax.jit(many)(grads, state, PARAMS), tx.update(grads, state, PARAMS))


def check_caution() -> None:
    """The entries that timm's caution counts: of the whole array under ``jit``, and of one shard in ``shard_map``."""
    tx = dialects.timm(lr=0.5, alpha=0.0, eps=0.0, momentum=0.5, caution=True)
    gradient = jnp.repeat(jnp.array([1.0, -1.0]), jnp.array([11, 5]), total_repeat_length=16)  # shares 1, 1, 3/4, 0
    state = tx.init(gradient)._replace(momentum_buffer=4 * jnp.ones(16))
    mesh = make_mesh("Auto")
    placed = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, P(AXIS) if x.ndim else P())), (gradient, state)
    )
    expected = np.where(np.arange(16) < 11, -2.5 * 16 / 11, 0.0).astype(np.float32)
    assert_is_one_device(jax.jit(tx.update)(*placed)[0], expected)
    of_state = state._replace(step=P(), square_avg=P(AXIS), momentum_buffer=P(AXIS))
    many = shard_map(tx.update, mesh, (P(AXIS), of_state), (P(AXIS), of_state))
    of_shards = expected * np.repeat(np.array([1, 1, 4 / 3, 1]) * 11 / 16, 4)
    assert_is_one_device(jax.jit(many)(gradient, state)[0], of_shards.astype(np.float32))


def check_clipping(kind: str) -> None:
    """The norms of recipes are those of whole arrays, wherever their parts lie; 1e30 squared is infinite in float32."""
    mesh, chains = make_mesh(kind), {name: getattr(recipes, name)() for name in ("dreamer_v3", "a2c", "wgan_critic")}

    @jax.jit
    def step(params: Any, grads: Any) -> Any:
        return {name: tx.update(grads, tx.init(params), params) for name, tx in chains.items()}

    for size in (1.0, 1e30):
        grads = jax.tree.map(lambda g, size=size: size * g[0], GRADIENTS)
        with within(mesh):
            placed = [
                {name: jax.device_put(x, NamedSharding(mesh, SPECS[name])) for name, x in tree.items()}
                for tree in (PARAMS, grads)
            ]
            found = step(*placed)
        assert_is_one_device(found, step(PARAMS, grads))


def check_storage(kind: str) -> None:
    """Codes are those of one device, and nothing is sent but the maxima of rows that lie on several devices."""
    whole = {"rows": jnp.ones((8, 64)), "columns": jnp.ones((16, 32))}
    specs = {"rows": P(AXIS), "columns": P(None, AXIS)}
    rng = np.random.default_rng(0)
    grads = [{name: jnp.asarray(rng.standard_normal(p.shape), p.dtype) for name, p in whole.items()} for _ in range(4)]
    mesh = make_mesh(kind)
    for bits in (8, 16):
        tx = storage.compress(rmsprop(0.01, momentum=0.9), bits, min_size=1)
        alone = tx.init(whole)
        with within(mesh):
            placed = [
                {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in tree.items()}
                for tree in (whole, *grads)
            ]
            state, update = tx.init(placed[0]), jax.jit(tx.update)
            for g in placed[1:]:
                _, state = update(g, state, placed[0])
            text = update.lower(placed[1], state, placed[0]).compile().as_text()
            for name, slot in state.inner_state.square_avg.items():
                assert slot.codes.sharding.is_equivalent_to(placed[0][name].sharding, 2), (kind, name)
        for g in grads:
            _, alone = jax.jit(tx.update)(g, alone, whole)
        assert_close(state, jax.tree.map(np.asarray, alone), ulps=0)
        sent = re.findall(r" (all-\w+|collective-permute|reduce-scatter)\(", text)
        # The maxima of the two slots of "columns", which XLA may send together.
        assert sent in ([["all-reduce"], ["all-reduce"] * 2] if bits == 8 else [[]]), (kind, bits, sent)


def check_storage_in_shard_map() -> None:
    """Each device has its own rows."""
    p, g = jnp.ones((8, 64)), jnp.asarray(np.random.default_rng(0).standard_normal((8, 64)), jnp.float32)
    tx = storage.compress(rmsprop(0.01, momentum=0.9), min_size=1)
    state = tx.init(p)
    spec = jax.tree.map(lambda x: P(AXIS) if x.ndim else P(), state)
    many = shard_map(tx.update, make_mesh("Auto"), (P(AXIS), spec, P(AXIS)), (P(AXIS), spec))
    updates, after = jax.jit(many)(g, state, p)
    assert_is_one_device(updates, tx.update(g, state, p)[0])
    assert after.inner_state.square_avg.codes.dtype == jnp.uint8


def main() -> None:
    """All checks, one after the other."""
    assert jax.device_count() == 4
    expected = jax.jit(train_all)(PARAMS, GRADIENTS)
    if hasattr(jax, "shard_map"):  # inside that of JAX 0.6.0, a state that init makes cannot be carried by a loop
        check_shard_map(expected)
    check_mesh("Auto", expected)
    check_mesh("Explicit", expected)
    check_caution()
    check_clipping("Auto")
    check_clipping("Explicit")
    check_state_that_enters_shard_map()
    check_compilations()
    check_storage("Auto")
    check_storage("Explicit")
    check_storage_in_shard_map()


if __name__ == "__main__":
    main()
