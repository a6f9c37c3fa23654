"""The statistics against NumPy, wherever the state is found; and every staged failure told by its summary."""

import copy
import dataclasses
import functools
import html.parser
import pathlib
import pickle
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmsprop_jax
from compare import assert_close, assert_same
from rmsprop_jax import RMSPropState, diagnostics, dialects, rmsprop, scale_by_rmsprop
from rmsprop_jax.diagnostics import denominator, effective_learning_rate, record_statistics, statistics, summary
from test_promises import devices, in_fresh_process, quick_jit

NEEDS_NO_STATE = {"grad_rms", "param_rms", "update_rms", "update_ratio", "nonfinite"}
ALL = NEEDS_NO_STATE | {"lr_5", "lr_50", "lr_95", "eps_share", "surprise", "never_updated"}
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


@functools.cache
def program(tx: Any) -> Callable[..., dict[str, jax.Array]]:
    return quick_jit(functools.partial(statistics, tx))


def measured(tx: Any, *trees: Any) -> dict[str, jax.Array]:
    """:func:`statistics`, compiled in a third of the time: for trees that no other test has."""
    return program(tx)(*trees)


def written_out(
    grads: list[np.ndarray],
    updates: list[np.ndarray],
    averages: list[np.ndarray],
    firsts: list[np.ndarray],
    params: list[np.ndarray],
    lr: float,
    eps: float,
    eps_in_sqrt: bool,
) -> dict[str, float]:
    """The formulas of the docstring in NumPy float64, for the arrays of a list as if they were one."""
    g, u, v, first, p = (
        np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in xs])
        for xs in (grads, updates, averages, firsts, params)
    )
    rate = lr / (np.sqrt(v + eps) if eps_in_sqrt else np.sqrt(v) + eps)
    never = (first == 0) & (g == 0)
    ordered = np.sort(rate)

    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean(x**2)))

    return {
        "grad_rms": rms(g),
        "param_rms": rms(p),
        "update_rms": rms(u),
        "update_ratio": rms(u) / rms(p),
        **{f"lr_{q}": ordered[max(0, -(-len(ordered) * q // 100) - 1)] for q in (5, 50, 95)},
        "eps_share": float(np.mean((v if eps_in_sqrt else np.sqrt(v)) < eps)),
        "surprise": rms(g[~never] / np.sqrt(v[~never])),
        "nonfinite": float(np.mean(~(np.isfinite(g) & np.isfinite(u) & np.isfinite(p)))),
        "never_updated": float(np.mean(never)),
    }


def assert_written_out(
    found: dict[str, Any], last: Update, state: RMSPropState, lr: float, eps: float, eps_in_sqrt: bool = False
) -> None:
    first = state.square_avg if state.grad_avg is None else state.grad_avg
    columns = [jax.tree.leaves(x) for x in (last.grads, last.updates, state.square_avg, first, last.params)]
    keys = ["conv1/bias", "conv1/kernel", "out/0", "out/1"]
    groups = {key: [[column[i]] for column in columns] for i, key in enumerate(keys)} | {"total": columns}
    assert set(found) == {f"{group}/{name}" for group in groups for name in ALL}
    for group, lists in groups.items():
        for name, expected in written_out(*lists, lr, eps, eps_in_sqrt).items():
            value = found[f"{group}/{name}"]
            assert (value.dtype, value.shape) == (jnp.float32, ())
            assert_close(
                {f"{group}/{name}": value}, {f"{group}/{name}": np.asarray(expected)}, rtol=TOLERANCE, dtype=np.float32
            )


# --- The figures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("eps_in_sqrt", [False, True])
@pytest.mark.parametrize("eps", [1e-4, 3e-2])
def test_statistics_are_the_formulas(centered: bool, eps_in_sqrt: bool, eps: float) -> None:
    scaling = scale_by_rmsprop(0.9, eps, 0.5, centered, eps_in_sqrt=eps_in_sqrt)
    last = after(optax.chain(scaling, optax.scale(-0.03)))
    found = statistics(*last)
    assert_written_out(found, last, last.state[0], 1.0, eps, eps_in_sqrt)
    assert 0.1 < found["total/eps_share"] < 0.9
    assert 0.1 < found["total/never_updated"] < 0.9


def test_statistics_are_the_formulas_in_float64(x64: None) -> None:
    last = after(rmsprop(0.03), make=lambda seed: jax.tree.map(lambda x: x.astype(jnp.float64), tree(seed)))
    assert_written_out(measured(*last), last, last.state, 0.03, 1e-8)


def test_defaults_are_those_of_rmsprop() -> None:
    last = after(rmsprop())
    assert_written_out(statistics(*last), last, last.state, 0.01, 1e-8)


SIZES = [0, 1, 2, 19, 20, 21, 99, 100, 101, 1000]


@functools.cache
def statistics_by_size() -> dict[int, tuple[dict[str, jax.Array], np.ndarray]]:
    """The statistics and the effective learning rates of one array of each size."""
    averages = {size: np.random.default_rng(size).lognormal(sigma=5, size=size).astype(np.float32) for size in SIZES}

    def state(v: Any) -> RMSPropState:
        return RMSPropState(jnp.ones((), jnp.int32), jnp.asarray(v), None, None)

    @quick_jit
    def measure(averages: Any, lr: jax.Array, eps: jax.Array) -> Any:  # constants could be rounded in another way
        return {size: statistics(rmsprop(lr, eps=eps), v, v, state(v), v) for size, v in averages.items()}

    found = measure(averages, 1.0, 0.0)
    tx = rmsprop(1.0, eps=0.0)
    return {size: (found[size], np.asarray(effective_learning_rate(tx, state(v), v))) for size, v in averages.items()}


@pytest.mark.parametrize("size", SIZES)
def test_quantiles_are_elements_at_exact_ranks(size: int) -> None:
    found, rates = statistics_by_size()[size]
    rates = np.sort(rates)
    for percent in (5, 50, 95):
        value = found[f"params/lr_{percent}"]
        if size == 0:
            assert np.isnan(value)
        else:
            assert value == rates[-(-size * percent // 100) - 1]
        if size in (19, 99, 1000):  # where size · percent/100 is no near miss of a whole number in float64
            assert value == np.quantile(rates, percent / 100, method="inverted_cdf")


def test_not_a_number_ranks_above_all_numbers() -> None:
    v = jnp.array([4.0, jnp.nan, 1.0, -jnp.nan, 16.0])
    state = RMSPropState(jnp.ones((), jnp.int32), v, None, None)
    found = measured(rmsprop(1.0, eps=0.0), v, v, state, v)
    assert found["params/lr_5"] == 0.25
    assert found["params/lr_50"] == 1.0
    assert np.isnan(found["params/lr_95"])


def test_nonfinite_counts_gradient_update_and_parameter_once() -> None:
    g = jnp.array([jnp.nan, 1, 1, jnp.inf, 1, 1, 1, 1])
    u = jnp.array([1, -jnp.inf, 1, 1, 1, 1, 1, 1])
    p = jnp.array([jnp.nan, 1, jnp.nan, 1, 1, 1, 1, 1])
    found = measured(rmsprop(), g, u, rmsprop().init(p), p)
    assert found["params/nonfinite"] == 0.5


def test_rms_neither_overflows_nor_underflows() -> None:
    tiny, huge = jnp.array([3e-30, 4e-30]), jnp.array([3e30, 4e30])
    found = measured(rmsprop(), tiny, huge, rmsprop().init(tiny), huge)
    np.testing.assert_allclose(found["params/grad_rms"], np.sqrt(12.5) * 1e-30, rtol=1e-6)
    np.testing.assert_allclose(found["params/param_rms"], np.sqrt(12.5) * 1e30, rtol=1e-6)


def test_bias_at_rest_has_update_ratio_zero() -> None:
    zero = jnp.zeros(3)
    found = measured(rmsprop(), zero, zero, rmsprop().init(zero), zero)
    assert found["params/update_ratio"] == 0
    assert found["params/surprise"] == 0
    assert np.isinf(measured(rmsprop(), zero, zero + 1, rmsprop().init(zero), zero)["params/update_ratio"])


@pytest.mark.parametrize("eps_in_sqrt", [False, True])
def test_denominator_is_what_the_gradient_was_divided_by(eps_in_sqrt: bool) -> None:
    last = after(scale_by_rmsprop(0.9, 1e-3, eps_in_sqrt=eps_in_sqrt))
    denom = denominator(last.tx, last.state, last.params)
    chex.assert_trees_all_equal_structs(denom, last.params)
    assert_close(jax.tree.map(jnp.divide, last.grads, denom), last.updates, rtol=1e-6)


def test_effective_learning_rate_is_update_over_gradient() -> None:
    last = after(rmsprop(0.3, eps=1e-3))
    rates = effective_learning_rate(last.tx, last.state, last.params)
    chex.assert_trees_all_equal_structs(rates, last.params)
    assert_close(jax.tree.map(lambda r, g: -r * g, rates, last.grads), last.updates, rtol=1e-6)


def test_schedule_is_read_where_the_update_read_it() -> None:
    schedule = optax.piecewise_interpolate_schedule("linear", 1.0, {1: 0.5, 2: 0.1, 3: 0.7})
    last = after(rmsprop(schedule, eps=1e-3), steps=3)
    rates = effective_learning_rate(last.tx, last.state, last.params)
    assert_close(jax.tree.map(lambda r, g: -r * g, rates, last.grads), last.updates, rtol=1e-6)
    scalar, fresh = jnp.ones(()), rmsprop(schedule, eps=1.0)
    assert effective_learning_rate(fresh, fresh.init(scalar), scalar) == schedule(0)


def test_half_precision_is_computed_in_float32() -> None:
    last = after(rmsprop(0.03), make=lambda seed: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(seed)))
    assert_written_out(measured(*last), last, last.state, 0.03, 1e-8)
    narrow = after(rmsprop(0.03, accumulator_dtype="bfloat16"))
    assert_written_out(measured(*narrow), narrow, narrow.state, 0.03, 1e-8)
    assert {x.dtype for x in jax.tree.leaves(denominator(narrow.tx, narrow.state, narrow.params))} == {
        jnp.dtype("float32")
    }


def test_complex_leaf_is_two_real_ones() -> None:
    rng = np.random.default_rng(0)
    g, p = (jnp.asarray(rng.normal(size=(2, 6)), jnp.float32) for _ in range(2))
    tx = rmsprop(0.1, momentum=0.5, centered=True)

    def measure(g: jax.Array, p: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        updates, state = tx.update(g, tx.init(p), p)
        return measured(tx, g, updates, state, p), effective_learning_rate(tx, state, p)

    real, rates = measure(g, p)
    pair, rates_of_pair = measure(jax.lax.complex(*g), jax.lax.complex(*p))
    assert_close(pair, real, rtol=1e-6)
    assert_close(rates_of_pair, jax.lax.complex(*rates), rtol=1e-6)


def test_missing_gradient_counts_as_zero_and_missing_parameter_not_at_all() -> None:
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones(3)}, "none": None}
    tx = rmsprop()
    grads = {"a": jnp.ones(2), "b": None, "none": None}
    updates, state = tx.update(grads, tx.init(params), params)
    found = measured(tx, grads, updates, state, params)
    assert {key.rpartition("/")[0] for key in found} == {"a", "b/c", "total"}
    assert found["b/c/grad_rms"] == found["b/c/update_rms"] == 0
    assert found["b/c/never_updated"] == 1
    np.testing.assert_allclose(found["total/never_updated"], 0.6)
    np.testing.assert_allclose(found["total/surprise"], 10, rtol=1e-5)


def test_never_updated_remembers_gradients_of_long_ago() -> None:
    tx = rmsprop(alpha=0.5)
    state = tx.init(jnp.ones(2))
    for g in (jnp.array([1.0, 0.0]), *[jnp.zeros(2)] * 20):
        updates, state = tx.update(g, state)
    assert measured(tx, g, updates, state, jnp.ones(2))["params/never_updated"] == 0.5


def test_never_updated_is_seen_through_another_start_if_centered() -> None:
    tx = dialects.tensorflow(0.01, centered=True)
    g = jnp.array([1.0, 0.0])
    updates, state = tx.update(g, tx.init(g), g)
    assert measured(tx, g, updates, state, g)["params/never_updated"] == 0.5


def test_surprise_of_an_average_that_underflowed_is_finite() -> None:
    g = jnp.full(3, 1e-3)
    tx = rmsprop(accumulator_dtype="float16")
    updates, state = tx.update(g, tx.init(g))
    assert (state.square_avg == 0).all()
    found = measured(tx, g, updates, state, g)
    np.testing.assert_allclose(found["params/surprise"], 1e-3 / np.sqrt(2.0**-24), rtol=1e-6)
    assert found["params/never_updated"] == 0


@pytest.mark.parametrize(
    ("params", "number"), [({}, 11), ({"a": jnp.zeros(0)}, 22), ({"a": jnp.zeros(0), "b": jnp.zeros((2, 0))}, 33)]
)
def test_no_elements_give_no_error(params: Any, number: int) -> None:
    tx = rmsprop()
    state = tx.init(params)
    assert effective_learning_rate(tx, state, params).keys() == params.keys()
    found = statistics(tx, params, params, state, params)
    assert len(found) == number
    assert {key for key, value in found.items() if value != 0} == {key for key in found if "/lr_" in key}
    assert np.isnan(found["total/lr_50"])


def test_leaves_that_are_all_frozen_have_what_needs_no_state() -> None:
    tx = optax.masked(rmsprop(), {"a": False, "b": False})
    found = statistics(tx, SMALL, SMALL, after(tx, make=lambda seed: SMALL).state, SMALL)
    assert {key for key in found if not key.startswith("total/")} == {f"{x}/{y}" for x in "ab" for y in NEEDS_NO_STATE}
    assert found["total/param_rms"] == 0


@pytest.mark.parametrize("scale", [1e-36, 1e-18, 1e18, 1e38, 3e38])
def test_size_of_what_is_measured_does_not_matter(scale: float) -> None:
    """XLA multiplies by reciprocals, and that of 1e38 is flushed to 0."""
    sizes = {"a": np.linspace(-1, 1, 7), "b": np.linspace(0.5, 0.6, 5)}
    params = jax.tree.map(lambda x: jnp.asarray(x * scale, jnp.float32), sizes)
    grads = jax.tree.map(jnp.ones_like, params)
    tx = rmsprop()
    updates, state = tx.update(grads, tx.init(params), params)
    found = statistics(tx, grads, updates, state, params)
    for name, x in (*sizes.items(), ("total", np.concatenate([*sizes.values()]))):
        np.testing.assert_allclose(found[f"{name}/param_rms"], np.sqrt(np.mean(x**2)) * scale, rtol=1e-6)


def test_surprise_of_few_elements_among_many_is_exact() -> None:
    params = {"embedding": jnp.ones(1 << 22)}
    grads = {"embedding": jnp.zeros(1 << 22).at[:3].set(1.0)}
    tx = rmsprop(alpha=0.75)
    updates, state = tx.update(grads, tx.init(params), params)
    assert statistics(tx, grads, updates, state, params)["embedding/surprise"] == 2


# --- Where the state is found ------------------------------------------------------------------------------

LABELS = {"conv1": "fast", "out": "slow"}
WRAPPED: dict[str, Callable[[], optax.GradientTransformation]] = {
    "chain": lambda: optax.chain(optax.clip(1e6), optax.chain(optax.identity(), rmsprop(0.03))),
    "masked": lambda: optax.masked(rmsprop(0.03), True),
    "multi_steps": lambda: optax.MultiSteps(rmsprop(0.03), 1).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(rmsprop(0.03), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(rmsprop)(lr=0.03),
    "partition": lambda: optax.partition({"fast": rmsprop(0.03), "slow": rmsprop(0.03)}, LABELS),
    "nested partition": lambda: optax.chain(
        optax.masked(rmsprop(0.03), {"conv1": {"kernel": True, "bias": False}, "out": False}),
        optax.masked(
            optax.partition({"bias": rmsprop(0.03), "out": rmsprop(0.03)}, {"conv1": "bias", "out": "out"}),
            {"conv1": {"kernel": False, "bias": True}, "out": True},
        ),
    ),
    "recorded": lambda: record_statistics(rmsprop(0.03)),
}


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED.keys())
def test_state_is_found_however_deep(make: Callable[[], Any]) -> None:
    plain, last = after(rmsprop(0.03), steps=1), after(make(), steps=1)
    rates, expected = (effective_learning_rate(x.tx, x.state, x.params) for x in (last, plain))
    assert_close(rates, expected, rtol=1e-6)
    assert_close(statistics(*last), statistics(*plain), rtol=TOLERANCE)


def test_lookahead_is_measured_by_its_fast_half() -> None:
    tx = optax.lookahead(rmsprop(0.03), sync_period=5, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(tree(0))
    updates, state = tx.update(tree(1), tx.init(params), params)
    found = statistics(rmsprop(0.03), tree(1), updates.fast, state.fast_state, params.fast)
    assert found["total/update_rms"] > 0.1


def test_groups_have_their_own_learning_rate_and_eps() -> None:
    groups = {"fast": rmsprop(0.3, eps=1e-2), "slow": rmsprop(lambda step: 0.001, eps=1e-3)}
    last = after(optax.partition(groups, LABELS))
    rates = effective_learning_rate(last.tx, last.state, last.params)
    assert_close(jax.tree.map(lambda r, g: -r * g, rates, last.grads), last.updates, rtol=1e-6)
    found = statistics(*last)
    alone = after(groups["slow"], make=lambda seed: {"out": tree(seed)["out"]})
    expected = statistics(*alone)
    assert_close(
        {key: x for key, x in found.items() if "out/" in key},
        {key: x for key, x in expected.items() if "out/" in key},
        rtol=1e-6,
    )


def test_frozen_parameters_have_what_needs_no_state_and_no_part_in_the_total() -> None:
    last = after(optax.partition({"fast": rmsprop(0.03), "slow": optax.set_to_zero()}, LABELS))
    found = statistics(*last)
    assert {key.removeprefix("out/0/") for key in found if key.startswith("out/0/")} == NEEDS_NO_STATE
    alone = after(rmsprop(0.03), make=lambda seed: {"conv1": tree(seed)["conv1"]})
    expected = statistics(*alone)
    for name in ALL:
        assert_same(found[f"total/{name}"], expected[f"total/{name}"])
    assert isinstance(denominator(last.tx, last.state, last.params)["out"], optax.MaskedNode | list)
    assert "–" in str(summary(*last))


def test_flax_nnx_optimizer() -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 1, rngs=nnx.Rngs(1)))
    recorded = record_statistics(rmsprop(0.03, momentum=0.9), every=1)
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip(1e6), recorded), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        grads = nnx.grad(lambda model: model(jnp.ones((4, 3))).sum())(model)
        before = jax.tree.map(jnp.array, nnx.state(model, nnx.Param))
        return grads, optimizer.update(model, grads), before

    for _ in range(2):
        grads, updates, before = step(model, optimizer)
    found = statistics(optimizer.tx, grads, updates, optimizer.opt_state, before)
    leaves = {key.rpartition("/")[0] for key in found}
    assert leaves == {f"layers/{i}/{name}" for i in (0, 1) for name in ("kernel", "bias")} | {"total"}
    kept = optimizer.opt_state[1].statistics
    assert set(kept) == set(found)
    for key in found:
        assert_close({key: kept[key]}, {key: found[key]}, rtol=1e-6)
    assert float(found["total/surprise"]) > 1
    whole = denominator(optimizer.tx, optimizer.opt_state, before)
    part = denominator(recorded, optimizer.opt_state[1], before)
    assert_same(jax.tree.leaves(whole), jax.tree.leaves(part))


def test_flax_nnx_partition() -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 1, rngs=nnx.Rngs(1)))

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "a" if "bias" in str(path) else "b", params)

    optimizer = nnx.Optimizer(model, optax.partition({"a": rmsprop(0.1), "b": rmsprop(0.2)}, labels), wrt=nnx.Param)
    grads = nnx.grad(lambda model: model(jnp.ones((4, 3))).sum())(model)
    before = jax.tree.map(jnp.array, nnx.state(model, nnx.Param))
    updates = optimizer.update(model, grads)
    found = measured(optimizer.tx, grads, updates, optimizer.opt_state, before)
    assert len(found) == 5 * len(ALL)
    assert len(jax.tree.leaves(denominator(optimizer.tx, optimizer.opt_state, before))) == 4


def test_flax_linen_boxes_do_not_show_in_keys() -> None:
    nn = pytest.importorskip("flax.linen")
    layer = nn.Dense(2, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))
    params = layer.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    grads = jax.tree.map(jnp.ones_like, params)
    tx = rmsprop()
    updates, state = tx.update(grads, tx.init(params), params)
    assert {key.rpartition("/")[0] for key in measured(tx, grads, updates, state, params)} == {
        "kernel",
        "bias",
        "total",
    }


def test_equinox_module_and_its_functions() -> None:
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    grads = eqx.filter_grad(lambda model: jax.vmap(model)(jnp.ones((4, 2))).sum())(model)
    tx = record_statistics(rmsprop(), every=1)
    updates, state = tx.update(grads, tx.init(eqx.filter(model, eqx.is_inexact_array)), model)
    found = statistics(tx, grads, updates, state, model)
    assert "layers/0/weight/update_ratio" in found
    assert_close(dict(state.statistics), found, rtol=1e-6)


class Layer(NamedTuple):
    kernel: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    gain: Any


def test_keys_are_plain() -> None:
    params = {"a'b": [Layer(jnp.ones(2), Block(gain=jnp.ones(3)))], "value": (jnp.ones(()),)}
    found = measured(rmsprop(), params, params, rmsprop().init(params), params)
    assert {key.rpartition("/")[0] for key in found} == {"a'b/0/kernel", "a'b/0/value/gain", "value/0", "total"}
    assert "params/grad_rms" in measured(rmsprop(), jnp.ones(2), jnp.ones(2), rmsprop().init(jnp.ones(2)), jnp.ones(2))


def test_orbax_checkpoint(tmp_path: Any) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    last = after(optax.chain(optax.clip(1.0), record_statistics(rmsprop(0.03), every=1)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", last.state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", last.state)
    assert_same(statistics(*last._replace(state=restored)), statistics(*last))
    assert_same(dict(restored[1].statistics), dict(last.state[1].statistics))


# --- Errors ------------------------------------------------------------------------------------------------


MEASURES = [
    denominator,
    effective_learning_rate,
    diagnostics.settings,
    lambda tx, state, params: statistics(tx, params, params, state, params),
    lambda tx, state, params: summary(tx, params, params, state, params),
]


@pytest.mark.parametrize("measure", MEASURES)
def test_state_without_rmsprop_is_refused(measure: Callable[..., Any]) -> None:
    with pytest.raises(
        ValueError, match="opt_state must contain an RMSPropState, got ScaleByAdamState without one; give"
    ):
        measure(optax.scale_by_adam(), optax.scale_by_adam().init({}), {})


@pytest.mark.parametrize("measure", MEASURES)
def test_two_states_with_the_same_leaf_are_refused(measure: Callable[..., Any]) -> None:
    tx = optax.chain(rmsprop(), rmsprop())
    with pytest.raises(ValueError, match=r"two RMSPropStates .* leaf conv1/bias; give the state of one optimizer"):
        measure(tx, tx.init(tree(0)), tree(0))


def test_states_of_two_models_are_refused() -> None:
    def joined(*models: Any) -> tuple[Any, Any]:
        """A transformation of two models, each with a part of the parameters."""
        tx = rmsprop()

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            return updates, [tx.update(None, one, None, **extra)[1] for one in state]

        return optax.GradientTransformationExtraArgs(tx.init, update), [tx.init(model) for model in models]

    with pytest.raises(ValueError, match="two RMSPropStates"):
        denominator(*joined({"a": jnp.ones(2)}, {"b": jnp.ones(2)}), {})
    hole = optax.MaskedNode()
    with pytest.raises(ValueError, match="two RMSPropStates that differ in the container"):
        denominator(*joined({"a": jnp.ones(2), "b": hole}, {"c": hole, "d": jnp.ones(2)}), {})


@pytest.mark.parametrize("name", ["grads", "updates", "opt_state"])
def test_wrong_shape_is_named(name: str) -> None:
    last = after(rmsprop(), steps=1)
    field = {"opt_state": "state"}.get(name, name)
    wrong = tree(0) | {"out": [jnp.ones((4, 7)), jnp.ones(())]}
    given = last._replace(**{field: rmsprop().init(wrong) if name == "opt_state" else wrong})
    message = rf"{name} must be like params, but out/0 has shape \(4, 7\) and its parameter \(7, 4\)"
    for measure in (statistics, summary):
        with pytest.raises(ValueError, match=message):
            measure(*given)


@pytest.mark.parametrize("name", ["grads", "updates"])
def test_missing_and_superfluous_leaves_are_named(name: str) -> None:
    last = after(rmsprop(), steps=1)
    with pytest.raises(ValueError, match=f"{name} must be like params or a prefix of them, but has nothing for out/0"):
        statistics(*last._replace(**{name: {"conv1": tree(0)["conv1"]}}))
    with pytest.raises(ValueError, match=f"{name} must be like params, but has a leaf more and params have none there"):
        statistics(*last._replace(**{name: tree(0) | {"more": jnp.ones(())}}))
    with pytest.raises(ValueError, match="opt_state must be like params, but has a leaf conv1/bias"):
        statistics(last.tx, {}, {}, last.state, {})


def test_names_that_are_taken_are_refused() -> None:
    for params in ({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, {"total": jnp.ones(1)}):
        with pytest.raises(ValueError, match=r"not taken, got a second (a/b|total); rename it"):
            statistics(rmsprop(), params, params, rmsprop().init(params), params)


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


# --- What the transformation says of itself -------------------------------------------------------------------

SMALL = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5, 3.0]])}


def small(seed: int) -> Any:
    return jax.tree.map(lambda x: x + 0.1 * seed, SMALL)


def assert_rates(last: Update, rates: dict[str, float], eps: dict[str, float], inside: set[str]) -> None:
    """The rates and denominators are those of the formulas with these numbers."""
    found = effective_learning_rate(last.tx, last.state, last.params)
    averages = diagnostics._per_leaf(last.state)
    for name, lr in rates.items():
        v = np.asarray(averages[name,].square_avg, np.float64)
        expected = lr / (np.sqrt(v + eps[name]) if name in inside else np.sqrt(v) + eps[name])
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)
        assert diagnostics.settings(last.tx, last.state, last.params)[name].eps_in_sqrt == (name in inside)


@pytest.mark.parametrize("measure", MEASURES)
def test_transformation_that_does_not_fit_its_state_is_refused(measure: Callable[..., Any]) -> None:
    bare, chained = rmsprop(), optax.chain(optax.clip(1.0), rmsprop())
    for tx, state in [(chained, bare.init(SMALL)), (optax.sgd(0.1), bare.init(SMALL))]:
        with pytest.raises(ValueError, match=r"tx does not fit opt_state.*; give the transformation that the"):
            measure(tx, state, SMALL)
    for tx, state in [(bare, chained.init(SMALL)), (optax.identity(), bare.init(SMALL))]:
        with pytest.raises(ValueError, match=r"tx (does not fit opt_state|has no RMSProp for the leaf a of)"):
            measure(tx, state, SMALL)


def test_what_follows_may_want_arguments_of_its_own() -> None:
    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **extra: Any) -> Any:
        return updates, state

    picky = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = optax.chain(rmsprop(0.1), picky)
    updates, state = tx.update(SMALL, tx.init(SMALL), SMALL, value=1.0)
    assert_rates(Update(tx, SMALL, updates, state, SMALL), {"a": 0.1, "b": 0.1}, {"a": 1e-8, "b": 1e-8}, set())


def test_wrapper_that_drops_extra_arguments_is_refused() -> None:
    inside = rmsprop(1e-4, eps=1e-2)
    tx = optax.GradientTransformation(inside.init, lambda g, s, p=None: inside.update(g, s, p))
    _, state = tx.update(SMALL, tx.init(SMALL), SMALL)
    for measure in MEASURES:
        with pytest.raises(ValueError, match=r"no RMSProp for the leaf a .* must pass keyword arguments on"):
            measure(tx, state, SMALL)
    recorder = record_statistics(tx)
    with pytest.raises(ValueError, match="must pass keyword arguments on"):
        recorder.update(SMALL, recorder.init(SMALL), SMALL)


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


def test_each_group_has_its_own_place_of_eps() -> None:
    groups = {"a": rmsprop(0.1, eps=1e-2), "b": dialects.keras(0.2, epsilon=3e-2)}
    last = after(optax.partition(groups, {"a": "a", "b": "b"}), make=small)
    assert_rates(last, {"a": 0.1, "b": 0.2}, {"a": 1e-2, "b": 3e-2}, {"b"})


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


def test_rate_computed_inside_a_condition_is_refused_with_the_way_out() -> None:
    injected = optax.inject_hyperparams(rmsprop)(lr=lambda count: 0.1 / (1 + count))
    outside = record_statistics(optax.apply_if_finite(injected, 3))
    state = outside.init(SMALL)
    with pytest.raises(ValueError, match=r"inside of a condition.*put record_statistics inside"):
        outside.update(SMALL, state, SMALL)
    with pytest.raises(jax.errors.UnexpectedTracerError):  # JAX says so at the end of the trace, in its own words
        jax.jit(outside.update)(SMALL, state, SMALL)
    bare = optax.apply_if_finite(injected, 3)
    with pytest.raises(ValueError, match=r"inside of a condition"):
        effective_learning_rate(bare, bare.init(SMALL), SMALL)
    inside = optax.apply_if_finite(record_statistics(injected), 3)
    _, state = jax.jit(inside.update)(SMALL, inside.init(SMALL), SMALL)
    assert state.inner_state.statistics["total/nonfinite"] == 0


def test_state_without_a_count_needs_constant_numbers() -> None:
    tx = rmsprop(0.1)
    updates, state = tx.update(SMALL, tx.init(SMALL), SMALL)
    bare = state._replace(step=None)
    assert_same(statistics(tx, SMALL, updates, bare, SMALL), statistics(tx, SMALL, updates, state, SMALL))
    with pytest.raises(ValueError, match=r"opt_state\.step is None, so the schedule of lr cannot be read"):
        statistics(rmsprop(lambda step: 0.1), SMALL, updates, bare, SMALL)


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


def all_functions(
    params: Any, momentum: float = 0.9, centered: bool = True, jit: Callable[..., Any] = quick_jit
) -> Any:
    """Everything once: a first update without gradients, then one with them."""
    tx = record_statistics(rmsprop(1e-3, momentum=momentum, centered=centered), every=1)

    @jit
    def update(grads: Any, state: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        found = statistics(tx, grads, updates, state, params)
        denominator(tx, state, params), effective_learning_rate(tx, state, params)
        return updates, state, found

    state = tx.init(params)
    for grads in (jax.tree.map(lambda _: None, params), jax.tree.map(jnp.zeros_like, params), params):
        updates, state, found = update(grads, state)
        summary(tx, grads, updates, state, params)
        assert_close(dict(state.statistics), found, rtol=TOLERANCE)
    return found


def test_nothing_is_computed_only_to_be_thrown_away_as_not_a_number() -> None:
    with jax.debug_nans(True):
        all_functions({"zero": jnp.zeros(2), "one": jnp.ones((2, 2))}, jit=lambda update: update)
        tx, zero = rmsprop(0.0, eps=1e-8), jnp.zeros(2)
        assert statistics(tx, zero, zero, tx.init(zero), zero)["params/update_ratio"] == 0
    checkify = pytest.importorskip("jax.experimental.checkify")
    tx, params = rmsprop(), {"zero": jnp.zeros(2)}
    checked = checkify.checkify(lambda state: statistics(tx, params, params, state, params), errors=checkify.nan_checks)
    error, _ = checked(tx.init(params))
    error.throw()


def test_summary_divides_no_zero_by_zero() -> None:
    tx, params = rmsprop(1e-3, eps=0.0, centered=True), jnp.zeros(2)
    with jax.debug_nans(True):
        assert summary(tx, params, params, tx.init(params), params).remarks == ()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float16", "float32", "complex64"])
def test_every_dtype_works_under_strict_promotion(dtype: str) -> None:
    params = {"w": jnp.ones((2, 2), jnp.float32).astype(dtype), "b": jnp.ones(2)}
    with jax.numpy_dtype_promotion("strict"):
        found = all_functions(params, momentum=0.0, centered=False)
    half = 0.5 if dtype == "complex64" else 1.0
    np.testing.assert_allclose(found["w/param_rms"], np.sqrt(half), rtol=1e-6)


def test_leaves_of_two_widths_work_under_strict_promotion(x64: None) -> None:
    with jax.numpy_dtype_promotion("strict"):
        all_functions({"w": jnp.ones(2, jnp.float64), "b": jnp.ones(2, jnp.bfloat16)})


@pytest.mark.parametrize("name", ["grads", "updates"])
@pytest.mark.parametrize(("dtype", "kind"), [("complex64", "complex"), ("int32", "int32"), ("bool", "bool")])
def test_wrong_kind_of_number_is_named(name: str, dtype: str, kind: str) -> None:
    tx = rmsprop()
    last = Update(tx, SMALL, SMALL, tx.init(SMALL), SMALL)
    wrong = SMALL | {"b": jnp.ones((1, 2), dtype)}
    for measure in (statistics, summary):
        with pytest.raises(ValueError, match=f"{name} must be like params, but b is {kind} and its parameter real"):
            measure(*last._replace(**{name: wrong}))
    with pytest.raises(ValueError, match="opt_state must be like params, but b is complex and its parameter real"):
        statistics(*last._replace(state=tx.init(SMALL | {"b": jnp.ones((1, 2), "complex64")})))


def test_integers_that_are_no_parameters_are_left_out() -> None:
    params = {"w": jnp.ones(2), "count": 3}
    tx = rmsprop()
    updates, state = tx.update({"w": jnp.ones(2), "count": None}, tx.init(params), params)
    found = statistics(tx, {"w": jnp.ones(2), "count": np.zeros((), jax.dtypes.float0)}, updates, state, params)
    assert {key.rpartition("/")[0] for key in found} == {"w", "total"}


# --- Compiled ----------------------------------------------------------------------------------------------


def test_statistics_inside_jit_scan_and_vmap_are_those_outside() -> None:
    tx = rmsprop(0.03, momentum=0.5)
    last = after(tx)
    expected = statistics(*last)
    jitted = jax.jit(chex.assert_max_traces(lambda *last: statistics(tx, *last), 1))
    for _ in range(2):
        assert_close(jitted(*last[1:]), expected, rtol=TOLERANCE)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), last[1:])
    for together in (
        jax.vmap(lambda last: statistics(tx, *last))(twice),
        jax.lax.scan(lambda _, last: (None, statistics(tx, *last)), None, twice)[1],
    ):
        assert_close(jax.tree.map(lambda x: x[1], together), expected, rtol=TOLERANCE)
    chex.clear_trace_counter()


def test_learning_rate_and_eps_may_be_traced() -> None:
    last = after(rmsprop(0.03))

    def measure(lr: Any, eps: Any) -> dict[str, jax.Array]:
        return statistics(rmsprop(lr, eps=eps), *last[1:])

    traced = jax.vmap(measure)(jnp.array([0.1, 0.2]), jnp.array([1e-3, 1e-2]))
    for i, (lr, eps) in enumerate([(0.1, 1e-3), (0.2, 1e-2)]):
        one = jax.tree.map(lambda x, i=i: x[i], traced)
        assert_close(one, measure(lr, eps), rtol=TOLERANCE)


def test_other_numbers_find_the_compiled_program() -> None:
    last = after(rmsprop(0.03))
    statistics(*last)
    before = diagnostics._statistics._cache_size()
    for lr in (0.1, 1, jnp.float32(0.2), lambda step: 0.3):
        statistics(rmsprop(lr, eps=1e-5), *last[1:])
    assert diagnostics._statistics._cache_size() <= before + 1  # a Python number is weakly typed


def recorded_run(tx: optax.GradientTransformation, steps: int, update: Any = None) -> list[tuple[Update, Any]]:
    params, state, history = tree(99), tx.init(tree(99)), []
    for step in range(steps):
        updates, new = (update or tx.update)(tree(step), state, params)
        history.append((Update(tx, tree(step), updates, new, params), new))
        params, state = optax.apply_updates(params, updates), new
    return history


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_recorded_are_the_statistics_of_every_so_many_updates(every: int, compiled: bool) -> None:
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
    before = diagnostics._record._cache_size(), diagnostics._statistics._cache_size()
    recorded_run(tx, 6)
    assert (diagnostics._record._cache_size(), diagnostics._statistics._cache_size()) == before


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


def test_extra_arguments_reach_the_transformation_inside() -> None:
    seen = []

    def update(updates: Any, state: Any, params: Any = None, *, value: Any = None, **extra: Any) -> Any:
        seen.append(value)
        return rmsprop().update(updates, state, params, **extra)

    tx = record_statistics(optax.GradientTransformationExtraArgs(rmsprop().init, update))
    tx.update(tree(0), tx.init(tree(0)), tree(0), value=3)
    assert seen[-1] == 3
    assert set(seen[:-1]) <= {None, 3}


def test_recording_of_sharded_parameters_compiles_once_and_gathers_no_array() -> None:
    in_fresh_process(SHARDED, **devices(8))


SHARDED = r"""
import math, re, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from rmsprop_jax import rmsprop
from rmsprop_jax.diagnostics import record_statistics

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
from rmsprop_jax.diagnostics import record_statistics, statistics

mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
tx = record_statistics(rmsprop(), 2)

def train(params):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (params + updates, state), state.statistics
    (_, state), history = jax.lax.scan(step, (params, tx.init(params)), None, length=3)
    return history["total/grad_rms"][None], state.statistics.vector[None]

params = jnp.arange(1.0, 17.0)
history, last = jax.jit(jax.shard_map(train, mesh=mesh, in_specs=P("x"), out_specs=P("x")))(params)
np.testing.assert_allclose(history[:, 0], np.sqrt(np.mean(np.square(params.reshape(8, 2)), 1)), rtol=1e-6)
assert last.shape[0] == 8 and np.isfinite(last).all()
"""


def test_explicit_mesh_with_arrays_sharded_along_the_last_axis() -> None:
    if not hasattr(jax.sharding, "AxisType"):
        pytest.skip("this JAX has no explicit axes")
    in_fresh_process(EXPLICIT, **devices(8))


EXPLICIT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from rmsprop_jax import rmsprop
from rmsprop_jax.diagnostics import denominator, effective_learning_rate, record_statistics, statistics, summary

mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
whole = {"w": jnp.linspace(-1, 1, 32 * 8).reshape(32, 8), "c": jnp.ones((4, 8), "complex64"), "b": jnp.ones(8)}
specs = {"w": P(None, "x"), "c": P(None, "x"), "b": P("x")}
getattr(jax, "set_mesh", None) and jax.set_mesh(mesh) or jax.sharding.use_mesh(mesh).__enter__()
params = {name: jax.device_put(p, NamedSharding(mesh, specs[name])) for name, p in whole.items()}
tx = record_statistics(rmsprop(centered=True, momentum=0.9), 2)
state = tx.init(params)
updates, state = jax.jit(tx.update)(params, state, params)
found = statistics(tx, params, updates, state, params)
host = jax.device_get((updates, state))
expected = statistics(tx, jax.device_get(params), host[0], host[1], jax.device_get(params))
for name in expected:
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
for function in (denominator, effective_learning_rate):
    assert function(tx, state, params)["w"].sharding.spec == specs["w"]
summary(tx, params, updates, state, params)
"""


# --- The table, and staged failures ------------------------------------------------------------------------


def network(seed: int = 0) -> dict[str, Any]:
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "hidden": {"kernel": jax.random.normal(first, (64, 32)) / 8, "bias": jnp.zeros(32)},
        "out": {"kernel": jax.random.normal(second, (32, 10)) / 32**0.5, "bias": jnp.zeros(10)},
    }


def cross_entropy(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(images @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    logits = hidden @ params["out"]["kernel"] + params["out"]["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(loss: Callable[..., Any], params: Any, batches: list[Any], at: set[int], **setting: Any) -> Any:
    """Trains with ``rmsprop(**setting)``; the summaries of the updates ``at``, and the loss before each update."""
    tx, summaries, losses = rmsprop(**setting), {}, []

    @quick_jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return value, grads, updates, state

    state = tx.init(params)
    for i, batch in enumerate(batches):
        value, grads, updates, state = step(params, state, batch)
        losses.append(float(value))
        if i in at:
            summaries[i] = summary(tx, grads, updates, state, params)
        params = optax.apply_updates(params, updates)
    return summaries, losses


def digits(steps: int, batch_size: int | None = 64) -> list[Any]:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = jnp.asarray(data.data / 16, jnp.float32), jnp.asarray(data.target)
    if batch_size is None:
        return [(images, labels)] * steps
    rng = np.random.default_rng(0)
    return [(images[i], labels[i]) for i in (rng.integers(0, len(labels), batch_size) for _ in range(steps))]


def causes(found: diagnostics.Summary) -> list[str]:
    assert all(remark in str(found) for remark in found.remarks)
    return [remark.partition(":")[0] for remark in found.remarks]


@pytest.mark.parametrize(
    "setting", [{}, {"momentum": 0.5}, {"centered": True}, {"accumulator_dtype": "bfloat16", "alpha": 0.9}]
)
def test_healthy_run_gives_no_remark(setting: dict[str, Any]) -> None:
    at = {0, 1, 2, 5, 10, 50, 100, 199}
    summaries, losses = train(cross_entropy, network(), digits(200), at, **{"lr": 1e-3} | setting)
    assert losses[-1] < 0.5 * losses[0]
    assert {i: found.remarks for i, found in summaries.items()} == dict.fromkeys(at, ())


def test_learning_rate_too_high_is_recognised() -> None:
    summaries, losses = train(cross_entropy, network(), digits(4), {0, 1, 2, 3}, lr=1.0)
    assert max(losses) > 100 * losses[0]
    assert [causes(found) for found in summaries.values()] == [["learning rate too high"]] * 4


def test_eps_too_large_is_recognised() -> None:
    summaries, losses = train(cross_entropy, network(), digits(100), {20, 99}, lr=1e-3, eps=1.0)
    assert losses[-1] > 0.95 * losses[0]
    assert [causes(found) for found in summaries.values()] == [["eps too large"]] * 2


def test_stalled_half_precision_average_is_recognised() -> None:
    setting = dict(lr=1e-3, alpha=0.999)
    stalled, slow = train(cross_entropy, network(), digits(700, None), {699}, **setting, accumulator_dtype="bfloat16")
    summaries, fast = train(cross_entropy, network(), digits(700, None), {699}, **setting)
    assert slow[-1] > 1.02 * fast[-1]
    assert causes(stalled[699]) == ["average stalled"]
    assert "out/kernel the state rests in bfloat16" in stalled[699].remarks[0]
    assert summaries[699].remarks == ()


def test_underflowed_half_precision_average_is_recognised() -> None:
    def slope(params: jax.Array) -> jax.Array:
        return 5e-4 * jnp.sum(params)

    batches = [()] * 300
    summaries, losses = train(slope, jnp.ones(8), batches, {299}, lr=1e-3, accumulator_dtype="float16")
    _, expected = train(slope, jnp.ones(8), batches, set(), lr=1e-3)
    # Every step is as large as the first one, lr/√(1 − alpha), and never comes down to lr.
    np.testing.assert_allclose(losses[-2] - losses[-1], 8 * 5e-4 * 10 * 1e-3, rtol=1e-3)
    np.testing.assert_allclose(expected[-2] - expected[-1], 8 * 5e-4 * 1e-3, rtol=0.03)
    assert causes(summaries[299]) == ["average stalled"]


def test_exploding_centered_step_is_recognised() -> None:
    def distance(params: Any, target: jax.Array) -> jax.Array:  # far from the target its gradient never varies
        return jnp.abs(params["w"] - target).mean()

    batches = [(jnp.full(4, 50.0),)] * 125
    summaries, losses = train(distance, {"w": jnp.ones(4)}, batches, {5, 99}, lr=0.01, alpha=0.9, centered=True)
    assert summaries[5].remarks == ()
    assert causes(summaries[99]) == ["centered step exploding"]
    assert losses[99] - losses[100] > 100 * 0.01
    _, plain = train(distance, {"w": jnp.ones(4)}, batches, set(), lr=0.01, alpha=0.9)
    assert max(-np.diff(plain)) < 0.04


def test_exploding_centered_step_is_recognised_when_eps_is_all_that_is_left() -> None:
    params, tx = jnp.ones(4), rmsprop(0.01, alpha=0.5, eps=1e-6, centered=True)
    state = tx.init(params)
    for _ in range(60):
        updates, state = tx.update(params, state, params)
    found = summary(tx, params, updates, state, params)
    assert found.statistics["params/eps_share"] == 1
    np.testing.assert_allclose(found.statistics["params/lr_50"], 0.01 / 1e-6, rtol=1e-2)
    assert causes(found) == ["centered step exploding"]


def test_what_is_not_finite_is_named() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    grads = {"a": jnp.ones(2), "b": jnp.array([jnp.nan, 1.0])}
    updates, state = rmsprop(1e-4).update(grads, rmsprop(1e-4).init(params), params)
    found = summary(rmsprop(1e-4), grads, updates, state, params)
    assert causes(found) == ["not finite"]
    assert "NaN in b;" in found.remarks[0]
    many = {str(i): jnp.full(2, jnp.nan) for i in range(10, 18)}
    found = summary(rmsprop(), many, many, rmsprop().init(many), many)
    assert "NaN in 10, 11, 12, 13, 14 and 3 more;" in found.remarks[0]


def test_never_updated_elements_are_no_sign_of_a_large_eps() -> None:
    grads = jnp.array([1.0, *[0.0] * 99])
    updates, state = rmsprop(1e-3).update(grads, rmsprop().init(grads))
    found = summary(rmsprop(1e-3), grads, updates, state, jnp.ones(100))
    assert found.statistics["params/eps_share"] == pytest.approx(0.99)
    assert found.remarks == ()


def test_parameters_that_are_all_zero_are_no_sign_of_a_high_learning_rate() -> None:
    grads = {"w": jnp.ones(3)}
    updates, state = rmsprop(1e-3).update(grads, rmsprop().init(grads))
    assert summary(rmsprop(1e-3), grads, updates, state, {"w": jnp.zeros(3)}).remarks == ()


def test_summary_is_an_aligned_table() -> None:
    params = {"kernel": jnp.full((30, 40), 0.5), "scale": jnp.float32(2.0), "half": jnp.ones(3, jnp.bfloat16)}
    grads = jax.tree.map(lambda p: -p, params)
    tx = rmsprop(1e-3, alpha=0.75, momentum=0.9)
    updates, state = tx.update(grads, tx.init(params), params)
    found = summary(tx, grads, updates, state, params)
    head, rule, *rows, last_rule, total = str(found).splitlines()
    assert repr(found) == str(found)
    assert len({len(line) for line in (head, rule, *rows, last_rule, total)}) == 1
    cells = {line.split()[0]: re.split(r" {2,}", line.strip()) for line in (*rows, total)}
    columns = re.split(r" {2,}", head)
    sizes, figures = ["kernel", "30×40", "1,200", "float32", "9.38 KiB"], ["0.5", "0.004", "0.004 [0.004–0.004]"]
    assert cells["kernel"] == [*sizes, *figures, "0.0%", "2", "0.0%", "0.0%"]
    assert cells["half"][:5] == ["half", "3", "3", "float32", "24 B"]
    assert cells["total"][columns.index("count") - 1] == "1,204"
    assert found.statistics == {key: float(x) for key, x in statistics(tx, grads, updates, state, params).items()}


class Cells(html.parser.HTMLParser):
    """Checks that tags are closed in order, and collects the text of the cells and items."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[-1] += data


def test_summary_in_a_notebook_is_the_same_table_escaped() -> None:
    params = {"<b>bold</b>": jnp.ones(3)}
    updates, state = rmsprop(1.0).update(params, rmsprop(1.0).init(params), params)
    found = summary(rmsprop(1.0), params, updates, state, params)
    page = found._repr_html_()
    cells = Cells()
    cells.feed(page)
    assert not cells.open
    assert "<b>" not in page
    assert found.remarks
    for text in [cell for row in found.rows for cell in row] + list(found.remarks):
        assert text in cells.texts


def test_front_door_has_diagnostics() -> None:
    assert rmsprop_jax.diagnostics is diagnostics
