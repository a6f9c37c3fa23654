"""Schedules from the files of torch's schedulers, compared with a live torch that continues from the same files."""

import io
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from compare import assert_close
from rmsprop_jax.checkpoints.torch_schedulers import schedules_of

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "pytorch.md"
RATES = (0.1, 0.03)  # of the two groups
END = 90  # the last epoch
MANY = 7 * (END + 1)  # updates of seven per epoch
Scheduler = lr_scheduler.LRScheduler
Optimizer = torch.optim.RMSprop


class Falling:
    """A callable object, whose attributes torch saves."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, epoch: int) -> float:
        return self.rate**epoch


def warmed_up(epoch: int) -> float:
    return (epoch + 1) / 10 if epoch < 10 else 1 / math.sqrt(epoch)


def wavy(epoch: int) -> float:
    return 0.95 + 0.08 * (epoch % 2)


def inverse(cycle: float) -> float:
    return 1 / (1 + cycle) ** 2


class Case(NamedTuple):
    """How torch makes a scheduler, and what its file cannot hold."""

    make: Callable[[Optimizer], Scheduler]
    functions: Any = None


def case(name: str, *args: Any, functions: Any = None, **kwargs: Any) -> Case:
    return Case(lambda optimizer: getattr(lr_scheduler, name)(optimizer, *args, **kwargs), functions)


def sequence(*parts: Case, milestones: list[int]) -> Case:
    functions = [part.functions for part in parts]
    return Case(
        lambda optimizer: lr_scheduler.SequentialLR(optimizer, [part.make(optimizer) for part in parts], milestones),
        functions if any(functions) else None,
    )


def chain(*parts: Case) -> Case:
    return Case(lambda optimizer: lr_scheduler.ChainedScheduler([part.make(optimizer) for part in parts]))


CASES = {
    "StepLR": case("StepLR", 30, 0.3),
    "StepLR that rises": case("StepLR", 1, 1.03),
    "MultiStepLR": case("MultiStepLR", [5, 30, 60], 0.2),
    "MultiStepLR, twice the same": case("MultiStepLR", [40, 0, 13, 40], 0.7),
    "ConstantLR": case("ConstantLR", 0.3, 50),
    "LinearLR": case("LinearLR", 0.1, 0.9, 50),
    "LinearLR to 0": case("LinearLR", 1.0, 0.0, 60),
    "ExponentialLR": case("ExponentialLR", 0.9),
    "ExponentialLR that rises": case("ExponentialLR", 1.01),
    "PolynomialLR": case("PolynomialLR", 60, 1.7),
    "CosineAnnealingLR": case("CosineAnnealingLR", 90, 0.002),
    "CosineAnnealingLR, up again": case("CosineAnnealingLR", 11),
    "CosineAnnealingLR of one epoch": case("CosineAnnealingLR", 1, 0.01),
    "CosineAnnealingWarmRestarts": case("CosineAnnealingWarmRestarts", 12, 1, 0.001),
    "CosineAnnealingWarmRestarts, longer": case("CosineAnnealingWarmRestarts", 4, 2),
    "CosineAnnealingWarmRestarts, longest": case("CosineAnnealingWarmRestarts", 1, 3, 0.01),
    "OneCycleLR": case("OneCycleLR", [2.5, 0.3], total_steps=90, base_momentum=[0.8, 0.7]),
    "OneCycleLR, linear": case("OneCycleLR", 0.3, 90, anneal_strategy="linear", pct_start=0.45, div_factor=3),
    "OneCycleLR, three phases": case("OneCycleLR", 0.3, epochs=9, steps_per_epoch=10, three_phase=True),
    "OneCycleLR, all down": case("OneCycleLR", 0.3, 90, pct_start=0.0, cycle_momentum=False),
    "CyclicLR": case("CyclicLR", [0.01, 0.0], [0.1, 0.2], 7, base_momentum=[0.8, 0.6]),
    "CyclicLR, triangular2": case("CyclicLR", 0.01, 0.1, 6, 11, mode="triangular2"),
    "CyclicLR, exp_range": case("CyclicLR", 0.01, 0.1, 13, mode="exp_range", gamma=0.98, cycle_momentum=False),
    "CyclicLR, half epochs": case("CyclicLR", 0.01, 0.1, 4.5, 7.25, mode="triangular2"),
    "CyclicLR, scale of cycles": case("CyclicLR", 0.01, 0.1, 7, scale_fn=inverse, functions={"CyclicLR": inverse}),
    "CyclicLR, scale of epochs": case(
        "CyclicLR", 0.01, 0.1, 7, scale_fn=inverse, scale_mode="iterations", functions={"CyclicLR": inverse}
    ),
    "LambdaLR": case("LambdaLR", warmed_up, functions={"LambdaLR": warmed_up}),
    "LambdaLR of groups": case("LambdaLR", [warmed_up, wavy], functions={"LambdaLR": [warmed_up, wavy]}),
    "LambdaLR of an object": case("LambdaLR", Falling(0.9), functions={"LambdaLR": Falling(0.5)}),
    "MultiplicativeLR": case("MultiplicativeLR", wavy, functions={"MultiplicativeLR": wavy}),
    "MultiplicativeLR of groups": case(
        "MultiplicativeLR", [wavy, Falling(0.999)], functions={"MultiplicativeLR": [wavy, Falling(0.1)]}
    ),
    "SequentialLR": sequence(
        case("LinearLR", 0.1, 1.0, 8), case("CosineAnnealingLR", 11, 0.001), case("ExponentialLR", 0.9),
        milestones=[8, 50],
    ),
    "SequentialLR of restarts": sequence(
        case("ConstantLR", 0.1, 4), case("CosineAnnealingWarmRestarts", 5, 2), case("MultiStepLR", [0, 3]),
        case("StepLR", 4), milestones=[9, 50, 50],
    ),
    "SequentialLR of cycles": sequence(
        case("ExponentialLR", 0.9), case("CyclicLR", 0.01, 0.1, 6), case("PolynomialLR", 40), milestones=[20, 46]
    ),
    "SequentialLR to one cycle": sequence(
        case("MultiplicativeLR", wavy, functions={"MultiplicativeLR": wavy}),
        case("LambdaLR", warmed_up, functions={"LambdaLR": warmed_up}),
        case("OneCycleLR", [2.5, 0.75], 50), milestones=[5, 40],
    ),
    "SequentialLR in another": sequence(
        sequence(case("LinearLR", 0.1, 1.0, 8), case("ConstantLR", 0.4, 3), milestones=[9]), case("StepLR", 4),
        milestones=[48],
    ),
    "SequentialLR of a chain": sequence(
        chain(case("LinearLR", 0.1, 1.0, 8), case("StepLR", 6)), case("LinearLR", 0.5, 0.1, 8), milestones=[48]
    ),
    "ChainedScheduler": chain(case("ConstantLR", 0.1, 60), case("ExponentialLR", 0.9), case("MultiStepLR", [3, 55])),
    "ChainedScheduler with a cosine": chain(
        case("LinearLR", 0.1, 1.0, 50), case("CosineAnnealingLR", 11), case("ExponentialLR", 0.98)
    ),
    "ChainedScheduler, a cosine first": chain(
        case("CosineAnnealingLR", 11), case("StepLR", 5, 0.7), case("PolynomialLR", 57), case("LinearLR", 0.9, 0.1, 70)
    ),
    "ChainedScheduler, a cosine last": chain(case("PolynomialLR", 56, 0.5), case("CosineAnnealingLR", 11)),
}  # fmt: skip


def optimizer_of_two_groups() -> Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in RATES]
    return Optimizer(groups, momentum=0.9)


def loaded(value: Any) -> Any:
    """What a safe ``torch.load`` gives of the file that ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Run:
    """A run in torch, with a scheduler that is stepped after every ``per_step``-th update."""

    def __init__(self, make: Callable[[Optimizer], Scheduler], per_step: int = 1) -> None:
        self.optimizer, self.per_step, self.updates = optimizer_of_two_groups(), per_step, 0
        self.scheduler = make(self.optimizer)

    def update(self) -> None:
        self.optimizer.step()
        self.updates += 1
        if self.updates % self.per_step == 0:
            self.scheduler.step()

    def files(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return loaded(self.scheduler.state_dict()), loaded(self.optimizer.state_dict())


def stopped(make: Callable[[Optimizer], Scheduler], step: int, per_step: int = 1) -> Run:
    run = Run(make, per_step)
    for _ in range(step):
        run.update()
    return run


def continued(make: Callable[[Optimizer], Scheduler], stop: Run) -> Run:
    """A new process that reads the files of a run."""
    run = Run(make, stop.per_step)
    scheduler, optimizer = stop.files()
    run.scheduler.load_state_dict(scheduler)
    run.optimizer.load_state_dict(optimizer)
    run.updates = stop.updates
    return run


def ours(stop: Run, functions: Any = None, **arguments: Any) -> list[dict[str, Any]]:
    scheduler, optimizer = stop.files()
    if functions is not None:
        arguments |= {"functions": functions, "total_steps": END}
    return schedules_of(
        scheduler, optimizer["param_groups"], step=stop.updates, updates_per_step=stop.per_step, **arguments
    )


# --- Every scheduler against torch ---------------------------------------------------------------------------


def from_here_on(run: Run, updates: int) -> list[dict[str, np.ndarray]]:
    """For each group the learning rate and the momentum of that many updates."""
    numbers = []
    for _ in range(updates):
        numbers.append([[group[key] for key in ("lr", "momentum")] for group in run.optimizer.param_groups])
        if len(numbers) < updates:
            run.update()
    return [dict(zip(("lr", "momentum"), columns, strict=True)) for columns in np.array(numbers).transpose(1, 2, 0)]


@pytest.mark.parametrize(
    ("epoch", "per_step", "more"),
    [(0, 1, 0), (47, 1, 0), (17, 7, 4)],
    ids=["at the start", "in mid-cycle", "in mid-epoch"],
)
@pytest.mark.usefixtures("x64")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # a SequentialLR does it to one inside
def test_numbers_are_those_of_torch_from_here_on(epoch: int, per_step: int, more: int) -> None:
    step, end = epoch * per_step + more, (END + 1) * per_step
    for name, (make, functions) in CASES.items():
        stop = stopped(make, step, per_step)
        want = from_here_on(continued(make, stop), end - step)
        steps = step + np.arange(MANY, dtype=np.int32)  # of one length, for which each operation is compiled once
        got = [{key: f(steps)[: end - step] for key, f in group.items()} for group in ours(stop, functions)]
        for group, expected in zip(got, want, strict=True):
            if "momentum" not in group:
                assert len(set(expected.pop("momentum"))) == 1, name
        # Torch's recursion of a cosine divides by 1 + cos, which loses digits near 0: 6e-14 was measured.
        assert_close({name: got}, {name: want}, rtol=1e-11)


@pytest.mark.usefixtures("x64")
def test_schedules_work_inside_jit_scan_and_vmap_and_with_strict_types() -> None:
    names = ("CosineAnnealingWarmRestarts, longer", "OneCycleLR", "SequentialLR of cycles", "LambdaLR")
    schedules = {name: ours(stopped(CASES[name].make, 47), CASES[name].functions)[0] for name in names}

    def numbers(step: jax.Array) -> Any:
        return jax.tree.map(lambda schedule: schedule(step), schedules)

    steps = jnp.arange(47, END, dtype=jnp.int32)
    with jax.numpy_dtype_promotion("strict"):
        scanned = jax.jit(
            lambda: jax.lax.scan(lambda step, _: (step + 1, numbers(step)), steps[0], length=len(steps))[1]
        )()
    want = numbers(steps)
    assert_close(scanned, want, rtol=1e-12)
    assert_close(jax.jit(jax.vmap(numbers))(steps), want, rtol=1e-12)
