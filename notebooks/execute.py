"""Executes notebooks in place, each in a clean kernel, and keeps the pictures that the pages show.

``python notebooks/execute.py`` runs all of them, ``python notebooks/execute.py 02 04`` those whose names start with 02
or 04. It writes the picture of a cell with the tag ``picture:NAME`` to ``notebooks/pictures/NAME.png``.
"""

import base64
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent
PICTURES = NOTEBOOKS / "pictures"
LONGEST_CELL = 300  # seconds, after which something hangs


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with what its code puts out now. Raises nbclient's ``CellExecutionError`` if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=LONGEST_CELL,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # a progress bar is one line
        resources={"metadata": {"path": str(NOTEBOOKS)}},
    )
    client.execute()
    notebook.metadata.language_info = {"name": "python"}  # and not the version it happened to run on
    return notebook


def outputs(notebook: nbformat.NotebookNode, tag: str) -> Iterator[tuple[str, nbformat.NotebookNode]]:
    """The outputs of the cells with a tag that is or starts with ``tag``, each with the whole tag."""
    for cell in notebook.cells:
        for found in cell.metadata.get("tags", []):
            if found == tag or found.startswith(f"{tag}:"):
                yield from ((found, output) for output in cell.outputs)


def pictures(notebook: nbformat.NotebookNode) -> dict[str, bytes]:
    """The PNG pictures of the cells tagged ``picture:NAME``, by name."""
    return {
        tag.removeprefix("picture:"): base64.b64decode(output.data["image/png"])
        for tag, output in outputs(notebook, "picture")
        if "image/png" in output.get("data", {})
    }


def main(prefixes: list[str]) -> None:
    chosen = [path for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")) if path.name.startswith(tuple(prefixes or [""]))]
    if not chosen:
        sys.exit(f"no notebook's name starts with {' or '.join(prefixes)}")
    for path in chosen:
        start = time.monotonic()
        notebook = execute(path)
        nbformat.write(notebook, path)
        PICTURES.mkdir(exist_ok=True)
        found = pictures(notebook)
        for name, png in found.items():
            (PICTURES / f"{name}.png").write_bytes(png)
        print(f"{path.name}: {time.monotonic() - start:.0f} s, pictures: {', '.join(found) or 'none'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
