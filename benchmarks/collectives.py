"""What do eight devices have to tell each other in an update with a state in 8 or 16 bits? And are the bits the same?

Two processes, of eight CPU devices and of one, make the same 20 updates of one array. On eight devices, its rows or its
last axis are spread over them. ``collectives`` are the operations of the compiled update that exchange data, and
``arrays`` the arrays that they exchange. (One operation can exchange several.) ``same`` says whether all codes and
scales are those of one device, bit for bit. XLA rounds a·b + c once or twice, as the layout suits it. So the same is
done without the instruction that rounds it once: ``same without fma``.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import peers
from rmsprop_jax import storage

SHAPE, STEPS, DEVICES = (256, 1024), 20, 8
LAYOUTS = {"rows": P("devices"), "last axis": P(None, "devices")}
VARIANTS = ("plain", "momentum")
COLLECTIVE = re.compile(r"= (.*?) (?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")
WITHOUT_FMA = "--xla_cpu_max_isa=AVX"


def measure(full: bool) -> list[dict[str, Any]]:
    """A row for every layout, number of bits and variant; ``full`` changes nothing."""
    many, one = process(DEVICES), process(1)
    many_plain, one_plain = process(DEVICES, WITHOUT_FMA), process(1, WITHOUT_FMA)
    return [
        {
            **row,
            "same": row["codes"] == one[i % len(one)]["codes"],
            "same without fma": plain["codes"] == one_plain[i % len(one)]["codes"],
        }
        for i, (row, plain) in enumerate(zip(many, many_plain, strict=True))
    ]


def process(devices: int, flags: str = "") -> list[dict[str, Any]]:
    """The rows of another process, which has so many devices."""
    flags = f"{flags} --xla_force_host_platform_device_count={devices}"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.collectives"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
    )
    rows: list[dict[str, Any]] = json.loads(run.stdout)
    return rows


def row(layout: str, bits: int, variant: str) -> dict[str, Any]:
    """What this process with its devices comes to."""
    sharding = NamedSharding(Mesh(np.array(jax.devices()), "devices"), LAYOUTS[layout])
    tx = storage.compress(peers.ours(**peers.VARIANTS[variant]), bits)
    params = jax.device_put(jnp.zeros(SHAPE), sharding)
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update).lower(params, state).compile()
    exchanged = COLLECTIVE.findall(update.as_text())
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        grads = jax.device_put(rng.normal(size=SHAPE).astype(np.float32), sharding)
        _, state = update(grads, state)
    return {
        "layout": layout,
        "bits": bits,
        "variant": variant,
        "collectives": len(exchanged),
        "arrays": sum(result.count("[") for result in exchanged),
        "codes": hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state))).hexdigest(),
    }


def main() -> None:
    layouts = LAYOUTS if jax.device_count() > 1 else list(LAYOUTS)[:1]
    print(json.dumps([row(layout, bits, name) for layout in layouts for bits in (8, 16) for name in VARIANTS]))


if __name__ == "__main__":
    main()
