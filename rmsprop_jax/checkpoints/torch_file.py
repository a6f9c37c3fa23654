"""What is in a torch optimizer's file? Groups, entries and tensors, after a check of their structure.

A state dict is ``{"state": {key: {slot: tensor}}, "param_groups": [{"params": [key], "lr": ...}]}``, where a key is an
index or, in files of distributed training, a name. ``torch.distributed.checkpoint`` also writes it flattened:
``state.<name>.<slot>`` and ``param_groups.<name>.lr``. bitsandbytes has names of its own for RMSprop's numbers.

Read from the top down: the file; its forms; which parameter is which; numbers and tensors.

Source: ``torch/optim/rmsprop.py`` and ``torch/optim/optimizer.py`` (PyTorch 2.13; 1.x differs in ``step``, a number
there); ``torch/distributed/checkpoint/state_dict.py``; ``bitsandbytes/optim/optimizer.py`` (0.50).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rmsprop_jax.arguments import shown
from rmsprop_jax.checkpoints.slots import array_of, dtype_of, largest_count

__all__ = ["File", "array_of_tensor", "keys_of", "python_of", "read_file", "step_of_entry"]


class File(NamedTuple):
    """A state dict of an optimizer.

    Attributes:
      argument: the name of the argument that it was given as.
      groups: the parameter groups.
      entries: for each key the slots of a parameter.
      form: who wrote it in this form: "torch", "flattened" or "bitsandbytes".
    """

    argument: str
    groups: Sequence[Mapping[str, Any]]
    entries: Mapping[Any, Mapping[str, Any]]
    form: str


def read_file(argument: str, file: Any) -> File:
    """The groups and the entries of an optimizer's state dict.

    Raises:
      TypeError: if ``file`` or a part of it has the wrong type.
      ValueError: if it is no state dict of an RMSprop. If it has one in it, the message says where.
    """
    if not isinstance(file, Mapping):
        hint = "; call its state_dict()" if hasattr(file, "state_dict") else _hint_where(argument, file)
        if isinstance(file, str | os.PathLike):
            hint = "; read the file with torch.load(path, weights_only=True)"
        raise TypeError(f"{argument} must be a state dict, got {type(file).__name__}{hint}")
    form = "torch"
    if _is_flattened(file):
        form, file = "flattened", _unflattened(argument, file)
    absent = [key for key in ("state", "param_groups") if key not in file]
    if absent:
        is_scheduler = "last_epoch" in file and "base_lrs" in file
        hint = _hint_where(argument, file) or f"; is it the {'scheduler' if is_scheduler else 'model'}'s?"
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
        _check_keys(argument, index, group)
    result = File(argument, list(groups), entries, form)
    if any("betas" in group for group in groups):
        result = _of_bitsandbytes(result)
    if any("exp_avg" in entry for entry in entries.values()):
        raise ValueError(_IS_OF_ADAM.format(argument))
    return result


_IS_OF_ADAM = (
    "{} belongs to an optimizer of Adam's family ('betas' or 'exp_avg' is in it), not to RMSprop; start with "
    "transformation.init instead"
)


def _check_keys(argument: str, index: int, group: Mapping[str, Any]) -> None:
    if "params" not in group:
        raise ValueError(f"group {index} of {argument} has no 'params'; give what optimizer.state_dict() returns")
    keys = group["params"]
    if not isinstance(keys, list | tuple) or not all(type(key) in (int, str) for key in keys):
        raise TypeError(
            f"'params' of group {index} of {argument} must be a list of indices, or of names, got {shown(keys)}; give "
            "what optimizer.state_dict() returns"
        )


# --- Its forms -------------------------------------------------------------------------------------------------


def _hint_where(argument: str, file: Any) -> str:
    """Where in a training checkpoint the state dict of an RMSprop lies, as the end of a message."""
    places = [place for place, part in _parts(argument, file, depth=4) if _is_rmsprop(part)]
    return f"; did you mean {' or '.join(places[:3])}?" if places else ""


def _parts(place: str, part: Any, depth: int) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """All dicts in a checkpoint that are not deeper than ``depth``, with the code that takes each of them out."""
    if isinstance(part, Mapping):
        yield place, part
    children = part.items() if isinstance(part, Mapping) else enumerate(part) if isinstance(part, list | tuple) else ()
    if depth:
        for key, child in children:
            if isinstance(child, Mapping | list | tuple):
                yield from _parts(f"{place}[{shown(key)}]", child, depth - 1)


def _is_rmsprop(part: Mapping[Any, Any]) -> bool:
    groups = part.get("param_groups")
    if not isinstance(groups, list | tuple) or "state" not in part:
        return False
    return any(isinstance(group, Mapping) and "alpha" in group for group in groups)


def _is_flattened(file: Mapping[Any, Any]) -> bool:
    keys = [key for key in file if isinstance(key, str)]
    return "param_groups" not in file and any(key.startswith("param_groups.") for key in keys)


def _unflattened(argument: str, file: Mapping[Any, Any]) -> dict[str, Any]:
    """The flattened form of ``torch.distributed.checkpoint`` as a state dict; equal hyperparameters make a group."""
    parts: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "param_groups": {}}
    for key, value in file.items():
        kind, _, rest = key.partition(".") if isinstance(key, str) else ("", "", "")
        name, _, field = rest.rpartition(".")
        if kind not in parts or not name:
            raise ValueError(
                f"{argument} has {shown(key)} among keys such as 'param_groups.<name>.lr'; give what "
                "get_optimizer_state_dict returns"
            )
        parts[kind].setdefault(name, {})[field] = value
    groups: list[dict[str, Any]] = []
    for name, settings in parts["param_groups"].items():
        settings = {key: value for key, value in settings.items() if key != "param_names"}
        for group in groups:
            if _equal({key: value for key, value in group.items() if key != "params"}, settings):
                group["params"].append(name)
                break
        else:
            groups.append({**settings, "params": [name]})
    return {"state": parts["state"], "param_groups": groups}


def _equal(settings: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether two groups have equal hyperparameters. What cannot be compared is different."""
    return settings.keys() == others.keys() and all(_is_same(settings[key], others[key]) for key in settings)


def _is_same(value: Any, other: Any) -> bool:
    try:
        a, b = python_of("", value), python_of("", other)
        return a is b or (type(a) is type(b) and bool(a == b))
    except Exception:  # every kind of object may fail in its own way
        return value is other


_WRAPPED = "__bnb_optimizer_quant_state__"


def _of_bitsandbytes(file: File) -> File:
    """A file of bitsandbytes' RMSprop in torch's words: ``state1`` is ``square_avg``, ``betas[0]`` is ``alpha``.

    Its ``betas[1]`` is called momentum, but no step reads it.
    """
    entries: dict[Any, dict[str, Any]] = {}
    for key, entry in file.entries.items():
        wrapped = entry.get(_WRAPPED, {})
        entries[key] = {
            **{k: v for k, v in entry.items() if k != _WRAPPED},
            **(wrapped if isinstance(wrapped, Mapping) else {}),
        }
    slots = {slot for entry in entries.values() for slot in entry}
    if "state1" not in slots or "state2" in slots or any("alpha" in group for group in file.groups):
        raise ValueError(_IS_OF_ADAM.format(file.argument))
    for key, entry in entries.items():
        if "absmax1" in entry or "qmap1" in entry or "uint8" in str(getattr(entry.get("state1"), "dtype", "")):
            raise ValueError(
                f"{file.argument}['state'][{shown(key)}] is of bitsandbytes' 8-bit RMSprop, whose numbers are codes of "
                "a table; continue with RMSprop32bit for a step in torch, and save that"
            )
        if "state1" in entry:
            entry["square_avg"] = entry.pop("state1")
    groups = []
    for index, group in enumerate(file.groups):
        betas = group.get("betas")
        if not isinstance(betas, list | tuple) or not betas:
            raise TypeError(
                f"'betas' of group {index} of {file.argument} must be (alpha, momentum), got {shown(betas)}"
            )
        if python_of(f"'betas'[0] of group {index}", betas[0]) == 0:
            raise ValueError(
                f"'betas' of group {index} of {file.argument} is {shown(betas)}, which is no RMSprop of bitsandbytes: "
                "its alpha is not 0; start with transformation.init instead"
            )
        rest = {key: value for key, value in group.items() if key not in ("betas", "t_alpha", "t_beta3")}
        groups.append({**rest, "alpha": betas[0], "momentum": 0.0, "centered": False})
    return File(file.argument, groups, entries, "bitsandbytes")


# --- Which parameter is which ------------------------------------------------------------------------------------


def keys_of(file: File, names: list[str]) -> dict[str, tuple[Any, int]]:
    """For each of ``names`` the key of its parameter in the file, and the number of its group.

    Names go by name, where the file has them: as its keys, or as ``param_names`` in its groups. (What
    ``DistributedDataParallel``, ``torch.compile`` and FSDP put in front of them is left out.) Otherwise names go by the
    order of the parameters.

    Raises:
      ValueError: if ``names`` are not those of the file's parameters.
    """
    found = [(key, index) for index, group in enumerate(file.groups) for key in group["params"]]
    keys = [key for key, _ in found]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"parameter {shown(twice)} is in the groups of {file.argument} twice; it must be in one")
    recorded = _recorded_names(file)
    if recorded is None and len(names) != len(keys):
        raise ValueError(
            f"names has {len(names)} names, but {file.argument} has {len(keys)} parameters, in groups of "
            f"{shown([len(group['params']) for group in file.groups])}; give the names of the optimizer's parameters "
            f"in its order, got {shown(names)}"
        )
    known = set(keys)
    extra = [key for key in file.entries if key not in known]
    if extra:
        raise ValueError(
            f"{file.argument}['state'] has an entry {shown(extra[0])}, but no group has a parameter of that "
            f"{'name' if isinstance(extra[0], str) else 'index'}; give what optimizer.state_dict() returns"
        )
    return dict(zip(names, found, strict=True)) if recorded is None else _by_name(file, recorded, found, names)


def _recorded_names(file: File) -> list[str] | None:
    """The name of each parameter in the order of the groups, if the file has them."""
    recorded: list[Any] = []
    for index, group in enumerate(file.groups):
        keys = group["params"]
        names = keys if keys and all(isinstance(key, str) for key in keys) else group.get("param_names")
        if names is None and not keys:
            names = []
        if names is None:
            return None
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"'param_names' of group {index} of {file.argument} must be a list of names, got {shown(names)}"
            )
        if len(names) != len(keys):
            raise ValueError(
                f"group {index} of {file.argument} has {len(keys)} parameters, but {len(names)} 'param_names'; give "
                "what optimizer.state_dict() returns"
            )
        recorded += names
    return recorded


def _by_name(
    file: File, recorded: Sequence[str], found: Sequence[tuple[Any, int]], names: Sequence[str]
) -> dict[str, tuple[Any, int]]:
    place_of = dict(zip(recorded, found, strict=True))
    wanted = {name: name for name in names}
    if place_of.keys() != wanted.keys():
        place_of = {_unwrapped(name): place for name, place in place_of.items()}
        wanted = {name: _unwrapped(name) for name in names}
    if len(place_of) < len(recorded):
        twice = next(name for name in recorded if [_unwrapped(x) for x in recorded].count(_unwrapped(name)) > 1)
        raise ValueError(f"{file.argument} records {shown(twice)} for two parameters; names must differ")
    alone = sorted(set(wanted.values()) ^ place_of.keys())
    if alone:
        has, lacks = ("names has", file.argument) if alone[0] in wanted.values() else (f"{file.argument} has", "names")
        raise ValueError(
            f"{has} {shown(alone[0])}, but {lacks} does not; the file records the names of its parameters, "
            f"{shown(list(recorded), 160)}: give these, and rename in to_params"
        )
    return {name: place_of[plain] for name, plain in wanted.items()}


def _unwrapped(name: str) -> str:
    """A name without what wrappers of the model put into it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod", "_fsdp_wrapped_module"))


# --- Numbers and tensors -------------------------------------------------------------------------------------------


def step_of_entry(name: str, value: Any) -> int:
    """The step of a parameter as an int: torch 1.x has an int, torch 2.x a float32 tensor.

    Raises:
      TypeError: if it is not a number.
      ValueError: if it is not whole, negative or where a counter of its dtype stops.
    """
    what = f"'step' of {name!r}"
    step = python_of(what, value)
    if isinstance(step, bool) or not isinstance(step, int | float):
        raise TypeError(f"{what} must be a number, got {shown(step)}")
    if not (0 <= step < 2**31 - 1 and step == int(step)):
        raise ValueError(f"{what} must be a whole number from 0 to 2³¹ − 2, got {shown(step)}")
    if hasattr(value, "dtype") and step >= largest_count(dtype_of(value)):
        raise ValueError(
            f"{what} is {step:.0f}, where a counter of dtype {value.dtype} stops; put the number of updates, an int, "
            "in its place in the file"
        )
    return int(step)


def python_of(what: str, value: Any) -> Any:
    """A Python value as it is; a tensor or array of one number as that number."""
    if not hasattr(value, "dtype"):
        return value
    array = array_of_tensor(what, value)
    if array.size != 1:
        raise ValueError(f"{what} must be one number, got shape {array.shape}")
    return array.item()


def array_of_tensor(what: str, value: Any) -> np.ndarray:
    """An array, or a tensor of any floating or complex dtype on any device, as a NumPy array.

    Raises:
      TypeError: if it is anything else, or a tensor that NumPy cannot hold.
    """
    if hasattr(value, "full_tensor"):
        raise TypeError(
            f"{what} is a DTensor, of which this process has a part; save the whole with get_optimizer_state_dict("
            "model, optimizer, options=StateDictOptions(full_state_dict=True))"
        )
    if hasattr(value, "detach"):
        tensor = value.detach()
        try:
            # NumPy lacks bfloat16 and 8-bit floats. float32 holds both exactly, and the state is at least float32.
            name = dtype_of(tensor).name
            tensor = tensor.cpu().float() if name == "bfloat16" or name.startswith("float8") else tensor.cpu()
            value = tensor.resolve_conj().resolve_neg().numpy()
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
            raise TypeError(f"{what} must be a tensor whose numbers NumPy can hold, got {shown(tensor)}") from None
    return array_of(what, value)
