"""Measures everything, prints the tables and writes ``benchmarks/results/*.json``.

Run it from the project's folder:

- ``python -m benchmarks`` measures all parts.
- ``python -m benchmarks step eager`` measures some of them.
- ``--full`` measures every combination, in more rounds.
- ``--device`` measures steps on the GPU or TPU that JAX sees, see ``benchmarks.device``.
- ``--report`` measures nothing. It writes the tables of the last results into ``benchmarks/RESULTS.md`` and
  ``README.md``, and the pictures beside the results.

``python -m benchmarks.compiled`` compiles a step for a TPU or a GPU that need not be there, and
``python -m benchmarks.kernels`` one whose state rests in 8 or 16 bits.
"""

import argparse
import importlib
import time

import jax

from benchmarks import device, report
from benchmarks.measure import save, this_device

PARTS = (
    "step", "tracing", "eager", "training", "recording", "centered",
    "storage", "rounding", "loss", "compressed", "collectives", "layouts", "exchanged", "meshes",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="PART", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--full", action="store_true", help="every combination and more rounds; takes much longer")
    parser.add_argument("--report", action="store_true", help="measure nothing; write tables and pictures")
    parser.add_argument("--device", action="store_true", help="measure steps on the GPU or TPU that JAX sees")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if options.report:
        write_report()
        return
    if options.device and (reason := device.refusal(jax.default_backend())):
        parser.error(reason)
    for part in ("device",) if options.device else options.parts:
        measure(part, options.full)


def measure(part: str, full: bool) -> None:
    start = time.perf_counter()
    print(f"\n## {part}\n", flush=True)
    rows = importlib.import_module(f"benchmarks.{part}").measure(full)
    path = save(part, rows, jax.default_backend(), this_device())
    for table in report.tables(part, jax.default_backend()).values():
        print(table, end="\n\n")
    print(f"wrote {path} after {time.perf_counter() - start:.0f} s", flush=True)


def write_report() -> None:
    for part, backend in report.measured():
        for name, table in report.tables(part, backend).items():
            report.write_into(report.PAGE, name, table)
        if part in report.PICTURES:
            report.draw(part, backend)
    report.write_into(report.README, "three figures", report.three_figures("cpu"))


if __name__ == "__main__":
    main()
