"""Whatever goes in: a correct result or an error that says what is wrong; never a silent NaN, a warning, or a changed input.

Property tests over the public functions.  Errors are TypeError, ValueError and, for what a model or a noise sampler
returned, FloatingPointError; their text is one short line.
"""
import inspect
import math
import sys
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import gaussian, karras, separated

import ersde
from ersde import NOISE_SCALES, NOISES, PRESETS, hosts
from ersde.process import check_sigmas, get_process
from ersde.weights import METHODS

ERRORS = (TypeError, ValueError, FloatingPointError)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SAMPLERS = [ersde.sample_er_sde, *ersde.SAMPLERS.values()]
quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Values of every type that a person, a file or a host may hand over in place of the right one.
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(max_size=8), st.binary(max_size=8),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from([10 ** 400, -10 ** 5000, 5e-324, 1.8e308, "\ud800", object(), torch.zeros(2), torch.tensor(1.0),
                     torch.tensor([1, 2]), np.zeros((2, 2)), np.float32(0.5), np.int64(2), np.nan, (), [[]], len]))


@contextmanager
def clean():
    """No warning is shown, and torch's and numpy's settings are as they were."""
    def state():
        return (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), np.geterr(),
                torch.are_deterministic_algorithms_enabled())

    before = state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert state() == before


def refused(call):
    """The result of `call`, or None where it is refused in the agreed form."""
    try:
        with clean():
            return call()
    except ERRORS as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 1000, text
        return None


def same(a, b):
    """Bitwise, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(
        a.detach().double().numpy(), b.detach().double().numpy(), equal_nan=True)


# Schedules.

LEVELS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.floats(1e-4, 1e5), st.floats(0, 1), st.floats(0, 1, width=16),
    st.sampled_from([0.0, -0.0, 5e-324, 1e-310, 1e-45, 1e-38, 1e-7, 1 - 1e-7, 1.0, 1 + 1e-7, 14.6, 1e5, 1e38, 1e39, 1e300]))


@st.composite
def schedules(draw):
    """Lists of levels as they come, or put in order; with repeats, and a last 0 or none."""
    levels = draw(st.lists(LEVELS, max_size=8))
    if draw(st.booleans()):
        levels = sorted((abs(s) for s in levels if math.isfinite(s)), reverse=draw(st.integers(0, 3)) > 0)
    if levels and draw(st.booleans()):
        at = draw(st.integers(0, len(levels) - 1))
        levels[at:at] = [levels[at]] * draw(st.integers(1, 3))
    return levels + draw(st.sampled_from([[], [0.0], [0.0, 0.0]]))


def as_given(levels, kind):
    return levels if kind is list else np.array(levels, dtype=kind) if isinstance(kind, type) else torch.tensor(
        levels, dtype=kind)


@settings(quick, max_examples=400)
@given(schedules(), st.sampled_from([list, np.float64, np.float32, *FLOATS]), st.sampled_from(["ve", "flow"]),
       st.sampled_from(list(PRESETS)), st.sampled_from(FLOATS))
def test_any_schedule(levels, kind, process, preset, dtype):
    with np.errstate(over="ignore"):
        sigmas = as_given(levels, kind)
    before = sigmas.clone() if isinstance(sigmas, torch.Tensor) else np.array(sigmas)
    x = torch.linspace(-1, 1, 6).reshape(2, 3).to(dtype)
    kept = x.clone()
    model = gaussian(0.5, dim=3, process=process)
    out = refused(lambda: ersde.sample_preset(model, x, sigmas, preset, {"seed": 1}, disable=True, process=process))
    assert same(x, kept)
    assert np.array_equal(np.asarray(sigmas if not isinstance(sigmas, torch.Tensor) else sigmas.double()),
                          np.asarray(before if not isinstance(before, torch.Tensor) else before.double()), equal_nan=True)
    if out is not None:
        assert out.shape == x.shape and out.dtype == dtype and torch.isfinite(out).all()


@settings(quick, max_examples=300)
@given(st.lists(st.one_of(st.floats(1e-4, 1e5), st.floats(1e-38, 1e38)), min_size=2, max_size=12), st.booleans(),
       st.sampled_from(list(NOISE_SCALES)), st.sampled_from(list(METHODS)), st.sampled_from(["ve", "flow"]),
       st.integers(1, 5), st.booleans(), st.sampled_from([0.0, 0.3, 1.0, 3.0]))
def test_every_falling_schedule_is_sampled(levels, end, scale, method, process, order, corrector, eta):
    """Steps long and short, repeated, an ulp apart, sigma from 1e-38 to 1e38: data in one point come out as that point."""
    order = min(order, METHODS[method])
    levels = sorted(levels, reverse=True)
    if process == "flow":
        levels = sorted((s / (1 + s) for s in levels), reverse=True)
    sigmas = torch.tensor(levels + [0.0] * end, dtype=torch.float64)
    model = gaussian(0.0, 0.7, dim=3, process=process)
    alpha = float(get_process(process).alpha(sigmas[0].numpy()))
    x = alpha * 0.7 + sigmas[0] * torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    with clean():
        out = ersde.sample_er_sde(model, x, sigmas, {"seed": 1}, disable=True, process=process, noise_scale=scale, eta=eta,
                                  method=method, order=order, corrector=corrector)
    alpha = float(get_process(process).alpha(sigmas[-1].numpy()))
    assert ((out - alpha * 0.7).abs() <= 8.0 * sigmas[-1] + 1e-9).all()


@pytest.mark.parametrize("steps", [1, 2, 3000])
@pytest.mark.parametrize("process", ["ve", "flow"])
@pytest.mark.parametrize("end", [True, False])
def test_one_step_and_thousands(steps, process, end):
    model = gaussian(0.5, process=process)
    first = 14.6 if process == "ve" else 1.0
    sigmas = torch.cat((torch.linspace(first, 0.01, steps + 1 - end), torch.zeros(int(end))))
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)) * first
    with clean():
        out = ersde.sample_er_sde(model, x, sigmas, {"seed": 1}, disable=True, process=process)
    assert torch.isfinite(out).all() and model.calls == len(sigmas) - 1


# Settings.

@settings(quick, max_examples=400)
@given(st.sampled_from([name for name, p in inspect.signature(ersde.sample_er_sde).parameters.items()
                        if name not in ("disable",)]), ANYTHING)
def test_any_value_in_place_of_an_argument(name, value):
    x = torch.full((2, 4), 9.0)
    arguments = {"model": lambda x, sigma, **_: 0.5 * x, "x": x, "sigmas": torch.tensor([10.0, 3.0, 0.0]), "disable": True}
    arguments[name] = value
    out = refused(lambda: ersde.sample_er_sde(**arguments))
    assert (x == 9.0).all()
    assert out is None or name == "x" or torch.isfinite(out).all() and out.shape == x.shape


@settings(quick, max_examples=300)
@given(st.sampled_from(SAMPLERS[1:]), st.sampled_from([
    "eta", "s_noise", "order", "corrector", "method", "noise_scale", "start", "end", "window", "process", "noise_sampler",
    "history", "preset"]), ANYTHING)
def test_any_value_in_place_of_a_setting_of_a_preset(sampler, name, value):
    x, model, sigmas = torch.full((2, 4), 9.0), gaussian(), torch.tensor([10.0, 3.0, 0.0])
    if name in ("window", "history", "preset"):
        call = lambda: ersde.sample_preset(model, x, sigmas, disable=True, **{"preset": "sde", name: value})
    else:
        call = lambda: sampler(model, x, sigmas, disable=True, **{name: value})
    out = refused(call)
    assert out is None or torch.isfinite(out).all() and out.shape == x.shape


@settings(quick, max_examples=300)
@given(st.sampled_from(["eta", "s_noise"]), st.floats(0, 1.8e308), st.sampled_from(list(NOISE_SCALES)),
       st.sampled_from(["ve", "flow"]), st.sampled_from(FLOATS))
def test_any_amount_of_noise(name, amount, scale, process, dtype):
    """A finite picture, or the numbers that dtype cannot hold are named before the first model call."""
    calls = []

    def model(x, sigma, **_):
        calls.append(sigma)
        return 0.5 * x

    sigmas = torch.tensor([0.9, 0.5, 0.1, 0.0])
    x = torch.ones(1, 4, dtype=dtype)
    out = refused(lambda: ersde.sample_er_sde(model, x, sigmas, {"seed": 1}, disable=True, process=process,
                                              noise_scale=scale, **{name: amount}))
    assert (not calls or amount > 1e3) if out is None else torch.isfinite(out).all()


# Tensors.

@quick
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.sampled_from(FLOATS), st.sampled_from(["ve", "flow"]),
       st.sampled_from(list(PRESETS)), st.sampled_from(list(NOISES)))
def test_any_shape(shape, dtype, process, preset, kind):
    """Empty batches, latents of size zero, one dimension to five."""
    x = torch.linspace(-1, 1, math.prod(shape)).reshape(shape).to(dtype)
    first = 8.0 if process == "ve" else 1.0
    sigmas = torch.tensor([first, 0.6 * first, 0.2, 0.1, 0.0])
    with clean():
        out = ersde.sample_preset(lambda x, sigma, **_: 0.5 * x, first * x, sigmas, preset, {"seed": 1}, disable=True,
                                  process=process, noise_sampler=kind)
    assert out.shape == x.shape and out.dtype == dtype and torch.isfinite(out).all()


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "a part of more": lambda x: torch.cat((x, x), 3)[..., :x.shape[3]],
    "every other": lambda x: torch.stack((x, x), 4).flatten(3)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "needs a gradient": lambda x: x.clone().requires_grad_(),
    "a parameter": lambda x: torch.nn.Parameter(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", ["sde_5", "few_steps", "comfyui"])
def test_any_memory_format(layout, preset):
    """The picture of the contiguous tensor, to rounding."""
    model = separated(dim=3 * 4 * 4)
    x = model.start(2, 14.6, torch.Generator().manual_seed(0)).float().reshape(2, 3, 4, 4)
    x = x[:1].expand(2, 3, 4, 4).contiguous() if layout == "expanded" else x
    changed = LAYOUTS[layout](x)
    kept = changed.detach().clone()
    got, want = (ersde.sample_preset(model, each, karras(8).float(), preset, {"seed": 1}, disable=True)
                 for each in (changed, x))
    torch.testing.assert_close(got, want)
    assert torch.equal(changed, kept) and not got.requires_grad


def test_a_tensor_of_another_kind_is_refused():
    for x in (torch.zeros(2, 4).to_sparse(), torch.zeros(2, 4, dtype=torch.complex64), torch.zeros(2, 4, dtype=torch.bool),
              np.zeros((2, 4))):
        with pytest.raises(TypeError, match="x must be"):
            ersde.sample_er_sde(gaussian(), x, karras(3), disable=True)


# Models.

WRONG = {
    "nothing": (lambda x: None, TypeError, ["tensor", "NoneType"]),
    "a pair": (lambda x: (x, x), TypeError, ["tensor", "tuple"]),
    "numpy": (lambda x: x.numpy(), TypeError, ["tensor", "ndarray"]),
    "integers": (lambda x: x.long(), TypeError, ["floating", "int64"]),
    "complex": (lambda x: x + 0j, TypeError, ["floating", "complex64"]),
    "one picture": (lambda x: x[:1], ValueError, ["shape", "(2, 4)", "(1, 4)"]),
    "a number": (lambda x: x.mean(), ValueError, ["shape", "(2, 4)", "()"]),
    "one more axis": (lambda x: x[None], ValueError, ["shape", "(1, 2, 4)"]),
    "another device": (lambda x: x.to("meta"), ValueError, ["device", "cpu", "meta"]),
    "NaN": (lambda x: x * math.nan, FloatingPointError, ["model", "NaN"]),
    "one NaN": (lambda x: torch.where(torch.arange(4) == 2, math.nan, x), FloatingPointError, ["model", "NaN"]),
    "infinity": (lambda x: x / 0, FloatingPointError, ["model", "infinity"]),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("step", [0, 1, 4])
@pytest.mark.parametrize("preset", ["sde_5", "few_steps", "comfyui"])
def test_a_model_that_returns_something_else(what, step, preset):
    wrong, error, words = WRONG[what]
    calls = []

    def model(x, sigma):
        calls.append(sigma)
        return wrong(x) if len(calls) == step + 1 else 0.5 * x

    x = torch.full((2, 4), 9.0)
    with pytest.raises(error) as info, clean():
        ersde.sample_preset(model, x, karras(5).float(), preset, disable=True)
    text = str(info.value)
    assert all(word in text for word in (*words, f"step {step}")) and "\n" not in text
    assert (x == 9.0).all()


@pytest.mark.parametrize("what", [name for name in WRONG if name != "NaN" and "NaN" not in name and name != "infinity"])
def test_a_noise_sampler_that_returns_something_else(what):
    wrong, error, words = WRONG[what]
    x = torch.full((2, 4), 9.0)
    with pytest.raises(error) as info:
        ersde.sample_er_sde(gaussian(), x, karras(5).float(), disable=True, noise_sampler=lambda *_: wrong(torch.ones(2, 4)))
    assert all(word in str(info.value) for word in (*words, "noise_sampler", "step 0"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_of_another_float_dtype(dtype, preset):
    """The picture has x's dtype, and is the one of a model of x's dtype, to the rounding of the narrower."""
    model = separated(dim=4)
    x = model.start(2, 14.6, torch.Generator().manual_seed(0)).float()
    run = lambda m: ersde.sample_preset(m, x, karras(8).float(), preset, {"seed": 1}, disable=True)
    got, want = run(lambda x, sigma, **_: model(x, sigma).to(dtype)), run(model)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=100 * torch.finfo(dtype).eps + 1e-5)


def test_a_model_that_returns_its_own_x_or_a_view_of_it():
    for model in (lambda x, sigma: x, lambda x, sigma: x.view(x.shape), lambda x, sigma: x[:1].expand(x.shape)):
        x = torch.full((2, 4), 9.0)
        out = ersde.sample_er_sde(model, x, karras(6).float(), disable=True, eta=0.0)
        torch.testing.assert_close(out, torch.full((2, 4), 9.0))
        assert (x == 9.0).all()


def test_a_result_whose_sum_is_infinite_is_finite():
    big = lambda x, sigma: torch.full_like(x, 1e38)
    out = ersde.sample_er_sde(big, torch.ones(2, 40), karras(3).float(), disable=True, noise_scale="ode")
    assert (out == 1e38).all() and out.sum().isinf()


def test_a_state_that_is_not_finite_is_named():
    for bad in (math.nan, math.inf):
        x = torch.full((2, 4), 9.0)
        x[1, 2] = bad
        with pytest.raises(FloatingPointError, match="x was not finite"):
            ersde.sample_er_sde(gaussian(), x, karras(3).float(), disable=True)


# Interrupts.

class Stop(BaseException):
    """What a host raises to interrupt: none of the errors that a program would catch."""


@pytest.mark.parametrize("where", ["model", "callback", "noise_sampler"])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, RuntimeError, StopIteration, GeneratorExit])
def test_an_interrupt_at_every_step(where, error, capfd):
    """It goes through as it is; nothing is left behind, so that the next run is the undisturbed one."""
    sigmas, x = karras(6).float(), torch.full((2, 4), 9.0)
    model = separated(dim=4)
    want = ersde.sample_er_sde(model, x, sigmas, {"seed": 1}, disable=True)
    for step in range(6 if where != "noise_sampler" else 5):
        thrown, at = error(), iter(range(10))

        def maybe(value=None):
            if next(at) == step:
                raise thrown
            return value

        arguments = {"model": lambda x, sigma, **_: maybe(model(x, sigma))} if where == "model" else {
            "model": model, where: lambda *a: maybe(torch.zeros(2, 4))}
        with clean(), pytest.raises(error) as info:
            ersde.sample_er_sde(**arguments, x=x, sigmas=sigmas, extra_args={"seed": 1})
        assert info.value is thrown and (x == 9.0).all()
        with clean():
            assert torch.equal(ersde.sample_er_sde(model, x, sigmas, {"seed": 1}, disable=True), want)


def snapshot(prefixes):
    """What every module and class of these packages holds, by identity."""
    owners = [module for name, module in list(sys.modules.items()) if name.split(".")[0] in prefixes and module is not None]
    owners += [torch.Tensor, torch.nn.Module, torch.Generator]
    return [(owner, name, value) for owner in owners for name, value in list(vars(owner).items())]


@pytest.mark.parametrize("kind", NOISES)
def test_nothing_is_left_patched(kind):
    """Not in torch, numpy or a host's samplers, neither while a model is asked nor after an error."""
    pytest.importorskip("k_diffusion.sampling")
    before = snapshot(("torch", "numpy", "k_diffusion", "tqdm", "random", "builtins"))
    unchanged = lambda: all(vars(owner).get(name) is value for owner, name, value in before)

    def model(x, sigma, **_):
        assert unchanged()
        if sigma[0] < 1:
            raise Stop
        return 0.5 * x

    assert unchanged()
    for preset in ("sde_5", "few_steps", "comfyui"):
        with pytest.raises(Stop):
            ersde.sample_preset(model, torch.ones(2, 4), torch.tensor([9.0, 3.0, 0.5, 0.0]), preset, noise_sampler=kind)
        assert unchanged()


def test_arguments_are_left_as_they_were():
    extra, sigmas = {"seed": 3, "cond": [1]}, karras(5).float()
    kept = sigmas.clone()
    ersde.sample_er_sde(gaussian(), torch.ones(2, 4), sigmas, extra, disable=True)
    assert extra == {"seed": 3, "cond": [1]} and torch.equal(sigmas, kept)
    flow = torch.tensor([1.0, 0.5, 0.0])
    ersde.sample_er_sde(gaussian(process="flow"), torch.ones(2, 4), flow, extra, disable=True, process="flow",
                        method="comfyui")
    assert flow.tolist() == [1.0, 0.5, 0.0]


def test_a_dtype_too_narrow_for_the_schedule_is_named():
    for sigma, words in ((1e5, "holds numbers up to 65504"), (1e-9, "takes sigma 1e-09 for 0")):
        for dtype, fits in ((torch.float16, False), (torch.bfloat16, True), (torch.float32, True)):
            sigmas = torch.tensor(sorted((1.0, sigma), reverse=True) + [0.0])
            x = torch.ones(1, 4, dtype=dtype)
            call = lambda: ersde.sample_er_sde(gaussian(0.0), x, sigmas, {"seed": 1}, disable=True)
            if fits:
                assert torch.isfinite(call()).all()
            else:
                with pytest.raises(ValueError, match=words):
                    call()


# The other public functions.

@quick
@given(ANYTHING, ANYTHING)
def test_any_value_for_the_other_functions(value, other):
    for call in (lambda: ersde.get_preset(value), lambda: check_sigmas(value, get_process("ve")), lambda: get_process(value),
                 lambda: ersde.noise_scale.get_noise_scale(value), lambda: ersde.make_noise(value, torch.zeros(2, 3)),
                 lambda: ersde.make_noise("cpu", value, 1), lambda: ersde.make_noise("device", torch.zeros(2, 3), value),
                 lambda: ersde.make_noise("brownian", torch.zeros(2, 3), 1, images=value),
                 lambda: ersde.make_noise("brownian", torch.zeros(2, 3), 1, eta=value),
                 lambda: ersde.make_noise("brownian", torch.zeros(2, 3), 1, process=value),
                 lambda: ersde.make_noise("brownian", torch.zeros(2, 3), 1)(value, other),
                 lambda: ersde.make_noise("cpu", torch.zeros(2, 3), 1)(value),
                 lambda: NOISE_SCALES["sde_5"](value), lambda: NOISE_SCALES["sde"].phi(2.0, value),
                 lambda: ersde.Preset(value), lambda: ersde.Preset("mine", value), lambda: ersde.Preset("mine", label=value),
                 lambda: ersde.Preset("mine", description=value), lambda: PRESETS["sde"].replace(eta=value)):
        found = refused(call)
        assert not isinstance(found, torch.Tensor) or not found.isnan().any()


@quick
@given(st.sampled_from(["raises", "returns"]), ANYTHING)
def test_any_noise_scale_of_a_users_own(what, value):
    def phi(lam):
        if what == "raises":
            raise ZeroDivisionError("its own")
        return value

    x, model = torch.full((2, 4), 9.0), gaussian()
    call = lambda: ersde.sample_er_sde(model, x, torch.tensor([10.0, 3.0, 0.0]), disable=True, noise_scale=phi)
    if what == "raises":
        with pytest.raises(ZeroDivisionError, match="its own"):
            call()
    else:
        assert refused(call) is None and model.calls == 0


@pytest.mark.parametrize("phi", [
    lambda lam: lam * math.nan, lambda lam: lam * 0, lambda lam: -lam, lambda lam: lam ** 0.5, lambda lam: lam.long(),
    lambda lam: lam[..., :1], lambda lam: lam + 0j, lambda lam: lam > 1, lambda lam: torch.where(lam > 3, math.nan, lam)])
def test_a_noise_scale_that_is_none(phi):
    model, sigmas = gaussian(), torch.tensor([9.0, 3.0, 1.0, 0.0])
    with pytest.raises((TypeError, ValueError), match="noise_scale"), clean():
        ersde.sample_er_sde(model, torch.full((2, 4), 9.0), sigmas, disable=True, noise_scale=phi)
    assert model.calls == 0


def test_a_noise_scale_with_a_gradient():
    power = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    phi = lambda lam: lam ** power
    x, sigmas = torch.full((2, 4), 9.0), torch.tensor([10.0, 3.0, 1.0, 0.0])
    with clean():
        for kind in NOISES:
            out = ersde.sample_er_sde(gaussian(), x, sigmas, {"seed": 1}, disable=True, noise_scale=phi, noise_sampler=kind)
            assert not out.requires_grad and torch.isfinite(out).all()
        assert torch.isfinite(ersde.make_noise("brownian", x, 1, noise_scale=phi)(3.0, 2.0)).all()


@quick
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=20, unique=True), st.floats(-1, 2), st.booleans())
def test_any_part_of_any_hosts_schedule(table, percent, ascending):
    """A percent becomes a sigma of the host's range, infinity before it or 0 after it, and later is lower."""
    table = sorted(table, reverse=not ascending)
    model = type("Model", (), {"sigmas": torch.tensor(sorted(table))})()
    with clean():
        found = [hosts.percent_to_sigma(model, np.array(table), p) for p in (percent, percent + 0.1)]
    assert found[0] >= found[1]
    assert all(s in (math.inf, 0.0) or min(table) * 0.999 <= s <= max(table) * 1.001 for s in found)


@quick
@given(ANYTHING)
def test_any_model_object_has_a_process(value):
    assert hosts.read_process(value) in ("ve", "flow")
