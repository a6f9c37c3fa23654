"""Arrays under names and a parameter tree, one into the other, with no framework in between."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compare import assert_same
from rmsprop_jax import dialects, rmsprop
from rmsprop_jax.checkpoints.named import build_optimizer, slots_by_name
from rmsprop_jax.checkpoints.slots import SLOTS, Parameter, average_of_squares, check_slot, largest_count, variance

SHAPES = {"a": (2, 3), "b": (4,), "c": ()}
KEPT = (("square_avg", "momentum_buffer"), ("square_avg", "grad_avg"))  # in each group
TRANSFORMATIONS = (rmsprop(momentum=0.9), rmsprop(centered=True))


def to_params(named: Mapping[str, Any]) -> dict[str, Any]:
    """With everything in it that a tree may have besides arrays."""
    return {"model": [named["a"].T, {"b": named["b"], "flag": True}], "empty": (), "none": None, "c": named["c"]}


def from_params(params: Any) -> dict[str, Any]:
    return {"a": params["model"][0].T, "b": params["model"][1]["b"], "c": params["c"]}


def parameters(step: int | None = 7) -> list[Parameter]:
    """``a`` in the first group, the others in the second."""
    rng = np.random.default_rng(0)
    result = []
    for index, (name, shape) in enumerate(SHAPES.items()):
        group = min(index, 1)
        slots = {slot: np.asarray(rng.random(shape), np.float32) for slot in KEPT[group]}
        result.append(Parameter(name, group, shape, np.dtype(np.float32), step, slots))
    return result


def test_what_goes_into_a_tree_of_two_groups_comes_out_again() -> None:
    given = parameters()
    tx, state = build_optimizer(given, to_params, TRANSFORMATIONS)
    params = to_params({name: jnp.ones(shape) for name, shape in SHAPES.items()})
    params["model"][1]["flag"] = None
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, tx.init(params))
    step, slots = slots_by_name(state, from_params, list(SHAPES))
    assert step == 7
    assert_same(slots, {p.name: p.slots for p in given})


def test_tree_may_be_divided_by_none_as_well_as_by_masks() -> None:
    first, second = (
        tx.init({"a": a, "b": b}) for tx, a, b in zip(TRANSFORMATIONS, (1.0, None), (None, 2.0), strict=True)
    )
    _, slots = slots_by_name((first, second), dict, ["a", "b"])
    assert {name: tuple(kept) for name, kept in slots.items()} == {"a": KEPT[0], "b": KEPT[1]}


def test_labels_of_a_partition_may_be_a_prefix() -> None:
    """Then ``optax.MaskedNode`` stands for a whole branch, and one of the groups has no momentum."""
    tx = optax.partition({"x": rmsprop(momentum=0.9), "y": rmsprop()}, {"enc": "x", "dec": "y"})
    params = {"enc": {"w": jnp.ones(2)}, "dec": {"w": jnp.ones(3), "b": jnp.ones(1)}}
    _, state = tx.update(params, tx.init(params), params)
    names = ["enc/w", "dec/w", "dec/b"]

    def flat(tree: Any) -> dict[str, Any]:
        return {name: tree[name.split("/")[0]][name.split("/")[1]] for name in names}

    _, slots = slots_by_name(state, flat, names)
    assert {name: sorted(kept) for name, kept in slots.items()} == {
        "enc/w": ["momentum_buffer", "square_avg"],
        "dec/w": ["square_avg"],
        "dec/b": ["square_avg"],
    }


def test_slot_of_the_file_that_nobody_keeps_is_refused() -> None:
    given = [p._replace(group=0) for p in parameters()]
    with pytest.raises(ValueError, match=r"^the file has a \w+ of '\w+', but the transformation keeps none"):
        build_optimizer(given, to_params, [rmsprop()])


def test_slot_that_only_another_group_keeps_is_refused() -> None:
    slots = {slot: np.ones(2, np.float32) for slot in ("square_avg", "grad_avg")}
    given = [Parameter(name, group, (2,), np.dtype(np.float32), 1, slots) for group, name in enumerate("ab")]
    with pytest.raises(ValueError, match=r"^the file has a grad_avg of 'a', but the transformation keeps none"):
        build_optimizer(given, dict, [rmsprop(), rmsprop(centered=True)])


def test_slots_that_a_file_lacks_start_from_what_init_gives() -> None:
    given = [p._replace(slots={}, step=None, group=0) for p in parameters()]
    tx, state = build_optimizer(given, to_params, [dialects.tensorflow(0.1, momentum=0.9)])
    assert_same(state, tx.init(to_params({name: jnp.ones(shape) for name, shape in SHAPES.items()})))


def test_function_for_the_weights_may_only_rearrange() -> None:
    for change in (lambda x: x * 2, lambda x: x + 1e-6, lambda x: x.astype(np.float16), np.rint, np.cumsum):
        with pytest.raises(
            ValueError, match=r"^to_params puts numbers into leaf b that it was not given; .* cast, scale"
        ):
            build_optimizer(parameters(), lambda n, f=change: {**n, "b": f(n["b"])}, TRANSFORMATIONS)
        _, state = build_optimizer(parameters(), to_params, TRANSFORMATIONS)
        with pytest.raises(ValueError, match=r"^from_params (puts numbers into|makes) 'b'"):
            slots_by_name(state, lambda p, f=change: from_params(p) | {"b": f(from_params(p)["b"])}, list(SHAPES))


def test_a_thousand_parameters_are_told_apart() -> None:
    names = [f"p{i}" for i in range(1000)]
    given = [Parameter(n, 0, (), np.dtype(np.float32), 1, {"square_avg": np.float32(i)}) for i, n in enumerate(names)]
    _, state = build_optimizer(given, lambda named: np.stack([named[n] for n in reversed(names)]), [rmsprop()])
    np.testing.assert_array_equal(state.square_avg, np.arange(1000)[::-1])
    _, slots = slots_by_name(state, lambda p: {n: p[999 - i] for i, n in enumerate(names)}, names)
    assert_same(slots, {n: {"square_avg": np.float32(i)} for i, n in enumerate(names)})


def test_steps_that_differ_are_refused_by_name() -> None:
    given = parameters()
    given[2] = given[2]._replace(step=8)
    with pytest.raises(ValueError, match=r"^'a' is at step 7, but 'c' at step 8; .* give it as step="):
        build_optimizer(given, to_params, TRANSFORMATIONS)


def test_state_without_rmsprop_is_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"^the state of the transformation must contain .* build the transformation"):
        build_optimizer(parameters(), to_params, [optax.sgd(0.1), optax.sgd(0.1)])
    with pytest.raises(ValueError, match=r"^state must contain an RMSPropState, got tuple without one; give the state"):
        slots_by_name(optax.sgd(0.1).init(jnp.ones(3)), dict, ["w"])


# --- Slots -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
def test_average_of_squares_is_the_inverse_of_the_variance(dtype: str) -> None:
    rng = np.random.default_rng(0)
    mean, spread = (rng.random(50).astype(jnp.dtype(dtype)) for _ in range(2))
    if np.iscomplexobj(mean):
        mean, spread = mean + 1j * mean[::-1], spread + 1j * spread[::-1]
    squares = average_of_squares("w", spread, mean)
    assert squares.dtype == np.promote_types(dtype, np.float32)
    expected = spread.real.astype(np.float64) + mean.real.astype(np.float64) ** 2
    np.testing.assert_allclose(squares.real, expected, rtol=jnp.finfo(squares.dtype).eps)
    wide = spread.astype(squares.dtype)  # NumPy 1 compares no bfloat16
    np.testing.assert_allclose(variance("w", squares, mean), wide, atol=2 * jnp.finfo(squares.dtype).eps)


def test_variance_below_zero_is_zero_and_that_of_infinity_an_error() -> None:
    square, mean = np.float32([0.25, 1.0]), np.float32([0.5000001, 0.0])
    np.testing.assert_array_equal(variance("w", square, mean), np.float32([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"^'square_avg' and 'grad_avg' of 'w' are both infinite"):
        variance("w", np.float32([np.inf]), np.float32([np.inf]))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.float32([1, np.nan]), "has 1 NaN among its 2 numbers"),
        (np.float32([1, -1]), "is negative somewhere"),
        (np.complex64([1 - 1j]), "is negative somewhere"),
        (np.int32([1]), "must be a floating or complex array, got int32"),
        ([1.0], r"must be a floating or complex array, got \[1.0\]"),
    ],
)
def test_slot_with_other_numbers_than_init_and_update_give_is_refused(value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^here {message}"):
        check_slot("here", "square_avg", value)
    for slot in SLOTS[1:]:
        check_slot("here", slot, np.float32([-1.0, 1.0]))


@pytest.mark.parametrize("dtype", ["int8", "int32", "bfloat16", "float16", "float32"])
def test_counter_stops_at_its_largest_count(dtype: str) -> None:
    kind, end = jnp.dtype(dtype), largest_count(jnp.dtype(dtype))
    if kind.kind == "i":
        assert end == np.iinfo(kind).max
    else:
        assert kind.type(end - 1) + kind.type(1) == kind.type(end) == kind.type(end) + kind.type(1)
