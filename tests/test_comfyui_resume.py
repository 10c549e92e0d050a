"""ComfyUI's latents carry what a part of a run leaves for the next: our KSampler Advanced in parts is the whole run."""
import sys

import pytest
import torch
from test_comfyui_contract import SAMPLING, Model, host  # noqa: F401 (the stand-in)

from ersde.hosts import comfyui

STEPS = 8


class Patcher:
    """The host's MODEL: what a sampler sees of it, and a non-linear denoiser."""

    load_device, model_options = "cpu", {}

    def __init__(self, process="ve"):
        self.seen = Model(SAMPLING[process]())
        self.asked = []

    def __call__(self, x, sigma, **_):
        self.asked.append(sigma)
        return torch.tanh(x / (1 + sigma.reshape(-1, 1, 1, 1)))

    @property
    def inner_model(self):
        return self.seen.inner_model


@pytest.fixture
def sampling(host, monkeypatch):  # noqa: F811
    """A host that samples: starts where KSAMPLER does, and hands the sampler's result on."""
    def sample_custom(model, noise, cfg, sampler, sigmas, positive, negative, latent_image, seed=None, **rest):
        scaled = latent_image * 0.18215
        return sampler.run(model, scaled + noise * sigmas[0], sigmas, seed) / 0.18215

    monkeypatch.setattr(sys.modules["comfy.sample"], "sample_custom", sample_custom)
    monkeypatch.setattr(sys.modules["comfy.sample"], "fix_empty_latent_channels", lambda model, image, *notes: image)
    monkeypatch.setattr(sys.modules["comfy.sample"], "prepare_noise", lambda image, seed, index=None: torch.randn(
        image.shape, generator=torch.Generator().manual_seed(seed)))
    monkeypatch.setattr(comfyui, "schedule", lambda model, scheduler, steps, denoise=1.0: torch.cat(
        (torch.logspace(1.1, -1.3, steps), torch.zeros(1))))


# As the host's conditions are: lists with tensors in them, which cannot be compared as a whole.
POSITIVE, NEGATIVE = ([[torch.full((1, 77, 8), value), {}]] for value in (1.0, -1.0))


def run(model, latent, start=0, end=None, preset="sde_5", positive=POSITIVE, cfg=7.0, add_noise=None, **changes):
    return comfyui.sample_latent(
        comfyui.make_settings(preset, **changes), model, 5, STEPS, cfg, "simple", positive, NEGATIVE, latent,
        add_noise=start == 0 if add_noise is None else add_noise, start_step=start, end_step=end, leftover_noise=True)


def latent():
    return {"samples": torch.zeros(2, 4, 3, 3)}


@pytest.mark.parametrize("preset", ["sde_5", "sde", "few_steps", "comfyui", "flat"])
@pytest.mark.parametrize("noise", ["cpu", "device", "brownian"])
def test_parts_are_the_whole(sampling, preset, noise):
    model = Patcher()
    whole = run(model, latent(), preset=preset, noise=noise)
    assert set(whole) == {"samples"}        # nothing to go on from
    for cuts in ((1,), (4,), (7,), (2, 5)):
        part, start = latent(), 0
        for cut in cuts:
            part, start = run(model, part, start, cut, preset, noise=noise), cut
        torch.testing.assert_close(run(model, part, start, None, preset, noise=noise), whole, rtol=0, atol=0)


def test_two_samplers_may_go_on_from_one_part(sampling):
    model = Patcher()
    whole, part = run(model, latent()), run(model, latent(), 0, 4)
    kept = part["samples"].clone()
    for _ in range(2):
        assert torch.equal(run(model, part, 4)["samples"], whole["samples"])
    assert torch.equal(part["samples"], kept)


def ramp(model, part, **kw):
    return run(model, {"samples": part["samples"]}, 4, **kw)["samples"]


def test_what_is_not_the_same_run_starts_anew(sampling):
    """Another model, prompt or cfg, a changed latent, a mask, or noise that is added again: as without a history."""
    model, other = Patcher(), Patcher()
    part = run(model, latent(), 0, 4)
    assert not torch.equal(run(model, part, 4)["samples"], ramp(model, part))
    assert torch.equal(run(other, part, 4)["samples"], ramp(other, part))
    assert torch.equal(run(model, part, 4, positive=[[torch.ones(1, 77, 8), {}]])["samples"], ramp(model, part))
    assert torch.equal(run(model, part, 4, cfg=6.0)["samples"], ramp(model, part))
    changed = {**part, "samples": part["samples"] * 1.1}
    assert torch.equal(run(model, changed, 4)["samples"], ramp(model, changed))
    masked = {**part, "noise_mask": torch.ones(1, 1, 3, 3)}
    assert torch.equal(run(model, masked, 4)["samples"], ramp(model, part))
    noised = run(model, part, 4, add_noise=True)["samples"]
    assert torch.equal(noised, ramp(model, part, add_noise=True))
    with_later_step = run(model, part, 5)["samples"]
    assert torch.equal(with_later_step, run(model, {"samples": part["samples"]}, 5)["samples"])


def test_a_latent_keeps_no_model_in_memory(sampling):
    import gc
    import weakref

    model = Patcher()
    part, alive = run(model, latent(), 0, 4), weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    other = Patcher()
    assert torch.equal(run(other, part, 4)["samples"], ramp(other, part))
