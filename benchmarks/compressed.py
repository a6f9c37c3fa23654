"""How long does a step take when the state rests in 8 or 16 bits, compared with float32?

A step is ``update`` and ``apply_updates`` in one jitted program that overwrites parameters and state. One array of
4096 × 4096 is measured in several processes, one after the other, since each one's arrays lie elsewhere in memory. In a
process, all kinds of state take turns, and ``ratio`` is the median of the ratios to float32 round by round. Its range
over the processes is kept.

"bfloat16 to the nearest" is our RMSProp with ``accumulator_dtype``; of ``optax.adam``, only the first moment can be
narrower (``mu_dtype``).
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import optax

from benchmarks import peers
from benchmarks.measure import Step, in_turns, ratio
from benchmarks.trees import Shape, parameters
from rmsprop_jax import storage

SHAPE: Shape = (4096, 4096)
RULES: dict[str, Callable[..., optax.GradientTransformation]] = {
    **{
        name: functools.partial(peers.ours, **peers.VARIANTS[name]) for name in peers.VARIANTS if name != "weight decay"
    },
    "optax.adam": lambda accumulator_dtype=None: optax.adam(peers.LR, mu_dtype=accumulator_dtype),
}
STATES: dict[str, Callable[..., optax.GradientTransformation]] = {
    "float32": lambda rule: rule(),
    "8 bits": lambda rule: storage.compress(rule(), 8),
    "16 bits": lambda rule: storage.compress(rule(), 16),
    "bfloat16 to the nearest": lambda rule: rule(accumulator_dtype="bfloat16"),
}


def measure(full: bool) -> list[dict[str, Any]]:
    """A row for every rule and kind of state, from three processes; with ``full`` from nine."""
    processes = [process(full) for _ in range(9 if full else 3)]
    return [merged(rows) for rows in zip(*processes, strict=True)]


def process(full: bool) -> list[dict[str, Any]]:
    """The rows that another process measured."""
    command = [sys.executable, "-m", "benchmarks.compressed", *(["--full"] if full else [])]
    rows: list[dict[str, Any]] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return rows


def merged(rows: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """The median over the processes, and the range of the ratios."""
    ratios = [row["ratio"]["median"] for row in rows]
    return {
        **rows[0],
        "seconds": statistics.median(row["seconds"] for row in rows),
        "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
    }


def rows_of(rule: str, shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """Those of one process for one rule."""
    grads = peers.arrays([shape], "float32", seed=1)
    like_params = jax.eval_shape(lambda: grads)
    steps: dict[str, Step] = {}
    temporary = {}
    for name, make in STATES.items():
        tx = make(RULES[rule])
        compiled = peers.compiled_step(tx, like_params)
        temporary[name] = compiled.memory_analysis().temp_size_in_bytes / parameters([shape])
        steps[name] = peers.jax_step(compiled, tx.init, grads)
    times = in_turns(steps, rounds)
    return [
        {
            "rule": rule,
            "state": name,
            "seconds": statistics.median(times[name]),
            "ratio": ratio(times[name], times["float32"]),
            "temporary": temporary[name],
        }
        for name in STATES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compressed", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="more rounds")
    rounds = 25 if parser.parse_args().full else 11
    print(json.dumps([row for rule in RULES for row in rows_of(rule, SHAPE, rounds)]))


if __name__ == "__main__":
    main()
