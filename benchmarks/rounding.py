"""How far are averages from their float32 values, when they rest in 8 or 16 bits between the steps?

All methods get the gradients of ``optax.scale_by_rms`` or ``optax.trace`` in float32, beside which they run. Gradients
are normal, times a fixed size for each element. In a row of 256 the sizes are about 1, 0.1, 0.01, 0.001, 0.0001, 1, …;
the errors of each size are averaged separately, over the elements and over some hundred steps or more.

- ``root``: the error of √v, v the average of g². ``mean`` is the mean of √v ÷ its float32 value − 1, and ``rms`` the
  root of the mean square of that. In a run, the gradients are first steady, then fall to a tenth, and then are ten
  times as large as at first.
- ``periodic``: the same, where gradients repeat after some steps, and the first of them is ten times as large.
- ``signed``: the error of an average with momentum 0.9, over its own rms. Sizes are 1, 0.5, 0.2 and 0.05.

Ours are ``storage.compress``. Beside them are, rounded to the nearest: our 8-bit codes, bfloat16, and float8 (e4m3,
with a scale for each row that puts its largest at 448). float8 is also rounded as ours are. If bitsandbytes is
installed, so are its codes: those of its RMSProp, which spend a bit on a sign, and the unsigned ones of its Adam.
``RMSprop8bit`` is its own optimizer on the CPU, which finds codes in a table that has none of the smallest ones.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from rmsprop_jax import storage

ALPHAS = (0.9, 0.99, 0.999)
PERIODS = (2, 3, 5, 8, 13, 144)
SIZES, SIGNED_SIZES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4), (1.0, 0.5, 0.2, 0.05)
ROWS, COLUMNS = 64, 256
PHASES = {"steady": 1.0, "fell to a tenth": 0.1, "rose tenfold": 10.0}
MOMENTUM = 0.9
LARGEST_FLOAT8 = 448.0

# The relative errors of one step, of shape (rows, columns), summed over steps: themselves, and their squares.
Sums = tuple[jax.Array, jax.Array]


def measure(full: bool) -> list[dict[str, Any]]:
    """A row for every method, alpha and kind of gradients; with ``full`` on four times as many elements."""
    rows = ROWS * (4 if full else 1)
    return [*root_rows(rows), *bitsandbytes_rows(rows // 4), *periodic_rows(rows), *signed_rows(rows)]


# --- Methods -------------------------------------------------------------------------------------------------


def nearest(inner: optax.GradientTransformation, bits: int) -> optax.GradientTransformation:
    """``storage.compress(inner, bits)``, but rounded to the nearest."""
    tx = storage.compress(inner, bits, min_size=1)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, inner_state = inner.update(updates, storage.decode(state).inner_state, params)
        return updates, storage.encode(state._replace(inner_state=inner_state), state)

    return optax.GradientTransformation(tx.init, update)


class RestingState(NamedTuple):
    step: jax.Array
    inner_state: Any


def resting(
    inner: optax.GradientTransformation, rest: Callable[[jax.Array, jax.Array], jax.Array]
) -> optax.GradientTransformation:
    """``inner``, with ``rest(array, key)`` in place of its arrays between the steps."""

    def init(params: Any) -> RestingState:
        return RestingState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Any, state: RestingState, params: Any = None) -> tuple[Any, RestingState]:
        updates, inner_state = inner.update(updates, state.inner_state, params)
        key = jax.random.fold_in(jax.random.key(0), state.step)
        rested = jax.tree.map(lambda x: rest(x, key) if x.ndim else x, inner_state)
        return updates, RestingState(state.step + 1, rested)

    return optax.GradientTransformation(init, update)


def over_row_maximum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Between −1 and 1, and the scale."""
    scale = jnp.max(jnp.abs(x), -1, keepdims=True)
    return x / jnp.where(scale > 0, scale, 1), scale


def float8(x: jax.Array, key: jax.Array, stochastic: bool) -> jax.Array:
    """Rounded to float8 e4m3."""
    y, scale = over_row_maximum(x)
    y = y * LARGEST_FLOAT8
    if stochastic:
        distance = jnp.exp2(jnp.maximum(jnp.floor(jnp.log2(jnp.abs(y))), -6) - 3)  # of neighbors in e4m3
        y = jnp.floor(y / distance + jax.random.uniform(key, x.shape)) * distance
    return y.astype(jnp.float8_e4m3fn).astype(jnp.float32) * (scale / LARGEST_FLOAT8)


def bitsandbytes_codes(x: jax.Array, key: jax.Array, signed: bool) -> jax.Array:
    """Rounded to the nearest code of bitsandbytes."""
    from bitsandbytes.functional import create_dynamic_map

    y, scale = over_row_maximum(x)
    codes = create_dynamic_map(signed=signed).numpy()
    return jnp.asarray(codes)[jnp.searchsorted((codes[:-1] + codes[1:]) / 2, y)] * scale


METHODS: dict[str, Callable[[optax.GradientTransformation], optax.GradientTransformation]] = {
    "ours, 8 bits": lambda inner: storage.compress(inner, 8, min_size=1),
    "ours, 16 bits": lambda inner: storage.compress(inner, 16, min_size=1),
    "our 8 bits to the nearest": lambda inner: nearest(inner, 8),
    "bfloat16 to the nearest": lambda inner: nearest(inner, 16),
    "float8, stochastic": lambda inner: resting(inner, functools.partial(float8, stochastic=True)),
    "float8 to the nearest": lambda inner: resting(inner, functools.partial(float8, stochastic=False)),
}
if importlib.util.find_spec("bitsandbytes"):
    METHODS["codes of bitsandbytes"] = lambda inner: resting(inner, functools.partial(bitsandbytes_codes, signed=True))
    METHODS["unsigned codes of bitsandbytes"] = lambda inner: resting(
        inner, functools.partial(bitsandbytes_codes, signed=False)
    )


def slot(state: Any) -> jax.Array:
    """The only array in a state, in float32."""
    (array,) = (x for x in jax.tree.leaves(storage.decode(state)) if x.ndim)
    return array


# --- Both side by side ---------------------------------------------------------------------------------------


def sizes_of(shape: tuple[int, int], sizes: tuple[float, ...]) -> np.ndarray:
    """The sizes one after the other along a row, each reduced by up to a half: codes are finest above a power of 2."""
    reduced = np.exp2(-np.random.default_rng(0).random(shape))
    return (np.resize(sizes, shape[-1:]) * reduced).astype(np.float32)


def run(
    exact: optax.GradientTransformation,
    tx: optax.GradientTransformation,
    gradient: Callable[[jax.Array], jax.Array],
    error: Callable[[jax.Array, jax.Array], jax.Array],
    start: Any,
    settle: ArrayLike,
    watch: ArrayLike,
) -> tuple[Any, Sums]:
    """Both states after ``settle + watch`` steps, and the errors summed over the last ``watch``.

    ``start`` is the number of steps so far and both states.
    """

    def step(_: jax.Array, carry: Any) -> Any:
        count, exact_state, state = carry
        g = gradient(count)
        return count + 1, exact.update(g, exact_state)[1], tx.update(g, state)[1]

    def watched(i: jax.Array, carry: Any) -> Any:
        carry, (errors, squares) = step(i, carry[0]), carry[1]
        new = error(slot(carry[2]), slot(carry[1]))
        return carry, (errors + new, squares + new**2)

    settled = jax.lax.fori_loop(0, settle, step, start)
    zeros = jnp.zeros_like(slot(start[1]))
    return jax.lax.fori_loop(0, watch, watched, (settled, (zeros, zeros)))


def of_root(found: jax.Array, exact: jax.Array) -> jax.Array:
    return jnp.sqrt(found / exact) - 1


def by_size(sums: tuple[ArrayLike, ArrayLike], watch: int, sizes: tuple[float, ...]) -> dict[str, Any]:
    """Mean and rms of the errors by the sizes of the elements, and over all."""
    mean, square = (np.asarray(x, np.float64) / watch for x in sums)
    places = [np.arange(mean.shape[-1]) % len(sizes) == i for i in range(len(sizes))]
    return {
        "mean": {f"{size:g}": float(mean[:, place].mean()) for size, place in zip(sizes, places, strict=True)},
        "rms": {
            f"{size:g}": float(np.sqrt(square[:, place].mean())) for size, place in zip(sizes, places, strict=True)
        },
        "rms of all": float(np.sqrt(square.mean())),
    }


# --- The root of an average of squares -----------------------------------------------------------------------


def lengths(alpha: float) -> tuple[int, int]:
    """For how many steps a run settles, and for how many it is watched."""
    return round(10 / (1 - alpha)), max(200, round(3 / (1 - alpha)))


def root_rows(rows: int) -> Iterator[dict[str, Any]]:
    for alpha, (name, method) in itertools.product(ALPHAS, METHODS.items()):
        for phase, found in root_phases(method, alpha, (rows, COLUMNS)):
            yield {"kind": "root", "method": name, "alpha": alpha, "gradients": phase, **found}


def root_phases(
    method: Callable[..., optax.GradientTransformation], alpha: float, shape: tuple[int, int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    exact = optax.scale_by_rms(alpha)
    tx, sizes, (settle, watch) = method(exact), sizes_of(shape, SIZES), lengths(alpha)

    @jax.jit
    def phase(start: Any, factor: float) -> tuple[Any, Sums]:
        def gradient(count: jax.Array) -> jax.Array:
            return factor * sizes * jax.random.normal(jax.random.fold_in(jax.random.key(1), count), shape)

        return run(exact, tx, gradient, of_root, start, settle, watch)

    carry = (jnp.int32(0), exact.init(jnp.zeros(shape)), tx.init(jnp.zeros(shape)))
    for name, factor in PHASES.items():
        carry, sums = phase(carry, factor)
        yield name, by_size(sums, watch, SIZES)


# --- bitsandbytes --------------------------------------------------------------------------------------------


def bitsandbytes_rows(rows: int) -> Iterator[dict[str, Any]]:
    """Those of ``root_rows`` for its optimizer on the CPU, on fewer elements; none if it is not installed."""
    if not importlib.util.find_spec("bitsandbytes"):
        return
    for alpha in ALPHAS:
        for phase, found in bitsandbytes_phases(alpha, (rows, COLUMNS)):
            yield {"kind": "root", "method": "RMSprop8bit", "alpha": alpha, "gradients": phase, **found}


def bitsandbytes_phases(alpha: float, shape: tuple[int, int]) -> Iterator[tuple[str, dict[str, Any]]]:
    import torch
    from bitsandbytes.optim import RMSprop8bit

    param = torch.nn.Parameter(torch.zeros(shape))
    optimizer = RMSprop8bit([param], lr=0.0, alpha=alpha, min_8bit_size=1)
    sizes, exact, (settle, watch) = torch.from_numpy(sizes_of(shape, SIZES)), torch.zeros(shape), lengths(alpha)
    generator = torch.Generator().manual_seed(1)
    for name, factor in PHASES.items():
        errors, squares = torch.zeros(shape), torch.zeros(shape)
        for step in range(settle + watch):
            param.grad = factor * sizes * torch.randn(shape, generator=generator)
            exact.mul_(alpha).addcmul_(param.grad, param.grad, value=1 - alpha)
            optimizer.step()
            if step >= settle:
                new = (dequantized(optimizer.state[param]) / exact).sqrt() - 1
                errors, squares = errors + new, squares + new**2
        yield name, by_size((errors.numpy(), squares.numpy()), watch, SIZES)


def dequantized(slots: dict[str, Any]) -> Any:
    from bitsandbytes import functional

    return functional.dequantize_blockwise(
        slots["state1"], absmax=slots["absmax1"], code=slots["qmap1"], blocksize=COLUMNS
    )


# --- Gradients that repeat -----------------------------------------------------------------------------------


def periodic_rows(rows: int) -> Iterator[dict[str, Any]]:
    for name in ("ours, 8 bits", "ours, 16 bits", "our 8 bits to the nearest"):
        for alpha, period in itertools.product(ALPHAS, PERIODS):
            found = periodic(METHODS[name], alpha, period, (rows, COLUMNS))
            yield {"kind": "periodic", "method": name, "alpha": alpha, "period": period, **found}


def periodic(
    method: Callable[..., optax.GradientTransformation], alpha: float, period: int, shape: tuple[int, int]
) -> dict[str, Any]:
    """Watched for 16 periods, which is a whole number of the noise's 16 steps as well."""
    exact = optax.scale_by_rms(alpha)
    tx, watch = method(exact), 16 * period
    size = np.float32([10.0, *[1.0] * (period - 1)])[:, None, None] * sizes_of(shape, SIZES)
    gradients = size * jax.random.normal(jax.random.key(period), (period, *shape))
    start = (jnp.int32(0), exact.init(jnp.zeros(shape)), tx.init(jnp.zeros(shape)))
    _, sums = jax.jit(
        lambda start, gradients, settle: run(
            exact, tx, lambda count: gradients[count % period], of_root, start, settle, watch
        )
    )(start, gradients, lengths(alpha)[0])
    return by_size(sums, watch, SIZES)


# --- Averages with a sign ------------------------------------------------------------------------------------


def signed_rows(rows: int) -> Iterator[dict[str, Any]]:
    for name, method in METHODS.items():
        if "unsigned" in name:
            continue
        yield {"kind": "signed", "method": name, "alpha": MOMENTUM, **signed(method, (rows, COLUMNS))}


def signed(method: Callable[..., optax.GradientTransformation], shape: tuple[int, int]) -> dict[str, Any]:
    exact = optax.trace(MOMENTUM)
    tx, sizes, watch = method(exact), sizes_of(shape, SIGNED_SIZES), 1000
    own_rms = sizes / np.sqrt(1 - MOMENTUM**2)  # of a sum of independent normal gradients

    def gradient(count: jax.Array) -> jax.Array:
        return sizes * jax.random.normal(jax.random.fold_in(jax.random.key(2), count), shape)

    def error(found: jax.Array, exact: jax.Array) -> jax.Array:
        return (found - exact) / own_rms

    start = (jnp.int32(0), exact.init(jnp.zeros(shape)), tx.init(jnp.zeros(shape)))
    _, sums = jax.jit(lambda start: run(exact, tx, gradient, error, start, 200, watch))(start)
    return by_size(sums, watch, SIGNED_SIZES)
