"""What is the optimizer doing, leaf by leaf? Pure functions of its state, which work inside ``jit``.

Read from the top down: the public functions; the leaves of an update; how a transformation is asked what it was built
with; the state of each leaf. ``recorder`` keeps the statistics during training, ``summary`` puts them in words.

``opt_state`` is any optimizer state that contains an :class:`RMSPropState`, at any depth: of ``optax.chain``,
``optax.masked``, ``optax.MultiSteps``, ``flax.nnx.Optimizer`` and so on. The states of the parts of
``optax.partition`` are merged. ``tx`` is the transformation that the state belongs to. Each RMSProp in it says what its
learning rate and its eps are, so nobody has to repeat them. Schedules, injected hyperparameters and groups of
parameters with different rules are read where the update reads them.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import figures, storage
from rmsprop_jax.arguments import check_eps, check_number, shown
from rmsprop_jax.codes import Encoded, is_encoded, unboxed
from rmsprop_jax.state import (
    ONE_STATE_EACH,
    Name,
    RMSPropState,
    Settings,
    SettingsQuery,
    componentwise,
    find_states,
    is_absent,
    is_array,
    is_trainable,
    leaf_key,
    leaf_name,
    merge_trees,
    step_of,
)

__all__ = ["denominator", "effective_learning_rate", "settings", "statistics"]

_GIVE_ITS_OWN = "give the transformation that the state belongs to, all of the chain or none of it"


def denominator(tx: optax.GradientTransformation, opt_state: optax.OptState, params: optax.Params) -> chex.ArrayTree:
    """What each gradient was divided by.

    ::

        denominator = √square_avg + eps        √(square_avg + eps) if eps_in_sqrt

    in float32 at least. It is complex for a complex parameter. Its real part then belongs to the real part of the
    gradient, and its imaginary part to the imaginary one, as in ``square_avg``.

    Args:
      tx: the transformation that made the update.
      opt_state: the state after that update; the docstring of this module says which states it may be.
      params: the parameters, for their structure and dtypes.

    Returns:
      A tree like the parameters, with ``optax.MaskedNode`` for those that no RMSProp updates.

    Raises:
      ValueError: if ``opt_state`` has no :class:`RMSPropState`, if two of them hold the same parameter, or if ``tx``
        has no RMSProp for one of them.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from rmsprop_jax import diagnostics, rmsprop
      >>> optimizer = optax.chain(optax.clip(100.0), rmsprop(alpha=0.75))
      >>> params = {"w": jnp.ones(3)}
      >>> _, state = optimizer.update({"w": jnp.array([6.0, 0.2, 0.0])}, optimizer.init(params))
      >>> print(*(f"{x:.3g}" for x in diagnostics.denominator(optimizer, state, params)["w"]))
      3 0.1 1e-08
    """
    return _of_each_average(lambda v, now: figures.denominator_of_array(v, _eps_pair(now)), tx, opt_state, params)


def effective_learning_rate(
    tx: optax.GradientTransformation, opt_state: optax.OptState, params: optax.Params
) -> chex.ArrayTree:
    """How far each element moves per unit of its gradient, momentum aside.

    ::

        effective_learning_rate = lr / denominator

    Args:
      tx: as in :func:`denominator`. A schedule is read at ``step − 1``, as in the update that gave this state (at 0
        before the first). :func:`rmsprop_jax.scale_by_rmsprop` has a learning rate of 1 here.
      opt_state: as in :func:`denominator`.
      params: as in :func:`denominator`.

    Returns:
      A tree like that of :func:`denominator`, complex for complex parameters in the same way.

    Raises:
      ValueError: as :func:`denominator`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics, rmsprop
      >>> optimizer = rmsprop(lr=0.01, alpha=0.75)
      >>> params = jnp.ones(3)
      >>> _, state = optimizer.update(jnp.array([6.0, 0.2, 0.0]), optimizer.init(params))
      >>> rates = diagnostics.effective_learning_rate(optimizer, state, params)
      >>> print(*(f"{rate:.3g}" for rate in rates))  # where the gradient was 0, only eps is left
      0.00333 0.1 1e+06
    """

    def of(square_avg: jax.Array, now: Settings) -> jax.Array:
        denom = figures.denominator_of_array(square_avg, _eps_pair(now))
        return componentwise(lambda d: jnp.asarray(now.lr, d.dtype) / d, denom)

    return _of_each_average(of, tx, opt_state, params)


def settings(tx: optax.GradientTransformation, opt_state: optax.OptState, params: optax.Params) -> dict[str, Settings]:
    """What the RMSProp of each parameter divides and multiplies by: its ``lr``, ``eps`` and ``eps_in_sqrt``.

    Args:
      tx: as in :func:`effective_learning_rate`.
      opt_state: as in :func:`denominator`.
      params: as in :func:`denominator`.

    Returns:
      :class:`rmsprop_jax.state.Settings` by the path of the leaf, as in :func:`statistics`, with every schedule read.

    Raises:
      ValueError: as :func:`denominator`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from rmsprop_jax import diagnostics, rmsprop
      >>> optimizer = optax.chain(optax.clip(1.0), rmsprop(lr=lambda step: 0.1 / (1 + step)))
      >>> params = {"w": jnp.ones(3)}
      >>> state = optimizer.init(params)
      >>> for _ in range(4):
      ...     _, state = optimizer.update(params, state, params)
      >>> print(diagnostics.settings(optimizer, state, params)["w"])
      Settings(lr=Array(0.025, dtype=float32, weak_type=True), eps=1e-08, eps_in_sqrt=False)
    """
    states, built_with = _state_of_each_leaf(opt_state), ask(tx, _one_step_back(opt_state), params)
    return {leaf_key(name): _settings_of_leaf(name, built_with, state.step) for name, state in states.items()}


def statistics(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    updates: optax.Updates,
    opt_state: optax.OptState,
    params: optax.Params,
) -> dict[str, jax.Array]:
    """Eight figures and three quantiles about an update, for every leaf and in total, ready for any logger.

    With g, u and p the elements of the gradient, the update and the parameter, v those of ``square_avg`` and
    ``rms(x) = √mean(x²)``, the statistics of a leaf and of all leaves together are::

        grad_rms       rms(g)
        param_rms      rms(p)
        update_rms     rms(u)
        update_ratio   rms(u) / rms(p)               around 1e-3 is usual; 0 without an update
        lr_5, _50, _95 quantiles of the effective learning rate
        eps_share      share where √v < eps          v < eps if eps_in_sqrt
        surprise       rms(g/√v)                     around 1 once the average has warmed up
        nonfinite      share where g, u or p is not finite
        never_updated  share that never had a gradient other than 0

    and of a state in 8 bits (:func:`rmsprop_jax.storage.compress`)::

        squares_at_bottom   share of nonzero codes of squares that are the smallest one
        signed_at_bottom    share of nonzero codes with a sign that are among the 15 smallest

    A quantile is an element of the leaf: the smallest one that at least 5, 50 or 95 % do not exceed (NumPy's
    ``method="inverted_cdf"``), with NaN above all numbers. A bisection of the bit pattern finds it exactly, without
    sorting. Meanwhile a CPU needs about 8 bytes of memory per parameter, and 24 for arrays of up to 65,536 elements,
    which a single device joins first.

    Where v is 0 (or rounded to it), the surprise divides by the root of the smallest normal number instead (of the
    smallest number of the state's dtype, if that is larger). Elements that were never updated are left out.
    Centered, v is the variance, so a steady gradient has a large surprise. ``never_updated`` counts where ``grad_avg``
    is exactly 0 if centered, and else where ``square_avg`` is. It cannot see them if the average starts from a value
    other than 0, such as TensorFlow's.

    Half precision is computed in float32. A complex leaf counts as two real ones. The statistics have no derivatives.

    On a mesh, they are those of whole arrays. Devices exchange sums and counts, and no array. Inside ``jax.shard_map``
    too: an array that varies over an axis of the mesh counts as one shard of a whole. (For independent models, one per
    device, use ``jax.vmap``, whose statistics stay apart. With ``check_vma=False``, and in JAX 0.6.0, JAX does not
    track what varies, and the statistics are those of the local shard.)

    Args:
      tx: the transformation that made the update; see :func:`effective_learning_rate`.
      grads: the gradients that RMSProp was given, after any clipping, like ``params``. ``None`` counts as zero.
      updates: the updates that came out, like ``params``. ``None`` counts as zero.
      opt_state: the state *after* the update; see :func:`denominator`.
      params: the parameters *before* the update. ``None`` and leaves that are not floating or complex are left out.

    Returns:
      float32 scalars by ``"<path of the leaf>/<statistic>"``, for example ``conv1/kernel/update_ratio``, and by
      ``"total/<statistic>"``. Parameters that are one bare array are named ``params``. A leaf that no RMSProp
      updates, such as one that ``optax.partition`` freezes, has only the figures that need no state, and the total
      does not count it.

    Raises:
      ValueError: as :func:`denominator`; also if a gradient, an update or a slot of the state has no counterpart in
        ``params`` or another shape, or if two leaves would have the same name.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics, rmsprop
      >>> optimizer = rmsprop(lr=0.01, alpha=0.75)
      >>> params = {"dense": {"kernel": jnp.array([[3.0, 4.0]])}}
      >>> grads = {"dense": {"kernel": jnp.array([[-0.2, 0.0]])}}
      >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
      >>> found = diagnostics.statistics(optimizer, grads, updates, state, params)
      >>> for name in ("update_ratio", "lr_50", "surprise", "never_updated"):
      ...     print(f"dense/kernel/{name} = {found[f'dense/kernel/{name}']:.3g}")
      dense/kernel/update_ratio = 0.004
      dense/kernel/lr_50 = 0.1
      dense/kernel/surprise = 2
      dense/kernel/never_updated = 0.5
    """
    found: dict[str, jax.Array] = figures.by_key(leaves_after(tx, grads, updates, opt_state, params))
    return found


# --- The leaves of an update ---------------------------------------------------------------------------------


def leaves_after(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    updates: optax.Updates,
    opt_state: optax.OptState,
    params: optax.Params,
) -> dict[str, figures.LeafUpdate]:
    """The leaves of an update, by key. The arguments are those of :func:`statistics`."""
    find_states("opt_state", opt_state)  # says so at once if there is none
    return leaves_of(ask(tx, _one_step_back(opt_state), params), grads, updates, opt_state, params)


def leaves_of(
    built_with: Mapping[Name, Settings],
    grads: optax.Updates,
    updates: optax.Updates,
    opt_state: optax.OptState,
    params: optax.Params,
) -> dict[str, figures.LeafUpdate]:
    """Every parameter by its key, with what belongs to it; ``built_with`` is what :func:`ask` returns."""
    arrays = {name: p for name, p in _trainable_leaves(params).items() if p is not None}
    states = _state_of_each_leaf(opt_state)
    averages = {name: state.square_avg for name, state in states.items()}
    for what, given in (("grads", _all_leaves(grads)), ("updates", _all_leaves(updates)), ("opt_state", averages)):
        _check_like_params(what, given, arrays)
    named_grads, named_updates = _trainable_leaves(grads), _trainable_leaves(updates)

    def leaf(name: Name, p: Any) -> figures.LeafUpdate:
        g, u = _at("grads", named_grads, name), _at("updates", named_updates, name)
        if name not in states:
            return figures.LeafUpdate(g, u, p, state=None, lr=None, eps=(None, None))
        now = _settings_of_leaf(name, built_with, states[name].step)
        return figures.LeafUpdate(g, u, p, states[name], now.lr, _eps_pair(now))

    leaves: dict[str, figures.LeafUpdate] = {}
    for name, p in arrays.items():
        key = leaf_key(name)
        if key in leaves or key == figures.TOTAL:
            raise ValueError(f"params must have a name for each leaf that is not taken, got a second {key}; rename it")
        leaves[key] = leaf(name, p)
    return leaves


def _check_like_params(what: str, given: Mapping[Name, Any], arrays: Mapping[Name, Any]) -> None:
    for name, x in given.items():
        if x is None or (name not in arrays and not is_trainable(x)):
            continue
        key = leaf_key(name)
        if name not in arrays:
            raise ValueError(f"{what} must be like params, but has a leaf {key} and params have none there")
        shape, kind = np.shape(arrays[name]), _kind_in_words(arrays[name])
        if np.shape(x) != shape:
            raise ValueError(f"{what} must be like params, but {key} has shape {np.shape(x)} and its parameter {shape}")
        if _kind_in_words(x) != kind:
            raise ValueError(
                f"{what} must be like params, but {key} is {_kind_in_words(x)} and its parameter {kind}; give what the "
                "optimizer was given and returned"
            )


def _kind_in_words(x: Any) -> str:
    """The kind of numbers in ``x``. A parameter and all that belongs to it must agree in it."""
    if not is_trainable(x):
        return str(x.dtype) if is_array(x) else type(x).__name__
    return "complex" if jnp.iscomplexobj(x) else "real"


def _at(what: str, given: Mapping[Name, Any], name: Name) -> Any:
    """What a prefix of the parameters has for the leaf ``name``."""
    for depth in range(len(name), -1, -1):
        if name[:depth] in given:
            return given[name[:depth]]
    raise ValueError(f"{what} must be like params or a prefix of them, but has nothing for {leaf_key(name)}")


def _trainable_leaves(tree: Any) -> dict[Name, Any]:
    """The leaves by name, with ``None`` for each that cannot be trained: a mask, an integer, a function."""
    return {name: x if is_trainable(x) else None for name, x in _all_leaves(tree).items()}


def _all_leaves(tree: Any) -> dict[Name, Any]:
    """The leaves by name, taken out of the boxes of Flax, with ``None`` for ``None`` and for a mask."""

    def is_leaf(x: Any) -> bool:
        # Flax's boxes, nnx.Variable (get_metadata) and those of Linen (unbox), would each add a "value" to the path.
        return is_absent(x) or is_encoded(x) or hasattr(x, "get_metadata") or hasattr(x, "unbox")

    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)

    def array(leaf: Any) -> Any:
        inside = next(iter(jax.tree.leaves(leaf, is_leaf=is_encoded)), None)
        return unboxed(inside) if isinstance(inside, Encoded) else inside

    return {leaf_name(path): array(leaf) for path, leaf in leaves}


# --- How a transformation is asked ---------------------------------------------------------------------------


def ask(
    tx: optax.GradientTransformation, opt_state: optax.OptState, params: optax.Params, **extra_args: Any
) -> dict[Name, Settings]:
    """What each RMSProp in ``tx`` was built with, by the name of every leaf that it would update from ``opt_state``.

    Schedules inside the RMSProp are not read yet. ``extra_args`` are those that an update of ``tx`` needs.
    """
    query = SettingsQuery()
    stand_in = jax.tree.map(lambda p: p if is_trainable(p) else None, params)
    try:
        _update_of(tx)(stand_in, opt_state, params, **(extra_args | {"rmsprop_settings": query}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # What follows the RMSProp may want arguments of its own. A later error names the leaf without an answer.
        if not query.answers:
            raise ValueError(
                f"tx does not fit opt_state, got {shown(str(error), 200)} from it; {_GIVE_ITS_OWN}"
            ) from error
    found: dict[Name, Settings] = {}
    for state, own in ((answer.state, answer.settings) for answer in query.answers):
        if not isinstance(state, RMSPropState):
            raise ValueError(
                f"tx does not fit opt_state: an RMSProp in it would get a {type(state).__name__}; {_GIVE_ITS_OWN}"
            )
        _check_usable(own)
        found |= {name: own for name, average in _trainable_leaves(state.square_avg).items() if average is not None}
    return found


def _update_of(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """The update of ``tx``, which takes keyword arguments."""
    # That of optax.MultiSteps does, but its type denies it.
    takes_any = any(x.kind == x.VAR_KEYWORD for x in inspect.signature(tx.update).parameters.values())
    update: Callable[..., Any] = tx.update if takes_any else optax.with_extra_args_support(tx).update
    return update


def _check_usable(own: Settings) -> None:
    """Raises if a number exists only inside a branch that was left; inside ``jit``, JAX says so at the end."""
    try:
        jax.tree.map(lambda x: jnp.asarray(x) + 0 if isinstance(x, jax.core.Tracer) else None, own[:2])
    except jax.errors.UnexpectedTracerError:
        raise ValueError(
            "tx computes its learning rate or eps inside a condition, where the statistics cannot see it "
            "(inject_hyperparams inside apply_if_finite); put record_statistics inside, around inject_hyperparams"
        ) from None


def _one_step_back(opt_state: optax.OptState) -> optax.OptState:
    """``opt_state`` with the counts of injected schedules where the last update read them."""

    def is_injected(x: Any) -> bool:
        return isinstance(x, optax.InjectStatefulHyperparamsState)

    def step_back(x: Any) -> Any:
        if not is_injected(x):
            return x
        return x._replace(
            hyperparams_states={
                name: jax.tree.map(lambda count: jnp.maximum(count - 1, 0), state)
                if getattr(state, "_fields", ()) == ("count",)  # of a plain schedule; Optax has stateful ones too
                else state
                for name, state in x.hyperparams_states.items()
            },
            inner_state=_one_step_back(x.inner_state),
        )

    return jax.tree.map(step_back, opt_state, is_leaf=is_injected)


def _settings_of_leaf(name: Name, built_with: Mapping[Name, Settings], step: chex.Array | None) -> Settings:
    """What the RMSProp of the leaf ``name`` answered, with schedules read for the update that led to ``step``."""
    for depth in range(len(name), -1, -1):  # inside the boxes of Flax, the path is longer
        if name[:depth] in built_with:
            return _without_schedules(built_with[name[:depth]], step)
    raise ValueError(
        f"tx has no RMSProp for the leaf {leaf_key(name)} of opt_state; {_GIVE_ITS_OWN}. (One that wraps it must pass "
        "keyword arguments on, as Optax's do.)"
    )


def _without_schedules(own: Settings, step: chex.Array | None) -> Settings:
    def read(name: str, number: Any, check: Callable[[str, Any], Any]) -> Any:
        if not callable(number):
            return number
        if step is None:
            raise ValueError(f"opt_state.step is None, so the schedule of {name} cannot be read; keep the count")
        return check(f"the schedule of {name}", number(jnp.maximum(step - 1, 0)))

    return own._replace(lr=read("lr", own.lr, check_number), eps=read("eps", own.eps, check_eps))


def _eps_pair(now: Settings) -> tuple[chex.Numeric, chex.Numeric]:
    """Eps under the root and eps outside it. An RMSProp has one of them; the other is 0."""
    return (now.eps, 0.0) if now.eps_in_sqrt else (0.0, now.eps)


# --- The state of each leaf ----------------------------------------------------------------------------------


def _of_each_average(
    function: Callable[[jax.Array, Settings], jax.Array],
    tx: optax.GradientTransformation,
    opt_state: optax.OptState,
    params: optax.Params,
) -> chex.ArrayTree:
    """``function`` of each ``square_avg`` and the settings of its leaf, as one tree."""
    states, built_with = find_states("opt_state", opt_state), ask(tx, _one_step_back(opt_state), params)

    def of(state: RMSPropState) -> chex.ArrayTree:
        def leaf(path: Any, square_avg: jax.Array) -> jax.Array:
            return function(square_avg, _settings_of_leaf(leaf_name(path), built_with, step_of(state)))

        return jax.tree_util.tree_map_with_path(leaf, storage.decode(state.square_avg))

    return merge_trees("opt_state", [of(state) for state in states.values()])


def _state_of_each_leaf(opt_state: optax.OptState) -> dict[Name, RMSPropState]:
    found: dict[Name, RMSPropState] = {}
    for state in find_states("opt_state", opt_state).values():
        averages, means, buffers = map(_trainable_leaves, state[1:])
        for name, square_avg in averages.items():
            if square_avg is None:
                continue
            if name in found:
                raise ValueError(f"opt_state has two RMSPropStates with the leaf {leaf_key(name)}; {ONE_STATE_EACH}")
            found[name] = RMSPropState(
                step=step_of(state),
                square_avg=square_avg,
                grad_avg=means.get(name),
                momentum_buffer=buffers.get(name),
            )
    return found
