"""The files that users of torch really have: names for indices, other forms, schedulers, steps that differ, growth."""

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compare import assert_close, assert_same
from rmsprop_jax import dialects, rmsprop
from rmsprop_jax.checkpoints import from_torch, to_torch
from rmsprop_jax.recorder import record_statistics
from rmsprop_jax.state import find_states

torch = pytest.importorskip("torch")
of_distributed = pytest.importorskip("torch.distributed.checkpoint.state_dict")

HYPERPARAMETERS = dict(lr=0.02, alpha=0.9, eps=1e-3, weight_decay=0.01, momentum=0.8)
NAMES = ["first.weight", "first.bias", "second.weight", "second.bias"]


class Network(torch.nn.Module):
    """Two layers, the matrices of which have the same shape: states that are swapped would fit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)


class Run:
    """A model and an optimizer in torch, with gradients that differ between parameters."""

    def __init__(self, groups: Callable[[Any], Any] = lambda model: model.parameters(), **hyperparameters: Any) -> None:
        torch.manual_seed(0)
        self.model = Network()
        self.optimizer = torch.optim.RMSprop(groups(self.model), **(HYPERPARAMETERS | hyperparameters))
        self.rng = np.random.default_rng(0)

    def gradients(self) -> dict[str, np.ndarray]:
        sizes = {name: 1 + i for i, name in enumerate(NAMES)}
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        return {name: (sizes[name] * (self.rng.standard_normal(shapes[name]) + 0.5)).astype("f4") for name in NAMES}

    def step(self, gradients: Mapping[str, np.ndarray | None] | None = None) -> None:
        gradients = self.gradients() if gradients is None else gradients
        for name, p in self.model.named_parameters():
            p.grad = None if gradients.get(name) is None else torch.tensor(gradients[name])
        self.optimizer.step()

    def steps(self, number: int) -> "Run":
        for _ in range(number):
            self.step()
        return self

    def file(self) -> dict[str, Any]:
        return copy.deepcopy(self.optimizer.state_dict())

    def params(self) -> dict[str, jax.Array]:
        return {name: jnp.array(p.detach().numpy()) for name, p in self.model.named_parameters()}

    def square_avgs(self) -> dict[str, np.ndarray]:
        state = self.optimizer.state
        return {name: state[p]["square_avg"].numpy().copy() for name, p in self.model.named_parameters()}


def same(named: Any) -> dict[str, Any]:
    return dict(named)


def continued(run: Run, tx: Any, state: Any, number: int = 5) -> None:
    """``number`` more steps in both."""
    params = run.params()
    for _ in range(number):
        g = run.gradients()
        updates, state = tx.update({name: jnp.array(x) for name, x in g.items()}, state, params)
        params = optax.apply_updates(params, updates)
        run.step(g)
    assert_close(params, run.params(), ulps=4 * number, scale="array")


# --- Names go by name ------------------------------------------------------------------------------------------


def test_names_of_the_file_decide_and_not_their_order() -> None:
    group = dict(lr=0.1, alpha=0.9, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False)
    entries = {name: {"step": 1, "square_avg": np.full(1, number, "f4")} for name, number in (("b", 2), ("a", 1))}
    file = {"state": entries, "param_groups": [{"params": ["b", "a"], **group}]}
    _, state = from_torch(file, ["a", "b"], same)
    assert {name: float(x[0]) for name, x in state.square_avg.items()} == {"a": 1.0, "b": 2.0}
    back = to_torch(state, ["a", "b"], same, like=file, tensor=np.asarray)
    assert {name: float(entry["square_avg"][0]) for name, entry in back["state"].items()} == {"a": 1.0, "b": 2.0}


def by_index(run: Run) -> dict[str, Any]:
    return run.file()


def by_name(run: Run) -> dict[str, Any]:
    return of_distributed.get_optimizer_state_dict(run.model, run.optimizer)


def flattened(run: Run) -> dict[str, Any]:
    return of_distributed.get_optimizer_state_dict(
        run.model, run.optimizer, options=of_distributed.StateDictOptions(flatten_optimizer_state_dict=True)
    )


def with_param_names(run: Run) -> dict[str, Any]:
    file = run.file()
    for group in file["param_groups"]:
        group["param_names"] = [NAMES[i] for i in group["params"]]
    return file


def wrapped(run: Run) -> dict[str, Any]:
    """As from a model in DistributedDataParallel and torch.compile."""
    file = with_param_names(run)
    for group in file["param_groups"]:
        group["param_names"] = [f"module._orig_mod.{name}" for name in group["param_names"]]
    return file


def with_numpy(run: Run) -> dict[str, Any]:
    file = run.file()
    for entry in file["state"].values():
        entry.update({slot: tensor.numpy() for slot, tensor in entry.items()})
    return file


FORMS: dict[str, Callable[[Run], dict[str, Any]]] = {
    f.__name__: f for f in (by_index, by_name, flattened, with_param_names, wrapped, with_numpy)
}


def two_groups(model: Any) -> list[dict[str, Any]]:
    return [
        {"params": model.first.parameters(), "lr": 0.05},
        {"params": model.second.parameters(), "momentum": 0.0, "centered": True},
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [lambda model: model.parameters(), two_groups], ids=["one group", "two groups"])
def test_file_of_every_form_continues_the_run(form: str, groups: Any) -> None:
    run = Run(groups).steps(7)
    names = NAMES if form in ("by_index", "with_numpy") else sorted(NAMES)
    continued(run, *from_torch(FORMS[form](run), names, same))


def test_state_goes_back_into_a_file_with_names() -> None:
    run = Run(two_groups).steps(3)
    file = by_name(run)
    _, state = from_torch(file, NAMES, same)
    back = to_torch(state, sorted(NAMES), same, like=file, tensor=torch.from_numpy)
    assert back["param_groups"] == file["param_groups"]
    for name, entry in file["state"].items():
        for slot, x in entry.items():
            assert_close(np.asarray(back["state"][name][slot]), x.numpy(), ulps=2)


# --- bitsandbytes ----------------------------------------------------------------------------------------------


def of_bitsandbytes(run: Run, is_wrapped: bool) -> dict[str, Any]:
    """As bitsandbytes 0.50 writes the same run, or 0.45. Its RMSprop is torch's without momentum, whatever betas[1]."""
    file = run.file()
    for group in file["param_groups"]:
        alpha, kept = group["alpha"], {k: group[k] for k in ("lr", "eps", "weight_decay", "params")}
        group.clear()
        group.update(kept, betas=(alpha, 0.9))
    for key, entry in file["state"].items():
        state = {"state1": entry["square_avg"]}
        file["state"][key] = {
            "step": int(entry["step"]),
            **({"__bnb_optimizer_quant_state__": state} if is_wrapped else state),
        }
    return file


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_file_of_bitsandbytes_in_32_bits_continues_the_run(is_wrapped: bool) -> None:
    run = Run(momentum=0.0).steps(5)
    continued(run, *from_torch(of_bitsandbytes(run, is_wrapped), NAMES, same))


# --- Schedulers ------------------------------------------------------------------------------------------------


def one_cycle(run: Run, **options: Any) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(run.optimizer, 0.1, total_steps=20, **options)


def test_momentum_that_a_scheduler_moves_is_asked_for() -> None:
    run = Run()
    scheduler, momenta = one_cycle(run), []
    for _ in range(10):
        run.step()
        scheduler.step()
    with pytest.raises(
        ValueError,
        match=r"^group 0 has 'base_momentum', .* which is 0\.\d+ now; give scheduler_state_dict, or momentum=",
    ):
        from_torch(run.file(), NAMES, same, lr=0.1)
    file, start = run.file(), run.params()
    rates: list[float] = []
    for _ in range(8):
        rates.append(run.optimizer.param_groups[0]["lr"])
        momenta.append(run.optimizer.param_groups[0]["momentum"])
        run.step()
        scheduler.step()
    lr, momentum = jnp.array(rates), jnp.array(momenta)
    tx, state = from_torch(
        file, NAMES, same, lr=lambda count: lr[count - 10], momentum=[lambda count: momentum[count - 10]]
    )
    again = Run()
    for _ in range(10):
        again.gradients()
    params = start
    for _ in range(8):
        updates, state = tx.update({k: jnp.array(g) for k, g in again.gradients().items()}, state, params)
        params = optax.apply_updates(params, updates)
    assert_close(params, run.params(), ulps=32, scale="array")


def test_scheduler_of_the_run_continues_with_its_file() -> None:
    run = Run(two_groups)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(run.optimizer, [0.1, 0.05], total_steps=20)
    for _ in range(10):
        run.step()
        scheduler.step()
    tx, state = from_torch(run.file(), NAMES, same, scheduler_state_dict=scheduler.state_dict())
    params = run.params()
    for _ in range(9):
        g = run.gradients()
        updates, state = tx.update({name: jnp.array(x) for name, x in g.items()}, state, params)
        params = optax.apply_updates(params, updates)
        run.step(g)
        scheduler.step()
    assert_close(params, run.params(), ulps=64, scale="array")


def test_scheduler_of_epochs_is_read_with_the_updates_of_an_epoch() -> None:
    run = Run()
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 2, gamma=0.1)
    for _ in range(3):
        run.steps(4)
        scheduler.step()
    file = run.file()
    tx, state = from_torch(file, NAMES, same, scheduler_state_dict=scheduler.state_dict(), updates_per_step=4)
    continued(run, tx, state, 4)  # the third epoch; then comes the next stair
    with pytest.raises(ValueError, match=r"^lr is given, but scheduler_state_dict has it too"):
        from_torch(file, NAMES, same, lr=0.1, scheduler_state_dict=scheduler.state_dict(), updates_per_step=4)


def test_rate_that_a_scheduler_set_is_never_frozen_silently() -> None:
    run = Run()
    torch.optim.lr_scheduler.StepLR(run.optimizer, 5)
    run.step()
    with pytest.warns(
        UserWarning,
        match=r"^group 0 has 'initial_lr', .* which stays at 0.02 now; give scheduler_state_dict, or lr=",
    ):
        from_torch(run.file(), NAMES, same)
    from_torch(run.file(), NAMES, same, lr=0.02)  # warnings are errors


def test_every_number_can_be_replaced_for_all_groups_or_for_each() -> None:
    run = Run(two_groups).steps(2)
    new = dict(lr=0.3, alpha=[0.5, 0.6], eps=0.1, weight_decay=[0.2, 0.0], momentum=[0.7, 0.0])
    run_of_new = Run(two_groups)
    run_of_new.model.load_state_dict(run.model.state_dict())
    run_of_new.optimizer.load_state_dict(run.file())
    for name, value in new.items():
        for index, group in enumerate(run_of_new.optimizer.param_groups):
            group[name] = value[index] if isinstance(value, list) else value
    continued(run_of_new, *from_torch(run.file(), NAMES, same, **new))


# --- Steps that differ, and growth -------------------------------------------------------------------------------


def unfrozen() -> Run:
    run = Run()
    for step in range(6):
        g = run.gradients()
        run.step({name: x for name, x in g.items() if step >= 4 or name.startswith("second")})
    return run


def test_layers_that_were_unfrozen_later_need_the_step_of_the_run() -> None:
    run = unfrozen()
    with pytest.raises(ValueError, match=r"'first.weight' is at step 2, but 'second.weight' at step 6; .* step="):
        from_torch(run.file(), NAMES, same)
    tx, state = from_torch(run.file(), NAMES, same, step=6)
    assert int(state.step) == 6
    continued(run, tx, state)


def grown_params(run: Run) -> dict[str, Any]:
    """A wider second layer, and a third one."""
    shapes = {name: tuple(p.shape) for name, p in run.model.named_parameters()}
    return shapes | {"second.weight": (4, 3), "second.bias": (4,), "third.weight": (2, 4)}


def test_model_that_grew_starts_what_the_file_lacks_and_lists_it() -> None:
    run = Run().steps(3)
    with pytest.warns(UserWarning, match=r"start anew: second.weight, second.bias, third.weight$"):
        tx, state = from_torch(run.file(), NAMES, same, params=grown_params(run), missing="init")
    fresh = tx.init({name: jnp.zeros(shape) for name, shape in grown_params(run).items()})
    for name in grown_params(run):
        kept = name.startswith("first")
        want = run.square_avgs()[name] if kept else fresh.square_avg[name]
        assert_same(np.asarray(state.square_avg[name]), np.asarray(want))
    assert int(state.step) == 3


def test_parameters_that_grew_start_where_their_dialect_starts() -> None:
    run = Run().steps(1)
    with pytest.warns(UserWarning, match="third.weight"):
        _, state = from_torch(
            run.file(), NAMES, same, params=grown_params(run), missing="init", transformation=dialects.timm
        )
    assert_same(state.square_avg["third.weight"], jnp.ones((2, 4)))


def test_step_before_that_of_a_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^step is 2, but the file has a parameter at step 3"):
        from_torch(Run().steps(3).file(), NAMES, same, step=2)


def test_groups_that_only_look_equal_stay_apart() -> None:
    run = Run(two_groups, centered=True, momentum=0.0).steps(1)
    for group, lr in zip(run.optimizer.param_groups, (0.10001, 0.10004), strict=True):
        group["lr"] = torch.tensor(lr)
    continued(run, *from_torch(flattened(run), NAMES, same))


def test_note_says_what_may_be_wrong_where_to_params_fails() -> None:
    run = Run().steps(1)
    with pytest.raises(ValueError, match="axes don't match array") as raised:
        from_torch(run.file(), NAMES[::-1], lambda named: [named[name].transpose(1, 0) for name in NAMES])
    assert "Are names in the optimizer's order?" in raised.value.__notes__[0]


# --- Any transformation ------------------------------------------------------------------------------------------


def injected(
    lr: Any, alpha: Any, eps: Any, weight_decay: Any, momentum: Any, centered: bool, maximize: bool
) -> optax.GradientTransformation:
    return optax.inject_hyperparams(rmsprop, static_args=("centered", "maximize"))(
        lr, alpha, eps, weight_decay, momentum, centered=centered, maximize=maximize
    )


AROUND: dict[str, Callable[..., Any]] = {
    "inject_hyperparams": injected,
    "apply_if_finite": lambda **h: optax.apply_if_finite(rmsprop(**h), 3),
    "MultiSteps": lambda **h: optax.MultiSteps(rmsprop(**h), every_k_schedule=1),
    "record_statistics": lambda **h: record_statistics(rmsprop(**h)),
    "a mask": lambda **h: optax.chain(optax.masked(optax.identity(), {n: n in NAMES[:2] for n in NAMES}), rmsprop(**h)),
    "a moving average": lambda **h: optax.chain(rmsprop(**h), optax.ema(0.0)),
}


@pytest.mark.parametrize("around", AROUND)
def test_whatever_is_around_the_rmsprop_starts_anew(around: str) -> None:
    run = Run().steps(4)
    tx, state = from_torch(run.file(), NAMES, same, transformation=AROUND[around])
    assert [int(part.step) for part in find_states("state", state).values()] == [4]
    continued(run, tx, state)


def test_counts_that_schedules_read_continue_and_others_start_at_zero() -> None:
    def transformation(**h: Any) -> Any:
        scheduled = optax.inject_hyperparams(lambda factor: optax.scale(factor))(factor=lambda count: 1.0 + count)
        return optax.MultiSteps(optax.apply_if_finite(optax.chain(rmsprop(**h), scheduled), 3), every_k_schedule=2)

    _, state = from_torch(Run().steps(4).file(), NAMES, same, transformation=transformation)
    assert (int(state.mini_step), int(state.gradient_step)) == (0, 4)
    inner = state.inner_opt_state
    assert (int(inner.notfinite_count), int(inner.total_notfinite)) == (0, 0)
    injected = inner.inner_state[1]
    assert [int(x) for x in (injected.count, injected.hyperparams_states["factor"].count)] == [4, 4]


def test_state_of_a_flax_optimizer_with_several_groups_goes_out() -> None:
    nnx = pytest.importorskip("flax.nnx")
    run = Run(two_groups).steps(3)
    tx, state = from_torch(run.file(), NAMES, lambda named: nnx.State(nested(named)))

    class Part(nnx.Module):
        def __init__(self, parts: Any) -> None:
            for name, part in parts.items():
                setattr(self, name, Part(part) if isinstance(part, dict) else nnx.Param(part))

    model = Part(nested(run.params()))
    optimizer = nnx.Optimizer(model, tx._replace(init=lambda params: state), wrt=nnx.Param)
    back = to_torch(optimizer.opt_state, NAMES, unnested, like=run.file(), tensor=torch.from_numpy)
    for key, entry in run.file()["state"].items():
        for slot, x in entry.items():
            assert_close(np.asarray(back["state"][key][slot]), x.numpy(), ulps=2)


def nested(named: Any) -> Any:
    return {layer: {part: named[f"{layer}.{part}"] for part in ("weight", "bias")} for layer in ("first", "second")}


def unnested(params: Any) -> dict[str, Any]:
    return {f"{layer}.{part}": params[layer][part] for layer in ("first", "second") for part in ("weight", "bias")}


# --- What is refused -------------------------------------------------------------------------------------------


def edited(edit: Callable[[Any], Any], **arguments: Any) -> Callable[[Run], Any]:
    """A call with a file that ``edit`` changed or replaced."""

    def call(run: Run) -> Any:
        file = run.file()
        other = edit(file)
        return from_torch(file if other is None else other, **({"names": NAMES, "to_params": same} | arguments))

    return call


def slot_as(change: Callable[[Any], Any], slot: str = "square_avg") -> Callable[[Any], None]:
    def edit(file: Any) -> None:
        file["state"][0][slot] = change(file["state"][0][slot])

    return edit


def quantized(x: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):  # torch deprecates it, but files have it
        return torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)


def eight_bits(file: Any) -> Any:
    file = of_bitsandbytes(Run(momentum=0.0).steps(1), True)
    state = file["state"][0]["__bnb_optimizer_quant_state__"]
    state |= {"state1": state["state1"].to(torch.uint8), "qmap1": torch.zeros(256), "absmax1": torch.zeros(1)}
    return file


def of_adam(file: Any) -> Any:
    file = of_bitsandbytes(Run(momentum=0.0).steps(1), True)
    file["state"][0]["__bnb_optimizer_quant_state__"]["state2"] = torch.zeros(3, 3)
    return file


def group(**changes: Any) -> Callable[[Any], None]:
    return lambda file: file["param_groups"][0].update(changes)


REFUSED: dict[str, tuple[Callable[[Run], Any], Any, str]] = {
    "a checkpoint of Lightning": (
        edited(lambda file: {"epoch": 3, "state_dict": {}, "optimizer_states": [file], "lr_schedulers": []}),
        ValueError,
        "did you mean optimizer_state_dict['optimizer_states'][0]?",
    ),
    "a list": (edited(lambda file: [file]), TypeError, "got list; did you mean optimizer_state_dict[0]?"),
    "a checkpoint with two optimizers": (
        edited(lambda file: {"actor": {"optimizer": file}, "critic": {"optimizer": file}}),
        ValueError,
        "optimizer_state_dict['actor']['optimizer'] or optimizer_state_dict['critic']['optimizer']?",
    ),
    "8 bits": (edited(eight_bits), ValueError, "8-bit RMSprop"),
    "bitsandbytes' Adam": (edited(of_adam), ValueError, "belongs to an optimizer of Adam's family"),
    "bitsandbytes' Adagrad": (
        edited(
            lambda file: {
                "state": {0: {"step": 1, "state1": torch.ones(1)}},
                "param_groups": [dict(params=[0], betas=(0.0, 0.0), lr=0.1, eps=1e-3, weight_decay=0.0)],
            },
            names=["a"],
        ),
        ValueError,
        "which is no RMSprop of bitsandbytes",
    ),
    "a name that the file does not have": (
        edited(lambda file: group(param_names=["a", *NAMES[1:]])(file)),
        ValueError,
        "optimizer_state_dict has 'a', but names does not; the file records the names of its parameters",
    ),
    "too few names in a group": (
        edited(group(param_names=NAMES[:2])),
        ValueError,
        "group 0 of optimizer_state_dict has 4 parameters, but 2 'param_names'",
    ),
    "names of a wrong type": (edited(group(param_names=[0, 1, 2, 3])), TypeError, "'param_names' of group 0"),
    "names that wrappers make equal": (
        edited(group(param_names=["a", "module.a", "b", "c"])),
        ValueError,
        "optimizer_state_dict records 'a' for two parameters",
    ),
    "a set of names": (edited(same, names=set(NAMES)), TypeError, "names must be a list of strings"),
    "flattened with something else": (
        edited(lambda file: {"param_groups.a.lr": 0.1, "epoch": 3}),
        ValueError,
        "optimizer_state_dict has 'epoch' among keys such as 'param_groups.<name>.lr'",
    ),
    "a key that a program added": (
        edited(group(lr_mult=2.0)),
        ValueError,
        "if it does not change the update, drop it: group.pop('lr_mult')",
    ),
    "a step that is none": (edited(same, step=-1), ValueError, "step must be a number of updates from 0 to"),
    "two rates for one group": (
        edited(same, momentum=[0.1, 0.2]),
        ValueError,
        "momentum must be one number or schedule",
    ),
    "growth without params": (edited(same, missing="init"), TypeError, "params must be all parameters of the model"),
    "another word for growth": (
        edited(same, missing="zero"),
        ValueError,
        "missing must be 'error' or 'init', got 'zero'",
    ),
    "a model that shrank": (
        edited(same, missing="init", params=dict.fromkeys(NAMES[1:], (3, 3))),
        ValueError,
        "the file has 'first.weight', but params does not; a model may grow here, but not shrink",
    ),
    "slots that are swapped": (
        lambda run: from_torch(swapped(Run(centered=True).steps(3).file()), NAMES, same),
        ValueError,
        "but an average of squares is no less than the square of the average; were the two swapped?",
    ),
    "the file of a scheduler": (
        edited(lambda file: {"last_epoch": 3, "base_lrs": [0.1], "gamma": 0.1}),
        ValueError,
        "is it the scheduler's?",
    ),
    "a path": (edited(lambda file: "run.pt"), TypeError, "read the file with torch.load(path, weights_only=True)"),
    "all of schedules_of": (
        edited(same, lr=[{"lr": 0.1}]),
        TypeError,
        "of schedules_of, give [group['lr'] for group in schedules]",
    ),
    "a scheduler that from_torch cannot read": (
        edited(same, scheduler_state_dict={"base_lrs": [0.02], "last_epoch": 1, "lr_lambdas": [None]}),
        (TypeError, ValueError),
        "schedules_of does: give lr=[group['lr'] for group in schedules_of(...)]",
    ),
    "Optax for the rule": (
        edited(same, transformation=optax.rmsprop),
        ValueError,
        "it must take torch's names of arguments, as rmsprop of this library does",
    ),
    "a mask": (edited(slot_as(lambda x: np.ma.masked_array(x.numpy()))), TypeError, "without a mask"),
    "no memory": (
        edited(slot_as(lambda x: x.to("meta"))),
        TypeError,
        "'square_avg' of 'first.weight' must be a tensor",
    ),
    "sparse": (edited(slot_as(lambda x: x.to_sparse())), TypeError, "'square_avg' of 'first.weight' must be a tensor"),
    "quantized": (
        edited(slot_as(quantized)),
        TypeError,
        "'square_avg' of 'first.weight' must be a tensor",
    ),
}


def swapped(file: Any) -> Any:
    for entry in file["state"].values():
        entry["square_avg"], entry["grad_avg"] = entry["grad_avg"].abs(), 10 * entry["square_avg"]
    return file


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)) as raised:
        call(Run().steps(1))
    assert "\n" not in str(raised.value)


def test_views_of_torch_are_read() -> None:
    run = Run().steps(1)
    file = run.file()
    negative = torch._neg_view(-file["state"][0]["square_avg"])
    assert negative.is_neg()
    file["state"][0]["square_avg"] = negative
    _, state = from_torch(file, NAMES, same)
    assert_same(np.asarray(state.square_avg["first.weight"]), run.square_avgs()["first.weight"])


def test_part_of_a_tensor_is_refused_with_the_way_to_save_the_whole() -> None:
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        file = Run().steps(1).file()
        file["state"][0]["square_avg"] = torch.distributed.tensor.distribute_tensor(
            file["state"][0]["square_avg"], mesh
        )
        with pytest.raises(TypeError, match=r"^'square_avg' of 'first.weight' is a DTensor, .*full_state_dict=True"):
            from_torch(file, NAMES, same)
    finally:
        distributed.destroy_process_group()
