"""The table of recipes: what each of them is, where it was read, and in which unit its gradient is.

:func:`recipe` enters a function into :data:`RECIPES` and adds the facts of its entry to its docstring.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import chex
import jax.numpy as jnp
import numpy as np
from optax import GradientTransformation, GradientTransformationExtraArgs

from rmsprop_jax.arguments import (
    check_eps,
    check_mask,
    check_number_or_schedule,
    check_numbers,
    check_smoothing,
    explain_arguments,
)
from rmsprop_jax.recipes import schedules
from rmsprop_jax.recipes.schedules import Schedule
from rmsprop_jax.state import SettingsQuery

Build = TypeVar("Build", bound=Callable[..., GradientTransformationExtraArgs])


class Recipe(NamedTuple):
    """One row of the table of recipes.

    Attributes:
      name: of the function, and of its schedule in ``recipes.schedules``.
      summary: the first line of its docstring.
      build: the function that makes the optimizer.
      schedule: the function that makes the learning rate, if that is not constant.
      family: ``"reinforcement learning"``, ``"sequences"`` or ``"images"``.
      dialect: the key of ``translation.DIALECTS`` that builds it (timm's for TensorFlow's with weight decay).
      gradient: the unit of the gradient: over what the source sums or averages the loss. eps and clipping belong to it.
      caller: what belongs to the run, but not to the optimizer.
      source: a repository, or a paper.
      commit: of the repository; empty for a paper.
      files: where the numbers are.
    """

    name: str
    summary: str
    build: Callable[..., GradientTransformationExtraArgs]
    schedule: Callable[..., Schedule] | None
    family: str
    dialect: str
    gradient: str
    caller: str
    source: str
    commit: str
    files: str

    def reference(self) -> str:
        """Source, commit and files on one line."""
        at = f" at {self.commit}" if self.commit else ""
        return f"{self.source}{at}, {self.files}"


RECIPES: dict[str, Recipe] = {}


# What is checked under the name that it has here, before a dialect calls it otherwise.
_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("lr", "momentum", "weight_decay"), check_number_or_schedule),
    **dict.fromkeys(("alpha", "beta1", "beta2"), check_smoothing),
    "eps": check_eps,
    "weight_decay_mask": check_mask,
}


def _with_checked_arguments(function: Build, schedule: Callable[..., Schedule] | None) -> Build:
    """Checks the numbers that all recipes have in common, under their names, and those of the schedule."""
    signature = inspect.signature(function)
    needed = () if schedule is None else tuple(inspect.signature(schedule).parameters)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> GradientTransformationExtraArgs:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in _CHECKS:
                _CHECKS[name](name, value)
        if schedule is not None:  # checks its arguments even if a function for lr makes them unused
            schedule(**{name: value for name, value in bound.arguments.items() if name in needed and name != "lr"})
        return function(*args, **kwargs)

    return cast(Build, checked)


def recipe(
    *, family: str, dialect: str, gradient: str, source: str, files: str, commit: str = "", caller: str = "nothing"
) -> Callable[[Build], Build]:
    """Enters a function into :data:`RECIPES`. The arguments are the fields of :class:`Recipe`."""

    def enter(function: Build) -> Build:
        schedule: Callable[..., Schedule] | None = getattr(schedules, function.__name__, None)
        build = cast(Build, explain_arguments(_with_checked_arguments(function, schedule)))
        name, text = function.__name__, (function.__doc__ or "").rstrip()
        row = Recipe(
            name=name,
            summary=text.splitlines()[0].removesuffix("."),
            build=build,
            schedule=schedule,
            family=family,
            dialect=dialect,
            gradient=gradient,
            caller=caller,
            source=source,
            commit=commit,
            files=files,
        )
        facts = {"Unit of the gradient": gradient, "Left to the caller": caller, "Source": row.reference()}
        if schedule is not None:
            facts = {"Learning rate": f":func:`recipes.schedules.{name}`"} | facts
        build.__doc__ = "\n\n".join([text, *(f"    {title}: {fact}." for title, fact in facts.items())]) + "\n    "
        RECIPES[name] = row
        return build

    return enter


def mean_loss_step_ratio(optimizer: GradientTransformation, gradient: chex.Numeric, terms: chex.Numeric) -> np.ndarray:
    """Step on the mean of a loss ÷ step on its sum, once the averages have warmed up.

    A recipe whose source sums the loss takes other steps on a mean loss, since eps is in the unit of the gradient.
    With n for ``terms``, g for ``gradient`` and the denominators of the RMSProp in ``optimizer``::

        ratio = (g / denominator(g)) / (n · g / denominator(n · g))

    ``optax.chain(optax.scale(n), optimizer)`` takes the source's steps on a mean loss. The ratio holds where nothing is
    clipped and no weight decays. With ``centered``, ``gradient`` is the standard deviation of the gradient.

    Args:
      optimizer: a recipe, or any transformation with one RMSProp in it.
      gradient: the root mean square of the gradient of the mean loss, ≥ 0.
      terms: how many terms the mean is of, ≥ 1; broadcast against ``gradient``.

    Returns:
      The ratio, float64.

    Raises:
      ValueError: if a number is out of range, or there is not exactly one RMSProp.
      TypeError: if one of them is not a real number.

    Example:
      >>> from rmsprop_jax import recipes
      >>> print(recipes.mean_loss_step_ratio(recipes.dqn_nature(), [3e-2, 3e-3, 3e-4], 32).round(3))
      [0.289 0.043 0.031]
    """
    size, number = check_numbers("gradient", gradient, at_least=0.0), check_numbers("terms", terms, at_least=1.0)
    query, params = SettingsQuery(), jnp.zeros(1)
    optimizer.update(params, optimizer.init(params), params, rmsprop_settings=query)
    found = {answer.settings for answer in query.answers}
    if len(found) != 1:
        raise ValueError(f"optimizer must have one RMSProp in it, got {len(found)}")
    (settings,) = found

    def denominator(g: np.ndarray) -> np.ndarray:
        eps = np.float64(settings.eps)
        return np.asarray(np.sqrt(g**2 + eps) if settings.eps_in_sqrt else g + eps)

    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(denominator(number * size) / (number * denominator(size)))
