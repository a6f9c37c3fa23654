"""The pictures: what is drawn in them, where, and what is left alone."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle, StepPatch
from matplotlib.text import Text

from rmsprop_jax import diagnostics, plotting, rmsprop, scale_by_rmsprop

NAN, INF = float("nan"), float("inf")

HISTORY = {
    "total/lr_5": [0.01, 0.02, 0.03],
    "total/lr_50": [0.1, 0.3, 0.2],
    "total/lr_95": [1.0, 2.0, 0.5],
    "total/update_ratio": [0.5, 0.5, 0.5],
    "conv/kernel/lr_5": [0.04, 0.05, 0.06],
    "conv/kernel/lr_50": [0.4, 0.5, 0.6],
    "conv/kernel/lr_95": [4.0, 5.0, 6.0],
    "conv/kernel/update_ratio": [2e-2, 3e-3, 4e-4],
    "bias/update_ratio": [1e-3, 2e-3, 5e-3],
}


def bowl(params: jax.Array) -> jax.Array:
    return params[0] ** 2 + 100 * params[1] ** 2


def with_average(square_avg: Any, **setting: Any) -> tuple[Any, Any, Any]:
    """A transformation, a state of it with this average, and parameters."""
    optimizer, params = scale_by_rmsprop(**setting), jnp.zeros_like(square_avg)
    return optimizer, optimizer.init(params)._replace(square_avg=jnp.asarray(square_avg)), params


# One call of each function, with whatever it needs.
CALLS: dict[str, Callable[..., Axes]] = {
    "effective_learning_rate": lambda **kwargs: plotting.effective_learning_rate(HISTORY, **kwargs),
    "update_ratio": lambda **kwargs: plotting.update_ratio(HISTORY, **kwargs),
    "update_ratio_rows": lambda **kwargs: plotting.update_ratio({"a/update_ratio": 0.1}, **kwargs),
    "denominator": lambda **kwargs: plotting.denominator(*with_average(np.array([1.0, 4.0])), **kwargs),
    "trajectory": lambda **kwargs: plotting.trajectory(bowl, {"run": np.array([[3.0, 1.0], [0.0, 0.0]])}, **kwargs),
    "dialect_fan": lambda **kwargs: plotting.dialect_fan({"torch": [3.0, 2.0], "keras": [3.0, 1.0]}, **kwargs),
    "sweep": lambda **kwargs: plotting.sweep(
        np.array([[1.0, 2.0], [3.0, NAN]]), [1, 2], [3, 4], x_label="a", y_label="b", value_label="c", **kwargs
    ),
}


@pytest.fixture(autouse=True)
def headless_and_without_figures() -> Iterator[None]:
    backend = matplotlib.get_backend()
    plt.switch_backend("agg")
    yield
    plt.close("all")
    plt.switch_backend(backend)


@pytest.fixture
def ax() -> Axes:
    return Figure(layout="constrained").subplots()


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def legend(ax: Axes) -> list[str]:
    found = ax.get_legend()
    assert found is not None
    return [text.get_text() for text in found.get_texts()]


def curves(ax: Axes) -> list[Line2D]:
    """The lines with a color of the palette; not what only marks a point or a rule."""
    return [line for line in ax.lines if line.get_linestyle() != "None" and line.get_color() != "#767676"]


def crosses(ax: Axes) -> list[tuple[float, float]]:
    return [tuple(point) for line in ax.lines if line.get_marker() == "X" for point in line.get_xydata()]


def only(ax: Axes, kind: type) -> Any:
    (found,) = (artist for artist in ax.get_children() if type(artist) is kind)
    return found


def by_leaf(ax: Axes) -> dict[str, list[float]]:
    names = [text for text in texts(ax) if text != "1e-3"]
    return {name: list(line.get_ydata()) for name, line in zip(names, curves(ax), strict=True)}


# --- What holds for all of them --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_given_axes_are_drawn_into_and_returned_without_pyplot(name: str, ax: Axes) -> None:
    before = len(ax.get_children())
    assert CALLS[name](ax=ax) is ax
    assert len(ax.get_children()) > before
    assert plt.get_fignums() == []


@pytest.mark.parametrize("name", CALLS)
def test_without_axes_one_new_figure_is_left_to_pyplot(name: str) -> None:
    other = plt.figure()
    ax = CALLS[name]()
    assert len(plt.get_fignums()) == 2
    assert plt.gcf() is ax.figure is not other
    assert not other.axes


@pytest.mark.parametrize("name", CALLS)
def test_everything_is_inside_a_new_figure(name: str) -> None:
    figure = CALLS[name]().get_figure(root=True)
    figure.draw_without_rendering()
    whole, drawn = figure.bbox_inches, figure.get_tightbbox()
    assert whole.x0 <= drawn.x0 < drawn.x1 <= whole.x1
    assert whole.y0 <= drawn.y0 < drawn.y1 <= whole.y1


@pytest.mark.parametrize("name", CALLS)
def test_nothing_global_is_changed(name: str) -> None:
    before = dict(matplotlib.rcParams)
    CALLS[name]()
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("name", CALLS)
def test_both_axes_are_labeled_and_the_picture_can_be_drawn(name: str, ax: Axes) -> None:
    CALLS[name](ax=ax)
    assert ax.get_xlabel()
    assert ax.get_ylabel() or name == "update_ratio_rows"  # whose rows have names
    assert not ax.spines["top"].get_visible()
    assert not ax.spines["right"].get_visible()
    ax.get_figure(root=True).draw_without_rendering()


@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_one_axes_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="ax must be one matplotlib Axes or None, got ndarray"):
        CALLS[name](ax=Figure().subplots(1, 2))


def test_without_matplotlib_the_error_names_what_to_install() -> None:
    program = "import sys; sys.modules['matplotlib'] = None; import rmsprop_jax.plotting"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ImportError: rmsprop_jax.plotting needs matplotlib: pip install matplotlib" in done.stderr


def test_pictures_need_no_display() -> None:
    program = "from rmsprop_jax.plotting import dialect_fan; dialect_fan({'a': [1, 2]}).figure.canvas.draw()"
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# --- The effective learning rate -------------------------------------------------------------------------


def test_quantiles_of_the_effective_learning_rate_are_drawn_over_the_steps(ax: Axes) -> None:
    plotting.effective_learning_rate(HISTORY, steps=[1, 11, 21], ax=ax)
    assert [list(line.get_ydata()) for line in curves(ax)] == [HISTORY[f"total/lr_{q}"] for q in (5, 50, 95)]
    assert all(list(line.get_xdata()) == [1, 11, 21] for line in curves(ax))
    assert texts(ax) == ["5 %", "median", "95 %"]
    assert (ax.get_xlabel(), ax.get_yscale(), ax.get_title(), ax.get_xlim()) == ("step", "log", "total", (1, 21))
    corners = np.concatenate([path.vertices for path in ax.collections[0].get_paths()])
    for q in (5, 95):  # the band lies between the outer two
        assert {*zip([1, 11, 21], HISTORY[f"total/lr_{q}"], strict=True)} <= {tuple(corner) for corner in corners}


def test_effective_learning_rate_is_that_of_the_leaf(ax: Axes) -> None:
    plotting.effective_learning_rate(HISTORY, "conv/kernel", ax=ax)
    assert list(curves(ax)[1].get_ydata()) == [0.4, 0.5, 0.6]
    assert (ax.get_title(), ax.get_xlabel()) == ("conv/kernel", "record")


def test_band_has_a_gap_where_a_quantile_is_not_finite(ax: Axes) -> None:
    history = HISTORY | {"total/lr_95": [1.0, 2.0, INF]}
    plotting.effective_learning_rate(history, ax=ax)
    assert max(path.vertices[:, 0].max() for path in ax.collections[0].get_paths()) == 1
    assert crosses(ax) == [(1, 2.0)]
    assert texts(ax) == ["5 %", "median", "95 %\n(not finite after 1)"]


@pytest.mark.parametrize("kind", ["numpy", "jax", "records", "bfloat16 records"])
def test_histories_of_every_kind_give_the_same_curves(kind: str, ax: Axes) -> None:
    history = {key: [0.5, 0.25, 0.125] for key in HISTORY}  # exact in bfloat16
    dtype = jnp.bfloat16 if "bfloat16" in kind else jnp.float32
    given: dict[str, Any] = {
        "numpy": {key: np.array(x, np.float64) for key, x in history.items()},
        "jax": {key: jnp.array(x) for key, x in history.items()},
    }
    records = [{key: jnp.asarray(x[i], dtype) for key, x in history.items()} for i in range(3)]
    plotting.effective_learning_rate(given.get(kind, records), ax=ax)
    assert all(list(line.get_ydata()) == [0.5, 0.25, 0.125] for line in curves(ax))


def test_unknown_leaf_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"no 'dense/lr_5'; it has lr_5 for the leaves \['total', 'conv/kernel'\]"):
        plotting.effective_learning_rate(HISTORY, "dense")


@pytest.mark.parametrize(
    ("history", "error", "message"),
    [
        ([], TypeError, "history must be a dict of arrays, or a sequence .* got list without entries"),
        (3.0, TypeError, "history must be a dict of arrays, or a sequence .* got float"),
        (
            [{"total/lr_5": 1.0}, {"total/lr_50": 1.0}],
            ValueError,
            r"history\[1\] differs in \['total/lr_5', 'total/lr_50'\]",
        ),
        (
            HISTORY | {"total/lr_5": 1.0},
            ValueError,
            r"history\['total/lr_5'\] must be real numbers .* 1 dim.* shape \(\)",
        ),
        (HISTORY | {"total/lr_5": [[1.0]]}, ValueError, r"1 dimension, and not empty, got shape \(1, 1\)"),
        (HISTORY | {"total/lr_5": []}, ValueError, r"not empty, got shape \(0,\)"),
        (HISTORY | {"total/lr_5": [1.0, 2.0]}, ValueError, "must all have the same length, got .*'total/lr_5': 2"),
        (HISTORY | {"total/lr_5": ["a", "b", "c"]}, TypeError, r"history\['total/lr_5'\] must be real numbers"),
        (HISTORY | {"total/lr_5": [1j, 2j, 3j]}, TypeError, r"history\['total/lr_5'\] must be real numbers"),
    ],
)
def test_unfit_history_is_refused(history: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plotting.effective_learning_rate(history)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("function", [plotting.effective_learning_rate, plotting.update_ratio])
@pytest.mark.parametrize(
    ("steps", "message"),
    [([1, 2], "steps must have one entry for each of the 3 records, got 2"), ([1, 3, 2], "steps must be .* increas")],
)
def test_unfit_steps_are_refused(function: Callable[..., Axes], steps: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(HISTORY, steps=steps)


# --- The update-to-parameter ratio -----------------------------------------------------------------------


def test_every_leaf_has_its_curve_and_total_has_none(ax: Axes) -> None:
    plotting.update_ratio(HISTORY, steps=[1, 11, 21], ax=ax)
    assert by_leaf(ax) == {leaf: HISTORY[f"{leaf}/update_ratio"] for leaf in ("conv/kernel", "bias")}
    assert len({line.get_color() for line in curves(ax)}) == 2
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("step", "rms(update) / rms(parameter)", "log")


def test_chosen_leaves_only_in_their_order(ax: Axes) -> None:
    plotting.update_ratio(HISTORY, leaves=["total", "conv/kernel"], ax=ax)
    assert list(by_leaf(ax)) == ["total", "conv/kernel"]


def test_rule_of_thumb_is_marked_at_one_thousandth(ax: Axes) -> None:
    plotting.update_ratio(HISTORY, ax=ax)
    (rule,) = (line for line in ax.lines if line.get_color() == "#767676")
    assert set(rule.get_ydata()) == {1e-3}
    assert texts(ax)[-1] == "1e-3"
    rows = plotting.update_ratio({"a/update_ratio": 0.1}, ax=Figure().subplots())
    assert set(rows.lines[0].get_xdata()) == {1e-3}
    assert texts(rows) == ["1e-3"]


def test_statistics_of_one_step_are_rows_with_the_first_leaf_on_top(ax: Axes) -> None:
    plotting.update_ratio({"a/update_ratio": jnp.float32(0.25), "a/lr_5": 1.0, "b/update_ratio": 0.5}, ax=ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in ax.lines if line.get_marker() == "o"] == [
        (0.25, 0),
        (0.5, 1),
    ]
    assert ax.get_ylim() == (1.5, -0.5)
    assert (ax.get_xscale(), ax.get_xlabel()) == ("log", "rms(update) / rms(parameter)")


def test_ratios_without_a_place_on_the_axis_are_written_in_their_rows(ax: Axes) -> None:
    plotting.update_ratio({f"{x}/update_ratio": x for x in (0.0, INF, NAN, 0.5)}, ax=ax)
    assert [(text.get_text(), text.xy[1]) for text in ax.texts[1:]] == [("0", 0), ("inf", 1), ("nan", 2)]


def test_a_picture_of_more_curves_than_can_be_told_apart_is_refused() -> None:
    history = {f"{i}/update_ratio": [1.0] for i in range(29)}
    with pytest.raises(ValueError, match="leaves must be at most 28 to be told apart, got 29; choose some of them"):
        plotting.update_ratio(history)
    styles = {
        (line.get_color(), line.get_linestyle())
        for line in curves(plotting.update_ratio(history, leaves=[*map(str, range(28))]))
    }
    assert len(styles) == 28


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            dict(leaves="bias"),
            TypeError,
            r"leaves must be a sequence of paths or None, got 'bias'; did you mean \['bias'\]",
        ),
        (
            dict(leaves=["bais"]),
            ValueError,
            r"no 'bais/update_ratio'; it has update_ratio for the leaves \['total', .*'bias'\]",
        ),
        (dict(leaves=[]), ValueError, r"leaves must be some of \['conv/kernel', 'bias'\], got none"),
    ],
)
def test_unfit_leaves_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plotting.update_ratio(HISTORY, **arguments)


def test_steps_of_a_single_step_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must be None for the statistics of a single step, got 3"):
        plotting.update_ratio({"a/update_ratio": 0.1}, steps=3)


def test_statistics_of_a_real_run_can_be_drawn_as_they_are() -> None:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), rmsprop(lr=0.1))
    params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    state, records = optimizer.init(params), []
    for _ in range(3):
        grads = jax.tree.map(lambda p: p, params)
        updates, state = optimizer.update(grads, state, params)
        records.append(diagnostics.statistics(optimizer, grads, updates, state, params))
        params = optax.apply_updates(params, updates)
    drawn = by_leaf(plotting.update_ratio(records))
    assert drawn == {
        leaf: [float(record[f"{leaf}/update_ratio"]) for record in records] for leaf in ("dense/bias", "dense/kernel")
    }
    ax = plotting.effective_learning_rate(records, "dense/kernel")
    assert list(curves(ax)[1].get_ydata()) == [float(record["dense/kernel/lr_50"]) for record in records]
    share = 100 * records[-1]["total/eps_share"]
    assert f"exceeds √v in {share:.3g} %" in texts(plotting.denominator(optimizer, state, params))[0]


def test_parts_of_a_divided_figure_can_be_drawn_into() -> None:
    upper, lower = Figure(layout="constrained").subfigures(2)
    plotting.update_ratio(HISTORY, ax=upper.subplots())
    plotting.sweep(np.ones((1, 2)), [1, 2], [3], **NAMES, ax=lower.subplots())
    assert [len(part.axes) for part in (upper, lower)] == [1, 2]  # the second with its colors


# --- The denominator -------------------------------------------------------------------------------------


def bars(ax: Axes) -> tuple[np.ndarray, np.ndarray]:
    values, edges, _ = only(ax, StepPatch).get_data()
    return values, edges


def marks(ax: Axes) -> list[float]:
    return [line.get_xdata()[0] for line in ax.lines]


def test_histogram_counts_every_element_in_its_bin(ax: Axes) -> None:
    square_avg = np.float32([1e-6, 1e-6, 1e-2, 1e2])  # roots 1e-3 twice, 0.1, 10
    plotting.denominator(*with_average(square_avg), ax=ax)
    percent, edges = bars(ax)
    expected, _ = np.histogram([1e-3, 1e-3, 0.1, 10], edges)
    np.testing.assert_array_equal(percent, 25 * expected)
    assert percent.sum() == 100
    assert ax.get_xscale() == "log"
    np.testing.assert_allclose(np.diff(np.log(edges)), np.log(10 / 1e-8) / 60, rtol=1e-6)


def test_eps_is_marked_where_it_limits_the_denominator(ax: Axes) -> None:
    plotting.denominator(*with_average(np.float32([0.0, 1e-8, 1.0, 4.0]), eps=1e-3), ax=ax)
    assert marks(ax) == [1e-3]
    assert texts(ax) == ["eps = 0.001\nexceeds √v in 50 % of elements"]
    assert "√v + eps" in ax.get_xlabel()


def test_eps_under_the_root_is_marked_at_its_root(ax: Axes) -> None:
    plotting.denominator(*with_average(np.float32([0.0, 1.5e-6, 0.5e-6, 4.0]), eps=1e-6, eps_in_sqrt=True), ax=ax)
    assert marks(ax) == [pytest.approx(1e-3)]
    assert texts(ax) == ["eps = 1e-06\nexceeds v in 50 % of elements"]  # of 0 and 0.5e-6
    assert "√(v + eps)" in ax.get_xlabel()


def test_denominators_without_a_place_on_the_axis_are_counted(ax: Axes) -> None:
    plotting.denominator(*with_average(np.float32([0.0, NAN, INF, 4.0]), eps=0.0), ax=ax)
    assert marks(ax) == []
    assert texts(ax) == ["3 of 4 are 0 or not finite"]
    assert bars(ax)[0].sum() == 25


def test_a_fresh_state_is_one_bar_at_eps(ax: Axes) -> None:
    plotting.denominator(*with_average(jnp.zeros(5)), ax=ax)
    percent, edges = bars(ax)
    (at,) = np.flatnonzero(percent)
    assert percent[at] == 100
    assert edges[at] < 1.001e-8
    assert edges[-1] > 1.5 * edges[0]


def test_all_leaves_are_counted_and_complex_elements_as_two(ax: Axes) -> None:
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1, jnp.complex64)}
    optimizer = optax.chain(optax.identity(), rmsprop())
    empty, state = optimizer.init(params)
    state = state._replace(square_avg={"a": jnp.array([1.0, 4.0]), "b": jnp.array([9.0 + 16.0j])})
    plotting.denominator(optimizer, (empty, state), params, ax=ax)
    percent, edges = bars(ax)
    np.testing.assert_array_equal(percent, 25 * np.histogram([1, 2, 3, 4], edges)[0])


def test_a_state_without_elements_or_with_many_eps_is_refused() -> None:
    with pytest.raises(ValueError, match="opt_state must have elements to count"):
        plotting.denominator(rmsprop(), rmsprop().init({}), {})
    groups = {"a": rmsprop(eps=1e-3), "b": scale_by_rmsprop(eps=1e-3, eps_in_sqrt=True)}
    optimizer, params = optax.partition(groups, {"a": "a", "b": "b"}), {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    with pytest.raises(ValueError, match=r"tx must have one eps for all parameters, got .*; draw one group at a time"):
        plotting.denominator(optimizer, optimizer.init(params), params)


def test_groups_with_one_eps_are_drawn_together(ax: Axes) -> None:
    optimizer = optax.partition({"a": rmsprop(0.1, eps=1e-3), "b": rmsprop(0.2, eps=1e-3)}, {"a": "a", "b": "b"})
    params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    plotting.denominator(optimizer, optimizer.init(params), params, ax=ax)
    assert texts(ax) == ["eps = 0.001\nexceeds √v in 100 % of elements"]


def test_eps_of_a_schedule_is_marked_where_the_last_update_read_it(ax: Axes) -> None:
    optimizer, params = rmsprop(eps=lambda step: 0.25 / (1 + step)), jnp.ones(2)
    state = optimizer.init(params)
    for _ in range(2):
        _, state = optimizer.update(params, state, params)
    plotting.denominator(optimizer, state, params, ax=ax)
    assert marks(ax) == [0.125]


# --- The trajectory --------------------------------------------------------------------------------------

PATHS = {"sgd": jnp.array([[3.0, 1.0], [1.0, -0.5], [0.5, 0.25]]), "rmsprop": np.array([[3.0, 1.0], [0.0, 0.0]])}


def test_paths_are_drawn_with_their_starts_and_ends(ax: Axes) -> None:
    plotting.trajectory(bowl, PATHS, ax=ax)
    drawn = {line.get_label(): line.get_xydata() for line in ax.lines if line.get_linestyle() != "None"}
    assert {name: path.tolist() for name, path in drawn.items()} == {
        name: path.tolist() for name, path in PATHS.items()
    }
    points = [
        (*line.get_xydata()[0], line.get_markerfacecolor() == "white") for line in ax.lines if line.get_marker() == "o"
    ]
    assert points == [(3.0, 1.0, True), (0.5, 0.25, False), (3.0, 1.0, True), (0.0, 0.0, False)]
    assert legend(ax) == ["sgd", "rmsprop"]


def test_limits_hold_all_paths_unless_given(ax: Axes) -> None:
    plotting.trajectory(bowl, PATHS, y_limits=(-2, 5), x_label="width", y_label="depth", ax=ax)
    low, high = ax.get_xlim()
    assert -1 < low < 0 < 3 < high < 4
    assert ax.get_ylim() == (-2, 5)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("width", "depth")


def levels(ax: Axes) -> np.ndarray:
    return only(ax, QuadContourSet).levels


def test_contours_are_those_of_the_loss_on_a_logarithmic_scale(ax: Axes) -> None:
    plotting.trajectory(bowl, PATHS, x_limits=(-1, 3), y_limits=(-1, 1), ax=ax)
    contours = only(ax, QuadContourSet)
    assert isinstance(contours.norm, LogNorm)
    assert contours.levels[-1] == pytest.approx(109)  # 3² + 100 · 1²
    np.testing.assert_allclose(np.diff(np.log(contours.levels)), np.log(contours.levels[1] / contours.levels[0]))
    for level, path in zip(contours.levels[1:], contours.get_paths()[1:], strict=False):
        inner = path.vertices[(np.abs(path.vertices) < [0.99, 0.99]).all(axis=1)]
        heights = inner[:, 0] ** 2 + 100 * inner[:, 1] ** 2
        assert ((heights > 0.9 * level) & (heights < 1.1 * level * contours.levels[1] / contours.levels[0])).all()
    (bar,) = set(ax.get_figure(root=True).axes) - {ax}
    assert bar.get_ylabel() == "loss"


def test_contours_of_a_loss_below_zero_are_linear(ax: Axes) -> None:
    plotting.trajectory(lambda p: p[0] ** 2 - p[1] ** 2, PATHS, x_limits=(-1, 1), y_limits=(-1, 1), ax=ax)
    assert not isinstance(only(ax, QuadContourSet).norm, LogNorm)
    np.testing.assert_allclose(np.diff(levels(ax)), levels(ax)[1] - levels(ax)[0], rtol=1e-6)


def test_path_that_stops_being_finite_ends_in_a_cross(ax: Axes) -> None:
    plotting.trajectory(bowl, {"sgd": np.array([[3.0, 1.0], [2.0, 0.5], [NAN, 0.1], [NAN, NAN]])}, ax=ax)
    assert crosses(ax) == [(2.0, 0.5)]
    assert legend(ax) == ["sgd (not finite after 1)"]


def test_loss_that_is_not_finite_is_hatched(ax: Axes) -> None:
    plotting.trajectory(lambda p: -jnp.log(p[0]), PATHS, x_limits=(-1, 3), ax=ax)
    assert legend(ax)[-1] == "loss not finite"
    (hatched,) = (c for c in ax.collections if isinstance(c, QuadContourSet) and any(c.hatches))
    corners = np.concatenate([path.vertices for path in hatched.get_paths()])
    assert corners[:, 0].max() == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(loss=3.0), TypeError, r"loss must be a function of an array of shape \(2,\), got float"),
        (
            dict(loss=lambda p: p),
            ValueError,
            r"loss must return a scalar for an array of shape \(2,\), got shape \(2,\)",
        ),
        (dict(loss=lambda p: NAN * p[0]), ValueError, "loss must be finite somewhere in the picture"),
        (dict(paths={}), TypeError, "paths must be a dict from names to arrays, and not empty, got {}"),
        (dict(paths=np.zeros((3, 2))), TypeError, "paths must be a dict from names to arrays"),
        (
            dict(paths={"a": np.zeros((3, 4))}),
            ValueError,
            r"paths\['a'\] must have shape \(steps \+ 1, 2\), got \(3, 4\)",
        ),
        (dict(paths={"a": np.zeros(3)}), ValueError, r"paths\['a'\] must be real numbers in an array of 2 dimensions"),
        (dict(paths={"a": np.full((3, 2), NAN)}), ValueError, r"paths\['a'\] must start at a finite point"),
        (dict(paths={str(i): np.zeros((2, 2)) for i in range(29)}), ValueError, "paths must be at most 28"),
        (dict(x_limits=(1, 0)), ValueError, "x_limits must be finite, in increasing order"),
        (dict(y_limits=(1, 2, 3)), ValueError, "y_limits must be two numbers, got 3"),
    ],
)
def test_unfit_trajectory_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plotting.trajectory(**{"loss": bowl, "paths": PATHS} | arguments)
    assert plt.get_fignums() == []


# --- The dialect fan -------------------------------------------------------------------------------------


def test_fan_draws_every_curve_and_names_it_at_its_end(ax: Axes) -> None:
    values = {"torch": jnp.array([4.0, 2.0, 1.0]), "keras": np.array([4.0, 3.0, 3.0]), "timm": [4, 0, -5]}
    plotting.dialect_fan(values, steps=[0, 10, 20], y_label="loss (nats)", ax=ax)
    assert [line.get_ydata().tolist() for line in curves(ax)] == [[4, 2, 1], [4, 3, 3], [4, 0, -5]]
    assert [(text.get_text(), text.xy) for text in ax.texts] == [
        ("torch", (20, 1)),
        ("keras", (20, 3)),
        ("timm", (20, -5)),
    ]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale(), ax.get_xlim()) == (
        "step",
        "loss (nats)",
        "linear",
        (0, 20),
    )


@pytest.mark.parametrize(
    ("values", "scale"),
    [([100.0, 1.0], "log"), ([100.0, 0.0, 1.0], "log"), ([10.0, 1.0], "linear"), ([100.0, -1.0, 1.0], "linear")],
)
def test_scale_is_logarithmic_if_values_span_decades_and_none_is_negative(values: list[float], scale: str) -> None:
    assert plotting.dialect_fan({"a": values}).get_yscale() == scale


def extents(ax: Axes) -> list[tuple[float, float]]:
    """Bottom and top of each name, from the lowest to the highest, once the figure is laid out."""
    figure = ax.get_figure(root=True)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts]
    for text, box in zip(ax.texts, boxes, strict=True):  # without the line that leads to it
        box.y0, box.y1 = Text.get_window_extent(text).intervaly
    return sorted((box.y0, box.y1) for box in boxes)


@pytest.mark.parametrize("end", [0.0, 0.5, 1.0])
def test_names_of_ends_that_coincide_do_not_overlap_and_stay_inside(end: float) -> None:
    values = {f"dialect {i}": [0.0, i / 7, 1.0, end] for i in range(8)}
    ax = plotting.dialect_fan(values)
    boxes = extents(ax)
    assert all(top <= bottom for (_, top), (bottom, _) in itertools.pairwise(boxes))
    assert ax.bbox.y0 - 1 < boxes[0][0]
    assert boxes[-1][1] < ax.bbox.y1 + 1
    anchor = ax.transData.transform((3, end))[1]
    middle = (boxes[0][0] + boxes[-1][1]) / 2
    assert abs(middle - np.clip(anchor, ax.bbox.y0 + 60, ax.bbox.y1 - 60)) < 40


def test_names_of_several_lines_do_not_overlap() -> None:
    ax = plotting.dialect_fan({f"run {i}": [0.0, i / 4, 1.0, NAN] for i in range(5)})
    boxes = extents(ax)
    assert all(top <= bottom for (_, top), (bottom, _) in itertools.pairwise(boxes))


def test_names_that_have_room_stand_at_their_ends(ax: Axes) -> None:
    plotting.dialect_fan({"low": [0.0, 1.0], "middle": [0.0, 2.0], "high": [0.0, 3.0]}, ax=ax)
    ax.get_figure(root=True).draw_without_rendering()
    for text in ax.texts:
        assert text.xyann[1] == pytest.approx(ax.transAxes.inverted().transform(ax.transData.transform(text.xy))[1])


def test_names_keep_the_order_of_their_ends(ax: Axes) -> None:
    ends = {"b": 0.501, "a": 0.5, "c": 0.502, "top": 1.0, "bottom": 0.0}
    plotting.dialect_fan({name: [i, end] for i, (name, end) in enumerate(ends.items())}, ax=ax)
    places = {text.get_text(): text.xyann[1] for text in ax.texts}
    assert sorted(places, key=lambda name: places[name]) == sorted(ends, key=lambda name: ends[name])


def test_room_for_many_names_is_made_in_a_new_figure() -> None:
    ax = plotting.dialect_fan({f"run {i}": [i, 1.0] for i in range(28)})
    boxes = extents(ax)
    assert all(top <= bottom + 0.5 for (_, top), (bottom, _) in itertools.pairwise(boxes))


def test_curves_that_look_alike_are_one_with_all_names(ax: Axes) -> None:
    values = {"torch": [4.0, 2.0, NAN], "keras": [4.0, 1.0, 1.0], "optax": [4.0, 1.001, 1.0], "sb3": [4.0, 2.0, NAN]}
    plotting.dialect_fan(values, ax=ax)
    assert [line.get_ydata()[1] for line in curves(ax)] == [2.0, 1.0]
    assert texts(ax) == ["torch\nsb3\n(not finite after 1)", "keras\noptax"]


def test_curves_that_differ_at_a_single_step_are_two(ax: Axes) -> None:
    plotting.dialect_fan({"a": [4.0, 2.0, 1.0], "b": [4.0, 2.1, 1.0], "c": [4.0, NAN, 1.0]}, ax=ax)
    assert texts(ax) == ["a", "b", "c"]


def test_curve_ends_in_a_cross_where_it_stops_being_finite(ax: Axes) -> None:
    plotting.dialect_fan({"a": [1.0, 2.0, INF, NAN], "b": [1.0, 1.0, 1.0, 1.0]}, steps=[0, 5, 10, 15], ax=ax)
    assert crosses(ax) == [(5, 2.0)]
    assert texts(ax) == ["a\n(not finite after 5)", "b"]
    np.testing.assert_array_equal(curves(ax)[0].get_ydata(), [1, 2, NAN, NAN])
    assert ax.texts[0].xy == (5, 2.0)


def test_curve_that_was_never_finite_is_named_all_the_same(ax: Axes) -> None:
    plotting.dialect_fan({"a": [NAN, NAN, NAN]}, ax=ax)
    assert texts(ax) == ["a\n(never finite)"]
    assert ax.texts[0].arrow_patch is None
    assert ax.get_xlim() == (0, 2)
    ax.get_figure(root=True).draw_without_rendering()


def test_curve_that_falls_to_zero_is_named_where_it_was_last_seen(ax: Axes) -> None:
    plotting.dialect_fan({"a": [100.0, 1.0, 0.0]}, ax=ax)
    assert ax.texts[0].xy == (1, 1.0)
    assert texts(ax) == ["a"]


def test_curve_that_is_nowhere_above_zero_says_so(ax: Axes) -> None:
    plotting.update_ratio({"a/update_ratio": [0.0, 0.0], "b/update_ratio": [0.1, 0.0]}, ax=ax)
    assert texts(ax) == ["a\n(never above 0)", "b", "1e-3"]
    assert ax.texts[0].arrow_patch is None
    assert ax.texts[1].xy == (0, 0.1)
    plotting.effective_learning_rate({f"total/lr_{q}": [0.0, 0.0] for q in (5, 50, 95)})
    ax.get_figure(root=True).draw_without_rendering()


def test_names_vanish_when_their_ends_are_moved_out_of_the_picture(ax: Axes) -> None:
    plotting.dialect_fan({"a": [1.0, 2.0, 3.0]}, ax=ax)
    ax.set_xlim(0, 1)
    ax.get_figure(root=True).draw_without_rendering()
    assert not np.isfinite(ax.texts[0].get_tightbbox().extents).any()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"a": [1.0, 2.0], "b": [1.0]}, ValueError, "curves must all have the same length, got {'a': 2, 'b': 1}"),
        ({"a": jnp.zeros((2, 2))}, ValueError, r"curves\['a'\] must be .* got shape \(2, 2\)"),
        ({}, TypeError, "curves must be a dict from names to arrays, and not empty, got {}"),
        ([1.0, 2.0], TypeError, "curves must be a dict from names to arrays"),
        ({str(i): [float(i)] for i in range(29)}, ValueError, "curves must be at most 28 to be told apart, got 29"),
    ],
)
def test_unfit_curves_are_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plotting.dialect_fan(given)
    assert plt.get_fignums() == []


# --- The sweep -------------------------------------------------------------------------------------------

NAMES = dict(x_label="lr", y_label="eps", value_label="loss")


def cells(ax: Axes) -> QuadMesh:
    return only(ax, QuadMesh)


def frame(ax: Axes) -> tuple[float, float, float, float]:
    (found,) = (patch for patch in ax.patches if isinstance(patch, Rectangle))
    return (*found.get_xy(), found.get_x() + found.get_width(), found.get_y() + found.get_height())


def test_sweep_has_a_cell_for_every_pair(ax: Axes) -> None:
    table = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    plotting.sweep(table, jnp.array([1.0, 2.0, 4.0]), [10, 20], **NAMES, ax=ax)
    np.testing.assert_array_equal(cells(ax).get_array(), table)
    corners = cells(ax).get_coordinates()
    np.testing.assert_allclose(corners[0, :, 0], [0.5, 1.5, 3.0, 5.0])
    np.testing.assert_allclose(corners[:, 0, 1], [5, 15, 25])
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale(), ax.get_yscale()) == ("lr", "eps", "linear", "linear")
    assert (ax.get_xlim(), ax.get_ylim()) == ((0.5, 5.0), (5, 25))
    (bar,) = set(ax.get_figure(root=True).axes) - {ax}
    assert bar.get_ylabel() == "loss"


def test_axes_of_a_sweep_are_logarithmic_where_values_span_decades(ax: Axes) -> None:
    plotting.sweep(np.ones((3, 3)), [1e-4, 1e-2, 1], [0, 1, 100], **NAMES, ax=ax)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")  # 0 has no place on a logarithmic axis
    np.testing.assert_allclose(cells(ax).get_coordinates()[0, :, 0], [1e-5, 1e-3, 1e-1, 10])


def test_best_cell_is_framed(ax: Axes) -> None:
    table = [[4.0, 2.0, NAN], [INF, 5.0, 6.0]]
    plotting.sweep(table, [1, 2, 3], [10, 20], **NAMES, ax=ax)
    assert frame(ax) == (1.5, 5, 2.5, 15)
    assert legend(ax)[0] == "lowest: 2 at lr = 2, eps = 10"
    highest = plotting.sweep(table, [1, 2, 3], [10, 20], **NAMES, maximize=True)
    assert frame(highest) == (2.5, 15, 3.5, 25)
    assert legend(highest)[0] == "highest: 6 at lr = 3, eps = 20"


def test_best_cell_is_the_brightest() -> None:
    for maximize in (False, True):
        ax = plotting.sweep([[1.0, 2.0, 3.0]], [1, 2, 3], [1], **NAMES, maximize=maximize)
        brightness = cells(ax).to_rgba(np.array([1.0, 2.0, 3.0]))[:, :3].sum(axis=1)
        assert (np.diff(brightness) > 0).all() == maximize


def test_cells_that_are_not_finite_are_hatched_and_explained(ax: Axes) -> None:
    plotting.sweep([[1.0, NAN], [INF, 2.0]], [1, 2], [3, 4], **NAMES, ax=ax)
    np.testing.assert_array_equal(cells(ax).get_array().mask, [[False, True], [True, False]])
    assert ax.patch.get_hatch() == "////"
    assert legend(ax)[1:] == ["not finite"]


def test_nothing_is_hatched_if_all_is_finite(ax: Axes) -> None:
    plotting.sweep([[1.0, 2.0]], [1, 2], [3], **NAMES, ax=ax)
    assert ax.patch.get_hatch() is None
    assert len(legend(ax)) == 1


def test_sweep_in_which_nothing_is_finite_is_hatched_all_over(ax: Axes) -> None:
    plotting.sweep(np.full((2, 2), NAN), [1, 2], [3, 4], **NAMES, ax=ax)
    assert legend(ax) == ["not finite"]
    assert not ax.collections
    assert ax.get_xlim() == (0.5, 2.5)


def test_colors_keep_to_three_decades_from_the_best(ax: Axes) -> None:
    plotting.sweep([[0.5, 1.0, 1e30]], [1, 2, 3], [1], **NAMES, ax=ax)
    assert isinstance(cells(ax).norm, LogNorm)
    assert cells(ax).get_clim() == (0.5, 500)
    highest = plotting.sweep([[0.0, 1e-9, 1.0]], [1, 2, 3], [1], **NAMES, maximize=True)
    assert cells(highest).get_clim() == (1e-3, 1.0)
    colors = cells(highest).to_rgba(cells(highest).get_array())
    np.testing.assert_array_equal(colors[0, 0], colors[0, 1])  # 0 has a color too, the last one


@pytest.mark.parametrize("table", [[[1.0, 2.0, 3.0]], [[-1.0, 1.0, 1e3]], [[0.0, 1.0, 1e3]], [[7.0, 7.0, 7.0]]])
def test_colors_are_linear_over_all_values_otherwise(table: list[list[float]], ax: Axes) -> None:
    plotting.sweep(table, [1, 2, 3], [1], **NAMES, ax=ax)
    assert not isinstance(cells(ax).norm, LogNorm)
    ax.get_figure(root=True).draw_without_rendering()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            dict(values=np.ones((3, 2))),
            ValueError,
            r"values must have shape \(len\(y\), len\(x\)\) = \(2, 3\), got \(3, 2\)",
        ),
        (dict(values=np.ones(6)), ValueError, r"values must be .* 2 dimensions.* got shape \(6,\)"),
        (dict(values=np.full((2, 3), 1j)), TypeError, "values must be real numbers"),
        (dict(x=[1, 3, 2]), ValueError, "x must be finite, in increasing order"),
        (dict(x=[1, 1, 2]), ValueError, "x must be finite, in increasing order"),
        (dict(y=[1, INF]), ValueError, "y must be finite, in increasing order"),
    ],
)
def test_unfit_sweep_is_refused(arguments: Mapping[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plotting.sweep(**dict(values=np.ones((2, 3)), x=[1, 2, 3], y=[1, 2]) | NAMES | arguments)
    assert plt.get_fignums() == []
