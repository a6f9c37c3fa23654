"""Reading is safe: of a file that is changed anywhere, we make the right thing, or an error that names the culprit.

Every source has valid files, a call that reads them, and an oracle. hypothesis changes a file, once or twice. Allowed
are only two outcomes: a ValueError or TypeError of one line that names a part of the changed file; or a state from
which one more update is what the oracle says.

``make fuzz`` runs it long: 20,000 changed files for each source, or as many as ``FUZZ`` says.
"""

import copy
import os
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies

from mutate import Change, changed, copy_of
from rmsprop_jax import dialects, rmsprop
from rmsprop_jax.checkpoints import (
    from_keras,
    from_optax,
    from_tensorflow,
    from_torch,
    schedules_of,
    to_keras,
    to_optax,
    to_tensorflow,
    to_torch,
)

torch = pytest.importorskip("torch")
of_distributed = pytest.importorskip("torch.distributed.checkpoint.state_dict")
lr_scheduler = torch.optim.lr_scheduler

EXAMPLES = int(os.environ.get("FUZZ", "60"))

NAMES = ["matrix", "vector"]
SHAPES = {"matrix": (2, 3), "vector": (3,)}


def numbers(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (rng.standard_normal(shape) + 0.4).astype(np.float32) for name, shape in SHAPES.items()}


PARAMS, GRADIENTS = numbers(0), numbers(1)


class Source(NamedTuple):
    """What is changed, and what has to come out.

    Attributes:
      files: valid files by case.
      read: what our library makes of a file: the parameters after one more update.
      oracle: the same by someone else, from the changed and the valid file; an error if the changed file is none.
      words: what a message may name, besides the keys on the way to the change.
    """

    files: Mapping[str, Any]
    read: Callable[[str, Any], dict[str, np.ndarray]]
    oracle: Callable[[str, Any, Any], dict[str, np.ndarray]]
    words: tuple[str, ...]


def updated(tx: Any, state: Any) -> dict[str, np.ndarray]:
    updates, _ = tx.update(GRADIENTS, state, PARAMS)
    return {name: np.asarray(p) for name, p in optax.apply_updates(PARAMS, updates).items()}


def same(named: Any) -> dict[str, Any]:
    return dict(named)


# --- Torch -----------------------------------------------------------------------------------------------------


class Pair(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, p in PARAMS.items():
            self.register_parameter(name, torch.nn.Parameter(torch.tensor(p)))


def two_groups(model: Pair) -> list[dict[str, Any]]:
    return [{"params": [model.matrix]}, {"params": [model.vector], "centered": True, "momentum": 0.0, "lr": 0.05}]


def torch_run(groups: Callable[[Pair], Any] = lambda model: model.parameters(), **options: Any) -> tuple[Pair, Any]:
    model = Pair()
    arguments = dict(lr=0.02, alpha=0.9, eps=1e-3, weight_decay=0.01, momentum=0.8) | options
    return model, torch.optim.RMSprop(groups(model), **arguments)


def torch_step(model: Pair, optimizer: Any, gradients: Mapping[str, np.ndarray]) -> None:
    for name, g in gradients.items():
        p = getattr(model, name)
        p.grad = torch.tensor(g, dtype=p.dtype)
    optimizer.step()


def torch_files() -> dict[str, Any]:
    files = {}
    for name, groups, options in [
        ("one group", lambda model: model.parameters(), {}),
        ("centered", lambda model: model.parameters(), dict(centered=True, momentum=0.0)),
        ("two groups", two_groups, {}),
        ("names", lambda model: model.named_parameters(), {}),
    ]:
        model, optimizer = torch_run(groups, **options)
        for seed in (5, 6):
            torch_step(model, optimizer, numbers(seed))
        files[name] = copy.deepcopy(optimizer.state_dict())
    files["by name"] = of_distributed.get_optimizer_state_dict(model, optimizer)
    flat = of_distributed.StateDictOptions(flatten_optimizer_state_dict=True)
    files["flattened"] = of_distributed.get_optimizer_state_dict(model, optimizer, options=flat)
    return files


def read_torch(case: str, file: Any) -> dict[str, np.ndarray]:
    return updated(*from_torch(file, NAMES, same, params=PARAMS))


# What says nothing about the next update. Torch reads some of it and fails.
UNREAD = ("foreach", "fused", "capturable", "differentiable", "name", "initial_lr")


def step_in_torch(case: str, file: Any, valid: Any = None) -> dict[str, np.ndarray]:
    """One step of torch in float64 from the file, in which what nobody reads is torch's default."""
    file = by_index(file)
    model = Pair().double()
    groups = [{"params": [getattr(model, NAMES[key]) for key in group["params"]]} for group in file["param_groups"]]
    optimizer = torch.optim.RMSprop(groups)
    defaults = {key: value for key, value in optimizer.defaults.items() if key in UNREAD}
    for group in file["param_groups"]:
        group.pop("param_names", None)
        group.update(defaults)
        is_number = {key: type(x) is int or (isinstance(x, np.ndarray) and x.size == 1) for key, x in group.items()}
        group.update({key: float(x) for key, x in group.items() if is_number[key]})
    for entry in file["state"].values():
        entry.update({slot: as_double(x) for slot, x in entry.items()})
    optimizer.load_state_dict(file)
    torch_step(model, optimizer, GRADIENTS)
    return {name: p.detach().numpy().astype(np.float32) for name, p in model.named_parameters()}


def as_double(x: Any) -> torch.Tensor:
    return x.detach().double() if torch.is_tensor(x) else torch.tensor(np.asarray(x, np.float64))


def by_index(file: Any) -> Any:
    """The file with indices for names, in their order."""
    if any(str(key).startswith("param_groups.") for key in file):
        state: dict[Any, Any] = {}
        groups = []
        for name in NAMES:
            prefix = f"state.{name}."
            state[name] = {key[len(prefix) :]: x for key, x in file.items() if key.startswith(prefix)}
            prefix = f"param_groups.{name}."
            group = {key[len(prefix) :]: x for key, x in file.items() if key.startswith(prefix)}
            group.pop("param_names", None)  # of all parameters of its group
            groups.append({**group, "params": [name]})
        file = {"state": {name: entry for name, entry in state.items() if entry}, "param_groups": groups}
    number = {name: index for index, name in enumerate(NAMES)}
    for group in file["param_groups"]:
        has_names = all(isinstance(key, str) for key in group["params"])
        recorded = group["params"] if has_names else group.get("param_names") or group["params"]
        indices = [number.get(name, name) for name in recorded]
        old = dict(zip(group["params"], indices, strict=True))
        file["state"] = {old.get(key, key): entry for key, entry in file["state"].items()}
        group["params"] = indices
    return {**file, "param_groups": [dict(group) for group in file["param_groups"]]}


# --- To torch ----------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "plain": dict(lr=0.02, alpha=0.9, eps=1e-3, momentum=0.8),
    "centered": dict(lr=0.02, alpha=0.9, eps=1e-3, centered=True),
}
TO_TORCH = {name: rmsprop(**arguments) for name, arguments in RUNS.items()} | {
    "partition": optax.partition(
        {"a": rmsprop(**RUNS["plain"]), "b": rmsprop(**RUNS["centered"])}, {"matrix": "a", "vector": "b"}
    )
}


def after_two(tx: Any) -> Any:
    """The state after two updates, in NumPy's arrays."""
    state = tx.init(PARAMS)
    for seed in (5, 6):
        _, state = tx.update(numbers(seed), state, PARAMS)
    return jax.tree.map(np.asarray, state)


def like_of_torch(case: str) -> Any:
    """The file of an optimizer that has made a step, so that it tells the shapes."""
    model = Pair()
    if case == "partition":
        groups = [{"params": [model.matrix], **RUNS["plain"]}, {"params": [model.vector], **RUNS["centered"]}]
    else:
        groups = [{"params": model.parameters(), **RUNS[case]}]
    optimizer = torch.optim.RMSprop(groups)
    torch_step(model, optimizer, GRADIENTS)
    return optimizer.state_dict()


def write_torch(case: str, state: Any) -> dict[str, np.ndarray]:
    file = to_torch(state, NAMES, same, like=like_of_torch(case), tensor=torch.from_numpy)
    return step_in_torch(case, file)


def as_init_gives(state: Any) -> Any:
    """The state in the dtypes of init, which are read from wider and narrower ones."""

    def leaf(x: Any) -> Any:
        x = np.asarray(x)
        if x.dtype.kind in "iu":
            return jnp.asarray(x, jnp.int32)
        return jnp.asarray(x, jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, state)


def step_here(case: str, state: Any, valid: Any) -> dict[str, np.ndarray]:
    if case == "partition":  # in which the labels are the user's
        parts = sorted(state.inner_states.values(), key=lambda part: part.inner_state.momentum_buffer is None)
        state = optax.transforms.PartitionState(dict(zip("ab", parts, strict=True)))
    return updated(TO_TORCH[case], as_init_gives(state))


# --- Optax -----------------------------------------------------------------------------------------------------------

OPTAX: dict[str, Callable[[Any], Any]] = {
    "momentum": lambda f: f(0.02, momentum=0.9),
    "schedule": lambda f: optax.chain(optax.clip(2.0), f(lambda count: 0.02 / (1 + count), centered=True, eps=1e-3)),
    "bias_correction": lambda f: f(0.02, bias_correction=True, momentum=0.5),
    "injected": lambda f: optax.inject_hyperparams(f)(learning_rate=0.02),
}
OF_OPTAX = {name: build(optax.rmsprop) for name, build in OPTAX.items()}
OURS = {name: build(dialects.optax) for name, build in OPTAX.items()}
COUNTED = {"momentum": dict(step=2), "bias_correction": dict(step=2, decay=0.9)}
DECAY = {"bias_correction": dict(decay=0.9)}


def without_target(state: Any) -> Any:
    """As a checkpoint is restored without a target: dicts for tuples."""
    if isinstance(state, tuple):
        children = state._asdict() if hasattr(state, "_fields") else dict(enumerate(state))
        return {str(key): without_target(child) for key, child in children.items()}
    return {key: without_target(child) for key, child in state.items()} if isinstance(state, dict) else state


def with_target(file: Any, valid: Any) -> Any:
    """The inverse of :func:`without_target`."""
    if not isinstance(valid, tuple | dict):
        return file
    if not jax.tree.leaves(valid) and not jax.tree.leaves(file):
        return valid
    expected, given = without_target(valid), file if isinstance(file, dict) else without_target(file)
    if not isinstance(given, dict):
        raise ValueError("no container")
    if type(valid) is tuple:  # whichever order its parts are in
        given = {key: part for key, part in given.items() if jax.tree.leaves(part)}
        wanted = {key: child for key, child in expected.items() if jax.tree.leaves(child)}
        if len(given) != len(wanted):
            raise ValueError("another container")
        given = {key: part_like(child, given.values()) for key, child in wanted.items()}
    for key in {**expected, **given}:
        if (key in expected) != (key in given) and jax.tree.leaves(given.get(key, expected.get(key))):
            raise ValueError("another container")
    children = valid.values() if isinstance(valid, dict) else valid
    filled = [with_target(given.get(key), child) for key, child in zip(expected, children, strict=True)]
    if isinstance(valid, dict):
        return dict(zip(valid, filled, strict=True))
    return type(valid)(*filled) if hasattr(valid, "_fields") else tuple(filled)


def part_like(expected: Any, parts: Any) -> Any:
    """The one of ``parts`` that has the fields of ``expected``."""
    if len(parts) == 1:
        return next(iter(parts))
    found = [part for part in parts if without_target(part or {}).keys() == expected.keys()]
    if not found:
        raise ValueError("another container")
    return found[0]


def optax_files() -> dict[str, Any]:
    states = {name: after_two(tx) for name, tx in OF_OPTAX.items()}
    return states | {f"{name}, restored": without_target(state) for name, state in states.items()}


def read_optax(case: str, file: Any) -> dict[str, np.ndarray]:
    name = case.removesuffix(", restored")
    return updated(OURS[name], from_optax(file, like=OURS[name].init(PARAMS), **COUNTED.get(name, {})))


def step_in_optax(case: str, file: Any, valid: Any) -> dict[str, np.ndarray]:
    name = case.removesuffix(", restored")
    tx = OF_OPTAX[name]
    state = with_target(file, jax.tree.map(np.asarray, tx.init(PARAMS)))
    return updated(tx, as_init_gives(state))


def write_optax(case: str, state: Any) -> dict[str, np.ndarray]:
    tx = OF_OPTAX[case]
    return updated(tx, to_optax(state, like=tx.init(PARAMS), **DECAY.get(case, {})))


def step_in_dialect(case: str, state: Any, valid: Any) -> dict[str, np.ndarray]:
    return updated(OURS[case], as_init_gives(state))


# --- Keras -----------------------------------------------------------------------------------------------------------


def keras_config(**changes: Any) -> dict[str, Any]:
    """What ``get_config`` of Keras 3.15 returns."""
    unset = dict.fromkeys(("weight_decay", "clipnorm", "global_clipnorm", "clipvalue", "ema_overwrite_frequency"))
    unset |= dict.fromkeys(("loss_scale_factor", "gradient_accumulation_steps"))
    of_average = dict(use_ema=False, ema_momentum=0.99)
    rule = dict(name="rmsprop", learning_rate=0.02, rho=0.9, momentum=0.8, epsilon=1e-3, centered=False)
    return rule | unset | of_average | changes


def keras_file(**changes: Any) -> dict[str, Any]:
    config, made = keras_config(**changes), {}
    square_avg, mean = numbers(7), numbers(8)
    for name in NAMES:
        made[f"rmsprop/{name}_velocity"] = square_avg[name] ** 2 + mean[name] ** 2
        if config["momentum"]:
            made[f"rmsprop/{name}_momentum"] = 0.1 * numbers(9)[name]
        if config["centered"]:
            made[f"rmsprop/{name}_average_gradient"] = mean[name]
    order = sorted(made, key=lambda path: ("velocity" not in path, "momentum" not in path))
    rate = config["learning_rate"]
    rate = rate if isinstance(rate, float) else rate["config"]["initial_learning_rate"]
    counters = {"rmsprop/iteration": np.int64(2), "rmsprop/learning_rate": np.float32(rate)}
    variables = counters | {path: made[path] for path in order}
    return {"config": config, "variables": {path: np.asarray(x) for path, x in variables.items()}}


def keras_files() -> dict[str, Any]:
    files = {
        "momentum": keras_file(),
        "centered": keras_file(centered=True, momentum=0.0),
        "clipped": keras_file(centered=True, clipnorm=0.5),
    }
    numbered = keras_file()
    numbered["variables"] = {str(place): x for place, x in enumerate(numbered["variables"].values())}
    return files | {"numbered": numbered}


def read_keras(case: str, file: Any) -> dict[str, np.ndarray]:
    return updated(*from_keras(file.get("config"), file.get("variables"), NAMES, same))


def step_in_keras(case: str, file: Any, valid: Any) -> dict[str, np.ndarray]:
    """The rule of Keras in float64, from its source."""
    config, variables = keras_config() | file["config"], file["variables"]
    if not any("/" in str(path) for path in variables):
        paths = list(keras_file()["variables"])
        variables = {paths[int(place)]: x for place, x in variables.items()}
    found = {path: np.asarray(x, np.float64) for path, x in variables.items()}
    gradients = {name: g.astype(np.float64) / (config["loss_scale_factor"] or 1) for name, g in GRADIENTS.items()}
    norms = {name: np.linalg.norm(g) for name, g in gradients.items()}
    whole = np.linalg.norm(list(norms.values()))
    result = {}
    for name, g in gradients.items():
        if config["clipnorm"]:
            g = g * min(1, config["clipnorm"] / norms[name])
        if config["global_clipnorm"]:
            g = g * min(1, config["global_clipnorm"] / whole)
        if config["clipvalue"]:
            g = np.clip(g, -config["clipvalue"], config["clipvalue"])
        rho, rate = float(config["rho"]), float(found["rmsprop/learning_rate"])
        velocity = found[f"rmsprop/{name}_velocity"]
        denominator = rho * velocity + (1 - rho) * g**2 + float(config["epsilon"])
        if config["centered"]:
            mean = found[f"rmsprop/{name}_average_gradient"]
            denominator = denominator - (rho * mean + (1 - rho) * g) ** 2
            denominator[velocity < mean**2] = np.nan  # by rounding, which is no variance here
        step = rate * g / np.sqrt(denominator)
        if float(config["momentum"]) > 0:
            step = float(config["momentum"]) * found[f"rmsprop/{name}_momentum"] + step
        result[name] = (PARAMS[name] * (1 - rate * float(config["weight_decay"] or 0)) - step).astype(np.float32)
    return result


# --- TensorFlow 1 --------------------------------------------------------------------------------------------------

TENSORFLOW: dict[str, dict[str, Any]] = {
    "plain": dict(learning_rate=0.02, decay=0.9, epsilon=1e-3),
    "everything": dict(learning_rate=0.02, decay=0.9, epsilon=1e-3, momentum=0.8, centered=True),
}


def tensorflow_files() -> dict[str, Any]:
    files = {}
    for case, arguments in TENSORFLOW.items():
        file: dict[str, Any] = {"global_step": np.int64(2)} | {f"net/{name}": x for name, x in PARAMS.items()}
        for name in NAMES:
            mean, root, buffer = (numbers(seed)[name] for seed in (8, 7, 9))
            is_centered = arguments.get("centered", False)
            slots = [root**2 + mean**2, *([mean] if is_centered else []), 0.1 * buffer]
            for place, x in enumerate(slots):
                file[f"net/{name}/RMSProp" + (f"_{place}" if place else "")] = x
        files[case] = file
    return files


def read_tensorflow(case: str, file: Any) -> dict[str, np.ndarray]:
    names = [f"net/{name}" for name in NAMES]
    to_params = lambda named: {name: named[f"net/{name}"] for name in NAMES}  # noqa: E731
    return updated(*from_tensorflow(file, names, to_params, **TENSORFLOW[case]))


def step_in_tensorflow(case: str, file: Any, valid: Any) -> dict[str, np.ndarray]:
    """The rule of TensorFlow 1 in float64, from its source."""
    arguments = dict(momentum=0.0, centered=False) | TENSORFLOW[case]
    decay, result = arguments["decay"], {}
    for name, g in GRADIENTS.items():
        g = g.astype(np.float64)
        suffixes = ["", "_1", "_2"] if arguments["centered"] else ["", "", "_1"]
        rms, mean, buffer = (np.asarray(file[f"net/{name}/RMSProp{suffix}"], np.float64) for suffix in suffixes)
        denominator = decay * rms + (1 - decay) * g**2 + arguments["epsilon"]
        if arguments["centered"]:
            denominator = denominator - (decay * mean + (1 - decay) * g) ** 2
            denominator[rms < mean**2] = np.nan
        buffer = arguments["momentum"] * buffer + arguments["learning_rate"] * g / np.sqrt(denominator)
        result[name] = (PARAMS[name] - buffer).astype(np.float32)
    return result


# --- To Keras and to TensorFlow 1 ----------------------------------------------------------------------------------

OUT: dict[str, dict[str, Any]] = {
    "momentum": dict(learning_rate=0.02, momentum=0.8, centered=False),
    "centered": dict(learning_rate=0.02, momentum=0.0, centered=True),
}
KERAS = {case: dialects.keras(rho=0.9, epsilon=1e-3, **arguments) for case, arguments in OUT.items()}
OF_TENSORFLOW = {case: dialects.tensorflow(**arguments) for case, arguments in TENSORFLOW.items()}


def write_keras(case: str, state: Any) -> dict[str, np.ndarray]:
    config = keras_config(**OUT[case])
    variables = of_shapes(to_keras(state, NAMES, same, config=config), "rmsprop/")
    return step_in_keras(case, {"config": config, "variables": variables}, None)


def write_tensorflow(case: str, state: Any) -> dict[str, np.ndarray]:
    names = [f"net/{name}" for name in NAMES]
    centered = TENSORFLOW[case].get("centered", False)
    file = to_tensorflow(state, names, lambda p: {f"net/{name}": x for name, x in dict(p).items()}, centered=centered)
    return step_in_tensorflow(case, of_shapes(file, "net/"), None)


def of_shapes(file: Any, prefix: str) -> Any:
    """The file, if it can be loaded into the variables of the model."""
    for key, x in file.items():
        for name, shape in SHAPES.items():
            if key.startswith(prefix + name) and (x.shape != shape or np.iscomplexobj(x)):
                raise ValueError(f"{name} is like another variable")
    return file


def step_of_tensorflow(case: str, state: Any, valid: Any) -> dict[str, np.ndarray]:
    if state.momentum_buffer is None:  # TensorFlow has one without momentum, too
        state = state._replace(momentum_buffer=jax.tree.map(np.zeros_like, state.square_avg))
    tx = OF_TENSORFLOW[case]
    kept = tx.init(PARAMS).momentum_buffer is not None
    return updated(tx, as_init_gives(state if kept else state._replace(momentum_buffer=None)))


# --- Schedulers of torch -------------------------------------------------------------------------------------------

AHEAD = 5  # steps of the scheduler
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 3, gamma=0.5),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=0.001),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=30),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        [5],
    ),
}


def scheduler_files() -> dict[str, Any]:
    files = {}
    for case, build in SCHEDULERS.items():
        _, optimizer = torch_run()
        scheduler = build(optimizer)
        for _ in range(4):
            optimizer.step()
            scheduler.step()
        groups = [{**group, "params": [0, 1]} for group in optimizer.state_dict()["param_groups"]]
        files[case] = {"scheduler": copy.deepcopy(scheduler.state_dict()), "groups": groups}
    return files


def read_scheduler(case: str, file: Any) -> dict[str, np.ndarray]:
    [group] = schedules_of(file.get("scheduler"), file.get("groups"), step=4)
    if case == "OneCycleLR" and "momentum" not in group:  # then nobody moves it
        group["momentum"] = lambda count: file["groups"][0]["momentum"]
    return {key: np.array([float(schedule(4 + n)) for n in range(AHEAD)]) for key, schedule in group.items()}


def without_notes(file: Any, valid: Any) -> Any:
    """The file with the notes of the valid one, which torch writes for itself."""
    notes = ("_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial", "verbose")
    changed_notes = {key: x for key, x in valid.items() if key in notes}
    parts = file.get("_schedulers")
    if isinstance(parts, list | tuple):
        both = zip(parts, valid["_schedulers"], strict=True)
        changed_notes["_schedulers"] = [without_notes(part, before) for part, before in both]
    return {key: x for key, x in file.items() if key not in notes} | changed_notes


def steps_of_scheduler(case: str, file: Any, valid: Any) -> dict[str, np.ndarray]:
    _, optimizer = torch_run()
    scheduler = SCHEDULERS[case](optimizer)
    read = {"lr", "initial_lr", "max_lr", "min_lr"}  # what no schedule depends on is as it was
    read |= {"momentum", "base_momentum", "max_momentum"} if case == "OneCycleLR" else set()
    groups = [
        {**before, **{key: x for key, x in group.items() if key in read and isinstance(x, float | int)}}
        for before, group in zip(valid["groups"], file["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": {}, "param_groups": groups})
    scheduler.load_state_dict(without_notes(file["scheduler"], valid["scheduler"]))
    kept: dict[str, list[float]] = {"lr": [], "momentum": []}
    for _ in range(AHEAD):
        for key, values in kept.items():
            values.append(float(optimizer.param_groups[0][key]))
        optimizer.step()
        scheduler.step()
    return {"lr": np.array(kept["lr"])} | ({"momentum": np.array(kept["momentum"])} if case == "OneCycleLR" else {})


# --- The property --------------------------------------------------------------------------------------------------

SLOTS = ("square_avg", "grad_avg", "momentum_buffer", "step")
SOURCES: dict[str, Callable[[], Source]] = {
    "from_torch": lambda: Source(torch_files(), read_torch, step_in_torch, ()),
    "to_torch": lambda: Source({k: after_two(tx) for k, tx in TO_TORCH.items()}, write_torch, step_here, ()),
    "from_optax": lambda: Source(optax_files(), read_optax, step_in_optax, ()),
    # Not with injected numbers: those are read by Optax alone.
    "to_optax": lambda: Source(
        {k: after_two(tx) for k, tx in OURS.items() if k != "injected"}, write_optax, step_in_dialect, ()
    ),
    "from_keras": lambda: Source(keras_files(), read_keras, step_in_keras, ()),
    "from_tensorflow": lambda: Source(tensorflow_files(), read_tensorflow, step_in_tensorflow, ()),
    "to_keras": lambda: Source(
        {k: after_two(tx) for k, tx in KERAS.items()},
        write_keras,
        lambda case, state, valid: updated(KERAS[case], as_init_gives(state)),
        (),
    ),
    "to_tensorflow": lambda: Source(
        {k: after_two(tx) for k, tx in OF_TENSORFLOW.items()},
        write_tensorflow,
        step_of_tensorflow,
        (),
    ),
    "schedules_of": lambda: Source(scheduler_files(), read_scheduler, steps_of_scheduler, ()),
}
_SOURCES: dict[str, Source] = {}


def source_of(name: str) -> Source:
    return _SOURCES.setdefault(name, SOURCES[name]()) if name not in _SOURCES else _SOURCES[name]


def outcome(call: Callable[[], dict[str, np.ndarray]]) -> Any:
    """What a call returns, or its error."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return call()
    except Exception as error:
        return error


ALSO = {"nu": "square_avg", "mu": "grad_avg", "trace": "momentum_buffer", "momentum": "momentum_buffer"}
ALSO |= dict.fromkeys(("max_lr", "min_lr", "initial_lr"), "lr")
ALSO |= {"base_momentum": "momentum", "max_momentum": "momentum", "param_names": "names"}
ARGUMENTS = {"optimizer_state_dict", "state", "opt_state", "like", "config", "variables", "scheduler_state_dict"}
ARGUMENTS |= {"param_groups", "names", "step"}


def words_of(change: Change) -> set[str]:
    """What a message may name, as a whole word: the keys on the way to the change, and in what it does.

    A parameter's name stands for its index. Where the change is at the top, the argument is what was changed.
    """
    keys = [*change.path, *change.what.split("'")[1::2]]
    words = {word.strip("_") for key in keys if isinstance(key, str) for word in re.findall(r"\w+", key)}
    words |= {"7"} if "renamed to 7" in change.what else set()
    words |= {ALSO[word] for word in words if word in ALSO}
    named = {name for number, name in enumerate(NAMES) for key in keys if key == number or name in str(key)}
    words |= named or set(NAMES)  # what holds all parameters may be called by any of them
    words |= {"entry", "param"} if "params" in words else set()  # of a parameter that is in no group any more
    words |= {"junk"} if "neighbor" in change.what else set()
    words |= {"group"} if "renamed to ''" in change.what else set()  # which has an empty key
    return words | (ARGUMENTS if len(change.path) < 3 else set())


def check(source: Source, case: str, change: Change, changes: list[Change]) -> str:
    """Raises unless the outcome is one of the two that are allowed; returns which."""
    got = outcome(lambda: source.read(case, copy_of(change.file)))
    where = f"{case}: {change.path} {change.what}"
    if isinstance(got, Exception):
        assert isinstance(got, ValueError | TypeError), f"{where}: {type(got).__name__}: {got}"
        message = str(got)
        assert "\n" not in message, f"{where}: {message}"
        assert len(message) < 700, f"{where}: {message}"
        words = {word for each in changes for word in words_of(each)} | set(source.words)
        said = {word.strip("_") for word in re.findall(r"\w+", message)}
        # A plural names its singular.
        assert any(a.startswith(b) for a in said for b in words), f"{where}: names nothing: {message}"
        return "refused"
    want = outcome(lambda: source.oracle(case, copy_of(change.file), source.files[case]))
    assert not isinstance(want, Exception), f"{where}: accepted, but the oracle says {type(want).__name__}: {want}"
    for name, x in want.items():
        assert got[name].shape == x.shape, f"{where}: {name} has shape {got[name].shape}"
        # Of a variance below zero, which is 0 here, others make NaN. Schedules are in float32.
        finite = np.isfinite(x) & np.isfinite(got[name]) & (np.abs(x) < 1e37)
        if any(large in each.what for each in changes for large in ("10**30", "1e300")):
            continue  # float32 and the oracle's float64 end elsewhere
        np.testing.assert_allclose(got[name][finite], x[finite], rtol=1e-4, atol=1e-6, err_msg=f"{where}: {name}")
    return "accepted"


@pytest.mark.parametrize("name", SOURCES)
def test_valid_files_are_read(name: str) -> None:
    source = source_of(name)
    for case, file in source.files.items():
        assert check(source, case, Change(file, (), "is valid"), []) == "accepted", case


CHANGES = strategies.lists(
    strategies.tuples(strategies.integers(0, 10**4), strategies.integers(0, 10**4)), min_size=1, max_size=2
)


@pytest.mark.parametrize("name", SOURCES)
@hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(case=strategies.integers(0, 10**4), changes=CHANGES)
def test_changed_file_is_read_right_or_refused_by_name(name: str, case: int, changes: list[tuple[int, int]]) -> None:
    source = source_of(name)
    chosen = list(source.files)[case % len(source.files)]
    change, done = Change(source.files[chosen], (), "is valid"), []
    for place, kind in changes:
        change = changed(change.file, place, kind)
        done.append(change)
    hypothesis.event(check(source, chosen, change, done))
