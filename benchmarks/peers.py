"""One optimizer step of ours and of everybody we are measured against, each as a call without arguments."""

import functools
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")  # before keras is imported

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.measure import Step, seconds
from benchmarks.trees import Shape
from rmsprop_jax import rmsprop

try:
    import keras
except ImportError:
    keras = None

LR, ALPHA = 0.01, 0.99

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered + momentum": {"momentum": 0.9, "centered": True},
    "weight decay": {"weight_decay": 1e-4},
}
BOTH_ENDS = ("plain", "centered + momentum")  # the least that a step does, and nearly the most


def ours(**arguments: Any) -> optax.GradientTransformation:
    return rmsprop(LR, ALPHA, **arguments)


def optax_rmsprop(weight_decay: float = 0.0, **arguments: Any) -> optax.GradientTransformation:
    """What a user of Optax writes for the same rule, with eps outside the root."""
    scaling = optax.rmsprop(LR, decay=ALPHA, eps_in_sqrt=False, **arguments)
    return optax.chain(optax.add_decayed_weights(weight_decay), scaling) if weight_decay else scaling


TRANSFORMATIONS: dict[str, Callable[..., optax.GradientTransformation]] = {"ours": ours, "optax": optax_rmsprop}


def arrays(shapes: list[Shape], dtype: str, seed: int) -> list[jax.Array]:
    """New arrays of small normal numbers (a few thousand different ones: what they are does not matter)."""
    numbers = 0.01 * np.random.default_rng(seed).standard_normal(4096, np.float32)
    return [jnp.array(np.resize(numbers, shape), dtype) for shape in shapes]


def like(grads: list[jax.Array]) -> list[jax.Array]:
    """New parameters, shaped like the gradients."""
    return [jnp.copy(array) for array in grads]


def whole_step(transformation: optax.GradientTransformation) -> Callable[..., Any]:
    """``update`` and ``apply_updates``."""

    def step(params: optax.Params, state: optax.OptState, grads: optax.Updates) -> tuple[optax.Params, optax.OptState]:
        updates, state = transformation.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def compiled_step(transformation: optax.GradientTransformation, params: optax.Params) -> jax.stages.Compiled:
    """The whole step as one program that overwrites parameters and state, from shapes."""
    state = jax.eval_shape(transformation.init, params)
    return jax.jit(whole_step(transformation), donate_argnums=(0, 1)).lower(params, state, params).compile()


def jax_step(compiled: jax.stages.Compiled, init: Callable[[Any], Any], grads: list[jax.Array]) -> Step:
    """Runs ``compiled`` on its own parameters and state."""
    params = like(grads)
    carry = [params, init(params)]

    def step() -> None:
        carry[:] = compiled(*carry, grads)
        jax.block_until_ready(carry)

    return step


def empty_step(transformation: optax.GradientTransformation, count: int) -> Step:
    """The call alone: a program of as many arguments and results that computes nothing. Sizes do not matter to it."""
    grads = arrays([(1,)] * count, "float32", seed=1)
    state = transformation.init(grads)
    empty = jax.jit(lambda params, state, grads: (params, state), donate_argnums=(0, 1), keep_unused=True)
    return jax_step(empty.lower(grads, state, grads).compile(), transformation.init, grads)


def has_torch() -> bool:
    """Whether PyTorch computes on the kind of device that JAX uses: a CPU or a GPU of NVIDIA."""
    try:
        import torch
    except ImportError:
        return False
    return jax.default_backend() == "cpu" or (jax.default_backend() == "gpu" and torch.cuda.is_available())


def torch_step(shapes: list[Shape], dtype: str, *, foreach: bool, compiled: bool = False, **arguments: Any) -> Step:
    """``torch.optim.RMSprop.step`` on the kind of device that JAX uses; on a CPU with one thread or all: the faster."""
    import torch  # here, since benchmarks.compiled does without it

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    params = [
        torch.nn.Parameter(torch.full(shape, 0.01, dtype=getattr(torch, dtype), device=device)) for shape in shapes
    ]
    for param in params:
        param.grad = torch.empty_like(param).normal_(std=0.01)
    optimizer = torch.optim.RMSprop(params, LR, ALPHA, foreach=foreach, **arguments)
    step = torch.compile(optimizer.step) if compiled else optimizer.step

    def synchronized() -> None:
        step()
        torch.cuda.synchronize()

    def with_threads(count: int) -> None:
        torch.set_num_threads(count)
        step()

    if device == "cuda":
        return synchronized
    choices = [functools.partial(with_threads, count) for count in (1, os.cpu_count())]
    for choice in choices:
        choice()  # the first call allocates, or compiles
    return min(choices, key=lambda choice: seconds(choice, repeats=2))


def keras_step(grads: list[jax.Array], **arguments: Any) -> Step:
    """``keras.optimizers.RMSprop`` on the JAX backend, jitted as ``Model.fit`` does it."""
    optimizer = keras.optimizers.RMSprop(LR, ALPHA, **arguments)
    variables = [keras.Variable(array) for array in like(grads)]
    optimizer.build(variables)
    carry = [[v.value for v in optimizer.variables], [v.value for v in variables]]
    jitted = jax.jit(
        lambda slots, grads, values: optimizer.stateless_apply(slots, grads, values), donate_argnums=(0, 2)
    )

    def step() -> None:
        values, slots = jitted(carry[0], grads, carry[1])
        carry[:] = slots, values
        jax.block_until_ready(carry)

    return step


def copy_step(kept: list[jax.ShapeDtypeStruct]) -> Step:
    """The yardstick: arrays of the shapes and widths of ``kept``, each read and overwritten once.

    Of integers, since arithmetic in bfloat16 is slower than memory on the CPU.
    """
    invert = jax.jit(functools.partial(jax.tree.map, jnp.invert), donate_argnums=0)
    carry = [[jnp.zeros(array.shape, f"uint{8 * array.dtype.itemsize}") for array in kept]]

    def step() -> None:
        carry[0] = jax.block_until_ready(invert(carry[0]))

    return step
