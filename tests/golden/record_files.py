"""Record files that real runs wrote, and how the runs went on: `python tests/golden/record_files.py LIBRARY...`.

It writes `keras_files.npz` and `tensorflow1_files.npz` beside this file. A model of two layers gets the same 130
gradients (seeded, not computed from the parameters) in every case, once in float32 and once in float64. After step 30
the library writes a real file. Kept is what is in the file, and then the parameters after the steps in `RECORDED` and
the whole optimizer after the last one. The tests read the file, go on with the same gradients, and compare.

The arrays of a file, with one of `DTYPES` for {dtype} and the library's own name of a parameter for {param}:

    {dtype}/initial/{param}     the parameters before the first step
    {dtype}/gradients/{param}   [t - 1] is the gradient of step t, t = 1 … 130
    {dtype}/{case}/params       [i] are the parameters after step RECORDED[i], flattened and joined in their order
    {dtype}/{case}/file         all arrays in the file after step 30, flattened and joined; metadata has their names
    {dtype}/{case}/last         the same after step 130
    {dtype}/schedules/{name}    keras: a schedule at the steps in `SCHEDULE_STEPS`
    metadata                    a JSON string, `json.loads(str(file["metadata"]))`:
        {"versions": {module: version}, "recorded_steps": [30, 31, …], "schedule_steps": [0, …],
         "names": [the parameters in the order of the model],
         "cases": {case: {"arguments": {…}, "arrays": {dtype: {key: [shape, dtype]}}, and of keras also
                          "config": {dtype: what the config.json of a .keras file says about the optimizer},
                          "paths": [of the optimizer's variables, in their order]}},
         keras: "schedules": {name: {dtype: serialized}}}
    The keys are 0, 1, … of the group optimizer/vars of a .weights.h5 in keras, and the names of all variables of a
    checkpoint in tensorflow1.

To record again, on a CPU, with Python 3.11 in an environment of its own:

    pip install tensorflow-cpu==2.21.0 keras==3.15.1 numpy==2.4.6 h5py==3.14.0
    python tests/golden/record_files.py keras tensorflow1

The same versions on the same kind of processor write the same numbers; on another kind the last bits may differ.

With rmsprop_jax in the same environment, `python tests/golden/record_files.py check` takes every run to JAX and back
after step 30. It compares step 130 with that of a run that stayed. Then the real libraries run `docs/keras.md`.
"""

import contextlib
import io
import json
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

DTYPES = ("float32", "float64")
SEED = 13
STOP, STEPS = 30, 130
RECORDED = (STOP, 31, 32, 33, 40, 64, 100, STEPS)
SCHEDULE_STEPS = (*range(45), *range(45, 400, 7), 1000)
SHAPES = {"hidden/kernel": (3, 2), "hidden/bias": (2,), "output/kernel": (2, 1), "output/bias": (1,)}
LR = 0.01


def problem(dtype: str) -> tuple[Arrays, Arrays]:
    """The initial parameters and the gradients of all steps.

    Gradients have scales from 0.1 to 3, and a noise about as large as their mean: a centered variance does not cancel.
    """
    rng = np.random.default_rng(SEED)
    params, gradients = {}, {}
    for name, shape in SHAPES.items():
        scale = rng.choice([-1.0, 1.0], shape) * 10 ** rng.uniform(-1, 0.5, shape)
        params[name] = (rng.choice([-1.0, 1.0], shape) * rng.uniform(2.0, 4.0, shape)).astype(dtype)
        gradients[name] = (scale * rng.normal(1.0, 0.9, (STEPS, *shape))).astype(dtype)
    return params, gradients


def in_double(arguments: Any, dtype: str) -> Any:
    """The arguments, with numbers that reach a float64 variable unrounded; see `record.py`."""
    if isinstance(arguments, dict):
        return {name: in_double(value, dtype) for name, value in arguments.items()}
    if isinstance(arguments, list):
        return [in_double(value, dtype) for value in arguments]
    return np.float64(arguments) if isinstance(arguments, float) and dtype == "float64" else arguments


# --- Keras 3 -----------------------------------------------------------------------------------------------

# Every schedule with no argument at its default, where that is possible.
SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "exponential": ("ExponentialDecay", dict(initial_learning_rate=0.02, decay_steps=25, decay_rate=0.6)),
    "stairs": ("ExponentialDecay", dict(initial_learning_rate=0.02, decay_steps=9, decay_rate=0.7, staircase=True)),
    "inverse": ("InverseTimeDecay", dict(initial_learning_rate=0.02, decay_steps=25, decay_rate=1.5)),
    "inverse_stairs": (
        "InverseTimeDecay",
        dict(initial_learning_rate=0.02, decay_steps=9, decay_rate=0.5, staircase=True),
    ),
    "polynomial": (
        "PolynomialDecay",
        dict(initial_learning_rate=0.02, decay_steps=110, end_learning_rate=0.004, power=1.5),
    ),
    "polynomial_cycle": (
        "PolynomialDecay",
        dict(initial_learning_rate=0.02, decay_steps=17, end_learning_rate=0.004, power=0.5, cycle=True),
    ),
    "cosine": ("CosineDecay", dict(initial_learning_rate=0.02, decay_steps=100, alpha=0.2)),
    "cosine_warmup": (
        "CosineDecay",
        dict(initial_learning_rate=0.001, decay_steps=80, alpha=0.1, warmup_target=0.03, warmup_steps=40),
    ),
    "restarts": (
        "CosineDecayRestarts",
        dict(initial_learning_rate=0.02, first_decay_steps=12, t_mul=2.0, m_mul=0.8, alpha=0.1),
    ),
    "restarts_equal": (
        "CosineDecayRestarts",
        dict(initial_learning_rate=0.02, first_decay_steps=13, t_mul=1.0, m_mul=0.9, alpha=0.05),
    ),
    "piecewise": ("PiecewiseConstantDecay", dict(boundaries=[10, 36, 90], values=[0.02, 0.01, 0.005, 0.002])),
}
BIASES = ["sequential/hidden/bias", "sequential/output/bias"]
ALL_OF_IT = dict(rho=0.95, epsilon=1e-3, momentum=0.8, centered=True, weight_decay=0.1, use_ema=True, ema_momentum=0.8)
KERAS_CASES: dict[str, dict[str, Any]] = {
    "plain": dict(),
    "momentum": dict(learning_rate=LR, momentum=0.9),
    "centered": dict(learning_rate=LR, rho=0.95, centered=True),
    "centered_momentum": dict(learning_rate=LR, rho=0.95, epsilon=1e-3, momentum=0.8, centered=True),
    "weight_decay": dict(learning_rate=LR, weight_decay=0.1),
    "weight_decay_excluded": dict(learning_rate=LR, momentum=0.9, weight_decay=0.5, excluded=BIASES),
    "clipnorm": dict(learning_rate=LR, momentum=0.9, clipnorm=1.5),
    "clipvalue": dict(learning_rate=LR, momentum=0.9, clipvalue=0.7),
    "global_clipnorm": dict(learning_rate=LR, momentum=0.9, global_clipnorm=3.0),
    "loss_scale_factor": dict(learning_rate=LR, momentum=0.9, epsilon=0.1, loss_scale_factor=3.0),
    "ema": dict(learning_rate=LR, momentum=0.9, use_ema=True, ema_momentum=0.9),
    "ema_overwrite": dict(learning_rate=LR, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=7),
    "accumulation": dict(learning_rate=LR, momentum=0.9, gradient_accumulation_steps=4),
    "accumulation_begins": dict(learning_rate=LR, gradient_accumulation_steps=40, use_ema=True, ema_momentum=0.9),
    "accumulation_stairs": dict(schedule="stairs", momentum=0.9, gradient_accumulation_steps=4),
    "cosine_warmup": dict(schedule="cosine_warmup", momentum=0.9),
    "everything": dict(
        schedule="restarts",
        global_clipnorm=2.0,
        loss_scale_factor=3.0,
        gradient_accumulation_steps=4,
        ema_overwrite_frequency=3,
        excluded=BIASES,
        **ALL_OF_IT,
    ),
}


def keras_schedule(name: str, dtype: str) -> Any:
    import keras

    kind, arguments = SCHEDULES[name]
    return getattr(keras.optimizers.schedules, kind)(**in_double(arguments, dtype))


def as_plain(config: Any) -> Any:
    """With Python's numbers, as JSON holds them."""
    return json.loads(json.dumps(config, default=float))


class KerasRun:
    """A compiled model of Keras on its TensorFlow backend, driven with given gradients."""

    def __init__(self, case: dict[str, Any], params: Arrays, dtype: str) -> None:
        import keras

        keras.backend.clear_session()
        keras.config.set_floatx(dtype)
        layers = [keras.layers.Dense(2, name="hidden"), keras.layers.Dense(1, name="output")]
        self.model = keras.Sequential([keras.Input((3,)), *layers], name="sequential")
        arguments = in_double({key: value for key, value in case.items() if key not in ("schedule", "excluded")}, dtype)
        if "schedule" in case:
            arguments["learning_rate"] = keras_schedule(case["schedule"], dtype)
        self.optimizer = keras.optimizers.RMSprop(name="rmsprop", **arguments)
        variables = self.model.trainable_variables
        self.optimizer.exclude_from_weight_decay([v for v in variables if v.path in case.get("excluded", ())])
        self.optimizer.build(variables)
        self.model.compile(self.optimizer, loss="mse")
        for variable, value in zip(variables, params.values(), strict=True):
            variable.assign(value)

    def step(self, gradients: Arrays) -> None:
        import keras

        self.optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients.values()])

    def params(self) -> Arrays:
        return {v.path: v.numpy() for v in self.model.trainable_variables}

    def file(self) -> Arrays:
        import h5py

        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/model.weights.h5"
            self.model.save_weights(path)
            with h5py.File(path) as opened:
                return {key: value[()] for key, value in opened["optimizer/vars"].items()}

    def save(self, path: str) -> None:
        self.model.save(path)

    def load(self, variables: Arrays, stays: "KerasRun") -> None:
        """The optimizer that was in JAX."""
        for variable in self.optimizer.variables:
            variable.assign(variables[variable.path])
        assert (
            list(variables) == [v.path for v in self.optimizer.variables] == [v.path for v in stays.optimizer.variables]
        )

    def described(self) -> dict[str, Any]:
        """The config in a .keras file, after a check that the file has the same variables as a .weights.h5."""
        import h5py

        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/model.keras"
            self.model.save(path)
            with zipfile.ZipFile(path) as archive:
                config = json.loads(archive.read("config.json"))["compile_config"]["optimizer"]
                archive.extract("model.weights.h5", folder)
            with h5py.File(f"{folder}/model.weights.h5") as opened:
                for key, value in self.file().items():
                    np.testing.assert_array_equal(opened["optimizer/vars"][key][()], value)
        return {"config": as_plain(config), "paths": [v.path for v in self.optimizer.variables]}


def record_keras() -> Arrays:
    import h5py
    import keras
    import tensorflow as tf

    versions = {module.__name__: module.__version__ for module in (keras, tf, np, h5py)}
    arrays, metadata = recorded(KERAS_CASES, KerasRun, versions)
    metadata |= {"schedule_steps": SCHEDULE_STEPS, "schedules": {}}
    for name in SCHEDULES:
        for dtype in DTYPES:
            keras.config.set_floatx(dtype)
            schedule = keras_schedule(name, dtype)
            serialized = as_plain(keras.optimizers.schedules.serialize(schedule))
            metadata["schedules"].setdefault(name, {})[dtype] = serialized
            arrays[f"{dtype}/schedules/{name}"] = np.array([schedule(step) for step in SCHEDULE_STEPS], dtype)
    return arrays | {"metadata": np.array(json.dumps(metadata))}


# --- TensorFlow 1 ------------------------------------------------------------------------------------------

TENSORFLOW_CASES: dict[str, dict[str, Any]] = {
    "plain": dict(learning_rate=LR),
    "momentum": dict(learning_rate=LR, decay=0.8, momentum=0.9, epsilon=1e-3),
    "centered": dict(learning_rate=LR, decay=0.95, epsilon=1e-3, centered=True),
    "centered_momentum": dict(learning_rate=LR, decay=0.95, momentum=0.8, epsilon=1e-3, centered=True),
    "name": dict(learning_rate=LR, momentum=0.9, epsilon=1e-3, name="train/Adaptive"),
    "scope": dict(learning_rate=LR, momentum=0.9, epsilon=1e-3, scope="train"),
    "shadows": dict(learning_rate=LR, momentum=0.9, epsilon=1e-3, centered=True, shadows=True),
    "partitioned": dict(learning_rate=LR, momentum=0.9, epsilon=1e-3, partitions=2),
    "two_optimizers": dict(learning_rate=LR, momentum=0.9, epsilon=1e-3, second=True),
    "schedule": dict(learning_rate=LR, momentum=0.9, epsilon=1e-3, decay_rate=0.97),
}
NOT_ARGUMENTS = ("scope", "shadows", "partitions", "second", "decay_rate")


class TensorFlowRun:
    """A graph of TensorFlow 1 with its session, driven with given gradients."""

    def __init__(self, case: dict[str, Any], params: Arrays, dtype: str) -> None:
        import tensorflow as tf

        v1 = tf.compat.v1
        self.graph, self.v1, self.tf = tf.Graph(), v1, tf
        arguments = in_double({key: value for key, value in case.items() if key not in NOT_ARGUMENTS}, dtype)
        with self.graph.as_default():
            global_step = v1.train.get_or_create_global_step()
            with v1.variable_scope("net", use_resource=False):
                self.variables = {name: self._variable(name, value, case) for name, value in params.items()}
            self.holders = {name: v1.placeholder(dtype, value.shape) for name, value in params.items()}
            if "decay_rate" in case:
                arguments["learning_rate"] *= tf.pow(
                    tf.constant(case["decay_rate"], dtype), tf.cast(global_step, dtype)
                )
            optimizer = v1.train.RMSPropOptimizer(**arguments)
            with v1.variable_scope(case["scope"]) if "scope" in case else contextlib.nullcontext():
                self.train = optimizer.apply_gradients(list(self._pairs()), global_step)
            if "second" in case:  # its slots come after those of the first, and it never runs
                second = v1.train.RMSPropOptimizer(LR)
                second.apply_gradients([(self.holders["output/bias"], self.variables["output/bias"])])
            if "shadows" in case:
                averages = v1.train.ExponentialMovingAverage(0.9)
                shadowed = [v for v in v1.global_variables() if v.dtype.base_dtype == tf.as_dtype(dtype)]
                with tf.control_dependencies([self.train]):
                    self.train = averages.apply(shadowed)
            self.saver = v1.train.Saver()
            self.session = v1.Session()
            shadows = [v for v in v1.global_variables() if "/Exponential" in v.op.name]
            trained = v1.trainable_variables()
            others = [v for v in v1.global_variables() if v not in (*trained, *shadows)]
            for group in (trained, others, shadows):  # slots begin with trained variables, shadows with both
                self.session.run(v1.variables_initializer(group))

    def _variable(self, name: str, value: np.ndarray, case: dict[str, Any]) -> Any:
        if "partitions" not in case or name != "hidden/kernel":
            return self.v1.get_variable(name, initializer=value)

        def part(shape: Any, dtype: Any, partition_info: Any) -> Any:
            offset = partition_info.var_offset[0]
            return self.tf.constant(value[offset : offset + shape[0]], dtype)

        partitioner = self.v1.fixed_size_partitioner(case["partitions"])
        return self.v1.get_variable(name, value.shape, value.dtype, part, partitioner=partitioner)

    def _pairs(self) -> Iterator[tuple[Any, Any]]:
        """A gradient for each variable, and for each part of a partitioned one."""
        for name, variable in self.variables.items():
            if isinstance(variable, self.v1.Variable):
                yield self.holders[name], variable
            else:
                parts = list(variable)
                sizes = [int(part.shape[0]) for part in parts]
                yield from zip(self.tf.split(self.holders[name], sizes), parts, strict=True)

    def step(self, gradients: Arrays) -> None:
        with self.graph.as_default():
            self.session.run(self.train, {self.holders[name]: value for name, value in gradients.items()})

    def params(self) -> Arrays:
        file = self.file()
        return {f"net/{name}": file[f"net/{name}"] for name in self.variables}

    def file(self) -> Arrays:
        with self.graph.as_default(), tempfile.TemporaryDirectory() as folder:
            reader = self.tf.train.load_checkpoint(self.saver.save(self.session, f"{folder}/model.ckpt"))
            return {name: reader.get_tensor(name) for name in sorted(reader.get_variable_to_shape_map())}

    def save(self, path: str) -> None:
        with self.graph.as_default():
            self.saver.save(self.session, path, write_meta_graph=False)

    def load(self, slots: Arrays, stays: "TensorFlowRun") -> None:
        """The optimizer that was in JAX, and the shadows that stayed."""
        with self.graph.as_default():
            loaded = 0
            for variable in self.v1.global_variables():
                name = variable.op.name
                if (part := re.search(r"/part_(\d)", name)) is not None:  # of a partitioned variable, in equal parts
                    rows = {key: np.array_split(x, 2)[int(part[1])] for key, x in slots.items() if x.ndim}
                    slot = rows.get(name.replace(part[0], ""))
                else:
                    slot = slots.get(name)
                if slot is not None:
                    loaded += 1
                    variable.load(slot, self.session)
            assert loaded >= len(slots)

    def described(self) -> dict[str, Any]:
        return {}


def record_tensorflow1() -> Arrays:
    import tensorflow as tf

    arrays, metadata = recorded(TENSORFLOW_CASES, TensorFlowRun, {m.__name__: m.__version__ for m in (tf, np)})
    return arrays | {"metadata": np.array(json.dumps(metadata))}


# --- Both --------------------------------------------------------------------------------------------------


def joined(arrays: Arrays) -> np.ndarray:
    """All numbers in a row. Many small arrays in a file would each cost more than their numbers."""
    return np.concatenate([np.ravel(value).astype(arrays_dtype(arrays)) for value in arrays.values()])


def arrays_dtype(arrays: Arrays) -> np.dtype:
    """The floating dtype of a run. It also holds the number of its steps."""
    return next(value.dtype for value in arrays.values() if value.dtype.kind == "f")


def recorded(
    cases: dict[str, dict[str, Any]], run_of: Callable[..., Any], versions: dict[str, str]
) -> tuple[Arrays, dict[str, Any]]:
    """The arrays of all cases, and what describes them."""
    arrays: Arrays = {}
    metadata: dict[str, Any] = {"versions": versions, "recorded_steps": RECORDED, "cases": {}}
    for dtype in DTYPES:
        params, gradients = problem(dtype)
        for case, arguments in cases.items():
            run = run_of(arguments, params, dtype)
            metadata["names"] = list(run.params())
            arrays |= {f"{dtype}/initial/{name}": value for name, value in run.params().items()}
            kept = []
            for t in range(1, STEPS + 1):
                run.step({name: value[t - 1] for name, value in gradients.items()})
                if t == STOP:
                    described, stopped = run.described(), run.file()
                if t in RECORDED:
                    kept.append(joined(run.params()))
            arrays |= {f"{dtype}/{case}/params": np.stack(kept)}
            arrays |= {f"{dtype}/{case}/file": joined(stopped), f"{dtype}/{case}/last": joined(run.file())}
            about = metadata["cases"].setdefault(case, {"arguments": arguments, "arrays": {}, "config": {}})
            about["arrays"][dtype] = {key: [value.shape, value.dtype.name] for key, value in stopped.items()}
            about["config"][dtype] = described.pop("config", None)
            about |= described
        gradients_by_name = zip(metadata["names"], gradients.values(), strict=True)
        arrays |= {f"{dtype}/gradients/{name}": value for name, value in gradients_by_name}
    if broken := [key for key, value in arrays.items() if not np.isfinite(value).all()]:
        raise FloatingPointError(f"not finite: {', '.join(broken)}; give these cases other arguments or gradients")
    return arrays, metadata


LIBRARIES = {"keras": record_keras, "tensorflow1": record_tensorflow1}


# --- The check with the real libraries -----------------------------------------------------------------------


def check() -> None:
    """Takes the runs to JAX and back, and runs the page."""
    from rmsprop_jax.checkpoints import from_keras, from_tensorflow, to_keras, to_tensorflow

    def through_keras(run: KerasRun, case: dict[str, Any]) -> Arrays:
        config, names = run.optimizer.get_config(), list(run.params())
        excluded = case.get("excluded", [])
        _, state = from_keras(config, run.file(), names, dict, exclude_from_weight_decay=excluded)
        return to_keras(state, names, dict, config=config)

    def through_tensorflow(run: TensorFlowRun, case: dict[str, Any]) -> Arrays:
        arguments = {key: value for key, value in case.items() if key not in NOT_ARGUMENTS or key == "scope"}
        others = [f"net/output/bias/RMSProp_{i}" for i in (2, 3) if "second" in case]
        file = {key: value for key, value in run.file().items() if key not in others}
        _, state = from_tensorflow(file, list(run.params()), dict, **arguments)
        kept = {key: value for key, value in arguments.items() if key in ("centered", "name", "scope")}
        return to_tensorflow(state, list(run.params()), dict, **kept)

    check_way_back(KERAS_CASES, KerasRun, through_keras)
    check_way_back(TENSORFLOW_CASES, TensorFlowRun, through_tensorflow)
    check_page()


def check_way_back(cases: dict[str, Any], run_of: Callable[..., Any], through_jax: Callable[..., Arrays]) -> None:
    """A run whose optimizer was in JAX ends where the run ends that stayed."""
    params, gradients = problem("float32")
    for case, arguments in cases.items():
        stays = run_of(arguments, params, "float32")
        for t in range(STOP):
            stays.step({name: value[t] for name, value in gradients.items()})
        returns = run_of(arguments, dict(zip(params, stays.params().values(), strict=True)), "float32")
        returns.load(through_jax(stays, arguments), stays)
        for t in range(STOP, STEPS):
            for run in (stays, returns):
                run.step({name: value[t] for name, value in gradients.items()})
        distance = np.abs(joined(stays.params()) - joined(returns.params())).max()
        print(f"{run_of.__name__} {case}: {distance:.1e}")
        if distance > 1e-5:
            raise AssertionError(case)


def check_page() -> None:
    """Every block of the page prints what it says."""
    page = (Path(__file__).parents[2] / "docs" / "keras.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", page, re.DOTALL | re.MULTILINE)
    params, gradients = problem("float32")
    runs = {
        "model.keras": KerasRun(KERAS_CASES["weight_decay_excluded"], params, "float32"),
        "model.ckpt-30": TensorFlowRun(TENSORFLOW_CASES["centered_momentum"], params, "float32"),
    }
    with contextlib.chdir(tempfile.mkdtemp()):
        for path, run in runs.items():
            for t in range(STOP):
                run.step({name: value[t] for name, value in gradients.items()})
            run.save(path)
        scope: dict[str, Any] = {}
        for block, prints in blocks:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(block, scope)
            if printed.getvalue() != prints:
                raise AssertionError(f"{block}\nprints {printed.getvalue()}")
    print(f"docs/keras.md: {len(blocks)} blocks")


def main(names: list[str]) -> None:
    os.environ["KERAS_BACKEND"] = "tensorflow"
    if names == ["check"]:
        check()
        return
    if not names or not set(names) <= set(LIBRARIES):
        raise SystemExit(f"usage: python tests/golden/record_files.py LIBRARY..., each one of {', '.join(LIBRARIES)}")
    for name in names:
        path = Path(__file__).with_name(f"{name}_files.npz")
        np.savez_compressed(path, **LIBRARIES[name]())
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
