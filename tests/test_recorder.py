"""The statistics that a run records in its state: equal to those outside, cheap, and serializable."""

import copy
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compare import assert_close, assert_same
from rmsprop_jax import diagnostics, dialects, figures, recorder, rmsprop
from rmsprop_jax.diagnostics import effective_learning_rate, statistics
from rmsprop_jax.recorder import record_statistics
from test_promises import devices, in_fresh_process
from training import SMALL, TOLERANCE, Update, after, assert_rates, small, tree

# --- The record ------------------------------------------------------------------------------------------


def recorded_run(tx: optax.GradientTransformation, steps: int, update: Any = None) -> list[tuple[Update, Any]]:
    params, state, history = tree(99), tx.init(tree(99)), []
    for step in range(steps):
        updates, new = (update or tx.update)(tree(step), state, params)
        history.append((Update(tx, tree(step), updates, new, params), new))
        params, state = optax.apply_updates(params, updates), new
    return history


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_recorded_are_the_statistics_of_every_nth_update(every: int, compiled: bool) -> None:
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    tx = record_statistics(rmsprop(schedule, momentum=0.9), every)
    update = jax.jit(chex.assert_max_traces(tx.update, 1)) if compiled else tx.update
    history = recorded_run(tx, 8, update)
    for step, (_, state) in enumerate(history):
        expected = statistics(*history[step - step % every][0])
        assert set(state.statistics) == set(expected)
        assert len(state.statistics) == len(expected)
        assert_close(dict(state.statistics), expected, rtol=TOLERANCE)
        assert state.update_count == step + 1
    if compiled:
        assert update._cache_size() == 1
    chex.clear_trace_counter()


def test_recording_changes_no_update() -> None:
    plain, params = rmsprop(0.03, weight_decay=0.1, momentum=0.9), tree(99)
    state = plain.init(params)
    for step, (last, _) in enumerate(recorded_run(record_statistics(plain, 2), 5)):
        updates, state = plain.update(tree(step), state, params)
        params = optax.apply_updates(params, updates)
        assert_same(last.updates, updates)
        assert_same(last.state.inner_state, state)


def test_nothing_is_computed_between_records() -> None:
    tx = record_statistics(rmsprop(), 10)
    program = jax.make_jaxpr(tx.update)(tree(0), tx.init(tree(0)), tree(0))
    recording = next(e for e in program.eqns if e.params.get("name") == "_record").params["jaxpr"]
    assert [e.primitive.name for e in recording.eqns if e.primitive.name != "convert_element_type"] == ["cond"]
    assert "callback" not in str(program)


def test_recording_outside_jit_compiles_once() -> None:
    tx = record_statistics(rmsprop(0.03), 2)
    recorded_run(tx, 2)
    before = recorder._record._cache_size(), figures.by_key._cache_size()
    recorded_run(tx, 6)
    assert (recorder._record._cache_size(), figures.by_key._cache_size()) == before


def test_nothing_is_recorded_before_the_first_update() -> None:
    state = record_statistics(rmsprop()).init(tree(0))
    assert (state.statistics.vector == 0).all()
    assert state.statistics.update == -1
    assert "total/surprise" in state.statistics
    with pytest.raises(KeyError, match="total/surprize"):
        state.statistics["total/surprize"]


def test_state_keeps_structure_shapes_and_types_and_its_buffers_are_donated() -> None:
    tx = record_statistics(optax.chain(optax.clip(1.0), rmsprop(0.03)), 2)
    params = tree(99)
    state = tx.init(params)
    old = jax.tree.leaves(state)
    _, new = jax.jit(tx.update, donate_argnums=1)(tree(0), state, params)
    chex.assert_trees_all_equal_structs(state, new)
    assert [(x.shape, x.dtype, x.weak_type) for x in old] == [
        (x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(new)
    ]
    assert all(x.is_deleted() for x in old)


def test_record_comes_to_the_host_at_once_and_names_its_update() -> None:
    tx = record_statistics(rmsprop(0.1), every=2)
    state = tx.init(SMALL)
    assert state.statistics.update == -1
    for update in (0, 0, 2):
        updates, state = tx.update(SMALL, state, SMALL)
        assert state.statistics.update == update
    record = jax.device_get(state.statistics)
    assert {type(x) for x in (record.vector, record.update)} <= {np.ndarray, np.int32}
    expected = statistics(tx, SMALL, updates, state, SMALL)
    np.testing.assert_allclose(
        [float(record[name]) for name in expected], [float(x) for x in expected.values()], rtol=TOLERANCE
    )


def test_recorded_history_of_a_scan_maps_keys_to_arrays() -> None:
    tx = record_statistics(rmsprop(0.03), 1)

    def step(carry: Any, seed: Any) -> Any:
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), state.statistics

    history = jax.lax.scan(step, (tree(0), tx.init(tree(0))), jnp.arange(5))[1]
    assert history["conv1/kernel/update_ratio"].shape == (5,)
    assert (history["total/surprise"][:-1] > history["total/surprise"][1:]).all()


def test_vmap_over_learning_rates_records_each() -> None:
    def train(lr: jax.Array) -> Any:
        tx = record_statistics(rmsprop(lr), 2)
        _, state = tx.update(tree(1), tx.init(tree(0)), tree(0))
        return state.statistics

    together = jax.vmap(train)(jnp.array([0.1, 0.2]))
    for i, lr in enumerate((0.1, 0.2)):
        np.testing.assert_allclose(together["total/lr_50"][i], train(lr)["total/lr_50"], rtol=1e-6)


def test_map_params_and_tree_get_see_through_the_wrapper() -> None:
    tx = optax.chain(optax.clip(1.0), record_statistics(rmsprop(momentum=0.9)))
    state = tx.init(tree(0))
    marked = optax.tree_utils.tree_map_params(tx, lambda _: "slot", state)
    assert set(jax.tree.leaves(marked[1].inner_state[1:])) == {"slot"}
    assert marked[1].statistics is state[1].statistics
    assert optax.tree.get(state, "statistics") is state[1].statistics
    assert optax.tree.get(state, "step") is state[1].inner_state.step


def test_derivatives_through_recorded_updates_are_those_without() -> None:
    def trained(lr: jax.Array, wrap: Callable[[Any], Any]) -> tuple[jax.Array, Any]:
        tx, params = wrap(rmsprop(lr, momentum=0.5)), {"w": jnp.arange(4.0), "b": jnp.zeros(2)}  # rms(b) is √0
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params["w"] ** 2), getattr(state, "statistics", None)

    def slope(wrap: Callable[[Any], Any]) -> jax.Array:
        (_, recorded), backward = jax.vjp(lambda lr: trained(lr, wrap), jnp.float32(0.03))
        return backward((jnp.float32(1.0), jax.tree.map(jnp.zeros_like, recorded)))[0]

    expected = slope(lambda tx: tx)
    assert abs(expected) > 1
    for every in (1, 2):
        found = slope(lambda tx, every=every: record_statistics(tx, every))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- What the transformation inside says of itself -------------------------------------------------------


def test_recorder_of_a_dialect_knows_its_numbers() -> None:
    tx = record_statistics(dialects.optax(7e-4, eps=1e-5))
    _, state = tx.update(SMALL, tx.init(SMALL), SMALL)
    v = 0.1 * np.sort(np.abs(np.concatenate([np.ravel(x) for x in jax.tree.leaves(SMALL)])))[::-1][1] ** 2
    np.testing.assert_allclose(state.statistics["total/lr_50"], 7e-4 / np.sqrt(v + 1e-5), rtol=1e-6)


def test_injected_rate_that_changes_is_seen() -> None:
    tx = record_statistics(optax.inject_hyperparams(rmsprop)(lr=0.1), every=1)
    update = jax.jit(tx.update)
    state = tx.init(SMALL)
    for lr in (0.1, 0.4):
        state.inner_state.hyperparams["lr"] = jnp.float32(lr)
        updates, state = update(SMALL, state, SMALL)
        last = Update(tx, SMALL, updates, state, SMALL)
        assert_close(dict(state.statistics), statistics(*last), rtol=TOLERANCE)
        assert_rates(last, {"a": lr, "b": lr}, {"a": 1e-8, "b": 1e-8}, set())
        assert diagnostics.settings(tx, state, SMALL)["a"].lr == np.float32(lr)


def test_injected_schedule_is_read_where_the_last_update_read_it() -> None:
    last = after(
        record_statistics(optax.inject_hyperparams(rmsprop)(lr=lambda count: 0.1 / (1 + count)), every=1), make=small
    )
    assert_rates(last, {"a": 0.1 / 3, "b": 0.1 / 3}, {"a": 1e-8, "b": 1e-8}, set())
    assert_close(dict(last.state.statistics), statistics(*last), rtol=TOLERANCE)


def halved(base: float, step: jax.Array) -> jax.Array:
    return base / 2.0**step


@pytest.mark.parametrize("compiled", [False, True])
def test_schedules_may_be_pytrees_and_eps_one_of_them(compiled: bool) -> None:
    tx = record_statistics(
        rmsprop(jax.tree_util.Partial(halved, 0.1), eps=jax.tree_util.Partial(halved, 1e-2)), every=1
    )
    wrapped = optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update)) if compiled else tx
    last = after(wrapped, make=small)._replace(tx=tx)
    assert_rates(last, {"a": 0.025, "b": 0.025}, {"a": 2.5e-3, "b": 2.5e-3}, set())
    assert_close(dict(last.state.statistics), statistics(*last), rtol=TOLERANCE)


def test_arguments_that_an_update_requires_reach_it_when_it_is_asked() -> None:
    inner = rmsprop(0.1)

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **extra_args: Any) -> Any:
        return inner.update(updates, state, params, **extra_args)

    tx = record_statistics(optax.GradientTransformationExtraArgs(inner.init, update))
    state = tx.update(SMALL, tx.init(SMALL), SMALL, value=1.0)[1]
    assert_close(state, record_statistics(inner).update(SMALL, tx.init(SMALL), SMALL)[1], rtol=1e-6)


def test_extra_arguments_reach_the_transformation_inside() -> None:
    seen = []

    def update(updates: Any, state: Any, params: Any = None, *, value: Any = None, **extra: Any) -> Any:
        seen.append(value)
        return rmsprop().update(updates, state, params, **extra)

    tx = record_statistics(optax.GradientTransformationExtraArgs(rmsprop().init, update))
    tx.update(tree(0), tx.init(tree(0)), tree(0), value=3)
    assert seen[-1] == 3
    assert set(seen[:-1]) <= {None, 3}


def test_rate_computed_inside_a_condition_is_refused_with_the_way_out() -> None:
    injected = optax.inject_hyperparams(rmsprop)(lr=lambda count: 0.1 / (1 + count))
    outside = record_statistics(optax.apply_if_finite(injected, 3))
    state = outside.init(SMALL)
    with pytest.raises(ValueError, match=r"inside a condition.*put record_statistics inside"):
        outside.update(SMALL, state, SMALL)
    with pytest.raises(jax.errors.UnexpectedTracerError):  # JAX says so at the end of the trace, in its own words
        jax.jit(outside.update)(SMALL, state, SMALL)
    bare = optax.apply_if_finite(injected, 3)
    with pytest.raises(ValueError, match=r"inside a condition"):
        effective_learning_rate(bare, bare.init(SMALL), SMALL)
    inside = optax.apply_if_finite(record_statistics(injected), 3)
    _, state = jax.jit(inside.update)(SMALL, inside.init(SMALL), SMALL)
    assert state.inner_state.statistics["total/nonfinite"] == 0


# --- Serialization ---------------------------------------------------------------------------------------


def test_record_is_itself_and_known_to_flax_wherever_it_comes_from(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("flax")
    record = record_statistics(rmsprop()).init(SMALL).statistics
    assert record == record
    assert record != copy.deepcopy(record)
    (tmp_path / "record").write_bytes(pickle.dumps(record))
    in_fresh_process(
        "import pathlib, pickle, sys, flax.serialization as flax\n"
        f"record = pickle.loads(pathlib.Path({str(tmp_path / 'record')!r}).read_bytes())\n"
        "assert flax.from_bytes(record, flax.to_bytes(record)).names == record.names"
    )


def test_record_of_other_parameters_is_refused() -> None:
    serialization = pytest.importorskip("flax.serialization")
    tx = record_statistics(optax.masked(rmsprop(), {"a": True, "b": False}))
    state = tx.init(SMALL)
    more = record_statistics(rmsprop()).init(SMALL | {"c": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"restored statistics must be 44 numbers.*shape \(27,\)"):
        serialization.from_bytes(more, serialization.to_bytes(state))
    fewer = {"a": SMALL["a"], "b": None}
    with pytest.raises(ValueError, match="every leaf that init was given, but b/grad_rms"):
        tx.update(fewer, state, fewer)


def test_orbax_checkpoint(tmp_path: Any) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    last = after(optax.chain(optax.clip(1.0), record_statistics(rmsprop(0.03), every=1)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", last.state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", last.state)
    assert_same(statistics(*last._replace(state=restored)), statistics(*last))
    assert_same(dict(restored[1].statistics), dict(last.state[1].statistics))


# --- On many devices -------------------------------------------------------------------------------------


def test_recording_of_sharded_parameters_compiles_once_and_gathers_no_array() -> None:
    in_fresh_process(SHARDED, **devices(8))


SHARDED = r"""
import math, re, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from rmsprop_jax import rmsprop
from rmsprop_jax.recorder import record_statistics

mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
tx = record_statistics(rmsprop(), 2)
whole = {name: jnp.linspace(-1, 1, 64 * 32).reshape(64, 32) for name in "abcd"}
specs = {"a": P("x"), "b": P(None, "x"), "c": P("x", "y"), "d": P()}
params = {name: jax.device_put(p, NamedSharding(mesh, specs[name])) for name, p in whole.items()}
update = jax.jit(tx.update)
state, expected = tx.init(params), tx.init(whole)
lines = update.lower(params, state, params).compile().as_text().splitlines()
gathers = [line.split(" all-gather")[0] for line in lines if re.search(r" all-gather(-start)?\(", line)]
shapes = [shape.split(",") for gather in gathers for shape in re.findall(r"\[([\d,]+)\]", gather)]
assert all(math.prod(map(int, shape)) <= 8 for shape in shapes), shapes  # a number from each device
for _ in range(3):
    _, state = update(params, state, params)
    _, expected = tx.update(whole, expected, whole)
assert update._cache_size() == 1
np.testing.assert_allclose(state.statistics.vector, expected.statistics.vector, rtol=1e-5)
"""


def test_recorder_is_carried_by_a_loop_inside_shard_map() -> None:
    if not hasattr(jax, "shard_map") or not hasattr(jax, "typeof"):
        pytest.skip("this JAX has no varying types")
    in_fresh_process(SHARD_MAPPED, **devices(8))


SHARD_MAPPED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from rmsprop_jax import rmsprop
from rmsprop_jax.recorder import record_statistics

mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
tx = record_statistics(rmsprop(), 2)

def train(params):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (params + updates, state), state.statistics
    (_, state), history = jax.lax.scan(step, (params, tx.init(params)), None, length=3)
    return history["total/grad_rms"], state.statistics.vector

params = jnp.arange(1.0, 17.0)
history, last = jax.jit(jax.shard_map(train, mesh=mesh, in_specs=P("x"), out_specs=P()))(params)
np.testing.assert_allclose(history[0], np.sqrt(np.mean(np.square(params))), rtol=1e-6)
np.testing.assert_allclose(last, train(params)[1], rtol=1e-6)  # of one device
"""


# --- Errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, -1, 2.0, True, None, "10"])
def test_every_is_a_positive_whole_number(every: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^every must be a whole number from 1 to 2³¹ − 1, got"):
        record_statistics(rmsprop(), every)


def test_recording_refuses_what_cannot_be_recorded() -> None:
    with pytest.raises(ValueError, match="opt_state must contain an RMSPropState"):
        record_statistics(optax.adam(0.1)).init(tree(0))
    tx = record_statistics(rmsprop())
    with pytest.raises(ValueError, match="params must be given"):
        tx.update(tree(0), tx.init(tree(0)))
