"""Optimizers of Keras 3: read from files that Keras wrote, continued as Keras continued, written back, and refused."""

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compare import assert_close, assert_same
from recorded import DTYPES, Run, continued, golden, run_of
from rmsprop_jax.checkpoints import from_keras, to_keras
from rmsprop_jax.checkpoints.keras_pieces import AveragesState, average_parameters
from rmsprop_jax.checkpoints.keras_schedules import schedule_of

CASES = list(golden("keras")[1]["cases"])
ACCUMULATING = [case for case in CASES if case.startswith(("accumulation", "everything"))]
HIDDEN, BIAS, OUTPUT, OUTPUT_BIAS = NAMES = golden("keras")[1]["names"]


def to_params(named: Mapping[str, Any]) -> dict[str, Any]:
    return {"hidden": {"kernel": named[HIDDEN].T, "bias": named[BIAS]}, "output": [named[OUTPUT].T, named[OUTPUT_BIAS]]}


def from_params(params: Any) -> dict[str, Any]:
    (kernel, bias), hidden = params["output"], params["hidden"]
    return {HIDDEN: hidden["kernel"].T, BIAS: hidden["bias"], OUTPUT: kernel.T, OUTPUT_BIAS: bias}


def keras_run(case: str, dtype: str = "float32") -> Run:
    return run_of("keras", case, dtype)


def read(run: Run, dtype: str = "float32", **changed: Any) -> tuple[Any, Any]:
    """What ``from_keras`` makes of a recorded run."""
    arguments = {
        "config": run.about["config"][dtype],
        "variables": run.file,
        "names": run.names,
        "to_params": to_params,
        "exclude_from_weight_decay": run.about["arguments"].get("excluded", []),
    }
    return from_keras(**arguments | changed)


def by_path(run: Run, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The variables of a file, under the paths that they have in memory."""
    return {path: arrays[str(i)] for i, path in enumerate(run.about["paths"])}


# --- Continued -------------------------------------------------------------------------------------------------


def check_continues(case: str, dtype: str, tolerance: Mapping[str, float]) -> None:
    """100 steps end where Keras ended: the parameters on the way, and every variable of the optimizer."""
    run = keras_run(case, dtype)
    tx, state = read(run, dtype)
    after, last = continued(run, tx, state, to_params, jit=case in ACCUMULATING)
    want = [to_params(params) for params in run.params]
    largest = jax.tree.map(lambda *steps: np.max(np.abs(steps), axis=0), *want)
    for got, expected in zip(after, want, strict=True):
        assert_close(got, expected, scale=largest, **tolerance)
    back = to_keras(last, NAMES, from_params, config=run.about["config"][dtype])
    expected = by_path(run, run.last)
    assert back["rmsprop/iteration"] == expected.pop("rmsprop/iteration")
    expected.pop("rmsprop/learning_rate", None)
    assert_close({path: back[path] for path in expected}, expected, scale="array", **tolerance)


@pytest.mark.parametrize("case", ["momentum", "centered_momentum", "weight_decay", "everything"])
def test_run_continues_as_in_keras_in_float32(case: str) -> None:
    """Each step rounds the parameter and the slots once in each library; 14 ulps were measured after 100 steps."""
    check_continues(case, "float32", {"ulps": 100})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("x64")
def test_run_continues_as_in_keras_in_float64(case: str) -> None:
    check_continues(case, "float64", {"rtol": 1e-12})


def test_recordings_depend_on_every_setting() -> None:
    """So that a setting that is not honored is seen."""
    last = {case: np.concatenate([p.ravel() for p in keras_run(case).params[-1].values()]) for case in CASES}
    alike = {("ema", "momentum")}  # an average that takes no parameter's place
    for i, first in enumerate(CASES):
        for second in CASES[:i]:
            assert (np.abs(last[first] - last[second]).max() > 1e-3) != ((first, second) in alike), (first, second)


# --- In, and out again -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_file_comes_back(case: str) -> None:
    run = keras_run(case)
    _, state = read(run)
    back = to_keras(state, NAMES, from_params, config=run.about["config"]["float32"])
    assert list(back) == run.about["paths"]
    for path, want in by_path(run, run.file).items():
        rounded = path.endswith(("velocity", "accumulator"))  # the centered one; a mean, and then a sum
        assert_close(back[path].astype(want.dtype), want, ulps=2 if rounded else 0)


def test_variables_by_path_are_those_by_number() -> None:
    run = keras_run("everything")
    _, state = read(run)
    _, other = read(run, variables=dict(reversed(by_path(run, run.file).items())))
    assert_same(other, state)


def test_config_of_an_optimizer_is_that_in_a_file() -> None:
    run = keras_run("everything")
    config = run.about["config"]["float32"]
    assert config["class_name"] == "RMSprop"
    _, state = read(run)
    _, other = read(run, config=config["config"])
    assert_same(other, state)


@pytest.mark.parametrize("case", ["plain", "centered_momentum", "everything"])
def test_state_is_what_init_makes(case: str) -> None:
    run = keras_run(case)
    tx, state = read(run)
    fresh = tx.init(jax.tree.map(jnp.asarray, to_params(run.params[0])))
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, fresh)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy whose memory JAX could take over as it is."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copied = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copied[...] = array
    return copied


def test_state_shares_no_memory_with_the_variables() -> None:
    run = keras_run("everything")
    variables = {key: aligned(array) for key, array in run.file.items()}
    _, state = read(run, variables=variables)
    before = copy.deepcopy(jax.tree.map(np.asarray, state))
    for array in variables.values():
        array[...] = 77
    assert_same(state, before)


def test_tree_may_hold_flags_and_functions() -> None:
    run = keras_run("ema_overwrite")
    tx, state = read(run, to_params=lambda named: {**to_params(named), "flag": True, "function": abs})
    _, plain = read(run)
    assert state[0].square_avg["flag"] is None
    for path in ("hidden", "output"):
        assert_same(state[1].average[path], plain[1].average[path])
    params = {**jax.tree.map(jnp.asarray, to_params(run.params[0])), "flag": None, "function": None}
    updates, _ = tx.update(params, state, params)
    assert updates["flag"] is None


def test_bfloat16_of_a_file_is_read() -> None:
    """HDF5 has no such type: h5py reads what Keras wrote as two bytes without one."""
    run = keras_run("plain")
    velocity = jnp.asarray(run.file["2"], jnp.bfloat16)
    variables = {**run.file, "2": np.asarray(velocity).view("V2")}
    _, state = read(run, variables=variables)
    assert_same(state.square_avg["hidden"]["kernel"], velocity.astype(jnp.float32).T)


def test_average_starts_from_the_parameters_of_the_first_update() -> None:
    tx = average_parameters(0.9, None, steps=2)
    state = tx.init(jnp.zeros(1))
    for value in (1.0, 2.0):  # two gradients, no update yet
        _, state = tx.update(jnp.zeros(1), state, jnp.full(1, value))
        assert state.average == value
    _, state = tx.update(jnp.ones(1), state, jnp.full(1, 2.0))
    assert_close(state.average, jnp.full(1, 0.9 * 2 + 0.1 * 3), ulps=2)
    with pytest.raises(ValueError, match="params must be given"):
        tx.update(jnp.zeros(1), state)


# --- The learning rate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden("keras")[1]["schedules"])
def test_schedule_is_that_of_keras(name: str) -> None:
    """In float32, the sum of 1 and a cosine near −1 has the rounding of 1, so errors are relative to the largest."""
    check_schedule(name, "float32", {"ulps": 8})


@pytest.mark.parametrize("name", golden("keras")[1]["schedules"])
@pytest.mark.usefixtures("x64")
def test_schedule_is_that_of_keras_in_float64(name: str) -> None:
    check_schedule(name, "float64", {"rtol": 1e-12})


def check_schedule(name: str, dtype: str, tolerance: Mapping[str, float]) -> None:
    arrays, metadata = golden("keras")
    schedule = schedule_of(metadata["schedules"][name][dtype])
    steps = jnp.asarray(metadata["schedule_steps"], jnp.int32)
    assert_close(jax.vmap(schedule)(steps), arrays[f"{dtype}/schedules/{name}"], scale="array", **tolerance)


def serialized(kind: str, **arguments: Any) -> dict[str, Any]:
    return {"module": "keras.optimizers.schedules", "class_name": kind, "config": arguments, "registered_name": None}


def test_restart_comes_at_the_very_step() -> None:
    """Where Keras is one step late: after 15 doublings."""
    schedule = schedule_of(
        serialized("CosineDecayRestarts", initial_learning_rate=1.0, first_decay_steps=1, alpha=0.25)
    )
    assert schedule(32_767) == 1
    assert schedule(32_766) < 0.2500001


RESTARTS = dict(initial_learning_rate=0.1, first_decay_steps=5)
STAIRS = dict(initial_learning_rate=0.1, decay_steps=5, decay_rate=0.5)
REFUSED_SCHEDULES: dict[str, tuple[Any, str]] = {
    "a custom one": (serialized("Noam", d_model=3), "learning_rate of config is .*Noam.*not here; give the schedule"),
    "a function": ({"class_name": "__lambda__", "config": {"value": "4wA"}}, "__lambda__.*learning_rate="),
    "no config": ({"class_name": "CosineDecay"}, "not here"),
    "unhashable": ({"class_name": [], "config": {}}, "not here"),
    "missing": (serialized("ExponentialDecay", decay_rate=0.5), "ExponentialDecay in config has no 'initial_learning"),
    "unknown": (serialized("ExponentialDecay", **STAIRS, speed=1), "ExponentialDecay in config has 'speed'"),
    "broken steps": (serialized("ExponentialDecay", **STAIRS | {"decay_steps": 2.5}), "decay_steps of Exp.*got 2.5"),
    "no steps": (serialized("InverseTimeDecay", **STAIRS | {"decay_steps": 0}), "whole number from 1 .*got 0"),
    "infinite": (
        serialized("CosineDecay", initial_learning_rate=np.inf, decay_steps=3),
        "must be a finite number, got inf",
    ),
    "negative": (serialized("CosineDecay", initial_learning_rate=-0.1, decay_steps=3), "number ≥ 0, got -0.1"),
    "broken growth": (serialized("CosineDecayRestarts", **RESTARTS, t_mul=1.5), "t_mul of .*whole number ≥ 1, got 1.5"),
    "shrinking": (serialized("CosineDecayRestarts", **RESTARTS, t_mul=0.0), "t_mul of .*got 0"),
    "falling": (
        serialized("PiecewiseConstantDecay", boundaries=[5, 3], values=[1.0, 0.5, 0.1]),
        "must be at least one",
    ),
    "few values": (serialized("PiecewiseConstantDecay", boundaries=[5], values=[1.0]), "one more of values"),
    "no boundary": (serialized("PiecewiseConstantDecay", boundaries=[], values=[1.0]), "at least one and rise"),
    "broken boundary": (serialized("PiecewiseConstantDecay", boundaries=[1.5], values=[1.0, 0.1]), "boundaries .* 1.5"),
}


@pytest.mark.parametrize("refused", REFUSED_SCHEDULES)
def test_schedule_that_is_not_keras_is_refused(refused: str) -> None:
    schedule, message = REFUSED_SCHEDULES[refused]
    run = keras_run("cosine_warmup")
    config = {**run.about["config"]["float32"]["config"], "learning_rate": schedule}
    with pytest.raises(ValueError, match=message):
        read(run, config=config)
    tx, _ = read(run, config=config, learning_rate=0.1)  # which says what to do instead
    assert tx is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(boundaries=3, values=[1.0]), "boundaries of PiecewiseConstantDecay in config must be a list, got 3"),
        (dict(boundaries=[3], values="abc"), "values of .* must be a list"),
        (dict(boundaries=[3], values=["a", 1.0]), "values of .* must be a number"),
    ],
)
def test_argument_of_a_schedule_has_its_type(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        schedule_of(serialized("PiecewiseConstantDecay", **arguments))


@pytest.mark.parametrize("case", ["momentum", "cosine_warmup"])
def test_learning_rate_replaces_that_of_the_config(case: str) -> None:
    run = keras_run(case)
    gradient = jax.tree.map(jnp.ones_like, to_params(run.params[0]))
    seen = []
    tx, state = read(run, learning_rate=lambda step: seen.append(int(step)) or 0.5)
    slow, same_state = read(run, learning_rate=0.25)
    assert_same(state, same_state)

    def steps_of(tx: Any) -> Any:
        """The buffer after an update, without what was in it before: the learning rate times a step."""
        _, after = tx.update(gradient, state)
        return jax.tree.map(lambda new, old: new - 0.9 * old, after.momentum_buffer, state.momentum_buffer)

    assert_close(steps_of(tx), jax.tree.map(lambda step: 2 * step, steps_of(slow)), rtol=1e-5)
    assert seen == [30]


def test_learning_rate_that_moved_on_is_not_believed() -> None:
    run = keras_run("momentum")
    variables = {**run.file, "1": np.float32(0.005)}
    with pytest.raises(
        ValueError, match=re.escape("1 ('rmsprop/learning_rate') is 0.005, but learning_rate of config")
    ):
        read(run, variables=variables)
    tx, _ = read(run, variables=variables, learning_rate=0.005)
    assert tx is not None
    with pytest.raises(ValueError, match=r"but learning_rate of config is 1e\+300"):  # too large for float32
        read(run, config=run.about["config"]["float32"]["config"] | {"learning_rate": 1e300})


# --- Refused ---------------------------------------------------------------------------------------------------

REFUSED_CONFIGS: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "unknown": (ValueError, {"jit_compile": True}, "config has 'jit_compile', which RMSprop of Keras 3 does not have"),
    "Adam's": (ValueError, {"beta_1": 0.9}, "config has 'beta_1'"),
    "two clippings": (ValueError, {"clipnorm": 1.0, "clipvalue": 1.0}, "both clipnorm and clipvalue"),
    "negative clipping": (ValueError, {"clipnorm": -1.0}, "clipnorm of config must be a number ≥ 0, got -1"),
    "infinite clipping": (ValueError, {"clipvalue": np.inf}, "clipvalue of config must be a finite number"),
    "no loss scale": (ValueError, {"loss_scale_factor": 0.0}, "loss_scale_factor of config must be > 0"),
    "broken accumulation": (TypeError, {"gradient_accumulation_steps": 2.5}, "gradient_accumulation_steps of config"),
    "average of 2": (ValueError, {"use_ema": True, "ema_momentum": 2.0}, "ema_momentum of config must be from 0 to 1"),
    "no flag": (TypeError, {"centered": "False"}, "centered of config must be True or False"),
    "rho of 1": (ValueError, {"rho": 1.0}, "rho of config"),
    "no number": (TypeError, {"momentum": "0.9"}, "momentum of config must be a number"),
    "no name": (TypeError, {"name": None}, "name of config must be a string"),
    "weight decay": (ValueError, {"weight_decay": 0.1}, "weight_decay=0.1, but does not say which variables"),
    "another name": (ValueError, {"name": "adam"}, "missing: 'adam/iteration'"),
    "average": (ValueError, {"use_ema": True}, "missing: 'rmsprop/sequential_hidden_kernel_average'"),
    "centered": (ValueError, {"centered": True}, "missing: 'rmsprop/sequential_hidden_kernel_average_gradient'"),
    "no momentum": (ValueError, {"momentum": 0.0}, "not expected: 'rmsprop/sequential_hidden_kernel_momentum'"),
}


@pytest.mark.parametrize("refused", REFUSED_CONFIGS)
def test_config_that_is_wrong_is_refused_by_name(refused: str) -> None:
    kind, change, message = REFUSED_CONFIGS[refused]
    run = keras_run("momentum")
    config = run.about["config"]["float32"]["config"] | change
    with pytest.raises(kind, match=message):
        read(run, config=config, variables=by_path(run, run.file), exclude_from_weight_decay=None)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (TypeError, None, "config must be a dict, got NoneType"),
        (ValueError, {"class_name": "Adam", "config": {}}, "config must be that of RMSprop, got 'Adam'"),
        (ValueError, {"class_name": "RMSprop"}, "config must be that of RMSprop"),
        (ValueError, {"inner_optimizer": {}, "initial_scale": 2.0}, "LossScaleOptimizer; give config"),
        (ValueError, {"class_name": "LossScaleOptimizer", "config": {}}, "LossScaleOptimizer; give config"),
        (ValueError, {"name": "rmsprop"}, "config has no 'learning_rate'"),
    ],
)
def test_config_of_something_else_is_refused(kind: type[Exception], config: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        read(keras_run("momentum"), config=config)


def test_optimizer_in_place_of_its_config_is_told_what_to_do() -> None:
    class Optimizer:
        get_config = dict

    with pytest.raises(TypeError, match="call its get_config"):
        read(keras_run("momentum"), config=Optimizer())


def change(key: str, function: Callable[[np.ndarray], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Changes one variable of a dict by path."""
    return lambda variables: {**variables, f"rmsprop/{key}": function(variables[f"rmsprop/{key}"])}


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda variables: {path: x for path, x in variables.items() if path != f"rmsprop/{key}"}


def swapped(first: str, second: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    first, second = (f"rmsprop/sequential_hidden_kernel_{role}" for role in (first, second))
    return lambda variables: {**variables, first: variables[second], second: variables[first]}


def altered(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """With one number replaced."""

    def alter(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[-1] = value
        return array

    return alter


KERNEL = "sequential_hidden_kernel"
REFUSED_VARIABLES: dict[str, tuple[type[Exception], Callable[[dict[str, Any]], Any], str]] = {
    "no dict": (TypeError, lambda v: list(v), "variables must be a dict from paths to arrays, got list"),
    "empty": (ValueError, lambda v: {}, "missing: 'rmsprop/iteration'"),
    "missing": (ValueError, without(f"{KERNEL}_momentum"), f"missing: 'rmsprop/{KERNEL}_momentum'"),
    "additional": (ValueError, lambda v: v | {"rmsprop/x": np.zeros(1)}, "not expected: 'rmsprop/x'"),
    "no array": (TypeError, change(f"{KERNEL}_velocity", lambda x: x.tolist()), f"{KERNEL}_velocity' must be an array"),
    "a mask": (TypeError, change(f"{KERNEL}_velocity", np.ma.MaskedArray), "must be an array without a mask"),
    "integers": (TypeError, change(f"{KERNEL}_velocity", lambda x: x.astype(int)), "must be a floating"),
    "complex": (
        TypeError,
        change(f"{KERNEL}_velocity", lambda x: x + 0j),
        "must be a real floating array, got complex",
    ),
    "NaN": (ValueError, change(f"{KERNEL}_momentum", altered(np.nan)), f"{KERNEL}_momentum' has 1 NaN"),
    "infinite": (ValueError, change(f"{KERNEL}_momentum", altered(np.inf)), f"{KERNEL}_momentum' is infinite"),
    "negative": (ValueError, change(f"{KERNEL}_velocity", altered(-1.0)), f"{KERNEL}_velocity' is negative"),
    "another shape": (ValueError, change(f"{KERNEL}_momentum", np.transpose), r"_momentum' has shape \(2, 3\), but"),
    "an average's": (ValueError, change(f"{KERNEL}_average", np.transpose), r"_average' has shape \(2, 3\), but"),
    "a sum's": (ValueError, change(f"{KERNEL}_gradient_accumulator", altered(np.nan)), "_accumulator' has 1 NaN"),
    "swapped": (ValueError, swapped("velocity", "average_gradient"), "swapped|negative"),
    "a broken count": (TypeError, change("iteration", lambda x: np.float32(x)), "iteration' must be an integer scalar"),
    "counts": (
        TypeError,
        change("iteration", lambda x: np.array([x])),
        r"iteration' must be an integer scalar, got int",
    ),
    "a large count": (
        ValueError,
        change("iteration", lambda x: np.int64(2**31)),
        "iteration' must be a number of updates",
    ),
    "a negative count": (ValueError, change("iteration", lambda x: np.int64(-1)), "from 0 to 2³¹ − 2, got -1"),
    "another moment": (ValueError, change("iteration", lambda x: np.int64(32)), "_accumulator' is not 0, although"),
}


@pytest.mark.parametrize("refused", REFUSED_VARIABLES)
def test_variables_that_are_wrong_are_refused_by_path(refused: str) -> None:
    kind, changed, message = REFUSED_VARIABLES[refused]
    run = keras_run("everything")
    with pytest.raises(kind, match=message):
        read(run, variables=changed(by_path(run, run.file)))


def test_learning_rate_of_a_file_is_one_number() -> None:
    run = keras_run("momentum")
    with pytest.raises(TypeError, match=r"learning_rate'.* must be a floating scalar, got float32"):
        read(run, variables={**run.file, "1": np.ones(2, np.float32)}, learning_rate=0.1)


def test_number_of_variables_must_fit() -> None:
    run = keras_run("momentum")
    with pytest.raises(ValueError, match=r"variables must have the keys 0 to 5, got \[0, 1, 2, "):
        read(run, names=NAMES[:2], to_params=lambda named: named)


def test_paths_that_coincide_are_read_by_number_only() -> None:
    """Keras makes one path of both."""
    run = keras_run("plain")
    names = ["a/b_c", "a_b/c"]
    variables = {str(i): array for i, array in enumerate([run.file["0"], run.file["1"], np.ones(2), np.ones(3)])}
    config = run.about["config"]["float32"]
    _, state = from_keras(config, variables, names, dict)
    assert {name: x.shape for name, x in state.square_avg.items()} == {"a/b_c": (2,), "a_b/c": (3,)}
    paths = ["rmsprop/iteration", "rmsprop/learning_rate", "rmsprop/a_b_c_velocity"]
    for refused in (
        lambda: from_keras(config, dict(zip(paths, variables.values(), strict=False)), names, dict),
        lambda: to_keras(state, names, dict, config=config),
    ):
        with pytest.raises(ValueError, match="two variables of the optimizer have the path 'rmsprop/a_b_c_velocity'"):
            refused()


def test_excluded_variables_must_be_among_names() -> None:
    run = keras_run("weight_decay_excluded")
    with pytest.raises(ValueError, match="exclude_from_weight_decay has 'bias', which is not one of names"):
        read(run, exclude_from_weight_decay=["bias"])
    with pytest.raises(TypeError, match="must be a list of strings"):
        read(run, exclude_from_weight_decay="bias")


def joined(named: Mapping[str, Any]) -> dict[str, Any]:
    """With both biases in one leaf."""
    both = jnp.concatenate if isinstance(named[BIAS], jax.Array) else np.concatenate
    return {"kernels": [named[HIDDEN], named[OUTPUT]], "biases": both([named[BIAS], named[OUTPUT_BIAS]])}


def test_leaf_may_join_variables_that_are_all_excluded_from_weight_decay() -> None:
    run = keras_run("weight_decay_excluded")
    tx, state = read(run, to_params=joined)
    params = jax.tree.map(jnp.asarray, joined(run.params[0]))
    nothing = jax.tree.map(jnp.zeros_like, params)
    plain, _ = read(run, to_params=joined, exclude_from_weight_decay=NAMES)
    kept, bare = (t.update(nothing, state, params)[0] for t in (tx, plain))
    assert_same(kept["biases"], bare["biases"])
    assert (kept["kernels"][0] != bare["kernels"][0]).all()
    with pytest.raises(ValueError, match=r"makes leaf biases of .*bias', which decays, and of .*bias', which"):
        read(run, to_params=joined, exclude_from_weight_decay=[BIAS])


def mixed(named: Mapping[str, Any]) -> dict[str, Any]:
    """With two leaves that are each a half of both variables, and of their size."""
    first, second = named[BIAS], named[OUTPUT][:, 0]
    halves = [np.stack([first[0], second[0]]), np.stack([first[1], second[1]])]
    return {"halves": halves, "others": [named[HIDDEN], named[OUTPUT_BIAS]]}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (mixed, f"leaf halves/0 of {BIAS!r}, {OUTPUT!r}"),
        (joined, f"leaf biases of {BIAS!r}, {OUTPUT_BIAS!r}"),
        (lambda named: {**to_params(named), "hidden": list(named[HIDDEN]), "bias": named[BIAS]}, "of a part of 'seq"),
    ],
)
def test_clipnorm_needs_whole_variables(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(keras_run("clipnorm"), to_params=function)
    read(keras_run("global_clipnorm"), to_params=function)


def test_to_params_may_only_rearrange() -> None:
    with pytest.raises(ValueError, match="to_params leaves out"):
        read(keras_run("everything"), to_params=lambda named: {**to_params(named), "hidden": named[BIAS]})
    with pytest.raises(TypeError, match="to_params must be a function"):
        read(keras_run("everything"), to_params=None)


# --- Refused on the way back -----------------------------------------------------------------------------------


def with_count(state: Any, count: Any) -> Any:
    return jax.tree.map(
        lambda x: x._replace(count=count) if isinstance(x, AveragesState) else x,
        state,
        is_leaf=lambda x: isinstance(x, AveragesState),
    )


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("momentum", {"momentum": 0.0}, "has a momentum_buffer, but the optimizer .* does not have momentum"),
        ("plain", {"momentum": 0.5}, "has no momentum_buffer, but the optimizer that is to continue has momentum > 0"),
        ("plain", {"centered": True}, "has no grad_avg, but the optimizer .* has centered"),
        ("plain", {"use_ema": True}, "state has 0 AveragesState, but config is with use_ema"),
        ("ema", {"use_ema": False}, "state has 1 AveragesState, but config is without use_ema"),
        ("plain", {"gradient_accumulation_steps": 2}, "state has 0 MultiStepsState, but config is with gradient_acc"),
        ("accumulation", {"gradient_accumulation_steps": None}, "has 1 MultiStepsState, but config is without"),
        (
            "accumulation",
            {"gradient_accumulation_steps": 2},
            "state has accumulated 2 gradients, but gradient_acc.* is 2",
        ),
        (
            "everything",
            {"gradient_accumulation_steps": 7},
            "averages in state are those of 30 gradients, but .* say 51",
        ),
    ],
)
def test_state_that_does_not_fit_the_config_is_refused(case: str, change: dict[str, Any], message: str) -> None:
    run = keras_run(case)
    _, state = read(run)
    with pytest.raises(ValueError, match=message):
        to_keras(state, NAMES, from_params, config=run.about["config"]["float32"]["config"] | change)


def test_state_with_nan_is_refused() -> None:
    run = keras_run("everything")
    _, state = read(run)
    config = run.about["config"]["float32"]
    for field in ("square_avg", "acc_grads", "average"):
        broken = optax.tree.set(state, **{field: jax.tree.map(lambda x: x * np.nan, optax.tree.get(state, field))})
        with pytest.raises(ValueError, match="NaN"):
            to_keras(broken, NAMES, from_params, config=config)
    with pytest.raises(TypeError, match="from_params must be a function"):
        to_keras(state, NAMES, None, config=config)


def test_dtypes_of_all_cases_are_recorded() -> None:
    arrays, _ = golden("keras")
    assert {key.split("/")[0] for key in arrays} == set(DTYPES)
