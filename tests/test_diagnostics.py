"""The statistics against NumPy, wherever the state is found."""

import dataclasses
import functools
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
from rmsprop_jax import RMSPropState, diagnostics, dialects, figures, rmsprop, scale_by_rmsprop
from rmsprop_jax.diagnostics import denominator, effective_learning_rate, statistics
from rmsprop_jax.recorder import record_statistics
from rmsprop_jax.summary import summarize
from test_promises import devices, in_fresh_process
from training import SMALL, TOLERANCE, Update, after, assert_rates, small, tree

NEEDS_NO_STATE = {"grad_rms", "param_rms", "update_rms", "update_ratio", "nonfinite"}

ALL = NEEDS_NO_STATE | {"lr_5", "lr_50", "lr_95", "eps_share", "surprise", "never_updated"}


@functools.cache
def program(tx: Any) -> Callable[..., dict[str, jax.Array]]:
    return jax.jit(functools.partial(statistics, tx))


def measured(tx: Any, *trees: Any) -> dict[str, jax.Array]:
    """:func:`statistics`, compiled as one program."""
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

    @jax.jit
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


# --- Where the state is found ----------------------------------------------------------------------------

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
    assert "–" in str(summarize(*last))


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


# --- Errors ----------------------------------------------------------------------------------------------

MEASURES = [
    denominator,
    effective_learning_rate,
    diagnostics.settings,
    lambda tx, state, params: statistics(tx, params, params, state, params),
    lambda tx, state, params: summarize(tx, params, params, state, params),
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
    for measure in (statistics, summarize):
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


# --- What the transformation says of itself --------------------------------------------------------------


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


def test_each_group_has_its_own_place_of_eps() -> None:
    groups = {"a": rmsprop(0.1, eps=1e-2), "b": dialects.keras(0.2, epsilon=3e-2)}
    last = after(optax.partition(groups, {"a": "a", "b": "b"}), make=small)
    assert_rates(last, {"a": 0.1, "b": 0.2}, {"a": 1e-2, "b": 3e-2}, {"b"})


def test_state_without_a_count_needs_constant_numbers() -> None:
    tx = rmsprop(0.1)
    updates, state = tx.update(SMALL, tx.init(SMALL), SMALL)
    bare = state._replace(step=None)
    assert_same(statistics(tx, SMALL, updates, bare, SMALL), statistics(tx, SMALL, updates, state, SMALL))
    with pytest.raises(ValueError, match=r"opt_state\.step is None, so the schedule of lr cannot be read"):
        statistics(rmsprop(lambda step: 0.1), SMALL, updates, bare, SMALL)


# --- Every kind of number --------------------------------------------------------------------------------


def all_functions(
    params: Any,
    momentum: float = 0.9,
    centered: bool = True,
    jit: Callable[..., Any] = jax.jit,
    run_without_gradients: bool = True,
) -> Any:
    """Everything once: a first update without gradients, which may be traced only, then some with them."""
    tx = record_statistics(rmsprop(1e-3, momentum=momentum, centered=centered), every=1)

    @jit
    def update(grads: Any, state: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        found = statistics(tx, grads, updates, state, params)
        denominator(tx, state, params), effective_learning_rate(tx, state, params)
        return updates, state, found

    state, none = tx.init(params), jax.tree.map(lambda _: None, params)
    if not run_without_gradients:
        jax.eval_shape(update, none, state)
    for grads in ([none] if run_without_gradients else []) + [jax.tree.map(jnp.zeros_like, params), params]:
        updates, state, found = update(grads, state)
        summarize(tx, grads, updates, state, params)
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


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float16", "float32", "complex64"])
def test_every_dtype_works_under_strict_promotion(dtype: str) -> None:
    params = {"w": jnp.ones((2, 2), jnp.float32).astype(dtype), "b": jnp.ones(2)}
    with jax.numpy_dtype_promotion("strict"):
        found = all_functions(params, momentum=0.0, centered=False, run_without_gradients=False)
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
    for measure in (statistics, summarize):
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


# --- Compiled --------------------------------------------------------------------------------------------


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
    before = figures.by_key._cache_size()
    for lr in (0.1, 1, jnp.float32(0.2), lambda step: 0.3):
        statistics(rmsprop(lr, eps=1e-5), *last[1:])
    assert figures.by_key._cache_size() <= before + 1  # a Python number is weakly typed


@pytest.mark.script
def test_explicit_mesh_with_arrays_sharded_along_the_last_axis() -> None:
    if not hasattr(jax.sharding, "AxisType"):
        pytest.skip("this JAX has no explicit axes")
    in_fresh_process(EXPLICIT, **devices(8))


EXPLICIT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from rmsprop_jax import rmsprop
from rmsprop_jax.diagnostics import denominator, effective_learning_rate, statistics
from rmsprop_jax.recorder import record_statistics
from rmsprop_jax.summary import summarize

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
summarize(tx, params, updates, state, params)
"""


def test_front_door_has_diagnostics() -> None:
    assert rmsprop_jax.diagnostics is diagnostics
