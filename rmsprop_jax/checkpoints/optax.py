"""Runs of ``optax.rmsprop``: its state, wherever it lies inside an optimizer state, in, and out again.

Read from the top down: the two functions; the step; one RMSProp; the walk through two states at once.

Source: Optax 0.2.8, ``optax/_src/alias.py`` (``rmsprop`` is a chain of the scaling, the learning rate and the trace)
and ``optax/_src/transform.py`` (the states of the scaling).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import storage
from rmsprop_jax.arguments import check_smoothing, known, shown
from rmsprop_jax.checkpoints.slots import (
    SCHEDULE_COUNTS,
    array_of,
    average_of_squares,
    check_slots,
    count_of,
    scaled,
    variance,
)
from rmsprop_jax.state import (
    Name,
    RMSPropState,
    check_containers,
    find_states,
    is_array,
    is_state,
    leaf_key,
    leaf_name,
    unboxed,
)

__all__ = ["from_optax", "to_optax"]


def from_optax(
    opt_state: optax.OptState, like: optax.OptState, *, step: int | None = None, decay: float | None = None
) -> optax.OptState:
    """The state that continues a run of ``optax.rmsprop`` here.

    Build your optimizer again, with ``dialects.optax`` in the place of ``optax.rmsprop`` and everything else as it was:
    ``chain``, ``inject_hyperparams``, ``masked``, ``partition``, ``MultiSteps``, ``apply_if_finite``. ``like`` is what
    its ``init`` returns. The result is ``like`` with the numbers of ``opt_state`` in it::

        step            ← count of the schedule, or else ``step``
        square_avg      ← nu, or max(nu − mu², 0) if centered
        grad_avg        ← mu            if centered
        momentum_buffer ← trace         if momentum

    and with ``bias_correction``, where w = 1 − decayᵗ::

        square_avg ← nu / w, or max(nu / w − (mu / w)², 0)
        grad_avg   ← mu / w

    Divisions and differences are computed in float64. Whatever lies around the RMSProp keeps its numbers: gradients
    that are accumulated, counts, injected hyperparameters.

    A trace holds updates: the learning rate and the sign are in it. :func:`rmsprop_jax.translation.translate` takes the
    result from there to the rule of torch or of another library.

    Args:
      opt_state: the state of the optimizer with ``optax.rmsprop`` in it, or with ``optax.scale_by_rms`` or
        ``scale_by_stddev`` in a chain of your own. It may be a checkpoint that was restored without a target: nested
        dicts and lists, as Orbax and ``flax.serialization.msgpack_restore`` return it. It may hold Flax's variables.
      like: the state to fill, or its shapes and dtypes: ``jax.eval_shape(tx.init, params)``. Its transformation must be
        ``dialects.optax``. That of ``rmsprop`` and of the other dialects looks the same, but a trace means something
        else there: nothing can notice it, and the updates are wrong.
      step: the number of updates so far. Needed if ``opt_state`` counts nothing: then no learning-rate schedule reads
        it, and it is 0 if nothing else that you build does.
      decay: the smoothing constant, in [0, 1). Needed if ``opt_state`` is bias-corrected, and only then.

    Returns:
      A state of the structure and the dtypes of ``like``: a bfloat16 ``nu`` becomes float32.

    Raises:
      TypeError: if an array or an argument has the wrong type.
      ValueError: if the two states differ in anything but the RMSProp, slots are missing, NaN, negative or of another
        shape, the step is unknown or there are several. The message names the place.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from rmsprop_jax import dialects
      >>> from rmsprop_jax.checkpoints import from_optax
      >>> params = {"w": jnp.ones(2)}
      >>> before = optax.chain(optax.clip(1.0), optax.rmsprop(0.1, momentum=0.9))
      >>> updates, opt_state = before.update({"w": jnp.array([0.5, 3.0])}, before.init(params))
      >>> tx = optax.chain(optax.clip(1.0), dialects.optax(0.1, momentum=0.9))
      >>> _, state = from_optax(opt_state, like=tx.init(params), step=1)
      >>> print(state.step, state.square_avg["w"])
      1 [0.025 0.1  ]
    """
    decay = _checked_decay(decay)
    check_containers("opt_state", opt_state)
    find_states("like", like, _BUILD_LIKE)
    opt_state, plain = unboxed(_plain(opt_state)), _plain(like)
    steps = _Steps(opt_state, unboxed(plain), step)

    corrected: list[bool] = []

    def convert(ours: Any, theirs: Any, where: str) -> Any:
        if not is_state(ours):
            return None
        part = _part(theirs, where)
        corrected.append(part.is_corrected)
        return _read(ours, part, where, steps, decay)

    filled = _walk(unboxed(plain), opt_state, "opt_state", _same, convert)
    _check_decay_is_used(decay, corrected)
    return _stored_like(like, _boxed_like(plain, filled))


def to_optax(state: optax.OptState, like: optax.OptState, *, decay: float | None = None) -> optax.OptState:
    """The inverse of :func:`from_optax`: a state that continues the run with ``optax.rmsprop``.

    ::

        nu    ← square_avg, or square_avg + grad_avg² if centered       · (1 − decayᵗ) with bias_correction
        mu    ← grad_avg                              if centered       · (1 − decayᵗ) with bias_correction
        trace ← momentum_buffer                       if momentum
        count ← step                                  wherever Optax counts

    Args:
      state: a state of an optimizer with ``dialects.optax`` in it.
      like: what ``init`` of the same optimizer with ``optax.rmsprop`` in its place returns.
      decay: as in :func:`from_optax`.

    Returns:
      A state of the structure and the dtypes of ``like``.

    Raises:
      TypeError: as :func:`from_optax`.
      ValueError: as :func:`from_optax`; also if a number becomes infinite in the dtype of ``like``.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from rmsprop_jax import dialects
      >>> from rmsprop_jax.checkpoints import to_optax
      >>> params = {"w": jnp.ones(2)}
      >>> tx = dialects.optax(0.1, momentum=0.9)
      >>> updates, state = tx.update({"w": jnp.array([0.5, 1.0])}, tx.init(params))
      >>> scaling, _, trace = to_optax(state, like=optax.rmsprop(0.1, momentum=0.9).init(params))
      >>> print(scaling.nu["w"])
      [0.025 0.1  ]
    """
    decay = _checked_decay(decay)
    find_states("state", state)
    check_containers("like", like)

    corrected: list[bool] = []

    def convert(theirs: Any, ours: Any, where: str) -> Any:
        if not is_state(ours):
            return None
        part = _part(theirs, "like")
        corrected.append(part.is_corrected)
        return _written(theirs, part, ours, where, decay)

    plain = _plain(like)
    filled = _walk(unboxed(plain), unboxed(_plain(state)), "state", _same, convert)
    _check_decay_is_used(decay, corrected)
    return _stored_like(like, _boxed_like(plain, filled))


def _boxed_like(like: Any, tree: Any) -> Any:
    """``tree`` in the boxes of ``like``, if Flax's nnx keeps its arrays in boxes."""
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))


def _is_stored(x: Any) -> bool:
    return isinstance(x, storage.CompressState | storage.Encoded)


def _plain(opt_state: Any) -> Any:
    """A state in float32, without what ``storage.compress`` puts around it."""

    def plain(x: Any) -> Any:
        return _plain(x.inner_state) if isinstance(x, storage.CompressState) else storage.decode(x)

    return jax.tree.map(plain, opt_state, is_leaf=_is_stored) if _has_stored(opt_state) else opt_state


def _stored_like(like: Any, plain: Any) -> Any:
    """The inverse of :func:`_plain`, with everything encoded where ``like`` is."""

    def around(x: Any, part: Any) -> Any:
        if not isinstance(x, storage.CompressState):
            return part
        steps = [node.step for node in jax.tree.leaves(part, is_leaf=is_state) if is_state(node)]
        step = jnp.asarray(steps[0], x.step.dtype) if steps else jnp.zeros(x.step.shape, x.step.dtype)
        return storage.CompressState(step, jax.tree.map(around, x.inner_state, part, is_leaf=_is_stored))

    if not _has_stored(like):
        return plain
    return storage.encode(jax.tree.map(around, like, plain, is_leaf=_is_stored), like)


def _has_stored(opt_state: Any) -> bool:
    return any(map(_is_stored, jax.tree.leaves(opt_state, is_leaf=_is_stored)))


_BUILD_LIKE = "build the transformation with a function of rmsprop_jax.dialects, and give what its init returns"
_DECAY = "decay must be the smoothing constant of the run, a number in [0, 1)"


def _checked_decay(decay: float | None) -> float | None:
    if decay is None:
        return None
    number = known(check_smoothing("decay", decay))
    if number is None:
        raise TypeError(f"{_DECAY}, got {shown(decay)}")
    return number


def _check_decay_is_used(decay: float | None, corrected: list[bool]) -> None:
    if decay is not None and not any(corrected):
        raise ValueError(f"decay is {decay:g}, but no RMSProp here is bias-corrected; leave it out")


# --- The step ------------------------------------------------------------------------------------------------


class _Steps:
    """The number of updates: what the RMSProp counts itself, or the caller says, or all else counts."""

    def __init__(self, opt_state: optax.OptState, like: optax.OptState, step: int | None) -> None:
        self.step = None if step is None else count_of("step", step)
        counters = _counters(like)
        self.outside = set()
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
            name = tuple(part for part in leaf_name(path) if part != "value")
            is_counter = name in counters or (name[-1:] == ("count",) and any(name[: len(c)] == c for c in counters))
            is_number = isinstance(leaf, np.ndarray | np.generic | jax.Array) and not isinstance(
                leaf, np.ma.MaskedArray
            )
            if is_counter and is_number and leaf.shape == () and jnp.issubdtype(leaf.dtype, jnp.integer):
                self.outside.add(int(leaf))

    def of(self, own: Any, like: Any, where: str) -> np.ndarray:
        """The step of the RMSProp at ``where``, whose schedule or bias correction counts ``own`` (or ``None``)."""
        if own is None and self.step is None and len(self.outside) != 1:
            got = f"counts {sorted(self.outside)}" if self.outside else "counts no updates"
            raise ValueError(
                f"step must be given, since opt_state {got}: the number of updates so far, or 0 if nothing that you "
                "build reads it (a schedule, bias_correction)"
            )
        if own is not None and self.step is not None and (own != self.step).any():
            raise ValueError(f"step is {self.step}, but {where} counts {own}; leave step out, or give the same number")
        if own is None:
            own = np.asarray(next(iter(self.outside)) if self.step is None else self.step)
        if own.shape not in ((), like.shape):  # one count may belong to a stack
            raise ValueError(f"{where} counts {shown(own.tolist())}, but in like it counts one of shape {like.shape}")
        return np.broadcast_to(own, like.shape)


def _counters(like: optax.OptState) -> set[Name]:
    """Where a state counts the updates that a schedule reads; of an RMSProp, where all of it is."""
    found = set()
    stack: list[tuple[Name, Any]] = [((), like)]
    while stack:
        name, node = stack.pop()
        field = SCHEDULE_COUNTS.get(type(node).__name__)
        if field is not None:
            found.add((*name, field))
        if is_state(node):
            found.add(name)
        elif not jax.tree_util.all_leaves([node]):
            stack += [((*name, key), child) for key, child in _level(node)[1].items()]
    return found


# --- One RMSProp ---------------------------------------------------------------------------------------------

_SLOT_OF = {"nu": "square_avg", "mu": "grad_avg", "trace": "momentum_buffer"}
_ARGUMENT_OF = {"nu": "rmsprop", "mu": "centered", "trace": "momentum"}
_OTHERS = {"ScaleByAdamState", "ScaleByBeliefState"}  # have the fields of a centered, bias-corrected RMSProp


class _Part(NamedTuple):
    """What is in the state of an ``optax.rmsprop``.

    Attributes:
      trees: its ``nu``, ``mu`` and ``trace``, as far as it has them.
      updates: what it counts, or ``None``.
      is_corrected: whether its averages are to be bias-corrected.
    """

    trees: dict[str, Any]
    updates: np.ndarray | None
    is_corrected: bool


def _part(node: Any, where: str) -> _Part:
    """What is in ``node``, or in its children, if that is the state of an ``optax.rmsprop``."""
    level = _level(node)[1]
    nodes = [level] if "nu" in level else [_level(child)[1] for child in level.values()]
    found = [field for fields in nodes for field in fields.items()]
    if "nu" not in level:  # a leaf is no state
        found += [(shown(child), child) for child in level.values() if jax.tree_util.all_leaves([child])]
    kinds = {type(part).__name__ for part in [node, *level.values()] if hasattr(part, "_fields")}
    trees = {name: tree for name, tree in found if name != "count"}
    counts = [_counts(value, f"{where}.count") for name, value in found if name == "count"]
    if kinds & _OTHERS or "nu" not in trees or not set(trees) <= set(_SLOT_OF) or len(trees) + len(counts) < len(found):
        raise ValueError(
            f"{where} must be the state of optax.rmsprop, which has a nu, and may have a mu, a trace and a count, but "
            f"it has {shown(sorted(kinds) or [name for name, _ in found])}; build the two optimizers alike, with "
            "dialects.optax here"
        )
    if any(not np.array_equal(count, counts[0]) for count in counts):
        raise ValueError(f"{where} counts {' and '.join(map(str, counts))} updates; give the state of one run")
    is_corrected = any({"nu", "count"} <= set(fields) for fields in nodes)
    trees = {name: trees[name] for name in _SLOT_OF if name in trees}
    return _Part(trees, counts[0] if counts else None, is_corrected)


def _read(ours: RMSPropState, part: _Part, where: str, steps: _Steps, decay: float | None) -> RMSPropState:
    """``ours`` with the numbers of the state of an ``optax.rmsprop``."""
    _check_same_slots(ours, part, where)
    step = steps.of(part.updates, ours.step, where)
    weight = _weight(part, step, decay, where)
    templates = {_SLOT_OF[name]: getattr(ours, _SLOT_OF[name]) for name in part.trees}
    sources = {_SLOT_OF[name]: tree for name, tree in part.trees.items()}
    _check_stacked(step, templates["square_avg"], where)
    trees = _carried(templates, sources, where, lambda name, slots: _as_here(name, slots, weight))
    return ours._replace(step=_counted(step, ours.step), **trees)


def _written(theirs: Any, part: _Part, ours: RMSPropState, where: str, decay: float | None) -> Any:
    """``theirs``, the state of an ``optax.rmsprop``, with the numbers of ``ours``."""
    _check_same_slots(ours, part, where)
    step = _counts(ours.step, f"{where}.step")
    weight = _weight(part, step, decay, "like")
    templates = {_SLOT_OF[name]: tree for name, tree in part.trees.items()}
    sources = {slot: getattr(ours, slot) for slot in templates}
    _check_stacked(step, templates["square_avg"], where)
    trees = _carried(templates, sources, where, lambda name, slots: _as_in_optax(name, slots, weight))

    def filled(node: Any) -> Any:
        if not hasattr(node, "_fields"):
            raise TypeError(f"like must be what init of an Optax optimizer returns, but has {shown(node)} for a state")
        new = {name: trees[_SLOT_OF[name]] for name in part.trees if name in node._fields}
        count = {"count": _counted(step, node.count)} if "count" in node._fields else {}
        return node._replace(**new, **count)

    return filled(theirs) if hasattr(theirs, "nu") else tuple(filled(node) for node in theirs)


def _check_same_slots(ours: RMSPropState, part: _Part, where: str) -> None:
    for name, slot in _SLOT_OF.items():
        is_there, is_here = name in part.trees, getattr(ours, slot) is not None
        if is_there != is_here:
            raise ValueError(
                f"{where} has {'a' if is_there else 'no'} {name} in Optax, but {'a' if is_here else 'no'} {slot} here; "
                f"build both optimizers with {_ARGUMENT_OF[name]}, or neither"
            )


def _check_stacked(step: np.ndarray, square_avg: Any, where: str) -> None:
    """Raises unless there is one step, or one for each state of a stack."""
    if any(leaf.shape[: step.ndim] != step.shape for leaf in jax.tree.leaves(square_avg)):
        raise ValueError(f"{where} counts steps of shape {step.shape}, which is not how its slots are stacked")


def _weight(part: _Part, step: np.ndarray, decay: float | None, where: str) -> float:
    """1, or 1 − decayᵗ if the averages are to be bias-corrected."""
    if part.is_corrected and decay is None:
        raise ValueError(f"decay must be given, since {where} is bias-corrected: the smoothing constant of the run")
    if decay is None or not part.is_corrected:
        return 1.0
    if step.shape:
        raise ValueError(f"{where} is a stack of bias-corrected states of shape {step.shape}; convert one at a time")
    return -math.expm1(int(step) * math.log(decay)) if decay > 0 else float(step > 0)


def _as_here(name: str, slots: dict[str, np.ndarray], weight: float) -> dict[str, np.ndarray]:
    """The slots of one parameter as an :class:`RMSPropState` has them."""
    square_avg, mean = slots["square_avg"], slots.get("grad_avg")
    if weight == 0:  # step 0 of a bias-corrected run
        if square_avg.any():
            raise ValueError(f"nu of {name!r} must be 0 at step 0, since bias_correction here forgets initial_scale")
        return slots
    if mean is None:
        return {**slots, "square_avg": scaled(square_avg, 1 / weight)}
    return {**slots, "square_avg": variance(name, square_avg, mean, weight), "grad_avg": scaled(mean, 1 / weight)}


def _as_in_optax(name: str, slots: dict[str, np.ndarray], weight: float) -> dict[str, np.ndarray]:
    """The inverse of :func:`_as_here`."""
    deviation, mean = slots["square_avg"], slots.get("grad_avg")
    if mean is None:
        return {**slots, "square_avg": scaled(deviation, weight)}
    return {**slots, "square_avg": average_of_squares(name, deviation, mean, weight), "grad_avg": scaled(mean, weight)}


def _carried(
    templates: Mapping[str, Any],
    sources: Mapping[str, Any],
    where: str,
    change: Callable[[str, dict[str, np.ndarray]], dict[str, np.ndarray]],
) -> dict[str, Any]:
    """``templates``, a tree for each slot, with the arrays of ``sources`` after ``change`` of a parameter's slots."""
    aligned = {slot: _walk(tree, sources[slot], f"{where}.{slot}", _slot) for slot, tree in templates.items()}
    columns = {slot: jax.tree.leaves(tree) for slot, tree in aligned.items()}
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(templates["square_avg"])]
    changed = []
    for path, *row in zip(paths, *columns.values(), strict=True):
        name = f"{where}, {leaf_key(leaf_name(path))}"
        slots = {slot: np.asarray(x) for slot, x in zip(columns, row, strict=True)}
        check_slots(name, slots, None)
        changed.append(change(name, slots))
    result = {}
    for slot, template in templates.items():
        likes, structure = jax.tree.flatten(template)
        new = [
            _placed(slots[slot], like, source)
            for slots, like, source in zip(changed, likes, columns[slot], strict=True)
        ]
        result[slot] = jax.tree.unflatten(structure, new)
    return result


def _placed(value: np.ndarray, like: Any, source: Any) -> jax.Array:
    """``value`` in the dtype of ``like``, on its devices, or else on those of ``source``."""
    with np.errstate(over="ignore"):
        array = value.astype(like.dtype)
    if (np.isinf(array) & ~np.isinf(value)).any():
        raise ValueError(
            f"like has {like.dtype} for a slot whose largest number is {np.abs(value).max():.4g}; widen it"
        )
    return _on_devices_of(like, source, array)


def _on_devices_of(like: Any, source: Any, array: Any) -> jax.Array:
    """A copy of ``array`` where ``like`` lies, if somebody placed that, or else where ``source`` lies."""
    for placed in (like, source):
        is_abstract = isinstance(placed, jax.ShapeDtypeStruct)
        if placed.sharding is not None if is_abstract else getattr(placed, "committed", False):
            copied: jax.Array = jax.device_put(array, placed.sharding)
            return jnp.array(copied) if copied is array else copied
    return jnp.array(array)


def _counted(step: np.ndarray, like: Any) -> jax.Array:
    """``step`` in the counter ``like``."""
    return jnp.asarray(np.broadcast_to(step, like.shape), like.dtype)


# --- Two states at once ----------------------------------------------------------------------------------------


def _walk(
    template: Any,
    other: Any,
    where: str,
    leaf: Callable[[Any, Any, str], Any],
    convert: Callable[[Any, Any, str], Any] = lambda template, other, where: None,
) -> Any:
    """``template`` with ``convert`` of the pairs for which it returns something, and ``leaf`` of all pairs of leaves.

    Children belong together by their names, so that the other tree may be in other containers. A checkpoint that was
    restored without a target has dicts for named tuples.
    """
    converted = convert(template, other, where)
    if converted is not None:
        return converted
    if jax.tree_util.all_leaves([template]):
        return leaf(template, other, where)
    if jax.tree_util.all_leaves([other]):
        raise ValueError(f"{where} is {shown(other)}, but in like it is a {type(template).__name__}; build both alike")
    structure, children = _level(template)
    children, others, spread = _grouped(template, children, _level(other)[1])
    for name, child in {**others, **children}.items():
        if (name not in others or name not in children) and jax.tree.leaves(child):
            has, lacks = ("like", "the state") if name in children else ("the state", "like")
            raise ValueError(
                f"{has} has {shown(name)} at {where}, but {lacks} does not ({type(template).__name__} in like, "
                f"{type(other).__name__} in the state); build the two optimizers alike, with dialects.optax here and "
                "optax.rmsprop there"
            )
    results = [_walk(child, others.get(name), f"{where}[{name}]", leaf, convert) for name, child in children.items()]
    return jax.tree.unflatten(structure, spread(results))


def _level(tree: Any) -> tuple[Any, dict[str, Any]]:
    """The container of a tree, and its children by name."""
    children, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    return structure, {leaf_name(path)[0]: child for path, child in children if path}


def _grouped(
    template: Any, children: dict[str, Any], others: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], Callable[[list[Any]], list[Any]]]:
    """Two chains of different lengths, with the parts of an RMSProp that lie in one of them as one child.

    ``optax.chain(clip, scale_by_rms(), trace(0.9), scale(-0.1))`` has them beside the clipping. The function that is
    returned takes the group apart again.
    """
    difference = len(others) - len(children)
    shorter, longer = (children, others) if difference > 0 else (others, children)
    places = [place for place, child in enumerate(shorter.values()) if is_state(child)]
    if type(template) is not tuple or not difference or len(places) != 1:
        return children, others, lambda results: results
    first, after = places[0], places[0] + abs(difference) + 1
    items = [longer[name] for name in sorted(longer, key=lambda name: (len(name), name))]
    group = [*items[:first], tuple(items[first:after]), *items[after:]]
    grouped = {str(place): child for place, child in enumerate(group)}
    if difference > 0:
        return children, grouped, lambda results: results
    return grouped, others, lambda results: [*results[:first], *results[first], *results[first + 1 :]]


# --- Two leaves --------------------------------------------------------------------------------------------------


def _same(like: Any, other: Any, where: str) -> Any:
    """``other``, if it is like ``like``."""
    if not is_array(like) or jnp.issubdtype(like.dtype, jax.dtypes.extended):
        return other
    array = _array(other, where)
    if (array.shape, array.dtype) != (like.shape, like.dtype):
        raise ValueError(
            f"{where} is {array.dtype} {array.shape}, but in like it is {like.dtype} {like.shape}; build both alike, "
            "or cast it"
        )
    is_injected = array.shape == () and not isinstance(like, jax.ShapeDtypeStruct)
    if is_injected and np.isfinite(np.asarray(like)) and not np.isfinite(np.asarray(array)):
        raise ValueError(f"{where} is {array}, but in like it is {like}; take a state from before the run diverged")
    return _on_devices_of(like, other, array)


def _slot(like: Any, other: Any, where: str) -> Any:
    """``other``, if it is an array of the shape and the kind of ``like``."""
    array = _array(other, where)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise TypeError(f"{where} must be a floating or complex array, got {array.dtype}")
    if array.dtype.kind == like.dtype.kind == "c":
        raise ValueError(
            f"{where} is of a complex parameter, whose average in Optax is that of |g|², and here one of each "
            "component; start with init instead"
        )
    if array.shape != like.shape or "c" in (array.dtype.kind, like.dtype.kind):
        raise ValueError(
            f"{where} is {array.dtype} {array.shape}, but in like it is {like.dtype} {like.shape}; both must be for "
            "the same parameters"
        )
    return array


def _counts(value: Any, where: str) -> np.ndarray:
    """A number of updates, or a stack of them."""
    array = np.asarray(value, object) if type(value) is int else np.asarray(_array(value, where))
    counts = [count_of(where, number) for number in array.reshape(-1)]
    if not counts:
        raise ValueError(f"{where} must be a number of updates, got shape {array.shape}")
    return np.array(counts, np.int32).reshape(array.shape)


def _array(value: Any, where: str) -> np.ndarray | jax.Array:
    """An array of JAX as it is; one of NumPy, or a number of Python, as an array of NumPy."""
    if isinstance(value, Mapping) and value.keys() == {"value"}:  # Flax's variable in a file that was restored alone
        value = value["value"]
    if isinstance(value, jax.Array) and not jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return value
    if isinstance(value, bool | float | complex) or (type(value) is int and abs(value) < 2**31):
        value = np.asarray(value, jnp.result_type(value))
    return array_of(where, value)
