"""Checkpoints of TensorFlow 1: the slots of ``tf.compat.v1.train.RMSPropOptimizer`` in, and out again.

TensorFlow is not imported. A checkpoint has each slot under the name of its variable and the name of the optimizer. The
second slot and the third have a number. Which slot has which number depends on ``centered``.

Source: TensorFlow 2.21, ``tensorflow/python/training/rmsprop.py`` (``_create_slots``) and ``slot_creator.py``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import numpy as np
import optax

from rmsprop_jax.arguments import check_flag, shown
from rmsprop_jax.checkpoints.named import build_optimizer, check_functions, checked_names, slots_by_name
from rmsprop_jax.checkpoints.slots import count_of
from rmsprop_jax.checkpoints.variables import exported, parameter_of
from rmsprop_jax.dialects import tensorflow

__all__ = ["from_tensorflow", "to_tensorflow"]

_EXAMPLE_OF_NAMES = "[v.op.name for v in tf.compat.v1.trainable_variables()]"
_GLOBAL_STEP = "global_step"


def from_tensorflow(
    variables: Mapping[str, Any],
    names: Sequence[str],
    to_params: Callable[[dict[str, np.ndarray]], chex.ArrayTree],
    *,
    learning_rate: optax.ScalarOrSchedule,
    decay: optax.ScalarOrSchedule = 0.9,
    momentum: optax.ScalarOrSchedule = 0.0,
    epsilon: optax.ScalarOrSchedule = 1e-10,
    centered: bool = False,
    name: str = "RMSProp",
    scope: str = "",
    step: int | None = None,
) -> tuple[optax.GradientTransformationExtraArgs, optax.OptState]:
    """The transformation and the state that continue a run of TensorFlow 1 in JAX.

    The transformation is ``dialects.tensorflow`` with the arguments given here, since a checkpoint holds no
    hyperparameters. The state is what ``tx.init`` makes, with TensorFlow's numbers in it. For a variable ``v``::

        step            ← global_step
        square_avg      ← v/RMSProp, or max(v/RMSProp − v/RMSProp_1², 0) if centered
        grad_avg        ← v/RMSProp_1    if centered
        momentum_buffer ← v/RMSProp_1, or v/RMSProp_2 if centered

    The centered line is computed in float64. TensorFlow keeps a buffer without momentum too, with the last step in it.
    It says nothing about the next step then, and the state has none.

    Args:
      variables: ``{name: array}`` with everything in the checkpoint: ``reader.get_tensor(name)`` for every name in
        ``reader.get_variable_to_shape_map()``, where ``reader = tf.train.load_checkpoint(path)``. The model and the
        shadows of ``ExponentialMovingAverage`` may be in it.
      names: of all variables that the optimizer trained, in any order, without ``:0``. A partitioned variable has one
        name, as in the checkpoint.
      to_params: from ``{name: array}``, with all ``names`` and no others, to the tree that the JAX model trains. It
        may rename, transpose, reshape, split and join, but not cast or compute.
      learning_rate: that of the optimizer, a number or a schedule, which is read at the number of updates so far, as
        TensorFlow's schedules read ``global_step``.
      decay: that of the optimizer.
      momentum: that of the optimizer.
      epsilon: that of the optimizer.
      centered: whether the optimizer was centered.
      name: the ``name`` of the optimizer.
      scope: the variable scope around ``minimize`` or ``apply_gradients``, if there was one. It comes first in the
        name of every slot.
      step: the number of updates so far, if it is not under ``global_step``.

    Returns:
      ``(tx, state)``. The state has the structure and the dtypes of ``tx.init(params)`` (at least float32; a float64
      file needs ``jax_enable_x64``, or is rounded to float32) and shares no memory with ``variables``.

    Raises:
      TypeError: if an argument or a variable has the wrong type.
      ValueError: if a slot is missing, a slot in the checkpoint belongs to none of ``names`` or does not fit
        ``centered``, numbers are not finite or cannot be those of a run, or ``to_params`` does more than rearrange.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax.checkpoints import from_tensorflow
      >>> checkpoint = {
      ...     "conv/kernel": np.ones((1, 2), np.float32),
      ...     "conv/kernel/RMSProp": np.array([[4.0, 9.0]], np.float32),
      ...     "conv/kernel/RMSProp_1": np.array([[0.1, 0.2]], np.float32),
      ...     "global_step": np.int64(7),
      ... }
      >>> tx, state = from_tensorflow(
      ...     checkpoint, ["conv/kernel"], lambda named: {"kernel": named["conv/kernel"].T},
      ...     learning_rate=0.1, momentum=0.9,
      ... )
      >>> print(state.step, state.square_avg["kernel"].ravel(), state.momentum_buffer["kernel"].ravel())
      7 [4. 9.] [0.1 0.2]
    """
    check_functions(to_params=to_params)
    centered = check_flag("centered", centered)
    tx = tensorflow(learning_rate, decay, momentum, epsilon, centered=centered)
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables must be a dict from names to arrays, got {type(variables).__name__}")
    slot_names = {
        variable: _slot_names(variable, centered, name, scope) for variable in checked_names(names, _EXAMPLE_OF_NAMES)
    }
    _check_all_are_used(variables, slot_names, centered, name)
    has_buffer = tx.init(np.zeros((), np.float32)).momentum_buffer is not None
    updates = _step(variables, step)
    parameters = []
    for variable, names_of_slots in slot_names.items():
        slots = {slot: (repr(full), variables[full]) for slot, full in names_of_slots.items()}
        parameter = parameter_of(variable, updates, slots)
        kept = {slot: x for slot, x in parameter.slots.items() if has_buffer or slot != "momentum_buffer"}
        _check_like_variable(variable, parameter.shape, variables)
        parameters.append(parameter._replace(slots=kept))
    return build_optimizer(parameters, to_params, [tx])


def _slot_names(variable: str, centered: bool, name: str, scope: str) -> dict[str, str]:
    """The name of each slot in a checkpoint, by the field of the state that holds it."""
    for argument, value in (("name", name), ("scope", scope)):
        if not isinstance(value, str):
            raise TypeError(f"{argument} must be a string, got {shown(value)}")
    first = "/".join([part for part in (scope.strip("/"), variable, name) if part])
    if centered:
        return {"square_avg": first, "grad_avg": f"{first}_1", "momentum_buffer": f"{first}_2"}
    return {"square_avg": first, "momentum_buffer": f"{first}_1"}


def _check_all_are_used(
    variables: Mapping[str, Any], slot_names: Mapping[str, Mapping[str, str]], centered: bool, name: str
) -> None:
    """Raises unless the slots in a checkpoint are exactly those of ``names``."""
    expected = [full for names_of_slots in slot_names.values() for full in names_of_slots.values()]
    found = [key for key in variables if isinstance(key, str) and re.search(rf"/{re.escape(name)}(_\d+)?$", key)]
    missing = [full for full in expected if full not in variables]
    if missing:
        hint = (
            f"it has {shown(found[:3], 200)}; which names, name, scope and centered fit them?"
            if found
            else f"no name in it ends with {name!r}; give the name of the optimizer as name="
        )
        raise ValueError(f"variables has no {missing[0]!r}, and {hint}")
    extra = sorted(set(found) - set(expected))
    if extra:
        raise ValueError(
            f"variables has the slot {extra[0]!r}, which belongs to none of names with centered={centered}; give all "
            "variables that the optimizer trained, or take the slots of other optimizers out of variables"
        )


def _check_like_variable(variable: str, shape: tuple[int, ...], variables: Mapping[str, Any]) -> None:
    """Raises if a checkpoint has the variable itself, and in another shape than its slots."""
    own = getattr(variables.get(variable), "shape", shape)
    if tuple(own) != shape:
        raise ValueError(f"the slots of {variable!r} have shape {shape}, but it has shape {tuple(own)}")


def _step(variables: Mapping[str, Any], step: int | None) -> int:
    if step is not None:
        return count_of("step", step)
    if _GLOBAL_STEP not in variables:
        raise ValueError(
            f"variables has no {_GLOBAL_STEP!r}; give the number of updates so far, at which schedules are read, as "
            "step="
        )
    return count_of(f"{_GLOBAL_STEP!r} of variables", variables[_GLOBAL_STEP])


def to_tensorflow(
    state: optax.OptState,
    names: Sequence[str],
    from_params: Callable[[chex.ArrayTree], Mapping[str, Any]],
    *,
    centered: bool = False,
    name: str = "RMSProp",
    scope: str = "",
) -> dict[str, np.ndarray]:
    """The inverse of :func:`from_tensorflow`: the variables that continue the run in TensorFlow 1.

    For a variable ``v``::

        global_step            ← step, an int64
        v/RMSProp              ← square_avg, or square_avg + grad_avg² if centered (computed in float64)
        v/RMSProp_1            ← grad_avg           if centered
        v/RMSProp_1 (centered: _2) ← momentum_buffer, or zeros without momentum, where TensorFlow does not read it

    A loop loads them into a graph that was made as usual::

        for variable in tf.compat.v1.global_variables():
            if variable.op.name in slots:
                variable.load(slots[variable.op.name], session)

    A state from :func:`from_tensorflow` comes back bit for bit, but for a centered average of squares, which comes back
    within 2 ulp, and for a buffer without momentum.

    Args:
      state: a state of one RMSProp transformation, or of a chain with one in it.
      names: of the variables, as for :func:`from_tensorflow`.
      from_params: from a tree like the trained one, with NumPy arrays, to ``{name: array}``: the inverse of
        ``to_params``. It may not cast or compute either.
      centered: whether the optimizer that is to continue is centered.
      name: as for :func:`from_tensorflow`.
      scope: as for :func:`from_tensorflow`.

    Returns:
      ``{name: array}`` with new arrays in the dtype of ``state``.

    Raises:
      TypeError: if an argument or a part of ``state`` has the wrong type.
      ValueError: if ``state``, ``names``, ``from_params`` and ``centered`` do not fit together, or if ``state`` holds
        NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> from rmsprop_jax.checkpoints import to_tensorflow
      >>> state = dialects.tensorflow(0.1).init({"kernel": jnp.zeros((1, 2))})
      >>> to_tensorflow(state, ["w"], lambda params: {"w": params["kernel"]})["w/RMSProp"]
      array([[1., 1.]], dtype=float32)
    """
    check_functions(from_params=from_params)
    variables = checked_names(names, _EXAMPLE_OF_NAMES)
    centered = check_flag("centered", centered)
    step, slots = slots_by_name(state, from_params, variables)
    result: dict[str, np.ndarray] = {}
    for variable in variables:
        kept = slots[variable]
        has_buffer = "momentum_buffer" in kept
        arrays = exported(variable, kept, centered=centered, momentum=has_buffer)
        arrays.setdefault("momentum_buffer", np.zeros_like(arrays["square_avg"]))
        result |= {full: arrays[slot] for slot, full in _slot_names(variable, centered, name, scope).items()}
    return result | {_GLOBAL_STEP: np.array(step, np.int64)}
