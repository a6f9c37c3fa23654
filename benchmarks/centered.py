"""How accurate is the centered variance in float32? Ours, torch's and Optax's against float64.

Gradients are 1 + noise · N(0, 1), for 1,000 coordinates and 3,000 steps at alpha = 0.99. Two figures for each:
the median relative error of the standard deviation √variance after the last step (of coordinates where it is
a number), and the share of coordinates whose update was NaN at one step or more.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from rmsprop_jax import rmsprop

ALPHA, STEPS, COORDINATES = 0.99, 3000, 1000
NOISES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)

# A run gives the variance after the last step and, per coordinate, whether an update was ever NaN.
Outcome = tuple[np.ndarray, np.ndarray]


def truth(grads: np.ndarray) -> np.ndarray:
    """The variance in float64, by the recurrence that NumPy's float64 confirms to 1e-12 (tests)."""
    variance, mean = np.zeros(COORDINATES), np.zeros(COORDINATES)
    for g in grads.astype(np.float64):
        deviation = g - mean
        variance = ALPHA * (variance + (1 - ALPHA) * deviation**2)
        mean += (1 - ALPHA) * deviation
    return variance


def run_jax(tx: optax.GradientTransformation, grads: np.ndarray) -> tuple[optax.OptState, np.ndarray]:
    def step(state: optax.OptState, g: jax.Array) -> tuple[optax.OptState, jax.Array]:
        update, state = tx.update(g, state)
        return state, jnp.isnan(update)

    state, is_nan = jax.jit(lambda grads: jax.lax.scan(step, tx.init(grads[0]), grads))(grads)
    return state, np.asarray(is_nan.any(0))


def run_ours(grads: np.ndarray) -> Outcome:
    state, is_nan = run_jax(rmsprop(alpha=ALPHA, centered=True), grads)
    return np.asarray(state.square_avg, np.float64), is_nan


def run_optax(grads: np.ndarray) -> Outcome:
    state, is_nan = run_jax(optax.rmsprop(0.01, decay=ALPHA, eps_in_sqrt=False, centered=True), grads)
    mu, nu = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
    return np.asarray(nu - mu**2, np.float64), is_nan


def run_torch(grads: np.ndarray) -> Outcome:
    param = torch.nn.Parameter(torch.zeros(COORDINATES))
    optimizer = torch.optim.RMSprop([param], alpha=ALPHA, centered=True)
    for g in torch.from_numpy(grads):
        param.grad = g
        optimizer.step()
    slots = optimizer.state[param]
    variance = slots["square_avg"].addcmul(slots["grad_avg"], slots["grad_avg"], value=-1)
    return variance.double().numpy(), param.isnan().detach().numpy()  # a NaN never leaves the parameter


def accuracy(outcome: Outcome, variance: np.ndarray) -> dict[str, float | None]:
    got, is_nan = outcome
    positive = got >= 0
    errors = np.abs(np.sqrt(got[positive] / variance[positive]) - 1)
    return {"error": float(np.median(errors)) if positive.any() else None, "nan": float(is_nan.mean())}


def measure(full: bool) -> list[dict[str, Any]]:
    """A row for every ratio of noise to mean; ``full`` changes nothing."""
    return [row(noise) for noise in NOISES]


def row(noise: float) -> dict[str, Any]:
    grads = (1 + noise * np.random.default_rng(0).normal(size=(STEPS, COORDINATES))).astype(np.float32)
    variance = truth(grads)
    runs = {"ours": run_ours, "torch": run_torch, "optax": run_optax}
    return {"noise": noise, **{name: accuracy(run(grads), variance) for name, run in runs.items()}}
