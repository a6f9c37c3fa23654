"""The tables and pictures of the measurements, made from ``results/*.json`` alone."""

import pathlib
import re
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import layout_tables, storage_tables
from benchmarks.cells import Row, markdown, milliseconds, spread
from benchmarks.measure import RESULTS, load

README, PAGE = RESULTS.parents[1] / "README.md", RESULTS.parent / "RESULTS.md"  # three figures, all tables


# --- Tables ----------------------------------------------------------------------------------------------


def step_table(rows: list[Row]) -> str:
    """Our step over everybody else's."""
    peers = [name for name in rows[0]["seconds"] if name not in ("ours", "empty call")]  # the first row has everybody
    return markdown(
        ["parameters", "setting", "dtype", "ours, ms", *(f"÷ {peer}" for peer in peers), "empty call, ms"],
        (
            [row["tree"], row["variant"], row["dtype"], milliseconds(row["seconds"]["ours"])]
            + [spread(row["ratio"].get(peer)) for peer in peers]
            + [milliseconds(row["seconds"]["empty call"])]
            for row in rows
        ),
    )


def memory_table(rows: list[Row]) -> str:
    """Bytes per parameter of the step of one array of 16M, ours and Optax's."""
    kinds = {"state": "state", "temporary": "allocated in a step", "accessed": "read and written in a step"}
    return markdown(
        ["setting", "dtype", *(f"{kind}: {name}" for kind in kinds.values() for name in ("ours", "optax"))],
        (
            [row["variant"], row["dtype"]]
            + [f"{row['bytes_per_parameter'][name][kind]:.0f}" for kind in kinds for name in ("ours", "optax")]
            for row in rows
            if row["tree"] == "1 × 16M"
        ),
    )


def tracing_table(rows: list[Row]) -> str:
    """Ours over Optax's, of every stage before the first step."""
    columns = {
        "`update`: trace and lower": ("update", "trace and lower"),
        "with `apply_updates`: trace and lower": ("step", "trace and lower"),
        "compile": ("step", "compile"),
    }
    return markdown(
        ["arrays", "setting", *columns, "lines of StableHLO: ours, optax"],
        (
            [f"{row['arrays']:,}", row["variant"]]
            + [spread(row[part].get(stage, {}).get("ratio")) for part, stage in columns.values()]
            + [", ".join(f"{row['update']['lines'][name]:,.0f}" for name in ("ours", "optax"))]
            for row in rows
        ),
    )


def eager_table(rows: list[Row]) -> str:
    """Ours and Optax's calls outside jit."""
    return markdown(
        ["call", "setting", "arrays", "ours, ms", "optax, ms", "ours ÷ optax"],
        (
            [row["way"], row["variant"], f"{row['arrays']:,}"]
            + [milliseconds(row["seconds"][name]) for name in ("ours", "optax")]
            + [spread(row["ratio"]["optax"])]
            for row in rows
        ),
    )


def training_table(rows: list[Row]) -> str:
    """Whole training steps."""
    return markdown(
        [
            "model",
            "parameters",
            "setting",
            "with SGD, ms",
            "with ours, ms",
            "ours ÷ SGD",
            "ours ÷ optax",
        ],
        (
            [row["model"], f"{row['parameters']:,}", row["variant"]]
            + [milliseconds(row["seconds"][name]) for name in ("SGD", "ours")]
            + [spread(row["ratio"][name]) for name in ("SGD", "optax")]
            for row in rows
        ),
    )


def centered_table(rows: list[Row]) -> str:
    """Median error of the standard deviation, and share of coordinates that were NaN."""

    def cell(found: dict[str, float | None]) -> str:
        error = "none is a number" if found["error"] is None else f"{found['error']:.0e}"
        return f"{error}, {found['nan']:.0%}"

    names = {"ours": "`rmsprop_jax`", "torch": "`torch.optim.RMSprop`", "optax": "`optax.rmsprop`"}
    return markdown(
        ["noise/mean", *names.values()], ([f"{row['noise']:g}", *(cell(row[name]) for name in names)] for row in rows)
    )


def recording_table(rows: list[Row]) -> str:
    """Training steps with and without recorded statistics."""
    return markdown(
        ["step", "ms", "÷ plain"],
        ([row["step"], milliseconds(row["seconds"]), spread(row["ratio"])] for row in rows),
    )


def compiled_table(rows: list[Row]) -> str:
    """What a step became for a device on which nothing ran, per parameter of one array."""
    kinds = {
        "kernels": "kernels",
        "accessed": "bytes read and written",
        "temporary": "bytes allocated",
    }
    return markdown(
        ["setting", "dtype", *(f"{kind}: {name}" for kind in kinds.values() for name in ("ours", "optax"))],
        (
            [row["variant"], row["dtype"]]
            + [f"{row['per_parameter'][name][kind]:g}" for kind in kinds for name in ("ours", "optax")]
            for row in rows
        ),
    )


def device_table(rows: list[Row]) -> str:
    """Our step on an accelerator: its bandwidth over that of the copy, and its time over everybody else's."""
    peers = ("optax", "torch", "torch foreach", "torch compiled")

    def share(row: Row) -> str:
        needed = (row["copied"] + row["gradients"]) / row["copied"]
        return f"{100 * needed / row['ratio']['copy']['median']:.0f}"

    return markdown(
        [
            *("parameters", "setting", "dtype", "ours, ms", "GB/s", "bandwidth, % of copy"),
            *(f"÷ {peer}" for peer in peers),
            "empty call, ms",
        ],
        (
            [row["tree"], row["variant"], row["dtype"], milliseconds(row["seconds"]["ours"])]
            + [f"{(row['copied'] + row['gradients']) / row['seconds']['ours'] / 1e9:.0f}", share(row)]
            + [spread(row["ratio"].get(peer)) for peer in peers]
            + [milliseconds(row["seconds"]["empty call"])]
            for row in rows
        ),
    )


# The tables of each part, by the name that their markers begin with.
TABLES: dict[str, dict[str, Callable[[list[Row]], str]]] = {
    "step": {"step": step_table, "memory": memory_table},
    "tracing": {"tracing": tracing_table},
    "eager": {"eager": eager_table},
    "training": {"training": training_table},
    "recording": {"recording": recording_table},
    "centered": {"centered": centered_table},
    "compiled": {"compiled": compiled_table},
    "device": {"device": device_table},
    **storage_tables.TABLES,
    **layout_tables.TABLES,
}


def three_figures(backend: str) -> str:
    """What the README shows: one row each about accuracy, a compiled step and a call outside ``jit``."""
    noise, tree, count = 1e-4, "GPT-2 small", 300
    centered = row_of("centered", backend, noise=noise)
    step = row_of("step", backend, tree=tree, variant="plain", dtype="float32")["seconds"]
    eager = row_of("eager", backend, way="update", variant="plain", arrays=count)["seconds"]
    names = {"ours": "`rmsprop_jax`", "torch": "`torch.optim.RMSprop`", "optax": "`optax.rmsprop`"}
    return markdown(
        [load("step", backend)["environment"]["device"], *names.values()],
        [
            [f"coordinates with a NaN update, centered, noise/mean {noise:g}"]
            + [f"{centered[name]['nan']:.0%}" for name in names],
            [f"a compiled step of {tree}"] + [f"{milliseconds(step[name])} ms" for name in names],
            [f"an update of {count} arrays outside `jit`"]
            + [f"{milliseconds(eager[name])} ms" if name in eager else "–" for name in names],
        ],
    )


def row_of(part: str, backend: str, **chosen: Any) -> Row:
    """The row of a part that has the values ``chosen``."""
    (row,) = (row for row in load(part, backend)["rows"] if chosen.items() <= row.items())
    return row


def measured() -> list[tuple[str, str]]:
    """Part and backend of every file of results."""
    return [tuple(path.stem.split("_")) for path in sorted(RESULTS.glob("*.json"))]


def tables(part: str, backend: str) -> dict[str, str]:
    """The tables of one part by the names of their markers, each with the line that says where it was measured."""
    found = load(part, backend)
    return {
        f"{name} {backend}": make(found["rows"]) + "\n\n" + circumstances(found["environment"])
        for name, make in TABLES[part].items()
    }


def circumstances(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"({environment['device']}; Python {environment['python']}, {versions}; {environment['date']})"


def write_into(page: pathlib.Path, name: str, text: str) -> None:
    """Puts ``text`` between the page's ``<!-- name -->`` markers, if it has them."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    page.write_text(marked.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page.read_text()))


# --- Pictures --------------------------------------------------------------------------------------------

BLUE, ORANGE, GRAY = "#0072B2", "#D55E00", "#777777"  # two colors that everybody can tell apart
COLORS = {"ours": BLUE, "optax": ORANGE}
LABELS = {"ours": "rmsprop_jax", "optax": "optax.rmsprop"}
DASHES = {"plain": "-", "centered + momentum": "--"}


def curves(ax: Axes, rows: list[Row], seconds: Callable[[Row, str], float], label: str) -> None:
    """Seconds over the number of arrays, a line for each optimizer and variant, labeled at its end."""
    for variant, dashes in DASHES.items():
        chosen = [row for row in rows if row["variant"] == variant]
        counts = [row["arrays"] for row in chosen]
        for name, color in COLORS.items():
            values = [seconds(row, name) for row in chosen]
            ax.loglog(counts, values, dashes, color=color, marker="o", markersize=3)
            ax.annotate(
                f"{LABELS[name]}, {variant}", (counts[-1], values[-1]), (5, 0), textcoords="offset points",
                color=color, va="center", fontsize=8,
            )  # fmt: skip
    ax.set_xlabel("arrays of 256 elements")
    ax.set_ylabel(label)


def tracing_picture(ax: Axes, rows: list[Row]) -> None:
    curves(ax, rows, lambda row, name: row["update"]["trace and lower"]["seconds"][name], "processor seconds")
    ax.set_title("Tracing and lowering an update")


def eager_picture(ax: Axes, rows: list[Row]) -> None:
    curves(ax, [row for row in rows if row["way"] == "update"], lambda row, name: row["seconds"][name], "seconds")
    ax.set_title("An update outside jit")


def step_picture(ax: Axes, rows: list[Row]) -> None:
    """A line for each tree, the largest on top, with a mark for ours, torch's and the yardstick."""
    chosen = [row for row in rows if row["variant"] == "plain" and row["dtype"] == "float32"]
    chosen.sort(key=lambda row: (row["parameters"], row["arrays"]))
    looks = {
        "copy": (GRAY, "|", "copy in place"),
        "ours": (BLUE, "o", "rmsprop_jax"),
        "torch": (ORANGE, "s", "torch.optim.RMSprop"),
    }
    places = range(len(chosen))
    for name, (color, marker, label) in looks.items():
        ax.plot([1e3 * row["seconds"][name] for row in chosen], places, marker, color=color, label=label)
    ax.set_yticks(
        places, [f"{row['tree']}\n{row['parameters']:,} in {row['arrays']:,} arrays" for row in chosen], fontsize=8
    )
    ax.grid(axis="y", linewidth=0.5, alpha=0.5)
    ax.set_xscale("log")
    ax.set_xlabel("milliseconds per step")
    ax.set_title("A step without momentum, float32")
    ax.figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=8)


PICTURES: dict[str, Callable[[Axes, list[Row]], None]] = {
    "step": step_picture,
    "tracing": tracing_picture,
    "eager": eager_picture,
}


def draw(part: str, backend: str) -> pathlib.Path:
    """Writes ``results/<part>_<backend>.png``."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = figure.add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    PICTURES[part](ax, load(part, backend)["rows"])
    path = RESULTS / f"{part}_{backend}.png"
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path
