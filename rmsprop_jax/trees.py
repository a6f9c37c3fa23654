"""Do gradients, parameters and state belong together? The error that names the path where they do not.

A leaf of the parameters has the shape and the kind of its gradient; a slot has the dtype that ``init`` gives too.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax.arguments import shown
from rmsprop_jax.codes import is_encoded
from rmsprop_jax.state import RMSPropState, is_array, is_trainable, kind, slot_dtype


def is_none(x: Any) -> bool:
    """Whether ``x`` is ``None``, for ``is_leaf``."""
    return x is None


# --- One tree ------------------------------------------------------------------------------------------------


def check_params(params: optax.Params) -> None:
    """Raises at the first array of integers or bools. Random keys, functions and flags have no slots."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if is_array(leaf) and not is_trainable(leaf) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} must be floating or complex, got {leaf.dtype}; leave it out with "
                "optax.masked, or make it None"
            )


def checked_state(state: Any, kept: Mapping[str, bool]) -> RMSPropState:
    """Returns ``state`` with an int32 ``step``, if it has the slots that are ``kept`` and no others."""
    if not isinstance(state, RMSPropState):
        raise ValueError(
            f"state must be the RMSPropState that init returned, got {type(state).__name__}; take it out of the "
            "state of a chain, and restore a checkpoint into what init returns"
        )
    for name, cause in (("grad_avg", "centered"), ("momentum_buffer", "momentum")):
        if state.square_avg is not None and (getattr(state, name) is None) == kept[name]:
            raise ValueError(
                f"state.{name} is {'None' if kept[name] else 'not None'}, so the state belongs to a "
                f"transformation with a different setting of {cause}; call init again or keep the setting"
            )
    return state._replace(step=checked_step(state.step))


def checked_step(step: Any) -> jax.Array:
    """The number of updates as ``init`` gives it, an int32 scalar; integers of a different width are converted."""
    if isinstance(step, jax.Array) and step.dtype == jnp.int32 and not step.shape:
        return step
    if isinstance(step, int) and not isinstance(step, bool):
        step = np.asarray(step)
    if not hasattr(step, "dtype") or not jnp.issubdtype(step.dtype, jnp.integer):
        got = step.dtype if hasattr(step, "dtype") else shown(step)
        raise TypeError(
            f"state.step must be an int32 scalar as init gives it, got {got}; a narrow float stops counting "
            "(bfloat16 at 256), so leave it out when you cast a state, or count again from a number that you know"
        )
    if step.shape:
        raise ValueError(
            f"state.step must be an int32 scalar as init gives it, got shape {step.shape}; update many states at once "
            "with jax.vmap"
        )
    largest = jnp.iinfo(jnp.int32).max
    if jnp.iinfo(step.dtype).max > largest:
        step = step.clip(max=largest)
    counted: jax.Array = step.astype(jnp.int32)
    return counted


# --- One tree and another --------------------------------------------------------------------------------------


def flatten_like(name: str, tree: Any, updates: optax.Updates, structure: Any) -> list[Any]:
    """The part of ``tree`` that belongs to each gradient."""
    try:
        parts: list[Any] = structure.flatten_up_to(tree)
    except ValueError:
        difference = _first_difference("updates", updates, name, tree, "gradient")
        raise ValueError(f"updates must have the structure of {name}, but {difference}") from None
    return parts


def check_prefix(name: str, prefix: Any, params: optax.Params) -> None:
    """Raises unless ``prefix`` is like ``params`` or a prefix of it."""
    try:
        jax.tree.map(lambda *_: None, prefix, params)
    except ValueError:
        difference = _first_difference(name, prefix, "params", params, "counterpart")
    except SystemError:  # JAX's error for a tree that is nested too deeply
        difference = f"it is nested deeper than params: {shown(prefix)}"
    else:
        return
    raise ValueError(f"{name} must be like params or a prefix of it, but {difference}") from None


def _first_difference(prefix_name: str, prefix: Any, name: str, tree: Any, part: str) -> str:
    """Says where ``prefix`` is not a prefix of ``tree``; ``part`` is what a leaf of the tree lacks there."""
    given = [path for path, _ in jax.tree_util.tree_leaves_with_path(prefix, is_leaf=is_none)]
    expected = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_none)]
    reached = {path[:depth] for path in expected for depth in range(len(path) + 1)}
    covered = set(given)
    for path in expected:
        if not any(path[:depth] in covered for depth in range(len(path) + 1)):
            return f"{name}{jax.tree_util.keystr(path)} has no {part} in {prefix_name}"
    for path in given:
        if path not in reached:
            return f"{prefix_name}{jax.tree_util.keystr(path)} has no counterpart in {name}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(prefix, is_leaf=is_none):
        if leaf is None and path not in expected:
            return f"{prefix_name}{jax.tree_util.keystr(path)} is None"
    return f"{shown(jax.tree.structure(prefix), 120)} is not {shown(jax.tree.structure(tree), 120)}"


# --- Leaf by leaf --------------------------------------------------------------------------------------------


def check_leaves(
    updates: optax.Updates,
    gradients: list[Any],
    params: list[Any] | None,
    slots: Mapping[str, list[Any]],
    accumulator_dtype: np.dtype | None,
) -> None:
    """Raises at the first gradient whose parameter or slot is not what ``init`` would have given it.

    ``gradients`` are the leaves of ``updates``; ``params`` and ``slots`` hold the part that belongs to each.
    """
    for i, g in enumerate(gradients):
        if g is None:
            continue
        param = None if params is None else params[i]
        if param is not None and not _is_like(g, param):
            raise _mismatch(updates, i, "params", param)
        for name, parts in slots.items():
            slot = parts[i]
            if not _is_like(g, slot):
                raise _mismatch(updates, i, f"state.{name}", slot)
            dtype = _expected_dtype(accumulator_dtype, g, param, slots["square_avg"][i])
            if slot.dtype != dtype:
                raise TypeError(
                    f"state.{name}{_path(updates, i)} has dtype {slot.dtype}, but init gives {dtype}; convert it with "
                    "astype, or build the transformation with the accumulator_dtype that you want"
                )


def _expected_dtype(accumulator_dtype: np.dtype | None, g: Any, param: Any, square_avg: Any) -> np.dtype:
    """The dtype in which ``init`` makes a slot. Without the parameter, only its lower limit is known: float32."""
    if param is None and accumulator_dtype is None:
        return slot_dtype(square_avg.dtype, None)
    return slot_dtype((g if param is None else param).dtype, accumulator_dtype)


def _is_like(g: Any, part: Any) -> bool:
    """Whether ``part`` is an array of the shape and the kind of ``g``: real or complex."""
    is_plain = is_array(part) and not is_encoded(part)
    return is_plain and g.shape == part.shape and kind(g.dtype) is kind(part.dtype) is not None


def _mismatch(updates: optax.Updates, i: int, name: str, part: Any) -> ValueError | TypeError:
    """The error for gradient number ``i``, which does not fit ``part`` of the tree ``name``."""
    g, path = jax.tree.leaves(updates, is_leaf=is_none)[i], _path(updates, i)
    if part is None or isinstance(part, optax.MaskedNode):
        return ValueError(
            f"updates{path} is a gradient, but {name}{path} has no slot for it; init gives one to every floating or "
            "complex array that params have"
        )
    if is_encoded(part):
        return ValueError(
            f"{name}{path} is in {part.codes.dtype}; update it with storage.compress, or give "
            "storage.decode(state).inner_state, which is in float32"
        )
    if not is_array(part):
        return ValueError(f"updates{path} is one array, but {name}{path} is {shown(part)}")
    if g.shape != part.shape:
        return ValueError(f"updates{path} has shape {g.shape}, but {name}{path} has shape {part.shape}")
    return TypeError(f"updates{path} has dtype {g.dtype}, but {name}{path} has dtype {part.dtype}")


def _path(updates: optax.Updates, i: int) -> str:
    """The path of gradient number ``i``."""
    return jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(updates, is_leaf=is_none)[i][0])
