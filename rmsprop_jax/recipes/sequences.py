"""Recipes for language, speech and other sequences."""

import functools

import chex
import optax
from optax import GradientTransformationExtraArgs, ScalarOrSchedule

from rmsprop_jax import dialects
from rmsprop_jax.recipes import schedules
from rmsprop_jax.recipes.clipping import clip_by_global_norm, clip_entries
from rmsprop_jax.recipes.entry import recipe
from rmsprop_jax.transform import rmsprop

__all__ = ["char_rnn", "dnc", "dpo", "graves", "li_gru", "ntm"]

_recipe = functools.partial(recipe, family="sequences")


@_recipe(
    dialect="torch",
    gradient="the mean over the batch of the loss of a preference pair, whose log-probabilities are summed over tokens",
    source="github.com/eric-mitchell/direct-preference-optimization",
    commit="f8b8c0f",
    files="config/config.yaml, trainers.py",
)
def dpo(
    lr: ScalarOrSchedule = 5e-7,
    warmup: int = 150,
    *,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    max_norm: chex.Numeric = 10.0,
) -> GradientTransformationExtraArgs:
    """The original DPO: torch's RMSProp and defaults, global norm 10, learning rate 5e-7 after a linear warm-up.

    The first update has 1/151 of the learning rate, the 151st all of it. The code uses the same optimizer for the
    supervised phase. (The paper's appendix says 1e-6.)
    """
    rate = lr if callable(lr) else schedules.dpo(lr, warmup=warmup)
    return optax.chain(clip_by_global_norm(max_norm), rmsprop(rate, alpha, eps))


@_recipe(
    dialect="torch",
    gradient="the sum over 50 time steps of the mean over the batch of 50; on a mean over time, the limit is 0.1",
    source="github.com/karpathy/char-rnn",
    commit="6f9487a",
    files="train.lua; eps and the start of the average in github.com/torch/optim at a5ceed7, rmsprop.lua",
)
def char_rnn(
    steps_per_epoch: int,
    lr: ScalarOrSchedule = 2e-3,
    *,
    alpha: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-8,
    limit: chex.Numeric = 5.0,
) -> GradientTransformationExtraArgs:
    """char-rnn: gradients clipped to ±5 each, alpha 0.95, learning rate 2e-3, × 0.97 per epoch from the 11th on.

    Torch7's ``optim.rmsprop`` is torch's without momentum. Between June and September 2016, its average started at 1.
    """
    rate = lr if callable(lr) else schedules.char_rnn(steps_per_epoch, lr)
    return optax.chain(clip_entries(limit), rmsprop(rate, alpha, eps))


@_recipe(
    dialect="optax",
    gradient="the sum over the sequence",
    caller="clipping on the way back: ±100 at the outputs of the network, ±10 at the inputs of its LSTM layers",
    source='A. Graves, "Generating Sequences With Recurrent Neural Networks", arXiv:1308.0850v5',
    files="eq. 38-45",
)
def graves(
    lr: ScalarOrSchedule = 1e-4,
    *,
    alpha: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-4,
    momentum: ScalarOrSchedule = 0.9,
) -> GradientTransformationExtraArgs:
    """Graves' handwriting: centered, 1e-4 under the root, learning rate 1e-4 inside a momentum of 0.9.

    The paper does not say what the averages start from; here it is 0.
    """
    return dialects.optax(lr, alpha, eps, centered=True, momentum=momentum)


@_recipe(
    dialect="tensorflow",
    gradient="the sum over time and bits of the mean over the batch of 16",
    source="github.com/deepmind/dnc",
    commit="d3d94b3",
    files="train.py; decay and momentum are TensorFlow's defaults",
)
def dnc(
    lr: ScalarOrSchedule = 1e-4,
    *,
    alpha: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-10,
    momentum: ScalarOrSchedule = 0.0,
    max_norm: chex.Numeric = 50.0,
) -> GradientTransformationExtraArgs:
    """The differentiable neural computer: TensorFlow's RMSProp, global norm 50, learning rate 1e-4, no momentum."""
    return optax.chain(clip_by_global_norm(max_norm), dialects.tensorflow(lr, alpha, momentum, eps))


@_recipe(
    dialect="torch",
    gradient="the mean over time, batch and bits",
    source="github.com/loudinthecloud/pytorch-ntm",
    commit="3c64937",
    files="tasks/copytask.py, train.py",
)
def ntm(
    lr: ScalarOrSchedule = 1e-4,
    *,
    alpha: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-8,
    momentum: ScalarOrSchedule = 0.9,
    limit: chex.Numeric = 10.0,
) -> GradientTransformationExtraArgs:
    """The neural Turing machine in pytorch-ntm: momentum 0.9, gradients clipped to ±10 each, learning rate 1e-4."""
    return optax.chain(clip_entries(limit), rmsprop(lr, alpha, eps, momentum=momentum))


@_recipe(
    dialect="torch",
    gradient="the mean over the frames of the batch",
    caller="halving the learning rate for the epochs after one in which the error fell by less than 0.1%",
    source="github.com/mravanelli/pytorch-kaldi",
    commit="9773257",
    files="cfg/TIMIT_baselines/TIMIT_liGRU_fmllr.cfg",
)
def li_gru(
    lr: ScalarOrSchedule = 4e-4, *, alpha: ScalarOrSchedule = 0.95, eps: ScalarOrSchedule = 1e-8
) -> GradientTransformationExtraArgs:
    """Li-GRU in pytorch-kaldi: torch's RMSProp with alpha 0.95, learning rate 4e-4 (2e-4 on Librispeech)."""
    return rmsprop(lr, alpha, eps)
