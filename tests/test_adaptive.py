"""The order that adapts: trust in the bend of a long step, and the last correction."""
import dataclasses

import numpy as np
import pytest
import torch
from problems import Mixture, digits, flow_exact, flow_schedule, gaussian, karras, rms

import ersde
from ersde import weights
from ersde.demo.network import guided, load_model
from ersde.noise_scale import get_noise_scale
from ersde.process import check_sigmas, get_process
from ersde.solver import _trust, run
from ersde.weights import Step, make_plan

ONE = torch.ones(())


def plan(sigmas, process="ve", scale="ode", eta=0.0, **kw):
    process = get_process(process)
    values = check_sigmas(torch.as_tensor(sigmas, dtype=torch.float64), process)
    return make_plan(values, process, get_noise_scale(scale), np.full(len(values) - 1, eta), **kw)


def sample(model, x, sigmas, **kw):
    return ersde.sample_er_sde(model, x, sigmas, disable=True, process=model.process, **{"eta": 0.0, **kw})


def trust(denoised, newest, before, ratio=1.0, common=1.0):
    step = Step(1.0, 0.0, (), 0.0, ratio=ratio, common=common)
    as_tensor = lambda v: torch.tensor([v], dtype=torch.float64)
    return _trust(as_tensor(denoised), [as_tensor(newest), as_tensor(before)], step, ONE.double())[0].item()


def test_trust_is_its_formula():
    for r, t, d, ratio in (([1.0, 0.0], [0.5, 0.5], [3.0, 4.0], 1.0), ([0.2, 0.1], [0.1, 0.1], [1.0, 0.0], 1.7)):
        r_, t_, d_ = np.array(r), ratio * np.array(t), np.array(d)
        m2, s2 = ((r_ - t_) ** 2).sum() / (r_ ** 2).sum(), (r_ ** 2).sum() / (d_ ** 2).sum()
        assert trust(d, r, t, ratio) == pytest.approx(np.clip(2 - m2, 0, 1) / (1 + s2), rel=1e-12)


def test_trust_where_the_prediction_was_right_and_where_it_overshot():
    far = [100.0, 0.0]
    assert trust(far, [1.0, 0.0], [1.0, 0.0]) == pytest.approx(1.0, abs=1e-3)
    assert trust(far, [1.0, 0.0], [0.2, 0.0]) == pytest.approx(1.0, abs=1e-3)      # too short: still better than nothing
    assert trust(far, [1.0, 0.0], [2.5, 0.0]) == 0.0                                # overshot by more than the change
    assert trust(far, [1.0, 0.0], [-1.0, 0.0]) == 0.0                               # went the other way
    assert trust([1.0, 0.0], [1.0, 0.0], [1.0, 0.0]) == pytest.approx(0.5)          # a change as large as D itself
    assert trust(far, [1.0, 0.0], [0.0, 1.0], common=0.0) == pytest.approx(1.0, abs=1e-3)       # all of it fresh noise


def test_trust_without_any_change_is_a_number():
    zero = [0.0, 0.0]
    for d in (zero, [1.0, 2.0]):
        assert np.isfinite(trust(d, zero, zero)) and np.isfinite(trust(d, zero, [1.0, 0.0]))
        assert np.isfinite(trust(d, zero, zero, ratio=0.0))
    assert trust(zero, [1.0, 0.0], [1.0, 0.0]) == 0.0


def test_every_picture_has_its_own_trust():
    """A picture in a batch is the picture alone, however wild its neighbour."""
    model = digits(guidance=7.5)
    x = model.start(2, 14.6, torch.Generator().manual_seed(0))
    x[1] *= 3
    for steps in (5, 8, 15):
        both = sample(model, x, karras(steps))
        for i in range(2):
            torch.testing.assert_close(sample(model, x[i:i + 1], karras(steps)), both[i:i + 1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", ["ve", "flow"])
def test_only_long_steps_are_measured(process):
    lam = np.geomspace(20, 0.05, 61)
    made = plan(lam if process == "ve" else lam / (1 + lam), process)
    assert not any(step.bend for step in made.steps)
    lam = np.geomspace(20, 0.05, 12)
    made = plan(lam if process == "ve" else lam / (1 + lam), process)
    assert [bool(step.bend) for step in made.steps] == [False] + [True] * 10
    assert [step.ratio != 0 for step in made.steps] == [False] * 2 + [True] * 9
    assert not any(step.bend for step in plan(np.geomspace(20, 0.05, 12), adapt=False).steps)


def test_full_trust_is_the_plan_that_does_not_adapt():
    """The two ways of writing a step, from the state without the bend and from the one with it, are one sampler."""
    model = gaussian(0.5, 0.3)
    sigmas = karras(14)
    x = model.start(4, 14.6, torch.Generator().manual_seed(0))
    values = sigmas.numpy()
    found = []
    for adapt in (False, True):
        made = plan(values, adapt=adapt)
        found.append(made)
    trusted = weights.Plan(found[1].sigmas, tuple(
        dataclasses.replace(s, ratio=0.0, common=0.0) if s.bend else s for s in found[1].steps),
        found[1].orders, found[1].history)
    out = [run(p, model, x, sigmas, None, {}, None, True) for p in (found[0], trusted)]
    torch.testing.assert_close(*out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", [karras, lambda n: torch.cat([torch.logspace(1.16, -1.5, n), torch.zeros(1)]).double()])
@pytest.mark.parametrize("steps", [5, 6, 8, 10, 15])
def test_a_guided_network_is_never_worse_than_comfyui(schedule, steps):
    """Guidance 7.5, where bend and correction together overshoot: at full trust these runs are up to 3 times worse."""
    network = guided(load_model("ve"), torch.arange(3), 7.5)
    model = lambda x, sigma, **_: network(x, sigma)
    model.process = "ve"
    x = 14.6 * torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    sigmas = schedule(steps).float()
    fine = torch.cat([torch.logspace(np.log10(sigmas[0]), np.log10(sigmas[-2]), 160), torch.zeros(1)])
    exact = sample(model, x, fine, order=2, corrector=False)
    ours = rms(sample(model, x, sigmas), exact)
    assert ours <= 1.05 * rms(sample(model, x, sigmas, method="comfyui", corrector=False), exact)


def test_trust_is_what_keeps_high_guidance_calm():
    """The same run at full trust ends far away."""
    model = digits(guidance=7.5)
    model.means, model.std, model.weights, model.label = (
        v[::6] for v in (model.means, model.std, model.weights, model.label))
    model.weights = model.weights / model.weights.sum()
    sigmas = karras(6)
    x = model.start(48, 14.6, torch.Generator().manual_seed(0))
    exact = flow_exact(model, x, sigmas, 300)
    bold = plan(sigmas.numpy(), adapt=False)
    out = run(bold, model, x, sigmas, None, {}, None, True)
    assert rms(sample(model, x, sigmas), exact) < 0.6 * rms(out, exact)


@pytest.mark.parametrize("process, std", [("ve", 0.05), ("flow", 0.05), ("flow", 0.1), ("flow", 0.2)])
@pytest.mark.parametrize("steps", [10, 20, 40])
def test_the_last_correction_takes_an_error_away(process, std, steps, monkeypatch):
    """Where the last step's error is what is left: narrow data, and flow schedules, whose last steps are long."""
    model = gaussian(std, 0.3, process=process)
    sigmas = karras(steps) if process == "ve" else flow_schedule(steps)
    x = model.start(32, sigmas[0].item(), torch.Generator().manual_seed(0))
    exact = flow_exact(model, x, sigmas)
    with_it = rms(sample(model, x, sigmas), exact)
    monkeypatch.setattr(weights, "_settle", lambda *_: None)
    assert with_it < (0.8 if process == "ve" else 0.5) * rms(sample(model, x, sigmas), exact)


@pytest.mark.parametrize("steps", [4, 10, 60])
def test_under_a_mask_the_result_is_the_latent(steps):
    """Where the model returns a constant, as a host's inpainting does, the result is that constant bit by bit."""
    model = Mixture(torch.randn(20, 64, generator=torch.Generator().manual_seed(0)), torch.full((20,), 0.2), process="ve")
    kept = torch.arange(64) < 20

    def masked(x, sigma, **_):
        out = model(x, sigma)
        out[:, kept] = 0.3
        return out

    masked.process = "ve"
    x = 14.6 * torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for eta in (0.0, 1.0):
        out = sample(masked, x, karras(steps).float(), eta=eta)
        assert (out[:, kept] == 0.3).all() and not (out[:, ~kept] == 0.3).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2,), (2, 8), (2, 4, 8, 8), (1, 4, 3, 8, 8)])
def test_long_steps_in_every_dtype_and_shape(dtype, shape):
    model = lambda x, sigma, **_: x * (0.25 / (0.25 + sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2))
    model.process = "ve"
    x = (14.6 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    for steps in (4, 8, 30):
        out = sample(model, x, karras(steps).to(dtype))
        fine = sample(model, x.double(), karras(steps))
        assert out.dtype == dtype and out.shape == x.shape
        torch.testing.assert_close(out.double(), fine, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("steps", [8, 40])
def test_memory(order, steps):
    """Alive at any model call or drawing of noise: x, the noise, the history and one more, with no collection in between."""
    import gc

    shape = (1, 3, 17, 19)
    most = {"model": 0, "noise": 0}

    def alive(where):
        found = {t.untyped_storage().data_ptr() for t in gc.get_objects()
                 if isinstance(t, torch.Tensor) and t.shape == shape}
        most[where] = max(most[where], len(found))

    def model(x, sigma, **_):
        alive("model")
        return x * (0.25 / (0.25 + sigma.reshape(-1, 1, 1, 1) ** 2)) + 0.1 * x.tanh()

    def noise(*_):
        alive("noise")
        return torch.randn(shape)

    model.process = "ve"
    x = 14.6 * torch.randn(shape)
    gc.freeze()                 # the caller's x and all that is not the sampler's
    try:
        ersde.sample_er_sde(model, x, karras(steps).float(), order=order, noise_sampler=noise, process="ve", disable=True)
    finally:
        gc.unfreeze()
    history = order + 2         # evaluations: those of the predictor, and the one that corrects them
    assert most["model"] <= 1 + history + 1
    assert most["noise"] + 1 <= 1 + 1 + history + 1
