"""How much longer does a step take to trace, lower and compile for 512 devices than for 8?

Several processes of 512 CPU devices compile a step with momentum of a transformer's 290 arrays, in turns for meshes of
8 and of 512 of them. Nothing is allocated: parameters and state are shapes that say where they lie. ``layout`` is
building the transformation and the shardings of its state, ``lower`` is tracing and lowering (JAX and us), and
``compile`` is XLA. Ratios are to 8 devices in the same round, and a process has the median over its rounds. The table
has the median over the processes, and their range. Times are processor seconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks import layouts, peers
from benchmarks.trees import Shape
from rmsprop_jax import sharding

MESHES = (8, 512)
LAYOUTS = ("FSDP", "ZeRO")
STAGES = ("layout", "lower", "compile")


def transformer(blocks: int = 24, width: int = 1024, words: int = 32768) -> Iterator[Shape]:
    """290 arrays: 12 for each block, an embedding and an output."""
    yield (words, width)
    for _ in range(blocks):
        yield from [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
        yield from [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    yield (width, words)


def measure(full: bool) -> list[dict[str, Any]]:
    """A row for every layout and mesh, from three processes; with ``full`` from seven."""
    processes = [process() for _ in range(7 if full else 3)]
    return [merged(rows) for rows in zip(*processes, strict=True)]


def process() -> list[dict[str, Any]]:
    """The rows that another process measured."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.meshes"],
        env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={max(MESHES)}", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
    )
    rows: list[dict[str, Any]] = json.loads(run.stdout)
    return rows


def merged(rows: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """The median over the processes, and the range of the ratios."""

    def over_processes(stage: str) -> dict[str, float]:
        ratios = [row["ratio"][stage] for row in rows]
        return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}

    return {
        **rows[0],
        "seconds": {stage: statistics.median(row["seconds"][stage] for row in rows) for stage in rows[0]["seconds"]},
        "ratio": {stage: over_processes(stage) for stage in rows[0]["ratio"]},
    }


def stages(layout: str, devices: int, shapes: list[Shape]) -> dict[str, float]:
    """Processor seconds of each stage."""
    jax.clear_caches()
    params = layouts.placed(shapes, layout, Mesh(np.array(jax.devices()[:devices]), layouts.AXIS))
    moments = [time.process_time()]
    tx = layouts.transformation(layout, params)
    state = sharding.abstract_state(tx, params)
    out = layouts.places(params), layouts.places(state)
    moments.append(time.process_time())
    lowered = jax.jit(peers.whole_step(tx), donate_argnums=(0, 1), out_shardings=out).lower(params, state, params)
    moments.append(time.process_time())
    lowered.compile()
    moments.append(time.process_time())
    found = {stage: after - before for stage, before, after in zip(STAGES, moments, moments[1:], strict=False)}
    return found | {"lower and compile": found["lower"] + found["compile"]}


def rows_of(layout: str, meshes: tuple[int, ...], shapes: list[Shape], rounds: int) -> list[dict[str, Any]]:
    """Those of one process for one layout, after a first mesh that is not counted. Every other round is backward."""
    stages(layout, meshes[0], shapes)
    turns = [
        {devices: stages(layout, devices, shapes) for devices in meshes[:: 1 if turn % 2 else -1]}
        for turn in range(rounds)
    ]
    return [
        {
            "layout": layout,
            "devices": devices,
            "arrays": len(shapes),
            "seconds": {
                stage: statistics.median(turn[devices][stage] for turn in turns) for stage in turns[0][devices]
            },
            "ratio": {
                stage: statistics.median(turn[devices][stage] / turn[meshes[0]][stage] for turn in turns)
                for stage in turns[0][devices]
            },
        }
        for devices in meshes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.meshes", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    print(json.dumps([row for layout in LAYOUTS for row in rows_of(layout, MESHES, list(transformer()), rounds)]))


if __name__ == "__main__":
    main()
