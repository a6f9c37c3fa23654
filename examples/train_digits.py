"""Trains a small convolutional network on handwritten digits, and can be stopped at any moment.

The data are the 1,797 images of 8 × 8 pixels that come with scikit-learn. A fixed fifth of them is held out: it is
measured after every epoch and decides nothing. (The default settings come from cross-validation on the other four.)

A run is a function of its settings. No random state is carried from one epoch to the next, and a checkpoint after
every epoch holds all that is carried. So a run that was killed and continued with ``--resume`` ends, on the same
CPU, bit for bit where it would have ended. (A GPU may add numbers up in another order each time.)

Read from the top down: data, model and optimizer, one step and one measurement, checkpoints, the training loop, the
picture, the command line.

Example:
  $ python examples/train_digits.py            # half a minute; writes into runs/digits
  $ python examples/train_digits.py --resume   # continues after Ctrl-C or kill; prints the result of a finished run
  $ python examples/train_digits.py --centered --output runs/centered
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from rmsprop_jax import rmsprop

# For each epoch so far: the mean training "loss" and the held-out "accuracy" (a fraction).
History = dict[str, list[float]]

# What makes a run the run it is: the options of the command line except --output and --resume.
Settings = dict[str, Any]


# --- Data ------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Images, float32 ``(n, 8, 8, 1)`` in [0, 1], and their labels, integer ``(n,)``."""

    images: np.ndarray
    labels: np.ndarray


def load_data() -> tuple[Digits, Digits]:
    """The training set and the held-out fifth: the same split for every seed, with each digit in proportion."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., None]
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    return Digits(train_images, train_labels), Digits(test_images, test_labels)


@jax.jit
def shifted(images: jax.Array, key: jax.Array) -> jax.Array:
    """Each image moved by its own −1, 0 or 1 pixel down and to the right; what moves in is black."""

    def shift(image: jax.Array, key: jax.Array) -> jax.Array:
        row, column = jax.random.randint(key, (2,), 0, 3)
        return jax.lax.dynamic_slice(jnp.pad(image, ((1, 1), (1, 1), (0, 0))), (row, column, 0), image.shape)

    return jax.vmap(shift)(images, jax.random.split(key, len(images)))


def batches(data: Digits, batch_size: int, seed: int, epoch: int) -> Iterator[Digits]:
    """The batches of one epoch, shuffled and shifted: a function of ``seed`` and ``epoch``, with no hidden state.

    The few images that do not fill a batch sit this epoch out (others will in the next), so that all batches have
    one shape and the training step compiles once.
    """
    order_key, shift_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), epoch))
    order = np.asarray(jax.random.permutation(order_key, len(data.labels)))
    images = np.asarray(shifted(data.images, shift_key))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        chosen = order[start : start + batch_size]
        yield Digits(images[chosen], data.labels[chosen])


# --- Model and optimizer ---------------------------------------------------------------------------------


class Network(nnx.Module):
    """Two convolutions, a pooling and a linear layer: 29,066 parameters."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 32, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, kernel_size=(3, 3), rngs=rngs)
        self.linear = nnx.Linear(4 * 4 * 64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The logits, ``(n, 10)``, of ``images``, ``(n, 8, 8, 1)``."""
        x = nnx.relu(self.conv1(images))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), window_shape=(2, 2), strides=(2, 2))
        return self.linear(x.reshape(len(x), -1))


def make_optimizer(model: Network, schedule: optax.Schedule, settings: Settings) -> nnx.Optimizer:
    """One chain for what torch spells ``clip_grad_norm_``, ``optimizer.step`` and ``scheduler.step``."""
    names = ("alpha", "eps", "weight_decay", "momentum", "centered")
    transformation = optax.chain(
        optax.clip_by_global_norm(1.0),
        rmsprop(lr=schedule, **{name: settings[name] for name in names}),
    )
    return nnx.Optimizer(model, transformation, wrt=nnx.Param)


# --- One step and one measurement ------------------------------------------------------------------------


@nnx.jit
def train_step(model: Network, optimizer: nnx.Optimizer, batch: Digits) -> jax.Array:
    """Updates ``model`` and ``optimizer`` in place on one batch; returns the loss before the update.

    The loss is the cross-entropy with smoothed labels, 91% for the right digit and 1% for each other one, which
    keeps the network from becoming too sure of itself; it cannot fall below the entropy of those, 0.50 nats.
    """

    def mean_loss(model: Network) -> jax.Array:
        targets = optax.smooth_labels(jax.nn.one_hot(batch.labels, 10), alpha=0.1)
        return optax.softmax_cross_entropy(model(batch.images), targets).mean()

    loss, gradients = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def accuracy(model: Network, data: Digits) -> jax.Array:
    """The fraction of ``data`` to whose label the model gives the largest logit."""
    return jnp.mean(model(data.images).argmax(axis=-1) == data.labels)


# --- Checkpoints -----------------------------------------------------------------------------------------


def open_checkpoints(output: Path) -> ocp.CheckpointManager:
    """The checkpoints of the run in ``output``, each named by the number of epochs done.

    Orbax writes into a temporary folder and renames it when it is complete: a checkpoint is whole or not there.
    """
    options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True,  # those of a run that was killed while writing
        enable_async_checkpointing=False,  # so small that writing in the background would gain nothing
    )
    return ocp.CheckpointManager((output / "checkpoints").absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, run: tuple[Any, ...], history: History, settings: Settings) -> None:
    """Saves all that a run consists of: the arrays of ``run``, (model, optimizer), and how it came to them."""
    items = ocp.args.Composite(
        arrays=ocp.args.StandardSave(nnx.state(run)),
        history=ocp.args.JsonSave(history),
        settings=ocp.args.JsonSave(settings),
    )
    checkpoints.save(len(history["loss"]), args=items)


def restore(checkpoints: ocp.CheckpointManager, run: tuple[Any, ...]) -> History:
    """Puts the arrays of the newest checkpoint into ``run`` and returns its history, empty if there is none yet."""
    newest = checkpoints.latest_step()
    if newest is None:
        return {"loss": [], "accuracy": []}
    items = ocp.args.Composite(
        arrays=ocp.args.StandardRestore(nnx.state(run)),
        history=ocp.args.JsonRestore(),
    )
    restored = checkpoints.restore(newest, args=items)
    nnx.update(run, restored.arrays)
    return restored.history


def saved_settings(checkpoints: ocp.CheckpointManager) -> Settings | None:
    """The settings of the newest checkpoint, ``None`` if there is none yet."""
    newest = checkpoints.latest_step()
    if newest is None:
        return None
    return checkpoints.restore(newest, args=ocp.args.Composite(settings=ocp.args.JsonRestore())).settings


# --- Training --------------------------------------------------------------------------------------------


def train(settings: Settings, train_set: Digits, test_set: Digits, checkpoints: ocp.CheckpointManager) -> History:
    """Trains from the newest checkpoint, or else from the beginning, to the last epoch."""
    epochs, batch_size, seed = settings["epochs"], settings["batch_size"], settings["seed"]
    steps_per_epoch = len(train_set.labels) // batch_size
    steps = epochs * steps_per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings["lr"], warmup_steps=steps // 10, decay_steps=steps)

    model = Network(nnx.Rngs(seed))
    optimizer = make_optimizer(model, schedule, settings)
    history = restore(checkpoints, (model, optimizer))
    done = len(history["loss"])
    if done:
        print(f"{done} of {epochs} epochs were done before")

    # Without a terminal (disable=None) there is no bar, only the line after each epoch.
    with tqdm(total=steps, initial=done * steps_per_epoch, unit="step", disable=None) as bar:
        for epoch in range(done, epochs):
            # To be shown: the optimizer counts its steps and reads the schedule itself.
            learning_rates = np.asarray(schedule(epoch * steps_per_epoch + np.arange(steps_per_epoch)))
            losses = []
            for lr, batch in zip(learning_rates, batches(train_set, batch_size, seed, epoch), strict=True):
                losses.append(float(train_step(model, optimizer, batch)))
                bar.set_postfix(loss=f"{losses[-1]:.4f}", lr=f"{lr:.2e}", refresh=False)
                bar.update()
            history["loss"].append(float(np.mean(losses)))
            history["accuracy"].append(float(accuracy(model, test_set)))
            save(checkpoints, (model, optimizer), history, settings)
            line = "epoch {} of {}: loss {:.4f}, test accuracy {:.2%}"
            bar.write(line.format(epoch + 1, epochs, history["loss"][-1], history["accuracy"][-1]))
    return history


# --- The picture -----------------------------------------------------------------------------------------


def draw(history: History, path: Path) -> None:
    """Draws the loss and the accuracy over the epochs."""
    blue, orange = "#0072B2", "#D55E00"  # Okabe and Ito's: told apart by every kind of eye
    epochs = range(1, 1 + len(history["loss"]))
    percent = [100 * fraction for fraction in history["accuracy"]]
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, history["loss"], color=blue, marker="o", markersize=4, clip_on=False)
    left.set_title("Training loss, 0.50 at the very best")
    left.set(xlabel="epoch", ylabel="cross-entropy with smoothed labels (nats)", ylim=(0, None))
    right.plot(epochs, percent, color=orange, marker="s", markersize=4, clip_on=False)
    right.set_title(f"Test accuracy, {percent[-1]:.2f}% at the end")
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(None, 100))
    for axes in (left, right):
        axes.set_xlim(0, len(epochs))
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=150)


# --- The command line ------------------------------------------------------------------------------------


def whole_number(least: int, most: float = math.inf) -> Callable[[str], int]:
    """A type for argparse: an integer from ``least`` to ``most``."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and least <= int(text) <= most):
            wanted = f"from {least} to {most}" if math.isfinite(most) else f"not less than {least}"
            raise argparse.ArgumentTypeError(f"must be a whole number {wanted}, got {text}")
        return int(text)

    return parse


def hyperparameter(name: str) -> Callable[[str], float]:
    """A type for argparse: a finite number that ``rmsprop`` accepts as its argument ``name``."""

    def parse(text: str) -> float:
        try:
            rmsprop(**{name: float(text)})
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if math.isinf(float(text)):
            raise argparse.ArgumentTypeError(f"must be finite, got {text}")
        return float(text)

    return parse


def make_parser(training_images: int) -> argparse.ArgumentParser:
    """The options; those of RMSProp have the names of ``torch.optim.RMSprop``."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description="Train a small convolutional network on scikit-learn's handwritten digits with rmsprop_jax.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=whole_number(1), default=15, metavar="N", help="passes over the training images")
    add("--batch-size", type=whole_number(1, training_images), default=32, metavar="N", help="images in a batch")
    add("--seed", type=whole_number(0, 2**32 - 1), default=0, metavar="N", help="of the weights and the shuffling")
    rates = parser.add_argument_group("RMSProp, as in torch.optim.RMSprop")
    for name, default, text in (
        ("lr", 5e-4, "the highest learning rate, after the warm-up"),
        ("alpha", 0.99, "smoothing constant of the average of the squared gradient"),
        ("eps", 1e-8, "added to the root of that average"),
        ("weight_decay", 0.0, "L2 penalty"),
        ("momentum", 0.9, "decay of the momentum buffer; 0: none"),
    ):
        option = "--" + name.replace("_", "-")
        rates.add_argument(option, type=hyperparameter(name), default=default, metavar="X", help=text)
    rates.add_argument("--centered", action="store_true", help="divide by the standard deviation of the gradient")
    files = parser.add_argument_group("files")
    files.add_argument(
        "--output", type=Path, default=Path("runs/digits"), metavar="FOLDER", help="for checkpoints and curves.png"
    )
    files.add_argument("--resume", action="store_true", help="go on where the run in the output folder stopped")
    return parser


def check_output(parser: argparse.ArgumentParser, output: Path, resume: bool) -> None:
    """Makes the folder ``output``; ends the program rather than write over anything in it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        is_empty = not any(output.iterdir())
    except OSError as error:
        parser.error(f"argument --output: {output} cannot be made or read as a folder: {error.strerror}")
    if not is_empty and not resume:
        parser.error(
            f"argument --output: {output} is not empty; add --resume to go on with the run in it, "
            "or choose another folder with --output"
        )
    if not is_empty and not (output / "checkpoints").is_dir():
        parser.error(f"argument --resume: {output} holds other files and no run; choose another folder with --output")


def check_settings(parser: argparse.ArgumentParser, settings: Settings, saved: Settings) -> None:
    """Ends the program if a run that was started with ``saved`` would go on with other ``settings``."""
    for name, value in settings.items():
        if value != saved.get(name):
            option = "--" + name.replace("_", "-")
            parser.error(
                f"argument --resume: the run was started with {option} {saved.get(name)}, not {value}; "
                "repeat its settings, or choose another folder with --output"
            )


def main() -> None:
    """Trains, draws the curves and prints the accuracy on the held-out fifth."""
    train_set, test_set = load_data()
    parser = make_parser(len(train_set.labels))
    settings = vars(parser.parse_args())
    output, resume = settings.pop("output"), settings.pop("resume")
    check_output(parser, output, resume)
    with open_checkpoints(output) as checkpoints:
        check_settings(parser, settings, saved_settings(checkpoints) or settings)
        history = train(settings, train_set, test_set, checkpoints)
    draw(history, output / "curves.png")
    print(f"curves: {output / 'curves.png'}")
    print(f"test accuracy: {history['accuracy'][-1]:.2%}")


if __name__ == "__main__":
    main()
