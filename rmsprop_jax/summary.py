"""What looks wrong with the optimizer? The statistics of an update as a table, with remarks in words.

Read from the top down: the limits; the table; the function that makes it; its rows; its remarks.
"""

import dataclasses
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import diagnostics, figures
from rmsprop_jax.codes import decoded, is_encoded
from rmsprop_jax.state import RMSPropState

__all__ = ["Summary", "summarize"]

# Beyond these limits there is a remark. For comparison: over the 15 epochs of the digits example, the recorded
# update_ratio is at most 0.022 and the surprise at least 0.37, centered or not.
_LIMITS = {
    "update_ratio": 0.1,  # above it, an update replaces parameters rather than improving them
    "eps_share": 0.5,  # above it, most steps of the elements that were ever updated are lr · g/eps
    "surprise": 0.3,  # below it, the average remembers gradients several times as large as the current ones
    "centered_step": 100,  # above it, in units of lr, a step explodes; that of the first update is 1/√(1 − alpha)
    "squares_at_bottom": 0.02,  # above it, too many elements are held as if their gradients were larger
    "signed_at_bottom": 0.3,  # above it, too many averages are as coarse as the smallest codes
    "vanished": 0.5,  # above it, too large a share of the averages is 0 where the gradient is not
}

_COLUMNS = (
    "parameter",
    "shape",
    "count",
    "state",
    "bytes",
    "grad rms",
    "update/param",
    "effective lr [5–95 %]",
    "√v < eps",
    "surprise",
    "non-finite",
    "never updated",
)


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """What :func:`summarize` returns. It prints as aligned text and shows as a table in Jupyter.

    Attributes:
      statistics: those of :func:`rmsprop_jax.diagnostics.statistics`, as Python floats.
      rows: the cells of the table, a row per leaf and one for the total.
      remarks: what looks wrong, in words; empty if nothing does.
    """

    statistics: Mapping[str, float]
    rows: Sequence[Sequence[str]]
    remarks: Sequence[str]

    def __repr__(self) -> str:
        """The table as aligned text, and the remarks below it."""
        widths = [max(map(len, column)) for column in zip(_COLUMNS, *self.rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            name, *rest = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
            return "  ".join([name.strip().ljust(widths[0]), *rest])

        rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
        *leaves, total = map(line, self.rows)
        return "\n".join([line(_COLUMNS), rule, *leaves, rule, total, *(f"! {remark}" for remark in self.remarks)])

    def _repr_html_(self) -> str:
        def row(tag: str, cells: Sequence[str], style: str = "") -> str:
            first, *rest = (html.escape(cell) for cell in cells)
            numbers = "".join(f'<{tag} style="text-align: right">{cell}</{tag}>' for cell in rest)
            return f'<tr{style}><th style="text-align: left">{first}</th>{numbers}</tr>'

        *leaves, total = self.rows
        bold = ' style="font-weight: bold; border-top: 1px solid"'
        body = "".join([*(row("td", cells) for cells in leaves), row("td", total, bold)])
        remarks = "".join(f"<li>{html.escape(remark)}</li>" for remark in self.remarks)
        table = f"<table><thead>{row('th', _COLUMNS)}</thead><tbody>{body}</tbody></table>"
        return table + (f"<ul>{remarks}</ul>" if remarks else "")


def summarize(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    updates: optax.Updates,
    opt_state: optax.OptState,
    params: optax.Params,
) -> Summary:
    """The statistics of an update as a table, with a remark in words on everything that looks wrong.

    A row per leaf and one for the total show shape, number of parameters, dtype and bytes of the state, and the
    :func:`rmsprop_jax.diagnostics.statistics`, with "–" for what does not exist. The limits of the remarks stand above
    :class:`Summary` in the source:

    - not finite: a gradient, an update or a parameter is infinite or NaN.
    - learning rate too high: in total, an update is more than a tenth of the parameters. (Parameters that
      all start from 0 get this remark in their first updates, even in runs that work: the first update moves every
      element by lr/√(1 − alpha).)
    - eps too large: √v < eps for more than half of the elements that were ever updated, so RMSProp is little else
      than gradient descent with a learning rate of lr/eps.
    - average stalled: the state is narrower than float32, and either the gradients are far below the average that
      should have followed them, or the average is 0 where they are not. (An average with a long memory may lag behind
      without rounding. One that stalled shows the same effective learning rates in a later table.)
    - 8 bits too few: in some leaves, over 2 % of the squares have the smallest code, which holds them as if their
      gradients were larger, or over 30 % of the codes with a sign are among the 15 smallest.
    - centered step exploding: a gradient that hardly varies is divided by its vanishing deviation, or by eps alone,
      and steps are over a hundred times lr.

    Args:
      tx: as in :func:`rmsprop_jax.diagnostics.statistics`, like all other arguments.
      grads: the gradients that RMSProp was given.
      updates: the updates that came out.
      opt_state: the state *after* the update.
      params: the parameters *before* the update.

    Returns:
      A :class:`Summary`. It needs values, so it does not work inside ``jit``, where ``statistics`` does.

    Raises:
      ValueError: as :func:`rmsprop_jax.diagnostics.statistics`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import rmsprop
      >>> from rmsprop_jax.summary import summarize
      >>> optimizer = rmsprop(lr=3.0, alpha=0.75)
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> grads = {"w": jnp.array([-0.2, 0.0])}
      >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
      >>> print(*summarize(optimizer, grads, updates, state, params).remarks)
      learning rate too high: one update is 120% of the parameters (0.1% is usual, 10% the limit); lower lr
    """
    leaves = diagnostics.leaves_after(tx, grads, updates, opt_state, params)
    found = {name: float(x) for name, x in jax.device_get(figures.by_key(leaves)).items()}
    rows = [_row(name, [leaf], found) for name, leaf in leaves.items()]
    rows.append(_row(figures.TOTAL, [leaf for leaf in leaves.values() if leaf.state is not None], found))
    return Summary(found, rows, tuple(_remarks(leaves, found)))


def _row(name: str, leaves: Sequence[figures.LeafUpdate], found: Mapping[str, float]) -> list[str]:
    states = [leaf.state[1:] for leaf in leaves if leaf.state is not None]
    slots: list[Any]
    slots, arrays = jax.tree.leaves(states, is_leaf=is_encoded), jax.tree.leaves(states)

    def show(statistic: str, style: str = ".2g") -> str:
        value = found.get(f"{name}/{statistic}")
        return "–" if value is None else format(value, style)

    middle = f"{show('lr_50')} [{show('lr_5')}–{show('lr_95')}]" if f"{name}/lr_50" in found else "–"
    return [
        name,
        "×".join(map(str, np.shape(leaves[0].p))) if name != figures.TOTAL else "",
        f"{sum(np.size(leaf.p) for leaf in leaves):,}",
        ", ".join(sorted({getattr(slot, "codes", slot).dtype.name for slot in slots})) or "–",
        _bytes(sum(array.nbytes for array in arrays)) if arrays else "–",
        show("grad_rms"),
        show("update_ratio"),
        middle,
        show("eps_share", ".1%"),
        show("surprise"),
        show("nonfinite", ".1%"),
        show("never_updated", ".1%"),
    ]


def _bytes(number: float) -> str:
    units = ["B", "KiB", "MiB", "GiB"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        units.pop(0)
    return f"{number:.3g} {units[0]}"


def _remarks(leaves: Mapping[str, figures.LeafUpdate], found: Mapping[str, float]) -> Iterator[str]:
    """What looks wrong. A root cause suppresses the remarks that it explains. Comparisons with NaN are false."""

    def eps_rules(name: str) -> bool:
        below, never = found[f"{name}/eps_share"], found[f"{name}/never_updated"]
        return below - never > _LIMITS["eps_share"] * (1 - never)  # v = 0 is below eps too, but does no harm

    def are_replaced(name: str) -> bool:
        return _LIMITS["update_ratio"] < found[f"{name}/update_ratio"] < math.inf  # infinite if they start from 0

    broken = [name for name in leaves if found[f"{name}/nonfinite"] > 0]
    if broken:
        yield (
            f"not finite: there is infinity or NaN in {_listed(broken)}; look for the first update with it, or keep "
            "such gradients out with optax.apply_if_finite"
        )
    states = {name: leaf.state for name, leaf in leaves.items() if leaf.state is not None}
    centered = [name for name, state in states.items() if state.grad_avg is not None]
    exploding = [name for name in centered if _relative_step(leaves[name]) > _LIMITS["centered_step"]]
    stalled = [name for name in states if _is_stalled(states[name], leaves[name].g, found[f"{name}/surprise"])]
    if exploding:
        yield (
            f"centered step exploding: in {_listed(exploding)} the gradient hardly varies and is divided by next to "
            f"nothing, so that steps are over {_LIMITS['centered_step']:g} · lr; set centered=False, or raise eps"
        )
    elif stalled:
        yield (
            f"average stalled: in {_listed(stalled)} the state is stored in {states[stalled[0]].square_avg.dtype}, "
            "which rounds small changes away, and is far from the gradient's square; leave accumulator_dtype out"
        )
    else:
        if eps_rules(figures.TOTAL):
            yield (
                f"eps too large: √v < eps for {found['total/eps_share']:.0%} of the elements, so RMSProp is not much "
                "else than gradient descent with a learning rate of lr/eps; lower eps"
            )
        if are_replaced(figures.TOTAL):
            yield (
                f"learning rate too high: one update is {found['total/update_ratio']:.0%} of the parameters "
                f"(0.1% is usual, {_LIMITS['update_ratio']:.0%} the limit); lower lr"
            )
        yield from _too_few_bits(leaves, found)


def _too_few_bits(leaves: Mapping[str, figures.LeafUpdate], found: Mapping[str, float]) -> Iterator[str]:
    def beyond(figure: str) -> list[str]:
        return [name for name in leaves if found.get(f"{name}/{figure}", 0.0) > _LIMITS[figure]]

    squares, signed = beyond("squares_at_bottom"), beyond("signed_at_bottom")
    if squares:
        yield (
            f"8 bits too few: in {_listed(squares)} over {_LIMITS['squares_at_bottom']:.0%} of the squares have the "
            "smallest code. Their gradients are at least 60,000 times smaller than the largest of their row, so they "
            "take smaller steps than they should; use bits=16"
        )
    if signed:
        yield (
            f"8 bits too few: in {_listed(signed)} over {_LIMITS['signed_at_bottom']:.0%} of the codes with a sign are "
            "among the 15 smallest, which are coarse; use bits=16"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _relative_step(leaf: figures.LeafUpdate) -> jax.Array:
    """``rms(g / denominator)``: the step without momentum, in units of lr; 0/0 counts as 0."""
    if leaf.state is None or leaf.g is None:
        return jnp.zeros(())
    denom = figures.denominator_of_array(figures.real(decoded(leaf.state.square_avg)), leaf.eps)
    g = figures.real(leaf.g).astype(denom.dtype)
    return jnp.asarray(figures.norm(g / jnp.where(g == 0, 1.0, denom)) / math.sqrt(max(1, denom.size)))


def _is_stalled(state: RMSPropState, g: Any, surprise: float) -> bool:
    if g is None or jnp.finfo(state.square_avg.dtype).bits >= 32:
        return False
    v, g = figures.real(state.square_avg), figures.real(g)
    return surprise < _LIMITS["surprise"] or bool(jnp.mean((v == 0) & (g != 0)) > _LIMITS["vanished"])
