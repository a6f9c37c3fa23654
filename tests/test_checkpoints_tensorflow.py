"""Checkpoints of TensorFlow 1: read from files that its Saver wrote, continued, written back, and refused."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compare import assert_close, assert_same
from recorded import Run, continued, golden, run_of
from rmsprop_jax.checkpoints import from_tensorflow, to_tensorflow

CASES = golden("tensorflow1")[1]["cases"]
HIDDEN, BIAS, OUTPUT, OUTPUT_BIAS = NAMES = golden("tensorflow1")[1]["names"]
OF_THE_GRAPH = ("shadows", "partitions", "second")  # what a case has besides arguments of from_tensorflow


def to_params(named: Mapping[str, Any]) -> dict[str, Any]:
    return {"hidden": {"kernel": named[HIDDEN].T, "bias": named[BIAS]}, "output": [named[OUTPUT].T, named[OUTPUT_BIAS]]}


def from_params(params: Any) -> dict[str, Any]:
    (kernel, bias), hidden = params["output"], params["hidden"]
    return {HIDDEN: hidden["kernel"].T, BIAS: hidden["bias"], OUTPUT: kernel.T, OUTPUT_BIAS: bias}


def tensorflow_run(case: str, dtype: str = "float32") -> Run:
    """A recorded run; without the slots of the optimizer that never ran, which the user takes out."""
    run = run_of("tensorflow1", case, dtype)
    others = {f"{OUTPUT_BIAS}/RMSProp_{i}" for i in (2, 3) if case == "two_optimizers"}
    file, last = ({key: x for key, x in arrays.items() if key not in others} for arrays in (run.file, run.last))
    return run._replace(file=file, last=last)


def arguments_of(case: str, dtype: str = "float32") -> dict[str, Any]:
    """Those of the optimizer. In float64 they were NumPy's, which TensorFlow does not round, but for its default."""
    arguments = {key: value for key, value in CASES[case]["arguments"].items() if key not in OF_THE_GRAPH}
    if dtype == "float64":
        arguments = {key: np.float64(x) if isinstance(x, float) else x for key, x in arguments.items()}
    if "decay_rate" in arguments:
        rate, decay_rate = arguments["learning_rate"], arguments.pop("decay_rate")
        arguments["learning_rate"] = lambda step: rate * jnp.asarray(decay_rate, float) ** jnp.asarray(step, float)
    return arguments


def read(run: Run, case: str, dtype: str = "float32", **changed: Any) -> tuple[Any, Any]:
    """What ``from_tensorflow`` makes of a recorded run."""
    arguments = {"variables": run.file, "names": NAMES, "to_params": to_params, **arguments_of(case, dtype)}
    return from_tensorflow(**arguments | changed)


def written(state: Any, case: str) -> dict[str, np.ndarray]:
    kept = {key: value for key, value in arguments_of(case).items() if key in ("centered", "name", "scope")}
    return to_tensorflow(state, NAMES, from_params, **kept)


# --- Continued -------------------------------------------------------------------------------------------------


def check_continues(case: str, dtype: str, tolerance: Mapping[str, float]) -> None:
    """100 steps end where TensorFlow ended: the parameters on the way, and every slot."""
    run = tensorflow_run(case, dtype)
    tx, state = read(run, case, dtype)
    after, last = continued(run, tx, state, to_params)
    want = [to_params(params) for params in run.params]
    largest = jax.tree.map(lambda *steps: np.max(np.abs(steps), axis=0), *want)
    for got, expected in zip(after, want, strict=True):
        assert_close(got, expected, scale=largest, **tolerance)
    back = {key: x for key, x in written(last, case).items() if x.any()}  # zeros are a buffer without momentum
    assert back.pop("global_step") == run.last["global_step"] == 130
    assert len(back) == 4 * sum([1, "momentum" in arguments_of(case), arguments_of(case).get("centered", False)])
    assert_close(back, {key: run.last[key] for key in back}, scale="array", **tolerance)


@pytest.mark.parametrize("case", ["momentum", "centered_momentum", "schedule"])
def test_run_continues_as_in_tensorflow_in_float32(case: str) -> None:
    """Each step rounds the parameter and the slots once in each library; 10 ulps were measured after 100 steps."""
    check_continues(case, "float32", {"ulps": 100})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("x64")
def test_run_continues_as_in_tensorflow_in_float64(case: str) -> None:
    check_continues(case, "float64", {"rtol": 1e-12})


def test_recordings_depend_on_every_setting() -> None:
    last = {case: np.concatenate([p.ravel() for p in tensorflow_run(case).params[-1].values()]) for case in CASES}
    same_setting = {"name", "scope", "partitioned", "two_optimizers"}
    for first in CASES:
        for second in CASES:
            alike = first == second or {first, second} <= same_setting
            assert (np.abs(last[first] - last[second]).max() > 1e-3) != alike, (first, second)


# --- In, and out again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_file_comes_back(case: str) -> None:
    run = tensorflow_run(case)
    _, state = read(run, case)
    back = written(state, case)
    momentum = "momentum" in arguments_of(case)
    slots = {key for key in run.file if key not in NAMES and "/Exponential" not in key}
    assert set(back) == slots
    for key, array in back.items():
        buffer = "_2" if arguments_of(case).get("centered") else "_1"
        want = run.file[key] if momentum or not key.endswith(buffer) else np.zeros_like(run.file[key])
        assert_close(array, want, ulps=2)  # a variance, and then an average of squares again


def test_slots_are_those_of_tensorflow() -> None:
    """Which of three is which: the mean of a gradient is smaller than the root of its mean square."""
    run = tensorflow_run("centered_momentum")
    _, state = read(run, "centered_momentum")
    rms, mg, momentum = (run.file[HIDDEN + end] for end in ("/RMSProp", "/RMSProp_1", "/RMSProp_2"))
    assert_same(state.grad_avg["hidden"]["kernel"], jnp.asarray(mg.T))
    assert_same(state.momentum_buffer["hidden"]["kernel"], jnp.asarray(momentum.T))
    assert_close(state.square_avg["hidden"]["kernel"], rms.T - mg.T**2, ulps=4, scale=rms.T)


@pytest.mark.parametrize("case", ["plain", "momentum", "centered_momentum"])
def test_state_is_what_init_makes(case: str) -> None:
    run = tensorflow_run(case)
    tx, state = read(run, case)
    fresh = tx.init(jax.tree.map(jnp.asarray, to_params(run.params[0])))
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, fresh)


def test_momentum_that_is_a_schedule_has_a_buffer() -> None:
    run = tensorflow_run("momentum")
    _, state = read(run, "momentum", momentum=lambda step: 0.9)
    assert state.momentum_buffer is not None


def test_step_may_be_given() -> None:
    run = tensorflow_run("momentum")
    variables = {key: x for key, x in run.file.items() if key != "global_step"}
    with pytest.raises(ValueError, match="variables has no 'global_step'; give the number of updates"):
        read(run, "momentum", variables=variables)
    _, state = read(run, "momentum", variables=variables, step=77)
    assert state.step == 77
    _, state = read(run, "momentum", step=78)
    assert state.step == 78


# --- Refused ---------------------------------------------------------------------------------------------------


def test_slots_of_another_optimizer_are_not_ignored() -> None:
    run = run_of("tensorflow1", "two_optimizers", "float32")
    with pytest.raises(ValueError, match=f"variables has the slot '{OUTPUT_BIAS}/RMSProp_2', which belongs to none"):
        read(run, "momentum")


@pytest.mark.parametrize(
    ("case", "changed", "message"),
    [
        ("momentum", {"centered": True}, "variables has no 'net/hidden/kernel/RMSProp_2', and it has "),
        ("centered_momentum", {"centered": False}, "the slot 'net/hidden/bias/RMSProp_2', which belongs to none"),
        ("momentum", {"names": NAMES[1:]}, "the slot 'net/hidden/kernel/RMSProp', which belongs to none of names"),
        ("name", {"name": "RMSProp"}, "and no name in it ends with 'RMSProp'; give the name of the optimizer as name="),
        ("scope", {"scope": ""}, r"no 'net/hidden/kernel/RMSProp', and it has \['train/net/hidden/bias/RMSProp'"),
        ("momentum", {"names": ["x"]}, "variables has no 'x/RMSProp', and it has"),
        ("momentum", {"to_params": lambda named: named[BIAS]}, "to_params leaves out"),
        ("momentum", {"step": -1}, "step must be a number of updates"),
        ("momentum", {"momentum": -1.0}, "momentum must be a number ≥ 0"),
    ],
)
def test_arguments_that_do_not_fit_the_file_are_refused(case: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tensorflow_run(case), case, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"variables": [1]}, "variables must be a dict from names to arrays, got list"),
        ({"names": "net"}, "names must be a list of strings"),
        ({"to_params": 1}, "to_params must be a function"),
        ({"centered": "False"}, "centered must be True or False"),
        ({"name": None}, "name must be a string, got None"),
        ({"scope": 1}, "scope must be a string, got 1"),
        ({"step": True}, "step must be an integer, got True"),
        ({"step": 2.0}, "step must be an integer, got 2.0"),
    ],
)
def test_arguments_have_their_types(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        read(tensorflow_run("momentum"), "momentum", **changed)


def altered(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """With one number replaced."""

    def alter(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[-1] = value
        return array

    return alter


@pytest.mark.parametrize(
    ("key", "change", "kind", "message"),
    [
        ("RMSProp", altered(-1.0), ValueError, "kernel/RMSProp' is negative"),
        ("RMSProp", altered(np.nan), ValueError, "kernel/RMSProp' has 1 NaN"),
        ("RMSProp", altered(0.0), ValueError, "'square_avg' of 'net/hidden/kernel' is 0 where its 'grad_avg' is"),
        ("RMSProp_1", altered(1e9), ValueError, "an average of squares is no less than the square"),
        ("RMSProp_1", lambda x: x.astype(int), TypeError, "kernel/RMSProp_1' must be a floating"),
        ("RMSProp_2", altered(np.inf), ValueError, "kernel/RMSProp_2' is infinite"),
        ("RMSProp_2", np.transpose, ValueError, r"kernel/RMSProp_2' has shape \(2, 3\), but '.*kernel/RMSProp' has"),
        ("RMSProp_2", lambda x: x.tolist(), TypeError, "kernel/RMSProp_2' must be an array, got list"),
    ],
)
def test_slots_that_are_wrong_are_refused_by_name(key: str, change: Any, kind: type[Exception], message: str) -> None:
    run = tensorflow_run("centered_momentum")
    full = f"{HIDDEN}/{key}"
    with pytest.raises(kind, match=message):
        read(run, "centered_momentum", variables={**run.file, full: change(run.file[full])})


def test_buffer_without_momentum_is_checked_before_it_is_left_out() -> None:
    run = tensorflow_run("plain")
    assert f"{HIDDEN}/RMSProp_1" in run.file
    with pytest.raises(ValueError, match="RMSProp_1' has 6 NaN"):
        read(run, "plain", variables={**run.file, f"{HIDDEN}/RMSProp_1": np.full((3, 2), np.nan)})


def test_slots_are_compared_with_their_variable() -> None:
    run = tensorflow_run("momentum")
    with pytest.raises(
        ValueError, match=r"slots of 'net/hidden/kernel' have shape \(3, 2\), but it has shape \(2, 3\)"
    ):
        read(run, "momentum", variables={**run.file, HIDDEN: run.file[HIDDEN].T})


def test_state_that_does_not_fit_is_refused() -> None:
    _, state = read(tensorflow_run("momentum"), "momentum")
    with pytest.raises(ValueError, match=r"has no grad_avg, but the optimizer .* has centered"):
        to_tensorflow(state, NAMES, from_params, centered=True)
    with pytest.raises(ValueError, match="from_params must return an array for each of names"):
        to_tensorflow(state, [*NAMES, "more"], from_params)
    with pytest.raises(TypeError, match="from_params must be a function"):
        to_tensorflow(state, NAMES, None)
    _, centered = read(tensorflow_run("centered"), "centered")
    with pytest.raises(ValueError, match=r"has a grad_avg, but the optimizer .* does not have centered"):
        to_tensorflow(centered, NAMES, from_params)
