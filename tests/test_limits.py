"""Numerical limits: half precision, very many steps, very large and small sigma, the ends of a flow model, the variance."""
import copy
import math

import numpy as np
import pytest
import torch
from problems import flow_schedule, gaussian, karras, rms
from test_solver import moments

import ersde
from ersde import NOISE_SCALES, PRESETS, measure
from ersde.process import get_process
from ersde.weights import METHODS

PROCESSES = ("ve", "flow")


class Wide:
    """A model that computes in float64 and answers in the dtype that it is asked in: what is left is the sampler's error."""

    def __init__(self, model):
        self.model, self.process, self.start = model, model.process, model.start

    def __call__(self, x, sigma, **_):
        return self.model(x.double(), sigma.double()).to(x.dtype)


def error(model, x, sigmas, preset, dtype):
    """RMS error of a run in `dtype` to the same run in float64, over what it is to, in units of dtype's eps."""
    run = lambda x: ersde.sample_preset(model, x, sigmas, preset, {"seed": 1}, disable=True, process=model.process).double()
    want = run(x.to(dtype).double())
    return rms(run(x.to(dtype)), want) / rms(want, torch.zeros(())) / torch.finfo(dtype).eps


@pytest.mark.slow
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("preset", ["sde_5", "ode", "sde_3", "comfyui"])
@pytest.mark.parametrize("dtype, most", [(torch.float16, 2.0), (torch.bfloat16, 2.0), (torch.float32, 100.0)])
def test_precision_at_2_and_at_1000_steps(process, preset, dtype, most):
    """A half precision run is right to the rounding of its result, however many steps; float32 to 1e-5."""
    model = Wide(gaussian(0.5, 0.3, dim=256, process=process))
    for steps in (2, 1000):
        sigmas = (karras(steps) if process == "ve" else flow_schedule(steps)).double()
        x = model.start(2, sigmas[0].item(), torch.Generator().manual_seed(0))
        assert error(model, x, sigmas, preset, dtype) < most, steps


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_the_model_sees_is_rounded_once(process, dtype):
    """Long steps too, which go on from x - alpha D of what the model saw: with D held, each state is the wide one, rounded.

    Of no simple sigmas, at which many numbers would lie halfway between two others.
    """
    sigmas, seen = (karras(10) if process == "ve" else flow_schedule(10) ** 1.07).float(), {}
    x = (sigmas[0] * torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))).to(dtype)

    def model(x, sigma):
        seen.setdefault(x.dtype, []).append(x.to(dtype))
        return torch.full_like(x, 0.25)

    for one in (x, x.float()):
        ersde.sample_er_sde(model, one, sigmas, disable=True, process=process, eta=0.0)
    for narrow, wide in zip(*seen.values()):
        assert (narrow != wide).double().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_long_steps_after_short_ones_compute_in_the_wide_dtype(dtype, batch, monkeypatch):
    """The changes of short steps are the model's, in half precision: what a long step makes of them is not."""
    model, made, kind = Wide(gaussian(0.5, 0.3, dim=64)), [], measure.kind
    sigmas = torch.cat([torch.logspace(1.0, 0.9, 6), torch.logspace(0.7, -1.4, 6), torch.zeros(1)])
    x = model.start(batch, 10.0, torch.Generator().manual_seed(0)).to(dtype)

    def watched(numbers):
        spied = copy.copy(numbers)

        def add(value, change, weight, by=1.0, **out):
            if out:                     # the correction, in the memory that is there for it
                made.append(change.dtype)
            return numbers.add(value, change, weight, by, **out)

        spied.add = add
        return spied

    for kinds in (kind, lambda x: measure.TENSORS):
        monkeypatch.setattr(measure, "kind", lambda x, kinds=kinds: watched(kinds(x)))
        ersde.sample_er_sde(model, x, sigmas, disable=True, process="ve", eta=0.0)
    assert len(made) > 4 and set(made) == {torch.float32}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 2.0), (torch.float32, 100.0), (torch.float64, None)])
def test_sigma_from_1e5_to_1e_4(preset, dtype, most):
    """Nine decades, in 5 steps and in 60: as in float64, where the picture has the data's mean and spread."""
    model = Wide(gaussian(0.5, 0.3, dim=256))
    for steps in (5, 60):
        sigmas = torch.tensor([*np.geomspace(1e5, 1e-4, steps), 0.0])
        x = model.start(4, 1e5, torch.Generator().manual_seed(0))
        if dtype == torch.float64:
            out = ersde.sample_preset(model, x, sigmas, preset, {"seed": 1}, disable=True, process="ve")
            assert torch.isfinite(out).all()
            if steps == 60:         # 1024 numbers: within 5 standard errors, and what 60 steps over nine decades leave
                assert abs(out.mean() - 0.3) < 5 * 0.5 / 1024 ** 0.5 and abs(out.std() - 0.5) < 0.1
        else:
            assert error(model, x, sigmas, preset, dtype) < most, steps


def test_float16_says_so_where_it_is_too_narrow():
    """Its largest number is 65504: sigma above it is refused at once, a state above it is named afterwards."""
    model = Wide(gaussian(0.5))
    x = torch.full((1, 4), 6e4, dtype=torch.float16)
    with pytest.raises(ValueError, match="float16 holds numbers up to 65504"):
        ersde.sample_er_sde(model, x, torch.tensor([1e5, 1.0, 0.0]), disable=True)
    with pytest.raises(FloatingPointError, match="step 1 of 3.*or torch.float16 too narrow for the state"):
        ersde.sample_er_sde(model, x, torch.tensor([6e4, 5e4, 1.0, 0.0]), disable=True, noise_scale="sde_3",
                            noise_sampler=lambda *_: torch.full_like(x, 3.0))


@pytest.mark.parametrize("preset", PRESETS)
def test_flow_at_sigma_1_and_just_below(preset):
    """From 1, from 1 - 1e-7 and from the float32 below 1: the same picture, to the discretisation of the first step."""
    model = Wide(gaussian(0.5, 0.3, dim=64, process="flow"))
    x = model.start(8, 1.0, torch.Generator().manual_seed(0))
    noises = torch.randn(20, *x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for dtype, least in ((torch.float32, 2e-4), (torch.float64, 2e-4)):
        outs = []
        for first in (1.0, 1.0 - 1e-7, 1.0 - 2.0 ** -24, 1.0 - 1e-12):
            sigmas = flow_schedule(20).double().clone()
            sigmas[0] = first
            drawn = iter(noises)
            outs.append(ersde.sample_preset(model, x.to(dtype), sigmas, preset, {"seed": 1}, disable=True, process="flow",
                                            noise_sampler=lambda *_: next(drawn).to(dtype)))
            assert torch.isfinite(outs[-1]).all()
        assert all(rms(out, outs[0]) < least for out in outs[1:])


@pytest.mark.slow
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", NOISE_SCALES)
def test_variance_is_preserved_over_1000_steps(process, method, scale):
    """To 0.5 % on Gaussian data, without sampling error: the state's exact covariance, followed through the sampler."""
    sigmas = (karras(1000) if process == "ve" else flow_schedule(1000)).tolist()[:-1]
    if method == "comfyui" and process == "flow":
        sigmas[0] = 1.0 - 1e-4          # it has no step from sigma = 1
    alpha = float(get_process(process).alpha(np.array(sigmas[-1])))
    mean, variance = moments(process, sigmas, 0.5, 0.7, noise_scale=scale, method=method)
    assert math.isclose(variance, alpha ** 2 * 0.25 + sigmas[-1] ** 2, rel_tol=5e-3)
    assert math.isclose(mean, alpha * 0.7, rel_tol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("kind, dim", [("cpu", 100), ("device", 100), ("brownian", 8)])
def test_variance_of_pictures_over_1000_steps(process, kind, dim):
    """The same by sampling, with our own noises in float32: within 5 standard errors."""
    model = gaussian(0.5, 0.3, dim=dim, process=process)
    sigmas = (karras(1000) if process == "ve" else flow_schedule(1000)).float()[:-1]
    x = model.start(64, sigmas[0].item(), torch.Generator().manual_seed(0)).float()
    out = ersde.sample_preset(model, x, sigmas, "sde_3", {"seed": 1}, disable=True, process=process, noise_sampler=kind)
    alpha = float(get_process(process).alpha(np.array(sigmas[-1])))
    variance = alpha ** 2 * 0.25 + sigmas[-1].item() ** 2
    assert abs(out.double().var().item() / variance - 1) < 5 * (2 / out.numel()) ** 0.5
    assert abs(out.double().mean().item() - alpha * 0.3) < 5 * (variance / out.numel()) ** 0.5
