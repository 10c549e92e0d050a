"""The benchmark of the slope of D along a long step's correction."""
import numpy as np
import pytest
import torch

import ersde
from benchmarks import slopes
from benchmarks.slopes import Seen, Watched, row, watching
from ersde.process import get_process
from tests.problems import flow_schedule, gaussian, karras


def run(model, x, sigmas):
    return ersde.sample_preset(model, x, sigmas, "sde_5", {"seed": 1}, disable=True, process=model.process)


@pytest.mark.parametrize("process, schedule", [("ve", karras), ("flow", flow_schedule)])
def test_of_gaussian_data_both_slopes_are_the_derivative(process, schedule):
    """v / (v + lambda^2), which two evaluations tell exactly; and the run is as it is without being watched."""
    std, sigmas = 0.5, schedule(8).double()
    model = gaussian(std, 0.3, dim=16, process=process)
    x = model.start(3, sigmas[0].item(), torch.Generator().manual_seed(0))
    plain, seen, watched = run(model, x, sigmas), [], Watched(model)
    with watching(watched, seen):
        assert torch.equal(run(watched, x, sigmas), plain)
    assert torch.equal(run(model, x, sigmas), plain)
    lam = get_process(process).lam(sigmas.numpy())
    # From lambda = infinity, as flow's first step, there is no variance to measure.
    pairs = [(a, b) for a, b in zip(lam, lam[1:]) if b > 0 and np.isfinite(a)]
    assert len(seen) == len(pairs) and [one.last for one in seen] == [False] * (len(seen) - 1) + [True]
    for (s, t), one in zip(pairs, seen):
        exact = std ** 2 / (std ** 2 + t ** 2)
        assert one.variance == pytest.approx(s ** 2 / std ** 2, rel=1e-5)
        assert one.found / one.size == pytest.approx(exact, rel=1e-6)
        assert one.last or one.assumed / one.size == pytest.approx(exact, rel=1e-5)


def test_a_guided_model_tells_what_its_run_asked_for():
    """The second call leaves what guidance adds as it was."""
    class Telling:
        process, added = "ve", None

        def __call__(self, x, sigma, **_):
            self.added = 0.1 * x
            return 0.5 * x

        def excess(self):
            return self.added

    model, x = Watched(Telling()), torch.ones(2, 3)
    model(x, torch.ones(2))
    assert torch.equal(model.again(3.0 * x), 1.5 * x) and torch.equal(model.excess(), 0.1 * x)


def test_a_row_weighs_by_the_correction():
    """Of the steps within the limits, of the last evaluations or of the others; nothing of too few pictures."""
    ones = np.ones(30)
    seen = [Seen(False, 2.0 * ones, 3.0 * ones, 0.6 * ones, 0.3 * ones), Seen(False, 3.0 * ones, ones, 0.2 * ones, 0.5 * ones),
            Seen(False, 4.0 * ones, ones, 9.0 * ones, 9.0 * ones), Seen(True, 2.0 * ones, ones, 9.0 * ones, 9.0 * ones),
            Seen(False, 2.0 * ones[:10], 0.0 * ones[:10], 0.0 * ones[:10], 0.0 * ones[:10])]
    assert row(seen, False, 2.0, 4.0) == "0.20 | 0.20 (0.20 to 0.20) | 70"
    assert row(seen, True, 2.0, 4.0) == "9.00 | 9.00 (9.00 to 9.00) | 30"
    assert row(seen, False, -8.0, 2.0) is None and row(seen[-1:], False, 2.0, 4.0) is None and row([], True, 0.0, 1.0) is None


def test_the_command(monkeypatch, capsys):
    """A table of each group."""
    def few(count, mixtures, guidance, told):
        model = gaussian(0.5, 0.3, dim=4)
        yield guidance == 1.0, model, model.start(count, 14.6, torch.Generator().manual_seed(0)), "karras"

    monkeypatch.setattr(slopes, "runs", few)
    slopes.main(["--calls", "6", "--count", "20"])
    text = capsys.readouterr().out
    assert "python -m benchmarks.slopes --calls 6 --count 20" in text
    for part in ("## Network, no guidance\n", "## Mixtures, guidance 4, told\n", "## Mixtures, guidance 4 and 7.5, not told\n"):
        assert part in text
    assert "| 1 to 2 | 0.89 | 0.89 (0.89 to 0.89) | 40 |" in text
    with pytest.raises(SystemExit):
        slopes.main(["--count", "3"])
    assert "--count, --mixtures: at least 20" in capsys.readouterr().err
