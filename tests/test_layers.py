"""The floors of the house: who may import whom, compared with what the source of each room imports."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

import rmsprop_jax

PACKAGE = pathlib.Path(rmsprop_jax.__file__).parent
NAME = PACKAGE.name


class Room(NamedTuple):
    """A room's floor, and the rooms on lower floors that it may import. Rooms of one floor do not know each other."""

    floor: int
    below: set[str]


FRONT_DOOR = "__init__"
ROOMS: dict[str, Room] = {
    "equations": Room(1, set()),
    "state": Room(1, set()),
    "arguments": Room(1, set()),
    "codes": Room(1, set()),
    "copies": Room(1, set()),
    "placement": Room(1, set()),
    "fields": Room(2, {"arguments", "codes"}),
    "storage": Room(3, {"arguments", "codes", "fields", "placement"}),
    "sharding": Room(2, {"arguments", "codes", "copies", "placement"}),
    "trees": Room(2, {"state", "arguments", "codes"}),
    "figures": Room(2, {"state", "codes"}),
    "lift": Room(3, {"equations", "state", "arguments", "trees", "placement"}),
    "transform": Room(4, {"equations", "arguments", "lift"}),
    "dialects": Room(4, {"equations", "arguments", "lift"}),
    "conversion": Room(4, {"state", "arguments", "trees", "lift"}),
    "diagnostics": Room(4, {"state", "arguments", "figures", "codes", "storage"}),
    "checkpoints.curves": Room(1, set()),
    "checkpoints.scheduler_file": Room(2, {"arguments", "checkpoints.curves"}),
    "checkpoints.torch_schedulers": Room(3, {"arguments", "checkpoints.curves", "checkpoints.scheduler_file"}),
    "checkpoints.keras_config": Room(2, {"arguments"}),
    "checkpoints.keras_pieces": Room(2, {"state"}),
    "checkpoints.keras_schedules": Room(2, {"arguments"}),
    "checkpoints.slots": Room(4, {"state", "arguments"}),
    "checkpoints.rearrangement": Room(4, set()),
    "checkpoints.named": Room(5, {"state", "arguments", "storage", "checkpoints.slots", "checkpoints.rearrangement"}),
    "recipes.clipping": Room(2, {"state", "arguments"}),
    "recipes.schedules": Room(3, {"arguments", "recipes.clipping"}),
    "recipes.entry": Room(4, {"state", "arguments", "recipes.schedules"}),
    "recipes.reinforcement": Room(
        5, {"transform", "dialects", "recipes.clipping", "recipes.schedules", "recipes.entry"}
    ),
    "recipes.sequences": Room(5, {"transform", "dialects", "recipes.clipping", "recipes.schedules", "recipes.entry"}),
    "recipes.images": Room(5, {"transform", "dialects", "recipes.clipping", "recipes.schedules", "recipes.entry"}),
    "recipes": Room(
        6,
        {"recipes.entry", "recipes.schedules", "recipes.reinforcement", "recipes.sequences", "recipes.images"},
    ),
    "translation": Room(
        5, {"equations", "state", "arguments", "storage", "lift", "transform", "dialects", "conversion"}
    ),
    "recorder": Room(5, {"state", "arguments", "figures", "diagnostics"}),
    "summary": Room(5, {"state", "codes", "figures", "diagnostics"}),
    "plotting": Room(5, {"diagnostics"}),
    "checkpoints.torch_file": Room(5, {"arguments", "checkpoints.slots"}),
    "checkpoints.torch": Room(
        6,
        {"arguments", "transform", "checkpoints.slots", "checkpoints.named", "checkpoints.torch_file"}
        | {"checkpoints.torch_schedulers"},
    ),
    "checkpoints.variables": Room(5, {"state", "arguments", "checkpoints.slots"}),
    "checkpoints.keras": Room(
        6,
        {"state", "arguments", "dialects", "checkpoints.slots", "checkpoints.named", "checkpoints.variables"}
        | {"checkpoints.keras_config", "checkpoints.keras_pieces", "checkpoints.keras_schedules"},
    ),
    "checkpoints.tensorflow": Room(
        6, {"arguments", "dialects", "checkpoints.slots", "checkpoints.named", "checkpoints.variables"}
    ),
    "checkpoints.optax": Room(6, {"state", "arguments", "storage", "checkpoints.slots"}),
    "checkpoints": Room(
        7,
        {"checkpoints.keras", "checkpoints.optax", "checkpoints.tensorflow", "checkpoints.torch"}
        | {"checkpoints.torch_schedulers"},
    ),
    # Loads plotting when it is used: matplotlib is not a dependency.
    FRONT_DOOR: Room(
        8,
        {"state", "transform", "dialects", "translation", "diagnostics", "recorder", "summary", "recipes"}
        | {"checkpoints", "plotting", "sharding", "storage"},
    ),
}
LIBRARIES = {"jax", "numpy", "optax", "chex"}
MORE_LIBRARIES = {"plotting": {"matplotlib"}}
NEVER_LOADED = {"torch", "flax", "matplotlib", "tensorflow", "keras", "h5py"}
NEVER_LOADED |= {"sklearn", "orbax", "equinox", "optimistix"}
# A folder is a room, and each file in it another one: checkpoints (its __init__.py), checkpoints.torch.
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


# --- What a source imports ---------------------------------------------------------------------------------


def imported(source: str) -> set[str]:
    """The full names of what a source imports, in functions too and under ``TYPE_CHECKING``.

    A string that is the name of a room counts as an import: ``importlib`` and ``sys.modules`` take it. Where such a
    name is put together, every string that could be a part of it counts. So does an attribute of the package.
    """
    tree = ast.parse(source)
    names, aliases = set(), {NAME}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            aliases |= {alias.asname for alias in node.names if alias.name == NAME and alias.asname}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    strings = {node.value for node in _without_docstrings(tree) if isinstance(node, ast.Constant)}
    texts = {value for value in strings if isinstance(value, str)}
    names |= {text for text in texts if re.fullmatch(rf"({NAME})?\.({'|'.join(map(re.escape, ROOMS))})(\.\w+)*", text)}
    if {NAME, f"{NAME}."} & texts:
        names |= {f"{NAME}.{text}" for text in texts if text in ROOMS}
    for node in ast.walk(tree):
        root, _, rest = _dotted(node).partition(".")
        if root in aliases and rest:
            names.add(f"{NAME}.{rest}")
    return names


def _dotted(node: ast.AST) -> str:
    """A name and its attributes as they are written: ``rmsprop_jax.checkpoints.torch``."""
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value)
        return inner and f"{inner}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _without_docstrings(tree: ast.AST) -> list[ast.AST]:
    nodes = list(ast.walk(tree))
    prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return [node for node in nodes if id(node) not in prose]


def rooms_in(names: set[str]) -> set[str]:
    """The rooms that imported names belong to. What is the package's, but in none of them, is the front door's."""
    found = set()
    for name in names:
        root, _, rest = name.partition(".")
        if root in (NAME, ""):  # "" where the import is relative
            parts = rest.lstrip(".").split(".")
            rooms = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
            found.add(next((room for room in rooms if room in ROOMS), FRONT_DOOR))
    return found


WAYS = {
    "from its folder": "from {folder} import {last}",
    "from the room": "from rmsprop_jax.{room} import something",
    "everything": "from rmsprop_jax.{room} import *",
    "the module": "import rmsprop_jax.{room}",
    "under another name": "import rmsprop_jax.{room} as other",
    "among others": "import jax, rmsprop_jax.{room}",
    "in a function": "def f():\n    from rmsprop_jax.{room} import something",
    "in a method": "class A:\n    def f(self):\n        import rmsprop_jax.{room}",
    "under TYPE_CHECKING": "if TYPE_CHECKING:\n    from {folder} import {last}",
    "relative": "from .{room} import something",
    "relative to its folder": "from {relative_folder} import {last}",
    "an attribute": "import rmsprop_jax\nrmsprop_jax.{room}.something()",
    "an attribute of another name": "import rmsprop_jax as r\nr.{room}.something()",
    "importlib": "importlib.import_module('rmsprop_jax.{room}')",
    "importlib, relative": "importlib.import_module('.{room}', __package__)",
    "__import__": "__import__('rmsprop_jax.{room}')",
    "loaded modules": "sys.modules['rmsprop_jax.{room}']",
    "lazily": "LAZY = ('{room}',)\ndef __getattr__(name):\n    return importlib.import_module(f'rmsprop_jax.{{name}}')",
    "put together": "importlib.import_module('rmsprop_jax' + '.' + '{room}')",
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_importing_a_room_is_seen(way: str) -> None:
    for room in set(ROOMS) - {FRONT_DOOR}:
        inside, _, last = room.rpartition(".")
        parts = dict(room=room, last=last, folder=f"{NAME}.{inside}".rstrip("."), relative_folder=f".{inside}")
        assert room in rooms_in(imported(WAYS[way].format(**parts))), room


def test_import_of_the_package_is_one_of_the_front_door() -> None:
    for source in ("import rmsprop_jax", "from rmsprop_jax import rmsprop", "from rmsprop_jax import *"):
        assert rooms_in(imported(source)) == {FRONT_DOOR}


def test_what_is_no_import_is_not_seen() -> None:
    source = '"""Prose on rmsprop_jax.plotting."""\nx.plotting(jax.dialects, "rmsprop_jax.RMSPropState of plotting")'
    assert rooms_in(imported(source)) == set()


# --- The table ---------------------------------------------------------------------------------------------


def test_every_file_is_a_room_of_the_table() -> None:
    assert set(SOURCES) == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_what_the_table_allows(room: str) -> None:
    found = rooms_in(imported(SOURCES[room].read_text()))
    assert found - {room} <= ROOMS[room].below


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down(room: str) -> None:
    """The imports themselves, and what the table allows."""
    for other in rooms_in(imported(SOURCES[room].read_text())) | ROOMS[room].below:
        assert ROOMS[other].floor < ROOMS[room].floor, other


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_libraries_that_are_dependencies(room: str) -> None:
    nodes = list(ast.walk(ast.parse(SOURCES[room].read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in names}
    allowed = LIBRARIES | MORE_LIBRARIES.get(room, set()) | set(sys.stdlib_module_names) | {NAME}
    assert roots <= allowed


def test_import_loads_no_heavy_library() -> None:
    program = "import sys, rmsprop_jax; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    loaded = set(done.stdout.split())
    assert "rmsprop_jax" in loaded, done.stderr
    assert not loaded & NEVER_LOADED


SHARED = {"diagnostics": {"ask", "leaves_after", "leaves_of"}}  # what the rooms above use, and users do not
PUBLIC = (
    "transform",
    "dialects",
    "translation",
    "recipes",
    "diagnostics",
    "recorder",
    "summary",
    "plotting",
    "storage",
)


CHECKPOINTS = ("checkpoints.torch", "checkpoints.optax", "checkpoints.keras", "checkpoints.tensorflow")


@pytest.mark.parametrize("room", [*PUBLIC, *CHECKPOINTS, "checkpoints.torch_schedulers"])
def test_public_room_lists_everything_that_it_offers(room: str) -> None:
    module = importlib.import_module(f"{NAME}.{room}")
    own = {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    assert {name for name in own if not name.startswith("_")} <= set(module.__all__) | SHARED.get(room, set())
    assert all(hasattr(module, name) for name in module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)


def test_front_door_exports_what_it_names() -> None:
    assert all(hasattr(rmsprop_jax, name) for name in rmsprop_jax.__all__)
