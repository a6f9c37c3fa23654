"""The tables about many devices: ``layouts``, ``exchanged`` and ``meshes``."""

from collections.abc import Callable
from typing import Any

from benchmarks.cells import Row, markdown, spread


def megabytes(row: Row, kind: str) -> str:
    """Of a figure in bytes per parameter."""
    return f"{row[kind] * row['parameters'] / 1e6:.3g}"


def operations(row: Row) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in row["collectives"].items()) or "none"


def by_devices(rows: list[Row], *names: str) -> list[list[Row]]:
    """Rows that differ in nothing of ``names``, but in the number of devices: together, the fewest devices first."""
    found: dict[Any, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["devices"]):
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(found.values())


def layouts_table(rows: list[Row]) -> str:
    """What a device holds, and what the update makes it send where there are the most devices."""
    groups = by_devices([row for row in rows if row["what"] in ("layout", "control")], "model", "layout")
    numbers = [row["devices"] for row in groups[0]]
    return markdown(
        [
            *("model", "layout"),
            *(f"state on each of {number}, MB" for number in numbers),
            *(f"collectives of {numbers[-1]}", "MB in them", "of rows, MB"),
        ],
        (
            [
                *(group[0]["model"], group[0]["layout"]),
                *(f"{row['state'] / 1e6:.2f}" if "state" in row else "–" for row in group),
                *(operations(group[-1]), megabytes(group[-1], "whole"), megabytes(group[-1], "small")),
            ]
            for group in groups
        ),
    )


def bits_table(rows: list[Row]) -> str:
    """ZeRO beside the replicated state, and beside one device."""
    groups = by_devices([row for row in rows if row["what"] == "bits"], "fma", "program", "variant")
    numbers = [row["devices"] for row in groups[0]]
    return markdown(
        [
            *("program", "setting", "fma", "elements"),
            *(f"differ on {number}" for number in numbers),
            *("units at most", "same bits as one device"),
        ],
        (
            [
                *(group[0]["program"], group[0]["variant"], "yes" if group[0]["fma"] else "no"),
                f"{group[0]['elements']:,}",
                *(f"{row['differ']:,}" for row in group),
                f"{max(row['units'] for row in group):.3g}",
                "yes" if all(row["one device"] for row in group) else "no",
            ]
            for group in groups
        ),
    )


def exchanged_table(rows: list[Row]) -> str:
    """The collectives of a training step, in bytes per parameter."""
    return markdown(
        ["layout", "collectives", "bytes in them", "sent by a device"],
        (
            [
                row["layout"],
                operations(row),
                ", ".join(f"{size:.2f} {kind}" for kind, size in row["bytes"].items()) or "0",
                f"{row['sent']:.2f}",
            ]
            for row in rows
        ),
    )


def meshes_table(rows: list[Row]) -> str:
    """The stages before a step, and their ratios to the smallest mesh."""
    stages = list(rows[0]["seconds"])
    first = rows[0]["devices"]
    return markdown(
        [
            "layout",
            "devices",
            *(f"{stage}, s" for stage in stages),
            *(f"{stage} ÷ {first} devices" for stage in stages),
        ],
        (
            [row["layout"], str(row["devices"]), *(f"{row['seconds'][stage]:.2f}" for stage in stages)]
            + ["1" if row["devices"] == first else spread(row["ratio"][stage]) for stage in stages]
            for row in rows
        ),
    )


TABLES: dict[str, dict[str, Callable[[list[Row]], str]]] = {
    "layouts": {"layouts": layouts_table, "layouts bits": bits_table},
    "exchanged": {"exchanged": exchanged_table},
    "meshes": {"meshes": meshes_table},
}
