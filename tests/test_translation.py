"""Translation of one dialect into another where numbers are arrays, tracers or schedules, and what it refuses."""

import functools
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import RMSPropState, dialects, recorder, rmsprop, translation
from rmsprop_jax.translation import translate

DIALECTS = tuple(name for name in translation.DIALECTS if name not in ("dqn", "dreamer"))
PAIRS = [(source, target) for source in DIALECTS for target in DIALECTS if "torch" in (source, target)]
# Exact in every dtype, and so are the square and the root of eps.
WITHIN = ", which is within 1% of 1 after {} steps"
NUMBERS = {"lr": 0.25, "alpha": 0.5, "eps": 0.0625, "momentum": 0.5}


def setting(source: str, **numbers: Any) -> dict[str, Any]:
    """In the words of ``source``."""
    names = translation.DIALECTS[source].names
    return {names[name]: number for name, number in (NUMBERS | numbers).items()}


def run(tx: optax.GradientTransformation, steps: int = 3) -> np.ndarray:
    state, updates = tx.init(jnp.zeros(3)), []
    for g in np.random.default_rng(0).normal(size=(steps, 3)).astype(np.float32):
        update, state = tx.update(jnp.asarray(g), state)
        updates.append(update)
    return np.stack(updates)


def constant(number: float, step: Any) -> float:
    return number


# --- Numbers of any kind -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("kind", ["schedule", "ndarray", "array"])
def test_schedules_and_arrays_are_translated_as_the_number_that_they_hold(source: str, target: str, kind: str) -> None:
    make = {
        "schedule": lambda number: functools.partial(constant, number),
        "ndarray": lambda number: np.array(number, np.float16) if number == 0.25 else np.array(number),
        "array": lambda number: jnp.array(number, jnp.float32),
    }[kind]
    expected = translate(source, target, **setting(source))
    port = translate(source, target, **setting(source, **{name: make(x) for name, x in NUMBERS.items()}))
    np.testing.assert_array_equal(run(port.build()), run(expected.build()))
    assert len(port.notes) >= len(expected.notes)
    names = translation.DIALECTS[target].names
    for name in NUMBERS:
        given = port.arguments[names[name]]
        value = given(jnp.int32(0)) if kind == "schedule" else given
        assert float(value) == expected.arguments[names[name]]


@pytest.mark.parametrize(("source", "target"), [("torch", "keras"), ("keras", "torch")])
def test_tracers_are_translated_inside_jit(source: str, target: str) -> None:
    @jax.jit
    def first_update(numbers: dict[str, jax.Array]) -> jax.Array:
        tx = translate(source, target, **setting(source, **numbers)).build()
        return tx.update(jnp.ones(3), tx.init(jnp.zeros(3)))[0]

    expected = translate(source, target, **setting(source)).build()
    got = first_update({name: jnp.float32(number) for name, number in NUMBERS.items()})
    np.testing.assert_allclose(got, expected.update(jnp.ones(3), expected.init(jnp.zeros(3)))[0], rtol=1e-6)


def test_schedule_of_eps_becomes_the_schedule_of_its_square_and_of_its_root() -> None:
    def eps(step: Any) -> Any:
        return 0.25 * (1 + step)

    square = translate("torch", "keras", eps=eps).arguments["epsilon"]
    root = translate("keras", "torch", epsilon=eps).arguments["eps"]
    assert [float(square(jnp.int32(step))) for step in (0, 1, 3)] == [0.0625, 0.25, 1.0]
    assert [float(root(jnp.int32(step))) for step in (0, 3, 15)] == [0.5, 1.0, 2.0]
    assert translate("keras", "tensorflow", learning_rate=0.1, epsilon=eps).arguments["epsilon"] is eps


@pytest.mark.parametrize(("source", "target", "name"), [("torch", "keras", "eps"), ("keras", "torch", "epsilon")])
@pytest.mark.parametrize("wrong", [-1.0, math.nan, "0.1", None])
def test_schedule_of_eps_is_checked_before_it_is_squared(source: str, target: str, name: str, wrong: Any) -> None:
    port = translate(source, target, **{name: lambda step: wrong})
    with pytest.raises((TypeError, ValueError), match=rf"^the schedule of {name} must be a number ≥ 0"):
        run(port.build())


def test_translated_schedule_can_be_pickled() -> None:
    port = translate("torch", "keras", eps=functools.partial(constant, 0.5))
    assert pickle.loads(pickle.dumps(port)).arguments["epsilon"](0) == 0.25


@pytest.mark.parametrize(
    "eps", [np.float16(1e-4), np.array(1e-4, np.float16), jnp.float16(1e-4), jnp.bfloat16(1e-4), Fraction(1, 10_000)]
)
def test_square_of_eps_is_not_rounded_to_half_precision(eps: Any) -> None:
    """In float16 the square of 1e-4 is 0."""
    port = translate("torch", "keras", eps=eps)
    np.testing.assert_allclose(float(port.arguments["epsilon"]), float(eps) ** 2, rtol=1e-6)
    traced = jax.jit(lambda x: translate("torch", "keras", eps=x).arguments["epsilon"])(
        eps if hasattr(eps, "dtype") else float(eps)
    )
    np.testing.assert_allclose(traced, float(eps) ** 2, rtol=1e-6)


def test_integer_array_has_a_square_and_a_root() -> None:
    with jax.numpy_dtype_promotion("strict"):
        assert translate("torch", "keras", eps=jnp.int32(4)).arguments["epsilon"] == 16
        assert translate("keras", "torch", epsilon=jnp.int32(4)).arguments["eps"] == 2


# --- eps whose square does not exist -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [float, np.array, jnp.array, lambda number: lambda step: number])
@pytest.mark.parametrize("eps", [1e-20, 1e20])
def test_eps_whose_square_float32_cannot_hold_is_refused(make: Callable[[float], Any], eps: float) -> None:
    with pytest.raises(
        ValueError, match=r"^eps must be 0 or from 1.1e-19 to 1.8e19 where its square goes under the root"
    ):
        run(translate("torch", "keras", eps=make(eps)).build())
    with pytest.raises(ValueError, match=r"^eps must be 0 or from"):
        translate("optax", "keras", learning_rate=0.1, eps=eps, eps_in_sqrt=False)


def test_edges_of_eps_are_translated() -> None:
    for eps in (0.0, 1.1e-19, 1.8e19, math.inf):
        assert translate("torch", "keras", eps=eps).arguments["epsilon"] == eps**2
    assert translate("keras", "torch", epsilon=1.2e-38).arguments["eps"] == 1.2e-38**0.5


def test_eps_that_is_known_later_has_a_note() -> None:
    note = "eps is not known yet: below 1.1e-19 its square, which is under the root, is 0 in float32"
    assert note in translate("torch", "keras", eps=lambda step: 0.1).notes
    assert note not in translate("torch", "keras", eps=jnp.float32(0.1)).notes
    assert note not in translate("keras", "torch", epsilon=lambda step: 0.1).notes
    notes = []
    jax.jit(lambda x: notes.extend(translate("torch", "keras", eps=x).notes) or x)(0.1)
    assert note in notes


# --- Notes ---------------------------------------------------------------------------------------------------


def start_of(port: translation.Translation) -> str:
    (note,) = [note for note in port.notes if "starts" in note]
    return note


def test_note_on_the_start_holds_for_any_alpha() -> None:
    known = start_of(translate("torch", "timm", alpha=0.9))
    assert known.endswith("the averages differ by alphaᵗ, which is 1% after 44 steps; compare that with v")
    assert start_of(translate("torch", "timm", alpha=np.float32(0.9))).endswith(
        "which is 1% after 44 steps; compare that with v"
    )
    assert start_of(translate("torch", "timm", alpha=jnp.float32(0.9))) == known
    assert "alphaᵗ, which is 1% after 1 step;" in start_of(translate("torch", "timm", alpha=0))
    scheduled = start_of(translate("torch", "timm", alpha=lambda step: 0.9))
    assert scheduled.endswith("the averages differ by the product of all alphas so far; compare that with v")
    traced = []
    jax.jit(lambda x: traced.append(start_of(translate("torch", "timm", alpha=x))) or x)(0.9)
    assert traced[0].endswith("the averages differ by alphaᵗ; compare that with v")


def test_note_on_the_start_holds_for_any_start() -> None:
    def from_optax(start: Any) -> translation.Translation:
        return translate("optax", "keras", learning_rate=0.1, initial_scale=start)

    for start in (0.5, np.array(0.5), jnp.array(0.5), Fraction(1, 2)):
        assert start_of(from_optax(start)).startswith(
            "the average starts from 0, not 0.5: the averages differ by 0.5 · "
        )
    for start in (0, np.array(0.0), jnp.array(0.0)):
        assert from_optax(start).notes == ()
    traced = []
    jax.jit(lambda x: traced.append(start_of(from_optax(x))) or x)(0.5)
    assert traced[0].startswith(
        "the average starts from a different value: they differ by alphaᵗ times the difference, which is 1%"
    )
    same = translate("optax", "optax", learning_rate=0.1, initial_scale=jnp.array(0.5))
    assert same.notes == ()


@pytest.mark.parametrize("momentum", [0.9, np.array(0.0), jnp.array(0.0), lambda step: 0.9])
def test_buffer_has_a_note_where_there_is_one(momentum: Any) -> None:
    """An array has a buffer, whatever it holds now."""
    note = "the learning rate is in the momentum buffer: the same as long as it is constant"
    assert note in translate("torch", "keras", momentum=momentum).notes
    for nothing in (0, 0.0, np.float32(0), Fraction(0)):
        assert note not in translate("torch", "keras", momentum=nothing).notes
    assert note not in translate("torch", "stable_baselines3", momentum=momentum).notes


@pytest.mark.parametrize("decay", [0.1, np.array(0.1), jnp.array(0.1), lambda step: 0.1, lambda step: 0.0])
def test_decay_is_translated_or_refused(decay: Any) -> None:
    assert translate("torch", "timm", weight_decay=decay).arguments["weight_decay"] is not None
    for target in ("keras", "tensorflow", "optax"):
        with pytest.raises(
            ValueError, match=rf"^weight_decay must be 0, since target {target} has no L2 weight decay, got"
        ):
            translate("torch", target, weight_decay=decay)
        for nothing in (0, np.array(0.0), jnp.array(0.0)):
            translate("torch", target, weight_decay=nothing)
    with pytest.raises(ValueError, match=r"^weight_decay must be 0, since target keras"):
        jax.jit(lambda x: translate("torch", "keras", weight_decay=x) and x)(0.1)


# --- What is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: translate("keras", "torch", lr=0.1),
            r"keras has no argument lr; did you mean learning_rate=0.1\?",
        ),
        (
            lambda: translate("torch", "keras", learning_rate=0.1),
            r"rmsprop has no argument .*did you mean lr=0.1",
        ),
        (
            lambda: translate("tensorflow", "torch", learning_rate=0.1, alpha=0.9),
            r".*did you mean decay=0.9\?",
        ),
        (
            lambda: translate("torch", "timm", weight_decay_mask={"w" * 500: True}),
            "translate does not know weight_",
        ),
        (lambda: translate("torch", "timm", alpha=np.float16(0.9)), "alpha must not be float16"),
    ],
)
def test_wrong_argument_has_a_hint(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}") as raised:
        call()
    assert len(str(raised.value)) < 400


def test_what_the_target_does_not_take_is_refused_when_translated() -> None:
    translate("torch", "keras", alpha=0.99999999)
    with pytest.raises(ValueError, match=r"^decay in float32 must be a number in \[0, 1\), got 1"):
        translate("torch", "tensorflow", alpha=0.99999999)


def test_what_only_timm_has_is_carried_to_timm() -> None:
    given = dict(caution=True, corrected_weight_decay=True, decoupled_decay=True, weight_decay=0.1, momentum=0.5)
    port = translate("timm", "timm", lr=lambda step: 0.1, max_lr_snapshot=0.25, **given)
    assert port.notes == ()
    assert port.arguments | given | {"max_lr_snapshot": 0.25} == port.arguments
    structure = translation.structure_of(port.build())
    assert [structure[name] for name in ("caution", "corrected_weight_decay", "decoupled_decay")] == [True] * 3
    assert translate("torch", "timm", momentum=0.5).arguments["caution"] is False
    assert "max_lr_snapshot" not in str(translate("torch", "timm"))
    plain = translation.structure_of(dialects.timm(weight_decay=0.1, momentum=0.5, decoupled_decay=True))
    assert [plain[name] for name in ("caution", "corrected_weight_decay", "decoupled_decay")] == [False, False, True]


@pytest.mark.parametrize("target", ["torch", "tensorflow", "keras", "stable_baselines3", "optax"])
def test_caution_does_not_carry_over(target: str) -> None:
    with pytest.raises(ValueError, match=rf"^caution must be False, since target {target} has no caution, got True"):
        translate("timm", target, caution=True, momentum=0.5)
    translate("timm", target, caution=True)  # it says nothing without momentum


def test_corrected_decay_does_not_carry_over_but_its_schedule_does() -> None:
    def lr(step: Any) -> Any:
        return 0.25 / (1 + step)

    given = dict(lr=lr, decoupled_decay=True, max_lr_snapshot=0.25)
    with pytest.raises(
        ValueError, match=r"^corrected_weight_decay must be False, since target keras .* schedule of it"
    ):
        translate("timm", "keras", weight_decay=0.5, corrected_weight_decay=True, **given)
    translate("timm", "keras", corrected_weight_decay=True, **given)
    keras = translate("timm", "keras", weight_decay=lambda step: 0.5 * lr(step) / 0.25, **given).build()
    timm = dialects.timm(weight_decay=0.5, corrected_weight_decay=True, **given)
    params, still = jnp.ones(2), jnp.zeros(2)
    ours, theirs = timm.init(params), keras.init(params)
    for _ in range(3):
        updates, ours = timm.update(still, ours, params)
        expected, theirs = keras.update(still, theirs, params)
        np.testing.assert_allclose(updates, expected, rtol=1e-6)
        assert (updates < 0).all()


# --- The ratio of steps --------------------------------------------------------------------------------------


def test_ratio_reads_the_schedule_of_eps_as_the_update_does() -> None:
    def eps(step: Any) -> Any:
        return 0.5 ** (1.0 + step)

    port = translate("torch", "keras", lr=0.25, alpha=0.5, eps=eps)
    before = rmsprop(lr=0.25, alpha=0.5, eps=eps)
    grads = np.ones((4, 1), np.float32)

    def updates(tx: optax.GradientTransformation) -> np.ndarray:
        state, got = tx.init(jnp.zeros(1)), []
        for g in grads:
            update, state = tx.update(jnp.asarray(g), state)
            got.append(update[0])
        return np.array(got)

    ratios = port.step_ratio(1.0, np.arange(1, 5))
    np.testing.assert_allclose(ratios, updates(port.build()) / updates(before), rtol=1e-6)
    assert len(set(ratios)) == 4
    assert port.step_ratio([[1.0], [2.0]], [[1, 2, 2**31]]).shape == (2, 3)


def test_ratio_needs_to_know_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"^alpha must be constant for step_ratio, got a schedule"):
        translate("torch", "keras", alpha=lambda step: 0.9).step_ratio(1.0, 1)
    for name in ("alpha", "eps"):
        with pytest.raises(
            TypeError, match=rf"^{name} must be known for step_ratio, got a tracer; call it outside jit"
        ):
            jax.jit(lambda x, name=name: translate("torch", "keras", **{name: x}).step_ratio(1, 1) and x)(0.5)
    # The learning rate is the same in both.
    jax.jit(lambda x: translate("torch", "keras", lr=x).step_ratio(1.0, 1).item() * x)(0.5)


@pytest.mark.parametrize("number", [np.float32(0.5), np.array(0.5), jnp.float32(0.5), Fraction(1, 2)])
def test_ratio_is_that_of_the_python_number(number: Any) -> None:
    def ratio(half: Any) -> Any:
        return translate("optax", "torch", learning_rate=0.1, decay=half, eps=half, initial_scale=half).step_ratio(
            2.0, 3
        )

    np.testing.assert_allclose(ratio(number), ratio(0.5), rtol=1e-7)


def test_ratio_at_the_edges_is_no_nan() -> None:
    port = translate("torch", "keras", eps=0.0)
    np.testing.assert_array_equal(port.step_ratio([0.0, 1e-200, 1e200, math.inf], 1), np.ones(4))
    port = translate("keras", "tensorflow", epsilon=0.0)
    np.testing.assert_array_equal(port.step_ratio(0.0, [1, 10]), [0.0, 0.0])
    assert translate("tensorflow", "keras", learning_rate=1, epsilon=0.0).step_ratio(0.0, 1) == math.inf
    np.testing.assert_allclose(port.step_ratio(1.0, math.inf), 1.0)


# --- The state of a run --------------------------------------------------------------------------------------


def state_of(momentum: Any = 0.5, **options: Any) -> RMSPropState:
    state: RMSPropState = rmsprop(momentum=momentum, **options).init({"w": jnp.zeros(2), "none": None})
    buffer = None if state.momentum_buffer is None else jax.tree.map(jnp.ones_like, state.momentum_buffer)
    return state._replace(momentum_buffer=buffer)


RATES_OF_ZERO = [0, 0.0, np.float16(0), np.array(0.0), jnp.array(0.0), jnp.bfloat16(0), Fraction(0)]


@pytest.mark.parametrize(
    "lr", [*RATES_OF_ZERO, 1e-40, np.array(1e-40), 1e38, math.inf, jnp.array(jnp.inf), lambda step: 0.1]
)
@pytest.mark.parametrize(("source", "target"), [("torch", "keras"), ("keras", "torch")])
def test_buffer_does_not_change_its_unit_by_a_rate_that_is_none(source: str, target: str, lr: Any) -> None:
    port = translate(source, target, **setting(source, lr=lr))
    with pytest.raises(
        ValueError, match=r"^lr must be constant and not 0 \(in float32\) or infinite .*, got "
    ) as raised:
        port.convert_state(state_of())
    assert len(str(raised.value)) < 200
    # Where the unit stays, or where there is no buffer, the rate does not matter.
    translate("torch", "stable_baselines3", lr=lr, momentum=0.5).convert_state(state_of())
    translate("torch", "keras", lr=lr).convert_state(state_of(0.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize(
    "lr", [0.25, np.float16(0.25), np.array(0.25), jnp.bfloat16(0.25), jnp.float32(0.25), Fraction(1, 4)]
)
def test_buffer_changes_its_unit_in_its_own_dtype(dtype: str, lr: Any) -> None:
    with jax.numpy_dtype_promotion("strict"):
        state = state_of(accumulator_dtype=dtype)
        there = translate("torch", "keras", lr=lr, momentum=0.5).convert_state(state)
        back = translate("keras", "torch", learning_rate=lr, momentum=0.5).convert_state(there)
        signed = translate("torch", "optax", lr=lr, momentum=0.5).convert_state(state)
    for converted, value in ((there, 0.25), (back, 1.0), (signed, -0.25)):
        assert converted.momentum_buffer["none"] is None
        assert converted.momentum_buffer["w"].dtype == dtype
        np.testing.assert_array_equal(converted.momentum_buffer["w"].astype(jnp.float32), [value, value])
        assert converted.square_avg is state.square_avg


def test_buffer_is_scaled_in_float32_and_as_two_real_arrays_if_complex() -> None:
    """1.0625 / 0.3 is nearest to 3.547 in bfloat16, but 1 / 0.3 is 3.328 there, and 1.0625 times that 3.531."""
    port = translate("keras", "torch", learning_rate=0.3, momentum=0.5)
    state = state_of(accumulator_dtype="bfloat16")
    state = state._replace(
        momentum_buffer={"w": jnp.array([1.0625, 1.234375], jnp.bfloat16), "none": optax.MaskedNode()}
    )
    got = port.convert_state(state).momentum_buffer
    np.testing.assert_array_equal(got["w"], jnp.array([1.0625 / 0.3, 1.234375 / 0.3], jnp.bfloat16))
    assert got["none"] == optax.MaskedNode()
    odd = state._replace(momentum_buffer={"w": jnp.array([1 + 2j, complex(math.inf, 3.0)], jnp.complex64)})
    with jax.numpy_dtype_promotion("strict"):
        got = port.convert_state(odd).momentum_buffer["w"]
    np.testing.assert_allclose(got.real, [1 / 0.3, math.inf], rtol=1e-6)
    np.testing.assert_allclose(got.imag, [2 / 0.3, 3 / 0.3], rtol=1e-6)


def test_buffer_changes_its_unit_by_a_traced_rate() -> None:
    @jax.jit
    def convert(lr: jax.Array, state: RMSPropState) -> RMSPropState:
        return translate("keras", "torch", learning_rate=lr, momentum=0.5).convert_state(state)

    np.testing.assert_array_equal(convert(jnp.float32(0.25), state_of()).momentum_buffer["w"], [4.0, 4.0])


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ((), ValueError, "state must contain an RMSPropState, got tuple without one"),
        (None, ValueError, "state must contain an RMSPropState, got NoneType without one"),
        (
            state_of(0.0),
            ValueError,
            "state.momentum_buffer is None, which does not fit momentum=0.5 in the setting",
        ),
        (
            state_of(centered=True),
            ValueError,
            "state.grad_avg is not None, which does not fit centered=False in",
        ),
        (
            state_of()._replace(momentum_buffer={"w": jnp.ones(2, jnp.int32)}),
            TypeError,
            r"state.momentum_buffer\['w'\] must be a floating or complex array, got Array",
        ),
        (
            state_of()._replace(momentum_buffer={"w": ["x" * 30_000]}),
            TypeError,
            r"state.momentum_buffer\['w'\]\[0\] must be a floating or complex array, got 'xxx",
        ),
    ],
)
def test_state_of_another_setting_is_refused(state: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}") as raised:
        translate("torch", "keras", momentum=0.5).convert_state(state)
    assert len(str(raised.value)) < 300


# --- Structure, read off the equations -----------------------------------------------------------------------


def test_structure_is_that_of_the_equations() -> None:
    plain = {
        "centered": False,
        "eps_in_sqrt": False,
        "decoupled_decay": False,
        "corrected_weight_decay": False,
        "caution": False,
        "lr_in_buffer": False,
        "buffer_sign": 1,
        "averages_steps": False,
        "nesterov": False,
        "bias_correction": False,
        "initial_scale": 0.0,
    }
    in_buffer = {"eps_in_sqrt": True, "lr_in_buffer": True}
    expected = [
        (rmsprop(momentum=0.5, weight_decay=0.1), {}),
        (rmsprop(centered=True), {"centered": True}),
        (dialects.tensorflow(0.1, momentum=0.5), in_buffer | {"initial_scale": 1.0}),
        (dialects.keras(momentum=0.5, weight_decay=0.1), in_buffer | {"decoupled_decay": True}),
        (dialects.timm(momentum=0.5, lr_in_momentum=False), {"eps_in_sqrt": True, "initial_scale": 1.0}),
        (dialects.timm(momentum=0.5, caution=True), in_buffer | {"initial_scale": 1.0, "caution": True}),
        (dialects.stable_baselines3(momentum=0.5), {"eps_in_sqrt": True, "initial_scale": 1.0}),
        (dialects.optax(0.1, momentum=0.5, nesterov=True), in_buffer | {"buffer_sign": -1, "nesterov": True}),
        (dialects.optax(0.1, eps_in_sqrt=False, bias_correction=True), {"bias_correction": True}),
        (dialects.dqn(), {"centered": True, "eps_in_sqrt": True}),
        (dialects.dreamer(), {"averages_steps": True, "bias_correction": True}),
    ]
    for tx, different in expected:
        assert translation.structure_of(tx) == plain | different


def test_arguments_that_are_off_are_translated_like_those_that_are_left_out() -> None:
    for target in DIALECTS:
        without = translate("optax", target, learning_rate=0.1, momentum=0.9)
        off = translate("optax", target, learning_rate=0.1, momentum=0.9, nesterov=False, bias_correction=False)
        assert off == without
    port = translate("optax", "optax", learning_rate=0.1, momentum=0.9, nesterov=True, bias_correction=True)
    assert (port.arguments["nesterov"], port.arguments["bias_correction"], port.notes) == (True, True, ())


@pytest.mark.parametrize(
    ("source", "target", "arguments", "message"),
    [
        ("optax", "torch", {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True}, "nesterov must be False, since"),
        ("torch", "dqn", {"centered": True, "momentum": 0.9}, "momentum must be 0, since target dqn has no momentum"),
        ("torch", "dqn", {}, "centered must be True, since target dqn is always centered, got False"),
        ("dqn", "dreamer", {}, "centered must be False, since target dreamer is never centered, got True"),
        ("torch", "dreamer", {"weight_decay": 0.1}, "weight_decay must be 0, since target dreamer has no L2"),
    ],
)
def test_what_the_target_lacks_is_refused(source: str, target: str, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        translate(source, target, **arguments)


def test_nesterov_without_momentum_means_nothing() -> None:
    assert translate("optax", "keras", learning_rate=0.1, nesterov=True).notes == ()


def test_translation_prints_as_text() -> None:
    port = translate("keras", "timm", momentum=0.5, learning_rate=lambda step: 0.1)
    call, *notes = str(port).splitlines()
    assert call.startswith("timm(lr=<function ")
    assert call.endswith(
        "weight_decay=0, decoupled_decay=True, corrected_weight_decay=False, caution=False, lr_in_momentum=True)"
    )
    assert notes == [f"- {note}" for note in port.notes] != []


# --- DQN and DreamerV3 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["torch", "timm", "optax"])
def test_dqn_is_the_centered_rule_of_the_others(target: str) -> None:
    source = dialects.dqn()
    port = translate("dqn", target)
    gradients = 100 * np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)  # eps and start do not matter

    def last(tx: optax.GradientTransformation) -> np.ndarray:
        state = tx.init(jnp.zeros(3))
        for g in gradients:
            update, state = jax.jit(tx.update)(jnp.asarray(g), state)
        return np.asarray(update)

    np.testing.assert_allclose(last(port.build()), last(source), rtol=2e-3)


def with_plain_buffer(update: np.ndarray, momentum: float) -> np.ndarray:
    """What a bias-corrected average of steps becomes without the correction."""
    return update * (1 - momentum ** np.arange(1, len(update) + 1))[:, None]


MAKERS = {"float": float, "array": jnp.float32, "schedule": lambda number: lambda step: number}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_dreamer_is_a_buffer_of_added_steps_at_a_smaller_rate(make: Callable[[float], Any]) -> None:
    setting = {"lr": 0.5, "beta2": 0.75, "eps": 0.25, "beta1": 0.5}
    port = translate("dreamer", "optax", **setting | {"lr": make(0.5), "beta1": make(0.5)})
    assert port.arguments["bias_correction"] is True
    assert [note for note in port.notes if "adds the steps up: lr is multiplied by 1 − momentum" in note]
    expected = with_plain_buffer(run(dialects.dreamer(**setting)), 0.5)
    np.testing.assert_allclose(run(port.build()), expected, rtol=1e-6)
    back = translate("optax", "dreamer", **port.arguments)
    lr = back.arguments["lr"]
    assert float(lr(0) if callable(lr) else lr) == 0.5
    np.testing.assert_allclose(run(back.build()), run(dialects.dreamer(**setting)), rtol=1e-6)


def test_note_on_bias_correction_says_how_far_apart_they_are() -> None:
    (note,) = translate("dreamer", "torch", beta1=0.0, beta2=0.9).notes
    assert note == f"the average is not bias-corrected: the averages differ by the factor 1 − alphaᵗ{WITHIN.format(44)}"


def test_ratio_knows_of_bias_correction() -> None:
    port = translate("dreamer", "torch", beta1=0.0, beta2=0.75, eps=0.0)
    grads = np.full((3, 1), 2.0, np.float32)

    def updates(tx: optax.GradientTransformation) -> list[float]:
        state, got = tx.init(jnp.zeros(1)), []
        for g in grads:
            update, state = tx.update(jnp.asarray(g), state)
            got.append(float(update[0]))
        return got

    ratio = np.array(updates(port.build())) / updates(dialects.dreamer(beta1=0.0, beta2=0.75, eps=0.0))
    np.testing.assert_allclose(port.step_ratio(2.0, [1, 2, 3]), ratio, rtol=1e-6)


GRADIENTS = np.random.default_rng(1).normal(size=(6, 2, 3)).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
@pytest.mark.parametrize(
    ("source", "setting", "target"),
    [
        ("dreamer", {"lr": 0.5, "beta1": 0.5, "beta2": 0.75, "eps": 0.25}, "torch"),
        ("torch", {"lr": 0.5, "momentum": 0.5, "alpha": 0.75}, "dreamer"),
        ("dreamer", {"lr": 0.5, "beta1": 0.5, "beta2": 0.75, "eps": 0.25}, "keras"),
        ("optax", {"learning_rate": 0.5, "centered": True, "bias_correction": True, "momentum": 0.5}, "torch"),
        ("optax", {"learning_rate": 0.5, "centered": True, "momentum": 0.5}, "torch"),
        ("optax", {"learning_rate": 0.5, "centered": True, "bias_correction": True}, "timm"),
        ("tensorflow", {"learning_rate": 0.5, "decay": 0.75}, "dreamer"),
        ("dreamer", {"lr": 0.5, "beta1": 0.5, "beta2": 0.75, "eps": 0.25}, "tensorflow"),
    ],
)
@pytest.mark.parametrize("steps", [0, 5])
def test_converted_state_is_that_of_the_target_on_the_same_gradients(
    source: str, setting: Any, target: str, dtype: Any, steps: int
) -> None:
    """The denominators differ, so the target is asked for the averages; the buffer is compared through its units."""
    port = translate(source, target, **setting)

    def state_after(tx: optax.GradientTransformation) -> RMSPropState:
        state = tx.init(jnp.zeros(3, dtype))
        for g in GRADIENTS[:steps]:
            g = jnp.asarray(g[0] + 1j * g[1] if dtype == jnp.complex64 else g[0])
            _, state = tx.update(g, state)
        return state

    before = state_after(translation.DIALECTS[source].build(**setting))
    converted, there = port.convert_state(before), state_after(port.build())
    assert converted.step == there.step == steps
    if port.before["bias_correction"] != port.after["bias_correction"] or source == "optax":
        np.testing.assert_allclose(converted.square_avg, there.square_avg, rtol=1e-5)
    if port.after["centered"]:
        np.testing.assert_allclose(converted.grad_avg, there.grad_avg, rtol=1e-5)
    assert jax.tree.structure(converted) == jax.tree.structure(there)
    back = port._replace(before=port.after, after=port.before).convert_state(converted)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), back, before)


def test_buffer_of_averaged_steps_becomes_that_of_added_ones() -> None:
    """With a denominator of 1, both are known."""
    setting = {"lr": 0.5, "beta1": 0.5, "beta2": 0.0, "eps": 0.0}
    tx = dialects.dreamer(**setting)
    state = tx.init(jnp.zeros(1))
    for g in (1.0, -1.0, 1.0):
        _, state = tx.update(jnp.array([g]), state)
    np.testing.assert_allclose(state.momentum_buffer, [(0.25 - 0.5 + 1) * 0.5 / (1 - 0.5**3)], rtol=1e-6)
    added = translate("dreamer", "torch", **setting).convert_state(state)
    np.testing.assert_allclose(added.momentum_buffer, [0.25 - 0.5 + 1], rtol=1e-6)
    with_rate = translate("dreamer", "keras", **setting).convert_state(state)
    np.testing.assert_allclose(with_rate.momentum_buffer, [0.25 * (0.25 - 0.5 + 1)], rtol=1e-6)


def test_buffer_comes_and_goes_where_only_averaged_steps_have_one() -> None:
    state = state_of(0.0)
    there = translate("torch", "dreamer", momentum=0.0).convert_state(state)
    np.testing.assert_array_equal(there.momentum_buffer["w"], [0, 0])
    back = translate("dreamer", "torch", beta1=0.0).convert_state(there)
    assert back.momentum_buffer is None


def test_bias_correction_needs_a_constant() -> None:
    state = dialects.dreamer().init(jnp.zeros(2))
    for name in ("beta2", "beta1"):
        port = translate("dreamer", "torch", **{name: lambda step: 0.5})
        what = {"beta2": "alpha", "beta1": "momentum"}[name]
        with pytest.raises(ValueError, match=rf"^{what} must be constant for a bias correction to come or go"):
            port.convert_state(state)


# --- States inside of others ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["chain", "recorder", "masked", "inject", "multi"])
def test_state_inside_of_another_is_converted_where_it_is(wrap: str) -> None:
    wrappers: dict[str, Callable[[Any], Any]] = {
        "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        "recorder": recorder.record_statistics,
        "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
        "inject": lambda tx: optax.inject_hyperparams(lambda lr: tx)(lr=0.5),
        "multi": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    }
    setting = {"lr": 0.25, "alpha": 0.75, "momentum": 0.5}
    port = translate("torch", "keras", **setting)
    source, target = wrappers[wrap](rmsprop(**setting)), wrappers[wrap](port.build())
    params = {"w": jnp.ones(2), "b": jnp.ones(3)}
    _, state = source.update(params, source.init(params), params)
    _, state = source.update(params, state, params)
    converted = port.convert_state(state)
    assert jax.tree.structure(converted) == jax.tree.structure(target.init(params))
    before, after = (optax.tree.get(x, "momentum_buffer")["w"] for x in (state, converted))
    np.testing.assert_array_equal(after, 0.25 * before)
    assert float(jnp.abs(before).min()) > 0
    target.update(params, converted, params)


# --- States that are not what init gives -----------------------------------------------------------------------


def dreamer_state(steps: int = 3, **setting: Any) -> RMSPropState:
    tx = dialects.dreamer(**setting)
    state: RMSPropState = tx.init(jnp.zeros(2))
    for _ in range(steps):
        _, state = tx.update(jnp.array([1.0, -2.0]), state)
    return state


def test_state_of_many_runs_is_refused_unless_vmapped() -> None:
    port = translate("dreamer", "torch")
    states = jax.tree.map(lambda *x: jnp.stack(x), *(dreamer_state(steps) for steps in (1, 2, 5)))
    with pytest.raises(ValueError, match=r"^state.step must be an int32 scalar .* with jax.vmap"):
        port.convert_state(states)
    together = jax.vmap(port.convert_state)(states)
    alone = port.convert_state(dreamer_state(5))
    units = translate("keras", "torch", learning_rate=0.5, momentum=0.9).convert_state(states)  # needs no step
    np.testing.assert_array_equal(units.momentum_buffer, 2 * states.momentum_buffer)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[2], y, rtol=1e-6), together, alone)


@pytest.mark.parametrize("step", [3, np.int64(3), np.array(3, np.int16)])
def test_step_of_any_integer_is_read(step: Any) -> None:
    port, state = translate("dreamer", "torch"), dreamer_state()
    given = port.convert_state(state._replace(step=step))
    jax.tree.map(np.testing.assert_array_equal, given[1:], port.convert_state(state)[1:])
    with pytest.raises(TypeError, match=r"^state.step must be an int32 scalar"):
        port.convert_state(state._replace(step=3.0))


def test_state_of_nnx_is_converted_in_its_boxes() -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, dialects.dreamer(), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    converted = translate("dreamer", "torch").convert_state(optimizer.opt_state)
    assert jax.tree.structure(converted) == jax.tree.structure(optimizer.opt_state)
    weight = 1 - 0.999
    np.testing.assert_allclose(jax.tree.leaves(converted.square_avg)[0], weight, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.999, np.float64(0.999), np.array(0.999)])
def test_conversion_is_as_exact_as_double_precision(x64: None, beta: Any) -> None:
    port = translate("dreamer", "torch", beta1=beta, beta2=beta)
    grads = np.random.default_rng(0).normal(size=(7, 2))

    def state(tx: optax.GradientTransformation) -> RMSPropState:
        got: RMSPropState = tx.init(jnp.zeros(2))
        for g in grads:
            _, got = tx.update(jnp.asarray(g), got)
        return got

    converted, there = port.convert_state(state(dialects.dreamer(beta1=beta, beta2=beta))), state(port.build())
    np.testing.assert_allclose(converted.square_avg, there.square_avg, rtol=1e-12)
    back = port._replace(before=port.after, after=port.before).convert_state(converted)
    np.testing.assert_allclose(back.momentum_buffer, state(dialects.dreamer(beta1=beta, beta2=beta))[3], rtol=1e-12)


def test_conversion_keeps_small_complements_in_float32() -> None:
    """1 − float32(0.999) is off by 1.3e-5."""
    state = dreamer_state(1, beta1=0.999)
    added = translate("dreamer", "torch", beta1=0.999).convert_state(state).momentum_buffer
    np.testing.assert_allclose(added, state.momentum_buffer, rtol=1e-6)  # after one step, both hold that step


def test_traced_rate_in_half_precision_does_not_overflow() -> None:
    @jax.jit
    def convert(lr: jax.Array, state: RMSPropState) -> RMSPropState:
        return translate("keras", "torch", learning_rate=lr, momentum=0.5).convert_state(state)

    rate = jnp.float16(1e-5)
    np.testing.assert_allclose(convert(rate, state_of()).momentum_buffer["w"], 1 / np.float32(rate), rtol=1e-6)


def test_numbers_of_mixed_precision_are_rescaled_under_strict_promotion(x64: None) -> None:
    with jax.numpy_dtype_promotion("strict"):
        port = translate("dreamer", "torch", lr=jnp.float32(0.5), beta1=jnp.float64(0.5))
        assert float(port.arguments["lr"]) == 0.25


# --- Ratios and notes of averaged steps --------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), [("dreamer", "torch"), ("torch", "dreamer")])
def test_ratio_knows_of_averaged_steps(source: str, target: str) -> None:
    """With gradients of one size, v is known; eps is too small to matter."""
    names = translation.DIALECTS[source].names
    port = translate(source, target, **{names["momentum"]: 0.75, names["alpha"]: 0.5, names["lr"]: 0.1})
    ratio = run_of_ones(port.build()) / run_of_ones(
        translation.DIALECTS[source].build(**{names["momentum"]: 0.75, names["alpha"]: 0.5, names["lr"]: 0.1})
    )
    np.testing.assert_allclose(port.step_ratio(1.0, 1), ratio[0], rtol=1e-5)
    with pytest.raises(ValueError, match=r"^momentum must be constant for step_ratio, got a schedule"):
        translate(source, target, **{names["momentum"]: lambda step: 0.5}).step_ratio(1.0, 1)


def run_of_ones(tx: optax.GradientTransformation) -> np.ndarray:
    state, updates = tx.init(jnp.zeros(1)), []
    for _ in range(3):
        update, state = tx.update(jnp.ones(1), state)
        updates.append(float(update[0]))
    return np.array(updates)


def test_eps_of_0_has_no_place() -> None:
    assert translate("torch", "keras", eps=0.0).notes == ()


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.chain(optax.clip(1.0), rmsprop()), optax.sgd(0.1)])
def test_structure_of_anything_else_is_refused(tx: Any) -> None:
    with pytest.raises(ValueError, match=r"^tx must be an RMSProp of rmsprop_jax, got "):
        translation.structure_of(tx)


def test_climbing_does_not_turn_the_sign_of_the_buffer() -> None:
    assert translation.structure_of(rmsprop(maximize=True, momentum=0.9))["buffer_sign"] == 1


# --- Edges that mutations found -----------------------------------------------------------------------------------


def test_integer_average_is_refused() -> None:
    state = rmsprop(momentum=0.5).init({"w": jnp.zeros(2)})
    wrong = state._replace(square_avg={"w": jnp.ones(2, jnp.int32)})
    with pytest.raises(TypeError, match=r"^state.square_avg\['w'\] must be a floating or complex array, got Array"):
        translate("torch", "keras", momentum=0.5).convert_state(wrong)


def test_start_that_is_taken_out_leaves_no_negative_average() -> None:
    port = translate("tensorflow", "dreamer", learning_rate=0.1, decay=0.9)
    state = dialects.tensorflow(learning_rate=0.1, decay=0.9).init(jnp.zeros(3))
    state = state._replace(step=jnp.int32(5), square_avg=jnp.full(3, 0.9**5 * (1 - 2e-6), jnp.float32))
    np.testing.assert_array_equal(port.convert_state(state).square_avg, np.zeros(3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_averages_keep_their_dtype_under_strict_promotion(x64: None, dtype: str) -> None:
    setting = dict(learning_rate=0.5, momentum=0.5, centered=True, decay=0.75)
    there = translate("optax", "optax", **setting, bias_correction=True)
    port = there._replace(after=there.after | {"bias_correction": False})
    state = rmsprop(momentum=0.5, centered=True, accumulator_dtype=dtype).init(jnp.ones(2))._replace(step=jnp.int32(3))
    with jax.numpy_dtype_promotion("strict"):
        for p in (port, port._replace(before=port.after, after=port.before)):
            assert [slot.dtype for slot in p.convert_state(state)[1:]] == [jnp.dtype(dtype)] * 3


@pytest.mark.parametrize("change", [{"momentum_buffer": None}, {"square_avg": {"w": jnp.ones(2, int)}}])
def test_every_state_is_checked_and_named_by_its_place(change: Any) -> None:
    good = rmsprop(momentum=0.5).init({"w": jnp.zeros(2)})
    message = r"^state\[1\]\['inner'\]\.(momentum_buffer is None|square_avg\['w'\] must)"
    with pytest.raises((TypeError, ValueError), match=message):
        translate("torch", "keras", momentum=0.5).convert_state((good, {"inner": good._replace(**change)}))


def test_state_of_no_parameters_is_converted() -> None:
    state = rmsprop(momentum=0.5).init(None)
    assert translate("torch", "keras", momentum=0.5).convert_state(state)[1:] == (None, None, None)


@pytest.mark.parametrize(("source", "target"), [("dreamer", "torch"), ("torch", "dreamer")])
def test_ratio_of_averaged_steps_depends_on_the_step(source: str, target: str) -> None:
    names = translation.DIALECTS[source].names
    port = translate(source, target, **{names["momentum"]: 0.75, names["alpha"]: 0.5, names["lr"]: 0.1})
    plain = port._replace(before=port.before | {"averages_steps": False}, after=port.after | {"averages_steps": False})
    weight = 1 - 0.75 ** np.array([1, 2, 3])
    ratio = port.step_ratio(1.0, [1, 2, 3]) / plain.step_ratio(1.0, [1, 2, 3])
    np.testing.assert_allclose(ratio, weight if source == "dreamer" else 1 / weight, rtol=1e-12)


@pytest.mark.parametrize(("scheduled", "second"), [("lr", 0.125), ("beta1", 0.375)])
def test_rate_and_momentum_may_be_schedules_one_at_a_time(scheduled: str, second: float) -> None:
    port = translate("dreamer", "torch", **{"lr": 0.5, "beta1": 0.5, scheduled: lambda step: 0.5 / (1 + step)})
    assert [float(port.arguments["lr"](jnp.int32(step))) for step in (0, 1)] == [0.25, second]


@pytest.mark.parametrize(
    ("name", "wrong", "allowed"), [("momentum", 1.0, r"a number in \[0, 1\)"), ("lr", -1.0, "a number ≥ 0")]
)
def test_schedules_of_a_rescaled_rate_are_checked(name: str, wrong: float, allowed: str) -> None:
    port = translate("torch", "dreamer", **{name: lambda step: wrong})
    with pytest.raises(ValueError, match=rf"^the schedule of {name} must be {allowed}"):
        port.arguments["lr"](0)


def test_rmsprop_inside_of_something_that_fails_is_refused() -> None:
    def update(*args: Any, **kwargs: Any) -> Any:
        rmsprop().update(*args, **kwargs)
        raise TypeError("no gradients")

    with pytest.raises(ValueError, match=r"^tx must be an RMSProp of rmsprop_jax"):
        translation.structure_of(optax.GradientTransformationExtraArgs(rmsprop().init, update))


@pytest.mark.parametrize("nothing", [0, np.array(0.0), jnp.array(0.0)])
def test_momentum_of_zero_is_translated_into_a_dialect_without(nothing: Any) -> None:
    assert "momentum" not in translate("torch", "dqn", centered=True, momentum=nothing).arguments


def test_notes_on_averages_go_both_ways() -> None:
    there = translate("torch", "dreamer", momentum=0.5, alpha=0.9, lr=0.1).notes
    average, buffer = (
        "the average is {}bias-corrected: the averages differ by the factor 1 − {}",
        "the momentum buffer ",
    )
    assert average.format("", f"alphaᵗ{WITHIN.format(44)}") in there
    averages = "averages the steps: lr is divided by 1 − momentum, and the first steps by 1 − momentumᵗ"
    assert f"{buffer}{averages}{WITHIN.format(7)}" in there
    back = translate("dreamer", "torch", beta1=lambda step: 0.5, beta2=lambda step: 0.9).notes
    assert average.format("not ", "the product of all alphas so far") in back
    adds = (
        "adds the steps up: lr is multiplied by 1 − momentum, and the first steps by 1 − the product of all momentums"
    )
    assert f"{buffer}{adds} so far" in back


def test_ratio_has_the_shape_of_both_under_bias_correction() -> None:
    port = translate("optax", "optax", learning_rate=0.1, bias_correction=True)
    assert port.step_ratio(1.0, [1, 2, 3]).shape == (3,)
