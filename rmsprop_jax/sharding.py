"""On which device does each piece of an optimizer's state live? For any Optax transformation.

Read from the top down: the shardings of a state; the transformation that spreads one over a mesh axis (ZeRO); are the
copies of replicated arrays equal? The layout behind the first two; where the parameters lie; which parameter an array
belongs to. ``placement`` moves an array, and ``copies`` compares the copies of one.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from rmsprop_jax.arguments import check_count, check_transformation, shown
from rmsprop_jax.codes import Encoded, is_encoded, unboxed
from rmsprop_jax.copies import check_copies, parts
from rmsprop_jax.placement import axes_of_dimensions, inside_shard_map, placed, with_axes

__all__ = ["abstract_state", "check_replicas", "shardings", "zero"]


# --- The shardings of a state --------------------------------------------------------------------------------


def shardings(
    tx: optax.GradientTransformation, params: optax.Params, axis: str | None = None, *, min_size: int = 0
) -> Any:
    """The sharding of every array in the state of ``tx``.

    An array that is kept for a parameter, such as an average, is sharded like the parameter. Everything else is
    replicated on the same mesh: steps, counts, injected numbers. So a state can be created where it belongs::

        state = jax.jit(tx.init, out_shardings=sharding.shardings(tx, params))(params)

    ``axis`` spreads the state over the mesh axis of that name, along which the parameters are replicated (ZeRO)::

        mesh (data=4, model=2)     parameter P(None, "model")     state P("data", "model")

    The axis is added to the largest dimension, as left on each device, that it divides evenly. An array stays as it is
    if there is none, or if its parameter is sharded over ``axis`` already (FSDP).

    An array belongs to a parameter if its path in the state ends with the parameter's path, and its shape with the
    parameter's shape. Where several parameters fit, it is the one whose neighbors fit best too.

    Args:
      tx: any Optax transformation, or the result of :func:`zero`, which brings its ``axis`` and ``min_size`` along.
      params: the parameters where they lie, or a ``jax.ShapeDtypeStruct`` with a sharding for each. On a mesh, they
        have a ``NamedSharding``. Arrays without one count as replicated. Without a mesh, the state lies where the
        parameters do.
      axis: the name of a mesh axis; ``None`` for the layout of the parameters.
      min_size: the smallest number of elements that an array must have to be spread over ``axis``.

    Returns:
      A tree like the state, with a ``jax.sharding.Sharding`` for each array.

    Raises:
      ValueError: if ``axis`` is not an axis of the mesh, or there is no mesh for it; if parameters are traced, lie on
        two meshes, on an abstract mesh, or on several devices without a ``NamedSharding``; if ``min_size`` is
        negative; if ``axis`` or ``min_size`` are not those of ``zero``, or ``zero`` is inside of another
        transformation.
      TypeError: if ``tx`` is not a transformation, or ``min_size`` not a whole number.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec
      >>> from rmsprop_jax import rmsprop, sharding
      >>> mesh = Mesh(jax.devices()[:1], "data")  # of one device here; the same lines for more
      >>> params = jax.device_put({"w": jnp.ones((8, 4))}, NamedSharding(mesh, PartitionSpec()))
      >>> layout = sharding.shardings(rmsprop(0.01), params, "data")
      >>> print(tuple(layout.square_avg["w"].spec), tuple(layout.step.spec))
      ('data',) ()

    Source:
      S. Rajbhandari et al., arXiv:1910.02054 (ZeRO, stage 1: the state, and stage 2: the gradients too).
    """
    plan = _Plan(tx, params, axis, min_size)
    return plan.layout.of_state(plan.state)


def abstract_state(
    tx: optax.GradientTransformation, params: optax.Params, axis: str | None = None, *, min_size: int = 0
) -> Any:
    """The shapes, dtypes and shardings of the state of ``tx``, without the state: what Orbax restores into.

    A checkpoint holds whole arrays, whatever mesh wrote it. Orbax reads from it what each device of *this* mesh needs::

        target = sharding.abstract_state(tx, params)
        state = ocp.StandardCheckpointer().restore(path, target)

    Args:
      tx: see :func:`shardings`.
      params: see :func:`shardings`.
      axis: see :func:`shardings`.
      min_size: see :func:`shardings`.

    Returns:
      A tree like the state, with a ``jax.ShapeDtypeStruct`` for each array.

    Raises:
      ValueError: as :func:`shardings` does.
      TypeError: as :func:`shardings` does.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import rmsprop, sharding
      >>> print(sharding.abstract_state(rmsprop(0.01), {"w": jnp.ones((8, 4))}).square_avg["w"].shape)
      (8, 4)
    """
    plan = _Plan(tx, params, axis, min_size)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        plan.state,
        plan.layout.of_state(plan.state),
    )


# --- State that is spread over a mesh axis -------------------------------------------------------------------


def zero(
    tx: optax.GradientTransformation, params: optax.Params, axis: str, *, min_size: int = 0
) -> optax.GradientTransformationExtraArgs:
    """``tx``, with its state spread over a mesh axis along which the parameters are replicated (ZeRO).

    In a compiled step, every device updates its part and sends it to the others::

        gradient ← its part of the sum over the devices        reduce-scatter
        update, state ← tx.update(gradient, state)             on this part alone
        update ← the parts of all devices                      all-gather

    From the same gradients, updates and state are those of ``tx`` alone, but a device holds and updates only 1/n of the
    state, where n is the size of the axis. Training with replicated gradients sends the same number of bytes: an
    all-reduce is a reduce-scatter and an all-gather. (XLA makes reduce-scatters on GPUs and TPUs. On CPUs, an
    all-reduce stays one.) In 8 bits, an array that is split along its last axis also sends the maxima of its rows.

    It must be the outermost transformation: clipping, schedules and ``storage.compress`` go inside of it. So do
    ``optax.MultiSteps``, ``masked``, ``partition`` and ``inject_hyperparams``. Call it in ``jax.jit``, not in
    ``jax.shard_map``. Meshes may have Auto and Explicit axes.

    Args:
      tx: any Optax transformation.
      params: those that ``init`` will get; see :func:`shardings`. Only their paths, shapes and shardings are used.
      axis: the name of a mesh axis, for example that of data parallelism. How it is added to an array's own sharding is
        described at :func:`shardings`.
      min_size: the smallest number of elements that an array must have to be spread. Spreading a small array costs more
        than it saves.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``init`` creates the state in place, inside and outside of
      ``jax.jit``. ``shardings`` and ``abstract_state`` take it as it is.

    Raises:
      ValueError: as :func:`shardings` does, or if ``tx`` is spread already; at ``init`` and ``update``, if they get
        another array than those of ``params``, or are called inside of ``jax.shard_map``.
      TypeError: as :func:`shardings` does.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec
      >>> from rmsprop_jax import rmsprop, sharding
      >>> mesh = Mesh(jax.devices()[:1], "data")
      >>> params = jax.device_put({"w": jnp.ones((8, 4))}, NamedSharding(mesh, PartitionSpec()))
      >>> tx = sharding.zero(rmsprop(0.01), params, "data")
      >>> state = tx.init(params)
      >>> updates, state = jax.jit(tx.update)(params, state, params)
      >>> print(state.step, state.square_avg["w"].sharding.mesh.axis_names)
      1 ('data',)

    Source:
      See :func:`shardings`.
    """
    if axis is None:
        raise ValueError("axis must be the name of a mesh axis, got None; without one, use tx as it is")
    layout = _Plan(tx, params, axis, min_size, may_be_zero=False).layout
    inner = check_transformation("tx", tx)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        _refuse_shard_map()
        updates = layout.placed("updates", updates, layout.spread)
        params = layout.placed("params", params, layout.spread)
        updates, state = inner.update(updates, state, params, **extra_args)
        return layout.placed("updates", updates, layout.own), layout.placed_state(state)

    return optax.GradientTransformationExtraArgs(_Init(inner.init, layout, axis, min_size), update)


_SEEN: contextvars.ContextVar[list["_Init"] | None] = contextvars.ContextVar("the zeros that a plan has met")


@dataclasses.dataclass(frozen=True, eq=False)
class _Init:
    """The ``init`` of :func:`zero`, which tells a plan how the state is spread."""

    inner: Callable[[optax.Params], optax.OptState]
    layout: "_Layout"
    axis: str
    min_size: int

    def __call__(self, params: optax.Params) -> optax.OptState:
        seen = _SEEN.get(None)
        if seen is not None:
            seen.append(self)
            return self.inner(params)
        _refuse_shard_map()
        self.layout.check("params", params)
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params)):
            return self.layout.placed_state(self.inner(params))
        init, arrays = _of_arrays(self.inner, params)
        return jax.jit(init, out_shardings=self.layout.of_state(jax.eval_shape(init, arrays)))(arrays)


def _refuse_shard_map() -> None:
    if inside_shard_map():
        raise ValueError(
            "zero must be called outside of jax.shard_map, because it needs whole arrays; call it in jax.jit, around "
            "the shard_map that computes the gradient"
        )


# --- Are the copies equal? -----------------------------------------------------------------------------------


def check_replicas(tree: Any) -> int:
    """Raises if copies of a replicated array, on different devices, differ in a single bit.

    JAX does not notice. It takes a replicated array from whichever device is nearest, so training continues on unequal
    copies, and a checkpoint holds one of them. Copies can differ after a hardware fault, or if processes build an array
    from different data.

    Each device computes a checksum of 64 bits for each array, and only these are sent. In a run with many processes,
    all of them call this with the same tree, and all raise the same error.

    Args:
      tree: any tree, such as ``(params, state)``. Of each array on a mesh, the parts that several devices hold are
        compared. Other arrays have one copy.

    Returns:
      How many arrays were compared: those of which some part has more than one copy.

    Raises:
      ValueError: if copies differ. The message names the first such array, and the devices. Also if an array is
        traced or deleted, or lies on several devices without a ``NamedSharding``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec
      >>> from rmsprop_jax import sharding
      >>> mesh = Mesh(jax.devices()[:1], "data")
      >>> params = jax.device_put({"w": jnp.ones((8, 4))}, NamedSharding(mesh, PartitionSpec()))
      >>> print(sharding.check_replicas(params))  # with one device, there are no copies
      0
    """
    copied = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = f"tree{jax.tree_util.keystr(path)}"
        if isinstance(x, jax.core.Tracer):
            raise ValueError(f"{name} is traced, so it has no copies yet; call this outside of jit")
        if isinstance(x, jax.Array):
            if x.is_deleted():
                raise ValueError(f"{name} has been deleted, as donated arrays are; check what the step returned")
            sharding = _checked_sharding(name, x)
            if isinstance(sharding, NamedSharding) and x.size and sharding.num_devices > len(set(parts(x).values())):
                copied.append((name, x))
    check_copies(copied)
    return len(copied)


# --- The layout ----------------------------------------------------------------------------------------------

Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Layout:
    """Where parameters lie, and where what belongs to them does.

    Attributes:
      names: of the parameters, for messages, by path.
      shapes: of the parameters.
      own: their shardings.
      spread: the shardings of what is kept for them, with ``axis`` if there is one.
      elsewhere: the sharding of what belongs to no parameter.
    """

    names: Mapping[Path, str]
    shapes: Mapping[Path, tuple[int, ...]]
    own: Mapping[Path, Any]
    spread: Mapping[Path, Any]
    elsewhere: Any

    def of_state(self, state: Any) -> Any:
        """The sharding of each array in a state, or in its shapes."""
        flat, structure = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_encoded)
        owners = _owners(flat, self.shapes)
        return jax.tree.unflatten(structure, [self._of_leaf(owners[path], x) for path, x in flat])

    def _of_leaf(self, owner: Path | None, x: Any) -> Any:
        if not is_encoded(x):
            return self._of_array(owner, np.ndim(x))
        ndim = len(unboxed(x).shape)
        of_codes = self._of_array(owner, ndim)
        of_rows = with_axes(of_codes, axes_of_dimensions(of_codes, ndim)[:-1])
        return Encoded(jax.tree.map(lambda _: of_codes, x.codes), jax.tree.map(lambda _: of_rows, x.scale))

    def _of_array(self, owner: Path | None, ndim: int) -> Any:
        if owner is None:
            return with_axes(self.elsewhere, [()] * ndim)
        more = ndim - len(self.shapes[owner])
        of_owner = self.spread[owner]
        return with_axes(of_owner, [*[()] * more, *axes_of_dimensions(of_owner, ndim - more)])

    def placed_state(self, state: optax.OptState) -> optax.OptState:
        """A state where it belongs."""
        return jax.tree.map(placed, state, self.of_state(state))

    def placed(self, name: str, tree: Any, shardings: Mapping[Path, Any]) -> Any:
        """A tree like the parameters, or with ``None`` for some of them, at ``shardings``."""
        self.check(name, tree)
        return jax.tree_util.tree_map_with_path(
            lambda path, x: placed(x, shardings[_short(path)]) if _is_array(x) else x, tree
        )

    def check(self, name: str, tree: Any) -> None:
        """Raises at the first array of a tree that is not one of the parameters."""
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            if not _is_array(x):
                continue
            shape, here = self.shapes.get(_short(path)), f"{name}{jax.tree_util.keystr(path)}"
            if shape is None:
                raise ValueError(
                    f"{here} is not among the parameters that zero was built with, which are "
                    f"{shown(', '.join(self.names.values()), 200)}; build it with what init is given"
                )
            if np.shape(x) != shape:
                raise ValueError(
                    f"{here} has shape {np.shape(x)}, but zero was built with {self.names[_short(path)]}, "
                    f"which has {shape}"
                )
            mesh = getattr(None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None), "mesh", None)
            if mesh is not None and mesh != self.elsewhere.mesh:
                raise ValueError(f"{here} lies on {mesh}, but zero was built for {self.elsewhere.mesh}; build it anew")


class _Plan:
    """The shapes of the state of ``tx``, and its layout."""

    def __init__(self, tx: Any, params: optax.Params, axis: Any, min_size: Any, may_be_zero: bool = True) -> None:
        """The arguments are those of :func:`shardings`."""
        inner = check_transformation("tx", tx)
        min_size = check_count("min_size", min_size, at_least=0)
        arrays = {path: x for path, x in jax.tree_util.tree_leaves_with_path(params) if _is_array(x)}
        names = {_short(path): f"params{jax.tree_util.keystr(path)}" for path in arrays}
        shapes = {_short(path): tuple(x.shape) for path, x in arrays.items()}
        checked = {_short(path): _checked_sharding(names[_short(path)], x) for path, x in arrays.items()}
        with _zeros_met() as met:
            self.state = jax.eval_shape(*_of_arrays(inner.init, params))
        if met:
            axis, min_size = _as_zero(inner, met, axis, min_size, may_be_zero)
        own, elsewhere = _completed(checked, names, axis)
        spread = own if axis is None else _all_spread(own, shapes, axis, min_size, _with_scales(self.state, shapes))
        self.layout = _Layout(names, shapes, own, spread, elsewhere)


@contextlib.contextmanager
def _zeros_met() -> Iterator[list[_Init]]:
    """Collects every :func:`zero` whose ``init`` is called."""
    met: list[_Init] = []
    token = _SEEN.set(met)
    try:
        yield met
    finally:
        _SEEN.reset(token)


def _as_zero(
    tx: optax.GradientTransformation, met: Sequence[_Init], axis: Any, min_size: int, may_be_zero: bool
) -> tuple[str, int]:
    """The axis and the limit of a transformation that is a :func:`zero`."""
    if not may_be_zero or tx.init is not met[0] or len(met) > 1:
        raise ValueError(
            "zero must be the outermost transformation, but tx has one inside; put a single zero around all of tx"
        )
    if axis not in (None, met[0].axis) or min_size not in (0, met[0].min_size):
        raise ValueError(
            f"axis and min_size must be those of zero, {met[0].axis!r} and {met[0].min_size}, or left out, got "
            f"{shown(axis)} and {min_size}"
        )
    return met[0].axis, met[0].min_size


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape")


def _of_arrays(init: Callable[..., Any], params: optax.Params) -> tuple[Callable[..., Any], list[Any]]:
    """``init`` as a function of the arrays in ``params``, and these. JAX cannot take flags and functions."""
    leaves, structure = jax.tree.flatten(params)
    is_argument = [_is_array(x) for x in leaves]
    rest = [None if is_array else x for x, is_array in zip(leaves, is_argument, strict=True)]

    def of_arrays(arrays: Sequence[Any]) -> Any:
        remaining = iter(arrays)
        whole = [next(remaining) if is_array else x for x, is_array in zip(rest, is_argument, strict=True)]
        return init(jax.tree.unflatten(structure, whole))

    return of_arrays, [x for x, is_array in zip(leaves, is_argument, strict=True) if is_array]


# --- Where the parameters lie --------------------------------------------------------------------------------


def _completed(checked: Mapping[Path, Any], names: Mapping[Path, str], axis: Any) -> tuple[dict[Path, Any], Any]:
    """The sharding of each parameter, and that of what belongs to none of them."""
    mesh = None
    for path, sharding in checked.items():
        if isinstance(sharding, NamedSharding):
            mesh = mesh or sharding.mesh
            if sharding.mesh != mesh:
                raise ValueError(
                    f"params must lie on one mesh, but {names[path]} lies on {sharding.mesh}, and others on {mesh}"
                )
    if mesh is None:
        if axis is not None:
            raise ValueError(
                f"params must lie on a mesh that has the axis {shown(axis)}, got {_count(checked)} without a "
                "NamedSharding; place them with jax.device_put(params, NamedSharding(mesh, PartitionSpec()))"
            )
        default = jnp.zeros(()).sharding
        elsewhere = next((sharding for sharding in checked.values() if sharding is not None), default)
        return {path: sharding or elsewhere for path, sharding in checked.items()}, elsewhere
    if axis is not None and axis not in mesh.axis_names:
        raise ValueError(f"axis must be one of the mesh, {', '.join(map(repr, mesh.axis_names))}, got {shown(axis)}")
    replicated = NamedSharding(mesh, PartitionSpec())
    own = {path: x if isinstance(x, NamedSharding) else replicated for path, x in checked.items()}
    return own, replicated


def _count(arrays: Mapping[Path, Any]) -> str:
    return f"{len(arrays)} arrays, all" if arrays else "no arrays,"


def _checked_sharding(name: str, x: Any) -> Sharding | None:
    """The sharding of a parameter; ``None`` for an array of NumPy, or for shapes that do not say where they lie."""
    if isinstance(x, jax.core.Tracer):
        raise ValueError(
            f"{name} is traced, so its sharding is unknown; call this outside of jit, with arrays or with "
            "jax.ShapeDtypeStruct(shape, dtype, sharding=...)"
        )
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding) and not isinstance(sharding.mesh, Mesh):
        raise ValueError(f"{name} lies on an abstract mesh, without devices; give it a NamedSharding on a Mesh")
    if sharding is not None and not isinstance(sharding, NamedSharding) and len(sharding.device_set) > 1:
        raise ValueError(f"{name} must have a NamedSharding, got {shown(sharding)}; place it with jax.device_put")
    return sharding


# --- Which parameter an array belongs to ---------------------------------------------------------------------


def _short(path: Path) -> Path:
    """``path`` without the attribute in which Flax's nnx keeps an array: its optimizer has paths of both kinds."""
    is_variable = len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
    return path[:-1] if is_variable else path


def _owners(flat: Sequence[tuple[Path, Any]], shapes: Mapping[Path, tuple[int, ...]]) -> dict[Path, Path | None]:
    """For each array of a state, the path of the parameter that it belongs to, or ``None``.

    ``optax.tree.map_params`` does not find it in the states of ``masked``, ``partition`` and ``flatten``. Where the
    paths of several parameters fit, it is the one of the largest tree of parameters that begins at the same place.
    """
    candidates: dict[Path, list[tuple[Path, Path]]] = {}  # where a tree of parameters may begin, and the path in it
    trees: Counter[Path] = Counter()  # how many parameters such a tree has
    for path, x in flat:
        shape = unboxed(x).shape if is_encoded(x) else np.shape(x)
        splits = [(p[:i], p[i:]) for p in dict.fromkeys((path, _short(path))) for i in range(len(p) + 1)]
        candidates[path] = [split for split in splits if _fits(shape, shapes.get(split[1]), split[1])]
        trees.update(start for start, _ in candidates[path])
    return {
        path: min(splits, key=lambda split: (-trees[split[0]], len(split[0])))[1] if splits else None
        for path, splits in candidates.items()
    }


def _fits(shape: tuple[int, ...], of_param: tuple[int, ...] | None, path: Path) -> bool:
    """Whether a shape ends with that of a parameter; parameters that are one bare array have no path to tell by."""
    if of_param is None or not path:
        return shape == of_param
    return shape[len(shape) - len(of_param) :] == of_param


def _with_scales(state: Any, shapes: Mapping[Path, tuple[int, ...]]) -> set[Path | None]:
    """The parameters of which the state has codes with a scale for each row."""
    flat = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_encoded)
    owners = _owners(flat, shapes)
    return {owners[path] for path, x in flat if is_encoded(x) and unboxed(x).scale is not None}


def _all_spread(
    own: Mapping[Path, Any], shapes: Mapping[Path, tuple[int, ...]], axis: str, min_size: int, in_rows: set[Path | None]
) -> dict[Path, Any]:
    return {
        path: _spread(own[path], shape, axis, path in in_rows) if math.prod(shape) >= min_size else own[path]
        for path, shape in shapes.items()
    }


def _spread(own: NamedSharding, shape: tuple[int, ...], axis: str, keeps_rows: bool) -> Any:
    """``own`` with ``axis`` at the dimension with the most rows on each device, if it divides one.

    With ``keeps_rows``, the last dimension is split only if no other can be, because the devices would have to agree on
    the scale of each row.
    """
    dimensions, sizes = axes_of_dimensions(own, len(shape)), own.mesh.shape
    if any(axis in names for names in dimensions):
        return own
    kinds = dict(zip(own.mesh.axis_names, own.mesh.axis_types, strict=True))
    left = [size // math.prod(sizes[name] for name in names) for size, names in zip(shape, dimensions, strict=True)]
    fitting = [
        i
        for i, names in enumerate(dimensions)
        if left[i] and left[i] % sizes[axis] == 0 and all(kinds[name] == kinds[axis] for name in names)
    ]
    if keeps_rows and fitting != [len(shape) - 1]:
        fitting = [i for i in fitting if i != len(shape) - 1]
    if not fitting:
        return own
    most = max(fitting, key=lambda i: left[i])
    return with_axes(own, [(*names, axis) if i == most else names for i, names in enumerate(dimensions)])
