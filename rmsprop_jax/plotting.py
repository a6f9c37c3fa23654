"""What is the optimizer doing, in pictures? The statistics of ``diagnostics`` and whole runs, with matplotlib.

====================================  ===============================================================
function                              shows
====================================  ===============================================================
:func:`effective_learning_rate`       how large the steps per unit of gradient are, over a run
:func:`update_ratio`                  how large the updates are beside the parameters, leaf by leaf
:func:`denominator`                   where the denominators lie, and how many of them are really eps
:func:`trajectory`                    the paths that optimizers take over a loss of two parameters
:func:`dialect_fan`                   one setting in every dialect, and how far apart the runs end
:func:`sweep`                         what every pair of two hyperparameters led to
====================================  ===============================================================

Each draws into ``ax`` and returns it, with the data as NumPy or JAX arrays. ``ax=None`` makes a new figure with
``pyplot.subplots``, so that a notebook shows it once, at the end of the cell, and ``plt.show`` and ``plt.savefig``
find it in a script. Like every figure of pyplot it stays in memory until ``plt.close``: in a loop, pass ``ax``.
With ``ax`` pyplot is not touched. Labels stand to the right of the axes or below them; ``layout="constrained"`` makes
room for them. No call changes ``rcParams`` or the backend.

What is not finite is shown: a curve that stops being finite ends in a cross, a cell of a sweep is hatched. The
colors are those of Okabe and Ito, and cividis, which color-blind readers can tell apart.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from rmsprop_jax import diagnostics

try:
    from matplotlib import pyplot as plt
    from matplotlib import ticker
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm, Normalize, to_rgb
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.transforms import offset_copy
except ModuleNotFoundError as error:
    raise ImportError("rmsprop_jax.plotting needs matplotlib: pip install matplotlib") from error

__all__ = [
    "denominator",
    "dialect_fan",
    "effective_learning_rate",
    "sweep",
    "trajectory",
    "update_ratio",
]

History: TypeAlias = Mapping[str, ArrayLike] | Sequence[Mapping[str, ArrayLike]]

# Okabe and Ito's colors, without the yellow, which is lost on white. After seven curves, the dashes change.
_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":")
_GRAY = "#767676"
_LINE_HEIGHT = 1.25  # of text, in units of its size
_ALARM = _COLORS[2]

_HATCHED: dict[str, Any] = {"facecolor": "0.92", "edgecolor": "0.7", "hatch": "////"}

_RULE_OF_THUMB = 1e-3
_RULE_STYLE: dict[str, Any] = {"color": _GRAY, "linewidth": 1.2, "linestyle": (0, (4, 3)), "zorder": 1}
_RATIO = "rms(update) / rms(parameter)"


# --- Statistics ------------------------------------------------------------------------------------------


def effective_learning_rate(
    history: History, leaf: str = "total", *, steps: ArrayLike | None = None, ax: Axes | None = None
) -> Axes:
    """Draws the effective learning rate ``lr / denominator`` over a run: its median and the middle 90 % of elements.

    Args:
      history: what :func:`rmsprop_jax.diagnostics.statistics` returned, record after record: a sequence of its dicts,
        or one dict of arrays ``(records,)``, as ``jax.lax.scan`` stacks them.
      leaf: path of the leaf, such as ``conv1/kernel``; ``total`` is all elements together.
      steps: the step of each record, ``(records,)``; ``None`` numbers the records from 0.
      ax: where to draw; ``None`` makes a new figure.

    Returns:
      The Axes, its vertical axis logarithmic.

    Raises:
      ValueError: if there is no such leaf, or shapes do not fit.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import matplotlib.pyplot as plt
      >>> from rmsprop_jax import plotting
      >>> history = {"total/lr_5": [0.01, 0.02], "total/lr_50": [0.1, 0.3], "total/lr_95": [1.0, 1.0]}
      >>> ax = plotting.effective_learning_rate(history, steps=[1, 11])
      >>> print(ax.get_ylabel(), ax.get_yscale(), *(text.get_text() for text in ax.texts), sep=" | ")
      effective learning rate, lr / denominator | log | 5 % | median | 95 %
      >>> plt.close()
    """
    records = _by_key(history)
    columns = {f"{leaf}/{name}": _column(records, leaf, name) for name in ("lr_5", "lr_50", "lr_95")}
    x, x_label = _check_steps(steps, _length("history", columns))
    low, median, high = columns.values()
    ax = _axes(ax)
    ax.set(title=leaf, xlabel=x_label, ylabel="effective learning rate, lr / denominator", yscale="log")
    is_band = np.isfinite(low) & np.isfinite(high) & (low > 0)
    ax.fill_between(x, low, high, where=is_band, color=_COLORS[1], alpha=0.15, linewidth=0)
    curves = (("5 %", low, 0.8), ("median", median, 2.0), ("95 %", high, 0.8))
    _name_ends(ax, [_draw_curve(ax, name, x, y, color=_COLORS[1], linewidth=width) for name, y, width in curves])
    return ax


def update_ratio(
    history: History,
    *,
    leaves: Sequence[str] | None = None,
    steps: ArrayLike | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the ratio ``rms(update) / rms(parameter)`` of each leaf, beside a line at 1e-3.

    That is a rule of thumb for a network that trains well: far below it a leaf hardly moves, far above it every step
    rewrites a good part of the leaf.

    Args:
      history: over a run, as for :func:`effective_learning_rate`: a curve for each leaf. Or one dict of scalars, from
        a single call of :func:`rmsprop_jax.diagnostics.statistics`: a row for each leaf.
      leaves: paths of the leaves to show; ``None`` shows all.
      steps: the step of each record, ``(records,)``; ``None`` numbers the records from 0.
      ax: where to draw; ``None`` makes a new figure.

    Returns:
      The Axes, its axis of ratios logarithmic. In a row, a ratio that has no place there (0, ``inf`` or ``nan``) is
      written out.

    Raises:
      ValueError: if there is no such leaf, more of them than can be told apart, or shapes do not fit.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import matplotlib.pyplot as plt
      >>> from rmsprop_jax import plotting
      >>> ax = plotting.update_ratio({"dense/kernel/update_ratio": 2e-3, "dense/bias/update_ratio": 0.0})
      >>> print(ax.get_xlabel(), *(label.get_text() for label in ax.get_yticklabels()), sep=" | ")
      rms(update) / rms(parameter) | dense/kernel | dense/bias
      >>> plt.close()

    Source:
      A. Karpathy and others, notes of Stanford's CS231n, "Neural Networks Part 3", "Ratio of weights:updates".
    """
    records = _by_key(history)
    chosen = _check_leaves(leaves, [leaf for leaf in _leaves(records, "update_ratio") if leaf != "total"])
    if isinstance(history, Mapping) and np.ndim(records.get(f"{chosen[0]}/update_ratio", 0)) == 0:
        if steps is not None:
            raise ValueError(f"steps must be None for the statistics of a single step, got {steps!r}")
        single = {key: [value] for key, value in records.items()}
        return _ratio_rows({leaf: _column(single, leaf, "update_ratio")[0] for leaf in chosen}, ax)

    ratios = {leaf: _column(records, leaf, "update_ratio") for leaf in chosen}
    _check_can_be_told_apart("leaves", ratios, "choose some of them, or draw the statistics of a single step")
    x, x_label = _check_steps(steps, _length("history", ratios))
    ax = _axes(ax, _height(1 + len(ratios)))
    ax.set(xlabel=x_label, ylabel=_RATIO, yscale="log")
    ends = [_draw_curve(ax, leaf, x, ratio, **_style(i)) for i, (leaf, ratio) in enumerate(ratios.items())]
    ax.axhline(_RULE_OF_THUMB, **_RULE_STYLE)
    _name_ends(ax, [*ends, _End("1e-3", _GRAY, (x[-1], _RULE_OF_THUMB))])
    return ax


def _ratio_rows(ratios: Mapping[str, float], ax: Axes | None) -> Axes:
    """The ratios of one step: a row for each leaf, the first one on top."""
    ax = _axes(ax, _height(1.5 * len(ratios), least=1.0))
    ax.set(xlabel=_RATIO, xscale="log", ylim=(len(ratios) - 0.5, -0.5))
    ax.set_yticks(range(len(ratios)), list(ratios))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", color="0.9")
    ax.axvline(_RULE_OF_THUMB, **_RULE_STYLE)
    above = ("data", "axes fraction")
    ax.annotate("1e-3", (_RULE_OF_THUMB, 1), (0, 3), above, "offset points", color=_GRAY, ha="center")
    for row, ratio in enumerate(ratios.values()):
        if np.isfinite(ratio) and ratio > 0:
            ax.plot(ratio, row, "o", color=_COLORS[1])
        else:
            beside = ("axes fraction", "data")
            ax.annotate(f"{ratio:g}", (1, row), (5, 0), beside, "offset points", color=_ALARM, va="center")
    return ax


def denominator(
    tx: optax.GradientTransformation, opt_state: optax.OptState, params: optax.Params, *, ax: Axes | None = None
) -> Axes:
    """Draws a histogram of what RMSProp divides by, ``√v + eps`` or ``√(v + eps)``, with ``eps`` marked in it.

    No denominator is smaller than the mark; those close to it are little else than ``eps``.

    Args:
      tx: the transformation, which knows its eps. Where that is under the root, the mark stands at ``√eps``.
      opt_state: a state that contains an :class:`rmsprop_jax.RMSPropState`; all its elements are counted.
      params: the parameters.
      ax: where to draw; ``None`` makes a new figure.

    Returns:
      The Axes, its horizontal axis logarithmic. Denominators that have no place there, 0 and those that are not
      finite, are counted in the text beside the mark.

    Raises:
      ValueError, TypeError: as :func:`rmsprop_jax.diagnostics.denominator`; also if there are no elements, or
        groups of parameters have different eps.

    Example:
      >>> import jax.numpy as jnp
      >>> import matplotlib.pyplot as plt
      >>> from rmsprop_jax import plotting, rmsprop
      >>> optimizer = rmsprop(eps=1e-3)
      >>> params = jnp.zeros(4)
      >>> _, state = optimizer.update(jnp.array([0.0, 1e-3, 1.0, 2.0]), optimizer.init(params))
      >>> ax = plotting.denominator(optimizer, state, params)
      >>> print(ax.texts[0].get_text())
      eps = 0.001
      exceeds √v in 50 % of elements
      >>> plt.close()
    """
    tree = diagnostics.denominator(tx, opt_state, params)
    values = np.concatenate([np.empty(0), *(_real_parts(leaf) for leaf in jax.tree.leaves(tree))])
    if not values.size:
        raise ValueError("opt_state must have elements to count, got a state of no parameters")
    found = {(float(x.eps), x.eps_in_sqrt) for x in diagnostics.settings(tx, opt_state, params).values()}
    if len(found) > 1:
        raise ValueError(f"tx must have one eps for all parameters, got {sorted(found)}; draw one group at a time")
    ((number, eps_in_sqrt),) = found
    shown = values[np.isfinite(values) & (values > 0)]
    power = 0.5 if eps_in_sqrt else 1.0
    mark = float(number) ** power

    ax = _axes(ax)
    ax.set_xscale("log")
    edges = _histogram_edges(np.append(shown, mark))
    ax.stairs(np.histogram(shown, edges)[0] * (100 / values.size), edges, fill=True, color=_COLORS[1])
    ax.set_ylim(0, 1.35 * ax.dataLim.y1 or 1)  # room for the text
    text = []
    if mark > 0:
        ax.axvline(mark, color=_ALARM, linewidth=1.5)
        share = 100 * np.mean(values < 2**power * mark)
        text = [f"eps = {number:g}", f"exceeds {'v' if eps_in_sqrt else '√v'} in {share:.3g} % of elements"]
    if shown.size < values.size:
        text.append(f"{values.size - shown.size:,} of {values.size:,} are 0 or not finite")
    on_the_left = mark**2 <= edges[0] * edges[-1]
    ax.annotate(
        "\n".join(text),
        (mark if mark > 0 else edges[0], 1),
        (6 if on_the_left else -6, -2),
        ("data", "axes fraction"),
        "offset points",
        color=_ALARM,
        ha="left" if on_the_left else "right",
        va="top",
    )
    formula = "√(v + eps)" if eps_in_sqrt else "√v + eps"
    ax.set(xlabel=f"denominator {formula} (unit of the gradient)", ylabel="share of elements (%)")
    return ax


def _histogram_edges(values: np.ndarray) -> np.ndarray:
    """The edges of 60 bins of one width on a logarithmic axis, over all positive ``values``."""
    positive = values[values > 0] if (values > 0).any() else np.ones(1)
    low, high = positive.min(), positive.max()
    return np.geomspace(low, high, 61) if high > 2 * low else np.geomspace(low / 2, 2 * high, 61)


def _real_parts(leaf: ArrayLike) -> np.ndarray:
    """The elements of an array, those of a complex one as two each."""
    flat = np.ravel(np.asarray(leaf))
    real = np.concatenate([flat.real, flat.imag]) if np.iscomplexobj(flat) else flat
    return real.astype(np.float64)


# --- Whole runs ------------------------------------------------------------------------------------------


def trajectory(
    loss: Callable[[jax.Array], ArrayLike],
    paths: Mapping[str, ArrayLike],
    *,
    x_limits: tuple[float, float] | None = None,
    y_limits: tuple[float, float] | None = None,
    x_label: str = "params[0]",
    y_label: str = "params[1]",
    ax: Axes | None = None,
) -> Axes:
    """Draws paths over the contours of a loss of two parameters; a ring is where one starts, a dot where it ends.

    Args:
      loss: the loss as a function of an array ``(2,)``, made of JAX operations.
      paths: the parameters after each step, ``(steps + 1, 2)``, under the name of the run.
      x_limits: lowest and highest first parameter in the picture; ``None``: such that all paths are in it
        (so give it if one of them runs away).
      y_limits: the same for the second parameter.
      x_label: of the first parameter.
      y_label: of the second parameter.
      ax: where to draw; ``None`` makes a new figure.

    Returns:
      The Axes; the scale of the loss beside it is logarithmic where the loss is positive and spans decades.

    Raises:
      ValueError: if a path is not ``(steps + 1, 2)`` or starts at no finite point, the loss is not a scalar or
        nowhere finite, or limits are not in order.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> import matplotlib.pyplot as plt
      >>> from rmsprop_jax import plotting
      >>> def valley(params):
      ...     return params[0] ** 2 + 100 * params[1] ** 2
      >>> path = jnp.array([[3.0, 1.0], [2.0, 0.1], [0.5, 0.0]])
      >>> ax = plotting.trajectory(valley, {"rmsprop": path})
      >>> print(*(text.get_text() for text in ax.get_legend().get_texts()))
      rmsprop
      >>> plt.close()
    """
    if not callable(loss):
        raise TypeError(f"loss must be a function of an array of shape (2,), got {type(loss).__name__}")
    points = {name: _check_path(f"paths[{name!r}]", path) for name, path in _check_mapping("paths", paths).items()}
    _check_can_be_told_apart("paths", points, "draw some of them")
    everywhere = np.concatenate(list(points.values()))
    x_range = _check_limits("x_limits", x_limits, everywhere[:, 0])
    y_range = _check_limits("y_limits", y_limits, everywhere[:, 1])

    x, y = np.linspace(*x_range, 201), np.linspace(*y_range, 201)
    losses = _losses(loss, x, y)

    ax = _axes(ax)
    _draw_contours(ax, x, y, losses)
    handles: list[Any] = []
    for i, (name, path) in enumerate(points.items()):
        style = _style(i)
        last = np.flatnonzero(np.isfinite(path).all(axis=1))[-1]
        is_whole = last == len(path) - 1
        label = name if is_whole else f"{name} (not finite after {last})"
        handles += ax.plot(*path[: last + 1].T, label=label, linewidth=1.8, **style)
        ax.plot(*path[0], "o", color=style["color"], markerfacecolor="white", zorder=3)
        ax.plot(*path[last], "o" if is_whole else "X", color=style["color"], markersize=6 if is_whole else 9, zorder=3)
    if losses.mask.any():
        handles.append(Patch(**_HATCHED, label="loss not finite"))
    ax.set(xlim=x_range, ylim=y_range, xlabel=x_label, ylabel=y_label)
    _legend_below(ax, handles)
    return ax


def _losses(loss: Callable[[jax.Array], ArrayLike], x: np.ndarray, y: np.ndarray) -> np.ma.MaskedArray:
    """The loss of each pair, ``(len(y), len(x))``, masked where it is not finite."""
    pairs = jnp.asarray(np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2), jnp.result_type(float))
    losses = np.asarray(jax.vmap(loss)(pairs), np.float64)
    if losses.shape != pairs.shape[:1]:
        raise ValueError(f"loss must return a scalar for an array of shape (2,), got shape {losses.shape[1:]}")
    if not np.isfinite(losses).any():
        raise ValueError("loss must be finite somewhere in the picture, got none that is; set x_limits and y_limits")
    losses = losses.reshape(len(y), len(x))
    return np.ma.MaskedArray(losses, ~np.isfinite(losses))


def _draw_contours(ax: Axes, x: np.ndarray, y: np.ndarray, losses: np.ma.MaskedArray) -> None:
    """In gray, so that the colors are left for the paths."""
    finite = losses.compressed()
    if _scale(finite) == "log":
        # From a quantile on, since at a minimum of 0 the logarithm goes down for ever.
        low, high = np.quantile(finite[finite > 0], 0.005), finite.max()
        levels, norm, ticks = np.geomspace(low, high, 15), LogNorm(low, high), ticker.LogLocator()
        filled = ax.contourf(x, y, np.ma.maximum(losses, low), levels, norm=norm, cmap="Greys", alpha=0.4)
        bar = ax.figure.colorbar(filled, ax=ax, label="loss", ticks=ticks, format=ticker.LogFormatterSciNotation())
    else:
        filled = ax.contourf(x, y, losses, 14, cmap="Greys", alpha=0.4)
        bar = ax.figure.colorbar(filled, ax=ax, label="loss", ticks=ticker.MaxNLocator(6))
    bar.minorticks_off()
    if losses.mask.any():
        gaps = ax.contourf(x, y, losses.mask, [0.5, 1.5], colors=_HATCHED["facecolor"], hatches=[_HATCHED["hatch"]])
        gaps.set(edgecolor=_HATCHED["edgecolor"], linewidth=0)


def dialect_fan(
    curves: Mapping[str, ArrayLike], *, steps: ArrayLike | None = None, y_label: str = "loss", ax: Axes | None = None
) -> Axes:
    r"""Draws one setting in every dialect: a curve for each, with its name at its end.

    Curves that the eye could not tell apart, since they are nowhere further from each other than the width of a line,
    are drawn as one, with all their names.

    Args:
      curves: the values over the steps, ``(steps,)``, under the name of the dialect.
      steps: the step of each value, ``(steps,)``; ``None`` numbers them from 0.
      y_label: what the values are, with their unit.
      ax: where to draw; ``None`` makes a new figure.

    Returns:
      The Axes, its vertical axis logarithmic where the values are positive and span decades.

    Raises:
      ValueError: if curves are of different lengths, or more than can be told apart.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import matplotlib.pyplot as plt
      >>> from rmsprop_jax import plotting
      >>> curves = {"torch": [1.0, 0.1, 0.01], "keras": [1.0, 0.5, 0.4], "optax": [1.0, 0.5, 0.4]}
      >>> ax = plotting.dialect_fan(curves)
      >>> print([text.get_text() for text in ax.texts], ax.get_yscale())
      ['torch', 'keras\noptax'] log
      >>> plt.close()
    """
    values = {name: _numbers(f"curves[{name!r}]", x, 1) for name, x in _check_mapping("curves", curves).items()}
    x, _ = _check_steps(steps, _length("curves", values))
    scale = _scale(np.concatenate(list(values.values())))
    groups = _look_alikes(values, scale)
    _check_can_be_told_apart("curves", groups, "draw some of them")

    ax = _axes(ax, _height(len(values)))
    ax.set(xlabel="step", ylabel=y_label, yscale=scale)
    ends = [
        _draw_curve(ax, "\n".join(names), x, values[names[0]], linewidth=1.8, **_style(i))
        for i, names in enumerate(groups)
    ]
    _name_ends(ax, ends)
    return ax


def _look_alikes(values: Mapping[str, np.ndarray], scale: str) -> list[list[str]]:
    """The names, those of curves that lie on each other together."""
    with np.errstate(divide="ignore"):
        heights = {name: np.log(x) if scale == "log" else x for name, x in values.items()}
    everything = np.concatenate(list(heights.values()))
    finite = everything[np.isfinite(everything)]
    width = 0.005 * np.ptp(finite) if finite.size else 0.0
    groups: dict[str, list[str]] = {}  # by their first name
    for name, height in heights.items():
        alike = [first for first in groups if np.allclose(heights[first], height, 0, width, equal_nan=True)]
        groups.setdefault(alike[0] if alike else name, []).append(name)
    return list(groups.values())


def sweep(
    values: ArrayLike,
    x: ArrayLike,
    y: ArrayLike,
    *,
    x_label: str,
    y_label: str,
    value_label: str,
    maximize: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draws the results of a sweep over two hyperparameters as a heat map, and frames the best cell.

    Args:
      values: the result of each pair, ``(len(y), len(x))``.
      x: the values of the one hyperparameter, increasing.
      y: the values of the other, increasing.
      x_label: the name of the one.
      y_label: the name of the other.
      value_label: what the results are, with their unit.
      maximize: whether the highest value is the best, and not the lowest.
      ax: where to draw; ``None`` makes a new figure.

    Returns:
      The Axes; an axis is logarithmic where its hyperparameter is positive and spans decades. So are the colors; they
      then reach three decades from the best result, and what is worse has the last of them.

    Raises:
      ValueError: if shapes do not fit, or ``x`` or ``y`` does not increase.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> import matplotlib.pyplot as plt
      >>> from rmsprop_jax import plotting
      >>> losses = jnp.array([[0.7, 0.2, jnp.nan], [0.8, 0.4, 0.6]])
      >>> ax = plotting.sweep(
      ...     losses, [1e-3, 1e-2, 1e-1], [1e-8, 1e-4], x_label="lr", y_label="eps", value_label="loss"
      ... )
      >>> print(*(text.get_text() for text in ax.get_legend().get_texts()), sep=" | ")
      lowest: 0.2 at lr = 0.01, eps = 1e-08 | not finite
      >>> plt.close()
    """
    x, y, table = _check_increasing("x", x), _check_increasing("y", y), _numbers("values", values, 2)
    if table.shape != (len(y), len(x)):
        raise ValueError(f"values must have shape (len(y), len(x)) = {(len(y), len(x))}, got {table.shape}")
    ax = _axes(ax)
    (x_edges, x_scale), (y_edges, y_scale) = _cell_edges(x), _cell_edges(y)
    ax.set(xlabel=x_label, ylabel=y_label, xscale=x_scale, yscale=y_scale)
    cells = np.ma.masked_invalid(table)
    handles = []
    if cells.count():
        row, column = np.unravel_index(cells.argmax() if maximize else cells.argmin(), cells.shape)
        norm, extend = _colors(cells.compressed(), cells[row, column])
        color_map = "cividis" if maximize else "cividis_r"  # the best is the brightest
        mesh = ax.pcolormesh(x_edges, y_edges, cells, norm=norm, cmap=color_map)
        ax.figure.colorbar(mesh, ax=ax, label=value_label, extend=extend)
        best = f"{cells[row, column]:.3g} at {x_label} = {x[column]:.3g}, {y_label} = {y[row]:.3g}"
        (left, right), (bottom, top) = x_edges[column : column + 2], y_edges[row : row + 2]
        frame = Rectangle((left, bottom), right - left, top - bottom, fill=False, edgecolor=_ALARM, linewidth=2.5)
        frame.set(label=f"{'highest' if maximize else 'lowest'}: {best}", clip_on=False, zorder=3)
        handles.append(ax.add_patch(frame))
    if cells.count() < cells.size:
        ax.patch.set(**_HATCHED)  # shows through where there is no cell
        handles.append(Patch(**_HATCHED, label="not finite"))
    ax.set(xlim=x_edges[[0, -1]], ylim=y_edges[[0, -1]])
    _legend_below(ax, handles)
    return ax


def _colors(values: np.ndarray, best: float) -> tuple[Normalize, str]:
    """How values become colors, and at which end of the colors there are values beyond."""
    low, high = values.min(), values.max()
    if _scale(values) == "linear" or best == 0:
        return Normalize(low, high), "neither"
    # Runs that went astray may be decades from all others, for which no colors would be left.
    shown = max(low, best / 1e3), min(high, best * 1e3)
    return LogNorm(*shown, clip=True), "max" if shown[1] < high else "min" if low < shown[0] else "neither"


def _cell_edges(centers: np.ndarray) -> tuple[np.ndarray, str]:
    """Where the cells around ``centers`` meet, half-way as one sees it, and the scale of their axis."""
    scale = _scale(centers) if centers[0] > 0 else "linear"
    places = np.log(centers) if scale == "log" else centers
    half = np.diff(places) / 2 if len(places) > 1 else np.array([0.5])
    edges = np.concatenate([places[:1] - half[:1], places[:-1] + half[: len(places) - 1], places[-1:] + half[-1:]])
    return (np.exp(edges) if scale == "log" else edges), scale


# --- Curves, and their names -----------------------------------------------------------------------------


class _End(NamedTuple):
    """Where a curve ends, and what to write there; no place if nothing of it can be seen."""

    name: str
    color: str
    place: tuple[float, float] | None


def _draw_curve(ax: Axes, name: str, x: np.ndarray, values: np.ndarray, **style: Any) -> _End:
    """Draws what has a place on the scale of ``ax``, with a cross where a curve stops being finite."""
    is_finite = np.isfinite(values)
    is_visible = is_finite & ((values > 0) | (ax.get_yscale() == "linear"))
    if len(x) > 1:  # from end to end, also where nothing is finite
        ax.set_xlim(min(x[0], ax.dataLim.x0), max(x[-1], ax.dataLim.x1))
    ax.plot(x, np.where(is_visible, values, np.nan), marker="." if len(x) == 1 else None, **style)
    breaks = np.flatnonzero(is_finite[:-1] & ~is_finite[1:])
    if breaks.size:
        ax.plot(x[breaks], values[breaks], "X", color=style["color"], markersize=9, markeredgecolor="white", zorder=4)
    if not is_finite[-1]:
        name += f"\n(not finite after {x[breaks[-1]]:g})" if breaks.size else "\n(never finite)"
    elif not is_visible.any():
        name += "\n(never above 0)"
    place = (x[is_visible][-1], values[is_visible][-1]) if is_visible.any() else None
    return _End(name, style["color"], place)


def _style(i: int) -> dict[str, Any]:
    return {"color": _COLORS[i % len(_COLORS)], "linestyle": _DASHES[i // len(_COLORS)]}


def _name_ends(ax: Axes, ends: Sequence[_End]) -> None:
    """Writes names to the right of the axes, each at the height of its end or as close to that as there is room."""
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top)  # the names are placed for these limits
    points = ax.transData.transform([end.place or (0, bottom) for end in ends])
    line_height = _LINE_HEIGHT * plt.rcParams["font.size"] * ax.figure.dpi / 72 / ax.bbox.height
    heights = np.array([line_height * len(end.name.splitlines()) for end in ends])
    for end, height in zip(ends, _spread(ax.transAxes.inverted().transform(points)[:, 1], heights), strict=True):
        line = dict(arrowstyle="-", color=end.color, linewidth=0.8, shrinkA=1, shrinkB=0, relpos=(0, 0.5))
        ax.annotate(
            end.name,
            end.place or (1, 0),
            (1.035, height),
            "data" if end.place else "axes fraction",
            "axes fraction",
            line if end.place else None,
            annotation_clip=True,  # names nothing that was moved out of the picture
            color=_darker(end.color),
            va="center",
        )


def _darker(color: str) -> tuple[float, ...]:
    """``color`` as it is for letters, which are thinner than lines."""
    return tuple(0.75 * part for part in to_rgb(color))


def _spread(places: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """The centers in [0, 1] that are nearest to ``places``, in least squares, without overlaps and in their order.

    Stacked without gaps, the labels would stand at ``stacked``; how far each must rise from there may only increase
    from the lowest label to the highest. That is an isotonic regression, here by its min-max formula.
    """
    heights = heights / max(1.0, heights.sum())
    order = np.argsort(places, kind="stable")
    stacked = np.cumsum(heights[order]) - heights[order] / 2
    rise, count = places[order] - stacked, len(places)
    fitted = [max(min(rise[j : k + 1].mean() for k in range(i, count)) for j in range(i + 1)) for i in range(count)]
    spread = np.empty(count)
    spread[order] = stacked + np.clip(fitted, 0, 1 - heights.sum())
    return spread


def _legend_below(ax: Axes, handles: Sequence[Any]) -> None:
    """Below the label of the horizontal axis, where it hides nothing and leaves the title free."""
    place = offset_copy(ax.transAxes, ax.get_figure(root=True), y=-36, units="points")
    columns = 1 if any(len(handle.get_label()) > 24 for handle in handles) else 2
    ax.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=place,
        borderaxespad=0,
        borderpad=0,
        frameon=False,
        ncols=columns,
    )


# --- Axes and scales -------------------------------------------------------------------------------------


def _height(lines: float, least: float = 3.7) -> float:
    """The height in inches of a new figure in which so many lines of text find room."""
    return max(least, 0.9 + lines * _LINE_HEIGHT * float(plt.rcParams["font.size"]) / 72)


def _axes(ax: Axes | None, height: float = 3.7) -> Axes:
    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, height), layout="constrained")
    elif not isinstance(ax, Axes):
        raise TypeError(f"ax must be one matplotlib Axes or None, got {type(ax).__name__}")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _scale(values: np.ndarray) -> str:
    """``log`` for values ≥ 0 that span more than a decade and a half, else ``linear``."""
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    spans = positive.size and finite.min() >= 0 and positive.max() > 30 * positive.min()
    return "log" if spans else "linear"


# --- Checks of arguments ---------------------------------------------------------------------------------


def _numbers(name: str, value: Any, dimensions: int) -> np.ndarray:
    """``value`` as an array of float64, checked."""
    allowed = ("one real number", "real numbers in an array of 1 dimension", "real numbers in an array of 2 dimensions")
    try:
        # One by one, since NumPy cannot make an array of JAX scalars in bfloat16.
        array = np.asarray([np.asarray(x) for x in value] if isinstance(value, list | tuple) else value)
        if array.dtype.kind in "cOSUMm":
            raise TypeError(f"dtype {array.dtype}")
        array = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be {allowed[dimensions]}, got {type(value).__name__}: {error}") from error
    if array.ndim != dimensions or not array.size:
        raise ValueError(f"{name} must be {allowed[dimensions]}, and not empty, got shape {array.shape}")
    return array


def _check_increasing(name: str, value: Any) -> np.ndarray:
    array = _numbers(name, value, 1)
    if not (np.isfinite(array).all() and (np.diff(array) > 0).all()):
        raise ValueError(f"{name} must be finite, in increasing order, got {array}")
    return array


def _check_steps(steps: Any, count: int) -> tuple[np.ndarray, str]:
    """The steps and the label of their axis."""
    if steps is None:
        return np.arange(count, dtype=np.float64), "record"
    array = _check_increasing("steps", steps)
    if len(array) != count:
        raise ValueError(f"steps must have one entry for each of the {count} records, got {len(array)}")
    return array, "step"


def _by_key(history: Any) -> dict[str, Any]:
    """A history as one dict of what belongs to each key."""
    if isinstance(history, Mapping):
        return dict(history)
    records = list(history) if isinstance(history, Sequence) else []
    if not (records and all(isinstance(record, Mapping) for record in records)):
        raise TypeError(
            "history must be a dict of arrays, or a sequence of the dicts that diagnostics.statistics returns, got "
            f"{type(history).__name__}{'' if records else ' without entries'}"
        )
    for i, record in enumerate(records):
        if record.keys() != records[0].keys():
            difference = sorted(record.keys() ^ records[0].keys())
            raise ValueError(f"history must have the same keys everywhere, but history[{i}] differs in {difference}")
    return {key: [record[key] for record in records] for key in records[0]}


def _leaves(records: Mapping[str, Any], statistic: str) -> list[str]:
    return [key.removesuffix(f"/{statistic}") for key in records if key.endswith(f"/{statistic}")]


def _column(records: Mapping[str, Any], leaf: str, statistic: str) -> np.ndarray:
    """One statistic of one leaf over a run."""
    key = f"{leaf}/{statistic}"
    if key not in records:
        raise ValueError(f"history has no {key!r}; it has {statistic} for the leaves {_leaves(records, statistic)}")
    return _numbers(f"history[{key!r}]", records[key], 1)


def _length(name: str, columns: Mapping[str, np.ndarray]) -> int:
    """The length of all columns."""
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{name} must all have the same length, got {lengths}")
    return next(iter(lengths.values()))


def _check_leaves(leaves: Any, available: Sequence[str]) -> Sequence[str]:
    if isinstance(leaves, str):
        raise TypeError(f"leaves must be a sequence of paths or None, got {leaves!r}; did you mean [{leaves!r}]?")
    chosen = available if leaves is None else list(leaves)
    if not chosen:
        raise ValueError(f"leaves must be some of {list(available)}, got none")
    return chosen


def _check_mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not (isinstance(value, Mapping) and value):
        raise TypeError(f"{name} must be a dict from names to arrays, and not empty, got {value!r}")
    return value


def _check_can_be_told_apart(name: str, value: Sequence[Any] | Mapping[str, Any], advice: str) -> None:
    most = len(_COLORS) * len(_DASHES)
    if len(value) > most:
        raise ValueError(f"{name} must be at most {most} to be told apart, got {len(value)}; {advice}")


def _check_path(name: str, value: Any) -> np.ndarray:
    path = _numbers(name, value, 2)
    if path.shape[1] != 2:
        raise ValueError(f"{name} must have shape (steps + 1, 2), got {path.shape}")
    if not np.isfinite(path[0]).all():
        raise ValueError(f"{name} must start at a finite point, got {path[0]}")
    return path


def _check_limits(name: str, limits: Any, values: np.ndarray) -> tuple[float, float]:
    """``limits`` in order, or with some room around ``values``."""
    if limits is None:
        finite = values[np.isfinite(values)]
        room = 0.15 * np.ptp(finite) or 1.0
        return finite.min() - room, finite.max() + room
    ordered = _check_increasing(name, limits)
    if len(ordered) != 2:
        raise ValueError(f"{name} must be two numbers, got {len(ordered)}")
    low, high = ordered
    return float(low), float(high)
