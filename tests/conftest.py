"""What every test runs under. Warnings are errors too: see ``[tool.pytest.ini_options]`` in pyproject.toml."""

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator

import jax
import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Lets all processes of one run share what they compile: workers, kernels of notebooks, and scripts.

    The folder is new for every run and removed after it, so nothing that another version or another machine compiled is
    ever used.
    """
    if hasattr(config, "workerinput") or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="rmsprop_jax-compiled-")
    config.add_cleanup(functools.partial(shutil.rmtree, folder, ignore_errors=True))
    options = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # for all processes that this one starts


@pytest.fixture(autouse=True)
def ranks_are_never_promoted() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit JAX for one test."""
    if hasattr(jax, "enable_x64"):
        enable = jax.enable_x64
    else:  # JAX before 0.8
        from jax.experimental import enable_x64 as enable
    with enable(True):
        yield
