"""The state dict of one learning-rate scheduler, number by number: is each of them one that it can have?

Nothing in a file is called. A number may be Python's or NumPy's, or a tensor of one number, and is read in float64.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rmsprop_jax.arguments import shown
from rmsprop_jax.checkpoints.curves import LARGEST_EPOCH

_LARGEST = float(np.finfo(np.float64).max)
_DEEPEST = 5


class File(NamedTuple):
    """A state dict that is being read: what messages call it, and what is known beside it.

    Attributes:
      where: its name in messages.
      items: the state dict.
      groups: the groups of the optimizer.
      functions: the caller's, for this scheduler.
      last: the last epoch that is needed of functions, if that is known.
      begun: whether the scheduler was ever stepped: in a SequentialLR not before its turn.
      depth: in how many other files it lies.
    """

    where: str
    items: Mapping[str, Any]
    groups: list[Mapping[str, Any]]
    functions: Any
    last: int | None
    begun: bool = True
    depth: int = 0

    def named(self, key: str) -> str:
        """What messages call the number under a key."""
        return f"{key!r} of {self.where}"

    def number(self, key: str, above: float = -math.inf, least: float = -math.inf, most: float = math.inf) -> float:
        """A finite number in a range, as :func:`number_of` reads it."""
        return number_of(self.named(key), item_of(self.where, self.items, key), above, least, most)

    def count(self, key: str, least: int = 1) -> int:
        """A whole number of epochs."""
        return whole_of(self.named(key), item_of(self.where, self.items, key), least, LARGEST_EPOCH)

    def choice(self, key: str, allowed: Sequence[Any]) -> Any:
        """One of some words, or True or False."""
        value = item_of(self.where, self.items, key)
        if not isinstance(value, str | bool) or value not in allowed:
            raise ValueError(f"{self.named(key)} must be {' or '.join(map(repr, allowed))}, got {shown(value)}")
        return value

    def per_group(self, key: str) -> list[float]:
        """A list with a number ≥ 0 for each group."""
        values = self.sequence(key)
        if len(values) != len(self.groups):
            raise ValueError(
                f"{self.named(key)} has {len(values)} numbers, but param_groups has {len(self.groups)} groups; give "
                "the two files of one run"
            )
        return [number_of(f"{self.named(key)} at {index}", value, least=0.0) for index, value in enumerate(values)]

    def from_groups(self, key: str) -> list[float]:
        """A number ≥ 0 that each group has."""
        return [
            number_of(f"{key!r} of group {index}", item_of(f"group {index} of param_groups", group, key), least=0.0)
            for index, group in enumerate(self.groups)
        ]

    def sequence(self, key: str) -> Sequence[Any]:
        """A list of anything."""
        value = item_of(self.where, self.items, key)
        if not isinstance(value, list | tuple):
            raise TypeError(f"{self.named(key)} must be a list, got {shown(value)}")
        return value

    def parts(self, key: str) -> "list[File]":
        """The dicts of a list that is not empty, each as a file of its own."""
        values = self.sequence(key)
        if not values or not all(isinstance(value, Mapping) for value in values):
            raise TypeError(f"{self.named(key)} must be a list of dicts, at least one, got {shown(values)}")
        if self.depth == _DEEPEST:  # a file may even contain itself
            raise ValueError(f"{self.named(key)} must be in at most {_DEEPEST} others, got more; give torch's own file")
        return [
            File(f"{self.where}[{key!r}][{index}]", value, self.groups, None, None, depth=self.depth + 1)
            for index, value in enumerate(values)
        ]

    def epoch(self) -> int:
        """The scheduler's own epoch; that of its first one if it is a ChainedScheduler, which has none."""
        if not self.begun:
            return 0
        is_chained = "_schedulers" in self.items and not {"last_epoch", "_milestones"} & set(self.items)
        return self.parts("_schedulers")[0].epoch() if is_chained else self.count("last_epoch", least=0)


# --- Numbers of a file ------------------------------------------------------------------------------------------


def item_of(where: str, items: Mapping[str, Any], key: str) -> Any:
    """What is under a key that has to be there."""
    if key not in items:
        raise ValueError(f"{where} has no {key!r}; give what torch's state_dict() returned")
    return items[key]


def number_of(
    what: str, value: Any, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> float:
    """A finite number of Python or NumPy, or a tensor of one, as a float."""
    plain, allowed = _plain(value), "a finite number"
    allowed += f" above {above:g}" if above > -math.inf else f" ≥ {least:g}" if least > -math.inf else ""
    allowed += f" and at most {most:g}" if most < math.inf else ""
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        raise TypeError(f"{what} must be {allowed}, got {shown(value)}")
    if not (abs(plain) <= _LARGEST and above < plain and least <= plain <= most):
        raise ValueError(f"{what} must be {allowed}, got {shown(value)}")
    return float(plain)


def whole_of(what: str, value: Any, least: int, most: int) -> int:
    """A whole number from ``least`` to ``most``. It may be a float."""
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        raise TypeError(f"{what} must be a whole number from {least} to {most}, got {shown(value)}")
    if not (least <= plain <= most and plain == int(plain)):
        raise ValueError(f"{what} must be a whole number from {least} to {most}, got {shown(value)}")
    return int(plain)


def _plain(value: Any) -> Any:
    """An array or a tensor of one number as that number; anything else as it is."""
    try:
        return value.item() if hasattr(value, "dtype") and math.prod(value.shape) == 1 else value
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):  # it has no number to show
        return value
