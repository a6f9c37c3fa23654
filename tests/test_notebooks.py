"""Every notebook runs in a clean kernel, and the outputs it is committed with are those of its code."""

import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

for _package in ("nbclient", "ipykernel", "flax", "gymnax", "torch"):
    pytest.importorskip(_package)

nbformat = pytest.importorskip("nbformat")
sys.path.append(str(Path(__file__).parents[1] / "notebooks"))
execute = pytest.importorskip("execute")

NOTEBOOKS = sorted(execute.NOTEBOOKS.glob("[0-9]*.ipynb"))
README = (execute.NOTEBOOKS.parent / "README.md").read_text()
# What a cell with the tag "asserted" prints: "name: value (within 5%)" or, absolutely, "name: value (within ±0.01)".
ASSERTED = re.compile(r"^(.+?): (\S+) \(within (?:±(\S+)|(\S+)%)\)$", re.MULTILINE)


class Number(NamedTuple):
    value: float
    tolerance: float  # absolute


def asserted_numbers(notebook: Any) -> dict[str, Number]:
    found = {}
    for _, output in execute.outputs(notebook, "asserted"):
        for name, value, absolute, percent in ASSERTED.findall(output.get("text", "")):
            number = float(value.replace(",", "").replace("−", "-").rstrip("%"))
            found[name] = Number(number, float(absolute) if absolute else float(percent) / 100 * abs(number))
    return found


def committed(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def test_the_six_notebooks_are_there() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_puts_out_the_numbers_it_is_committed_with(path: Path) -> None:
    expected = asserted_numbers(committed(path))
    actual = asserted_numbers(execute.execute(path))
    assert expected
    assert actual.keys() == expected.keys()
    for name, number in expected.items():
        assert math.isclose(actual[name].value, number.value, rel_tol=0, abs_tol=number.tolerance), name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_as_one_clean_run(path: Path) -> None:
    cells = [cell for cell in committed(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    errors = [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert not [text for text in errors if "Warning" in text or "Error" in text]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pictures_are_those_of_the_notebook(path: Path) -> None:
    found = execute.pictures(committed(path))
    assert found
    for name, png in found.items():
        assert (execute.PICTURES / f"{name}.png").read_bytes() == png, "run: make pictures"


def test_every_picture_comes_from_a_notebook() -> None:
    made = {f"{name}.png" for path in NOTEBOOKS for name in execute.pictures(committed(path))}
    assert {path.name for path in execute.PICTURES.iterdir()} == made


def test_readme_shows_pictures_that_are_there() -> None:
    shown = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert shown
    assert [picture for picture in shown if not (execute.NOTEBOOKS.parent / picture).is_file()] == []
