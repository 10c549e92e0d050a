"""The step integrals against high-precision quadrature, and the plan's rules."""
import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ersde.noise_scale import NOISE_SCALES, get_noise_scale
from ersde.process import check_sigmas, get_process
from ersde.weights import VARIABLES, StepIntegrals, divided_difference, known_plan, make_plan

mp.mp.dps = 25

# log g from the formulas of the paper's table, in mpmath and independent of ersde.noise_scale.
LOG_G = {
    "ode": lambda lam: mp.mpf(0),
    "sde": lambda lam: mp.log(lam),
    "sde_1": lambda lam: mp.log(mp.exp(-1 / lam) + 10),
    "sde_2": lambda lam: mp.log(lam) / 2,
    "sde_3": lambda lam: mp.log(lam) * 3 / 2,
    "sde_4": lambda lam: -mp.log(lam) / 10 + mp.log(mp.log10(1 + 100 * lam ** mp.mpf("1.5"))),
    "sde_5": lambda lam: mp.log(mp.exp(lam ** mp.mpf("0.3")) + 10),
}
TAU = {"lambda": lambda lam: lam, "asinh": mp.asinh, "log": mp.log, "unit": lambda lam: lam / (1 + lam)}
STEPS = [(14.6, 9.7), (1.0, 0.99), (0.5, 0.2), (80.0, 0.002), (1e5, 1e3), (0.03, 0.029), (3.0, 0.03)]


# d log g / d log lambda.
SLOPE = {
    "ode": lambda lam: mp.mpf(0),
    "sde": lambda lam: mp.mpf(1),
    "sde_1": lambda lam: mp.exp(-1 / lam) / lam / (mp.exp(-1 / lam) + 10),
    "sde_2": lambda lam: mp.mpf(1) / 2,
    "sde_3": lambda lam: mp.mpf(3) / 2,
    "sde_4": lambda lam: 150 * lam ** mp.mpf("1.5") / (1 + 100 * lam ** mp.mpf("1.5"))
    / mp.log(1 + 100 * lam ** mp.mpf("1.5")) - mp.mpf("0.1"),
    "sde_5": lambda lam: mp.mpf("0.3") * lam ** mp.mpf("0.3") / (1 + 10 * mp.exp(-lam ** mp.mpf("0.3"))),
}


def reference(name, eta, lam_s, lam_t, nodes, variable):
    """c_1 .. c_K as integrals of N_k phi_t phi' / phi^2: the form before integrating by parts."""
    tau = TAU[variable]
    lam_s, lam_t, eta = mp.mpf(lam_s), mp.mpf(lam_t), mp.mpf(eta)
    nodes = [mp.mpf(float(n)) for n in nodes]
    log_phi_t = mp.log(lam_t) + eta * LOG_G[name](lam_t)
    length = mp.log(lam_s / lam_t)
    cuts = mp.linspace(mp.log(lam_t), mp.log(lam_s), 2 + int(length / 2))
    seen = {}

    def factor(u):
        # In u = log lambda, dphi / phi^2 = (dlog phi / du) exp(-log phi) du.
        if u not in seen:
            lam = mp.exp(u)
            ratio = mp.exp(log_phi_t - u - eta * LOG_G[name](lam))
            seen[u] = tau(lam), (1 + eta * SLOPE[name](lam)) * ratio
        return seen[u]

    def integral(k):
        def f(u):
            at, rate = factor(u)
            return mp.fprod(at - node for node in nodes[:k]) * rate
        return float(mp.quad(f, cuts))

    return [integral(k) for k in range(1, len(nodes) + 1)]


@pytest.mark.parametrize("name, variable", [(name, "lambda") for name in NOISE_SCALES] + [
    (name, variable) for name in ("sde", "sde_4", "sde_5") for variable in ("asinh", "log", "unit")])
def test_integrals_against_high_precision(name, variable):
    for lam_s, lam_t in STEPS if variable == "lambda" else STEPS[:3]:
        if name == "sde_4" and lam_s > 900:
            continue        # beyond its peak g is held: see test_noise_scale
        nodes = VARIABLES[variable].tau(np.array([lam_s, lam_s * 1.3, lam_s * 1.8]))
        got = StepIntegrals(np.array([lam_s]), np.array([lam_t]), NOISE_SCALES[name], np.array([0.7])).newton(
            nodes[:, None], VARIABLES[variable])[:, 0]
        want = reference(name, 0.7, lam_s, lam_t, nodes, variable)
        # 1e-12, but the nodes themselves are float64, which a short step feels.
        np.testing.assert_allclose(got, want, rtol=1e-12 + 3e-14 / abs(np.log(lam_s / lam_t)))


@pytest.mark.parametrize("name", ["ode", "sde", "sde_2", "sde_3"])
def test_closed_form_agrees_with_quadrature(name):
    lam_s, lam_t = np.array([s for s, _ in STEPS]), np.array([t for _, t in STEPS])
    integrals = StepIntegrals(lam_s, lam_t, NOISE_SCALES[name], np.full(len(lam_s), 0.7))
    nodes = np.stack([lam_s, lam_s * 1.3, lam_s * 1.8, lam_s * 2.6, lam_s * 4])
    closed, exact = integrals._closed(nodes)
    object.__setattr__(integrals, "scale", get_noise_scale(NOISE_SCALES[name].phi))      # no closed form
    quadrature = integrals.newton(nodes, VARIABLES["lambda"])
    assert exact[:, [2, 3, 6]].all()         # long steps: the closed form is the one used
    assert not exact[-1, 1]                  # a step of 1 %: its terms cancel
    np.testing.assert_allclose(closed[exact], quadrature[exact], rtol=1e-12)


def test_long_step_integrals_have_one_sign():
    """What keeps them from cancelling: every N_k' has one sign on the step."""
    lam = np.array([50.0, 20.0, 5.0, 1.0])
    for scale in NOISE_SCALES.values():
        nodes = np.stack([lam[:-1], lam[:-1] * 2, lam[:-1] * 3])
        newton = StepIntegrals(lam[:-1], lam[1:], scale, np.ones(3)).newton(nodes, VARIABLES["lambda"])
        assert (newton[0] < 0).all() and (newton[1] > 0).all() and (newton[2] < 0).all()


def test_infinite_lambda_is_the_limit():
    """sigma = 1 of a flow model against sigma = 1 - 1e-12."""
    for scale in NOISE_SCALES.values():
        def integrals(lam):
            return StepIntegrals(np.array([lam]), np.array([4.0]), scale, np.array([1.0]))
        line = VARIABLES["unit"]
        far, near = integrals(np.inf), integrals(1e12)
        assert far.log_ratio[0] == -np.inf
        np.testing.assert_allclose(far.newton(np.array([[1.0]]), line), near.newton(np.array([[1.0]]), line), rtol=1e-6)
        np.testing.assert_allclose(np.exp(far.log_rho), np.exp(near.log_rho), atol=1e-5)


@given(st.lists(st.floats(0.05, 3.0), min_size=2, max_size=5), st.integers(0, 4))
def test_divided_difference_of_a_polynomial(gaps, degree):
    nodes = np.cumsum(gaps)
    k = len(nodes) - 1
    got = np.dot(divided_difference(nodes), nodes ** degree)
    size = np.abs(np.array(divided_difference(nodes)) * nodes ** degree).sum()
    # The k-th divided difference of y^degree is 0 below degree k and 1 at it.
    if degree <= k:
        assert abs(got - (degree == k)) <= 1e-12 * size


def plan(sigmas, process="ve", scale="ode", eta=0.0, **kw):
    process = get_process(process)
    values = check_sigmas(torch.as_tensor(sigmas, dtype=torch.float64), process)
    return make_plan(values, process, get_noise_scale(scale), np.full(len(values) - 1, eta), **kw)


@pytest.mark.parametrize("method", ["exact", "paper", "comfyui"])
@pytest.mark.parametrize("process", ["ve", "flow"])
@pytest.mark.parametrize("scale", NOISE_SCALES)
def test_weights_of_a_constant_denoiser(method, process, scale):
    """D constant: x = alpha D + sigma eps stays on its mean, so x_scale alpha_s + sum of weights = alpha_t."""
    sigmas = np.array([0.97, 0.9, 0.7, 0.5, 0.2, 0.1, 0.05, 0.0]) * (1 if process == "flow" else 15)
    made = plan(sigmas, process, scale, 1.0, method=method)
    alpha = get_process(process).alpha(sigmas)
    for i, step in enumerate(made.steps):
        np.testing.assert_allclose(step.x_scale * alpha[i] + step.denoised, alpha[i + 1], rtol=1e-12)


def test_last_step_returns_the_denoiser():
    step = plan([10.0, 3.0, 1.0, 0.0], scale="sde_5", eta=1.0).steps[-1]
    assert step.last and step.x_scale == 0 and step.evaluations == ((0, 1.0),) and step.noise == 0
    assert step.amend is not None and step.settle is None
    assert plan([10.0, 1.4, 1.0, 0.0]).steps[-1].settle is not None
    assert plan([10.0, 3.0, 1.0, 0.0], scale="sde_5", eta=1.0, corrector=False).steps[-1].settle is None
    assert plan([10.0, 0.0]).steps[-1].settle is None


@pytest.mark.parametrize("scale, eta, length, long", [
    ("ode", 0.0, 0.45, False), ("ode", 0.0, 0.55, True),
    ("sde", 1.0, 0.045, False), ("sde", 1.0, 0.055, True), ("sde", 1.0, 0.19, True), ("sde", 1.0, 0.21, True),
    # Half of that noise is new by a fifth in steps of 0.223 = -log 0.8 alone.
    ("sde_2", 1.0, 0.19, False), ("sde_2", 1.0, 0.22, False), ("sde_2", 1.0, 0.23, True), ("sde", 0.5, 0.22, False),
    ("sde", 0.55, 0.19, False), ("sde", 0.57, 0.06, True), ("sde_5", 1.0, 0.1, False), ("sde_5", 1.0, 0.45, False)])
def test_long_steps_are_those_with_much_new_noise_or_without_a_polynomial(scale, eta, length, long):
    steps = plan(np.exp(-length * np.arange(8)), scale=scale, eta=eta).steps
    assert all(step.long == long for step in steps[:-1])


def test_orders_ramp_up():
    sigmas = np.geomspace(10, 0.1, 12)
    assert plan(sigmas, order=3, corrector=False).orders == (1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3)
    assert plan(sigmas, order=3).orders == (1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 4)
    assert plan(sigmas, order=5, corrector=False).orders[:6] == (1, 2, 3, 4, 5, 5)
    assert plan(sigmas, order=1, corrector=False).orders == (1,) * 11


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("corrector", [False, True])
def test_history_is_bounded(order, corrector):
    """What must be kept beside the newest evaluation: the changes between `order` ones.  With the corrector it is one more,
    and two more in short steps, whose correction takes the predictor back."""
    assert plan(np.geomspace(10, 0.1, 120), order=order, corrector=corrector).history == order - 1 + 2 * corrector
    assert plan(np.geomspace(10, 0.1, 20), order=order, corrector=corrector).history == order - 1 + corrector


def test_repeated_sigmas():
    """A step of length zero leaves x, and the evaluations at one sigma count once: the other steps' weights stay small."""
    once = plan([10.0, 5.0, 2.0, 1.0, 0.5])
    twice = plan([10.0, 5.0, 5.0, 2.0, 2.0, 1.0, 0.5])
    assert [s.x_scale for s in twice.steps if s.x_scale != 1] == [s.x_scale for s in once.steps]
    for step in twice.steps:
        assert all(np.isfinite(w) for _, w in step.evaluations) and sum(abs(w) for _, w in step.evaluations) < 6


@pytest.mark.parametrize("gap", [1e-3, 1e-5, 1e-7, 1e-9, 1e-12])
@pytest.mark.parametrize("corrector", [False, True])
def test_nearly_repeated_sigmas_do_not_amplify(gap, corrector):
    made = plan([10.0, 7.0, 5.0, 5.0 * (1 - gap), 2.0, 1.0, 0.5], corrector=corrector, order=4)
    for step in made.steps:
        assert sum(abs(w) for _, w in step.evaluations) < 30


@pytest.mark.parametrize("process", ["ve", "flow"])
def test_third_differences_amplify_no_more_than_with_equal_steps_where_there_is_noise(process):
    """The sum of |weights| over that of the weights, against the Adams-Bashforth methods' of orders 4 and 5."""
    of = lambda lam: (lam / (1 + lam) if process == "flow" else lam).tolist()
    sigmas = of(10 - np.cumsum(np.linspace(0.2, 1.2, 12)))
    amplified = lambda step: sum(abs(w) for _, w in step.evaluations) / abs(sum(w for _, w in step.evaluations))
    bounds = {4: 160 / 24, 5: 8794 / 720}
    without, noisy = (plan(sigmas, process, "sde_5", eta, order=5, corrector=False) for eta in (0.0, 1.0))
    assert any(amplified(step) > bounds[used] for step, used in zip(without.steps, without.orders) if used > 3)
    assert all(amplified(step) <= bounds[used] for step, used in zip(noisy.steps, noisy.orders) if used > 3)
    assert min(noisy.orders[2:]) == 3
    # Where steps shrink the orders are the same.
    falling = of(10 - np.cumsum(1.8 * 0.85 ** np.arange(10)))
    assert plan(falling, process, "sde_5", 1.0, order=5, corrector=False).orders == (1, 2, 3, 4, *[5] * 5)


@pytest.mark.parametrize("gap", [1e-5, 1e-9])
def test_nearly_repeated_sigmas_count_once(gap):
    """The newer evaluation stands for both, and the order is that of the schedule without the repetition."""
    made = plan([10.0, 7.0, 5.0, 5.0 * (1 - gap), 4.0, 3.0, 2.0], order=3, corrector=False)
    assert made.orders == (1, 2, 3, 3, 3, 3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-6, 1 - 1e-9), min_size=2, max_size=30), st.sampled_from(list(NOISE_SCALES)),
       st.sampled_from(["ve", "flow"]), st.floats(0, 2), st.integers(1, 5), st.booleans())
@example([0.9999999989999999, 0.999999999], "sde_4", "ve", 2.0, 1, False)      # an ulp apart, where log g falls by one
def test_any_schedule_gives_finite_bounded_weights(values, scale, process, eta, order, corrector):
    sigmas = sorted(values, reverse=True)
    if process == "ve":
        sigmas = [20 * s for s in sigmas]
    else:
        sigmas = [1.0, *sigmas]
    made = plan([*sigmas, 0.0], process, scale, eta, order=order, corrector=corrector)
    for step in made.steps:
        assert np.isfinite([step.x_scale, step.noise, *(w for _, w in step.evaluations)]).all()
        assert 0 <= step.x_scale <= 1 and 0 <= step.noise <= 20


@pytest.mark.parametrize("gap", [0.0, 2e-16, 1e-12, 1e-6])
def test_a_last_step_of_hardly_any_length(gap):
    """Two last sigmas an ulp apart: no slope can be taken across them, and nothing is divided by zero."""
    made = plan([10.0, 1.0, 1e-6 * (1 + gap), 1e-6, 0.0])
    assert all(np.isfinite([w for _, w in step.evaluations]).all() for step in made.steps)
    assert made.steps[-1].settle is None or np.isfinite(made.steps[-1].settle.slope)


SETTINGS = (1.0, 3, True, "exact", 1.2e-7)       # s_noise, order, corrector, method, rounding


def test_a_plan_is_made_once_for_the_same_schedule_and_settings():
    """The next picture and the next tile; any difference is a plan of its own, equal to that of make_plan."""
    process, scale, etas = get_process("ve"), get_noise_scale("sde_5"), np.ones(4)
    sigmas = np.array([10.0, 3.0, 1.0, 0.3, 0.0])
    first = known_plan(sigmas.copy(), process, scale, etas.copy(), *SETTINGS)
    assert known_plan(sigmas, process, scale, etas, *SETTINGS) is first
    other = sigmas.copy()
    other[2] = np.nextafter(1.0, 2.0)
    window = etas.copy()
    window[0] = 0.0
    flow = get_process("flow")
    changed = [(other, process, scale, etas, *SETTINGS), (sigmas, process, get_noise_scale("sde_4"), etas, *SETTINGS),
               (sigmas, process, scale, window, *SETTINGS), (sigmas / 11.0, flow, scale, etas, *SETTINGS)]
    for i, value in enumerate((0.9, 2, False, "paper", 1e-3)):
        changed.append((sigmas, process, scale, etas, *SETTINGS[:i], value, *SETTINGS[i + 1:]))
    for each in changed:
        made = known_plan(*each)
        assert made is not first
        assert made.steps == make_plan(*each[:-1], rounding=each[-1]).steps
    assert first.steps == make_plan(sigmas, process, scale, etas, *SETTINGS[:-1], rounding=SETTINGS[-1]).steps


def test_a_users_function_is_asked_each_time():
    """What it returns may have changed."""
    power = [1.0]
    scale = get_noise_scale(lambda lam: lam ** power[0])
    rest = get_process("ve"), scale, np.ones(3), *SETTINGS
    before = known_plan(np.array([10.0, 3.0, 1.0, 0.0]), *rest).steps
    power[0] = 2.0
    assert known_plan(np.array([10.0, 3.0, 1.0, 0.0]), *rest).steps != before


def test_a_plan_cannot_be_written_to():
    made = known_plan(np.array([10.0, 3.0, 1.0, 0.0]), get_process("ve"), get_noise_scale("ode"), np.zeros(3), *SETTINGS)
    with pytest.raises(ValueError, match="read-only"):
        made.sigmas[0] = 1.0
