"""``make test-device`` runs tests of six subjects on the accelerator that JAX sees, and says so where it sees none.

The tests are those of the CPU, with ``@pytest.mark.device(subject)``. On an accelerator, none of them has run so far. A
compiler that divides or takes roots less exactly than IEEE 754 asks for may need wider tolerances, and a TPU computes
float64 in software.
"""

import ast
import pathlib
import sys
from collections.abc import Iterator

import jax
import pytest

SUBJECTS = {
    "parity": "the published rule in NumPy's float64, and torch where it is installed",
    "dialects": "the recordings of other libraries in tests/golden",
    "centered": "the variance of almost constant gradients",
    "donation": "parameters and state are overwritten, and nothing else is allocated",
    "storage": "a state in 8 and 16 bits",
    "program": "a step is one program, compiled once",
}


def refusal(platform: str, wanted: str) -> str | None:
    """Why the tests would say nothing about a device."""
    if platform == "cpu" and wanted != "cpu":
        return (
            "JAX sees no accelerator here; install its plugin, for example with pip install 'jax[cuda12]', or try the "
            "tests on the CPU with DEVICE=cpu"
        )
    return None


def marked() -> Iterator[tuple[str, str]]:
    """Subject and name of every test for a device."""
    for path in sorted(pathlib.Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if ast.unparse(mark).startswith("pytest.mark.device("):
                    yield ast.literal_eval(mark.args[0]), f"{path.name}::{node.name}"


def test_every_subject_has_a_test_for_devices() -> None:
    found = list(marked())
    assert {subject for subject, _ in found} == SUBJECTS.keys()
    assert len({name for _, name in found}) == len(found)


@pytest.mark.parametrize(("platform", "wanted"), [("gpu", ""), ("tpu", ""), ("cpu", "cpu")])
def test_accelerators_and_a_cpu_that_is_asked_for_are_taken(platform: str, wanted: str) -> None:
    assert refusal(platform, wanted) is None


def test_a_cpu_is_refused_with_the_way_out() -> None:
    assert "no accelerator here" in (refusal("cpu", "") or "")


if __name__ == "__main__":
    print(f"test-device: {jax.devices()[0].device_kind}, for {', '.join(SUBJECTS)}")
    sys.exit(refusal(jax.default_backend(), sys.argv[1]))
