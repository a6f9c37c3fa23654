"""Tests of ``sharding``, and of statistics, on eight devices. ``test_sharding`` starts a process that has them.

They are run without fused multiply-add: with it, XLA rounds a·b + c once or twice, as the layout suits it.
"""

import contextlib
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import rmsprop_jax
import test_readme
from compare import assert_close, assert_same
from many_devices import shard_map
from rmsprop_jax import copies, rmsprop, sharding, storage
from rmsprop_jax.diagnostics import statistics
from rmsprop_jax.recorder import record_statistics
from rmsprop_jax.summary import summarize

WHOLE = {
    "w": jnp.linspace(-1, 1, 16 * 64).reshape(16, 64),
    "tall": jnp.linspace(-1, 2, 64 * 16).reshape(64, 16),
    "b": jnp.linspace(0, 1, 24),
    "s": jnp.full((), 2.0),
}
TRANSFORMATIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "rmsprop": lambda: rmsprop(0.01, weight_decay=0.1, momentum=0.9, centered=True),
    "rmsprop in 8 bits": lambda: storage.compress(rmsprop(0.01, momentum=0.9), min_size=1),
    "rmsprop in 16 bits": lambda: storage.compress(rmsprop(0.01, momentum=0.9), 16, min_size=1),
    "adamw": lambda: optax.adamw(0.01),
    "masked": lambda: optax.masked(rmsprop(0.01), {"w": True, "tall": True, "b": False, "s": True}),
    "partition": lambda: optax.partition(
        {"a": rmsprop(0.01), "b": optax.adam(0.1)}, {"w": "a", "tall": "b", "b": "b", "s": "b"}
    ),
    "MultiSteps": lambda: optax.MultiSteps(rmsprop(0.01), 2).gradient_transformation(),
    "inject_hyperparams": lambda: optax.inject_hyperparams(rmsprop)(lr=optax.linear_schedule(0.1, 0.01, 9)),
    "average of the updates": lambda: optax.chain(rmsprop(0.01), optax.ema(0.9)),
    "apply_if_finite": lambda: optax.apply_if_finite(rmsprop(0.01), 3),
    "recorded": lambda: record_statistics(rmsprop(0.01), 2),
    "clipped": lambda: optax.chain(optax.clip(0.5), rmsprop(0.01)),
}
# Of Optax, some work only on Auto axes.
ON_AUTO_AXES = TRANSFORMATIONS | {
    "lbfgs": lambda: optax.scale_by_lbfgs(3),  # its memory has an axis more than the parameters
    "flatten": lambda: optax.flatten(rmsprop(0.01)),
}
KINDS = [("Auto", "Auto"), ("Explicit", "Explicit"), ("Auto", "Explicit"), ("Explicit", "Auto")]
SPECS = {
    "replicated": {"w": P(), "tall": P(), "b": P(), "s": P()},
    "columns over model": {"w": P(None, "model"), "tall": P(None, "model"), "b": P("model"), "s": P()},
    "rows over model": {"w": P("model"), "tall": P("model"), "b": P(), "s": P()},
    "rows over data": {"w": P("data"), "tall": P("data"), "b": P("data"), "s": P()},
    "over both": {"w": P("data", "model"), "tall": P("model", "data"), "b": P(("model", "data")), "s": P()},
}
COLLECTIVE = re.compile(r"= (.*?) (?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def make_mesh(kinds: Iterable[str] = ("Auto", "Auto"), shape: tuple[int, ...] = (4, 2)) -> Mesh:
    names = ("data", "model")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=tuple(getattr(AxisType, kind) for kind in kinds)[: len(shape)])


def put(tree: Any, mesh: Mesh, specs: Any) -> Any:
    return {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in tree.items()}


def gradients(n: int = 3) -> list[Any]:
    rng = np.random.default_rng(0)
    return [
        {name: jnp.asarray(rng.integers(-9, 9, p.shape) / 4, jnp.float32) for name, p in WHOLE.items()}
        for _ in range(n)
    ]


def train(tx: Any, params: Any, grads: Iterable[Any]) -> tuple[Any, Any, Any]:
    """All updates and the last state; and the step, which was compiled once."""
    state, step, done = tx.init(params), jax.jit(tx.update), []
    for g in grads:
        updates, state = step(g, state, params)
        done.append(updates)
    return done, state, step


def exchanged(compiled: Any) -> list[int]:
    """The number of elements of the largest array in each collective of a program."""
    found = COLLECTIVE.findall(compiled.as_text())
    return [
        max(int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[(.*?)\]", x)) for x in found
    ]


def assert_at(tree: Any, places: Any) -> None:
    for (path, x), place in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(places), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim), (jax.tree_util.keystr(path), x.sharding, place)


# --- Where state lies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("specs", SPECS)
@pytest.mark.parametrize("name", ON_AUTO_AXES)
def test_state_follows_its_parameters_and_all_else_is_replicated(name: str, specs: str) -> None:
    mesh, tx = make_mesh(), ON_AUTO_AXES[name]()
    params = put(WHOLE, mesh, SPECS[specs])
    layout = sharding.shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=layout)(params)
    assert_at(state, layout)
    for path, place in jax.tree_util.tree_leaves_with_path(layout):
        assert place.mesh == mesh, path
    followed = 0
    for path, x in jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, storage.Encoded)):
        owner = next((key.key for key in path[::-1] if getattr(key, "key", None) in WHOLE), None)
        array = x.codes if isinstance(x, storage.Encoded) else x
        if owner is not None and array.shape[-WHOLE[owner].ndim or array.ndim :] == WHOLE[owner].shape:
            more = array.ndim - WHOLE[owner].ndim
            followed += 1
            of_param = NamedSharding(mesh, P(*[None] * more, *SPECS[specs][owner]))
            assert array.sharding.is_equivalent_to(of_param, array.ndim), path
            if isinstance(x, storage.Encoded) and x.scale is not None:
                assert x.scale.sharding.is_equivalent_to(
                    NamedSharding(mesh, P(*SPECS[specs][owner][: x.scale.ndim])), x.scale.ndim
                )
        else:
            assert array.sharding.is_fully_replicated, path
    assert followed >= (0 if name == "flatten" else 2), followed


ZERO = {
    ("replicated", "w"): P(None, "data"),
    ("replicated", "b"): P("data"),
    ("columns over model", "w"): P(None, ("model", "data")),  # 32 columns are left on each device, and 16 rows
    ("columns over model", "b"): P(("model", "data")),
    ("rows over model", "w"): P("model", "data"),
    ("rows over model", "b"): P("data"),
    ("rows over data", "w"): P("data"),
    ("rows over data", "b"): P("data"),
    ("over both", "w"): P("data", "model"),
    ("over both", "b"): P(("model", "data")),
}


@pytest.mark.parametrize(("specs", "leaf"), ZERO)
def test_an_axis_is_added_where_most_rows_are_left(specs: str, leaf: str) -> None:
    mesh = make_mesh()
    layout = sharding.shardings(rmsprop(momentum=0.9), put(WHOLE, mesh, SPECS[specs]), "data")
    expected = NamedSharding(mesh, ZERO[specs, leaf])
    for slot in (layout.square_avg, layout.momentum_buffer):
        assert slot[leaf].is_equivalent_to(expected, WHOLE[leaf].ndim)
        assert slot["s"].is_fully_replicated
    assert layout.step == NamedSharding(mesh, P())


def test_an_axis_is_added_only_where_it_divides() -> None:
    mesh = make_mesh()
    shapes = {
        "odd": (15, 9),
        "rows only": (8, 63),
        "empty": (0, 3),
        "ties": (8, 8),
        "small": (2, 2),
        "three": (3, 5, 12),
    }
    params = put({name: jnp.ones(shape) for name, shape in shapes.items()}, mesh, dict.fromkeys(shapes, P()))
    layout = sharding.shardings(rmsprop(), params, "data").square_avg
    specs = {name: tuple(layout[name].spec) for name in shapes}
    assert specs == {
        "odd": (),
        "rows only": ("data",),
        "empty": (),
        "ties": ("data",),
        "small": (),
        "three": (None, None, "data"),
    }
    halved = jax.device_put(jnp.ones((24, 40)), NamedSharding(mesh, P(None, "model")))  # 20 columns are left
    assert tuple(sharding.shardings(rmsprop(), halved, "data").square_avg.spec) == ("data", "model")
    from_65 = sharding.shardings(rmsprop(), params, "data", min_size=65).square_avg
    assert [name for name in shapes if "data" in from_65[name].spec] == ["rows only", "three"]
    from_64 = sharding.shardings(rmsprop(), params, "data", min_size=64).square_avg
    assert "data" in from_64["ties"].spec


def test_rows_of_codes_stay_whole_if_anything_else_divides() -> None:
    mesh = make_mesh()
    params = put(
        {"w": jnp.ones((16, 64)), "b": jnp.ones(64), "odd": jnp.ones((3, 64))},
        mesh,
        dict.fromkeys("wb", P()) | {"odd": P()},
    )
    layout = sharding.shardings(storage.compress(rmsprop(), min_size=1), params, "data").inner_state.square_avg
    assert (tuple(layout["w"].codes.spec), tuple(layout["w"].scale.spec)) == (("data",), ("data",))
    assert (tuple(layout["odd"].codes.spec), tuple(layout["odd"].scale.spec)) == ((None, "data"), ())
    assert (tuple(layout["b"].codes.spec), tuple(layout["b"].scale.spec)) == (("data",), ())
    assert tuple(
        sharding.shardings(storage.compress(rmsprop(), 16, min_size=1), params, "data")
        .inner_state.square_avg["w"]
        .codes.spec
    ) == (None, "data")  # no scale


@pytest.mark.parametrize("name", ON_AUTO_AXES)
def test_abstract_state_is_the_state_without_numbers(name: str) -> None:
    params = put(WHOLE, make_mesh(), SPECS["columns over model"])
    for tx in (ON_AUTO_AXES[name](), sharding.zero(ON_AUTO_AXES[name](), params, "data", min_size=30)):
        state, abstract = (
            jax.jit(tx.init, out_shardings=sharding.shardings(tx, params))(params),
            sharding.abstract_state(tx, params),
        )
        assert jax.tree.structure(state) == jax.tree.structure(abstract)
        assert_at(state, jax.tree.map(lambda x: x.sharding, abstract))
        for x, shape in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
            assert (x.shape, x.dtype) == (shape.shape, shape.dtype)
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
        assert jax.tree.leaves(sharding.abstract_state(tx, shapes)) == jax.tree.leaves(abstract)


def test_a_slot_belongs_to_the_tree_that_it_is_in() -> None:
    """Paths of parameters may end alike, and a key of the state may be the name of a module."""
    mesh = make_mesh()
    params = {"ema": {"w": P(None, "model")}, "w": P("data"), "a": {"w": P("model", "data"), "value": P("model")}}
    params = jax.tree.map(lambda spec: jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, spec)), params)
    twice = optax.GradientTransformation(lambda p: {"ema": p, "fast": p}, lambda u, s, p=None: (u, s))
    of_params = jax.tree.map(lambda p: p.sharding, params)
    for tx in (twice, optax.chain(twice), optax.masked(twice, True), optax.named_chain(("w", twice), ("ema", twice))):
        state = jax.jit(tx.init, out_shardings=sharding.shardings(tx, params))(params)
        nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, dict) and "a" in x)
        assert len(nodes) >= 2
        for tree in nodes:
            assert_at(tree, of_params)


def test_an_array_that_belongs_to_no_parameter_is_replicated() -> None:
    more = optax.GradientTransformation(lambda p: {"more": jnp.zeros((3, 8)), "p": p}, lambda u, s, p=None: (u, s))
    bare = jax.device_put(jnp.ones(8), NamedSharding(make_mesh(), P("model")))
    for params in (bare, Net(bare), {"w": bare}):
        layout = sharding.shardings(more, params)
        assert layout["more"].is_fully_replicated
        assert not jax.tree.leaves(layout["p"])[0].is_fully_replicated


class Net(eqx.Module):
    value: jax.Array


# --- ZeRO --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kinds"),
    [(name, kinds) for name in TRANSFORMATIONS for kinds in (KINDS if "rmsprop" in name else KINDS[:2])],
    ids=str,
)
def test_zero_is_the_transformation_that_it_wraps_to_the_last_bit(name: str, kinds: tuple[str, str]) -> None:
    mesh, specs = make_mesh(kinds), {"w": P(None, "model"), "tall": P(None, None), "b": P(None), "s": P()}
    params, grads = put(WHOLE, mesh, specs), gradients()
    tx = sharding.zero(TRANSFORMATIONS[name](), params, "data")
    layout = sharding.shardings(tx, params)
    assert_at(tx.init(params), layout)
    updates, state, step = train(tx, params, [put(g, mesh, specs) for g in grads])
    assert_at(state, layout)
    assert_at(updates, [{k: p.sharding for k, p in params.items()}] * len(grads))
    *alone, step_alone = train(TRANSFORMATIONS[name](), WHOLE, grads)
    if (
        len(set(kinds)) == 1 and name != "recorded"
    ):  # of these, a step spells some specs in another way, and traces again
        assert step._cache_size() == step_alone._cache_size()  # twice where Optax's slots are weakly typed at first
    if name == "recorded":  # sums of parts
        assert_close([updates, state], alone, ulps=32)
    else:
        assert_same([updates, state], alone, nonfinite="equal")
    assert any("data" in str(place.spec) for place in jax.tree.leaves(layout))


def test_zero_holds_one_nth_of_the_state() -> None:
    for n in (1, 2, 4, 8):
        mesh = Mesh(np.array(jax.devices()[:n]), "data")
        params = jax.device_put({"w": jnp.ones((64, 32)), "b": jnp.ones(16)}, NamedSharding(mesh, P()))
        tx = sharding.zero(rmsprop(momentum=0.9, centered=True), params, "data")
        _, state, _ = train(tx, params, [params])
        of_device = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state[1:]))
        assert of_device == 3 * 4 * (64 * 32 + 16) // n


def test_zero_sends_updates_and_nothing_else_of_that_size() -> None:
    mesh = make_mesh(shape=(8,))
    params = put(WHOLE, mesh, SPECS["replicated"])
    tx = sharding.zero(rmsprop(momentum=0.9), params, "data")
    state = tx.init(params)
    update = jax.jit(tx.update).lower(params, state, params).compile()
    assert sorted(exchanged(update)) == [24, 16 * 64, 16 * 64]  # an all-gather for each array that is spread
    fsdp = put(WHOLE, mesh, {"w": P("data"), "tall": P("data"), "b": P("data"), "s": P()})
    tx = rmsprop(momentum=0.9, weight_decay=0.1)
    state = jax.jit(tx.init, out_shardings=sharding.shardings(tx, fsdp))(fsdp)
    assert exchanged(jax.jit(tx.update).lower(fsdp, state, fsdp).compile()) == []
    assert exchanged(jax.jit(lambda tree: tree["w"].sum()).lower(fsdp).compile()) == [1], "the counter sees nothing"


def test_a_state_that_is_made_anew_is_spread() -> None:
    params = put(WHOLE, make_mesh(), SPECS["replicated"])

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, jax.tree.map(lambda x: jnp.ones(x.shape), state)

    tx = sharding.zero(optax.GradientTransformation(lambda p: p, update), params, "data")
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert_at(state, sharding.shardings(tx, params))
    assert "data" in str(state["w"].sharding.spec)


def test_extra_arguments_reach_the_transformation_inside() -> None:
    params = put(WHOLE, make_mesh(), SPECS["replicated"])

    def update(updates: Any, state: Any, params: Any = None, *, factor: float) -> Any:
        return jax.tree.map(lambda x: factor * x, updates), state

    tx = sharding.zero(optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update), params, "data")
    assert_same(tx.update(params, tx.init(params), factor=2.0)[0]["b"], 2 * WHOLE["b"])


def test_zero_donates_and_scans_and_is_differentiated() -> None:
    mesh = make_mesh()
    params = put(WHOLE, mesh, SPECS["replicated"])
    tx = sharding.zero(rmsprop(0.1), params, "data")

    def loss(lr: Any) -> Any:
        spread = sharding.zero(rmsprop(lr), params, "data")
        updates, _ = spread.update(params, spread.init(params), params)
        return sum(jnp.sum(u) for u in jax.tree.leaves(updates))

    slope = sum(float(jnp.sum(u)) for u in jax.tree.leaves(rmsprop(1.0).update(WHOLE, rmsprop(1.0).init(WHOLE))[0]))
    assert float(jax.jit(jax.grad(loss))(0.3)) == pytest.approx(slope, rel=1e-5)
    state = tx.init(params)
    _, after = jax.jit(tx.update, donate_argnums=1)(params, state, params)
    assert state.square_avg["w"].is_deleted()
    assert not after.square_avg["w"].is_deleted()

    def body(state: Any, _: Any) -> Any:
        updates, state = tx.update(params, state, params)
        return state, updates["b"]

    scanned, _ = jax.jit(lambda state: jax.lax.scan(body, state, None, length=4))(tx.init(params))
    assert_same(jax.device_get(scanned), jax.device_get(train(tx, params, [params] * 4)[1]))


def test_zero_takes_none_masks_and_whole_models() -> None:
    mesh = make_mesh()
    params = put(WHOLE, mesh, SPECS["replicated"]) | {"nothing": None}
    tx = sharding.zero(rmsprop(0.1), params, "data")
    updates, state = jax.jit(tx.update)(params | {"b": None}, tx.init(params), params)
    assert updates["nothing"] is None
    assert state.square_avg["nothing"] is None
    assert_same(updates["b"], np.zeros(24, np.float32))

    model = eqx.nn.MLP(8, 8, 16, 2, key=jax.random.key(0))  # with functions and flags
    model = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P())) if eqx.is_array(x) else x, model)
    tx = sharding.zero(rmsprop(0.1, momentum=0.9), model, "data")
    state = tx.init(model)
    assert "data" in str(state.square_avg.layers[0].weight.sharding.spec)
    updates, state = eqx.filter_jit(tx.update)(eqx.filter(model, eqx.is_array), state, model)
    alone = rmsprop(0.1, momentum=0.9)
    expected = alone.update(eqx.filter(model, eqx.is_array), alone.init(model), model)
    assert_same(jax.tree.leaves((updates, state)), jax.tree.leaves(expected))


def test_zero_inside_nnx_optimizer() -> None:
    nnx = pytest.importorskip("flax.nnx")
    mesh = make_mesh()
    for make in (lambda: rmsprop(0.1, momentum=0.9), lambda: storage.compress(rmsprop(0.1, momentum=0.9), min_size=1)):

        def trained(place: Callable[[Any, Any], optax.GradientTransformation], make: Any = make) -> Any:
            model = nnx.Linear(16, 32, rngs=nnx.Rngs(0))
            nnx.update(model, jax.device_put(nnx.state(model), NamedSharding(mesh, P())))
            optimizer = nnx.Optimizer(model, place(make(), nnx.state(model, nnx.Param)), wrt=nnx.Param)
            first = nnx.to_pure_dict(nnx.state(optimizer))

            @nnx.jit
            def step(model: Any, optimizer: Any) -> None:
                optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((4, 16))) ** 2))(model))

            for _ in range(2):
                step(model, optimizer)
            return first, nnx.to_pure_dict(nnx.state(optimizer)), nnx.to_pure_dict(nnx.state(model))

        first, state, model = trained(lambda tx, params: sharding.zero(tx, params, "data"))
        spread = [x for x in jax.tree.leaves(first) if "data" in str(x.sharding)]
        assert len(spread) >= 4, "kernel and bias in two slots"
        assert_at(state["opt_state"], jax.tree.map(lambda x: x.sharding, first["opt_state"]))
        # XLA may compute the gradient in another order.
        assert_close((state, model), trained(lambda tx, params: tx)[1:], rtol=1e-4, scale="array")


def test_zero_outside_jit_and_without_params() -> None:
    mesh = make_mesh()
    params, g = put(WHOLE, mesh, SPECS["replicated"]), gradients(1)[0]
    tx = sharding.zero(rmsprop(0.1), params, "data")
    done = tx.update(g, tx.init(params))
    assert_at(done[1], sharding.shardings(tx, params))
    assert_same(done, rmsprop(0.1).update(g, rmsprop(0.1).init(WHOLE)))
    assert_at(jax.jit(tx.init)(params), sharding.shardings(tx, params))  # params are traced


def test_zero_is_refused_inside_shard_map() -> None:
    mesh = make_mesh()
    params = put(WHOLE, mesh, SPECS["replicated"])
    tx = sharding.zero(rmsprop(0.1), params, "data")
    state = tx.init(params)
    inside = shard_map(lambda g: tx.update(g, state)[0], mesh, P(), P())
    with pytest.raises(ValueError, match="zero must be called outside of"):
        jax.jit(inside)(WHOLE)
    with pytest.raises(ValueError, match="zero must be called outside of"):
        jax.jit(shard_map(lambda p: tx.init(p).step, mesh, P(), P()))(WHOLE)


# --- What is refused ---------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit_are_refused_by_name() -> None:
    params = put(WHOLE, make_mesh(), SPECS["replicated"])
    zero = sharding.zero(rmsprop(), params, "data")
    state = zero.init(params)
    other = jax.device_put(WHOLE["b"], NamedSharding(make_mesh(shape=(8,)), P()))
    abstract = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(make_mesh().abstract_mesh, P()))
    tx = rmsprop()
    for wrong, kind, message in (
        (lambda: sharding.shardings(tx, params, "dat"), ValueError, "axis must be one of the mesh, 'data', 'model'"),
        (lambda: sharding.shardings(tx, params, 0), ValueError, "axis must be one of the mesh"),
        (lambda: sharding.zero(tx, params, None), ValueError, "axis must be the name of a mesh axis, got None"),
        (lambda: sharding.zero(tx, WHOLE, "data"), ValueError, "a mesh that has the axis 'data', got 4 arrays"),
        (lambda: sharding.zero(tx, {}, "data"), ValueError, "a mesh that has the axis 'data', got no arrays"),
        (lambda: sharding.zero(0.1, params, "data"), TypeError, "tx must be an Optax gradient transformation"),
        (lambda: sharding.zero(tx, params, "data", min_size=-1), ValueError, "min_size must be a whole number"),
        (lambda: sharding.abstract_state(tx, params, min_size=2.0), TypeError, "min_size must be a whole number"),
        (lambda: sharding.shardings(tx, params | {"c": other}), ValueError, r"one mesh, but params\['c'\] lies on"),
        (lambda: sharding.shardings(tx, {"a": abstract}), ValueError, r"params\['a'\] lies on an abstract mesh"),
        (lambda: jax.jit(lambda p: sharding.shardings(tx, p))(params), ValueError, r"params\['b'\] is traced"),
        (
            lambda: sharding.shardings(zero, params, "model"),
            ValueError,
            "axis and min_size must be those of zero, 'dat",
        ),
        (lambda: sharding.abstract_state(zero, params, min_size=9), ValueError, "min_size must be those of zero"),
        (lambda: sharding.zero(zero, params, "data"), ValueError, "zero must be the outermost transformation"),
        (lambda: sharding.shardings(optax.chain(zero), params), ValueError, "zero must be the outermost"),
        (lambda: zero.init(params["w"]), ValueError, "params is not among the parameters that zero was built with"),
        (lambda: zero.init({"p": params}), ValueError, r"params\['p'\]\['b'\] is not among the parameters"),
        (lambda: zero.init(params | {"b": jnp.ones(9)}), ValueError, r"params\['b'\] has shape \(9,\), but zero"),
        (lambda: zero.init(params | {"b": other}), ValueError, r"params\['b'\] lies on Mesh\('data': 8.*build it anew"),
        (lambda: zero.update({"c": params["b"]}, state), ValueError, r"updates\['c'\] is not among"),
        (lambda: zero.update(params, state, {"c": other}), ValueError, r"params\['c'\] is not among"),
    ):
        with pytest.raises(kind, match=message):
            wrong()


# --- Copies ------------------------------------------------------------------------------------------------


def with_copies(x: np.ndarray, sharding: NamedSharding, changed: int, change: Callable[[Any], Any]) -> jax.Array:
    """``x`` on a mesh, where the device number ``changed`` holds something else."""
    parts = [
        jax.device_put(change(x[index]) if device.id == changed else x[index], device)
        for device, index in sharding.devices_indices_map(x.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)


def flipped(bit: int, at: int) -> Callable[[Any], Any]:
    def change(x: Any) -> Any:
        words = np.array(x).reshape(-1).view(np.uint8).copy()
        size = x.dtype.itemsize
        words[at * size + bit // 8] ^= 1 << bit % 8
        return words.view(x.dtype).reshape(x.shape)

    return change


DTYPES = ["float32", "bfloat16", "float16", "int32", "int8", "uint8", "float8_e4m3fn", "complex64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kinds", [("Auto", "Auto"), ("Explicit", "Explicit"), ("Auto", "Explicit")], ids="-".join)
def test_a_single_flipped_bit_is_found_and_named(dtype: str, kinds: tuple[str, str]) -> None:
    place = NamedSharding(make_mesh(kinds), P("data"))
    x = np.arange(32).reshape(8, 4).astype(jnp.dtype(dtype))
    equal = jax.device_put(x, place)
    assert sharding.check_replicas({"a": equal, "b": equal}) == 2
    bits = x.dtype.itemsize * 8
    for device, bit, at in ((0, 0, 0), (5, bits - 1, 7), (7, bits // 2, 3)):
        different = with_copies(x, place, device, flipped(bit, at))
        first, second = (jax.devices()[device - device % 2 + i] for i in range(2))
        where = rf"^tree\['b'\]\[0\] has different copies on {first} of process 0 and {second} of process 0"
        with pytest.raises(ValueError, match=where):
            sharding.check_replicas({"a": equal, "b": [different], "c": different})


def test_values_that_change_places_are_found() -> None:
    place = NamedSharding(make_mesh(), P())
    x = np.arange(64, dtype=np.float32)
    for change in (lambda x: x[::-1], lambda x: np.roll(x, 1), lambda x: np.where(x == 0, 1, np.where(x == 1, 0, x))):
        with pytest.raises(ValueError, match="different copies"):
            sharding.check_replicas(
                with_copies(x, place, 3, lambda x, change=change: np.ascontiguousarray(change(x), np.float32))
            )


def test_copies_that_are_equal_bit_for_bit_pass() -> None:
    mesh = make_mesh()
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(("data", "model")))
    tree = {
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "flag": jnp.array([True, False]),
        "key": jax.random.key(0),
        "step": jnp.zeros((), jnp.int32),
        "empty": jnp.zeros((0, 3)),
    }
    tree = {name: jax.device_put(x, replicated) for name, x in tree.items()}
    assert sharding.check_replicas(tree) == 4  # the empty one has nothing to compare
    others = {
        "split": jax.device_put(jnp.ones(8), split),
        "alone": jnp.ones(3),
        "numpy": np.ones(3),
        "text": "a",
        "none": None,
    }
    assert sharding.check_replicas(others) == 0
    assert sharding.check_replicas(tree | others) == 4
    on_another = jax.device_put(jnp.ones(3), NamedSharding(make_mesh(shape=(8,)), P()))
    assert sharding.check_replicas([tree, on_another]) == 5
    assert sharding.check_replicas({}) == 0
    with pytest.raises(ValueError, match="tree is traced, so it has no copies yet"):
        jax.jit(lambda x: sharding.check_replicas(x) and x)(jnp.ones(3))
    for kind in memory_kinds():
        assert sharding.check_replicas(jax.device_put(jnp.ones(3), replicated.with_memory_kind(kind))) == 1
    gone = jax.device_put(jnp.ones(3), replicated)
    gone.delete()
    with pytest.raises(ValueError, match=r"tree\['gone'\] has been deleted"):
        sharding.check_replicas({"gone": gone})
    with jax.set_mesh(make_mesh(shape=(8,))) if hasattr(jax, "set_mesh") else contextlib.nullcontext():
        assert sharding.check_replicas(tree) == 4  # on another mesh than that of the context


def memory_kinds() -> set[str]:
    return {memory.kind for memory in jax.devices()[0].addressable_memories()}


def test_a_state_is_in_the_memory_of_its_parameters() -> None:
    for kind in memory_kinds():
        place = NamedSharding(make_mesh(), P(None, "model"), memory_kind=kind)
        params = jax.device_put(WHOLE["w"], place)
        for axis in (None, "data"):
            assert sharding.shardings(rmsprop(), params, axis).square_avg.memory_kind == kind


def test_checking_copies_moves_no_array() -> None:
    mesh = make_mesh()
    x = jax.device_put(jnp.ones((64, 32)), NamedSharding(mesh, P("model")))
    assert exchanged(copies._program(mesh, P("model")).lower(x).compile()) == []
    before = copies._program.cache_info()
    for _ in range(2):
        sharding.check_replicas([x])
    after = copies._program.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 2), "compiled anew for every call"


def test_training_keeps_copies_equal() -> None:
    mesh = make_mesh()
    params = put(WHOLE, mesh, SPECS["columns over model"])
    tx = sharding.zero(storage.compress(rmsprop(momentum=0.9), min_size=1), params, "data")
    updates, state, _ = train(tx, params, [put(g, mesh, SPECS["columns over model"]) for g in gradients()])
    assert sharding.check_replicas((params, updates, state)) > 10


# --- Statistics --------------------------------------------------------------------------------------------

MODEL = {
    "w": jnp.linspace(-1, 1, 64 * 32).reshape(64, 32) ** 3,
    "b": jnp.linspace(0, 1, 24),
    "c": jnp.full((16, 4), 1 + 2j, jnp.complex64),
    "s": jnp.full((), 2.0),
}
OF_MODEL = {"w": P("data", "model"), "b": P("data"), "c": P(None, "model"), "s": P()}


def observed(tx: Any, params: Any) -> Any:
    """What the recorder saw of two updates, and the statistics of the last one."""
    recorded, records = record_statistics(tx, 2), []
    state = recorded.init(params)
    for _ in range(2):
        before, grads = params, jax.tree.map(lambda p: p * p, params)
        updates, state = recorded.update(grads, state, params)
        records.append(dict(state.statistics.items()))
        params = jax.tree.map(jnp.add, params, updates)
    return records, statistics(tx, grads, updates, state.inner_state, before)


OBSERVED = {
    "centered": lambda: rmsprop(0.01, momentum=0.9, centered=True),
    "8 bits": lambda: storage.compress(rmsprop(0.01, momentum=0.9), min_size=1),
}


@pytest.mark.parametrize(("name", "kind"), [("centered", "Auto"), ("8 bits", "Explicit")])
def test_statistics_on_a_mesh_are_those_of_one_device(name: str, kind: str) -> None:
    params = put(MODEL, make_mesh((kind, kind)), OF_MODEL)
    program = jax.jit(lambda params: observed(OBSERVED[name](), params))
    assert_close(program(params), jax.jit(lambda p: observed(OBSERVED[name](), p))(MODEL), ulps=32, weak_types=True)
    assert max(exchanged(program.lower(params).compile())) < 100, "an array of parameters was gathered"


def test_statistics_inside_shard_map_are_those_of_one_device() -> None:
    if not hasattr(jax, "shard_map") or not hasattr(jax, "typeof"):
        pytest.skip("this JAX has no varying types, so figures are those of a shard")
    of_all = shard_map(lambda params: observed(OBSERVED["centered"](), params), make_mesh(), (OF_MODEL,), P())
    program = jax.jit(of_all)
    assert_close(
        program(MODEL), jax.jit(lambda p: observed(OBSERVED["centered"](), p))(MODEL), ulps=32, weak_types=True
    )
    assert max(exchanged(program.lower(MODEL).compile())) < 100, "an array of parameters was gathered"


def test_codes_at_the_bottom_are_counted_over_all_shards() -> None:
    if not hasattr(jax, "shard_map") or not hasattr(jax, "typeof"):
        pytest.skip("this JAX has no varying types, so figures are those of a shard")
    tx = storage.compress(rmsprop(0.01), min_size=1)
    params = jnp.ones((8, 16))
    grads = jnp.where(jnp.arange(16)[None] < jnp.arange(8)[:, None], 1e-9, 1.0)  # whole rows are on one device
    updates, state = tx.update(grads, tx.init(params), params)
    want = statistics(tx, grads, updates, state, params)
    specs = jax.tree.map(lambda x: P("data") if x.ndim else P(), state)
    of_all = shard_map(
        lambda *x: statistics(tx, *x), make_mesh(shape=(8,)), (P("data"), P("data"), specs, P("data")), P()
    )
    assert_close(jax.jit(of_all)(grads, updates, state, params), want, ulps=32)
    assert 0.1 < want["total/squares_at_bottom"] < 0.9


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_summary_of_a_mesh_is_that_of_one_device(kind: str) -> None:
    def printed(params: Any) -> str:
        tx = sharding.zero(rmsprop(0.01), params, "data") if params is not MODEL else rmsprop(0.01)
        grads = jax.tree.map(lambda p: p * p, params)
        updates, state = tx.update(grads, tx.init(params), params)
        return str(summarize(tx, grads, updates, state, params))

    placed = put(MODEL, make_mesh((kind, kind)), dict.fromkeys(MODEL, P()))
    assert printed(placed) == printed(MODEL)


def test_blocks_of_the_page_run_from_top_to_bottom_and_print_what_follows(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("orbax.checkpoint")
    if not hasattr(jax, "shard_map"):
        pytest.skip("JAX 0.6.0 prints devices and specs in another way")
    page = (test_readme.ROOT / "docs" / f"{test_readme.ON_EIGHT_DEVICES}.md").read_text()
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    blocks = test_readme.BLOCK.findall(page)
    assert len(blocks) == page.count("```python") > 5
    for block, prints in blocks:
        exec(block, scope)
        assert capsys.readouterr().out == prints


def test_front_door_has_sharding() -> None:
    assert rmsprop_jax.sharding is sharding
