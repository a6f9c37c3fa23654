"""What every test runs under. Warnings are errors too: see ``[tool.pytest.ini_options]`` in pyproject.toml."""

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jaxlib.version
import pytest

from rmsprop_jax import lift

# XLA compiles the program of a test for longer than it runs. The quick options halve that. The users' options are XLA's
# own defaults: tests ask for them where it matters what XLA makes of a program. Later versions do not know the second
# option, and XLA ends a process with an option in XLA_FLAGS that it does not know.
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}
USERS: dict[str, Any] = {"xla_backend_optimization_level": 3}
if jaxlib.version.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False
    USERS["xla_cpu_use_fusion_emitters"] = True
_FLAGS = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]


def pytest_configure(config: pytest.Config) -> None:
    """Lets all processes of one run compile quickly, and share what they compile: workers, kernels, and scripts.

    The folder is new for every run and removed after it, so nothing that another version or another machine compiled is
    ever used. ``make portability`` brings a folder, and measures the programs that users run.
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
    os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")])


def users_flags() -> str:
    """``XLA_FLAGS`` without those that this file adds: for a process that compiles as a user's does."""
    return " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in _FLAGS)


@functools.cache
def users_update() -> Callable[..., Any]:
    """The program of an update, compiled as users compile it."""
    inlined = lift._update_tree
    program = jax.jit(inlined.__wrapped__, static_argnames=("algorithm", "decays"), compiler_options=USERS)

    @functools.wraps(inlined)
    def update(*args: Any) -> Any:
        is_part = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args))
        return (inlined if is_part else program)(*args)

    update._cache_size = program._cache_size  # type: ignore[attr-defined]
    return update


@pytest.fixture
def optimized(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update outside ``jax.jit`` is the program that users run, for tests of what XLA makes of it."""
    monkeypatch.setattr(lift, "_update_tree", users_update())


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
