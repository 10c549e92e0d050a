"""Guidance in long steps: the excess A = D - D_c that falls away, against Gaussian data, quadrature and the network."""
import dataclasses

import numpy as np
import pytest
import torch
from problems import digits, flow_schedule, karras, rms
from scipy.integrate import quad

import ersde
from benchmarks import members
from ersde import PRESETS, History, Preset, measure, solver
from ersde.demo.network import CLASSES, SIZE, guided, load_model
from ersde.noise_scale import get_noise_scale
from ersde.process import get_process
from ersde.solver import _amended as amended
from ersde.weights import METHODS, Amend, Curve, Step, make_plan

PROCESSES = ("ve", "flow")
SCHEDULES = {"ve": karras(7), "flow": flow_schedule(7)}


class Gaussians:
    """Guidance between two Gaussians of one variance: D_c and D_u in closed form, with w of `excess` in D."""

    def __init__(self, process, guidance=4.0, std=1.0, dim=6):
        generator = torch.Generator().manual_seed(2)
        self.process, self.w, self.v = process, guidance, std ** 2
        self.means = torch.randn(2, dim, generator=generator, dtype=torch.float64)
        self.asked = 0

    def start(self, count, sigma):
        generator = torch.Generator().manual_seed(1)
        return torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64) * sigma

    def __call__(self, x, sigma, **_):
        sigma = sigma[0].item()
        alpha = 1.0 - sigma if self.process == "flow" else 1.0
        gain = alpha * self.v / (alpha ** 2 * self.v + sigma ** 2)
        condition, plain = (mean + gain * (x - alpha * mean) for mean in self.means.to(x))
        self.added = (self.w - 1.0) * (condition - plain)
        return condition + self.added

    def excess(self):
        self.asked += 1
        return self.added


def sample(model, sigmas, preset="few_steps", x=None, **options):
    x = model.start(3, sigmas[0].item()) if x is None else x
    return ersde.sample_preset(model, x, sigmas, preset, {"seed": 5}, disable=True, process=model.process, **options)


def plan(process, sigmas, member="ode", eta=1.0, **settings):
    etas = np.full(len(sigmas) - 1, eta)
    return make_plan(sigmas.numpy(), get_process(process), get_noise_scale(member), etas, **settings)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("member, eta", [("ode", 1.0), ("sde", 1.0), ("sde_5", 1.0), ("sde_3", 0.5)])
def test_the_weight_is_what_a_step_misses_by_holding_a_constant(process, member, eta):
    """alpha_t (phi_t int A(lambda) / A(lambda_s) phi' / phi^2 dlambda - 1 + phi_t / phi_s), by quadrature."""
    sigmas, scale = SCHEDULES[process], get_noise_scale(member)
    lam, alpha = get_process(process).lam(sigmas.numpy()), get_process(process).alpha(sigmas.numpy())
    log_phi = lambda at: np.log(at) + eta * scale.log_g_array(np.array([at]))[0]
    steps, seen = plan(process, sigmas, member, eta).steps, 0
    assert steps[0].excess == 0.0       # nothing may be decided yet
    for i, step in enumerate(steps[1:-1], 1):
        s, t = lam[i], lam[i + 1]
        if not step.long:
            assert step.excess == 0.0
            continue
        v = 0.5 * s * t
        fall = lambda at: (1 + v / s ** 2) / (1 + v / at ** 2)
        change = lambda u: 2 * v / np.exp(2 * u) / (1 + v / np.exp(2 * u)) * fall(np.exp(u)) \
            * np.expm1(log_phi(t) - log_phi(np.exp(u)))
        assert step.excess == pytest.approx(alpha[i + 1] * quad(change, np.log(t), np.log(s), epsabs=1e-13)[0], rel=1e-9)
        assert step.excess < 0.0
        seen += 1
    assert seen > 2


@pytest.mark.parametrize("process", PROCESSES)
def test_for_gaussians_of_that_variance_the_excess_is_known_over_the_whole_step(process):
    """One step of data whose variance is lambda_s lambda_t / 2, with D_c held: A counts as by the exact integral."""
    s, t = (2.0, 0.5) if process == "ve" else (0.6, 0.3)
    lam = get_process(process).lam(np.array([s, t]))
    model = Gaussians(process, std=(0.5 * lam[0] * lam[1]) ** 0.5)
    # What A is at any lambda, whatever x is there.
    def at(sigma):
        model(torch.zeros(1, 6, dtype=torch.float64), torch.tensor([sigma], dtype=torch.float64))
        return model.added

    sigma_of = lambda at: at if process == "ve" else at / (1 + at)
    exact = sum(w * lam[1] / node ** 2 * at(sigma_of(node)) for node, w in zip(*_gauss(lam[1], lam[0])))
    middle = 0.5 * (1 + s) if process == "flow" else 2 * s
    step = plan(process, torch.tensor([middle, s, t, 0.0], dtype=torch.float64)).steps[1]
    alpha = 1 - t if process == "flow" else 1.0
    held = alpha * (1 - lam[1] / lam[0])
    torch.testing.assert_close((held + step.excess) * at(s), alpha * exact, rtol=1e-9, atol=0)


def _gauss(low, high, points=60):
    x, w = np.polynomial.legendre.leggauss(points)
    return low + 0.5 * (high - low) * (x + 1), 0.5 * (high - low) * w


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("std", [0.3, 1.0, 3.0])
def test_what_the_variance_explains_is_not_counted_twice(process, std):
    """Guidance between Gaussians of one variance is a Gaussian: the law of the long steps has all of it."""
    model, sigmas = Gaussians(process, 7.5, std), SCHEDULES[process]
    told, alone = sample(model, sigmas, excess=model.excess), sample(model, sigmas)
    assert 0 < model.asked < len(sigmas) - 1
    torch.testing.assert_close(told, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("process, guidance, most", [("ve", 4.0, 0.95), ("ve", 7.5, 0.8), ("flow", 4.0, 0.95)])
def test_nearer_to_the_solution_of_the_network(process, guidance, most):
    model, labels = load_model(process), torch.arange(20) % len(CLASSES)
    call = guided(model, labels, guidance)
    from ersde.demo import trained

    x = trained.start(range(20), process)
    run = lambda steps, **kw: ersde.sample_preset(call, x, trained.schedule(process, steps), "few_steps", disable=True,
                                                  process=process, **kw)
    exact, told, alone = run(60), run(6, excess=call.excess), run(6)
    assert told.shape == (20, 3, SIZE, SIZE)
    assert rms(told, exact) < most * rms(alone, exact), (rms(told, exact), rms(alone, exact))


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("preset", PRESETS)
def test_an_excess_of_none_or_zero_is_none(process, preset):
    model = Gaussians(process)
    alone = sample(model, SCHEDULES[process], preset)
    assert torch.equal(sample(model, SCHEDULES[process], preset, excess=lambda: None), alone)
    assert torch.equal(sample(model, SCHEDULES[process], preset, excess=lambda: 0.0 * model.added), alone)


@pytest.mark.parametrize("preset", [Preset("one", order=1), *(Preset(m, method=m) for m in METHODS if m != "exact")])
def test_order_1_and_the_published_formulas_do_not_ask(preset):
    model = Gaussians("ve")
    sample(model, SCHEDULES["ve"], preset, excess=model.excess)
    assert model.asked == 0


def test_short_steps_do_not_ask():
    model = Gaussians("ve")
    sample(model, karras(60), excess=model.excess)
    assert model.asked == 0


def test_with_cfg_pp_it_is_not_asked_for():
    model = Gaussians("ve")
    sample(model, SCHEDULES["ve"], excess=model.excess, guidance=lambda: model.added)
    assert model.asked == 0


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("preset", ["few_steps", "sde_5"])
def test_a_run_in_parts_is_the_whole(process, preset):
    model, sigmas = Gaussians(process), SCHEDULES[process]
    whole = sample(model, sigmas, preset, excess=model.excess)
    for cut in range(1, len(sigmas) - 1):
        history = History()
        x = sample(model, sigmas[:cut + 1], preset, history=history, excess=model.excess)
        history = history.to("cpu")
        assert torch.equal(sample(model, sigmas[cut:], preset, x=x, history=history, excess=model.excess), whole), cut


@pytest.mark.parametrize("process", PROCESSES)
def test_a_part_that_is_not_told_takes_nothing_back_of_the_one_before(process):
    model, sigmas, pictures = Gaussians(process), SCHEDULES[process], []
    for forget in (False, True):
        history = History()
        x = sample(model, sigmas[:4], history=history, excess=model.excess)
        assert history._past.memory.excess is not None
        if forget:
            history._past.memory.excess = None
        pictures.append(sample(model, sigmas[3:], x=x, history=history))
    assert torch.equal(*pictures)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_picture_of_a_batch_is_the_picture_alone(dtype):
    model, sigmas = Gaussians("ve", dim=96), SCHEDULES["ve"]
    x = model.start(3, sigmas[0].item()).to(dtype)
    all_of_them = sample(model, sigmas, x=x, excess=model.excess)
    assert all_of_them.dtype == dtype and torch.equal(sample(model, sigmas, x=x[1:2], excess=model.excess), all_of_them[1:2])


def test_another_model_starts_without_what_the_old_one_added():
    """After a refiner has come in, its own run from there on is the rest."""
    model, sigmas = Gaussians("ve"), SCHEDULES["ve"]
    calls = iter(range(100))
    seen = []

    def watched(x, sigma, **_):
        seen.append(x.clone())
        return model(x, sigma)

    watched.process = "ve"
    x = model.start(3, sigmas[0].item())
    got = sample(watched, sigmas, x=x, excess=model.excess, fresh=lambda: next(calls) == 3)
    assert torch.equal(sample(model, sigmas[3:], x=seen[3], excess=model.excess), got)


def test_the_correction_takes_the_bend_of_the_excess_back():
    """x + E is the same, whatever the bend had added to x, when D and v are."""
    generator = torch.Generator().manual_seed(0)
    x, denoised, change, extra = (torch.randn(2, 50, generator=generator, dtype=torch.float64) for _ in range(4))
    amend = Amend(1.0, 0.09, Curve((0.35, 0.0), (1.0, 0.0), 1.0, 0.09, 1.0), 0.3, measure=False)
    alone = dataclasses.replace(plan("ve", SCHEDULES["ve"]), steps=(Step(1.0, 0.0, (), 0.0, amend=amend),))
    numbers = measure.numbers(alone, 2, x.dtype, x.device)[0]
    known = torch.full((2, 1), 2.0, dtype=torch.float64)

    def corrected(x, *lean):
        score = x - denoised
        found = amended(measure.TENSORS, amend, numbers, score, denoised, [change.clone()], [None], 1.0, (), known, *lean)
        return score + found[0]

    with_it, without = corrected(x - 0.2 * extra, extra, torch.tensor(-0.2)), corrected(x)
    torch.testing.assert_close(with_it, without)
    assert not torch.allclose(corrected(x - 0.2 * extra), without)


@pytest.mark.parametrize("kind", [measure.TENSORS, None], ids=["tensors", "floats"])
def test_the_bend_and_what_is_added_have_the_excess_once(kind):
    """Along A the bend w R_0 and what is added are c_A A together, where a quarter to all of it is left."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 200, generator=generator, dtype=torch.float64)
    rule = measure.kind(x) if kind is None else kind
    by = measure.numbers(plan("ve", SCHEDULES["ve"]), 2, x.dtype, x.device, rule.floats)[1]
    weight, bend = -0.2, 0.15
    other = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    other -= (other * x).sum() / (x * x).sum() * x
    for part, left in ((-0.8, 0.4), (0.0, 1.0), (2.0, 1.0), (-1.2, 0.25), (-9.0, 0.25)):
        change = part * x + other
        inner = lambda a, b: rule.inner(rule.rows(a), rule.rows(b))
        found = float(measure.left(rule, by, weight, rule.take(bend, x), inner(x, change), inner(x, x)))
        assert found == pytest.approx(left)
        if 0.25 < left < 1.0:
            assert ((bend * change + found * weight * x) * x).sum() == pytest.approx(float(weight * (x * x).sum()))


@pytest.mark.parametrize("kind", [measure.TENSORS, None], ids=["tensors", "floats"])
def test_less_of_an_excess_is_told_where_it_is_small_beside_the_evaluation(kind):
    """Wiener's gain |A|^2 / (|A|^2 + |D|^2 / 20): half at |A|^2 = |D|^2 / 20, nothing of nothing."""
    x = torch.ones(1, 200, dtype=torch.float64)
    rule = measure.kind(x) if kind is None else kind
    gain = lambda size, far: float(measure.told(rule, rule.take(size, x), rule.take(far, x)))
    assert gain(1.0, 20 ** 0.5) == pytest.approx(0.5)
    assert gain(4.0, 1.0) == pytest.approx(4.0 / 4.05)
    assert gain(1e20, 1.0) == pytest.approx(1.0) and gain(1e-20, 1.0) == pytest.approx(2e-19)
    assert gain(0.0, 0.0) == 0.0 and gain(0.0, 1.0) == 0.0 and gain(1.0, 0.0) == 1.0


@pytest.mark.parametrize("common", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["tensors", "floats"])
def test_a_step_that_is_told_counts_less_of_a_change_as_unforeseen(kind, common):
    """|D| = 4, |R| = |R_1| = 2 at right angles, |A|^2 = 0.8: G = 1/2 takes half of the line's cut, without noise nothing;
    and what is added is G of what the bend has not got.
    """
    step = Step(1.0, 0.0, (), 0.0, bend=(0.4,), ratio=1.0, common=common, long=True, excess=-0.8,
                reach=Curve((0.3, -0.3), (1.0, 0.0), 1.0, 0.04, 1.0),
                amend=Amend(1.0, 1.0, Curve((0.2, 0.6), (0.7, 1.1), 1.0, 0.25, 1.0), 0.5))
    denoised, change, before = (torch.tensor([row], dtype=torch.float64) for row in ([4.0, 0.0], [0.0, 2.0], [2.0, 0.0]))
    lean = torch.tensor([[0.0, -0.8 ** 0.5]], dtype=torch.float64)
    m = measure.TENSORS if kind == "tensors" else measure.kind(denoised)
    alone = dataclasses.replace(plan("ve", SCHEDULES["ve"]), steps=(step,))
    by = measure.numbers(alone, 2, denoised.dtype, denoised.device, m.floats)[0]
    law = solver.Law(m.take(0.0, denoised), m.take(0.0, denoised) > 0, m.rows(change), None)
    reach = lambda *lean: solver._reach(m, step, by, denoised, [change, before], law, None, *lean)
    cut = (0.25 / 0.14) ** 2
    line = 0.4 / (1.25 * 2.0) if common == 1.0 else 0.4 / (1.0 + 0.5 * 0.25 + 0.5 * cut)
    told = 0.4 / (1.25 * 2.0) if common == 1.0 else 0.4 / (1.0 + 0.5 * 0.25 + 0.25 * cut)
    assert float(reach()[0]) == pytest.approx(line, rel=1e-9) and reach()[3] is None
    weight, _, _, share = reach(lean)
    assert float(weight) == pytest.approx(told, rel=1e-9)
    assert float(share) == pytest.approx(0.5 * (1.0 - told * 2.0 / (0.8 * 0.8 ** 0.5)), rel=1e-9)
    assert float(reach(torch.zeros_like(lean))[0]) == pytest.approx(line, rel=1e-9)


def test_pictures_keep_their_contrast():
    """With guidance 4 and noise |A| is a half to a fifth of |D|: told all its fall, six steps left 0.93 of the contrast."""
    from ersde.demo import trained

    labels, x = torch.arange(40) % len(CLASSES), trained.start(range(40), "ve")
    call, sigmas = guided(load_model("ve"), labels, 4.0), trained.schedule("ve", 6)
    run = lambda **kw: ersde.sample_preset(call, x, sigmas, Preset("noisy", "sde_4"), {"seed": 0}, disable=True,
                                           process="ve", **kw).flatten(1).std(1).mean()
    told, alone = run(excess=call.excess), run()
    assert 0.95 * alone < told < 0.99 * alone, told / alone


def test_an_excess_of_many_variances_does_not_fall_twice():
    """Gaussian data of four scales, where the line has most of its fall: told, the members with noise are no further off."""
    ratios = []
    for cell in members.cells((6, 10, 20), (4.0, 7.5)):
        law = members.exact(cell.process, cell.guidance, cell.member, cell.eta)
        at = get_process(cell.process).lam(cell.sigmas()[-1:].numpy())[0]
        told, alone = (np.hypot(*(np.linalg.norm(a - b) for a, b in zip(
            members.result(members.DEFAULT, cell, told=told), law(at)))) for told in (True, False))
        ratios.append(told / alone)
    assert len(ratios) == 336 and np.exp(np.mean(np.log(ratios))) < 0.97 and np.mean(np.array(ratios) > 1.2) < 0.15, ratios


def test_after_a_short_step_it_is_not_asked_for():
    """The step before has measured nothing that would tell how much of it is explained."""
    model = Gaussians("ve")
    sigmas = torch.tensor([4.0, 3.9, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    long = [step.long for step in plan("ve", sigmas).steps]
    assert long == [False, True, True, True, False]
    sample(model, sigmas, excess=model.excess)
    assert model.asked == 2


def test_what_is_wrong_with_it_is_one_sentence():
    model, sigmas = Gaussians("ve"), SCHEDULES["ve"]
    with pytest.raises(TypeError, match="^excess must be"):
        sample(model, sigmas, excess=3)
    with pytest.raises((TypeError, ValueError), match=r"^what excess returns \(step 1\)"):
        sample(model, sigmas, excess=lambda: model.added[:1])
    with pytest.raises((TypeError, ValueError), match=r"^what excess returns \(step 1\)"):
        sample(model, sigmas, excess=lambda: 1.0)


@pytest.mark.parametrize("process", PROCESSES)
def test_mixtures_are_not_further_off(process):
    """Digits, whose excess goes all at once where one of them has been decided on: geometric means over 5 to 10 steps."""
    plain, model, last = digits(process), digits(process, guidance=4.0), {}

    def call(x, sigma, **_):
        last["D"], last["C"] = model(x, sigma), plain._denoise(x, *_parts(x, sigma, process), model.label)
        return last["D"]

    call.process = process
    schedule = karras if process == "ve" else flow_schedule
    x = plain.start(256, float(schedule(5)[0]), torch.Generator().manual_seed(3))
    exact, ratios = sample(call, schedule(1500), "ode", x=x), []
    for steps in (5, 6, 7, 8, 10):
        told = sample(call, schedule(steps), x=x, excess=lambda: last["D"] - last["C"])
        ratios.append(rms(told, exact) / rms(sample(call, schedule(steps), x=x), exact))
    assert np.exp(np.mean(np.log(ratios))) < 1.02, ratios


def _parts(x, sigma, process):
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return (1 - sigma if process == "flow" else torch.ones_like(sigma)), sigma
