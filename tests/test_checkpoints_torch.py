"""Checkpoints of ``torch.optim.RMSprop``: read, continued on both sides, written back, and refused when malformed."""

import copy
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import reference
from compare import assert_close, assert_same
from rmsprop_jax import dialects, rmsprop, storage
from rmsprop_jax.checkpoints import from_torch, to_torch

torch = pytest.importorskip("torch")

SLOTS = ("square_avg", "grad_avg", "momentum_buffer")
SHAPES = {"conv.weight": (4, 3, 2, 5), "conv.bias": (4,), "linear.weight": (3, 6), "scale": (), "empty": (0, 2)}
NAMES = list(SHAPES)

# Two groups whose every setting is different, and none is torch's default.
TWO_GROUPS = (
    dict(lr=0.02, alpha=0.9, eps=1e-3, weight_decay=0.01, momentum=0.8, centered=False),
    dict(lr=0.03, alpha=0.95, eps=1e-2, weight_decay=0.0, momentum=0.0, centered=True, maximize=True),
)


# --- A torch run, and the bridge -------------------------------------------------------------------------


class Run:
    """Parameters and optimizer of torch, driven with given gradients."""

    def __init__(
        self,
        *groups: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]] = SHAPES,
        dtype: Any = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = {
            name: torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()
            for name, shape in shapes.items()
        }
        leaves = list(self.params.values())
        cut = [0, len(leaves)] if len(groups) < 2 else [0, 2, len(leaves)]
        self.optimizer = torch.optim.RMSprop(
            [{"params": leaves[a:b], **group} for a, b, group in zip(cut[:-1], cut[1:], groups or [{}], strict=True)]
        )

    def step(self, gradients: Mapping[str, Any], lr: Sequence[float] | None = None) -> None:
        for group, rate in zip(self.optimizer.param_groups, lr or [], strict=lr is not None):
            group["lr"] = rate
        for name, p in self.params.items():
            p.grad = None if gradients.get(name) is None else torch.tensor(np.array(gradients[name])).to(p.dtype)
        self.optimizer.step()

    def file(self) -> dict[str, Any]:
        """The state dict after a journey through a file."""
        buffer = io.BytesIO()
        torch.save(self.optimizer.state_dict(), buffer)
        return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)

    def slot(self, name: str, slot: str) -> Any:
        return self.optimizer.state[self.params[name]].get(slot)


def gradients(
    number: int, seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> list[dict[str, np.ndarray]]:
    """Around 1, with a mean of a third: enough for grad_avg to matter, not so much that torch's variance cancels."""
    rng = np.random.default_rng(seed)
    return [
        {name: np.asarray(rng.standard_normal(shape) + 0.3, np.float32) for name, shape in shapes.items()}
        for _ in range(number)
    ]


def to_params(named: Mapping[str, Any]) -> dict[str, Any]:
    """As a user writes it: renamed, nested, transposed."""
    return {
        "conv": {"kernel": named["conv.weight"].transpose(2, 3, 1, 0), "bias": named["conv.bias"]},
        "rest": [named["linear.weight"].T, named["scale"], named["empty"]],
    }


def from_params(params: Any) -> dict[str, Any]:
    linear, scale, empty = params["rest"]
    kernel = params["conv"]["kernel"].transpose(3, 2, 0, 1)
    bias = params["conv"]["bias"]
    return {"conv.weight": kernel, "conv.bias": bias, "linear.weight": linear.T, "scale": scale, "empty": empty}


def numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy().copy()


def weights(run: Run) -> Any:
    return jax.tree.map(jnp.array, to_params({name: numpy(p) for name, p in run.params.items()}))


def there_and_back(run: Run, **options: Any) -> dict[str, Any]:
    _, state = from_torch(run.file(), NAMES, to_params, **options)
    return to_torch(state, NAMES, from_params, like=run.file(), tensor=torch.from_numpy)


def assert_same_file(got: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """Bit for bit: every slot, its dtype and the groups."""
    assert got["param_groups"] == want["param_groups"]
    assert got["state"].keys() == want["state"].keys()
    for key, entry in want["state"].items():
        assert got["state"][key].keys() == entry.keys()
        for slot, x in entry.items():
            assert got["state"][key][slot].dtype == x.dtype, slot
            assert torch.equal(got["state"][key][slot], x), slot


# --- There and back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_comes_back_bit_for_bit(momentum: float) -> None:
    run = Run(dict(momentum=momentum, weight_decay=0.1))
    for g in gradients(7):
        run.step(g)
    assert_same_file(there_and_back(run), run.file())


def test_centered_state_comes_back_within_two_ulp_and_its_mean_bit_for_bit() -> None:
    run = Run(*TWO_GROUPS)
    for g in gradients(50):
        run.step({name: x + 2 for name, x in g.items()})  # most of g² is in its mean
    back, file = there_and_back(run), run.file()
    for key, entry in file["state"].items():
        for slot in entry:
            if slot != "square_avg" or "grad_avg" not in entry:
                assert torch.equal(back["state"][key][slot], entry[slot])
        assert_close(*(numpy(x["square_avg"]) for x in (back["state"][key], entry)), ulps=2)


def test_double_precision_comes_back_bit_for_bit(x64: None) -> None:
    run = Run(dict(momentum=0.9), dtype=torch.float64)
    for g in gradients(7):
        run.step(g)
    _, state = from_torch(run.file(), NAMES, to_params)
    assert state.square_avg["conv"]["kernel"].dtype == jnp.float64
    assert_same_file(there_and_back(run), run.file())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("centered", [False, True])
def test_half_precision_is_read_exactly_and_comes_back_bit_for_bit(dtype: Any, centered: bool) -> None:
    run = Run(dict(momentum=0.9, centered=centered, eps=1e-3), dtype=dtype)
    for g in gradients(7):
        run.step(g)
    _, state = from_torch(run.file(), NAMES, to_params)
    want = {slot: run.slot("linear.weight", slot).double().T for slot in SLOTS[: 1 + centered] + SLOTS[2:]}
    if centered:
        want["square_avg"] = (want["square_avg"] - want["grad_avg"] ** 2).clamp(min=0)
    for slot, expected in want.items():
        got = getattr(state, slot)["rest"][0]
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, numpy(expected.float()), err_msg=slot)
    fresh = Run(dict(momentum=0.9, centered=centered, eps=1e-3), dtype=dtype)
    fresh.optimizer.load_state_dict(there_and_back(run))  # torch rounds to the dtype of its parameters
    assert_same_file(fresh.file(), run.file())


@pytest.mark.parametrize("centered", [False, True])
def test_complex_state_keeps_its_components(centered: bool) -> None:
    run = Run(dict(momentum=0.9, centered=centered), dtype=torch.complex64)
    rng = np.random.default_rng(0)
    for g in gradients(7):
        run.step({name: (x + 1j * rng.standard_normal(x.shape)).astype(np.complex64) for name, x in g.items()})
    _, state = from_torch(run.file(), NAMES, to_params)
    want = numpy(run.slot("conv.bias", "square_avg"))
    if centered:
        mean = numpy(run.slot("conv.bias", "grad_avg"))
        want = want - (mean.real**2 + 1j * mean.imag**2)
    np.testing.assert_allclose(state.square_avg["conv"]["bias"], want, rtol=1e-5)
    back, file = there_and_back(run), run.file()
    for key, entry in file["state"].items():
        for slot in SLOTS[centered:]:
            if slot in entry:
                assert torch.equal(back["state"][key][slot], entry[slot])
        for got, expected in zip(
            *(torch.view_as_real(f["state"][key]["square_avg"]) for f in (back, file)), strict=True
        ):
            assert_close(numpy(got), numpy(expected), ulps=2 * centered)


def test_state_is_of_the_structure_and_the_dtypes_of_init() -> None:
    run = Run(*TWO_GROUPS)
    run.step(gradients(1)[0])
    for lr in (None, 0.1, optax.linear_schedule(1.0, 0.0, 10)):
        tx, state = from_torch(run.file(), NAMES, to_params, lr=lr)
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, tx.init(weights(run)))


def test_slots_lie_where_to_params_puts_the_weights() -> None:
    run = Run(dict(momentum=0.9))
    for g in gradients(3):
        run.step(g)
    _, state = from_torch(run.file(), NAMES, to_params)
    for slot in ("square_avg", "momentum_buffer"):
        kernel, tensor = getattr(state, slot)["conv"]["kernel"], run.slot("conv.weight", slot)
        assert kernel.shape == (2, 5, 3, 4)
        for out, inp, row, column in np.ndindex(tensor.shape):
            assert float(kernel[row, column, inp, out]) == float(tensor[out, inp, row, column])
        np.testing.assert_array_equal(getattr(state, slot)["rest"][0], run.slot("linear.weight", slot).T)


def test_steps_of_torch_after_the_move_leave_our_state_alone() -> None:
    run = Run()
    run.step(gradients(1)[0])
    _, state = from_torch(run.optimizer.state_dict(), NAMES, to_params)
    before = jax.tree.map(np.array, state)
    for g in gradients(3, seed=1):
        run.step(g)  # torch writes into the tensors that we read
    assert_same(state, before)


def test_steps_of_torch_after_the_way_back_leave_our_state_alone() -> None:
    run = Run()
    run.step(gradients(1)[0])
    _, state = from_torch(run.file(), NAMES, to_params)
    before = jax.tree.map(np.array, state)
    run.optimizer.load_state_dict(to_torch(state, NAMES, from_params, like=run.file(), tensor=torch.from_numpy))
    for g in gradients(3, seed=1):
        run.step(g)  # torch writes into the tensors that it got
    assert_same(state, before)


def test_torch_in_the_older_shape_is_read() -> None:
    """torch 1.x: the step an int, no ``foreach`` or ``maximize``; before 1.5 any numbers as indices."""
    run = Run(dict(momentum=0.9))
    for g in gradients(5):
        run.step(g)
    _, expected = from_torch(run.file(), NAMES, to_params)
    file = run.file()
    file["state"] = {9000 - key: entry | {"step": 5} for key, entry in file["state"].items()}
    (group,) = file["param_groups"]
    for key in ("foreach", "maximize", "differentiable", "capturable"):
        del group[key]
    group["params"] = [9000 - key for key in group["params"]]
    _, state = from_torch(file, NAMES, to_params)
    assert_same(state, expected)
    back = to_torch(state, NAMES, from_params, like=file, tensor=torch.from_numpy)
    assert back["state"].keys() == file["state"].keys()
    run.optimizer.load_state_dict(back)
    run.step(gradients(1)[0])
    assert run.slot("scale", "step") == 6


# --- Continuing the run ----------------------------------------------------------------------------------


# A step adds the rounding of a few operations, 6e-8 each, which the averages forget and the parameters add up:
# measured 2.8e-7 of the largest number of an array after 100 steps. A schedule that is one step late is 1e-3 off.
TOLERANCE = 1e-6


def rates(step: int) -> list[float]:
    return [0.02 * 0.5 ** (step // 40), 0.03 * 0.5 ** (step // 40)]


SCHEDULES = [lambda step, group=group: (0.02, 0.03)[group] * 0.5 ** (step // 40) for group in (0, 1)]


def jax_steps(tx: Any, state: Any, params: Any, sequence: list[dict[str, np.ndarray]]) -> tuple[Any, Any]:
    for g in sequence:
        updates, state = tx.update(to_params(g), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_continues(params: Any, state: Any, run: Run) -> None:
    """Parameters and slots of both, relative to the largest number of each array."""
    back = to_torch(state, NAMES, from_params, like=run.file(), tensor=torch.from_numpy)
    for index, (name, x) in enumerate(from_params(params).items()):
        pairs = [(x, numpy(run.params[name]))]
        pairs += [(back["state"][index][slot], run.slot(name, slot)) for slot in run.file()["state"][index]]
        for got, want in pairs:
            assert_close(np.asarray(got), np.asarray(want), rtol=TOLERANCE, scale="array")


@pytest.mark.parametrize("back", [False, True])
def test_hundred_steps_after_the_move_agree_with_a_run_that_stayed(back: bool) -> None:
    run = Run(*TWO_GROUPS)
    sequence = gradients(130)
    for step, g in enumerate(sequence[:30]):
        run.step(g, rates(step))
    tx, state = from_torch(run.file(), NAMES, to_params, lr=SCHEDULES)
    params = weights(run)
    if back:  # out of the state of ours after ten more steps, into an optimizer of torch that knew nothing of it
        params, state = jax_steps(tx, state, params, sequence[30:40])
        like, run = run.file(), Run(*TWO_GROUPS)
        for name, x in from_params(params).items():
            run.params[name].data = torch.tensor(np.asarray(x))
        run.optimizer.load_state_dict(to_torch(state, NAMES, from_params, like=like, tensor=torch.from_numpy))
    start = 40 if back else 30
    for step, g in enumerate(sequence[start:], start=start):
        run.step(g, rates(step))
    params, state = jax_steps(tx, state, params, sequence[start:])
    assert_continues(params, state, run)


def test_learning_rate_of_the_file_may_be_a_tensor() -> None:
    run = Run(dict(lr=torch.tensor(0.25)))
    run.step(gradients(1)[0])
    tx, state = from_torch(run.file(), NAMES, to_params)
    run.step(gradients(1)[0])
    params, state = jax_steps(tx, state, before := weights(run), gradients(1))
    moved = jax.tree.map(lambda new, old: np.max(np.abs(new - old), initial=0), params, before)
    assert moved["conv"]["bias"] > 1  # 0.25 · g/√(0.02 g²), where the default moves 0.07
    assert_same_file(there_and_back(run), run.file())


@pytest.mark.parametrize(
    ("lr", "expected"),
    [(0.5, [0.5, 0.5]), ([0.5, 0.25], [0.5, 0.25]), (lambda step: step / 8, [3 / 8, 3 / 8]), (None, [0.02, 0.03])],
)
def test_learning_rate_can_be_replaced_and_a_schedule_is_read_at_the_step_of_the_file(lr: Any, expected: Any) -> None:
    run = Run(*TWO_GROUPS)
    for g in gradients(3):
        run.step(g)
    tx, state = from_torch(run.file(), NAMES, to_params, lr=lr)
    params, state = jax_steps(tx, state, weights(run), gradients(1))
    run.step(gradients(1)[0], expected)
    assert_continues(params, state, run)


def test_keys_that_do_not_change_the_update_are_ignored() -> None:
    run = Run(dict(momentum=0.9, foreach=True, name="all"))
    torch.optim.lr_scheduler.OneCycleLR(run.optimizer, 0.1, total_steps=10, cycle_momentum=False)
    run.step(gradients(1)[0])
    assert {"initial_lr", "max_lr", "min_lr", "name", "foreach"} <= run.file()["param_groups"][0].keys()
    assert_same_file(there_and_back(run, lr=0.1), run.file())


# --- Parameters without a gradient -----------------------------------------------------------------------


FROZEN = ("conv.bias", "scale")


def without(sequence: list[dict[str, np.ndarray]], names: Sequence[str]) -> list[dict[str, np.ndarray]]:
    return [{name: x for name, x in g.items() if name not in names} for g in sequence]


@pytest.mark.parametrize("form", ["shapes", "arrays", "state_dict"])
def test_parameters_that_never_had_a_gradient_start_from_zero(form: str) -> None:
    run = Run(*TWO_GROUPS)
    for g in without(gradients(5), FROZEN):
        run.step(g)
    assert len(run.file()["state"]) == 3
    params = {
        "shapes": {"conv.bias": (4,), "scale": ()},
        "arrays": {name: numpy(p) for name, p in run.params.items()},
        "state_dict": run.params | {"running_mean": torch.zeros(3)},
    }[form]
    tx, state = from_torch(run.file(), NAMES, to_params, params=params)
    first, second = (state.inner_states[group].inner_state for group in ("group0", "group1"))
    assert int(first.step) == 5
    for slot in (first.square_avg, first.momentum_buffer):
        np.testing.assert_array_equal(slot["conv"]["bias"], np.zeros(4))
    assert float(second.square_avg["rest"][1]) == float(second.grad_avg["rest"][1]) == 0
    # From then on they have gradients.
    params, state = jax_steps(tx, state, weights(run), gradients(20, seed=1))
    for g in gradients(20, seed=1):
        run.step(g)
    for name in FROZEN:
        assert run.slot(name, "step") == 20
        np.testing.assert_allclose(from_params(params)[name], numpy(run.params[name]), rtol=1e-6)


def test_file_of_an_optimizer_before_its_first_step_gives_the_state_of_init() -> None:
    run = Run(*TWO_GROUPS)
    assert run.file()["state"] == {}
    tx, state = from_torch(run.file(), NAMES, to_params, params=SHAPES)
    assert_same(state, tx.init(weights(run)))


def test_dtype_of_a_parameter_without_state_comes_from_params(x64: None) -> None:
    run = Run(dtype=torch.float64)
    tx, state = from_torch(run.file(), NAMES, to_params, params=run.params)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, tx.init(weights(run)))
    assert state.square_avg["conv"]["kernel"].dtype == jnp.float64


# --- Edges of the numbers and of the tree ----------------------------------------------------------------


def test_variance_that_torch_rounded_below_zero_is_zero() -> None:
    run = Run(dict(centered=True))
    run.step(gradients(1)[0])
    file = run.file()
    file["state"][3] |= {"square_avg": torch.tensor(0.25), "grad_avg": torch.tensor(0.5000001)}
    _, state = from_torch(file, NAMES, to_params)
    assert float(state.square_avg["rest"][1]) == 0
    assert float(state.grad_avg["rest"][1]) == float(np.float32(0.5000001))


def test_variance_is_a_difference_in_double_precision() -> None:
    """In float32 the mean's square, 0.25 + 2⁻²⁴ + 2⁻⁴⁸·…, would round and leave another variance."""
    run = Run(dict(centered=True))
    run.step(gradients(1)[0])
    square, mean = np.float32(1.0000004), np.float32(1.0000001)
    file = run.file()
    file["state"][3] |= {"square_avg": torch.tensor(square), "grad_avg": torch.tensor(mean)}
    _, state = from_torch(file, NAMES, to_params)
    exact = np.float32(np.float64(square) - np.float64(mean) ** 2)
    assert float(state.square_avg["rest"][1]) == exact
    assert float(np.float32(square - mean * mean)) != exact


def joined(named: Mapping[str, Any]) -> dict[str, Any]:
    """One leaf of two biases, and the weight as two leaves."""
    both = np.concatenate([named["conv.bias"], named["scale"][None]])
    rows = {"first": named["linear.weight"][:1], "others": named["linear.weight"][1:]}
    return {"both": both, "rows": rows, "kernel": named["conv.weight"], "empty": named["empty"]}


def test_to_params_may_split_and_join() -> None:
    run = Run(dict(momentum=0.5))
    for g in gradients(3):
        run.step(g)
    _, state = from_torch(run.file(), NAMES, joined)
    bias, scale = (numpy(run.slot(name, "momentum_buffer")) for name in ("conv.bias", "scale"))
    np.testing.assert_array_equal(state.momentum_buffer["both"], [*bias, scale])
    np.testing.assert_array_equal(
        state.momentum_buffer["rows"]["others"], run.slot("linear.weight", "momentum_buffer")[1:]
    )


def test_leaf_of_parameters_of_two_groups_is_refused() -> None:
    run = Run(*TWO_GROUPS)
    run.step(gradients(1)[0])
    with pytest.raises(
        ValueError, match=r"^to_params makes leaf both of 'conv.bias' of group 0 and 'scale' of group 1"
    ):
        from_torch(run.file(), NAMES, joined)


def test_one_array_is_a_tree_too() -> None:
    run = Run(shapes={"w": (3,)})
    run.step({"w": np.ones(3)})
    _, state = from_torch(run.file(), ["w"], lambda named: named["w"])
    np.testing.assert_array_equal(state.square_avg, run.slot("w", "square_avg"))
    back = to_torch(state, ["w"], lambda params: {"w": params}, like=run.file(), tensor=torch.from_numpy)
    assert_same_file(back, run.file())


def test_eleven_groups_stay_apart() -> None:
    """In the state they are sorted by their labels: group10 comes before group2."""
    shapes = {f"p{index}": (2,) for index in range(11)}
    params = {name: torch.ones(shape).requires_grad_() for name, shape in shapes.items()}
    groups = [
        {"params": [p], "lr": 0.1 + index, "momentum": 0.5 * (index % 2)} for index, p in enumerate(params.values())
    ]
    optimizer = torch.optim.RMSprop(groups)
    for index, p in enumerate(params.values()):
        p.grad = torch.full((2,), 1.0 + index)
    optimizer.step()
    tx, state = from_torch(optimizer.state_dict(), list(shapes), dict)
    assert_same_file(
        to_torch(state, list(shapes), dict, like=optimizer.state_dict(), tensor=torch.from_numpy),
        optimizer.state_dict(),
    )
    ours = {name: jnp.asarray(numpy(p)) for name, p in params.items()}
    grads = {name: jnp.asarray(numpy(p.grad)) for name, p in params.items()}
    ours = optax.apply_updates(ours, tx.update(grads, state, ours)[0])
    optimizer.step()
    for name, p in params.items():
        np.testing.assert_allclose(ours[name], numpy(p), rtol=1e-6)


# --- Other transformations -------------------------------------------------------------------------------


def test_transformation_may_be_a_chain_with_rmsprop_in_it() -> None:
    run = Run(dict(momentum=0.9))
    for g in gradients(4):
        run.step(g)

    def clipped(**hyperparameters: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(1e6), rmsprop(**hyperparameters), optax.scale_by_schedule(lambda _: 1.0)
        )

    tx, state = from_torch(run.file(), NAMES, to_params, transformation=clipped)
    assert [int(x) for x in (state[1].step, state[2].count)] == [4, 4]
    back = to_torch(state, NAMES, from_params, like=run.file(), tensor=torch.from_numpy)
    assert_same_file(back, run.file())
    params, state = jax_steps(tx, state, weights(run), gradients(1))
    run.step(gradients(1)[0])
    assert_continues(params, state[1], run)


# timm and Stable-Baselines3 have eps under the root, and averages that start at 1.
GROUP = dict(lr=0.05, alpha=0.9, eps=0.01, weight_decay=0.1, momentum=0.7, centered=True)


def file_of(moment: reference.Moment, step: int, **more: Any) -> dict[str, Any]:
    slots = {slot: getattr(moment, slot) for slot in SLOTS}
    return {"state": {0: {"step": step, **slots}}, "param_groups": [{"params": [0], **GROUP, **more}]}


TIMM = dict(
    decoupled_decay=False,
    lr_in_momentum=True,
    caution=False,
    corrected_weight_decay=False,
    max_lr_snapshot=0.05,
    foreach=None,
    lr_scale=1.0,
)


@pytest.mark.parametrize(
    ("transformation", "more"), [(dialects.timm, TIMM), (dialects.stable_baselines3, {})], ids=["timm", "sb3"]
)
def test_files_of_timm_and_stable_baselines3_continue_in_their_dialects(
    transformation: Callable[..., Any], more: dict[str, Any], x64: None
) -> None:
    rng = np.random.default_rng(0)
    start, sequence = rng.standard_normal(5), rng.standard_normal((20, 5))
    rule = dict(eps_in_sqrt=True, initial_scale=1.0, lr_in_buffer=bool(more), **GROUP)
    moments = list(reference.rmsprop(start, sequence, **rule))
    tx, state = from_torch(file_of(moments[6], 7, **more), ["p"], dict, transformation=transformation)
    params = {"p": jnp.asarray(moments[6].param)}
    for g, want in zip(sequence[7:], moments[7:], strict=True):
        updates, state = tx.update({"p": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        assert_close(params["p"], want.param, rtol=1e-12, scale="array")
    file = file_of(moments[-1], 20, **more)
    back = to_torch(state, ["p"], dict, like=file, tensor=torch.from_numpy)
    expected = file["state"][0] | {"step": np.float32(20)}
    assert_close(jax.tree.map(np.asarray, back["state"][0]), expected, rtol=1e-12, scale="array")


def test_slot_that_only_the_transformation_keeps_starts_from_zero() -> None:
    run = Run()
    run.step(gradients(1)[0])

    def with_momentum(momentum: float, **hyperparameters: Any) -> optax.GradientTransformation:
        return rmsprop(momentum=0.9, **hyperparameters)

    tx, state = from_torch(run.file(), NAMES, to_params, transformation=with_momentum)
    assert_same(state.momentum_buffer, tx.init(weights(run)).momentum_buffer)
    np.testing.assert_array_equal(state.square_avg["rest"][1], run.slot("scale", "square_avg"))


def test_parameter_without_state_starts_where_its_dialect_starts() -> None:
    file = {"state": {}, "param_groups": [{"params": [0], **GROUP}]}
    _, state = from_torch(file, ["p"], dict, params={"p": (3,)}, transformation=dialects.stable_baselines3)
    np.testing.assert_array_equal(state.square_avg["p"], np.ones(3))
    np.testing.assert_array_equal(state.momentum_buffer["p"], np.zeros(3))


# --- What is refused -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good() -> dict[str, Any]:
    """A sound file of two groups: parameters 0 and 1 have momentum, 2 to 4 are centered."""
    run = Run(*TWO_GROUPS)
    for g in gradients(3):
        run.step(g)
    return run.file()


def put(*path: Any, value: Any) -> Callable[[Any], Any]:
    """Sets what lies at ``path`` in a file."""

    def edit(file: Any) -> Any:
        inner = file
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return file

    return edit


def drop(*path: Any) -> Callable[[Any], Any]:
    def edit(file: Any) -> Any:
        inner = file
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        return file

    return edit


def adam(file: Any) -> Any:
    w = torch.ones(3).requires_grad_()
    w.grad = torch.ones(3)
    optimizer = torch.optim.Adam([w])
    optimizer.step()
    return optimizer.state_dict()


def sgd(file: Any) -> Any:
    for entry in file["state"].values():
        entry.clear()
        entry["momentum_buffer"] = torch.ones(3)
    return file


NAN = torch.tensor([1.0, float("nan"), 1.0, 1.0])
MALFORMED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    # Not the state dict of an optimizer
    "an optimizer": (lambda _: Run().optimizer, TypeError, "got RMSprop; call its state_dict()"),
    "a list": (lambda file: [file], TypeError, "must be a state dict, got list"),
    "the model's": (lambda _: dict(Run().params), ValueError, "no 'state' and no 'param_groups', but ['conv.weight'"),
    "all of the run": (
        lambda file: {"model": {}, "optimizer": file},
        ValueError,
        "did you mean optimizer_state_dict['optimizer']?",
    ),
    "no groups": (drop("param_groups"), ValueError, "no 'param_groups'"),
    "no state": (drop("state"), ValueError, "no 'state'"),
    "empty groups": (put("param_groups", value=[]), ValueError, "['param_groups'] is empty"),
    "a group that is a list": (put("param_groups", 0, value=[0, 1]), TypeError, "['param_groups'][0] must be a dict"),
    "an entry that is a tensor": (put("state", 0, value=NAN), TypeError, "['state'][0] must be a dict, got tensor"),
    "groups that are a dict": (
        put("param_groups", value={}),
        TypeError,
        "['param_groups'] must be a list of dicts, got {}",
    ),
    "states that are a list": (put("state", value=[]), TypeError, "['state'] must be a dict of dicts, got []"),
    "Adam": (adam, ValueError, "Adam's family ('betas' or 'exp_avg' is in it)"),
    "SGD": (sgd, ValueError, "the state of 'conv.weight' has no 'step'"),
    # Parameters
    "a parameter less": (drop("param_groups", 1, "params", 2), ValueError, "names has 5 names, but"),
    "a parameter more": (put("param_groups", 1, "params", value=[2, 3, 4, 5]), ValueError, "has 6 parameters"),
    "a parameter twice": (put("param_groups", 1, "params", value=[1, 2, 3]), ValueError, "parameter 1 is in"),
    "an entry more": (put("state", 17, value={"step": 3}), ValueError, "has an entry 17"),
    "an entry less": (drop("state", 3), ValueError, "no state for 'scale' (parameter 3)"),
    "a number of parameters": (
        put("param_groups", 1, "params", value=3),
        TypeError,
        "'params' of group 1 of optimizer_state_dict must be a list of indices, or of names, got 3",
    ),
    "a group without parameters": (drop("param_groups", 1, "params"), ValueError, "group 1 of"),
    # Hyperparameters
    "an unknown key": (put("param_groups", 1, "nesterov", value=True), ValueError, "group 1 has 'nesterov' (True)"),
    "no lr": (drop("param_groups", 1, "lr"), ValueError, "group 1 has no 'lr'"),
    "alpha of 99": (put("param_groups", 1, "alpha", value=99), ValueError, "'alpha' of group 1 must be"),
    "lr in words": (put("param_groups", 1, "lr", value="0.1"), TypeError, "'lr' of group 1 must be a number ≥ 0"),
    "a tiny eps": (put("param_groups", 0, "eps", value=1e-40), ValueError, "'eps' of group 0 must be 0 or at least"),
    "momentum of NaN": (
        put("param_groups", 0, "momentum", value=float("nan")),
        ValueError,
        "'momentum' of group 0 must",
    ),
    "centered in words": (
        put("param_groups", 1, "centered", value="no"),
        TypeError,
        "'centered' of group 1 must be True or False, got 'no'",
    ),
    "half centered": (
        put("param_groups", 1, "centered", value=0.5),
        TypeError,
        "'centered' of group 1 must be True or",
    ),
    "two flags": (
        put("param_groups", 1, "centered", value=torch.ones(2)),
        ValueError,
        "'centered' of group 1 must be one",
    ),
    "lr of two numbers": (put("param_groups", 0, "lr", value=torch.ones(2)), ValueError, "'lr' of group 0 must be one"),
    "timm's": (put("param_groups", 0, "lr_in_momentum", value=True), ValueError, "transformation=dialects.timm?"),
    "timm's caution": (put("param_groups", 1, "caution", value=True), ValueError, "group 1 has 'caution' (True)"),
    # Slots
    "an unknown slot": (put("state", 1, "max_avg", value=NAN), ValueError, "the state of 'conv.bias' has 'max_avg'"),
    "no square_avg": (drop("state", 4, "square_avg"), ValueError, "the state of 'empty' has no 'square_avg'"),
    "no step": (drop("state", 1, "step"), ValueError, "the state of 'conv.bias' has no 'step'"),
    "no buffer": (
        drop("state", 1, "momentum_buffer"),
        ValueError,
        "'conv.bias' has no 'momentum_buffer', but its group 0 has momentum > 0",
    ),
    "a buffer too many": (
        put("state", 3, "momentum_buffer", value=torch.ones(())),
        ValueError,
        "'scale' has 'momentum_buffer', but its group 1 is without momentum > 0",
    ),
    "no mean": (drop("state", 3, "grad_avg"), ValueError, "'scale' has no 'grad_avg', but its group 1 has centered"),
    "a mean too many": (
        put("state", 1, "grad_avg", value=torch.ones(4)),
        ValueError,
        "'conv.bias' has 'grad_avg', but its group 0 is without centered",
    ),
    "another shape": (
        put("state", 1, "momentum_buffer", value=torch.ones(5)),
        ValueError,
        "'momentum_buffer' of 'conv.bias' is float32 (5,), but its 'square_avg' is float32 (4,)",
    ),
    "another kind": (
        put("state", 1, "momentum_buffer", value=torch.ones(4, dtype=torch.complex64)),
        ValueError,
        "'momentum_buffer' of 'conv.bias' is complex64",
    ),
    "integers": (put("state", 1, "square_avg", value=torch.ones(4, dtype=torch.int32)), TypeError, "got int32"),
    "a sparse tensor": (
        put("state", 1, "square_avg", value=torch.ones(4).to_sparse()),
        TypeError,
        "'square_avg' of 'conv.bias' must be a tensor whose numbers NumPy can hold",
    ),
    "numbers above float32": (
        put("state", 1, "square_avg", value=torch.full((4,), 1e300, dtype=torch.float64)),
        ValueError,
        "'square_avg' of 'conv.bias' has numbers that are infinite in float32; switch jax_enable_x64 on",
    ),
    "a list for a tensor": (put("state", 1, "square_avg", value=[1.0]), TypeError, "'square_avg' of 'conv.bias' must"),
    "NaN": (put("state", 1, "square_avg", value=NAN), ValueError, "'square_avg' of 'conv.bias' has 1 NaN among its 4"),
    "NaN in the buffer": (
        put("state", 1, "momentum_buffer", value=NAN),
        ValueError,
        "'momentum_buffer' of 'conv.bias'",
    ),
    "NaN in the mean": (put("state", 3, "grad_avg", value=NAN[1]), ValueError, "'grad_avg' of 'scale' has 1 NaN"),
    "∞ − ∞": (
        lambda f: put("state", 3, "grad_avg", value=1 / torch.zeros(()))(
            put("state", 3, "square_avg", value=1 / torch.zeros(()))(f)
        ),
        ValueError,
        "'square_avg' and 'grad_avg' of 'scale' are both infinite",
    ),
    "a negative average": (put("state", 1, "square_avg", value=-torch.ones(4)), ValueError, "'conv.bias' is negative"),
    # Steps
    "mixed steps": (
        put("state", 3, "step", value=torch.tensor(2.0)),
        ValueError,
        "'conv.weight' is at step 3, but 'scale' at step 2",
    ),
    "half a step": (put("state", 0, "step", value=2.5), ValueError, "'step' of 'conv.weight' must be a whole number"),
    "a negative step": (put("state", 0, "step", value=-1), ValueError, "'step' of 'conv.weight' must be a whole"),
    "NaN steps": (put("state", 0, "step", value=NAN[1]), ValueError, "'step' of 'conv.weight' must be a whole"),
    "three steps": (put("state", 0, "step", value=torch.ones(3)), ValueError, "must be one number, got shape (3,)"),
    "a counter that stopped": (
        put("state", 0, "step", value=torch.tensor(2.0**24)),
        ValueError,
        "'step' of 'conv.weight' is 16777216, where a counter of dtype torch.float32 stops; put the number",
    ),
    "a bfloat16 counter that stopped": (
        put("state", 0, "step", value=torch.tensor(256, dtype=torch.bfloat16)),
        ValueError,
        "'step' of 'conv.weight' is 256, where a counter of dtype torch.bfloat16 stops",
    ),
    "an int8 counter that stopped": (
        put("state", 0, "step", value=torch.tensor(127, dtype=torch.int8)),
        ValueError,
        "'step' of 'conv.weight' is 127, where a counter of dtype torch.int8 stops",
    ),
    "a step in words": (put("state", 0, "step", value="3"), TypeError, "'step' of 'conv.weight' must be a number"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused_by_name(case: str, good: dict[str, Any]) -> None:
    edit, error, message = MALFORMED[case]
    with pytest.raises(error, match=re.escape(message)) as raised:
        from_torch(edit(copy.deepcopy(good)), NAMES, to_params)
    assert len(str(raised.value)) < 500


def nested(depth: int) -> list[Any]:
    """What ``repr`` cannot show."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


# Where a file may hold something that is long or deep, or no value at all.
JUNK = {
    "a long string": "x" * 30_000,
    "a nested list": nested(10_000),
    "many arrays": [torch.ones(3)] * 10_000,
    "object": object(),
}
PLACES = [
    ("state",),
    ("param_groups",),
    ("state", 0),
    ("param_groups", 1),
    *(
        ("param_groups", 1, key)
        for key in ("params", "lr", "alpha", "eps", "weight_decay", "momentum", "centered", "more")
    ),
    *(("state", 0, slot) for slot in ("step", "square_avg", "momentum_buffer", "more")),
]


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_junk_anywhere_in_a_file_is_an_error_of_one_line(
    place: tuple[Any, ...], junk: str, good: dict[str, Any]
) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        from_torch(put(*place, value=JUNK[junk])(copy.deepcopy(good)), NAMES, to_params)
    assert len(str(raised.value)) < 500
    assert str(place[-1]) in str(raised.value)


def test_counter_below_its_end_and_a_number_in_its_place_are_read(good: dict[str, Any]) -> None:
    file = copy.deepcopy(good)
    for step in (torch.tensor(255, dtype=torch.bfloat16), torch.tensor(2.0**24 - 1), 2**24 + 1):
        for entry in file["state"].values():
            entry["step"] = step
        _, state = from_torch(file, NAMES, to_params)
        assert int(state.inner_states["group0"].inner_state.step) == int(step)


def test_tensors_of_eight_bits_are_read_exactly() -> None:
    run = Run()
    run.step(gradients(1)[0])
    file = run.file()
    file["state"][1]["square_avg"] = torch.tensor([0.5, 1.0, 1.5, 448.0]).to(torch.float8_e4m3fn)
    _, state = from_torch(file, NAMES, to_params)
    np.testing.assert_array_equal(state.square_avg["conv"]["bias"], [0.5, 1.0, 1.5, 448.0])


def test_flags_and_functions_in_the_tree_have_no_slots() -> None:
    """As a whole Equinox module has them, and ``init`` gives them none."""
    run = Run()
    run.step(gradients(1)[0])
    others = {"flag": True, "function": np.tanh, "number": 3, "key": jax.random.key(0)}
    _, state = from_torch(run.file(), NAMES, lambda named: {"model": to_params(named), "others": others})
    assert state.square_avg["others"] == dict.fromkeys(others)
    back = to_torch(state, NAMES, lambda tree: from_params(tree["model"]), like=run.file(), tensor=torch.from_numpy)
    assert_same_file(back, run.file())


def but(name: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``to_params`` after ``function`` of one array."""
    return lambda named: to_params({**named, name: function(named[name])})


MISUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a name too few": (dict(names=NAMES[:-1]), ValueError, "names has 4 names, but optimizer_state_dict has 5"),
    "a name too many": (dict(names=[*NAMES, "more"]), ValueError, "names has 6 names, but optimizer_state_dict has 5"),
    "a name twice": (dict(names=[*NAMES[:-1], "scale"]), ValueError, "got 'scale' twice"),
    "names of another kind": (dict(names=[1, 2, 3, 4, 5]), TypeError, "names must be a list of strings"),
    "one string": (dict(names="scale"), TypeError, "names must be a list of strings"),
    "a missing name": (dict(names=["w", *NAMES[1:]]), ValueError, "asks for 'conv.weight', which is not one of names"),
    "a lost parameter": (dict(to_params=lambda n: [n[k] for k in NAMES[1:]]), ValueError, "leaves out 'conv.weight'"),
    "a part of a parameter lost": (
        dict(to_params=but("linear.weight", lambda x: x[:1])),
        ValueError,
        "leaves out 12 of 18 numbers of 'linear.weight'",
    ),
    "a cast": (
        dict(to_params=but("linear.weight", lambda x: jnp.asarray(x, jnp.bfloat16))),
        ValueError,
        "to_params puts numbers into leaf rest/0 that it was not given",
    ),
    "a cast to integers": (
        dict(to_params=but("linear.weight", lambda x: x.astype(np.int32))),
        ValueError,
        "to_params puts numbers into leaf rest/0 that it was not given",
    ),
    "a sum": (
        dict(to_params=lambda n: [n[k] for k in NAMES] + [n["scale"] + n["scale"]]),
        ValueError,
        "into leaf 5 that",
    ),
    "padding": (dict(to_params=but("conv.bias", lambda x: np.pad(x, 1))), ValueError, "into leaf conv/bias that"),
    "another shape": (
        dict(params=SHAPES | {"conv.bias": (5,)}),
        ValueError,
        "the state of 'conv.bias' has shape (4,), but params['conv.bias'] has shape (5,)",
    ),
    "params of another kind": (dict(params=[(4,)]), TypeError, "params must be a dict"),
    "half a row": (dict(params=SHAPES | {"conv.bias": (4.5,)}), TypeError, "params['conv.bias'] must be an array or a"),
    "a negative shape": (dict(params=SHAPES | {"conv.bias": (-4,)}), TypeError, "params['conv.bias'] must be an array"),
    "words for a shape": (
        dict(params=SHAPES | {"conv.bias": "four"}),
        TypeError,
        "params['conv.bias'] must be an array",
    ),
    "integer parameters": (
        dict(params={"conv.bias": np.ones(4, np.int32)}),
        TypeError,
        "params['conv.bias'] must be floating or complex, got int32",
    ),
    "complex parameters": (
        dict(params={"conv.bias": np.ones(4, np.complex64)}),
        ValueError,
        "the state of 'conv.bias' is float32, but params['conv.bias'] is complex64",
    ),
    "a dict for to_params": (dict(to_params={}), TypeError, "to_params must be a function, got {}"),
    "a name for a transformation": (dict(transformation="rmsprop"), TypeError, "transformation must be a function"),
    "None for names": (dict(names=None), TypeError, "names must be a list of strings"),
    "30,000 names": (dict(names=["x" * 30_000, *NAMES]), ValueError, "names has 6 names"),
    "a rate in words": (dict(lr="0.1"), TypeError, "lr must be a number ≥ 0"),
    "a shape of another kind": (dict(params=SHAPES | {"scale": 1}), TypeError, "params['scale'] must be an array or"),
    "three rates": (dict(lr=[0.1, 0.1, 0.1]), ValueError, "one for each of the 2 groups, got 3"),
    "a negative rate": (dict(lr=[0.1, -0.1]), ValueError, "lr must be a number ≥ 0"),
    "optax.rmsprop": (
        dict(transformation=lambda **h: optax.rmsprop(h["lr"])),
        ValueError,
        "the state of the transformation must contain an RMSPropState, got ",
    ),
    "values of the parameters in the state": (
        dict(transformation=lambda **h: optax.contrib.schedule_free(rmsprop(**h), 0.1)),
        ValueError,
        "the transformation keeps values of the parameters in state",
    ),
}


@pytest.mark.parametrize("case", MISUSED)
def test_arguments_that_do_not_fit_the_file_are_refused_by_name(case: str, good: dict[str, Any]) -> None:
    arguments, error, message = MISUSED[case]
    options = dict(names=NAMES, to_params=to_params) | arguments
    with pytest.raises(error, match=re.escape(message)) as raised:
        from_torch(good, **options)
    assert len(str(raised.value)) < 500


def test_key_error_within_to_params_is_left_as_it_is(good: dict[str, Any]) -> None:
    def broken(named: Any) -> Any:
        return {}["scale"]

    with pytest.raises(KeyError, match="scale"):
        from_torch(good, NAMES, broken)


def test_parameter_without_state_that_params_lacks_is_named(good: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no state for 'scale' .*params has no such name"):
        from_torch(drop("state", 3)(copy.deepcopy(good)), NAMES, to_params, params={"conv.bias": (4,)})


def test_truncated_file_is_refused_by_torch() -> None:
    buffer = io.BytesIO()
    torch.save(Run().optimizer.state_dict(), buffer)
    with pytest.raises(RuntimeError, match="zip archive"):
        torch.load(io.BytesIO(buffer.getvalue()[:-100]), weights_only=True)


def regrouped(file: Any, **changes: Any) -> Any:
    file["param_groups"][0] |= changes
    return file


def more(params: Any) -> Any:
    return from_params(params) | {"more": np.ones(3)}


def less(params: Any) -> Any:
    named = from_params(params)
    del named["scale"]
    return named


MISUSED_BACK: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an array for a state": (
        dict(state=np.ones(3)),
        ValueError,
        "state must contain an RMSPropState, got ndarray without one",
    ),
    "a name too few": (dict(names=NAMES[:-1]), ValueError, "names has 4 names, but like has 5 parameters"),
    "a missing name": (dict(from_params=less), ValueError, "'scale' is missing"),
    "an unknown name": (dict(from_params=more), ValueError, "'more' is not one of them"),
    "no dict": (dict(from_params=jax.tree.leaves), TypeError, "from_params must return a dict"),
    "a cast": (
        dict(from_params=lambda p: {name: np.asarray(x, np.float16) for name, x in from_params(p).items()}),
        ValueError,
        "from_params makes 'conv.weight' float16",
    ),
    "no transpose": (
        dict(from_params=lambda p: from_params(p) | {"linear.weight": p["rest"][0]}),
        ValueError,
        "gives 'linear.weight' the shape (6, 3), in like it has (3, 6)",
    ),
    "a sum": (
        dict(from_params=lambda p: from_params(p) | {"scale": p["rest"][1] + p["conv"]["bias"][0]}),
        ValueError,
        "from_params puts numbers into 'scale' that it was not given",
    ),
    "padding": (
        dict(from_params=lambda p: from_params(p) | {"conv.bias": np.pad(p["conv"]["bias"], 1)}),
        ValueError,
        "from_params puts numbers into 'conv.bias' that it was not given",
    ),
    "a part of a leaf lost": (
        dict(from_params=lambda p: from_params(p) | {"conv.bias": p["conv"]["bias"][:3]}),
        ValueError,
        "from_params leaves out 1 of 4 numbers of leaf conv/bias",
    ),
    "a leaf lost": (
        dict(from_params=lambda p: from_params(p) | {"scale": p["conv"]["bias"][0]}),
        ValueError,
        "from_params leaves out leaf rest/1; its state would be lost",
    ),
    "leaves of two groups joined": (
        dict(from_params=lambda p: from_params(p) | {"scale": np.append(p["rest"][1], p["conv"]["bias"])}),
        ValueError,
        "from_params makes 'scale' of leaf rest/1, which has a grad_avg, and of leaf conv/bias, which has none",
    ),
    "a dict for from_params": (dict(from_params={}), TypeError, "from_params must be a function, got {}"),
    "no function for tensors": (dict(tensor=None), TypeError, "tensor must be a function, got None"),
    "a complex like": (
        dict(like=put("state", 1, "square_avg", value=torch.ones(4, dtype=torch.complex64))),
        ValueError,
        "the state of 'conv.bias' is float32, in like it is complex64",
    ),
    "like centered in words": (
        dict(like=dict(centered="no")),
        TypeError,
        "'centered' of group 0 must be True or False, got 'no'",
    ),
    "like is an optimizer": (dict(like=Run().optimizer), TypeError, "like must be a state dict, got RMSprop"),
    "like without momentum": (
        dict(like=dict(momentum=0)),
        ValueError,
        "has a momentum_buffer, but its group 0 of like",
    ),
    "like centered": (
        dict(like=dict(centered=True)),
        ValueError,
        "has no grad_avg, but its group 0 of like has centered",
    ),
}


@pytest.mark.parametrize("case", MISUSED_BACK)
def test_arguments_that_do_not_fit_the_state_are_refused_by_name(case: str, good: dict[str, Any]) -> None:
    arguments, error, message = MISUSED_BACK[case]
    _, state = from_torch(good, NAMES, to_params)
    options = dict(state=state, names=NAMES, from_params=from_params, like=good, tensor=torch.from_numpy) | arguments
    if isinstance(arguments.get("like"), dict):
        options["like"] = regrouped(copy.deepcopy(good), **arguments["like"])
    elif callable(arguments.get("like")):
        options["like"] = arguments["like"](copy.deepcopy(good))
    with pytest.raises(error, match=re.escape(message)) as raised:
        to_torch(**options)
    assert len(str(raised.value)) < 500


# --- A state that no init gives ----------------------------------------------------------------------------


def slot_with(slot: str, bias: Any) -> Callable[[Any], Any]:
    """The state with something else in one place of a slot."""

    def edit(state: Any) -> Any:
        tree = getattr(state, slot)
        return state._replace(**{slot: tree | {"conv": tree["conv"] | {"bias": bias}}})

    return edit


def step_as(step: Any) -> Callable[[Any], Any]:
    return lambda state: state._replace(step=step)


AS_INIT = "state.step must be an int32 scalar as init gives it, got "
BROKEN: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    **{
        f"{slot} of another shape": (
            slot_with(slot, jnp.ones(5)),
            ValueError,
            f"state.{slot}['conv']['bias'] is float32 (5,), but state.square_avg['conv']['bias'] is float32 (4,)",
        )
        for slot in SLOTS[1:]
    },
    **{
        f"{slot} of {dtype}": (
            slot_with(slot, jnp.ones(4, dtype)),
            TypeError,
            f"state.{slot}['conv']['bias'] must be a floating or complex array, got {dtype}",
        )
        for slot in SLOTS
        for dtype in ("int32", "bool")
    },
    **{
        f"complex {slot}": (
            slot_with(slot, jnp.ones(4, jnp.complex64)),
            ValueError,
            f"state.{slot}['conv']['bias'] is complex64 (4,), but state.square_avg",
        )
        for slot in SLOTS[1:]
    },
    **{
        f"NaN in {slot}": (
            slot_with(slot, jnp.array([1.0, jnp.nan, 1.0, 1.0])),
            ValueError,
            f"state.{slot}['conv']['bias'] has 1 NaN among its 4 numbers",
        )
        for slot in SLOTS
    },
    **{
        f"{slot} masked": (
            slot_with(slot, optax.MaskedNode()),
            ValueError,
            f"state.{slot}['conv']['bias'] is MaskedNode, but state.square_avg['conv']['bias'] is",
        )
        for slot in SLOTS[1:]
    },
    **{
        f"{slot} missing": (
            slot_with(slot, None),
            ValueError,
            f"state.{slot}['conv']['bias'] and state.square_avg['conv']['bias'] must both be there",
        )
        for slot in SLOTS[1:]
    },
    "square_avg masked": (slot_with("square_avg", optax.MaskedNode()), ValueError, "state.grad_avg['conv']['bias'] is"),
    "a list for an array": (slot_with("grad_avg", "zeros"), TypeError, "state.grad_avg['conv']['bias'] must be"),
    "a negative average": (slot_with("square_avg", -jnp.ones(4)), ValueError, "state.square_avg['conv']['bias'] is"),
    "a mean whose square is too large": (
        slot_with("grad_avg", jnp.full(4, 1e30)),
        ValueError,
        "square_avg + grad_avg² of 'conv.bias', which is the average of squares, is infinite in float32",
    ),
    "a bfloat16 step": (step_as(jnp.bfloat16(256)), TypeError, AS_INIT + "bfloat16 ()"),
    "a float step": (step_as(7.0), TypeError, AS_INIT + "7.0"),
    "a NaN step": (step_as(jnp.nan), TypeError, AS_INIT + "nan"),
    "a flag for a step": (step_as(True), TypeError, AS_INIT + "True"),
    "two steps": (step_as(jnp.array([1, 2])), TypeError, AS_INIT + "int32 (2,)"),
    "no step": (step_as(None), TypeError, AS_INIT + "None"),
    "an int8 step that stopped": (step_as(jnp.int8(127)), ValueError, "state.step is 127, where a counter of dtype"),
    "a step that stopped": (step_as(jnp.int32(2**31 - 1)), ValueError, "state.step is 2147483647, where a counter of"),
    "a negative step": (step_as(jnp.int32(-1)), ValueError, "state.step is -1, where a counter of dtype int32"),
}


@pytest.fixture(scope="module")
def everything() -> tuple[Any, dict[str, Any]]:
    """A state with all slots, and a file for it."""
    run = Run(dict(momentum=0.9, centered=True))
    run.step(gradients(1)[0])
    return from_torch(run.file(), NAMES, to_params)[1], run.file()


@pytest.mark.parametrize("case", BROKEN)
def test_state_that_init_would_not_give_is_refused_by_path(case: str, everything: tuple[Any, dict[str, Any]]) -> None:
    state, like = everything
    edit, error, message = BROKEN[case]
    options = dict(names=NAMES, from_params=from_params, like=like, tensor=torch.from_numpy)
    to_torch(state, **options)
    with pytest.raises(error, match="^" + re.escape(message)) as raised:
        to_torch(edit(state), **options)
    assert len(str(raised.value)) < 500


def test_place_of_a_part_is_named(good: dict[str, Any]) -> None:
    _, state = from_torch(good, NAMES, to_params)
    part = state.inner_states["group1"]
    broken = part._replace(inner_state=part.inner_state._replace(step=jnp.float32(3)))
    state = state._replace(inner_states=state.inner_states | {"group1": broken})
    with pytest.raises(TypeError, match=r"^state\.inner_states\['group1'\]\.inner_state\.step must be an int32"):
        to_torch(state, NAMES, from_params, like=good, tensor=torch.from_numpy)


def test_two_states_of_the_same_parameters_are_refused(everything: tuple[Any, dict[str, Any]]) -> None:
    state, like = everything
    with pytest.raises(
        ValueError,
        match=r"^the square_avg of state has two RMSPropStates that .* both have the leaf conv/bias; give the",
    ):
        to_torch((state, state), NAMES, from_params, like=like, tensor=torch.from_numpy)


@pytest.mark.parametrize(("dtype", "cast"), [("float64", lambda x: np.asarray(x, np.float32)), ("complex64", np.real)])
def test_cast_of_a_wide_or_complex_leaf_is_refused(x64: None, dtype: str, cast: Callable[[Any], Any]) -> None:
    state = rmsprop().init({"w": jnp.ones(3, dtype), "b": jnp.ones(2, "float32")})
    settings = dict(lr=0.1, alpha=0.9, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False)
    like = {"state": {}, "param_groups": [{"params": [0, 1], **settings}]}

    def named(tree: Any) -> dict[str, Any]:
        return tree | {"w": cast(tree["w"])}

    with pytest.raises(ValueError, match=r"^from_params makes 'w' float32; it may only rearrange, not cast"):
        to_torch(state, ["w", "b"], named, like=like, tensor=torch.from_numpy)


@pytest.mark.parametrize("step", [5, np.int64(5), jnp.int16(5)])
def test_step_of_another_width_is_carried_over(step: Any, everything: tuple[Any, dict[str, Any]]) -> None:
    state, like = everything
    back = to_torch(state._replace(step=step), NAMES, from_params, like=like, tensor=torch.from_numpy)
    assert [entry["step"] for entry in back["state"].values()] == [5.0] * 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_state_of_fewer_bits_comes_out_exactly(dtype: str) -> None:
    tx = rmsprop(momentum=0.9, centered=True, accumulator_dtype=dtype)
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    state = state._replace(**{slot: {"w": jnp.array([0.5, 1.0, 1.5], dtype)} for slot in SLOTS})
    settings = dict(lr=0.1, alpha=0.9, eps=1e-8, weight_decay=0.0, momentum=0.9, centered=True)
    like = {"state": {}, "param_groups": [{"params": [0], **settings}]}
    back = to_torch(state, ["w"], dict, like=like, tensor=torch.from_numpy)["state"][0]
    for slot in SLOTS[1:]:
        np.testing.assert_array_equal(back[slot], np.array([0.5, 1.0, 1.5], np.float32), strict=True)
    np.testing.assert_array_equal(back["square_avg"], np.array([0.75, 2.0, 3.75], np.float32), strict=True)


def test_parts_at_different_steps_are_refused(good: dict[str, Any]) -> None:
    _, state = from_torch(good, NAMES, to_params)
    inner = state.inner_states["group1"].inner_state
    later = state.inner_states["group1"]._replace(inner_state=inner._replace(step=inner.step + 1))
    state = state._replace(inner_states=state.inner_states | {"group1": later})
    with pytest.raises(ValueError, match=r"different steps, \[3, 4\]"):
        to_torch(state, NAMES, from_params, like=good, tensor=torch.from_numpy)


def test_parameter_outside_the_state_is_named(good: dict[str, Any]) -> None:
    _, state = from_torch(good, NAMES, to_params)
    with pytest.raises(ValueError, match=r"^leaf rest/0 is in no RMSPropState of state; give the"):
        to_torch(state.inner_states["group0"], NAMES, from_params, like=good, tensor=torch.from_numpy)


# --- State in 8 and 16 bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
def test_a_run_of_torch_continues_in_fewer_bits_and_goes_back(bits: int) -> None:
    rule = dict(lr=0.01, alpha=0.9, momentum=0.9, centered=True)
    run = Run(rule, shapes={"weight": (64, 96), "bias": (96,)})
    for given in gradients(3, shapes={"weight": (64, 96), "bias": (96,)}):
        run.step(given)

    def narrow(**numbers: Any) -> optax.GradientTransformation:
        return storage.compress(rmsprop(**numbers), bits)

    def written(state: Any) -> Any:
        return to_torch(state, ["weight", "bias"], dict, like=run.file(), tensor=torch.from_numpy)

    tx, state = from_torch(run.file(), ["weight", "bias"], dict, transformation=narrow)
    _, wide = from_torch(run.file(), ["weight", "bias"], dict)
    assert_same(state.inner_state, storage.encode(wide, state.inner_state))
    assert state.inner_state.square_avg["weight"].codes.dtype == ("uint8" if bits == 8 else "bfloat16")
    params = {name: jnp.asarray(p.detach().numpy()) for name, p in run.params.items()}
    _, after = tx.update(params, state, params)
    back, decoded = written(after), written(storage.decode(after))
    for i, slots in back["state"].items():
        assert set(slots) == {"step", *SLOTS}
        for slot, value in slots.items():
            assert torch.equal(value, decoded["state"][i][slot]), slot
