"""Is this number, flag or schedule one we can take? The error that says what to do.

Every number of the package passes through one gate. Concrete values are checked. Numbers of Python and NumPy become
floats, and arrays stay arrays, so that a transformation can tell structure (the number 0 means no momentum) from data.
For a tracer, only dtype and shape are checked.
"""

import functools
import inspect
import math
import reprlib
from collections.abc import Callable
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

_INT32_MAX = 2**31 - 1  # what a step counter can reach
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)  # XLA treats what is smaller as 0

# Arguments that mean the same in different frameworks.
_SYNONYMS = (
    ("lr", "learning_rate", "step_size"),
    ("alpha", "decay", "rho", "squared_gradient_momentum", "beta2", "beta_2"),
    ("eps", "epsilon", "min_squared_gradient"),
    ("momentum", "beta1", "beta_1"),
    ("weight_decay", "l2"),
)
_EXECUTION_HINTS = ("foreach", "fused", "capturable", "differentiable")


# --- Numbers ---------------------------------------------------------------------------------------------


def check_number(name: str, value: Any, below: float = math.inf) -> Any:
    """Returns ``value`` as a float, or unchanged if it is a scalar array (NumPy's in float64).

    Raises:
      ValueError: if the number is not in [0, ``below``), or the array is not a scalar.
      TypeError: if ``value`` is neither a real number nor an array of them.
    """
    allowed = "a number ≥ 0" if below == math.inf else f"a number in [0, {below:g})"
    if isinstance(value, jax.Array | np.ndarray):
        _check_scalar(name, value, allowed)
        concrete = _as_float(name, value[()]) if isinstance(value, np.ndarray) else known(value)
        if concrete is not None:
            _check_range(name, concrete, concrete, below, allowed)
        return np.asarray(concrete) if isinstance(value, np.ndarray) else value
    if not _is_real(value):
        raise TypeError(f"{name} must be {allowed} or a scalar array, {_got(value)}{_hint_at_init(value)}")
    number = _as_float(name, value)
    _check_range(name, number, value, below, allowed)
    return number


def check_number_or_schedule(name: str, value: Any, below: float = math.inf) -> Any:
    """Returns a schedule unchanged, and anything else as :func:`check_number` does."""
    return value if callable(value) else check_number(name, value, below)


def check_numbers(name: str, value: Any, at_least: float) -> np.ndarray:
    """Returns real numbers ≥ ``at_least``, one or an array of them, in float64.

    Raises:
      ValueError: if one of them is smaller, or NaN.
      TypeError: if ``value`` holds anything else, or is traced.
    """
    allowed = f"numbers ≥ {at_least:g}"
    try:
        numbers = np.asarray(value)
        if numbers.dtype == object:  # Fraction, Decimal, integers of more than 64 bits
            numbers = np.asarray([check_number(name, number) for number in numbers.flat]).reshape(numbers.shape)
        is_real = _is_real_dtype(numbers.dtype)
    except Exception:  # a tracer; lists of different lengths; something with no number in it
        is_real = False
    if not is_real:
        raise TypeError(f"{name} must be {allowed} that are known here, {_got(value)}")
    numbers = numbers.astype(np.float64)
    if not (numbers >= at_least).all():
        smaller = numbers[~(numbers >= at_least)].flat[0]
        raise ValueError(f"{name} must be {allowed}, got {smaller:g}")
    return numbers


def check_smoothing(name: str, value: Any) -> Any:
    """Returns a smoothing constant, a number in [0, 1), as :func:`check_number` does, or a schedule unchanged.

    Raises:
      ValueError: as :func:`check_number`.
      TypeError: as :func:`check_number`; also for half precision, in which 0.999 is 1 or far from itself.
    """
    if callable(value):
        return value
    if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating) and jnp.finfo(value.dtype).bits < 32:
        raise TypeError(
            f"{name} must not be {value.dtype}, which rounds 0.999 to 1, or far from 0.999; give a Python "
            "number or a float32 array (optax.inject_hyperparams takes hyperparam_dtype=jnp.float32)"
        )
    return check_number(name, value, below=1.0)


def check_eps(name: str, value: Any) -> Any:
    """Returns a number ≥ 0 as :func:`check_number` does, or a schedule unchanged.

    Raises:
      ValueError: as :func:`check_number`; also for a number below float32's smallest normal one, which XLA treats as 0.
      TypeError: as :func:`check_number`.
    """
    checked = check_number_or_schedule(name, value)
    number = known(checked)
    if number is not None and 0 < number < SMALLEST_NORMAL:
        raise ValueError(
            f"{name} must be 0 or at least {SMALLEST_NORMAL:.3g}, the smallest normal number of float32, {_got(value)}"
            "; XLA treats anything in between as 0"
        )
    return checked


def check_count(name: str, value: Any, at_least: int = 1) -> int:
    """Returns a whole number from ``at_least`` to 2³¹ − 1, what a step counter can reach, as an int.

    Raises:
      ValueError: if the number is out of range.
      TypeError: if ``value`` is not a whole number. A float or a tracer is not one, whatever its value.
    """
    allowed = f"a whole number from {at_least} to 2³¹ − 1"
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{name} must be {allowed} that is known when the transformation is built, got a tracer")
    is_array = isinstance(value, np.ndarray) or (isinstance(value, jax.Array) and _is_concrete(value))
    if is_array and value.shape == () and _is_real_dtype(value.dtype):
        value = np.asarray(value)[()]
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be {allowed}, {_got(value)}{_hint_at_init(value)}")
    count = int(value)
    if not at_least <= count <= _INT32_MAX:
        raise ValueError(f"{name} must be {allowed}, {_got(value)}")
    return count


def known(number: Any) -> float | None:
    """Returns a checked number as a float, or ``None`` if its value cannot be read here (a tracer, a schedule)."""
    if isinstance(number, jax.Array):
        return float(np.asarray(number)) if _is_concrete(number) else None
    return float(number) if isinstance(number, float | np.ndarray) else None


def is_zero(number: Any) -> bool:
    """Whether a checked number is the Python number 0, for which nothing is built. An array may change."""
    return isinstance(number, float) and number == 0


def check_flag(name: str, value: Any) -> bool:
    """Returns ``value`` as a bool, if it is True or False.

    Raises:
      TypeError: if it is anything else, 0 and 1 included.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, {_got(value)}")
    return bool(value)


def check_transformation(name: str, value: Any) -> optax.GradientTransformationExtraArgs:
    """Returns an Optax transformation as one that takes keyword arguments.

    Raises:
      TypeError: if ``value`` has no ``init`` and ``update``.
    """
    if not callable(getattr(value, "init", None)) or not callable(getattr(value, "update", None)):
        raise TypeError(f"{name} must be an Optax gradient transformation, such as rmsprop(0.01), {_got(value)}")
    return optax.with_extra_args_support(value)


def check_mask(name: str, value: Any) -> Any:
    """Returns a mask unchanged, if it is not the parameters themselves. Its leaves are checked beside the parameters.

    Raises:
      TypeError: if an array is in it.
    """
    hint = _hint_at_init(value)
    if hint:
        raise TypeError(
            f"{name} must be a tree of True and False, or a function from params to one, {_got(value)}{hint}"
        )
    return value


def check_returned(name: str, value: Any) -> Any:
    """Returns what the function ``name`` returned, unless that is nothing.

    Raises:
      TypeError: if it is ``None``.
    """
    if value is None:
        raise TypeError(f"the function {name} returned None; return a tree of bools like params")
    return value


def check_float_dtype(name: str, value: Any) -> np.dtype | None:
    """Returns a real floating dtype as a ``np.dtype``, or None for None.

    Raises:
      ValueError: if it is float64 and ``jax_enable_x64`` is off.
      TypeError: if it is not a dtype of real floating numbers.
    """
    if value is None:
        return None
    try:
        dtype: np.dtype = jnp.dtype(value)
    except Exception:  # NumPy shows what it cannot take, which may fail
        raise TypeError(f"{name} must be a real floating dtype such as 'bfloat16', or None, {_got(value)}") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be a real floating dtype or None, got {dtype.name}")
    if dtype == jnp.float64 != jnp.result_type(float):
        raise ValueError(f"{name} float64 needs jax_enable_x64, got it switched off")
    return dtype


def _check_scalar(name: str, value: Any, allowed: str) -> None:
    if not _is_real_dtype(value.dtype):
        raise TypeError(f"{name} must be {allowed} or a scalar array, got an array of dtype {value.dtype}")
    if value.shape:
        raise ValueError(
            f"{name} must be {allowed} or a scalar array, got an array of shape {value.shape}; to try many values at "
            "once, use jax.vmap over a function that builds the transformation"
        )


def _check_range(name: str, number: float, value: Any, below: float, allowed: str) -> None:
    if 0 <= number < below or number == below == math.inf:
        return
    is_percentage = below < math.inf and 50 <= number < 100
    hint = f"; it is a fraction, did you mean {number / 100:g}?" if is_percentage else ""
    raise ValueError(f"{name} must be {allowed}, got {shown(value)}{hint}")


def _is_concrete(value: jax.Array) -> bool:
    """Whether the value can be read here: not of a tracer, nor of an array that other processes hold a part of."""
    return not isinstance(value, jax.core.Tracer) and value.is_fully_addressable


def _is_real(value: Any) -> bool:
    is_number = isinstance(value, Real | Decimal) or (isinstance(value, np.generic) and _is_real_dtype(value.dtype))
    return is_number and not isinstance(value, bool | np.bool_)


def _is_real_dtype(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _as_float(name: str, value: Any) -> float:
    try:
        number = float(value)
        fits = not math.isinf(number) or bool(value == number)  # Decimal("1e400") becomes infinite
    except (OverflowError, ValueError):  # 10**400; a signaling NaN of decimal
        fits = False
    if not fits:
        raise ValueError(f"{name} must fit into a float, {_got(value)}")
    return number


# --- Messages --------------------------------------------------------------------------------------------


def shown(value: Any, length: int = 80) -> str:
    """The representation of ``value`` on one line, cut to ``length`` characters; never raises."""
    short = reprlib.Repr()
    short.maxlevel = 3
    short.maxother = short.maxstring = short.maxlong = length
    try:
        text = " ".join(short.repr(value).split())
    except Exception:  # a failing representation must not hide the error that it explains
        text = object.__repr__(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _got(value: Any) -> str:
    return f"got {shown(value)} ({type(value).__name__})"


def _hint_at_init(value: Any) -> str:
    """Advice for users who pass parameters to a transformation, as torch's optimizers take them."""
    try:
        leaves = [] if isinstance(value, jax.Array | np.ndarray) and not value.shape else jax.tree.leaves(value)
    except Exception:  # nested too deeply (a SystemError), or with keys that cannot be sorted
        leaves = []
    is_tree = inspect.isgenerator(value) or any(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
    return "; parameters go to init and update, as in state = tx.init(params)" if is_tree else ""


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def explain_arguments(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Makes the error for an argument that ``function`` does not have say what to write instead.

    It knows what other frameworks call the same thing, torch's hints about execution, and parameters given first.
    """
    signature = inspect.signature(function)
    names = tuple(signature.parameters)

    @functools.wraps(function)
    def wrapped(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        for given in kwargs:
            if given not in names:
                raise TypeError(_unknown_argument(function.__name__, given, kwargs[given], names))
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            hint = _hint_at_init(args[0]) if args else ""
            if hint:
                raise TypeError(f"{function.__name__} takes no parameters, {_got(args[0])}{hint}") from None
        return function(*args, **kwargs)

    return wrapped


def _unknown_argument(function: str, given: str, value: Any, names: tuple[str, ...]) -> str:
    if given in _EXECUTION_HINTS:
        return (
            f"{given}={shown(value)} tells torch how to execute the update; under XLA every update is "
            "compiled, fused and differentiable, so it means nothing here: leave it out"
        )
    synonyms = next((group for group in _SYNONYMS if given in group), ())
    meant = next((name for name in synonyms if name in names), None)
    hint = f"did you mean {meant}={shown(value)}?" if meant else f"it takes {', '.join(names) or 'none'}"
    return f"{function} has no argument {given}; {hint}"
