"""The benchmark of what a sampler with a call a step cannot know: its weights, its projection, its table."""
import numpy as np
import pytest
import torch
from numpy.polynomial import polynomial

from benchmarks import derivative
from benchmarks.derivative import adams, sample
from ersde.weights import VARIABLES
from tests.problems import flow_exact, gaussian, karras, rms, separated


@pytest.mark.parametrize("variable", ["lambda", "log", "asinh"])
@pytest.mark.parametrize("nodes", [[2.0], [2.0, 3.5], [2.0, 3.5, 9.0], [2.0, 3.5, 9.0, 0.7]])
def test_the_weights_are_exact_for_polynomials(variable, nodes):
    """lambda_t int D / lambda^2 dlambda over a step, by quadrature."""
    rule = VARIABLES[variable]
    x, w = np.polynomial.legendre.leggauss(80)
    lam = 0.7 + 0.5 * (2.0 - 0.7) * (x + 1)
    for power in range(len(nodes)):
        value = lambda at: polynomial.polyval(rule.tau(np.asarray(at)), [0.0] * power + [1.0])
        exact = 0.7 * (0.5 * (2.0 - 0.7) * w * value(lam) / lam ** 2).sum()
        assert np.dot(adams(2.0, 0.7, nodes, rule), value(nodes)) == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_of_isotropic_data_the_changes_tell_all():
    """J is a number times 1, and E in the span of the changes: D + J E is D at the state that the step ends at."""
    model, sigmas = gaussian(0.5, 0.3, dim=6), karras(12)
    x = model.start(5, sigmas[0].item(), torch.Generator().manual_seed(0))
    exact = flow_exact(model, x, sigmas)
    plain, some, all_ = (rms(sample(model, x, sigmas, "log", known=known), exact) for known in (0, 1, 3))
    assert all_ < 0.9 * plain and some <= 1.001 * plain
    # The run is the implicit rule's.
    implicit, lam = [model(x, sigmas[:1].expand(5))], sigmas[:-1].tolist()
    for i in range(11):
        past = lam[i::-1][:3]
        *weights, last = adams(lam[i], lam[i + 1], [*past, lam[i + 1]], VARIABLES["log"])
        still = lam[i + 1] / lam[i] * x + sum(w * d for w, d in zip(weights, implicit))
        slope = 0.25 / (0.25 + lam[i + 1] ** 2)
        x = (still + last * (1.0 - slope) * 0.3) / (1.0 - last * slope)
        implicit = [model(x, sigmas[i + 1].expand(5)), *implicit][:3]
    x = model.start(5, sigmas[0].item(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample(model, x, sigmas, "log", known=3), implicit[0], rtol=1e-8, atol=1e-8)


def test_another_call_is_made_only_where_it_is_asked_for():
    model, sigmas = separated(), karras(8)
    x = model.start(3, sigmas[0].item(), torch.Generator().manual_seed(0))
    sample(model, x, sigmas, "log")
    assert model.calls == 8
    sample(model, x, sigmas, "log", again=True)
    assert model.calls == 8 + 8 + 7


def test_the_table(monkeypatch, capsys):
    monkeypatch.setattr(derivative, "digits", lambda process: separated(process))
    derivative.main(["--steps", "7", "--count", "20"])
    out = capsys.readouterr().out
    assert out.startswith("    python -m benchmarks.derivative --steps 7 --count 20\n")
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows[1:]] == [
        "ComfyUI's formulas", "this project's default", "predictor and corrector", "and J E along R_0",
        "and J E along R_0, R_1, R_2", "and D at the corrected state"]
    assert rows[1][1].strip() == "1.00 (1.00 to 1.00)"
