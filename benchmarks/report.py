"""The tables and pictures of the measurements, made from ``results/*.json`` and from nothing else."""

import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measure import RESULTS, load

Row = dict[str, Any]


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(ratio: dict[str, float] | None) -> str:
    """A median with its quartiles; a dash for what was not measured."""
    return f"**{ratio['median']:.2f}** ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "–"


def milliseconds(value: float) -> str:
    return f"{1e3 * value:.3g}"


# --- Tables ----------------------------------------------------------------------------------------------


def step_table(rows: list[Row]) -> str:
    """Our step over everybody else's."""
    named = [name for name in rows[0]["seconds"] if name != "ours"]
    peers = [name for name in named if name != "copy"] + ["copy"]
    return markdown(
        ["parameters", "setting", "dtype", "ours, ms", *(f"÷ {peer}" for peer in peers)],
        (
            [row["tree"], row["variant"], row["dtype"], milliseconds(row["seconds"]["ours"])]
            + [spread(row["ratio"].get(peer)) for peer in peers]
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
            "gradient alone, ms",
            "step, ms",
            "step ÷ gradient alone",
            "step ÷ with optax",
        ],
        (
            [row["model"], f"{row['parameters']:,}", row["variant"]]
            + [milliseconds(row["seconds"][name]) for name in ("gradient alone", "ours")]
            + [spread(row["ratio"][name]) for name in ("gradient alone", "optax")]
            for row in rows
        ),
    )


# The tables of each part, by the name of their markers.
TABLES: dict[str, dict[str, Callable[[list[Row]], str]]] = {
    "step": {"step": step_table, "memory": memory_table},
    "tracing": {"tracing": tracing_table},
    "eager": {"eager": eager_table},
    "training": {"training": training_table},
}


def tables(part: str, backend: str) -> dict[str, str]:
    """The tables of one part, each with the line that says where it was measured."""
    found = load(part, backend)
    return {
        name: make(found["rows"]) + "\n\n" + circumstances(found["environment"]) for name, make in TABLES[part].items()
    }


def circumstances(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    device = f"{environment['device']}, {environment['cores']} cores"
    return f"({device}; Python {environment['python']}, {versions}; {environment['date']})"


def write_into(page: pathlib.Path, name: str, text: str) -> None:
    """Puts ``text`` between the page's ``<!-- name -->`` markers, if it has them."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    page.write_text(marked.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page.read_text()))


# --- Pictures --------------------------------------------------------------------------------------------

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # two colours that everybody can tell apart
COLOURS = {"ours": BLUE, "optax": ORANGE}
LABELS = {"ours": "rmsprop_jax", "optax": "optax.rmsprop"}
DASHES = {"plain": "-", "centered + momentum": "--"}


def curves(ax: Axes, rows: list[Row], seconds: Callable[[Row, str], float]) -> None:
    """Seconds over the number of arrays, a line for each optimizer and variant, labelled at its end."""
    for variant, dashes in DASHES.items():
        chosen = [row for row in rows if row["variant"] == variant]
        counts = [row["arrays"] for row in chosen]
        for name, colour in COLOURS.items():
            values = [seconds(row, name) for row in chosen]
            ax.loglog(counts, values, dashes, color=colour, marker="o", markersize=3)
            ax.annotate(
                f"{LABELS[name]}, {variant}", (counts[-1], values[-1]), (5, 0), textcoords="offset points",
                color=colour, va="center", fontsize=8,
            )  # fmt: skip
    ax.set_xlabel("arrays of 256 elements")
    ax.set_ylabel("seconds")


def tracing_picture(ax: Axes, rows: list[Row]) -> None:
    curves(ax, rows, lambda row, name: row["update"]["trace and lower"]["seconds"][name])
    ax.set_title("Tracing and lowering an update")


def eager_picture(ax: Axes, rows: list[Row]) -> None:
    curves(ax, [row for row in rows if row["way"] == "update"], lambda row, name: row["seconds"][name])
    ax.set_title("An update outside jit")


def step_picture(ax: Axes, rows: list[Row]) -> None:
    """Ours, torch's and the yardstick over the number of parameters."""
    chosen = [row for row in rows if row["variant"] == "plain" and row["dtype"] == "float32"]
    chosen.sort(key=lambda row: (row["parameters"], row["arrays"]))
    looks = {
        "torch": (ORANGE, "s", "torch.optim.RMSprop"),
        "ours": (BLUE, "o", "rmsprop_jax"),
        "copy": (GREY, "_", "copy in place"),
    }
    for name, (colour, marker, label) in looks.items():
        sizes = [row["parameters"] for row in chosen]
        ax.loglog(sizes, [row["seconds"][name] for row in chosen], marker, color=colour, label=label)
    for row in chosen:
        ax.annotate(
            row["tree"],
            (row["parameters"], row["seconds"]["torch"]),
            (0, 8),
            textcoords="offset points",
            fontsize=7,
            ha="center",
        )
    ax.legend(frameon=False, loc="lower right")
    ax.set_xlabel("parameters")
    ax.set_ylabel("seconds per step")
    ax.set_title("A compiled step")


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
