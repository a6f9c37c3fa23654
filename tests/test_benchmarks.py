"""The figures in the pages are those of the committed measurements, and the trees are those they are named after."""

import jax
import pytest

from benchmarks import eager, measure, peers, report, step, tracing, trees

PAGES = "\n".join(page.read_text() for page in report.PAGES)


@pytest.mark.parametrize(("part", "backend"), report.measured())
def test_tables_are_those_of_the_results(part: str, backend: str) -> None:
    for name, table in report.tables(part, backend).items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in PAGES, "run: python -m benchmarks --report"


@pytest.mark.parametrize(
    ("name", "arrays", "parameters"),
    [("ResNet-50", 161, 25_557_032), ("GPT-2 small", 148, 124_439_808), ("EfficientNet-B0", 213, 5_288_548)],
)
def test_trees_have_the_published_size(name: str, arrays: int, parameters: int) -> None:
    assert len(trees.TREES[name]) == arrays
    assert trees.parameters(trees.TREES[name]) == parameters


def test_ratio_is_of_neighbours_in_time() -> None:
    assert measure.ratio([1.0, 10.0, 100.0], [2.0, 20.0, 200.0]) == {"median": 0.5, "low": 0.5, "high": 0.5}


@pytest.mark.parametrize("variant", ["plain", "centered + momentum"])
def test_a_step_is_measured_against_everybody_in_the_table(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    pytest.importorskip("torch")
    monkeypatch.setitem(trees.TREES, "tiny", [(3,), (3, 4)])
    row = step.row("tiny", variant, "float32", everybody=False)
    committed = next(row for row in measure.load("step")["rows"] if row["variant"] == variant)
    assert set(committed["seconds"]) - set(row["seconds"]) <= {"torch compiled", "keras"}
    assert row["seconds"].keys() - committed["seconds"].keys() == set()


@pytest.mark.parametrize("way", eager.WAYS)
def test_every_way_to_call_an_update_runs_for_everybody(way: str) -> None:
    params = peers.arrays([(3,), (3, 4)], "float32", seed=0)
    for make in peers.TRANSFORMATIONS.values():
        for variant in eager.VARIANTS:
            updates = eager.WAYS[way](make, peers.VARIANTS[variant], params)()
            assert updates is None or jax.tree.leaves(updates)


def test_stages_before_the_first_step_are_all_timed() -> None:
    row = tracing.row("plain", count=10, rounds=1)
    assert {"trace", "lower", "trace and lower", "compile"} <= row["step"].keys()
    assert row["update"]["lines"]["ours"] < row["update"]["lines"]["optax"]
