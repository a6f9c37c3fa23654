"""RMSProp in NumPy float64, written from the published equations. Shares nothing with the package."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Moment(NamedTuple):
    """Everything after one step; ``square_avg`` is the plain average of g², also if centered."""

    update: np.ndarray
    param: np.ndarray
    square_avg: np.ndarray
    grad_avg: np.ndarray
    momentum_buffer: np.ndarray


Number = float | Callable[[int], float]  # or a schedule, a function of the number of updates so far


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
) -> Iterator[Moment]:
    """The documented rule, step by step: a variance is a difference of two averages here, as in torch."""
    numbers = dict(lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
    param = np.asarray(param, np.float64)
    v, m, buffer = np.full_like(param, initial_scale), np.zeros_like(param), np.zeros_like(param)
    for t, gradient in enumerate(gradients, start=1):
        lr, alpha, eps, weight_decay, momentum = (x(t - 1) if callable(x) else x for x in numbers.values())
        g = np.asarray(gradient, np.float64)
        g = (-g if maximize else g) + weight_decay * param
        v = alpha * v + (1 - alpha) * g**2
        m = alpha * m + (1 - alpha) * g
        unbias = 1 - alpha**t if bias_correction else 1.0
        v_hat, m_hat = v / unbias, m / unbias
        variance = v_hat - m_hat**2 if centered else v_hat
        denominator = np.sqrt(variance + eps) if eps_in_sqrt else np.sqrt(variance) + eps
        buffer = momentum * buffer + g / denominator
        update = -lr * buffer
        param = param + update
        yield Moment(update, param, v_hat, m_hat, buffer)
