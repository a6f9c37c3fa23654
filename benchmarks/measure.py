"""How to compare two programs on a noisy machine: both interleaved in one run, and ratios of neighbors."""

import datetime
import json
import os
import pathlib
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"
LOAD = os.getloadavg()[0]  # before anything is measured
PACKAGES = ("jax", "optax", "flax", "torch", "keras", "bitsandbytes", "libtpu", "jax-cuda12-pjrt")

# A call that does one whole step and waits until it is done.
Step = Callable[[], object]


def seconds(step: Step, repeats: int = 1) -> float:
    """The wall-clock time of one ``step``, as the mean of ``repeats`` in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def in_turns(steps: Mapping[str, Step], rounds: int, shortest: float = 0.02) -> dict[str, list[float]]:
    """The time of each step in each round.

    The order changes at random from round to round. A sample is as many calls in a row as should last ``shortest``
    seconds; the pause before it lets the threads of the one before fall asleep (OpenMP's go on spinning for a while).
    """
    names = list(steps)
    repeats = {}
    for name in names:
        steps[name]()
        repeats[name] = max(1, round(shortest / seconds(steps[name])))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in random.Random(turn).sample(names, len(names)):
            time.sleep(0.005)
            times[name].append(seconds(steps[name], repeats[name]))
    return times


def ratio(ours: Iterable[float], peer: Iterable[float]) -> dict[str, float]:
    """The median of the ratios round by round, and the quartiles around it."""
    low, middle, high = np.quantile([a / b for a, b in zip(ours, peer, strict=True)], [0.25, 0.5, 0.75])
    return {"median": float(middle), "low": float(low), "high": float(high)}


def compared(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Median seconds of everybody, and the ratio of ``ours`` to everybody else."""
    return {
        "seconds": {name: statistics.median(samples) for name, samples in times.items()},
        "ratio": {name: ratio(times["ours"], samples) for name, samples in times.items() if name != "ours"},
    }


def save(part: str, rows: list[dict[str, Any]], backend: str, device: str) -> pathlib.Path:
    """Writes ``results/<part>_<backend>.json``, with what is needed to judge the figures later."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{part}_{backend}.json"
    path.write_text(json.dumps({"environment": environment(device), "rows": rows}, indent=1) + "\n")
    return path


def load(part: str, backend: str = "cpu") -> dict[str, Any]:
    """What :func:`save` wrote."""
    found: dict[str, Any] = json.loads((RESULTS / f"{part}_{backend}.json").read_text())
    return found


def environment(device: str) -> dict[str, Any]:
    """Date, hardware and versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def this_device() -> str:
    """The accelerator that JAX uses, or else the processor, its cores and how busy they were before."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return str(device.device_kind)
    return f"{_processor()}, {os.cpu_count()} cores, load {LOAD:.1f}"


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        return None
