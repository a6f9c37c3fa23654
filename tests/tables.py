"""The tables in the pages that come from the code: ``python tests/tables.py`` writes them between their markers."""

import ast
import inspect
import itertools
import pathlib
from collections.abc import Callable

import test_layers
from rmsprop_jax import recipes, translation

ROOT = pathlib.Path(__file__).parents[1]

# The arguments of a dialect that its source does not have.
OURS = ("weight_decay_mask", "accumulator_dtype")


def signature(function: Callable[..., object], left_out: tuple[str, ...] = ()) -> str:
    """The arguments and their defaults, without annotations."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in left_out]
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)


def framework_of(row: translation.Dialect) -> str:
    """The source of a dialect: a class as code, a paper or a program as text."""
    return f"`{row.framework}`" if "." in row.framework and " " not in row.framework else row.framework


def call_of(name: str) -> str:
    """Our function for a dialect."""
    return "rmsprop" if name == "torch" else f"dialects.{name}"


def call_table() -> str:
    """One row for each framework: our function for it."""
    lines = [f"| {framework_of(row)} | `{call_of(name)}` |" for name, row in translation.DIALECTS.items()]
    return "\n".join(["| your run is in | in JAX |", "|---|---|", *lines])


def dialect_table() -> str:
    """One row for each framework: what it does, and our call with its arguments."""
    lines = [
        "| your run is in | average starts from | denominator | learning rate | weight decay | in JAX |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in translation.DIALECTS.items():
        needed = {row.names["lr"]: 0.1} | {row.names[n]: 0.5 for n in ("momentum", "weight_decay") if n in row.names}
        says = translation.structure_of(row.build(**needed)) | {thing: f"`{own}`" for thing, own in row.names.items()}
        start = says["initial_scale"] if isinstance(says["initial_scale"], str) else f"{says['initial_scale']:g}"
        start = "bias-corrected" if says["bias_correction"] is True else start
        eps = row.names["eps"]
        inside = {True: f"√(v + {eps})", False: f"√v + {eps}"}.get(says["eps_in_sqrt"], says["eps_in_sqrt"])
        if says["centered"] is True:
            inside = inside.replace("v", "v − m²", 1)
        buffer = {True: "inside the momentum buffer", False: "after the momentum buffer"}
        place = buffer.get(says["lr_in_buffer"], says["lr_in_buffer"])
        if says["averages_steps"]:
            place = "after the averaged steps"
        if "momentum" not in row.names:
            place = "no momentum"
        decay = {True: "decoupled", False: "L2"}.get(says["decoupled_decay"], f"L2, or {says['decoupled_decay']}")
        lines.append(
            f"| {framework_of(row)} | {start} | {inside} | {place} "
            f"| {decay if 'weight_decay' in row.names else 'none'} | `{call_of(name)}({signature(row.build, OURS)})` |"
        )
    return "\n".join(lines)


def recipe_table() -> str:
    """A table for each family with a row for each recipe: what it is, the unit of its gradient, where it was read."""
    tables = []
    for family, rows in itertools.groupby(
        sorted(recipes.RECIPES.values(), key=lambda row: (row.family, row.name)), key=lambda row: row.family
    ):
        lines = [
            f"### {family.capitalize()}\n",
            "| recipe | what it is | unit of the gradient | left to the caller | source |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            required = [p.name for p in inspect.signature(row.build).parameters.values() if p.default is p.empty]
            call = f"`{row.name}({', '.join([*required, '…'])})`"
            what = row.summary.replace("``", "`")
            lines.append(f"| {call} | {what} | {row.gradient} | {row.caller} | {row.reference()} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def floor_table() -> str:
    """One row for each room, from the highest floor down: what it is, by the first line of its docstring."""
    lines = ["| floor | room | what it is |", "|---|---|---|"]
    rooms = sorted(test_layers.ROOMS.items(), key=lambda item: -item[1].floor)
    for floor, on_it in itertools.groupby(rooms, key=lambda item: item[1].floor):
        for i, (room, _) in enumerate(on_it):
            documentation = ast.get_docstring(ast.parse(test_layers.SOURCES[room].read_text()))
            what = documentation.split("\n\n")[0].replace("\n", " ").replace("``", "`")
            lines.append(f"| {'' if i else floor} | `{room}` | {what} |")
    return "\n".join(lines)


# The tables of each page, by the name of their markers.
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"calls": call_table},
    "CONTRIBUTING.md": {"floors": floor_table},
    "docs/dialects.md": {"dialects": dialect_table},
    "docs/recipes.md": {"recipes": recipe_table},
}


def with_tables(page: str, text: str) -> str:
    """``text`` of a page, with a new table between each pair of markers."""
    for name, table in PAGES[page].items():
        before, rest = text.split(f"<!-- {name} -->\n")
        after = rest.split(f"\n<!-- /{name} -->")[1]
        text = f"{before}<!-- {name} -->\n{table()}\n<!-- /{name} -->{after}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(with_tables(page, (ROOT / page).read_text()))
