"""Torch checkpoints: the state dict of ``torch.optim.RMSprop`` in, and out again. Torch is not imported.

``checkpoints.torch_file`` says what is in the file, and ``checkpoints.named`` makes the state of it.

Read from the top down: from torch; the numbers of a group; one parameter; to torch.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax.arguments import check_eps, check_number, check_smoothing, shown
from rmsprop_jax.checkpoints.named import build_optimizer, check_functions, checked_names, common_step, slots_by_name
from rmsprop_jax.checkpoints.slots import (
    SLOTS,
    Parameter,
    average_of_squares,
    check_slots,
    count_of,
    shape_and_dtype,
    variance,
)
from rmsprop_jax.checkpoints.torch_file import File, array_of_tensor, keys_of, python_of, read_file, step_of_entry
from rmsprop_jax.checkpoints.torch_schedulers import schedules_of
from rmsprop_jax.transform import rmsprop

__all__ = ["from_torch", "to_torch"]

_SETTING_OF = {"grad_avg": "centered", "momentum_buffer": "momentum > 0"}  # what makes torch keep a slot

_EXAMPLE_OF_NAMES = "[name for name, _ in model.named_parameters()]"

# What a group must have, and what torch's __setstate__ gives to a group of an older file that lacks it.
_REQUIRED = ("lr", "alpha", "eps", "weight_decay")
_DEFAULTS = {"momentum": 0.0, "centered": False}
_CHECKS = {
    **dict.fromkeys(("lr", "weight_decay", "momentum"), check_number),
    "alpha": check_smoothing,
    "eps": check_eps,
}

# What a group may hold that does not change the next update: who the parameters are, how torch executes, and what
# learning rate schedulers write down for themselves (lr_scale and max_lr_snapshot are timm's).
_IGNORED = frozenset(
    {"params", "param_names", "name", "foreach", "fused", "capturable", "differentiable"}
    | {"initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum", "lr_scale", "max_lr_snapshot"}
)
# A switch of torch or timm that is off asks for nothing, whether or not the transformation has it.
_SWITCHES = frozenset(("maximize", "caution", "corrected_weight_decay"))


# --- From torch --------------------------------------------------------------------------------------------


def from_torch(
    optimizer_state_dict: Mapping[str, Any],
    names: Sequence[str],
    to_params: Callable[[dict[str, np.ndarray]], chex.ArrayTree],
    *,
    params: Mapping[str, Any] | None = None,
    missing: str = "error",
    step: int | None = None,
    lr: optax.ScalarOrSchedule | Sequence[optax.ScalarOrSchedule] | None = None,
    alpha: optax.ScalarOrSchedule | Sequence[optax.ScalarOrSchedule] | None = None,
    eps: optax.ScalarOrSchedule | Sequence[optax.ScalarOrSchedule] | None = None,
    weight_decay: optax.ScalarOrSchedule | Sequence[optax.ScalarOrSchedule] | None = None,
    momentum: optax.ScalarOrSchedule | Sequence[optax.ScalarOrSchedule] | None = None,
    scheduler_state_dict: Mapping[str, Any] | None = None,
    updates_per_step: int = 1,
    transformation: Callable[..., optax.GradientTransformation] = rmsprop,
) -> tuple[optax.GradientTransformationExtraArgs, optax.OptState]:
    """The transformation and the state that continue a run of ``torch.optim.RMSprop`` in JAX.

    One parameter group becomes ``transformation(lr=..., alpha=..., ...)`` with the hyperparameters in the file.
    Several become ``optax.partition`` of one such transformation each, labeled ``"group0"``, ``"group1"``, ...
    The state is what ``tx.init`` makes, with torch's numbers in it::

        step            ← step
        square_avg      ← square_avg, or max(square_avg − grad_avg², 0) if centered
        grad_avg        ← grad_avg           if centered
        momentum_buffer ← momentum_buffer    if momentum

    The centered line is computed in float64. Torch's difference can be slightly negative by rounding (its own next
    step is then NaN); the nearest variance is 0.

    Args:
      optimizer_state_dict: what ``optimizer.state_dict()`` returned, as ``torch.load(file, weights_only=True)`` reads
        it. Tensors may be on any device and of any floating or complex dtype, bfloat16 included. NumPy arrays are
        accepted too. Other forms of it are read as well: what ``get_optimizer_state_dict`` of
        ``torch.distributed.checkpoint`` returns (with ``full_state_dict=True``), flattened or not, and a file of
        bitsandbytes' RMSprop in 32 bits.
      names: the parameters' names, in the order in which the optimizer was given the parameters, through all groups:
        ``[name for name, _ in model.named_parameters()]`` if it was given ``model.parameters()``. If the file itself
        has names, parameters go by name, and the order of ``names`` is free.
      to_params: from ``{name: array}``, with all ``names`` and no others, to the tree that the JAX model trains. It
        may rename, transpose, reshape, split and join, but not cast or compute: it is called with each slot, and
        before that with zeros and with arrays of tags, which show what each leaf is made of.
      params: ``{name: array or shape}``, such as ``model.state_dict()``; other names than ``names`` are ignored. Needed
        for parameters that never had a gradient, for which the file holds nothing. Their slots start from what
        ``transformation`` starts from, which is 0 in torch. A shape stands for float32.
      missing: what happens to parameters that the file does not have: "error", or "init" if the model has grown.
        Then ``params`` are all its parameters (``dict(model.named_parameters())``), and ``to_params`` gets all of
        them. Those that are not in ``names``, or are of another shape in the file, start as ``transformation`` starts
        them. A warning lists them.
      step: the number of updates of the run, at which schedules are read. Needed if the steps of the parameters differ,
        as they do if layers were unfrozen on the way. (Torch's RMSprop counts steps but reads none.)
      lr: replaces the learning rate in the file: a number or a schedule, or a list with one for each group. A schedule
        is read at the step.
      alpha: as ``lr``.
      eps: as ``lr``.
      weight_decay: as ``lr``.
      momentum: as ``lr``. It must be given for a run whose scheduler moves the momentum (``OneCycleLR``, ``CyclicLR``),
        since the file holds only its momentary value.
      scheduler_state_dict: what ``scheduler.state_dict()`` returned at the same moment. The learning rate, and the
        momentum if the scheduler moves it, then become the schedules that continue it; see
        :func:`rmsprop_jax.checkpoints.schedules_of`, which takes what a file cannot hold.
      updates_per_step: updates from one ``scheduler.step()`` to the next: those of an epoch if it is called
        once per epoch.
      transformation: what to build, with the hyperparameters as keyword arguments. Other optimizers with torch's
        slots have their own: ``dialects.timm`` for timm's RMSpropTF, ``dialects.stable_baselines3`` for
        Stable-Baselines3's RMSpropTFLike, whose file looks the same as torch's. A function of your own may put
        anything around it, such as ``optax.MultiSteps`` or a clipping; what is around it starts anew.

    Returns:
      ``(tx, state)``. The state has the structure and the dtypes of ``tx.init(params)`` (at least float32; a float64
      file needs ``jax_enable_x64``, or is rounded to float32) and shares no memory with the file.

    Raises:
      TypeError: if an argument or a part of the file has the wrong type.
      ValueError: if the file does not hold a whole RMSprop run or does not fit ``names``, ``to_params`` or
        ``transformation``: a missing, unknown or additional parameter, slot or hyperparameter, a wrong shape, NaN, a
        negative average, steps that differ, one leaf in two groups. The message names it.

    Warns:
      UserWarning: if a scheduler set the learning rate in the file and no ``lr`` is given, since the rate then stays
        where it is; with ``missing="init"``, which parameters start anew.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax.checkpoints import from_torch
      >>> hyperparameters = dict(lr=0.1, alpha=0.9, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False)
      >>> checkpoint = {  # as torch.load gives it, with tensors for arrays
      ...     "state": {0: {"step": 7, "square_avg": np.array([[1.0, 2.0, 3.0]])}},
      ...     "param_groups": [{"params": [0], **hyperparameters}],
      ... }
      >>> tx, state = from_torch(checkpoint, ["linear.weight"], lambda named: {"kernel": named["linear.weight"].T})
      >>> print(state.step, state.square_avg["kernel"].shape)
      7 (3, 1)
    """
    check_functions(to_params=to_params, transformation=transformation)
    file = read_file("optimizer_state_dict", optimizer_state_dict)
    keys = keys_of(file, checked_names(names, _EXAMPLE_OF_NAMES))
    step = None if step is None else count_of("step", step)
    given = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
    numbers = _numbers_by_group(file, given)
    grown = _grown(file, keys, params, missing)
    parameters = [
        _parameter(file, name, key, index, params, "momentum" in numbers[index] or scheduler_state_dict is not None)
        for name, (key, index) in keys.items()
        if name not in grown
    ]
    parameters += [_new_parameter(name, group, params) for name, group in grown.items()]
    step = common_step(parameters) if step is None else step
    latest = max((p.step or 0 for p in parameters), default=0)
    if step < latest:
        raise ValueError(f"step is {step}, but the file has a parameter at step {latest}; give the step of the run")
    if scheduler_state_dict is not None:
        numbers = _scheduled(numbers, file, scheduler_state_dict, step, updates_per_step)
    _check_no_scheduler_is_forgotten(file, numbers)
    transformations = [
        transformation(**_hyperparameters(index, group, own, transformation))
        for index, (group, own) in enumerate(zip(file.groups, numbers, strict=True))
    ]
    if grown:
        warnings.warn(f"these parameters are not in the file and start anew: {', '.join(grown)}", stacklevel=2)
    return build_optimizer(parameters, to_params, transformations, step)


# --- A model that grew -----------------------------------------------------------------------------------------


def _grown(
    file: File, keys: Mapping[str, tuple[Any, int]], params: Mapping[str, Any] | None, missing: str
) -> dict[str, int]:
    """The parameters that start anew, each with its group."""
    if missing not in ("error", "init"):
        raise ValueError(f"missing must be 'error' or 'init', got {shown(missing)}")
    if missing == "error":
        return {}
    if not isinstance(params, Mapping):
        raise TypeError(
            "params must be all parameters of the model with missing='init': dict(model.named_parameters()), got "
            f"{type(params).__name__}"
        )
    grown = {}
    for name, (key, index) in keys.items():
        entry = file.entries.get(key, {})
        expected = shape_and_dtype(name, params)
        if expected is None:
            raise ValueError(f"the file has {name!r}, but params does not; a model may grow here, but not shrink")
        if "square_avg" in entry and tuple(getattr(entry["square_avg"], "shape", expected[0])) != expected[0]:
            grown[name] = index
    new = [name for name in params if name not in keys]
    if new and len(file.groups) > 1:
        raise ValueError(
            f"params has {shown(new[0])}, which is not in names, but the file has {len(file.groups)} groups; append a "
            "new index to the 'params' of its group, and its name to names"
        )
    return grown | dict.fromkeys(new, 0)


def _new_parameter(name: str, group: int, params: Mapping[str, Any] | None) -> Parameter:
    """A parameter of which nothing is known but what ``params`` say."""
    expected = shape_and_dtype(name, params)
    assert expected is not None  # _grown found it there
    shape, dtype = expected
    return Parameter(name, group, shape, np.dtype(np.float32) if dtype is None else dtype, step=None, slots={})


# --- The numbers of a group ------------------------------------------------------------------------------------


def _numbers_by_group(file: File, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each group the numbers that replace those in the file."""
    numbers: list[dict[str, Any]] = [{} for _ in file.groups]
    for name, value in given.items():
        values = value if isinstance(value, list | tuple) else [value] * len(file.groups)
        if len(values) != len(file.groups):
            raise ValueError(
                f"{name} must be one number or schedule, or one for each of the {len(file.groups)} groups, got "
                f"{len(values)}"
            )
        for own, x in zip(numbers, values, strict=True):
            if x is not None:
                own[name] = x
            if isinstance(x, Mapping):
                raise TypeError(
                    f"{name} must be a number or a schedule for each group, got {shown(x)}; of schedules_of, give "
                    f"[group[{name!r}] for group in schedules]"
                )
    return numbers


def _scheduled(
    numbers: Sequence[dict[str, Any]], file: File, scheduler_state_dict: Any, step: int, updates_per_step: int
) -> list[dict[str, Any]]:
    """``numbers`` and the schedules of each group, after a check that they do not both have the same one."""
    try:
        schedules = schedules_of(scheduler_state_dict, file.groups, step=step, updates_per_step=updates_per_step)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{error} (What from_torch does not take, schedules_of does: give lr=[group['lr'] for group in "
            "schedules_of(...)] in place of scheduler_state_dict.)"
        ) from error
    for own, scheduled in zip(numbers, schedules, strict=True):
        twice = sorted(own.keys() & scheduled.keys())
        if twice:
            raise ValueError(f"{twice[0]} is given, but scheduler_state_dict has it too; leave one of the two out")
    return [{**own, **scheduled} for own, scheduled in zip(numbers, schedules, strict=True)]


def _check_no_scheduler_is_forgotten(file: File, numbers: Sequence[Mapping[str, Any]]) -> None:
    for index, (group, own) in enumerate(zip(file.groups, numbers, strict=True)):
        moved = next((key for key in ("base_momentum", "max_momentum") if key in group), None)
        if moved is not None and "momentum" not in own:
            raise ValueError(
                f"group {index} has {moved!r}, so a scheduler moves its momentum, which is "
                f"{shown(group.get('momentum'))} now; give scheduler_state_dict, or momentum= a schedule or the number "
                "that it is to keep"
            )
        if "initial_lr" in group and "lr" not in own:
            warnings.warn(
                f"group {index} has 'initial_lr', so a scheduler set its learning rate, which stays at "
                f"{shown(group.get('lr'))} now; give scheduler_state_dict, or lr= a schedule or the number that it is "
                "to keep",
                stacklevel=3,
            )


def _hyperparameters(
    index: int, group: Mapping[str, Any], own: Mapping[str, Any], transformation: Callable[..., Any]
) -> dict[str, Any]:
    """The keyword arguments for ``transformation`` that a group holds, and ``own`` in place of some of them."""
    missing = [key for key in _REQUIRED if key not in group]
    if missing:
        raise ValueError(f"group {index} has no {missing[0]!r}, which every group of RMSprop has; add it to the group")
    arguments = inspect.signature(transformation).parameters.values()
    known = {a.name for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)}
    takes_any = any(a.kind is a.VAR_KEYWORD for a in arguments)
    hyperparameters = {}
    for key, value in (_DEFAULTS | dict(group)).items():
        is_read = key not in _IGNORED or (key == "max_lr_snapshot" and bool(group.get("corrected_weight_decay")))
        if key in known or (takes_any and is_read):
            hyperparameters[key] = own[key] if key in own else _hyperparameter(index, key, value)
        elif not (key in _IGNORED or (key in _SWITCHES and not value)):
            is_of_timm = key in ("lr_in_momentum", "decoupled_decay")
            raise ValueError(
                f"group {index} has {shown(key)} ({shown(value)}), which is not an argument of "
                f"{shown(getattr(transformation, '__name__', transformation))}: {', '.join(sorted(known))}; "
                + (
                    "is this a file of timm's RMSpropTF, for transformation=dialects.timm?"
                    if is_of_timm
                    else "it must take torch's names of arguments, as rmsprop of this library does"
                    if key in (*_REQUIRED, *_DEFAULTS)
                    else f"if it does not change the update, drop it: group.pop({key!r})"
                )
            )
    return hyperparameters


def _hyperparameter(index: int, key: str, value: Any) -> Any:
    """A hyperparameter of a group, checked if it is one of torch's."""
    what = f"{key!r} of group {index}"
    plain = python_of(what, value)
    if key == "centered":
        if not isinstance(plain, bool | int) or plain not in (0, 1):
            raise TypeError(f"{what} must be True or False, got {shown(plain)}")
        return bool(plain)
    if key not in _CHECKS:
        return plain
    if callable(plain):
        raise TypeError(f"{what} must be a number, got {shown(plain)}")
    number = _CHECKS[key](what, plain)
    with np.errstate(over="ignore"):
        rounded = np.asarray(number).astype(jnp.result_type(float))
    if np.isinf(rounded).any():
        raise ValueError(f"{what} is {shown(plain)}, which is infinite in float32; switch jax_enable_x64 on")
    return number


def _slots_of_group(index: int, group: Mapping[str, Any]) -> list[str]:
    """The slots that torch keeps for each parameter of a group."""
    settings = {key: _hyperparameter(index, key, group.get(key, default)) for key, default in _DEFAULTS.items()}
    is_kept = {"square_avg": True, "grad_avg": settings["centered"], "momentum_buffer": settings["momentum"] > 0}
    return [slot for slot, kept in is_kept.items() if kept]


# --- One parameter -----------------------------------------------------------------------------------------------


def _parameter(
    file: File, name: str, key: Any, index: int, params: Mapping[str, Any] | None, momentum_is_given: bool
) -> Parameter:
    """What the file, and ``params`` in its place, say about a parameter."""
    expected = shape_and_dtype(name, params)
    entry = file.entries.get(key, {})
    if not entry:
        if expected is None:
            where = "params has no such name" if params is not None else "its shape is needed"
            raise ValueError(
                f"the file has no state for {name!r} (parameter {key!r}), so it never had a gradient, and {where}: "
                f"give params={{{name!r}: array or shape, ...}}, or params=model.state_dict()"
            )
        return _new_parameter(name, index, params)

    kept = _slots_of_group(index, file.groups[index])
    if momentum_is_given and "momentum_buffer" in entry and "momentum_buffer" not in kept:
        kept.append("momentum_buffer")  # the scheduler is where its momentum is 0
    for slot in entry:
        if slot not in ("step", *SLOTS):
            raise ValueError(f"the state of {name!r} has {shown(slot)}; RMSprop's has {', '.join(('step', *SLOTS))}")
        if slot not in ("step", *kept):
            raise ValueError(
                f"the state of {name!r} has {slot!r}, but its group {index} is without {_SETTING_OF[slot]}; change one "
                "of the two in the file"
            )
    for slot in ("step", *kept):
        if slot not in entry:
            cause = f", but its group {index} has {_SETTING_OF[slot]}" if slot in _SETTING_OF else ""
            raise ValueError(f"the state of {name!r} has no {slot!r}{cause}; give the state dict of one RMSprop")
    slots = {slot: array_of_tensor(f"{slot!r} of {name!r}", entry[slot]) for slot in kept}
    check_slots(name, slots, expected)
    shape, dtype = slots["square_avg"].shape, slots["square_avg"].dtype
    if "grad_avg" in slots:
        slots["square_avg"] = variance(name, slots["square_avg"], slots["grad_avg"])
    return Parameter(name, index, shape, dtype, step_of_entry(name, entry["step"]), slots)


# --- To torch ----------------------------------------------------------------------------------------------


def to_torch(
    state: optax.OptState,
    names: Sequence[str],
    from_params: Callable[[chex.ArrayTree], Mapping[str, Any]],
    *,
    like: Mapping[str, Any],
    tensor: Callable[[np.ndarray], Any],
) -> dict[str, Any]:
    """The inverse of :func:`from_torch`: a state dict that continues the run in torch.

    ::

        step            ← step, a float32 tensor for each parameter (torch's own stops at 2²⁴)
        square_avg      ← square_avg, or square_avg + grad_avg² if centered (computed in float64)
        grad_avg        ← grad_avg           if centered
        momentum_buffer ← momentum_buffer    if momentum

    One line loads it into a torch optimizer that was made as usual::

        optimizer.load_state_dict(
            to_torch(state, names, from_params, like=optimizer.state_dict(), tensor=torch.from_numpy)
        )

    A state from :func:`from_torch` comes back bit for bit. If centered, ``square_avg`` comes back within 2 ulp, unless
    torch's variance was negative, which comes back as 0. A parameter that never had a gradient comes back with zeros.

    Args:
      state: a state of one RMSProp transformation, of ``optax.partition`` of several, or of a chain with one in it.
      names: the parameters' names in the order of the torch optimizer, as for :func:`from_torch`.
      from_params: from a tree like the trained one, with NumPy arrays, to ``{name: array}``: the inverse of
        ``to_params``. It may not cast or compute either.
      like: the ``state_dict()`` of the torch optimizer that is to continue. Groups and hyperparameters are copied from
        it, the learning rate included, since the state holds none. Its own state is only used to compare shapes.
      tensor: makes a tensor of a NumPy array: ``torch.from_numpy``. It may keep the array, which is a copy.

    Returns:
      What ``torch.optim.RMSprop.load_state_dict`` takes (of torch 1.x too), with tensors in the dtype of ``state``,
      but at least float32; torch rounds them to the dtype of its parameter.

    Raises:
      TypeError: if an argument or a part of ``state`` has the wrong type.
      ValueError: if ``state``, ``names``, ``from_params`` and ``like`` do not fit together, or if the slots of
        ``state`` do not fit each other or hold NaN. The message names what.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from rmsprop_jax import rmsprop
      >>> from rmsprop_jax.checkpoints import to_torch
      >>> state = rmsprop(0.1).init({"kernel": jnp.zeros((3, 1))})
      >>> hyperparameters = dict(lr=0.1, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False)
      >>> fresh = {"state": {}, "param_groups": [{"params": [0], **hyperparameters}]}
      >>> back = to_torch(
      ...     state, ["linear.weight"], lambda params: {"linear.weight": params["kernel"].T},
      ...     like=fresh, tensor=np.asarray,
      ... )
      >>> print(back["state"][0]["square_avg"])
      [[0. 0. 0.]]
    """
    check_functions(from_params=from_params, tensor=tensor)
    file = read_file("like", like)
    if file.form != "torch":
        raise ValueError(
            f"like must be what state_dict() of a torch.optim.RMSprop returns, got the {file.form} form of it"
        )
    groups, entries = file.groups, file.entries
    keys = keys_of(file, checked_names(names, _EXAMPLE_OF_NAMES))
    step, slots = slots_by_name(state, from_params, list(keys))
    # An array of no dimensions: torch.from_numpy takes it, but refuses np.float32(7).
    new_entries = {key: {"step": tensor(np.array(step, np.float32))} for key, _ in keys.values()}
    for name, (key, index) in keys.items():
        kept = _slots_like(name, slots[name], index, groups[index], entries.get(key, {}))
        new_entries[key] |= {slot: tensor(array) for slot, array in _as_in_torch(name, kept).items()}
    return {"state": new_entries, "param_groups": [dict(group) for group in groups]}


def _slots_like(
    name: str, slots: Mapping[str, np.ndarray], index: int, group: Mapping[str, Any], entry: Mapping[str, Any]
) -> Mapping[str, np.ndarray]:
    """Returns the slots that the parameter has in torch, after a check that they are ``slots``."""
    kept = _slots_of_group(index, group)
    square_avg = slots["square_avg"]
    if square_avg.size == 0:  # an empty parameter does not tell which other slots it has
        slots = dict.fromkeys(kept, square_avg)
    for slot in SLOTS:
        if (slot in slots) != (slot in kept):
            raise ValueError(
                f"the state of {name!r} has {'a' if slot in slots else 'no'} {slot}, but its group {index} of like "
                f"{'has' if slot in kept else 'does not have'} {_SETTING_OF[slot]}; give like the settings of the run"
            )
    if "square_avg" in entry:
        expected = array_of_tensor(f"'square_avg' of {name!r} in like", entry["square_avg"])
        if expected.shape != square_avg.shape:
            raise ValueError(
                f"from_params gives {name!r} the shape {square_avg.shape}, in like it has {expected.shape}; undo in "
                "from_params what to_params does"
            )
        if np.iscomplexobj(expected) != np.iscomplexobj(square_avg):
            raise ValueError(
                f"the state of {name!r} is {square_avg.dtype}, in like it is {expected.dtype}; give the state dict of "
                "an optimizer for the same parameters"
            )
    return slots


def _as_in_torch(name: str, slots: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Copies, which a tensor may own, in a dtype that torch and NumPy share."""
    if "grad_avg" in slots:
        slots = {**slots, "square_avg": average_of_squares(name, slots["square_avg"], slots["grad_avg"])}
    return {
        slot: np.array(slots[slot], np.promote_types(slots[slot].dtype, np.float32), order="C")
        for slot in SLOTS
        if slot in slots
    }
