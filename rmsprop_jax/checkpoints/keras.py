"""Optimizers of Keras 3: the config and the variables of ``keras.optimizers.RMSprop`` in, and out again.

Keras is not imported. The config has the hyperparameters, and says which variables there are, in which order.
``checkpoints.named`` carries them into a tree, and ``checkpoints.keras_pieces`` has what stands around the rule.

Source: Keras 3.15, ``keras/src/optimizers/rmsprop.py`` and ``base_optimizer.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax.arguments import shown
from rmsprop_jax.checkpoints.keras_config import (
    Config,
    check_paths,
    checked_config,
    paths_of,
    roles_of,
    variables_by_role,
)
from rmsprop_jax.checkpoints.keras_pieces import (
    AveragesState,
    accumulate,
    average_parameters,
    clip_each_by_norm,
    divide_by,
)
from rmsprop_jax.checkpoints.keras_schedules import schedule_of
from rmsprop_jax.checkpoints.named import build_optimizer, check_functions, checked_names, slots_by_name
from rmsprop_jax.checkpoints.slots import Parameter, count_of
from rmsprop_jax.checkpoints.variables import array_of_variable, exported, parameter_of, real_array_of
from rmsprop_jax.dialects import keras
from rmsprop_jax.state import RMSPropState, is_absent, leaf_key, leaf_name

__all__ = ["from_keras", "to_keras"]

_EXAMPLE_OF_NAMES = "[v.path for v in model.trainable_variables]"
_FIELDS = {"velocity": "square_avg", "momentum": "momentum_buffer", "average_gradient": "grad_avg"}

Found = Mapping[tuple[str, str], tuple[str, Any]]  # what variables_by_role returned


# --- From Keras ----------------------------------------------------------------------------------------------


def from_keras(
    config: Mapping[str, Any],
    variables: Mapping[str, Any],
    names: Sequence[str],
    to_params: Callable[[dict[str, np.ndarray]], chex.ArrayTree],
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    exclude_from_weight_decay: Sequence[str] | None = None,
) -> tuple[optax.GradientTransformationExtraArgs, optax.OptState]:
    """The transformation and the state that continue a run of ``keras.optimizers.RMSprop`` in JAX.

    The transformation is ``dialects.keras`` with the hyperparameters in ``config``, and does what else ``config`` asks
    for, from the gradient to the parameters::

        loss_scale_factor             g / loss_scale_factor (the program scales the loss, as scale_loss does in Keras)
        gradient_accumulation_steps   optax.MultiSteps
        clipnorm                      optax.clip_by_global_norm of each variable on its own
        global_clipnorm, clipvalue    optax.clip_by_global_norm, optax.clip
        use_ema                       an average of the parameters: optax.tree.get(state, "average")

    The state is what ``tx.init`` makes, with Keras' numbers in it. For each parameter::

        step            ← iteration // gradient_accumulation_steps
        square_avg      ← velocity, or max(velocity − average_gradient², 0) if centered (computed in float64)
        grad_avg        ← average_gradient    if centered
        momentum_buffer ← momentum            if momentum
        acc_grads       ← gradient_accumulator / mini_step, where mini_step = iteration % gradient_accumulation_steps
        average         ← average             if use_ema

    Args:
      config: what ``optimizer.get_config()`` returned, or ``["compile_config"]["optimizer"]`` of the ``config.json`` in
        a ``.keras`` file.
      variables: ``{v.path: v.numpy() for v in optimizer.variables}``; or the group ``optimizer/vars`` of a
        ``.weights.h5`` file or of the ``model.weights.h5`` in a ``.keras`` file, as h5py reads it, with the keys "0",
        "1", and so on.
      names: the paths of the variables that are trained, in the order of the model:
        ``[v.path for v in model.trainable_variables]``.
      to_params: from ``{name: array}``, with all ``names`` and no others, to the tree that the JAX model trains. It
        may rename, transpose, reshape, split and join, but not cast or compute. With ``clipnorm`` it may not split or
        join, since a leaf of JAX is then one variable of Keras.
      learning_rate: replaces the one in ``config``: a number, or a schedule that is read at the number of updates.
        Needed where ``config`` has a schedule that is not one of Keras', and where a callback moved the rate on and
        keeps moving it.
      exclude_from_weight_decay: those of ``names`` that the program excluded from weight decay, ``[]`` for none.
        ``config`` does not say. Needed where it has a ``weight_decay``.

    Returns:
      ``(tx, state)``. The state has the structure and the dtypes of ``tx.init(params)`` (at least float32; a float64
      file needs ``jax_enable_x64``, or is rounded to float32) and shares no memory with ``variables``. A schedule in
      ``config`` is read as in Keras, at the number of gradients so far.

    Raises:
      TypeError: if an argument or a variable has the wrong type.
      ValueError: if ``config`` asks for something else; if a variable is missing, not expected, not finite, or cannot
        be that of a run; or if ``to_params`` does more than rearrange. The message names it.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax.checkpoints import from_keras
      >>> config = dict(name="rmsprop", learning_rate=0.1, rho=0.9, momentum=0.0, epsilon=1e-7, centered=False)
      >>> variables = {
      ...     "rmsprop/iteration": np.int64(7),
      ...     "rmsprop/learning_rate": np.float32(0.1),
      ...     "rmsprop/dense_kernel_velocity": np.array([[4.0, 9.0]], np.float32),
      ... }
      >>> tx, state = from_keras(config, variables, ["dense/kernel"], lambda named: {"kernel": named["dense/kernel"]})
      >>> print(state.step, state.square_avg["kernel"])
      7 [[4. 9.]]
    """
    check_functions(to_params=to_params)
    settings = checked_config(config)
    paths = checked_names(names, _EXAMPLE_OF_NAMES)
    excluded = _excluded(exclude_from_weight_decay, settings, paths)
    found = variables_by_role(variables, paths_of(settings, paths))
    iteration = count_of(*found["iteration", ""])
    rule = settings.rule | {"learning_rate": _learning_rate(settings, found, learning_rate)}
    step = iteration // settings.accumulation
    roles = [role for role in roles_of(settings) if role in _FIELDS]
    parameters = [parameter_of(name, step, {_FIELDS[role]: found[role, name] for role in roles}) for name in paths]
    _, state = build_optimizer(parameters, to_params, [keras(**rule)])
    tree = _Tree(to_params, parameters, state.square_avg)
    mask = tree.mask_of(excluded) if excluded else None
    return _with_pieces(keras(**rule, weight_decay_mask=mask), state, settings, iteration, found, tree)


def _excluded(given: Any, settings: Config, names: list[str]) -> list[str]:
    """The names of the variables that do not decay, which the config does not hold."""
    if given is None:
        if settings.rule["weight_decay"]:
            raise ValueError(
                f"config has weight_decay={settings.rule['weight_decay']:g}, but does not say which variables "
                "exclude_from_weight_decay left out; give their names as exclude_from_weight_decay=, [] for none"
            )
        return []
    excluded = checked_names(given, "['dense/bias']")
    for name in excluded:
        if name not in names:
            raise ValueError(f"exclude_from_weight_decay has {shown(name)}, which is not one of names: {shown(names)}")
    return excluded


def _learning_rate(settings: Config, found: Found, given: Any) -> Any:
    """``given``; else the schedule of the config; else its number, if the variables have the same one."""
    in_config = settings.learning_rate
    if isinstance(in_config, Mapping):
        if given is not None:
            return given
        schedule, every = schedule_of(in_config), settings.accumulation
        # An update reads the schedule at the last of its gradients.
        return schedule if every == 1 else lambda step: schedule(step * every + (every - 1))
    where, value = found["learning_rate", ""]
    array = array_of_variable(where, value)
    if array.shape or not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{where} must be a floating scalar, got {array.dtype} {array.shape}")
    if given is not None:
        return given
    with np.errstate(over="ignore"):
        rounded = np.asarray(in_config).astype(array.dtype)
    if array != rounded:
        raise ValueError(
            f"{where} is {float(array):g}, but learning_rate of config is {in_config:g}; give the one that holds from "
            "here on as learning_rate="
        )
    return float(array)


class _Tree:
    """The tree that a function makes of the parameters, once ``build_optimizer`` knows that it only rearranges.

    Args:
      to_params: the function.
      parameters: what it is made of.
      like: the tree, with ``None`` where it holds no parameter.
    """

    def __init__(self, to_params: Callable[..., Any], parameters: Sequence[Parameter], like: chex.ArrayTree) -> None:
        self.to_params, self.parameters, self.like = to_params, parameters, like

    def of(self, arrays: Mapping[str, np.ndarray]) -> chex.ArrayTree:
        """``arrays`` in their places."""

        def leaf(like: Any, array: Any) -> Any:
            return like if is_absent(like) else jnp.array(array)

        return jax.tree.map(leaf, self.like, self.to_params(dict(arrays)), is_leaf=is_absent)

    def sources(self) -> list[tuple[str, list[Parameter], int]]:
        """For each leaf its name, the parameters that it is made of, and its size."""
        numbered = self.of({p.name: np.full(p.shape, i, np.int32) for i, p in enumerate(self.parameters)})
        return [
            (leaf_key(leaf_name(path)), [self.parameters[i] for i in np.unique(leaf).tolist()], leaf.size)
            for path, leaf in jax.tree_util.tree_leaves_with_path(numbered)
        ]

    def mask_of(self, excluded: Sequence[str]) -> chex.ArrayTree:
        """``False`` at the leaves that are made of ``excluded``."""
        decays = []
        for leaf, made_of, _ in self.sources():
            chosen = {p.name not in excluded: p.name for p in made_of}
            if len(chosen) > 1:
                raise ValueError(
                    f"to_params makes leaf {leaf} of {chosen[True]!r}, which decays, and of {chosen[False]!r}, which "
                    "exclude_from_weight_decay has; keep the two apart"
                )
            decays.append(False not in chosen)
        return jax.tree.unflatten(jax.tree.structure(self.like), decays)

    def check_variables_are_leaves(self) -> None:
        """Raises unless every leaf is one whole variable."""
        for leaf, made_of, size in self.sources():
            if len(made_of) > 1 or any(size != np.prod(p.shape) for p in made_of):
                raise ValueError(
                    f"config has clipnorm, which clips each variable on its own, but to_params makes leaf {leaf} of "
                    f"{'a part of ' if len(made_of) == 1 else ''}{', '.join(repr(p.name) for p in made_of)}; keep "
                    "variables whole, or set clipnorm of config to None and clip in the JAX program"
                )


def _with_pieces(
    tx: optax.GradientTransformationExtraArgs,
    state: optax.OptState,
    config: Config,
    iteration: int,
    found: Found,
    tree: _Tree,
) -> tuple[optax.GradientTransformationExtraArgs, optax.OptState]:
    """The rule and its state, inside what the config puts around it."""
    if config.clipping is not None:
        kind, limit = config.clipping
        if kind == "clipnorm":
            tree.check_variables_are_leaves()
        tx, state = optax.chain(_CLIPS[kind](limit), tx), (optax.EmptyState(), state)
    if config.accumulation > 1:
        tx, state = _accumulating(tx, state, config.accumulation, iteration, found, tree)
    before, after = [], []
    if config.loss_scale_factor is not None:
        before.append((divide_by(config.loss_scale_factor), optax.EmptyState()))
    if config.ema_momentum is not None:
        averages = tree.of(_beside_slots("average", found, tree.parameters))
        piece = average_parameters(config.ema_momentum, config.overwrite_every, config.accumulation)
        after.append((piece, AveragesState(count=jnp.asarray(iteration, jnp.int32), average=averages)))
    if not before and not after:
        return tx, state
    pieces, states = zip(*before, (tx, state), *after, strict=True)
    return optax.chain(*pieces), states


_CLIPS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "clipnorm": clip_each_by_norm,
    "global_clipnorm": optax.clip_by_global_norm,
    "clipvalue": optax.clip,
}


def _accumulating(
    tx: optax.GradientTransformation, state: optax.OptState, steps: int, iteration: int, found: Found, tree: _Tree
) -> tuple[optax.GradientTransformationExtraArgs, optax.OptState]:
    """``tx`` and its state inside ``optax.MultiSteps``, which keeps a mean where Keras keeps a sum."""
    step, done = divmod(iteration, steps)
    sums = _beside_slots("gradient_accumulator", found, tree.parameters)
    for name, array in sums.items():
        if not done and array.any():
            where, _ = found["gradient_accumulator", name]
            raise ValueError(
                f"{where} is not 0, although iteration is {iteration}, a multiple of gradient_accumulation_steps, "
                f"{steps}; give variables and config of one moment"
            )
    dtype = np.result_type(np.float32, *(array.dtype for array in sums.values()))
    means = tree.of({name: array.astype(dtype) / max(done, 1) for name, array in sums.items()})
    multi = accumulate(tx, steps, dtype)
    like = jax.eval_shape(multi.init, tree.of({p.name: np.zeros(p.shape, p.dtype) for p in tree.parameters}))
    filled = like._replace(
        mini_step=jnp.asarray(done, like.mini_step.dtype),
        gradient_step=jnp.asarray(step, like.gradient_step.dtype),
        inner_opt_state=state,
        acc_grads=jax.tree.map(lambda like, mean: mean.astype(like.dtype), like.acc_grads, means),
    )
    return multi, filled


def _beside_slots(role: str, found: Found, parameters: Sequence[Parameter]) -> dict[str, np.ndarray]:
    """The variables of one role that are no slots of the rule, after the same checks."""
    result = {}
    for p in parameters:
        where, value = found[role, p.name]
        array = result[p.name] = real_array_of(where, role, value)
        if array.shape != p.shape:
            raise ValueError(
                f"{where} has shape {array.shape}, but {found['velocity', p.name][0]} has shape {p.shape}; all "
                "variables of a parameter are like it"
            )
    return result


# --- To Keras ------------------------------------------------------------------------------------------------


def to_keras(
    state: optax.OptState,
    names: Sequence[str],
    from_params: Callable[[chex.ArrayTree], Mapping[str, Any]],
    *,
    config: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """The inverse of :func:`from_keras`: the variables of an optimizer that continues the run in Keras.

    For each parameter::

        iteration            ← step · gradient_accumulation_steps + mini_step, an int64
        learning_rate        ← that of config, unless it is a schedule
        velocity             ← square_avg, or square_avg + grad_avg² if centered (computed in float64)
        average_gradient     ← grad_avg               if centered
        momentum             ← momentum_buffer        if momentum
        gradient_accumulator ← acc_grads · mini_step  if gradient_accumulation_steps
        average              ← average                if use_ema

    A loop loads them into an optimizer that was built as usual::

        optimizer.build(model.trainable_variables)
        variables = to_keras(state, names, from_params, config=optimizer.get_config())
        for variable in optimizer.variables:
            variable.assign(variables[variable.path])

    A state from :func:`from_keras` comes back bit for bit, but for a centered velocity, which comes back within 2 ulp,
    and for accumulated gradients, which are rounded twice.

    Args:
      state: a state of the transformation that :func:`from_keras` returned, or of one with the same pieces.
      names: the paths of the variables, as for :func:`from_keras`.
      from_params: from a tree like the trained one, with NumPy arrays, to ``{name: array}``: the inverse of
        ``to_params``. It may not cast or compute either.
      config: the ``get_config()`` of the optimizer that is to continue.

    Returns:
      ``{path: array}`` in the order of ``optimizer.variables``, with new arrays in the dtypes of ``state``.

    Raises:
      TypeError: if an argument or a part of ``state`` has the wrong type.
      ValueError: if ``state``, ``names``, ``from_params`` and ``config`` do not fit together, or if ``state`` holds
        NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> from rmsprop_jax.checkpoints import to_keras
      >>> state = dialects.keras(0.1).init({"kernel": jnp.zeros((1, 2))})
      >>> config = dict(name="rmsprop", learning_rate=0.1, rho=0.9, momentum=0.0, epsilon=1e-7, centered=False)
      >>> list(to_keras(state, ["dense/kernel"], lambda params: {"dense/kernel": params["kernel"]}, config=config))
      ['rmsprop/iteration', 'rmsprop/learning_rate', 'rmsprop/dense_kernel_velocity']
    """
    check_functions(from_params=from_params)
    settings = checked_config(config)
    parameters = checked_names(names, _EXAMPLE_OF_NAMES)
    paths = paths_of(settings, parameters)
    check_paths([path for path, _, _ in paths])
    step, slots = slots_by_name(state, from_params, parameters)
    centered, momentum = settings.rule["centered"], settings.rule["momentum"] > 0
    arrays: dict[tuple[str, str], Any] = {}
    for name in parameters:
        kept = exported(name, slots[name], centered=centered, momentum=momentum)
        arrays |= {(role, name): kept[field] for role, field in _FIELDS.items() if field in kept}
    done, sums = _sums(state, settings, from_params, parameters)
    iteration = step * settings.accumulation + done
    averages = _averages(state, settings, iteration, from_params, parameters)
    arrays |= {("gradient_accumulator", name): array for name, array in sums.items()}
    arrays |= {("average", name): array for name, array in averages.items()}
    arrays["iteration", ""] = np.array(iteration, np.int64)
    arrays["learning_rate", ""] = np.asarray(
        0.0 if isinstance(settings.learning_rate, Mapping) else settings.learning_rate
    )
    return {path: arrays[role, name] for path, role, name in paths}


def _sums(
    state: optax.OptState, config: Config, from_params: Callable[..., Any], names: Sequence[str]
) -> tuple[int, dict[str, np.ndarray]]:
    """How many gradients are accumulated, and their sums by name."""
    found = _only_node(state, optax.MultiStepsState, "gradient_accumulation_steps", config.accumulation > 1)
    if found is None:
        return 0, {}
    done = count_of("mini_step of state", found.mini_step)
    if done >= config.accumulation:
        raise ValueError(
            f"state has accumulated {done} gradients, but gradient_accumulation_steps of config is "
            f"{config.accumulation}; give it the settings of the run"
        )
    means = _by_name(found.acc_grads, from_params, names)
    return done, {name: np.asarray(mean * done, mean.dtype) for name, mean in means.items()}


def _averages(
    state: optax.OptState, config: Config, iteration: int, from_params: Callable[..., Any], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """The averages of the parameters by name."""
    found = _only_node(state, AveragesState, "use_ema", config.ema_momentum is not None)
    if found is None:
        return {}
    count = count_of("count of the averages in state", found.count)
    if count != iteration:
        raise ValueError(
            f"the averages in state are those of {count} gradients, but step and mini_step say {iteration}; give the "
            "state of one optimizer, and config the gradient_accumulation_steps of the run"
        )
    return _by_name(found.average, from_params, names)


def _only_node(state: optax.OptState, kind: type[Any], setting: str, is_set: bool) -> Any:
    """The part of ``state`` that belongs to a setting of the config, if it is set."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    nodes = [leaf for leaf in leaves if isinstance(leaf, kind)]
    if len(nodes) != is_set:
        raise ValueError(
            f"state has {len(nodes)} {kind.__name__}, but config is {'with' if is_set else 'without'} {setting}; give "
            "it the settings of the run"
        )
    return nodes[0] if nodes else None


def _by_name(tree: chex.ArrayTree, from_params: Callable[..., Any], names: Sequence[str]) -> dict[str, np.ndarray]:
    """A tree of arrays by name. It travels as a momentum buffer does, since both may have any sign."""
    zeros = jax.tree.map(jnp.zeros_like, tree)
    carrier = RMSPropState(step=jnp.zeros((), jnp.int32), square_avg=zeros, grad_avg=None, momentum_buffer=tree)
    _, slots = slots_by_name(carrier, from_params, names)
    return {name: np.array(kept.get("momentum_buffer", kept["square_avg"]), order="C") for name, kept in slots.items()}
