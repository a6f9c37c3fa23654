"""Arrays under names, and the state of an optimizer for a parameter tree: one into the other, for any framework.

Parameters are identified by name in both directions. The user's function for the weights, from ``{name: array}`` to
``params`` or back, also carries every slot of the state. ``checkpoints.rearrangement`` finds out which arrays each part
of its result comes from.

Read from the top down: two checks of arguments; names to tree; tree to names.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import storage
from rmsprop_jax.arguments import shown
from rmsprop_jax.checkpoints.rearrangement import Like, sources_of
from rmsprop_jax.checkpoints.slots import SCHEDULE_COUNTS, SLOTS, Parameter, check_slot, largest_count
from rmsprop_jax.state import (
    RMSPropState,
    check_containers,
    find_states,
    is_absent,
    is_array,
    is_state,
    is_trainable,
    leaf_key,
    leaf_name,
    merge_trees,
    replace_states,
    unboxed,
)

__all__ = ["build_optimizer", "check_functions", "checked_names", "common_step", "slots_by_name"]


def checked_names(names: Iterable[str], example: str) -> list[str]:
    """Returns ``names`` as a list.

    Raises:
      TypeError: if it holds anything but strings; the message suggests ``example``.
      ValueError: if it holds a name twice.
    """
    is_list = isinstance(names, Iterable) and not isinstance(names, str | bytes | Set)  # a set has no order
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
    step: int | None = None,
) -> tuple[optax.GradientTransformationExtraArgs, optax.OptState]:
    """The transformation for all groups of parameters, and its state with the numbers of a file.

    One group keeps its transformation. Several become ``optax.partition``, labeled ``"group0"``, ``"group1"``, ...

    A transformation may hold anything around its RMSProp. The RMSProp gets the slots. Every count that a schedule
    reads (of ``optax.scale_by_schedule``, ``inject_hyperparams`` and ``MultiSteps``) gets the step. Everything else
    starts as ``init`` starts it.

    Args:
      parameters: all of them, in any order.
      to_params: from ``{name: array}`` to the tree that is trained. It may only rearrange.
      transformations: one for each group, in the order of the groups.
      step: the number of updates of the run; ``None`` for the one that all parameters have.

    Returns:
      ``(tx, state)``. The state is what ``tx.init`` makes, with copies of the slots in its dtypes. A slot that the
      file does not hold starts from what ``init`` starts from.

    Raises:
      ValueError: if ``step`` is ``None`` and the steps differ, ``to_params`` does more than rearrange, a leaf
        belongs to two groups, or the transformation keeps values of the parameters, which are not known here.

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
    if not parameters:
        raise ValueError("names is empty; give the parameters that are trained")
    step = common_step(parameters) if step is None else step

    def build(arrays: Iterable[np.ndarray]) -> chex.ArrayTree:
        return _tree_of(to_params, {p.name: array for p, array in zip(parameters, arrays, strict=True)})

    template = build(np.zeros(p.shape, p.dtype) for p in parameters)
    groups = _group_of_each_leaf(build, parameters)
    tx = optax.with_extra_args_support(transformations[0])
    if len(transformations) > 1:
        labels = jax.tree.unflatten(jax.tree.structure(template), [f"group{group}" for group in groups])
        tx = optax.partition({f"group{group}": part for group, part in enumerate(transformations)}, labels)

    def init(params: chex.ArrayTree) -> optax.OptState:
        return storage.decode(tx.init(params))

    like = jax.eval_shape(init, template)
    states = find_states("the state of the transformation", like, _BUILD_ONE).values()
    kept = [slot for slot in SLOTS if any(getattr(state, slot) is not None for state in states)]
    parts = (
        [like] if len(transformations) == 1 else [like.inner_states[f"group{i}"] for i in range(len(transformations))]
    )
    kept_by_group = [_kept_by(part) for part in parts]
    for parameter in parameters:
        _check_kept(parameter, kept_by_group[parameter.group])
    first = functools.cache(lambda: init(template))

    def filled(parameter: Parameter, slot: str) -> np.ndarray:
        if slot in parameter.slots:
            return parameter.slots[slot]
        state = first() if len(transformations) == 1 else first().inner_states[f"group{parameter.group}"]
        return _first_slot(parameter, slot, state)

    fresh = _fresh_state(init, template, like)
    state = _filled(fresh, step, {slot: build(filled(p, slot) for p in parameters) for slot in kept})
    return tx, storage.encode(state, jax.eval_shape(tx.init, template))


def _kept_by(part: optax.OptState) -> set[str]:
    """The slots that a part of a state keeps for each of its parameters."""
    states = find_states("the state of the transformation", part, _BUILD_ONE).values()
    return {slot for slot in SLOTS for state in states if getattr(state, slot) is not None}


def _check_kept(parameter: Parameter, kept: set[str]) -> None:
    for slot in parameter.slots:
        if slot not in kept:
            raise ValueError(
                f"the file has a {slot} of {parameter.name!r}, but the transformation keeps none; build it with the "
                "setting of the run"
            )


_BUILD_ONE = "build the transformation with rmsprop_jax.rmsprop, scale_by_rmsprop or a function of dialects"


def common_step(parameters: Sequence[Parameter]) -> int:
    """The step that all parameters have; 0 if none has one.

    Raises:
      ValueError: if they differ.
    """
    first: dict[int, Parameter] = {}
    for p in parameters:
        if p.step is not None:
            first.setdefault(p.step, p)
    if len(first) > 1:
        p, other, *_ = first.values()
        raise ValueError(
            f"{p.name!r} is at step {p.step}, but {other.name!r} at step {other.step}; here all parameters share one "
            "step, at which schedules are read: give it as step="
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
    except Exception as error:
        shapes = {name: array.shape for name, array in arrays.items()}
        error.add_note(f"to_params failed. Are names in the optimizer's order? Their shapes are {shown(shapes, 400)}.")
        raise

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
    inputs = [Like(repr(p.name), p.shape, p.dtype.kind == "c") for p in parameters]
    for where, numbers in sources_of("to_params", inputs, leaves):
        first, *others = [parameters[i] for i in numbers] or parameters[:1]  # an empty leaf fits any group
        for other in others:
            if other.group != first.group:
                raise ValueError(
                    f"to_params makes {where} of {first.name!r} of group {first.group} and {other.name!r} of group "
                    f"{other.group}; a leaf has the hyperparameters of one group, so keep the two apart"
                )
        groups.append(first.group)
    return groups


def _first_slot(parameter: Parameter, slot: str, first: optax.OptState) -> np.ndarray:
    """What ``init``, which returned ``first`` for the whole group, puts into the slot of a parameter."""
    states = find_states("the state of the transformation", first, _BUILD_ONE).values()
    numbers = [np.asarray(x).reshape(-1) for state in states for x in jax.tree.leaves(getattr(state, slot)) if x.size]
    dtype = np.promote_types(parameter.dtype, np.float32)
    return np.full(parameter.shape, numbers[0][0].real if numbers else 0, dtype)


def _fresh_state(
    init: Callable[[chex.ArrayTree], optax.OptState], template: chex.ArrayTree, like: optax.OptState
) -> optax.OptState:
    """What ``init`` gives, with shapes and dtypes in place of the slots, which come from the file.

    Raises:
      ValueError: if anything outside the slots depends on the values of the parameters.
    """
    outside = replace_states(like, lambda state: None)
    if not jax.tree.leaves(outside):
        return like
    fresh = init(template)
    other = init(jax.tree.map(lambda x: x + 1 if is_trainable(x) else x, template))

    def kept(path: Any, first: Any, second: Any) -> Any:
        if is_state(first):
            return None
        if (
            is_array(first)
            and jnp.issubdtype(first.dtype, jnp.inexact)
            and not np.array_equal(np.asarray(first), np.asarray(second), equal_nan=True)
        ):
            raise ValueError(
                f"the transformation keeps values of the parameters in state{jax.tree_util.keystr(path)}, which are "
                "not known here; build it without that part, and put the part around the result"
            )
        return first

    jax.tree_util.tree_map_with_path(kept, fresh, other, is_leaf=is_state)
    slots = iter(find_states("the state of the transformation", like, _BUILD_ONE).values())
    return replace_states(fresh, lambda state: next(slots))


def _filled(fresh: optax.OptState, step: int, trees: Mapping[str, chex.ArrayTree]) -> optax.OptState:
    """``fresh`` with the arrays of ``trees`` in the slots, and ``step`` in every count that a schedule reads."""

    def array(like: Any, value: Any) -> Any:
        # A copy, since the library that wrote the file may overwrite the memory of its tensors.
        return like if is_absent(like) else jnp.array(value, like.dtype)

    def count(like: Any) -> jax.Array:
        return jnp.full(like.shape, step, like.dtype)

    def filled(node: Any) -> Any:
        if is_state(node):
            slots = {
                slot: None if tree is None else jax.tree.map(array, tree, trees[slot], is_leaf=is_absent)
                for slot, tree in zip(SLOTS, node[1:], strict=True)
            }
            return RMSPropState(step=count(node.step), **slots)
        field = SCHEDULE_COUNTS.get(type(node).__name__)
        if field is None:
            return node
        others = {name: fill(value) for name, value in node._asdict().items() if name != field}
        return node._replace(**others, **{field: count(getattr(node, field))})

    def fill(tree: Any) -> Any:
        return jax.tree.map(filled, tree, is_leaf=lambda x: is_state(x) or type(x).__name__ in SCHEDULE_COUNTS)

    return fill(fresh)


# --- From a tree to names ----------------------------------------------------------------------------------


def slots_by_name(
    state: optax.OptState, from_params: Callable[[chex.ArrayTree], Mapping[str, Any]], names: Sequence[str]
) -> tuple[int, dict[str, dict[str, np.ndarray]]]:
    """The step and, for each name, the slots of an optimizer's state.

    Args:
      state: any optimizer state with an ``RMSPropState`` in it, or with several as ``optax.partition`` divides them.
        It may hold Flax's variables, as that of an ``nnx.Optimizer`` does.
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
    check_containers("state", state)
    step, trees = _step_and_slots(unboxed(storage.decode(state)))
    leaves = _leaves(trees["square_avg"])
    for path, leaf in leaves:
        if is_absent(leaf):
            raise ValueError(f"{_leaf(path)} is in no RMSPropState of state; give the state of the whole tree")
    structure: Any = jax.tree.structure(trees["square_avg"])
    likes = [leaf for _, leaf in leaves]

    def named(arrays: Sequence[np.ndarray]) -> list[tuple[str, np.ndarray]]:
        arrays_by_name = _arrays_by_name(from_params(jax.tree.unflatten(structure, arrays)), names)
        for name, array in arrays_by_name.items():
            if not _holds(array.dtype, np.dtype(np.complex64 if array.dtype.kind == "c" else np.float32)):
                raise ValueError(f"from_params makes {name!r} {array.dtype}; it may only rearrange, not cast")
        return [(repr(name), array) for name, array in arrays_by_name.items()]

    inputs = [Like(_leaf(path), np.shape(leaf), leaf.dtype.kind == "c") for path, leaf in leaves]
    sources = sources_of("from_params", inputs, named)
    result: dict[str, dict[str, np.ndarray]] = {name: {} for name in names}
    for slot, tree in trees.items():
        if is_absent(tree):
            continue
        try:
            column = structure.flatten_up_to(tree)
        except ValueError:
            raise ValueError(
                f"the {slot} of state must be in the containers of its square_avg, as init gives it"
            ) from None
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
    return max(steps), {slot: merge_trees(f"the {slot} of state", column) for slot, column in columns.items()}


def _slot_or_masks(part: RMSPropState, slot: str) -> chex.ArrayTree | None:
    """The tree of a slot; masks in its place for a part without it, so that the other parts keep their containers."""
    tree = getattr(part, slot)
    return jax.tree.map(lambda _: optax.MaskedNode(), part.square_avg) if tree is None else tree


def _check_part(place: str, part: RMSPropState) -> None:
    """Raises unless every slot is as ``init`` gives it: arrays of the shape and the kind of the parameter."""
    if part.square_avg is None:
        raise ValueError(f"{place}.square_avg is None; every RMSProp keeps a square_avg, so give what init gives")
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
    is_number = isinstance(number, np.ndarray | np.generic | jax.Array)
    if not (is_number and jnp.issubdtype(number.dtype, jnp.integer) and number.shape == ()):
        got = f"{number.dtype} {number.shape}" if is_number else shown(number)
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
    wanted = set(names)
    problems += [f"{shown(name)} is not one of them" for name in named if name not in wanted][:3]
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
