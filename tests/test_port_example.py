"""``examples/port_from_torch.py`` does what it says, run as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flax.nnx")
pytest.importorskip("sklearn")

EXAMPLE = Path(__file__).parent.parent / "examples" / "port_from_torch.py"


@pytest.mark.script
def test_ported_run_has_the_losses_of_the_run_that_stayed(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    command = [sys.executable, str(EXAMPLE), "--output", str(tmp_path / "new")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    assert (process.returncode, process.stderr) == (0, "")
    header, *rows, losses, back, parameters = process.stdout.splitlines()
    assert header.split() == ["step", "loss", "in", "PyTorch", "loss", "in", "JAX"]
    steps, stay, move = zip(*(map(float, row.split()) for row in rows), strict=True)
    assert steps == tuple(range(40, 80))
    assert len(set(stay)) == 40
    # Losses of 0.1 to 0.5, of 64 images, in float32: two libraries add in different orders. Measured: 6e-8, and
    # 1.2e-7 for the parameters, which are below 1. Without the state in the file the losses differ by 1.9.
    largest = float(re.fullmatch(r"largest difference of the losses: (\S+)", losses)[1])
    assert largest == pytest.approx(max(abs(a - b) for a, b in zip(stay, move, strict=True)), abs=2e-7)
    assert largest < 5e-6
    a, b = re.fullmatch(r"back in PyTorch, step 80: loss (\S+), and (\S+) by way of JAX", back).groups()
    assert float(a) == pytest.approx(float(b), abs=5e-6)
    assert float(re.fullmatch(r"largest difference of the parameters after it: (\S+)", parameters)[1]) < 5e-6
    assert torch.load(tmp_path / "new" / "checkpoint.pt", weights_only=True).keys() == {
        "model",
        "optimizer",
        "scheduler",
    }
