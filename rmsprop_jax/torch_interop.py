"""Torch checkpoints: the state dict of ``torch.optim.RMSprop`` in, and out again.

Both ways a parameter goes under its name, and the function that the user has for the weights, from
``{name: array}`` to ``params`` or back, carries every slot of the state too. Torch is not imported.

Source: ``torch/optim/rmsprop.py`` and ``torch/optim/optimizer.py`` (PyTorch 2.13; 1.x differs in ``step``, a number
there), for the layout ``{"state": {index: {slot: tensor}}, "param_groups": [{"params": [index], "lr": ...}]}``.
"""

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax.arguments import check_eps, check_number, check_smoothing, shown
from rmsprop_jax.state import RMSPropState
from rmsprop_jax.transform import rmsprop

_SLOTS = ("square_avg", "grad_avg", "momentum_buffer")
_SETTINGS = {"grad_avg": "centered", "momentum_buffer": "momentum > 0"}  # what a slot is there for

# What a group has to have, and what torch's __setstate__ gives to a group of an older file that lacks it.
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
# timm's switches: off, they ask for nothing, whether or not the transformation knows them.
_SWITCHES = frozenset(("caution", "corrected_weight_decay"))


class _Parameter(NamedTuple):
    """One parameter of the file."""

    name: str
    key: Any  # what it is called in the file: an index
    group: int
    shape: tuple[int, ...]
    dtype: np.dtype
    step: int | None  # None if it never had a gradient
    slots: dict[str, np.ndarray]


# --- From torch ------------------------------------------------------------------------------------------


def from_torch(
    optimizer_state_dict: Mapping[str, Any],
    names: Sequence[str],
    to_params: Callable[[dict[str, np.ndarray]], optax.Params],
    *,
    params: Mapping[str, Any] | None = None,
    lr: optax.ScalarOrSchedule | Sequence[optax.ScalarOrSchedule] | None = None,
    transformation: Callable[..., optax.GradientTransformation] = rmsprop,
) -> tuple[optax.GradientTransformationExtraArgs, optax.OptState]:
    """The transformation and the state with which a run of ``torch.optim.RMSprop`` goes on in JAX.

    One parameter group becomes ``transformation(lr=..., alpha=..., ...)`` with the hyperparameters in the file;
    several become ``optax.partition`` of one such transformation each, labelled ``"group0"``, ``"group1"``, ...
    The state is what ``tx.init`` makes, with torch's numbers in it::

        step            ← step
        square_avg      ← square_avg, or max(square_avg − grad_avg², 0) if centered
        grad_avg        ← grad_avg           if centered
        momentum_buffer ← momentum_buffer    if momentum

    The centered line is computed in float64. Torch's difference can be slightly negative by rounding (its own next
    step is then NaN); the nearest variance is 0.

    Args:
      optimizer_state_dict: what ``optimizer.state_dict()`` returned, as read by
        ``torch.load(file, weights_only=True)``. Tensors may be on any device and of any floating or complex dtype,
        bfloat16 included; NumPy arrays do as well.
      names: the parameters' names, in the order in which the optimizer was given the parameters, through all groups:
        ``[name for name, _ in model.named_parameters()]`` if it was given ``model.parameters()``.
      to_params: from ``{name: array}``, with all ``names`` and no others, to the tree that the JAX model trains. It
        may rename, transpose, reshape, split and join, but not cast or compute: it is called with each slot, and
        before that with zeros and with labels, by which its leaves are traced back to names and groups.
      params: ``{name: array or shape}``, ``model.state_dict()`` for one; names beyond ``names`` are ignored. Needed
        only for parameters that never had a gradient, for which the file holds nothing. Their slots start from what
        ``transformation`` starts from, which is 0 in torch. A shape stands for float32.
      lr: in place of the learning rate in the file: a number or a schedule, or one for each group. A schedule is
        read at the step in the file.
      transformation: what to build, with the hyperparameters as keyword arguments. Other optimizers with torch's
        slots have their own: ``dialects.timm`` for timm's RMSpropTF, ``dialects.stable_baselines3`` for
        Stable-Baselines3's RMSpropTFLike, whose file cannot be told from torch's.

    Returns:
      ``(tx, state)``. The state has the structure and the dtypes of ``tx.init(params)`` (float32 at least; a float64
      file needs ``jax_enable_x64``, or is rounded to float32) and shares no memory with the file.

    Raises:
      TypeError: if an argument or a part of the file has the wrong type.
      ValueError: if the file is not that of a whole RMSprop run or does not fit ``names``, ``to_params`` or
        ``transformation``: a missing, unknown or additional parameter, slot or hyperparameter, a wrong shape, NaN, a
        negative average, steps that differ, one leaf in two groups. The message names it.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax.torch_interop import from_torch
      >>> hyperparameters = dict(lr=0.1, alpha=0.9, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False)
      >>> checkpoint = {  # as torch.load gives it, with tensors for arrays
      ...     "state": {0: {"step": 7, "square_avg": np.array([[1.0, 2.0, 3.0]])}},
      ...     "param_groups": [{"params": [0], **hyperparameters}],
      ... }
      >>> tx, state = from_torch(checkpoint, ["linear.weight"], lambda named: {"kernel": named["linear.weight"].T})
      >>> print(state.step, state.square_avg["kernel"].shape)
      7 (3, 1)
    """
    _check_functions(to_params=to_params, transformation=transformation)
    groups, entries = _parts("optimizer_state_dict", optimizer_state_dict)
    keys = _keys("optimizer_state_dict", groups, entries, _names(names))
    rates = [None] * len(groups) if lr is None else _rates(lr, len(groups))
    given = [
        _hyperparameters(index, group, rate, transformation)
        for index, (group, rate) in enumerate(zip(groups, rates, strict=True))
    ]
    parts = [transformation(**numbers) for numbers in given]
    parameters = [_parameter(name, key, index, groups[index], entries, params) for name, (key, index) in keys.items()]
    step = _common_step(parameters)

    def build(arrays: Mapping[str, np.ndarray]) -> optax.Params:
        try:
            tree = to_params(dict(arrays))
        except KeyError as error:
            if error.args and error.args[0] in arrays:
                raise
            raise ValueError(
                f"to_params asks for {shown(error.args[0])}, which is not one of names: {shown(list(arrays), 200)}"
            ) from error
        return jax.tree.map(lambda leaf: leaf if _may_be_trained(leaf) else None, tree)

    template = build({p.name: np.zeros(p.shape, p.dtype) for p in parameters})
    owners = _owners(build, parameters)
    tx = optax.with_extra_args_support(parts[0])
    if len(parts) > 1:
        tx = optax.partition({f"group{index}": part for index, part in enumerate(parts)}, _labels(template, owners))

    slots = {
        slot: build({p.name: p.slots[slot] if slot in p.slots else _start(slot, p, parts[p.group]) for p in parameters})
        for slot in _SLOTS
        if any(slot in _slots_of(index, group) for index, group in enumerate(groups))
    }
    return tx, _fill(jax.eval_shape(tx.init, template), step, slots)


def _may_be_trained(leaf: Any) -> bool:
    """Whether a leaf is an array or a float, not a flag or a function of a module, which has no slots."""
    is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    return isinstance(leaf, float | complex) or (hasattr(leaf, "dtype") and hasattr(leaf, "shape") and not is_key)


def _check_functions(**functions: Any) -> None:
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {shown(function)}")


def _names(names: Sequence[str]) -> list[str]:
    is_list = isinstance(names, Iterable) and not isinstance(names, str | bytes)
    result: list[Any] = list(names) if is_list else [None]
    if not all(isinstance(name, str) for name in result):
        raise TypeError(
            "names must be a list of strings, such as [name for name, _ in model.named_parameters()], "
            f"got {shown(names)}"
        )
    if len(set(result)) < len(result):
        twice = next(name for name in result if result.count(name) > 1)
        raise ValueError(f"names must be different from each other, got {shown(twice)} twice")
    return result


def _parts(argument: str, file: Any) -> tuple[list[Mapping[str, Any]], Mapping[Any, Mapping[str, Any]]]:
    """The groups and the states of an optimizer's state dict, once it is seen to be one."""
    if not isinstance(file, Mapping):
        hint = "; call its state_dict()" if hasattr(file, "state_dict") else ""
        raise TypeError(f"{argument} must be a state dict, got {type(file).__name__}{hint}")
    absent = [key for key in ("state", "param_groups") if key not in file]
    if absent:
        inner = [key for key, value in file.items() if isinstance(value, Mapping) and "param_groups" in value]
        hint = f"; the one under {shown(inner[0])} may be meant" if inner else ", is it the model's?"
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
        raise ValueError(f"{argument}['param_groups'] is empty")
    for index, group in enumerate(groups):
        if "params" not in group:
            raise ValueError(f"group {index} of {argument} has no 'params'")
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


def _keys(
    argument: str, groups: list[Mapping[str, Any]], entries: Mapping[Any, Any], names: list[str]
) -> dict[str, tuple[Any, int]]:
    """For each name the key of its parameter in the file and its group: as in torch, it is the order that counts."""
    found = [(key, index) for index, group in enumerate(groups) for key in group["params"]]
    keys = [key for key, _ in found]
    known = set(keys)
    if len(known) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"parameter {shown(twice)} is in the groups of {argument} twice")
    if len(names) != len(keys):
        raise ValueError(
            f"names has {len(names)} names, but {argument} has {len(keys)} parameters, in groups of "
            f"{shown([len(group['params']) for group in groups])}; give the names of the optimizer's parameters in its "
            f"order, got {shown(names)}"
        )
    extra = [key for key in entries if key not in known]
    if extra:
        raise ValueError(
            f"{argument}['state'] has an entry {shown(extra[0])}, but no group has a parameter of that index"
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
        raise ValueError(f"group {index} has no {missing[0]!r}, which every group of RMSprop has")
    arguments = inspect.signature(transformation).parameters.values()
    known = {a.name for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)}
    anything = any(a.kind is a.VAR_KEYWORD for a in arguments)
    numbers = {}
    for key, value in (_DEFAULTS | dict(group)).items():
        if key in known or (anything and key not in _IGNORED):
            numbers[key] = rate if key == "lr" and rate is not None else _setting(index, key, value)
        elif not (key in _IGNORED or (key in _SWITCHES and not value)):
            hint = "; is this a file of timm's RMSpropTF, for transformation=dialects.timm?"
            raise ValueError(
                f"group {index} has {shown(key)} ({shown(value)}), which is not an argument of "
                f"{shown(getattr(transformation, '__name__', transformation))}: {', '.join(sorted(known))}"
                + (hint if key in ("lr_in_momentum", "decoupled_decay") else "")
            )
    return numbers


def _setting(index: int, key: str, value: Any) -> Any:
    """A hyperparameter of a group, checked as far as it is one of torch's."""
    what = f"{key!r} of group {index}"
    plain = _plain(what, value)
    if key == "centered":
        if not isinstance(plain, bool | int) or plain not in (0, 1):
            raise TypeError(f"{what} must be True or False, got {shown(plain)}")
        return bool(plain)
    return _CHECKS[key](what, plain) if key in _CHECKS else plain


def _plain(what: str, value: Any) -> Any:
    """A Python value as it is; a tensor or array of one number as that number."""
    if not hasattr(value, "dtype"):
        return value
    array = _array(what, value)
    if array.size != 1:
        raise ValueError(f"{what} must be one number, got shape {array.shape}")
    return array.item()


def _rates(lr: Any, groups: int) -> list[Any]:
    rates = list(lr) if isinstance(lr, list | tuple) else [lr] * groups
    if len(rates) != groups:
        raise ValueError(f"lr must be one learning rate, or one for each of the {groups} groups, got {len(rates)}")
    return rates


def _parameter(
    name: str,
    key: Any,
    index: int,
    group: Mapping[str, Any],
    entries: Mapping[Any, Mapping[str, Any]],
    params: Mapping[str, Any] | None,
) -> _Parameter:
    expected = _Expected(name, params)
    entry = entries.get(key, {})
    if not entry:
        if expected.shape is None:
            where = "params has no such name" if params is not None else "its shape is needed"
            raise ValueError(
                f"the file has no state for {name!r} (parameter {key!r}), which then never had a gradient, and "
                f"{where}: give params={{{name!r}: array or shape, ...}}, or params=model.state_dict()"
            )
        return _Parameter(name, key, index, expected.shape, expected.dtype, None, {})

    wanted = _slots_of(index, group)
    unknown = [slot for slot in entry if slot not in ("step", *_SLOTS)]
    if unknown:
        raise ValueError(f"the state of {name!r} has {shown(unknown[0])}; RMSprop's has {', '.join(('step', *_SLOTS))}")
    for slot in _SLOTS[1:]:
        if slot in entry and slot not in wanted:
            raise ValueError(f"the state of {name!r} has {slot!r}, but its group {index} is without {_SETTINGS[slot]}")
    for slot in ("step", *wanted):
        if slot not in entry:
            cause = f", but its group {index} has {_SETTINGS[slot]}" if slot in _SETTINGS else ""
            raise ValueError(f"the state of {name!r} has no {slot!r}{cause}")

    slots = {slot: _slot(f"{slot!r} of {name!r}", entry[slot]) for slot in wanted}
    shape, dtype = slots["square_avg"].shape, slots["square_avg"].dtype
    for slot, array in slots.items():
        if array.shape != shape or np.iscomplexobj(array) != (dtype.kind == "c"):
            raise ValueError(
                f"{slot!r} of {name!r} is {array.dtype} {array.shape}, but its 'square_avg' is {dtype} {shape}"
            )
    if expected.shape not in (None, shape):
        raise ValueError(f"the state of {name!r} has shape {shape}, but params[{name!r}] has shape {expected.shape}")
    if expected.is_complex not in (None, dtype.kind == "c"):
        raise ValueError(f"the state of {name!r} is {dtype}, but params[{name!r}] is {expected.dtype}")
    if any((part < 0).any() for part in _components(slots["square_avg"])):
        raise ValueError(f"'square_avg' of {name!r} is negative somewhere; it is an average of squares")
    if "grad_avg" in slots:
        slots["square_avg"] = _variance(slots["square_avg"], slots["grad_avg"])
        if np.isnan(slots["square_avg"]).any():
            raise ValueError(f"'square_avg' and 'grad_avg' of {name!r} are both infinite: their variance is NaN")
    return _Parameter(name, key, index, shape, dtype, _step(name, entry["step"]), slots)


def _slots_of(index: int, group: Mapping[str, Any]) -> list[str]:
    """The slots that torch keeps for each parameter of a group."""
    settings = {key: _setting(index, key, group.get(key, default)) for key, default in _DEFAULTS.items()}
    is_kept = {"square_avg": True, "grad_avg": settings["centered"], "momentum_buffer": settings["momentum"] > 0}
    return [slot for slot, kept in is_kept.items() if kept]


class _Expected:
    """What ``params`` says about a parameter."""

    def __init__(self, name: str, params: Mapping[str, Any] | None) -> None:
        if not isinstance(params, Mapping | None):
            raise TypeError(f"params must be a dict from names to arrays or shapes, got {type(params).__name__}")
        self.shape: tuple[int, ...] | None = None
        self.dtype = np.dtype(np.float32)
        self.is_complex: bool | None = None
        if params is not None and name in params:
            value = params[name]
            shape = value.shape if hasattr(value, "shape") else value
            try:
                self.shape = tuple(operator.index(size) for size in shape)
                if min(self.shape, default=0) < 0:
                    raise ValueError("a negative size")
                self.dtype = _dtype(value) if hasattr(value, "dtype") else self.dtype
            except (TypeError, ValueError):
                raise TypeError(f"params[{name!r}] must be an array or a shape, got {shown(value)}") from None
            if not jnp.issubdtype(self.dtype, jnp.inexact):
                raise TypeError(f"params[{name!r}] must be floating or complex, got {self.dtype}")
            if hasattr(value, "dtype"):
                self.is_complex = self.dtype.kind == "c"


def _dtype(array: Any) -> np.dtype:
    """The dtype of a tensor or an array; jnp.dtype knows bfloat16."""
    return jnp.dtype(str(array.dtype).removeprefix("torch."))


def _array(what: str, value: Any) -> np.ndarray:
    """A NumPy array of a tensor of any floating or complex dtype, on any device, or of an array."""
    if hasattr(value, "detach"):
        value = _of_tensor(what, value.detach())
    if not isinstance(value, np.ndarray | np.generic | jax.Array):
        raise TypeError(f"{what} must be a tensor or an array, got {type(value).__name__}")
    return np.asarray(value)


def _of_tensor(what: str, tensor: Any) -> Any:
    dtype = str(tensor.dtype).removeprefix("torch.")
    try:
        # NumPy has no bfloat16 and no 8-bit floats; in float32, where the state rests at least, they are exact.
        tensor = tensor.cpu().float() if dtype == "bfloat16" or dtype.startswith("float8") else tensor.cpu()
        return tensor.numpy()
    except (NotImplementedError, RuntimeError, TypeError):
        raise TypeError(f"{what} must be a tensor whose numbers NumPy can hold, got {shown(tensor)}") from None


def _slot(what: str, value: Any) -> np.ndarray:
    array = _array(what, value)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise TypeError(f"{what} must be floating or complex, got {array.dtype}")
    if np.isnan(array).any():
        raise ValueError(f"{what} has {np.isnan(array).sum()} NaN among its {array.size} numbers")
    with np.errstate(over="ignore"):
        rounded = array.astype(jnp.result_type(array))
    if (np.isinf(rounded) & ~np.isinf(array)).any():
        raise ValueError(f"{what} has numbers that are infinite in {rounded.dtype}; switch jax_enable_x64 on")
    return array


def _step(name: str, value: Any) -> int:
    """The step as a number: torch 1.x has an int, torch 2.x a float32 tensor."""
    what = f"'step' of {name!r}"
    step = _plain(what, value)
    if isinstance(step, bool) or not isinstance(step, int | float):
        raise TypeError(f"{what} must be a number, got {shown(step)}")
    if not (0 <= step < 2**31 and step == int(step)):
        raise ValueError(f"{what} must be a whole number from 0 to 2³¹ − 1, got {shown(step)}")
    if hasattr(value, "dtype") and step >= _stops_at(_dtype(value)):
        raise ValueError(
            f"{what} is {step:.0f}, where a counter of dtype {value.dtype} stops; put the number of updates, an int, "
            "in its place in the file"
        )
    return int(step)


def _stops_at(dtype: np.dtype) -> int:
    """The number at which a counter of ``dtype`` stops, since one more is the same or does not exist."""
    if jnp.issubdtype(dtype, jnp.integer):
        return int(jnp.iinfo(dtype).max)
    return int(2 ** (jnp.finfo(dtype).nmant + 1))


def _common_step(parameters: list[_Parameter]) -> int:
    known = [p for p in parameters if p.step is not None]
    for p in known:
        if p.step != known[0].step:
            raise ValueError(
                f"{known[0].name!r} is at step {known[0].step}, but {p.name!r} at step {p.step}; here all parameters "
                "share one step, so set the steps in the file to that at which a schedule shall go on"
            )
    return (known[0].step or 0) if known else 0


def _components(array: np.ndarray) -> tuple[np.ndarray, ...]:
    """Real and imaginary part of a complex array: torch's view_as_real."""
    return (array.real, array.imag) if np.iscomplexobj(array) else (array,)


def _componentwise(function: Callable[..., np.ndarray], *arrays: np.ndarray) -> np.ndarray:
    """``function`` of each component in float64, rounded to the dtype of the first array, but float32 at least."""
    with np.errstate(invalid="ignore", over="ignore"):
        parts = [
            function(*(np.asarray(x, np.float64) for x in xs)) for xs in zip(*map(_components, arrays), strict=True)
        ]
        result = np.empty(arrays[0].shape, np.promote_types(arrays[0].dtype, np.float32))
        for target, part in zip(_components(result), parts, strict=True):
            target[...] = part
    return result


def _variance(square_avg: np.ndarray, grad_avg: np.ndarray) -> np.ndarray:
    return _componentwise(lambda v, m: np.maximum(v - m * m, 0), square_avg, grad_avg)


def _square_avg(variance: np.ndarray, grad_avg: np.ndarray) -> np.ndarray:
    return _componentwise(lambda v, m: v + m * m, variance, grad_avg)


def _labels_for(number: int) -> list[float]:
    """Different numbers in [1, 2) of which float32 keeps all 24 bits and nothing narrower does.

    They are random: a cast, a sum or a mean of some gives none of the others.
    """
    odd = 2 * np.random.default_rng(0).choice(2**22, number, replace=False, shuffle=False) + 1
    labels: list[float] = (1 + np.sort(odd) * 2.0**-23).tolist()
    return labels


def _found(array: Any) -> dict[float, int]:
    """The different numbers in an array, and how often each is there."""
    found, counts = np.unique(np.asarray(array).real, return_counts=True)
    return dict(zip(found.astype(np.float64).tolist(), counts.tolist(), strict=True))


def _owners(
    build: Callable[[Mapping[str, np.ndarray]], optax.Params], parameters: list[_Parameter]
) -> list[_Parameter]:
    """For each leaf of the tree a parameter of the group that it is made of.

    Every parameter is sent through ``build`` filled with a label of its own.
    """
    labels = dict(zip(_labels_for(len(parameters)), parameters, strict=True))
    tree = build({p.name: np.full(p.shape, label, np.float32) for label, p in labels.items()})
    owners: list[_Parameter] = []
    placed = dict.fromkeys(labels, 0)  # how many numbers of each parameter there are in the tree
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found = _found(leaf)
        where = f"leaf {jax.tree_util.keystr(path) or 'params'} of to_params(...)"
        if any(value not in labels for value in found):
            raise ValueError(
                f"{where} holds numbers that were in no parameter; to_params carries the slots as well as the weights, "
                "so it may only rearrange: cast, scale or pad afterwards"
            )
        sources = [labels[value] for value in found] or parameters[:1]  # an empty leaf is at home anywhere
        other = next((p for p in sources if p.group != sources[0].group), None)
        if other is not None:
            raise ValueError(
                f"{where} is made of {sources[0].name!r} of group {sources[0].group} and {other.name!r} of group "
                f"{other.group}; a leaf has the hyperparameters of one group"
            )
        owners.append(sources[0])
        for value, count in found.items():
            placed[value] += count
    for label, parameter in labels.items():
        size = math.prod(parameter.shape)
        if placed[label] < size:
            part = f"{size - placed[label]} of {size} numbers of " if placed[label] else ""
            raise ValueError(f"to_params leaves out {part}{parameter.name!r}; its state would be lost")
    return owners


def _labels(template: optax.Params, owners: list[_Parameter]) -> optax.Params:
    return jax.tree.unflatten(jax.tree.structure(template), [f"group{p.group}" for p in owners])


def _start(slot: str, p: _Parameter, part: optax.GradientTransformation) -> np.ndarray:
    """What a slot of a parameter holds that had no gradient yet."""
    dtype = np.promote_types(p.dtype, np.float32)
    if slot != "square_avg":
        return np.zeros(p.shape, dtype)
    nodes = jax.tree.leaves(part.init(np.zeros((), dtype)), is_leaf=_is_state)
    first = next((node.square_avg for node in nodes if _is_state(node)), 0.0)
    return np.full(p.shape, first, dtype)


def _is_state(node: Any) -> bool:
    return isinstance(node, RMSPropState)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _fill(state: optax.OptState, step: int, slots: Mapping[str, optax.Params]) -> optax.OptState:
    """``state`` (shapes and dtypes) with arrays in it; every count in it is ``step``."""

    def slot(name: str, like: optax.Params | None) -> optax.Params | None:
        def leaf(like: Any, value: Any) -> Any:
            # A copy: torch goes on writing into the memory of its tensors.
            return like if _is_masked(like) else jnp.array(value, like.dtype)

        return None if like is None else jax.tree.map(leaf, like, slots[name], is_leaf=_is_masked)

    def count(like: Any) -> jax.Array:
        if like.shape or not jnp.issubdtype(like.dtype, jnp.integer):
            raise ValueError(
                f"the transformation keeps a {like.dtype} array of shape {like.shape} for which torch has no slot; "
                "its state may consist of RMSPropState and counts"
            )
        return jnp.asarray(step, like.dtype)

    def node(like: Any) -> Any:
        if isinstance(like, RMSPropState):
            return RMSPropState(count(like.step), *(slot(name, getattr(like, name)) for name in _SLOTS))
        return count(like)

    if not any(map(_is_state, jax.tree.leaves(state, is_leaf=_is_state))):
        raise ValueError("the transformation must keep an RMSPropState, as all of rmsprop_jax do; its state has none")
    return jax.tree.map(node, state, is_leaf=_is_state)


# --- To torch --------------------------------------------------------------------------------------------


def to_torch(
    state: optax.OptState,
    names: Sequence[str],
    from_params: Callable[[optax.Params], Mapping[str, Any]],
    *,
    like: Mapping[str, Any],
    tensor: Callable[[np.ndarray], Any],
) -> dict[str, Any]:
    """The inverse of :func:`from_torch`: a state dict with which the run goes on in torch.

    ::

        step            ← step, a float32 tensor for each parameter (torch's own stops at 2²⁴)
        square_avg      ← square_avg, or square_avg + grad_avg² if centered (computed in float64)
        grad_avg        ← grad_avg           if centered
        momentum_buffer ← momentum_buffer    if momentum

    One line loads it into a torch optimizer that was made as usual::

        optimizer.load_state_dict(
            to_torch(state, names, from_params, like=optimizer.state_dict(), tensor=torch.from_numpy)
        )

    A state from :func:`from_torch` comes back bit for bit; centered, ``square_avg`` within 2 ulp, unless torch's
    variance was negative, which comes back as 0. A parameter that never had a gradient comes back with zeros.

    Args:
      state: a state of one RMSProp transformation, of ``optax.partition`` of several, or of a chain with one in it.
      names: the parameters' names in the order of the torch optimizer, as for :func:`from_torch`.
      from_params: from a tree like the trained one, with NumPy arrays, to ``{name: array}``: the inverse of
        ``to_params``. It may not cast or compute either.
      like: the ``state_dict()`` of the torch optimizer that shall go on. Groups and hyperparameters are taken from it
        as they are, the learning rate with them, since the state holds none; its state is used to compare shapes.
      tensor: makes a tensor of a NumPy array: ``torch.from_numpy``. It may keep the array, which is a copy.

    Returns:
      What ``torch.optim.RMSprop.load_state_dict`` takes (of torch 1.x too), with tensors in the dtype of ``state``,
      but float32 at least; torch rounds them to the dtype of its parameter.

    Raises:
      TypeError: if an argument or a part of ``state`` has the wrong type.
      ValueError: if ``state``, ``names``, ``from_params`` and ``like`` do not fit together, or if the slots of
        ``state`` do not fit each other or hold NaN; the message names what.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from rmsprop_jax import rmsprop
      >>> from rmsprop_jax.torch_interop import to_torch
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
    _check_functions(from_params=from_params, tensor=tensor)
    groups, entries = _parts("like", like)
    keys = _keys("like", groups, entries, _names(names))
    nodes = jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_state)
    places = {f"state{jax.tree_util.keystr(path)}": node for path, node in nodes if _is_state(node)}
    if not places:
        raise ValueError(f"state must be one of RMSProp, got {type(state).__name__} with no RMSPropState in it")
    for place, part in places.items():
        _check_part(place, part)
    parts = list(places.values())
    steps = {_counted(f"{place}.step", part.step) for place, part in places.items()}
    if len(steps) > 1:
        raise ValueError(f"the parts of state are at different steps, {sorted(steps)}; torch's groups go together")

    trees = {slot: _merged([getattr(part, slot) for part in parts]) for slot in _SLOTS}
    arrays = _named_slots(trees, from_params, list(keys))
    for name, (key, index) in keys.items():
        _check_slots(name, arrays[name], index, groups[index], entries.get(key, {}))
    return {
        "state": {
            key: {
                # As an array of no dimensions, which torch.from_numpy takes, where it refuses np.float32(7).
                "step": tensor(np.array(max(steps), np.float32)),
                **{slot: tensor(array) for slot, array in _as_in_torch(name, arrays[name]).items()},
            }
            for name, (key, _) in keys.items()
        },
        "param_groups": [dict(group) for group in groups],
    }


def _check_part(place: str, part: RMSPropState) -> None:
    """Raises unless all slots are such as ``init`` makes them: arrays of the shape and kind of the parameter."""
    expected = _leaves(part.square_avg)
    for slot in _SLOTS:
        tree = getattr(part, slot)
        leaves = expected if tree is None else _leaves(tree)
        alone = min(leaves.keys() ^ expected.keys(), default=None)
        if alone is not None:
            raise ValueError(f"{place}.{slot}{alone} and {place}.square_avg{alone} must both be there")
        for path, leaf in leaves.items():
            if tree is not None:
                _check_leaf(f"{place}.{slot}{path}", leaf, f"{place}.square_avg{path}", expected[path])


def _check_leaf(where: str, leaf: Any, where_like: str, like: Any) -> None:
    if _is_masked(leaf) or _is_masked(like):
        if _is_masked(leaf) != _is_masked(like):
            raise ValueError(f"{where} is {type(leaf).__name__}, but {where_like} is {type(like).__name__}")
        return
    if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.inexact)):
        raise TypeError(f"{where} must be a floating or complex array, got {getattr(leaf, 'dtype', shown(leaf))}")
    if leaf.shape != like.shape or (leaf.dtype.kind == "c") != (like.dtype.kind == "c"):
        raise ValueError(f"{where} is {leaf.dtype} {leaf.shape}, but {where_like} is {like.dtype} {like.shape}")
    array = np.asarray(leaf)
    if np.isnan(array).any():
        raise ValueError(f"{where} has {np.isnan(array).sum()} NaN among its {array.size} numbers")
    if where == where_like and any((part < 0).any() for part in _components(array)):
        raise ValueError(f"{where} is negative somewhere; it is an average of squares")


def _leaves(tree: optax.Params) -> dict[str, Any]:
    """The leaves of a slot by their paths, ``optax.MaskedNode`` included."""
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_masked)
    }


def _counted(where: str, step: Any) -> int:
    """The number of updates, if it is a count that has not stopped."""
    number = np.asarray(step) if isinstance(step, int) and not isinstance(step, bool) else step
    if not (hasattr(number, "dtype") and jnp.issubdtype(number.dtype, jnp.integer) and number.shape == ()):
        got = f"{number.dtype} {number.shape}" if hasattr(number, "dtype") else shown(number)
        raise TypeError(f"{where} must be an int32 scalar as init gives it, got {got}; a narrow float stops counting")
    if not 0 <= number < _stops_at(number.dtype):
        raise ValueError(
            f"{where} is {number}, where a counter of dtype {number.dtype} stops or has not begun; put the number of "
            "updates in its place, an int32"
        )
    return int(number)


def _merged(trees: Sequence[optax.Params | None]) -> optax.Params | None:
    """The tree that ``optax.partition`` divided; ``optax.MaskedNode`` where no part has an array."""
    present = [tree for tree in trees if tree is not None]
    if not present:
        return None

    def the_one(path: Any, *leaves: Any) -> Any:
        arrays = [leaf for leaf in leaves if not _is_absent(leaf)]
        if len(arrays) > 1:
            raise ValueError(
                f"leaf {jax.tree_util.keystr(path)} of the parameters is in {len(arrays)} RMSPropStates of state; give "
                "to_torch the one that goes on"
            )
        return next(iter(arrays), leaves[0])

    try:
        structure: Any = jax.tree.structure(present[0], is_leaf=_is_absent)
        rows = zip(*(structure.flatten_up_to(tree) for tree in present), strict=True)
    except ValueError:
        raise ValueError(
            "the parts of state must be parts of one tree, with optax.MaskedNode for each leaf elsewhere"
        ) from None
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(present[0], is_leaf=_is_absent)]
    return jax.tree.unflatten(structure, [the_one(path, *row) for path, row in zip(paths, rows, strict=True)])


def _is_absent(leaf: Any) -> bool:
    return leaf is None or _is_masked(leaf)


def _named_slots(
    trees: Mapping[str, optax.Params | None],
    from_params: Callable[[optax.Params], Mapping[str, Any]],
    names: list[str],
) -> dict[str, dict[str, np.ndarray]]:
    """For each name its slots."""
    whole = trees["square_avg"]
    for path, leaf in _leaves(whole).items():
        if _is_masked(leaf):
            raise ValueError(f"leaf {path} of the parameters is in no RMSPropState of state")
    structure: Any = jax.tree.structure(whole)
    paths, likes = list(_leaves(whole)), jax.tree.leaves(whole)
    sources = _sources(from_params, structure, paths, likes, names)

    result: dict[str, dict[str, np.ndarray]] = {name: {} for name in names}
    for slot, tree in trees.items():
        if tree is None:
            continue
        leaves = structure.flatten_up_to(tree)
        filled = [
            np.zeros_like(like) if _is_masked(x) else np.asarray(x) for x, like in zip(leaves, likes, strict=True)
        ]
        arrays = _arrays_by_name(from_params(jax.tree.unflatten(structure, filled)), names)
        for name, array in arrays.items():
            made_of = {_is_masked(leaves[i]): i for i in sources[name]}
            if len(made_of) > 1:
                raise ValueError(
                    f"{name!r} is made of leaf {paths[made_of[False]]}, which has a {slot}, and of leaf "
                    f"{paths[made_of[True]]}, which has none"
                )
            if any(not _holds(array.dtype, filled[i].dtype) for i in sources[name]):
                raise ValueError(f"from_params makes {name!r} {array.dtype}; it may only rearrange, not cast")
            if False in made_of or (array.size == 0 and slot == "square_avg"):
                result[name][slot] = array
    return result


def _sources(
    from_params: Callable[[optax.Params], Mapping[str, Any]],
    structure: Any,
    paths: list[str],
    likes: list[Any],
    names: list[str],
) -> dict[str, list[int]]:
    """For each name the numbers of the leaves that it is made of: each is sent there filled with a label of its own."""
    labels = {label: i for i, label in enumerate(_labels_for(len(likes)))}
    filled = [np.full(np.shape(like), label, np.float32) for like, label in zip(likes, labels, strict=True)]
    placed = [0] * len(likes)
    sources: dict[str, list[int]] = {}
    for name, array in _arrays_by_name(from_params(jax.tree.unflatten(structure, filled)), names).items():
        if not _holds(array.dtype, np.dtype(np.float32)):
            raise ValueError(f"from_params makes {name!r} {array.dtype}; it may only rearrange, not cast")
        found = _found(array)
        if any(value not in labels for value in found):
            raise ValueError(f"from_params gives {name!r} numbers that were in no leaf; it may only rearrange")
        sources[name] = [labels[value] for value in found]
        for value, count in found.items():
            placed[labels[value]] += count
    for path, like, count in zip(paths, likes, placed, strict=True):
        size = math.prod(np.shape(like))
        if count < size:
            part = f"{size - count} of {size} numbers of " if count else ""
            raise ValueError(f"from_params leaves out {part}leaf {path}; its state would be lost")
    return sources


def _holds(dtype: np.dtype, other: np.dtype) -> bool:
    """Whether ``dtype`` is floating or complex like ``other``, and no narrower."""
    if not jnp.issubdtype(dtype, jnp.inexact) or (other.kind == "c") != (dtype.kind == "c"):
        return False
    return bool(jnp.finfo(dtype).bits >= jnp.finfo(other).bits)


def _arrays_by_name(named: Any, names: list[str]) -> dict[str, np.ndarray]:
    if not isinstance(named, Mapping):
        raise TypeError(f"from_params must return a dict from names to arrays, got {type(named).__name__}")
    missing, extra = [n for n in names if n not in named], [n for n in named if n not in names]
    if missing or extra:
        raise ValueError(
            "from_params must return an array for each of names, but "
            + " and ".join(
                [f"{n!r} is missing" for n in missing[:3]] + [f"{n!r} is not one of them" for n in extra[:3]]
            )
        )
    return {name: np.asarray(named[name]) for name in names}


def _check_slots(
    name: str, slots: dict[str, np.ndarray], index: int, group: Mapping[str, Any], entry: Mapping[str, Any]
) -> None:
    """Raises unless ``slots`` are those that the parameter has in torch."""
    wanted = _slots_of(index, group)
    square_avg = slots["square_avg"]
    if square_avg.size == 0:  # nothing in it tells in which of our groups it was
        slots |= dict.fromkeys(wanted, square_avg)
    for slot in _SLOTS[1:]:
        if (slot in slots) != (slot in wanted):
            raise ValueError(
                f"the state of {name!r} has {'a' if slot in slots else 'no'} {slot}, but its group {index} of like "
                f"{'has' if slot in wanted else 'does not have'} {_SETTINGS[slot]}"
            )
    if "square_avg" in entry:
        like = _array(f"'square_avg' of {name!r} in like", entry["square_avg"])
        if like.shape != square_avg.shape:
            raise ValueError(f"from_params gives {name!r} the shape {square_avg.shape}, in like it has {like.shape}")
        if np.iscomplexobj(like) != np.iscomplexobj(square_avg):
            raise ValueError(f"the state of {name!r} is {square_avg.dtype}, in like it is {like.dtype}")


def _as_in_torch(name: str, slots: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Copies, which a tensor may own, in a dtype that torch and NumPy share."""
    if "grad_avg" in slots:
        square_avg = _square_avg(slots["square_avg"], slots["grad_avg"])
        if (np.isinf(square_avg) & ~np.isinf(slots["square_avg"]) & ~np.isinf(slots["grad_avg"])).any():
            raise ValueError(f"square_avg + grad_avg² of {name!r}, which is torch's square_avg, is infinite in float32")
        slots = {**slots, "square_avg": square_avg}
    return {
        slot: np.array(slots[slot], np.promote_types(slots[slot].dtype, np.float32), order="C")
        for slot in _SLOTS
        if slot in slots
    }
