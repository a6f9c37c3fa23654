"""Every notebook runs in a clean kernel, and the outputs it is committed with are those of its code."""

import importlib.util
import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

for _package in ("nbclient", "ipykernel", "flax", "gymnax", "torch"):
    if importlib.util.find_spec(_package) is None:  # what is there and does not work is an error
        pytest.skip(f"{_package} is not installed", allow_module_level=True)

import nbformat  # noqa: E402

from conftest import users_flags  # noqa: E402

sys.path.append(str(Path(__file__).parents[1] / "notebooks"))
import execute  # noqa: E402

NOTEBOOKS = sorted(execute.NOTEBOOKS.glob("[0-9]*.ipynb"))
# What a cell with the tag "asserted" prints: "name: value (within 5%)" or, absolutely, "name: value (within ±0.01)".
ASSERTED = re.compile(r"(.+?): (\S+) \(within (?:±(\S+)|(\S+)%)\)")


class Number(NamedTuple):
    value: float
    tolerance: float  # as it is printed
    relative: bool

    def allows(self, other: float) -> bool:
        limit = self.tolerance / 100 * abs(self.value) if self.relative else self.tolerance
        return math.isclose(other, self.value, rel_tol=0, abs_tol=limit)


def asserted_numbers(notebook: Any) -> dict[str, Number]:
    found: dict[str, Number] = {}
    for _, output in execute.outputs(notebook, "asserted"):
        for line in output.get("text", "").splitlines():
            match = ASSERTED.fullmatch(line)
            assert match, f"is no asserted number: {line!r}"
            name, value, absolute, percent = match.groups()
            assert name not in found, f"is there twice: {name}"
            found[name] = Number(float(value), float(absolute or percent), relative=absolute is None)
    return found


def committed(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def warnings_in(notebook: Any) -> list[str]:
    """The lines on stderr that belong to no progress bar."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    errors = [output.text for output in outputs if output.get("name") == "stderr"]
    lines = [line for text in errors for line in re.split("[\r\n]", text) if line.strip()]
    return [line for line in lines if not re.match(r"\s*\d+%\|", line)]


def test_the_notebooks_are_there() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06", "07", "08"]


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_puts_out_the_numbers_it_is_committed_with(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", users_flags())
    before, now = committed(path), execute.execute(path)
    assert not warnings_in(now)
    assert execute.pictures(now).keys() == execute.pictures(before).keys()
    expected, actual = asserted_numbers(before), asserted_numbers(now)
    assert expected
    assert actual.keys() == expected.keys()
    for name, number in expected.items():
        assert actual[name][1:] == number[1:], f"{name}: another tolerance, run: make pictures"
        assert number.allows(actual[name].value), name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_as_one_clean_run(path: Path) -> None:
    cells = [cell for cell in committed(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not warnings_in(committed(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pictures_are_those_of_the_notebook(path: Path) -> None:
    found = execute.pictures(committed(path))
    assert found
    for name, png in found.items():
        assert (execute.PICTURES / f"{name}.png").read_bytes() == png, "run: make pictures"


def test_every_picture_comes_from_a_notebook() -> None:
    made = {f"{name}.png" for path in NOTEBOOKS for name in execute.pictures(committed(path))}
    assert {path.name for path in execute.PICTURES.iterdir()} == made


def test_pages_show_every_picture() -> None:
    root = execute.NOTEBOOKS.parent
    pages = "".join(page.read_text() for page in (root / "README.md", *(root / "docs").glob("*.md")))
    assert [path.name for path in execute.PICTURES.iterdir() if f"notebooks/pictures/{path.name})" not in pages] == []
