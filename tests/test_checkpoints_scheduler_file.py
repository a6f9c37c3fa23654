"""The numbers of a scheduler's file: which are taken, and what the message says of the others."""

from typing import Any

import numpy as np
import pytest

from rmsprop_jax.checkpoints.scheduler_file import File, item_of, number_of, whole_of

FILE = File("the file", {"gamma": 0.5, "mode": "up", "rates": [1, 0.5], "parts": [{"gamma": 2}]}, [{}, {}], None, None)

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("value", [3, 3.0, np.float32(3), np.int8(3), np.array(3), np.array([3.0]), torch.tensor(3)])
def test_number_of_any_library_is_read(value: Any) -> None:
    for read in (number_of("x", value), whole_of("x", value, 0, 3)):
        assert read == 3
        assert type(read) in (int, float)


@pytest.mark.parametrize(
    "value", [True, np.True_, "3", None, [3], np.ones(2), 3j, torch.ones((), device="meta"), torch.tensor(True)]
)
def test_what_is_no_number_is_a_type_error(value: Any) -> None:
    for read in (lambda: number_of("x", value), lambda: whole_of("x", value, 0, 3)):
        with pytest.raises(TypeError, match=r"^x must be a .*, got "):
            read()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 10**400, -(10**400), torch.tensor(float("nan"))])
def test_number_that_is_not_finite_is_a_value_error(value: Any) -> None:
    for read in (lambda: number_of("x", value), lambda: whole_of("x", value, 0, 3)):
        with pytest.raises(ValueError, match=r"^x must be a .*, got "):
            read()


def test_range_of_a_number_is_kept_and_named() -> None:
    assert number_of("x", 0.5, above=0.0, most=0.5) == 0.5
    assert number_of("x", 0.0, least=0.0) == 0.0
    with pytest.raises(ValueError, match=r"^x must be a finite number above 0 and at most 0.5, got 0$"):
        number_of("x", 0, above=0.0, most=0.5)
    with pytest.raises(ValueError, match=r"at most 0.5, got 0.6$"):
        number_of("x", 0.6, above=0.0, most=0.5)
    with pytest.raises(ValueError, match=r"^x must be a finite number ≥ 0, got -1$"):
        number_of("x", -1, least=0.0)
    for value in (-1, 4, 1.5):
        with pytest.raises(ValueError, match=rf"^x must be a whole number from 0 to 3, got {value}$"):
            whole_of("x", value, 0, 3)


def test_file_names_what_it_reads() -> None:
    assert (FILE.number("gamma"), FILE.choice("mode", ("up", "down")), FILE.per_group("rates")) == (
        0.5,
        "up",
        [1.0, 0.5],
    )
    assert item_of("the file", FILE.items, "mode") == "up"
    (part,) = FILE.parts("parts")
    assert (part.count("gamma"), part.named("gamma")) == (2, "'gamma' of the file['parts'][0]")
    with pytest.raises(ValueError, match=r"^the file has no 'beta'; give what"):
        FILE.number("beta")
    with pytest.raises(ValueError, match=r"^'mode' of the file must be 'left' or 'right', got 'up'$"):
        FILE.choice("mode", ("left", "right"))
    with pytest.raises(TypeError, match=r"^'gamma' of the file must be a list, got 0.5$"):
        FILE.per_group("gamma")


def test_epoch_of_a_file_that_has_none_is_that_of_its_first_part() -> None:
    inner = [{"last_epoch": 7}, {"last_epoch": 8}]
    assert FILE._replace(items={"_schedulers": inner}).epoch() == 7
    assert FILE._replace(items={"_schedulers": inner, "last_epoch": 3}).epoch() == 3
    assert FILE._replace(items={"last_epoch": -2}, begun=False).epoch() == 0
