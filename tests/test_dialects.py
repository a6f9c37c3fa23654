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
    decay_weights,
    decay_weights_decoupled,
    divide_eps_inside,
    divide_eps_outside,
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
# What we refuse: two arguments of timm, and bias correction together with a starting value, which Optax inflates.
LEFT_OUT = {
    ("timm", "lr_changes_caution"),
    ("timm", "lr_changes_corrected"),
    ("optax", "bias_correction_centered"),
    ("optax", "everything"),
}
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


def joined(library: str, prefix: str, axes: int = 1) -> np.ndarray:
    """The entries of all parameters along the last of ``axes`` axes; the rule knows no shapes, and compiles faster."""
    arrays, _ = load(library)
    parts = [arrays[key] for key in sorted(arrays) if key.startswith(prefix)]
    return np.concatenate([part.reshape(*part.shape[: axes - 1], -1) for part in parts], axis=-1)


def recording(library: str, case: str, dtype: str) -> Arrays:
    """What the library had after the recorded steps: "params" and its slots, "step" among them if it counts."""
    slots = {key.split("/")[2] for key in load(library)[0] if key.startswith(f"{dtype}/{case}/")}
    if library == "tensorflow" and not load(library)[1]["cases"][case]["arguments"].get("momentum"):
        slots.remove("momentum")  # TensorFlow keeps it without momentum too: the last step
    arrays = {slot: joined(library, f"{dtype}/{case}/{slot}/", axes=2) for slot in slots}
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
    return numbers | {row.names["lr"]: lambda step: wrap(recorded["lr"][int(step)])}


def run(library: str, case: str, dtype: str) -> Arrays:
    """What our dialect has after the recorded steps, in the terms of the library."""
    recorded_steps = load(library)[1]["recorded_steps"]
    given = arguments(library, case, dtype)
    tx = translation.DIALECTS[library].build(**given)
    params = jnp.asarray(joined(library, f"{dtype}/initial/"))
    gradients = joined(library, f"{dtype}/gradients/", axes=2)
    state, moments = tx.init(params), []
    for step in range(1, 1 + max(recorded_steps)):
        updates, state = tx.update(jnp.asarray(gradients[step - 1]), state, params)
        params = optax.apply_updates(params, updates)
        if step in recorded_steps:
            unbias = 1 - given["decay"] ** step if given.get("bias_correction") else 1.0
            moments.append({"params": params} | in_their_terms(library, state, unbias))
    return jax.tree.map(lambda *xs: np.stack(xs), *moments)


def in_their_terms(library: str, state: RMSPropState, unbias: float) -> dict[str, Any]:
    """Our slots as the library keeps them: the average of g² also if centered, and averages uncorrected."""
    keys = [key.split("/") for key in load(library)[0]]
    theirs = {key[2] for key in keys if len(key) == 4} - {"params"}
    slots = {"step": np.full(len({key[3] for key in keys if len(key) == 4}), state.step, np.float32)}
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
    return largest_error(run(library, case, dtype), recording(library, case, dtype), scale=scale)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("library", "case"), cases(*LIBRARIES))
def test_dialect_is_the_recorded_library(request: pytest.FixtureRequest, library: str, case: str, dtype: str) -> None:
    if dtype == "float64":
        request.getfixturevalue("x64")
    assert_close(run(library, case, dtype), recording(library, case, dtype), rtol=TOLERANCE[dtype])


# What the frameworks call the arguments of the reference, and what each of them fixes.
WORDS = {"learning_rate": "lr", "decay": "alpha", "rho": "alpha", "epsilon": "eps", "lr_in_momentum": "lr_in_buffer"}
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
    gradients = joined(library, "float64/gradients/", axes=2)
    start = joined(library, "float64/initial/")
    moments = list(reference.rmsprop(start, gradients, lr=lambda step: recorded["lr"][step], **setting))
    names = {name: ours for ours, names in SLOTS.items() for name in names} | {"params": "param"}
    expected = recording(library, case, "float64")
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


FLIPS = [
    *((library, "eps_0.01", flip_place_of_eps) for library in LIBRARIES),
    *((library, "default", flip_starting_value) for library in LIBRARIES),
    *((library, "lr_changes", flip_order_of_lr) for library in LIBRARIES),
    *((library, "weight_decay", flip_kind_of_decay) for library in ("torch", "keras", "timm", "stable_baselines3")),
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


@pytest.mark.parametrize("name", ["caution", "corrected_weight_decay"])
def test_what_timm_has_and_we_have_not_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        dialects.timm(**{name: True})


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
        lr_in_momentum=True,
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
