"""In what precision does the state of an optimizer rest between two steps? For any Optax transformation.

Read from the top down: the transformation that keeps the state of another one in 16 or 8 bits; its state in float32,
and back; parameters in half precision; all arrays in one call. ``fields`` says which arrays are encoded, and ``codes``
has the arithmetic of one array.
"""

import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import codes
from rmsprop_jax.arguments import check_count, check_transformation, shown
from rmsprop_jax.codes import Encoded, is_encoded
from rmsprop_jax.fields import Kind, Rules, checked_bits, checked_fields
from rmsprop_jax.placement import new_counter

__all__ = ["CompressState", "Encoded", "apply_updates", "compress", "decode", "encode"]


class CompressState(NamedTuple):
    """The state of :func:`compress`.

    Attributes:
      step: number of updates so far, an int32 scalar. The rounding depends on it.
      inner_state: the state of the transformation inside, with an :class:`Encoded` in place of every array that rests
        in 16 or 8 bits.
    """

    step: chex.Array
    inner_state: optax.OptState


jax.export.register_namedtuple_serialization(CompressState, serialized_name="rmsprop_jax.CompressState")


# --- The transformation --------------------------------------------------------------------------------------


def compress(
    inner: optax.GradientTransformation,
    bits: int = 8,
    *,
    min_size: int = 4096,
    slots: Mapping[str, Kind] | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """``inner``, with its state in 8 or 16 bits between the steps.

    In a step, every array that ``inner`` keeps like a parameter is decoded to float32, updated by ``inner``, and
    encoded again::

        slot ← decode(codes)              float32
        slot ← inner's update             float32
        codes ← encode(slot + noise)      8 or 16 bits; on average, decode(codes) is the slot

    The noise rounds up or down at random, so that small changes add up. An average that is rounded to the nearest code
    stops moving as soon as its changes are smaller than half the distance between two codes.

    ====  ==================  ========================================  ===============
    bits  slots               codes                                     bytes per value
    ====  ==================  ========================================  ===============
    16    all                 bfloat16                                  2
    8     averages of squares  5 bits of exponent, 3 of mantissa         1 + 4/row
    8     others              a sign, 3 bits of exponent, 4 of mantissa  1 + 4/row
    ====  ==================  ========================================  ===============

    The 8-bit codes have a float32 scale for each row, which is what lies along the last axis.

    The name of its field in the state says what a slot holds: ``nu`` and ``square_avg`` are averages of squares,
    ``mu``, ``trace`` and ``momentum_buffer`` have a sign. A field with an unknown name is an error until ``slots`` says
    what it holds. These stay as they are: what is not like a parameter, such as a step; arrays with fewer than
    ``min_size`` elements, or fewer than 8 in a row; complex arrays.

    What 8 bits cost:

    - The root of an average of squares is off by 4, 8 and 11 % (rms) at alpha 0.9, 0.99 and 0.999, and by less than 1 %
      in the mean.
    - In a row, the largest and the smallest square may differ by 4e9, which is 6e4 in the gradients. A smaller one is
      held as that smallest one, so its steps are too small. ``diagnostics.statistics`` counts these elements.
    - An element without gradients drifts while others of its row have some: with alpha 0.99, its root is 6 % too small
      on average after 600 such steps (22 % rms).
    - ``optax.rmsprop(centered=True)`` subtracts one average from another, which the error may turn negative.
      :func:`rmsprop_jax.rmsprop` keeps the variance itself.

    An element of the state that becomes NaN or infinite keeps the value that it had. (The update is NaN then, as it is
    without ``compress``.) A parameter without a gradient keeps its slots up to rounding.

    Wrap the transformation that has the averages: ``optax.chain(optax.clip(1.0), compress(rmsprop(0.01)))``. Outside of
    it may be ``optax.masked``, ``partition``, ``MultiSteps``, ``apply_if_finite``, ``inject_hyperparams`` and
    :func:`rmsprop_jax.recorder.record_statistics`.

    Args:
      inner: any Optax transformation. It gets and returns slots in float32. (So leave out the ``accumulator_dtype`` of
        :func:`rmsprop_jax.rmsprop`, or set it to float32 for parameters in float64.)
      bits: 8 or 16.
      min_size: the smallest number of elements that an array must have to be encoded. Smaller ones are in float32.
      slots: what fields of the state hold, by name: ``"square"``, ``"signed"``, or ``"full"`` for what stays as it is.
        It adds to the known names and overrides them.
      seed: a whole number; each has its own noise. There is no random key: the noise is a hash of seed, step, position
        in the array and the name of the field, so that arrays of one shape share it. Under ``jit`` it is the same on
        one device and on many. (Inside ``jax.shard_map``, every device counts its own positions.)

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is a :class:`CompressState`, a tree of arrays that is
      jitted, donated, sharded and saved like any other. A run that resumes from it continues bit for bit. Call
      ``jax.jit(tx.init)``: outside ``jit``, ``init`` makes the whole state in float32 first.

    Raises:
      ValueError: if ``bits``, ``min_size``, ``seed`` or a value of ``slots`` is not allowed; at ``init`` if the state
        has a field with an unknown name, a slot in float64 or one that is encoded already, or none of the fields that
        ``slots`` names; at ``update`` if the state is not what ``init`` gives.
      TypeError: if ``inner`` is not a transformation, or a number not a whole one; at ``update`` if ``inner`` rounds a
        slot to half precision (``mu_dtype``), or if the update is differentiated, since codes have no derivative.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import rmsprop, storage
      >>> params = {"kernel": jnp.ones((256, 512)), "bias": jnp.zeros(512)}
      >>> optimizer = storage.compress(rmsprop(lr=0.01, momentum=0.9))
      >>> state = optimizer.init(params)
      >>> for name in ("square_avg", "momentum_buffer"):
      ...     kernel, bias = (getattr(state.inner_state, name)[leaf] for leaf in ("kernel", "bias"))
      ...     print(name, kernel.codes.dtype, kernel.scale.shape, bias.dtype)
      square_avg uint8 (256,) float32
      momentum_buffer int8 (256,) float32
      >>> of_float32 = rmsprop(lr=0.01, momentum=0.9).init(params)
      >>> size = lambda state: sum(x.nbytes for x in jax.tree.leaves(state))
      >>> print(f"{size(state) / size(of_float32):.3f}")
      0.255

    Source:
      The codes are ours (``benchmarks/NOTES.md``). Stochastic rounding: G. Forsythe, "Round-off errors in numerical
      integration on automatic machinery" (1950). 8-bit optimizer states: T. Dettmers et al., arXiv:2110.02861.
    """
    inner = check_transformation("inner", inner)
    rules = Rules(checked_bits(bits), check_count("min_size", min_size), checked_fields(slots))
    seed = check_count("seed", seed, at_least=0)

    def init(params: optax.Params) -> CompressState:
        inner_state = inner.init(params)
        slots = rules.slots_of(inner_state, params)
        rules.check_first(slots)
        structure = jax.tree.structure(inner_state)
        arrays = [slot.array if slot.dtype is None else slot.array.astype(slot.dtype) for slot in slots]
        zeros = [x if slot.code is None else codes.zeros(x, slot.code) for x, slot in zip(arrays, slots, strict=True)]
        wide, like = (jax.tree.unflatten(structure, leaves) for leaves in (arrays, zeros))
        return CompressState(new_counter(params), _outside_variables(_encoded(wide, like)))

    def update(
        updates: optax.Updates, state: CompressState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, CompressState]:
        if not isinstance(state, CompressState):
            raise ValueError(
                f"state must be the CompressState that init returned, got {type(state).__name__}; take it out of the "
                "state of a chain, and restore a checkpoint into what init returns"
            )
        rules.check_state(state.inner_state, updates)
        new_updates, inner_state = inner.update(updates, decode(state.inner_state), params, **extra_args)
        rules.check_returned(inner_state, updates)
        return new_updates, CompressState(
            step=optax.safe_increment(state.step),
            inner_state=_encoded(inner_state, state.inner_state, (state.step, seed)),
        )

    return optax.GradientTransformationExtraArgs(init, update)


# --- In float32, and back ------------------------------------------------------------------------------------


def decode(opt_state: optax.OptState) -> optax.OptState:
    """The same state with float32 arrays in place of the encoded ones.

    ``diagnostics``, ``summary``, ``plotting`` and ``checkpoints`` do this themselves.

    Args:
      opt_state: any optimizer state with any number of :class:`Encoded`, or none; or its shapes and dtypes.

    Returns:
      The same tree, a :class:`CompressState` included, with a float32 array for each :class:`Encoded`; ``opt_state``
      itself if it has none.

    Raises:
      ValueError: if the codes and the scale of an :class:`Encoded` do not belong together. The message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import rmsprop, storage
      >>> params = jnp.ones((64, 64))
      >>> optimizer = storage.compress(rmsprop(alpha=0.75))
      >>> _, state = optimizer.update(jnp.full((64, 64), 4.0), optimizer.init(params))
      >>> print(state.inner_state.square_avg.codes[0, 0], storage.decode(state).inner_state.square_avg[0, 0])
      255 4.0
    """
    leaves, structure = jax.tree.flatten(opt_state, is_leaf=is_encoded)
    plain = [codes.unboxed(x) for x in leaves if is_encoded(x)]
    if not plain:
        return opt_state
    if not all(map(codes.is_sound, plain)):
        _refuse_unsound(opt_state)
    if any(isinstance(x.codes, jax.ShapeDtypeStruct) for x in plain):
        arrays = iter(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.codes.sharding) for x in plain)
    else:
        arrays = iter(_decode_all(plain))
    return jax.tree.unflatten(structure, [_boxed(x.codes, next(arrays)) if is_encoded(x) else x for x in leaves])


def _refuse_unsound(opt_state: optax.OptState) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_encoded):
        if is_encoded(x) and not codes.is_sound(codes.unboxed(x)):
            raise ValueError(
                f"opt_state{jax.tree_util.keystr(path)} must have codes in bfloat16 and no scale, or in uint8 or int8 "
                f"and a float32 scale for each row, got {_described(x.codes)} and {_described(x.scale)}; restore a "
                "checkpoint into what init returns"
            )


def _described(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else shown(x)


def encode(opt_state: optax.OptState, like: optax.OptState) -> optax.OptState:
    """The state ``opt_state`` with its arrays encoded where those of ``like`` are: the inverse of :func:`decode`.

    Every number is rounded to the nearest code, so what was decoded gets the same codes again, and scales that are
    equal up to rounding.

    Args:
      opt_state: a state with float32 arrays, as :func:`decode` returns it.
      like: a state of the same structure with :class:`Encoded` in it: ``compress(...).init(params)``, or its shapes
        and dtypes.

    Returns:
      A tree like ``like``, with the numbers of ``opt_state``.

    Raises:
      ValueError: if the structures or the shapes differ, or if an array to be encoded is not finite. (Traced values
        pass unchecked.)

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import rmsprop, storage
      >>> params = jnp.ones((64, 64))
      >>> plain, optimizer = rmsprop(0.01), storage.compress(rmsprop(0.01))
      >>> _, state = plain.update(params, plain.init(params))  # 8 bits from here on:
      >>> like = optimizer.init(params)
      >>> state = storage.encode(like._replace(step=state.step, inner_state=state), like)
      >>> print(state.step, state.inner_state.square_avg.codes.dtype)
      1 uint8
    """
    arrays = _arrays_like(opt_state, like)
    olds, structure = jax.tree.flatten(like, is_leaf=is_encoded)
    zeros = [
        Encoded(*map(_boxed, old, codes.zeros(x, codes.unboxed(old).codes.dtype))) if is_encoded(old) else x
        for x, old in zip(arrays, olds, strict=True)
    ]
    return _encoded(jax.tree.unflatten(structure, arrays), jax.tree.unflatten(structure, zeros))


def _arrays_like(opt_state: optax.OptState, like: optax.OptState) -> list[Any]:
    """The leaves of ``opt_state`` in the places of the leaves and the encoded arrays of ``like``."""
    wanted: Any = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_encoded)
    try:
        parts = wanted[1].flatten_up_to(opt_state)
        fits = all(is_encoded(x) or len(jax.tree.leaves(x)) == 1 for x in parts)
    except ValueError:
        fits = False
    if not fits:
        given = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_encoded)
        names = [[jax.tree_util.keystr(path) for path, _ in leaves] for leaves in (given, wanted[0])]
        different = next((pair for pair in zip(*names, strict=False) if pair[0] != pair[1]), None)
        where = (
            f"{different[0]} is {different[1]} there" if different else f"{len(names[0])} leaves are {len(names[1])}"
        )
        raise ValueError(f"opt_state must have the structure of like, but {where}; give like as init returns it")
    arrays = [x if is_encoded(x) else jax.tree.leaves(x)[0] for x in parts]
    for (path, old), x in zip(wanted[0], arrays, strict=True):
        if is_encoded(old):
            _check_encodable(f"opt_state{jax.tree_util.keystr(path)}", x, codes.unboxed(old))
    return arrays


def _check_encodable(name: str, x: Any, like: Encoded) -> None:
    if is_encoded(x):
        raise ValueError(f"{name} is encoded already; decode it first: encode(decode(opt_state), like)")
    if np.shape(x) != like.shape:
        raise ValueError(f"{name} must have the shape {like.shape} of like, got {np.shape(x)}")
    if isinstance(x, jax.core.Tracer):
        return
    if not (jnp.abs(x) <= codes.LARGEST).all():
        raise ValueError(f"{name} must be finite and at most {codes.LARGEST:g}, which is what codes can hold")
    if like.codes.dtype == jnp.uint8 and (x < 0).any():
        raise ValueError(f"{name} must not be negative, since its codes are those of squares, got {float(x.min()):.3g}")


# --- Parameters in half precision ----------------------------------------------------------------------------


def apply_updates(params: optax.Params, updates: optax.Updates, step: chex.Numeric, *, seed: int = 0) -> optax.Params:
    """``optax.apply_updates`` for parameters in bfloat16 or float16, without a copy of them in float32.

    The sum is taken in float32 and rounded up or down at random such that its mean is right::

        param ← param + update       rounded to one of its two neighbors, the nearer one the more often

    Rounded to the nearest, an update is lost as soon as it is smaller than half the distance between two numbers of the
    dtype, which in bfloat16 is 0.2 to 0.4 % of the parameter. Leaves of other dtypes are updated as
    ``optax.apply_updates`` does it. So are the subnormal numbers of float16, below 6e-5.

    Args:
      params: a tree of parameters.
      updates: a tree like ``params``. Where it has ``None`` or a mask, the parameter stays as it is.
      step: number of updates so far, an int32 scalar or an int; another one in every step. The noise depends on it:
        ``storage.apply_updates(params, updates, state.step)``.
      seed: a whole number; another one gives another noise. Arrays of one shape share it.

    Returns:
      The new parameters, with the dtypes of ``params``.

    Raises:
      ValueError: if ``updates`` are not like ``params``, or ``seed`` or ``step`` is negative.
      TypeError: if ``step`` is not a whole number, or if the sum is differentiated.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from rmsprop_jax import storage
      >>> stochastic = nearest = jnp.ones(1000, jnp.bfloat16)
      >>> for step in range(100):
      ...     updates = jnp.full(1000, 0.001)
      ...     stochastic = storage.apply_updates(stochastic, updates, step)
      ...     nearest = optax.apply_updates(nearest, updates)
      >>> print(f"{stochastic.astype(float).mean():.2f} {nearest.astype(float).mean():.2f}")  # 1 + 100 · 0.001
      1.10 1.00
    """
    salt = _salt(check_count("seed", seed, at_least=0))
    structure: Any
    flat, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: x is None)
    parts = structure.flatten_up_to(updates)
    places = [i for i, (_, p) in enumerate(flat) if p is not None and not isinstance(parts[i], None | optax.MaskedNode)]
    for i in places:
        if np.shape(flat[i][1]) != np.shape(parts[i]):
            raise ValueError(
                f"updates must be like params, but params{jax.tree_util.keystr(flat[i][0])} has shape "
                f"{np.shape(flat[i][1])} and its update {np.shape(parts[i])}"
            )
    moved = [p for _, p in flat]
    added = _add_all([moved[i] for i in places], [parts[i] for i in places], _checked_step(step), salt)
    for i, p in zip(places, added, strict=True):
        moved[i] = p
    return jax.tree.unflatten(structure, moved)


def _checked_step(step: Any) -> Any:
    is_array = isinstance(step, jax.Array | np.ndarray | np.generic)
    if is_array and not step.shape and jnp.issubdtype(step.dtype, jnp.integer):
        return step
    if is_array:
        raise TypeError(f"step must be a whole number, the number of updates so far, got {shown(step)}")
    return check_count("step", step, at_least=0)


@jax.jit
def _add_all(
    params: Sequence[jax.Array], updates: Sequence[jax.Array], step: jax.Array, salt: chex.Numeric
) -> list[jax.Array]:
    return [_add(p, u, step, salt) for p, u in zip(params, updates, strict=True)]


@jax.jit
def _add(p: jax.Array, u: jax.Array, step: jax.Array, salt: chex.Numeric) -> jax.Array:
    p = jnp.asarray(p)
    if p.dtype not in (jnp.bfloat16, jnp.float16):
        return jnp.asarray(optax.apply_updates(p, u))
    exact = p.astype(jnp.float32) + jnp.asarray(u, jnp.float32)
    largest = float(jnp.finfo(p.dtype).max)
    noise = codes.dither(exact.shape, jnp.asarray(step), salt)
    held = codes.rounded(jnp.clip(exact, -largest, largest), p.dtype, noise)
    return jnp.where(jnp.isfinite(exact), held, exact.astype(p.dtype))


# --- All arrays of a state in one call -------------------------------------------------------------------------


def _encoded(state: optax.OptState, like: optax.OptState, at: tuple[jax.Array, int] | None = None) -> optax.OptState:
    """``state`` encoded where ``like`` is: with the noise of a step and a seed, or rounded to the nearest."""
    structure: Any
    olds, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_encoded)
    leaves = structure.flatten_up_to(state)
    places = [i for i, (_, old) in enumerate(olds) if is_encoded(old)]
    step, seed = at or (None, 0)
    salts = [_salt(seed, olds[i][0]) for i in places]
    arrays = [jax.tree.leaves(leaves[i])[0] for i in places]
    done = _encode_all(arrays, [codes.unboxed(olds[i][1]) for i in places], step, salts)
    for i, encoded in zip(places, done, strict=True):
        leaves[i] = Encoded(*map(_boxed, olds[i][1], encoded))
    return jax.tree.unflatten(structure, leaves)


def _salt(seed: int, path: Any = ()) -> np.uint32:
    """Where the noise of an array of the state starts; without a path, that of a parameter.

    Arrays in the same field of a state have the same noise at the same position. If each had its own, XLA would compile
    a kernel for each, while it compiles one for all arrays of a shape.
    """
    fields = "".join(jax.tree_util.keystr((key,)) for key in path if isinstance(key, jax.tree_util.GetAttrKey))
    return np.uint32((zlib.crc32(fields.encode()) + seed * 0x9E3779B1) % 2**32)


def _boxed(like: Any, x: Any) -> Any:
    """``x`` in a variable of Flax's nnx if ``like`` is one."""
    return jax.tree.map(lambda _: x, like)


def _outside_variables(tree: Any) -> Any:
    """``tree`` with the codes and the scale of each array in variables of their own, where Flax's nnx has one for it.

    Its optimizer puts new arrays into old variables, and would take the array apart into a dict.
    """
    nnx = sys.modules.get("flax.nnx")  # whoever has a variable has loaded it
    if nnx is None:
        return tree

    def outside(x: Any) -> Any:
        found = jax.tree.leaves(x, is_leaf=is_encoded)
        if not isinstance(x, nnx.Variable) or not any(map(is_encoded, found)):
            return x
        return jax.tree.map(lambda part: jax.tree.map(lambda _: part, x, is_leaf=is_encoded), found[0])

    return jax.tree.map(outside, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


@jax.jit
def _encode_all(
    arrays: Sequence[jax.Array], before: Sequence[Encoded], step: jax.Array | None, salts: Sequence[chex.Numeric]
) -> list[Encoded]:
    return [_encode(x, old, step, salt) for x, old, salt in zip(arrays, before, salts, strict=True)]


@jax.jit
def _encode(x: jax.Array, before: Encoded, step: jax.Array | None, salt: chex.Numeric) -> Encoded:
    """Jitted separately, so that arrays of equal shape are traced and lowered once."""
    noise = None if step is None else codes.dither(before.shape, step, salt)
    return codes.encode(x, before, noise)


@jax.jit
def _decode_all(arrays: Sequence[Encoded]) -> list[jax.Array]:
    return [_decode(x) for x in arrays]


_decode = jax.jit(codes.decode)
