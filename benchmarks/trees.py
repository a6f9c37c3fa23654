"""The shapes of the parameter trees that are measured: five regular ones, and three of real models.

Of the real models only the shapes are here, written down from the architectures; the number of arrays and of
parameters is checked by ``tests/test_benchmarks.py`` against the published ones.
"""

import math
from collections.abc import Iterator

Shape = tuple[int, ...]


def resnet50() -> Iterator[Shape]:
    """ResNet-50 v1.5, 1,000 classes (He et al., arXiv:1512.03385): 161 arrays, 25,557,032 parameters."""

    def convolution(size: int, inputs: int, outputs: int) -> Iterator[Shape]:
        yield from [(size, size, inputs, outputs), (outputs,), (outputs,)]  # and batch norm's scale and bias

    yield from convolution(7, 3, 64)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from convolution(1, inputs, width)
            yield from convolution(3, width, width)
            yield from convolution(1, width, 4 * width)
            if block == 0:
                yield from convolution(1, inputs, 4 * width)
            inputs = 4 * width
    yield from [(2048, 1000), (1000,)]


def gpt2_small() -> Iterator[Shape]:
    """GPT-2 small (Radford et al. 2019): 148 arrays, 124,439,808 parameters."""
    width = 768
    yield from [(50257, width), (1024, width)]
    for _ in range(12):
        yield from [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
        yield from [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    yield from [(width,), (width,)]


def efficientnet_b0() -> Iterator[Shape]:
    """EfficientNet-B0, 1,000 classes (Tan and Le, arXiv:1905.11946): 213 arrays, 5,288,548 parameters."""

    def convolution(size: int, inputs: int, outputs: int) -> Iterator[Shape]:
        yield from [(size, size, inputs, outputs), (outputs,), (outputs,)]

    yield from convolution(3, 3, 32)
    inputs = 32
    stages = [
        (1, 3, 16, 1),
        (6, 3, 24, 2),
        (6, 5, 40, 2),
        (6, 3, 80, 3),
        (6, 5, 112, 3),
        (6, 5, 192, 4),
        (6, 3, 320, 1),
    ]
    for expansion, size, outputs, blocks in stages:
        for _ in range(blocks):
            wide, squeezed = expansion * inputs, inputs // 4
            if expansion > 1:
                yield from convolution(1, inputs, wide)
            yield from convolution(size, 1, wide)
            yield from [(wide, squeezed), (squeezed,), (squeezed, wide), (wide,)]
            yield from convolution(1, wide, outputs)
            inputs = outputs
    yield from convolution(1, 320, 1280)
    yield from [(1280, 1000), (1000,)]


HUGE = "1 × 128M"  # for accelerators
TREES: dict[str, list[Shape]] = {
    HUGE: [(1 << 13, 1 << 14)],
    "1 × 16M": [(1 << 24,)],
    "16 × 1M": [(1 << 20,)] * 16,
    "200 × 16k": [(1 << 14,)] * 200,
    "1000 × 256": [(256,)] * 1000,
    "ResNet-50": list(resnet50()),
    "GPT-2 small": list(gpt2_small()),
    "EfficientNet-B0": list(efficientnet_b0()),
}


def parameters(shapes: list[Shape]) -> int:
    """How many numbers the tree holds."""
    return sum(math.prod(shape) for shape in shapes)
