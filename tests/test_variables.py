"""The benchmark of interpolation variables: its cells, its schedules, its file, on a mixture."""
import dataclasses
import json
import math

import pytest
import torch

from benchmarks import variables
from benchmarks.variables import COMFYUI, HIGH, SCHEDULES, Cell, Problem, Row, Settings, cells, grid, measure_all, schedule

SMALL = Settings(mixture_count=4, exact_steps=60)
CELL = Cell("separated", "ve", 1.0, "karras", 6, True)


def test_a_small_run_makes_every_row_and_resumes(tmp_path):
    path = tmp_path / "variables.jsonl"
    rows = grid(("lambda", "rational"), (1, 3))
    plan = [CELL, dataclasses.replace(CELL, process="flow", schedule="shift 3")]
    done = measure_all(plan, SMALL, path, rows)
    assert len(rows) == 17 and len(done) == 2
    for cell in done:
        assert list(cell["ratio"]) == [row.name for row in rows]
        assert cell["ratio"][COMFYUI.name] == 1.0
        assert all(0 < ratio < variables.DIVERGED for ratio in cell["ratio"].values())
        # Order 1 without corrector has nothing to interpolate.
        assert cell["ratio"]["lambda / 1 / off / off"] == cell["ratio"]["rational / 1 / off / on"]
    with path.open("a") as file:
        file.write('{"key": "cut o')
    assert measure_all(plan, SMALL, path, rows) == done
    text = variables.report(done, variables.stochastic(), SMALL, 2, "command")
    assert "| rational / 3 / on / on |" in text and "## Stochastic members" in text
    assert all(cell["median"][COMFYUI.name] == 1.0 and cell["median"].keys() == cell["ratio"].keys() for cell in done)
    json.dumps(variables.summaries(done), allow_nan=False)


def test_errors_are_those_of_the_public_sampler():
    """A row's error, from a run of the sampler with the same settings."""
    import ersde

    problem, sigmas = Problem("separated", "ve", 1.0, SMALL), schedule("exponential", "ve", 5)
    error = variables.measure(problem, sigmas, [COMFYUI, Row("lambda", 3, True, True)])
    exact = problem.exact[sigmas[-2].item()]
    for name, kw in ((COMFYUI.name, {"method": "comfyui"}), ("lambda / 3 / on / on", {})):
        out = ersde.sample_er_sde(problem.model, problem.start, sigmas, eta=0.0, disable=True, **kw)
        assert error[name] == pytest.approx((out - exact).square().mean(1).sqrt().mean().item(), rel=1e-9)


@pytest.mark.parametrize("process", SCHEDULES)
def test_schedules(process):
    for name in SCHEDULES[process]:
        if name == "beta":
            pytest.importorskip("scipy")
        for steps in (4, 10, 50):
            sigmas = schedule(name, process, steps)
            assert sigmas[0].item() == pytest.approx(HIGH[process]) and sigmas[-1] == 0
            assert (sigmas.diff() < 0).all() and len(sigmas) <= steps + 1
            assert name == "beta" or len(sigmas) == steps + 1


def test_cells_are_measured_once_and_lambda_goes_to_every_schedule():
    plan = cells()
    assert len({cell.name.rsplit(" / ", 1)[0] for cell in plan}) == len(plan)
    for process, kinds in SCHEDULES.items():
        for problem in ("network", "digits"):
            assert {cell.schedule for cell in plan if (cell.problem, cell.process) == (problem, process)} == set(kinds)
    assert {cell.steps for cell in cells([7], [4.0])} == {7}
    assert {cell.guidance for cell in cells([7], [4.0])} == {4.0}


def test_variance_of_comfyui_and_of_many_steps():
    """The recursion's variance is exact in the limit, and a wrong one is told from a right one at few steps."""
    row = Row("lambda", 3, True, True)
    assert abs(variables.variance(row, "ve", 200, "sde_5", 1.0)) < 2e-3
    assert variables.variance(COMFYUI, "ve", 6, "sde_5", 1.0) < -0.2 < variables.variance(row, "ve", 6, "sde_5", 1.0) < 0.05


def test_a_run_that_becomes_infinite_has_a_finite_ratio():
    found = variables.ratios({COMFYUI.name: 0.5, "other": math.inf})
    assert found == {COMFYUI.name: 1.0, "other": variables.DIVERGED}


def test_equal_states_are_evaluated_once():
    calls = []
    memo = variables.Memo(lambda x, sigma: calls.append(1) or x * 0.5)
    x, one = torch.randn(2, 3), torch.ones(2)
    assert torch.equal(memo(x, one), memo(x.clone(), one))
    memo(x, 2 * one)
    memo(x + 1, one)
    assert len(calls) == 3


def test_the_default_alone_has_intervals(tmp_path, monkeypatch):
    plan = variables.default_cells()
    assert {cell.schedule for cell in plan} == {name for kinds in variables.SCHEDULES.values() for name in kinds}
    assert {cell.guidance for cell in plan} == {1.0, 4.0, 7.5} and min(cell.steps for cell in plan) >= 5
    monkeypatch.setattr(variables, "default_cells", lambda: plan[:1])
    monkeypatch.setattr(variables.Settings.__init__, "__defaults__",
                        (4, variables.MIXTURE_COUNT, 6, 12, *variables.Settings.__init__.__defaults__[4:]))
    variables.main(["--default", "--count", "2", "--out", str(tmp_path)])
    text = (tmp_path / "variables_default.md").read_text()
    assert "1 of 1 planned cells; N = 2 pictures" in text and "with the whole interval in" in text
    cell = json.loads((tmp_path / "variables_default.jsonl").read_text())
    low, high = cell["interval"]
    assert low <= cell["ratio"][variables.DEFAULT.name] <= high and f"({low:.2f} to {high:.2f})" in text
    with pytest.raises(SystemExit):
        variables.main(["--default", "--steps", "5"])
    with pytest.raises(SystemExit):
        variables.main(["--default", "--count", "0", "--out", str(tmp_path)])


def test_the_interval_is_of_the_ratio_of_the_means():
    errors = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    each = {COMFYUI.name: errors, variables.DEFAULT.name: errors / 2}
    assert variables.interval(each) == pytest.approx([0.5, 0.5])
    each[variables.DEFAULT.name] = torch.tensor([0.5, 1.0, 1.5, 8.0], dtype=torch.float64)
    low, high = variables.interval(each)
    assert 0.5 <= low < 1.1 < high <= 2.0
    each[variables.DEFAULT.name] = torch.full_like(errors, torch.inf)
    assert variables.interval(each) == pytest.approx([variables.DIVERGED] * 2)
    assert variables.interval({COMFYUI.name: errors}) is None
