"""What ``test_distributed`` asks of many processes. Each prints its answer as JSON, in its last line.

Run: ``python many_processes.py JOB PORT PROCESSES PROCESS DEVICES FOLDER``, once for each process.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rmsprop_jax import rmsprop, sharding, storage

SHAPES = {"w": (64, 256), "b": (24,), "odd": (3,), "scalar": ()}

# Codes of 8 bits with a scale for each row; two averages and a count that is not ours.
TRANSFORMATIONS: dict[str, optax.GradientTransformation] = {
    "rmsprop": rmsprop(0.01, momentum=0.9, centered=True),
    "codes": storage.compress(rmsprop(0.01, momentum=0.9)),
    "adamw": optax.adamw(0.01),
}


def like(mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    place = NamedSharding(mesh, P())
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for name, shape in SHAPES.items()}


def named(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


# --- States that move --------------------------------------------------------------------------------------------


def save(mesh: Mesh, folder: Path) -> Any:
    """Trains each transformation for three steps and saves its state, once with Orbax and once with NumPy."""
    import orbax.checkpoint as ocp

    random = np.random.default_rng(0)
    params = {name: jax.device_put(jnp.ones(x.shape), x.sharding) for name, x in like(mesh).items()}
    for name, inner in TRANSFORMATIONS.items():
        tx = sharding.zero(inner, params, "data")
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(3):
            gradients = {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
            _, state = update(gradients, state, params)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / name, state)
        np.savez(folder / f"{name}.npz", **{path: np.asarray(x) for path, x in named(state).items()})
    return [restore(Mesh(jax.devices()[:count], "data"), folder) for count in (4, 2, 1)]


def restore(mesh: Mesh, folder: Path) -> Any:
    """Restores all states on ``mesh``. For each: what is wrong, and how many arrays are spread."""
    import orbax.checkpoint as ocp

    answer = {}
    for name, inner in TRANSFORMATIONS.items():
        tx = sharding.zero(inner, like(mesh), "data")
        with ocp.StandardCheckpointer() as checkpointer:
            state = checkpointer.restore(folder / name, sharding.abstract_state(tx, like(mesh)))
        places = named(sharding.shardings(tx, like(mesh)))
        with np.load(folder / f"{name}.npz") as file:
            saved = dict(file)
        arrays = named(state)
        wrong = [] if arrays.keys() == saved.keys() == places.keys() else ["other arrays"]
        for path, x in arrays.items():
            wrong += [f"{path} is not where it belongs"] if x.sharding != places[path] else []
            wrong += [f"{path} has another dtype"] if x.dtype != saved[path].dtype else []
            for shard in x.addressable_shards:
                same = np.asarray(shard.data).tobytes() == saved[path][shard.index].tobytes()
                wrong += [] if same else [f"{path} has other bits on {shard.device}"]
        answer[name] = {"wrong": wrong, "spread": sum(not x.is_fully_replicated for x in arrays.values())}
    return answer


# --- Copies that differ ------------------------------------------------------------------------------------------


def replicas(mesh: Mesh, folder: Path) -> Any:
    """What ``check_replicas`` says of equal copies, and of an array of which process 1 has one bit that differs."""

    def tree(wrong: bool) -> Any:
        own = np.arange(12, dtype=np.float32)
        if wrong and jax.process_index() == 1:
            own.view(np.uint32)[7] ^= 1
        make = jax.make_array_from_callback
        return {
            "params": {"a": make((12,), NamedSharding(mesh, P()), lambda index: np.ones(12, np.float32)[index])},
            "state": {"b": make((12,), NamedSharding(mesh, P()), lambda index: own[index])},
            "spread": make((12,), NamedSharding(mesh, P("data")), lambda index: own[index]),  # has no copies
        }

    answer = {"compared": sharding.check_replicas(tree(wrong=False))}
    try:
        sharding.check_replicas(tree(wrong=True))
    except ValueError as error:
        answer["error"] = str(error)
    return answer


def both(mesh: Mesh, folder: Path) -> Any:
    return {"restored": restore(mesh, folder), "replicas": replicas(mesh, folder)}


JOBS: dict[str, Callable[[Mesh, Path], Any]] = {"save": save, "both": both}


def main() -> None:
    job, port, *numbers, folder = sys.argv[1:]
    processes, process, devices = map(int, numbers)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    print(json.dumps(JOBS[job](Mesh(jax.devices(), "data"), Path(folder))))


if __name__ == "__main__":
    main()
