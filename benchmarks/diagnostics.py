"""What do recorded statistics cost the training step of the digits example? With and without, side by side.

Both steps train the network of ``examples/train_digits.py`` with its default settings, in one process; one of them
records the statistics of every tenth update. A sample is the time of ten steps of one kind next to that of ten of the
other; the figure is the median over all pairs of their ratio, with its 10 and 90 % quantiles. The line "plain" compares
two equal programs: what is left there is the noise of the measurement.

Run: ``python benchmarks/diagnostics.py`` prints the table, in about a minute; ``--pairs`` sets the number of pairs.
"""

import argparse
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from rmsprop_jax import rmsprop
from rmsprop_jax.diagnostics import record_statistics

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
import train_digits

EVERY, BATCH_SIZE = 10, 32
LR, SETTING = 5e-4, dict(alpha=0.99, eps=1e-8, momentum=0.9)


def make_steps(recorded: bool) -> tuple[Callable[[], float], Any]:
    """A function that takes ``EVERY`` steps and returns the seconds that took; and its compiled step."""
    scaling = rmsprop(LR, **SETTING)
    if recorded:
        scaling = record_statistics(scaling, EVERY, lr=LR, eps=SETTING["eps"])
    model = train_digits.Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), scaling), wrt=nnx.Param)
    train_set, _ = train_digits.load_data()
    batch = jax.device_put(next(train_digits.batches(train_set, BATCH_SIZE, seed=0, epoch=0)))
    graph, state = nnx.split((model, optimizer))

    # What nnx.jit does around a step on the host is the same for both and would only hide what is measured.
    @jax.jit
    def step(state: Any) -> tuple[Any, jax.Array]:
        model, optimizer = nnx.merge(graph, state)
        loss = train_digits.train_step(model, optimizer, batch)
        return nnx.state((model, optimizer)), loss

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(EVERY):
            state, _ = step(state)
        jax.block_until_ready(state)
        return time.perf_counter() - start

    return run, step


def compare(one: Callable[[], float], other: Callable[[], float], pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of both, in turn, and every second time in the other order."""
    times = np.empty((pairs, 2))
    for i in range(pairs):
        for j in (0, 1) if i % 2 else (1, 0):
            times[i, j] = (one, other)[j]()
    return times[:, 0], times[:, 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=150, metavar="N", help="how many pairs of samples")
    pairs = parser.parse_args().pairs
    runs, steps = zip(*(make_steps(recorded) for recorded in (False, False, True)), strict=True)
    for run in 3 * runs:
        run()
    print("| | ms per step | to plain, median [10–90 %] |\n|---|---|---|")
    for name, run in (("plain", runs[1]), (f"recorded every {EVERY}", runs[2])):
        plain, other = compare(runs[0], run, pairs)
        low, middle, high = np.quantile(other / plain, (0.1, 0.5, 0.9))
        print(f"| {name} | {1e3 * np.median(other) / EVERY:.2f} | {middle:.3f} [{low:.3f}–{high:.3f}] |")
    compiled = {step._cache_size() for step in steps}
    print(f"\nEach step was compiled {compiled.pop()} time." if compiled == {1} else f"\nRecompiled: {compiled}")
    device = jax.devices()[0]
    print(
        f"(JAX {jax.__version__}, Optax {optax.__version__}, Python {platform.python_version()}, "
        f"on {device.device_kind} {platform.machine()})"
    )


if __name__ == "__main__":
    main()
