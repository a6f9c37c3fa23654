"""Runs in many processes: killed, and continued on others; states that move; copies that differ; the example."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

for _package in ("flax.nnx", "orbax.checkpoint", "matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(_package)
if not hasattr(jax.config, "jax_cpu_collectives_implementation"):
    pytest.skip("this JAX has no collectives between processes on CPUs", allow_module_level=True)

TESTS = Path(__file__).parent
EXAMPLE = TESTS.parent / "examples" / "train_distributed.py"
OPTIONS = ("--epochs", "2", "--batch-size", "96", "--lr", "0.002")
STEPS = 2 * (1437 // 96)
HEARTBEAT = 5  # seconds


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With a folder of its own for what is compiled: a killed process may leave half a program there."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))),
        "PYTHONWARNINGS": "error",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# --- Runs that are killed, and runs that move --------------------------------------------------------------------


def campaign(environment: dict[str, str], *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TESTS / "kill_campaign.py"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.script
def test_killed_runs_lose_nothing_and_end_as_if_nobody_had_killed_them(environment: dict[str, str]) -> None:
    done = campaign(environment, "--kills", "4", "--steps", "60", "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = {name.strip(): int(n) for name, n in re.findall(r"^(.*?) +(\d+)$", done.stdout, re.MULTILINE)}
    assert numbers["kills"] == 4
    assert numbers["resumes from a checkpoint"] >= 1
    assert numbers["runs that did all steps"] >= 1
    for name in ("resumes from an older checkpoint", "starts that failed", "ends that differ"):
        assert numbers[name] == 0


@pytest.mark.script
def test_run_over_four_and_eight_devices_ends_as_on_one(environment: dict[str, str]) -> None:
    done = campaign(environment, "--steps", "16", "--move", "2x2", "1x8")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


# --- States that move, and copies that differ --------------------------------------------------------------------


def answers(environment: dict[str, str], job: str, processes: int, devices: int, folder: Path) -> list[Any]:
    """What each process of ``many_processes.py`` answers."""
    command = [sys.executable, str(TESTS / "many_processes.py"), job, str(free_port()), str(processes)]
    running = [
        subprocess.Popen(
            [*command, str(i), str(devices), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    ends = [p.communicate(timeout=300) for p in running]
    assert [p.returncode for p in running] == [0] * processes, ends
    return [json.loads(out.splitlines()[-1]) for out, _ in ends]


@pytest.fixture(scope="module")
def saved(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """States saved on eight devices, and what became of them on four, two and one."""
    folder = tmp_path_factory.mktemp("states")
    return folder, answers(environment, "save", 1, 8, folder)[0]


@pytest.fixture(scope="module")
def in_two_processes(environment: dict[str, str], saved: tuple[Path, list[Any]]) -> list[Any]:
    return answers(environment, "both", 2, 2, saved[0])


@pytest.mark.script
@pytest.mark.parametrize("name", ["rmsprop", "codes", "adamw"])
def test_state_of_eight_devices_is_restored_on_fewer_and_in_two_processes(
    name: str, saved: tuple[Path, list[Any]], in_two_processes: list[Any]
) -> None:
    on_fewer = [answer[name] for answer in saved[1]]
    in_two = [answer["restored"][name] for answer in in_two_processes]
    assert [answer["wrong"] for answer in (*on_fewer, *in_two)] == [[]] * 5
    # "w" and "b" in each of their slots. A scale of each row of "w" is spread like it. One device holds all.
    spread = {"rmsprop": 6, "codes": 6, "adamw": 4}[name]
    assert [answer["spread"] for answer in (*on_fewer, *in_two)] == [spread, spread, 0, spread, spread]


@pytest.mark.script
def test_check_replicas_finds_nothing_in_equal_copies(in_two_processes: list[Any]) -> None:
    assert [answer["replicas"]["compared"] for answer in in_two_processes] == [2, 2]


@pytest.mark.script
def test_check_replicas_names_an_array_of_other_data_in_both_processes(in_two_processes: list[Any]) -> None:
    errors = [answer["replicas"]["error"] for answer in in_two_processes]
    assert errors[0] == errors[1]
    assert re.match(r"tree\['state'\]\['b'\] has different copies on .* of process 0 and .* of process 1;", errors[0])


# --- The example -------------------------------------------------------------------------------------------------


@pytest.fixture
def example(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts the example in the background. All its processes are gone after the test."""
    started: list[subprocess.Popen] = []

    def example(*options: str) -> subprocess.Popen:
        command = [sys.executable, str(EXAMPLE), "--output", str(tmp_path / "run"), *OPTIONS, *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
        return started[-1]

    yield example
    for process in started:
        process.kill()
        process.communicate()


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen) -> None:
    while not is_so():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def checkpoints(output: Path) -> list[int]:
    folder = output / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def children(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended may stay in the table until somebody asks how it ended."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return found.stdout.strip()[:1] not in ("", "Z")


@pytest.mark.script
def test_killed_worker_ends_the_example_which_goes_on_with_another_number(
    example: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    run = example("--local-processes", "2", "--save-every", "2", "--heartbeat", str(HEARTBEAT))
    wait_until(lambda: bool(checkpoints(tmp_path / "run")), run)
    workers = children(run)
    start = time.monotonic()
    os.kill(workers[1], signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert time.monotonic() - start < HEARTBEAT + 2
    assert run.returncode == 1
    assert re.search(r"process 1 was ended by SIGKILL.*; all others are ended too; go on .* with --resume\n\Z", err)
    assert not any(map(is_alive, workers))
    done = checkpoints(tmp_path / "run")[-1]

    resumed = example("--local-processes", "1", "--devices-per-process", "4", "--save-every", "50", "--resume")
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert f"processes: 1, devices: 4, {done} of {STEPS} steps were done before\n" in out
    assert float(re.search(r"^test accuracy: (\d+\.\d+)%\n\Z", out, re.MULTILINE)[1]) > 70
    assert checkpoints(tmp_path / "run")[-1] == STEPS


@pytest.mark.script
def test_worker_that_falls_silent_ends_the_example_within_the_heartbeat(
    example: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    # As after a loss of power: nothing closes its connections. Started by hand, as on two machines.
    where = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--heartbeat", str(HEARTBEAT))
    first, second = (example(*where, "--process", str(i), "--save-every", "2") for i in range(2))
    wait_until(lambda: bool(checkpoints(tmp_path / "run")), first)
    start = time.monotonic()
    os.kill(second.pid, signal.SIGSTOP)
    _, err = first.communicate(timeout=60)
    assert HEARTBEAT - 2 < time.monotonic() - start < HEARTBEAT + 5
    assert first.returncode != 0
    assert "stopped sending heartbeats" in err


@pytest.mark.script
def test_workers_end_with_the_program_that_started_them(example: Callable[..., subprocess.Popen]) -> None:
    run = example("--local-processes", "2", "--epochs", "1000")
    wait_until(lambda: len(children(run)) == 2, run)
    workers = children(run)
    run.kill()
    limit = time.monotonic() + 60
    try:
        while any(map(is_alive, workers)):
            assert time.monotonic() < limit
            time.sleep(0.1)
    finally:
        for pid in filter(is_alive, workers):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable[..., str]:
    """Runs the example with options it has to refuse and returns its message."""
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import train_distributed

    def refuse(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train_distributed.py", "--output", str(tmp_path / "new"), *options])
        with pytest.raises(SystemExit) as exit_:
            train_distributed.main()
        assert exit_.value.code == 2
        assert not (tmp_path / "new").exists()
        return capsys.readouterr().err.splitlines()[-1]

    return refuse


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--coordinator", "a:1"], "give all three or none of them"),
        (["--process", "0", "--processes", "2"], "give all three or none of them"),
        (["--coordinator", "a:1", "--processes", "2", "--process", "2"], "must be from 0 to 1, got 2"),
        (["--coordinator", "a:1", "--processes", "2", "--process", "1", "--local-processes", "2"], "not allowed with"),
        (["--local-processes", "0"], "must be a whole number not less than 1, got 0"),
        (["--heartbeat", "0"], "must be a whole number not less than 1, got 0"),
    ],
)
def test_processes_that_make_no_sense_are_refused(
    options: list[str], complaint: str, refuse: Callable[..., str]
) -> None:
    message = refuse(*options)
    assert message.startswith("train_distributed.py: error: argument")
    assert complaint in message
