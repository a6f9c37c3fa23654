"""What do the fields of an optimizer state hold, and which of their arrays are encoded?

Read from the top down: the fields that are known; what becomes of each leaf of a state; the arguments of the caller.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax.arguments import shown
from rmsprop_jax.codes import is_encoded

Kind = Literal["square", "signed", "full"]

# What the fields of known states hold: Optax's, ours, and torch's names, which ports keep.
_SQUARES = ("nu", "nu_max", "sum_of_squares", "e_g", "e_x", "square_avg", "exp_avg_sq")
_SIGNED = ("mu", "trace", "grad_avg", "momentum_buffer", "exp_avg")
_FIELDS: dict[str, Kind] = {**dict.fromkeys(_SQUARES, "square"), **dict.fromkeys(_SIGNED, "signed")}
_EXCEPTIONS: dict[tuple[str, str], Kind] = {("ScaleBySM3State", "nu"): "signed"}  # its momentum
_CODES: dict[str, np.dtype] = {"square": jnp.dtype(jnp.uint8), "signed": jnp.dtype(jnp.int8)}
_BFLOAT16: np.dtype = jnp.dtype(jnp.bfloat16)
_FLOAT32: np.dtype = jnp.dtype(jnp.float32)
_SHORTEST_ROW = 8  # the scale of a shorter row would need half as many bytes as its codes, or more


class Slot(NamedTuple):
    """A leaf of a state.

    Attributes:
      name: its path, for messages.
      array: the leaf itself.
      field: the name of the field whose subtree is like the parameters; ``None`` if there is none.
      dtype: that in which ``inner`` gets it, float32 at least; ``None`` for what stays as it is.
      code: the dtype of its codes; ``None`` if it is not encoded.
    """

    name: str
    array: Any
    field: str | None = None
    dtype: np.dtype | None = None
    code: np.dtype | None = None


class Rules(NamedTuple):
    """What :func:`compress` was told.

    Attributes:
      bits: 8 or 16.
      min_size: the number of elements from which an array is encoded.
      given: what fields of a state hold, by name, as far as the caller says it.
    """

    bits: int
    min_size: int
    given: Mapping[str, Kind]

    def slots_of(self, inner_state: Any, params: Any) -> list[Slot]:
        """Every leaf of a state, and what becomes of it."""
        shapes = {path: np.shape(p) for path, p in jax.tree_util.tree_leaves_with_path(params)}
        leaves = jax.tree_util.tree_leaves_with_path(inner_state, is_leaf=is_encoded)
        return [self._slot(inner_state, path, x, shapes) for path, x in leaves]

    def _slot(self, inner_state: Any, path: Any, x: Any, shapes: Mapping[Any, tuple[int, ...]]) -> Slot:
        name, shape = f"state.inner_state{jax.tree_util.keystr(path)}", np.shape(x)
        start = next((i for i in range(len(path) + 1) if shapes.get(path[i:]) == shape), None)
        if start is None or not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
            return Slot(name, x)
        field = jax.tree_util.keystr(path[:start][-1:], simple=True)
        holds = self._holds(inner_state, path[:start], field)
        if holds == "full":
            return Slot(name, x, field)
        is_wide = jnp.finfo(x.dtype).bits > 32
        slot = Slot(name, x, field, x.dtype if is_wide else _FLOAT32)
        if math.prod(shape) < self.min_size or shape[-1:] < (_SHORTEST_ROW,):
            return slot
        if is_wide:
            raise ValueError(
                f"{name} must be float32 or narrower, got {x.dtype}; keep it so with slots={{{field!r}: 'full'}}, or "
                "build rmsprop_jax's transformation with accumulator_dtype='float32'"
            )
        if self.bits == 16:
            return slot._replace(code=_BFLOAT16)
        if holds is None:
            raise ValueError(
                f"{name} is in a field of unknown meaning, {field or 'without a name'}; say what it holds, for example "
                f"slots={{{field!r}: 'signed'}}, or 'square' for an average of squares, or 'full' to keep it as it is"
            )
        return slot._replace(code=_CODES[holds])

    def _holds(self, inner_state: Any, path: Any, field: str) -> Kind | None:
        """What the field at the end of ``path`` holds: as the caller says, or as it is known."""
        owner: Any = inner_state
        for key in path[:-1]:
            owner = getattr(owner, key.name) if isinstance(key, jax.tree_util.GetAttrKey) else _child(owner, key)
        return self.given.get(field) or _EXCEPTIONS.get((type(owner).__name__, field)) or _FIELDS.get(field)

    def check_first(self, slots: Sequence[Slot]) -> None:
        """Raises if ``inner`` encodes too, or if the caller names a field that no slot has."""
        for slot in slots:
            if is_encoded(slot.array):
                raise ValueError(
                    f"inner must not encode its state, but {slot.name} is encoded; use one storage.compress"
                )
        fields = {slot.field for slot in slots if slot.field is not None}
        unknown = set(self.given) - fields
        if unknown and fields:
            raise ValueError(
                f"slots names {', '.join(map(repr, sorted(unknown)))}, but the fields of the state that are like "
                f"parameters are {', '.join(map(repr, sorted(fields)))}"
            )

    def check_state(self, inner_state: Any, updates: optax.Updates) -> None:
        """Raises at the first array that does not rest as ``init`` would have put it to rest."""
        for slot in self.slots_of(inner_state, updates):
            found = slot.array.codes.dtype if is_encoded(slot.array) else None
            if slot.field is not None and found != slot.code:
                raise ValueError(
                    f"{slot.name} is in {found or slot.array.dtype}, but init "
                    f"{f'encodes it in {slot.code}' if slot.code else 'does not encode it'}; call "
                    "storage.encode(storage.decode(state), init(params))"
                )

    def check_returned(self, inner_state: Any, updates: optax.Updates) -> None:
        """Raises at the first slot that ``inner`` has rounded to half precision."""
        for slot in self.slots_of(inner_state, updates):
            if slot.dtype is not None and jnp.finfo(slot.array.dtype).bits < 32:
                raise TypeError(
                    f"inner rounds {slot.name} to {slot.array.dtype}, which loses small changes before they are "
                    "encoded; build it without mu_dtype or accumulator_dtype"
                )


def _child(tree: Any, key: Any) -> Any:
    """The child of a node that has items, or ``None``."""
    try:
        return tree[getattr(key, "key", getattr(key, "idx", None))]
    except (TypeError, KeyError, IndexError):
        return None


def checked_bits(bits: Any) -> int:
    """``bits``, if they are 8 or 16."""
    if not isinstance(bits, int | np.integer) or isinstance(bits, bool) or bits not in (8, 16):
        raise ValueError(f"bits must be 8 or 16, got {shown(bits)}")
    return int(bits)


def checked_fields(slots: Any) -> dict[str, Kind]:
    """A copy of ``slots``, if it says of names what can be said."""
    if slots is not None and not isinstance(slots, Mapping):
        raise TypeError(f"slots must be a dict such as {{'nu': 'square'}}, got {shown(slots)}")
    for field, holds in (slots or {}).items():
        if not isinstance(field, str) or holds not in ("square", "signed", "full"):
            raise ValueError(
                f"slots must say 'square', 'signed' or 'full' for a field's name, got {shown(holds)} for {shown(field)}"
            )
    return dict(slots or {})
