"""Runs of other libraries, in and out: hyperparameters, state and step."""

from rmsprop_jax.checkpoints.keras import from_keras, to_keras
from rmsprop_jax.checkpoints.optax import from_optax, to_optax
from rmsprop_jax.checkpoints.tensorflow import from_tensorflow, to_tensorflow
from rmsprop_jax.checkpoints.torch import from_torch, to_torch
from rmsprop_jax.checkpoints.torch_schedulers import schedules_of

__all__ = [
    "from_keras",
    "from_optax",
    "from_tensorflow",
    "from_torch",
    "schedules_of",
    "to_keras",
    "to_optax",
    "to_tensorflow",
    "to_torch",
]
