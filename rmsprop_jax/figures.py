"""From the leaves of an update to one vector of figures: the engine below ``diagnostics``.

It knows arrays by key, and neither trees nor transformations. Read from the top down: the update of one leaf, and what
its gradient is divided by; the vector; the arrays, joined to blocks; the reductions, row by row; the quantiles, by
bisection; the figures of all shards inside ``jax.shard_map``.

XLA's compile time grows with the number of loops over arrays of different shapes, but hardly with the number of
results per loop. So each array gets a few loops with many results, small arrays are joined, and the rest is arithmetic
on a table with one row per leaf.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax import codes
from rmsprop_jax.state import RMSPropState, componentwise, widened

TOTAL = "total"  # the key of all leaves together

_PERCENTILES = (5, 50, 95)  # of the effective learning rate
_WITHOUT_STATE = ("grad_rms", "param_rms", "update_rms", "update_ratio", "nonfinite")
_FIGURES = (*_WITHOUT_STATE, *(f"lr_{percent}" for percent in _PERCENTILES), "eps_share", "never_updated", "surprise")
# Of codes that hold their number only roughly, where the state is in 8 bits. Leaves without such codes have none.
_AT_BOTTOM = {jnp.dtype(jnp.uint8): "squares_at_bottom", jnp.dtype(jnp.int8): "signed_at_bottom"}
_LARGEST_JOINED = 4**8  # elements; larger arrays are not joined


class LeafUpdate(NamedTuple):
    """An update of one parameter, with the arrays as they come.

    Attributes:
      g: the gradient; ``None`` counts as zero.
      u: the update; ``None`` counts as zero.
      p: the parameter before the update.
      state: the state of this parameter alone after the update, as it is stored; ``None`` if no RMSProp updates it.
      lr: the learning rate of this update.
      eps: the number under the root and the one outside it, one of them 0. They are data, so that both rules are one
        program.
    """

    g: Any
    u: Any
    p: Any
    state: RMSPropState | None
    lr: chex.Numeric | None
    eps: tuple[chex.Numeric | None, chex.Numeric | None]


def denominator_of_array(square_avg: chex.Array, eps: tuple[chex.Numeric, chex.Numeric]) -> jax.Array:
    """What the gradient of one array is divided by, in float32 at least; complex if ``square_avg`` is."""

    def component(v: jax.Array) -> jax.Array:
        inside, outside = (jnp.asarray(x, v.dtype) for x in eps)
        return jnp.sqrt(v + inside) + outside

    return componentwise(component, widened(square_avg))


def real(x: chex.Numeric) -> jax.Array:
    """``x`` as a real array, float32 at least: a complex one as its two components."""
    x = widened(x)
    return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x


# --- The vector --------------------------------------------------------------------------------------------


@jax.jit
def by_key(leaves: Mapping[str, LeafUpdate]) -> dict[str, jax.Array]:
    """Every figure as a float32 scalar, by ``"<key of the leaf>/<figure>"``.

    One program computes a whole tree, with ``lr`` and ``eps`` as data. Inside an outer ``jit`` it disappears.
    """
    return dict(zip(keys(leaves), vector(leaves), strict=True))


def keys(leaves: Mapping[str, LeafUpdate]) -> list[str]:
    """The names of what :func:`vector` returns, in its order."""
    figures = {name: _WITHOUT_STATE if leaf.state is None else _FIGURES for name, leaf in leaves.items()}
    coded = {name: [_AT_BOTTOM[dtype] for dtype in _AT_BOTTOM if _codes(leaf, dtype)] for name, leaf in leaves.items()}
    coded[TOTAL] = [figure for figure in _AT_BOTTOM.values() if any(figure in own for own in coded.values())]
    names = [*sorted(leaves), TOTAL]  # sorted as the leaves are inside jit
    return [f"{name}/{figure}" for name in names for figure in (*figures.get(name, _FIGURES), *coded[name])]


def _codes(leaf: LeafUpdate, dtype: np.dtype) -> list[jax.Array]:
    """The codes of a leaf that have this dtype."""
    slots: Sequence[Any] = () if leaf.state is None else leaf.state[1:]
    return [slot.codes for slot in slots if codes.is_encoded(slot) and slot.codes.dtype == dtype]


@jax.jit
def vector(leaves: Mapping[str, LeafUpdate]) -> jax.Array:
    """Every figure in one float32 vector."""
    # A loss that is differentiated through recorded updates does not need derivatives here. Some of them are infinite.
    leaves = jax.lax.stop_gradient(leaves)
    blocks = sorted(_blocks(leaves), key=lambda block: block.arrays.v is None)
    rows = [name for block in blocks for name in block.names]
    largest, sums, errors, counts = _stacked(
        [_measured(block.arrays, smallest=block.smallest, axes=block.axes) for block in blocks]
    )
    rates = _quantiles([block for block in blocks if block.arrays.v is not None])
    n = len(rates) - 1  # leaves with a state; the total is of these

    def with_total(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x, jnp.sum(x[:n], axis=0, keepdims=True, dtype=x.dtype)])

    counts = with_total(counts.astype(jnp.uint32))
    sizes = with_total(jnp.asarray([size for block in blocks for size in block.sizes], jnp.uint32))
    # The number of elements in each mean of squares. That of the surprise counts those that were ever updated.
    numbers = jnp.maximum(1, jnp.stack([sizes, sizes, sizes, sizes - counts[:, 2]], axis=1)).astype(sums.dtype)
    rms = _unit(largest) * jnp.sqrt(jnp.where(jnp.isfinite(sums), sums + errors, sums) / numbers[:-1])
    total = norm(rms[:n] * jnp.sqrt(numbers[:n] / numbers[-1:]), axis=0)

    table = _table(
        jnp.concatenate([rms, total[None]]).astype(jnp.float32),
        counts.astype(jnp.float32) / jnp.maximum(1, sizes).astype(jnp.float32)[:, None],
        jnp.concatenate([rates[:n], jnp.zeros((len(rows) - n, len(_PERCENTILES)), jnp.float32), rates[n:]]),
    )
    columns = (*_FIGURES, *_AT_BOTTOM.values())
    place = {f"{name}/{figure}": (i, j) for i, name in enumerate([*rows, TOTAL]) for j, figure in enumerate(columns)}
    if any(_codes(leaf, dtype) for leaf in leaves.values() for dtype in _AT_BOTTOM):
        bottom = with_total(jnp.stack([_at_bottom(leaves[name]) for name in rows]))
        table = jnp.concatenate([table, bottom[..., 0] / jnp.maximum(1, bottom[..., 1]).astype(jnp.float32)], axis=1)
    i, j = np.array([place[key] for key in keys(leaves)]).T
    ordered: jax.Array = table[i, j]
    return ordered


def _at_bottom(leaf: LeafUpdate) -> jax.Array:
    """For each kind of codes, how many of a leaf's are at the bottom, and how many are not 0."""
    counts = [[codes.at_bottom(x) for x in _codes(leaf, dtype)] for dtype in _AT_BOTTOM]
    sums = [jnp.sum(jnp.asarray([(0, 0), *pairs], jnp.uint32), axis=0, dtype=jnp.uint32) for pairs in counts]
    counted: jax.Array = _over_shards(jax.lax.psum, jnp.stack(sums), _axes_of(leaf.state))
    return counted


def _table(rms: jax.Array, shares: jax.Array, rates: jax.Array) -> jax.Array:
    """The figures, a row per leaf, in the order of ``_FIGURES``."""
    g, u, p, surprise = rms.T
    nonfinite, below_eps, never = shares.T
    # While a bias is still 0, nothing may compute 0/0: jax_debug_nans would stop there.
    ratio = u / jnp.where(u == 0, 1.0, p)
    return jnp.stack([g, p, u, ratio, nonfinite, *rates.T, below_eps, never, surprise], axis=1)


# --- Arrays, joined to blocks ------------------------------------------------------------------------------


class _Arrays(NamedTuple):
    """The arrays of one parameter, or of several as equal rows. The first axis counts the parameters."""

    g: jax.Array
    u: jax.Array
    p: jax.Array
    length: np.ndarray | None = None  # elements of each row before its padding; None if no row has any
    v: Any = None  # this and all below are None if no RMSProp updates the parameters
    grad_avg: Any = None  # if centered; it tells better than v whether there was an update
    lr: Any = None  # a number for each parameter
    eps: Any = (None, None)

    def per_row(self, x: jax.Array | np.ndarray) -> jax.Array:
        """``x``, a number for each parameter, in a shape that broadcasts over their elements."""
        return jnp.asarray(x).reshape(-1, *[1] * (self.p.ndim - 1))

    def is_element(self) -> Any:
        """True where an element belongs to a leaf, False where it is padding."""
        if self.length is None:
            return True
        return jax.lax.broadcasted_iota(jnp.uint32, self.p.shape, 1) < self.per_row(self.length)


class _Block(NamedTuple):
    """Some parameters, with their arrays as rows."""

    names: list[str]
    sizes: list[int]  # in real numbers; a complex number counts as two
    smallest: float  # replaces v where that is 0
    arrays: _Arrays
    axes: tuple[str, ...]  # inside jax.shard_map, those that the arrays are sharded over


def _blocks(leaves: Mapping[str, LeafUpdate]) -> list[_Block]:
    """Joins small leaves of equal dtypes and similar size, and leaves the others as they are.

    With several devices it joins nothing, so that no array moves.
    """
    alike: dict[Any, list[_Block]] = {}
    for name, leaf in leaves.items():
        block = _block_of(name, leaf)
        size = block.sizes[0]
        width = max(6, -(-(size - 1).bit_length() // 2))  # up to 4⁶ elements, 4⁷, 4⁸
        signature = *jax.tree.map(lambda x: x.dtype, block.arrays), block.smallest, width
        joins = jax.device_count() == 1 and size <= _LARGEST_JOINED
        alike.setdefault(signature if joins else name, []).append(block)
    return [_joined(blocks) if len(blocks) > 1 else blocks[0] for blocks in alike.values()]


def _block_of(name: str, leaf: LeafUpdate) -> _Block:
    p = real(leaf.p)[None]
    g, u = (jnp.zeros_like(p) if x is None else real(x).astype(p.dtype)[None] for x in (leaf.g, leaf.u))
    axes = _axes_of((leaf.g, leaf.u, leaf.p, None if leaf.state is None else leaf.state[1:]))
    sizes = [_over_shards(jax.lax.psum, p.size, axes)]
    if leaf.state is None:
        return _Block([name], sizes, 0.0, _Arrays(g, u, p), axes)
    square_avg, grad_avg = map(codes.decoded, (leaf.state.square_avg, leaf.state.grad_avg))
    v = real(square_avg)[None]
    lr, *eps = (jnp.asarray(x, v.dtype)[None] for x in (leaf.lr, *leaf.eps))
    grad_avg = None if grad_avg is None else real(grad_avg)[None]
    smallest = max(float(jnp.finfo(square_avg.dtype).smallest_subnormal), float(jnp.finfo(v.dtype).tiny))
    return _Block([name], sizes, smallest, _Arrays(g, u, p, None, v, grad_avg, lr, tuple(eps)), axes)


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
    axes = tuple(sorted({axis for block in blocks for axis in block.axes}))
    return _Block(names, sizes, blocks[0].smallest, arrays._replace(length=lengths, lr=lr, eps=eps), axes)


# --- Reductions, row by row --------------------------------------------------------------------------------


class _Measured(NamedTuple):
    """What a block adds up to: for g, u, p and g/√v, a number for each parameter."""

    largest: list[jax.Array]  # the unit of the sums, so that neither 1e38 overflows nor 1e-36 underflows
    sums: list[jax.Array]  # of squares
    errors: list[jax.Array]  # what the sums lost to rounding
    counts: list[jax.Array]  # of elements that are not finite, that are below eps, that were never updated


@functools.partial(jax.jit, static_argnames=("smallest", "axes"))
def _measured(arrays: _Arrays, *, smallest: float, axes: tuple[str, ...]) -> _Measured:
    """The figures of one block before the last divisions.

    It has its own jit, so that arrays of equal shape and dtype are traced and lowered once.
    """
    g, u, p, v = arrays.g, arrays.u, arrays.p, arrays.v
    quantities, shares = [g, u, p], [~(jnp.isfinite(g) & jnp.isfinite(u) & jnp.isfinite(p))]
    if v is not None:
        was_updated = ((v if arrays.grad_avg is None else arrays.grad_avg) != 0) | (g != 0)
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
    largest = _over_shards(jax.lax.pmax, found[:k], axes)
    squares = [(x / arrays.per_row(_unit(top))) ** 2 for x, top in zip(quantities, largest, strict=True)]
    sums = _row_by_row(add, [*squares, *map(jnp.zeros_like, squares)])
    sums, counts = _over_shards(jax.lax.psum, (sums, found[k:]), axes)
    return _Measured(largest, sums[:k], sums[k:], counts)


def _unit(largest: jax.Array) -> jax.Array:
    """The number to divide by before squaring. XLA multiplies by its reciprocal, which must not be subnormal."""
    limit = float(jnp.finfo(largest.dtype).max) ** 0.75
    return jnp.where((largest > 0) & jnp.isfinite(largest), jnp.clip(largest, 1 / limit, limit), 1.0)


def _stacked(blocks: Sequence[_Measured]) -> list[jax.Array]:
    """Each field as a table with one row per leaf, and 0 where a block has no number."""

    def table(field: str, width: int) -> jax.Array:
        rows = [getattr(block, field) for block in blocks]
        wide = max((x.dtype for row in rows for x in row), key=lambda x: x.itemsize, default=jnp.dtype(jnp.float32))
        columns = [
            [(row[k] if k < len(row) else jnp.zeros_like(row[0])).astype(wide) for row in rows] for k in range(width)
        ]
        return jnp.stack([jnp.concatenate([jnp.zeros(0, wide), *column]) for column in columns], axis=1)

    return [table(field, width) for field, width in zip(_Measured._fields, (4, 4, 4, 3), strict=True)]


def _row_by_row(combine: Callable[[Any, Any], Sequence[jax.Array]], operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Reduces all operands over all axes but the first, in one loop that starts from 0."""
    zeros = tuple(np.zeros((), x.dtype) for x in operands)
    axes = tuple(range(1, operands[0].ndim))
    return list(jax.lax.reduce(tuple(operands), zeros, lambda a, b: tuple(combine(a, b)), axes))


def norm(x: jax.Array, axis: int | None = None) -> jax.Array:
    """√Σx², where neither x = 1e38 overflows nor x = 1e-36 underflows float32. A diverging run shows how far it is."""
    unit = _unit(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0))
    length: jax.Array = unit * jnp.sqrt(jnp.sum((x / unit) ** 2, axis=axis, keepdims=True))
    return jnp.squeeze(length, axis)


# --- Quantiles, by bisection -------------------------------------------------------------------------------


def _quantiles(blocks: Sequence[_Block]) -> jax.Array:
    """The effective learning rates at ``_PERCENTILES``: one row per leaf and one for all leaves, NaN without elements.

    The bit patterns of floats that are not negative are ordered like the floats, with every NaN above them. Each of
    the 32 rounds settles one bit of every answer. It sets the bit if too few elements lie below the pattern with it.
    The counts of all leaves add up to the count of the total. (All leaves together may have up to 2³² elements.)
    """
    patterns = [_patterns(block.arrays) for block in blocks]
    all_sizes = [block.sizes for block in blocks]
    ranks = [*map(_ranks, all_sizes), _ranks([sum(map(sum, all_sizes))])]

    none = jnp.zeros((0, len(_PERCENTILES)), jnp.uint32)

    def settle_bit(i: jax.Array, found: list[jax.Array]) -> list[jax.Array]:
        bit = jnp.uint32(1 << 31) >> jnp.asarray(i, jnp.uint32)  # without jit i may be an int
        *each, whole = tries = [x | bit for x in found]
        own, others = [], [none]
        for block, x, bounds in zip(blocks, patterns, each, strict=True):
            counts = _over_shards(jax.lax.psum, _count_below(x, bounds, whole), block.axes)
            own.append(counts[:, : len(_PERCENTILES)])
            others.append(counts[:, len(_PERCENTILES) :])
        below = [*own, jnp.sum(jnp.concatenate(others), axis=0, keepdims=True, dtype=jnp.uint32)]
        return [jnp.where(x < rank, new, old) for x, rank, new, old in zip(below, ranks, tries, found, strict=True)]

    numbers = [(block.arrays.lr, block.arrays.eps) for block in blocks]
    start = [varying_like(jnp.zeros(x.shape, jnp.uint32), numbers) for x in ranks]
    found = jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(32), settle_bit, start)
    quantiles: jax.Array = jax.lax.bitcast_convert_type(jnp.concatenate(found), jnp.float32)
    return quantiles


def _ranks(sizes: Sequence[int]) -> np.ndarray:
    """The rank of each quantile, counted from 1."""
    return np.array([[max(1, -(-size * percent // 100)) for percent in _PERCENTILES] for size in sizes], np.uint32)


@jax.jit
def _patterns(arrays: _Arrays) -> jax.Array:
    """The bit patterns of the effective learning rates as float32. Padding lies above them all."""
    lr, inside, outside = map(arrays.per_row, (arrays.lr, *arrays.eps))
    rates = (lr / denominator_of_array(arrays.v, (inside, outside))).astype(jnp.float32)
    return jnp.where(arrays.is_element(), jax.lax.bitcast_convert_type(rates, jnp.uint32), np.uint32(0xFFFFFFFF))


@jax.jit
def _count_below(x: jax.Array, own: jax.Array, whole: jax.Array) -> jax.Array:
    """How many elements of each row lie below the bounds of that row, and how many below those of all rows."""
    bounds = [
        jnp.broadcast_to(bound, len(x)).reshape(-1, *[1] * (x.ndim - 1))
        for columns in (own, whole)
        for bound in columns.T
    ]
    if jax.device_count() == 1:
        tests = [(x < bound).astype(jnp.uint32) for bound in bounds]
        return jnp.stack(_row_by_row(lambda a, b: list(map(jnp.add, a, b)), tests), axis=1)
    # One array of counts needs one all-reduce. A reduction with several results would need one for each.
    below = x[None] < jnp.stack(bounds)
    return jnp.sum(below, axis=tuple(range(2, below.ndim)), dtype=jnp.uint32).T


# --- Inside jax.shard_map ------------------------------------------------------------------------------------
#
# An array that varies over an axis of the mesh is one shard of a whole, so the figures add up over that axis. JAX knows
# which arrays vary only with check_vma=True, the default. Otherwise, the figures are those of the local shard.


def _over_shards(reduce: Callable[[Any, tuple[str, ...]], Any], x: Any, axes: tuple[str, ...]) -> Any:
    """``x`` of all shards: their sum with ``jax.lax.psum``, their largest with ``jax.lax.pmax``."""
    return reduce(x, axes) if axes else x


def varying_like(x: jax.Array, like: Any) -> jax.Array:
    """``x`` with the type that a loop or a branch over the arrays in ``like`` carries: it varies where they do."""
    missing = tuple(axis for axis in _axes_of(like) if axis not in _axes_of(x))
    if not missing:
        return x
    if hasattr(jax.lax, "pcast"):
        varying: jax.Array = jax.lax.pcast(x, missing, to="varying")
    else:  # JAX before 0.9
        varying = jax.lax.pvary(x, missing)  # type: ignore[attr-defined, unused-ignore]
    return varying


def _axes_of(tree: Any) -> tuple[str, ...]:
    """The axes of the mesh over which arrays in ``tree`` vary; none in a JAX without varying types."""
    axes: set[str] = set()
    for x in jax.tree.leaves(tree):
        aval = getattr(x, "aval", None)
        axes |= getattr(getattr(aval, "manual_axis_type", aval), "varying", getattr(aval, "vma", frozenset()))
    return tuple(sorted(axes))
