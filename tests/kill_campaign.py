"""Kills processes of a training run at random moments, and shows that nothing is lost: ``make kill-campaign``.

A run has 1 to 8 devices in 1 to 4 processes, its state spread by ``sharding.zero``. Again and again, one of its
processes is killed: at any moment of start-up, training and saving. The run goes on from its last checkpoint, on
another number of processes and devices. When its steps are done, parameters and state must be, bit for bit, those of a
run on one device that nobody killed.

Start-up, steps and checkpoints are those of ``examples/train_distributed.py``. The loss is linear and its data are
small integers, so that sums over the batch are exact, in whatever order devices add them up. Everything else is done
element by element. Multiplications and additions could still be fused on one layout and not on another. So XLA may use
no instructions newer than AVX, which has none that are fused.
"""

import argparse
import dataclasses
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np

EXAMPLES = Path(__file__).parent.parent / "examples"

# Processes, and devices of each.
LAYOUTS = [(1, 1), (2, 1), (1, 4), (2, 2), (1, 8), (4, 1)]
STEPS = 240
SAVE_EVERY = 4
BATCH = 16
NAP = 0.02  # seconds in a step, so that kills hit steps and not only the start
HEARTBEAT = 10  # seconds
MOMENTS = {"while it starts": 1, "while it trains": 2, "while it saves": 2}  # and how often each is chosen


# --- One process of the run --------------------------------------------------------------------------------------


def work(coordinator: str, processes: int, process: int, devices: int, output: str) -> None:
    """Trains, and says on standard output what has happened so far. At the end, process 0 writes all arrays."""
    sys.path.insert(0, str(EXAMPLES))
    # The example's data and network are not needed here, and their imports take as long as all others.
    sys.modules["train_digits"] = types.SimpleNamespace(Digits=None, Settings=dict[str, Any])  # type: ignore[assignment]
    import jax
    import jax.numpy as jnp
    import train_distributed as example
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec

    from rmsprop_jax import rmsprop

    def init() -> dict[str, jax.Array]:
        w = jnp.arange(64 * 24.0).reshape(64, 24) / 64
        return {"w": w, "b": jnp.zeros(24), "c": jnp.ones(3), "d": jnp.ones(())}  # the last two cannot be spread

    def mean_loss(params: dict[str, jax.Array], rows: jax.Array) -> jax.Array:
        outputs = rows[:, :64] @ params["w"] + params["b"]
        rest = rows[:, 64:67] @ params["c"] + rows[:, 67] * params["d"]
        return jnp.mean(outputs @ jnp.arange(-12.0, 12.0) + rest)

    threading.Thread(target=example.end_with_parent, daemon=True).start()
    mesh = example.connect(coordinator, processes, process, HEARTBEAT, devices)
    print("connected", flush=True)
    with example.ends_at_once():
        everywhere, in_parts = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
        checkpoints = example.open_checkpoints(Path(output))
        tx = rmsprop(0.01, alpha=0.9, momentum=0.9)
        done, params, state, tx = example.start(checkpoints, init, tx, everywhere)
        print("started", done, flush=True)
        step = example.make_step(mean_loss, tx)
        for number in range(done, STEPS):
            rows = np.random.default_rng(number).integers(-8, 9, (BATCH, 68)).astype(np.float32)
            params, state, loss = step(params, state, example.to_devices(rows, in_parts))
            loss.block_until_ready()
            if number == done:
                print("training", done, flush=True)
            time.sleep(NAP)
            if (number + 1) % SAVE_EVERY == 0:
                example.save(checkpoints, number + 1, params, state, {})
                if number + 1 - SAVE_EVERY > done:
                    print("saved", number + 1 - SAVE_EVERY, flush=True)  # which the last line has waited for
        checkpoints.close()
        whole = multihost_utils.process_allgather((params, state), tiled=True)
        if process == 0:
            named = {
                jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(whole)
            }
            np.savez(Path(output) / "end.npz", **named)
        print("ended", flush=True)


# --- One attempt -------------------------------------------------------------------------------------------------


class Attempt:
    """The processes of one start, and what they have said."""

    def __init__(self, layout: tuple[int, int], output: Path) -> None:
        processes, devices = layout
        address = f"127.0.0.1:{free_port()}"
        self.output, self.logs = output, [output.parent / f"{output.name}-{i}.log" for i in range(processes)]
        environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "XLA_FLAGS": flags()}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # in which a killed process could leave half a program
        self.running = []
        for i, log in enumerate(self.logs):
            options = json.dumps([address, processes, i, devices, str(output)])
            with log.open("w") as file:
                self.running.append(
                    subprocess.Popen(
                        [sys.executable, __file__, "--worker", options],
                        stdin=subprocess.PIPE,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=environment,
                    )
                )

    def said(self, word: str) -> list[list[str]]:
        """For each process, what it said after ``word``."""
        return [re.findall(rf"^{word} ?(\d*)$", log.read_text(errors="replace"), re.MULTILINE) for log in self.logs]

    def is_over(self) -> bool:
        return any(p.poll() is not None for p in self.running)

    def end(self, patience: float) -> tuple[float, bool]:
        """Waits for all processes, and kills those that are still there after ``patience`` seconds; were there any?"""
        start = time.monotonic()
        while any(p.poll() is None for p in self.running) and time.monotonic() - start < patience:
            time.sleep(0.01)
        took, left = time.monotonic() - start, [p for p in self.running if p.poll() is None]
        for p in self.running:
            p.kill()
            p.wait()
            p.stdin.close()
        return took, bool(left)

    def text(self) -> str:
        return "\n".join(f"--- process {i}\n{log.read_text(errors='replace')}" for i, log in enumerate(self.logs))


def flags() -> str:
    isa = "--xla_cpu_max_isa=AVX" if platform.machine().lower() in ("x86_64", "amd64") else ""
    return f"{os.environ.get('XLA_FLAGS', '')} {isa}".strip()


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def checkpoints_in(output: Path) -> tuple[list[int], list[str]]:
    """Of a run: the whole checkpoints, and the temporary folders."""
    folder = output / "checkpoints"
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [int(name) for name in names if name.isdecimal()], [name for name in names if "tmp" in name]


# --- The campaign ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Report:
    """What happened. All numbers after ``ends`` must be 0.

    Attributes:
      kills: processes that were killed, ``while_saving`` of which left a temporary checkpoint behind.
      while_starting: kills before the run had restored its checkpoint.
      resumes: starts that went on from a checkpoint.
      slowest: seconds until all processes were gone after one was killed, when all had been connected.
      ends: runs that did all their steps.
      losses: resumes from an older checkpoint than the last whole one.
      failures: starts that failed although nobody was killed.
      divergent: ends that differ from a run that nobody killed.
      survivors: kills after which other processes lived on for longer than the heartbeat and five seconds.
    """

    kills: int = 0
    while_saving: int = 0
    while_starting: int = 0
    resumes: int = 0
    slowest: float = 0.0
    ends: int = 0
    losses: int = 0
    failures: int = 0
    divergent: int = 0
    survivors: int = 0

    def is_clean(self) -> bool:
        return not (self.losses or self.failures or self.divergent or self.survivors)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"kills                                    {self.kills:6}",
                f"  during start-up                        {self.while_starting:6}",
                f"  that left half a checkpoint            {self.while_saving:6}",
                f"resumes from a checkpoint                {self.resumes:6}",
                f"runs that did all steps                  {self.ends:6}",
                f"longest time for a run to end     {self.slowest:11.1f} s",
                f"resumes from an older checkpoint         {self.losses:6}",
                f"starts that failed                       {self.failures:6}",
                f"ends that differ                         {self.divergent:6}",
                f"processes that did not end               {self.survivors:6}",
            ]
        )


def campaign(kills: int, seed: int, folder: Path, talk: bool = True) -> Report:
    """Starts runs and kills them until ``kills`` processes are killed, and the last run has done its steps."""
    choose, report = random.Random(seed), Report()
    reference = folder / "reference"
    attempt = Attempt((1, 1), reference)
    attempt.end(patience=600)
    if not (reference / "end.npz").exists():
        raise RuntimeError(f"the run that nobody kills failed:\n{attempt.text()}")
    expected = arrays(reference)
    layout = None
    while report.kills < kills:
        output, newest = folder / f"run{report.ends}", 0
        while not (output / "end.npz").exists():
            layout = choose.choice([x for x in LAYOUTS if x != layout])
            moment = choose.choices(list(MOMENTS), MOMENTS.values())[0] if report.kills < kills else None
            newest = one_attempt(choose, report, layout, moment, output, newest)
            if talk:
                print(
                    f"{report.kills:4} kills, run {report.ends + 1}, {layout[0]} × {layout[1]} devices: "
                    f"step {newest} of {STEPS}, losses {report.losses}, failures {report.failures}",
                    flush=True,
                )
            if report.failures > 3:
                return report
        report.ends += 1
        report.divergent += differ(arrays(output), expected)
    return report


def one_attempt(
    choose: random.Random, report: Report, layout: tuple[int, int], moment: str | None, output: Path, newest: int
) -> int:
    """Starts the run of which ``newest`` is the last whole checkpoint, kills a process, returns which it is then."""
    attempt = Attempt(layout, output)
    killed = moment is not None and wait_for(moment, choose, attempt)
    victim = choose.choice(attempt.running)
    killed = killed and victim.poll() is None
    if killed:
        victim.kill()
        report.kills += 1
    connected = all(attempt.said("connected"))
    # Those that wait for one that never comes are ended by who has started them: as in run_processes of the example.
    took, left = attempt.end(patience=600 if not killed else HEARTBEAT + 5 if connected else 0)
    starts = [int(step) for of_process in attempt.said("started") for step in of_process]
    if killed:
        report.while_starting += not starts
        report.while_saving += bool(checkpoints_in(output)[1])
        report.survivors += left and connected
        report.slowest = max(report.slowest, took if connected else 0)
    elif any(p.returncode for p in attempt.running):
        report.failures += 1
        print(attempt.text(), flush=True)
    report.resumes += bool(starts) and newest > 0
    if any(step != newest for step in starts):
        report.losses += 1
        print(f"{starts} instead of {newest}:\n{attempt.text()}", flush=True)
    saved = [int(step) for of_process in attempt.said("saved") for step in of_process]
    now = max(checkpoints_in(output)[0], default=0)
    if now < max(saved, default=newest):
        report.losses += 1
        print(f"a checkpoint was reported, but is not there: {saved}, {now}", flush=True)
    return max([now, newest, *saved])


def wait_for(moment: str, choose: random.Random, attempt: Attempt) -> bool:
    """Waits for a moment of this kind; ``False`` if the run ended before."""
    starts, saves = moment == "while it starts", moment == "while it saves"
    delay = choose.uniform(0, 6 if starts else 0.5)  # seconds
    steps = choose.randrange(12) * SAVE_EVERY  # since the first one after the start
    begin = time.monotonic() if starts else None
    while not attempt.is_over():
        if begin is None:
            since = [int(step) for of_process in attempt.said("training") for step in of_process]
            newest = max(checkpoints_in(attempt.output)[0], default=0)
            if len(since) == len(attempt.running) and newest >= since[0] + steps:
                begin = time.monotonic()
        elif time.monotonic() - begin >= delay and (not saves or checkpoints_in(attempt.output)[1]):
            return True
        time.sleep(0.002 if begin else 0.02)
    return False


def arrays(output: Path) -> dict[str, np.ndarray]:
    with np.load(output / "end.npz") as file:
        return dict(file)


def differ(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    """Whether a name, a dtype or a bit differs."""
    return got.keys() != expected.keys() or any(
        (got[name].dtype, got[name].shape, got[name].tobytes()) != (x.dtype, x.shape, x.tobytes())
        for name, x in expected.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill processes of a training run at random, and compare its end.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*json.loads(options.worker))
        return
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rmsprop_jax-kills-") as folder:
        report = campaign(options.kills, options.seed, Path(folder))
    print(report)
    print(f"seed {options.seed}, {time.monotonic() - start:.0f} s")
    sys.exit(not report.is_clean())


if __name__ == "__main__":
    main()
