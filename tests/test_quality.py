"""The quality benchmark: its metrics on known answers, its cells, its file."""
import dataclasses
import json
import math

import pytest
import torch

import ersde
from benchmarks import quality
from benchmarks.quality import Problem, Settings, frechet, interval, measure, methods, sliced_wasserstein

SMALL = Settings(count=48, digits_stride=60, reference=2, fine_steps=12, exact_steps=60, resamples=40,
                 heavy_resamples=10, projections=8)


def named(name):
    found = [method for method in methods() if method.name == name]
    if not found:
        pytest.skip(f"{name}: its library is not installed")
    return found[0]


def reference_of(samples, directions):
    """A law given by samples, as many as will be compared with it."""
    problem = Problem("separated", None, "ve", "karras", dataclasses.replace(SMALL, count=len(samples)))
    problem.directions = directions
    return problem._reference(samples, [samples])


@pytest.fixture(scope="module")
def problem():
    return Problem("separated", None, "ve", "karras", SMALL)


def test_frechet_and_wasserstein_of_the_same_samples_are_nothing(problem):
    samples = problem.source.data(200, torch.Generator().manual_seed(5))
    ref = reference_of(samples, problem.directions)
    assert abs(frechet(samples, ref).item()) < 1e-10
    assert sliced_wasserstein(samples, ref, problem.directions).item() < 1e-6


def test_frechet_and_wasserstein_of_a_shift_and_a_scale_are_known(problem):
    g = torch.Generator().manual_seed(5)
    samples = torch.randn(300, 8, generator=g, dtype=torch.float64) * torch.linspace(0.5, 2, 8)
    ref = reference_of(samples, problem.directions)
    shift = torch.linspace(-1, 1, 8, dtype=torch.float64)
    assert frechet(samples + shift, ref).item() == pytest.approx((shift ** 2).sum().item(), rel=1e-9)
    # Covariance 4 C against C: tr(4 C + C - 2 * 2 C) = tr C, and the mean doubles.
    expected = samples.T.cov().trace() + (samples.mean(0) ** 2).sum()
    assert frechet(2 * samples, ref).item() == pytest.approx(expected.item(), rel=1e-9)
    along = (problem.directions @ shift) ** 2
    assert sliced_wasserstein(samples + shift, ref, problem.directions).item() == pytest.approx(
        along.mean().sqrt().item(), rel=1e-9)


def test_resampled_metrics_are_those_of_the_resampled_samples(problem):
    samples = problem.source.data(48, torch.Generator().manual_seed(6))
    ref = problem.law(ersde.PRESETS["ode"])
    rows = torch.randint(48, (3, 48), generator=torch.Generator().manual_seed(7))
    for k in range(3):
        assert frechet(samples, ref, rows)[k].item() == pytest.approx(frechet(samples[rows[k]], ref).item(), rel=1e-9)
        assert sliced_wasserstein(samples, ref, problem.directions, rows)[k].item() == pytest.approx(
            sliced_wasserstein(samples[rows[k]], ref, problem.directions).item(), rel=1e-9)


def test_the_interval_of_a_mean_contains_it_and_has_the_known_width():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, generator=g, dtype=torch.float64)
    low, high = interval(x.mean().item(), x[torch.randint(400, (2000, 400), generator=g)].mean(1))
    assert low < x.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.15)
    assert interval(1.0, torch.tensor([5.0, 6.0]))[0] <= 1.0 <= interval(1.0, torch.tensor([5.0, 6.0]))[1]


@pytest.mark.parametrize("process, schedule", [("ve", "karras"), ("ve", "exponential"), ("flow", "shift 3")])
def test_every_sampler_makes_the_calls_of_its_cell_and_ends_near_the_data(process, schedule):
    problem = Problem("separated", None, process, schedule, SMALL)
    for method in methods():
        if not method.flow and process == "flow":
            continue
        row = measure(problem, method, 9)
        assert row["calls_made"] == 9, method.name
        assert not row.get("diverged"), method.name
        assert ("rms" in row) == (not method.noisy)
        for key in ("frechet", "wasserstein", "spread", "excess") + (() if method.noisy else ("rms", "rms_median")):
            low, high = row[key]["interval"]
            assert low <= row[key]["value"] <= high
        assert row["frechet"]["value"] < 0.5 * problem.model.dim, method.name


def test_two_calls_a_step_have_no_cell_at_an_even_count():
    assert named("k-diffusion heun").steps(10) is None
    assert named("k-diffusion heun").steps(9) == 5
    assert named("ours ode").steps(10) == 10


def test_more_calls_come_closer_to_the_exact_flow(problem):
    for name in ("ours ode", "comfyui ode", "k-diffusion dpmpp_2m", "k-diffusion heun", "azula zEAB order 2",
                 "azula xEAB order 3", "azula vAB order 3"):
        few, many = (measure(problem, named(name), calls)["rms"]["value"] for calls in (9, 41))
        assert many < 0.4 * few, name


def test_guided_cells_have_the_law_of_their_member():
    problem = Problem("digits", 4.0, "flow", "shift 3", SMALL)
    measure(problem, named("ours sde_5"), 5)
    measure(problem, named("comfyui sde_5"), 5)
    assert len(problem._laws) == 1
    measure(problem, named("ours ode"), 5)
    assert len(problem._laws) == 2


def test_noise_is_seeded_and_of_one_path():
    x = torch.zeros(20000, 2)
    one, same = quality.PathNoise(x, 3), quality.PathNoise(x, 3)
    half = one(4.0, 2.0)
    assert torch.equal(half, same(4.0, 2.0))
    whole = one(4.0, 1.0)
    after = one(1.0, 0.5)
    assert whole.std() == pytest.approx(1, abs=0.02)
    assert (half * whole).mean() == pytest.approx(math.sqrt(2 / 3), abs=0.02)
    assert (after * whole).mean() == pytest.approx(0, abs=0.02)


def test_a_run_takes_up_where_it_stopped(tmp_path):
    path = tmp_path / "cells.jsonl"
    plan = lambda settings=SMALL: quality.plan(settings, (5,), {"ve": ("karras",)}, "(ours|comfyui) (ode|sde_5)$",
                                               (("separated", None),))
    rows, fresh = quality.run(plan(), path, quiet=True)
    assert fresh == len(rows) == 4
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    again, fresh = quality.run(plan(), path, quiet=True)
    assert fresh == 0 and again == rows
    path.write_text(path.read_text()[:-40])                     # killed while it wrote the last line
    again, fresh = quality.run(plan(), path, quiet=True)
    assert fresh == 1 and again == rows
    assert quality.run(plan(), path, quiet=True)[1] == 0
    assert quality.run(plan(dataclasses.replace(SMALL, seed=1)), path, quiet=True)[1] == 4


def test_the_command_writes_table_and_plots(tmp_path, capsys):
    quality.main(["--quick", "--out", str(tmp_path), "--filter", "separated / ve .*(ode|sde_5|dpmpp_2m)$", "--calls",
                  "5", "9", "--count", "40"])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl", ".md", ".png"]
    text = (tmp_path / "quality_quick.md").read_text()
    assert "N = 40" in text and "| default/comfyui |" in text and "euler_ancestral on flow" in text
    assert "measured now" in capsys.readouterr().out


def test_ratios_and_shares_of_known_rows():
    def row(method, family, points):
        return {"problem": "p", "calls": 5, "noisy": False, "method": method, "family": family,
                "rms": {"value": sum(points) / len(points), "interval": [0, 9]}, "points": points}

    cell, = quality.compare([row("ours ode", "ours", [1.0, 2.0]), row("ours few_steps", "ours", [0.5, 1.0]),
                             row("comfyui ode", "comfyui", [2.0, 4.0]), row("k", "k-diffusion", [0.25, 0.5])])
    assert cell["best"] == "ours few_steps" and cell["peer"] == "k"
    assert cell["default/comfyui"]["value"] == 0.5 and cell["default/peer"]["value"] == 4
    assert cell["best/peer"]["interval"] == pytest.approx([2, 2])


def test_the_digest_of_code_is_the_same_from_every_python():
    """Comments, docstrings, layout and a newer Python's empty fields are no change; a constant is."""
    source = 'def f(a, b=None):\n    "What."\n    return [a, f"{b!r}", 0, False]  # so\n'
    loose = source.replace("(a, b=None)", "(\n    a, b=None\n)").replace("What", "Which").replace("  # so", "")
    assert quality._code(source) == quality._code(loose) == (
        "Module(body=[FunctionDef(name='f', args=arguments(args=[arg(arg='a'), arg(arg='b')], defaults=[Constant()]), "
        "body=[Return(value=List(elts=[Name(id='a', ctx=Load()), JoinedStr(values=[FormattedValue(value=Name(id='b', "
        "ctx=Load()), conversion=114)]), Constant(value=0), Constant(value=False)], ctx=Load()))])])")
    assert quality._code(source.replace("0", "False")) != quality._code(source)
