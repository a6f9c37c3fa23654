"""How close does a compiled step come to the bandwidth of an accelerator's memory, and to PyTorch?

``python -m benchmarks --device`` measures on the GPU or TPU that JAX sees, as ``benchmarks.step`` does on a CPU. One
array of 128M has plain RMSProp and centered with momentum, in float32, in bfloat16, and with a state in 8 bits. A
thousand small arrays cost calls instead. PyTorch takes part where it computes on the same kind of device: its loop, its
``foreach`` and its compiled step.

``bandwidth`` is what a step cannot do without, over its time: parameters and slots read and written, gradients read. It
is compared with that of the copy, which reads and writes parameters and slots. Aims: 90 % of the copy's bandwidth, and
no longer than PyTorch's compiled step.
"""

from typing import Any

from benchmarks import peers, step
from benchmarks.trees import HUGE

LARGE, SMALL = HUGE, "1000 × 256"
DTYPES = ("float32", "bfloat16", "8 bits")


def measure(full: bool, large: str = LARGE, small: str = SMALL, everybody: bool = True) -> list[dict[str, Any]]:
    """A row for every tree, variant and dtype; with ``full``, all variants. The other arguments are for tests."""
    variants = tuple(peers.VARIANTS) if full else peers.BOTH_ENDS
    kinds = [(large, dtype) for dtype in DTYPES] + [(small, "float32")]  # arrays of 256 are not encoded
    return [step.row(tree, variant, dtype, everybody) for tree, dtype in kinds for variant in variants]


def refusal(platform: str) -> str | None:
    """Why nothing can be measured here."""
    if platform == "cpu":
        return "JAX sees only CPUs here; install the plugin of the accelerator, for example: pip install 'jax[cuda12]'"
    return None
