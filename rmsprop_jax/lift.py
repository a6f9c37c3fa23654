"""From one array to a parameter tree, as one program.

Read from the top down: what is decided when a transformation is built; the transformation; its update of a tree and of
one leaf; the numbers of an update; how a state starts; which parameters decay.
"""

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from rmsprop_jax.arguments import (
    check_eps,
    check_flag,
    check_float_dtype,
    check_mask,
    check_number,
    check_returned,
    check_smoothing,
    is_zero,
    known,
)
from rmsprop_jax.equations import (
    Equation,
    Leaf,
    add_momentum,
    add_nesterov_momentum,
    average_steps,
    centered_average,
    decay_weights,
    decay_weights_corrected,
    decay_weights_decoupled,
    divide_eps_inside,
)
from rmsprop_jax.placement import new_counter
from rmsprop_jax.state import (
    Answer,
    RMSPropState,
    Settings,
    SettingsQuery,
    arithmetic_dtype,
    is_absent,
    is_array,
    is_trainable,
    kind,
    slot_dtype,
)
from rmsprop_jax.trees import check_leaves, check_params, check_prefix, checked_state, flatten_like, is_none

Numbers = Mapping[str, Any]  # hyperparameters by name, and 1 minus a smoothing constant

_COMPLEMENTS = {"alpha": "one_minus_alpha", "momentum": "one_minus_momentum"}


@functools.cache
def _numbers_of(equation: Equation) -> tuple[str, ...]:
    """The names of the numbers that an equation takes."""
    return tuple(inspect.signature(equation).parameters)[1:]


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """What is decided when a transformation is built, and is the same in every update.

    It holds the equations where libraries that rewrite closures do not look. Optimistix replaces the functions that
    it finds in one, and a replaced function would no longer count as the same equation.
    """

    equations: tuple[Equation, ...]
    bias_correction: bool
    accumulator_dtype: np.dtype | None

    def names_of_numbers(self) -> set[str]:
        """The names of all numbers that the equations take."""
        return {name for equation in self.equations for name in _numbers_of(equation)}

    def has(self, *equations: Equation) -> bool:
        """Whether one of ``equations`` is among those of the algorithm."""
        return any(equation in self.equations for equation in equations)

    def decays(self) -> bool:
        """Whether the update needs the parameters."""
        return self.has(decay_weights, decay_weights_decoupled, decay_weights_corrected)

    def slots(self) -> dict[str, bool]:
        """For each slot of the state whether the algorithm keeps it."""
        return {
            "square_avg": True,
            "grad_avg": self.has(centered_average),
            "momentum_buffer": self.has(add_momentum, add_nesterov_momentum, average_steps),
        }


def unless_zero(number: Any, equation: Equation) -> tuple[Equation, ...]:
    """Leaves out an equation whose number is the Python number 0.

    An array or a schedule always keeps it, whatever its value, so that structure never depends on data.
    """
    return () if is_zero(number) else (equation,)


# --- The transformation --------------------------------------------------------------------------------------


def transformation(
    equations: Sequence[Equation],
    numbers: Numbers,
    *,
    initial_scale: chex.Numeric = 0.0,
    bias_correction: bool = False,
    weight_decay_mask: Any = None,
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The gradient transformation that applies ``equations`` to every leaf of a tree.

    A number that is a function is a schedule and is read at ``RMSPropState.step``.
    """
    dtype = check_float_dtype("accumulator_dtype", accumulator_dtype)
    algorithm = Algorithm(tuple(equations), bias_correction, dtype)
    if bias_correction and known(initial_scale) not in (None, 0.0):
        raise ValueError(f"initial_scale must be 0 with bias_correction, which forgets the start, got {initial_scale}")
    settings = Settings(numbers.get("lr", 1.0), numbers.get("eps", 0.0), algorithm.has(divide_eps_inside))
    mask_is_function = _is_function(check_mask("weight_decay_mask", weight_decay_mask))

    def init(params: optax.Params) -> RMSPropState:
        check_params(params)
        return _initial_state(algorithm, initial_scale, params)

    def update(
        updates: optax.Updates, state: RMSPropState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, RMSPropState]:
        query = extra_args.get("rmsprop_settings")
        if isinstance(query, SettingsQuery):
            query.answers.append(Answer(state, settings, algorithm.equations, bias_correction, initial_scale))
            return updates, state
        state = checked_state(state, algorithm.slots())
        trained, decays = _trained(params, updates), None
        if algorithm.decays():
            mask = weight_decay_mask
            if mask_is_function and params is not None:
                mask = check_returned("weight_decay_mask", mask(params))
            decays = _decays(mask, params, trained)
        done: tuple[optax.Updates, RMSPropState]
        done = _update_tree(algorithm, _at_step(algorithm, numbers, state.step), updates, state, trained, decays)
        return done

    return optax.GradientTransformationExtraArgs(init, update)


@functools.partial(jax.jit, static_argnames=("algorithm", "decays"))
def _update_tree(
    algorithm: Algorithm,
    numbers: Numbers,
    updates: optax.Updates,
    state: RMSPropState,
    params: optax.Params | None,
    decays: tuple[bool, ...] | None,
) -> tuple[optax.Updates, RMSPropState]:
    """One compiled program for a whole tree.

    Jitted at module level, with the numbers as data: a transformation that is built anew for every call, as
    ``optax.inject_hyperparams`` builds it, finds the program that is already there.
    """
    step = optax.safe_increment(state.step)
    numbers = _completed(algorithm, numbers, step)
    # Python numbers are arrays by now, except under jax.disable_jit.
    updates, params = jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), (updates, params))
    gradients, structure = jax.tree.flatten(updates, is_leaf=is_none)

    def column(name: str, tree: Any) -> list[Any]:
        return [None] * len(gradients) if tree is None else flatten_like(name, tree, updates, structure)

    is_kept = algorithm.slots()
    slots = {name: column(f"state.{name}", getattr(state, name)) for name in is_kept}
    likes = None if params is None else column("params", params)
    kept = {name: slots[name] for name in slots if is_kept[name]}
    check_leaves(updates, gradients, likes, kept, algorithm.accumulator_dtype)
    decayed = column("params", _where(decays, params) if algorithm.decays() else None)
    leaves = [Leaf(*row) for row in zip(gradients, decayed, *slots.values(), strict=True)]
    for i, like in enumerate(slots["square_avg"] if likes is None else likes):
        if gradients[i] is None:
            leaves[i] = leaves[i]._replace(update=_no_update(leaves[i].square_avg, like))
    for batch in _batches(leaves, [i for i, g in enumerate(gradients) if g is not None]):
        update = _update_batch if len(batch) == _BATCH else _update_leaves
        for i, leaf in zip(batch, update(algorithm.equations, numbers, [leaves[i] for i in batch]), strict=True):
            leaves[i] = leaf

    def tree(name: str) -> Any:
        return jax.tree.unflatten(structure, [getattr(leaf, name) for leaf in leaves])

    return tree("update"), RMSPropState(
        step=step,
        square_avg=tree("square_avg"),
        grad_avg=None if state.grad_avg is None else tree("grad_avg"),
        momentum_buffer=None if state.momentum_buffer is None else tree("momentum_buffer"),
    )


def _no_update(slots: Any, params: Any) -> Any:
    """The update where there is no gradient: zero for a parameter that has a slot, ``None`` for everything else."""

    def leaf(slot: Any, param: Any) -> Any:
        return None if is_absent(slot) or is_absent(param) else jnp.zeros_like(param)

    return jax.tree.map(leaf, slots, params, is_leaf=is_absent)


_BATCH = 8


def _batches(leaves: Sequence[Leaf], positions: Sequence[int]) -> Iterator[list[int]]:
    """Groups leaves of equal shapes and dtypes in eights. One traced call serves eight, and then the next eight."""
    alike: dict[Any, list[int]] = {}
    for i in positions:
        signature = tuple(None if part is None else (part.shape, part.dtype) for part in leaves[i])
        alike.setdefault(signature, []).append(i)
    for group in alike.values():
        for start in range(0, len(group), _BATCH):
            yield group[start : start + _BATCH]


def _update_leaves(equations: tuple[Equation, ...], numbers: Numbers, leaves: Sequence[Leaf]) -> list[Leaf]:
    return [_update_leaf(equations, numbers, leaf) for leaf in leaves]


_update_batch = jax.jit(_update_leaves, static_argnames="equations")


@functools.partial(jax.jit, static_argnames="equations")
def _update_leaf(equations: tuple[Equation, ...], numbers: Numbers, leaf: Leaf) -> Leaf:
    """Applies ``equations`` in order, in the dtype of the state or float32 if that is narrower.

    Jitted separately, so that leaves of equal shape and dtype are traced and lowered once.
    """
    dtype = arithmetic_dtype(leaf.square_avg.dtype)
    numbers = {name: x.astype(dtype) for name, x in numbers.items()}
    is_complex = kind(leaf.update.dtype) is complex  # two real arrays, as torch's view_as_real
    done = []
    for component in (jnp.real, jnp.imag) if is_complex else (jnp.asarray,):
        part: Leaf = jax.tree.map(lambda x, component=component: jnp.asarray(component(x), dtype), leaf)
        for equation in equations:
            part = equation(part, **{name: numbers[name] for name in _numbers_of(equation)})
            if equation is centered_average:
                part = _written_in_order(part)
        done.append(part._replace(param=None))
    whole = jax.tree.map(jax.lax.complex, *done) if is_complex else done[0]
    rounded: Leaf = jax.tree.map(lambda new, old: new.astype(old.dtype), whole, leaf._replace(param=None))
    return rounded


def _written_in_order(leaf: Leaf) -> Leaf:
    """Returns ``leaf`` after ``centered_average`` unchanged; on CPU, XLA then copies nothing.

    XLA's CPU compiler writes each output in its own loop. The loop of ``square_avg`` reads the old ``grad_avg``, and
    both loops read the decayed parameter. If their order is left open, XLA first copies what will be overwritten.
    """
    grad_avg = _written_after(leaf.square_avg, leaf.grad_avg)
    if leaf.param is None:
        return leaf._replace(grad_avg=grad_avg)
    return leaf._replace(grad_avg=grad_avg, update=_written_after(leaf.square_avg, leaf.update, grad_avg))


def _written_after(square_avg: jax.Array, x: jax.Array, also: jax.Array | None = None) -> jax.Array:
    """Returns ``x`` unchanged; on CPU it adds a false dependency, so that XLA writes it after ``square_avg``.

    It comes after ``also`` too, if given. A negative average does not exist, but XLA does not know that
    (benchmarks/NOTES.md). (A traced alpha above 1, which nobody checks, can make one. Its root is NaN anyway.)
    """
    same: jax.Array = jax.lax.platform_dependent(
        square_avg,
        x,
        square_avg if also is None else also,
        cpu=lambda square_avg, x, also: jnp.where(square_avg < 0, also, x),
        default=lambda square_avg, x, also: x,
    )
    return same


# --- The numbers of an update --------------------------------------------------------------------------------


def _at_step(algorithm: Algorithm, numbers: Numbers, step: jax.Array) -> dict[str, Any]:
    """The numbers that the equations take, with schedules read.

    1 minus a smoothing constant of Python or NumPy is taken here, in double precision, as torch does: 1 − float32(0.99)
    is off by 1e-6.
    """
    taken = algorithm.names_of_numbers()
    now = {name: _read(name, x, step) for name, x in numbers.items() if name in taken}
    return now | {
        complement: one_minus(now[name])
        for name, complement in _COMPLEMENTS.items()
        if complement in taken and isinstance(now[name], float | np.ndarray)
    }


def _completed(algorithm: Algorithm, numbers: Numbers, step: jax.Array) -> dict[str, jax.Array]:
    """All numbers in JAX's own float, with the complement of every smoothing constant, bias-corrected if wanted."""
    completed = {name: jnp.asarray(x, float) for name, x in numbers.items()}
    for name, complement in _COMPLEMENTS.items():
        if complement in algorithm.names_of_numbers():
            alpha = completed[name]
            rest = completed.get(complement, one_minus(alpha))
            completed[name], completed[complement] = (
                _bias_corrected(alpha, rest, step) if algorithm.bias_correction else (alpha, rest)
            )
    return completed


def one_minus(alpha: Any) -> Any:
    """1 − alpha: in Python for a number of Python or NumPy, and in JAX's own float for an array."""
    return 1.0 - float(alpha) if isinstance(alpha, float | np.ndarray) else 1 - jnp.asarray(alpha, float)


def _read(name: str, number: Any, step: jax.Array) -> Any:
    """``number``, or what a schedule says at ``step``."""
    if not callable(number):
        return number
    checks = {"alpha": check_smoothing, "eps": check_eps}
    return checks.get(name, check_number)(f"the schedule of {name}", number(step))


def _bias_corrected(alpha: jax.Array, one_minus_alpha: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two weights of this step with which an average is its own bias-corrected value.

    They add up to 1, so every recurrence holds as it stands::

        1 − alpha ← (1 − alpha) / (1 − alphaᵗ)      alpha ← alpha · (1 − alphaᵗ⁻¹) / (1 − alphaᵗ)

    The latter is exactly 0 at t = 1.
    """
    before, now = (one_minus_power(alpha, one_minus_alpha, t) for t in (step - 1, step))
    return alpha * before / now, one_minus_alpha / now


def one_minus_power(alpha: jax.Array, one_minus_alpha: jax.Array, t: jax.Array) -> jax.Array:
    """1 − alphaᵗ, where nothing cancels for alpha near 1 and the derivative is right down to alpha = 0."""
    is_small = alpha < 0.5
    log_alpha = jnp.log1p(-jnp.where(is_small, 0.5, one_minus_alpha))
    # An integer exponent, since 0 to the power of the float 0 has no derivative.
    power = jax.lax.pow(jnp.where(is_small, alpha, 0.5), t)
    return jnp.where(is_small, 1 - power, -jnp.expm1(t.astype(alpha.dtype) * log_alpha))


# --- The first state -----------------------------------------------------------------------------------------


def _initial_state(algorithm: Algorithm, initial_scale: chex.Numeric, params: optax.Params) -> RMSPropState:
    kept = algorithm.slots()

    def slots(name: str, value: chex.Numeric) -> optax.Params | None:
        if not kept[name]:
            return None
        dtype = algorithm.accumulator_dtype
        return jax.tree.map(lambda p: _new_slot(p, value, dtype) if is_trainable(p) else None, params)

    return RMSPropState(
        step=new_counter(params),
        square_avg=slots("square_avg", initial_scale),
        grad_avg=slots("grad_avg", 0.0),
        momentum_buffer=slots("momentum_buffer", 0.0),
    )


def _new_slot(param: Any, value: chex.Numeric, accumulator_dtype: np.dtype | None) -> jax.Array:
    param_dtype = jnp.result_type(param.dtype if isinstance(param, jax.ShapeDtypeStruct) else param)
    dtype = slot_dtype(param_dtype, accumulator_dtype)
    if kind(dtype) is complex:
        real = jnp.asarray(value, jnp.finfo(dtype).dtype)
        value = jax.lax.complex(real, real)
    slot: jax.Array = jnp.full_like(param, value, dtype=dtype)  # takes over the sharding of param
    return slot


# --- Which parameters are trained, and which decay -----------------------------------------------------------


def _trained(params: optax.Params | None, updates: optax.Updates) -> optax.Params | None:
    """``params`` with ``None`` in place of every leaf that cannot be trained.

    A Python number is trained if it has a gradient. Without one it is an attribute of a module.
    """
    leaves, structure = jax.tree.flatten(params)
    if any(isinstance(leaf, float | complex) for leaf in leaves):
        gradients = {path for path, _ in jax.tree_util.tree_leaves_with_path(updates)}
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        leaves = [p if path in gradients or is_array(p) else None for path, p in zip(paths, leaves, strict=True)]
    return jax.tree.unflatten(structure, [p if is_trainable(p) else None for p in leaves])


def _is_function(mask: Any) -> bool:
    """Whether a mask is a function of the parameters. As in Optax, a tree is a mask, even one with ``__call__``."""
    try:
        leaves = jax.tree.leaves(mask)
    except SystemError:  # JAX's error for a tree that is nested too deeply
        return False
    return isinstance(mask, jax.tree_util.Partial) or (bool(leaves) and all(callable(leaf) for leaf in leaves))


def _decays(mask: Any, params: optax.Params | None, trained: optax.Params | None) -> tuple[bool, ...] | None:
    """For each leaf of ``trained``, which is ``params`` or a part of them, whether it decays; ``None`` if all do."""
    if params is None:
        raise ValueError(
            "params must be given where weight_decay is: call update(updates, state, params). (A weight_decay that is "
            "an array counts, even if it is 0; optax.inject_hyperparams makes an array of every number.)"
        )
    if mask is None:
        return None
    params = jax.tree.map(lambda p: p if is_trainable(p) else None, params)
    check_prefix("weight_decay_mask", mask, params)

    def choose(path: Any, decays: Any, param: Any) -> Any:
        chosen = check_flag(f"weight_decay_mask{jax.tree_util.keystr(path)}", decays)
        return jax.tree.map(lambda _: chosen, param)

    chosen = jax.tree_util.tree_map_with_path(choose, mask, params)
    return tuple(jax.tree.leaves(jax.tree.map(lambda p, x: None if p is None else x, trained, chosen, is_leaf=is_none)))


def _where(decays: tuple[bool, ...] | None, params: optax.Params) -> optax.Params:
    """``params`` with ``None`` in place of those that do not decay."""
    if decays is None:
        return params
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, [p if chosen else None for p, chosen in zip(leaves, decays, strict=True)])
