"""One array in 8 or 16 bits. The oracle has the codes as numbers, in float64, and knows no bit patterns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmsprop_jax import codes
from rmsprop_jax.codes import Encoded, dither

UINT8, INT8, BFLOAT16 = (jnp.dtype(x) for x in (jnp.uint8, jnp.int8, jnp.bfloat16))
every_kind = pytest.mark.parametrize("dtype", [UINT8, INT8, BFLOAT16], ids=str)


def levels(dtype: np.dtype) -> np.ndarray:
    """What the codes of a row stand for, from 0 up, relative to its largest."""
    if dtype == UINT8:  # 1, 1.125, ..., 1.875, of 32 powers of 2; the smallest of all is 0
        sizes = np.array([2.0**e * (1 + m / 8) for e in range(-31, 1) for m in range(8)])
        sizes[0] = 0
    else:  # 1, 1.0625, ..., 1.9375, of 8 powers of 2, less the first of them
        sizes = np.array([2.0**e * (1 + m / 16) for e in range(-8, 0) for m in range(16)]) - 2.0**-8
    return sizes / sizes[-1]


def encoded(x: np.ndarray, dtype: np.dtype, step: int = 0, salt: int = 1, before: Encoded | None = None) -> Encoded:
    x = jnp.asarray(x, jnp.float32)
    noise = dither(x.shape, jnp.int32(step), np.uint32(salt))
    return codes.encode(x, codes.zeros(x, dtype) if before is None else before, noise)


def at_steps(x: np.ndarray, dtype: np.dtype, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The codes of ``x`` at each of so many steps, and the numbers that they stand for; the steps come first."""
    array = jnp.asarray(x, jnp.float32)

    def at(step: jax.Array) -> Encoded:
        return codes.encode(array, codes.zeros(array, dtype), dither(array.shape, step, np.uint32(1)))

    every = jax.jit(jax.vmap(at))(jnp.arange(count))
    return np.asarray(every.codes), np.asarray(jax.vmap(codes.decode)(every), np.float64)


def decoded(x: Encoded) -> np.ndarray:
    return np.asarray(codes.decode(x), np.float64)


def numbers(dtype: np.dtype, rows: int = 16, columns: int = 64) -> np.ndarray:
    """Rows of different sizes, whose entries differ by up to 1e4, with both signs where codes have one."""
    rng = np.random.default_rng(0)
    x = 10 ** rng.uniform(-4, 0, (rows, columns)) * 10.0 ** rng.integers(-12, 12, (rows, 1))
    return x if dtype == UINT8 else x * rng.choice([-1.0, 1.0], x.shape)


# --- The codes -----------------------------------------------------------------------------------------------


@pytest.mark.device("storage")
@pytest.mark.parametrize("dtype", [UINT8, INT8], ids=str)
def test_codes_stand_for_the_numbers_of_the_formula(dtype: np.dtype) -> None:
    every = jnp.arange(*((256,) if dtype == UINT8 else (-127, 128)), dtype=dtype)[None]
    scale = jnp.array([3.0], jnp.float32)
    sizes = levels(dtype)
    expected = sizes if dtype == UINT8 else np.concatenate([-sizes[:0:-1], sizes])
    got = decoded(Encoded(every, scale))[0]
    np.testing.assert_allclose(got / got[-1], expected, rtol=1e-6)
    largest = 1.875 if dtype == UINT8 else 1.9375 / 2 - 2**-8
    np.testing.assert_allclose(got[-1], 3 * largest, rtol=1e-6)


@pytest.mark.device("storage")
@every_kind
def test_what_was_decoded_gets_the_same_codes_again(dtype: np.dtype) -> None:
    """Whatever the noise is: a number that is a level is never moved."""
    before = encoded(numbers(dtype), dtype)
    again, _ = at_steps(decoded(before), dtype, 40)
    assert (again == np.asarray(before.codes)).all()
    nearest = codes.encode(codes.decode(before), before)
    assert (nearest.codes == before.codes).all()
    if before.scale is not None:
        np.testing.assert_allclose(nearest.scale, before.scale, rtol=3e-7)  # two roundings


@pytest.mark.device("storage")
@pytest.mark.parametrize("dtype", [UINT8, INT8], ids=str)
def test_a_number_becomes_one_of_its_two_neighbors(dtype: np.dtype) -> None:
    x = numbers(dtype)
    largest = np.abs(x).max(1, keepdims=True)
    sizes, relative = levels(dtype), np.abs(x) / largest
    below = np.searchsorted(sizes, relative * (1 + 1e-6), side="right") - 1
    got = np.abs(at_steps(x, dtype, 20)[0].astype(np.int32))
    above = got == below + 1
    assert ((got == below) | above).all()
    assert ((above.mean((1, 2)) > 0.2) & (above.mean((1, 2)) < 0.8)).all()


@pytest.mark.device("storage")
def test_sixteen_bits_are_one_of_two_neighbors_in_bfloat16() -> None:
    x = numbers(BFLOAT16).astype(np.float32)
    down = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    up = ((x.view(np.uint32) | 0xFFFF).astype(np.uint32) + np.uint32(1)).view(np.float32)
    _, got = at_steps(x, BFLOAT16, 20)
    assert ((got == down) | (got == up)).all()
    assert (np.abs((got == up).mean((1, 2)) - 0.5) < 0.1).all()


@pytest.mark.device("storage")
@every_kind
def test_the_mean_of_many_codes_is_the_number(dtype: np.dtype) -> None:
    x = numbers(dtype)
    total = at_steps(x, dtype, 512)[1].sum(0)
    scale = np.abs(x) if dtype != INT8 else np.abs(x) + np.abs(x).max(1, keepdims=True) * 2**-8
    error = (total / 512 - x) / scale
    # One rounding is off by up to 1/8, 1/16 or 1/128. The mean of 512, spread evenly in sixteens, is off by up to 0.018
    # of that here; with a new hash at every step, by up to 0.058.
    width = {UINT8: 1 / 8, INT8: 1 / 16, BFLOAT16: 1 / 128}[dtype]
    assert np.abs(error).max() < 0.04 * width
    assert np.abs(error.mean()) < 2e-3 * width


@every_kind
def test_half_of_the_way_is_rounded_to_the_nearest(dtype: np.dtype) -> None:
    x = numbers(dtype)
    nearest = codes.encode(jnp.asarray(x, jnp.float32), codes.zeros(jnp.asarray(x, jnp.float32), dtype))
    error = np.abs(decoded(nearest) - x)
    others = np.abs(at_steps(x, dtype, 8)[1] - x)
    assert (error <= others * (1 + 1e-5) + 1e-6 * np.abs(x)).all()


# --- The edges -----------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -np.nan])
def test_what_is_not_finite_keeps_its_value_and_spoils_no_row(dtype: np.dtype, bad: float) -> None:
    x = numbers(dtype).astype(np.float32)
    before = encoded(x, dtype)
    spoiled = 0.5 * x
    spoiled[3, 5] = bad
    after = encoded(spoiled, dtype, step=1, before=before)
    whole = encoded(0.5 * x, dtype, step=1, before=before)
    assert np.isfinite(decoded(after)).all()
    kept = decoded(before)[3, 5]
    np.testing.assert_allclose(decoded(after)[3, 5], kept, rtol=0.13, atol=np.abs(x[3]).max() / 999)
    others = np.arange(16) != 3
    assert (after.codes[others] == whole.codes[others]).all()
    elements = np.arange(64) != 5
    np.testing.assert_allclose(
        decoded(after)[3, elements], spoiled[3, elements], rtol=0.13, atol=np.abs(x[3]).max() / 999
    )


@every_kind
def test_what_is_too_large_for_codes_keeps_its_value(dtype: np.dtype) -> None:
    x = np.ones((2, 8), np.float32)
    before = encoded(x, dtype)
    x[1] = 3e38
    after = encoded(x, dtype, step=1, before=before)
    np.testing.assert_allclose(decoded(after), 1.0, rtol=1e-6)
    x[1] = 0.9e37  # fits
    np.testing.assert_allclose(decoded(encoded(x, dtype, step=1, before=before))[1], 0.9e37, rtol=1e-2)


@every_kind
def test_an_element_that_stays_not_finite_spoils_no_row(dtype: np.dtype) -> None:
    """From the first step on, when its row has no scale yet."""
    x = np.abs(numbers(dtype)).astype(np.float32)
    x[:, 7] = np.nan
    state = codes.zeros(jnp.asarray(x), dtype)
    for step in range(3):
        state = encoded(x, dtype, step=step, before=state)
    elements = np.arange(64) != 7
    largest = np.nanmax(x, 1, keepdims=True)
    np.testing.assert_array_less(np.abs(decoded(state) - x)[:, elements], (0.13 * x + largest / 999)[:, elements])
    assert (decoded(state)[:, 7] == 0).all()


@every_kind
def test_zeros_and_the_smallest_numbers_stay_finite(dtype: np.dtype) -> None:
    x = np.zeros((4, 8), np.float32)
    x[1], x[2], x[3, 0] = 1e-45, 1e-37, 1e-30
    resting = encoded(x, dtype)
    assert (resting.codes[0] == 0).all()
    assert resting.scale is None or (resting.scale > 0).all()
    got = decoded(resting)
    assert (got[0] == 0).all()
    assert (got[1] <= 2e-36 * 2.0**-8).all()
    np.testing.assert_allclose(got[2], 1e-37, rtol=0.13)
    np.testing.assert_allclose(got[3], x[3], rtol=1e-2)


def test_squares_below_zero_become_zero_and_others_never_do() -> None:
    x = np.array([[1.0, -1.0, 1e-3, 1e-12, 1e-30, 0.0, -1e-30, 0.5]], np.float32)
    got, _ = at_steps(x, UINT8, 20)
    assert ((got > 0) == (x > 0)).all()
    assert (got[:, 0, 4] == 1).all()


def test_idle_rows_keep_their_codes_while_their_scale_decays() -> None:
    start = encoded(numbers(UINT8), UINT8)

    def idle(step: jax.Array, state: Encoded) -> Encoded:
        return codes.encode(0.9 * codes.decode(state), state, dither(state.shape, step, np.uint32(1)))

    end = jax.lax.fori_loop(0, 200, idle, start)
    assert (end.codes != start.codes).mean() < 1e-3
    np.testing.assert_allclose(np.median(decoded(end) / decoded(start)), 0.9**200, rtol=1e-4)


def test_row_maxima_are_the_same_on_every_device() -> None:
    x = -jnp.asarray(numbers(INT8, 8, 16))
    for values in (x, jnp.abs(x), -jnp.abs(x), 0 * x):
        one_loop, elsewhere = codes._both_extremes(values), codes._largest_magnitude(values)
        assert (one_loop == elsewhere).all()
        assert (elsewhere == np.abs(np.asarray(values)).max(1)).all()


def test_exact_halves_are_rounded_up() -> None:
    """To the nearest: 1.0625 lies between the codes of 1 and 1.125."""
    x = jnp.array([[1.875, 1.0625, 1.0]])
    assert codes.encode(x, codes.zeros(x, UINT8)).codes.tolist() == [[255, 249, 248]]


def test_a_derivative_is_refused() -> None:
    x = jnp.ones((2, 8))
    with pytest.raises(TypeError, match=r"has no derivative.*without storage\.compress"):
        jax.grad(lambda x: codes.decode(encoded(x, UINT8)).sum())(x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_to_a_neighbor_with_the_right_mean(dtype: jnp.dtype) -> None:
    x = np.random.default_rng(0).uniform(0.5, 2, 4096).astype(np.float32)
    width = float(jnp.finfo(dtype).eps)
    every = jax.vmap(lambda step: codes.rounded(jnp.asarray(x), dtype, dither(x.shape, step, np.uint32(0))))
    got = every(jnp.arange(256))
    assert got.dtype == dtype
    error = np.asarray(got, np.float64) - x
    assert (np.abs(error) < width).all()
    assert np.abs(error.mean(0)).max() < 0.1 * width


def test_codes_at_the_bottom_are_counted() -> None:
    squares = jnp.array([[0, 1, 1, 2, 255, 0, 3, 1]], jnp.uint8)
    signed = jnp.array([[0, 1, -15, 16, -16, 127, -127, 15]], jnp.int8)
    assert [int(x) for x in codes.at_bottom(squares)] == [3, 6]
    assert [int(x) for x in codes.at_bottom(signed)] == [3, 7]


@pytest.mark.parametrize(
    ("values", "scale", "sound"),
    [
        (jnp.zeros((2, 8), jnp.uint8), jnp.zeros(2), True),
        (jnp.zeros(8, jnp.int8), jnp.zeros(()), True),
        (jnp.zeros((2, 8), jnp.bfloat16), None, True),
        (jnp.zeros((2, 8), jnp.bfloat16), jnp.zeros(2), False),
        (jnp.zeros((2, 8), jnp.uint8), None, False),
        (jnp.zeros((2, 8), jnp.uint8), jnp.zeros(8), False),
        (jnp.zeros((2, 8), jnp.uint8), jnp.zeros(2, jnp.bfloat16), False),
        (jnp.zeros((2, 8), jnp.float32), jnp.zeros(2), False),
        (jnp.zeros((), jnp.uint8), jnp.zeros(()), False),
        (None, None, False),
        (jnp.zeros((2, 8), jnp.int32), jnp.zeros(2), False),
    ],
)
def test_codes_and_scale_belong_together(values: jax.Array, scale: jax.Array, sound: bool) -> None:
    assert codes.is_sound(Encoded(values, scale)) is sound


# --- The dither ----------------------------------------------------------------------------------------------


def test_the_dither_is_the_same_on_every_layout() -> None:
    """It depends on the position in the flat array alone, so that a shard gets its part of the whole."""
    flat = np.asarray(dither((4 * 6 * 8,), jnp.int32(3), np.uint32(7)))
    for shape in ((4, 6, 8), (24, 8), (4, 48)):
        assert (np.asarray(dither(shape, jnp.int32(3), np.uint32(7))).ravel() == flat).all()


def test_the_dither_is_uniform_at_every_step_and_over_the_steps_of_a_position() -> None:
    steps = np.asarray(jax.vmap(lambda step: dither((4096,), step, np.uint32(5)))(jnp.arange(256))) / 2**32
    for axis in (0, 1):
        counts = np.stack([((steps >= i / 8) & (steps < (i + 1) / 8)).mean(axis) for i in range(8)])
        spread = 5 * np.sqrt(1 / 8 / steps.shape[axis])
        assert np.abs(counts - 1 / 8).max() < spread, (axis, np.abs(counts - 1 / 8).max())
    neighbors = np.corrcoef(steps[:, :-1].ravel(), steps[:, 1:].ravel())[0, 1]
    assert abs(neighbors) < 0.01


def lowbias32(x: int) -> int:
    """From the description of the hash, on Python's integers."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> shift) * factor % 2**32
    return x ^ x >> 16


def test_the_dither_is_the_formula_of_its_docstring() -> None:
    """Bit for bit, since a run that is resumed with another version has to go on as it would have."""
    for step in (0, 1, 15, 16, 1000):
        for salt in (0, 12345):
            got = np.asarray(dither((3, 5), jnp.int32(step), np.uint32(salt))).ravel()
            start = lowbias32(salt ^ lowbias32(step >> 4))
            wanted = [(lowbias32(i ^ start) + step * 0x9E3779B9) % 2**32 for i in range(15)]
            assert got.tolist() == wanted


def test_the_dither_is_spread_evenly_within_sixteen_steps() -> None:
    """The means of sixteen differ by 0.024; those of independent numbers by 0.072."""
    steps = np.asarray(jax.vmap(lambda step: dither((1024,), step, np.uint32(1)))(jnp.arange(64))) / 2**32
    assert steps.reshape(4, 16, -1).mean(1).std() < 0.03


def test_the_dither_is_another_one_for_another_salt() -> None:
    one, other = (np.asarray(dither((4096,), jnp.int32(0), np.uint32(salt))) for salt in (0, 1))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1
    assert (one != other).all()


@every_kind
@pytest.mark.parametrize("period", [2, 3, 5, 8, 13, 21])
def test_gradients_that_repeat_do_not_resonate_with_the_dither(dtype: np.dtype, period: int) -> None:
    """The bias of √v over a period. With one dither for 1,024 steps, it was −2.4 % and 3 % at periods 8 and 13."""
    rng = np.random.default_rng(period)
    sizes = 10 ** rng.uniform(-2, 0, (32, 256))
    gradients = rng.standard_normal((period, 32, 256)) * sizes
    gradients[0] *= 10
    squares = jnp.asarray(gradients**2 if dtype != INT8 else gradients, jnp.float32)

    def update(step: jax.Array, v: jax.Array, resting: Encoded) -> tuple[jax.Array, Encoded]:
        g = squares[step % period]
        noise = dither(v.shape, step, np.uint32(1))
        return 0.99 * v + 0.01 * g, codes.encode(0.99 * codes.decode(resting) + 0.01 * g, resting, noise)

    def measure(step: jax.Array, carry: tuple[jax.Array, Encoded, jax.Array]) -> tuple[jax.Array, Encoded, jax.Array]:
        v, resting = update(step, *carry[:2])
        got = codes.decode(resting)
        error = jnp.sqrt(got / v) - 1 if dtype != INT8 else (got - v) / jnp.sqrt(jnp.mean(v**2))
        return v, resting, carry[2] + jnp.mean(error)

    zero = jnp.zeros((32, 256))
    start = jax.lax.fori_loop(0, 1000, lambda i, c: update(i, *c), (zero, codes.zeros(zero, dtype)))
    *_, total = jax.lax.fori_loop(1000, 1000 + period, measure, (*start, jnp.zeros(())))
    assert abs(float(total) / period) < 0.01
