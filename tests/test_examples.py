"""The examples do what they say, run as a user runs them; a training run survives being killed at any moment.

What a run has to be a process for, to be killed or to end with an exit code, has one of its own. All others are in this
process, which has imported everything: that takes longer than the training.
"""

import contextlib
import importlib.util
import json
import os
import pty
import re
import runpy
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx")
ocp = pytest.importorskip("orbax.checkpoint")
for _package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(_package)

EXAMPLES = Path(__file__).parent.parent / "examples"

# Short, and long enough to be interrupted; with a value other than the default for everything that can change.
EPOCHS = 3
STEPS_PER_EPOCH = 1437 // 24
SETTINGS = {
    "--epochs": str(EPOCHS),
    "--batch-size": "24",
    "--seed": "3",
    "--lr": "0.0006",
    "--alpha": "0.98",
    "--eps": "1e-06",
    "--weight-decay": "0.0001",
    "--momentum": "0.8",
}
OPTIONS = [*(word for pair in SETTINGS.items() for word in pair), "--centered"]


# --- Running the examples --------------------------------------------------------------------------------


def load(name: str) -> ModuleType:
    """The example as a module, without running it."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train_digits() -> ModuleType:
    return load("train_digits")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Ours; but warnings are errors, so that no filter hides one."""
    return os.environ | {"PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"}


def run(environment: dict[str, str], example: str, *options: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / example), *map(str, options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs an example in this process, as its command line would, and returns what it prints. Warnings are errors."""

    def run_here(example: str, *options: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [example, *map(str, options)])
        with jax.numpy_rank_promotion("allow"):  # as anywhere outside these tests
            runpy.run_path(str(EXAMPLES / example), run_name="__main__")
        out, err = capfd.readouterr()
        assert err == ""
        return out

    return run_here


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> tuple[Path, subprocess.CompletedProcess]:
    """The output folder of a run that nobody interrupted, and how it ended. Tests leave it as it is."""
    output = tmp_path_factory.mktemp("finished") / "new" / "folder"
    return output, run(environment, "train_digits.py", "--output", output, *OPTIONS)


def complete_checkpoints(output: Path) -> list[int]:
    return sorted(int(path.name) for path in (output / "checkpoints").iterdir() if path.name.isdecimal())


def temporary_checkpoints(output: Path) -> list[str]:
    return [path.name for path in (output / "checkpoints").iterdir() if not path.name.isdecimal()]


def arrays(output: Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint under its path, read without the example's help."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(output.absolute() / "checkpoints" / str(EPOCHS) / "arrays")
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def record(output: Path, item: str) -> dict[str, Any]:
    return json.loads((output / "checkpoints" / str(EPOCHS) / item / "metadata").read_text())


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below ``folder``, with its time of change."""
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


# --- one_update.py ---------------------------------------------------------------------------------------


def test_one_update_prints_the_loss_that_the_formulas_give(run_here: Callable[..., str]) -> None:
    one_update = load("one_update")
    model = one_update.MLP(nnx.Rngs(0))
    x, y, w1, b1, w2, b2 = (
        np.asarray(a, np.float64)
        for a in (
            *one_update.random_batch(seed=0),
            *(model.hidden.kernel[...], model.hidden.bias[...]),
            *(model.output.kernel[...], model.output.bias[...]),
        )
    )

    def loss(w1: np.ndarray, b1: np.ndarray, w2: np.ndarray, b2: np.ndarray) -> float:
        return float(np.mean((np.maximum(x @ w1 + b1, 0) @ w2 + b2 - y) ** 2))

    hidden = np.maximum(x @ w1 + b1, 0)
    d_output = 2 * (hidden @ w2 + b2 - y) / len(x)
    d_hidden = (d_output @ w2.T) * (hidden > 0)
    gradients = x.T @ d_hidden, d_hidden.sum(0), hidden.T @ d_output, d_output.sum(0)
    updated = [p - 0.01 * g / (np.sqrt(0.01 * g * g) + 1e-8) for p, g in zip((w1, b1, w2, b2), gradients, strict=True)]

    printed = re.fullmatch(r"Loss after one update: (\d+\.\d{6})\n", run_here("one_update.py"))
    assert float(printed[1]) == pytest.approx(loss(*updated), abs=2e-6)
    assert loss(*updated) < loss(w1, b1, w2, b2)


# --- train_digits.py: a run that nobody interrupts -------------------------------------------------------


@pytest.mark.script
def test_run_reports_every_epoch_and_ends_with_the_test_accuracy(finished: tuple) -> None:
    output, process = finished
    assert process.returncode == 0, process.stderr
    *epochs, curves, last = process.stdout.splitlines()
    pattern = rf"epoch (\d) of {EPOCHS}: loss (\d\.\d{{4}}), test accuracy (\d\d\.\d\d)%"
    matches = [re.fullmatch(pattern, line) for line in epochs]
    assert [int(match[1]) for match in matches] == [1, 2, 3]
    assert float(matches[0][2]) > float(matches[1][2]) > float(matches[2][2])
    assert curves == f"curves: {output / 'curves.png'}"
    assert last == f"test accuracy: {matches[-1][3]}%"
    assert float(matches[-1][3]) > 95


@pytest.mark.script
def test_run_is_silent_where_there_is_no_terminal(finished: tuple) -> None:
    _, process = finished
    assert process.stderr == ""
    assert "warning" not in process.stdout.lower()


@pytest.mark.script
def test_run_writes_a_picture_and_a_checkpoint_of_every_epoch(finished: tuple) -> None:
    output, _ = finished
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert sorted(path.name for path in output.iterdir()) == ["checkpoints", "curves.png"]
    assert complete_checkpoints(output) == [1, 2, 3]
    assert temporary_checkpoints(output) == []


@pytest.mark.script
def test_checkpoint_holds_model_optimizer_history_and_settings(finished: tuple) -> None:
    output, _ = finished
    saved = arrays(output)
    assert sum(x.size for path, x in saved.items() if path.startswith("['0']")) == 29_066
    for slot in ("square_avg", "grad_avg", "momentum_buffer"):
        assert sum(x.size for path, x in saved.items() if slot in path) == 29_066
    counters = [int(x) for x in saved.values() if x.shape == ()]
    assert counters == [EPOCHS * STEPS_PER_EPOCH] * 2  # RMSPropState.step and Flax's own
    assert {name: len(curve) for name, curve in record(output, "history").items()} == {"loss": 3, "accuracy": 3}
    options = {"--" + name.replace("_", "-"): str(value) for name, value in record(output, "settings").items()}
    assert options == {**SETTINGS, "--centered": "True"}


@pytest.mark.script
def test_finished_run_prints_its_result_again_and_trains_no_more(
    finished: tuple, run_here: Callable[..., str], tmp_path: Path
) -> None:
    output, process = finished
    again = tmp_path / "again"
    shutil.copytree(output, again)
    before = contents(again / "checkpoints")

    resumed = run_here("train_digits.py", "--output", again, *OPTIONS, "--resume")

    assert "epoch 3 of 3" not in resumed
    assert resumed.splitlines()[-1] == process.stdout.splitlines()[-1]
    assert contents(again / "checkpoints") == before
    assert (again / "curves.png").read_bytes() == (output / "curves.png").read_bytes()


@pytest.mark.script
def test_default_settings_reach_98_percent(
    run_here: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Without --output, as in the first line of the docstring: in a folder below the working directory.
    monkeypatch.chdir(tmp_path)
    out = run_here("train_digits.py")
    assert float(re.search(r"^test accuracy: (\d+\.\d\d)%\n\Z", out, re.MULTILINE)[1]) >= 98
    assert (tmp_path / "runs" / "digits" / "curves.png").is_file()


# --- train_digits.py: a run that is killed ---------------------------------------------------------------


def before_the_first_checkpoint(output: Path, bar: Callable[[], str]) -> bool:
    return (output / "checkpoints").is_dir()


def in_the_middle_of_an_epoch(output: Path, bar: Callable[[], str]) -> bool:
    shown = re.findall(r" (\d+)/\d+ \[[^\r]*loss=\d+\.\d{4}, lr=\d\.\d\de-0\d\]", bar())
    return bool(shown) and int(shown[-1]) > STEPS_PER_EPOCH and int(shown[-1]) % STEPS_PER_EPOCH > 0


def while_a_checkpoint_is_written(output: Path, bar: Callable[[], str]) -> bool:
    return (output / "checkpoints").is_dir() and any(n.startswith("2.") for n in temporary_checkpoints(output))


Moment = Callable[[Path, Callable[[], str]], bool]


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, Callable[[], str]]]:
    """The end of a terminal to write to, and a function that returns what has been written so far."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 100))
    os.set_blocking(reader, False)
    text = ""

    def read() -> str:
        nonlocal text
        with contextlib.suppress(BlockingIOError):
            while True:
                text += os.read(reader, 65536).decode(errors="replace")
        return text

    try:
        yield writer, read
    finally:
        os.close(reader)
        os.close(writer)


def kill_at(moment: Moment, environment: dict[str, str], output: Path) -> None:
    """Starts a run and kills it at the moment, which it does not outlive: it is stopped before a second look."""
    command = [sys.executable, str(EXAMPLES / "train_digits.py"), "--output", str(output), *OPTIONS]
    with (
        terminal() as (stderr, bar),
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr) as process,
    ):
        while process.poll() is None:
            if moment(output, bar):
                process.send_signal(signal.SIGSTOP)
                if moment(output, bar):
                    process.kill()
                    break
                process.send_signal(signal.SIGCONT)
            bar()  # a terminal that nobody reads from blocks its writer
            time.sleep(0.001)
        assert process.wait() == -signal.SIGKILL, f"it ended by itself, having shown {bar()}"


@pytest.mark.script
@pytest.mark.parametrize(
    ("moment", "done"),
    [(before_the_first_checkpoint, [0]), (in_the_middle_of_an_epoch, [1, 2]), (while_a_checkpoint_is_written, [1])],
)
def test_killed_run_ends_as_if_it_had_not_been_killed(
    moment: Moment,
    done: list[int],
    finished: tuple,
    environment: dict[str, str],
    run_here: Callable[..., str],
    tmp_path: Path,
) -> None:
    output, process = finished
    kill_at(moment, environment, tmp_path / "killed")
    epochs_done = len(complete_checkpoints(tmp_path / "killed"))
    assert epochs_done in done

    resumed = run_here("train_digits.py", "--output", tmp_path / "killed", *OPTIONS, "--resume")

    assert resumed.count("test accuracy") == EPOCHS - epochs_done + 1
    assert resumed.splitlines()[-1] == process.stdout.splitlines()[-1]
    expected, ended = arrays(output), arrays(tmp_path / "killed")
    assert ended.keys() == expected.keys()
    different = [path for path in expected if not np.array_equal(ended[path], expected[path])]
    assert different == []
    assert record(tmp_path / "killed", "history") == record(output, "history")
    assert (tmp_path / "killed" / "curves.png").read_bytes() == (output / "curves.png").read_bytes()
    assert temporary_checkpoints(tmp_path / "killed") == []


# --- train_digits.py: what it refuses --------------------------------------------------------------------


@pytest.fixture
def refuse(
    train_digits: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., str]:
    """Runs the example with options it has to refuse and returns its message."""

    def refuse(*options: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["train_digits.py", *map(str, options)])
        with pytest.raises(SystemExit) as exit_:
            train_digits.main()
        assert exit_.value.code == 2
        out, err = capsys.readouterr()
        usage, message = err.splitlines()
        assert (out, usage) == ("", "usage: train_digits.py [options]")
        return message

    return refuse


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--epochs", "-1", "must be a whole number not less than 1, got -1"),
        ("--epochs", "0", "must be a whole number not less than 1, got 0"),
        ("--epochs", "1.5", "must be a whole number not less than 1, got 1.5"),
        ("--batch-size", "0", "must be a whole number from 1 to 1437, got 0"),
        ("--batch-size", "1438", "must be a whole number from 1 to 1437, got 1438"),
        ("--seed", "-1", "must be a whole number from 0 to 4294967295, got -1"),
        ("--seed", "4294967296", "must be a whole number from 0 to 4294967295, got 4294967296"),
        ("--lr", "-0.1", "-0.1"),
        ("--lr", "nan", "nan"),
        ("--lr", "inf", "must be finite, got inf"),
        ("--lr", "fast", "'fast'"),
        ("--alpha", "99", "did you mean 0.99?"),
        ("--alpha", "1", "alpha must be a number in [0, 1), got 1.0"),
        ("--eps", "-1", "-1.0"),
        ("--weight-decay", "-1", "-1.0"),
        ("--momentum", "-1", "-1.0"),
    ],
)
def test_wrong_value_is_refused_before_anything_is_written(
    option: str, value: str, complaint: str, refuse: Callable[..., str], tmp_path: Path
) -> None:
    message = refuse("--output", tmp_path / "new", option, value)
    assert message.startswith(f"train_digits.py: error: argument {option}: ")
    assert complaint in message
    assert not (tmp_path / "new").exists()


@pytest.mark.script
def test_error_reaches_the_shell(environment: dict[str, str], tmp_path: Path) -> None:
    process = run(environment, "train_digits.py", "--output", tmp_path / "new", "--alpha", "99")
    assert (process.returncode, process.stdout) == (2, "")
    assert re.fullmatch(r"usage: .*\ntrain_digits.py: error: argument --alpha: .*\n", process.stderr)


@pytest.mark.script
@pytest.mark.parametrize(
    ("option", "value", "original", "given"),
    [
        ("--epochs", "4", "3", "4"),
        ("--batch-size", "32", "24", "32"),
        ("--seed", "4", "3", "4"),
        ("--lr", "0.01", "0.0006", "0.01"),
        ("--alpha", "0.99", "0.98", "0.99"),
        ("--eps", "0.001", "1e-06", "0.001"),
        ("--weight-decay", "0", "0.0001", "0.0"),
        ("--momentum", "0", "0.8", "0.0"),
        ("--centered", None, "True", "False"),
    ],
)
def test_run_is_not_resumed_with_another_setting(
    option: str, value: str | None, original: str, given: str, refuse: Callable[..., str], finished: tuple
) -> None:
    output, _ = finished
    before = contents(output)
    options = [word for word in OPTIONS if word != "--centered"] if value is None else [*OPTIONS, option, value]
    message = refuse("--output", output, *options, "--resume")
    assert message.startswith("train_digits.py: error: argument --resume: ")
    assert f"started with {option} {original}, not {given};" in message
    assert contents(output) == before


@pytest.mark.script
def test_run_is_not_started_over_an_older_one(refuse: Callable[..., str], finished: tuple) -> None:
    output, _ = finished
    before = contents(output)
    message = refuse("--output", output, *OPTIONS)
    assert message.startswith(f"train_digits.py: error: argument --output: {output} is not empty;")
    assert "add --resume to go on with the run in it, or choose another folder with --output" in message
    assert contents(output) == before


@pytest.mark.parametrize("options", [[], ["--resume"]])
def test_folder_with_other_files_is_left_alone(options: list[str], refuse: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "curves.png").write_text("mine")
    assert str(tmp_path) in refuse("--output", tmp_path, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert (tmp_path / "curves.png").read_text() == "mine"


def test_output_that_is_a_file_is_refused(refuse: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"argument --output: {output} cannot be" in refuse("--output", output)
    assert (tmp_path / "file").read_text() == "mine"


# --- train_digits.py: its parts --------------------------------------------------------------------------


def test_optimizer_clips_and_then_does_what_torch_does_at_the_scheduled_rate(train_digits: ModuleType) -> None:
    settings = {"alpha": 0.8, "eps": 0.1, "weight_decay": 0.2, "momentum": 0.7, "centered": True}
    rates, gradients = (0.3, 0.05, 0.1), ([3.0, -4.0], [0.3, 0.4], [-2.0, 0.0])
    model = train_digits.Network(nnx.Rngs(0))
    transformation = train_digits.make_optimizer(model, lambda step: jax.numpy.array(rates)[step], settings).tx
    params = jax.numpy.array([1.0, -2.0])
    state = transformation.init(params)
    p, square_avg, grad_avg, buffer = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2), np.zeros(2)
    for lr, gradient in zip(rates, np.array(gradients), strict=True):
        updates, state = transformation.update(jax.numpy.array(gradient, np.float32), state, params)
        params = params + updates

        g = gradient / max(1.0, np.linalg.norm(gradient)) + 0.2 * p
        square_avg = 0.8 * square_avg + 0.2 * g * g
        grad_avg = 0.8 * grad_avg + 0.2 * g
        buffer = 0.7 * buffer + g / (np.sqrt(square_avg - grad_avg**2) + 0.1)
        p = p - lr * buffer
        np.testing.assert_allclose(params, p, rtol=2e-6)


def test_split_keeps_a_fifth_apart_with_every_digit_in_proportion(train_digits: ModuleType) -> None:
    train_set, test_set = train_digits.load_data()
    assert (len(train_set.labels), len(test_set.labels)) == (1437, 360)
    assert train_set.images.shape == (1437, 8, 8, 1)
    assert (train_set.images.dtype, train_set.images.min(), train_set.images.max()) == (np.float32, 0, 1)
    in_train, in_test = np.bincount(train_set.labels), np.bincount(test_set.labels)
    np.testing.assert_allclose(in_test / (in_train + in_test), 0.2, atol=0.006)
    # No image is in both parts: scikit-learn's 1,797 are all different.
    together = np.concatenate([train_set.images, test_set.images]).reshape(1797, 64)
    assert len(np.unique(together, axis=0)) == 1797


def test_batches_of_an_epoch_depend_on_seed_and_epoch_alone(train_digits: ModuleType) -> None:
    data, _ = train_digits.load_data()

    def epoch(seed: int, number: int) -> list[np.ndarray]:
        parts = list(train_digits.batches(data, 100, seed, number))
        assert [part.images.shape for part in parts] == [(100, 8, 8, 1)] * 14
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    first = epoch(0, 5)
    for seed, number in ((0, 6), (1, 5)):
        images, labels = epoch(seed, number)
        assert not np.array_equal(images, first[0])
        assert not np.array_equal(labels, first[1])
    again = epoch(0, 5)
    np.testing.assert_array_equal(again[0], first[0])
    np.testing.assert_array_equal(again[1], first[1])


def test_images_are_shifted_by_one_pixel_at_most(train_digits: ModuleType) -> None:
    data, _ = train_digits.load_data()
    padded = np.pad(data.images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    views = {(row, column): padded[:, row : row + 8, column : column + 8] for row in range(3) for column in range(3)}
    shifted = np.asarray(train_digits.shifted(data.images, jax.random.key(0)))
    fits = {offset: (view == shifted).all(axis=(1, 2, 3)) for offset, view in views.items()}
    assert np.any(list(fits.values()), axis=0).all()
    for fit in fits.values():
        assert 0.08 < fit.mean() < 0.15  # each of the nine in a ninth of the images
