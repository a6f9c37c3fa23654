"""The learning rates of published runs, each a function of the number of updates so far, n = 0, 1, 2, ...

Every function has the name of its recipe, and the same arguments as far as they matter for the schedule. It returns an
Optax schedule: to plot, to log, to shift for a run that is resumed, or to change::

    >>> from rmsprop_jax import recipes
    >>> schedule = recipes.schedules.efficientnet(batch_size=256)
    >>> print(f"{schedule(10_000):.4f} {schedule(30_000):.4f}")
    0.0064 0.0151
    >>> optimizer = recipes.efficientnet(None, lr=lambda step: schedule(step + 50_000))

The numbers are in JAX's own float: float32, or float64 with ``jax_enable_x64``. A count is a whole number from 1 to
2³¹ − 1, and an epoch is a number of updates > 0 that need not be whole.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rmsprop_jax.arguments import check_count, check_number, known, shown
from rmsprop_jax.recipes.clipping import check_positive

Schedule = Callable[[chex.Numeric], jax.Array]

_IMAGENET = 1_281_167  # images in the training set
_LARGEST_STEP = 2**31 - 1


def _float(number: chex.Numeric) -> jax.Array:
    """In JAX's own float. A step, an int32, has no room for one more."""
    return jnp.asarray(number, float)


def _check_total(name: str, total: Any, part_name: str, part: float) -> Any:
    """Returns a number at which a schedule ends, if that is not before the end of the first update, or never."""
    checked = check_number(name, total)
    number = known(checked)
    if number is not None and not part <= number < math.inf:
        raise ValueError(
            f"{name} must be finite and at least {part_name}, the {part:g} that one update uses, got {number:g}"
        )
    return checked


def _check_epoch(name: str, value: Any) -> float:
    """Returns the length of an epoch in updates, a number > 0 that is known when the schedule is built."""
    epoch = known(check_positive(name, value))
    if epoch is None or epoch == math.inf:
        raise ValueError(f"{name} must be a finite number of updates that is known here, got {shown(value)}")
    return epoch


# --- Reinforcement learning ----------------------------------------------------------------------------------


def dreamer_v3(lr: chex.Numeric = 4e-5, *, warmup: int = 1000) -> Schedule:
    """``lr · min(1, n / warmup)``."""
    peak, length = check_number("lr", lr), float(check_count("warmup", warmup))

    def schedule(step: chex.Numeric) -> jax.Array:
        return _float(peak) * jnp.minimum(1.0, _float(step) / length)

    return schedule


def cleanba_impala(updates: int = 19_531, lr: chex.Numeric = 6e-4, *, minibatches: int = 4) -> Schedule:
    """``lr · (1 − (n // minibatches) / updates)``, then 0."""
    peak, rollouts = check_number("lr", lr), float(check_count("updates", updates))
    steps = check_count("minibatches", minibatches)

    def schedule(step: chex.Numeric) -> jax.Array:
        return _float(peak) * jnp.maximum(0.0, 1.0 - _float(jnp.asarray(step) // steps) / rollouts)

    return schedule


def impala(frames_per_update: int = 800, total_frames: chex.Numeric = 1e9, lr: chex.Numeric = 4.8e-4) -> Schedule:
    """``lr · (1 − min(n · frames_per_update, total_frames) / total_frames)``."""
    peak, frames = check_number("lr", lr), float(check_count("frames_per_update", frames_per_update))
    total = _check_total("total_frames", total_frames, "frames_per_update", frames)

    def schedule(step: chex.Numeric) -> jax.Array:
        return _float(peak) * (1.0 - jnp.minimum(1.0, _float(step) * frames / _float(total)))

    return schedule


def impala_dmlab30(
    frames_per_update: int = 12_800, total_frames: chex.Numeric = 1e10, lr: chex.Numeric = 0.00031866995608948655
) -> Schedule:
    """That of :func:`impala`."""
    return impala(frames_per_update, total_frames, lr)


def torchbeast(
    total_steps: int = 100_000, unroll_length: int = 80, batch_size: int = 8, lr: chex.Numeric = 4.8e-4
) -> Schedule:
    """``lr · (1 − min(n · unroll_length · batch_size, total_steps) / total_steps)``."""
    peak, total = check_number("lr", lr), float(check_count("total_steps", total_steps))
    used = float(check_count("unroll_length", unroll_length) * check_count("batch_size", batch_size))
    _check_total("total_steps", total, "unroll_length · batch_size", used)

    def schedule(step: chex.Numeric) -> jax.Array:
        return _float(peak) * (1.0 - jnp.minimum(1.0, _float(step) * used / total))

    return schedule


def a2c_baselines(samples_per_update: int, total_steps: int = 80_000_000, lr: chex.Numeric = 7e-4) -> Schedule:
    """``lr · (1 − ((n + 1) · samples_per_update − 1) / total_steps)``, then 0."""
    peak, samples = check_number("lr", lr), float(check_count("samples_per_update", samples_per_update))
    total = float(check_count("total_steps", total_steps))
    _check_total("total_steps", total, "samples_per_update", samples)

    def schedule(step: chex.Numeric) -> jax.Array:
        return _float(peak) * jnp.maximum(0.0, 1.0 - ((_float(step) + 1.0) * samples - 1.0) / total)

    return schedule


def a3c(total_steps: int = 80_000_000, steps_per_update: int = 5, lr: chex.Numeric = 7e-4) -> Schedule:
    """``lr · (total_steps − t − 1) / total_steps`` with ``t = (n + 1) · steps_per_update + 1``, then 0."""
    peak, total = check_number("lr", lr), float(check_count("total_steps", total_steps))
    used = float(check_count("steps_per_update", steps_per_update))
    _check_total("total_steps", total, "steps_per_update", used)

    def schedule(step: chex.Numeric) -> jax.Array:
        t = (_float(step) + 1.0) * used + 1.0
        return _float(peak) * jnp.maximum(0.0, total - t - 1.0) / total

    return schedule


# --- Sequences -----------------------------------------------------------------------------------------------


def dpo(lr: chex.Numeric = 5e-7, *, warmup: int = 150) -> Schedule:
    """``lr · min(1, (n + 1) / (warmup + 1))``."""
    peak, length = check_number("lr", lr), float(check_count("warmup", warmup))

    def schedule(step: chex.Numeric) -> jax.Array:
        return _float(peak) * jnp.minimum(1.0, (_float(step) + 1.0) / (length + 1.0))

    return schedule


def char_rnn(
    steps_per_epoch: int, lr: chex.Numeric = 2e-3, *, decay: chex.Numeric = 0.97, decay_after: int = 10
) -> Schedule:
    """``lr · decay^max(0, n // steps_per_epoch − decay_after + 1)``: decay from the 11th epoch on."""
    factor, last = check_number("decay", decay), check_count("decay_after", decay_after)
    start, epoch = check_number("lr", lr), check_count("steps_per_epoch", steps_per_epoch)

    def schedule(step: chex.Numeric) -> jax.Array:
        return _float(start) * _float(factor) ** jnp.maximum(0.0, _float(jnp.asarray(step) // epoch) - (last - 1.0))

    return schedule


# --- Images --------------------------------------------------------------------------------------------------


def efficientnet(
    batch_size: int = 2048,
    steps_per_epoch: chex.Numeric | None = None,
    lr: chex.Numeric = 0.016,
    *,
    decay: chex.Numeric = 0.97,
    epochs_per_decay: float = 2.4,
    warmup_epochs: float = 5.0,
) -> Schedule:
    """With E for ``steps_per_epoch``, ``peak = lr · batch_size / 256`` and ``W = int(warmup_epochs · E)``.

    ::

        peak · n / W                                       n < W
        peak · decay^⌊n / (epochs_per_decay · E)⌋          from n = W on, where the staircase already counts 2

    ``steps_per_epoch=None`` is ImageNet's, 1,281,167 / ``batch_size``, which is not whole. In float32, the dtype of
    TensorFlow here, a stair of such an epoch may fall one update early or late.
    """
    batch = check_count("batch_size", batch_size)
    epoch = _IMAGENET / batch if steps_per_epoch is None else _check_epoch("steps_per_epoch", steps_per_epoch)
    peak, factor = check_number("lr", lr), check_number("decay", decay)
    stairs = _stairs(epoch, _check_epoch("epochs_per_decay", epochs_per_decay))
    warmup = float(int(_check_epoch("warmup_epochs", warmup_epochs) * epoch))

    def schedule(step: chex.Numeric) -> jax.Array:
        n = _float(step)
        share = jnp.where(n < warmup, n / max(1.0, warmup), _float(factor) ** stairs(step))
        return _float(peak) * batch / 256 * share

    return schedule


def mnasnet(
    batch_size: int = 1024, steps_per_epoch: chex.Numeric | None = None, lr: chex.Numeric = 0.016, **shape: Any
) -> Schedule:
    """That of :func:`efficientnet`, for batches of 1,024. ``shape`` is its ``decay`` and so on."""
    return efficientnet(batch_size, steps_per_epoch, lr, **shape)


def efficientnet_v2(
    batch_size: int = 4096, steps_per_epoch: chex.Numeric | None = None, lr: chex.Numeric = 0.016, **shape: Any
) -> Schedule:
    """That of :func:`efficientnet`. ``steps_per_epoch=None`` is 1,256,144 / ``batch_size``: 20 shards are held out."""
    epoch = 1_256_144 / check_count("batch_size", batch_size) if steps_per_epoch is None else steps_per_epoch
    return efficientnet(batch_size, epoch, lr, **shape)


def efficientnet_v2_keras(
    batch_size: int = 4096, steps_per_epoch: chex.Numeric | None = None, lr: chex.Numeric = 0.016, **shape: Any
) -> Schedule:
    """That of :func:`efficientnet_v2`, but its own ``steps_per_epoch`` is whole: 1,256,144 // ``batch_size``."""
    whole = max(1, 1_256_144 // check_count("batch_size", batch_size))
    return efficientnet(batch_size, whole if steps_per_epoch is None else steps_per_epoch, lr, **shape)


def _stairs(epoch: float, epochs: float) -> Callable[[chex.Numeric], jax.Array]:
    """⌊n / (epochs · epoch)⌋ as a function of n."""
    share = Fraction(epochs).limit_denominator(1000)  # 2.4 is 12/5
    length = share.numerator * epoch
    if share != Fraction(str(epochs)) or length != int(length) or share.denominator * length > _LARGEST_STEP:
        return lambda step: jnp.floor(_float(step) / (epochs * epoch))

    def whole(step: chex.Numeric) -> jax.Array:
        # XLA multiplies by 1 / (epochs · epoch), which is off at whole multiples. Whole numbers are not.
        n, size, parts = jnp.asarray(step), int(length), share.denominator
        return _float(parts * (n // size) + parts * (n % size) // size)

    return whole


def efficientnet_b2_timm(
    steps_per_epoch: int = 5004,
    lr: chex.Numeric = 0.016,
    *,
    warmup_epochs: int = 5,
    warmup_lr: chex.Numeric = 1e-6,
    decay: chex.Numeric = 0.97,
    epochs_per_decay: float = 2.4,
) -> Schedule:
    """With e = n // ``steps_per_epoch``, one learning rate per epoch.

    ::

        warmup_lr + e · (lr − warmup_lr) / warmup_epochs      e < warmup_epochs
        lr · decay^⌊e / epochs_per_decay⌋                     from e = warmup_epochs on
    """
    peak, epoch = check_number("lr", lr), check_count("steps_per_epoch", steps_per_epoch)
    first, warmup = check_number("warmup_lr", warmup_lr), check_count("warmup_epochs", warmup_epochs)
    factor = check_number("decay", decay)
    stairs = _stairs(1.0, _check_epoch("epochs_per_decay", epochs_per_decay))

    def schedule(step: chex.Numeric) -> jax.Array:
        e = jnp.asarray(step) // epoch
        rising = _float(first) + _float(e) * (_float(peak) - _float(first)) / warmup
        return jnp.where(e < warmup, rising, _float(peak) * _float(factor) ** stairs(e))

    return schedule


def mobilenet_v3(
    steps_per_epoch: int, lr: chex.Numeric = 0.064, *, decay: chex.Numeric = 0.973, epochs_per_decay: int = 2
) -> Schedule:
    """``lr · decay^(epoch // epochs_per_decay)`` with ``epoch = n // steps_per_epoch``."""
    return _falling(steps_per_epoch, lr, decay, epochs_per_decay)


def inception_v3(
    steps_per_epoch: int, lr: chex.Numeric = 0.045, *, decay: chex.Numeric = 0.94, epochs_per_decay: int = 2
) -> Schedule:
    """``lr · decay^(epoch // epochs_per_decay)`` with ``epoch = n // steps_per_epoch``."""
    return _falling(steps_per_epoch, lr, decay, epochs_per_decay)


def inception_v3_tpu(
    batch_size: int = 1024,
    steps_per_epoch: chex.Numeric | None = None,
    lr: chex.Numeric = 0.165,
    *,
    decay: chex.Numeric = 0.94,
    epochs_per_decay: float = 3.0,
    floor: chex.Numeric = 1e-4,
) -> Schedule:
    """``peak · max(floor, decay^(n // D))``, ``peak = lr · batch_size / 256``, ``D = int(epochs_per_decay · epoch)``.

    ``steps_per_epoch=None`` is ImageNet's, 1,281,167 / ``batch_size``.
    """
    batch, rate = check_count("batch_size", batch_size), check_number("lr", lr)
    epoch = _IMAGENET / batch if steps_per_epoch is None else _check_epoch("steps_per_epoch", steps_per_epoch)
    stair = min(max(1, int(_check_epoch("epochs_per_decay", epochs_per_decay) * epoch)), _LARGEST_STEP)
    factor, lowest = check_number("decay", decay), check_number("floor", floor)

    def schedule(step: chex.Numeric) -> jax.Array:
        peak = _float(rate) * batch / 256
        return peak * jnp.maximum(_float(lowest), _float(factor) ** _float(jnp.asarray(step) // stair))

    return schedule


def inception_v4_tpu(
    batch_size: int = 256,
    steps_per_epoch: chex.Numeric | None = None,
    lr: chex.Numeric = 0.15,
    *,
    decay: chex.Numeric = 0.94,
    epochs_per_decay: float = 2.0,
    floor: chex.Numeric = 1e-4,
    cold_lr: chex.Numeric = 0.001,
) -> Schedule:
    """With E for ``steps_per_epoch``, ``e = ⌊n / E⌋``, ``L = lr · batch_size / 256 / decay^1.5``.

    With ``D = int(epochs_per_decay · E)``::

        max(floor · L, cold_lr)                  e = 0
        max(floor · L, e · L / 3)                e = 1, 2
        max(floor · L, L · decay^(n // D))       from e = 3 on
    """
    batch, rate = check_count("batch_size", batch_size), check_number("lr", lr)
    epoch = _IMAGENET / batch if steps_per_epoch is None else _check_epoch("steps_per_epoch", steps_per_epoch)
    stair = min(max(1, int(_check_epoch("epochs_per_decay", epochs_per_decay) * epoch)), _LARGEST_STEP)
    factor, lowest, cold = check_number("decay", decay), check_number("floor", floor), check_number("cold_lr", cold_lr)
    # Not n / epoch: XLA multiplies by 1 / epoch, which is off at whole multiples of it.
    starts = [min(math.ceil(k * epoch), _LARGEST_STEP) for k in (1, 2, 3)]

    def schedule(step: chex.Numeric) -> jax.Array:
        peak = _float(rate) * batch / 256 / _float(factor) ** 1.5
        e = sum((_float(jnp.asarray(step) >= start) for start in starts), start=_float(0.0))
        falling = peak * _float(factor) ** _float(jnp.asarray(step) // stair)
        rate_now = jnp.where(e < 1.0, _float(cold), jnp.where(e < 3.0, e * peak / 3.0, falling))
        return jnp.maximum(rate_now, _float(lowest) * peak)

    return schedule


def amoebanet_d(
    steps_per_epoch: int = 5004,
    lr: chex.Numeric = 0.64,
    *,
    decay: chex.Numeric = 0.9,
    warmup_epochs: float = 3.0,
    floor: chex.Numeric = 1e-4,
) -> Schedule:
    """With ``W = int(warmup_epochs · steps_per_epoch)``.

    ::

        lr · max(floor, n / W)                              n < W
        lr · max(floor, decay^(n // steps_per_epoch))       from n = W on, where it falls to 0.729 · lr
    """
    factor, lowest = check_number("decay", decay), check_number("floor", floor)
    length = float(int(_check_epoch("warmup_epochs", warmup_epochs) * check_count("steps_per_epoch", steps_per_epoch)))
    peak, epoch = check_number("lr", lr), check_count("steps_per_epoch", steps_per_epoch)

    def schedule(step: chex.Numeric) -> jax.Array:
        n = _float(step)
        falling = _float(factor) ** _float(jnp.asarray(step) // epoch)
        return _float(peak) * jnp.maximum(_float(lowest), jnp.where(n < length, n / max(1.0, length), falling))

    return schedule


def nasbench_101(total_steps: int = 16_875, lr: chex.Numeric = 0.2) -> Schedule:
    """0 at n = 0, then ``lr · (1 + cos(π · n / total_steps)) / 2``. Beyond ``total_steps`` it stays 0."""
    peak, total = check_number("lr", lr), float(check_count("total_steps", total_steps))

    def schedule(step: chex.Numeric) -> jax.Array:
        n = _float(step)
        cosine = 0.5 * (1.0 + jnp.cos(math.pi * jnp.minimum(1.0, n / total)))
        return _float(peak) * jnp.where(n < 1.0, 0.0, cosine)

    return schedule


def unet_fastmri(
    steps_per_epoch: int, lr: chex.Numeric = 1e-3, *, decay: chex.Numeric = 0.1, epochs_per_decay: int = 40
) -> Schedule:
    """``lr · decay^(epoch // epochs_per_decay)`` with ``epoch = n // steps_per_epoch``."""
    return _falling(steps_per_epoch, lr, decay, epochs_per_decay)


def _falling(steps_per_epoch: int, lr: chex.Numeric, decay: chex.Numeric, epochs_per_decay: int) -> Schedule:
    start, epoch = check_number("lr", lr), check_count("steps_per_epoch", steps_per_epoch)
    factor, epochs = check_number("decay", decay), check_count("epochs_per_decay", epochs_per_decay)

    def schedule(step: chex.Numeric) -> jax.Array:
        return _float(start) * _float(factor) ** _float(jnp.asarray(step) // epoch // epochs)

    return schedule
