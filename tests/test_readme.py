"""What the README says is run."""

import inspect
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import readme_tables
from rmsprop_jax import rmsprop

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_first_block_prints_what_its_last_comment_says(capsys: pytest.CaptureFixture[str]) -> None:
    exec(BLOCKS[0], {})
    assert capsys.readouterr().out.strip() == BLOCKS[0].rsplit("#", 1)[1].strip()


def test_tables_are_those_of_the_code() -> None:
    assert readme_tables.with_tables(README) == README, "run: python tests/readme_tables.py"


def test_translation_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    exec(BLOCKS[1], scope)
    assert "torch(lr=0.016, alpha=0.9, eps=0.0316228," in capsys.readouterr().out
    assert scope["optimizer"].init(jnp.ones(2)).momentum_buffer is not None


def test_ported_program_runs() -> None:
    """The right half of the side-by-side, at the column where it starts."""
    lines = BLOCKS[2].splitlines()
    column = lines[0].index("# JAX")
    program = "\n".join(line[column:] for line in lines[1:])
    params = {"w": jnp.ones(3)}
    scope = {"params": params, "batches": [(jnp.ones(3), 1.0)] * 2, "loss": lambda p, x, y: (p["w"] @ x - y) ** 2}
    exec("import jax, optax\nfrom rmsprop_jax import rmsprop\n" + program, scope)
    assert scope["state"].step == 2
    assert (scope["params"]["w"] != params["w"]).all()


def test_side_by_side_passes_torch_the_same_arguments() -> None:
    arguments = re.findall(r"(\w+)=([\w.-]+)", BLOCKS[2])
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
    exec(BLOCKS[3], scope)
    assert scope["state"].step == 1
    updates, _ = scope["optimizer"].update(scope["params"], scope["state"], scope["params"])
    assert updates["kernel"].shape == (3, 2)


def test_every_python_block_is_tested_here() -> None:
    assert len(BLOCKS) == 4


def test_inject_hyperparams_advice_is_right() -> None:
    names = inspect.signature(rmsprop).parameters
    for advised in re.search(r"static_args=\(([^)]*)\)", README)[1].replace('"', "").split(", "):
        assert advised in names
    tx = optax.inject_hyperparams(rmsprop, ("weight_decay_mask", "accumulator_dtype"), jnp.float32)(
        alpha=0.999, weight_decay=0.1, weight_decay_mask=lambda params: True, accumulator_dtype=jnp.float32
    )
    state = tx.init(jnp.ones(2, jnp.bfloat16))
    assert state.hyperparams["alpha"] == np.float32(0.999)
    tx.update(jnp.ones(2, jnp.bfloat16), state, jnp.ones(2, jnp.bfloat16))


def test_linked_files_exist() -> None:
    root = pathlib.Path(__file__).parents[1]
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / target).exists(), target
