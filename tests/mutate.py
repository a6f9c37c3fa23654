"""Files and states that are broken on purpose: one change at one place, of every kind that was seen in the wild.

A change is chosen by two numbers, so that hypothesis can draw it and shrink it.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

Path = tuple[Any, ...]


class Change(NamedTuple):
    """A changed file.

    Attributes:
      file: the whole of it.
      path: where it was changed.
      what: how.
    """

    file: Any
    path: Path
    what: str


def changed(file: Any, place: int, kind: int) -> Change:
    """A copy of ``file``, changed at the place and in the way that the numbers choose."""
    whole = copy_of(file)
    paths = [path for path in _paths(whole) if path]
    path = paths[place % len(paths)]
    parent, key = _at(whole, path[:-1]), path[-1]
    changes = _changes(parent, key)
    what, change = changes[kind % len(changes)]
    try:
        new = change(parent, key)
    except Exception:  # such as the negative of a date
        new = parent
    return Change(_replaced(whole, path[:-1], new), _in_words(whole, path), what)


DEPTH = 12  # of real files; below it is junk, which may have no end


def copy_of(file: Any, depth: int = DEPTH) -> Any:
    """A copy that shares no containers and no memory."""
    if not depth:
        return file
    if isinstance(file, Mapping):
        return {key: copy_of(value, depth - 1) for key, value in file.items()}
    if isinstance(file, tuple) and hasattr(file, "_fields"):
        return type(file)(*(copy_of(value, depth - 1) for value in file))
    if isinstance(file, list | tuple):
        return type(file)(copy_of(value, depth - 1) for value in file)
    return file.clone() if isinstance(file, torch.Tensor) else copy.copy(file)


# --- Places ------------------------------------------------------------------------------------------------------


def _children(node: Any) -> dict[Any, Any]:
    if isinstance(node, Mapping):
        return dict(node)
    if isinstance(node, list | tuple):
        return dict(enumerate(node))
    return {}


def _paths(node: Any, path: Path = ()) -> list[Path]:
    paths = [path]
    for key, child in _children(node).items() if len(path) < DEPTH else ():
        paths += _paths(child, (*path, key))
    return paths


def _in_words(node: Any, path: Path) -> Path:
    """The path with the names of fields."""
    words = []
    for key in path:
        words.append(node._fields[key] if hasattr(node, "_fields") else key)
        node = node[key]
    return tuple(words)


def _at(node: Any, path: Path) -> Any:
    for key in path:
        node = node[key]
    return node


def _replaced(node: Any, path: Path, new: Any) -> Any:
    """``node`` with ``new`` at ``path``; tuples are made anew."""
    if not path:
        return new
    key, *rest = path
    return _with(node, key, _replaced(node[key], tuple(rest), new))


def _with(node: Any, key: Any, value: Any) -> Any:
    children = _children(node) | {key: value}
    return _container(node, children)


def _container(like: Any, children: dict[Any, Any]) -> Any:
    if isinstance(like, Mapping):
        return children
    if hasattr(like, "_fields"):
        return type(like)(*children.values())
    return type(like)(children.values())


# --- Kinds ---------------------------------------------------------------------------------------------------------


def _nested(depth: int) -> Any:
    junk: Any = 1.0
    for _ in range(depth):
        junk = [junk]
    return junk


def _cyclic() -> Any:
    junk: list[Any] = []
    junk.append(junk)
    return junk


class _Silent:
    """An object whose representation fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no representation")


JUNK: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "-1": lambda: -1,
    "0": lambda: 0,
    "7": lambda: 7,
    "0.25": lambda: 0.25,
    "NaN": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "1e300": lambda: 1e300,
    "1e-300": lambda: 1e-300,
    "10**30": lambda: 10**30,
    "a complex number": lambda: 1j,
    "a string": lambda: "junk",
    "an empty string": lambda: "",
    "bytes": lambda: b"junk",
    "an empty list": list,
    "an empty dict": dict,
    "a dict": lambda: {"junk": 1},
    "a list": lambda: [1, "junk"],
    "a set": lambda: {1, 2},
    "a range": lambda: range(3),
    "a function": lambda: max,
    "a class": lambda: float,
    "an object": object,
    "an object without representation": _Silent,
    "a nested list": lambda: _nested(2000),
    "a cyclic list": _cyclic,
    "an array of strings": lambda: np.array(["junk"]),
    "an array of objects": lambda: np.array([None, 1], object),
    "an array of dates": lambda: np.array(["2020-01-01"], "datetime64[D]"),
    "a scalar array": lambda: np.float32(0.5),
    "an empty array": lambda: np.zeros((0,), np.float32),
    "a random key": lambda: jax.random.key(0),
    "a tensor": lambda: torch.ones(2, 3),
}

Arrays = dict[str, Callable[[np.ndarray], Any]]


def _first(value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.result_type(x, np.float32) if x.dtype.kind in "iub" else x.dtype)
        x.reshape(-1)[:1] = value
        return x

    return change


OF_ARRAYS: Arrays = {
    "one NaN": _first(np.nan),
    "one infinity": _first(np.inf),
    "one negative number": _first(-1.0),
    "one huge number": _first(1e38),
    "one tiny number": _first(1e-42),
    "zeros": np.zeros_like,
    "ten times": lambda x: x * 10,
    "the opposite sign": lambda x: -x,
    "float64": lambda x: x.astype(np.float64),
    "1e300": lambda x: np.full(x.shape, 1e300),
    "float16": lambda x: x.astype(np.float16),
    "bfloat16": lambda x: x.astype(jnp.bfloat16),
    "float8": lambda x: x.astype(jnp.float8_e4m3fn),
    "integers": lambda x: np.nan_to_num(x).astype(np.int32),
    "bools": lambda x: x.astype(bool),
    "complex numbers": lambda x: x.astype(np.complex64),
    "strings": lambda x: x.astype(str),
    "objects": lambda x: x.astype(object),
    "flat": lambda x: x.reshape(-1),
    "transposed": lambda x: x.T,
    "another axis": lambda x: x[None],
    "one element less": lambda x: x.reshape(-1)[:-1],
    "nothing": lambda x: x.reshape(-1)[:0],
    "one number": lambda x: np.asarray(x.sum(), x.dtype),
    "a mask": lambda x: np.ma.masked_array(x, mask=np.ones(x.shape, bool)),
    "a list": lambda x: x.tolist(),
    "an array of JAX": jnp.asarray,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "read-only": lambda x: np.broadcast_to(x.reshape(-1)[:1].reshape([1] * x.ndim), x.shape) if x.size else x,
}

OF_TENSORS: dict[str, Callable[[Any], Any]] = {
    "float8 of torch": lambda x: x.to(torch.float8_e5m2),
    "bfloat16 of torch": lambda x: x.to(torch.bfloat16),
    "float64 of torch": lambda x: x.double(),
    "no memory": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "a negative view": torch._neg_view,
    "a gradient": lambda x: x.clone().requires_grad_(),
    "a parameter": lambda x: torch.nn.Parameter(x.clone()),
    "not contiguous": lambda x: torch.stack([x, x], -1)[..., 0],
}


def _changes(parent: Any, key: Any) -> list[tuple[str, Callable[[Any, Any], Any]]]:
    """All changes of the child ``key`` of ``parent``; each returns a new parent."""
    child = parent[key]
    changes: dict[str, Callable[[Any, Any], Any]] = {
        f"becomes {what}": lambda parent, key, junk=junk: _with(parent, key, junk()) for what, junk in JUNK.items()
    }
    if not hasattr(parent, "_fields"):
        changes["is dropped"] = lambda parent, key: _container(
            parent, {k: v for k, v in _children(parent).items() if k != key}
        )
    if isinstance(parent, Mapping):
        for new in ("junk", 7, "", ("a", 1)):
            changes[f"is renamed to {new!r}"] = lambda parent, key, new=new: {
                (new if k == key else k): v for k, v in parent.items()
            }
        changes["comes last"] = lambda parent, key: {k: v for k, v in parent.items() if k != key} | {key: parent[key]}
        changes["has a neighbor of its own kind"] = lambda parent, key: {**parent, "junk": copy_of(parent[key])}
    if isinstance(parent, list):
        changes["is there twice"] = lambda parent, key: [*parent, copy_of(parent[key])]
    for other in _children(parent):
        if other != key and not hasattr(parent, "_fields"):
            changes[f"is swapped with {other!r}"] = lambda parent, key, other=other: _container(
                parent, _children(parent) | {key: parent[other], other: parent[key]}
            )
    if isinstance(child, torch.Tensor):
        for what, tensor_change in OF_TENSORS.items():
            changes[f"becomes {what}"] = lambda parent, key, f=tensor_change: _with(parent, key, f(parent[key]))
    if isinstance(child, np.ndarray | jax.Array | torch.Tensor):
        for what, change in OF_ARRAYS.items():
            changes[f"becomes {what}"] = lambda parent, key, f=change: _with(parent, key, _as_tensor(f, parent[key]))
    return list(changes.items())


def _as_tensor(change: Callable[[np.ndarray], Any], value: Any) -> Any:
    """``change`` of the numbers, as a tensor again if it was one and torch has the dtype."""
    new = change(np.array(value))
    if not isinstance(value, torch.Tensor) or type(new) is not np.ndarray:
        return new
    try:
        return torch.from_numpy(np.ascontiguousarray(new).reshape(new.shape))
    except (TypeError, ValueError):
        return new
