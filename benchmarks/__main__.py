"""Measures everything, prints the tables and writes ``benchmarks/results/*.json``.

Run: ``python -m benchmarks`` from the project's folder, all parts in about nine minutes; ``python -m benchmarks step
eager`` for some of them; ``--full`` for every combination and more rounds; ``--report`` to measure nothing and put the
tables of the last results into ``README.md`` and ``benchmarks/RESULTS.md``, and their pictures beside the results. What
a step becomes on a TPU or a GPU that is not there, ``python -m benchmarks.compiled`` tells.
"""

import argparse
import importlib
import time

import jax

from benchmarks import report
from benchmarks.measure import save, this_device

PARTS = ("step", "tracing", "eager", "training", "recording", "centered")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="PART", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--full", action="store_true", help="every combination and more rounds; takes much longer")
    parser.add_argument("--report", action="store_true", help="measure nothing; write tables and pictures")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if options.report:
        write_report()
        return
    for part in options.parts:
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
            for page in report.PAGES:
                report.write_into(page, name, table)
        if part in report.PICTURES:
            report.draw(part, backend)


if __name__ == "__main__":
    main()
