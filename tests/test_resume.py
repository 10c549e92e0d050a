"""A run in parts against the whole: the noise it would have drawn, and with a history the very same picture."""
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import flow_schedule, gaussian, karras, rms, separated
from torch.utils._python_dispatch import TorchDispatchMode

import ersde
from ersde import NOISE_SCALES, PRESETS, History, measure
from ersde.noise_scale import get_noise_scale
from ersde.process import get_process
from ersde.weights import METHODS, make_plan

PROCESSES = ("ve", "flow")
STEPS = 9


def problem(process):
    sigmas = (karras(STEPS) if process == "ve" else flow_schedule(STEPS)).float()
    model = separated(process)
    return model, model.start(3, sigmas[0].item(), torch.Generator().manual_seed(0)).float(), sigmas


def sample(model, x, sigmas, preset, **kw):
    return ersde.sample_preset(model, x, sigmas, preset, {"seed": 5}, disable=True, process=model.process, **kw)


def in_parts(model, x, sigmas, preset, cuts, keep=lambda x: x, **kw):
    history = History()
    for start, end in itertools.pairwise((0, *cuts, len(sigmas) - 1)):
        x = sample(model, x if start == 0 else keep(x), sigmas[start:end + 1], preset, history=history, **kw)
    assert not history          # the last part ended at sigma = 0
    return x


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("preset", PRESETS)
def test_with_a_history_a_run_in_parts_is_the_whole(process, preset):
    """Bit for bit, cut anywhere, in two parts or in one for each step, with the window of the whole run."""
    model, x, sigmas = problem(process)
    kw = {"window": (sigmas[2].item(), sigmas[7].item())} if PRESETS[preset].start or PRESETS[preset].end < 1 else {}
    whole = sample(model, x, sigmas, preset, **kw)
    for cuts in (*((cut,) for cut in range(1, STEPS)), (3, 6), tuple(range(1, STEPS))):
        assert torch.equal(in_parts(model, x, sigmas, preset, cuts, **kw), whole), cuts


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PROCESSES), st.sampled_from(list(NOISE_SCALES)), st.sampled_from(list(METHODS)), st.integers(1, 3),
       st.booleans(), st.integers(8, 40), st.integers(0, 10 ** 6))
def test_the_beginning_of_a_plan_does_not_depend_on_its_end(process, scale, method, order, corrector, steps, seed):
    """What the promise for runs in parts rests on: the same weights, to the last bit."""
    random = np.random.default_rng(seed)
    sigmas = np.sort(random.uniform(0.01, 0.999, steps + 1) ** 2 * (15 if process == "ve" else 1))[::-1]
    make = lambda s: make_plan(s, get_process(process), get_noise_scale(scale), np.ones(len(s) - 1), 1.0, order, corrector,
                               method)
    whole = make(sigmas).steps
    for cut in random.integers(1, steps, 8):
        assert whole[:cut] == make(sigmas[:cut + 1]).steps


@pytest.mark.parametrize("change", [{"order": 1}, {"order": 5}, {"corrector": False}, {"method": "paper"}, {"s_noise": 0.7}])
def test_with_a_history_for_other_settings(change):
    model, x, sigmas = problem("ve")
    preset = PRESETS["sde_2"].replace(**change)
    for cut in (1, 4, 8):
        assert torch.equal(in_parts(model, x, sigmas, preset, (cut,)), sample(model, x, sigmas, preset))


def test_with_a_history_a_part_of_long_steps_keeps_what_short_ones_need():
    model, x, _ = problem("ve")
    sigmas = torch.tensor([14.6, 10.0, 6.0, 3.5, 2.0, *(1.9 * 0.97 ** torch.arange(9)).tolist(), 0.0])
    for preset in (PRESETS["ode"].replace(order=4), PRESETS["sde_5"]):
        for cut in (3, 4, 5, 6):
            assert torch.equal(in_parts(model, x, sigmas, preset, (cut,)), sample(model, x, sigmas, preset))


@pytest.mark.parametrize("kind", ersde.NOISES)
@pytest.mark.parametrize("process", PROCESSES)
def test_the_noise_is_what_the_whole_run_would_have_drawn(kind, process):
    model, x, sigmas = problem(process)
    whole = sample(model, x, sigmas, "sde", noise_sampler=kind)
    assert torch.equal(in_parts(model, x, sigmas, "sde", (4,), noise_sampler=kind), whole)
    # Without a history too.  With one point as data, of which every D is the same, that shows by itself.
    point = gaussian(0.0, 0.4, dim=8, process=process)
    whole = sample(point, x, sigmas[:-1], "sde", noise_sampler=kind)
    middle = sample(point, x, sigmas[:5], "sde", noise_sampler=kind)
    assert torch.equal(sample(point, middle, sigmas[4:-1], "sde", noise_sampler=kind), whole)


@pytest.mark.parametrize("process", PROCESSES)
def test_without_a_history_the_second_part_starts_at_order_one(process):
    """The ramp: the part is the run that begins there, and the error of starting anew shrinks with the steps."""
    apart = []
    for steps in (20, 80):
        sigmas = (karras(steps) if process == "ve" else flow_schedule(steps)).double()
        model = gaussian(0.5, 0.3, process=process)
        x = model.start(8, sigmas[0].item(), torch.Generator().manual_seed(0))
        cut = steps // 2
        whole = sample(model, x, sigmas, "ode")
        middle = sample(model, x, sigmas[:cut + 1], "ode")
        apart.append(rms(sample(model, middle, sigmas[cut:], "ode"), whole))
        assert torch.equal(in_parts(model, x, sigmas, "ode", (cut,)), whole)
    assert 0 < apart[1] < apart[0] / 8 and apart[0] < 0.02


def test_casts_and_scalings_between_the_parts_do_no_harm():
    model, x, sigmas = problem("ve")
    whole = sample(model, x, sigmas, "sde_2")
    for keep in (lambda x: x / 0.13025 * 0.13025, lambda x: x.half().float(), lambda x: x.double().float()):
        assert torch.equal(in_parts(model, x, sigmas, "sde_2", (4,), keep), whole)
    assert in_parts(model, x, sigmas, "sde_2", (4,), lambda x: x.half()).dtype == torch.float16


def test_what_is_not_the_run_before_is_not_continued():
    """Another state, sigma, process or direction: the run is then the one without a history."""
    model, x, sigmas = problem("ve")
    first, second = sigmas[:5], sigmas[4:]

    def after(history_from=x, preset="ode", **kw):
        history = History()
        middle = sample(model, history_from, first, preset, history=history, **kw)
        assert history
        return history, middle

    history, middle = after()
    for start, rest in ((middle * 1.01, second), (middle + 0.1, second), (middle[:1], second), (middle, sigmas[5:]),
                        (middle, torch.cat((second[:1] * (1 + 1e-6), second[1:])))):
        history, middle = after()
        assert torch.equal(sample(model, start, rest, "ode", history=history), sample(model, start, rest, "ode"))
    history, middle = after()
    up = first.flip(0)
    assert torch.equal(sample(model, middle, up, "ode", history=history), sample(model, middle, up, "ode"))
    flow = separated("flow")
    start = flow.start(3, 0.9, torch.Generator().manual_seed(0)).float()
    history = History()
    middle = sample(flow, start, torch.tensor([0.9, 0.6]), "ode", history=history)
    rest = torch.tensor([0.6, 0.2])
    wrong = ersde.sample_preset(model, middle, rest, "ode", {"seed": 5}, disable=True, process="ve", history=history)
    assert torch.equal(wrong, sample(model, middle, rest, "ode"))


def test_the_state_may_be_changed_in_place():
    """The history has its own."""
    model, x, sigmas = problem("ve")
    history = History()
    middle = sample(model, x, sigmas[:5], "ode", history=history)
    middle += 1.0
    assert torch.equal(sample(model, middle, sigmas[4:], "ode", history=history), sample(model, middle, sigmas[4:], "ode"))


@pytest.mark.parametrize("first", [{}, {"order": 1, "corrector": False}])
@pytest.mark.parametrize("change", [{"noise_scale": "sde_3"}, {"corrector": False}, {"order": 2}, {"method": "paper"}])
def test_other_settings_go_on_from_the_evaluations(change, first):
    """No ramp.  dy / dlambda = (y - D) / lambda, D = 0.3 lambda^2, gives y = c lambda - 0.3 lambda^2: exact at order 3."""
    def model(x, sigma, **_):
        return (0.3 * sigma ** 2).reshape(-1, 1).expand(x.shape)

    model.process = "ve"
    sigmas = torch.tensor([2.0, 1.95, 1.9, 1.85, 1.8], dtype=torch.float64)
    x = torch.ones(1, 1, dtype=torch.float64)
    changed = PRESETS["ode"].replace(**change)
    history = History()
    middle = sample(model, x, sigmas[:4], PRESETS["ode"].replace(**first), history=history)
    exact = (middle / 1.85 + 0.3 * 1.85) * 1.8 - 0.3 * 1.8 ** 2
    going_on = rms(sample(model, middle, sigmas[3:], changed, history=history), exact)
    anew = rms(sample(model, middle, sigmas[3:], changed), exact)
    assert anew > 1e-4 and going_on < (1e-12 if changed.order == 3 and changed.method == "exact" else 0.6 * anew)


def test_a_run_that_fails_leaves_the_history_alone():
    model, x, sigmas = problem("ve")
    whole = sample(model, x, sigmas, "sde_2")
    history = History()
    middle = sample(model, x, sigmas[:5], "sde_2", history=history)

    def stop(info):
        if info["i"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, middle, sigmas[4:], "sde_2", history=history, callback=stop)
    assert torch.equal(sample(model, middle, sigmas[4:], "sde_2", history=history), whole)


def test_the_first_part_is_the_whole_runs_beginning():
    """To the step of the cut; a schedule too short to run leaves the history as it was."""
    model, x, sigmas = problem("ve")
    seen = []
    sample(model, x, sigmas, "sde", callback=lambda info: seen.append(info["x"]))
    history = History()
    for cut in (1, 5):
        assert torch.equal(sample(model, x, sigmas[:cut + 1], "sde", history=history), seen[cut])
    assert sample(model, x, sigmas[:1], "sde", history=history) is x and history


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_in_parts_is_the_whole(dtype):
    """The state of a half precision run goes on in the float32 that it is computed in."""
    model, x, sigmas = problem("ve")
    for preset in ("sde_5", "few_steps", "comfyui"):
        whole = sample(model, x.to(dtype), sigmas, preset)
        assert whole.dtype == dtype
        assert torch.equal(in_parts(model, x.to(dtype), sigmas, preset, (2, 4, 7)), whole)


@pytest.mark.parametrize("process", ["ve", "flow"])
@pytest.mark.parametrize("preset", ["sde_5", "few_steps"])
def test_parts_of_a_picture_alone(process, preset):
    """What its steps measured are floats, and cross as they are; a run whose numbers are tensors takes them as well."""
    model, x, sigmas = problem(process)
    x = x[:1]
    assert torch.equal(in_parts(model, x, sigmas, preset, (2, 4, 7)), sample(model, x, sigmas, preset))
    one = (1,) * x.ndim
    values = 0.5, measure.Several([0.5]), np.full(one, 0.5), torch.full(one, 0.5)
    for m, form in ((measure.Floats(x), float), (measure.Few(x), measure.Several), (measure.Arrays(x), np.ndarray),
                    (measure.TENSORS, torch.Tensor)):
        assert m.take(None, x) is None
        for value in values:
            here = m.take(value, x)
            assert isinstance(here, form) and np.ravel(here) == [0.5]
            assert form is not np.ndarray or here.shape == one
            assert form is not torch.Tensor or here.dtype == x.dtype and here.shape == (() if value is values[0] else one)


class Dtypes(TorchDispatchMode):
    """Notes the dtypes of all tensors of a shape that are made."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.seen = shape, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape == self.shape:
            self.seen.add(out.dtype)
        return out


@pytest.mark.parametrize("preset", ["sde_5", "few_steps"])
def test_parts_need_no_float64_of_the_device(preset):
    """Apple's GPUs have none."""
    x, sigmas, history = torch.randn(2, 4, 3, 3) * 14, karras(STEPS).float(), History()
    with Dtypes(x.shape) as dtypes:
        for part in (sigmas[:5], sigmas[4:]):
            x = ersde.sample_preset(lambda x, sigma: torch.tanh(x), x, part, preset, disable=True, history=history,
                                    noise_sampler=lambda *_: torch.ones_like(x))
    assert dtypes.seen - {torch.bool} == {torch.float32}
