"""On which device does each piece of an optimizer's state live? For any Optax transformation.

Read from the top down: the shardings of a state; the transformation that spreads one over a mesh axis (ZeRO); the
layout behind both; how an array gets there; are the copies of replicated arrays equal?
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from rmsprop_jax.arguments import check_count, check_transformation, shown
from rmsprop_jax.checksums import checksums
from rmsprop_jax.codes import Encoded, is_encoded, unboxed

__all__ = ["abstract_state", "check_replicas", "shardings", "zero"]


# --- The shardings of a state --------------------------------------------------------------------------------


def shardings(
    tx: optax.GradientTransformation, params: optax.Params, axis: str | None = None, *, min_size: int = 0
) -> Any:
    """The sharding of every array in the state of ``tx``.

    An array that is kept for a parameter, such as an average, is sharded like the parameter. (Its path in the state
    ends in that of the parameter, and its shape in the shape.) Everything else is replicated on the same mesh: steps,
    counts, injected numbers. So a state can be made where it belongs::

        state = jax.jit(tx.init, out_shardings=sharding.shardings(tx, params))(params)

    ``axis`` spreads the state over the mesh axis of that name, along which the parameters are replicated (ZeRO)::

        mesh (data=4, model=2)     parameter P(None, "model")     state P("data", "model")

    The axis is added to the dimension that has the most rows on each device, among those that it divides evenly. An
    array stays as it is if there is none, or if its parameter is sharded over ``axis`` already (FSDP).

    Args:
      tx: any Optax transformation, or the result of :func:`zero`, which brings its ``axis`` and ``min_size`` along.
      params: the parameters where they lie, or a ``jax.ShapeDtypeStruct`` with a sharding for each. On a mesh, they
        have a ``NamedSharding``; what has none counts as replicated. Without a mesh, the state lies where the
        parameters do.
      axis: the name of a mesh axis; ``None`` for the layout of the parameters.
      min_size: the smallest number of elements that an array must have to be spread over ``axis``.

    Returns:
      A tree like the state, with a ``jax.sharding.Sharding`` for each array.

    Raises:
      ValueError: if ``axis`` is not an axis of the mesh, if parameters are traced or lie on two meshes, or if
        ``min_size`` is negative.
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
      ('data', None) ()

    Source:
      S. Rajbhandari et al., arXiv:1910.02054 (ZeRO, stage 1: the state, and stage 2: the gradients too).
    """
    _, layout, state = _planned(tx, params, axis, min_size)
    return layout.of_state(state)


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
    _, layout, state = _planned(tx, params, axis, min_size)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, layout.of_state(state)
    )


# --- State that is spread over a mesh axis -------------------------------------------------------------------


class Zero(optax.GradientTransformationExtraArgs):  # type: ignore[misc]  # Optax has no types
    """What :func:`zero` returns: a transformation that knows how its state is spread.

    Attributes:
      axis: the name of the mesh axis.
      min_size: the smallest number of elements of an array that is spread.
    """

    axis: str
    min_size: int


def zero(tx: optax.GradientTransformation, params: optax.Params, axis: str, *, min_size: int = 0) -> Zero:
    """``tx``, with its state spread over a mesh axis along which the parameters are replicated (ZeRO).

    In a compiled step, every device updates its part and sends it to the others::

        gradient ← its part of the sum over the devices        reduce-scatter
        update, state ← tx.update(gradient, state)             on this part alone
        update ← the parts of all devices                      all-gather

    The numbers are those of ``tx`` alone, but a device holds and updates only 1/n of the state, where n is the size of
    the axis. Training with replicated gradients sends the same number of bytes: an all-reduce is a reduce-scatter and
    an all-gather. (XLA makes reduce-scatters on GPUs and TPUs. On CPUs, an all-reduce stays one.)

    It must be the outermost transformation: clipping, schedules and ``storage.compress`` go inside of it. So do
    ``optax.MultiSteps``, ``masked``, ``partition`` and ``inject_hyperparams``. Call it in ``jax.jit``, not in
    ``jax.shard_map``. Meshes may have Auto and Explicit axes.

    Args:
      tx: any Optax transformation.
      params: see :func:`shardings`. They say where everything lies, and are not kept.
      axis: the name of a mesh axis, for example that of data parallelism. How it is added to an array's own sharding is
        described at :func:`shardings`.
      min_size: the smallest number of elements that an array must have to be spread. Small arrays are not worth a
        message.

    Returns:
      A transformation. Its ``init`` makes the state where it belongs, without ``jax.jit`` too. ``shardings`` and
      ``abstract_state`` take it as it is.

    Raises:
      ValueError: as :func:`shardings` does; if the parameters do not lie on a mesh; at ``update`` inside of
        ``jax.shard_map``.
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
    inner, layout, _ = _planned(tx, params, axis, min_size)

    def init(params: optax.Params) -> optax.OptState:
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params)):
            return layout.placed_state(inner.init(params))
        init, arrays = _of_arrays(inner.init, params)
        return jax.jit(init, out_shardings=layout.of_state(jax.eval_shape(init, arrays)))(arrays)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        _refuse_manual_axes()
        updates, params = layout.placed(updates, layout.spread), layout.placed(params, layout.spread)
        updates, state = inner.update(updates, layout.placed_state(state), params, **extra_args)
        return layout.placed(updates, layout.own), layout.placed_state(state)

    transformation = Zero(init, update)
    transformation.axis, transformation.min_size = axis, min_size
    return transformation


# --- The layout ----------------------------------------------------------------------------------------------

Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where parameters lie, and where what belongs to them does.

    Attributes:
      elsewhere: the sharding of what belongs to no parameter.
      shapes: of the parameters, by path.
      own: their shardings.
      spread: the shardings of what is kept for them, with ``axis`` if there is one.
    """

    elsewhere: Sharding
    shapes: Mapping[Path, tuple[int, ...]]
    own: Mapping[Path, Sharding]
    spread: Mapping[Path, Sharding]

    def of_state(self, state: Any) -> Any:
        """The sharding of each array in a state, or in its shapes."""
        flat, structure = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_encoded)
        return jax.tree.unflatten(structure, [self._of_leaf(_short(path), x) for path, x in flat])

    def _of_leaf(self, path: Path, x: Any) -> Any:
        if not is_encoded(x):
            return self._of_array(path, x)
        place = self._of_array(path, unboxed(x).codes)
        rows = _with_spec(place, _entries(place, len(x.shape))[:-1])
        return Encoded(*(jax.tree.map(lambda _, of=of: of, part) for part, of in zip(x, (place, rows), strict=True)))

    def _of_array(self, path: Path, x: Any) -> Any:
        owner, ndim = _owner(path, np.shape(x), self.shapes), np.ndim(x)
        if owner is None:
            return _with_spec(self.elsewhere, _entries(self.elsewhere, ndim))
        place, own = self.spread[owner], len(self.shapes[owner])
        return _with_spec(place, (*[()] * (ndim - own), *_entries(place, own)))

    def placed_state(self, state: optax.OptState) -> optax.OptState:
        """A state where it belongs."""
        return jax.tree.map(_placed, state, self.of_state(state))

    def placed(self, tree: Any, places: Mapping[Path, Sharding]) -> Any:
        """A tree like the parameters, or with ``None`` for some of them, at ``places``."""

        def leaf(path: Path, x: Any) -> Any:
            place = places.get(_short(path))
            return x if place is None or np.shape(x) != self.shapes[_short(path)] else _placed(x, place)

        return jax.tree_util.tree_map_with_path(leaf, tree)


def _planned(
    tx: optax.GradientTransformation, params: optax.Params, axis: str | None, min_size: int
) -> tuple[optax.GradientTransformationExtraArgs, _Layout, Any]:
    """The transformation, the layout of its state, and the shapes of the state."""
    inner = check_transformation("tx", tx)
    min_size = check_count("min_size", min_size, at_least=0)
    if isinstance(inner, Zero):
        if axis not in (None, inner.axis):
            raise ValueError(f"axis must be that of zero, {inner.axis!r}, or left out, got {shown(axis)}")
        axis, min_size = inner.axis, inner.min_size
    arrays = {_short(path): x for path, x in jax.tree_util.tree_leaves_with_path(params) if _is_array(x)}
    own, elsewhere = _places(params, axis)
    init, shapes = _of_arrays(inner.init, params)
    state = jax.eval_shape(init, shapes)
    in_rows = _with_scales(state, arrays)
    spread = {
        path: own[path]
        if axis is None or math.prod(x.shape) < min_size
        else _spread(own[path], x.shape, axis, keeps_rows=path in in_rows)
        for path, x in arrays.items()
    }
    return inner, _Layout(elsewhere, {p: x.shape for p, x in arrays.items()}, own, spread), state


def _places(params: optax.Params, axis: str | None) -> tuple[dict[Path, Any], Any]:
    """The sharding of each parameter, by path, and that of what belongs to none of them."""
    found: dict[Path, Any] = {}
    mesh = None
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if _is_array(x):
            name = f"params{jax.tree_util.keystr(path)}"
            found[_short(path)] = place = _checked_place(name, x)
            if mesh is not None and isinstance(place, NamedSharding) and place.mesh != mesh:
                raise ValueError(f"params must lie on one mesh, but {name} lies on {place.mesh}, and others on {mesh}")
            mesh = place.mesh if isinstance(place, NamedSharding) else mesh
    if mesh is None:
        if axis is not None:
            raise ValueError(
                f"params must lie on a mesh that has the axis {shown(axis)}, got none with a NamedSharding; place them "
                "with jax.device_put(params, NamedSharding(mesh, PartitionSpec()))"
            )
        default = jnp.zeros(()).sharding
        here = next((place for place in found.values() if place is not None), default)
        return {path: place or here for path, place in found.items()}, here
    if axis is not None and axis not in mesh.axis_names:
        raise ValueError(f"axis must be one of the mesh, {', '.join(map(repr, mesh.axis_names))}, got {shown(axis)}")
    replicated = NamedSharding(mesh, PartitionSpec())
    places = {path: place if isinstance(place, NamedSharding) else replicated for path, place in found.items()}
    return places, replicated


def _checked_place(name: str, x: Any) -> Sharding | None:
    """The sharding of a parameter; ``None`` for an array of NumPy, or for shapes that do not say where they lie."""
    if isinstance(x, jax.core.Tracer):
        raise ValueError(
            f"{name} is traced, so nobody knows where it lies; call this outside of jit, with arrays or with "
            "jax.ShapeDtypeStruct(shape, dtype, sharding=...)"
        )
    place = getattr(x, "sharding", None)
    if isinstance(place, NamedSharding) and not isinstance(place.mesh, Mesh):
        raise ValueError(f"{name} lies on an abstract mesh, without devices; give it a NamedSharding on a Mesh")
    if place is not None and not isinstance(place, NamedSharding) and len(place.device_set) > 1:
        raise ValueError(f"{name} must have a NamedSharding, got {shown(place)}; place it with jax.device_put")
    return place


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape")


def _of_arrays(init: Callable[..., Any], params: optax.Params) -> tuple[Callable[..., Any], list[Any]]:
    """``init`` as a function of the arrays in ``params``, and these. Flags and functions are no arguments of JAX's."""
    leaves, structure = jax.tree.flatten(params)
    arrays = [x for x in leaves if _is_array(x)]
    rest = [None if _is_array(x) else x for x in leaves]
    places = [i for i, x in enumerate(leaves) if _is_array(x)]

    def of_arrays(arrays: Sequence[Any]) -> Any:
        whole = [*rest]
        for i, x in zip(places, arrays, strict=True):
            whole[i] = x
        return init(jax.tree.unflatten(structure, whole))

    return of_arrays, arrays


def _short(path: Path) -> Path:
    """``path`` without the attribute in which Flax's nnx keeps an array: its optimizer has paths of both kinds."""
    is_variable = path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
    return path[:-1] if is_variable else path


def _owner(path: Path, shape: tuple[int, ...], shapes: Mapping[Path, tuple[int, ...]]) -> Path | None:
    """The path of the parameter for which an array is kept; its shape ends in that of the parameter.

    ``optax.tree.map_params`` does not find it in the states of ``masked``, ``partition`` and ``flatten``.
    """
    for start in range(len(path) + 1):
        like = shapes.get(path[start:])
        if like is not None and shape[len(shape) - len(like) :] == like:
            return path[start:]
    return None


def _with_scales(state: Any, params: Mapping[Path, Any]) -> set[Path | None]:
    """The parameters of which the state has codes with a scale for each row."""
    shapes = {path: x.shape for path, x in params.items()}
    flat = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_encoded)
    encoded = [(_short(path), unboxed(x)) for path, x in flat if is_encoded(x)]
    return {_owner(path, x.shape, shapes) for path, x in encoded if x.scale is not None}


def _spread(place: Any, shape: tuple[int, ...], axis: str, *, keeps_rows: bool) -> Any:
    """``place`` with ``axis`` at the dimension with the most rows on each device, if it divides one.

    Where rows have a scale, they are taken apart only if nothing else divides: it would have to be agreed upon.
    """
    entries, sizes = _entries(place, len(shape)), place.mesh.shape
    if any(axis in names for names in entries):
        return place
    kinds = dict(zip(place.mesh.axis_names, place.mesh.axis_types, strict=True))
    left = [size // math.prod(sizes[name] for name in names) for size, names in zip(shape, entries, strict=True)]
    fitting = [
        i
        for i, names in enumerate(entries)
        if left[i] and left[i] % sizes[axis] == 0 and all(kinds[name] == kinds[axis] for name in names)
    ]
    if keeps_rows and fitting != [len(shape) - 1]:
        fitting = [i for i in fitting if i != len(shape) - 1]
    if not fitting:
        return place
    most = max(fitting, key=lambda i: left[i])
    return _with_spec(place, tuple((*names, axis) if i == most else names for i, names in enumerate(entries)))


# --- How an array gets there ---------------------------------------------------------------------------------


def _entries(place: Any, ndim: int) -> tuple[tuple[str, ...], ...]:
    """The names of the mesh axes that each dimension is sharded over."""
    spec = tuple(place.spec) if isinstance(place, NamedSharding) else ()
    names = [(x,) if isinstance(x, str) else tuple(x or ()) for x in spec]
    return (*names, *[()] * (ndim - len(names)))


def _with_spec(place: Any, entries: Sequence[tuple[str, ...]]) -> Any:
    """``place`` with these entries; itself if it is on a single device.

    There is one for each dimension, as an array with Explicit axes has it after a step. With fewer of them, the array
    lies in the same place, but JAX compiles the second step anew.
    """
    if not isinstance(place, NamedSharding):
        return place
    spec = PartitionSpec(*(names if len(names) > 1 else next(iter(names), None) for names in entries))
    return NamedSharding(place.mesh, spec, memory_kind=place.memory_kind)


def _placed(x: Any, place: Any) -> Any:
    """``x`` at ``place``. Inside ``jit``, axes of a mesh that are Explicit need another primitive than Auto ones."""
    if not isinstance(x, jax.core.Tracer):
        return jax.device_put(x, place)
    kinds = dict(zip(place.mesh.axis_names, place.mesh.axis_types, strict=True))
    for kind, put in ((AxisType.Explicit, _reshard), (AxisType.Auto, jax.lax.with_sharding_constraint)):
        if kind in kinds.values():
            entries = [tuple(name for name in names if kinds[name] == kind) for names in _entries(place, x.ndim)]
            x = put(x, _with_spec(place, entries))
    return x


def _refuse_manual_axes() -> None:
    if AxisType.Manual in (jax.sharding.get_abstract_mesh().axis_types or ()):
        raise ValueError(
            "the update of zero must be outside of jax.shard_map, where arrays are whole; call it in jax.jit, around "
            "the shard_map that computes the gradient"
        )


def _reshard(x: jax.Array, place: Sharding) -> jax.Array:
    home: Any = jax.sharding
    if not hasattr(home, "reshard"):  # JAX before 0.7
        home = importlib.import_module("jax.experimental.shard")
    moved: jax.Array = home.reshard(x, place)
    return moved


# --- Are the copies equal? -----------------------------------------------------------------------------------


def check_replicas(tree: Any) -> int:
    """Raises if copies of a replicated array, on different devices, differ in a single bit.

    JAX does not notice. It takes a replicated array from whichever device is at hand, so a run whose copies differ goes
    on, and its checkpoints hold one of them. They differ after a fault of the hardware, or if processes have built an
    array from different data.

    Every device computes a checksum of what it holds, 64 bits for each array, and only checksums are sent. In a run
    with many processes, all of them call this with the same tree, and all raise the same error.

    Args:
      tree: any tree, such as ``(params, state)``. Compared are its arrays on a mesh: parts of an array that several
        devices hold. Others have one copy.

    Returns:
      How many arrays were compared: those of which some part has more than one copy.

    Raises:
      ValueError: if copies differ. The message names the first such array, and the devices. Also if an array lies on
        several devices without a ``NamedSharding``, or is traced.

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
    copied: dict[Any, list[tuple[str, jax.Array]]] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(x, jax.Array):
            name = f"tree{jax.tree_util.keystr(path)}"
            place = _checked_place(name, x)
            if isinstance(place, NamedSharding) and place.num_devices > len(set(_parts(x).values())) and x.size:
                copied.setdefault(place.mesh, []).append((name, x))
    for mesh, arrays in copied.items():
        sums = checksums(mesh, [x for _, x in arrays])
        for (name, x), of_devices in zip(arrays, np.swapaxes(sums, 0, 1), strict=True):
            _check_copies(name, x, dict(zip(mesh.devices.flat, map(tuple, of_devices), strict=True)))
    return sum(map(len, copied.values()))


def _parts(x: jax.Array) -> dict[jax.Device, Any]:
    """Which part of ``x`` each device holds."""
    places = x.sharding.devices_indices_map(x.shape)
    return {device: tuple((of.start, of.stop) for of in index) for device, index in places.items()}


def _check_copies(name: str, x: jax.Array, sums: Mapping[jax.Device, Any]) -> None:
    first: dict[Any, jax.Device] = {}
    for device, part in _parts(x).items():
        other = first.setdefault(part, device)
        if sums[device] != sums[other]:
            raise ValueError(
                f"{name} has different copies on {_named(other)} and {_named(device)}; restore the last checkpoint "
                "whose copies were equal, and look for the cause: a device that computes wrong, or processes that "
                "build an array from different data"
            )


def _named(device: jax.Device) -> str:
    return f"{device} of process {device.process_index}"
