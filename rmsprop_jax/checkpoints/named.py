"""Arrays under names, and the state of an optimizer for a parameter tree: one into the other, for any framework.

Parameters are identified by name in both directions. The user's function for the weights, from ``{name: array}`` to
``params`` or back, also carries every slot of the state. One more call gives it arrays that are each filled with a tag;
the tags in its result tell which array each part comes from.

Read from the top down: two checks of arguments; names to tree; tree to names; the trace, which both use.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax.arguments import shown
from rmsprop_jax.checkpoints.slots import SLOTS, Parameter, check_slot, largest_count
from rmsprop_jax.state import (
    RMSPropState,
    find_states,
    is_absent,
    is_array,
    is_trainable,
    leaf_key,
    leaf_name,
    merge_trees,
    replace_states,
)

__all__ = ["build_optimizer", "check_functions", "checked_names", "slots_by_name"]


def checked_names(names: Iterable[str], example: str) -> list[str]:
    """Returns ``names`` as a list.

    Raises:
      TypeError: if it holds anything but strings; the message suggests ``example``.
      ValueError: if it holds a name twice.
    """
    is_list = isinstance(names, Iterable) and not isinstance(names, str | bytes)
    result: list[Any] = list(names) if is_list else [None]
    if not all(isinstance(name, str) for name in result):
        raise TypeError(f"names must be a list of strings, such as {example}, got {shown(names)}")
    if len(set(result)) < len(result):
        twice = next(name for name in result if result.count(name) > 1)
        raise ValueError(f"names must be different from each other, got {shown(twice)} twice")
    return result


def check_functions(**functions: Any) -> None:
    """Raises unless every argument can be called.

    Raises:
      TypeError: with the name of the first one that cannot.
    """
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {shown(function)}")


# --- From names to a tree ----------------------------------------------------------------------------------


def build_optimizer(
    parameters: Sequence[Parameter],
    to_params: Callable[[dict[str, np.ndarray]], chex.ArrayTree],
    transformations: Sequence[optax.GradientTransformation],
) -> tuple[optax.GradientTransformationExtraArgs, optax.OptState]:
    """The transformation for all groups of parameters, and its state with the numbers of a file.

    One group keeps its transformation. Several become ``optax.partition``, labeled ``"group0"``, ``"group1"``, ...

    Args:
      parameters: all of them, in any order.
      to_params: from ``{name: array}`` to the tree that is trained. It may only rearrange.
      transformations: one for each group, in the order of the groups.

    Returns:
      ``(tx, state)``. The state is what ``tx.init`` makes, with copies of the slots in its dtypes; every count in it
      is the step. A slot that the file does not hold starts from what ``init`` starts from.

    Raises:
      ValueError: if the steps differ, ``to_params`` does more than rearrange, a leaf belongs to two groups, or the
        transformation keeps anything but an ``RMSPropState`` and counts.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax import rmsprop
      >>> from rmsprop_jax.checkpoints.named import build_optimizer
      >>> from rmsprop_jax.checkpoints.slots import Parameter
      >>> slots = {"square_avg": np.array([1.0, 2.0], np.float32)}
      >>> weight = Parameter("weight", group=0, shape=(2,), dtype=np.dtype(np.float32), step=7, slots=slots)
      >>> tx, state = build_optimizer([weight], lambda named: {"kernel": named["weight"]}, [rmsprop(0.1)])
      >>> print(state.step, state.square_avg["kernel"])
      7 [1. 2.]
    """
    step = _common_step(parameters)

    def build(arrays: Iterable[np.ndarray]) -> chex.ArrayTree:
        return _tree_of(to_params, {p.name: array for p, array in zip(parameters, arrays, strict=True)})

    template = build(np.zeros(p.shape, p.dtype) for p in parameters)
    groups = _group_of_each_leaf(build, parameters)
    tx = optax.with_extra_args_support(transformations[0])
    if len(transformations) > 1:
        labels = jax.tree.unflatten(jax.tree.structure(template), [f"group{group}" for group in groups])
        tx = optax.partition({f"group{group}": part for group, part in enumerate(transformations)}, labels)
    like = jax.eval_shape(tx.init, template)
    states = find_states("the state of the transformation", like, _BUILD_ONE).values()
    kept = [slot for slot in SLOTS if any(getattr(state, slot) is not None for state in states)]
    kept_by_group = [_kept_by(transformation) for transformation in transformations]
    for parameter in parameters:
        _check_kept(parameter, kept_by_group[parameter.group])

    def filled(parameter: Parameter, slot: str) -> np.ndarray:
        if slot in parameter.slots:
            return parameter.slots[slot]
        return _first_slot(parameter, slot, transformations[parameter.group])

    return tx, _filled(like, step, {slot: build(filled(p, slot) for p in parameters) for slot in kept})


def _kept_by(transformation: optax.GradientTransformation) -> set[str]:
    """The slots that a transformation keeps for each of its parameters."""
    like = jax.eval_shape(transformation.init, np.zeros((), np.float32))
    states = find_states("the state of the transformation", like, _BUILD_ONE).values()
    return {slot for slot in SLOTS for state in states if getattr(state, slot) is not None}


def _check_kept(parameter: Parameter, kept: set[str]) -> None:
    for slot in parameter.slots:
        if slot not in kept:
            raise ValueError(
                f"the file has a {slot} of {parameter.name!r}, but the transformation keeps none; build it with the "
                "setting of the run"
            )


_BUILD_ONE = "build the transformation with rmsprop_jax.rmsprop, scale_by_rmsprop or a function of dialects"


def _common_step(parameters: Sequence[Parameter]) -> int:
    first: dict[int, Parameter] = {}
    for p in parameters:
        if p.step is not None:
            first.setdefault(p.step, p)
    if len(first) > 1:
        p, other, *_ = first.values()
        raise ValueError(
            f"{p.name!r} is at step {p.step}, but {other.name!r} at step {other.step}; here all parameters share one "
            "step, so set every step in the file to the one at which schedules are to be read"
        )
    return next(iter(first), 0)


def _tree_of(
    to_params: Callable[[dict[str, np.ndarray]], chex.ArrayTree], arrays: dict[str, np.ndarray]
) -> chex.ArrayTree:
    """``to_params(arrays)`` with ``None`` for the flags, functions and random keys that a module may have."""
    try:
        tree = to_params(dict(arrays))
    except KeyError as error:
        if error.args and error.args[0] in arrays:
            raise
        raise ValueError(
            f"to_params asks for {shown(error.args[0])}, which is not one of names: {shown(list(arrays), 200)}"
        ) from error

    def is_number(leaf: Any) -> bool:  # integers too: the trace refuses them
        is_numeric_array = is_array(leaf) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        return is_trainable(leaf) or is_numeric_array

    return jax.tree.map(lambda leaf: leaf if is_number(leaf) else None, tree)


def _group_of_each_leaf(
    build: Callable[[Iterable[np.ndarray]], chex.ArrayTree], parameters: Sequence[Parameter]
) -> list[int]:
    """For each leaf of the tree the group of the parameters that it is made of."""

    def leaves(arrays: list[np.ndarray]) -> list[tuple[str, Any]]:
        tree = build(arrays)
        return [(_leaf(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]

    groups = []
    for where, numbers in _trace("to_params", [(repr(p.name), p.shape) for p in parameters], leaves):
        first, *others = [parameters[i] for i in numbers] or parameters[:1]  # an empty leaf fits any group
        for other in others:
            if other.group != first.group:
                raise ValueError(
                    f"to_params makes {where} of {first.name!r} of group {first.group} and {other.name!r} of group "
                    f"{other.group}; a leaf has the hyperparameters of one group, so keep the two apart"
                )
        groups.append(first.group)
    return groups


def _first_slot(parameter: Parameter, slot: str, transformation: optax.GradientTransformation) -> np.ndarray:
    """What ``init`` puts into the slot of a parameter."""
    dtype = np.promote_types(parameter.dtype, np.float32)
    state, *_ = find_states("the state", transformation.init(np.zeros((), dtype))).values()
    first = getattr(state, slot)
    return np.full(parameter.shape, 0 if first is None else first, dtype)


def _filled(like: optax.OptState, step: int, trees: Mapping[str, chex.ArrayTree]) -> optax.OptState:
    """``like``, which holds shapes and dtypes, with the arrays of ``trees``; every count in it is ``step``."""

    def count(like: Any) -> jax.Array:
        if like.shape or not jnp.issubdtype(like.dtype, jnp.integer):
            raise ValueError(
                f"the transformation keeps a {like.dtype} array of shape {like.shape}, for which the file has no slot; "
                "its state may hold only RMSPropStates and counts"
            )
        return jnp.asarray(step, like.dtype)

    def array(like: Any, value: Any) -> Any:
        # A copy, since the library that wrote the file may overwrite the memory of its tensors.
        return like if is_absent(like) else jnp.array(value, like.dtype)

    def state(like: RMSPropState) -> RMSPropState:
        slots = {
            slot: None if tree is None else jax.tree.map(array, tree, trees[slot], is_leaf=is_absent)
            for slot, tree in zip(SLOTS, like[1:], strict=True)
        }
        return RMSPropState(step=count(like.step), **slots)

    return replace_states(like, state, count)


# --- From a tree to names ----------------------------------------------------------------------------------


def slots_by_name(
    state: optax.OptState, from_params: Callable[[chex.ArrayTree], Mapping[str, Any]], names: Sequence[str]
) -> tuple[int, dict[str, dict[str, np.ndarray]]]:
    """The step and, for each name, the slots of an optimizer's state.

    Args:
      state: any optimizer state with an ``RMSPropState`` in it, or with several as ``optax.partition`` divides them.
      from_params: from a tree of NumPy arrays like the trained one to ``{name: array}``. It may only rearrange.
      names: all that ``from_params`` returns, in any order.

    Returns:
      ``(step, {name: {field: array}})`` with the fields that the parameter has. Of an empty parameter this is only
      ``square_avg``: nothing in it tells which others it has.

    Raises:
      TypeError: if an array or a step of ``state`` has a type other than the one ``init`` gives.
      ValueError: if the parts of ``state`` do not fit each other or hold NaN, or if ``from_params`` does more than
        rearrange.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import rmsprop
      >>> from rmsprop_jax.checkpoints.named import slots_by_name
      >>> state = rmsprop(0.1).init({"kernel": jnp.zeros(2)})
      >>> slots_by_name(state, lambda params: {"weight": params["kernel"]}, ["weight"])
      (0, {'weight': {'square_avg': array([0., 0.], dtype=float32)}})
    """
    step, trees = _step_and_slots(state)
    leaves = _leaves(trees["square_avg"])
    for path, leaf in leaves:
        if is_absent(leaf):
            raise ValueError(f"{_leaf(path)} is in no RMSPropState of state; give the state of the whole tree")
    structure: Any = jax.tree.structure(trees["square_avg"])
    likes = [leaf for _, leaf in leaves]

    def named(arrays: Sequence[np.ndarray]) -> list[tuple[str, np.ndarray]]:
        arrays_by_name = _arrays_by_name(from_params(jax.tree.unflatten(structure, arrays)), names)
        for name, array in arrays_by_name.items():
            if not _holds(array.dtype, np.dtype(np.float32)):
                raise ValueError(f"from_params makes {name!r} {array.dtype}; it may only rearrange, not cast")
        return [(repr(name), array) for name, array in arrays_by_name.items()]

    sources = _trace("from_params", [(_leaf(path), np.shape(leaf)) for path, leaf in leaves], named)
    result: dict[str, dict[str, np.ndarray]] = {name: {} for name in names}
    for slot, tree in trees.items():
        if is_absent(tree):
            continue
        column = structure.flatten_up_to(tree)
        filled = [np.zeros_like(like) if is_absent(x) else np.asarray(x) for x, like in zip(column, likes, strict=True)]
        arrays = _arrays_by_name(from_params(jax.tree.unflatten(structure, filled)), names)
        for (name, array), (_, numbers) in zip(arrays.items(), sources, strict=True):
            made_of = {is_absent(column[i]): i for i in numbers}
            if len(made_of) > 1:
                raise ValueError(
                    f"from_params makes {name!r} of {_leaf(leaves[made_of[False]][0])}, which has a {slot}, and of "
                    f"{_leaf(leaves[made_of[True]][0])}, which has none; make it of leaves of one group"
                )
            if any(not _holds(array.dtype, filled[i].dtype) for i in numbers):
                raise ValueError(f"from_params makes {name!r} {array.dtype}; it may only rearrange, not cast")
            if False in made_of or (array.size == 0 and slot == "square_avg"):
                result[name][slot] = array
    return step, result


def _step_and_slots(state: optax.OptState) -> tuple[int, dict[str, chex.ArrayTree | None]]:
    """The step and the whole tree of each slot, after a check that ``init`` and ``update`` could have made them."""
    parts = find_states("state", state)
    for place, part in parts.items():
        _check_part(place, part)
    steps = {_count_of(f"{place}.step", part.step) for place, part in parts.items()}
    if len(steps) > 1:
        raise ValueError(
            f"the parts of state are at different steps, {sorted(steps)}, but share one outside; set their steps to "
            "the one at which the run continues"
        )
    columns = {slot: [_slot_or_masks(part, slot) for part in parts.values()] for slot in SLOTS}
    return max(steps), {slot: merge_trees("state", column) for slot, column in columns.items()}


def _slot_or_masks(part: RMSPropState, slot: str) -> chex.ArrayTree | None:
    """The tree of a slot; masks in its place for a part without it, so that the other parts keep their containers."""
    tree = getattr(part, slot)
    return jax.tree.map(lambda _: optax.MaskedNode(), part.square_avg) if tree is None else tree


def _check_part(place: str, part: RMSPropState) -> None:
    """Raises unless every slot is as ``init`` gives it: arrays of the shape and the kind of the parameter."""
    expected = {jax.tree_util.keystr(path): leaf for path, leaf in _leaves(part.square_avg)}
    for slot in SLOTS:
        tree = getattr(part, slot)
        if tree is None:
            continue
        leaves = {jax.tree_util.keystr(path): leaf for path, leaf in _leaves(tree)}
        alone = min(leaves.keys() ^ expected.keys(), default=None)
        if alone is not None:
            raise ValueError(
                f"{place}.{slot}{alone} and {place}.square_avg{alone} must both be there, as init gives them"
            )
        for path, leaf in leaves.items():
            _check_leaf(place, slot, path, leaf, expected[path])


def _check_leaf(place: str, slot: str, path: str, leaf: Any, like: Any) -> None:
    where, where_like = f"{place}.{slot}{path}", f"{place}.square_avg{path}"
    if is_absent(leaf) or is_absent(like):
        if is_absent(leaf) != is_absent(like):
            raise ValueError(
                f"{where} is {type(leaf).__name__}, but {where_like} is {type(like).__name__}; both must be arrays, or "
                "both MaskedNode"
            )
        return
    check_slot(where, slot, leaf)
    if leaf.shape != like.shape or (leaf.dtype.kind == "c") != (like.dtype.kind == "c"):
        raise ValueError(
            f"{where} is {leaf.dtype} {leaf.shape}, but {where_like} is {like.dtype} {like.shape}; both must be like "
            "the parameter"
        )


def _count_of(where: str, step: Any) -> int:
    """The number of updates, if the counter has not stopped."""
    number = np.asarray(step) if isinstance(step, int) and not isinstance(step, bool) else step
    if not (is_array(number) and jnp.issubdtype(number.dtype, jnp.integer) and number.shape == ()):
        got = f"{number.dtype} {number.shape}" if is_array(number) else shown(number)
        raise TypeError(f"{where} must be an int32 scalar as init gives it, got {got}; a narrow float stops counting")
    if not 0 <= number < largest_count(number.dtype):
        raise ValueError(
            f"{where} is {number}, where a counter of dtype {number.dtype} stops or has not begun; put the number of "
            "updates in its place, an int32"
        )
    return int(number)


def _arrays_by_name(named: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
    if not isinstance(named, Mapping):
        raise TypeError(f"from_params must return a dict from names to arrays, got {type(named).__name__}")
    problems = [f"{name!r} is missing" for name in names if name not in named][:3]
    problems += [f"{shown(name)} is not one of them" for name in named if name not in names][:3]
    if problems:
        raise ValueError(f"from_params must return an array for each of names, but {' and '.join(problems)}")
    return {name: np.asarray(named[name]) for name in names}


def _holds(dtype: np.dtype, other: np.dtype) -> bool:
    """Whether ``dtype`` is floating or complex like ``other``, and no narrower."""
    if not jnp.issubdtype(dtype, jnp.inexact) or (other.kind == "c") != (dtype.kind == "c"):
        return False
    return bool(jnp.finfo(dtype).bits >= jnp.finfo(other).bits)


def _leaves(tree: chex.ArrayTree) -> list[tuple[Any, Any]]:
    """The leaves of a slot with their paths, ``optax.MaskedNode`` included, ``None`` not."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_absent)
    return [(path, leaf) for path, leaf in leaves if leaf is not None]


def _leaf(path: Any) -> str:
    return f"leaf {leaf_key(leaf_name(path))}"


# --- The trace ---------------------------------------------------------------------------------------------


def _trace(
    function: str,
    inputs: Sequence[tuple[str, tuple[int, ...]]],
    call: Callable[[list[np.ndarray]], list[tuple[str, Any]]],
) -> list[tuple[str, list[int]]]:
    """For each output of a function that rearranges, the numbers of the inputs that it is made of.

    Args:
      function: its name.
      inputs: for each its description and its shape.
      call: calls the function with an array for each input; returns a description and an array for each output.

    Raises:
      ValueError: if an output holds numbers of no input, or no output holds a part of an input.
    """
    tags = _tags(len(inputs))
    input_of = {tag: i for i, tag in enumerate(tags)}
    placed = [0] * len(inputs)
    result = []
    for output, array in call([np.full(shape, tag, np.float32) for tag, (_, shape) in zip(tags, inputs, strict=True)]):
        values, counts = np.unique(np.asarray(array).real, return_counts=True)
        numbers = [input_of.get(value) for value in values.astype(np.float64).tolist()]
        made_of = [i for i in numbers if i is not None]
        if len(made_of) < len(numbers):
            raise ValueError(
                f"{function} puts numbers into {output} that it was not given; it carries the slots as well as the "
                "weights, so it may only rearrange: cast, scale or pad elsewhere"
            )
        for i, count in zip(made_of, counts.tolist(), strict=True):
            placed[i] += count
        result.append((output, made_of))
    for (what, shape), count in zip(inputs, placed, strict=True):
        size = math.prod(shape)
        if count < size:
            part = f"{size - count} of {size} numbers of " if count else ""
            raise ValueError(f"{function} leaves out {part}{what}; its state would be lost")
    return result


def _tags(number: int) -> list[float]:
    """Different numbers in [1, 2) that need all 24 bits of float32, so that a narrower dtype changes each of them.

    They are random: a sum or a mean of some gives none of the others.
    """
    odd = 2 * np.random.default_rng(0).choice(2**22, number, replace=False, shuffle=False) + 1
    tags: list[float] = (1 + np.sort(odd) * 2.0**-23).tolist()
    return tags
