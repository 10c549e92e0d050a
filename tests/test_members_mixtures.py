"""The benchmark of the members with noise on mixtures: its cells, its figures, a run that goes on."""
import dataclasses
import json

import pytest
import torch

from benchmarks import members_mixtures, quality, random_mixtures
from benchmarks.members import MEMBERS
from benchmarks.members_mixtures import GUIDANCE, SETTINGS, STEPS, cells, main, table
from benchmarks.random_mixtures import Told

SMALL = dataclasses.replace(SETTINGS, count=64, reference=2, fine_steps=20)


def test_every_combination_is_there_once():
    plan = cells()
    schedules = sum(map(len, quality.SCHEDULES.values()))
    assert len(plan) == len({cell.name for cell in plan}) == len(quality.PROBLEMS) * schedules * len(MEMBERS) * len(STEPS)
    assert {cell.problem.guidance or 1.0 for cell in plan} == set(GUIDANCE)
    assert all(cell.problem.guidance == 4.0 for cell in cells(guidance=(4.0,)))


def test_the_default_meets_the_same_member_by_comfyuis_formulas():
    for cell in cells(steps=(5,))[::5]:
        ours, theirs = cell.presets()
        assert (ours.method, ours.order, ours.corrector) == ("exact", 3, True)
        assert (theirs.method, theirs.corrector) == ("comfyui", False)
        assert quality.law_of(ours) == quality.law_of(theirs)


def test_the_figures_of_a_cell():
    """Against the parts that quality.py measures for its own two rows of `sde_5`."""
    cell = next(cell for cell in cells((5,), (4.0,), SMALL) if (cell.member, cell.eta) == ("sde_5", 1.0))
    found = cell.measure()
    for preset, mine in zip(cell.presets(), (found["ours"], found["comfyui"])):
        row = quality.measure(cell.problem, quality._family(preset, preset.name, quality.OURS), 5)
        assert row["excess"]["value"] == pytest.approx(mine, rel=1e-12)
    law = cell.problem.law(cell.presets()[0])
    assert found["least"] == pytest.approx(2 * law.floor_sd)
    assert found["ratio"] == max(found["ours"], found["least"]) / max(found["comfyui"], found["least"])
    low, high = found["over"]
    assert low <= found["ours"] - 1.05 * found["comfyui"] <= high
    assert found["worse"] == (found["ratio"] > 1.05 and low > 0)


def test_told_the_default_knows_what_guidance_adds():
    plan = cells(told=True)
    assert len(plan) == len(cells(guidance=(4.0, 7.5))) and all(cell.told and cell.problem.guidance for cell in plan)
    cell = next(cell for cell in cells((6,), (4.0,), SMALL, told=True) if (cell.member, cell.eta) == ("sde_3", 1.0))
    model, x, sigma = cell.problem.model, cell.problem.start(8), torch.full((8,), 2.0, dtype=torch.float64)
    told = Told(model)
    parts = dataclasses.replace(model, guidance=None)
    of_all, of_label = parts(x, sigma), dataclasses.replace(model, guidance=1.0)(x, sigma)
    torch.testing.assert_close(told(x, sigma), of_all + 4 * (of_label - of_all), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(told.excess(), 3 * (of_label - of_all), rtol=1e-8, atol=1e-8)
    # ComfyUI's formulas have no use for it, the default has.
    row, plain = cell.measure(), dataclasses.replace(cell, told=False).measure()
    assert row["comfyui"] == plain["comfyui"] and row["ours"] != plain["ours"] and row["least"] == plain["least"]
    assert row["told"] and not plain["told"] and "told what guidance adds" in table([row], "command")
    assert "told what" not in table([plain], "command")


@pytest.mark.parametrize("ours, worse", (("exact", False), ("order 1", True)))
def test_a_worse_sampler_is_told(ours, worse, monkeypatch):
    """The first order in the default's place is further off, and the table says so."""
    cell = next(cell for cell in cells((6,), (1.0,), dataclasses.replace(SETTINGS, count=384, reference=2))
                if cell.problem.name == "digits" and (cell.member, cell.eta) == ("sde_5", 1.0))
    if worse:
        first, other = cell.presets()
        monkeypatch.setattr(members_mixtures.Cell, "presets",
                            lambda self: (dataclasses.replace(first, order=1, corrector=False), other))
    row = cell.measure()
    assert row["worse"] is worse and (row["ratio"] > 1.05) is worse
    text = table([row], "command")
    assert ("worse by more than 5 % with the whole interval: 1 of 1 cells" in text.lower()) is worse
    assert ("| digits / ve / karras | sde_5 | 6 |" in text) is worse


def test_far_pictures_are_counted(monkeypatch):
    cell = cells((5,), (1.0,), SMALL)[0]
    run = quality._run_preset

    def thrown(preset):
        def sampled(*args):
            out = run(preset)(*args)
            out[:3] += 100.0 if preset.name == "ours" else 0.0
            return out
        return sampled

    monkeypatch.setattr(quality, "_run_preset", thrown)
    assert cell.measure()["far"] == [3, 0]


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(members_mixtures, "MEMBERS", MEMBERS[:1])
    monkeypatch.setattr(members_mixtures, "SETTINGS", SMALL)
    options = ["--guidance", "1", "--count", "64", "--out", str(tmp_path), "--steps"]
    main([*options, "5"])
    capsys.readouterr()
    file = tmp_path / "members_mixtures.jsonl"
    first = file.read_text()
    file.write_text(first + '{"key": "cut')
    measured = []
    measure = members_mixtures.Cell.measure
    monkeypatch.setattr(members_mixtures.Cell, "measure", lambda cell: measured.append(cell.steps) or measure(cell))
    main([*options, "5", "6"])
    assert measured == [6] * 8 and file.read_text().startswith(first)
    rows = [json.loads(line) for line in file.read_text().splitlines() if "cut" not in line]
    assert len(rows) == 16
    text = (tmp_path / "members_mixtures.md").read_text()
    assert text in capsys.readouterr().out
    assert "--steps 5 6 --guidance 1\n" in text and "| all | 16 |" in text and torch.__version__ in text


def test_random_mixtures_meet_their_own_law(tmp_path, capsys, monkeypatch):
    plan = members_mixtures.random_cells(2, 3, (5,), SMALL)
    assert len(plan) == len({cell.name for cell in plan}) == 2 * 3 * len(MEMBERS)
    drawn = [random_mixtures.drawn(seed) for seed in (3, 4)]
    assert [one["guidance"] for one in drawn] == [None, 7.5]        # of which one is guided
    for cell in plan:
        model, parts = cell.problem.model, drawn[cell.problem.name.startswith("mixture 4 ")]
        torch.testing.assert_close(model.means, parts["means"])
        assert cell.problem.guidance == parts["guidance"] and model.process == cell.problem.process
    law = plan[0].problem.law(plan[0].presets()[0])         # without guidance the data's
    mean = drawn[0]["means"].mean(0)
    assert (law.mean - mean).norm() < 0.25 * drawn[0]["means"].std(0).norm()
    monkeypatch.setattr(members_mixtures, "MEMBERS", MEMBERS[:1])
    monkeypatch.setattr(members_mixtures, "SETTINGS", SMALL)
    main(["--random", "1", "--seed", "3", "--steps", "5", "--out", str(tmp_path)])
    text = (tmp_path / "members_mixtures_random_3.md").read_text()
    assert text in capsys.readouterr().out
    assert "    python -m benchmarks.members_mixtures --random 1 --seed 3 --steps 5\n" in text and "| all | 3 |" in text
    main(["--random", "2", "--seed", "3", "--told", "--steps", "5", "--out", str(tmp_path)])       # the second one alone
    text = (tmp_path / "members_mixtures_random_3_told.md").read_text()
    assert "--random 2 --seed 3 --steps 5 --told\n" in text and "| all | 3 |" in text and "| guidance 7.5 | 3 |" in text
    main(["--random", "1", "--seed", "3", "--spectra", "--steps", "5", "--out", str(tmp_path)])
    text = (tmp_path / "members_mixtures_spectra_3.md").read_text()
    assert "--random 1 --seed 3 --spectra --steps 5\n" in text and "| all | 3 |" in text
    rows = [json.loads(line) for line in (tmp_path / "members_mixtures.jsonl").read_text().splitlines()]
    assert rows[-1]["problem"].startswith("spectra 3 of dimension ") and rows[-1]["ours"] != rows[0]["ours"]


@pytest.mark.parametrize("options", (["--seed", "2"], ["--spectra"], ["--random", "-1"], ["--random", "1", "--guidance", "4"],
                                     ["--told", "--guidance", "1"], ["--told", "--random", "1", "--seed", "3"]))
def test_options_that_do_not_go_together(options, capsys):
    with pytest.raises(SystemExit):
        main(options)
    assert f"{options[0]}: " in capsys.readouterr().err
