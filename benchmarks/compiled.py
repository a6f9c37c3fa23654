"""What does a step become on a TPU or a GPU? Compiled for one that is only described; nothing is run or timed.

Run: ``python -m benchmarks.compiled tpu`` where ``libtpu`` is installed, ``python -m benchmarks.compiled cuda`` where
``jax-cuda12-plugin``, ``jax-cuda12-pjrt`` and ``nvidia-cuda-nvcc-cu12`` are (their dependencies and a GPU are not
needed). It counts the kernels that touch whole arrays, the bytes of their operands and results, and temporary memory,
per parameter of one array of 64M (a smaller one may move into a TPU's fast memory first), and writes
``benchmarks/results/compiled_<platform>.json``.
"""

import argparse
import math
import os
import re
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: there is nothing to run on
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

from benchmarks import peers, report
from benchmarks.measure import save
from benchmarks.trees import Shape

SIZE = 1 << 26
ITEMSIZES = {"f32": 4, "bf16": 2, "s8": 1, "u8": 1}
NO_KERNEL = ("parameter", "tuple", "get-tuple-element", "bitcast")

# An H100 (SXM) as XLA's GpuTargetConfigProto describes it.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 7 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: 84929347584
  memory_bandwidth: 3352320000000
  clock_rate_ghz: 1.98
}
"""
DESCRIPTIONS = {
    "tpu": {"topology_name": "v5e:2x2"},
    "cuda": {"topology": "1x1x1", "target_config": H100},
}


def compiled(
    tx: optax.GradientTransformation, device: jax.Device, dtype: str, shape: Shape = (SIZE,)
) -> jax.stages.Compiled:
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.eval_shape(lambda: (zeros := jnp.zeros(shape, dtype), tx.init(zeros), zeros))
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    return jax.jit(peers.whole_step(tx), donate_argnums=(0, 1)).lower(*placed).compile()


def counted(program: jax.stages.Compiled, shape: Shape = (SIZE,)) -> dict[str, float]:
    """Kernels, and bytes per parameter, of a compiled step."""
    entry = program.as_text().split("ENTRY", 1)[1]
    arrays = re.findall(r"%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)", entry)
    itemsize = {name: whole_arrays(result, shape) for name, result, _, _ in arrays}
    kernels = [
        (name, re.findall(r"%([\w.-]+)", operands))
        for name, _, operation, operands in arrays
        if operation not in NO_KERNEL and itemsize[name]
    ]
    return {
        "kernels": len(kernels),
        "accessed": sum(itemsize[name] + sum(itemsize[operand] for operand in operands) for name, operands in kernels),
        "temporary": round(program.memory_analysis().temp_size_in_bytes / math.prod(shape), 2),
    }


def whole_arrays(result: str, shape: Shape) -> int:
    """The bytes per parameter of the whole arrays in the type of a result, such as ``(bf16[67108864]{0}, s32[])``."""
    return sum(ITEMSIZES[dtype] for dtype in re.findall(rf"(\w+)\[{','.join(map(str, shape))}\]", result))


def row(variant: str, dtype: str, device: jax.Device) -> dict[str, Any]:
    steps = {name: make(**peers.VARIANTS[variant]) for name, make in peers.TRANSFORMATIONS.items()}
    return {
        "variant": variant,
        "dtype": dtype,
        "per_parameter": {name: counted(compiled(step, device, dtype)) for name, step in steps.items()},
    }


def described(platform: str) -> jax.Device:
    """The device that need not be there."""
    device: jax.Device = topologies.get_topology_desc(platform=platform, **DESCRIPTIONS[platform]).devices[0]
    return device


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.splitlines()[0])
    parser.add_argument("platform", choices=DESCRIPTIONS)
    platform = parser.parse_args().platform
    device = described(platform)
    rows = [row(variant, dtype, device) for dtype in ("float32", "bfloat16") for variant in peers.VARIANTS]
    save("compiled", rows, platform, f"{device.device_kind}, described")
    print(*report.tables("compiled", platform).values(), sep="\n\n")


if __name__ == "__main__":
    main()
