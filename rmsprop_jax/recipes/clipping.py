"""What published recipes put around the RMSProp: clipping of gradients, and weights that are held in a box.

All of it computes in float32 at least. A complex array counts as two real ones.
"""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax.arguments import check_number, known, shown
from rmsprop_jax.state import componentwise, is_trainable, widened


def check_positive(name: str, value: Any) -> Any:
    """Returns a number > 0 as :func:`rmsprop_jax.arguments.check_number` does.

    Raises:
      ValueError: as there; also if the number is 0.
      TypeError: as there.
    """
    checked = check_number(name, value)
    if known(checked) == 0:
        raise ValueError(f"{name} must be a number > 0, got {shown(value)}")
    return checked


# --- The transformations -------------------------------------------------------------------------------------


def clip_by_global_norm(max_norm: chex.Numeric) -> optax.GradientTransformation:
    """As ``optax.clip_by_global_norm``, which turns a float16 gradient of 300 into 0: its norm there is infinite.

    torch's ``clip_grad_norm_`` adds 1e-6 to the norm; the difference is at most 1e-6 / ``max_norm``.
    """
    max_norm = check_positive("max_norm", max_norm)

    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        norm = _norm([g for g in jax.tree.leaves(updates) if is_trainable(g)])
        excess = jnp.maximum(1.0, norm / jnp.asarray(max_norm, norm.dtype))
        return jax.tree.map(_in_float32(lambda g: _shorter(g, excess)), updates)

    return optax.stateless(update)


def clip_by_parameter_norm(clipping: chex.Numeric, smallest_norm: chex.Numeric) -> optax.GradientTransformation:
    """Adaptive gradient clipping with a norm per array; ``optax.adaptive_grad_clip`` has one per output unit.

    ::

        g ← g / max(1, |g| / (clipping · max(smallest_norm, |param|)))
    """
    clipping = check_positive("clipping", clipping)
    smallest_norm = check_positive("smallest_norm", smallest_norm)

    def clip(g: jax.Array, p: jax.Array) -> jax.Array:
        norm = _norm([g])
        smallest, share = (jnp.asarray(x, norm.dtype) for x in (smallest_norm, clipping))
        longest = share * jnp.maximum(smallest, _norm([p]).astype(norm.dtype))
        return _shorter(g, jnp.maximum(1.0, norm / longest))

    return _map_with_params(_in_float32(clip))


def clip_entries(limit: chex.Numeric) -> optax.GradientTransformation:
    """``g ← min(max(g, −limit), limit)``, entry by entry."""
    limit = check_positive("limit", limit)

    def clip(part: jax.Array) -> jax.Array:
        bound = jnp.asarray(limit, part.dtype)
        return jnp.clip(part, -bound, bound)

    return optax.stateless(lambda updates, _: jax.tree.map(_in_float32(lambda g: componentwise(clip, g)), updates))


def hold_weights_within(limit: chex.Numeric) -> optax.GradientTransformation:
    """Updates after which no weight is outside ``[−limit, limit]``, once ``optax.apply_updates`` has rounded it.

    ::

        update ← min(max(param + update, −limit), limit) − param

    Where rounding would carry the weight across ``limit``, the update aims 4 machine epsilons lower.
    """
    limit = check_positive("limit", limit)

    def hold(u: jax.Array, p: jax.Array) -> jax.Array:
        common = _wider(u.dtype, p.dtype)  # in which apply_updates adds
        wide = _wider(common, jnp.dtype(jnp.float32))
        start = p.astype(wide)
        aim = start + u.astype(wide)

        def toward(bound: jax.Array) -> jax.Array:
            return _rounded(jnp.clip(aim, -bound, bound) - start, u.dtype)

        bound, margin = jnp.asarray(limit, wide), 4 * max(float(jnp.finfo(x.dtype).eps) for x in (u, p))
        first = toward(bound)
        reached = _rounded(_rounded(start + first, common), p.dtype)
        return jnp.where(jnp.abs(reached) > bound, toward(bound * (1 - margin)), first).astype(u.dtype)

    def held(u: Any, p: Any) -> Any:
        return componentwise(hold, jnp.asarray(u), jnp.asarray(p)) if is_trainable(u) and is_trainable(p) else u

    return _map_with_params(held)


# --- How -----------------------------------------------------------------------------------------------------


def _map_with_params(function: Callable[[Any, Any], Any]) -> optax.GradientTransformation:
    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        if params is None:
            raise ValueError("params must be given: call update(updates, state, params)")
        try:
            jax.tree.map(lambda u, p: None, updates, params, is_leaf=lambda u: u is None)
        except ValueError:
            paths = [{jax.tree_util.keystr(path) for path in _paths(tree)} for tree in (updates, params)]
            where = shown(min(paths[0] ^ paths[1], default="their containers"))
            raise ValueError(f"updates must have the structure of params, but they differ in {where}") from None
        return jax.tree.map(function, updates, params, is_leaf=lambda u: u is None)

    return optax.stateless(update)


def _paths(tree: Any) -> list[Any]:
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None)]


def _in_float32(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """``function`` of arrays in float32 at least, rounded to the dtype of the first; anything else is left alone."""

    def rounded(g: Any, *others: Any) -> Any:
        if not all(map(is_trainable, (g, *others))):
            return g
        return function(*map(widened, (g, *others))).astype(jnp.result_type(g))

    return rounded


def _shorter(g: jax.Array, excess: jax.Array) -> jax.Array:
    return componentwise(lambda part: part / excess.astype(part.dtype), g)


def _norm(arrays: Sequence[Any]) -> jax.Array:
    """The Euclidean norm of all entries, where it is above the root of the smallest normal number.

    Below (1e-19 in float32), its derivative would not be finite.
    """
    parts = [part for x in map(widened, arrays) for part in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]
    dtype = max((part.dtype for part in parts), key=lambda dtype: jnp.finfo(dtype).bits, default=jnp.dtype(jnp.float32))
    limits = jnp.finfo(dtype)

    def norm(scale: float) -> jax.Array:
        square = sum((jnp.sum((scale * part.astype(dtype)) ** 2) for part in parts), start=jnp.zeros((), dtype))
        return jnp.sqrt(jnp.maximum(limits.tiny, square)) / scale

    direct = norm(1.0)
    # In float32 the square of 1e20 is infinite, that of 2⁻⁹⁶ · 1e20 is not.
    small = 2.0 ** (-3 * limits.maxexp // 4)
    result: jax.Array = jax.lax.cond(jnp.isinf(direct), lambda: norm(small), lambda: direct)
    return result


def _wider(dtype: np.dtype, other: np.dtype) -> np.dtype:
    """The wider of two floating dtypes; float32 for two of 16 bits, of which neither holds the other."""
    if dtype == other or jnp.finfo(dtype).bits > jnp.finfo(other).bits:
        return dtype
    return other if jnp.finfo(other).bits > jnp.finfo(dtype).bits else jnp.dtype(jnp.float32)


def _rounded(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """``x`` with the precision of ``dtype``, in its own dtype. XLA leaves out a cast that is undone at once."""
    limits = jnp.finfo(dtype)
    if limits.bits >= jnp.finfo(x.dtype).bits:
        return x
    return jax.lax.reduce_precision(x, limits.nexp, limits.nmant)
