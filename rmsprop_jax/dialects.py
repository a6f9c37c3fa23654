"""The other frameworks' RMSProps. Each is a tuple of the same equations.

============================  ===========  ===============  ==========================================
function                      v starts at  denominator      order
============================  ===========  ===============  ==========================================
``rmsprop`` (torch)           0            √v + eps         L2, scale, buffer, lr
:func:`tensorflow`            1            √(v + eps)       scale, lr, buffer
:func:`keras`                 0            √(v + eps)       scale, lr, buffer, decoupled decay
:func:`timm`                  1            √(v + eps)       L2, scale, lr, buffer, or decoupled decay
:func:`stable_baselines3`     1            √(v + eps)       L2, scale, buffer, lr
:func:`dqn`                   0            √(v − m² + eps)  scale, lr
:func:`dreamer`               corrected    √v + eps         scale, averaged steps, lr
:func:`optax`                 0 (choice)   √(v + eps)       scale, −lr, buffer
============================  ===========  ===============  ==========================================

v is the average of g². If ``centered``, the denominator uses the variance v − m² in its place, with m the average of
g. ``translation`` says how far apart two of them are.

Every function has the argument names, the order and the defaults of its source. Its docstring describes only what
differs from :func:`rmsprop_jax.rmsprop`. The following holds for all of them:

- The learning rate, the smoothing constants, eps, the momentum and the weight decay are each a number, a scalar array
  or a schedule, which is read at 0 for the first update.
- The result is an ``optax.GradientTransformationExtraArgs`` whose state is an :class:`rmsprop_jax.RMSPropState`. Where
  a source keeps v although it is centered, its slot is ``square_avg + grad_avg²``.
- Precision, zero, missing, complex and non-finite gradients are handled as there, and the same errors are raised.
"""

import math
from collections.abc import Callable
from typing import Any

import chex
import numpy as np
from jax.typing import DTypeLike
from optax import GradientTransformationExtraArgs, ScalarOrSchedule

from rmsprop_jax.arguments import (
    SMALLEST_NORMAL,
    check_eps,
    check_flag,
    check_number,
    check_number_or_schedule,
    check_smoothing,
    explain_arguments,
    known,
    shown,
)
from rmsprop_jax.equations import (
    Equation,
    add_momentum,
    add_nesterov_momentum,
    apply_caution,
    average,
    average_steps,
    centered_average,
    decay_weights,
    decay_weights_corrected,
    decay_weights_decoupled,
    divide_eps_inside,
    divide_eps_outside,
    keep_gradient,
    negate,
    scale_by_lr,
)
from rmsprop_jax.lift import transformation, unless_zero

__all__ = ["dqn", "dreamer", "keras", "optax", "stable_baselines3", "tensorflow", "timm"]


@explain_arguments
def tensorflow(
    learning_rate: ScalarOrSchedule,
    decay: ScalarOrSchedule = 0.9,
    momentum: ScalarOrSchedule = 0.0,
    epsilon: ScalarOrSchedule = 1e-10,
    *,
    centered: bool = False,
    accumulator_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """``tf.compat.v1.train.RMSPropOptimizer``: starts at 1, epsilon under the root, learning rate in the buffer.

    The rule, where v is the average of g², or its variance if centered::

        v      ← decay · v + (1 − decay) · g²
        buffer ← momentum · buffer + learning_rate · g / √(v + epsilon)
        update ← −buffer

    Python floats are rounded to float32 first, and ``1 − decay`` is taken of the rounded one, as in TensorFlow; what
    comes from NumPy or JAX is not rounded. TensorFlow's slots ``mg`` and ``momentum`` are ``grad_avg`` and
    ``momentum_buffer``; ``rms`` is ``square_avg``, or centered ``square_avg + grad_avg²``.
    ``use_locking`` and ``name`` mean nothing here.

    Args:
      learning_rate: ``lr`` of ``rmsprop``.
      decay: ``alpha`` of ``rmsprop``.
      momentum, centered, accumulator_dtype: as in ``rmsprop``.
      epsilon: added to v, ≥ 0, in the unit of g².

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> optimizer = dialects.tensorflow(learning_rate=0.1, decay=0.75, epsilon=0.0)
      >>> update, state = optimizer.update(jnp.array([2.0]), optimizer.init(jnp.zeros(1)))
      >>> print(state.square_avg, update.round(4))  # 0.75 · 1 + 0.25 · 4; −0.1 · 2/√1.75
      [1.75] [-0.1512]

    Source:
      TensorFlow 2.21, ``tensorflow/python/training/rmsprop.py`` and the kernels ``ApplyRMSProp`` and
      ``ApplyCenteredRMSProp`` in ``tensorflow/core/kernels/training_ops.cc``.
    """
    numbers = {
        "lr": _in_float32(check_number_or_schedule, "learning_rate", learning_rate),
        "alpha": _in_float32(check_smoothing, "decay", decay),
        "momentum": _in_float32(check_number_or_schedule, "momentum", momentum),
        "eps": _in_float32(check_eps, "epsilon", epsilon),
    }
    equations: tuple[Equation, ...] = (
        _average(centered),
        divide_eps_inside,
        scale_by_lr,
        *unless_zero(numbers["momentum"], add_momentum),
        negate,
    )
    return transformation(equations, numbers, initial_scale=1.0, accumulator_dtype=accumulator_dtype)


@explain_arguments
def keras(
    learning_rate: ScalarOrSchedule = 1e-3,
    rho: ScalarOrSchedule = 0.9,
    momentum: ScalarOrSchedule = 0.0,
    epsilon: ScalarOrSchedule = 1e-7,
    centered: bool = False,
    weight_decay: ScalarOrSchedule | None = None,
    *,
    weight_decay_mask: Any = None,
    accumulator_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """``keras.optimizers.RMSprop``: epsilon under the root, learning rate in the buffer, decoupled weight decay.

    The rule, where v is the average of g², or its variance if centered::

        v      ← rho · v + (1 − rho) · g²
        buffer ← momentum · buffer + learning_rate · g / √(v + epsilon)
        update ← −buffer − learning_rate · weight_decay · p

    Keras' slots ``velocity``, ``average_gradient`` and ``momentum`` are ``square_avg`` (centered plus
    ``grad_avg²``), ``grad_avg`` and ``momentum_buffer``. Clipping, averaging of the parameters and accumulation of
    gradients are Optax's (``optax.clip``, ``optax.ema``, ``optax.MultiSteps``).

    Args:
      learning_rate: ``lr`` of ``rmsprop``.
      rho: ``alpha`` of ``rmsprop``.
      momentum, centered, accumulator_dtype: as in ``rmsprop``.
      epsilon: added to v, ≥ 0, in the unit of g².
      weight_decay: decoupled weight decay per step and unit of learning rate, ≥ 0. ``None`` or 0 means none.
      weight_decay_mask: as in ``rmsprop``. (Keras: ``exclude_from_weight_decay``.)

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> optimizer = dialects.keras(learning_rate=0.1, rho=0.75, epsilon=0.0, weight_decay=0.5)
      >>> params = jnp.ones(1)
      >>> update, state = optimizer.update(jnp.array([2.0]), optimizer.init(params), params)
      >>> print(state.square_avg, update)  # 0.25 · 4; −0.1 · 2/√1 − 0.1 · 0.5 · 1
      [1.] [-0.25]

    Source:
      Keras 3, ``keras/src/optimizers/rmsprop.py``; the weight decay in ``base_optimizer.py``.
    """
    numbers = {
        "lr": check_number_or_schedule("learning_rate", learning_rate),
        "alpha": check_smoothing("rho", rho),
        "momentum": check_number_or_schedule("momentum", momentum),
        "eps": check_eps("epsilon", epsilon),
        "weight_decay": check_number_or_schedule("weight_decay", 0.0 if weight_decay is None else weight_decay),
    }
    equations: tuple[Equation, ...] = (
        _average(centered),
        divide_eps_inside,
        scale_by_lr,
        *unless_zero(numbers["momentum"], add_momentum),
        negate,
        *unless_zero(numbers["weight_decay"], decay_weights_decoupled),
    )
    return transformation(equations, numbers, weight_decay_mask=weight_decay_mask, accumulator_dtype=accumulator_dtype)


@explain_arguments
def timm(
    lr: ScalarOrSchedule = 1e-2,
    alpha: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-10,
    weight_decay: ScalarOrSchedule = 0.0,
    momentum: ScalarOrSchedule = 0.0,
    centered: bool = False,
    decoupled_decay: bool = False,
    *,
    corrected_weight_decay: bool = False,
    lr_in_momentum: bool = True,
    caution: bool = False,
    max_lr_snapshot: chex.Numeric | None = None,
    weight_decay_mask: Any = None,
    accumulator_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """``timm.optim.RMSpropTF``: TensorFlow's RMSProp under torch's argument names, with weight decay.

    The rule, where v starts at 1 and is the average of g², or its variance if centered::

        g      ← g + weight_decay · p                       unless decoupled_decay
        v      ← alpha · v + (1 − alpha) · g²
        buffer ← momentum · buffer + lr · g / √(v + eps)    lr after the buffer unless lr_in_momentum
        step   ← buffer                                     · mask / max(mean(mask), 0.001) if caution
        update ← −step                                      − lr · weight_decay · p if decoupled_decay

    The mask is 1 where buffer · g > 0, else 0. Its mean is over a whole parameter, but inside ``jax.shard_map`` over
    the shard at hand. Each part of a complex parameter has its own (timm takes none). Corrected, the decoupled decay is
    lr · (lr / max_lr_snapshot) · weight_decay · p. As in timm, ``caution`` does nothing if ``momentum`` is the number
    0. timm's slots have the names of the fields of :class:`rmsprop_jax.RMSPropState` (``square_avg`` is timm's minus
    ``grad_avg²`` if centered).

    Args:
      lr, alpha, momentum, centered, weight_decay_mask, accumulator_dtype: as in ``rmsprop``.
      eps: added to v, ≥ 0, in the unit of g².
      weight_decay: ≥ 0, an L2 penalty or, if ``decoupled_decay``, decay per step and unit of learning rate.
      decoupled_decay: whether weight decay stays out of the averages.
      corrected_weight_decay: whether decoupled decay falls with the square of ``lr``; an L2 penalty does not.
      lr_in_momentum: whether the current learning rate goes into the buffer.
      caution: whether to drop the entries of the step that go against g, and to scale the others up.
      max_lr_snapshot: > 0, the ``lr`` that timm's optimizer was built with, which its parameter groups hold under this
        name. ``None`` means ``lr``, which must be a Python or NumPy number then if weight decay is corrected.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> optimizer = dialects.timm(lr=0.1, alpha=0.75, eps=0.0, momentum=0.9)
      >>> update, state = optimizer.update(jnp.array([2.0]), optimizer.init(jnp.zeros(1)))
      >>> print(state.momentum_buffer.round(4), update.round(4))  # 0.1 · 2/√1.75
      [0.1512] [-0.1512]

    Source:
      timm 1.0.31, ``timm/optim/rmsprop_tf.py``, after arXiv:2411.16085 (caution) and 2506.02285 (corrected decay).
    """
    decoupled = check_flag("decoupled_decay", decoupled_decay)
    corrected = check_flag("corrected_weight_decay", corrected_weight_decay) and decoupled
    numbers = {
        "lr": check_number_or_schedule("lr", lr),
        "alpha": check_smoothing("alpha", alpha),
        "eps": check_eps("eps", eps),
        "weight_decay": check_number_or_schedule("weight_decay", weight_decay),
        "momentum": check_number_or_schedule("momentum", momentum),
    }
    numbers["max_lr"] = _max_lr(max_lr_snapshot, numbers["lr"], corrected)
    decay = (decay_weights_corrected if corrected else decay_weights_decoupled) if decoupled else decay_weights
    decays = unless_zero(numbers["weight_decay"], decay)
    step = unless_zero(numbers["momentum"], add_momentum)
    cautious = check_flag("caution", caution) and step != ()
    step = (*step, apply_caution) if cautious else step
    equations: tuple[Equation, ...] = (
        *(() if decoupled else decays),
        *((keep_gradient,) if cautious else ()),
        _average(centered),
        divide_eps_inside,
        *((scale_by_lr, *step) if check_flag("lr_in_momentum", lr_in_momentum) else (*step, scale_by_lr)),
        negate,
        *(decays if decoupled else ()),
    )
    return transformation(
        equations, numbers, initial_scale=1.0, weight_decay_mask=weight_decay_mask, accumulator_dtype=accumulator_dtype
    )


@explain_arguments
def stable_baselines3(
    lr: ScalarOrSchedule = 1e-2,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    momentum: ScalarOrSchedule = 0.0,
    centered: bool = False,
    *,
    weight_decay_mask: Any = None,
    accumulator_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Stable-Baselines3's ``RMSpropTFLike``: torch's RMSprop that starts at 1, with eps under the root.

    The rule, where v is the average of g², or its variance if centered::

        g      ← g + weight_decay · p
        v      ← alpha · v + (1 − alpha) · g²
        buffer ← momentum · buffer + g / √(v + eps)
        update ← −lr · buffer

    The slots have the names of the fields of :class:`rmsprop_jax.RMSPropState` (``square_avg`` is SB3's minus
    ``grad_avg²`` if centered).

    Args:
      lr, alpha, weight_decay, momentum, centered, weight_decay_mask, accumulator_dtype: as in ``rmsprop``.
      eps: added to v, ≥ 0, in the unit of g².

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> optimizer = dialects.stable_baselines3(lr=0.1, alpha=0.75, eps=0.0, momentum=0.9)
      >>> update, state = optimizer.update(jnp.array([2.0]), optimizer.init(jnp.zeros(1)))
      >>> print(state.momentum_buffer.round(4), update.round(4))  # 2/√1.75
      [1.5119] [-0.1512]

    Source:
      Stable-Baselines3 2.x, ``stable_baselines3/common/sb2_compat/rmsprop_tf_like.py``.
    """
    numbers = {
        "lr": check_number_or_schedule("lr", lr),
        "alpha": check_smoothing("alpha", alpha),
        "eps": check_eps("eps", eps),
        "weight_decay": check_number_or_schedule("weight_decay", weight_decay),
        "momentum": check_number_or_schedule("momentum", momentum),
    }
    equations: tuple[Equation, ...] = (
        *unless_zero(numbers["weight_decay"], decay_weights),
        _average(centered),
        divide_eps_inside,
        *unless_zero(numbers["momentum"], add_momentum),
        scale_by_lr,
        negate,
    )
    return transformation(
        equations, numbers, initial_scale=1.0, weight_decay_mask=weight_decay_mask, accumulator_dtype=accumulator_dtype
    )


@explain_arguments
def dqn(
    learning_rate: ScalarOrSchedule = 2.5e-4,
    squared_gradient_momentum: ScalarOrSchedule = 0.95,
    min_squared_gradient: ScalarOrSchedule = 0.01,
    *,
    accumulator_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """The RMSProp of the Nature DQN: centered, with a large epsilon under the root and no momentum.

    The rule, with a = ``squared_gradient_momentum``::

        m      ← a · m + (1 − a) · g
        v      ← a · v + (1 − a) · g²
        update ← −learning_rate · g / √(v − m² + min_squared_gradient)

    The paper's table has a "gradient momentum" of 0.95 beside the "squared gradient momentum" of 0.95: the decay
    of m, which the code makes one number with that of v. It is not a momentum of the steps. ``square_avg`` holds
    v − m², and ``grad_avg`` m.

    Args:
      learning_rate: ``lr`` of ``rmsprop``.
      squared_gradient_momentum: smoothing constant of both averages, 0 ≤ a < 1.
      min_squared_gradient: added to the variance, ≥ 0, in the unit of g².
      accumulator_dtype: as in ``rmsprop``.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> optimizer = dialects.dqn(learning_rate=0.1, squared_gradient_momentum=0.5, min_squared_gradient=0.0)
      >>> update, state = optimizer.update(jnp.array([2.0]), optimizer.init(jnp.zeros(1)))
      >>> print(state.square_avg, update)  # 0.5 · 4 − (0.5 · 2)²; −0.1 · 2/√1
      [1.] [-0.2]

    Source:
      V. Mnih et al., "Human-level control through deep reinforcement learning", Nature 518 (2015), Extended Data
      Table 1; github.com/deepmind/dqn at 9d9b1d1, ``dqn/NeuralQLearner.lua`` lines 256-277.
    """
    numbers = {
        "lr": check_number_or_schedule("learning_rate", learning_rate),
        "alpha": check_smoothing("squared_gradient_momentum", squared_gradient_momentum),
        "eps": check_eps("min_squared_gradient", min_squared_gradient),
    }
    equations: tuple[Equation, ...] = (centered_average, divide_eps_inside, scale_by_lr, negate)
    return transformation(equations, numbers, accumulator_dtype=accumulator_dtype)


@explain_arguments
def dreamer(
    lr: ScalarOrSchedule = 4e-5,
    beta2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-20,
    beta1: ScalarOrSchedule = 0.9,
    *,
    accumulator_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """DreamerV3's optimizer (LaProp): RMSProp first, then an average of the scaled steps, both bias-corrected.

    The rule::

        v      ← beta2 · v + (1 − beta2) · g²
        step   ← g / (√(v / (1 − beta2ᵗ)) + eps)
        m      ← beta1 · m + (1 − beta1) · step
        update ← −lr · m / (1 − beta1ᵗ)

    ``square_avg`` and ``momentum_buffer`` hold the corrected averages, v / (1 − beta2ᵗ) and m / (1 − beta1ᵗ).
    What DreamerV3 puts around it, adaptive gradient clipping before and a warm-up, is in ``recipes.dreamer_v3``.

    Args:
      lr, eps, accumulator_dtype: as in ``rmsprop``.
      beta2: ``alpha`` of ``rmsprop``, the smoothing constant of the squared gradient.
      beta1: smoothing constant of the steps, 0 ≤ beta1 < 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> optimizer = dialects.dreamer(lr=0.1)
      >>> update, state = optimizer.update(jnp.array([2.0, -1e-9]), optimizer.init(jnp.zeros(2)))
      >>> print(update.round(6))  # the first step has the size of the learning rate, whatever the gradient
      [-0.1  0.1]

    Source:
      D. Hafner et al., "Mastering diverse control tasks through world models" (2025); github.com/danijar/dreamerv3
      at e3f0224, ``embodied/jax/opt.py``; L. Ziyin et al., "LaProp" (arXiv:2002.04839).
    """
    numbers = {
        "lr": check_number_or_schedule("lr", lr),
        "alpha": check_smoothing("beta2", beta2),
        "eps": check_eps("eps", eps),
        "momentum": check_smoothing("beta1", beta1),
    }
    equations: tuple[Equation, ...] = (average, divide_eps_outside, average_steps, scale_by_lr, negate)
    return transformation(equations, numbers, bias_correction=True, accumulator_dtype=accumulator_dtype)


@explain_arguments
def optax(
    learning_rate: ScalarOrSchedule,
    decay: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-8,
    initial_scale: chex.Numeric = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: ScalarOrSchedule | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    accumulator_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """``optax.rmsprop``: epsilon under the root, the negative learning rate in the buffer, Nesterov if wanted.

    The rule, where v is the average of g², or its variance if centered::

        v      ← decay · v + (1 − decay) · g²
        step   ← −learning_rate · g / √(v + eps)         / (√v + eps) unless eps_in_sqrt
        buffer ← momentum · buffer + step
        update ← buffer, or momentum · buffer + step if nesterov

    ``momentum_buffer`` is Optax's ``trace``, ``grad_avg`` its ``mu``, and ``square_avg`` its ``nu`` (minus ``mu²`` if
    centered; the corrected averages with ``bias_correction``).

    Args:
      learning_rate: ``lr`` of ``rmsprop``.
      decay: ``alpha`` of ``rmsprop``.
      eps: ≥ 0, added under the root in the unit of g², or to the root in the unit of g.
      initial_scale: what v starts from, ≥ 0.
      eps_in_sqrt: whether ``eps`` goes under the root.
      centered, accumulator_dtype: as in ``rmsprop``.
      momentum: as in ``rmsprop``. ``None`` means 0.
      nesterov: whether the update looks one step ahead with the buffer.
      bias_correction: divide the averages by 1 − decayᵗ. Not together with an ``initial_scale`` (Optax inflates it).

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> optimizer = dialects.optax(learning_rate=0.1, decay=0.75, eps=0.0, momentum=0.9)
      >>> update, state = optimizer.update(jnp.array([2.0]), optimizer.init(jnp.zeros(1)))
      >>> print(state.momentum_buffer, update)  # −0.1 · 2/√1
      [-0.2] [-0.2]

    Source:
      Optax 0.2.8, ``optax.rmsprop``, ``optax.scale_by_rms``, ``optax.scale_by_stddev``, ``optax.trace``.
    """
    numbers = {
        "lr": check_number_or_schedule("learning_rate", learning_rate),
        "alpha": check_smoothing("decay", decay),
        "eps": check_eps("eps", eps),
        "momentum": check_number_or_schedule("momentum", 0.0 if momentum is None else momentum),
    }
    equations: tuple[Equation, ...] = (
        _average(centered),
        divide_eps_inside if check_flag("eps_in_sqrt", eps_in_sqrt) else divide_eps_outside,
        scale_by_lr,
        negate,
        *unless_zero(numbers["momentum"], add_nesterov_momentum if check_flag("nesterov", nesterov) else add_momentum),
    )
    return transformation(
        equations,
        numbers,
        initial_scale=check_number("initial_scale", initial_scale),
        bias_correction=check_flag("bias_correction", bias_correction),
        accumulator_dtype=accumulator_dtype,
    )


def _in_float32(check: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    """``value``, checked; a Python float as TensorFlow holds it."""
    number = check(name, value)
    return check(f"{name} in float32", float(np.float32(number))) if type(value) is float else number


def _max_lr(max_lr_snapshot: Any, lr: Any, corrected: bool) -> Any:
    """What corrected weight decay divides by; without it anything that timm's file may hold."""
    max_lr = lr if max_lr_snapshot is None else check_number("max_lr_snapshot", max_lr_snapshot)
    is_fixed = max_lr_snapshot is not None or isinstance(lr, float | np.ndarray)
    number = known(max_lr)
    if corrected and not (is_fixed and (number is None or SMALLEST_NORMAL <= number < math.inf)):
        required = "> 0 and finite" if is_fixed else "given where lr is a schedule or a JAX array"
        raise ValueError(
            f"max_lr_snapshot must be {required} with corrected_weight_decay, got {shown(max_lr_snapshot)} for "
            f"lr={shown(lr)}; give the lr that timm's optimizer was built with, the peak of its schedule"
        )
    return max_lr


def _average(centered: Any) -> Equation:
    return centered_average if check_flag("centered", centered) else average
