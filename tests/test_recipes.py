"""Every recipe against its rule in ``recipe_rules``, the table of recipes, and what surrounds the RMSProp."""

import inspect
import math
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import recipe_rules
from recipe_rules import BOUNDARIES, RATES, RULES
from rmsprop_jax import recipes, rmsprop, translation
from rmsprop_jax.recipes import RECIPES, clipping, schedules

LAST_STEP = 2**31 - 1  # where the counter stops
SMALL_COUNTS = {"char_rnn": 100, "mobilenet_v3": 100, "inception_v3": 100, "unet_fastmri": 100, "a2c_baselines": 80}


def required(name: str) -> dict[str, Any]:
    """The arguments that a recipe has no default for."""
    parameters = inspect.signature(RECIPES[name].build).parameters.values()
    values = {"weight_decay_mask": None, "momentum": 0.9, "samples_per_update": 80, "steps_per_epoch": 100}
    return {p.name: values[p.name] for p in parameters if p.default is p.empty}


def build(name: str, **arguments: Any) -> optax.GradientTransformationExtraArgs:
    return RECIPES[name].build(**required(name) | arguments)


def schedule_of(name: str, **arguments: Any) -> Callable[[Any], Any]:
    needed = {key: x for key, x in required(name).items() if key not in ("weight_decay_mask", "momentum")}
    return getattr(schedules, name)(**needed | arguments)


def recipe_rules_arguments(name: str) -> set[str]:
    return set(inspect.signature(RATES[name]).parameters)


def counts(name: str) -> list[str]:
    """The arguments of a recipe that are whole numbers."""
    parameters = inspect.signature(RECIPES[name].build).parameters.values()
    return [parameter.name for parameter in parameters if parameter.annotation is int]


# --- The table -----------------------------------------------------------------------------------------------


def test_every_recipe_has_a_rule_and_every_schedule_a_formula() -> None:
    assert set(RECIPES) == set(RULES)
    with_schedule = {name for name, row in RECIPES.items() if row.schedule is not None}
    assert with_schedule == set(RATES) == set(BOUNDARIES)
    functions = inspect.getmembers(schedules, inspect.isfunction)
    assert with_schedule == {
        name for name, f in functions if f.__module__ == schedules.__name__ and not name.startswith("_")
    }


def test_recipes_are_what_the_room_lists() -> None:
    assert set(dir(recipes)) == {*RECIPES, "RECIPES", "Recipe", "mean_loss_step_ratio", "schedules"}
    for name, row in RECIPES.items():
        assert getattr(recipes, name) is row.build
        assert row.name == name == row.build.__name__


@pytest.mark.parametrize("name", RULES)
def test_row_says_where_the_numbers_are_and_what_they_belong_to(name: str) -> None:
    row = RECIPES[name]
    assert row.dialect in translation.DIALECTS
    assert row.family in ("reinforcement learning", "sequences", "images")
    is_repository = row.source.startswith("github.com/")
    assert re.fullmatch(r"[0-9a-f]{7,8}", row.commit) if is_repository else not row.commit
    assert re.search(r"\b(sum|mean)\b", row.gradient)
    assert row.summary
    documentation = inspect.getdoc(row.build)
    for fact in (row.summary, row.gradient, row.caller, row.reference()):
        assert f"{fact}." in documentation
    assert (f"recipes.schedules.{name}" in documentation) == (row.schedule is not None)


@pytest.mark.parametrize("name", RULES)
def test_dialect_of_the_row_is_the_one_that_is_built(name: str) -> None:
    structure = translation.structure_of(rmsprop_of(build(name)))
    row = translation.DIALECTS[RECIPES[name].dialect]
    needed = {row.names["lr"]: 0.1} | ({row.names["momentum"]: 0.5} if "momentum" in row.names else {})
    expected = translation.structure_of(row.build(**needed))
    same = ["eps_in_sqrt", "initial_scale", "bias_correction", "averages_steps"]
    numbers = inspect.signature(RECIPES[name].build).parameters
    if RULES[name].numbers.get("momentum"):
        same += ["lr_in_buffer", "buffer_sign"]
    assert {key: structure[key] for key in same} == {key: expected[key] for key in same}
    assert "lr" in numbers


def rmsprop_of(tx: Any) -> Any:
    """The RMSProp inside a chain, as something that can be asked."""

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del updates, state, params
        return tx.update(jnp.zeros(1), tx.init(jnp.zeros(1)), jnp.zeros(1), **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


# --- The rules -----------------------------------------------------------------------------------------------

UPDATES = 200


@pytest.mark.parametrize("name", RULES)
def test_recipe_is_the_rule_of_its_source(x64: None, name: str) -> None:
    """200 updates across all boundaries of the schedule, with gradients that clipping shortens now and then."""
    rule, rng = RULES[name], np.random.default_rng(len(name))
    scale = {"norm": rule.clip[1] / 2, "entries": rule.clip[1] / 2, "parameter": 1.0, "none": 1.0}[rule.clip[0]]
    start = {"w": 0.9 * np.minimum(rule.limit, 1.0) * rng.uniform(-1, 1, 4), "b": np.array([0.25, -0.5])}
    start = {leaf: np.clip(p, -rule.limit, rule.limit) for leaf, p in start.items()}
    gradients = [
        {leaf: scale * 10 ** rng.normal(scale=0.5) * rng.normal(size=p.shape) for leaf, p in start.items()}
        for _ in range(UPDATES)
    ]
    tx = build(name, **rule.arguments)

    @jax.jit
    def run(params: Any, gradients: Any) -> Any:
        def step(carry: Any, gradient: Any) -> Any:
            updates, state = tx.update(gradient, carry[1], carry[0])
            params = optax.apply_updates(carry[0], updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), gradients)[1]

    def stacked(trees: list[Any]) -> Any:
        return {leaf: np.stack([tree[leaf] for tree in trees]) for leaf in start}

    wanted = stacked(list(recipe_rules.run(name, start, gradients)))
    found = jax.device_get(run(start, stacked(gradients)))
    moved = np.max([np.abs(found[leaf] - start[leaf]).max(axis=1) for leaf in start], axis=0)
    moved = np.maximum.accumulate(moved)  # the largest way so far
    assert moved[-1] > 0
    for leaf in start:
        error = np.abs(found[leaf] - wanted[leaf]).max(axis=1)
        assert (error <= 1e-10 * moved).all(), (leaf, np.argmax(error - 1e-10 * moved))


@pytest.mark.parametrize("name", RATES)
def test_schedule_is_that_of_the_source_at_every_boundary(x64: None, name: str) -> None:
    schedule = jax.jit(schedule_of(name))
    for boundary in BOUNDARIES[name]:
        for step in {math.floor(boundary) + d for d in (-1, 0, 1, 2)} - {-1}:
            np.testing.assert_allclose(schedule(jnp.int32(step)), RATES[name](step), rtol=1e-10, atol=1e-18)


@pytest.mark.parametrize("name", RATES)
def test_schedule_in_float32_is_that_of_float64(name: str) -> None:
    schedule = jax.jit(schedule_of(name))
    for boundary in BOUNDARIES[name]:
        step = math.floor(boundary) + 7
        np.testing.assert_allclose(schedule(jnp.int32(step)), RATES[name](step), rtol=2e-4, atol=1e-9)
    for step in (0, 1, LAST_STEP - 1, LAST_STEP):
        found = float(schedule(jnp.int32(step)))
        assert 0 <= found < 10


@pytest.mark.parametrize("epoch", [21, 41, 47, 55])
@pytest.mark.parametrize("name", [name for name in RATES if "steps_per_epoch" in recipe_rules_arguments(name)])
def test_schedule_in_float32_falls_at_the_very_step(name: str, epoch: int) -> None:
    """XLA multiplies by the reciprocal of a constant, which is off at whole multiples."""
    steps = np.arange(40 * epoch)
    found = jax.jit(jax.vmap(schedule_of(name, steps_per_epoch=epoch)))(steps.astype(np.int32))
    want = [RATES[name](int(n), steps_per_epoch=epoch) for n in steps]
    np.testing.assert_allclose(found, want, rtol=1e-4)


STAIRS = {"decay": 0.5, "epochs_per_decay": 3}
OF_EFFICIENTNET = {"decay": 0.5, "epochs_per_decay": 1.7, "warmup_epochs": 2.5}
SHAPES: dict[str, dict[str, Any]] = {
    "cleanba_impala": {"updates": 50, "minibatches": 3},
    "char_rnn": {"decay": 0.5, "decay_after": 2},
    "efficientnet": OF_EFFICIENTNET,
    "mnasnet": OF_EFFICIENTNET,
    "efficientnet_v2": OF_EFFICIENTNET,
    "efficientnet_v2_keras": OF_EFFICIENTNET,
    "efficientnet_b2_timm": {"decay": 0.5, "epochs_per_decay": 1.7, "warmup_epochs": 2, "warmup_lr": 1e-3},
    "mobilenet_v3": STAIRS,
    "inception_v3": STAIRS,
    "unet_fastmri": STAIRS,
    "inception_v3_tpu": {"decay": 0.5, "epochs_per_decay": 1.5, "floor": 1e-2},
    "inception_v4_tpu": {"decay": 0.5, "epochs_per_decay": 1.5, "floor": 1e-2, "cold_lr": 0.5},
    "amoebanet_d": {"decay": 0.5, "warmup_epochs": 1.5, "floor": 1e-2},
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_number_of_a_schedule_may_be_changed(x64: None, name: str) -> None:
    epoch = {"steps_per_epoch": 7} if "steps_per_epoch" in recipe_rules_arguments(name) else {}
    alone = [{key: value} for key, value in SHAPES[name].items()]
    steps = np.arange(1800)
    for shape in (SHAPES[name], *alone):
        found = jax.jit(jax.vmap(schedule_of(name, **epoch | shape)))(steps.astype(np.int32))
        want = [RATES[name](int(n), **epoch | shape) for n in steps]
        np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-18)
        if shape != {"updates": 50}:
            assert want != [RATES[name](int(n), **epoch) for n in steps]
    for number in SHAPES[name]:
        with pytest.raises((TypeError, ValueError), match=rf"^{number} must be a"):
            schedule_of(name, **epoch | {number: -1.0})


def test_arguments_of_the_schedule_are_checked_even_if_lr_replaces_it() -> None:
    with pytest.raises(ValueError, match=r"^batch_size must be a whole number"):
        recipes.efficientnet(None, batch_size=-5, lr=lambda step: 0.1)
    with pytest.raises(TypeError, match=r"^steps_per_epoch must be a whole number"):
        recipes.char_rnn("x", lr=lambda step: 0.1)
    assert float(schedules.inception_v3_tpu(1024, 1e9)(jnp.int32(7))) > 0


@pytest.mark.parametrize("name", RATES)
def test_boundaries_are_crossed_by_the_run_above(name: str) -> None:
    """The learning rate of those 200 updates is neither constant nor always the same formula."""
    rates = [RULES[name].rate(name)(n) for n in range(UPDATES)]
    assert len(set(rates)) > 2
    changes = np.sign(np.diff(rates))
    if name in ("dreamer_v3", "dpo"):
        assert changes[0] == 1
        assert changes[-1] == 0
    else:
        assert -1 in changes


@pytest.mark.parametrize("name", RATES)
def test_lr_may_be_another_number_or_another_schedule(name: str) -> None:
    def own(step: Any) -> Any:
        return jnp.asarray(0.25, jnp.float32) / (1 + step)

    query = translation.SettingsQuery()
    rmsprop_of(build(name, lr=own)).update(None, None, rmsprop_settings=query)
    assert query.answers[0].settings.lr is own
    published = inspect.signature(getattr(schedules, name)).parameters["lr"].default
    assert published == inspect.signature(RECIPES[name].build).parameters["lr"].default
    if name not in ("inception_v4_tpu", "efficientnet_b2_timm"):  # whose first epochs have rates of their own
        step = jnp.int32(57)
        np.testing.assert_allclose(schedule_of(name, lr=2 * published)(step), 2 * schedule_of(name)(step), rtol=1e-3)


@pytest.mark.parametrize("name", RULES)
def test_every_number_reaches_the_rule(name: str) -> None:
    """Another alpha, eps, momentum or limit gives another trajectory."""
    parameters = inspect.signature(RECIPES[name].build).parameters
    numbers = [n for n in ("lr", "alpha", "beta1", "beta2", "eps", "momentum", "weight_decay") if n in parameters]
    numbers += [n for n in ("max_norm", "limit", "clipping", "smallest_norm") if n in parameters]
    params = {"w": jnp.array([0.5, -0.25]) * 0.01, "b": jnp.array([0.001])}
    gradients = [jax.tree.map(lambda p, i=i: (100.0 + i) * p / 0.01, params) for i in range(3)]

    masks = {"weight_decay_mask": True} if "weight_decay_mask" in parameters else {}

    def last(**arguments: Any) -> Any:
        tx = build(name, **masks | arguments)
        state, updates = tx.init(params), None
        for g in gradients:
            updates, state = tx.update(g, state, params)
        return state, updates

    rates = {"lr": lambda step: 1e-4}
    plain = last(**rates)
    for number in numbers:
        other = {"lr": lambda step: 5e-5, "alpha": 0.5, "beta1": 0.25, "beta2": 0.5, "eps": 1e3, "momentum": 0.5}.get(
            number, 1e-3
        )
        other = {"weight_decay": 0.5, "smallest_norm": 1e-1}.get(number, other)
        changed = last(**rates | {number: other})
        pairs = zip(jax.tree.leaves(plain), jax.tree.leaves(changed), strict=False)
        assert any(not np.array_equal(x, y) for x, y in pairs), number


def test_first_update_of_dreamer_is_zero() -> None:
    tx = recipes.dreamer_v3()
    params = jnp.ones(3)
    update, _ = tx.update(jnp.ones(3), tx.init(params), params)
    np.testing.assert_array_equal(update, np.zeros(3))


# --- The unit of the gradient --------------------------------------------------------------------------------

SUMS = [*sorted(name for name, row in RECIPES.items() if row.gradient.startswith("the sum of the loss")), "dqn_nature"]


@pytest.mark.parametrize("name", SUMS)
def test_scaled_gradient_of_a_mean_loss_takes_the_steps_of_the_sum(name: str) -> None:
    summed, mean = build(name), optax.chain(optax.scale(32.0), build(name))
    params = jnp.array([0.5, -1.0])
    states = summed.init(params), mean.init(params)
    for g in np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32):
        first, one = summed.update(jnp.asarray(g), states[0], params)
        second, other = mean.update(jnp.asarray(g) / 32, states[1], params)
        states = one, other
        np.testing.assert_allclose(first, second, rtol=1e-5)


@pytest.mark.parametrize("name", ["dqn_nature", "dqn_dopamine", "dqn_minatar", "a2c", "graves", "qmix"])
def test_mean_loss_step_ratio_comes_true(x64: None, name: str) -> None:
    """After 3,000 updates with gradients of alternating sign, which have a mean of 0 and are not clipped."""
    terms, size, params = 32, 1e-3, jnp.zeros(1)

    def last(scale: float) -> float:
        tx = build(name)

        def step(state: Any, sign: Any) -> Any:
            update, state = tx.update(scale * size * sign * jnp.ones(1), state, params)
            return state, update

        updates = jax.lax.scan(step, tx.init(params), jnp.tile(jnp.array([1.0, -1.0]), 1500))[1]
        return float(jnp.abs(updates[-1, 0]))

    ratio = recipes.mean_loss_step_ratio(build(name), size, terms)
    np.testing.assert_allclose(ratio, last(1.0) / last(float(terms)), rtol=5e-2)


def test_mean_loss_step_ratio_is_that_of_the_audit() -> None:
    found = recipes.mean_loss_step_ratio(recipes.dqn_nature(), [3e-2, 3e-3, 3e-4], 32)
    np.testing.assert_allclose(found, [0.29, 0.043, 0.031], rtol=2e-2)
    np.testing.assert_allclose(recipes.mean_loss_step_ratio(rmsprop(eps=0.1), 0.1, 9.0), (0.9 + 0.1) / (9 * 0.2))
    assert recipes.mean_loss_step_ratio(recipes.dqn_nature(), 0.5, 1.0) == 1.0
    zoo, nature = recipes.dqn_zoo(), recipes.dqn_nature(eps=0.01 / 32**2)
    np.testing.assert_allclose(
        recipes.mean_loss_step_ratio(zoo, 0.1, 2), recipes.mean_loss_step_ratio(nature, 0.1, 2), rtol=1e-12
    )
    with pytest.raises(ValueError, match=r"^optimizer must have one RMSProp in it, got 0"):
        recipes.mean_loss_step_ratio(optax.sgd(0.1), 0.1, 2)
    with pytest.raises(ValueError, match=r"^terms must be numbers ≥ 1"):
        recipes.mean_loss_step_ratio(zoo, 0.1, 0.5)


# --- U-Net's plateau -----------------------------------------------------------------------------------------


def test_plateau_of_unet_is_that_of_torch() -> None:
    """What the docstring says: Optax's on 1 / score is torch's on the score, evaluation by evaluation."""
    torch = pytest.importorskip("torch")
    documentation = inspect.getdoc(recipes.unet)
    (call,) = re.findall(r"optax\.contrib\.reduce_on_plateau\(.*\)", documentation)
    plateau = eval(call, {"optax": optax})
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.RMSprop([weight], lr=1e-5)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=5)
    state, rng = plateau.init({}), np.random.default_rng(0)
    update = jax.jit(lambda state, score: plateau.update(updates={}, state=state, value=1 / score)[1])
    scores = np.concatenate(
        [np.linspace(0.1, 0.8, 10), np.full(14, 0.8), 0.8 * (1 + 0.5e-4 * np.arange(9)), 0.8 + 0.1 * rng.random(60)]
    )
    rates = []
    for score in scores:
        scheduler.step(float(score))
        state = update(state, np.float32(score))
        rates.append(optimizer.param_groups[0]["lr"])
        np.testing.assert_allclose(1e-5 * float(state.scale), rates[-1], rtol=1e-5)
    assert len({f"{rate:.1e}" for rate in rates}) == 4


# --- WGAN's box ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("gradient_dtype", ["float32", "bfloat16"])
def test_no_weight_of_the_critic_leaves_its_box(dtype: str, gradient_dtype: str) -> None:
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.uniform(-0.02, 0.02, 4000), dtype)
    tx = recipes.wgan_critic(lr=5e-3)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(5):
        updates, state = step(jnp.asarray(rng.normal(size=4000), gradient_dtype), state, params)
        params = optax.apply_updates(params, updates)
        assert np.abs(np.asarray(params, np.float64)).max() <= 0.01
    assert (np.abs(np.asarray(params, np.float64)) > 0.0095).mean() > 0.2  # at the wall, not far from it


def test_critic_of_wgan_stays_within_its_box() -> None:
    tx = recipes.wgan_critic()
    params = jnp.array([0.0099, -0.0099, 0.5, 0.0])
    updates, _ = tx.update(jnp.array([-1.0, 1.0, 1.0, 1.0]), tx.init(params), params)
    np.testing.assert_allclose(optax.apply_updates(params, updates), [0.01, -0.01, 0.01, -5e-4], rtol=1e-5)


# --- Arguments -----------------------------------------------------------------------------------------------

COUNTED = [(name, count) for name in RULES for count in counts(name)]
EPOCHS = [name for name, row in RECIPES.items() if "steps_per_epoch" in inspect.signature(row.build).parameters]
FRACTIONAL = [name for name in EPOCHS if ("steps_per_epoch" not in counts(name))]


def enough(name: str, count: str) -> dict[str, Any]:
    """Other counts with which a run of any length ends after its first update."""
    return {
        "impala": {"total_frames": 1e15},
        "impala_dmlab30": {"total_frames": 1e15},
        "torchbeast": {"total_steps": LAST_STEP, "unroll_length": 1, "batch_size": 1},
        "a2c_baselines": {"total_steps": LAST_STEP, "samples_per_update": 1},
        "a3c": {"total_steps": LAST_STEP, "steps_per_update": 1},
    }.get(name, {"steps_per_epoch": 100.0} if count == "batch_size" else {})


@pytest.mark.parametrize(("name", "count"), COUNTED)
def test_count_has_no_width(name: str, count: str) -> None:
    """``np.int16(20000)`` doubled is negative, and ``np.int8(127)`` plus 1."""
    others = enough(name, count)
    steps = np.array([0, 1, 7, 1000, 100_000, LAST_STEP - 1, LAST_STEP], np.int32)
    for value in (np.int8(127), np.uint8(200), np.int16(20_000), np.array(20_000, np.int16), jnp.int16(20_000)):
        expected = schedule_of(name, **others | {count: int(value)})
        given = schedule_of(name, **others | {count: value})
        np.testing.assert_array_equal(jax.vmap(given)(steps), jax.vmap(expected)(steps))


# Those of A2C in Baselines and of A3C count one by one, as their sources do.
@pytest.mark.parametrize(("name", "count"), [pair for pair in COUNTED if pair[0] not in ("a2c_baselines", "a3c")])
def test_largest_count_gives_the_rate_of_the_formula(x64: None, name: str, count: str) -> None:
    others = {key: x for key, x in enough(name, count).items() if key != count}
    schedule = schedule_of(name, **others | {count: LAST_STEP})
    for step in (0, 1, 7, LAST_STEP - 1, LAST_STEP):
        want = RATES[name](step, **others | {count: LAST_STEP})
        np.testing.assert_allclose(schedule(jnp.int32(step)), want, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize(("name", "count"), COUNTED)
@pytest.mark.parametrize("value", [0, -1, 2**31, 10**400, 2.5, 3.0, None, True, "3", jnp.float32(3), np.array([3])])
def test_count_that_is_not_one_is_refused(name: str, count: str, value: Any) -> None:
    error = ValueError if type(value) is int else TypeError
    with pytest.raises(error, match=rf"^{count} must be a whole number from 1 to 2³¹ − 1, got ") as raised:
        build(name, **{count: value})
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(("name", "count"), COUNTED)
def test_traced_count_is_refused(name: str, count: str) -> None:
    with pytest.raises(TypeError, match=rf"^{count} must be .* that is known when the transformation is built"):
        jax.jit(lambda value: build(name, **{count: value}) and value)(3)


@pytest.mark.parametrize("name", FRACTIONAL)
def test_epoch_need_not_be_whole(name: str) -> None:
    for epoch in (0.5, np.float16(2.5), Fraction(5, 2), Decimal("625.5"), jnp.float32(2.5), np.int8(100), 7):
        given = schedule_of(name, steps_per_epoch=epoch)
        expected = schedule_of(name, steps_per_epoch=float(epoch))
        assert [float(given(jnp.int32(n))) for n in (0, 3, 500)] == [float(expected(jnp.int32(n))) for n in (0, 3, 500)]
    for wrong in (0, -1.0, math.nan, math.inf, "10", True, [1.0]):
        with pytest.raises((TypeError, ValueError), match=r"^steps_per_epoch must be"):
            build(name, steps_per_epoch=wrong)
    with pytest.raises(ValueError, match=r"^steps_per_epoch must be a finite number of updates that is known here"):
        jax.jit(lambda epoch: build(name, steps_per_epoch=epoch) and epoch)(3.0)


LIMITS = [
    (name, limit)
    for name, row in RECIPES.items()
    for limit in ("max_norm", "limit", "clipping", "smallest_norm")
    if limit in inspect.signature(row.build).parameters
]


@pytest.mark.parametrize(("name", "limit"), LIMITS)
def test_limit_is_a_number_above_0(name: str, limit: str) -> None:
    for wrong in (0, 0.0, -1.0, math.nan, "1", None, True, np.array([1.0]), jnp.array(0.0)):
        with pytest.raises((TypeError, ValueError), match=rf"^{limit} must be a number ") as raised:
            build(name, **{limit: wrong})
        assert len(str(raised.value)) < 200
    for right in (math.inf, 1, np.float16(0.5), Fraction(1, 2), jnp.bfloat16(0.5)):
        tx, params = build(name, **{limit: right}), jnp.ones(2)
        with jax.numpy_dtype_promotion("strict"):
            jax.eval_shape(lambda params, tx=tx: tx.update(params, tx.init(params), params), params)


@pytest.mark.parametrize("name", RULES)
def test_number_is_refused_under_its_own_name(name: str) -> None:
    parameters = inspect.signature(RECIPES[name].build).parameters
    for number in ("lr", "alpha", "beta1", "beta2", "eps", "momentum", "weight_decay"):
        if number in parameters:
            for wrong in (-1.0, math.nan, "0.1", True):
                with pytest.raises((TypeError, ValueError), match=rf"^{number} must be a number "):
                    build(name, **{number: wrong})


@pytest.mark.parametrize("total", [0, 12_799, np.float32(12_799), jnp.array(5.0), math.inf])
def test_total_that_ends_before_the_first_update_does_is_refused(total: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^total_frames must be finite and at least frames_per_update, the 12800 that"
    ):
        recipes.impala(12_800, total_frames=total)
    with pytest.raises(
        ValueError, match=r"^total_steps must be finite and at least unroll_length · batch_size, the 640 "
    ):
        recipes.torchbeast(total_steps=639)
    with pytest.raises(ValueError, match=r"^total_steps must be finite and at least samples_per_update, the 80 that"):
        recipes.a2c_baselines(80, total_steps=79)
    recipes.impala(12_800, total_frames=12_800)
    recipes.torchbeast(total_steps=640)


@pytest.mark.parametrize("total", [-1, math.nan, None, "1e9", True])
def test_total_that_is_not_a_number_is_refused(total: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^total_frames must be a number ≥ 0"):
        recipes.impala(12_800, total_frames=total)


@pytest.mark.parametrize("name", ["dreamer_v3", "dpo", "efficientnet"])
def test_rate_may_be_any_number_or_scalar_array(name: str) -> None:
    rows = [(0.25, np.float16(0.25)), (0.25, Fraction(1, 4)), (0.25, Decimal("0.25")), (0.25, np.array(0.25)), (1.0, 1)]
    rows += [(0.25, jnp.bfloat16(0.25)), (0.25, jnp.float32(0.25))]
    with jax.numpy_dtype_promotion("strict"):
        for expected, given in rows:
            for step in (0, 7, 1000, LAST_STEP):
                assert schedule_of(name, lr=given)(jnp.int32(step)) == schedule_of(name, lr=expected)(jnp.int32(step))


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: recipes.dpo(learning_rate=1e-6), r"dpo has no argument learning_rate; did you mean lr=1e-06\?"),
        (lambda: recipes.char_rnn(epochs=3), "char_rnn has no argument epochs; it takes steps_per_epoch"),
        (lambda: recipes.a2c(epsilon=1e-3), r"a2c has no argument epsilon; did you mean eps=0.001\?"),
        (lambda: recipes.a2c({"w": jnp.ones(3)}), "lr must be a number ≥ 0 .*go to init and update"),
    ],
)
def test_recipe_says_what_it_takes(call: Callable[[], Any], hint: str) -> None:
    with pytest.raises(TypeError, match=f"^{hint}"):
        call()


# --- Dtypes, and leaves that are no arrays -----------------------------------------------------------------


# One recipe for each thing that stands around an RMSProp.
SURROUNDED = ("dreamer_v3", "a2c", "char_rnn", "wgan_critic", "mnasnet")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in RULES for dtype in ("bfloat16", "complex64")]
    + [(name, dtype) for name in SURROUNDED for dtype in ("float16", "float8_e4m3fn")],
)
def test_recipe_takes_every_dtype_under_strict_promotion(name: str, dtype: str) -> None:
    """A gradient of 300 is infinitely long in float16: its square is above 65504."""
    params = {"w": jnp.full(3, 0.5, dtype), "frozen": jnp.zeros(2, dtype), "flag": True, "f": np.tanh, "none": None}
    grads = {"w": jnp.full(3, 300, dtype), "frozen": None, "flag": None, "f": None, "none": None}
    with jax.numpy_dtype_promotion("strict"):
        tx = build(name)
        state = tx.init(params)
        for _ in range(2):  # the first rate of a warm-up is 0
            updates, state = tx.update(grads, state, params)
    assert updates["w"].dtype == dtype
    assert {key for key, update in updates.items() if update is None} == {"flag", "f", "none"}
    np.testing.assert_array_equal(updates["frozen"].astype(np.complex64), np.zeros(2))
    w = updates["w"].astype(np.complex64)
    assert np.isfinite(w).all()
    if dtype != "float8_e4m3fn":  # whose smallest number is 0.002
        assert (w.real < 0).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def seen_by(tx: optax.GradientTransformation, grads: Any, params: Any) -> Any:
    """What passes the first of a chain, which keeps no state."""
    return tx.update(grads, optax.EmptyState(), params)[0]


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 1e30), ("float32", 300), ("float16", 300), ("bfloat16", 1e30), ("float32", 1e-30)]
)
def test_norms_do_not_overflow(dtype: str, size: float) -> None:
    grads = {"a": jnp.full((2, 2), size, dtype), "b": jnp.full(5, -size, dtype)}
    rtol = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
    together = seen_by(clipping.clip_by_global_norm(0.5), grads, None)
    for key, sign in (("a", 1), ("b", -1)):
        assert together[key].dtype == dtype
        np.testing.assert_allclose(np.asarray(together[key], np.float64), sign * min(size, 0.5 / 3), rtol=rtol)
    alone = seen_by(clipping.clip_by_parameter_norm(0.3, 1e-3), grads, grads)
    np.testing.assert_allclose(np.asarray(alone["a"], np.float64), min(size, max(0.3 * size, 0.3e-3 / 2)), rtol=rtol)


def test_norm_of_leaves_of_many_dtypes_is_one(x64: None) -> None:
    grads = {
        "a": jnp.full(4, 3.0, jnp.float64),
        "b": jnp.full(4, 4.0, jnp.bfloat16),
        "c": jnp.full(1, 12j, jnp.complex64),
    }
    with jax.numpy_dtype_promotion("strict"):
        clipped = seen_by(clipping.clip_by_global_norm(1.0), grads, None)
    norm = math.sqrt(4 * 9 + 4 * 16 + 144)
    np.testing.assert_allclose(clipped["a"], 3 / norm, rtol=1e-14)
    np.testing.assert_allclose(clipped["b"].astype(np.float64), 4 / norm, rtol=1e-2)
    np.testing.assert_allclose(clipped["c"], 12j / norm, rtol=1e-6)
    clipped = seen_by(clipping.clip_by_global_norm(1.0), grads | {"d": jnp.float32(1e30)}, None)
    np.testing.assert_allclose(clipped["d"], 1.0, rtol=1e-6)


def test_global_norm_is_that_of_optax_and_has_derivatives() -> None:
    rng = np.random.default_rng(0)

    @jax.jit
    def both(grads: Any) -> Any:
        ours, pull_back = jax.vjp(lambda g: seen_by(clipping.clip_by_global_norm(0.5), g, None), grads)
        return ours, seen_by(optax.clip_by_global_norm(0.5), grads, None), pull_back(grads)

    for size in (0.0, 1e-3, 1.0, 1e3):
        grads = {"a": jnp.asarray(size * rng.normal(size=(3, 4)), jnp.float32), "b": jnp.float32(size)}
        ours, theirs, slopes = both(grads)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-7), ours, theirs)
        assert all(np.isfinite(slope).all() for slope in jax.tree.leaves(slopes))
    assert seen_by(clipping.clip_by_global_norm(0.5), {}, None) == {}


@pytest.mark.parametrize("name", ["a2c", "dreamer_v3", "wgan_critic", "char_rnn"])
def test_zero_gradient_makes_no_nan_on_the_way(name: str) -> None:
    tx = build(name)
    params = jnp.zeros(3)
    with jax.debug_nans(True):
        updates, _ = tx.update(jnp.zeros(3), tx.init(params), params)
    np.testing.assert_array_equal(updates, np.zeros(3))


def test_complex_weights_are_clipped_and_held_as_two_real_ones() -> None:
    z = jnp.array([0.5 - 0.001j, -0.02 + 7.0j], jnp.complex64)
    held = z + seen_by(clipping.hold_weights_within(0.01), jnp.zeros_like(z), z)
    # Beside 7, a float32 knows 0.01 to 2.4e-7.
    np.testing.assert_allclose(held, [0.01 - 0.001j, -0.01 + 0.01j], atol=5e-7)
    np.testing.assert_allclose(seen_by(clipping.clip_entries(5.0), z, None), [0.5 - 0.001j, -0.02 + 5.0j], rtol=1e-6)


def test_weights_are_held_in_their_own_precision(x64: None) -> None:
    """Gradients, and so updates, may be narrower."""
    with jax.numpy_dtype_promotion("strict"):
        held = seen_by(clipping.hold_weights_within(0.01), jnp.full(1, 0.5, jnp.float32), jnp.full(1, 0.5, jnp.float64))
    np.testing.assert_allclose(held, [-0.49], rtol=1e-6)
    params, updates = jnp.array([0.5, 0.0099], jnp.float32), jnp.array([-0.1, 0.01], jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        held = seen_by(clipping.hold_weights_within(0.01), updates, params)
    assert held.dtype == jnp.bfloat16
    np.testing.assert_allclose(params + held.astype(np.float32), [0.01, 0.01], atol=0.49 * 2**-8)


def test_decay_of_efficientnet_is_not_lost_in_half_precision() -> None:
    """Beside a gradient of 1, bfloat16 does not see 1e-5 · p; the average does."""
    tx = recipes.efficientnet(None, batch_size=256, steps_per_epoch=10)
    params, grads = jnp.full(2, 100.0, jnp.bfloat16), jnp.ones(2, jnp.bfloat16)
    _, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(state.square_avg, 0.9 + 0.1 * 1.001**2, rtol=1e-6)


def test_what_is_no_gradient_is_reported_by_the_rmsprop() -> None:
    for tx in (recipes.a2c(), recipes.char_rnn(10), recipes.dreamer_v3(), recipes.wgan_critic()):
        params = {"w": jnp.ones(2)}
        with pytest.raises(TypeError, match=r"^updates\['w'\] has dtype int32, but .* has dtype float32"):
            tx.update({"w": jnp.ones(2, jnp.int32)}, tx.init(params), params)


def test_params_of_another_structure_are_named() -> None:
    tx, params = recipes.dreamer_v3(), {"w": jnp.ones(2), "b": jnp.ones(1)}
    with pytest.raises(ValueError, match=r"^updates must have the structure of params, but they differ in ..'b'.."):
        tx.update(params, tx.init(params), {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"^updates must have the structure of params, but they differ in .their cont"):
        tx.update([jnp.ones(2)], tx.init([jnp.ones(2)]), (jnp.ones(2),))


@pytest.mark.parametrize("name", ["dreamer_v3", "wgan_critic"])
def test_recipe_that_needs_params_says_so(name: str) -> None:
    tx = build(name)
    with pytest.raises(ValueError, match=r"^params must be given"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


@pytest.mark.parametrize("name", RULES)
def test_recipe_trains_inside_jit(name: str) -> None:
    tx = build(name)
    params = {"w": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.ones(3)}

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("strict"):
        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state)
    assert step._cache_size() == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))
