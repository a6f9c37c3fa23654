"""What is the optimizer doing, leaf by leaf? Pure functions of its state, at home inside ``jit``.

Read from the top down: the denominator and the learning rate that each element really gets; the statistics, for a
logger; the same as a table that says in words when something looks wrong; a transformation that records the
statistics while it trains; at the end how a state is found, and its leaves named.

``opt_state`` is any optimizer state with an :class:`RMSPropState` in it, however deep: of ``optax.chain``,
``optax.masked``, ``optax.MultiSteps``, ``flax.nnx.Optimizer`` and so on. The several states of ``optax.partition``
are laid over each other. ``tx`` is the transformation that the state belongs to. Each RMSProp in it says what its
learning rate and its eps are, so there is nothing to tell twice: schedules, injected hyperparameters and groups of
parameters with different rules are read where the update reads them.
"""

import dataclasses
import functools
import html
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax.arguments import check_count, check_eps, check_number, shown
from rmsprop_jax.state import RMSPropState, Settings, SettingsQuery

_PERCENTILES = (5, 50, 95)  # of the effective learning rate
_WITHOUT_STATE = ("grad_rms", "param_rms", "update_rms", "update_ratio", "nonfinite")
_FIGURES = (*_WITHOUT_STATE, *(f"lr_{percent}" for percent in _PERCENTILES), "eps_share", "never_updated", "surprise")
_TOTAL = "total"
_JOINED = 4**8  # elements; larger arrays are not joined

# The names on the way from the root of a tree to a leaf. Leaves are matched by these, so that a state may be in other
# containers than the parameters: Flax wraps the leaves of both, each in its own class.
_Name = tuple[str, ...]


# --- The denominator -------------------------------------------------------------------------------------


def denominator(tx: optax.GradientTransformation, opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    """What each gradient was divided by.

    ::

        denominator = √square_avg + eps        √(square_avg + eps) if eps_in_sqrt

    in float32 at least. Of a complex parameter it is complex, and its real part belongs to the real part of the
    gradient, its imaginary part to the imaginary one, as in ``square_avg``.

    Args:
      tx: the transformation that made the update.
      opt_state: the state after the update in question; see above.
      params: the parameters, for their structure and dtypes.

    Returns:
      A tree like the parameters, with ``optax.MaskedNode`` for those that no RMSProp updates.

    Raises:
      ValueError: if there is no :class:`RMSPropState` in ``opt_state``, if two hold the same parameter, or if ``tx``
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

    def leaf(square_avg: jax.Array, now: Settings) -> jax.Array:
        return _denominator(square_avg, _places(now))

    return _of_each_leaf(leaf, tx, opt_state, params)


def effective_learning_rate(
    tx: optax.GradientTransformation, opt_state: optax.OptState, params: optax.Params
) -> optax.Params:
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
      >>> print(*(f"{rate:.3g}" for rate in rates))  # where the gradient was 0, eps is all that is left
      0.00333 0.1 1e+06
    """

    def leaf(square_avg: jax.Array, now: Settings) -> jax.Array:
        denom = _denominator(square_avg, _places(now))
        return _per_component(lambda d: jnp.asarray(now.lr, d.dtype) / d, denom)

    return _of_each_leaf(leaf, tx, opt_state, params)


def _of_each_leaf(
    function: Callable[[jax.Array, Settings], jax.Array],
    tx: optax.GradientTransformation,
    opt_state: optax.OptState,
    params: optax.Params,
) -> optax.Params:
    states, settings = _states(opt_state), _settings(tx, _before(opt_state), params)

    def of(state: RMSPropState) -> optax.Params:
        def leaf(path: Any, square_avg: jax.Array) -> jax.Array:
            return function(square_avg, _at_step(_settings_of(settings, _name(path)), state.step))

        return jax.tree_util.tree_map_with_path(leaf, state.square_avg)

    return _overlay([of(state) for state in states])


def _places(settings: Settings) -> tuple[Any, Any]:
    """Eps under the root and eps outside it, of which an RMSProp has one."""
    return (settings.eps, 0.0) if settings.eps_in_sqrt else (0.0, settings.eps)


def _denominator(square_avg: jax.Array, eps: tuple[Any, Any]) -> jax.Array:
    def component(v: jax.Array) -> jax.Array:
        inside, outside = (jnp.asarray(x, v.dtype) for x in eps)
        return jnp.sqrt(v + inside) + outside

    return _per_component(component, _widened(square_avg))


def _per_component(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    return jax.lax.complex(function(x.real), function(x.imag)) if jnp.iscomplexobj(x) else function(x)


def _widened(x: Any) -> jax.Array:
    """``x`` in its own dtype, but float32 at least."""
    dtype = jnp.result_type(x)
    wide = jnp.issubdtype(dtype, jnp.complexfloating) or jnp.finfo(dtype).bits >= 32
    return jnp.asarray(x, dtype if wide else jnp.float32)


def _at_step(settings: Settings, step: jax.Array | None) -> Settings:
    """The numbers of the update that led to ``step``."""

    def read(name: str, number: Any, check: Callable[[str, Any], Any]) -> Any:
        if not callable(number):
            return number
        if step is None:
            raise ValueError(f"opt_state.step is None, so the schedule of {name} cannot be read; keep the count")
        return check(f"the schedule of {name}", number(jnp.maximum(step - 1, 0)))

    return settings._replace(lr=read("lr", settings.lr, check_number), eps=read("eps", settings.eps, check_eps))


# --- The statistics --------------------------------------------------------------------------------------


class _Leaf(NamedTuple):
    """One parameter in an update, its arrays as they come."""

    g: Any
    u: Any
    p: Any
    state: RMSPropState | None  # of this parameter alone; None if no RMSProp updates it
    lr: Any
    eps: tuple[Any, Any]  # under the root and outside it, one of them 0: data, so that both rules are one program


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
        update_ratio   rms(u) / rms(p)               around 1e-3 is usual; 0 if there is no update
        lr_5, _50, _95 quantiles of the effective learning rate
        eps_share      share where √v < eps          v < eps if eps_in_sqrt
        surprise       rms(g/√v)                     around 1 once the average has warmed up
        nonfinite      share where g, u or p is not finite
        never_updated  share that never had a gradient other than 0

    A quantile is an element of the leaf: the smallest one that at least 5, 50 or 95 % do not exceed (NumPy's
    ``method="inverted_cdf"``), with NaN above all numbers. It is found exactly, by bisection of the bit pattern.
    Nothing is sorted. While it runs it needs memory, on a CPU about 8 bytes per parameter, and 24 for arrays of up to
    65,536 elements, which on a single device are joined first.

    Where v is 0 (or rounded to it), the surprise has the smallest normal number in its place (the smallest number of
    the state's dtype, if that is larger); elements that were never updated do not count for it. Centered, v is the
    variance, and the surprise of a steady gradient is large. What was never updated is told by ``grad_avg`` if
    centered and else by ``square_avg`` being exactly 0; an average that starts from another value (TensorFlow's)
    hides it.

    Half precision is computed in float32. A complex leaf counts as two real ones of its shape. The statistics have no
    derivatives.

    Args:
      tx: the transformation that made the update; see :func:`effective_learning_rate`.
      grads: the gradients that RMSProp was given, after clipping if there is any. ``None`` counts as zero.
      updates: the updates that came out, like ``params``. ``None`` counts as zero.
      opt_state: the state *after* the update; see above.
      params: the parameters *before* the update. ``None`` and leaves that are no floating array are left out.

    Returns:
      float32 scalars by ``"<path of the leaf>/<statistic>"``, ``conv1/kernel/update_ratio`` for one, and by
      ``"total/<statistic>"``. Parameters that are one bare array are named ``params``. A leaf that no RMSProp
      updates, frozen in ``optax.partition`` for one, has only those figures that need no state, and no part in the
      total.

    Raises:
      ValueError: as :func:`effective_learning_rate`; also if a gradient, an update or a slot of the state has no
        counterpart in ``params`` or not its shape, or two leaves would have the same name.

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
    found: dict[str, jax.Array] = _statistics(_leaves_after(tx, grads, updates, opt_state, params))
    return found


@jax.jit
def _statistics(leaves: Mapping[str, _Leaf]) -> dict[str, jax.Array]:
    """One program for a whole tree, with ``lr`` and ``eps`` as data; inside an outer ``jit`` it disappears."""
    return dict(zip(_keys(leaves), _figures(leaves), strict=True))


def _keys(leaves: Mapping[str, _Leaf]) -> list[str]:
    """What :func:`_figures` returns, in this order."""
    figures = {name: _WITHOUT_STATE if leaf.state is None else _FIGURES for name, leaf in leaves.items()}
    names = [*sorted(leaves), _TOTAL]  # sorted as the leaves are inside jit
    return [f"{name}/{figure}" for name in names for figure in figures.get(name, _FIGURES)]


# XLA's compile time grows with the number of loops over arrays of different shapes, but hardly with the number of
# results per loop. So each array gets a few loops with many results, small arrays are joined, and the rest is
# arithmetic on a table with one row per leaf.


@jax.jit
def _figures(leaves: Mapping[str, _Leaf]) -> jax.Array:
    """All figures in one float32 vector."""
    # A loss differentiated through recorded updates has no use for the derivatives here, some of which are infinite.
    leaves = jax.lax.stop_gradient(leaves)
    blocks = sorted(_blocks(leaves), key=lambda block: block.arrays.v is None)
    rows = [name for block in blocks for name in block.names]
    largest, sums, errors, counts = _stacked([_measured(block.arrays, smallest=block.smallest) for block in blocks])
    rates = _quantiles([block for block in blocks if block.arrays.v is not None])
    n = len(rates) - 1  # leaves with a state, which are what the total is of

    def with_total(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x, jnp.sum(x[:n], axis=0, keepdims=True, dtype=x.dtype)])

    counts = with_total(counts.astype(jnp.uint32))
    sizes = with_total(jnp.asarray([size for block in blocks for size in block.sizes], jnp.uint32))
    # How many elements the mean of each square is over: the surprise is about those that were ever updated.
    numbers = jnp.maximum(1, jnp.stack([sizes, sizes, sizes, sizes - counts[:, 2]], axis=1)).astype(sums.dtype)
    rms = _unit(largest) * jnp.sqrt(jnp.where(jnp.isfinite(sums), sums + errors, sums) / numbers[:-1])
    total = _norm(rms[:n] * jnp.sqrt(numbers[:n] / numbers[-1:]), axis=0)

    table = _table(
        jnp.concatenate([rms, total[None]]).astype(jnp.float32),
        counts.astype(jnp.float32) / jnp.maximum(1, sizes).astype(jnp.float32)[:, None],
        jnp.concatenate([rates[:n], jnp.zeros((len(rows) - n, len(_PERCENTILES)), jnp.float32), rates[n:]]),
    )
    place = {f"{name}/{figure}": (i, j) for i, name in enumerate([*rows, _TOTAL]) for j, figure in enumerate(_FIGURES)}
    i, j = np.array([place[key] for key in _keys(leaves)]).T
    vector: jax.Array = table[i, j]
    return vector


def _table(rms: jax.Array, shares: jax.Array, rates: jax.Array) -> jax.Array:
    """The figures, a row per leaf, in the order of ``_FIGURES``."""
    g, u, p, surprise = rms.T
    nonfinite, below_eps, never = shares.T
    # Biases start at 0. As long as one rests there, 0/0 must not be computed: jax_debug_nans would stop there.
    ratio = u / jnp.where(u == 0, 1.0, p)
    return jnp.stack([g, p, u, ratio, nonfinite, *rates.T, below_eps, never, surprise], axis=1)


class _Arrays(NamedTuple):
    """Arrays of one parameter, or of several as equal rows; the first axis is that of the parameters."""

    g: jax.Array
    u: jax.Array
    p: jax.Array
    length: np.ndarray | None = None  # how many elements of each row are no padding; None if all
    v: Any = None  # None, as is all that follows, if no RMSProp updates them
    first: Any = None  # the average that tells whether there was an update, if v does not
    lr: Any = None  # a number for each parameter
    eps: Any = (None, None)

    def per_row(self, x: jax.Array | np.ndarray) -> jax.Array:
        """A number for each parameter, to be combined with their elements."""
        return jnp.asarray(x).reshape(-1, *[1] * (self.p.ndim - 1))

    def is_element(self) -> Any:
        """True where an element belongs to a leaf, False where it is padding."""
        if self.length is None:
            return True
        return jax.lax.broadcasted_iota(jnp.uint32, self.p.shape, 1) < self.per_row(self.length)


class _Block(NamedTuple):
    """Some parameters, and their arrays as rows."""

    names: list[str]
    sizes: list[int]  # in real numbers, a complex one being two
    smallest: float  # what v counts as where it is 0
    arrays: _Arrays


def _blocks(leaves: Mapping[str, _Leaf]) -> list[_Block]:
    """Joins small leaves of equal dtypes and similar size, and leaves the others alone.

    With several devices it joins nothing, so that no array moves.
    """
    alike: dict[Any, list[_Block]] = {}
    for name, leaf in leaves.items():
        block = _block(name, leaf)
        size = block.sizes[0]
        width = max(6, -(-(size - 1).bit_length() // 2))  # up to 4⁶ elements, 4⁷, 4⁸
        kind = *jax.tree.map(lambda x: x.dtype, block.arrays), block.smallest, width
        joins = jax.device_count() == 1 and size <= _JOINED
        alike.setdefault(kind if joins else name, []).append(block)
    return [_joined(blocks) if len(blocks) > 1 else blocks[0] for blocks in alike.values()]


def _block(name: str, leaf: _Leaf) -> _Block:
    p = _real(leaf.p)[None]
    g, u = (jnp.zeros_like(p) if x is None else _real(x).astype(p.dtype)[None] for x in (leaf.g, leaf.u))
    if leaf.state is None:
        return _Block([name], [p.size], 0.0, _Arrays(g, u, p))
    square_avg, grad_avg = leaf.state.square_avg, leaf.state.grad_avg
    v = _real(square_avg)[None]
    lr, *eps = (jnp.asarray(x, v.dtype)[None] for x in (leaf.lr, *leaf.eps))
    first = None if grad_avg is None else _real(grad_avg)[None]
    smallest = max(float(jnp.finfo(square_avg.dtype).smallest_subnormal), float(jnp.finfo(v.dtype).tiny))
    return _Block([name], [p.size], smallest, _Arrays(g, u, p, None, v, first, lr, tuple(eps)))


def _joined(blocks: Sequence[_Block]) -> _Block:
    sizes = [size for block in blocks for size in block.sizes]
    length = max(sizes)

    def join(*arrays: jax.Array) -> jax.Array:
        rows = [(x.reshape(-1), jnp.zeros(length - x.size, x.dtype)) for x in arrays]
        return jnp.concatenate([piece for row in rows for piece in row]).reshape(len(sizes), length)

    def numbers(*arrays: jax.Array) -> jax.Array:
        return jnp.concatenate(arrays)

    all_arrays = [block.arrays for block in blocks]
    arrays = jax.tree.map(join, *(arrays._replace(lr=None, eps=None) for arrays in all_arrays))
    lr, eps = jax.tree.map(numbers, *((arrays.lr, arrays.eps) for arrays in all_arrays))
    lengths = np.array(sizes, np.uint32) if min(sizes) < length else None
    names = [name for block in blocks for name in block.names]
    return _Block(names, sizes, blocks[0].smallest, arrays._replace(length=lengths, lr=lr, eps=eps))


class _Measured(NamedTuple):
    """Of g, u, p and g/√v, with a number for each parameter."""

    largest: list[jax.Array]  # the unit of what follows, so that neither 1e38 overflows nor 1e-36 underflows
    sums: list[jax.Array]  # of squares
    errors: list[jax.Array]  # what was rounded away from the sums
    counts: list[jax.Array]  # of elements that are not finite, below eps, never updated


@functools.partial(jax.jit, static_argnames="smallest")
def _measured(arrays: _Arrays, *, smallest: float) -> _Measured:
    """A jit of its own, so that arrays of one shape and dtype are traced and lowered once."""
    g, u, p, v = arrays.g, arrays.u, arrays.p, arrays.v
    quantities, shares = [g, u, p], [~(jnp.isfinite(g) & jnp.isfinite(u) & jnp.isfinite(p))]
    if v is not None:
        was_updated = ((v if arrays.first is None else arrays.first) != 0) | (g != 0)
        quantities += [jnp.where(was_updated, g.astype(v.dtype) / jnp.sqrt(jnp.maximum(v, smallest)), 0.0)]
        inside, outside = map(arrays.per_row, arrays.eps)
        shares += [((v < inside) | (jnp.sqrt(v) < outside)) & arrays.is_element(), ~was_updated & arrays.is_element()]
    k = len(quantities)

    def collect(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
        return [*map(jnp.maximum, a[:k], b[:k]), *map(jnp.add, a[k:], b[k:])]

    def add(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
        sums = [*map(jnp.add, a[:k], b[:k])]
        return [*sums, *(e + f + (y - (s - x)) for x, y, s, e, f in zip(a[:k], b[:k], sums, a[k:], b[k:], strict=True))]

    found = _row_by_row(collect, [*map(jnp.abs, quantities), *(x.astype(jnp.uint32) for x in shares)])
    squares = [(x / arrays.per_row(_unit(top))) ** 2 for x, top in zip(quantities, found, strict=False)]
    sums = _row_by_row(add, [*squares, *map(jnp.zeros_like, squares)])
    return _Measured(found[:k], sums[:k], sums[k:], found[k:])


def _unit(largest: jax.Array) -> jax.Array:
    """What to divide by before squaring; XLA multiplies by the reciprocal, which must not be subnormal."""
    limit = float(jnp.finfo(largest.dtype).max) ** 0.75
    return jnp.where((largest > 0) & jnp.isfinite(largest), jnp.clip(largest, 1 / limit, limit), 1.0)


def _stacked(blocks: Sequence[_Measured]) -> list[jax.Array]:
    """Each field as a table with a row per leaf, and 0 where a block has nothing."""

    def table(field: str, width: int) -> jax.Array:
        rows = [getattr(block, field) for block in blocks]
        wide = max((x.dtype for row in rows for x in row), key=lambda x: x.itemsize, default=jnp.dtype(jnp.float32))
        columns = [
            [(row[k] if k < len(row) else jnp.zeros_like(row[0])).astype(wide) for row in rows] for k in range(width)
        ]
        return jnp.stack([jnp.concatenate([jnp.zeros(0, wide), *column]) for column in columns], axis=1)

    return [table(field, width) for field, width in zip(_Measured._fields, (4, 4, 4, 3), strict=True)]


def _row_by_row(combine: Callable[[Any, Any], Sequence[jax.Array]], operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Reduces all operands over all axes but the first, in one loop, from 0."""
    zeros = tuple(np.zeros((), x.dtype) for x in operands)
    axes = tuple(range(1, operands[0].ndim))
    return list(jax.lax.reduce(tuple(operands), zeros, lambda a, b: tuple(combine(a, b)), axes))


def _norm(x: jax.Array, axis: int | None = None) -> jax.Array:
    """√Σx², where neither x = 1e38 overflows nor x = 1e-36 underflows float32: a diverging run shows how far it is."""
    unit = _unit(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0))
    norm: jax.Array = unit * jnp.sqrt(jnp.sum((x / unit) ** 2, axis=axis, keepdims=True))
    return jnp.squeeze(norm, axis)


def _quantiles(blocks: Sequence[_Block]) -> jax.Array:
    """The effective learning rates at ``_PERCENTILES``, a row per leaf and one for all leaves; NaN if there is none.

    Bit patterns of non-negative floats are ordered like the floats, with every NaN above. Each of the 32 rounds settles
    one bit of all answers: it is set if too few elements lie below what it would make. The counts of all leaves add up
    to that of the total. (Together they may have up to 2³² elements.)
    """
    patterns = [_patterns(block.arrays) for block in blocks]
    all_sizes = [block.sizes for block in blocks]
    ranks = [*map(_ranks, all_sizes), _ranks([sum(map(sum, all_sizes))])]

    none = jnp.zeros((0, len(_PERCENTILES)), jnp.uint32)

    def settle_bit(i: jax.Array, found: list[jax.Array]) -> list[jax.Array]:
        bit = jnp.uint32(1 << 31) >> jnp.asarray(i, jnp.uint32)  # without jit i may be an int
        *each, whole = tries = [x | bit for x in found]
        own, others = [], [none]
        for x, bounds in zip(patterns, each, strict=True):
            counts = _count_below(x, bounds, whole)
            own.append(counts[:, : len(_PERCENTILES)])
            others.append(counts[:, len(_PERCENTILES) :])
        below = [*own, jnp.sum(jnp.concatenate(others), axis=0, keepdims=True, dtype=jnp.uint32)]
        return [jnp.where(x < rank, new, old) for x, rank, new, old in zip(below, ranks, tries, found, strict=True)]

    start = [_varying_like(jnp.zeros(x.shape, jnp.uint32), patterns) for x in ranks]
    found = jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(32), settle_bit, start)
    quantiles: jax.Array = jax.lax.bitcast_convert_type(jnp.concatenate(found), jnp.float32)
    return quantiles


def _ranks(sizes: Sequence[int]) -> np.ndarray:
    """The rank of each quantile, counted from 1."""
    return np.array([[max(1, -(-size * percent // 100)) for percent in _PERCENTILES] for size in sizes], np.uint32)


@jax.jit
def _patterns(arrays: _Arrays) -> jax.Array:
    """The bit patterns of the effective learning rates, as float32; padding lies above all."""
    lr, inside, outside = map(arrays.per_row, (arrays.lr, *arrays.eps))
    rates = (lr / _denominator(arrays.v, (inside, outside))).astype(jnp.float32)
    return jnp.where(arrays.is_element(), jax.lax.bitcast_convert_type(rates, jnp.uint32), np.uint32(0xFFFFFFFF))


@jax.jit
def _count_below(x: jax.Array, own: jax.Array, whole: jax.Array) -> jax.Array:
    """How many elements of each row lie below the bounds of the row, and how many below those of all rows."""
    bounds = [
        jnp.broadcast_to(bound, len(x)).reshape(-1, *[1] * (x.ndim - 1))
        for columns in (own, whole)
        for bound in columns.T
    ]
    if jax.device_count() == 1:
        tests = [(x < bound).astype(jnp.uint32) for bound in bounds]
        return jnp.stack(_row_by_row(lambda a, b: list(map(jnp.add, a, b)), tests), axis=1)
    # One array of counts needs one all-reduce; a reduce with several results would need one for each.
    below = x[None] < jnp.stack(bounds)
    return jnp.sum(below, axis=tuple(range(2, below.ndim)), dtype=jnp.uint32).T


def _real(x: Any) -> jax.Array:
    """``x`` as a real array, float32 at least: a complex one as its two components."""
    x = _widened(x)
    return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x


# --- The statistics as a table ---------------------------------------------------------------------------

# Beyond these the table says in words what looks wrong. For comparison: over the 15 epochs of the digits example, the
# recorded update_ratio is 0.022 at most and the surprise 0.37 at least, centered or not.
_LIMITS = {
    "update_ratio": 0.1,  # above, parameters are replaced rather than improved
    "eps_share": 0.5,  # above, of the elements that were ever updated, most steps are lr · g/eps
    "surprise": 0.3,  # below, the average remembers gradients several times as large as the present ones
    "centered_step": 100,  # above, in units of lr; in the first update it is 1/√(1 − alpha)
    "vanished": 0.5,  # above, so many averages are 0 where the gradient is not
}

_COLUMNS = (
    "parameter",
    "shape",
    "count",
    "state",
    "bytes",
    "grad rms",
    "update/param",
    "effective lr [5–95 %]",
    "√v < eps",
    "surprise",
    "non-finite",
    "never updated",
)


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """What :func:`summary` returns: prints as aligned text, shows as a table in Jupyter.

    Attributes:
      statistics: what :func:`statistics` returns, as Python floats.
      rows: the cells of the table, a row per leaf and one for the total.
      remarks: in words, what looks wrong; empty if nothing does.
    """

    statistics: Mapping[str, float]
    rows: Sequence[Sequence[str]]
    remarks: Sequence[str]

    def __repr__(self) -> str:
        """The table as aligned text, and the remarks below it."""
        widths = [max(map(len, column)) for column in zip(_COLUMNS, *self.rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            name, *rest = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
            return "  ".join([name.strip().ljust(widths[0]), *rest])

        rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
        *leaves, total = map(line, self.rows)
        return "\n".join([line(_COLUMNS), rule, *leaves, rule, total, *(f"! {remark}" for remark in self.remarks)])

    def _repr_html_(self) -> str:
        def row(tag: str, cells: Sequence[str], style: str = "") -> str:
            first, *rest = (html.escape(cell) for cell in cells)
            numbers = "".join(f'<{tag} style="text-align: right">{cell}</{tag}>' for cell in rest)
            return f'<tr{style}><th style="text-align: left">{first}</th>{numbers}</tr>'

        *leaves, total = self.rows
        bold = ' style="font-weight: bold; border-top: 1px solid"'
        body = "".join([*(row("td", cells) for cells in leaves), row("td", total, bold)])
        remarks = "".join(f"<li>{html.escape(remark)}</li>" for remark in self.remarks)
        table = f"<table><thead>{row('th', _COLUMNS)}</thead><tbody>{body}</tbody></table>"
        return table + (f"<ul>{remarks}</ul>" if remarks else "")


def summary(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    updates: optax.Updates,
    opt_state: optax.OptState,
    params: optax.Params,
) -> Summary:
    """The statistics of an update as a table, with a remark in words on everything that looks wrong.

    A row per leaf and one for the total: shape, number of parameters, dtype and bytes of the state, and what
    :func:`statistics` says; "–" where there is none. The remarks go by the limits that stand above
    :class:`Summary` in the source:

    - not finite: a gradient, an update or a parameter is infinite or NaN.
    - learning rate too high: in total an update is more than a tenth of the parameters. (Parameters that all start
      from 0 are caught in their first updates, too, and so are runs that work: a first update moves every element
      by lr/√(1 − alpha).)
    - eps too large: of the elements that were ever updated, √v < eps for more than half, so that RMSProp is not
      much else than gradient descent with a learning rate of lr/eps.
    - average stalled: the state is narrower than float32, and gradients are far below the average that should
      have followed them, or the average of gradients that are not 0 is. (An average with a long memory may lag
      behind without rounding: what has stopped shows the same effective learning rates in a later table.)
    - centered step exploding: a gradient that hardly varies is divided by its vanishing deviation, or by the eps
      that is left of it, and steps are over a hundred times lr.

    Args:
      tx: as in :func:`statistics`, as are all others.
      grads: the gradients that RMSProp was given.
      updates: the updates that came out.
      opt_state: the state *after* the update.
      params: the parameters *before* the update.

    Returns:
      A :class:`Summary`. It needs values, so it cannot be had inside ``jit``; :func:`statistics` can.

    Raises:
      ValueError: as :func:`statistics`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics, rmsprop
      >>> optimizer = rmsprop(lr=3.0, alpha=0.75)
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> grads = {"w": jnp.array([-0.2, 0.0])}
      >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
      >>> print(*diagnostics.summary(optimizer, grads, updates, state, params).remarks)
      learning rate too high: one update is 120% of the parameters (0.1% is usual, 10% the limit); lower lr
    """
    leaves = _leaves_after(tx, grads, updates, opt_state, params)
    found = {name: float(x) for name, x in jax.device_get(_statistics(leaves)).items()}
    rows = [_row(name, [leaf], found) for name, leaf in leaves.items()]
    rows.append(_row(_TOTAL, [leaf for leaf in leaves.values() if leaf.state is not None], found))
    return Summary(found, rows, tuple(_remarks(leaves, found)))


def _row(name: str, leaves: Sequence[_Leaf], found: Mapping[str, float]) -> list[str]:
    slots = [slot for leaf in leaves if leaf.state is not None for slot in jax.tree.leaves(leaf.state[1:])]

    def show(statistic: str, style: str = ".2g") -> str:
        value = found.get(f"{name}/{statistic}")
        return "–" if value is None else format(value, style)

    middle = f"{show('lr_50')} [{show('lr_5')}–{show('lr_95')}]" if f"{name}/lr_50" in found else "–"
    return [
        name,
        "×".join(map(str, np.shape(leaves[0].p))) if name != _TOTAL else "",
        f"{sum(np.size(leaf.p) for leaf in leaves):,}",
        ", ".join(sorted({slot.dtype.name for slot in slots})) or "–",
        _bytes(sum(slot.nbytes for slot in slots)) if slots else "–",
        show("grad_rms"),
        show("update_ratio"),
        middle,
        show("eps_share", ".1%"),
        show("surprise"),
        show("nonfinite", ".1%"),
        show("never_updated", ".1%"),
    ]


def _bytes(number: float) -> str:
    units = ["B", "KiB", "MiB", "GiB"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        units.pop(0)
    return f"{number:.3g} {units[0]}"


def _remarks(leaves: Mapping[str, _Leaf], found: Mapping[str, float]) -> Iterator[str]:
    """What looks wrong. A root cause suppresses the remarks it explains. Comparisons with NaN are false."""

    def eps_rules(name: str) -> bool:
        below, never = found[f"{name}/eps_share"], found[f"{name}/never_updated"]
        return below - never > _LIMITS["eps_share"] * (1 - never)  # v = 0 is below eps too, and harms nobody

    def are_replaced(name: str) -> bool:
        return _LIMITS["update_ratio"] < found[f"{name}/update_ratio"] < math.inf  # infinite: it starts from 0

    broken = [name for name in leaves if found[f"{name}/nonfinite"] > 0]
    if broken:
        yield (
            f"not finite: there is infinity or NaN in {_listed(broken)}; look for the first update with it, or keep "
            "such gradients out with optax.apply_if_finite"
        )
    states = {name: leaf.state for name, leaf in leaves.items() if leaf.state is not None}
    centered = [name for name, state in states.items() if state.grad_avg is not None]
    exploding = [name for name in centered if _relative_step(leaves[name]) > _LIMITS["centered_step"]]
    stalled = [name for name in states if _is_stalled(states[name], leaves[name].g, found[f"{name}/surprise"])]
    if exploding:
        yield (
            f"centered step exploding: in {_listed(exploding)} the gradient hardly varies and is divided by next to "
            f"nothing, so that steps are over {_LIMITS['centered_step']:g} · lr; set centered=False, or raise eps"
        )
    elif stalled:
        yield (
            f"average stalled: in {_listed(stalled)} the state rests in {states[stalled[0]].square_avg.dtype}, which "
            "rounds small changes away, and is far from the gradient's square; leave accumulator_dtype out"
        )
    else:
        if eps_rules(_TOTAL):
            yield (
                f"eps too large: √v < eps for {found['total/eps_share']:.0%} of the elements, so RMSProp is not much "
                "else than gradient descent with a learning rate of lr/eps; lower eps"
            )
        if are_replaced(_TOTAL):
            yield (
                f"learning rate too high: one update is {found['total/update_ratio']:.0%} of the parameters "
                f"(0.1% is usual, {_LIMITS['update_ratio']:.0%} the limit); lower lr"
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _relative_step(leaf: _Leaf) -> jax.Array:
    """``rms(g / denominator)``: the step without momentum, in units of lr."""
    if leaf.state is None or leaf.g is None:
        return jnp.zeros(())
    denom = _denominator(_real(leaf.state.square_avg), leaf.eps)
    g = _real(leaf.g).astype(denom.dtype)
    return jnp.asarray(_norm(g / jnp.where(g == 0, 1.0, denom)) / math.sqrt(max(1, denom.size)))  # 0/0 counts as 0


def _is_stalled(state: RMSPropState, g: Any, surprise: float) -> bool:
    if g is None or jnp.finfo(state.square_avg.dtype).bits >= 32:
        return False
    v, g = _real(state.square_avg), _real(g)
    return surprise < _LIMITS["surprise"] or bool(jnp.mean((v == 0) & (g != 0)) > _LIMITS["vanished"])


# --- The statistics while it trains ----------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RecordedStatistics(Mapping[str, jax.Array]):
    """What :func:`statistics` returned, kept as one array: a read-only mapping from key to float32 scalar.

    A dict of scalars would be dozens of arrays that every call of a jitted step takes in and hands out, and that costs
    more than computing them. Stacked by ``jax.lax.scan`` or ``jax.vmap``, it maps a key to an array over the leading
    axes. To log a record, move it to the host at once: ``record = jax.device_get(record)`` is two transfers, where
    ``float(record[name])`` for each name would be as many as there are names.

    Attributes:
      names: the keys.
      vector: the values in this order along the last axis; 0 as long as nothing is recorded.
      update: which update they are of, counted from 0, an int32 scalar; −1 as long as nothing is recorded.
    """

    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    vector: jax.Array
    update: jax.Array

    __eq__ = object.__eq__  # that of a mapping compares arrays
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        """Makes ``flax.serialization`` know this class, wherever Flax is in use."""
        _register_with_flax()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As if it had been built: pickle and copy do not."""
        self.__dict__.update(state)
        _register_with_flax()

    def __getitem__(self, name: str) -> jax.Array:
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


_UNKNOWN = Settings(lr=1.0, eps=0.0, eps_in_sqrt=False)  # init needs the names of the figures, not their values


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


class RecordStatisticsState(NamedTuple):
    """The state of :func:`record_statistics`; in a chain, ``optax.tree.get(state, "statistics")`` finds the statistics.

    Attributes:
      update_count: number of updates so far, an int32 scalar.
      statistics: those of the last update that was recorded; without any parameters, one array.
      inner_state: the state of the transformation inside.
    """

    update_count: jax.Array
    statistics: RecordedStatistics | jax.Array
    inner_state: optax.OptState


jax.export.register_pytree_node_serialization(
    RecordedStatistics,
    serialized_name="rmsprop_jax.RecordedStatistics",
    serialize_auxdata=lambda static: json.dumps(static).encode(),  # a tuple with the names
    deserialize_auxdata=lambda static: tuple(map(tuple, json.loads(static))),
)
jax.export.register_namedtuple_serialization(RecordStatisticsState, serialized_name="rmsprop_jax.RecordStatisticsState")


def record_statistics(inner: optax.GradientTransformation, every: int = 10) -> optax.GradientTransformationExtraArgs:
    """``inner`` unchanged, with the :func:`statistics` of its first and then every ``every``-th update in the state.

    After update number n (from 0) the state holds those of update ``n − n % every``. They are computed under
    ``jax.lax.cond``, so that the updates in between cost nothing, and stay on the device: nothing calls back to the
    host. (Under a ``vmap`` with states of its own the condition becomes a selection, and every update pays. Inside
    the ``shard_map`` of JAX 0.6.0 it needs ``check_rep=False``.)

    It wraps the RMSProp instead of following it, because a link of ``optax.chain`` does not see the state of
    another. Put it inside the chain, behind clipping: ``surprise`` compares the gradients that the wrapper is given
    with the average of those that RMSProp was given.

    Args:
      inner: a transformation that contains an RMSProp: ``rmsprop(...)``, a dialect, a chain.
      every: of how many updates one is recorded, a whole number of at least 1.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is a :class:`RecordStatisticsState`. ``update``
      needs ``params``.

    Raises:
      ValueError, TypeError: when built, if ``every`` is no positive whole number; at ``init``, if there is no
        :class:`RMSPropState` in the state of ``inner``; at ``update``, without ``params`` and as :func:`statistics`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from rmsprop_jax import diagnostics, rmsprop
      >>> recorded = diagnostics.record_statistics(rmsprop(lr=0.1, alpha=0.75), every=10)
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
    asked, inner = inner, optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> RecordStatisticsState:
        inner_state = inner.init(params)
        leaves = _leaves_of({(): _UNKNOWN}, params, params, inner_state, params)
        names = tuple(_keys(leaves))
        step = _states(inner_state)[0].step  # lies on the devices of the parameters, as all of the state has to
        nothing = jnp.broadcast_to(jnp.full_like(step, 0, jnp.float32), len(names))
        nothing = _varying_like(nothing, jax.tree.leaves(leaves))
        return RecordStatisticsState(
            update_count=jnp.zeros_like(step),
            # For optax.tree.map_params, which calls init with a tree without leaves, one array stands for them all.
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
        settings = _settings(asked, state.inner_state, params, **extra_args)
        done, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        leaves = _leaves_of(settings, updates, done, inner_state, params)
        is_due = state.update_count % every == 0
        return done, RecordStatisticsState(
            update_count=optax.safe_increment(state.update_count),
            statistics=_record(is_due, state.update_count, leaves, state.statistics) if leaves else state.statistics,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


@jax.jit
def _record(
    is_due: jax.Array, update: jax.Array, leaves: Mapping[str, _Leaf], before: RecordedStatistics
) -> RecordedStatistics:
    """Jitted at module level: outside ``jit``, a ``cond`` is compiled again every time it is reached."""
    place = {key: i for i, key in enumerate(_keys(leaves))}  # there may be more than init was given
    missing = [name for name in before.names if name not in place]
    if missing:
        raise ValueError(f"params must have every leaf that init was given, but {missing[0]} cannot be computed now")
    wanted = np.array([place[name] for name in before.names])
    arrays = jax.tree.leaves((leaves, before.vector))
    vector, recorded = jax.lax.cond(
        is_due,
        lambda: (_varying_like(_figures(leaves)[wanted], arrays), update),
        lambda: (_varying_like(before.vector, arrays), before.update),
    )
    return RecordedStatistics(before.names, vector, recorded)


def _varying_like(x: jax.Array, arrays: Sequence[Any]) -> jax.Array:
    """``x`` as what a loop or a branch over ``arrays`` carries: inside ``jax.shard_map``, varying over their axes."""
    missing = frozenset[str]().union(*map(_manual_axes, arrays)) - _manual_axes(x)
    if not missing:
        return x
    if hasattr(jax.lax, "pcast"):
        varying: jax.Array = jax.lax.pcast(x, tuple(sorted(missing)), to="varying")
    else:  # JAX before 0.9
        varying = jax.lax.pvary(x, tuple(sorted(missing)))  # type: ignore[attr-defined, unused-ignore]
    return varying


def _manual_axes(x: Any) -> frozenset[str]:
    """The axes of a mesh over which ``x`` varies inside ``jax.shard_map``; none in a JAX without such types."""
    aval = getattr(x, "aval", None)
    axes: frozenset[str] = getattr(
        getattr(aval, "manual_axis_type", aval), "varying", getattr(aval, "vma", frozenset())
    )
    return axes


# --- Where the state is, and what its leaves are called ------------------------------------------------------


def _states(opt_state: optax.OptState) -> list[RMSPropState]:
    """Every :class:`RMSPropState` in ``opt_state``; at least one."""

    def is_found(x: Any) -> bool:
        return isinstance(x, RMSPropState)

    states = [x for x in jax.tree.leaves(opt_state, is_leaf=is_found) if is_found(x)]
    if not states:
        raise ValueError(
            f"opt_state must contain an RMSPropState, got {type(opt_state).__name__} without one; give the state that "
            "an optimizer of rmsprop_jax returned (of optax.chain all of it), and restore a checkpoint into what init "
            "returns"
        )
    return [state._replace(step=next(iter(jax.tree.leaves(state.step)), None)) for state in states]


def _per_leaf(opt_state: optax.OptState) -> dict[_Name, RMSPropState]:
    """The state of each parameter for itself."""
    found: dict[_Name, RMSPropState] = {}
    for state in _states(opt_state):
        averages, means, buffers = map(_named, state[1:])
        for name, square_avg in averages.items():
            if square_avg is None:
                continue
            if name in found:
                raise ValueError(f"opt_state has two RMSPropStates with the leaf {_key(name)}; {_ONE_EACH}")
            found[name] = RMSPropState(
                step=state.step,
                square_avg=square_avg,
                grad_avg=means.get(name),
                momentum_buffer=buffers.get(name),
            )
    return found


_ONE_EACH = "give the state of one optimizer for one set of parameters"


def _overlay(trees: Sequence[Any], path: Any = ()) -> Any:
    """One tree out of several, in each of which ``optax.MaskedNode`` stands for what is in another."""
    trees = [tree for tree in trees if not isinstance(tree, optax.MaskedNode)]
    if len(trees) < 2:
        return trees[0] if trees else optax.MaskedNode()
    levels = [jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x, tree=tree: x is not tree) for tree in trees]
    children, structures = zip(*levels, strict=True)
    if jax.tree_util.treedef_is_leaf(structures[0]) or len(set(structures)) > 1:
        raise ValueError(
            f"opt_state has two RMSPropStates that differ in the container or both have the leaf {_key(_name(path))}; "
            f"{_ONE_EACH}"
        )
    merged = [
        _overlay([child for _, child in siblings], (*path, *siblings[0][0])) for siblings in zip(*children, strict=True)
    ]
    return jax.tree.unflatten(structures[0], merged)


def settings(tx: optax.GradientTransformation, opt_state: optax.OptState, params: optax.Params) -> dict[str, Settings]:
    """What the RMSProp of each parameter divides and multiplies with: its ``lr``, ``eps`` and ``eps_in_sqrt``.

    Args:
      tx: as in :func:`denominator`, as are all others.
      opt_state: the state after an update. Schedules are read where that update read them.
      params: the parameters.

    Returns:
      :class:`rmsprop_jax.state.Settings` by the path of the leaf, as in :func:`statistics`.

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
    states, found = _per_leaf(opt_state), _settings(tx, _before(opt_state), params)
    return {_key(name): _at_step(_settings_of(found, name), state.step) for name, state in states.items()}


def _settings(
    tx: optax.GradientTransformation, opt_state: optax.OptState, params: optax.Params, **extra_args: Any
) -> dict[_Name, Settings]:
    """What each RMSProp in ``tx`` says of the parameters it would update if it were given ``opt_state``."""
    query = SettingsQuery()
    stand_in = jax.tree.map(lambda p: p if _is_inexact(p) else None, params)
    try:
        _asking(tx)(stand_in, opt_state, params, **(extra_args | {"rmsprop_settings": query}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # What follows the RMSProp may want arguments of its own. What has not answered is missed by name later.
        if not query.answers:
            raise ValueError(
                f"tx does not fit opt_state, got {shown(str(error), 200)} from it; give the transformation that the "
                "state belongs to, all of the chain or none of it"
            ) from error
    found: dict[_Name, Settings] = {}
    for state, settings, *_ in query.answers:
        if not isinstance(state, RMSPropState):
            raise ValueError(
                f"tx does not fit opt_state: an RMSProp in it would get a {type(state).__name__}; give the "
                "transformation that the state belongs to, all of the chain or none of it"
            )
        _check_usable(settings)
        found |= {name: settings for name, average in _named(state.square_avg).items() if average is not None}
    return found


def _asking(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """The update of ``tx`` as one that takes keyword arguments; ``optax.MultiSteps`` does, but its type denies it."""
    takes_any = any(x.kind == x.VAR_KEYWORD for x in inspect.signature(tx.update).parameters.values())
    update: Callable[..., Any] = tx.update if takes_any else optax.with_extra_args_support(tx).update
    return update


def _check_usable(settings: Settings) -> None:
    """Raises if a number exists only inside of a branch that was left; inside ``jit``, JAX says so at the end."""
    try:
        jax.tree.map(lambda x: jnp.asarray(x) + 0 if isinstance(x, jax.core.Tracer) else None, settings[:2])
    except jax.errors.UnexpectedTracerError:
        raise ValueError(
            "tx computes its learning rate or eps inside of a condition, where the statistics cannot see it "
            "(inject_hyperparams inside of apply_if_finite); put record_statistics inside, around inject_hyperparams"
        ) from None


def _before(opt_state: optax.OptState) -> optax.OptState:
    """``opt_state`` with the counts of injected schedules one step back, where the last update read them."""

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
            inner_state=_before(x.inner_state),
        )

    return jax.tree.map(step_back, opt_state, is_leaf=is_injected)


def _settings_of(settings: Mapping[_Name, Settings], name: _Name) -> Settings:
    for depth in range(len(name), -1, -1):  # inside the boxes of Flax, the path is longer
        if name[:depth] in settings:
            return settings[name[:depth]]
    raise ValueError(
        f"tx has no RMSProp for the leaf {_key(name)} of opt_state; give the transformation that the state belongs "
        "to. (One that wraps it must pass keyword arguments on, as Optax's do.)"
    )


def _leaves_after(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    updates: optax.Updates,
    opt_state: optax.OptState,
    params: optax.Params,
) -> dict[str, _Leaf]:
    """The leaves of an update that led to ``opt_state``."""
    _states(opt_state)
    return _leaves_of(_settings(tx, _before(opt_state), params), grads, updates, opt_state, params)


def _leaves_of(
    settings: Mapping[_Name, Settings],
    grads: optax.Updates,
    updates: optax.Updates,
    opt_state: optax.OptState,
    params: optax.Params,
) -> dict[str, _Leaf]:
    """Every parameter by its key, with what belongs to it."""
    arrays = {name: p for name, p in _named(params).items() if p is not None}
    states = _per_leaf(opt_state)
    averages = {name: state.square_avg for name, state in states.items()}
    for what, given in (("grads", _contents(grads)), ("updates", _contents(updates)), ("opt_state", averages)):
        _check_like_params(what, given, arrays)
    named_grads, named_updates = _named(grads), _named(updates)

    def leaf(name: _Name, p: Any) -> _Leaf:
        g, u = _at("grads", named_grads, name), _at("updates", named_updates, name)
        if name not in states:
            return _Leaf(g, u, p, state=None, lr=None, eps=(None, None))
        now = _at_step(_settings_of(settings, name), states[name].step)
        return _Leaf(g, u, p, states[name], now.lr, _places(now))

    leaves: dict[str, _Leaf] = {}
    for name, p in arrays.items():
        key = _key(name)
        if key in leaves or key == _TOTAL:
            raise ValueError(f"params must have a name for each leaf that is not taken, got a second {key}; rename it")
        leaves[key] = leaf(name, p)
    return leaves


def _check_like_params(what: str, given: Mapping[_Name, Any], arrays: Mapping[_Name, Any]) -> None:
    for name, x in given.items():
        if x is None or (name not in arrays and not _is_inexact(x)):
            continue
        if name not in arrays:
            raise ValueError(f"{what} must be like params, but has a leaf {_key(name)} and params have none there")
        if np.shape(x) != np.shape(arrays[name]):
            raise ValueError(
                f"{what} must be like params, but {_key(name)} has shape {np.shape(x)} and its parameter "
                f"{np.shape(arrays[name])}"
            )
        kind, allowed = _kind(x), _kind(arrays[name])
        if kind != allowed:
            raise ValueError(
                f"{what} must be like params, but {_key(name)} is {kind} and its parameter {allowed}; give what the "
                "optimizer was given and returned"
            )


def _kind(x: Any) -> str:
    """The kind of numbers in ``x``, in which a parameter and what belongs to it have to agree."""
    if not _is_inexact(x):
        return str(x.dtype) if hasattr(x, "dtype") else type(x).__name__
    return "complex" if jnp.iscomplexobj(x) else "real"


def _at(what: str, given: Mapping[_Name, Any], name: _Name) -> Any:
    """What a prefix of the parameters has for ``name``."""
    for depth in range(len(name), -1, -1):
        if name[:depth] in given:
            return given[name[:depth]]
    raise ValueError(f"{what} must be like params or a prefix of them, but has nothing for {_key(name)}")


def _named(tree: Any) -> dict[_Name, Any]:
    """The leaves by name, and ``None`` for what is none: ``None``, a mask, an integer or a function."""
    return {name: x if _is_inexact(x) else None for name, x in _contents(tree).items()}


def _contents(tree: Any) -> dict[_Name, Any]:
    """What is in the leaves, by name: ``None`` in ``None`` and in a mask."""

    def is_leaf(x: Any) -> bool:
        # Flax's boxes, nnx.Variable (get_metadata) and those of Linen (unbox), would each add a "value" to the path.
        return x is None or isinstance(x, optax.MaskedNode) or hasattr(x, "get_metadata") or hasattr(x, "unbox")

    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        contents = jax.tree.leaves(leaf)
        named[_name(path)] = contents[0] if contents else None
    return named


def _is_inexact(x: Any) -> bool:
    return isinstance(x, float | complex) or (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact))


def _name(path: Any) -> _Name:
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def _key(name: _Name) -> str:
    return "/".join(name) or "params"
