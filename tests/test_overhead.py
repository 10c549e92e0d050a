"""What a step costs outside the model, counted with the torch profiler."""
import pytest
import torch

import ersde
from benchmarks.overhead import Canned, count


def operations(steps, **kw):
    x = torch.randn(1, 4, 16, 16)
    sigmas = torch.cat([torch.logspace(1.1, -1.5, steps), torch.zeros(1)])

    def run(model, x, sigmas, noise):
        return ersde.sample_er_sde(model, x, sigmas, disable=True, process="ve", noise_sampler=noise, **kw)

    # The setting up and the one look at the result are counted too: a whole run, spread over the steps.
    return count(run, Canned(x, steps), x, sigmas)


@pytest.mark.parametrize("order", [1, 3, 5])
@pytest.mark.parametrize("steps", [45, 80])
def test_few_operations_and_no_read_back_in_short_steps(order, steps):
    found = operations(steps, order=order)
    assert found["operations"] <= 15
    assert found["read_backs"] == 0


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("method", ["paper", "comfyui"])
def test_few_operations_of_the_published_formulas(method, order):
    found = operations(20, order=order, method=method)
    assert found["operations"] <= 15
    assert found["read_backs"] == 0


def test_long_steps_measure_their_trust_without_a_read_back():
    """20 steps, all of them long: fewer operations than the multistep samplers whose order does not adapt."""
    sampling = pytest.importorskip("k_diffusion.sampling")
    found = operations(20)
    assert found["read_backs"] == 0
    x = torch.randn(1, 4, 16, 16)
    sigmas = torch.cat([torch.logspace(1.1, -1.5, 20), torch.zeros(1)])
    for name in ("dpmpp_2m_sde", "dpmpp_3m_sde"):
        peer = getattr(sampling, f"sample_{name}")
        run = lambda model, x, sigmas, noise: peer(model, x, sigmas, disable=True, noise_sampler=noise)
        assert found["operations"] < 0.7 * count(run, Canned(x, 20), x, sigmas)["operations"]


def test_the_counter_sees_a_read_back():
    def run(model, x, sigmas, noise):
        for sigma in sigmas:
            if sigma > 0:
                x = x + sigma.item()
        return x

    found = count(run, Canned(torch.zeros(1, 4), 4), torch.zeros(1, 4), torch.ones(5))
    assert found["read_backs"] >= 2
