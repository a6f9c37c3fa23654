"""Schedules from the files of torch's schedulers, compared with a live torch that continues from the same files."""

import io
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compare import assert_close
from rmsprop_jax.checkpoints.torch_schedulers import schedules_of

torch = pytest.importorskip("torch")
lr_scheduler = torch.optim.lr_scheduler

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
    names = ("CosineAnnealingWarmRestarts, longer", "OneCycleLR", "SequentialLR of cycles")
    schedules = {name: ours(stopped(CASES[name].make, 47), CASES[name].functions)[0] for name in names}

    def numbers(step: jax.Array) -> Any:
        return jax.tree.map(lambda schedule: schedule(step), schedules)

    @jax.jit
    def in_scan(first: jax.Array) -> Any:
        every_tenth = jax.vmap(lambda step, tens: numbers(step + 10 * tens), in_axes=(None, 0))
        tens = jnp.arange(4, dtype=jnp.int32)
        return jax.lax.scan(lambda step, _: (step + 1, every_tenth(step, tens)), first, length=10)[1]

    with jax.numpy_dtype_promotion("strict"):
        got = in_scan(jnp.int32(47))
    want = numbers(47 + jnp.arange(MANY, dtype=jnp.int32))
    assert_close(jax.tree.map(lambda x: x.T.ravel(), got), jax.tree.map(lambda x: x[:40], want), rtol=1e-12)


# --- The moment of the file ------------------------------------------------------------------------------------

HALVED = CASES["StepLR"].make(optimizer_of_two_groups()).state_dict() | {"step_size": 2, "gamma": 0.5}
GROUPS = [{"lr": lr, "momentum": 0.9} for lr in RATES]


def halved(at: int) -> list[dict[str, Any]]:
    """The groups of a run whose rate halves at every second epoch."""
    return [group | {"lr": group["lr"] * 0.5 ** (at // 2)} for group in GROUPS]


def rates(schedules: list[dict[str, Any]], steps: range) -> list[float]:
    return [round(float(schedules[0]["lr"](step)) / RATES[0], 6) for step in steps]


def test_earlier_steps_have_the_rate_of_the_file() -> None:
    schedules = schedules_of(HALVED | {"last_epoch": 4}, halved(4), step=4)
    assert rates(schedules, range(7)) == [0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.125]


def test_file_from_before_scheduler_step_has_one_more_update() -> None:
    """``optimizer.step()`` was called three times, ``scheduler.step()`` two times."""
    with pytest.raises(
        ValueError, match=r"has made 3 updates and the scheduler 2 steps, .* from 2 to 2; give updates_per"
    ):
        schedules_of(HALVED | {"last_epoch": 2}, halved(2), step=3)
    schedules = schedules_of(HALVED | {"last_epoch": 2}, halved(2), step=3, updates_since_step=1)
    assert rates(schedules, range(3, 6)) == [0.5, 0.25, 0.25]


def test_updates_since_step_are_those_of_the_caller() -> None:
    """A loss scaler skipped updates, so that the optimizer made fewer than the scheduler counts."""
    with pytest.raises(ValueError, match="step would be from 30 to 39"):
        schedules_of(HALVED | {"last_epoch": 3}, halved(3), step=24, updates_per_step=10)
    schedules = schedules_of(HALVED | {"last_epoch": 3}, halved(3), step=24, updates_per_step=10, updates_since_step=8)
    assert rates(schedules, range(24, 28)) == [0.5, 0.5, 0.25, 0.25]


def test_rate_set_by_hand_is_refused_with_both_numbers() -> None:
    groups = halved(2)
    groups[1]["lr"] = 0.0151
    with pytest.raises(ValueError, match=r"'lr' of group 1 is 0.0151, but StepLR has 0.015\d* at last_epoch 2; "):
        schedules_of(HALVED | {"last_epoch": 2}, groups, step=2)
    groups[1]["lr"] = 0.015 * (1 + 1e-7)  # rounding of a float32 tensor
    assert len(schedules_of(HALVED | {"last_epoch": 2}, groups, step=2)) == 2


def test_momentum_set_by_hand_is_refused() -> None:
    stop = stopped(CASES["OneCycleLR"].make, 20)
    stop.optimizer.param_groups[0]["momentum"] = 0.5
    with pytest.raises(ValueError, match=r"'momentum' of group 0 is 0.5, but OneCycleLR has 0.8"):
        ours(stop)


def test_schedules_are_made_inside_jit() -> None:
    rate = jax.jit(lambda step: schedules_of(HALVED | {"last_epoch": 2}, halved(2), step=2)[0]["lr"](step))
    assert_close(rate(jnp.int32(4)), jnp.float32(0.025), ulps=4)


def test_numbers_may_be_tensors_and_notes_may_be_missing() -> None:
    """``lr=torch.tensor(...)`` makes tensors of all rates. Older torch writes fewer notes, or ``verbose``."""
    bases = [torch.tensor(lr, dtype=torch.float64) for lr in RATES]
    file = {"step_size": np.int64(2), "gamma": np.float32(0.5), "base_lrs": bases, "last_epoch": 2, "verbose": False}
    groups = [{"lr": torch.tensor(group["lr"])} for group in halved(2)]
    assert rates(schedules_of(file, groups, step=2), range(2, 5)) == [0.5, 0.5, 0.25]


# --- Where torch has no number ------------------------------------------------------------------------------


def test_one_cycle_is_nan_where_torch_raises() -> None:
    make = CASES["OneCycleLR"].make
    run = stopped(make, END)
    schedules = ours(run)
    run.optimizer.step()
    with pytest.raises(ValueError, match="Tried to step"):
        run.scheduler.step()
    for schedule in schedules[0].values():
        assert np.isfinite(schedule(END))
        assert np.isnan(schedule(END + 1))


def test_table_of_functions_is_nan_where_it_ends() -> None:
    schedules = ours(stopped(CASES["LambdaLR"].make, 3), CASES["LambdaLR"].functions)
    assert np.isfinite(schedules[0]["lr"](END))
    assert np.isnan(schedules[0]["lr"](END + 1))


# --- Functions -------------------------------------------------------------------------------------------------


def test_object_of_the_caller_stays_as_it_is() -> None:
    given = Falling(0.5)
    schedules = ours(stopped(CASES["LambdaLR of an object"].make, 3), {"LambdaLR": given})
    assert_close(schedules[0]["lr"](5), jnp.float32(0.1 * 0.9**5), ulps=4)
    assert given.rate == 0.5


def test_functions_of_the_wrong_class_do_not_agree_with_the_file() -> None:
    stop = stopped(CASES["LambdaLR"].make, 20)
    with pytest.raises(ValueError, match=r"'lr' of group 0 is 0.0223.*, but MultiplicativeLR has "):
        ours(stop, {"MultiplicativeLR": warmed_up})


def test_scale_of_a_cyclic_lr_that_is_not_given_is_noticed() -> None:
    stop = stopped(CASES["CyclicLR, scale of cycles"].make, 20)
    with pytest.raises(ValueError, match=r"'lr' of group 0 is .*, but CyclicLR has "):
        ours(stop)


# --- Files that are refused ---------------------------------------------------------------------------------


def file_of(name: str, step: int = 20) -> Callable[..., Any]:
    """What reads the files of a case after changes to them."""

    def changed(change: Callable[[dict[str, Any]], Any], change_groups: Any = None, **arguments: Any) -> Any:
        scheduler, optimizer = stopped(CASES[name].make, step).files()
        change(scheduler)
        (change_groups or (lambda groups: None))(optimizer["param_groups"])
        if CASES[name].functions:
            arguments = {"functions": CASES[name].functions, "total_steps": END} | arguments
        return schedules_of(scheduler, optimizer["param_groups"], **({"step": step} | arguments))

    return changed


def put(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda file: file.update(values)


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda file: file.__delitem__(key)


def nothing(file: Any) -> None:
    pass


WHOLE = "a whole number from 1 to 1073741824"
HUGE = 10**400

# A file, what is wrong with it, arguments, and parts of the message.
REFUSED: dict[str, tuple[str, Callable[..., Any], dict[str, Any], type[Exception], str]] = {
    "no gamma": ("StepLR", drop("gamma"), {}, ValueError, "must have the keys of .* got ['step_size']"),
    "more keys": ("StepLR", put(warmup=5), {}, ValueError, "got ['gamma', 'step_size', 'warmup']; give"),
    "gamma NaN": ("StepLR", put(gamma=math.nan), {}, ValueError, "'gamma' of scheduler_state_dict must be a finite"),
    "gamma infinite": ("ExponentialLR", put(gamma=math.inf), {}, ValueError, "'gamma' .* above 0, got inf"),
    "gamma 0": ("ExponentialLR", put(gamma=0), {}, ValueError, "'gamma' .* above 0, got 0"),
    "gamma huge": ("ExponentialLR", put(gamma=HUGE), {}, ValueError, "'gamma' .* above 0, got 1000"),
    "gamma true": ("ExponentialLR", put(gamma=True), {}, TypeError, "'gamma' .* above 0, got True"),
    "gamma text": ("ExponentialLR", put(gamma="0.9"), {}, TypeError, "'gamma' .* above 0, got '0.9'"),
    "gamma complex": ("ExponentialLR", put(gamma=torch.tensor(1j)), {}, TypeError, "'gamma' .* got tensor"),
    "gamma meta": ("ExponentialLR", put(gamma=torch.ones((), device="meta")), {}, TypeError, "'gamma' .* got tensor"),
    "gamma of two": ("ExponentialLR", put(gamma=np.ones(2)), {}, TypeError, "'gamma' .* got array"),
    "size 0": ("StepLR", put(step_size=0), {}, ValueError, f"'step_size' .* must be {WHOLE}, got 0"),
    "size 2.5": ("StepLR", put(step_size=2.5), {}, ValueError, f"'step_size' .* must be {WHOLE}, got 2.5"),
    "size NaN": ("StepLR", put(step_size=math.nan), {}, ValueError, f"'step_size' .* must be {WHOLE}, got nan"),
    "size huge": ("StepLR", put(step_size=HUGE), {}, ValueError, f"'step_size' .* must be {WHOLE}, got 1000"),
    "size None": ("StepLR", put(step_size=None), {}, TypeError, f"'step_size' .* must be {WHOLE}, got None"),
    "last_epoch -1": ("StepLR", put(last_epoch=-1), {}, ValueError, "'last_epoch' .* from 0 to 1073741824, got -1"),
    "no last_epoch": ("StepLR", drop("last_epoch"), {}, ValueError, "scheduler_state_dict has no 'last_epoch'"),
    "no base_lrs": ("StepLR", drop("base_lrs"), {}, ValueError, "scheduler_state_dict has no 'base_lrs'"),
    "one base": ("StepLR", put(base_lrs=[0.1]), {}, ValueError, "'base_lrs' .* has 1 numbers, but param_groups has 2"),
    "base of a dict": ("StepLR", put(base_lrs={0: 0.1}), {}, TypeError, "'base_lrs' .* must be a list, got {0: 0.1}"),
    "base negative": ("StepLR", put(base_lrs=[0.1, -1.0]), {}, ValueError, "'base_lrs' .* at 1 must be .* got -1.0"),
    "milestones list": ("MultiStepLR", put(milestones=[1, 2]), {}, TypeError, "'milestones' .* must be a dict"),
    "milestone 1.5": ("MultiStepLR", put(milestones={1.5: 1}), {}, ValueError, "'milestones' .* got 1.5"),
    "milestone count": ("MultiStepLR", put(milestones={3: -1}), {}, ValueError, "'milestones' .* at 3 must .* got -1"),
    "factor 2": ("ConstantLR", put(factor=2), {}, ValueError, "'factor' .* above 0 and at most 1, got 2"),
    "end_factor -1": ("LinearLR", put(end_factor=-1), {}, ValueError, "'end_factor' .* ≥ 0 and at most 1, got -1"),
    "power -1": ("PolynomialLR", put(power=-1), {}, ValueError, "'power' .* ≥ 0, got -1"),
    "T_max 10.5": ("CosineAnnealingLR", put(T_max=10.5), {}, ValueError, f"'T_max' .* must be {WHOLE}, got 10.5"),
    "T_max another": ("CosineAnnealingLR", put(T_max=91), {}, ValueError, "'lr' of group 0 .* CosineAnnealingLR"),
    "T_cur of step(epoch)": (
        "CosineAnnealingWarmRestarts", put(T_cur=8.0), {}, ValueError, "'T_cur' .* must be 8, .* got 8.0; .* step(e"
    ),
    "T_i": ("CosineAnnealingWarmRestarts, longer", put(T_i=8), {}, ValueError, "'T_i' .* must be 16, .* 20, got 8"),
    "T_mult": ("CosineAnnealingWarmRestarts", put(T_mult=0), {}, ValueError, f"'T_mult' .* must be {WHOLE}, got 0"),
    "total_steps": ("OneCycleLR", put(total_steps=91), {}, ValueError, "'end_step' .* must be total_steps − 1 = 90"),
    "end_step": (
        "OneCycleLR", lambda file: file["_schedule_phases"][0].update(end_step=0.0), {}, ValueError,
        "and in none where it begins .* got [0.0, 89.0]",
    ),
    "start_lr": (
        "OneCycleLR", lambda file: file["_schedule_phases"][1].update(start_lr="params"), {}, ValueError,
        "'start_lr' of scheduler_state_dict['_schedule_phases'][1] must be 'initial_lr' or 'max_lr' or",
    ),
    "phases": ("OneCycleLR", put(_schedule_phases=[1]), {}, TypeError, "'_schedule_phases' .* a list of dicts"),
    "no phases": ("OneCycleLR", put(_schedule_phases=[]), {}, TypeError, "'_schedule_phases' .* a list of dicts"),
    "anneal": ("OneCycleLR", put(_anneal_func_type="exp"), {}, ValueError, "'_anneal_func_type' .* 'cos' or 'linear'"),
    "betas": ("OneCycleLR", put(use_beta1=True), {}, ValueError, "moves 'betas', which RMSprop does not have"),
    "cycle_momentum": ("OneCycleLR", put(cycle_momentum=1), {}, ValueError, "'cycle_momentum' .* True or False"),
    "mode": ("CyclicLR", put(mode="square"), {}, ValueError, "'mode' .* must be 'triangular' or .*, got 'square'"),
    "mode list": ("CyclicLR", put(mode=["triangular"]), {}, ValueError, "'mode' .* must be 'triangular' or"),
    "step_ratio": ("CyclicLR", put(step_ratio=0.0), {}, ValueError, "'step_ratio' .* above 0 and at most 1, got 0.0"),
    "scale of an object": ("CyclicLR", put(_scale_fn_custom={"a": 1}), {}, TypeError, "must be {'CyclicLR': function}"),
    "no functions": ("LambdaLR", nothing, {"functions": None}, TypeError, "must be {'LambdaLR': function} or {'Mul"),
    "a bare function": ("LambdaLR", nothing, {"functions": warmed_up}, TypeError, "must be {'LambdaLR': function} or"),
    "other functions": ("LambdaLR", nothing, {"functions": {"CyclicLR": wavy}}, TypeError, "must be {'LambdaLR': func"),
    "no function": ("LambdaLR", nothing, {"functions": {"LambdaLR": 3}}, TypeError, "a function or a list of 2, got 3"),
    "one function": ("LambdaLR", nothing, {"functions": {"LambdaLR": [wavy]}}, TypeError, "a function or a list of 2"),
    "function without a number": (
        "LambdaLR", nothing, {"functions": {"LambdaLR": lambda epoch: None}}, TypeError, "at 0 must be a finite"
    ),
    "function that fails": (
        "LambdaLR", nothing, {"functions": {"LambdaLR": lambda epoch: 1e300 ** (epoch - 3)}}, ValueError,
        "functions of scheduler_state_dict at 5 must be a finite number, got the error OverflowError",
    ),
    "unused base": ("OneCycleLR", put(base_lrs=[0.1, "x"]), {}, TypeError, "'base_lrs' .* at 1 must be .* got 'x'"),
    "no total": ("LambdaLR", nothing, {"total_steps": None}, ValueError, "total_steps must be given with functions"),
    "total too small": ("LambdaLR", nothing, {"total_steps": 5}, ValueError, "LambdaLR has nan at last_epoch 20"),
    "one lambda": ("LambdaLR", put(lr_lambdas=[None]), {}, ValueError, "'lr_lambdas' .* has 1 entries for 2 groups"),
    "attributes of a function": (
        "LambdaLR", put(lr_lambdas=[{"rate": 1}, None]), {}, TypeError, "functions['LambdaLR'] must be an object"
    ),
    "functions of StepLR": ("StepLR", nothing, {"functions": {"LambdaLR": wavy}}, ValueError, "must be None .* StepLR"),
    "functions of a sequence": (
        "SequentialLR", nothing, {"functions": {"LambdaLR": wavy}}, TypeError, "must be a list of 3 for scheduler_state"
    ),
    "milestones fall": ("SequentialLR", put(_milestones=[50, 8]), {}, ValueError, "'_milestones' .* must rise, one"),
    "one milestone": ("SequentialLR", put(_milestones=[8]), {}, ValueError, "'_milestones' .* one less than the 3 sch"),
    "no schedulers": ("SequentialLR", put(_schedulers=[]), {}, TypeError, "'_schedulers' .* must be a list of dicts"),
    "part": (
        "SequentialLR", lambda file: file["_schedulers"][2].update(gamma=-1.0), {}, ValueError,
        "'gamma' of scheduler_state_dict['_schedulers'][2] must be a finite number above 0, got -1.0",
    ),
    "later product": (
        "SequentialLR", lambda file: file["_schedulers"][2].update(_schedulers=[], _milestones=[]), {}, ValueError,
        "scheduler_state_dict['_schedulers'][2] must have the keys of",
    ),
    "chain of restarts": (
        "ChainedScheduler",
        lambda file: file["_schedulers"].append(stopped(CASES["CosineAnnealingWarmRestarts"].make, 20).files()[0]), {},
        ValueError, "must chain schedulers that multiply .* got ConstantLR, .*, CosineAnnealingWarmRestarts; or leave",
    ),
    "chain of two cosines": (
        "ChainedScheduler with a cosine", lambda file: file["_schedulers"].append(file["_schedulers"][1]), {},
        ValueError,
        "at most one CosineAnnealingLR",
    ),
    "chain of other rates": (
        "ChainedScheduler", lambda file: file["_schedulers"][0].update(base_lrs=[1.0, 1.0]), {}, ValueError,
        "must chain schedulers of the same 'base_lrs'",
    ),
    "step true": ("StepLR", nothing, {"step": True}, TypeError, "step must be a whole number .*, got True"),
    "step negative": ("StepLR", nothing, {"step": -1}, ValueError, "step must be a whole number from 0 .*, got -1"),
    "no updates": ("StepLR", nothing, {"updates_per_step": 0}, ValueError, "updates_per_step must be a whole number"),
    "too many since": ("StepLR", nothing, {"updates_since_step": 2}, ValueError, "from 0 to 1, got 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_malformed_file_is_refused_by_name(name: str) -> None:
    case_name, change, arguments, kind, message = REFUSED[name]
    with pytest.raises(kind) as caught:
        file_of(case_name)(change, **arguments)
    assert re.search(".*".join(map(re.escape, message.split(".*"))), str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "kind", "message"),
    [
        ({}, TypeError, "param_groups must be the list of dicts"),
        ([1], TypeError, "param_groups must be the list of dicts"),
        ([], ValueError, "param_groups is empty"),
        ([{"lr": 0.1}, {}], ValueError, "group 1 of param_groups has no 'lr'"),
        ([{"lr": 0.1}, {"lr": None}], TypeError, "'lr' of group 1 must be a finite number, got None"),
        ([{"lr": 0.1}], ValueError, "has 2 numbers, but param_groups has 1 groups"),
    ],
)
def test_groups_that_are_none_are_refused(groups: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        schedules_of(HALVED, groups, step=0)


@pytest.mark.parametrize("file", [None, [], "StepLR", {1: 2}])
def test_what_is_no_state_dict_is_refused(file: Any) -> None:
    with pytest.raises(TypeError, match=r"scheduler_state_dict must be what scheduler.state_dict\(\) returns, got"):
        schedules_of(file, GROUPS, step=0)


@pytest.mark.parametrize("name", ["SequentialLR", "ChainedScheduler"])
def test_file_that_contains_itself_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be in at most 5 others"):
        file_of(name)(lambda file: file.update(_schedulers=[file] * len(file["_schedulers"])))


def test_scheduler_that_follows_from_the_rates_before_it_is_refused() -> None:
    """A MultiplicativeLR in second place multiplies what the first one left."""
    first, second = case("ConstantLR", 0.5, 3), CASES["MultiplicativeLR"]
    both = sequence(first, second, milestones=[30])
    with pytest.raises(ValueError, match="must not be a MultiplicativeLR, which follows from the learning"):
        ours(stopped(both.make, 7), both.functions)


# --- ReduceLROnPlateau ----------------------------------------------------------------------------------------


def plateau() -> Mapping[str, Any]:
    """The scope of the block of the page that continues it in Optax."""
    block = next(
        block for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.S | re.M) if "plateau_of" in block
    )
    scope: dict[str, Any] = {"jnp": jnp}
    exec(block[: block.index("\nfile = ")], scope)
    return scope


def test_plateau_is_refused_with_the_page_that_continues_it() -> None:
    file = lr_scheduler.ReduceLROnPlateau(optimizer_of_two_groups()).state_dict()
    with pytest.raises(ValueError, match=r"optax.contrib.reduce_on_plateau as docs/pytorch.md says under 'A learning-"):
        schedules_of(file, GROUPS, step=0)
    assert "## A learning-rate scheduler" in PAGE.read_text()


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@pytest.mark.usefixtures("x64")
def test_plateau_of_the_page_is_that_of_torch(mode: str, threshold_mode: str) -> None:
    """Four settings, half of them continued after 40 metrics, among which better, equal and worse ones are frequent."""
    rng = np.random.default_rng([mode == "min", threshold_mode == "rel"])
    update = jax.jit(
        lambda plateau, state, value: plateau.update(updates={}, state=state, value=value)[1], static_argnums=0
    )

    def one_of(*numbers: float) -> float:
        return float(rng.choice(numbers))

    reductions = 0
    for trial in range(4):
        optimizer = optimizer_of_two_groups()
        scheduler = lr_scheduler.ReduceLROnPlateau(
            optimizer, mode, factor=one_of(0.1, 0.5, 0.9), patience=int(rng.integers(0, 5)),
            threshold=one_of(0.0, 1e-4, 0.05), threshold_mode=threshold_mode, cooldown=int(rng.integers(0, 4)),
            min_lr=[one_of(0.0, 0.004), 0.001], eps=one_of(1e-8, 0.01),
        )  # fmt: skip
        drift = np.linspace(3, 2, 160) if mode == "min" else np.linspace(2, 3, 160)
        metrics = np.round(drift + rng.normal(0, 0.2, 160), 2).tolist()
        for metric in metrics[: 40 * (trial % 2)]:
            scheduler.step(metric)
        lr = optimizer.param_groups[0]["lr"]
        transformation, state, value_of = plateau()["plateau_of"](loaded(scheduler.state_dict()), lr)
        for metric in metrics[40 * (trial % 2) :]:
            before = optimizer.param_groups[0]["lr"]
            scheduler.step(metric)
            state = update(transformation, state, value_of(metric))
            assert_close(np.float64(lr * state.scale), np.float64(optimizer.param_groups[0]["lr"]), rtol=1e-12)
            reductions += optimizer.param_groups[0]["lr"] < before
    assert reductions >= 3
