"""The figures in the pages are those of the committed measurements, and the trees are those they are named after."""

import pathlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import eager, measure, peers, report, step, tracing, trees


@pytest.mark.parametrize(("part", "backend"), report.measured())
def test_tables_are_those_of_the_results(part: str, backend: str) -> None:
    page = report.PAGE.read_text()
    for name, table in report.tables(part, backend).items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in page, "run: python -m benchmarks --report"


@pytest.mark.parametrize(
    ("name", "arrays", "parameters"),
    [("ResNet-50", 161, 25_557_032), ("GPT-2 small", 148, 124_439_808), ("EfficientNet-B0", 213, 5_288_548)],
)
def test_trees_have_the_published_size(name: str, arrays: int, parameters: int) -> None:
    assert len(trees.TREES[name]) == arrays
    assert trees.parameters(trees.TREES[name]) == parameters


def test_readme_shows_three_figures_of_the_results() -> None:
    table = report.three_figures("cpu")
    assert f"<!-- three figures -->\n{table}\n<!-- /three figures -->" in report.README.read_text(), (
        "run: python -m benchmarks --report"
    )


def test_ratio_is_of_neighbors_in_time() -> None:
    assert measure.ratio([1.0, 10.0, 100.0], [2.0, 20.0, 200.0]) == {"median": 0.5, "low": 0.5, "high": 0.5}


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """Puts back what a measured step of torch sets."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("variant", peers.VARIANTS)
def test_all_peers_follow_the_same_rule(variant: str) -> None:
    torch = pytest.importorskip("torch")
    arguments, gradient = peers.VARIANTS[variant], np.linspace(-1e-7, 1e-7, 5, dtype=np.float32)  # eps shows
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = torch.optim.RMSprop([param], peers.LR, peers.ALPHA, **arguments)
    for scale in (1.0, 3.0, 0.5):
        param.grad = torch.from_numpy(scale * gradient)
        optimizer.step()
    for make in peers.TRANSFORMATIONS.values():
        params = jnp.ones(5)
        state = make(**arguments).init(params)
        for scale in (1.0, 3.0, 0.5):
            params, state = peers.whole_step(make(**arguments))(params, state, scale * gradient)
        np.testing.assert_allclose(params, param.detach().numpy(), rtol=1e-5)


@pytest.mark.script
@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize("variant", peers.BOTH_ENDS)
def test_a_step_is_measured_against_all_but_the_slow_peers(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    monkeypatch.setitem(trees.TREES, "tiny", [(3,), (3, 4)])
    row = step.row("tiny", variant, "float32", everybody=False)
    committed = next(row for row in measure.load("step")["rows"] if row["variant"] == variant)
    assert set(committed["seconds"]) - set(row["seconds"]) <= {"torch compiled", "keras"}
    assert row["seconds"].keys() - committed["seconds"].keys() == set()


@pytest.mark.script
@pytest.mark.parametrize("way", eager.WAYS)
def test_every_way_to_call_an_update_runs_for_everybody(way: str) -> None:
    params = peers.arrays([(3,), (3, 4)], "float32", seed=0)
    for make in peers.TRANSFORMATIONS.values():
        for variant in peers.BOTH_ENDS:
            eager.WAYS[way](make, peers.VARIANTS[variant], params)()


@pytest.mark.script
def test_stages_before_the_first_step_are_all_timed() -> None:
    row = tracing.row("plain", count=10, rounds=1)
    assert {"trace", "lower", "trace and lower", "compile"} <= row["step"].keys()
    assert row["update"]["lines"]["ours"] < row["update"]["lines"]["optax"]


@pytest.mark.script
def test_training_steps_and_recorded_ones_run() -> None:
    pytest.importorskip("flax")
    pytest.importorskip("sklearn")
    from benchmarks import recording, training

    model = next(iter(training.batches()))
    assert training.row(model, "plain", rounds=1)["seconds"].keys() == {"ours", "optax", "SGD"}
    recording.ten_steps(recorded=True)()


def test_centered_variance_is_exact_where_nothing_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from benchmarks import centered

    monkeypatch.setattr(centered, "STEPS", 50)
    row = centered.row(noise=1.0)
    assert all(row[name]["error"] < 1e-5 for name in ("ours", "torch", "optax"))
    assert all(row[name]["nan"] == 0 for name in ("ours", "torch", "optax"))


def test_tables_are_written_between_their_markers(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- step cpu -->\nold\n<!-- /step cpu -->\nafter\n")
    report.write_into(page, "step cpu", "new")
    assert page.read_text() == "before\n<!-- step cpu -->\nnew\n<!-- /step cpu -->\nafter\n"


@pytest.mark.parametrize("part", report.PICTURES)
def test_pictures_are_drawn_from_the_results(
    part: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.draw(part, "cpu").stat().st_size > 10_000


# --- State in 8 and 16 bits ------------------------------------------------------------------------------------


def test_bytes_of_the_state_are_codes_scales_and_small_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from benchmarks import storage

    monkeypatch.setitem(trees.TREES, "tiny", [(96, 256), (100,)])
    row, values = storage.row("tiny", "plain"), 96 * 256 + 100
    assert row["per_value"]["8"] == pytest.approx(
        {
            "encoded": 1 + 4 / 256,
            "all": (96 * 256 + 4 * 96 + 400) / values,
            "share of small arrays": 100 / values,
        }
    )
    assert row["per_value"]["16"]["encoded"] == 2
    assert row["per_parameter"]["torch"] == row["per_parameter"]["optax"] == {"weights": 4, "state": 4}
    assert row["per_parameter"]["bitsandbytes, 8 bits"]["state"] == row["per_parameter"]["ours, 8 bits"]["state"]


def test_bytes_of_bitsandbytes_are_those_of_its_state() -> None:
    torch = pytest.importorskip("torch")
    optim = pytest.importorskip("bitsandbytes.optim")
    from benchmarks import storage

    for shape in ((64, 256), (65, 101), (10, 10)):
        param = torch.nn.Parameter(torch.zeros(shape))
        param.grad = torch.ones(shape)
        optimizer = optim.RMSprop8bit([param])
        optimizer.step()
        names = ("state1", "absmax1") if "absmax1" in optimizer.state[param] else ("state1",)
        assert storage.size_of_bitsandbytes(shape) == sum(optimizer.state[param][name].nbytes for name in names)


@pytest.mark.script
def test_errors_are_measured_for_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import rounding

    monkeypatch.setattr(rounding, "ALPHAS", (0.5,))
    monkeypatch.setattr(rounding, "PERIODS", (2,))
    monkeypatch.setattr(rounding, "lengths", lambda alpha: (20, 10))
    rows = [*rounding.root_rows(4), *rounding.periodic_rows(4), *rounding.signed_rows(4)]
    assert {row["method"] for row in rows} == set(rounding.METHODS)
    rms = {(row["kind"], row["method"]): row["rms of all"] for row in rows if row.get("gradients") in (None, "steady")}
    for kind in ("root", "periodic", "signed"):
        assert 0 < rms[kind, "ours, 16 bits"] < 0.01 < rms[kind, "ours, 8 bits"]


def test_errors_are_split_by_the_size_of_the_gradients() -> None:
    from benchmarks import rounding

    errors = np.resize([0.5, -0.25], (3, 4)).astype(np.float32)
    found = rounding.by_size((jnp.asarray(2 * errors), jnp.asarray(2 * errors**2)), 2, (1.0, 0.1))
    assert found["mean"] == {"1": 0.5, "0.1": -0.25}
    assert found["rms"] == {"1": 0.5, "0.1": 0.25}


@pytest.mark.script
def test_losses_are_compared_for_every_state_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flax")
    pytest.importorskip("sklearn")
    from benchmarks import loss, rounding

    monkeypatch.setattr(loss, "SEEDS", (0,))
    monkeypatch.setattr(loss, "VARIANTS", ("momentum",))
    (name, problem), *others = loss.problems().items()
    rows = list(loss.rows_of(name, problem._replace(steps=2, measured=8)))
    assert [row["what"] for row in rows] == ["noise", *["state"] * len(loss.STATES), *["weights"] * 2]
    assert all(abs(row["difference"]["mean"]) < 0.1 for row in rows)
    assert all(row["encoded"] > 0.9 for row in rows if row["what"] == "state")
    for name, problem in others:
        tx = rounding.METHODS["ours, 8 bits"](loss.optimizer(problem, "momentum"))
        assert 0 < loss.losses(problem._replace(steps=1, measured=8), tx) < 10, name


@pytest.mark.script
def test_steps_are_measured_for_every_state() -> None:
    from benchmarks import compressed

    for rule in compressed.RULES:
        rows = compressed.rows_of(rule, (8, 512), rounds=1)
        assert [row["state"] for row in rows] == list(compressed.STATES)
        merged = [compressed.merged((row, row)) for row in rows]
        assert merged[0]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_codes_count_as_one_byte_of_a_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY"):  # which the module would set for good
        monkeypatch.setenv(name, "cpu")
    from benchmarks import compiled

    assert compiled.whole_arrays("(u8[8,16]{1,0}, f32[8]{0}, bf16[8,16]{1,0})", (8, 16)) == 3


def test_collectives_are_counted_with_their_arrays() -> None:
    from benchmarks import collectives

    lines = """
      %a = f32[8]{0} all-reduce(%b), replica_groups={}
      %c = (f32[8]{0}, f32[9]{0}) all-reduce(%d, %e), replica_groups={}
      %f = f32[8]{0} fusion(%a), calls=%all-reduce
    """
    assert [result.count("[") for result in collectives.COLLECTIVE.findall(lines)] == [1, 2]


@pytest.mark.script
def test_an_update_on_many_devices_is_compared_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import collectives

    monkeypatch.setattr(collectives, "DEVICES", 2)
    rows = collectives.measure(full=False)
    assert {(row["layout"], row["bits"]) for row in rows} == {
        (x, bits) for x in collectives.LAYOUTS for bits in (8, 16)
    }
    assert all(row["same without fma"] for row in rows)


# --- Many devices ----------------------------------------------------------------------------------------------


def test_bytes_between_devices_are_those_of_whole_arrays() -> None:
    from benchmarks import hlo

    lines = """
    %all-reduce-scatter.3 (input: f32[8,2]) -> f32[1,2] {
      %a = f32[8,2]{1,0} all-reduce(%input), channel_id=1, to_apply=%add
    }
    ENTRY %main {
      %b = (f32[8,2]{1,0}, f32[]) all-reduce(%x, %y), channel_id=2, to_apply=%add
      %c = bf16[8,2]{1,0:T(8,128)} all-gather(%x), channel_id=3, dimensions={0}
      %d = bf16[8,2]{1,0:T(8,128)} all-gather(%x), channel_id=3, dimensions={0}
      %e = ((f32[1,2], f32[1]), (f32[8,2], f32[8])) all-gather-start(%x, %y), channel_id=4, dimensions={0}
      %f = (f32[8,2], f32[8]) all-gather-done(%e)
      %g = f32[1,2]{1,0} reduce-scatter(%x), channel_id=5, to_apply=%add
      %h = ((f32[8,2]), (f32[1,2])) reduce-scatter-start(%x), channel_id=6, to_apply=%add
      %i = (f32[8,2], f32[8,2], u32[], u32[]) collective-permute-start(%x), channel_id=7
    }
    """
    assert hlo.exchanges(lines, devices=8) == [
        ("reduce-scatter", ((16, 64),)),
        ("all-reduce", ((16, 64), (1, 4))),
        ("all-gather", ((16, 32),)),
        ("all-gather", ((16, 64), (8, 32))),
        ("reduce-scatter", ((16, 64),)),
        ("reduce-scatter", ((16, 64),)),
        ("collective-permute", ((16, 64),)),
    ]
    found = hlo.summary(lines, [(8, 2)], devices=8)
    assert found["whole"] == 6 * 4 + 2
    assert found["small"] == (4 + 32) / 16
    assert found["sent"] == 7 / 8 * (2 * 68 + 64 * 3 + 32 + 96) / 16 + 4


@pytest.mark.parametrize("backend", ["cpu", "cuda", "tpu"])
def test_committed_counts_have_the_gradient_as_their_control(backend: str) -> None:
    """Replicated training sums up every gradient, so a counter that sees nothing would show here."""
    replicated, *_, zero, compressed = measure.load("exchanged", backend)["rows"]
    assert replicated["bytes"]["all-reduce"] == 4
    assert zero["bytes"]["all-gather"] == compressed["bytes"]["all-gather"] == 4
    if backend != "cpu":
        assert zero["sent"] == pytest.approx(replicated["sent"], rel=1e-2)


def test_committed_layouts_send_nothing_in_fsdp_and_hold_a_part_in_zero() -> None:
    rows = measure.load("layouts")["rows"]
    found = {(row["model"], row["layout"], row["devices"]): row for row in rows if row["what"] == "layout"}
    for (model, layout, devices), row in found.items():
        alone = found[model, layout, 1]
        if layout in ("replicated", "FSDP"):
            assert row["collectives"] == {}
        elif devices > 1:
            assert row["whole"] == 4
        if layout != "replicated":
            assert row["state"] == pytest.approx(alone["state"] / devices, rel=0.02)
    assert all(row["collectives"] for row in rows if row["what"] == "control" and row["devices"] > 1)
    bits = [row for row in rows if row["what"] == "bits"]
    assert all(row["differ"] == 0 and row["one device"] for row in bits if not row["fma"])


def test_layouts_are_counted_and_compared_on_the_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import layouts

    monkeypatch.setitem(trees.TREES, "tiny", [(8,), (16, 512)])
    monkeypatch.setattr(layouts, "TRAINED", "tiny")
    devices = jnp.zeros(1).sharding.num_devices
    assert layouts.row("tiny", "ZeRO", devices)["state"] == 4 + 2 * 4 * (8 + 16 * 512)
    assert layouts.control("tiny", devices)["collectives"] == {}
    for program in ("update", "step"):
        row = layouts.bits(program, "momentum", True, devices)
        assert (row["differ"], row["units"]) == (0, 0)


def test_differences_are_in_units_of_the_largest() -> None:
    from benchmarks import layouts

    x = np.array([1.0, 1e-6], np.float32)
    assert layouts.units(x + np.float32([0, 2**-23]), x) == pytest.approx(1, rel=0.1)
    assert layouts.units(np.uint8([3]), np.uint8([5])) == 2


@pytest.mark.script
def test_a_training_step_on_two_devices_sends_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import exchanged

    monkeypatch.setattr(exchanged, "DEVICES", 2)
    replicated, *_, zero, _ = exchanged.measure(full=False)
    assert replicated["bytes"] == {"all-reduce": 4}
    assert zero["bytes"]["all-gather"] == 4


@pytest.mark.script
def test_stages_before_a_step_are_measured_for_a_mesh() -> None:
    from benchmarks import meshes

    assert len(list(meshes.transformer())) == 290
    rows = meshes.rows_of("ZeRO", (1,), [(8, 4), (4,)], rounds=1)
    assert meshes.merged((rows[0],))["ratio"]["compile"] == {"median": 1.0, "low": 1.0, "high": 1.0}


# --- An accelerator --------------------------------------------------------------------------------------------


@pytest.mark.script
@pytest.mark.usefixtures("torch_threads")
def test_steps_of_a_device_are_measured_in_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, and small: the path that an accelerator would take."""
    from benchmarks import device

    monkeypatch.setitem(trees.TREES, "tiny", [(16, 512)])
    monkeypatch.setattr(peers, "BOTH_ENDS", ("plain",))
    rows = device.measure(full=False, large="tiny", small="tiny", everybody=False)
    assert [row["dtype"] for row in rows] == [*device.DTYPES, "float32"]
    compressed = rows[2]
    assert compressed["copied"] == 2 * (4 + 1 + 4 / 512) * 16 * 512
    assert "% of copy" in report.device_table(rows)


def test_a_cpu_is_no_device() -> None:
    from benchmarks import device

    assert "only CPUs" in (device.refusal("cpu") or "")
    assert device.refusal("gpu") is device.refusal("tpu") is None
