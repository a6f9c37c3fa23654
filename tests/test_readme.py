"""What the README and the pages in ``docs`` say is run: their code, tables and links."""

import builtins
import copy
import inspect
import pathlib
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import recorded
import tables
from compare import assert_close
from rmsprop_jax import checkpoints, dialects, rmsprop

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TEN_LINES, SIDE_BY_SIDE, TRANSLATION, CHECKPOINT = re.findall(
    r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE
)
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS, *sorted((ROOT / "benchmarks").glob("*.md"))]
# A block, and what it prints if a block of text follows at once.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


# --- The README --------------------------------------------------------------------------------------------


def test_readme_has_at_most_900_words() -> None:
    assert len(README.split()) <= 900


def test_first_block_prints_what_its_last_comment_says(capsys: pytest.CaptureFixture[str]) -> None:
    exec(TEN_LINES, {})
    assert capsys.readouterr().out.strip() == TEN_LINES.rsplit("#", 1)[1].strip()


def test_translation_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    exec(TRANSLATION, scope)
    assert "torch(lr=0.016, alpha=0.9, eps=0.0316228," in capsys.readouterr().out
    assert scope["optimizer"].init(jnp.ones(2)).momentum_buffer is not None


def test_ported_program_runs() -> None:
    """The right half of the side-by-side, at the column where it starts."""
    lines = SIDE_BY_SIDE.splitlines()
    column = lines[0].index("# JAX")
    program = "\n".join(line[column:] for line in lines[1:])
    params = {"w": jnp.ones(3)}
    scope = {"params": params, "batches": [(jnp.ones(3), 1.0)] * 2, "loss": lambda p, x, y: (p["w"] @ x - y) ** 2}
    exec("import jax, optax\nfrom rmsprop_jax import rmsprop\n" + program, scope)
    assert scope["state"].step == 2
    assert (scope["params"]["w"] != params["w"]).all()


def test_side_by_side_passes_torch_the_same_arguments() -> None:
    arguments = re.findall(r"(\w+)=([\w.-]+)", SIDE_BY_SIDE)
    left_and_right: dict[str, set[str]] = {}
    for name, value in arguments:
        left_and_right.setdefault(name, set()).add(value)
    assert all(len(values) == 1 for values in left_and_right.values())
    assert set(left_and_right) == {"lr", "alpha", "eps", "weight_decay", "momentum", "centered"}


def test_checkpoint_block_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.RMSprop(model.parameters(), momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    monkeypatch.chdir(tmp_path)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "checkpoint.pt")
    scope: dict[str, Any] = {"torch": torch, "jax": jax, "jnp": jnp, "names": ["weight", "bias"]}
    scope["to_params"] = lambda named: {"kernel": named["weight"].T, "bias": named["bias"]}
    exec(CHECKPOINT, scope)
    assert scope["state"].step == 1
    updates, _ = scope["optimizer"].update(scope["params"], scope["state"], scope["params"])
    assert updates["kernel"].shape == (3, 2)


CALLS = re.findall(r"^\| (.*) \| `(from_\w+\(.*\))` \|$", README, re.MULTILINE)


def torch_source(scheduled: bool = False) -> tuple[dict[str, Any], Any, Any]:
    """What the calls take, the parameters, and the parameters after one more step of torch."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2) if scheduled else None

    def step() -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()

    def params() -> Any:
        return {name: jnp.array(p.detach().numpy()) for name, p in model.named_parameters()}

    for _ in range(3):
        step()
    scope = {"file": copy.deepcopy(optimizer.state_dict()), "names": list(params()), "to_params": dict, "optax": optax}
    scope["shapes"] = {name: p.shape for name, p in params().items()} | {"new.bias": (4,)}
    if scheduler is not None:
        scope["scheduler_file"] = scheduler.state_dict()
    before = params()
    step()
    return scope, before, params()


def optax_source() -> tuple[dict[str, Any], Any, Any]:
    params = {"w": jnp.arange(3.0)}
    theirs, ours = optax.rmsprop(lambda count: 0.1 / (1 + count)), dialects.optax(lambda count: 0.1 / (1 + count))
    _, opt_state = theirs.update(params, theirs.init(params), params)
    updates, _ = theirs.update({"w": jnp.ones(3)}, opt_state, params)
    after = optax.apply_updates(params, updates)
    return {"opt_state": opt_state, "optimizer": ours, "params": params, "step": 1}, params, after


def recorded_source(library: str, case: str) -> tuple[dict[str, Any], Any, Any]:
    run = recorded.run_of(library, case, "float32")
    variables = run.file
    if library == "keras":
        variables = {path: run.file[str(place)] for place, path in enumerate(run.about["paths"])}
    scope = {"names": run.names, "variables": variables, "to_params": dict}
    return scope | {"config": run.about.get("config", {}).get("float32")}, run, None


def test_every_call_of_the_table_continues_its_run() -> None:
    """One more update here is one more step there."""
    seen = []
    for source, call in CALLS:
        if "from_torch" in call:
            scope, before, after = torch_source("scheduler_file" in call)
            gradients = jax.tree.map(jnp.ones_like, before)
        elif "from_optax" in call:
            scope, before, after = optax_source()
            gradients = {"w": jnp.ones(3)}
        else:
            library = "keras" if "from_keras" in call else "tensorflow1"
            scope, run, _ = recorded_source(library, "plain")
            before, after = run.params[0], run.params[run.steps.index(run.steps[0] + 1)]
            gradients = {name: run.gradients[name][0] for name in run.names}
        seen.append(call.split("(")[0])
        scope |= {name: getattr(checkpoints, name) for name in checkpoints.__all__} | {"dialects": dialects}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "these parameters are not in the file")
            result = eval(call, scope)
        tx, state = (scope["optimizer"], result) if "from_optax" in call else result
        if "missing" in call:
            before, gradients = ({**tree, "new.bias": jnp.ones(4)} for tree in (before, gradients))
        updates, _ = tx.update(gradients, state, before)
        moved = optax.apply_updates(before, updates)
        if "transformation=" in call:  # another rule, from the same state
            assert int(state.step) == 3, source
            assert all((np.asarray(state.square_avg[name]) > 0).all() for name in before), source
            continue
        assert_close({name: moved[name] for name in after}, after, ulps=4, scale="array")
    assert set(seen) == {name for name in checkpoints.__all__ if name.startswith("from_")}


# --- The pages in docs -------------------------------------------------------------------------------------


ON_EIGHT_DEVICES = "distributed"  # on_eight_devices.py runs it


@pytest.mark.parametrize("page", [page for page in DOCS if page.stem != ON_EIGHT_DEVICES], ids=lambda page: page.stem)
def test_blocks_run_from_top_to_bottom_and_print_what_follows(
    page: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = BLOCK.findall(page.read_text())
    assert len(blocks) == page.read_text().count("```python")
    code = "".join(block for block, _ in blocks)
    for library, used in {"torch": "torch.", "matplotlib": "plotting."}.items():
        if used in code:
            pytest.importorskip(library)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    if page.stem == "keras":
        recorded.write_keras_file(tmp_path / "model.keras")
        scope["__builtins__"] = vars(builtins) | {"__import__": recorded.import_of_page}
    for block, prints in blocks:
        exec(block, scope)
        assert capsys.readouterr().out == prints


def test_inject_hyperparams_advice_is_right() -> None:
    advice = (ROOT / "docs" / "pytorch.md").read_text()
    names = inspect.signature(rmsprop).parameters
    for advised in re.search(r"static_args=\(([^)]*)\)", advice)[1].replace('"', "").split(", "):
        assert advised in names
    tx = optax.inject_hyperparams(rmsprop, ("weight_decay_mask", "accumulator_dtype"), jnp.float32)(
        alpha=0.999, weight_decay=0.1, weight_decay_mask=lambda params: True, accumulator_dtype=jnp.float32
    )
    state = tx.init(jnp.ones(2, jnp.bfloat16))
    assert state.hyperparams["alpha"] == np.float32(0.999)
    tx.update(jnp.ones(2, jnp.bfloat16), state, jnp.ones(2, jnp.bfloat16))


# --- All pages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_those_of_the_code(page: str) -> None:
    text = (ROOT / page).read_text()
    assert tables.with_tables(page, text) == text, "run: python tests/tables.py"


def anchors(page: pathlib.Path) -> set[str]:
    """What a link may have after its #: the headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_linked_files_and_headings_exist(page: pathlib.Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_readme_links_every_page() -> None:
    assert [page.name for page in DOCS if f"](docs/{page.name})" not in README] == []
