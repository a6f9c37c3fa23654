"""The figures in the pages are those of the committed measurements, and the trees are those they are named after."""

import pathlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import eager, measure, peers, report, step, tracing, trees


@pytest.mark.parametrize(("part", "backend"), report.measured())
def test_tables_are_those_of_the_results(part: str, backend: str) -> None:
    page = report.PAGE.read_text()
    for name, table in report.tables(part, backend).items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in page, "run: python -m benchmarks --report"


@pytest.mark.parametrize(
    ("name", "arrays", "parameters"),
    [("ResNet-50", 161, 25_557_032), ("GPT-2 small", 148, 124_439_808), ("EfficientNet-B0", 213, 5_288_548)],
)
def test_trees_have_the_published_size(name: str, arrays: int, parameters: int) -> None:
    assert len(trees.TREES[name]) == arrays
    assert trees.parameters(trees.TREES[name]) == parameters


def test_readme_shows_three_figures_of_the_results() -> None:
    table = report.three_figures("cpu")
    assert f"<!-- three figures -->\n{table}\n<!-- /three figures -->" in report.README.read_text(), (
        "run: python -m benchmarks --report"
    )


def test_ratio_is_of_neighbors_in_time() -> None:
    assert measure.ratio([1.0, 10.0, 100.0], [2.0, 20.0, 200.0]) == {"median": 0.5, "low": 0.5, "high": 0.5}


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """Puts back what a measured step of torch sets."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("variant", peers.VARIANTS)
def test_all_peers_follow_the_same_rule(variant: str) -> None:
    torch = pytest.importorskip("torch")
    arguments, gradient = peers.VARIANTS[variant], np.linspace(-1e-7, 1e-7, 5, dtype=np.float32)  # eps shows
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = torch.optim.RMSprop([param], peers.LR, peers.ALPHA, **arguments)
    for scale in (1.0, 3.0, 0.5):
        param.grad = torch.from_numpy(scale * gradient)
        optimizer.step()
    for make in peers.TRANSFORMATIONS.values():
        params = jnp.ones(5)
        state = make(**arguments).init(params)
        for scale in (1.0, 3.0, 0.5):
            params, state = peers.whole_step(make(**arguments))(params, state, scale * gradient)
        np.testing.assert_allclose(params, param.detach().numpy(), rtol=1e-5)


@pytest.mark.script
@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize("variant", peers.BOTH_ENDS)
def test_a_step_is_measured_against_all_but_the_slow_peers(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    monkeypatch.setitem(trees.TREES, "tiny", [(3,), (3, 4)])
    row = step.row("tiny", variant, "float32", everybody=False)
    committed = next(row for row in measure.load("step")["rows"] if row["variant"] == variant)
    assert set(committed["seconds"]) - set(row["seconds"]) <= {"torch compiled", "keras"}
    assert row["seconds"].keys() - committed["seconds"].keys() == set()


@pytest.mark.script
@pytest.mark.parametrize("way", eager.WAYS)
def test_every_way_to_call_an_update_runs_for_everybody(way: str) -> None:
    params = peers.arrays([(3,), (3, 4)], "float32", seed=0)
    for make in peers.TRANSFORMATIONS.values():
        for variant in peers.BOTH_ENDS:
            eager.WAYS[way](make, peers.VARIANTS[variant], params)()


@pytest.mark.script
def test_stages_before_the_first_step_are_all_timed() -> None:
    row = tracing.row("plain", count=10, rounds=1)
    assert {"trace", "lower", "trace and lower", "compile"} <= row["step"].keys()
    assert row["update"]["lines"]["ours"] < row["update"]["lines"]["optax"]


@pytest.mark.script
def test_training_steps_and_recorded_ones_run() -> None:
    pytest.importorskip("flax")
    pytest.importorskip("sklearn")
    from benchmarks import recording, training

    model = next(iter(training.batches()))
    assert training.row(model, "plain", rounds=1)["seconds"].keys() == {"ours", "optax", "SGD"}
    recording.ten_steps(recorded=True)()


def test_centered_variance_is_exact_where_nothing_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from benchmarks import centered

    monkeypatch.setattr(centered, "STEPS", 50)
    row = centered.row(noise=1.0)
    assert all(row[name]["error"] < 1e-5 for name in ("ours", "torch", "optax"))
    assert all(row[name]["nan"] == 0 for name in ("ours", "torch", "optax"))


def test_tables_are_written_between_their_markers(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- step cpu -->\nold\n<!-- /step cpu -->\nafter\n")
    report.write_into(page, "step cpu", "new")
    assert page.read_text() == "before\n<!-- step cpu -->\nnew\n<!-- /step cpu -->\nafter\n"


@pytest.mark.parametrize("part", report.PICTURES)
def test_pictures_are_drawn_from_the_results(
    part: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.draw(part, "cpu").stat().st_size > 10_000
