"""JAX citizenship: one table of transformations, one list of promises that each of them keeps."""

import functools
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from rmsprop_jax import RMSPropState, diagnostics, dialects, rmsprop, scale_by_rmsprop, transform

EPS32 = float(np.finfo(np.float32).eps)

TRANSFORMATIONS: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    "default": rmsprop,
    "momentum": lambda: rmsprop(momentum=0.9),
    "everything": lambda: rmsprop(0.02, 0.95, 1e-6, 0.1, 0.9, True, maximize=True),
    "mask": lambda: rmsprop(weight_decay=0.1, weight_decay_mask={"dense": True, "scale": False, "gain": False}),
    "schedule": lambda: rmsprop(optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 8), centered=True),
    "arrays": lambda: rmsprop(*(jnp.float32(x) for x in (0.02, 0.95, 1e-6, 0.1, 0.9))),
    "scaling": lambda: scale_by_rmsprop(momentum=0.9),
    "corrected": lambda: scale_by_rmsprop(0.999, 1e-20, eps_in_sqrt=True, bias_correction=True),
    "narrow": lambda: rmsprop(momentum=0.9, accumulator_dtype="bfloat16"),
    "tensorflow": lambda: dialects.tensorflow(0.01, momentum=0.9, centered=True),
    "timm": lambda: dialects.timm(weight_decay=0.1, momentum=0.9, decoupled_decay=True, lr_in_momentum=False),
    "dreamer": dialects.dreamer,
    "optax": lambda: dialects.optax(0.01, momentum=0.9, nesterov=True, bias_correction=True),
    "recorded": lambda: diagnostics.record_statistics(rmsprop(momentum=0.9), every=2),
}
every = pytest.mark.parametrize("make", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS.keys())

PARAMS = {
    "dense": [jnp.linspace(-1, 1, 12).reshape(3, 4), jnp.linspace(0, 2, 4)],
    "scale": jnp.float32(0.5),
    "gain": jnp.ones(4, jnp.bfloat16),
}


def loss(params: Any, shift: Any = 1.0) -> jax.Array:
    return sum(jnp.sum((leaf.astype(jnp.float32) - shift) ** 2) for leaf in jax.tree.leaves(params))


def loop(step: Callable[..., Any], params: Any, state: Any, steps: int = 4) -> tuple[Any, Any]:
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def stepper(tx: optax.GradientTransformation) -> Callable[[Any, Any], tuple[Any, Any]]:
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def assert_close(got: Any, want: Any, ulps: float = 32) -> None:
    """Within ``ulps``: two programs may round differently, since XLA contracts a · b + c as it sees fit."""
    chex.assert_trees_all_equal_structs(got, want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        eps = float(jnp.finfo(a.dtype).eps) if jnp.issubdtype(a.dtype, jnp.inexact) else 0
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=ulps * eps, atol=ulps * eps * np.abs(b).max(initial=0))


# --- Compilation -----------------------------------------------------------------------------------------


class Variants(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    @parameterized.named_parameters((name, make) for name, make in TRANSFORMATIONS.items())
    def test_update_is_the_same_compiled_or_not_and_on_any_device(self, make: Callable[[], Any]) -> None:
        tx = make()
        grads = jax.grad(loss)(PARAMS)
        with jax.disable_jit():
            expected = tx.update(grads, tx.init(PARAMS), PARAMS)
        assert_close(self.variant(tx.update)(grads, self.variant(tx.init)(PARAMS), PARAMS), expected)


@every
def test_training_step_is_traced_and_compiled_once(make: Callable[[], Any]) -> None:
    tx = make()
    step = jax.jit(chex.assert_max_traces(stepper(tx), 1))
    loop(step, PARAMS, tx.init(PARAMS))
    assert step._cache_size() == 1
    chex.clear_trace_counter()


@every
def test_state_keeps_structure_shapes_and_types(make: Callable[[], Any]) -> None:
    tx = make()
    before = tx.init(PARAMS)
    _, after = loop(stepper(tx), PARAMS, before)
    chex.assert_trees_all_equal_structs(before, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert [x.weak_type for x in jax.tree.leaves(before)] == [x.weak_type for x in jax.tree.leaves(after)]


@every
def test_scan_is_the_loop(make: Callable[[], Any]) -> None:
    tx = make()
    step = stepper(tx)
    scanned, _ = jax.lax.scan(lambda carry, _: (step(*carry), None), (PARAMS, tx.init(PARAMS)), length=4)
    assert_close(scanned, loop(step, PARAMS, tx.init(PARAMS)))


@every
def test_vmap_over_models_is_each_model(make: Callable[[], Any]) -> None:
    tx = make()
    batch = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), PARAMS)
    together = loop(jax.vmap(stepper(tx)), batch, jax.vmap(tx.init)(batch))
    for i in range(3):
        params = jax.tree.map(lambda p, i=i: p[i], batch)
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), loop(stepper(tx), params, tx.init(params)))


@every
def test_donated_buffers_are_all_used(make: Callable[[], Any]) -> None:
    tx = make()
    params = jax.tree.map(jnp.array, PARAMS)
    state = tx.init(params)
    old = jax.tree.leaves((params, state))
    loop(jax.jit(stepper(tx), donate_argnums=(0, 1)), params, state)  # an unused donation would be a warning
    assert all(x.is_deleted() for x in old)


@every
def test_update_outside_jit_is_one_program(make: Callable[[], Any]) -> None:
    tx = make()
    program = jax.make_jaxpr(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    calls = [e for e in program.eqns if "jaxpr" in e.params and e.params["name"] == "_update_tree"]
    assert len(calls) == 1


def count_traces(equation: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    traces = [0]

    @functools.wraps(equation)
    def counted(*args: Any, **numbers: Any) -> Any:
        traces[0] += 1
        return equation(*args, **numbers)

    return counted, traces


def test_arrays_of_one_shape_are_traced_once() -> None:
    equation, traces = count_traces(transform.average)
    tx = transform.transformation((equation,), {"alpha": 0.9, "gain": 0.1})
    params = [jnp.ones(3) for _ in range(20)] + [jnp.ones((2, 2)) for _ in range(20)]
    jax.jit(tx.update)(params, tx.init(params))
    assert traces == [2]


def test_rebuilding_the_transformation_compiles_nothing_new() -> None:
    equation, traces = count_traces(transform.average)
    params = jnp.ones(3)
    for alpha in (0.5, 0.9, 0.99):
        tx = transform.transformation((equation,), {"alpha": alpha, "gain": 1 - alpha})
        tx.update(params, tx.init(params))
    assert traces == [1]


def test_eager_updates_with_other_numbers_share_one_program() -> None:
    params = jnp.ones(31)
    rmsprop(0.1, 0.9, 1e-8, 0.1, 0.9).update(params, rmsprop(momentum=0.9).init(params), params)
    before = transform._update_tree._cache_size()
    for lr in (0.2, 1, np.float64(0.3), np.float32(0.4), lambda step: 0.5):
        rmsprop(lr, 0.8, 1e-7, 0.2, 0.8).update(params, rmsprop(momentum=0.9).init(params), params)
    assert transform._update_tree._cache_size() == before


# --- Sweeps ----------------------------------------------------------------------------------------------


def test_sweep_of_64_settings_is_one_trace_and_equals_64_runs() -> None:
    rates, epsilons = np.meshgrid(np.logspace(-4, 0, 8), np.logspace(-8, -1, 8))
    rates, epsilons = (x.ravel().astype(np.float32) for x in (rates, epsilons))

    @chex.assert_max_traces(1)
    def train(lr: Any, eps: Any) -> Any:
        tx = rmsprop(lr=lr, eps=eps, momentum=0.5)
        return loop(stepper(tx), PARAMS, tx.init(PARAMS))

    together = jax.jit(jax.vmap(train))(rates, epsilons)
    for i in range(64):
        tx = rmsprop(lr=float(rates[i]), eps=float(epsilons[i]), momentum=0.5)
        alone = loop(stepper(tx), PARAMS, tx.init(PARAMS))
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone, ulps=128)
    chex.clear_trace_counter()


@pytest.mark.parametrize("name", ["lr", "alpha", "eps", "weight_decay", "momentum"])
def test_every_number_can_be_vmapped(name: str) -> None:
    values = jnp.array([0.1, 0.3])

    def train(value: Any) -> Any:
        tx = rmsprop(**{name: value})
        return loop(stepper(tx), PARAMS, tx.init(PARAMS))[0]

    together = jax.vmap(train)(values)
    for i in range(2):
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), train(values[i]))


# --- With Optax ------------------------------------------------------------------------------------------


def test_inject_hyperparams_takes_every_number_and_never_recompiles() -> None:
    tx = optax.inject_hyperparams(rmsprop)(0.1, 0.9, 1e-8, 0.1, 0.9, True)
    assert set(tx.init(PARAMS).hyperparams) == {"lr", "alpha", "eps", "weight_decay", "momentum"}
    equal = rmsprop(*(jnp.float32(x) for x in (0.1, 0.9, 1e-8, 0.1, 0.9)), True)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert_close(updates, equal.update(PARAMS, equal.init(PARAMS), PARAMS)[0])
    before = transform._update_tree._cache_size(), transform._update_array._cache_size()
    step = jax.jit(chex.assert_max_traces(stepper(tx), 1))
    params = PARAMS
    for i, name in enumerate(state.hyperparams):
        state.hyperparams[name] = state.hyperparams[name] * 0.5
        updates, state = tx.update(PARAMS, state, PARAMS)
        params, state = step(params, state)
        assert state.inner_state.step == 1 + 2 * (i + 1)
    assert (transform._update_tree._cache_size(), transform._update_array._cache_size()) == before
    assert step._cache_size() == 1
    chex.clear_trace_counter()


def test_inject_hyperparams_applies_the_new_number() -> None:
    tx = optax.inject_hyperparams(rmsprop)(lr=0.1)
    state = tx.init(PARAMS)
    first, _ = tx.update(PARAMS, state, PARAMS)
    state.hyperparams["lr"] = state.hyperparams["lr"] * 3
    second, _ = tx.update(PARAMS, state, PARAMS)
    assert_close(second, jax.tree.map(lambda u: 3 * u, first))


def test_inject_hyperparams_takes_schedules() -> None:
    schedule = optax.linear_schedule(0.1, 0.0, 5)
    injected, direct = optax.inject_hyperparams(rmsprop)(lr=schedule), rmsprop(lr=schedule)
    ours, _ = loop(stepper(injected), PARAMS, injected.init(PARAMS))
    assert_close(ours, loop(stepper(direct), PARAMS, direct.init(PARAMS))[0])


@every
def test_tree_map_params_visits_the_slots_only(make: Callable[[], Any]) -> None:
    tx = make()
    state = tx.init(PARAMS)
    marked = optax.tree.map_params(tx, lambda _: "slot", state)
    old, new = (getattr(found, "inner_state", found) for found in (state, marked))
    assert new.step is old.step
    slots = [slot for slot in new[1:] if slot is not None]
    assert set(jax.tree.leaves(slots)) == {"slot"}
    assert len(slots) == sum(slot is not None for slot in old[1:])
    assert jax.tree.leaves(marked).count("slot") == len(jax.tree.leaves(slots))


def test_slots_are_found_by_name_inside_a_chain() -> None:
    tx = optax.chain(optax.clip_by_global_norm(1.0), rmsprop(momentum=0.9), optax.add_decayed_weights(1e-4))
    state = tx.init(PARAMS)
    for name in RMSPropState._fields:
        assert optax.tree.get(state, name) is getattr(state[1], name)


def test_chain_before_and_after_is_composition() -> None:
    tx = optax.chain(optax.scale(3.0), rmsprop(momentum=0.9), optax.scale(0.5))
    inner = rmsprop(momentum=0.9)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    expected, _ = inner.update(jax.tree.map(lambda g: 3 * g, PARAMS), inner.init(PARAMS), PARAMS)
    assert_close(updates, jax.tree.map(lambda u: 0.5 * u, expected))


@every
def test_unknown_keyword_arguments_are_ignored(make: Callable[[], Any]) -> None:
    tx = make()
    with_extra = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0, grad=PARAMS, whatever="x")
    chex.assert_trees_all_equal(with_extra, tx.update(PARAMS, tx.init(PARAMS), PARAMS))


def test_partition_gives_each_group_its_own_rule() -> None:
    labels = {"dense": "fast", "scale": "slow", "gain": "slow"}
    tx = optax.partition({"fast": rmsprop(0.1, momentum=0.9), "slow": rmsprop(0.001)}, labels)
    grouped, state = loop(stepper(tx), PARAMS, tx.init(PARAMS))
    for name, rule in {"dense": rmsprop(0.1, momentum=0.9), "scale": rmsprop(0.001), "gain": rmsprop(0.001)}.items():
        alone, _ = loop(stepper(rule), {name: PARAMS[name]}, rule.init({name: PARAMS[name]}))
        assert_close(grouped[name], alone[name])
    assert len(jax.tree.leaves(state)) == 2 + 2 * 2 + 2  # steps; two slots of two arrays; one slot of two


def test_masked_leaves_pass_through() -> None:
    tx = optax.masked(rmsprop(), {"dense": True, "scale": False, "gain": False})
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["gain"], PARAMS["gain"])
    np.testing.assert_allclose(updates["dense"][1][1:], -0.1, rtol=1e-6)
    assert len(jax.tree.leaves(state)) == 3


def test_multi_steps_updates_with_the_mean() -> None:
    tx = optax.MultiSteps(rmsprop(momentum=0.9), every_k_schedule=2)
    state = tx.init(PARAMS)
    none, state = tx.update(PARAMS, state, PARAMS)
    assert all((u == 0).all() for u in jax.tree.leaves(none))
    updates, state = tx.update(jax.tree.map(lambda g: 3 * g, PARAMS), state, PARAMS)
    inner = rmsprop(momentum=0.9)
    assert_close(updates, inner.update(jax.tree.map(lambda g: 2 * g, PARAMS), inner.init(PARAMS), PARAMS)[0])
    assert optax.tree.get(state, "square_avg") is not None


def test_apply_if_finite_leaves_state_untouched() -> None:
    tx = optax.apply_if_finite(rmsprop(momentum=0.9, centered=True), max_consecutive_errors=5)
    _, before = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    bad = jax.tree.map(lambda g: g * jnp.nan, PARAMS)
    updates, after = tx.update(bad, before, PARAMS)
    chex.assert_trees_all_equal(after.inner_state, before.inner_state)
    assert all((u == 0).all() for u in jax.tree.leaves(updates))


def test_lookahead_synchronises() -> None:
    tx = optax.lookahead(rmsprop(0.1), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.grad(loss)(params.fast), state, params)
        params = optax.apply_updates(params, updates)
    assert_close(params.fast, params.slow)
    assert loss(params.fast) < loss(PARAMS)


@every
def test_loss_falls_unless_it_was_to_rise(make: Callable[[], Any]) -> None:
    tx = make()
    step = stepper(tx)
    params, _ = loop(step, PARAMS, tx.init(PARAMS))
    climbs = make in (TRANSFORMATIONS["everything"], TRANSFORMATIONS["scaling"], TRANSFORMATIONS["corrected"])
    assert (loss(params) > loss(PARAMS)) == climbs


# --- In processes of their own ---------------------------------------------------------------------------


def in_fresh_process(program: str, **environment: str) -> None:
    path = str(pathlib.Path(transform.__file__).parents[1])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | environment
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_mode_gives_the_same_bits() -> None:
    # Without fused multiply-add a product and a sum are rounded alike in every program.
    in_fresh_process(BIT_IDENTICAL, XLA_FLAGS="--xla_cpu_max_isa=AVX")


def test_state_follows_sharded_parameters() -> None:
    in_fresh_process(SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=8")


BIT_IDENTICAL = """
import jax, jax.numpy as jnp, numpy as np, optax
from rmsprop_jax import rmsprop, scale_by_rmsprop

grads = np.random.default_rng(0).normal(size=(10, 2, 33)).astype(np.float32)
for tx in (
    rmsprop(weight_decay=0.1, momentum=0.9),
    rmsprop(weight_decay=0.1, momentum=0.9, centered=True, maximize=True),
    rmsprop(centered=True),
    scale_by_rmsprop(bias_correction=True),
):
    params = {"a": jnp.linspace(-1, 1, 33), "b": jnp.ones(33)}

    def step(carry, g):
        params, state = carry
        updates, state = tx.update({"a": g[0], "b": g[1]}, state, params)
        return (optax.apply_updates(params, updates), state), updates

    def run(step):
        carry, history = (params, tx.init(params)), []
        for g in grads:
            carry, updates = step(carry, g)
            history.append((*carry, updates))
        return history

    eager, jitted = run(step), run(jax.jit(step))
    one, first = (lambda x: x[None]), (lambda x: x[0])
    batched = run(lambda carry, g: jax.tree.map(first, jax.vmap(step)(*jax.tree.map(one, (carry, g)))))
    for other in (jitted, batched):
        jax.tree.map(np.testing.assert_array_equal, eager, other)
    scanned = jax.lax.scan(step, (params, tx.init(params)), grads)[0]
    jax.tree.map(np.testing.assert_array_equal, eager[-1][:2], scanned)
    complex_tx_params = jax.lax.complex(params["a"], params["b"])
    update, state = tx.update(jax.lax.complex(*grads[0]), tx.init(complex_tx_params), complex_tx_params)
    np.testing.assert_array_equal(update.real, eager[0][2]["a"])
    np.testing.assert_array_equal(update.imag, eager[0][2]["b"])
"""

SHARDED = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec as P
from rmsprop_jax import rmsprop

assert jax.device_count() == 8
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
whole = {
    "w": jnp.linspace(-1, 1, 32).reshape(8, 4),
    "h": jnp.ones((8, 4), jnp.bfloat16),
    "z": jnp.ones((8, 4), jnp.complex64),
    "b": jnp.ones(4),
}
specs = {"w": P("x", "y"), "h": P("y", "x"), "z": P("x"), "b": P()}
params = {name: jax.device_put(p, NamedSharding(mesh, specs[name])) for name, p in whole.items()}
tx = rmsprop(0.1, weight_decay=0.1, momentum=0.9, centered=True)
state = tx.init(params)

assert state.step.sharding == NamedSharding(mesh, P())
for slot in state[1:]:
    for name, leaf in slot.items():
        assert leaf.sharding == params[name].sharding, (name, leaf.sharding)

traces = 0
@jax.jit
def step(params, state):
    global traces
    traces += 1
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state

sharded = params, state
single = whole, tx.init(whole)
for _ in range(3):
    sharded, single = step(*sharded), step(*single)
assert traces == 2 and step._cache_size() == 2, (traces, step._cache_size())  # one each
for leaf, start in zip(jax.tree.leaves(sharded), jax.tree.leaves((params, state)), strict=True):
    assert leaf.sharding.is_equivalent_to(start.sharding, leaf.ndim)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a.astype(complex), b.astype(complex), rtol=1e-5), sharded, single)

here = jax.device_put(whole, jax.devices()[3])  # committed to one device that is not the default
apart = here, tx.init(here)
assert apart[1].step.devices() == {jax.devices()[3]}
before = step._cache_size()
for _ in range(3):
    apart = step(*apart)
assert step._cache_size() == before + 1

compiled = step.lower(params, state).compile()
assert "all-" not in compiled.as_text(), "an elementwise update needs no communication"

shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
assert tx.init(shapes).step.sharding == NamedSharding(mesh, P())
assert tx.init(shapes).square_avg["w"].sharding == params["w"].sharding
"""
