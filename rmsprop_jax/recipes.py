"""Published training recipes as ready optimizers: dialect, numbers, schedule, clipping and decay in one chain.

Every number comes from the source that the function names. What a source leaves open is an argument without a
default. What does not belong to the optimizer (an average of the weights, a schedule that watches the validation
loss) is left to the caller, and the docstring says so. All of them are Optax transformations; ``update`` needs
``params``. Gradients and parameters may have any dtype that :func:`rmsprop_jax.rmsprop` takes, and clipping computes in
float32 at least too. A count is a whole number from 1 to 2³¹ − 1, known when the recipe is built.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from optax import GradientTransformationExtraArgs

from rmsprop_jax import dialects
from rmsprop_jax.arguments import check_count, check_number, explain_arguments, known, shown
from rmsprop_jax.state import componentwise, is_trainable, widened
from rmsprop_jax.transform import rmsprop

__all__ = [
    "a2c",
    "a2c_atari",
    "char_rnn",
    "cleanba_impala",
    "dpo",
    "dqn_dopamine",
    "dqn_nature",
    "dreamer_v3",
    "efficientnet",
    "graves",
    "impala",
    "inception_v3",
    "mnasnet",
    "mobilenet_v3",
    "qmix",
    "torchbeast",
    "unet",
    "wgan_critic",
    "wgan_generator",
]


def __dir__() -> list[str]:
    return __all__


# --- Reinforcement learning ------------------------------------------------------------------------------


@explain_arguments
def dreamer_v3(lr: float = 4e-5, warmup: int = 1000) -> GradientTransformationExtraArgs:
    """DreamerV3: adaptive clipping at 0.3 of each array's norm, LaProp, linear warm-up from 0 over 1,000 updates.

    Source: github.com/danijar/dreamerv3 at e3f0224, ``dreamerv3/configs.yaml``, ``embodied/jax/opt.py``.
    """
    peak, length = check_number("lr", lr), float(check_count("warmup", warmup))

    def schedule(step: jax.Array) -> jax.Array:
        return _as_float(peak) * jnp.minimum(1.0, _as_float(step) / length)

    return optax.chain(_clip_by_parameter_norm(0.3, smallest=1e-3), dialects.dreamer(lr=schedule))


@explain_arguments
def cleanba_impala(updates: int) -> GradientTransformationExtraArgs:
    """IMPALA in Cleanba: torch's RMSProp, global norm 40, learning rate down a staircase over ``updates`` rollouts.

    Each rollout is used for 4 optimizer steps, which share a learning rate of 6e-4 · (1 − rollout/``updates``).

    Source: github.com/vwxyzjn/cleanba at d1f8979, ``cleanba/cleanba_impala.py``.
    """
    rollouts = float(check_count("updates", updates))

    def schedule(step: jax.Array) -> jax.Array:
        return 6e-4 * jnp.maximum(0.0, 1.0 - _as_float(step // 4) / rollouts)

    return optax.chain(_clip_by_global_norm(40.0), rmsprop(lr=schedule, alpha=0.99, eps=0.01))


@explain_arguments
def impala(frames_per_update: int, total_frames: float = 1e9) -> GradientTransformationExtraArgs:
    """IMPALA as published: TensorFlow's RMSProp with epsilon 0.1, learning rate 4.8e-4 linear to 0 over the frames.

    ``frames_per_update`` is batch size × unroll length × action repeats. The code clips no gradients.

    Source: github.com/deepmind/scalable_agent at 6c0c8a7, ``experiment.py``.
    """
    frames = float(check_count("frames_per_update", frames_per_update))
    total = check_number("total_frames", total_frames)
    _check_total("total_frames", total, "frames_per_update", frames)

    def schedule(step: jax.Array) -> jax.Array:
        return 4.8e-4 * (1.0 - jnp.minimum(1.0, _as_float(step) * frames / _as_float(total)))

    return dialects.tensorflow(schedule, decay=0.99, momentum=0.0, epsilon=0.1)


@explain_arguments
def torchbeast(
    total_steps: int = 100_000, unroll_length: int = 80, batch_size: int = 8
) -> GradientTransformationExtraArgs:
    """TorchBeast: torch's RMSProp with eps 0.01, global norm 40, learning rate 4.8e-4 linear to 0.

    ``total_steps`` counts environment steps, of which an update uses ``unroll_length`` · ``batch_size``.

    Source: github.com/facebookresearch/torchbeast at 0af07b0, ``torchbeast/monobeast.py``.
    """
    total = float(check_count("total_steps", total_steps))
    used = float(check_count("unroll_length", unroll_length) * check_count("batch_size", batch_size))
    _check_total("total_steps", total, "unroll_length · batch_size", used)

    def schedule(step: jax.Array) -> jax.Array:
        return 4.8e-4 * (1.0 - jnp.minimum(1.0, _as_float(step) * used / total))

    return optax.chain(_clip_by_global_norm(40.0), rmsprop(lr=schedule, alpha=0.99, eps=0.01))


@explain_arguments
def dqn_nature() -> GradientTransformationExtraArgs:
    """The Nature DQN: centered RMSProp, 0.01 under the root, no momentum, learning rate 2.5e-4.

    Source: V. Mnih et al., Nature 518 (2015), Extended Data Table 1; github.com/deepmind/dqn at 9d9b1d1.
    """
    return dialects.dqn(learning_rate=2.5e-4, squared_gradient_momentum=0.95, min_squared_gradient=0.01)


@explain_arguments
def dqn_dopamine() -> GradientTransformationExtraArgs:
    """DQN in Dopamine (TensorFlow): centered RMSProp with epsilon 1e-5, learning rate 2.5e-4.

    Source: github.com/google/dopamine at 5873f54, ``dopamine/tf/agents/dqn/configs/dqn.gin``.
    """
    return dialects.tensorflow(2.5e-4, decay=0.95, momentum=0.0, epsilon=1e-5, centered=True)


@explain_arguments
def a2c() -> GradientTransformationExtraArgs:
    """A2C, the default of Stable-Baselines3: torch's RMSProp with eps 1e-5, global norm 0.5, learning rate 7e-4.

    Source: github.com/DLR-RM/stable-baselines3 at e05d2db, ``stable_baselines3/a2c/a2c.py``.
    """
    return optax.chain(_clip_by_global_norm(0.5), rmsprop(lr=7e-4, alpha=0.99, eps=1e-5))


@explain_arguments
def a2c_atari() -> GradientTransformationExtraArgs:
    """A2C on Atari in the RL Zoo: as ``a2c``, but TensorFlow's place of eps and starting value.

    Source: github.com/DLR-RM/rl-baselines3-zoo at 22e3ff2, ``hyperparams/a2c.yml``.
    """
    return optax.chain(_clip_by_global_norm(0.5), dialects.stable_baselines3(lr=7e-4, alpha=0.99, eps=1e-5))


@explain_arguments
def qmix() -> GradientTransformationExtraArgs:
    """QMIX in PyMARL: torch's RMSProp with eps 1e-5, global norm 10, learning rate 5e-4.

    Source: github.com/oxwhirl/pymarl at c971afd, ``src/config/default.yaml``, ``src/learners/q_learner.py``.
    """
    return optax.chain(_clip_by_global_norm(10.0), rmsprop(lr=5e-4, alpha=0.99, eps=1e-5))


# --- Language --------------------------------------------------------------------------------------------


@explain_arguments
def dpo(lr: float = 5e-7, warmup: int = 150) -> GradientTransformationExtraArgs:
    """The original DPO: torch's RMSProp and defaults, global norm 10, learning rate 5e-7 after a linear warm-up.

    The first update has 1/151 of the learning rate, the 151st all of it. (The paper's appendix says 1e-6.)

    Source: github.com/eric-mitchell/direct-preference-optimization at f8b8c0f, ``config/config.yaml``, ``trainers.py``.
    """
    peak, length = check_number("lr", lr), float(check_count("warmup", warmup))

    def schedule(step: jax.Array) -> jax.Array:
        return _as_float(peak) * jnp.minimum(1.0, (_as_float(step) + 1.0) / (length + 1.0))

    return optax.chain(_clip_by_global_norm(10.0), rmsprop(lr=schedule))


@explain_arguments
def char_rnn(steps_per_epoch: int) -> GradientTransformationExtraArgs:
    """char-rnn: gradients clipped to ±5 each, alpha 0.95, learning rate 2e-3, × 0.97 per epoch from the 11th on.

    Torch7's ``optim.rmsprop`` is torch's without momentum.

    Source: github.com/karpathy/char-rnn at 6f9487a, ``train.lua``.
    """
    epoch = check_count("steps_per_epoch", steps_per_epoch)

    def schedule(step: jax.Array) -> jax.Array:
        return 2e-3 * 0.97 ** jnp.maximum(0.0, _as_float(step // epoch) - 9.0)

    return optax.chain(_clip_entries(5.0), rmsprop(lr=schedule, alpha=0.95, eps=1e-8))


@explain_arguments
def graves() -> GradientTransformationExtraArgs:
    """Graves' handwriting: centered, 1e-4 under the root, learning rate 1e-4 inside a momentum of 0.9.

    The paper does not say what the averages start from; here it is 0. It clips what is propagated back through the
    outputs (±100) and the cells (±10), which an optimizer cannot do.

    Source: A. Graves, "Generating Sequences With Recurrent Neural Networks", arXiv:1308.0850v5, eq. 38-45.
    """
    return dialects.optax(1e-4, decay=0.95, eps=1e-4, centered=True, momentum=0.9)


# --- Images ----------------------------------------------------------------------------------------------


@explain_arguments
def efficientnet(
    batch_size: int, steps_per_epoch: int, weight_decay_mask: Any | Callable[[optax.Params], Any]
) -> GradientTransformationExtraArgs:
    """EfficientNet: TensorFlow's RMSProp, 0.016 per 256 images, × 0.97 per 2.4 epochs after 5 epochs of warm-up.

    decay 0.9, momentum 0.9, epsilon 1e-3; the staircase is counted from step 0, the warm-up is linear from 0. L2
    decay of 1e-5 for everything outside batch normalization, which ``weight_decay_mask`` selects. The average of the
    weights (0.9999) is left to the caller.

    Source: github.com/tensorflow/tpu at 7dc921f, ``models/official/efficientnet/main.py``, ``utils.py``.
    """
    peak = 0.016 * check_count("batch_size", batch_size) / 256
    epoch = float(check_count("steps_per_epoch", steps_per_epoch))

    def schedule(step: jax.Array) -> jax.Array:
        epochs = _as_float(step) / epoch
        staircase = 0.97 ** jnp.floor(_as_float(step) / (2.4 * epoch))
        return peak * jnp.where(epochs < 5.0, epochs / 5.0, staircase)

    return dialects.timm(  # TensorFlow's RMSProp, with weight decay in it
        lr=schedule, alpha=0.9, eps=1e-3, weight_decay=1e-5, momentum=0.9, weight_decay_mask=weight_decay_mask
    )


@explain_arguments
def mnasnet(
    batch_size: int, steps_per_epoch: int, weight_decay_mask: Any | Callable[[optax.Params], Any]
) -> GradientTransformationExtraArgs:
    """MnasNet: the optimizer of ``efficientnet``, whose code it shares.

    Source: github.com/tensorflow/tpu at 7dc921f, ``models/official/mnasnet/mnas_utils.py``, ``mnasnet_main.py``.
    """
    return efficientnet(batch_size, steps_per_epoch, weight_decay_mask)


@explain_arguments
def mobilenet_v3(steps_per_epoch: int) -> GradientTransformationExtraArgs:
    """MobileNetV3 in torchvision: torch's RMSProp with eps 0.0316 = √1e-3, 0.064 × 0.973 per 2 epochs, L2 of 1e-5.

    For 8 × 128 images a step. A port of TensorFlow's 1e-3 under the root.

    Source: github.com/pytorch/vision at 017e9b9, ``references/classification/README.md``, ``train.py``.
    """
    epoch = check_count("steps_per_epoch", steps_per_epoch)

    def schedule(step: jax.Array) -> jax.Array:
        return 0.064 * 0.973 ** _as_float(step // epoch // 2)

    return rmsprop(lr=schedule, alpha=0.9, eps=0.0316, weight_decay=1e-5, momentum=0.9)


@explain_arguments
def inception_v3(steps_per_epoch: int, momentum: optax.ScalarOrSchedule) -> GradientTransformationExtraArgs:
    """Inception-v3: TensorFlow's RMSProp with epsilon 1.0, decay 0.9, learning rate 0.045 × 0.94 per 2 epochs.

    The paper states no ``momentum`` (its authors' later code has 0.9), and a clipping threshold of 2.0 without its
    kind: to add it, put ``optax.clip_by_global_norm(2.0)`` or ``optax.clip(2.0)`` before.

    Source: C. Szegedy et al., "Rethinking the Inception Architecture", arXiv:1512.00567, section 8.
    """
    epoch = check_count("steps_per_epoch", steps_per_epoch)

    def schedule(step: jax.Array) -> jax.Array:
        return 0.045 * 0.94 ** _as_float(step // epoch // 2)

    return dialects.tensorflow(schedule, decay=0.9, momentum=momentum, epsilon=1.0)


@explain_arguments
def unet() -> GradientTransformationExtraArgs:
    """Pytorch-UNet: torch's RMSProp with momentum 0.999, L2 of 1e-8, global norm 1, learning rate 1e-5.

    torch's ``ReduceLROnPlateau`` (patience 5) that goes with it is ``optax.contrib.reduce_on_plateau``.

    Source: github.com/milesial/Pytorch-UNet at 21d7850, ``train.py``.
    """
    return optax.chain(_clip_by_global_norm(1.0), rmsprop(lr=1e-5, weight_decay=1e-8, momentum=0.999))


@explain_arguments
def wgan_generator() -> GradientTransformationExtraArgs:
    """WGAN, the generator: torch's RMSProp and defaults, learning rate 5e-5.

    Source: github.com/martinarjovsky/WassersteinGAN at f7a01e8, ``main.py``; arXiv:1701.07875, Algorithm 1.
    """
    return rmsprop(lr=5e-5)


@explain_arguments
def wgan_critic() -> GradientTransformationExtraArgs:
    """WGAN, the critic: as the generator, with the weights held in [−0.01, 0.01].

    Source: github.com/martinarjovsky/WassersteinGAN at f7a01e8, ``main.py``; arXiv:1701.07875, Algorithm 1.
    """
    return optax.chain(rmsprop(lr=5e-5), _hold_weights_within(0.01))


# --- Schedules -------------------------------------------------------------------------------------------


def _as_float(number: ArrayLike) -> jax.Array:
    """In JAX's own float, float32 or with ``jax_enable_x64`` float64: the step, an int32, has no room for one more."""
    return jnp.asarray(number, float)


def _check_total(name: str, total: Any, part_name: str, part: float) -> None:
    """Raises if a schedule that ends after ``total`` would be over before the first update is, or never."""
    number = known(total)
    if number is not None and not part <= number < math.inf:
        raise ValueError(
            f"{name} must be finite and at least {part_name}, the {part:g} that one update uses, got {number:g}"
        )


# --- What surrounds the RMSProp: in float32 at least, componentwise or of the absolute value if complex -----


def _clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """As ``optax.clip_by_global_norm``, which makes a float16 gradient of 300 zero: its norm there is infinite."""

    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        norm = _norm([g for g in jax.tree.leaves(updates) if is_trainable(g)])
        excess = jnp.maximum(1.0, norm / limit)
        return jax.tree.map(_in_float32(lambda g: _shorter(g, excess)), updates)

    return optax.stateless(update)


def _clip_by_parameter_norm(clipping: float, smallest: float) -> optax.GradientTransformation:
    """Adaptive gradient clipping with a norm per array; ``optax.adaptive_grad_clip`` has one per output unit."""

    def clip(g: jax.Array, p: jax.Array) -> jax.Array:
        norm = _norm([g])
        longest = clipping * jnp.maximum(smallest, _norm([p]).astype(norm.dtype))
        return _shorter(g, jnp.maximum(1.0, norm / longest))

    return _map_with_params(clip)


def _clip_entries(limit: float) -> optax.GradientTransformation:
    def clip(part: jax.Array) -> jax.Array:
        return jnp.clip(part, -limit, limit)

    return optax.stateless(lambda updates, _: jax.tree.map(_in_float32(lambda g: componentwise(clip, g)), updates))


def _hold_weights_within(limit: float) -> optax.GradientTransformation:
    def hold(u: jax.Array, p: jax.Array) -> jax.Array:
        return jnp.clip(p + u.astype(p.dtype), -limit, limit) - p

    return _map_with_params(lambda u, p: componentwise(hold, u, p))


def _map_with_params(function: Callable[[jax.Array, jax.Array], jax.Array]) -> optax.GradientTransformation:
    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        if params is None:
            raise ValueError("params must be given: call update(updates, state, params)")
        try:
            return jax.tree.map(_in_float32(function), updates, params, is_leaf=lambda u: u is None)
        except ValueError:
            paths = [{jax.tree_util.keystr(path) for path in _paths(tree)} for tree in (updates, params)]
            where = shown(min(paths[0] ^ paths[1], default="their containers"))
            raise ValueError(f"updates must have the structure of params, but they differ in {where}") from None

    return optax.stateless(update)


def _paths(tree: Any) -> list[Any]:
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None)]


def _in_float32(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """``function`` of arrays in float32 at least, rounded to the dtype of the first; anything else is left alone."""

    def rounded(g: Any, *others: Any) -> Any:
        if not all(map(is_trainable, (g, *others))):
            return g
        return function(*map(widened, (g, *others))).astype(jnp.result_type(g))

    return rounded


def _shorter(g: jax.Array, excess: jax.Array) -> jax.Array:
    return componentwise(lambda part: part / excess.astype(part.dtype), g)


def _norm(arrays: Sequence[Any]) -> jax.Array:
    """The Euclidean norm of all entries, where it is above 1e-19: below, its derivative would not be finite."""
    parts = [part for x in map(widened, arrays) for part in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]
    dtype = max((part.dtype for part in parts), key=lambda dtype: jnp.finfo(dtype).bits, default=jnp.dtype(jnp.float32))
    limits = jnp.finfo(dtype)

    def norm(scale: float) -> jax.Array:
        square = sum((jnp.sum((scale * part.astype(dtype)) ** 2) for part in parts), start=jnp.zeros((), dtype))
        return jnp.sqrt(jnp.maximum(limits.tiny, square)) / scale

    direct = norm(1.0)
    # In float32 the square of 1e20 is infinite, that of 2⁻⁹⁶ · 1e20 is not.
    small = 2.0 ** (-3 * limits.maxexp // 4)
    result: jax.Array = jax.lax.cond(jnp.isinf(direct), lambda: norm(small), lambda: direct)
    return result
