"""The comparison of the whole test suite: which trees are equal, and how far apart their numbers may be.

It fails on another tree structure, a missing or additional slot, another dtype, shape or kind, on NaN and infinity
(unless the caller expects them), and if there is nothing to compare. Every tolerance is stated by the caller:

- ``ulps``: units in the last place of the dtype, for rounding; or a number for each dtype, by name. State the reason
  and the measured maximum.
- ``rtol``: a fraction, for meaning.

Both are relative to each expected entry, so that an expected 0 has to be 0. ``scale`` says what else the error of an
entry is relative to, where terms cancel: a tree of sizes, or ``"array"`` for the largest expected entry of each array.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Nonfinite = Literal["refused", "equal", "same places"]


class Error(NamedTuple):
    """The entry that is furthest off.

    Attributes:
      size: how far, in ulps or as a fraction.
      where: its index and both numbers, for a message.
      dtype: that of the array, by name; empty for a leaf that is no array.
    """

    size: float
    where: str
    dtype: str


def assert_same(got: Any, want: Any, *, nonfinite: Nonfinite = "refused", weak_types: bool = False) -> None:
    """Equal bit for bit, but for the sign of a zero."""
    assert_close(got, want, ulps=0, nonfinite=nonfinite, weak_types=weak_types)


def assert_close(
    got: Any,
    want: Any,
    *,
    ulps: float | Mapping[str, float] | None = None,
    rtol: float | None = None,
    scale: Any = None,
    dtype: Any = None,
    nonfinite: Nonfinite = "refused",
    weak_types: bool = False,
) -> None:
    """Alike, see :func:`assert_alike`, and within ``ulps`` or ``rtol``.

    Args:
      got: a tree of arrays, ours.
      want: the expected tree. Leaves that are no arrays have to be equal.
      ulps: units in the last place of the dtype of ``got``. Give either this or ``rtol``.
      rtol: a fraction.
      scale: what errors are relative to; see the module.
      dtype: what all of ``got`` has to be, where ``want`` is a float64 reference for another dtype.
      nonfinite: "equal" allows NaN where NaN is expected, and the same for both infinities. "same places" allows
        anything that is not finite where something not finite is expected.
      weak_types: whether weak types are compared as well.
    """
    if (ulps is None) == (rtol is None):
        raise TypeError("give either ulps or rtol")
    assert_alike(got, want, dtype=dtype, weak_types=weak_types)
    for path, error in _errors(got, want, ulps is not None, scale, nonfinite).items():
        allowed = ulps if rtol is None else rtol
        if isinstance(allowed, Mapping):
            allowed = allowed.get(error.dtype, 0)
        unit = " ulps" if rtol is None else ""
        assert error.size <= allowed, f"{path}{error.where}: off by {error.size:.4g}{unit}, allowed are {allowed:.4g}"


def assert_alike(got: Any, want: Any, *, dtype: Any = None, weak_types: bool = False) -> None:
    """The same structure, and leaf for leaf the same kind, shape and dtype (``dtype``, if given)."""
    ours, theirs = _leaves(got), _leaves(want)
    if jax.tree.structure(got) != jax.tree.structure(want):
        missing, more = [path for path in theirs if path not in ours], [path for path in ours if path not in theirs]
        different = f"{jax.tree.structure(got)} is not {jax.tree.structure(want)}"
        assert not missing, f"missing: {', '.join(missing)} ({different})"
        assert not more, f"additional: {', '.join(more)} ({different})"
        raise AssertionError(different)
    assert theirs, "there is nothing to compare"
    for path, a, b in zip(theirs, ours.values(), theirs.values(), strict=True):
        assert _is_array(a) == _is_array(b), f"{path}: {type(a).__name__} is not {type(b).__name__}"
        if not _is_array(b):
            assert type(a) is type(b), f"{path}: {type(a).__name__} is not {type(b).__name__}"
            continue
        expected = _dtype(b) if dtype is None else jnp.dtype(dtype)
        assert _dtype(a) == expected, f"{path}: dtype {_dtype(a)} is not {expected}"
        assert a.shape == b.shape, f"{path}: shape {tuple(a.shape)} is not {tuple(b.shape)}"
        if weak_types:
            weak = [getattr(x, "weak_type", False) for x in (a, b)]
            assert weak[0] == weak[1], f"{path}: weak type {weak[0]} is not {weak[1]}"


def largest_error(
    got: Any,
    want: Any,
    *,
    in_ulps: bool = False,
    scale: Any = None,
    dtype: Any = None,
    nonfinite: Nonfinite = "refused",
) -> Error:
    """Where ``got`` is furthest from ``want``; infinitely far at an entry that is not finite."""
    assert_alike(got, want, dtype=dtype)
    errors = _errors(got, want, in_ulps, scale, nonfinite)
    path, error = max(errors.items(), key=lambda item: item[1].size)
    return error._replace(where=path + error.where)


def _errors(got: Any, want: Any, in_ulps: bool, scale: Any, nonfinite: Nonfinite) -> dict[str, Error]:
    """The largest error of each leaf of two trees that are alike."""
    ours, theirs = _leaves(got), _leaves(want)
    sizes = theirs if scale is None or isinstance(scale, str) else _leaves(scale)
    assert sizes.keys() == theirs.keys(), "scale must be a tree like want"
    errors = {}
    for path, b in theirs.items():
        a = ours[path]
        if not _is_array(b):
            errors[path] = Error(0.0 if a is b or a == b else np.inf, f": {a!r} is not {b!r}", "")
            continue
        x, y = (_components(z) for z in (a, b))
        of = np.full_like(y, np.abs(y).max(initial=0)) if isinstance(scale, str) else np.abs(_components(sizes[path]))
        of = np.broadcast_to(of, y.shape)
        unit = _ulp(of, jnp.finfo(_dtype(a)).dtype) if in_ulps and jnp.issubdtype(_dtype(a), jnp.inexact) else of
        error = _error(x, y, unit, nonfinite)
        if error.size:
            index = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))
            errors[path] = Error(float(error[index]), f" at {index}: {x[index]!s} is not {y[index]!s}", str(_dtype(a)))
    return errors


def _error(x: np.ndarray, y: np.ndarray, unit: np.ndarray, nonfinite: Nonfinite) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.where(x == y, 0.0, np.abs(x - y) / unit)
    finite = np.isfinite(x) & np.isfinite(y)
    accepted = {
        "refused": np.zeros(x.shape, bool),
        "equal": (x == y) | (np.isnan(x) & np.isnan(y)),
        "same places": ~np.isfinite(x) & ~np.isfinite(y),
    }[nonfinite]
    return np.where(finite, error, np.where(accepted, 0.0, np.inf))


def _ulp(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The distance between the numbers of ``dtype`` at ``x``, not below that at its smallest normal number."""
    info = jnp.finfo(dtype)
    _, exponent = np.frexp(np.where(np.isfinite(x), np.maximum(x, float(info.tiny)), 1.0))
    return np.ldexp(float(info.eps), exponent - 1)


def _components(x: Any) -> np.ndarray:
    """The numbers in float64, the two components of a complex one along a last axis; the data of a random key."""
    if jnp.issubdtype(_dtype(x), jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    x = np.asarray(x)
    return (np.stack([x.real, x.imag], axis=-1) if np.iscomplexobj(x) else x).astype(np.float64)


def _leaves(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path) or "array": x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape")


def _dtype(x: Any) -> Any:
    """The dtype of an array of JAX, NumPy or torch."""
    return x.dtype if isinstance(x, jax.Array | np.ndarray | np.generic) else np.asarray(x).dtype
