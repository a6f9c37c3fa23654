"""The comparison sees what it is for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compare import assert_close, assert_same, largest_error

WANT = {"a": jnp.array([1.0, -2.0, 0.0]), "b": (jnp.ones((), jnp.bfloat16), None)}
CLOSE = WANT | {"a": jnp.array([1.0 + 2.0**-23, -2.0, 0.0])}


def but(path: str, value: Any) -> Any:
    return {**WANT, path: value}


WRONG: dict[str, tuple[Any, str]] = {
    "NaN": (but("a", jnp.array([1.0, jnp.nan, 0.0])), r"\['a'\] at \(1,\): nan is not -2.0: off by inf"),
    "infinity": (but("a", jnp.array([jnp.inf, -2.0, 0.0])), r"\['a'\] at \(0,\): inf is not 1.0"),
    "a zero that is none": (but("a", jnp.array([1.0, -2.0, 1e-30])), r"at \(2,\): 1.\d*e-30 is not 0.0"),
    "a number that is zero": (but("a", jnp.array([0.0, -2.0, 0.0])), r"at \(0,\): 0.0 is not 1.0"),
    "two ulps": (but("a", jnp.array([1.0 + 2.0**-22, -2.0, 0.0])), "off by 2 ulps, allowed are 1"),
    "two ulps of bfloat16": (but("b", (jnp.bfloat16(1 + 2.0**-6), None)), "off by 2 ulps, allowed are 1"),
    "a missing slot": ({"b": WANT["b"]}, r"missing: \['a'\]"),
    "a slot that is None": (but("a", None), r"missing: \['a'\]"),
    "an additional slot": (but("b", (WANT["b"][0], jnp.ones(()))), r"additional: \['b'\]\[1\]"),
    "another container": (but("b", list(WANT["b"])), "is not PyTreeDef"),
    "another dtype": (but("b", (jnp.ones(()), None)), r"\['b'\]\[0\]: dtype float32 is not bfloat16"),
    "another shape": (but("a", jnp.array([[1.0, -2.0, 0.0]])), r"shape \(1, 3\) is not \(3,\)"),
    "a shape that would broadcast": (but("a", jnp.ones(())), r"shape \(\) is not \(3,\)"),
    "a Python number": (but("b", (1.0, None)), "float is not"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_a_failure(case: str) -> None:
    got, message = WRONG[case]
    with pytest.raises(AssertionError, match=message):
        assert_close(got, WANT, ulps=1)


def test_weak_type_is_compared_on_demand() -> None:
    weak, strong = jnp.asarray(1.0), jnp.float32(1.0)
    assert (weak.weak_type, strong.weak_type) == (True, False)
    assert_same(weak, strong)
    with pytest.raises(AssertionError, match="weak type True is not False"):
        assert_same(weak, strong, weak_types=True)


def test_what_is_close_passes_within_its_tolerance_only() -> None:
    assert_close(CLOSE, WANT, ulps=1)
    assert_close(CLOSE, WANT, rtol=2.0**-23)
    with pytest.raises(AssertionError, match=r"off by 1.192e-07, allowed are 1e-07"):
        assert_close(CLOSE, WANT, rtol=1e-7)
    with pytest.raises(AssertionError, match="off by 1 ulps, allowed are 0"):
        assert_same(CLOSE, WANT)


def test_ulps_may_be_given_for_each_dtype() -> None:
    got = CLOSE | {"b": (jnp.bfloat16(1 + 2.0**-6), None)}
    assert_close(got, WANT, ulps={"float32": 1, "bfloat16": 2})
    for ulps in ({"float32": 1, "bfloat16": 1}, {"float32": 1}, {"bfloat16": 2}):
        with pytest.raises(AssertionError, match="off by"):
            assert_close(got, WANT, ulps=ulps)


def test_scale_says_what_errors_are_relative_to() -> None:
    got = but("a", jnp.array([1.0, -2.0, 2.0**-22]))
    assert_close(got, WANT, ulps=1, scale="array")
    assert_close(got, WANT, ulps=1, scale=but("a", np.array([0.0, 0.0, 2.0])))
    for scale in (None, but("a", np.array([2.0, 2.0, 1.0]))):
        with pytest.raises(AssertionError, match="off by"):
            assert_close(got, WANT, ulps=1, scale=scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_passes_where_it_is_expected_and_asked_for(bad: float) -> None:
    both, other = np.array([1.0, bad]), np.array([bad, 1.0])
    assert_same(both, both, nonfinite="equal")
    assert_same(np.array([1.0, np.nan]), both, nonfinite="same places")
    for got, want, nonfinite in ((both, both, "refused"), (other, both, "equal"), (other, both, "same places")):
        with pytest.raises(AssertionError, match="off by inf"):
            assert_same(got, want, nonfinite=nonfinite)
    with pytest.raises(AssertionError, match="off by inf"):
        assert_same(np.array([1.0, 7.0]), both, nonfinite="same places")
    if np.isinf(bad):
        with pytest.raises(AssertionError, match="off by inf"):
            assert_same(-both, -both * np.array([1, -1]), nonfinite="equal")


def test_reference_of_another_precision_needs_the_dtype() -> None:
    assert_close(jnp.ones(2), np.ones(2), rtol=0, dtype="float32")
    with pytest.raises(AssertionError, match="dtype float32 is not float64"):
        assert_close(jnp.ones(2), np.ones(2), rtol=0)
    with pytest.raises(AssertionError, match="dtype float32 is not bfloat16"):
        assert_close(jnp.ones(2), np.ones(2), rtol=0, dtype="bfloat16")


def test_components_of_complex_numbers_are_compared_one_by_one() -> None:
    want = np.array([1e6 + 1e-6j])
    assert_close(want + 1e-20j, want, rtol=1e-12)
    with pytest.raises(AssertionError, match="off by 1,"):
        assert_close(want + 1e-6j, want, rtol=1e-12)


def test_leaves_that_are_no_arrays_are_compared_too() -> None:
    assert_same(
        {"name": "x", "function": len, "key": jax.random.key(0)},
        {"name": "x", "function": len, "key": jax.random.key(0)},
    )
    for got, want in (("x", "y"), (len, max), (True, 1), (jax.random.key(0), jax.random.key(1)), (2.0, 3.0)):
        with pytest.raises(AssertionError, match="is not"):
            assert_same([got], [want])


def test_comparing_nothing_is_a_failure() -> None:
    with pytest.raises(AssertionError, match="nothing to compare"):
        assert_same({"a": None}, {"a": None})
    with pytest.raises(TypeError, match="either ulps or rtol"):
        assert_close(1.0, 1.0)


def test_error_is_measured() -> None:
    error = largest_error(CLOSE, WANT, in_ulps=True)
    assert error.size == 1
    assert error.where.startswith("['a'] at (0,)")
