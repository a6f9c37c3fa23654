"""Edges of the files that move in: what a slip in one line of ``checkpoints`` would lose without a word."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import dialects, rmsprop
from rmsprop_jax.checkpoints import from_optax, from_torch, schedules_of, to_optax, to_torch
from rmsprop_jax.checkpoints.named import build_optimizer
from rmsprop_jax.checkpoints.rearrangement import Like, sources_of
from rmsprop_jax.checkpoints.slots import Parameter, variance
from rmsprop_jax.state import check_containers, find_states

torch = pytest.importorskip("torch")

GROUP = dict(lr=0.1, alpha=0.9, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False)


def file_of(groups, **entries):
    return {"state": dict(entries), "param_groups": groups}


def entry(n=2, step=1, **more):
    return {"step": step, "square_avg": np.ones(n, "f4"), **more}


@pytest.mark.parametrize(
    "change", [np.abs, np.sort, lambda x: np.full_like(x, x.mean()), lambda x: np.maximum(x, 0), np.negative]
)
def test_what_depends_on_the_numbers_is_no_rearrangement(change):
    with pytest.raises(ValueError, match=r"^f puts numbers into 'out'"):
        sources_of("f", [Like("'a'", (64,), False)], lambda arrays: [("'out'", change(arrays[0]))])


def test_conjugate_is_no_rearrangement():
    with pytest.raises(ValueError, match=r"^f puts numbers into 'out'"):
        sources_of("f", [Like("'a'", (4,), True)], lambda arrays: [("'out'", arrays[0].conj())])


def test_more_elements_than_one_digit_counts():
    likes = [Like("'a'", (2**22,), False), Like("'b'", (3,), False)]
    assert sources_of("f", likes, lambda a: [("x", a[1]), ("y", a[0])]) == [("x", [1]), ("y", [0])]


def test_shape_that_depends_on_the_numbers_is_refused():
    with pytest.raises(ValueError, match=r"^f puts numbers into 'out'"):
        sources_of("f", [Like("'a'", (64,), False)], lambda arrays: [("'out'", arrays[0][arrays[0] > 1.5])])


def test_new_parameter_of_a_file_with_two_groups_needs_its_group():
    file = {"state": {0: entry(), 1: entry()}, "param_groups": [{"params": [0], **GROUP}, {"params": [1], **GROUP}]}
    with pytest.raises(ValueError, match=r"^params has 'c', which is not in names, but the file has 2 groups"):
        from_torch(file, ["a", "b"], dict, params={"a": (2,), "b": (2,), "c": (2,)}, missing="init")


def test_parameter_that_grew_stays_in_its_group():
    file = {
        "state": {0: entry(), 1: entry()},
        "param_groups": [{"params": [0], **GROUP}, {"params": [1], **GROUP, "momentum": 0.9}],
    }
    file["state"][1]["momentum_buffer"] = np.ones(2, "f4")
    with pytest.warns(UserWarning, match=r"start anew: b$"):
        _, state = from_torch(file, ["a", "b"], dict, params={"a": (2,), "b": (3,)}, missing="init")
    assert state.inner_states["group1"].inner_state.momentum_buffer["b"].shape == (3,)


def test_matrix_that_grew_in_its_last_dimension_starts_anew():
    file = {"state": {0: {"step": 1, "square_avg": np.ones((2, 3), "f4")}}, "param_groups": [{"params": [0], **GROUP}]}
    with pytest.warns(UserWarning, match=r"start anew: a$"):
        from_torch(file, ["a"], dict, params={"a": (2, 4)}, missing="init")


def test_numbers_of_the_groups_may_be_a_tuple():
    file = {"state": {0: entry(), 1: entry()}, "param_groups": [{"params": [0], **GROUP}, {"params": [1], **GROUP}]}
    seen = []
    from_torch(
        file, ["a", "b"], dict, lr=(0.3, 0.4), transformation=lambda **h: (seen.append(h["lr"]), rmsprop(**h))[1]
    )
    assert seen == [0.3, 0.4]


@pytest.mark.parametrize("is_given", ["momentum", "neither"])
def test_buffer_of_a_scheduler_at_momentum_zero_is_kept(is_given):
    file = {"state": {0: entry(momentum_buffer=np.full(2, 5.0, "f4"))}, "param_groups": [{"params": [0], **GROUP}]}
    if is_given == "neither":
        with pytest.raises(ValueError, match=r"is without momentum > 0"):
            from_torch(file, ["a"], dict)
    else:
        _, state = from_torch(file, ["a"], dict, momentum=lambda count: 0.9)
        np.testing.assert_array_equal(state.momentum_buffer["a"], [5.0, 5.0])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("centered", 2, "'centered' of group 0 must be True or False, got 2"),
        ("lr", lambda step: 0.1, "'lr' of group 0 must be a number, got <function"),
        ("lr", 1e300, "'lr' of group 0 is 1e+300, which is infinite in float32"),
    ],
)
def test_number_of_a_group_that_is_none(key, value, message):
    file = {"state": {}, "param_groups": [{"params": [0], **GROUP, key: value}]}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        from_torch(file, ["a"], dict, params={"a": (2,)})


def test_step_true_is_refused():
    with pytest.raises(TypeError, match=r"^step must be an integer, got True"):
        from_torch({"state": {0: entry()}, "param_groups": [{"params": [0], **GROUP}]}, ["a"], dict, step=True)


def test_step_zero_is_a_step():
    file = {"state": {0: entry(step=0), 1: entry(step=0)}, "param_groups": [{"params": [0, 1], **GROUP}]}
    _, state = from_torch(file, ["a", "b"], dict, step=0)
    assert int(state.step) == 0


def test_like_in_another_form_is_refused():
    state = rmsprop(0.1).init({"a": jnp.ones(2)})
    flat = {
        "state.a.step": 1.0,
        "state.a.square_avg": np.ones(2, "f4"),
        **{f"param_groups.a.{k}": v for k, v in GROUP.items()},
    }
    with pytest.raises(
        ValueError, match=r"^like must be what state_dict.. of a torch.optim.RMSprop returns, got the flattened form"
    ):
        to_torch(state, ["a"], dict, like=flat, tensor=np.asarray)


def test_tensors_are_contiguous():
    state = rmsprop(0.1).init({"a": jnp.ones((2, 3))})
    like = {"state": {}, "param_groups": [{"params": [0], **GROUP}]}
    back = to_torch(state, ["a"], lambda p: {"a": p["a"].T}, like=like, tensor=torch.from_numpy)
    assert back["state"][0]["square_avg"].is_contiguous()


def test_second_group_of_a_scheduler_warns_too():
    file = {"state": {}, "param_groups": [{"params": [0], **GROUP}, {"params": [1], **GROUP, "initial_lr": 0.1}]}
    with pytest.warns(UserWarning, match=r"^group 1 has 'initial_lr'"):
        from_torch(file, ["a", "b"], dict, params={"a": (2,), "b": (2,)})


def test_place_of_an_rmsprop_is_found_deep_and_beside_others():
    good = {"state": {}, "param_groups": [{"params": [0], **GROUP}]}
    adam = {"state": {}, "param_groups": [{"params": [0], "lr": 0.1, "betas": (0.9, 0.999)}]}
    with pytest.raises(ValueError, match=r"optimizer_state_dict") as raised:
        from_torch({"adam": adam, "a": {"b": {"c": [good]}}}, ["a"], dict)
    assert str(raised.value).endswith("did you mean optimizer_state_dict['a']['b']['c'][0]?")


def test_flattened_rates_that_look_alike_are_two_groups():
    def flat(name, lr):
        return {
            f"state.{name}.step": 1.0,
            f"state.{name}.square_avg": np.ones(2, "f4"),
            **{f"param_groups.{name}.{k}": v for k, v in (GROUP | {"lr": lr}).items()},
        }

    seen = []
    from_torch(
        {**flat("a", torch.tensor(0.1)), **flat("b", torch.tensor(0.10001))},
        ["a", "b"],
        dict,
        transformation=lambda **h: (seen.append(h["lr"]), rmsprop(**h))[1],
    )
    assert np.allclose(seen, [0.1, 0.10001], rtol=1e-7)


def test_flattened_groups_of_different_keys_are_two_groups():
    def flat(name, **more):
        return {
            f"state.{name}.step": 1.0,
            f"state.{name}.square_avg": np.ones(2, "f4"),
            **{f"param_groups.{name}.{k}": v for k, v in (GROUP | more).items()},
        }

    with pytest.warns(UserWarning, match=r"group 0 has 'initial_lr'"):
        _, state = from_torch({**flat("a", initial_lr=0.1), **flat("b")}, ["a", "b"], dict)
    assert len(state.inner_states) == 2


def test_names_in_a_flattened_file_make_no_groups():
    def flat(name):
        return {
            f"state.{name}.step": 1.0,
            f"state.{name}.square_avg": np.ones(2, "f4"),
            **{f"param_groups.{name}.{k}": v for k, v in (GROUP | {"param_names": name}).items()},
        }

    _, state = from_torch({**flat("a"), **flat("b")}, ["a", "b"], dict)
    assert state.square_avg["a"].shape == (2,)


BNB = dict(lr=0.1, betas=(0.9, 0.0), eps=1e-8, weight_decay=0.0)


@pytest.mark.parametrize(
    ("state", "group", "error"),
    [
        ({"state1": np.zeros(2, np.uint8)}, {}, "8-bit"),
        ({"state1": np.ones(2, "f4"), "absmax1": np.ones(1, "f4")}, {}, "8-bit"),
        ({"state1": np.ones(2, "f4"), "qmap1": np.ones(1, "f4")}, {}, "8-bit"),
        ({"state1": np.ones(2, "f4")}, {"alpha": 0.5}, "Adam's family"),
        ({"state1": np.ones(2, "f4")}, {"betas": 0.9}, r"must be \(alpha, momentum\)"),
        ({"state1": np.ones(2, "f4")}, {"betas": ()}, r"must be \(alpha, momentum\)"),
    ],
)
def test_bitsandbytes_refusals(state, group, error):
    with pytest.raises((TypeError, ValueError), match=error):
        from_torch({"state": {0: {"step": 1, **state}}, "param_groups": [{"params": [0], **BNB, **group}]}, ["a"], dict)


def test_names_behind_fsdp_go_by_name():
    file = {
        "state": {0: entry(1), 1: entry(1)},
        "param_groups": [
            {"params": [0, 1], **GROUP, "param_names": ["_fsdp_wrapped_module.b", "_fsdp_wrapped_module.a"]}
        ],
    }
    file["state"][0]["square_avg"] *= 2
    _, state = from_torch(file, ["a", "b"], dict)
    assert {k: float(x[0]) for k, x in state.square_avg.items()} == {"a": 1.0, "b": 2.0}


def test_empty_group_among_named_ones():
    file = {
        "state": {"b": entry(1), "a": entry(1)},
        "param_groups": [{"params": ["b", "a"], **GROUP}, {"params": [], **GROUP}],
    }
    file["state"]["b"]["square_avg"] *= 2
    _, state = from_torch(file, ["a", "b"], dict)
    part = state.inner_states["group0"].inner_state
    assert {k: float(x[0]) for k, x in part.square_avg.items()} == {"a": 1.0, "b": 2.0}


def test_module_in_a_name_is_kept_where_names_are_equal():
    file = {"state": {k: entry(1) for k in ("module.a", "a")}, "param_groups": [{"params": ["module.a", "a"], **GROUP}]}
    file["state"]["module.a"]["square_avg"] *= 2
    _, state = from_torch(file, ["a", "module.a"], dict)
    assert float(state.square_avg["module.a"][0]) == 2.0


@pytest.mark.parametrize("step", [2**31, True])
def test_step_that_is_none(step):
    with pytest.raises((TypeError, ValueError), match=r"^'step' of 'a' must be"):
        from_torch({"state": {0: entry(step=step)}, "param_groups": [{"params": [0], **GROUP}]}, ["a"], dict)


def test_bool_is_no_key():
    with pytest.raises(TypeError, match=r"^'params' of group 0"):
        from_torch({"state": {True: entry()}, "param_groups": [{"params": [True], **GROUP}]}, ["a"], dict)


def test_conjugate_view_is_read():
    x = torch.tensor([1 + 2j, 3 - 4j]).conj()
    file = {
        "state": {0: {"step": 1, "square_avg": torch.ones(2, dtype=torch.complex64), "momentum_buffer": x}},
        "param_groups": [{"params": [0], **GROUP, "momentum": 0.9}],
    }
    assert x.is_conj()
    _, state = from_torch(file, ["a"], dict)
    np.testing.assert_array_equal(state.momentum_buffer["a"], np.array([1 - 2j, 3 + 4j], "c8"))


def test_other_byte_order_is_read():
    file = {
        "state": {0: {"step": 1, "square_avg": np.array([1.0, 2.0], ">f4")}},
        "param_groups": [{"params": [0], **GROUP}],
    }
    _, state = from_torch(file, ["a"], dict)
    np.testing.assert_array_equal(state.square_avg["a"], [1.0, 2.0])


def test_adam_without_betas():
    file = {"state": {0: {"step": 1, "exp_avg": np.ones(2, "f4")}}, "param_groups": [{"params": [0], **GROUP}]}
    with pytest.raises(ValueError, match=r"Adam's family"):
        from_torch(file, ["a"], dict)


def test_key_without_a_name_in_a_flattened_file():
    with pytest.raises(ValueError, match=r"has 'state.step' among keys"):
        from_torch({"param_groups.a.lr": 0.1, "state.step": 1.0}, ["a"], dict)


def test_impossible_average_is_seen_behind_the_bias_correction():
    """decay 0.9, step 1: weight 0.1, so nu ≥ mu²/0.1."""
    with pytest.raises(ValueError, match=r"were the two swapped"):
        variance("w", np.float32([0.02]), np.float32([0.1]), weight=0.1)


def test_tolerance_of_the_variance_is_that_of_its_dtype():
    variance("w", np.float32([1.0 - 5e-4]), np.float32([1.0]))
    with pytest.raises(ValueError, match=r"were the two swapped"):
        variance("w", np.float32([0.99]), np.float32([1.0]))
    variance("w", np.asarray([0.9], jnp.bfloat16), np.asarray([1.0], jnp.bfloat16))
    with pytest.raises(ValueError, match=r"were the two swapped"):
        variance("w", np.float64([1 - 1e-9]), np.float64([1.0]))


def test_squares_that_underflow_have_no_variance():
    np.testing.assert_array_equal(variance("w", np.float32([0.0]), np.float32([1e-25])), [0.0])


def test_impossible_imaginary_part_is_seen():
    with pytest.raises(ValueError, match=r"swapped"):
        variance("w", np.complex64([1 + 0.1j]), np.complex64([0.1 + 10j]))


def test_infinite_average_stays_infinite():
    from rmsprop_jax.checkpoints.slots import average_of_squares

    assert np.isinf(average_of_squares("w", np.float32([np.inf]), np.float32([1.0]))).all()


def test_missing_slot_starts_as_its_own_group_starts():
    p = [Parameter(n, g, (2,), np.dtype(np.float32), None, {}) for g, n in enumerate("ab")]
    _, state = build_optimizer(
        p, dict, [dialects.optax(0.1, initial_scale=0.25), dialects.optax(0.1, initial_scale=0.5)]
    )
    assert [float(s.inner_state.square_avg[n][0]) for n, s in zip("ab", state.inner_states.values(), strict=True)] == [
        0.25,
        0.5,
    ]


def test_missing_slot_starts_in_the_precision_of_its_parameter(x64):
    p = [Parameter("a", 0, (2,), np.dtype(np.float64), None, {})]
    _, state = build_optimizer(p, dict, [dialects.optax(0.1, initial_scale=0.1)])
    assert float(state.square_avg["a"][0]) == 0.1


def test_nan_around_the_rmsprop_is_no_value_of_the_parameters():
    tx = optax.chain(
        rmsprop(0.1), optax.GradientTransformation(lambda p: {"best": jnp.array(jnp.nan)}, lambda u, s, p=None: (u, s))
    )
    p = [Parameter("a", 0, (2,), np.dtype(np.float32), 1, {"square_avg": np.ones(2, "f4")})]
    build_optimizer(p, dict, [tx])


def test_check_containers():
    deep: Any = jnp.ones(1)
    for _ in range(200):
        deep = (deep,)
    with pytest.raises(ValueError, match=r"^s must not be nested deeper than 100"):
        check_containers("s", deep)
    deep = jnp.ones(1)
    for _ in range(200):
        deep = [deep]
    with pytest.raises(ValueError, match=r"^s must not be nested deeper than 100"):
        check_containers("s", deep)
    deep = jnp.ones(1)
    for _ in range(90):
        deep = (deep,)
    check_containers("s", deep)
    with pytest.raises(ValueError, match=r"^s/nu/a has keys that cannot be sorted"):
        check_containers("s", optax.ScaleByRmsState({"a": {1: 0, "b": 0}}))
    with pytest.raises(ValueError, match=r"^s/1 has keys"):
        check_containers("s", (0, {1: 0, "b": 0}))
    with pytest.raises(ValueError, match=r"^s/1 has keys"):
        check_containers("s", [0, {1: 0, "b": 0}])
    with pytest.raises(ValueError, match=r"^state/x has keys"):
        find_states("state", {"x": {1: 0, "b": 0}})


# --- Optax -----------------------------------------------------------------------------------------------------

PLAIN = {"w": jnp.ones(2)}


def falling(count):
    return 0.1 / (1 + count)


def upd(tx, n=3):
    s = tx.init(PLAIN)
    for i in range(n):
        _, s = tx.update({"w": jnp.array([1.0, -2.0]) * (i + 1)}, s, PLAIN)
    return s


def test_multisteps_alone_gives_the_step():
    state = from_optax(
        upd(optax.MultiSteps(optax.rmsprop(0.1), 2), 5), like=optax.MultiSteps(dialects.optax(0.1), 2).init(PLAIN)
    )
    assert int(state.inner_opt_state.step) == 2


@pytest.mark.parametrize("n", [0, 3])
def test_decay_of_zero(n):
    theirs, ours = (f(0.1, decay=0.0, bias_correction=True) for f in (optax.rmsprop, dialects.optax))
    s = upd(theirs, n)
    state = from_optax(s, like=ours.init(PLAIN), decay=0.0, step=n)
    np.testing.assert_allclose(state.square_avg["w"], s[0].nu["w"])


def test_counts_that_differ_within_one_rmsprop():
    s = upd(optax.rmsprop(falling, bias_correction=True))
    s = (s[0]._replace(count=jnp.int32(9)), *s[1:])
    with pytest.raises(ValueError, match=r"^opt_state counts 9 and 3 updates"):
        from_optax(s, like=dialects.optax(falling, bias_correction=True).init(PLAIN), decay=0.9)


def test_stack_of_corrected_states():
    params = {"w": jnp.arange(6.0).reshape(3, 2)}
    tx, ours = (f(falling, bias_correction=True) for f in (optax.rmsprop, dialects.optax))
    with pytest.raises(ValueError, match=r"is a stack of bias-corrected states of shape"):
        from_optax(jax.vmap(tx.init)(params), like=jax.vmap(ours.init)(params), decay=0.9)


def test_steps_that_are_not_stacked_as_the_slots():
    like = dialects.optax(falling).init(PLAIN)._replace(step=jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"which is not how its slots are stacked"):
        from_optax(optax.rmsprop(falling).init(PLAIN), like=like)


def test_counts_of_another_shape():
    s = optax.rmsprop(falling).init(PLAIN)
    s = tuple(p._replace(count=jnp.zeros(3, jnp.int32)) if "count" in getattr(p, "_fields", ()) else p for p in s)
    with pytest.raises(ValueError, match=r"counts .0, 0, 0., but in like it counts one of shape"):
        from_optax(s, like=dialects.optax(falling).init(PLAIN))


def test_chain_of_more_than_ten_parts():
    more = [optax.identity()] * 9
    theirs = optax.chain(*more, optax.scale_by_rms(0.9), optax.trace(0.9), optax.scale(-0.1), optax.clip(1.0))
    ours = optax.chain(*more, rmsprop(0.1, alpha=0.9, momentum=0.9), optax.clip(1.0))
    s = upd(theirs)
    state = from_optax(s, like=ours.init(PLAIN), step=3)
    np.testing.assert_array_equal(state[9].momentum_buffer["w"], s[10].trace["w"])
    back = to_optax(state, like=theirs.init(PLAIN))
    np.testing.assert_array_equal(back[10].trace["w"], s[10].trace["w"])


def test_parts_behind_the_rmsprop_in_a_chain_of_your_own_go_back():
    theirs = optax.chain(optax.scale_by_rms(0.9), optax.scale(-0.1), optax.ema(0.5))
    ours = optax.chain(rmsprop(0.1, alpha=0.9), optax.ema(0.5))
    s = upd(theirs)
    back = to_optax(from_optax(s, like=ours.init(PLAIN), step=3), like=theirs.init(PLAIN))
    np.testing.assert_array_equal(back[2].ema["w"], s[2].ema["w"])


def test_injected_number_that_is_nan():
    s = upd(optax.inject_hyperparams(optax.rmsprop)(0.1))
    s = s._replace(hyperparams=s.hyperparams | {"learning_rate": jnp.array(jnp.nan)})
    with pytest.raises(ValueError, match=r"take a state from before the run diverged"):
        from_optax(s, like=optax.inject_hyperparams(dialects.optax)(0.1).init(PLAIN))


def test_infinite_trace_goes_out():
    tx = dialects.optax(0.1, momentum=0.9)
    state = tx.init(PLAIN)._replace(momentum_buffer={"w": jnp.array([jnp.inf, 1.0])})
    back = to_optax(state, like=optax.rmsprop(0.1, momentum=0.9).init(PLAIN))
    assert np.isinf(back[2].trace["w"][0])


def test_step_of_numpy():
    assert (
        int(
            from_optax(upd(optax.rmsprop(0.1)), like=dialects.optax(0.1).init(PLAIN), step=np.int64(3))[0]
            if False
            else from_optax(upd(optax.rmsprop(0.1)), like=dialects.optax(0.1).init(PLAIN), step=np.int64(3)).step
        )
        == 3
    )


def test_negative_step():
    with pytest.raises(ValueError, match=r"^step must be a number of updates"):
        from_optax(upd(optax.rmsprop(0.1)), like=dialects.optax(0.1).init(PLAIN), step=-1)


def test_containers_that_jax_cannot_walk():
    with pytest.raises(ValueError, match=r"^opt_state.* has keys that cannot be sorted"):
        from_optax({1: PLAIN, "a": 0}, like=dialects.optax(0.1).init(PLAIN), step=0)
    with pytest.raises(ValueError, match=r"^like.* has keys that cannot be sorted"):
        to_optax(dialects.optax(0.1).init(PLAIN), like={1: PLAIN, "a": 0})


def test_byte_order_and_mask_of_optax():
    s = upd(optax.rmsprop(0.1))
    big = (s[0]._replace(nu={"w": np.asarray(s[0].nu["w"], ">f4")}), *s[1:])
    state = from_optax(big, like=dialects.optax(0.1).init(PLAIN), step=3)
    np.testing.assert_array_equal(state.square_avg["w"], s[0].nu["w"])
    masked = (s[0]._replace(nu={"w": np.ma.masked_array(s[0].nu["w"])}), *s[1:])
    with pytest.raises(TypeError, match=r"without a mask"):
        from_optax(masked, like=dialects.optax(0.1).init(PLAIN), step=3)


def test_array_around_the_rmsprop_of_another_shape():
    s = upd(optax.chain(optax.ema(0.5), optax.rmsprop(0.1)))
    s = (s[0]._replace(ema={"w": jnp.ones(3)}), *s[1:])
    with pytest.raises(ValueError, match=r"is float32 \(3,\), but in like it is float32 \(2,\)"):
        from_optax(s, like=optax.chain(optax.ema(0.5), dialects.optax(0.1)).init(PLAIN), step=3)


def test_leaf_for_a_container():
    s = upd(optax.chain(optax.ema(0.5), optax.rmsprop(0.1)))
    with pytest.raises(ValueError, match=r"^opt_state.* but in like it is a EmaState"):
        from_optax((jnp.ones(2), s[1]), like=optax.chain(optax.ema(0.5), dialects.optax(0.1)).init(PLAIN), step=3)


@pytest.mark.parametrize("key", ["lr", "alpha", "eps", "weight_decay"])
def test_group_has_every_number(key):
    group = {k: v for k, v in GROUP.items() if k != key}
    with pytest.raises(ValueError, match=f"^group 0 has no '{key}'"):
        from_torch({"state": {0: entry()}, "param_groups": [{"params": [0], **group}]}, ["a"], dict)


@pytest.mark.parametrize("key", ["maximize", "caution", "corrected_weight_decay"])
def test_switch_that_is_off_asks_for_nothing(key):
    from_torch(
        {"state": {0: entry()}, "param_groups": [{"params": [0], **GROUP, key: False}]},
        ["a"],
        dict,
        transformation=lambda lr, alpha, eps, weight_decay, momentum, centered: rmsprop(lr),
    )


def test_betas_in_one_of_two_groups():
    with pytest.raises((ValueError, TypeError), match=r"Adam's family"):
        from_torch(
            {
                "state": {0: entry(), 1: entry()},
                "param_groups": [{"params": [0], **GROUP}, {"params": [1], **GROUP, "betas": (0.9, 0.9)}],
            },
            ["a", "b"],
            dict,
        )


def test_words_for_numbers():
    with pytest.raises(TypeError, match=r"^'square_avg' of 'a' must be an array of numbers"):
        from_torch(
            {"state": {0: {"step": 1, "square_avg": np.array(["a", "b"])}}, "param_groups": [{"params": [0], **GROUP}]},
            ["a"],
            dict,
        )


def test_small_shift_is_no_rearrangement():
    with pytest.raises(ValueError, match=r"^f puts"):
        sources_of(
            "f",
            [Like("'a'", (64,), False)],
            lambda arrays: [("'out'", arrays[0] + np.float32(2.0**-23) * np.sign(arrays[0]))],
        )


def test_state_with_more_than_an_rmsprop():
    s = upd(optax.rmsprop(0.1))
    with pytest.raises(ValueError, match=r"^opt_state must be the state of optax.rmsprop"):
        from_optax((s[0], optax.EmaState(jnp.int32(3), PLAIN)), like=dialects.optax(0.1).init(PLAIN), step=3)
    with pytest.raises(ValueError, match=r"^opt_state must be the state of optax.rmsprop"):
        from_optax((s[0], {"nu": PLAIN}), like=dialects.optax(0.1).init(PLAIN), step=3)


def test_bare_leaf_beside_the_state():
    with pytest.raises(ValueError, match=r"^opt_state must be the state of optax.rmsprop"):
        from_optax({"0": {"nu": PLAIN}, "1": {}, "more": jnp.ones(2)}, like=dialects.optax(0.1).init(PLAIN), step=3)


def test_count_at_its_end():
    s = optax.rmsprop(falling).init(PLAIN)
    s = tuple(p._replace(count=jnp.int32(2**31 - 1)) if "count" in getattr(p, "_fields", ()) else p for p in s)
    with pytest.raises(
        ValueError, match=r"^opt_state.count must be a number of updates from 0 to 2³¹ − 2, got 2147483647"
    ):
        from_optax(s, like=dialects.optax(falling).init(PLAIN))


def test_count_that_the_counter_of_like_cannot_hold():
    like = dialects.optax(0.1).init(PLAIN)
    with pytest.raises(ValueError, match=r"^step must be a number of updates"):
        from_optax(upd(optax.rmsprop(0.1)), like=like, step=2**31 - 1)


def test_true_is_no_count():
    s = optax.rmsprop(falling).init(PLAIN)
    s = tuple(p._replace(count=True) if "count" in getattr(p, "_fields", ()) else p for p in s)
    with pytest.raises(TypeError, match=r"^opt_state.count must be an integer scalar, got bool"):
        from_optax(s, like=dialects.optax(falling).init(PLAIN))


def test_complex_slot_for_a_real_parameter():
    s = upd(optax.rmsprop(0.1, momentum=0.9))
    s = (*s[:2], s[2]._replace(trace={"w": jnp.ones(2, jnp.complex64)}))
    with pytest.raises(ValueError, match=r"both must be for the same parameters"):
        from_optax(s, like=dialects.optax(0.1, momentum=0.9).init(PLAIN), step=3)


def test_chain_of_two_rmsprops_and_one_part_too_many():
    ours = optax.chain(dialects.optax(0.1), dialects.optax(0.1))
    s = upd(optax.chain(optax.rmsprop(0.1), optax.rmsprop(0.1), optax.ema(0.5)))
    with pytest.raises(ValueError, match=r"^the state has '2' at opt_state, but like does not"):
        from_optax(s, like=ours.init(PLAIN), step=3)


def test_named_chain_is_matched_by_name():
    s = upd(optax.named_chain(("rms", optax.rmsprop(0.1)), ("ema", optax.ema(0.5))))
    with pytest.raises(ValueError, match=r"^the state has 'ema' at opt_state"):
        from_optax(s, like=optax.named_chain(("rms", dialects.optax(0.1))).init(PLAIN), step=3)


def test_part_without_arrays_may_be_absent():
    s = upd(optax.rmsprop(0.1))
    like = {"a": dialects.optax(0.1).init(PLAIN)}
    state = from_optax({"a": s, "empty": optax.EmptyState()}, like=like, step=3)
    np.testing.assert_array_equal(state["a"].square_avg["w"], s[0].nu["w"])


def test_flax_goes_back():
    nnx = pytest.importorskip("flax.nnx")
    ours = nnx.Optimizer(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), dialects.optax(falling, momentum=0.9), wrt=nnx.Param)
    theirs = nnx.Optimizer(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), optax.rmsprop(falling, momentum=0.9), wrt=nnx.Param)
    back = to_optax(ours.opt_state, like=theirs.opt_state)
    assert jax.tree.structure(back) == jax.tree.structure(theirs.opt_state)


@pytest.mark.parametrize("centered", [False, True])
def test_corrected_averages_go_back_early(centered):
    theirs, ours = (f(0.1, decay=0.9, bias_correction=True, centered=centered) for f in (optax.rmsprop, dialects.optax))
    s = upd(theirs, 3)
    back = to_optax(from_optax(s, like=ours.init(PLAIN), decay=0.9, step=3), like=theirs.init(PLAIN), decay=0.9)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(s), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: (x[0::2] + x[1::2]) / 2,
        lambda x: x[:-2] - x[1:-1] + x[2:],
        lambda x: np.sort(x)[::-1],
        lambda x: -np.abs(x),
        lambda x: x[np.argsort(x)],
        lambda x: np.repeat(x[::2], 2) + np.tile(x[1] - x[0], 64).astype("f4"),
        lambda x: (x[:-4:4] + x[4::4]) / 2,
        lambda x: np.sort(np.abs(x)) * np.sign(x[0]),
    ],
)
def test_arithmetic_of_neighbors_is_no_rearrangement(change):
    with pytest.raises(ValueError, match=r"^f puts numbers into 'out'"):
        sources_of(
            "f", [Like("'a'", (64,), False)], lambda arrays: [("'out'", change(arrays[0])), ("'all'", arrays[0])]
        )


def test_momentum_of_the_second_group_is_asked_for_too():
    groups = [{"params": [0], **GROUP}, {"params": [1], **GROUP, "momentum": 0.9, "base_momentum": 0.8}]
    with pytest.raises(ValueError, match=r"^group 1 has 'base_momentum'"):
        from_torch({"state": {}, "param_groups": groups}, ["a", "b"], dict, params={"a": (2,), "b": (2,)})


def test_momentum_given_for_the_second_group_keeps_its_buffer():
    file = {
        "state": {0: entry(), 1: entry(momentum_buffer=np.full(2, 5.0, "f4"))},
        "param_groups": [{"params": [0], **GROUP}, {"params": [1], **GROUP}],
    }
    _, state = from_torch(file, ["a", "b"], dict, momentum=[None, lambda count: 0.9])
    np.testing.assert_array_equal(state.inner_states["group1"].inner_state.momentum_buffer["b"], [5.0, 5.0])


def test_uncommitted_arrays_stay_uncommitted():
    state = from_optax(upd(optax.rmsprop(0.1)), like=dialects.optax(0.1).init(PLAIN), step=3)
    assert not state.square_avg["w"].committed


def test_group_without_a_state_is_not_suggested():
    with pytest.raises(ValueError, match=r"optimizer_state_dict") as raised:
        from_torch({"config": {"param_groups": [{"params": [0], **GROUP}]}}, ["a"], dict)
    assert "did you mean" not in str(raised.value)


def test_wrapped_state_of_another_type():
    with pytest.raises((TypeError, ValueError)):
        from_torch(
            {"state": {0: {"step": 1, "__bnb_optimizer_quant_state__": 3}}, "param_groups": [{"params": [0], **BNB}]},
            ["a"],
            dict,
        )


def test_state_without_an_end_is_refused_where_flax_is_loaded():
    pytest.importorskip("flax.nnx")  # whose variables are looked for in the whole state
    endless = []
    endless.append(endless)
    like = {"state": {}, "param_groups": [{"params": [0], **GROUP}]}
    with pytest.raises(ValueError, match=r"^state must not be nested deeper than 100"):
        to_torch((rmsprop(0.1).init({"a": jnp.ones(2)}), endless), ["a"], dict, like=like, tensor=np.asarray)


def test_slots_in_other_empty_containers_are_refused_by_name():
    state = rmsprop(0.1, momentum=0.9).init({"a": jnp.ones(2), "none": []})
    state = state._replace(momentum_buffer={"a": jnp.ones(2), "none": {}})
    like = {"state": {}, "param_groups": [{"params": [0], **GROUP, "momentum": 0.9}]}
    with pytest.raises(ValueError, match=r"^the momentum_buffer of state must be in the containers"):
        to_torch(state, ["a"], lambda p: {"a": p["a"]}, like=like, tensor=np.asarray)


def test_sequence_of_schedulers_without_its_own_epoch_is_refused():
    optimizer = torch.optim.RMSprop([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    parts = [torch.optim.lr_scheduler.LinearLR(optimizer), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]
    file = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [5]).state_dict()
    del file["last_epoch"]
    with pytest.raises(ValueError, match=r"has no 'last_epoch'"):
        schedules_of(file, optimizer.state_dict()["param_groups"], step=0)
