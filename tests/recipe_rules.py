"""Every recipe a second time, in Python and NumPy, from the sources alone. Nothing of the package is imported.

A learning rate is a function of the number of updates so far and of the arguments, with the source's defaults.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import reference

IMAGENET = 1_281_167
Tree = dict[str, np.ndarray]


# --- Learning rates ------------------------------------------------------------------------------------------


def dreamer_v3(n: int, lr: float = 4e-5, warmup: int = 1000) -> float:
    return lr * n / warmup if n < warmup else lr


def cleanba_impala(n: int, updates: int = 50_000_000 // (64 * 20 * 2), lr: float = 6e-4, minibatches: int = 4) -> float:
    return lr * max(0.0, 1 - (n // minibatches) / updates)


def impala(n: int, frames_per_update: int = 2 * 100 * 4, total_frames: float = 1e9, lr: float = 0.00048) -> float:
    return lr * (1 - min(n * frames_per_update, total_frames) / total_frames)


def impala_dmlab30(
    n: int, frames_per_update: int = 32 * 100 * 4, total_frames: float = 1e10, lr: float = 0.00031866995608948655
) -> float:
    return lr * (1 - min(n * frames_per_update, total_frames) / total_frames)


def torchbeast(
    n: int, total_steps: int = 100_000, unroll_length: int = 80, batch_size: int = 8, lr: float = 0.00048
) -> float:
    return lr * (1 - min(n * unroll_length * batch_size, total_steps) / total_steps)


def a2c_baselines(n: int, samples_per_update: int = 80, total_steps: int = 80_000_000, lr: float = 7e-4) -> float:
    value = 0.0
    for sample in range(n * samples_per_update, (n + 1) * samples_per_update):  # the last one counts
        value = lr * (1 - sample / total_steps)
    return max(0.0, value)


def a3c(n: int, total_steps: int = 8 * 10**7, steps_per_update: int = 5, lr: float = 7e-4) -> float:
    t = 1
    for _ in range(n + 1):  # acts, and learns in the call after the last act
        t += steps_per_update
    return max(0.0, (total_steps - t - 1) / total_steps * lr)


def dpo(n: int, lr: float = 5e-7, warmup: int = 150) -> float:
    return lr * min(1.0, (n + 1) / (warmup + 1))


def char_rnn(n: int, steps_per_epoch: int = 100, lr: float = 2e-3, decay: float = 0.97, decay_after: int = 10) -> float:
    epochs = n // steps_per_epoch  # that have ended; the rate falls at the end of each from the tenth on
    return lr * decay ** max(0, epochs - decay_after + 1)


def efficientnet(
    n: int,
    batch_size: int = 2048,
    steps_per_epoch: float | None = None,
    lr: float = 0.016,
    images: int = IMAGENET,
    decay: float = 0.97,
    epochs_per_decay: float = 2.4,
    warmup_epochs: float = 5,
) -> float:
    epoch = images / batch_size if steps_per_epoch is None else steps_per_epoch
    peak = lr * batch_size / 256.0
    warmup_steps = int(warmup_epochs * epoch)
    return peak * n / warmup_steps if n < warmup_steps else peak * decay ** math.floor(n / (epoch * epochs_per_decay))


def mnasnet(
    n: int, batch_size: int = 1024, steps_per_epoch: float | None = None, lr: float = 0.016, **shape: float
) -> float:
    return efficientnet(n, batch_size, steps_per_epoch, lr, **shape)


def efficientnet_v2(
    n: int, batch_size: int = 4096, steps_per_epoch: float | None = None, lr: float = 0.016, **shape: float
) -> float:
    return efficientnet(n, batch_size, steps_per_epoch, lr, images=1_256_144, **shape)


def efficientnet_v2_keras(
    n: int, batch_size: int = 4096, steps_per_epoch: float | None = None, lr: float = 0.016, **shape: float
) -> float:
    return efficientnet(n, batch_size, steps_per_epoch or 1_256_144 // batch_size, lr, **shape)


def efficientnet_b2_timm(
    n: int,
    steps_per_epoch: int = 5004,
    lr: float = 0.016,
    warmup_epochs: int = 5,
    warmup_lr: float = 1e-6,
    decay: float = 0.97,
    epochs_per_decay: float = 2.4,
) -> float:
    e = n // steps_per_epoch
    if e < warmup_epochs:
        return warmup_lr + e * (lr - warmup_lr) / warmup_epochs
    return lr * decay ** (e // epochs_per_decay)


def mobilenet_v3(
    n: int, steps_per_epoch: int = 100, lr: float = 0.064, decay: float = 0.973, epochs_per_decay: int = 2
) -> float:
    return lr * decay ** (n // steps_per_epoch // epochs_per_decay)


def inception_v3(
    n: int, steps_per_epoch: int = 100, lr: float = 0.045, decay: float = 0.94, epochs_per_decay: int = 2
) -> float:
    return lr * decay ** (n // steps_per_epoch // epochs_per_decay)


def inception_v3_tpu(
    n: int,
    batch_size: int = 1024,
    steps_per_epoch: float | None = None,
    lr: float = 0.165,
    decay: float = 0.94,
    epochs_per_decay: float = 3,
    floor: float = 1e-4,
) -> float:
    peak = lr * batch_size / 256
    stair = int(epochs_per_decay * (IMAGENET / batch_size if steps_per_epoch is None else steps_per_epoch))
    return max(peak * decay ** (n // stair), floor * peak)


def inception_v4_tpu(
    n: int,
    batch_size: int = 256,
    steps_per_epoch: float | None = None,
    lr: float = 0.15,
    decay: float = 0.94,
    epochs_per_decay: float = 2,
    floor: float = 1e-4,
    cold_lr: float = 0.001,
) -> float:
    epoch = IMAGENET / batch_size if steps_per_epoch is None else steps_per_epoch
    initial = lr * batch_size / 256 / decay ** ((2 + 1) / 2)
    e = int(n / epoch)
    if e < 1:
        rate = cold_lr
    elif e < 3:
        rate = e * initial / 3
    else:
        rate = initial * decay ** (n // int(epochs_per_decay * epoch))
    return max(rate, floor * initial)


def amoebanet_d(
    n: int,
    steps_per_epoch: int = IMAGENET // 256,
    lr: float = 0.64,
    decay: float = 0.9,
    warmup_epochs: float = 3.0,
    floor: float = 1e-4,
) -> float:
    warmup = int(warmup_epochs * steps_per_epoch)
    return max(floor * lr, lr * n / warmup if n < warmup else lr * decay ** (n // steps_per_epoch))


def nasbench_101(n: int, total_steps: int = 108 * 40_000 // 256, lr: float = 0.1 * 2) -> float:
    if n == 0:
        return 0.0
    return 0.5 * lr * (1 + math.cos(math.pi * min(n, total_steps) / total_steps))


def unet_fastmri(
    n: int, steps_per_epoch: int = 100, lr: float = 1e-3, decay: float = 0.1, epochs_per_decay: int = 40
) -> float:
    return lr * decay ** (n // steps_per_epoch // epochs_per_decay)


RATES: dict[str, Callable[..., float]] = {
    f.__name__: f
    for f in (
        *(dreamer_v3, cleanba_impala, impala, impala_dmlab30, torchbeast, a2c_baselines, a3c, dpo, char_rnn),
        *(efficientnet, mnasnet, efficientnet_v2, efficientnet_v2_keras, efficientnet_b2_timm, mobilenet_v3),
        *(inception_v3, inception_v3_tpu, inception_v4_tpu, amoebanet_d, nasbench_101, unet_fastmri),
    )
}

# Steps at which something changes with the defaults above; each is tried with the step before and the one after.
BOUNDARIES: dict[str, Sequence[float]] = {
    "dreamer_v3": (1, 500, 1000, 5000),
    "cleanba_impala": (4, 8, 4 * 9766, 4 * 19_531, 4 * 20_000),
    "impala": (1, 625_000, 1_250_000, 2_000_000),
    "impala_dmlab30": (1, 400_000, 781_250, 900_000),
    "torchbeast": (1, 100, 156, 157, 200),
    "a2c_baselines": (1, 500_000, 999_999, 1_000_001),
    "a3c": (1, 1000, 5000),
    "dpo": (1, 75, 150, 500),
    "char_rnn": (900, 1000, 1100, 5000),
    "efficientnet": (1, 625, 3127, 3128, 2 * 1501.3677, 3 * 1501.3677, 10 * 1501.3677, 218_949),
    "mnasnet": (1, 6255, 3 * 3002.735, 437_898),
    "efficientnet_v2": (1, 1533, 3 * 736.0219, 107_336),
    "efficientnet_v2_keras": (1, 1530, 3 * 734.4, 107_100),
    "efficientnet_b2_timm": (5004, 5 * 5004, 8 * 5004, 12 * 5004, 36 * 5004, 60 * 5004, 72 * 5004, 240 * 5004),
    "mobilenet_v3": (200, 400, 60_000),
    "inception_v3": (200, 400, 60_000),
    "inception_v3_tpu": (3753, 2 * 3753, 213_000, 149 * 3753),
    "inception_v4_tpu": (5004.5586, 2 * 5004.5586, 15_013.68, 10_009, 2 * 10_009, 80_000, 149 * 10_009),
    "amoebanet_d": (1, 2, 15_012, 20_016, 88 * 5004, 240_240),
    "nasbench_101": (1, 8437, 16_874, 16_876),
    "unet_fastmri": (4000, 8000),
}


# --- The whole rule ------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """One recipe: arguments with which 200 updates cross its boundaries, and what the source then does."""

    numbers: dict[str, Any]
    arguments: dict[str, Any] = {}  # noqa: RUF012
    clip: tuple[str, float] = ("none", 0.0)
    limit: float = math.inf  # of the weights
    mask: bool = False  # whether b does not decay

    def rate(self, name: str) -> Callable[[int], float]:
        if name not in RATES:
            return lambda n: self.numbers["lr"]
        known = {key: value for key, value in self.arguments.items() if key not in ("weight_decay_mask", "momentum")}
        return lambda n: RATES[name](n, **known)


def tensorflow(alpha: float, momentum: float, eps: float, **more: Any) -> dict[str, Any]:
    """TF1 holds its numbers in float32. The average starts from 1."""
    held = {"alpha": alpha, "momentum": momentum, "eps": eps}
    return tf(**{key: float(np.float32(value)) for key, value in held.items()}) | more


def tf(alpha: float, momentum: float, eps: float, **more: Any) -> dict[str, Any]:
    rest = dict(initial_scale=1.0, eps_in_sqrt=True, lr_in_buffer=True)
    return dict(alpha=alpha, momentum=momentum, eps=eps, **rest) | more


MASK = {"weight_decay_mask": {"w": True, "b": False}}
GOOGLE = tf(0.9, 0.9, 1e-3, weight_decay=1e-5)
EPS_OF_1 = tf(0.9, 0.9, 1.0, weight_decay=4e-5)

RULES: Mapping[str, Rule] = {
    "dreamer_v3": Rule(
        dict(alpha=0.999, eps=1e-20, momentum=0.9, averaged_steps=True, bias_correction=True),
        {"warmup": 50},
        clip=("parameter", 0.3),
    ),
    "cleanba_impala": Rule(dict(alpha=0.99, eps=0.01), {"updates": 40}, clip=("norm", 40.0)),
    "impala": Rule(tensorflow(0.99, 0.0, 0.1), {"frames_per_update": 640, "total_frames": 100_000.0}),
    "impala_dmlab30": Rule(tensorflow(0.99, 0.0, 0.1), {"frames_per_update": 640, "total_frames": 100_000.0}),
    "torchbeast": Rule(dict(alpha=0.99, eps=0.01), clip=("norm", 40.0)),
    "dqn_nature": Rule(dict(lr=2.5e-4, alpha=0.95, eps=0.01, centered=True, eps_in_sqrt=True)),
    "dqn_dopamine": Rule(tensorflow(0.95, 0.0, 1e-5, centered=True, lr=float(np.float32(2.5e-4)))),
    "dqn_zoo": Rule(dict(lr=2.5e-4, alpha=0.95, eps=0.01 / 32**2, centered=True, eps_in_sqrt=True)),
    "dqn_zoo_prioritized": Rule(
        dict(lr=0.00025 / 4, alpha=0.95, eps=(0.01 / 32**2) * (1 / 4) ** 2, centered=True, eps_in_sqrt=True)
    ),
    "dqn_minatar": Rule(dict(lr=2.5e-4, alpha=0.95, eps=0.01, centered=True)),
    "a2c": Rule(dict(lr=7e-4, alpha=0.99, eps=1e-5), clip=("norm", 0.5)),
    "a2c_atari": Rule(dict(lr=7e-4, alpha=0.99, eps=1e-5, eps_in_sqrt=True, initial_scale=1.0), clip=("norm", 0.5)),
    "a2c_baselines": Rule(
        tensorflow(0.99, 0.0, 1e-5), {"samples_per_update": 80, "total_steps": 12_000}, clip=("norm", 0.5)
    ),
    "a3c": Rule(dict(alpha=0.99, eps=0.1, eps_in_sqrt=True), {"total_steps": 800}, clip=("norm", 40.0)),
    "qmix": Rule(dict(lr=0.0005, alpha=0.99, eps=0.00001), clip=("norm", 10.0)),
    "coma": Rule(dict(lr=0.0005, alpha=0.99, eps=0.00001), clip=("norm", 10.0)),
    "douzero": Rule(dict(lr=0.0001, alpha=0.99, eps=1e-5), clip=("norm", 40.0)),
    "dpo": Rule(dict(alpha=0.99, eps=1e-8), clip=("norm", 10.0)),
    "char_rnn": Rule(dict(alpha=0.95, eps=1e-8), {"steps_per_epoch": 9}, clip=("entries", 5.0)),
    "graves": Rule(
        dict(lr=1e-4, alpha=0.95, eps=1e-4, momentum=0.9, centered=True, eps_in_sqrt=True, lr_in_buffer=True)
    ),
    "dnc": Rule(tensorflow(0.9, 0.0, 1e-10, lr=float(np.float32(1e-4))), clip=("norm", 50.0)),
    "ntm": Rule(dict(lr=1e-4, alpha=0.95, eps=1e-8, momentum=0.9), clip=("entries", 10.0)),
    "li_gru": Rule(dict(lr=0.0004, alpha=0.95, eps=1e-8)),
    "efficientnet": Rule(GOOGLE, {"steps_per_epoch": 10.3, **MASK}, mask=True),
    "mnasnet": Rule(GOOGLE, {"steps_per_epoch": 11.7, **MASK}, mask=True),
    "efficientnet_v2": Rule(GOOGLE, {"steps_per_epoch": 9.9, **MASK}, mask=True),
    "efficientnet_v2_keras": Rule(
        dict(alpha=0.9, momentum=0.9, eps=1e-3, eps_in_sqrt=True, lr_in_buffer=True), {"steps_per_epoch": 10}
    ),
    "amoebanet_d": Rule(EPS_OF_1, {"steps_per_epoch": 2, **MASK}, mask=True),
    "inception_v3_tpu": Rule(EPS_OF_1, {"steps_per_epoch": 0.4, **MASK}, mask=True),
    "inception_v4_tpu": Rule(EPS_OF_1, {"steps_per_epoch": 20.7, **MASK}, mask=True),
    "nasbench_101": Rule(EPS_OF_1 | dict(weight_decay=1e-4), {"total_steps": 150}),
    "efficientnet_b2_timm": Rule(GOOGLE, {"steps_per_epoch": 5, **MASK}, mask=True),
    "mobilenet_v3": Rule(dict(alpha=0.9, eps=0.0316, momentum=0.9, weight_decay=1e-5), {"steps_per_epoch": 10}),
    "inception_v3": Rule(tensorflow(0.9, 0.9, 1.0), {"steps_per_epoch": 10, "momentum": 0.9}, clip=("norm", 2.0)),
    "unet": Rule(dict(lr=1e-5, alpha=0.99, eps=1e-8, momentum=0.999, weight_decay=1e-8), clip=("norm", 1.0)),
    "unet_fastmri": Rule(dict(alpha=0.99, eps=1e-8), {"steps_per_epoch": 2}),
    "wgan_generator": Rule(dict(lr=0.00005, alpha=0.99, eps=1e-8)),
    "wgan_critic": Rule(dict(lr=0.00005, alpha=0.99, eps=1e-8), limit=0.01),
}


def run(name: str, params: Tree, gradients: Sequence[Tree]) -> Iterator[Tree]:
    """The parameters after every update."""
    rule = RULES[name]
    now = dict(params)

    def seen(leaf: str) -> Iterator[np.ndarray]:
        for gradient in gradients:
            yield clipped(rule.clip, gradient, now)[leaf]

    numbers = {key: value for key, value in rule.numbers.items() if key != "lr"} | {"lr": rule.rate(name)}
    plain = {key: value for key, value in numbers.items() if key != "weight_decay"}
    of_leaf = {leaf: plain if rule.mask and leaf == "b" else numbers for leaf in params}
    runs = {leaf: reference.rmsprop(p, seen(leaf), **of_leaf[leaf]) for leaf, p in params.items()}  # type: ignore[arg-type]
    for _ in gradients:
        moments = {leaf: next(steps) for leaf, steps in runs.items()}
        now |= {leaf: np.clip(now[leaf] + m.update, -rule.limit, rule.limit) for leaf, m in moments.items()}
        yield dict(now)


def clipped(clip: tuple[str, float], gradient: Tree, params: Tree) -> Tree:
    kind, limit = clip
    if kind == "norm":
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
        return {leaf: g * min(1.0, limit / norm) for leaf, g in gradient.items()}
    if kind == "entries":
        return {leaf: np.clip(g, -limit, limit) for leaf, g in gradient.items()}
    if kind == "parameter":
        sizes = {leaf: limit * max(1e-3, float(np.linalg.norm(p))) for leaf, p in params.items()}
        return {leaf: g / max(1.0, float(np.linalg.norm(g)) / sizes[leaf]) for leaf, g in gradient.items()}
    return gradient
