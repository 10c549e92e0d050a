"""The sampler on a GPU: the CPU's pictures, no wait for the device between the model's calls, little memory."""
import pytest
import torch

import ersde
from benchmarks import overhead
from ersde.noise import make_noise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU HERE: the sampler on a GPU was not tested")
SHAPE = (2, 4, 32, 32)


def schedule(process, steps):
    if process == "ve":
        return torch.cat([torch.logspace(1.1, -1.5, steps), torch.zeros(1)])
    time = torch.linspace(1, 0, steps + 1)
    return 3 * time / (1 + 2 * time)


class Gaussian:
    """D for data of two deviations, and a little that is not linear."""

    def __init__(self, process):
        self.process = process

    def __call__(self, x, sigma, **_):
        sigma = sigma.reshape(-1, 1, 1, 1).to(x.dtype)
        alpha = 1 - sigma if self.process == "flow" else torch.ones_like(sigma)
        variance = torch.tensor([1.0, 0.05], device=x.device, dtype=x.dtype).repeat(x.shape[-1] // 2)
        bent = (x / (alpha ** 2 + sigma ** 2).sqrt()).tanh()
        return alpha * variance / (alpha ** 2 * variance + sigma ** 2) * x + 0.05 * bent


def run(device, process, steps, dtype=torch.float32, seed=7, **kw):
    sigmas = schedule(process, steps)
    x = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * sigmas[0]).to(device, dtype)
    return ersde.sample_er_sde(Gaussian(process), x, sigmas.to(device), extra_args={"seed": seed}, process=process,
                               disable=True, **kw)


WAYS = [{"eta": 0.0}, {}, {"order": 1}, {"order": 5}, {"corrector": False}, {"noise_scale": "sde"}, {"method": "paper"},
        {"method": "comfyui"}]


@pytest.mark.parametrize("kw", WAYS, ids=str)
@pytest.mark.parametrize("process", ["ve", "flow"])
@pytest.mark.parametrize("steps", [6, 20, 50])
def test_the_picture_is_the_cpu_s(process, steps, kw):
    out, want = (run(device, process, steps, **kw).cpu() for device in ("cuda", "cpu"))
    torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kw", WAYS[:3], ids=str)
def test_a_run_that_moves(kw):
    """A picture alone, begun on the CPU, whose numbers are floats there, gone on with on the GPU, and ended on the CPU."""
    sigmas = schedule("ve", 9)
    first = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))[:1] * sigmas[0]
    preset = ersde.Preset("moving", **kw)
    out = []
    for devices in (("cpu",), ("cpu", "cuda", "cpu")):
        x, history, at = first, ersde.History(), 0
        for device, end in zip(devices, (9,) if len(devices) == 1 else (4, 6, 9)):
            history = history.to(device)
            x = ersde.sample_preset(Gaussian("ve"), x.to(device), sigmas[at:end + 1].to(device), preset, {"seed": 7},
                                    disable=True, process="ve", history=history)
            at = end
        out.append(x)
    torch.testing.assert_close(*out, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("steps", [6, 20])
def test_half_precision(steps, dtype):
    out = run("cuda", "ve", steps, dtype, eta=0.0)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), run("cuda", "ve", steps, eta=0.0), rtol=0.05, atol=0.05)


def test_float64_has_the_cpu_s_numbers():
    out = run("cuda", "ve", 10, torch.float64)
    torch.testing.assert_close(out.cpu(), run("cpu", "ve", 10, torch.float64), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("own_noise", [None, "cpu", "device", "brownian"])
@pytest.mark.parametrize("kw", WAYS, ids=str)
@pytest.mark.parametrize("steps", [6, 20])
def test_nothing_waits_for_the_device(steps, kw, own_noise):
    """From the first model call to the last one: every operation is queued, none is waited for, the noise's neither."""
    model, calls = Gaussian("ve"), []
    sigmas, x = schedule("ve", steps).cuda(), torch.randn(SHAPE, device="cuda")
    noise = torch.randn(SHAPE, device="cuda")
    own = make_noise(own_noise, x, 3) if own_noise else lambda *_: noise
    kw = {**kw, "noise_sampler": own}

    def watched(x, sigma, **extra):
        calls.append(1)
        torch.cuda.set_sync_debug_mode("default")
        out = model(x, sigma)               # its own constants come from the CPU
        if len(calls) < steps:
            torch.cuda.set_sync_debug_mode("error")
        return out

    watched.process = "ve"
    try:
        ersde.sample_er_sde(watched, x, sigmas, process="ve", disable=True, **kw)       # what is made once, is made
        calls.clear()
        ersde.sample_er_sde(watched, x, sigmas, process="ve", disable=True, **kw)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == steps


@pytest.mark.parametrize("order", [1, 3, 5])
@pytest.mark.parametrize("steps", [8, 40])
def test_memory(order, steps):
    """At most x, the noise, the history and one tensor more; the history is what the order takes and what corrects it."""
    x, sigmas = torch.randn(1, 4, 256, 256, device="cuda"), schedule("ve", steps).cuda()
    took = overhead.memory(lambda model, x, sigmas, noise: ersde.sample_er_sde(
        model, x, sigmas, disable=True, process="ve", order=order, noise_sampler=noise), x, sigmas)
    assert took <= 1 + 1 + (order + 2) + 1 + 0.1


def test_the_evaluation_s_network_and_judge():
    pytest.importorskip("k_diffusion")
    from benchmarks import evaluate
    cell, = evaluate.plan(["ve"], [4.0], [6], "^ours sde_5$")
    there, again, here = (evaluate.block_row(cell, range(8), device) for device in ("cuda", "cuda", "cpu"))
    assert there["pictures"] == again["pictures"] and there["key"] != here["key"]
    apart = evaluate.features_of(there).astype(float) - evaluate.features_of(here)
    assert abs(apart).max() < 0.2 and abs(apart).mean() < 0.02
