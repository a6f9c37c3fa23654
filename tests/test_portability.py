"""``make portability`` runs what it should, says what it cannot run, and fails when a test fails."""

import os
import pathlib

import pytest

import portability
from portability import Outcome, Setting

EVERY = [Setting(x, t, n) for x in portability.XLA for n in (1, 2) for t in portability.TORCH]
AVX2_ONLY = {"sse4_2", "avx", "avx2", "fma"}


def here(features: set[str], processors: int) -> list[Setting]:
    return [setting for setting in EVERY if not portability.missing(setting, features, processors)]


def test_settings_that_a_machine_lacks_are_left_out_and_no_others() -> None:
    assert len(here(AVX2_ONLY | portability.XLA["AVX512"], 2)) == len(EVERY) == 24
    assert {(s.xla, s.torch) for s in here(AVX2_ONLY, 2)} == {
        (x, t) for x in ("SSE4_2", "AVX", "AVX2") for t in ("default", "avx2")
    }
    assert {s.threads for s in here(AVX2_ONLY, 1)} == {1}
    assert here(set(), 2) == []


def test_every_setting_runs_what_it_can_change_and_nothing_twice() -> None:
    jobs = list(portability.jobs(here(AVX2_ONLY, 2), ["notebooks", "tests"]))
    runs = [(job.setting, test) for job in jobs for test in job.tests]
    assert len(runs) == len(set(runs))
    tests = [*portability.notebooks(), *portability.numeric_tests()]
    assert any(torch for _, torch in tests)
    for name, torch in tests:
        settings = [setting for setting, test in runs if test == name]
        assert len(settings) == (12 if torch else 6)
        assert len({(s.xla, s.threads) for s in settings}) == 6


def test_notebooks_and_new_files_of_tests_run_unless_they_are_said_to_hold_no_numbers() -> None:
    assert [portability.column(name) for name, _ in portability.notebooks()] == [f"{i:02}" for i in range(1, 9)]
    files = {path.name for path in pathlib.Path(__file__).parent.glob("test_*.py")}
    assert files >= portability.NOT_NUMERIC | portability.SOME_OF.keys()
    tests = dict(portability.numeric_tests())
    assert {f"tests/{name}" for name in files - portability.NOT_NUMERIC - portability.SOME_OF.keys()} <= tests.keys()
    assert tests["tests/test_parity.py"]  # it imports torch
    assert not tests["tests/test_dialects.py"]


def test_table_has_a_row_for_what_is_not_on_this_machine() -> None:
    run, torch_only, absent = Setting("AVX2", "default", 1), Setting("AVX2", "avx2", 1), Setting("AVX512", "default", 1)
    results = {
        run: {"03": Outcome(1), "02": Outcome(1), "tests": Outcome(9, 2)},
        torch_only: {"03": Outcome(failures=("x: y",)), "tests": Outcome(8, 0, ("a: b",))},
    }
    assert portability.table([run, torch_only, absent], results).splitlines() == [
        "XLA     torch    threads  02        03        tests",
        "AVX2    default  1        1 ok      1 ok      9 ok",
        "AVX2    avx2     1        as above  1 FAILED  1 FAILED",
        "AVX512  default  1        not on this machine",
    ]


REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_notebooks" name="test_notebook_puts_out_the_numbers[03_leaving]">
<failure message="loss&#10;more"/></testcase>
<testcase classname="tests.test_a" name="test_b"/><testcase classname="tests.test_a" name="test_c"><skipped/></testcase>
<testcase classname="tests.test_a" name="test_d"><error message="no fixture"/></testcase>
<testcase classname="tests.test_a" name="test_e">
<failure message="INTERNAL: Failed to materialize symbols: { (x, { y }) }"/></testcase>
</testsuite></testsuites>"""


def test_failures_errors_and_skips_are_told_apart() -> None:
    assert portability.outcomes(REPORT) == {
        "03": Outcome(failures=("tests.test_notebooks::test_notebook_puts_out_the_numbers[03_leaving]: loss",)),
        "tests": Outcome(1, 1, ("tests.test_a::test_d: no fixture",), 1),
    }
    assert str(Outcome(passed=3, not_compiled=1)) == "3 ok, 1 not compiled"
    assert str(Outcome(skipped=1)) == "skipped"


PROBE = """
import os, jax, pytest
def test_of_the_setting():
    assert len(os.sched_getaffinity(0)) == 1
    assert "--xla_cpu_max_isa=SSE4_2" in os.environ["XLA_FLAGS"]
    assert os.environ["ATEN_CPU_CAPABILITY"] == "default"
    assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"]
def test_that_fails():
    assert 1 + 1 == 3
"""


@pytest.mark.script
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processors are assigned on Linux only")
def test_a_job_runs_its_tests_under_its_setting(tmp_path: pathlib.Path) -> None:
    (tmp_path / "test_probe.py").write_text(PROBE)
    processor = min(os.sched_getaffinity(0))
    job = portability.Job(Setting("SSE4_2", "default", 1), (str(tmp_path / "test_probe.py"),))
    (outcome,) = job.run([processor], tmp_path).values()
    assert (outcome.passed, len(outcome.failures)) == (1, 1)
    assert "test_that_fails" in outcome.failures[0]
    nothing = portability.Job(Setting("SSE4_2", "default", 1), (str(tmp_path / "test_missing.py"),))
    assert "exited with 4" in nothing.run([processor], tmp_path)["tests"].failures[0]
