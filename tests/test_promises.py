"""JAX citizenship: one table of transformations, one list of promises that each of them keeps.

A promise that needs the compiler compiles one program for all transformations: the name of the transformation is then
the first part of the path in the message. All programs do the same four steps, so that most are compared with one loop.
"""

import contextlib
import functools
import os
import pathlib
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

from compare import assert_alike, assert_close, assert_same
from conftest import QUICK, USERS
from rmsprop_jax import RMSPropState, dialects, lift, recorder, rmsprop, scale_by_rmsprop
from rmsprop_jax.equations import average

Transformation = optax.GradientTransformationExtraArgs


def falling(start: float) -> Callable[[Any], Any]:
    """A schedule that is different at every step, and promotes no dtypes."""
    return lambda step: start * jnp.exp2(-step.astype(jnp.float32))


def matrices(params: Any) -> Any:
    """A mask of weight decay, for any kind of tree."""
    return jax.tree.map(lambda p: getattr(p, "ndim", 0) == 2, params)


TRANSFORMATIONS: dict[str, Callable[[], Transformation]] = {
    "default": rmsprop,
    "momentum": lambda: rmsprop(momentum=0.9),
    "everything": lambda: rmsprop(0.02, 0.95, 1e-6, 0.01, 0.9, True, maximize=True),
    "mask": lambda: rmsprop(weight_decay=0.1, weight_decay_mask=matrices),
    "schedule": lambda: rmsprop(optax.warmup_cosine_decay_schedule(0.01, 0.1, 2, 8), centered=True),
    "schedules": lambda: rmsprop(falling(0.02), falling(0.9), falling(0.1), falling(0.1), falling(0.9), True),
    "arrays": lambda: rmsprop(*(jnp.float32(x) for x in (0.02, 0.95, 1e-6, 0.1, 0.9))),
    "scaling": lambda: scale_by_rmsprop(momentum=0.9),
    "corrected": lambda: scale_by_rmsprop(0.999, 1e-20, eps_in_sqrt=True, bias_correction=True),
    "narrow": lambda: rmsprop(momentum=0.9, accumulator_dtype="bfloat16"),
    "tensorflow": lambda: dialects.tensorflow(0.01, momentum=0.9, centered=True),
    "keras": lambda: dialects.keras(falling(0.02), falling(0.9), falling(0.9), falling(0.1), False, falling(0.1)),
    "timm": lambda: dialects.timm(weight_decay=0.1, momentum=0.9, decoupled_decay=True, lr_in_momentum=False),
    "cautious": lambda: dialects.timm(
        falling(0.02), 0.9, 1e-6, 0.1, 0.9, False, True, corrected_weight_decay=True, caution=True, max_lr_snapshot=0.02
    ),
    "stable_baselines3": lambda: dialects.stable_baselines3(weight_decay=0.1, momentum=0.9, centered=True),
    "dqn": dialects.dqn,
    "dreamer": dialects.dreamer,
    "optax": lambda: dialects.optax(0.01, momentum=0.9, nesterov=True, bias_correction=True),
    "recorded": lambda: recorder.record_statistics(rmsprop(momentum=0.9), every=2),
    "recorded dialect": lambda: recorder.record_statistics(dialects.tensorflow(falling(0.1), centered=True), every=1),
    "recorded chain": lambda: recorder.record_statistics(optax.chain(dialects.dreamer(), optax.scale(0.5)), every=3),
}
CLIMBING = {"everything", "scaling", "corrected"}
every = pytest.mark.parametrize("name", TRANSFORMATIONS)

# A list in a dict, a scalar, and half precision. Gradients have the signs of their parameters and keep them, so that
# nothing cancels and every entry can be compared with itself. One entry never has a gradient; a leaf has none in the
# first update.
PARAMS = {
    "dense": [jnp.array([[1.0, -0.5, 0.75], [-1.5, 0.25, 2.0]])],
    "scale": jnp.float32(0.5),
    "gain": jnp.array([1.0, -0.75, 2.0, 0.5], jnp.bfloat16),
}
STEPS = 4


def gradients() -> list[Any]:
    rng = np.random.default_rng(0)

    def leaf(p: jax.Array) -> jax.Array:
        return jnp.asarray(np.sign(np.asarray(p, np.float32)) * rng.lognormal(size=p.shape), p.dtype)

    trees = [jax.tree.map(leaf, PARAMS) for _ in range(STEPS)]
    trees[0]["scale"] = jnp.zeros(())
    for tree in trees:
        tree["dense"][0] = tree["dense"][0].at[0, 2].set(0)
    return trees


GRADIENTS = gradients()
# Programs round differently, since XLA contracts a · b + c into one operation as it sees fit, on some processors.
# Measured maxima in this file, from SSE4.2 to AVX2: 5 units of float32 after four updates; none of bfloat16, but an
# update that is nearly between two of its numbers may be rounded to the other one.
ULPS = {"float32": 10, "bfloat16": 1}


def devices(number: int) -> dict[str, str]:
    """The environment of a process with so many devices, which compiles as this one does."""
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={number}"}


@functools.cache
def built(name: str) -> Transformation:
    with jax.ensure_compile_time_eval():  # kept for other traces than the one that may ask first
        return TRANSFORMATIONS[name]()


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Says in an error which transformation it came from."""
    try:
        yield
    except Exception as error:
        error.add_note(f"transformation: {name}")
        raise


def for_all(function: Callable[..., Any], *trees: dict[str, Any], names: Any = TRANSFORMATIONS) -> dict[str, Any]:
    """``function`` of every transformation and of its part of ``trees``."""
    results = {}
    for name in names:
        with naming(name):
            results[name] = function(built(name), *(tree[name] for tree in trees))
    return results


def updates_of_all(states: dict[str, Any], grads: Any, params: Any = PARAMS) -> tuple[dict[str, Any], dict[str, Any]]:
    """The updates and the next states of all transformations."""
    done = for_all(lambda tx, state: tx.update(grads, state, params), states)
    return {name: updates for name, (updates, _) in done.items()}, {name: state for name, (_, state) in done.items()}


@functools.cache
def looped(name: str) -> list[tuple[Any, Any]]:
    """What the other programs are compared with: updates and state at the start and after each update.

    The parameters stay what they are: rounding them would come back as another weight decay.
    """
    tx = built(name)
    moments = [(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS))]
    for grads in GRADIENTS:
        moments.append(tx.update(grads, moments[-1][1], PARAMS))
    return moments


def after(steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """All updates and all states after so many updates."""
    return tuple({name: looped(name)[steps][part] for name in TRANSFORMATIONS} for part in (0, 1))


def assert_is_loop(got: Any, want: Any) -> None:
    """Up to rounding; statistics of a parameter without gradients may be infinite."""
    assert_close(got, want, ulps=ULPS, nonfinite="equal")


# --- Compilation -----------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What came of all updates of all transformations in one program, which takes over the memory of its arguments."""

    last: Any
    traces: int
    programs: int
    deleted: dict[str, list[bool]]


# The program of all transformations is that of users. XLA would optimize the recorders' statistics for as long again.
GROUPS = {
    "plain": (USERS, [name for name in TRANSFORMATIONS if not name.startswith("recorded")]),
    "recorded": (QUICK, [name for name in TRANSFORMATIONS if name.startswith("recorded")]),
}
every_group = pytest.mark.parametrize("group", GROUPS)


@functools.cache
def compiled(group: str) -> Run:
    options, names = GROUPS[group]
    traces = 0

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=options)
    def update(params: Any, states: Any, grads: Any) -> Any:
        nonlocal traces
        traces += 1
        done = for_all(lambda tx, params, state: tx.update(grads, state, params), params, states, names=names)
        moved = {name: optax.apply_updates(params[name], updates) for name, (updates, _) in done.items()}
        return moved, done

    states = {name: jax.tree.map(jnp.array, looped(name)[0][1]) for name in names}
    deleted: dict[str, list[bool]] = {name: [] for name in names}
    for grads in GRADIENTS:
        params = {name: jax.tree.map(jnp.array, PARAMS) for name in names}
        _, done = update(params, states, grads)  # an unused donation would be a warning
        for name in names:
            deleted[name] += [x.is_deleted() for x in jax.tree.leaves((params[name], states[name]))]
        states = {name: state for name, (_, state) in done.items()}
    return Run(done, traces, update._cache_size(), deleted)


@every_group
def test_compiled_update_is_the_one_outside_jit(group: str) -> None:
    assert_is_loop(compiled(group).last, {name: looped(name)[STEPS] for name in GROUPS[group][1]})


@pytest.mark.device("program")
@every_group
def test_step_is_traced_and_compiled_once(group: str) -> None:
    assert (compiled(group).traces, compiled(group).programs) == (1, 1)


@pytest.mark.device("donation")
@every_group
def test_donated_buffers_are_all_used(group: str) -> None:
    assert [name for name, flags in compiled(group).deleted.items() if not flags or not all(flags)] == []


@every
def test_updates_and_state_keep_structure_shapes_and_types(name: str) -> None:
    group = "recorded" if name in GROUPS["recorded"][1] else "plain"
    state = looped(name)[0][1]
    assert_alike(looped(name)[-1], (PARAMS, state), weak_types=True)
    assert_alike(compiled(group).last[name], (PARAMS, state), weak_types=True)


@every
def test_update_without_jit_is_the_same(name: str) -> None:
    tx = built(name)
    with jax.disable_jit():
        state = tx.init(PARAMS)
        for grads in GRADIENTS[:2]:
            updates, state = tx.update(grads, state, PARAMS)
    assert_is_loop((updates, state), looped(name)[2])


@every
def test_numpy_arrays_are_as_good_as_those_of_jax(name: str) -> None:
    grads, state, params = jax.tree.map(np.asarray, (GRADIENTS[1], looped(name)[1][1], PARAMS))
    assert_same(built(name).update(grads, state, params), looped(name)[2], nonfinite="equal")


def test_scan_is_the_loop() -> None:
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *GRADIENTS)

    @jax.jit
    def scan(states: Any, gradients: Any) -> Any:
        states, updates = jax.lax.scan(lambda states, g: updates_of_all(states, g)[::-1], states, gradients)
        return jax.tree.map(lambda x: x[-1], updates), states

    assert_is_loop(scan(after(0)[1], stacked), after(STEPS))


def test_vmap_over_models_is_each_model() -> None:
    batch = [jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), tree) for tree in (PARAMS, *GRADIENTS[:2])]

    def train(params: Any, *gradients: Any) -> Any:
        states = for_all(lambda tx: tx.init(params))
        for grads in gradients:
            updates, states = updates_of_all(states, grads, params)
        return updates, states

    together = jax.jit(jax.vmap(train))(*batch)
    for i in range(3):
        one = [jax.tree.map(lambda x, i=i: x[i], tree) for tree in batch]
        assert_is_loop(jax.tree.map(lambda x, i=i: x[i], together), train(*one))


@pytest.mark.device("program")
@every
def test_update_outside_jit_is_one_program(name: str) -> None:
    program = jax.make_jaxpr(built(name).update)(GRADIENTS[0], looped(name)[0][1], PARAMS)
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
    equation, traces = count_traces(average)
    tx = lift.transformation((equation,), {"alpha": 0.9})
    params = [jnp.ones(3) for _ in range(20)] + [jnp.ones((2, 2)) for _ in range(20)]
    jax.jit(tx.update)(params, tx.init(params))
    assert traces == [2]


def test_rebuilding_the_transformation_compiles_nothing_new() -> None:
    equation, traces = count_traces(average)
    params = jnp.ones(3)
    for alpha in (0.5, 0.9, 0.99):
        tx = lift.transformation((equation,), {"alpha": alpha})
        tx.update(params, tx.init(params))
    assert traces == [1]


def test_eager_updates_with_other_numbers_share_one_program() -> None:
    params = jnp.ones(31)
    rmsprop(0.1, 0.9, 1e-8, 0.1, 0.9).update(params, rmsprop(momentum=0.9).init(params), params)
    before = lift._update_tree._cache_size()
    for lr in (0.2, 1, np.float64(0.3), np.float32(0.4), lambda step: 0.5):
        rmsprop(lr, 0.8, 1e-7, 0.2, 0.8).update(params, rmsprop(momentum=0.9).init(params), params)
    assert lift._update_tree._cache_size() == before


# --- Structure and types -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TRANSFORMATIONS if name != "schedule"])  # Optax's promotes dtypes
def test_strict_promotion_of_dtypes_and_ranks(name: str) -> None:
    params = PARAMS | {"complex": jnp.ones(2, jnp.complex64), "half": jnp.ones(2, jnp.float16)}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        state = jax.eval_shape(built(name).init, params)
        updates, after = jax.eval_shape(built(name).update, params, state, params)
    assert_alike(updates, jax.eval_shape(lambda: params))
    assert_alike(after, state)


@every
@pytest.mark.parametrize(
    "tree",
    [{}, {"a": None}, (jnp.ones(()), [jnp.zeros((0, 2))]), {"a": optax.MaskedNode(), "b": jnp.ones(2)}],
    ids=["empty", "None", "scalar and nothing", "masked"],
)
def test_any_tree_is_kept(name: str, tree: Any) -> None:
    state = jax.eval_shape(built(name).init, tree)
    updates, after = jax.eval_shape(built(name).update, tree, state, tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    assert_alike(after, state)


@every
def test_tree_map_params_visits_the_slots_only(name: str) -> None:
    tx, state = built(name), looped(name)[0][1]
    marked = optax.tree.map_params(tx, lambda _: "slot", state)
    is_found = lambda x: isinstance(x, RMSPropState)  # noqa: E731
    (old,), (new,) = (filter(is_found, jax.tree.leaves(tree, is_leaf=is_found)) for tree in (state, marked))
    assert new.step is old.step
    slots = [slot for slot in new[1:] if slot is not None]
    assert set(jax.tree.leaves(slots)) == {"slot"}
    assert len(slots) == sum(slot is not None for slot in old[1:])
    assert jax.tree.leaves(marked).count("slot") == len(jax.tree.leaves(slots))


@every
def test_unknown_keyword_arguments_are_ignored(name: str) -> None:
    found = built(name).update(GRADIENTS[1], looped(name)[1][1], PARAMS, value=1.0, grad=PARAMS, whatever="x")
    assert_same(found, looped(name)[2], nonfinite="equal")


def loss(params: Any) -> jax.Array:
    return sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(params))


@every
def test_loss_falls_unless_it_was_to_rise(name: str) -> None:
    tx, params, state = built(name), PARAMS, looped(name)[0][1]
    for _ in range(STEPS):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    before, after = float(loss(PARAMS)), float(loss(params))
    assert (after > before) if name in CLIMBING else (after < before)


# --- NaN ---------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("jit", [False, True])
def test_nothing_computes_a_nan_that_it_throws_away(name: str, jit: bool) -> None:
    """Neither at the start, nor for gradients that are 0 or missing. Without jit every operation is looked at."""
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    with jax.debug_nans(True), contextlib.nullcontext() if jit else jax.disable_jit():
        tx = TRANSFORMATIONS[name]()
        state = tx.init(PARAMS)
        for grads in (zero, GRADIENTS[1], zero) if jit else (zero, GRADIENTS[1], zero | {"gain": None}):
            updates, state = tx.update(grads, state, PARAMS)
            assert all(np.isfinite(np.asarray(leaf, float)).all() for leaf in jax.tree.leaves((updates, state)))


def test_checks_of_every_operation_find_no_nan() -> None:
    names = ("everything", "corrected", "dreamer", "recorded")
    params = {"w": jnp.array([[0.0, 1.0]])}

    def update(grads: Any) -> Any:
        return for_all(lambda tx: tx.update(grads, tx.init(params), params), names=names)

    error, _ = jax.jit(checkify.checkify(update, errors=checkify.float_checks))(jax.tree.map(jnp.zeros_like, params))
    assert error.get() is None


# --- Sweeps ----------------------------------------------------------------------------------------------


def trained(tx: Transformation, steps: int = STEPS) -> tuple[Any, Any]:
    """Updates and state after some updates."""
    state = tx.init(PARAMS)
    for grads in GRADIENTS[:steps]:
        updates, state = tx.update(grads, state, PARAMS)
    return updates, state


def test_sweep_of_64_settings_is_one_trace_and_equals_64_runs() -> None:
    rates, epsilons = np.meshgrid(np.logspace(-4, 0, 8), np.logspace(-8, -1, 8))
    rates, epsilons = (x.ravel().astype(np.float32) for x in (rates, epsilons))

    @chex.assert_max_traces(1)
    def train(lr: Any, eps: Any) -> Any:
        return trained(rmsprop(lr=lr, eps=eps, momentum=0.5), steps=2)

    together = jax.jit(jax.vmap(train))(rates, epsilons)
    for i in range(64):
        alone = trained(rmsprop(lr=float(rates[i]), eps=float(epsilons[i]), momentum=0.5), steps=2)
        assert_is_loop(jax.tree.map(lambda x, i=i: x[i], together), alone)
    chex.clear_trace_counter()


def test_every_number_can_be_vmapped() -> None:
    names, values = ("lr", "alpha", "eps", "weight_decay", "momentum"), jnp.array([0.1, 0.3])

    def train(value: Any) -> Any:
        return {name: trained(rmsprop(**{name: value}), steps=2) for name in names}

    together = jax.jit(jax.vmap(train))(values)
    for i in range(2):
        assert_is_loop(jax.tree.map(lambda x, i=i: x[i], together), train(values[i]))


# --- With Optax ------------------------------------------------------------------------------------------


def test_inject_hyperparams_takes_every_number_and_never_recompiles() -> None:
    tx = optax.inject_hyperparams(rmsprop)(0.1, 0.9, 1e-8, 0.1, 0.9, True)
    assert set(tx.init(PARAMS).hyperparams) == {"lr", "alpha", "eps", "weight_decay", "momentum"}
    equal = rmsprop(*(jnp.float32(x) for x in (0.1, 0.9, 1e-8, 0.1, 0.9)), True)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert_same(updates, equal.update(PARAMS, equal.init(PARAMS), PARAMS)[0])
    before = lift._update_tree._cache_size(), lift._update_leaf._cache_size()
    update = jax.jit(chex.assert_max_traces(tx.update, 1))
    for i, name in enumerate(state.hyperparams):
        state.hyperparams[name] = state.hyperparams[name] * 0.5
        updates, state = tx.update(PARAMS, state, PARAMS)
        updates, state = update(GRADIENTS[0], state, PARAMS)
        assert state.inner_state.step == 1 + 2 * (i + 1)
    assert (lift._update_tree._cache_size(), lift._update_leaf._cache_size()) == before
    assert update._cache_size() == 1
    chex.clear_trace_counter()


# What a dialect needs, and numbers that are not its defaults.
INJECTED = {
    "tensorflow": dict(learning_rate=0.02, decay=0.8, momentum=0.7, epsilon=0.1),
    "keras": dict(learning_rate=0.02, rho=0.8, momentum=0.7, epsilon=0.1, weight_decay=0.1),
    "timm": dict(lr=0.02, alpha=0.8, eps=0.1, weight_decay=0.1, momentum=0.7, max_lr_snapshot=0.04),
    "stable_baselines3": dict(lr=0.02, alpha=0.8, eps=0.1, weight_decay=0.1, momentum=0.7),
    "dqn": dict(learning_rate=0.02, squared_gradient_momentum=0.8, min_squared_gradient=0.1),
    "dreamer": dict(lr=0.02, beta2=0.8, eps=0.1, beta1=0.7),
    "optax": dict(learning_rate=0.02, decay=0.8, eps=0.1, momentum=0.7),
}


@pytest.mark.parametrize("name", INJECTED)
def test_inject_hyperparams_takes_every_number_of_a_dialect(name: str) -> None:
    build, numbers = getattr(dialects, name), INJECTED[name]
    tx, params = optax.inject_hyperparams(build)(**numbers), PARAMS["dense"][0]
    state = tx.init(params)
    assert state.hyperparams.keys() >= numbers.keys()
    for factor in (1.0, 0.5):
        current = {key: jnp.float32(factor) * jnp.float32(x) for key, x in numbers.items()}
        state.hyperparams.update(current)
        expected = build(**current).update(GRADIENTS[1]["dense"][0], state.inner_state, params)
        updates, state = tx.update(GRADIENTS[1]["dense"][0], state, params)
        assert_same((updates, state.inner_state), expected)


def test_inject_hyperparams_applies_the_new_number() -> None:
    tx = optax.inject_hyperparams(rmsprop)(lr=0.125)
    state = tx.init(PARAMS)
    first, _ = tx.update(PARAMS, state, PARAMS)
    state.hyperparams["lr"] = state.hyperparams["lr"] * 4
    second, _ = tx.update(PARAMS, state, PARAMS)
    assert_same(second, jax.tree.map(lambda u: 4 * u, first))


def test_inject_hyperparams_takes_schedules() -> None:
    schedule = optax.linear_schedule(0.1, 0.0, 5)
    injected = optax.inject_hyperparams(rmsprop)(lr=schedule)
    direct = rmsprop(schedule, *(jnp.float32(x) for x in (0.99, 1e-8, 0.0, 0.0)))
    updates, state = trained(injected)
    assert_same((updates, state.inner_state), trained(direct))


def test_slots_are_found_by_name_inside_a_chain() -> None:
    tx = optax.chain(optax.clip_by_global_norm(1.0), rmsprop(momentum=0.9), optax.add_decayed_weights(1e-4))
    state = tx.init(PARAMS)
    for name in RMSPropState._fields:
        assert optax.tree.get(state, name) is getattr(state[1], name)


def test_chain_before_and_after_is_composition() -> None:
    tx = optax.chain(optax.scale(4.0), rmsprop(momentum=0.9), optax.scale(0.5))
    inner = rmsprop(momentum=0.9)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    expected, inner_state = inner.update(jax.tree.map(lambda g: 4 * g, PARAMS), inner.init(PARAMS), PARAMS)
    assert_same((updates, state[1]), (jax.tree.map(lambda u: 0.5 * u, expected), inner_state))


def test_partition_gives_each_group_its_own_rule() -> None:
    labels = {"dense": "fast", "scale": "slow", "gain": "slow"}
    tx = optax.partition({"fast": rmsprop(0.1, momentum=0.9), "slow": rmsprop(0.001)}, labels)
    grouped, state = trained(tx)
    for names, rule in ((("dense",), rmsprop(0.1, momentum=0.9)), (("scale", "gain"), rmsprop(0.001))):
        alone, _ = trained(rule)  # of all parameters: none of them knows of the others
        assert_same({name: grouped[name] for name in names}, {name: alone[name] for name in names})
    assert len(jax.tree.leaves(state)) == 2 + 2 * 1 + 2  # steps; two slots of one array; one slot of two


def test_masked_leaves_pass_through() -> None:
    tx = optax.masked(rmsprop(), {"dense": True, "scale": False, "gain": False})
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    for name in ("scale", "gain"):
        assert_same(updates[name], PARAMS[name])
    assert_close(updates["dense"][0], -0.1 * np.sign(PARAMS["dense"][0]), rtol=1e-6)  # lr / √(1 − alpha), and eps
    assert len(jax.tree.leaves(state)) == 2


def test_multi_steps_updates_with_the_mean() -> None:
    tx = optax.MultiSteps(rmsprop(momentum=0.9), every_k_schedule=2)
    state = tx.init(PARAMS)
    none, state = tx.update(PARAMS, state, PARAMS)
    assert_same(none, jax.tree.map(jnp.zeros_like, PARAMS))
    updates, state = tx.update(jax.tree.map(lambda g: 3 * g, PARAMS), state, PARAMS)
    inner = rmsprop(momentum=0.9)
    expected, inner_state = inner.update(jax.tree.map(lambda g: 2 * g, PARAMS), inner.init(PARAMS), PARAMS)
    assert_close((updates, state.inner_opt_state), (expected, inner_state), ulps=4)  # the mean is rounded


def test_apply_if_finite_leaves_state_untouched() -> None:
    tx = optax.apply_if_finite(rmsprop(momentum=0.9, centered=True), max_consecutive_errors=5)
    _, before = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    bad = jax.tree.map(lambda g: g * jnp.nan, PARAMS)
    updates, after = tx.update(bad, before, PARAMS)
    assert_same(after.inner_state, before.inner_state)
    assert_same(updates, jax.tree.map(jnp.zeros_like, PARAMS))


def test_lookahead_synchronizes() -> None:
    tx = optax.lookahead(rmsprop(0.1), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.grad(loss)(params.fast), state, params)
        params = optax.apply_updates(params, updates)
    assert_close(params.fast, params.slow, ulps={"float32": 2, "bfloat16": 2})  # p + (q − p) is rounded twice
    assert loss(params.fast) < loss(PARAMS)


# --- Kept and sent -----------------------------------------------------------------------------------------


def goes_on(name: str, state: Any) -> None:
    """A restored state is the one that was kept, and the next update is what it would have been."""
    kept = looped(name)[2][1]
    assert_same(jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, kept), nonfinite="equal")
    assert_same(built(name).update(GRADIENTS[2], state, PARAMS), looped(name)[3], nonfinite="equal")


@every
def test_state_can_be_pickled(name: str) -> None:
    goes_on(name, pickle.loads(pickle.dumps(looped(name)[2][1])))


@every
def test_state_goes_through_msgpack(name: str) -> None:
    serialization = pytest.importorskip("flax.serialization")
    state = jax.tree.map(jnp.asarray, looped(name)[2][1])  # made with Flax loaded, as in any program that uses it
    message = serialization.to_bytes(state)
    goes_on(name, serialization.from_bytes(built(name).init(PARAMS), message))


def register_states_of_optax(tree: Any) -> None:
    """Optax leaves that to its users. Ours register themselves: another registration would be refused."""
    if hasattr(tree, "_fields") and type(tree).__module__.startswith("optax"):
        with contextlib.suppress(ValueError):  # it is registered
            jax.export.register_namedtuple_serialization(type(tree), serialized_name=f"optax.{type(tree).__name__}")
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else ():
        register_states_of_optax(child)


def test_exported_program_is_the_one_that_was_exported() -> None:
    pytest.importorskip("flatbuffers")  # what JAX needs to write it down
    states = after(0)[1]
    register_states_of_optax(states)
    exported = jax.export.export(jax.jit(updates_of_all), platforms=("cpu", "cuda"))(states, GRADIENTS[0])
    again = jax.export.deserialize(exported.serialize())
    assert_is_loop(jax.jit(again.call)(states, GRADIENTS[0]), after(1))


# --- With other libraries ----------------------------------------------------------------------------------

SMALL = {"dense": PARAMS["dense"]}


def distance(params: Any, args: Any = None) -> jax.Array:
    return sum(jnp.sum((x - 3) ** 2) for x in jax.tree.leaves(params))


def test_optimistix_minimises_as_the_loop_does() -> None:
    optimistix = pytest.importorskip("optimistix")

    def minimise(tx: Transformation) -> Any:
        solver = optimistix.OptaxMinimiser(tx, rtol=1e-12, atol=1e-12)
        return optimistix.minimise(distance, solver, SMALL, max_steps=3, throw=False).value

    def loop(tx: Transformation) -> Any:
        params, state = SMALL, tx.init(SMALL)
        for _ in range(3):
            updates, state = tx.update(jax.grad(distance)(params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    found, expected = jax.jit(lambda: for_all(minimise))(), for_all(loop)
    assert_close(found, expected, ulps=ULPS, scale="array")


def test_optimistix_keeps_the_best_so_far() -> None:
    optimistix = pytest.importorskip("optimistix")
    solver = optimistix.BestSoFarMinimiser(optimistix.OptaxMinimiser(rmsprop(2.0), rtol=1e-12, atol=1e-12))
    found = optimistix.minimise(distance, solver, SMALL, max_steps=9, throw=False)
    assert distance(found.value) < distance(SMALL) / 4


@functools.cache
def module() -> tuple[Any, Any]:
    """A whole Equinox model, with what is no parameter in it, and the gradients of a loss."""
    eqx = pytest.importorskip("equinox")

    class Network(eqx.Module):
        linear: Any
        dropout: Any
        activation: Any
        temperature: float
        trained_for: int
        label: str
        key: jax.Array

        def __call__(self, x: jax.Array) -> jax.Array:
            x = self.dropout(self.activation(self.linear(x)), key=self.key)
            return (x * self.temperature).sum()

    linear = eqx.nn.Linear(3, 2, use_bias=False, key=jax.random.key(0))
    model = Network(linear, eqx.nn.Dropout(0.25), jnp.tanh, 2.5, 7, "small", jax.random.key(1))
    return model, eqx.filter_grad(lambda model: model(jnp.array([1.0, -2.0, 3.0])))(model)


def assert_trained(model: Any, updates: Any, expected: Any) -> None:
    """The weights move as they do outside a module, and everything else stays what it was."""
    eqx = pytest.importorskip("equinox")
    start, grads = module()
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    assert_close(updates.linear.weight, expected, ulps=ULPS)
    kept, before = (eqx.partition(tree, eqx.is_inexact_array)[1] for tree in (model, start))
    assert_same(kept, before)
    assert kept.dropout.inference is False
    assert (model.linear.weight != start.linear.weight).all()


@every
def test_whole_equinox_model_keeps_what_is_no_parameter(name: str) -> None:
    eqx = pytest.importorskip("equinox")
    model, grads = module()
    tx = built(name)
    before = tx.init(model)
    updates, state = tx.update(grads, before, model)
    assert_alike(state, before, weak_types=True)
    weight = model.linear.weight
    expected, _ = tx.update(grads.linear.weight, tx.init(weight), weight)
    assert_trained(eqx.apply_updates(model, updates), updates, expected)


@pytest.mark.parametrize("filtered", [False, True])
def test_whole_equinox_model_trains_inside_filter_jit(filtered: bool) -> None:
    eqx = pytest.importorskip("equinox")
    model, grads = module()
    traces = 0

    @eqx.filter_jit
    def update(model: Any, states: Any) -> Any:
        nonlocal traces
        traces += 1
        updates, states = updates_of_all(states, grads, model)
        return updates, {name: eqx.apply_updates(model, update) for name, update in updates.items()}, states

    states = for_all(lambda tx: tx.init(eqx.filter(model, eqx.is_inexact_array) if filtered else model))
    for _ in range(2):
        updates, models, after = update(model, states)
    assert traces == 1
    assert_alike(after, states, weak_types=True)
    for name in TRANSFORMATIONS:
        with naming(name):
            outside, _ = built(name).update(grads, states[name], model)
            assert_trained(models[name], updates[name], outside.linear.weight)


# --- In processes of their own ---------------------------------------------------------------------------


def in_fresh_process(program: str, **environment: str) -> None:
    path = os.pathsep.join((str(pathlib.Path(lift.__file__).parents[1]), str(pathlib.Path(__file__).parent)))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | environment
    # Another process may be writing what this one reads from the compilation cache.
    warnings = ["-W", "error", "-W", "ignore:Error reading persistent compilation cache entry"]
    done = subprocess.run([sys.executable, *warnings, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_mode_gives_the_same_bits() -> None:
    # Without fused multiply-add a product and a sum are rounded alike in every program.
    in_fresh_process(BIT_IDENTICAL, XLA_FLAGS="--xla_cpu_max_isa=AVX")


@pytest.mark.script
def test_many_devices() -> None:
    in_fresh_process("import many_devices; many_devices.main()", **devices(4))


BIT_IDENTICAL = """
import jax, jax.numpy as jnp, numpy as np
from rmsprop_jax import rmsprop, scale_by_rmsprop

grads = np.random.default_rng(0).normal(size=(4, 33)).astype(np.float32)
params = np.linspace(-1, 1, 33, dtype=np.float32)
txs = (
    rmsprop(weight_decay=0.1, momentum=0.9),
    rmsprop(weight_decay=0.1, momentum=0.9, centered=True, maximize=True),
    rmsprop(centered=True),
    scale_by_rmsprop(bias_correction=True),
)

def update(states, g):
    done = [tx.update(g, state, params) for tx, state in zip(txs, states, strict=True)]
    return [state for _, state in done], [updates for updates, _ in done]

def run(update):
    states, history = [tx.init(params) for tx in txs], []
    for g in grads:
        states, updates = update(states, g)
        history.append((states, updates))
    return history

eager, jitted = run(update), run(jax.jit(update))
one, first = (lambda x: x[None]), (lambda x: x[0])
batched = run(lambda *args: jax.tree.map(first, jax.jit(jax.vmap(update))(*jax.tree.map(one, args))))
scanned = jax.lax.scan(update, [tx.init(params) for tx in txs], grads)
assert np.isfinite(eager[-1][1]).all()
for other in (jitted, batched):
    jax.tree.map(np.testing.assert_array_equal, eager, other)
jax.tree.map(np.testing.assert_array_equal, eager[-1], (scanned[0], [x[-1] for x in scanned[1]]))
for tx, updates in zip(txs, eager[0][1], strict=True):
    both = jax.lax.complex(params, params[::-1])
    pair, _ = tx.update(jax.lax.complex(grads[0], grads[1]), tx.init(both), both)
    np.testing.assert_array_equal(pair.real, updates)
    np.testing.assert_array_equal(pair.imag, tx.update(grads[1], tx.init(params), params[::-1])[0])
"""
