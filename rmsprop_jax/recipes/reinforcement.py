"""Recipes of reinforcement learning."""

import functools

import chex
import optax
from optax import GradientTransformationExtraArgs, ScalarOrSchedule

from rmsprop_jax import dialects
from rmsprop_jax.recipes import schedules
from rmsprop_jax.recipes.clipping import clip_by_global_norm, clip_by_parameter_norm
from rmsprop_jax.recipes.entry import recipe
from rmsprop_jax.transform import rmsprop

__all__ = [
    "a2c",
    "a2c_atari",
    "a2c_baselines",
    "a3c",
    "cleanba_impala",
    "coma",
    "douzero",
    "dqn_dopamine",
    "dqn_minatar",
    "dqn_nature",
    "dqn_zoo",
    "dqn_zoo_prioritized",
    "dreamer_v3",
    "impala",
    "impala_dmlab30",
    "qmix",
    "torchbeast",
]

_recipe = functools.partial(recipe, family="reinforcement learning")
_TARGET_NETWORK = "the target network"


@_recipe(
    dialect="dreamer",
    gradient="the mean of each loss over 16 × 64 steps",
    caller="the slow critic, which follows at a rate of 0.02",
    source="github.com/danijar/dreamerv3",
    commit="e3f0224",
    files="dreamerv3/agent.py 342-379, dreamerv3/configs.yaml, embodied/jax/opt.py",
)
def dreamer_v3(
    lr: ScalarOrSchedule = 4e-5,
    warmup: int = 1000,
    *,
    clipping: chex.Numeric = 0.3,
    smallest_norm: chex.Numeric = 1e-3,
    beta1: ScalarOrSchedule = 0.9,
    beta2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-20,
) -> GradientTransformationExtraArgs:
    """DreamerV3: adaptive clipping at 0.3 of each array's norm, LaProp, linear warm-up from 0 over 1,000 updates.

    The first update has a learning rate of 0, and still moves the averages.
    """
    rate = lr if callable(lr) else schedules.dreamer_v3(lr, warmup=warmup)
    clip = clip_by_parameter_norm(clipping, smallest_norm)
    return optax.chain(clip, dialects.dreamer(rate, beta2, eps, beta1))


@_recipe(
    dialect="torch",
    gradient="the sum of the loss over 20 steps of 32 environments, averaged over devices",
    source="github.com/vwxyzjn/cleanba",
    commit="d1f8979",
    files="cleanba/cleanba_impala.py",
)
def cleanba_impala(
    updates: int = 19_531,
    lr: ScalarOrSchedule = 6e-4,
    *,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 0.01,
    max_norm: chex.Numeric = 40.0,
) -> GradientTransformationExtraArgs:
    """IMPALA in Cleanba: torch's RMSProp, global norm 40, learning rate down a staircase over ``updates`` rollouts.

    Each rollout is used for 4 optimizer steps, which share a learning rate.
    """
    rate = lr if callable(lr) else schedules.cleanba_impala(updates, lr)
    return optax.chain(clip_by_global_norm(max_norm), rmsprop(rate, alpha, eps))


@_recipe(
    dialect="tensorflow",
    gradient="the sum of the loss over time (100 steps) and batch (2)",
    source="github.com/deepmind/scalable_agent",
    commit="6c0c8a7",
    files="experiment.py, its flags' defaults",
)
def impala(
    frames_per_update: int = 800,
    total_frames: chex.Numeric = 1e9,
    lr: ScalarOrSchedule = 4.8e-4,
    *,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 0.1,
    momentum: ScalarOrSchedule = 0.0,
) -> GradientTransformationExtraArgs:
    """IMPALA: TensorFlow's RMSProp with epsilon 0.1, learning rate 4.8e-4 linear to 0 over the frames.

    ``frames_per_update`` is batch size · unroll length · action repeats. The code clips no gradients.
    """
    rate = lr if callable(lr) else schedules.impala(frames_per_update, total_frames, lr)
    return dialects.tensorflow(rate, alpha, momentum, eps)


@_recipe(
    dialect="tensorflow",
    gradient="the sum of the loss over time (100 steps) and batch (32)",
    source="github.com/deepmind/scalable_agent",
    commit="6c0c8a7",
    files="README.md, the command for DMLab-30",
)
def impala_dmlab30(
    frames_per_update: int = 12_800,
    total_frames: chex.Numeric = 1e10,
    lr: ScalarOrSchedule = 0.00031866995608948655,
    *,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 0.1,
    momentum: ScalarOrSchedule = 0.0,
) -> GradientTransformationExtraArgs:
    """IMPALA on DMLab-30: as ``impala``, learning rate 3.19e-4 over 10 billion frames."""
    rate = lr if callable(lr) else schedules.impala_dmlab30(frames_per_update, total_frames, lr)
    return dialects.tensorflow(rate, alpha, momentum, eps)


@_recipe(
    dialect="torch",
    gradient="the sum of the loss over 80 steps and a batch of 8",
    source="github.com/facebookresearch/torchbeast",
    commit="0af07b0",
    files="torchbeast/monobeast.py",
)
def torchbeast(
    total_steps: int = 100_000,
    unroll_length: int = 80,
    batch_size: int = 8,
    lr: ScalarOrSchedule = 4.8e-4,
    *,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 0.01,
    max_norm: chex.Numeric = 40.0,
) -> GradientTransformationExtraArgs:
    """TorchBeast: torch's RMSProp with eps 0.01, global norm 40, learning rate 4.8e-4 linear to 0.

    ``total_steps`` counts agent steps of 4 frames, of which an update uses ``unroll_length · batch_size``; the default
    is 157 updates. The README's run has ``total_steps=30_000_000, batch_size=4, lr=4e-4``.
    """
    rate = lr if callable(lr) else schedules.torchbeast(total_steps, unroll_length, batch_size, lr)
    return optax.chain(clip_by_global_norm(max_norm), rmsprop(rate, alpha, eps))


@_recipe(
    dialect="dqn",
    gradient="the sum over the batch of 32",
    caller=f"{_TARGET_NETWORK}, and the clipping of each TD error to ±1, which belongs to the loss",
    source="github.com/deepmind/dqn",
    commit="9d9b1d1",
    files="run_gpu 25, dqn/NeuralQLearner.lua 256-277; V. Mnih et al., Nature 518 (2015), Extended Data Table 1",
)
def dqn_nature(
    lr: ScalarOrSchedule = 2.5e-4, *, alpha: ScalarOrSchedule = 0.95, eps: ScalarOrSchedule = 0.01
) -> GradientTransformationExtraArgs:
    """The Nature DQN: centered RMSProp, 0.01 under the root, no momentum, learning rate 2.5e-4.

    On a mean loss over 32, this is ``dqn_nature(eps=0.01 / 32**2)``, as in ``dqn_zoo``.
    """
    return dialects.dqn(lr, alpha, eps)


@_recipe(
    dialect="tensorflow",
    gradient="the mean of the Huber loss over the batch of 32",
    caller=_TARGET_NETWORK,
    source="github.com/google/dopamine",
    commit="5873f54",
    files="dopamine/tf/agents/dqn/configs/dqn.gin",
)
def dqn_dopamine(
    lr: ScalarOrSchedule = 2.5e-4,
    *,
    alpha: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-5,
    momentum: ScalarOrSchedule = 0.0,
) -> GradientTransformationExtraArgs:
    """DQN in Dopamine (TensorFlow): centered RMSProp with epsilon 1e-5, learning rate 2.5e-4."""
    return dialects.tensorflow(lr, alpha, momentum, eps, centered=True)


@_recipe(
    dialect="optax",
    gradient="the mean over the batch of 32",
    caller=f"{_TARGET_NETWORK}, and the bound of 1/32 on the gradient of each TD error, which belongs to the loss",
    source="github.com/deepmind/dqn_zoo",
    commit="f87bb1f",
    files="dqn_zoo/dqn/run_atari.py; double_q is the same",
)
def dqn_zoo(
    lr: ScalarOrSchedule = 2.5e-4, *, alpha: ScalarOrSchedule = 0.95, eps: ScalarOrSchedule = 0.01 / 32**2
) -> GradientTransformationExtraArgs:
    """DQN in DQN Zoo: the Nature DQN on a mean loss, with 0.01 / 32² under the root."""
    return dialects.optax(lr, alpha, eps, centered=True)


@_recipe(
    dialect="optax",
    gradient="the weighted mean over the batch of 32",
    caller=f"{_TARGET_NETWORK}, and the bound of 1/32 on the gradient of each weighted TD error",
    source="github.com/deepmind/dqn_zoo",
    commit="f87bb1f",
    files="dqn_zoo/prioritized/run_atari.py",
)
def dqn_zoo_prioritized(
    lr: ScalarOrSchedule = 2.5e-4 / 4, *, alpha: ScalarOrSchedule = 0.95, eps: ScalarOrSchedule = 0.01 / 32**2 / 4**2
) -> GradientTransformationExtraArgs:
    """Prioritized DQN in DQN Zoo: as ``dqn_zoo``, with a quarter of the learning rate and a sixteenth of eps."""
    return dialects.optax(lr, alpha, eps, centered=True)


@_recipe(
    dialect="torch",
    gradient="the mean over the batch of 32",
    caller=_TARGET_NETWORK,
    source="github.com/kenjyoung/MinAtar",
    commit="4241f24",
    files="examples/dqn.py",
)
def dqn_minatar(
    lr: ScalarOrSchedule = 2.5e-4, *, alpha: ScalarOrSchedule = 0.95, eps: ScalarOrSchedule = 0.01
) -> GradientTransformationExtraArgs:
    """DQN in MinAtar: torch's centered RMSProp with 0.01 outside the root, learning rate 2.5e-4.

    These are the numbers of the Nature DQN in another place and for another unit, so the steps differ.
    """
    return rmsprop(lr, alpha, eps, centered=True)


@_recipe(
    dialect="torch",
    gradient="the mean over 5 steps of all environments",
    source="github.com/DLR-RM/stable-baselines3",
    commit="e05d2db",
    files="stable_baselines3/a2c/a2c.py",
)
def a2c(
    lr: ScalarOrSchedule = 7e-4,
    *,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-5,
    max_norm: chex.Numeric = 0.5,
) -> GradientTransformationExtraArgs:
    """A2C, the default of Stable-Baselines3: torch's RMSProp with eps 1e-5, global norm 0.5, learning rate 7e-4."""
    return optax.chain(clip_by_global_norm(max_norm), rmsprop(lr, alpha, eps))


@_recipe(
    dialect="stable_baselines3",
    gradient="the mean over 5 steps of 16 environments",
    source="github.com/DLR-RM/rl-baselines3-zoo",
    commit="22e3ff2",
    files="hyperparams/a2c.yml",
)
def a2c_atari(
    lr: ScalarOrSchedule = 7e-4,
    *,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-5,
    max_norm: chex.Numeric = 0.5,
) -> GradientTransformationExtraArgs:
    """A2C on Atari in the RL Zoo: as ``a2c``, but TensorFlow's place of eps and starting value."""
    return optax.chain(clip_by_global_norm(max_norm), dialects.stable_baselines3(lr, alpha, eps))


@_recipe(
    dialect="tensorflow",
    gradient="the mean over 5 steps of all environments",
    source="github.com/openai/baselines",
    commit="ea25b9e",
    files="baselines/a2c/a2c.py, baselines/a2c/utils.py",
)
def a2c_baselines(
    samples_per_update: int,
    total_steps: int = 80_000_000,
    lr: ScalarOrSchedule = 7e-4,
    *,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-5,
    max_norm: chex.Numeric = 0.5,
) -> GradientTransformationExtraArgs:
    """A2C in OpenAI Baselines: TensorFlow's RMSProp, global norm 0.5, learning rate 7e-4 linear to 0.

    ``samples_per_update`` is 5 steps · environments. The source advances the schedule once per sample and uses the last
    value, so that the first update has less than 7e-4. ``total_steps`` is 80 million in ``learn`` and 1 million on the
    command line.
    """
    rate = lr if callable(lr) else schedules.a2c_baselines(samples_per_update, total_steps, lr)
    return optax.chain(clip_by_global_norm(max_norm), dialects.tensorflow(rate, alpha, epsilon=eps))


@_recipe(
    dialect="optax",
    gradient="the sum over up to 5 steps of one environment",
    caller="the processes, which share parameters and averages without locks",
    source="github.com/muupan/async-rl",
    commit="5c5844f",
    files="rmsprop_async.py, a3c_ale.py, a3c.py",
)
def a3c(
    total_steps: int = 80_000_000,
    steps_per_update: int = 5,
    lr: ScalarOrSchedule = 7e-4,
    *,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 0.1,
    max_norm: chex.Numeric = 40.0,
) -> GradientTransformationExtraArgs:
    """A3C in async-rl: 0.1 under the root, global norm 40, learning rate 7e-4 to 0.

    The docstring of the source says that 0.1 is outside the root, but its code puts it inside.

    The source counts the steps of all processes. The schedule is that of one process without ends of episodes; for
    others, give ``lr`` a function.
    """
    rate = lr if callable(lr) else schedules.a3c(total_steps, steps_per_update, lr)
    return optax.chain(clip_by_global_norm(max_norm), dialects.optax(rate, alpha, eps))


@_recipe(
    dialect="torch",
    gradient="the mean of the squared TD error, not halved, over the real steps of 32 episodes",
    caller=_TARGET_NETWORK,
    source="github.com/oxwhirl/pymarl",
    commit="c971afd",
    files="src/config/default.yaml, src/learners/q_learner.py",
)
def qmix(
    lr: ScalarOrSchedule = 5e-4,
    *,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-5,
    max_norm: chex.Numeric = 10.0,
) -> GradientTransformationExtraArgs:
    """QMIX in PyMARL: torch's RMSProp with eps 1e-5, global norm 10, learning rate 5e-4. VDN and IQL have it too."""
    return optax.chain(clip_by_global_norm(max_norm), rmsprop(lr, alpha, eps))


@_recipe(
    dialect="torch",
    gradient="the mean over agents and episodes; for the critic at one time step, for the agents over all of them",
    caller=f"{_TARGET_NETWORK}, and one optimizer each for agents and critic; the critic's steps once per time step",
    source="github.com/oxwhirl/pymarl",
    commit="c971afd",
    files="src/config/algs/coma.yaml, src/learners/coma_learner.py",
)
def coma(
    lr: ScalarOrSchedule = 5e-4,
    *,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-5,
    max_norm: chex.Numeric = 10.0,
) -> GradientTransformationExtraArgs:
    """COMA in PyMARL: for agents and critic each, the optimizer of ``qmix``."""
    return qmix(lr, alpha=alpha, eps=eps, max_norm=max_norm)


@_recipe(
    dialect="torch",
    gradient="the mean of the squared error over 100 × 32",
    caller="one optimizer for each of the three positions",
    source="github.com/kwai/DouZero",
    commit="718a5c9",
    files="douzero/dmc/dmc.py, douzero/dmc/arguments.py",
)
def douzero(
    lr: ScalarOrSchedule = 1e-4,
    *,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-5,
    momentum: ScalarOrSchedule = 0.0,
    max_norm: chex.Numeric = 40.0,
) -> GradientTransformationExtraArgs:
    """DouZero: torch's RMSProp with eps 1e-5, global norm 40, learning rate 1e-4."""
    return optax.chain(clip_by_global_norm(max_norm), rmsprop(lr, alpha, eps, momentum=momentum))
