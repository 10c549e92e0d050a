"""What a step costs outside the model, counted with the torch profiler."""
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import ersde
from benchmarks.overhead import Canned, Held, bare, count, memory, samplers
from ersde import measure


def operations(steps, **kw):
    x = torch.randn(1, 4, 16, 16)
    sigmas = torch.cat([torch.logspace(1.1, -1.5, steps), torch.zeros(1)])

    def run(model, x, sigmas, noise):
        return ersde.sample_er_sde(model, x, sigmas, disable=True, process="ve", noise_sampler=noise, **kw)

    # The setting up and the one look at the result are counted too: a whole run, spread over the steps.
    return count(run, Canned(x, steps), x, sigmas)


@pytest.mark.parametrize("order", [1, 3, 5])
@pytest.mark.parametrize("steps", [150, 250])
def test_few_operations_and_no_read_back_in_short_steps(order, steps):
    found = operations(steps, order=order)
    assert found["operations"] <= 15
    assert found["read_backs"] == 0


def test_the_least_that_a_step_can_take_is_the_same_solver():
    """The row that nothing can be below: order 1 number for number, in the three operations of its formula."""
    x, noise = torch.randn(2, 4, 16, 16), [torch.randn(2, 4, 16, 16) for _ in range(10)]
    sigmas = torch.cat([torch.logspace(1.1, -1.5, 10), torch.zeros(1)])
    run = lambda function: function(lambda x, sigma: torch.sin(x) / (1.0 + sigma.view(-1, 1, 1, 1)), x, sigmas,
                                    lambda *_, drawn=iter(noise): next(drawn))
    assert torch.equal(run(bare), run(samplers()["ersde exact, order 1"]))
    # What is made once of the schedule is shared out to 200 steps.
    many = torch.cat([torch.logspace(1.1, -1.5, 200), torch.zeros(1)])
    assert count(bare, Canned(x, 200), x, many)["operations"] < 3.2


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


def test_long_steps_take_few_operations():
    """All 10 steps are long, and measure the variance of the data: fewer operations than the host's own er_sde, 72."""
    operations(10)                      # the plan is made once
    found = operations(10)
    assert found["operations"] <= 21
    assert found["read_backs"] == 0


@pytest.mark.parametrize("told, most", [(False, 12.0), (True, 16.0)])
@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_long_steps_take_few_passes_over_the_state(told, most, gain):
    """10 steps, without a variance and with one, as README has it: operations that read a whole state, views apart."""
    generator = torch.Generator().manual_seed(0)
    x = 12.6 * torch.randn(1, 4, 16, 16, generator=generator)
    sigmas = torch.cat([torch.logspace(1.1, -1.5, 10), torch.zeros(1)])
    noise = [torch.randn(x.shape, generator=generator) for _ in range(10)]
    same = torch.randn(x.shape, generator=generator)
    given = [same + 0.25 / (0.25 + sigma ** 2) * x if gain else z for sigma, z in zip(sigmas, noise)]

    def run():
        answers, drawn = iter(given), iter(noise)
        ersde.sample_preset(lambda x, sigma: next(answers), x, sigmas, "sde_5", disable=True, process="ve",
                            noise_sampler=lambda *_: next(drawn), excess=(lambda: same) if told else None)

    run()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    passes = [e for e in profiler.events() if e.name.startswith("aten::")
              and (e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::"))
              and e.name not in ("aten::reshape", "aten::view", "aten::unbind")
              and any(math.prod(shape) == x.numel() for shape in e.input_shapes if shape)]
    assert most - 2.0 < len(passes) / 10 <= most


def test_the_numbers_of_a_device_stay_there(monkeypatch):
    """What a step measures is arithmetic on tensors, but on the CPU."""
    monkeypatch.setattr(measure, "kind", lambda x: measure.TENSORS)
    operations(10)
    found = operations(10)
    assert found["operations"] <= 49
    assert found["read_backs"] == 0


def test_the_next_run_has_its_plan():
    """The next picture's set-up makes no weights."""
    ersde.weights._known_plan.cache_clear()
    first = operations(2)
    assert operations(2)["operations"] <= 0.7 * first["operations"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("steps", [10, 40])
def test_what_is_kept_from_run_to_run_knows_the_dtype_and_the_mode(steps, dtype):
    """A run in inference mode, as ComfyUI's are, of another dtype or shape before does not change a run."""
    sigmas = torch.cat([torch.logspace(1.1, -1.5, steps), torch.zeros(1)])
    x = 12.0 * torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def run(dtype, shape=(2, 4, 3, 3)):
        x_, model = x.to(dtype).reshape(shape), lambda x, sigma: torch.tanh(x)
        return ersde.sample_er_sde(model, x_, sigmas, disable=True, process="ve",
                                   noise_sampler=lambda s, t: torch.ones_like(x_))

    def cleared():
        ersde.weights._known_plan.cache_clear()
        ersde.measure.numbers.cache_clear()

    cleared()
    want = run(dtype)
    cleared()
    with torch.inference_mode():
        run(dtype)
        run(torch.float32, (2, 36))
    run(torch.float64, (72,))
    run(torch.bfloat16)
    assert torch.equal(run(dtype), want)


def test_the_counter_sees_a_read_back():
    def run(model, x, sigmas, noise):
        for sigma in sigmas:
            if sigma > 0:
                x = x + sigma.item()
        return x

    found = count(run, Canned(torch.zeros(1, 4), 4), torch.zeros(1, 4), torch.ones(5))
    assert found["read_backs"] >= 2


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("steps", [6, 10, 14, 20, 50])
@pytest.mark.parametrize("kw", [{}, {"eta": 0.0}, {"corrector": False}, {"s_noise": 0.0}], ids=str)
def test_memory(steps, order, kw):
    """Whatever passes between the model calls: at most x, the noise, the history and one tensor more, at any time.

    The history is the evaluations of the order, the one that corrects them and the newest.
    """
    x = torch.randn(1, 4, 64, 64)
    sigmas = torch.cat([torch.logspace(1.1, -1.5, steps), torch.zeros(1)])
    run = lambda model, x, sigmas, noise: ersde.sample_er_sde(model, x, sigmas, disable=True, process="ve", order=order,
                                                              noise_sampler=noise, **kw)
    assert memory(run, x, sigmas) <= 1 + 1 + (order + 2) + 1 + 0.1       # and numbers of each picture


def test_held_counts_what_is_there():
    with Held() as held:
        a = torch.zeros(100)
        b = a.view(10, 10) + 1
        del a
        c = b * 2
    assert held.most == 800 and held.now == 800
    del b, c
    assert held.now == 0
