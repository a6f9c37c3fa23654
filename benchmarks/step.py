"""How long does one compiled optimizer step take, and how much memory does it touch?

A step is ``update`` and ``apply_updates`` in one jitted program that overwrites parameters and state; torch's is
``optimizer.step()``. There are two yardsticks. ``copy`` reads and overwrites the parameters and every slot once, so the
gradient is all that a perfect step reads on top. ``empty call`` hands over and gets back the same arrays and computes
nothing: what it costs to call a compiled program.
"""

import math
from typing import Any

import jax

from benchmarks import peers
from benchmarks.measure import Step, compared, in_turns, seconds
from benchmarks.trees import TREES, parameters

# tree, variants, dtypes and whether torch.compile takes part, which spends long compiling.
Selection = tuple[str, tuple[str, ...], tuple[str, ...], bool]
BOTH_ENDS = ("plain", "centered + momentum")
SOME: list[Selection] = [
    ("1 × 16M", tuple(peers.VARIANTS), ("float32",), True),
    ("1 × 16M", BOTH_ENDS, ("bfloat16",), False),
    ("16 × 1M", BOTH_ENDS, ("float32",), False),
    ("200 × 16k", tuple(peers.VARIANTS), ("float32",), False),
    ("200 × 16k", BOTH_ENDS, ("bfloat16",), False),
    ("1000 × 256", BOTH_ENDS, ("float32",), False),
    ("ResNet-50", BOTH_ENDS, ("float32",), False),
    ("GPT-2 small", BOTH_ENDS, ("float32",), False),
    ("EfficientNet-B0", BOTH_ENDS, ("float32",), False),
]
ALL: list[Selection] = [(tree, tuple(peers.VARIANTS), ("float32", "bfloat16"), True) for tree in TREES]


def measure(full: bool) -> list[dict[str, Any]]:
    """A row for every tree, variant and dtype."""
    return [
        row(tree, variant, dtype, compile_torch)
        for tree, variants, dtypes, compile_torch in (ALL if full else SOME)
        for dtype in dtypes
        for variant in variants
    ]


def row(tree: str, variant: str, dtype: str, compile_torch: bool) -> dict[str, Any]:
    shapes, arguments = TREES[tree], peers.VARIANTS[variant]
    params = peers.arrays(shapes, dtype, seed=0)
    steps: dict[str, Step] = {}
    memory = {}
    for name, make in peers.TRANSFORMATIONS.items():
        transformation = make(**arguments)
        compiled = peers.compiled_step(transformation, params)
        memory[name] = bytes_per_parameter(compiled, transformation.init(params), parameters(shapes))
        steps[name] = peers.jax_step(compiled, transformation.init, shapes, dtype)
    steps["torch"] = peers.torch_step(shapes, dtype, foreach=False, **arguments)
    steps["torch foreach"] = peers.torch_step(shapes, dtype, foreach=True, **arguments)
    if compile_torch:
        steps["torch compiled"] = peers.torch_step(shapes, dtype, foreach=False, compiled=True, **arguments)
    if peers.keras and dtype == "float32":
        steps["keras"] = peers.keras_step(shapes, dtype, **arguments)
    kept = [x for x in jax.tree.leaves((params, peers.ours(**arguments).init(params))) if x.ndim]
    steps["copy"] = peers.copy_step(kept)
    steps["empty call"] = peers.empty_step(peers.ours(**arguments), shapes, dtype)
    found = compared(in_turns(steps, rounds_within(2.0, steps)))
    moved = 2 * sum(x.nbytes for x in kept)
    return {
        "tree": tree,
        "variant": variant,
        "dtype": dtype,
        "arrays": len(shapes),
        "parameters": parameters(shapes),
        **found,
        "copy_bytes_per_second": moved / found["seconds"]["copy"],
        "bytes_per_parameter": memory,
    }


def rounds_within(budget: float, steps: dict[str, Step]) -> int:
    """How many rounds fit into ``budget`` seconds: 9 at least, 25 at most."""
    one_round = sum(min(seconds(step), seconds(step)) + 0.03 for step in steps.values())
    return max(9, min(25, math.floor(budget / one_round)))


def bytes_per_parameter(compiled: jax.stages.Compiled, state: Any, count: int) -> dict[str, float]:
    """What rests between steps, what is allocated during one, and what XLA counts as read and written."""
    return {
        "state": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / count,
        "temporary": compiled.memory_analysis().temp_size_in_bytes / count,
        "accessed": compiled.cost_analysis()["bytes accessed"] / count,
    }
