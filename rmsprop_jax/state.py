"""The state of an RMSProp: what is in it, and how to find, replace and merge it inside any optimizer state.

Read from the top down: the state itself; which leaves of the parameters get a slot, and in which dtype; the states
inside the state of a chain, a partition or a wrapper; the names of leaves.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax

__all__ = ["RMSPropState"]


class RMSPropState(NamedTuple):
    """What RMSProp remembers between two updates. The fields are the keys of torch's per-parameter state.

    Attributes:
      step: number of updates so far, an int32 scalar. (torch counts per parameter, in float32.)
      square_avg: the average of ``g²``, leaf for leaf like ``params``, in the accumulator dtype. If
        ``centered``, it is the average of ``(g − grad_avg)²``, which is the variance; torch's slot of the same
        name is then ``square_avg + grad_avg²``. With ``bias_correction`` it is the corrected average.
      grad_avg: the average of ``g``, like ``params``; ``None`` unless ``centered``.
      momentum_buffer: the accumulated steps, like ``params``. The learning rate is not in it, except in dialects that
        put it there. ``None`` unless there is momentum.
    """

    step: chex.Array
    square_avg: chex.ArrayTree
    grad_avg: chex.ArrayTree | None
    momentum_buffer: chex.ArrayTree | None


jax.export.register_namedtuple_serialization(RMSPropState, serialized_name="rmsprop_jax.RMSPropState")


class Settings(NamedTuple):
    """What an RMSProp was built with, as far as its state does not tell: the numbers as given, schedules unread.

    Attributes:
      lr: the learning rate; 1 for :func:`rmsprop_jax.scale_by_rmsprop`, which has none.
      eps: the number in the denominator.
      eps_in_sqrt: whether ``eps`` is under the root.
    """

    lr: Any
    eps: Any
    eps_in_sqrt: bool


class Answer(NamedTuple):
    """What an RMSProp says about itself.

    Attributes:
      state: the state that it was asked with.
      settings: what it was built with.
      equations: what it applies to every array, in order.
      bias_correction: whether its averages are bias-corrected.
      initial_scale: what ``square_avg`` starts from.
    """

    state: Any
    settings: Settings
    equations: tuple[Callable[..., Any], ...]
    bias_correction: bool
    initial_scale: Any


class SettingsQuery:
    """Asks every RMSProp inside a transformation what it was built with.

    The call is ``tx.update(updates, state, params, rmsprop_settings=query)``. Optax passes keyword arguments on,
    through chains, partitions, masks and injected hyperparameters. Each RMSProp that receives the query adds its
    answer and returns updates and state untouched.

    Attributes:
      answers: at least one :class:`Answer` for each RMSProp. (Optax may call a transformation more than once.)
    """

    def __init__(self) -> None:
        """Starts without answers."""
        self.answers: list[Answer] = []


# --- Which leaves get a slot, and in which dtype -------------------------------------------------------------


def is_array(x: Any) -> bool:
    """Whether ``x`` is an array or stands for one (``jax.ShapeDtypeStruct``); a type such as np.float32 does not."""
    return hasattr(x, "dtype") and hasattr(x, "shape") and not isinstance(x, type)


def is_trainable(leaf: Any) -> bool:
    """Whether a leaf of the parameters gets slots: a floating or complex array or Python number."""
    return isinstance(leaf, float | complex) or (is_array(leaf) and kind(leaf.dtype) is not None)


def is_absent(x: Any) -> bool:
    """Whether a position in a tree is empty: ``None``, or a mask for what a different transformation updates."""
    return x is None or isinstance(x, optax.MaskedNode)


@functools.cache
def kind(dtype: np.dtype) -> type[float] | type[complex] | None:
    """``float`` or ``complex``; ``None`` for integers, bools, random keys and all else."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return complex
    return float if jnp.issubdtype(dtype, jnp.floating) else None


@functools.cache
def arithmetic_dtype(dtype: np.dtype) -> np.dtype:
    """The real dtype to compute in for arrays or numbers of ``dtype``: float32 at least."""
    wide = kind(dtype) is not None and jnp.finfo(dtype).bits >= 32
    return jnp.finfo(dtype).dtype if wide else jnp.dtype(jnp.float32)


def slot_dtype(param_dtype: np.dtype, accumulator_dtype: np.dtype | None) -> np.dtype:
    """The dtype in which the slots of a parameter are stored."""
    dtype = arithmetic_dtype(param_dtype) if accumulator_dtype is None else accumulator_dtype
    if kind(param_dtype) is complex:
        dtype = jnp.dtype(jnp.complex128 if arithmetic_dtype(dtype) == jnp.float64 else jnp.complex64)
    return dtype


def widened(x: Any) -> jax.Array:
    """``x`` in its own dtype, but float32 at least."""
    dtype = jnp.result_type(x)
    return jnp.asarray(x, dtype if kind(dtype) is complex else arithmetic_dtype(dtype))


def componentwise(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """``function`` of real arrays, or of the real and of the imaginary parts of complex ones."""
    if not jnp.iscomplexobj(arrays[0]):
        return function(*arrays)
    return jax.lax.complex(function(*(x.real for x in arrays)), function(*(x.imag for x in arrays)))


# --- States inside an optimizer state ------------------------------------------------------------------------


ONE_STATE_EACH = "give the state of one optimizer for one set of parameters"


def is_state(x: Any) -> bool:
    """Whether ``x`` is an :class:`RMSPropState`."""
    return isinstance(x, RMSPropState)


_GIVE_A_STATE = (
    "give the state that an optimizer of rmsprop_jax returned (of optax.chain all of it), and restore a checkpoint "
    "into what init returns"
)


def find_states(name: str, opt_state: optax.OptState, advice: str = _GIVE_A_STATE) -> dict[str, RMSPropState]:
    """Every :class:`RMSPropState` in ``opt_state``, which the message calls ``name``, by its path.

    Raises:
      ValueError: if there is none, when the message ends with ``advice``; or if JAX cannot go through ``opt_state``.
    """
    check_containers(name, opt_state)
    nodes = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_state)
    states = {f"{name}{jax.tree_util.keystr(path)}": node for path, node in nodes if is_state(node)}
    if not states:
        raise ValueError(f"{name} must contain an RMSPropState, got {type(opt_state).__name__} without one; {advice}")
    return states


def check_containers(name: str, tree: Any) -> None:
    """Raises unless JAX can go through ``tree``, which the message calls ``name``.

    In a tree without end, or with keys that cannot be sorted, JAX raises errors that say nothing about the place.
    """
    stack: list[tuple[tuple[Any, ...], Any]] = [((name,), tree)]
    while stack:
        path, node = stack.pop()
        if len(path) > _DEEPEST:
            raise ValueError(
                f"{name} must not be nested deeper than {_DEEPEST} containers, as in {'/'.join(map(str, path))[:80]}"
            )
        if isinstance(node, dict):
            if type(node) is dict:  # JAX keeps the order of others
                _check_sortable(path, node)
            children: Any = node.items()
        elif isinstance(node, tuple) and hasattr(node, "_fields"):
            children = zip(node._fields, node, strict=True)
        elif isinstance(node, list | tuple):
            children = enumerate(node)
        else:
            continue
        stack += [((*path, key), child) for key, child in children if isinstance(child, dict | list | tuple)]


def _check_sortable(path: tuple[Any, ...], node: dict[Any, Any]) -> None:
    try:
        sorted(node)
    except TypeError:
        kinds = sorted({type(key).__name__ for key in node})[:5]
        raise ValueError(
            f"{'/'.join(map(str, path))} has keys that cannot be sorted, of {', '.join(kinds)}; JAX sorts the keys of "
            "a dict"
        ) from None


_DEEPEST = 100


def step_of(state: RMSPropState) -> chex.Array | None:
    """The step of ``state``, taken out of the box that Flax's nnx keeps it in; ``None`` if the state has none."""
    return next(iter(jax.tree.leaves(state.step)), None)


def replace_states(
    opt_state: optax.OptState,
    state: Callable[[RMSPropState], Any],
    other: Callable[[Any], Any] = lambda leaf: leaf,
) -> optax.OptState:
    """``opt_state`` with ``state`` applied to each :class:`RMSPropState`, and ``other`` to each leaf outside them."""
    return jax.tree.map(lambda node: state(node) if is_state(node) else other(node), opt_state, is_leaf=is_state)


def unboxed(tree: Any) -> Any:
    """``tree`` with the arrays in place of the variables that Flax's nnx keeps them in."""
    nnx = sys.modules.get("flax.nnx")  # whoever has a variable has loaded it
    if nnx is None:
        return tree
    return jax.tree.map(
        lambda x: next(iter(jax.tree.leaves(x)), None) if isinstance(x, nnx.Variable) else x,
        tree,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def merge_trees(name: str, trees: Sequence[Any], path: Any = ()) -> Any:
    """One tree out of several, in each of which ``optax.MaskedNode`` stands for what is in another.

    That is how ``optax.partition`` divides the slots of its parts. Where one tree has ``None``, the value of the other
    is used.

    Raises:
      ValueError: if two trees hold the same leaf, or differ in a container. The message calls the state ``name``.
    """
    trees = [tree for tree in trees if not isinstance(tree, optax.MaskedNode)]
    nothing = None if trees else optax.MaskedNode()
    trees = [tree for tree in trees if tree is not None]
    if len(trees) < 2:
        return trees[0] if trees else nothing
    levels = [jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x, tree=tree: x is not tree) for tree in trees]
    children, structures = zip(*levels, strict=True)
    if structures[0] == jax.tree.structure(0) or len(set(structures)) > 1:
        raise ValueError(
            f"{name} has two RMSPropStates that differ in the container or both have the leaf "
            f"{leaf_key(leaf_name(path))}; {ONE_STATE_EACH}"
        )
    merged = [
        merge_trees(name, [child for _, child in siblings], (*path, *siblings[0][0]))
        for siblings in zip(*children, strict=True)
    ]
    return jax.tree.unflatten(structures[0], merged)


# --- Names of leaves -----------------------------------------------------------------------------------------

# The names on the way from the root of a tree to a leaf. Leaves are matched by name, so that a state may be in other
# containers than the parameters: Flax wraps the leaves of both, each in its own class.
Name = tuple[str, ...]


def leaf_name(path: Any) -> Name:
    """The name of the leaf at a path of ``jax.tree_util``."""
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def leaf_key(name: Name) -> str:
    """A name as one string: ``dense/kernel``. Parameters that are one bare array are ``params``."""
    return "/".join(name) or "params"
