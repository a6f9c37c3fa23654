"""The table, and a remark for every staged failure."""

import html.parser
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import rmsprop
from rmsprop_jax.diagnostics import statistics
from rmsprop_jax.summary import Summary, summarize

# --- Staged failures -------------------------------------------------------------------------------------


def network(seed: int = 0) -> dict[str, Any]:
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "hidden": {"kernel": jax.random.normal(first, (64, 32)) / 8, "bias": jnp.zeros(32)},
        "out": {"kernel": jax.random.normal(second, (32, 10)) / 32**0.5, "bias": jnp.zeros(10)},
    }


def cross_entropy(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(images @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    logits = hidden @ params["out"]["kernel"] + params["out"]["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(loss: Callable[..., Any], params: Any, batches: list[Any], at: set[int], **setting: Any) -> Any:
    """Trains with ``rmsprop(**setting)``; the summaries of the updates ``at``, and the loss before each update."""
    tx, summaries, losses = rmsprop(**setting), {}, []

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return value, grads, updates, state, optax.apply_updates(params, updates)

    state = tx.init(params)
    for i, batch in enumerate(batches):
        value, grads, updates, state, moved = step(params, state, batch)
        losses.append(float(value))
        if i in at:
            summaries[i] = summarize(tx, grads, updates, state, params)
        params = moved
    return summaries, losses


def digits(steps: int, batch_size: int | None = 64) -> list[Any]:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = np.asarray(data.data / 16, np.float32), np.asarray(data.target, np.int32)
    if batch_size is None:
        return [(images, labels)] * steps
    rng = np.random.default_rng(0)
    return [(images[i], labels[i]) for i in (rng.integers(0, len(labels), batch_size) for _ in range(steps))]


def causes(found: Summary) -> list[str]:
    assert all(remark in str(found) for remark in found.remarks)
    return [remark.partition(":")[0] for remark in found.remarks]


@pytest.mark.parametrize(
    "setting", [{}, {"momentum": 0.5}, {"centered": True}, {"accumulator_dtype": "bfloat16", "alpha": 0.9}]
)
def test_healthy_run_gives_no_remark(setting: dict[str, Any]) -> None:
    at = {0, 1, 2, 5, 10, 50, 100, 199}
    summaries, losses = train(cross_entropy, network(), digits(200), at, **{"lr": 1e-3} | setting)
    assert losses[-1] < 0.5 * losses[0]
    assert {i: found.remarks for i, found in summaries.items()} == dict.fromkeys(at, ())


def test_learning_rate_too_high_is_recognized() -> None:
    summaries, losses = train(cross_entropy, network(), digits(4), {0, 1, 2, 3}, lr=1.0)
    assert max(losses) > 100 * losses[0]
    assert [causes(found) for found in summaries.values()] == [["learning rate too high"]] * 4


def test_eps_too_large_is_recognized() -> None:
    summaries, losses = train(cross_entropy, network(), digits(100), {20, 99}, lr=1e-3, eps=1.0)
    assert losses[-1] > 0.95 * losses[0]
    assert [causes(found) for found in summaries.values()] == [["eps too large"]] * 2


def test_stalled_half_precision_average_is_recognized() -> None:
    setting = dict(lr=1e-3, alpha=0.999)
    stalled, slow = train(cross_entropy, network(), digits(700, None), {699}, **setting, accumulator_dtype="bfloat16")
    summaries, fast = train(cross_entropy, network(), digits(700, None), {699}, **setting)
    assert slow[-1] > 1.02 * fast[-1]
    assert causes(stalled[699]) == ["average stalled"]
    assert "out/kernel the state is stored in bfloat16" in stalled[699].remarks[0]
    assert summaries[699].remarks == ()


def test_underflowed_half_precision_average_is_recognized() -> None:
    def slope(params: jax.Array) -> jax.Array:
        return 5e-4 * jnp.sum(params)

    batches = [()] * 300
    summaries, losses = train(slope, jnp.ones(8), batches, {299}, lr=1e-3, accumulator_dtype="float16")
    _, expected = train(slope, jnp.ones(8), batches, set(), lr=1e-3)
    # Every step is as large as the first one, lr/√(1 − alpha), and never comes down to lr.
    np.testing.assert_allclose(losses[-2] - losses[-1], 8 * 5e-4 * 10 * 1e-3, rtol=1e-3)
    np.testing.assert_allclose(expected[-2] - expected[-1], 8 * 5e-4 * 1e-3, rtol=0.03)
    assert causes(summaries[299]) == ["average stalled"]


def test_exploding_centered_step_is_recognized() -> None:
    def distance(params: Any, target: jax.Array) -> jax.Array:  # far from the target its gradient never varies
        return jnp.abs(params["w"] - target).mean()

    batches = [(jnp.full(4, 50.0),)] * 125
    summaries, losses = train(distance, {"w": jnp.ones(4)}, batches, {5, 99}, lr=0.01, alpha=0.9, centered=True)
    assert summaries[5].remarks == ()
    assert causes(summaries[99]) == ["centered step exploding"]
    assert losses[99] - losses[100] > 100 * 0.01
    _, plain = train(distance, {"w": jnp.ones(4)}, batches, set(), lr=0.01, alpha=0.9)
    assert max(-np.diff(plain)) < 0.04


def test_exploding_centered_step_is_recognized_when_eps_is_all_that_is_left() -> None:
    params, tx = jnp.ones(4), rmsprop(0.01, alpha=0.5, eps=1e-6, centered=True)
    state = tx.init(params)
    for _ in range(60):
        updates, state = tx.update(params, state, params)
    found = summarize(tx, params, updates, state, params)
    assert found.statistics["params/eps_share"] == 1
    np.testing.assert_allclose(found.statistics["params/lr_50"], 0.01 / 1e-6, rtol=1e-2)
    assert causes(found) == ["centered step exploding"]


def test_what_is_not_finite_is_named() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    grads = {"a": jnp.ones(2), "b": jnp.array([jnp.nan, 1.0])}
    updates, state = rmsprop(1e-4).update(grads, rmsprop(1e-4).init(params), params)
    found = summarize(rmsprop(1e-4), grads, updates, state, params)
    assert causes(found) == ["not finite"]
    assert "NaN in b;" in found.remarks[0]
    many = {str(i): jnp.full(2, jnp.nan) for i in range(10, 18)}
    found = summarize(rmsprop(), many, many, rmsprop().init(many), many)
    assert "NaN in 10, 11, 12, 13, 14 and 3 more;" in found.remarks[0]


def test_never_updated_elements_are_no_sign_of_a_large_eps() -> None:
    grads = jnp.array([1.0, *[0.0] * 99])
    updates, state = rmsprop(1e-3).update(grads, rmsprop().init(grads))
    found = summarize(rmsprop(1e-3), grads, updates, state, jnp.ones(100))
    assert found.statistics["params/eps_share"] == pytest.approx(0.99)
    assert found.remarks == ()


def test_parameters_that_are_all_zero_are_no_sign_of_a_high_learning_rate() -> None:
    grads = {"w": jnp.ones(3)}
    updates, state = rmsprop(1e-3).update(grads, rmsprop().init(grads))
    assert summarize(rmsprop(1e-3), grads, updates, state, {"w": jnp.zeros(3)}).remarks == ()


# --- The table -------------------------------------------------------------------------------------------


def test_summary_divides_no_zero_by_zero() -> None:
    tx, params = rmsprop(1e-3, eps=0.0, centered=True), jnp.zeros(2)
    with jax.debug_nans(True):
        assert summarize(tx, params, params, tx.init(params), params).remarks == ()


def test_summary_is_an_aligned_table() -> None:
    params = {"kernel": jnp.full((30, 40), 0.5), "scale": jnp.float32(2.0), "half": jnp.ones(3, jnp.bfloat16)}
    grads = jax.tree.map(lambda p: -p, params)
    tx = rmsprop(1e-3, alpha=0.75, momentum=0.9)
    updates, state = tx.update(grads, tx.init(params), params)
    found = summarize(tx, grads, updates, state, params)
    head, rule, *rows, last_rule, total = str(found).splitlines()
    assert repr(found) == str(found)
    assert len({len(line) for line in (head, rule, *rows, last_rule, total)}) == 1
    cells = {line.split()[0]: re.split(r" {2,}", line.strip()) for line in (*rows, total)}
    columns = re.split(r" {2,}", head)
    sizes, figures = ["kernel", "30×40", "1,200", "float32", "9.38 KiB"], ["0.5", "0.004", "0.004 [0.004–0.004]"]
    assert cells["kernel"] == [*sizes, *figures, "0.0%", "2", "0.0%", "0.0%"]
    assert cells["half"][:5] == ["half", "3", "3", "float32", "24 B"]
    assert cells["total"][columns.index("count") - 1] == "1,204"
    assert found.statistics == {key: float(x) for key, x in statistics(tx, grads, updates, state, params).items()}


class Cells(html.parser.HTMLParser):
    """Checks that tags are closed in order, and collects the text of the cells and items."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[-1] += data


def test_summary_in_a_notebook_is_the_same_table_escaped() -> None:
    params = {"<b>bold</b>": jnp.ones(3)}
    updates, state = rmsprop(1.0).update(params, rmsprop(1.0).init(params), params)
    found = summarize(rmsprop(1.0), params, updates, state, params)
    page = found._repr_html_()
    cells = Cells()
    cells.feed(page)
    assert not cells.open
    assert "<b>" not in page
    assert found.remarks
    for text in [cell for row in found.rows for cell in row] + list(found.remarks):
        assert text in cells.texts
