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
import multiprocessing
import os
import platform
import random
import re
import socket
import sys
import tempfile
import threading
import time
import types
import warnings
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent / "examples"

# By name, arrays of NumPy.
Arrays = dict[str, Any]

# Processes, and devices of each.
LAYOUTS = [(1, 1), (2, 1), (1, 4), (2, 2), (1, 8), (4, 1)]
SAVE_EVERY = 4
BATCH = 16
NAP = 0.02  # seconds in a step, so that kills hit steps and not only the start
HEARTBEAT = 10  # seconds
MOMENTS = {"while it starts": 1, "while it trains": 2, "while it saves": 2}  # and how often each is chosen


# --- One process of the run --------------------------------------------------------------------------------------


def prepare() -> None:
    """Imports everything, here once and not in each process: that would take most of its time.

    Processes are forked, and so this one has no threads and computes nothing with JAX.
    """
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # in which a killed process could leave half a program
    if platform.machine().lower() in ("x86_64", "amd64"):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa=AVX".strip()
    sys.path.insert(0, str(EXAMPLES))
    # The example's data and network are not needed here.
    sys.modules["train_digits"] = types.SimpleNamespace(Digits=None, Settings=dict[str, Any])  # type: ignore[assignment]
    import train_distributed  # noqa: F401
    from jax.experimental import multihost_utils  # noqa: F401

    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)


def work(coordinator: str, processes: int, process: int, devices: int, output: Path, steps: int) -> None:
    """Trains, and says on standard output what has happened so far. At the end, process 0 writes all arrays."""
    import jax
    import jax.numpy as jnp
    import numpy as np
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
        checkpoints = example.open_checkpoints(output)
        tx = rmsprop(0.01, alpha=0.9, momentum=0.9)
        done, params, state, tx = example.start(checkpoints, init, tx, everywhere)
        print("started", done, flush=True)
        step = example.make_step(mean_loss, tx)
        for number in range(done, steps):
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
        whole = multihost_utils.process_allgather({"params": params, "state": state}, tiled=True)
        if process == 0:
            leaves = jax.tree_util.tree_leaves_with_path(whole)
            np.savez(output / "end.npz", **{jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves})
        print("ended", flush=True)
        jax.distributed.shutdown()


# --- One attempt -------------------------------------------------------------------------------------------------


class Attempt:
    """The processes of one start, and what they have said."""

    def __init__(self, layout: tuple[int, int], output: Path, steps: int) -> None:
        self.alive, self.parent = os.pipe()  # which breaks when this process is gone
        processes, devices = layout
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = "127.0.0.1:{1}".format(*free.getsockname())
        self.output, self.logs = output, [output.parent / f"{output.name}-{i}.log" for i in range(processes)]
        self.running = []
        for i, log in enumerate(self.logs):
            log.write_text("")
            job = (log, address, processes, i, devices, output, steps)
            self.running.append(multiprocessing.get_context("fork").Process(target=self.child, args=job))
            self.running[-1].start()

    def child(self, log: Path, *job: Any) -> None:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.dup2(self.alive, 0)
        os.close(self.parent)
        work(*job)

    def said(self, word: str) -> list[list[int]]:
        """For each process, the numbers it said after ``word``; 0 where it said none."""
        texts = [log.read_text(errors="replace") for log in self.logs]
        return [[int(n or 0) for n in re.findall(rf"^{word} ?(\d*)$", text, re.MULTILINE)] for text in texts]

    def is_over(self) -> bool:
        return any(p.exitcode is not None for p in self.running)

    def end(self, patience: float) -> tuple[float, bool]:
        """Waits for all processes, and kills those that are still there after ``patience`` seconds; were there any?"""
        start = time.monotonic()
        while any(p.exitcode is None for p in self.running) and time.monotonic() - start < patience:
            time.sleep(0.01)
        took, left = time.monotonic() - start, any(p.exitcode is None for p in self.running)
        for p in self.running:
            p.kill()
            p.join()
        os.close(self.alive)
        os.close(self.parent)
        return took, left

    def text(self) -> str:
        return "\n".join(f"--- process {i}\n{log.read_text(errors='replace')}" for i, log in enumerate(self.logs))


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


def campaign(kills: int, seed: int, steps: int, folder: Path) -> Report:
    """Starts runs and kills them until ``kills`` processes are killed, and the last run has done its steps."""
    choose, report, layout = random.Random(seed), Report(), None
    expected = end_of(folder / "reference", [(1, 1)], steps)
    while report.kills < kills and report.failures < 3:
        output, newest = folder / f"run{report.ends}", 0
        while not (output / "end.npz").exists() and report.failures < 3:
            layout = choose.choice([x for x in LAYOUTS if x != layout])
            moment = choose.choices(list(MOMENTS), MOMENTS.values())[0] if report.kills < kills else None
            newest = one_attempt(choose, report, layout, moment, output, newest, steps)
            print(
                f"{report.kills:4} kills, run {report.ends + 1}, {layout[0]} × {layout[1]} devices: step {newest}; "
                f"losses {report.losses}, failures {report.failures}, divergent {report.divergent}",
                flush=True,
            )
        if (output / "end.npz").exists():
            report.ends += 1
            report.divergent += differ(arrays(output), expected)
    return report


def end_of(output: Path, layouts: list[tuple[int, int]], steps: int) -> Arrays:
    """The arrays at the end of a run that nobody kills, and that does an equal part of its steps on each layout."""
    for i, layout in enumerate(layouts, start=1):
        attempt = Attempt(layout, output, steps * i // len(layouts))
        attempt.end(patience=600)
        if any(p.exitcode for p in attempt.running):
            raise RuntimeError(f"a run that nobody killed failed:\n{attempt.text()}")
    return arrays(output)


def one_attempt(
    choose: random.Random,
    report: Report,
    layout: tuple[int, int],
    moment: str | None,
    output: Path,
    newest: int,
    steps: int,
) -> int:
    """Starts the run of which ``newest`` is the last whole checkpoint, kills a process, returns which it is then."""
    attempt = Attempt(layout, output, steps)
    killed = moment is not None and wait_for(moment, choose, attempt)
    victim = choose.choice(attempt.running)
    killed = killed and victim.exitcode is None
    if killed:
        victim.kill()
        report.kills += 1
    connected = all(attempt.said("connected"))
    # Those that wait for one that never comes are ended by who has started them: as in run_processes of the example.
    took, left = attempt.end(patience=600 if not killed else HEARTBEAT + 5 if connected else 0)
    starts = [step for of_process in attempt.said("started") for step in of_process]
    if killed:
        report.while_starting += not starts
        report.while_saving += bool(checkpoints_in(output)[1])
        report.survivors += left and connected
        report.slowest = max(report.slowest, took if connected else 0)
    elif any(p.exitcode for p in attempt.running):
        report.failures += 1
        print(attempt.text(), flush=True)
    report.resumes += bool(starts) and newest > 0
    if any(step != newest for step in starts):
        report.losses += 1
        print(f"{starts} instead of {newest}:\n{attempt.text()}", flush=True)
    saved = [step for of_process in attempt.said("saved") for step in of_process]
    now = max(checkpoints_in(output)[0], default=0)
    if now < max(saved, default=newest):
        report.losses += 1
        print(f"a checkpoint was reported, but is not there: {saved}, {now}", flush=True)
    return max([now, newest, *saved])


def wait_for(moment: str, choose: random.Random, attempt: Attempt) -> bool:
    """Waits for a moment of this kind; ``False`` if the run ended before."""
    starts, saves = moment == "while it starts", moment == "while it saves"
    delay = choose.uniform(0, 3 if starts else 0.5)  # seconds
    steps = choose.randrange(8) * SAVE_EVERY  # since the first one after the start
    begin = time.monotonic() if starts else None
    while not attempt.is_over():
        if begin is None:
            since = [step for of_process in attempt.said("training") for step in of_process]
            newest = max(checkpoints_in(attempt.output)[0], default=0)
            if len(since) == len(attempt.running) and newest >= since[0] + steps:
                begin = time.monotonic()
        elif time.monotonic() - begin >= delay and (not saves or checkpoints_in(attempt.output)[1]):
            return True
        time.sleep(0.002 if begin else 0.02)
    return False


def arrays(output: Path) -> Arrays:
    import numpy as np

    with np.load(output / "end.npz") as file:
        return dict(file)


def differ(got: Arrays, expected: Arrays) -> bool:
    """Whether a name, a dtype or a bit differs."""
    return got.keys() != expected.keys() or any(
        (got[name].dtype, got[name].shape, got[name].tobytes()) != (x.dtype, x.shape, x.tobytes())
        for name, x in expected.items()
    )


def layout(text: str) -> tuple[int, int]:
    processes, devices = text.split("x")
    return int(processes), int(devices)


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill processes of a training run at random, and compare its end.")
    add = parser.add_argument
    add("--kills", type=int, default=100, metavar="N")
    add("--seed", type=int, default=0, metavar="N", help="of layouts, moments and victims")
    add("--steps", type=int, default=160, metavar="N", help="of each run")
    add("--move", type=layout, nargs="+", metavar="PxD", help="no kills: over these processes and devices, as 2x2 1x8")
    options = parser.parse_args()
    start = time.monotonic()
    prepare()
    with tempfile.TemporaryDirectory(prefix="rmsprop_jax-kills-") as name:
        folder = Path(name)
        if options.move:
            ends = [end_of(folder / f"{len(m)}", m, options.steps) for m in ([(1, 1)], options.move)]
            sys.exit("the ends differ" if differ(*ends) else None)
        report = campaign(options.kills, options.seed, options.steps, folder)
    print(report)
    print(f"seed {options.seed}, {time.monotonic() - start:.0f} s")
    sys.exit(not report.is_clean())


if __name__ == "__main__":
    main()
