"""One array in 8 or 16 bits: how it is rounded without bias, and how it is read back.

Read from the top down: the codes; a float32 array into them and out of them; the row maxima; the dither.

A code says by its dtype what it is, so that encoded arrays need no description beside them:

- ``uint8``: a square. A float of 5 exponent and 3 mantissa bits on a scale for each row. 0 is 0. A row spans 4e9,
  which is 6e4 in the gradients.
- ``int8``: a number with a sign. Its magnitude is a float of 3 exponent and 4 mantissa bits on a scale for each row.
  The smallest 16 of them are evenly spaced, down to 0.
- ``bfloat16``: the number itself.

A row is what lies along the last axis. Nothing is reshaped, so rows that are spread over devices stay where they are.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np


class Encoded(NamedTuple):
    """A float32 array as it rests between two steps.

    Attributes:
      codes: like the array, in ``uint8``, ``int8`` or ``bfloat16``.
      scale: what the codes of each row are multiplied by, float32 of shape ``codes.shape[:-1]``; ``None`` for
        ``bfloat16``.
    """

    codes: chex.Array
    scale: chex.Array | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the array: float32."""
        return np.dtype(np.float32)


jax.export.register_namedtuple_serialization(Encoded, serialized_name="rmsprop_jax.Encoded")


def is_encoded(x: object) -> bool:
    """Whether ``x`` is an :class:`Encoded`, for ``is_leaf``."""
    return isinstance(x, Encoded)


def unboxed(encoded: Encoded) -> Encoded:
    """``encoded`` with arrays in place of the variables that Flax's nnx keeps them in."""
    arrays = jax.tree.leaves(encoded)
    return Encoded(arrays[0], arrays[1] if len(arrays) > 1 else None) if arrays else encoded


def is_sound(encoded: Encoded) -> bool:
    """Whether codes and scale belong together."""
    values: Any = encoded.codes
    scale: Any = encoded.scale
    if getattr(values, "dtype", None) == jnp.bfloat16:
        return scale is None
    is_known = getattr(values, "dtype", None) in (jnp.uint8, jnp.int8) and values.ndim > 0
    return is_known and getattr(scale, "dtype", None) == jnp.float32 and values.shape[:-1] == scale.shape


class _Float(NamedTuple):
    """A small float in the upper bits of a float32.

    Attributes:
      dropped: the number of bits of the float32 that it does not keep.
      first: the bits that are kept of the float32 whose code is 0; a code is the kept bits less these.
      offset: what is added before encoding and subtracted after decoding, so that code 0 stands for 0.
      largest: the number whose code is the largest.
    """

    dropped: int
    first: int
    offset: float
    largest: float


_SQUARE = _Float(dropped=20, first=768, offset=0.0, largest=1.875)
_SIGNED = _Float(dropped=19, first=1904, offset=2.0**-8, largest=0.96875 - 2.0**-8)
_HALF = np.uint32(1 << 31)  # the noise with which numbers are rounded to the nearest
LARGEST = 1e37  # what codes can hold
_SMALLEST_SCALE = 1e-36  # what float32 can divide by


# --- Into codes, and out of them -----------------------------------------------------------------------------


def zeros(x: chex.Array, dtype: np.dtype) -> Encoded:
    """Zeros in codes of ``dtype``, with the shape and the sharding of ``x``."""
    rows = None if dtype == jnp.bfloat16 else jnp.zeros_like(jnp.max(x, axis=-1), jnp.float32)
    return Encoded(jnp.zeros_like(x, dtype), rows)


def encode(x: jax.Array, before: Encoded, noise: jax.Array | None = None) -> Encoded:
    """``x`` in the kind of codes of ``before``.

    An element that is not finite, or is over 1e37, keeps the value that it has in ``before``.

    Args:
      x: an array of floats. Where the codes are squares, what is below 0 becomes 0.
      before: what rested before.
      noise: from :func:`dither`, to round up or down such that the mean is ``x``; ``None`` to round to the nearest.
    """
    if noise is None:
        # A first state is made of constants. Without the barrier, XLA would compute their maxima while it compiles, in
        # minutes.
        x, noise = jax.lax.optimization_barrier(x), jnp.asarray(_HALF)
    x = _without_derivative(x).astype(jnp.float32)
    x = jnp.where(jnp.abs(x) <= LARGEST, x, decode(before))  # NaN compares as false
    if before.scale is None:
        return Encoded(rounded(x, before.codes.dtype, noise), None)
    kind = _SIGNED if before.codes.dtype == jnp.int8 else _SQUARE
    scale = jnp.maximum(_row_maxima(x) * (1 / kind.largest), _SMALLEST_SCALE)
    ratio = x / scale[..., None]
    return Encoded(_signed(ratio, noise) if kind is _SIGNED else _square(ratio, noise), scale)


def decode(encoded: Encoded) -> jax.Array:
    """The float32 array."""
    if encoded.scale is None:
        return jnp.asarray(encoded.codes, jnp.float32)
    kind = _SIGNED if encoded.codes.dtype == jnp.int8 else _SQUARE
    codes = encoded.codes.astype(jnp.int32)
    size = _float(jnp.abs(codes) + kind.first << kind.dropped) - kind.offset
    size = jnp.where(codes < 0, -size, size) if kind is _SIGNED else jnp.where(codes == 0, 0.0, size)
    return jnp.asarray(size * encoded.scale[..., None])


def decoded(x: chex.Array | Encoded) -> chex.Array:
    """An array as it is, or decoded if it is an :class:`Encoded`."""
    return decode(unboxed(x)) if is_encoded(x) else x


def _square(y: jax.Array, noise: chex.Numeric) -> jax.Array:
    """The code of a square up to 1.875. What is not 0 does not become 0, since a root would be divided by."""
    codes = jnp.clip(_truncated(y, _SQUARE, noise), 1, 255)
    return jnp.where(y > 0, codes, 0).astype(jnp.uint8)


def _signed(y: jax.Array, noise: chex.Numeric) -> jax.Array:
    codes = jnp.clip(_truncated(jnp.abs(y) + _SIGNED.offset, _SIGNED, noise), 0, 127)
    return jnp.where(y < 0, -codes, codes).astype(jnp.int8)


def _truncated(y: jax.Array, kind: _Float, noise: chex.Numeric) -> jax.Array:
    """``y ≥ 0`` with as much noise as the dropped bits hold, and then without them.

    That is unbiased, since floats are linear between two powers of 2.
    """
    bits = jax.lax.bitcast_convert_type(y, jnp.int32)
    noise = (noise >> 32 - kind.dropped).astype(jnp.int32)
    return jnp.asarray((bits + noise >> kind.dropped) - kind.first)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def rounded(x: jax.Array, dtype: np.dtype, noise: chex.Numeric) -> jax.Array:
    """A finite float32 array in ``bfloat16`` or ``float16``, rounded up or down at random such that the mean is ``x``.

    Numbers below the normal ones of float16 are rounded to the nearest.
    """
    dropped = 23 - jnp.finfo(dtype).nmant
    bits = jax.lax.bitcast_convert_type(_without_derivative(x), jnp.uint32) + (noise >> 32 - dropped)
    return _float(bits & np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)).astype(dtype)


@jax.custom_jvp
def _without_derivative(x: jax.Array) -> jax.Array:
    return x


@_without_derivative.defjvp
def _refuse_derivative(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    raise TypeError(
        "what is rounded to codes or to half precision at random has no derivative, but one was asked for; do without "
        "storage.compress and storage.apply_updates there, or keep the update out with jax.lax.stop_gradient"
    )


def at_bottom(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many codes are too small to hold their number to a few percent, and how many are not 0.

    Squares: code 1, which stands for everything below it too. Signed: the 15 evenly spaced ones around 0.
    """
    size = jnp.abs(codes.astype(jnp.int32))
    bottom = (size > 0) & (size < (16 if codes.dtype == jnp.int8 else 2))
    return jnp.sum(bottom, dtype=jnp.uint32), jnp.sum(size > 0, dtype=jnp.uint32)


# --- The row maxima ------------------------------------------------------------------------------------------


def _row_maxima(x: jax.Array) -> jax.Array:
    """The largest magnitude of each row.

    On a single CPU, XLA writes all magnitudes to memory before it reduces them, unless the reduction has two results.
    Over several devices, two results would be gathered twice.
    """
    if jax.device_count() > 1:
        return _largest_magnitude(x)
    largest: jax.Array = jax.lax.platform_dependent(x, cpu=_both_extremes, default=_largest_magnitude)
    return largest


def _largest_magnitude(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), axis=-1)


def _both_extremes(x: jax.Array) -> jax.Array:
    def larger(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(map(jnp.maximum, a, b))

    zero = np.zeros((), np.float32)
    return jnp.maximum(*jax.lax.reduce((x, -x), (zero, zero), larger, (x.ndim - 1,)))


# --- The dither ----------------------------------------------------------------------------------------------


def dither(shape: tuple[int, ...], step: jax.Array, salt: chex.Numeric) -> jax.Array:
    """Evenly distributed uint32 numbers: under ``jit``, the same on every layout of devices.

    ::

        dither = hash(position, salt, step // 16) + step · 2³²/golden ratio

    Within 16 steps they are spread more evenly than independent ones, which leaves less noise in an average. Longer
    runs would resonate with gradients that repeat every 8 or 13 steps (benchmarks/NOTES.md).
    """
    step = step.astype(jnp.uint32)
    start: jax.Array = _hash(_positions(shape) ^ _hash(salt ^ _hash(step >> 4)))
    return start + step * np.uint32(0x9E3779B9)


def _positions(shape: tuple[int, ...]) -> jax.Array:
    """The index of each element in the flat array, modulo 2³²."""
    strides = np.cumprod([1, *reversed(shape[1:])], dtype=np.uint64).astype(np.uint32)[::-1]
    steps = [jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride for axis, stride in enumerate(strides)]
    return sum(steps, jnp.zeros((), jnp.uint32))


def _hash(x: Any) -> Any:
    """A bijection of uint32 without visible structure: "lowbias32" of C. Wellons, Hash Prospector."""
    x = (x ^ x >> 16) * np.uint32(0x7FEB352D)
    x = (x ^ x >> 15) * np.uint32(0x846CA68B)
    return x ^ x >> 16
