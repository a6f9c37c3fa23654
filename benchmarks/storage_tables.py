"""The tables about states in 8 and 16 bits, made from ``results/*.json`` alone."""

from collections.abc import Callable, Iterator

from benchmarks.cells import Row, markdown, milliseconds, percent, spread


def bytes_table(rows: list[Row]) -> str:
    """Bytes per number of the state."""
    return markdown(
        [
            "model",
            "setting",
            *(f"{bits} bits: {which}" for bits in (8, 16) for which in ("encoded arrays", "all arrays")),
            "numbers in small arrays",
        ],
        (
            [row["model"], row["variant"]]
            + [f"{row['per_value'][bits][which]:.3f}" for bits in ("8", "16") for which in ("encoded", "all")]
            + [f"{row['per_value']['8']['share of small arrays']:.2%}"]
            for row in rows
        ),
    )


def bytes_of_libraries_table(rows: list[Row]) -> str:
    """Bytes per parameter: weights + state = both."""
    names = list(rows[0]["per_parameter"])  # the first row has everybody

    def cell(found: dict[str, float] | None) -> str:
        if found is None:
            return "–"
        return f"{found['weights']} + {found['state']:.2f} = {found['weights'] + found['state']:.2f}"

    return markdown(
        ["model", "setting", *names],
        ([row["model"], row["variant"], *(cell(row["per_parameter"].get(name)) for name in names)] for row in rows),
    )


def chosen(rows: list[Row], **which: object) -> Iterator[Row]:
    return (row for row in rows if which.items() <= row.items())


def worst(values: dict[str, float]) -> float:
    """The one that is farthest from 0."""
    return max(values.values(), key=abs)


def root_table(rows: list[Row]) -> str:
    """Errors of √v: the mean of the size where it is worst, and the rms over all."""
    rows = list(chosen(rows, kind="root"))
    phases = list(dict.fromkeys(row["gradients"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    alphas = list(dict.fromkeys(row["alpha"] for row in rows))

    def cells(method: str, alpha: float) -> Iterator[str]:
        for phase in phases:
            (row,) = chosen(rows, method=method, alpha=alpha, gradients=phase)
            yield f"{percent(worst(row['mean']))}, {100 * row['rms of all']:.3g}"

    return markdown(
        ["state", "alpha", *(f"{phase}: mean, rms in %" for phase in phases)],
        ([method, f"{alpha:g}", *cells(method, alpha)] for method in methods for alpha in alphas),
    )


def sizes_table(rows: list[Row]) -> str:
    """Errors of √v with steady gradients at alpha 0.99, by the size of the gradients in their row."""
    rows = list(chosen(rows, kind="root", alpha=0.99, gradients="steady"))
    return markdown(
        ["state", *(f"{size}: mean, rms in %" for size in rows[0]["mean"])],
        (
            [row["method"], *(f"{percent(row['mean'][size])}, {100 * row['rms'][size]:.3g}" for size in row["mean"])]
            for row in rows
        ),
    )


def periodic_table(rows: list[Row]) -> str:
    """The mean error of √v by the period of the gradients: the worst down to 0.001 of the row, and at 0.0001."""
    rows = list(chosen(rows, kind="periodic"))
    periods = list(dict.fromkeys(row["period"] for row in rows))
    pairs = list(dict.fromkeys((row["method"], row["alpha"]) for row in rows))

    def cell(method: str, alpha: float, period: int) -> str:
        (row,) = chosen(rows, method=method, alpha=alpha, period=period)
        mean = dict(row["mean"])
        smallest = mean.pop("0.0001")
        return f"{percent(worst(mean))}, {percent(smallest)}"

    return markdown(
        ["state", "alpha", *(f"{period} steps, %" for period in periods)],
        ([method, f"{alpha:g}", *(cell(method, alpha, period) for period in periods)] for method, alpha in pairs),
    )


def signed_table(rows: list[Row]) -> str:
    """The rms error of a momentum over its own rms, by the size of the gradients in their row."""
    rows = list(chosen(rows, kind="signed"))
    return markdown(
        ["state", *(f"{size}: %" for size in rows[0]["rms"])],
        ([row["method"], *(f"{100 * value:.2f}" for value in row["rms"].values())] for row in rows),
    )


def difference(found: dict[str, float] | None) -> str:
    """A mean with the smallest and the largest, in percent."""
    if found is None:
        return "–"
    return f"**{percent(found['mean'])}** ({percent(found['low'])} to {percent(found['high'])})"


def loss_table(rows: list[Row]) -> str:
    """Differences of the loss after training, by how the state rests."""
    rows = [row for row in rows if row["weights"] == "float32"]
    states = list(dict.fromkeys(row["state"] for row in rows))
    pairs = list(dict.fromkeys((row["model"], row["variant"]) for row in rows))

    def cells(model: str, variant: str) -> Iterator[str]:
        found = {row["state"]: row for row in chosen(rows, model=model, variant=variant)}
        yield f"{found['float32']['float32']:.4f}"
        for state in states:
            yield difference(found[state]["difference"])

    heads = ["noise" if state == "float32" else state for state in states]
    return markdown(
        ["model", "setting", "float32", *(f"{head}, %" for head in heads)],
        ([model, variant, *cells(model, variant)] for model, variant in pairs),
    )


def weights_table(rows: list[Row]) -> str:
    """Differences of the loss after training, by how weights in bfloat16 are rounded."""
    rows = list(chosen(rows, what="weights"))
    ways = list(dict.fromkeys(row["weights"] for row in rows))
    keys = list(dict.fromkeys((row["model"], row["variant"], row["state"]) for row in rows))

    def cell(model: str, variant: str, state: str, weights: str) -> str:
        (row,) = chosen(rows, model=model, variant=variant, state=state, weights=weights)
        return difference(row["difference"])

    return markdown(
        ["model", "setting", "state", *(f"{way}, %" for way in ways)],
        ([*key, *(cell(*key, way) for way in ways)] for key in keys),
    )


def over_float32(row: Row) -> str:
    return "1" if row["state"] == "float32" else spread(row["ratio"])


def compressed_table(rows: list[Row]) -> str:
    """Steps over those with a state in float32, with the range over processes."""
    return markdown(
        ["setting", "state", "ms", "÷ float32", "allocated in a step, bytes per parameter"],
        (
            [row["rule"], row["state"], milliseconds(row["seconds"]), over_float32(row), f"{row['temporary']:.2f}"]
            for row in rows
        ),
    )


def kernels_table(rows: list[Row]) -> str:
    """What a step became for a device on which nothing ran, per parameter of one array."""
    kinds = {"kernels": "kernels", "accessed": "bytes read and written", "temporary": "bytes allocated"}
    states = list(rows[0]["per_parameter"])
    return markdown(
        ["setting", *(f"{kind}: {state}" for kind in kinds.values() for state in states)],
        (
            [row["variant"], *(f"{row['per_parameter'][state][kind]:g}" for kind in kinds for state in states)]
            for row in rows
        ),
    )


def collectives_table(rows: list[Row]) -> str:
    """What devices exchange in an update, and whether it gives the bits of one device."""
    return markdown(
        [
            "spread over devices",
            "bits",
            "setting",
            "collectives",
            "arrays in them",
            "same bits",
            "same bits without fma",
        ],
        (
            [row["layout"], str(row["bits"]), row["variant"], str(row["collectives"]), str(row["arrays"])]
            + ["yes" if row[which] else "no" for which in ("same", "same without fma")]
            for row in rows
        ),
    )


TABLES: dict[str, dict[str, Callable[[list[Row]], str]]] = {
    "storage": {"storage": bytes_table, "storage memory": bytes_of_libraries_table},
    "rounding": {
        "rounding": root_table,
        "rounding sizes": sizes_table,
        "periodic": periodic_table,
        "signed": signed_table,
    },
    "loss": {"loss": loss_table, "weights": weights_table},
    "compressed": {"compressed": compressed_table},
    "kernels": {"kernels": kernels_table},
    "collectives": {"collectives": collectives_table},
}
