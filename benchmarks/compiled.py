"""What does a step become on a TPU? Compiled for one that is only described; nothing is run and nothing is timed.

Run: ``python -m benchmarks.compiled`` where ``libtpu`` is installed; ``--topology`` names another one. It prints the
kernels that touch whole arrays, the bytes that the compiler counts as read and written, and temporary memory, all
per parameter, of one array of 16M, on one device.
"""

import argparse
import re

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

from benchmarks import peers

SIZE = 1 << 24


def compiled(tx: optax.GradientTransformation, device: jax.Device, dtype: str) -> jax.stages.Compiled:
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.eval_shape(lambda: (jnp.zeros(SIZE, dtype), tx.init(jnp.zeros(SIZE, dtype)), jnp.zeros(SIZE, dtype)))
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    return jax.jit(peers.whole_step(tx), donate_argnums=(0, 1)).lower(*placed).compile()


def line(name: str, program: jax.stages.Compiled) -> str:
    entry = program.as_text().split("ENTRY", 1)[1]
    kernels = len(re.findall(rf"\[{SIZE}\][^=\n]* (?:fusion|copy)\(", entry))
    accessed = program.cost_analysis()["bytes accessed"] / SIZE
    temporary = program.memory_analysis().temp_size_in_bytes / SIZE
    return f"{name}: {kernels} kernels, {accessed:.0f} bytes read and written, {temporary:.0f} temporary"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x2")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=parser.parse_args().topology)
    print(f"{topology.devices[0].device_kind}, jax {jax.__version__}")
    for dtype in ("float32", "bfloat16"):
        for variant, arguments in peers.VARIANTS.items():
            for name, make in peers.TRANSFORMATIONS.items():
                print(line(f"{variant}, {dtype}, {name}", compiled(make(**arguments), topology.devices[0], dtype)))


if __name__ == "__main__":
    main()
