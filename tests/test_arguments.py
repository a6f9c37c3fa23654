"""The gate: every argument of every public function times what somebody may put there, without compiling anything."""

import inspect
import math
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.typing import ArrayLike, DTypeLike

import rmsprop_jax
from rmsprop_jax import arguments, dialects, recipes, rmsprop, scale_by_rmsprop, transform, translation

# --- What there is: read from the signatures, so that a new function joins by itself ---------------------

KINDS: dict[str, list[Any]] = {
    "number": [optax.ScalarOrSchedule, optax.ScalarOrSchedule | None, chex.Numeric, ArrayLike, float],
    "count": [int],
    "epoch": [chex.Numeric | None],  # of the recipes, which have tests of their own
    "flag": [bool],
    "dtype": [DTypeLike | None],
    "mask": [Any, Any | Callable[[optax.Params], Any], Any | Callable[[optax.Params], Any] | None],
}
# What a parameter without a default gets where another one is tried.
GIVEN = {"number": 0.25, "count": 10, "mask": None}
SMOOTHING = {"alpha", "decay", "rho", "squared_gradient_momentum", "beta1", "beta2"}
EPS = {"eps", "epsilon", "min_squared_gradient"}


def public(module: Any) -> dict[str, Callable[..., Any]]:
    """The functions of a module that make a transformation."""
    name = module.__name__.split(".")[1]
    return {
        f"{name}.{function.__name__}": function
        for _, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and not function.__name__.startswith("_")
        and inspect.signature(function).return_annotation is optax.GradientTransformationExtraArgs
    }


def self_translation(source: str) -> Callable[..., Any]:
    """``translate`` of one dialect into itself, with the arguments that it knows of it."""
    row = translation.DIALECTS[source]

    def translate(**given: Any) -> translation.Translation:
        return translation.translate(source, source, **given)

    signature = inspect.signature(row.build)
    known = [p for p in signature.parameters.values() if p.name in row.names.values()]
    translate.__signature__ = signature.replace(parameters=known)  # type: ignore[attr-defined]
    return translate


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "rmsprop": rmsprop,
    "scale_by_rmsprop": scale_by_rmsprop,
    **public(dialects),
    **{f"recipes.{name}": row.build for name, row in recipes.RECIPES.items()},
}
BUILDERS = FUNCTIONS | {f"translate.{source}": self_translation(source) for source in translation.DIALECTS}


# Numbers of the recipes with a range of their own, which is tested with the recipes.
IN_A_RANGE = {"max_norm", "limit", "clipping", "smallest_norm", "total_frames"}


def kind_of(parameter: inspect.Parameter) -> str:
    if parameter.name in IN_A_RANGE:
        return "in a range"
    return next(kind for kind, annotations in KINDS.items() if parameter.annotation in annotations)


def parameters(kind: str) -> list[tuple[str, str]]:
    return [
        (builder, parameter.name)
        for builder, function in BUILDERS.items()
        for parameter in inspect.signature(function).parameters.values()
        if kind_of(parameter) == kind
    ]


def build(builder: str, **given: Any) -> Any:
    """Calls a function, with something sensible for what has no default."""
    function = BUILDERS[builder]
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    return function(**{p.name: GIVEN[kind_of(p)] for p in needed} | given)


def test_every_argument_of_every_public_function_has_a_kind() -> None:
    for builder, function in BUILDERS.items():
        for parameter in inspect.signature(function).parameters.values():
            assert kind_of(parameter), (builder, parameter)
        build(builder)
    assert {name.split(".")[0] for name in BUILDERS} >= {"rmsprop", "scale_by_rmsprop", "dialects", "recipes"}
    assert set(rmsprop_jax.__all__) >= {"dialects", "recipes", "rmsprop", "scale_by_rmsprop"}


# --- What an argument becomes --------------------------------------------------------------------------------

STEPS = (0, 1, 1000, 2**31 - 1)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What every RMSProp is built from, with the numbers read: at some steps, where they are schedules."""
    calls, original = [], transform.transformation

    def read(number: Any) -> Any:
        if callable(number):
            return [float(number(jnp.int32(step))) for step in STEPS]
        return arguments.known(number)

    def spy(equations: Any, numbers: Any, **options: Any) -> Any:
        start = arguments.known(options.get("initial_scale", 0.0))
        calls.append((equations, {name: read(number) for name, number in numbers.items()}, start))
        return original(equations, numbers, **options)

    monkeypatch.setattr(transform, "transformation", spy)
    monkeypatch.setattr(dialects, "transformation", spy)
    return calls


def what_is_built(built: list[Any], builder: str, **given: Any) -> list[Any]:
    built.clear()
    build(builder, **given)
    return [repr(call) for call in built]  # in which NaN is NaN


# --- Numbers -------------------------------------------------------------------------------------------------


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def generator() -> Iterator[float]:
    yield 0.25


# The value, and the Python number that it stands for, if it is one.
NUMBERS: list[tuple[Any, float | None]] = [
    *((number, float(number)) for number in (0.25, 0.0, 1, 99, 0.999999, -1.0, -1e-300, 1e-40, math.inf, -math.inf)),
    (math.nan, math.nan),
    *(
        (make(number), number)
        for make in (np.array, np.float64, jnp.array)
        for number in (-1.0, 99.0, math.nan, -math.inf)
    ),
    (Fraction(1, 4), 0.25),
    (Fraction(-1, 10), -0.1),
    (Decimal("0.25"), 0.25),
    (Decimal("NaN"), math.nan),
    (Decimal("-1"), -1.0),
]
# A half-precision smoothing constant has lost its value already.
HALVES = [(make(0.25), 0.25) for make in (np.float16, ml_dtypes.bfloat16, jnp.bfloat16, jnp.float16)]
NO_NUMBERS: list[Any] = [
    *(10**400, -(10**400), Fraction(10**400), Decimal("1e400"), Decimal("sNaN")),
    *("0.1", b"1", "x" * 30_000, True, np.True_, np.array(True), jnp.array(True)),
    *([0.1], (0.1,), {0.1}, {"a": 1}, {1: 2, "a": 3}, [], {}, nested(3), nested(10_000)),
    *(np.array([0.1]), np.ones((2, 3)), jnp.ones(2), np.array("0.1"), np.array(None), np.array(Fraction(1, 4))),
    *(1j, np.complex64(1), np.array(1j), jnp.array(1j), jax.random.key(0), jax.random.PRNGKey(0)),
    *(object(), Unshowable(), math, generator(), optax.EmptyState(), optax.MaskedNode()),
    {f"layer{i}": {"w": jnp.ones(3), "b": np.ones(2)} for i in range(1000)},
    [np.ones((100, 100))] * 1000,
]


def accepted(name: str, value: Any, number: float | None) -> bool:
    """Whether an argument called ``name`` takes a number."""
    if number is None or not number >= 0:
        return False
    if name in SMOOTHING:
        return number < 1 and not (hasattr(value, "dtype") and value.dtype.itemsize == 2 and value.dtype.kind != "i")
    if name == "total_frames":
        return GIVEN["count"] <= number < math.inf
    return not (name in EPS and 0 < number < 1e-38)


def assert_refused(name: str, value: Any, call: Callable[[], Any]) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    message = str(raised.value)
    assert message.startswith(name), message
    assert len(message) < 400, message
    assert "\n" not in message
    assert raised.value.__cause__ is None, arguments.shown(value)


@pytest.mark.parametrize(("builder", "name"), parameters("number"))
def test_number_is_what_python_makes_of_it_or_an_error_by_name(built: list[Any], builder: str, name: str) -> None:
    expected: dict[float | None, Any] = {}
    for value, number in NUMBERS + HALVES:
        if accepted(name, value, number):
            if number not in expected:
                expected[number] = what_is_built(built, builder, **{name: number})
            assert what_is_built(built, builder, **{name: value}) == expected[number], arguments.shown(value)
        else:
            assert_refused(name, value, lambda value=value: build(builder, **{name: value}))


@pytest.mark.parametrize(("builder", "name"), parameters("number"))
def test_what_is_no_number_is_an_error_by_name(builder: str, name: str) -> None:
    parameter = inspect.signature(BUILDERS[builder]).parameters[name]
    may_be_schedule = parameter.annotation not in (float, chex.Numeric, ArrayLike)
    may_be_none = parameter.annotation == optax.ScalarOrSchedule | None
    others = ([] if may_be_none else [None]) + ([] if may_be_schedule else [lambda step: 0.1, float])
    for value in NO_NUMBERS + others:
        assert_refused(name, value, lambda value=value: build(builder, **{name: value}))


INTEGERS = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)
FLOATS = (np.float16, np.float32, np.float64, np.longdouble, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize(("builder", "name"), parameters("number"))
def test_scalars_of_every_dtype_are_what_the_python_number_is(built: list[Any], builder: str, name: str) -> None:
    """A quarter and 96 are exact in all of them."""
    expected: dict[float, Any] = {}
    for dtype in INTEGERS + FLOATS:
        whole = dtype in INTEGERS or name == "total_frames"
        number = (0 if name in SMOOTHING else 96) if whole else 0.25
        makers = [dtype, lambda x, dtype=dtype: np.array(x, dtype)]
        if np.dtype(dtype).itemsize < 8:  # 64 bits are switched off
            makers.append(lambda x, dtype=dtype: jnp.array(x, dtype))
        for make in makers:
            if name in SMOOTHING and dtype in FLOATS and np.dtype(dtype).itemsize < 4:
                assert_refused(name, number, lambda make=make, x=number: build(builder, **{name: make(x)}))
                continue
            if number not in expected:
                expected[number] = what_is_built(built, builder, **{name: number})
            assert what_is_built(built, builder, **{name: make(number)}) == expected[number], (dtype, make)


@pytest.mark.parametrize("lr", [np.array(2**40), np.array(2.0**40, np.longdouble), np.array(2**40, np.uint64)])
def test_array_of_64_bits_or_more_is_not_cut(lr: np.ndarray) -> None:
    """XLA takes 32 bits of an integer, and no longdouble at all."""
    tx = rmsprop(lr, alpha=0.0)
    update, _ = tx.update(jnp.ones(1), tx.init(jnp.zeros(1)))
    np.testing.assert_array_equal(update, [-(2.0**40)])


@pytest.mark.parametrize(("builder", "name"), parameters("number"))
def test_traced_number_passes(builder: str, name: str) -> None:
    jax.eval_shape(lambda x: build(builder, **{name: x}) and x, jax.ShapeDtypeStruct((), jnp.float32))
    for struct in (jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((), jnp.complex64)):
        assert_refused(
            name, struct, lambda struct=struct: jax.eval_shape(lambda x: build(builder, **{name: x}) and x, struct)
        )


# --- Counts, flags, dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("builder", "name"), parameters("count"))
def test_count_is_what_python_makes_of_it_or_an_error_by_name(built: list[Any], builder: str, name: str) -> None:
    given = {"unroll_length": 1, "batch_size": 1, "total_steps": 100} if builder == "recipes.torchbeast" else {}
    expected = what_is_built(built, builder, **given | {name: 100})
    for dtype in INTEGERS:
        makers = [dtype, lambda x, dtype=dtype: np.array(x, dtype)]
        if np.dtype(dtype).itemsize < 8:
            makers.append(lambda x, dtype=dtype: jnp.array(x, dtype))
        for make in makers:
            assert what_is_built(built, builder, **given | {name: make(100)}) == expected
    floats = [
        100.0,
        np.float32(100),
        np.array(100.0),
        jnp.array(100.0),
        Fraction(100),
        Decimal(100),
        math.nan,
        math.inf,
    ]
    for value in [*NO_NUMBERS, *floats, None, 0, -1, 2**31, np.int64(2**40), np.array(0), jnp.array(-1), len]:
        assert_refused(name, value, lambda value=value: build(builder, **{name: value}))


def test_count_is_an_int_of_python() -> None:
    for value in (5, np.int8(5), np.array(5, np.uint16), jnp.int8(5)):
        assert type(arguments.check_count("n", value)) is int


@pytest.mark.parametrize(("builder", "name"), parameters("flag"))
def test_flag_is_true_or_false_or_an_error_by_name(built: list[Any], builder: str, name: str) -> None:
    for flag in (True, False):
        assert what_is_built(built, builder, **{name: np.bool_(flag)}) == what_is_built(built, builder, **{name: flag})
    logic = [True, np.True_, np.array(True), jnp.array(True)]
    no_flags = [value for value in NO_NUMBERS if not any(value is flag for flag in logic)]
    for value in [*no_flags, *logic[2:], None, 0, 1, 0.9, "True", lambda: True]:
        assert_refused(name, value, lambda value=value: build(builder, **{name: value}))


@pytest.mark.parametrize(("builder", "name"), parameters("dtype"))
def test_dtype_is_a_real_floating_one_or_an_error_by_name(builder: str, name: str) -> None:
    for value in (None, "bfloat16", jnp.bfloat16, np.float32, np.dtype("float16"), "float8_e4m3fn", jnp.float8_e5m2):
        build(builder, **{name: value})
    no_dtypes = [value for value in NO_NUMBERS if not hasattr(value, "dtype")]
    for value in [*no_dtypes, "foo", "int32", np.int8, bool, "complex64", jnp.complex64, 1, "float64", np.float64]:
        assert_refused(name, value, lambda value=value: build(builder, **{name: value}))


# --- Arguments of methods, and learning rates for checkpoints ------------------------------------------------


@pytest.mark.parametrize(("name", "smallest"), [("gradient", 0.0), ("step", 1.0)])
def test_figures_of_a_step_are_numbers_or_an_error_by_name(name: str, smallest: float) -> None:
    port = translation.translate("tensorflow", "torch", learning_rate=0.1)
    fixed = {"gradient": 1.0, "step": 10}
    expected = port.step_ratio(**fixed | {name: 5.0})
    for dtype in INTEGERS + FLOATS:
        for make in (dtype, lambda x, dtype=dtype: np.array(x, dtype), lambda x, dtype=dtype: [dtype(x)]):
            np.testing.assert_array_equal(port.step_ratio(**fixed | {name: make(5)}).ravel(), expected)
    for value in (Fraction(5), Decimal(5), [Fraction(5)], jnp.array(5), jnp.bfloat16(5), 5):
        np.testing.assert_array_equal(port.step_ratio(**fixed | {name: value}).ravel(), expected)
    assert port.step_ratio(**fixed | {name: [[5.0], [6.0]]}).shape == (2, 1)
    arrays = [value for value in NO_NUMBERS if not is_of_numbers(value)]
    below = [smallest - 0.1, -1, math.nan, [5.0, smallest - 1], np.array(-1), jnp.array([5.0, math.nan])]
    for value in [*arrays, *below, None, len, [5.0, "6"], [[5.0], [5.0, 6.0]]]:
        assert_refused(name, value, lambda value=value: port.step_ratio(**fixed | {name: value}))
    with pytest.raises(TypeError, match=rf"^{name} must be numbers ≥ {smallest:g} that are known here"):
        jax.jit(lambda x: port.step_ratio(**fixed | {name: x}) and x)(5.0)


def is_of_numbers(value: Any) -> bool:
    """Whether something among what is no number is an array of numbers."""
    try:
        array = np.asarray(value)
    except Exception:
        return False
    return array.dtype.kind in "iuf" or (
        array.dtype == object and array.size > 0 and isinstance(array.flat[0], Fraction)
    )


def test_source_and_target_are_names_or_an_error_by_name() -> None:
    for value in [*NO_NUMBERS, None, 1, "tensorflw", len]:
        assert_refused("source", value, lambda value=value: translation.translate(value, "torch"))
        assert_refused("target", value, lambda value=value: translation.translate("torch", value))


def test_learning_rate_for_a_checkpoint_is_a_number_or_an_error_by_name(built: list[Any]) -> None:
    settings = dict(lr=0.5, alpha=0.9, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False)
    file = {
        "state": {0: {"step": 7, "square_avg": np.ones(2)}},
        "param_groups": [{"params": [0], **settings}],
    }

    def rate(lr: Any) -> float:
        built.clear()
        rmsprop_jax.checkpoints.from_torch(file, ["w"], dict, lr=lr)
        result: float = built[-1][1]["lr"]
        return result

    for value in (0.25, np.float16(0.25), Fraction(1, 4), Decimal("0.25"), np.array(0.25), jnp.array(0.25), [0.25]):
        assert rate(value) == 0.25
    assert rate(None) == 0.5
    for value in [v for v in NO_NUMBERS if not isinstance(v, list | tuple)] + [-1.0, math.nan]:
        assert_refused("lr", value, lambda value=value: rate(value))
    for value in ([], [0.1, 0.1], nested(10_000), [None, "x" * 30_000]):
        assert_refused("lr", value, lambda value=value: rate(value))


# --- Names ---------------------------------------------------------------------------------------------------

MANY_LAYERS = dict.fromkeys((f"layer{i}" for i in range(1000)), jnp.ones(3))


@pytest.mark.parametrize("builder", FUNCTIONS)
def test_unknown_argument_says_what_there_is(builder: str) -> None:
    function = BUILDERS[builder]
    for value in (0.1, nested(10_000), MANY_LAYERS):
        assert_refused(function.__name__, value, lambda value=value: build(builder, no_such_argument=value))
    names = list(inspect.signature(function).parameters)
    with pytest.raises(
        TypeError, match=rf"^{function.__name__} has no argument no_such_argument; it takes {', '.join(names)}"
    ):
        build(builder, no_such_argument=1)


@pytest.mark.parametrize(("builder", "name"), [(b, n) for b, n in parameters("number") if n in ("lr", "learning_rate")])
def test_other_name_of_the_learning_rate_has_a_hint(builder: str, name: str) -> None:
    other = {"lr": "learning_rate", "learning_rate": "lr"}[name]
    with pytest.raises(TypeError, match=rf" has no argument {other}; did you mean {name}=0\.1\?"):
        BUILDERS[builder](**{other: 0.1})


@pytest.mark.parametrize("builder", FUNCTIONS)
@pytest.mark.parametrize("others", [(), (1e-3,)])
def test_parameters_in_the_first_place_are_sent_to_init(builder: str, others: tuple[float, ...]) -> None:
    """As torch's optimizers take them."""
    function = BUILDERS[builder]
    few = len(inspect.signature(function).parameters) < 1 + len(others)
    trees = [MANY_LAYERS, [np.ones(2)], jnp.ones(2), generator()]
    for params in trees:
        with pytest.raises(TypeError if few else (TypeError, ValueError)) as raised:
            function(params, *others)
        assert len(str(raised.value)) < 400
        if not few and not isinstance(params, jax.Array):
            assert "parameters go to init and update, as in state = tx.init(params)" in str(raised.value)


def test_parameters_in_the_first_place_beside_a_named_learning_rate() -> None:
    with pytest.raises(TypeError, match=r"^rmsprop takes no parameters, got .*; parameters go to init and update"):
        rmsprop({"w": jnp.ones(3)}, lr=1e-3)


# --- Masks ---------------------------------------------------------------------------------------------------

LAYERS = {f"layer{i}": {"w": np.ones(2, np.float32), "b": np.ones(1, np.float32)} for i in range(100)}
ALL = dict.fromkeys(LAYERS, True)
MASKS: list[tuple[Any, str]] = [
    (ALL | {"layer7": {"w": True}}, "params['layer7']['b'] has no counterpart in weight_decay_mask"),
    (ALL | {"layer7": {"w": True, "b": 1, "c": 1}}, "weight_decay_mask['layer7']['c'] has no counterpart in params"),
    (ALL | {"layer7": 1}, "weight_decay_mask['layer7'] must be True or False, got 1"),
    (ALL | {"layer7": "x" * 30_000}, "weight_decay_mask['layer7'] must be True or False, got 'xxx"),
    (ALL | {"layer7": nested(10_000)}, "nested deeper than params"),
    ("yes", "weight_decay_mask must be True or False, got 'yes'"),
    (lambda params: {**params, "layer7": True, "layer8": None}, "weight_decay_mask['layer8'] is None"),
]


@pytest.mark.parametrize("builder", [b for b, n in parameters("mask") if n == "weight_decay_mask"])
@pytest.mark.parametrize(("mask", "message"), MASKS)
def test_mask_that_misfits_is_named_by_path(builder: str, mask: Any, message: str) -> None:
    numbers = {"weight_decay": 0.1} if "weight_decay" in inspect.signature(BUILDERS[builder]).parameters else {}
    tx = build(builder, weight_decay_mask=mask, **numbers)
    state = jax.eval_shape(tx.init, LAYERS)
    assert_refused("weight_decay_mask", mask, lambda: jax.eval_shape(tx.update, LAYERS, state, LAYERS))
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        jax.eval_shape(tx.update, LAYERS, state, LAYERS)
