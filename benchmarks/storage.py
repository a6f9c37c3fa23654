"""How many bytes does the state take, and the weights with it? Of two models, in 32, 16 and 8 bits.

Nothing is allocated. Our state and Optax's are what ``init`` returns for the shapes, torch's is made on its device
"meta", and that of bitsandbytes follows from its blocks. Steps and other single numbers are not counted.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import peers
from benchmarks.trees import TREES, Shape, parameters
from rmsprop_jax import storage

MODELS = ("ResNet-50", "GPT-2 small")
VARIANTS = ("plain", "momentum", "centered + momentum")
BLOCK, SMALLEST = 256, 4096  # of bitsandbytes: numbers that share a float32, and from which size on arrays are encoded


def measure(full: bool) -> list[dict[str, Any]]:
    """A row for every model and variant; ``full`` changes nothing."""
    return [row(model, variant) for model in MODELS for variant in VARIANTS]


def row(model: str, variant: str) -> dict[str, Any]:
    shapes = TREES[model]
    return {
        "model": model,
        "variant": variant,
        "parameters": parameters(shapes),
        "per_value": {str(bits): per_value(shapes, variant, bits) for bits in (8, 16)},
        "per_parameter": per_parameter(shapes, variant),
    }


def placeholders(shapes: list[Shape], dtype: str = "float32") -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def arrays(tx: optax.GradientTransformation, params: list[jax.ShapeDtypeStruct]) -> list[jax.ShapeDtypeStruct]:
    """The arrays of the state, without single numbers."""
    return [array for array in jax.tree.leaves(jax.eval_shape(tx.init, params)) if array.ndim]


def size(arrays: list[jax.ShapeDtypeStruct]) -> int:
    """In bytes."""
    return sum(array.size * array.dtype.itemsize for array in arrays)


def per_value(shapes: list[Shape], variant: str, bits: int) -> dict[str, float]:
    """Bytes per number of the state: of the encoded arrays with their scales, and of all arrays; and who is small."""
    inner = peers.ours(**peers.VARIANTS[variant])
    params = placeholders(shapes)
    state = jax.tree.leaves(
        jax.eval_shape(storage.compress(inner, bits).init, params), is_leaf=lambda x: isinstance(x, storage.Encoded)
    )
    encoded = [x for x in state if isinstance(x, storage.Encoded)]
    values, values_encoded = sum(x.size for x in arrays(inner, params)), sum(math.prod(x.shape) for x in encoded)
    return {
        "encoded": size(jax.tree.leaves(encoded)) / values_encoded,
        "all": size(arrays(storage.compress(inner, bits), params)) / values,
        "share of small arrays": 1 - values_encoded / values,
    }


def per_parameter(shapes: list[Shape], variant: str) -> dict[str, dict[str, float]]:
    """Bytes of weights and of state per parameter, for every library that has the variant."""
    arguments, count = peers.VARIANTS[variant], parameters(shapes)
    ours = peers.ours(**arguments)
    states = {
        "torch": size_of_torch(shapes, **arguments),
        "optax": size(arrays(peers.optax_rmsprop(**arguments), placeholders(shapes))),
        "ours": size(arrays(ours, placeholders(shapes))),
        "ours, 16 bits": size(arrays(storage.compress(ours, 16), placeholders(shapes))),
        "ours, 8 bits": size(arrays(storage.compress(ours, 8), placeholders(shapes))),
        "ours, 8 bits, bfloat16 weights": size(arrays(storage.compress(ours, 8), placeholders(shapes, "bfloat16"))),
    }
    if variant == "plain":  # bitsandbytes ignores momentum in 8 bits, and refuses centered
        states["bitsandbytes, 8 bits"] = sum(map(size_of_bitsandbytes, shapes))
    weights = {name: jnp.dtype("bfloat16" if "bfloat16" in name else "float32").itemsize for name in states}
    return {name: {"weights": weights[name], "state": size / count} for name, size in states.items()}


def size_of_torch(shapes: list[Shape], **arguments: Any) -> int:
    """The bytes of the state that ``torch.optim.RMSprop`` has after a step."""
    import torch

    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer = torch.optim.RMSprop(params, foreach=False, **arguments)
    optimizer.step()
    slots = [slot for state in optimizer.state.values() for slot in state.values()]
    return sum(slot.nbytes for slot in slots if slot.ndim)


def size_of_bitsandbytes(shape: Shape) -> int:
    """The bytes of the state of ``bitsandbytes.optim.RMSprop8bit`` for one array: a code each, a float32 per block."""
    count = math.prod(shape)
    return count + 4 * math.ceil(count / BLOCK) if count >= SMALLEST else 4 * count
