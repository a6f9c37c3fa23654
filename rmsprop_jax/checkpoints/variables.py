"""Variables of Keras and TensorFlow: may a state hold what a file has under their names, and what does a file need?

Both libraries write variables under names, the slots of the optimizer among them, and in both the average of squares
stays one if it is centered. A message calls a variable by the name that it has in the file.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from rmsprop_jax.arguments import shown
from rmsprop_jax.checkpoints.slots import (
    SLOTS,
    Parameter,
    array_of,
    average_of_squares,
    check_slot,
    check_slots,
    variance,
)
from rmsprop_jax.state import is_array

__all__ = ["array_of_variable", "exported", "parameter_of", "real_array_of"]

_SETTING_OF = {"grad_avg": "centered", "momentum_buffer": "momentum > 0"}


# --- In ----------------------------------------------------------------------------------------------------


def array_of_variable(where: str, value: Any) -> np.ndarray:
    """A variable as a NumPy array of numbers.

    Args:
      where: what the message calls the variable.
      value: an array, or what NumPy makes one of: a tensor on the CPU, a data set of h5py.

    Raises:
      TypeError: if it is anything else, or an array with a mask, which a state cannot hold.
    """
    if not is_array(value):
        raise TypeError(f"{where} must be an array, got {type(value).__name__}: {shown(value)}")
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(value)
    except Exception:  # every library has its own for a tensor that NumPy cannot read
        raise TypeError(f"{where} must be an array that NumPy can read, got {shown(value)}") from None
    # HDF5 has no bfloat16: Keras stores two bytes without a type.
    return array_of(where, array.view(jnp.bfloat16) if array.dtype == np.dtype("V2") else array)


def real_array_of(where: str, slot: str, value: Any) -> np.ndarray:
    """A variable that a slot can hold: floating, finite, and not negative in ``square_avg``.

    Raises:
      TypeError: if it is anything but a real floating array.
      ValueError: if numbers in it are not finite, or negative in ``square_avg``.
    """
    array = array_of_variable(where, value)
    if array.dtype.kind == "c":
        raise TypeError(f"{where} must be a real floating array, got {array.dtype}")
    check_slot(where, slot, array)
    if not np.isfinite(array).all():
        raise ValueError(f"{where} is infinite somewhere; take a checkpoint from before the run diverged")
    with np.errstate(over="ignore"):
        rounded = array.astype(jnp.result_type(array))
    if not np.isfinite(rounded).all():
        raise ValueError(f"{where} has numbers that are infinite in {rounded.dtype}; switch jax_enable_x64 on")
    return array


def parameter_of(name: str, step: int, variables: Mapping[str, tuple[str, Any]]) -> Parameter:
    """A parameter with its slots, as :class:`rmsprop_jax.RMSPropState` holds them.

    Args:
      name: of the parameter.
      step: the number of its updates.
      variables: by field name, ``square_avg`` among them: what the message calls the variable, and the variable.

    Raises:
      TypeError: if a variable is anything but a real floating array.
      ValueError: if numbers are not finite, or negative in ``square_avg``; if shapes differ; or if an average of
        squares is less than the square of the average, which no centered run can reach.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax.checkpoints.variables import parameter_of
      >>> slots = {"square_avg": ("w_velocity", np.float32([5.0])), "grad_avg": ("w_average", np.float32([2.0]))}
      >>> print(parameter_of("w", 7, slots).slots["square_avg"])
      [1.]
    """
    slots = {slot: real_array_of(where, slot, value) for slot, (where, value) in variables.items()}
    first, shape = variables["square_avg"][0], slots["square_avg"].shape
    for slot, array in slots.items():
        if array.shape != shape:
            raise ValueError(
                f"{variables[slot][0]} has shape {array.shape}, but {first} has shape {shape}; all slots of a "
                "parameter are like it"
            )
    check_slots(name, slots, None)
    dtype = slots["square_avg"].dtype
    if "grad_avg" in slots:
        slots["square_avg"] = variance(name, slots["square_avg"], slots["grad_avg"])
    return Parameter(name, 0, shape, dtype, step, slots)


# --- Out ---------------------------------------------------------------------------------------------------


def exported(name: str, slots: Mapping[str, np.ndarray], *, centered: bool, momentum: bool) -> dict[str, np.ndarray]:
    """The slots of a parameter in the units of the libraries, after a check that they are those of the setting.

    Args:
      name: of the parameter.
      slots: arrays by field name, as ``checkpoints.named`` reads them from a state.
      centered: whether the optimizer that is to continue is centered.
      momentum: whether it has momentum.

    Raises:
      ValueError: if a slot is missing, or one is there that the optimizer does not have.
    """
    square_avg = slots["square_avg"]
    kept = {"square_avg": True, "grad_avg": centered, "momentum_buffer": momentum}
    if square_avg.size == 0:  # an empty parameter does not tell which other slots it has
        slots = {slot: square_avg for slot in SLOTS if kept[slot]}
    for slot in SLOTS:
        if (slot in slots) != kept[slot]:
            raise ValueError(
                f"the state of {name!r} has {'a' if slot in slots else 'no'} {slot}, but the optimizer that is to "
                f"continue {'has' if kept[slot] else 'does not have'} {_SETTING_OF[slot]}; give it the settings of "
                "the run"
            )
    if centered:
        slots = {**slots, "square_avg": average_of_squares(name, square_avg, slots["grad_avg"])}
    return {slot: np.array(slots[slot], order="C") for slot in SLOTS if slot in slots}
