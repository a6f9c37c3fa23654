"""What share of a whole training step does the optimizer take?

The step of two Flax models, compiled: with our update, with Optax's, and with the cheapest that trains, plain SGD.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks import peers
from benchmarks.measure import Step, compared, in_turns
from examples.train_digits import Network


class Block(nnx.Module):
    """A causal pre-norm transformer layer."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.before_attention, self.before_mlp = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.widen, self.narrow = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.before_attention(x), mask=mask)
        return x + self.narrow(nnx.gelu(self.widen(self.before_mlp(x))))


class Transformer(nnx.Module):
    """A small character model: 256 symbols, 4 layers of width 128."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(256, 128, rngs=rngs)
        self.blocks = nnx.List([Block(128, rngs) for _ in range(4)])
        self.norm, self.head = nnx.LayerNorm(128, rngs=rngs), nnx.Linear(128, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def batches() -> dict[str, tuple[type[nnx.Module], jax.Array, jax.Array]]:
    """Model, inputs and labels."""
    key = jax.random.key(0)
    tokens = jax.random.randint(key, (16, 64), 0, 256)
    images = jax.random.normal(key, (64, 8, 8, 1))
    return {
        "digits CNN, batch of 64": (Network, images, jnp.arange(64) % 10),
        "4-layer transformer, 16 × 64 tokens": (Transformer, tokens, tokens),
    }


def measure(full: bool) -> list[dict[str, Any]]:
    """A row for every model and variant."""
    return [row(model, variant, rounds=41 if full else 15) for model in batches() for variant in peers.BOTH_ENDS]


def row(model: str, variant: str, rounds: int) -> dict[str, Any]:
    make_model, inputs, labels = batches()[model]
    graph, params = nnx.split(make_model(nnx.Rngs(0)), nnx.Param)

    def gradient(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = nnx.merge(graph, params)(inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.grad(loss)(params)

    def training(transformation: optax.GradientTransformation) -> Step:
        apply = peers.whole_step(transformation)
        step = jax.jit(lambda params, state: apply(params, state, gradient(params)), donate_argnums=(0, 1))
        own = jax.tree.map(jnp.copy, params)
        carry = [own, transformation.init(own)]

        def run() -> None:
            carry[:] = step(*carry)
            jax.block_until_ready(carry)

        return run

    steps: dict[str, Step] = {
        name: training(make(**peers.VARIANTS[variant])) for name, make in peers.TRANSFORMATIONS.items()
    }
    steps["SGD"] = training(optax.sgd(peers.LR))
    times = in_turns(steps, rounds, shortest=0.1)
    leaves = jax.tree.leaves(params)
    return {
        "model": model,
        "variant": variant,
        "arrays": len(leaves),
        "parameters": sum(leaf.size for leaf in leaves),
        **compared(times),
    }
