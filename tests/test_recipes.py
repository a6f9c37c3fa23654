"""The numbers of every recipe, written down a second time from the sources, and what surrounds the RMSProp."""

import inspect
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import reference
from rmsprop_jax import RMSPropState, dialects, recipes, transform
from rmsprop_jax.equations import add_momentum, average_steps, centered_average, divide_eps_inside, scale_by_lr

EVERYTHING_DECAYS = {"weight_decay_mask": None}

# Arguments; the learning rate at some steps; the other numbers; eps under the root; start; lr in the buffer.
RECIPES: dict[str, tuple[dict[str, Any], dict[int, float], dict[str, float], bool, float, bool]] = {
    "dreamer_v3": (
        {},
        {0: 0.0, 500: 2e-5, 1000: 4e-5, 9999: 4e-5},
        {"alpha": 0.999, "eps": 1e-20, "momentum": 0.9},
        False,
        0.0,
        False,
    ),
    "cleanba_impala": (
        {"updates": 100},
        {0: 6e-4, 3: 6e-4, 4: 6e-4 * 0.99, 399: 6e-4 * 0.01, 999: 0.0},
        {"alpha": 0.99, "eps": 0.01},
        False,
        0.0,
        False,
    ),
    "impala": (
        {"frames_per_update": 32 * 100 * 4},
        {0: 4.8e-4, 39062: 2.4e-4, 78125: 0.0, 99999: 0.0},
        {"alpha": 0.99, "eps": 0.1},
        True,
        1.0,
        True,
    ),
    "torchbeast": (
        {},
        {0: 4.8e-4, 78: 4.8e-4 * (1 - 0.4992), 157: 0.0},
        {"alpha": 0.99, "eps": 0.01},
        False,
        0.0,
        False,
    ),
    "dqn_nature": ({}, {0: 2.5e-4}, {"alpha": 0.95, "eps": 0.01}, True, 0.0, False),
    "dqn_dopamine": ({}, {0: 2.5e-4}, {"alpha": 0.95, "eps": 1e-5}, True, 1.0, True),
    "a2c": ({}, {0: 7e-4}, {"alpha": 0.99, "eps": 1e-5}, False, 0.0, False),
    "a2c_atari": ({}, {0: 7e-4}, {"alpha": 0.99, "eps": 1e-5}, True, 1.0, False),
    "qmix": ({}, {0: 5e-4}, {"alpha": 0.99, "eps": 1e-5}, False, 0.0, False),
    "dpo": (
        {},
        {0: 5e-7 / 151, 75: 5e-7 * 76 / 151, 150: 5e-7, 999: 5e-7},
        {"alpha": 0.99, "eps": 1e-8},
        False,
        0.0,
        False,
    ),
    "char_rnn": (
        {"steps_per_epoch": 10},
        {0: 2e-3, 99: 2e-3, 100: 2e-3 * 0.97, 110: 2e-3 * 0.97**2},
        {"alpha": 0.95, "eps": 1e-8},
        False,
        0.0,
        False,
    ),
    "graves": ({}, {0: 1e-4}, {"alpha": 0.95, "eps": 1e-4, "momentum": 0.9}, True, 0.0, True),
    "efficientnet": (
        {"batch_size": 2048, "steps_per_epoch": 100, **EVERYTHING_DECAYS},
        {0: 0.0, 250: 0.064, 499: 0.128 * 0.998, 500: 0.128 * 0.97**2, 720: 0.128 * 0.97**3},
        {"alpha": 0.9, "eps": 1e-3, "momentum": 0.9, "weight_decay": 1e-5},
        True,
        1.0,
        True,
    ),
    "mnasnet": (
        {"batch_size": 1024, "steps_per_epoch": 100, **EVERYTHING_DECAYS},
        {0: 0.0, 500: 0.064 * 0.97**2},
        {"alpha": 0.9, "eps": 1e-3, "momentum": 0.9, "weight_decay": 1e-5},
        True,
        1.0,
        True,
    ),
    "mobilenet_v3": (
        {"steps_per_epoch": 10},
        {0: 0.064, 19: 0.064, 20: 0.064 * 0.973, 40: 0.064 * 0.973**2},
        {"alpha": 0.9, "eps": 0.0316, "momentum": 0.9, "weight_decay": 1e-5},
        False,
        0.0,
        False,
    ),
    "inception_v3": (
        {"steps_per_epoch": 10, "momentum": 0.9},
        {0: 0.045, 20: 0.045 * 0.94},
        {"alpha": 0.9, "eps": 1.0, "momentum": 0.9},
        True,
        1.0,
        True,
    ),
    "unet": (
        {},
        {0: 1e-5},
        {"alpha": 0.99, "eps": 1e-8, "momentum": 0.999, "weight_decay": 1e-8},
        False,
        0.0,
        False,
    ),
    "wgan_generator": ({}, {0: 5e-5}, {"alpha": 0.99, "eps": 1e-8}, False, 0.0, False),
    "wgan_critic": ({}, {0: 5e-5}, {"alpha": 0.99, "eps": 1e-8}, False, 0.0, False),
}
CENTERED = {"dqn_nature", "dqn_dopamine", "graves"}


def public_recipes() -> dict[str, Any]:
    members = inspect.getmembers(recipes, inspect.isfunction)
    return {name: f for name, f in members if f.__module__ == recipes.__name__ and not name.startswith("_")}


def test_every_recipe_is_in_the_table() -> None:
    assert set(public_recipes()) == set(RECIPES)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
    """What every RMSProp is built from: equations, numbers, options."""
    calls, original = [], transform.transformation

    def spy(equations: Any, numbers: Any, **options: Any) -> Any:
        calls.append((equations, numbers, options))
        return original(equations, numbers, **options)

    monkeypatch.setattr(transform, "transformation", spy)
    monkeypatch.setattr(dialects, "transformation", spy)
    return calls


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_are_the_published_ones(built: list[tuple[Any, Any, Any]], name: str) -> None:
    arguments, rates, expected, eps_in_sqrt, initial_scale, lr_in_buffer = RECIPES[name]
    getattr(recipes, name)(**arguments)
    ((equations, numbers, options),) = built
    lr = numbers["lr"]
    for step, rate in rates.items():
        np.testing.assert_allclose(lr(jnp.int32(step)) if callable(lr) else lr, rate, rtol=2e-4, atol=1e-12)
    for number in ("alpha", "eps", "momentum", "weight_decay"):
        np.testing.assert_allclose(numbers.get(number, 0.0), expected.get(number, 0.0), rtol=1e-7)
    assert (divide_eps_inside in equations) == eps_in_sqrt
    assert (centered_average in equations) == (name in CENTERED)
    assert options.get("initial_scale", 0.0) == initial_scale
    if numbers.get("momentum"):
        buffer = next(i for i, e in enumerate(equations) if e in (add_momentum, average_steps))
        assert (equations.index(scale_by_lr) < buffer) == lr_in_buffer


CLIPPED = {
    "cleanba_impala": 40.0,
    "torchbeast": 40.0,
    "a2c": 0.5,
    "a2c_atari": 0.5,
    "qmix": 10.0,
    "dpo": 10.0,
    "unet": 1.0,
}


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"dreamer_v3", "char_rnn"}))
def test_global_norm_is_clipped_where_the_source_clips_it(name: str) -> None:
    tx = getattr(recipes, name)(**RECIPES[name][0])
    params = {"a": jnp.zeros(3), "b": jnp.zeros(1)}
    grads = {"a": jnp.full(3, 1000.0), "b": jnp.full(1, 1000.0)}
    _, state = tx.update(grads, tx.init(params), params)
    (inner,) = [
        s for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, RMSPropState)) if isinstance(s, RMSPropState)
    ]
    start, alpha = RECIPES[name][4], RECIPES[name][2]["alpha"]
    g = CLIPPED[name] / 2 if name in CLIPPED else 1000.0
    second_moment = inner.square_avg["a"] + (0 if inner.grad_avg is None else inner.grad_avg["a"] ** 2)
    np.testing.assert_allclose(second_moment, alpha * start + (1 - alpha) * g**2, rtol=1e-5)


def test_char_rnn_clips_each_entry() -> None:
    tx = recipes.char_rnn(steps_per_epoch=10)
    grads = jnp.array([100.0, -0.1])
    _, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(state[1].square_avg, 0.05 * np.array([5.0, 0.1]) ** 2, rtol=1e-5)


def test_dreamer_clips_each_array_by_the_norm_of_its_parameter() -> None:
    tx = recipes.dreamer_v3()
    params = {"long": jnp.full(4, 2.0), "tiny": jnp.full(4, 1e-9), "calm": jnp.full(4, 2.0)}
    grads = {"long": jnp.full(4, 100.0), "tiny": jnp.full(4, 1.0), "calm": jnp.full(4, 1e-3)}
    _, state = tx.update(grads, tx.init(params), params)
    seen = jax.tree.map(lambda v: np.sqrt(np.asarray(v)), state[1].square_avg)  # corrected: the gradient's size
    np.testing.assert_allclose(seen["long"], 0.3 * 4.0 / 2, rtol=1e-5)  # 0.3 of a norm of 4, spread over 4 entries
    np.testing.assert_allclose(seen["tiny"], 0.3 * 1e-3 / 2, rtol=1e-5)
    np.testing.assert_allclose(seen["calm"], 1e-3, rtol=1e-5)


def test_first_update_of_dreamer_is_zero() -> None:
    tx = recipes.dreamer_v3()
    params = jnp.ones(3)
    update, _ = tx.update(jnp.ones(3), tx.init(params), params)
    np.testing.assert_array_equal(update, np.zeros(3))


def test_critic_of_wgan_stays_within_its_box() -> None:
    tx = recipes.wgan_critic()
    params = jnp.array([0.0099, -0.0099, 0.5, 0.0])
    updates, _ = tx.update(jnp.array([-1.0, 1.0, 1.0, 1.0]), tx.init(params), params)
    np.testing.assert_allclose(optax.apply_updates(params, updates), [0.01, -0.01, 0.01, -5e-4], rtol=1e-5)


def test_efficientnet_decays_before_the_average_and_where_the_mask_says() -> None:
    tx = recipes.efficientnet(batch_size=256, steps_per_epoch=10, weight_decay_mask={"w": True, "norm": False})
    params = {"w": jnp.full(2, 1e5), "norm": jnp.full(2, 1e5)}
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(state.square_avg["w"], 0.9 + 0.1 * 1.0, rtol=1e-5)  # g = 1e-5 · 1e5
    np.testing.assert_allclose(state.square_avg["norm"], 0.9, rtol=1e-5)


def test_graves_is_the_published_rule(x64: None) -> None:
    grads = np.random.default_rng(0).normal(size=(20, 5))
    tx, params = recipes.graves(), jnp.zeros(5)
    state = tx.init(params)
    expected = reference.rmsprop(
        np.zeros(5), grads, lr=1e-4, alpha=0.95, eps=1e-4, momentum=0.9, centered=True, eps_in_sqrt=True
    )
    for g, want in zip(grads, expected, strict=True):
        updates, state = tx.update(jnp.asarray(g), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, want.param, rtol=1e-11)


# --- Numbers ---------------------------------------------------------------------------------------------

LAST_STEP = 2**31 - 1  # where the counter stops

# The learning rates that are no constants once more, in Python: from the arguments and the step.
RATES: dict[str, Callable[..., float]] = {
    "dreamer_v3": lambda step, lr=4e-5, warmup=1000: lr * min(1, step / warmup),
    "cleanba_impala": lambda step, updates: 6e-4 * max(0, 1 - step // 4 / updates),
    "impala": lambda step, frames_per_update, total_frames=1e9: (
        4.8e-4 * (1 - min(step * frames_per_update, total_frames) / total_frames)
    ),
    "torchbeast": lambda step, total_steps=100_000, unroll_length=80, batch_size=8: (
        4.8e-4 * (1 - min(step * unroll_length * batch_size, total_steps) / total_steps)
    ),
    "dpo": lambda step, lr=5e-7, warmup=150: lr * min(1, (step + 1) / (warmup + 1)),
    "char_rnn": lambda step, steps_per_epoch: 2e-3 * 0.97 ** max(0, step // steps_per_epoch - 9),
    "efficientnet": lambda step, batch_size, steps_per_epoch, weight_decay_mask: (
        0.016
        * (batch_size / 256)
        * (step / (5 * steps_per_epoch) if step < 5 * steps_per_epoch else 0.97 ** (step * 5 // (12 * steps_per_epoch)))
    ),
    "mobilenet_v3": lambda step, steps_per_epoch: 0.064 * 0.973 ** (step // (2 * steps_per_epoch)),
    "inception_v3": lambda step, steps_per_epoch, momentum: 0.045 * 0.94 ** (step // (2 * steps_per_epoch)),
}
RATES["mnasnet"] = RATES["efficientnet"]


def counts(name: str) -> list[str]:
    """The arguments of a recipe that are whole numbers."""
    parameters = inspect.signature(getattr(recipes, name)).parameters.values()
    return [parameter.name for parameter in parameters if parameter.annotation is int]


COUNTED = [(name, count) for name in RECIPES for count in counts(name)]
EDGES = (0, 1, 7, LAST_STEP - 1, LAST_STEP)


def schedule(built: list[tuple[Any, Any, Any]], name: str, **arguments: Any) -> Callable[[int], float]:
    """The learning rate of a recipe by step, as its RMSProp reads it."""
    getattr(recipes, name)(**RECIPES[name][0] | arguments)
    lr = built.pop()[1]["lr"]
    return lambda step: float(lr(jnp.int32(step)))


def test_every_schedule_is_in_the_table(built: list[tuple[Any, Any, Any]]) -> None:
    for name in RECIPES:
        getattr(recipes, name)(**RECIPES[name][0])
    assert {name for name, (_, numbers, _) in zip(RECIPES, built, strict=True) if callable(numbers["lr"])} == set(RATES)


@pytest.mark.parametrize("name", RATES)
def test_schedule_is_right_up_to_the_last_step(built: list[tuple[Any, Any, Any]], name: str) -> None:
    arguments, rate = RECIPES[name][0], schedule(built, name)
    for step in EDGES:
        np.testing.assert_allclose(rate(step), RATES[name](step, **arguments), rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize(("name", "count"), COUNTED)
@pytest.mark.parametrize("value", [2**31 - 1, 2**30, 20_000])
def test_schedule_is_right_for_counts_of_any_size(
    built: list[tuple[Any, Any, Any]], name: str, count: str, value: int
) -> None:
    # total_frames and total_steps have to be as large.
    arguments = RECIPES[name][0] | {count: value} | {"impala": {"total_frames": 1e15}}.get(name, {})
    if name == "torchbeast":
        arguments |= {"total_steps": LAST_STEP} | ({} if count == "total_steps" else {"unroll_length": 1, count: value})
        arguments |= {"batch_size": 1} if count == "unroll_length" else {}
    rate = schedule(built, name, **arguments)
    for step in EDGES:
        np.testing.assert_allclose(rate(step), RATES[name](step, **arguments), rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize(("name", "count"), COUNTED)
def test_count_has_no_width(built: list[tuple[Any, Any, Any]], name: str, count: str) -> None:
    """``np.int16(20000)`` doubled is negative, and ``np.int8(127)`` plus 1."""
    others = {"torchbeast": {"unroll_length": 1, "batch_size": 1, "total_steps": 20_000}}.get(name, {})
    for value in (np.int8(127), np.uint8(200), np.int16(20_000), np.array(20_000, np.int16), jnp.int16(20_000)):
        expected = schedule(built, name, **others | {count: int(value)})
        given = schedule(built, name, **others | {count: value})
        for step in (*EDGES, 1000, 100_000):
            assert given(step) == expected(step)


def test_product_of_counts_has_no_width(built: list[tuple[Any, Any, Any]]) -> None:
    """100 · 100 is negative in int8."""
    counts = {"unroll_length": 100, "batch_size": 100, "total_steps": 32_000}
    expected = schedule(built, "torchbeast", **counts)
    given = schedule(
        built, "torchbeast", **{name: np.min_scalar_type(-count).type(count) for name, count in counts.items()}
    )
    assert [given(step) for step in range(5)] == [expected(step) for step in range(5)]


@pytest.mark.parametrize(("name", "count"), COUNTED)
@pytest.mark.parametrize("value", [0, -1, 2**31, 10**400, 2.5, 3.0, None, True, "3", jnp.float32(3), np.array([3])])
def test_count_that_is_no_count_is_refused(name: str, count: str, value: Any) -> None:
    error = ValueError if type(value) is int else TypeError
    with pytest.raises(error, match=rf"^{count} must be a whole number from 1 to 2³¹ − 1, got ") as raised:
        getattr(recipes, name)(**RECIPES[name][0] | {count: value})
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(("name", "count"), COUNTED)
def test_traced_count_is_refused(name: str, count: str) -> None:
    with pytest.raises(TypeError, match=rf"^{count} must be .* that is known when the transformation is built"):
        jax.jit(lambda value: getattr(recipes, name)(**RECIPES[name][0] | {count: value}) and value)(3)


@pytest.mark.parametrize("total", [0, 12_799, np.float32(12_799), jnp.array(5.0), math.inf])
def test_total_that_ends_before_the_first_update_does_is_refused(total: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^total_frames must be finite and at least frames_per_update, the 12800 that"
    ):
        recipes.impala(12_800, total_frames=total)
    with pytest.raises(
        ValueError, match=r"^total_steps must be finite and at least unroll_length · batch_size, the 640 "
    ):
        recipes.torchbeast(total_steps=639)
    recipes.impala(12_800, total_frames=12_800)
    recipes.torchbeast(total_steps=640)


def test_learning_rate_of_impala_falls_with_the_frames_of_each_update(built: list[tuple[Any, Any, Any]]) -> None:
    """20 frames are used by the third update of 7, not by the second."""
    rate = schedule(built, "impala", frames_per_update=7, total_frames=20)
    np.testing.assert_allclose([rate(step) for step in range(4)], [4.8e-4, 3.12e-4, 1.44e-4, 0.0], rtol=1e-6)


@pytest.mark.parametrize("total", [-1, math.nan, None, "1e9", True])
def test_total_that_is_no_number_is_refused(total: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^total_frames must be a number ≥ 0"):
        recipes.impala(12_800, total_frames=total)


@pytest.mark.parametrize("name", ["dreamer_v3", "dpo"])
def test_rate_may_be_any_number_or_scalar_array(built: list[tuple[Any, Any, Any]], name: str) -> None:
    rows = [(0.25, np.float16(0.25)), (0.25, Fraction(1, 4)), (0.25, Decimal("0.25")), (0.25, np.array(0.25)), (1.0, 1)]
    rows += [(0.25, jnp.bfloat16(0.25)), (0.25, jnp.float32(0.25))]
    with jax.numpy_dtype_promotion("strict"):
        for expected, given in rows:
            for step in (*EDGES, 1000):
                assert schedule(built, name, lr=given)(step) == schedule(built, name, lr=expected)(step)
    assert jax.jit(lambda lr: getattr(recipes, name)(lr=lr) and built.pop()[1]["lr"](jnp.int32(2000)))(0.5) == 0.5
    with pytest.raises(ValueError, match=r"^lr must be a number ≥ 0, got -1"):
        getattr(recipes, name)(lr=-1)


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: recipes.dpo(learning_rate=1e-6), r"dpo has no argument learning_rate; did you mean lr=1e-06\?"),
        (lambda: recipes.char_rnn(epochs=3), "char_rnn has no argument epochs; it takes steps_per_epoch"),
        (lambda: recipes.a2c(lr=1e-3), "a2c has no argument lr; it takes none"),
        (lambda: recipes.a2c({"w": jnp.ones(3)}), "a2c takes no parameters, got .*go to init and update"),
        (lambda: recipes.dpo({"w": jnp.ones(3)}), "lr must be a number ≥ 0 .*go to init and update"),
    ],
)
def test_recipe_says_what_it_takes(call: Callable[[], Any], hint: str) -> None:
    with pytest.raises(TypeError, match=f"^{hint}"):
        call()


# --- Dtypes, and leaves that are no arrays -----------------------------------------------------------------


# One recipe for each thing that stands around an RMSProp.
SURROUNDED = ("dreamer_v3", "a2c", "char_rnn", "wgan_critic", "mnasnet")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in RECIPES for dtype in ("bfloat16", "complex64")]
    + [(name, dtype) for name in SURROUNDED for dtype in ("float16", "float8_e4m3fn")],
)
def test_recipe_takes_every_dtype_under_strict_promotion(name: str, dtype: str) -> None:
    """A gradient of 300 is infinitely long in float16: its square is above 65504."""
    params = {"w": jnp.full(3, 0.5, dtype), "frozen": jnp.zeros(2, dtype), "flag": True, "f": np.tanh, "none": None}
    grads = {"w": jnp.full(3, 300, dtype), "frozen": None, "flag": None, "f": None, "none": None}
    with jax.numpy_dtype_promotion("strict"):
        tx = getattr(recipes, name)(**RECIPES[name][0])
        state = tx.init(params)
        for _ in range(2):  # the first rate of a warm-up is 0
            updates, state = tx.update(grads, state, params)
    assert updates["w"].dtype == dtype
    assert {key for key, update in updates.items() if update is None} == {"flag", "f", "none"}
    np.testing.assert_array_equal(updates["frozen"].astype(np.complex64), np.zeros(2))
    w = updates["w"].astype(np.complex64)
    assert np.isfinite(w).all()
    if dtype != "float8_e4m3fn":  # whose smallest number is 0.002
        assert (w.real < 0).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def seen_by(tx: optax.GradientTransformation, grads: Any, params: Any) -> Any:
    """What passes the first of a chain, which keeps no state."""
    return tx.update(grads, optax.EmptyState(), params)[0]


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 1e30), ("float32", 300), ("float16", 300), ("bfloat16", 1e30), ("float32", 1e-30)]
)
def test_norms_do_not_overflow(dtype: str, size: float) -> None:
    grads = {"a": jnp.full((2, 2), size, dtype), "b": jnp.full(5, -size, dtype)}
    rtol = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
    together = seen_by(recipes._clip_by_global_norm(0.5), grads, None)
    for key, sign in (("a", 1), ("b", -1)):
        assert together[key].dtype == dtype
        np.testing.assert_allclose(np.asarray(together[key], np.float64), sign * min(size, 0.5 / 3), rtol=rtol)
    alone = seen_by(recipes._clip_by_parameter_norm(0.3, smallest=1e-3), grads, grads)
    np.testing.assert_allclose(np.asarray(alone["a"], np.float64), min(size, max(0.3 * size, 0.3e-3 / 2)), rtol=rtol)


def test_norm_of_leaves_of_many_dtypes_is_one(x64: None) -> None:
    grads = {
        "a": jnp.full(4, 3.0, jnp.float64),
        "b": jnp.full(4, 4.0, jnp.bfloat16),
        "c": jnp.full(1, 12j, jnp.complex64),
    }
    with jax.numpy_dtype_promotion("strict"):
        clipped = seen_by(recipes._clip_by_global_norm(1.0), grads, None)
    norm = math.sqrt(4 * 9 + 4 * 16 + 144)
    np.testing.assert_allclose(clipped["a"], 3 / norm, rtol=1e-14)
    np.testing.assert_allclose(clipped["b"].astype(np.float64), 4 / norm, rtol=1e-2)
    np.testing.assert_allclose(clipped["c"], 12j / norm, rtol=1e-6)
    clipped = seen_by(recipes._clip_by_global_norm(1.0), grads | {"d": jnp.float32(1e30)}, None)
    np.testing.assert_allclose(clipped["d"], 1.0, rtol=1e-6)


def test_global_norm_is_that_of_optax_and_has_derivatives() -> None:
    rng = np.random.default_rng(0)

    @jax.jit
    def both(grads: Any) -> Any:
        ours, pull_back = jax.vjp(lambda g: seen_by(recipes._clip_by_global_norm(0.5), g, None), grads)
        return ours, seen_by(optax.clip_by_global_norm(0.5), grads, None), pull_back(grads)

    for size in (0.0, 1e-3, 1.0, 1e3):
        grads = {"a": jnp.asarray(size * rng.normal(size=(3, 4)), jnp.float32), "b": jnp.float32(size)}
        ours, theirs, slopes = both(grads)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-7), ours, theirs)
        assert all(np.isfinite(slope).all() for slope in jax.tree.leaves(slopes))
    assert seen_by(recipes._clip_by_global_norm(0.5), {}, None) == {}


@pytest.mark.parametrize("name", ["a2c", "dreamer_v3", "wgan_critic", "char_rnn"])
def test_zero_gradient_makes_no_nan_on_the_way(name: str) -> None:
    tx = getattr(recipes, name)(**RECIPES[name][0])
    params = jnp.zeros(3)
    with jax.debug_nans(True):
        updates, _ = tx.update(jnp.zeros(3), tx.init(params), params)
    np.testing.assert_array_equal(updates, np.zeros(3))


def test_complex_weights_are_clipped_and_held_as_two_real_ones() -> None:
    z = jnp.array([0.5 - 0.001j, -0.02 + 7.0j], jnp.complex64)
    held = z + seen_by(recipes._hold_weights_within(0.01), jnp.zeros_like(z), z)
    # Beside 7, a float32 knows 0.01 to 2.4e-7.
    np.testing.assert_allclose(held, [0.01 - 0.001j, -0.01 + 0.01j], atol=5e-7)
    np.testing.assert_allclose(seen_by(recipes._clip_entries(5.0), z, None), [0.5 - 0.001j, -0.02 + 5.0j], rtol=1e-6)


def test_weights_are_held_in_their_own_precision(x64: None) -> None:
    """Gradients, and so updates, may be narrower."""
    with jax.numpy_dtype_promotion("strict"):
        held = seen_by(recipes._hold_weights_within(0.01), jnp.full(1, 0.5, jnp.float32), jnp.full(1, 0.5, jnp.float64))
    np.testing.assert_allclose(held, [-0.49], rtol=1e-6)
    params, updates = jnp.array([0.5, 0.0099], jnp.float32), jnp.array([-0.1, 0.01], jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        held = seen_by(recipes._hold_weights_within(0.01), updates, params)
    assert held.dtype == jnp.bfloat16
    np.testing.assert_allclose(params + held.astype(np.float32), [0.01, 0.01], atol=0.49 * 2**-8)


def test_decay_of_efficientnet_is_not_lost_in_half_precision() -> None:
    """Beside a gradient of 1, bfloat16 does not see 1e-5 · p; the average does."""
    tx = recipes.efficientnet(batch_size=256, steps_per_epoch=10, weight_decay_mask=None)
    params, grads = jnp.full(2, 100.0, jnp.bfloat16), jnp.ones(2, jnp.bfloat16)
    _, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(state.square_avg, 0.9 + 0.1 * 1.001**2, rtol=1e-6)


def test_what_is_no_gradient_is_reported_by_the_rmsprop() -> None:
    for tx in (recipes.a2c(), recipes.char_rnn(10), recipes.dreamer_v3(), recipes.wgan_critic()):
        params = {"w": jnp.ones(2)}
        with pytest.raises(TypeError, match=r"^updates\['w'\] has dtype int32, but .* has dtype float32"):
            tx.update({"w": jnp.ones(2, jnp.int32)}, tx.init(params), params)


def test_params_of_another_structure_are_named() -> None:
    tx, params = recipes.dreamer_v3(), {"w": jnp.ones(2), "b": jnp.ones(1)}
    with pytest.raises(ValueError, match=r"^updates must have the structure of params, but they differ in ..'b'.."):
        tx.update(params, tx.init(params), {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"^updates must have the structure of params, but they differ in .their cont"):
        tx.update([jnp.ones(2)], tx.init([jnp.ones(2)]), (jnp.ones(2),))


@pytest.mark.parametrize("name", ["dreamer_v3", "wgan_critic"])
def test_recipe_that_needs_params_says_so(name: str) -> None:
    tx = getattr(recipes, name)()
    with pytest.raises(ValueError, match=r"^params must be given"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_inside_jit(name: str) -> None:
    tx = getattr(recipes, name)(**RECIPES[name][0])
    params = {"w": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.ones(3)}

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("strict"):
        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state)
    assert step._cache_size() == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_names_its_source(name: str) -> None:
    assert "\n    Source: " in (inspect.getsource(getattr(recipes, name)))
