"""What does a step with a state in 8 or 16 bits become on a TPU or a GPU? Compiled for one that is only described.

Run: ``python -m benchmarks.kernels tpu`` or ``cuda``. It needs and counts what ``benchmarks.compiled`` does, for one
array of 8192 × 8192, and writes ``benchmarks/results/kernels_<platform>.json``. The scales, one number a row, are not
counted.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: there is nothing to run on

import jax
import optax

from benchmarks import compiled, peers, report
from benchmarks.measure import save
from rmsprop_jax import storage

SHAPE = (8192, 8192)
VARIANTS = ("plain", "momentum", "centered + momentum")
STATES: dict[str, Callable[[optax.GradientTransformation], optax.GradientTransformation]] = {
    "float32": lambda inner: inner,
    "16 bits": lambda inner: storage.compress(inner, 16),
    "8 bits": lambda inner: storage.compress(inner, 8),
}


def row(variant: str, device: jax.Device) -> dict[str, Any]:
    steps = {name: make(peers.ours(**peers.VARIANTS[variant])) for name, make in STATES.items()}
    return {
        "variant": variant,
        "per_parameter": {
            name: compiled.counted(compiled.compiled(step, device, "float32", SHAPE), SHAPE)
            for name, step in steps.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("platform", choices=compiled.DESCRIPTIONS)
    platform = parser.parse_args().platform
    device = compiled.described(platform)
    rows = [row(variant, device) for variant in VARIANTS]
    save("kernels", rows, platform, f"{device.device_kind}, described")
    print(*report.tables("kernels", platform).values(), sep="\n\n")


if __name__ == "__main__":
    main()
