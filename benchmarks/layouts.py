"""How much of a state does each device hold, what does an update make devices send, and are the bits the same?

Processes of 1, 2, 4 and 8 CPU devices compile an update with momentum for the shapes of two models. Nothing is
allocated for that. Parameters are replicated (data parallelism), or lie in parts on the devices (FSDP); with ``zero``
they are replicated, and the state lies in parts. The counter must see collectives where there are some, so ``control``
is the same update with its gradients summed up.

Then such processes make 20 steps with ``zero`` and 20 with a replicated state, from the same gradients, for some arrays
of a smaller model. ``update`` returns updates and state, ``step`` parameters and state. ``differ`` counts the elements
that have other bits than with the replicated state. ``units`` says how far they are off at most, in units of the last
place of the largest in their array, and ``one device`` whether all bits are those of one device. XLA rounds a·b + c
once or twice, as the layout suits it. So the same is done without the instruction that rounds it once.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import hlo, peers
from benchmarks.collectives import STEPS, WITHOUT_FMA
from benchmarks.trees import TREES, Shape, parameters
from rmsprop_jax import sharding, storage

AXIS = "data"
DEVICES = (1, 2, 4, 8)
MODELS = ("ResNet-50", "GPT-2 small")
TRAINED = "EfficientNet-B0"
EVERY = 15  # array, from the second on: 15 arrays, the last matrix among them
LAYOUTS = ("replicated", "FSDP", "ZeRO", "ZeRO, 8 bits")
VARIANTS = ("plain", "momentum", "centered + momentum")


def measure(full: bool) -> list[dict[str, Any]]:
    """A row for every model, layout and number of devices, and for every comparison; ``full`` changes nothing."""
    rows = [row for devices in DEVICES for row in process(devices, "layouts")]
    for fma, flags in ((True, ""), (False, WITHOUT_FMA)):
        found = [process(devices, "bits", flags) for devices in DEVICES]
        one = [row.pop("hash") for row in found[0]]
        for row, alone in zip(itertools.chain(*found), itertools.cycle(one)):
            rows.append({**row, "fma": fma, "one device": row.pop("hash", alone) == alone})
    return rows


def process(devices: int, what: str, flags: str = "") -> list[dict[str, Any]]:
    """The rows of another process, which has so many devices."""
    flags = f"{flags} --xla_force_host_platform_device_count={devices}"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.layouts", what],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
    )
    rows: list[dict[str, Any]] = json.loads(run.stdout)
    return rows


# --- Layouts -------------------------------------------------------------------------------------------------


def placed(shapes: list[Shape], layout: str, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
    """Parameters that are not there, and where they lie."""

    def spec(shape: Shape) -> P:
        fitting = [i for i, size in enumerate(shape) if size % mesh.size == 0]
        if layout != "FSDP" or not fitting:
            return P()
        return P(*[None] * (most := max(fitting, key=lambda i: shape[i])), AXIS, *[None] * (len(shape) - most - 1))

    return [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec(shape))) for shape in shapes]


def transformation(layout: str, params: Any, variant: str = "momentum") -> optax.GradientTransformation:
    tx = peers.ours(**peers.VARIANTS[variant])
    if "8 bits" in layout:
        tx = storage.compress(tx, 8)
    return sharding.zero(tx, params, AXIS) if "ZeRO" in layout else tx


def places(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def row(model: str, layout: str, devices: int) -> dict[str, Any]:
    shapes = TREES[model]
    params = placed(shapes, layout, Mesh(np.array(jax.devices()), AXIS))
    tx = transformation(layout, params)
    state = sharding.abstract_state(tx, params)
    update = jax.jit(tx.update, out_shardings=(places(params), places(state))).lower(params, state, params).compile()
    return {
        "what": "layout",
        "model": model,
        "layout": layout,
        "devices": devices,
        "parameters": parameters(shapes),
        "state": sum(map(on_a_device, jax.tree.leaves(state))),
        **hlo.summary(update.as_text(), shapes, devices),
    }


def on_a_device(x: jax.ShapeDtypeStruct) -> int:
    """Bytes."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def control(model: str, devices: int) -> dict[str, Any]:
    """FSDP, and a sum of each gradient, which all devices have to know: one number for each array."""
    shapes = TREES[model]
    params = placed(shapes, "FSDP", Mesh(np.array(jax.devices()), AXIS))
    tx = transformation("FSDP", params)
    state = sharding.abstract_state(tx, params)

    def update(grads: Any, state: Any) -> Any:
        return tx.update(jax.tree.map(lambda g: g / jnp.sum(g), grads), state)

    program = jax.jit(update, out_shardings=(places(params), places(state))).lower(params, state).compile()
    return {
        "what": "control",
        "model": model,
        "layout": "FSDP, each gradient divided by its sum",
        "devices": devices,
        "parameters": parameters(shapes),
        **hlo.summary(program.as_text(), shapes, devices),
    }


# --- Bits ----------------------------------------------------------------------------------------------------


def bits(program: str, variant: str, compressed: bool, devices: int) -> dict[str, Any]:
    """ZeRO's results beside those that are replicated, after some steps."""
    shapes = TREES[TRAINED][1::EVERY]
    params = placed(shapes, "replicated", Mesh(np.array(jax.devices()), AXIS))
    layouts = ("replicated, 8 bits", "ZeRO, 8 bits") if compressed else ("replicated", "ZeRO")
    results = [results_of(program, transformation(layout, params, variant), params) for layout in layouts]
    pairs = list(zip(*results, strict=True))
    return {
        "what": "bits",
        "program": program,
        "variant": variant + (", 8 bits" if compressed else ""),
        "devices": devices,
        "elements": sum(x.size for x, _ in pairs),
        "differ": int(sum(np.count_nonzero(x.view(f"u{x.itemsize}") != y.view(f"u{y.itemsize}")) for x, y in pairs)),
        "units": max(units(y, x) for x, y in pairs),
        "hash": hashlib.sha256(b"".join(x.tobytes() for x in results[1])).hexdigest(),
    }


def results_of(program: str, tx: optax.GradientTransformation, params: list[jax.ShapeDtypeStruct]) -> list[np.ndarray]:
    """The last updates, or else the parameters, and the state."""
    of_params, of_state = places(params), sharding.shardings(tx, params)
    shapes = [x.shape for x in params]

    def step(values: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, values)
        return (optax.apply_updates(values, updates) if program == "step" else updates), state

    jitted = jax.jit(step, out_shardings=(of_params, of_state), donate_argnums=1)
    values = jax.device_put(peers.arrays(shapes, "float32", seed=STEPS), of_params)
    state = jax.jit(tx.init, out_shardings=of_state)(values)
    for seed in range(STEPS):
        grads = jax.device_put(peers.arrays(shapes, "float32", seed), of_params)
        found, state = jitted(values, state, grads)
        values = found if program == "step" else values
    return [np.asarray(x) for x in jax.tree.leaves((found, state))]


def units(x: np.ndarray, y: np.ndarray) -> float:
    """How far ``x`` is from ``y``, in units of the last place of the largest element; integers in ones."""
    x, y = np.asarray(x), np.asarray(y)
    unit = 1.0 if x.dtype.kind != "f" else np.spacing(np.abs(y).max(initial=0))
    return float(np.abs(x.astype(np.float64) - y.astype(np.float64)).max(initial=0) / unit)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layouts", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("layouts", "bits"))
    devices = jax.device_count()
    if parser.parse_args().what == "layouts":
        rows = [row(model, layout, devices) for model in MODELS for layout in LAYOUTS]
        rows += [control(model, devices) for model in MODELS]
    else:
        kinds = [*((variant, False) for variant in VARIANTS), ("momentum", True)]
        rows = [bits(program, *kind, devices) for program in ("update", "step") for kind in kinds]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
