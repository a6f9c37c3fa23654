"""RMSProp in NumPy float64, written from the published equations. Shares nothing with the package.

One rule with a switch for each thing in which the frameworks differ; the tests compare it with the recordings in
``golden``, and the package with both.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

Number = float | Callable[[int], float]  # a schedule is read at the number of updates so far


class Moment(NamedTuple):
    """Everything after one step; ``square_avg`` is the plain average of g², also if centered."""

    update: np.ndarray
    param: np.ndarray
    square_avg: np.ndarray
    grad_avg: np.ndarray
    momentum_buffer: np.ndarray


def rmsprop(
    param: np.ndarray,
    gradients: Sequence[np.ndarray],
    *,
    lr: Number = 0.01,
    alpha: Number = 0.99,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    momentum: Number = 0.0,
    centered: bool = False,
    maximize: bool = False,
    eps_in_sqrt: bool = False,
    initial_scale: float = 0.0,
    bias_correction: bool = False,
    lr_in_buffer: bool = False,
    nesterov: bool = False,
    decoupled_decay: bool = False,
    averaged_steps: bool = False,
    corrected_weight_decay: bool = False,
    max_lr: float = 0.0,
    caution: bool = False,
) -> Iterator[Moment]:
    """The documented rule, step by step: a variance is a difference of two averages here, as in torch."""
    param = np.asarray(param, np.float64)
    v, m, buffer = np.full_like(param, initial_scale), np.zeros_like(param), np.zeros_like(param)
    for t, gradient in enumerate(gradients, start=1):
        rate, a, e, decay, mu = (_at(number, t - 1) for number in (lr, alpha, eps, weight_decay, momentum))
        g = np.asarray(gradient, np.float64)
        g = (-g if maximize else g) + (0 if decoupled_decay else decay * param)
        v = a * v + (1 - a) * g**2
        m = a * m + (1 - a) * g
        unbias = 1 - a**t if bias_correction else 1.0
        v_hat, m_hat = v / unbias, m / unbias
        variance = v_hat - m_hat**2 if centered else v_hat
        step = g / (np.sqrt(variance + e) if eps_in_sqrt else np.sqrt(variance) + e)
        step = rate * step if lr_in_buffer else step
        buffer = mu * buffer + ((1 - mu) * step if averaged_steps else step)
        buffer_hat = buffer / (1 - mu**t) if averaged_steps and bias_correction else buffer
        moved = mu * buffer + step if nesterov else buffer_hat
        if caution and mu > 0:
            mask = np.sign(moved) == np.sign(g)
            mask[g == 0] = False
            moved = np.where(mask, moved / max(np.count_nonzero(mask) / mask.size, 1e-3), 0)
        decay_rate = rate**2 / max_lr if corrected_weight_decay else rate
        update = -(moved if lr_in_buffer else rate * moved) - (decay_rate * decay * param if decoupled_decay else 0)
        param = param + update
        yield Moment(update, param, v_hat, m_hat, buffer_hat)


def _at(number: Any, step: int) -> Any:
    return number(step) if callable(number) else number
