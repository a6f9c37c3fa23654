"""On which devices does an array lie, and how does it get there?

Read from the top down: a new number, beside the parameters that it belongs to; the axes of a mesh that an array is
sharded over; an array at a sharding.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding


def new_counter(params: Any) -> jax.Array:
    """Zero on the devices of ``params``, replicated on their mesh. Elsewhere, the step would be compiled twice."""
    step = jnp.zeros((), jnp.int32)
    for leaf in jax.tree.leaves(params):
        sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        elif not (isinstance(sharding, SingleDeviceSharding) and getattr(leaf, "committed", False)):
            continue
        placed: jax.Array = jax.device_put(step, sharding)
        return placed
    return step


def axes_of_dimensions(sharding: Any, ndim: int) -> list[tuple[str, ...]]:
    """The names of the mesh axes that each dimension is sharded over; none without a mesh."""
    spec = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
    names = [(x,) if isinstance(x, str) else tuple(x or ()) for x in spec]
    return [*names, *[()] * (ndim - len(names))]


def with_axes(sharding: Any, axes: Sequence[tuple[str, ...]]) -> Any:
    """``sharding`` with other axes for each dimension; itself if it is on a single device.

    The spec is spelled as that of an array that comes out of a step: to the last dimension if there are Explicit axes,
    and else to the last one that is sharded. In another spelling, ``jit`` would trace the second step anew.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    entries = [names if len(names) > 1 else next(iter(names), None) for names in axes]
    while entries and entries[-1] is None and AxisType.Explicit not in sharding.mesh.axis_types:
        entries.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*entries), memory_kind=sharding.memory_kind)


def placed(x: Any, sharding: Any) -> Any:
    """``x`` at ``sharding``. Inside ``jit``, Explicit axes of a mesh need another primitive than Auto ones."""
    if not isinstance(x, jax.core.Tracer):
        return jax.device_put(x, sharding)
    kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    for kind, put in ((AxisType.Explicit, _reshard), (AxisType.Auto, jax.lax.with_sharding_constraint)):
        if kind in kinds.values():
            axes = [
                tuple(name for name in names if kinds[name] == kind) for names in axes_of_dimensions(sharding, x.ndim)
            ]
            x = put(x, with_axes(sharding, axes))
    return x


def _reshard(x: jax.Array, sharding: Sharding) -> jax.Array:
    home: Any = jax.sharding
    if not hasattr(home, "reshard"):  # JAX before 0.7
        home = importlib.import_module("jax.experimental.shard")
    moved: jax.Array = home.reshard(x, sharding)
    return moved


def inside_shard_map() -> bool:
    """Whether arrays are shards here."""
    return AxisType.Manual in (jax.sharding.get_abstract_mesh().axis_types or ())
