"""The tables about many devices: ``layouts``, ``exchanged`` and ``meshes``."""

from collections.abc import Callable

from benchmarks.cells import Row, markdown, spread


def megabytes(row: Row, kind: str) -> str:
    """Of a figure in bytes per parameter."""
    return f"{row[kind] * row['parameters'] / 1e6:.3g}"


def operations(row: Row) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in row["collectives"].items()) or "none"


def layouts_table(rows: list[Row]) -> str:
    """What a device holds, and what the update makes it send."""
    return markdown(
        [
            "model",
            "layout",
            "devices",
            "state on a device, MB",
            "collectives in an update",
            "MB in them",
            "of rows, MB",
        ],
        (
            [
                row["model"],
                row["layout"],
                str(row["devices"]),
                f"{row['state'] / 1e6:.2f}" if "state" in row else "–",
                operations(row),
                megabytes(row, "whole"),
                megabytes(row, "small"),
            ]
            for row in sorted(rows, key=lambda row: row.get("model", ""))
            if row["what"] in ("layout", "control")
        ),
    )


def bits_table(rows: list[Row]) -> str:
    """ZeRO beside the replicated state, and beside one device."""
    return markdown(
        ["program", "setting", "devices", "fma", "elements", "differ", "units at most", "same bits as one device"],
        (
            [
                row["program"],
                row["variant"],
                str(row["devices"]),
                "yes" if row["fma"] else "no",
                f"{row['elements']:,}",
                f"{row['differ']:,}",
                f"{row['units']:.3g}",
                "yes" if row["one device"] else "no",
            ]
            for row in rows
            if row["what"] == "bits"
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
