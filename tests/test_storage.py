"""State in 8 and 16 bits: which arrays are encoded, what an update does with them, and what goes around them."""

import functools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmsprop_jax
from compare import assert_alike, assert_close, assert_same
from rmsprop_jax import diagnostics, dialects, recorder, rmsprop, storage, summary, translation
from rmsprop_jax.checkpoints import from_optax, to_optax
from rmsprop_jax.storage import Encoded, compress

PARAMS = {"dense": {"kernel": jnp.ones((64, 96)), "bias": jnp.ones(96)}, "conv": jnp.ones((3, 3, 16, 64))}
KERNELS = ("kernel", "conv")  # what is large enough
BITS = pytest.mark.parametrize("bits", [8, 16])
UINT8, INT8, BFLOAT16 = "uint8", "int8", "bfloat16"

INNER: dict[str, tuple[Callable[[], optax.GradientTransformation], dict[str, str]]] = {
    "plain": (lambda: rmsprop(0.01), {"square_avg": UINT8}),
    "everything": (
        lambda: rmsprop(0.01, 0.9, 1e-6, 0.01, 0.9, True),
        {"square_avg": UINT8, "grad_avg": INT8, "momentum_buffer": INT8},
    ),
    "dialect": (lambda: dialects.tensorflow(0.01, momentum=0.9), {"square_avg": UINT8, "momentum_buffer": INT8}),
    "optax.rmsprop": (lambda: optax.rmsprop(0.01, momentum=0.9), {"nu": UINT8, "trace": INT8}),
    "optax.adam": (lambda: optax.adam(0.01), {"mu": INT8, "nu": UINT8}),
    "optax.adamw": (lambda: optax.adamw(0.01), {"mu": INT8, "nu": UINT8}),
    "optax.sgd": (lambda: optax.sgd(0.01, 0.9), {"trace": INT8}),
    "optax.lion": (lambda: optax.lion(0.01), {"mu": INT8}),
    "optax.amsgrad": (lambda: optax.amsgrad(0.01), {"mu": INT8, "nu": UINT8, "nu_max": UINT8}),
    "optax.adadelta": (lambda: optax.adadelta(0.01), {"e_g": UINT8, "e_x": UINT8}),
    "optax.adagrad": (lambda: optax.adagrad(0.01), {"sum_of_squares": UINT8}),
    "none": (lambda: optax.scale(0.1), {}),
}


def gradients(seed: int, params: Any = PARAMS) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)


def run(
    tx: optax.GradientTransformation, steps: int = 5, params: Any = PARAMS, state: Any = None, first: int = 0
) -> Any:
    """Updates and state after so many updates, each outside ``jit``."""
    state = tx.init(params) if state is None else state
    updates = None
    for step in range(first, first + steps):
        updates, state = tx.update(gradients(step, params), state, params)
    return updates, state


def encoded_leaves(state: Any) -> dict[str, Encoded]:
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=storage.codes.is_encoded)
    return {jax.tree_util.keystr(path): x for path, x in leaves if isinstance(x, Encoded)}


def bits_of(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


# --- What is encoded -----------------------------------------------------------------------------------------


@BITS
@pytest.mark.parametrize("name", INNER)
def test_every_large_slot_rests_in_the_codes_of_its_field(name: str, bits: int) -> None:
    make, fields = INNER[name]
    state = compress(make(), bits).init(PARAMS)
    found = {path: str(x.codes.dtype) for path, x in encoded_leaves(state).items()}
    wanted = {(field, leaf): code if bits == 8 else BFLOAT16 for field, code in fields.items() for leaf in KERNELS}
    by_field = {
        (field, leaf): code
        for path, code in found.items()
        for field in fields
        for leaf in KERNELS
        if f".{field}[" in path and path.endswith(f"['{leaf}']")
    }
    assert by_field == wanted
    assert len(found) == len(wanted)


@pytest.mark.device("storage")
@BITS
@pytest.mark.parametrize("name", INNER)
def test_bytes_of_a_value(name: str, bits: int) -> None:
    """One for each code and four for each row, or two; all else as the transformation inside keeps it."""
    make, fields = INNER[name]
    size = functools.partial(jax.tree.reduce, lambda total, x: total + x.nbytes)
    saved = sum(
        4 * p.size - (p.size + 4 * p.size // p.shape[-1] if bits == 8 else 2 * p.size)
        for p in (PARAMS["dense"]["kernel"], PARAMS["conv"])
    )
    plain, ours = make().init(PARAMS), compress(make(), bits).init(PARAMS)
    assert size(ours, 0) == size(plain, 0) - len(fields) * saved + 4


def test_small_arrays_short_rows_and_what_is_no_float_stay() -> None:
    params = {
        "small": jnp.ones((63, 65)),
        "enough": jnp.ones((64, 64)),
        "short": jnp.ones((2048, 7)),
        "row": jnp.ones((2048, 8)),
        "vector": jnp.ones(4096),
        "complex": jnp.ones((64, 64), jnp.complex64),
        "scalar": jnp.ones(()),
        "none": None,
        "bfloat16": jnp.ones((64, 64), jnp.bfloat16),
    }
    state = compress(rmsprop(0.01)).init(params)
    kept = {path.split("'")[1] for path in encoded_leaves(state)}
    assert kept == {"enough", "row", "vector", "bfloat16"}
    assert state.inner_state.square_avg["vector"].scale.shape == ()
    everything = encoded_leaves(compress(rmsprop(0.01), min_size=1).init(params))
    assert {path.split("'")[1] for path in everything} == kept | {"small"}
    _, state = run(compress(rmsprop(0.01, momentum=0.9), min_size=1), 3, params)
    assert_alike(state, compress(rmsprop(0.01, momentum=0.9), min_size=1).init(params))


def test_a_field_of_unknown_meaning_is_refused_until_slots_say_what_it_holds() -> None:
    accumulated = optax.MultiSteps(rmsprop(0.01), 2).gradient_transformation()
    with pytest.raises(
        ValueError, match=r"state\.inner_state\.acc_grads\['conv'\] is in a field of unknown meaning"
    ) as info:
        compress(accumulated).init(PARAMS)
    assert "slots={'acc_grads': 'signed'}" in str(info.value)
    for holds, dtype in (("signed", "int8"), ("square", "uint8")):
        state = compress(accumulated, slots={"acc_grads": holds}).init(PARAMS)
        assert state.inner_state.acc_grads["conv"].codes.dtype == dtype
        assert state.inner_state.inner_opt_state.square_avg["conv"].codes.dtype == "uint8"
    state = compress(accumulated, slots={"acc_grads": "full"}).init(PARAMS)
    assert state.inner_state.acc_grads["conv"].dtype == "float32"
    assert compress(accumulated, 16).init(PARAMS).inner_state.acc_grads["conv"].codes.dtype == "bfloat16"


def test_slots_override_what_is_known() -> None:
    state = compress(optax.adam(0.01), slots={"nu": "full"}).init(PARAMS)
    assert state.inner_state[0].nu["conv"].dtype == "float32"
    assert state.inner_state[0].mu["conv"].codes.dtype == "int8"
    assert not encoded_leaves(compress(optax.adam(0.01), 16, slots={"nu": "full", "mu": "full"}).init(PARAMS))


@pytest.mark.usefixtures("x64")
def test_a_slot_in_float64_is_refused_with_the_way_out() -> None:
    params = jnp.ones((64, 64))
    assert params.dtype == jnp.float64
    with pytest.raises(
        ValueError, match=r"state\.inner_state\.square_avg must be float32 or narrower, got float64.*full"
    ):
        compress(rmsprop(0.01)).init(params)
    tx = compress(rmsprop(0.01, accumulator_dtype="float32"))
    updates, state = tx.update(params, tx.init(params), params)
    assert updates.dtype == jnp.float64
    assert state.inner_state.square_avg.codes.dtype == "uint8"


def test_slots_that_optax_keeps_in_half_precision_are_in_float32_or_codes() -> None:
    """A small bfloat16 average would stop moving, and large and small parameters would get updates of two dtypes."""
    params = {"w": jnp.ones((64, 64), jnp.bfloat16), "b": jnp.ones(64, jnp.bfloat16)}
    tx = compress(optax.rmsprop(0.01, momentum=0.9))
    updates, state = run(tx, 3, params)
    assert_alike(state, tx.init(params))
    assert {str(x.dtype) for x in jax.tree.leaves(storage.decode(state))} == {"int32", "float32"}
    assert {str(u.dtype) for u in jax.tree.leaves(updates)} == {"float32"}
    full = compress(optax.rmsprop(0.01, momentum=0.9), slots={"trace": "full"}).init(params)
    assert optax.tree.get(full, "trace")["w"].dtype == jnp.bfloat16


def test_a_field_is_known_by_the_state_that_it_is_in() -> None:
    """``nu`` is an average of squares, but the momentum of SM3."""
    state = compress(optax.sm3(0.1)).init(PARAMS)
    found = encoded_leaves(state)
    assert found
    assert {str(x.codes.dtype) for path, x in found.items() if ".nu" in path} == {"int8"}


def test_a_state_that_is_itself_like_the_parameters_needs_a_word() -> None:
    inner = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda u, s, p=None: (u, jax.tree.map(jnp.add, s, u))
    )
    with pytest.raises(
        ValueError, match=r"state\.inner_state\['conv'\] is in a field of unknown meaning, without a name"
    ):
        compress(inner).init(PARAMS)
    assert compress(inner, slots={"": "signed"}).init(PARAMS).inner_state["conv"].codes.dtype == "int8"
    assert compress(inner, 16).init(PARAMS).inner_state["conv"].codes.dtype == "bfloat16"


# --- What an update does -------------------------------------------------------------------------------------


@pytest.mark.device("storage")
@BITS
@pytest.mark.parametrize("name", [name for name in INNER if INNER[name][1]])
def test_an_update_is_that_of_the_transformation_inside_from_the_decoded_state(name: str, bits: int) -> None:
    inner, tx = INNER[name][0](), compress(INNER[name][0](), bits)
    _, state = run(tx, 3)
    plain = storage.decode(state).inner_state
    grads = gradients(9)
    wanted, wanted_state = inner.update(grads, plain, PARAMS)
    updates, after = tx.update(grads, state, PARAMS)
    assert_same(updates, wanted)
    assert int(after.step) == 4
    relative = {8: 0.13, 16: 2**-7}[bits]  # the distance of two codes
    by_path = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(wanted_state)}
    for path, x in encoded_leaves(after.inner_state).items():
        exact, got = np.asarray(by_path[path]), np.asarray(storage.codes.decode(x))
        floor = 0 if x.codes.dtype == "uint8" else np.abs(exact).max(-1, keepdims=True) * 2**-11
        assert (np.abs(got - exact) <= relative * np.abs(exact) + floor).all(), path
        assert (got != exact).any()
    rest = lambda tree: jax.tree.map(  # noqa: E731
        lambda x, old: None if isinstance(old, Encoded) else x,
        tree,
        after.inner_state,
        is_leaf=storage.codes.is_encoded,
    )
    assert_same(rest(wanted_state), rest(after.inner_state))


@pytest.mark.device("storage")
@pytest.mark.parametrize(("bits", "mean", "rms"), [(8, 0.02, 0.10), (16, 0.005, 0.01)])
def test_an_average_stays_near_that_in_float32(bits: int, mean: float, rms: float) -> None:
    """Nearest rounding fails this: in bfloat16 at 0.99, an average is 6 % too large after gradients fell to a tenth."""
    shape = (32, 256)
    sizes = 10 ** jax.random.uniform(jax.random.key(0), shape, minval=-3.0, maxval=0.0)
    plain, tx = rmsprop(0.01), compress(rmsprop(0.01), bits)

    def step(carry: Any, i: jax.Array) -> Any:
        g = jax.random.normal(jax.random.key(i), shape) * sizes * jnp.where(i < 400, 1.0, 0.1)
        (a, b) = carry
        return (plain.update(g, a)[1], tx.update(g, b)[1]), None

    (a, b), _ = jax.lax.scan(step, (plain.init(sizes), tx.init(sizes)), jnp.arange(1000))
    error = np.asarray(jnp.sqrt(storage.decode(b).inner_state.square_avg / a.square_avg) - 1)
    assert abs(error.mean()) < mean
    assert np.sqrt((error**2).mean()) < rms


def test_another_seed_and_another_step_round_differently() -> None:
    states = [run(compress(rmsprop(0.01), seed=seed), 1)[1] for seed in (0, 1)]
    one, other = (np.asarray(state.inner_state.square_avg["conv"].codes) for state in states)
    assert 0.2 < (one != other).mean() < 0.8
    _, later = compress(rmsprop(0.01)).update(
        gradients(0), compress(rmsprop(0.01)).init(PARAMS)._replace(step=jnp.int32(1)), PARAMS
    )
    assert 0.2 < (np.asarray(later.inner_state.square_avg["conv"].codes) != one).mean() < 0.8


def test_slots_of_different_fields_round_differently() -> None:
    """Two slots of equal numbers, in 16 bits."""

    def keep(params: Any) -> Any:
        return {name: optax.TraceState(jax.tree.map(jnp.zeros_like, params)) for name in "ab"} | {
            "rss": optax.ScaleByRssState(jax.tree.map(jnp.zeros_like, params))
        }

    x = {"w": jnp.asarray(np.random.default_rng(0).uniform(1, 2, (64, 64)), jnp.float32)}
    inner = optax.GradientTransformation(keep, lambda u, state, params=None: (u, jax.tree.map(lambda _: u["w"], state)))
    _, state = compress(inner, 16).update(x, compress(inner, 16).init(x), x)
    trace, same, squares = (np.asarray(y.codes) for y in encoded_leaves(state).values())
    assert (trace == same).all()  # the same field
    assert 0.2 < (trace != squares).mean() < 0.8


@pytest.mark.device("storage")
@BITS
def test_no_gradient_not_finite_poisons_a_row(bits: int) -> None:
    tx = compress(rmsprop(0.01, momentum=0.9, centered=True), bits)
    _, state = run(tx, 3)
    grads = gradients(3)
    bad = jax.tree.map(jnp.copy, grads)
    bad["conv"] = bad["conv"].at[1, 1, 3, 5].set(jnp.nan).at[0, 0, 0, 0].set(jnp.inf)
    _, after = tx.update(bad, state, PARAMS)
    for x in jax.tree.leaves(storage.decode(after)):
        assert jnp.isfinite(x).all()
    _, whole = tx.update(grads, state, PARAMS)
    for path, x in encoded_leaves(after).items():
        if "conv" in path:
            before, now = (np.asarray(storage.codes.decode(y)) for y in (encoded_leaves(state)[path], x))
            for place in ((1, 1, 3, 5), (0, 0, 0, 0)):
                floor = np.abs(now[place[:-1]]).max() * 2**-11
                assert abs(now[place] - before[place]) <= 0.13 * abs(before[place]) + floor
            assert_same(x.codes[2], encoded_leaves(whole)[path].codes[2])
    updates, _ = tx.update(grads, after, PARAMS)
    assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))


# --- A citizen of JAX ----------------------------------------------------------------------------------------


@pytest.mark.device("storage")
@BITS
def test_jit_scan_donation_and_eager_calls_give_the_same_codes(bits: int) -> None:
    tx = compress(rmsprop(0.01, momentum=0.9), bits)
    steps = [gradients(step) for step in range(4)]
    _, wanted = run(tx, 4)
    jitted = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(PARAMS)
    for grads in steps:
        before = state
        _, state = jitted(grads, state, PARAMS)
    assert all(x.is_deleted() for x in jax.tree.leaves(before))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *steps)
    scanned, _ = jax.jit(lambda s, g: jax.lax.scan(lambda s, g: (tx.update(g, s, PARAMS)[1], None), s, g))(
        tx.init(PARAMS), stacked
    )
    for got in (state, scanned):
        # XLA contracts a · b + c as it sees fit, so that one code in a thousand may be the next one.
        for path, x in encoded_leaves(got).items():
            assert (x.codes == encoded_leaves(wanted)[path].codes).mean() > 0.998, path
        assert int(got.step) == 4


@BITS
def test_vmap_over_learning_rates_gives_every_member_its_own_run(bits: int) -> None:
    params = {"w": jnp.ones((64, 64))}
    grads = gradients(0, params)

    def step(lr: jax.Array) -> Any:
        tx = compress(rmsprop(lr, momentum=0.9), bits)
        return tx.update(grads, tx.init(params), params)

    rates = jnp.array([0.1, 0.2])
    updates, state = jax.vmap(step)(rates)
    for i, lr in enumerate(rates):
        alone, alone_state = step(lr)
        assert_close(jax.tree.map(lambda x, i=i: x[i], updates), alone, ulps=4)
        same = state.inner_state.momentum_buffer["w"].codes[i] == alone_state.inner_state.momentum_buffer["w"].codes
        assert same.mean() > 0.998


def test_tools_of_jax_and_optax_take_the_state() -> None:
    tx = compress(rmsprop(0.01, momentum=0.9))
    _, state = run(tx, 2)
    assert_alike(jax.eval_shape(tx.init, PARAMS), jax.eval_shape(lambda: tx.init(PARAMS)))
    marked = optax.tree.map_params(tx, lambda x: x, state, transform_non_params=lambda _: None)
    assert marked.step is None
    assert marked.inner_state.square_avg["conv"].codes is state.inner_state.square_avg["conv"].codes
    names = jax.tree.map(lambda _: "spec", PARAMS)
    specs = optax.tree.map_params(tx, lambda _, spec: spec, state, names, is_leaf=storage.codes.is_encoded)
    assert specs.inner_state.momentum_buffer == names
    leaf_for_leaf = jax.tree.map(lambda x: x, state)
    assert_same(leaf_for_leaf, state)
    loaded = pickle.loads(pickle.dumps(bits_of(state)))
    assert_same(run(tx, 2, state=loaded, first=2), run(tx, 2, state=state, first=2))


def test_an_update_is_exported() -> None:
    pytest.importorskip("flatbuffers")
    tx = compress(rmsprop(0.01, momentum=0.9))
    _, state = run(tx, 2)
    exported = jax.export.export(jax.jit(tx.update))(gradients(0), state, PARAMS)
    again = jax.export.deserialize(bytearray(exported.serialize()))
    assert_alike(again.call(gradients(2), state, PARAMS)[1], state)


def test_jitted_init_is_that_outside_and_compiles_at_once() -> None:
    """Of 16M zeros, whose row maxima XLA would compute while it compiles: it took minutes."""
    tx = compress(rmsprop(0.01, momentum=0.9))
    assert_same(jax.jit(tx.init)(PARAMS), tx.init(PARAMS))
    started = dialects.tensorflow(0.01)  # from 1
    assert_same(storage.decode(compress(started).init(PARAMS)).inner_state.square_avg["conv"], PARAMS["conv"])
    text = jax.jit(tx.init).lower(PARAMS).as_text()
    assert "optimization_barrier" in text


@pytest.mark.parametrize("bits", [8, 16])
def test_arrays_of_one_shape_share_their_kernels(bits: int) -> None:
    """The program of 40 arrays has as many hashes and as many decoders as that of 2. Each is called for every array."""

    def shifts(count: int) -> tuple[int, int]:
        params = {f"w{i}": jnp.ones((16, 16)) for i in range(count)}
        tx = compress(rmsprop(0.01, momentum=0.9), bits, min_size=1)
        text = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
        return text.count("shift_right_logical"), text.count("shift_left")

    assert shifts(40) == shifts(2)
    assert shifts(2)[0] > 0


WRAPPERS: dict[str, Callable[[optax.GradientTransformation], Any]] = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {"dense": True, "conv": False}),
    "partition": lambda tx: optax.partition({"a": tx, "b": rmsprop(0.1)}, {"dense": "a", "conv": "b"}),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "record_statistics": lambda tx: recorder.record_statistics(tx, every=2),
    "flatten": optax.flatten,
}


@BITS
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_of_optax_go_around_it(name: str, bits: int) -> None:
    tx = WRAPPERS[name](compress(rmsprop(0.01, momentum=0.9), bits))
    update = jax.jit(tx.update)
    state = start = tx.init(PARAMS)
    assert encoded_leaves(state)
    params = PARAMS
    for step in range(4):
        updates, state = update(params if step else gradients(0), state, params)
        params = optax.apply_updates(params, updates)
    assert_alike(state, start)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(storage.decode(state)))
    largest = max(float(jnp.abs(jnp.asarray(x.codes, jnp.float32)).max()) for x in encoded_leaves(state).values())
    assert largest > 0
    assert float(jnp.abs(params["dense"]["kernel"] - 1).max()) > 0.01


@BITS
def test_hyperparameters_are_injected_from_outside(bits: int) -> None:
    make = optax.inject_hyperparams(lambda lr, alpha: compress(rmsprop(lr, alpha), bits))
    tx = make(lr=lambda step: 0.1 / (1 + step), alpha=0.9)
    updates, state = run(tx, 2)
    plain, _ = run(compress(rmsprop(lambda step: 0.1 / (1 + step), 0.9), bits), 2)
    assert_close(updates, plain, ulps=8)
    assert encoded_leaves(state)


def test_apply_if_finite_leaves_the_state_alone() -> None:
    tx = optax.apply_if_finite(compress(rmsprop(0.01)), 3)
    _, state = run(tx, 2)
    bad = jax.tree.map(lambda g: g.at[..., 0].set(jnp.nan), gradients(2))
    updates, after = tx.update(bad, state, PARAMS)
    assert_same(after.inner_state, state.inner_state)
    assert all((u == 0).all() for u in jax.tree.leaves(updates))


# --- In float32, and back ------------------------------------------------------------------------------------


@BITS
def test_decode_gives_the_state_of_the_transformation_inside(bits: int) -> None:
    tx = compress(rmsprop(0.01, momentum=0.9, centered=True), bits)
    _, state = run(tx, 3)
    plain = storage.decode(state)
    assert_alike(plain.inner_state, rmsprop(0.01, momentum=0.9, centered=True).init(PARAMS))
    assert not encoded_leaves(plain)
    assert storage.decode(plain) is plain
    again = storage.encode(plain, tx.init(PARAMS))
    assert_close(again._replace(step=state.step), state, ulps=2)  # of scales
    for path, x in encoded_leaves(again).items():
        assert (x.codes == encoded_leaves(state)[path].codes).all()
    abstract = storage.encode(plain, jax.eval_shape(tx.init, PARAMS))
    assert_same(abstract, again)
    jitted = jax.jit(storage.encode)(plain, tx.init(PARAMS))
    assert_alike(jitted, again)


ENCODED = compress(rmsprop(0.01)).init(PARAMS)
PLAIN = storage.decode(ENCODED)
BAD_CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "bits": (lambda: compress(rmsprop(0.1), 4), ValueError, "bits must be 8 or 16, got 4"),
    "bits True": (lambda: compress(rmsprop(0.1), True), ValueError, "bits must be 8 or 16, got True"),
    "inner": (lambda: compress(0.01), TypeError, "inner must be an Optax gradient transformation.*got 0.01"),
    "inner a function": (lambda: compress(rmsprop), TypeError, "inner must be an Optax gradient transformation"),
    "min_size": (
        lambda: compress(rmsprop(0.1), min_size=0),
        ValueError,
        "min_size must be a whole number from 1.*got 0",
    ),
    "seed": (lambda: compress(rmsprop(0.1), seed=-1), ValueError, "seed must be a whole number from 0.*got -1"),
    "seed a key": (lambda: compress(rmsprop(0.1), seed=1.5), TypeError, "seed must be a whole number"),
    "slots": (lambda: compress(rmsprop(0.1), slots=["nu"]), TypeError, "slots must be a dict.*got \\['nu'\\]"),
    "slots name": (lambda: compress(rmsprop(0.1), slots={1: "square"}), ValueError, "slots must say.*for 1"),
    "codes of nothing": (
        lambda: storage.decode({"w": Encoded(None, None)}),
        ValueError,
        r"opt_state\['w'\] must have codes",
    ),
    "slots value": (
        lambda: compress(rmsprop(0.1), slots={"nu": "squares"}),
        ValueError,
        "slots must say 'square'.*'squares'",
    ),
    "a state of something else": (
        lambda: compress(rmsprop(0.1)).update(PARAMS, rmsprop(0.1).init(PARAMS), PARAMS),
        ValueError,
        "state must be the CompressState that init returned, got RMSPropState",
    ),
    "a decoded state": (
        lambda: compress(rmsprop(0.1)).update(PARAMS, PLAIN, PARAMS),
        ValueError,
        r"state\.inner_state\.square_avg\['conv'\] is in float32, but init encodes it in uint8; call storage\.encode",
    ),
    "other slots": (
        lambda: compress(rmsprop(0.1), slots={"square_avg": "full"}).update(PARAMS, ENCODED, PARAMS),
        ValueError,
        r"state\.inner_state\.square_avg\['conv'\] is in uint8, but init does not encode it; call storage\.encode",
    ),
    "another min_size": (
        lambda: compress(rmsprop(0.1), min_size=10**9).update(PARAMS, ENCODED, PARAMS),
        ValueError,
        r"state\.inner_state\.square_avg\['conv'\] is in uint8, but init does not encode it",
    ),
    "compress twice": (
        lambda: compress(compress(rmsprop(0.1)), 16).init(PARAMS),
        ValueError,
        r"inner must not encode its state, but state\.inner_state\.inner_state\.square_avg\['conv'\] is encoded",
    ),
    "a field that no slot has": (
        lambda: compress(rmsprop(0.1), slots={"square_vg": "full"}).init(PARAMS),
        ValueError,
        "slots names 'square_vg', but the fields of the state that are like parameters are 'square_avg'",
    ),
    "a slot that is rounded inside": (
        lambda: run(compress(optax.adam(0.1, mu_dtype="bfloat16")), 1),
        TypeError,
        r"inner rounds state\.inner_state\[0\]\.mu\['conv'\] to bfloat16.*without mu_dtype",
    ),
    "encode what is below zero": (
        lambda: storage.encode(jax.tree.map(lambda x: -x - 1, PLAIN), ENCODED),
        ValueError,
        r"opt_state\.inner_state\.square_avg\['conv'\] must not be negative.*got -1",
    ),
    "encode what is too large": (
        lambda: storage.encode(jax.tree.map(lambda x: x + jnp.asarray(2e37, x.dtype) if x.ndim else x, PLAIN), ENCODED),
        ValueError,
        r"opt_state\.inner_state\.square_avg\['conv'\] must be finite and at most 1e\+37",
    ),
    "apply another shape": (
        lambda: storage.apply_updates({"w": jnp.ones(3)}, {"w": jnp.ones((2, 3))}, 0),
        ValueError,
        r"params\['w'\] has shape \(3,\) and its update \(2, 3\)",
    ),
    "apply no step": (
        lambda: storage.apply_updates(PARAMS, PARAMS, None),
        TypeError,
        "step must be a whole number.*None",
    ),
    "apply a step too far": (
        lambda: storage.apply_updates(PARAMS, PARAMS, 2**31),
        ValueError,
        "step must be a whole number",
    ),
    "an encoded state without compress": (
        lambda: rmsprop(0.1).update(PARAMS, ENCODED.inner_state, PARAMS),
        ValueError,
        r"state\.square_avg\['conv'\] is in uint8; update it with storage\.compress, or give storage\.decode",
    ),
    "a derivative of apply_updates": (
        lambda: jax.grad(lambda u: storage.apply_updates(jnp.ones(8, "bfloat16"), u, 0).astype(float).sum())(
            jnp.ones(8)
        ),
        TypeError,
        "no derivative.*storage.apply_updates",
    ),
    "other bits": (
        lambda: compress(rmsprop(0.1), 16).update(PARAMS, ENCODED, PARAMS),
        ValueError,
        r"state\.inner_state\.square_avg\['conv'\] is in uint8, but init encodes it in bfloat16; call storage\.encode",
    ),
    "codes without scale": (
        lambda: storage.decode({"w": Encoded(jnp.zeros((2, 8), jnp.uint8), None)}),
        ValueError,
        r"opt_state\['w'\] must have codes in.*got uint8\[2, 8\] and None",
    ),
    "encode twice": (lambda: storage.encode(ENCODED, ENCODED), ValueError, r"opt_state.*\['conv'\] is encoded already"),
    "encode infinity": (
        lambda: storage.encode(jax.tree.map(lambda x: x + jnp.inf if x.ndim > 1 else x, PLAIN), ENCODED),
        ValueError,
        r"opt_state\.inner_state\.square_avg\['conv'\] must be finite",
    ),
    "encode NaN": (
        lambda: storage.encode(jax.tree.map(lambda x: x * jnp.nan if x.ndim else x, PLAIN), ENCODED),
        ValueError,
        r"opt_state\.inner_state\.square_avg\['conv'\] must be finite",
    ),
    "encode another shape": (
        lambda: storage.encode(jax.tree.map(lambda x: x[:1] if x.ndim else x, PLAIN), ENCODED),
        ValueError,
        r"opt_state\.inner_state\.square_avg\['conv'\] must have the shape \(3, 3, 16, 64\) of like",
    ),
    "encode another structure": (
        lambda: storage.encode(PLAIN.inner_state, ENCODED),
        ValueError,
        r"opt_state must have the structure of like, but \.square_avg.* is \.inner_state",
    ),
    "apply step": (lambda: storage.apply_updates(PARAMS, PARAMS, 0.5), TypeError, "step must be a whole number.*0.5"),
    "apply steps": (
        lambda: storage.apply_updates(PARAMS, PARAMS, jnp.arange(3)),
        TypeError,
        "step must be a whole number",
    ),
    "apply seed": (
        lambda: storage.apply_updates(PARAMS, PARAMS, 0, seed=-2),
        ValueError,
        "seed must be a whole number",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_refused_by_name(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message) as info:
        call()
    assert "\n" not in str(info.value)


# --- Parameters in half precision ----------------------------------------------------------------------------


def test_apply_updates_is_that_of_optax_but_for_half_precision() -> None:
    params = {"w": jnp.ones((4, 8)), "i": jnp.arange(3), "n": None, "z": jnp.ones(3, jnp.complex64), "f": 1.5}
    updates = {"w": jnp.full((4, 8), 0.1), "i": jnp.ones(3, int), "n": None, "z": jnp.ones(3) * 1j, "f": 0.25}
    assert_same(storage.apply_updates(params, updates, 0), optax.apply_updates(params, updates))
    masked = storage.apply_updates(params, dict.fromkeys(params, optax.MaskedNode()), 0)
    assert all(masked[name] is params[name] for name in params)
    kept = storage.apply_updates(params, dict.fromkeys(params), 0)
    assert all(kept[name] is params[name] for name in params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_small_updates_add_up_in_half_precision(dtype: jnp.dtype) -> None:
    params = {"w": jnp.ones((8, 256), dtype), "b": jnp.ones(256, dtype)}
    updates = jax.tree.map(lambda p: jnp.full(p.shape, 1e-4), params)

    def step(carry: Any, i: jax.Array) -> Any:
        ours, nearest = carry
        return (storage.apply_updates(ours, updates, i), optax.apply_updates(nearest, updates)), None

    (ours, nearest), _ = jax.lax.scan(step, (params, params), jnp.arange(500))
    assert_alike(ours, params)
    for name in params:
        assert (nearest[name] == 1).all()
        np.testing.assert_allclose(ours[name].astype(jnp.float32).mean(), 1.05, atol=2e-3)


def test_apply_updates_propagates_what_is_not_finite_and_keeps_exact_sums() -> None:
    params = jnp.array([1.0, 2.0, 3.0, jnp.inf, -0.0], jnp.bfloat16)
    updates = jnp.array([jnp.nan, -jnp.inf, 0.0, 1.0, 0.0])
    top = jnp.full(999, jnp.finfo(jnp.float16).max, jnp.float16)
    assert (storage.apply_updates(top, jnp.ones(999), 3) == top).all()  # rounding alone makes nothing infinite
    got = np.asarray(storage.apply_updates(params, updates, 7), np.float32)
    np.testing.assert_array_equal(got, [np.nan, -np.inf, 3.0, np.inf, 0.0])
    for step in range(10):
        assert (storage.apply_updates(params[2:3], jnp.ones(1), step) == 4).all()


def test_seeds_and_steps_of_apply_updates_round_differently() -> None:
    params, updates = jnp.ones(4096, jnp.bfloat16), jnp.full(4096, 0.004)
    results = [storage.apply_updates(params, updates, step, seed=seed) for step, seed in ((0, 0), (1, 0), (0, 1))]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert 0.2 < float((one != other).mean()) < 0.8


# --- Rooms that see through it -------------------------------------------------------------------------------


def statistics_of(tx: Any, state: Any, grads: Any, updates: Any) -> Any:
    return jax.device_get(diagnostics.statistics(tx, grads, updates, state, PARAMS))


@BITS
def test_diagnostics_are_those_of_the_decoded_state(bits: int) -> None:
    inner = rmsprop(0.01, momentum=0.9, centered=True)
    tx = compress(inner, bits)
    updates, state = run(tx, 3)
    found = statistics_of(tx, state, gradients(2), updates)
    plain = statistics_of(inner, storage.decode(state).inner_state, gradients(2), updates)
    assert_close({name: found[name] for name in plain}, plain, ulps=4)
    bottom = {name for name in found if name.endswith("_at_bottom")} if bits == 8 else set()
    assert set(found) == set(plain) | bottom
    assert len(bottom) == (6 if bits == 8 else 0)  # two leaves and the total
    for function in (diagnostics.denominator, diagnostics.effective_learning_rate):
        assert_close(function(tx, state, PARAMS), function(inner, storage.decode(state).inner_state, PARAMS), ulps=2)
    settings = diagnostics.settings(tx, state, PARAMS)
    assert settings.keys() == {"dense/kernel", "dense/bias", "conv"}


def test_codes_at_the_bottom_go_into_statistics_and_words() -> None:
    tx = compress(rmsprop(0.01, momentum=0.9))
    params = {"w": jnp.ones((64, 64)), "b": jnp.ones(8)}
    sizes = jnp.where(jnp.arange(64) < 8, 1e-7, 1.0)  # an eighth is 1e7 times smaller
    grads = {"w": jnp.broadcast_to(sizes, (64, 64)), "b": jnp.ones(8)}
    updates, state = tx.update(grads, tx.init(params), params)
    found = diagnostics.statistics(tx, grads, updates, state, params)
    squares = np.asarray(state.inner_state.square_avg["w"].codes)
    assert float(found["w/squares_at_bottom"]) == float((squares == 1).mean()) == 1 / 8
    assert float(found["total/squares_at_bottom"]) == 1 / 8
    assert "b/squares_at_bottom" not in found
    signed = np.abs(np.asarray(state.inner_state.momentum_buffer["w"].codes, int))
    assert float(found["w/signed_at_bottom"]) == ((signed > 0) & (signed < 16)).sum() / (signed > 0).sum()
    said = summary.summarize(tx, grads, updates, state, params)
    assert [x for x in said.remarks if x.startswith("8 bits too few: in w over 2% of the squares have the smallest")]
    row = next(row for row in said.rows if row[0] == "w")
    assert "int8, uint8" in row
    assert f"{2 * (64 * 64 + 4 * 64) / 1024:.3g} KiB" in row
    even = {"w": jnp.ones((64, 64)), "b": jnp.ones(8)}
    updates, state = tx.update(even, tx.init(params), params)
    assert not [x for x in summary.summarize(tx, even, updates, state, params).remarks if "8 bits" in x]


def test_a_recorder_outside_records_the_bottom() -> None:
    tx = recorder.record_statistics(compress(rmsprop(0.01, momentum=0.9)), every=1)
    grads = gradients(0)
    updates, state = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
    recorded = state.statistics
    inner = compress(rmsprop(0.01, momentum=0.9))
    assert_close(dict(recorded), statistics_of(inner, state.inner_state, grads, updates), ulps=32)
    assert "total/squares_at_bottom" in recorded


def test_a_translation_converts_the_decoded_state() -> None:
    tx = compress(rmsprop(0.1, momentum=0.9))
    _, state = run(tx, 3)
    moved = translation.translate("torch", "keras", lr=0.1, momentum=0.9)
    assert_same(moved.convert_state(state), moved.convert_state(storage.decode(state)))
    assert moved.convert_state(state).inner_state.momentum_buffer["conv"].dtype == jnp.float32


@BITS
def test_a_run_moves_from_optax_into_8_bits_and_back(bits: int) -> None:
    before = optax.rmsprop(0.1, momentum=0.9)
    _, opt_state = run(before, 3)
    plain = dialects.optax(0.1, momentum=0.9)
    tx = compress(plain, bits)
    for like in (tx.init(PARAMS), jax.eval_shape(tx.init, PARAMS)):
        state = from_optax(opt_state, like=like, step=3)
        assert_alike(state, tx.init(PARAMS))
        wanted = from_optax(opt_state, like=plain.init(PARAMS), step=3)
        assert_close(state.inner_state, storage.encode(wanted, tx.init(PARAMS).inner_state), ulps=1)  # of a scale
    back = to_optax(state, like=before.init(PARAMS))
    assert_same(back, to_optax(storage.decode(state).inner_state, like=before.init(PARAMS)))
    around = compress(before, bits)
    encoded = to_optax(state, like=around.init(PARAMS))
    assert_alike(encoded, around.init(PARAMS))
    again = from_optax(encoded, like=plain.init(PARAMS), step=3)
    assert_close(again, storage.decode(state).inner_state, ulps=4)  # a scale may be rounded once more


def test_state_inside_flax_variables_is_found_by_its_path() -> None:
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.dense = nnx.Linear(64, 96, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dense(x)

    model = Model()
    optimizer = nnx.Optimizer(model, compress(rmsprop(0.01, momentum=0.9)), wrt=nnx.Param)
    before = model.dense.kernel[...]
    grads = nnx.grad(lambda model: (model(jnp.ones((2, 64))) ** 2).mean())(model)
    optimizer.update(model, grads)
    optimizer.update(model, grads)
    assert jnp.abs(model.dense.kernel[...] - before).max() > 0
    dtypes = {str(x.dtype) for x in jax.tree.leaves(nnx.state(optimizer))}
    assert {"uint8", "int8"} <= dtypes
    params, updates = nnx.state(model, nnx.Param), nnx.state(model, nnx.Param)
    found = diagnostics.statistics(optimizer.tx, nnx.state(grads), updates, optimizer.opt_state, params)
    assert "dense/kernel/squares_at_bottom" in found
    pure = optimizer.opt_state
    again = storage.encode(storage.decode(pure), pure)
    assert_close(jax.tree.leaves(again), jax.tree.leaves(pure), ulps=2)  # of scales
    assert jax.tree.structure(again) == jax.tree.structure(pure)
    decoded = storage.decode(optimizer.opt_state)
    assert {str(x.dtype) for x in jax.tree.leaves(decoded)} == {"int32", "float32"}


def test_a_bad_leaf_is_named_by_the_summary_whatever_the_total_is() -> None:
    """The limits are those of a leaf: a small one that is coded badly hardly moves the total."""

    def said(squares: float, signed: float) -> list[str]:
        figures = {"a/squares_at_bottom": squares, "a/signed_at_bottom": signed, "b/squares_at_bottom": 0.0}
        figures |= {"total/squares_at_bottom": 0.0, "total/signed_at_bottom": 0.0}
        return list(summary._too_few_bits(dict.fromkeys(("a", "b")), figures))

    assert said(0.019, 0.29) == []
    (squares,) = said(0.021, 0.29)
    assert squares.startswith("8 bits too few: in a over 2% of the squares")
    (signed,) = said(0.019, 0.31)
    assert signed.startswith("8 bits too few: in a over 30% of the codes with a sign")


def test_all_slots_of_a_leaf_are_counted_at_the_bottom() -> None:
    tx = compress(rmsprop(0.01, momentum=0.9, centered=True))
    grads = gradients(0)
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    found = statistics_of(tx, state, grads, updates)
    sizes = [
        np.abs(np.asarray(getattr(state.inner_state, slot)["conv"].codes, int))
        for slot in ("grad_avg", "momentum_buffer")
    ]
    bottom, nonzero = (
        sum(int(f(x)) for x in sizes) for f in (lambda x: ((x > 0) & (x < 16)).sum(), lambda x: (x > 0).sum())
    )
    np.testing.assert_allclose(found["conv/signed_at_bottom"], bottom / nonzero, rtol=1e-6)
    assert summary.summarize(tx, grads, updates, state, PARAMS).rows
    empty = statistics_of(tx, tx.init(PARAMS), grads, updates)
    assert empty["conv/squares_at_bottom"] == 0


def test_a_scalar_parameter_and_numbers_of_python_stay() -> None:
    inner = optax.GradientTransformation(
        lambda p: {"decay": 0.9, "nu": jnp.zeros(()), "count": 3}, lambda u, s, p=None: (u, s)
    )
    for params in (jnp.ones(()), 1.0, {"w": jnp.ones(())}):
        tx = compress(inner, min_size=1)
        state = tx.init(params)
        assert state.inner_state == {"decay": 0.9, "nu": jnp.zeros(()), "count": 3}
        assert tx.update(params, state, params)[1].step == 1


def test_names_of_torch_are_known() -> None:
    class Torch(NamedTuple):
        square_avg: Any
        exp_avg: Any
        exp_avg_sq: Any

    inner = optax.GradientTransformation(lambda p: Torch(p, p, p), lambda u, s, p=None: (u, s))
    found = encoded_leaves(compress(inner).init({"w": jnp.ones((64, 64))}))
    assert [str(x.codes.dtype) for x in found.values()] == ["uint8", "int8", "uint8"]


def test_what_has_the_name_but_not_the_shape_of_a_parameter_stays() -> None:
    inner = optax.GradientTransformation(
        lambda p: optax.TraceState(jax.tree.map(lambda x: jnp.zeros((64, 32)), p)), lambda u, s, p=None: (u, s)
    )
    assert not encoded_leaves(compress(inner).init({"w": jnp.ones((64, 64))}))


def test_a_decoded_state_is_refused_without_params_too_and_the_step_stops_at_the_largest() -> None:
    with pytest.raises(ValueError, match="is in float32, but init encodes it in uint8"):
        compress(rmsprop(0.1)).update(PARAMS, PLAIN)
    last = ENCODED._replace(step=jnp.int32(2**31 - 1))
    assert compress(rmsprop(0.1)).update(PARAMS, last, PARAMS)[1].step == 2**31 - 1


def test_apply_updates_adds_in_float32_and_keeps_every_nan() -> None:
    params, updates = jnp.ones(4096, jnp.bfloat16), jnp.full(4096, 1 + 2**-9)  # bfloat16 would round the update itself
    sums = jax.vmap(lambda step: storage.apply_updates(params, updates, step))(jnp.arange(64))
    np.testing.assert_allclose(np.asarray(sums, np.float64).mean(), 2 + 2**-9, atol=2e-4)
    nan = jnp.asarray(np.full(4096, 0x7FFFFFFF, np.uint32).view(np.float32))
    for dtype in (jnp.bfloat16, jnp.float16):
        for step in range(4):
            assert jnp.isnan(storage.apply_updates(params.astype(dtype), nan, step)).all()
    assert storage.apply_updates({"n": None}, {"n": jnp.ones(3)}, 0) == {"n": None}


def test_small_leaves_need_not_be_finite_to_be_encoded() -> None:
    plain = PLAIN._replace(inner_state=jax.tree.map(lambda x: x * jnp.nan if x.ndim == 1 else x, PLAIN.inner_state))
    assert jnp.isnan(storage.encode(plain, ENCODED).inner_state.square_avg["dense"]["bias"]).all()


def test_front_door_has_it() -> None:
    assert rmsprop_jax.storage is storage
