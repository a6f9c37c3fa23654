"""RMSProp for JAX: ``torch.optim.RMSprop``, and every other framework's, as Optax gradient transformations."""

from rmsprop_jax import diagnostics, dialects, recipes
from rmsprop_jax.transform import RMSPropState, rmsprop, scale_by_rmsprop

__version__ = "0.1.0"
__all__ = ["RMSPropState", "diagnostics", "dialects", "recipes", "rmsprop", "scale_by_rmsprop"]
