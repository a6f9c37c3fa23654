"""Do the copies of an array on different devices hold the same bits? No array moves to find out.

Read from the top down: the comparison; the checksums of all devices; that of one array on one device.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec


def parts(x: jax.Array) -> dict[jax.Device, Any]:
    """Which part of ``x`` each device holds."""
    slices = x.sharding.devices_indices_map(x.shape)
    return {device: tuple((of.start, of.stop) for of in index) for device, index in slices.items()}


def check_copies(named: Sequence[tuple[str, jax.Array]]) -> None:
    """Raises at the first of some arrays with a ``NamedSharding`` of which two copies differ."""
    own = [{device: tuple(map(int, x)) for device, x in _own_checksums(x).items()} for _, x in named]
    for (name, x), sums in zip(named, _of_all_processes([x for _, x in named], own), strict=True):
        first: dict[Any, jax.Device] = {}
        for device, part in parts(x).items():
            other = first.setdefault(part, device)
            if sums[device] != sums[other]:
                raise ValueError(
                    f"{name} has different copies on {_in_words(other)} and {_in_words(device)}; restore the last "
                    "checkpoint whose copies were equal, and look for the cause: a faulty device, or processes that "
                    "build an array from different data"
                )


def _in_words(device: jax.Device) -> str:
    return f"{device} of process {device.process_index}"


# --- The checksums of all devices ----------------------------------------------------------------------------


def _of_all_processes(
    arrays: Sequence[jax.Array], own: Sequence[Mapping[jax.Device, tuple[int, ...]]]
) -> list[dict[jax.Device, tuple[int, ...]]]:
    """For each array, the checksum of every device; ``own`` has those of this process."""
    devices = [list(parts(x)) for x in arrays]
    # Every device belongs to one process, and the others have zeros in its place.
    mine = np.array(
        [sums.get(device, (0, 0)) for sums, of in zip(own, devices, strict=True) for device in of], np.uint32
    )
    if not mine.size:
        return []
    gathered = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, *mine.shape)
    rows = iter(gathered.sum(axis=0, dtype=np.uint32).tolist())
    return [{device: tuple(next(rows)) for device in of} for of in devices]


def _own_checksums(x: jax.Array) -> dict[jax.Device, np.ndarray]:
    """Two words for what each device of this process holds of ``x``."""
    sharding: Any = x.sharding
    here = next(iter(sharding.addressable_devices), None)
    if here is None:  # all of it is in other processes
        return {}
    if sharding.memory_kind not in (None, here.default_memory().kind):  # offloaded
        x = jax.device_put(x, sharding.with_memory_kind(here.default_memory().kind))
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    with _within(sharding.mesh):
        sums = _program(sharding.mesh, sharding.spec)(x)
    return {shard.device: np.asarray(shard.data).reshape(2) for shard in sums.addressable_shards}


def _within(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """The mesh of an array as that of the context, which may be another one."""
    home: Any = jax
    within: contextlib.AbstractContextManager[Any]
    within = home.set_mesh(mesh) if hasattr(home, "set_mesh") else home.sharding.use_mesh(mesh)  # before JAX 0.7
    return within


@functools.lru_cache(maxsize=256)
def _program(mesh: Mesh, spec: PartitionSpec) -> Callable[[jax.Array], jax.Array]:
    """One for each layout of arrays. All arrays in one program would take long to compile."""
    home: Any = jax
    unchecked = "check_vma"
    if not hasattr(jax, "shard_map"):  # JAX before 0.6.1
        home = importlib.import_module("jax.experimental.shard_map")
        unchecked = "check_rep"

    def of_device(x: jax.Array) -> jax.Array:
        return _checksum(x).reshape(*[1] * len(mesh.axis_names), 2)

    layout: dict[str, Any] = {"in_specs": (spec,), "out_specs": PartitionSpec(*mesh.axis_names)}
    return jax.jit(home.shard_map(of_device, mesh=mesh, **layout, **{unchecked: False}))


# --- One array on one device ---------------------------------------------------------------------------------


def _checksum(x: jax.Array) -> jax.Array:
    """Two words of 32 bits. A change in one word of ``x`` always changes the first one."""
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag])
    if jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 8:
        x = x.astype(jnp.float32)  # exact
    bits = jnp.dtype(x.dtype).itemsize * 8
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, f"uint{min(bits, 32)}")
    elif bits == 64:
        x = jax.lax.bitcast_convert_type(x, jnp.uint32)
    words = x.astype(jnp.uint32).reshape(-1)
    position = jax.lax.iota(jnp.uint32, words.size)
    mixed = (words ^ (position * np.uint32(0x85EBCA6B))) * np.uint32(0xC2B2AE35)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x27D4EB2F)
    first = jnp.sum(words * (2 * position + 1), dtype=jnp.uint32)
    return jnp.stack([first, jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)])
