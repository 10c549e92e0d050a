"""The public functions: signature, bad input, what a host sees of a run."""
import inspect
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from problems import flow_schedule, gaussian, karras, separated

import ersde
from ersde.hosts import percent_to_sigma, read_process

ROOT = Path(__file__).parents[1]
X = torch.full((2, 4), 10.0)


def sample(sigmas=None, x=X, model=None, **kw):
    sigmas = karras(6).float() if sigmas is None else sigmas
    return ersde.sample_er_sde(model or gaussian(), x, sigmas, disable=True, **kw)


def test_signature_is_the_contract():
    assert str(inspect.signature(ersde.sample_er_sde)) == (
        "(model, x, sigmas, extra_args=None, callback=None, disable=None, *, eta=1.0, s_noise=1.0, noise_sampler=None, "
        "noise_scale='sde_5', order=3, corrector=True, method='exact', process=None)")


def test_preset_functions_show_their_settings():
    parameters = inspect.signature(ersde.sample_er_sde_flat).parameters
    assert list(parameters)[:6] == ["model", "x", "sigmas", "extra_args", "callback", "disable"]
    assert parameters["eta"].default == ersde.PRESETS["flat"].eta
    with pytest.raises(TypeError, match="unknown field 'etta'"):
        ersde.sample_er_sde_flat(gaussian(), X, karras(4), etta=1)


def test_the_library_imports_no_host():
    code = ("import sys, ersde, ersde.hosts; bad = {'comfy', 'modules', 'k_diffusion', 'matplotlib', 'sklearn', 'PIL'} "
            "& set(sys.modules); sys.exit(repr(bad) if bad else 0)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("change, error, words", [
    (dict(noise_scale="sde_7"), ValueError, ["noise_scale", "sde_7", "sde_5", "did you mean"]),
    (dict(noise_scale=3), TypeError, ["noise_scale", "3", "callable"]),
    (dict(method="fast"), ValueError, ["method", "fast", "exact"]),
    (dict(process="vp"), ValueError, ["process", "vp", "flow"]),
    (dict(eta=-0.1), ValueError, ["eta", "-0.1", "at least 0"]),
    (dict(eta=float("nan")), ValueError, ["eta", "nan", "finite"]),
    (dict(eta=float("inf")), ValueError, ["eta", "inf", "finite"]),
    (dict(eta="1"), TypeError, ["eta", "'1'", "number"]),
    (dict(eta=True), TypeError, ["eta", "True", "number"]),
    (dict(s_noise=-1), ValueError, ["s_noise", "-1", "at least 0"]),
    (dict(s_noise=float("nan")), ValueError, ["s_noise", "nan", "finite"]),
    (dict(order=0), ValueError, ["order", "0", "between 1 and 5"]),
    (dict(order=6), ValueError, ["order", "6", "between 1 and 5"]),
    (dict(order=4, method="paper"), ValueError, ["order", "4", "between 1 and 3"]),
    (dict(order=2.5), TypeError, ["order", "2.5", "whole number"]),
    (dict(corrector=1), TypeError, ["corrector", "1", "True or False"]),
    (dict(x=torch.zeros(2, 4, dtype=torch.int64)), TypeError, ["x", "int64", "floating"]),
    (dict(x=torch.zeros(())), ValueError, ["x", "batch"]),
    (dict(x=[1.0]), TypeError, ["x", "list"]),
    (dict(sigmas=torch.ones(2, 3)), ValueError, ["sigmas", "1-D", "(2, 3)"]),
    (dict(sigmas=torch.tensor([3.0, float("nan"), 0.0])), ValueError, ["sigmas", "finite", "nan", "index 1"]),
    (dict(sigmas=torch.tensor([float("inf"), 1.0])), ValueError, ["sigmas", "finite", "inf", "index 0"]),
    (dict(sigmas=torch.tensor([3.0, 1.0, -1.0])), ValueError, ["sigmas", "negative", "-1", "index 2"]),
    (dict(sigmas=torch.tensor([3.0, 1.0, 2.0, 0.0])), ValueError, ["sigmas", "descending", "1 -> 2", "index 1"]),
    (dict(sigmas=torch.tensor([1.0, 2.0, 3.0])), ValueError, ["sigmas", "inversion", "eta=0", "sde_5"]),
    (dict(sigmas=torch.tensor([0.0, 2.0, 3.0]), eta=0), ValueError, ["sigmas", "above 0"]),
    (dict(sigmas="karras"), TypeError, ["sigmas", "str"]),
    (dict(sigmas=torch.tensor([1.5, 1.0, 0.0]), process="flow"), ValueError, ["sigmas", "at most 1", "1.5"]),
    (dict(noise_scale=lambda lam: lam ** 0.5), ValueError, ["noise_scale", "must not fall", "lambda"]),
    (dict(noise_scale=lambda lam: -lam), ValueError, ["noise_scale", "positive"]),
    (dict(noise_scale=lambda lam: 1.0), TypeError, ["noise_scale", "tensor", "shape"]),
])
def test_bad_input_is_named(change, error, words):
    model = gaussian()
    with pytest.raises(error) as info:
        sample(model=model, **change)
    for word in words:
        assert word in str(info.value)
    assert model.calls == 0         # refused before the first model call


@pytest.mark.parametrize("sigmas", [torch.zeros(0), torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([0.0, 0.0])])
def test_too_short_a_schedule_returns_x(sigmas):
    model = gaussian()
    assert sample(sigmas, model=model) is X and model.calls == 0


def test_nan_names_the_first_step_and_sigma():
    sigmas = karras(8).float()
    for bad in (0, 3, 7):
        calls = []

        def model(x, sigma):
            calls.append(sigma)
            out = 0.5 * x
            if len(calls) == bad + 1:
                out[1, 2] = float("nan")
            return out

        with pytest.raises(FloatingPointError) as info:
            sample(sigmas, model=model, extra_args={})
        assert f"step {bad} of 8" in str(info.value) and f"sigma = {sigmas[bad].item():.6g}" in str(info.value)


def test_nan_in_the_noise_shows_up_in_the_next_evaluation():
    with pytest.raises(FloatingPointError, match="step 1 of 6.*or the noise of the step before"):
        sample(noise_sampler=lambda *_: torch.full_like(X, float("nan")))


def test_overflow_of_the_state_is_not_blamed_on_the_model():
    with pytest.raises(FloatingPointError, match="every evaluation was finite.*float16"):
        sample(torch.tensor([60000.0, 50000.0]), x=X.half(), noise_scale="sde", model=lambda x, sigma: 0 * x,
               noise_sampler=lambda *_: torch.full_like(X, 4.0).half())


def test_a_dtype_too_narrow_for_the_schedule_is_named():
    with pytest.raises(ValueError, match="float16.*sigmas.*100000"):
        sample(torch.tensor([1e5, 9e4, 1.0]), x=X.half())


def test_x_is_never_written_to_nor_what_the_callback_saw():
    x = torch.randn(2, 4) * 14
    before = x.clone()
    seen = []
    model = separated(dim=4)
    out = ersde.sample_er_sde(model, x, karras(8).float(), {"seed": 1}, disable=True, callback=lambda info: seen.append(
        (info["x"], info["x"].clone(), info["denoised"], info["denoised"].clone())))
    assert torch.equal(x, before) and len(seen) == 8
    for state, copy, denoised, denoised_copy in seen:
        assert torch.equal(state, copy) and torch.equal(denoised, denoised_copy)
    assert out is not x


def test_callback_is_k_diffusions():
    sigmas = karras(5).float()
    seen = []
    sample(sigmas, callback=seen.append)
    assert [info["i"] for info in seen] == [0, 1, 2, 3, 4]
    for info, sigma in zip(seen, sigmas):
        assert set(info) == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert info["sigma"] == sigma and info["sigma_hat"] == sigma and info["denoised"].shape == X.shape


def test_model_sees_sigma_per_image_in_x_dtype():
    seen = []

    def model(x, sigma, **kw):
        seen.append((sigma, kw))
        return 0.5 * x

    sample(karras(3).float(), x=X.double(), model=model, extra_args={"cond": 1})
    assert all(sigma.shape == (2,) and sigma.dtype == torch.float64 and kw == {"cond": 1} for sigma, kw in seen)


def test_one_model_call_per_step_and_repeated_or_trailing_zero_sigmas():
    for sigmas, calls in (([8, 4, 4, 1, 0], 4), ([8, 8, 8, 0], 3), ([8, 4, 0, 0, 0], 2), ([8, 4, 1], 2)):
        model = gaussian()
        out = sample(torch.tensor(sigmas, dtype=torch.float32), model=model)
        assert model.calls == calls and torch.isfinite(out).all()


@pytest.mark.parametrize("method", ["exact", "paper", "comfyui"])
@pytest.mark.parametrize("sigmas", [[1, 1, 0.5, 0.2, 0], [1, 1, 1, 0.5, 0], [1, 0.5, 0.5, 0.5, 0.1], [1, 1], [1, 0]])
def test_repeated_sigmas_of_a_flow_model(sigmas, method):
    model = gaussian(process="flow")
    for corrector in (False, True):
        out = sample(torch.tensor(sigmas, dtype=torch.float32), x=torch.randn(2, 4), model=model, process="flow",
                     method=method, corrector=corrector)
        assert torch.isfinite(out).all()


def test_error_in_callback_or_model_passes_through():
    def stop(info):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(callback=stop)


def test_same_seed_same_picture_and_the_global_generator_is_left_alone():
    model = separated(dim=4)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a = sample(model=model, extra_args={"seed": 4})
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, sample(model=model, extra_args={"seed": 4}))
    assert not torch.equal(a, sample(model=model, extra_args={"seed": 5}))
    torch.manual_seed(0)
    b = sample(model=model)
    torch.manual_seed(0)
    assert torch.equal(b, sample(model=model)) and not torch.equal(a, b)


def test_only_the_history_is_kept():
    """Memory: of the evaluations, a run holds the ones its steps still need."""
    alive = []

    def model(x, sigma):
        out = 0.5 * x
        alive.append(weakref.ref(out))
        assert sum(ref() is not None for ref in alive) <= 3 + 2 + 1      # order, two more for the corrector, and this one
        return out

    sample(karras(20).float(), model=model)
    assert len(alive) == 20


def test_no_gradient_is_kept():
    x = X.clone().requires_grad_()
    assert not sample(x=x).requires_grad


class CONST:
    """Stands for the host's class: told by its name."""


class Shifted(CONST):
    @staticmethod
    def percent_to_sigma(percent):
        return 1.0 - percent ** 2


class Thing:
    def __init__(self, **kw):
        self.__dict__.update(kw)


def comfy(sampling):
    return Thing(inner_model=Thing(model_patcher=Thing(get_model_object=lambda name: {"model_sampling": sampling}[name])))


def test_process_is_read_off_the_hosts_model():
    assert read_process(comfy(Shifted())) == "flow"
    assert read_process(comfy(Thing())) == "ve"
    unet = Thing(model=Thing(model_sampling=Shifted()))
    assert read_process(Thing(inner_model=Thing(inner_model=Thing(forge_objects=Thing(unet=unet))))) == "flow"
    for kind, process in (("const", "flow"), ("epsilon", "ve")):
        assert read_process(Thing(inner_model=Thing(predictor=Thing(prediction_type=kind)))) == process
    assert read_process(Thing(inner_model=Thing(inner_model=Thing(add_noise_to_latent=None)))) == "flow"
    assert read_process(gaussian()) == "ve"


def test_window_is_read_off_the_hosts_model():
    sigmas = karras(10).numpy()
    assert percent_to_sigma(comfy(Shifted()), sigmas, 0.5) == 0.75
    table = Thing(inner_model=Thing(sigmas=torch.logspace(-2, 2, 9)))
    assert percent_to_sigma(table, sigmas, 0.25) == pytest.approx(10.0)
    assert percent_to_sigma(table, sigmas, 0.3125) == pytest.approx(10 ** 0.75)
    assert percent_to_sigma(gaussian(), sigmas, 0.5) == pytest.approx(sigmas[5])
    assert percent_to_sigma(gaussian(), sigmas, 0.0) == float("inf") and percent_to_sigma(gaussian(), sigmas, 1.0) == 0.0


@pytest.mark.parametrize("wrap, first", [
    (lambda model: model, 1 - 1e-4),
    (lambda model: Wrapped(model, model_patcher=Thing(get_model_object=lambda name: Steep())), 1 - 1e-3),
    (lambda model: Wrapped(model, sigmas=torch.linspace(0, 1, 1001)), 1 - 1e-4),
])
def test_comfyui_starts_a_flow_model_where_the_host_does(wrap, first):
    """Its formulas have no step from sigma = 1; "exact" starts there as it is."""
    model = gaussian(process="flow")
    for method, want in (("comfyui", first), ("exact", 1.0)):
        seen = []
        sample(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), x=torch.ones(2, 4, dtype=torch.float64),
               model=wrap(model), process="flow", method=method, callback=lambda info: seen.append(info["sigma"].item()))
        assert seen[0] == pytest.approx(want, rel=0, abs=1e-7) and seen[1] == 0.5


class Steep(CONST):
    @staticmethod
    def percent_to_sigma(percent):
        return 1.0 - 10 * percent


class Wrapped:
    """A model behind a host's attributes."""

    def __init__(self, model, **inner):
        self.model, self.inner_model = model, Thing(**inner)

    def __call__(self, x, sigma, **kw):
        return self.model(x, sigma, **kw)


def test_a_flow_schedule_a_rounding_above_1_is_a_schedule_from_1():
    """ComfyUI's shift in float32: 1.32 t / (1 + 0.32 t) is 1.0000001 at t = 1."""
    t = torch.linspace(1, 0, 7)
    sigmas = 1.32 * t / (1 + (1.32 - 1) * t)
    assert sigmas[0] > 1
    exact = sigmas.clamp(max=1)
    for method in ("exact", "comfyui"):
        got, want = (sample(s, X, gaussian(process="flow"), process="flow", method=method, eta=0.0) for s in (sigmas, exact))
        assert torch.allclose(got, want, rtol=1e-5)
    with pytest.raises(ValueError, match="at most 1"):
        sample(sigmas * 1.001, X, gaussian(process="flow"), process="flow")


class Switching:
    """Two models in one, as a refiner is: from call number `at` on it is the second."""

    def __init__(self, first, second, at):
        self.models, self.at, self.calls, self.process = (first, second), at, 0, first.process

    def __call__(self, x, sigma, **extra_args):
        self.calls += 1
        return self.models[self.calls > self.at](x, sigma)

    def fresh(self):
        return self.calls == self.at + 1


@pytest.mark.parametrize("process", ["ve", "flow"])
@pytest.mark.parametrize("preset", ["sde_5", "sde", "ode", "few_steps", "comfyui", "flat"])
@pytest.mark.parametrize("at", [0, 1, 5, 11])
def test_another_model_is_a_new_run_from_there(process, preset, at):
    """What follows uses evaluations of the new model alone, with the noise that it would have had anyway.

    The noise of the default sampler is named by its sigma, so the two halves draw what the whole draws.
    """
    sigmas = karras(12) if process == "ve" else flow_schedule(12)
    first, second = separated(process), gaussian(0.6, -0.4, process=process)
    second.means, second.std = torch.full((1, first.dim), -0.4), torch.full((1,), 0.6)
    x = first.start(3, sigmas[0].item(), torch.Generator().manual_seed(0)).double()
    settings = dict(disable=True, process=process, extra_args={"seed": 9}, window=(3.0, 0.1) if preset == "flat" else None)
    both, seen = Switching(first, second, at), []
    out = ersde.sample_preset(both, x, sigmas, preset, fresh=both.fresh, callback=lambda d: seen.append(d["i"]), **settings)
    head = ersde.sample_preset(first, x, sigmas[:at + 1], preset, **settings)
    want = ersde.sample_preset(second, head, sigmas[at:], preset, **settings)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    assert seen == list(range(12)) and both.calls == 12


def test_without_a_restart_the_old_models_evaluations_would_count():
    sigmas = karras(12)
    first, second = gaussian(0.5, 0.3), gaussian(0.6, -0.4)
    x = first.start(3, sigmas[0].item(), torch.Generator().manual_seed(0))
    runs = []
    for restart in (True, False):
        model = Switching(first, second, 6)
        runs.append(ersde.sample_preset(model, x, sigmas, "ode", disable=True, process="ve",
                                        fresh=model.fresh if restart else None))
    assert (runs[0] - runs[1]).abs().max() > 1e-3


def test_nan_after_a_restart_is_found_by_its_step():
    sigmas = karras(6)
    model = Switching(gaussian(), lambda x, sigma: x * float("nan"), 3)
    with pytest.raises(FloatingPointError, match=f"step 3 of 6.*sigma = {sigmas[3].item():.6g}"):
        ersde.sample_preset(model, X.double(), sigmas, "sde_5", disable=True, process="ve", fresh=model.fresh)
