"""How long does one compiled optimizer step take, and how much memory does it touch?

A step is ``update`` and ``apply_updates`` in one jitted program that overwrites parameters and state; torch's is
``optimizer.step()``. There are two yardsticks. ``copy`` reads and overwrites the parameters and every slot once, so the
gradient is all that a perfect step reads on top. ``empty call`` hands over and gets back as many arrays and computes
nothing: what it costs to call a compiled program.
"""

import math
from typing import Any

import jax

from benchmarks import peers
from benchmarks.measure import Step, compared, in_turns, seconds
from benchmarks.trees import HUGE, TREES, parameters
from rmsprop_jax import storage

# tree, variants, dtypes and whether all peers take part, torch.compile (which spends long compiling) and Keras too.
Selection = tuple[str, tuple[str, ...], tuple[str, ...], bool]
SOME: list[Selection] = [
    ("1 × 16M", tuple(peers.VARIANTS), ("float32",), True),
    ("1 × 16M", peers.BOTH_ENDS, ("bfloat16",), False),
    ("16 × 1M", peers.BOTH_ENDS, ("float32",), False),
    ("200 × 16k", tuple(peers.VARIANTS), ("float32",), False),
    ("1000 × 256", peers.BOTH_ENDS, ("float32",), False),
    ("ResNet-50", peers.BOTH_ENDS, ("float32",), False),
    ("GPT-2 small", peers.BOTH_ENDS, ("float32",), False),
    ("EfficientNet-B0", peers.BOTH_ENDS, ("float32",), False),
]
ALL: list[Selection] = [(tree, tuple(peers.VARIANTS), ("float32", "bfloat16"), True) for tree in TREES if tree != HUGE]


def measure(full: bool) -> list[dict[str, Any]]:
    """A row for every tree, variant and dtype."""
    return [
        row(tree, variant, dtype, everybody)
        for tree, variants, dtypes, everybody in (ALL if full else SOME)
        for dtype in dtypes
        for variant in variants
    ]


def row(tree: str, variant: str, dtype: str, everybody: bool) -> dict[str, Any]:
    """``dtype`` is that of all arrays. With "8 bits", it is that of our state, and everything else is in float32."""
    shapes, arguments = TREES[tree], peers.VARIANTS[variant]
    makers, number = dict(peers.TRANSFORMATIONS), dtype
    if dtype == "8 bits":
        makers["ours"], number = (lambda **arguments: storage.compress(peers.ours(**arguments), 8)), "float32"
    grads = peers.arrays(shapes, number, seed=1)
    like_params = jax.eval_shape(lambda: grads)
    steps: dict[str, Step] = {}
    memory = {}
    for name, make in makers.items():
        transformation = make(**arguments)
        compiled = peers.compiled_step(transformation, like_params)
        memory[name] = bytes_per_parameter(
            compiled, jax.eval_shape(transformation.init, like_params), parameters(shapes)
        )
        steps[name] = peers.jax_step(compiled, transformation.init, grads)
    if peers.has_torch():
        steps["torch"] = peers.torch_step(shapes, number, foreach=False, **arguments)
        steps["torch foreach"] = peers.torch_step(shapes, number, foreach=True, **arguments)
    if everybody and peers.has_torch():
        together = jax.default_backend() == "gpu"  # torch's own default there
        steps["torch compiled"] = peers.torch_step(shapes, number, foreach=together, compiled=True, **arguments)
    if everybody and peers.keras and dtype == "float32":
        steps["keras"] = peers.keras_step(grads, **arguments)
    state = jax.eval_shape(makers["ours"](**arguments).init, like_params)
    kept = [array for array in jax.tree.leaves((like_params, state)) if array.ndim]
    steps["copy"] = peers.copy_step(kept)
    steps["empty call"] = peers.empty_step(peers.ours(**arguments), len(shapes))  # codes of one element would be none
    found = compared(in_turns(steps, rounds_within(1.5, steps)))
    return {
        "tree": tree,
        "variant": variant,
        "dtype": dtype,
        "arrays": len(shapes),
        "parameters": parameters(shapes),
        **found,
        "bytes_per_parameter": memory,
        "copied": 2 * size(kept),
        "gradients": size(jax.tree.leaves(like_params)),
    }


def rounds_within(budget: float, steps: dict[str, Step]) -> int:
    """How many rounds fit into ``budget`` seconds: 7 at least, 25 at most."""
    one_round = sum(min(seconds(step), seconds(step)) + 0.03 for step in steps.values())
    return max(7, min(25, math.floor(budget / one_round)))


def size(arrays: list[jax.ShapeDtypeStruct]) -> int:
    """In bytes."""
    return sum(array.size * array.dtype.itemsize for array in arrays)


def bytes_per_parameter(compiled: jax.stages.Compiled, state: Any, count: int) -> dict[str, float]:
    """What is kept between steps, what is allocated during one, and what XLA counts as read and written."""
    return {
        "state": size(jax.tree.leaves(state)) / count,
        "temporary": compiled.memory_analysis().temp_size_in_bytes / count,
        "accessed": compiled.cost_analysis()["bytes accessed"] / count,
    }
