"""A job on ``optax.rmsprop`` moves here and back: the state, wherever it lies, continues as the same run."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compare import assert_close, assert_same
from rmsprop_jax import dialects
from rmsprop_jax.checkpoints import from_optax, to_optax
from rmsprop_jax.state import find_states
from rmsprop_jax.transform import rmsprop, scale_by_rmsprop
from rmsprop_jax.translation import translate

STEPS = 101  # in Optax, and then as many in both; MultiSteps is in the middle of a cycle then

PARAMS = {
    "dense": {"kernel": np.linspace(-1, 1, 6).reshape(2, 3), "bias": np.linspace(0.5, 2, 3)},
    "scale": np.float64(0.7),
}


def gradients(seed: int = 0) -> Any:
    """Of each step, along a new first axis; the first is not like the later ones, so that a lost state shows."""
    rng = np.random.default_rng(seed)
    sizes = np.where(np.arange(STEPS) < 15, 3.0, 0.3)

    def leaf(p: Any) -> np.ndarray:
        return (rng.standard_normal((STEPS, *np.shape(p))) + 0.4) * sizes.reshape(-1, *[1] * np.ndim(p))

    return jax.tree.map(leaf, PARAMS)


def falling(count: jax.Array) -> jax.Array:
    return 0.01 * 0.97**count


# One setting of everything that optax.rmsprop has; it is built with optax.rmsprop and with dialects.optax.
RULES: dict[str, dict[str, Any]] = {
    "plain": dict(learning_rate=0.01),
    "momentum": dict(learning_rate=0.01, momentum=0.9, eps=1e-3),
    "nesterov": dict(learning_rate=0.01, momentum=0.8, nesterov=True, eps_in_sqrt=False),
    "centered": dict(learning_rate=0.01, centered=True, decay=0.95, eps=1e-3),
    "bias_correction": dict(learning_rate=0.01, bias_correction=True, decay=0.95, momentum=0.5),
    "bias_correction centered": dict(
        learning_rate=falling, bias_correction=True, decay=0.9, centered=True, eps=1e-3, momentum=0.9
    ),
    "schedule": dict(learning_rate=falling, momentum=0.9),
    "initial_scale": dict(learning_rate=0.01, initial_scale=1.0, decay=0.99),
}
LABELS = {"dense": {"kernel": "matrix", "bias": "vector"}, "scale": "vector"}

# What may stand around it.
PLACES: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "chain": lambda f: optax.chain(optax.clip_by_global_norm(2.0), f(0.01, momentum=0.9)),
    "chain within a chain": lambda f: optax.chain(
        optax.chain(optax.clip(2.0), f(falling)), optax.add_decayed_weights(0.01)
    ),
    "inject_hyperparams": lambda f: optax.inject_hyperparams(f)(learning_rate=0.01, momentum=0.9),
    "injected schedule": lambda f: optax.inject_hyperparams(f)(learning_rate=falling, decay=0.95),
    "masked": lambda f: optax.masked(f(0.01, momentum=0.9), {"dense": {"kernel": True, "bias": False}, "scale": True}),
    "partition": lambda f: optax.partition(
        {"matrix": f(falling, momentum=0.9), "vector": f(0.02, centered=True, eps=1e-3)}, LABELS
    ),
    "MultiSteps": lambda f: optax.MultiSteps(f(falling, momentum=0.9), every_k_schedule=4),
    "apply_if_finite": lambda f: optax.apply_if_finite(f(0.01, momentum=0.9), max_consecutive_errors=3),
    "everything": lambda f: optax.MultiSteps(
        optax.apply_if_finite(
            optax.chain(optax.clip(3.0), optax.partition({"matrix": f(0.01), "vector": f(falling)}, LABELS)), 3
        ),
        every_k_schedule=2,
    ),
}
SETTINGS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    **{name: functools.partial(lambda rule, f: f(**rule), rule) for name, rule in RULES.items()},
    **PLACES,
}
COUNTS_NOTHING = {"plain", "momentum", "nesterov", "centered", "initial_scale", "chain", "masked", "apply_if_finite"}


def decay_of(setting: str) -> dict[str, float]:
    rule = RULES.get(setting, {})
    return {"decay": rule["decay"]} if rule.get("bias_correction") else {}


def arguments_of(setting: str) -> dict[str, Any]:
    return decay_of(setting) | ({"step": STEPS} if setting in COUNTS_NOTHING else {})


@functools.partial(jax.jit, static_argnames="tx")
def run(tx: Any, state: Any, params: Any, grads: Any) -> tuple[Any, Any, Any]:
    """Parameters and state after all ``grads``, and the parameters on the way."""

    def step(carry: tuple[Any, Any], g: Any) -> tuple[tuple[Any, Any], Any]:
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (params, state), on_the_way = jax.lax.scan(step, (params, state), grads)
    return params, state, on_the_way


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def job(setting: str, dtype: Any) -> tuple[Any, Any, Any, Any]:
    """Optax' transformation and ours, and the parameters and the state of a job that Optax has run so far."""
    theirs, ours = SETTINGS[setting](optax.rmsprop), SETTINGS[setting](dialects.optax)
    params = cast(PARAMS, dtype)
    params, state, _ = run(theirs, theirs.init(params), params, cast(gradients(), dtype))
    return theirs, ours, params, state


@pytest.mark.parametrize("setting", SETTINGS)
def test_job_continues_as_the_same_run_and_goes_back(setting: str, x64: None) -> None:
    theirs, ours, params, opt_state = job(setting, jnp.float64)
    state = from_optax(opt_state, like=ours.init(params), **arguments_of(setting))
    assert jax.tree.structure(state) == jax.tree.structure(ours.init(params))
    grads = cast(gradients(seed=1), jnp.float64)
    _, opt_state, stayed = run(theirs, opt_state, params, grads)
    _, state, moved = run(ours, state, params, grads)
    assert_close(moved, stayed, rtol=1e-10)
    assert_close(to_optax(state, like=theirs.init(params), **decay_of(setting)), opt_state, rtol=1e-9, scale="array")


@pytest.mark.parametrize("setting", ["momentum", "centered", "partition"])
def test_job_in_float32_continues_within_its_rounding(setting: str) -> None:
    theirs, ours, params, opt_state = job(setting, jnp.float32)
    state = from_optax(opt_state, like=ours.init(params), **arguments_of(setting))
    grads = cast(gradients(seed=1), jnp.float32)
    _, _, stayed = run(theirs, opt_state, params, grads)
    _, _, moved = run(ours, state, params, grads)
    assert_close(moved, stayed, ulps=STEPS, scale="array")  # a parameter rounds at every step


def test_everything_counts_the_step() -> None:
    _, ours, params, opt_state = job("everything", jnp.float32)
    state = from_optax(opt_state, like=ours.init(params))
    assert [int(part.step) for part in find_states("state", state).values()] == [STEPS // 2, STEPS // 2]
    assert (int(state.mini_step), int(state.gradient_step)) == (STEPS % 2, STEPS // 2)


def test_updates_of_multi_steps_are_its_gradient_steps_and_others_count_something_else() -> None:
    params = {"w": jnp.ones(2)}
    both = [
        optax.chain(optax.MultiSteps(f(0.1), every_k_schedule=2).gradient_transformation(), plateau)
        for f, plateau in (
            (optax.rmsprop, optax.contrib.reduce_on_plateau()),
            (dialects.optax, optax.contrib.reduce_on_plateau()),
        )
    ]
    opt_state = both[0].init(params)
    for _ in range(5):
        _, opt_state = both[0].update(params, opt_state, params, value=1.0)
    state = from_optax(opt_state, like=both[1].init(params))
    assert [int(part.step) for part in find_states("state", state).values()] == [2]


def test_chain_of_your_own_in_torchs_order_becomes_rmsprop(x64: None) -> None:
    theirs = optax.chain(
        optax.clip(2.0), optax.scale_by_rms(0.95, eps=1e-3, eps_in_sqrt=False), optax.trace(0.9), optax.scale(-0.01)
    )
    ours = optax.chain(optax.clip(2.0), rmsprop(0.01, alpha=0.95, eps=1e-3, momentum=0.9))
    params = cast(PARAMS, jnp.float64)
    params, opt_state, _ = run(theirs, theirs.init(params), params, cast(gradients(), jnp.float64))
    state = from_optax(opt_state, like=ours.init(params), step=STEPS)
    grads = cast(gradients(seed=1), jnp.float64)
    _, opt_state, stayed = run(theirs, opt_state, params, grads)
    _, state, moved = run(ours, state, params, grads)
    assert_close(moved, stayed, rtol=1e-10)
    assert_close(to_optax(state, like=theirs.init(params)), opt_state, rtol=1e-9, scale="array")


def test_scaling_alone_becomes_scale_by_rmsprop() -> None:
    params = cast(PARAMS, jnp.float32)
    theirs, ours = optax.scale_by_rms(0.9), scale_by_rmsprop(0.9, eps_in_sqrt=True)
    _, opt_state = theirs.update(params, theirs.init(params))
    state = from_optax(opt_state, like=ours.init(params), step=1)
    assert_same(state.square_avg, opt_state.nu)
    assert_same(to_optax(state, like=theirs.init(params)), opt_state)


def test_trace_becomes_torchs_buffer_at_the_present_rate_of_the_schedule(x64: None) -> None:
    """The update of torch's rule is the one that Optax would make, with the rate as it is now."""
    _, ours, params, opt_state = job("schedule", jnp.float64)
    state = from_optax(opt_state, like=ours.init(params))
    rate = float(falling(jnp.asarray(STEPS)))  # of the next update, not of those whose steps are in the trace
    port = translate("optax", "torch", learning_rate=rate, momentum=0.9, eps=1e-30)
    gradient = jax.tree.map(lambda g: jnp.asarray(g[0]), gradients(seed=1))
    at_once = rmsprop(**port.arguments | {"lr": falling})
    moved, _ = at_once.update(gradient, port.convert_state(state), params)
    stayed, _ = optax.rmsprop(falling, momentum=0.9, eps=1e-30).update(gradient, opt_state, params)
    assert_close(moved, stayed, rtol=1e-10)


def test_bfloat16_comes_to_rest_in_float32_and_goes_back_bit_for_bit() -> None:
    theirs, ours, params, opt_state = job("momentum", jnp.bfloat16)
    state = from_optax(opt_state, like=ours.init(params), step=STEPS)
    assert {x.dtype for x in jax.tree.leaves(state[1:])} == {jnp.dtype(jnp.float32)}
    assert_same(jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.square_avg), opt_state[0].nu)
    assert_same(to_optax(state, like=theirs.init(params)), opt_state)


def test_stack_of_states_is_carried_over_at_once() -> None:
    params = {"w": jnp.arange(6.0).reshape(3, 2)}
    tx, ours = optax.rmsprop(falling, momentum=0.9), dialects.optax(falling, momentum=0.9)
    _, opt_state = jax.vmap(tx.update)(params, jax.vmap(tx.init)(params))
    state = from_optax(opt_state, like=jax.vmap(ours.init)(params))
    assert state.step.tolist() == [1, 1, 1]
    assert_same(state.square_avg, opt_state[0].nu)


def test_arrays_stay_on_their_devices_and_shapes_are_enough_for_like() -> None:
    device = jax.devices()[0]
    params = jax.device_put(cast(PARAMS, jnp.float32), device)
    tx = optax.rmsprop(0.01)
    opt_state = jax.tree.map(lambda x: jax.device_put(x, device), tx.init(params))
    state = from_optax(opt_state, like=jax.eval_shape(dialects.optax(0.01).init, params), step=0)
    assert all(x.committed for x in jax.tree.leaves(state.square_avg))


# --- Checkpoints -----------------------------------------------------------------------------------------------


def test_checkpoint_of_msgpack_is_read_without_its_target() -> None:
    serialization = pytest.importorskip("flax.serialization")
    for setting in ("everything", "bias_correction", "masked", "injected schedule"):
        _, ours, params, opt_state = job(setting, jnp.float32)
        restored = serialization.msgpack_restore(serialization.to_bytes(opt_state))
        want = from_optax(opt_state, like=ours.init(params), **arguments_of(setting))
        assert_same(from_optax(restored, like=ours.init(params), **arguments_of(setting)), want)


def test_checkpoint_of_orbax_is_read_without_its_target(tmp_path: Any) -> None:
    checkpoint = pytest.importorskip("orbax.checkpoint")
    _, ours, params, opt_state = job("partition", jnp.float32)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", opt_state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state")
    assert_same(from_optax(restored, like=ours.init(params)), from_optax(opt_state, like=ours.init(params)))


def test_state_of_a_flax_optimizer_moves_in_place() -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    x = jnp.linspace(-1, 1, 12).reshape(4, 3)

    def gradient(model: Any) -> Any:
        return nnx.grad(lambda model: (model(x) ** 2).mean())(model)

    before = nnx.Optimizer(model, optax.rmsprop(falling, momentum=0.9), wrt=nnx.Param)
    for _ in range(3):
        before.update(model, gradient(model))
    twin = nnx.clone(model)
    after = nnx.Optimizer(twin, dialects.optax(falling, momentum=0.9), wrt=nnx.Param)
    after.opt_state = from_optax(before.opt_state, like=after.opt_state)
    before.update(model, gradient(model))
    after.update(twin, gradient(twin))
    assert_close(nnx.to_pure_dict(nnx.state(twin)), nnx.to_pure_dict(nnx.state(model)), ulps=4, scale="array")


# --- What is refused -------------------------------------------------------------------------------------------


def replaced(state: Any, **fields: Any) -> Any:
    """The state of an optax.rmsprop with a field of one of its parts replaced."""
    return tuple(
        part._replace(**{k: v for k, v in fields.items() if k in part._fields}) if part._fields else part
        for part in state
    )


PLAIN = {"w": jnp.ones(2)}
STATE = optax.rmsprop(falling, momentum=0.9, centered=True).init(PLAIN)
LIKE = dialects.optax(falling, momentum=0.9, centered=True).init(PLAIN)
CORRECTED = optax.rmsprop(0.1, bias_correction=True).init(PLAIN)
UNCOUNTED = optax.rmsprop(0.1).init(PLAIN)

REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no step": (
        lambda: from_optax(UNCOUNTED, dialects.optax(0.1).init(PLAIN)),
        ValueError,
        "step must be given, since opt_state counts no updates",
    ),
    "several steps": (
        lambda: from_optax(
            (UNCOUNTED, replaced(STATE, count=jnp.asarray(3)), replaced(STATE, count=jnp.asarray(4))),
            (dialects.optax(0.1).init(PLAIN), LIKE, LIKE),
        ),
        ValueError,
        "step must be given, since opt_state counts [3, 4]",
    ),
    "another step": (lambda: from_optax(STATE, LIKE, step=7), ValueError, "step is 7, but opt_state counts 0"),
    "a step that is no number": (
        lambda: from_optax(STATE, LIKE, step=True),
        TypeError,
        "step must be an integer, got True",
    ),
    "a negative count": (
        lambda: from_optax(replaced(STATE, count=jnp.asarray(-1)), LIKE),
        ValueError,
        "opt_state.count must be a number of updates from 0 to 2³¹ − 2, got -1",
    ),
    "a count that is a float": (
        lambda: from_optax(replaced(STATE, count=jnp.asarray(1.0)), LIKE),
        TypeError,
        "opt_state.count must be an integer scalar, got float32 ()",
    ),
    "no decay": (
        lambda: from_optax(CORRECTED, dialects.optax(0.1, bias_correction=True).init(PLAIN)),
        ValueError,
        "decay must be given, since opt_state is bias-corrected",
    ),
    "a decay above 1": (lambda: from_optax(STATE, LIKE, decay=99), ValueError, "decay must be a number in [0, 1)"),
    "a decay that is a schedule": (
        lambda: from_optax(STATE, LIKE, decay=falling),
        TypeError,
        "decay must be the smooth",
    ),
    "a start that the correction inflates": (
        lambda: from_optax(
            optax.rmsprop(0.1, bias_correction=True, initial_scale=1.0).init(PLAIN),
            dialects.optax(0.1, bias_correction=True).init(PLAIN),
            decay=0.9,
        ),
        ValueError,
        "nu of 'opt_state, w' must be 0 at step 0",
    ),
    "a trace that nobody keeps": (
        lambda: from_optax(STATE, dialects.optax(falling, centered=True).init(PLAIN)),
        ValueError,
        "opt_state has a trace in Optax, but no momentum_buffer here; build both optimizers with momentum, or neither",
    ),
    "no mean": (
        lambda: from_optax(optax.rmsprop(falling, momentum=0.9).init(PLAIN), LIKE),
        ValueError,
        "opt_state has no mu in Optax, but a grad_avg here",
    ),
    "Adam": (lambda: from_optax(optax.adam(0.1).init(PLAIN), LIKE), ValueError, "must be the state of optax.rmsprop"),
    "Adam for a centered RMSProp": (
        lambda: from_optax(
            optax.adam(0.1).init(PLAIN), dialects.optax(0.1, centered=True, bias_correction=True).init(PLAIN), decay=0.9
        ),
        ValueError,
        "a mu, a trace and a count, but it has ['EmptyState', 'ScaleByAdamState']",
    ),
    "SGD": (
        lambda: from_optax(optax.sgd(0.1, 0.9).init(PLAIN), LIKE),
        ValueError,
        "must be the state of optax.rmsprop",
    ),
    "another optimizer around it": (
        lambda: from_optax((STATE, optax.EmptyState()), {"a": LIKE}),
        ValueError,
        "the state has '0' at opt_state, but like does not",
    ),
    "nothing to fill": (lambda: from_optax(STATE, STATE), ValueError, "like must contain an RMSPropState"),
    "another model": (
        lambda: from_optax(STATE, dialects.optax(0.1, momentum=0.9, centered=True).init({"v": jnp.ones(2)})),
        ValueError,
        "the state has 'w' at opt_state.square_avg, but like does not",
    ),
    "another shape": (
        lambda: from_optax(STATE, dialects.optax(0.1, momentum=0.9, centered=True).init({"w": jnp.ones(3)})),
        ValueError,
        "opt_state.square_avg[w] is float32 (2,), but in like it is float32 (3,)",
    ),
    "integers": (
        lambda: from_optax(replaced(STATE, nu={"w": jnp.arange(2)}), LIKE),
        TypeError,
        "opt_state.square_avg[w] must be a floating or complex array, got int32",
    ),
    "NaN": (
        lambda: from_optax(replaced(STATE, trace={"w": jnp.array([0.0, jnp.nan])}), LIKE),
        ValueError,
        "'momentum_buffer' of 'opt_state, w' has 1 NaN among its 2 numbers",
    ),
    "a negative average": (
        lambda: from_optax(replaced(STATE, nu={"w": jnp.array([0.0, -1.0])}), LIKE),
        ValueError,
        "'square_avg' of 'opt_state, w' is negative somewhere",
    ),
    "slots that are swapped": (
        lambda: from_optax(replaced(STATE, nu={"w": jnp.full(2, 0.1)}, mu={"w": jnp.full(2, 10.0)}), LIKE),
        ValueError,
        "'square_avg' of 'opt_state, w' is 0.1 where its 'grad_avg' is 10",
    ),
    "an injected rate that is infinite": (
        lambda: from_optax(
            optax.tree.set(
                optax.inject_hyperparams(optax.rmsprop)(0.1).init(PLAIN), learning_rate=jnp.asarray(jnp.inf)
            ),
            optax.inject_hyperparams(dialects.optax)(0.1).init(PLAIN),
        ),
        ValueError,
        "opt_state[hyperparams][learning_rate] is inf, but in like it is 0.1",
    ),
    "counts that differ": (
        lambda: from_optax(
            (CORRECTED[0]._replace(count=jnp.asarray(3)), optax.ScaleByScheduleState(jnp.asarray(4)), CORRECTED[2]),
            dialects.optax(0.1, bias_correction=True).init(PLAIN),
            decay=0.9,
        ),
        ValueError,
        "opt_state counts 3 and 4 updates",
    ),
    "a stack of corrected states": (
        lambda: from_optax(
            jax.vmap(optax.rmsprop(0.1, bias_correction=True).init)(PLAIN),
            jax.vmap(dialects.optax(0.1, bias_correction=True).init)(PLAIN),
            decay=0.9,
        ),
        ValueError,
        "opt_state is a stack of bias-corrected states of shape (2,)",
    ),
    "complex parameters": (
        lambda: from_optax(
            optax.rmsprop(0.1).init({"w": jnp.ones(2, jnp.complex64)}),
            dialects.optax(0.1).init({"w": jnp.ones(2, jnp.complex64)}),
            step=0,
        ),
        ValueError,
        "opt_state.square_avg[w] is of a complex parameter",
    ),
    "a decay that nothing needs": (
        lambda: from_optax(STATE, LIKE, decay=0.9),
        ValueError,
        "decay is 0.9, but no RMSProp",
    ),
    "out: steps that are not those of the slots": (
        lambda: to_optax(
            dialects.optax(0.1).init(PLAIN)._replace(step=jnp.zeros(3, jnp.int32)), optax.rmsprop(0.1).init(PLAIN)
        ),
        ValueError,
        "state counts steps of shape (3,), which is not how its slots are stacked",
    ),
    "injected numbers in another precision": (
        lambda: from_optax(
            optax.inject_hyperparams(optax.rmsprop, hyperparam_dtype=jnp.bfloat16)(0.1).init(PLAIN),
            optax.inject_hyperparams(dialects.optax)(0.1).init(PLAIN),
        ),
        ValueError,
        "is bfloat16 (), but in like it is float32 (); build both alike, or cast it",
    ),
    "out: no state": (lambda: to_optax(STATE, STATE), ValueError, "state must contain an RMSPropState"),
    "out: a buffer that nobody keeps": (
        lambda: to_optax(LIKE, optax.rmsprop(falling, centered=True).init(PLAIN)),
        ValueError,
        "state has no trace in Optax, but a momentum_buffer here",
    ),
    "out: a checkpoint for a state": (
        lambda: to_optax(dialects.optax(0.1).init(PLAIN), ({"nu": PLAIN}, {}, {})),
        TypeError,
        "like must be what init of an Optax optimizer returns",
    ),
    "out: too large for half precision": (
        lambda: to_optax(
            dialects.optax(0.1).init(PLAIN)._replace(square_avg={"w": jnp.full(2, 1e6)}),
            optax.rmsprop(0.1).init({"w": jnp.ones(2, jnp.float16)}),
        ),
        ValueError,
        "like has float16 for a slot whose largest number is 1e+06",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)) as raised:
        call()
    assert "\n" not in str(raised.value)
