"""Published training recipes as ready optimizers: dialect, numbers, schedule, clipping and decay in one chain.

Every number was read in the source that the function names. What a source leaves open is an argument without a
default, and what is no part of the optimizer (an average of the weights, a schedule that watches the validation
loss) is left to the caller; the docstring says so. All of them are Optax transformations: ``init`` and ``update``
with ``params``.
"""

from collections.abc import Callable
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import GradientTransformationExtraArgs

from rmsprop_jax import dialects
from rmsprop_jax.arguments import check_number
from rmsprop_jax.transform import rmsprop

# --- Reinforcement learning ------------------------------------------------------------------------------


def dreamer_v3(lr: float = 4e-5, warmup: int = 1000) -> GradientTransformationExtraArgs:
    """DreamerV3: adaptive clipping at 0.3 of each array's norm, LaProp, linear warm-up from 0 over 1,000 updates.

    Source: github.com/danijar/dreamerv3 at e3f0224, ``dreamerv3/configs.yaml``, ``embodied/jax/opt.py``.
    """
    check_number("lr", lr)
    _check_count("warmup", warmup)
    return optax.chain(
        _clip_by_parameter_norm(0.3, smallest=1e-3), dialects.dreamer(lr=optax.linear_schedule(0.0, lr, warmup))
    )


def cleanba_impala(updates: int) -> GradientTransformationExtraArgs:
    """IMPALA in Cleanba: torch's RMSProp, global norm 40, learning rate down a staircase over ``updates`` rollouts.

    Each rollout is used for 4 optimizer steps, which share a learning rate of 6e-4 · (1 − rollout/``updates``).

    Source: github.com/vwxyzjn/cleanba at d1f8979, ``cleanba/cleanba_impala.py``.
    """
    _check_count("updates", updates)
    return optax.chain(
        optax.clip_by_global_norm(40.0),
        rmsprop(lr=lambda step: 6e-4 * jnp.maximum(0.0, 1 - (step // 4) / updates), alpha=0.99, eps=0.01),
    )


def impala(frames_per_update: int, total_frames: float = 1e9) -> GradientTransformationExtraArgs:
    """IMPALA as published: TensorFlow's RMSProp with epsilon 0.1, learning rate 4.8e-4 linear to 0 over the frames.

    ``frames_per_update`` is batch size × unroll length × action repeats. The code clips no gradients.

    Source: github.com/deepmind/scalable_agent at 6c0c8a7, ``experiment.py``.
    """
    _check_count("frames_per_update", frames_per_update)
    schedule = optax.linear_schedule(4.8e-4, 0.0, int(total_frames // frames_per_update))
    return dialects.tensorflow(schedule, decay=0.99, momentum=0.0, epsilon=0.1)


def torchbeast(
    total_steps: int = 100_000, unroll_length: int = 80, batch_size: int = 8
) -> GradientTransformationExtraArgs:
    """TorchBeast: torch's RMSProp with eps 0.01, global norm 40, learning rate 4.8e-4 linear to 0.

    ``total_steps`` counts environment steps, of which an update uses ``unroll_length`` · ``batch_size``.

    Source: github.com/facebookresearch/torchbeast at 0af07b0, ``torchbeast/monobeast.py``.
    """
    for name, count in (("total_steps", total_steps), ("unroll_length", unroll_length), ("batch_size", batch_size)):
        _check_count(name, count)

    def schedule(step: jax.Array) -> jax.Array:
        return 4.8e-4 * (1 - jnp.minimum(1.0, step * (unroll_length * batch_size / total_steps)))

    return optax.chain(optax.clip_by_global_norm(40.0), rmsprop(lr=schedule, alpha=0.99, eps=0.01))


def dqn_nature() -> GradientTransformationExtraArgs:
    """The Nature DQN: centered RMSProp, 0.01 under the root, no momentum, learning rate 2.5e-4.

    Source: V. Mnih et al., Nature 518 (2015), Extended Data Table 1; github.com/deepmind/dqn at 9d9b1d1.
    """
    return dialects.dqn(learning_rate=2.5e-4, squared_gradient_momentum=0.95, min_squared_gradient=0.01)


def dqn_dopamine() -> GradientTransformationExtraArgs:
    """DQN in Dopamine (TensorFlow): centered RMSProp with epsilon 1e-5, learning rate 2.5e-4.

    Source: github.com/google/dopamine at 5873f54, ``dopamine/tf/agents/dqn/configs/dqn.gin``.
    """
    return dialects.tensorflow(2.5e-4, decay=0.95, momentum=0.0, epsilon=1e-5, centered=True)


def a2c() -> GradientTransformationExtraArgs:
    """A2C, the default of Stable-Baselines3: torch's RMSProp with eps 1e-5, global norm 0.5, learning rate 7e-4.

    Source: github.com/DLR-RM/stable-baselines3 at e05d2db, ``stable_baselines3/a2c/a2c.py``.
    """
    return optax.chain(optax.clip_by_global_norm(0.5), rmsprop(lr=7e-4, alpha=0.99, eps=1e-5))


def a2c_atari() -> GradientTransformationExtraArgs:
    """A2C on Atari in the RL Zoo: as ``a2c``, but TensorFlow's place of eps and starting value.

    Source: github.com/DLR-RM/rl-baselines3-zoo at 22e3ff2, ``hyperparams/a2c.yml``.
    """
    return optax.chain(optax.clip_by_global_norm(0.5), dialects.stable_baselines3(lr=7e-4, alpha=0.99, eps=1e-5))


def qmix() -> GradientTransformationExtraArgs:
    """QMIX in PyMARL: torch's RMSProp with eps 1e-5, global norm 10, learning rate 5e-4.

    Source: github.com/oxwhirl/pymarl at c971afd, ``src/config/default.yaml``, ``src/learners/q_learner.py``.
    """
    return optax.chain(optax.clip_by_global_norm(10.0), rmsprop(lr=5e-4, alpha=0.99, eps=1e-5))


# --- Language --------------------------------------------------------------------------------------------


def dpo(lr: float = 5e-7, warmup: int = 150) -> GradientTransformationExtraArgs:
    """The original DPO: torch's RMSProp and defaults, global norm 10, learning rate 5e-7 after a linear warm-up.

    The first update has 1/151 of the learning rate, the 151st all of it. (The paper's appendix says 1e-6.)

    Source: github.com/eric-mitchell/direct-preference-optimization at f8b8c0f, ``config/config.yaml``, ``trainers.py``.
    """
    check_number("lr", lr)
    _check_count("warmup", warmup)
    return optax.chain(
        optax.clip_by_global_norm(10.0), rmsprop(lr=lambda step: lr * jnp.minimum(1.0, (step + 1) / (warmup + 1)))
    )


def char_rnn(steps_per_epoch: int) -> GradientTransformationExtraArgs:
    """char-rnn: gradients clipped to ±5 each, alpha 0.95, learning rate 2e-3, × 0.97 per epoch from the 11th on.

    Torch7's ``optim.rmsprop`` is torch's without momentum.

    Source: github.com/karpathy/char-rnn at 6f9487a, ``train.lua``.
    """
    _check_count("steps_per_epoch", steps_per_epoch)

    def schedule(step: jax.Array) -> jax.Array:
        return 2e-3 * 0.97 ** jnp.maximum(step // steps_per_epoch - 9, 0)

    return optax.chain(optax.clip(5.0), rmsprop(lr=schedule, alpha=0.95, eps=1e-8))


def graves() -> GradientTransformationExtraArgs:
    """Graves' handwriting: centered, 1e-4 under the root, learning rate 1e-4 inside a momentum of 0.9.

    The paper does not say what the averages start from; here it is 0. It clips what is propagated back through the
    outputs (±100) and the cells (±10), which is not the optimizer's to do.

    Source: A. Graves, "Generating Sequences With Recurrent Neural Networks", arXiv:1308.0850v5, eq. 38-45.
    """
    return dialects.optax(1e-4, decay=0.95, eps=1e-4, centered=True, momentum=0.9)


# --- Images ----------------------------------------------------------------------------------------------


def efficientnet(
    batch_size: int, steps_per_epoch: int, weight_decay_mask: Any | Callable[[optax.Params], Any]
) -> GradientTransformationExtraArgs:
    """EfficientNet: TensorFlow's RMSProp, 0.016 per 256 images, × 0.97 per 2.4 epochs after 5 epochs of warm-up.

    decay 0.9, momentum 0.9, epsilon 1e-3; the staircase is counted from step 0, the warm-up is linear from 0. L2
    decay of 1e-5 for everything outside batch normalisation, which ``weight_decay_mask`` says. The average of the
    weights (0.9999) is left to the caller.

    Source: github.com/tensorflow/tpu at 7dc921f, ``models/official/efficientnet/main.py``, ``utils.py``.
    """
    for name, count in (("batch_size", batch_size), ("steps_per_epoch", steps_per_epoch)):
        _check_count(name, count)
    peak, warmup = 0.016 * batch_size / 256, 5 * steps_per_epoch
    staircase = optax.exponential_decay(peak, 2.4 * steps_per_epoch, 0.97, staircase=True)

    def schedule(step: jax.Array) -> jax.Array:
        return jnp.where(step < warmup, peak * step / warmup, staircase(step))

    return optax.chain(
        optax.add_decayed_weights(1e-5, weight_decay_mask),
        dialects.tensorflow(schedule, decay=0.9, momentum=0.9, epsilon=1e-3),
    )


def mnasnet(
    batch_size: int, steps_per_epoch: int, weight_decay_mask: Any | Callable[[optax.Params], Any]
) -> GradientTransformationExtraArgs:
    """MnasNet: the optimizer of ``efficientnet``, whose code it shares.

    Source: github.com/tensorflow/tpu at 7dc921f, ``models/official/mnasnet/mnas_utils.py``, ``mnasnet_main.py``.
    """
    return efficientnet(batch_size, steps_per_epoch, weight_decay_mask)


def mobilenet_v3(steps_per_epoch: int) -> GradientTransformationExtraArgs:
    """MobileNetV3 in torchvision: torch's RMSProp with eps 0.0316 = √1e-3, 0.064 × 0.973 per 2 epochs, L2 of 1e-5.

    For 8 × 128 images a step. A port of TensorFlow's 1e-3 under the root.

    Source: github.com/pytorch/vision at 017e9b9, ``references/classification/README.md``, ``train.py``.
    """
    _check_count("steps_per_epoch", steps_per_epoch)
    schedule = optax.exponential_decay(0.064, 2 * steps_per_epoch, 0.973, staircase=True)
    return rmsprop(lr=schedule, alpha=0.9, eps=0.0316, weight_decay=1e-5, momentum=0.9)


def inception_v3(steps_per_epoch: int, momentum: float) -> GradientTransformationExtraArgs:
    """Inception-v3: TensorFlow's RMSProp with epsilon 1.0, decay 0.9, learning rate 0.045 × 0.94 per 2 epochs.

    The paper states no ``momentum`` (its authors' later code has 0.9), and a clipping threshold of 2.0 without its
    kind: to add it, put ``optax.clip_by_global_norm(2.0)`` or ``optax.clip(2.0)`` before.

    Source: C. Szegedy et al., "Rethinking the Inception Architecture", arXiv:1512.00567, section 8.
    """
    _check_count("steps_per_epoch", steps_per_epoch)
    schedule = optax.exponential_decay(0.045, 2 * steps_per_epoch, 0.94, staircase=True)
    return dialects.tensorflow(schedule, decay=0.9, momentum=momentum, epsilon=1.0)


def unet() -> GradientTransformationExtraArgs:
    """Pytorch-UNet: torch's RMSProp with momentum 0.999, L2 of 1e-8, global norm 1, learning rate 1e-5.

    torch's ``ReduceLROnPlateau`` (patience 5) that goes with it is ``optax.contrib.reduce_on_plateau``.

    Source: github.com/milesial/Pytorch-UNet at 21d7850, ``train.py``.
    """
    return optax.chain(optax.clip_by_global_norm(1.0), rmsprop(lr=1e-5, weight_decay=1e-8, momentum=0.999))


def wgan_generator() -> GradientTransformationExtraArgs:
    """WGAN, the generator: torch's RMSProp and defaults, learning rate 5e-5.

    Source: github.com/martinarjovsky/WassersteinGAN at f7a01e8, ``main.py``; arXiv:1701.07875, Algorithm 1.
    """
    return rmsprop(lr=5e-5)


def wgan_critic() -> GradientTransformationExtraArgs:
    """WGAN, the critic: as the generator, with the weights held in [−0.01, 0.01].

    Source: github.com/martinarjovsky/WassersteinGAN at f7a01e8, ``main.py``; arXiv:1701.07875, Algorithm 1.
    """
    return optax.chain(rmsprop(lr=5e-5), _hold_weights_within(0.01))


# --- Pieces that Optax does not have ---------------------------------------------------------------------


def _clip_by_parameter_norm(clipping: float, smallest: float) -> optax.GradientTransformation:
    """Adaptive gradient clipping with a norm per array; ``optax.adaptive_grad_clip`` has one per output unit."""

    def clip(g: jax.Array, p: jax.Array) -> jax.Array:
        longest = clipping * jnp.maximum(smallest, jnp.linalg.norm(p.ravel()))
        return g / jnp.maximum(1.0, jnp.linalg.norm(g.ravel()) / longest).astype(g.dtype)

    return _map_with_params(clip)


def _hold_weights_within(limit: float) -> optax.GradientTransformation:
    return _map_with_params(lambda u, p: jnp.clip(p + u, -limit, limit) - p)


def _map_with_params(function: Callable[[jax.Array, jax.Array], jax.Array]) -> optax.GradientTransformation:
    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        if params is None:
            raise ValueError("params must be given: call update(updates, state, params)")
        return jax.tree.map(
            lambda u, p: None if u is None else function(u, p), updates, params, is_leaf=lambda u: u is None
        )

    return optax.stateless(update)


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
