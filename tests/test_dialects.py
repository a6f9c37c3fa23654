"""Every dialect against trajectories recorded from the real library, see ``golden/record.py``; and translation."""

import functools
import inspect
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import reference
from compare import Error, assert_alike, assert_close, largest_error
from rmsprop_jax import RMSPropState, dialects, rmsprop, transform, translation
from rmsprop_jax.equations import (
    add_momentum,
    apply_caution,
    decay_weights,
    decay_weights_corrected,
    decay_weights_decoupled,
    divide_eps_inside,
    divide_eps_outside,
    keep_gradient,
    scale_by_lr,
)
from rmsprop_jax.translation import translate

GOLDEN = pathlib.Path(__file__).parent / "golden"
LIBRARIES = tuple(name for name in translation.DIALECTS if name not in ("dqn", "dreamer"))  # those two cannot be run
# A slot of ours by the names that the libraries have for it. The first is their average of g².
SLOTS = {
    "square_avg": ("square_avg", "rms", "velocity", "nu"),
    "grad_avg": ("grad_avg", "mg", "average_gradient", "mu"),
    "momentum_buffer": ("momentum_buffer", "momentum", "trace"),
}
# What we refuse: bias correction together with a starting value, which Optax inflates.
LEFT_OUT = {("optax", "bias_correction_centered"), ("optax", "everything")}
# Relative to each entry, over the 40 steps. Measured maxima, from SSE4.2 to AVX2: 1.7e-6 and 4.4e-15.
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}
Arrays = dict[str, np.ndarray]  # by slot: the recorded steps along the first axis, then the entries of all parameters


@functools.cache
def load(library: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(GOLDEN / f"{library}.npz") as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays.pop("metadata")))


def cases(*libraries: str) -> list[tuple[str, str]]:
    return [(name, case) for name in libraries for case in load(name)[1]["cases"] if (name, case) not in LEFT_OUT]


def parts(library: str, case: str) -> tuple[str, ...]:
    """The names of the parameters that a case has to be run on alone; "" stands for all of them joined.

    Only caution knows which entries belong together.
    """
    return ("vector", "matrix") if load(library)[1]["cases"][case]["arguments"].get("caution") else ("",)


def joined(library: str, prefix: str, axes: int = 1) -> np.ndarray:
    """The entries of all parameters along the last of ``axes`` axes; most rules know no shapes, and compile faster."""
    arrays, _ = load(library)
    parts = [arrays[key] for key in sorted(arrays) if key.startswith(prefix)]
    return np.concatenate([part.reshape(*part.shape[: axes - 1], -1) for part in parts], axis=-1)


def recording(library: str, case: str, dtype: str, part: str) -> Arrays:
    """What the library had after the recorded steps: "params" and its slots, "step" among them if it counts."""
    slots = {key.split("/")[2] for key in load(library)[0] if key.startswith(f"{dtype}/{case}/")}
    if library == "tensorflow" and not load(library)[1]["cases"][case]["arguments"].get("momentum"):
        slots.remove("momentum")  # TensorFlow keeps it without momentum too: the last step
    arrays = {slot: joined(library, f"{dtype}/{case}/{slot}/{part}", axes=2) for slot in slots}
    if "step" in arrays:  # an integer in one library, a float32 in the others
        arrays["step"] = arrays["step"].astype(np.float32)
    return arrays


def arguments(library: str, case: str, dtype: str) -> dict[str, Any]:
    """What the library was given, its defaults written out, as the recorder gave it: NumPy numbers in float64."""
    row, recorded = translation.DIALECTS[library], load(library)[1]["cases"][case]
    defaults = {
        name: p.default for name, p in inspect.signature(row.build).parameters.items() if name in row.names.values()
    }
    wrap = np.float64 if dtype == "float64" else float
    numbers = {k: wrap(v) if isinstance(v, float) else v for k, v in (defaults | recorded["arguments"]).items()}
    if "max_lr" in row.names:
        numbers[row.names["max_lr"]] = numbers[row.names["lr"]]  # that of the constructor
    return numbers | {row.names["lr"]: lambda step: wrap(recorded["lr"][int(step)])}


def run(library: str, case: str, dtype: str, part: str) -> Arrays:
    """What our dialect has after the recorded steps, in the terms of the library."""
    recorded_steps = load(library)[1]["recorded_steps"]
    given = arguments(library, case, dtype)
    tx = translation.DIALECTS[library].build(**given)
    params = jnp.asarray(joined(library, f"{dtype}/initial/{part}"))
    gradients = joined(library, f"{dtype}/gradients/{part}", axes=2)
    state, moments = tx.init(params), []
    for step in range(1, 1 + max(recorded_steps)):
        updates, state = tx.update(jnp.asarray(gradients[step - 1]), state, params)
        params = optax.apply_updates(params, updates)
        if step in recorded_steps:
            unbias = 1 - given["decay"] ** step if given.get("bias_correction") else 1.0
            moments.append({"params": params} | in_their_terms(library, state, unbias, part))
    return jax.tree.map(lambda *xs: np.stack(xs), *moments)


def in_their_terms(library: str, state: RMSPropState, unbias: float, part: str) -> dict[str, Any]:
    """Our slots as the library keeps them: the average of g² also if centered, and averages uncorrected."""
    keys = [key.split("/") for key in load(library)[0]]
    theirs = {key[2] for key in keys if len(key) == 4} - {"params"}
    names_of_params = {key[3] for key in keys if len(key) == 4 and key[3].startswith(part)}
    slots = {"step": np.full(len(names_of_params), state.step, np.float32)}
    mean = state.grad_avg
    if mean is not None:
        slots |= {"grad_avg": unbias * mean}
    slots["square_avg"] = unbias * (state.square_avg if mean is None else state.square_avg + mean**2)
    if state.momentum_buffer is not None:
        slots["momentum_buffer"] = state.momentum_buffer
    names = {name: ours for ours, names in SLOTS.items() for name in names} | {"step": "step"}
    return {name: slots[names[name]] for name in theirs if names[name] in slots}


def difference(library: str, case: str, dtype: str, scale: Any = None) -> Error:
    """The largest relative difference of an entry, over all recorded steps, parameters and slots."""
    errors = [
        largest_error(run(library, case, dtype, part), recording(library, case, dtype, part), scale=scale)
        for part in parts(library, case)
    ]
    return max(errors, key=lambda error: error.size)


@pytest.mark.device("dialects")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("library", "case"), cases(*LIBRARIES))
def test_dialect_is_the_recorded_library(request: pytest.FixtureRequest, library: str, case: str, dtype: str) -> None:
    if dtype == "float64":
        request.getfixturevalue("x64")
    for part in parts(library, case):
        assert_close(run(library, case, dtype, part), recording(library, case, dtype, part), rtol=TOLERANCE[dtype])


# What the frameworks call the arguments of the reference, and what each of them fixes.
WORDS = {"learning_rate": "lr", "decay": "alpha", "rho": "alpha", "epsilon": "eps", "lr_in_momentum": "lr_in_buffer"}
WORDS |= {"max_lr_snapshot": "max_lr"}
WORDS |= {"squared_gradient_momentum": "alpha", "min_squared_gradient": "eps", "beta2": "alpha", "beta1": "momentum"}
RULES: dict[str, dict[str, Any]] = {
    "torch": {},
    "tensorflow": dict(eps_in_sqrt=True, initial_scale=1.0, lr_in_buffer=True),
    "keras": dict(eps_in_sqrt=True, lr_in_buffer=True, decoupled_decay=True),
    "timm": dict(eps_in_sqrt=True, initial_scale=1.0, lr_in_buffer=True),
    "stable_baselines3": dict(eps_in_sqrt=True, initial_scale=1.0),
    "optax": dict(eps_in_sqrt=True, lr_in_buffer=True),
    "dqn": dict(eps_in_sqrt=True, centered=True),
    "dreamer": dict(bias_correction=True, averaged_steps=True),
}


def rule(name: str, **given: Any) -> dict[str, Any]:
    """Arguments of the reference for arguments of a dialect."""
    numbers = {WORDS.get(word, word): 0.0 if x is None else x for word, x in given.items()}
    return RULES[name] | numbers


@pytest.mark.parametrize(("library", "case"), cases(*LIBRARIES))
def test_reference_is_the_recorded_library(library: str, case: str) -> None:
    """So that the two oracles are one; and the defaults in ``OWN_DEFAULTS`` are those that the library has."""
    recorded, steps = load(library)[1]["cases"][case], load(library)[1]["recorded_steps"]
    given = OWN_DEFAULTS[library] | recorded["arguments"]
    setting = rule(library, **{word: x for word, x in given.items() if WORDS.get(word, word) != "lr"})
    if setting.get("corrected_weight_decay"):
        setting["max_lr"] = recorded["arguments"]["lr"]
    for part in parts(library, case):
        gradients = joined(library, f"float64/gradients/{part}", axes=2)
        start = joined(library, f"float64/initial/{part}")
        moments = list(reference.rmsprop(start, gradients, lr=lambda step: recorded["lr"][step], **setting))
        names = {name: ours for ours, names in SLOTS.items() for name in names} | {"params": "param"}
        expected = recording(library, case, "float64", part)
        expected.pop("step", None)
        got = {slot: np.stack([getattr(moments[step - 1], names[slot]) for step in steps]) for slot in expected}
        if library == "optax":  # the sign is in the buffer, and averages are kept as they were before correction
            unbias = 1 - setting["alpha"] ** np.array(steps, float)[:, None] if setting["bias_correction"] else 1.0
            got = {slot: {"trace": -x, "params": x}.get(slot, unbias * x) for slot, x in got.items()}
        assert_close(got, expected, rtol=TOLERANCE["float64"])


# --- What the recordings can tell apart --------------------------------------------------------------------


def flip_place_of_eps(equations: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    swap = {
        divide_eps_inside: divide_eps_outside,
        divide_eps_outside: divide_eps_inside,
    }
    return tuple(swap.get(equation, equation) for equation in equations)


def flip_starting_value(equations: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    options["initial_scale"] = 1.0 - options.get("initial_scale", 0.0)
    return equations


def flip_order_of_lr(equations: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    order = list(equations)
    for i, equation in enumerate(order[:-1]):
        if {equation, order[i + 1]} == {scale_by_lr, add_momentum}:
            order[i : i + 2] = order[i + 1], equation
            break
    else:  # Optax: the sign stands between them
        i = order.index(scale_by_lr)
        order[i : i + 3] = order[i + 2], order[i + 1], order[i]
    return tuple(order)


def flip_kind_of_decay(equations: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    rest = tuple(e for e in equations if e not in (decay_weights, decay_weights_decoupled))
    was_first = decay_weights in equations
    return (*rest, decay_weights_decoupled) if was_first else (decay_weights, *rest)


def leave_out_caution(equations: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(equation for equation in equations if equation not in (keep_gradient, apply_caution))


def leave_out_correction(equations: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(decay_weights_decoupled if e is decay_weights_corrected else e for e in equations)


FLIPS = [
    *((library, "eps_0.01", flip_place_of_eps) for library in LIBRARIES),
    *((library, "default", flip_starting_value) for library in LIBRARIES),
    *((library, "lr_changes", flip_order_of_lr) for library in LIBRARIES),
    *((library, "weight_decay", flip_kind_of_decay) for library in ("torch", "keras", "timm", "stable_baselines3")),
    ("timm", "lr_changes_caution", leave_out_caution),
    ("timm", "lr_changes_corrected", leave_out_correction),
]


@pytest.mark.parametrize(("library", "case", "flip"), FLIPS)
def test_recording_tells_a_flipped_dialect(
    monkeypatch: pytest.MonkeyPatch, library: str, case: str, flip: Callable[..., Any]
) -> None:
    """Finite, and further off than any rounding could be."""
    original = transform.transformation

    def flipped(equations: tuple[Any, ...], numbers: Any, **options: Any) -> Any:
        return original(flip(equations, options), numbers, **options)

    monkeypatch.setattr(transform, "transformation", flipped)
    monkeypatch.setattr(dialects, "transformation", flipped)
    # An average that starts at 1 misses a recorded 0 by infinitely much; relative to its array, by 1.
    assert 20 * TOLERANCE["float32"] < difference(library, case, "float32", scale="array").size < np.inf


def test_recording_tells_what_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nan(leaf: Any, eps: Any) -> Any:
        return leaf._replace(update=leaf.update * jnp.nan)

    monkeypatch.setattr(dialects, "divide_eps_inside", nan)
    assert difference("keras", "default", "float32").size == np.inf


# --- Every dialect against the reference -------------------------------------------------------------------

BUILD: dict[str, Callable[..., Any]] = {"torch": rmsprop} | {
    name: getattr(dialects, name) for name in RULES if name != "torch"
}


def assert_is_reference(name: str, build: dict[str, Any], setting: dict[str, Any], gradients: np.ndarray) -> None:
    """Parameters and slots of the dialect after every step, in float64."""
    start = np.linspace(-1.5, 2.0, gradients.shape[1])
    tx, params = BUILD[name](**build), jnp.asarray(start)
    state, buffer_sign = tx.init(params), -1 if name == "optax" else 1
    for g, want in zip(gradients, reference.rmsprop(start, gradients, **setting), strict=True):
        updates, state = tx.update(jnp.asarray(g), state, params)
        params = optax.apply_updates(params, updates)
        mean = 0.0 if state.grad_avg is None else state.grad_avg
        pairs = {
            "update": (updates, want.update, np.abs(want.update) + EPS64 * np.abs(want.param)),
            "param": (params, want.param, np.abs(want.param)),
            "square_avg": (state.square_avg + mean**2, want.square_avg, want.square_avg),
        }
        if state.grad_avg is not None:
            pairs["grad_avg"] = (state.grad_avg, want.grad_avg, np.sqrt(want.square_avg))
        if state.momentum_buffer is not None:
            buffer = buffer_sign * want.momentum_buffer
            pairs["momentum_buffer"] = (state.momentum_buffer, buffer, np.abs(buffer))
        got, expected, sizes = ({slot: row[i] for slot, row in pairs.items()} for i in range(3))
        # Measured maximum: 4.8e-13, where a parameter passes 0 and its distance from there is a difference.
        assert_close(got, expected, rtol=1e-11, scale=sizes)


EPS64 = float(np.finfo(np.float64).eps)
SIGNS = np.sign(np.random.default_rng(1).normal(size=11))


def varied(scales: np.ndarray) -> np.ndarray:
    """Gradients of 25 steps: a size and a sign for each entry, so that no buffer is a difference; one is always 0."""
    return np.abs(np.random.default_rng(0).lognormal(size=(25, 11))) * SIGNS * scales


GRADIENTS = varied(np.array([1e-20, 1e-6, 1e-4, 1e-3, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 0.0]))
# Every number that a dialect takes, none of them a default, and each as a function of the step.
GIVEN: dict[str, dict[str, Any]] = {
    "lr": lambda step: 0.03 / (1 + step),
    "alpha": lambda step: 0.9 - 0.02 * step,
    "eps": lambda step: 1e-3 * (1 + step),
    "weight_decay": lambda step: 0.1 / (1 + step),
    "momentum": lambda step: 0.5 + 0.01 * step,
}


def numbers_of(name: str) -> dict[str, Any]:
    parameters = inspect.signature(BUILD[name]).parameters
    return {word: GIVEN[WORDS.get(word, word)] for word in parameters if WORDS.get(word, word) in GIVEN}


@pytest.mark.parametrize("name", RULES)
def test_dialect_is_its_rule_with_numbers_of_its_own(x64: None, name: str) -> None:
    given = {word: np.float64(number(3)) for word, number in numbers_of(name).items()}
    assert_is_reference(name, given, rule(name, **given), GRADIENTS)


@pytest.mark.parametrize("name", RULES)
def test_every_number_of_a_dialect_may_be_a_schedule(x64: None, name: str) -> None:
    given: dict[str, Any] = numbers_of(name)
    if name == "dreamer":  # a correction by 1 − alphaᵗ is for a constant alpha
        given = {word: np.float64(x(3)) if word in ("beta1", "beta2") else x for word, x in given.items()}
    in_float64 = {word: (lambda step, x=x: np.float64(x(int(step)))) if callable(x) else x for word, x in given.items()}
    assert_is_reference(name, in_float64, rule(name, **given), GRADIENTS)


@pytest.mark.parametrize("name", RULES)
def test_defaults_of_a_dialect_are_those_of_its_source(x64: None, name: str) -> None:
    needed = {"learning_rate": np.float64(0.01)} if name in ("tensorflow", "optax") else {}
    setting = rule(name, **OWN_DEFAULTS[name] | needed)
    if name == "tensorflow":  # holds Python floats in float32
        setting |= {"alpha": float(np.float32(0.9)), "eps": float(np.float32(1e-10))}
    assert_is_reference(name, needed, setting, GRADIENTS)


# --- What only timm has ------------------------------------------------------------------------------------

TURNING = np.random.default_rng(3).normal(size=(25, 11)) * np.array([1e-20, 1e-6, 1e-3, 0.1, *[1.0] * 6, 0.0])
CAUTIOUS = {
    "in the buffer": dict(caution=True),
    "after the buffer": dict(caution=True, lr_in_momentum=False, centered=True, weight_decay=0.1),
    "corrected": dict(caution=True, weight_decay=0.1, decoupled_decay=True, corrected_weight_decay=True),
}


@pytest.mark.parametrize("case", CAUTIOUS)
def test_caution_and_corrected_decay_are_the_rule(x64: None, case: str) -> None:
    """With a learning rate that is 0 on the way, where timm still compares the buffer with the gradient."""

    def lr(step: Any) -> np.float64:
        return np.float64(0.03 * abs(6 - int(step)) / 6)

    numbers = dict(alpha=0.75, momentum=0.875, eps=1e-3, max_lr_snapshot=0.02) | CAUTIOUS[case]
    setting = rule("timm", lr=lr, **numbers)
    start = np.linspace(-1.5, 2.0, 11)
    tx, params = dialects.timm(lr=lr, **numbers), jnp.asarray(start)
    state, dropped = tx.init(params), []
    for g, want in zip(TURNING, reference.rmsprop(start, TURNING, **setting), strict=True):
        updates, state = tx.update(jnp.asarray(g), state, params)
        params = optax.apply_updates(params, updates)
        dropped.append(np.mean(want.momentum_buffer * g <= 0))
        sizes = (np.abs(want.update) + np.abs(want.param), np.abs(want.momentum_buffer) + 1e-3)
        assert_close((params, state.momentum_buffer), (want.param, want.momentum_buffer), rtol=1e-12, scale=sizes)
    assert min(dropped) < 0.2 < 0.5 < max(dropped)


def test_caution_scales_up_a_thousandfold_at_most(x64: None) -> None:
    """A buffer of ones meets a gradient that agrees with it in 2 of 4,000 entries."""
    tx = dialects.timm(lr=0.25, alpha=0.0, eps=0.0, momentum=0.5, caution=True)
    state = tx.init(jnp.zeros(4000))._replace(momentum_buffer=jnp.ones(4000))
    gradient = jnp.where(jnp.arange(4000) < 2, 1.0, -1.0)
    updates, state = tx.update(gradient, state)
    assert_close(state.momentum_buffer, np.where(np.arange(4000) < 2, 0.75, 0.25), rtol=1e-12)
    assert_close(updates, np.where(np.arange(4000) < 2, -750.0, 0.0), rtol=1e-12)


def cautious(gradients: Any, dtype: Any = jnp.float32) -> tuple[Any, RMSPropState]:
    """The update of zeros after two gradients, and the state."""
    tx = dialects.timm(lr=0.25, alpha=0.5, eps=1e-3, momentum=0.5, caution=True)
    params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:], dtype), gradients)
    state = tx.init(params)
    for step in range(2):
        updates, state = tx.update(jax.tree.map(lambda g, step=step: jnp.asarray(g[step], dtype), gradients), state)
    return updates, state


SEEN = np.random.default_rng(5).normal(size=(2, 2, 8)).astype(np.float32)


def test_caution_counts_the_entries_of_each_parameter() -> None:
    """Which are as many as its shape says, the real and the imaginary part of a complex one apart; or none at all."""
    parts = {"a": SEEN[:, 0], "b": SEEN[:, 1], "none": SEEN[:, 0, :0]}
    updates, state = cautious(parts)
    for name, gradient in parts.items():
        alone, _ = cautious(gradient)
        np.testing.assert_array_equal(updates[name], alone)
    joined_updates, _ = cautious(SEEN)
    shares = [np.mean(np.sign(state.momentum_buffer[name]) == np.sign(parts[name][1])) for name in ("a", "b")]
    assert 0.001 < shares[0] != shares[1] > 0.001
    expected = np.stack([updates["a"] * shares[0], updates["b"] * shares[1]]) / np.mean(shares)
    assert_close(joined_updates, expected.astype(np.float32), ulps=4)  # 1 / share, and a product, on both sides
    pair, _ = cautious(SEEN[:, 0] + 1j * SEEN[:, 1], jnp.complex64)
    assert_close(pair, np.asarray(updates["a"] + 1j * updates["b"]), ulps=4)  # another program


def test_caution_sees_signs_that_float32_cannot_multiply() -> None:
    """The product of buffer and gradient is 1e-53 here, and 0 in float32."""
    updates, _ = cautious(np.array([[1e-26, 1.0], [1e-26, 1.0]], np.float32))
    assert (updates < 0).all()


def test_caution_reads_the_gradient_in_half_precision() -> None:
    half = SEEN.astype(jnp.bfloat16)
    updates, state = cautious(half, jnp.bfloat16)
    wide, same = cautious(half.astype(np.float32))
    assert_close(state, same, ulps=4)  # half precision is exact in float32; two programs
    assert_close(updates, np.asarray(wide).astype(jnp.bfloat16), ulps=1)
    assert (updates == 0).any()


def test_caution_divides_nothing_by_nothing() -> None:
    with jax.debug_nans(True), jax.disable_jit():
        updates, _ = cautious({"none": SEEN[:, :0], "zero": np.zeros((2, 3), np.float32)})
    np.testing.assert_array_equal(updates["zero"], np.zeros(3))


def test_caution_keeps_what_is_not_finite_in_its_entry() -> None:
    gradient = np.array([[1.0, np.nan, np.inf, 0.0, -1.0]] * 2, np.float32)
    updates, _ = cautious(gradient)
    np.testing.assert_array_equal(np.isfinite(updates), [True, False, False, True, True])
    assert updates[0] == -updates[4] < 0


def test_caution_and_corrected_decay_have_finite_derivatives() -> None:
    params = jnp.array([1.0, 2.0, -1.0, 0.5])

    def moved(params: Any, gradient: Any, numbers: dict[str, Any]) -> jax.Array:
        tx = dialects.timm(
            **numbers, momentum=0.5, caution=True, decoupled_decay=True, corrected_weight_decay=True, eps=1e-20
        )
        state = tx.init(params)._replace(square_avg=jnp.array([0.0, 1.0, 1.0, 1.0]))
        return tx.update(gradient, state, params)[0].sum()

    numbers = {name: jnp.float32(x) for name, x in dict(lr=0.1, weight_decay=0.5, max_lr_snapshot=0.2).items()}
    slopes = jax.grad(moved, argnums=(0, 1, 2))(params, jnp.array([0.0, 0.5, -2.0, 0.0]), numbers)
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(slopes))
    # update = … − lr · (lr / max_lr) · weight_decay · p
    assert_close(slopes[0], np.full(4, -0.1 * 0.5 * 0.5, np.float32), ulps=4)
    assert_close(slopes[2]["max_lr_snapshot"], np.float32(0.01 / 0.04 * 0.5 * 2.5), ulps=8)


def test_correction_does_nothing_at_the_highest_rate_or_to_an_l2_penalty() -> None:
    params, gradient = jnp.linspace(-1, 1, 7), jnp.linspace(2, 1, 7)

    def update(**given: Any) -> Any:
        tx = dialects.timm(weight_decay=0.3, momentum=0.5, **given)
        return tx.update(gradient, tx.init(params), params)[0]

    plain = update(lr=0.7, decoupled_decay=True)
    for given in ({"lr": 0.7}, {"lr": np.float64(0.7)}, {"lr": lambda step: 0.7, "max_lr_snapshot": 0.7}):
        np.testing.assert_array_equal(update(decoupled_decay=True, corrected_weight_decay=True, **given), plain)
    assert (update(lr=0.7, max_lr_snapshot=0.9, decoupled_decay=True, corrected_weight_decay=True) != plain).any()
    penalty = update(lr=lambda step: 0.7, corrected_weight_decay=True, max_lr_snapshot=0.0)  # as a file may have it
    np.testing.assert_array_equal(penalty, update(lr=0.7))


def test_corrected_decay_keeps_to_its_mask() -> None:
    params = {"kernel": jnp.ones(3), "bias": jnp.ones(3)}
    mask = {"kernel": True, "bias": False}
    tx = dialects.timm(
        0.5,
        weight_decay=0.5,
        decoupled_decay=True,
        corrected_weight_decay=True,
        max_lr_snapshot=1.0,
        weight_decay_mask=mask,
    )
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_array_equal(updates["kernel"], np.full(3, -0.125))
    np.testing.assert_array_equal(updates["bias"], np.zeros(3))


def test_caution_without_momentum_does_nothing() -> None:
    gradient = jnp.array([1.0, 0.0, -2.0])
    plain, given = dialects.timm(), dialects.timm(caution=True)
    np.testing.assert_array_equal(
        given.update(gradient, given.init(gradient))[0], plain.update(gradient, plain.init(gradient))[0]
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": lambda step: 0.1}, r"max_lr_snapshot must be given where lr is a schedule or a JAX array"),
        (
            {"lr": jnp.float32(0.1)},
            r"max_lr_snapshot must be given where .* got None for lr=.*; give the lr that timm's",
        ),
        ({"lr": 0.0}, r"max_lr_snapshot must be > 0 and finite with corrected_weight_decay, got None for lr=0\.0"),
        ({"max_lr_snapshot": 0.0}, r"max_lr_snapshot must be > 0 and finite .* got 0\.0 for lr=0\.01"),
        ({"max_lr_snapshot": 1e-40}, "max_lr_snapshot must be > 0 and finite"),
        ({"max_lr_snapshot": jnp.array(jnp.inf)}, "max_lr_snapshot must be > 0 and finite"),
        ({"max_lr_snapshot": -1.0}, r"max_lr_snapshot must be a number ≥ 0, got -1\.0"),
    ],
)
def test_highest_rate_that_cannot_be_one_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        dialects.timm(weight_decay=0.1, decoupled_decay=True, corrected_weight_decay=True, **given)


@pytest.mark.parametrize("name", ["caution", "corrected_weight_decay", "max_lr_snapshot"])
def test_argument_of_timm_that_is_no_switch_or_number_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be"):
        dialects.timm(**{name: "yes"})


# --- Arguments -------------------------------------------------------------------------------------------

# The recordings prove those of the libraries (``test_reference_is_the_recorded_library``). Those of the two that cannot
# be run were read in the source. dqn: Extended Data Table 1 of the paper, and dqn/NeuralQLearner.lua at 9d9b1d1,
# lines 256-277. dreamer: "opt" in dreamerv3/configs.yaml at e3f0224.
OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "torch": dict(lr=0.01, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False),
    "tensorflow": dict(decay=0.9, momentum=0.0, epsilon=1e-10, centered=False),
    "keras": dict(learning_rate=0.001, rho=0.9, momentum=0.0, epsilon=1e-7, centered=False, weight_decay=None),
    "timm": dict(
        lr=0.01,
        alpha=0.9,
        eps=1e-10,
        weight_decay=0,
        momentum=0.0,
        centered=False,
        decoupled_decay=False,
        corrected_weight_decay=False,
        lr_in_momentum=True,
        caution=False,
    ),
    "stable_baselines3": dict(lr=0.01, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False),
    "dqn": dict(learning_rate=2.5e-4, squared_gradient_momentum=0.95, min_squared_gradient=0.01),
    "optax": dict(
        decay=0.9,
        eps=1e-8,
        initial_scale=0.0,
        eps_in_sqrt=True,
        centered=False,
        momentum=None,
        nesterov=False,
        bias_correction=False,
    ),
    "dreamer": dict(lr=4e-5, beta2=0.999, eps=1e-20, beta1=0.9),
}


@pytest.mark.parametrize("name", OWN_DEFAULTS)
def test_arguments_have_the_defaults_of_the_source(name: str) -> None:
    parameters = inspect.signature(BUILD[name]).parameters
    assert {n: p.default for n, p in parameters.items() if n in OWN_DEFAULTS[name]} == OWN_DEFAULTS[name]
    assert list(OWN_DEFAULTS[name]) == [n for n in parameters if n in OWN_DEFAULTS[name]]


def test_optax_dialect_has_the_arguments_of_optax() -> None:
    theirs = inspect.signature(optax.rmsprop).parameters
    ours = inspect.signature(dialects.optax).parameters
    for name in ("learning_rate", "decay", "eps", "initial_scale", "eps_in_sqrt", "centered", "momentum", "nesterov"):
        assert ours[name].default == theirs[name].default
    assert [n for n in ours if n in theirs] == [n for n in theirs if n in ours]


@pytest.mark.parametrize("library", [name for name in LIBRARIES if name != "torch"])
def test_bad_number_is_refused_under_its_own_name(library: str) -> None:
    row = translation.DIALECTS[library]
    for name in ("lr", "alpha", "eps", "momentum"):
        with pytest.raises(ValueError, match=f"^{row.names[name]} must be"):
            row.build(**{row.names["lr"]: 0.1} | {row.names[name]: -1.0})
    with pytest.raises(TypeError, match=r"^centered must be True or False"):
        row.build(**{row.names["lr"]: 0.1}, centered=0.9)


def test_start_that_would_be_forgotten_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^initial_scale must be 0 with bias_correction.*got 0\.5"):
        dialects.optax(0.1, initial_scale=0.5, bias_correction=True)


# --- Translation -----------------------------------------------------------------------------------------

PAIRS = [(source, target) for source in LIBRARIES for target in LIBRARIES]


def run_on(tx: optax.GradientTransformation, grads: np.ndarray) -> tuple[np.ndarray, Any]:
    state, updates = tx.init(jnp.zeros(grads.shape[1:])), []
    for g in grads:
        update, state = tx.update(jnp.asarray(g), state)
        updates.append(update)
    return np.stack(updates), state


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_translation_without_notes_is_the_same_optimizer(x64: None, source: str, target: str) -> None:
    names = translation.DIALECTS[source].names
    port = translate(source, target, **{names["lr"]: 0.1, names["eps"]: 0.04, names["momentum"]: 0.9})
    grads = np.random.default_rng(0).normal(size=(20, 11))
    before = translation.DIALECTS[source].build(**{names["lr"]: 0.1, names["eps"]: 0.04, names["momentum"]: 0.9})
    ours, theirs = run_on(port.build(), grads)[0], run_on(before, grads)[0]
    differs = any("eps is" in note or "starts" in note for note in port.notes)
    tolerance = 1e-5 if "tensorflow" in (source, target) else 1e-12  # TensorFlow rounds numbers to float32
    assert differs != np.allclose(ours, theirs, rtol=tolerance, atol=0)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_there_and_back_is_the_same_setting(source: str, target: str) -> None:
    names = translation.DIALECTS[source].names
    there = translate(source, target, **{names["lr"]: 0.1, names["eps"]: 0.25, names["momentum"]: 0.9})
    back = translate(target, source, **there.arguments)
    for name in ("lr", "alpha", "momentum", "centered"):
        assert back.after[name] == there.before[name]
    power = 1 + there.before["eps_in_sqrt"] - back.after["eps_in_sqrt"]  # Optax keeps the place it is given
    assert back.after["eps"] ** power == there.before["eps"]


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_predicted_ratio_of_steps_comes_true(x64: None, source: str, target: str, size: float) -> None:
    names = translation.DIALECTS[source].names
    setting = {names["lr"]: 0.1, names["alpha"]: 0.9, names["eps"]: 1e-5}
    port = translate(source, target, **setting)
    grads = size * np.sign(np.random.default_rng(0).normal(size=(50, 11)))
    ratio = run_on(port.build(), grads)[0] / run_on(translation.DIALECTS[source].build(**setting), grads)[0]
    predicted = port.step_ratio(size, np.arange(1, 51))
    assert_close(ratio, np.broadcast_to(predicted[:, None], ratio.shape), rtol=1e-5)


def test_changed_place_of_eps_keeps_denominators_within_root_two() -> None:
    port = translate("tensorflow", "keras", learning_rate=0.1)
    assert not any("eps is" in note for note in port.notes)
    port = translate("keras", "torch", epsilon=1e-4)
    sizes = np.logspace(-8, 4, 500)
    ratio = port.step_ratio(sizes, 10**6)
    assert (ratio <= 1 + 1e-12).all()
    assert (ratio >= 2**-0.5 - 1e-12).all()
    assert ratio.min() < 0.71


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("centered", [False, True])
def test_converted_state_goes_on_exactly(x64: None, source: str, target: str, centered: bool) -> None:
    """With eps 0 and the start long past, the two differ in the buffer's unit only, and that is converted."""
    names = translation.DIALECTS[source].names
    setting = {
        names["lr"]: np.float64(0.25),
        names["eps"]: 0.0,
        names["momentum"]: np.float64(0.5),
        "centered": centered,
    }
    setting[names["alpha"]] = np.float64(0.5)
    port = translate(source, target, **setting)
    grads = np.random.default_rng(0).normal(size=(20, 11))
    before = translation.DIALECTS[source].build(**setting)
    _, state = run_on(before, grads)
    after = port.build()
    converted = port.convert_state(state)
    assert_alike(converted, after.init(jnp.zeros(11)))
    for g in grads:
        theirs, state = before.update(jnp.asarray(g), state)
        ours, converted = after.update(jnp.asarray(g), converted)
        assert_close(ours, theirs, rtol=1e-12)


def test_state_under_a_schedule_is_not_converted_where_it_would_be_wrong() -> None:
    port = translate("torch", "keras", lr=lambda step: 0.1, momentum=0.9)
    state = rmsprop(momentum=0.9).init(jnp.ones(2))
    with pytest.raises(ValueError, match="lr must be constant"):
        port.convert_state(state)
    assert translate("torch", "stable_baselines3", lr=lambda step: 0.1).convert_state(rmsprop().init(jnp.ones(2)))


def test_state_at_a_rate_of_zero_is_not_converted() -> None:
    port = translate("torch", "keras", lr=0.0, momentum=0.9)
    with pytest.raises(ValueError, match=r"^lr must be constant and not 0 .*, got 0"):
        port.convert_state(rmsprop(momentum=0.9).init(jnp.ones(2)))


def test_tensorflow_names_the_number_that_it_was_given() -> None:
    with pytest.raises(ValueError, match=r"^decay must be .*, got 1\.1$"):
        dialects.tensorflow(0.1, decay=1.1)
    with pytest.raises(ValueError, match=r"^decay in float32 must be .*, got 1\.0"):
        dialects.tensorflow(0.1, decay=0.99999999)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (("tensorflw", "torch", {}), ValueError, "source must be one of torch, .*got 'tensorflw'"),
        (("torch", "jax", {}), ValueError, "target must be one of torch, .*got 'jax'"),
        (("torch", "keras", {"weight_decay": 0.1}), ValueError, "target keras has no L2 weight decay, got .*0.1"),
        (("keras", "torch", {"weight_decay": 0.1}), ValueError, "target torch has no decoupled weight decay"),
        (("torch", "tensorflow", {"weight_decay": 0.1}), ValueError, "target tensorflow has no L2 weight decay"),
        (("torch", "timm", {"learning_rate": 0.1}), TypeError, "learning_rate"),
        (("torch", "timm", {"maximize": True}), TypeError, "translate does not know maximize=True"),
        (("torch", "timm", {"alpha": 99}), ValueError, "^alpha must be"),
        (("tensorflow", "torch", {}), TypeError, "learning_rate"),
    ],
)
def test_bad_translation_is_refused(call: tuple[str, str, dict[str, Any]], error: Any, message: str) -> None:
    source, target, given = call
    with pytest.raises(error, match=message):
        translate(source, target, **given)


@pytest.mark.parametrize(("kind", "decoupled"), [("torch", False), ("stable_baselines3", False), ("keras", True)])
def test_weight_decay_is_translated_where_the_target_has_its_kind(kind: str, decoupled: bool) -> None:
    port = translate(kind, "timm", weight_decay=0.1)
    assert port.arguments["weight_decay"] == 0.1
    assert port.arguments["decoupled_decay"] == decoupled
