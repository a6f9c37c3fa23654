"""The algorithm: RMSProp with PyTorch's arguments, order of operations and state.

Read from the top down: the state; what an update of one array is made of, an equation each; their composition for
one array; its lift over the parameter tree; the two public transformations. The other frameworks' RMSProps, in
``dialects``, are other orderings of the same equations.

Source: ``torch/optim/rmsprop.py`` (PyTorch 2.13, ``_single_tensor_rmsprop``); T. Tieleman and G. Hinton,
lecture 6e of "Neural Networks for Machine Learning" (2012); centered: A. Graves, "Generating Sequences
With Recurrent Neural Networks" (arXiv:1308.0850, eq. 38-45).
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import ArrayLike, DTypeLike

from rmsprop_jax.arguments import (
    check_eps,
    check_flag,
    check_float_dtype,
    check_number,
    check_number_or_schedule,
    check_smoothing,
    explain_arguments,
    known,
    shown,
)


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


jax.export.register_namedtuple_serialization(RMSPropState, serialized_name="rmsprop_jax.RMSPropState")


class Settings(NamedTuple):
    """What an RMSProp was built with, as far as its state does not tell: the numbers as given, schedules unread.

    Attributes:
      lr: the learning rate; 1 for :func:`scale_by_rmsprop`, which has none.
      eps: the number in the denominator.
      eps_in_sqrt: whether ``eps`` is under the root.
    """

    lr: Any
    eps: Any
    eps_in_sqrt: bool


class SettingsQuery:
    """Asks every RMSProp inside a transformation what it was built with.

    The call is ``tx.update(updates, state, params, rmsprop_settings=query)``. Optax passes keyword arguments on,
    through chains, partitions, masks and injected hyperparameters. Each RMSProp that receives the query adds its
    answer and returns updates and state untouched.

    Attributes:
      answers: pairs of state and :class:`Settings`, at least one for each RMSProp. (Optax may call a transformation
        more than once.)
    """

    def __init__(self) -> None:
        """Starts without answers."""
        self.answers: list[tuple[RMSPropState, Settings]] = []


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


@functools.cache
def _numbers_of(equation: Equation) -> tuple[str, ...]:
    """The names of the numbers that an equation takes."""
    return tuple(inspect.signature(equation).parameters)[1:]


_GAINS = {"alpha": "gain", "momentum": "momentum_gain"}  # each is 1 minus the smoothing constant before it


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """What is decided when a transformation is built, and is the same in every update.

    It holds the equations where libraries that rewrite closures do not look: Optimistix replaces the functions that
    it finds in one, and an equation that is another function is another equation.
    """

    equations: tuple[Equation, ...]
    bias_correction: bool
    accumulator_dtype: np.dtype | None

    def names(self) -> set[str]:
        """The hyperparameters that the equations need, by themselves or by their gains."""
        taken = {name for equation in self.equations for name in _numbers_of(equation)}
        return taken | {name for name, gain in _GAINS.items() if gain in taken}

    def has(self, *equations: Equation) -> bool:
        """Whether one of ``equations`` is among those of the algorithm."""
        return any(equation in self.equations for equation in equations)

    def decays(self) -> bool:
        """Whether the update needs the parameters."""
        return self.has(decay_weights, decay_weights_decoupled)

    def slots(self) -> dict[str, bool]:
        """For each slot of the state whether the algorithm keeps it."""
        return {
            "square_avg": True,
            "grad_avg": self.has(centered_average),
            "momentum_buffer": self.has(add_momentum, add_nesterov_momentum, average_steps),
        }


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
    numbers = {_GAINS[name]: 1 - x for name, x in cast.items() if name in _GAINS} | cast

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
    algorithm = Algorithm(equations, bias_correction, check_float_dtype("accumulator_dtype", accumulator_dtype))
    if bias_correction and known(initial_scale) not in (None, 0.0):
        raise ValueError(f"initial_scale must be 0 with bias_correction, which forgets the start, got {initial_scale}")
    settings = Settings(numbers.get("lr", 1.0), numbers.get("eps", 0.0), algorithm.has(divide_eps_inside))
    used = {name: number for name, number in numbers.items() if name in algorithm.names()}
    mask_is_function = _is_function(weight_decay_mask)

    def init(params: optax.Params) -> RMSPropState:
        _check_params(params)

        def slots(value: ArrayLike) -> optax.Params:
            return jax.tree.map(
                lambda p: _new_slot(p, value, algorithm.accumulator_dtype) if _is_trainable(p) else None, params
            )

        kept = algorithm.slots()
        return RMSPropState(
            step=_new_counter(params),
            square_avg=slots(initial_scale),
            grad_avg=slots(0.0) if kept["grad_avg"] else None,
            momentum_buffer=slots(0.0) if kept["momentum_buffer"] else None,
        )

    def update(
        updates: optax.Updates, state: RMSPropState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, RMSPropState]:
        query = extra_args.get("rmsprop_settings")
        if isinstance(query, SettingsQuery):
            query.answers.append((state, settings))
            return updates, state
        _check_state(state, algorithm)
        state = state._replace(step=_checked_step(state.step))
        decayed = None
        if algorithm.decays():
            mask = weight_decay_mask(params) if mask_is_function and params is not None else weight_decay_mask
            decayed = _decayed(params, mask)
        done: tuple[optax.Updates, RMSPropState]
        done = _update_tree(algorithm, _at_step(used, state.step), updates, state, _only_arrays(params), decayed)
        return done

    return optax.GradientTransformationExtraArgs(init, update)


@functools.partial(jax.jit, static_argnames="algorithm")
def _update_tree(
    algorithm: Algorithm,
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
    if algorithm.bias_correction:
        for decay, gain in _GAINS.items():
            if decay in numbers and (decay == "alpha" or algorithm.has(average_steps)):
                one_minus = numbers.get(gain, 1 - numbers[decay])
                numbers[decay], numbers[gain] = _bias_corrected(numbers[decay], one_minus, step)

    # Python numbers are arrays by now, except under jax.disable_jit.
    updates, params = jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), (updates, params))
    gradients, structure = jax.tree.flatten(updates, is_leaf=_is_none)

    def column(name: str, tree: Any) -> list[Any]:
        return [None] * len(gradients) if tree is None else _flatten_like(name, tree, updates, structure)

    slots = {name: column(f"state.{name}", tree) for name, tree in state._asdict().items() if name != "step"}
    arrays_of_params = None if params is None else column("params", params)
    _check_columns(algorithm, updates, gradients, arrays_of_params, slots)
    likes = slots["square_avg"] if arrays_of_params is None else arrays_of_params
    arrays = [OneArray(*row) for row in zip(gradients, column("params", decayed), *slots.values(), strict=True)]
    updated = iter(_update_in_batches(algorithm.equations, numbers, [array for array in arrays if array.g is not None]))
    done = [
        array._replace(g=_no_update(array.square_avg, like)) if array.g is None else next(updated)
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


def _at_step(numbers: Numbers, step: jax.Array) -> dict[str, Any]:
    """The numbers of this update: schedules are read, and what Python can subtract from 1 has its gain beside it.

    Python and NumPy subtract in double precision, as torch does: 1 − float32(0.99) is off by 1e-6. The gain of a
    ``jax.Array`` is left to the program.
    """
    now = {name: _read(name, number, step) for name, number in numbers.items()}
    in_double = {name: x for name, x in now.items() if name in _GAINS and isinstance(x, float | np.ndarray)}
    gains = {_GAINS[name]: 1.0 - float(x) for name, x in in_double.items()}
    return gains | now


def _read(name: str, number: Any, step: jax.Array) -> Any:
    """``number``, or what a schedule says at ``step``."""
    if not callable(number):
        return number
    checks = {"alpha": check_smoothing, "eps": check_eps}
    return checks.get(name, check_number)(f"the schedule of {name}", number(step))


def _only_arrays(params: optax.Params | None) -> optax.Params | None:
    """``params`` with ``None`` in place of every leaf that is no floating or complex array."""
    return jax.tree.map(lambda p: p if _is_array(p) and _kind(p.dtype) is not None else None, params)


def _no_update(slots: Any, params: Any) -> Any:
    """The update where there is no gradient: zero for a parameter that has a slot, ``None`` for everything else."""

    def leaf(slot: Any, param: Any) -> Any:
        return None if _is_absent(slot) or _is_absent(param) else jnp.zeros_like(param)

    return jax.tree.map(leaf, slots, params, is_leaf=_is_absent)


def _bias_corrected(alpha: jax.Array, gain: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The ``alpha`` and ``gain`` of this step with which an average is its own bias-corrected value.

    They add up to 1, so every recurrence above holds as it stands, the centered one included::

        gain  = (1 − alpha) / (1 − alphaᵗ)      alpha = alpha · (1 − alphaᵗ⁻¹) / (1 − alphaᵗ)

    The latter is exactly 0 at t = 1.
    """
    before, now = _one_minus_power(alpha, gain, step - 1), _one_minus_power(alpha, gain, step)
    return alpha * before / now, gain / now


def _one_minus_power(alpha: jax.Array, gain: jax.Array, t: jax.Array) -> jax.Array:
    """1 − alphaᵗ, where nothing cancels for alpha near 1 and the derivative is right down to alpha = 0."""
    is_small = alpha < 0.5
    log_alpha = jnp.log1p(-jnp.where(is_small, 0.5, gain))
    # An integer exponent, since 0 to the power of the float 0 has no derivative.
    power = jax.lax.pow(jnp.where(is_small, alpha, 0.5), t)
    return jnp.where(is_small, 1 - power, -jnp.expm1(t.astype(alpha.dtype) * log_alpha))


def _new_slot(param: Any, value: ArrayLike, accumulator_dtype: np.dtype | None) -> jax.Array:
    dtype = _slot_dtype(_dtype(param), accumulator_dtype)
    if _kind(dtype) is complex:
        real = jnp.asarray(value, jnp.finfo(dtype).dtype)
        value = jax.lax.complex(real, real)
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


def _is_function(mask: Any) -> bool:
    """Whether a mask is a function of the parameters. As in Optax, a tree is a mask, even one with ``__call__``."""
    try:
        leaves = jax.tree.leaves(mask)
    except SystemError:  # so JAX says that a tree is nested too deeply
        return False
    return isinstance(mask, jax.tree_util.Partial) or (bool(leaves) and all(callable(leaf) for leaf in leaves))


def _decayed(params: optax.Params | None, mask: Any) -> optax.Params:
    """The parameters that decay, with ``None`` in the place of those that do not."""
    if params is None:
        raise ValueError(
            "params must be given where weight_decay is: call update(updates, state, params). (A weight_decay that is "
            "an array counts, even if it is 0; optax.inject_hyperparams makes an array of every number.)"
        )
    params = jax.tree.map(lambda p: p if _is_trainable(p) else None, params)
    if mask is None:
        return params
    _check_prefix("weight_decay_mask", mask, params)

    def choose(path: Any, decays: Any, param: Any) -> Any:
        chosen = check_flag(f"weight_decay_mask{jax.tree_util.keystr(path)}", decays)
        return param if chosen else jax.tree.map(lambda _: None, param)

    return jax.tree_util.tree_map_with_path(choose, mask, params)


# --- The public transformations --------------------------------------------------------------------------


@explain_arguments
def scale_by_rmsprop(
    alpha: optax.ScalarOrSchedule = 0.99,
    eps: optax.ScalarOrSchedule = 1e-8,
    momentum: optax.ScalarOrSchedule = 0.0,
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

    Every numeric argument but ``initial_scale`` is a number, a scalar array (a tracer included) or a schedule, a
    function from the number of updates so far to one of the two: 0 for the first update, like torch's
    ``scheduler.step()`` after ``optimizer.step()``. Numbers are used in float32 at least, never rounded to the dtype of
    a half-precision parameter. A transformation built with other numbers finds the same compiled program, unless
    momentum goes from 0 to something or back. (Inside your own ``jit`` a Python number is a constant;
    ``optax.inject_hyperparams`` makes it data.)

    Args:
      alpha: smoothing constant, 0 ≤ alpha < 1, without unit. An array must be float32 at least: in bfloat16, 0.999
        is 1.
      eps: added to the denominator, in the unit of the gradient (of its square if ``eps_in_sqrt``): 0, or at least
        1.18e-38, since XLA takes smaller numbers for 0 in float32.
      momentum: decay of the momentum buffer, ≥ 0. The number 0 means that there is no buffer: no memory,
        no work. An array or a schedule always has one, whatever its value, so that structure never depends on data.
      centered: divide by the standard deviation of the gradient instead of its root mean square.
      eps_in_sqrt: add ``eps`` under the root, as TensorFlow and Keras do.
      initial_scale: what ``square_avg`` starts from, ≥ 0, in the unit of g²: 0 in torch, 1 in TensorFlow.
      bias_correction: store bias-corrected averages: each holds v/(1 − alphaᵗ) where the plain average, started
        from 0, would hold v. ``initial_scale`` must then be 0. The correction counts all updates, including those in
        which an array had no gradient. If alpha is a schedule, the weight of the new g² is (1 − alpha)/(1 − alphaᵗ)
        with the current alpha.
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
      of its state if ``update`` is not given ``params``). Leaves that are neither arrays nor floats (flags,
      functions, random keys) have no slots, and their update is ``None``; so a whole Equinox model can be
      ``params``. Infinite and NaN gradients
      reach the state and the update, as in torch; ``optax.apply_if_finite`` keeps them out. Complex arrays
      are two real ones, as in torch (``view_as_real``); note that ``jax.grad`` returns the conjugate of
      the gradient that torch returns.

    Raises:
      ValueError: when built, if a number is NaN or out of range, an array is not a scalar, or
        ``accumulator_dtype`` is float64 without ``jax_enable_x64``; at ``update``, if the gradients or the
        state do not match the parameters ``init`` saw (the message names the first path that differs).
      TypeError: when built, if an argument has the wrong type; at ``init``, if a parameter is an array of integers
        or bools (the message names it); at ``update``, if a gradient is not of its parameter's kind or a slot of the
        state has another dtype than ``init`` gives. (A ``step`` that is an integer of another width is converted.)

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

    and all of it in one precision, rounded to the dtype of the gradient at the end only.

    The learning rate never enters the momentum buffer: after it changes, the whole buffer is applied at the
    new rate, as in torch. See :func:`scale_by_rmsprop` for the scaling itself, for half precision, zero,
    missing and non-finite gradients, and for complex parameters.

    Args:
      lr: learning rate, ≥ 0, in units of the parameter per step. As for every number here, it may be a schedule (see
        :func:`scale_by_rmsprop`). A schedule reads ``RMSPropState.step``, so the state looks the same for a
        constant and a schedule, and a run restored from a checkpoint continues its schedule where it was.
      alpha: smoothing constant, 0 ≤ alpha < 1.
      eps: added to the root of the average, ≥ 0, in the unit of the gradient.
      weight_decay: L2 penalty, ≥ 0, added to the gradient *before* the scaling (``update`` then needs
        ``params``). The number 0 leaves it out of the program.
      momentum: decay of the momentum buffer, ≥ 0. The number 0 means no buffer.
      centered: divide by the standard deviation of the gradient instead of its root mean square.
      maximize: climb the objective instead of descending it.
      weight_decay_mask: which parameters decay: a tree of bools like ``params`` (or a prefix of it), or a
        function from ``params`` to one. ``None`` means all of them. As in Optax, a tree that has a ``__call__``, such
        as an Equinox module, is a tree.
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
        "lr": check_number_or_schedule("lr", lr),
        "weight_decay": check_number_or_schedule("weight_decay", weight_decay),
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
        "alpha": check_smoothing("alpha", alpha),
        "eps": check_eps("eps", eps),
        "momentum": check_number_or_schedule("momentum", momentum),
    }


def unless_zero(number: Any, equation: Equation) -> tuple[Equation, ...]:
    """A number that is 0 leaves its equation out; an array or a schedule never does: structure hangs on no data."""
    return () if isinstance(number, float) and number == 0 else (equation,)


def _scaling_equations(numbers: Numbers, centered: Any, eps_in_sqrt: Any) -> tuple[Equation, ...]:
    return (
        centered_average if check_flag("centered", centered) else average,
        divide_eps_inside if check_flag("eps_in_sqrt", eps_in_sqrt) else divide_eps_outside,
        *unless_zero(numbers["momentum"], add_momentum),
    )


# --- Checks of trees -------------------------------------------------------------------------------------


def _check_params(params: optax.Params) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if _is_array(leaf) and not _is_trainable(leaf) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} must be floating or complex, got {leaf.dtype}; leave it out with "
                "optax.masked, or make it None"
            )


def _check_state(state: Any, algorithm: Algorithm) -> None:
    if not isinstance(state, RMSPropState):
        raise ValueError(
            f"state must be the RMSPropState that init returned, got {type(state).__name__}; take it out of the "
            "state of a chain, and restore a checkpoint into what init returns"
        )
    kept = algorithm.slots()
    for name, cause in (("grad_avg", "centered"), ("momentum_buffer", "momentum")):
        if state.square_avg is not None and (getattr(state, name) is None) == kept[name]:
            raise ValueError(
                f"state.{name} is {'None' if kept[name] else 'not None'}, so the state belongs to a "
                f"transformation with another setting of {cause}; call init again or keep the setting"
            )


def _checked_step(step: Any) -> jax.Array:
    """The number of updates as ``init`` gives it, an int32 scalar; integers of another width are converted."""
    if isinstance(step, jax.Array) and step.dtype == jnp.int32 and not step.shape:
        return step
    if isinstance(step, int) and not isinstance(step, bool):
        step = np.asarray(step)
    if not hasattr(step, "dtype") or not jnp.issubdtype(step.dtype, jnp.integer):
        got = step.dtype if hasattr(step, "dtype") else shown(step)
        raise TypeError(
            f"state.step must be an int32 scalar as init gives it, got {got}; a narrow float stops counting "
            "(bfloat16 at 256), so leave it out when you cast a state, or count again from a number that you know"
        )
    if step.shape:
        raise ValueError(
            f"state.step must be an int32 scalar as init gives it, got shape {step.shape}; update many states at once "
            "with jax.vmap"
        )
    largest = jnp.iinfo(jnp.int32).max
    if jnp.iinfo(step.dtype).max > largest:
        step = step.clip(max=largest)
    counted: jax.Array = step.astype(jnp.int32)
    return counted


def _flatten_like(name: str, tree: Any, updates: optax.Updates, structure: Any) -> list[Any]:
    """The part of ``tree`` that belongs to each gradient."""
    try:
        parts: list[Any] = structure.flatten_up_to(tree)
    except ValueError:
        difference = _first_difference("updates", updates, name, tree, "gradient")
        raise ValueError(f"updates must have the structure of {name}, but {difference}") from None
    return parts


def _check_prefix(name: str, prefix: Any, params: optax.Params) -> None:
    try:
        jax.tree.map(lambda *_: None, prefix, params)
    except ValueError:
        difference = _first_difference(name, prefix, "params", params, "counterpart")
    except SystemError:  # so JAX says that a tree is nested too deeply
        difference = f"it is nested deeper than params: {shown(prefix)}"
    else:
        return
    raise ValueError(f"{name} must be like params or a prefix of it, but {difference}") from None


def _first_difference(prefix_name: str, prefix: Any, name: str, tree: Any, part: str) -> str:
    """Says where ``prefix`` is not a prefix of ``tree``; ``part`` is what a leaf of the tree lacks then."""
    given = [path for path, _ in jax.tree_util.tree_leaves_with_path(prefix, is_leaf=_is_none)]
    expected = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_none)]
    reached = {path[:depth] for path in expected for depth in range(len(path) + 1)}
    covered = set(given)
    for path in expected:
        if not any(path[:depth] in covered for depth in range(len(path) + 1)):
            return f"{name}{jax.tree_util.keystr(path)} has no {part} in {prefix_name}"
    for path in given:
        if path not in reached:
            return f"{prefix_name}{jax.tree_util.keystr(path)} has no counterpart in {name}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(prefix, is_leaf=_is_none):
        if leaf is None and path not in expected:
            return f"{prefix_name}{jax.tree_util.keystr(path)} is None"
    return f"{shown(jax.tree.structure(prefix), 120)} is not {shown(jax.tree.structure(tree), 120)}"


def _check_columns(
    algorithm: Algorithm,
    updates: optax.Updates,
    gradients: list[Any],
    params: list[Any] | None,
    slots: Mapping[str, list[Any]],
) -> None:
    """Raises at the first gradient whose parameter or slot is not what ``init`` would have given it.

    A parameter must have the shape and the kind of its gradient. A slot must have the dtype of ``init`` too, since the
    averages would stay in whatever dtype they came in.
    """
    kept = [name for name, is_kept in algorithm.slots().items() if is_kept]
    for i, g in enumerate(gradients):
        if g is None:
            continue
        param = None if params is None else params[i]
        if param is not None and not _is_like(g, param):
            raise _mismatch(updates, i, "params", param)
        for name in kept:
            slot = slots[name][i]
            if not _is_like(g, slot):
                raise _mismatch(updates, i, f"state.{name}", slot)
            dtype = _expected_dtype(algorithm, g, param, slots[kept[0]][i])
            if slot.dtype != dtype:
                raise TypeError(
                    f"state.{name}{_path(updates, i)} has dtype {slot.dtype}, but init gives {dtype}; convert it with "
                    "astype, or build the transformation with the accumulator_dtype that you want"
                )


def _expected_dtype(algorithm: Algorithm, g: Any, param: Any, square_avg: Any) -> np.dtype:
    """The dtype in which ``init`` makes a slot. Without the parameter, only its lower limit is known: float32."""
    if param is None and algorithm.accumulator_dtype is None:
        return _slot_dtype(square_avg.dtype, None)
    return _slot_dtype((g if param is None else param).dtype, algorithm.accumulator_dtype)


def _mismatch(updates: optax.Updates, i: int, name: str, part: Any) -> ValueError | TypeError:
    """The error for gradient number ``i``, which does not fit ``part`` of the tree ``name``."""
    g, path = jax.tree.leaves(updates, is_leaf=_is_none)[i], _path(updates, i)
    if part is None or isinstance(part, optax.MaskedNode):
        return ValueError(
            f"updates{path} is a gradient, but {name}{path} has no slot for it; init gives one to every floating or "
            "complex array that params have"
        )
    if not _is_array(part):
        return ValueError(f"updates{path} is one array, but {name}{path} is {shown(part)}")
    if jnp.shape(g) != part.shape:
        return ValueError(f"updates{path} has shape {jnp.shape(g)}, but {name}{path} has shape {part.shape}")
    return TypeError(f"updates{path} has dtype {_dtype(g)}, but {name}{path} has dtype {part.dtype}")


def _path(updates: optax.Updates, i: int) -> str:
    """The path of gradient number ``i``."""
    return jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(updates, is_leaf=_is_none)[i][0])


def _is_like(g: Any, part: Any) -> bool:
    """Whether ``part`` is an array of the shape and the kind of ``g``: real or complex."""
    return _is_array(part) and g.shape == part.shape and _kind(g.dtype) is _kind(part.dtype) is not None


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
        dtype = jnp.dtype(jnp.complex128 if _arithmetic_dtype(dtype) == jnp.float64 else jnp.complex64)
    return dtype


def _is_trainable(leaf: Any) -> bool:
    """Whether a leaf of the parameters gets slots: a floating or complex array or Python number."""
    return isinstance(leaf, float | complex) or (_is_array(leaf) and _kind(leaf.dtype) is not None)


def _is_array(x: Any) -> bool:
    """Whether ``x`` is an array or stands for one (``jax.ShapeDtypeStruct``); a dtype itself has no shape."""
    return hasattr(x, "dtype") and hasattr(x, "shape")


def _is_none(x: Any) -> bool:
    return x is None


def _is_absent(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)
