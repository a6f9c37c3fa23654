"""Do models learn as well when the state rests in 8 or 16 bits, or the weights are bfloat16? Loss after training.

Three models: a perceptron and the network of ``examples/train_digits.py`` on scikit-learn's digits, and a transformer
of two layers on the text of Python's own help, where a character is a token. Every setting starts from the same three
initial weights and sees the same batches. Its learning rate falls to 0 as a cosine. Then the loss of the training set
is measured (of a fixed part of the text). The digits' loss is that of the example, with smoothed labels, which cannot
fall below 0.50 nats.

``difference`` is the loss ÷ that of float32 − 1: the mean over the three seeds, the smallest and the largest. Two runs
in float32 differ as well if a single rounding does: ``noise`` is the difference of runs in float32 whose initial
weights are larger by one part in ten million.

All arrays of 8 elements in a row or more are encoded (``min_size=1``). The weights are bfloat16 between the steps and
float32 in all arithmetic, so that only their rounding differs.
"""

import functools
import pydoc_data.topics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import peers
from benchmarks.rounding import METHODS
from benchmarks.training import Block
from examples import train_digits
from rmsprop_jax import rmsprop, storage

SEEDS = (0, 1, 2)
VARIANTS = ("plain", "momentum", "centered + momentum")
SMOOTHING, WINDOW, WIDTH = 0.1, 32, 64

STATES = ("ours, 8 bits", "ours, 16 bits", "our 8 bits to the nearest", "bfloat16 to the nearest")

STATE_OF_HALF = {"plain": "float32", "momentum": "ours, 8 bits"}  # beside weights in bfloat16, by variant

# How updates reach parameters in bfloat16: (params, updates, step) to params.
Apply = Callable[[Any, Any, jax.Array], Any]
Loss = Callable[[Any, jax.Array, jax.Array], jax.Array]  # (params, inputs, labels) to their mean loss
WEIGHTS: dict[str, Apply] = {
    "stochastic": storage.apply_updates,
    "nearest": lambda params, updates, step: optax.apply_updates(params, updates),
}


class Problem(NamedTuple):
    """What is learned, and for how long.

    Attributes:
      model: makes the model.
      inputs: of all examples.
      labels: of all examples, one or several each.
      smoothing: of the labels.
      lr: of the first step; a tenth with momentum.
      steps: how many.
      batch: the number of examples in a step.
      measured: the number of examples whose loss is measured in the end.
    """

    model: Callable[[nnx.Rngs], nnx.Module]
    inputs: jax.Array
    labels: jax.Array
    smoothing: float
    lr: float
    steps: int
    batch: int
    measured: int


class Perceptron(nnx.Module):
    """Two hidden layers of 128 units."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in ((64, 128), (128, 128), (128, 10))])

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(len(images), -1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


class Writer(nnx.Module):
    """A character model: 128 symbols, 2 layers of width 64, places that are learned."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed, self.place = nnx.Embed(128, WIDTH, rngs=rngs), nnx.Embed(WINDOW, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(WIDTH, rngs) for _ in range(2)])
        self.norm, self.head = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, 128, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.place(jnp.arange(tokens.shape[-1]))[None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@functools.cache
def problems() -> dict[str, Problem]:
    digits, _ = train_digits.load_data()
    images, labels, count = jnp.asarray(digits.images), jnp.asarray(digits.labels), len(digits.labels)
    text = "".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")
    tokens = np.frombuffer(text, np.uint8)[: len(text) // WINDOW * WINDOW].astype(np.int32)
    windows, following = tokens.reshape(-1, WINDOW), np.roll(tokens, -1).reshape(-1, WINDOW)
    return {
        "digits perceptron": Problem(
            Perceptron, images, labels, SMOOTHING, lr=2e-3, steps=500, batch=64, measured=count
        ),
        "digits CNN": Problem(
            train_digits.Network, images, labels, SMOOTHING, lr=2e-3, steps=200, batch=32, measured=count
        ),
        "character transformer": Problem(
            Writer, jnp.asarray(windows), jnp.asarray(following), 0.0, lr=2e-3, steps=300, batch=16, measured=1024
        ),
    }


def measure(full: bool) -> list[dict[str, Any]]:
    """A row for every model and setting; ``full`` trains three times as long."""
    chosen = {name: problem._replace(steps=problem.steps * (3 if full else 1)) for name, problem in problems().items()}
    return [row for name, problem in chosen.items() for row in rows_of(name, problem)]


def rows_of(name: str, problem: Problem) -> Iterator[dict[str, Any]]:
    for variant in VARIANTS:
        base = losses(problem, optimizer(problem, variant))
        common = {"model": name, "variant": variant, "float32": float(np.mean(base))}
        for which, found in others(problem, variant):
            yield common | which | {"difference": differences(found, base)}


def others(problem: Problem, variant: str) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """What is compared with float32, and its losses."""
    tx = optimizer(problem, variant)
    yield {"what": "noise", "state": "float32", "weights": "float32"}, losses(problem, tx, changed=1e-7)
    for state in STATES:
        resting = METHODS[state](tx)
        which = {"what": "state", "state": state, "weights": "float32", "encoded": encoded(problem, resting)}
        yield which, losses(problem, resting)
    if variant in STATE_OF_HALF:
        state = STATE_OF_HALF[variant]
        resting = METHODS[state](tx) if state in METHODS else tx
        for weights, apply in WEIGHTS.items():
            which = {"what": "weights", "state": state, "weights": f"bfloat16, {weights}"}
            yield which, losses(problem, resting, apply)


def differences(found: np.ndarray, base: np.ndarray) -> dict[str, float]:
    relative = found / base - 1
    return {"mean": float(relative.mean()), "low": float(relative.min()), "high": float(relative.max())}


def optimizer(problem: Problem, variant: str) -> optax.GradientTransformation:
    lr = problem.lr / (10 if "momentum" in variant else 1)
    return rmsprop(optax.cosine_decay_schedule(lr, problem.steps), 0.99, **peers.VARIANTS[variant])


def encoded(problem: Problem, tx: optax.GradientTransformation) -> float:
    """The share of the state's numbers that are encoded."""
    leaves = jax.tree.leaves(tx.init(initial(problem, 0)), is_leaf=lambda x: isinstance(x, storage.Encoded))
    sizes = [(np.prod(x.shape), isinstance(x, storage.Encoded)) for x in leaves if x.shape]
    return float(sum(size for size, is_encoded in sizes if is_encoded) / sum(size for size, _ in sizes))


def losses(
    problem: Problem, tx: optax.GradientTransformation, apply: Apply | None = None, changed: float = 0.0
) -> np.ndarray:
    """The loss after training for each seed; with ``apply``, the weights are bfloat16.

    The steps are a loop on the host, since XLA's CPU compiler makes slow convolutions of those in a scan.
    """
    graph = nnx.graphdef(problem.model(nnx.Rngs(0)))
    loss = jax.jit(functools.partial(mean_loss, graph, problem.smoothing))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: tuple[jax.Array, Any, Any], key: jax.Array) -> tuple[jax.Array, Any, Any]:
        count, params, state = carry
        chosen = jax.random.choice(jax.random.fold_in(key, count), len(problem.labels), (problem.batch,))
        grads = jax.grad(loss)(wide(params), problem.inputs[chosen], problem.labels[chosen])
        updates, state = tx.update(grads, state, wide(params))
        params = apply(params, updates, count) if apply else optax.apply_updates(params, updates)
        return count + 1, params, state

    def after_all_steps(seed: int) -> float:
        params = jax.tree.map(lambda p: p * np.float32(1 + changed), initial(problem, seed))
        carry = jnp.int32(0), half(params) if apply else params, tx.init(params)
        for _ in range(problem.steps):
            carry = step(carry, jax.random.key(seed))
        return float(loss(wide(carry[1]), problem.inputs[: problem.measured], problem.labels[: problem.measured]))

    return np.array([after_all_steps(seed) for seed in SEEDS])


def initial(problem: Problem, seed: int) -> Any:
    """The weights, as a tree of dicts and lists."""
    return nnx.to_pure_dict(nnx.state(problem.model(nnx.Rngs(seed)), nnx.Param))


def wide(params: Any) -> Any:
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)


def half(params: Any) -> Any:
    return jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)


def mean_loss(graph: Any, smoothing: float, params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    logits = nnx.merge(graph, params)(inputs)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()
