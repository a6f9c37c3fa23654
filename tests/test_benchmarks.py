"""The README's figures are those of the committed measurements, and the trees are those they are named after."""

import pathlib

import pytest

from benchmarks import measure, report, trees

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize("part", report.TABLES)
def test_tables_of_the_readme_are_those_of_the_results(part: str) -> None:
    for name, table in report.tables(part, "cpu").items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in README, "run: python -m benchmarks --report README.md"


@pytest.mark.parametrize(
    ("name", "arrays", "parameters"),
    [("ResNet-50", 161, 25_557_032), ("GPT-2 small", 148, 124_439_808), ("EfficientNet-B0", 213, 5_288_548)],
)
def test_trees_have_the_published_size(name: str, arrays: int, parameters: int) -> None:
    assert len(trees.TREES[name]) == arrays
    assert trees.parameters(trees.TREES[name]) == parameters


def test_ratio_is_of_neighbours_in_time() -> None:
    assert measure.ratio([1.0, 10.0, 100.0], [2.0, 20.0, 200.0]) == {"median": 0.5, "low": 0.5, "high": 0.5}
