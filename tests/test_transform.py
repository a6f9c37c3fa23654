"""The algorithm against NumPy, and the numerics contract line by line."""

import functools
import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import reference
from compare import assert_close, assert_same
from rmsprop_jax import RMSPropState, dialects, lift, rmsprop, scale_by_rmsprop, translation
from rmsprop_jax.equations import average, average_steps, divide_eps_outside
from rmsprop_jax.state import SettingsQuery

EPS32 = float(np.finfo(np.float32).eps)


def gradients(steps: int, shape: tuple[int, ...] = (7,), seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).normal(size=(steps, *shape))


def run(tx: optax.GradientTransformation, param: Any, grads: Any) -> list[tuple[Any, Any, RMSPropState]]:
    """(update, param, state) after each step of a single array."""
    state, moments = tx.init(param), []
    for g in grads:
        update, state = tx.update(jnp.asarray(g, param.dtype), state, param)
        param = optax.apply_updates(param, update)
        moments.append((update, param, state))
    return moments


def assert_is_reference(moments: Any, expected: Any, rtol: float) -> None:
    for t, ((update, param, state), wanted) in enumerate(zip(moments, expected, strict=True), start=1):
        second_moment = state.square_avg + (0 if state.grad_avg is None else state.grad_avg**2)
        pairs = [(update, wanted.update), (param, wanted.param), (second_moment, wanted.square_avg)]
        if state.grad_avg is not None:
            pairs.append((state.grad_avg, wanted.grad_avg))
        if state.momentum_buffer is not None:
            pairs.append((state.momentum_buffer, wanted.momentum_buffer))
        for got, want in pairs:
            assert_close(got, want, rtol=rtol, scale="array", dtype=param.dtype)
        assert state.step == t


# --- The equations ---------------------------------------------------------------------------------------


@pytest.mark.device("parity")
@pytest.mark.parametrize(
    ("momentum", "centered", "weight_decay", "maximize"),
    list(itertools.product((0, 0.9), (False, True), (0, 0.1), (False, True))),
)
def test_every_step_is_the_published_rule(
    x64: None, momentum: float, centered: bool, weight_decay: float, maximize: bool
) -> None:
    setting = dict(lr=0.03, alpha=0.95, eps=1e-3, weight_decay=weight_decay, momentum=momentum)
    setting |= dict(centered=centered, maximize=maximize)
    param, grads = np.linspace(-2, 2, 7), gradients(20)
    expected = reference.rmsprop(param, grads, **setting)
    assert_is_reference(run(rmsprop(**setting), jnp.asarray(param), grads), expected, rtol=1e-12)


@pytest.mark.device("parity")
@pytest.mark.parametrize(
    ("eps_in_sqrt", "initial_scale", "bias_correction", "centered", "momentum"),
    [
        setting
        for setting in itertools.product((False, True), (0.0, 1.0, 0.3), (False, True), (False, True), (0.0, 0.7))
        if not (setting[1] and setting[2])  # a corrected average does not remember what it started from
        and not (setting[2:4] == (True, True) and not setting[0])  # the reference's first variance is 0 ± rounding
    ],
)
def test_every_variant_of_the_scaling_is_the_published_rule(
    x64: None, eps_in_sqrt: bool, initial_scale: float, bias_correction: bool, centered: bool, momentum: float
) -> None:
    setting = dict(alpha=0.9, eps=1e-2, momentum=momentum, centered=centered, eps_in_sqrt=eps_in_sqrt)
    setting |= dict(initial_scale=initial_scale, bias_correction=bias_correction)
    param, grads = np.zeros(7), gradients(20)
    expected = reference.rmsprop(param, grads, lr=-1.0, **setting)
    assert_is_reference(run(scale_by_rmsprop(**setting), jnp.asarray(param), grads), expected, rtol=1e-12)


def test_corrected_centered_average_is_a_weighted_variance(x64: None) -> None:
    alpha, grads = 0.9, gradients(20)
    moments = run(scale_by_rmsprop(alpha, centered=True, bias_correction=True), jnp.zeros(7), grads)
    for t, (_, _, state) in enumerate(moments, start=1):
        weights = alpha ** np.arange(t - 1, -1, -1)
        mean = np.average(grads[:t], axis=0, weights=weights)
        variance = np.average((grads[:t] - mean) ** 2, axis=0, weights=weights)
        np.testing.assert_allclose(state.grad_avg, mean, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(state.square_avg, variance, rtol=1e-12, atol=1e-13)


def test_correction_counts_updates_without_gradient() -> None:
    tx = scale_by_rmsprop(0.9, bias_correction=True)
    state = tx.init(jnp.zeros(1))
    for g in (jnp.ones(1), None, jnp.zeros(1)):
        _, state = tx.update(g, state)
    gain = 0.1 / (1 - 0.9**3)  # of the third update; the second changed nothing
    np.testing.assert_allclose(state.square_avg, 1 - gain, rtol=1e-6)


def test_scaling_works_under_strict_promotion() -> None:
    with jax.numpy_dtype_promotion("strict"):
        run(scale_by_rmsprop(bias_correction=True, centered=True, momentum=0.9), jnp.zeros(2), gradients(2, (2,)))


def test_bias_correction_with_alpha_zero_keeps_the_last_square_only() -> None:
    moments = run(scale_by_rmsprop(0.0, bias_correction=True), jnp.zeros(7), gradients(3))
    for g, (_, _, state) in zip(gradients(3), moments, strict=True):
        np.testing.assert_allclose(state.square_avg, g**2, rtol=2 * EPS32)


def test_one_step_can_be_done_by_hand() -> None:
    tx = rmsprop(lr=0.1, alpha=0.75, eps=0.5, weight_decay=0.5, momentum=0.9)
    update, state = tx.update(jnp.array([1.0]), tx.init(jnp.array([2.0])), jnp.array([2.0]))
    # g = 1 + 0.5 · 2 = 2; square_avg = 0.25 · 4 = 1; denom = 1 + 0.5; buffer = 2/1.5; update = −0.1 · 2/1.5
    np.testing.assert_allclose(state.square_avg, [1.0])
    np.testing.assert_allclose(state.momentum_buffer, [4 / 3], rtol=EPS32)
    np.testing.assert_allclose(update, [-0.4 / 3], rtol=EPS32)


def test_scaling_alone_points_along_the_gradient() -> None:
    update, _ = scale_by_rmsprop(0.75, eps=0.0).update(jnp.array([3.0, -0.5]), scale_by_rmsprop().init(jnp.zeros(2)))
    np.testing.assert_array_equal(update, [2.0, -2.0])


def test_momentum_buffer_ignores_learning_rate() -> None:
    slow, fast = (run(rmsprop(lr=lr, momentum=0.9), jnp.zeros(7), gradients(5)) for lr in (1e-4, 10.0))
    for (_, _, a), (_, _, b) in zip(slow, fast, strict=True):
        assert_same(a.momentum_buffer, b.momentum_buffer)


def test_schedule_is_read_at_zero_for_the_first_update() -> None:
    rates = [0.1, 0.02, 0.003]
    moments = run(rmsprop(lambda step: jnp.array(rates)[step], momentum=0.5), jnp.zeros(7), gradients(3))
    for rate, (update, _, state) in zip(rates, moments, strict=True):
        np.testing.assert_allclose(update, -rate * state.momentum_buffer, rtol=EPS32)


def test_schedule_continues_where_a_constant_rate_stopped() -> None:
    param = jnp.zeros(7)
    *_, (_, param, state) = run(rmsprop(0.1), param, gradients(3))
    update, _ = rmsprop(lambda step: step * 1.0).update(jnp.ones(7), state, param)
    other, _ = rmsprop(3.0).update(jnp.ones(7), state, param)
    assert_same(update, other)


@pytest.mark.parametrize("value", [0.5, 1, np.float64(0.5), np.float32(0.5), jnp.float16(0.5), jnp.int32(1)], ids=repr)
def test_schedule_may_return_any_real_scalar(value: Any) -> None:
    update, _ = rmsprop(lambda step: value, alpha=0.0).update(jnp.ones(2), rmsprop().init(jnp.ones(2)))
    np.testing.assert_allclose(update, -float(value) * np.ones(2), rtol=1e-6)
    assert update.dtype == jnp.float32


@pytest.mark.parametrize("value", [jnp.ones(1), np.ones(3), -0.1, np.nan])
def test_schedule_that_returns_no_rate_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^the schedule of lr must be a number ≥ 0"):
        rmsprop(lambda step: value).update(jnp.ones(()), rmsprop().init(jnp.ones(())))


@pytest.mark.parametrize("value", [None, "0.1", True, jnp.array(1j), jnp.array(True)], ids=repr)
def test_schedule_that_returns_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^the schedule of lr must be a number ≥ 0"):
        rmsprop(lambda step: value).update(jnp.ones(()), rmsprop().init(jnp.ones(())))


def test_step_keeps_type_and_saturates() -> None:
    tx = rmsprop()
    state = tx.init(jnp.zeros(1))._replace(step=jnp.array(2**31 - 2, jnp.int32))
    for _ in range(3):
        _, state = tx.update(jnp.zeros(1), state)
        assert (state.step.dtype, state.step.weak_type, state.step.shape) == (jnp.int32, False, ())
    assert state.step == 2**31 - 1


# Values per update, which is as general as a schedule gets.
SCHEDULES = {
    "lr": (0.03, 0.01, 0.1, 0.0),
    "alpha": (0.9, 0.5, 0.0, 0.99),
    "eps": (1e-3, 1.0, 1e-8, 0.1),
    "weight_decay": (0.0, 0.1, 0.3, 0.0),
    "momentum": (0.9, 0.0, 0.5, 0.99),
}


@pytest.mark.parametrize("returned", [float, np.float64, jnp.float64], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("names", [*((name,) for name in SCHEDULES), tuple(SCHEDULES)], ids=" ".join)
def test_every_number_may_be_a_schedule(x64: None, names: tuple[str, ...], centered: bool, returned: Any) -> None:
    setting = dict(lr=0.02, alpha=0.9, eps=1e-3, weight_decay=0.1, momentum=0.5)
    ours = setting | {name: lambda step, name=name: returned(SCHEDULES[name][int(step)]) for name in names}
    theirs = setting | {name: lambda step, name=name: SCHEDULES[name][step] for name in names}
    param, grads = gradients(1)[0], gradients(4, seed=1)
    moments = run(rmsprop(**ours, centered=centered), jnp.asarray(param), grads)
    assert_is_reference(moments, reference.rmsprop(param, grads, **theirs, centered=centered), rtol=1e-12)


def test_schedules_of_all_numbers_are_traced_once_and_need_no_other_state() -> None:
    names = [name for name in SCHEDULES if name != "lr"]
    tx = rmsprop(**{name: lambda step, name=name: jnp.asarray(SCHEDULES[name])[step] for name in names})
    state = tx.init(jnp.ones(2))
    assert jax.tree.structure(state) == jax.tree.structure(rmsprop(momentum=0.5).init(jnp.ones(2)))
    step = jax.jit(lambda g, state, p: tx.update(g, state, p))
    for _ in range(4):
        _, state = step(jnp.ones(2), state, jnp.ones(2))
    assert step._cache_size() == 1


DIALECTS_AND_NUMBERS = [
    (build, name)
    for build in (row.build for row in translation.DIALECTS.values())
    for name, parameter in inspect.signature(build).parameters.items()
    if "ScalarOrSchedule" in str(parameter.annotation) or "Callable" in str(parameter.annotation)
    if name != "weight_decay_mask"
]


@pytest.mark.parametrize(("build", "name"), DIALECTS_AND_NUMBERS, ids=lambda x: getattr(x, "__name__", x))
def test_every_number_of_every_dialect_may_be_a_schedule(x64: None, build: Any, name: str) -> None:
    lr = {"lr", "learning_rate"} & set(inspect.signature(build).parameters)
    setting = dict.fromkeys(lr, 0.1) | {
        other: 0.25 for other in ("momentum", "weight_decay") if other in inspect.signature(build).parameters
    }
    values = jnp.array([0.5, 0.125, 0.75])
    scheduled = build(**setting | {name: lambda step: values[step]})
    params = jnp.array([1.0, -2.0])
    state = scheduled.init(params)
    for t, g in enumerate(gradients(3, (2,))):
        constant = build(**setting | {name: values[t]})
        before = state
        expected = constant.update(jnp.asarray(g), before, params)
        updates, state = scheduled.update(jnp.asarray(g), state, params)
        assert_close((updates, state), expected, rtol=1e-14)
        if t == 2:  # the first update of bias-corrected averages does not depend on their constants
            other = build(**setting | {name: values[t - 1]}).update(jnp.asarray(g), before, params)
            assert not np.allclose(other[0], updates, rtol=1e-3)
        params = optax.apply_updates(params, updates)


def test_scheduled_bias_correction_weighs_with_the_current_alpha(x64: None) -> None:
    alphas, grads = (0.9, 0.5, 0.99), gradients(3)
    moments = run(scale_by_rmsprop(lambda step: alphas[int(step)], bias_correction=True), jnp.zeros(7), grads)
    v = np.zeros(7)
    for t, (alpha, g, (_, _, state)) in enumerate(zip(alphas, grads, moments, strict=True), start=1):
        gain = (1 - alpha) / (1 - alpha**t)
        v = (1 - gain) * v + gain * g**2
        np.testing.assert_allclose(state.square_avg, v, rtol=1e-12)


# --- Which slots there are -------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 0.0, np.float64(0), np.float32(0), np.int64(0)])
def test_momentum_that_is_the_number_zero_has_no_buffer(zero: Any) -> None:
    assert rmsprop(momentum=zero).init(jnp.zeros(2)).momentum_buffer is None


@pytest.mark.parametrize("zero", [jnp.zeros(()), np.zeros(()), jnp.zeros((), jnp.int32)])
def test_momentum_that_is_an_array_has_a_buffer_whatever_its_value(zero: Any) -> None:
    eager = rmsprop(momentum=zero).init(jnp.zeros(2))
    traced = jax.jit(lambda momentum: rmsprop(momentum=momentum).init(jnp.zeros(2)))(zero)
    assert jax.tree.structure(eager) == jax.tree.structure(traced)
    assert eager.momentum_buffer is not None


def test_array_zeros_change_no_value() -> None:
    zero = jnp.zeros(())
    plain = run(rmsprop(), jnp.ones(7), gradients(3))
    arrays = run(rmsprop(weight_decay=zero, momentum=zero), jnp.ones(7), gradients(3))
    for (a, *_), (b, *_) in zip(plain, arrays, strict=True):
        assert_close(a, b, ulps=2)


def test_slots_are_buffers_of_their_own() -> None:
    state = rmsprop(momentum=0.9, centered=True).init({"a": jnp.zeros(8), "b": jnp.zeros(8)})
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state[1:])]
    assert len(set(pointers)) == 6


def test_start_that_bias_correction_would_forget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^initial_scale must be 0 with bias_correction, .*got 0\.5"):
        scale_by_rmsprop(initial_scale=0.5, bias_correction=True)


def test_initial_scale_fills_square_avg_only() -> None:
    params = {"real": jnp.zeros(2), "complex": jnp.zeros(2, jnp.complex64)}
    state = scale_by_rmsprop(initial_scale=0.5, momentum=0.9, centered=True).init(params)
    np.testing.assert_array_equal(state.square_avg["real"], [0.5, 0.5])
    np.testing.assert_array_equal(state.square_avg["complex"], [0.5 + 0.5j] * 2)
    for leaf in jax.tree.leaves((state.grad_avg, state.momentum_buffer)):
        np.testing.assert_array_equal(leaf, 0)


# --- Precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("gradient_dtype", ["same", "float32", "float64"])
def test_update_has_the_dtype_of_the_gradient(x64: None, dtype: str, gradient_dtype: str) -> None:
    if gradient_dtype == "same":
        gradient_dtype = dtype
    elif dtype.startswith("complex"):
        gradient_dtype = {"float32": "complex64", "float64": "complex128"}[gradient_dtype]
    tx = rmsprop(weight_decay=np.float64(0.1), momentum=0.9, centered=True)
    params = jnp.ones(3, dtype)
    update, _ = tx.update(jnp.ones(3, gradient_dtype), tx.init(params), params)
    assert update.dtype == gradient_dtype


@pytest.mark.parametrize(
    ("dtype", "accumulator_dtype", "expected"),
    [
        ("float16", None, "float32"),
        ("bfloat16", None, "float32"),
        ("float8_e4m3fn", None, "float32"),
        ("float32", None, "float32"),
        ("float64", None, "float64"),
        ("complex64", None, "complex64"),
        ("complex128", None, "complex128"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float16", "float16"),
        ("float32", "float64", "float64"),
        ("float64", "float32", "float32"),
        ("complex64", "bfloat16", "complex64"),
        ("complex64", "float64", "complex128"),
        ("complex128", "float32", "complex64"),
    ],
)
def test_state_rests_in(x64: None, dtype: str, accumulator_dtype: str | None, expected: str) -> None:
    tx = rmsprop(momentum=0.9, centered=True, accumulator_dtype=accumulator_dtype)
    params = jnp.ones(3, dtype)
    state = tx.init(params)
    for _ in range(2):
        assert {leaf.dtype for leaf in jax.tree.leaves(state[1:])} == {jnp.dtype(expected)}
        _, state = tx.update(params, state, params)


def test_hyperparameters_are_not_rounded_to_half_precision() -> None:
    # In bfloat16, 0.999 is 1, 0.001 is 0.0010009765625 and 0.3 is 0.30078125: each shows in the update.
    setting = dict(lr=0.001, alpha=0.999, eps=1e-3, weight_decay=0.3, momentum=0.3)
    param = jnp.asarray(gradients(1, (1000,))[0], jnp.bfloat16)
    grads = np.asarray(jnp.asarray(gradients(1, (1000,), seed=1), jnp.bfloat16), np.float64)
    ((update, _, _),) = run(rmsprop(**setting), param, grads)
    (expected,) = reference.rmsprop(np.asarray(param, np.float64), grads, **setting)
    np.testing.assert_array_equal(update, jnp.asarray(expected.update, jnp.bfloat16))  # rounded once, at the end


def test_half_precision_hyperparameters_are_computed_with_in_float32() -> None:
    momentum = jnp.asarray(0.75, jnp.bfloat16)
    moments = run(rmsprop(momentum=momentum, lr=jnp.asarray(0.5, jnp.float16)), jnp.zeros(1), [[1 / 3]] * 2)
    first, second = (state.momentum_buffer for _, _, state in moments)
    expected = 0.75 * first + 1 / np.sqrt(0.01 + 0.0099)
    np.testing.assert_allclose(second, expected, rtol=8 * EPS32)


HALF_PRECISION = [jnp.bfloat16(0.9), jnp.float16(0.9), np.float16(0.9), jnp.asarray(0.9, jnp.bfloat16)]


@pytest.mark.parametrize("alpha", HALF_PRECISION, ids=lambda x: f"{type(x).__name__} {x.dtype}")
def test_smoothing_constant_in_half_precision_is_refused_with_the_way_out(alpha: Any) -> None:
    for build in (lambda x: rmsprop(alpha=x), lambda x: scale_by_rmsprop(x), lambda x: dialects.dreamer(beta2=x)):
        with pytest.raises(TypeError, match=f"must not be {alpha.dtype}.*hyperparam_dtype=jnp.float32"):
            build(alpha)
        with pytest.raises(TypeError, match=f"must not be {alpha.dtype}"):
            jax.jit(lambda x, build=build: build(x).init(jnp.zeros(1)))(alpha)
    with pytest.raises(TypeError, match=f"^beta1 must not be {alpha.dtype}"):
        dialects.dreamer(beta1=alpha)
    scheduled = rmsprop(alpha=lambda step: alpha)
    with pytest.raises(TypeError, match=f"the schedule of alpha must not be {alpha.dtype}"):
        scheduled.update(jnp.ones(1), scheduled.init(jnp.ones(1)))


def test_injected_hyperparameters_of_a_half_precision_model_are_refused_unless_in_float32() -> None:
    params = jnp.ones(3, jnp.bfloat16)
    with pytest.raises(TypeError, match=r"^alpha must not be bfloat16.*hyperparam_dtype=jnp.float32"):
        optax.inject_hyperparams(rmsprop)(lr=0.1, alpha=0.999).init(params)
    tx = optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)(lr=0.1, alpha=0.999)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates.astype(jnp.float32), -0.1 / np.sqrt(0.001), rtol=0.01)


def test_arithmetic_is_float32_where_the_accumulator_is_narrower() -> None:
    tx = scale_by_rmsprop(alpha=0.999, accumulator_dtype="bfloat16")
    update, state = tx.update(jnp.full(1, 0.3), tx.init(jnp.zeros(1)))
    np.testing.assert_allclose(update, 0.3 / (np.sqrt(0.001 * 0.3**2) + 1e-8), rtol=4 * EPS32)  # bfloat16: 1e-3
    assert state.square_avg == jnp.asarray(0.001 * 0.3**2, jnp.bfloat16)


def test_one_minus_alpha_is_taken_in_double_precision() -> None:
    state = run(scale_by_rmsprop(alpha=0.99), jnp.zeros(1), [[1.0]])[0][2]
    assert np.float32(state.square_avg[0]) == np.float32(1 - 0.99) != np.float32(1) - np.float32(0.99)


def test_one_minus_an_alpha_of_numpy_is_taken_in_double_precision() -> None:
    grads, given = gradients(3), (0.99, np.float64(0.99), np.array(0.99))
    first, *others = (run(scale_by_rmsprop(alpha=alpha), jnp.zeros(7), grads)[-1] for alpha in given)
    for other in others:
        assert_same(other, first)


@pytest.mark.parametrize("alpha", [0.1, 0.499, 0.501, 0.9, 0.999, 0.9999])
def test_bias_correction_is_as_accurate_as_float32(alpha: float) -> None:
    grads = np.asarray(gradients(12), np.float32)
    moments = run(scale_by_rmsprop(alpha, bias_correction=True), jnp.zeros(7), grads)
    expected = reference.rmsprop(np.zeros(7), grads, alpha=alpha, bias_correction=True)
    for (_, _, state), want in zip(moments, expected, strict=True):
        np.testing.assert_allclose(state.square_avg, want.square_avg, rtol=16 * EPS32)  # Optax at 0.999: 1e-5


def test_average_of_steps_needs_no_bias_correction() -> None:
    equations = (average, divide_eps_outside, average_steps)
    for momentum in (0.75, jnp.float32(0.75)):
        tx = lift.transformation(equations, {"alpha": 0.0, "eps": 0.0, "momentum": momentum})
        _, state = tx.update(jnp.array([2.0, -3.0]), tx.init(jnp.zeros(2)))
        np.testing.assert_array_equal(state.momentum_buffer, [0.25, -0.25])


def test_numpy_numbers_under_x64_promote_nothing(x64: None) -> None:
    tx = rmsprop(np.float64(0.01), np.float64(0.9), np.float64(1e-8), np.float64(0.1), np.float64(0.9))
    params = jnp.ones(3, jnp.float32)
    moments = run(tx, params, [np.ones(3)])
    assert {leaf.dtype for leaf in jax.tree.leaves(moments[0]) if leaf.ndim} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_double_precision_arrays_promote_nothing(x64: None, kind: Any) -> None:
    number = kind(np.asarray(0.5, np.float64))
    tx = rmsprop(number, number, number, number, number)
    params = jnp.ones(3, jnp.float32)
    program = str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))
    assert tx.update(params, tx.init(params), params)[0].dtype == jnp.float32
    assert "f64[3]" not in program  # scalars may be, arrays may not


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_zero_gradient_gives_zero_update(dtype: str) -> None:
    for centered in (False, True):
        update = run(rmsprop(centered=centered, momentum=0.9), jnp.ones(3, dtype), np.zeros((3, 3)))[-1][0]
        np.testing.assert_array_equal(update, np.zeros(3))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_average_in_half_precision_neither_stalls_nor_sticks(dtype: str) -> None:
    tx = scale_by_rmsprop(alpha=0.999)

    def feed(state: RMSPropState, value: float, steps: int) -> RMSPropState:
        g = jnp.full(1, value, dtype)
        return jax.lax.scan(lambda s, _: (tx.update(g, s)[1], None), state, length=steps)[0]

    full = feed(tx.init(jnp.zeros(1, dtype)), 1.0, 5000)
    np.testing.assert_allclose(full.square_avg, 1 - 0.999**5000, rtol=1e-4)  # torch and Optax stop at 0.5
    np.testing.assert_allclose(feed(full, 0.0, 5000).square_avg, 0.999**5000, rtol=1e-2)  # and never leave 1


def test_square_does_not_overflow_where_torch_does_not() -> None:
    update, state = scale_by_rmsprop().update(jnp.full(1, 3e19), scale_by_rmsprop().init(jnp.zeros(1)))
    np.testing.assert_allclose(state.square_avg, 0.01 * 9e38, rtol=1e-6)
    np.testing.assert_allclose(update, 10.0, rtol=1e-6)


# --- Centered --------------------------------------------------------------------------------------------


@pytest.mark.device("centered")
@pytest.mark.parametrize(("dtype", "eps"), [("float32", 1e-8), ("bfloat16", 1e-8), ("float16", 1e-2)])
def test_centered_stays_finite_on_constant_gradients(dtype: str, eps: float) -> None:
    tx = rmsprop(lr=1e-3, eps=eps, momentum=0.9, centered=True)
    params, grads = jnp.ones(64, dtype), jnp.asarray(gradients(1, (64,))[0], dtype)

    def body(carry: Any, _: None) -> tuple[Any, Any]:
        update, state = tx.update(grads, carry[1], carry[0])
        finite = jax.tree.map(lambda x: jnp.isfinite(x).all(), (update, state[1:]))
        return (optax.apply_updates(carry[0], update), state), (finite, state.square_avg.min())

    _, (finite, smallest) = jax.lax.scan(body, (params, tx.init(params)), length=5000)
    assert all(leaf.all() for leaf in jax.tree.leaves(finite))
    assert smallest.min() >= 0


@pytest.mark.device("centered")
@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
def test_centered_variance_is_as_accurate_as_its_mean(noise: float) -> None:
    """What is left is the rounding of ``grad_avg``, eps/2 of a mean of 1, against deviations of size ``noise``.

    Measured maxima: 4.0e-6, 2.8e-5, 2.6e-4. The form with a subtraction is off by 9e-3, 0.65 and 13, or NaN.
    """
    grads = (1 + noise * gradients(2000, (64,))).astype(np.float32)
    tx = scale_by_rmsprop(centered=True)
    state = jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), tx.init(jnp.zeros(64)), grads)[0]
    weights = 0.01 * 0.99 ** np.arange(1999, -1, -1.0)[:, None]
    wide = grads.astype(np.float64)
    mean = (weights * wide).sum(0)  # the weights do not add up to 1: the average starts from 0
    variance = (weights * (wide - mean) ** 2).sum(0) + (1 - weights.sum()) * mean**2
    np.testing.assert_allclose(np.sqrt(state.square_avg), np.sqrt(variance), rtol=EPS32 / 2 / noise)


# --- Derivatives -----------------------------------------------------------------------------------------

MATRIX = np.array([[1.0, 0.3, 0.0], [0.2, 2.0, 0.0], [0.0, 0.0, 0.0]])  # the third gradient is exactly zero


def loss_after_five_steps(numbers: dict[str, Any], **structure: Any) -> jax.Array:
    params = numbers["params"]
    tx = rmsprop(**{name: number for name, number in numbers.items() if name != "params"}, **structure)

    def loss(params: jax.Array) -> jax.Array:
        return jnp.sum((MATRIX.astype(params.dtype) @ params - 1) ** 2)

    state = tx.init(params)
    for _ in range(5):
        update, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, update)
    return loss(params) + params[2]


NUMBERS = dict(lr=0.01, alpha=0.9, eps=1e-3, weight_decay=0.02, momentum=0.5)


@functools.cache
def loss_and_slopes(centered: bool) -> tuple[Any, Any]:
    """The loss, and its derivatives by all numbers at once: two programs for all points."""
    loss = functools.partial(loss_after_five_steps, centered=centered)
    return jax.jit(loss), jax.jit(jax.grad(loss))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("third", [0.0, 0.5])  # 0: no weight decay either, so g stays 0 for good
@pytest.mark.parametrize("name", [*NUMBERS, "params"])
def test_derivative_equals_finite_difference(x64: None, name: str, third: float, centered: bool) -> None:
    numbers = NUMBERS | {"params": np.array([1.0, -2.0, third])}
    loss, slopes = loss_and_slopes(centered)

    def at(value: Any) -> jax.Array:
        return loss(numbers | {name: value})

    derivative = slopes(numbers)[name]
    assert np.isfinite(derivative).all()
    steps = np.eye(3)[: 2 if third == 0 else 3] if name == "params" else [1.0]
    for i, step in enumerate(steps):
        numeric = (at(numbers[name] + 1e-6 * step) - at(numbers[name] - 1e-6 * step)) / 2e-6
        np.testing.assert_allclose(derivative[i] if name == "params" else derivative, numeric, rtol=1e-6, atol=1e-7)


@functools.cache
def derivatives(mode: Any, centered: bool) -> Any:
    return jax.jit(mode(functools.partial(loss_after_five_steps, centered=centered)))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 1e-20])  # 1/eps² is infinite in float32 for the second
@pytest.mark.parametrize("mode", [jax.grad, jax.jacfwd])
def test_derivatives_are_finite_at_zero_gradients_in_float32(mode: Any, eps: float, centered: bool) -> None:
    numbers = NUMBERS | {"eps": eps, "weight_decay": 0.0, "params": np.array([1.0, -2.0, 0.0])}
    numbers = {name: np.asarray(number, np.float32) for name, number in numbers.items()}
    found = derivatives(mode, centered)(numbers)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)), found


def test_second_derivative_equals_finite_difference(x64: None) -> None:
    def slope(lr: float) -> jax.Array:
        return jax.grad(lambda lr: loss_after_five_steps({"lr": lr, "params": jnp.array([1.0, -2.0, 0.0])}))(lr)

    numeric = (slope(0.01 + 1e-6) - slope(0.01 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(slope)(0.01), numeric, rtol=1e-6)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 1e-4, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_derivative_by_a_bias_corrected_smoothing_constant(x64: None, alpha: float, steps: int, centered: bool) -> None:
    grads = gradients(steps, (4,))

    def ours(alpha: Any) -> jax.Array:
        tx = scale_by_rmsprop(alpha, eps=1e-3, bias_correction=True, centered=centered)
        return run(tx, jnp.zeros(4), grads)[-1][2].square_avg.sum()

    def theirs(alpha: complex) -> complex:  # a complex step needs no difference, so that it works at alpha = 0
        weights = [(1 - alpha) * alpha ** (steps - 1 - i) / (1 - alpha**steps) for i in range(steps)]
        second = sum(w * g**2 for w, g in zip(weights, grads, strict=True))
        mean = sum(w * g for w, g in zip(weights, grads, strict=True))
        return (second - mean**2 if centered else second).sum()

    expected = theirs(alpha + 1e-30j).imag / 1e-30
    np.testing.assert_allclose(jax.grad(ours)(alpha), expected, rtol=1e-7, atol=1e-11)  # theirs cancels near 1


# --- Complex, missing, empty, infinite ---------------------------------------------------------------------


@pytest.mark.parametrize("centered", [False, True])
def test_complex_arrays_are_two_real_ones(centered: bool) -> None:
    tx = rmsprop(0.1, 0.9, 1e-3, 0.1, 0.9, centered)
    parts = gradients(10, (2, 7))
    start = gradients(1, (2, 7), seed=1)[0]
    whole = run(tx, jnp.asarray(start[0] + 1j * start[1], jnp.complex64), parts[:, 0] + 1j * parts[:, 1])
    halves = run(tx, jnp.asarray(start, jnp.float32), parts)
    for (u, p, s), (u2, p2, s2) in zip(whole, halves, strict=True):
        for joined, split in zip(jax.tree.leaves((u, p, s[1:])), jax.tree.leaves((u2, p2, s2[1:])), strict=True):
            assert_close(jnp.stack([joined.real, joined.imag]), split, ulps=8, scale="array")


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_non_finite_gradient_reaches_state_and_update_of_its_entry_only(bad: float) -> None:
    tx = rmsprop(momentum=0.9)
    update, state = tx.update(jnp.array([bad, 1.0]), tx.init(jnp.zeros(2)))
    for x in (update, state.momentum_buffer):
        assert np.isnan(x).tolist() == [True, False]
    assert np.isfinite(state.square_avg).tolist() == [False, True]


def test_non_finite_component_leaves_the_other_component_alone() -> None:
    tx = rmsprop(momentum=0.9, weight_decay=0.1)
    params = jnp.ones(1, jnp.complex64)
    update, _ = tx.update(jax.lax.complex(jnp.ones(1), jnp.full(1, jnp.inf)), tx.init(params), params)
    assert np.isfinite(update.real).all()
    assert np.isnan(update.imag).all()


PARAMS = {"a": jnp.ones(2), "b": {"c": jnp.ones((2, 2), jnp.bfloat16), "d": None}}


@pytest.mark.parametrize("with_params", [False, True])
@pytest.mark.parametrize("missing", [{"c": None, "d": None}, None])
def test_missing_gradient_leaves_parameter_alone(missing: Any, with_params: bool) -> None:
    tx = rmsprop(momentum=0.9, centered=True, weight_decay=0.1 if with_params else 0.0)
    grads = {"a": jnp.ones(2), "b": {"c": jnp.ones((2, 2), jnp.bfloat16), "d": None}}
    _, before = tx.update(grads, tx.init(PARAMS), PARAMS)
    update, after = tx.update({"a": jnp.ones(2), "b": missing}, before, PARAMS if with_params else None)
    assert jax.tree.structure(update) == jax.tree.structure(PARAMS)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    np.testing.assert_array_equal(update["b"]["c"], np.zeros((2, 2)))
    if with_params:
        assert update["b"]["c"].dtype == jnp.bfloat16
    for slot in ("square_avg", "grad_avg", "momentum_buffer"):
        assert_same(getattr(after, slot)["b"]["c"], getattr(before, slot)["b"]["c"])
        assert (getattr(after, slot)["a"] != getattr(before, slot)["a"]).all()


@jax.tree_util.register_pytree_with_keys_class
class Box:
    """A container that only JAX's registry knows."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def tree_flatten_with_keys(self) -> Any:
        return [(jax.tree_util.GetAttrKey("content"), self.content)], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Box":
        return cls(*children)


@pytest.mark.parametrize(
    "params",
    [
        {},
        (),
        [None],
        jnp.zeros(()),
        jnp.zeros((0, 3)),
        1.5,
        np.ones(2, np.float32),
        Box([jnp.ones(2), {"x": jnp.ones(())}]),
        {"masked": optax.MaskedNode(), "kept": jnp.ones(2)},
        [(jnp.ones(1), None), [jnp.ones((1, 2, 3))]],
    ],
    ids=lambda params: type(params).__name__,
)
def test_any_tree_works(params: Any) -> None:
    tx = rmsprop(momentum=0.9, centered=True, weight_decay=0.1)
    state = tx.init(params)
    for _ in range(2):
        update, state = tx.update(params, state, params)
    assert jax.tree.structure(update) == jax.tree.structure(params)
    assert [u.shape for u in jax.tree.leaves(update)] == [jnp.shape(p) for p in jax.tree.leaves(params)]
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


def test_any_tree_works_without_jit() -> None:
    with jax.disable_jit():
        test_any_tree_works({"number": 1.5, "array": np.ones(2, np.float32), "complex": 1j})


def test_init_takes_shapes_in_place_of_arrays() -> None:
    params = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    shapes = jax.eval_shape(lambda: params)
    tx = rmsprop(momentum=0.9, centered=True)
    assert_same(tx.init(shapes), tx.init(params))
    assert jax.eval_shape(tx.init, shapes).square_avg["w"].dtype == jnp.float32


# --- Weight decay masks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [
        {"a": True, "b": {"c": False, "d": False}},
        {"a": True, "b": False},
        {"a": np.bool_(True), "b": np.bool_(False)},
        lambda params: jax.tree.map(lambda p: p.ndim == 1, params),
    ],
    ids=["tree", "prefix", "numpy", "function"],
)
def test_weight_decay_mask_chooses(mask: Any) -> None:
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones((2, 2)), "d": jnp.ones((1, 1))}}
    tx = rmsprop(lr=1.0, alpha=0.0, weight_decay=0.5, weight_decay_mask=mask, momentum=0.0)
    grads = jax.tree.map(jnp.zeros_like, params)
    update, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(update["a"], [-1.0, -1.0], rtol=1e-6)
    np.testing.assert_array_equal(update["b"]["c"], np.zeros((2, 2)))
    np.testing.assert_array_equal(update["b"]["d"], np.zeros((1, 1)))


def test_weight_decay_mask_of_all_true_is_no_mask() -> None:
    setting = dict(weight_decay=0.3, centered=True)
    masked = rmsprop(weight_decay_mask={"a": True, "b": True}, **setting)
    everywhere = rmsprop(**setting)
    grads = jax.tree.map(lambda p: 0.5 * p, PARAMS)
    found, expected = (tx.update(grads, tx.init(PARAMS), PARAMS) for tx in (masked, everywhere))
    assert_same(found, expected)


# --- Refusals --------------------------------------------------------------------------------------------

NOT_NUMBERS = ["0.1", None, True, 1j, [0.1], {"w": jnp.ones(2)}, np.bool_(True), jnp.array(True), jnp.array(1j)]


@pytest.mark.parametrize("name", ["lr", "alpha", "eps", "weight_decay", "momentum"])
@pytest.mark.parametrize("value", [-0.1, -1, float("nan"), np.float32("nan"), -np.inf])
def test_number_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {str(value)[:4]}|^{name} must be .*np\.float32"):
        rmsprop(**{name: value})


@pytest.mark.parametrize("name", ["lr", "alpha", "eps", "weight_decay", "momentum"])
@pytest.mark.parametrize("value", NOT_NUMBERS, ids=str)
def test_what_is_no_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be a number"):
        rmsprop(**{name: value})


@pytest.mark.parametrize("name", ["lr", "alpha", "eps", "weight_decay", "momentum"])
def test_array_that_is_no_scalar_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*shape \(3,\).*jax.vmap"):
        rmsprop(**{name: jnp.ones(3)})


@pytest.mark.parametrize("name", ["alpha", "eps", "momentum", "initial_scale"])
def test_scaling_refuses_as_rmsprop_does(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be"):
        scale_by_rmsprop(**{name: -1.0})


@pytest.mark.parametrize(
    ("alpha", "hint"), [(99, "did you mean 0.99"), (95.0, "did you mean 0.95"), (1, r"got 1$"), (1.1, r"got 1\.1$")]
)
def test_alpha_of_one_and_more_is_refused(alpha: float, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        rmsprop(alpha=alpha)


@pytest.mark.parametrize("eps", [1e-38, 1e-45, np.float64(1e-300), np.array(1e-40)], ids=repr)
def test_eps_that_would_be_taken_for_zero_is_refused(eps: Any) -> None:
    builds = (rmsprop, scale_by_rmsprop, dialects.optax, dialects.timm, dialects.stable_baselines3, dialects.dreamer)
    for build in builds:
        with pytest.raises(ValueError, match=r"^eps must be 0 or at least 1\.18e-38"):
            build(**{"eps": eps} | ({"learning_rate": 0.1} if build is dialects.optax else {}))
    for build, name in ((dialects.tensorflow, "epsilon"), (dialects.keras, "epsilon")):
        with pytest.raises(ValueError, match=rf"^{name} must be 0 or at least 1\.18e-38"):
            build(0.1, **{name: eps})
    with pytest.raises(ValueError, match=r"^min_squared_gradient must be 0 or at least"):
        dialects.dqn(min_squared_gradient=eps)


@pytest.mark.parametrize("eps_in_sqrt", [False, True])
def test_smallest_eps_keeps_zero_gradients_finite(eps_in_sqrt: bool) -> None:
    tx = scale_by_rmsprop(eps=float(np.finfo(np.float32).tiny), eps_in_sqrt=eps_in_sqrt)
    updates, _ = tx.update(jnp.zeros(2), tx.init(jnp.zeros(2)))
    assert (updates == 0).all()


@pytest.mark.parametrize("initial_scale", [0.5, np.array(0.5), jnp.float32(0.5)], ids=repr)
def test_start_that_bias_correction_forgets_is_refused(initial_scale: Any) -> None:
    with pytest.raises(ValueError, match=r"^initial_scale must be 0 with bias_correction.*got 0\.5"):
        scale_by_rmsprop(initial_scale=initial_scale, bias_correction=True)
    assert scale_by_rmsprop(initial_scale=initial_scale * 0, bias_correction=True).init(jnp.ones(2)).step == 0


@pytest.mark.parametrize("name", ["centered", "maximize"])
@pytest.mark.parametrize("value", [1, 0.9, None, "yes", jnp.array(True)], ids=str)
def test_what_is_no_flag_is_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be True or False"):
        rmsprop(**{name: value})


@pytest.mark.parametrize("hint", ["foreach", "fused", "capturable", "differentiable"])
@pytest.mark.parametrize("value", [True, False, None])
def test_execution_hint_of_torch_is_refused_with_the_reason(hint: str, value: bool | None) -> None:
    with pytest.raises(TypeError, match=f"^{hint}={value} tells torch how to execute"):
        rmsprop(**{hint: value})


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, bool])
def test_accumulator_that_is_not_floating_is_refused(dtype: Any) -> None:
    with pytest.raises(TypeError, match=f"^accumulator_dtype must be a real floating dtype.*{jnp.dtype(dtype).name}"):
        rmsprop(accumulator_dtype=dtype)


def test_float64_accumulator_without_x64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^accumulator_dtype float64 needs jax_enable_x64"):
        rmsprop(accumulator_dtype="float64")


@pytest.mark.parametrize("leaf", [np.arange(3), jnp.arange(3), jnp.ones(2, bool), np.int32(1)], ids=str)
def test_integer_parameter_is_refused_by_path(leaf: Any) -> None:
    with pytest.raises(TypeError, match=r"^params\['layer'\]\[1\] must be floating or complex, got "):
        rmsprop().init({"layer": [jnp.ones(1), leaf]})


TREE = {"a": jnp.ones(2), "b": {"c": jnp.ones(3)}}


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ({"a": jnp.ones(2)}, ValueError, r"state.square_avg\['b'\]\['c'\] has no gradient"),
        ({"a": jnp.ones(2), "b": {}}, ValueError, r"state.square_avg\['b'\]\['c'\] has no gradient"),
        (
            {"a": None, "b": {"c": jnp.ones(3), "d": jnp.ones(1)}},
            ValueError,
            r"updates\['b'\]\['d'\] has no counterpart",
        ),
        ({"a": None, "b": None, "e": jnp.ones(1)}, ValueError, r"updates\['e'\] has no counterpart"),
        ({"a": jnp.ones(3), "b": None}, ValueError, r"updates\['a'\] has shape \(3,\), but .* has shape \(2,\)"),
        ({"a": jnp.ones((2, 1)), "b": None}, ValueError, r"updates\['a'\] has shape \(2, 1\)"),
        ({"a": jnp.ones(2), "b": jnp.ones(3)}, ValueError, r"updates\['b'\] is one array"),
        ({"a": jnp.ones(2) * 1j, "b": None}, TypeError, r"updates\['a'\] has dtype complex64"),
        ({"a": jnp.arange(2), "b": None}, TypeError, r"updates\['a'\] has dtype int32"),
        ([jnp.ones(2), jnp.ones(3)], ValueError, "has no gradient"),
        (jnp.ones(2), ValueError, "is one array"),
    ],
    ids=str,
)
def test_gradient_tree_that_does_not_match_is_refused_by_path(grads: Any, error: Any, message: str) -> None:
    tx = rmsprop(momentum=0.9, weight_decay=0.1)
    with pytest.raises(error, match=message):
        tx.update(grads, tx.init(TREE), TREE)


def test_params_that_do_not_match_are_refused_by_path() -> None:
    tx = rmsprop()
    with pytest.raises(ValueError, match=r"params\['b'\]\['x'\] has no gradient"):
        tx.update(TREE, tx.init(TREE), {"a": jnp.ones(2), "b": {"x": jnp.ones(3)}})
    with pytest.raises(ValueError, match=r"params\['a'\] has shape \(5,\)"):
        tx.update(TREE, tx.init(TREE), {"a": jnp.ones(5), "b": {"c": jnp.ones(3)}})


class Names(NamedTuple):
    """Two fields, of which one's name begins with the other's."""

    w: Any
    weight: Any


def test_missing_gradient_covers_its_own_path_only() -> None:
    tx = rmsprop()
    with pytest.raises(ValueError, match=r"state\.square_avg\.weight\['x'\] has no gradient"):
        tx.update(Names(None, {}), tx.init(Names(jnp.ones(1), {"x": jnp.ones(1)})))


def test_containers_of_another_type_are_refused() -> None:
    tx = rmsprop()
    with pytest.raises(ValueError, match="is not PyTreeDef"):
        tx.update([jnp.ones(1)], tx.init((jnp.ones(1),)))


def test_state_of_another_optimizer_is_refused() -> None:
    tx = rmsprop()
    for state in (optax.adam(0.1).init(TREE), tx.init(TREE)._asdict(), None):
        with pytest.raises(ValueError, match=f"^state must be the RMSPropState.*got {type(state).__name__}"):
            tx.update(TREE, state, TREE)


@pytest.mark.parametrize(("name", "value"), [("momentum", 0.9), ("centered", True)])
def test_state_of_another_setting_is_refused(name: str, value: Any) -> None:
    without, with_slot = rmsprop(), rmsprop(**{name: value})
    for tx, state in ((with_slot, without.init(TREE)), (without, with_slot.init(TREE))):
        with pytest.raises(ValueError, match=f"a different setting of {name}"):
            tx.update(TREE, state, TREE)


# --- A state that is not what init gives -------------------------------------------------------------------

CENTERED = rmsprop(momentum=0.9, centered=True)
SLOTS = ("square_avg", "grad_avg", "momentum_buffer")


def with_slot(slot: str, change: Callable[[jax.Array], Any]) -> RMSPropState:
    state = CENTERED.init(TREE)
    slots = getattr(state, slot)
    return state._replace(**{slot: {**slots, "b": {"c": change(slots["b"]["c"])}}})


@pytest.mark.parametrize("params", [None, TREE], ids=["without params", "with params"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x[:1], ValueError, r"has shape \(1,\)"),
        (lambda x: x[None], ValueError, r"has shape \(1, 3\)"),
        (lambda x: x.astype(int), TypeError, "has dtype int32"),
        (lambda x: x > 0, TypeError, "has dtype bool"),
        (lambda x: x.astype(complex), TypeError, "has dtype complex64"),
        (lambda x: x.astype(jnp.bfloat16), TypeError, "has dtype bfloat16, but init gives float32"),
        (lambda x: x.astype(jnp.float16), TypeError, "has dtype float16, but init gives float32"),
        (lambda x: None, ValueError, "has no slot for it"),
        (lambda x: optax.MaskedNode(), ValueError, "has no slot for it"),
        (lambda x: {"d": x}, ValueError, "is one array, but"),
    ],
    ids=[
        *("shorter", "rank", "int", "bool", "complex", "bfloat16", "float16", "None", "masked", "deeper"),
    ],
)
@pytest.mark.parametrize("slot", SLOTS)
def test_slot_that_is_not_as_init_makes_it_is_refused_by_path(
    slot: str, change: Any, error: Any, message: str, params: Any
) -> None:
    with pytest.raises(error, match=rf"state\.{slot}\['b'\]\['c'\] .*{message}|updates\['b'\]\['c'\] .*{message}"):
        CENTERED.update(TREE, with_slot(slot, change), params)


@pytest.mark.parametrize("slot", SLOTS)
def test_slot_of_another_width_is_refused_where_the_parameter_tells_it(x64: None, slot: str) -> None:
    params = {"w": jnp.ones(2, jnp.float32)}
    state = CENTERED.init(params)
    wide = state._replace(**{slot: {"w": jnp.ones(2, jnp.float64)}})
    with pytest.raises(TypeError, match=rf"state\.{slot}\['w'\] has dtype float64, but init gives float32"):
        CENTERED.update(params, wide, params)
    narrow = rmsprop(momentum=0.9, centered=True, accumulator_dtype="bfloat16")
    for known_params in (None, params):
        with pytest.raises(TypeError, match=r"state\.square_avg\['w'\] has dtype float32, but init gives bfloat16"):
            narrow.update(params, state, known_params)


def test_cast_state_is_refused() -> None:
    state = optax.tree.cast(CENTERED.init(TREE), jnp.bfloat16)
    with pytest.raises(TypeError, match=r"^state\.step must be an int32 scalar.*got bfloat16.*bfloat16 at 256"):
        CENTERED.update(TREE, state, TREE)
    with pytest.raises(TypeError, match=r"^state\.square_avg\['a'\] has dtype bfloat16, but init gives float32"):
        CENTERED.update(TREE, state._replace(step=jnp.int32(3)), TREE)


@pytest.mark.parametrize(
    "step", [127, np.int64(127), np.int8(127), np.array(127), jnp.int8(127), jnp.uint32(127), jnp.int16(127)], ids=repr
)
def test_integer_step_of_any_width_goes_on_counting(step: Any) -> None:
    tx = rmsprop(lr=lambda count: jnp.where(count == 127, 0.5, 0.0))
    updates, state = tx.update(jnp.ones(1), tx.init(jnp.ones(1))._replace(step=step))
    assert (state.step, state.step.dtype) == (128, jnp.int32)
    np.testing.assert_allclose(updates, -5.0, rtol=1e-6)


@pytest.mark.parametrize("step", [2**31 - 1, 2**40, np.int64(2**40), np.uint32(2**31 + 5)], ids=repr)
def test_step_stays_at_its_largest(step: Any) -> None:
    tx = rmsprop()
    assert tx.update(jnp.ones(1), tx.init(jnp.ones(1))._replace(step=step))[1].step == 2**31 - 1


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (jnp.float32(3), TypeError),
        (jnp.bfloat16(3), TypeError),
        (3.0, TypeError),
        (True, TypeError),
        (jnp.array(True), TypeError),
        (None, TypeError),
        ("3", TypeError),
        (jnp.zeros(2, int), ValueError),
    ],
    ids=repr,
)
def test_step_that_is_no_count_is_refused(step: Any, error: Any) -> None:
    state = rmsprop().init(jnp.ones(1))._replace(step=step)
    with pytest.raises(error, match=r"^state\.step must be an int32 scalar"):
        rmsprop().update(jnp.ones(1), state)


# --- What counts as trained --------------------------------------------------------------------------------

UNTRAINED = {"flag": False, "count": 3, "name": "relu", "function": len, "key": jax.random.key(0)}


def test_leaves_without_a_slot_have_no_update() -> None:
    tx = rmsprop(weight_decay=0.1, momentum=0.9)
    params = {"w": jnp.ones(2), "half": 0.5, **UNTRAINED}
    state = tx.init(params)
    slots = jax.tree.structure({"w": 0, "half": 0, **dict.fromkeys(UNTRAINED)})
    assert [jax.tree.structure(slot) for slot in state[1:]] == [slots, jax.tree.structure(None), slots]
    grads = {"w": jnp.ones(2), "half": None, **dict.fromkeys(UNTRAINED)}
    updates, after = tx.update(grads, state, params)
    assert updates["w"].shape == (2,)
    assert {name for name, update in updates.items() if update is None} == {"half", *UNTRAINED}
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert after.square_avg["half"] == 0


def test_slots_decide_what_is_trained_and_not_the_parameters() -> None:
    tx = rmsprop()
    state = tx.init({"w": jnp.ones(2), "frozen": None})
    for frozen in (False, 1.0, jnp.ones(3), len, {"deeper": jnp.ones(1)}):
        updates, _ = tx.update({"w": jnp.ones(2), "frozen": None}, state, {"w": jnp.ones(2), "frozen": frozen})
        assert updates["frozen"] is None


def test_gradient_of_a_leaf_without_a_slot_is_refused_by_path() -> None:
    tx = rmsprop()
    params = {"w": jnp.ones(2), "n": 3}
    with pytest.raises(ValueError, match=r"^updates\['n'\] is a gradient, but state\.square_avg\['n'\] has no slot"):
        tx.update({"w": jnp.ones(2), "n": jnp.ones(())}, tx.init(params), params)


@jax.tree_util.register_pytree_node_class
class Module(dict):
    """A mapping with a ``__call__``, as Equinox modules have one."""

    def __call__(self, params: Any) -> Any:
        raise AssertionError("a tree is no function")

    def tree_flatten(self) -> Any:
        return tuple(self.values()), tuple(self)

    @classmethod
    def tree_unflatten(cls, names: Any, values: Any) -> Any:
        return cls(zip(names, values, strict=True))


def test_mask_that_is_a_tree_with_a_call_is_a_tree() -> None:
    params = Module(w=jnp.ones(2), b=jnp.ones(2))
    grads = jax.tree.map(jnp.zeros_like, params)
    tx = rmsprop(weight_decay=0.1, weight_decay_mask=Module(w=True, b=False))
    updates, _ = tx.update(grads, tx.init(params), params)
    assert (updates["w"] != 0).all()
    assert (updates["b"] == 0).all()


def test_mask_may_be_a_partial_function() -> None:
    mask = jax.tree_util.Partial(lambda name, params: {key: key == name for key in params}, "b")
    tx = rmsprop(weight_decay=0.1, weight_decay_mask=mask)
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert [name for name, u in updates.items() if (u != 0).any()] == ["b"]


@jax.tree_util.register_pytree_node_class
class Closure:
    """A function as a pytree, as ``equinox.internal.closure_to_pytree`` makes them."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def tree_flatten(self) -> Any:
        return (), self.function

    @classmethod
    def tree_unflatten(cls, function: Any, _: Any) -> Any:
        return cls(function)


def rewritten(function: Any) -> Any:
    """``function`` with every function in its closure replaced by a pytree that does the same."""

    def content(x: Any) -> Any:
        return Closure(rewritten(x)) if isinstance(x, types.FunctionType) else x

    cells = [types.CellType(jax.tree.map(content, cell.cell_contents)) for cell in function.__closure__ or ()]
    clone = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    clone.__kwdefaults__ = function.__kwdefaults__
    return clone


@pytest.mark.parametrize(
    "make",
    [
        lambda: rmsprop(lambda step: 0.1 / (step + 1), momentum=0.9, centered=True, weight_decay=0.1),
        lambda: rmsprop(weight_decay=0.1, weight_decay_mask=lambda params: {"a": True, "b": False}),
        dialects.dreamer,
    ],
)
def test_transformation_survives_that_its_closures_are_rewritten(make: Callable[[], Any]) -> None:
    tx = make()
    init, update = rewritten(tx.init), rewritten(tx.update)
    assert_same(init(TREE), tx.init(TREE))
    assert_same(update(TREE, init(TREE), TREE), tx.update(TREE, tx.init(TREE), TREE))


# --- What a transformation says of itself ------------------------------------------------------------------

SCHEDULE = optax.linear_schedule(0.1, 0.0, 10)


@pytest.mark.parametrize(
    ("tx", "settings"),
    [
        (rmsprop(SCHEDULE, eps=0.5), (SCHEDULE, 0.5, False)),
        (scale_by_rmsprop(eps=0.25, eps_in_sqrt=True), (1.0, 0.25, True)),
        (dialects.optax(0.3, eps=0.125), (0.3, 0.125, True)),
        (dialects.dreamer(), (4e-5, 1e-20, False)),
        (optax.chain(optax.clip(1.0), rmsprop(0.2)), (0.2, 1e-8, False)),
        (optax.named_chain(("scaling", rmsprop(0.2))), (0.2, 1e-8, False)),
        (optax.MultiSteps(rmsprop(0.2), 2).gradient_transformation(), (0.2, 1e-8, False)),
        (optax.apply_if_finite(rmsprop(0.2), 3), (0.2, 1e-8, False)),
        (optax.masked(rmsprop(0.2), True), (0.2, 1e-8, False)),
    ],
)
def test_transformation_tells_what_it_was_built_with(tx: Any, settings: Any) -> None:
    query = SettingsQuery()
    state = tx.init(TREE)
    tx.update(TREE, state, TREE, rmsprop_settings=query)
    answers = [answer.settings for answer in query.answers]  # Optax may call an inner transformation twice
    assert answers
    assert answers == [settings] * len(answers)


def test_injected_numbers_and_parts_tell_what_they_have_now() -> None:
    injected = optax.inject_hyperparams(rmsprop)(lr=0.1)
    tx = optax.partition({"a": injected, "b": dialects.keras(0.3)}, {"a": "a", "b": "b"})
    state = tx.init(TREE)
    state.inner_states["a"].inner_state.hyperparams["lr"] = jnp.float32(0.7)
    query = SettingsQuery()
    updates, _ = tx.update(TREE, state, TREE, rmsprop_settings=query)
    found = {
        jax.tree_util.keystr(path): (float(answer.settings.lr), answer.settings.eps_in_sqrt)
        for answer in query.answers
        for path, _ in jax.tree_util.tree_leaves_with_path(answer.state.square_avg)
    }
    assert found == {"['a']": (np.float32(0.7), False), "['b']['c']": (0.3, True)}
    assert_same(updates, TREE)


def test_weight_decay_without_params_is_refused() -> None:
    tx = rmsprop(weight_decay=0.1)
    with pytest.raises(ValueError, match=r"^params must be given where weight_decay is"):
        tx.update(TREE, tx.init(TREE))


def test_weight_decay_mask_that_does_not_match_is_refused() -> None:
    for mask, error in (({"a": True}, ValueError), ({"a": 1, "b": True}, TypeError)):
        tx = rmsprop(weight_decay=0.1, weight_decay_mask=mask)
        with pytest.raises(error, match=r"^weight_decay_mask(\['a'\])? must be"):
            tx.update(TREE, tx.init(TREE), TREE)


def test_signature_is_the_documented_one() -> None:
    assert list(inspect.signature(rmsprop).parameters) == [
        *("lr", "alpha", "eps", "weight_decay", "momentum", "centered"),
        *("maximize", "weight_decay_mask", "accumulator_dtype"),
    ]


# --- Anything goes ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    grads=hnp.arrays(np.float32, (4, 2), elements=st.floats(-1e4, 1e4, width=32)),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    alpha=st.floats(0, 0.9999),
    eps=st.sampled_from([1e-10, 1e-8, 1e-3, 1.0]),
    momentum=st.sampled_from([0.0, 0.9]),
    centered=st.booleans(),
    bias_correction=st.booleans(),
)
def test_finite_gradients_keep_state_finite_and_averages_not_negative(
    grads: np.ndarray,
    dtype: str,
    alpha: float,
    eps: float,
    momentum: float,
    centered: bool,
    bias_correction: bool,
) -> None:
    tx = scale_by_rmsprop(alpha, eps, momentum, centered, bias_correction=bias_correction)
    param = jnp.zeros(grads.shape[1:], dtype)
    for update, _, state in run(tx, param, grads):
        assert (state.square_avg >= 0).all()
        assert update.shape == param.shape
        assert update.dtype == dtype
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_arrays_as_numbers_cost_no_operation_outside_the_program() -> None:
    """Each one, 1 − alpha for example, would be a dispatch and a transfer of its own."""
    numbers = [jax.device_put(jnp.float32(x)) for x in (0.1, 0.9, 1e-8, 0.1, 0.9)]
    tx, params = rmsprop(*numbers), jnp.ones(3)
    state = tx.init(params)
    tx.update(params, state, params)
    with jax.transfer_guard("disallow"):
        tx.update(params, state, params)


def test_type_in_place_of_an_array_is_a_leaf_without_slot() -> None:
    state = rmsprop().init({"w": jnp.ones(2), "dtype": np.float32})
    assert state.square_avg["dtype"] is None


def test_array_without_gradient_beside_a_number_has_a_zero_update() -> None:
    params, tx = {"w": jnp.ones(2), "v": jnp.ones(3), "half": 0.5}, rmsprop(momentum=0.9)
    updates, _ = tx.update({"w": jnp.ones(2), "v": None, "half": None}, tx.init(params), params)
    np.testing.assert_array_equal(updates["v"], np.zeros(3))


def test_mask_beside_a_number_without_gradient() -> None:
    params = {"w": jnp.ones(2), "half": 0.5, "v": jnp.ones(2)}
    tx = rmsprop(weight_decay=0.1, weight_decay_mask={"w": True, "half": True, "v": False})
    updates, _ = tx.update({"w": jnp.zeros(2), "half": None, "v": jnp.zeros(2)}, tx.init(params), params)
    assert (updates["w"] != 0).all()
    assert (updates["v"] == 0).all()
    assert updates["half"] is None


def test_mask_function_is_not_called_without_params_and_has_to_return_something() -> None:
    params = {"w": jnp.ones(1)}
    tx = rmsprop(weight_decay=0.1, weight_decay_mask=lambda params: dict.fromkeys(params, True))
    with pytest.raises(ValueError, match=r"^params must be given where weight_decay is"):
        tx.update(params, tx.init(params))
    tx = rmsprop(weight_decay=0.1, weight_decay_mask=lambda params: None)
    with pytest.raises(TypeError, match=r"^the function weight_decay_mask returned None; return a tree of bools"):
        tx.update(params, tx.init(params), params)


def test_schedule_of_eps_and_alpha_is_checked_like_a_number() -> None:
    g = jnp.ones(2)
    with pytest.raises(ValueError, match=r"^the schedule of eps must be 0 or at least"):
        rmsprop(eps=lambda s: 1e-40).update(g, rmsprop().init(g))
    with pytest.raises(ValueError, match=r"^the schedule of alpha must be a number in \[0, 1\)"):
        rmsprop(alpha=lambda s: 1.0).update(g, rmsprop().init(g))
