"""The algorithm: RMSProp with PyTorch's arguments, order of operations and state.

Read from the top down: the state; what an update of one array is made of, an equation each; their composition for
one array; its lift over the parameter tree; the two public transformations. The other frameworks' RMSProps, in
``dialects``, are other orderings of the same equations.

Source: ``torch/optim/rmsprop.py`` (PyTorch 2.13, ``_single_tensor_rmsprop``); T. Tieleman and G. Hinton,
lecture 6e of "Neural Networks for Machine Learning" (2012); centered: A. Graves, "Generating Sequences
With Recurrent Neural Networks" (arXiv:1308.0850, eq. 38-45).
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Number, Real
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import ArrayLike, DTypeLike


class RMSPropState(NamedTuple):
    """What RMSProp remembers between two updates; the fields are the keys of torch's per-parameter state.

    Attributes:
      step: number of updates so far, an int32 scalar. (torch counts per parameter, in float32.)
      square_avg: the average of ``g²``, leaf for leaf like ``params``, in the accumulator dtype. If
        ``centered`` it is the average of ``(g − grad_avg)²``, the variance itself; torch's slot of the same
        name is then ``square_avg + grad_avg²``. With ``bias_correction`` it is the corrected average.
      grad_avg: the average of ``g``, like ``params``; ``None`` unless ``centered``.
      momentum_buffer: the accumulated steps, like ``params``; free of the learning rate, except in dialects that
        put it there. ``None`` unless there is momentum.
    """

    step: jax.Array
    square_avg: optax.Params
    grad_avg: optax.Params | None
    momentum_buffer: optax.Params | None


# --- The update of one array, an equation each --------------------------------------------------------------


class OneArray(NamedTuple):
    """One array on its way through an update; ``g`` enters as the gradient and leaves as the update."""

    g: jax.Array
    p: jax.Array | None  # the parameter, where weight decay needs it
    square_avg: jax.Array
    grad_avg: Any  # an array if centered, else None
    momentum_buffer: Any  # an array if there is momentum, else None


Numbers = Mapping[str, Any]  # the hyperparameters by name, and "gain", which is 1 − alpha
Equation = Callable[..., OneArray]  # of an array, and of the numbers that its arguments name


def negate(a: OneArray) -> OneArray:
    """``g ← −g``: to climb instead of descending, or from a step to an update."""
    return a._replace(g=-a.g)


def decay_weights(a: OneArray, weight_decay: jax.Array) -> OneArray:
    """``g ← g + weight_decay · p``: an L2 penalty."""
    # Written −(−g − weight_decay · p), which is equal bit for bit, but for the sign of a 0: XLA's CPU compiler
    # repeats a negation in every loop that reads it, but writes a sum that several loops read to memory
    # (benchmarks/NOTES.md).
    return a if a.p is None else a._replace(g=-(-a.g - weight_decay * a.p))


def decay_weights_decoupled(a: OneArray, lr: jax.Array, weight_decay: jax.Array) -> OneArray:
    """``g ← g − lr · weight_decay · p``, once ``g`` is the update: decay that stays out of the averages."""
    return a if a.p is None else a._replace(g=a.g - lr * weight_decay * a.p)


def average(a: OneArray, alpha: jax.Array, gain: jax.Array) -> OneArray:
    """``square_avg ← alpha · square_avg + (1 − alpha) · g²``."""
    # (gain · g) · g and not gain · (g · g): torch's order, in which g = 1e19 does not overflow float32.
    return a._replace(square_avg=alpha * a.square_avg + gain * a.g * a.g)


def centered_average(a: OneArray, alpha: jax.Array, gain: jax.Array) -> OneArray:
    """``square_avg ← alpha · square_avg + alpha · (1 − alpha) · (g − grad_avg)²``, then ``grad_avg`` towards ``g``."""
    # Equals torch's "average of g² minus grad_avg²" in real arithmetic, but is a sum of squares: it cannot
    # cancel, so it cannot turn negative. With alpha outside brackets XLA's CPU compiler computes it twice
    # (benchmarks/NOTES.md).
    deviation = a.g - a.grad_avg
    square_avg = alpha * a.square_avg + alpha * gain * deviation * deviation
    grad_avg = a.grad_avg + gain * deviation
    grad_avg = _overwritten_after(square_avg, grad_avg)
    g = a.g if a.p is None else _overwritten_after(square_avg, a.g, grad_avg)
    return a._replace(g=g, square_avg=square_avg, grad_avg=grad_avg)


def _overwritten_after(square_avg: jax.Array, x: jax.Array, also: jax.Array | None = None) -> jax.Array:
    """``x``; on the CPU in such a form that XLA writes it after ``square_avg``, and after ``also`` if given.

    There each output is written in a loop of its own. The loop of ``square_avg`` reads the old ``grad_avg``, those of
    both read the parameter that decays, and where the order is open XLA copies what is about to be overwritten. A
    negative average does not exist, but XLA does not know that (benchmarks/NOTES.md). (A traced alpha above 1, which
    nobody checks, can make one; its root is NaN anyway.)
    """
    same: jax.Array = jax.lax.platform_dependent(
        square_avg,
        x,
        square_avg if also is None else also,
        cpu=lambda square_avg, x, also: jnp.where(square_avg < 0, also, x),
        default=lambda square_avg, x, also: x,
    )
    return same


def divide_eps_outside(a: OneArray, eps: jax.Array) -> OneArray:
    """``g ← g / (√square_avg + eps)``."""
    return a._replace(g=_divide(a.g, _sqrt(a.square_avg) + eps))


def divide_eps_inside(a: OneArray, eps: jax.Array) -> OneArray:
    """``g ← g / √(square_avg + eps)``."""
    return a._replace(g=_divide(a.g, _sqrt(a.square_avg + eps)))


def add_momentum(a: OneArray, momentum: jax.Array) -> OneArray:
    """``momentum_buffer ← momentum · momentum_buffer + g``, which becomes ``g``."""
    buffer = momentum * a.momentum_buffer + a.g
    return a._replace(g=buffer, momentum_buffer=buffer)


def add_nesterov_momentum(a: OneArray, momentum: jax.Array) -> OneArray:
    """The same, with ``g ← momentum · momentum_buffer + g``: one step ahead."""
    buffer = momentum * a.momentum_buffer + a.g
    return a._replace(g=momentum * buffer + a.g, momentum_buffer=buffer)


def average_steps(a: OneArray, momentum: jax.Array, momentum_gain: jax.Array) -> OneArray:
    """``momentum_buffer ← momentum · momentum_buffer + (1 − momentum) · g``, which becomes ``g``."""
    buffer = momentum * a.momentum_buffer + momentum_gain * a.g
    return a._replace(g=buffer, momentum_buffer=buffer)


def scale_by_lr(a: OneArray, lr: jax.Array) -> OneArray:
    """``g ← lr · g``."""
    return a._replace(g=lr * a.g)


# Which equations need the parameter, the average of the gradient, the momentum buffer.
_DECAYING = {decay_weights, decay_weights_decoupled}
_CENTERED = {centered_average}
_BUFFERED = {add_momentum, add_nesterov_momentum, average_steps}


@functools.cache
def _numbers_of(equation: Equation) -> tuple[str, ...]:
    """The names of the numbers that an equation takes."""
    return tuple(inspect.signature(equation).parameters)[1:]


@jax.custom_jvp
def _sqrt(x: jax.Array) -> jax.Array:
    """√x with derivative 0 at 0, where g/√g² is 0/0: the infinite one turns every hyper-gradient to NaN."""
    return jnp.sqrt(x)


@_sqrt.defjvp
def _sqrt_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    root = _sqrt(*primals)
    return root, tangents[0] / (2 * jnp.where(root == 0, jnp.inf, root))


@jax.custom_jvp
def _divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """x/y whose derivative never forms 1/y², which is infinite in float32 for y = eps = 1e-20."""
    return x / y


@_divide.defjvp
def _divide_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    y = primals[1]
    quotient = _divide(*primals)
    return quotient, (tangents[0] - quotient * tangents[1]) / y


@functools.partial(jax.jit, static_argnames="equations")
def _update_array(equations: tuple[Equation, ...], numbers: Numbers, array: OneArray) -> OneArray:
    """Applies ``equations`` in order, in the dtype of the state or float32 if that is narrower.

    Jitted by itself, so that arrays of one shape and dtype are traced and lowered once and not one by one.
    """
    dtype = _arithmetic_dtype(array.square_avg.dtype)
    cast = {name: x.astype(dtype) for name, x in numbers.items()}
    numbers = {"gain": 1 - cast["alpha"]} | cast

    def apply(part: Callable[[jax.Array], jax.Array]) -> OneArray:
        a: OneArray = jax.tree.map(lambda x: jnp.asarray(part(x), dtype), array)
        for equation in equations:
            a = equation(a, **{name: numbers[name] for name in _numbers_of(equation)})
        return a._replace(p=None)

    if _kind(array.g.dtype) is complex:  # two real arrays, as torch's view_as_real
        done = jax.tree.map(jax.lax.complex, apply(jnp.real), apply(jnp.imag))
    else:
        done = apply(lambda x: x)
    rounded: OneArray = jax.tree.map(lambda new, old: new.astype(old.dtype), done, array._replace(p=None))
    return rounded


def _update_arrays(equations: tuple[Equation, ...], numbers: Numbers, arrays: list[OneArray]) -> list[OneArray]:
    """Each array by itself."""
    return [_update_array(equations, numbers, array) for array in arrays]


_BATCH = 8
_update_batch = jax.jit(_update_arrays, static_argnames="equations")


def _update_in_batches(equations: tuple[Equation, ...], numbers: Numbers, arrays: list[OneArray]) -> list[OneArray]:
    """Each array by itself, but those that look alike eight by eight: one call to trace and lower in place of eight."""
    alike: dict[Any, list[int]] = {}
    for i, array in enumerate(arrays):
        kind = tuple(None if part is None else (jnp.shape(part), _dtype(part)) for part in array)
        alike.setdefault(kind, []).append(i)
    done = list(arrays)
    for positions in alike.values():
        for start in range(0, len(positions), _BATCH):
            batch = positions[start : start + _BATCH]
            update = _update_batch if len(batch) == _BATCH else _update_arrays
            for i, array in zip(batch, update(equations, numbers, [arrays[i] for i in batch]), strict=True):
                done[i] = array
    return done


# --- The same over a parameter tree, as one program -------------------------------------------------------


def transformation(
    equations: tuple[Equation, ...],
    numbers: Numbers,
    *,
    initial_scale: ArrayLike = 0.0,
    bias_correction: bool = False,
    weight_decay_mask: Any = None,
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The gradient transformation that applies ``equations`` to every array of a tree.

    A number that is a function is a schedule and is read at ``RMSPropState.step``.
    """
    slot_dtype = _check_accumulator_dtype(accumulator_dtype)
    if bias_correction and isinstance(initial_scale, float) and initial_scale != 0:
        raise ValueError(f"initial_scale must be 0 with bias_correction, which forgets the start, got {initial_scale}")
    used = {name: numbers[name] for name in numbers if any(name in _numbers_of(equation) for equation in equations)}

    def init(params: optax.Params) -> RMSPropState:
        _check_params(params)

        def slot(value: ArrayLike) -> optax.Params:
            return jax.tree.map(lambda p: _new_slot(p, value, slot_dtype), params)

        return RMSPropState(
            step=_new_counter(params),
            square_avg=slot(initial_scale),
            grad_avg=slot(0.0) if _CENTERED & set(equations) else None,
            momentum_buffer=slot(0.0) if _BUFFERED & set(equations) else None,
        )

    def update(
        updates: optax.Updates, state: RMSPropState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, RMSPropState]:
        del extra_args
        _check_state(state, equations)
        now = {name: _at_step(name, number, state.step) for name, number in used.items()}
        params = _arrays_of(params)
        decayed = _decayed(params, weight_decay_mask) if _DECAYING & set(equations) else None
        done: tuple[optax.Updates, RMSPropState]
        done = _update_tree(equations, bias_correction, now, updates, state, params, decayed)
        return done

    return optax.GradientTransformationExtraArgs(init, update)


@functools.partial(jax.jit, static_argnames=("equations", "bias_correction"))
def _update_tree(
    equations: tuple[Equation, ...],
    bias_correction: bool,
    numbers: Numbers,
    updates: optax.Updates,
    state: RMSPropState,
    params: optax.Params | None,
    decayed: optax.Params | None,
) -> tuple[optax.Updates, RMSPropState]:
    """One compiled program for a whole tree.

    Jitted at module level, with the numbers as data: a transformation that is built anew for every call, as
    ``optax.inject_hyperparams`` builds it, finds the program that is already there.
    """
    step = optax.safe_increment(state.step)
    numbers = {name: jnp.asarray(x, _arithmetic_dtype(_dtype(x))) for name, x in numbers.items()}
    if bias_correction:
        averages = {"alpha": "gain"} | ({"momentum": "momentum_gain"} if average_steps in equations else {})
        for decay, gain in averages.items():
            one_minus = numbers.get(gain, 1 - numbers[decay])
            numbers[decay], numbers[gain] = _bias_corrected(numbers[decay], one_minus, step)

    # Python numbers are arrays by now, except under jax.disable_jit.
    updates, params = jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), (updates, params))
    gradients, structure = jax.tree.flatten(updates, is_leaf=_is_none)

    def column(name: str, tree: Any) -> list[Any]:
        return [None] * len(gradients) if tree is None else _flatten_like(name, tree, updates, structure)

    slots = [column(f"state.{name}", tree) for name, tree in zip(state._fields[1:], state[1:], strict=True)]
    _check_gradients("state.square_avg", slots[0], updates)
    likes = slots[0]
    if params is not None:
        likes = column("params", params)
        _check_gradients("params", likes, updates)
    arrays = [OneArray(*row) for row in zip(gradients, column("params", decayed), *slots, strict=True)]
    updated = iter(_update_in_batches(equations, numbers, [array for array in arrays if array.g is not None]))
    done = [
        _leave_alone(array, like) if array.g is None else next(updated)
        for array, like in zip(arrays, likes, strict=True)
    ]

    def gather(name: str) -> Any:
        return jax.tree.unflatten(structure, [getattr(array, name) for array in done])

    return gather("g"), RMSPropState(
        step=step,
        square_avg=gather("square_avg"),
        grad_avg=None if state.grad_avg is None else gather("grad_avg"),
        momentum_buffer=None if state.momentum_buffer is None else gather("momentum_buffer"),
    )


def _at_step(name: str, number: Any, step: jax.Array) -> Any:
    return check_number(f"the schedule of {name}", number(step)) if callable(number) else number


def _arrays_of(params: optax.Params | None) -> optax.Params | None:
    """``params`` with ``None`` in place of leaves that jit does not take, the activations of a module for one."""
    return jax.tree.map(lambda p: p if hasattr(p, "dtype") or isinstance(p, Number) else None, params)


def _leave_alone(array: OneArray, param: Any) -> OneArray:
    """No gradient: the slots stay as they are and the update is zero (``None`` where the parameter is)."""
    return array._replace(g=jax.tree.map(jnp.zeros_like, param))


def _bias_corrected(alpha: jax.Array, gain: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The ``alpha`` and ``gain`` of this step with which an average is its own bias-corrected value.

    They add up to 1, so every recurrence above holds as it stands, the centered one included::

        gain  = (1 − alpha) / (1 − alphaᵗ)      alpha = alpha · (1 − alphaᵗ⁻¹) / (1 − alphaᵗ)

    written so that nothing cancels and the latter is exactly 0 at t = 1.
    """
    log_alpha = jnp.log1p(jnp.maximum(-gain, jnp.finfo(gain.dtype).epsneg - 1))  # finite for alpha = 0
    t = step.astype(log_alpha.dtype)
    before, now = jnp.expm1((t - 1) * log_alpha), jnp.expm1(t * log_alpha)
    return alpha * before / now, -gain / now


def _new_slot(param: Any, value: ArrayLike, accumulator_dtype: np.dtype | None) -> jax.Array:
    dtype = _slot_dtype(_dtype(param), accumulator_dtype)
    value = value * (1 + 1j) if _kind(dtype) is complex else value
    slot: jax.Array = jnp.full_like(param, value, dtype=dtype)  # takes over the sharding of param
    return slot


def _new_counter(params: optax.Params) -> jax.Array:
    """Zero, where ``params`` are (replicated on their mesh): elsewhere it would compile the step twice."""
    step = jnp.zeros((), jnp.int32)
    for leaf in jax.tree.leaves(params):
        sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return _put(step, NamedSharding(sharding.mesh, PartitionSpec()))
        if isinstance(sharding, SingleDeviceSharding) and getattr(leaf, "committed", False):
            return _put(step, sharding)
    return step


def _put(step: jax.Array, sharding: Sharding) -> jax.Array:
    placed: jax.Array = jax.device_put(step, sharding)
    return placed


def _decayed(params: optax.Params | None, mask: Any) -> optax.Params:
    """The parameters that decay, with ``None`` in the place of those that do not."""
    if params is None:
        raise ValueError(
            "params must be given where weight_decay is: call update(updates, state, params). (A weight_decay that is "
            "an array counts, even if it is 0; optax.inject_hyperparams makes an array of every number.)"
        )
    if mask is None:
        return params
    chosen = mask(params) if callable(mask) else mask

    def choose(decays: Any, param: Any) -> Any:
        return param if check_flag("weight_decay_mask", decays) else jax.tree.map(lambda _: None, param)

    try:
        return jax.tree.map(choose, chosen, params)
    except ValueError as error:
        raise ValueError(
            f"weight_decay_mask must be like params or a prefix of it: {jax.tree.structure(chosen)} "
            f"is not one of {jax.tree.structure(params)}"
        ) from error


# --- The public transformations --------------------------------------------------------------------------


def scale_by_rmsprop(
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    momentum: ArrayLike = 0.0,
    centered: bool = False,
    *,
    eps_in_sqrt: bool = False,
    initial_scale: ArrayLike = 0.0,
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

    Every numeric argument is a Python number or a scalar array (a tracer included) and is used in float32
    at least, never rounded to the dtype of a half-precision parameter. A transformation built with
    other numbers finds the same compiled program, unless momentum goes from 0 to something or back. (Inside your own
    ``jit`` a Python number is a constant; ``optax.inject_hyperparams`` makes it data.)

    Args:
      alpha: smoothing constant, 0 ≤ alpha < 1, without unit.
      eps: added to the denominator, ≥ 0, in the unit of the gradient (of its square if ``eps_in_sqrt``).
      momentum: decay of the momentum buffer, ≥ 0. The number 0 means that there is no buffer: no memory,
        no work. An array always has one, whatever its value, so that structure never depends on data.
      centered: divide by the standard deviation of the gradient instead of its root mean square.
      eps_in_sqrt: add ``eps`` under the root, as TensorFlow and Keras do.
      initial_scale: what ``square_avg`` starts from, ≥ 0, in the unit of g²: 0 in torch, 1 in TensorFlow.
      bias_correction: weigh the averages so that they do not remember what they started from: each then
        holds v/(1 − alphaᵗ) where the plain average, started from 0, would hold v. ``initial_scale`` must then
        be 0. The correction counts all updates, those too in which an array had no gradient.
      accumulator_dtype: a real floating dtype in which the state rests; complex parameters get the complex
        dtype that goes with it. The arithmetic runs in that dtype, or in float32 if it is narrower. ``None``
        is the dtype of the parameter, but float32 at least: in bfloat16 an average with alpha = 0.999 stops
        growing half-way and never decays, and in float16 the default eps is 0. (torch and Optax keep the
        dtype of the parameter.)

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is an :class:`RMSPropState`. ``update`` returns
      updates in the dtype of the gradients. It ignores keyword arguments that it does not know. Called outside
      ``jit`` it is one compiled program for the whole tree, whose arrays then have to be on one device or mesh.

      A zero gradient gives a zero update, and derivatives through it are finite, as long as eps > 0. A
      ``None`` gradient leaves its parameter alone: unchanged state, zero update (in the dtype of the parameter, or
      of its state if ``update`` is not given ``params``). Infinite and NaN gradients
      reach the state and the update, as in torch; ``optax.apply_if_finite`` keeps them out. Complex arrays
      are two real ones, as in torch (``view_as_real``); note that ``jax.grad`` returns the conjugate of
      the gradient that torch returns.

    Raises:
      ValueError: when built, if a number is NaN or out of range, an array is not a scalar, or
        ``accumulator_dtype`` is float64 without ``jax_enable_x64``; at ``update``, if the gradients or the
        state do not match the parameters ``init`` saw (the message names the first path that differs).
      TypeError: when built, if an argument has the wrong type; at ``init``, if a parameter is not floating
        or complex (the message names it); at ``update``, if a gradient is not of its parameter's kind.

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
    numbers = _scaling_numbers(alpha, eps, momentum)
    return transformation(
        _scaling_equations(numbers, centered, eps_in_sqrt),
        numbers,
        initial_scale=check_number("initial_scale", initial_scale),
        bias_correction=check_flag("bias_correction", bias_correction),
        accumulator_dtype=accumulator_dtype,
    )


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def _refuse_execution_hints(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Says why torch's execution hints are no arguments here, where Python would say "unexpected keyword"."""

    @functools.wraps(function)
    def wrapped(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        for hint in ("foreach", "fused", "capturable", "differentiable"):
            if hint in kwargs:
                raise TypeError(
                    f"{hint}={kwargs[hint]!r} tells torch how to execute the update; under XLA every update is "
                    "compiled, fused and differentiable, so it means nothing here: leave it out"
                )
        return function(*args, **kwargs)

    return wrapped


@_refuse_execution_hints
def rmsprop(
    lr: optax.ScalarOrSchedule = 1e-2,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    momentum: ArrayLike = 0.0,
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

    and all of it in one precision, rounded to the dtype of the gradient at the end only.

    The learning rate never enters the momentum buffer: after it changes, the whole buffer is applied at the
    new rate, as in torch. See :func:`scale_by_rmsprop` for the scaling itself, for half precision, zero,
    missing and non-finite gradients, and for complex parameters.

    Args:
      lr: learning rate, ≥ 0, in units of the parameter per step; or a schedule, a function from the number of
        updates so far to that (0 for the first update, like torch's ``scheduler.step()`` after
        ``optimizer.step()``). A schedule reads ``RMSPropState.step``, so the state looks the same for a
        constant and a schedule, and a run restored from a checkpoint continues its schedule where it was.
      alpha: smoothing constant, 0 ≤ alpha < 1.
      eps: added to the root of the average, ≥ 0, in the unit of the gradient.
      weight_decay: L2 penalty, ≥ 0, added to the gradient *before* the scaling (``update`` then needs
        ``params``). The number 0 leaves it out of the program.
      momentum: decay of the momentum buffer, ≥ 0. The number 0 means no buffer.
      centered: divide by the standard deviation of the gradient instead of its root mean square.
      maximize: climb the objective instead of descending it.
      weight_decay_mask: which parameters decay: a tree of bools like ``params`` (or a prefix of it), or a
        function from ``params`` to one. ``None`` means all of them.
      accumulator_dtype: the dtype in which the state rests; see :func:`scale_by_rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is an :class:`RMSPropState`.

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
        "lr": check_learning_rate("lr", lr),
        "weight_decay": check_number("weight_decay", weight_decay),
        **_scaling_numbers(alpha, eps, momentum),
    }
    equations = (
        *((negate,) if check_flag("maximize", maximize) else ()),
        *unless_zero(numbers["weight_decay"], decay_weights),
        *_scaling_equations(numbers, centered, eps_in_sqrt=False),
        scale_by_lr,
        negate,
    )
    return transformation(
        equations,
        numbers,
        weight_decay_mask=weight_decay_mask,
        accumulator_dtype=accumulator_dtype,
    )


def _scaling_numbers(alpha: Any, eps: Any, momentum: Any) -> dict[str, Any]:
    return {
        **smoothing("alpha", "gain", check_number("alpha", alpha, below=1.0)),
        "eps": check_number("eps", eps),
        "momentum": check_number("momentum", momentum),
    }


def smoothing(decay: str, gain: str, value: Any) -> dict[str, Any]:
    """The numbers named ``decay``, which is ``value``, and ``gain``, which is 1 − ``value``.

    A Python number is subtracted in double precision, as torch does: 1 − float32(0.99) is off by 1e-6. An array is
    what it is, and its gain is left to the program.
    """
    return {decay: value} | ({gain: 1.0 - value} if isinstance(value, float) else {})


def _scaling_equations(numbers: Numbers, centered: Any, eps_in_sqrt: Any) -> tuple[Equation, ...]:
    return (
        centered_average if check_flag("centered", centered) else average,
        divide_eps_inside if check_flag("eps_in_sqrt", eps_in_sqrt) else divide_eps_outside,
        *unless_zero(numbers["momentum"], add_momentum),
    )


# --- Checks of arguments ---------------------------------------------------------------------------------


def check_number(name: str, value: Any, below: float = math.inf) -> Any:
    """A Python number as a float, checked; a scalar array or a tracer as it is, its value unchecked."""
    allowed = "a number ≥ 0" if below == math.inf else f"a number in [0, {below:g})"
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        if not (0 <= number < below or number == below == math.inf):
            hint = (
                f"; it is a fraction, did you mean {number / 100:g}?" if below < math.inf and 50 <= number < 100 else ""
            )
            raise ValueError(f"{name} must be {allowed}, got {value!r}{hint}")
        return number
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(f"{name} must be {allowed} or a scalar array, got {value!r} ({type(value).__name__})")
    if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        raise TypeError(f"{name} must be {allowed} or a scalar array, got an array of dtype {value.dtype}")
    if value.shape:
        raise ValueError(
            f"{name} must be {allowed} or a scalar array, got an array of shape {value.shape}; "
            f"to try many values at once, use jax.vmap over a function that builds the transformation"
        )
    return value


def check_learning_rate(name: str, value: Any) -> Any:
    """A schedule as it is, anything else as :func:`check_number` leaves it."""
    return value if callable(value) else check_number(name, value)


def unless_zero(number: Any, equation: Equation) -> tuple[Equation, ...]:
    """A number that is 0 leaves its equation out; an array never does, so structure never depends on data."""
    return () if isinstance(number, float) and number == 0 else (equation,)


def check_flag(name: str, value: Any) -> bool:
    """``value`` if it is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return bool(value)


def _check_accumulator_dtype(value: DTypeLike | None) -> np.dtype | None:
    if value is None:
        return None
    dtype = jnp.dtype(value)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"accumulator_dtype must be a real floating dtype or None, got {dtype.name}")
    if dtype == jnp.float64 != jnp.result_type(float):
        raise ValueError("accumulator_dtype float64 needs jax_enable_x64, got it switched off")
    return dtype


# --- Checks of trees -------------------------------------------------------------------------------------


def _check_params(params: optax.Params) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        is_array = isinstance(leaf, Number) or (hasattr(leaf, "dtype") and hasattr(leaf, "shape"))
        if not is_array or _kind(getattr(leaf, "dtype", None) or _dtype(leaf)) is None:
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} must be floating or complex, got "
                f"{getattr(leaf, 'dtype', type(leaf).__name__)}; leave it out with optax.masked, or make it None"
            )


def _check_state(state: Any, equations: tuple[Equation, ...]) -> None:
    if not isinstance(state, RMSPropState):
        raise ValueError(
            f"state must be the RMSPropState that init returned, got {type(state).__name__}; take it out of the "
            "state of a chain, and restore a checkpoint into what init returns"
        )
    for name, users, cause in (("grad_avg", _CENTERED, "centered"), ("momentum_buffer", _BUFFERED, "momentum")):
        is_used = bool(users & set(equations))
        if state.square_avg is not None and (getattr(state, name) is None) == is_used:
            raise ValueError(
                f"state.{name} is {'None' if is_used else 'not None'}, so the state belongs to a "
                f"transformation with another setting of {cause}; call init again or keep the setting"
            )


def _flatten_like(name: str, tree: Any, updates: optax.Updates, structure: Any) -> list[Any]:
    """The part of ``tree`` that belongs to each gradient."""
    try:
        parts: list[Any] = structure.flatten_up_to(tree)
    except ValueError:
        difference = _first_difference(name, tree, updates)
        raise ValueError(f"updates must have the structure of {name}, but {difference}") from None
    return parts


def _first_difference(name: str, tree: Any, updates: optax.Updates) -> str:
    given = dict(jax.tree_util.tree_leaves_with_path(updates, is_leaf=_is_none))
    expected = dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_none))
    left_alone = {path for path, g in given.items() if g is None}
    for path in expected:
        if path not in given and not any(path[:depth] in left_alone for depth in range(len(path) + 1)):
            return f"{name}{jax.tree_util.keystr(path)} has no gradient"
    for path in given:
        if path not in expected and path not in left_alone:
            return f"updates{jax.tree_util.keystr(path)} has no counterpart"
    return f"{jax.tree.structure(updates)} is not {jax.tree.structure(tree)}"


def _check_gradients(name: str, parts: list[Any], updates: optax.Updates) -> None:
    """Raises at the first gradient whose shape or kind is not that of its part of the tree ``name``."""
    gradients = jax.tree.leaves(updates, is_leaf=_is_none)
    wrong = next((i for i, (g, part) in enumerate(zip(gradients, parts, strict=True)) if not _is_like(g, part)), None)
    if wrong is None:
        return
    path = jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(updates, is_leaf=_is_none)[wrong][0])
    g, part = gradients[wrong], parts[wrong]
    if not hasattr(part, "dtype"):
        raise ValueError(f"updates{path} is one array, but {name}{path} is {jax.tree.structure(part)}")
    if jnp.shape(g) != part.shape:
        raise ValueError(f"updates{path} has shape {jnp.shape(g)}, but {name}{path} has shape {part.shape}")
    raise TypeError(f"updates{path} has dtype {_dtype(g)}, but {name}{path} has dtype {part.dtype}")


def _is_like(g: Any, part: Any) -> bool:
    return g is None or (
        hasattr(part, "dtype") and g.shape == part.shape and _kind(g.dtype) is _kind(part.dtype) is not None
    )


# --- Dtypes ----------------------------------------------------------------------------------------------


def _dtype(leaf: Any) -> np.dtype:
    """The dtype of an array, of what stands for one (``jax.ShapeDtypeStruct``), or of a Python number."""
    return jnp.result_type(leaf.dtype if isinstance(leaf, jax.ShapeDtypeStruct) else leaf)


@functools.cache
def _kind(dtype: np.dtype) -> type[float] | type[complex] | None:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return complex
    return float if jnp.issubdtype(dtype, jnp.floating) else None


@functools.cache
def _arithmetic_dtype(dtype: np.dtype) -> np.dtype:
    """The real dtype to compute in for arrays or numbers of ``dtype``: float32 at least."""
    wide = _kind(dtype) is not None and jnp.finfo(dtype).bits >= 32
    return jnp.finfo(dtype).dtype if wide else jnp.dtype(jnp.float32)


def _slot_dtype(param_dtype: np.dtype, accumulator_dtype: np.dtype | None) -> np.dtype:
    dtype = _arithmetic_dtype(param_dtype) if accumulator_dtype is None else accumulator_dtype
    if _kind(param_dtype) is complex:
        return jnp.promote_types(_arithmetic_dtype(dtype), jnp.complex64)
    return dtype


def _is_none(x: Any) -> bool:
    return x is None
