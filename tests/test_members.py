"""The benchmark of the members with noise: its cells, the exact law, its figures."""
import json
import math

import numpy as np
import pytest
import torch

import ersde
from benchmarks import members
from benchmarks.members import ALL, CLASS, MEAN, MEMBERS, Cell, cells, denoiser, exact, measure, result
from benchmarks.variables import COMFYUI, DEFAULT, DIVERGED, GUIDANCE, SCHEDULES, STEPS, Row, grid
from ersde.noise_scale import NOISE_SCALES
from ersde.presets import PRESETS

CELL = Cell("ve", 4.0, "sde_4", 1.0, "karras", 6)


def test_every_combination_is_there_once():
    plan = cells()
    assert len(set(plan)) == len(plan) == len(GUIDANCE) * len(MEMBERS) * len(STEPS) * sum(map(len, SCHEDULES.values()))
    assert {cell.member for cell in plan if cell.eta == 1} == set(NOISE_SCALES) - {"ode"}
    assert {(cell.process, cell.schedule) for cell in plan} == {(p, s) for p, kinds in SCHEDULES.items() for s in kinds}


@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("member, eta", MEMBERS)
def test_the_exact_law_without_guidance_is_the_marginal_of_the_data(process, member, eta):
    """Every member has the same marginals."""
    for lam in (5.0, 0.5, 0.01):
        mean, deviation = exact(process, 1.0, member, eta)(lam)
        np.testing.assert_allclose(mean, MEAN, rtol=1e-5)
        np.testing.assert_allclose(deviation, np.hypot(CLASS, lam), rtol=1e-5)


@pytest.mark.parametrize("process, order", (("ve", 1.8), ("flow", 0.9)))
@pytest.mark.parametrize("member", ("sde_5", "sde", "sde_3"))
def test_the_exact_law_with_guidance_is_what_many_steps_reach(process, order, member):
    """With the order of the method; in a flow the first step, from lambda = infinity, leaves one of the first."""
    error = []
    for steps in (100, 400):
        cell = Cell(process, 4.0, member, 1.0, SCHEDULES[process][0], steps)
        at = members.get_process(process).lam(cell.sigmas()[-1:].numpy())[0]
        own, wanted = result(Row("lambda", 2), cell), exact(process, 4.0, member, 1.0)(at)
        error.append(np.abs(np.array(own) - np.array(wanted)).max())
    assert error[1] < error[0] / 4 ** order


def test_the_denoiser_is_the_guided_one_of_the_two_models():
    a, b = denoiser(0.5, 4.0)
    y = np.array([0.3, -0.2, 1.0, 0.1])
    of_class = MEAN + CLASS ** 2 / (CLASS ** 2 + 0.25) * (y - MEAN)
    of_all = ALL ** 2 / (ALL ** 2 + 0.25) * y
    np.testing.assert_allclose(a * y + b, of_all + 4.0 * (of_class - of_all), rtol=1e-12)


@pytest.mark.parametrize("finished", (False, True))
@pytest.mark.parametrize("cell", (CELL, Cell("ve", 1.0, "sde", 1.0, "simple", 6)), ids=lambda cell: cell.member)
def test_the_coefficients_are_what_pictures_show(cell, finished):
    """The public sampler on a picture of many pixels of each kind, with one normal for each."""
    count, sigmas = 60_000, cell.sigmas()
    sigmas = torch.cat((sigmas, torch.zeros(1))) if finished else sigmas
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(1, 4, count, generator=generator, dtype=torch.float64)
    as_tensor = lambda value: torch.from_numpy(value)[:, None]

    def model(x, sigma):
        a, b = denoiser(sigma[0].item(), cell.guidance)
        return as_tensor(a) * x + as_tensor(b)

    start = as_tensor(MEAN) + as_tensor(np.hypot(CLASS, sigmas[0].item())) * draw()
    out = ersde.sample_er_sde(model, start, sigmas, noise_scale=cell.member, eta=cell.eta,
                              noise_sampler=lambda *_: draw(), disable=True)[0]
    mean, deviation = result(DEFAULT, cell, finished)
    # Four standard deviations of a mean and of a deviation of as many numbers.
    np.testing.assert_allclose(out.mean(1), mean, atol=4 * deviation.max() / count ** 0.5)
    np.testing.assert_allclose(out.std(1), deviation, rtol=4 / (2 * count) ** 0.5)


def test_the_default_is_seldom_further_from_the_exact_law_than_comfyui():
    """What the line of a step without a variance gets with noise: before it got all of it, a fifth of these were."""
    ratios = np.array([measure(cell, [COMFYUI, DEFAULT])["ratio"][DEFAULT.name]
                       for cell in cells((6, 10, 20, 50), (1.0, 4.0, 7.5))])
    assert len(ratios) == 672 and (ratios > 1.05).mean() < 0.13 and np.exp(np.log(ratios).mean()) < 0.6


@pytest.mark.parametrize("kind", ("karras", "exponential"))
@pytest.mark.parametrize("member, eta", MEMBERS)
def test_more_steps_are_nearer_to_the_exact_law(member, eta, kind):
    """Many steps are short, and nearly all that D changes by is fresh noise: of that the trust must not make a fault."""
    few, many = (measure(Cell("ve", 1.0, member, eta, kind, steps), [COMFYUI, DEFAULT]) for steps in (30, 80))
    off = [cell["comfyui"] * cell["ratio"][DEFAULT.name] for cell in (few, many)]
    assert off[1] < off[0] / 3, off
    assert many["ratio"][DEFAULT.name] < 2


@pytest.mark.parametrize("order", (3, 4, 5))
@pytest.mark.parametrize("member, eta", (("sde_5", 1.0), ("sde_4", 0.5), ("sde", 0.1)))
def test_no_order_runs_wild_at_high_guidance_where_steps_grow(member, eta, order):
    """Third differences made the finest scale unstable, which the trust does not see in the noise: up to 128 times."""
    for steps in (20, 30, 50):
        row = Row("lambda", order, True, True)
        assert measure(Cell("ve", 7.5, member, eta, "simple", steps), [COMFYUI, row])["ratio"][row.name] < 5


def test_ratios_and_a_run_that_becomes_infinite(monkeypatch):
    found = measure(CELL, [COMFYUI, DEFAULT])
    assert found["ratio"][COMFYUI.name] == 1.0 and 0 < found["ratio"][DEFAULT.name] < 2
    assert (PRESETS["sde_4"].order, PRESETS["sde_4"].corrector) == (DEFAULT.order, DEFAULT.corrector)
    whole = result

    def infinite(row, *args):
        if row == DEFAULT:
            raise FloatingPointError
        return whole(row, *args)

    monkeypatch.setattr(members, "result", infinite)
    found = measure(CELL, [COMFYUI, DEFAULT])
    assert found["ratio"][DEFAULT.name] == found["finished"]["ratio"][DEFAULT.name] == DIVERGED


@pytest.mark.parametrize("process, schedule", (("ve", "karras"), ("flow", "shift 3")))
def test_the_finished_picture_lacks_what_lies_below_the_last_sigma(process, schedule):
    """The mean of the data at each state: less than their deviation by 1 / (1 + (lambda / class)^2)^1/2 each."""
    cell = Cell(process, 1.0, "sde_5", 1.0, schedule, 400)
    low = members.get_process(process).lam(cell.sigmas()[-1:].numpy())[0]
    mean, deviation = result(Row("lambda", 2), cell, True)
    np.testing.assert_allclose(mean, MEAN, rtol=2e-2)
    np.testing.assert_allclose(deviation, CLASS / np.sqrt(1 + (low / CLASS) ** 2), rtol=2e-2)
    found = measure(cell, [COMFYUI, DEFAULT])["finished"]
    assert found["comfyui"] == pytest.approx(np.linalg.norm(CLASS - CLASS / np.sqrt(1 + (low / CLASS) ** 2)), rel=0.3)


def test_without_guidance_finished_pictures_are_not_further_off_than_comfyuis():
    ratios = [measure(cell, [COMFYUI, DEFAULT])["finished"]["ratio"][DEFAULT.name] for cell in cells((6, 20, 50), (1.0,))]
    assert len(ratios) == 168 and max(ratios) < 1.05


def test_how_much_further_off_is_said_in_the_units_of_the_data():
    done = [{"comfyui": comfyui, "ratio": {DEFAULT.name: ratio}} for comfyui, ratio in
            ((0.2, 0.5), (0.1, 1.04), (0.02, 1.1), (0.03, 1.2), (0.1, 1.3))]
    text = members.further(done)
    assert text.startswith("0.98 of ComfyUI's") and "in 3 of 5 cells, there by 0.0060 in the median" in text
    assert "and at most 0.030" in text
    assert text.endswith("by more than 0.01 in 1")


def test_a_flow_of_comfyui_starts_below_one(monkeypatch):
    whole, first = members.run_plan, []
    monkeypatch.setattr(members, "run_plan", lambda *args, **kw: first.append(args[3][0].item()) or whole(*args, **kw))
    cell = Cell("flow", 1.0, "sde_5", 1.0, "shift 3", 6)
    assert all(np.isfinite(part).all() for row in (COMFYUI, DEFAULT) for part in result(row, cell))
    assert first == [0.9999, 1.0]


def test_the_command_writes_its_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(members, "MEMBERS", MEMBERS[-1:])
    monkeypatch.setattr(members, "grid", lambda: grid(("lambda", "rational"), (1, 3)))
    members.main(["--steps", "6", "--guidance", "1", "--out", str(tmp_path)])
    text = (tmp_path / "members.md").read_text()
    assert "--steps 6 --guidance 1" in text and "| sde_5, eta 0.5 (8) |" in text
    assert "The default, lambda / 3 / on / on" in text
    assert "With 5 steps and more and guidance up to 7.5 it is at 0." in text
    assert "further off in 0 of 8 cells. Of the finished pictures it is at 0." in text
    assert "further off in 0 of 8 cells; without guidance at 0." in text
    assert text.count("| ve, karras | 1 | 0.") == 1 and "| 6 steps | 8 | 0." in text
    kept = json.loads((tmp_path / "members.json").read_text())
    assert len(kept["cells"]) == 8 and all(math.isfinite(c["ratio"][DEFAULT.name]) for c in kept["cells"])


def test_the_command_measures_the_member_without_noise_too(tmp_path, monkeypatch):
    monkeypatch.setattr(members, "grid", lambda: [COMFYUI, DEFAULT])
    members.main(["--ode", "--quick", "--out", str(tmp_path)])
    text = (tmp_path / "members_quick_ode.md").read_text()
    assert "of the members without noise" in text and "python -m benchmarks.members --quick --ode" in text
    cells = json.loads((tmp_path / "members_quick_ode.json").read_text())["cells"]
    assert len(cells) == 32 and {(cell["member"], cell["eta"]) for cell in cells} == {("ode", 0.0)}


def test_the_command_measures_the_default_alone(tmp_path):
    members.main(["--default", "--quick", "--steps", "6", "--guidance", "1", "--out", str(tmp_path)])
    text = (tmp_path / "members_quick_default.md").read_text()
    assert "# The default, members with noise\n" in text
    assert "python -m benchmarks.members --quick --default --steps 6 --guidance 1\n" in text
    found = json.loads((tmp_path / "members_quick_default.json").read_text())["cells"]
    assert len(found) == 56 and all(set(cell["ratio"]) == {COMFYUI.name, DEFAULT.name} for cell in found)
    one = measure(Cell("ve", 1.0, "sde_3", 1.0, "beta", 6), [COMFYUI, DEFAULT])
    kept = [cell for cell in found if all(cell[name] == one[name] for name in ("process", "member", "eta", "schedule"))]
    assert [cell["ratio"][DEFAULT.name] for cell in kept] == pytest.approx([one["ratio"][DEFAULT.name]], rel=1e-3)


def test_a_dip_of_comfyui_is_told_from_what_is_further_off():
    """ComfyUI's distance falls like 1 / steps^2: the default's at 10 steps is above that, or ComfyUI's own below it."""
    def cell(member, steps, own, comfyui):
        return {"process": "ve", "guidance": 4.0, "member": member, "eta": 1.0, "schedule": "karras", "steps": steps,
                "comfyui": comfyui, "ratio": {DEFAULT.name: own / comfyui}}

    at = {5: 1 / 25, 10: 1 / 100, 20: 1 / 400}
    even = [cell("sde", n, (1.5 if n == 10 else 1.0) * value, value) for n, value in at.items()]
    dip = [cell("sde_5", n, value, (0.5 if n == 10 else 1.0) * value) for n, value in at.items()]
    last = [cell("sde_4", 5, 1.0, 1.0), cell("sde_4", 10, 3.0, 1.0)]
    text = members.at_dips(even + dip + last, even + dip + last)
    assert text.startswith("2 of the cells") and "In 1 of these" in text


def test_the_command_tells_what_guidance_adds(tmp_path):
    members.main(["--told", "--quick", "--steps", "6", "--out", str(tmp_path)])
    text = (tmp_path / "members_quick_told.md").read_text()
    assert "told what guidance adds" in text and "python -m benchmarks.members --quick --told --steps 6" in text
    found = json.loads((tmp_path / "members_quick_told.json").read_text())["cells"]
    assert len(found) == 56 and {cell["guidance"] for cell in found} == {7.5}
    alone = {(c.process, c.member, c.eta, c.schedule): measure(c, [COMFYUI, DEFAULT]) for c in cells((6,), (7.5,))}
    over = []
    for cell in found:
        plain = alone[cell["process"], cell["member"], cell["eta"], cell["schedule"]]
        assert cell["comfyui"] == pytest.approx(plain["comfyui"], rel=1e-3)
        over.append(cell["ratio"][DEFAULT.name] / plain["ratio"][DEFAULT.name])
    assert np.exp(np.log(over).mean()) < 0.9, over


def test_what_guidance_adds_is_told_as_the_difference_to_the_conditional_model(monkeypatch):
    seen, whole = [], members.run_plan

    def run_plan(plan, model, x, *args, excess, **kw):
        def watched(x, sigma):
            out = model(x, sigma)
            (a, b), (a_c, b_c) = denoiser(sigma[0].item(), CELL.guidance), denoiser(sigma[0].item(), 1.0)
            wanted = torch.from_numpy(a - a_c)[:, None] * x
            wanted[0, :, 0] += torch.from_numpy((b - b_c) * (CELL.steps + 1) ** 0.5)
            seen.append((excess(), wanted))
            return out
        return whole(plan, watched, x, *args, excess=excess, **kw)

    monkeypatch.setattr(members, "run_plan", run_plan)
    result(DEFAULT, CELL, told=True)
    assert len(seen) == CELL.steps - 1
    for found, wanted in seen:
        torch.testing.assert_close(found, wanted)
