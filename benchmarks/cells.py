"""The cells of the tables: what a figure looks like, and how rows become Markdown."""

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(ratio: dict[str, float] | None) -> str:
    """A median with its quartiles; a dash for what was not measured."""
    return f"**{ratio['median']:.2f}** ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "–"


def milliseconds(value: float) -> str:
    return f"{1e3 * value:.3g}"


def percent(value: float) -> str:
    """A fraction in percent, with a sign; two digits after the point while they say something."""
    return f"{100 * value:+.2f}" if abs(value) < 0.1 else f"{100 * value:+.0f}"
