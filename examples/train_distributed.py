"""Trains the network of ``train_digits.py`` in many processes, any of which can be killed at any moment.

Every process computes the gradient of its part of each batch, and keeps its part of the optimizer's state
(``sharding.zero``). The parameters are the same everywhere. A process that dies ends the whole run: at once if the
connections to it break, otherwise when it has sent no heartbeat for ``--heartbeat`` seconds.

Checkpoints are written in the background, by all processes together. One counts when it is complete. So the run goes on
with ``--resume`` from the last complete one, on as many processes and devices as there are then. Which images are in
which batch, and how many steps there are, does not depend on that. (Their number decides in which order gradients are
added up, and so the last bits.)

Read from the top down: start-up, data, one step and one measurement, checkpoints, the training loop, many processes on
one machine, the command line.

Example:
  $ python examples/train_distributed.py --local-processes 2    # on this machine; writes into runs/distributed
  $ python examples/train_distributed.py --local-processes 1 --devices-per-process 8 --resume
  $ srun python examples/train_distributed.py --output /shared/digits    # JAX finds the processes of SLURM
  $ python examples/train_distributed.py --output /shared/digits --coordinator 10.0.0.1:1234 --processes 2 --process 0
"""

import argparse
import contextlib
import functools
import inspect
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import train_digits
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import CheckpointManager
from tqdm import tqdm
from train_digits import Digits, Settings

from rmsprop_jax import rmsprop, sharding

# What does not change the run: it may be another one after --resume.
CIRCUMSTANCES = (
    *("output", "resume", "save_every", "heartbeat", "devices_per_process"),
    *("coordinator", "processes", "process", "local_processes"),
)

# --- Start-up ----------------------------------------------------------------------------------------------------


def connect(
    coordinator: str | None, processes: int | None, process: int | None, heartbeat: int, devices: int | None = None
) -> Mesh:
    """Waits for all processes, and returns the mesh of all their devices, with the one axis "data".

    Without ``coordinator``, JAX asks SLURM, Open MPI, Kubernetes or Cloud TPU.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if devices is not None:
        jax.config.update("jax_num_cpu_devices", devices)
    options = {}
    if "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters:
        options["heartbeat_timeout_seconds"] = heartbeat  # an older JAX takes 100
    jax.distributed.initialize(coordinator, processes, process, **options)
    return Mesh(jax.devices(), "data")


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """Ends this process at an error. At the usual end, JAX and Orbax would wait for a process that may be gone."""
    try:
        yield
    except (Exception, KeyboardInterrupt):
        traceback.print_exc()
        print(f"process {jax.process_index()} failed or lost another one, and ends", file=sys.stderr, flush=True)
        os._exit(1)


# --- Data --------------------------------------------------------------------------------------------------------


def to_devices(whole: np.ndarray, place: NamedSharding) -> jax.Array:
    """The rows of ``whole`` on the devices of all processes. A process reads only those that it gives to its own."""
    if place.is_fully_replicated:
        return jax.make_array_from_process_local_data(place, whole, whole.shape)
    rows = len(whole) // jax.process_count()
    own = whole[rows * jax.process_index() :][:rows]
    return jax.make_array_from_process_local_data(place, own, whole.shape)


def batches_from(step: int, data: Digits, settings: Settings) -> Iterator[Digits]:
    """All batches that come after the first ``step`` ones: a function of the settings, not of the processes."""
    first, skipped = divmod(step, len(data.labels) // settings["batch_size"])
    for epoch in range(first, settings["epochs"]):
        batches = train_digits.batches(data, settings["batch_size"], settings["seed"], epoch)
        yield from itertools.islice(batches, skipped, None)
        skipped = 0


# --- One step and one measurement --------------------------------------------------------------------------------


def make_step(mean_loss: Callable[..., jax.Array], tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Compiles one step, ``params, state, *batch`` to ``params, state, loss``.

    It is written as for one device. The mean over a batch that lies on many devices makes XLA add up their gradients.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: optax.Params, state: optax.OptState, *batch: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(mean_loss)(params, *batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def make_transformation(settings: Settings, steps: int) -> optax.GradientTransformation:
    """That of ``train_digits.py``. Clipping goes inside of ``sharding.zero``, as everything does."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings["lr"], warmup_steps=steps // 10, decay_steps=steps)
    names = ("alpha", "eps", "weight_decay", "momentum", "centered")
    return optax.chain(optax.clip_by_global_norm(1.0), rmsprop(lr=schedule, **{name: settings[name] for name in names}))


# --- Checkpoints -------------------------------------------------------------------------------------------------


def open_checkpoints(output: Path) -> CheckpointManager:
    """The checkpoints of the run in ``output``, each named by the number of steps done.

    All processes must see the same folder. Each writes what its devices hold into a temporary one. When all are done,
    process 0 renames it: a checkpoint is whole or not there.
    """
    options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True,  # those of a run that was killed while writing
        max_to_keep=3,
    )
    return CheckpointManager((output / "checkpoints").absolute(), options=options)


def save(checkpoints: CheckpointManager, step: int, params: Any, state: Any, settings: Settings) -> None:
    """Copies the arrays and returns; a thread writes them. Waits for the checkpoint before, if that is not written."""
    sharding.check_replicas((params, state))  # raises rather than save one of two different copies
    arrays = ocp.args.StandardSave({"params": params, "state": state})
    checkpoints.save(step, args=ocp.args.Composite(arrays=arrays, settings=ocp.args.JsonSave(settings)))


def start(
    checkpoints: CheckpointManager,
    init: Callable[[], optax.Params],
    tx: optax.GradientTransformation,
    place: NamedSharding,
) -> tuple[int, optax.Params, optax.OptState, optax.GradientTransformation]:
    """The number of steps done, parameters and state of the newest checkpoint, else from ``init``; and ``tx`` spread.

    A checkpoint holds whole arrays. Shapes with shardings tell Orbax which part of them each device gets: of this mesh,
    whatever mesh wrote it.
    """
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), jax.eval_shape(init))
    tx = sharding.zero(tx, like, "data")
    newest = checkpoints.latest_step()
    if newest is None:
        params = jax.jit(init, out_shardings=place)()
        return 0, params, tx.init(params), tx
    target = {"params": like, "state": sharding.abstract_state(tx, like)}
    restored = checkpoints.restore(newest, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(target)))
    return newest, restored.arrays["params"], restored.arrays["state"], tx


# --- Training ----------------------------------------------------------------------------------------------------


def train(
    settings: Settings, train_set: Digits, test_set: Digits, mesh: Mesh, checkpoints: CheckpointManager, save_every: int
) -> float:
    """Trains from the newest checkpoint, or else from the beginning, to the last step. Returns the test accuracy."""
    steps_per_epoch = len(train_set.labels) // settings["batch_size"]
    steps = settings["epochs"] * steps_per_epoch
    everywhere, in_parts = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    structure = nnx.graphdef(nnx.eval_shape(lambda: train_digits.Network(nnx.Rngs(0))))

    def init() -> optax.Params:
        return nnx.state(train_digits.Network(nnx.Rngs(settings["seed"])), nnx.Param)

    def mean_loss(params: optax.Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), alpha=0.1)
        return optax.softmax_cross_entropy(nnx.merge(structure, params)(images), targets).mean()

    @jax.jit
    def accuracy(params: optax.Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.mean(nnx.merge(structure, params)(images).argmax(axis=-1) == labels)

    test = [to_devices(x, everywhere) for x in test_set]
    done, params, state, tx = start(checkpoints, init, make_transformation(settings, steps), everywhere)
    step = make_step(mean_loss, tx)
    speaks = jax.process_index() == 0
    if speaks:
        before = f", {done} of {steps} steps were done before" if done else ""
        print(f"processes: {jax.process_count()}, devices: {jax.device_count()}{before}", flush=True)

    # Without a terminal (disable=None) there is no bar, only the line after each epoch.
    with tqdm(total=steps, initial=done, unit="step", disable=None if speaks else True) as bar:
        for batch in batches_from(done, train_set, settings):
            params, state, loss = step(params, state, *(to_devices(x, in_parts) for x in batch))
            done += 1
            bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
            bar.update()
            if done % save_every == 0 or done == steps:
                save(checkpoints, done, params, state, settings)
            if done % steps_per_epoch == 0:
                percent = 100 * float(accuracy(params, *test))
                if speaks:
                    bar.write(f"epoch {done // steps_per_epoch} of {settings['epochs']}: test accuracy {percent:.2f}%")
                    sys.stdout.flush()
    checkpoints.wait_until_finished()
    return float(accuracy(params, *test))


# --- Many processes on one machine -------------------------------------------------------------------------------


def run_processes(count: int) -> None:
    """Runs this command line in ``count`` processes. If one dies, ends the others, and this program with a message."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # runs what is after "finally"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "127.0.0.1:{1}".format(*free.getsockname())
    running: list[subprocess.Popen] = []
    try:
        for i in range(count):
            place = ["--local-processes", "0", "--coordinator", address, "--processes", str(count), "--process", str(i)]
            environment = os.environ | {"JAX_LOCAL_DEVICE_IDS": str(i)}  # one GPU for each, where there are some
            command = [sys.executable, *sys.argv, *place]
            running.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=environment))
        while any(p.poll() is None for p in running) and not any(p.returncode for p in running):
            time.sleep(0.05)
        failed = {i: p.returncode for i, p in enumerate(running) if p.returncode}
        limit = time.monotonic() + 2  # for what the others have to say
        while failed and any(p.poll() is None for p in running) and time.monotonic() < limit:
            time.sleep(0.05)
    finally:
        for p in running:
            with p:  # closes its pipe and waits
                p.kill()
    if 2 in failed.values():  # wrong options, and process 0 has said which
        sys.exit(2)
    if failed:
        ends = [f"was ended by {signal.Signals(-n).name}" if n < 0 else f"failed with {n}" for n in failed.values()]
        names = ", ".join(f"process {i} {end}" for i, end in zip(failed, ends, strict=True))
        sys.exit(f"{names}; all others are ended too; go on from the last whole checkpoint with --resume")


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone, in whatever way: its end of the pipe is closed then."""
    os.read(0, 1)
    os._exit(1)


# --- The command line --------------------------------------------------------------------------------------------


def make_parser(training_images: int) -> argparse.ArgumentParser:
    """The options of ``train_digits.py``, and those of processes."""
    parser = train_digits.make_parser(training_images)
    parser.description = "Train the network of train_digits.py in many processes, any of which can be killed."
    parser.set_defaults(output=Path("runs/distributed"))
    number = train_digits.whole_number
    add = parser.add_argument_group(
        "processes; without these options, JAX asks SLURM, Open MPI or Cloud TPU"
    ).add_argument
    add("--local-processes", type=number(0), metavar="N", help="start so many on this machine")
    add("--coordinator", metavar="HOST:PORT", help="of process 0, which opens the port")
    add("--processes", type=number(1), metavar="N", help="how many there are")
    add("--process", type=number(0), metavar="I", help="which of them this is, from 0 on")
    add("--devices-per-process", type=number(1), metavar="N", help="devices into which JAX splits a CPU")
    add("--heartbeat", type=number(1), default=10, metavar="SECONDS", help="silence after which a process is dead")
    add("--save-every", type=number(1), default=20, metavar="N", help="steps from one checkpoint to the next")
    return parser


def check_processes(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program if the options do not say which of how many processes this is."""
    given = [x is not None for x in (options.coordinator, options.processes, options.process)]
    if any(given) and not all(given):
        parser.error("arguments --coordinator, --processes, --process: give all three or none of them")
    if all(given) and options.local_processes:
        parser.error("argument --local-processes: not allowed with --coordinator, which says where the processes are")
    if options.local_processes == 0 and not any(given):
        parser.error("argument --local-processes: must be a whole number not less than 1, got 0")
    if all(given) and options.process >= options.processes:
        parser.error(f"argument --process: must be from 0 to {options.processes - 1}, got {options.process}")


def main() -> None:
    """Trains, and prints the accuracy on the held-out fifth."""
    train_set, test_set = train_digits.load_data()
    parser = make_parser(len(train_set.labels))
    options = parser.parse_args()
    check_processes(parser, options)
    train_digits.check_output(parser, options.output, options.resume)
    if options.local_processes:
        run_processes(options.local_processes)
        return
    if options.local_processes == 0:
        threading.Thread(target=end_with_parent, daemon=True).start()
    settings = {name: value for name, value in vars(options).items() if name not in CIRCUMSTANCES}
    try:
        where = (options.coordinator, options.processes, options.process)
        mesh = connect(*where, options.heartbeat, options.devices_per_process)
    except ValueError as error:
        if options.coordinator is not None:
            raise
        parser.error(f"JAX finds no cluster here ({error}); add --local-processes, or --coordinator and the like")
    if jax.process_index() > 0:
        parser.error = lambda message: sys.exit(2)  # process 0 says it
    if settings["batch_size"] % jax.device_count():
        parser.error(
            f"argument --batch-size: must be a multiple of the number of devices, {jax.device_count()}, "
            f"got {settings['batch_size']}"
        )
    with ends_at_once():
        checkpoints = open_checkpoints(options.output)
        train_digits.check_settings(parser, settings, train_digits.saved_settings(checkpoints) or settings)
        accuracy = train(settings, train_set, test_set, mesh, checkpoints, options.save_every)
        checkpoints.close()
    if jax.process_index() == 0:
        print(f"test accuracy: {accuracy:.2%}")


if __name__ == "__main__":
    main()
