"""What an update of one array is made of: a plain function for each equation.

An algorithm is a tuple of these functions, applied in order (``rmsprop``, and every function of ``dialects``). They
know no trees, dtypes, devices or schedules; ``lift`` takes care of those.

Source: ``torch/optim/rmsprop.py`` (PyTorch 2.13, ``_single_tensor_rmsprop``); T. Tieleman and G. Hinton,
lecture 6e of "Neural Networks for Machine Learning" (2012); centered: A. Graves, "Generating Sequences
With Recurrent Neural Networks" (arXiv:1308.0850, eq. 38-45), in the form of T. Finch, "Incremental calculation of
weighted mean and variance" (2009), eq. 143.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Leaf(NamedTuple):
    """One parameter during an update, with its slots.

    Attributes:
      update: what the equations turn from the gradient, ``g``, into the update.
      param: the parameter if it decays, else ``None``.
      square_avg: the average of ``g²``, or of ``(g − grad_avg)²``.
      grad_avg: the average of ``g`` if centered, else ``None``.
      momentum_buffer: the accumulated steps if there is momentum, else ``None``.
      gradient: ``g`` as :func:`keep_gradient` found it, until :func:`apply_caution` has used it, else ``None``.
    """

    update: Any
    param: Any
    square_avg: Any
    grad_avg: Any
    momentum_buffer: Any
    gradient: Any = None


# An equation takes a leaf, and the numbers that its arguments name: hyperparameters, and 1 minus a smoothing constant.
Equation = Callable[..., Leaf]


# --- The gradient --------------------------------------------------------------------------------------------


def negate(leaf: Leaf) -> Leaf:
    """``g ← −g``: climbs instead of descending, or turns a step into an update."""
    return leaf._replace(update=-leaf.update)


def decay_weights(leaf: Leaf, weight_decay: jax.Array) -> Leaf:
    """``g ← g + weight_decay · param``: an L2 penalty."""
    # Written −(−g − weight_decay · param), which is equal bit for bit, except for the sign of a 0. XLA's CPU compiler
    # repeats a negation in every loop that reads it, but writes a sum that several loops read to memory
    # (benchmarks/NOTES.md).
    return leaf if leaf.param is None else leaf._replace(update=-(-leaf.update - weight_decay * leaf.param))


def decay_weights_decoupled(leaf: Leaf, lr: jax.Array, weight_decay: jax.Array) -> Leaf:
    """``update ← update − lr · weight_decay · param``: decay that stays out of the averages."""
    return leaf if leaf.param is None else leaf._replace(update=leaf.update - lr * weight_decay * leaf.param)


def decay_weights_corrected(leaf: Leaf, lr: jax.Array, max_lr: jax.Array, weight_decay: jax.Array) -> Leaf:
    """``update ← update − lr · (lr / max_lr) · weight_decay · param``: decay that falls with the square of ``lr``."""
    return decay_weights_decoupled(leaf, lr * (lr / max_lr), weight_decay)


def keep_gradient(leaf: Leaf) -> Leaf:
    """Keeps ``g`` as it is now for :func:`apply_caution`."""
    return leaf._replace(gradient=leaf.update)


# --- The averages --------------------------------------------------------------------------------------------


def average(leaf: Leaf, alpha: jax.Array, one_minus_alpha: jax.Array) -> Leaf:
    """``square_avg ← alpha · square_avg + (1 − alpha) · g²``."""
    # ((1 − alpha) · g) · g is torch's order, in which g = 1e19 does not overflow float32.
    g = leaf.update
    return leaf._replace(square_avg=alpha * leaf.square_avg + one_minus_alpha * g * g)


def centered_average(leaf: Leaf, alpha: jax.Array, one_minus_alpha: jax.Array) -> Leaf:
    """The variance and the mean of ``g``.

    ::

        square_avg ← alpha · square_avg + alpha · (1 − alpha) · (g − grad_avg)²
        grad_avg   ← grad_avg + (1 − alpha) · (g − grad_avg)

    In real arithmetic this is torch's "average of g² minus grad_avg²". As a sum of squares it cannot cancel, so it
    never turns negative.
    """
    # With alpha outside brackets, XLA's CPU compiler computes it twice (benchmarks/NOTES.md).
    deviation = leaf.update - leaf.grad_avg
    square_avg = alpha * leaf.square_avg + alpha * one_minus_alpha * deviation * deviation
    return leaf._replace(square_avg=square_avg, grad_avg=leaf.grad_avg + one_minus_alpha * deviation)


# --- The denominator -----------------------------------------------------------------------------------------


def divide_eps_outside(leaf: Leaf, eps: jax.Array) -> Leaf:
    """``g ← g / (√square_avg + eps)``."""
    return leaf._replace(update=_divide(leaf.update, _sqrt(leaf.square_avg) + eps))


def divide_eps_inside(leaf: Leaf, eps: jax.Array) -> Leaf:
    """``g ← g / √(square_avg + eps)``."""
    return leaf._replace(update=_divide(leaf.update, _sqrt(leaf.square_avg + eps)))


@jax.custom_jvp
def _sqrt(x: jax.Array) -> jax.Array:
    """√x with derivative 0 at 0. The infinite one turns every hyper-gradient into NaN: g/√g² is 0/0 there."""
    return jnp.sqrt(x)


@_sqrt.defjvp
def _sqrt_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    root = _sqrt(*primals)
    return root, tangents[0] / (2 * jnp.where(root == 0, jnp.inf, root))


@jax.custom_jvp
def _divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """x/y whose derivative never forms 1/y², which is infinite in float32 for y = eps = 1e-20."""
    return x / y


@_divide.defjvp
def _divide_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    y = primals[1]
    quotient = _divide(*primals)
    return quotient, (tangents[0] - quotient * tangents[1]) / y


# --- The step ------------------------------------------------------------------------------------------------


def add_momentum(leaf: Leaf, momentum: jax.Array) -> Leaf:
    """``momentum_buffer ← momentum · momentum_buffer + step``, which becomes the step."""
    buffer = momentum * leaf.momentum_buffer + leaf.update
    return leaf._replace(update=buffer, momentum_buffer=buffer)


def add_nesterov_momentum(leaf: Leaf, momentum: jax.Array) -> Leaf:
    """As :func:`add_momentum`, but one step ahead: ``step ← momentum · momentum_buffer + step``."""
    buffer = momentum * leaf.momentum_buffer + leaf.update
    return leaf._replace(update=momentum * buffer + leaf.update, momentum_buffer=buffer)


def average_steps(leaf: Leaf, momentum: jax.Array, one_minus_momentum: jax.Array) -> Leaf:
    """``momentum_buffer ← momentum · momentum_buffer + (1 − momentum) · step``, which becomes the step."""
    buffer = momentum * leaf.momentum_buffer + one_minus_momentum * leaf.update
    return leaf._replace(update=buffer, momentum_buffer=buffer)


def scale_by_lr(leaf: Leaf, lr: jax.Array) -> Leaf:
    """``step ← lr · step``."""
    return leaf._replace(update=lr * leaf.update)


def apply_caution(leaf: Leaf) -> Leaf:
    """Drops the entries of the step whose sign is not that of ``g``, and scales the others up.

    ::

        mask ← 1 where step · g > 0, else 0
        step ← step · mask / max(mean(mask), 0.001)

    The mean is that of the whole array, whatever its shape.
    """
    # Of the signs, since the product itself may underflow (timm then drops the entry). The mean of nothing is 0.
    mask = (jnp.sign(leaf.update) * jnp.sign(leaf.gradient) > 0).astype(leaf.update.dtype)
    mean = mask.sum() / max(mask.size, 1)
    return leaf._replace(update=leaf.update * (mask / jnp.maximum(mean, 1e-3)), gradient=None)
