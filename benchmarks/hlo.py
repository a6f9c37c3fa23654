"""What do devices send each other in a compiled program? Counted in its HLO text."""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks.trees import Shape

ITEMSIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
COLLECTIVES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
OPERATION = re.compile(rf"= (.*?) ({COLLECTIVES})(-start)?\(.*?\)(?:.*? channel_id=(\d+))?")
ARRAY = re.compile(rf"\b({'|'.join(ITEMSIZES)})\[([\d,]*)\]")


class Exchange(NamedTuple):
    """One collective operation.

    Attributes:
      kind: what it does.
      arrays: elements and bytes of each array, whole: as it is before a reduce-scatter and after an all-gather.
    """

    kind: str
    arrays: tuple[tuple[int, int], ...]


def exchanges(text: str, devices: int) -> list[Exchange]:
    """The collective operations of a program for so many ``devices``, which all take part in each of them.

    On a TPU, an all-reduce in a fusion that is named after the reduce-scatter is one. One operation may be cut into
    pieces there, which are computed beside other things and have one ``channel_id``.
    """
    found: dict[Any, Exchange] = {}
    computation = ""
    for line in text.splitlines():
        if line.endswith("{"):
            computation = line
        elif match := OPERATION.search(line):
            result, kind, start, channel = match.groups()
            arrays = [_array(dtype, shape) for dtype, shape in ARRAY.findall(result)]
            if start and kind != "all-reduce":  # operands and results; of a permutation, numbers after them
                half = 1 if kind == "collective-permute" else len(arrays) // 2
                arrays = arrays[half:] if kind == "all-gather" else arrays[:half]
            elif kind == "reduce-scatter":
                arrays = [(devices * count, devices * size) for count, size in arrays]
            if "all-reduce-scatter" in computation:
                kind = "reduce-scatter"
            found[channel or line] = Exchange(kind, tuple(arrays))
    return list(found.values())


def _array(dtype: str, shape: str) -> tuple[int, int]:
    count = math.prod(int(size) for size in shape.split(",") if size)
    return count, count * ITEMSIZES[dtype]


def summary(text: str, shapes: list[Shape], devices: int) -> dict[str, Any]:
    """How many collectives of each kind, and their bytes for each parameter.

    ``whole`` are bytes of arrays with as many elements as one of the parameters, or with more than any parameter has
    rows (several in one). ``small`` are those of all others: single numbers, or one for each row. ``sent`` is what a
    device sends if the devices form a ring: (n − 1)/n of an array, and twice that in an all-reduce.
    """
    found = exchanges(text, devices)
    count = sum(math.prod(shape) for shape in shapes)
    sizes, rows = {math.prod(shape) for shape in shapes}, max(math.prod(shape[:-1]) for shape in shapes)
    arrays = [array for exchange in found for array in exchange.arrays]
    whole = [size for elements, size in arrays if elements in sizes or elements > rows]
    kinds = sorted({exchange.kind for exchange in found})
    return {
        "collectives": {kind: sum(exchange.kind == kind for exchange in found) for kind in kinds},
        "bytes": {kind: _bytes(x for x in found if x.kind == kind) / count for kind in kinds},
        "whole": sum(whole) / count,
        "small": (sum(size for _, size in arrays) - sum(whole)) / count,
        "sent": sum(_passes(x.kind, devices) * _bytes([x]) for x in found) / count,
    }


def _bytes(found: Iterable[Exchange]) -> int:
    return sum(size for exchange in found for _, size in exchange.arrays)


def _passes(kind: str, devices: int) -> float:
    once = (devices - 1) / devices
    return {"all-reduce": 2 * once, "collective-permute": 1.0}.get(kind, once)
