"""Recipes for images."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import optax
from optax import GradientTransformationExtraArgs, ScalarOrSchedule

from rmsprop_jax import dialects
from rmsprop_jax.recipes import schedules
from rmsprop_jax.recipes.clipping import clip_by_global_norm, hold_weights_within
from rmsprop_jax.recipes.entry import recipe
from rmsprop_jax.transform import rmsprop

__all__ = [
    "amoebanet_d",
    "efficientnet",
    "efficientnet_b2_timm",
    "efficientnet_v2",
    "efficientnet_v2_keras",
    "inception_v3",
    "inception_v3_tpu",
    "inception_v4_tpu",
    "mnasnet",
    "mobilenet_v3",
    "nasbench_101",
    "unet",
    "unet_fastmri",
    "wgan_critic",
    "wgan_generator",
]

_recipe = functools.partial(recipe, family="images")
_google = functools.partial(
    _recipe, dialect="timm", gradient="the mean over the batch", source="github.com/tensorflow/tpu", commit="7dc921f"
)
_AVERAGED = "the average of the weights"

Mask = Any | Callable[[optax.Params], Any] | None


# --- Google's --------------------------------------------------------------------------------------------------


@_google(
    caller=f"{_AVERAGED}, 0.9999",
    files="models/official/efficientnet/main.py, utils.py",
)
def efficientnet(
    weight_decay_mask: Mask,
    batch_size: int = 2048,
    steps_per_epoch: chex.Numeric | None = None,
    lr: ScalarOrSchedule = 0.016,
    *,
    alpha: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-3,
    momentum: ScalarOrSchedule = 0.9,
    weight_decay: ScalarOrSchedule = 1e-5,
) -> GradientTransformationExtraArgs:
    """EfficientNet: TensorFlow's RMSProp, 0.016 per 256 images, × 0.97 per 2.4 epochs after 5 epochs of warm-up.

    L2 decay of 1e-5 applies to all variables except those of batch normalization, biases included.
    ``weight_decay_mask`` is True where a weight decays, and ``None`` decays all. The rule is ``dialects.timm``, which
    is TensorFlow's RMSProp with weight decay.
    """
    rate = lr if callable(lr) else schedules.efficientnet(batch_size, steps_per_epoch, lr)
    return dialects.timm(rate, alpha, eps, weight_decay, momentum, weight_decay_mask=weight_decay_mask)


@_google(
    caller=f"{_AVERAGED}, 0.9999",
    files="models/official/mnasnet/configs/mnasnet_config.py 27-30, mnas_utils.py, mnasnet_main.py",
)
def mnasnet(
    weight_decay_mask: Mask,
    batch_size: int = 1024,
    steps_per_epoch: chex.Numeric | None = None,
    lr: ScalarOrSchedule = 0.016,
    *,
    alpha: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-3,
    momentum: ScalarOrSchedule = 0.9,
    weight_decay: ScalarOrSchedule = 1e-5,
) -> GradientTransformationExtraArgs:
    """MnasNet: the optimizer of ``efficientnet``, whose code it shares, for batches of 1,024."""
    rate = lr if callable(lr) else schedules.mnasnet(batch_size, steps_per_epoch, lr)
    return dialects.timm(rate, alpha, eps, weight_decay, momentum, weight_decay_mask=weight_decay_mask)


@_google(
    source="github.com/google/automl",
    commit="6a54c87",
    caller=f"{_AVERAGED}, 0.9999",
    files="efficientnetv2/main.py, utils.py, hparams.py",
)
def efficientnet_v2(
    weight_decay_mask: Mask,
    batch_size: int = 4096,
    steps_per_epoch: chex.Numeric | None = None,
    lr: ScalarOrSchedule = 0.016,
    *,
    alpha: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-3,
    momentum: ScalarOrSchedule = 0.9,
    weight_decay: ScalarOrSchedule = 1e-5,
) -> GradientTransformationExtraArgs:
    """EfficientNetV2: the optimizer of ``efficientnet`` for batches of 4,096; biases do not decay either.

    ``weight_decay_mask`` selects all variables but bias, gamma and beta.
    """
    rate = lr if callable(lr) else schedules.efficientnet_v2(batch_size, steps_per_epoch, lr)
    return dialects.timm(rate, alpha, eps, weight_decay, momentum, weight_decay_mask=weight_decay_mask)


@_recipe(
    dialect="keras",
    gradient="the mean over the batch",
    caller="L2 of 1e-5 on kernels, which is part of the loss: Keras' own weight decay is decoupled",
    source="github.com/google/automl",
    commit="6a54c87",
    files="efficientnetv2/main_tf2.py, utils.py",
)
def efficientnet_v2_keras(
    batch_size: int = 4096,
    steps_per_epoch: chex.Numeric | None = None,
    lr: ScalarOrSchedule = 0.016,
    *,
    alpha: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-3,
    momentum: ScalarOrSchedule = 0.9,
) -> GradientTransformationExtraArgs:
    """EfficientNetV2 by its TensorFlow 2 script: Keras' RMSprop, whose average starts at 0, and whole epochs."""
    rate = lr if callable(lr) else schedules.efficientnet_v2_keras(batch_size, steps_per_epoch, lr)
    return dialects.keras(rate, alpha, momentum, eps)


@_google(
    caller=f"{_AVERAGED}, 0.9999",
    files="models/official/amoeba_net/amoeba_net.py, amoeba_net_model.py",
)
def amoebanet_d(
    weight_decay_mask: Mask,
    steps_per_epoch: int = 5004,
    lr: ScalarOrSchedule = 0.64,
    *,
    alpha: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1.0,
    momentum: ScalarOrSchedule = 0.9,
    weight_decay: ScalarOrSchedule = 4e-5,
) -> GradientTransformationExtraArgs:
    """AmoebaNet-D: TensorFlow's RMSProp with epsilon 1.0, 0.64 × 0.9 per epoch after 3 epochs of warm-up.

    For batches of 256; the source does not scale the learning rate by the batch. ``weight_decay_mask`` selects the
    weights of convolutions and dense layers.
    """
    rate = lr if callable(lr) else schedules.amoebanet_d(steps_per_epoch, lr)
    return dialects.timm(rate, alpha, eps, weight_decay, momentum, weight_decay_mask=weight_decay_mask)


@_google(
    caller=f"{_AVERAGED}, 0.995",
    files="models/experimental/inception/inception_v3.py",
)
def inception_v3_tpu(
    weight_decay_mask: Mask,
    batch_size: int = 1024,
    steps_per_epoch: chex.Numeric | None = None,
    lr: ScalarOrSchedule = 0.165,
    *,
    alpha: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1.0,
    momentum: ScalarOrSchedule = 0.9,
    weight_decay: ScalarOrSchedule = 4e-5,
) -> GradientTransformationExtraArgs:
    """Inception-v3 on TPU: TensorFlow's RMSProp with epsilon 1.0, 0.165 per 256 images, × 0.94 per 3 epochs.

    ``weight_decay_mask`` selects the weights of convolutions and dense layers.
    """
    rate = lr if callable(lr) else schedules.inception_v3_tpu(batch_size, steps_per_epoch, lr)
    return dialects.timm(rate, alpha, eps, weight_decay, momentum, weight_decay_mask=weight_decay_mask)


@_google(
    caller=f"{_AVERAGED}, 0.995",
    files="models/experimental/inception/inception_v4.py",
)
def inception_v4_tpu(
    weight_decay_mask: Mask,
    batch_size: int = 256,
    steps_per_epoch: chex.Numeric | None = None,
    lr: ScalarOrSchedule = 0.15,
    *,
    alpha: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1.0,
    momentum: ScalarOrSchedule = 0.9,
    weight_decay: ScalarOrSchedule = 4e-5,
) -> GradientTransformationExtraArgs:
    """Inception-v4 on TPU: as ``inception_v3_tpu``, 0.15 / 0.94^1.5 per 256 images, × 0.94 per 2 epochs, warm-up.

    The first epoch has a learning rate of 0.001, which does not depend on the batch (below 15,555 images).
    """
    rate = lr if callable(lr) else schedules.inception_v4_tpu(batch_size, steps_per_epoch, lr)
    return dialects.timm(rate, alpha, eps, weight_decay, momentum, weight_decay_mask=weight_decay_mask)


@_google(
    source="github.com/google-research/nasbench",
    commit="b942470",
    files="nasbench/lib/model_builder.py, nasbench/lib/config.py; decay is TensorFlow's default",
)
def nasbench_101(
    total_steps: int = 16_875,
    lr: ScalarOrSchedule = 0.2,
    *,
    alpha: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1.0,
    momentum: ScalarOrSchedule = 0.9,
    weight_decay: ScalarOrSchedule = 1e-4,
) -> GradientTransformationExtraArgs:
    """NASBench-101: TensorFlow's RMSProp with epsilon 1.0, 0.2 down a cosine over 108 epochs, L2 of 1e-4 on everything.

    The learning rate is 0.1 for each of two TPU shards. In the first update it is 0, which still moves the averages.
    """
    rate = lr if callable(lr) else schedules.nasbench_101(total_steps, lr)
    return dialects.timm(rate, alpha, eps, weight_decay, momentum)


# --- Others ----------------------------------------------------------------------------------------------------


@_recipe(
    dialect="timm",
    gradient="the mean over the batch of 2 × 128",
    caller=f"{_AVERAGED}, 0.9999",
    source="github.com/huggingface/pytorch-image-models",
    commit="aa4b5850",
    files="hfdocs/source/training_script.mdx, timm/scheduler/step_lr.py",
)
def efficientnet_b2_timm(
    weight_decay_mask: Mask,
    steps_per_epoch: int = 5004,
    lr: ScalarOrSchedule = 0.016,
    *,
    warmup_epochs: int = 5,
    alpha: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-3,
    momentum: ScalarOrSchedule = 0.9,
    weight_decay: ScalarOrSchedule = 1e-5,
) -> GradientTransformationExtraArgs:
    """EfficientNet-B2 in timm: RMSpropTF, 0.016 × 0.97 per 2.4 epochs, one learning rate per epoch.

    ``weight_decay_mask`` selects parameters of two dimensions and more. The command does not give the epochs of
    warm-up. Their default is 5, and was 3 when the command was published.
    """
    rate = lr if callable(lr) else schedules.efficientnet_b2_timm(steps_per_epoch, lr, warmup_epochs=warmup_epochs)
    return dialects.timm(rate, alpha, eps, weight_decay, momentum, weight_decay_mask=weight_decay_mask)


@_recipe(
    dialect="torch",
    gradient="the mean over the batch of 8 × 128",
    caller="the average of the weights of the last three checkpoints that were better than all before",
    source="github.com/pytorch/vision",
    commit="017e9b9",
    files="references/classification/README.md, train.py",
)
def mobilenet_v3(
    steps_per_epoch: int,
    lr: ScalarOrSchedule = 0.064,
    *,
    alpha: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 0.0316,
    momentum: ScalarOrSchedule = 0.9,
    weight_decay: ScalarOrSchedule = 1e-5,
) -> GradientTransformationExtraArgs:
    """MobileNetV3 in torchvision: torch's RMSProp with eps 0.0316 ≈ √1e-3, 0.064 × 0.973 per 2 epochs, L2 of 1e-5.

    Its eps is TensorFlow's 1e-3 under the root, moved outside.
    """
    rate = lr if callable(lr) else schedules.mobilenet_v3(steps_per_epoch, lr)
    return rmsprop(rate, alpha, eps, weight_decay, momentum)


@_recipe(
    dialect="tensorflow",
    gradient="the mean over the 32 images of a replica; the paper has 50 and does not say if they are synchronous",
    caller=f"{_AVERAGED} over time",
    source='C. Szegedy et al., "Rethinking the Inception Architecture", arXiv:1512.00567',
    files="section 8",
)
def inception_v3(
    steps_per_epoch: int,
    momentum: ScalarOrSchedule,
    lr: ScalarOrSchedule = 0.045,
    *,
    alpha: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1.0,
    max_norm: chex.Numeric = 2.0,
) -> GradientTransformationExtraArgs:
    """Inception-v3: TensorFlow's RMSProp with epsilon 1.0, global norm 2, learning rate 0.045 × 0.94 per 2 epochs.

    The paper states no ``momentum`` (its authors' later code has 0.9). For clipping it cites Pascanu et al., who clip
    by the global norm.
    """
    rate = lr if callable(lr) else schedules.inception_v3(steps_per_epoch, lr)
    return optax.chain(clip_by_global_norm(max_norm), dialects.tensorflow(rate, alpha, momentum, eps))


@_recipe(
    dialect="torch",
    gradient="the mean over pixels and batch of the cross entropy, plus the Dice loss",
    caller="ReduceLROnPlateau (patience 5) on the Dice score, about five times per epoch",
    source="github.com/milesial/Pytorch-UNet",
    commit="21d7850",
    files="train.py",
)
def unet(
    lr: ScalarOrSchedule = 1e-5,
    *,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    momentum: ScalarOrSchedule = 0.999,
    weight_decay: ScalarOrSchedule = 1e-8,
    max_norm: chex.Numeric = 1.0,
) -> GradientTransformationExtraArgs:
    """Pytorch-UNet: torch's RMSProp with momentum 0.999, L2 of 1e-8, global norm 1, learning rate 1e-5.

    torch's scheduler is exactly this transformation, with ``update`` called once per evaluation::

        plateau = optax.contrib.reduce_on_plateau(factor=0.1, patience=6, rtol=1 - 1 / 1.0001, min_scale=1e-3)
        _, plateau_state = plateau.update(updates={}, state=plateau_state, value=1 / score)

    Multiply the updates by ``plateau_state.scale``. Optax's patience of 6 and torch's of 5 both act at the sixth value
    in a row that is not better. ``1 / score`` turns a score that rises, and is above 0, into a loss, with torch's
    threshold of 1.0001.
    """
    return optax.chain(clip_by_global_norm(max_norm), rmsprop(lr, alpha, eps, weight_decay, momentum))


@_recipe(
    dialect="torch",
    gradient="the mean absolute error over pixels and batch",
    source="github.com/facebookresearch/fastMRI",
    commit="91f2df4",
    files="fastmri/pl_modules/unet_module.py",
)
def unet_fastmri(
    steps_per_epoch: int,
    lr: ScalarOrSchedule = 1e-3,
    *,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
) -> GradientTransformationExtraArgs:
    """U-Net in fastMRI: torch's RMSProp and defaults, learning rate 1e-3, a tenth of it after 40 epochs."""
    rate = lr if callable(lr) else schedules.unet_fastmri(steps_per_epoch, lr)
    return rmsprop(rate, alpha, eps, weight_decay)


@_recipe(
    dialect="torch",
    gradient="the mean over the batch of 64",
    caller="5 steps of the critic for each of the generator, 100 for the first 25 and for every 500th",
    source="github.com/martinarjovsky/WassersteinGAN",
    commit="f7a01e8",
    files="main.py; arXiv:1701.07875, Algorithm 1",
)
def wgan_generator(
    lr: ScalarOrSchedule = 5e-5, *, alpha: ScalarOrSchedule = 0.99, eps: ScalarOrSchedule = 1e-8
) -> GradientTransformationExtraArgs:
    """WGAN, the generator: torch's RMSProp and defaults, learning rate 5e-5."""
    return rmsprop(lr, alpha, eps)


@_recipe(
    dialect="torch",
    gradient="the mean over the batch of 64",
    caller="the initial weights, which have to be clipped once before the first gradient",
    source="github.com/martinarjovsky/WassersteinGAN",
    commit="f7a01e8",
    files="main.py; arXiv:1701.07875, Algorithm 1",
)
def wgan_critic(
    lr: ScalarOrSchedule = 5e-5,
    *,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    limit: chex.Numeric = 0.01,
) -> GradientTransformationExtraArgs:
    """WGAN, the critic: as the generator, with all weights held in [−0.01, 0.01] after every step.

    That is Algorithm 1. ``main.py`` clips before each gradient instead. The critics are the same, but there the
    generator's gradient goes through weights that are not clipped yet.
    """
    return optax.chain(rmsprop(lr, alpha, eps), hold_weights_within(limit))
