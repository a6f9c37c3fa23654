"""What does the config of a Keras optimizer ask for, and which variables come with it?

Keras numbers the variables of an optimizer in a file, and names them in memory. The config says which there are, and in
which order.

Source: Keras 3.15, ``keras/src/optimizers/rmsprop.py`` and ``base_optimizer.py`` (``get_config``, ``build``).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rmsprop_jax.arguments import check_count, check_flag, check_number, known, shown

__all__ = ["Config", "check_paths", "checked_config", "paths_of", "roles_of", "variables_by_role"]

# The role of a variable and the name of its parameter, which is empty for the two that belong to no parameter.
Key = tuple[str, str]

# --- The config ----------------------------------------------------------------------------------------------

_REQUIRED = ("name", "learning_rate", "rho", "momentum", "epsilon", "centered")
_DEFAULTS: dict[str, Any] = {
    "weight_decay": None,
    "clipnorm": None,
    "global_clipnorm": None,
    "clipvalue": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
}
_CLIPPINGS = ("clipnorm", "global_clipnorm", "clipvalue")


class Config(NamedTuple):
    """A checked config, with ``None`` for what is off.

    Attributes:
      name: with which the path of every variable begins.
      learning_rate: a number, or a schedule that is not read yet.
      rule: the other arguments of ``dialects.keras``.
      clipping: the name of a kind of clipping and its limit.
      loss_scale_factor: what the gradients are divided by.
      accumulation: how many gradients make one update, 1 or more.
      ema_momentum: the share of the old average.
      overwrite_every: after how many updates an average takes the place of its parameter.
    """

    name: str
    learning_rate: float | Mapping[str, Any]
    rule: dict[str, Any]
    clipping: tuple[str, float] | None
    loss_scale_factor: float | None
    accumulation: int
    ema_momentum: float | None
    overwrite_every: int | None


def checked_config(config: Any) -> Config:
    """The config of a ``keras.optimizers.RMSprop``, checked.

    Args:
      config: what ``get_config`` returned, or the form of it with ``"class_name"`` that a ``.keras`` file has.

    Raises:
      TypeError: if it, or a value in it, has the wrong type.
      ValueError: if it belongs to another optimizer, lacks a value, or has one that Keras does not take.

    Example:
      >>> from rmsprop_jax.checkpoints.keras_config import checked_config, paths_of
      >>> needed = dict(name="rmsprop", learning_rate=0.1, rho=0.9, momentum=0.0, epsilon=1e-7, centered=False)
      >>> [path for path, _, _ in paths_of(checked_config(needed), ["dense/kernel"])]
      ['rmsprop/iteration', 'rmsprop/learning_rate', 'rmsprop/dense_kernel_velocity']
    """
    values = _arguments_of(config)
    for key in values:
        if key not in (*_REQUIRED, *_DEFAULTS):
            raise ValueError(f"config has {shown(key)}, which RMSprop of Keras 3 does not have; give its get_config()")
    for key in _REQUIRED:
        if key not in values:
            raise ValueError(f"config has no {key!r}; give the get_config() of a keras.optimizers.RMSprop")
    values = _DEFAULTS | values
    if not isinstance(values["name"], str):
        raise TypeError(f"name of config must be a string, got {shown(values['name'])}")
    rate = values["learning_rate"]
    uses_ema = _flag("use_ema", values)
    every = _count("ema_overwrite_frequency", values)
    return Config(
        name=values["name"],
        learning_rate=rate if isinstance(rate, Mapping) else _number("learning_rate", values),
        rule={
            "rho": _number("rho", values, below=1.0),
            "momentum": _number("momentum", values),
            "epsilon": _number("epsilon", values),
            "centered": _flag("centered", values),
            "weight_decay": 0.0 if values["weight_decay"] is None else _number("weight_decay", values),
        },
        clipping=_clipping(values),
        loss_scale_factor=_loss_scale_factor(values),
        accumulation=_count("gradient_accumulation_steps", values) or 1,
        ema_momentum=_ema_momentum(values) if uses_ema else None,
        overwrite_every=every if uses_ema else None,
    )


def _arguments_of(config: Any) -> dict[str, Any]:
    """What ``get_config`` returned, out of the form in which a ``.keras`` file has it too."""
    if not isinstance(config, Mapping):
        hint = "; call its get_config()" if hasattr(config, "get_config") else ""
        raise TypeError(f"config must be a dict, got {type(config).__name__}{hint}")
    if "inner_optimizer" in config or config.get("class_name") == "LossScaleOptimizer":
        raise ValueError(
            "config is that of a LossScaleOptimizer; give config['inner_optimizer']['config'] and the variables of its "
            "inner_optimizer, and scale the loss in the JAX program where its dtype needs it"
        )
    if "class_name" in config:
        if config["class_name"] != "RMSprop" or not isinstance(config.get("config"), Mapping):
            raise ValueError(f"config must be that of RMSprop, got {shown(config['class_name'])}")
        return dict(config["config"])
    return dict(config)


def _number(key: str, values: Mapping[str, Any], below: float = float("inf")) -> float:
    number = known(check_number(f"{key} of config", values[key], below))
    if number is None or number == float("inf"):
        raise ValueError(f"{key} of config must be a finite number, got {shown(values[key])}")
    return number


def _flag(key: str, values: Mapping[str, Any]) -> bool:
    return check_flag(f"{key} of config", values[key])


def _clipping(values: Mapping[str, Any]) -> tuple[str, float] | None:
    """The clipping and its limit. As in Keras, at most one is there, and a limit of 0 clips nothing."""
    given = [(key, _number(key, values)) for key in _CLIPPINGS if values[key] is not None]
    if len(given) > 1:
        raise ValueError(f"config has both {given[0][0]} and {given[1][0]}, and Keras takes only one of them")
    return given[0] if given and given[0][1] else None


def _loss_scale_factor(values: Mapping[str, Any]) -> float | None:
    if values["loss_scale_factor"] is None:
        return None
    factor = _number("loss_scale_factor", values)
    if np.float32(factor) == 0:
        raise ValueError(f"loss_scale_factor of config must be > 0 in float32, got {factor}")
    return factor


def _count(key: str, values: Mapping[str, Any]) -> int | None:
    """A number of updates. ``None`` and 0 ask for nothing, as in Keras."""
    is_unset = values[key] is None or (type(values[key]) is int and values[key] == 0)
    return None if is_unset else check_count(f"{key} of config", values[key])


def _ema_momentum(values: Mapping[str, Any]) -> float:
    momentum = _number("ema_momentum", values)
    if momentum > 1:
        raise ValueError(f"ema_momentum of config must be from 0 to 1, got {momentum:g}")
    return momentum


# --- The variables -------------------------------------------------------------------------------------------


def roles_of(config: Config) -> list[str]:
    """What an optimizer keeps for every parameter, in the order of its variables."""
    is_kept = {
        "average": config.ema_momentum is not None,
        "gradient_accumulator": config.accumulation > 1,
        "velocity": True,
        "momentum": config.rule["momentum"] > 0,
        "average_gradient": config.rule["centered"],
    }
    return [role for role, kept in is_kept.items() if kept]


def paths_of(config: Config, names: Sequence[str]) -> list[tuple[str, str, str]]:
    """The path of each variable of an optimizer, what it is, and the name of its parameter, in Keras' order."""
    rows = [("iteration", "iteration", "")]
    if not isinstance(config.learning_rate, Mapping):
        rows.append(("learning_rate", "learning_rate", ""))
    rows += [(f"{name.replace('/', '_')}_{role}", role, name) for role in roles_of(config) for name in names]
    return [(f"{config.name}/{path}", role, name) for path, role, name in rows]


def variables_by_role(variables: Any, paths: Sequence[tuple[str, str, str]]) -> dict[Key, tuple[str, Any]]:
    """For the role of each variable and the name of its parameter: what messages call it, and its array.

    Args:
      variables: by path, or by number as a file has them.
      paths: what :func:`paths_of` returned.

    Raises:
      TypeError: if ``variables`` is not a dict.
      ValueError: if a variable is missing or is there without being expected, or if two have the same path.
    """
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables must be a dict from paths to arrays, got {type(variables).__name__}")
    if variables and all(str(key).isdecimal() for key in variables):
        return _by_number({int(key): value for key, value in variables.items()}, paths)
    expected = [path for path, _, _ in paths]
    check_paths(expected)
    missing = [path for path in expected if path not in variables]
    known_paths = set(expected)
    additional = [path for path in variables if path not in known_paths]
    if missing or additional:
        found = {"missing": missing, "not expected": additional}
        problems = [f"{what}: {', '.join(map(shown, some[:3]))}" for what, some in found.items() if some]
        raise ValueError(
            f"variables are not those of config and names ({'; '.join(problems)}); give {{v.path: array}} of all "
            "optimizer.variables, the config of the same optimizer, and the paths of all variables that it trains"
        )
    return {(role, name): (repr(path), variables[path]) for path, role, name in paths}


def check_paths(paths: Sequence[str]) -> None:
    """Raises if a dict cannot hold the variables, since two of them have the same path.

    Raises:
      ValueError: with the path. Keras makes one path of the parameters ``a/b_c`` and ``a_b/c``.
    """
    twice = next((path for path, number in Counter(paths).items() if number > 1), None)
    if twice is not None:
        raise ValueError(
            f"two variables of the optimizer have the path {twice!r}, so that a dict by path holds only one of them; "
            "read the group optimizer/vars of a .weights.h5 file, or rename a layer"
        )


def _by_number(variables: Mapping[int, Any], paths: Sequence[tuple[str, str, str]]) -> dict[Key, tuple[str, Any]]:
    """The same for the variables of a file, whose keys are their places."""
    if sorted(variables) != list(range(len(paths))):
        raise ValueError(
            f"by config and names, variables must have the keys 0 to {len(paths) - 1}, got {shown(sorted(variables))}; "
            "give the whole group optimizer/vars, the config of the same optimizer, and the paths of all variables "
            "that it trains"
        )
    return {(role, name): (f"{i} ({path!r})", variables[i]) for i, (path, role, name) in enumerate(paths)}
