"""RMSProp with PyTorch's arguments, order of operations and state.

Each transformation is a tuple of ``equations``, in the order in which they are applied. The other frameworks' RMSProps,
in ``dialects``, are other tuples of the same equations.
"""

from collections.abc import Callable
from typing import Any

import chex
import optax
from jax.typing import DTypeLike

from rmsprop_jax.arguments import (
    check_eps,
    check_flag,
    check_number,
    check_number_or_schedule,
    check_smoothing,
    explain_arguments,
)
from rmsprop_jax.equations import (
    Equation,
    add_momentum,
    average,
    centered_average,
    decay_weights,
    divide_eps_inside,
    divide_eps_outside,
    negate,
    scale_by_lr,
)
from rmsprop_jax.lift import transformation, unless_zero

__all__ = ["rmsprop", "scale_by_rmsprop"]


@explain_arguments
def scale_by_rmsprop(
    alpha: optax.ScalarOrSchedule = 0.99,
    eps: optax.ScalarOrSchedule = 1e-8,
    momentum: optax.ScalarOrSchedule = 0.0,
    centered: bool = False,
    *,
    eps_in_sqrt: bool = False,
    initial_scale: chex.Numeric = 0.0,
    bias_correction: bool = False,
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides each gradient by the root of a running average of its square.

    The equations, one array at a time, in torch's order::

        square_avg      ← alpha · square_avg + (1 − alpha) · g²
        denom           ← √square_avg + eps                        √(square_avg + eps) if eps_in_sqrt
        momentum_buffer ← momentum · momentum_buffer + g / denom   if momentum
        update          ← momentum_buffer, or g / denom without momentum

    and, if ``centered``, in place of the first line::

        square_avg ← alpha · square_avg + alpha · (1 − alpha) · (g − grad_avg)²
        grad_avg   ← grad_avg + (1 − alpha) · (g − grad_avg)

    The update points along the gradient, as every Optax scaling does; :func:`rmsprop` adds the sign and the
    learning rate.

    Every numeric argument except ``initial_scale`` is a number, a scalar array (possibly traced) or a schedule. A
    schedule is a function of the number of updates so far, which is 0 for the first update, like torch's
    ``scheduler.step()`` after ``optimizer.step()``. Numbers are used in float32 at least and never rounded to the dtype
    of a half-precision parameter. A transformation built with other numbers reuses the compiled program, unless
    momentum becomes or stops being 0. (Inside your own ``jit`` a Python number is a constant.
    ``optax.inject_hyperparams`` makes it data.)

    Args:
      alpha: smoothing constant, 0 ≤ alpha < 1, without unit. An array must be float32 at least: in bfloat16, 0.999
        is 1.
      eps: added to the denominator, in the unit of the gradient (of its square if ``eps_in_sqrt``). It is 0 or at least
        1.18e-38, because XLA treats smaller numbers as 0 in float32.
      momentum: decay of the momentum buffer, ≥ 0. The number 0 means no buffer, no memory and no work. An array or a
        schedule always has a buffer, whatever its value, so that structure never depends on data.
      centered: divide by the standard deviation of the gradient instead of its root mean square.
      eps_in_sqrt: add ``eps`` under the root, as TensorFlow and Keras do.
      initial_scale: what ``square_avg`` starts from, ≥ 0, in the unit of g²: 0 in torch, 1 in TensorFlow.
      bias_correction: store bias-corrected averages: each holds v/(1 − alphaᵗ) where the plain average, started
        from 0, would hold v. ``initial_scale`` must then be 0. The correction counts all updates, including those in
        which an array had no gradient. If alpha is a schedule, the weight of the new g² is (1 − alpha)/(1 − alphaᵗ)
        with the current alpha.
      accumulator_dtype: a real floating dtype in which the state is stored. Complex parameters get the matching
        complex dtype. The arithmetic runs in that dtype, or in float32 if it is narrower. ``None`` is the dtype of the
        parameter, but float32 at least: in bfloat16 an average with alpha = 0.999 stops growing halfway and never
        decays, and in float16 the default eps is 0. (torch and Optax keep the dtype of the parameter.)

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is an :class:`rmsprop_jax.RMSPropState`. ``update``
      returns updates in the dtype of the gradients and ignores unknown keyword arguments. Outside ``jit`` it runs one
      compiled program for the whole tree, so all arrays must be on one device or mesh.

      A zero gradient gives a zero update, and derivatives through it are finite, as long as eps > 0. A ``None``
      gradient leaves its parameter alone: the state stays, and the update is zero (in the dtype of the parameter, or of
      its state if ``update`` gets no ``params``). Leaves that are neither arrays nor floats (flags, functions, random
      keys) have no slots, and their update is ``None``, so a whole Equinox model can be ``params``. Infinite and NaN
      gradients reach the state and the update, as in torch; ``optax.apply_if_finite`` keeps them out. A complex array
      counts as two real ones, as in torch (``view_as_real``). Note that ``jax.grad`` returns the conjugate of the
      gradient that torch returns.

    Raises:
      ValueError: when built, if a number is NaN or out of range, an array is not a scalar, or
        ``accumulator_dtype`` is float64 without ``jax_enable_x64``; at ``update``, if the gradients or the
        state do not match the parameters ``init`` saw (the message names the first path that differs).
      TypeError: when built, if an argument has the wrong type; at ``init``, if a parameter is an array of integers
        or bools (the message names it); at ``update``, if a gradient is not of its parameter's kind or a slot of the
        state has a dtype different from the one that ``init`` gives. (A ``step`` that is an integer of a different
        width is converted.)

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from rmsprop_jax import scale_by_rmsprop
      >>> scaling = scale_by_rmsprop(alpha=0.75, eps=0.0)
      >>> state = scaling.init({"w": jnp.zeros(2)})
      >>> updates, state = scaling.update({"w": jnp.array([3.0, -0.5])}, state)
      >>> print(updates["w"], state.square_avg["w"])  # the step forgets the size of the gradient
      [ 2. -2.] [2.25   0.0625]

    Source:
      ``torch/optim/rmsprop.py``, PyTorch 2.13; the centered form is the exponentially weighted variance of
      T. Finch, "Incremental calculation of weighted mean and variance" (2009), eq. 143.
    """
    numbers = {
        "alpha": check_smoothing("alpha", alpha),
        "eps": check_eps("eps", eps),
        "momentum": check_number_or_schedule("momentum", momentum),
    }
    equations: tuple[Equation, ...] = (
        centered_average if check_flag("centered", centered) else average,
        divide_eps_inside if check_flag("eps_in_sqrt", eps_in_sqrt) else divide_eps_outside,
        *unless_zero(numbers["momentum"], add_momentum),
    )
    return transformation(
        equations,
        numbers,
        initial_scale=check_number("initial_scale", initial_scale),
        bias_correction=check_flag("bias_correction", bias_correction),
        accumulator_dtype=accumulator_dtype,
    )


@explain_arguments
def rmsprop(
    lr: optax.ScalarOrSchedule = 1e-2,
    alpha: optax.ScalarOrSchedule = 0.99,
    eps: optax.ScalarOrSchedule = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    momentum: optax.ScalarOrSchedule = 0.0,
    centered: bool = False,
    *,
    maximize: bool = False,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""``torch.optim.RMSprop`` as an Optax transformation: its arguments, their order and their defaults.

    In torch's order, with p the parameter and g its gradient::

        g      ← −g                                   if maximize
        g      ← g + weight_decay · p                 where weight_decay_mask allows
        step   ← scale_by_rmsprop(alpha, eps, momentum, centered)(g)
        update ← −lr · step                           which optax.apply_updates adds to p

    All of it runs in one precision and is rounded to the dtype of the gradient only at the end.

    The learning rate never enters the momentum buffer. After it changes, the whole buffer is applied at the new rate,
    as in torch. :func:`scale_by_rmsprop` describes the scaling, half precision, zero, missing and non-finite gradients,
    and complex parameters.

    Args:
      lr: learning rate, ≥ 0, in units of the parameter per step. Like every number here, it may be a schedule (see
        :func:`scale_by_rmsprop`). A schedule reads ``RMSPropState.step``. The state therefore looks the same for a
        constant and for a schedule, and a restored run continues its schedule where it was.
      alpha: smoothing constant, 0 ≤ alpha < 1.
      eps: added to the root of the average, ≥ 0, in the unit of the gradient.
      weight_decay: L2 penalty, ≥ 0, added to the gradient *before* the scaling (``update`` then needs
        ``params``). The number 0 leaves it out of the program.
      momentum: decay of the momentum buffer, ≥ 0. The number 0 means no buffer.
      centered: divide by the standard deviation of the gradient instead of its root mean square.
      maximize: whether to climb the objective instead of descending it.
      weight_decay_mask: which parameters decay: a tree of bools like ``params`` (or a prefix of it), or a
        function from ``params`` to one. ``None`` means all of them. As in Optax, a tree that has a ``__call__``, such
        as an Equinox module, is a tree.
      accumulator_dtype: the dtype in which the state is stored; see :func:`scale_by_rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is an :class:`rmsprop_jax.RMSPropState`.

    Raises:
      ValueError: as :func:`scale_by_rmsprop`; also at ``update`` if there is weight decay and no ``params``.
      TypeError: as :func:`scale_by_rmsprop`; also for torch's ``foreach``, ``fused``, ``capturable`` and
        ``differentiable``, which mean nothing under XLA.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from rmsprop_jax import rmsprop
      >>> optimizer = rmsprop(lr=0.01, alpha=0.9, momentum=0.5, centered=True)
      >>> def loss(params):
      ...     return jnp.sum((params - jnp.array([3.0, -1.0])) ** 2)
      >>> params = jnp.zeros(2)
      >>> state = optimizer.init(params)
      >>> for _ in range(300):
      ...     updates, state = optimizer.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params.round(1), state.step)
      [ 3. -1.] 300

    Source:
      ``torch.optim.RMSprop``, PyTorch 2.13. Different on purpose: the state is float32 at least, the centered
      average is kept as such, and alpha ≥ 1 and integer parameters are refused (torch takes them).
    """
    numbers = {
        "lr": check_number_or_schedule("lr", lr),
        "weight_decay": check_number_or_schedule("weight_decay", weight_decay),
        "alpha": check_smoothing("alpha", alpha),
        "eps": check_eps("eps", eps),
        "momentum": check_number_or_schedule("momentum", momentum),
    }
    equations: tuple[Equation, ...] = (
        *((negate,) if check_flag("maximize", maximize) else ()),
        *unless_zero(numbers["weight_decay"], decay_weights),
        centered_average if check_flag("centered", centered) else average,
        divide_eps_outside,
        *unless_zero(numbers["momentum"], add_momentum),
        scale_by_lr,
        negate,
    )
    return transformation(
        equations,
        numbers,
        weight_decay_mask=weight_decay_mask,
        accumulator_dtype=accumulator_dtype,
    )
