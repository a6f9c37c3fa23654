"""The slots of one parameter: what a file says about them, and whether a state can hold them.

This room knows neither frameworks nor trees. Its last section converts the slot ``square_avg`` of a centered state,
which is a variance here and an average of squares in other libraries.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax.arguments import shown
from rmsprop_jax.state import RMSPropState

__all__ = [
    "SCHEDULE_COUNTS",
    "SLOTS",
    "Parameter",
    "array_of",
    "average_of_squares",
    "check_slot",
    "check_slots",
    "count_of",
    "dtype_of",
    "largest_count",
    "scaled",
    "shape_and_dtype",
    "variance",
]

SLOTS = RMSPropState._fields[1:]  # all fields but the step

# The field in which a state of Optax counts the updates that a schedule reads. Every other count is one of something
# else: of updates that were not finite, of gradients that are accumulated, of a plateau.
SCHEDULE_COUNTS = {
    "CompressState": "step",
    "ScaleByScheduleState": "count",
    "InjectHyperparamsState": "count",
    "InjectStatefulHyperparamsState": "count",
    "WrappedScheduleState": "count",
    "MultiStepsState": "gradient_step",
}


# --- What a file says about a parameter ----------------------------------------------------------------------


class Parameter(NamedTuple):
    """One parameter of a file.

    Attributes:
      name: what identifies it.
      group: the number of the group whose hyperparameters it has.
      shape: of the parameter and of each of its slots.
      dtype: floating or complex.
      step: the number of its updates; ``None`` if it never had a gradient.
      slots: its arrays as :class:`rmsprop_jax.RMSPropState` holds them, by field name.
    """

    name: str
    group: int
    shape: tuple[int, ...]
    dtype: np.dtype
    step: int | None
    slots: Mapping[str, np.ndarray]


def shape_and_dtype(name: str, params: Mapping[str, Any] | None) -> tuple[tuple[int, ...], np.dtype | None] | None:
    """What ``params`` says about a parameter.

    Args:
      name: of the parameter.
      params: ``{name: array or shape}``.

    Returns:
      Its shape and its dtype, ``None`` where ``params`` holds a shape; or ``None`` if ``params`` has no such name.

    Raises:
      TypeError: if it is neither an array nor a shape, or if it is neither floating nor complex.
    """
    if not isinstance(params, Mapping | None):
        raise TypeError(f"params must be a dict from names to arrays or shapes, got {type(params).__name__}")
    if params is None or name not in params:
        return None
    value = params[name]
    try:
        shape = tuple(operator.index(size) for size in getattr(value, "shape", value))
        if min(shape, default=0) < 0:
            raise ValueError("a negative size")
        dtype = dtype_of(value) if hasattr(value, "dtype") else None
    except (TypeError, ValueError):
        raise TypeError(f"params[{name!r}] must be an array or a shape, got {shown(value)}") from None
    if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"params[{name!r}] must be floating or complex, got {dtype}")
    return shape, dtype


def dtype_of(array: Any) -> np.dtype:
    """The dtype of an array, or of a tensor whose dtype ends with NumPy's or JAX's name: ``library.bfloat16``."""
    dtype: np.dtype = jnp.dtype(str(array.dtype).rpartition(".")[2])
    return dtype


# --- May a state hold these numbers? -----------------------------------------------------------------------


def array_of(where: str, value: Any) -> np.ndarray:
    """An array of JAX or NumPy as one of NumPy, in this machine's byte order.

    Args:
      where: what the message calls the value.
      value: anything.

    Raises:
      TypeError: if it is no array, has a mask, or holds anything but numbers.
    """
    if not isinstance(value, np.ndarray | np.generic | jax.Array):
        raise TypeError(f"{where} must be an array, got {type(value).__name__}: {shown(value)}")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{where} must be an array without a mask, which would be lost; give its filled(...)")
    if not jnp.issubdtype(value.dtype, jnp.number) and value.dtype != bool:
        raise TypeError(f"{where} must be an array of numbers, got {value.dtype}")
    try:
        array = np.asarray(value)
    except RuntimeError:  # its memory was donated, or a part of it is in another process
        raise ValueError(f"{where} must be an array that this process has the whole of") from None
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def count_of(where: str, value: Any) -> int:
    """A number of updates: an integer from 0 to 2³¹ − 2, what an int32 can hold and still count.

    Raises:
      TypeError: if it is anything but an integer, or a scalar array of one.
      ValueError: if it is out of range.
    """
    if isinstance(value, bool | float | complex):
        raise TypeError(f"{where} must be an integer, got {shown(value)}")
    number = np.asarray(value, object) if type(value) is int else array_of(where, value)
    if number.dtype.kind not in "iuO" or number.shape:
        raise TypeError(f"{where} must be an integer scalar, got {number.dtype} {number.shape}")
    if not 0 <= number < largest_count(np.dtype(np.int32)):
        raise ValueError(f"{where} must be a number of updates from 0 to 2³¹ − 2, got {number}")
    return int(number)


def check_slot(where: str, slot: str, value: Any) -> None:
    """Raises unless ``value`` is a floating or complex array without NaN, and not negative in ``square_avg``.

    Args:
      where: what the message calls the value.
      slot: the name of a field of the state.
      value: anything.

    Raises:
      TypeError: if it is anything but such an array.
      ValueError: if numbers in it are NaN or negative.
    """
    is_array = isinstance(value, np.ndarray | np.generic | jax.Array)
    if not (is_array and jnp.issubdtype(value.dtype, jnp.inexact)):
        raise TypeError(f"{where} must be a floating or complex array, got {getattr(value, 'dtype', shown(value))}")
    if value.dtype.kind == "V" and not value.dtype.isnative:  # a bfloat16, for which NumPy has no swap
        raise TypeError(f"{where} must be in this machine's byte order, got {value.dtype}")
    array = np.asarray(value)
    if np.isnan(array).any():
        raise ValueError(
            f"{where} has {np.isnan(array).sum()} NaN among its {array.size} numbers; take a checkpoint from before "
            "the run diverged"
        )
    if slot == "square_avg" and any((part < 0).any() for part in _components(array)):
        raise ValueError(f"{where} is negative somewhere, but it is an average of squares; look for what wrote it")


def check_slots(
    name: str,
    slots: Mapping[str, np.ndarray],
    expected: tuple[tuple[int, ...], np.dtype | None] | None,
) -> None:
    """Raises unless a state can hold the slots of a parameter, and they fit each other and what ``params`` says.

    Args:
      name: of the parameter.
      slots: arrays by field name, ``square_avg`` among them.
      expected: what :func:`shape_and_dtype` returned.

    Raises:
      TypeError: as :func:`check_slot`.
      ValueError: as :func:`check_slot`; also for numbers that become infinite in the state, and if shapes or kinds
        (real or complex) differ.
    """
    shape, dtype = slots["square_avg"].shape, slots["square_avg"].dtype
    for slot, array in slots.items():
        where = f"{slot!r} of {name!r}"
        check_slot(where, slot, array)
        with np.errstate(over="ignore"):
            rounded = array.astype(jnp.result_type(array))
        if (np.isinf(rounded) & ~np.isinf(array)).any():
            raise ValueError(f"{where} has numbers that are infinite in {rounded.dtype}; switch jax_enable_x64 on")
        if array.shape != shape or np.iscomplexobj(array) != np.iscomplexobj(slots["square_avg"]):
            raise ValueError(
                f"{where} is {array.dtype} {array.shape}, but its 'square_avg' is {dtype} {shape}; all slots of a "
                "parameter are like it"
            )
    if expected is None:
        return
    expected_shape, expected_dtype = expected
    if expected_shape != shape:
        raise ValueError(
            f"the state of {name!r} has shape {shape}, but params[{name!r}] has shape {expected_shape}; give the "
            "parameters of the same run, and names in the order of the optimizer's groups"
        )
    if expected_dtype is not None and (expected_dtype.kind == "c") != (dtype.kind == "c"):
        raise ValueError(
            f"the state of {name!r} is {dtype}, but params[{name!r}] is {expected_dtype}; give the parameters of the "
            "same run"
        )


def largest_count(dtype: np.dtype) -> int:
    """The number at which a counter of ``dtype`` stops: one more is the same number there, or does not exist."""
    if jnp.issubdtype(dtype, jnp.integer):
        return int(jnp.iinfo(dtype).max)
    return int(2 ** (jnp.finfo(dtype).nmant + 1))


# --- A centered state: variance here, average of squares elsewhere -------------------------------------------


def variance(name: str, square_avg: np.ndarray, grad_avg: np.ndarray, weight: float = 1.0) -> np.ndarray:
    """The variance of a gradient, from the averages of its square and of itself.

    ::

        variance ← max(square_avg / weight − (grad_avg / weight)², 0)

    It is computed in float64, for each component of complex numbers. The difference can be slightly negative by
    rounding; the nearest variance is 0. If it is negative by more, one of the averages belongs to something else.

    Args:
      name: of the parameter.
      square_avg: any shape, floating or complex.
      grad_avg: like ``square_avg``.
      weight: the sum of the weights in both averages: 1, or 1 − alphaᵗ if they are to be bias-corrected.

    Returns:
      An array in the dtype of ``square_avg``, but at least float32.

    Raises:
      ValueError: if ``square_avg`` is less than ``grad_avg²`` by more than rounding, or both are infinite somewhere.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax.checkpoints.slots import variance
      >>> print(variance("weight", square_avg=np.float32([5.0, 0.25]), grad_avg=np.float32([2.0, 0.5000001])))
      [1. 0.]
    """
    # The averages round 1/(1 − alpha) times on their way, for alpha = 0.9999 this is 10⁴ times. In half precision they
    # stall, and any difference may be rounding.
    tolerance = min(1e4 * float(jnp.finfo(square_avg.dtype).eps), 1.0)
    for v, m in zip(_components(square_avg), _components(grad_avg), strict=True):
        v, m = np.asarray(v, np.float64), np.asarray(m, np.float64)
        is_impossible = m * m * (1 - tolerance) > weight * (v + _SMALLEST)
        if is_impossible.any():
            where = np.unravel_index(np.argmax(is_impossible), is_impossible.shape)
            raise ValueError(
                f"'square_avg' of {name!r} is {v[where]:.4g} where its 'grad_avg' is {m[where]:.4g}, but an average of "
                "squares is no less than the square of the average; were the two swapped?"
            )
    result = _componentwise(lambda v, m: np.maximum(v - m * (m / weight), 0) / weight, square_avg, grad_avg)
    if np.isnan(result).any():
        raise ValueError(
            f"'square_avg' and 'grad_avg' of {name!r} are both infinite, so that their variance is NaN; take a "
            "checkpoint from before the run diverged"
        )
    return result


_SMALLEST = float(np.finfo(np.float32).tiny)  # below it, g² is 0 in float32


def average_of_squares(name: str, deviation: np.ndarray, grad_avg: np.ndarray, weight: float = 1.0) -> np.ndarray:
    """The inverse of :func:`variance`: ``square_avg ← weight · (deviation + grad_avg²)``.

    Args:
      name: of the parameter.
      deviation: the variance.
      grad_avg: like ``deviation``, bias-corrected if ``weight`` is not 1.
      weight: as in :func:`variance`.

    Raises:
      ValueError: if the result is infinite where ``deviation`` is not.
    """
    result = _componentwise(lambda v, m: weight * (v + m * m), deviation, grad_avg)
    if (np.isinf(result) & ~np.isinf(deviation)).any():
        raise ValueError(
            f"square_avg + grad_avg² of {name!r}, which is the average of squares, is infinite in {result.dtype}; take "
            "a checkpoint from before the run diverged"
        )
    return result


def scaled(array: np.ndarray, factor: float) -> np.ndarray:
    """``factor · array`` in the dtype of ``array``, but at least float32; computed in float64."""
    return _componentwise(lambda x: factor * x, array)


def _components(array: np.ndarray) -> tuple[np.ndarray, ...]:
    """Real and imaginary part of a complex array."""
    return (array.real, array.imag) if np.iscomplexobj(array) else (array,)


def _componentwise(function: Callable[..., np.ndarray], *arrays: np.ndarray) -> np.ndarray:
    """``function`` of each component in float64, rounded to the dtype of the first array, but at least float32."""
    with np.errstate(invalid="ignore", over="ignore"):
        result = np.empty(arrays[0].shape, np.promote_types(arrays[0].dtype, np.float32))
        for target, *parts in zip(_components(result), *map(_components, arrays), strict=True):
            target[...] = function(*(np.asarray(part, np.float64) for part in parts))
    return result
