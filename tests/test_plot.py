"""ersde.plot: figures are drawn, say what they should, and leave no global state."""
import sys

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

import ersde  # noqa: E402
from ersde import plot  # noqa: E402
from ersde.demo.mixture import flow_schedule, karras  # noqa: E402

SCHEDULES = {"ve": karras(12), "flow": flow_schedule(12)}


def ink(figure) -> float:
    """The part of pixels that are not white."""
    image = plot.to_image(figure)
    assert image.mode == "RGB"
    assert image.size == tuple(int(round(side * figure.dpi)) for side in figure.get_size_inches())
    return float((np.asarray(image) < 250).any(-1).mean())


def test_noise_scales_show_log_g():
    figure = plot.plot_noise_scales()
    lines = figure.axes[0].get_lines()
    assert len(lines) == len(ersde.NOISE_SCALES)
    for line, scale in zip(lines, ersde.NOISE_SCALES.values()):
        lam = torch.tensor(line.get_xdata())
        expected = (scale.log_g(lam) - scale.log_g(torch.ones(1))).exp()
        assert np.allclose(line.get_ydata(), expected)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text.split(":")[0] for text in legend] == list(ersde.NOISE_SCALES)
    assert 0.01 < ink(figure) < 0.5


def test_noise_scales_take_a_callable_and_eta():
    figure = plot.plot_noise_scales([lambda lam: lam ** 3, "sde"], eta=0.5, lam=(0.1, 10))
    cubic, sde = figure.axes[0].get_lines()
    assert np.allclose(cubic.get_ydata(), cubic.get_xdata())            # (lambda^2)^0.5
    assert np.allclose(sde.get_ydata(), sde.get_xdata() ** 0.5)


@pytest.mark.parametrize("lam", [(0.0, 1.0), (2.0, 1.0), (1.0, float("inf"))])
def test_noise_scales_reject_a_bad_range(lam):
    with pytest.raises(ValueError, match="lam"):
        plot.plot_noise_scales(lam=lam)


def test_an_unknown_name_is_named():
    with pytest.raises(ValueError, match="sde_9"):
        plot.plot_noise_scales(["sde_9"])


@pytest.mark.parametrize("process", SCHEDULES)
def test_injected_noise_is_what_the_sampler_adds(process):
    sigmas = SCHEDULES[process]
    figure = plot.plot_injected_noise(sigmas, ["sde", "ode"], process, s_noise=0.8)
    sde, ode = figure.axes[0].get_lines()
    # With a denoiser of 0 and no state, x after a step is the noise and what was left of it: take steps one by one.
    added = []
    for s, t in zip(sigmas[:-1], sigmas[1:]):
        x = ersde.sample_er_sde(lambda x, sigma: 0 * x, torch.zeros(1, 1, dtype=torch.float64), torch.stack([s, t]),
                                disable=True, noise_sampler=lambda a, b: torch.ones(1, 1, dtype=torch.float64),
                                noise_scale="sde", s_noise=0.8, process=process)
        added.append(x.item())
    assert np.allclose(np.nan_to_num(sde.get_ydata()), added)
    assert np.isnan(ode.get_ydata()).all()
    share = figure.axes[1].get_lines()[0].get_ydata()
    assert np.nanmin(share) >= 0 and np.nanmax(share) <= 1
    assert 0.01 < ink(figure) < 0.5


def test_injected_noise_needs_some():
    with pytest.raises(ValueError, match="s_noise"):
        plot.plot_injected_noise(SCHEDULES["ve"], s_noise=0.0)


@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("options", [{}, {"eta": 0.0}, {"method": "comfyui", "corrector": False}, {"order": 1}])
def test_weights_are_drawn(process, options):
    plan = plot.make_plot_plan(SCHEDULES[process], process, **options)
    figure = plot.plot_weights(plan, "a title")
    noisy = any(step.noise for step in plan.steps)
    assert noisy == (options.get("eta") != 0.0)
    assert len(figure.axes) == (3 if noisy else 2)
    bars = [bar.get_height() for bar in figure.axes[-1].patches]
    assert bars == list(plan.orders)
    assert 0.01 < ink(figure) < 0.6


@pytest.mark.parametrize("steps", [1, 2])
def test_short_runs_are_drawn(steps):
    ink(plot.plot_weights(plot.make_plot_plan(karras(steps))))
    ink(plot.plot_injected_noise(karras(steps)))


def test_a_schedule_without_steps_is_rejected():
    with pytest.raises(ValueError, match="at least 2"):
        plot.make_plot_plan(torch.ones(1))


def test_pyplot_is_never_used():
    import subprocess
    code = ("import sys\nfrom ersde import plot\nassert 'matplotlib' not in sys.modules\n"
            "plot.to_image(plot.plot_noise_scales())\nassert 'matplotlib.pyplot' not in sys.modules\n")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_rc_settings_stay():
    before = dict(matplotlib.rcParams)
    plot.to_image(plot.plot_noise_scales())
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_message_is_clear(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="ersde.plot needs matplotlib"):
        plot.plot_noise_scales()
