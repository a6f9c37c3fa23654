"""Published training recipes as ready optimizers: dialect, numbers, schedule, clipping and decay in one chain.

Every number was read in the source that the function names. Those of the optimizer are arguments with the published
value as default, and those of a schedule are arguments of its function in ``recipes.schedules``. What a source leaves
open is an argument without a default. ``lr`` is the number from which the published schedule is built, or a function
that replaces it. alpha, eps, momentum and weight decay may be schedules, too; clipping limits and counts may not. What
does not belong to the optimizer (an average of the weights, a target network) is left to the caller. :data:`RECIPES`
says all of this in one table.

eps and clipping belong to the unit of the gradient. Where a source sums its loss over n terms and yours is their mean,
``optax.chain(optax.scale(n), recipes.impala())`` takes the source's steps; :func:`mean_loss_step_ratio` tells how far
off they are without it.

All recipes are Optax transformations; ``update`` needs ``params`` where weights decay or are held. Gradients and
parameters may have any dtype that :func:`rmsprop_jax.rmsprop` takes, and clipping computes in float32 at least too.
"""

from rmsprop_jax.recipes import images, reinforcement, schedules, sequences
from rmsprop_jax.recipes.entry import RECIPES, Recipe, mean_loss_step_ratio
from rmsprop_jax.recipes.images import *  # noqa: F403
from rmsprop_jax.recipes.reinforcement import *  # noqa: F403
from rmsprop_jax.recipes.sequences import *  # noqa: F403

__all__ = ["RECIPES", "Recipe", "mean_loss_step_ratio", "schedules"]
__all__ += [*reinforcement.__all__, *sequences.__all__, *images.__all__]


def __dir__() -> list[str]:
    return sorted(__all__)
