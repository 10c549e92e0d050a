"""The benchmark of all noise-free samplers on random mixtures: its cells, its figures, a run that goes on."""
import dataclasses
import json

import pytest

from benchmarks import quality, random_mixtures, random_peers
from benchmarks.random_mixtures import drawn
from benchmarks.random_peers import best_peer, main, measure, table


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(random_mixtures, "POINTS", 4)
    for name in ("EXACT_STEPS", "SPECTRA_STEPS"):
        monkeypatch.setattr(random_mixtures, name, 40)


def test_every_sampler_makes_the_same_number_of_calls():
    asked = []
    for process in ("ve", "flow"):
        found = dict((method.name, (method, steps)) for method, steps in quality.noise_free(process, 7))
        assert {"ours ode", "ours few_steps", "paper ode", "comfyui ode"} <= set(found)
        assert not any(method.noisy for method, _ in found.values())
        model, source = random_mixtures.mixture(1, process)
        kind = random_mixtures.SCHEDULES[process][0]
        start = source.start(4, quality.schedule(kind, 2, 2)[0].item())
        for name, (method, steps) in found.items():
            model.calls = 0
            method.run(model, start.clone(), quality.schedule(kind, steps, 7), None, lambda preset: (float("inf"), 0.0))
            asked.append((process, name, model.calls))
    assert {calls for _, _, calls in asked} == {7}


def test_our_presets_alone_are_told():
    plain, told = measure(4, (6,), False, False), measure(4, (6,), False, True)
    assert drawn(4)["guidance"] and len(plain) == len(told) == 3
    for one, other in zip(plain, told):
        changed = {name for name in one["errors"] if one["errors"][name] != other["errors"][name]}
        assert "ours ode" in changed and all(name.startswith("ours ") for name in changed)
    assert drawn(3)["guidance"] is None
    assert measure(3, (6,), False, False) == measure(3, (6,), False, True)


def test_the_table():
    row = {"process": "ve", "schedule": "karras", "guidance": 1.0, "dim": 2, "parts": 3}
    rows = [{**row, "steps": 5, "errors": {"ours ode": 0.1, "ours few_steps": 0.01, "comfyui ode": 0.2, "a": 0.05}},
            {**row, "steps": 7, "errors": {"ours ode": 0.1, "ours few_steps": 0.01, "comfyui ode": 0.1, "a": 0.4}}]
    assert [best_peer(one["errors"]) for one in rows] == ["a", "comfyui ode"]
    lines = table(rows, 1).splitlines()
    assert "| 5 | 1 | 0.0% | 2.00 | 2.00 | 0.50 |" in lines and "| 7 | 1 | 100.0% | 1.00 | 1.00 | 1.00 |" in lines
    assert "| all | 2 | 50.0% | 1.41 | 2.00 | 0.71 |" in lines
    assert "| a | 2 | 1 | 1.00 | 0.71 | 50.0% | 2.00 |" in lines and "best of 2 others" in lines[0]


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    options = ["--spectra", "--calls", "5", "--out", str(tmp_path), "--count"]
    main([*options, "1"])
    file = tmp_path / "random_peers.jsonl"
    first = file.read_text()
    file.write_text(first + '{"key": "cut')
    asked = []
    monkeypatch.setattr(random_peers, "measure", lambda seed, *how: asked.append((seed, *how)) or measure(seed, *how))
    capsys.readouterr()
    main([*options, "2"])
    assert asked == [(2, [5], True, False)] and file.read_text().startswith(first)
    text = (tmp_path / "random_peers_spectra.md").read_text()
    assert text in capsys.readouterr().out
    assert text.startswith("    python -m benchmarks.random_peers --count 2 --calls 5 --spectra\n\n2 random mixtures of parts ")
    assert {cell["dim"] for cell in json.loads(first)["cells"]} == {drawn(1, True)["means"].shape[1]}
    main([*options, "1", "--told"])
    assert asked[1:] == [(1, [5], True, True)]
    assert "told what guidance adds" in (tmp_path / "random_peers_spectra_told.md").read_text()


def test_a_run_that_became_infinite_is_lost(monkeypatch):
    method, steps = next(iter(quality.noise_free("ve", 5)))
    broken = dataclasses.replace(method, run=lambda *args: args[1] * float("nan"))
    monkeypatch.setattr(quality, "noise_free", lambda process, calls: [(broken, steps)])
    assert {row["errors"][method.name] for row in measure(1, (5,), False, False)} == {random_peers.LOST}
