"""Stops a PyTorch run half-way, continues it in JAX, and hands it back to PyTorch.

A convolution and a linear layer learn scikit-learn's handwritten digits with ``torch.optim.RMSprop``, two parameter
groups (the convolution with momentum, the linear layer centered) and a StepLR. After half of the steps the run is
saved to a ``.pt`` file. From there it runs on twice, on the same batches: in PyTorch as if nothing had happened, and as
a Flax model, with :func:`rmsprop_jax.checkpoints.from_torch`. Then :func:`rmsprop_jax.checkpoints.to_torch` takes
the Flax run back to PyTorch for one more step. Read from the top down: data, the model twice, the bridge between the
two, PyTorch, JAX, the way back.

Example:
  $ python examples/port_from_torch.py                      # half a minute; the file goes into a temporary folder
  $ python examples/port_from_torch.py --output runs/port   # keeps the file
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from sklearn.datasets import load_digits
from torch.nn import functional

from rmsprop_jax.checkpoints import from_torch, to_torch

STEPS = 40  # in PyTorch, and then as many again in both
STEPS_PER_RATE = 15  # the StepLR then halves the learning rates: twice before the stop, three times after
BATCH_SIZE = 64


# --- Data ------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Images, float32 ``(n, 1, 8, 8)`` in [0, 1] as torch lays them out, and their labels, int64 ``(n,)``."""

    images: np.ndarray
    labels: np.ndarray


def load_batches(number: int) -> list[Batch]:
    """Random batches of the 1,797 images, always the same ones."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    rng = np.random.default_rng(0)
    chosen = [rng.choice(len(images), BATCH_SIZE, replace=False) for _ in range(number)]
    return [Batch(images[indices], digits.target[indices]) for indices in chosen]


# --- The model, twice ------------------------------------------------------------------------------------


class TorchNetwork(torch.nn.Module):
    """A convolution, a pooling and a linear layer: 2,730 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.linear = torch.nn.Linear(16 * 4 * 4, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The logits, ``(n, 10)``, of ``images``, ``(n, 1, 8, 8)``."""
        x = functional.max_pool2d(functional.relu(self.conv(images)), kernel_size=2)
        return self.linear(x.flatten(start_dim=1))


class FlaxNetwork(nnx.Module):
    """The same with the channels last, as Flax has them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 16, kernel_size=(3, 3), rngs=rngs)
        self.linear = nnx.Linear(4 * 4 * 16, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The logits, ``(n, 10)``, of ``images``, ``(n, 8, 8, 1)``."""
        x = nnx.max_pool(nnx.relu(self.conv(images)), window_shape=(2, 2), strides=(2, 2))
        return self.linear(x.reshape(len(x), -1))


# --- The bridge: written once, for the weights and for every slot of the optimizer ------------------------


def to_params(named: Mapping[str, Any]) -> nnx.State:
    """Torch's names and layouts to Flax's."""
    # Torch flattens (channel, row, column), Flax (row, column, channel).
    linear = named["linear.weight"].reshape(10, 16, 4, 4).transpose(2, 3, 1, 0).reshape(4 * 4 * 16, 10)
    return nnx.State(
        {
            "conv": {"kernel": named["conv.weight"].transpose(2, 3, 1, 0), "bias": named["conv.bias"]},
            "linear": {"kernel": linear, "bias": named["linear.bias"]},
        }
    )


def from_params(params: nnx.State) -> dict[str, Any]:
    """The inverse of :func:`to_params`."""
    linear = params["linear"]["kernel"].reshape(4, 4, 16, 10).transpose(3, 2, 0, 1).reshape(10, 16 * 4 * 4)
    return {
        "conv.weight": params["conv"]["kernel"].transpose(3, 2, 0, 1),
        "conv.bias": params["conv"]["bias"],
        "linear.weight": linear,
        "linear.bias": params["linear"]["bias"],
    }


# --- In PyTorch ------------------------------------------------------------------------------------------


class TorchRun:
    """Model, optimizer and scheduler."""

    def __init__(self) -> None:
        self.model = TorchNetwork()
        groups = [
            {"params": self.model.conv.parameters(), "lr": 4e-3, "momentum": 0.9},
            {"params": self.model.linear.parameters(), "lr": 8e-3, "centered": True, "weight_decay": 1e-4},
        ]
        self.optimizer = torch.optim.RMSprop(groups, alpha=0.95, eps=1e-3)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, STEPS_PER_RATE, gamma=0.5)

    def train(self, batches: list[Batch]) -> list[float]:
        """One step on each batch; returns the losses before the steps."""
        losses = []
        for batch in batches:
            loss = functional.cross_entropy(self.model(torch.tensor(batch.images)), torch.tensor(batch.labels))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def save(self, path: Path) -> None:
        """Writes what training scripts write."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        torch.save({name: part.state_dict() for name, part in parts.items()}, path)


# --- In JAX ----------------------------------------------------------------------------------------------


def port(path: Path) -> tuple[FlaxNetwork, nnx.Optimizer]:
    """Model and optimizer as they are in the file."""
    saved = torch.load(path, weights_only=True)
    weights = {name: tensor.numpy() for name, tensor in saved["model"].items()}
    # The names in the optimizer's order, first group first: here that of the model, which has no buffers. The schedules
    # that are made of the scheduler's file continue where they were, since the step is in the state.
    tx, state = from_torch(saved["optimizer"], list(weights), to_params, scheduler_state_dict=saved["scheduler"])

    model = FlaxNetwork(nnx.Rngs(0))
    nnx.update(model, jax.tree.map(jnp.array, to_params(weights)))
    # nnx.Optimizer asks tx.init for the state to start from, and gets the one from the file.
    return model, nnx.Optimizer(model, tx._replace(init=lambda params: state), wrt=nnx.Param)


@nnx.jit
def train_step(model: FlaxNetwork, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Updates ``model`` and ``optimizer`` in place; returns the loss before the update."""

    def mean_loss(model: FlaxNetwork) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, gradients = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, gradients)
    return loss


def train(model: FlaxNetwork, optimizer: nnx.Optimizer, batches: list[Batch]) -> list[float]:
    """One step on each batch; returns the losses before the steps."""
    return [float(train_step(model, optimizer, b.images.transpose(0, 2, 3, 1), b.labels)) for b in batches]


# --- And back --------------------------------------------------------------------------------------------


def arrays(tree: Any) -> Any:
    """``tree`` with arrays in the place of Flax's variables, as :func:`to_params` makes it."""
    return jax.tree.map(lambda variable: variable[...], tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def port_back(model: FlaxNetwork, optimizer: nnx.Optimizer, like: TorchRun) -> TorchRun:
    """The Flax run as a PyTorch run, with the learning rates and the scheduler of ``like``."""
    run = TorchRun()
    weights = from_params(arrays(nnx.state(model, nnx.Param)))
    run.model.load_state_dict({name: torch.tensor(np.asarray(x)) for name, x in weights.items()})
    run.optimizer.load_state_dict(
        to_torch(
            optimizer.opt_state, list(weights), from_params, like=like.optimizer.state_dict(), tensor=torch.from_numpy
        )
    )
    run.scheduler.load_state_dict(like.scheduler.state_dict())
    return run


def largest_difference(run: TorchRun, other: TorchRun) -> float:
    """Between two parameters of the one and the other."""
    pairs = zip(run.model.parameters(), other.model.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def main() -> None:
    """Runs all of it and prints both losses side by side."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="keep checkpoint.pt in this folder")
    output = parser.parse_args().output

    torch.manual_seed(0)
    batches = load_batches(2 * STEPS + 1)
    run = TorchRun()
    run.train(batches[:STEPS])
    with tempfile.TemporaryDirectory() as temporary:
        folder = output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run.save(folder / "checkpoint.pt")
        model, optimizer = port(folder / "checkpoint.pt")

    stay = run.train(batches[STEPS:-1])
    move = train(model, optimizer, batches[STEPS:-1])
    print("step  loss in PyTorch  loss in JAX")
    for step, (a, b) in enumerate(zip(stay, move, strict=True), start=STEPS):
        print(f"{step:4}  {a:15.7f}  {b:11.7f}")
    print(f"largest difference of the losses: {np.max(np.abs(np.subtract(stay, move))):.1e}")

    returned = port_back(model, optimizer, run)
    (a,), (b,) = run.train(batches[-1:]), returned.train(batches[-1:])
    print(f"back in PyTorch, step {2 * STEPS}: loss {a:.7f}, and {b:.7f} by way of JAX")
    print(f"largest difference of the parameters after it: {largest_difference(run, returned):.1e}")


if __name__ == "__main__":
    main()
