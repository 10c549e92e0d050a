"""The sampler as a numerical method: order, moments, agreement with the published formulas and with its peers."""
import math

import numpy as np
import pytest
import torch
from problems import digits, flow_exact, flow_schedule, gaussian, karras, published, rms, separated

import ersde
from ersde.noise_scale import NOISE_SCALES, get_noise_scale
from ersde.process import check_sigmas, get_process
from ersde.solver import run
from ersde.weights import make_plan

METHODS = ("exact", "paper", "comfyui")
PROCESSES = ("ve", "flow")


def sample(model, x, sigmas, **kw):
    return ersde.sample_er_sde(model, x, sigmas, disable=True, process=model.process, **kw)


def gaussian_flow(model, x, sigma_s, sigma_t):
    """The probability flow of isotropic Gaussian data, exactly: y - mean scales with sqrt(std^2 + lambda^2)."""
    process = get_process(model.process)
    (a_s, a_t), (l_s, l_t) = process.alpha(np.array([sigma_s, sigma_t])), process.lam(np.array([sigma_s, sigma_t]))
    mean, var = model.means[0], model.std[0] ** 2
    return a_t * (mean + (x / a_s - mean) * ((var + l_t ** 2) / (var + l_s ** 2)) ** 0.5)


def schedule(process, steps):
    """Equal steps of log lambda from 10 to 0.1, so that all halve, and none is long, when their number doubles.

    On equal steps of a flow model's sigma the errors at these numbers of steps are smaller, but change sign on the way.
    """
    lam = 10 * (0.1 / 10) ** np.linspace(0, 1, steps + 1)
    return lam if process == "ve" else lam / (1 + lam)


def slope(steps, errors):
    """Observed order: least squares of log error against log step."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def errors(process, order, corrector, steps, exact_start, method="exact"):
    """RMS errors on Gaussian data for each number of steps; `exact_start` starts from exact earlier evaluations."""
    model = gaussian(0.5, 0.3, process=process)
    out = []
    for n in steps:
        sigmas = schedule(process, n)
        x0 = model.start(16, sigmas[0], torch.Generator().manual_seed(0))
        first = order + 1 if exact_start else 0
        path = [gaussian_flow(model, x0, sigmas[0], s) for s in sigmas[:first + 1]]
        past = [model(path[i], torch.full((16,), sigmas[i], dtype=torch.float64)) for i in range(first)][::-1]
        plan = make_plan(sigmas[first:], get_process(process), get_noise_scale("ode"), np.zeros(n - first), order=order,
                         corrector=corrector, method=method, history=sigmas[:first][::-1])
        x = run(plan, model, path[-1], torch.tensor(sigmas[first:]), None, {}, None, True, history=past)
        out.append(rms(x, gaussian_flow(model, x0, sigmas[0], sigmas[-1])))
    return out


STEPS = (32, 64, 128, 256, 512)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("order, least", [(1, 0.9), (2, 1.9), (3, 2.7), (4, 3.6), (5, 4.4)])
def test_observed_order(process, order, least):
    steps = STEPS if order < 4 else STEPS[:4]       # beyond, rounding takes over
    assert slope(steps, errors(process, order, False, steps, True)) >= least
    with_corrector = errors(process, order, True, steps[:4 if order < 4 else 3], True)
    assert slope(steps[:len(with_corrector)], with_corrector) >= least + 0.8


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("order, least", [(1, 0.9), (2, 1.9), (3, 2.7)])
def test_observed_order_from_an_ordinary_start(process, order, least, record_property):
    for corrector in (False, True):
        found = slope(STEPS, errors(process, order, corrector, STEPS, False))
        record_property(f"slope_corrector_{corrector}", found)
        assert found >= least


@pytest.mark.parametrize("process", PROCESSES)
def test_published_third_order_is_second_order(process):
    """Why "exact" is not the published formula with better integrals."""
    assert slope(STEPS, errors(process, 3, False, STEPS, True, method="paper")) < 2.4


@pytest.mark.parametrize("process", PROCESSES)
def test_far_below_comfyui_on_a_mixture(process):
    """64 steps: at most half of comfyui's error without the corrector, a tenth with it."""
    model = separated(process)
    sigmas = torch.tensor(np.geomspace(10, 0.1, 65) if process == "ve" else np.linspace(0.97, 0.05, 65))
    x = model.start(200, sigmas[0].item(), torch.Generator().manual_seed(0))
    exact = flow_exact(model, x, sigmas, steps=2000)
    error = {name: rms(sample(model, x, sigmas, eta=0.0, **kw), exact) for name, kw in {
        "comfyui": {"method": "comfyui"}, "plain": {"corrector": False}, "corrector": {}}.items()}
    assert error["plain"] <= 0.5 * error["comfyui"]
    assert error["corrector"] <= 0.1 * error["comfyui"]


# Moments, through the linear recursion.  With D linear in x the state is linear in (x at the start, 1, z_1, z_2, ...): the
# sampler is run on these coefficients themselves, each noise being a coefficient of its own.

def moments(process, sigmas, std, mean, **kw):
    """Mean and variance of the end state for Gaussian data N(mean, std^2), x exact at the start."""
    proc = get_process(process)
    n = len(sigmas) - 1
    state = torch.zeros(1, n + 2, dtype=torch.float64)
    state[0, 0] = 1.0
    drawn = iter(range(2, n + 2))

    def model(x, sigma):
        s = sigma.item()
        alpha = float(proc.alpha(np.array(s)))
        gain = alpha * std ** 2 / (alpha ** 2 * std ** 2 + s ** 2)
        out = gain * x
        out[0, 1] += (1 - alpha * gain) * mean
        return out

    def noise(*_):
        z = torch.zeros_like(state)
        z[0, next(drawn)] = 1.0
        return z

    out = ersde.sample_er_sde(model, state, torch.tensor(sigmas, dtype=torch.float64), disable=True, process=process,
                              noise_sampler=noise, **kw)[0]
    alpha, sigma = float(proc.alpha(np.array(sigmas[0]))), sigmas[0]
    start_var = alpha ** 2 * std ** 2 + sigma ** 2
    return (out[0] * alpha * mean + out[1]).item(), (out[0] ** 2 * start_var + (out[2:] ** 2).sum()).item()


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("scale", NOISE_SCALES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("eta", [0.3, 1.0, 1.5])
def test_moments_of_a_point_are_exact(process, scale, method, eta):
    """Data in one point: D is constant, so every step is exact however long: mean alpha m, variance sigma^2."""
    sigmas = [14.6, 6.0, 1.0, 0.9, 0.02] if process == "ve" else [1.0, 0.8, 0.3, 0.29, 0.02]
    if method == "comfyui" and process == "flow":
        sigmas[0] = 0.999       # it has no step from sigma = 1
    mean, var = moments(process, sigmas, 0.0, 0.7, noise_scale=scale, method=method, eta=eta)
    alpha = float(get_process(process).alpha(np.array(sigmas[-1])))
    assert mean == pytest.approx(alpha * 0.7, rel=1e-12)
    assert var == pytest.approx(sigmas[-1] ** 2, rel=1e-12)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("scale", NOISE_SCALES)
def test_moments_of_gaussian_data_converge(process, scale):
    """x at the end has the mean alpha m, exactly, and the variance alpha^2 s^2 + sigma^2, to second order in the step."""
    error = {}
    for n in (200, 800):
        u = np.linspace(0, 1, n + 1)
        sigmas = list(14.6 * (0.05 / 14.6) ** u if process == "ve" else 1.0 - 0.95 * u)
        mean, var = moments(process, sigmas, 0.5, 0.7, noise_scale=scale)
        alpha, sigma = float(get_process(process).alpha(np.array(sigmas[-1]))), sigmas[-1]
        assert mean == pytest.approx(alpha * 0.7, rel=1e-12)
        error[n] = abs(var / (alpha ** 2 * 0.25 + sigma ** 2) - 1)
    assert error[200] < 1e-3
    assert error[800] < error[200] / 5


@pytest.mark.parametrize("process, share", [("ve", 0.5), ("flow", 1.0)])
@pytest.mark.parametrize("steps", [10, 15, 20])
def test_variance_of_the_default_at_few_steps(process, share, steps):
    """Gaussian data on the hosts' schedules: the published default loses less variance than with comfyui's formulas."""
    sigmas = (karras(steps) if process == "ve" else flow_schedule(steps)).tolist()[:-1]
    alpha = float(get_process(process).alpha(np.array(sigmas[-1])))
    want = alpha ** 2 * 0.25 + sigmas[-1] ** 2
    ours = moments(process, sigmas, 0.5, 0.7)[1]
    sigmas[0] = min(sigmas[0], 0.9999) if process == "flow" else sigmas[0]
    theirs = moments(process, sigmas, 0.5, 0.7, method="comfyui")[1]
    assert abs(ours / want - 1) <= share * abs(theirs / want - 1)


def test_noisy_steps_do_not_amplify_high_order_differences():
    """Guidance 4, 10 steps of the reverse-time SDE on digits: the pictures end at the distance that data has from the means.

    comfyui's end nearer, having lost a fifth of that distance.  Taking third differences of evaluations whose noise is
    mostly fresh left blotches at four times the distance.
    """
    model = digits(guidance=4.0)
    keep = torch.arange(0, len(model.means), 8)
    model.means, model.std, model.weights, model.label = (
        v[keep] for v in (model.means, model.std, model.weights, model.label))
    x = model.start(64, 14.6, torch.Generator().manual_seed(1))
    out = sample(model, x, karras(10), noise_scale="sde", extra_args={"seed": 1})
    far = (torch.cdist(out, model.means).min(1).values / 8).square().mean().sqrt().item()
    assert 0.8 * model.std[0] < far < 1.05 * model.std[0]


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("scale", ["sde", "sde_2", "sde_4", "sde_5"])
def test_comfyui_and_paper_are_the_published_formulas(process, scale):
    model = separated(process)
    sigmas = (karras(20) if process == "ve" else torch.tensor([*np.linspace(0.98, 0.05, 20), 0.0])).float()
    x = model.start(8, sigmas[0].item(), torch.Generator().manual_seed(0)).float()
    noise = torch.randn(20, *x.shape, generator=torch.Generator().manual_seed(1))
    for method, points in (("comfyui", 200), ("paper", None)):
        draws = iter(noise)
        got = sample(model, x, sigmas, noise_scale=scale, method=method, noise_sampler=lambda *_: next(draws))
        want = published(model, x, sigmas, noise, get_noise_scale(scale).phi, process, points)
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("scale", NOISE_SCALES)
def test_eta_zero_is_the_ode(process, scale):
    model = separated(process)
    sigmas = karras(12) if process == "ve" else flow_schedule(12)
    x = model.start(4, sigmas[0].item(), torch.Generator().manual_seed(0))

    def no_noise(*_):
        raise AssertionError("the ODE draws no noise")

    got = sample(model, x, sigmas, noise_scale=scale, eta=0.0, noise_sampler=no_noise)
    torch.testing.assert_close(got, sample(model, x, sigmas, noise_scale="ode"), rtol=1e-12, atol=1e-12)


def test_callable_equals_its_name():
    model = separated()
    x = model.start(4, 14.6, torch.Generator().manual_seed(0))
    args = dict(extra_args={"seed": 5})
    for name, phi in {"sde": lambda v: v ** 2, "sde_5": lambda v: v * ((v ** 0.3).exp() + 10)}.items():
        torch.testing.assert_close(sample(model, x, karras(10), noise_scale=phi, **args),
                                   sample(model, x, karras(10), noise_scale=name, **args), rtol=1e-9, atol=1e-9)


def test_flow_from_sigma_one_needs_no_offset():
    """sigma = 1 exactly is the limit of sigma -> 1."""
    model = separated("flow")
    x = model.start(64, 1.0, torch.Generator().manual_seed(0))
    sigmas = flow_schedule(10)
    near = sigmas.clone()
    near[0] = 1 - 1e-9
    for scale in NOISE_SCALES:
        got, want = (sample(model, x, s, noise_scale=scale, corrector=False, extra_args={"seed": 1}) for s in (sigmas, near))
        # The start-up's correction differs (a line in sigma against one in lambda), all else is the limit.  One point in a
        # hundred is between two parts and ends in another, so there are many.
        assert torch.isfinite(got).all()
        assert rms(got, want) < 0.1 * rms(want, torch.zeros(()))


@pytest.mark.parametrize("scale", NOISE_SCALES)
def test_which_noise_scales_replace_the_first_noise_of_a_flow_model(scale):
    """From lambda = infinity rho = (g_t / g_s)^eta lambda_s / lambda_t of the noise is left: what the nodes say of eta."""
    model, sigmas = separated("flow"), flow_schedule(12)
    first, other = (model.start(64, 1.0, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    one, two = (sample(model, x, sigmas, noise_scale=scale, eta=0.01, extra_args={"seed": 1}) for x in (first, other))
    kept = rms(one, two) / rms(one, one.flip(0))
    assert kept > 0.5 if scale in ("ode", "sde_1", "sde_4") else kept < 1e-6


@pytest.mark.parametrize("order, corrector", [(1, True), (2, False), (3, True)])
def test_order_from_sigma_one(order, corrector):
    """The step from lambda = infinity does not spoil what follows it: near second order from sigma = 1, the steps there
    being as long as they are in log lambda."""
    model = gaussian(1.0, 0.3, process="flow")
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = 0.3
    # lambda -> infinity of gaussian_flow: there x / sigma is the noise itself.
    exact = (1 - end) * (0.3 + x * (1 + (end / (1 - end)) ** 2) ** 0.5)
    error = [rms(sample(model, x, torch.linspace(1, end, n + 1, dtype=torch.float64), eta=0.0, order=order,
                        corrector=corrector), exact) for n in (64, 128, 256, 512)]
    assert slope((64, 128, 256, 512), error) >= 1.8


@pytest.mark.parametrize("process", PROCESSES)
def test_inversion_comes_back(process):
    """Up the schedule and down again with the ODE."""
    model = gaussian(0.5, 0.3, process=process)
    sigmas = torch.tensor(np.geomspace(10, 0.05, 200) if process == "ve" else np.linspace(0.95, 0.05, 200))
    x = model.start(4, 0.05, torch.Generator().manual_seed(0))
    up = sample(model, x, sigmas.flip(0), eta=0.0)
    torch.testing.assert_close(up, gaussian_flow(model, x, 0.05, sigmas[0].item()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sample(model, up, sigmas, eta=0.0), x, rtol=1e-5, atol=1e-5)


def test_inversion_to_sigma_one_of_a_flow_model():
    model = gaussian(0.5, 0.3, process="flow")
    x = model.start(4, 0.05, torch.Generator().manual_seed(0))
    sigmas = torch.linspace(0.05, 1.0, 400, dtype=torch.float64)
    up = sample(model, x, sigmas, eta=0.0)
    want = (x / 0.95 - 0.3) / math.sqrt(0.25 + (0.05 / 0.95) ** 2)       # lambda -> infinity of gaussian_flow
    torch.testing.assert_close(up, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("process", PROCESSES)
def test_a_split_run_is_the_whole_run(process):
    """With the history handed on, the second half continues bit for bit; the noise is named by its sigma."""
    model = separated(process)
    sigmas = karras(16) if process == "ve" else flow_schedule(16)
    x = model.start(3, sigmas[0].item(), torch.Generator().manual_seed(0))
    whole = sample(model, x, sigmas, extra_args={"seed": 9}, corrector=False)
    past = []
    head = sample(model, x, sigmas[:9], extra_args={"seed": 9}, corrector=False,
                  callback=lambda info: past.insert(0, info["denoised"]))
    values = sigmas.numpy()
    from ersde.noise import SeededNoise
    noise = SeededNoise(x, 9)
    plan = make_plan(check_sigmas(sigmas[8:], get_process(process)), get_process(process), get_noise_scale("sde_5"),
                     np.ones(8), corrector=False, history=values[:8][::-1])
    tail = run(plan, model, head, sigmas[8:], lambda i: noise(values[8 + i]), {}, None, True, history=past)
    torch.testing.assert_close(tail, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
@pytest.mark.parametrize("shape", [(2, 8), (3, 2, 2, 2), (1, 2, 1, 2, 2)])
@pytest.mark.parametrize("process", PROCESSES)
def test_dtypes_and_shapes(process, dtype, tolerance, shape):
    """Image latents (4-D) and video latents (5-D), in every dtype, stay near float64."""
    model = gaussian(0.5, 0.3, dim=8, process=process)
    sigmas = karras(10) if process == "ve" else flow_schedule(10)
    x = model.start(shape[0], sigmas[0].item(), torch.Generator().manual_seed(0)).reshape(shape)
    want = sample(model, x, sigmas, extra_args={"seed": 3})
    got = sample(model, x.to(dtype), sigmas.float(), extra_args={"seed": 3})
    assert got.dtype == dtype and got.shape == x.shape
    assert rms(got.double(), want) < tolerance * rms(want, torch.zeros(()))


def test_a_batch_equals_its_single_images():
    model = separated()
    x = model.start(3, 14.6, torch.Generator().manual_seed(0)).float()
    batch = sample(model, x, karras(8).float(), extra_args={"seed": 3})
    one = sample(model, x[:1], karras(8).float(), extra_args={"seed": 3})
    torch.testing.assert_close(batch[:1], one)


def test_every_preset_is_a_sampler():
    model = separated()
    x = model.start(2, 14.6, torch.Generator().manual_seed(0))
    for name, preset in ersde.PRESETS.items():
        function = getattr(ersde, f"sample_er_sde_{name}")
        assert function.__name__ == f"sample_er_sde_{name}"
        got = function(model, x, karras(8), {"seed": 1}, None, True)
        torch.testing.assert_close(got, ersde.sample_preset(model, x, karras(8), preset, {"seed": 1}, None, True))


def test_window_limits_the_noise():
    """Outside the stochastic window a step is the ODE's: no noise is drawn there."""
    model = separated()
    x = model.start(2, 14.6, torch.Generator().manual_seed(0))
    sigmas = karras(10)
    seen = []

    def noise(sigma, sigma_next):
        seen.append(sigma.item())
        return torch.randn_like(x)

    ersde.sample_preset(model, x, sigmas, "sde", None, None, True, noise_sampler=noise, window=(5.0, 0.5))
    assert seen == [s for s in sigmas.tolist() if 5.0 >= s > 0.5]
    seen.clear()
    # Without a host, parts of the schedule count in steps.
    ersde.sample_er_sde_sde(model, x, sigmas, noise_sampler=noise, start=0.2, end=0.7, disable=True)
    assert seen == sigmas.tolist()[2:7]


def test_k_diffusion_wrappers_are_hosts():
    """The denoiser wrappers of the k_diffusion package (eps and v models), against the denoiser they wrap."""
    external = pytest.importorskip("k_diffusion.external")
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    bars = torch.cumprod(1 - betas, 0).float()
    truth = separated()

    class Inner:
        alphas_cumprod = bars

        def __init__(self, v):
            self.v = v

        def apply_model(self, x, t, cond=None, **_):
            bar = bars[t.round().long()][:, None]
            sigma = ((1 - bar) / bar).sqrt()
            eps = (x / bar.sqrt() - truth(x / bar.sqrt(), sigma[:, 0])) / sigma
            return bar.sqrt() * eps - (1 - bar).sqrt() * truth(x / bar.sqrt(), sigma[:, 0]) if self.v else eps

    for wrapper in (external.CompVisDenoiser(Inner(False), quantize=True),
                    external.CompVisVDenoiser(Inner(True), quantize=True)):
        sigmas = torch.cat([wrapper.sigmas[torch.linspace(999, 20, 24).long()], torch.zeros(1)])
        x = truth.start(4, sigmas[0].item(), torch.Generator().manual_seed(0)).float()
        got = ersde.sample_er_sde(wrapper, x, sigmas, {"seed": 2, "cond": None}, disable=True)
        want = ersde.sample_er_sde(truth, x, sigmas, {"seed": 2}, disable=True)
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_better_than_k_diffusion_at_equal_calls():
    """The real peers, same start, on the ODE: 20 calls."""
    sampling = pytest.importorskip("k_diffusion.sampling")
    model = separated()
    sigmas = karras(20)
    x = model.start(100, sigmas[0].item(), torch.Generator().manual_seed(0))
    exact = flow_exact(model, x, sigmas)
    ours = rms(sample(model, x, sigmas, eta=0.0), exact)
    for peer in ("sample_euler", "sample_lms", "sample_dpmpp_2m"):
        assert ours < rms(getattr(sampling, peer)(model, x, sigmas, disable=True), exact)
