"""Runs the notebooks and all numeric tests as other processors would: ``make portability``.

XLA, PyTorch and oneDNN choose their instructions by the processor, and the order in which numbers are added depends on
the instructions. A number that a test asserts must hold under all of them. So this script runs the same tests under
every combination of

- the newest instructions that XLA may use: SSE4.2, AVX, AVX2, AVX-512;
- those that PyTorch, oneDNN and MKL may use: none beyond the oldest ("default"), AVX2, AVX-512;
- one thread and two.

XLA cannot compile float16 for processors as old as some of these. Tests that fail for this reason alone are counted
separately ("not compiled"). A test that does not import torch runs once for all of torch's settings. A setting that
this machine cannot run still has a row in the table, which says so. The exit status is 1 if anything failed.

Run: ``python tests/portability.py`` for everything; ``--xla SSE4_2 --torch default --threads 1`` for one setting (each
option takes several values); ``notebooks`` or ``tests`` for a part.
"""

import argparse
import os
import pathlib
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = pathlib.Path(__file__).parents[1]

# What the processor must have, in the words of /proc/cpuinfo, for the setting to mean anything.
XLA = {
    "SSE4_2": {"sse4_2"},
    "AVX": {"avx"},
    "AVX2": {"avx2", "fma"},
    "AVX512": {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"},
}
TORCH = {"default": {"sse4_2"}, "avx2": {"avx2", "fma"}, "avx512": XLA["AVX512"]}
ONEDNN = {"default": "SSE41", "avx2": "AVX2", "avx512": "AVX512_CORE"}
MKL = {"default": "SSE4_2", "avx2": "AVX2", "avx512": "AVX512"}

# Files that assert no number that the processor computes. Everything else in tests/ runs here, new files included.
NOT_NUMERIC = {
    "test_arguments.py",
    "test_compare.py",
    "test_cost.py",
    "test_device.py",
    "test_distributed.py",  # compares bits of one machine with each other, under AVX
    "test_layers.py",
    "test_plotting.py",
    "test_portability.py",
}
# Only some tests of these files are about numbers.
SOME_OF = {
    "test_benchmarks.py": [
        "test_all_peers_follow_the_same_rule",
        "test_centered_variance_is_exact_where_nothing_cancels",
    ],
    "test_examples.py": [
        "test_one_update_prints_the_loss_that_the_formulas_give",
        "test_run_reports_every_epoch_and_ends_with_the_test_accuracy",
        "test_default_settings_reach_98_percent",
        "test_optimizer_clips_and_then_does_what_torch_does_at_the_scheduled_rate",
    ],
    "test_notebooks.py": [],
}
# What XLA says where it needs instructions that max_isa forbids.
NOT_COMPILED = "Failed to materialize symbols"
# Runs a command on some processors only.
ON_PROCESSORS = """import os, sys
os.sched_setaffinity(0, set(map(int, sys.argv[1].split(","))))
os.execv(sys.argv[2], sys.argv[2:])"""
NOTEBOOK_TEST = "tests/test_notebooks.py::test_notebook_puts_out_the_numbers_it_is_committed_with"


class Setting(NamedTuple):
    xla: str
    torch: str
    threads: int

    def __str__(self) -> str:
        return f"XLA {self.xla}, torch {self.torch}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    def environment(self) -> dict[str, str]:
        """The variables that limit instructions and threads; :meth:`Job.run` limits the processors."""
        return {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa={self.xla}".strip(),
            "ATEN_CPU_CAPABILITY": self.torch,
            "ONEDNN_MAX_CPU_ISA": ONEDNN[self.torch],
            "MKL_ENABLE_INSTRUCTIONS": MKL[self.torch],
            "OMP_NUM_THREADS": str(self.threads),
        }


class Outcome(NamedTuple):
    passed: int = 0
    skipped: int = 0
    failures: tuple[str, ...] = ()  # the name of each test and the first line of its error
    not_compiled: int = 0

    def __add__(self, other: tuple) -> "Outcome":
        return Outcome(*(a + b for a, b in zip(self, other, strict=True)))

    def __str__(self) -> str:
        if self.failures:
            return f"{len(self.failures)} FAILED"
        others = f", {self.not_compiled} not compiled" if self.not_compiled else ""
        return f"{self.passed} ok{others}" if self.passed else "skipped"


class Job(NamedTuple):
    """One run of pytest: one setting, and either the tests that import torch or those that do not."""

    setting: Setting
    tests: tuple[str, ...]

    def run(self, processors: Sequence[int], folder: pathlib.Path) -> dict[str, Outcome]:
        """The outcome for each column of the table."""
        compiled = folder / f"{self.setting.xla}-{self.setting.threads}"  # the programs depend on both
        compiled.mkdir(exist_ok=True)
        report = pathlib.Path(tempfile.mkstemp(suffix=".xml", dir=folder)[1])
        environment = (
            os.environ
            | self.setting.environment()
            | {
                "JAX_COMPILATION_CACHE_DIR": str(compiled),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
        )
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *self.tests]
        command = [sys.executable, "-c", ON_PROCESSORS, ",".join(map(str, processors)), *pytest]
        process = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        found = outcomes(report.read_text())
        if process.returncode not in (0, 1) or not found:  # it was killed, or could not collect its tests
            last = " | ".join((process.stdout + process.stderr).strip().splitlines()[-3:])
            found[column(self.tests[0])] = Outcome(failures=(f"pytest exited with {process.returncode}: {last}",))
        return found


# --- What is run -----------------------------------------------------------------------------------------


def imports_torch(path: pathlib.Path) -> bool:
    """Whether a test or a notebook imports torch."""
    return bool(re.search(r"\bimport torch\b|importorskip\(.{0,2}torch\b", path.read_text()))


def notebooks() -> Iterator[tuple[str, bool]]:
    """Each notebook's test, and whether it imports torch."""
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        yield f"{NOTEBOOK_TEST}[{path.stem}]", imports_torch(path)


def numeric_tests() -> Iterator[tuple[str, bool]]:
    """Each file of tests or single test that compares numbers, and whether it imports torch."""
    yield "rmsprop_jax", False  # the examples in its docstrings
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if path.name not in NOT_NUMERIC:
            for name in SOME_OF.get(path.name, [""]):
                yield f"tests/{path.name}" + (f"::{name}" if name else ""), imports_torch(path)


def column(test: str) -> str:
    """The column of the table that a test belongs to."""
    notebook = re.search(r"test_notebook_puts_out\w*\[(\d\d)", test)
    return notebook[1] if notebook else "tests"


def features() -> set[str]:
    """What the processor can do."""
    try:
        return set(re.search(r"^flags\s*:(.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    except (OSError, TypeError):  # no such file, or no such line in it
        return set()


def missing(setting: Setting, features: set[str], processors: int) -> bool:
    """Whether this machine cannot run the setting."""
    return not (XLA[setting.xla] | TORCH[setting.torch] <= features and setting.threads <= processors)


def jobs(settings: Sequence[Setting], parts: Sequence[str]) -> Iterator[Job]:
    """Two jobs for a setting, or one if it differs from another in torch's instructions only."""
    tests = [test for part in parts for test in {"notebooks": notebooks, "tests": numeric_tests}[part]()]
    seen = set()
    for setting in settings:
        yield Job(setting, tuple(name for name, torch in tests if torch))
        if (setting.xla, setting.threads) not in seen:
            seen.add((setting.xla, setting.threads))
            yield Job(setting, tuple(name for name, torch in tests if not torch))


# --- How it went -----------------------------------------------------------------------------------------


def outcomes(report: str) -> dict[str, Outcome]:
    """The outcome for each column, from a report in the format of JUnit."""
    found: dict[str, Outcome] = {}
    for case in ElementTree.fromstring(report).iter("testcase") if report else ():
        name = case.get("name", "")
        bad = [case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None]
        if bad:
            message = (bad[0].get("message") or "").strip().splitlines() or [""]
            outcome = Outcome(failures=(f"{case.get('classname')}::{name}: {message[0][:300]}",))
            if NOT_COMPILED in message[0]:
                outcome = Outcome(not_compiled=1)
        elif case.find("skipped") is not None:
            outcome = Outcome(skipped=1)
        else:
            outcome = Outcome(passed=1)
        found[column(name)] = found.get(column(name), Outcome()) + outcome
    return found


def table(settings: Sequence[Setting], results: dict[Setting, dict[str, Outcome]]) -> str:
    """A row for each setting, a column for each notebook and for the tests. No results: not on this machine."""
    columns = sorted({name for found in results.values() for name in found}, key=lambda name: (name == "tests", name))
    rows = [["XLA", "torch", "threads", *columns]]
    for setting in settings:
        found = results.get(setting)
        cells = ["not on this machine"] if found is None else [str(found.get(name, "as above")) for name in columns]
        rows.append([setting.xla, setting.torch, str(setting.threads), *cells])
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in (rows if i < 3 else whole)) for i in range(len(rows[0]))]
    lines = ("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def run_all(todo: Sequence[Job], processors: Sequence[int]) -> dict[Setting, dict[str, Outcome]]:
    """Runs as many jobs at once as there are processors, and says how each went."""
    waiting: queue.Queue[Job] = queue.Queue()
    for job in todo:
        waiting.put(job)
    results: dict[Setting, dict[str, Outcome]] = {}

    def work(place: int) -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            start = time.monotonic()
            mine = [processors[(place + i) % len(processors)] for i in range(job.setting.threads)]
            try:
                found = job.run(mine, folder)
            except Exception as error:  # a thread that dies must not look like one that found nothing
                found = {column(job.tests[0]): Outcome(failures=(f"{type(error).__name__}: {error}",))}
            with lock:
                whole = results.setdefault(job.setting, {})
                for name, outcome in found.items():
                    whole[name] = whole.get(name, Outcome()) + outcome
                text = ", ".join(f"{name} {outcome}" for name, outcome in sorted(found.items()))
                print(f"{job.setting}: {text} ({time.monotonic() - start:.0f} s)", flush=True)

    lock = threading.Lock()
    with tempfile.TemporaryDirectory(prefix="rmsprop_jax-portability-") as name:
        folder = pathlib.Path(name)
        workers = [threading.Thread(target=work, args=(i,)) for i in range(len(processors))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/portability.py", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["notebooks", "tests"], metavar="PART", help="notebooks, tests")
    parser.add_argument("--xla", nargs="+", choices=XLA, default=list(XLA))
    parser.add_argument("--torch", nargs="+", choices=TORCH, default=list(TORCH))
    parser.add_argument("--threads", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    options = parser.parse_args()
    if unknown := set(options.parts) - {"notebooks", "tests"}:
        parser.error(f"PART must be notebooks or tests, got {', '.join(sorted(unknown))}")
    settings = [Setting(x, t, n) for x in options.xla for n in options.threads for t in options.torch]
    if not hasattr(os, "sched_getaffinity"):
        parser.error("processors can be assigned on Linux only")
    processors = sorted(os.sched_getaffinity(0))
    here = [setting for setting in settings if not missing(setting, features(), len(processors))]
    results = run_all(list(jobs(here, options.parts)), processors)
    print("\n" + table(settings, results))
    failures = [(setting, text) for setting in here for x in results[setting].values() for text in x.failures]
    for setting, text in failures:
        print(f"\n{setting}\n  {text}")
    if failures or not here:  # if no setting runs here, nothing was shown
        sys.exit(1)


if __name__ == "__main__":
    main()
