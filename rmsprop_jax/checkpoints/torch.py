"""Torch checkpoints: the state dict of ``torch.optim.RMSprop`` in, and out again. Torch is not imported.

A state dict identifies parameters by index. The names that the user gives say which parameter each index is, and
``checkpoints.named`` does the rest.

Source: ``torch/optim/rmsprop.py`` and ``torch/optim/optimizer.py`` (PyTorch 2.13; 1.x differs in ``step``, a number
there), for the layout ``{"state": {index: {slot: tensor}}, "param_groups": [{"params": [index], "lr": ...}]}``.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import numpy as np
import optax

from rmsprop_jax.arguments import check_eps, check_number, check_smoothing, shown
from rmsprop_jax.checkpoints.named import build_optimizer, check_functions, checked_names, slots_by_name
from rmsprop_jax.checkpoints.slots import (
    SLOTS,
    Parameter,
    average_of_squares,
    check_slots,
    dtype_of,
    largest_count,
    shape_and_dtype,
    variance,
)
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
# Switches of timm. A switch that is off asks for nothing, whether or not the transformation has it.
_SWITCHES = frozenset(("caution", "corrected_weight_decay"))


# --- From torch --------------------------------------------------------------------------------------------


def from_torch(
    optimizer_state_dict: Mapping[str, Any],
    names: Sequence[str],
    to_params: Callable[[dict[str, np.ndarray]], chex.ArrayTree],
    *,
    params: Mapping[str, Any] | None = None,
    lr: optax.ScalarOrSchedule | Sequence[optax.ScalarOrSchedule] | None = None,
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
        accepted too.
      names: the parameters' names, in the order in which the optimizer was given the parameters, through all groups:
        ``[name for name, _ in model.named_parameters()]`` if it was given ``model.parameters()``.
      to_params: from ``{name: array}``, with all ``names`` and no others, to the tree that the JAX model trains. It
        may rename, transpose, reshape, split and join, but not cast or compute: it is called with each slot, and
        before that with zeros and with arrays of tags, which show what each leaf is made of.
      params: ``{name: array or shape}``, such as ``model.state_dict()``; other names than ``names`` are ignored. Needed
        only for parameters that never had a gradient, for which the file holds nothing. Their slots start from what
        ``transformation`` starts from, which is 0 in torch. A shape stands for float32.
      lr: replaces the learning rate in the file: a number or a schedule, or one for each group. A schedule is read at
        the step in the file.
      transformation: what to build, with the hyperparameters as keyword arguments. Other optimizers with torch's
        slots have their own: ``dialects.timm`` for timm's RMSpropTF, ``dialects.stable_baselines3`` for
        Stable-Baselines3's RMSpropTFLike, whose file looks the same as torch's.

    Returns:
      ``(tx, state)``. The state has the structure and the dtypes of ``tx.init(params)`` (at least float32; a float64
      file needs ``jax_enable_x64``, or is rounded to float32) and shares no memory with the file.

    Raises:
      TypeError: if an argument or a part of the file has the wrong type.
      ValueError: if the file does not hold a whole RMSprop run or does not fit ``names``, ``to_params`` or
        ``transformation``: a missing, unknown or additional parameter, slot or hyperparameter, a wrong shape, NaN, a
        negative average, steps that differ, one leaf in two groups. The message names it.

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
    groups, entries = _groups_and_entries("optimizer_state_dict", optimizer_state_dict)
    keys = _key_and_group_of("optimizer_state_dict", groups, entries, checked_names(names, _EXAMPLE_OF_NAMES))
    rates = lr if isinstance(lr, list | tuple) else [lr] * len(groups)
    if len(rates) != len(groups):
        raise ValueError(f"lr must be one learning rate, or one for each of the {len(groups)} groups, got {len(rates)}")
    transformations = [
        transformation(**_hyperparameters(index, group, rate, transformation))
        for index, (group, rate) in enumerate(zip(groups, rates, strict=True))
    ]
    parameters = [
        _parameter(name, key, index, groups[index], entries.get(key, {}), params) for name, (key, index) in keys.items()
    ]
    return build_optimizer(parameters, to_params, transformations)


def _groups_and_entries(argument: str, file: Any) -> tuple[list[Mapping[str, Any]], Mapping[Any, Mapping[str, Any]]]:
    """The groups and the entries of an optimizer's state dict, after a check that it is one."""
    if not isinstance(file, Mapping):
        hint = "; call its state_dict()" if hasattr(file, "state_dict") else ""
        raise TypeError(f"{argument} must be a state dict, got {type(file).__name__}{hint}")
    absent = [key for key in ("state", "param_groups") if key not in file]
    if absent:
        inner = [key for key, value in file.items() if isinstance(value, Mapping) and "param_groups" in value]
        hint = f"; did you mean the one under {shown(inner[0])}?" if inner else "; is it the model's?"
        raise ValueError(f"{argument} has no {' and no '.join(map(repr, absent))}, but {shown(list(file)[:5])}{hint}")
    groups, entries = file["param_groups"], file["state"]
    if not isinstance(groups, list | tuple):
        raise TypeError(f"{argument}['param_groups'] must be a list of dicts, got {shown(groups)}")
    if not isinstance(entries, Mapping):
        raise TypeError(f"{argument}['state'] must be a dict of dicts, got {shown(entries)}")
    for where, part in [
        *((f"{argument}['param_groups'][{index}]", group) for index, group in enumerate(groups)),
        *((f"{argument}['state'][{shown(key)}]", entry) for key, entry in entries.items()),
    ]:
        if not isinstance(part, Mapping):
            raise TypeError(f"{where} must be a dict, got {shown(part)}")
    if not groups:
        raise ValueError(f"{argument}['param_groups'] is empty; give the state dict of an optimizer with parameters")
    for index, group in enumerate(groups):
        if "params" not in group:
            raise ValueError(f"group {index} of {argument} has no 'params'; give what optimizer.state_dict() returns")
        keys = group["params"]
        if not isinstance(keys, list | tuple) or not all(isinstance(key, int | str) for key in keys):
            raise TypeError(
                f"'params' of group {index} of {argument} must be a list of indices, got {shown(keys)}; give what "
                "optimizer.state_dict() returns"
            )
    if any("betas" in group for group in groups) or any("exp_avg" in entry for entry in entries.values()):
        raise ValueError(
            f"{argument} belongs to an optimizer of Adam's family ('betas' or 'exp_avg' is in it), not to RMSprop; "
            "start with transformation.init instead"
        )
    return list(groups), entries


def _key_and_group_of(
    argument: str, groups: list[Mapping[str, Any]], entries: Mapping[Any, Any], names: list[str]
) -> dict[str, tuple[Any, int]]:
    """For each name the key of its parameter in the file and its group. As in torch, the order decides."""
    found = [(key, index) for index, group in enumerate(groups) for key in group["params"]]
    keys = [key for key, _ in found]
    known = set(keys)
    if len(known) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"parameter {shown(twice)} is in the groups of {argument} twice; it must be in one")
    if len(names) != len(keys):
        raise ValueError(
            f"names has {len(names)} names, but {argument} has {len(keys)} parameters, in groups of "
            f"{shown([len(group['params']) for group in groups])}; give the names of the optimizer's parameters in its "
            f"order, got {shown(names)}"
        )
    extra = [key for key in entries if key not in known]
    if extra:
        raise ValueError(
            f"{argument}['state'] has an entry {shown(extra[0])}, but no group has a parameter of that index; give "
            "what optimizer.state_dict() returns"
        )
    recorded = [str(name) for group in groups for name in group.get("param_names") or ()]
    if recorded != names and sorted(recorded) == sorted(names):
        first = next(index for index, name in enumerate(names) if name != recorded[index])
        raise ValueError(
            f"names must be in the optimizer's order: {argument} records {shown(recorded[first])} for parameter "
            f"{first}, names has {shown(names[first])}"
        )
    return dict(zip(names, found, strict=True))


def _hyperparameters(
    index: int, group: Mapping[str, Any], rate: Any, transformation: Callable[..., Any]
) -> dict[str, Any]:
    """The keyword arguments for ``transformation`` that a group holds, with ``rate`` for its lr if that is not None."""
    missing = [key for key in _REQUIRED if key not in group]
    if missing:
        raise ValueError(f"group {index} has no {missing[0]!r}, which every group of RMSprop has; add it to the group")
    arguments = inspect.signature(transformation).parameters.values()
    known = {a.name for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)}
    takes_any = any(a.kind is a.VAR_KEYWORD for a in arguments)
    hyperparameters = {}
    for key, value in (_DEFAULTS | dict(group)).items():
        if key in known or (takes_any and key not in _IGNORED):
            hyperparameters[key] = rate if key == "lr" and rate is not None else _hyperparameter(index, key, value)
        elif not (key in _IGNORED or (key in _SWITCHES and not value)):
            is_of_timm = key in ("lr_in_momentum", "decoupled_decay")
            raise ValueError(
                f"group {index} has {shown(key)} ({shown(value)}), which is not an argument of "
                f"{shown(getattr(transformation, '__name__', transformation))}: {', '.join(sorted(known))}"
                + ("; is this a file of timm's RMSpropTF, for transformation=dialects.timm?" if is_of_timm else "")
            )
    return hyperparameters


def _hyperparameter(index: int, key: str, value: Any) -> Any:
    """A hyperparameter of a group, checked if it is one of torch's."""
    what = f"{key!r} of group {index}"
    plain = _as_python(what, value)
    if key == "centered":
        if not isinstance(plain, bool | int) or plain not in (0, 1):
            raise TypeError(f"{what} must be True or False, got {shown(plain)}")
        return bool(plain)
    return _CHECKS[key](what, plain) if key in _CHECKS else plain


def _slots_of_group(index: int, group: Mapping[str, Any]) -> list[str]:
    """The slots that torch keeps for each parameter of a group."""
    settings = {key: _hyperparameter(index, key, group.get(key, default)) for key, default in _DEFAULTS.items()}
    is_kept = {"square_avg": True, "grad_avg": settings["centered"], "momentum_buffer": settings["momentum"] > 0}
    return [slot for slot, kept in is_kept.items() if kept]


def _parameter(
    name: str,
    key: Any,
    index: int,
    group: Mapping[str, Any],
    entry: Mapping[str, Any],
    params: Mapping[str, Any] | None,
) -> Parameter:
    """What the file, and ``params`` in its place, say about a parameter."""
    expected = shape_and_dtype(name, params)
    if not entry:
        if expected is None:
            where = "params has no such name" if params is not None else "its shape is needed"
            raise ValueError(
                f"the file has no state for {name!r} (parameter {key!r}), so it never had a gradient, and {where}: "
                f"give params={{{name!r}: array or shape, ...}}, or params=model.state_dict()"
            )
        shape, dtype = expected
        return Parameter(name, index, shape, np.dtype(np.float32) if dtype is None else dtype, step=None, slots={})

    kept = _slots_of_group(index, group)
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
    slots = {slot: _as_array(f"{slot!r} of {name!r}", entry[slot]) for slot in kept}
    check_slots(name, slots, expected)
    shape, dtype = slots["square_avg"].shape, slots["square_avg"].dtype
    if "grad_avg" in slots:
        slots["square_avg"] = variance(name, slots["square_avg"], slots["grad_avg"])
    return Parameter(name, index, shape, dtype, _step(name, entry["step"]), slots)


def _step(name: str, value: Any) -> int:
    """The step as an int: torch 1.x has an int, torch 2.x a float32 tensor."""
    what = f"'step' of {name!r}"
    step = _as_python(what, value)
    if isinstance(step, bool) or not isinstance(step, int | float):
        raise TypeError(f"{what} must be a number, got {shown(step)}")
    if not (0 <= step < 2**31 and step == int(step)):
        raise ValueError(f"{what} must be a whole number from 0 to 2³¹ − 1, got {shown(step)}")
    if hasattr(value, "dtype") and step >= largest_count(dtype_of(value)):
        raise ValueError(
            f"{what} is {step:.0f}, where a counter of dtype {value.dtype} stops; put the number of updates, an int, "
            "in its place in the file"
        )
    return int(step)


def _as_python(what: str, value: Any) -> Any:
    """A Python value as it is; a tensor or array of one number as that number."""
    if not hasattr(value, "dtype"):
        return value
    array = _as_array(what, value)
    if array.size != 1:
        raise ValueError(f"{what} must be one number, got shape {array.shape}")
    return array.item()


def _as_array(what: str, value: Any) -> np.ndarray:
    """An array, or a tensor of any floating or complex dtype on any device, as a NumPy array."""
    if hasattr(value, "detach"):
        tensor = value.detach()
        try:
            # NumPy lacks bfloat16 and 8-bit floats. float32 holds both exactly, and the state is at least float32.
            name = dtype_of(tensor).name
            tensor = tensor.cpu().float() if name == "bfloat16" or name.startswith("float8") else tensor.cpu()
            value = tensor.numpy()
        except (NotImplementedError, RuntimeError, TypeError):
            raise TypeError(f"{what} must be a tensor whose numbers NumPy can hold, got {shown(tensor)}") from None
    if not isinstance(value, np.ndarray | np.generic | jax.Array):
        raise TypeError(f"{what} must be a tensor or an array, got {type(value).__name__}")
    return np.asarray(value)


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
    groups, entries = _groups_and_entries("like", like)
    keys = _key_and_group_of("like", groups, entries, checked_names(names, _EXAMPLE_OF_NAMES))
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
        expected = _as_array(f"'square_avg' of {name!r} in like", entry["square_avg"])
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
