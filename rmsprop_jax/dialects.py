"""The other frameworks' RMSProps: each one an ordering of the equations in ``transform``.

Every function has the argument names, the order and the defaults of its source. Every number but ``initial_scale`` may
be a schedule (read at 0 for the first update). It returns an ``optax.GradientTransformationExtraArgs`` whose state is
an :class:`rmsprop_jax.RMSPropState`. What :func:`rmsprop_jax.rmsprop` promises about precision,
missing, zero and complex gradients, and about errors, holds for all of them. Three things tell them apart:

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

(v is the average of g², or centered v − m².) How far apart two of them are can be known beforehand, see
:func:`translate`: eps_out = √eps_in keeps the two denominators within a factor [1, √2] for every v; an average
that starts at 1 differs from one that starts at 0 by exactly alphaᵗ; and at a constant learning rate a buffer
with the learning rate inside is lr times the other, so that the order matters only when lr changes.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from optax import GradientTransformationExtraArgs, ScalarOrSchedule

from rmsprop_jax.arguments import (
    check_eps,
    check_flag,
    check_number,
    check_number_or_schedule,
    check_numbers,
    check_smoothing,
    explain_arguments,
    known,
    shown,
)
from rmsprop_jax.equations import (
    Equation,
    add_momentum,
    add_nesterov_momentum,
    average,
    average_steps,
    centered_average,
    decay_weights,
    decay_weights_decoupled,
    divide_eps_inside,
    divide_eps_outside,
    negate,
    scale_by_lr,
    unless_zero,
)
from rmsprop_jax.lift import transformation
from rmsprop_jax.state import RMSPropState
from rmsprop_jax.transform import rmsprop


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

    The rule, where v is the average of g², or centered its variance::

        v      ← decay · v + (1 − decay) · g²
        buffer ← momentum · buffer + learning_rate · g / √(v + epsilon)
        update ← −buffer

    Python floats are rounded to float32 first, and ``1 − decay`` is taken of the rounded one, as in TensorFlow; what
    comes from NumPy or JAX is not rounded. TensorFlow's slots ``mg`` and ``momentum`` are ``grad_avg`` and
    ``momentum_buffer``; ``rms`` is ``square_avg``, or centered ``square_avg + grad_avg²``.
    ``use_locking`` and ``name`` mean nothing here.

    Args:
      learning_rate: a number ≥ 0, a scalar array or a schedule, as every number here.
      decay: smoothing constant, 0 ≤ decay < 1.
      momentum: decay of the buffer, ≥ 0; the number 0 means that there is none.
      epsilon: added to v, ≥ 0, in the unit of g².
      centered: divide by the standard deviation of the gradient instead of its root mean square.
      accumulator_dtype: see :func:`rmsprop_jax.scale_by_rmsprop`.

    Returns:
      A gradient transformation whose state is an :class:`rmsprop_jax.RMSPropState`.

    Raises:
      ValueError, TypeError: as :func:`rmsprop_jax.rmsprop`.

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

    The rule, where v is the average of g², or centered its variance::

        v      ← rho · v + (1 − rho) · g²
        buffer ← momentum · buffer + learning_rate · g / √(v + epsilon)
        update ← −buffer − learning_rate · weight_decay · p

    Keras' slots ``velocity``, ``average_gradient`` and ``momentum`` are ``square_avg`` (centered plus
    ``grad_avg²``), ``grad_avg`` and ``momentum_buffer``. Clipping, averaging of the parameters and accumulation of
    gradients are Optax's (``optax.clip``, ``optax.ema``, ``optax.MultiSteps``).

    Args:
      learning_rate: a number ≥ 0, a scalar array or a schedule, as every number here.
      rho: smoothing constant, 0 ≤ rho < 1.
      momentum: decay of the buffer, ≥ 0; the number 0 means that there is none.
      epsilon: added to v, ≥ 0, in the unit of g².
      centered: divide by the standard deviation of the gradient instead of its root mean square.
      weight_decay: decoupled weight decay per step and unit of learning rate, ≥ 0; ``None`` or 0 for none.
      weight_decay_mask: which parameters decay; see :func:`rmsprop_jax.rmsprop`. (Keras:
        ``exclude_from_weight_decay``.)
      accumulator_dtype: see :func:`rmsprop_jax.scale_by_rmsprop`.

    Returns:
      A gradient transformation whose state is an :class:`rmsprop_jax.RMSPropState`.

    Raises:
      ValueError, TypeError: as :func:`rmsprop_jax.rmsprop`.

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
    lr_in_momentum: bool = True,
    weight_decay_mask: Any = None,
    accumulator_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """``timm.optim.RMSpropTF``: TensorFlow's RMSProp under torch's argument names, with weight decay.

    The rule, where v starts at 1 and is the average of g², or centered its variance::

        g      ← g + weight_decay · p                       unless decoupled_decay
        v      ← alpha · v + (1 − alpha) · g²
        buffer ← momentum · buffer + lr · g / √(v + eps)    lr after the buffer unless lr_in_momentum
        update ← −buffer                                    − lr · weight_decay · p if decoupled_decay

    timm's slots have the names of the fields of :class:`rmsprop_jax.RMSPropState` (``square_avg`` is timm's minus
    ``grad_avg²`` if centered). timm's ``caution`` and ``corrected_weight_decay`` are not there.

    Args:
      lr: learning rate, a number ≥ 0, a scalar array or a schedule, as every number here.
      alpha: smoothing constant, 0 ≤ alpha < 1.
      eps: added to v, ≥ 0, in the unit of g².
      weight_decay: ≥ 0, an L2 penalty or, if ``decoupled_decay``, decay per step and unit of learning rate.
      momentum: decay of the buffer, ≥ 0; the number 0 means that there is none.
      centered: divide by the standard deviation of the gradient instead of its root mean square.
      decoupled_decay: whether weight decay stays out of the averages.
      lr_in_momentum: whether the learning rate of the moment goes into the buffer.
      weight_decay_mask: which parameters decay; see :func:`rmsprop_jax.rmsprop`.
      accumulator_dtype: see :func:`rmsprop_jax.scale_by_rmsprop`.

    Returns:
      A gradient transformation whose state is an :class:`rmsprop_jax.RMSPropState`.

    Raises:
      ValueError, TypeError: as :func:`rmsprop_jax.rmsprop`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> optimizer = dialects.timm(lr=0.1, alpha=0.75, eps=0.0, momentum=0.9)
      >>> update, state = optimizer.update(jnp.array([2.0]), optimizer.init(jnp.zeros(1)))
      >>> print(state.momentum_buffer.round(4), update.round(4))  # 0.1 · 2/√1.75
      [0.1512] [-0.1512]

    Source:
      timm 1.0, ``timm/optim/rmsprop_tf.py``.
    """
    numbers = {
        "lr": check_number_or_schedule("lr", lr),
        "alpha": check_smoothing("alpha", alpha),
        "eps": check_eps("eps", eps),
        "weight_decay": check_number_or_schedule("weight_decay", weight_decay),
        "momentum": check_number_or_schedule("momentum", momentum),
    }
    decoupled = check_flag("decoupled_decay", decoupled_decay)
    buffer = unless_zero(numbers["momentum"], add_momentum)
    equations: tuple[Equation, ...] = (
        *(() if decoupled else unless_zero(numbers["weight_decay"], decay_weights)),
        _average(centered),
        divide_eps_inside,
        *((scale_by_lr, *buffer) if check_flag("lr_in_momentum", lr_in_momentum) else (*buffer, scale_by_lr)),
        negate,
        *(unless_zero(numbers["weight_decay"], decay_weights_decoupled) if decoupled else ()),
    )
    return transformation(
        equations,
        numbers,
        initial_scale=1.0,
        weight_decay_mask=weight_decay_mask,
        accumulator_dtype=accumulator_dtype,
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

    The rule, where v is the average of g², or centered its variance::

        g      ← g + weight_decay · p
        v      ← alpha · v + (1 − alpha) · g²
        buffer ← momentum · buffer + g / √(v + eps)
        update ← −lr · buffer

    The slots have the names of the fields of :class:`rmsprop_jax.RMSPropState` (``square_avg`` is SB3's minus
    ``grad_avg²`` if centered).

    Args:
      lr: learning rate, a number ≥ 0, a scalar array or a schedule, as every number here.
      alpha: smoothing constant, 0 ≤ alpha < 1.
      eps: added to v, ≥ 0, in the unit of g².
      weight_decay: L2 penalty, ≥ 0.
      momentum: decay of the buffer, ≥ 0; the number 0 means that there is none.
      centered: divide by the standard deviation of the gradient instead of its root mean square.
      weight_decay_mask: which parameters decay; see :func:`rmsprop_jax.rmsprop`.
      accumulator_dtype: see :func:`rmsprop_jax.scale_by_rmsprop`.

    Returns:
      A gradient transformation whose state is an :class:`rmsprop_jax.RMSPropState`.

    Raises:
      ValueError, TypeError: as :func:`rmsprop_jax.rmsprop`.

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
        equations,
        numbers,
        initial_scale=1.0,
        weight_decay_mask=weight_decay_mask,
        accumulator_dtype=accumulator_dtype,
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
    of m, which the code makes one number with that of v. It is no momentum of the steps. ``square_avg`` holds
    v − m², and ``grad_avg`` m.

    Args:
      learning_rate: a number ≥ 0, a scalar array or a schedule, as every number here.
      squared_gradient_momentum: smoothing constant of both averages, 0 ≤ a < 1.
      min_squared_gradient: added to the variance, ≥ 0, in the unit of g².
      accumulator_dtype: see :func:`rmsprop_jax.scale_by_rmsprop`.

    Returns:
      A gradient transformation whose state is an :class:`rmsprop_jax.RMSPropState`.

    Raises:
      ValueError, TypeError: as :func:`rmsprop_jax.rmsprop`.

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
      lr: learning rate, a number ≥ 0, a scalar array or a schedule, as every number here.
      beta2: smoothing constant of the squared gradient, 0 ≤ beta2 < 1.
      eps: added to the root, ≥ 0, in the unit of the gradient.
      beta1: smoothing constant of the steps, 0 ≤ beta1 < 1.
      accumulator_dtype: see :func:`rmsprop_jax.scale_by_rmsprop`.

    Returns:
      A gradient transformation whose state is an :class:`rmsprop_jax.RMSPropState`.

    Raises:
      ValueError, TypeError: as :func:`rmsprop_jax.rmsprop`.

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
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: ScalarOrSchedule | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    accumulator_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """``optax.rmsprop``: epsilon under the root, the negative learning rate in the buffer, Nesterov if wanted.

    The rule, where v is the average of g², or centered its variance::

        v      ← decay · v + (1 − decay) · g²
        step   ← −learning_rate · g / √(v + eps)         / (√v + eps) unless eps_in_sqrt
        buffer ← momentum · buffer + step
        update ← buffer, or momentum · buffer + step if nesterov

    ``momentum_buffer`` is Optax's ``trace``, ``grad_avg`` its ``mu``, and ``square_avg`` its ``nu`` (minus ``mu²`` if
    centered; the corrected averages with ``bias_correction``).

    Args:
      learning_rate: a number ≥ 0, a scalar array or a schedule, as every number here.
      decay: smoothing constant, 0 ≤ decay < 1.
      eps: ≥ 0, added under the root in the unit of g², or to the root in the unit of g.
      initial_scale: what v starts from, ≥ 0.
      eps_in_sqrt: whether ``eps`` goes under the root.
      centered: divide by the standard deviation of the gradient instead of its root mean square.
      momentum: decay of the buffer, ≥ 0; ``None`` or the number 0 means that there is none.
      nesterov: look one step ahead with the buffer.
      bias_correction: divide the averages by 1 − decayᵗ. Not together with an ``initial_scale`` (Optax inflates it).
      accumulator_dtype: see :func:`rmsprop_jax.scale_by_rmsprop`.

    Returns:
      A gradient transformation whose state is an :class:`rmsprop_jax.RMSPropState`.

    Raises:
      ValueError, TypeError: as :func:`rmsprop_jax.rmsprop`.

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


def _average(centered: Any) -> Equation:
    return centered_average if check_flag("centered", centered) else average


# --- From one dialect to another -------------------------------------------------------------------------


class Dialect(NamedTuple):
    """One row of the table of dialects.

    Attributes:
      build: the function that makes the transformation.
      framework: the class whose RMSProp it is.
      names: what this dialect calls each of the things that a dialect may let its user choose.
      fixed: the things that it does not let them choose.
    """

    build: Callable[..., GradientTransformationExtraArgs]
    framework: str
    names: Mapping[str, str]
    fixed: Mapping[str, Any]


_NAMES = {name: name for name in ("lr", "alpha", "eps", "momentum", "centered")}
_TORCH_NAMES = _NAMES | {"weight_decay": "weight_decay"}
_TORCH_FIXED = {"decoupled_decay": False, "buffer_sign": 1}

# The names are the arguments of the dialects; torch is ``rmsprop_jax.rmsprop`` itself.
DIALECTS: Mapping[str, Dialect] = {
    "torch": Dialect(
        rmsprop,
        "torch.optim.RMSprop",
        _TORCH_NAMES,
        {"eps_in_sqrt": False, "initial_scale": 0.0, "lr_in_buffer": False, **_TORCH_FIXED},
    ),
    "tensorflow": Dialect(
        tensorflow,
        "tf.compat.v1.train.RMSPropOptimizer",
        _NAMES | {"lr": "learning_rate", "alpha": "decay", "eps": "epsilon"},
        {"eps_in_sqrt": True, "initial_scale": 1.0, "lr_in_buffer": True, "weight_decay": 0.0, **_TORCH_FIXED},
    ),
    "keras": Dialect(
        keras,
        "keras.optimizers.RMSprop",
        _TORCH_NAMES | {"lr": "learning_rate", "alpha": "rho", "eps": "epsilon"},
        {"eps_in_sqrt": True, "initial_scale": 0.0, "lr_in_buffer": True, "decoupled_decay": True, "buffer_sign": 1},
    ),
    "timm": Dialect(
        timm,
        "timm.optim.RMSpropTF",
        {**_TORCH_NAMES, "decoupled_decay": "decoupled_decay", "lr_in_buffer": "lr_in_momentum"},
        {"eps_in_sqrt": True, "initial_scale": 1.0, "buffer_sign": 1},
    ),
    "stable_baselines3": Dialect(
        stable_baselines3,
        "stable_baselines3.common.sb2_compat.rmsprop_tf_like.RMSpropTFLike",
        _TORCH_NAMES,
        {"eps_in_sqrt": True, "initial_scale": 1.0, "lr_in_buffer": False, **_TORCH_FIXED},
    ),
    "optax": Dialect(
        optax,
        "optax.rmsprop",
        _NAMES
        | {"lr": "learning_rate", "alpha": "decay", "eps_in_sqrt": "eps_in_sqrt", "initial_scale": "initial_scale"},
        {"lr_in_buffer": True, "weight_decay": 0.0, "decoupled_decay": False, "buffer_sign": -1},
    ),
}


class Translation(NamedTuple):
    """A setting of one dialect in the words of another, and what does not carry over.

    Attributes:
      target: the dialect it was translated into, a key of :data:`DIALECTS`.
      arguments: all of the target's arguments that say something, none left to a default.
      notes: a sentence for each thing that is not exactly equal; empty if the two are the same optimizer.
      before, after: both settings in neutral terms, by name: ``lr``, ``alpha``, ``eps``, ``momentum``, ``centered``,
        ``weight_decay``, ``decoupled_decay``, ``eps_in_sqrt``, ``initial_scale``, ``lr_in_buffer``, ``buffer_sign``.
        Numbers are floats here; arrays and schedules are what they were.
    """

    target: str
    arguments: dict[str, Any]
    notes: tuple[str, ...]
    before: dict[str, Any]
    after: dict[str, Any]

    def build(self) -> GradientTransformationExtraArgs:
        """The target's transformation."""
        return DIALECTS[self.target].build(**self.arguments)

    def step_ratio(self, gradient: ArrayLike, step: ArrayLike) -> np.ndarray:
        """How many times as large as the source's the target's steps will be.

        For gradients of root mean square ``gradient`` and mean 0, at update number ``step`` (from 1), both float and
        broadcast against each other. Momentum and the learning rate, the same in both, are left out::

            v     = alphaᵗ · initial_scale + (1 − alphaᵗ) · gradient²
            ratio = denominator(v) of the source / denominator(v) of the target

        A schedule of eps is read at ``step`` − 1, as the update reads it.

        Raises:
          ValueError: if ``gradient`` is negative, ``step`` below 1, or alpha a schedule.
          TypeError: if one of them is no real number, or a number of the setting is a tracer.
        """
        sizes, steps = check_numbers("gradient", gradient, at_least=0.0), check_numbers("step", step, at_least=1.0)

        def denominator(setting: dict[str, Any]) -> np.ndarray:
            eps = _eps_at(setting["eps"], steps)
            alpha, start = (_known(name, setting[name]) for name in ("alpha", "initial_scale"))
            remembered = alpha**steps
            v = remembered * start + (1 - remembered) * sizes**2
            return np.asarray(np.sqrt(v + eps) if setting["eps_in_sqrt"] else np.sqrt(v) + eps)

        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            before, after = denominator(self.before), denominator(self.after)
            return np.where(before == after, 1.0, before / after)  # 0 / 0 and ∞ / ∞ too

    def convert_state(self, state: RMSPropState) -> RMSPropState:
        """The target's state for a run that has come to ``state`` in the source's dialect.

        The averages mean the same in both. A momentum buffer changes its unit where only one of the two has the
        learning rate in it: that is exact as long as the learning rate has been constant.

        Raises:
          ValueError: if the buffer changes its unit and the learning rate is a schedule, 0 or infinite; or if ``state``
            belongs to another setting.
          TypeError: if ``state`` is no :class:`rmsprop_jax.RMSPropState`, or its buffer is not floating or complex.
        """
        _check_state(state, self.before)
        factor: Any = self.after["buffer_sign"] * self.before["buffer_sign"] * 1.0
        if state.momentum_buffer is not None and self.before["lr_in_buffer"] != self.after["lr_in_buffer"]:
            lr = _unit_of_buffer(self.before["lr"])
            factor = factor / lr if self.before["lr_in_buffer"] else factor * lr

        def convert(path: Any, buffer: Any) -> jax.Array:
            if not jnp.issubdtype(getattr(buffer, "dtype", bool), jnp.inexact):
                what = f"state.momentum_buffer{jax.tree_util.keystr(path)}"
                raise TypeError(f"{what} must be a floating or complex array, got {shown(buffer)}")
            return _scaled(jnp.asarray(buffer), factor)

        return state._replace(momentum_buffer=jax.tree_util.tree_map_with_path(convert, state.momentum_buffer))


def translate(source: str, target: str, **arguments: Any) -> Translation:
    """The nearest setting of dialect ``target`` to ``arguments`` in dialect ``source``, and how near it is.

    Where eps changes its place, ``eps_out = √eps_in`` (and ``eps_in = eps_out²``) keeps the two denominators within
    a factor [1, √2] of each other for every v. Where the averages start from different values, they differ by
    exactly alphaᵗ times the difference. Where only one has the learning rate in its momentum buffer, the two are
    the same at a constant learning rate.

    A schedule is translated into a schedule, an array into an array, and inside ``jit`` a tracer into a tracer.

    Args:
      source: the dialect that the setting is in, a key of :data:`DIALECTS`.
      target: the dialect to say it in.
      **arguments: arguments of the source in its own names; those left out have the source's defaults.

    Returns:
      A :class:`Translation`.

    Raises:
      ValueError: if a dialect is unknown, a number is not one that the source takes, the target has no such weight
        decay, or float32 cannot hold the square of eps where that goes under the root.
      TypeError: if the source has no such argument or needs one that is missing.

    Example:
      >>> from rmsprop_jax import dialects
      >>> port = dialects.translate("tensorflow", "torch", learning_rate=0.016, momentum=0.9, epsilon=1e-3)
      >>> print(port.arguments)  # doctest: +ELLIPSIS
      {'lr': 0.016, 'alpha': 0.9, 'eps': 0.0316..., 'momentum': 0.9, 'centered': False, 'weight_decay': 0.0}
      >>> for note in port.notes:
      ...     print("-", note)
      - eps is outside the root: the denominators are within a factor 1 to √2 of each other
      - the average starts from 0.0 and not from 1.0: they differ by alphaᵗ, 1 % after 44 steps; compare that with v
      - the learning rate is not in the momentum buffer: the same as long as it is constant
      >>> print(port.step_ratio(gradient=1e-3, step=[1, 400]).round(1))  # too large at first
      [29.7  1. ]
    """
    for name, value in (("source", source), ("target", target)):
        if not isinstance(value, str) or value not in DIALECTS:
            raise ValueError(f"{name} must be one of {', '.join(DIALECTS)}, got {shown(value)}")
    before = _neutral(DIALECTS[source], arguments)
    words = DIALECTS[target]
    after = before | dict(words.fixed)
    if after["eps_in_sqrt"] != before["eps_in_sqrt"]:
        after["eps"] = _moved_eps(DIALECTS[source].names["eps"], before["eps"], after["eps_in_sqrt"])
    has_decay = "weight_decay" in words.names and after["decoupled_decay"] == before["decoupled_decay"]
    if not has_decay and known(before["weight_decay"]) != 0:
        kind = "decoupled weight decay" if before["decoupled_decay"] else "L2 weight decay"
        raise ValueError(
            f"weight_decay must be 0, since target {target} has no {kind}, got {shown(before['weight_decay'])}"
        )
    port = Translation(target, {words.names[n]: after[n] for n in words.names}, _notes(before, after), before, after)
    port.build()  # the target may take fewer numbers than the source
    return port


def _neutral(dialect: Dialect, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All of a setting in neutral terms, with the numbers as the gate makes them."""
    dialect.build(**arguments)  # knows its arguments, and what float32 makes of them
    for name in arguments:
        if name not in dialect.names.values():
            raise TypeError(
                f"translate does not know {name}={shown(arguments[name])} of {dialect.framework}; leave it out, and "
                "give it to the target yourself if that has it"
            )
    bound = inspect.signature(dialect.build).bind(**arguments)
    bound.apply_defaults()
    given = {name: bound.arguments[own] for name, own in dialect.names.items()} | dict(dialect.fixed)
    given |= {name: 0.0 for name in ("momentum", "weight_decay") if given[name] is None}
    checked = {
        name: _CHECKS.get(name, check_number_or_schedule)(own, given[name]) for name, own in dialect.names.items()
    }
    return given | checked


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("centered", "decoupled_decay", "eps_in_sqrt", "lr_in_buffer"), check_flag),
    "alpha": check_smoothing,
    "eps": check_eps,
    "initial_scale": check_number,
}
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def _moved_eps(name: str, eps: Any, into_root: bool) -> Any:
    """eps² for an eps that goes under the root, √eps for one that comes out; of a schedule the schedule of that."""
    if callable(eps):
        return functools.partial(_read_moved_eps, name, eps, into_root)
    number = known(eps)
    if into_root and number not in (None, 0.0, math.inf) and not _SMALLEST <= number * number <= _LARGEST:
        raise ValueError(
            f"{name} must be 0 or from 1.1e-19 to 1.8e19 where its square goes under the root, got {number:g}; float32 "
            "takes the square of a smaller number for 0 and that of a larger one for infinite"
        )
    if isinstance(eps, jax.Array):
        wide = jnp.asarray(eps, jnp.float64 if eps.dtype == jnp.float64 else jnp.float32)
        return wide * wide if into_root else jnp.sqrt(wide)
    return float(eps) ** (2 if into_root else 0.5)


def _read_moved_eps(name: str, schedule: Callable[[Any], Any], into_root: bool, step: Any) -> Any:
    return _moved_eps(name, check_eps(f"the schedule of {name}", schedule(step)), into_root)


def _notes(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, ...]:
    """A sentence for each difference between two settings."""
    notes = []
    if after["eps_in_sqrt"] != before["eps_in_sqrt"]:
        place = "under" if after["eps_in_sqrt"] else "outside"
        notes.append(f"eps is {place} the root: the denominators are within a factor 1 to √2 of each other")
        if after["eps_in_sqrt"] and known(before["eps"]) is None:
            notes.append("eps is not known yet: below 1.1e-19 its square, which is under the root, is 0 in float32")
    start, old_start = (known(setting["initial_scale"]) for setting in (after, before))
    if after["initial_scale"] is not before["initial_scale"] and start != old_start:
        notes.append(_note_on_start(start, old_start, before["alpha"]))
    if not _is_zero(before["momentum"]) and after["lr_in_buffer"] != before["lr_in_buffer"]:
        not_ = "" if after["lr_in_buffer"] else "not "
        notes.append(f"the learning rate is {not_}in the momentum buffer: the same as long as it is constant")
    return tuple(notes)


def _note_on_start(start: float | None, old_start: float | None, alpha: Any) -> str:
    remembered, duration = "the product of all alphas so far" if callable(alpha) else "alphaᵗ", ""
    number = known(alpha)
    if number is not None:
        steps = 1 if number == 0 else math.ceil(math.log(0.01) / math.log(number))
        duration = f", 1 % after {steps} steps"
    if start is None or old_start is None:
        return f"the average starts from another value: they differ by {remembered} times the difference{duration}"
    gap = abs(start - old_start)
    return (
        f"the average starts from {start} and not from {old_start}: they differ by "
        f"{'' if gap == 1 else f'{gap:g} · '}{remembered}{duration}; compare that with v"
    )


def _is_zero(number: Any) -> bool:
    """Whether it is the number 0, for which nothing is built; an array may change."""
    return isinstance(number, float) and number == 0


def _known(name: str, number: Any) -> float:
    value = known(number)
    if callable(number):
        raise ValueError(f"{name} must be constant for step_ratio, got a schedule: the average remembers all of it")
    if value is None:
        raise TypeError(f"{name} must be known for step_ratio, got a tracer; call it outside jit")
    return value


def _eps_at(eps: Any, steps: np.ndarray) -> Any:
    """What eps is at each of ``steps``, which count from 1."""
    if not callable(eps):
        return _known("eps", eps)
    different, places = np.unique(steps, return_inverse=True)
    read = [eps(jnp.int32(min(step, 2**31 - 1) - 1)) for step in different]
    values = [_known("eps", check_eps("the schedule of eps", number)) for number in read]
    return np.asarray(values)[places].reshape(steps.shape)


def _check_state(state: Any, setting: dict[str, Any]) -> None:
    """Raises unless ``state`` can be that of a run with ``setting``."""
    if not isinstance(state, RMSPropState):
        raise TypeError(
            f"state must be an RMSPropState, got {type(state).__name__}; take it out of the state of a chain"
        )
    expected = {"grad_avg": ("centered", setting["centered"]), "momentum_buffer": ("momentum", setting["momentum"])}
    for name, (argument, value) in expected.items():
        is_kept = value is not False and not _is_zero(value)
        if state.square_avg is not None and (getattr(state, name) is not None) != is_kept:
            raise ValueError(
                f"state.{name} is {'None' if is_kept else 'not None'}, but {argument} is {shown(value)} in the setting "
                "that was translated; translate the one that the state belongs to"
            )


def _unit_of_buffer(lr: Any) -> Any:
    """The learning rate that is in a buffer, or is to go there, if it is the same in all of the buffer."""
    number = known(lr)
    if callable(lr) or (number is not None and not _SMALLEST <= number <= 1 / _SMALLEST):
        got = "a schedule" if callable(lr) else f"{number:g}"
        raise ValueError(
            f"lr must be constant and not 0 (in float32) or infinite for a buffer to change its unit, got {got}"
        )
    return lr if number is None else number


def _scaled(buffer: jax.Array, factor: Any) -> jax.Array:
    """``factor · buffer`` in the dtype of ``buffer``, computed in float32 at least."""
    limits = jnp.finfo(buffer.dtype)
    factor = jnp.asarray(factor, limits.dtype if limits.bits >= 32 else jnp.float32)
    if jnp.iscomplexobj(buffer):
        return jax.lax.complex(factor * buffer.real, factor * buffer.imag)
    scaled: jax.Array = (factor * buffer.astype(factor.dtype)).astype(buffer.dtype)
    return scaled
