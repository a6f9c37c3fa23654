"""Does a function only rearrange arrays, and which of them does each of its results come from?

The user's function for the weights carries every slot of the state, so it may rename, transpose, reshape, split and
join, but not compute. One look at the shapes cannot tell. So every element of every array gets a tag of its own, and
the tags in the results say where each element went.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

__all__ = ["Like", "sources_of"]


class Like(NamedTuple):
    """What an array is like.

    Attributes:
      what: its description in messages.
      shape: its shape.
      is_complex: whether its elements are complex.
    """

    what: str
    shape: tuple[int, ...]
    is_complex: bool


def sources_of(
    function: str, inputs: Sequence[Like], call: Callable[[list[np.ndarray]], list[tuple[str, Any]]]
) -> list[tuple[str, list[int]]]:
    """For each output of a function that rearranges, the numbers of the inputs that it is made of.

    Args:
      function: its name.
      inputs: what it is given.
      call: calls it with an array for each input; returns a description and an array for each output. It is called
        several times, with other tags for the same elements, so that nothing that depends on the numbers passes: not
        a sort, a mean or an absolute value.

    Returns:
      A description and the numbers of the inputs, for each output. An empty output comes from no input.

    Raises:
      ValueError: if an element of an output is no element of an input, or an element of an input is in no output.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax.checkpoints.rearrangement import Like, sources_of
      >>> both = [Like("'a'", (2,), False), Like("'b'", (3,), False)]
      >>> sources_of("to_params", both, lambda arrays: [("the result", np.concatenate(arrays))])
      [('the result', [0, 1])]
    """
    sizes = [math.prod(like.shape) for like in inputs]
    starts = np.cumsum([0, *sizes])
    number = int(starts[-1])
    digits = max(1, -(-number.bit_length() // _BITS))
    calls = [
        call([_tagged(like, int(start), place) for like, start in zip(inputs, starts, strict=False)])
        for place in range(-1, digits)
    ]
    is_placed = np.zeros(number, bool)
    sources = []
    for outputs in zip(*calls, strict=True):
        what = outputs[0][0]
        elements = _elements([np.asarray(array) for _, array in outputs], number)
        if elements is None:
            raise ValueError(
                f"{function} puts numbers into {what} that it was not given; it carries the slots as well as the "
                "weights, so it may only rearrange: cast, scale or pad elsewhere"
            )
        is_placed[elements] = True
        sources.append((what, _inputs_of(elements, starts)))
    for like, start, size in zip(inputs, starts, sizes, strict=False):
        lost = size - int(is_placed[start : start + size].sum())
        if lost:
            part = f"{lost} of {size} numbers of " if lost < size else ""
            raise ValueError(f"{function} leaves out {part}{like.what}; its state would be lost")
    return sources


def _inputs_of(elements: np.ndarray, starts: np.ndarray) -> list[int]:
    """The numbers of the inputs that elements belong to."""
    inputs: set[int] = set()
    for first in range(0, len(elements), _BLOCK):
        block = elements[first : first + _BLOCK]
        low, high = np.searchsorted(starts, [block.min(), block.max()], side="right") - 1
        if low == high:
            inputs.add(int(low))
        else:
            inputs.update(np.flatnonzero(np.bincount(np.searchsorted(starts, block, side="right") - 1)).tolist())
    return sorted(inputs)


# --- Tags ----------------------------------------------------------------------------------------------------
#
# The tag of an element is a code of 22 bits, written as a number in [1, 2) that needs all 24 bits of float32, so that
# a narrower dtype changes it. At place 0, 1, ... the code is a digit of the element's number, and the tag is negative.
# At place -1 it is a check sum, and the tag is positive. The imaginary part has the opposite sign.

_BITS = 22
_MASK = np.uint32(2**_BITS - 1)


_BLOCK = 2**16  # elements that are looked at together, so that what is computed of them stays in the cache


def _tagged(like: Like, start: int, place: int) -> np.ndarray:
    """An array of tags for the elements whose numbers begin with ``start``."""
    size = math.prod(like.shape)
    tags = np.empty(size, np.float32)
    for first in range(0, size, _BLOCK):
        last = min(first + _BLOCK, size)
        odd = (2 * _shuffled(_code(np.arange(start + first, start + last, dtype=np.int64), place)) + 1).astype(
            np.float32
        )
        tags[first:last] = np.float32(_sign(place)) * (1 + odd * np.float32(2.0**-23))
    tags = tags.reshape(like.shape)
    return (tags - 1j * tags).astype(np.complex64) if like.is_complex else tags


def _elements(arrays: Sequence[np.ndarray], number: int) -> np.ndarray | None:
    """The elements whose tags are in the arrays of all places; ``None`` if anything else is in them."""
    if any(array.shape != arrays[0].shape or not jnp.issubdtype(array.dtype, jnp.inexact) for array in arrays):
        return None
    flat = [array.reshape(-1) for array in arrays]
    elements = np.empty(arrays[0].size, np.int64)
    for first in range(0, len(elements), _BLOCK):
        found = _elements_of_block([array[first : first + _BLOCK] for array in flat], number)
        if found is None:
            return None
        elements[first : first + _BLOCK] = found
    return elements


def _elements_of_block(arrays: Sequence[np.ndarray], number: int) -> np.ndarray | None:
    codes = []
    for place, array in enumerate(arrays, start=-1):
        real = array.real.astype(np.promote_types(array.real.dtype, np.float32), copy=False)
        odd = (real * _sign(place) - 1) * 2.0**23
        is_tag = (odd > 0) & (odd < 2.0**23) & (odd % 2 == 1)
        if np.iscomplexobj(array):
            is_tag &= array.imag == -real
        if not is_tag.all():
            return None
        codes.append(_unshuffled(odd.astype(np.uint32) >> 1))
    elements = np.zeros(arrays[0].shape, np.int64)
    for place, code in enumerate(codes[1:]):
        elements += code.astype(np.int64) << (_BITS * place)
    is_element = (elements < number) & (_code(elements, -1) == codes[0])
    return elements if is_element.all() else None


def _sign(place: int) -> float:
    return 1.0 if place < 0 else -1.0


def _code(elements: np.ndarray, place: int) -> np.ndarray:
    """The digit at a place of the elements' numbers, or for -1 their check sum."""
    if place >= 0:
        return (elements >> (_BITS * place)).astype(np.uint32) & _MASK
    low, high = elements.astype(np.uint32), (elements >> _BITS).astype(np.uint32)
    return _shuffled((low ^ _shuffled(high & _MASK)) & _MASK)


# Without order, so that neither a sort nor a mean of neighbors gives the tags of other elements.
_FACTORS = (0x2C1B3D, 0x17385B)
_INVERSES = tuple(pow(factor, -1, 2**_BITS) for factor in reversed(_FACTORS))


def _shuffled(codes: np.ndarray) -> np.ndarray:
    return _stirred(codes, _FACTORS)


def _unshuffled(codes: np.ndarray) -> np.ndarray:
    return _stirred(codes, _INVERSES)


def _stirred(codes: np.ndarray, factors: tuple[int, ...]) -> np.ndarray:
    """A one-to-one map of codes; the inverse has the inverse factors in the opposite order."""
    for factor in factors:
        with np.errstate(over="ignore"):  # the bits above the lowest 22 do not count
            codes = ((codes ^ (codes >> np.uint32(_BITS // 2))) * np.uint32(factor)) & _MASK
    mixed: np.ndarray = codes ^ (codes >> np.uint32(_BITS // 2))
    return mixed
