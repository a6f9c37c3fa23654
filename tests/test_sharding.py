"""Where state lives: what one device can show, and ``on_eight_devices`` in a process that has them."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from rmsprop_jax import rmsprop, sharding, storage
from test_promises import devices


@pytest.mark.script
def test_on_eight_devices() -> None:
    pytest.importorskip("equinox")
    flags = {"XLA_FLAGS": devices(8)["XLA_FLAGS"] + " --xla_cpu_max_isa=AVX"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "on_eight_devices.py"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | flags
    done = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_without_a_mesh_the_state_lies_where_the_parameters_do() -> None:
    params = {"w": jnp.ones((4, 8)), "host": np.ones(3, np.float32)}
    for tx in (rmsprop(momentum=0.9), optax.adam(0.1), storage.compress(rmsprop(), min_size=1)):
        layout = sharding.shardings(tx, params)
        assert set(jax.tree.leaves(layout)) == {SingleDeviceSharding(jax.devices()[0])}
        state = jax.jit(tx.init, out_shardings=layout)(params)
        assert jax.tree.structure(state) == jax.tree.structure(layout)
        abstract = sharding.abstract_state(tx, params)
        for x, shape in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
            assert (x.shape, x.dtype, x.sharding) == (shape.shape, shape.dtype, shape.sharding)


def test_shapes_that_do_not_say_where_they_lie_are_on_the_default_device() -> None:
    shapes = {"w": jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)}
    abstract = sharding.abstract_state(rmsprop(), shapes)
    assert abstract.square_avg["w"] == jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=jnp.zeros(()).sharding)


def test_one_device_has_no_copies() -> None:
    assert sharding.check_replicas({"w": jnp.ones(3), "step": 0}) == 0
