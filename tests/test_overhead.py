"""What a step costs outside the model, counted with the torch profiler."""
import pytest
import torch

import ersde
from benchmarks.overhead import Canned, count


@pytest.mark.parametrize("order", [1, 3, 5])
@pytest.mark.parametrize("method", ["exact", "comfyui"])
def test_few_operations_and_no_read_back(order, method):
    x = torch.randn(1, 4, 16, 16)
    steps = 20
    sigmas = torch.cat([torch.logspace(1.1, -1.5, steps), torch.zeros(1)])

    def run(model, x, sigmas, noise):
        return ersde.sample_er_sde(model, x, sigmas, disable=True, process="ve", noise_sampler=noise,
                                   order=order if method == "exact" else min(order, 3), method=method)

    # The setting up and the one look at the result are counted too: 20 steps' worth, spread over the steps.
    found = count(run, Canned(x, steps), x, sigmas)
    assert found["operations"] <= 15
    assert found["read_backs"] == 0


def test_the_counter_sees_a_read_back():
    def run(model, x, sigmas, noise):
        for sigma in sigmas:
            if sigma > 0:
                x = x + sigma.item()
        return x

    found = count(run, Canned(torch.zeros(1, 4), 4), torch.zeros(1, 4), torch.ones(5))
    assert found["read_backs"] >= 2
