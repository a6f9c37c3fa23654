"""What an optimizer of Keras does besides its rule, as pieces of Optax: clipping, accumulation, averages.

Source: Keras 3.15, ``keras/src/optimizers/base_optimizer.py``.
"""

import functools
import inspect
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax.state import is_absent, widened

__all__ = ["AveragesState", "accumulate", "average_parameters", "clip_each_by_norm", "divide_by"]


def divide_by(factor: float) -> optax.GradientTransformation:
    """``g ← g / factor``, which undoes the ``loss_scale_factor`` of the loss."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda g: g / jnp.asarray(factor, g.dtype), updates))


def clip_each_by_norm(max_norm: float) -> optax.GradientTransformation:
    """``optax.clip_by_global_norm`` of each array on its own, which is the ``clipnorm`` of Keras.

    ::

        g ← g · min(1, max_norm / |g|)
    """
    clip = optax.clip_by_global_norm(max_norm)

    return optax.stateless(lambda updates, _: jax.tree.map(lambda g: clip.update(g, optax.EmptyState())[0], updates))


def accumulate(tx: optax.GradientTransformation, steps: int, dtype: np.dtype) -> optax.GradientTransformationExtraArgs:
    """``optax.MultiSteps``: every ``steps`` gradients, ``tx`` gets their mean.

    Args:
      tx: what gets the mean.
      steps: the ``gradient_accumulation_steps`` of Keras.
      dtype: in which the mean is kept. Optax before 0.2.6 has no choice: it keeps that of the parameters.
    """
    options = {"accumulator_dtype": dtype}
    has_choice = "accumulator_dtype" in inspect.signature(optax.MultiSteps).parameters
    multi = optax.MultiSteps(tx, steps, **(options if has_choice else {}))
    return optax.with_extra_args_support(multi.gradient_transformation())


class AveragesState(NamedTuple):
    """What :func:`average_parameters` remembers.

    Attributes:
      count: number of calls so far, an int32 scalar.
      average: the average of the parameters, like them.
    """

    count: chex.Array
    average: chex.ArrayTree


def average_parameters(momentum: float, overwrite_every: int | None, steps: int) -> optax.GradientTransformation:
    """The ``use_ema`` of Keras: an average of the parameters, which takes their place from time to time.

    It is the last piece of a chain. With k for the number of updates so far, count // ``steps``::

        p       ← p + update
        average ← momentum · average + (1 − momentum) · p      p while k is 0
        p       ← average                                      if k + 1 is a multiple of overwrite_every

    Args:
      momentum: the share of the old average, from 0 to 1.
      overwrite_every: ``ema_overwrite_frequency``; ``None`` for never.
      steps: ``gradient_accumulation_steps``, or 1. The average also moves between two updates.
    """

    def init(params: optax.Params) -> AveragesState:
        return AveragesState(count=jnp.zeros((), jnp.int32), average=jax.tree.map(jnp.asarray, params))

    def update(
        updates: optax.Updates, state: AveragesState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AveragesState]:
        if params is None:
            raise ValueError("params must be given where parameters are averaged: call update(updates, state, params)")
        done = state.count // steps
        kept = jnp.where(done == 0, 0.0, momentum)
        over_all = functools.partial(jax.tree.map, is_leaf=is_absent)

        def averaged(average: Any, update: Any, p: Any) -> Any:
            if is_absent(average):
                return average
            old, new = widened(average), widened(optax.apply_updates(p, update))
            share = kept.astype(old.dtype)
            return (share * old + (1 - share) * new).astype(average.dtype)

        average = over_all(averaged, state.average, updates, params)
        new_state = AveragesState(count=optax.safe_increment(state.count), average=average)
        if overwrite_every is None:
            return updates, new_state
        is_time = (done + 1) % overwrite_every == 0

        def chosen(average: Any, update: Any, p: Any) -> Any:
            return update if is_absent(average) else jnp.where(is_time, average - p, update)

        return over_all(chosen, average, updates, params), new_state

    return optax.GradientTransformation(init, update)
