"""CFG++: the noise direction of the unconditional prediction, in both processes, against the formulas."""
import dataclasses

import pytest
import torch
from problems import digits, flow_schedule, karras, separated

from ersde import PRESETS, Preset, sample_preset

SCHEDULES = {"ve": karras(12), "flow": flow_schedule(12)}


class Guided:
    """A guided mixture that remembers its unconditional prediction, as a host's post-cfg hook does."""

    def __init__(self, process, scale):
        self.plain = separated(process=process)
        label = torch.zeros(len(self.plain.means), dtype=torch.bool)
        label[0] = True
        self.guided = dataclasses.replace(self.plain, guidance=scale, label=label)
        self.calls, self.asked = [], 0

    def __call__(self, x, sigma, **_):
        self.calls.append(float(sigma[0]))
        self.unconditional, self.denoised = self.plain(x, sigma), self.guided(x, sigma)
        return self.denoised

    def guidance(self):
        self.asked += 1
        return self.denoised - self.unconditional


def start(process):
    generator = torch.Generator().manual_seed(0)
    return separated(process=process).start(3, float(SCHEDULES[process][0]), generator)


def sample(model, process, preset=PRESETS["ode"], x=None, sigmas=None, **options):
    return sample_preset(model, start(process) if x is None else x, SCHEDULES[process] if sigmas is None else sigmas, preset,
                         disable=True, process=process, **options)


@pytest.mark.parametrize("process", SCHEDULES)
def test_order_1_is_the_formula(process):
    model, x, sigmas = Guided(process, 1.3), start(process), SCHEDULES[process]
    got = sample(model, process, Preset("p", "ode", eta=0.0, order=1, corrector=False), guidance=model.guidance)
    for s, t in zip(sigmas[:-1], sigmas[1:]):
        alpha_s, alpha_t = (1 - s, 1 - t) if process == "flow" else (1.0, 1.0)
        denoised = model(x, s.repeat(3))
        x = alpha_t * denoised + t / s * (x - alpha_s * model.unconditional)
    assert torch.allclose(got, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("process", SCHEDULES)
def test_with_noise_the_old_noise_has_the_unconditional_direction(process):
    model, x, sigmas = Guided(process, 0.8), start(process), SCHEDULES[process]
    noises = torch.randn(len(sigmas), *x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    preset = Preset("p", "sde", order=1, corrector=False)
    draw = iter(noises)
    got = sample(model, process, preset, guidance=model.guidance, noise_sampler=lambda s, t: next(draw))
    for i, (s, t) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        alpha_s, alpha_t = (1 - s, 1 - t) if process == "flow" else (1.0, 1.0)
        denoised = model(x, s.repeat(3))
        rho = float((t / alpha_t) / (s / alpha_s)) if alpha_s > 0 else 0.0
        x = alpha_t * denoised + t / s * rho * (x - alpha_s * model.unconditional) + t * (1 - rho ** 2) ** 0.5 * noises[i]
    assert torch.allclose(got, x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("name", ["sde_5", "ode", "few_steps", "comfyui"])
def test_no_guidance_is_the_plain_sampler(process, name):
    model, plain = Guided(process, 0.0), Guided(process, 0.0)
    got = sample(model, process, PRESETS[name], guidance=lambda: torch.zeros_like(model.denoised), extra_args={"seed": 1})
    want = sample(plain, process, PRESETS[name], extra_args={"seed": 1})
    assert torch.equal(got, want)


@pytest.mark.parametrize("process, schedule", [("ve", karras(20)), ("flow", flow_schedule(20))])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_history_and_corrector_do_not_upset_it(process, schedule, eta):
    """Guided handwritten digits: every picture ends at one of its class (a sample is 0.8 from its digit)."""
    plain, guided, last = digits(process), digits(process, guidance=1.0), {}

    def model(x, sigma, **_):
        last.update(guided=guided(x, sigma), plain=plain(x, sigma))
        return last["guided"]

    x = plain.start(16, float(schedule[0]), torch.Generator().manual_seed(0))
    for order, corrector in ((1, False), (2, False), (3, True), (5, True)):
        out = sample(model, process, Preset("p", eta=eta, order=order, corrector=corrector), x, schedule,
                     extra_args={"seed": 1}, guidance=lambda: last["guided"] - last["plain"])
        assert torch.cdist(out, plain.means[guided.label]).min(1).values.max() < 1.0, order


def test_the_guidance_is_asked_for_once_per_step_and_not_in_the_last():
    model = Guided("ve", 1.0)
    sample(model, "ve", guidance=model.guidance)
    assert model.asked == 11 and len(model.calls) == 12


def test_the_state_that_a_callback_saw_is_not_written_to():
    model, seen = Guided("ve", 1.0), []
    sample(model, "ve", guidance=model.guidance, callback=lambda step: seen.append((step["x"], step["x"].clone())))
    assert all(torch.equal(x, copy) for x, copy in seen)
