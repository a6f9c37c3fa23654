"""The floors of the house: who may import whom."""

import ast
import pathlib
import subprocess
import sys

import rmsprop_jax

PACKAGE = pathlib.Path(rmsprop_jax.__file__).parent

# Each room and the rooms below it that it may stand on. Rooms on one floor do not know each other.
ROOMS: dict[str, set[str]] = {
    "__init__": {"transform", "dialects", "recipes", "diagnostics"},
    "arguments": set(),
    "transform": {"arguments"},
    "dialects": {"transform", "arguments"},
    "recipes": {"dialects", "transform", "arguments"},
    "torch_interop": {"transform", "arguments"},
    "diagnostics": {"transform", "arguments"},
    "plotting": {"diagnostics"},
}
LIBRARIES = {"jax", "numpy", "optax", "chex"}
MORE_LIBRARIES = {"plotting": {"matplotlib"}}
NEVER_LOADED = {"torch", "flax", "matplotlib", "tensorflow", "sklearn", "orbax"}


def imports(path: pathlib.Path) -> set[str]:
    """The full names of everything that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} is a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_file_is_a_room_of_the_table() -> None:
    assert {path.stem for path in PACKAGE.rglob("*.py")} == set(ROOMS)


def test_rooms_import_only_what_lies_below_them() -> None:
    for room, below in ROOMS.items():
        own = {name for name in imports(PACKAGE / f"{room}.py") if name.split(".")[0] == "rmsprop_jax"}
        assert {name.split(".")[1] for name in own} <= below, room


def test_nothing_stands_on_plotting() -> None:
    assert not any("plotting" in below for below in ROOMS.values())


def test_rooms_import_only_the_libraries_that_are_dependencies() -> None:
    for room in ROOMS:
        roots = {name.split(".")[0] for name in imports(PACKAGE / f"{room}.py")}
        allowed = LIBRARIES | MORE_LIBRARIES.get(room, set()) | set(sys.stdlib_module_names)
        assert roots - allowed <= {"rmsprop_jax"}, room


def test_import_loads_no_heavy_library() -> None:
    program = "import sys, rmsprop_jax; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    loaded = set(done.stdout.split())
    assert "rmsprop_jax" in loaded, done.stderr
    assert not loaded & NEVER_LOADED


def test_front_door_exports_what_it_names() -> None:
    assert all(hasattr(rmsprop_jax, name) for name in rmsprop_jax.__all__)
