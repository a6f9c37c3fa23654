"""On which devices does a new number lie? Beside the parameters that it belongs to."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding


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
