"""What do eight devices send each other in a whole training step, with the state of RMSProp in different layouts?

A perceptron with three layers of 1024 × 1024, whose batch is spread over the devices: its gradients, the update with
momentum, and ``apply_updates``, in one program. It is compiled, and nothing is run.

``python -m benchmarks exchanged`` compiles it for CPUs, whose compiler makes no reduce-scatters. ``python -m
benchmarks.exchanged tpu`` or ``cuda`` compiles it for eight devices that are only described. It needs what
``benchmarks.compiled`` does, and writes ``benchmarks/results/exchanged_<platform>.json``.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: there is nothing to run on

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import compiled, hlo, layouts, report
from benchmarks.measure import save
from benchmarks.trees import Shape
from rmsprop_jax import sharding

DEVICES, WIDTH, BATCH = 8, 1024, 4096
SHAPES: list[Shape] = [(WIDTH, WIDTH), (WIDTH,)] * 3
TOPOLOGIES = {"tpu": {"topology_name": "v5e:2x4"}, "cuda": {"topology": f"1x1x{DEVICES}"}}


def measure(full: bool) -> list[dict[str, Any]]:
    """A row for every layout, from a process with eight CPU devices; ``full`` changes nothing."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.exchanged", "cpu"],
        env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
    )
    rows: list[dict[str, Any]] = json.loads(run.stdout)
    return rows


def row(layout: str, devices: Sequence[jax.Device]) -> dict[str, Any]:
    mesh = Mesh(np.array(devices), layouts.AXIS)
    params = layouts.placed(SHAPES, layout, mesh)
    tx = layouts.transformation(layout, params)
    state = sharding.abstract_state(tx, params)
    batch = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P(layouts.AXIS)))
    step = jax.jit(
        lambda params, state, batch: train(tx, params, state, batch),
        out_shardings=(layouts.places(params), layouts.places(state)),
        donate_argnums=(0, 1),
    )
    text = step.lower(params, state, batch).compile().as_text()
    return {"layout": layout, "devices": len(devices), **hlo.summary(text, SHAPES, len(devices))}


def train(tx: optax.GradientTransformation, params: Any, state: Any, batch: jax.Array) -> Any:
    """Parameters and state after a step that makes the outputs smaller."""

    def loss(params: Any) -> jax.Array:
        x = batch
        for weights, bias in zip(params[::2], params[1::2], strict=True):
            x = jnp.tanh(x @ weights + bias[None])
        return jnp.mean(x * x)

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exchanged", description=__doc__.splitlines()[0])
    parser.add_argument("platform", choices=("cpu", *TOPOLOGIES))
    platform = parser.parse_args().platform
    if platform == "cpu":
        print(json.dumps([row(layout, jax.devices()) for layout in layouts.LAYOUTS]))
        return
    description = compiled.DESCRIPTIONS[platform] | TOPOLOGIES[platform]
    devices = topologies.get_topology_desc(platform=platform, **description).devices
    rows = [row(layout, devices) for layout in layouts.LAYOUTS]
    save("exchanged", rows, platform, f"{DEVICES} × {devices[0].device_kind}, described")
    print(*report.tables("exchanged", platform).values(), sep="\n\n")


if __name__ == "__main__":
    main()
