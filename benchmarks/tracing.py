"""What does the optimizer add to the time before the first step: tracing, lowering, compiling?

``update`` alone, and the whole step with ``optax.apply_updates``, which is the same for both. Every sample starts with
JAX's caches cleared. Arrays have 256 elements. Seconds are those that the processor spent, in all threads: a compiler
that has to wait for its turn is not slower.
"""

import statistics
import time
from typing import Any

import jax
import optax

from benchmarks import peers
from benchmarks.measure import ratio

COUNTS = (10, 30, 100, 1000, 2000)
COMPILED = (10, 100, 1000)  # compiling takes most of the time by far


def measure(full: bool) -> list[dict[str, Any]]:
    """A row for every number of arrays and variant."""
    return [
        row(variant, count, rounds=(9 if count < 1000 else 3) if full else (5 if count < 1000 else 2))
        for variant in peers.BOTH_ENDS
        for count in COUNTS
    ]


def row(variant: str, count: int, rounds: int) -> dict[str, Any]:
    params = peers.arrays([(256,)] * count, "float32", seed=0)
    found: dict[str, Any] = {"variant": variant, "arrays": count}
    for part in ("update", "step"):
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in peers.TRANSFORMATIONS}
        for turn in range(rounds):
            with_compiler = part == "step" and count in COMPILED
            for name in sorted(samples, reverse=bool(turn % 2)):
                transformation = peers.TRANSFORMATIONS[name](**peers.VARIANTS[variant])
                samples[name].append(stages(transformation, params, part, with_compiler))
        found[part] = {
            stage: {
                "seconds": {name: statistics.median(taken(stage, samples[name])) for name in samples},
                "ratio": ratio(taken(stage, samples["ours"]), taken(stage, samples["optax"])),
            }
            for stage in ("trace", "lower", "trace and lower", "compile")
            if len(taken(stage, samples["ours"])) > 0
        }
        found[part]["lines"] = {name: samples[name][0]["lines"] for name in samples}
    return found


def taken(stage: str, samples: list[dict[str, float]]) -> list[float]:
    return [sample[stage] for sample in samples if stage in sample]


def stages(transformation: optax.GradientTransformation, params: Any, part: str, compiled: bool) -> dict[str, float]:
    """Seconds of each stage, and the lines of StableHLO that come out of them."""
    function = transformation.update if part == "update" else peers.whole_step(transformation)
    state = transformation.init(params)
    arguments = (params, state, params)
    jax.clear_caches()
    times = [time.process_time()]
    traced = jax.jit(function).trace(*arguments)
    times.append(time.process_time())
    lowered = traced.lower()
    times.append(time.process_time())
    found = {"trace": times[1] - times[0], "lower": times[2] - times[1], "trace and lower": times[2] - times[0]}
    if compiled:
        lowered.compile()
        found["compile"] = time.process_time() - times[2]
    return {**found, "lines": float(lowered.as_text().count("\n"))}
