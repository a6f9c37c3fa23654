"""The figures in the pages are those of the committed measurements, and the trees are those they are named after."""

import pytest

from benchmarks import measure, report, trees

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
