"""How do the statistics move while it trains? A wrapper that leaves them in the optimizer state.

Read from the top down: the record, which is one array; how it is serialized; the transformation that fills it.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import diagnostics, figures
from rmsprop_jax.arguments import check_count, check_transformation
from rmsprop_jax.state import Settings, find_states

__all__ = ["RecordStatisticsState", "RecordedStatistics", "record_statistics"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RecordedStatistics(Mapping[str, chex.Array]):
    """The :func:`rmsprop_jax.diagnostics.statistics` of one update: a read-only mapping from key to float32 scalar.

    It is one array. A jitted step would otherwise take and return dozens of scalars in every call, which costs more
    than computing them. Stacked by ``jax.lax.scan`` or ``jax.vmap``, it maps a key to an array over the leading axes.
    To log a record, move all of it to the host: ``record = jax.device_get(record)`` makes two transfers, while
    ``float(record[name])`` makes one for each name.

    Attributes:
      names: the keys.
      vector: the values in the order of ``names``, along the last axis, in float32; 0 before the first record.
      update: the number of the update they belong to, from 0, an int32 scalar; −1 before the first record.
    """

    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    vector: chex.Array
    update: chex.Array

    __eq__ = object.__eq__  # that of a mapping compares arrays
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        """Registers the class with ``flax.serialization`` if Flax is in use."""
        _register_with_flax()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Does what ``__post_init__`` does; pickle and copy do not call it."""
        self.__dict__.update(state)
        _register_with_flax()

    def __getitem__(self, name: str) -> chex.Array:
        """The value, or the values over time, of one statistic."""
        if name not in self.names:
            raise KeyError(name)
        return self.vector[..., self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        """The keys."""
        return iter(self.names)

    def __len__(self) -> int:
        """The number of statistics."""
        return len(self.names)


# --- Serialization -----------------------------------------------------------------------------------------


def _register_with_flax() -> None:
    if "flax.serialization" in sys.modules:
        _register(sys.modules["flax.serialization"])


@functools.cache
def _register(serialization: Any) -> None:
    serialization.register_serialization_state(RecordedStatistics, _to_state_dict, _from_state_dict, override=True)


def _to_state_dict(record: RecordedStatistics) -> dict[str, Any]:
    return {"vector": record.vector, "update": record.update}


def _from_state_dict(record: RecordedStatistics, state: Mapping[str, Any]) -> RecordedStatistics:
    if np.shape(state["vector"])[-1:] != (len(record.names),):
        raise ValueError(
            f"the restored statistics must be {len(record.names)} numbers like those of the state, got "
            f"an array of shape {np.shape(state['vector'])}; restore into what init returns for the same parameters"
        )
    return dataclasses.replace(record, **state)


jax.export.register_pytree_node_serialization(
    RecordedStatistics,
    serialized_name="rmsprop_jax.RecordedStatistics",
    serialize_auxdata=lambda static: json.dumps(static).encode(),  # a tuple with the names
    deserialize_auxdata=lambda static: tuple(map(tuple, json.loads(static))),
)


# --- The transformation ------------------------------------------------------------------------------------


class RecordStatisticsState(NamedTuple):
    """The state of :func:`record_statistics`. In a chain, ``optax.tree.get(state, "statistics")`` finds the record.

    Attributes:
      update_count: number of updates so far, an int32 scalar.
      statistics: the last record; without any parameters, one array.
      inner_state: the state of the transformation inside.
    """

    update_count: chex.Array
    statistics: RecordedStatistics | chex.Array
    inner_state: optax.OptState


jax.export.register_namedtuple_serialization(RecordStatisticsState, serialized_name="rmsprop_jax.RecordStatisticsState")

# init needs the names of the figures and not their values.
_UNKNOWN = Settings(lr=1.0, eps=0.0, eps_in_sqrt=False)


def record_statistics(inner: optax.GradientTransformation, every: int = 10) -> optax.GradientTransformationExtraArgs:
    """``inner`` unchanged, with the statistics of its first and then every ``every``-th update in the state.

    After update number n (from 0), the state holds those of update ``n − n % every``. ``jax.lax.cond`` skips them in
    the updates in between, which then cost nothing more. They stay on the device: nothing calls back to the host.
    (Under a ``vmap`` with several states, the condition becomes a selection, and every update pays. Inside the
    ``shard_map`` of JAX 0.6.0 it needs ``check_rep=False``.) The record is the same on all devices of a mesh.

    It wraps the RMSProp instead of following it, because a link of ``optax.chain`` does not see the state of another
    link. Put it inside the chain, after clipping: ``surprise`` compares the gradients that the wrapper receives with
    the average of those that RMSProp received.

    Args:
      inner: a transformation that contains an RMSProp: ``rmsprop(...)``, a dialect, a chain.
      every: the number of updates from one record to the next, a whole number of at least 1.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is a :class:`RecordStatisticsState`. ``update``
      needs ``params``.

    Raises:
      ValueError, TypeError: when built, if ``every`` is not a positive whole number; at ``init``, if the state of
        ``inner`` has no :class:`RMSPropState`; at ``update``, without ``params`` and as
        :func:`rmsprop_jax.diagnostics.statistics`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from rmsprop_jax import rmsprop
      >>> from rmsprop_jax.recorder import record_statistics
      >>> recorded = record_statistics(rmsprop(lr=0.1, alpha=0.75), every=10)
      >>> optimizer = optax.chain(optax.clip_by_global_norm(1.0), recorded)
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> state = optimizer.init(params)
      >>> for step in range(20):
      ...     updates, state = optimizer.update(params, state, params)  # of the loss w²/2
      ...     params = optax.apply_updates(params, updates)
      ...     if step % 10 == 0:
      ...         found = optax.tree.get(state, "statistics")
      ...         print(f"{step}: {found['w/update_ratio']:.3f} {found['w/surprise']:.3f}")
      0: 0.057 2.000
      10: 0.044 1.014
    """
    every = check_count("every", every)
    asked, inner = inner, check_transformation("inner", inner)

    def init(params: optax.Params) -> RecordStatisticsState:
        inner_state = inner.init(params)
        leaves = diagnostics.leaves_of({(): _UNKNOWN}, params, params, inner_state, params)
        names = tuple(figures.keys(leaves))
        # All of the state has to lie on the devices of the parameters, as this step does.
        step = next(iter(find_states("opt_state", inner_state).values())).step
        nothing = jnp.broadcast_to(jnp.full_like(step, 0, jnp.float32), len(names))
        return RecordStatisticsState(
            update_count=jnp.zeros_like(step),
            # optax.tree.map_params calls init with a tree without leaves. There, one array stands for all of them.
            statistics=RecordedStatistics(names, nothing, jnp.full_like(step, -1)) if leaves else nothing,
            inner_state=inner_state,
        )

    def update(
        updates: optax.Updates,
        state: RecordStatisticsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RecordStatisticsState]:
        if params is None:
            raise ValueError("params must be given to record their statistics: call update(updates, state, params)")
        built_with = diagnostics.ask(asked, state.inner_state, params, **extra_args)
        done, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        leaves = diagnostics.leaves_of(built_with, updates, done, inner_state, params)
        is_due = state.update_count % every == 0
        return done, RecordStatisticsState(
            update_count=optax.safe_increment(state.update_count),
            statistics=_record(is_due, state.update_count, leaves, state.statistics) if leaves else state.statistics,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


@jax.jit
def _record(
    is_due: jax.Array, update: jax.Array, leaves: Mapping[str, figures.LeafUpdate], before: RecordedStatistics
) -> RecordedStatistics:
    """The record after an update.

    It is jitted at module level. Outside ``jit``, a ``cond`` would otherwise be compiled every time it is reached.
    """
    place = {key: i for i, key in enumerate(figures.keys(leaves))}  # there may be more than init was given
    missing = [name for name in before.names if name not in place]
    if missing:
        raise ValueError(f"params must have every leaf that init was given, but {missing[0]} cannot be computed now")
    wanted = np.array([place[name] for name in before.names])
    numbers = before.vector, [(leaf.lr, leaf.eps) for leaf in leaves.values()]
    vector, recorded = jax.lax.cond(
        is_due,
        lambda: (figures.varying_like(figures.vector(leaves)[wanted], numbers), update),
        lambda: (figures.varying_like(before.vector, numbers), before.update),
    )
    return RecordedStatistics(before.names, vector, recorded)
