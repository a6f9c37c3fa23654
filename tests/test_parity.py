"""``rmsprop_jax.rmsprop`` beside ``torch.optim.RMSprop``: the same gradients, compared at every step.

Every comparison covers the parameters and every slot of the state, entry by entry. Where torch's own float32
is too inaccurate to be compared with, the reference is torch in double precision.
"""

import contextlib
import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compare import assert_alike, assert_close
from rmsprop_jax import RMSPropState, rmsprop

torch = pytest.importorskip("torch")
from torch.testing._internal.common_optimizers import optim_inputs_func_rmsprop  # noqa: E402

Tree = dict[str, np.ndarray]
Gradients = Sequence[Mapping[str, np.ndarray | None]]
Trajectory = dict[str, Tree]  # slot → leaf → float64 array (steps, *shape); complex leaves (steps, *shape, 2)

STEPS = 20
PRECISIONS = ("float32", "float64")
COMPLEX = {"float32": "complex64", "float64": "complex128"}

# Leaves named "complex…" are complex. There are few trees because each is a program to compile; the numbers of
# a configuration are not part of the program.
MIXED = {"matrix": (3, 4), "vector": (5,), "scalar": (), "empty": (0, 2), "complex": (3,)}
OTHER = {"tensor": (5, 3, 17)}


def product(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of ``choices``, each as options for both libraries."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def named(options: Mapping[str, Any]) -> str:
    """What pytest calls a test with these options."""
    return "-".join(f"{name}={value}" for name, value in options.items() if value is not False)


STRUCTURES = product(momentum=(0, 0.9), centered=(False, True), weight_decay=(0, 0.1), maximize=(False, True))
SMOOTHING = [(0, 1e-8), (0.5, 1e-10), (0.9, 1.0), (0.99, 1e-8), (0.99, 1e-3), (0.9999, 1e-10), (0.9999, 1.0)]
GRID = [
    structure | {"alpha": alpha, "eps": eps}
    for structure in STRUCTURES
    for alpha, eps in SMOOTHING
    # Without memory there is no variance, and torch's is a rounding error: see the exact squares below.
    if alpha > 0 or not structure["centered"]
]


@pytest.fixture(autouse=True)
def users_program(request: pytest.FixtureRequest) -> None:
    """Rounding is that of the program which users run. In float64 only the meaning is compared, of any program."""
    case = getattr(request.node, "callspec", None)
    if case is None or case.params.get("precision") != "float64":
        request.getfixturevalue("optimized")


# --- One problem, two runs, one comparison ---------------------------------------------------------------


def problem(
    precision: str,
    seed: int,
    shapes: Mapping[str, tuple[int, ...]] = MIXED,
    size: float = 1.0,
    maximize: bool = False,
) -> tuple[Tree, list[Tree]]:
    """Parameters around 1 and random gradients around ``size``; the same ones in both precisions.

    Every entry has a scale of its own, over three decades, and every step another one. One entry in ten is always
    0, and one in ten is 0 at each step. The sign of the first gradient is that which weight decay adds to: a
    difference would have nothing before it that its error could be compared with.
    """
    rng = np.random.default_rng(seed)
    drawn = {name: (*shape, 2) if name.startswith("complex") else shape for name, shape in shapes.items()}
    params = {name: rng.standard_normal(shape) for name, shape in drawn.items()}
    scales = {
        name: size * 10 ** rng.uniform(-1.5, 1.5, shape) * (rng.random(shape) > 0.1) for name, shape in drawn.items()
    }

    def gradient() -> Tree:
        step = 10 ** rng.uniform(-0.5, 0.5)
        return {
            name: rng.standard_normal(shape) * scales[name] * step * (rng.random(shape) > 0.1)
            for name, shape in drawn.items()
        }

    def leaf(name: str, x: np.ndarray) -> np.ndarray:
        if name.startswith("complex"):
            return np.asarray(x[..., 0] + 1j * x[..., 1], COMPLEX[precision])
        return np.asarray(x, precision)

    gradients = [gradient() for _ in range(STEPS)]
    uphill = -1 if maximize else 1
    gradients[0] = {name: uphill * np.copysign(g, params[name]) for name, g in gradients[0].items()}
    params, *gradients = ({name: leaf(name, x) for name, x in tree.items()} for tree in (params, *gradients))
    return params, gradients


def halved_every_seven_steps(step: Any) -> Any:
    """A learning rate that both can read, torch with a Python number: a halving is exact in every precision."""
    return 0.03 * 0.5 ** (step // 7)


def components(x: Any) -> np.ndarray:
    """``x`` in float64; complex numbers as torch's ``view_as_real`` shows them."""
    x = np.asarray(x)
    return (np.stack([x.real, x.imag], axis=-1) if np.iscomplexobj(x) else x).astype(np.float64)


def trajectory(records: Sequence[Mapping[str, Mapping[str, Any]]]) -> Trajectory:
    return {
        slot: {name: np.stack([components(record[slot][name]) for record in records]) for name in tree}
        for slot, tree in records[0].items()
    }


def tensor(x: Any, widened: bool) -> Any:
    x = torch.from_numpy(np.array(x))
    return x.to(torch.complex128 if x.is_complex() else torch.float64) if widened else x


def run_torch(params: Tree, gradients: Gradients, *, widened: bool = False, **options: Any) -> Trajectory:
    """What torch does in the precision of ``params``, or in double precision if ``widened``."""
    lr = options.pop("lr", 1e-2)
    leaves = {name: tensor(p, widened).requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.RMSprop(list(leaves.values()), lr=lr(0) if callable(lr) else lr, **options)
    (group,) = optimizer.param_groups
    slots = ["square_avg"] + ["grad_avg"] * group["centered"] + ["momentum_buffer"] * (group["momentum"] > 0)

    def slot(p: Any, name: str) -> np.ndarray:
        # torch makes the state of a parameter at its first gradient; until then it is as good as 0.
        untouched = torch.zeros(()) if name == "step" else torch.zeros_like(p)
        return optimizer.state[p].get(name, untouched).numpy().copy()

    records = []
    for step, gradient in enumerate(gradients):
        group["lr"] = lr(step) if callable(lr) else lr
        for name, p in leaves.items():
            p.grad = None if gradient[name] is None else tensor(gradient[name], widened)
        optimizer.step()
        record = {"params": {name: p.detach().numpy().copy() for name, p in leaves.items()}}
        record |= {s: {name: slot(p, s) for name, p in leaves.items()} for s in ("step", *slots)}
        records.append(record)
    return trajectory(records)


def run_ours(params: Tree, gradients: Gradients, *, jit: bool = False, **options: Any) -> Trajectory:
    """What we do: ``update`` as it is, which is one compiled program, or the whole step within ``jax.jit``."""
    with double_precision(any(p.real.dtype == np.float64 for p in params.values())):
        optimizer = rmsprop(**options)

        def step(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        step = jax.jit(step) if jit else step
        params = jax.tree.map(jnp.asarray, params)
        start = params, optimizer.init(params)
        params, state = start
        records = []
        for gradient in gradients:
            params, state = step(params, state, gradient)
            records.append({"params": params} | slots_of(state, params))
        assert_alike((params, state), start)
    return as_torch_keeps_it(trajectory(records))


def slots_of(state: RMSPropState, params: Any) -> dict[str, Any]:
    """The slots that there are, by name, with the one ``step`` that all parameters share given to each."""
    slots = state._asdict() | {"step": dict.fromkeys(params, state.step)}
    return {slot: tree for slot, tree in slots.items() if tree is not None}


def double_precision(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    if not wanted:
        return contextlib.nullcontext()
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # its home before JAX 0.8

    return enable_x64()


def as_torch_keeps_it(ours: Trajectory) -> Trajectory:
    """Centered, torch's ``square_avg`` is the raw second moment and ours the variance."""
    if "grad_avg" not in ours:
        return ours
    return ours | {"square_avg": {name: v + ours["grad_avg"][name] ** 2 for name, v in ours["square_avg"].items()}}


def tolerance(precision: str) -> np.ndarray:
    """How far apart the two may be after each step, relative to ``sizes_so_far``.

    In float64 only the meaning is tested. In float32 each step rounds the averages, the root, the quotient, the
    buffer and the parameter, on both sides and not in the same places: torch on the CPU fuses multiplications with
    additions, XLA decides by itself. The averages keep their errors for a while, so the distance grows with the
    steps. Measured over the tests of this file: at most 2.1 eps after the first step, 5.1 after the tenth, 11.5
    after the twentieth, and always within 0.65 of what is allowed.
    """
    if precision == "float64":
        return np.full(STEPS, 1e-12)
    return np.finfo(np.float32).eps * (4 + 0.75 * np.arange(STEPS))


def assert_same(ours: Trajectory, theirs: Trajectory, sizes: Trajectory, allowed: np.ndarray) -> None:
    """Finite in the same places and equal there, at every step, up to ``allowed`` times ``sizes``."""
    scale = jax.tree.map(lambda size: size * allowed.reshape(-1, *[1] * (size.ndim - 1)), sizes)
    # Centered, torch's ∞ − ∞ is NaN in one place where ours is in another.
    assert_close(ours, theirs, rtol=1.0, scale=scale, nonfinite="same places" if "grad_avg" in theirs else "equal")


def sizes_so_far(theirs: Trajectory, start: Tree, alpha: float = 0.99, weight_decay: float = 0, **_: Any) -> Trajectory:
    """What the rounding errors of each entry are relative to, up to each step.

    Not the value itself, which may be what is left of much larger terms: for a parameter the way it has gone, for
    a slot the largest value it has had and what weight decay, which may cancel against the gradient, has added.
    """

    def distance(start: np.ndarray, values: np.ndarray) -> np.ndarray:
        moves = np.diff(values, axis=0, prepend=start[None])
        return np.abs(start) + np.cumsum(np.nan_to_num(np.abs(moves), posinf=0), axis=0)

    def largest(values: np.ndarray) -> np.ndarray:
        return np.maximum.accumulate(np.nan_to_num(np.abs(values), posinf=0), axis=0)

    params = {name: distance(components(start[name]), values) for name, values in theirs["params"].items()}
    decay = {name: weight_decay * size for name, size in params.items()}
    added = {
        "square_avg": {name: (1 - alpha) * d**2 for name, d in decay.items()},
        "grad_avg": {name: (1 - alpha) * d for name, d in decay.items()},
    }
    slots = {
        slot: {name: largest(values) + added.get(slot, {}).get(name, 0) for name, values in tree.items()}
        for slot, tree in theirs.items()
    }
    return slots | {"params": params}


def assert_parity(params: Tree, gradients: Gradients, *, jit: bool = False, **options: Any) -> None:
    """In float32 the centered form is compared with torch in float64, from the same float32 numbers.

    torch's float32 is off there by square_avg/variance roundings, the variance being a difference to it: against
    its own float64 it turns NaN in 2 of the random configurations below and misses by 20 eps in others.
    """
    precision = next(iter(params.values())).real.dtype.name
    widened = precision == "float32" and options.get("centered", False)
    theirs = run_torch(params, gradients, widened=widened, **options)
    ours = run_ours(params, gradients, jit=jit, **options)
    assert_same(ours, theirs, sizes_so_far(theirs, params, **options), tolerance(precision))


# --- Every configuration ---------------------------------------------------------------------------------


@pytest.mark.device("parity")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", GRID, ids=named)
def test_parameters_and_every_slot_follow_torch(options: dict, precision: str) -> None:
    params, gradients = problem(precision, seed=1, maximize=options["maximize"])
    assert_parity(params, gradients, lr=halved_every_seven_steps, **options)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", [pytest.param(c.kwargs, id=c.desc) for c in optim_inputs_func_rmsprop("cpu")])
def test_the_configurations_torch_tests_itself_with_follow_torch(options: dict, precision: str) -> None:
    params, gradients = problem(precision, seed=2, maximize=options.get("maximize", False))
    assert_parity(params, gradients, **options)


@pytest.mark.parametrize(("seed", "precision"), [(seed, PRECISIONS[seed % 2]) for seed in range(200)])
def test_random_configurations_follow_torch(seed: int, precision: str) -> None:
    rng = np.random.default_rng(seed)

    def log_uniform(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    size = log_uniform(1e-4, 1e2)  # entries lie within 10^±2 of it: gradients from 1e-6 to 1e4
    options = {
        "lr": log_uniform(1e-5, 1e-1),
        "alpha": 1 - log_uniform(1e-4, 0.8),
        "eps": log_uniform(1e-10, 1),
        "momentum": float(rng.choice([0, 1 - log_uniform(1e-2, 1)])),
        # Below the gradients: the variance of an almost constant gradient is ill-conditioned in any precision.
        "weight_decay": float(rng.choice([0, log_uniform(1e-4, 1e-1) * min(1, size)])),
        "centered": bool(rng.integers(2)),
        "maximize": bool(rng.integers(2)),
    }
    shapes = (MIXED, OTHER)[rng.integers(2)]
    params, gradients = problem(precision, seed, shapes, size, options["maximize"])
    assert_parity(params, gradients, **options)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("structure", product(momentum=(0, 0.9), centered=(False, True)), ids=named)
def test_a_step_compiled_into_a_larger_program_follows_torch(structure: dict, precision: str) -> None:
    params, gradients = problem(precision, seed=3)
    assert_parity(params, gradients, jit=True, lr=halved_every_seven_steps, weight_decay=0.1, **structure)


def test_shared_arguments_have_torchs_order_and_defaults() -> None:
    ours, theirs = (
        {name: p.default for name, p in inspect.signature(optimizer).parameters.items()}
        for optimizer in (rmsprop, torch.optim.RMSprop)
    )
    shared = ["lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize"]
    assert [(name, ours[name]) for name in ours if name in theirs] == [
        (name, theirs[name]) for name in theirs if name in shared
    ]


# --- Edges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_centered_float32_keeps_the_variance_of_an_almost_constant_gradient(momentum: float) -> None:
    params, _ = problem("float32", seed=11, shapes={"long": (257,)})
    relative = 1 + 1e-3 * np.random.default_rng(11).standard_normal((STEPS, 257)).astype(np.float32)
    gradients = [{"long": params["long"] * step} for step in relative]
    options = {"alpha": 0.5, "momentum": momentum, "centered": True}
    theirs = run_torch(params, gradients, widened=True, **options)
    # The mean is 1000 standard deviations, so that its rounding counts 1000 times: measured, 75 eps in the end.
    # torch's own float32 ends 280000 eps away from its float64.
    allowed = np.full(STEPS, 150 * np.finfo(np.float32).eps)
    assert_same(run_ours(params, gradients, **options), theirs, sizes_so_far(theirs, params, **options), allowed)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_centered_without_memory_divides_by_eps_as_torch(momentum: float, precision: str) -> None:
    params, gradients = problem(precision, seed=4, shapes={"matrix": (3, 4), "scalar": ()})

    def coarse(g: np.ndarray) -> np.ndarray:
        # Seven significant bits: the square is exact, so that torch too finds a variance of 0.
        mantissa, exponent = np.frexp(g)
        return np.asarray(np.ldexp(np.round(mantissa * 128) / 128, exponent), precision)

    gradients = [{name: coarse(g) for name, g in gradient.items()} for gradient in gradients]
    assert_parity(params, gradients, alpha=0, eps=1e-3, momentum=momentum, centered=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "structure", [{}, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}], ids=["default", "everything"]
)
def test_a_parameter_without_gradient_rests_as_in_torch(structure: dict, precision: str) -> None:
    params, gradients = problem(precision, seed=5)
    missing = {"matrix": {0, 1}, "scalar": {3, 4, 5, 6}, "complex": {3, 4, 5, 6}, "vector": set(range(STEPS))}
    gradients = [
        {name: None if step in missing.get(name, ()) else g for name, g in gradient.items()}
        for step, gradient in enumerate(gradients)
    ]
    options = {"lr": halved_every_seven_steps, **structure}
    ours = run_ours(params, gradients, **options)
    theirs = run_torch(params, gradients, widened=precision == "float32" and options.get("centered", False), **options)
    # torch counts the gradients of each parameter, we the updates.
    ours["step"], counted = theirs["step"], ours["step"]
    assert_same(ours, theirs, sizes_so_far(theirs, params, **options), tolerance(precision))
    np.testing.assert_array_equal(counted["vector"], np.arange(1, STEPS + 1))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("alpha", [0.3, 0.99])
@pytest.mark.parametrize("structure", STRUCTURES, ids=named)
def test_nan_and_infinite_gradients_spread_as_in_torch(structure: dict, alpha: float, precision: str) -> None:
    params, gradients = problem(precision, seed=6, maximize=structure["maximize"])
    for step, name, index, value in [
        (0, "matrix", (0, 0), np.nan),
        (2, "matrix", (1, 2), np.inf),
        (2, "matrix", (2, 3), -np.inf),
        (7, "matrix", (1, 2), -np.inf),
        (5, "scalar", (), np.inf),
        (3, "complex", 0, complex(np.nan, 1)),
        (3, "complex", 1, complex(1, -np.inf)),
    ]:
        # With weight decay torch multiplies a complex parameter by a complex number with imaginary part 0, which
        # makes both components NaN where one is not finite. Here no component knows of the other.
        if not (name == "complex" and structure["weight_decay"]):
            gradients[step][name][index] = value
    assert_parity(params, gradients, alpha=alpha, **structure)


@pytest.mark.parametrize("structure", product(momentum=(0, 0.9), centered=(False, True)), ids=named)
def test_gradients_whose_square_overflows_are_averaged_as_in_torch(structure: dict) -> None:
    params, gradients = problem("float32", seed=7, shapes={"long": (257,)})
    gradients = [{"long": np.clip(1e19 * g["long"], -4e19, 4e19)} for g in gradients]
    assert any((np.abs(g["long"]) > np.sqrt(np.finfo(np.float32).max)).any() for g in gradients)
    assert_parity(params, gradients, **structure)


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_an_average_that_overflows_stops_its_parameter_as_in_torch(momentum: float) -> None:
    params, gradients = problem("float32", seed=9, shapes={"long": (257,)})
    gradients[3]["long"][:100] = 1e25
    assert_parity(params, gradients, momentum=momentum)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("structure", product(momentum=(0, 0.9), centered=(False, True)), ids=named)
def test_without_eps_a_zero_gradient_is_nan_as_in_torch(structure: dict, precision: str) -> None:
    params, gradients = problem(precision, seed=10)
    assert (gradients[0]["matrix"] == 0).any()
    assert_parity(params, gradients, eps=0, **structure)


# --- Half precision, where torch keeps the state in the precision of the parameters ----------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("structure", product(momentum=(0, 0.9), centered=(False, True)), ids=named)
def test_a_half_precision_step_is_torchs_float64_step_rounded_once(structure: dict, dtype: str) -> None:
    """Torch starts every step from our parameters, so that no rounding of theirs hides one of ours."""
    start, gradients = problem("float32", seed=8, shapes={"matrix": (3, 4), "vector": (5,), "scalar": ()})
    params, *gradients = ({name: jnp.asarray(x, dtype) for name, x in tree.items()} for tree in (start, *gradients))
    optimizer = rmsprop(lr=0.1, weight_decay=0.1, **structure)
    state = optimizer.init(params)
    leaves = {name: torch.zeros(p.shape, dtype=torch.float64, requires_grad=True) for name, p in start.items()}
    reference = torch.optim.RMSprop(list(leaves.values()), lr=0.1, weight_decay=0.1, **structure)
    ours, theirs = [], []
    for gradient in gradients:
        for name, p in leaves.items():
            p.data = torch.from_numpy(components(params[name]))
            p.grad = torch.from_numpy(components(gradient[name]))
        reference.step()
        updates, state = optimizer.update(gradient, state, params)
        for name, p in leaves.items():
            expected = p.detach().numpy() - components(params[name])
            # Half of the last place; and 1e-6, since the terms of the buffer are as large as 2, and float32.
            allowed = 0.51 * float(jnp.finfo(dtype).eps) * abs(expected) + 1e-6
            assert_close(components(updates[name]), expected, rtol=1.0, scale=allowed)
        params = optax.apply_updates(params, updates)
        ours.append({"params": params} | slots_of(state, params))
        state_of = {name: reference.state[p] for name, p in leaves.items()}
        slots = {slot: {name: s[slot].numpy().copy() for name, s in state_of.items()} for slot in state_of["scalar"]}
        theirs.append({"params": params} | slots)
    theirs = trajectory(theirs)
    sizes = sizes_so_far(theirs, start, weight_decay=0.1)
    assert_same(as_torch_keeps_it(trajectory(ours)), theirs, sizes, tolerance("float32"))


def after_5000_equal_gradients(optimizer: optax.GradientTransformation, gradient: jax.Array) -> tuple[Any, bool]:
    """The last state, and whether parameters and state were finite after every step."""

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(carry)]).all()

    params = jnp.ones_like(gradient)
    (_, state), finite = jax.jit(lambda carry: jax.lax.scan(step, carry, length=5000))((params, optimizer.init(params)))
    return state, bool(finite.all())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_average_arrives_where_torchs_stalls(dtype: str) -> None:
    state, _ = after_5000_equal_gradients(rmsprop(alpha=0.999), jnp.ones(3, dtype))
    # 2e-5: float32(0.999) is off by 1.3e-8, which is 1.3e-5 of 1 − 0.999.
    assert_close(state.square_avg, np.full(3, 1 - 0.999**5000), rtol=2e-5, dtype="float32")

    p = torch.ones(3, dtype=getattr(torch, dtype), requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = torch.optim.RMSprop([p], alpha=0.999)
    for _ in range(5000):
        optimizer.step()
    assert (optimizer.state[p]["square_avg"] < 0.75).all()


@pytest.mark.parametrize("structure", product(momentum=(0, 0.9), centered=(False, True)), ids=named)
def test_a_float16_parameter_survives_a_zero_gradient_where_torchs_turns_nan(structure: dict) -> None:
    optimizer = rmsprop(eps=1e-8, **structure)
    params = jnp.ones(3, jnp.float16)
    updates, state = optimizer.update(jnp.zeros_like(params), optimizer.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates), params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))

    p = torch.ones(3, dtype=torch.float16, requires_grad=True)
    p.grad = torch.zeros_like(p)
    torch.optim.RMSprop([p], eps=1e-8, **structure).step()
    assert p.isnan().all()


@pytest.mark.parametrize(("dtype", "eps"), [("float32", 1e-8), ("bfloat16", 1e-8), ("float16", 1e-2)])
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_centered_stays_finite_under_5000_equal_gradients(dtype: str, eps: float, momentum: float) -> None:
    optimizer = rmsprop(lr=1e-3, alpha=0.9, eps=eps, momentum=momentum, centered=True)
    _, finite = after_5000_equal_gradients(optimizer, jnp.array([3.0, -1.0, 0.1, 1e-3, 0.0], dtype))
    assert finite
