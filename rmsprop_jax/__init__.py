"""RMSProp for JAX: ``torch.optim.RMSprop``, and every other framework's, as Optax gradient transformations."""

import importlib
from typing import Any

from rmsprop_jax import (
    checkpoints,
    diagnostics,
    dialects,
    recipes,
    recorder,
    sharding,
    storage,
    summary,
    translation,
)
from rmsprop_jax.state import RMSPropState
from rmsprop_jax.transform import rmsprop, scale_by_rmsprop

__version__ = "0.1.0"
__all__ = [
    "RMSPropState",
    "checkpoints",
    "diagnostics",
    "dialects",
    "recipes",
    "recorder",
    "rmsprop",
    "scale_by_rmsprop",
    "sharding",
    "storage",
    "summary",
    "translation",
]

_LOADED_WHEN_USED = ("plotting",)  # it imports matplotlib


def __getattr__(name: str) -> Any:
    if name in _LOADED_WHEN_USED:
        return importlib.import_module(f"rmsprop_jax.{name}")
    raise AttributeError(f"module 'rmsprop_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LOADED_WHEN_USED})
