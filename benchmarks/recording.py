"""What do recorded statistics cost the training step of the digits example? With and without, side by side.

Both steps train the network of ``examples/train_digits.py`` with its optimizer at a constant learning rate, on one
batch and in one process; one of them records the statistics of every tenth update. A sample is the mean of ten steps in
a row. The row "plain" compares two equal programs: what is left there is the noise of the measurement.
"""

import statistics
from typing import Any

import jax
import optax
from flax import nnx

from benchmarks.measure import Step, in_turns, ratio
from examples import train_digits
from rmsprop_jax import rmsprop
from rmsprop_jax.recorder import record_statistics

EVERY, BATCH_SIZE = 10, 32
LR, SETTING = 5e-4, dict(alpha=0.99, eps=1e-8, momentum=0.9)


def measure(full: bool) -> list[dict[str, Any]]:
    """Recorded steps over plain ones, and other plain ones over the same."""
    steps = {name: ten_steps(recorded=name == "recorded") for name in ("base", "plain", "recorded")}
    times = in_turns(steps, 300 if full else 40)
    return [
        {"step": name, "seconds": statistics.median(times[name]) / EVERY, "ratio": ratio(times[name], times["base"])}
        for name in ("plain", "recorded")
    ]


def ten_steps(recorded: bool) -> Step:
    """A call that takes ``EVERY`` training steps."""
    scaling = rmsprop(LR, **SETTING)
    if recorded:
        scaling = record_statistics(scaling, EVERY)
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

    def run() -> None:
        nonlocal state
        for _ in range(EVERY):
            state, _ = step(state)
        jax.block_until_ready(state)

    return run
