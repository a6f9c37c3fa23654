"""The runs in ``tests/golden/*_files.npz``: the file in the middle, and how the library itself went on."""

import contextlib
import functools
import json
import math
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

DTYPES = ("float32", "float64")

Arrays = dict[str, np.ndarray]


class Run(NamedTuple):
    """A run of a library that wrote a file after step 30, and went on to step 130.

    Attributes:
      names: of the parameters, in the order of the model.
      about: what the metadata says about the case.
      steps: the steps of ``params``, the first of which is 30.
      params: the parameters after each of ``steps``.
      file: what is in the file after step 30.
      last: the same after step 130.
      gradients: of steps 31 to 130, by name.
    """

    names: list[str]
    about: dict[str, Any]
    steps: list[int]
    params: list[Arrays]
    file: Arrays
    last: Arrays
    gradients: Arrays


@functools.cache
def golden(library: str) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
    """All arrays of a library, and their metadata."""
    with np.load(pathlib.Path(__file__).with_name("golden") / f"{library}_files.npz") as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays.pop("metadata")))


def run_of(library: str, case: str, dtype: str) -> Run:
    """A recorded case."""
    arrays, metadata = golden(library)
    about = metadata["cases"][case]
    names = metadata["names"]
    likes = {name: (arrays[f"{dtype}/initial/{name}"].shape, dtype) for name in names}
    first = metadata["recorded_steps"][0]
    kinds = about["arrays"][dtype]
    return Run(
        names=names,
        about=about,
        steps=metadata["recorded_steps"],
        params=[_split(row, likes) for row in arrays[f"{dtype}/{case}/params"]],
        file=_split(arrays[f"{dtype}/{case}/file"], kinds),
        last=_split(arrays[f"{dtype}/{case}/last"], kinds),
        gradients={name: arrays[f"{dtype}/gradients/{name}"][first:] for name in names},
    )


def _split(row: np.ndarray, likes: Mapping[str, Any]) -> Arrays:
    """A row of numbers as the arrays that were joined in it."""
    ends = np.cumsum([math.prod(shape) for shape, _ in likes.values()])
    assert ends[-1] == len(row)
    parts = np.split(row, ends[:-1])
    return {
        key: part.reshape(shape).astype(dtype) for (key, (shape, dtype)), part in zip(likes.items(), parts, strict=True)
    }


def continued(
    run: Run,
    tx: optax.GradientTransformation,
    state: optax.OptState,
    to_params: Callable[[Arrays], Any],
    *,
    jit: bool = False,
) -> tuple[list[Any], optax.OptState]:
    """The parameters after each of ``run.steps``, and the last state, on the gradients of the recorded run.

    Without ``jit``, all cases of the same structure share the compiled update of the library.
    """
    update = jax.jit(tx.update) if jit else tx.update
    params = jax.tree.map(jnp.asarray, to_params(run.params[0]))
    after = [params]
    for i in range(run.steps[-1] - run.steps[0]):
        gradient = to_params({name: run.gradients[name][i] for name in run.names})
        updates, state = update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        if run.steps[0] + i + 1 in run.steps:
            after.append(params)
    return after, state


# --- Libraries for the pages -------------------------------------------------------------------------------------


def write_keras_file(path: pathlib.Path) -> None:
    """A ``.keras`` file without weights: those come from :func:`import_of_page`."""
    config = run_of("keras", *_PAGE_OF_KERAS).about["config"]["float32"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps({"compile_config": {"optimizer": config}}))
        archive.writestr("model.weights.h5", "")


def import_of_page(name: str, *more: Any) -> Any:
    """``__import__`` for ``docs/keras.md``: Keras, h5py and TensorFlow read recorded files, and need not be there.

    ``python tests/golden/record_files.py check`` runs the page with the real ones.
    """
    return _stand_ins()[name] if name in _STAND_INS else __import__(name, *more)


_STAND_INS = ("keras", "h5py", "tensorflow")


def _stand_ins() -> dict[str, Any]:
    """What the page takes of the three."""
    run, checkpoint = run_of("keras", *_PAGE_OF_KERAS), run_of("tensorflow1", "centered_momentum", "float32").file

    def variable(path: str, array: np.ndarray) -> SimpleNamespace:
        """One that takes only an array like itself, with the path that it has in a model that was loaded."""
        path = path.replace("sequential/", "").replace("sequential_", "")
        return SimpleNamespace(path=path, numpy=lambda: array, assign=lambda x: np.testing.assert_allclose(x, array))

    config = run.about["config"]["float32"]["config"]
    places = enumerate(run.about["paths"])
    optimizer = SimpleNamespace(
        get_config=lambda: config, variables=[variable(path, run.file[str(i)]) for i, path in places]
    )
    trained = [variable(*item) for item in run.params[0].items()]
    model = SimpleNamespace(optimizer=optimizer, trainable_variables=trained)
    datasets = {key: {(): array} for key, array in run.file.items()}
    reader = SimpleNamespace(
        get_tensor=checkpoint.__getitem__,
        get_variable_to_shape_map=lambda: {name: list(array.shape) for name, array in checkpoint.items()},
    )
    return {
        "keras": SimpleNamespace(saving=SimpleNamespace(load_model=lambda path: model)),
        "h5py": SimpleNamespace(File=lambda path: contextlib.nullcontext({"optimizer/vars": datasets})),
        "tensorflow": SimpleNamespace(train=SimpleNamespace(load_checkpoint=lambda path: reader)),
    }


_PAGE_OF_KERAS = ("weight_decay_excluded", "float32")
