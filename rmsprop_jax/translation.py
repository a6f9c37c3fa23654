"""A setting of one dialect in the words of another, and what does not carry over.

How far apart two dialects are can be known before a run. ``eps_out = √eps_in`` keeps the two denominators within a
factor [1, √2] of each other for every v. An average that starts from 1 differs from one that starts from 0 by exactly
alphaᵗ. At a constant learning rate, a momentum buffer with the learning rate inside is lr times the other. A buffer of
averaged steps is 1 − momentum times a buffer of added steps.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import dialects, storage
from rmsprop_jax.arguments import (
    SMALLEST_NORMAL,
    check_eps,
    check_number,
    check_number_or_schedule,
    check_numbers,
    check_smoothing,
    is_zero,
    known,
    shown,
)
from rmsprop_jax.conversion import check_state, converted
from rmsprop_jax.equations import (
    add_momentum,
    add_nesterov_momentum,
    apply_caution,
    average_steps,
    centered_average,
    decay_weights_corrected,
    decay_weights_decoupled,
    divide_eps_inside,
    divide_eps_outside,
    negate,
    scale_by_lr,
)
from rmsprop_jax.lift import one_minus
from rmsprop_jax.state import SettingsQuery, find_states, replace_states
from rmsprop_jax.transform import rmsprop

__all__ = ["DIALECTS", "Dialect", "Translation", "structure_of", "translate"]


class Dialect(NamedTuple):
    """One row of the table of dialects.

    Attributes:
      build: the function that makes the transformation.
      framework: whose RMSProp it is, a class or a paper.
      names: what the dialect calls each of the things that it lets its user choose. The keys are torch's names, and
        those of the structure that :func:`structure_of` reads.
    """

    build: Callable[..., optax.GradientTransformationExtraArgs]
    framework: str
    names: Mapping[str, str]


def _names(*same: str, **own: str) -> dict[str, str]:
    return {"lr": "lr", "alpha": "alpha", "eps": "eps"} | {name: name for name in same} | own


DIALECTS: Mapping[str, Dialect] = {
    "torch": Dialect(rmsprop, "torch.optim.RMSprop", _names("momentum", "centered", "weight_decay")),
    "tensorflow": Dialect(
        dialects.tensorflow,
        "tf.compat.v1.train.RMSPropOptimizer",
        _names("momentum", "centered", lr="learning_rate", alpha="decay", eps="epsilon"),
    ),
    "keras": Dialect(
        dialects.keras,
        "keras.optimizers.RMSprop",
        _names("momentum", "centered", "weight_decay", lr="learning_rate", alpha="rho", eps="epsilon"),
    ),
    "timm": Dialect(
        dialects.timm,
        "timm.optim.RMSpropTF",
        _names(
            *("momentum", "centered", "weight_decay", "decoupled_decay", "corrected_weight_decay", "caution"),
            lr_in_buffer="lr_in_momentum",
            max_lr="max_lr_snapshot",
        ),
    ),
    "stable_baselines3": Dialect(
        dialects.stable_baselines3,
        "stable_baselines3.common.sb2_compat.rmsprop_tf_like.RMSpropTFLike",
        _names("momentum", "centered", "weight_decay"),
    ),
    "optax": Dialect(
        dialects.optax,
        "optax.rmsprop",
        _names(
            *("momentum", "centered", "eps_in_sqrt", "initial_scale", "nesterov", "bias_correction"),
            lr="learning_rate",
            alpha="decay",
        ),
    ),
    "dqn": Dialect(
        dialects.dqn,
        "Nature DQN (Mnih et al. 2015)",
        _names(lr="learning_rate", alpha="squared_gradient_momentum", eps="min_squared_gradient"),
    ),
    "dreamer": Dialect(dialects.dreamer, "DreamerV3", _names(alpha="beta2", momentum="beta1")),
}

# What a dialect has that does not know the word.
_ABSENT: Mapping[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "max_lr": None}
_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {"alpha": check_smoothing, "eps": check_eps}
_LARGEST = float(np.finfo(np.float32).max)


# --- What a translation is -----------------------------------------------------------------------------------


class Translation(NamedTuple):
    """A setting of one dialect in the words of another, and what does not carry over.

    It prints as the target's name with its arguments, rounded, and the notes below.

    Attributes:
      target: the dialect it was translated into, a key of :data:`DIALECTS`.
      arguments: all of the target's arguments that say something, none left to a default.
      notes: a sentence for each thing that is not exactly equal; empty if the two are the same optimizer.
      before, after: both settings in neutral terms, by name: the numbers ``lr``, ``alpha``, ``eps``, ``momentum``,
        ``weight_decay`` and ``max_lr`` (``None`` if not given), and the structure as :func:`structure_of` reads it.
        Numbers are floats here; arrays and schedules stay what they were.
    """

    target: str
    arguments: dict[str, Any]
    notes: tuple[str, ...]
    before: dict[str, Any]
    after: dict[str, Any]

    def __str__(self) -> str:
        """The target's name with its arguments, rounded, and the notes below."""
        values = ", ".join(
            f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={shown(value)}"
            for name, value in self.arguments.items()
        )
        return "\n".join([f"{self.target}({values})", *(f"- {note}" for note in self.notes)])

    def build(self) -> optax.GradientTransformationExtraArgs:
        """The target's transformation."""
        return DIALECTS[self.target].build(**self.arguments)

    def step_ratio(self, gradient: chex.Numeric, step: chex.Numeric) -> np.ndarray:
        """Target step ÷ source step.

        For gradients of root mean square ``gradient`` and mean 0, at update number ``step`` (from 1), both float and
        broadcast against each other. Momentum and the learning rate, which act on both alike, are left out::

            v     = alphaᵗ · initial_scale + (1 − alphaᵗ) · gradient²      gradient² with bias_correction
            ratio = denominator(v) of the source / denominator(v) of the target

        Where only the source averages its steps, which are then bias-corrected, the ratio is 1 − momentumᵗ times that;
        where only the target does, it is divided by 1 − momentumᵗ.

        A schedule of eps is read at ``step`` − 1, as the update reads it.

        Raises:
          ValueError: if ``gradient`` is negative, ``step`` below 1, or a smoothing constant a schedule.
          TypeError: if one of them is not a real number, or a number of the setting is a tracer.
        """
        sizes, steps = check_numbers("gradient", gradient, at_least=0.0), check_numbers("step", step, at_least=1.0)

        def denominator(setting: dict[str, Any]) -> np.ndarray:
            eps = _eps_at(setting["eps"], steps)
            alpha, start = (_known(name, setting[name]) for name in ("alpha", "initial_scale"))
            remembered = 0.0 * steps if setting["bias_correction"] else alpha**steps
            v = remembered * start + (1 - remembered) * sizes**2
            return np.asarray(np.sqrt(v + eps) if setting["eps_in_sqrt"] else np.sqrt(v) + eps)

        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            before, after = denominator(self.before), denominator(self.after)
            ratio = np.where(before == after, 1.0, before / after)  # 0 / 0 and ∞ / ∞ too
        if self.before["averages_steps"] == self.after["averages_steps"]:
            return ratio
        weight = 1 - _known("momentum", self.before["momentum"]) ** steps
        return np.asarray(ratio * weight if self.before["averages_steps"] else ratio / weight)

    def convert_state(self, opt_state: optax.OptState) -> optax.OptState:
        """The target's state for a run that has come to ``opt_state`` in the source's dialect.

        Every :class:`rmsprop_jax.RMSPropState` in ``opt_state`` is converted: the state itself, or those of a chain, a
        partition or a recorder. All of them must have the setting that was translated. Averages mean the same in both
        dialects, except that a bias-corrected average is a plain one without its start, divided by 1 − alphaᵗ. (Taking
        a start of 1 out of an average in float32 leaves an error of 1e-7, which is large for small gradients.) A
        momentum buffer changes its unit where only one of the two has the learning rate in it, or averages the steps.
        That is exact as long as learning rate and momentum have been constant. What :func:`storage.compress
        <rmsprop_jax.storage.compress>` keeps in 8 or 16 bits comes back in float32; :func:`storage.encode
        <rmsprop_jax.storage.encode>` encodes it again.

        Raises:
          ValueError: if there is no :class:`rmsprop_jax.RMSPropState`, or it belongs to a different setting; if the
            buffer changes its unit and the learning rate is a schedule, 0 or infinite; if a bias correction comes or
            goes and the smoothing constant is a schedule.
          TypeError: if a slot is not floating or complex, or a step not an integer.
        """
        find_states("state", opt_state)  # raises before JAX goes through a tree without end
        opt_state = storage.decode(opt_state)
        for place, state in find_states("state", opt_state).items():
            check_state(place, state, self.before)
        return replace_states(opt_state, lambda state: converted(state, self.before, self.after))


# --- How it is found -----------------------------------------------------------------------------------------


def translate(source: str, target: str, **arguments: Any) -> Translation:
    """The nearest setting of dialect ``target`` to ``arguments`` in dialect ``source``, and how near it is.

    - Where eps changes its place, ``eps_out = √eps_in`` and ``eps_in = eps_out²``.
    - Where only one of the two averages the steps and the other adds them up,
      ``lr_adding = lr_averaging · (1 − momentum)``.

    A schedule is translated into a schedule, a ``jax.Array`` into a ``jax.Array``, and inside ``jit`` a tracer into a
    tracer.

    Args:
      source: the dialect that the setting is in, a key of :data:`DIALECTS`.
      target: the dialect to say it in.
      **arguments: arguments of the source in its own names; those left out have the source's defaults.

    Returns:
      A :class:`Translation`.

    Raises:
      ValueError: if a dialect is unknown, a number is not one that the source takes, the target lacks something that
        the setting uses (weight decay of its kind, momentum, Nesterov's, caution, a centered average), or float32
        cannot hold the square of eps where that goes under the root.
      TypeError: if the source has no such argument or needs one that is missing.

    Example:
      >>> from rmsprop_jax.translation import translate
      >>> port = translate("tensorflow", "torch", learning_rate=0.016, momentum=0.9, epsilon=1e-3)
      >>> print(port)
      torch(lr=0.016, alpha=0.9, eps=0.0316228, momentum=0.9, centered=False, weight_decay=0)
      - eps is outside the root: the denominators are within a factor 1 to √2 of each other
      - the average starts from 0, not 1: the averages differ by alphaᵗ, which is 1% after 44 steps; compare that with v
      - the learning rate is not in the momentum buffer: the same as long as it is constant
      >>> print(port.step_ratio(gradient=1e-3, step=[1, 400]).round(1))  # too large at first
      [29.7  1. ]
    """
    for name, value in (("source", source), ("target", target)):
        if not isinstance(value, str) or value not in DIALECTS:
            raise ValueError(f"{name} must be one of {', '.join(DIALECTS)}, got {shown(value)}")
    before, words = _neutral(DIALECTS[source], arguments), DIALECTS[target]
    after = _neutral(words, {own: before[name] for name, own in words.names.items()})
    _check_structure(target, before, after)
    if after["eps_in_sqrt"] != before["eps_in_sqrt"]:
        after["eps"] = _moved_eps(DIALECTS[source].names["eps"], before["eps"], after["eps_in_sqrt"])
    if after["averages_steps"] != before["averages_steps"]:
        after["lr"] = _rescaled(before["lr"], before["momentum"], after["averages_steps"])
    chosen = {own: after[name] for name, own in words.names.items() if after[name] is not None}
    port = Translation(target, chosen, _notes(before, after), before, after)
    port.build()  # the target may take fewer numbers than the source
    return port


def structure_of(tx: optax.GradientTransformationExtraArgs) -> dict[str, Any]:
    """What the equations of an RMSProp say.

    Returns:
      By name: ``centered``; ``eps_in_sqrt``; ``decoupled_decay``; ``corrected_weight_decay``, whether that falls with
      the square of the learning rate; ``caution``, whether entries of a step that go against the gradient are dropped;
      ``lr_in_buffer``, whether the learning rate goes into the momentum buffer; ``buffer_sign``, −1 if the buffer holds
      updates instead of steps; ``averages_steps``, whether the buffer averages the steps instead of adding them up;
      ``nesterov``; ``bias_correction``; ``initial_scale``.

    Raises:
      ValueError: if ``tx`` is not an RMSProp of this package.
    """
    query = SettingsQuery()
    try:
        tx.update(None, None, None, rmsprop_settings=query)
    except Exception:  # whatever a transformation does without gradients
        query.answers.clear()
    if not query.answers:
        raise ValueError(f"tx must be an RMSProp of rmsprop_jax, got {shown(tx)}; of a chain, give the RMSProp in it")
    answer = query.answers[0]
    equations, momentum = answer.equations, (add_momentum, add_nesterov_momentum, average_steps)
    scaled = next((i for i, e in enumerate(equations) if e in (divide_eps_inside, divide_eps_outside)), 0)
    into_buffer = equations[scaled : next((i for i, e in enumerate(equations) if e in momentum), 0)]
    return {
        "centered": centered_average in equations,
        "eps_in_sqrt": divide_eps_inside in equations,
        "decoupled_decay": decay_weights_decoupled in equations or decay_weights_corrected in equations,
        "corrected_weight_decay": decay_weights_corrected in equations,
        "caution": apply_caution in equations,
        "lr_in_buffer": scale_by_lr in into_buffer,
        "buffer_sign": -1 if negate in into_buffer else 1,
        "averages_steps": average_steps in equations,
        "nesterov": add_nesterov_momentum in equations,
        "bias_correction": answer.bias_correction,
        "initial_scale": answer.initial_scale,
    }


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
    given = {name: bound.arguments[own] for name, own in dialect.names.items()}
    given = {name: _ABSENT[name] if x is None and name in _ABSENT else x for name, x in given.items()}
    # With both there, every equation of the dialect shows.
    structure = structure_of(dialect.build(**{**arguments} | {dialect.names[n]: 0.5 for n in _ABSENT if n in given}))
    numbers = {
        name: None if x is None else _CHECKS.get(name, check_number_or_schedule)(dialect.names[name], x)
        for name, x in given.items()
        if name not in structure
    }
    return {**_ABSENT, **numbers, **structure}


def _check_structure(target: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raises if the target's equations differ where no number can make up for it."""
    names = DIALECTS[target].names
    has_decay = "weight_decay" in names and after["decoupled_decay"] == before["decoupled_decay"]
    if not has_decay and known(before["weight_decay"]) != 0:
        kind = "decoupled weight decay" if before["decoupled_decay"] else "L2 weight decay"
        raise ValueError(
            f"weight_decay must be 0, since target {target} has no {kind}, got {shown(before['weight_decay'])}"
        )
    if before["corrected_weight_decay"] != after["corrected_weight_decay"] and known(before["weight_decay"]) != 0:
        raise ValueError(
            f"corrected_weight_decay must be False, since target {target} has no corrected decay, got True; give "
            "weight_decay · lr / max_lr_snapshot as weight_decay, or the schedule of it, which is the same"
        )
    if "momentum" not in names and known(before["momentum"]) != 0:
        raise ValueError(
            f"momentum must be 0, since target {target} has no momentum buffer, got {shown(before['momentum'])}"
        )
    if before["centered"] != after["centered"]:
        always = "always" if after["centered"] else "never"
        raise ValueError(
            f"centered must be {after['centered']}, since target {target} is {always} centered, got "
            f"{before['centered']}"
        )
    if not is_zero(before["momentum"]) and before["nesterov"] != after["nesterov"]:
        raise ValueError(f"nesterov must be False, since target {target} has no Nesterov momentum, got True")
    if not is_zero(before["momentum"]) and before["caution"] != after["caution"]:
        raise ValueError(f"caution must be False, since target {target} has no caution, got True")


def _moved_eps(name: str, eps: Any, into_root: bool) -> Any:
    """eps² for an eps that goes under the root, √eps for one that comes out; of a schedule the schedule of that."""
    if callable(eps):
        return functools.partial(_read_moved_eps, name, eps, into_root)
    number = known(eps)
    if into_root and number not in (None, 0.0, math.inf) and not SMALLEST_NORMAL <= number * number <= _LARGEST:
        raise ValueError(
            f"{name} must be 0 or from 1.1e-19 to 1.8e19 where its square goes under the root, got {number:g}; float32 "
            "takes the square of a smaller number for 0 and that of a larger one for infinite"
        )
    if isinstance(eps, jax.Array):
        wide = jnp.asarray(eps, float)
        return wide * wide if into_root else jnp.sqrt(wide)
    return float(eps) ** (2 if into_root else 0.5)


def _read_moved_eps(name: str, schedule: Callable[[Any], Any], into_root: bool, step: Any) -> Any:
    return _moved_eps(name, check_eps(f"the schedule of {name}", schedule(step)), into_root)


def _rescaled(lr: Any, momentum: Any, averages_steps: bool) -> Any:
    """The learning rate of a buffer that averages the steps, or of one that adds them up, from that of the other."""
    if callable(lr) or callable(momentum):
        return functools.partial(_read_rescaled, lr, momentum, averages_steps)
    if isinstance(lr, jax.Array) or isinstance(momentum, jax.Array):
        lr = jnp.asarray(lr, float)
    rest = one_minus(momentum)
    return lr / rest if averages_steps else lr * rest


def _read_rescaled(lr: Any, momentum: Any, averages_steps: bool, step: Any) -> Any:
    lr, momentum = (x(step) if callable(x) else x for x in (lr, momentum))
    lr = check_number("the schedule of lr", lr)
    return _rescaled(lr, check_number("the schedule of momentum", momentum, below=1.0), averages_steps)


# --- What is not exactly equal -------------------------------------------------------------------------------


def _notes(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, ...]:
    """A sentence for each difference between two settings."""
    notes = []
    if after["eps_in_sqrt"] != before["eps_in_sqrt"] and known(before["eps"]) != 0:
        place = "under" if after["eps_in_sqrt"] else "outside"
        notes.append(f"eps is {place} the root: the denominators are within a factor 1 to √2 of each other")
        if after["eps_in_sqrt"] and known(before["eps"]) is None:
            notes.append("eps is not known yet: below 1.1e-19 its square, which is under the root, is 0 in float32")
    start, old_start = (known(setting["initial_scale"]) for setting in (after, before))
    if after["initial_scale"] is not before["initial_scale"] and start != old_start:
        notes.append(_note_on_start(start, old_start, before["alpha"]))
    if after["bias_correction"] != before["bias_correction"]:
        not_ = "" if after["bias_correction"] else "not "
        factor = _one_minus_power_in_words("alpha", before["alpha"])
        notes.append(f"the average is {not_}bias-corrected: the averages differ by the factor {factor}")
    if not is_zero(before["momentum"]) and after["lr_in_buffer"] != before["lr_in_buffer"]:
        not_ = "" if after["lr_in_buffer"] else "not "
        notes.append(f"the learning rate is {not_}in the momentum buffer: the same as long as it is constant")
    if not is_zero(before["momentum"]) and after["averages_steps"] != before["averages_steps"]:
        change = "divided" if after["averages_steps"] else "multiplied"
        verb = "averages the steps" if after["averages_steps"] else "adds the steps up"
        factor = _one_minus_power_in_words("momentum", before["momentum"])
        notes.append(f"the momentum buffer {verb}: lr is {change} by 1 − momentum, and the first steps by {factor}")
    return tuple(notes)


def _note_on_start(start: float | None, old_start: float | None, alpha: Any) -> str:
    remembered = "the product of all alphas so far" if callable(alpha) else "alphaᵗ"
    duration = _duration(alpha)
    if start is None or old_start is None:
        return f"the average starts from a different value: they differ by {remembered} times the difference{duration}"
    gap = abs(start - old_start)
    return (
        f"the average starts from {start:g}, not {old_start:g}: the averages differ by "
        f"{'' if gap == 1 else f'{gap:g} · '}{remembered}{duration}; compare that with v"
    )


def _one_minus_power_in_words(name: str, number: Any) -> str:
    power = f"the product of all {name}s so far" if callable(number) else f"{name}ᵗ"
    return f"1 − {power}{_duration(number).replace('1%', 'within 1% of 1')}"


def _duration(alpha: Any) -> str:
    """After how many steps 1 % is left of what a smoothing constant remembers."""
    number = known(alpha)
    if number is None or number >= 1:
        return ""
    steps = 1 if number == 0 else math.ceil(math.log(0.01) / math.log(number))
    return f", which is 1% after {steps} step{'' if steps == 1 else 's'}"


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
