"""Runs of other libraries, in and out: hyperparameters, state and step."""

from rmsprop_jax.checkpoints.optax import from_optax, to_optax
from rmsprop_jax.checkpoints.torch import from_torch, to_torch

__all__ = ["from_optax", "from_torch", "to_optax", "to_torch"]
